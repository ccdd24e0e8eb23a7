"""A DeepSeek-V3.2 transformer: multi-head latent attention (MLA) with the lightning indexer and sparse
attention.

Read in this order: config.py, Attention (the paper's section 1 in one forward), Transformer; then
indexer.py and sparse_attn.py, whose functions Attention calls through one switch, `backend`: "torch" is the
reference, "triton" the kernels that tests hold equal to it. Parameters and config keys carry the names of the
published checkpoints, of which four families run here: deepseek_v2, deepseek_v3 (dense attention; `index` of
`from_pretrained` grafts indexers onto them), deepseek_v32 and glm_moe_dsa.
"""
import functools
import importlib.util
import math
from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint as recompute

import baselines
import generate
import indexer
import sparse_attn
from lm_loss import next_token_loss
from moe import MLP, MoE
from precision import exact, product_dtype

RECALL_QUERIES = 16  # of a sequence, for the recall that training reports
DECODE_QUERIES = 16  # up to so many new queries read the latents themselves: expanding a cache costs more
MOST_GRAPHS = 64  # that layers are compiled to: as many as kinds of layers, times stages


# ---- norms and positions ----

class RMSNorm(nn.Module):
    """x / rms(x) * weight over the last dimension, computed in float32; under autocast rounded to its dtype,
    once for all that read it."""

    def __init__(self, dim, eps=1e-6):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x):
        dtype = product_dtype(x)
        if x.dtype == self.weight.dtype == dtype:  # torch computes it in float32 by itself, in one kernel
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        return F.rms_norm(x.float(), x.shape[-1:], self.weight.float(), self.eps).to(dtype)


def yarn_mscale(factor, mscale):
    """YaRN's attention temperature, 0.1 mscale ln(factor) + 1."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def rope_frequencies(config):
    """-> (qk_rope_head_dim / 2,) float32 angles per position, on the CPU, and the factor on cos and sin. YaRN
    (arXiv 2309.00071): dimensions that rotate more than beta_fast times within the original context keep
    their frequency, those below beta_slow are divided by `factor`, linear between."""
    dim = config.qk_rope_head_dim
    base = config.rope_theta
    frequencies = base ** -(torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim)  # (dim / 2,)
    yarn = config.rope_scaling
    if not yarn:
        return frequencies, 1.0

    def dimension(rotations):
        """The dimension that rotates so many times within the original context."""
        original = yarn["original_max_position_embeddings"]
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = dimension(yarn.get("beta_fast") or 32)
    high = dimension(yarn.get("beta_slow") or 1)
    if yarn.get("truncate", True):
        low = math.floor(low)
        high = math.ceil(high)
    low = max(low, 0)
    high = min(high, dim - 1)
    ramp = (torch.arange(dim // 2, dtype=torch.float32, device="cpu") - low) / max(high - low, 0.001)
    ramp = ramp.clamp(0, 1)  # (dim / 2,): 0 keeps, 1 is divided

    factor = yarn["factor"]
    mscale = yarn.get("mscale")
    all_dim = yarn.get("mscale_all_dim")
    amplitude = yarn_mscale(factor, 1)
    if mscale and all_dim:
        amplitude = yarn_mscale(factor, mscale) / yarn_mscale(factor, all_dim)
    return frequencies * (1 - ramp) + frequencies / factor * ramp, yarn.get("attention_factor") or amplitude


def apply_rope(x, interleaved, cos, sin):
    """Rotate x (B,S,heads,dim) by angles given as cos, sin (S,1,dim/2) or (B,S,1,dim/2); pairs are (2i, 2i+1)
    if interleaved, else (i, i + dim/2)."""
    if interleaved:
        a, b = x.float().unflatten(-1, (-1, 2)).unbind(-1)  # (B, S, heads, dim / 2) each
    else:
        a, b = x.float().chunk(2, -1)
    rotated = (a * cos - b * sin, a * sin + b * cos)
    out = torch.stack(rotated, -1).flatten(-2) if interleaved else torch.cat(rotated, -1)
    return out.to(x.dtype)


# ---- one switch, two backends ----

class Operations(NamedTuple):
    """The functions of the attention path: the reference's or their Triton twins."""
    quantise: Callable
    select: Callable
    select_by_blocks: Callable
    select_as: Callable
    dense_attention: Callable
    split_attention: Callable
    sparse_attention: Callable
    indexer_loss_dense: Callable
    indexer_loss_sparse: Callable
    decode_block: Callable | None  # None: Block.forward is the reference


