"""The benchmark's own code: what it counts, what it feeds the kernels, its rows. Every part runs in small: on
a GPU as it is, without one on the reference and through Triton's interpreter, where its times mean
nothing."""
import functools
import json
import math
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import bench
import indexer
import sparse_attn
from bench import Shape
from config import Config
from support import cli

SCRIPT = Path(bench.__file__)
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
SHAPE = Shape(heads=3, rank=16, rope=8, nope=24, value=20, index_heads=5, index_dim=8, topk=6)


@pytest.fixture(autouse=True)
def device(monkeypatch):
    monkeypatch.setattr(bench, "DEVICE", DEVICE)


# ---- FLOPs ----

def counted(function):
    """The FLOPs of function() as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        function()
    return counter.get_total_flops()


@pytest.mark.parametrize("S,T", [(1, 1), (7, 7), (3, 11), (1, 9)])
def test_causal_pairs(S, T):
    seen = indexer.visible(S, T, None, None, slice(None), "cpu")
    assert bench.causal_pairs(S, T) == seen.sum().item()


def test_score_flops():
    """The reference visits all pairs, and weighs the heads, which is not counted."""
    q = torch.randn(1, 7, SHAPE.index_heads, SHAPE.index_dim)
    k = torch.randn(1, 9, SHAPE.index_dim)
    w = torch.randn(1, 7, SHAPE.index_heads)
    weighing = 2 * 7 * 9 * SHAPE.index_heads
    assert counted(lambda: indexer.index_scores(q, k, w)) == bench.score_flops(SHAPE, 7 * 9) + weighing


def test_dense_flops():
    """The reference visits all pairs, and keeps the scores, which are counted once more."""
    q = torch.randn(1, 7, SHAPE.heads, SHAPE.qk, requires_grad=True)
    k = torch.randn(1, 7, SHAPE.heads, SHAPE.qk, requires_grad=True)
    v = torch.randn(1, 7, SHAPE.heads, SHAPE.value, requires_grad=True)

    def forward():
        return sparse_attn.dense_attention(q, k, v, SHAPE.scale)[0]

    scores = 2 * 7 * 7 * SHAPE.heads * SHAPE.qk
    assert counted(forward) == bench.dense_flops(SHAPE, 7 * 7)
    both = counted(lambda: forward().sum().backward())
    assert both + scores == bench.dense_flops(SHAPE, 7 * 7, backward=True)


def test_sparse_flops():
    q = torch.randn(1, 4, SHAPE.heads, SHAPE.width, requires_grad=True)
    latents = torch.randn(1, 9, SHAPE.width, requires_grad=True)
    indices = bench.random_selection(1, 4, 9, SHAPE.topk).cpu()
    slots = 4 * SHAPE.topk

    def forward():
        return sparse_attn.sparse_attention(q, latents, indices, SHAPE.scale, SHAPE.rank)[0]

    scores = 2 * slots * SHAPE.heads * SHAPE.width
    assert counted(forward) == bench.sparse_flops(SHAPE, slots)
    both = counted(lambda: forward().sum().backward())
    assert both + scores == bench.sparse_flops(SHAPE, slots, backward=True)


# ---- inputs ----

def check_selection(indices, T):
    """Ascending, then -1; nothing that its query, one of the last of T, does not see."""
    S, k = indices.shape
    for s, row in enumerate(indices.tolist()):
        visible = T - S + s + 1
        chosen = row[:min(k, visible)]
        assert chosen == sorted(set(chosen)) and 0 <= chosen[0] and chosen[-1] < visible
        assert row[len(chosen):] == [-1] * (k - len(chosen))


@pytest.mark.parametrize("S,T,k", [(40, 40, 7), (5, 60, 13), (9, 9, 12)])
@pytest.mark.parametrize("overlap", [0, 0.8])
def test_selection_is_valid(S, T, k, overlap):
    indices = bench.selection(S, T, k, overlap)
    assert indices.dtype == torch.int32 and indices.shape == (1, S, k)
    check_selection(indices[0].cpu(), T)


@pytest.mark.parametrize("overlap", [0, 0.5, 0.8, 0.95])
def test_selection_shares_as_asked(overlap):
    """Neighbours share `overlap` of k tokens, and k / T by chance where they are independent: to 6 sigma of
    the mean of 60 x 512 draws, whose variance is at most 1/4."""
    torch.manual_seed(0)
    S, T, k = 61, 4096, 512
    rows = [set(row) for row in bench.selection(S, T, k, overlap)[0].tolist()]
    shares = [len(a & b) / k for a, b in zip(rows, rows[1:])]
    sigma = 0.5 / math.sqrt(len(shares) * k)
    assert abs(np.mean(shares) - max(overlap, k / T)) < 6 * sigma


def test_random_selection_is_valid():
    indices = bench.random_selection(3, 2, 50, 9)
    assert indices.dtype == torch.int32 and indices.shape == (3, 2, 9)
    for row in indices.flatten(0, 1).tolist():
        assert row == sorted(set(row)) and 0 <= row[0] and row[-1] < 50


def test_ids_come_in_runs():
    ids = bench.random_ids(Config(vocab_size=1000), 3, 37)
    assert ids.shape == (3, 37) and ids.max() < 1000
    changes = (ids[:, 1:] != ids[:, :-1]).nonzero()[:, 1] + 1
    assert len(changes) > 10 and (changes % bench.RUN == 0).all()


# ---- the plain GPT ----

def test_gpt_has_124M_parameters():
    with torch.device("meta"):
        gpt = bench.GPT(context=4096)
    sizes = {name: p.numel() for name, p in gpt.named_parameters()}
    positions = sizes.pop("positions.weight")
    assert positions == 4096 * 768
    hidden = 768
    expected = 50304 * hidden + 12 * (3 + 1 + 4 + 4) * hidden**2 + 25 * hidden
    assert sum(sizes.values()) == expected and round(expected / 1e6) == 124


def small_gpt():
    torch.manual_seed(0)
    return bench.GPT(context=24, vocabulary=50, hidden=32, layers=2, heads=4)


def hidden_states(gpt, x):
    kept = []
    handle = gpt.norm.register_forward_hook(lambda module, args, out: kept.append(out))
    gpt(x, x)
    handle.remove()
    return kept[0]  # (B, T, hidden)


def test_gpt_is_causal():
    gpt = small_gpt()
    x = torch.randint(50, (8, 24))
    changed = x.clone()
    changed[:, 12:] = (x[:, 12:] + 1) % 50
    before = hidden_states(gpt, x)
    after = hidden_states(gpt, changed)
    assert torch.allclose(before[:, :12], after[:, :12], atol=1e-6)
    assert (before[:, 12:] != after[:, 12:]).any(-1).all()


def test_gpt_learns():
    """From chance, ln 50, to an order that it can know: the token after each is the next one."""
    gpt = small_gpt()
    x = (torch.randint(50, (16, 1)) + torch.arange(25)) % 50
    optimizer = torch.optim.AdamW(gpt.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss = gpt(x[:, :-1], x[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] == pytest.approx(math.log(50), abs=0.1) and losses[-1] < 0.5 * losses[0]


# ---- measuring, and the table ----

def test_wall_seconds(monkeypatch):
    """The median of enough calls, after those in which the clock settles."""
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    durations = iter([0.15, 0.15, 0.1, 0.4, 0.2, 9.0])  # the first two settle
    monkeypatch.setattr(bench, "seconds_of", lambda function: next(durations))
    assert bench.wall_seconds(None) == 0.2 and next(durations) == 9.0
    durations = iter([12.0, 11.0, 13.0])  # a call that takes so long is not repeated
    assert bench.wall_seconds(None) == 11.0 and next(durations) == 13.0


def test_seconds_of(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    assert 0.05 <= bench.seconds_of(lambda: time.sleep(0.05)) < 5


BASELINES = dict(bf16=500.0, fp8=1000.0, copy=2000.0)


@pytest.fixture
def table(monkeypatch):
    """A table for which a function's time in ms is what it returns."""
    monkeypatch.setattr(bench, "milliseconds", lambda function: function())
    return bench.Table(BASELINES)


