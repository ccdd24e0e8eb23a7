"""Selection in two levels (docs/LONG.md): what its definition says, in plain Python; equal to `select` once
all blocks are candidates; kernels against the reference; caches, decoding, training. (T10): docs/TRAPS.md."""
import pytest
import torch
from torch.library import opcheck

import indexer
import kernels
from tests.common import poison
from tests.test_kernels_index import (
    ALL_CHECKS, CUDA, DEVICE, E4M3, HALF, bounds, integers, rand, same_bits, with_kinds)
from triton_kernels import blocks, index
from triton_kernels.common import full_bounds

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
        first = torch.zeros(B, S, dtype=torch.int32, device=DEVICE)
    if last is None:
        last = torch.arange(T - S, T, device=DEVICE).expand(B, S)
    low = first.clamp(min=0).expand(B, S).tolist()
    high = last.clamp(max=T - 1).expand(B, S).tolist()
    return [list(zip(*row)) for row in zip(low, high)]


def best_of(places, scores, n):
    """The n of these places with the highest scores, of equal ones the lower, as a set."""
    finite = [place for place in places if scores[place] > float("-inf")]
    return set(sorted(finite, key=lambda place: (-scores[place], place))[:n])


def definition(scores, mixed_scores, seen, topk, candidates):
    """`select_by_blocks` of one sequence, read off its docstring: scores and mixed_scores (S,T) as lists,
    seen: (first, last) of each query."""
    rows = []
    for s, (first, last) in enumerate(seen):
        highest = {}
        for n in range(first // BLOCK + 1, (last - RECENT + 1) // BLOCK):
            highest[n] = max(mixed_scores[s][n * BLOCK:(n + 1) * BLOCK])
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


@pytest.mark.parametrize("topk,candidates", [(1, 4), (7, 8), (12, 30), (64, 9)])
@pytest.mark.parametrize("kind,B,S,T", with_kinds(SHAPES))
def test_definition(B, S, T, kind, topk, candidates, monkeypatch):
    """(T10-T12) Every query on its own, with sets and sorted lists; the same in slices."""
    q, k, w, k_scale = inputs(B, S, T)
    first, last = bounds(kind, B, S, T)
    args = (q, k, w, topk, k_scale, first, last, BLOCK, candidates, RECENT)
    got = indexer.select_by_blocks(*args)
    everything = torch.zeros(B, S, device=DEVICE), torch.full((B, S), T, device=DEVICE)
    scores = indexer.index_scores(q, k, w, k_scale, *everything)
    q_mixed, w_mixed = indexer.mixed_heads(q, w)
    mixed_scores = indexer.index_scores(q_mixed, k, w_mixed, k_scale, *everything)
    for b, seen in enumerate(ranges(S, T, first, last, B)):
        assert got[b].tolist() == definition(
            scores[b].tolist(), mixed_scores[b].tolist(), seen, topk, candidates)
    monkeypatch.setattr(indexer, "SLICE", 1000)
    assert torch.equal(indexer.select_by_blocks(*args), got)


# ---- the kernels ----

@pytest.mark.parametrize("dtype", ["e4m3", "half", "float32"])
@pytest.mark.parametrize("B,S,HI,DI", [(2, 7, 3, 32), (1, 1, 8, 64), (1, 33, 1, 40), (1, 5, 64, 128)])
def test_mixed_heads_bits(B, S, HI, DI, dtype):
    """Kernel and reference bit for bit, weights of any size among them; a NaN is not lost."""
    q = rand(B, S, HI, DI)
    w = rand(B, S, HI, seed=1) * torch.logspace(-12, 12, S, device=DEVICE)[:, None]
    w[0, 0] = 0
    w[0, -1, 0] = float("nan")
    w[-1, -2:, -1] = float("inf")
    if dtype == "e4m3":
        q, q_scale = indexer.quantise(q)
        w = w * q_scale[..., 0]
    else:
        q = q.to(HALF if dtype == "half" else torch.float32)
    poison()
    got = blocks.mixed_heads(*index.operands(q, q[:, :, 0], w)[::2])
    want = indexer.mixed_heads(q, w)
    same_bits(got[0].view(q.dtype).float(), want[0].float())
    same_bits(got[1], want[1])
    assert got[0].shape == (B, S, 2, DI)


def test_mixed_heads():
    """The head that can score highest and the sum of the others, but for a power of two of each query; of one
    head, its scores."""
    q = rand(1, 5, 4, 16).float()
    w = rand(1, 5, 4, seed=1).float()
    w[0, 0] = -w[0, 0].abs()
    mixed, signs = indexer.mixed_heads(q, w)
    weighted = w[..., None] * q  # (1, 5, 4, 16)
    head = (w * q.abs().sum(-1)).argmax(-1)  # (1, 5)
    apart = torch.arange(4, device=DEVICE) == head[..., None]  # (1, 5, 4)
    sign = torch.where(w[apart].view(1, 5) < 0, -1.0, 1.0)
    alone = weighted[apart].view(1, 5, 16) * sign[..., None]
    want = torch.stack((alone, weighted.masked_fill(apart[..., None], 0).sum(2)), 2)  # (1, 5, 2, 16)
    factor = want.norm(dim=(2, 3)) / mixed.norm(dim=(2, 3))  # (1, 5)
    assert torch.allclose(mixed * factor[..., None, None], want, rtol=1e-5, atol=1e-6)
    assert torch.allclose(factor.log2(), factor.log2().round(), atol=1e-5)
    assert torch.equal(signs, torch.stack((sign, torch.ones_like(sign)), -1))
    assert sign[0, 0] == -1 and sign.max() == 1

    k = rand(1, 9, 16, seed=2).float()
    everything = torch.zeros(1, 5, device=DEVICE), torch.full((1, 5), 9, device=DEVICE)
    q_mixed, signs = indexer.mixed_heads(q[:, :, :1], w[:, :, :1])
    one = indexer.index_scores(q[:, :, :1], k, w[:, :, :1], None, *everything)
    factor = one.norm(dim=2) / indexer.index_scores(q_mixed, k, signs, None, *everything).norm(dim=2)
    again = indexer.index_scores(q_mixed, k, signs, None, *everything) * factor[..., None]
    assert torch.allclose(again, one, rtol=1e-5, atol=1e-6)


def test_what_one_head_looks_for_is_found():
    """Against what all others look for: their sum with it would score nothing."""
    T = 512
    k = rand(1, T, 32).float()
    needle = k[0, 100]
    q = torch.stack((needle, -0.4 * needle, -0.4 * needle, -0.4 * needle))[None, None]  # (1, 1, 4, 32)
    w = torch.ones(1, 1, 4, device=DEVICE)
    chosen = indexer.select_by_blocks(q, k, w, 4, block=16, candidates=16, recent=16)
    assert 100 in indexer.select(q, k, w, 4) and 100 in chosen


def operation(q, k, w, topk, k_scale, first, last, block, candidates, recent):
    """The kernels, also where kernels.select_by_blocks would select from everything."""
    B, S = q.shape[:2]
    poison()
    return torch.ops.dsa.select_by_blocks(
        q, k, w, topk, k_scale, full_bounds(first, B, S), full_bounds(last, B, S), block, candidates, recent)


SMALL = [(1, 1, 1), (2, 5, 70), (1, 37, 37), (2, 3, 301)]
SMALL += [(1, 300, 3000), (2, 1000, 1000), (1, 70, 20000)] * CUDA


@pytest.mark.parametrize("topk,candidates,block,dtype", [
    (1, 4, 4, "float32"), (7, 8, 4, "half"), (12, 30, 2, "e4m3"), (64, 40, 16, "e4m3"), (9, 64, 64, "e4m3"),
    (9, 5, 1, "e4m3")])
@pytest.mark.parametrize("kind,B,S,T", with_kinds(SMALL))
def test_kernels_are_the_reference(B, S, T, kind, topk, candidates, block, dtype):
    """(T10-T12) The same tokens, whatever the block, the bounds."""
    q, k, w, k_scale = inputs(B, S, T, dtype=dtype)
    first, last = bounds(kind, B, S, T)
    got = operation(q, k, w, topk, k_scale, first, last, block, candidates, RECENT)
    want = indexer.select_by_blocks(q, k, w, topk, k_scale, first, last, block, candidates, RECENT)
    assert got.dtype == torch.int32 and torch.equal(got, want)


def test_kernels_of_wide_heads():
    q, k, w, k_scale = inputs(1, 37, 80, 64, 128)
    got = operation(q, k, w, 9, k_scale, None, None, 4, 12, RECENT)
    want = indexer.select_by_blocks(q, k, w, 9, k_scale, None, None, 4, 12, RECENT)
    assert torch.equal(got, want)


@pytest.mark.parametrize("kind", ["causal", "holes"])
def test_kernels_in_chunks(kind, monkeypatch):
    """More than one chunk over queries and over the batch."""
    q, k, w, k_scale = inputs(3, 30, 60)
    first, last = bounds(kind, 3, 30, 60)
    monkeypatch.setattr(index, "SELECT_CHUNK", 800)
    monkeypatch.setattr(index, "CHUNK_QUERIES", 8)
    assert len({part[0].start for part in index.chunks(3, 30, 47)}) == 2  # 32 slots, 15 blocks
    got = operation(q, k, w, 9, k_scale, first, last, 4, 8, RECENT)
    want = indexer.select_by_blocks(q, k, w, 9, k_scale, first, last, 4, 8, RECENT)
    assert torch.equal(got, want)


# ---- what it must be equal to ----

@pytest.mark.parametrize("kind", ["causal", "packed", "cache", "holes", "beyond"])
@pytest.mark.parametrize("path", ["reference", "operation", "kernels"])
def test_all_blocks_are_select(path, kind):
    """With as many candidates as tokens it is `select`, bit for bit: random numbers, huge and tiny ones."""
    B, S, T = (1, 41, 41) if kind == "packed" else (1, 11, 41)
    q = rand(B, S, 3, 16) * torch.logspace(-15, 15, S, device=DEVICE)[:, None, None]
    k = rand(B, T, 16, seed=1)
    w = rand(B, S, 3, seed=2)
    first, last = bounds(kind, B, S, T)
    if path == "reference":
        got = indexer.select_by_blocks(q, k, w, 6, None, first, last, BLOCK, T, 1)
    elif path == "kernels":
        got = kernels.select_by_blocks(q, k, w, 6, None, first, last, BLOCK, T, 1)
    else:
        got = operation(q, k, w, 6, None, first, last, BLOCK, T, 1)
    chosen = indexer if path == "reference" else kernels
    assert torch.equal(got, chosen.select(q, k, w, 6, None, first, last))


def test_few_candidates_are_not_select():
    """It does leave something out: these inputs tell the two apart."""
    q, k, w, k_scale = inputs(1, 75, 75)
    args = (q, k, w, 7, k_scale, None, None)
    got = indexer.select_by_blocks(*args, BLOCK, 8, RECENT)
    assert not torch.equal(got, indexer.select(*args))


@pytest.mark.parametrize("path", ["reference", "operation"])
def test_needles(path):
    """One key that all heads look for, among random ones: found wherever it is, in a sixteenth of the
    context."""
    B, S, T = 1, 60, 1024
    k = torch.randn(B, T, 32, device=DEVICE)
    q = torch.randn(B, S, 4, 32, device=DEVICE)
    needle = torch.arange(20, 20 + 14 * S, 14, device=DEVICE)  # of each query
    q += k[:, needle, None]
    w = torch.ones(B, S, 4, device=DEVICE)
    last = torch.full((B, S), T - 1, dtype=torch.int32, device=DEVICE)
    args = (q, k, w, 8, None, None, last, 16, 64, RECENT)
    got = indexer.select_by_blocks(*args) if path == "reference" else operation(*args)
    assert (got == needle[:, None]).any(-1).float().mean() > 0.95


@pytest.mark.parametrize("path", ["reference", "operation"])
def test_not_finite(path):
    """A token whose key is NaN ranks first, and its block with it, for those that see it; a query that is NaN
    selects for itself alone."""
    q = integers(1, 40, 3, 16)
    k = integers(1, 40, 16, seed=1)
    w = integers(1, 40, 3, seed=2).abs() + 1
    k[0, 9, 3] = float("nan")
    q[0, 30, 1, 2] = float("nan")
    args = (q, k, w, 5, None, None, None)
    if path == "reference":
        got = indexer.select_by_blocks(*args, BLOCK, 4, RECENT)
    else:
        got = operation(*args, BLOCK, 4, RECENT)
    assert (got[0, 9:] == 9).sum(-1).eq(1)[torch.arange(31, device=DEVICE) != 21].all()
    assert (got[0, :9] != 9).all()
    assert got[0, 30].tolist() == [0, 1, 2, 3, 4]  # all NaN: the lowest candidates
    clean = integers(1, 40, 3, 16), integers(1, 40, 16, seed=1), w
    others = indexer.select_by_blocks(*clean, 5, None, None, None, BLOCK, 4, RECENT)
    assert torch.equal(got[0, :9], others[0, :9])


@pytest.mark.parametrize("path", ["reference", "operation"])
def test_no_query_sees_the_future_or_another_document(path):
    """(T10) Other keys behind a query, or of other documents, and other queries change nothing."""
    q, k, w, k_scale = inputs(1, 45, 75)
    first, last = [x[:, 30:] for x in bounds("packed", 1, 75, 75)]  # of the queries from 30 on

    def run(q, k):
        if path == "reference":
            return indexer.select_by_blocks(q, k, w, 5, k_scale, first, last, BLOCK, 8, RECENT)
        return operation(q, k, w, 5, k_scale, first, last, BLOCK, 8, RECENT)

    got = run(q, k)
    other_q, other_k, _, _ = inputs(1, 45, 75)
    other_q[:, 61 - 30:] = 2.0
    other_k[:, 61:] = 7.0
    assert torch.equal(run(other_q, other_k)[:, :61 - 30], got[:, :61 - 30])
    other_k = k.clone()
    other_k[:, :37] = 7.0
    assert torch.equal(run(q, other_k)[:, 37 - 30:], got[:, 37 - 30:])


def test_rows_agree_whatever_runs_beside_them():
    """One query at a time, of a cache longer than what it holds: decoding finds what one forward over all
    queries finds."""
    q, k, w, k_scale = inputs(2, 60, 60)
    whole = indexer.select_by_blocks(q, k, w, 5, k_scale, None, None, BLOCK, 8, RECENT)
    for t in (0, 9, 30, 59):
        last = torch.full((2, 1), t, dtype=torch.int32, device=DEVICE)
        one = slice(t, t + 1)
        keys = k.clone()
        keys[:, t + 1:] = 7.0  # what the cache held before
        args = (keys, w[:, one], 5, k_scale, None, last, BLOCK, 8, RECENT)
        assert torch.equal(indexer.select_by_blocks(q[:, one], *args), whole[:, one])
        assert torch.equal(kernels.select_by_blocks(q[:, one], *args), whole[:, one])


def test_bad_input():
    q, k, w, k_scale = inputs(1, 5, 9)
    for module in (indexer, kernels):
        for message, topk, options in (
                ("index_topk=0", 0, {}), ("block=0", 1, dict(block=0)), ("block=12", 1, dict(block=12)),
                ("block=128", 1, dict(block=128)), ("recent=0", 1, dict(recent=0)),
                ("candidates=-1", 1, dict(candidates=-1))):
            with pytest.raises(ValueError, match=message):
                module.select_by_blocks(q, k, w, topk, k_scale, **options)
    with pytest.raises(ValueError, match="should be"):
        kernels.select_by_blocks(q, k, w[:, :1], 1, k_scale, block=4, candidates=1, recent=1)


def test_nothing_to_select_from():
    q, k, w, k_scale = inputs(1, 5, 9)
    for module in (indexer, kernels):
        empty = module.select_by_blocks(q, k[:, :0], w, 3, k_scale[:, :0])
        assert empty.shape == (1, 5, 3) and (empty == -1).all()
        assert module.select_by_blocks(q[:, :0], k, w[:, :0], 3, k_scale).shape == (1, 0, 3)


@pytest.mark.parametrize("bounded", [False, True])
def test_registration(bounded):
    """torch.library's own checks: schema, fake results, tracing."""
    q, k, w, k_scale = inputs(2, 3, 40, dtype="half" if bounded else "e4m3")
    between = bounds("holes", 2, 3, 40) if bounded else (None, None)
    checks = ALL_CHECKS if bounded else ALL_CHECKS[1:]
    args = (q, k, w, 5, k_scale, *between, BLOCK, 8, RECENT)
    opcheck(torch.ops.dsa.select_by_blocks.default, args, test_utils=checks)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
def test_cuda_graph_decode():
    """Captured once, replayed with another cache length."""
    q, k, w, k_scale = inputs(2, 1, 9000, 8, 64)
    last = torch.full((2, 1), 3000, device=DEVICE, dtype=torch.int32)
    args = (q, k, w, 64, k_scale, None, last, 16, 512, 256)
    kernels.select_by_blocks(*args)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.select_by_blocks(*args)
    for length in (10, 3000, 9000):
        last.fill_(length - 1)
        graph.replay()
        assert torch.equal(got, indexer.select_by_blocks(*args))
