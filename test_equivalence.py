"""The reference held to the paper, to brute force and to itself. (T<n>) names the trap of the field that a test guards against; a test
with T <= k would prove nothing about the indexer, so all of them go well beyond. Kernels: test_kernels.py. Published models: test_checkpoint.py.
"""
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

import indexer
import sparse_attn
from generate import sample
from model import Attention, Config, NextTokenLoss, Transformer, apply_rope, operations, rope_frequencies

YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1, mscale=1.0, mscale_all_dim=0.707)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def close(actual, expected, whole=2e-6, row=2e-5):
    """Relative error of the whole tensor and of its worst row; -inf must stand in the same places."""
    a, e = (torch.as_tensor(x).double() for x in (actual, expected))
    assert a.shape == e.shape
    assert torch.equal(a == -math.inf, e == -math.inf)
    a, e = (torch.where(x == -math.inf, 0, x) for x in (a, e))
    assert torch.isfinite(a).all()
    assert (a - e).norm() <= whole * e.norm() + 1e-30, f"whole: {(a - e).norm() / e.norm():.2e}"
    if a.dim() > 1:
        rows = (a - e).flatten(0, -2).norm(dim=-1) / (e.flatten(0, -2).norm(dim=-1) + 1e-3 * e.norm() / e[..., 0].numel() ** 0.5 + 1e-30)
        assert rows.max() <= row, f"worst row: {rows.max():.2e}"


# ---- the layer, once more, from the paper's formulas: numpy, float64, one query at a time ----

def turn(x, position, frequencies, interleaved):
    """RoPE as multiplication by e^(i position frequency)."""
    half = len(frequencies)
    z = (x[0::2] + 1j * x[1::2] if interleaved else x[:half] + 1j * x[half:]) * np.exp(1j * position * frequencies)
    return np.stack((z.real, z.imag), -1).ravel() if interleaved else np.concatenate((z.real, z.imag))


def paper_layer(layer, h, first, topk):
    """h (T, hidden) -> out (T, hidden), selections: MLA with the indexer, equations 1 and 2, for one sequence."""
    c, P = layer.config, {k: v.detach().double().numpy() for k, v in layer.named_parameters()}
    rms = lambda x, w: x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w
    scale, factor = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5, 1.0
    frequencies = c.rope_theta ** (-np.arange(0, c.qk_rope_head_dim, 2) / c.qk_rope_head_dim)
    if c.rope_scaling:
        y, dim = c.rope_scaling, c.qk_rope_head_dim
        def boundary(turns):  # the dimension that turns so often within the original context
            return dim * math.log(y["original_max_position_embeddings"] / (turns * 2 * math.pi)) / (2 * math.log(c.rope_theta))
        low, high = max(math.floor(boundary(y["beta_fast"])), 0), min(math.ceil(boundary(y["beta_slow"])), dim - 1)
        keep = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
        frequencies = frequencies * keep + frequencies / y["factor"] * (1 - keep)
        scale *= (0.1 * y["mscale_all_dim"] * math.log(y["factor"]) + 1) ** 2
        factor = (0.1 * y["mscale"] * math.log(y["factor"]) + 1) / (0.1 * y["mscale_all_dim"] * math.log(y["factor"]) + 1)
    T, H, rank, nope = len(h), c.num_attention_heads, c.kv_lora_rank, c.qk_nope_head_dim
    bias = lambda name: P.get(name + ".bias", 0)
    q_latent = rms(h @ P["q_a_proj.weight"].T + bias("q_a_proj"), P["q_a_layernorm.weight"]) if c.q_lora_rank else h
    q = (q_latent @ P["q_b_proj.weight" if c.q_lora_rank else "q_proj.weight"].T).reshape(T, H, -1)
    kv = h @ P["kv_a_proj_with_mqa.weight"].T + bias("kv_a_proj_with_mqa")
    keys = (rms(kv[:, :rank], P["kv_a_layernorm.weight"]) @ P["kv_b_proj.weight"].T).reshape(T, H, -1)
    k_rope = [factor * turn(kv[s, rank:], s, frequencies, True) for s in range(T)]
    r = c.qk_rope_head_dim
    def index_rope(x, t):
        return np.concatenate((factor * turn(x[:r], t, frequencies, c.indexer_rope_interleave), x[r:]))
    k_raw = h @ P["indexer.wk.weight"].T
    k_raw = (k_raw - k_raw.mean(-1, keepdims=True)) / np.sqrt(k_raw.var(-1, keepdims=True) + 1e-6) * P["indexer.k_norm.weight"] + P["indexer.k_norm.bias"]
    out, chosen = np.zeros((T, H, c.v_head_dim)), []
    for t in range(T):
        q_index = (q_latent[t] @ P["indexer.wq_b.weight"].T).reshape(c.index_n_heads, -1)
        w = h[t] @ P["indexer.weights_proj.weight"].T
        score = {s: sum(w[j] * c.index_n_heads**-0.5 * max(0, index_rope(q_index[j], t) @ index_rope(k_raw[s], s) * c.index_head_dim**-0.5)
                        for j in range(c.index_n_heads)) for s in range(first[t], t + 1)}
        S = sorted(sorted(score, key=lambda s: (-score[s], s))[:topk])
        chosen.append(S)
        for i in range(H):
            q_rope = factor * turn(q[t, i, nope:], t, frequencies, True)
            logits = np.array([(q[t, i, :nope] @ keys[s, i, :nope] + q_rope @ k_rope[s]) * scale for s in S])
            p = np.exp(logits - logits.max())
            out[t, i] = (p / p.sum()) @ keys[S, i, nope:]
    return out.reshape(T, -1) @ P["o_proj.weight"].T + bias("o_proj"), chosen


