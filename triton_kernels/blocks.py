"""Chapter 7: selection in two levels, for contexts beyond 128K. A key per block of tokens, and a selection
that scores tokens only in the blocks whose keys score best. Scores and top-k are those of chapter 1.
"""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from indexer import RECENT, check_two_levels, default_candidates
from triton_kernels.common import (
    e4m3_to_fp16, fit, full_bounds, has_fp8, load_bounds, multiprocessors, operation, power_of_two,
    unit_stride)
from triton_kernels.index import (
    ALIGNED_ROW, DIRECT_ROW, LEAST_SPAN, LONGEST_SPAN, PROGRAMS, TILE, check_inputs, chunks, dealt_columns,
    fill_tiles, index_tiles, launch_scores, launch_topk, operands, quantise_operation, score_keys, select,
    take)

MEANS_ELEMENTS = 2048  # of a program of block_means_kernel
BOUNDS = 512  # queries of a program of bounds_kernel


# ---- block_keys ----
# contract    kernels.block_keys
# in PyTorch  indexer.block_keys
# equation    mean[n] = 1 / BLOCK sum_i k_scale[BLOCK n + i] k[BLOCK n + i], then `quantise`
# tiling      a program takes BLOCK_N blocks with all dimensions, and adds token after token: with scales that
#             are powers of two every product is exact, and the sum has the reference's bits
# FLOPs       2 per element of k
# bytes       k once, 4 / BLOCK of its elements written: bound by memory


@triton.jit
def block_means_kernel(
        k_ptr, k_scale_ptr, out_ptr,
        N, stride_kb, stride_kt, stride_sb, stride_st,
        DI: tl.constexpr, BLOCK: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
        DECODE_E4M3: tl.constexpr):
    b = tl.program_id(1).to(tl.int64)
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    d = tl.arange(0, BLOCK_D)
    mask = (n < N)[:, None] & (d < DI)[None, :]
    total = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    for i in range(BLOCK):
        t = n.to(tl.int64) * BLOCK + i
        key = tl.load(k_ptr + b * stride_kb + t[:, None] * stride_kt + d[None, :], mask=mask, other=0.0)
        if DECODE_E4M3:
            key = e4m3_to_fp16(key)
        key = key.to(tl.float32)
        if k_scale_ptr is not None:
            scale = tl.load(k_scale_ptr + b * stride_sb + t * stride_st, mask=n < N, other=0.0)
            key = key * scale[:, None]
        total += key
    mean = tl.div_rn(total, tl.full([BLOCK_N, BLOCK_D], BLOCK, tl.float32))
    at = (b * N + n)[:, None] * DI + d[None, :]
    tl.store(out_ptr + at, mean.to(out_ptr.dtype.element_ty), mask=mask)


