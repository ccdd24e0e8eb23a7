"""The lightning indexer: which k past tokens does each query read? (DeepSeek-V3.2-Exp, section 1)

A few small heads score every past token, I[t,s] = sum_j w[t,j] relu(q[t,j] . k[s]), and the k best are
attended to. Scoring is still quadratic, but with one key per token, a handful of heads and e4m3 operands it
is the cheap part. Top-k passes no gradient, so the indexer learns from a loss of its own: KL(p ||
softmax(I)), where p is what the main attention looked at.

Functions first, in the order of the paper; those that model.Operations lists have Triton twins in kernels.py,
of the same name and signature. Letters: B sequences, S queries, T keys, K slots of a selection, H attention
heads of D dimensions, HI and DI the indexer's heads and their dimensions. Equations keep the paper's indices,
t a query and s a token that it may see; code counts queries by s < S and keys by t < T. `first`, `last` (B,
S) int32 are the first and last key position that a query may see; None means 0 and T - S + i, causal with the
queries at the end. They express packed documents (first), caches that are longer than what they hold (last),
and padding (first > last: nothing is visible).
"""
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from precision import exact

NORM_STEPS = 2**20  # of the largest element, in which `mixed_heads` adds up norms: int32 holds 1024 elements'
E4M3_MAX = 448.0
RECENT = 256  # last tokens that selection in two levels scores whatever their blocks say
SLICE = 2**24  # elements of the largest tensor that the reference holds at once


def visible(S, T, first, last, rows, device):
    """-> (1 or B, rows, T) bool: may these queries, a slice of all S, see key t, is first <= t <= last?"""
    t = torch.arange(T, device=device)  # (T,)
    if last is None:
        last = torch.arange(T - S, T, device=device)[None]  # (1, S)
    mask = t <= last[:, rows, None]  # (1 or B, rows, T)
    if first is not None:
        mask = mask & (t >= first[:, rows, None])
    return mask


def read(x, chosen):
    """x (B,T,D), chosen (B,rows,K) -> (B,rows,K,D), x of the chosen tokens. An empty slot (-1) repeats a
    token of its row: of one that was not selected, a NaN times 0 would survive."""
    B, T, _ = x.shape
    selected = F.pad(chosen, (0, 1), value=-1).amax(-1, keepdim=True)  # (B, rows, 1), -1 if there is none
    token = torch.where(chosen < 0, selected, chosen).clamp(min=0).long()  # (B, rows, K)
    token = token + T * torch.arange(B, device=x.device)[:, None, None]  # among those of all sequences
    return F.embedding(token, x.flatten(0, 1))