def layer_and_run(sparse, T, **changes):
    config = Config(hidden_size=48, num_attention_heads=3, q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
                    index_n_heads=3, index_head_dim=16, index_topk=7)
    for key, value in changes.items():
        setattr(config, key, value)
    layer = Attention(config, 0)
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm.weight" in name else 0.0, 0.3)
    frequencies, amplitude = rope_frequencies(config)
    angles = (torch.arange(T)[:, None] * frequencies)[:, None]
    rope = lambda x, interleaved: apply_rope(x, interleaved, angles.cos() * amplitude, angles.sin() * amplitude)
    run = type("Run", (), dict(ops=operations("torch", torch.device("cpu")), sparse=sparse, index_fp8=False, index_loss=False, detach=True, first=None, last=None))
    return layer, rope, run


@pytest.mark.parametrize("changes", [{}, dict(rope_scaling=YARN, max_position_embeddings=256), dict(q_lora_rank=0), dict(indexer_rope_interleave=True),
                                     dict(attention_bias=True), dict(num_attention_heads=5, index_n_heads=1)], ids=str)
def test_layer_is_the_papers(changes):
    """(T1-T5, T7, T17) the module against formulas written independently of it; dense mode is the same with k = T."""
    T = 40
    layer, rope, run = layer_and_run(True, T, **changes)
    h, first = torch.randn(2, T, 48), torch.zeros(2, T, dtype=torch.int32)
    first[1, 17:] = 17  # two documents packed in the second row
    run.first = first
    for run.sparse, topk in ((True, 7), (False, T)):
        out = layer(h, rope, run)[0].detach()
        for b in range(2):
            close(out[b], paper_layer(layer, h[b].double().numpy(), first[b].tolist(), topk)[0], 5e-6, 5e-5)


def test_rope_depends_on_distance_only():
    """(T1-T3) q.k after RoPE is the same wherever the pair stands, and it does depend on the distance."""
    frequencies, _ = rope_frequencies(Config(rope_theta=100.0))
    q, k = torch.randn(2, 1, 1, 1, 16, dtype=torch.float64)
    def dot(t, s, interleaved):
        at = lambda x, p: apply_rope(x, interleaved, *((torch.tensor([[[float(p)]]]) * frequencies).cos(), (torch.tensor([[[float(p)]]]) * frequencies).sin()))
        return (at(q, t) * at(k, s)).sum().item()
    for interleaved in (True, False):
        assert dot(5, 2, interleaved) == pytest.approx(dot(905, 902, interleaved), abs=1e-3)
        assert abs(dot(5, 2, interleaved) - dot(5, 4, interleaved)) > 1e-2
    assert abs(dot(5, 2, True) - dot(5, 2, False)) > 1e-2


# ---- quantisation ----

E4M3 = sorted({(-1) ** s * (Fraction(m, 8) * Fraction(1, 64) if e == 0 else (1 + Fraction(m, 8)) * Fraction(2) ** (e - 7))
               for s in (0, 1) for e in range(16) for m in range(8) if (e, m) != (15, 7)})


def to_e4m3(x):
    """Nearest of the 253 e4m3 numbers, ties to the even mantissa, by exact arithmetic."""
    x = min(max(x, Fraction(-448)), Fraction(448))
    near = sorted(E4M3, key=lambda v: abs(v - x))[:2]
    if abs(near[0] - x) != abs(near[1] - x):
        return near[0]
    ulp = abs(near[0] - near[1])
    return near[0] if (near[0] / ulp) % 2 == 0 else near[1]


