"""quantise, index_scores, select and topk (kernels.py) against indexer.py: bits, errors, positions; numbers
that are not finite; the filter's statistics; registration with torch.library.

Runs on the GPU (bf16, real shapes too) or through Triton's interpreter (fp16 and fp32, small shapes).
"""
import math

import pytest
import torch
from torch.library import opcheck

import indexer as reference
import kernels
from tests.common import ROW_FLOOR, assert_close, poison
from triton_kernels import index
from triton_kernels.common import has_fp8

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bf16 wrongly
FLOATS = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA
E4M3 = torch.float8_e4m3fn
INF = float("inf")
NAN = float("nan")
FILTER_ALL = index.FilterRegime(
    pairs=1, keys=1, keys_per_topk=0, most_keys=2**20, most_topk=2048, most_heads=2**10)

# Errors of scores. Products of 8-bit and of 16-bit floats are exact in float32, sums are rounded to 2^-24;
# the some 200 roundings of a score add like a random walk, and it is a few times smaller than what it sums.
# The accumulator of Hopper's FP8 tensor cores has 13 bits of mantissa and is cut, not rounded: by half a unit
# in each of up to 4 steps of 32 dimensions. A row is measured against at least ROW_FLOOR of the mean row.
FLOAT_ERROR = 2e-6  # 33 * 2^-24
E4M3_ERROR = 4 * 2**-13 / 2 if CUDA else FLOAT_ERROR

QUIET = pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")  # numpy, where NaN is the point

if not CUDA:
    torch.set_num_threads(1)


