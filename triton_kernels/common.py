"""What all chapters use: how an operation is registered, what a device can do, and the small pieces of
kernels."""
import contextlib
import functools
import logging

import torch
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
LOWEST = tl.constexpr(-3.4028235e38)  # running maxima begin here: finite, so that they never make inf - inf
LOWEST_LSE = tl.constexpr(-1e30)  # the same for log-sum-exps, and on Hopper
SCALE_BLOCK = tl.constexpr(128)  # e4m3 values of an FP8 cache entry to a scale
QUERIES_AT_ONCE = tl.constexpr(1024)  # whose bounds `queries_seeing` compares in one step
DELTA_ROWS = 16  # of a program of `delta_kernel`
BELOW_A100 = 160_000  # bytes of shared memory: A100, H100 and B200 have more, smaller GPUs less
BELOW_H100 = 200_000  # H100 and B200 have more, an A100 less
PARTS_AT_ONCE = tl.constexpr(8)  # that `combine_kernel` adds up in one step


# ---- registration ----

LIBRARY = torch.library.Library("dsa", "FRAGMENT")  # beside lm_loss.py's


def on_device_of(x):
    """A context in which kernels go to x's device, whichever is current: Triton launches on the current
    one."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


class Operation:
    """torch.ops.dsa.<name>: what torch.library.custom_op makes, but a call takes the host 6 microseconds
    instead of 20, and the first of a process two seconds less, in which it would import torch's compiler.

    A launcher that writes into an argument refuses itself to be differentiated, and tells autograd of it by
    torch.autograd.graph.increment_version."""

    def __init__(self, name, launcher, mutates_args):
        schema = torch.library.infer_schema(launcher, mutates_args=mutates_args)
        LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
        LIBRARY.impl(name, launcher, "CompositeExplicitAutograd")
        self.name = f"{LIBRARY.ns}::{name}"
        self.overload = getattr(torch.ops.dsa, name).default
        self.backward = None
        self.setup_context = None
        if not mutates_args:
            torch.library.register_autograd(
                self.name, self.differentiate, setup_context=self.keep, lib=LIBRARY)

    def __call__(self, *args, **kwargs):
        return self.overload(*args, **kwargs)

    def register_fake(self, function):
        """Decorator: what a call returns, but for its numbers."""
        return torch.library.register_fake(self.name, function, lib=LIBRARY)

    def register_autograd(self, backward, *, setup_context):
        """As torch.library.register_autograd. An operation without refuses to be differentiated."""
        self.backward = backward
        self.setup_context = setup_context

    def keep(self, ctx, inputs, output):
        """For `differentiate`"""
        if self.setup_context is not None:
            self.setup_context(ctx, inputs, output)

    def differentiate(self, ctx, *grads):
        """The gradients of a call. RuntimeError: it has none."""
        if self.backward is None:
            raise RuntimeError(f"{self.name} has no gradient; call it under torch.no_grad()")
        return self.backward(ctx, *grads)


def operation(name, mutates_args=()):
    """Decorator: register a launcher as torch.ops.dsa.<name>, so that torch.compile passes through it and a
    graph can hold it -> Operation. Its kernels go to the device of its first argument."""

    def register(launcher):
        @functools.wraps(launcher)
        def on_device(*args, **kwargs):
            x = args[0] if args else next(iter(kwargs.values()))
            with on_device_of(x):
                return launcher(*args, **kwargs)

        return Operation(name, on_device, mutates_args)

    return register


# ---- the device, and arguments ----

def shared_memory(device):
    """Bytes of shared memory that a program may use; of the interpreter: plenty."""
    if device.type != "cuda":
        return 2**20
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def multiprocessors(device):
    """How many the device has; of the interpreter: few."""
    if device.type != "cuda":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def is_hopper(x):
    """Does this tensor lie on a Hopper GPU (sm_90)?"""
    return x.is_cuda and torch.cuda.get_device_capability(x.device)[0] == 9


@functools.cache
def has_fp8(device):
    """Does this GPU multiply e4m3 (sm_89 and newer)? If not, that is said in a log line, once."""
    has = torch.cuda.get_device_capability(device) >= (8, 9)
    if not has:
        logging.getLogger("kernels").warning(
            "%s has no FP8 tensor cores (they come with sm_89): e4m3 is multiplied as 16-bit floats",
            torch.cuda.get_device_name(device))
    return has


def fit(**tensors):
    """name=(tensor or None, shape): ValueError naming the first tensor that has another shape."""
    for name, (x, shape) in tensors.items():
        if x is not None and x.shape != shape:
            raise ValueError(
                f"{name} is {tuple(x.shape)} and should be {tuple(shape)} to fit the other arguments")


def check_indices(indices):
    """ValueError unless a selection is int32."""
    if indices.dtype != torch.int32:
        raise ValueError(f"indices are int32, not {indices.dtype}: pass indices.int()")


def unit_stride(x):
    """x with a last dimension of stride 1 and heads near enough for 32-bit offsets; copied if it has not."""
    near = x.dim() < 4 or x.shape[2] * x.stride(2) < 2**31
    return x if x.stride(-1) == 1 and near else x.contiguous()


def token_rows(x):
    """x (B,T,width) with the tokens of a sequence one behind the other -> x, tokens from a sequence to the
    next. A slice of a larger cache is such a tensor, and not copied: then these are the cache's capacity."""
    width = x.shape[2]
    if x.stride()[1:] != (width, 1) or x.stride(0) % width:
        x = x.contiguous()
    return x, x.stride(0) // width