@pytest.mark.parametrize("ue8m0", [True, False])
def test_quantise_is_the_published_rounding(ue8m0):
    """(T8) bit for bit against exact arithmetic: amax clamped, times float32(1/448), power of two above it, round to nearest even."""
    x = torch.cat([torch.randn(6, 64) * 10.0 ** torch.arange(-7, 5, 2)[:, None], torch.zeros(1, 64), torch.full((1, 64), 448.0), torch.full((1, 64), 3.5)])
    x[-1, 1] = torch.nextafter(torch.tensor(3.5), torch.tensor(9.0))
    values, scales = indexer.quantise(x, block=32, ue8m0=ue8m0)
    assert values.dtype == torch.float8_e4m3fn and values.shape == x.shape and scales.shape == (9, 2)
    for row, value, scale in zip(x.unflatten(-1, (2, 32)).flatten(0, 1), values.float().unflatten(-1, (2, 32)).flatten(0, 1), scales.flatten()):
        raw = np.float32(max(row.abs().max().item(), np.float32(1e-4))) * np.float32(1 / 448)
        expected = Fraction(float(raw))
        if ue8m0:
            power = Fraction(2) ** math.frexp(raw)[1]
            expected = power / 2 if power / 2 == expected else power
        assert Fraction(scale.item()) == expected
        exact = [Fraction(float(np.float32(v.item()) / np.float32(scale.item()))) for v in row]
        assert [Fraction(v.item()) for v in value] == [to_e4m3(v) for v in exact]


def test_quantise_handles_any_width():
    for d in (1, 5, 128, 200, 512):
        values, scales = indexer.quantise(torch.randn(3, d))
        assert values.shape == (3, d) and scales.shape == (3, math.ceil(d / min(d, 128)))


def test_hadamard_is_orthogonal_and_keeps_scores():
    """(T9) equal to Sylvester's matrix; scores do not change; the FP8 error of a vector with an outlier does."""
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.kron(torch.tensor([[1., 1.], [1., -1.]]), matrix)
    x = torch.randn(7, 64)
    close(indexer.hadamard(x), x @ matrix / 8, 1e-6, 1e-6)
    q, k, w = torch.randn(1, 9, 2, 64), torch.randn(1, 9, 64), torch.randn(1, 9, 2)
    q[..., 3] *= 50
    plain = indexer.index_scores(q, k, w)
    close(indexer.index_scores(indexer.hadamard(q), indexer.hadamard(k), w), plain, 1e-5, 1e-4)
    def error(rotate):
        (qv, qs), (kv, ks) = indexer.quantise(q, 64, rotate), indexer.quantise(k, 64, rotate)
        return (indexer.index_scores(qv, kv, w * qs[..., 0], ks[..., 0]) - plain).nan_to_num(0).norm()
    assert error(True) != error(False) and error(True) < 0.1 * plain[plain > -math.inf].norm()
    with pytest.raises(ValueError, match="power of two"):
        indexer.hadamard(torch.randn(2, 48))


# ---- selection ----

def brute_select(scores, first, last, topk):
    rows = []
    for t, row in enumerate(scores):
        seen = [s for s in range(len(row)) if first[t] <= s <= last[t]]
        best = sorted(sorted(seen, key=lambda s: (-row[s], s))[:topk])
        rows.append(best + [-1] * (topk - len(best)))
    return rows


@pytest.mark.parametrize("S,T,topk", [(33, 33, 8), (5, 40, 12), (40, 40, 64), (1, 1, 1), (1, 30, 7), (64, 64, 1)])
@pytest.mark.parametrize("kind", ["random", "ties", "equal", "huge", "tiny"])
def test_select_is_exact_and_deterministic(S, T, topk, kind, monkeypatch):
    """(T10-T12) causal and document masks first; higher score, then lower position; -1 in unused places; the same in slices."""
    q, k, w = torch.randn(2, S, 3, 8), torch.randn(2, T, 8), torch.randn(2, S, 3)
    if kind in ("ties", "equal"):
        q, k, w = (x.sign() if kind == "ties" else torch.zeros_like(x) for x in (q, k, w))
    q = q * {"huge": 1e15, "tiny": 1e-18}.get(kind, 1)
    first = torch.randint(0, T, (2, S)).minimum(torch.arange(T - S, T)).int()
    last = torch.arange(T - S, T).expand(2, S).int().clone()
    last[1, -1] = -1  # padding: sees nothing
    got = indexer.select(q, k, w, topk, None, first, last)
    assert got.dtype == torch.int32 and got.shape == (2, S, topk)
    scores = torch.einsum("bsht,bsh->bst", torch.einsum("bshd,btd->bsht", q, k).relu(), w)
    for b in range(2):
        assert got[b].tolist() == brute_select(scores[b].tolist(), first[b].tolist(), last[b].tolist(), topk)
    monkeypatch.setattr(indexer, "SLICE", 100)
    assert torch.equal(indexer.select(q, k, w, topk, None, first, last), got)


