"""The whole model: who sees whom, which loss teaches what, precision, torch.compile, numbers that are not
finite. (T10): docs/TRAPS.md. What one layer computes is held to the paper in test_equivalence.py."""
import math

import pytest
import torch
import torch.nn.functional as F

import indexer
import lm_loss
import sparse_attn
from config import Config
from lm_loss import next_token_loss
from model import Transformer, rope_frequencies
from tests.common import FLOAT32, assert_close, device_of, packed_batch, tiny_model

SMALL = dict(num_hidden_layers=1, num_attention_heads=2, index_n_heads=2, index_topk=3)  # for the interpreter


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


# ---- who sees whom ----

@pytest.mark.parametrize("index_fp8", [False, True])
def test_no_token_sees_the_future_or_another_document(index_fp8):
    """(T10) Perturbing either changes nothing, bit for bit; perturbing the past does."""
    model = tiny_model(index_fp8=index_fp8)
    x, _, first = packed_batch()
    logits = model(x, first=first)[0]
    future = x.clone()
    future[:, 25:] = (future[:, 25:] + 1) % 61
    other = x.clone()
    other[1, :20] = (other[1, :20] + 1) % 61
    past = x.clone()
    past[:, 21] = (past[:, 21] + 1) % 61
    assert torch.equal(model(future, first=first)[0][:, :25], logits[:, :25])
    assert torch.equal(model(other, first=first)[0][1, 20:], logits[1, 20:])
    assert not torch.equal(model(past, first=first)[0][1, 22:], logits[1, 22:])


# ---- which loss teaches what ----

def gradients(model, objective):
    """-> name: gradient of the parameters that the objective reaches."""
    model.zero_grad(set_to_none=True)
    objective.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_each_loss_reaches_its_own_parameters_only(attention):
    """(T14) KL teaches the indexers, all of each, and nothing else; the language-model loss everything
    else."""
    model = tiny_model(attention=attention)
    index = {name for name, _ in model.named_parameters() if ".indexer." in name}
    others = {name for name, _ in model.named_parameters()} - index
    batch = packed_batch()
    assert gradients(model, model(*batch, index_loss=True)[1]["kl"]).keys() == index
    assert gradients(model, model(*batch, index_loss=True)[1]["lm"]).keys() == others


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_kl_without_detaching(attention):
    """(T14) The ablation: KL then reaches what lies upstream of the indexers, in the last layer no more than
    the query latent; never the target's own projections there."""
    model = tiny_model(attention=attention)
    model.detach = False
    reached = gradients(model, model(*packed_batch(), index_loss=True)[1]["kl"]).keys()
    in_last = {name for name in reached if ".layers.2." in name and ".indexer." not in name}
    upstream = ("input_layernorm", "self_attn.q_a_proj", "self_attn.q_a_layernorm")
    assert in_last == {f"model.layers.2.{name}.weight" for name in upstream}
    assert "model.embed_tokens.weight" in reached
    assert "lm_head.weight" not in reached and "model.norm.weight" not in reached


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_indexer_learns(attention):
    """(T14) Steps on the KL lower it, and its language-model loss alone would not move an indexer."""
    model = tiny_model(attention=attention)
    batch = packed_batch()
    before = model(*batch, index_loss=True)[1]["kl"].item()
    optimizer = torch.optim.SGD(model.indexer_parameters(), 0.5)
    for _ in range(5):
        optimizer.zero_grad()
        model(*batch, index_loss=True)[1]["kl"].backward()
        optimizer.step()
    assert 0 < model(*batch, index_loss=True)[1]["kl"].item() < 0.9 * before


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_micro_batches_loss_scale_and_recomputation_give_the_same_gradients(attention):
    """(T18, T19, T21) Two halves averaged are one batch; a loss scale passes through; activation
    checkpointing keeps the KL's graph."""
    model = tiny_model(attention=attention)
    x, y, first = packed_batch()

    def summed(parts, scale=1.0, recompute=False):
        model.recompute = recompute
        model.zero_grad(set_to_none=True)
        for part in parts:
            losses = model(x[part], y[part], first[part], index_loss=True)[1]
            ((losses["lm"] + losses["kl"]) * scale / len(parts)).backward()
        return {name: p.grad / scale for name, p in model.named_parameters()}

    whole = [slice(0, 2)]
    halves = [slice(0, 1), slice(1, 2)]
    expected = summed(whole)
    for got in (summed(halves), summed(whole, scale=1024.0), summed(whole, recompute=True)):
        for name, gradient in expected.items():
            assert_close(got[name], gradient, *FLOAT32, name)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_losses_are_means_over_tokens(attention):
    """(T19) The losses of a batch are the mean over its sequences, and those of a packed row the mean over
    its documents' tokens, however they are packed."""
    model = tiny_model(attention=attention)
    x, y, first = packed_batch()
    both = model(x, y, first, index_loss=True)[1]
    rows = [model(x[i:i + 1], y[i:i + 1], first[i:i + 1], index_loss=True)[1] for i in (0, 1)]
    parts = (slice(0, 20), slice(20, 32))
    documents = [model(x[1:, part], y[1:, part], index_loss=True)[1] for part in parts]
    for name in ("lm", "kl", "kl_uniform", "recall"):
        assert_close(both[name], (rows[0][name] + rows[1][name]) / 2, *FLOAT32, name)
    for name in ("lm", "kl", "kl_uniform"):  # recall is of sampled tokens
        assert_close(rows[1][name], (20 * documents[0][name] + 12 * documents[1][name]) / 32, *FLOAT32, name)


