"""Sparse attention kernels against float64 autograd: outputs, lse, gradients, awkward shapes; the packed FP8 cache; splits; repeats.

Runs on the GPU (bf16, real shapes too) or through Triton's interpreter (fp16 and fp32, small shapes)."""
import pytest
import torch

import kernels
from kernels import sparse_attention

CUDA = torch.cuda.is_available()
DEVICE, HALF = ("cuda", torch.bfloat16) if CUDA else ("cpu", torch.float16)  # the interpreter's bf16 product is broken


def errors(x, y):
    """Relative error of the whole tensor and of the worst row (rows of almost nothing measured against the mean row)."""
    x, y = x.double(), y.double()
    whole = (x - y).norm() / y.norm().clamp(min=1)
    rows = (x - y).norm(dim=-1) / y.norm(dim=-1).clamp(min=y.norm().item() / y[..., 0].numel() ** 0.5 + 0.05)
    return whole.item(), rows.max().item()


def reference(q, latents, indices, scale, value_dim):
    tokens = latents[torch.arange(len(q), device=q.device)[:, None, None], indices.clamp(min=0).long()]
    logits = (torch.einsum("bshd,bskd->bshk", q, tokens) * scale).masked_fill((indices < 0)[:, :, None], float("-inf"))
    lse = logits.logsumexp(-1)
    p = torch.exp(logits - lse.masked_fill(lse == float("-inf"), 0)[..., None])
    return torch.einsum("bshk,bskd->bshd", p, tokens[..., :value_dim]), lse


def selection(B, S, T, K, overlap=0.8, empty=0.1, generator=None):
    """Ascending selections below the diagonal; neighbours keep a share `overlap`; some rows short, some empty."""
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


SHAPES = [  # B, S, T, H, value_dim, rope, K
    (1, 5, 20, 2, 16, 16, 8), (2, 13, 37, 3, 32, 16, 16), (1, 1, 1, 1, 16, 16, 4),
    (2, 7, 7, 5, 24, 8, 33), (1, 6, 50, 16, 16, 16, 40), (1, 3, 70, 70, 16, 16, 40)]
if CUDA:
    SHAPES += [(1, 300, 700, 12, 128, 32, 128), (2, 129, 1000, 16, 512, 64, 256), (1, 200, 900, 12, 256, 32, 100),
               (1, 33, 600, 128, 512, 64, 512), (1, 40, 300, 96, 96, 24, 77), (1, 64, 300, 1, 64, 16, 31)]


def run(shape, dtype, seed=0, size=1.0):
    B, S, T, H, D, R, K = shape
    generator = torch.Generator().manual_seed(seed)
    q = (torch.randn(B, S, H, D + R, generator=generator) * size).to(DEVICE, dtype).requires_grad_()
    latents = torch.randn(B, T, D + R, generator=generator).to(DEVICE, dtype).requires_grad_()
    indices = selection(B, S, T, K, generator=generator).to(DEVICE)
    dout = torch.randn(B, S, H, D, generator=generator).to(DEVICE, dtype)
    return q, latents, indices, (D + R) ** -0.5, D, dout


@pytest.mark.parametrize("shape,dtype", [(s, d) for s in SHAPES for d in (HALF, torch.float32) if d == HALF or s[4] < 128])
def test_forward_backward(shape, dtype):
    q, latents, indices, scale, D, dout = run(shape, dtype)
    out, lse = sparse_attention(q, latents, indices, scale, D)
    dq, dl = torch.autograd.grad(out, (q, latents), dout)
    q64, l64 = q.detach().double().requires_grad_(), latents.detach().double().requires_grad_()
    out64, lse64 = reference(q64, l64, indices, scale, D)
    dq64, dl64 = torch.autograd.grad(out64, (q64, l64), dout.double())
    whole, worst = (6e-3, 2.5e-2) if dtype != torch.float32 else (1e-5, 1e-4)
    for name, x, y in (("out", out, out64), ("dq", dq, dq64), ("dlatents", dl, dl64)):
        e = errors(x, y)
        assert e[0] < whole and e[1] < worst, (name, e)
    empty = (indices < 0).all(-1)[..., None].expand_as(lse)
    assert (lse[empty] == float("-inf")).all() and (out[empty] == 0).all() and (dq[empty] == 0).all()
    assert (lse[~empty] - lse64[~empty]).abs().max() < (1e-2 if dtype != torch.float32 else 1e-4)


