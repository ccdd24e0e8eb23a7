"""evaluate.py against brute force on tiny models, and as a user runs it."""
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import data
import evaluate
import indexer
from config import Config
from model import Transformer
from parallel import Ranks
from support import cli

SCRIPT = Path(__file__).parent.parent / "evaluate.py"
SIZES = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16,
    index_topk=8, initializer_range=0.3)
B = 2
T = 40
K = 8
EDGES = evaluate.bucket_bounds(T)
EOT = 256


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    return Transformer(Config(**SIZES | sizes), "torch", index_fp8=False).eval()


def tokens_and_first(seed=1):
    """One row with a second document from 13 on, one that is a single document -> x, y, first (B,T)"""
    tokens = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(B, T, dtype=torch.int32)
    first[0, 13:] = 13
    return tokens[:, :-1], tokens[:, 1:], first


def watched(model, x, first):
    """-> per layer the SelectArguments and AttentionArguments that `watching` records."""
    seen = {}

    def record(layer, selecting, attending):
        seen[layer] = (selecting, attending)

    model.attention = "sparse"
    with torch.no_grad(), evaluate.watching(model, record):
        model(x, first=first)
    return [seen[layer] for layer in range(len(model.model.layers))]


# ---- buckets ----

def bucket_of(n):
    return 0 if n == 1 else (n - 1).bit_length()


def test_buckets():
    assert EDGES.tolist() == [1, 2, 4, 8, 16, 32, 64]
    assert evaluate.bucket_bounds(64).tolist() == EDGES.tolist()
    assert evaluate.bucket_bounds(1).tolist() == [1]
    n = torch.randint(1, T + 1, (3, 50))
    values = torch.rand(3, 50, dtype=torch.double)
    expected = torch.zeros(3, len(EDGES), dtype=torch.double)
    for i in range(3):
        for j in range(50):
            expected[i, bucket_of(n[i, j].item())] += values[i, j]
    assert torch.allclose(evaluate.by_bucket(values, n, EDGES), expected)


def test_an_empty_bucket_is_left_out():
    columns = evaluate.bucketed("n", torch.tensor([1, 3, 4, 3]), dict(x=torch.tensor([5.0, 1, 2, 6])))
    assert columns == {"n": [1, 4, "all"], "count": [1, 3, 4], "x": [5.0, 3.0, 3.5]}


# ---- what a layer selects ----

def entropy_of(weights):
    total = sum(weights)
    return -sum(weight / total * math.log(weight / total) for weight in weights)


class Unabsorbed:
    """A layer's attention and indexer from its own input, in MHA mode and float64, a query and a head at a
    time."""

    def __init__(self, attention, h, state, first):
        with torch.no_grad():
            q_latent = attention.q_a_layernorm(attention.q_a_proj(h))
            q_nope, q_rope = attention.q_b_proj(q_latent).unflatten(-1, (2, 16)).split([8, 8], -1)
            self.q = torch.cat((q_nope, state.rope(q_rope, True)), -1).double()  # (B, T, H, 16)
            c_kv, k_rope = attention.kv_a_proj_with_mqa(h).split([16, 8], -1)
            k_rope = state.rope(k_rope[:, :, None], True)[:, :, 0]
            k, _ = attention.expand(torch.cat((attention.kv_a_layernorm(c_kv), k_rope), -1))
            self.k = k.double()  # (B, T, H, 16)
            index = attention.indexer(h, q_latent, state.rope)
            self.q_index, self.k_index, self.w = [x.double() for x in index]
        self.first = first

    def visible(self, b, t):
        return range(self.first[b, t], t + 1)

    def mass(self, b, t):
        """-> {key: probability}, the mean over both heads."""
        heads = []
        for j in range(2):
            logits = torch.stack([self.q[b, t, j] @ self.k[b, s, j] for s in self.visible(b, t)]) * 16**-0.5
            heads.append(torch.softmax(logits, 0))
        return dict(zip(self.visible(b, t), (sum(heads) / 2).tolist()))

    def scores(self, b, t):
        """-> {key: index score}"""
        scores = {}
        for s in self.visible(b, t):
            dots = [max(self.q_index[b, t, j] @ self.k_index[b, s], 0) for j in range(2)]
            scores[s] = sum(self.w[b, t, j] * dots[j] for j in range(2)).item()
        return scores

    def alike(self, b, t):
        """Do the 8 queries up to t see more than K tokens of one document?"""
        queries = range(t - 7, t + 1)
        return all(s - self.first[b, s] >= K and self.first[b, s] == self.first[b, t] for s in queries)


