"""Micro-batches repeated by a CUDA graph (graphed.py) learn what micro-batches called one by one do."""
import subprocess
import sys

import pytest
import torch

import train
from graphed import EAGER_CALLS, Graphed
from tests.common import FLOAT32, MEAN_ROW, assert_close, packed_batch, tiny_model
from tests.scripts import ROOT, SHORT, SIZES, environment, metrics

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA graphs")


def test_disabled_it_calls():
    seen = []
    graphed = Graphed(lambda x: seen.append(x) or {"x": x}, enabled=False)
    for n in range(EAGER_CALLS + 2):
        assert graphed(n) == {"x": n}
    assert seen == list(range(EAGER_CALLS + 2))


@needs_gpu
def test_arguments_and_results():
    """What is passed counts, not what was captured; results are the caller's; each kind has a graph."""
    calls = []
    total = torch.zeros(3, device="cuda")

    def add(x, y):
        calls.append(y is None)
        total.add_(x if y is None else x * y)
        return dict(twice=2 * x)

    graphed = Graphed(add)
    results = []
    for n in range(1, 6):
        x = torch.full((3,), float(n), device="cuda")
        results.append(graphed(x, None)["twice"])
        graphed(x, x)
    assert torch.equal(torch.stack(results)[:, 0].cpu(), torch.arange(1.0, 6) * 2)
    assert total.tolist() == [15.0 + 55] * 3
    assert len(calls) == 2 * (EAGER_CALLS + 1)


@needs_gpu
def test_a_late_kind():
    """A new kind takes the memory of the graphs so far; they are captured again."""
    captured = []

    def double(x, y):
        captured.append(torch.cuda.is_current_stream_capturing())
        return dict(twice=2 * (x if y is None else y))

    graphed = Graphed(double)
    x = torch.zeros(3, device="cuda")
    for n, late in enumerate([False] * 5 + [True] * 5 + [False] * 5):
        x.fill_(n)
        result = graphed(x, x.clone() if late else None)["twice"]
        assert result.tolist() == [2.0 * n] * 3
    kind = [False] * EAGER_CALLS + [True]
    assert captured == kind + kind + [True] and len(graphed.captured) == 2


@needs_gpu
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("stage,recompute,compiles", [
    ("dense", False, False), ("warmup", False, False), ("sparse", False, False), ("sparse", True, False),
    ("sparse", False, True)])
def test_training(stage, recompute, compiles, half, packed):
    """Losses and gradients of two accumulated micro-batches in five steps, all different: in float32 by every
    portable kernel; in bf16 by those that train.py runs, cuDNN's among them."""
    sizes = {}
    if half:
        sizes = dict(hidden_size=128, num_attention_heads=4, kv_lora_rank=64, qk_nope_head_dim=32,
                     qk_rope_head_dim=16, v_head_dim=32, index_head_dim=32, initializer_range=0.1)
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = tiny_model("triton", index_fp8=half, **sizes)
        model.attention = "sparse" if stage == "sparse" else "dense"
        model.recompute = recompute
        train.trainable(model, stage, "all")
        if compiles:
            model.compile_layers()
        captured = []

        def learn(x, y, first):
            captured.append(torch.cuda.is_current_stream_capturing())
            targets = None if stage == "warmup" else y
            with torch.autocast("cuda", torch.bfloat16, enabled=half):
                losses = model(x, targets, first, index_loss=stage != "dense", logits_of=None)[1]
            (losses.get("lm", 0) + losses.get("kl", 0)).backward()
            return {name: loss.detach() for name, loss in losses.items()}

        graphed = Graphed(learn, enabled)
        found = []
        for _ in range(5):
            for _ in range(2):
                x, y, first = packed_batch("triton")
                found.append(graphed(x, y, first if packed else None))
            gradients = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad(set_to_none=False)
        assert captured == ([False] * EAGER_CALLS + [True] if enabled else [False] * 10)
        results.append((found, gradients))
    bounds = (2**-6, 2**-4) if half else FLOAT32  # two runs differ, as atomics add in any order
    (want, want_gradients), (got, got_gradients) = results
    for one, other in zip(want, got, strict=True):
        assert one.keys() == other.keys()
        for name in one:
            assert_close(other[name][None], one[name][None], *bounds, name)
    assert want_gradients.keys() == got_gradients.keys()
    for name in want_gradients:
        assert_close(got_gradients[name], want_gradients[name], *bounds, name, floor=MEAN_ROW)


@needs_gpu
def test_script(place):
    """All stages, with two micro-batches a step and an evaluation between the graphs' replays."""
    variables = environment(place)
    del variables["CUDA_VISIBLE_DEVICES"]
    logs = []
    for cuda_graph in ("true", "false"):
        out_dir = f"graph-{cuda_graph}"
        command = [sys.executable, str(ROOT / "train.py"), "--data=text.txt", f"--out_dir={out_dir}", *SIZES,
                   *SHORT, "--gradient_accumulation_steps=2", "--device=cuda", "--compile=false",
                   "--dtype=float32", f"--cuda_graph={cuda_graph}"]
        ended = subprocess.run(command, cwd=place, env=variables, capture_output=True, text=True, timeout=300)
        assert ended.returncode == 0, ended.stderr
        logs.append(metrics(place / out_dir))
    for one, other in zip(*logs, strict=True):
        assert one.keys() == other.keys()
        for name in ("loss", "kl", "val_loss", "grad_norm", "index_grad_norm"):
            assert one.get(name) == pytest.approx(other.get(name), rel=1e-2), (name, one, other)
