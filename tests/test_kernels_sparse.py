"""Sparse attention kernels against float64 autograd: outputs, lse, gradients, awkward shapes, numbers that
are not finite; the packed FP8 cache; lists in parts; unions; registration with torch.library; repeats.

Runs on the GPU (bf16, real shapes too) or through Triton's interpreter (fp16 and fp32, small shapes).

Bounds count roundings. In 16 bits the products are exact in float32, so what is rounded to 16 bits decides:
of out P and out itself (2), of dq out within delta, dS and dq (3), of dlatents P besides (4); each is half an
`eps`, at most. In float32 it is the sums: as many roundings as a dot product and a softmax have terms. A
worst row may be WORST times as far off as the whole.
"""
from types import SimpleNamespace

import pytest
import torch
from torch.library import opcheck

import kernels
import sparse_attn
from indexer import quantise
from kernels import sparse_attention
from tests.common import MEAN_ROW, ROW_FLOOR, assert_close, poison
from triton_kernels import sparse

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HALF = torch.bfloat16 if CUDA else torch.float16  # the interpreter's bf16 product is broken
ROUNDINGS = dict(out=2, dq=3, dlatents=4)
WORST = 4
NAN = float("nan")
INF = float("inf")

SHAPES = [  # B, S, T, H, V, rope, K
    (1, 5, 20, 2, 16, 16, 8),  # few queries
    (2, 13, 37, 3, 32, 16, 16),  # all queries share
    (1, 34, 60, 1, 16, 16, 12),  # one head: 31 queries share
    (2, 9, 9, 5, 24, 8, 33),  # odd sizes, K beyond T
    (1, 10, 50, 16, 16, 16, 40),
    (1, 11, 30, 12, 20, 0, 12),  # no rope part
    (1, 10, 30, 40, 16, 16, 12),  # too many heads to share
    (1, 3, 70, 70, 16, 16, 40),  # two groups of heads
    (1, 9, 60, 3, 256, 16, 24)]  # wide latents: a kernel for each product
if CUDA:
    SHAPES += [
        (1, 300, 700, 12, 128, 32, 128), (2, 129, 1000, 16, 512, 64, 256), (1, 200, 900, 12, 256, 32, 100),
        (1, 33, 600, 128, 512, 64, 512), (1, 40, 300, 96, 96, 24, 77), (1, 64, 300, 1, 64, 16, 31),
        (1, 600, 700, 8, 512, 64, 256), (1, 200, 700, 48, 512, 64, 256), (1, 40, 300, 8, 1024, 64, 77)]
CASES = [(shape, HALF) for shape in SHAPES] + [(shape, torch.float32) for shape in SHAPES if shape[4] < 128]


def attend(q, latents, indices, scale, value_dim):
    """sparse_attention in the dtype of its arguments; an empty slot reads nothing."""
    batch = torch.arange(len(q), device=q.device)[:, None, None]
    unused = (indices < 0)[..., None]
    tokens = latents[batch, indices.clamp(min=0).long()].masked_fill(unused, 0)  # (B, S, K, D)
    logits = torch.einsum("bshd,bskd->bshk", q, tokens) * scale  # (B, S, H, K)
    logits = logits.masked_fill(unused.transpose(2, 3), -INF)
    lse = logits.logsumexp(-1)  # (B, S, H)
    p = torch.exp(logits - lse.masked_fill(lse == -INF, 0)[..., None])
    return torch.einsum("bshk,bskd->bshd", p, tokens[..., :value_dim]), lse


def selection(B, S, T, K, overlap=0.8, empty=0.1, generator=None):
    """Ascending selections below the diagonal; neighbours keep a share `overlap`; some rows short, some
    empty -> (B,S,K) int32."""
    out = torch.full((B, S, K), -1, dtype=torch.int32)
    for b in range(B):
        score = torch.rand(T, generator=generator)
        for s in range(S):
            if s:
                new = torch.rand(T, generator=generator)
                score = torch.where(torch.rand(T, generator=generator) < 1 - overlap, new, score)
            seen = T - S + s + 1
            n = min(K, max(seen, 0))
            if torch.rand((), generator=generator) < empty:
                n = int(torch.randint(0, n + 1, (), generator=generator)) // 2
            out[b, s, :n] = score[:seen].topk(n).indices.sort().values.int()
    return out