@pytest.mark.parametrize("slices", [indexer.SLICE, 200])
def test_layer_statistics_are_what_a_loop_over_queries_finds(monkeypatch, slices):
    model = tiny()
    x, _, first = tokens_and_first()
    rows = torch.tensor([39, 28, 27, 11, 15, 14, 3])
    inputs = []

    def keep(module, args, out):
        h, state, *_ = args
        inputs.append((Unabsorbed(module, h, state, first), out[1].indices))

    for block in model.model.layers:
        block.self_attn.register_forward_hook(keep)
    seen = watched(model, x, first)
    monkeypatch.setattr(indexer, "SLICE", slices)
    for (layer, indices), (selecting, attending) in zip(inputs, seen):
        found = evaluate.layer_statistics(selecting, attending, rows, EDGES)
        for b in range(B):
            for i, t in enumerate(rows.tolist()):
                check_query(layer, indices[b].tolist(), b, t, [measure[b, i] for measure in found])


def check_query(layer, indices, b, t, found):
    """One query against what a loop over its keys finds."""
    recall, entropies, distances, neighbours = found
    visible = layer.visible(b, t)
    p = layer.mass(b, t)
    scores = layer.scores(b, t)
    chosen = [s for s in indices[t] if s >= 0]
    assert set(chosen) == set(sorted(visible, key=lambda s: (-scores[s], s))[:K])

    expected = [
        sum(p[s] for s in chosen),
        sum(p[s] for s in visible if s > t - K),
        sum(sorted(p.values())[-K:])]
    assert recall.tolist() == pytest.approx(expected, abs=1e-5)

    expected = [
        entropy_of([math.exp(score) for score in scores.values()]),
        entropy_of([math.exp(scores[s]) for s in chosen]),
        entropy_of(list(p.values()))]
    assert entropies.tolist() == pytest.approx(expected, abs=1e-4)

    expected = np.zeros((2, len(EDGES)))
    for s in visible:
        expected[0, bucket_of(t - s + 1)] += (s in chosen) / len(chosen)
        expected[1, bucket_of(t - s + 1)] += p[s]
    assert np.allclose(distances, expected, atol=1e-5)

    expected = [math.nan, math.nan]
    if layer.alike(b, t):
        sets = [set(indices[s]) for s in range(t - 7, t + 1)]
        expected = [len(sets[-1] & sets[-2]) / K, len(set.union(*sets)) / K]
    assert neighbours.tolist() == pytest.approx(expected, nan_ok=True), (b, t)


def train_indexers(model, x, first, steps):
    """The warm-up stage on one batch."""
    optimizer = torch.optim.Adam(model.indexer_parameters(), 1e-2)
    model.attention = "dense"
    for _ in range(steps):
        optimizer.zero_grad()
        model(x, first=first, index_loss=True)[1]["kl"].backward()
        optimizer.step()