def test_select_refuses_k_below_one():
    with pytest.raises(ValueError, match="index_topk=0"):
        indexer.select(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 1), 0)


# ---- attention ----

def softmax_attention(q, k, v, scale, seen):
    """float64, explicit: q (B,S,H,d), k (B,T,Hk,d), v, seen (B,S,T) -> out, lse."""
    H = q.shape[2]
    logits = torch.einsum("bshd,bthd->bsht", q, k.expand(-1, -1, H, -1)) * scale
    e = torch.where(seen[:, :, None], logits, -math.inf).exp()
    return torch.einsum("bsht,bthd->bshd", e / e.sum(-1, keepdim=True).clamp(min=1e-300), v.expand(-1, -1, H, -1)), e.sum(-1).log()


def random_selection(B, S, T, K):
    indices = torch.full((B, S, K), -1, dtype=torch.int32)
    for b in range(B):
        for s in range(S):
            n = min(K, T - S + s + 1, int(torch.randint(0, K + 1, ())))
            indices[b, s, :n] = torch.randperm(T - S + s + 1)[:n].sort().values.int()
    indices[0, 0] = -1  # nothing selected
    return indices


@pytest.mark.parametrize("B,S,T,H,Hk,slices", [(2, 19, 19, 3, 3, False), (2, 5, 30, 4, 1, True), (1, 1, 1, 1, 1, False), (2, 40, 40, 2, 2, True)])
def test_dense_attention(B, S, T, H, Hk, slices, monkeypatch):
    if slices:
        monkeypatch.setattr(indexer, "SLICE", B * H * T * 3)
    q, k, v = (torch.randn(B, n, h, d, requires_grad=True) for n, h, d in ((S, H, 10), (T, Hk, 10), (T, Hk, 6)))
    first, last = torch.zeros(B, S, dtype=torch.int32), torch.arange(T - S, T).expand(B, S).int().clone()
    first[-1, S // 2:] = T - S + S // 2
    last[0, 0] = -1
    out, lse = sparse_attn.dense_attention(q, k, v, 0.3, first, last)
    s = torch.arange(T)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = softmax_attention(*exact, 0.3, (s >= first[..., None]) & (s <= last[..., None]))
    close(out, expected), close(lse, expected_lse)
    g = torch.randn_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, (q, k, v), g), torch.autograd.grad(expected, exact, g.double())):
        close(mine, theirs.nan_to_num(0), 5e-6, 1e-4)  # (T20) the empty row gives no NaN


@pytest.mark.parametrize("slices", [False, True])
def test_sparse_attention(slices, monkeypatch):
    """(T11, T20) gradients against float64 autograd of masked dense attention; empty places and rows are never read."""
    if slices:
        monkeypatch.setattr(indexer, "SLICE", 500)
    B, S, T, H, D, dv, K = 2, 21, 25, 3, 14, 10, 6
    q, latents, indices = torch.randn(B, S, H, D, requires_grad=True), torch.randn(B, T, D, requires_grad=True), random_selection(B, S, T, K)
    out, lse = sparse_attn.sparse_attention(q, latents, indices, 0.3, dv)
    seen = torch.zeros(B, S, T + 1, dtype=torch.bool).scatter(-1, indices.long() % (T + 1), True)[..., :T]
    eq, el = q.detach().double().requires_grad_(), latents.detach().double().requires_grad_()
    expected, expected_lse = softmax_attention(eq, el[:, :, None], el[:, :, None, :dv], 0.3, seen)
    close(out, expected), close(lse, expected_lse)
    g = torch.randn_like(out)
    for mine, theirs in zip(torch.autograd.grad(out, (q, latents), g), torch.autograd.grad(expected, (eq, el), g.double())):
        close(mine, theirs.nan_to_num(0), 5e-6, 1e-4)


