"""Layers that share a selection (--share_selection, config.indexer_types, docs/LONG.md): what their attention
teaches the indexer whose selection they use, against the definition in float64; who learns; checkpoints and
train.py."""
import json
import signal

import pytest
import torch
import torch.nn.functional as F
from safetensors import safe_open

import indexer
import model as model_file
import train as train_file
from config import Config
from model import Transformer, watched
from support import checkpoint, runs
from tests.common import FLOAT32, assert_close, packed_batch, tiny_model
from tests.scripts import call, losses, metrics, refused, train
from tests.test_generate import random_tokens

TYPES = ["full", "shared", "shared", "full", "shared"]
GROUPS = ((0, 1, 2), (3, 4))  # the layers of each selection
UNEQUAL = dict(num_hidden_layers=5, indexer_types=TYPES)
PAIR = dict(num_hidden_layers=2, indexer_types=["full", "shared"])  # for the interpreter, which is slow
STAGES = dict(dense="warm-up", sparse="sparse")  # attention: stage
EXPERTS = dict(
    n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, moe_intermediate_size=20,
    first_k_dense_replace=1)
TWO_LEVELS = dict(index_block=4, index_candidates=16, index_exact_layers=0)
LENGTH = indexer.RECENT + 40  # of a sequence some of whose blocks are ranked


def gradients(model, objective):
    """-> {name: gradient} of the parameters that the objective reaches."""
    model.zero_grad(set_to_none=True)
    objective.backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}


def indexers_of(model, layers):
    """The names of the parameters of these layers' indexers."""
    starts = tuple(f"model.layers.{layer}.self_attn.indexer." for layer in layers)
    return {name for name, _ in model.named_parameters() if name.startswith(starts)}


# ---- the definition ----

def index_inputs(loss, sparse):
    """q_index, k_index, w among the arguments of a layer's loss."""
    return loss[5:8] if sparse else loss[4:7]


class Seen:
    """What one layer fed to its loss, and selected for sampled queries."""

    def __init__(self):
        self.loss = None
        self.chosen = None


def seen_by_layers(model, batch):
    """A forward with the indexers' loss -> its losses, a Seen of each layer."""
    layers = [Seen() for _ in model.model.layers]
    S = batch[0].shape[1]

    def wrap(layer, h, ops):
        def dense(*args):
            layers[layer].loss = args
            return ops.indexer_loss_dense(*args)

        def sparse(*args):
            layers[layer].loss = args
            return ops.indexer_loss_sparse(*args)

        def select(*args):
            chosen = ops.select(*args)
            if args[0].shape[1] != S:  # the queries on which recall is measured
                layers[layer].chosen = chosen
            return chosen

        return ops._replace(indexer_loss_dense=dense, indexer_loss_sparse=sparse, select=select)

    with watched(model, wrap):
        found = model(*batch, index_loss=True)[1]
    return found, layers


def target(loss, seen):
    """p (B,S,T) in float64: mean over heads of the softmax over what is seen (B,S,T), of what a layer fed to
    its loss."""
    sparse = loss[1].dim() == 3
    q = loss[0].detach().double()  # (B, S, H, D)
    k = loss[1].detach().double()
    k = k[:, :, None] if sparse else k  # (B, T, H or 1, D): latents are one head
    scale = loss[4] if sparse else loss[3]
    logits = torch.einsum("bshd,bthd->bsht", q, k.expand(-1, -1, q.shape[2], -1)) * scale
    return logits.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).mean(2)


def divergence(p, log_q):
    """KL(p || q), mean over queries; where p is 0 log q is whatever."""
    return (torch.special.xlogy(p, p) - p * log_q.masked_fill(p == 0, 0)).sum(-1).mean()


def negative_entropy(p):
    return torch.special.xlogy(p, p).sum(-1).mean()