def pick_backend(backend, device):
    """"torch" or "triton" as given; None is triton on a CUDA GPU where it is installed, else torch."""
    if backend:
        return backend
    return "triton" if device.type == "cuda" and importlib.util.find_spec("triton") else "torch"


def operations(backend):
    """The Operations of "torch" (indexer.py, sparse_attn.py) or "triton" (kernels.py)."""
    if backend == "triton":
        import kernels
        return Operations(
            quantise=kernels.quantise,
            select=kernels.select,
            select_by_blocks=kernels.select_by_blocks,
            select_as=functools.partial(baselines.select_as, best=kernels.topk),
            dense_attention=kernels.dense_attention,
            split_attention=kernels.split_attention,
            sparse_attention=kernels.sparse_attention,
            indexer_loss_dense=kernels.indexer_loss_dense,
            indexer_loss_sparse=kernels.indexer_loss_sparse,
            decode_block=kernels.decode_block)
    return Operations(
        quantise=indexer.quantise,
        select=indexer.select,
        select_by_blocks=indexer.select_by_blocks,
        select_as=baselines.select_as,
        dense_attention=sparse_attn.dense_attention,
        split_attention=sparse_attn.split_attention,
        sparse_attention=sparse_attn.sparse_attention,
        indexer_loss_dense=indexer.indexer_loss_dense,
        indexer_loss_sparse=indexer.indexer_loss_sparse,
        decode_block=None)


@contextmanager
def watched(model, wrap):
    """A context in which the attention of each layer calls what wrap(layer, h, ops) makes of its
    Operations."""

    def watch(module, args, layer):
        h, state, *rest = args
        return h, replace(state, ops=wrap(layer, h, state.ops)), *rest

    hooks = []
    for layer, block in enumerate(model.model.layers):
        hooks.append(block.self_attn.register_forward_pre_hook(functools.partial(watch, layer=layer)))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class ForwardState:
    """What the layers of one forward share; see Transformer.forward."""
    ops: Operations
    cos: Tensor  # (S, 1, rope / 2) or (B, S, 1, rope / 2) float32, as sin
    sin: Tensor
    slots: tuple  # an index of (B, T): where these tokens enter the caches; with split those of all its ranks
    length: int  # tokens in the caches, these included
    first: Tensor | None  # (B, S) int32
    last: Tensor | None  # (B, S) int32
    split: object | None  # parallel.Split, where ranks share a sequence
    sparse: bool  # attend to the selection
    index_loss: bool
    index_fp8: bool  # select by quantised scores
    index_block: int  # select in two levels, by blocks of so many tokens; 0: among all tokens
    candidates: int  # tokens in the blocks that are scored, see indexer.select_by_blocks
    detach: bool  # the indexer's inputs
    always_select: bool  # also where there are no more than k tokens
    replay: bool  # attend to selections that were given
    decodes: bool  # by ops.decode_block

    def rope(self, x, interleaved):
        """`apply_rope` at these positions."""
        return apply_rope(x, interleaved, self.cos, self.sin)

    def gather(self, x):
        """x (B,S,...) of the tokens here -> of the whole sequence, where ranks share it."""
        return x if self.split is None else self.split.gather(x)

    def dense_attention(self, q, k, v, scale):
        """The operation of this name, by two chunks of the sequence where it is shared and one document."""
        if self.split is not None and self.first is None:
            return self.ops.split_attention(q, k, v, scale, *self.split.starts)
        return self.ops.dense_attention(q, k, v, scale, self.first, self.last)


