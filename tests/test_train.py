"""train.py: what it computes of a run's options (schedule, what learns, FLOPs, peak memory), and the run
under torch.compile."""
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from config import Config
from model import Attention, Transformer
from sparse_attn import Cache
from support import report
from tests.scripts import call, losses, metrics
from tests.scripts import train as train_small

TINY = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12, index_n_heads=2,
    index_head_dim=16, index_topk=8)


# ---- learning rate ----

def options_of(**values):
    return train.Options(**values)


def test_learning_rate_ramp_cosine_and_last_step():
    """By hand: 4 steps of ramp reach 1/5 .. 4/5 of the peak, step 4 is the peak, the last step min_lr of it,
    the step halfway between them the mean of the two."""
    options = options_of(ramp_steps=4, min_lr=0.1)
    rates = [train.learning_rate(options, step, 25, 2.0) for step in range(25)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0], rel=1e-12)
    assert rates[-1] == pytest.approx(0.2, rel=1e-12)
    assert rates[14] == pytest.approx((2.0 + 0.2) / 2, rel=1e-12)
    assert rates[9] == pytest.approx(0.2 + 1.8 * (0.5 + 0.5**1.5), rel=1e-12)  # cos(pi / 4) = 2^-1/2
    assert all(a > b for a, b in zip(rates[4:], rates[5:]))


def test_learning_rate_constant_and_short_stages():
    constant = options_of(ramp_steps=3, schedule="constant")
    rates = [train.learning_rate(constant, step, 10, 1.0) for step in range(10)]
    assert rates == [0.25, 0.5, 0.75] + [1.0] * 7
    assert train.learning_rate(options_of(ramp_steps=0), 0, 1, 3.0) == 3.0
    assert train.learning_rate(options_of(ramp_steps=0, min_lr=0.0), 1, 2, 3.0) == 0.0
    # a stage shorter than its ramp is over before the peak
    assert train.learning_rate(options_of(ramp_steps=20), 4, 5, 1.0) == 5 / 21


def test_learning_rate_of_the_log(run):
    options = options_of(ramp_steps=2, dense_steps=6, warmup_steps=5, sparse_steps=5)
    for r in metrics(run[0]):
        steps = getattr(options, f"{r['stage']}_steps")
        assert r["lr"] == train.learning_rate(options, r["step"], steps, getattr(options, f"{r['stage']}_lr"))


# ---- what learns ----

def test_bfloat16_weights_train_in_float32():
    """Steps of a small learning rate, less than half a bf16 digit of most weights, add up."""
    model = Transformer(Config(num_hidden_layers=1)).bfloat16()
    main, index = train.trainable(model, "sparse", "attention")
    assert {p.dtype for p in main + index} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    before = [p.detach().clone() for p in main]
    optimizer = torch.optim.AdamW(main, lr=1e-6)
    for p in main:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert all((p != old).all() for p, old in zip(main, before))


@pytest.mark.parametrize("stage,choice,expected", [
    ("dense", "all", "main"), ("warmup", "all", "indexers"), ("sparse", "all", "everything"),
    ("sparse", "attention", "attention"), ("sparse", "none", "indexers"), ("control", "all", "main"),
    ("control", "attention", "main attention"), ("dense", "none", "main"), ("warmup", "none", "indexers")])
def test_what_learns(stage, choice, expected):
    """(T14, T22) --train concerns the sparse stage and its control alone."""
    model = Transformer(Config(**TINY))
    main, index = train.trainable(model, stage, choice)
    learns = {name for name, p in model.named_parameters() if p.requires_grad}
    everything = {name for name, _ in model.named_parameters()}
    indexers = {name for name in everything if ".indexer." in name}
    attention = {name for name in everything if ".self_attn." in name}
    assert learns == dict(
        everything=everything, indexers=indexers, main=everything - indexers, attention=attention,
        **{"main attention": attention - indexers})[expected]
    assert len(main) == len(learns - indexers) and len(index) == len(learns & indexers)


def test_weight_decay_is_for_matrices():
    """(T22) vectors are not decayed, and no parameter is in two groups."""
    model = Transformer(Config(**TINY))
    groups = train.trainable(model, "sparse", "all")
    optimizer = train.adamw(*groups, options_of(weight_decay=0.3), torch.device("cpu"))
    members = sum(len(group["params"]) for group in optimizer.param_groups)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == members == len(list(model.parameters()))
    assert all(rate == (0.3 if p.dim() > 1 else 0) for p, rate in decay.items())


def test_batches_count_on():
    """From step to step and from stage to stage: none is seen twice."""
    options = options_of(dense_steps=6, warmup_steps=5, sparse_steps=4, gradient_accumulation_steps=3)
    numbers = []
    for stage, steps in dict(dense=6, warmup=5, sparse=4).items():
        for step in range(steps):
            numbers += train.batch_numbers(options, stage, step)
    assert numbers == [*range(3 * 15)]


