"""kernels_hopper against a float32 reference on the same bf16 inputs: awkward selections, shapes and magnitudes, gradients, repeats. Needs an sm_90 GPU."""
import pytest
import torch

pytest.importorskip("triton.experimental.gluon")
from triton_kernels import hopper as kh

pytestmark = pytest.mark.skipif(not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs an sm_90 GPU")
SCALE = 192 ** -0.5


def reference(q, latents, indices, scale):
    q, latents = q.float(), latents.float()
    rows = torch.arange(q.shape[0], device=q.device)[:, None, None]
    k = latents[rows, indices.clamp(min=0).long()]                               # (B, S, K, 576)
    x = torch.einsum("bshd,bskd->bshk", q, k) * scale
    x = x.masked_fill((indices < 0)[:, :, None], float("-inf"))
    lse = x.logsumexp(-1)
    p = torch.exp(x - lse.masked_fill(lse.isinf(), 0)[..., None])
    return torch.einsum("bshk,bskd->bshd", p, k[..., :512]), lse


def select(B, S, T, K, empty=0.1, seed=0):
    """K distinct tokens per query; some slots are -1, anywhere; the second query has none, the third one only, the fourth a whole empty tile."""
    g = torch.Generator("cuda").manual_seed(seed)
    indices = torch.full((B, S, K), -1, dtype=torch.int32, device="cuda")
    n = min(K, T)
    indices[..., :n] = torch.rand(B, S, T, device="cuda", generator=g).argsort(-1)[..., :n].int()
    indices[torch.rand(B, S, K, device="cuda", generator=g) < empty] = -1
    if S > 3:
        indices[:, 1] = -1
        indices[:, 2, 1:] = -1
        indices[:, 3, :64] = -1
    return indices


def inputs(B, S, T, H, seed=0, q_scale=1.0):
    g = torch.Generator("cuda").manual_seed(seed)
    draw = lambda *n: torch.randn(*n, device="cuda", generator=g)
    return (q_scale * draw(B, S, H, 576)).bfloat16(), draw(B, T, 576).bfloat16(), draw(B, S, H, 512).bfloat16()


def errors(x, ref, least=1e-2):
    """relative error of the whole tensor and of the worst row, a row counting at least as the average one times `least`, and as 0.01"""
    x, ref = x.float().flatten(0, -2), ref.float().flatten(0, -2)
    assert torch.isfinite(x).all()
    rows, floor = ref.norm(dim=-1), max(least * ref.norm(dim=-1).mean().item(), 1e-2)
    return ((x - ref).norm() / ref.norm().clamp(min=1e-2 * len(ref) ** 0.5)).item(), ((x - ref).norm(dim=-1) / rows.clamp(min=floor)).max().item()


def poison(monkeypatch):
    empty = torch.Tensor.new_empty
    monkeypatch.setattr(torch.Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(float("nan")))
    like = torch.empty_like
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: like(x, **k).fill_(float("nan")))


SHAPES = [(1, 9, 300, 64, 64), (2, 7, 500, 128, 128), (1, 11, 700, 192, 192), (2, 5, 3000, 128, 2048), (1, 300, 2500, 128, 512), (1, 4, 40, 72, 100),
          (1, 1, 1, 128, 64)]


@pytest.mark.parametrize("B,S,T,H,K", SHAPES)
def test_forward(B, S, T, H, K, monkeypatch):
    q, latents, _ = inputs(B, S, T, H)
    indices = select(B, S, T, K)
    ref, ref_lse = reference(q, latents, indices, SCALE)
    poison(monkeypatch)
    out, lse = kh.sparse_forward(q, latents, indices, SCALE)
    whole, worst = errors(out, ref)
    assert whole < 4e-3 and worst < 1e-2, (whole, worst)
    assert torch.equal(lse.isinf(), ref_lse.isinf()) and torch.allclose(lse, ref_lse, atol=2e-3, rtol=1e-5)
    assert not out[ref_lse.isinf()].any()
    again, lse2 = kh.sparse_forward(q, latents, indices, SCALE)
    assert torch.equal(out, again) and torch.equal(lse, lse2)


@pytest.mark.parametrize("q_scale", [0.0, 1e-3, 30.0])
def test_forward_magnitudes(q_scale):
    """all-equal scores, nearly equal ones, and a softmax that is almost one-hot"""
    q, latents, _ = inputs(1, 6, 900, 128, q_scale=q_scale)
    indices = select(1, 6, 900, 512)
    ref, ref_lse = reference(q, latents, indices, SCALE)
    out, lse = kh.sparse_forward(q, latents, indices, SCALE)
    whole, worst = errors(out, ref)
    assert whole < 4e-3 and worst < 1e-2, (whole, worst)
    assert torch.allclose(lse, ref_lse, atol=2e-3, rtol=1e-5)


