"""evaluate.py against brute force on tiny models, and as a user runs it."""
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from support import cli
import data
import evaluate
import indexer
from config import Config
from model import Transformer

HERE = Path(__file__).parent
SIZES = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8,
             qk_rope_head_dim=8, v_head_dim=8, index_n_heads=2, index_head_dim=16, index_topk=8, initializer_range=0.3)
B, T, K = 2, 40, 8
EDGES = evaluate.bounds(T)


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def tiny(seed=0, **sizes):
    torch.manual_seed(seed)
    return Transformer(Config(**SIZES | sizes), "torch", index_fp8=False).eval()


def tokens_and_first(seed=1):
    """One row with a second document from 13 on, one that is a single document."""
    x = torch.randint(256, (B, T + 1), generator=torch.Generator().manual_seed(seed))
    first = torch.zeros(B, T, dtype=torch.int32)
    first[0, 13:] = 13
    return x[:, :-1], x[:, 1:], first


def watched(model, x, first):
    """-> per layer (index, attention) as `watching` records them."""
    seen = {}
    with torch.no_grad(), evaluate.watching(model, lambda layer, index, attention: seen.update({layer: (list(index), attention)})):
        model.attention = "sparse"
        model(x, first=first)
    return [seen[layer] for layer in range(len(model.model.layers))]


def bucket_of(n):
    return 0 if n == 1 else (n - 1).bit_length()


def test_buckets():
    assert EDGES.tolist() == [1, 2, 4, 8, 16, 32, 64] and evaluate.bounds(64).tolist() == EDGES.tolist() and evaluate.bounds(1).tolist() == [1]
    n = torch.randint(1, T + 1, (3, 50))
    values = torch.rand(3, 50, dtype=torch.double)
    expected = torch.zeros(3, len(EDGES), dtype=torch.double)
    for i in range(3):
        for j in range(50):
            expected[i, bucket_of(n[i, j].item())] += values[i, j]
    assert torch.allclose(evaluate.by_bucket(values, n, EDGES), expected)
    columns = evaluate.bucketed("n", torch.tensor([1, 3, 4, 3]), dict(x=torch.tensor([5.0, 1, 2, 6])))
    assert columns == {"n": [1, 4, "all"], "count": [1, 3, 4], "x": [5.0, 3.0, 3.5]}  # the empty bucket 2 is left out


@pytest.mark.parametrize("slices", [indexer.SLICE, 200])
def test_layer_statistics_are_what_a_loop_over_queries_finds(monkeypatch, slices):
    """From the layer's own input, unabsorbed (MHA mode), one query and one head at a time, in float64."""
    model = tiny()
    (x, _, first), inputs, rows = tokens_and_first(), [], torch.tensor([39, 28, 27, 11, 15, 14, 3])
    for block in model.model.layers:
        block.self_attn.register_forward_hook(lambda module, args, out: inputs.append((module, *args[:2], out[1])))
    seen = watched(model, x, first)
    monkeypatch.setattr(indexer, "SLICE", slices)
    for (a, h, rope, indices), (index, attention) in zip(inputs, seen):
        recall, entropies, distances, near = evaluate.layer_statistics(index, attention, rows, EDGES)
        with torch.no_grad():
            latent = a.q_a_layernorm(a.q_a_proj(h))
            q = a.q_b_proj(latent).unflatten(-1, (2, 16))
            q = torch.cat((q[..., :8], rope(q[..., 8:], True)), -1).double()
            c, r = a.kv_a_proj_with_mqa(h).split([16, 8], -1)
            k = a.expand(torch.cat((a.kv_a_layernorm(c), rope(r[:, :, None], True)[:, :, 0]), -1))[0].double()
            qi, ki, w = (t.double() for t in a.indexer(h, latent, rope))
        for b in range(B):
            for i, t in enumerate(rows.tolist()):
                visible = range(first[b, t], t + 1)
                p = sum(torch.softmax(torch.stack([q[b, t, j] @ k[b, s, j] for s in visible]) * 16**-0.5, 0) for j in range(2)) / 2
                p = dict(zip(visible, p.tolist()))
                scores = {s: sum(w[b, t, j] * max(qi[b, t, j] @ ki[b, s], 0) for j in range(2)).item() for s in visible}
                chosen = [s for s in indices[b, t].tolist() if s >= 0]
                assert set(chosen) == set(sorted(visible, key=lambda s: (-scores[s], s))[:K])
                expected = [sum(p[s] for s in chosen), sum(p[s] for s in visible if s > t - K), sum(sorted(p.values())[-K:])]
                assert recall[b, i].tolist() == pytest.approx(expected, abs=1e-5)

                def entropy(weights):
                    return -sum(v / sum(weights) * math.log(v / sum(weights)) for v in weights)
                expected = [entropy([math.exp(v) for v in scores.values()]), entropy([math.exp(scores[s]) for s in chosen]), entropy(list(p.values()))]
                assert entropies[b, i].tolist() == pytest.approx(expected, abs=1e-4)
                expected = np.zeros((2, len(EDGES)))
                for s in visible:
                    expected[0, bucket_of(t - s + 1)] += (s in chosen) / len(chosen)
                    expected[1, bucket_of(t - s + 1)] += p[s]
                assert np.allclose(distances[b, i], expected, atol=1e-5)
                sets = [set(indices[b, s].tolist()) for s in range(t - 7, t + 1)]
                expected = [len(sets[-1] & sets[-2]) / K, len(set.union(*sets)) / K]
                if any(s - first[b, s] < K or first[b, s] != first[b, t] for s in range(t - 7, t + 1)):
                    expected = [math.nan, math.nan]
                assert near[b, i].tolist() == pytest.approx(expected, nan_ok=True), (b, t)