def defined(layers, first, sparse, groups, served):
    """The definition: over the groups, each with the weight of its layers, KL(mean of p of the layers
    `served` || softmax(I)), and the entropies by which it differs from the mean of these layers' own KL ->
    both means, and the gradients in q_index, k_index, w of each group's indexer."""
    count = sum(len(group) for group in groups)
    kl = 0
    entropies = 0
    leaves = []
    for group, members in zip(groups, served, strict=True):
        args = layers[group[0]].loss
        scored = [x.detach().double().requires_grad_() for x in index_inputs(args, sparse)]
        q_index, k_index, w = scored
        S, T = q_index.shape[1], k_index.shape[1]
        t = torch.arange(T, device=first.device)
        seen = (t[None, None] <= t[-S:, None]) & (t >= first[..., None])  # (B, S, T)
        if sparse:
            seen = indexer.membership(args[3], T)
        targets = torch.stack([target(layers[layer].loss, seen) for layer in members])  # (layers, B, S, T)
        mean = targets.mean(0)  # (B, S, T)
        dots = torch.einsum("bshd,btd->bsht", q_index, k_index).relu()  # (B, S, HI, T)
        scores = torch.einsum("bsht,bsh->bst", dots, w)  # (B, S, T)
        log_q = F.log_softmax(scores.masked_fill(~seen, float("-inf")), -1)
        weight = len(group) / count
        kl = kl + weight * divergence(mean, log_q)
        of_each = torch.stack([negative_entropy(p) for p in targets]).mean()
        entropies = entropies + weight * (of_each - negative_entropy(mean))
        leaves += scored
    return kl, entropies, torch.autograd.grad(kl, leaves)


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("attention", STAGES)
def test_kl_to_the_mean_of_the_served_layers(backend, attention):
    """In value up to the entropies and in gradient; a target without one of the layers is another."""
    if backend == "triton":
        pytest.importorskip("triton")
    torch.manual_seed(0)
    interpreted = backend == "triton" and not torch.cuda.is_available()
    sizes, groups, S = (PAIR, ((0, 1),), 9) if interpreted else (UNEQUAL, GROUPS, 17)
    model = tiny_model(backend, attention, **sizes)
    sparse = attention == "sparse"
    batch = packed_batch(backend, B=1 if interpreted else 2, S=S)
    first = batch[2]
    found, layers = seen_by_layers(model, batch)
    scored = [x for group in groups for x in index_inputs(layers[group[0]].loss, sparse)]
    got = torch.autograd.grad(found["kl"], scored)

    kl, entropies, want = defined(layers, first, sparse, groups, groups)
    # a difference of entropies of some nats, each of float32's relative error
    assert found["kl"].item() == pytest.approx((kl + entropies).item(), rel=FLOAT32[1])
    assert entropies > 0.01 * kl
    for x, y in zip(got, want, strict=True):
        assert_close(x, y, *FLOAT32, floor=1.0)

    for left_out in range(len(layers)):
        served = [[layer for layer in group if layer != left_out] for group in groups]
        _, _, other = defined(layers, first, sparse, groups, served)
        changed = [(x - y).norm() / y.norm() for x, y in zip(other, want, strict=True)]
        assert max(changed) > 0.01  # against FLOAT32's 5e-6


@pytest.mark.parametrize("attention", STAGES)
def test_recall_is_that_of_all_layers(attention):
    """The mean over all of them of the dense attention's mass in the selection that each uses."""
    torch.manual_seed(0)
    model = tiny_model(attention=attention, **UNEQUAL)
    batch = packed_batch(S=40)
    found, layers = seen_by_layers(model, batch)
    rows = torch.linspace(0, 39, model_file.RECALL_QUERIES).long()
    t = torch.arange(40)
    seen = (t[None, None] <= t[:, None]) & (t >= batch[2][..., None])  # (B, S, T)
    masses = []
    for group in GROUPS:
        for layer in group:
            p = target(layers[layer].loss, seen)[:, rows]  # (B, 16, T)
            if attention == "sparse":
                chosen = layers[group[0]].loss[3][:, rows]
            else:
                chosen = layers[group[0]].chosen
            masses.append((p * indexer.membership(chosen, 40)).sum(-1).mean().item())
    assert max(masses) - min(masses) > 0.01
    assert found["recall"].item() == pytest.approx(sum(masses) / len(masses), rel=FLOAT32[1])


# ---- who learns ----

@pytest.mark.parametrize("attention", STAGES)
def test_full_layers_alone_have_indexers_and_learn(attention):
    """Each loss reaches its own parameters only, as where every layer selects. Without `detach` the KL of a
    group also reaches the main model, up to its full layer and no further."""
    model = tiny_model(attention=attention, **UNEQUAL)
    index = {name for name, _ in model.named_parameters() if ".indexer." in name}
    assert index == indexers_of(model, (0, 3)) and len(index) == 10
    batch = packed_batch()
    assert gradients(model, model(*batch, index_loss=True)[1]["kl"]).keys() == index
    others = {name for name, _ in model.named_parameters()} - index
    assert gradients(model, model(*batch, index_loss=True)[1]["lm"]).keys() == others
    model.detach = False
    reached = gradients(model, model(*batch, index_loss=True)[1]["kl"]).keys()
    assert index < reached
    assert not any(name.startswith(("model.layers.4.", "lm_head")) for name in reached)


