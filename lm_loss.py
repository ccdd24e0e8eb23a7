"""The language-model loss, without logits of all tokens at once: a slice of them at a time, whose gradient
takes their place. `cross_entropy` is the reference of the kernel of that name (kernels.py).
"""
import torch
from torch import Tensor

from precision import exact, product_dtype

LOSS_SLICE = 2**28  # logits held at a time


def cross_entropy(logits, targets, grad):
    """logits (N,vocab), targets (N,) int64 below vocab -> (N,) float32, -log softmax(logits)[target], in
    nats; with grad its gradient softmax(logits) - [s = target] takes the logits' place."""
    log_p = torch.log_softmax(logits, -1, dtype=torch.float32)  # (N, vocab)
    nats = -log_p.gather(-1, targets[:, None])  # (N, 1)
    if grad:
        of_target = torch.expm1(-nats).to(logits.dtype)  # p - 1, also near 1
        torch.exp(log_p, out=logits).scatter_(-1, targets[:, None], of_target)
    return nats[:, 0]


@torch.library.custom_op("dsa::next_token_loss", mutates_args=())
def sliced_loss(h: Tensor, weight: Tensor, targets: Tensor, dtype: torch.dtype, backend: str, learn_h: bool,
                learn_weight: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as `next_token_loss`, computed in dtype -> the loss (), and N times its gradients: dh
    (N,hidden) in dtype, dweight (vocab,hidden) float32, each empty unless learnt. One slice of logits at a
    time: those of 32K tokens over 160K words are 21 GB."""
    entropy = cross_entropy
    if backend == "triton":
        from kernels import cross_entropy as entropy
    N = len(h)
    h = h.to(dtype)
    w = weight.to(dtype)
    grad = learn_h or learn_weight
    dh = torch.empty_like(h) if learn_h else h.new_empty(0)
    dweight = torch.zeros(weight.shape if learn_weight else 0, dtype=torch.float32, device=h.device)
    nats = torch.zeros((), dtype=torch.float32, device=h.device)
    rows = max(1, LOSS_SLICE // len(weight))
    with exact(h):
        for start in range(0, N, rows):
            part = h[start:start + rows]  # (rows, hidden)
            logits = part @ w.T  # (rows, vocab)
            nats = nats + entropy(logits, targets[start:start + rows], grad).sum()
            # from here on `logits` holds its own gradient
            if learn_h:
                torch.mm(logits, w, out=dh[start:start + rows])
            if learn_weight:
                dweight += logits.T @ part
    return nats / N, dh, dweight


@sliced_loss.register_fake
def _(h, weight, targets, dtype, backend, learn_h, learn_weight):
    dh = torch.empty_like(h, dtype=dtype) if learn_h else h.new_empty(0, dtype=dtype)
    dweight = torch.empty(weight.shape if learn_weight else 0, dtype=torch.float32, device=h.device)
    return h.new_empty((), dtype=torch.float32), dh, dweight


def keep_gradients(ctx, inputs, output):
    """For the backward of `sliced_loss`: the gradients that it made."""
    h, weight, targets, dtype, backend, ctx.learn_h, ctx.learn_weight = inputs
    ctx.dtypes = (h.dtype, weight.dtype)
    ctx.tokens = len(h)
    ctx.save_for_backward(*output[1:])


def scale_gradients(ctx, grad, *_):
    """The backward of `sliced_loss`: its gradients times grad (), that of the loss."""
    dh, dweight = ctx.saved_tensors
    grad = grad / ctx.tokens
    dh = (dh * grad).to(ctx.dtypes[0]) if ctx.learn_h else None
    dweight = (dweight * grad).to(ctx.dtypes[1]) if ctx.learn_weight else None
    return dh, dweight, None, None, None, None, None


sliced_loss.register_autograd(scale_gradients, setup_context=keep_gradients)


def next_token_loss(h, weight, targets, backend):
    """h (N,hidden), weight (vocab,hidden), targets (N,) int64 -> mean cross entropy of the logits h weight^T
    in nats, () float32. Differentiable in h and weight; the gradients are made with the loss. backend:
    "torch" or "triton"."""
    grad = torch.is_grad_enabled()
    learn_h = grad and h.requires_grad
    learn_weight = grad and weight.requires_grad
    return sliced_loss(h, weight, targets, product_dtype(h), backend, learn_h, learn_weight)[0]