class Scorer(NamedTuple):
    """What one layer selects by: index scores of q (B,S,HI,DI), k (B,T,DI), w (B,S,HI) and, of e4m3 keys,
    k_scale (B,T); with candidates in two levels. Or not by them, but as another selector does, of which the
    oracle needs what is attended."""
    q: Tensor
    k: Tensor
    w: Tensor
    k_scale: Tensor | None
    block: int = 0
    candidates: int = 0
    selector: str = "indexer"
    attended: baselines.Attended | None = None

    def select(self, ops, topk, first, last):
        """-> (B,S,topk) int32, see indexer.select, indexer.select_by_blocks and baselines.select_as."""
        args = (self.q, self.k, self.w, topk, self.k_scale, first, last)
        if self.selector != "indexer":
            return ops.select_as(*args, self.selector, self.attended)
        if not self.candidates:
            return ops.select(*args)
        return ops.select_by_blocks(*args, self.block, self.candidates, indexer.RECENT)

    def attending(self, *args):
        """Of the main attention's q, latents, scale and value_dim, see baselines.Attended."""
        return self._replace(attended=baselines.Attended(*args))

    def at(self, rows):
        """Of the queries `rows` alone."""
        return self._replace(q=self.q[:, rows], w=self.w[:, rows])


class Selection(NamedTuple):
    """What a layer with an indexer hands on to the layers that share its selection."""
    indices: Tensor | None = None  # (B, S, k) int32; None: all that is visible
    # with state.index_loss also what their attention teaches the indexer through: gradients go back this way
    q_index: Tensor | None = None  # (B, S, HI, DI)
    k_index: Tensor | None = None  # (B, T, DI)
    w: Tensor | None = None  # (B, S, HI)
    scorer: Scorer | None = None  # without gradient


class IndexLoss(NamedTuple):
    """Of one layer's attention and the indexer whose selection it uses, means over the tokens of a batch."""
    kl: Tensor  # nats, what the indexer learns from
    kl_uniform: Tensor  # nats, of an indexer that cannot tell tokens apart
    recall: Tensor  # share of the dense attention's mass that is selected, of sampled queries
    index_recall: Tensor | None = None  # share of what exact selection selects, of sampled queries


# ---- the model ----