def test_the_model_and_the_indexers_are_clipped_apart(place, run, monkeypatch):
    """(T22) What the optimizer is given, with a limit far below both norms: each of them has that norm."""
    step = torch.optim.AdamW.step
    norms = []

    def watched(optimizer, *args, **kwargs):
        gradients = [[p.grad for p in group["params"]] for group in optimizer.param_groups]
        main = torch.nn.utils.get_total_norm(gradients[0] + gradients[1])
        index = torch.nn.utils.get_total_norm(gradients[2] + gradients[3])
        norms.extend((main.item(), index.item()))
        return step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    short = ("--stage=sparse", "--sparse_steps=1", f"--init_from={run[0]}/warmup", "--grad_clip=1e-5")
    assert train_small(place, "clipped", *short)[0] == 0
    # clip_grad_norm_ divides by norm + 1e-6
    [record] = metrics(place / "clipped")
    for norm, before in zip(norms, (record["grad_norm"], record["index_grad_norm"]), strict=True):
        assert before > 2e-5 and norm == pytest.approx(1e-5 * before / (before + 1e-6), rel=1e-4)


# ---- FLOPs ----

def count_next_token_loss(h, weight, targets, dtype, backend, learn_h, learn_weight, *, out_shape=None):
    """Of the operation dsa::next_token_loss, which the counter cannot look into: three products as in any
    linear layer."""
    return 2 * h[0] * h[1] * weight[0] * (1 + learn_h + learn_weight)


def counted(model, stage, x):
    """FLOPs per token of a training step, by torch's counter."""
    model.attention = "sparse" if stage == "sparse" else "dense"
    targets = None if stage == "warmup" else x
    mapping = {torch.ops.dsa.next_token_loss: count_next_token_loss}
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        _, losses = model(x, targets, index_loss=stage in ("warmup", "sparse"), logits_of=None)
        sum(losses[name] for name in ("lm", "kl") if name in losses).backward()
    return counter.get_total_flops() / x.numel()


VARIANTS = dict(
    plain={}, shared=dict(indexer_types=["full", "shared", "full"]), no_latent=dict(q_lora_rank=0),
    tied=dict(tie_word_embeddings=True), wide_value=dict(v_head_dim=40, attention_bias=True),
    experts=dict(n_routed_experts=8, num_experts_per_tok=3, n_shared_experts=2, moe_intermediate_size=20),
    only_experts=dict(
        n_routed_experts=4, n_shared_experts=0, moe_intermediate_size=20, first_k_dense_replace=0))


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("stage,choice", [
    ("dense", "all"), ("warmup", "all"), ("sparse", "all"), ("sparse", "attention"), ("sparse", "none"),
    ("control", "all"), ("control", "attention")])
@pytest.mark.parametrize("detach", [True, False])
def test_flops_are_those_of_the_reference(variant, stage, choice, detach, monkeypatch):
    """Exactly what torch counts, but for the recall, a metric. The reference visits all T keys of a query and
    all k slots of a selection, where a step needs (T + 1) / 2 and min(t, k)."""
    T = 40
    x = torch.randint(257, (2, T))
    monkeypatch.setattr(Attention, "recall", lambda *args: torch.zeros(2, 16))
    model = Transformer(Config(**TINY | VARIANTS[variant]), "torch")
    model.detach = detach
    train.trainable(model, stage, choice)
    again = 0
    if variant == "shared" and stage in ("warmup", "sparse"):  # index scores, by the layer that shares them
        again = 3 * report.score_flops(model.config) * (T if stage == "warmup" else 8)
    want = counted(model, stage, x) - again
    assert report.flops_per_token(model, T, stage, T, 8) == pytest.approx(want, rel=1e-12)


def test_tokens_that_are_read():
    """What lies in a query's document up to itself, and of it no more than k: by hand."""
    run = SimpleNamespace(split=None, model=Transformer(Config(**TINY), "torch"))
    x = torch.zeros(2, 40)
    assert train.tokens_read(run, x, None) == dict(visible=20.5, selected=(sum(range(1, 9)) + 32 * 8) / 40)
    first = torch.zeros(2, 40, dtype=torch.int32)
    first[1, 30:] = 30  # documents of 30 and 10 tokens
    visible = (sum(range(1, 41)) + sum(range(1, 31)) + sum(range(1, 11))) / 80
    selected = (3 * sum(range(1, 9)) + (32 + 22 + 2) * 8) / 80
    assert train.tokens_read(run, x, first) == dict(visible=visible, selected=selected)
    position = torch.cat((torch.arange(10), torch.arange(30, 40)))  # of rank 0 of two
    run.split = SimpleNamespace(position=position)
    assert train.tokens_read(run, x[:, :20], None)["visible"] == 20.5


