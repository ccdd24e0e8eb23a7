"""Chapter 5: the language-model loss of a slice of logits. Not of the attention path, but as PyTorch
operations it takes a tenth of a dense training step.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common import LOWEST, operation

# ---- cross_entropy ----
# contract    kernels.cross_entropy
# in PyTorch  nats = F.cross_entropy(logits, targets, reduction="none")
#             logits = softmax(logits) - F.one_hot(targets)
# equation    nats[t] = log sum_s exp(x[t,s]) - x[t,y_t];  dx[t,s] = softmax(x[t])_s - [s = y_t], in x's place
# tiling      a program per row walks it twice, BLOCK logits at a time: a maximum and a sum per lane, then
#             the gradient
# FLOPs       some 3 exponentials per logit: bound by memory
# bytes       per logit its size read, read again (half of the rows are still in L2) and written


@triton.jit
def cross_entropy_kernel(
        logits_ptr, targets_ptr, nats_ptr,
        VOCAB,
        GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * VOCAB
    v = tl.arange(0, BLOCK)
    y = tl.load(targets_ptr + row)
    known = (y >= 0) & (y < VOCAB)
    # before anything is overwritten
    target = tl.load(row_ptr + y, mask=known, other=float("nan")).to(tl.float32)

    # the maximum, and the sum of exponentials less it
    m = tl.full([BLOCK], LOWEST, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for start in range(0, VOCAB, BLOCK):
        x = tl.load(row_ptr + start + v, mask=start + v < VOCAB, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, x)
        l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
        m = m_new
    top = tl.max(m)
    # log sum exp, less the maximum: added to it, a probability near 1 would lose its distance from 1
    rest = tl.log(tl.sum(l * tl.exp(m - top)))
    tl.store(nats_ptr + row, rest - (target - top))

    # the gradient
    if GRAD:
        for start in range(0, VOCAB, BLOCK):
            x = tl.load(row_ptr + start + v, mask=start + v < VOCAB, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top - rest) - (start + v == y).to(tl.float32)
            tl.store(row_ptr + start + v, p.to(logits_ptr.dtype.element_ty), mask=start + v < VOCAB)


class CrossEntropyTiles(NamedTuple):
    """Of cross_entropy_kernel."""
    block: int  # logits
    num_warps: int


def cross_entropy_tiles(vocab):
    """Tiles for rows of so many logits."""
    return CrossEntropyTiles(block=min(4096, triton.next_power_of_2(vocab)), num_warps=8)


@operation("cross_entropy", mutates_args=("logits",))
def cross_entropy_operation(logits: Tensor, targets: Tensor, grad: bool) -> Tensor:
    """Arguments and results of kernels.cross_entropy"""
    if torch.is_grad_enabled() and logits.requires_grad:
        raise RuntimeError("cross_entropy makes the gradient itself; call it under torch.no_grad()")
    rows, vocab = logits.shape
    tiles = cross_entropy_tiles(vocab)
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        cross_entropy_kernel[(rows,)](
            logits_ptr=logits, targets_ptr=targets.contiguous(), nats_ptr=nats,
            VOCAB=vocab,
            GRAD=grad, BLOCK=tiles.block,
            num_warps=tiles.num_warps)
    if grad:
        torch.autograd.graph.increment_version(logits)
    return nats


@cross_entropy_operation.register_fake
def _(logits, targets, grad):
    return logits.new_empty(len(logits), dtype=torch.float32)


def cross_entropy(logits, targets, grad):
    """What kernels.cross_entropy promises: shapes, dtypes and errors stand there."""
    return cross_entropy_operation(logits, targets, grad)
