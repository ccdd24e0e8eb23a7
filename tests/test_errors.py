"""The kernels on what a trained model feeds them, not only on random numbers: attention that is peaked,
indexers that tie, outliers."""
import argparse
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from config import Config
from model import Transformer
from tests.common import relative_errors
from tools import errors

ROOT = Path(__file__).parent.parent
CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [None, torch.bfloat16] if CUDA else [None]  # of autocast; None: float32
T = 64
TEXT = torch.tensor(list(Path(argparse.__file__).read_bytes()))
CONFIG = Config(
    hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, q_lora_rank=48,
    kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16, index_n_heads=2,
    index_head_dim=32, index_topk=16)


@pytest.fixture(scope="module")
def trained():
    """A small model after 200 steps of the dense stage and 100 of the warm-up, on source text."""
    torch.manual_seed(0)
    model = Transformer(CONFIG, "torch", attention="dense").to(DEVICE)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for step in range(300):
        starts = torch.randint(len(TEXT) - T, (8,)).tolist()
        x = torch.stack([TEXT[start:start + T + 1] for start in starts]).to(DEVICE)  # (8, T + 1)
        warmup = step >= 200
        losses = model(x[:, :-1], x[:, 1:], index_loss=warmup, logits_of=None)[1]
        losses["kl" if warmup else "lm"].backward()
        optimizer.step()
        optimizer.zero_grad()
    # it has learned, and its attention is peaked
    assert losses["lm"] < 2.9 and losses["kl"] < 0.6 * losses["kl_uniform"] and losses["kl_uniform"] > 0.2
    return model


@pytest.fixture(scope="module", params=DTYPES, ids=str)
def calls(trained, request):
    """What its layers feed the kernels."""
    return errors.recorded(trained, TEXT[None, 5000:5001 + T].to(DEVICE), request.param)


# (whole, worst row). In float32 sums of some 100 terms, each rounded by 2^-24, and differences of their
# results: KL is a tenth of the entropies that it is the difference of. Rows differ, and each counts as the
# mean one at least.
EXACT = (3e-5, 1e-4)
# In bf16, whose rounding is 2^-9: lse and KL are sums in float32 of exact products, out is rounded twice (the
# probabilities, and itself). Gradients are differences of such values: a query that looks at one key alone
# has none, and what is left of its row is rounding. That a formula is right shows in the whole.
ROUNDED = dict(out=(6e-3, 2.5e-2), lse=(1e-6, 1e-6), kl=(2e-5, 2e-5), kl_uniform=(2e-5, 2e-5))
ROUNDED_GRADIENT = (1e-2, 0.1)


@pytest.mark.parametrize("name", errors.OPERATIONS)
@pytest.mark.parametrize("layer", [0, 1])
def test_trained_activations(calls, name, layer):
    """Outputs and gradients: float32 holds the formula, bf16 its rounding."""
    assert len(calls[name]) == 2
    args = calls[name][layer]
    found = errors.differences(name, args)
    assert found.keys() == {*errors.OPERATIONS[name].outputs, *errors.OPERATIONS[name].gradients}
    for what, (whole, worst) in found.items():
        most = EXACT if args[0].dtype == torch.float32 else ROUNDED.get(what, ROUNDED_GRADIENT)
        assert whole < most[0] and worst < most[1], (what, whole, worst)


@pytest.mark.parametrize("name", errors.OPERATIONS)
def test_a_wrong_kernel_is_seen(calls, name, monkeypatch):
    """A kernel whose first output is five percent off, and with it every gradient."""
    reference = errors.OPERATIONS[name].reference

    def wrong(*args):
        first, second = reference(*args)
        return 1.05 * first, second

    monkeypatch.setattr(errors.kernels, name, wrong)
    for what, (whole, worst) in errors.differences(name, calls[name][0]).items():
        right = what in ("lse", "kl_uniform")
        assert whole < 1e-6 if right else 0.045 < whole < 0.055, (what, whole, worst)


def test_trained_selection(calls):
    """Quantised scores of a trained indexer; on a GPU a key may change places with one that scores the same
    but for the tensor core's rounding."""
    assert len(calls["select"]) == 2
    for args in calls["select"]:
        assert args[4] is not None  # the scales of e4m3 keys
        assert errors.same_selection(args) >= (0.9 if CUDA else 1)


def test_only_whole_calls_are_recorded(trained, calls):
    """Recall selects for a few queries of its own, in the dense stage; it is not among the calls, and no hook
    stays."""
    for args in (*calls["select"], *calls["dense_attention"]):
        assert args[0].shape[1] == T
    assert not any(module._forward_pre_hooks for module in trained.modules())


def test_relative_errors_are_seen():
    """The measure itself: one wrong row counts, and so does a row of nothing, against a tenth of the mean
    row."""
    want = torch.ones(10, 4)
    got = want.clone()
    got[3] = 2
    whole, worst = relative_errors(got, want)
    assert whole == pytest.approx(10**-0.5) and worst == pytest.approx(1)
    want[5] = 0
    got[5] = 1
    assert relative_errors(got, want)[1] == pytest.approx(2 / 0.18)


def test_script():
    """As a user runs it: the small table on a GPU, one line without."""
    done = subprocess.run(
        [sys.executable, "-m", "tools.errors", "--small"], cwd=ROOT, capture_output=True, text=True)
    if CUDA:
        assert done.returncode == 0 and done.stdout.count(" / ") > 80, done.stderr
        return
    assert done.returncode == 2
    assert done.stderr == ("errors.py: no CUDA GPU here; without one, pytest compares the kernels through "
                           "Triton's interpreter\n")
