"""triton_kernels/hopper.py against float64 on the same bf16 inputs: awkward selections, shapes and
magnitudes, gradients, numbers that are not finite, repeats. All but `supported` needs a Hopper GPU.

Bounds. A rounding to bf16 is off by at most BF16 of the number, and by BF16 / sqrt(3) in the root mean square
if it is uniform in between. So n roundings one behind the other, of many terms that are summed, leave a
tensor off by sqrt(n / 3) BF16, and a row, in which one term may prevail, by n BF16. wgmma sums in float32, 16
products at a time: `sum_error` bounds what a logit, hence the logarithm of a probability, may be off by."""
import contextlib
import math

import pytest
import torch

pytest.importorskip("triton.experimental.gluon")

import kernels
import sparse_attn
from tests.common import assert_close, relative_errors
from triton_kernels import hopper
from triton_kernels.common import LOG2E, token_rows

on_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU")
NAN = float("nan")
INF = float("inf")
SCALE = 192**-0.5
BF16 = 2.0**-8
FLOAT32 = 2.0**-23  # wgmma truncates
SHAPES = [  # B, S, T, H, K
    (1, 9, 300, 64, 64), (2, 7, 500, 128, 128), (1, 11, 700, 192, 192), (2, 5, 3000, 128, 2048),
    (1, 300, 2500, 128, 512), (1, 4, 40, 72, 100)]
ONE_TOKEN = (1, 1, 1, 128, 64)


def whole(roundings):
    """What a tensor may be off by, relatively."""
    return math.sqrt(roundings / 3) * BF16


def sum_error(q, k, scale):
    """What scale q.k may be off by where it is summed in float32, exponential and logarithm included."""
    steps = q.shape[-1] / 16 + 4
    return steps * FLOAT32 * (1 + scale * q.float().norm(dim=-1).max() * k.float().norm(dim=-1).max()).item()


