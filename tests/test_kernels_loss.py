"""Dense attention and the two indexer losses (kernels.py) against float64 references and their autograd."""
import pytest
import torch

import kernels
import model
from kernels import dense_attention, indexer_loss_dense, indexer_loss_sparse

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA  # the interpreter multiplies bf16 wrongly
TOLERANCE = {torch.float32: (1e-5, 5e-5), torch.float16: (2e-3, 1e-2), torch.bfloat16: (6e-3, 2.5e-2)}  # whole tensor, worst row
big = pytest.mark.skipif(not CUDA, reason="real shapes need a GPU")


def visible(S, T, first, last):
    s = torch.arange(T, device=DEVICE)
    last = torch.arange(T - S, T, device=DEVICE)[None] if last is None else last
    return (s <= last[..., None]) & (s >= (0 if first is None else first[..., None]))


def attention_reference(q, k, v, scale, first, last):
    H, seen = q.shape[2], visible(q.shape[1], k.shape[1], first, last)[:, :, None]
    k, v = (x.repeat_interleave(H // x.shape[2], 2) for x in (k, v))
    logits = (torch.einsum("bshd,bthd->bsht", q, k) * scale).masked_fill(~seen, float("-inf"))
    empty = ~seen.any(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(empty, 0), -1).masked_fill(~seen, 0)
    return torch.einsum("bsht,bthd->bshd", p, v), logits.logsumexp(-1)


def kl_reference(p, scores, seen):
    log_q = torch.log_softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0)
    entropy = torch.special.xlogy(p, p).sum(-1)
    return entropy - (p * log_q).sum(-1), entropy + p.sum(-1) * seen.sum(-1).clamp(min=1).log()


def loss_dense_reference(q, k, lse, scale, qi, ki, w, first, last):
    seen = visible(q.shape[1], k.shape[1], first, last).expand(q.shape[0], -1, -1)
    logits = torch.einsum("bshd,bthd->bsht", q, k.expand(-1, -1, q.shape[2], -1)) * scale
    p = torch.exp(logits - lse[..., None]).masked_fill(~seen[:, :, None], 0).mean(2)
    return kl_reference(p, torch.einsum("bsht,bsh->bst", torch.einsum("bshd,btd->bsht", qi, ki).relu(), w), seen)


def loss_sparse_reference(q, latents, lse, indices, scale, qi, ki, w):
    seen, where = indices >= 0, indices.clamp(min=0).long()
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    logits = torch.einsum("bshd,bskd->bshk", q, latents[batch, where]) * scale
    p = torch.exp(logits - lse[..., None]).masked_fill(~seen[:, :, None], 0).mean(2)
    dots = torch.einsum("bshd,bskd->bshk", qi, ki[batch, where])
    return kl_reference(p, torch.einsum("bshk,bsh->bsk", dots.relu(), w), seen)


def close(name, got, want, dtype, rows=True, factor=1):
    """Relative error of the whole tensor and of its worst row (a row that is tiny beside the rest counts against the mean row)."""
    whole, worst = (factor * x for x in TOLERANCE[dtype])
    got, want = got.double().flatten(0, 1), want.double().flatten(0, 1)
    assert torch.isfinite(got).all(), f"{name}: not finite"
    error = (got - want).norm() / want.norm().clamp(min=1e-30)
    assert error < whole, f"{name}: relative error {error:.2e}"
    if rows:
        got, want = got.flatten(1), want.flatten(1)
        size = want.norm(dim=-1)
        row = ((got - want).norm(dim=-1) / size.clamp(min=max(0.1 * size.mean().item(), 1e-30))).max()
        assert row < worst, f"{name}: worst row {row:.2e}"


def documents(B, S, T, kind):
    """first, last: None (causal), 'packed' documents, 'window' (nothing causal about it, some rows empty)"""
    if kind is None:
        return None, None
    position = torch.arange(T - S, T)
    if kind == "packed":
        cuts = torch.tensor([0, T // 7, T // 3, T // 3 + 1, T - 5])
        first = cuts[torch.searchsorted(cuts, position, right=True) - 1]
        return first.int().expand(B, S).to(DEVICE), position.int().expand(B, S).to(DEVICE)
    g = torch.Generator().manual_seed(1)
    first, last = torch.randint(0, T, (B, S), generator=g).int(), torch.randint(0, T, (B, S), generator=g).int()
    return first.to(DEVICE), last.to(DEVICE)


def make(*shape, dtype, scale=1.0, grad=True):
    return (torch.randn(*shape, device=DEVICE) * scale).to(dtype).requires_grad_(grad)


def doubled(*tensors):
    return [x.detach().double().requires_grad_(x.requires_grad) for x in tensors]


@pytest.fixture(autouse=True)
def poison():
    """Fill what the allocator hands out next with NaN: a kernel that leaves a hole shows it."""
    torch.manual_seed(0)
    torch.set_num_threads(1)
    if CUDA:
        junk = [torch.full((n,), float("nan"), device=DEVICE) for n in (2**10, 2**16, 2**20, 2**24, 2**26)]
        del junk


ATTENTION = [  # B, S, T, H, Hk, d, dv, kind
    (2, 37, 37, 3, 3, 24, 16, None), (1, 33, 70, 2, 2, 48, 32, "packed"), (2, 20, 45, 5, 1, 40, 32, None), (1, 19, 50, 4, 4, 16, 16, "window"),
    (1, 1, 1, 1, 1, 16, 16, None), (1, 2, 700, 6, 1, 40, 32, None), (2, 3, 600, 3, 3, 24, 16, "window")]
ATTENTION_BIG = [(2, 1000, 1000, 3, 3, 192, 128, "packed"), (1, 1024, 1024, 16, 16, 192, 128, None), (1, 700, 1300, 12, 1, 160, 128, None),
                 (1, 200, 900, 16, 1, 576, 512, "packed"), (1, 2, 9000, 128, 1, 576, 512, None), (2, 1, 5000, 12, 1, 288, 256, None),
                 (2, 515, 515, 12, 12, 96, 64, None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", ATTENTION + [pytest.param(s, marks=big) for s in ATTENTION_BIG])
def test_dense_attention(shape, dtype):
    B, S, T, H, Hk, d, dv, kind = shape
    first, last = documents(B, S, T, kind)
    q, k, v = make(B, S, H, d, dtype=dtype), make(B, T, Hk, d, dtype=dtype), make(B, T, Hk, dv, dtype=dtype)
    dout = make(B, S, H, dv, dtype=dtype, grad=False)
    out, lse = dense_attention(q, k, v, d**-0.5, first, last)
    out.backward(dout)
    Q, K, V = doubled(q, k, v)
    want, want_lse = attention_reference(Q, K, V, d**-0.5, first, last)
    want.backward(dout.double())
    close("out", out, want, dtype)
    seen = want_lse > float("-inf")
    assert (lse[~seen] == float("-inf")).all() and (out[~seen] == 0).all()
    assert (lse[seen] - want_lse[seen]).abs().max() < (1e-5 if dtype == torch.float32 else 1e-3)
    for name, x, y in (("dq", q, Q), ("dk", k, K), ("dv", v, V)):
        if T > 1 or name == "dv":  # one key: softmax is constant
            close(name, x.grad, y.grad, dtype, factor=1.5)


def test_dense_attention_queries_that_see_nothing_between_others():
    """keys whose queries come in two runs, the second at the start of a block of 1024: the gap gives them no gradient"""
    S, T = 2100, 40
    first, last = torch.zeros(1, S, dtype=torch.int32, device=DEVICE), torch.full((1, S), T - 1, dtype=torch.int32, device=DEVICE)
    last[:, 70:2048] = -1
    q, k, v = make(1, S, 1, 16, dtype=torch.float32), make(1, T, 1, 16, dtype=torch.float32), make(1, T, 1, 16, dtype=torch.float32)
    dout = make(1, S, 1, 16, dtype=torch.float32, grad=False)
    dense_attention(q, k, v, 0.25, first, last)[0].backward(dout)
    Q, K, V = doubled(q, k, v)
    attention_reference(Q, K, V, 0.25, first, last)[0].backward(dout.double())
    for name, x, y in (("dq", q, Q), ("dk", k, K), ("dv", v, V)):
        close(name, x.grad, y.grad, torch.float32)


def test_dense_attention_values_inside_keys():
    """MQA on latents: v is a view of k, loaded once."""
    latents = make(2, 300, 1, 40, dtype=torch.float32)
    q = make(2, 2, 6, 40, dtype=torch.float32)
    out, _ = dense_attention(q, latents, latents[..., :32], 0.2)
    out.sum().backward()
    Q, L = doubled(q, latents)
    want, _ = attention_reference(Q, L, L[..., :32], 0.2, None, None)
    want.sum().backward()
    close("out", out, want, torch.float32)
    close("dlatents", latents.grad, L.grad, torch.float32)


DENSE = [  # B, S, T, H, Hk, d, HI, dI, kind
    (2, 37, 37, 3, 3, 24, 4, 32, None), (1, 70, 70, 1, 1, 40, 3, 16, "packed"), (2, 12, 45, 5, 1, 80, 9, 24, None),
    (1, 40, 50, 2, 2, 16, 2, 16, "window"), (1, 1, 1, 1, 1, 16, 1, 16, None)]
DENSE_BIG = [(2, 500, 500, 3, 3, 192, 64, 128, "packed"), (1, 700, 700, 16, 16, 192, 64, 128, None), (1, 700, 1300, 12, 1, 160, 16, 64, None),
             (1, 515, 515, 12, 12, 96, 4, 32, None), (3, 200, 900, 8, 8, 128, 10, 128, "window")]


def loss_inputs(B, S, T, HI, dI, dtype, size):
    """q and k in quarters, so that every q.k is exact and no rounding decides on which side of the relu's kink it falls"""
    w = (torch.randn(B, S, HI, device=DEVICE) * size * HI**-0.5 * dI**-0.5).requires_grad_()
    quarters = lambda *shape: (torch.randn(*shape, device=DEVICE).mul(4).round() / 4).to(dtype).requires_grad_()
    return quarters(B, S, HI, dI), quarters(B, T, dI), w


def check_loss(loss, reference, constants, trained, dtype, trailing=()):
    """kl, kl_uniform and the gradients for a random incoming gradient and for the constant one (another code path)"""
    doubles, want_inputs = doubled(*[x for x in constants if x.is_floating_point()]), doubled(*trained)
    doubles = doubles + [x for x in constants if not x.is_floating_point()]
    scale = constants[0].shape[-1] ** -0.5
    want, want_uniform = reference(*doubles, scale, *want_inputs, *trailing)
    for r in (torch.randn_like(want), torch.full_like(want, -0.37), (torch.rand_like(want) < 0.8) * 2.0):
        kl, uniform = loss(*constants, scale, *trained, *trailing)
        assert (kl - want).abs().max() < TOLERANCE[dtype][0] * (1 + want.abs().max()), (kl - want).abs().max()
        assert (uniform - want_uniform).abs().max() < TOLERANCE[dtype][0] * (1 + want_uniform.abs().max())
        got = torch.autograd.grad(kl, trained, r.float())
        for name, x, y in zip(("dq_index", "dk_index", "dw"), got, torch.autograd.grad(want, want_inputs, r, retain_graph=True)):
            if want.shape[1] > 1:
                close(name, x, y, dtype, factor=1.5)
            else:
                assert (x - y).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("shape", DENSE + [pytest.param(s, marks=big) for s in DENSE_BIG])
def test_indexer_loss_dense(shape, size, dtype, monkeypatch):
    import kernels
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 2**12 if shape[1] < 100 else 2**19)  # several chunks
    B, S, T, H, Hk, d, HI, dI, kind = shape
    first, last = documents(B, S, T, kind)
    q, k = make(B, S, H, d, dtype=dtype, grad=False), make(B, T, Hk, d, dtype=dtype, grad=False)
    lse = attention_reference(q.double(), k.double(), k.double(), d**-0.5, first, last)[1].float()
    check_loss(indexer_loss_dense, loss_dense_reference, (q, k, lse), loss_inputs(B, S, T, HI, dI, dtype, size), dtype, (first, last))


def test_indexer_loss_dense_equal_scores_and_repeats():
    """All scores equal: KL is that against the uniform distribution, closed relus pass no gradient. Two runs: the same bits."""
    q, k = make(1, 90, 2, 32, dtype=torch.float16, grad=False), make(1, 90, 2, 32, dtype=torch.float16, grad=False)
    lse = dense_attention(q, k, k, 0.2)[1]
    qi, ki, w = make(1, 90, 4, 32, dtype=torch.float16), make(1, 90, 32, dtype=torch.float16), make(1, 90, 4, dtype=torch.float32)
    zero = torch.zeros_like(qi).requires_grad_()
    kl, uniform = indexer_loss_dense(q, k, lse, 0.2, zero, ki, w)
    assert (kl - uniform).abs().max() < 1e-5
    assert all(x.abs().max() == 0 for x in torch.autograd.grad(kl.sum(), (zero, ki, w)))
    runs = []
    for _ in range(2):
        kl = indexer_loss_dense(q, k, lse, 0.2, qi, ki, w)[0]
        runs.append((kl, *torch.autograd.grad(kl.pow(2).sum(), (qi, ki, w))))
    assert all(torch.equal(a, b) for a, b in zip(*runs))


SPARSE = [(2, 11, 16, 3, 24, 8, 4, 32), (1, 10, 40, 5, 40, 33, 9, 24), (1, 7, 20, 2, 16, 50, 1, 16), (1, 1, 1, 1, 16, 4, 2, 16)]  # B,S,T,H,D,K,HI,dI
SPARSE_BIG = [(2, 600, 600, 12, 160, 256, 4, 32), (1, 130, 3000, 128, 576, 2048, 64, 128), (1, 700, 700, 12, 288, 512, 16, 64)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 30.0])
@pytest.mark.parametrize("shape", SPARSE + [pytest.param(s, marks=big) for s in SPARSE_BIG])
def test_indexer_loss_sparse(shape, size, dtype, monkeypatch):
    import kernels
    monkeypatch.setattr(kernels, "LOSS_CHUNK", 2**7 if shape[1] < 300 else 2**18)
    B, S, T, H, D, K, HI, dI = shape
    key = torch.rand(B, S, T, device=DEVICE).masked_fill(~visible(S, T, None, None), -1)
    order = key.topk(min(K, T), -1)
    chosen = order.indices.masked_fill(order.values < 0, T).sort(-1).values
    indices = torch.full((B, S, K), -1, dtype=torch.int32, device=DEVICE)
    indices[..., :chosen.shape[-1]] = chosen.masked_fill(chosen == T, -1).int()
    if S > 3:
        indices[:, 2] = -1
    q, latents = make(B, S, H, D, dtype=dtype, grad=False), make(B, T, D, dtype=dtype, grad=False)
    tokens = latents.double()[torch.arange(B, device=DEVICE)[:, None, None], indices.clamp(min=0).long()]
    logits = torch.einsum("bshd,bskd->bshk", q.double(), tokens) * D**-0.5
    lse = logits.masked_fill((indices < 0)[:, :, None], float("-inf")).logsumexp(-1).float()
    check_loss(lambda q, l, lse, idx, *rest: indexer_loss_sparse(q, l, lse, idx, *rest), loss_sparse_reference, (q, latents, lse, indices),
               loss_inputs(B, S, T, HI, dI, dtype, size), dtype)


def test_bounds_beyond_the_keys():
    """first below 0 and last beyond T - 1 (40 is no multiple of a tile) mean the first and the last key, as in the reference."""
    q, k = make(1, 4, 2, 32, dtype=torch.float32, grad=False), make(1, 40, 2, 32, dtype=torch.float32, grad=False)
    index, last = loss_inputs(1, 4, 40, 3, 32, torch.float32, 1.0), torch.tensor([[39, 45, 200, 38]], device=DEVICE, dtype=torch.int32)
    results = []
    for bounds in ((last - 240, last), (torch.zeros_like(last), last.clamp(max=39))):
        out, lse = dense_attention(q, k, k, 0.2, *bounds)
        kl = indexer_loss_dense(q, k, lse, 0.2, *index, *bounds)[0]
        results.append((out, lse, kl, *torch.autograd.grad(kl.sum(), index)))
    assert all(torch.equal(a, b) for a, b in zip(*results))


Q, K, LSE, LATENTS, QI, KI, W = (torch.zeros(shape, device=DEVICE) for shape in ((1, 3, 2, 16), (1, 5, 2, 16), (1, 3, 2), (1, 5, 16), (1, 3, 4, 16), (1, 5, 16), (1, 3, 4)))
CHOSEN = torch.zeros(1, 3, 2, dtype=torch.int32, device=DEVICE)


@pytest.mark.parametrize("call,message", [
    (lambda: dense_attention(Q, K[..., :8], K, 1.0), r"k is \(1, 5, 2, 8\) and should be \(1, 5, 2, 16\)"),
    (lambda: dense_attention(Q, K, K[:, :4], 1.0), r"k is \(1, 5, 2, 16\)"),
    (lambda: dense_attention(Q, K[:, :, :1].expand(-1, -1, 3, -1), K[:, :, :1].expand(-1, -1, 3, -1), 1.0), "2 query heads over 3 key heads"),
    (lambda: dense_attention(Q.expand(40000, -1, -1, -1), K.expand(40000, -1, -1, -1), K.expand(40000, -1, -1, -1), 1.0), "split the batch"),
    (lambda: indexer_loss_dense(Q, K, LSE.mT, 1.0, QI, KI, W), r"lse is \(1, 2, 3\)"),
    (lambda: indexer_loss_dense(Q, K, LSE, 1.0, QI, KI[:, 1:], W), "k_index is"),
    (lambda: indexer_loss_sparse(Q, LATENTS, LSE.mT, CHOSEN, 1.0, QI, KI, W), "lse is"),
    (lambda: indexer_loss_sparse(Q, LATENTS, LSE, CHOSEN, 1.0, QI, KI[:, 1:], W), "k_index is"),
    (lambda: indexer_loss_sparse(Q, LATENTS, LSE, CHOSEN[:, 1:], 1.0, QI, KI, W), "indices is"),
    (lambda: indexer_loss_sparse(Q, LATENTS, LSE, CHOSEN.long(), 1.0, QI, KI, W), "indices are int32, not torch.int64")])
def test_shapes_that_do_not_fit_are_refused(call, message):
    """One line, instead of what lies behind a tensor in memory."""
    with pytest.raises(ValueError, match=message):
        call()


def test_heads_that_lie_far_apart_are_copied():
    """The kernels count heads in 32 bits: (B,H,S,d) read as (B,S,H,d) is fine until it has 2^31 elements."""
    near, far = (torch.empty_strided((1, 2, 18, 16), (18 * s, 16, s, 1), device="meta") for s in (2**20, 2**27))
    assert [x.stride() for x in kernels._unit(near, far)] == [near.stride(), (576, 288, 16, 1)]


@pytest.mark.parametrize("cross_entropy", [model.cross_entropy, kernels.cross_entropy], ids=["torch", "triton"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (5, 37), (3, 5000), (2, 4096)] + [pytest.param((300, 50304), marks=big)])
@pytest.mark.parametrize("kind", ["random", "huge", "equal", "sure"])
def test_cross_entropy(cross_entropy, dtype, shape, kind):
    logits = torch.randn(*shape, device=DEVICE) * dict(random=1, huge=1000, equal=0, sure=1)[kind]
    targets = torch.randint(0, shape[1], shape[:1], device=DEVICE)
    if kind == "sure":  # p = 1 - tiny: the gradient there is the difference
        logits.scatter_(1, targets[:, None], 14.0)
    logits = logits.to(dtype)
    exact = logits.double().requires_grad_()
    want = torch.nn.functional.cross_entropy(exact, targets, reduction="none")
    want_grad, = torch.autograd.grad(want.sum(), exact)
    x = logits.clone()
    nats = cross_entropy(x, targets, False)
    assert torch.equal(x, logits) and nats.dtype == torch.float32 and nats.shape == shape[:1]
    assert ((nats - want).abs() <= 2e-6 * (1 + exact.abs().amax(1))).all(), (nats - want).abs().max()
    assert torch.equal(cross_entropy(x, targets, True), nats)
    near_one = 5e-7  # p - 1 in float32: a few places of 1
    allowed = (2 * torch.finfo(dtype).eps + 4e-7 * (1 + exact.detach().abs().amax(1, keepdim=True))) * want_grad.abs() + torch.finfo(dtype).smallest_normal * 1e-2
    assert ((x - want_grad).abs() <= allowed + near_one * (want_grad < 0)).all(), ((x - want_grad).abs() / allowed).max()