def test_chunks_and_incoming_gradient():
    """A backward in many chunks equals one in a single chunk; twice the incoming gradient gives twice the gradients."""
    q, latents, indices, scale, D, dout = run((2, 13, 37, 3, 32, 16, 16), torch.float32)
    out, lse = kernels.sparse_forward(q.detach(), latents.detach(), indices, scale, D)
    args = (q.detach(), latents.detach(), indices, scale, out, lse)
    one, many, double = (kernels.sparse_backward(*args, dout * f, budget=b) for f, b in ((1, 1 << 30), (1, 1), (2, 1 << 30)))
    for i in (0, 1):
        torch.testing.assert_close(one[i], many[i], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(2 * one[i], double[i], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("fp8", [False, True])
def test_two_products(fp8):
    """The path of wide latents (scores, then a second gather for values or dq) on small shapes, in several chunks."""
    q, latents, indices, scale, D, dout = run((2, 9, 200, 6, 128, 16, 140), HALF)
    q, latents = q.detach(), latents.detach()
    packed, meaning = pack(latents, D, False)
    config = dict(BQ=4, rows=32, registers=None, flash=(32, 32, 3, 4), fused=None, two=0,
                  score=(32, 64, 3, 4), product=(32, 32, 3, 4), latent=(32, 32, 3, 4))
    q64, l64 = q.double().requires_grad_(), (meaning if fp8 else latents.double()).requires_grad_()
    out64, lse64 = reference(q64, l64, indices, scale, D)
    out, lse = kernels.sparse_forward(q, packed if fp8 else latents, indices, scale, D, config, 200_000)
    got = [("out", out, out64), ("lse", lse.exp(), lse64.exp())]
    if not fp8:
        grads = kernels.sparse_backward(q, latents, indices, scale, out, lse, dout, config, 400_000)
        grads64 = torch.autograd.grad(out64, (q64, l64), dout.double())
        got += [("dq", grads[0], grads64[0]), ("dlatents", grads[1], grads64[1])]
    for name, x, y in got:
        e = errors(x, y)
        assert e[0] < 6e-3 and e[1] < 2.5e-2, (name, e)


def test_union():
    """Lists ascend, hold every selected token once, and the bits say who selected it; scratch is clean for the next block."""
    indices = selection(2, 30, 90, 17, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    for BQ in (2, 5, 7, 31):
        lists, bits, length = (x.cpu() for x in kernels.sparse_union(indices, 90, BQ))
        blocks = -(-30 // BQ)
        for b in range(2 * blocks):
            rows = indices.cpu()[b // blocks, b % blocks * BQ:(b % blocks + 1) * BQ]
            want = sorted({t for row in rows.tolist() for t in row if t >= 0})
            assert lists[b, :length[b]].tolist() == want
            for t, w in zip(want, bits[b, :length[b]].tolist()):
                assert w == sum(1 << i for i, row in enumerate(rows.tolist()) if t in row)


def test_unselected_tokens_are_never_read():
    q, latents, indices, scale, D, dout = run((1, 6, 40, 4, 16, 16, 8), HALF)
    poisoned = latents.detach().clone()
    untouched = torch.ones(40, dtype=torch.bool, device=DEVICE)
    untouched[indices[indices >= 0].long()] = False
    untouched[0] |= not (indices == 0).any()
    poisoned[0, untouched] = float("nan")
    for x, y in zip(sparse_attention(q, latents, indices, scale, D), sparse_attention(q, poisoned, indices, scale, D)):
        assert torch.equal(x, y)


@pytest.mark.parametrize("size", [1e-4, 30.0])
def test_magnitudes(size):
    q, latents, indices, scale, D, dout = run((1, 9, 60, 4, 32, 16, 24), HALF, size=size)
    out, lse = sparse_attention(q, latents, indices, scale, D)
    want, lse64 = reference(q.detach().double(), latents.detach().double(), indices, scale, D)
    assert errors(out, want)[0] < 6e-3 and torch.isfinite(torch.autograd.grad(out, latents, dout)[0]).all()


def pack(x, D, power_of_two):
    """Published FP8 entry: e4m3 | float32 scale per 128 | bf16 rope -> bytes, and what they mean."""
    parts, scales = [], []
    for piece in x[..., :D].float().split(128, -1):
        s = piece.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448
        scales.append(torch.exp2(torch.ceil(torch.log2(s))) if power_of_two else s)
        parts.append((piece / scales[-1]).clamp(-448, 448).to(torch.float8_e4m3fn))
    rope = x[..., D:].bfloat16()
    packed = torch.cat([t.contiguous().view(torch.uint8) for t in (torch.cat(parts, -1), torch.cat(scales, -1), rope)], -1)
    return packed, torch.cat([p.double() * s.double() for p, s in zip(parts, scales)] + [rope.double()], -1)


FP8 = [(1, 2, 50, 4, 32, 16, 20), (2, 1, 90, 12, 128, 32, 70), (2, 2, 150, 3, 512, 64, 140), (1, 2, 80, 20, 384, 16, 64),
       (1, 1, 200, 130, 192, 16, 160), (1, 12, 60, 2, 64, 8, 24)] + ([(4, 2, 5000, 128, 512, 64, 2048), (64, 1, 600, 128, 512, 64, 300)] if CUDA else [])


@pytest.mark.parametrize("shape", FP8)
@pytest.mark.parametrize("power_of_two", [True, False])
def test_fp8_cache(shape, power_of_two):
    q, latents, indices, scale, D, _ = run(shape, HALF)
    packed, meaning = pack(latents.detach(), D, power_of_two)
    out, lse = sparse_attention(q.detach(), packed, indices, scale, D)
    out64, lse64 = reference(q.detach().double(), meaning, indices, scale, D)
    e = errors(out, out64)
    assert e[0] < 6e-3 and e[1] < 2.5e-2, e
    assert torch.nan_to_num(lse - lse64, 0, 0, 0).abs().max() < 1e-2 and ((lse == float("-inf")) == (indices < 0).all(-1)[..., None]).all()


def test_mixed_dtypes_and_strides():
    """Under autocast the latents may come in float32; views of larger tensors are as good as contiguous ones."""
    q, latents, indices, scale, D, dout = run((2, 6, 40, 4, 16, 16, 8), HALF)
    wide = torch.cat((q, q), 1)[:, :6].transpose(1, 2).contiguous().transpose(1, 2)
    plain, mixed = (sparse_attention(a, b, indices, scale, D)[0] for a, b in ((q, latents), (wide, latents.float())))
    assert torch.equal(plain, mixed)
    torch.testing.assert_close(*(torch.autograd.grad(x, latents, dout)[0] for x in (plain, mixed)), rtol=1e-2, atol=1e-2)


def test_forward_repeats_bit_equal():
    q, latents, indices, scale, D, _ = run(SHAPES[-1], HALF)
    for x, y in zip(sparse_attention(q, latents, indices, scale, D), sparse_attention(q, latents, indices, scale, D)):
        assert torch.equal(x, y)


def test_bad_input():
    q, latents, indices, scale, D, _ = run(SHAPES[0], HALF)
    for bad in (lambda: sparse_attention(q, latents, indices.long(), scale, D), lambda: sparse_attention(q[0], latents, indices, scale, D),
                lambda: sparse_attention(q, latents[..., 1:], indices, scale, D), lambda: sparse_attention(q, latents.to(torch.uint8), indices, scale, D)):
        with pytest.raises(ValueError):
            bad()
