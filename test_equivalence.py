"""The reference held to the paper, to brute force and to exact arithmetic; the kernels held to the reference.

Order: the layer, its positions, FP8, selection, attention, the indexer's losses, the twins. (T10) names the
trap in docs/TRAPS.md that a test guards against; a test with T <= k would prove nothing about the indexer, so
all go well beyond. Elsewhere: the whole model in tests/test_model.py, generation in tests/test_generate.py,
each kernel at many shapes in tests/test_kernels_*.py, published models in tests/test_checkpoint.py.
"""
import inspect
import math
from fractions import Fraction
from typing import NamedTuple

import numpy as np
import pytest
import torch

import indexer
import sparse_attn
from config import Config
from lm_loss import cross_entropy
from model import apply_rope, operations, rope_frequencies
from tests.common import FLOAT32, assert_close, device_of, packed_batch, relative_errors, tiny_model

YARN = dict(type="yarn", factor=4.0, original_max_position_embeddings=64, beta_fast=32, beta_slow=1,
            mscale=1.0, mscale_all_dim=0.707)


# ---- the layer, once more, from the paper's formulas: numpy, float64, one query and one head at a time ----

def rotate(x, position, frequencies, interleaved):
    """RoPE of one vector as multiplication of complex numbers by e^(i position frequency)."""
    half = len(frequencies)
    turned = np.exp(1j * position * frequencies)
    if interleaved:
        z = (x[0::2] + 1j * x[1::2]) * turned
        return np.stack((z.real, z.imag), -1).ravel()
    z = (x[:half] + 1j * x[half:]) * turned
    return np.concatenate((z.real, z.imag))


def rms_norm(x, weight):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * weight


def layer_norm(x, weight, bias):
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred * centred).mean(-1, keepdims=True) + 1e-6) * weight + bias