class Attention(nn.Module):
    """Multi-head latent attention (DeepSeek-V2, section 2.1) with DeepSeek sparse attention on top (V3.2-Exp,
    section 1; the same in V3.2, arXiv 2512.02556, section 2.1)."""

    def __init__(self, config, layer):
        super().__init__()
        self.heads = config.num_attention_heads
        self.nope = config.qk_nope_head_dim
        self.rope = config.qk_rope_head_dim
        self.value = config.v_head_dim
        self.rank = config.kv_lora_rank
        self.config = config
        hidden = config.hidden_size
        bias = config.attention_bias
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=bias)
            # the eps of both latents' norms is 1e-6 in every family, see support/checkpoint.py
            self.q_a_layernorm = RMSNorm(config.q_lora_rank)
            self.q_b_proj = nn.Linear(config.q_lora_rank, self.heads * (self.nope + self.rope), bias=False)
        else:
            self.q_a_proj = None
            self.q_proj = nn.Linear(hidden, self.heads * (self.nope + self.rope), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=bias)
        self.kv_a_layernorm = RMSNorm(self.rank)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=bias)
        self.indexer = indexer.Indexer(config) if config.has_indexer(layer) else None
        # the scale of the MHA mode, also in MQA mode; YaRN's temperature enters twice, once for q and once
        # for k
        self.scale = (self.nope + self.rope) ** -0.5
        yarn = config.rope_scaling
        if yarn and yarn.get("mscale_all_dim"):
            self.scale *= yarn_mscale(yarn["factor"], yarn["mscale_all_dim"]) ** 2

    def kv_b(self, dtype):
        """W^UK (H, nope, rank) and W^UV (H, value, rank), the halves of kv_b_proj."""
        w = self.kv_b_proj.weight.to(dtype).view(self.heads, self.nope + self.value, self.rank)
        return w.split([self.nope, self.value], 1)

    def absorb(self, q_nope, q_rope):
        """MQA mode: q^T (W^UK c) = (W^UK^T q)^T c; q_nope (B,S,H,nope), q_rope (B,S,H,rope) -> (B,S,H,rank +
        rope), a query against latents."""
        w_uk, _ = self.kv_b(q_nope.dtype)
        q_latent = torch.einsum("bshn,hnr->bshr", q_nope, w_uk)  # (B, S, H, rank)
        return torch.cat((q_latent, q_rope), -1)  # (B, S, H, rank + rope)

    def expand(self, latents):
        """MHA mode: latents (B,T,rank + rope) -> k (B,T,H,nope + rope), v (B,T,H,value); the rope key is the
        same for all heads."""
        kv = self.kv_b_proj(latents[..., :self.rank])  # (B, T, H (nope + value))
        k_nope, v = kv.unflatten(-1, (self.heads, -1)).split([self.nope, self.value], -1)
        k_rope = latents[:, :, None, self.rank:].expand(-1, -1, self.heads, -1)  # (B, T, H, rope)
        k = torch.cat((k_nope, k_rope.to(k_nope.dtype)), -1)  # (B, T, H, nope + rope)
        return k, v

    def forward(self, h, state, selection=Selection(), cache=None):
        """h (B,S,hidden), state: the ForwardState; selection: that of the layer before, used if there is no
        indexer here; with state.replay its indices are the ones to use
        -> out (B,S,hidden), the Selection used (its indices those passed in if dense), IndexLoss if
        state.index_loss, else None (also of a model without indexers)."""
        S = h.shape[1]

        # Queries, and what this token leaves in the cache: [c^KV ; k^R]
        if self.q_a_proj:
            q_latent = self.q_a_layernorm(self.q_a_proj(h))  # (B, S, q_lora_rank)
            q = self.q_b_proj(q_latent)  # (B, S, H (nope + rope))
        else:
            q_latent = h
            q = self.q_proj(h)
        q = q.unflatten(-1, (self.heads, -1))  # (B, S, H, nope + rope)
        q_nope, q_rope = q.split([self.nope, self.rope], -1)
        q_rope = state.rope(q_rope, interleaved=True)  # (B, S, H, rope)
        c_kv, k_rope = self.kv_a_proj_with_mqa(h).split([self.rank, self.rope], -1)
        k_rope = state.rope(k_rope[:, :, None], interleaved=True).squeeze(2)  # (B, S, rope)
        latents = torch.cat((self.kv_a_layernorm(c_kv), k_rope), -1)  # (B, S, rank + rope)

        # The indexer's queries, keys and weights. Its inputs are detached: its loss reaches no main parameter
        # (unless state.detach is off, an ablation). Its keys enter the cache even while nothing is selected.
        scorer = None
        if self.indexer and (state.sparse or state.index_loss or cache is not None):
            inputs = (h.detach(), q_latent.detach()) if state.detach else (h, q_latent)
            q_index, k_index, w = self.indexer(*inputs, state.rope)  # (B, S, HI, DI), (B, S, DI), (B, S, HI)
            # one dtype for the kernels, also where a float32 indexer sits in a bf16 model
            q_index = q_index.to(latents.dtype)
            k_index = state.gather(k_index.to(latents.dtype))
            scorer = self.make_scorer(q_index, k_index, w, state, cache)
            if state.index_loss:
                selection = Selection(selection.indices, q_index, k_index, w, scorer)
        latents = state.gather(latents)
        if cache is not None:
            latents = cache.append(state.slots, state.length, latents)  # (B, T, rank + rope), or bytes
        T = latents.shape[1]

        sparse = self.selects(T, state)
        absorbed = sparse or (cache is not None and S <= DECODE_QUERIES)
        if not sparse and latents.dtype == torch.uint8:
            latents = sparse_attn.unpack_latents(latents, self.rank, h.dtype)
        if absorbed:
            q = self.absorb(q_nope, q_rope)  # (B, S, H, rank + rope)
            k = latents[:, :, None]  # (B, T, 1, rank + rope)
            v = k[..., :self.rank]  # (B, T, 1, rank)
        else:
            q = torch.cat((q_nope, q_rope), -1)  # (B, S, H, nope + rope)
            k, v = self.expand(latents)  # (B, T, H, nope + rope), (B, T, H, value)

        # Select, attend, and the loss of the indexer that this layer's selection comes from
        index_loss = None
        with exact(h):
            if sparse:
                selection = self.select(q, latents, scorer, selection, state)
                out, lse = state.ops.sparse_attention(q, latents, selection.indices, self.scale, self.rank)
            else:
                out, lse = state.dense_attention(q, k, v, self.scale)
            if selection.scorer is not None:
                indices, q_index, k_index, w, scorer = selection
                if sparse:
                    kl, kl_uniform = state.ops.indexer_loss_sparse(
                        q.detach(), latents.detach(), lse, indices, self.scale, q_index, k_index, w)
                else:
                    kl, kl_uniform = state.ops.indexer_loss_dense(
                        q.detach(), k.detach(), lse, self.scale, q_index, k_index, w, state.first, state.last)
                used = indices if sparse else None
                recall, index_recall = self.recall(q_nope, q_rope, latents, scorer, used, state)
                if index_recall is not None:
                    index_recall = index_recall.mean()  # of (B, 16)
                # means of (B, S), (B, S), (B, 16)
                index_loss = IndexLoss(kl.mean(), kl_uniform.mean(), recall.mean(), index_recall)

        if absorbed:
            _, w_uv = self.kv_b(out.dtype)
            out = torch.einsum("bshr,hvr->bshv", out, w_uv)  # (B, S, H, value)
        return self.o_proj(out.flatten(2)), selection, index_loss  # (B, S, hidden)

    def selects(self, T, state):
        """Does attention read a selection of T tokens? Up to k tokens, selecting is attending to all: the
        dense path, unless the KL over the selection is wanted, or the selection itself."""
        return state.sparse and (T > self.config.index_topk or state.index_loss or state.always_select)

    def select(self, q, latents, scorer, selection, state):
        """The Selection of queries q (B,S,H,rank + rope), absorbed: by this layer's scorer, or, where there
        is no indexer or its indices were given, the one passed in."""
        if not self.indexer or state.replay:
            return selection
        scorer = scorer.attending(q, latents, self.scale, self.rank)
        indices = scorer.select(state.ops, self.config.index_topk, state.first, state.last)  # (B, S, k)
        return Selection(indices, *selection[1:])  # not _replace: torch 2.11 cannot compile it

    def make_scorer(self, q, k, w, state, cache):
        """What tokens are selected by: the indexer's q (B,S,HI,DI), k (B,T,DI), w (B,S,HI) without gradient,
        quantised if state.index_fp8; with a cache, k of everything in it."""
        q = q.detach()
        k = k.detach()
        w = w.detach()
        k_scale = None
        if state.index_fp8:
            with exact(q):
                q, q_scale = state.ops.quantise(q, block=self.indexer.dim, rotate=True)
                k, k_scale = state.ops.quantise(k, block=self.indexer.dim, rotate=True)
            w = w * q_scale.squeeze(-1)  # (B, S, HI)
            k_scale = k_scale.squeeze(-1)  # (B, T)
        if cache is not None:
            k, k_scale = cache.append_index(state.slots, state.length, k, k_scale)
        return self.scorer(q, k, w, k_scale, state)

    def scorer(self, q, k, w, k_scale, state):
        """The Scorer of these."""
        return Scorer(
            q, k, w, k_scale, state.index_block, state.candidates, selector=self.config.selector)

    @torch.no_grad()
    def recall(self, q_nope, q_rope, latents, scorer, indices, state):
        """Share of the dense attention's mass that is selected, of RECALL_QUERIES queries -> (B,16) float32,
        and, where selection has two levels, the share of what is selected from all: linear cost. indices
        (B,S,k), or None where nothing was selected yet."""
        B, S = q_nope.shape[:2]
        topk = self.config.index_topk
        rows = torch.linspace(0, S - 1, min(S, RECALL_QUERIES), device=q_nope.device).long()  # (16,)
        last = rows.expand(B, -1).int() if state.last is None else state.last[:, rows]  # (B, 16)
        first = torch.zeros_like(last) if state.first is None else state.first[:, rows]
        q = self.absorb(q_nope[:, rows], q_rope[:, rows])  # (B, 16, H, rank + rope)
        of_rows = scorer.at(rows).attending(q, latents, self.scale, self.rank)
        chosen = of_rows.select(state.ops, topk, first, last) if indices is None else indices[:, rows]
        mass = sparse_attn.selected_mass(q, latents, chosen, self.scale, first, last)  # (B, 16)
        if not scorer.candidates:
            return mass, None
        from_all = of_rows._replace(candidates=0).select(state.ops, topk, first, last)  # (B, 16, k)
        return mass, indexer.selection_recall(chosen, from_all, latents.shape[1])


