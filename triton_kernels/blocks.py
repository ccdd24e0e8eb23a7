"""Chapter 7: selection in two levels, for contexts beyond 128K. The heads mixed into two score all tokens,
all heads those in the blocks that hold the best. Scores and top-k are those of chapter 1.
"""
import torch
import triton
import triton.language as tl
from torch import Tensor

from indexer import NORM_STEPS, RECENT, check_two_levels, default_candidates
from triton_kernels.common import e4m3_to_fp16, full_bounds, load_bounds, operation, power_of_two
from triton_kernels.index import (
    check_inputs, chunks, dealt_columns, e4m3_of, higher_or_nan, index_tiles, keys_per_program,
    launch_scores, launch_topk, operands, padded_row, power_of_two_above, score_keys, select, take)

MIXED_ELEMENTS = 2048  # of each mixed head in a program of mix_kernel
BOUNDS = 512  # queries of a program of bounds_kernel


# ---- mixed_heads ----
# in PyTorch  indexer.mixed_heads
# equation    m[0] = |w_a| q_a, a the head with the largest w_j |q_j|,  m[1] = sum_{j != a} w_j q_j, w divided
#             by a power of two; then `quantise`, m[0]'s scale with the sign of w_a
# tiling      a program takes BLOCK_ROWS queries with all dimensions, and adds head after head, without fused
#             multiply-adds: the reference's bits
# FLOPs       8 per element of q
# bytes       q once, twice more from cache, 2 / HI of it written


