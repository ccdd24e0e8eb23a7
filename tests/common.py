"""What the tests measure with: one error measure, one poison."""
import torch

ROW_FLOOR = 0.1  # a row counts at least as so much of the mean row: where it cancels to nothing, rounding is all there is


def relative_errors(got, want):
    """Tensors (..., n) -> |got - want| / |want| of the whole tensor and of its worst row, in float64."""
    got = got.detach().double().flatten(0, -2)
    want = want.detach().double().flatten(0, -2)
    error = (got - want).norm(dim=-1)
    size = want.norm(dim=-1)
    tiny = torch.finfo(torch.float64).tiny
    whole = error.norm() / size.norm().clamp(min=tiny)
    worst = error / size.clamp(min=ROW_FLOOR * size.mean()).clamp(min=tiny)
    return whole.item(), worst.max().item()


def assert_close(got, want, whole, row, what=""):
    """Relative errors of at most `whole` and, of the worst row, `row`; NaN and infinities must stand in the
    same places."""
    assert got.shape == want.shape, f"{what}: {tuple(got.shape)} instead of {tuple(want.shape)}"
    got = got.detach().double().cpu()
    want = want.detach().double().cpu()
    special = ~want.isfinite()
    same = torch.where(special, got, 0.0), torch.where(special, want, 0.0)
    assert torch.equal(got.isfinite(), want.isfinite()), f"{what}: other places are not finite"
    assert torch.equal(same[0].nan_to_num(nan=7.0), same[1].nan_to_num(nan=7.0)), f"{what}: other infinities"
    if got.dim() < 2:
        got = got.reshape(1, -1)
        want = want.reshape(1, -1)
    errors = relative_errors(got.masked_fill(special.view_as(got), 0), want.masked_fill(special.view_as(want), 0))
    assert errors[0] <= whole and errors[1] <= row, f"{what}: {errors[0]:.1e} / {errors[1]:.1e} beyond {whole} / {row}"


def poison():
    """Fill what the allocator hands out next with NaN: a kernel that leaves a hole shows it."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    blocks = [torch.full((size,), float("nan"), device=device) for size in (2**8, 2**12, 2**16, 2**20)]
    del blocks