def draw(shape, dtype, seed=0, size=1.0):
    """-> q, latents, indices, scale, V, dout of this shape; q and latents require gradients."""
    B, S, T, H, V, R, K = shape
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(B, S, H, V + R, generator=generator) * size).to(DEVICE, dtype).requires_grad_()
    latents = torch.randn(B, T, V + R, generator=generator).to(DEVICE, dtype).requires_grad_()
    indices = selection(B, S, T, K, generator=generator).to(DEVICE)
    dout = torch.randn(B, S, H, V, generator=generator).to(DEVICE, dtype)
    return q, latents, indices, (V + R) ** -0.5, V, dout


def bounds(name, shape, dtype):
    """-> error of the whole tensor and of its worst row; see above."""
    terms = ROUNDINGS[name]
    if dtype == torch.float32:
        terms *= shape[4] + shape[5] + shape[6]
    whole = terms * torch.finfo(dtype).eps / 2
    return whole, WORST * whole


def assert_lse(got, want, shape, what="lse", rounded=0):
    """Within what float32 sums cost, in every dtype: lse is not rounded to 16 bits."""
    terms = shape[4] + shape[5] + shape[6]
    assert torch.equal(got == -INF, want == -INF), f"{what}: other rows without a token"
    error = torch.nan_to_num(got.double() - want).abs().max()
    bound = (terms * 2**-24 + rounded) * (1 + want[want > -INF].abs().max()) if (want > -INF).any() else 0
    assert error <= bound, f"{what}: {error:.1e} beyond {bound:.1e}"