def test_recall_between_random_and_oracle():
    """Random < a trained indexer <= oracle; selecting the oracle's tokens gives the oracle's recall,
    selecting everything gives 1."""
    model = tiny(seed=3)
    x, _, first = tokens_and_first()
    rows = torch.arange(25, T)
    train_indexers(model, x, first, steps=100)
    position = torch.arange(T)
    seen = (position >= first[..., None]) & (position <= position[:, None])  # (B, T, T)
    for selecting, attending in watched(model, x, first):

        def recall(indices, topk=K):
            statistics = evaluate.layer_statistics(
                selecting._replace(topk=topk), attending._replace(indices=indices), rows, EDGES)
            return statistics.recall  # (B, R, 3)

        ours, last_k, oracle = recall(attending.indices).unbind(-1)
        assert (oracle + 1e-6 >= ours).all() and (oracle + 1e-6 >= last_k).all()
        assert (oracle <= 1 + 1e-5).all()

        drawn = torch.rand(B, T, T, generator=torch.Generator().manual_seed(0)).masked_fill(~seen, -1).topk(K)
        random = recall(drawn.indices.masked_fill(drawn.values < 0, -1).int())[..., 0]
        assert random.mean() + 0.05 < ours.mean()

        p = evaluate.attention_mass(attending.q, attending.latents, attending.scale, seen)  # (B, T, T)
        assert torch.allclose(recall(p.topk(K).indices.int())[..., 0], oracle, atol=1e-5)

        everything = position.expand(B, T, T).masked_fill(~seen, -1).int()
        assert torch.allclose(recall(everything, topk=T), torch.ones(()), atol=1e-5)


def test_uniform_attention_has_known_values():
    """q = 0: every baseline holds k / visible of the mass, and entropy is log(visible)."""
    model = tiny()
    x, _, first = tokens_and_first()
    rows = torch.tensor([30, 39])
    selecting, attending = watched(model, x, first)[0]
    selecting = selecting._replace(w=torch.zeros_like(selecting.w))
    attending = attending._replace(q=torch.zeros_like(attending.q))
    found = evaluate.layer_statistics(selecting, attending, rows, EDGES)
    sight = (rows - first[:, rows] + 1).float()  # (B, R)
    log_k = torch.full_like(sight, math.log(K))
    assert torch.allclose(found.recall, (K / sight)[..., None])
    assert torch.allclose(found.distance.sum(-1), torch.ones(()))
    assert torch.allclose(found.entropy, torch.stack((sight.log(), log_k, sight.log()), -1))


# ---- validation text ----

@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_predict_is_the_models_loss(monkeypatch, attention):
    model = tiny()
    x, y, first = tokens_and_first()
    with torch.no_grad():
        nats, right = evaluate.predict(model, x, y, first, attention, "float32")
        model.attention = attention
        logits, losses = model(x, y, first)
        assert nats.mean().item() == pytest.approx(losses["lm"].item(), rel=1e-5)
        expected = F.cross_entropy(logits.transpose(1, 2), y, reduction="none")
        assert torch.allclose(nats, expected, atol=1e-5) and torch.equal(right, logits.argmax(-1) == y)

        # only the last tokens, sliced
        monkeypatch.setattr(indexer, "SLICE", 3 * B * 257)
        last_nats, last_right = evaluate.predict(model, x, y[:, -5:], first, attention, "float32")
    assert torch.allclose(last_nats, nats[:, -5:], atol=1e-5) and torch.equal(last_right, right[:, -5:])


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_the_model_stays_as_it_was(attention):
    """No hook stays, and its own attention does."""
    model = tiny()
    x, y, first = tokens_and_first()
    watched(model, x, first)
    own = "dense" if attention == "sparse" else "sparse"
    model.attention = own
    evaluate.predict(model, x, y, first, attention, "float32")
    assert model.attention == own
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def text_tokens(n=4000):
    """(n,) uint16: documents of ten different characters, some as long as a window, one of 30, two long
    ones."""
    random = np.random.RandomState(0)
    tokens = random.choice(np.frombuffer(b"abcdefgh \n", np.uint8), n).astype(np.uint16)
    tokens[list(range(40, 1500, 43)) + [1530, 2600, n - 1]] = EOT
    return tokens


OPTIONS = SimpleNamespace(block_size=T, batch_size=3, batches=4, rows=6, seed=5, dtype="float32")