def test_sparse_with_k_of_everything_is_dense_and_absorbed_is_unabsorbed():
    """(T17, T26) both modes, with YaRN, compute one function; k >= T reproduces dense attention."""
    layer, rope, run = layer_and_run(True, 30, index_topk=30, rope_scaling=YARN, max_position_embeddings=256)
    h = torch.randn(2, 30, 48)
    outs = []
    for run.sparse, run.index_loss in ((True, True), (True, False), (False, False)):  # index_loss forces the sparse path at T <= k
        outs.append(layer(h, rope, run)[0])
    close(outs[0], outs[2], 5e-6, 5e-5)
    assert torch.equal(outs[1], outs[2])


def test_selected_mass():
    B, S, T, H, D, K = 2, 4, 12, 3, 10, 5
    q, latents, indices = torch.randn(B, S, H, D), torch.randn(B, T, D), random_selection(B, S, T, K)
    first, last = torch.zeros(B, S, dtype=torch.int32), torch.arange(T - S, T).expand(B, S).int()
    p = torch.softmax((torch.einsum("bshd,btd->bsht", q, latents) * 0.3).masked_fill(torch.arange(T) > last[:, :, None, None], -math.inf), -1).mean(2)
    expected = [[sum(p[b, s, i] for i in indices[b, s] if i >= 0) for s in range(S)] for b in range(B)]
    close(sparse_attn.selected_mass(q, latents, indices, 0.3, first, last), torch.tensor(expected))


# ---- the two losses of the indexer ----

def kl_in_float64(logits, scores, seen, weights):
    """sum_t weights_t KL(mean over heads of softmax(logits) || softmax(scores)): logits (B,S,H,n), scores (B,S,n)."""
    p = torch.softmax(torch.where(seen[:, :, None], logits, -1e300), -1).mean(2)
    log_q = torch.log_softmax(torch.where(seen, scores, -1e300), -1)
    kl = torch.where(seen, p * (p.clamp(min=1e-300).log() - log_q), 0).sum(-1)
    uniform = torch.where(seen, p * (p.clamp(min=1e-300).log() + seen.sum(-1, keepdim=True).double().clamp(min=1).log()), 0).sum(-1)
    return kl, uniform, (kl * weights).sum()


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("slices", [False, True])
def test_indexer_loss(sparse, slices, monkeypatch):
    """(T15, T16, T18-T20) value and gradients, each row with a weight of its own; q, k and lse get none; an empty row is 0, not NaN."""
    if slices:
        monkeypatch.setattr(indexer, "SLICE", 900)
    B, S, T, H, D, HI, dI, K = 2, 17, 17, 3, 12, 2, 8, 6
    q, latents = torch.randn(B, S, H, D, requires_grad=True), torch.randn(B, T, D, requires_grad=True)
    index = [torch.randn(B, S, HI, dI, requires_grad=True), torch.randn(B, T, dI, requires_grad=True), torch.randn(B, S, HI, requires_grad=True)]
    exact = [x.detach().double().requires_grad_() for x in index]
    weights = torch.rand(B, S)
    scores = torch.einsum("bsht,bsh->bst", torch.einsum("bshd,btd->bsht", exact[0], exact[1]).relu(), exact[2])
    logits = torch.einsum("bshd,btd->bsht", q.double(), latents.double()).detach() * 0.3
    if sparse:
        indices = random_selection(B, S, T, K)
        seen = torch.zeros(B, S, T + 1, dtype=torch.bool).scatter(-1, indices.long() % (T + 1), True)[..., :T]
        lse = sparse_attn.sparse_attention(q, latents, indices, 0.3, 8)[1]
        kl, uniform = indexer.indexer_loss_sparse(q, latents, lse, indices, 0.3, *index)
    else:
        first, last = torch.zeros(B, S, dtype=torch.int32), torch.arange(S).expand(B, S).int().clone()
        first[1, 9:], last[0, 3] = 9, -1
        seen = (torch.arange(T) >= first[..., None]) & (torch.arange(T) <= last[..., None])
        lse = sparse_attn.dense_attention(q, latents[:, :, None], latents[:, :, None], 0.3, first, last)[1]
        kl, uniform = indexer.indexer_loss_dense(q, latents[:, :, None], lse, 0.3, *index, first, last)
    expected, expected_uniform, loss = kl_in_float64(logits, scores, seen, weights.double())
    close(kl.detach(), expected.detach(), 1e-5, 1e-4), close(uniform, expected_uniform, 1e-5, 1e-4)
    assert not uniform.requires_grad
    mine = torch.autograd.grad((kl * weights).sum(), [*index, q, latents], allow_unused=True)
    for m, e in zip(mine[:3], torch.autograd.grad(loss, exact)):
        close(m, e, 1e-5, 1e-4)
    assert mine[3] is None and mine[4] is None


# ---- the model ----