@pytest.mark.parametrize("changes", [{}, TWO_LEVELS, EXPERTS], ids=["plain", "two levels", "experts"])
@pytest.mark.parametrize("attention", STAGES)
def test_recomputing_changes_no_bit(attention, changes):
    """What is carried from layer to layer are inputs and outputs of blocks. The warm-up's model is frozen."""
    torch.manual_seed(0)
    model = tiny_model(attention=attention, index_fp8=True, **UNEQUAL, **changes)
    train_file.trainable(model, "sparse" if attention == "sparse" else "warmup", "all")
    x, y, first = packed_batch(S=LENGTH if "index_block" in changes else 32)
    results = []
    for model.recompute, model.offload in ((False, False), (True, False), (True, True)):
        found = model(x, y if attention == "sparse" else None, first, index_loss=True, logits_of=None)[1]
        names = [name for name in ("lm", "kl") if name in found]
        results.append((found, gradients(model, sum(found[name] for name in names))))
    want, want_gradients = results[0]
    for got, got_gradients in results[1:]:
        assert got.keys() == want.keys() and got_gradients.keys() == want_gradients.keys()
        for name in want:
            assert torch.equal(got[name], want[name]), name
        for name in want_gradients:
            assert torch.equal(got_gradients[name], want_gradients[name]), name


@pytest.mark.parametrize("attention", STAGES)
def test_compiled(attention):
    """A layer in one graph, with recomputation: the same losses and gradients."""
    torch.manual_seed(0)
    model = tiny_model(attention=attention, **PAIR)
    train_file.trainable(model, "sparse" if attention == "sparse" else "warmup", "all")
    model.recompute = True
    x, y, first = packed_batch(B=1, S=10)
    targets = y if attention == "sparse" else None
    tracer = "aot_eager" if attention == "sparse" else "eager"  # the backward traced, too: slow, so once
    results = []
    for compiles in (False, True):
        if compiles:
            model.compile_layers(fullgraph=True, backend=tracer)
        found = model(x, targets, first, index_loss=True, logits_of=None)[1]
        results.append((found, gradients(model, found["kl"] + found.get("lm", 0))))
    (want, want_gradients), (got, got_gradients) = results
    assert got_gradients.keys() == want_gradients.keys()
    for name in want:
        assert_close(got[name], want[name], *FLOAT32, name)
    for name in want_gradients:
        assert_close(got_gradients[name], want_gradients[name], *FLOAT32, name)


def test_replayed_selections():
    """Layers that share learn over the selection that they are given, as all others."""
    model = tiny_model(attention="sparse", **PAIR)
    idx = random_tokens("torch", 2, 20)
    chosen = []
    own = model(idx, index_loss=True, selections=chosen)[1]
    assert torch.equal(chosen[0], chosen[1])
    replayed = model(idx, index_loss=True, selections=chosen)[1]
    assert own["kl"] == replayed["kl"] and own["recall"] == replayed["recall"]
    last = torch.arange(20).view(1, 20, 1) - torch.arange(5, -1, -1)  # the last 6
    window = torch.where(last < 0, 20, last).sort(-1).values  # empty slots stand last
    window = torch.where(window == 20, -1, window).int().expand(2, -1, -1).contiguous()
    other = model(idx, index_loss=True, selections=[chosen[0], window])[1]["kl"]
    assert other != own["kl"]
    assert gradients(model, other).keys() == indexers_of(model, (0,))


# ---- checkpoints ----

def test_indexers_are_dropped(tmp_path, capsys):
    """From a checkpoint with an indexer in every layer: the weights of all others stay, and what is written
    holds and says what is left. Other ways to say the old pattern do not contradict it."""
    torch.manual_seed(0)
    everywhere = tiny_model(num_hidden_layers=5)
    everywhere.config.other = dict(index_topk_pattern="FFFFF", index_topk_freq=1, bos_token_id=3)
    everywhere.config.indexer_types = ["full"] * 5
    everywhere.save_pretrained(tmp_path / "full")
    model = Transformer.from_pretrained(tmp_path / "full", "torch", index_fp8=False, indexer_types=TYPES)
    assert "the indexers of layers [1, 2, 4] are left out" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "shared")
    again = Transformer.from_pretrained(tmp_path / "shared", "torch", index_fp8=False)
    assert not capsys.readouterr().err

    config = json.loads((tmp_path / "shared" / "config.json").read_text())
    assert config["indexer_types"] == TYPES and config["bos_token_id"] == 3
    with safe_open(tmp_path / "shared" / "model.safetensors", "pt") as file:
        names = set(file.keys())
    assert names == everywhere.state_dict().keys() - indexers_of(everywhere, (1, 2, 4))
    built = tiny_model(**UNEQUAL)
    built.load_state_dict({name: everywhere.state_dict()[name] for name in built.state_dict()})
    batch = packed_batch()
    want = built(*batch, index_loss=True)
    for other in (model, again):
        logits, found = other(*batch, index_loss=True)
        assert torch.equal(logits, want[0]) and all(torch.equal(found[name], want[1][name]) for name in found)