# ---- the language-model loss ----

def loss_inputs(backend, frozen, N=9):
    """h (N,12), weight (37,12), targets (N)."""
    device = device_of(backend)
    h = torch.randn(N, 12, requires_grad=True, device=device)
    weight = torch.randn(37, 12, requires_grad=not frozen, device=device)
    return h, weight, torch.randint(0, 37, (N,), device=device)


@pytest.mark.parametrize("frozen", [False, True])
def test_next_token_loss_in_slices(frozen, backend, monkeypatch):
    """(T18) Value and gradients of cross entropy, times the incoming gradient, slice by slice; a frozen head
    gets none."""
    monkeypatch.setattr(lm_loss, "LOSS_SLICE", 100)  # 2 tokens of 37 logits
    h, weight, targets = loss_inputs(backend, frozen)
    exact_h = h.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    expected = F.cross_entropy(exact_h @ exact_weight.T, targets)
    loss = next_token_loss(h, weight, targets, backend)
    assert_close(loss, expected, *FLOAT32)
    (-3 * loss).backward()
    (-3 * expected).backward()
    assert_close(h.grad, exact_h.grad, *FLOAT32)
    if frozen:
        assert weight.grad is None
    else:
        assert_close(weight.grad, exact_weight.grad, *FLOAT32)
    with torch.no_grad():
        assert torch.equal(next_token_loss(h, weight, targets, backend), loss)


def test_next_token_loss_under_autocast():
    """Logits and gradients in bf16, the loss and its sum in float32. bf16 rounds by 2^-9 of a number: a logit
    x, by h, weight and itself, is off by some |x| 2^-9, so are nats, and so is p by that part of itself."""
    h, weight, targets = loss_inputs("torch", False, N=64)
    exact_h = h.detach().double().requires_grad_()
    exact_weight = weight.detach().double().requires_grad_()
    logits = exact_h @ exact_weight.T
    expected = F.cross_entropy(logits, targets)
    expected.backward()
    with torch.autocast("cpu", torch.bfloat16):
        loss = next_token_loss(h, weight, targets, "torch")
    loss.backward()
    assert loss.dtype == h.grad.dtype == weight.grad.dtype == torch.float32
    off = logits.abs().max().item() * 2**-9
    assert abs(loss.item() - expected.item()) < off / 64**0.5 * 2  # a mean of 64, whose signs are random
    assert_close(h.grad, exact_h.grad, off, 4 * off)
    assert_close(weight.grad, exact_weight.grad, off, 4 * off)
    rounded = (h.bfloat16() @ weight.bfloat16().T).double()  # nothing is rounded behind the logits
    assert loss.item() == pytest.approx(F.cross_entropy(rounded, targets).item(), rel=FLOAT32[0])


@pytest.mark.parametrize("learn_h,learn_weight", [(True, True), (True, False), (False, False)])
def test_next_token_loss_is_a_sound_operation(learn_h, learn_weight, backend):
    """Schema, fake results, autograd registration and tracing, as torch.library checks them."""
    h, weight, targets = loss_inputs(backend, not learn_weight)
    h.requires_grad_(learn_h)
    for dtype in (torch.float32, torch.float16):
        arguments = (h, weight, targets, dtype, backend, learn_h, learn_weight)
        torch.library.opcheck(lm_loss.sliced_loss, arguments)