def test_recall_between_random_and_oracle():
    """Random < a trained indexer <= oracle; selecting the oracle's tokens gives the oracle's recall, selecting everything gives 1."""
    model = tiny(seed=3)
    x, _, first = tokens_and_first()
    rows = torch.arange(25, T)
    optimizer = torch.optim.Adam(model.indexer_parameters(), 1e-2)
    model.attention = "dense"
    for _ in range(400):
        optimizer.zero_grad()
        model(x, first=first, index_loss=True)[1]["kl"].backward()
        optimizer.step()
    for index, (q, latents, indices, *rest) in watched(model, x, first):
        select = lambda chosen: evaluate.layer_statistics(index, (q, latents, chosen, *rest), rows, EDGES)[0]
        recall = select(indices)
        oracle = recall[..., 2]
        assert (oracle + 1e-6 >= recall[..., 0]).all() and (oracle + 1e-6 >= recall[..., 1]).all() and (oracle <= 1 + 1e-5).all()
        span = torch.arange(T) - first[..., None]
        seen = (span >= 0) & (torch.arange(T) <= torch.arange(T)[:, None])
        drawn = torch.rand(B, T, T, generator=torch.Generator().manual_seed(0)).masked_fill(~seen, -1).topk(K)
        random = select(drawn.indices.masked_fill(drawn.values < 0, -1).int())[..., 0]
        assert random.mean() + 0.05 < recall[..., 0].mean()
        p = torch.softmax((torch.einsum("bshd,btd->bsht", q, latents) * rest[0]).masked_fill(~seen[:, :, None], float("-inf")), -1).mean(2)
        assert torch.allclose(select(p.topk(K).indices.int())[..., 0], oracle, atol=1e-5)
        index[3] = T
        everything = torch.arange(T).expand(B, T, T).masked_fill(~seen, -1).int()
        assert torch.allclose(select(everything), torch.ones(()), atol=1e-5)


def test_uniform_attention_has_known_values():
    """q = 0: every yardstick holds k / visible of the mass, and entropy is log(visible)."""
    model = tiny()
    x, _, first = tokens_and_first()
    rows = torch.tensor([30, 39])
    index, (q, *rest) = watched(model, x, first)[0]
    index[2] = torch.zeros_like(index[2])
    recall, entropies, distances, _ = evaluate.layer_statistics(index, (torch.zeros_like(q), *rest), rows, EDGES)
    sight = (rows - first[:, rows] + 1).float()
    assert torch.allclose(recall, (K / sight)[..., None]) and torch.allclose(distances.sum(-1), torch.ones(()))
    assert torch.allclose(entropies, torch.stack((sight.log(), torch.full_like(sight, math.log(K)), sight.log()), -1))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_predict_is_the_models_loss(monkeypatch, attention):
    model = tiny()
    x, y, first = tokens_and_first()
    with torch.no_grad():
        nats, right = evaluate.predict(model, x, y, first, attention, "float32")
        logits, losses = model(x, y, first)
        assert model.attention == attention and nats.mean().item() == pytest.approx(losses["lm"].item(), rel=1e-5)
        assert torch.allclose(nats, F.cross_entropy(logits.transpose(1, 2), y, reduction="none"), atol=1e-5) and (right == (logits.argmax(-1) == y)).all()
        monkeypatch.setattr(indexer, "SLICE", 3 * B * 257)
        part = evaluate.predict(model, x, y[:, -5:], first, attention, "float32")
    assert torch.allclose(part[0], nats[:, -5:], atol=1e-5) and (part[1] == right[:, -5:]).all()
    assert not model.model["norm"]._forward_hooks and not model.model.layers[0].self_attn._forward_pre_hooks


