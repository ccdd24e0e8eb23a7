"""What tests share: one error measure, one poison, one small model."""
import torch

from config import Config
from model import Transformer

# Allowed between float32 and float64, or two orders of summing in float32 (whole tensor, worst row). A
# product is off by 2^-24 of itself, a sum of n <= 64 of them by some sqrt(n) 2^-24 = 5e-7 of its terms; a
# layer chains ten such sums, with random signs 1.5e-6. A row may cancel to a tenth of its terms.
FLOAT32 = (5e-6, 5e-5)
ROW_FLOOR = 0.1  # of the mean row, what a row counts at least: where it cancels to nothing, all is rounding
MEAN_ROW = 1.0  # the floor for gradients of attention: in rows that look at one key alone dP - delta cancels


def relative_errors(got, want, floor=ROW_FLOOR):
    """Tensors (..., n) -> |got - want| / |want| of the whole tensor and of its worst row, in float64. A row
    counts as at least `floor` of the mean row."""
    got = got.detach().double().flatten(0, -2)
    want = want.detach().double().flatten(0, -2)
    error = (got - want).norm(dim=-1)
    size = want.norm(dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    whole = error.norm() / size.norm().clamp(min=tiny)
    worst = error / size.clamp(min=floor * size.mean()).clamp(min=tiny)
    return whole.item(), worst.max().item()


def assert_close(got, want, whole, row, what="", floor=ROW_FLOOR):
    """Relative errors of at most `whole` and, of the worst row, `row`; NaN and infinities must stand in the
    same places."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    got = got.detach().double().cpu()
    want = want.detach().double().cpu()
    special = ~want.isfinite()
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: other places are not finite"
    got_special = got[special].nan_to_num(nan=7.0)
    assert torch.equal(got_special, want[special].nan_to_num(nan=7.0)), f"{what}: other infinities"
    got = got.masked_fill(special, 0)
    want = want.masked_fill(special, 0)
    if got.dim() < 2:
        got = got.reshape(1, -1)
        want = want.reshape(1, -1)
    errors = relative_errors(got, want, floor)
    measured = f"{what}: {errors[0]:.1e} of the whole, {errors[1]:.1e} of the worst row"
    assert errors[0] <= whole and errors[1] <= row, f"{measured}; allowed are {whole:.1e} and {row:.1e}"


def poison():
    """Fill what the allocator hands out next with NaN: a kernel that leaves a hole shows it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = [torch.full((size,), float("nan"), device=device) for size in (2**8, 2**12, 2**16, 2**20)]
    del blocks


def tiny_model(backend="torch", attention=None, index_fp8=False, **changes):
    """A random model whose sizes are no powers of two but the indexer's head, on the GPU if the kernels run
    there. Its weights are large, so that attention is far from uniform."""
    sizes = dict(
        vocab_size=61, hidden_size=48, intermediate_size=64, num_hidden_layers=3, num_attention_heads=3,
        q_lora_rank=24, kv_lora_rank=20, qk_nope_head_dim=12, qk_rope_head_dim=8, v_head_dim=10,
        index_n_heads=3, index_head_dim=16, index_topk=6, initializer_range=0.2)
    model = Transformer(Config(**(sizes | changes)), backend, attention, index_fp8)
    return model.to(device_of(backend))


def device_of(backend):
    """Where tests of a backend run: the kernels on a GPU, or on the CPU through Triton's interpreter."""
    return "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"


def packed_batch(backend="torch", B=2, S=32, vocab_size=61):
    """-> idx, targets (B,S) int64, first (B,S) int32: the last row holds two documents."""
    device = device_of(backend)
    first = torch.zeros(B, S, dtype=torch.int32, device=device)
    start = S * 5 // 8
    first[-1, start:] = start
    idx = torch.randint(0, vocab_size, (B, S), device=device)
    targets = torch.randint(0, vocab_size, (B, S), device=device)
    return idx, targets, first
