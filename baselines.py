"""Would anything simpler than the indexer have done as well? Other ways to choose the k tokens that a query
reads, to train and to measure the same sparse attention with (train.py --selector, evaluate.py --sweep).

  recent   the last k tokens: a sliding window
  sinks    the first 4 tokens of the document (of a small k half of it) and the last k - 4: a window with
           attention sinks (arXiv 2309.17453)
  random   k tokens in sight, each query its own: what many tokens are worth, whichever they are
  strided  k tokens evenly spaced over what the query sees, the query's own always among them
  oracle   the k tokens that dense attention looks at most (mean over heads): the limit of what selection can
           hold. It computes the dense attention first, and is slow

All but the oracle know positions alone, so they are the same in every layer. They count from the beginning of
the document: a document is read alike alone or packed with others, at once, in chunks, or token by token.
"""
from typing import NamedTuple

import torch
from torch import Tensor

from indexer import highest, over_rows, visible
from sparse_attn import attention_mass, unpack_latents

SINKS = 4


class Attended(NamedTuple):
    """A layer's arguments of sparse_attention: all that the oracle needs."""
    q: Tensor  # (B, S, H, D), absorbed
    latents: Tensor  # (B, T, D), or (B, T, bytes) uint8
    scale: float
    value_dim: int


# ---- by position: of a query that sees n tokens, number 0 to n - 1, which does slot j of m hold? ----

def recent(j, n, m):
    """The last m: j, n, m int64 that broadcast -> int64, as `sinks` and `strided`."""
    return n - m + j


def sinks(j, n, m, few):
    """The first `few` and the last m - few."""
    return torch.where(j < few, j, n - m + j)


def strided(j, n, m):
    """Evenly spaced, the last among them."""
    return n - 1 - (m - 1 - j) * n // m.clamp(min=1)


# ---- by a score of each token ----

def mix(x):
    """int64 below 2^32 -> the same, thoroughly mixed (the hash lowbias32 of C. Wellons)."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    x = ((x ^ (x >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    return x ^ (x >> 16)


def random(i, n):
    """Score of the token number i for the query that sees n: 24 bits of a hash, exact in float32."""
    return (mix((mix(n) + i) & 0xFFFFFFFF) >> 8).float()


def oracle(attended, rows, seen):
    """Score of each token for the queries `rows`: the share of dense attention that it gets -> (B,rows,T)"""
    latents = attended.latents
    if latents.dtype == torch.uint8:
        latents = unpack_latents(latents, attended.value_dim, torch.float32)
    return attention_mass(attended.q[:, rows], latents, attended.scale, seen)


def best(scores, topk, first, last):
    """The twin of kernels.topk: `indexer.highest` of the scores (B,S,T) between first and last (B,S)."""
    seen = visible(*scores.shape[1:], first, last, slice(None), scores.device)
    return highest(scores.masked_fill(~seen, float("-inf")), topk)


# ---- all of them ----

@torch.no_grad()
def select_as(q, k, w, topk, k_scale, first, last, selector, attended, best=best):
    """`indexer.select` by another of config.SELECTORS -> (B,S,topk) int32: ascending positions of visible
    tokens, then -1 in unused slots.

    Arguments up to `last` as there; of q and k only the shapes count. attended: for the oracle. best: `best`
    or kernels.topk, by which random and the oracle take the highest of their scores; of equal ones the lower
    position. ValueError: topk < 1."""
    if topk < 1:
        raise ValueError(f"index_topk={topk}: select at least one token")
    B, S = q.shape[:2]
    T = k.shape[1]
    if last is None:
        last = torch.arange(T - S, T, device=q.device)[None]  # (1, S)
    if first is None:
        first = torch.zeros_like(last)
    last = last.clamp(max=T - 1).int()
    first = first.clamp(min=0).int()
    n = (last - first + 1).clamp(min=0)[..., None].long()  # (1 or B, S, 1) tokens in sight

    def highest_scores(rows):
        of_rows = first[:, rows], last[:, rows]  # (1 or B, rows) each
        if selector == "oracle":
            seen = visible(S, T, first, last, rows, q.device)  # (1 or B, rows, T)
            scores = oracle(attended, rows, seen)  # (B, rows, T)
        else:
            t = torch.arange(T, device=q.device)
            scores = random(t - first[:, rows, None], n[:, rows])  # (1 or B, rows, T)
        of_rows = [bound.expand(len(scores), -1) for bound in of_rows]
        return (best(scores, topk, *of_rows),)

    if selector in ("random", "oracle"):
        heads = attended.q.shape[2] if selector == "oracle" else 2  # elements of 8 bytes
        indices = over_rows(highest_scores, S, B * T * heads)[0]  # (1 or B, S, topk)
        return indices.expand(B, -1, -1).contiguous()

    j = torch.arange(topk, device=q.device)
    m = n.clamp(max=topk)  # (1 or B, S, 1) slots in use
    if selector == "recent":
        number = recent(j, n, m)  # (1 or B, S, topk)
    elif selector == "sinks":
        number = sinks(j, n, m, min(SINKS, topk // 2))
    else:
        number = strided(j, n, m)
    indices = (first[..., None] + number).masked_fill(j >= m, -1).int()
    return indices.expand(B, -1, -1).contiguous()
