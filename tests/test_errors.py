"""The kernels on what a trained model feeds them, not only on random numbers: attention that is peaked, indexers that tie, outliers."""
import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tools import errors
from config import Config
from model import Transformer

CUDA = torch.cuda.is_available()
DEVICE, DTYPES = ("cuda", [None, torch.bfloat16]) if CUDA else ("cpu", [None])  # of autocast; None: float32
ROUNDED = dict(out=(6e-3, 2.5e-2), lse=(1e-6, 1e-6), kl=(2e-5, 2e-5), kl_uniform=(2e-5, 2e-5))  # gradients less: they nearly cancel where attention is peaked
T, TEXT = 96, torch.tensor(list(Path(argparse.__file__).read_bytes()))


@pytest.fixture(scope="module")
def trained():
    """A small model after 200 steps of the dense stage and 100 of the warm-up, on source text."""
    torch.manual_seed(0)
    model = Transformer(Config(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=48, kv_lora_rank=32, qk_nope_head_dim=16,
                               qk_rope_head_dim=16, v_head_dim=16, index_n_heads=2, index_head_dim=32, index_topk=16), "torch", attention="dense").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(300):
        x = torch.stack([TEXT[i:i + T + 1] for i in torch.randint(len(TEXT) - T, (8,)).tolist()]).to(DEVICE)
        losses = model(x[:, :-1], x[:, 1:], index_loss=step >= 200, return_logits=False)[1]
        (losses["kl"] if step >= 200 else losses["lm"]).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses["lm"] < 2.9 and losses["kl"] < 0.6 * losses["kl_uniform"] and losses["kl_uniform"] > 0.2  # it has learned, and its attention is peaked
    model.backend = "triton"
    return model


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def calls(trained, request):
    """What its layers feed the kernels."""
    return errors.recorded(trained, TEXT[None, 5000:5001 + T].to(DEVICE), request.param)


@pytest.mark.parametrize("name", errors.OPERATIONS)
@pytest.mark.parametrize("layer", [0, 1])
def test_trained_activations(calls, name, layer):
    """Outputs and gradients: float32 holds the formula, bf16 its rounding."""
    assert len(calls[name]) == 2
    args = calls[name][layer]
    for what, (whole, worst) in errors.differences(name, args).items():
        most = (3e-5, 3e-4) if args[0].dtype == torch.float32 else ROUNDED.get(what, (1e-2, 1e-1))
        assert whole < most[0] and worst < most[1], (what, whole, worst)


def test_trained_selection(calls):
    """Quantised scores of a trained indexer; on a GPU a key may change places with one that scores the same but for the tensor core's rounding."""
    assert len(calls["select"]) == 2
    assert all(errors.same_selection(args) >= (0.9 if CUDA else 1) for args in calls["select"])


def test_relative_errors_are_seen():
    """The measure itself: one wrong row counts, and so does a row of nothing, against the mean row."""
    want = torch.ones(10, 4)
    got = want.clone()
    got[3] = 2
    whole, worst = errors.relative(got, want)
    assert whole == pytest.approx(10**-0.5) and worst == pytest.approx(1)
    want[5], got[5] = 0, 1
    assert errors.relative(got, want)[1] == pytest.approx(2 / 1.8)


def test_script():
    """As a user runs it: the small table on a GPU, one line without."""
    done = subprocess.run([sys.executable, "errors.py", "--small"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if CUDA:
        assert done.returncode == 0 and done.stdout.count(" / ") > 80, done.stderr
    else:
        assert done.returncode == 2 and done.stderr == "errors.py: no CUDA GPU here; without one, pytest compares the kernels through Triton's interpreter\n"