def tiny(**changes):
    config = Config(**dict(vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3, q_lora_rank=24, kv_lora_rank=20,
                           qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10, index_n_heads=3, index_head_dim=16, index_topk=6, initializer_range=0.2) | changes)
    return Transformer(config, backend="torch", index_fp8=False)


def packed_batch(B=2, S=32):
    first = torch.zeros(B, S, dtype=torch.int32)
    first[1, 20:] = 20
    return torch.randint(0, 61, (B, S)), torch.randint(0, 61, (B, S)), first


@pytest.mark.parametrize("index_fp8", [False, True])
def test_no_token_sees_the_future_or_another_document(index_fp8):
    """(T10) perturbing either changes nothing, bit for bit; perturbing the past does."""
    model = tiny()
    model.index_fp8 = index_fp8
    x, _, first = packed_batch()
    logits = model(x, first=first)[0]
    future, other, past = x.clone(), x.clone(), x.clone()
    future[:, 25:] = (future[:, 25:] + 1) % 61
    other[1, :20] = (other[1, :20] + 1) % 61
    past[:, 21] = (past[:, 21] + 1) % 61
    assert torch.equal(model(future, first=first)[0][:, :25], logits[:, :25])
    assert torch.equal(model(other, first=first)[0][1, 20:], logits[1, 20:])
    assert not torch.equal(model(past, first=first)[0][1, 22:], logits[1, 22:])


def test_each_loss_reaches_its_own_parameters_only():
    """(T14) KL teaches the indexers and nothing else, the language-model loss everything else; after a step on KL the KL is lower.
    Without detaching, KL reaches what lies upstream of the indexers: no o_proj or MLP of the last layer, and never the target's own W^UK."""
    model = tiny()
    x, y, first = packed_batch()
    index = set(model.indexer_parameters())
    for attention in ("dense", "sparse"):
        model.attention = attention
        for name in ("lm", "kl"):
            model.zero_grad(set_to_none=True)
            model(x, y, first, index_loss=True)[1][name].backward()
            for parameter, p in model.named_parameters():
                touched = p.grad is not None and p.grad.abs().sum() > 0
                assert touched == ((p in index) == (name == "kl")), (attention, name, parameter)
        model.detach = False
        model.zero_grad(set_to_none=True)
        model(x, y, first, index_loss=True)[1]["kl"].backward()
        reached = {parameter for parameter, p in model.named_parameters() if p not in index and p.grad is not None and p.grad.abs().sum() > 0}
        last = f"model.layers.{model.config.num_hidden_layers - 1}."
        assert {n.removeprefix(last) for n in reached if n.startswith(last)} == {"input_layernorm.weight", "self_attn.q_a_proj.weight", "self_attn.q_a_layernorm.weight"}
        assert "model.embed_tokens.weight" in reached and "lm_head.weight" not in reached and "model.norm.weight" not in reached
        model.detach = True
        before = model(x, y, first, index_loss=True)[1]["kl"]
        optimizer = torch.optim.SGD(model.indexer_parameters(), 0.5)
        for _ in range(5):
            optimizer.zero_grad()
            model(x, y, first, index_loss=True)[1]["kl"].backward()
            optimizer.step()
        assert model(x, y, first, index_loss=True)[1]["kl"] < before


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_micro_batches_loss_scale_and_recomputation_give_the_same_gradients(attention):
    """(T18, T19, T21) two halves averaged == one batch; a loss scale passes through; activation checkpointing keeps the KL's graph."""
    model = tiny()
    model.attention = attention
    x, y, first = packed_batch()
    def gradients(parts, scale=1.0, recompute=False):
        model.recompute = recompute
        model.zero_grad(set_to_none=True)
        for part in parts:
            losses = model(x[part], y[part], first[part], index_loss=True)[1]
            ((losses["lm"] + losses["kl"]) * scale / len(parts)).backward()
        return [p.grad / scale for p in model.parameters()]
    whole = gradients([slice(0, 2)])
    for other in (gradients([slice(0, 1), slice(1, 2)]), gradients([slice(0, 2)], 1024.0), gradients([slice(0, 2)], recompute=True)):
        for a, b in zip(other, whole):
            close(a, b, 1e-5, 1e-3)


def test_losses_are_means_over_tokens():
    """(T19) the KL of a batch is the mean over its sequences, however long the rest of the batch is."""
    model = tiny()
    x, y, _ = packed_batch()
    both = model(x, y, index_loss=True)[1]
    each = [model(x[i:i + 1], y[i:i + 1], index_loss=True)[1] for i in (0, 1)]
    for name in ("lm", "kl", "kl_uniform", "recall"):
        assert both[name].item() == pytest.approx(sum(e[name].item() for e in each) / 2, rel=1e-4)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("frozen", [False, True])