@contextlib.contextmanager
def poisoned():
    """torch.empty gives NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def generator(seed):
    return torch.Generator("cuda").manual_seed(seed)


def selection(B, S, T, K, empty=0.1, seed=0):
    """K distinct tokens per query; some slots are empty, anywhere; the second query has no token, the third
    one only, the fourth a tile without any."""
    indices = torch.full((B, S, K), -1, dtype=torch.int32, device="cuda")
    n = min(K, T)
    order = torch.rand(B, S, T, device="cuda", generator=generator(seed)).argsort(-1)  # (B, S, T)
    indices[..., :n] = order[..., :n].int()
    if S > 3:
        indices[:, 1] = -1
        indices[:, 2, 1:] = -1
        indices[:, 3, :64] = -1
    keep = torch.rand(B, S, K, device="cuda", generator=generator(seed + 1)) >= empty
    return indices.masked_fill(~keep, -1)


def inputs(B, S, T, H, seed=0, q_scale=1.0):
    """-> q (B,S,H,576), latents (B,T,576), dout (B,S,H,512), bf16."""
    random = generator(seed)
    q = q_scale * torch.randn(B, S, H, 576, device="cuda", generator=random)
    latents = torch.randn(B, T, 576, device="cuda", generator=random)
    dout = torch.randn(B, S, H, 512, device="cuda", generator=random)
    return q.bfloat16(), latents.bfloat16(), dout.bfloat16()


def packed_cache(B, T, seed=0):
    """A random FP8 cache, 512 e4m3 | 4 float32 scales | 64 bf16, and the bf16 latents that it enters as."""
    random = generator(seed)
    values = torch.randn(B, T, 4, 128, device="cuda", generator=random).mul(100).clamp(-448, 448)
    values = values.to(torch.float8_e4m3fn)
    scales = torch.randn(B, T, 4, device="cuda", generator=random).exp() * 1e-2
    rope = torch.randn(B, T, 64, device="cuda", generator=random).bfloat16()
    parts = (values.flatten(2).view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8))
    latents = torch.cat(((values.float() * scales[..., None]).flatten(2).bfloat16(), rope), -1)
    return torch.cat(parts, -1), latents


def reference(q, latents, indices):
    """Float64 -> p (B,S,H,K), tokens (B,S,K,576), out (B,S,H,512), lse (B,S,H)."""
    q = q.double()
    batch = torch.arange(len(q), device=q.device)[:, None, None]
    tokens = latents.double()[batch, indices.clamp(min=0).long()]
    x = torch.einsum("bshd,bskd->bshk", q, tokens) * SCALE
    x = x.masked_fill((indices < 0)[:, :, None], -INF)
    lse = x.logsumexp(-1)
    p = torch.exp(x - lse.masked_fill(lse.isinf(), 0)[..., None])
    return p, tokens, torch.einsum("bshk,bskd->bshd", p, tokens[..., :512]), lse


def check_forward(q, latents, indices, entries):
    """gluon_forward from `entries` (latents, or the cache that stands for them); P and out are rounded."""
    _, _, want, want_lse = reference(q, latents, indices)
    with poisoned():
        out, lse = hopper.gluon_forward(q, entries, indices, SCALE)
    assert out.is_contiguous() and lse.is_contiguous()
    assert_close(out, want, whole(2), 2 * BF16, "out")
    empty = want_lse == -INF
    assert torch.equal(lse == -INF, empty)
    assert not out[empty].any()
    assert (lse - want_lse)[~empty].abs().max() <= sum_error(q, latents, SCALE)
    again, lse2 = hopper.gluon_forward(q, entries, indices, SCALE)
    assert torch.equal(out, again) and torch.equal(lse, lse2)


@on_hopper
@pytest.mark.parametrize("B,S,T,H,K", SHAPES + [ONE_TOKEN])
def test_forward(B, S, T, H, K):
    q, latents, _ = inputs(B, S, T, H)
    check_forward(q, latents, selection(B, S, T, K), latents)


@on_hopper
@pytest.mark.parametrize("q_scale", [0.0, 1e-3, 30.0])
def test_forward_magnitudes(q_scale):
    """All-equal scores, nearly equal ones, and a softmax that is almost one-hot."""
    q, latents, _ = inputs(1, 6, 900, 128, q_scale=q_scale)
    check_forward(q, latents, selection(1, 6, 900, 512), latents)


@on_hopper
@pytest.mark.parametrize("B,S,T,H,K", SHAPES + [ONE_TOKEN, (16, 2, 4096, 128, 2048)])
def test_forward_packed(B, S, T, H, K):
    q, _, _ = inputs(B, S, T, H)
    cache, latents = packed_cache(B, T)
    check_forward(q, latents, selection(B, S, T, K), cache)


def gradients(q, latents, indices, out, dout):
    """The formulas of the backward in float64, delta from this rounded `out` -> dq, dlatents."""
    q = q.double()
    dout = dout.double()
    p, tokens, _, _ = reference(q, latents, indices)
    dp = torch.einsum("bshv,bskv->bshk", dout, tokens[..., :512])
    ds = SCALE * p * (dp - (out.double() * dout).sum(-1, keepdim=True))
    dq = torch.einsum("bshk,bskd->bshd", ds, tokens)
    dtokens = torch.einsum("bshk,bshd->bskd", ds, q)
    dtokens[..., :512] += torch.einsum("bshk,bshv->bskv", p, dout)
    dlatents = torch.zeros(latents.shape, dtype=torch.float64, device=latents.device)
    for b in range(len(q)):
        real = indices[b] >= 0
        dlatents[b].index_add_(0, indices[b][real].long(), dtokens[b][real])
    return dq, dlatents


@on_hopper
@pytest.mark.parametrize("B,S,T,H,K", SHAPES)
def test_backward(B, S, T, H, K):
    """Every row by the formulas, given the rounded out (dS and dq are rounded; P and dS, whose products may
    cancel); as a whole by autograd, to which the roundings of P and out in delta come."""
    q, latents, dout = inputs(B, S, T, H)
    indices = selection(B, S, T, K)
    out, lse = hopper.gluon_forward(q, latents, indices, SCALE)
    scratch = 3 * 4 * H * K if S > 100 else hopper.SCRATCH_BYTES  # chunks of three queries
    with poisoned():
        dq, dlatents = hopper.gluon_backward(q, latents, indices, out, lse, dout, SCALE, scratch)
    assert dq.is_contiguous() and dlatents.is_contiguous() and dlatents.dtype == torch.float32

    want_dq, want_dlatents = gradients(q, latents, indices, out, dout)
    assert_close(dq, want_dq, whole(2), 2 * BF16, "dq")
    assert_close(dlatents, want_dlatents, whole(1), 2 * BF16, "dlatents")

    leaves = q.double().requires_grad_(), latents.double().requires_grad_()
    seen = (indices >= 0).any(-1)
    loss = (reference(*leaves, indices)[2] * dout.double())[seen].sum()
    want_dq, want_dlatents = torch.autograd.grad(loss, leaves)
    assert relative_errors(dq, want_dq)[0] <= whole(4)
    assert relative_errors(dlatents, want_dlatents)[0] <= whole(3)

    # nothing where nothing was selected
    assert not dq[~seen].any()
    used = torch.zeros(B, T + 1, dtype=torch.bool, device="cuda")
    used.scatter_(1, indices.flatten(1).long() + 1, True)
    assert not dlatents[~used[:, 1:]].any()

    # float32 atomics: the order of the sums varies
    dq2, dlatents2 = hopper.gluon_backward(q, latents, indices, out, lse, dout, SCALE, scratch)
    assert torch.equal(dq, dq2)
    assert (dlatents - dlatents2).norm() < 1e-5 * dlatents.norm()


@on_hopper
def test_backward_one_token():
    """The softmax over one token does not depend on q: dq is what two float32 sums of 512 differ by."""
    q, latents, dout = inputs(1, 1, 1, 128)
    indices = torch.zeros(1, 1, 1, dtype=torch.int32, device="cuda")
    out, lse = hopper.gluon_forward(q, latents, indices, SCALE)
    assert torch.equal(out, latents[:, :, None, :512].expand_as(out))
    dq, dlatents = hopper.gluon_backward(q, latents, indices, out, lse, dout, SCALE)
    ds = 2 * SCALE * sum_error(dout, latents[..., :512], 1.0)
    assert dq.float().norm(dim=-1).max() <= 1.01 * ds * latents.float().norm()
    assert_close(dlatents[..., :512], dout.double().sum(2), BF16 / 4, BF16 / 4)


def assert_same_finite(got, want, whole_bound, row_bound, what):
    """Finite in the same places, and close there; elsewhere NaN and infinity count alike."""
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: other places are not finite"
    got = got.masked_fill(~got.isfinite(), 0)
    want = want.masked_fill(~want.isfinite(), 0)
    assert_close(got, want, whole_bound, row_bound, what)


@on_hopper
@pytest.mark.parametrize("where", ["query", "token"])
@pytest.mark.parametrize("column,value", [(7, NAN), (300, NAN), (570, NAN), (7, INF)])
def test_not_finite(where, column, value):
    """What is not finite in the reference is not finite here, and nothing else. Left, right, rope part.

    Query 4 has no empty slot: the reference adds the gradient of an empty slot, zero times q, to token 0, and
    zero times NaN is NaN."""
    q, latents, dout = inputs(1, 8, 300, 64)
    indices = selection(1, 8, 300, 128)
    indices[:, 4:] = selection(1, 4, 300, 128, empty=0.0)
    if where == "query":
        q[0, 4, 3, column] = value
    else:
        latents[0, indices[0, 4, 9], column] = value
    leaves = q.float().requires_grad_(), latents.float().requires_grad_()
    want, want_lse = sparse_attn.sparse_attention(*leaves, indices, SCALE, 512)
    assert want.isfinite().any() and not want[0, 4, 3].isfinite().all()
    out, lse = hopper.gluon_forward(q, latents, indices, SCALE)
    assert_same_finite(out, want, whole(2), 2 * BF16, "out")
    assert torch.equal(lse.isfinite(), want_lse.isfinite())

    dq, dlatents = hopper.gluon_backward(q, latents, indices, out, lse, dout, SCALE)
    want_dq, want_dlatents = torch.autograd.grad((want * dout.float()).sum(), leaves)
    assert want_dq.isfinite().any() and not want_dq[0, 4, 3].isfinite().any()
    assert torch.equal(dq.isfinite(), want_dq.isfinite())
    assert torch.equal(dlatents.isfinite(), want_dlatents.isfinite())


@on_hopper
def test_logits_of_minus_infinity():
    """Where all selected logits are -inf there is no softmax: that is not a query that selected nothing."""
    q, latents, _ = inputs(1, 8, 300, 64)
    indices = selection(1, 8, 300, 128)
    indices[:, 2, 0] = 7
    q[0, 2, 3, 540] = -INF * latents[0, 7, 540].sign()
    want, want_lse = sparse_attn.sparse_attention(q.float(), latents.float(), indices, SCALE, 512)
    out, lse = hopper.gluon_forward(q, latents, indices, SCALE)
    assert want[0, 2, 3].isnan().all() and want_lse[0, 2, 3] == -INF
    assert_same_finite(out, want, whole(2), 2 * BF16, "out")
    assert lse[0, 2, 3] == -INF


@on_hopper
def test_not_finite_in_the_cache():
    """A NaN among the e4m3; a scale of NaN, which quantise makes of infinities; an infinity in rope."""
    q, _, _ = inputs(1, 8, 300, 64)
    cache, latents = packed_cache(1, 300)
    indices = selection(1, 8, 300, 128, empty=0.0)
    cache[0, 5, 7] = 0x7f
    latents[0, 5, 7] = NAN
    cache[0, 6, 512:].view(torch.float32)[1] = NAN
    latents[0, 6, 128:256] = NAN
    cache[0, 7, 528:].view(torch.bfloat16)[3] = INF
    latents[0, 7, 515] = INF
    want, want_lse = sparse_attn.sparse_attention(q.float(), latents.float(), indices, SCALE, 512)
    assert not want.isfinite().all() and want.isfinite().any()
    out, lse = hopper.gluon_forward(q, cache, indices, SCALE)
    assert_same_finite(out, want, whole(2), 2 * BF16, "out")
    assert torch.equal(lse.isfinite(), want_lse.isfinite())


def target_inputs(B, S, T, H, Hk, D, bounds):
    """-> q (B,S,H,D), k (B,T,Hk,D) bf16, first, last (B,S) int32, what is seen (B,S,T)."""
    random = generator(0)
    q = torch.randn(B, S, H, D, device="cuda", generator=random).bfloat16()
    k = torch.randn(B, T, Hk, D, device="cuda", generator=random).bfloat16()
    last = torch.arange(T - S, T, device="cuda", dtype=torch.int32).expand(B, S).contiguous()
    first = torch.zeros_like(last)
    if bounds == "packed":
        first = last // 70 * 70  # documents of 70 tokens
    t = torch.arange(T, device="cuda")
    seen = (t >= first[..., None]) & (t <= last[..., None])
    return q, k, first, last, seen


def target_reference(q, k, seen):
    """Float64 -> p (B,S,T), lse (B,S,H)."""
    scale = q.shape[3]**-0.5
    x = torch.einsum("bshd,bthd->bsht", q.double(), k.double().expand(-1, -1, q.shape[2], -1)) * scale
    lse = x.masked_fill(~seen[:, :, None], -INF).logsumexp(-1)
    p = torch.exp(x - lse[..., None]).mean(2)
    return p.masked_fill(~seen, 0), lse


def target_of(q, k, lse, first, last):
    """gluon_target, a sequence at a time, so that chunks begin in the middle -> p (B,S,TP)."""
    B, S, _, D = q.shape
    blocks = -(-S // 128)
    lse2 = (lse * LOG2E.value).float().transpose(1, 2).contiguous()  # (B, H, S)
    parts = []
    for b in range(B):
        p = torch.full((blocks * 128, -(-k.shape[1] // 128) * 128), -1.0, device="cuda")
        hopper.gluon_target(q, k, lse2, p, D**-0.5, first, last, b * blocks, blocks)
        parts.append(p[:S])
    return torch.stack(parts)


@on_hopper
@pytest.mark.parametrize("B,S,T,H,Hk,D", [
    (1, 300, 300, 16, 16, 192), (2, 130, 517, 17, 1, 64),
    (1, 1, 900, 33, 33, 128), (3, 128, 128, 16, 16, 192)])
@pytest.mark.parametrize("bounds", ["causal", "packed", "none"])
def test_loss_target(B, S, T, H, Hk, D, bounds):
    """p of the warm-up loss, of every visible pair; without bounds it is causal. Float32 throughout."""
    q, k, first, last, seen = target_inputs(B, S, T, H, Hk, D, bounds)
    want, lse = target_reference(q, k, seen)
    if bounds == "none":
        first = None
        last = None
    got = target_of(q, k, lse, first, last)
    bound = sum_error(q, k, D**-0.5)
    assert_close(got[..., :T].masked_fill(~seen, 0), want, bound, bound, "p")
    assert torch.equal(got, target_of(q, k, lse, first, last))


@on_hopper
@pytest.mark.parametrize("first_given", [True, False])
def test_loss_target_one_bound(first_given):
    """Either bound may be absent alone."""
    q, k, first, last, seen = target_inputs(2, 130, 517, 17, 1, 64, "packed" if first_given else "causal")
    want, lse = target_reference(q, k, seen)
    got = target_of(q, k, lse, first if first_given else None, None if first_given else last)
    bound = sum_error(q, k, 64**-0.5)
    assert_close(got[..., :517].masked_fill(~seen, 0), want, bound, bound, "p")


@on_hopper
@pytest.mark.parametrize("name,place", [
    ("q", (0, 40, 3, 7)), ("k", (0, 20, 3, 100)), ("k", (0, 290, 3, 100))])
def test_loss_target_not_finite(name, place):
    """A NaN in a query makes its row NaN, one in a key the rows that see it."""
    q, k, first, last, seen = target_inputs(1, 300, 300, 16, 16, 192, "packed")
    dict(q=q, k=k)[name][place] = NAN
    want, lse = target_reference(q, k, seen)
    assert not want.isfinite().all() and want.isfinite().any()
    got = target_of(q, k, lse, first, last)[..., :300].masked_fill(~seen, 0)
    bound = sum_error(q.nan_to_num(), k.nan_to_num(), 192**-0.5)
    assert_close(got, want, bound, bound, "p")


@on_hopper
@pytest.mark.parametrize("packed", [False, True])
def test_forward_from_a_slice_of_a_larger_cache(packed):
    """The filled part of a cache is read where it lies, with the same bits as from a copy."""
    q, latents, _ = inputs(2, 9, 300, 128)
    indices = selection(2, 9, 200, 128)
    cache = packed_cache(2, 300)[0] if packed else latents
    taken = cache[:, :200]
    assert token_rows(taken)[0] is taken
    got = hopper.gluon_forward(q, taken, indices, SCALE)
    want = hopper.gluon_forward(q, taken.contiguous(), indices, SCALE)
    for x, y in zip(got, want):
        assert torch.equal(x, y)


def test_supported():
    """Which arguments go to these kernels on a Hopper GPU; none needed."""
    q = torch.zeros(1, 4, 64, 576, dtype=torch.bfloat16)
    latents = torch.zeros(1, 100, 576, dtype=torch.bfloat16)
    cache = torch.zeros(1, 100, 656, dtype=torch.uint8)
    indices = torch.zeros(1, 4, 8, dtype=torch.int32)
    assert hopper.supported(q, latents, indices, 512)
    assert hopper.supported(q, cache, indices, 512)
    assert not hopper.supported(q.half(), latents.half(), indices, 512)
    assert not hopper.supported(q, latents.float(), indices, 512)
    assert not hopper.supported(q[:, :, :16], latents, indices, 512)
    assert not hopper.supported(q[..., :320], latents[..., :320], indices, 256)
    assert not hopper.supported(q, latents, indices, 576)
    assert not hopper.supported(q, cache[..., :576], indices, 512)
    assert not hopper.supported(q, latents[:, :0], indices, 512)
    assert not hopper.supported(q, latents, indices[..., :0], 512)
    for D in (64, 128, 192):
        assert hopper.target_supported(q[..., :D])
    assert not hopper.target_supported(q[..., :96])
    assert not hopper.target_supported(q[:, :, :15, :64])
    assert not hopper.target_supported(q[..., :64].float())


@on_hopper
def test_refuses():
    """Shapes that do not fit each other are refused by the public operation in front of these kernels."""
    q, latents, _ = inputs(1, 4, 100, 128)
    indices = selection(1, 4, 100, 64)
    with pytest.raises(ValueError, match="indices"):
        kernels.sparse_attention(q, latents, indices[:, :3], SCALE, 512)
    with pytest.raises(ValueError, match="latents"):
        kernels.sparse_attention(q, latents[..., :512], indices, SCALE, 512)