class Block(nn.Module):
    """Pre-norm residual block. Losses and the selection are returned, not stored: recomputation in the
    backward must see them as outputs."""

    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if config.has_experts(layer):
            self.mlp = MoE(config)
        else:
            self.mlp = MLP(config.hidden_size, config.intermediate_size)

    def forward(self, h, state, selection=Selection(), cache=None):
        if state.decodes and not self.self_attn._forward_pre_hooks:  # of `watched`, which looks inside
            return state.ops.decode_block(self, h, state, selection, cache)
        out, selection, index_loss = self.self_attn(self.input_layernorm(h), state, selection, cache)
        h = h + out
        h = h + self.mlp(self.post_attention_layernorm(h))
        return h, selection, index_loss


def remembering(block, offload):
    """A block with an indexer, for recomputation: what it selected in the forward it does not select again in
    the backward. At 1M tokens selecting twice took half of a step. Kept are (B,S,k) int32, with offload in
    the host's memory, pinned."""
    kept = []

    def run(h, state, selection):
        if kept:
            [indices] = kept
            state = replace(state, replay=True)
            selection = selection._replace(indices=indices.to(h.device, non_blocking=True))
            return block(h, state, selection)
        h, selection, index_loss = block(h, state, selection)
        if selection.indices is not None:
            indices = selection.indices
            if offload and indices.is_cuda:
                indices = torch.empty(indices.shape, dtype=indices.dtype, pin_memory=True).copy_(indices)
            kept.append(indices)
        return h, selection, index_loss

    return run