def test_next_token_loss_in_slices(frozen, backend, monkeypatch):
    """(T18) value and gradients of cross entropy, times the incoming gradient, slice by slice; a frozen head gets none."""
    monkeypatch.setattr(NextTokenLoss, "SLICE", 100)  # 2 tokens of 37
    on = dict(device="cuda" if backend == "triton" and torch.cuda.is_available() else "cpu")
    h, weight, targets = torch.randn(9, 12, requires_grad=True, **on), torch.randn(37, 12, requires_grad=not frozen, **on), torch.randint(0, 37, (9,), **on)
    entropy = operations(backend, h.device).cross_entropy
    exact = [x.detach().double().requires_grad_() for x in (h, weight)]
    loss, expected = NextTokenLoss.apply(h, weight, targets, True, entropy), torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets)
    close(loss.detach(), expected.detach())
    (-3 * loss).backward()
    (-3 * expected).backward()
    close(h.grad, exact[0].grad)
    assert weight.grad is None if frozen else close(weight.grad, exact[1].grad) is None
    with torch.no_grad():
        assert NextTokenLoss.apply(h, weight, targets, False, entropy) == loss


def test_index_weights_stay_float32_under_autocast():
    """(T6) weights_proj is not rounded to bf16, and neither are the index scores' sums."""
    model = tiny()
    seen = []
    model.model.layers[0].self_attn.indexer.register_forward_hook(lambda m, inputs, out: seen.append((inputs[0], out)))
    with torch.autocast("cpu", torch.bfloat16):
        model(packed_batch()[0])
    (h, (q, k, w)), p = seen[0], model.model.layers[0].self_attn.indexer.weights_proj.weight
    assert w.dtype == torch.float32 and q.dtype == torch.bfloat16
    close(w, h.double() @ p.double().T * (3 * 16) ** -0.5)
    assert operations("torch", torch.device("cpu")).select is not indexer.select
    with torch.autocast("cpu", torch.bfloat16):
        a, b = torch.randn(1, 8, 2, 16), torch.randn(1, 8, 16)
        out = operations("torch", a.device).dense_attention(a, a, a, 1.0)[0]
    assert torch.equal(out, sparse_attn.dense_attention(a, a, a, 1.0)[0])


def test_fp8_scores_are_the_scores(monkeypatch):
    """(T8, T9) what the model selects by with index_fp8, scales folded in, is within the rounding of e4m3 of the unquantised scores."""
    model, scores = tiny(), []
    for p in model.indexer_parameters():
        torch.nn.init.normal_(p, std=0.5)
    select = indexer.select
    def spy(q, k, w, topk, k_scale, first, last):
        scores.append(indexer.index_scores(q.float(), k.float(), w, k_scale, first, last))
        return select(q, k, w, topk, k_scale, first, last)
    monkeypatch.setattr(indexer, "select", spy)
    x = packed_batch()[0]
    for model.index_fp8 in (False, True):
        model(x)
    exact, fp8 = scores[0], scores[3]  # first layer: the same inputs
    assert not torch.equal(exact, fp8)
    close(fp8, exact, 0.05, 1.0)  # a row that sees one token near the relu's edge may be all rounding


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("index_fp8", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 30, [3] * 10, [13, 1, 1, 1, 14], [20, 1] + [1] * 9, [30]])
def test_cached_decoding_chunked_prefill_and_one_forward_agree(attention, index_fp8, chunks):
    """(T25) across the k boundary (k = 6): indexer keys are cached also while nothing is selected yet."""
    model = tiny().eval()
    model.attention, model.index_fp8 = attention, index_fp8
    x = torch.randint(0, 61, (2, 30))
    with torch.no_grad():
        full = model(x)[0]
        caches = [sparse_attn.Cache(model.config, 2, 40, "cpu", torch.float32, index_fp8=index_fp8) for _ in range(3)]
        parts = [model(x[:, p], caches=caches, position=p)[0] for p in torch.arange(30).split(chunks)]
        close(torch.cat(parts, 1), full, 1e-5, 1e-4)
        # the length read on the device, from a cache longer than what it holds, as under a CUDA graph
        again = model(x[:, 29:], caches=caches, position=torch.tensor([29]), last=torch.full((2, 1), 29, dtype=torch.int32))[0]
        close(again, full[:, 29:], 1e-5, 1e-4)


