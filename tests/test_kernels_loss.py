"""The kernels of the indexer's two losses (triton_kernels/loss.py) held to float64, to the reference, and to
their contract."""
import math

import pytest
import torch

import indexer
import kernels
import sparse_attn
from tests.common import assert_close
from tests.inputs import CUDA, DEVICE, DTYPES, EPS, big, bounds, double, exact_attention, random, visible
from triton_kernels import loss

NAMES = ("dq_index", "dk_index", "dw")


@pytest.fixture(autouse=True)
def tiles(monkeypatch):
    """In the interpreter tiles of 16 queries and keys: it takes as long for rows that only fill a tile as for
    others, and so few queries make several tiles."""
    if not CUDA:
        small = loss.LossTiles(block_s=16, block_t=16, num_stages=1, num_warps=4)
        for name in ("loss_target_tiles", "loss_scores_tiles", "loss_dq_tiles", "loss_dk_tiles"):
            monkeypatch.setattr(loss, name, lambda *_: small)


# ---- in float64 ----

def exact_kl(p, scores, seen):
    """kl and kl_uniform of float64 tensors (B,S,n)"""
    log_q = torch.log_softmax(scores.masked_fill(~seen, -1e30), -1).masked_fill(~seen, 0)
    entropy = torch.special.xlogy(p, p).sum(-1)
    return entropy - (p * log_q).sum(-1), entropy + p.sum(-1) * seen.sum(-1).clamp(min=1).log()


def exact_dense(q, k, lse, scale, q_index, k_index, w, first, last):
    """indexer_loss_dense on float64 tensors -> kl, kl_uniform, scores"""
    seen = visible(q.shape[1], k.shape[1], first, last).expand(q.shape[0], -1, -1)
    logits = torch.einsum("bshd,bthd->bsht", q, k.expand(-1, -1, q.shape[2], -1)) * scale
    p = torch.exp(logits - lse[..., None]).masked_fill(~seen[:, :, None], 0).mean(2)
    dots = torch.einsum("bshd,btd->bsht", q_index, k_index)
    scores = torch.einsum("bsht,bsh->bst", dots.relu(), w)
    return *exact_kl(p, scores, seen), scores


def exact_sparse(q, latents, lse, indices, scale, q_index, k_index, w):
    """indexer_loss_sparse on float64 tensors -> kl, kl_uniform, scores"""
    seen = indices >= 0
    token = indices.clamp(min=0).long()
    batch = torch.arange(q.shape[0], device=q.device)[:, None, None]
    logits = torch.einsum("bshd,bskd->bshk", q, latents[batch, token]) * scale
    p = torch.exp(logits - lse[..., None]).masked_fill(~seen[:, :, None], 0).mean(2)
    dots = torch.einsum("bshd,bskd->bshk", q_index, k_index[batch, token])
    scores = torch.einsum("bshk,bsh->bsk", dots.relu(), w)
    return *exact_kl(p, scores, seen), scores


# ---- inputs ----

def quarters(*shape, dtype):
    """Random multiples of 1/4: every product is exact, and no rounding decides on which side of the relu's
    kink it falls."""
    return (random(*shape).mul(4).round() / 4).to(dtype).requires_grad_()


def indexer_inputs(B, S, T, HI, DI, dtype, size=1.0):
    """q_index, k_index, w; `size`: that of the scores, roughly"""
    w = random(B, S, HI) * size * HI**-0.5 * DI**-0.5
    return quarters(B, S, HI, DI, dtype=dtype), quarters(B, T, DI, dtype=dtype), w.requires_grad_()


def dense_inputs(B, S, T, H, Hk, D, dtype, first, last):
    """q, k, and the lse of their attention"""
    q = random(B, S, H, D, dtype=dtype)
    k = random(B, T, Hk, D, dtype=dtype)
    lse = exact_attention(q.double(), k.double(), k.double(), D**-0.5, first, last)[1]  # (B, S, H)
    return q, k, lse.float()