@pytest.mark.parametrize("B,S,T,H,K", SHAPES)
def test_backward(B, S, T, H, K, monkeypatch):
    q, latents, dout = inputs(B, S, T, H)
    indices = select(B, S, T, K)
    out, lse = kh.sparse_forward(q, latents, indices, SCALE)
    qr, lr = q.float().requires_grad_(), latents.float().requires_grad_()
    ref, _ = reference(qr, lr, indices, SCALE)
    seen = (indices >= 0).any(-1)
    ref_dq, ref_dl = torch.autograd.grad((ref * dout.float())[seen].sum(), (qr, lr))
    poison(monkeypatch)
    scratch = 4 * 256 * 256 * 3 if S > 100 else 2 ** 30                          # many chunks
    dq, dl = kh.sparse_backward(q, latents, indices, out, lse, dout, SCALE, scratch)
    for x, r in ((dq, ref_dq), (dl, ref_dl)):
        whole, worst = errors(x, r, 1.0)  # dq of a query with one token is the difference of two equal numbers, rounded to bf16
        assert whole < 6e-3 and worst < 2e-2, (whole, worst)
    assert not dq[~seen].any()
    used = torch.zeros(B, T + 1, dtype=torch.bool, device="cuda").scatter_(1, indices.flatten(1).long().add(1), True)[:, 1:]
    assert not dl[~used].any()
    dq2, dl2 = kh.sparse_backward(q, latents, indices, out, lse, dout, SCALE, scratch)
    assert torch.equal(dq, dq2)
    assert (dl - dl2).norm() < 1e-5 * dl.norm()                                  # float32 atomics: the order of the sum varies


def pack(B, T, seed=0):
    """a random packed FP8 cache (512 e4m3 | 4 float32 scales | 64 bf16) and the bf16 latents it stands for: as they enter the products"""
    g = torch.Generator("cuda").manual_seed(seed)
    values = torch.randn(B, T, 4, 128, device="cuda", generator=g).mul(100).clamp(-448, 448).to(torch.float8_e4m3fn)
    scales = torch.randn(B, T, 4, device="cuda", generator=g).exp() * 1e-2
    rope = torch.randn(B, T, 64, device="cuda", generator=g).bfloat16()
    cache = torch.cat([values.flatten(2).view(torch.uint8), scales.view(torch.uint8), rope.view(torch.uint8)], -1)
    return cache, torch.cat([(values.float() * scales[..., None]).flatten(2).bfloat16(), rope], -1)


@pytest.mark.parametrize("B,S,T,H,K", SHAPES + [(16, 2, 4096, 128, 2048)])
def test_forward_packed(B, S, T, H, K, monkeypatch):
    q, _, _ = inputs(B, S, T, H)
    cache, latents = pack(B, T)
    indices = select(B, S, T, K)
    ref, ref_lse = reference(q, latents, indices, SCALE)
    poison(monkeypatch)
    out, lse = kh.sparse_forward(q, cache, indices, SCALE)
    whole, worst = errors(out, ref)
    assert whole < 4e-3 and worst < 1e-2, (whole, worst)
    assert torch.equal(lse.isinf(), ref_lse.isinf()) and torch.allclose(lse, ref_lse, atol=2e-3, rtol=1e-5)
    again, lse2 = kh.sparse_forward(q, cache, indices, SCALE)
    assert torch.equal(out, again) and torch.equal(lse, lse2)


@pytest.mark.parametrize("B,S,T,H,Hk,D", [(1, 300, 300, 16, 16, 192), (2, 130, 517, 17, 1, 64), (1, 1, 900, 33, 33, 128), (3, 128, 128, 16, 16, 192)])
@pytest.mark.parametrize("packed", [False, True])
def test_loss_target(B, S, T, H, Hk, D, packed):
    """p of the warm-up loss: every visible pair; chunks begin in the middle of a batch"""
    g = torch.Generator("cuda").manual_seed(0)
    q, k = (torch.randn(B, n, h, D, device="cuda", generator=g).bfloat16() for n, h in ((S, H), (T, Hk)))
    last = torch.arange(T - S, T, device="cuda", dtype=torch.int32).expand(B, S).contiguous()
    first = (last // 70 * 70 if packed else 0 * last).contiguous()
    s = torch.arange(T, device="cuda")
    seen = (s >= first[..., None]) & (s <= last[..., None])
    x = torch.einsum("bshd,bthd->bsht", q.float(), k.float().expand(-1, -1, H, -1)) * D ** -0.5
    lse = x.masked_fill(~seen[:, :, None], float("-inf")).logsumexp(-1)
    want = torch.where(seen, torch.exp(x - lse[..., None]).mean(2), 0)
    blocks, TP = -(-S // 128), -(-T // 128) * 128
    for b in range(B):
        p = torch.full((blocks * 128, TP), float("nan"), device="cuda")
        kh.loss_target(q, k, (lse.transpose(1, 2) * kh.LOG2E.value).contiguous(), p, D ** -0.5, first, last, b * blocks, blocks)
        got = p[:S, :T].masked_fill(~seen[b], 0)
        whole, worst = errors(got, want[b])
        assert whole < 1e-4 and worst < 1e-3, (whole, worst)


def test_refuses():
    q, latents, _ = inputs(1, 4, 100, 128)
    indices = select(1, 4, 100, 64)
    with pytest.raises(ValueError):
        kh.sparse_forward(q.half(), latents.half(), indices, SCALE)
    with pytest.raises(ValueError):
        kh.sparse_forward(q[:, :, :16], latents, indices, SCALE)
    with pytest.raises(ValueError):
        kh.sparse_forward(q, latents, indices[:, :3], SCALE)