def test_dense_prefill_then_sparse_decoding():
    """(T25) a cache that was written in dense mode serves sparse mode."""
    model = tiny().eval()
    x = torch.randint(0, 61, (1, 30))
    with torch.no_grad():
        one_layer = tiny(num_hidden_layers=1).eval()
        full = one_layer(x)[0]
        caches = [sparse_attn.Cache(one_layer.config, 1, 30, "cpu", torch.float32)]
        one_layer.attention = "dense"
        one_layer(x[:, :29], caches=caches, position=torch.arange(29))
        one_layer.attention = "sparse"
        close(one_layer(x[:, 29:], caches=caches, position=torch.tensor([29]))[0], full[:, 29:], 1e-5, 1e-4)
    assert model.attention == "sparse"


def test_fp8_latent_cache():
    """The published layout: 656 bytes per token at 512 + 64, 132 for the indexer key; decoding from it is close, not equal."""
    latents = torch.randn(2, 5, 576)
    packed = sparse_attn.pack_latents(latents, 512)
    assert packed.shape == (2, 5, 656)
    unpacked = sparse_attn.unpack_latents(packed, 512, torch.float32)
    values, scales = indexer.quantise(latents[..., :512])
    assert torch.equal(unpacked[..., :512], values.float() * scales.repeat_interleave(128, -1))
    assert torch.equal(unpacked[..., 512:], latents[..., 512:].bfloat16().float())
    assert torch.equal(packed[..., 512:528].contiguous().view(torch.float32), scales)
    published = Config(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
    assert sparse_attn.Cache(published, 1, 8, "cpu", torch.bfloat16, True, True).bytes_per_token == 656 + 132
    model = tiny().eval()
    x = torch.randint(0, 61, (1, 20))
    exact, fp8 = (model.generate(x, 8, temperature=0, fp8_cache=flag) for flag in (False, True))
    assert exact.shape == fp8.shape == (1, 28) and torch.equal(exact[:, :20], x)


def test_generate():
    model = tiny().eval()
    x = torch.randint(0, 61, (2, 11))
    out = model.generate(x, 9, temperature=0, chunk=4)
    for t in range(11, 20):
        assert torch.equal(model(out[:, :t])[0][:, -1].argmax(-1), out[:, t])
    draws = [model.generate(x, 9, generator=torch.Generator().manual_seed(s), top_k=20, top_p=0.9) for s in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])
    with pytest.raises(ValueError, match="max_position_embeddings"):
        model.generate(x, 65536)


def test_sampling_filters():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    draw = lambda **kw: {sample(logits, generator=g, **kw).item() for g in [torch.Generator().manual_seed(0)] for _ in range(300)}
    assert draw(temperature=0) == {0} and draw(top_k=2) == {0, 1} and draw(top_p=0.6) == {0} and draw(top_p=0.7) == {0, 1} and draw() == {0, 1, 2, 3}


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_backends_learn_and_generate_alike(attention):
    """One switch, two implementations: losses, every gradient, and the text at temperature 0, from packed documents and an FP8 cache too."""
    pytest.importorskip("triton")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = tiny(num_hidden_layers=1, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16).to(device)
    model.attention, model.index_fp8 = attention, True
    x, y, first = (t.to(device) for t in packed_batch())
    results = {}
    for model.backend in ("torch", "triton"):
        model.zero_grad(set_to_none=True)
        losses = model(x, y, first, index_loss=True)[1]
        (losses["lm"] + losses["kl"]).backward()
        texts = [model.generate(x[:1, :20], 3, temperature=0, chunk=18, fp8_cache=flag) for flag in (False, True)]
        results[model.backend] = losses, [p.grad.clone() for p in model.parameters()], torch.cat(texts)
    (losses, gradients, texts), (k_losses, k_gradients, k_texts) = results["torch"], results["triton"]
    for name in losses:
        assert k_losses[name].item() == pytest.approx(losses[name].item(), rel=1e-4), name
    for mine, theirs in zip(k_gradients, gradients):
        close(mine.cpu(), theirs.cpu(), 1e-4, 1e-2)
    assert torch.equal(texts, k_texts)


@pytest.mark.parametrize("changes,message", [(dict(index_topk=-1), "index_topk=-1"), (dict(num_attention_heads=0), "num_attention_heads=0"), (dict(qk_rope_head_dim=7), "qk_rope_head_dim=7"),
                                             (dict(index_head_dim=24), "index_head_dim=24"), (dict(index_head_dim=4), "index_head_dim=4")])
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny(**changes)
    with pytest.raises(ValueError, match="no indexer"):
        Transformer(Config(index_topk=0), attention="sparse")
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        tiny(max_position_embeddings=16)(torch.zeros(1, 17, dtype=torch.long))
