"""A model that selects in two levels (--index_block, docs/LONG.md): off, it is what it was; caches and
decoding; what training reports. (T10): docs/TRAPS.md. Selection itself:
tests/test_blocks.py."""
import json
import math
import shutil

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

import evaluate
import generate
import indexer
import model as model_file
import sparse_attn
import train as train_file
from config import Config
from model import Transformer
from support import checkpoint
from tests.common import FLOAT32, assert_close, device_of, packed_batch, tiny_model
from tests.scripts import call, edit_json, metrics, refused, train
from tests.scripts import losses as losses_of
from tests.test_generate import cached, new_caches, random_tokens
from tools import recall

TWO_LEVELS = dict(index_block=4, index_candidates=16, index_exact_layers=0)
LENGTH = indexer.RECENT + 80  # of a sequence: some 20 blocks are ranked, of which 4 are read


def losses(model, batch):
    return model(*batch, index_loss=True)[1]


# ---- off, and as good as off ----

@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_enough_candidates_change_nothing(attention):
    """Logits, losses and gradients of one level, bit for bit."""
    model = tiny_model(attention=attention)
    batch = packed_batch(S=LENGTH)
    results = []
    for block, candidates in ((0, 0), (4, LENGTH)):
        model.config.index_block = block
        model.config.index_exact_layers = 0
        model.config.index_candidates = candidates
        logits, found = model(*batch, index_loss=True)
        model.zero_grad(set_to_none=True)
        (found["lm"] + found["kl"]).backward()
        results.append((logits, found, {name: p.grad for name, p in model.named_parameters()}))
    (logits, one, gradients), (again, two, others) = results
    assert two.pop("index_recall") == 1
    assert one.keys() == two.keys() == {"lm", "kl", "kl_uniform", "recall"}
    assert torch.equal(again, logits)
    for name in one:
        assert torch.equal(two[name], one[name]), name
    for name in gradients:
        assert torch.equal(others[name], gradients[name]), name


def test_few_candidates_change_the_model():
    """The model's tests below do not compare exact selection with itself."""
    model = tiny_model(**TWO_LEVELS)
    batch = packed_batch(S=LENGTH)
    with torch.no_grad():
        two = model(*batch, index_loss=True)
        model.config.index_block = 0
        assert not torch.equal(two[0], model(*batch)[0])
    assert two[1]["index_recall"] < 1


def test_first_layers_score_all_tokens():
    """With index_exact_layers=1: the first layer is that of one level, and does not count in the log."""
    model = tiny_model(num_hidden_layers=2, **TWO_LEVELS | dict(index_candidates=4))
    x = random_tokens("torch", 1, LENGTH)
    batch = packed_batch(S=LENGTH)[:2]  # one document
    selections = {}
    found = {}
    with torch.no_grad():
        for exact_layers in (0, 1, 2):
            model.config.index_exact_layers = exact_layers
            selections[exact_layers] = []
            model(x, selections=selections[exact_layers])
            found[exact_layers] = losses(model, batch)
        model.config.index_block = 0
        one_level = []
        model(x, selections=one_level)
    assert torch.equal(selections[1][0], one_level[0]) and not torch.equal(selections[0][0], one_level[0])
    assert not torch.equal(selections[1][1], one_level[1]) and torch.equal(selections[2][1], one_level[1])
    assert found[0]["index_recall"] != found[1]["index_recall"] < 1 and "index_recall" not in found[2]


def test_impossible_sizes_are_refused():
    for changes, message in ((dict(index_block=-1), "index_block=-1"), (dict(index_block=12), "power of two"),
                             (dict(index_block=128), "up to 64"),
                             (dict(index_candidates=-4), "index_candidates=-4"),
                             (dict(index_exact_layers=-1), "index_exact_layers=-1")):
        with pytest.raises(ValueError, match=message):
            Config(**changes).check()