# ---- precision ----

def test_index_weights_stay_float32_under_autocast():
    """(T6, T7) weights_proj is not rounded to bf16, and neither are the sums of scores and of attention."""
    model = tiny_model()
    layer = model.model.layers[0].self_attn
    calls = []
    layer.indexer.register_forward_hook(lambda module, inputs, output: calls.append((inputs[0], output)))
    with torch.autocast("cpu", torch.bfloat16):
        model(packed_batch()[0])
    h, (q, k, w) = calls[0]
    assert w.dtype == torch.float32 and q.dtype == k.dtype == torch.bfloat16
    assert_close(w, h.double() @ layer.indexer.weights_proj.weight.double().T * (3 * 16) ** -0.5, *FLOAT32)


def test_attention_computes_in_its_inputs_dtype_under_autocast(monkeypatch):
    """(T6) Autocast rounds linear layers, not the products inside the attention path: with float32
    projections an operation gives the same bits inside as outside."""
    model = tiny_model(num_hidden_layers=1)
    recorded = []

    def watch(module, name):
        function = getattr(module, name)

        def record(*args):
            out = function(*args)
            with torch.autocast("cpu", enabled=False):
                recorded.append((name, out, function(*args)))
            return out

        monkeypatch.setattr(module, name, record)

    watch(indexer, "select")
    watch(sparse_attn, "sparse_attention")
    watch(indexer, "indexer_loss_sparse")
    x, y, first = packed_batch()
    with torch.autocast("cpu", torch.bfloat16):
        model(x, y, first, index_loss=True)
    assert [name for name, *_ in recorded] == ["select", "sparse_attention", "indexer_loss_sparse"]
    for _, inside, outside in recorded:
        for a, b in zip(inside, outside):
            assert torch.equal(a, b)


def test_fp8_scores_are_the_scores(monkeypatch):
    """(T8, T9) What the model selects by with index_fp8, scales folded in, beside the unquantised scores.

    e4m3 rounds a number by at most 2^-4 of itself, so q.k by (1 + 2^-4)^2 - 1 of sum |q_i k_i| <= |q||k|, and
    a score by that of size = sum_j |w_j| |q_j| |k|. Roundings are uniform within these bounds and
    independent: of each product sqrt(2/3) 2^-4 in the root mean square, of the sum of d rotated ones of one
    size 1 / sqrt(d) of that."""
    model = tiny_model(num_hidden_layers=1)
    for p in model.indexer_parameters():
        torch.nn.init.normal_(p, std=0.5)
    seen = []
    select = indexer.select

    def spy(q, k, w, topk, k_scale, first, last):
        seen.append((q, k, w, k_scale))
        return select(q, k, w, topk, k_scale, first, last)

    monkeypatch.setattr(indexer, "select", spy)
    x = packed_batch()[0]
    for model.index_fp8 in (False, True):
        model(x)
    (q, k, w, _), (q8, k8, w8, k_scale) = seen
    for x, x8 in ((q, q8), (k, k8)):  # rotated, as published
        assert x8.dtype == torch.float8_e4m3fn
        assert torch.equal(x8.float(), indexer.quantise(x, rotate=True)[0].float())
    error = indexer.index_scores(q8, k8, w8, k_scale) - indexer.index_scores(q, k, w)  # NaN where -inf
    size = torch.einsum("bsj,bsj,bt->bst", w.abs(), q.norm(dim=-1), k.norm(dim=-1))  # (B, S, T)
    error = (error / size)[~error.isnan()]
    assert error.numel() == 2 * 32 * 33 // 2
    assert error.abs().max() <= (1 + 2**-4) ** 2 - 1
    d = q.shape[-1]
    assert 0 < error.square().mean().sqrt() <= (2 / 3 / d) ** 0.5 * 2**-4


CONVERSIONS = dict(
    bfloat16=lambda model: model.bfloat16(),
    half=lambda model: model.half(),
    to_dtype=lambda model: model.to(torch.bfloat16),
    to_device_and_dtype=lambda model: model.to("cpu", torch.float16),
    inside_another=lambda model: torch.nn.Sequential(model).bfloat16()[0],
    there_and_back=lambda model: model.bfloat16().float(),
    through_meta=lambda model: model.to("meta").to_empty(device="cpu"),
    double=lambda model: model.double())