def test_table_rows(table, capsys):
    table.rate("product", lambda: 2.0, 500e9)  # 250 TFLOP/s
    table.rate("scores", lambda: 2.0, 500e9, "fp8")
    table.traffic("copied", lambda: 4.0, 2e9)  # 500 GB/s
    table.faster("quick", lambda: 2.0, lambda: 5.0, "torch")
    table.times("more", lambda: 3.0, lambda: 2.0, "the forward")
    table.add("other", 7.0, 1234.5, "tokens/s")
    assert table.rows == [
        dict(what="product", ms=2.0, figure=0.5, unit="x bf16 matmul (250 TFLOP/s)"),
        dict(what="scores", ms=2.0, figure=0.25, unit="x fp8 matmul (250 TFLOP/s)"),
        dict(what="copied", ms=4.0, figure=0.25, unit="x copy (500 GB/s)"),
        dict(what="quick", ms=2.0, figure=2.5, unit="x faster than torch"),
        dict(what="more", ms=3.0, figure=1.5, unit="x the time of the forward"),
        dict(what="other", ms=7.0, figure=1234.5, unit="tokens/s")]
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6 and lines[-1].split() == ["other", "7.000", "ms", "1,234.50", "tokens/s"]


def test_curves(table, tmp_path):
    table.point("train", "dense", 10, 1.0)
    table.point("train", "dense", 20, 2.0)
    table.point("train", "sparse", 10, 3.0)
    assert table.curves == dict(train=dict(dense=[(10, 1.0), (20, 2.0)], sparse=[(10, 3.0)]))
    table.add("a row", 1.0, 2.0, "x")
    bench.write(table, dict(device="none"), tmp_path)
    results = json.loads((tmp_path / "bench.json").read_text())
    assert results == dict(
        machine=dict(device="none"), baselines=BASELINES, rows=table.rows,
        curves=dict(train=dict(dense=[[10, 1.0], [20, 2.0]], sparse=[[10, 3.0]])))
    bench.plot(table.curves["train"], "GB", tmp_path / "memory.png")
    assert (tmp_path / "memory.png").read_bytes()[:4] == b"\x89PNG"