def test_checkpoint_says_so_only_where_it_is_so(tmp_path):
    """A checkpoint of one level has the published keys alone; of two levels, it is loaded as it was."""
    tiny_model().save_pretrained(tmp_path / "one")
    tiny_model(**TWO_LEVELS).save_pretrained(tmp_path / "two")
    one = json.loads((tmp_path / "one" / "config.json").read_text())
    assert not {"index_block", "index_candidates", "index_exact_layers"} & one.keys()
    assert checkpoint.read_config(tmp_path / "one").index_block == 0
    loaded = Transformer.from_pretrained(tmp_path / "two")
    assert (loaded.config.index_block, loaded.config.index_candidates) == (4, 16)


# ---- causality, caches, decoding ----

@pytest.mark.parametrize("index_fp8", [False, True])
def test_no_token_sees_the_future_or_another_document(index_fp8):
    """(T10) Logits, exactly."""
    model = tiny_model(**TWO_LEVELS, index_fp8=index_fp8)
    idx, _, first = packed_batch(S=2 * LENGTH)
    start = int(first[-1, -1])
    with torch.no_grad():
        before = model(idx, first=first)[0]
        other = idx.clone()
        other[:, -9:] = (other[:, -9:] + 1) % 61
        after = model(other, first=first)[0]
        assert torch.equal(before[:, :-9], after[:, :-9]) and not torch.equal(before, after)
        other = idx.clone()
        other[-1, :start] = (other[-1, :start] + 1) % 61
        assert torch.equal(before[-1, start:], model(other, first=first)[0][-1, start:])


@pytest.mark.parametrize("index_fp8", [False, True])
@pytest.mark.parametrize("chunks", [[300] + [1] * 36, [61, 200, 70, 5], [LENGTH]], ids=str)
def test_cached_decoding_chunked_prefill_and_one_forward_agree(index_fp8, chunks):
    """(T25) As with one level."""
    model = tiny_model(**TWO_LEVELS, index_fp8=index_fp8).eval()
    x = random_tokens("torch", 2, LENGTH)
    caches = new_caches(model, 2, LENGTH + 9, index_fp8=index_fp8)
    with torch.no_grad():
        full = model(x)[0]
        assert_close(cached(model, x, chunks, caches), full, *FLOAT32)
        # the length read on the device, from a cache longer than what it holds, as under a CUDA graph
        last = torch.full((2, 1), LENGTH - 1, dtype=torch.int32)
        position = torch.tensor([LENGTH - 1])
        again = model(x[:, -1:], caches=caches, position=position, last=last)[0]
    assert_close(again, full[:, -1:], *FLOAT32)


def test_default_candidates_follow_the_capacity():
    """So a long prompt finds the same tokens, whatever its chunks, as the steps behind it."""
    model = tiny_model(index_block=4, max_position_embeddings=2**20).eval()
    caches = new_caches(model, 1, 3000)
    position = torch.tensor([0])
    found = [
        model.forward_state("torch", position[None], None, False, given, position, None).candidates
        for given in (caches, None)]
    assert found == [3000 // 32, 8 * 6]
    model.config.index_candidates = 20
    assert model.forward_state("torch", position[None], None, False, caches, position, None).candidates == 20


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_backends_decode_alike(fp8_cache):
    """A step by the kernels behind a prompt read by the reference."""
    pytest.importorskip("triton")
    device = device_of("triton")
    model = tiny_model("torch", **TWO_LEVELS, index_fp8=True).eval().to(device)
    x = torch.randint(0, 59, (2, LENGTH), device=device)
    logits = []
    for backend in ("torch", "triton"):
        model.backend = "torch"
        caches = new_caches(model, 2, LENGTH, index_fp8=True, fp8=fp8_cache)
        cached(model, x[:, :-1], [LENGTH - 1], caches)
        model.backend = backend
        position = torch.tensor([LENGTH - 1], device=device)
        with torch.no_grad():
            logits.append(model(x[:, -1:], caches=caches, position=position)[0])
    assert_close(logits[1], logits[0], *FLOAT32)


def test_backends_train_alike(monkeypatch):
    """All losses of a sparse step; few recent tokens, as the interpreter is slow."""
    monkeypatch.setattr(indexer, "RECENT", 10)
    pytest.importorskip("triton")
    device = device_of("triton")
    batch = [x.to(device) for x in packed_batch(B=1, S=36)[:2]]  # one document
    two_levels = dict(index_block=4, index_candidates=8, index_exact_layers=0)
    model = tiny_model("torch", num_hidden_layers=1, **two_levels).to(device)
    want = losses(model, batch)
    model.backend = "triton"
    got = losses(model, batch)
    assert want["index_recall"] < 1
    for name in want:
        assert_close(got[name][None], want[name][None], *FLOAT32, name)


class StepOfAGraph(generate.Decoder):
    """Steps that read lengths on the device, as a captured one does, whether or not one can be captured
    here."""

    def step(self, token, position, first):
        if not self.captures:
            self.compiled = True
        return super().step(token, position, first)


@pytest.mark.parametrize("backend", [
    "torch",
    pytest.param("triton", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="long"))])