@operation("block_means")
def block_means(k: Tensor, k_scale: Tensor | None, block: int) -> Tensor:
    """k (B,T,DI), k_scale (B,T) -> (B,T // block,DI), float32 of e4m3 keys, else k's dtype"""
    B, T, DI = k.shape
    N = T // block
    dtype = k.dtype if k_scale is None else torch.float32
    means = torch.empty(B, N, DI, dtype=dtype, device=k.device)
    if means.numel() == 0:
        return means
    decode = k_scale is not None and k.is_cuda and not has_fp8(k.device)
    k = unit_stride(k.view(torch.uint8) if decode else k)
    block_d = power_of_two(DI)
    block_n = max(1, MEANS_ELEMENTS // block_d)
    stride_sb, stride_st = (0, 0) if k_scale is None else k_scale.stride()
    block_means_kernel[(triton.cdiv(N, block_n), B)](
        k_ptr=k, k_scale_ptr=k_scale, out_ptr=means,
        N=N, stride_kb=k.stride(0), stride_kt=k.stride(1), stride_sb=stride_sb, stride_st=stride_st,
        DI=DI, BLOCK=block, BLOCK_N=block_n, BLOCK_D=block_d, DECODE_E4M3=decode,
        num_warps=4)
    return means


@block_means.register_fake
def _(k, k_scale, block):
    dtype = k.dtype if k_scale is None else torch.float32
    return k.new_empty(k.shape[0], k.shape[1] // block, k.shape[2], dtype=dtype)


@torch.no_grad()
def block_keys(k, k_scale=None, block=16):
    if block < 1:
        raise ValueError(f"block={block}: at least 1 token")
    means = block_means(k, k_scale, block)  # (B, T // block, DI)
    if k_scale is None:
        return means, None
    values, scale = quantise_operation(means, k.shape[2], False, True)
    return values, scale.squeeze(-1)


# ---- select_by_blocks ----
# contract    kernels.select_by_blocks
# in PyTorch  indexer.select_by_blocks
# equation    S_t = the K highest of I[t, s], s in the first block, in the last `recent` tokens, or in one of
#             the M = C / BLOCK blocks n with the highest max over the tile's queries of Ibar[t, n]
# tiling      rows of queries in chunks, of each:
#             rank     Ibar of the ranked blocks by scores_kernel, of a tile the highest; its top-k by
#                      topk_kernel, which gives a list of blocks, ascending
#             score    a program keeps the queries of a tile (or a part of them) as scores_kernel does, and
#                      streams the keys of the listed blocks, BLOCK_T tokens at a time; another the tokens
#                      that are read whatever they score. A query's row of slots is
#                          first block | list, M BLOCK slots | recent tokens
#                      in the order of positions, -inf where the query does not rank the block
#             best     topk_kernel on the slots, of equal ones the lower; then slots become positions
# FLOPs       2 HI DI per pair: T^2 / (2 BLOCK) for blocks, T (C + recent) for tokens. At T = 2^20, 8 heads of
#             64 and C = T / 32: 3.5e13 and 3.5e13, for 5.6e14 of `select`
# bytes       scores: 4 T^2 / (2 BLOCK TILE) and 4 T (C + recent), written and read, in chunks. Keys: DI (C +
#             recent) per tile, from L2. T = 2^20, C = T / 32: 8.6 GB (tile 16; alone 137 GB), 139 GB, and
#             140 GB of keys (alone 2.2 TB). So the slots bound it, and without tiles the gather


@triton.jit
def scores_of_tokens(
        t, ok, k_ptr, k_scale_ptr, q, w, h,
        stride_kt, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr, TURN: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """Scores of the tokens t (n) of a sequence, where ok -> (n, BLOCK_S)"""
    d = tl.arange(0, BLOCK_D)
    t = t.to(tl.int64)
    k = tl.load(
        k_ptr + t[:, None] * stride_kt + d[None, :], mask=ok[:, None] & (d < DI)[None, :], other=0.0)
    score = score_keys(k, q, w, h, HI, BLOCK_S, BLOCK_H, TURN, DECODE_E4M3)
    if k_scale_ptr is not None:
        score = score * tl.load(k_scale_ptr + t * stride_st, mask=ok, other=0.0)[:, None]
    return score


@triton.jit
def score_run(
        out_row_ptr, begin, end, k_ptr, k_scale_ptr, q, w, h,
        T, stride_kt, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr,
        BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr, TURN: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """Scores of the tokens begin..end-1 of each query, that of token t to out_row_ptr + t"""
    wants = begin < end
    lo = tl.min(tl.where(wants, begin, T))
    hi = tl.max(tl.where(wants, end, 0))
    for t0 in range(lo, hi, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        wanted = (t[:, None] >= begin[None, :]) & (t[:, None] < end[None, :])
        if tl.max(tl.max(wanted.to(tl.int32), 1), 0) > 0:  # not between documents, or chunks of a rank
            score = scores_of_tokens(
                t, t < T, k_ptr, k_scale_ptr, q, w, h,
                stride_kt, stride_st,
                HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, TURN, DECODE_E4M3)
            tl.store(out_row_ptr[None, :] + t[:, None], score, mask=wanted)


@triton.jit
def candidate_scores_kernel(
        q_ptr, k_ptr, w_ptr, k_scale_ptr, list_ptr, tile_first_ptr, tile_last_ptr, first_ptr, last_ptr,
        beginning_ptr, recently_ptr, out_ptr,
        S, T, first_row, rows, width, span, M, tile,
        stride_kb, stride_kt, stride_sb, stride_st,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_T: tl.constexpr,
        TURN: tl.constexpr, DECODE_E4M3: tl.constexpr):
    b = tl.program_id(2).to(tl.int64)
    parts = tl.cdiv(tile, BLOCK_S)
    tile_row = b * (tl.num_programs(0) // parts) + tl.program_id(0) // parts
    r0 = tl.program_id(0) // parts * tile + tl.program_id(0) % parts * BLOCK_S
    end = tl.minimum(tl.minimum(r0 + BLOCK_S, (tl.program_id(0) // parts + 1) * tile), rows)
    end = tl.minimum(end, S - first_row)

    # what is kept: a column per query and head
    r, h = dealt_columns(BLOCK_S, BLOCK_H, TURN)
    r += r0
    d = tl.arange(0, BLOCK_D)
    ok = (r < end) & (h < HI)
    at = (b * S + first_row + r) * HI + h
    q = tl.load(q_ptr + at[:, None] * DI + d[None, :], mask=ok[:, None] & (d < DI)[None, :], other=0.0)
    w = tl.load(w_ptr + at, mask=ok, other=0.0)
    if DECODE_E4M3:
        q = e4m3_to_fp16(q)

    # what the queries see, and which blocks they rank: those between
    r = r0 + tl.arange(0, BLOCK_S)
    ok = r < end
    first, last = load_bounds(first_ptr, last_ptr, b, first_row + r, S, T)
    last = tl.where(ok, last, -1)
    beginning = tl.load(beginning_ptr + b * S + first_row + r, mask=ok, other=0)
    recently = tl.load(recently_ptr + b * S + first_row + r, mask=ok, other=0)
    out_row_ptr = out_ptr + (b * rows + r) * width
    k_ptr += b * stride_kb
    if k_scale_ptr is not None:
        k_scale_ptr += b * stride_sb

    if tl.program_id(1) == tl.num_programs(1) - 1:
        # the first block, unless it is recent, and the recent tokens
        first_end = tl.where(beginning < recently, (beginning + 1) * BLOCK, first)
        score_run(
            out_row_ptr - beginning * BLOCK, first, tl.minimum(first_end, last + 1),
            k_ptr, k_scale_ptr, q, w, h,
            T, stride_kt, stride_st,
            HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, BLOCK_T, TURN, DECODE_E4M3)
        score_run(
            out_row_ptr + (1 + M - recently) * BLOCK, tl.maximum(recently * BLOCK, first), last + 1,
            k_ptr, k_scale_ptr, q, w, h,
            T, stride_kt, stride_st,
            HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, BLOCK_T, TURN, DECODE_E4M3)
    else:
        # the listed blocks; behind those that the tile ranks, the list is empty
        ranked = tl.load(tile_last_ptr + tile_row) - tl.load(tile_first_ptr + tile_row) + 1
        listed = tl.minimum(tl.maximum(ranked, 0), M) * BLOCK
        out_row_ptr += BLOCK
        begin = tl.program_id(1) * span
        stop = tl.minimum(begin + span, M * BLOCK)
        for c0 in tl.range(begin, tl.minimum(stop, listed), BLOCK_T):
            c = c0 + tl.arange(0, BLOCK_T)
            n = tl.load(list_ptr + tile_row * M + c // BLOCK, mask=c < stop, other=-1)
            score = scores_of_tokens(
                n * BLOCK + c % BLOCK, n >= 0, k_ptr, k_scale_ptr, q, w, h,
                stride_kt, stride_st,
                HI, DI, BLOCK_S, BLOCK_H, BLOCK_D, TURN, DECODE_E4M3)
            ranks = (n[:, None] > beginning[None, :]) & (n[:, None] < recently[None, :])
            tl.store(
                out_row_ptr[None, :] + c[:, None], tl.where(ranks, score, float("-inf")),
                mask=ok[None, :] & (c < stop)[:, None])
        rest = begin + tl.cdiv(tl.maximum(tl.minimum(stop, listed) - begin, 0), BLOCK_T) * BLOCK_T
        fill_tiles(out_row_ptr, rest, stop, stop, ok, BLOCK_T, BLOCK_S)


@triton.jit
def positions_kernel(
        slots_ptr, list_ptr, beginning_ptr, recently_ptr,
        S, first_row, rows, K, M, tile,
        BLOCK: tl.constexpr, BLOCK_K: tl.constexpr):
    """The slots that were selected, in place, to positions"""
    b = (tl.program_id(0) // rows).to(tl.int64)
    r = tl.program_id(0) % rows
    at = b * S + first_row + r
    j = tl.arange(0, BLOCK_K)
    slot = tl.load(slots_ptr + at * K + j, mask=j < K, other=-1)
    listed = (slot >= BLOCK) & (slot < (1 + M) * BLOCK)
    tile_row = b * tl.cdiv(rows, tile) + r // tile
    n = tl.load(list_ptr + tile_row * M + slot // BLOCK - 1, mask=listed, other=0)
    n = tl.where(slot < BLOCK, tl.load(beginning_ptr + at), n)
    recent = tl.load(recently_ptr + at) * BLOCK + slot - (1 + M) * BLOCK
    position = tl.where(slot < (1 + M) * BLOCK, n * BLOCK + slot % BLOCK, recent)
    tl.store(slots_ptr + at * K + j, tl.where(slot < 0, -1, position), mask=j < K)


@triton.jit
def bounds_kernel(
        first_ptr, last_ptr, bounds_ptr,
        total, S, T, M, recent,
        BLOCK: tl.constexpr, BLOCK_N: tl.constexpr):
    """Where what a query sees begins and ends -> bounds (6,B,S): its first block, and the one in which its
    recent tokens begin; the first and the last block that it ranks; its first and its last slot"""
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
    tl.store(bounds_ptr + 4 * total + n, first_slot, mask=ok)
    tl.store(bounds_ptr + 5 * total + n, last + behind, mask=ok)


def launch_bounds(B, S, T, first, last, M, block, recent, device):
    """-> (6,B,S) int32, see bounds_kernel"""
    bounds = torch.empty(6, B, S, dtype=torch.int32, device=device)
    bounds_kernel[(triton.cdiv(B * S, BOUNDS),)](
        first_ptr=first, last_ptr=last, bounds_ptr=bounds,
        total=B * S, S=S, T=T, M=M, recent=recent,
        BLOCK=block, BLOCK_N=BOUNDS,
        num_warps=4)
    return bounds


def of_tiles(low, high, tile):
    """The smallest range that holds those of a tile's queries, low..high (B,S) -> (B,tiles) int32 each"""
    if tile == 1:
        return low.contiguous(), high.contiguous()
    empty = low > high
    padding = (0, -low.shape[1] % tile)
    low = F.pad(low.masked_fill(empty, 2**30), padding, value=2**30).unflatten(1, (-1, tile)).amin(2)
    high = F.pad(high.masked_fill(empty, -1), padding, value=-1).unflatten(1, (-1, tile)).amax(2)
    return low.contiguous(), high.contiguous()


def rank_blocks(q, k_blocks, w, block_scale, low, high, tile_low, tile_high, first_row, rows, M, tile):
    """A chunk's lists of the M best blocks of low..high (B,S) -> (B,tiles,M) int32"""
    B, S, HI, DI = q.shape
    N = k_blocks.shape[1]
    tiles = triton.cdiv(rows, tile)
    part = min(tile, index_tiles(HI, DI, tiles * tile, q.dtype, q.device).block_s)
    multiple = ALIGNED_ROW if N <= DIRECT_ROW else TILE
    width = triton.cdiv(N, multiple) * multiple
    scores = torch.empty(B, tiles * tile // part, width, dtype=torch.float32, device=q.device)
    if part < tile:
        scores.fill_(float("-inf"))  # what one part does not see another may
    launch_scores(scores, q, k_blocks, w, block_scale, low, high, first_row, tiles * tile, tile=part)
    if part < tile:
        scores = scores.unflatten(1, (tiles, tile // part)).amax(2)  # (B, tiles, width)
    lists = torch.empty(B, tiles, M, dtype=torch.int32, device=q.device)
    launch_topk(lists, scores, N, tile_low, tile_high, 0, tiles)
    return lists


@operation("select_by_blocks")
def select_by_blocks_operation(
        q: Tensor, k: Tensor, w: Tensor, topk: int, k_scale: Tensor | None, first: Tensor | None,
        last: Tensor | None, k_blocks: Tensor, block_scale: Tensor | None, block: int, candidates: int,
        recent: int, tile: int) -> Tensor:
    """Arguments as kernels.select_by_blocks, first and last (B,S) contiguous int32 -> (B,S,K) int32"""
    q, k, w = operands(q, k, w)
    k_blocks = unit_stride(k_blocks.view(k.dtype))
    B, S, HI, DI = q.shape
    T = k.shape[1]
    out = torch.empty(B, S, topk, dtype=torch.int32, device=q.device)
    if B * S * T == 0:
        return out.fill_(-1)

    M = min(triton.cdiv(candidates, block), k_blocks.shape[1])
    bounds = launch_bounds(B, S, T, first, last, M, block, recent, q.device)
    beginning, recently, low, high, first_slot, last_slot = bounds  # (B, S) each

    score = index_tiles(HI, DI, tile, q.dtype, q.device)
    parts = triton.cdiv(tile, score.block_s)
    slots = (2 + M) * block + recent
    multiple = ALIGNED_ROW if slots <= DIRECT_ROW else TILE
    width = triton.cdiv(slots, multiple) * multiple
    stride_sb, stride_st = (0, 0) if k_scale is None else k_scale.stride()
    for batch, first_row, rows in chunks(B, S, width + k_blocks.shape[1] // tile, tile):
        n = batch.stop - batch.start
        tiles = triton.cdiv(rows, tile)
        here = (batch, slice(first_row, first_row + rows))
        q_part = q[batch]
        w_part = w[batch]

        # the blocks of each tile
        tile_low, tile_high = of_tiles(low[here], high[here], tile)
        lists = torch.empty(n, tiles, 0, dtype=torch.int32, device=q.device)
        if M:
            lists = rank_blocks(
                q_part, k_blocks[batch], w_part, take(block_scale, batch), low[batch], high[batch],
                tile_low, tile_high, first_row, rows, M, tile)

        # the scores of their tokens
        scores = torch.empty(n, rows, width, dtype=torch.float32, device=q.device)
        span = triton.cdiv(n * tiles * parts * M * block, PROGRAMS * multiprocessors(q.device))
        span = min(max(triton.cdiv(span, score.block_t) * score.block_t, LEAST_SPAN), LONGEST_SPAN)
        candidate_scores_kernel[(tiles * parts, triton.cdiv(M * block, span) + 1, n)](
            q_ptr=q_part, k_ptr=k[batch], w_ptr=w_part, k_scale_ptr=take(k_scale, batch),
            list_ptr=lists, tile_first_ptr=tile_low, tile_last_ptr=tile_high,
            first_ptr=take(first, batch), last_ptr=take(last, batch),
            beginning_ptr=beginning[batch], recently_ptr=recently[batch], out_ptr=scores,
            S=S, T=T, first_row=first_row, rows=rows, width=width, span=span, M=M, tile=tile,
            stride_kb=k.stride(0), stride_kt=k.stride(1), stride_sb=stride_sb, stride_st=stride_st,
            HI=HI, DI=DI, BLOCK=block, BLOCK_S=score.block_s, BLOCK_H=score.block_h, BLOCK_D=score.block_d,
            BLOCK_T=score.block_t, TURN=score.turn, DECODE_E4M3=q.dtype == torch.uint8,
            num_stages=score.num_stages, num_warps=score.num_warps)

        # the best of them
        launch_topk(out[batch], scores, width, first_slot[batch], last_slot[batch], first_row, rows)
        positions_kernel[(n * rows,)](
            slots_ptr=out[batch], list_ptr=lists,
            beginning_ptr=beginning[batch], recently_ptr=recently[batch],
            S=S, first_row=first_row, rows=rows, K=topk, M=M, tile=tile,
            BLOCK=block, BLOCK_K=triton.next_power_of_2(topk),
            num_warps=4)
    return out


@select_by_blocks_operation.register_fake
def _(q, k, w, topk, k_scale, first, last, k_blocks, block_scale, block, candidates, recent, tile):
    return q.new_empty(q.shape[0], q.shape[1], topk, dtype=torch.int32)


@torch.no_grad()
def select_by_blocks(q, k, w, topk, k_scale=None, first=None, last=None, k_blocks=None, block_scale=None,
                     block=16, candidates=0, recent=RECENT, tile=1):
    T = k.shape[1]
    check_two_levels(topk, block, candidates, recent, tile)
    candidates = candidates or default_candidates(topk, T)
    if T <= candidates + recent:  # all blocks are candidates
        return select(q, k, w, topk, k_scale, first, last)
    check_inputs(q, k, w, k_scale)
    if k_blocks is None:
        k_blocks, block_scale = block_keys(k, k_scale, block)
    B, S, HI, DI = q.shape
    check_inputs(q, k_blocks, w, block_scale)
    fit(k_blocks=(k_blocks, (B, T // block, DI)))
    return select_by_blocks_operation(
        q, k, w, topk, k_scale, full_bounds(first, B, S), full_bounds(last, B, S), k_blocks, block_scale,
        block, candidates, recent, tile)