@pytest.mark.parametrize("kinds", [None, ["full", "shared"]])
def test_measure_text(kinds):
    model = tiny(indexer_types=kinds)
    batches = data.Batches(text_tokens(), T, 3, EOT)
    with torch.no_grad():
        measures = evaluate.measure_text(model, batches, OPTIONS, Ranks(torch.device("cpu")))
        for attention, nats in measures.nats.items():  # their mean is the model's loss on train.py's batches
            model.attention = attention
            losses = []
            for number in range(4):
                x, y, first = batches.batch(number)
                losses.append(model(x, y, first)[1]["lm"].item())
            assert nats.mean().item() == pytest.approx(np.mean(losses), rel=1e-5)
    assert measures.sight.min() == 1 and measures.row_sight.min() > K and len(measures.row_sight) <= 3 * 4 * 6
    for layer in measures.layers:
        assert all(len(measure) == len(measures.row_sight) for measure in layer)

    results = evaluate.summarise(measures)
    loss = results["loss"]
    assert loss["in sight"] == [1, 2, 4, 8, 16, 32, 64, "all"] and loss["count"][-1] == 3 * 4 * T
    weighted = sum(n * mean for n, mean in zip(loss["count"][:-1], loss["dense"]))
    assert weighted / loss["count"][-1] == pytest.approx(loss["dense"][-1])
    for edge, difference in zip(loss["in sight"][:-1], loss["sparse - dense"]):
        assert (abs(difference) < 1e-5) == (edge <= K)

    by_sight = results["recall"]
    by_layer = results["layers"]
    assert by_layer["layer"] == [0, 1, "all"]
    for name in evaluate.BASELINES:
        assert by_sight[name][-1] == pytest.approx(by_layer[name][-1], rel=1e-4)
    assert all(0 <= share <= 1 for share in by_layer["overlap"])
    assert all(1 <= share <= 8 for share in by_layer["union/k"])
    for name, shares in results["distances"].items():
        assert name == "back" or sum(shares) == pytest.approx(1, rel=1e-4)


def test_only_queries_that_choose_are_measured():
    """All that see more than K tokens, if as many are asked for; the loss is of every token."""
    batches = data.Batches(text_tokens(), T, 3, EOT)
    every_row = SimpleNamespace(**vars(OPTIONS) | dict(rows=T, batches=2))
    with torch.no_grad():
        measures = evaluate.measure_text(tiny(), batches, every_row, Ranks(torch.device("cpu")))
    sights = []
    for number in range(2):
        first = batches.batch(number)[2].tolist()
        sights += [t - first[b][t] + 1 for b in range(3) for t in range(T)]
    assert measures.sight.tolist() == sights and K in sights
    assert sorted(measures.row_sight.tolist()) == sorted(sight for sight in sights if sight > K)


# ---- copying ----