def text_tokens(n=4000):
    random = np.random.RandomState(0)
    tokens = random.choice(np.frombuffer(b"abcdefgh \n", np.uint8), n).astype(np.uint16)
    tokens[[1500, 1530, 2600, n - 1]] = 256
    return tokens


class Settings:
    block_size, batch_size, batches, rows, seed, dtype = T, 3, 4, 6, 5, "float32"


@pytest.mark.parametrize("kinds", [None, ["full", "shared"]])
def test_measure_text(kinds):
    model = tiny(indexer_types=kinds)
    batches = data.Batches(text_tokens(), T, 3, 256)
    with torch.no_grad():
        nats, sight, row_sight, layers = evaluate.measure_text(model, batches, Settings, torch.device("cpu"))
        for attention in nats:  # the average over buckets is the model's loss, and so is the average over train.py's batches
            model.attention = attention
            losses = [model(x, y, first)[1]["lm"].item() for x, y, first in map(batches.batch, range(4))]
            assert nats[attention].mean().item() == pytest.approx(np.mean(losses), rel=1e-5)
    results = evaluate.summarise(nats, sight, row_sight, layers)
    table = results["loss"]
    assert sum(n * v for n, v in zip(table["count"][:-1], table["dense"])) / table["count"][-1] == pytest.approx(table["dense"][-1])
    assert table["in sight"] == [1, 2, 4, 8, 16, 32, 64, "all"] and table["count"][-1] == 3 * 4 * T and sight.min() == 1
    for edge, difference in zip(table["in sight"][:-1], table["sparse - dense"]):
        assert (abs(difference) < 1e-5) == (edge <= K)
    assert len(row_sight) <= 3 * 4 * 6 and row_sight.min() > K and all(t.shape[0] == len(row_sight) for layer in layers for t in layer)
    by_sight, by_layer = results["recall"], results["layers"]
    for name in evaluate.YARDSTICKS:
        assert by_sight[name][-1] == pytest.approx(by_layer[name][-1], rel=1e-4) and by_layer["layer"] == [0, 1, "all"]
    assert all(0 <= v <= 1 for v in by_layer["overlap"]) and all(1 <= v <= 8 for v in by_layer["union/k"])
    assert all(sum(values) == pytest.approx(1, rel=1e-4) for name, values in results["distances"].items() if name != "back")