def test_sparse_rows_stand_beside_the_better_dense_one(table):
    speeds = {
        ("dense", False): bench.Speed(100.0, 30.0, 1.0), ("dense", True): bench.Speed(200.0, 20.0, 2.0),
        ("sparse", False): bench.Speed(150.0, 40.0, 3.0), ("sparse", True): bench.Speed(300.0, 25.0, 4.0)}
    bench.speed_rows(table, "training", 2 * bench.STEP_TOKENS, 1, speeds)
    rows = {row["what"]: row for row in table.rows}
    assert rows["training, dense, --compile"]["figure"] == 200
    assert rows["training, sparse"]["figure"] == 0.75 and rows["training, sparse, --compile"]["figure"] == 1.5
    assert rows["training, memory of a sparse step"]["figure"] == 20  # GB per STEP_TOKENS
    assert rows["training, sparse"]["ms"] == pytest.approx(1000 * 2 * bench.STEP_TOKENS / 150)


def test_baselines(monkeypatch):
    """Two FLOPs per multiplication, in TFLOP/s; bytes read and written, in GB/s: of functions that take 2
    ms."""

    def two(function):
        function()
        return 2.0

    monkeypatch.setattr(bench, "MATMUL", 64)
    monkeypatch.setattr(bench, "milliseconds", two)
    product = 2 * 64**3 / 2e-3 / 1e12
    assert bench.measure_baselines() == pytest.approx(
        dict(bf16=product, fp8=product, copy=2 * (8 * 64 * 64 * 2) / 2e-3 / 1e9))