def test_a_plot_of_zeros(tmp_path):
    """Nothing was copied at any distance: the axis has a length all the same."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        evaluate.plot(dict(distance=[32, 64], sparse=[0.0, 0.0]), ["sparse"], tmp_path / "copy.png", "share",
                      "distance")
    assert (tmp_path / "copy.png").is_file()


def test_copy_task():
    tokens = text_tokens()
    length, alphabet, samples = evaluate.copy_task(tokens, EOT, 128, 6, seed=1)
    assert (length, alphabet, list(samples)) == (32, 10, [32, 64, 97])
    again = evaluate.copy_task(tokens, EOT, 128, 6, seed=1)[2]
    other = evaluate.copy_task(tokens, EOT, 128, 6, seed=2)[2]
    text = tokens[tokens != EOT].tobytes()
    for distance, x in samples.items():
        assert torch.equal(x, again[distance]) and (x != other[distance]).any()
        assert x.shape == (6, 129) and (x != EOT).all() and torch.equal(x[:, -32:], samples[32][:, -32:])
        begin = 129 - 32 - distance
        for row in x.numpy().astype(np.uint16):
            string = row[-32:].tobytes()
            assert row[begin:begin + 32].tobytes() == string and row.tobytes().count(string) == 2
            assert row[:begin].tobytes() in text and row[begin + 32:-32].tobytes() in text


def test_accuracy_of_copies(monkeypatch):
    """A model that continues as after the last occurrence of the 8 tokens before copies everything; one that
    looks back 70 tokens fails where the string is farther."""
    length, _, samples = evaluate.copy_task(text_tokens(), EOT, 128, 6, seed=1)

    def lookup(model, x, y, first, attention, dtype):
        reach = 70 if attention == "sparse" else x.shape[1]
        guess = torch.zeros_like(y)
        for b, row in enumerate(x.tolist()):
            for i in range(y.shape[1]):
                t = x.shape[1] - y.shape[1] + i  # row[:t + 1] is known
                for s in range(t - 1, max(7, t - reach), -1):
                    if row[s - 7:s + 1] == row[t - 7:t + 1]:
                        guess[b, i] = row[s + 1]
                        break
        return None, guess == y

    monkeypatch.setattr(evaluate, "predict", lookup)
    accuracy = evaluate.measure_copies(None, samples, length, OPTIONS, Ranks(torch.device("cpu")))
    assert accuracy == dict(dense=[1, 1, 1], sparse=[1, 1, 0])


# ---- the script ----

@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder as a user has it: text, an untrained run `out` of context 48, and checkpoints without a run,
    without an indexer, and of too small a vocabulary."""
    folder = tmp_path_factory.mktemp("evaluate")
    lines = [f"line {i}: the square of {i % 97} is {(i % 97) ** 2}\n" for i in range(1000)]
    (folder / "text.txt").write_text("".join(lines))
    for name in ("out/sparse", "published"):
        tiny(max_position_embeddings=64).save_pretrained(folder / name, "bytes")
    tiny(index_topk=0, model_type="deepseek_v3").save_pretrained(folder / "no-indexer", "bytes")
    tiny(vocab_size=100).save_pretrained(folder / "small-vocabulary", "bytes")
    options = dict(data="text.txt", tokenizer="bytes", block_size=48, batch_size=3, index_fp8=False)
    (folder / "out" / "run.json").write_text(json.dumps(dict(options=options)))
    os.makedirs(folder / "documents")
    for i in range(100):
        (folder / "documents" / f"{i}.txt").write_text(f"no. {i}")
    (folder / "a-file").write_text("")
    return folder


@pytest.fixture
def inside(place, monkeypatch):
    monkeypatch.chdir(place)
    monkeypatch.setenv("DSA_DATA_DIR", str(place / "cache"))
    return place