def test_a_prompt_of_many_times_the_candidates(backend, monkeypatch):
    """(T25) 32 of 1500 tokens: the same continuation from FP8 caches whatever the chunks, and by steps that a
    CUDA graph can hold; with all tokens as candidates that of one level."""
    sizes = dict(index_block=16, index_candidates=32, index_exact_layers=1, num_hidden_layers=2)
    model = tiny_model(backend, index_fp8=True, **sizes).eval()
    prompt = random_tokens(backend, 1, 1500)

    def continuation(chunk, **sizes):
        for name, value in sizes.items():
            setattr(model.config, name, value)
        return model.generate(prompt, 12, temperature=0, chunk=chunk, fp8_cache=True)[0, -12:].tolist()

    want = continuation(1500)
    assert continuation(400) == want
    monkeypatch.setattr(generate, "Decoder", StepOfAGraph)
    assert continuation(1024) == want
    assert continuation(1024, index_candidates=1512) == continuation(1024, index_block=0) != want


# ---- learning ----

@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_recomputation_gives_the_same(attention):
    """(T21)"""
    model = tiny_model(attention=attention, **TWO_LEVELS)
    batch = packed_batch(S=LENGTH)
    gradients = []
    for model.recompute in (False, True):
        model.zero_grad(set_to_none=True)
        losses(model, batch)["kl"].backward()
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("offload", [False, True])
@pytest.mark.parametrize("changes,selecting", [
    ({}, 3), (dict(indexer_types=["full", "shared", "full"]), 2), (TWO_LEVELS, 3)],
    ids=["exact", "shared", "two levels"])
def test_recomputation_does_not_select_again(changes, selecting, offload, monkeypatch):
    """(T21) Nor does it attend to anything else: what each layer attended to in the forward it attends to in
    the backward. (Two levels select once more, of a few queries, for the metrics.)"""
    torch.manual_seed(0)
    model = tiny_model(attention="sparse", index_fp8=True, **changes)
    model.recompute = True
    model.offload = offload
    selected = []
    attended = []
    select = model_file.Scorer.select
    attend = sparse_attn.sparse_attention

    def selecting_once(scorer, *args):
        selected.append(scorer)
        return select(scorer, *args)

    def attending(q, latents, indices, *args):
        attended.append(indices.clone())
        return attend(q, latents, indices, *args)

    monkeypatch.setattr(model_file.Scorer, "select", selecting_once)
    monkeypatch.setattr(sparse_attn, "sparse_attention", attending)
    x, y, first = packed_batch(S=LENGTH if "index_block" in changes else 32)

    def selected_whole():
        return sum(scorer.q.shape[1] == x.shape[1] for scorer in selected)

    found = model(x, y, first, index_loss=True, logits_of=None)[1]
    assert selected_whole() == selecting and len(attended) == 3
    (found["lm"] + found["kl"]).backward()
    assert selected_whole() == selecting and len(attended) == 6
    for forward, backward in zip(attended[:3], reversed(attended[3:])):
        assert torch.equal(forward, backward)