def paper_rope(config):
    """-> angles per position, factor on rotated vectors, factor on the softmax scale (YaRN: arXiv
    2309.00071)."""
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2) / dim)
    yarn = config.rope_scaling
    if not yarn:
        return frequencies, 1.0, 1.0

    def boundary(rotations):
        wavelength = yarn["original_max_position_embeddings"] / (rotations * 2 * math.pi)
        return dim * math.log(wavelength) / (2 * math.log(config.rope_theta))

    low = max(math.floor(boundary(yarn["beta_fast"])), 0)
    high = min(math.ceil(boundary(yarn["beta_slow"])), dim - 1)
    kept = 1 - np.clip((np.arange(dim // 2) - low) / (high - low), 0, 1)
    frequencies = frequencies * kept + frequencies / yarn["factor"] * (1 - kept)
    temperature = 0.1 * yarn["mscale_all_dim"] * math.log(yarn["factor"]) + 1
    amplitude = (0.1 * yarn["mscale"] * math.log(yarn["factor"]) + 1) / temperature
    return frequencies, amplitude, temperature**2


def softmax(x):
    e = np.exp(x - x.max())
    return e / e.sum()


class Paper(NamedTuple):
    """What the paper's formulas give for one sequence of T tokens."""
    out: np.ndarray  # (T, hidden)
    selections: list  # per query, ascending positions
    kl: np.ndarray  # (T,) of the target p from the indexer's distribution, over the selection
    kl_uniform: np.ndarray  # (T,) the same from the uniform distribution
    recall: np.ndarray  # (T,) share of the dense attention's mass that is selected


def paper_layer(layer, config, h, first, topk):
    """MLA with the indexer, equations 1 to 4, for one sequence h (T,hidden) and first (T) -> Paper. With topk
    = T it is dense attention, and its KL the warm-up's."""
    c = config
    T = len(h)
    H = c.num_attention_heads
    nope = c.qk_nope_head_dim
    rope = c.qk_rope_head_dim
    weight = {name: p.detach().cpu().double().numpy() for name, p in layer.named_parameters()}
    frequencies, amplitude, softmax_factor = paper_rope(config)
    scale = (nope + rope) ** -0.5 * softmax_factor

    def linear(x, name):
        return x @ weight[name + ".weight"].T + weight.get(name + ".bias", 0)

    def at(x, t, interleaved):
        return amplitude * rotate(x, t, frequencies, interleaved)

    def index_rope(x, t):
        return np.concatenate((at(x[:rope], t, c.indexer_rope_interleave), x[rope:]))

    # what each token is to the others: a key and a value per head, one rope key, one indexer key
    if c.q_lora_rank:
        q_latent = rms_norm(linear(h, "q_a_proj"), weight["q_a_layernorm.weight"])
        q = linear(q_latent, "q_b_proj").reshape(T, H, nope + rope)
    else:
        q_latent = h
        q = linear(h, "q_proj").reshape(T, H, nope + rope)
    compressed = linear(h, "kv_a_proj_with_mqa")
    latent = rms_norm(compressed[:, :c.kv_lora_rank], weight["kv_a_layernorm.weight"])
    kv = linear(latent, "kv_b_proj").reshape(T, H, nope + c.v_head_dim)
    k_rope = [at(compressed[s, c.kv_lora_rank:], s, True) for s in range(T)]
    k_index = layer_norm(
        linear(h, "indexer.wk"), weight["indexer.k_norm.weight"], weight["indexer.k_norm.bias"])
    k_index = [index_rope(k_index[s], s) for s in range(T)]

    heads = np.zeros((T, H, c.v_head_dim))
    paper = Paper(None, [], np.zeros(T), np.zeros(T), np.zeros(T))
    for t in range(T):
        # the score of every token that may be seen, and the k best
        q_index = linear(q_latent[t], "indexer.wq_b").reshape(c.index_n_heads, c.index_head_dim)
        w = linear(h[t], "indexer.weights_proj")
        visible = range(first[t], t + 1)
        score = {}
        for s in visible:
            score[s] = 0.0
            for j in range(c.index_n_heads):
                dot = index_rope(q_index[j], t) @ k_index[s]
                score[s] += w[j] * c.index_n_heads**-0.5 * max(0, dot * c.index_head_dim**-0.5)
        best = sorted(score, key=lambda s: (-score[s], s))[:topk]
        chosen = sorted(best)
        paper.selections.append(chosen)

        # each head's softmax over them, and over all that may be seen
        target = np.zeros(len(chosen))
        for i in range(H):
            q_rope = at(q[t, i, nope:], t, True)
            logit = {s: (q[t, i, :nope] @ kv[s, i, :nope] + q_rope @ k_rope[s]) * scale for s in visible}
            p = softmax(np.array([logit[s] for s in chosen]))
            heads[t, i] = p @ kv[chosen, i, nope:]
            target += p / H
            dense = dict(zip(visible, softmax(np.array(list(logit.values())))))
            paper.recall[t] += sum(dense[s] for s in chosen) / H

        # what the indexer learns from
        predicted = softmax(np.array([score[s] for s in chosen]))
        paper.kl[t] = (target * np.log(target / predicted)).sum()
        paper.kl_uniform[t] = (target * np.log(target * len(chosen))).sum()
    return paper._replace(out=linear(heads.reshape(T, -1), "o_proj"))


def random_layer(backend="torch", **changes):
    """-> a model of one layer in which every parameter is random, biases and norms too, and that layer."""
    model = tiny_model(backend, num_hidden_layers=1, **(dict(index_topk=7) | changes))
    layer = model.model.layers[0].self_attn
    for name, p in layer.named_parameters():
        torch.nn.init.normal_(p, 1.0 if "norm.weight" in name else 0.0, 0.3)
    return model, layer


def state_of(model, h, first=None, position=None, index_loss=False):
    """What `model.forward` would hand to its layers for hidden states h."""
    idx = torch.zeros(h.shape[:2], dtype=torch.long, device=h.device)
    return model.forward_state(model.backend, idx, first, index_loss, None, position, None)


PLAIN = dict()
WITH_YARN = dict(rope_scaling=YARN, max_position_embeddings=256)
INTERLEAVED = dict(indexer_rope_interleave=True)


@pytest.mark.parametrize("backend,B,T,size,changes", [
    pytest.param("torch", 2, 40, 1.0, PLAIN, id="plain"),
    pytest.param("torch", 2, 40, 1.0, WITH_YARN, id="yarn"),
    pytest.param("torch", 2, 40, 1.0, INTERLEAVED, id="interleaved"),
    pytest.param("torch", 2, 40, 1.0, dict(q_lora_rank=0), id="no-query-latent"),
    pytest.param("torch", 2, 40, 1.0, dict(attention_bias=True), id="biases"),
    pytest.param("torch", 2, 40, 1.0, dict(num_attention_heads=5, index_n_heads=1), id="heads"),
    pytest.param("torch", 2, 40, 1e-3, PLAIN, id="small"),  # the eps of the norms counts
    pytest.param("triton", 1, 24, 1.0, WITH_YARN, id="kernels")])
def test_layer_is_the_papers(backend, B, T, size, changes):
    """(T1-T5, T7, T10, T15-T17, T19, T28) Outputs, selections and losses of the module against formulas
    written independently of it, with k = 7 and two documents in the last row."""
    if backend == "triton":
        pytest.importorskip("triton")
    model, layer = random_layer(backend, **changes)
    h = torch.randn(B, T, 48) * size  # (B, T, hidden)
    first = torch.zeros(B, T, dtype=torch.int32)
    first[-1, T * 2 // 5:] = T * 2 // 5
    papers = {}
    for attention, topk in (("sparse", 7), ("dense", T)):
        papers[attention] = []
        for b in range(B):
            sequence = h[b].double().numpy()
            papers[attention].append(paper_layer(layer, model.config, sequence, first[b].tolist(), topk))

    h = h.to(device_of(backend))
    first = first.to(h.device)
    sampled = np.linspace(0, T - 1, 16).astype(int)
    # in dense mode, too, recall is of what would be selected
    recall = np.mean([paper.recall[sampled] for paper in papers["sparse"]])
    for model.attention, sequences in papers.items():
        with torch.no_grad():
            out, selection, loss = layer(h, state_of(model, h, first, index_loss=True))
        expected = torch.from_numpy(np.stack([paper.out for paper in sequences]))
        assert_close(out, expected, *FLOAT32, model.attention)
        if model.attention == "sparse":
            for row, paper in zip(selection.indices.tolist(), sequences):
                assert [[s for s in slots if s >= 0] for slots in row] == paper.selections
        kl = np.mean([paper.kl for paper in sequences])
        kl_uniform = np.mean([paper.kl_uniform for paper in sequences])
        assert loss.kl.item() == pytest.approx(kl, rel=FLOAT32[1])
        assert loss.kl_uniform.item() == pytest.approx(kl_uniform, rel=FLOAT32[1])
        assert loss.recall.item() == pytest.approx(recall, rel=FLOAT32[1])


# ---- positions ----

@pytest.mark.parametrize("interleaved", [True, False])
def test_rope_is_a_rotation_by_distance(interleaved):
    """(T1, T3) q.k after RoPE is the same wherever the pair stands, another at another distance, and lengths
    stay; the two pairings differ."""
    frequencies = rope_frequencies(Config(rope_theta=100.0))[0].double()
    q, k = torch.randn(2, 1, 1, 1, 16)  # (B, S, heads, dim) each

    def at(x, position, interleaved):
        angles = (position * frequencies)[None, None]  # (1, 1, dim / 2)
        return apply_rope(x, interleaved, angles.cos(), angles.sin()).double()

    def dot(t, s):
        return (at(q, t, interleaved) * at(k, s, interleaved)).sum().item()

    size = (q.norm() * k.norm()).item()
    assert dot(5, 2) == pytest.approx(dot(905, 902), abs=2 * 2**-24 * size)  # each vector is rounded once
    assert abs(dot(5, 2) - dot(5, 4)) > 1e-2 * size
    assert at(q, 7, interleaved).norm().item() == pytest.approx(q.norm().item(), rel=2**-23)
    assert relative_errors(at(q, 7, interleaved), at(q, 7, not interleaved))[0] > 0.1


@pytest.mark.parametrize("changes", [PLAIN, INTERLEAVED], ids=["halves", "pairs"])
def test_only_distances_matter(changes):
    """(T3) The layer's output and selection stay when all positions grow alike: a rotation of part of a
    vector must be one."""
    model, layer = random_layer(**changes)
    h = torch.randn(1, 40, 48)  # (B, S, hidden)
    outs = []
    selections = []
    for offset in (0, 512):
        with torch.no_grad():
            out, selection, _ = layer(h, state_of(model, h, position=torch.arange(40) + offset))
        outs.append(out)
        selections.append(selection.indices)
    assert torch.equal(*selections)
    assert_close(outs[1], outs[0], 552 * 2**-24, 10 * 552 * 2**-24)  # an angle near 552 is off by 552 x 2^-24


# ---- FP8 ----

def e4m3_numbers():
    """All finite values of the format: 4 bits of exponent with bias 7, 3 of mantissa, no infinity."""
    numbers = set()
    for exponent in range(16):
        for mantissa in range(8):
            if exponent == 0:
                value = Fraction(mantissa, 8) / 64
            elif (exponent, mantissa) == (15, 7):
                continue  # NaN
            else:
                value = (1 + Fraction(mantissa, 8)) * Fraction(2) ** (exponent - 7)
            numbers |= {value, -value}
    return sorted(numbers)


E4M3 = e4m3_numbers()


def to_e4m3(x):
    """The nearest of the 253 e4m3 numbers, ties to the even mantissa, by exact arithmetic."""
    x = min(max(x, Fraction(-448)), Fraction(448))
    nearest, second = sorted(E4M3, key=lambda number: abs(number - x))[:2]
    if abs(nearest - x) != abs(second - x):
        return nearest
    ulp = abs(nearest - second)
    return nearest if (nearest / ulp) % 2 == 0 else second


@pytest.mark.parametrize("ue8m0", [True, False])
def test_quantise_is_the_published_rounding(ue8m0):
    """(T8) Bit for bit by exact arithmetic: amax clamped, times float32(1/448), the power of two above it,
    round to nearest even."""
    magnitudes = 10.0 ** torch.arange(-7, 5, 2)[:, None]
    x = torch.cat((torch.randn(6, 64) * magnitudes, torch.zeros(1, 64), torch.full((1, 64), 448.0),
                   torch.full((1, 64), 3.5)))  # (9, 64)
    x[-1, 1] = torch.nextafter(torch.tensor(3.5), torch.tensor(9.0))
    values, scales = indexer.quantise(x, block=32, ue8m0=ue8m0)
    assert values.dtype == torch.float8_e4m3fn and values.shape == (9, 64) and scales.shape == (9, 2)
    blocks = x.view(18, 32)
    values = values.float().view(18, 32)
    for row, value, scale in zip(blocks, values, scales.flatten()):
        amax = max(np.float32(row.abs().max().item()), np.float32(1e-4))
        expected = Fraction(float(amax * np.float32(1 / 448)))
        if ue8m0:
            power = Fraction(2) ** math.frexp(expected)[1]  # the next power of two above
            expected = power / 2 if power / 2 == expected else power
        assert Fraction(scale.item()) == expected
        exact = [Fraction(float(np.float32(v.item()) / np.float32(scale.item()))) for v in row]
        assert [Fraction(v.item()) for v in value] == [to_e4m3(v) for v in exact]


@pytest.mark.parametrize("d,block", [(1, 128), (5, 128), (128, 128), (200, 128), (512, 128), (70, 32)])
def test_quantise_of_any_width(d, block):
    """A block is off by half a step of e4m3: 2^-4 of the value, or 2^-10 of the scale where numbers are
    subnormal."""
    x = torch.randn(3, d) * 10.0 ** torch.arange(-3, 3, 2)[:, None]
    values, scales = indexer.quantise(x, block)
    assert scales.shape == (3, math.ceil(d / block))
    for i in range(0, d, block):
        scale = scales[:, i // block, None]
        part = x[:, i:i + block]
        error = (values[:, i:i + block].float() * scale - part).abs()
        assert (error <= (part.abs() * 2**-4).maximum(scale * 2**-10)).all()


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_quantise_hides_nothing(bad, backend):
    """A block that holds NaN or an infinity is NaN, values and scale; other blocks are as they were."""
    if backend == "triton":
        pytest.importorskip("triton")
    quantise = operations(backend).quantise
    x = torch.randn(5, 64, device=device_of(backend))
    clean_values, clean_scales = quantise(x, block=32)
    x[2, 40] = bad
    values, scales = quantise(x, block=32)
    broken = torch.zeros(5, 2, dtype=torch.bool, device=x.device)
    broken[2, 1] = True
    assert torch.equal(scales.isnan(), broken)
    assert torch.equal(values.float().isnan(), broken.repeat_interleave(32, -1))
    assert torch.equal(scales[~broken], clean_scales[~broken])
    intact = ~broken.repeat_interleave(32, -1)
    assert torch.equal(values.float()[intact], clean_values.float()[intact])
    _, scales = quantise(x, block=64, rotate=True)
    assert scales.isnan().flatten().tolist() == [False, False, True, False, False]


def test_hadamard_is_orthogonal_and_keeps_scores():
    """(T9) Sylvester's matrix, divided by sqrt(d); no index score changes."""
    matrix = torch.ones(1, 1)
    for _ in range(6):
        matrix = torch.kron(torch.tensor([[1., 1.], [1., -1.]]), matrix)
    x = torch.randn(7, 64)
    assert_close(indexer.hadamard(x), x.double() @ matrix.double() / 8, *FLOAT32)
    q = torch.randn(1, 9, 2, 64)
    k = torch.randn(1, 9, 64)
    w = torch.randn(1, 9, 2)
    rotated = indexer.index_scores(indexer.hadamard(q), indexer.hadamard(k), w)
    assert_close(rotated, indexer.index_scores(q, k, w), *FLOAT32)
    with pytest.raises(ValueError, match="power of two"):
        indexer.hadamard(torch.randn(2, 48))


def fp8_error(q, k, rotate):
    """Root mean square over rows of the error of q.k in e4m3, as a fraction of |q||k|; q, k (N,d)."""
    q8, q_scale = indexer.quantise(q, q.shape[1], rotate)
    k8, k_scale = indexer.quantise(k, k.shape[1], rotate)
    dot = (q8.double() * k8.double()).sum(-1) * q_scale[:, 0] * k_scale[:, 0]  # (N,)
    error = (dot - (q.double() * k.double()).sum(-1)) / (q.norm(dim=-1) * k.norm(dim=-1))
    return error.square().mean().sqrt().item()


@pytest.mark.parametrize("d", [32, 64, 128])
@pytest.mark.parametrize("seed", range(4))
def test_rotation_spreads_the_rounding_of_an_outlier(d, seed):
    """(T9) e4m3 rounds each number by the same fraction of itself, so an outlier does not harm its
    neighbours. But where one dimension is large in q and k alike, q.k is one product, with its rounding;
    rotated, it is a sum of d products of about one size, whose roundings average out: the error falls by
    sqrt(d). Without an outlier the rotation changes nothing."""
    torch.manual_seed(seed)
    q = torch.randn(4096, d)
    k = torch.randn(4096, d)
    assert fp8_error(q, k, False) == pytest.approx(fp8_error(q, k, True), rel=0.1)
    # A whole octave of outliers, so that no place between two powers of two is favoured; spread over d
    # dimensions they are still several times the rest, which moves them over several steps of e4m3.
    q[:, 3] = 32 * 2 ** torch.rand(4096)
    k[:, 3] = 32 * 2 ** torch.rand(4096)
    assert 0.8 * d**0.5 < fp8_error(q, k, False) / fp8_error(q, k, True) < 1.2 * d**0.5


# ---- selection ----

def brute_select(scores, first, last, topk):
    """scores (S,T), first, last (S) as lists -> selections as lists of topk positions."""
    rows = []
    for t, row in enumerate(scores):
        seen = [s for s in range(len(row)) if first[t] <= s <= last[t]]
        best = sorted(seen, key=lambda s: (-row[s], s))[:topk]
        rows.append(sorted(best) + [-1] * (topk - len(best)))
    return rows


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_index_scores(dtype):
    """(T5, T6) Equation 1 in float64: products and sums are float32 whatever the operands are."""
    q = torch.randn(2, 9, 3, 16).to(dtype)
    k = torch.randn(2, 14, 16).to(dtype)
    w = torch.randn(2, 9, 3)
    dots = torch.einsum("bshd,btd->bsht", q.double(), k.double())
    expected = torch.einsum("bsht,bsh->bst", dots.relu(), w.double())
    seen = torch.ones(9, 14).tril(5).bool()
    got = indexer.index_scores(q, k, w)
    assert (got[:, ~seen] == float("-inf")).all()
    assert_close(got.masked_fill(~seen, 0), expected.masked_fill(~seen, 0), *FLOAT32)


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "huge", "tiny"])
@pytest.mark.parametrize(
    "S,T,topk", [(33, 33, 8), (5, 40, 12), (40, 40, 64), (1, 1, 1), (1, 30, 7), (64, 64, 1)])
def test_select_is_exact_and_deterministic(S, T, topk, kind, monkeypatch):
    """(T5, T10-T12) Causal and document masks first; one selection for all heads; higher score, then lower
    position; -1 in unused slots; the same in slices."""
    q = torch.randn(2, S, 3, 8)
    k = torch.randn(2, T, 8)
    w = torch.randn(2, S, 3)
    if kind == "ties":  # few different scores, exact in float32
        q = q.sign()
        k = k.sign()
        w = w.sign()
    q = q * dict(equal=0.0, huge=1e15, tiny=1e-18).get(kind, 1.0)
    first = torch.randint(0, T, (2, S)).minimum(torch.arange(T - S, T)).int()
    last = torch.arange(T - S, T).expand(2, S).int().clone()
    last[1, -1] = -1  # padding: sees nothing
    got = indexer.select(q, k, w, topk, None, first, last)
    assert got.dtype == torch.int32 and got.shape == (2, S, topk)
    dots = torch.einsum("bshd,btd->bsht", q, k)
    scores = torch.einsum("bsht,bsh->bst", dots.relu(), w)
    for b in range(2):
        assert got[b].tolist() == brute_select(scores[b].tolist(), first[b].tolist(), last[b].tolist(), topk)
    monkeypatch.setattr(indexer, "SLICE", 100)
    assert torch.equal(indexer.select(q, k, w, topk, None, first, last), got)


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_select_ranks_nan_first(backend):
    """A key of NaN is selected by every query that may see it and by no other, so that it shows in the
    output."""
    if backend == "triton":
        pytest.importorskip("triton")
    device = device_of(backend)
    q = torch.rand(1, 30, 2, 16, device=device)
    k = torch.rand(1, 30, 16, device=device)
    w = torch.rand(1, 30, 2, device=device)  # all scores of numbers are positive
    select = operations(backend).select
    clean = select(q, k, w, 4)
    k[0, 11, 5] = math.nan
    k[0, 17] = math.nan
    got = select(q, k, w, 4)
    assert torch.equal(got[:, :11], clean[:, :11])
    for t in range(11, 30):
        chosen = got[0, t].tolist()
        assert 11 in chosen and (17 in chosen) == (t >= 17) and len(set(chosen)) == 4 and max(chosen) <= t


def test_select_refuses_k_below_one():
    with pytest.raises(ValueError, match="index_topk=0"):
        indexer.select(torch.randn(1, 2, 1, 8), torch.randn(1, 2, 8), torch.randn(1, 2, 1), 0)


# ---- attention ----

def softmax_attention(q, k, v, scale, seen):
    """Explicit, in the inputs' float64: q (B,S,H,D), k (B,T,Hk,D), v (B,T,Hk,V), seen (B,S,T) -> out, lse."""
    H = q.shape[2]
    logits = torch.einsum("bshd,bthd->bsht", q, k.expand(-1, -1, H, -1)) * scale
    e = torch.where(seen[:, :, None], logits, -math.inf).exp()
    p = e / e.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.einsum("bsht,bthd->bshd", p, v.expand(-1, -1, H, -1)), e.sum(-1).log()


def random_selection(B, S, T, K):
    """(B,S,K) int32: some of what is visible, ascending, then -1; the first query has nothing selected."""
    indices = torch.full((B, S, K), -1, dtype=torch.int32)
    for b in range(B):
        for s in range(S):
            visible = T - S + s + 1
            n = min(visible, int(torch.randint(0, K + 1, ())))
            indices[b, s, :n] = torch.randperm(visible)[:n].sort().values.int()
    indices[0, 0] = -1
    return indices


def selected(indices, T):
    """indices (B,S,K) -> (B,S,T) bool."""
    B, S, _ = indices.shape
    seen = torch.zeros(B, S, T + 1, dtype=torch.bool)
    return seen.scatter(-1, indices.long() % (T + 1), True)[..., :T]  # -1 falls into the last column


def assert_gradients(got, inputs, want, exact_inputs):
    """Gradients of `got` and `want` (float64), of a random incoming gradient, agree; a row that saw nothing
    gives 0, not NaN."""
    g = torch.randn_like(got)
    mine = torch.autograd.grad(got, inputs, g)
    exact = torch.autograd.grad(want, exact_inputs, g.double())
    for m, e in zip(mine, exact):
        assert_close(m, e.nan_to_num(0), *FLOAT32, "gradient")


@pytest.mark.parametrize("B,S,T,H,Hk,slices", [
    (2, 19, 19, 3, 3, False), (2, 5, 30, 4, 1, True), (1, 1, 1, 1, 1, False), (2, 40, 40, 2, 2, True)])
def test_dense_attention(B, S, T, H, Hk, slices, monkeypatch):
    """(T10, T18, T20) Output, lse and gradients by float64 autograd of the explicit formula; packed
    documents, and a row that sees nothing."""
    if slices:
        monkeypatch.setattr(indexer, "SLICE", B * H * T * 3)
    q = torch.randn(B, S, H, 10, requires_grad=True)
    k = torch.randn(B, T, Hk, 10, requires_grad=True)
    v = torch.randn(B, T, Hk, 6, requires_grad=True)
    first = torch.zeros(B, S, dtype=torch.int32)
    first[-1, S // 2:] = T - S + S // 2
    last = torch.arange(T - S, T).expand(B, S).int().clone()
    last[0, 0] = -1
    out, lse = sparse_attn.dense_attention(q, k, v, 0.3, first, last)
    s = torch.arange(T)
    seen = (s >= first[..., None]) & (s <= last[..., None])  # (B, S, T)
    exact = [x.detach().double().requires_grad_() for x in (q, k, v)]
    expected, expected_lse = softmax_attention(*exact, 0.3, seen)
    assert_close(out, expected, *FLOAT32)
    assert_close(lse, expected_lse, *FLOAT32)
    assert_gradients(out, (q, k, v), expected, exact)


@pytest.mark.parametrize("slices", [False, True])
def test_sparse_attention(slices, monkeypatch):
    """(T11, T18, T20) Output, lse and gradients by float64 autograd of masked dense attention; a query with
    nothing selected."""
    if slices:
        monkeypatch.setattr(indexer, "SLICE", 500)
    B, S, T, H, D, V, K = 2, 21, 25, 3, 14, 10, 6
    q = torch.randn(B, S, H, D, requires_grad=True)
    latents = torch.randn(B, T, D, requires_grad=True)
    indices = random_selection(B, S, T, K)
    out, lse = sparse_attn.sparse_attention(q, latents, indices, 0.3, V)
    exact_q = q.detach().double().requires_grad_()
    exact = latents.detach().double().requires_grad_()
    keys = exact[:, :, None]
    expected, expected_lse = softmax_attention(exact_q, keys, keys[..., :V], 0.3, selected(indices, T))
    assert_close(out, expected, *FLOAT32)
    assert_close(lse, expected_lse, *FLOAT32)
    assert_gradients(out, (q, latents), expected, (exact_q, exact))


def test_empty_slots_read_nothing():
    """(T11) Tokens that no query selected may hold NaN: outputs, losses and gradients stay bit for bit."""
    B, S, T, H, D, K = 1, 9, 12, 2, 10, 6
    q = torch.randn(B, S, H, D, requires_grad=True)
    q_index = torch.randn(B, S, 2, 8, requires_grad=True)
    w = torch.randn(B, S, 2, requires_grad=True)
    latents = torch.randn(B, T, D)
    k_index = torch.randn(B, T, 8)
    indices = random_selection(B, S, T, K)
    indices = indices.masked_fill(indices < 2, -1)  # nobody selects tokens 0 and 1
    indices[..., 3] = 2 + torch.arange(S)  # everybody selects one

    def results():
        out, lse = sparse_attn.sparse_attention(q, latents, indices, 0.3, 6)
        kl, uniform = indexer.indexer_loss_sparse(q, latents, lse, indices, 0.3, q_index, k_index, w)
        gradients = torch.autograd.grad(out.sum() + kl.sum(), (q, q_index, w))
        return [out, lse, kl, uniform, *gradients]

    clean = results()
    latents[:, :2] = math.nan
    k_index[:, :2] = math.nan
    for got, want in zip(results(), clean):
        assert torch.equal(got, want)


def test_sparse_with_k_of_everything_is_dense_and_absorbed_is_unabsorbed(monkeypatch):
    """(T17, T26) Both modes, with YaRN, compute one function; k >= T reproduces dense attention, and is
    computed as such."""
    model, layer = random_layer(index_topk=30, rope_scaling=YARN, max_position_embeddings=256)
    h = torch.randn(2, 30, 48)  # (B, S, hidden)
    sparse = layer(h, state_of(model, h, index_loss=True))[0]  # the loss takes the sparse path at any length
    model.attention = "dense"
    dense = layer(h, state_of(model, h))[0]
    assert_close(sparse, dense, *FLOAT32)
    assert not torch.equal(sparse, dense)  # they were two computations

    model.attention = "sparse"
    monkeypatch.setattr(sparse_attn, "sparse_attention", None)
    monkeypatch.setattr(indexer, "select", None)
    assert torch.equal(layer(h, state_of(model, h))[0], dense)


def test_selected_mass():
    """Recall by a loop: the mass of dense attention, mean over heads, on what is selected."""
    B, S, T, H, D, K = 2, 4, 12, 3, 10, 5
    q = torch.randn(B, S, H, D)
    latents = torch.randn(B, T, D)
    indices = random_selection(B, S, T, K)
    first = torch.zeros(B, S, dtype=torch.int32)
    first[0, 3] = 2
    last = torch.arange(T - S, T).expand(B, S).int()
    indices[0, 3] = torch.tensor([2, 5, 7, -1, -1])
    expected = torch.zeros(B, S)
    for b in range(B):
        for s in range(S):
            keys = latents[b, first[b, s]:last[b, s] + 1]
            for h in range(H):
                p = torch.softmax(keys @ q[b, s, h] * 0.3, 0)
                for i in indices[b, s]:
                    if i >= 0:
                        expected[b, s] += p[i - first[b, s]] / H
    assert_close(sparse_attn.selected_mass(q, latents, indices, 0.3, first, last), expected, *FLOAT32)


# ---- the two losses of the indexer ----

def kl_in_float64(logits, scores, seen):
    """KL(mean over heads of softmax(logits) || softmax(scores)) and KL(... || uniform): logits (B,S,H,n),
    scores and seen (B,S,n) -> (B,S) each."""
    p = torch.softmax(torch.where(seen[:, :, None], logits, -1e300), -1).mean(2)
    log_p = p.clamp(min=1e-300).log()
    log_q = torch.log_softmax(torch.where(seen, scores, -1e300), -1)
    log_n = seen.sum(-1, keepdim=True).double().clamp(min=1).log()
    kl = torch.where(seen, p * (log_p - log_q), 0).sum(-1)
    uniform = torch.where(seen, p * (log_p + log_n), 0).sum(-1)
    return kl, uniform


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("slices", [False, True])
def test_indexer_loss(sparse, slices, monkeypatch):
    """(T15, T16, T18, T20) Values and gradients, each row with a weight of its own; q, k and lse get none; an
    empty row is 0, not NaN."""
    if slices:
        monkeypatch.setattr(indexer, "SLICE", 900)
    B, S, T, H, D, HI, DI, K = 2, 17, 17, 3, 12, 2, 8, 6
    q = torch.randn(B, S, H, D, requires_grad=True)
    latents = torch.randn(B, T, D, requires_grad=True)
    q_index = torch.randn(B, S, HI, DI, requires_grad=True)
    k_index = torch.randn(B, T, DI, requires_grad=True)
    w = torch.randn(B, S, HI, requires_grad=True)
    index = [q_index, k_index, w]
    if sparse:
        indices = random_selection(B, S, T, K)
        seen = selected(indices, T)
        lse = sparse_attn.sparse_attention(q, latents, indices, 0.3, 8)[1]
        kl, uniform = indexer.indexer_loss_sparse(q, latents, lse, indices, 0.3, *index)
    else:
        first = torch.zeros(B, S, dtype=torch.int32)
        first[1, 9:] = 9
        last = torch.arange(S).expand(B, S).int().clone()
        last[0, 3] = -1
        seen = (torch.arange(T) >= first[..., None]) & (torch.arange(T) <= last[..., None])
        keys = latents[:, :, None]
        lse = sparse_attn.dense_attention(q, keys, keys, 0.3, first, last)[1]
        kl, uniform = indexer.indexer_loss_dense(q, keys, lse, 0.3, *index, first, last)

    exact = [x.detach().double().requires_grad_() for x in index]
    dots = torch.einsum("bshd,btd->bsht", exact[0], exact[1])
    scores = torch.einsum("bsht,bsh->bst", dots.relu(), exact[2])
    logits = torch.einsum("bshd,btd->bsht", q.detach().double(), latents.detach().double()) * 0.3
    expected, expected_uniform = kl_in_float64(logits, scores, seen)
    assert_close(kl, expected, *FLOAT32)
    assert_close(uniform, expected_uniform, *FLOAT32)
    assert not uniform.requires_grad

    weights = torch.rand(B, S)
    mine = torch.autograd.grad((kl * weights).sum(), [*index, q, latents], allow_unused=True)
    wanted = torch.autograd.grad((expected * weights.double()).sum(), exact)
    for m, e in zip(mine, wanted):
        assert_close(m, e, *FLOAT32, "gradient")
    assert mine[3] is None and mine[4] is None


# ---- the twins ----

def arguments(function):
    return [(p.name, p.default) for p in inspect.signature(function).parameters.values()]


@pytest.mark.parametrize("twin", [
    indexer.quantise, indexer.index_scores, indexer.select, indexer.select_by_blocks,
    sparse_attn.dense_attention, sparse_attn.sparse_attention, indexer.indexer_loss_dense,
    indexer.indexer_loss_sparse, cross_entropy])
def test_twins_have_one_signature(twin):
    """Each operation of the reference has a kernel of the same name, with the same arguments and defaults."""
    kernels = pytest.importorskip("kernels", reason="needs triton")
    expected = arguments(twin)
    if twin is indexer.index_scores:
        expected.remove(("rows", slice(None)))  # how the reference computes a part
    assert arguments(getattr(kernels, twin.__name__)) == expected


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_backends_learn_alike(attention):
    """(T12, T15-T18, T24, T27) One switch, two implementations: losses and the gradient of every parameter,
    from packed documents and FP8 scores. Both sum in float32 and in another order: 2^-24 of each term, as
    between float32 and float64."""
    pytest.importorskip("triton")
    model = tiny_model("triton", attention, index_fp8=True, num_hidden_layers=1)
    x, y, first = packed_batch("triton", B=1, S=24)
    results = []
    for model.backend in ("torch", "triton"):
        model.zero_grad(set_to_none=True)
        losses = model(x, y, first, index_loss=True)[1]
        (losses["lm"] + losses["kl"]).backward()
        results.append((losses, [p.grad for p in model.parameters()]))
    (losses, gradients), (kernel_losses, kernel_gradients) = results
    assert losses.keys() == kernel_losses.keys() == {"lm", "kl", "kl_uniform", "recall"}
    for name in losses:
        assert_close(kernel_losses[name], losses[name], *FLOAT32, name)
    for (name, _), got, want in zip(model.named_parameters(), kernel_gradients, gradients):
        assert_close(got, want, *FLOAT32, name)