def call(monkeypatch, capsys, *args):
    """The script in this process -> exit code, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *args])
    with pytest.raises(SystemExit) as end:
        cli.run(evaluate.main)
    return end.value.code, *capsys.readouterr()


def refuse_constant(name):
    pytest.fail(f"{name} is no JSON")


def test_script(inside, monkeypatch, capsys):
    small = ("--batches=2", "--copies=4", "--device=cpu")
    run = subprocess.run([sys.executable, str(SCRIPT), *small], text=True, capture_output=True, timeout=300)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    for text in ("2 layers, top-k 8, selector indexer, context 48", "in sight", "last k", "oracle",
                 "H(indexer)", "union/k", "tokens back", "chance"):
        assert text in run.stdout

    folder = inside / "out" / "evaluation-sparse"
    plots = ["copy.png", "distances.png", "loss.png", "recall.png"]
    assert sorted(path.name for path in folder.iterdir()) == sorted([*plots, "evaluation.json"])
    assert all((folder / name).read_bytes()[:4] == b"\x89PNG" for name in plots)
    beside = sorted(path.name for path in (inside / "out").iterdir())
    assert beside == ["evaluation-sparse", "run.json", "sparse"]
    results = json.loads((folder / "evaluation.json").read_text(), parse_constant=refuse_constant)
    assert results["options"]["block_size"] == 48 and results["options"]["index_fp8"] is False
    assert results["loss"]["count"][-1] == 2 * 3 * 48
    assert results["copy"]["distance"] == [16, 32, 37] and results["copy_task"]["length"] == 12
    assert {"commit", "torch", "device"} <= results.keys()

    # once more over it: the same numbers, and what else lies there stays
    (folder / "mine.txt").write_text("kept")
    code, _, err = call(monkeypatch, capsys, *small, "--out_dir=out/evaluation-sparse")
    again = json.loads((folder / "evaluation.json").read_text())
    assert code == 0, err
    for name in ("loss", "recall", "layers", "distances", "copy"):
        assert again[name] == results[name]
    assert (folder / "mine.txt").exists() and not list(inside.rglob("*.part"))


def test_defaults_without_a_run(inside):
    options, _ = evaluate.resolve(["--checkpoint=published"])
    assert (options.data, options.block_size, options.batch_size) == ("python", 32, 8)
    assert (options.index_fp8, options.tokenizer) == (True, "bytes")
    assert options.out_dir == str(inside / "evaluation-published")


def test_out_dir_may_be_deep_or_the_current_folder(inside, monkeypatch, capsys):
    small = ("--batches=1", "--copies=2")
    code, _, err = call(monkeypatch, capsys, "--checkpoint=published", "--data=text.txt", *small,
                        "--dtype=bfloat16", "--out_dir=new/deep")
    assert code == 0 and (inside / "new" / "deep" / "evaluation.json").exists(), err
    monkeypatch.chdir(inside / "new")
    code, _, err = call(monkeypatch, capsys, "--checkpoint=../published", "--data=../text.txt", *small,
                        "--out_dir=.")
    assert code == 0 and (inside / "new" / "evaluation.json").exists(), err


BAD = [
    ("--checkpoint=nowhere", "nowhere"),
    ("--checkpoint=no-indexer", "has no indexer (index_topk=0); train one"),
    ("--checkpoint=small-vocabulary", "--tokenizer=bytes has 257 tokens, the checkpoint only 100"),
    ("--block_size=65", "--block_size=65: longer than the model's max_position_embeddings=64"),
    ("--block_size=8", "--block_size=8: not longer than index_topk=8"),
    ("--block_size=-1", "--block_size=-1: must be at least"),
    ("--batches=0", "--batches=0: must be at least 1"),
    ("--data=nowhere.txt", "--data=nowhere.txt: no such file or folder"),
    ("--data=documents --block_size=16", "no document goes beyond index_topk=8"),
    ("--tokenizer=nobody", "unknown tokenizer"),
    ("--device=cuda:77", "--device=cuda:77: not available"),
    ("--out_dir=a-file", "--out_dir=a-file: cannot write"),
    ("--out_dir=a-file/below", "cannot write to"),
    ("--bloc_size=3", "did you mean --block_size"),
    ("--batches=two", "invalid int value: 'two'"),
]


@pytest.mark.parametrize("options,message", BAD, ids=[options for options, _ in BAD])
def test_bad_input(inside, monkeypatch, capsys, options, message):
    before = {path for path in inside.rglob("*") if "cache" not in path.parts}
    code, out, err = call(monkeypatch, capsys, "--data=text.txt", *options.split())
    assert code == 2 and message in err and err.count("\n") == 1 and not out, (out, err)
    assert {path for path in inside.rglob("*") if "cache" not in path.parts} == before


def test_bad_input_as_a_subprocess(inside):
    run = subprocess.run(
        [sys.executable, str(SCRIPT), "--checkpoint=nowhere"], text=True, capture_output=True, timeout=300)
    assert run.returncode == 2 and run.stderr.startswith("evaluate.py: ") and run.stderr.count("\n") == 1
