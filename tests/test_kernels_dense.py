"""The dense attention kernels (triton_kernels/dense.py) held to float64, to the reference, and to their
contract."""
import pytest
import torch
import triton.language as tl

import kernels
import sparse_attn
from tests.common import MEAN_ROW, assert_close
from tests.inputs import (
    CUDA, DEVICE, DTYPES, EPS, big, bounds, double, exact_attention, random, visible)
from triton_kernels import common
from triton_kernels.common import unit_stride

# Relative errors of the whole tensor and of the worst row, in units of the dtype's eps. In 16 bits p (or ds)
# and the result are rounded, by eps / 2 each at most. A row of a gradient in which dout . v - dout . out
# cancels keeps the rounding of `out`, eps / 2 of what cancelled, and counts as the mean row. In float32 what
# counts are the sums: of D products in a logit, of T in the result.
OUT = {torch.float32: (16, 64), torch.float16: (1, 1), torch.bfloat16: (1, 1)}
GRADIENT = {torch.float32: (32, 128), torch.float16: (1, 4), torch.bfloat16: (1, 4)}


def limits_of(table, dtype):
    """-> whole, row of assert_close"""
    return [torch.finfo(dtype).eps * places for places in table[dtype]]


def inputs(B, S, T, H, Hk, D, V, dtype):
    """q, k, v that require gradients, dout"""
    return (random(B, S, H, D, dtype=dtype, grad=True), random(B, T, Hk, D, dtype=dtype, grad=True),
            random(B, T, Hk, V, dtype=dtype, grad=True), random(B, S, H, V, dtype=dtype))


SHAPES = [  # B, S, T, H, Hk, D, V, bounds
    (2, 37, 37, 3, 3, 24, 16, None), (1, 33, 70, 2, 2, 48, 32, "packed"), (2, 20, 45, 5, 1, 40, 32, None),
    (1, 19, 50, 4, 2, 16, 16, "window"), (1, 40, 20, 1, 1, 16, 16, None), (1, 1, 1, 1, 1, 16, 16, None),
    (1, 2, 520, 6, 1, 40, 32, None), (2, 3, 520, 3, 3, 24, 16, "window")]
BIG = [
    (2, 1000, 1000, 3, 3, 192, 128, "packed"), (1, 1024, 1024, 16, 16, 192, 128, None),
    (1, 700, 1300, 12, 1, 160, 128, None), (1, 200, 900, 16, 1, 576, 512, "packed"),
    (1, 2, 9000, 128, 1, 576, 512, None), (2, 1, 5000, 12, 1, 288, 256, None),
    (2, 515, 515, 12, 12, 96, 64, None)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES + [pytest.param(shape, marks=big) for shape in BIG])
def test_forward_and_backward(shape, dtype):
    """Outputs and gradients against float64, MHA, MQA and between, keys in parts (T 520), more queries than
    keys."""
    B, S, T, H, Hk, D, V, kind = shape
    first, last = bounds(B, S, T, kind)
    q, k, v, dout = inputs(B, S, T, H, Hk, D, V, dtype)
    scale = D**-0.5
    out, lse = kernels.dense_attention(q, k, v, scale, first, last)
    exact = double(q), double(k), double(v)
    want, want_lse = exact_attention(*exact, scale, first, last)

    assert_close(out, want, *limits_of(OUT, dtype), "out")
    seen = want_lse > float("-inf")
    assert (lse[~seen] == float("-inf")).all() and (out[~seen] == 0).all()
    assert out.dtype == dtype and lse.dtype == torch.float32 and not lse.requires_grad
    # a sum of D products, in float32
    assert ((lse - want_lse)[seen].abs() <= D * EPS * (1 + want_lse[seen].abs().max())).all()

    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for name, x, y in zip(("dq", "dk", "dv"), gradients, torch.autograd.grad(want, exact, dout.double())):
        if T == 1 and name != "dv":  # softmax is constant: what is left of dp - delta is their rounding
            assert x.abs().max() <= 8 * torch.finfo(dtype).eps * dout.abs().max() * v.abs().max() * D
        else:
            assert_close(x, y, *limits_of(GRADIENT, dtype), name, MEAN_ROW)