class Host:
    """What was moved away of a tensor: neither it nor its memory."""

    def __init__(self, x):
        self.values = x.detach().cpu().numpy().copy()
        self.device = x.device


@pytest.mark.parametrize("changes", [{}, dict(indexer_types=["full", "shared", "full"])], ids=["", "shared"])
@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_offloaded_are_the_inputs_of_blocks_alone(attention, changes, monkeypatch):
    """(T21) Each once; nothing else keeps their memory after the forward; gradients are the same bits."""
    packed = []

    def moving(pin_memory):
        def pack(x):
            host = Host(x)
            if x.numel():  # checkpoint of torch before 2.13 saves a dummy, too
                packed.append(host)
            return host

        return torch.autograd.graph.saved_tensors_hooks(
            pack, lambda host: torch.from_numpy(host.values).to(host.device))

    torch.manual_seed(0)
    model = tiny_model(attention=attention, **changes)
    x, y, first = packed_batch()
    inputs = []
    memory = []

    def note(module, args):
        inputs.append(args[0].detach().clone())
        memory.append(StorageWeakRef(args[0].untyped_storage()))

    hooks = [block.register_forward_pre_hook(note) for block in model.model.layers]
    monkeypatch.setattr(model_file, "save_on_cpu", moving)
    gradients = []
    for model.recompute, model.offload in ((False, False), (True, True)):
        inputs.clear()
        memory.clear()
        found = model(x, y, first, index_loss=True, logits_of=None)[1]
        model.zero_grad(set_to_none=True)
        if model.offload:
            assert len(packed) == len(inputs) == 3 and all(storage.expired() for storage in memory)
            for host, h in zip(packed, inputs):
                assert torch.equal(torch.from_numpy(host.values), h)
            for hook in hooks:
                hook.remove()
        (found["lm"] + found["kl"]).backward()
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert torch.equal(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="memory of a GPU")
def test_offloading_frees_the_gpu():
    """Of every block's input, and gradients stay what they were; products on a GPU may round otherwise."""
    model = tiny_model("triton")
    x, y, first = packed_batch("triton", S=512)
    kept = []
    gradients = []
    for model.recompute, model.offload in ((True, False), (True, False), (True, True)):  # the first compiles
        model.zero_grad(set_to_none=True)
        found = model(x, y, first, index_loss=True, logits_of=None)[1]
        kept.append(torch.cuda.memory_allocated())
        (found["lm"] + found["kl"]).backward()
        gradients.append([p.grad.cpu() for p in model.parameters()])
        del found
    assert kept[1] - kept[2] >= 3 * x.numel() * model.config.hidden_size * 4
    for one, other in zip(*gradients[1:], strict=True):
        assert_close(other, one, *FLOAT32)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_compiled_training_is_eager_training(attention):
    """A layer in one graph: the same losses and gradients."""
    model = tiny_model(attention=attention, num_hidden_layers=1, **TWO_LEVELS)
    batch = packed_batch(S=LENGTH)
    results = []
    for compiles in (False, True):
        if compiles:
            model.compile_layers(backend="aot_eager", fullgraph=True)
        model.zero_grad(set_to_none=True)
        found = model(*batch, index_loss=True)[1]
        (found["lm"] + found["kl"]).backward()
        results.append((found, [p.grad for p in model.parameters() if p.grad is not None]))
    (want, gradients), (got, others) = results
    for name in want:
        assert_close(got[name][None], want[name][None], *FLOAT32, name)
    for one, other in zip(gradients, others, strict=True):
        assert_close(other, one, *FLOAT32)


