"""What the kernel tests feed and compare with: random tensors, bounds of what queries see, attention in
float64."""
import pytest
import torch

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
DTYPES = [torch.float32, torch.float16] + [torch.bfloat16] * CUDA  # the interpreter multiplies bf16 wrongly
EPS = torch.finfo(torch.float32).eps
big = pytest.mark.skipif(not CUDA, reason="real shapes need a GPU")


def random(*shape, dtype=torch.float32, grad=False):
    """Normal random numbers of these dimensions, rounded to dtype, on the device of the tests."""
    return torch.randn(*shape, device=DEVICE).to(dtype).requires_grad_(grad)


def bounds(B, S, T, kind):
    """first, last (B,S) int32. None: causal, without tensors; "packed": documents, of which one has a single
    token; "window": nothing causal about it, some rows empty."""
    if kind is None:
        return None, None
    position = torch.arange(T - S, T)
    if kind == "packed":
        starts = torch.tensor([0, T // 7, T // 3, T // 3 + 1, T - 5])
        first = starts[torch.searchsorted(starts, position, right=True) - 1]  # (S,)
        return first.int().expand(B, S).to(DEVICE), position.int().expand(B, S).to(DEVICE)
    first = torch.randint(0, T, (B, S)).int()
    last = torch.randint(0, T, (B, S)).int()
    return first.to(DEVICE), last.to(DEVICE)


def visible(S, T, first, last):
    """(1 or B, S, T) bool"""
    t = torch.arange(T, device=DEVICE)
    if last is None:
        last = torch.arange(T - S, T, device=DEVICE)[None]
    seen = t <= last[..., None]
    return seen if first is None else seen & (t >= first[..., None])


def double(x):
    """x in float64, requiring a gradient if x does."""
    return x.detach().double().requires_grad_(x.requires_grad)


def exact_attention(q, k, v, scale, first, last):
    """dense_attention on float64 tensors."""
    H = q.shape[2]
    seen = visible(q.shape[1], k.shape[1], first, last)[:, :, None]  # (1 or B, S, 1, T)
    k = k.repeat_interleave(H // k.shape[2], 2)  # (B, T, H, D)
    v = v.repeat_interleave(H // v.shape[2], 2)  # (B, T, H, V)
    logits = torch.einsum("bshd,bthd->bsht", q, k) * scale
    logits = logits.masked_fill(~seen, float("-inf"))
    empty = ~seen.any(-1, keepdim=True)
    p = torch.softmax(logits.masked_fill(empty, 0), -1).masked_fill(~seen, 0)  # (B, S, H, T)
    return torch.einsum("bsht,bthd->bshd", p, v), logits.logsumexp(-1)
