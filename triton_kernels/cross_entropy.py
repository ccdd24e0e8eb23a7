"""Chapter 5: the language-model loss of a slice of logits. Not of the attention path, but as PyTorch
operations it takes a tenth of a dense training step.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common import LOWEST, operation

# ---- cross_entropy ----
# contract    kernels.cross_entropy
# in PyTorch  nats = F.cross_entropy(x, y, reduction="none");  x = softmax(x) - F.one_hot(y)
# equation    nats[t] = log sum_s exp(x[t,s]) - x[t,y_t];  dx[t,s] = softmax(x[t])_s - [s = y_t], in x's place
# tiling      a program per row walks it twice, BLOCK_V logits at a time: a maximum and a sum per lane, then
#             the gradient
# FLOPs       some 3 exponentials per logit: bound by memory
# bytes       per logit its size read, read again (half of the rows are still in L2) and written


@triton.jit
def cross_entropy_kernel(
        x_ptr, y_ptr, nats_ptr,
        V,
        GRAD: tl.constexpr, BLOCK_V: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_row = x_ptr + row * V
    v = tl.arange(0, BLOCK_V)
    y = tl.load(y_ptr + row)
    known = (y >= 0) & (y < V)
    # before anything is overwritten
    target = tl.load(x_row + y, mask=known, other=float("nan")).to(tl.float32)

    # the maximum, and the sum of exponentials less it
    m = tl.full([BLOCK_V], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, V, BLOCK_V):
        x = tl.load(x_row + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, x)
        l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
        m = m_new
    top = tl.max(m)
    # log sum exp, less the maximum: added to it, a probability near 1 would lose its distance from 1
    rest = tl.log(tl.sum(l * tl.exp(m - top)))
    tl.store(nats_ptr + row, rest - (target - top))

    # the gradient
    if GRAD:
        for start in range(0, V, BLOCK_V):
            x = tl.load(x_row + start + v, mask=start + v < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top - rest) - (start + v == y).to(tl.float32)
            tl.store(x_row + start + v, p.to(x_ptr.dtype.element_ty), mask=start + v < V)


@operation("cross_entropy", mutates_args=("logits",))
def cross_entropy(logits: Tensor, targets: Tensor, grad: bool) -> Tensor:
    rows, V = logits.shape
    nats = torch.empty(rows, dtype=torch.float32, device=logits.device)
    if rows:
        cross_entropy_kernel[(rows,)](
            x_ptr=logits, y_ptr=targets.contiguous(), nats_ptr=nats,
            V=V,
            GRAD=grad, BLOCK_V=min(4096, triton.next_power_of_2(V)),
            num_warps=8)
    return nats


@cross_entropy.register_fake
def _(logits, targets, grad):
    return logits.new_empty(len(logits), dtype=torch.float32)