# ---- the command line ----

def test_parts_are_chosen_by_name():
    names = list(bench.parts(None))
    assert bench.choose("select,loss", names) == ["select", "loss"]
    assert bench.choose("train", names) == [f"train-{k}k" for k in (4, 6, 8, 16, 32, 64, 128)]
    assert bench.choose("train-8k,train-8k", names) == ["train-8k"]
    with pytest.raises(ValueError, match="--only=tra: no part 'tra'; choose from select, "):
        bench.choose("tra", names)


def test_an_unknown_part_is_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=select,bogus"])
    with pytest.raises(SystemExit) as end:
        cli.run(bench.main)
    err = capsys.readouterr().err
    assert end.value.code == 2 and "no part 'bogus'" in err and err.count("\n") == 1


@pytest.mark.skipif(CUDA, reason="there is a GPU")
def test_refusal_without_a_gpu(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), f"--out_dir={tmp_path}/new"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "bench.py: no CUDA GPU here, and without one there is nothing to time\n"
    assert not (tmp_path / "new").exists()


def test_parts_go_on_after_one_that_is_too_large(monkeypatch, tmp_path, capsys):
    """Its rows so far stay, and every part leaves bench.json behind."""

    def too_large(table):
        table.add("a row before", 1.0, 2.0, "x")
        raise torch.OutOfMemoryError("CUDA out of memory.\nAnd more")

    def fits(table):
        assert json.loads((tmp_path / "out" / "bench.json").read_text())["rows"] == table.rows
        table.add("a row behind", 1.0, 2.0, "x")
        table.point("train", "dense", 10, 1.0)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(bench.report, "machine", lambda device: dict(device="none"))
    monkeypatch.setattr(bench, "measure_baselines", lambda: BASELINES)
    monkeypatch.setattr(bench, "parts", lambda checkpoint: dict(large=too_large, small=fits, other=None))
    monkeypatch.setattr(sys, "argv", ["bench.py", "--only=large,small", f"--out_dir={tmp_path}/out"])
    assert bench.main() == 0
    out = capsys.readouterr().out
    assert "large: out of GPU memory, the rest of this part is left out (CUDA out of memory.)" in out
    results = json.loads((tmp_path / "out" / "bench.json").read_text())
    assert [row["what"] for row in results["rows"]] == ["a row before", "a row behind"]
    assert results["machine"].keys() == {"device", "commit"}
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["bench.json", "memory.png"]


# ---- every part, in small ----

TINY = dict(
    hidden_size=32, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=16,
    kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, index_n_heads=2,
    index_head_dim=16, index_topk=8, max_position_embeddings=128)


@pytest.fixture
def small(monkeypatch):
    """Sizes and shapes of a toy, on a GPU with the published layer; without one, no times, and nothing of
    CUDA."""
    if CUDA:
        shape = bench.V32._replace(topk=64)
        few = bench.SMALL._replace(topk=32)
        heads = (128, 64, 16)
        sizes = dict(
            CHUNK=256, CONTEXTS=(768, 1024), LONGEST=2048, SEQUENCE=512, MATMUL=512, BATCH=16,
            STEP_TOKENS=512, FAR=(2048,), TO_A_MILLION=(512, 2048))
    else:
        shape = Shape(heads=4, rank=16, rope=16, nope=16, value=16, index_heads=4, index_dim=16, topk=8)
        few = shape._replace(heads=2, index_heads=2)
        heads = (4, 2)
        sizes = dict(
            CHUNK=16, CONTEXTS=(32, 48), LONGEST=64, SEQUENCE=24, MATMUL=32, BATCH=8, STEP_TOKENS=32)
    sizes |= dict(
        V32=shape, SMALL=few, HEADS=heads, VOCABULARY=300,
        SMALL_CONFIG=Config(vocab_size=300, **(TINY | dict(max_position_embeddings=2048))),
        DECODED=((1, 32), (2, 24)), LONG=(24, 48))
    for name, value in sizes.items():
        monkeypatch.setattr(bench, name, value)
    monkeypatch.setattr(bench, "milliseconds", lambda function: 1000 * bench.seconds_of(function))
    if not CUDA:
        for name in ("synchronize", "reset_peak_memory_stats"):
            monkeypatch.setattr(torch.cuda, name, lambda: None)
        monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 10**9)
        monkeypatch.setattr(torch, "compile", lambda model, dynamic: model)
        monkeypatch.setattr(bench, "wall_seconds", lambda function, settle=0: bench.seconds_of(function))
        monkeypatch.setattr(bench, "launches", lambda function: 1)
        # Triton's interpreter multiplies bf16 wrongly
        monkeypatch.setattr(bench, "randn", functools.partial(bench.randn, dtype=torch.float32))
    return bench.Table(BASELINES)