@triton.jit
def head_of(q_ptr, row, j, d, mask, HI: tl.constexpr, DI: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """Head j of the queries `row` -> (rows, BLOCK_D) float32"""
    q = tl.load(q_ptr + ((row * HI + j) * DI)[:, None] + d[None, :], mask=mask, other=0.0)
    if DECODE_E4M3:
        q = e4m3_to_fp16(q)
    return q.to(tl.float32)


@triton.jit
def finite_size(x):
    """|x|, 0 where that is not finite"""
    size = tl.abs(x)
    return tl.where(size < float("inf"), size, 0.0)


@triton.jit
def store_mixed(mixed_ptr, w_ptr, x, sign, row, d, ok, mask, DI: tl.constexpr, QUANTISE: tl.constexpr):
    """x (n, d) as the queries at mixed_ptr + 2 row DI, and their weights"""
    to_ptr = mixed_ptr + (2 * row * DI)[:, None] + d[None, :]
    if QUANTISE:
        values, scale = e4m3_of(x, True)
        tl.store(to_ptr, values.to(tl.uint8), mask=mask)
        tl.store(w_ptr + 2 * row, sign * scale, mask=ok)
    else:
        tl.store(to_ptr, x.to(mixed_ptr.dtype.element_ty), mask=mask)
        tl.store(w_ptr + 2 * row, sign, mask=ok)


@triton.jit
def mix_kernel(
        q_ptr, w_ptr, mixed_ptr, mixed_w_ptr,
        rows,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr, DECODE_E4M3: tl.constexpr, QUANTISE: tl.constexpr, STEPS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    h = tl.arange(0, BLOCK_H)
    d = tl.arange(0, BLOCK_D)
    ok = row < rows
    mask = ok[:, None] & (d < DI)[None, :]

    # a factor that makes the weights at most 1
    w = tl.load(w_ptr + (row * HI)[:, None] + h[None, :], mask=ok[:, None] & (h < HI)[None, :], other=0.0)
    largest = higher_or_nan(tl.reduce(tl.abs(w), 1, higher_or_nan), 1e-30)
    factor = tl.where(largest < float("inf"), power_of_two_above(largest), largest)

    # the head that can score highest; of equal ones the first
    top = tl.full([BLOCK_ROWS], 1e-30, tl.float32)
    for j in range(HI):
        q = head_of(q_ptr, row, j, d, mask, HI, DI, DECODE_E4M3)
        top = tl.maximum(top, tl.max(finite_size(q), 1))
    steps = tl.div_rn(tl.full([BLOCK_ROWS], STEPS, tl.float32), power_of_two_above(top))
    strongest = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    head = tl.zeros([BLOCK_ROWS], tl.int32)
    sign = tl.full([BLOCK_ROWS], 1.0, tl.float32)
    for j in range(HI):
        share = tl.div_rn(tl.load(w_ptr + row * HI + j, mask=ok, other=0.0), factor)
        q = head_of(q_ptr, row, j, d, mask, HI, DI, DECODE_E4M3)
        norm = tl.sum((finite_size(q) * steps[:, None]).to(tl.int32), 1)
        strength = share * norm.to(tl.float32)
        stronger = strength > strongest
        strongest = tl.where(stronger, strength, strongest)
        head = tl.where(stronger, j, head)
        sign = tl.where(stronger, tl.where(share < 0, -1.0, 1.0), sign)

    # that head, and the sum of the others
    alone = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    others = tl.zeros([BLOCK_ROWS, BLOCK_D], tl.float32)
    for j in range(HI):
        share = tl.div_rn(tl.load(w_ptr + row * HI + j, mask=ok, other=0.0), factor)
        q = head_of(q_ptr, row, j, d, mask, HI, DI, DECODE_E4M3)
        alone += tl.where(j == head, tl.abs(share), 0.0)[:, None] * q
        others += tl.where(j == head, 0.0, share)[:, None] * q
    store_mixed(mixed_ptr, mixed_w_ptr, alone, sign, row, d, ok, mask, DI, QUANTISE)
    store_mixed(mixed_ptr + DI, mixed_w_ptr + 1, others, 1.0, row, d, ok, mask, DI, QUANTISE)


def mixed_heads(q, w):
    """q (B,S,HI,DI), w (B,S,HI) as from `operands` -> q (B,S,2,DI), w (B,S,2) float32"""
    B, S, HI, DI = q.shape
    mixed = q.new_empty(B, S, 2, DI)
    mixed_w = w.new_empty(B, S, 2)
    block_d = power_of_two(DI)
    block_rows = max(1, MIXED_ELEMENTS // block_d)
    quantise = q.dtype in (torch.float8_e4m3fn, torch.uint8)
    mix_kernel[(triton.cdiv(B * S, block_rows),)](
        q_ptr=q, w_ptr=w, mixed_ptr=mixed.view(torch.uint8) if quantise else mixed, mixed_w_ptr=mixed_w,
        rows=B * S,
        HI=HI, DI=DI, BLOCK_ROWS=block_rows, BLOCK_H=power_of_two(HI, 2), BLOCK_D=block_d,
        DECODE_E4M3=q.dtype == torch.uint8, QUANTISE=quantise, STEPS=NORM_STEPS,
        num_warps=4, enable_fp_fusion=False)
    return mixed, mixed_w


# ---- select_by_blocks ----
# contract    kernels.select_by_blocks
# in PyTorch  indexer.select_by_blocks
# equation    S_t = the K highest of I[t, s], s in the first block, in the last `recent` tokens, or in one of
#             the M = C / BLOCK blocks (C: candidates) with the highest max of
#             w[0] relu(m[0] . k) + w[1] relu(m[1] . k), by mixed heads m
# tiling      rows of queries in chunks, of each:
#             rank     scores of mixed heads by scores_kernel, of a block the highest; their top-k by
#                      topk_kernel, which gives a list of blocks, ascending
#             score    a program keeps a query as scores_kernel does, and streams the keys of the listed
#                      blocks, BLOCK_T tokens at a time; another the tokens that are read whatever they
#                      score. A query's row of slots is
#                          first block | list, M BLOCK slots | recent tokens
#                      in the order of positions, -inf behind the end of its list
#             best     topk_kernel on the slots, of equal ones the lower; then slots become positions
# FLOPs       4 DI per pair, T^2 / 2 of them, to rank; 2 HI DI for each of T (C + recent) tokens. At T = 2^20,
#             8 heads of 64 and C = T / 32: 1.4e14 and 3.5e13, for 5.6e14 of `select`; 64 heads of 128:
#             2.8e14 and 5.7e14, for 9.0e15
# bytes       scores: 4 T^2 / (2 BLOCK) and 4 T (C + recent), written and read, in chunks. Keys: DI (C +
#             recent) per query, from L2. T = 2^20, C = T / 32: 137 GB, 139 GB and 2.2 TB of keys


@triton.jit
def score_tokens(
        to_ptr, t, ok, k_ptr, k_scale_ptr, q, w, h,
        stride_kt, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr, TURN: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """Scores of the tokens t (n) of a sequence to to_ptr (n), where ok"""
    d = tl.arange(0, BLOCK_D)
    s = tl.arange(0, BLOCK_S)
    t = t.to(tl.int64)
    k = tl.load(
        k_ptr + t[:, None] * stride_kt + d[None, :], mask=ok[:, None] & (d < DI)[None, :], other=0.0)
    score = score_keys(k, q, w, h, HI, BLOCK_S, BLOCK_H, TURN, DECODE_E4M3)  # (n, BLOCK_S)
    if k_scale_ptr is not None:
        score = score * tl.load(k_scale_ptr + t * stride_st, mask=ok, other=0.0)[:, None]
    tl.store(to_ptr[:, None] + (s * 0)[None, :], score, mask=ok[:, None] & (s == 0)[None, :])


@triton.jit
def score_run(
        to_ptr, begin, end, k_ptr, k_scale_ptr, q, w, h,
        stride_kt, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, TURN: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """Scores of the tokens begin..end-1, that of token t to to_ptr + t"""
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        score_tokens(
            to_ptr + t, t, t < end, k_ptr, k_scale_ptr, q, w, h,
            stride_kt, stride_st,
            HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, TURN, DECODE_E4M3)


@triton.jit
def candidate_scores_kernel(
        q_ptr, k_ptr, w_ptr, k_scale_ptr, list_ptr, first_ptr, last_ptr, beginning_ptr, recently_ptr, out_ptr,
        S, T, first_row, rows, width, span, M,
        stride_kb, stride_kt, stride_sb, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
        TURN: tl.constexpr, DECODE_E4M3: tl.constexpr):
    b = tl.program_id(2).to(tl.int64)
    row = tl.program_id(0)
    at = b * S + first_row + row

    # what is kept: a column per head, and empty ones up to the smallest product
    s, h = dealt_columns(BLOCK_S, BLOCK_H, TURN)
    d = tl.arange(0, BLOCK_D)
    ok = (s == 0) & (h < HI)
    q = tl.load(
        q_ptr + (at * HI + h)[:, None] * DI + d[None, :], mask=ok[:, None] & (d < DI)[None, :], other=0.0)
    w = tl.load(w_ptr + at * HI + h, mask=ok, other=0.0)
    if DECODE_E4M3:
        q = e4m3_to_fp16(q)

    # what the query sees, and which blocks it ranks: those between
    first, last = load_bounds(first_ptr, last_ptr, b, first_row + row, S, T)
    beginning = tl.load(beginning_ptr + at)
    recently = tl.load(recently_ptr + at)
    out_ptr += (b * rows + row) * width
    list_ptr += (b * rows + row) * M
    k_ptr += b * stride_kb
    if k_scale_ptr is not None:
        k_scale_ptr += b * stride_sb

    if tl.program_id(1) == tl.num_programs(1) - 1:
        # the first block, unless it is recent, and the recent tokens
        if beginning < recently:
            score_run(
                out_ptr - beginning * BLOCK, first, (beginning + 1) * BLOCK, k_ptr, k_scale_ptr, q, w, h,
                stride_kt, stride_st,
                HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, BLOCK_T, TURN, DECODE_E4M3)
        score_run(
            out_ptr + (1 + M - recently) * BLOCK, tl.maximum(recently * BLOCK, first), last + 1,
            k_ptr, k_scale_ptr, q, w, h,
            stride_kt, stride_st,
            HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, BLOCK_T, TURN, DECODE_E4M3)
    else:
        # the listed blocks; behind those that the query ranks, the list is empty
        out_ptr += BLOCK
        begin = tl.program_id(1) * span
        stop = tl.minimum(begin + span, M * BLOCK)
        listed = tl.minimum(tl.maximum(recently - beginning - 1, 0) * BLOCK, stop)
        for c0 in tl.range(begin, listed, BLOCK_T):
            c = c0 + tl.arange(0, BLOCK_T)
            n = tl.load(list_ptr + c // BLOCK, mask=c < listed, other=-1)
            score_tokens(
                out_ptr + c, n * BLOCK + c % BLOCK, n >= 0, k_ptr, k_scale_ptr, q, w, h,
                stride_kt, stride_st,
                HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, TURN, DECODE_E4M3)
            tl.store(out_ptr + c, float("-inf"), mask=(n < 0) & (c < stop))
        for c0 in range(tl.maximum(begin, listed), stop, BLOCK_T):
            c = c0 + tl.arange(0, BLOCK_T)
            tl.store(out_ptr + c, float("-inf"), mask=c < stop)


@triton.jit
def positions_kernel(
        slots_ptr, list_ptr, beginning_ptr, recently_ptr,
        S, first_row, rows, K, M,
        BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The slots that were selected, in place, to positions"""
    b = (tl.program_id(0) // rows).to(tl.int64)
    r = tl.program_id(0) % rows
    at = b * S + first_row + r
    j = tl.arange(0, BLOCK_K)
    slot = tl.load(slots_ptr + at * K + j, mask=j < K, other=-1)
    listed = (slot >= BLOCK) & (slot < (1 + M) * BLOCK)
    list_ptr += tl.program_id(0).to(tl.int64) * M
    n = tl.load(list_ptr + slot // BLOCK - 1, mask=listed, other=0)
    n = tl.where(slot < BLOCK, tl.load(beginning_ptr + at), n)
    recent = tl.load(recently_ptr + at) * BLOCK + slot - (1 + M) * BLOCK
    position = tl.where(slot < (1 + M) * BLOCK, n * BLOCK + slot % BLOCK, recent)
    tl.store(slots_ptr + at * K + j, tl.where(slot < 0, -1, position), mask=j < K)


@triton.jit
def bounds_kernel(
        first_ptr, last_ptr, bounds_ptr,
        total, S, T, M, recent,
        BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where what a query sees begins and ends -> bounds (8,B,S): its first block, and the one in which its
    recent tokens begin; the first and the last block that it ranks, and the first and the last token in
    them; its first and its last slot"""
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    ok = n < total
    first, last = load_bounds(first_ptr, last_ptr, n // S, tl.where(ok, n % S, S), S, T)
    beginning = first // BLOCK
    recently = tl.maximum(tl.maximum(last + 1 - recent, 0) // BLOCK, beginning)
    behind = (1 + M - recently) * BLOCK  # from a recent token to its slot
    first_slot = tl.where(beginning < recently, first - beginning * BLOCK, first + behind)
    tl.store(bounds_ptr + n, beginning, mask=ok)
    tl.store(bounds_ptr + total + n, recently, mask=ok)
    tl.store(bounds_ptr + 2 * total + n, beginning + 1, mask=ok)
    tl.store(bounds_ptr + 3 * total + n, recently - 1, mask=ok)
    tl.store(bounds_ptr + 4 * total + n, (beginning + 1) * BLOCK, mask=ok)
    tl.store(bounds_ptr + 5 * total + n, recently * BLOCK - 1, mask=ok)
    tl.store(bounds_ptr + 6 * total + n, first_slot, mask=ok)
    tl.store(bounds_ptr + 7 * total + n, last + behind, mask=ok)


def launch_bounds(B, S, T, first, last, M, block, recent, device):
    """-> (8,B,S) int32, see bounds_kernel"""
    bounds = torch.empty(8, B, S, dtype=torch.int32, device=device)
    bounds_kernel[(triton.cdiv(B * S, BOUNDS),)](
        first_ptr=first, last_ptr=last, bounds_ptr=bounds,
        total=B * S, S=S, T=T, M=M, recent=recent,
        BLOCK=block, BLOCK_N=BOUNDS,
        num_warps=4)
    return bounds


def rank_blocks(q, k, w, k_scale, low, high, low_token, high_token, first_row, rows, M, block):
    """A chunk's lists of the M best blocks of low..high (B,S), which are the tokens low_token..high_token ->
    (B,rows,M) int32"""
    B = q.shape[0]
    N = triton.cdiv(k.shape[1], block)
    here = slice(first_row, first_row + rows)
    scores = torch.empty(B, rows, padded_row(N), dtype=torch.float32, device=q.device)
    launch_scores(scores, q, k, w, k_scale, low_token, high_token, first_row, rows, block=block)
    lists = torch.empty(B, rows, M, dtype=torch.int32, device=q.device)
    launch_topk(lists, scores, N, low[:, here].contiguous(), high[:, here].contiguous(), 0, rows)
    return lists


@operation("select_by_blocks")
def select_by_blocks_operation(
        q: Tensor, k: Tensor, w: Tensor, topk: int, k_scale: Tensor | None, first: Tensor | None,
        last: Tensor | None, block: int, candidates: int, recent: int) -> Tensor:
    """Arguments as kernels.select_by_blocks, first and last (B,S) contiguous int32 -> (B,S,K) int32"""
    q, k, w = operands(q, k, w)
    B, S, HI, DI = q.shape
    T = k.shape[1]
    out = torch.empty(B, S, topk, dtype=torch.int32, device=q.device)
    if B * S * T == 0:
        return out.fill_(-1)

    M = min(triton.cdiv(candidates, block), triton.cdiv(T, block))
    bounds = launch_bounds(B, S, T, first, last, M, block, recent, q.device)
    beginning, recently, low, high, low_token, high_token, first_slot, last_slot = bounds  # (B, S) each
    q_mixed, w_mixed = mixed_heads(q, w)  # (B, S, 2, DI), (B, S, 2)

    score = index_tiles(HI, DI, 1, q.dtype, q.device)
    width = padded_row((2 + M) * block + recent)
    stride_sb, stride_st = (0, 0) if k_scale is None else k_scale.stride()
    for batch, first_row, rows in chunks(B, S, width + T // block):
        n = batch.stop - batch.start
        # the best blocks of each query
        lists = rank_blocks(
            q_mixed[batch], k[batch], w_mixed[batch], take(k_scale, batch), low[batch], high[batch],
            low_token[batch], high_token[batch], first_row, rows, M, block)

        # the scores of their tokens
        scores = torch.empty(n, rows, width, dtype=torch.float32, device=q.device)
        span = keys_per_program(n * rows * M * block, score.block_t, q.device)
        candidate_scores_kernel[(rows, triton.cdiv(M * block, span) + 1, n)](
            q_ptr=q[batch], k_ptr=k[batch], w_ptr=w[batch], k_scale_ptr=take(k_scale, batch), list_ptr=lists,
            first_ptr=take(first, batch), last_ptr=take(last, batch),
            beginning_ptr=beginning[batch], recently_ptr=recently[batch], out_ptr=scores,
            S=S, T=T, first_row=first_row, rows=rows, width=width, span=span, M=M,
            stride_kb=k.stride(0), stride_kt=k.stride(1), stride_sb=stride_sb, stride_st=stride_st,
            HI=HI, DI=DI, BLOCK=block, BLOCK_S=score.block_s, BLOCK_H=score.block_h, BLOCK_D=score.block_d,
            BLOCK_T=score.block_t, TURN=score.turn, DECODE_E4M3=q.dtype == torch.uint8,
            num_stages=score.num_stages, num_warps=score.num_warps)

        # the best of them
        launch_topk(out[batch], scores, width, first_slot[batch], last_slot[batch], first_row, rows)
        positions_kernel[(n * rows,)](
            slots_ptr=out[batch], list_ptr=lists,
            beginning_ptr=beginning[batch], recently_ptr=recently[batch],
            S=S, first_row=first_row, rows=rows, K=topk, M=M,
            BLOCK=block, BLOCK_K=triton.next_power_of_2(topk),
            num_warps=4)
    return out


@select_by_blocks_operation.register_fake
def _(q, k, w, topk, k_scale, first, last, block, candidates, recent):
    return q.new_empty(q.shape[0], q.shape[1], topk, dtype=torch.int32)


@torch.no_grad()
def select_by_blocks(q, k, w, topk, k_scale=None, first=None, last=None, block=16, candidates=0,
                     recent=RECENT):
    """What kernels.select_by_blocks promises: shapes, dtypes and errors stand there."""
    B, S = q.shape[:2]
    T = k.shape[1]
    check_two_levels(topk, block, candidates, recent)
    candidates = candidates or default_candidates(topk, T)
    if T <= candidates + recent:  # all blocks are candidates
        return select(q, k, w, topk, k_scale, first, last)
    check_inputs(q, k, w, k_scale)
    return select_by_blocks_operation(
        q, k, w, topk, k_scale, full_bounds(first, B, S), full_bounds(last, B, S), block, candidates, recent)