def check(shape, dtype, attention=sparse_attention, size=1.0, worst=WORST):
    """Outputs and gradients of sparse_attention against float64 -> out, lse, dq, indices"""
    q, latents, indices, scale, V, dout = draw(shape, dtype, size=size)
    indices[-1, shape[1] // 2] = -1  # one query has nothing
    poison()
    out, lse = attention(q, latents, indices, scale, V)
    poison()
    dq, dlatents = torch.autograd.grad(out, (q, latents), dout)

    q64 = q.detach().double().requires_grad_()
    latents64 = latents.detach().double().requires_grad_()
    out64, lse64 = attend(q64, latents64, indices, scale, V)
    dq64, dlatents64 = torch.autograd.grad(out64, (q64, latents64), dout.double())
    got = dict(out=out, dq=dq, dlatents=dlatents)
    for name, want in dict(out=out64, dq=dq64, dlatents=dlatents64).items():
        assert got[name].dtype == dtype and got[name].is_contiguous(), name
        whole, _ = bounds(name, shape, dtype)
        assert_close(got[name], want, whole, worst * whole, name, ROW_FLOOR if name == "out" else MEAN_ROW)
    assert_lse(lse, lse64.detach(), shape)
    return out, lse, dq, indices


# ---- results and gradients ----

@pytest.mark.parametrize("shape,dtype", CASES)
def test_forward_backward(shape, dtype):
    """Also: a row with nothing selected gives out 0, lse -inf and gradient 0 (T11, T20)."""
    out, lse, dq, indices = check(shape, dtype)
    assert not lse.requires_grad and lse.is_contiguous()
    empty = (indices < 0).all(-1)  # (B, S)
    assert empty.any()
    assert (lse[empty] == -INF).all() and (out[empty] == 0).all() and (dq[empty] == 0).all()


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_one_token(dtype):
    """Its value is the output, to the bit; it takes the whole gradient, and q none but what float32 leaves
    where delta is subtracted from an equal dP."""
    q, latents, _, scale, V, dout = draw((1, 1, 1, 1, 16, 16, 4), dtype)
    indices = torch.tensor([[[0, -1, -1, -1]]], dtype=torch.int32, device=DEVICE)
    out, lse = sparse_attention(q, latents, indices, scale, V)
    assert torch.equal(out[0, 0, 0], latents[0, 0, :V])
    score = (q.detach().double() @ latents[0, 0].detach().double()) * scale  # (1, 1, 1)
    assert_lse(lse, score, (1, 1, 1, 1, 16, 16, 4))
    dq, dlatents = torch.autograd.grad(out, (q, latents), dout)
    left = scale * V * 2**-24 * (dout * out).abs().sum()
    assert (dq[0, 0, 0].abs() <= left * latents[0, 0].abs()).all()
    difference = (dlatents[0, 0] - torch.cat((dout[0, 0, 0], torch.zeros(16, device=DEVICE))).to(dtype)).abs()
    assert (difference <= left * q[0, 0, 0].abs() + torch.finfo(dtype).eps * dlatents[0, 0].abs()).all()


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
@pytest.mark.parametrize("S", [3, 12])
def test_empty_slots_anywhere(S, dtype):
    """Empty slots before and between tokens, and tokens in any order: lists need no order."""
    shape = (2, S, 40, 3, 16, 16, 24)

    def shuffled(q, latents, indices, scale, V):
        order = torch.rand(indices.shape, generator=torch.Generator().manual_seed(1)).argsort(-1).to(DEVICE)
        return sparse_attention(q, latents, indices.gather(-1, order), scale, V)

    check(shape, dtype, shuffled)


def test_wide_latents_in_several_tiles_and_chunks(monkeypatch):
    """A kernel for each product where lists take several tiles, columns several programs, and P and dS
    several chunks."""
    tiles = sparse.ProductTiles(block_v=32, block_u=32, num_stages=1, num_warps=4)
    monkeypatch.setattr(sparse, "fused_tiles", lambda *_: None)
    for name in ("score_tiles", "query_tiles", "latent_tiles"):
        monkeypatch.setattr(sparse, name, lambda *_: tiles)
    monkeypatch.setattr(sparse, "SCORES_BYTES", 400_000)
    monkeypatch.setattr(sparse, "SHARED_ROWS", 24)
    check((2, 9, 200, 6, 64, 16, 140), HALF)


@pytest.mark.parametrize("dtype", [HALF, torch.float32])
def test_chunks_and_incoming_gradient(dtype, monkeypatch):
    """A backward in many chunks equals one in a single chunk; twice the incoming gradient gives twice the
    gradients (T18, T24)."""
    q, latents, indices, scale, V, dout = draw((1, 7, 37, 16, 16, 16, 16), dtype)
    out, lse = sparse_attention(q.detach(), latents.detach(), indices, scale, V)
    inputs = (q.detach(), latents.detach(), indices, out, lse)
    one = sparse.sparse_attention_backward(*inputs, dout, scale)
    double = sparse.sparse_attention_backward(*inputs, 2 * dout, scale)
    monkeypatch.setattr(sparse, "SCORES_BYTES", 1)
    many = sparse.sparse_attention_backward(*inputs, dout, scale)
    assert torch.equal(one[0], many[0])
    eps = torch.finfo(dtype).eps  # subnormal fp16 does not double to the bit
    S = q.shape[1]
    order = S * torch.finfo(torch.float32).eps * one[1].abs().max().item()  # atomics of up to S queries
    near = dict(rtol=2 * eps, atol=max(2 * eps, order))
    torch.testing.assert_close(many[1], one[1], **near)
    for x, y in zip(double, one):
        torch.testing.assert_close(x, 2 * y, **near)


@pytest.mark.parametrize("dtype,packed", [(HALF, False), (torch.float32, False), (HALF, True)])
def test_lists_in_parts(dtype, packed, monkeypatch):
    """Few queries: a list is split among programs and combined. The same as in one part, to rounding."""
    shape = (1, 2, 700, 3, 16, 16, 530)
    parts = []
    launch = sparse.launch_combine

    def counted(part, part_lse, out, lse):
        parts.append(len(part))
        launch(part, part_lse, out, lse)

    monkeypatch.setattr(sparse, "launch_combine", counted)
    q, latents, indices, scale, V, _ = draw(shape, dtype)
    indices[0, 1, 9:] = -1  # the later parts are empty
    tokens = latents.detach()
    meaning = tokens.double()
    if packed:
        tokens, meaning = pack(tokens, V, True)
    out, lse = sparse_attention(q.detach(), tokens, indices, scale, V)
    assert parts and parts[0] > 1
    want, lse64 = attend(q.detach().double(), meaning, indices, scale, V)
    assert_close(out, want, *bounds("out", shape, dtype), "out")
    assert_lse(lse, lse64, shape)


@pytest.mark.parametrize("S", [2, 12])
@pytest.mark.parametrize("packed", [False, True])
def test_a_slice_of_a_larger_cache_is_not_copied(S, packed, monkeypatch):
    """Decoding hands over the filled part of a cache: the kernel reads it where it lies, nothing behind it,
    and gives the same bits as from a copy."""
    q, latents, indices, scale, V, _ = draw((3, S, 40, 3, 16, 16, 9), HALF)
    tokens = latents.detach()
    if packed:
        tokens, _ = pack(tokens, V, True)
    cache = torch.cat((tokens, tokens[:, :17]), 1)  # (B, 57, ...)
    cache[:, 40:].view(HALF).fill_(NAN)
    name = "fp8_kernel" if packed else "flash_kernel"
    kernel = getattr(sparse, name)
    read = []

    class Launches:
        def __getitem__(self, grid):
            def launch(**arguments):
                read.append(arguments["cache_ptr" if packed else "latents_ptr"].data_ptr())
                kernel[grid](**arguments)
            return launch

    monkeypatch.setattr(sparse, name, Launches())
    out, lse = sparse_attention(q.detach(), cache[:, :40], indices, scale, V)
    assert read == [cache.data_ptr()]
    want, want_lse = sparse_attention(q.detach(), tokens.contiguous(), indices, scale, V)
    assert torch.equal(out, want) and torch.equal(lse, want_lse) and out.isfinite().all()


@pytest.mark.parametrize("size", [1e-4, 30.0])
def test_magnitudes(size):
    """Nearly equal scores, and softmaxes of nearly one token. There dP - delta cancels in most rows of dq, to
    less than the rounding of the mean row."""
    check((1, 9, 60, 4, 32, 16, 24), HALF, size=size, worst=2 * WORST)


@pytest.mark.parametrize("V", [16, 32])
def test_latent_gradients_are_summed_in_float32(V):
    """(T24) 60 queries with lists of their own add to the same four tokens, all with one sign: in 16 bits the
    sum would lose most of the last addends."""
    q, latents, indices, scale, V, dout = draw((1, 60, 4, 40, V, 16, 4), HALF)
    indices[:] = torch.arange(4)
    dout = dout.abs()
    out, _ = sparse_attention(q, latents, indices, scale, V)
    dlatents, = torch.autograd.grad(out, latents, dout)
    latents64 = latents.detach().double().requires_grad_()
    out64, _ = attend(q.detach().double(), latents64, indices, scale, V)
    want, = torch.autograd.grad(out64, latents64, dout.double())
    eps = torch.finfo(HALF).eps
    assert_close(dlatents[..., :V], want[..., :V], eps / 2, eps / 2, "dlatents")


@pytest.mark.parametrize("S,T,K", [(0, 20, 4), (5, 20, 0), (5, 0, 0), (12, 0, 3)])
@pytest.mark.parametrize("packed", [False, True])
def test_nothing_to_do(S, T, K, packed):
    """No queries, no slots, no tokens: empty results, or out 0, lse -inf and gradient 0."""
    q = torch.randn(2, S, 3, 48, device=DEVICE, dtype=HALF).requires_grad_()
    latents = torch.randn(2, T, 48, device=DEVICE, dtype=HALF).requires_grad_()
    indices = torch.full((2, S, K), -1, dtype=torch.int32, device=DEVICE)
    tokens = sparse_attn.pack_latents(latents.detach(), 32) if packed else latents
    poison()
    out, lse = sparse_attention(q.detach() if packed else q, tokens, indices, 0.2, 32)
    assert out.shape == (2, S, 3, 32) and out.dtype == HALF and (out == 0).all()
    assert lse.shape == (2, S, 3) and lse.dtype == torch.float32 and (lse == -INF).all()
    if S and not T * K:
        reference = sparse_attn.sparse_attention(q, latents, indices[..., :0], 0.2, 32)
        assert torch.equal(out, reference[0]) and torch.equal(lse, reference[1])
    if not packed:
        for x, gradient in zip((q, latents), torch.autograd.grad(out.sum(), (q, latents))):
            assert gradient.shape == x.shape and (gradient == 0).all()


def test_mixed_dtypes_and_strides():
    """Under autocast the latents may come in float32; views of larger tensors are as good as contiguous
    ones."""
    q, latents, indices, scale, V, dout = draw((2, 10, 40, 4, 16, 16, 8), HALF)
    view = torch.cat((q, q), 1)[:, :10].transpose(1, 2).contiguous().transpose(1, 2)
    wide = torch.cat((latents, latents), -1)[..., :32].float()
    every_other = torch.stack((indices, indices), -1)[..., 0]
    plain, lse = sparse_attention(q, latents, indices, scale, V)
    mixed, mixed_lse = sparse_attention(view, wide, every_other, scale, V)
    assert torch.equal(plain, mixed) and torch.equal(lse, mixed_lse)
    for x, y in zip(*(torch.autograd.grad(x, (q, latents), dout) for x in (plain, mixed))):
        eps = torch.finfo(HALF).eps  # of dlatents the order of the sums
        torch.testing.assert_close(x, y, rtol=2 * eps, atol=2 * eps)


def test_forward_repeats_bit_equal():
    q, latents, indices, scale, V, _ = draw(SHAPES[-1], HALF)
    first = sparse_attention(q, latents, indices, scale, V)
    for x, y in zip(first, sparse_attention(q, latents, indices, scale, V)):
        assert torch.equal(x, y)


# ---- unions ----

@pytest.mark.parametrize("block_s", [2, 5, 7, 16, 31])
@pytest.mark.parametrize("K,T", [(17, 90), (60, 33), (90, 70000)])
def test_union(block_s, K, T):
    """Lists ascend, hold every selected token once, and the bits say who selected it; scratch is clean for
    the next block; behind the list stands its last token, without bits."""
    indices = selection(2, 30, T, K, generator=torch.Generator().manual_seed(1))
    indices[:, 5:7] = indices[:, 5:7].flip(-1)  # empty slots first
    indices[0, :10] = -1  # whole blocks are empty
    poison()
    lists, bits, length = (x.cpu() for x in sparse.union(indices.to(DEVICE), T, block_s))
    blocks = -(-30 // block_s)
    assert len(lists) == len(bits) == len(length) == 2 * blocks
    for b in range(2 * blocks):
        first = b % blocks * block_s
        rows = indices[b // blocks, first:first + block_s].tolist()
        want = sorted({t for row in rows for t in row if t >= 0})
        n = int(length[b])
        assert lists[b, :n].tolist() == want
        for t, who in zip(want, bits[b, :n].tolist()):
            assert who == sum(1 << i for i, row in enumerate(rows) if t in row)
        assert (bits[b, n:n + sparse.UNION_PAD] == 0).all()
        if want:
            assert (lists[b, n:n + sparse.UNION_PAD] == want[-1]).all()


def test_union_of_single_queries():
    """The lists are the selections as they are; a length ends behind the last token."""
    rows = [[3, 5, -1, -1], [-1, -1, -1, -1], [-1, 7, -1, 2]]
    indices = torch.tensor([rows], dtype=torch.int32, device=DEVICE)
    lists, _, length = sparse.union(indices, 8, 1)
    assert torch.equal(lists, indices) and length.tolist() == [2, 0, 4]


# ---- numbers that are not finite ----

REGIMES = [  # S, T, H, V, K, dtype
    (4, 40, 4, 32, 8, HALF),  # few queries
    (9, 40, 16, 32, 8, HALF),  # unions of 4 queries
    (9, 40, 16, 16, 8, HALF),  # the same, a kernel for each product of the backward
    (9, 40, 3, 16, 8, torch.float32),  # single queries
    (9, 40, 40, 32, 8, HALF),
    (1, 500, 4, 16, 300, HALF)]  # lists in parts


def regime(S, T, H, V, K, dtype):
    """-> q, latents, indices, scale, V, dout."""
    arguments = draw((2, S, T, H, V, 16, K), dtype, seed=3)
    arguments[2][0, -1] = -1  # one query has nothing,
    arguments[2][1, -1, 6:] = -1  # another less than it could have
    return arguments


def values_and_gradients(q, latents, indices, scale, V, dout):
    """-> out, lse, dq, dlatents"""
    q = q.detach().clone().requires_grad_()
    latents = latents.detach().clone().requires_grad_()
    poison()
    out, lse = sparse_attention(q, latents, indices, scale, V)
    return out.detach(), lse, *torch.autograd.grad(out, (q, latents), dout)


@pytest.mark.parametrize("case", REGIMES)
def test_unselected_tokens_are_never_read(case):
    """Neither forward nor backward, token 0 as little as others: an empty slot stands for no token (T11)."""
    q, latents, indices, scale, V, dout = regime(*case)
    indices = indices.clone()
    indices[indices == 0] = 1  # nobody selects token 0
    poisoned = latents.detach().clone()
    for b in range(len(q)):
        unselected = torch.ones(latents.shape[1], dtype=torch.bool, device=DEVICE)
        unselected[indices[b][indices[b] >= 0].long()] = False
        assert unselected[0] and (indices[b] < 0).any()
        poisoned[b, unselected] = NAN
    clean = values_and_gradients(q, latents, indices, scale, V, dout)
    got = values_and_gradients(q, poisoned, indices, scale, V, dout)
    for x, y in zip(got[:3], clean[:3]):
        assert torch.equal(x, y)
    eps = torch.finfo(dout.dtype).eps  # the order of atomics
    torch.testing.assert_close(got[3], clean[3], rtol=2 * eps, atol=2 * eps)


@pytest.mark.parametrize("case", REGIMES)
def test_query_that_is_not_finite(case):
    """NaN, or an infinity that makes some score infinite, in one element of q makes NaN of its row, no
    other."""
    q, latents, indices, scale, V, dout = regime(*case)
    broken = q.detach().clone()
    broken[1, 0, 2, 5] = NAN
    broken[1, 0, 1, 5] = INF
    latents = latents.detach().clone()
    assert indices[1, 0, 0] >= 0
    latents[1, indices[1, 0, 0], 5] = 1.0  # so that its score is infinite, not minus infinite
    clean = values_and_gradients(q, latents, indices, scale, V, dout)
    out, lse, dq, _ = values_and_gradients(broken, latents, indices, scale, V, dout)
    for got, want in zip((out, lse, dq), clean):
        assert got[1, 0, 1:3].isnan().all()
        got[1, 0, 1:3] = want[1, 0, 1:3]
        assert torch.equal(got, want)


@pytest.mark.parametrize("case", REGIMES)
@pytest.mark.parametrize("rope", [False, True])
def test_selected_token_that_is_not_finite(case, rope):
    """NaN in a token, in a value or in its rope part, makes NaN of all rows that selected it, out, lse and
    dq. Those of other blocks do not change, and where queries share a list, the lse of its other rows does
    not either."""
    q, latents, indices, scale, V, dout = regime(*case)
    token = int(indices[1, 0, 0])
    broken = latents.detach().clone()
    broken[1, token, V + 4 if rope else V - 2] = NAN
    clean = values_and_gradients(q, latents, indices, scale, V, dout)
    out, lse, dq, dlatents = values_and_gradients(q, broken, indices, scale, V, dout)
    hit = (indices == token).any(-1)  # (B, S)
    hit[0] = False
    assert hit.any()
    for x in (out, lse, dq):
        assert x[hit].isnan().all()
    assert dlatents[1, token].isnan().all()
    assert torch.equal(lse[~hit], clean[1][~hit])
    sharing = sparse.sharing_queries(q.shape[2], q.dtype)  # in the forward one, if queries are few
    forward_sharing = 1 if q.shape[1] <= sparse.FEW_QUERIES else sharing
    for got, want, shared in ((out, clean[0], forward_sharing), (dq, clean[2], sharing)):
        near = hit.clone()  # and the other queries of its blocks
        for s in hit[1].nonzero()[:, 0].tolist():
            near[1, s // shared * shared:(s // shared + 1) * shared] = True
        assert torch.equal(got[~near], want[~near])


def test_blocks_of_the_forward_are_no_larger_than_promised():
    """What is not finite stays among the fewer than 32 neighbours that share a list: 31 queries of one
    head."""
    q, latents, indices, scale, V, dout = draw((1, 70, 80, 1, 16, 16, 8), HALF)
    token = 79
    indices = torch.where(indices == token, 5, indices)
    indices[0, 65, 0] = token
    broken = latents.detach().clone()
    broken[0, token] = NAN
    clean = values_and_gradients(q, latents, indices, scale, V, dout)
    got = values_and_gradients(q, broken, indices, scale, V, dout)
    assert got[0][0, 65].isnan().all()
    for x, y in zip(got[:3], clean):
        assert torch.equal(x[0, :65 - 30], y[0, :65 - 30])


@pytest.mark.parametrize("S", [4, 12])
def test_scores_of_minus_infinity(S):
    """A token whose scores are -inf weighs nothing, as in the reference."""
    q, latents, indices, scale, V, _ = draw((1, S, 40, 2, 16, 16, 8), torch.float32)
    q = q.detach().abs()
    latents = latents.detach().clone()
    latents[0, indices[0, 1, 0], 20] = -INF
    got = sparse_attention(q, latents, indices, scale, V)
    want = attend(q.double(), latents.double(), indices, scale, V)
    assert (indices[0] == indices[0, 1, 0]).any(-1).sum() > 1 and got[0].isfinite().all()
    assert_close(got[0], want[0], *bounds("out", (1, S, 40, 2, 16, 16, 8), torch.float32), "out")
    assert_lse(got[1], want[1], (1, S, 40, 2, 16, 16, 8))


# ---- the packed FP8 cache ----

def pack(x, V, ue8m0):
    """Published FP8 entry: e4m3 | float32 scale per 128 | bf16 rope -> bytes (..., n), and what they mean
    (..., D) float64."""
    values, scales = quantise(x[..., :V], ue8m0=ue8m0)  # (..., V), (..., ceil(V / 128))
    rope = x[..., V:].bfloat16()
    packed = torch.cat([t.contiguous().view(torch.uint8) for t in (values, scales, rope)], -1)
    scales = scales.double().repeat_interleave(min(128, V), -1)[..., :V]
    return packed, torch.cat((values.double() * scales, rope.double()), -1)


FP8 = [  # B, S, T, H, V, rope, K
    (1, 2, 50, 4, 32, 16, 20), (2, 1, 90, 12, 128, 32, 70), (2, 2, 150, 3, 512, 64, 140),
    (1, 2, 80, 20, 384, 16, 64), (1, 1, 200, 130, 192, 16, 160), (1, 12, 60, 1, 64, 8, 24),
    (1, 1, 1, 16, 16, 16, 3), (1, 2, 40, 40, 64, 0, 50)]
if CUDA:
    FP8 += [
        (4, 2, 5000, 128, 512, 64, 2048), (64, 1, 600, 128, 512, 64, 300), (4, 2, 5000, 16, 512, 64, 2048),
        (4, 2, 5000, 32, 512, 64, 2048)]


@pytest.mark.parametrize("shape", FP8)
@pytest.mark.parametrize("ue8m0", [True, False])
def test_fp8_cache(shape, ue8m0):
    q, latents, indices, scale, V, _ = draw(shape, HALF)
    if shape[1] > 1:
        indices[0, 0] = -1
    packed, meaning = pack(latents.detach(), V, ue8m0)
    poison()
    out, lse = sparse_attention(q.detach(), packed, indices, scale, V)
    want, lse64 = attend(q.detach().double(), meaning, indices, scale, V)
    assert out.dtype == HALF and out.is_contiguous() and lse.is_contiguous()
    assert_close(out, want, *bounds("out", shape, HALF), "out")
    # Hopper's kernel reads values times their scale in bf16
    rounded = 0 if ue8m0 else torch.finfo(HALF).eps / 4
    assert_lse(lse, lse64, shape, rounded=rounded)


def test_fp8_cache_in_float32():
    """Queries in float32 meet the same cache."""
    shape = (1, 3, 70, 5, 64, 16, 40)
    q, latents, indices, scale, V, _ = draw(shape, torch.float32)
    packed, meaning = pack(latents.detach(), V, True)
    out, lse = sparse_attention(q.detach(), packed, indices, scale, V)
    want, lse64 = attend(q.detach().double(), meaning, indices, scale, V)
    assert_close(out, want, *bounds("out", shape, torch.float32), "out")
    assert_lse(lse, lse64, shape)


def test_fp8_not_finite():
    """Rows of a query or of a selected token that is not finite become NaN, no others; unselected tokens are
    not read. A block with a NaN is packed as NaN."""
    q, latents, indices, scale, V, _ = draw((2, 4, 60, 3, 160, 16, 12), HALF)
    indices[indices == 0] = 1
    indices[0, 2, 5:] = -1
    indices[1, 1] = -1
    clean = sparse_attention(q.detach(), sparse_attn.pack_latents(latents.detach(), V), indices, scale, V)
    broken = latents.detach().clone()
    broken[:, 0] = NAN  # unselected
    token = int(indices[1, 0, 3])
    broken[1, token, 140] = NAN
    queries = q.detach().clone()
    queries[0, 2, 1, 170] = NAN
    got = sparse_attention(queries, sparse_attn.pack_latents(broken, V), indices, scale, V)
    hit = torch.zeros(2, 4, 3, dtype=torch.bool, device=DEVICE)
    hit[1] = (indices[1] == token).any(-1)[:, None]
    hit[0, 2, 1] = True
    for x, y in zip(got, clean):
        assert x[hit].isnan().all() and torch.equal(x[~hit], y[~hit])


# ---- registration, arguments ----

def samples():
    """(operation, its arguments): the three operations on small and on odd sizes."""
    for shape, dtype in (((1, 9, 12, 2, 16, 16, 4), HALF), ((1, 3, 12, 2, 24, 8, 4), torch.float32)):
        q, latents, indices, scale, V, dout = draw(shape, dtype)
        yield sparse.sparse_attention_operation, (q, latents, indices, scale, V)
        out, lse = sparse_attention(q.detach(), latents.detach(), indices, scale, V)
        yield sparse.sparse_attention_backward, (q.detach(), latents.detach(), indices, out, lse, dout, scale)
        packed, _ = pack(latents.detach(), V, True)
        yield sparse.sparse_attention_fp8_operation, (q.detach(), packed, indices, scale, V)


@pytest.mark.parametrize("number", range(6))
def test_registration(number):
    """Schema, fake results (shapes, dtypes, strides) and autograd hold, also with dynamic shapes."""
    operation, arguments = list(samples())[number]
    if CUDA and operation is sparse.sparse_attention_backward:  # atomics: two runs differ in the last bits
        opcheck(operation.overload, arguments, test_utils=("test_schema", "test_faketensor"))
    else:
        eps = torch.finfo(arguments[0].dtype).eps
        opcheck(operation.overload, arguments, rtol=2 * eps, atol=2 * eps)


def test_compiles_into_one_graph():
    """torch.compile passes through the public function, gradients included."""
    q, latents, indices, scale, V, dout = draw((1, 3, 12, 2, 16, 16, 4), torch.float32)
    packed, _ = pack(latents.detach(), V, True)

    def both(q, latents, packed):
        out, lse = sparse_attention(q, latents, indices, scale, V)
        return out, lse, *sparse_attention(q.detach(), packed, indices, scale, V)

    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")(q, latents, packed)
    eager = both(q, latents, packed)
    for x, y in zip(compiled, eager):
        assert torch.equal(x, y)
    for x, y in zip(*(torch.autograd.grad(x[0], (q, latents), dout) for x in (compiled, eager))):
        torch.testing.assert_close(x, y)


def test_hopper_takes_over_where_it_is_supported(monkeypatch):
    """The hand-over to triton_kernels.hopper: its interface, and that results come back contiguous and in the
    dtypes of the operation. A stand-in calls the portable kernels and returns views of padded heads."""
    calls = []

    def chapter(*arguments):
        return None if calls and calls[-1] == "inside" else SimpleNamespace(
            gluon_forward=forward, gluon_backward=backward)

    def padded(x):
        return torch.cat((x, x), 2)[:, :, :x.shape[2]]

    def forward(q, latents, indices, scale):
        calls.append("inside")
        out, lse = sparse.sparse_attention_operation(q, latents, indices, scale, 16)
        calls[-1] = "forward"
        return padded(out), padded(lse)

    def backward(q, latents, indices, out, lse, dout, scale):
        calls.append("inside")
        dq, dlatents = sparse.sparse_attention_backward(q, latents, indices, out, lse, dout, scale)
        calls[-1] = "backward"
        return padded(dq), dlatents.float()

    monkeypatch.setattr(sparse, "hopper_chapter", chapter)
    check((2, 3, 40, 5, 16, 16, 8), HALF)
    assert calls == ["forward", "backward"]


def test_bad_input():
    """One line that names the value."""
    q, latents, indices, scale, V, _ = draw(SHAPES[0], HALF)
    packed = torch.zeros(1, 20, 16 + 4 + 32, dtype=torch.uint8, device=DEVICE)
    bad = [
        ("int64", (q, latents, indices.long(), scale, V)),
        ("(B,S,H,D)", (q[0], latents, indices, scale, V)),
        ("(B,T,D)", (q, latents[0], indices, scale, V)),
        ("latents is", (q, latents[..., 1:], indices, scale, V)),
        ("latents is", (q, latents.repeat(2, 1, 1), indices, scale, V)),
        ("indices is", (q, latents, indices[:, 1:], scale, V)),
        ("latents is", (q, latents.to(torch.uint8), indices, scale, V)),
        ("value_dim=0", (q, latents, indices, scale, 0)),
        ("value_dim=33", (q, latents, indices, scale, 33)),
        ("value_dim=18", (q, packed, indices, scale, 18)),
        ("float64", (q.double(), latents, indices, scale, V))]
    for text, arguments in bad:
        with pytest.raises(ValueError) as error:
            kernels.sparse_attention(*arguments)
        assert text in str(error.value) and "\n" not in str(error.value), error.value
    with pytest.raises(RuntimeError):  # the cache has no gradient, and nobody is told otherwise
        sparse_attention(q, packed, indices, scale, V)[0].sum().backward()