def check_rows(table, *beginnings):
    """Every row has a time and a figure, and there is one that begins like each of these."""
    whats = [row["what"] for row in table.rows]
    assert len(set(whats)) == len(whats)
    for row in table.rows:
        assert row["ms"] > 0 and row["figure"] > 0 and math.isfinite(row["figure"]), row
    for beginning in beginnings:
        assert any(what.startswith(beginning) for what in whats), (beginning, whats)


def test_select_part(small):
    bench.bench_select(small)
    check_rows(small, "quantise", "index scores", "top-k", "select whole", "select whole, S")


@pytest.mark.skipif(not CUDA, reason="interpreted, it takes two minutes")
def test_blocks_part(small):
    bench.bench_blocks(small)
    check_rows(small, "select by blocks, S 1, ", "select by blocks, S 2", "select by blocks, S")


def test_dense_part(small):
    bench.bench_dense(small)
    check_rows(small, "dense forward, 1 x", "dense forward + backward, 1 x", "dense decode")


def test_sparse_part(small):
    bench.bench_sparse(small)
    check_rows(small, "sparse forward, S", "sparse forward + backward", "decode, batch")


def test_loss_part(small):
    bench.bench_loss(small)
    check_rows(small, "indexer loss, dense", "indexer loss, sparse", "cross entropy")


@pytest.mark.skipif(not CUDA, reason="beside cuDNN")
def test_context_part(small):
    bench.bench_context(small)
    check_rows(small, "prefill at", "decode at")
    assert len(small.curves["context"]) == 4


@pytest.mark.skipif(not CUDA, reason="beside cuDNN")
def test_far_part(small):
    bench.bench_far(small)
    check_rows(small, "attention, exact selection, S", "attention, two levels, S")
    assert [len(points) for points in small.curves["far"].values()] == [2, 2, 2]


def test_train_part(small):
    bench.bench_train(small, 32)
    check_rows(small, "training, 124M, context 32, dense", "training, 124M, context 32, sparse, --compile",
               "training, 124M, context 32, memory of a sparse step")
    assert small.curves["train"].keys() == {"training, dense", "training, sparse"}


def test_train_part_recomputes_where_memory_is_short(small, monkeypatch):
    """And is left out with a line where that does not help."""
    tried = []

    def too_large(model, x):
        tried.append(model.recompute)
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(bench, "stage_speeds", too_large)
    bench.bench_train(small, 32)
    assert tried == [False, True] and small.rows == []


def test_default_part(small, monkeypatch):
    monkeypatch.setattr(bench, "GPU", TINY | dict(block_size=32, dtype="bfloat16"))
    bench.bench_default(small)
    check_rows(small, "training, default run, context 32, dense", "training, default run, context 32, sparse")


def test_gpt_part(small, monkeypatch):
    tiny = functools.partial(bench.GPT, vocabulary=bench.VOCABULARY, hidden=32, layers=2, heads=2)
    monkeypatch.setattr(bench, "GPT", tiny)
    bench.bench_gpt(small, 32)
    check_rows(small, "plain GPT", "dense stage")


