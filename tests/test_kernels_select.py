"""quantise, index_scores and select against indexer.py: bits, errors, and positions. On a CPU through Triton's interpreter, with small shapes."""
import pytest, torch

import indexer as reference
import kernels

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter multiplies bf16 wrongly
torch.set_num_threads(1 if not CUDA else torch.get_num_threads())


def rand(*shape, seed=0, scale=1.0):
    return (torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) * scale).to(DEVICE)


def integers(*shape, low=-3, high=4, seed=0):
    return torch.randint(low, high, shape, generator=torch.Generator().manual_seed(seed)).float().to(DEVICE)


def poison(shape, dtype):
    torch.full(shape, -7777 if not dtype.is_floating_point else float("nan"), dtype=dtype, device=DEVICE)  # what torch.empty finds next


def bounds(kind, B, S, T):
    """first, last (B,S) int32"""
    i = torch.arange(S, device=DEVICE, dtype=torch.int32).expand(B, S)
    if kind == "causal": return None, None
    if kind == "packed":  # documents of unequal length, S == T
        start = (i // 37 * 37).contiguous()
        return start, i.contiguous()
    if kind == "cache":  # a cache longer than what it holds, different in each row
        length = torch.tensor([T // 2 + 3 * b for b in range(B)], device=DEVICE, dtype=torch.int32)
        return None, (length[:, None] - S + i).contiguous()
    first = (i % 5).contiguous(); last = (T - S + i).clone(); last[:, ::3] = -1  # nothing visible in every third row
    return first, last


def with_kinds(shapes):
    """Shapes (B,S,T,...) behind each kind of `bounds` that they can have."""
    return [(kind, *shape) for kind in ("causal", "cache", "holes", "packed") for shape in shapes if kind != "packed" or shape[1] == shape[2]]


@pytest.mark.parametrize("ue8m0", [True, False])
@pytest.mark.parametrize("rotate", [False, True])
@pytest.mark.parametrize("shape", [(1, 1, 128), (3, 7, 5, 64), (33, 32), (2, 5, 512), (9, 16)] + ([(2, 4096, 64, 128)] if CUDA else []))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16] + ([torch.bfloat16] if CUDA else []))
def test_quantise_bits(shape, dtype, rotate, ue8m0):
    x = rand(*shape) * torch.logspace(-7, 4, shape[0] * shape[1], device=DEVICE).view(shape[0], shape[1], *[1] * (len(shape) - 2)).clamp(max=3e3)
    x.view(-1, shape[-1])[0] = 0; x.view(-1)[-3:] = -0.0
    x = x.to(dtype)
    poison(shape, torch.float32)
    for got, want in zip(kernels.quantise(x, rotate=rotate, ue8m0=ue8m0), reference.quantise(x, rotate=rotate, ue8m0=ue8m0)):
        assert got.shape == want.shape and got.dtype == want.dtype
        integer = torch.uint8 if got.dtype == torch.float8_e4m3fn else torch.int32
        assert torch.equal(got.view(integer), want.view(integer))


def test_quantise_every_value():
    """all e4m3 codes, all midpoints between them and their neighbours: round to nearest even"""
    codes = torch.arange(0, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    middle = (codes[1:] + codes[:-1]) / 2
    x = torch.cat((codes, middle, middle * (1 + 2**-20), middle * (1 - 2**-20))); x = torch.cat((x, -x))
    x = torch.nn.functional.pad(x, (0, -len(x) % 127)).view(-1, 127)
    x = torch.nn.functional.pad(x, (0, 1), value=448.0).to(DEVICE)  # scale 1
    assert torch.equal(kernels.quantise(x)[0].view(torch.uint8), reference.quantise(x)[0].view(torch.uint8))


def test_quantise_wide_and_odd():
    x = rand(6, 300)
    for got, want in zip(kernels.quantise(x), reference.quantise(x)): assert got.shape == want.shape and torch.equal(got.float(), want.float())
    with pytest.raises(ValueError, match="300"): kernels.quantise(x, rotate=True)


def errors(got, want, tolerance, worst):
    assert torch.equal(got == float("-inf"), want == float("-inf"))
    seen = want != float("-inf")
    got, want = got.masked_fill(~seen, 0).double(), want.masked_fill(~seen, 0).double()
    row = (got - want).norm(dim=-1) / want.norm(dim=-1).clamp(min=1e-30)
    assert (got - want).norm() <= tolerance * want.norm() and row.max() <= worst, ((got - want).norm() / want.norm(), row.max())


SHAPES = [(1, 1, 1, 1, 16), (2, 5, 70, 3, 32), (1, 33, 33, 8, 64), (2, 3, 300, 64, 128), (1, 130, 197, 12, 40)] + (
    [(2, 500, 3000, 64, 128), (1, 1000, 1000, 4, 32), (3, 2, 5001, 16, 64)] if CUDA else [])


@pytest.mark.parametrize("kind,B,S,T,HI,dI", with_kinds(SHAPES))
@pytest.mark.parametrize("dtype", ["e4m3", "half", "float32"])
def test_scores(B, S, T, HI, dI, dtype, kind):
    first, last = bounds(kind, B, S, T)
    q, k, w, k_scale = rand(B, S, HI, dI), rand(B, T, dI, seed=1), rand(B, S, HI, seed=2), None
    if dtype == "e4m3":
        (q, q_scale), (k, k_scale) = reference.quantise(q), reference.quantise(k)
        w, k_scale = w * q_scale[..., 0], k_scale[..., 0]
    elif dtype == "half": q, k = q.to(HALF), k.to(HALF)
    poison((B, S, T), torch.float32)
    got = kernels.index_scores(q, k, w, k_scale, first, last)
    want = reference.index_scores(q.double() if dtype != "e4m3" else q, k.double() if dtype != "e4m3" else k, w, k_scale, first, last)
    errors(got, want, 2e-4 if CUDA and dtype == "e4m3" else 2e-6, 2e-3 if CUDA and dtype == "e4m3" else 2e-5)  # Hopper sums e4m3 products in 22 bits
    assert torch.equal(got, kernels.index_scores(q, k, w, k_scale, first, last))


def test_scores_strided_cache():
    """keys as a view of a longer cache, with scales likewise"""
    cache, scale = rand(2, 90, 2, 32).to(HALF), None
    q, w = rand(2, 4, 4, 32).to(HALF), rand(2, 4, 4)
    k = cache[:, 3:64, 1]
    errors(kernels.index_scores(q, k, w), reference.index_scores(q.float(), k.float(), w), 2e-6, 2e-5)


@pytest.mark.parametrize("scale", [1e-18, 1e12])
def test_scores_magnitudes(scale):
    q, k, w = rand(1, 9, 4, 32) * scale, rand(1, 50, 32, seed=1) * scale, rand(1, 9, 4, seed=2)
    errors(kernels.index_scores(q, k, w), reference.index_scores(q, k, w), 2e-6, 2e-5)


@pytest.mark.parametrize("topk", [1, 7, 64, 1000])
@pytest.mark.parametrize("kind,B,S,T,HI,dI", with_kinds([(1, 1, 1, 1, 16), (2, 5, 70, 3, 32), (1, 75, 75, 4, 64), (2, 3, 300, 16, 32)] + (
    [(2, 300, 3000, 64, 128), (1, 2000, 2000, 4, 32), (3, 2, 70001, 16, 64), (1, 64, 20000, 8, 32)] if CUDA else [])))
def test_select_index_equal(B, S, T, HI, dI, kind, topk):
    """integers: every sum is exact, ties abound"""
    first, last = bounds(kind, B, S, T)
    e4m3 = lambda x: x.to(torch.float8_e4m3fn)
    q, k, w = e4m3(integers(B, S, HI, dI)), e4m3(integers(B, T, dI, seed=1)), integers(B, S, HI, seed=2)
    k_scale = 2.0 ** integers(B, T, low=-2, high=3, seed=3)
    poison((B, S, topk), torch.int32)
    got = kernels.select(q, k, w, topk, k_scale, first, last)
    assert got.dtype == torch.int32 and torch.equal(got, reference.select(q, k, w, topk, k_scale, first, last))
    assert torch.equal(got, kernels.select(q, k, w, topk, k_scale, first, last))


def misled(R, T):
    """-1 wherever the kernel takes its sample, 0 elsewhere, but for 20 higher scores at the end: no guess is any good"""
    x, sample = torch.zeros(R, T, device=DEVICE), 1024 if T <= 16384 else 2048 if T <= 65536 else 8192
    j = torch.arange(sample, device=DEVICE)
    x[:, (j // 8 * (T - 8) // (sample // 8) + j % 8).clamp(min=0)] = -1.0
    free = (x[0] == 0).nonzero()[-20:, 0]
    x[:, free] = rand(R, len(free)).abs() + 0.1
    return x


def rows(kind, R, T):
    i = torch.arange(T, device=DEVICE).float()
    x = rand(R, T)
    return {"normal": x, "equal": x * 0 + 3.5, "zeros": x.clamp(min=0), "zeros of both signs": torch.where(x < 0.8, x.sign() * 0.0, x), "rising": i + x * 0,
            "falling": -i + x * 0, "few values": (x * 2).round(), "clustered": torch.where((i > T * 0.4) & (i < T * 0.55), x + 50, x),
            "end": torch.where(i > T - T // 16, x + 1e30, x * 1e-30), "huge and tiny": x * 10.0 ** (rand(R, T, seed=5) * 12).clamp(-37, 37), "negative": -x.abs() - 1,
            "negative zeros": -x.clamp(min=0), "a misleading sample": misled(R, T), "one peak": torch.where(i == T // 3, 1.0, x * 0)}[kind]


@pytest.mark.parametrize("kind", ["normal", "equal", "zeros", "zeros of both signs", "rising", "falling", "few values", "clustered", "end", "huge and tiny", "negative",
                                  "negative zeros", "a misleading sample", "one peak"])
@pytest.mark.parametrize("T,topk", [(500, 64), (2049, 1), (4096, 64), (8192, 8000), (9001, 100), (20000, 2048)] + ([(32768, 2048), (32768, 512), (131072, 2048), (300001, 2048), (40000, 5000), (100000, 20000)] if CUDA else []))
def test_topk_rows(T, topk, kind):
    R = 6 if CUDA else 2
    x = rows(kind, R, T)[None]
    first = torch.tensor([0, 17, 130, 0, 5, 0][:R], device=DEVICE, dtype=torch.int32)[None]
    last = torch.tensor([T - 1, T - 1, T - 300, topk, T // 2, topk + topk // 2][:R], device=DEVICE, dtype=torch.int32)[None]
    got = kernels.topk(x, topk, first, last)
    seen = reference.visible(R, T, first, last, slice(None), DEVICE)
    best, position = x.masked_fill(~seen, float("-inf")).sort(dim=-1, descending=True, stable=True)
    want = position[..., :topk].masked_fill(best[..., :topk] == float("-inf"), T).sort(-1).values
    want = want.masked_fill(want == T, -1).int()
    assert torch.equal(got, want)
    assert torch.equal(got, kernels.topk(x, topk, first, last))


def test_nan_stays_inside():
    """NaNs have no place in an order, but a bad score must not become a bad address"""
    x = rand(1, 4, 9000); x[0, 1] = float("nan"); x[0, 2, ::2] = float("nan"); x[0, 3, :8999] = float("nan")
    got = kernels.topk(x, 500)
    assert got.min() >= -1 and got.max() < 9000


def test_select_chunks(monkeypatch):
    """more than one chunk over queries and over the batch"""
    q, k, w = integers(3, 40, 4, 16).to(HALF), integers(3, 40, 16, seed=1).to(HALF), integers(3, 40, 4, seed=2)
    monkeypatch.setattr(kernels, "SELECT_CHUNK", 600)
    assert torch.equal(kernels.select(q, k, w, 8), reference.select(q, k, w, 8))


FILTERED = [("causal", 1, 45, 45, 4, 7, "e4m3"), ("packed", 1, 50, 50, 8, 9, "half"), ("cache", 2, 12, 701, 3, 30, "e4m3"), ("holes", 1, 20, 500, 8, 20, "float32"), ("causal", 1, 20, 20, 4, 64, "e4m3"),
            ("causal", 1, 6, 300, 64, 16, "half")] + ([("causal", 2, 300, 20001, 8, 512, "e4m3"), ("packed", 1, 12000, 12000, 4, 1024, "half"), ("holes", 1, 300, 9000, 64, 2048, "e4m3"),
            ("causal", 1, 64, 300001, 8, 100, "half")] if CUDA else [])


def filtered(monkeypatch, *args):
    """select by the filter, whatever the shapes; -> selection, how many rows were left over for the path with scores"""
    left, select_filtered = [], kernels._select_filtered
    def count(*a):
        bad = select_filtered(*a); left.append(int(bad.sum())); return bad
    with monkeypatch.context() as m:
        m.setattr(kernels, "SELECT_FILTER", (1, 1, 0, 0, 2048)); m.setattr(kernels, "_select_filtered", count)
        return kernels.select(*args), left[0]


@pytest.mark.parametrize("ties", ["some", "at zero", "all"])
@pytest.mark.parametrize("kind,B,S,T,HI,topk,dtype", FILTERED)
def test_select_filtered(monkeypatch, kind, B, S, T, HI, topk, dtype, ties):
    first, last = bounds(kind, B, S, T)
    q, k, w = integers(B, S, HI, 32), integers(B, T, 32, seed=1), integers(B, S, HI, seed=2)
    if ties == "at zero":  # the K-th value; in two rows of three a few are above it
        w = -w.abs(); w[:, ::3] = 0; w[:, ::3, 0] = 1; w[:, 1::3, 0] = 300
        q[:, :, 0] = 0; q[:, :, 0, 0] = 1; k[:, :, 0] = -k[:, :, 0].abs(); k[:, 20::37, 0] = 1
    if ties == "all": w = w * 0
    convert = {"e4m3": lambda x: x.to(torch.float8_e4m3fn), "half": lambda x: x.to(HALF), "float32": lambda x: x}[dtype]
    args = convert(q), convert(k), w, topk, 2.0 ** integers(B, T, low=-2, high=3, seed=3) if dtype == "e4m3" else None, first, last
    poison((B, S, topk), torch.int32)
    got, left = filtered(monkeypatch, *args)
    assert torch.equal(got, reference.select(*args)) and left <= B * S // 100
    monkeypatch.setattr(kernels, "SELECT_CHUNK", 40 * T // 16)
    assert torch.equal(got, filtered(monkeypatch, *args)[0])


@pytest.mark.parametrize("path", ["scores", "filter"])
def test_select_rounding(monkeypatch, path):
    """any numbers: a selection may differ from the reference's only in keys that score the K-th best but for rounding, and does so in few rows"""
    B, S, T, HI, topk = (2, 300, 20001, 4, 512) if CUDA else (1, 20, 500, 4, 20)
    q, k, w, k_scale = rand(B, S, HI, 64).to(torch.float8_e4m3fn), rand(B, T, 64, seed=1).to(torch.float8_e4m3fn), rand(B, S, HI, seed=2), rand(B, T, seed=3).abs()
    args = q, k, w, topk, k_scale
    got, want = filtered(monkeypatch, *args)[0] if path == "filter" else kernels.select(*args), reference.select(*args)
    chosen = lambda x: torch.zeros(B, S, T, dtype=torch.bool, device=DEVICE).scatter_(-1, x.long(), True)
    scores, differs = reference.index_scores(q, k, w, k_scale), chosen(got) != chosen(want)
    size = (torch.einsum("bshd,btd->bsht", q.float(), k.float()).abs() * w.abs()[..., None]).sum(2) * k_scale[:, None]  # of what a score sums
    kth = scores.topk(topk).values[..., -1:]
    assert (chosen(got).sum(-1) == topk).all() and differs.any(-1).float().mean() < 0.1
    assert ((scores - kth).abs() < 5e-4 * size)[differs].all()


def test_select_filter_fails(monkeypatch):
    """all sampled keys (every 9th) are better than the rest, or worse than more of it than there is place for: such rows are left over, others are not"""
    B, S, T, topk = 2, 4, 2500, 20
    i = torch.arange(T, device=DEVICE)
    q, k, w = torch.zeros(B, S, 2, 16, device=DEVICE), torch.zeros(B, T, 16, device=DEVICE), torch.ones(B, S, 2, device=DEVICE)
    q[..., 0] = 1; q[:, 2] = 0
    k[0, :, 0] = torch.where(i % 9 == 0, 500 + i // 9, i % 50); k[1, :, 0] = torch.where(i % 9 == 0, 0, i % 2000 + 1)
    got, left = filtered(monkeypatch, q.half(), k.half(), w, topk)
    assert torch.equal(got, reference.select(q, k, w, topk)) and left == 6


def test_bad_input():
    q, k, w, scale = rand(1, 2, 4, 16), rand(1, 8, 16), rand(1, 2, 4), rand(1, 8)
    q8, k8 = (x.to(torch.float8_e4m3fn) for x in (q, k))
    for call in (lambda: kernels.select(q, k, w, 0), lambda: kernels.select(q, k.half(), w, 4), lambda: kernels.select(q, k[..., :8], w, 4),
                 lambda: kernels.select(q, k, w, 4, k_scale=rand(1, 8)), lambda: kernels.topk(q[..., 0], 0), lambda: kernels.select(q8, k8, w, 4, scale[:, :4]),
                 lambda: kernels.select(q8, k8, w, 4, scale[..., None])):
        with pytest.raises(ValueError): call()


@pytest.mark.skipif(not CUDA, reason="CUDA graphs")
@pytest.mark.parametrize("B,S,T,topk", [(1, 1, 30000, 2048), (4, 2, 5000, 512)])
def test_cuda_graph_decode(B, S, T, topk):
    """captured once, replayed with another cache length"""
    q, w = integers(B, S, 64, 128).to(torch.float8_e4m3fn), integers(B, S, 64, seed=2)
    k, k_scale = integers(B, T, 128, seed=1).to(torch.float8_e4m3fn), torch.ones(B, T, device=DEVICE)
    last = torch.full((B, S), T // 3, device=DEVICE, dtype=torch.int32)
    kernels.select(q, k, w, topk, k_scale, None, last)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph): got = kernels.select(q, k, w, topk, k_scale, None, last)
    for length in (10, 3000, T):
        last.fill_(length - 1); graph.replay()
        assert torch.equal(got, reference.select(q, k, w, topk, k_scale, None, last))


def test_a_gpu_without_fp8_is_named_once(monkeypatch, caplog):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 6))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA A10")
    kernels.has_fp8.cache_clear()
    assert [kernels.has_fp8(torch.device("cuda")) for _ in range(2)] == [False, False]
    assert [r.getMessage() for r in caplog.records] == ["NVIDIA A10 has no FP8 tensor cores (they come with sm_89): e4m3 is multiplied as 16-bit floats"]
    kernels.has_fp8.cache_clear()


@pytest.mark.skipif(not CUDA, reason="64-bit offsets need memory")
def test_long_context():
    """S * T beyond 2^31, and one query over a million keys"""
    T = 2**20
    k = integers(1, T, 32, seed=1).to(torch.bfloat16)
    q, w = integers(1, 3, 2, 32).to(torch.bfloat16), integers(1, 3, 2, seed=2)
    assert torch.equal(kernels.select(q, k, w, 512), reference.select(q, k, w, 512))
    S = 2100
    q, w = integers(1, S, 2, 32).to(torch.bfloat16), integers(1, S, 2, seed=2)
    got = kernels.index_scores(q, k, w)
    assert torch.equal(got[:, -5:], reference.index_scores(q, k, w, rows=slice(S - 5, S)))
