"""Selectors other than the indexer (baselines.py) against their definitions in plain Python; a model that is
trained, stored and measured with them. (T10), (T25): docs/TRAPS.md."""
import contextlib
import json
import signal
from types import SimpleNamespace

import pytest
import torch

import baselines
import data
import evaluate
import indexer
import sparse_attn
from config import SELECTORS, Config
from model import Transformer
from parallel import Ranks
from support import checkpoint
from tests.common import FLOAT32, assert_close, device_of, packed_batch, tiny_model
from tests.inputs import DEVICE, bounds
from tests.scripts import call, losses, metrics, refused, train
from tests.test_evaluate import text_tokens
from tests.test_generate import cached, new_caches, random_tokens

OTHERS = SELECTORS[1:]
H = 3
SCALE = 0.4


def attended(B, S, T, D=8):
    q = torch.randn(B, S, H, D, device=DEVICE)
    return baselines.Attended(q, torch.randn(B, T, D, device=DEVICE), SCALE, 5)


def select(selector, k, of, first=None, last=None, best=baselines.best):
    """`select_as` for the queries and latents of an Attended, with indexers that mean nothing."""
    B, S = of.q.shape[:2]
    T = of.latents.shape[1]
    q_index = torch.full((B, S, 2, 4), float("nan"), device=DEVICE)
    k_index = torch.full((B, T, 4), float("nan"), device=DEVICE)
    return baselines.select_as(q_index, k_index, None, k, None, first, last, selector, of, best)


def lowbias32(x):
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def mass(of, b, s, seen):
    """Attention of a query to the tokens `seen`, mean over heads, in float64."""
    keys = of.latents[b, seen].double()  # (n, D)
    return torch.stack([(keys @ q.double() * SCALE).softmax(0) for q in of.q[b, s]]).mean(0).tolist()