@pytest.mark.parametrize("kind", [None, "packed", "window"])
def test_backends_agree(kind):
    """In float32 the reference and the kernels differ by the order of their sums."""
    q, k, v, dout = inputs(1, 35, 50, 4, 2, 40, 24, torch.float32)
    first, last = bounds(1, 35, 50, kind)
    out, lse = kernels.dense_attention(q, k, v, 0.2, first, last)
    k_all = k.repeat_interleave(2, 2)
    v_all = v.repeat_interleave(2, 2)
    want, want_lse = sparse_attn.dense_attention(q, k_all, v_all, 0.2, first, last)
    assert_close(out, want, *limits_of(OUT, torch.float32), "out")
    assert_close(lse, want_lse, *limits_of(OUT, torch.float32), "lse")
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for name, x, y in zip(("dq", "dk", "dv"), gradients, torch.autograd.grad(want, (q, k, v), dout)):
        assert_close(x, y, *limits_of(GRADIENT, torch.float32), name, MEAN_ROW)


def test_incoming_gradient_of_any_layout():
    """(T18) Twice the gradient gives twice the gradients, bit for bit; an expanded or transposed one is as
    good."""
    q, k, v, dout = inputs(1, 12, 20, 2, 2, 16, 16, torch.float32)
    out, _ = kernels.dense_attention(q, k, v, 0.25)
    one = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
    two = torch.autograd.grad(out, (q, k, v), 2 * dout, retain_graph=True)
    heads_first = dout.transpose(1, 2).contiguous().transpose(1, 2)
    other = torch.autograd.grad(out, (q, k, v), heads_first, retain_graph=True)
    for x, y, z in zip(one, two, other):
        assert torch.equal(2 * x, y) and torch.equal(x, z)
    summed = torch.autograd.grad(out.sum(), (q, k, v), retain_graph=True)
    for x, y in zip(summed, torch.autograd.grad(out, (q, k, v), torch.ones_like(dout))):
        assert torch.equal(x, y)


def test_queries_that_see_nothing_between_others(monkeypatch):
    """Keys whose queries come in two runs, the second at the start of a block of the search: the gap between
    them gets and gives no gradient."""
    block = common.QUERIES_AT_ONCE.value
    if not CUDA:  # a compiled kernel keeps its constants
        block = 32
        monkeypatch.setattr(common, "QUERIES_AT_ONCE", tl.constexpr(block))
    S = 2 * block + 9
    T = 40
    first = torch.zeros(1, S, dtype=torch.int32, device=DEVICE)
    last = torch.full((1, S), T - 1, dtype=torch.int32, device=DEVICE)
    last[:, 7:2 * block] = -1
    q, k, v, dout = inputs(1, S, T, 1, 1, 16, 16, torch.float32)
    out, _ = kernels.dense_attention(q, k, v, 0.25, first, last)
    exact = double(q), double(k), double(v)
    want, _ = exact_attention(*exact, 0.25, first, last)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    for name, x, y in zip(("dq", "dk", "dv"), gradients, torch.autograd.grad(want, exact, dout.double())):
        assert_close(x, y, *limits_of(GRADIENT, torch.float32), name, MEAN_ROW)
    assert (gradients[0][:, 7:2 * block] == 0).all()


def test_values_inside_keys():
    """MQA on latents: v is a view of k, loaded once; both gradients reach the latents."""
    latents = random(2, 100, 1, 40, grad=True)
    q = random(2, 2, 6, 40, grad=True)
    out, _ = kernels.dense_attention(q, latents, latents[..., :32], 0.2)
    exact = double(q), double(latents)
    want, _ = exact_attention(*exact, exact[1][..., :32], 0.2, None, None)
    assert_close(out, want, *limits_of(OUT, torch.float32), "out")
    gradients = torch.autograd.grad(out.sum(), (q, latents))
    for name, x, y in zip(("dq", "dlatents"), gradients, torch.autograd.grad(want.sum(), exact)):
        assert_close(x, y, *limits_of(GRADIENT, torch.float32), name, MEAN_ROW)


def test_bounds_beyond_the_keys():
    """first below 0 and last beyond T - 1 (40 is no multiple of a tile) mean the first and the last key; a
    first beyond T - 1 sees nothing."""
    q, k, v, _ = inputs(1, 5, 40, 2, 2, 32, 16, torch.float32)
    first = torch.tensor([[-200, -1, 0, 5, 1000]], device=DEVICE, dtype=torch.int32)
    last = torch.tensor([[39, 45, 200, 38, 2000]], device=DEVICE, dtype=torch.int32)
    got = kernels.dense_attention(q, k, v, 0.2, first, last)
    want = kernels.dense_attention(q, k, v, 0.2, first.clamp(min=0), last.clamp(max=39))
    for x, y in zip(got, want):
        assert torch.equal(x, y)
    assert (got[0][:, 4] == 0).all() and (got[1][:, 4] == float("-inf")).all()


