"""Chapter 1: the lightning indexer. Quantise its vectors, score every key for every query, select the best
keys, exactly and in the same way in every run.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from indexer import check_rotation
from triton_kernels.common import (
    e4m3_to_fp16, fit, full_bounds, has_fp8, load_bounds, multiprocessors, operation, power_of_two,
    shared_memory, unit_stride, visible_range)

# float32 as integers of the same order, see `ordered`
INFINITY = tl.constexpr(0x7f800000)
MINUS_INFINITY = tl.constexpr(-0x7f800001)
LEAST = tl.constexpr(-0x7f800000)  # finite
HIGHEST = tl.constexpr(0x7fffffff)  # every NaN
NOT_A_SCORE = tl.constexpr(-0x80000000)  # less than any float

# quantise
QUANTISE_ELEMENTS = 4096  # of a program

# index_scores
COLUMNS = 256  # queries x heads that a program keeps; fewer where they are wide
PROGRAMS = 16  # per multiprocessor, between which the keys are split
LEAST_SPAN = 256  # keys of a program
LONGEST_SPAN = 8192
FLOAT_TILE_BYTES = 140 * 1024  # of shared memory, that a float32 tile of 64 keys needs

# topk
DIRECT_ROW = 2048  # scores up to which all of a row are candidates
ALIGNED_ROW = 16  # to a multiple of which such rows are padded, longer ones to LARGE_TILE: 64 bytes
SAMPLES = {4096: 512, 16384: 1024, 65536: 2048}  # scores of a sample by the longest row
LONG_ROW_SAMPLE = 8192  # and of longer rows
SECTION = 8192  # scores that a program looks for candidates in, at least, where several share a row
SECTION_TILE = 2048  # of which it compares so many at once
LEAST_SECTIONS = 4  # of a row; fewer do not pay
MOST_SECTIONS = 32  # more take longer to join than they save
MIDDLE_ROW = 16384  # up to which a row is scanned in smaller pieces
LEAST_CAP = 1024  # candidates that a program has room for
GUESS_SIGMAS = tl.constexpr(4.0)  # by which a row's sample may err without another guess
GUESSES = tl.constexpr(3)  # by the sample
SKEWNESS = tl.constexpr(3)  # hits more than sigmas say, where few are expected
SAMPLE_RUN = tl.constexpr(8)  # neighbouring scores of a sample, as many as memory reads at once
LARGEST_RANK = tl.constexpr(0.9)  # of the sample
LARGE_TILE = 4096  # scores that are compared at once, at most

# select
SELECT_CHUNK = 2**28  # scores that are held at a time, 1 GB; processors idle at the end of each chunk
CHUNK_QUERIES = 256  # of a sequence that a chunk of several sequences has at least
SIGMAS = tl.constexpr(4.5)  # by which the filter's sample may err before the row is left over
SAMPLED_HITS = 32  # of the K best that this sample should hold
SAMPLED_STRIDE = 8  # keys of which at most one is sampled
LARGEST_SAMPLE = 32768  # keys that a program compares at once, in registers
WORDS_AT_ONCE = tl.constexpr(1024)  # of the filter's bits
REGISTERS = 65536  # of a multiprocessor


class FilterRegime(NamedTuple):
    """Where `select` filters instead of keeping scores."""
    pairs: int  # of a query and a key of a sequence; the host has to read whether rows are left over
    keys: int  # at least, that a query sees in the mean
    keys_per_topk: int  # at least, of the same
    most_keys: int  # a larger sample does not fit a program
    most_topk: int
    most_heads: int  # of the indexer: what is saved is memory traffic, not products


SELECT_FILTER = FilterRegime(
    pairs=2**29, keys=3 * 2**14, keys_per_topk=64, most_keys=2**20, most_topk=1024, most_heads=4)


# ---- quantise ----
# contract    kernels.quantise
# in PyTorch  indexer.quantise
# equation    y = Hadamard x (rotate);  scale = max(amax |y|, 1e-4) / 448, rounded up to 2^n (ue8m0);
#             value = e4m3(y / scale)
# tiling      a program takes BLOCK_ROWS vectors with all their dimensions. A butterfly splits and joins a
#             dimension of length 2, in registers. Scales and values are rounded with integers, not by casts:
#             the same bits on every GPU (below sm_89 there is no cast to e4m3) and in the interpreter
# FLOPs       some 25 per element
# bytes       per element its size read and 1 written, 4 per block: bound by memory


@triton.jit
def power_of_two_above(x):
    """float32 x > 0 -> the smallest power of two that is at least x.

    A float is exponent and mantissa, and a power of two has mantissa 0. 0x7fffff, all ones in the mantissa,
    carries into the exponent unless the mantissa is 0; then the mantissa is cleared. 3.0 = 0x40400000 becomes
    0x40bfffff, then 0x40800000 = 4.0; 2.0 = 0x40000000 becomes 0x407fffff, then 0x40000000 = 2.0 again."""
    bits = x.to(tl.int32, bitcast=True)
    return ((bits + 0x7fffff) & 0x7f800000).to(tl.float32, bitcast=True)


@triton.jit
def e4m3_bits(x):
    """float32 x, of at most 448 but for rounding -> e4m3 bits (int32), to nearest even; NaN stays NaN.

    Normal numbers: s eeeeeeee mmm|mmmmmmmmmmmmmmmmmmmm keeps 3 of 23 bits of mantissa. To add 0x7ffff, and 1
    if the last kept bit is odd, carries into it exactly if what is dropped is more than half, or is half and
    the bit is odd: 17.0 = 0x41880000, halfway between 16 and 18, gives 0x418|fffff = 16; 19.0 = 0x41980000,
    between 18 and 20, gives 0x41a|00000 = 20. The exponent's bias shrinks from 127 to 7.

    Below 2^-6 = 0x3c800000 e4m3 counts in units of 2^-9, the last place of a float32 near 2^14 = 0x46800000:
    adding 2^14 rounds, and what then stands in the mantissa is the count. 0.01 = 5.12 * 2^-9 gives 5.

    As an integer NaN is more than 480 = 0x43f00000, and 480 would be what e4m3 calls NaN, 0x7f."""
    bits = x.to(tl.int32, bitcast=True)
    size = tl.minimum(bits & 0x7fffffff, 0x43f00000)
    normal = ((size + 0x7ffff + ((size >> 20) & 1)) >> 20) - ((127 - 7) << 3)
    tiny = (size.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000
    return tl.where(size < 0x3c800000, tiny, normal) | ((bits >> 24) & 0x80)


@triton.jit
def e4m3_of(y, UE8M0: tl.constexpr):
    """y (..., n) float32 -> e4m3 bits (..., n) int32, a scale for each vector (...)"""
    LAST: tl.constexpr = len(y.shape) - 1
    # the largest is found among integers, of which a NaN is larger than infinity
    amax = tl.max(y.to(tl.int32, bitcast=True) & 0x7fffffff, LAST)
    scale = tl.maximum(amax.to(tl.float32, bitcast=True), 1e-4) * (1 / 448)
    if UE8M0:
        scale = power_of_two_above(scale)
    scale = tl.where(amax < INFINITY, scale, float("nan"))
    return e4m3_bits(tl.div_rn(y, tl.broadcast_to(tl.expand_dims(scale, LAST), y.shape))), scale


@triton.jit
def hadamard(x, root, LOG_D: tl.constexpr):
    """x (rows, 2^LOG_D) -> its orthonormal Walsh-Hadamard transform, rounded to x's dtype. root: D^-0.5"""
    ROWS: tl.constexpr = x.shape[0]
    D: tl.constexpr = x.shape[1]
    y = x.to(tl.float32)
    for i in tl.static_range(LOG_D):
        pairs = tl.reshape(y, [ROWS, D >> (i + 1), 2, 1 << i])
        a, b = tl.split(tl.permute(pairs, [0, 1, 3, 2]))
        pairs = tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2])
        y = tl.reshape(pairs, [ROWS, D])
    return (y * root).to(x.dtype)