@pytest.mark.parametrize("T", [5, 8, 40])
@pytest.mark.parametrize("stage", ["dense", "warmup", "sparse"])
def test_flops_of_one_document(stage, T):
    """without other figures, what train.py counts of it"""
    model = Transformer(Config(**TINY), "torch")
    read = train.tokens_read(SimpleNamespace(split=None, model=model), torch.zeros(1, T), None)
    want = report.flops_per_token(model, T, stage, float(read["visible"]), float(read["selected"]))
    assert report.flops_per_token(model, T, stage) == pytest.approx(want, rel=1e-6)


def test_recall_is_a_small_part():
    """What the counted FLOPs leave out: below 16 / T of the warm-up's pairs."""
    model = Transformer(Config(**TINY), "torch")
    train.trainable(model, "warmup", "all")
    T = 160
    x = torch.randint(257, (1, T))
    ratio = counted(model, "warmup", x) / report.flops_per_token(model, T, "warmup", T, 8)
    assert 1 < ratio < 1.1


def test_mfu_of_the_log(run):
    """tokens/s x FLOPs per token over one rate for the whole run; most windows hold several documents."""
    model = Transformer.from_pretrained(run[0] / "sparse")
    rates = []
    for r in metrics(run[0]):
        train.trainable(model, r["stage"], "all")
        flops = report.flops_per_token(model, 32, r["stage"], r["visible"], r["selected"])
        rates.append(r["tokens_per_second"] * flops / r["mfu"])
        assert r["visible"] <= 16.5 and r["selected"] <= r["visible"]
    assert max(rates) == pytest.approx(min(rates), rel=1e-9)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="resets the peak of a GPU")
def test_peak_memory_begins_anew():
    device = torch.device("cuda", torch.cuda.device_count() - 1)
    big = torch.zeros(2**28, dtype=torch.uint8, device=device)
    del big
    assert report.peak_memory(device) >= 2**28 / 1e9
    report.reset_peak_memory(device)
    assert report.peak_memory(device) < 2**28 / 1e9


def test_peak_memory_is_reset_once_a_stage(place, monkeypatch):
    resets = []
    monkeypatch.setattr(report, "reset_peak_memory", lambda device: resets.append(str(device)))
    code, out, err = train_small(place, "resets")
    assert code == 0 and resets == ["cpu"] * 3, err
    assert "peak of the whole process" in out


# ---- torch.compile ----

def test_compiled_decoding_in_one_graph():
    """With lengths read on the device, as in a CUDA graph."""
    torch.manual_seed(0)
    model = Transformer(Config(**TINY | dict(num_hidden_layers=1, initializer_range=0.2)), "torch").eval()
    T = 20
    x = torch.randint(257, (2, T + 1))
    caches = [Cache(model.config, 2, 32, x.device, torch.float32, index_fp8=True)]
    last = torch.full((2, 1), T, dtype=torch.int32)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        model(x[:, :T], caches=caches, position=torch.arange(T))
        args = dict(first=torch.zeros_like(last), caches=caches, position=torch.tensor([T]), last=last)
        got, _ = compiled(x[:, T:], **args)
        want, _ = model(x[:, T:], **args)
    assert torch.equal(got, want)


def test_compiled_run_is_the_run(place, monkeypatch):
    """train.py --compile through all stages, a layer in one graph each: attention, losses and what learns
    change under it, and evaluations are not compiled. Traced, not fused: inductor takes minutes for this on a
    CPU. Backward graphs: tests/test_model.py."""
    compile_model = torch.compile
    graphs = []

    def count(graph, inputs):
        graphs.append(torch.is_grad_enabled())
        return graph

    def traced(function):
        return compile_model(function, backend=count, fullgraph=True)

    monkeypatch.setattr(torch, "compile", traced)
    short = ("--num_hidden_layers=3", "--dense_steps=2", "--warmup_steps=2", "--sparse_steps=2")
    code, _, err = train_small(place, "compiled", "--compile", *short)
    assert code == 0 and graphs == [True] * 3, (graphs, err)
    assert train_small(place, "not compiled", *short)[0] == 0
    assert losses(place / "compiled") == losses(place / "not compiled")


# ---- the options ----

def test_every_option_says_what_it_is(place):
    code, out, _ = call(place, "train.py", "--help")
    assert code == 0
    shown = " ".join(out.split())
    for field in (*train.fields(train.Options), *train.MODEL_FIELDS):
        default = "none" if field.default == "" else field.default
        text = " ".join(f"{field.metadata['help']} (default {default}".split())
        assert f"--{field.name}" in shown and text in shown, field.name