@pytest.mark.parametrize("name", CONVERSIONS)
def test_rope_angles_stay_float32(name):
    """At position 4096 an angle rounded to bf16 would be a radian off."""
    model = CONVERSIONS[name](tiny_model(num_hidden_layers=1))
    expected = rope_frequencies(model.config)[0]
    assert model.rope_frequencies.dtype == torch.float32 and torch.equal(model.rope_frequencies, expected)
    token = torch.zeros(1, 1, dtype=torch.long)
    state = model.forward_state("torch", token, None, False, None, torch.tensor([4096]), None)
    angles = 4096 * expected.double()
    assert_close(state.cos.flatten(), angles.cos(), 4096 * 2**-24, 4096 * 2**-24)
    assert_close(state.sin.flatten(), angles.sin(), 4096 * 2**-24, 4096 * 2**-24)


def test_rope_angles_on_meta():
    """A model without memory says what it will hold; memory given, its angles are right."""
    with torch.device("meta"):
        model = Transformer(Config())
    assert model.bfloat16().rope_frequencies.is_meta and model.rope_frequencies.dtype == torch.float32
    model.to_empty(device="cpu")
    assert torch.equal(model.rope_frequencies, rope_frequencies(Config())[0])


# ---- torch.compile ----

@pytest.mark.parametrize("backend,stage,recompute", [
    ("torch", "dense", False),
    ("torch", "warmup", False),
    ("torch", "sparse", False),
    ("torch", "sparse", True),
    ("torch", "sparse", "offload"),
    ("triton", "dense", False),
    ("triton", "warmup", False),
    ("triton", "sparse", True)])
def test_compiled_training_is_eager_training(backend, stage, recompute):
    """(T21) One graph holds forward and backward of a layer in each stage, as train.py calls it: losses and
    gradients of packed documents, with activation checkpointing too, are those of eager mode."""
    if backend == "triton":
        pytest.importorskip("triton")
    model = tiny_model(backend, "sparse" if stage == "sparse" else "dense", index_fp8=True, **SMALL)
    model.recompute = recompute is not False
    model.offload = recompute == "offload"
    for name, p in model.named_parameters():
        p.requires_grad_(stage == "sparse" or (".indexer." in name) == (stage == "warmup"))
    x, y, first = packed_batch(backend, B=1, S=10)
    targets = None if stage == "warmup" else y
    results = []
    for compiles in (False, True):
        if compiles:
            model.compile_layers(fullgraph=True, backend="aot_eager")
        losses = model(x, targets, first, index_loss=stage != "dense", logits_of=None)[1]
        objective = sum(losses[name] for name in ("lm", "kl") if name in losses)
        results.append((losses, gradients(model, objective)))
    (losses, expected), (compiled_losses, compiled) = results
    assert losses.keys() == compiled_losses.keys()
    for name in losses:
        assert_close(compiled_losses[name], losses[name], *FLOAT32, name)
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert expected.keys() == compiled.keys() == learning
    for name in expected:
        assert_close(compiled[name], expected[name], *FLOAT32, name)


def test_as_many_graphs_as_kinds_of_layers():
    """More than torch.compile's own limit, beyond which it would compile no more of them."""
    model = tiny_model(attention="dense", **SMALL)
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    model.compile_layers(backend=count, dynamic=False)
    for S in range(4, 16):
        model(torch.zeros(1, S, dtype=torch.long))
    assert len(graphs) == 12