def over_rows(function, S, elements_per_row):
    """Concatenate function(rows), a tuple, along dim 1 for slices of queries so small that a slice's largest
    tensor stays near SLICE elements. With gradients, each slice is recomputed in the backward instead of
    kept."""
    step = max(1, min(S, SLICE // max(1, elements_per_row)))
    recompute = torch.is_grad_enabled() and step < S
    parts = []
    for i in range(0, max(1, S), step):  # of no queries one empty slice, whose results have shapes, too
        rows = slice(i, min(i + step, S))
        parts.append(checkpoint(function, rows, use_reentrant=False) if recompute else function(rows))
    return tuple(torch.cat(results, 1) for results in zip(*parts))


# ---- FP8 ----

def hadamard(x):
    """Orthonormal Walsh-Hadamard transform of the last dimension, in float32, returned in x's dtype.

    Applied to q and k alike it changes no exact score. Where one dimension is large in both, a score is
    little more than one product, with its FP8 rounding; rotated, it is d products of about one size, whose
    roundings average out: sqrt(d) less error. ValueError: a dimension that is not a power of two."""
    d = x.shape[-1]
    check_rotation(d)
    y = x.float()
    stride = 1
    while stride < d:
        a, b = y.unflatten(-1, (-1, 2, stride)).unbind(-2)  # (..., d / (2 stride), stride) each
        y = torch.stack((a + b, a - b), -2).flatten(-3)  # (..., d)
        stride *= 2
    return (y * d**-0.5).to(x.dtype)


def check_rotation(d):
    """ValueError: `hadamard` cannot rotate d dimensions."""
    if d & (d - 1):
        raise ValueError(f"index_head_dim={d} is not a power of two, which the Hadamard rotation needs; "
                         "choose 32, 64 or 128")


def power_of_two_above(x):
    """x > 0, float32 -> the smallest power of two that is at least x; x where that is not finite."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2^exponent, mantissa in [1/2, 1)
    power = torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())
    return torch.where(x.isfinite(), power, x)


def quantise(x, block=128, rotate=False, ue8m0=True):
    """x (..., d) -> e4m3 values (..., d), float32 scales (..., ceil(d / block)): x is near values * scale.

    As published (act_quant of the V3.2-Exp inference code): amax clamped at 1e-4, scale = amax * (1/448),
    rounded up to a power of two for the `ue8m0` format. rotate: `hadamard` first. A block that holds an
    infinity or a NaN becomes NaN, values and scale: rounding must not hide it."""
    d = x.shape[-1]
    if rotate:
        x = hadamard(x)
    block = min(block, d)
    blocks = F.pad(x.float(), (0, -d % block)).unflatten(-1, (-1, block))  # (..., ceil(d / block), block)
    amax = blocks.abs().amax(-1, keepdim=True)  # (..., ceil(d / block), 1)
    scale = amax.clamp(min=1e-4) * (1 / E4M3_MAX)
    if ue8m0:
        scale = power_of_two_above(scale)
    scale = scale.masked_fill(~amax.isfinite(), float("nan"))
    values = (blocks / scale).clamp(-E4M3_MAX, E4M3_MAX).flatten(-2)[..., :d]  # (..., d)
    return values.to(torch.float8_e4m3fn), scale.squeeze(-1)


# ---- scores and selection ----

def index_scores(q, k, w, k_scale=None, first=None, last=None, rows=slice(None)):
    """I[t,s] = k_scale[s] sum_j w[t,j] relu(q[t,j] . k[s])   (paper eq. 1)

    q (B,S,HI,DI), k (B,T,DI), w (B,S,HI) float32; q and k floating point, or both e4m3 with k_scale (B,T)
    (q's scale is part of w). w carries the factor HI^-1/2 DI^-1/2: it may leave the relu because it is
    positive.
    -> (B,S,T) float32, -inf where not visible."""
    dots = torch.einsum("bshd,btd->bsht", q[:, rows].float(), k.float())  # (B, rows, HI, T)
    scores = torch.einsum("bsht,bsh->bst", dots.relu(), w[:, rows].float())  # (B, rows, T)
    if k_scale is not None:
        scores = scores * k_scale[:, None]
    seen = visible(q.shape[1], k.shape[1], first, last, rows, q.device)
    return scores.masked_fill(~seen, float("-inf"))


def highest(scores, topk):
    """scores (B,rows,T) -> (B,rows,topk) int32: the positions of the highest, ascending, then -1 in unused
    slots. See `select`."""
    T = scores.shape[-1]
    scores = scores.masked_fill(scores.isnan(), float("nan"))  # one NaN: CUDA sorts others by their bits
    best, position = scores.sort(dim=-1, descending=True, stable=True)
    unseen = best[..., :topk] == float("-inf")
    chosen = position[..., :topk].masked_fill(unseen, T)  # (B, rows, min(topk, T)), T sorts last
    chosen = chosen.sort(-1).values
    chosen = chosen.masked_fill(chosen == T, -1)
    return F.pad(chosen, (0, max(0, topk - T)), value=-1).int()


@torch.no_grad()
def select(q, k, w, topk, k_scale=None, first=None, last=None):
    """S_t = the topk visible keys with the highest index score -> (B,S,topk) int32: ascending positions, then
    -1 in unused slots.

    Arguments as `index_scores`. Equal scores go to the lower position: small indexers tie often (relu gives
    exact zeros), and runs, devices and kernels must agree. A score of NaN ranks above all others, so that it
    is seen. ValueError: topk < 1."""
    if topk < 1:
        raise ValueError(f"index_topk={topk}: select at least one token")
    B, S, HI, _ = q.shape
    T = k.shape[1]

    def choose(rows):
        return (highest(index_scores(q, k, w, k_scale, first, last, rows), topk),)

    return over_rows(choose, S, B * T * HI)[0]


# ---- selection in two levels ----

def mixed_heads(q, w):
    """The heads of q (B,S,HI,DI) mixed into two by their weights w (B,S,HI) -> m (B,S,2,DI), w (B,S,2): m[0]
    = |w_a| q_a of the head that can score highest, alone, of the sign of w_a, and m[1] = sum_{j != a} w_j q_j
    of all others, of weight 1, but for a positive factor of each query, which changes no order. a is the head
    with the largest w_j |q_j|, in the l1 norm.

    What one head looks for m[0] finds as the head does; what several of the others look for at once
    relu(m[1] . k) finds as sum_j w_j relu(q_j . k) does. Without a head apart, what one head alone finds is
    lost among the others, which do not match it. In q's dtype, e4m3 being quantised anew. Norms are summed in
    integers and heads in float32, one after the other: the same bits everywhere."""
    w = w / power_of_two_above(w.abs().amax(-1, keepdim=True).clamp(min=1e-30))  # (B, S, HI), at most 1
    size = q.float().abs()
    size = torch.where(size.isfinite(), size, 0)
    largest = power_of_two_above(size.amax((2, 3), keepdim=True).clamp(min=1e-30))  # (B, S, 1, 1)
    norm = (size / largest * NORM_STEPS).int().sum(-1, dtype=torch.int32)  # (B, S, HI)
    strength = (w * norm.float()).nan_to_num(nan=float("-inf"))
    alone = strength.argmax(-1, keepdim=True) == torch.arange(q.shape[2], device=q.device)  # (B, S, HI)
    shares = torch.stack((torch.where(alone, w.abs(), 0), torch.where(alone, 0, w)), 2)  # (B, S, 2, HI)
    mixed = torch.zeros(*q.shape[:2], 2, q.shape[3], device=q.device)
    for j in range(q.shape[2]):
        mixed = mixed + shares[..., j, None] * q[:, :, None, j].float()  # (B, S, 2, DI)
    negative = ((w < 0) & alone).any(-1)  # (B, S)
    signs = torch.stack((torch.where(negative, -1.0, 1.0), torch.ones_like(w[..., 0])), -1)  # (B, S, 2)
    if q.dtype != torch.float8_e4m3fn:
        return mixed.to(q.dtype), signs
    values, scale = quantise(mixed, block=q.shape[3])
    return values, scale.squeeze(-1) * signs


def ranked_blocks(S, T, first, last, block, recent, device):
    """-> (1 or B, S) int64 each: the block that holds the first token that a query sees, and the one that
    holds the earliest of the `recent` last ones. These are read whatever they score, and all from there on;
    the blocks between are ranked. They are complete, and in one document."""
    if last is None:
        last = torch.arange(T - S, T, device=device)[None]  # (1, S)
    if first is None:
        first = torch.zeros_like(last)
    beginning = first.long().clamp(min=0) // block  # (1 or B, S)
    last = last.long().clamp(max=T - 1)
    return beginning, torch.maximum((last + 1 - recent).clamp(min=0) // block, beginning)


def default_candidates(topk, T):
    """Tokens in the blocks that a query ranks highest: enough of them for k, and for long contexts."""
    return max(8 * topk, T // 32)


@torch.no_grad()
def select_by_blocks(q, k, w, topk, k_scale=None, first=None, last=None, block=16, candidates=0,
                     recent=RECENT):
    """`select` among candidates only: what a query's document begins with (its first block), its `recent`
    last tokens (and the rest of the block in which these begin), and of the blocks between those whose best
    token scores highest by `mixed_heads`, `candidates` tokens of them (0: `default_candidates`; rounded up
    to blocks).

    Other arguments, results, ties and NaN as `select`, which this is as soon as all blocks are candidates.
    ValueError: topk or recent < 1, candidates < 0, a block that is no power of two up to 64."""
    check_two_levels(topk, block, candidates, recent)
    B, S, HI, _ = q.shape
    T = k.shape[1]
    count = -(-T // block)
    blocks = -(-(candidates or default_candidates(topk, T)) // block)
    beginning, recently = ranked_blocks(S, T, first, last, block, recent, q.device)

    def mix(rows):
        return mixed_heads(q[:, rows], w[:, rows])

    q_mixed, w_mixed = over_rows(mix, S, B * HI * q.shape[3])

    def choose(rows):
        # the best blocks of those that a query ranks
        scores = index_scores(q_mixed, k, w_mixed, k_scale, first, last, rows)  # (B, rows, T)
        scores = F.pad(scores, (0, -T % block), value=float("-inf"))
        scores = scores.unflatten(-1, (count, block)).amax(-1)  # (B, rows, count)
        n = torch.arange(count, device=q.device)
        ranked = (n > beginning[:, rows, None]) & (n < recently[:, rows, None])  # (1 or B, rows, count)
        best = highest(scores.masked_fill(~ranked, float("-inf")), blocks)

        # the best tokens in them, and in the others
        candidate = membership(best, count) | ~ranked  # (B, rows, count)
        candidate = candidate.repeat_interleave(block, -1)[..., :T]  # (B, rows, T)
        scores = index_scores(q, k, w, k_scale, first, last, rows)  # (B, rows, T)
        return (highest(scores.masked_fill(~candidate, float("-inf")), topk),)

    return over_rows(choose, S, B * T * max(HI, 2))[0]


def membership(indices, T):
    """Positions (B,S,K), -1 in empty slots, of T places -> (B,S,T) bool: which are among them?"""
    among = torch.zeros(*indices.shape[:2], T + 1, dtype=torch.bool, device=indices.device)
    return among.scatter(-1, indices.long() % (T + 1), True)[..., :-1]  # -1 is the place behind all


def selection_recall(indices, exact, T):
    """Share of an exact selection (B,S,K) of T tokens that another, indices (B,S,K), holds, too -> (B,S)
    float32; 1 where nothing is visible. Holds (B,S,T) bool: a metric, for a few sampled queries."""
    found = membership(indices, T).gather(-1, exact.clamp(min=0).long()) & (exact >= 0)  # (B, S, K)
    count = (exact >= 0).sum(-1)
    return torch.where(count > 0, found.sum(-1) / count.clamp(min=1), 1.0)


def check_two_levels(topk, block, candidates, recent):
    """ValueError, naming value and fix, unless selection in two levels can run so."""
    if topk < 1:
        raise ValueError(f"index_topk={topk}: select at least one token")
    if not 1 <= block <= 64 or block & (block - 1):
        raise ValueError(f"block={block}: tokens of a block, a power of two up to 64")
    if recent < 1 or candidates < 0:
        raise ValueError(f"recent={recent}, candidates={candidates}: of recent tokens at least 1, of "
                         "candidates from 0 on")


# ---- how the indexer learns ----

def kl_divergence(p, scores, seen):
    """p (..., n) target over n candidates, scores (..., n), seen (..., n) bool -> KL(p || softmax(scores))
    and KL(p || uniform), (...) each.

    What is not seen is neutralised before log and log_softmax, and a row that sees nothing gives 0: NaN * 0
    would survive a backward."""
    log_q = F.log_softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0)  # (..., n)
    negative_entropy = torch.special.xlogy(p, p).sum(-1)  # (...)
    kl = negative_entropy - (p * log_q).sum(-1)
    log_n = seen.sum(-1).clamp(min=1).log()
    return kl, (negative_entropy + p.sum(-1) * log_n).detach()


def indexer_loss_dense(q, k, lse, scale, q_index, k_index, w, first=None, last=None):
    """Warm-up loss, KL(p_t || softmax(I_t)) over all visible tokens   (paper eq. 3)

    The target p_t is the sum over heads of the attention probabilities exp(scale q.k - lse), L1-normalised:
    each head sums to one, so the mean. q (B,S,H,D), k (B,T,H or 1,D), lse (B,S,H) of the frozen attention
    receive no gradient; q_index (B,S,HI,DI), k_index (B,T,DI), w (B,S,HI) do. -> kl (B,S), kl_uniform (B,S)
    float32, the latter for an indexer that cannot tell tokens apart."""
    B, S, H, _ = q.shape
    T = k.shape[1]
    k_heads = k.expand(-1, -1, H, -1)  # (B, T, H, D)

    def divergence(rows):
        seen = visible(S, T, first, last, rows, q.device)  # (1 or B, rows, T)
        with torch.no_grad():
            logits = torch.einsum("bshd,bthd->bsht", q[:, rows].float(), k_heads.float()) * scale
            p = torch.exp(logits - lse[:, rows, :, None].float())  # (B, rows, H, T)
            p = p.masked_fill(~seen[:, :, None], 0).mean(2)  # (B, rows, T)
        return kl_divergence(p, index_scores(q_index, k_index, w, None, first, last, rows), seen)

    return over_rows(divergence, S, B * T * (H + q_index.shape[2]))


def indexer_loss_sparse(q, latents, lse, indices, scale, q_index, k_index, w):
    """Sparse-stage loss, KL(p_{t,S_t} || softmax(I_{t,S_t})) over the selection only   (paper eq. 4)

    Each head's softmax is already over S_t (lse comes from `sparse_attention`; nothing else is known there),
    so p is again their mean. q (B,S,H,D) absorbed, latents (B,T,D), indices (B,S,K). Gradients and results as
    `indexer_loss_dense`."""
    B, S, K = indices.shape

    def divergence(rows):
        chosen = indices[:, rows]  # (B, rows, K)
        seen = chosen >= 0
        with torch.no_grad():
            tokens = read(latents, chosen).float()  # (B, rows, K, D)
            logits = torch.einsum("bshd,bskd->bshk", q[:, rows].float(), tokens) * scale
            p = torch.exp(logits - lse[:, rows, :, None].float())  # (B, rows, H, K)
            p = p.masked_fill(~seen[:, :, None], 0).mean(2)  # (B, rows, K)
        keys = read(k_index, chosen).float()  # (B, rows, K, DI)
        dots = torch.einsum("bshd,bskd->bshk", q_index[:, rows].float(), keys)  # (B, rows, HI, K)
        scores = torch.einsum("bshk,bsh->bsk", dots.relu(), w[:, rows].float())  # (B, rows, K)
        return kl_divergence(p, scores, seen)

    return over_rows(divergence, S, B * K * (latents.shape[-1] + k_index.shape[-1] + q.shape[2]))


# ---- its projections ----

class Indexer(nn.Module):
    """Projections of the lightning indexer, one per layer (names of the published checkpoints).

    q comes from the normalised query latent (from h where the model has none), k and w from the hidden state
    h. k passes a LayerNorm. RoPE rotates the FIRST qk_rope_head_dim dimensions, half-split: both unlike the
    main attention (GLM-5: interleaved, `indexer_rope_interleave`)."""

    def __init__(self, config):
        super().__init__()
        self.heads = config.index_n_heads
        self.dim = config.index_head_dim
        self.rope_dim = config.qk_rope_head_dim
        self.interleaved = config.indexer_rope_interleave
        self.wq_b = nn.Linear(config.q_lora_rank or config.hidden_size, self.heads * self.dim, bias=False)
        self.wk = nn.Linear(config.hidden_size, self.dim, bias=False)
        self.k_norm = nn.LayerNorm(self.dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.hidden_size, self.heads, bias=False)

    def forward(self, h, q_latent, rope):
        """h (B,S,hidden), q_latent (B,S,q_lora_rank or hidden), rope(x, interleaved) rotates
        (B,S,heads,rope_dim)
        -> q (B,S,HI,DI), k (B,S,DI), w (B,S,HI) float32.

        Computed in the dtype of the indexer's weights, which may be float32 in a bf16 model (under autocast:
        in autocast's)."""
        if not torch.is_autocast_enabled(h.device.type):
            h = h.to(self.wk.weight.dtype)
            q_latent = q_latent.to(self.wk.weight.dtype)
        q = self.wq_b(q_latent).unflatten(-1, (self.heads, self.dim))  # (B, S, HI, DI)
        q = self.rotate_first(q, rope)
        k = self.norm(self.wk(h))[:, :, None]  # (B, S, 1, DI)
        k = self.rotate_first(k, rope).squeeze(2)  # (B, S, DI)
        with exact(h):  # w stays float32: rounding it to bf16 makes ties
            w = F.linear(h.float(), self.weights_proj.weight.float())  # (B, S, HI)
            w = w * (self.heads**-0.5 * self.dim**-0.5)
        return q, k, w

    def norm(self, k):
        """LayerNorm of k (..., DI) in float32. Weight and bias apart: over so few dimensions the fused
        backward of all three takes several times as long."""
        y = F.layer_norm(k.float(), (self.dim,), eps=self.k_norm.eps)
        return (y * self.k_norm.weight.float() + self.k_norm.bias.float()).to(k.dtype)

    def rotate_first(self, x, rope):
        """RoPE on the first rope_dim dimensions of x (B,S,heads,DI) -> the same shape."""
        return torch.cat((rope(x[..., :self.rope_dim], self.interleaved), x[..., self.rope_dim:]), -1)