def test_bounds_given_and_not():
    """None is causal with the queries at the end: the same bits as these bounds written out; any integers,
    any shape that broadcasts."""
    q, k, v, _ = inputs(2, 21, 45, 2, 1, 24, 16, torch.float32)
    first = torch.zeros(1, 21, dtype=torch.int64, device=DEVICE)
    last = torch.arange(24, 45, device=DEVICE)
    results = []
    for pair in ((None, None), (first, None), (None, last), (first, last)):
        out, lse = kernels.dense_attention(q, k, v, 0.2, *pair)
        results.append((out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))))
    for other in results[1:]:
        for x, y in zip(results[0], other):
            assert torch.equal(x, y)


@pytest.mark.parametrize("size", [1e-4, 100.0, 1e4])
def test_magnitudes(size):
    """Logits that vanish, that make softmax choose one key, and beyond 1e8."""
    q, k, v, _ = inputs(1, 9, 50, 2, 2, 16, 16, torch.float32)
    q = (q.detach() * size).requires_grad_()
    k = (k.detach() * size).requires_grad_()
    out, lse = kernels.dense_attention(q, k, v, 0.25)
    want, want_lse = sparse_attn.dense_attention(q, k, v, 0.25)
    assert lse.isfinite().all()
    assert ((lse - want_lse).abs() <= 16 * EPS * (1 + want_lse.abs())).all()
    if size < 1000:  # an error of eps in a logit of 1e5 is one of 1e-2 in p
        errors = [EPS * 16 * (1 + q.abs().max().item() * k.abs().max().item() * 16**0.5 / 4)] * 2
        assert_close(out, want, *errors, "out")
    else:  # one key has it all
        assert_close(out, want, 4 * EPS, 4 * EPS, "out")


SPECIAL = [float("nan"), float("inf"), -float("inf")]


@pytest.mark.parametrize("parts", [False, True])
@pytest.mark.parametrize("value", SPECIAL)
@pytest.mark.parametrize("where", ["q", "k"])
def test_not_finite_where_the_reference_is_not(where, value, parts):
    """A NaN or an infinity in q or k: other outputs and lse stay finite, and these do not, as in the
    reference."""
    S, T = (2, 520) if parts else (13, 20)
    first = torch.tensor([0, 0, 0, 8, 8, 8, 14, 14, 12, 12, 12, 12, 19], device=DEVICE)[:S].expand(1, S)
    for position in (0, 1) if parts else (0, 4, 7, 12):
        q, k, v, _ = inputs(1, S, T, 2, 2, 16, 16, torch.float32)
        x = (q if where == "q" else k).detach()
        x[0, position, 1, 3] = value
        got = kernels.dense_attention(q, k, v, 0.25, first, None)
        want = sparse_attn.dense_attention(q, k, v, 0.25, first, None)
        for name, a, b in zip(("out", "lse"), got, want):
            assert torch.equal(a.isfinite(), b.isfinite()), f"{name}, position {position}"


@pytest.mark.parametrize("value", SPECIAL)
def test_not_finite_values(value):
    """A NaN or an infinity in v: not finite in the rows that see it, and in its column alone."""
    q, k, v, _ = inputs(1, 13, 20, 2, 2, 16, 16, torch.float32)
    v = v.detach()
    v[0, 10, 1, 3] = value
    out, lse = kernels.dense_attention(q, k, v, 0.25)
    want, _ = sparse_attn.dense_attention(q, k, v, 0.25)
    sees = visible(13, 20, None, None)[0, :, 10]
    assert torch.equal(out[:, sees].isfinite(), want[:, sees].isfinite())
    assert not out[:, sees, 1, 3].isfinite().any() and lse.isfinite().all()


@pytest.mark.parametrize("B,S,T", [(2, 0, 5), (2, 3, 0), (0, 3, 5), (1, 0, 0)])
def test_nothing_to_attend_to(B, S, T):
    """No queries or no sequences: empty results. No keys: rows that see nothing. Gradients are zeros."""
    q, k, v, dout = inputs(B, S, T, 2, 2, 16, 24, torch.float32)
    out, lse = kernels.dense_attention(q, k, v, 0.25)
    assert out.shape == (B, S, 2, 24) and lse.shape == (B, S, 2)
    assert (out == 0).all() and (lse == float("-inf")).all()
    if S:  # of no queries the reference returns an empty tuple
        want, want_lse = sparse_attn.dense_attention(q, k, v, 0.25)
        assert torch.equal(out, want) and torch.equal(lse, want_lse)
    for x, gradient in zip((q, k, v), torch.autograd.grad(out, (q, k, v), dout)):
        assert gradient.shape == x.shape and (gradient == 0).all()