class Unfilled(TorchFunctionMode):
    """A context beside torch.device("meta"): parameters are not drawn at random. They have no numbers, but
    torch imports its compiler, for seconds, before it draws none."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **kwargs)


class Transformer(nn.Module):
    """Decoder-only language model.

    attention: "dense" or "sparse"; None is sparse where there is an indexer. index_fp8: score quantised
    queries and keys, as the published inference does, or (False) as they are, as transformers does. backend:
    see `pick_backend`. ValueError: see Config.check."""

    def __init__(self, config, backend=None, attention=None, index_fp8=True):
        super().__init__()
        if attention not in (None, "dense", "sparse") or backend not in (None, "torch", "triton"):
            raise ValueError(f"attention={attention}, backend={backend}: attention is dense or sparse, "
                             "backend torch or triton")
        if attention == "sparse" and not config.index_topk:
            raise ValueError("attention=sparse: this checkpoint has no indexer (index_topk=0); use "
                             "attention=dense or train one: train.py --stage=warmup")
        self.config = config.check()
        self.backend = backend
        self.attention = attention or ("sparse" if config.index_topk else "dense")
        self.index_fp8 = index_fp8
        self.recompute = False  # activation checkpointing: keep only the blocks' inputs
        self.offload = False  # and these in host memory
        self.compiled = False  # see compile_layers
        self.detach = True  # the indexer's inputs, so that the KL teaches indexers alone
        self.model = nn.ModuleDict(dict(
            embed_tokens=nn.Embedding(config.vocab_size, config.hidden_size),
            layers=nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers)),
            norm=RMSNorm(config.hidden_size, config.rms_norm_eps)))
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialise()
        frequencies, self.rope_amplitude = rope_frequencies(config)
        frequencies = frequencies.to(self.lm_head.weight.device)
        self.register_buffer("rope_frequencies", frequencies, persistent=False)

    def initialise(self):
        """Random matrices; those that project into the residual stream are smaller by the number of additions
        to it, as in GPT-2."""
        std = self.config.initializer_range
        additions = 2 * self.config.num_hidden_layers
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_residual = name.endswith(("o_proj.weight", "down_proj.weight", "down_proj"))
                nn.init.normal_(p, std=std / additions**0.5 if into_residual else std)

    def _apply(self, function, recurse=True):
        """.to(dtype), .bfloat16() and .half() leave the RoPE angles in float32: at position 4096 a bf16 angle
        is a radian off."""
        super()._apply(function, recurse)
        self.rope_frequencies = rope_frequencies(self.config)[0].to(self.rope_frequencies.device)
        return self

    def backend_on(self, device):
        """The backend that runs on this torch.device: "torch" or "triton"."""
        return pick_backend(self.backend, device)

    def decodes_by_kernels(self, device):
        """Does kernels.decode_block take this model's decoding steps there?"""
        known = self.config.q_lora_rank > 0 and not self.config.attention_bias
        return known and self.backend_on(device) == "triton"

    def compile_layers(self, **options):
        """From now on layers that learn run by torch.compile, which takes the options. Layers alike share one
        graph, so the first step comes several times sooner than if the whole model were compiled."""
        import torch._dynamo
        self.compiled = True
        torch._dynamo.config.recompile_limit = MOST_GRAPHS  # beyond it layers would run eager
        compiled = torch.compile(Block.forward, **options)

        def forward(block, *args):
            return (compiled if torch.is_grad_enabled() else Block.forward)(block, *args)

        for block in self.model.layers:
            block.forward = functools.partial(forward, block)

    def indexer_parameters(self):
        """The parameters that learn from the KL loss alone; all others learn from the language-model loss
        alone."""
        return [p for name, p in self.named_parameters() if ".indexer." in name]

    def forward(self, idx, targets=None, first=None, index_loss=False, caches=None, position=None, last=None,
                logits_of="all", split=None, selections=None):
        """idx (B,S) int64, targets (B,S) int64 or None, first (B,S) int32 or None: first visible position
        (packed documents).

        -> logits (B,S,vocab), losses: dict with "lm" (mean cross entropy in nats per token, every target
        counts) if targets are given, and with index_loss "kl", "kl_uniform" (nats, mean over tokens and over
        all layers, each by the indexer whose selection it uses) and "recall" (share of dense attention mass
        selected, 0..1, mean over all layers); of the layers that select in two levels also "index_recall"
        (share of exact selection that is selected).
        logits_of=None gives None for them, see `next_token_loss`; "last": the last token's alone; (B,) int64:
        of each row one token's alone.
        caches: one Cache per layer; `position` (S,) int64 of these tokens (with split: of those of all its
        ranks) or (B,S), of each row its own, all earlier ones being cached; a query sees up to its own. With
        `last` (B,S) given, lengths are read on the device (CUDA graphs). split: parallel.Split, if this
        process has a part of the sequence, others the rest; idx, targets, first, selections and the results
        are those of the part. selections: (B,S,k) int32 for each layer, to attend to instead of what the
        indexers select now (they still learn by it); an empty list is filled with what they select.
        ValueError: sequence longer than max_position_embeddings."""
        backend = self.backend_on(idx.device)
        state = self.forward_state(backend, idx, first, index_loss, caches, position, last, split, selections)
        one_level = replace(state, index_block=0, candidates=0)
        h = self.model.embed_tokens(idx)  # (B, S, hidden)
        selection = Selection()
        index_losses = []
        compiled = self.compiled or torch.compiler.is_compiling()
        for i, block in enumerate(self.model.layers):
            layer_state = state if self.config.block_of(i) else one_level
            if block.self_attn.indexer:
                selection = Selection()  # its own: an input would be kept for the backward
            if state.replay:
                selection = selection._replace(indices=selections[i])
            if self.recompute and torch.is_grad_enabled() and caches is None:
                # checkpoint saves h where these hooks see it, and what the block computes where they do not
                keep = save_on_cpu(pin_memory=h.is_cuda) if self.offload else nullcontext()
                run = block
                if block.self_attn.indexer and not state.replay and not compiled:
                    run = remembering(block, self.offload)
                with keep:
                    h, selection, layer_loss = recompute(
                        run, h, layer_state, selection, use_reentrant=False, preserve_rng_state=False)
            else:
                h, selection, layer_loss = block(h, layer_state, selection, caches[i] if caches else None)
            if layer_loss is not None:
                index_losses.append(layer_loss)
            if state.always_select and not state.replay:
                selections.append(selection.indices)
        h = self.model.norm(h)  # (B, S, hidden)

        losses = {}
        if index_losses:
            for name, layers in zip(IndexLoss._fields, zip(*index_losses)):
                layers = [loss for loss in layers if loss is not None]
                if layers:
                    losses[name] = torch.stack(layers).mean()
        if targets is not None:
            losses["lm"] = next_token_loss(h.flatten(0, 1), self.lm_head.weight, targets.flatten(), backend)
        if isinstance(logits_of, Tensor):
            h = h[torch.arange(len(h), device=h.device), logits_of][:, None]
        elif logits_of == "last":
            h = h[:, -1:]
        logits = None
        if logits_of is not None:
            with exact(h):  # as exact as the weights: two logits in bf16 between 4 and 8 are 0.03 apart
                logits = self.lm_head(h.to(self.lm_head.weight.dtype))  # (B, S or 1, vocab)
        return logits, losses

    def forward_state(self, backend, idx, first, index_loss, caches, position, last, split=None,
                      selections=None):
        """Check the arguments of `forward` -> ForwardState."""
        if index_loss and caches is not None:
            raise ValueError("index_loss=True needs the whole sequence in one forward; leave caches out")
        B, S = idx.shape
        if split is not None:
            length = split.length
            last = split.position.expand(idx.shape).int()
        elif caches is None:
            length = S
        elif last is not None:
            length = caches[0].capacity
        else:
            length = int(position.max()) + 1
            if position.dim() == 2:
                last = position.int()
        if length > self.config.max_position_embeddings:
            raise ValueError(f"sequence of {length} tokens is longer than the model's "
                             f"max_position_embeddings={self.config.max_position_embeddings}; shorten it")
        candidates = 0
        if self.config.index_block:  # of all that will be cached, so that every forward has as many
            T = caches[0].capacity if caches else length
            default = indexer.default_candidates(self.config.index_topk, T)
            candidates = self.config.index_candidates or default
        if position is None:
            position = torch.arange(S, device=idx.device)
        row = slice(None) if position.dim() == 1 else torch.arange(B, device=idx.device)[:, None]
        own = position if split is None else split.position
        decodes = caches is not None and S == 1 and split is None and self.decodes_by_kernels(idx.device)
        decodes = decodes and not (caches[0].fp8 and self.config.kv_lora_rank % 4)  # scales take 4 bytes
        decodes = decodes and not torch.is_grad_enabled() and not torch.compiler.is_compiling()
        angles = (own[..., None].float() * self.rope_frequencies)[..., None, :]  # (S or B, S, 1, rope / 2)
        return ForwardState(
            ops=operations(backend),
            cos=angles.cos() * self.rope_amplitude,
            sin=angles.sin() * self.rope_amplitude,
            slots=(row, position),
            length=length,
            first=first,
            last=last,
            split=split,
            sparse=self.attention == "sparse",
            index_loss=index_loss,
            index_fp8=self.index_fp8,
            index_block=self.config.index_block,
            candidates=candidates,
            detach=self.detach,
            always_select=selections is not None,
            replay=bool(selections),
            decodes=decodes)

    def generate(self, idx, n, **options):
        """idx (B,T) -> (B, T + up to n): the prompts and the tokens sampled for each; options as
        generate.stream, which yields them one by one. Rows that ended before the others are filled up with
        end_ids[0]."""
        return generate.complete(self, idx, n, **options)

    @classmethod
    def from_pretrained(cls, folder, backend=None, attention=None, index_fp8=True, device="cpu", dtype=None,
                        index=None, indexer_types=None, yarn=None, prepare=None):
        """The model of a checkpoint folder, ours or a published one (see support/checkpoint.py), in eval
        mode.

        dtype: None keeps the stored ones. index: a dict of index_n_heads, index_head_dim and index_topk
        grafts new float32 indexers onto the checkpoint, in place of any it has; attention is then "dense"
        unless given. indexer_types: in place of config.json's; the indexers of layers that now share a
        selection are left out. yarn: the rope_scaling of a model that had none; its longest context becomes
        at least that many times the original one. prepare: a function of the model that is called before its
        parameters have numbers, to change their dtypes or to shard them (parallel.shard); then a process
        reads its part alone. FileNotFoundError or ValueError name what is wrong with which file."""
        from support import checkpoint
        config = checkpoint.read_config(folder)
        if index:
            config = replace(config, **index)
            attention = attention or "dense"
        if indexer_types:
            config = checkpoint.sharing(config, indexer_types)
        if yarn:
            longest = int(yarn["factor"] * yarn["original_max_position_embeddings"])
            longest = max(longest, config.max_position_embeddings)
            config = replace(config, rope_scaling=yarn, max_position_embeddings=longest)
        with torch.device("meta"), Unfilled():
            model = cls(config, backend, attention, index_fp8)
        checkpoint.read_weights(folder, model, device, dtype, new_indexers=bool(index), prepare=prepare)
        model.rope_frequencies = rope_frequencies(config)[0].to(device)
        return model.eval()

    def save_pretrained(self, folder, tokenizer=None):
        """Write a checkpoint folder that `from_pretrained` and other programs open; it appears whole or not
        at all. tokenizer: see support/tokenizer.save_tokenizer."""
        from support import checkpoint
        checkpoint.write(folder, self, tokenizer)
