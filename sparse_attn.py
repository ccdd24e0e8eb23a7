"""Core attention of MLA, dense and sparse, and the cache it decodes from.

MLA in two modes that compute the same function. MHA mode expands each token's latent into keys and values per
head: few FLOPs per pair, right when every pair is visited (dense stages). MQA mode folds W^UK into the
query and W^UV into the output and attends to the latents themselves, one (kv_lora_rank + rope) vector per
token shared by all heads: little to gather per token, right when each query reads only the tokens that the
indexer selected (sparse stage), and for decoding.

dense_attention, split_attention and sparse_attention have Triton twins in kernels.py; letters as in
indexer.py, and V the dimensions of a value: of a head in MHA mode, of the latent (kv_lora_rank) in MQA mode.
lse is the natural logarithm.
"""
from copy import copy

import torch

from indexer import over_rows, quantise, read, visible


def masked_softmax(logits, seen):
    """Softmax over the last dimension where seen -> p, lse. A row that sees nothing gives p = 0, lse = -inf
    and gradient 0: `where` stops its NaN."""
    logits = torch.where(seen, logits, float("-inf"))
    p = torch.where(seen, torch.softmax(logits, -1), 0)
    if logits.shape[-1] == 0:
        return p, logits.detach().logsumexp(-1)
    # like logsumexp, for which a CPU takes several times as long: the largest p is exp(top - lse)
    top = logits.detach().amax(-1)
    lse = top - p.detach().amax(-1).log()
    return p, torch.where(top == float("-inf"), top, lse)


def dense_attention(q, k, v, scale, first=None, last=None):
    """Softmax attention over everything visible. q (B,S,H,D), k (B,T,Hk,D), v (B,T,Hk,V), Hk = H (MHA mode)
    or 1 (MQA mode)
    -> out (B,S,H,V) in v's dtype, lse (B,S,H) float32 of scale q.k. Differentiable in q, k, v. Softmax in
    float32."""
    B, S, H, _ = q.shape
    T = k.shape[1]
    k = k.expand(-1, -1, H, -1)  # (B, T, H, D)
    v = v.expand(-1, -1, H, -1)  # (B, T, H, V)

    def attend(rows):
        logits = torch.einsum("bshd,bthd->bsht", q[:, rows].float(), k.float()) * scale  # (B, rows, H, T)
        seen = visible(S, T, first, last, rows, q.device)[:, :, None]  # (1 or B, rows, 1, T)
        p, lse = masked_softmax(logits, seen)
        return torch.einsum("bsht,bthd->bshd", p, v.float()).to(v.dtype), lse

    return over_rows(attend, S, B * H * T)