# ---- train.py ----

def test_groups():
    """The first of each N layers is full; nothing changes where nothing is to, or is so already."""
    config = Config(num_hidden_layers=5)
    assert train_file.indexer_types(config, 1) is None
    assert train_file.indexer_types(config, 2) == ["full", "shared", "full", "shared", "full"]
    assert train_file.indexer_types(config, 3) == TYPES
    assert train_file.indexer_types(config, 9) == ["full"] + ["shared"] * 4
    config.indexer_types = TYPES
    assert train_file.indexer_types(config, 3) is None and train_file.indexer_types(config, 1) is None
    config.indexer_types = ["full"] * 5
    assert train_file.indexer_types(config, 3) == TYPES


@pytest.fixture(scope="module")
def shared(place):
    """-> the folder of a run of all stages with shared selections."""
    code, out, err = train(place, "shared", "--share_selection=2")
    assert code == 0 and "indexers in layers [0];" in out, err
    return place / "shared"


def test_all_stages(shared):
    for stage in ("dense", "warmup", "sparse"):
        assert checkpoint.read_config(shared / stage).indexer_types == ["full", "shared"]
    for record in metrics(shared):
        assert ("kl" in record) == (record["stage"] != "dense")


def test_from_a_checkpoint(place, run, shared):
    """A warm-up or a sparse stage drops the indexers; a checkpoint that shares stays as it is, said or not; a
    control starts from the same layers."""
    short = ("--warmup_steps=2", "--sparse_steps=2", "--save_interval=9")
    for stage, start in (("warmup", run[0] / "dense"), ("sparse", run[0] / "warmup")):
        start = f"--init_from={start}"
        code, _, err = train(
            place, f"drop {stage}", f"--stage={stage}", start, "--share_selection=2", *short)
        assert code == 0 and "indexers of layers [1] are left out" in err, err
        config = checkpoint.read_config(place / f"drop {stage}" / stage)
        assert config.indexer_types == ["full", "shared"]
    results = []
    for number, further in enumerate(((), ("--share_selection=2",))):
        start = f"--init_from={shared}/warmup"
        assert train(place, f"go on {number}", "--stage=sparse", start, *further, *short)[0] == 0
        results.append(losses(place / f"go on {number}"))
    assert results[0] == results[1]
    assert call(place, "train.py", "--out_dir=go on 1", "--stage=control")[0] == 0
    assert checkpoint.read_config(place / "go on 1" / "control").indexer_types == ["full", "shared"]


def test_stopped_and_resumed(place, shared, monkeypatch):
    """Within the warm-up: losses to the last bit."""
    step = torch.optim.AdamW.step
    steps = []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 6 + 3:
            signal.raise_signal(signal.SIGINT)
        return step(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        assert train(place, "shared again", "--share_selection=2")[0] == 130
    [state] = runs.states(place / "shared again")
    assert checkpoint.read_config(state).indexer_types == ["full", "shared"]
    resume = ("--resume", "--out_dir=shared again")
    refused(call(place, "train.py", *resume, "--share_selection=1"), "share_selection=1", "has 2")
    assert call(place, "train.py", *resume)[0] == 0
    assert losses(place / "shared again") == losses(shared)


def test_refusals(place, tmp_path):
    refused(train(place, "never", "--share_selection=0"), "share_selection=0")
    types = ["full", "full", "shared"]
    tiny_model(vocab_size=257, num_hidden_layers=3, indexer_types=types).save_pretrained(tmp_path / "other")
    tiny_model(vocab_size=257, index_topk=0).save_pretrained(tmp_path / "dense")
    short = ("train.py", "--data=text.txt", "--tokenizer=bytes", "--out_dir=no", "--block_size=16")
    refused(call(place, *short, "--stage=sparse", f"--init_from={tmp_path}/other", "--share_selection=2"),
            "share_selection=2", "indexer_types=['full', 'full', 'shared']", "leave the option out")
    refused(call(place, *short, "--stage=dense", f"--init_from={tmp_path}/dense", "--share_selection=2"),
            "share_selection=2", "no indexers", "warmup")