def sparse_inputs(B, S, T, H, D, K, dtype):
    """q, latents, the lse over the selection, and random selections, of which query 2's is empty"""
    key = torch.rand(B, S, T, device=DEVICE).masked_fill(~visible(S, T, None, None), -1)
    best = key.topk(min(K, T), -1)
    chosen = best.indices.masked_fill(best.values < 0, T).sort(-1).values  # (B, S, min(K, T))
    indices = torch.full((B, S, K), -1, dtype=torch.int32, device=DEVICE)
    indices[..., :chosen.shape[-1]] = chosen.masked_fill(chosen == T, -1).int()
    if S > 3:
        indices[:, 2] = -1
    q = random(B, S, H, D, dtype=dtype)
    latents = random(B, T, D, dtype=dtype)
    tokens = latents.double()[torch.arange(B, device=DEVICE)[:, None, None], indices.clamp(min=0).long()]
    logits = torch.einsum("bshd,bskd->bshk", q.double(), tokens) * D**-0.5
    lse = logits.masked_fill((indices < 0)[:, :, None], float("-inf")).logsumexp(-1)
    return q, latents, lse.float(), indices


def same(x, y):
    """Equal, up to the order in which a GPU's float32 atomics add."""
    assert (x - y).abs().max() <= (8 * EPS * y.abs().max() if CUDA else 0)


# ---- against float64 ----

def check_kl(got, want, D, largest_score, n):
    """kl, kl_uniform against float64: a sum of D products in the exponent of p, log softmax at the size of
    the scores, and of the logarithm of the number n of candidates."""
    for name, x, y in zip(("kl", "kl_uniform"), got, want):
        allowed = EPS * (D + 4 * (1 + largest_score + math.log(n)))
        assert (x - y).abs().max() <= allowed, f"{name}: {(x - y).abs().max():.1e} beyond {allowed:.1e}"


def check_gradients(got, want, D, largest_score, dtype):
    """Against float64. In 16 bits g, w q and the result are rounded, by eps / 2 each at most; in float32 it
    is the softmax of rounded scores, and a row may hold an eighth of the mean."""
    rounded = 1.5 * torch.finfo(dtype).eps if dtype != torch.float32 else 0
    whole = EPS * (16 + D + largest_score)
    for name, x, y in zip(NAMES, got, want):
        if y.abs().max() == 0:  # a single candidate: kl is 0 whatever the scores
            assert x.abs().max() <= whole, name
            continue
        # a row is a token's: all heads together
        assert_close(x.flatten(2), y.flatten(2), rounded + whole, 2 * rounded + 8 * whole, name)


def check_loss(function, exact_function, frozen, trained, others, dtype):
    """Values, and gradients for incoming gradients of three kinds: of either sign, constant (whose second
    sweep is empty), and zero for some rows (float32 only: the sweep passes over rows, whatever their
    dtype)."""
    D = frozen[0].shape[-1]
    scale = D**-0.5
    exact_trained = [double(x) for x in trained]
    exact_frozen = [x.double() if x.is_floating_point() else x for x in frozen]
    want_kl, want_uniform, scores = exact_function(*exact_frozen, scale, *exact_trained, *others)
    largest = scores.abs().max().item()
    kl, uniform = function(*frozen, scale, *trained, *others)
    assert not uniform.requires_grad and kl.dtype == uniform.dtype == torch.float32
    check_kl((kl, uniform), (want_kl, want_uniform), D, largest, scores.shape[-1])
    incoming = [torch.randn_like(want_kl), torch.full_like(want_kl, -0.37)]
    if dtype == torch.float32:
        incoming.append((torch.rand_like(want_kl) < 0.8) * 2.0)
    for dkl in incoming:
        got = torch.autograd.grad(kl, trained, dkl.float(), retain_graph=True)
        want = torch.autograd.grad(want_kl, exact_trained, dkl.double(), retain_graph=True)
        assert [x.dtype for x in got] == [x.dtype for x in trained]
        check_gradients(got, want, D, largest, dtype)


DENSE = [  # B, S, T, H, Hk, D, HI, DI, bounds, size of the scores
    (1, 37, 37, 3, 3, 24, 4, 32, None, 1.0), (1, 40, 70, 1, 1, 40, 3, 16, "packed", 30.0),
    (1, 12, 45, 5, 1, 80, 9, 24, None, 1.0), (1, 20, 50, 2, 2, 16, 2, 16, "window", 30.0),
    (1, 1, 1, 1, 1, 16, 1, 16, None, 1.0)]