def test_selection_recall():
    exact = torch.tensor([[[1, 4, 7], [0, 2, -1], [-1, -1, -1]]])
    found = torch.tensor([[[4, 5, 7], [0, 1, 2], [-1, -1, -1]]])
    assert torch.allclose(indexer.selection_recall(found, exact, 9), torch.tensor([[2 / 3, 1, 1]]))


def test_index_recall_is_of_what_the_layer_uses():
    """The share of exact selection that its selection holds, of the queries that training samples."""
    model = tiny_model(num_hidden_layers=1, **TWO_LEVELS)
    idx, targets, _ = packed_batch(S=LENGTH)
    two = []
    exact = []
    with torch.no_grad():
        found = model(idx, targets, index_loss=True, selections=two)[1]["index_recall"]
        model.config.index_block = 0
        model(idx, targets, selections=exact)
    rows = torch.linspace(0, LENGTH - 1, 16).long()
    shares = []
    for b in range(2):
        for row in rows.tolist():
            want = set(exact[0][b, row].tolist()) - {-1}
            shares.append(len(want & set(two[0][b, row].tolist())) / len(want))
    assert 0.3 < found.item() < 1
    assert abs(found.item() - sum(shares) / len(shares)) < 1e-6


def test_evaluation_sees_what_is_selected():
    """evaluate.watching records both levels' selections, and what exact selection would start from."""
    model = tiny_model(num_hidden_layers=2, **TWO_LEVELS)
    x = random_tokens("torch", 1, LENGTH)
    records = []
    chosen = []
    with torch.no_grad():
        with evaluate.watching(model, lambda *record: records.append(record)):
            model(x)
        model(x, selections=chosen)
    for (layer, selecting, attending), indices in zip(records, chosen, strict=True):
        assert torch.equal(attending.indices, indices)
        exact = indexer.select(*selecting)
        assert exact.shape == indices.shape and not torch.equal(exact, indices)


def test_recall_of_exact_selection():
    """tools/recall.py: all with enough candidates, what the definition finds with few."""
    model = tiny_model(num_hidden_layers=2)
    length = 3 * LENGTH  # most of it is not recent
    ids = random_tokens("torch", 1, length)
    rows = torch.tensor([length - 40, length - 1], device=ids.device)
    records = []
    with torch.no_grad(), evaluate.watching(model, lambda *record: records.append(record)):
        model(ids)
    enough, few = recall.measure(model, ids, (length, 8), 4, rows)
    for share, mass, _ in enough:
        assert (share == 1).all() and torch.allclose(mass, torch.ones(2))
    for (_, selecting, attending), (share, mass, by_distance) in zip(records, few, strict=True):
        two = indexer.select_by_blocks(*selecting, block=4, candidates=8)[0, rows].tolist()
        one = attending.indices[0, rows].tolist()
        expected = [len(set(a) & set(b)) / len(b) for a, b in zip(two, one)]
        assert share.tolist() == pytest.approx(expected)
        assert (share < 1).any() and mass.shape == share.shape
        assert by_distance.nan_to_num().amax() <= 1


# ---- train.py ----

def test_train_and_continue(place):
    """Options reach model, losses and log; a checkpoint of one level can go on with two."""
    options = (f"--block_size={LENGTH}", "--batch_size=1")
    code, _, err = train(place, "two-levels", *options, "--index_block=4", "--index_candidates=16",
                         "--index_exact_layers=0")
    assert code == 0, err
    for record in metrics(place / "two-levels"):
        learns = record["stage"] != "dense"
        assert ("index_recall" in record) == learns
        assert not learns or 0 < record["index_recall"] <= 1
    code, _, err = train(place, "one-level", "--stage=sparse", "--init_from=two-levels/warmup", *options,
                         "--index_block=0")
    assert code == 0, err
    assert "index_recall" not in metrics(place / "one-level")[0]