def test_compiled_training_under_autocast():
    """The same in bf16, as train.py runs on a GPU: gradients of the residual stream are then sums of bf16
    numbers in an order of the compiler's own, each rounded by 2^-9."""
    model = tiny_model(index_fp8=True, **SMALL)
    x, y, first = packed_batch(B=1, S=10)
    results = []
    for compiles in (False, True):
        if compiles:
            model.compile_layers(fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            losses = model(x, y, first, index_loss=True, logits_of=None)[1]
        results.append((losses, gradients(model, losses["lm"] + losses["kl"])))
    (losses, expected), (compiled_losses, compiled) = results
    for name in losses:
        assert_close(compiled_losses[name], losses[name], 2**-9, 2**-9, name)
    assert expected.keys() == compiled.keys()
    for name in expected:
        assert_close(compiled[name], expected[name], 4 * 2**-9, 16 * 2**-9, name)


def test_compiled_decoding_is_eager_decoding(backend):
    """One graph holds a step against caches whose length is read on the device."""
    model = tiny_model(backend, index_fp8=True, **SMALL).eval()
    x = packed_batch(backend, B=2, S=12)[0]
    last = torch.full((2, 1), 11, dtype=torch.int32, device=x.device)
    results = []
    with torch.no_grad():
        for forward in (model, torch.compile(model, fullgraph=True, backend="aot_eager")):
            cache = sparse_attn.Cache(model.config, 2, 16, x.device, torch.float32, index_fp8=True)
            model(x[:, :11], caches=[cache], position=torch.arange(11, device=x.device))
            position = torch.tensor([11], device=x.device)
            results.append(forward(x[:, 11:], caches=[cache], position=position, last=last)[0])
        full = model(x)[0][:, 11:]
    assert_close(results[0], full, *FLOAT32)
    assert_close(results[1], results[0], *FLOAT32)


# ---- numbers that are not finite ----

@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_a_weight_that_is_not_finite_shows_in_the_loss(attention, bad):
    """Whichever parameter holds it: the indexer's in the KL, all others in the language-model loss."""
    model = tiny_model(attention=attention, index_fp8=True, **SMALL)
    x, y, first = packed_batch(B=1, S=10)
    for name, p in model.named_parameters():
        entry = p.data[x[0, 0]] if name == "model.embed_tokens.weight" else p.data
        entry = entry.view(-1)[:1]
        kept = entry.clone()
        entry.fill_(bad)
        with torch.no_grad():
            losses = model(x, y, first, index_loss=True, logits_of=None)[1]
        entry.copy_(kept)
        loss = losses["kl" if ".indexer." in name else "lm"]
        assert not loss.isfinite(), name
    with torch.no_grad():
        losses = model(x, y, first, index_loss=True, logits_of=None)[1]
    assert losses["lm"].isfinite() and losses["kl"].isfinite()


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize(
    "name", ["q_b_proj", "kv_b_proj", "indexer.wq_b", "indexer.wk", "indexer.weights_proj"])
def test_kernels_hide_no_nan(attention, name):
    """The same of what enters the kernels."""
    pytest.importorskip("triton")
    model = tiny_model("triton", attention, index_fp8=True, **SMALL)
    x, y, first = packed_batch("triton", B=1, S=10)
    model.get_submodule(f"model.layers.0.self_attn.{name}").weight.data[0, 0] = math.nan
    with torch.no_grad():
        losses = model(x, y, first, index_loss=True, logits_of=None)[1]
    assert losses["kl"].isnan()
    assert losses["lm"].isnan() == ("indexer" not in name)


@pytest.mark.parametrize("index_fp8", [False, True])
@pytest.mark.parametrize("position", [0, 8])
def test_nan_spreads_to_those_that_may_see_it(index_fp8, position, backend):
    """(T10-T12) A token of NaN is selected by every later token of its document, and by no other."""
    model = tiny_model(backend, index_fp8=index_fp8, **SMALL)
    x = torch.arange(12, device=device_of(backend))[None]
    first = torch.zeros(1, 12, dtype=torch.int32, device=x.device)
    first[:, 6:] = 6
    model.model.embed_tokens.weight.data[position] = math.nan
    with torch.no_grad():
        finite = model(x, first=first)[0].isfinite().all(-1)[0]
    end = 6 if position < 6 else 12
    assert finite.tolist() == [not position <= t < end for t in range(12)]


# ---- arguments ----

@pytest.mark.parametrize("changes,message", [
    (dict(index_topk=-1), "index_topk=-1"),
    (dict(num_attention_heads=0), "num_attention_heads=0"),
    (dict(qk_rope_head_dim=7), "qk_rope_head_dim=7"),
    (dict(index_head_dim=24), "index_head_dim=24"),
    (dict(index_head_dim=4), "index_head_dim=4")])
def test_impossible_shapes_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        tiny_model(**changes)


def test_impossible_arguments_are_refused():
    with pytest.raises(ValueError, match="no indexer"):
        Transformer(Config(index_topk=0), attention="sparse")
    with pytest.raises(ValueError, match="attention=flash"):
        Transformer(Config(), attention="flash")
    with pytest.raises(ValueError, match="backend=cuda"):
        Transformer(Config(), backend="cuda")
    short = tiny_model(max_position_embeddings=16)
    idx = torch.zeros(1, 17, dtype=torch.long)
    with pytest.raises(ValueError, match="max_position_embeddings=16"):
        short(idx)
    with pytest.raises(ValueError, match="index_loss"):
        short(idx[:, :1], index_loss=True, caches=[None], position=idx[0, :1])
