"""Selection in two levels (docs/LONG.md): what its definition says, in plain Python; equal to `select` once
all blocks are candidates; kernels against the reference; caches, decoding, training. (T10): docs/TRAPS.md."""
import pytest
import torch

import indexer
from tests.test_kernels_index import DEVICE, E4M3, HALF, bounds, integers, rand, with_kinds

BLOCK = 4
RECENT = 10


def inputs(B, S, T, HI=3, DI=16, dtype="e4m3"):
    """q, k, w and k_scale of small integers: every sum is exact, ties abound."""
    q = integers(B, S, HI, DI)
    k = integers(B, T, DI, seed=1)
    w = integers(B, S, HI, seed=2)
    if dtype != "e4m3":
        cast = HALF if dtype == "half" else torch.float32
        return q.to(cast), k.to(cast), w, None
    return q.to(E4M3), k.to(E4M3), w, 2.0 ** integers(B, T, low=-2, high=3, seed=3)


def ranges(S, T, first, last, B):
    """What each query sees, as lists of (first, last)."""
    if first is None:
        first = torch.zeros(B, S, dtype=torch.int32)
    if last is None:
        last = torch.arange(T - S, T).expand(B, S)
    low = first.clamp(min=0).expand(B, S).tolist()
    high = last.clamp(max=T - 1).expand(B, S).tolist()
    return [list(zip(*row)) for row in zip(low, high)]


def best_of(places, scores, n):
    """The n of these places with the highest scores, of equal ones the lower, as a set."""
    finite = [place for place in places if scores[place] > float("-inf")]
    return set(sorted(finite, key=lambda place: (-scores[place], place))[:n])


def definition(scores, block_scores, seen, topk, candidates, tile):
    """`select_by_blocks` of one sequence, read off its docstring: scores (S,T) and block_scores (S,N) as
    lists, seen: (first, last) of each query."""
    rows = []
    for s, (first, last) in enumerate(seen):
        shared = seen[s // tile * tile:s // tile * tile + tile]
        highest = {}
        for i, (low, high) in enumerate(shared, s // tile * tile):
            for n, score in enumerate(block_scores[i]):
                if low // BLOCK < n and (n + 1) * BLOCK <= (high - RECENT + 1) // BLOCK * BLOCK:
                    highest[n] = max(score, highest.get(n, score))
        best = best_of(highest, highest, -(-candidates // BLOCK))
        tokens = []
        for t in range(max(first, 0), last + 1):
            n = t // BLOCK
            forced = n == first // BLOCK or n >= (last - RECENT + 1) // BLOCK
            if forced or n in best:
                tokens.append(t)
        chosen = sorted(best_of(tokens, scores[s], topk))
        rows.append(chosen + [-1] * (topk - len(chosen)))
    return rows


SHAPES = [(1, 1, 1), (2, 5, 70), (1, 75, 75), (2, 3, 301), (1, 100, 100)]  # B, S, T


@pytest.mark.parametrize("tile", [1, 4])
@pytest.mark.parametrize("topk,candidates", [(1, 4), (7, 8), (12, 30), (64, 9)])
@pytest.mark.parametrize("kind,B,S,T", with_kinds(SHAPES))
def test_definition(B, S, T, kind, topk, candidates, tile, monkeypatch):
    """(T10-T12) Every query on its own, with sets and sorted lists; the same in slices."""
    q, k, w, k_scale = inputs(B, S, T)
    first, last = bounds(kind, B, S, T)
    k_blocks, block_scale = indexer.block_keys(k, k_scale, BLOCK)
    args = (q, k, w, topk, k_scale, first, last, None, None, BLOCK, candidates, RECENT, tile)
    got = indexer.select_by_blocks(*args)
    everything = torch.zeros(B, S, dtype=torch.int32), torch.full((B, S), T)
    scores = indexer.index_scores(q, k, w, k_scale, *everything)
    block_scores = indexer.index_scores(q, k_blocks, w, block_scale, *everything)
    for b, seen in enumerate(ranges(S, T, first, last, B)):
        assert got[b].tolist() == definition(
            scores[b].tolist(), block_scores[b].tolist(), seen, topk, candidates, tile)
    monkeypatch.setattr(indexer, "SLICE", 1000)
    assert torch.equal(indexer.select_by_blocks(*args), got)