def split_attention(q, k, v, scale, early, late):
    """`dense_attention` of queries that are two chunks of one document, of equal lengths, which begin at the
    positions early and late: a rank's part of the sequence, see parallel.Split."""
    B, S = q.shape[:2]
    chunk = torch.arange(S // 2, dtype=torch.int32, device=q.device)  # (S / 2,)
    last = torch.cat((early + chunk, late + chunk)).expand(B, -1)  # (B, S)
    return dense_attention(q, k, v, scale, None, last)


def sparse_attention(q, latents, indices, scale, value_dim):
    """Softmax attention over the selected tokens only, MQA mode   (paper eq. 2)

    q (B,S,H,D) with W^UK absorbed, latents (B,T,D) = [c^KV ; k^R] or a packed FP8 cache (B,T,bytes) uint8,
    indices (B,S,K) int32, -1 = empty slot
    -> out (B,S,H,value_dim), lse (B,S,H) float32. Differentiable in q and latents. scale stays that of the
    MHA mode: (nope + rope)^-1/2."""
    B, S, H, D = q.shape
    K = indices.shape[2]

    def attend(rows):
        chosen = indices[:, rows]  # (B, rows, K)
        tokens = read(latents, chosen)  # (B, rows, K, D), or bytes
        if tokens.dtype == torch.uint8:
            tokens = unpack_latents(tokens, value_dim, torch.float32)
        tokens = tokens.float()
        logits = torch.einsum("bshd,bskd->bshk", q[:, rows].float(), tokens) * scale  # (B, rows, H, K)
        p, lse = masked_softmax(logits, (chosen >= 0)[:, :, None])
        out = torch.einsum("bshk,bskd->bshd", p, tokens[..., :value_dim])  # (B, rows, H, value_dim)
        return out.to(q.dtype), lse

    return over_rows(attend, S, B * K * (D + H))


def attention_mass(q, latents, scale, seen):
    """What dense attention looks at, mean over heads: q (B,S,H,D) absorbed, latents (B,T,D), seen (1 or
    B,S,T) -> (B,S,T) float32 probabilities, NaN where nothing is visible. Holds (B,S,H,T) logits: for a few
    sampled queries."""
    logits = torch.einsum("bshd,btd->bsht", q.float(), latents.float()) * scale  # (B, S, H, T)
    return logits.masked_fill_(~seen[:, :, None], float("-inf")).softmax(-1).mean(2)


@torch.no_grad()
def selected_mass(q, latents, indices, scale, first, last):
    """Recall: the share of the dense attention's mass, averaged over heads, that the selected tokens hold ->
    (B,S) float32.

    Shapes as `sparse_attention`, first and last (B,S) required. A metric, see `attention_mass`."""
    seen = visible(q.shape[1], latents.shape[1], first, last, slice(None), q.device)  # (B, S, T)
    p = attention_mass(q, latents, scale, seen)  # (B, S, T); where that is NaN nothing is selected
    selected = p.gather(-1, indices.clamp(min=0).long())  # (B, S, K)
    return selected.masked_fill(indices < 0, 0).sum(-1)


# ---- the cache ----

def pack_latents(latents, value_dim):
    """latents (..., value_dim + rope) -> (..., bytes) uint8, the published FP8 cache entry: value_dim e4m3
    values, one float32 scale per 128 of them, the rope part in bf16 (656 bytes at 512 + 64). The rope part is
    not quantised: its rounding would move positions."""
    values, scales = quantise(latents[..., :value_dim])  # (..., value_dim), (..., ceil(value_dim / 128))
    rope = latents[..., value_dim:].to(torch.bfloat16)  # (..., rope)
    return torch.cat([x.contiguous().view(torch.uint8) for x in (values, scales, rope)], -1)


def unpack_latents(packed, value_dim, dtype):
    """Inverse of `pack_latents` up to its rounding: (..., bytes) uint8 -> (..., value_dim + rope) in
    dtype."""
    blocks = -(-value_dim // 128)
    rope_bytes = packed.shape[-1] - value_dim - 4 * blocks
    values, scales, rope = packed.split([value_dim, 4 * blocks, rope_bytes], -1)  # bytes
    scales = scales.contiguous().view(torch.float32)  # (..., blocks)
    scales = scales.repeat_interleave(min(128, value_dim), -1)[..., :value_dim]  # (..., value_dim)
    values = values.contiguous().view(torch.float8_e4m3fn).float() * scales  # (..., value_dim)
    rope = rope.contiguous().view(torch.bfloat16)  # (..., rope)
    return torch.cat((values.to(dtype), rope.to(dtype)), -1)


class Cache:
    """What one layer remembers of the past: latents and indexer keys, written also while selection is still
    idle (T <= k or dense mode).

    Preallocated for `capacity` tokens so that decoding never reallocates. fp8: latents packed by
    `pack_latents`. index_fp8: indexer keys as e4m3 values and one scale (132 bytes per token at 128) instead
    of dtype. indexed: False for a layer without an indexer of its own."""

    def __init__(self, config, batch, capacity, device, dtype, fp8=False, index_fp8=False, indexed=True):
        self.capacity = capacity
        self.value_dim = config.kv_lora_rank
        self.fp8 = fp8
        width = config.kv_lora_rank + config.qk_rope_head_dim
        if fp8:
            width = pack_latents(torch.zeros(width), self.value_dim).numel()
        stored = torch.uint8 if fp8 else dtype
        self.latents = torch.zeros(batch, capacity, width, device=device, dtype=stored)
        self.index_keys = None
        self.index_scales = None
        if indexed and config.index_topk:
            stored = torch.float8_e4m3fn if index_fp8 else dtype
            self.index_keys = torch.zeros(batch, capacity, config.index_head_dim, device=device, dtype=stored)
            if index_fp8:
                self.index_scales = torch.zeros(batch, capacity, device=device)

    def append(self, slots, length, latents):
        """Store latents (B,S,D) of the tokens at slots, an index (row, position) of (B,T): all rows and (S,),
        or (B,1) and (B,S) int64 -> the latents of the first `length` tokens."""
        if self.fp8:
            self.latents[slots] = pack_latents(latents, self.value_dim)
        else:
            self.latents[slots] = latents.to(self.latents.dtype)
        return self.latents[:, :length]

    def append_index(self, slots, length, keys, scales=None):
        """The same for indexer keys (B,S,DI) and, if they are e4m3, their scales (B,S)."""
        if scales is None:
            self.index_keys[slots] = keys.to(self.index_keys.dtype)
            return self.index_keys[:, :length], None
        self.index_keys.view(torch.uint8)[slots] = keys.view(torch.uint8)  # indexed writes know no e4m3
        self.index_scales[slots] = scales
        return self.index_keys[:, :length], self.index_scales[:, :length]

    def part(self, rows):
        """-> a Cache of these rows alone: (n,) int64, copied, or a slice, the same memory."""
        part = copy(self)
        for name in ("latents", "index_keys", "index_scales"):
            x = getattr(self, name)
            if x is not None:
                setattr(part, name, x.view(torch.uint8)[rows].view(x.dtype))  # indexing knows no e4m3
        return part

    def repeat(self, copies):
        """What the first rows hold becomes what all hold, `copies` rows of each one behind the other."""
        for x in (self.latents, self.index_keys, self.index_scales):
            if x is not None:
                x = x.view(torch.uint8)
                x.copy_(x[:len(x) // copies].repeat_interleave(copies, 0))

    @property
    def bytes_per_token(self):
        """Bytes that one token of one sequence occupies in this layer, everything counted."""
        total = 0
        for x in (self.latents, self.index_keys, self.index_scales):
            if x is not None:
                total += x.element_size() * x[0].numel()
        return total // self.capacity