def test_repeats_bit_equal():
    """No atomics: two runs give the same bits, forward and backward."""
    q, k, v, dout = inputs(1, 40, 60, 4, 2, 24, 16, DTYPES[-1])
    runs = []
    for _ in range(2):
        out, lse = kernels.dense_attention(q, k, v, 0.2)
        runs.append((out, lse, *torch.autograd.grad(out, (q, k, v), dout)))
    for x, y in zip(*runs):
        assert torch.equal(x, y)


def test_strides():
    """Views are as good as contiguous tensors, also those that must be copied."""
    q, k, v, _ = inputs(2, 9, 20, 2, 2, 24, 16, torch.float32)
    want = kernels.dense_attention(q, k, v, 0.2)
    heads_first = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    columns_apart = [torch.stack((x, x), -1)[..., 0] for x in (q, k, v)]
    for views in (heads_first, columns_apart):
        for x, y in zip(kernels.dense_attention(*views, 0.2), want):
            assert torch.equal(x, y)


def test_heads_that_lie_far_apart_are_copied():
    """The kernels count heads in 32 bits: (B,H,S,D) read as (B,S,H,D) is fine until it has 2^31 elements."""
    near = torch.empty_strided((1, 2, 18, 16), (18 * 2**20, 16, 2**20, 1), device="meta")
    far = torch.empty_strided((1, 2, 18, 16), (18 * 2**27, 16, 2**27, 1), device="meta")
    assert unit_stride(near).stride() == near.stride()
    assert unit_stride(far).stride() == (576, 288, 16, 1)


@pytest.mark.parametrize("kind", [None, "window"])
def test_registered(kind):
    """Schema, fake results and autograd of the operation, as torch.compile needs them."""
    q, k, v, _ = inputs(1, 5, 9, 4, 2, 24, 16, torch.float32)
    torch.library.opcheck(torch.ops.dsa.flash_attention, (q, k, v, 0.2, *bounds(1, 5, 9, kind)))


def test_backward_registered():
    q, k, v, dout = inputs(1, 5, 9, 4, 2, 24, 16, torch.float32)
    first, last = bounds(1, 5, 9, "window")
    qkv = [x.detach() for x in (q, k, v)]
    out, lse = torch.ops.dsa.flash_attention(*qkv, 0.2, first, last)
    torch.library.opcheck(torch.ops.dsa.flash_attention_backward, (dout, *qkv, out, lse, 0.2, first, last))


def test_compiles_into_one_graph():
    """The checks and copies around the operation leave no break in a graph; its results are the eager
    ones."""
    q, k, v, dout = inputs(1, 5, 9, 4, 2, 24, 16, torch.float32)
    compiled = torch.compile(kernels.dense_attention, fullgraph=True, backend="aot_eager")
    first, last = bounds(1, 5, 9, "window")
    heads_first = q.transpose(1, 2).contiguous().transpose(1, 2)
    columns_apart = torch.stack((v, v), -1)[..., 0]
    for views in ((q, k, v), (heads_first, k, columns_apart)):
        got = compiled(*views, 0.2, first, last)
        want = kernels.dense_attention(*views, 0.2, first, last)
        for x, y in zip(got, want):
            assert torch.equal(x, y)
        for x, y in zip(*(torch.autograd.grad(out, (q, k, v), dout) for out, _ in (got, want))):
            assert torch.equal(x, y)


def shaped(*shape):
    return torch.zeros(shape, device=DEVICE)


@pytest.mark.parametrize("q,k,v,message", [
    ((1, 3, 2, 16), (1, 5, 2, 8), (1, 5, 2, 16), r"k is \(1, 5, 2, 8\) and should be \(1, 5, 2, 16\)"),
    ((1, 3, 2, 16), (1, 5, 2, 16), (1, 4, 2, 16), r"k is \(1, 5, 2, 16\)"),
    ((1, 3, 2, 16), (2, 5, 2, 16), (2, 5, 2, 16), r"k is \(2, 5, 2, 16\)"),
    ((1, 3, 2, 16), (1, 5, 3, 16), (1, 5, 3, 16), "2 query heads over 3 key heads"),
    ((1, 3, 2, 16), (1, 5, 0, 16), (1, 5, 0, 16), "2 query heads over 0 key heads"),
    ((40000, 1, 2, 1), (40000, 1, 2, 1), (40000, 1, 2, 1), "split the batch")])
def test_shapes_that_do_not_fit_are_refused(q, k, v, message):
    """One line, instead of what lies behind a tensor in memory."""
    with pytest.raises(ValueError, match=message):
        kernels.dense_attention(shaped(*q), shaped(*k), shaped(*v), 1.0)