def test_train_offloads(place):
    """--recompute alone and with a value; the same losses whatever is kept; a run of before goes on."""
    logs = []
    options = {
        "--recompute=false": "false", "--recompute": "true", "--recompute=true": "true",
        "--recompute=offload": "offload"}
    for n, (option, value) in enumerate(options.items()):
        code, _, err = train(place, f"offload-{n}", "--stage=dense", option)
        assert code == 0, err
        run = json.loads((place / f"offload-{n}" / "run.json").read_text())
        assert run["options"]["recompute"] == value
        logs.append([record["loss"] for record in metrics(place / f"offload-{n}")])
    assert logs[0] == logs[1] == logs[2] == logs[3]
    for stored, value in ((True, "true"), (False, "false"), ("offload", "offload")):
        edit_json(place / "offload-0" / "run.json", lambda run: run["options"].update(recompute=stored))
        assert train_file.stored_options(place / "offload-0" / "run.json")["recompute"] == value


def test_train_extends_by_yarn(place, run):
    """To four times the context of the run, and longer than its model had a place for: as if config.json had
    said so."""
    short = ("--stage=sparse", "--block_size=128", "--batch_size=1")
    shutil.copytree(run[0], place / "to-extend")
    edit_json(place / "to-extend" / "warmup" / "config.json",
              lambda config: config.update(max_position_embeddings=40))
    code, out, err = train(place, "extended", *short, "--init_from=to-extend/warmup", "--yarn_factor=4")
    assert code == 0, err
    assert "from 32 to 128 tokens" in out
    config = checkpoint.read_config(place / "extended" / "sparse")
    yarn = {name: value for name, value in config.rope_scaling.items() if name not in ("type", "rope_type")}
    assert yarn == dict(
        factor=4, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=1, mscale_all_dim=1)
    assert config.max_position_embeddings == 128
    model = Transformer.from_pretrained(place / "extended" / "sparse")
    assert model.model.layers[0].self_attn.scale == pytest.approx(16**-0.5 * (0.1 * math.log(4) + 1) ** 2)

    edit_json(place / "to-extend" / "warmup" / "config.json", lambda values: values.update(
        max_position_embeddings=128, rope_scaling=yarn | dict(type="yarn")))
    code, _, err = train(place, "by-hand", *short, "--init_from=to-extend/warmup")
    assert code == 0, err
    assert losses_of(place / "by-hand") == losses_of(place / "extended")

    # its control starts from the same, and what it left goes on without the option
    code, _, err = call(place, "train.py", "--stage=control", "--out_dir=extended")
    assert code == 2 and "has rope_scaling" in err  # the checkpoint was changed by hand
    edit_json(place / "to-extend" / "warmup" / "config.json", lambda values: values.pop("rope_scaling"))
    code, _, err = call(place, "train.py", "--stage=control", "--out_dir=extended")
    assert code == 0, err
    assert checkpoint.read_config(place / "extended" / "control").rope_scaling == config.rope_scaling
    code, _, err = train(place, "further", *short, "--init_from=extended/sparse")
    assert code == 0, err
    refused(train(place, "never", *short, "--init_from=extended/sparse", "--yarn_factor=2"),
            "--yarn_factor=2", "rope_scaling", "leave the option out")


@pytest.mark.parametrize("factor", ["1", "0.5", "-2", "nan", "inf"])
def test_train_refuses_to_extend(place, run, factor):
    start = ("--stage=sparse", f"--init_from={run[0]}/warmup")
    refused(train(place, "never", *start, f"--yarn_factor={factor}"), "--yarn_factor=", "above 1")
    refused(train(place, "never", "--yarn_factor=2"), "--yarn_factor=2", "--init_from")


def test_train_refuses(place):
    refused(train(place, "never", "--recompute=blocks"), "--recompute")
    refused(train(place, "never", "--index_block=12"), "index_block=12", "power of two")