def defined(selector, k, of, b, s, seen):
    """The definition: what a query selects of the positions `seen`, ascending."""
    n = len(seen)
    if n <= k:
        return seen
    if selector == "recent":
        return seen[-k:]
    if selector == "sinks":
        few = 4 if k >= 8 else k // 2
        return seen[:few] + seen[few - k:]
    if selector == "strided":
        return sorted(seen[n - 1 - j * n // k] for j in range(k))
    if selector == "random":
        scores = [lowbias32((lowbias32(n) + i) % 2**32) // 256 for i in range(n)]
    else:
        scores = mass(of, b, s, seen)
    ranked = sorted(range(n), key=lambda i: (-scores[i], i))
    return sorted(seen[i] for i in ranked[:k])


# ---- the definitions ----

@pytest.mark.parametrize("selector", OTHERS)
@pytest.mark.parametrize("k", [1, 2, 5, 8, 13, 50])
@pytest.mark.parametrize("kind", [None, "packed", "window"])
def test_selectors_are_what_they_are_called(selector, k, kind):
    """Also for k beyond what is visible, documents of one token, queries that see nothing."""
    B = 2
    S = 21
    T = 37
    of = attended(B, S, T)
    first, last = bounds(B, S, T, kind)
    found = select(selector, k, of, first, last)
    assert found.shape == (B, S, k) and found.dtype == torch.int32 and found.is_contiguous()
    for b in range(B):
        for s in range(S):
            begin = 0 if first is None else int(first[b, s])
            end = T - S + s if last is None else int(last[b, s])
            seen = list(range(begin, end + 1))
            want = defined(selector, k, of, b, s, seen)
            assert found[b, s].tolist() == want + [-1] * (k - len(want)), (b, s)


@pytest.mark.parametrize("selector", OTHERS)
def test_one_token(selector):
    of = attended(1, 1, 1)
    assert select(selector, 3, of).tolist() == [[[0, -1, -1]]]
    with pytest.raises(ValueError, match="index_topk=0"):
        select(selector, 0, of)


@pytest.mark.parametrize("selector", ["random", "oracle"])
def test_slices_of_queries_change_nothing(selector, monkeypatch):
    of = attended(2, 30, 30)
    first, last = bounds(2, 30, 30, "packed")
    whole = select(selector, 6, of, first, last)
    monkeypatch.setattr(indexer, "SLICE", 1000)
    assert torch.equal(select(selector, 6, of, first, last), whole)


@pytest.mark.parametrize("selector", ["random", "oracle"])
def test_backends_select_alike(selector):
    """By the kernels' top-k as by the reference's, for rows short and long enough for either of its ways;
    positions alone need none."""
    kernels = pytest.importorskip("kernels")
    for S, T, k, kind in ((9, 30, 7, "packed"), (9, 30, 7, "window"), (5, 20, 30, None), (2, 2500, 40, None)):
        of = attended(2, S, T)
        first, last = bounds(2, S, T, kind)
        want = select(selector, k, of, first, last)
        assert torch.equal(select(selector, k, of, first, last, kernels.topk), want), T


def test_random_is_uniform():
    """Of 1000 queries that see 100 tokens or more, each reads 10: a token's count is binomial, sd below 10;
    and two queries have no more in common than chance gives them."""
    T = 1100
    found = select("random", 10, attended(1, T, T))[0, 99:1099]
    counts = indexer.membership(found[None], T)[0, :, :100].sum(0).double()  # of the tokens that all see
    expected = sum(10 / n for n in range(100, 1100))
    assert (counts - expected).abs().max() < 5 * expected**0.5
    assert abs(counts.mean() - expected) < expected**0.5
    pairs = zip(found[:-1].tolist(), found[1:].tolist())
    common = sum(len(set(a) & set(b)) for a, b in pairs)
    assert common < 2 * sum(100 / n for n in range(100, 1100))


@pytest.mark.parametrize("first", [None, 11])
def test_the_oracle_holds_the_most(first):
    """More of the dense attention than any other selector, and than the indexer."""
    S = 40
    of = attended(2, S, S)
    last = torch.arange(S, device=DEVICE).expand(2, S).int()
    start = torch.full_like(last, first or 0).minimum(last)
    q_index = torch.randn(2, S, 2, 4, device=DEVICE)
    scores = (q_index, torch.randn(2, S, 4, device=DEVICE), torch.randn(2, S, 2, device=DEVICE))
    held = {"indexer": indexer.select(*scores, 6, None, start, last)}
    for selector in OTHERS:
        held[selector] = select(selector, 6, of, start, last)
    for selector, chosen in held.items():
        held[selector] = sparse_attn.selected_mass(of.q, of.latents, chosen, SCALE, start, last)
    best = held.pop("oracle")
    for selector, share in held.items():
        assert (share <= best + 1e-6).all() and share.mean() < best.mean() - 0.05, selector


# ---- in a model ----

@pytest.mark.parametrize("selector", OTHERS)
def test_no_token_sees_the_future_or_another_document(selector):
    """(T10) Selections and logits, exactly; and a packed document is read as it is alone."""
    model = tiny_model(selector=selector)
    idx, _, first = packed_batch(S=40)
    start = int(first[-1, -1])
    other = idx.clone()
    other[:, -5:] = (other[:, -5:] + 1) % 61
    chosen = []
    changed = []
    with torch.no_grad():
        before = model(idx, first=first, selections=chosen)[0]
        after = model(other, first=first, selections=changed)[0]
        alone = []
        by_itself = model(idx[-1:, start:], selections=alone)[0]
    assert torch.equal(before[:, :-5], after[:, :-5]) and not torch.equal(before, after)
    for layer, again, single in zip(chosen, changed, alone):
        assert torch.equal(layer[:, :-5], again[:, :-5])
        packed = layer[-1, start:]
        assert torch.equal(packed, torch.where(single[0] < 0, -1, single[0] + start))
    assert_close(before[-1, start:], by_itself[0], *FLOAT32)


def test_each_selector_makes_another_model():
    """Nothing below compares a selector with itself."""
    model = tiny_model()
    idx, _, first = packed_batch(S=40)
    logits = []
    for selector in SELECTORS:
        model.config.selector = selector
        with torch.no_grad():
            logits.append(model(idx, first=first)[0])
    for n, one in enumerate(logits):
        assert not any(torch.equal(one, other) for other in logits[:n])


@pytest.mark.parametrize("selector", OTHERS)
@pytest.mark.parametrize("chunks", [[20] + [1] * 12, [7, 18, 5, 2]], ids=str)
def test_decoding_is_training(selector, chunks):
    """(T25) Logits through caches, and where the length is read on the device from a cache that is longer."""
    model = tiny_model(selector=selector).eval()
    x = random_tokens("torch", 2, 32)
    caches = new_caches(model, 2, 41)
    last = torch.full((2, 1), 31, dtype=torch.int32)
    with torch.no_grad():
        full = model(x)[0]
        assert_close(cached(model, x, chunks, caches), full, *FLOAT32)
        again = model(x[:, -1:], caches=caches, position=torch.tensor([31]), last=last)[0]
    assert_close(again, full[:, -1:], *FLOAT32)


def test_the_oracle_reads_a_packed_cache():
    """What it selects from FP8 latents is what the attention to them looks at."""
    of = attended(2, 9, 30, D=12)
    packed = sparse_attn.pack_latents(of.latents, 5)
    unpacked = sparse_attn.unpack_latents(packed, 5, torch.float32)
    found = select("oracle", 4, of._replace(latents=packed))
    assert torch.equal(found, select("oracle", 4, of._replace(latents=unpacked)))


@pytest.mark.parametrize("selector", ["sinks", "random", "oracle"])
def test_backends_train_alike(selector):
    """All losses and selections of a layer."""
    pytest.importorskip("triton")
    model = tiny_model("triton", selector=selector, num_hidden_layers=1, index_topk=3)
    batch = [x.to(device_of("triton")) for x in packed_batch(B=1, S=11)]
    found = []
    for backend in ("torch", "triton"):
        model.backend = backend
        chosen = []
        with torch.no_grad():
            logits, values = model(*batch, index_loss=True, selections=chosen)
        found.append((logits, chosen, torch.stack([values[name] for name in sorted(values)])))
    assert_close(found[1][0], found[0][0], *FLOAT32)
    assert_close(found[1][2], found[0][2], *FLOAT32)
    assert torch.equal(found[1][1][0], found[0][1][0])


@pytest.mark.parametrize("selector", OTHERS)
def test_who_learns(selector):
    """The model by the language-model loss alone, the indexers by their KL over this selection alone; recall
    is the mass that this selection holds."""
    model = tiny_model(selector=selector)
    batch = packed_batch(S=40)
    names = dict(model.named_parameters())
    gradients = {}
    for with_index_loss in (False, True):
        found = model(*batch, index_loss=with_index_loss)[1]
        sum(found[name] for name in ("lm", "kl") if name in found).backward()
        for name, p in names.items():
            gradients.setdefault(name, []).append(p.grad)
        model.zero_grad(set_to_none=True)
    for name, (without, beside) in gradients.items():
        if ".indexer." in name:
            assert without is None and beside.abs().max() > 0, name
        else:
            assert torch.equal(without, beside), name
    assert 0 < found["kl"] < found["kl_uniform"] * 20 and 0 < found["recall"] < 1

    shares = []

    def record(layer, selecting, attending):
        rows = torch.linspace(0, 39, 16).long()
        first = batch[2][:, rows]
        shares.append(sparse_attn.selected_mass(
            attending.q[:, rows], attending.latents, attending.indices[:, rows], attending.scale, first,
            rows.expand(2, -1)).mean())

    with torch.no_grad(), evaluate.watching(model, record):
        model(*batch)
    assert found["recall"].item() == pytest.approx(torch.stack(shares).mean().item(), rel=1e-5)


def test_recall_of_the_warm_up():
    """Nothing was selected yet: it is of what this selector would. The oracle's is the highest."""
    model = tiny_model(attention="dense")
    batch = packed_batch(S=40)
    recall = {}
    for selector in SELECTORS:
        model.config.selector = selector
        with torch.no_grad():
            recall[selector] = model(*batch, index_loss=True)[1]["recall"].item()
    best = recall.pop("oracle")
    assert len({best, *recall.values()}) == 6 and all(share < best for share in recall.values())


# ---- checkpoints and scripts ----

def test_checkpoint_says_so_only_where_it_is_so(tmp_path):
    tiny_model().save_pretrained(tmp_path / "indexer")
    tiny_model(selector="sinks").save_pretrained(tmp_path / "sinks")
    assert "selector" not in json.loads((tmp_path / "indexer" / "config.json").read_text())
    assert json.loads((tmp_path / "sinks" / "config.json").read_text())["selector"] == "sinks"
    assert checkpoint.read_config(tmp_path / "indexer").selector == "indexer"
    loaded = Transformer.from_pretrained(tmp_path / "sinks")
    assert loaded.config.selector == "sinks"
    loaded.save_pretrained(tmp_path / "again")
    assert checkpoint.read_config(tmp_path / "again") == checkpoint.read_config(tmp_path / "sinks")


@pytest.mark.parametrize("changes,message", [
    (dict(selector="newest"), "selector='newest': choose one of indexer, recent"),
    (dict(selector="recent", index_block=4), "selector=recent with index_block=4"),
    (dict(selector="recent", index_topk=0), "index_topk=0")], ids=str)
def test_what_cannot_be_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        Config(**changes).check()


@pytest.fixture(scope="module")
def strided(place, run):
    """-> the folder of a sparse stage from the run's warm-up, with the selection strided."""
    code, out, err = train(place, "strided", "--stage=sparse", "--init_from=out/warmup", "--selector=strided")
    assert code == 0 and "selector strided" in out, err
    return place / "strided"


def test_training_with_another_selector(place, run, strided):
    """From the same warm-up with the same batches: another run, and the checkpoint knows of it."""
    records = [r for r in metrics(run[0]) if r["stage"] == "sparse"]
    others = metrics(strided)
    assert len(others) == len(records) and all(r["lm"] != o["lm"] for r, o in zip(records, others))
    assert all(o["index_grad_norm"] > 0 and 0 < o["recall"] < 1 for o in others)
    assert checkpoint.read_config(strided / "sparse").selector == "strided"


def test_resumed(place, strided, monkeypatch):
    """The selector is part of the run: stopped after its first step it goes on with it, and with no other."""

    @contextlib.contextmanager
    def interrupted():
        yield [signal.SIGINT]

    with monkeypatch.context() as patch:
        patch.setattr("support.cli.interruptible", interrupted)
        code, _, err = train(place, "selected and stopped", "--stage=sparse", "--init_from=out/warmup",
                             "--selector=strided")
    assert code == 130 and len(metrics(place / "selected and stopped")) == 1, err
    refused(call(place, "train.py", "--out_dir=selected and stopped", "--resume", "--selector=recent"),
            "--selector=recent: the run being resumed has strided")
    code, _, err = call(place, "train.py", "--out_dir=selected and stopped", "--resume")
    assert code == 0, err
    assert losses(place / "selected and stopped") == losses(strided)
    assert checkpoint.read_config(place / "selected and stopped" / "sparse").selector == "strided"


@pytest.mark.parametrize("options,words", [
    (("--selector=newest",), ("--selector", "invalid choice: 'newest'")),
    (("--selector=recent", "--index_block=4"), ("selector=recent with index_block=4",))], ids=str)
def test_bad_options_of_train(place, run, options, words):
    """One line, exit 2, also where the model exists already."""
    refused(train(place, "bad", *options), *words)
    refused(train(place, "bad", "--stage=sparse", "--init_from=out/warmup", *options), *words)
    assert not (place / "bad").exists()


def test_bad_options_of_others(place, strided):
    refused(call(place, "sample.py", "--checkpoint=strided/sparse", "--prompt=a", "--index_block=4"),
            "selector=strided with index_block=4")
    refused(call(place, "evaluate.py", "--checkpoint=strided/sparse", "--sweep=recent,newest"),
            "--sweep=newest: write all, or some of indexer, recent")


def test_evaluate_with_a_sweep(place, strided):
    """All that is measured, and its own selector first in the sweep."""
    code, out, err = call(place, "evaluate.py", "--checkpoint=strided/sparse", "--batches=2", "--copies=2",
                          "--sweep=recent,oracle")
    assert code == 0 and "selector strided" in out and "reading k tokens" in out, err
    folder = strided / "evaluation-sparse"
    results = json.loads((folder / "evaluation.json").read_text())
    assert results["selector"] == "strided" and (folder / "sweep.png").read_bytes()[:4] == b"\x89PNG"
    sweep = results["sweep"]
    assert list(sweep) == ["k", "strided", "recent", "oracle", "dense"] and sweep["k"] == [2, 4, 8, 16]
    assert sweep["strided"][2] == pytest.approx(results["loss"]["sparse"][-1], rel=1e-6)
    assert sweep["dense"] == [pytest.approx(results["loss"]["dense"][-1], rel=1e-6)] * 4


@pytest.mark.parametrize("own", ["indexer", "random"])
def test_sweep_is_the_loss_of_each_model(own):
    """As by models that were built so, and afterwards the model is what it was."""
    two_levels = dict(index_block=2, index_candidates=4, index_exact_layers=0) if own == "indexer" else {}
    model = tiny_model(vocab_size=257, selector=own, **two_levels).eval()
    config = model.config
    before = dict(vars(config))
    options = SimpleNamespace(block_size=40, batch_size=3, batches=2, dtype="float32", sweep="all")
    batches = data.Batches(text_tokens(), 40, 3, 256)
    with torch.no_grad():
        sweep = evaluate.measure_sweep(model, batches, options, Ranks(torch.device("cpu")))
    assert vars(config) == before and sweep.pop("k") == [4, 8, 16, 32]
    assert list(sweep) == [own, *(name for name in SELECTORS if name != own), "dense"]
    for name, values in sweep.items():
        for k, value in zip((4, 8, 16, 32), values):
            config.selector = own if name == "dense" else name
            config.index_topk = k
            config.index_block = before["index_block"] if name == own else 0
            model.attention = "dense" if name == "dense" else "sparse"
            with torch.no_grad():
                expected = sum(model(x, y, first, logits_of=None)[1]["lm"].item()
                               for x, y, first in map(batches.batch, range(2))) / 2
            assert value == pytest.approx(expected, rel=1e-5), (name, k)