def test_copy_task_and_its_accuracy(monkeypatch):
    tokens = text_tokens()
    length, alphabet, samples = evaluate.copy_task(tokens, 256, 128, 6, seed=1)
    assert (length, alphabet, list(samples)) == (32, 10, [32, 64, 97])
    assert all((samples[d] == evaluate.copy_task(tokens, 256, 128, 6, seed=1)[2][d]).all() for d in samples)
    assert (samples[32] != evaluate.copy_task(tokens, 256, 128, 6, seed=2)[2][32]).any()
    text = tokens[tokens != 256].tobytes()
    for distance, x in samples.items():
        assert x.shape == (6, 129) and (x != 256).all() and (x[:, -32:] == samples[32][:, -32:]).all()
        begin = 129 - 32 - distance
        assert (x[:, begin:begin + 32] == x[:, -32:]).all()
        for row in x.numpy().astype(np.uint16):
            assert row[:begin].tobytes() in text and row[begin + 32:-32].tobytes() in text
            string = row[-32:].tobytes()
            assert row.tobytes().count(string) == 2

    def lookup(model, x, y, first, attention, dtype):
        """Argmax of a model that continues as after the last occurrence of the 8 tokens before (dense), or that only looks back 70 tokens (sparse)."""
        guess = torch.zeros_like(y)
        for b, row in enumerate(x.tolist()):
            for i in range(y.shape[1]):
                t = x.shape[1] - y.shape[1] + i  # row[:t + 1] is known
                for s in range(t - 1, max(7, t - 70 if attention == "sparse" else 0), -1):
                    if row[s - 7:s + 1] == row[t - 7:t + 1]:
                        guess[b, i] = row[s + 1]
                        break
        return None, guess == y
    monkeypatch.setattr(evaluate, "predict", lookup)
    assert evaluate.measure_copies(None, samples, length, Settings, torch.device("cpu")) == dict(dense=[1, 1, 1], sparse=[1, 1, 0])


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder as a user has it: text, an untrained run `out` of context 48, and checkpoints without a run, without an indexer, and broken ones."""
    folder = tmp_path_factory.mktemp("evaluate")
    (folder / "text.txt").write_text("".join(f"line {i}: the square of {i % 97} is {(i % 97) ** 2}\n" for i in range(1000)))
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


def test_script(inside, monkeypatch, capsys):
    run = subprocess.run([sys.executable, str(HERE / "evaluate.py"), "--batches=2", "--copies=4", "--device=cpu"], text=True, capture_output=True, timeout=120)
    assert run.returncode == 0 and "Traceback" not in run.stderr, run.stderr
    for text in ("2 layers, top-k 8, context 48", "in sight", "last k", "oracle", "H(indexer)", "union/k", "tokens back", "chance"):
        assert text in run.stdout
    folder = inside / "out" / "evaluation-sparse"
    assert sorted(p.name for p in folder.iterdir()) == ["copy.png", "distances.png", "evaluation.json", "loss.png", "recall.png"]
    assert all(p.read_bytes()[:4] == b"\x89PNG" for p in folder.glob("*.png")) and sorted(p.name for p in (inside / "out").iterdir()) == ["evaluation-sparse", "run.json", "sparse"]
    results = json.loads((folder / "evaluation.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert results["options"]["block_size"] == 48 and results["options"]["index_fp8"] is False and results["loss"]["count"][-1] == 2 * 3 * 48
    assert results["copy"]["distance"] == [16, 32, 37] and results["copy_task"]["length"] == 12 and {"commit", "torch", "device"} <= results.keys()
    (folder / "mine.txt").write_text("kept")
    code, _, err = call(monkeypatch, capsys, "--batches=2", "--copies=4", "--device=cpu", "--out_dir=out/evaluation-sparse")  # again, over it: the same numbers
    again = json.loads((folder / "evaluation.json").read_text())
    assert code == 0 and {k: again[k] for k in ("loss", "recall", "layers", "distances", "copy")} == {k: results[k] for k in ("loss", "recall", "layers", "distances", "copy")}, err
    assert (folder / "mine.txt").exists() and not list(inside.rglob("*.part"))


def test_defaults_without_a_run(inside, monkeypatch, capsys):
    o, _ = evaluate.options(["--checkpoint=published", "--data=text.txt"])
    assert (o.block_size, o.batch_size, o.index_fp8, o.tokenizer, o.out_dir) == (32, 8, True, "bytes", str(inside / "evaluation-published"))
    assert evaluate.options(["--checkpoint=published"])[0].data == "python"
    code, out, err = call(monkeypatch, capsys, "--checkpoint=published", "--data=text.txt", "--batches=1", "--copies=2", "--dtype=bfloat16", "--out_dir=new/deep")
    assert code == 0 and (inside / "new" / "deep" / "evaluation.json").exists(), err
    monkeypatch.chdir(inside / "new")
    code, out, err = call(monkeypatch, capsys, "--checkpoint=../published", "--data=../text.txt", "--batches=1", "--copies=2", "--out_dir=.")
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


@pytest.mark.parametrize("options,message", BAD, ids=[o for o, _ in BAD])
def test_bad_input(inside, monkeypatch, capsys, options, message):
    before = {p for p in inside.rglob("*") if "cache" not in p.parts}
    code, out, err = call(monkeypatch, capsys, "--data=text.txt", *options.split())
    assert code == 2 and message in err and err.count("\n") == 1 and not out, (out, err)
    assert {p for p in inside.rglob("*") if "cache" not in p.parts} == before


def test_bad_input_as_a_subprocess(inside):
    run = subprocess.run([sys.executable, str(HERE / "evaluate.py"), "--checkpoint=nowhere"], text=True, capture_output=True, timeout=120)
    assert run.returncode == 2 and run.stderr.startswith("evaluate.py: ") and run.stderr.count("\n") == 1