def test_decode_part(small):
    bench.bench_decode(small)
    check_rows(small, "decoding step, 124M, batch 1, context 32, dense",
               "decoding step, 124M, batch 2, context 24, sparse",
               "decoding step, 124M, batch 1, context 32, sparse, launches")


def test_prefill_part(small):
    bench.bench_prefill(small)
    what = f"prefill, 124M, {bench.CONTEXTS[1]} tokens"
    check_rows(small, f"{what}, dense", f"{what}, sparse")


def test_sample_part(small, monkeypatch):
    monkeypatch.setattr(bench, "SAMPLED_STEPS", 3)
    bench.bench_sample(small, bench.CONTEXTS[1])
    what = f"sample.py, 124M, prompt of {bench.CONTEXTS[1]} tokens"
    for name in ("exact selection", "two levels"):
        check_rows(small, f"{what}, {name}, first token", f"{what}, {name}, a step")
    assert [row["figure"] for row in small.rows[:2]] == [1, 1]
    assert {f"sample-{T}k" for T in (128, 512, 1024)} < bench.parts(None).keys()


def test_rollout_part(small, monkeypatch):
    monkeypatch.setattr(bench, "GPU", bench.GPU | TINY)
    monkeypatch.setattr(bench, "ROLLED_ROWS", 8)
    monkeypatch.setattr(bench, "ROLLED_STEPS", 3)
    monkeypatch.setattr(bench.Monologue, "limit", 3)
    bench.bench_rollout(small)
    check_rows(small, "8 rows of 3 tokens, 27M, sample.py", "8 rows of 3 tokens, 27M, rollout")
    assert len(small.rows) == 2


def test_cold_part(small, monkeypatch):
    larger = Config(vocab_size=300, **TINY | dict(max_position_embeddings=2048))
    monkeypatch.setattr(bench, "SMALL_CONFIG", larger)
    bench.bench_cold(small)
    check_rows(small, "first token of a cold sample.py")


def test_million_part(small):
    bench.bench_million(small)
    check_rows(small, "forward, 124M, 1M tokens")


def test_graft_part(small, monkeypatch):
    experts = dict(
        model_type="deepseek_v2", n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=16,
        topk_method="greedy", norm_topk_prob=False, q_lora_rank=0, vocab_size=300)
    monkeypatch.setattr(bench, "TWIN_CONFIG", Config(**TINY | experts))
    steps = tuple((stage, 24, learn, recompute) for stage, _, learn, recompute in bench.TWIN_STEPS)
    monkeypatch.setattr(bench, "TWIN_STEPS", steps[1:])  # the first two differ in their context alone
    bench_graft = bench.bench_graft if CUDA else bench.bench_graft.__wrapped__
    bench_graft(small)
    check_rows(small, "warmup step", "sparse step")
    assert torch.get_default_dtype() == torch.float32


def test_long_part(small, monkeypatch, tmp_path, capsys):
    bench.bench_long(small, None)
    assert "left out" in capsys.readouterr().out and small.rows == []
    with torch.device(DEVICE):
        bench.Transformer(Config(vocab_size=300, **TINY)).save_pretrained(tmp_path / "trained", "bytes")
    text = SimpleNamespace(tokens=np.arange(1000, dtype=np.uint16) % 257)
    monkeypatch.setattr(bench.data, "prepare", lambda source, tokenizer: (text, None))
    bench.bench_long(small, str(tmp_path / "trained"))
    assert len(small.rows) == 4
    check_rows(small, f"training, {tmp_path}/trained, context 24, dense")


@pytest.mark.skipif(not CUDA, reason="counts kernels of a GPU")
def test_launches():
    x = torch.ones(1000, device="cuda")
    assert bench.launches(lambda: x.sin().cos()) == 2
