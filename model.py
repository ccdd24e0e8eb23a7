"""A DeepSeek-V3.2 transformer: multi-head latent attention (MLA) with the lightning indexer and sparse attention.

Read in this order: config.py, Attention (the paper's section 2.1 in one forward), Transformer; then indexer.py and sparse_attn.py, whose functions
Attention calls through one switch, `backend`: "torch" is the reference, "triton" the kernels that tests hold equal to it.
Parameters and config keys carry the names of the published checkpoints, of which four families run here: deepseek_v2, deepseek_v3 (dense
attention; `index` of `from_pretrained` grafts indexers onto them), deepseek_v32 and glm_moe_dsa.
"""
import functools
import importlib.util
import math
from dataclasses import replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint as recompute

import checkpoint
import generate
import indexer
import sparse_attn
from config import Config
from moe import MLP, MoE


def product_dtype(x):
    """What a linear layer computes x in: autocast's dtype, else its own."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32; under autocast rounded to its dtype, once for all that reads it."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x):
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(product_dtype(x))


def yarn_mscale(factor, mscale):
    """YaRN's attention temperature, 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(config):
    """-> (qk_rope_head_dim / 2,) float32 angles per position, and the factor on cos and sin. YaRN (arXiv 2309.00071): dimensions that turn
    more than beta_fast times within the original context keep their frequency, those below beta_slow are divided by `factor`, linear between."""
    dim, base, yarn = config.qk_rope_head_dim, config.rope_theta, config.rope_scaling
    frequencies = base ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)
    if not yarn:
        return frequencies, 1.0
    original = yarn["original_max_position_embeddings"]
    factor, (floor, ceil) = yarn["factor"], (math.floor, math.ceil) if yarn.get("truncate", True) else (float, float)
    turns = lambda rotations: dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))
    low, high = max(floor(turns(yarn.get("beta_fast") or 32)), 0), min(ceil(turns(yarn.get("beta_slow") or 1)), dim - 1)
    ramp = ((torch.arange(dim // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    mscale, all_dim = yarn.get("mscale"), yarn.get("mscale_all_dim")
    amplitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim) if mscale and all_dim else yarn_mscale(factor, 1)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, yarn.get("attention_factor") or amplitude


def apply_rope(x, interleaved, cos, sin):
    """Rotate x (B,S,heads,dim) by angles given as cos, sin (S,1,dim/2); pairs are (2i, 2i+1) if interleaved, else (i, i + dim/2)."""
    a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1) if interleaved else x.float().chunk(2, -1)
    turned = a * cos - b * sin, a * sin + b * cos
    return (torch.stack(turned, -1).flatten(-2) if interleaved else torch.cat(turned, -1)).to(x.dtype)


def pick_backend(backend, device):
    """"torch" or "triton" as given; None is triton on a CUDA GPU where it is installed, else torch."""
    return backend or ("triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch")


@torch.compiler.disable
def operations(backend, device):
    """The functions of the attention path, and `cross_entropy`: from indexer.py, sparse_attn.py and here ("torch"), or their twins in kernels.py ("triton").
    They compute in the dtype of their inputs, whatever autocast says. backend: see `pick_backend`."""
    twins = dict(quantise=indexer.quantise, select=indexer.select, indexer_loss_dense=indexer.indexer_loss_dense, indexer_loss_sparse=indexer.indexer_loss_sparse,
                 dense_attention=sparse_attn.dense_attention, sparse_attention=sparse_attn.sparse_attention, cross_entropy=cross_entropy)
    if pick_backend(backend, device) == "triton":
        import kernels
        twins = {name: getattr(kernels, name) for name in twins}

    def exact(function):
        @torch.compiler.disable  # nothing to fuse in there; tracing into hand-written kernels only breaks
        @functools.wraps(function)
        def call(x, *args, **kwargs):
            with torch.autocast(x.device.type, enabled=False):
                return function(x, *args, **kwargs)
        return call

    return SimpleNamespace(**{name: exact(function) for name, function in twins.items()})


class Attention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1) with DeepSeek sparse attention on top (V3.2-Exp, section 2.1)."""

    def __init__(self, config, layer):
        super().__init__()
        c, self.config, self.heads = config, config, config.num_attention_heads
        self.nope, self.rope, self.value, self.rank = c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim, c.kv_lora_rank
        q_dim = self.heads * (self.nope + self.rope)
        if c.q_lora_rank:
            self.q_a_proj = nn.Linear(c.hidden_size, c.q_lora_rank, bias=c.attention_bias)
            self.q_a_layernorm = RMSNorm(c.q_lora_rank)
            self.q_b_proj = nn.Linear(c.q_lora_rank, q_dim, bias=False)
        else:
            self.q_proj = nn.Linear(c.hidden_size, q_dim, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.hidden_size, self.rank + self.rope, bias=c.attention_bias)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, c.hidden_size, bias=c.attention_bias)
        self.indexer = indexer.Indexer(c) if c.has_indexer(layer) else None
        # the scale of the MHA mode, also in MQA mode; YaRN's temperature enters twice, once for q and once for k
        self.scale = (self.nope + self.rope) ** -0.5
        if c.rope_scaling and c.rope_scaling.get("mscale_all_dim"):
            self.scale *= yarn_mscale(c.rope_scaling["factor"], c.rope_scaling["mscale_all_dim"]) ** 2

    def kv_b(self, dtype):
        """W^UK (H, nope, rank) and W^UV (H, v_head_dim, rank), the halves of kv_b_proj."""
        return self.kv_b_proj.weight.to(dtype).view(self.heads, -1, self.rank).split([self.nope, self.value], 1)

    def absorb(self, q_nope, q_rope):
        """MQA mode: q^T (W^UK c) = (W^UK^T q)^T c; q_nope (B,S,H,nope), q_rope (B,S,H,rope) -> (B,S,H,rank + rope), a query against latents."""
        return torch.cat((torch.einsum("bshn,hnr->bshr", q_nope, self.kv_b(q_nope.dtype)[0]), q_rope), -1)

    def expand(self, latents):
        """MHA mode: latents (B,T,rank + rope) -> k (B,T,H,nope + rope), v (B,T,H,v_head_dim); the rope key is the same for all heads."""
        k_nope, v = self.kv_b_proj(latents[..., :self.rank]).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], -1)
        k_rope = latents[:, :, None, self.rank:].expand(-1, -1, self.heads, -1)
        return torch.cat((k_nope, k_rope.to(k_nope.dtype)), -1), v

    def forward(self, h, rope, run, indices=None, cache=None):
        """h (B,S,hidden), rope(x, interleaved), run: see Transformer.forward; indices (B,S,k): the selection of the layer before, used if there is
        no indexer here -> out (B,S,hidden), the selection used (the one passed in if dense), (kl, kl_uniform, recall) if run.index_loss and there is one, else ()."""
        ops, topk, (B, S, _) = run.ops, self.config.index_topk, h.shape
        index_loss = run.index_loss and self.indexer is not None
        q_latent = self.q_a_layernorm(self.q_a_proj(h)) if self.config.q_lora_rank else h
        q = (self.q_b_proj(q_latent) if self.config.q_lora_rank else self.q_proj(h)).unflatten(-1, (self.heads, -1))
        q_nope, q_rope = q[..., :self.nope], rope(q[..., self.nope:], True)
        c_kv, k_rope = self.kv_a_proj_with_mqa(h).split([self.rank, self.rope], -1)
        latents = torch.cat((self.kv_a_layernorm(c_kv), rope(k_rope[:, :, None], True).squeeze(2)), -1)

        # The indexer's inputs are detached: its loss reaches no main parameter (unless run.detach is off, an ablation; its target always is detached).
        # Its keys enter the cache even while nothing is selected.
        if self.indexer and (run.sparse or run.index_loss or cache is not None):
            *vectors, w = self.indexer(*(x.detach() if run.detach else x for x in (h, q_latent)), rope)
            index = *(x.to(latents.dtype) for x in vectors), w  # one dtype for the kernels, also where a float32 indexer sits in a bf16 model
            q_index, k_index, w = (x.detach() for x in index)
            k_scale = None
            if run.index_fp8:
                q_index, q_scale = ops.quantise(q_index, block=self.indexer.dim, rotate=True)
                k_index, k_scale = ops.quantise(k_index, block=self.indexer.dim, rotate=True)
                w, k_scale = w * q_scale.squeeze(-1), k_scale.squeeze(-1)
            if cache is not None:
                k_index, k_scale = cache.append_index(run.position, run.length, k_index, k_scale)
        if cache is not None:
            latents = cache.append(run.position, run.length, latents)
        T = latents.shape[1]

        # Up to k tokens, selecting is attending to all: the dense path. MQA mode also when decoding densely: expanding the cache for a few
        # queries would cost more than attending to it. Training takes the first branch in the sparse stage, the last one before.
        losses, sparse = (), run.sparse and (T > topk or run.index_loss)
        mqa = sparse or (cache is not None and S <= 16)
        q = self.absorb(q_nope, q_rope) if mqa else torch.cat((q_nope, q_rope), -1)
        if sparse:
            if self.indexer:
                indices = ops.select(q_index, k_index, w, topk, k_scale, run.first, run.last)
            out, lse = ops.sparse_attention(q, latents, indices, self.scale, self.rank)
            if index_loss:
                losses = ops.indexer_loss_sparse(q.detach(), latents.detach(), lse, indices, self.scale, *index)
        else:
            if latents.dtype == torch.uint8:
                latents = sparse_attn.unpack_latents(latents, self.rank, h.dtype)
            k, v = (latents[:, :, None], latents[:, :, None, :self.rank]) if mqa else self.expand(latents)
            out, lse = ops.dense_attention(q, k, v, self.scale, run.first, run.last)
            if index_loss:
                losses = ops.indexer_loss_dense(q.detach(), k.detach(), lse, self.scale, *index, run.first, run.last)
        if index_loss:
            rows = torch.linspace(0, S - 1, min(S, 16), device=h.device).long()  # recall of a sample of queries: linear cost
            first, last = (torch.zeros_like(rows).expand(B, -1) if run.first is None else run.first[:, rows]).int(), rows.expand(B, -1).int()
            chosen = indices[:, rows] if sparse else ops.select(q_index[:, rows], k_index, w[:, rows], topk, k_scale, first, last)
            q_rows = q[:, rows] if mqa else self.absorb(q_nope[:, rows], q_rope[:, rows])
            losses = *losses, sparse_attn.selected_mass(q_rows, latents, chosen, self.scale, first, last)
        if mqa:
            out = torch.einsum("bshr,hvr->bshv", out, self.kv_b(out.dtype)[1])
        return self.o_proj(out.flatten(2)), indices, tuple(x.mean() for x in losses)


class Block(nn.Module):
    """Pre-norm residual block. Losses are returned, not stored: recomputation in the backward must see them as outputs."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MoE(config) if config.has_experts(layer) else MLP(config.hidden_size, config.intermediate_size)

    def forward(self, h, rope, run, indices=None, cache=None):
        out, indices, losses = self.self_attn(self.input_layernorm(h), rope, run, indices, cache)
        h = h + out
        return h + self.mlp(self.post_attention_layernorm(h)), indices, losses