@triton.jit
def quantise_kernel(
        x_ptr, values_ptr, scales_ptr,
        rows, D, root,
        BLOCK_ROWS: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr,
        LOG_D: tl.constexpr, ROTATE: tl.constexpr, UE8M0: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    d = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (d < D)[None, :]
    x = tl.load(x_ptr + row[:, None] * D + d[None, :], mask=mask, other=0.0)

    if ROTATE:
        x = hadamard(x, root, LOG_D)
    values, scale = e4m3_of(tl.reshape(x.to(tl.float32), [BLOCK_ROWS, BLOCK_D // BLOCK, BLOCK]), UE8M0)
    block = tl.arange(0, BLOCK_D // BLOCK)
    tl.store(scales_ptr + row[:, None] * BLOCKS + block[None, :], scale,
             mask=(row < rows)[:, None] & (block < BLOCKS)[None, :])
    values = tl.reshape(values, [BLOCK_ROWS, BLOCK_D])
    tl.store(values_ptr + row[:, None] * D + d[None, :], values.to(tl.uint8), mask=mask)


@operation("quantise")
def quantise_operation(x: Tensor, block: int, rotate: bool, ue8m0: bool) -> tuple[Tensor, Tensor]:
    """Arguments and results of kernels.quantise, block at most d"""
    x = x.contiguous()
    D = x.shape[-1]
    rows = x.numel() // D
    blocks = triton.cdiv(D, block)
    padded_block = triton.next_power_of_2(block)
    padded_d = padded_block * triton.next_power_of_2(blocks)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], blocks), dtype=torch.float32, device=x.device)
    if rows:
        share = triton.next_power_of_2(max(1, rows // (4 * multiprocessors(x.device))))
        block_rows = max(1, min(QUANTISE_ELEMENTS // padded_d, share))
        quantise_kernel[(triton.cdiv(rows, block_rows),)](
            x_ptr=x, values_ptr=values.view(torch.uint8), scales_ptr=scales,
            rows=rows, D=D, root=D**-0.5,
            BLOCK_ROWS=block_rows, BLOCK_D=padded_d, BLOCK=padded_block, BLOCKS=blocks,
            LOG_D=padded_d.bit_length() - 1, ROTATE=rotate, UE8M0=ue8m0,
            num_warps=4 if block_rows * padded_d >= QUANTISE_ELEMENTS // 2 else 1)
    return values, scales


@quantise_operation.register_fake
def _(x, block, rotate, ue8m0):
    blocks = -(-x.shape[-1] // block)
    values = x.new_empty(x.shape, dtype=torch.float8_e4m3fn)
    return values, x.new_empty((*x.shape[:-1], blocks), dtype=torch.float32)


@torch.no_grad()
def quantise(x, block=128, rotate=False, ue8m0=True):
    """What kernels.quantise promises: shapes, dtypes and errors stand there."""
    D = x.shape[-1]
    if rotate:
        check_rotation(D)
    block = min(block, D)
    if block < D and block & (block - 1):
        raise ValueError(f"block={block} is not a power of two and smaller than d={D}; choose 32, 64 or 128")
    return quantise_operation(x, block, rotate, ue8m0)


# ---- index_scores ----
# contract    kernels.index_scores
# in PyTorch  indexer.index_scores
# equation    I[t,s] = k_scale[s] sum_j w[t,j] relu(q[t,j] . k[s])
# tiling      a program keeps BLOCK_S queries x BLOCK_H heads, up to 256 columns, and streams `span` keys,
#             BLOCK_T at a time, as the rows of tl.dot(keys, queries^T). Tiles that none of its queries sees
#             are skipped: -inf with FILL; without it, what a query does not see is left undefined. With
#             thresholds, two bits per pair are stored instead of a score, for `select`. BLOCK > 1: of so many
#             neighbouring keys the highest score alone is stored, for `select_by_blocks`. WHOLE: no tile
#             reaches beyond the keys, and no load is masked. On Hopper instructions are the limit, and the
#             power they take: every mask counts
# FLOPs       2 HI DI per pair on the tensor cores, 2 HI (maximum, multiply-add) beside them
# bytes       4 per pair, as bits 1/4; keys once per BLOCK_S queries, mostly from L2
#
# Which thread holds what. Of every 8 columns of tl.dot's result a tensor core hands two neighbours to each
# of four threads. The columns are dealt to the queries such that those of a thread belong to one query;
# four queries a, b, c, d of four heads:
#
#     column   0  1   2  3   4  5   6  7   8  9  10 11  12 13  14 15
#     thread   0  0   1  1   2  2   3  3   0  0   1  1   2  2   3  3
#     query    a  a   b  b   c  c   d  d   a  a   b  b   c  c   d  d
#     head     0  1   0  1   0  1   0  1   2  3   2  3   2  3   2  3
#
# So relu, weight and the sum over heads stay inside a thread. Four warps compute 128 of the columns, which
# must hold all heads of their queries: with 64 heads, two queries take turns, and two threads share one.


@triton.jit
def dealt_columns(BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, TURN: tl.constexpr):
    """-> query, head of each column as in the picture, where TURN (here 4) queries take turns"""
    column = tl.arange(0, BLOCK_S * BLOCK_H)
    query = column // (TURN * BLOCK_H) * TURN + column // 2 % TURN
    head = column // (2 * TURN) % (BLOCK_H // 2) * 2 + column % 2
    return query, head


@triton.jit
def score_keys(
        k, q, w, h,
        HI: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, TURN: tl.constexpr,
        DECODE_E4M3: tl.constexpr):
    """sum_j w_j relu(k . q_j) of keys k (n, BLOCK_D) and columns q (BLOCK_S * BLOCK_H, BLOCK_D), of heads h
    and weights w -> (n, BLOCK_S)"""
    if DECODE_E4M3:
        k = e4m3_to_fp16(k)
    # float32 as three products of tf32: nearly its precision, on the tensor cores; "ieee" would leave them
    score = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    score = tl.maximum(score, 0.0, propagate_nan=tl.PropagateNan.ALL)
    if HI != BLOCK_H:
        score = tl.where((h < HI)[None, :], score, 0.0)  # no head: 0 times an infinite key would be NaN
    score = score * w[None, :]
    score = tl.reshape(score, [k.shape[0], BLOCK_S // TURN, BLOCK_H // 2, TURN, 2])
    score = tl.permute(score, [0, 1, 3, 2, 4])
    return tl.sum(tl.reshape(score, [k.shape[0], BLOCK_S, BLOCK_H]), 2)


@triton.jit
def higher_or_nan(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def fill_tiles(out_row_ptr, begin, end, stop, ok, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr):
    """-inf to the tiles of keys that start in [begin, end), up to `stop`"""
    unseen = tl.full([BLOCK_T, BLOCK_S], float("-inf"), tl.float32)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        tl.store(out_row_ptr[None, :] + t[:, None], unseen, mask=ok[None, :] & (t < stop)[:, None])


@triton.jit
def scores_kernel(
        q_ptr, k_ptr, w_ptr, k_scale_ptr, threshold_ptr, first_ptr, last_ptr, out_ptr,
        S, T, first_row, rows, width, span,
        stride_kb, stride_kt, stride_sb, stride_st,
        HI: tl.constexpr, DI: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
        TURN: tl.constexpr, DECODE_E4M3: tl.constexpr, FILL: tl.constexpr, WHOLE: tl.constexpr,
        BLOCK: tl.constexpr):
    b = tl.program_id(2).to(tl.int64)
    tile = tl.program_id(0) * BLOCK_S
    end = tl.minimum(first_row + rows, S)

    # what is kept: a column per query and head
    s, h = dealt_columns(BLOCK_S, BLOCK_H, TURN)
    s += first_row + tile
    d = tl.arange(0, BLOCK_D)
    ok = (s < end) & (h < HI)
    at = (b * S + s) * HI + h
    q = tl.load(q_ptr + at[:, None] * DI + d[None, :], mask=ok[:, None] & (d < DI)[None, :], other=0.0)
    w = tl.load(w_ptr + at, mask=ok, other=0.0)
    if DECODE_E4M3:
        q = e4m3_to_fp16(q)

    # what the queries see, within this program's span
    r = tl.arange(0, BLOCK_S)
    s = first_row + tile + r
    ok = s < end
    first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
    lo, hi = visible_range(first, tl.where(ok, last, -1), T)
    begin = tl.program_id(1) * span
    stop = tl.minimum(begin + span, T)
    lo = tl.maximum(lo // BLOCK_T * BLOCK_T, begin)
    hi = tl.minimum(hi, stop)

    out_row_ptr = out_ptr + (b * rows + tile + r) * width
    if threshold_ptr is not None:
        threshold = tl.load(threshold_ptr + b * rows + tile + r, mask=ok, other=0.0)
        word = tl.arange(0, BLOCK_T // 16)
        tile_words_ptr = out_ptr + (b * tl.num_programs(0) + tl.program_id(0)) * width * BLOCK_S
        words_ptr = tile_words_ptr + r[None, :] * (BLOCK_T // 16) + word[:, None]
    if FILL:
        behind = lo + tl.cdiv(tl.maximum(hi - lo, 0), BLOCK_T) * BLOCK_T
        fill_tiles(out_row_ptr, begin, tl.minimum(lo, stop), stop, ok, BLOCK_T, BLOCK_S)
        fill_tiles(out_row_ptr, tl.maximum(begin, behind), stop, stop, ok, BLOCK_T, BLOCK_S)

    # a tile of keys at a time; the scales of the next one are loaded behind this one's products, so that
    # nothing waits for them
    t_tile = tl.arange(0, BLOCK_T)
    if k_scale_ptr is not None:
        k_scale_ptr += b * stride_sb
        scale = tl.load(k_scale_ptr + (lo + t_tile).to(tl.int64) * stride_st, mask=lo + t_tile < T, other=0.0)
    for t0 in tl.range(lo, hi, BLOCK_T):
        t = t0 + t_tile
        k_tile = k_ptr + b * stride_kb + t.to(tl.int64)[:, None] * stride_kt + d[None, :]
        if WHOLE:
            k = tl.load(k_tile)
        else:
            k = tl.load(k_tile, mask=(t < T)[:, None] & (d < DI)[None, :], other=0.0)
        score = score_keys(k, q, w, h, HI, BLOCK_S, BLOCK_H, TURN, DECODE_E4M3)  # (BLOCK_T, BLOCK_S)
        if k_scale_ptr is not None:
            score = score * scale[:, None]
            ahead = t + BLOCK_T
            scale = tl.load(k_scale_ptr + ahead.to(tl.int64) * stride_st, mask=ahead < T, other=0.0)
        if threshold_ptr is not None:
            # 16 keys a word: bit 16 + i says that key i is above the threshold, bit i that it reaches it;
            # NaN does both. t0 is a multiple of 16: t_tile stands for t
            reaches = (1 << (t_tile % 16))[:, None]
            bits = tl.where(
                score <= threshold[None, :],
                tl.where(score < threshold[None, :], 0, reaches),
                reaches | (reaches << 16))
            tl.store(
                words_ptr + t0 // 16 * BLOCK_S,
                tl.sum(tl.reshape(bits, [BLOCK_T // 16, 16, BLOCK_S]), 1))
        elif BLOCK > 1:
            score = tl.reshape(score, [BLOCK_T // BLOCK, BLOCK, BLOCK_S])
            n = t0 // BLOCK + tl.arange(0, BLOCK_T // BLOCK)
            tl.store(
                out_row_ptr[None, :] + n[:, None], tl.reduce(score, 1, higher_or_nan),
                mask=ok[None, :] & (n < tl.cdiv(T, BLOCK))[:, None])
        else:
            if FILL:
                seen = (t[:, None] >= first[None, :]) & (t[:, None] <= last[None, :])
                score = tl.where(seen, score, float("-inf"))
            tl.store(out_row_ptr[None, :] + t[:, None], score, mask=ok[None, :] & (t < T)[:, None])


class IndexTiles(NamedTuple):
    """Of scores_kernel."""
    block_s: int  # queries
    block_h: int  # heads of each
    block_d: int
    block_t: int  # keys of a step
    turn: int  # queries that take turns, see the picture
    num_stages: int
    num_warps: int


def index_tiles(HI, DI, rows, dtype, device):
    """Tiles for q (B,S,HI,DI), `rows` of its S queries at a time; e4m3 that is decoded comes as uint8."""
    size = 2 if dtype == torch.uint8 else dtype.itemsize  # of an operand, in bytes
    block_h = power_of_two(HI, 2)
    block_d = power_of_two(DI, 32 if size == 1 else 16)
    columns = max(block_h, COLUMNS if size * block_d <= 128 else COLUMNS // size)
    block_s = max(16 // block_h, 1, min(columns // block_h, triton.next_power_of_2(rows)))
    small = size == 4 and shared_memory(device) < FLOAT_TILE_BYTES
    tiles = IndexTiles(
        block_s=block_s, block_h=block_h, block_d=block_d, block_t=32 if small else 64,
        turn=max(1, min(4, block_s, 128 // block_h)),
        num_stages=4 if size == 1 else 3,
        num_warps=8 if block_s * block_h == COLUMNS else 4)
    if rows == 1 and size == 1:  # decoding reads keys as fast as memory gives them
        return tiles._replace(block_t=128, num_stages=3, num_warps=8 if block_h >= 64 else 4)
    return tiles


def keys_per_program(pairs, block_t, device):
    """Keys that one program scores for its tile of queries; pairs: of a tile and a key, in the whole
    launch."""
    span = triton.cdiv(pairs, PROGRAMS * multiprocessors(device))
    return min(max(triton.cdiv(span, block_t) * block_t, LEAST_SPAN), LONGEST_SPAN)


def launch_scores(
        out, q, k, w, k_scale, first, last, first_row, rows, fill=False, threshold=None, block=1):
    """Scores of the queries first_row..first_row+rows into out (B,rows,width >= T); without fill, what a
    query does not see is undefined. With threshold (B,rows), bits instead: a word of out (B,queries,width)
    per 16 keys, in the order sequence, tile of block_s queries, tile of block_t keys, query, word. With
    block, of so many keys, at most 64, the highest scores: out (B,rows,width >= T / block)."""
    B, S, HI, DI = q.shape
    T = k.shape[1]
    tiles = index_tiles(HI, DI, rows, q.dtype, q.device)
    block_t = max(tiles.block_t, block)
    blocks = triton.cdiv(rows, tiles.block_s)
    span = keys_per_program(B * blocks * T, block_t, q.device)
    stride_sb, stride_st = (0, 0) if k_scale is None else k_scale.stride()
    scores_kernel[(blocks, triton.cdiv(T, span), B)](
        q_ptr=q, k_ptr=k, w_ptr=w, k_scale_ptr=k_scale, threshold_ptr=threshold,
        first_ptr=first, last_ptr=last, out_ptr=out,
        S=S, T=T, first_row=first_row, rows=rows, width=out.shape[2], span=span,
        stride_kb=k.stride(0), stride_kt=k.stride(1), stride_sb=stride_sb, stride_st=stride_st,
        HI=HI, DI=DI, BLOCK_S=tiles.block_s, BLOCK_H=tiles.block_h, BLOCK_D=tiles.block_d,
        BLOCK_T=block_t, TURN=tiles.turn, DECODE_E4M3=q.dtype == torch.uint8, FILL=fill,
        WHOLE=T % block_t == 0 and DI == tiles.block_d, BLOCK=block,
        num_stages=tiles.num_stages if block_t == tiles.block_t else 1, num_warps=tiles.num_warps)


def check_inputs(q, k, w, k_scale):
    """ValueError unless the types and shapes of `index_scores` fit."""
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} but k is {k.dtype}: quantise both or neither")
    if not q.is_floating_point():
        raise ValueError(f"q is {q.dtype}: the indexer's vectors are floating point, e4m3 included")
    if (q.dtype == torch.float8_e4m3fn) != (k_scale is not None):
        raise ValueError(f"k is {k.dtype} and k_scale is {'None' if k_scale is None else 'given'}: "
                         "e4m3 keys need their scales, float keys have none")
    B, S, HI, DI = q.shape
    T = k.shape[1]
    fit(k=(k, (B, T, DI)), w=(w, (B, S, HI)), k_scale=(k_scale, (B, T)))


def operands(q, k, w):
    """q, k, w as the kernels address them; e4m3 as bytes where the GPU cannot multiply it."""
    if q.dtype == torch.float8_e4m3fn and q.is_cuda and not has_fp8(q.device):
        q = q.view(torch.uint8)
        k = k.view(torch.uint8)
    return q.contiguous(), unit_stride(k), w.float().contiguous()


@operation("index_scores")
def index_scores_operation(
        q: Tensor, k: Tensor, w: Tensor, k_scale: Tensor | None, first: Tensor | None,
        last: Tensor | None) -> Tensor:
    """Arguments as kernels.index_scores, first and last (B,S) contiguous int32 -> (B,S,T) float32"""
    q, k, w = operands(q, k, w)
    B, S = q.shape[:2]
    T = k.shape[1]
    scores = torch.empty(B, S, T, dtype=torch.float32, device=q.device)
    if scores.numel():
        launch_scores(scores, q, k, w, k_scale, first, last, 0, S, fill=True)
    return scores


@index_scores_operation.register_fake
def _(q, k, w, k_scale, first, last):
    return q.new_empty(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32)


@torch.no_grad()
def index_scores(q, k, w, k_scale=None, first=None, last=None):
    """What kernels.index_scores promises: shapes, dtypes and errors stand there."""
    check_inputs(q, k, w, k_scale)
    B, S = q.shape[:2]
    return index_scores_operation(q, k, w, k_scale, full_bounds(first, B, S), full_bounds(last, B, S))


# ---- topk ----
# contract    kernels.topk
# letters     v scores as ordered integers, t a threshold of them (elsewhere a key), p positions, n scores
# in PyTorch  scores.sort(-1, descending=True, stable=True).indices[..., :K].sort(-1), but -1 for -inf
# tiling      a program per row, several rows one after the other, finds the K best in one reading:
#             guess   a threshold from a sample spread over the row, such that K..CAP scores reach it, mostly
#             gather  the positions of these candidates: two steps per piece of the row, a bit per score, then
#                     a scan over the words' popcounts, after which each word writes its positions in order
#             finish  the exact K-th value among the candidates by counting, then a rank for each by one scan:
#                     the higher ones and the first ties
#             A row of at most CAP visible scores is its own list of candidates. Where relu makes many exact
#             zeros the sample shows that the K-th value is tied. Then two bits per score are kept, and of the
#             ties only the first K become candidates. A guess that misses narrows the range of the next one.
#             Of few long rows programs of their own gather the sections, each by the same first guess
# FLOPs       some 6 per score, 20 counts of sample and candidates. Neither they nor the bytes bound it, but
#             the waits between its steps: what counts is how many loads are under way, and how many programs
#             take turns
# bytes       4 per score, read once, and once more where 32 bytes hold a candidate; the sample, of a section
#             anew


@triton.jit
def ordered(x):
    """float32 -> int32 in the same order; -0.0 counts as 0.0, and NaN, of either sign, is HIGHEST.

    As integers, positive floats have their order: 1.0 = 0x3f800000 < 2.0 = 0x40000000. Negative ones have the
    reverse, -1.0 = 0xbf800000 > -2.0 = 0xc0000000 as bits, so all of their bits but the sign are flipped."""
    bits = (x + 0.0).to(tl.int32, bitcast=True)
    bits = tl.where(bits < 0, bits ^ 0x7fffffff, bits)
    return tl.where(x == x, bits, HIGHEST)


@triton.jit
def unordered(t):
    """The float32 that `ordered` makes t, at most INFINITY"""
    return tl.where(t < 0, t ^ 0x7fffffff, t).to(tl.float32, bitcast=True)


@triton.jit
def popcount(x):
    """Set bits of an int32. Sums of neighbouring bits, of pairs, of fours, in place; then the four bytes are
    summed into the highest by a product. 0b1011: pairs 10 and 11 become 01 and 10, their sum 0011 is 3."""
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0f0f0f0f
    return ((x * 0x01010101) >> 24) & 0xff


@triton.jit
def kth_value(v, k, lo, hi, at_lo, slack):
    """A t in [lo, hi] with k <= count(v >= t) <= k + slack if there is one, else, v being tied, the largest t
    with count(v >= t) >= k -> t, count(v >= t) and, where that is above k + slack, count(v > t).

    Given at_lo = count(v >= lo) >= k, and no v above hi. If at_lo < k: lo."""
    above_hi = 0
    bisect = 0

    # zero first, where relu makes ties; besides, hi - lo fits an int32 afterwards
    if (lo < 1) & (hi >= 1):
        count = tl.sum((v >= 1).to(tl.int32), 0)
        if count >= k:
            lo = 1
            at_lo = count
        else:
            hi = 0
            above_hi = count
            count = tl.sum((v >= 0).to(tl.int32), 0)
            if count >= k:
                lo = 0
                at_lo = count
            else:
                hi = -1
                above_hi = count

    # narrow [lo, hi], count(v >= lo) >= k > count(v > hi), by regula falsi and by bisection in turn
    if at_lo <= k + slack:
        hi = lo
    while lo < hi:
        step = (hi - lo) >> 1
        if bisect == 0:
            share = (at_lo - k).to(tl.float32) / (at_lo - above_hi).to(tl.float32)
            step = ((hi - lo).to(tl.float32) * share).to(tl.int32)
        mid = lo + 1 + tl.minimum(step, hi - lo - 1)
        count = tl.sum((v >= mid).to(tl.int32), 0)
        if count >= k:
            lo = mid
            at_lo = count
            if count <= k + slack:
                hi = mid
        else:
            hi = mid - 1
            above_hi = count
        bisect = 1 - bisect
    return lo, at_lo, above_hi


@triton.jit
def positions_of_bits(to_ptr, p, above, ties, higher, equal, need, most):
    """Bit i of the words above[j] and ties[j] stands for position p[j] + i; positions ascend with j, and no
    bit is set in both. Write at to_ptr, ascending, the positions of all bits of `above` and of the first
    `need` bits of `ties` (None: of none), the first `most` of them; higher and equal bits of either kind came
    before -> higher, equal, these included."""
    # where each word begins to write: behind the bits of all words before it
    if ties is None:
        word = above
        count = popcount(word)
        at = higher + tl.cumsum(count, 0) - count
        higher += tl.sum(count, 0)
    else:
        count = (popcount(above) << 16) + popcount(ties)  # two counts in one scan: below 2^15 each
        before = tl.cumsum(count, 0) - count
        count = tl.sum(count, 0)
        ties_before = equal + (before & 0xffff)
        at = higher + (before >> 16) + tl.minimum(ties_before, need)
        word = above | tl.where(ties_before < need, ties, 0)
        higher += count >> 16
        equal += count & 0xffff

    # all words write their lowest bit, and clear it, until none is left. A word's lowest bit, word & -word,
    # is a power of two, and which one says its exponent as a float: 0b1010100 & -0b1010100 = 4, and 4.0 has
    # exponent 127 + 2: bit 2. (Bit 31 is -2^31, whose sign is cut off.)
    for _ in range(tl.max(popcount(word), 0)):
        low = word & -word
        i = ((low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127
        if ties is None:
            tl.store(to_ptr + at, p + i, mask=(word != 0) & (at < most))
            at += 1
        else:
            tied = ((low & ties) != 0).to(tl.int32)
            ok = (word != 0) & ((tied == 0) | (ties_before < need))
            tl.store(to_ptr + at, p + i, mask=ok & (at < most))
            at += ok.to(tl.int32)
            ties_before += tied
        word &= word - 1
    return higher, equal


@triton.jit
def bits_between(first, last, p, BITS: tl.constexpr):
    """Bit i of a word of BITS bits, 16 or 32, stands for position p + i: which lie in first..last? For p = 0,
    first = 2, last = 12, of 16: 0xfffc & 0x1fff."""
    if BITS == 16:
        from_first = 0xffff << tl.minimum(tl.maximum(first - p, 0), 16)
        to_last = 0xffff >> tl.minimum(tl.maximum(p + 15 - last, 0), 16)
    else:  # no shift by 32, which is undefined: -2 and 2 are shifted once already
        from_first = tl.where(p < first, -2 << tl.minimum(tl.maximum(first - p - 1, 0), 31), -1)
        to_last = (2 << tl.minimum(tl.maximum(last - p, 0), 31)) - 1
    return from_first & to_last


@triton.jit
def gather(
        scores_row_ptr, bitmap_ptr, to_ptr,
        first, last, width, t, need,
        CAP: tl.constexpr, WORDS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr, TIES: tl.constexpr,
        STAGES: tl.constexpr):
    """Write the positions first..last of scores >= t at to_ptr, ascending, the first CAP of them -> their
    number, 0. TIES: all positions of scores > t, and of scores = t the first `need` -> the numbers of both. t
    is an ordered integer, up to INFINITY without TIES."""
    BITS: tl.constexpr = 16 if TIES else 32  # positions of a word
    bit = tl.arange(0, BITS)[None, :]
    group = tl.arange(0, TILE // BITS)
    score_at_t = unordered(t)
    higher = 0
    equal = 0
    for start in range(first // TILE * TILE, last + 1, BITS * WORDS):
        # compare: a word per BITS positions
        end = tl.minimum(start + BITS * WORDS, last + 1)
        for piece in tl.range(start, end, TILE, num_stages=STAGES):
            p = tl.multiple_of(piece, TILE) + group[:, None] * BITS + bit  # (TILE / BITS, BITS)
            if MASKED:
                v = tl.load(scores_row_ptr + p, mask=p < width, other=float("-inf"))
            else:
                v = tl.load(scores_row_ptr + p)
            if TIES:
                v = ordered(v)
                flags = tl.where(v > t, 0x10000, tl.where(v == t, 1, 0))
            else:
                flags = tl.where(v < score_at_t, 0, 1)  # NaN is above any
            tl.store(bitmap_ptr + (piece - start) // BITS + group, tl.sum(flags << bit, 1))
        tl.debug_barrier()

        # write the positions, but none outside first..last
        p = start + tl.arange(0, WORDS) * BITS
        word = tl.load(bitmap_ptr + tl.arange(0, WORDS), mask=p <= last, other=0, cache_modifier=".cg")
        seen = bits_between(first, last, p, BITS)
        if TIES:
            higher, equal = positions_of_bits(
                to_ptr, p, (word >> 16) & seen, word & seen, higher, equal, need, CAP)
        else:
            higher, equal = positions_of_bits(to_ptr, p, word & seen, None, higher, equal, 0, CAP)
        tl.debug_barrier()
    return higher, equal


@triton.jit
def candidates(scratch_row_ptr, first, slot, ok, gathered, DIRECT: tl.constexpr):
    """Positions of candidates, by slot: as gathered, or all of a row."""
    p = first + slot
    if not DIRECT:
        if gathered:
            p = tl.load(scratch_row_ptr + slot, mask=ok, other=0, cache_modifier=".cg")
    return p


@triton.jit
def empty_slots(out_row_ptr, n, K, BLOCK_K: tl.constexpr):
    """-1 to the slots n..K-1 of a row of selections"""
    slot = tl.arange(0, BLOCK_K)
    tl.store(out_row_ptr + slot, -1, mask=(slot >= n) & (slot < K))


@triton.jit
def store_selection(out_row_ptr, place, p, chosen, able, K, BLOCK_K: tl.constexpr):
    """The positions p that are chosen to their places in a row of selections, which `able` could have."""
    tl.store(out_row_ptr + place, p, mask=chosen)
    if able < K:
        empty_slots(out_row_ptr, able, K, BLOCK_K)


@triton.jit
def places_of_best(v, K, WIDE: tl.constexpr):
    """The K highest of the values v (ordered), of equal ones the first, get a slot each in the order in which
    they stand -> the slot of each, whether it has one, how many could, K or not. A value of -inf or
    NOT_A_SCORE gets none. WIDE: more than 2^15 values."""
    ok = v > MINUS_INFINITY
    n = tl.sum(ok.to(tl.int32), 0)
    t, at_t, above_t = kth_value(v, K, tl.min(tl.where(ok, v, HIGHEST), 0), tl.max(v, 0), n, 0)
    need = tl.where(at_t > K, K - above_t, K)  # of the ties at t

    # ranks among either kind, by one scan of both
    above = ((v > t) & ok).to(tl.int32)
    tie = ((v == t) & ok).to(tl.int32)
    if WIDE:
        both = tl.cumsum((above.to(tl.int64) << 32) + tie, 0)
        higher = (both >> 32).to(tl.int32) - above
        equal = (both & 0xffffffff).to(tl.int32) - tie
    else:
        both = tl.cumsum((above << 16) + tie, 0)
        higher = (both >> 16) - above
        equal = (both & 0xffff) - tie
    chosen = (above != 0) | ((tie != 0) & (equal < need))
    return higher + tl.minimum(equal, need), chosen, n


@triton.jit
def first_rank(n, K, SAMPLE: tl.constexpr):
    """Which of the sorted sample of n scores to take as a threshold, such that it lets the K best through."""
    mean = SAMPLE * (K / n)  # hits of the K best in the sample
    return tl.minimum(mean + GUESS_SIGMAS * tl.sqrt(mean) + SKEWNESS, SAMPLE * LARGEST_RANK)


@triton.jit
def guess(scores_row_ptr, first, n, rank, SAMPLE: tl.constexpr):
    """-> the threshold that `rank` of a sample of the n scores from `first` on reach, ordered, and whether so
    many are tied there, or above INFINITY, that it cannot be used without regard to ties"""
    # a run from each stretch of the row, from its eighths in turn lest it keep step with a pattern in the
    # scores; where memory's own runs begin
    run = tl.arange(0, SAMPLE // SAMPLE_RUN)[:, None]
    eighth = run * 8 + run * 5 % 8
    start = (eighth * ((n - 2 * SAMPLE_RUN) / (SAMPLE // SAMPLE_RUN * 8))).to(tl.int32)
    start = (first + start + SAMPLE_RUN - 1) // SAMPLE_RUN * SAMPLE_RUN
    sample = ordered(tl.load(scores_row_ptr + start + tl.arange(0, SAMPLE_RUN)[None, :]))
    sample = tl.reshape(sample, (SAMPLE,), can_reorder=True)
    reached = tl.full((), SAMPLE, tl.int32)  # kth_value changes it: no constant
    t, at_t, _ = kth_value(sample, rank, tl.min(sample, 0), tl.max(sample, 0), reached, rank // 16)
    return t, ((at_t > rank + rank // 16) | (t > INFINITY)).to(tl.int32)


@triton.jit
def sections_kernel(
        scores_ptr, first_ptr, last_ptr, found_ptr, counts_ptr,
        S, T, first_row, rows, width, K, span,
        CAP: tl.constexpr, SAMPLE: tl.constexpr, WORDS: tl.constexpr, LIST: tl.constexpr, AREA: tl.constexpr,
        TILE: tl.constexpr, MASKED: tl.constexpr, STAGES: tl.constexpr):
    """The candidates among `span` scores of a row, by the row's first guess; where this is tied, also those
    above it alone, for a row whose earlier sections have ties enough. Two lists with room for LIST positions
    in a section's AREA, behind the bitmap, and the lengths of both, equal if nothing is tied. Nothing for a
    row that needs no guess."""
    section = tl.program_id(0)
    row = tl.program_id(1)
    first, last = load_bounds(first_ptr, last_ptr, row // rows, first_row + row % rows, S, T)
    n = last - first + 1
    if n > CAP:
        scores_row_ptr = scores_ptr + row.to(tl.int64) * width
        at = row.to(tl.int64) * tl.num_programs(0) + section
        bitmap_ptr = found_ptr + at * AREA
        to_ptr = bitmap_ptr + WORDS
        rank = first_rank(n, K, SAMPLE)
        t, tied = guess(scores_row_ptr, first, n, rank.to(tl.int32), SAMPLE)
        first = tl.maximum(first, section * span)
        last = tl.minimum(last, section * span + span - 1)
        if tied == 0:
            count, _ = gather(
                scores_row_ptr, bitmap_ptr, to_ptr,
                first, last, width, t, 0,
                CAP, WORDS, TILE, MASKED, False, STAGES)
            higher = count
        else:
            higher, equal = gather(
                scores_row_ptr, bitmap_ptr, to_ptr,
                first, last, width, t, K,
                CAP, WORDS, TILE, MASKED, True, STAGES)
            count = higher + tl.minimum(equal, K)
            gather(
                scores_row_ptr, bitmap_ptr, to_ptr + LIST,
                first, last, width, t, 0,
                CAP, WORDS, TILE, MASKED, True, STAGES)
        tl.store(counts_ptr + 2 * at, count)
        tl.store(counts_ptr + 2 * at + 1, higher)


@triton.jit
def join_sections(
        found_ptr, counts_ptr, to_ptr, K,
        CAP: tl.constexpr, WORDS: tl.constexpr, LIST: tl.constexpr, AREA: tl.constexpr,
        SECTIONS: tl.constexpr):
    """Write what a row's sections found, one after the other, at to_ptr, of ties not much more than the first
    K, unless that is more than CAP -> their number."""
    slot = tl.arange(0, CAP)
    at = slot
    count = 0
    ties = 0
    for i in tl.static_range(SECTIONS):
        found = tl.load(counts_ptr + 2 * i)
        higher = tl.load(counts_ptr + 2 * i + 1)
        enough = ties >= K
        start = i * AREA + WORDS + tl.where(enough, LIST, 0)
        at = tl.where(slot >= count, start + slot - count, at)
        count += tl.where(enough, higher, found)
        ties += found - higher
    ok = slot < tl.where(count <= CAP, count, 0)
    p = tl.load(found_ptr + at, mask=ok, other=0)
    tl.store(to_ptr + slot, p, mask=ok)
    tl.debug_barrier()
    return count


@triton.jit
def topk_kernel(
        scores_ptr, first_ptr, last_ptr, found_ptr, counts_ptr, out_ptr, scratch_ptr,
        total, S, T, first_row, rows, width, K,
        BLOCK_K: tl.constexpr, CAP: tl.constexpr, SAMPLE: tl.constexpr, WORDS: tl.constexpr,
        TILE: tl.constexpr, DIRECT: tl.constexpr, MASKED: tl.constexpr, WIDE: tl.constexpr,
        STAGES: tl.constexpr, SECTIONS: tl.constexpr, LIST: tl.constexpr, AREA: tl.constexpr):
    slot = tl.arange(0, CAP)
    # an odd distance: every layout then holds single elements, and nothing is converted between layouts
    scratch_row_ptr = scratch_ptr + tl.program_id(0) * (CAP + WORDS + 1)
    bitmap_ptr = scratch_row_ptr + CAP
    for step in range(tl.cdiv(total - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + step * tl.num_programs(0)
        b = (row // rows).to(tl.int64)
        s = first_row + row % rows
        first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
        n = tl.maximum(last - first + 1, 0)
        scores_row_ptr = scores_ptr + row.to(tl.int64) * width
        count = n

        # too many to compare all at once: gather candidates; lo <= the K-th value <= hi throughout
        if not DIRECT:
            if n > CAP:
                lo = MINUS_INFINITY
                hi = HIGHEST
                need = K
                tries = 0
                done = 0
                rank = first_rank(n, K, SAMPLE)
                if SECTIONS > 1:
                    at = row.to(tl.int64) * SECTIONS
                    count = join_sections(
                        found_ptr + at * AREA, counts_ptr + 2 * at, scratch_row_ptr, K,
                        CAP, WORDS, LIST, AREA, SECTIONS)
                    done = ((count >= K) & (count <= CAP)).to(tl.int32)
                while done == 0:
                    # guess: by the sample, where it is not tied first without regard to ties; then 0, relu's
                    # own value; then the middle of the range
                    tied = 1
                    if tries < GUESSES:
                        t, tied = guess(scores_row_ptr, first, n, rank.to(tl.int32), SAMPLE)
                        tied = tied | (tries == GUESSES - 1).to(tl.int32)
                    else:
                        t = tl.where(tries == GUESSES, 0, (lo & hi) + ((lo ^ hi) >> 1))
                    t = tl.minimum(tl.maximum(t, lo), hi)

                    # gather, and judge: what is gathered must hold the K best and fit
                    if tied == 0:
                        count, _ = gather(
                            scores_row_ptr, bitmap_ptr, scratch_row_ptr,
                            first, last, width, t, 0,
                            CAP, WORDS, TILE, MASKED, False, STAGES)
                        reach = count
                        if count > CAP:
                            lo = t
                        elif count < K:
                            hi = t - 1
                        else:
                            done += 1
                    else:
                        higher, equal = gather(
                            scores_row_ptr, bitmap_ptr, scratch_row_ptr,
                            first, last, width, t, need,
                            CAP, WORDS, TILE, MASKED, True, STAGES)
                        reach = higher + equal
                        count = higher + tl.minimum(equal, need)
                        if higher > CAP:
                            lo = t + 1
                        elif reach < K:
                            hi = t - 1
                        elif (count > CAP) | (higher + need < K):
                            # the right threshold, but too many or too few of its ties: once more
                            need = tl.maximum(K - higher, 0)
                            lo = t
                            hi = t
                            tries += GUESSES
                        else:
                            done += 1
                    rank = tl.maximum(rank * ((K + CAP) * 0.5 / (reach + 1)), 1.0)
                    rank = tl.minimum(rank, SAMPLE * LARGEST_RANK)
                    tries += 1

        # the best among the candidates
        p = candidates(scratch_row_ptr, first, slot, slot < count, n > CAP, DIRECT)
        v = ordered(tl.load(scores_row_ptr + p, mask=slot < count, other=float("-inf")))
        place, chosen, able = places_of_best(v, K, WIDE)
        # positions again: held in registers all that time, they would push others out
        p = candidates(scratch_row_ptr, first, slot, chosen, n > CAP, DIRECT)
        store_selection(out_ptr + (b * S + s) * K, place, p, chosen, able, K, BLOCK_K)
        if not DIRECT:
            tl.debug_barrier()  # scratch is used again


class TopkTiles(NamedTuple):
    """Of topk_kernel, and of sections_kernel, but that this has SECTION_TILE."""
    direct: bool  # all of a row are candidates
    cap: int  # candidates
    sample: int  # scores that a threshold is guessed from
    words: int  # of the bitmap
    tile: int  # scores that are compared at once
    stages: int  # tiles: on their way from memory, and the one that is compared
    num_warps: int
    maxnreg: int  # registers of a thread
    programs: int
    sections: int  # of a row, in which programs of their own look for candidates; 1: none do


def topk_tiles(T, K, rows, device):
    """Tiles for `rows` rows of T scores."""
    processors = multiprocessors(device)
    sections = min(T // SECTION, 2 * processors // rows, MOST_SECTIONS)
    sections = 1 << (sections.bit_length() - 1) if sections >= LEAST_SECTIONS else 1
    sample = next((size for longest, size in SAMPLES.items() if T <= longest), LONG_ROW_SAMPLE)
    if sections > 1:  # each of whose programs reads the sample
        sample = min(sample, triton.next_power_of_2(T) // 32)
    # as in the kernel, for the longest row: the expected candidates and 2.5 standard deviations fit
    mean = sample * min(K, T) / T
    rank = mean + GUESS_SIGMAS.value * mean**0.5 + SKEWNESS.value
    cap = triton.next_power_of_2(max(LEAST_CAP, int((rank + 2.5 * rank**0.5) * T / sample)))

    words = 256 if T <= MIDDLE_ROW or sections > 1 else 1024
    stages = 3
    tile = 2048
    if T <= DIRECT_ROW:
        cap = triton.next_power_of_2(T)
        num_warps = max(1, cap // 1024)
        maxnreg = 64
    elif cap > 4 * LEAST_CAP or rows <= 2 * processors:  # of few rows none should take long
        num_warps = max(8, min(32, cap // 512))
        tile = LARGE_TILE
        maxnreg = 80 if num_warps == 8 else 64
    elif cap > 2 * LEAST_CAP:
        num_warps = 4
        stages = 4
        maxnreg = 128
    elif cap > LEAST_CAP:
        num_warps = 4
        maxnreg = 72
    else:
        num_warps = 2
        tile = 1024
        words = 128
        maxnreg = 72
    programs = min(rows, processors * (REGISTERS // (maxnreg * 32 * num_warps)))
    return TopkTiles(
        direct=T <= DIRECT_ROW, cap=cap, sample=sample, words=words, tile=tile, stages=stages,
        num_warps=num_warps, maxnreg=maxnreg, programs=programs, sections=sections)


class Sections(NamedTuple):
    """What sections_kernel found, or nothing."""
    found: Tensor | None = None  # (rows, sections, area) int32
    counts: Tensor | None = None  # (rows, sections, 2) int32: the lengths of both lists
    list: int = 0  # positions that either has room for
    area: int = 0


def launch_sections(tiles, scores, K, T, first, last, first_row, S):
    """Sections of the rows of scores (B,rows,width >= T), if `tiles` has any."""
    if tiles.sections == 1:
        return Sections()
    B, rows, width = scores.shape
    span = triton.cdiv(T, tiles.sections * SECTION_TILE) * SECTION_TILE
    room = min(tiles.cap, span)
    area = tiles.words + 2 * room + 1  # odd, see topk_kernel
    found = torch.empty(B * rows, tiles.sections, area, dtype=torch.int32, device=scores.device)
    counts = torch.empty(B * rows, tiles.sections, 2, dtype=torch.int32, device=scores.device)
    sections_kernel[(tiles.sections, B * rows)](
        scores_ptr=scores, first_ptr=first, last_ptr=last, found_ptr=found, counts_ptr=counts,
        S=S, T=T, first_row=first_row, rows=rows, width=width, K=K, span=span,
        CAP=tiles.cap, SAMPLE=tiles.sample, WORDS=tiles.words, LIST=room, AREA=area, TILE=SECTION_TILE,
        MASKED=width % SECTION_TILE != 0, STAGES=tiles.stages,
        num_warps=tiles.num_warps, maxnreg=tiles.maxnreg)
    return Sections(found, counts, room, area)


def launch_topk(out, scores, T, first, last, first_row, rows):
    """Top-k of scores (B,rows,width >= T) into out (B,S,K)[:, first_row:first_row+rows]"""
    B, S, K = out.shape
    width = scores.shape[2]
    tiles = topk_tiles(T, K, B * rows, out.device)
    sections = launch_sections(tiles, scores, K, T, first, last, first_row, S)
    slots = 1 if tiles.direct else tiles.programs * (tiles.cap + tiles.words + 1)
    scratch = torch.empty(slots, dtype=torch.int32, device=out.device)
    topk_kernel[(tiles.programs,)](
        scores_ptr=scores, first_ptr=first, last_ptr=last,
        found_ptr=sections.found, counts_ptr=sections.counts, out_ptr=out, scratch_ptr=scratch,
        total=B * rows, S=S, T=T, first_row=first_row, rows=rows, width=width, K=K,
        BLOCK_K=triton.next_power_of_2(K), CAP=tiles.cap, SAMPLE=tiles.sample, WORDS=tiles.words,
        TILE=tiles.tile, DIRECT=tiles.direct, MASKED=not tiles.direct and width % tiles.tile != 0,
        WIDE=tiles.cap > 32768, STAGES=tiles.stages, SECTIONS=tiles.sections, LIST=sections.list,
        AREA=sections.area,
        num_warps=tiles.num_warps, maxnreg=tiles.maxnreg)


@operation("topk")
def topk_operation(scores: Tensor, topk: int, first: Tensor | None, last: Tensor | None) -> Tensor:
    """Arguments as kernels.topk, first and last (B,S) contiguous int32 -> (B,S,K) int32"""
    B, S, T = scores.shape
    out = torch.empty(B, S, topk, dtype=torch.int32, device=scores.device)
    if scores.numel() == 0:
        return out.fill_(-1)
    launch_topk(out, scores.contiguous(), T, first, last, 0, S)
    return out


@topk_operation.register_fake
def _(scores, topk, first, last):
    return scores.new_empty(scores.shape[0], scores.shape[1], topk, dtype=torch.int32)


@torch.no_grad()
def topk(scores, topk, first=None, last=None):
    """What kernels.topk promises: shapes, dtypes and errors stand there."""
    if topk < 1:
        raise ValueError(f"topk={topk}: select at least one token")
    B, S, _ = scores.shape
    return topk_operation(scores, topk, full_bounds(first, B, S), full_bounds(last, B, S))


# ---- select ----
# contract    kernels.select
# in PyTorch  indexer.select
# equation    S_t = the K highest of I[t, first..last], ties to the lower position
# tiling      rows of queries in chunks: the scores of a chunk, then its top-k, both as above. Many queries of
#             few heads over long contexts are filtered instead, since there it costs more to store scores and
#             load them than to compute them:
#             threshold  a row's t, from its scores of every `stride`-th key, so that K..CAP scores exceed it
#             filter     all scores once more, of which two bits remain: above t, equal to t
#             collect    a program per row: the positions of the bits above t. If these are K..CAP, their
#                        scores from gathered keys once again, and the exact K best. If they are fewer than K,
#                        but K with the ties, t is the K-th value, and the bits are the answer. Neither: the
#                        row is left over, for scores that are kept
#             How the last step rounds its scores does not matter: the filter alone decides who is a
#             candidate, the last step alone their order
# FLOPs       those of index_scores; filtered, 1 / stride more
# bytes       those of both; filtered, 1/4 per pair, 4 / stride for the sample, some 2 K gathered keys per row


@triton.jit
def threshold_kernel(
        sample_ptr, first_ptr, last_ptr, threshold_ptr,
        S, T, first_row, rows, width, K, stride,
        SAMPLE: tl.constexpr):
    row = tl.program_id(0)
    first, last = load_bounds(first_ptr, last_ptr, row // rows, first_row + row % rows, S, T)
    t = LEAST  # all are candidates
    if last - first >= K:
        # the sampled keys that the row sees; `rank` as in filter_tiles
        begin = tl.cdiv(first, stride)
        n = last // stride - begin + 1
        mean = n * (K / (last - first + 1))
        rank = (mean + SIGMAS * tl.sqrt(mean) + SKEWNESS).to(tl.int32)
        if rank < n:
            j = tl.arange(0, SAMPLE)
            sample_row = sample_ptr + row.to(tl.int64) * width + begin
            v = ordered(tl.load(sample_row + j, mask=j < n, other=float("-inf")))
            t, _, _ = kth_value(v, rank, tl.min(tl.where(j < n, v, HIGHEST), 0), tl.max(v, 0), n, rank // 16)
    tl.store(threshold_ptr + row, unordered(tl.minimum(tl.maximum(t, LEAST), INFINITY)))


@triton.jit
def read_bits(to_ptr, words_ptr, first, last, need, most, BLOCK_S, TILE_WORDS: tl.constexpr):
    """`positions_of_bits` of a row's words, as scores_kernel stored them -> how many scores are above, and
    equal to, the threshold"""
    higher = 0
    equal = 0
    for start in range(first // 16, last // 16 + 1, WORDS_AT_ONCE):
        i = start + tl.arange(0, WORDS_AT_ONCE)
        p = i * 16
        tile_ptr = words_ptr + i // TILE_WORDS * (TILE_WORDS * BLOCK_S)
        word = tl.load(tile_ptr + i % TILE_WORDS, mask=p <= last, other=0)
        seen = bits_between(first, last, p, 16)
        above = (word >> 16) & seen
        higher, equal = positions_of_bits(to_ptr, p, above, word & seen & ~above, higher, equal, need, most)
    return higher, equal


@triton.jit
def collect_kernel(
        q_ptr, k_ptr, w_ptr, k_scale_ptr, first_ptr, last_ptr, bits_ptr, out_ptr, left_over_ptr, scratch_ptr,
        total, S, T, first_row, rows, width, K,
        stride_kb, stride_kt, stride_sb, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr,
        BLOCK_K: tl.constexpr, CAP: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_S: tl.constexpr,
        BLOCK_T: tl.constexpr, DECODE_E4M3: tl.constexpr):
    slot = tl.arange(0, CAP)
    d = tl.arange(0, BLOCK_D)
    h = tl.arange(0, BLOCK_H)
    # positions, then scores; an odd distance, as in topk_kernel
    scratch_row_ptr = scratch_ptr + tl.program_id(0).to(tl.int64) * (2 * CAP + 1)
    for step in range(tl.cdiv(total - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + step * tl.num_programs(0)
        b = (row // rows).to(tl.int64)
        r = row % rows
        s = first_row + r
        at = b * S + s
        out_row_ptr = out_ptr + at * K
        first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
        n = tl.minimum(tl.maximum(last - first + 1, 0), K)  # to be selected

        # the candidates
        words_ptr = bits_ptr + (b * tl.cdiv(rows, BLOCK_S) + r // BLOCK_S) * width * BLOCK_S
        words_ptr += r % BLOCK_S * (BLOCK_T // 16)
        higher, equal = read_bits(scratch_row_ptr, words_ptr, first, last, 0, CAP, BLOCK_S, BLOCK_T // 16)
        left_over = ((higher > CAP) | (higher + equal < n)).to(tl.int32)
        if left_over == 0:
            if higher < K:
                # all that are above the threshold, and the first ties
                read_bits(out_row_ptr, words_ptr, first, last, K - higher, K, BLOCK_S, BLOCK_T // 16)
                empty_slots(out_row_ptr, n, K, BLOCK_K)
            else:
                # their scores again, BLOCK_C gathered keys at a time
                q = tl.load(q_ptr + (at * HI + h)[:, None] * DI + d[None, :],
                            mask=(h < HI)[:, None] & (d < DI)[None, :], other=0.0)
                w = tl.load(w_ptr + at * HI + h, mask=h < HI, other=0.0)
                if DECODE_E4M3:
                    q = e4m3_to_fp16(q)
                tl.debug_barrier()
                for c0 in tl.range(0, higher, BLOCK_C):
                    c = c0 + tl.arange(0, BLOCK_C)
                    passed = c < higher
                    t = tl.load(scratch_row_ptr + c, mask=passed, other=0, cache_modifier=".cg").to(tl.int64)
                    k = tl.load(k_ptr + b * stride_kb + t[:, None] * stride_kt + d[None, :],
                                mask=passed[:, None] & (d < DI)[None, :], other=0.0)
                    score = score_keys(k, q, w, h, HI, 1, BLOCK_H, 1, DECODE_E4M3)  # (BLOCK_C, 1)
                    if k_scale_ptr is not None:
                        scale = tl.load(k_scale_ptr + b * stride_sb + t * stride_st, mask=passed, other=0.0)
                        score = score * scale[:, None]
                    tl.store(scratch_row_ptr + CAP + c[:, None], ordered(score), mask=passed[:, None])
                tl.debug_barrier()

                # the best of them
                ok = slot < higher
                v = tl.load(scratch_row_ptr + CAP + slot, mask=ok, other=NOT_A_SCORE, cache_modifier=".cg")
                place, chosen, able = places_of_best(v, K, False)
                p = tl.load(scratch_row_ptr + slot, mask=chosen, other=0, cache_modifier=".cg")
                store_selection(out_row_ptr, place, p, chosen, able, K, BLOCK_K)
        tl.debug_barrier()  # scratch is used again
        tl.store(left_over_ptr + at, left_over.to(tl.int8))


class FilterTiles(NamedTuple):
    """Of threshold_kernel and collect_kernel."""
    stride: int  # every so many-th key is sampled
    sample: int  # a power of two that holds them
    sample_warps: int
    cap: int  # candidates
    block_h: int
    block_c: int  # candidates that are scored at once
    num_stages: int
    num_warps: int
    maxnreg: int  # registers of a thread


def filter_tiles(HI, DI, T, K, dtype):
    """Sample and candidates of `select_filtered`.

    A row's threshold is the rank-th highest of its sampled scores, every stride-th. If the best keys lie
    anywhere, the sample holds about Poisson(K / stride) of the K best and Poisson(CAP / stride) of the CAP
    best: means m and M, standard deviations their roots. The threshold lets at least K through unless `rank`
    or more of the K best are sampled, and at most CAP unless fewer than rank of the CAP best are. So
        m + SIGMAS sqrt(m) + SKEWNESS = rank,    17/16 rank <= M - SIGMAS sqrt(M)
    (SKEWNESS for that of a small m, 17/16 as the threshold is taken only so exactly); the expected
    candidates are rank * stride. The second is met by a large enough CAP, the first by definition: some 8 of
    10^6 rows fail. A longer stride saves scores, but lets more candidates through, 2 K with m near 32
    (SAMPLED_HITS). At K 512 and 256K keys: stride 17, m 30, rank 57, 970 candidates, CAP 2048; at 2^20 keys,
    where the sample must not exceed LARGEST_SAMPLE: stride 33, m 15.5, rank 36, 1190 candidates, CAP 4096,
    the largest of any T and K that are filtered."""
    # odd: what is aligned in the keys must not be sampled alone
    stride = max(K // SAMPLED_HITS, SAMPLED_STRIDE, triton.cdiv(T, LARGEST_SAMPLE)) | 1
    mean = K / stride
    rank = mean + SIGMAS.value * mean**0.5 + SKEWNESS.value
    cap = LEAST_CAP
    while cap / stride - SIGMAS.value * (cap / stride)**0.5 < rank * 17 / 16:
        cap *= 2
    narrow = DI * dtype.itemsize <= 128
    sample = triton.next_power_of_2(triton.cdiv(T, stride))
    return FilterTiles(
        stride=stride, sample=sample, sample_warps=max(1, min(16, sample // 512), sample // 1024), cap=cap,
        block_h=power_of_two(HI), block_c=128 if narrow else 64,
        num_stages=3, num_warps=max(4, cap // 512), maxnreg=128)


def take(x, index):
    """x[index], None of None."""
    return None if x is None else x[index]


def chunks(B, S, elements):
    """Cut B x S rows so that SELECT_CHUNK holds `elements` elements for each -> sequences (a slice), first
    query, queries."""
    batch = max(1, min(B, SELECT_CHUNK // (elements * min(S, CHUNK_QUERIES))))
    rows = max(1, min(S, SELECT_CHUNK // (elements * batch)))
    for b in range(0, B, batch):
        for first_row in range(0, S, rows):
            yield slice(b, min(b + batch, B)), first_row, min(rows, S - first_row)


def padded_row(n):
    """-> the width of a row of n scores as `launch_topk` reads it."""
    multiple = ALIGNED_ROW if n <= DIRECT_ROW else LARGE_TILE
    return triton.cdiv(n, multiple) * multiple


def select_exact(out, q, k, w, k_scale, first, last):
    """`select` into out (B,S,K) by scores that are kept, a chunk at a time."""
    B, S, _ = out.shape
    T = k.shape[1]
    width = padded_row(T)
    for batch, first_row, rows in chunks(B, S, width):
        n = batch.stop - batch.start
        scores = torch.empty(n, rows, width, dtype=torch.float32, device=q.device)
        bounds = take(first, batch), take(last, batch)
        launch_scores(scores, q[batch], k[batch], w[batch], take(k_scale, batch), *bounds, first_row, rows)
        launch_topk(out[batch], scores, T, *bounds, first_row, rows)


def sampled_bounds(first, last, stride, S, T, device):
    """What queries see among every stride-th of T keys -> first (B,S) or None, last (B,S) or (1,S)"""
    if first is not None:
        first = (first.clamp(min=0) + stride - 1) // stride
    if last is None:
        last = torch.arange(T - S, T, dtype=torch.int32, device=device)[None]  # (1, S)
    return first, last.clamp(max=T - 1) // stride


def select_filtered(out, q, k, w, k_scale, first, last):
    """`select` into out (B,S,K) by the filter -> (B,S) bool, the rows left over, whose threshold let too few
    or too many scores through."""
    B, S, HI, DI = q.shape
    T = k.shape[1]
    K = out.shape[2]
    tiles = filter_tiles(HI, DI, T, K, q.dtype)
    sampled = triton.cdiv(T, tiles.stride * 16) * 16  # keys
    width = triton.cdiv(T, 128) * 8  # words
    every = (slice(None), slice(None, None, tiles.stride))
    sampled_first, sampled_last = sampled_bounds(first, last, tiles.stride, S, T, q.device)
    sampled_last = sampled_last.expand(B, S).contiguous()
    left_over = torch.empty(B, S, dtype=torch.int8, device=q.device)
    for batch, first_row, rows in chunks(B, S, width + sampled):
        n = batch.stop - batch.start
        q_part = q[batch]
        k_part = k[batch]
        w_part = w[batch]
        scale_part = take(k_scale, batch)
        first_part = take(first, batch)
        last_part = take(last, batch)

        # a threshold per row
        scores = torch.empty(n, rows, sampled, dtype=torch.float32, device=q.device)
        launch_scores(
            scores, q_part, k_part[every], w_part, take(scale_part, every),
            take(sampled_first, batch), sampled_last[batch], first_row, rows)
        threshold = torch.empty(n, rows, dtype=torch.float32, device=q.device)
        threshold_kernel[(n * rows,)](
            sample_ptr=scores, first_ptr=first_part, last_ptr=last_part, threshold_ptr=threshold,
            S=S, T=T, first_row=first_row, rows=rows, width=sampled, K=K, stride=tiles.stride,
            SAMPLE=tiles.sample,
            num_warps=tiles.sample_warps)

        # two bits per score
        score = index_tiles(HI, DI, rows, q.dtype, q.device)
        queries = triton.cdiv(rows, score.block_s) * score.block_s
        bits = torch.empty(n, queries, width, dtype=torch.int32, device=q.device)
        launch_scores(
            bits, q_part, k_part, w_part, scale_part, first_part, last_part, first_row, rows,
            threshold=threshold)

        # the best of what passed
        resident = max(1, REGISTERS // (32 * tiles.num_warps * tiles.maxnreg))
        programs = min(n * rows, multiprocessors(q.device) * resident)
        scratch = torch.empty(programs * (2 * tiles.cap + 1), dtype=torch.int32, device=q.device)
        stride_sb, stride_st = (0, 0) if k_scale is None else k_scale.stride()
        collect_kernel[(programs,)](
            q_ptr=q_part, k_ptr=k_part, w_ptr=w_part, k_scale_ptr=scale_part,
            first_ptr=first_part, last_ptr=last_part, bits_ptr=bits, out_ptr=out[batch],
            left_over_ptr=left_over[batch], scratch_ptr=scratch,
            total=n * rows, S=S, T=T, first_row=first_row, rows=rows, width=width, K=K,
            stride_kb=k.stride(0), stride_kt=k.stride(1), stride_sb=stride_sb, stride_st=stride_st,
            HI=HI, DI=DI, BLOCK_H=tiles.block_h, BLOCK_D=score.block_d, BLOCK_K=triton.next_power_of_2(K),
            CAP=tiles.cap, BLOCK_C=tiles.block_c, BLOCK_S=score.block_s, BLOCK_T=score.block_t,
            DECODE_E4M3=q.dtype == torch.uint8,
            num_stages=tiles.num_stages, num_warps=tiles.num_warps, maxnreg=tiles.maxnreg)
    return left_over.bool()


def select_rows(out, rows, q, k, w, k_scale, first, last):
    """`select_exact` of some queries only: rows (B,S) bool."""
    B, S, K = out.shape
    T = k.shape[1]
    if last is None:
        last = torch.arange(T - S, T, dtype=torch.int32, device=q.device).expand(B, S)
    for b in range(B):
        s = rows[b].nonzero()[:, 0]
        if len(s) == 0:
            continue
        s = F.pad(s, (0, -len(s) % 64), value=int(s[0]))  # of few lengths: no kernel is compiled for each
        one = slice(b, b + 1)
        selected = torch.empty(1, len(s), K, dtype=torch.int32, device=q.device)
        select_exact(
            selected, q[one, s], k[one], w[one, s], take(k_scale, one), take(first, (one, s)), last[one, s])
        out[b, s] = selected[0]


def filters(q, T, K):
    """Does `select` filter? Not while a CUDA graph is captured, as the host must read what is left over."""
    regime = SELECT_FILTER
    S, HI = q.shape[1:3]
    seen = T - S // 2  # by a query in the mean, if they see all that is before them
    if S * T < regime.pairs or seen < max(regime.keys, regime.keys_per_topk * K):
        return False
    if T > regime.most_keys or K > regime.most_topk or HI > regime.most_heads:
        return False
    return not (q.is_cuda and torch.cuda.is_current_stream_capturing())


@operation("select")
def select_operation(
        q: Tensor, k: Tensor, w: Tensor, topk: int, k_scale: Tensor | None, first: Tensor | None,
        last: Tensor | None) -> Tensor:
    """Arguments as kernels.select, first and last (B,S) contiguous int32 -> (B,S,K) int32"""
    q, k, w = operands(q, k, w)
    B, S = q.shape[:2]
    T = k.shape[1]
    out = torch.empty(B, S, topk, dtype=torch.int32, device=q.device)
    if B * S * T == 0:
        return out.fill_(-1)
    if not filters(q, T, topk):
        select_exact(out, q, k, w, k_scale, first, last)
        return out
    left_over = select_filtered(out, q, k, w, k_scale, first, last)
    if left_over.any():
        select_rows(out, left_over, q, k, w, k_scale, first, last)
    return out


@select_operation.register_fake
def _(q, k, w, topk, k_scale, first, last):
    return q.new_empty(q.shape[0], q.shape[1], topk, dtype=torch.int32)


@torch.no_grad()
def select(q, k, w, topk, k_scale=None, first=None, last=None):
    """What kernels.select promises: shapes, dtypes and errors stand there."""
    if topk < 1:
        raise ValueError(f"index_topk={topk}: select at least one token")
    check_inputs(q, k, w, k_scale)
    B, S = q.shape[:2]
    return select_operation(q, k, w, topk, k_scale, full_bounds(first, B, S), full_bounds(last, B, S))