def full_bounds(bound, B, S):
    """A bound of what queries see, None or broadcastable to (B,S), as contiguous (B,S) int32 or None."""
    return None if bound is None else bound.expand(B, S).int().contiguous()


def power_of_two(n, least=16):
    """The smallest power of two that is at least n and `least`."""
    return max(least, triton.next_power_of_2(n))


def two_powers(D):
    """A width as powers of two, so that 192 = 128 + 64 or 576 = 512 + 64 is not padded to 256 or 1024 ->
    (largest, rest or 0)."""
    large = max(16, 1 << (D.bit_length() - 1))
    return (large, power_of_two(D - large)) if D > large else (large, 0)


# ---- pieces of kernels ----

@triton.jit
def matmul(a, b, acc=None):
    """a @ b + acc in float32; float32 operands are not rounded to tf32."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(ptr, offset, ok, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Elements start : start + BLOCK_D of the rows that begin at ptr + offset, zero where the row is not ok
    or the column is not below D -> (rows, BLOCK_D)"""
    d = start + tl.arange(0, BLOCK_D)
    return tl.load(ptr + offset[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def store_tile(ptr, offset, ok, start, D: tl.constexpr, BLOCK_D: tl.constexpr, x):
    """x (rows, BLOCK_D) -> elements start : start + BLOCK_D of the rows that begin at ptr + offset, where the
    row is ok and the column below D"""
    d = start + tl.arange(0, BLOCK_D)
    tl.store(
        ptr + offset[:, None] + d[None, :], x.to(ptr.dtype.element_ty),
        mask=ok[:, None] & (d < D)[None, :])


@triton.jit
def load_bounds(first_ptr, last_ptr, b, s, S, T):
    """First and last key that the queries s of sequence b see, within 0..T-1; a query beyond S sees nothing.
    A pointer of None is causal with the queries at the end."""
    ok = s < S
    if first_ptr is None:
        first = s * 0  # the compiler knows that this is 0
    else:
        first = tl.maximum(tl.load(first_ptr + b.to(tl.int64) * S + s, mask=ok, other=0), 0)
    if last_ptr is None:
        last = tl.where(ok, T - S + s, -1)
    else:
        last = tl.load(last_ptr + b.to(tl.int64) * S + s, mask=ok, other=-1)
        last = tl.minimum(tl.maximum(last, -1), T - 1)
    return first, last


@triton.jit
def visible_range(first, last, T):
    """The range [lo, hi) of keys that any of the queries sees; empty: lo >= hi."""
    sees = first <= last
    return tl.min(tl.where(sees, first, T)), tl.max(tl.where(sees, last + 1, 0))


@triton.jit
def queries_seeing(first_ptr, last_ptr, b, t0, t1, s0, s1, S, T):
    """The smallest range [lo, hi) of queries within [s0, s1) that holds every query of sequence b seeing any
    of the keys [t0, t1), and mid: from there on all see all."""
    lo = s1
    hi = s0
    mid = s0
    for start in range(s0, s1, QUERIES_AT_ONCE):
        s = start + tl.arange(0, QUERIES_AT_ONCE)
        first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
        sees = (s < s1) & (first <= last) & (first < t1) & (last >= t0)
        lo = tl.minimum(lo, tl.min(tl.where(sees, s, s1)))
        block_hi = tl.max(tl.where(sees, s + 1, s0))
        # queries that see nothing do not count behind the last that sees, but between others
        if block_hi > s0:
            mid = tl.where((hi > s0) & (hi < start), start, mid)
            hi = block_hi
            all_of_them = sees & (first <= t0) & (last >= t1 - 1)
            mid = tl.maximum(mid, tl.max(tl.where(all_of_them | (s >= block_hi), s0, s + 1)))
    return lo, hi, mid


@triton.jit
def tile_of_program(
        S, first_block, blocks, key_blocks,
        BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, GROUP: tl.constexpr):
    """Which tile of a chunk this program makes -> block of the chunk, sequence, first query, first key. GROUP
    blocks of queries go side by side, so that their keys come from L2."""
    pid = tl.program_id(0)
    group = pid // (GROUP * key_blocks) * GROUP
    size = tl.minimum(GROUP, blocks - group)
    block = group + pid % (GROUP * key_blocks) % size
    per_sequence = tl.cdiv(S, BLOCK_S)
    b = (first_block + block) // per_sequence
    s0 = (first_block + block) % per_sequence * BLOCK_S
    t0 = pid % (GROUP * key_blocks) // size * BLOCK_T
    return block, b, s0, t0


@triton.jit
def e4m3_to_fp16(x):
    """e4m3 bits (uint8) -> the same numbers in fp16, exactly, for GPUs without FP8.

    s eeee mmm moves to s 0eeee mmm0000000: the value times 2^-8, as the exponent's bias is 15 there and 7
    here. 0x3c = 0 0111 100 (1.5) becomes 0x1e00 = 0 00111 1000000000 (1.5 * 2^-8); times 256 it is 1.5 again.
    Subnormals come out right by the same product."""
    bits = x.to(tl.int16)
    return (((bits & 0x80) << 8) | ((bits & 0x7f) << 7)).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def delta_kernel(
        out_ptr, dout_ptr, delta_ptr, lse_ptr, lse2_ptr,
        rows, S, H,
        V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_ROWS: tl.constexpr, HEADS_FIRST: tl.constexpr):
    """delta = out . dout per (query, head), what softmax's backward subtracts, of out and dout (B,S,H,V);
    with lse_ptr also lse in base 2. Written as (B,S,H), or HEADS_FIRST as (B,H,S)."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = row < rows
    offset = row.to(tl.int64) * V
    out = load_tile(out_ptr, offset, ok, 0, V, BLOCK_V).to(tl.float32)
    dout = load_tile(dout_ptr, offset, ok, 0, V, BLOCK_V).to(tl.float32)
    to = row
    if HEADS_FIRST:
        to = (row // H // S * H + row % H) * S + row // H % S
    tl.store(delta_ptr + to, tl.sum(out * dout, 1), mask=ok)
    if lse_ptr is not None:
        tl.store(lse2_ptr + to, tl.load(lse_ptr + row, mask=ok, other=0.0) * LOG2E, mask=ok)


def launch_delta(out, dout, lse=None, heads_first=False):
    """out, dout (B,S,H,V) contiguous, lse (B,S,H) -> delta and lse in base 2 (None without lse), (B,S,H) or
    (B,H,S) float32."""
    B, S, H, V = out.shape
    shape = (B, H, S) if heads_first else (B, S, H)
    delta = torch.empty(shape, dtype=torch.float32, device=out.device)
    lse2 = None if lse is None else torch.empty_like(delta)
    rows = B * S * H
    if rows:
        delta_kernel[(triton.cdiv(rows, DELTA_ROWS),)](
            out_ptr=out, dout_ptr=dout, delta_ptr=delta, lse_ptr=lse, lse2_ptr=lse2,
            rows=rows, S=S, H=H, V=V,
            BLOCK_V=power_of_two(V), BLOCK_ROWS=DELTA_ROWS, HEADS_FIRST=heads_first,
            num_warps=4)
    return delta, lse2


@triton.jit
def combine_kernel(
        part_ptr, part_lse_ptr, out_ptr, lse_ptr,
        rows, parts,
        V: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_PARTS: tl.constexpr):
    """out = sum_i exp(lse_i - lse) out_i over the parts of one row (query, head); nothing in any part: out 0,
    lse -inf."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK_PARTS).to(tl.int64)
    part_lse = tl.load(part_lse_ptr + i * rows + row, mask=i < parts, other=float("-inf"))
    top = tl.maximum(tl.max(part_lse), LOWEST_LSE)
    total = tl.sum(tl.exp(part_lse - top))
    v = tl.arange(0, BLOCK_V)
    acc = tl.zeros([BLOCK_V], tl.float32)
    for start in range(0, parts, PARTS_AT_ONCE):  # several, so that one row does not wait for the next
        j = start + tl.arange(0, PARTS_AT_ONCE)
        at = j.to(tl.int64) * rows + row
        weight = tl.exp(tl.load(part_lse_ptr + at, mask=j < parts, other=float("-inf")) - top)
        x = load_tile(part_ptr, at * V, j < parts, 0, V, BLOCK_V)
        acc += tl.sum(weight[:, None] * x, 0)
    empty = total == 0  # not: "unless total > 0", which would hide a NaN
    out = tl.where(empty, 0.0, acc / tl.where(empty, 1.0, total))
    tl.store(out_ptr + row * V + v, out.to(out_ptr.dtype.element_ty), mask=v < V)
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), top + tl.log(total)))


def launch_combine(part, part_lse, out, lse):
    """part (parts,B,S,H,V), part_lse (parts,B,S,H) float32 -> into out (B,S,H,V) and lse (B,S,H)."""
    parts, *_, V = part.shape
    combine_kernel[(lse.numel(),)](
        part_ptr=part, part_lse_ptr=part_lse, out_ptr=out, lse_ptr=lse,
        rows=lse.numel(), parts=parts, V=V,
        BLOCK_V=power_of_two(V), BLOCK_PARTS=power_of_two(parts, 1),
        num_warps=4)