def cross_entropy(logits, targets, grad):
    """logits (N,vocab), targets (N,) int64 below vocab -> (N,) float32, -log softmax(logits)[target], in nats; with grad its gradient
    softmax(logits) - [s = target] takes the logits' place."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)
    nats = -log_p.gather(-1, targets[:, None])
    if grad:
        torch.exp(log_p, out=logits).scatter_(-1, targets[:, None], torch.expm1(-nats).to(logits.dtype))
    return nats[:, 0]


class NextTokenLoss(torch.autograd.Function):
    """h (N,hidden), weight (vocab,hidden), targets (N,) int64 -> mean cross entropy of the logits h weight^T, in nats; entropy: `cross_entropy` or its twin.

    Slice by slice of tokens, each leaving its gradients behind (if `grad`): the logits of 32K tokens over a vocabulary of 160K would be 21 GB."""
    SLICE = 2**28  # logits at a time

    @staticmethod
    def forward(ctx, h, weight, targets, grad, entropy):
        dtype = product_dtype(h)
        W, rows, nats = weight.to(dtype), max(1, NextTokenLoss.SLICE // len(weight)), 0
        dh, dW = [], torch.zeros_like(weight, dtype=torch.float32) if grad and ctx.needs_input_grad[1] else None
        for part, y in zip(h.to(dtype).split(rows), targets.split(rows)):
            logits = part @ W.T
            nats = nats + entropy(logits, y, grad).sum()
            if grad:  # what were logits is their gradient now
                dh.append(logits @ W)
                if dW is not None:
                    dW += logits.T @ part
        if grad:
            ctx.save_for_backward(torch.cat(dh), dW)
        ctx.dtypes = h.dtype, weight.dtype
        return nats / len(h)

    @staticmethod
    def backward(ctx, g):
        dh, dW = ctx.saved_tensors
        g = g / len(dh)
        return (dh * g).to(ctx.dtypes[0]), None if dW is None else (dW * g).to(ctx.dtypes[1]), None, None, None


class Transformer(nn.Module):
    """Decoder-only language model.

    attention: "dense" or "sparse"; None is sparse where there is an indexer. index_fp8: score quantised queries and keys, as the
    published inference does, or (False) as they are, as transformers does. backend: see `pick_backend`. ValueError: see Config.check."""

    def __init__(self, config, backend=None, attention=None, index_fp8=True):
        super().__init__()
        self.config, self.backend, self.index_fp8 = config.check(), backend, index_fp8
        if attention not in (None, "dense", "sparse") or backend not in (None, "torch", "triton"):
            raise ValueError(f"attention={attention}, backend={backend}: attention is dense or sparse, backend torch or triton")
        self.attention = attention or ("sparse" if config.index_topk else "dense")
        if self.attention == "sparse" and not config.index_topk:
            raise ValueError("attention=sparse: this checkpoint has no indexer (index_topk=0); use attention=dense or train one: train.py --stage=warmup")
        self.recompute = False  # activation checkpointing: keep only the blocks' inputs
        self.detach = True  # the indexer's inputs, so that the KL teaches indexers alone
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        for name, p in self.named_parameters():
            if p.dim() > 1:  # residual projections smaller by the number of residual additions, as in GPT-2
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                nn.init.normal_(p, std=config.initializer_range / ((2 * config.num_hidden_layers) ** 0.5 if into_residual else 1))
        frequencies, self.rope_amplitude = rope_frequencies(config)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    def backend_on(self, device):
        """The backend that runs on this torch.device: "torch" or "triton"."""
        return pick_backend(self.backend, device)

    def indexer_parameters(self):
        """The parameters that learn from the KL loss alone; all others learn from the language-model loss alone."""
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def forward(self, idx, targets=None, first=None, index_loss=False, caches=None, position=None, last=None, return_logits=True):
        """idx (B,S) int64, targets (B,S) int64 or None, first (B,S) int32 or None: first visible position (packed documents).

        -> logits (B,S,vocab), losses: dict with "lm" (mean cross entropy in nats per token, every target counts) if targets are given, and with index_loss "kl",
        "kl_uniform" (nats, mean over tokens and over layers with an indexer) and "recall" (share of dense attention mass selected, 0..1).
        return_logits=False gives None for them, see NextTokenLoss.
        caches: one Cache per layer; `position` (S,) int64 of these tokens, all earlier ones being cached. With `last` (B,S) given, lengths are read
        on the device (CUDA graphs). ValueError: sequence longer than max_position_embeddings."""
        S = idx.shape[1]
        if index_loss and caches is not None:
            raise ValueError("index_loss=True needs the whole sequence in one forward; leave caches out")
        length = S if caches is None else caches[0].capacity if last is not None else int(position[-1]) + 1
        if length > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {length} tokens is longer than the model's max_position_embeddings={self.config.max_position_embeddings}; shorten it")
        position = torch.arange(S, device=idx.device) if position is None else position
        angles = (position[:, None].float() * self.rope_frequencies.float())[:, None]  # (S, 1, rope / 2)
        rope = functools.partial(apply_rope, cos=angles.cos() * self.rope_amplitude, sin=angles.sin() * self.rope_amplitude)
        run = SimpleNamespace(ops=operations(self.backend, idx.device), sparse=self.attention == "sparse", index_fp8=self.index_fp8,
                              index_loss=index_loss, detach=self.detach, first=first, last=last, position=position, length=length)
        h, indices, index_losses = self.model.embed_tokens(idx), None, []
        for i, block in enumerate(self.model.layers):
            if self.recompute and torch.is_grad_enabled() and caches is None:
                h, indices, layer_losses = recompute(block, h, rope, run, indices, use_reentrant=False)
            else:
                h, indices, layer_losses = block(h, rope, run, indices, caches[i] if caches else None)
            index_losses.append(layer_losses)
        losses = {k: torch.stack(v).mean() for k, v in zip(("kl", "kl_uniform", "recall"), zip(*filter(None, index_losses)))}
        h = self.model.norm(h)
        logits = self.lm_head(h) if return_logits else None
        if targets is not None:
            losses["lm"] = NextTokenLoss.apply(h.flatten(0, 1), self.lm_head.weight, targets.flatten(), torch.is_grad_enabled(), run.ops.cross_entropy)
        return logits, losses

    def generate(self, idx, n, **kwargs):
        """idx (B,T) -> (B,T+n): the prompts and n sampled tokens each; options as generate.stream, which yields them one by one."""
        return torch.cat([idx, *(token[:, None] for token in generate.stream(self, idx, n, **kwargs))], 1)

    @classmethod
    def from_pretrained(cls, folder, backend=None, attention=None, index_fp8=True, device="cpu", dtype=None, index=None):
        """The model of a checkpoint folder, ours or a published one (see checkpoint.py), in eval mode.

        dtype: None keeps the stored ones. index: a dict of index_n_heads, index_head_dim and index_topk grafts new float32 indexers onto the
        checkpoint, in place of any it has; attention is then "dense" unless given. FileNotFoundError or ValueError name what is wrong with which file."""
        config = checkpoint.read_config(folder, Config)
        with torch.device("meta"):
            model = cls(replace(config, **(index or {})), backend, attention or ("dense" if index else None), index_fp8)
        checkpoint.read_weights(folder, model, device, dtype, new_indexers=bool(index))
        model.rope_frequencies = rope_frequencies(config)[0].to(device)
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write a checkpoint folder that `from_pretrained` and other programs open; it appears whole or not at all. tokenizer: see checkpoint.save_tokenizer."""
        checkpoint.write(folder, self, tokenizer)
