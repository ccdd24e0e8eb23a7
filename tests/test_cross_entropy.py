"""The loss of a slice of logits, reference (lm_loss.cross_entropy) and kernel
(triton_kernels/cross_entropy.py), against float64."""
import pytest
import torch
import torch.nn.functional as F

import kernels
import lm_loss
from tests.inputs import DEVICE, DTYPES, EPS, big, random

BACKENDS = [lm_loss.cross_entropy, kernels.cross_entropy]
BOTH = pytest.mark.parametrize("cross_entropy", BACKENDS, ids=["torch", "triton"])
SHAPES = [(1, 1), (5, 37), (3, 5000), (2, 4096), pytest.param((300, 50304), marks=big)]


def inputs(kind, rows, vocab, dtype):
    """logits (rows,vocab) in dtype, targets (rows,)"""
    size = dict(random=1, huge=1000, equal=0, sure=1)[kind]
    logits = random(rows, vocab) * size
    targets = torch.randint(0, vocab, (rows,), device=DEVICE)
    if kind == "sure":  # the probability of the target is 1 - tiny, its gradient -tiny
        logits.scatter_(1, targets[:, None], 14.0)
    return logits.to(dtype), targets


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("kind", ["random", "huge", "equal", "sure"])
def test_nats_and_gradient(cross_entropy, kind, shape, dtype):
    """Bounds: log softmax subtracts numbers of the size of the largest logit, each rounded by eps / 2, and a
    logarithm of a sum (16 eps); p inherits that error relatively, and is rounded to dtype."""
    logits, targets = inputs(kind, *shape, dtype)
    exact = logits.double().requires_grad_()
    want = F.cross_entropy(exact, targets, reduction="none")
    want_grad, = torch.autograd.grad(want.sum(), exact)
    x = logits.clone()
    nats = cross_entropy(x, targets, False)
    assert torch.equal(x, logits) and nats.dtype == torch.float32 and nats.shape == shape[:1]
    log_error = EPS * (16 + 2 * exact.detach().abs().amax(1))  # (rows,)
    assert ((nats - want).abs() <= log_error).all(), ((nats - want).abs() / log_error).max()

    assert torch.equal(cross_entropy(x, targets, True), nats)
    info = torch.finfo(dtype)
    p = exact.detach().softmax(1)
    allowed = p * log_error[:, None] + want_grad.abs() * info.eps + info.smallest_normal * info.eps
    if cross_entropy is kernels.cross_entropy:
        allowed.scatter_add_(1, targets[:, None], torch.full_like(allowed[:, :1], 2 * EPS))  # exp(log p) - 1
    assert ((x - want_grad).abs() <= allowed).all(), ((x - want_grad).abs() / allowed).max()


@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_a_sure_target(cross_entropy, dtype):
    """p - 1 of the target belongs to the nats returned, expm1(-nats): to eps of its own size in the
    reference, in the kernel to the rounding of p in float32. Not exp(-nats) - 1 in dtype, which is 0."""
    logits, targets = inputs("sure", 5, 37, dtype)
    nats = cross_entropy(logits, targets, True)
    want = torch.expm1(-nats.double())
    assert (want < 0).all() and (want > -1e-3).all()
    got = logits.gather(1, targets[:, None])[:, 0]
    info = torch.finfo(dtype)
    allowed = want.abs() * 2 * info.eps + info.smallest_normal * info.eps
    if cross_entropy is kernels.cross_entropy:
        allowed = allowed + 2 * EPS
    assert ((got - want).abs() <= allowed).all(), (got - want).abs() / allowed


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_where_the_reference_is_not(value):
    """A logit that is NaN or infinite, of the target or not, spoils its row alone."""
    logits, targets = inputs("random", 6, 300, torch.float32)
    logits[1, (targets[1] + 1) % 300] = value
    logits[4, targets[4]] = value
    results = []
    for cross_entropy in BACKENDS:
        x = logits.clone()
        results.append((cross_entropy(x, targets, True).isfinite(), x.isfinite()))
    for finite, want_finite in zip(results[1], results[0]):
        assert torch.equal(finite, want_finite)
    assert not results[0][0][4] and results[0][0][[0, 2, 3, 5]].all()


def test_target_outside_the_vocabulary():
    """NaN in the kernel, which cannot raise."""
    logits, targets = inputs("random", 3, 40, torch.float32)
    targets[0] = -1
    targets[2] = 40
    assert kernels.cross_entropy(logits, targets, False).isnan().tolist() == [True, False, True]


def test_registered():
    logits, targets = inputs("random", 3, 40, torch.float32)
    for grad in (False, True):
        torch.library.opcheck(torch.ops.dsa.cross_entropy, (logits, targets, grad))


@BOTH
def test_autograd_sees_what_is_overwritten(cross_entropy):
    logits, targets = inputs("random", 3, 40, torch.float32)
    doubled = 2 * logits.requires_grad_()
    square = (doubled * doubled).sum()
    if cross_entropy is kernels.cross_entropy:
        with pytest.raises(RuntimeError, match="under torch.no_grad"):
            cross_entropy(doubled, targets, False)
    cross_entropy(doubled.detach(), targets, True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.backward()