OWN_TILES = DENSE[1]  # in the interpreter, too, in the tiles of a GPU
DENSE_BIG = [
    (2, 500, 500, 3, 3, 192, 64, 128, "packed", 1.0), (1, 700, 700, 16, 16, 192, 64, 128, None, 1.0),
    (1, 700, 700, 16, 16, 192, 64, 128, None, 30.0), (1, 700, 1300, 12, 1, 160, 16, 64, None, 1.0),
    (1, 515, 515, 12, 12, 96, 4, 32, None, 30.0), (3, 200, 900, 8, 8, 128, 10, 128, "window", 1.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", DENSE + [pytest.param(shape, marks=big) for shape in DENSE_BIG])
def test_dense(shape, dtype, monkeypatch):
    """(T15, T18, T20) one block of queries at a time, on a GPU several"""
    B, S, T, H, Hk, D, HI, DI, kind, size = shape
    if shape == OWN_TILES:
        monkeypatch.undo()
    monkeypatch.setattr(loss, "LOSS_CHUNK", 2**19 if CUDA else 1)
    first, last = bounds(B, S, T, kind)
    frozen = dense_inputs(B, S, T, H, Hk, D, dtype, first, last)
    trained = indexer_inputs(B, S, T, HI, DI, dtype, size)
    check_loss(kernels.indexer_loss_dense, exact_dense, frozen, trained, (first, last), dtype)


def test_dense_chunks_across_sequences(monkeypatch):
    """Chunks of three blocks of queries, where a sequence has two: one and a half, and half a sequence."""
    block = loss.loss_scores_tiles(torch.float32, torch.device(DEVICE)).block_s
    S = block + 5
    monkeypatch.setattr(loss, "LOSS_CHUNK", 3 * block * 128)
    frozen = dense_inputs(2, S, S, 2, 1, 16, torch.float32, None, None)
    trained = indexer_inputs(2, S, S, 3, 16, torch.float32)
    exact_trained = [double(x) for x in trained]
    exact_frozen = [x.double() for x in frozen]
    want_kl, want_uniform, scores = exact_dense(*exact_frozen, 0.25, *exact_trained, None, None)
    largest = scores.abs().max().item()
    kl, uniform = kernels.indexer_loss_dense(*frozen, 0.25, *trained)
    check_kl((kl, uniform), (want_kl, want_uniform), 16, largest, S)
    dkl = random(2, S)
    want = torch.autograd.grad(want_kl, exact_trained, dkl.double())
    check_gradients(torch.autograd.grad(kl, trained, dkl), want, 16, largest, torch.float32)


SPARSE = [  # B, S, T, H, D, K, HI, DI, size of the scores
    (2, 11, 16, 3, 24, 8, 4, 32, 1.0), (1, 10, 40, 5, 40, 33, 9, 24, 30.0), (1, 7, 20, 2, 16, 50, 1, 16, 1.0),
    (1, 1, 1, 1, 16, 4, 2, 16, 1.0)]
SPARSE_BIG = [
    (2, 600, 600, 12, 160, 256, 4, 32, 1.0), (1, 130, 3000, 128, 576, 2048, 64, 128, 1.0),
    (1, 130, 3000, 128, 576, 2048, 64, 128, 30.0), (1, 700, 700, 12, 288, 512, 16, 64, 30.0)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SPARSE + [pytest.param(shape, marks=big) for shape in SPARSE_BIG])
def test_sparse(shape, dtype, monkeypatch):
    """(T11, T15, T16, T18, T20, T24) in several chunks, K beyond T among them"""
    B, S, T, H, D, K, HI, DI, size = shape
    monkeypatch.setattr(loss, "LOSS_CHUNK", 2**18 if CUDA else 2**7)
    frozen = sparse_inputs(B, S, T, H, D, K, dtype)
    trained = indexer_inputs(B, S, T, HI, DI, dtype, size)
    check_loss(kernels.indexer_loss_sparse, exact_sparse, frozen, trained, (), dtype)


# ---- against the reference ----

def check_backends(name, arguments, trained):
    """float32: values and gradients of both backends differ by rounding alone."""
    results = []
    for module in (kernels, indexer):
        kl, uniform = getattr(module, name)(*arguments)
        results.append(((kl, uniform), torch.autograd.grad((kl * kl.detach()).sum(), trained)))
    (values, gradients), (want_values, want_gradients) = results
    D = arguments[0].shape[-1]
    check_kl(values, want_values, D, 6, arguments[1].shape[1])
    check_gradients(gradients, want_gradients, D, 6, torch.float32)


@pytest.mark.parametrize("kind", [None, "packed", "window"])
def test_backends_agree_dense(kind):
    first, last = bounds(1, 35, 50, kind)
    q, k, lse = dense_inputs(1, 35, 50, 3, 3, 24, torch.float32, first, last)
    trained = indexer_inputs(1, 35, 50, 4, 16, torch.float32)
    check_backends("indexer_loss_dense", (q, k, lse, 24**-0.5, *trained, first, last), trained)


def test_backends_agree_sparse():
    q, latents, lse, indices = sparse_inputs(1, 12, 40, 3, 24, 9, torch.float32)
    trained = indexer_inputs(1, 12, 40, 4, 16, torch.float32)
    check_backends("indexer_loss_sparse", (q, latents, lse, indices, 24**-0.5, *trained), trained)


SPECIAL = [float("nan"), float("inf"), -float("inf")]
INPUTS = ["q", "k", "q_index", "k_index", "w"]


def check_places(name, value, *arguments):
    """kl and kl_uniform are finite in the same places in both backends; a NaN is never hidden."""
    got = getattr(kernels, name)(*arguments)
    want = getattr(indexer, name)(*arguments)
    for result, x, y in zip(("kl", "kl_uniform"), got, want):
        assert torch.equal(x.isfinite(), y.isfinite()), f"{result}: {x.tolist()} instead of {y.tolist()}"
    if math.isnan(value):
        assert want[0].isnan().any()


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", INPUTS)
def test_not_finite_dense(where, value):
    """A NaN or an infinity in any input makes the losses of the same queries not finite as in the reference,
    in packed documents, one of them of a single token."""
    S = 13
    T = 20
    first = torch.tensor([0, 0, 0, 8, 8, 8, 14, 14, 12, 12, 12, 12, 19], device=DEVICE).expand(1, S)
    for position in (7, 10, 12):
        x = dict(q=random(1, S, 3, 16), k=random(1, T, 3, 16))
        trained = indexer_inputs(1, S, T, 3, 16, torch.float32)
        x.update(zip(("q_index", "k_index", "w"), (y.detach() for y in trained)))
        x[where][0, position, ..., 1] = value
        _, lse = sparse_attn.dense_attention(x["q"], x["k"], x["k"], 0.25, first, None)
        trained = x["q_index"], x["k_index"], x["w"]
        check_places("indexer_loss_dense", value, x["q"], x["k"], lse, 0.25, *trained, first, None)


@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", INPUTS)
def test_not_finite_sparse(where, value):
    """The same of the sparse loss: a token concerns the queries that selected it. In 16 bits neighbours share
    its list; heads are padded to a power of two."""
    S = 9
    T = 12
    for position in (0, 5, 8):
        q, latents, _, indices = sparse_inputs(1, S, T, 3, 16, 5, torch.float16)
        x = dict(q=q, k=latents)
        trained = indexer_inputs(1, S, T, 3, 16, torch.float16)
        x.update(zip(("q_index", "k_index", "w"), (y.detach() for y in trained)))
        x[where][0, position, ..., 1] = value
        _, lse = sparse_attn.sparse_attention(x["q"], x["k"], indices, 0.25, 16)
        trained = x["q_index"], x["k_index"], x["w"]
        check_places("indexer_loss_sparse", value, x["q"], x["k"], lse, indices, 0.25, *trained)


# ---- the contract ----

def test_equal_scores():
    """(T12) All scores equal: KL is that against the uniform distribution; closed relus pass no gradient."""
    q, k, lse = dense_inputs(1, 50, 50, 2, 2, 16, torch.float16, None, None)
    _, k_index, w = indexer_inputs(1, 50, 50, 4, 16, torch.float16)
    zero = torch.zeros(1, 50, 4, 16, dtype=torch.float16, device=DEVICE, requires_grad=True)
    kl, uniform = kernels.indexer_loss_dense(q, k, lse, 0.25, zero, k_index, w)
    assert (kl - uniform).abs().max() <= 16 * EPS * (1 + math.log(50))
    for gradient in torch.autograd.grad(kl.sum(), (zero, k_index, w)):
        assert (gradient == 0).all()


def test_dense_repeats_bit_equal():
    """No atomics: two runs give the same bits, forward and backward."""
    q, k, lse = dense_inputs(1, 20, 40, 2, 2, 16, torch.float16, None, None)
    trained = indexer_inputs(1, 20, 40, 4, 16, torch.float16)
    runs = []
    for _ in range(2):
        kl, uniform = kernels.indexer_loss_dense(q, k, lse, 0.25, *trained)
        runs.append((kl, uniform, *torch.autograd.grad(kl.pow(2).sum(), trained)))
    for x, y in zip(*runs):
        assert torch.equal(x, y)


@pytest.mark.parametrize("sparse", [False, True])
def test_incoming_gradient_of_any_layout(sparse):
    """(T18) An expanded or a transposed incoming gradient is as good as a contiguous one, twice the gradient
    gives twice the gradients; and a loss that nobody differentiates gives the same values."""
    trained = indexer_inputs(2, 10, 20, 3, 16, torch.float32)
    frozen_indexer = [x.detach() for x in trained]
    if sparse:
        q, latents, lse, indices = sparse_inputs(2, 10, 20, 2, 16, 6, torch.float32)
        kl, uniform = kernels.indexer_loss_sparse(q, latents, lse, indices, 0.25, *trained)
        plain = kernels.indexer_loss_sparse(q, latents, lse, indices, 0.25, *frozen_indexer)
    else:
        q, k, lse = dense_inputs(2, 10, 20, 2, 2, 16, torch.float32, None, None)
        kl, uniform = kernels.indexer_loss_dense(q, k, lse, 0.25, *trained)
        plain = kernels.indexer_loss_dense(q, k, lse, 0.25, *frozen_indexer)
    assert torch.equal(kl, plain[0]) and torch.equal(uniform, plain[1])
    assert not plain[0].requires_grad

    def gradients(dkl):
        return torch.autograd.grad(kl, trained, dkl, retain_graph=True)

    dkl = random(2, 10)
    for x, y, z in zip(gradients(dkl), gradients(dkl.T.contiguous().T), gradients(2 * dkl)):
        same(x, y)
        same(2 * x, z)
    for x, y in zip(gradients(torch.ones((), device=DEVICE).expand(2, 10)), gradients(torch.ones_like(dkl))):
        same(x, y)


def test_nothing_reaches_the_frozen_attention():
    """(T14) q, k, latents and lse that require gradients get none."""
    frozen = [x.requires_grad_() for x in dense_inputs(1, 5, 9, 2, 2, 16, torch.float32, None, None)]
    trained = indexer_inputs(1, 5, 9, 2, 16, torch.float32)
    kl, _ = kernels.indexer_loss_dense(*frozen, 0.25, *trained)
    assert torch.autograd.grad(kl.sum(), frozen, allow_unused=True) == (None, None, None)
    kl, _ = kernels.indexer_loss_dense(*frozen, 0.25, *[x.detach() for x in trained])
    assert not kl.requires_grad
    *frozen, indices = sparse_inputs(1, 5, 9, 2, 16, 4, torch.float32)
    frozen = [x.requires_grad_() for x in frozen]
    kl, _ = kernels.indexer_loss_sparse(*frozen, indices, 0.25, *trained)
    assert torch.autograd.grad(kl.sum(), frozen, allow_unused=True) == (None, None, None)


def test_bounds_beyond_the_keys():
    """first below 0 and last beyond T - 1 (40 is no multiple of a tile) mean the first and the last key; a
    first beyond every padding sees nothing and disturbs nobody."""
    q, k, _ = dense_inputs(1, 5, 40, 2, 2, 32, torch.float32, None, None)
    first = torch.tensor([[-200, -1, 3000, 5, 1000]], device=DEVICE, dtype=torch.int32)
    last = torch.tensor([[39, 45, 3001, 38, 2000]], device=DEVICE, dtype=torch.int32)
    lse = kernels.dense_attention(q, k, k, 0.2, first, last)[1]
    trained = indexer_inputs(1, 5, 40, 3, 32, torch.float32)
    results = []
    for pair in ((first, last), (first.clamp(min=0), last.clamp(max=39))):
        kl, uniform = kernels.indexer_loss_dense(q, k, lse, 0.2, *trained, *pair)
        results.append((kl, uniform, *torch.autograd.grad(kl.sum(), trained)))
    for x, y in zip(*results):
        same(x, y)
    kl, uniform = results[0][:2]
    assert (kl[0, [2, 4]] == 0).all() and (uniform[0, [2, 4]] == 0).all()
    want = indexer.indexer_loss_dense(q, k, lse, 0.2, *trained, first, last)[0]
    gradients = torch.autograd.grad(want.sum(), trained)
    check_gradients(results[0][2:], gradients, 32, 6, torch.float32)


def test_bounds_given_and_not():
    """None is causal with the queries at the end: the same bits as these bounds written out."""
    q, k, lse = dense_inputs(1, 13, 45, 2, 1, 24, torch.float32, None, None)
    trained = indexer_inputs(1, 13, 45, 3, 16, torch.float32)
    first = torch.zeros(1, 13, dtype=torch.int64, device=DEVICE)
    last = torch.arange(32, 45, device=DEVICE)
    dkl = random(1, 13)
    results = []
    for pair in ((None, None), (first, None), (None, last), (first, last)):
        kl, uniform = kernels.indexer_loss_dense(q, k, lse, 0.2, *trained, *pair)
        results.append((kl, uniform, *torch.autograd.grad(kl, trained, dkl)))
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert torch.equal(x, y)


@pytest.mark.parametrize("of_attention,of_indexer", [
    (torch.float32, torch.float16), (torch.float16, torch.float32)])
def test_mixed_dtypes(of_attention, of_indexer):
    """A float32 indexer beside 16-bit attention, and the reverse: the results of both in float32."""
    first, last = bounds(1, 20, 50, "packed")
    q, k, lse = dense_inputs(1, 20, 50, 2, 2, 16, of_attention, first, last)
    trained = indexer_inputs(1, 20, 50, 3, 16, of_indexer)
    check_loss(kernels.indexer_loss_dense, exact_dense, (q, k, lse), trained, (first, last), of_indexer)
    frozen = sparse_inputs(1, 9, 20, 2, 16, 6, of_attention)
    trained = indexer_inputs(1, 9, 20, 3, 16, of_indexer)
    check_loss(kernels.indexer_loss_sparse, exact_sparse, frozen, trained, (), of_indexer)


@pytest.mark.parametrize("B,S,T,K", [(1, 0, 5, 3), (2, 3, 0, 3), (2, 3, 5, 0), (0, 3, 5, 3)])
def test_nothing_to_learn_from(B, S, T, K):
    """No queries, keys, slots or sequences: losses of 0, gradients of 0."""
    trained = indexer_inputs(B, S, T, 2, 16, torch.float32)
    q = random(B, S, 2, 16)
    lse = torch.full((B, S, 2), float("-inf"), device=DEVICE)
    indices = torch.full((B, S, K), -1, dtype=torch.int32, device=DEVICE)
    last = torch.full((B, S), -1, dtype=torch.int32, device=DEVICE)
    for kl, uniform in (
            kernels.indexer_loss_dense(q, random(B, T, 2, 16), lse, 0.25, *trained, None, last),
            kernels.indexer_loss_sparse(q, random(B, T, 16), lse, indices, 0.25, *trained)):
        assert kl.shape == uniform.shape == (B, S)
        assert (kl == 0).all() and (uniform == 0).all()
        for x, gradient in zip(trained, torch.autograd.grad(kl.sum(), trained)):
            assert gradient.shape == x.shape and (gradient == 0).all()


# ---- registered operations ----

def flat_dense(kind, learns):
    """Arguments of torch.ops.dsa.indexer_loss_dense"""
    first, last = bounds(1, 5, 9, kind)
    q, k, lse = dense_inputs(1, 5, 9, 2, 1, 16, torch.float32, first, last)
    trained = [x.requires_grad_(learns) for x in indexer_inputs(1, 5, 9, 3, 16, torch.float32)]
    return q, k, lse, 0.25, *trained, first, last, learns


@pytest.mark.parametrize("kind,learns", [(None, True), ("window", True), (None, False)])
def test_dense_registered(kind, learns):
    """Schema, fake results and autograd of the operation, as torch.compile needs them."""
    torch.library.opcheck(torch.ops.dsa.indexer_loss_dense, flat_dense(kind, learns))


def test_dense_backward_registered():
    *arguments, learns = [x.detach() if torch.is_tensor(x) else x for x in flat_dense("window", True)]
    gradients = torch.ops.dsa.indexer_loss_dense(*arguments, learns)[2:]
    torch.library.opcheck(torch.ops.dsa.indexer_loss_dense_backward, (random(1, 5), *arguments, *gradients))


@pytest.mark.parametrize("learns", [True, False])
def test_sparse_registered(learns):
    frozen = sparse_inputs(1, 5, 9, 2, 16, 4, torch.float16)
    trained = [x.requires_grad_(learns) for x in indexer_inputs(1, 5, 9, 3, 16, torch.float16)]
    torch.library.opcheck(torch.ops.dsa.indexer_loss_sparse, (*frozen, 0.25, *trained, learns))


def test_sparse_backward_registered():
    q, latents, lse, indices = sparse_inputs(1, 5, 9, 2, 16, 4, torch.float16)
    trained = [x.detach() for x in indexer_inputs(1, 5, 9, 3, 16, torch.float16)]
    g = torch.ops.dsa.indexer_loss_sparse(q, latents, lse, indices, 0.25, *trained, True)[2]
    torch.library.opcheck(torch.ops.dsa.indexer_loss_sparse_backward, (random(1, 5), indices, *trained, g))


@pytest.mark.parametrize("sparse", [False, True])
def test_compiles_into_one_graph(sparse):
    """The checks and copies around the operations leave no break in a graph; its results are the eager
    ones."""
    trained = indexer_inputs(1, 5, 9, 3, 16, torch.float32)
    if sparse:
        function = kernels.indexer_loss_sparse
        arguments = (*sparse_inputs(1, 5, 9, 2, 16, 4, torch.float32), 0.25, *trained)
    else:
        function = kernels.indexer_loss_dense
        first, last = bounds(1, 5, 9, "window")
        frozen = dense_inputs(1, 5, 9, 2, 2, 16, torch.float32, first, last)
        arguments = (*frozen, 0.25, *trained, first, last)
    results = []
    for call in (torch.compile(function, fullgraph=True, backend="aot_eager"), function):
        kl, uniform = call(*arguments)
        results.append((kl, uniform, *torch.autograd.grad(kl.square().sum(), trained)))
    for x, y in zip(*results):
        same(x, y)


@pytest.mark.parametrize("sparse,change,message", [
    (False, dict(lse=(1, 2, 3)), r"lse is \(1, 2, 3\)"), (False, dict(k_index=(1, 4, 16)), "k_index is"),
    (False, dict(k=(1, 5, 3, 16)), "k is"), (False, dict(w=(1, 3, 5)), "w is"),
    (True, dict(lse=(1, 2, 3)), "lse is"), (True, dict(k_index=(1, 4, 16)), "k_index is"),
    (True, dict(indices=(1, 2, 2)), "indices is"), (True, dict(k=(1, 5, 8)), "latents is"),
    (True, dict(dtype=torch.int64), "indices are int32, not torch.int64")])
def test_shapes_that_do_not_fit_are_refused(sparse, change, message):
    """One line, instead of what lies behind a tensor in memory."""
    shapes = dict(
        q=(1, 3, 2, 16), k=(1, 5, 16) if sparse else (1, 5, 2, 16), lse=(1, 3, 2), indices=(1, 3, 2),
        q_index=(1, 3, 4, 16), k_index=(1, 5, 16), w=(1, 3, 4))
    dtype = change.get("dtype", torch.int32)
    shapes.update((name, shape) for name, shape in change.items() if name != "dtype")
    x = {name: torch.zeros(shape, device=DEVICE) for name, shape in shapes.items()}
    trained = x["q_index"], x["k_index"], x["w"]
    with pytest.raises(ValueError, match=message):
        if sparse:
            kernels.indexer_loss_sparse(x["q"], x["k"], x["lse"], x["indices"].to(dtype), 1.0, *trained)
        else:
            kernels.indexer_loss_dense(x["q"], x["k"], x["lse"], 1.0, *trained)