def rand(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def integers(*shape, low=-3, high=4, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def positions(values):
    return torch.tensor(values, device=DEVICE, dtype=torch.int32)


def bounds(kind, B, S, T):
    """first, last (B,S) int32"""
    i = torch.arange(S, device=DEVICE, dtype=torch.int32).expand(B, S)
    if kind == "causal":
        return None, None
    if kind == "packed":  # documents of unequal length, S == T
        return (i // 37 * 37).contiguous(), i.contiguous()
    if kind == "cache":  # a cache longer than what it holds, different in each row
        length = positions([T // 2 + 3 * b for b in range(B)])
        return None, (length[:, None] - S + i).contiguous()
    if kind == "beyond":  # before the first key and behind the last
        return (i % 3 - 7).contiguous(), (T + 5 - 2 * i).contiguous()
    last = (T - S + i).clone()
    last[:, ::3] = -1  # nothing visible in every third row
    return (i % 5).contiguous(), last


def with_kinds(shapes):
    """Shapes (B,S,T,...) behind each kind of `bounds` that they can have."""
    cases = []
    for kind in ("causal", "cache", "holes", "beyond", "packed"):
        for shape in shapes:
            if kind != "packed" or shape[1] == shape[2]:
                cases.append((kind, *shape))
    return cases


def same_bits(got, want):
    """The same bits, NaN in the same places (its bits vary between processors)."""
    assert got.shape == want.shape and got.dtype == want.dtype
    integer = torch.uint8 if got.dtype == E4M3 else torch.int32
    nan = want.float().isnan()
    assert torch.equal(got.float().isnan(), nan)
    assert torch.equal(got.view(integer)[~nan], want.view(integer)[~nan])


def repeats(function, *args):
    """On a GPU, where programs run in any order: the result twice, the same bits. -> the result"""
    poison()
    got = function(*args)
    if CUDA:
        same_bits(got, function(*args))
    return got


# ---- quantise ----

@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize(
    "shape", [(1, 1, 128), (3, 7, 5, 64), (33, 32), (2, 5, 512), (9, 16)] + [(2, 4096, 64, 128)] * CUDA)
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantise_bits(shape, dtype, rotate, ue8m0):
    """(T8) bit for bit, from zeros and -0.0 over all magnitudes"""
    size = torch.logspace(-7, 4, shape[0] * shape[1], device=DEVICE).clamp(max=3e3)
    x = rand(*shape) * size.view(shape[0], shape[1], *[1] * (len(shape) - 2))
    x.view(-1, shape[-1])[0] = 0
    x.view(-1)[-3:] = -0.0
    x = x.to(dtype)
    poison()
    got = kernels.quantise(x, rotate=rotate, ue8m0=ue8m0)
    want = reference.quantise(x, rotate=rotate, ue8m0=ue8m0)
    for a, b in zip(got, want):
        assert not b.float().isnan().any()
        same_bits(a, b)


def test_quantise_every_value():
    """all e4m3 codes, all midpoints between them and their neighbours: round to nearest even"""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(E4M3).float()
    middle = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, middle, middle * (1 + 2**-20), middle * (1 - 2**-20)))
    x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (0, 1), value=448.0).to(DEVICE)  # scale 1
    assert torch.equal(kernels.quantise(x)[0].view(torch.uint8), reference.quantise(x)[0].view(torch.uint8))


def test_quantise_wide_and_odd():
    x = rand(6, 300)
    for got, want in zip(kernels.quantise(x), reference.quantise(x)):
        same_bits(got, want)
    with pytest.raises(ValueError, match="300"):
        kernels.quantise(x, rotate=True)
    with pytest.raises(ValueError, match="block=96"):
        kernels.quantise(x, 96)


@QUIET
@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("rotate,width", [(True, 64), (False, 64), (False, 300)])
@pytest.mark.parametrize("dtype", FLOATS)
def test_quantise_not_finite(dtype, rotate, width, ue8m0):
    """a block that holds an infinity or a NaN is NaN, values and scale; the other blocks keep their bits"""
    x = rand(12, width)
    for row, value in enumerate((INF, -INF, NAN, -NAN)):
        x[2 * row, row * 7] = value
    x[9, -1] = NAN
    x[10] = INF
    x[11] = 6e4  # rotated, beyond fp16
    x = x.to(dtype)
    got = kernels.quantise(x, rotate=rotate, ue8m0=ue8m0)
    want = reference.quantise(x, rotate=rotate, ue8m0=ue8m0)
    assert 6 <= want[1].isnan().sum() < want[1].numel()
    for a, b in zip(got, want):
        same_bits(a, b)


# ---- index_scores ----

def scores_close(got, want, error):
    """Relative error of the whole tensor, and of its worst row."""
    assert_close(got, want, error, error / ROW_FLOOR)


SHAPES = [  # B, S, T, HI, DI
    (1, 1, 1, 1, 16), (2, 5, 70, 3, 32), (1, 33, 33, 8, 64), (2, 3, 300, 64, 128), (1, 130, 197, 12, 40),
    (3, 1, 300, 4, 64)]
SHAPES += [
    (2, 500, 3000, 64, 128), (1, 1000, 1000, 4, 32), (3, 2, 5001, 16, 64), (5, 1, 5001, 64, 128),
    (2, 1, 8192, 64, 128), (9, 1, 4096, 4, 64)] * CUDA


def score_inputs(B, S, T, HI, DI, dtype):
    """q, k, w and k_scale of random numbers"""
    q = rand(B, S, HI, DI)
    k = rand(B, T, DI, seed=1)
    w = rand(B, S, HI, seed=2)
    if dtype != "e4m3":
        cast = HALF if dtype == "half" else torch.float32
        return q.to(cast), k.to(cast), w, None
    q, q_scale = reference.quantise(q)
    k, k_scale = reference.quantise(k)
    return q, k, w * q_scale[..., 0], k_scale[..., 0]


@pytest.mark.parametrize("kind,B,S,T,HI,DI", with_kinds(SHAPES))
@pytest.mark.parametrize("dtype", ["e4m3", "half", "float32"])
def test_scores(B, S, T, HI, DI, dtype, kind):
    """(T5, T7, T10) head counts and widths that are no powers of two, every kind of bounds"""
    q, k, w, k_scale = score_inputs(B, S, T, HI, DI, dtype)
    args = q, k, w, k_scale, *bounds(kind, B, S, T)
    got = repeats(kernels.index_scores, *args)
    scores_close(got, reference.index_scores(*args), E4M3_ERROR if dtype == "e4m3" else FLOAT_ERROR)


def test_scores_strided_cache():
    """keys as a view of a longer cache"""
    cache = rand(2, 90, 2, 32).to(HALF)
    q = rand(2, 4, 4, 32).to(HALF)
    w = rand(2, 4, 4)
    k = cache[:, 3:64, 1]
    scores_close(kernels.index_scores(q, k, w), reference.index_scores(q, k, w), FLOAT_ERROR)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_scores_magnitudes(scale):
    q = rand(1, 9, 4, 32) * scale
    k = rand(1, 50, 32, seed=1) * scale
    w = rand(1, 9, 4, seed=2)
    scores_close(kernels.index_scores(q, k, w), reference.index_scores(q, k, w), FLOAT_ERROR)


def test_scores_without_fp8_products():
    """e4m3 as bytes, decoded to fp16 in the kernels: what a GPU below sm_89 runs"""
    q, k, w, k_scale = score_inputs(2, 7, 90, 3, 40, "e4m3")
    as_bytes = q.view(torch.uint8), k.view(torch.uint8), w, k_scale, None, None
    scores = torch.full((2, 7, 90), NAN, device=DEVICE)
    index.launch_scores(scores, *as_bytes, 0, 7, fill=True)
    scores_close(scores, reference.index_scores(q, k, w, k_scale), FLOAT_ERROR)
    for way in (index.select_exact, index.select_filtered):
        got = torch.empty(2, 7, 20, dtype=torch.int32, device=DEVICE)
        left_over = way(got, *as_bytes)
        assert left_over is None or not left_over.any()
        assert torch.equal(got, reference.select(q, k, w, 20, k_scale))


def not_finite(HI, dtype):
    """Inputs (2,6,70,HI,32) with NaN and, where the dtype has them, infinities, in q, k, w and k_scale."""
    q, k, w, k_scale = score_inputs(2, 6, 70, HI, 32, "float32")
    q[0, 1, 0, 3] = NAN
    k[0, 11, 31] = NAN
    k[1, 64] = NAN
    w[0, 2, HI - 1] = NAN
    if dtype == "e4m3":
        q, q_scale = reference.quantise(q)
        k, k_scale = reference.quantise(k)
        k_scale = k_scale[..., 0].clone()
        k_scale[1, 33] = NAN
        k_scale[0, 40] = INF
        return q, k, w * q_scale[..., 0], k_scale
    k[1, 5, 8] = INF
    k[1, 6, 9] = -INF
    q[1, 4, HI - 1, 30] = INF
    w[1, 5, 0] = -INF
    cast = HALF if dtype == "half" else torch.float32
    return q.to(cast), k.to(cast), w, None


@QUIET
@pytest.mark.parametrize("HI", [3, 4])
@pytest.mark.parametrize("dtype", ["e4m3", "half", "float32"])
def test_scores_not_finite(HI, dtype):
    """NaN and infinities stand where the reference has them: relu drops no NaN, and heads that only fill a
    tile (the fourth of three) add none"""
    args = not_finite(HI, dtype)
    want = reference.index_scores(*args)
    assert want.isnan().any() and (dtype == "e4m3" or (want == INF).any())
    scores_close(repeats(kernels.index_scores, *args), want, E4M3_ERROR if dtype == "e4m3" else FLOAT_ERROR)


# ---- topk ----

def select_from(scores, topk, first=None, last=None):
    """What `topk` should give, by a stable sort."""
    S, T = scores.shape[1:]
    seen = reference.visible(S, T, first, last, slice(None), DEVICE)
    scores = scores.masked_fill(scores.isnan(), NAN)  # CUDA sorts other ones by their bits
    best, position = scores.masked_fill(~seen, -INF).sort(dim=-1, descending=True, stable=True)
    want = position[..., :topk].masked_fill(best[..., :topk] == -INF, T).sort(-1).values
    want = want.masked_fill(want == T, -1).int()
    return torch.nn.functional.pad(want, (0, max(0, topk - T)), value=-1)


def misled(R, T):
    """-1 wherever the kernel takes its sample, 0 elsewhere, but for 20 higher scores at the end: no guess by
    the sample is any good"""
    x = torch.zeros(R, T, device=DEVICE)
    runs = index.topk_tiles(T, 1, R, x.device).sample // 8
    run = torch.arange(runs, device=DEVICE)
    start = (((run * 8 + run * 5 % 8) * ((T - 16) / (runs * 8))).int() + 7) // 8 * 8
    x[:, (start[:, None] + torch.arange(8, device=DEVICE)).clamp(0, T - 1)] = -1.0
    free = (x[0] == 0).nonzero()[-20:, 0]
    x[:, free] = rand(R, len(free)).abs() + 0.1
    return x


def sprinkled(x, share, values):
    """x with random `values`, in turn, in a share of its elements."""
    where = rand(*x.shape, seed=7).sigmoid().argsort(-1).argsort(-1) < share * x.shape[-1]
    value = torch.tensor(values, device=DEVICE)[torch.arange(x.shape[-1], device=DEVICE) % len(values)]
    return torch.where(where, value, x)


ROWS = (
    "normal", "equal", "zeros", "zeros of both signs", "rising", "falling", "few values", "clustered", "end",
    "huge and tiny", "negative", "negative zeros", "a misleading sample", "one peak",
    "few NaN", "half NaN", "only NaN", "infinities", "mostly -inf")


def rows(kind, R, T):
    """(1,R,T) scores of a kind of ROWS"""
    i = torch.arange(T, device=DEVICE).float()
    x = rand(R, T)
    return {
        "normal": x,
        "equal": x * 0 + 3.5,
        "zeros": x.clamp(min=0),
        "zeros of both signs": torch.where(x < 0.8, x.sign() * 0.0, x),
        "rising": i + x * 0,
        "falling": -i + x * 0,
        "few values": (x * 2).round(),
        "clustered": torch.where((i > T * 0.4) & (i < T * 0.55), x + 50, x),
        "end": torch.where(i > T - T // 16, x + 1e30, x * 1e-30),
        "huge and tiny": x * 10.0 ** (rand(R, T, seed=5) * 12).clamp(-37, 37),
        "negative": -x.abs() - 1,
        "negative zeros": -x.clamp(min=0),
        "a misleading sample": misled(R, T),
        "one peak": torch.where(i == T // 3, 1.0, x * 0),
        "few NaN": sprinkled(x, 0.004, (NAN, -NAN)),
        "half NaN": sprinkled(x, 0.5, (NAN, -NAN, INF, -INF)),
        "only NaN": x * NAN,
        "infinities": sprinkled(x, 0.3, (INF, -INF)),
        "mostly -inf": sprinkled(x, 0.998, (-INF,)),
    }[kind][None]


LENGTHS = [  # T, topk
    (500, 64), (2049, 1), (4096, 64), (8192, 8000), (9001, 100), (20000, 2048), (33003, 500)]
LENGTHS += [
    (32768, 2048), (32768, 512), (131072, 2048), (300001, 2048), (40000, 5000), (100000, 20000)] * CUDA


@QUIET
@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("T,topk", LENGTHS)
def test_topk_rows(T, topk, kind):
    """(T12) ties to the lower position, -0.0 as 0.0, NaN first, -inf never: rows that are their own
    candidates, rows whose candidates are gathered, and rows in which several programs look for them"""
    R = 6 if CUDA else 2
    x = rows(kind, R, T)
    first = positions([0, 17, 130, 0, 5, 0][:R])[None]
    last = positions([T - 1, T - 1, T - 300, topk, T // 2, topk + topk // 2][:R])[None]
    assert torch.equal(repeats(kernels.topk, x, topk, first, last), select_from(x, topk, first, last))


def gathers(monkeypatch, x, topk, first=None):
    """How often `topk` of a row x (1,1,T) gathered candidates, after a look at what it selects. Counted in
    the interpreter; None on a GPU."""
    calls = []
    gather = index.gather

    def count(*args, **kwargs):
        calls.append(1)
        return gather(*args, **kwargs)

    with monkeypatch.context() as patch:
        if not CUDA:
            patch.setattr(index, "gather", count)
        assert torch.equal(kernels.topk(x, topk, first), select_from(x, topk, first))
    return None if CUDA else len(calls)


@pytest.mark.parametrize("shift,tries", [(0.0, 4), (1.0, 35)])
def test_topk_bisects(monkeypatch, shift, tries):
    """a misleading sample, and a K-th value which is 0, tried fourth, or 1, found by bisection"""
    assert gathers(monkeypatch, misled(1, 4096)[None] + shift, 64) in (tries, None)


@pytest.mark.parametrize("T,topk,cap", [(4096, 64, 1024), (16384, 1024, 2048), (8192, 2048, 4096)])
def test_topk_many_rows(monkeypatch, T, topk, cap):
    """the tiles of many rows, and several rows for each program"""
    monkeypatch.setattr(index, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(index, "REGISTERS", 2**14)
    R = 12
    tiles = index.topk_tiles(T, topk, R, torch.device(DEVICE))
    assert tiles.cap == cap and tiles.num_warps <= 4 and tiles.programs <= R // 2
    x = torch.cat([rows(kind, 3, T) for kind in ("normal", "zeros", "few NaN", "one peak")], 1)
    last = positions([T - 1, T // 2, T - 9] * 4)[None]
    got = repeats(kernels.topk, x, topk, None, last)
    assert torch.equal(got, select_from(x, topk, None, last))


@pytest.mark.parametrize("positive", [2000, 2550, 3000])
def test_topk_too_many_ties(positive):
    """what exceeds the tied threshold and K ties are more than fit: the row is gathered again, without the
    ties that are not needed"""
    T, K = 9001, 2500
    assert index.topk_tiles(T, K, 1, torch.device(DEVICE)).cap < positive + K
    x = torch.zeros(1, 1, T, device=DEVICE)
    x[0, 0, rand(T).argsort()[:positive]] = rand(positive, seed=1).abs() + 0.01
    assert torch.equal(kernels.topk(x, K), select_from(x, K))


@pytest.mark.skipif(CUDA, reason="counts calls within the interpreter")
@pytest.mark.parametrize("kind", ["normal", "zeros", "negative zeros", "one peak", "few NaN", "only NaN"])
def test_topk_reads_a_row_once(monkeypatch, kind):
    """also where its K-th value is one of very many zeros, as of queries whose indexer weights are all
    negative"""
    assert gathers(monkeypatch, rows(kind, 1, 4096), 256) == 1


@pytest.mark.skipif(CUDA, reason="counts calls within the interpreter")
@pytest.mark.parametrize("kind,tied", [
    ("normal", False), ("rising", False), ("clustered", False), ("end", True), ("one peak", True)])
def test_topk_in_sections(monkeypatch, kind, tied):
    """the sections of a long row are read once each, twice where its K-th value is tied, and the row by
    nobody else"""
    T = 70000
    sections = index.topk_tiles(T, 512, 1, torch.device(DEVICE)).sections
    assert sections > 1
    assert gathers(monkeypatch, rows(kind, 1, T), 512) == (2 * sections if tied else sections)


@pytest.mark.skipif(CUDA, reason="counts calls within the interpreter")
@pytest.mark.parametrize("period", [16, 32, 64, 128, 4096])
def test_topk_samples_all_of_a_row(monkeypatch, period):
    """scores with a pattern, at any distance of memory's own runs; and nothing before `first`"""
    x = rows("normal", 1, 4096)
    for phase in range(0, min(period, 64), 8):
        low = x.clone().view(1, 1, -1, period)
        low[..., phase:phase + 8] -= 10
        assert gathers(monkeypatch, low.view(1, 1, 4096), 256) <= 2
    for start in (1, 7, 8):
        x[..., :start] = 1e9
        assert gathers(monkeypatch, x, 8, positions([start])[None]) == 1


def test_nan_stays_inside():
    """NaN ranks first, and a bad score does not become a bad address"""
    x = rand(1, 4, 9000)
    x[0, 1] = NAN
    x[0, 2, ::2] = NAN
    x[0, 3, :8999] = NAN
    got = kernels.topk(x, 500)
    assert torch.equal(got, select_from(x, 500))
    assert got.min() >= 0 and got.max() < 9000


@pytest.mark.parametrize("T", [1000, 3000, 40000])
def test_bounds_far_beyond_the_keys(T):
    """as far as an int32 goes: nothing wraps into what is visible"""
    least, most = -2**31, 2**31 - 1
    first = positions([5, least, most, 0])[None]
    last = positions([least, most, most, least])[None]
    x = rows("normal", 4, T)
    for R in (1, 4):
        args = x[:, :R], 64, first[:, :R], last[:, :R]
        assert torch.equal(kernels.topk(*args), select_from(*args))


# ---- select ----

SELECTED = [(1, 1, 1, 1, 16), (2, 5, 70, 3, 32), (1, 75, 75, 4, 64), (2, 3, 300, 16, 32)]  # B, S, T, HI, DI
SELECTED += [
    (2, 300, 3000, 64, 128), (1, 2000, 2000, 4, 32), (3, 2, 70001, 16, 64), (1, 64, 20000, 8, 32)] * CUDA


@pytest.mark.parametrize("topk", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind,B,S,T,HI,DI", with_kinds(SELECTED))
def test_select_index_equal(B, S, T, HI, DI, kind, topk):
    """(T10-T12) integers: every sum is exact, ties abound"""
    q = integers(B, S, HI, DI).to(E4M3)
    k = integers(B, T, DI, seed=1).to(E4M3)
    w = integers(B, S, HI, seed=2)
    k_scale = 2.0 ** integers(B, T, low=-2, high=3, seed=3)
    args = q, k, w, topk, k_scale, *bounds(kind, B, S, T)
    got = repeats(kernels.select, *args)
    assert got.dtype == torch.int32 and torch.equal(got, reference.select(*args))


def test_select_chunks(monkeypatch):
    """more than one chunk over queries and over the batch"""
    q = integers(3, 40, 4, 16).to(HALF)
    k = integers(3, 40, 16, seed=1).to(HALF)
    w = integers(3, 40, 4, seed=2)
    monkeypatch.setattr(index, "SELECT_CHUNK", 600)
    assert len(list(index.chunks(3, 40, 48))) > 3
    assert torch.equal(kernels.select(q, k, w, 8), reference.select(q, k, w, 8))


FILTERED = [  # kind, B, S, T, HI, topk, dtype
    ("causal", 1, 45, 45, 4, 7, "e4m3"), ("packed", 1, 50, 50, 8, 9, "half"),
    ("cache", 2, 12, 701, 3, 30, "e4m3"), ("holes", 1, 20, 500, 8, 20, "float32"),
    ("beyond", 1, 20, 500, 4, 20, "half"), ("causal", 1, 20, 20, 4, 64, "e4m3"),
    ("causal", 1, 6, 300, 64, 16, "half")]
FILTERED += [
    ("causal", 2, 300, 20001, 8, 512, "e4m3"), ("packed", 1, 12000, 12000, 4, 1024, "half"),
    ("holes", 1, 300, 9000, 64, 2048, "e4m3"), ("causal", 1, 64, 300001, 8, 100, "half"),
    ("cache", 200, 1, 9000, 4, 1024, "e4m3")] * CUDA


def filtered(monkeypatch, *args):
    """select by the filter, whatever the shapes -> selection, how many rows were left over for the path with
    scores"""
    left = []
    select_filtered = index.select_filtered

    def count(*a):
        left_over = select_filtered(*a)
        left.append(int(left_over.sum()))
        return left_over

    with monkeypatch.context() as patch:
        patch.setattr(index, "SELECT_FILTER", FILTER_ALL)
        patch.setattr(index, "select_filtered", count)
        got = kernels.select(*args)
    return got, left[0]


def cast(x, dtype):
    return x.to({"e4m3": E4M3, "half": HALF, "float32": torch.float32}[dtype])


@pytest.mark.parametrize("ties", ["some", "at zero", "all"])
@pytest.mark.parametrize("kind,B,S,T,HI,topk,dtype", FILTERED)
def test_select_filtered(monkeypatch, kind, B, S, T, HI, topk, dtype, ties):
    q = integers(B, S, HI, 32)
    k = integers(B, T, 32, seed=1)
    w = integers(B, S, HI, seed=2)
    if ties == "at zero":  # the K-th value; in two rows of three a few are above it
        w = -w.abs()
        w[:, ::3] = 0
        w[:, ::3, 0] = 1
        w[:, 1::3, 0] = 300
        q[:, :, 0] = 0
        q[:, :, 0, 0] = 1
        k[:, :, 0] = -k[:, :, 0].abs()
        k[:, 20::37, 0] = 1
    if ties == "all":
        w = w * 0
    k_scale = 2.0 ** integers(B, T, low=-2, high=3, seed=3) if dtype == "e4m3" else None
    args = cast(q, dtype), cast(k, dtype), w, topk, k_scale, *bounds(kind, B, S, T)
    poison()
    got, left = filtered(monkeypatch, *args)
    assert torch.equal(got, reference.select(*args)) and left <= B * S // 100


@pytest.mark.parametrize("kind,B,S,T,HI,topk,dtype", FILTERED)
def test_select_filtered_chunks(monkeypatch, kind, B, S, T, HI, topk, dtype):
    """filtered in several chunks"""
    q = integers(B, S, HI, 32)
    k = integers(B, T, 32, seed=1)
    w = integers(B, S, HI, seed=2)
    k_scale = 2.0 ** integers(B, T, low=-2, high=3, seed=3) if dtype == "e4m3" else None
    args = cast(q, dtype), cast(k, dtype), w, topk, k_scale, *bounds(kind, B, S, T)
    monkeypatch.setattr(index, "SELECT_CHUNK", 40 * T // 16)
    assert torch.equal(filtered(monkeypatch, *args)[0], reference.select(*args))


@QUIET
@pytest.mark.parametrize("topk", [1, 9, 68, 100])
@pytest.mark.parametrize("path", ["scores", "filter"])
@pytest.mark.parametrize("dtype", ["e4m3", "half", "float32"])
def test_select_not_finite(monkeypatch, path, dtype, topk):
    """NaN scores are selected first, keys that score -inf never, by both paths"""
    q, k, w, k_scale = not_finite(4, dtype)
    args = q, k, w, topk, k_scale
    got = filtered(monkeypatch, *args)[0] if path == "filter" else kernels.select(*args)
    want = reference.select(*args)
    assert torch.equal((got >= 0).sum(-1), (want >= 0).sum(-1))

    # where as many are NaN or inf, or as few are not -inf, nothing depends on how scores are rounded
    scores = reference.index_scores(q, k, w, k_scale)
    best = (scores.isnan() | (scores == INF)).sum(-1)
    certain = (best >= topk) | ((scores > -INF) | scores.isnan()).sum(-1).le(topk)
    assert certain.any() and torch.equal(got[certain], want[certain])
    chosen = torch.zeros(2, 6, 71, dtype=torch.bool, device=DEVICE)
    chosen = chosen.scatter_(-1, got.long() % 71, True)[..., :70]  # (2, 6, 70); -1 is the 71st
    assert not (chosen & (scores == -INF)).any()
    assert (chosen | ~scores.isnan())[best < topk].all()


@QUIET
@pytest.mark.parametrize("path", ["scores", "filter"])
def test_select_minus_infinity(monkeypatch, path):
    """fewer than K scores above -inf: the other slots stay -1"""
    q = torch.ones(1, 3, 2, 16, device=DEVICE)
    k = integers(1, 400, 16, low=0, high=4)
    k[0, 50:] = INF
    k[0, 90] = 1
    w = torch.ones(1, 3, 2, device=DEVICE)
    w[0, 1:] = -1
    w[0, 2] = NAN
    args = q, k, w, 80
    got = filtered(monkeypatch, *args)[0] if path == "filter" else kernels.select(*args)
    assert torch.equal(got, reference.select(*args))
    assert (got[0, 1] >= 0).sum() == 51 and (got[0, [0, 2]] >= 0).all()


@pytest.mark.parametrize("path", ["scores", "filter"])
def test_select_rounding(monkeypatch, path):
    """any numbers: a selection may differ from the reference's only in keys that score the K-th best but for
    rounding, and does so in few rows"""
    B, S, T, HI, topk = (2, 300, 20001, 4, 512) if CUDA else (1, 20, 500, 4, 20)
    q = rand(B, S, HI, 64).to(E4M3)
    k = rand(B, T, 64, seed=1).to(E4M3)
    w = rand(B, S, HI, seed=2)
    k_scale = rand(B, T, seed=3).abs()
    args = q, k, w, topk, k_scale
    got = filtered(monkeypatch, *args)[0] if path == "filter" else kernels.select(*args)
    want = reference.select(*args)

    def chosen(x):
        return torch.zeros(B, S, T, dtype=torch.bool, device=DEVICE).scatter_(-1, x.long(), True)

    scores = reference.index_scores(q, k, w, k_scale)
    differs = chosen(got) != chosen(want)
    # of what a score sums; it is a few times smaller, so rounded to E4M3_ERROR / 2 of it, in either path
    dots = torch.einsum("bshd,btd->bsht", q.float(), k.float()).abs()
    size = (dots * w.abs()[..., None]).sum(2) * k_scale[:, None]  # (B, S, T)
    kth = scores.topk(topk).values[..., -1:]
    assert (chosen(got).sum(-1) == topk).all() and differs.any(-1).float().mean() < 0.1
    assert ((scores - kth).abs() < 2 * E4M3_ERROR * size)[differs].all()


def test_select_filter_fails(monkeypatch):
    """all sampled keys (every 9th) are better than the rest, or worse than more of it than there is room for:
    such rows are left over, others are not"""
    T = 1500
    topk = 20
    i = torch.arange(T, device=DEVICE)
    k = torch.zeros(1, T, 16, device=DEVICE)
    k[0, :, 0] = torch.where(i % 9 == 0, 500 + i // 9, i % 50)
    k[0, :, 1] = torch.where(i % 9 == 0, 0, i + 1)
    q = torch.zeros(1, 4, 2, 16, device=DEVICE)
    q[0, :2, :, 0] = 1
    q[0, 2, :, 1] = 1
    w = torch.ones(1, 4, 2, device=DEVICE)
    tiles = index.filter_tiles(*q.shape[2:], T, topk, q.dtype)
    assert tiles.stride == 9 and tiles.cap == 1024
    got, left = filtered(monkeypatch, q.half(), k.half(), w, topk)
    assert torch.equal(got, reference.select(q, k, w, topk)) and left == 3


def poisson_below(mean, count):
    """P(a Poisson variable < count)"""
    return sum(math.exp(i * math.log(mean) - mean - math.lgamma(i + 1)) for i in range(count))


def test_filter_tiles():
    """for all that is filtered: at most 2 rows of 10^5 fail if the best keys lie anywhere, and sample and
    candidates fit a program"""
    for topk in (1, 2, 9, 33, 64, 100, 256, 300, 511, 512, 700, 1023, 1024):
        for T in (65536, 65537, 100_003, 2**17, 2**18, 500_000, 2**19, 2**20 - 1, 2**20):
            tiles = index.filter_tiles(4, 64, T, topk, torch.float32)
            mean = topk / tiles.stride
            rank = int(mean + index.SIGMAS.value * mean**0.5 + 3)
            too_few = 1 - poisson_below(mean, rank)  # rank or more of the K best are sampled
            too_many = poisson_below(tiles.cap / tiles.stride, rank + rank // 16)
            assert too_few < 2e-5 and too_many < 2e-6, (topk, T)
            assert tiles.stride % 2 == 1 and tiles.sample >= T / tiles.stride
            assert tiles.sample <= index.LARGEST_SAMPLE and topk <= tiles.cap <= 4096


@pytest.mark.parametrize("T,topk", [(65536, 512), (2**19, 512), (2**20, 512), (2**20, 64), (2**20, 1024)])
def test_filter_threshold(T, topk):
    """the threshold of random scores lets K..CAP of them through, up to a million keys"""
    R = 8
    tiles = index.filter_tiles(4, 64, T, topk, torch.float32)
    scores = rand(R, T, seed=T + topk)
    sample = scores[:, ::tiles.stride].contiguous()
    last = positions([T - 1, T - 1, T // 2, T // 2, T // 7, tiles.cap + 1, topk + 1, topk // 2])
    threshold = torch.full((R,), NAN, device=DEVICE)
    index.threshold_kernel[(R,)](
        sample_ptr=sample, first_ptr=None, last_ptr=last, threshold_ptr=threshold,
        S=R, T=T, first_row=0, rows=R, width=sample.shape[1], K=topk, stride=tiles.stride,
        SAMPLE=tiles.sample,
        num_warps=tiles.sample_warps)
    for row in range(R):
        seen = scores[row, :last[row] + 1]
        passed = int((seen > threshold[row]).sum())
        assert min(topk, len(seen)) <= passed <= tiles.cap, row


@pytest.mark.parametrize("S,T,HI,topk,filtered", [
    (32768, 65536, 4, 512, True), (65536, 65536, 4, 512, False), (2**17, 2**17, 4, 512, True),
    (4096, 2**17, 4, 512, True), (4096, 98304, 4, 512, False), (1, 2**20, 4, 512, False),
    (2**17, 2**17, 4, 1024, True), (32768, 65536, 4, 1024, False), (2**17, 2**17, 8, 512, False)])
def test_where_select_filters(S, T, HI, topk, filtered):
    """by what queries see in the mean, not by the longest; no few queries, of which none would wait for the
    host"""
    assert index.filters(torch.empty(1, S, HI, 64, device="meta"), T, topk) is filtered


@pytest.mark.skipif(not CUDA, reason="real shapes need a GPU")
def test_select_filters_a_million_keys():
    """no row of random numbers is left over: 8 of 10^6 are expected to be"""
    B, S, T, HI, topk = 1, 512, 2**20, 4, 512
    q, k, w, k_scale = score_inputs(B, S, T, HI, 64, "e4m3")
    out = torch.empty(B, S, topk, dtype=torch.int32, device=DEVICE)
    assert index.filters(q, T, topk)
    assert not index.select_filtered(out, *index.operands(q, k, w), k_scale, None, None).any()
    assert (out[..., 1:] > out[..., :-1]).all()


# ---- arguments, registration, devices ----

def test_bad_input():
    q = rand(1, 2, 4, 16)
    k = rand(1, 8, 16)
    w = rand(1, 2, 4)
    scale = rand(1, 8)
    q8 = q.to(E4M3)
    k8 = k.to(E4M3)
    calls = (
        ("index_topk=0", kernels.select, (q, k, w, 0)),
        ("topk=0", kernels.topk, (q[..., 0], 0)),
        ("both or neither", kernels.select, (q, k.half(), w, 4)),
        ("floating point", kernels.index_scores, (q8.view(torch.uint8), k8.view(torch.uint8), w)),
        ("float keys have none", kernels.select, (q, k, w, 4, scale)),
        ("need their scales", kernels.index_scores, (q8, k8, w)),
        ("k is", kernels.select, (q, k[..., :8], w, 4)),
        ("w is", kernels.index_scores, (q, k, w[:, :1])),
        ("k_scale is", kernels.select, (q8, k8, w, 4, scale[:, :4])),
        ("k_scale is", kernels.select, (q8, k8, w, 4, scale[..., None])))
    for message, function, args in calls:
        with pytest.raises(ValueError, match=message):
            function(*args)


def test_nothing_to_select_from():
    """no keys, no queries: -1, or nothing"""
    q = rand(1, 2, 4, 16)
    w = rand(1, 2, 4)
    assert (kernels.select(q, rand(1, 0, 16), w, 3) == -1).all()
    assert (kernels.topk(rand(1, 2, 0), 3) == -1).all()
    assert kernels.select(q[:, :0], rand(1, 5, 16), w[:, :0], 3).shape == (1, 0, 3)
    assert kernels.index_scores(q, rand(1, 0, 16), w).shape == (1, 2, 0)


def test_no_gradient():
    """results of inputs that want a gradient do not"""
    q = rand(1, 2, 4, 16).requires_grad_()
    k = rand(1, 8, 16).requires_grad_()
    w = rand(1, 2, 4).requires_grad_()
    results = *kernels.quantise(q), kernels.index_scores(q, k, w), kernels.select(q, k, w, 3)
    assert not any(x.requires_grad for x in results)


ALL_CHECKS = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")


@pytest.mark.parametrize("bounded", [False, True])
@pytest.mark.parametrize("name", ["quantise", "index_scores", "select", "topk"])
def test_registration(name, bounded):
    """torch.library's own checks: schema (which torch cannot compare for e4m3 inputs), fake results,
    tracing"""
    dtype = "half" if bounded else "e4m3"
    q, k, w, k_scale = score_inputs(2, 3, 20, 4, 32, dtype)
    between = bounds("holes", 2, 3, 20) if bounded else (None, None)
    args = dict(
        quantise=(rand(2, 3, 4, 32).to(HALF), 16, bounded, True),
        index_scores=(q, k, w, k_scale, *between),
        select=(q, k, w, 5, k_scale, *between),
        topk=(rand(2, 3, 20), 5, *between))
    checks = ALL_CHECKS[1:] if k_scale is not None and name in ("index_scores", "select") else ALL_CHECKS
    opcheck(getattr(torch.ops.dsa, name).default, args[name], test_utils=checks)


def test_one_graph():
    """torch.compile passes through all four without a break"""
    q, k, w, _ = score_inputs(2, 3, 20, 4, 32, "half")

    def everything(q, k, w):
        q, q_scale = kernels.quantise(q, rotate=True)
        k, k_scale = kernels.quantise(k, rotate=True)
        args = w * q_scale[..., 0], k_scale[..., 0]
        scores = kernels.index_scores(q, k, *args)
        return scores, kernels.topk(scores, 5), kernels.select(q, k, args[0], 5, args[1])

    compiled = torch.compile(everything, backend="aot_eager", fullgraph=True)
    for got, want in zip(compiled(q, k, w), everything(q, k, w)):
        assert torch.equal(got, want)


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
@pytest.mark.parametrize("B,S,T,topk", [(1, 1, 30000, 2048), (4, 2, 5000, 512)])
def test_cuda_graph_decode(B, S, T, topk):
    """captured once, replayed with another cache length"""
    q = integers(B, S, 64, 128).to(E4M3)
    w = integers(B, S, 64, seed=2)
    k = integers(B, T, 128, seed=1).to(E4M3)
    k_scale = torch.ones(B, T, device=DEVICE)
    last = torch.full((B, S), T // 3, device=DEVICE, dtype=torch.int32)
    kernels.select(q, k, w, topk, k_scale, None, last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = kernels.select(q, k, w, topk, k_scale, None, last)
    for length in (10, 3000, T):
        last.fill_(length - 1)
        graph.replay()
        assert torch.equal(got, reference.select(q, k, w, topk, k_scale, None, last))


def test_a_gpu_without_fp8_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    has_fp8.cache_clear()
    assert [has_fp8(torch.device("cuda")) for _ in range(2)] == [False, False]
    assert [r.getMessage() for r in caplog.records] == [
        "NVIDIA A10 has no FP8 tensor cores (they come with sm_89): e4m3 is multiplied as 16-bit floats"]
    has_fp8.cache_clear()


@pytest.mark.skipif(not CUDA, reason="64-bit offsets need memory")
def test_long_context():
    """(T13) S * T beyond 2^31, and one query over a million keys"""
    T = 2**20
    k = integers(1, T, 32, seed=1).to(torch.bfloat16)
    q = integers(1, 3, 2, 32).to(torch.bfloat16)
    w = integers(1, 3, 2, seed=2)
    assert torch.equal(kernels.select(q, k, w, 512), reference.select(q, k, w, 512))
    S = 2100
    q = integers(1, S, 2, 32).to(torch.bfloat16)
    w = integers(1, S, 2, seed=2)
    got = kernels.index_scores(q, k, w)
    assert torch.equal(got[:, -5:], reference.index_scores(q, k, w, rows=slice(S - 5, S)))
