"""Core attention of MLA, dense and sparse, and the cache it decodes from.

MLA in two modes that compute the same function. MHA mode expands each token's latent into keys and values per head: few operations per
pair, right when every pair is visited (dense stages). MQA mode folds W^UK into the query and W^UV into the output and attends to
the latents themselves, one (kv_lora_rank + rope) vector per token shared by all heads: little to gather per token, right when each query reads
only the tokens that the indexer selected (sparse stage), and for decoding.

Each function has a Triton twin of the same name and signature in kernels.py; conventions as in indexer.py. lse is the natural logarithm.
"""
import torch

from indexer import over_rows, quantise, visible


def _softmax(logits, seen):
    """Softmax over the last dimension where seen -> p, lse. A row that sees nothing gives p = 0, lse = -inf and gradient 0: the fills stop its NaN."""
    logits = logits.masked_fill(~seen, float("-inf"))
    return torch.softmax(logits, -1).masked_fill(~seen, 0), logits.detach().logsumexp(-1)


def dense_attention(q, k, v, scale, first=None, last=None):
    """Softmax attention over everything visible. q (B,S,H,d), k (B,T,Hk,d), v (B,T,Hk,dv), Hk = H (MHA mode) or 1 (MQA mode)
    -> out (B,S,H,dv) in v's dtype, lse (B,S,H) float32 of scale q.k. Differentiable in q, k, v. Softmax in float32."""
    (B, S, H, _), T = q.shape, k.shape[1]
    k, v = k.expand(-1, -1, H, -1), v.expand(-1, -1, H, -1)

    def some(rows):
        logits = torch.einsum("bshd,bthd->bsht", q[:, rows].float(), k.float()) * scale
        p, lse = _softmax(logits, visible(S, T, first, last, rows, q.device)[:, :, None])
        return torch.einsum("bsht,bthd->bshd", p, v.float()).to(v.dtype), lse

    return over_rows(some, S, B * H * T)


def sparse_attention(q, latents, indices, scale, value_dim):
    """Softmax attention over the selected tokens only, MQA mode   (paper eq. 2)

    q (B,S,H,D) with W^UK absorbed, latents (B,T,D) = [c^KV ; k^R] or a packed FP8 cache (B,T,bytes) uint8, indices (B,S,K) int32, -1 = empty place
    -> out (B,S,H,value_dim), lse (B,S,H) float32. Differentiable in q and latents. scale stays that of the MHA mode: (nope + rope)^-1/2."""
    (B, S, H, D), K = q.shape, indices.shape[2]
    batch = torch.arange(B, device=q.device)[:, None, None]

    def some(rows):
        chosen = indices[:, rows]
        tokens = latents[batch, chosen.clamp(min=0).long()]  # (B, rows, K, D)
        if tokens.dtype == torch.uint8:
            tokens = unpack_latents(tokens, value_dim, torch.float32)
        logits = torch.einsum("bshd,bskd->bshk", q[:, rows].float(), tokens.float()) * scale
        p, lse = _softmax(logits, (chosen >= 0)[:, :, None])
        return torch.einsum("bshk,bskd->bshd", p, tokens[..., :value_dim].float()).to(q.dtype), lse

    return over_rows(some, S, B * K * (D + H))


@torch.no_grad()
def selected_mass(q, latents, indices, scale, first, last):
    """Recall: the share of the dense attention's mass, averaged over heads, that the selected tokens capture -> (B,S) float32.

    Shapes as `sparse_attention`, first and last (B,S) required. Holds (B,S,H,T) logits: for a few sampled queries, as a metric."""
    logits = torch.einsum("bshd,btd->bsht", q.float(), latents.float()) * scale
    seen = visible(q.shape[1], latents.shape[1], first, last, slice(None), q.device)
    p = torch.softmax(logits.masked_fill_(~seen[:, :, None], float("-inf")), -1).mean(2)  # NaN where nothing is visible, hence nothing selected
    return p.gather(-1, indices.clamp(min=0).long()).masked_fill(indices < 0, 0).sum(-1)


def pack_latents(latents, value_dim):
    """latents (..., value_dim + rope) -> (..., bytes) uint8, the published FP8 cache entry: value_dim e4m3 values, one float32 scale
    per 128 of them, the rope part in bf16 (656 bytes at 512 + 64). The rope part is not quantised: its rounding would move positions."""
    values, scales = quantise(latents[..., :value_dim])
    rope = latents[..., value_dim:].to(torch.bfloat16)
    return torch.cat([x.contiguous().view(torch.uint8) for x in (values, scales, rope)], -1)


def unpack_latents(packed, value_dim, dtype):
    """Inverse of `pack_latents` up to its rounding: (..., bytes) uint8 -> (..., value_dim + rope) in dtype."""
    blocks = -(-value_dim // 128)
    values, scales, rope = packed.split([value_dim, 4 * blocks, packed.shape[-1] - value_dim - 4 * blocks], -1)
    scales = scales.contiguous().view(torch.float32).repeat_interleave(min(128, value_dim), -1)[..., :value_dim]
    values = values.contiguous().view(torch.float8_e4m3fn).float() * scales
    return torch.cat((values.to(dtype), rope.contiguous().view(torch.bfloat16).to(dtype)), -1)


class Cache:
    """What one layer remembers of the past: latents and indexer keys, written also while selection is still idle (T <= k or dense mode).

    Preallocated for `capacity` tokens so that decoding never reallocates. fp8: latents packed by `pack_latents`. index_fp8: indexer keys as
    e4m3 values and one scale (132 bytes per token at 128) instead of dtype. indexed: False for a layer without an indexer of its own.
    `bytes_per_token` counts everything."""

    def __init__(self, config, batch, capacity, device, dtype, fp8=False, index_fp8=False, indexed=True):
        self.capacity = capacity
        entry = config.kv_lora_rank + config.qk_rope_head_dim
        width = pack_latents(torch.zeros(entry), config.kv_lora_rank).numel() if fp8 else entry
        self.latents = torch.zeros(batch, capacity, width, device=device, dtype=torch.uint8 if fp8 else dtype)
        self.value_dim, self.fp8, self.index_keys, self.index_scales = config.kv_lora_rank, fp8, None, None
        if indexed and config.index_topk:
            self.index_keys = torch.zeros(batch, capacity, config.index_head_dim, device=device, dtype=torch.float8_e4m3fn if index_fp8 else dtype)
            self.index_scales = torch.zeros(batch, capacity, device=device) if index_fp8 else None

    def append(self, position, length, latents):
        """Store latents (B,S,D) of the tokens at position (S,) int64 -> the latents of the first `length` tokens."""
        self.latents[:, position] = pack_latents(latents, self.value_dim) if self.fp8 else latents.to(self.latents.dtype)
        return self.latents[:, :length]

    def append_index(self, position, length, keys, scales=None):
        """The same for indexer keys (B,S,dI) and, if they are e4m3, their scales (B,S)."""
        stored = self.index_keys if scales is None else self.index_keys.view(torch.uint8)  # indexed writes know no e4m3
        stored[:, position] = keys.to(stored.dtype) if scales is None else keys.view(torch.uint8)
        if scales is None:
            return self.index_keys[:, :length], None
        self.index_scales[:, position] = scales
        return self.index_keys[:, :length], self.index_scales[:, :length]

    @property
    def bytes_per_token(self):
        """Bytes that one token of one sequence occupies in this layer."""
        tensors = [x for x in (self.latents, self.index_keys, self.index_scales) if x is not None]
        return sum(x.element_size() * x[0].numel() for x in tensors) // self.latents.shape[1]
