"""Chapter 4: the losses that train the indexer. They never differentiate the attention: the gradient with
respect to a score is softmax(I) - p, so one sweep over the pairs yields loss and gradients, for a chunk of
queries at a time and never S x T.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common import (
    BELOW_H100, LOG2E, LOWEST, check_indices, fit, full_bounds, is_hopper, load_bounds, load_tile,
    matmul, multiprocessors, operation, power_of_two, queries_seeing, shared_memory, store_tile,
    tile_of_program, two_powers, unit_stride, visible_range)
from triton_kernels.sparse import union, union_tokens

LOSS_CHUNK = 2**25  # pairs (query, key) that a chunk holds at a time: 18 bytes each at 64 indexer heads
BLOCKS_TOGETHER = tl.constexpr(8)  # of queries that programs take side by side
G_SCALE = tl.constexpr(64.0)  # gradients of scores are kept times this: float16 would lose those of long rows
LEAST_P = tl.constexpr(1e-37)  # whose logarithm is taken: p log p of p = 0 is 0
SCALED_ELEMENTS = 4096  # of a program of scale_rows_kernel
ALIGNED = tl.constexpr(128)  # rows of a chunk's buffers are so many elements long, or a multiple


# ---- the pass over a row of p and I, which both losses make ----

@triton.jit
def loss_row_kernel(
        p_ptr, score_ptr, g_ptr, kl_ptr, uniform_ptr, first_ptr, last_ptr,
        S, T, width, plane, first_row,
        BLOCK_S: tl.constexpr, PLANES: tl.constexpr, BLOCK_T: tl.constexpr):
    """kl, kl_uniform of one query and, unless g_ptr is None, G_SCALE times g = sum(p) softmax(I) - p.

    Row first_row + program of all queries, whose sequences are padded to multiples of BLOCK_S. Rows of the
    chunk's buffers are `width` long; p is the sum of PLANES buffers, `plane` elements apart."""
    x = tl.program_id(0)
    per_sequence = tl.cdiv(S, BLOCK_S) * BLOCK_S
    b = (first_row + x) // per_sequence
    s = (first_row + x) % per_sequence
    first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
    end = last + 1
    start = tl.minimum(first // ALIGNED * ALIGNED, width)
    p_ptr += x.to(tl.int64) * width
    score_ptr += x.to(tl.int64) * width

    # log sum exp of the scores, sum of p
    m = tl.full([BLOCK_T], LOWEST, tl.float32)
    l = tl.zeros([BLOCK_T], tl.float32)
    mass = tl.zeros([BLOCK_T], tl.float32)
    for t0 in tl.range(start, end, BLOCK_T, num_stages=2):
        t = t0 + tl.arange(0, BLOCK_T)
        seen = (t >= first) & (t < end)
        score = tl.load(score_ptr + t, mask=seen, other=float("-inf"))
        for i in tl.static_range(PLANES):
            mass += tl.load(p_ptr + i * plane + t, mask=seen, other=0.0)
        m_new = tl.maximum(m, score)
        l = l * tl.exp2((m - m_new) * LOG2E) + tl.exp2((score - m_new) * LOG2E)
        m = m_new
    top = tl.max(m)
    total_mass = tl.sum(mass)
    total = tl.sum(l * tl.exp2((m - top) * LOG2E))
    lse = top + tl.log(tl.where(total == 0, 1.0, total))  # a maximum would drop a NaN

    # the losses, and the gradient
    cross = tl.zeros([BLOCK_T], tl.float32)
    entropy = tl.zeros([BLOCK_T], tl.float32)
    if g_ptr is not None:
        g_ptr += x.to(tl.int64) * width
    for t0 in tl.range(start, end, BLOCK_T, num_stages=2):
        t = t0 + tl.arange(0, BLOCK_T)
        seen = (t >= first) & (t < end)
        log_q = tl.load(score_ptr + t, mask=seen, other=0.0) - lse
        p = tl.zeros([BLOCK_T], tl.float32)
        for i in tl.static_range(PLANES):
            p += tl.load(p_ptr + i * plane + t, mask=seen, other=0.0)
        plogp = p * tl.log(tl.maximum(p, LEAST_P))
        entropy += plogp
        cross += tl.where(seen, plogp - p * log_q, 0.0)
        if g_ptr is not None:
            g = tl.where(seen, (total_mass * tl.exp2(log_q * LOG2E) - p) * G_SCALE, 0.0)
            tl.store(g_ptr + t, g.to(g_ptr.dtype.element_ty), mask=t < width)

    # the products with g need no masks: it is zero wherever nothing is visible
    if g_ptr is not None:
        t = tl.arange(0, BLOCK_T)
        zero = tl.zeros([BLOCK_T], g_ptr.dtype.element_ty)
        for t0 in range(0, start, BLOCK_T):
            tl.store(g_ptr + t0 + t, zero, mask=t0 + t < start)
        for t0 in range(start + tl.cdiv(tl.maximum(end - start, 0), BLOCK_T) * BLOCK_T, width, BLOCK_T):
            tl.store(g_ptr + t0 + t, zero, mask=t0 + t < width)

    if s < S:
        tl.store(kl_ptr + b * S + s, tl.sum(cross))
        seen_keys = tl.maximum(end - first, 1).to(tl.float32)
        tl.store(uniform_ptr + b * S + s, tl.sum(entropy) + total_mass * tl.log(seen_keys))


# ---- indexer_loss_dense ----
# contract    kernels.indexer_loss_dense
# in PyTorch  p = exp(einsum("bshd,bthd->bsht", q, k) * scale - lse).mean(2)
#             kl = indexer.kl_divergence(p, index_scores(q_index, k_index, w), seen)
# equation    kl[t] = sum_s p (log p - log softmax(I[t])_s),  I[t,s] = sum_j w[t,j] relu(q_j[t].k[s])
#             g = softmax(I) - p,  o_j = [q_j.k > 0],  A_j[t] = sum_s g o_j k[s]:  dq_j = w_j A_j,
#             dw_j = q_j.A_j,  dk[s] = sum_tj dkl[t] g o_j w_j[t] q_j[t]
# tiling      chunks of whole blocks of BLOCK_S queries. Per chunk: p by tiles of BLOCK_T keys, all heads
#             summed in registers; I by tiles, with a bit per indexer head, o_j; a pass over rows for kl and
#             g; with the bits, dq and dw by blocks of queries and pairs of heads, dk by tiles of keys and
#             groups of 8 heads: no second q.k, no atomics
# FLOPs       per visible pair 2 H D + 6 HI DI, and H exponentials: p is the bulk of the work, done once
# bytes       per pair, written and read within a chunk: p 4, I 4, g 2, bits HI / 8
# backward    the incoming gradient dkl[t] scales rows of dq and dw. dk sums over rows: it is c dk, c the
#             median of dkl, plus a second sweep weighted by dkl - c, in which every block of queries with
#             dkl = c returns at once; the row pass only writes zeros to g. Cheap when the loss is a mean over
#             queries, exact for any dkl


@triton.jit
def loss_target_kernel(
        q_ptr, k_ptr, lse2_ptr, p_ptr, first_ptr, last_ptr,
        scale_log2, S, T, width, first_block, blocks, key_blocks,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh,
        H: tl.constexpr, D: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr,
        NUM_STAGES: tl.constexpr):
    """p of one tile. Heads and their columns, BLOCK_D at a time, are one loop, so that loads never drain."""
    STEPS: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    block, b, s0, t0 = tile_of_program(
        S, first_block, blocks, key_blocks, BLOCK_S, BLOCK_T, BLOCKS_TOGETHER)
    first, last = load_bounds(first_ptr, last_ptr, b, s0 + tl.arange(0, BLOCK_S), S, T)
    lo, hi = visible_range(first, last, T)
    if (lo >= t0 + BLOCK_T) | (hi <= t0):
        return
    s = tl.minimum(tl.arange(0, BLOCK_S), S - 1 - s0)
    t = tl.minimum(tl.arange(0, BLOCK_T), T - 1 - t0)
    q_ptr += b.to(tl.int64) * stride_qb + s0.to(tl.int64) * stride_qs
    k_ptr += b.to(tl.int64) * stride_kb + t0.to(tl.int64) * stride_kt
    lse2_ptr += b.to(tl.int64) * H * S + s0 + s
    p = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    logits = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    for step in tl.range(0, H * STEPS, num_stages=NUM_STAGES):
        h = step // STEPS
        d = step % STEPS * BLOCK_D + tl.arange(0, BLOCK_D)
        ok = (d < D)[None, :]
        q = tl.load(q_ptr + s[:, None] * stride_qs + (h * stride_qh + d)[None, :], mask=ok, other=0.0)
        k = tl.load(k_ptr + t[:, None] * stride_kt + (h * stride_kh + d)[None, :], mask=ok, other=0.0)
        logits = matmul(q, tl.trans(k), logits)
        if step % STEPS == STEPS - 1:
            p += tl.exp2(logits * scale_log2 - tl.load(lse2_ptr + h * S)[:, None])
            logits = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    row_offset = (block * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None] * width
    tl.store(p_ptr + row_offset + t0 + tl.arange(0, BLOCK_T)[None, :], p * (1.0 / H))


@triton.jit
def loss_scores_kernel(
        q_ptr, k_ptr, w_ptr, score_ptr, bits_ptr, first_ptr, last_ptr,
        S, T, width, plane, first_block, blocks, key_blocks,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
        BLOCK_T: tl.constexpr, NUM_STAGES: tl.constexpr):
    """I of one tile, and for each group of 8 heads a plane of bytes: bit 7 - j % 8 says that the relu of head
    j is open (at exactly 0 it is closed). w (B,HI,S)."""
    block, b, s0, t0 = tile_of_program(
        S, first_block, blocks, key_blocks, BLOCK_S, BLOCK_T, BLOCKS_TOGETHER)
    first, last = load_bounds(first_ptr, last_ptr, b, s0 + tl.arange(0, BLOCK_S), S, T)
    lo, hi = visible_range(first, last, T)
    if (lo >= t0 + BLOCK_T) | (hi <= t0):
        return
    s = tl.minimum(tl.arange(0, BLOCK_S), S - 1 - s0)
    t = tl.minimum(tl.arange(0, BLOCK_T), T - 1 - t0)
    q_ptr += b.to(tl.int64) * stride_qb + s0.to(tl.int64) * stride_qs
    k_ptr += b.to(tl.int64) * stride_kb + t0.to(tl.int64) * stride_kt
    w_ptr += b.to(tl.int64) * HI * S + s0 + s
    d = tl.arange(0, BLOCK_D)
    ok = (d < DI)[None, :]
    k = tl.load(k_ptr + t[:, None] * stride_kt + d[None, :], mask=ok, other=0.0)
    row_offset = (block * BLOCK_S + tl.arange(0, BLOCK_S)).to(tl.int64)[:, None] * width
    at = row_offset + t0 + tl.arange(0, BLOCK_T)[None, :]
    score = tl.zeros([BLOCK_S, BLOCK_T], tl.float32)
    bits = tl.zeros([BLOCK_S, BLOCK_T], tl.uint32)
    for j in tl.range(0, HI, num_stages=NUM_STAGES):
        q = tl.load(q_ptr + s[:, None] * stride_qs + (j * stride_qh + d)[None, :], mask=ok, other=0.0)
        dots = matmul(q, tl.trans(k))
        relu = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
        score += relu * tl.load(w_ptr + j * S)[:, None]
        # the sign bit of 0 - x is set for x > 0 alone: 0 - 2 is negative, 0 - 0 and 0 - -0 are +0
        bits = (bits << 1) | ((0.0 - dots).to(tl.uint32, bitcast=True) >> 31)
        if (j % 8 == 7) | (j == HI - 1):
            tl.store(bits_ptr + (j // 8) * plane.to(tl.int64) + at, (bits << (7 - j % 8)).to(tl.uint8))
    tl.store(score_ptr + at, score)


@triton.jit
def store_query_gradient(
        q_ptr, w_ptr, dq_ptr, dw_ptr, a, b, s, j, S, stride_qs, HI: tl.constexpr, DI: tl.constexpr,
        BLOCK_D: tl.constexpr):
    """G_SCALE times A_j of the queries s -> dq_j = w_j A_j and dw_j = q_j . A_j; q_ptr: head j of sequence
    b"""
    ok = s < S
    a = a / G_SCALE
    w = tl.load(w_ptr + (b.to(tl.int64) * HI + j) * S + s, mask=ok, other=0.0)
    q = load_tile(q_ptr, s.to(tl.int64) * stride_qs, ok, 0, DI, BLOCK_D).to(tl.float32)
    row = (b.to(tl.int64) * S + s) * HI + j
    tl.store(dw_ptr + row, tl.sum(q * a, 1), mask=ok)
    store_tile(dq_ptr, row * DI, ok, 0, DI, BLOCK_D, a * w[:, None])


@triton.jit
def loss_dq_kernel(
        q_ptr, k_ptr, w_ptr, g_ptr, bits_ptr, dq_ptr, dw_ptr, first_ptr, last_ptr,
        S, T, width, plane, first_block,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_D: tl.constexpr, QUERY_BLOCK: tl.constexpr,
        BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, NUM_STAGES: tl.constexpr):
    """dq, dw of two heads (of one, if there is one) of BLOCK_S queries, which divide the chunk's blocks of
    QUERY_BLOCK, for dkl = 1"""
    j = tl.program_id(0) * 2
    x = tl.program_id(1) * BLOCK_S
    per_sequence = tl.cdiv(S, QUERY_BLOCK) * QUERY_BLOCK
    b = (first_block * QUERY_BLOCK + x) // per_sequence
    s = (first_block * QUERY_BLOCK + x) % per_sequence + tl.arange(0, BLOCK_S)
    first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
    lo, hi = visible_range(first, last, T)
    row_offset = (x + tl.arange(0, BLOCK_S)).to(tl.int64) * width
    k_ptr += b.to(tl.int64) * stride_kb
    bits_ptr += (j // 8).to(tl.int64) * plane
    a0 = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    a1 = tl.zeros([BLOCK_S, BLOCK_D], tl.float32)
    for t0 in tl.range(lo // BLOCK_T * BLOCK_T, hi, BLOCK_T, num_stages=NUM_STAGES):
        t = t0 + tl.arange(0, BLOCK_T)
        k = load_tile(k_ptr, t.to(tl.int64) * stride_kt, t < T, 0, DI, BLOCK_D)
        g = tl.load(g_ptr + row_offset[:, None] + t[None, :])
        bits = tl.load(bits_ptr + row_offset[:, None] + t[None, :])
        a0 = matmul(tl.where(((bits >> (7 - j % 8)) & 1) != 0, g, 0.0).to(k.dtype), k, a0)
        if HI > 1:
            a1 = matmul(tl.where(((bits >> (6 - j % 8)) & 1) != 0, g, 0.0).to(k.dtype), k, a1)
    q_ptr += b.to(tl.int64) * stride_qb + j * stride_qh
    store_query_gradient(q_ptr, w_ptr, dq_ptr, dw_ptr, a0, b, s, j, S, stride_qs, HI, DI, BLOCK_D)
    if j + 1 < HI:
        store_query_gradient(
            q_ptr + stride_qh, w_ptr, dq_ptr, dw_ptr, a1, b, s, j + 1, S, stride_qs, HI, DI, BLOCK_D)


@triton.jit
def loss_dk_kernel(
        wq_ptr, g_ptr, bits_ptr, dk_ptr, first_ptr, last_ptr,
        B, S, T, width, plane, first_block, blocks,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_D: tl.constexpr, QUERY_BLOCK: tl.constexpr,
        HEADS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, NUM_STAGES: tl.constexpr):
    """dk of a tile of keys from one group of HEADS <= 8 heads, added to what earlier chunks left. wq = dkl w
    q of the chunk's queries, padded as they are."""
    group = tl.program_id(1)
    t0 = tl.program_id(0) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)
    d = tl.arange(0, BLOCK_D)
    per_sequence = tl.cdiv(S, QUERY_BLOCK)
    b = first_block // per_sequence + tl.program_id(2)
    # where the chunk's buffers hold, or would hold, query 0 of b
    x0 = (b * per_sequence - first_block) * QUERY_BLOCK
    s0 = tl.maximum(0, -x0)
    s1 = tl.minimum(S, blocks * QUERY_BLOCK - x0)
    lo, hi, _ = queries_seeing(first_ptr, last_ptr, b, t0, t0 + BLOCK_T, s0, s1, S, T)
    if lo < hi:
        bits_ptr += group.to(tl.int64) * plane
        acc = tl.zeros([BLOCK_T, BLOCK_D], tl.float32)
        for start in tl.range(lo // BLOCK_S * BLOCK_S, hi, BLOCK_S, num_stages=NUM_STAGES):
            s = start + tl.arange(0, BLOCK_S)
            x = (x0 + s).to(tl.int64)
            g = tl.load(g_ptr + x[None, :] * width + t[:, None])
            bits = tl.load(bits_ptr + x[None, :] * width + t[:, None])
            for i in tl.static_range(HEADS):
                j = group * 8 + i
                ok = (s < s1) & (j < HI)
                wq = load_tile(wq_ptr + j * DI, x * (HI * DI), ok, 0, DI, BLOCK_D)
                acc = matmul(tl.where(((bits >> (7 - i)) & 1) != 0, g, 0.0).to(wq.dtype), wq, acc)
        at = dk_ptr + ((group * B + b).to(tl.int64) * T + t)[:, None] * DI + d[None, :]
        ok = (t < T)[:, None] & (d < DI)[None, :]
        tl.store(at, tl.load(at, mask=ok, other=0.0) + acc / G_SCALE, mask=ok)


@triton.jit
def scale_rows_kernel(
        x_ptr, weight_ptr, out_ptr,
        rows, stride_s, stride_h,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROWS: tl.constexpr):
    """x (n,HI,DI) times weight (n,HI); rows that weigh 0 are not read, and 0 whatever they hold."""
    row = tl.program_id(0) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    ok = row < rows
    weight = tl.load(weight_ptr + row, mask=ok, other=0.0)
    offset = (row // HI).to(tl.int64) * stride_s + row % HI * stride_h
    x = load_tile(x_ptr, offset, ok & (weight != 0), 0, DI, BLOCK_D).to(tl.float32)
    store_tile(out_ptr, row.to(tl.int64) * DI, ok, 0, DI, BLOCK_D, x * weight[:, None])


class LossTiles(NamedTuple):
    """Of a kernel of the dense loss."""
    block_s: int  # queries; in p and I a block, to a multiple of which sequences are padded
    block_t: int  # keys
    num_stages: int
    num_warps: int


def loss_target_tiles(dtype, device):
    """LossTiles of loss_target_kernel, for the dtype that `loss_dtype` gives."""
    if dtype == torch.float32:
        return LossTiles(block_s=32, block_t=32, num_stages=2, num_warps=4)
    if shared_memory(device) > BELOW_H100:
        return LossTiles(block_s=128, block_t=128, num_stages=4, num_warps=8)
    return LossTiles(block_s=128, block_t=64, num_stages=3, num_warps=8)


def loss_scores_tiles(dtype, device):
    """LossTiles of loss_scores_kernel, for the same."""
    if dtype == torch.float32:
        return LossTiles(block_s=32, block_t=32, num_stages=1, num_warps=4)
    if shared_memory(device) > BELOW_H100:
        return LossTiles(block_s=128, block_t=128, num_stages=3, num_warps=8)
    return LossTiles(block_s=128, block_t=64, num_stages=2, num_warps=8)


def loss_dq_tiles(head_pairs, queries, dtype, device):
    """Tiles for so many pairs of heads and padded queries; few: smaller ones, to fill the device."""
    if dtype == torch.float32:
        tiles = LossTiles(block_s=32, block_t=32, num_stages=1, num_warps=4)
    elif shared_memory(device) > BELOW_H100:
        tiles = LossTiles(block_s=64, block_t=32, num_stages=4, num_warps=4)
    else:
        tiles = LossTiles(block_s=128, block_t=64, num_stages=2, num_warps=8)
    while tiles.block_s > 16 and head_pairs * (queries // tiles.block_s) < 2 * multiprocessors(device):
        tiles = tiles._replace(block_s=tiles.block_s // 2, num_warps=4)
    return tiles


def loss_dk_tiles(dtype, device):
    """LossTiles of loss_dk_kernel, for the same."""
    if dtype == torch.float32:
        return LossTiles(block_s=32, block_t=32, num_stages=0, num_warps=4)
    if shared_memory(device) > BELOW_H100:
        return LossTiles(block_s=16, block_t=64, num_stages=3, num_warps=4)
    return LossTiles(block_s=32, block_t=64, num_stages=1, num_warps=8)


def loss_dtype(q, q_index):
    """The dtype that decides about the tiles of the dense loss: float32 if there is any."""
    return torch.float32 if q_index.dtype == torch.float32 else q.dtype


def loss_target(tiles, q, k, lse2, p, scale, first, last, first_block, blocks):
    """p (rows,width) of the chunk of `blocks` blocks from first_block on; lse2 (B,H,S) in base 2"""
    if is_hopper(q):
        from triton_kernels import hopper
        if tiles.block_s == hopper.TARGET_BLOCK.value and hopper.target_supported(q):
            hopper.gluon_target(q, k, lse2, p, scale, first, last, first_block, blocks)
            return
    S, H, D = q.shape[1:]
    T = k.shape[1]
    key_blocks = triton.cdiv(T, tiles.block_t)
    loss_target_kernel[(blocks * key_blocks,)](
        q_ptr=q, k_ptr=k, lse2_ptr=lse2, p_ptr=p, first_ptr=first, last_ptr=last,
        scale_log2=scale * LOG2E.value, S=S, T=T, width=p.shape[1],
        first_block=first_block, blocks=blocks, key_blocks=key_blocks,
        stride_qb=q.stride(0), stride_qs=q.stride(1), stride_qh=q.stride(2),
        stride_kb=k.stride(0), stride_kt=k.stride(1), stride_kh=0 if k.shape[2] == 1 else k.stride(2),
        H=H, D=D, BLOCK_D=min(64, power_of_two(D)), BLOCK_S=tiles.block_s, BLOCK_T=tiles.block_t,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)


def loss_scores(tiles, q_index, k_index, w_heads, score, bits, first, last, first_block, blocks):
    """I (rows,width) and bits (groups,rows,width) of a chunk; w_heads (B,HI,S)"""
    S, HI, DI = q_index.shape[1:]
    T = k_index.shape[1]
    rows, width = score.shape
    key_blocks = triton.cdiv(T, tiles.block_t)
    loss_scores_kernel[(blocks * key_blocks,)](
        q_ptr=q_index, k_ptr=k_index, w_ptr=w_heads, score_ptr=score, bits_ptr=bits,
        first_ptr=first, last_ptr=last,
        S=S, T=T, width=width, plane=rows * width,
        first_block=first_block, blocks=blocks, key_blocks=key_blocks,
        stride_qb=q_index.stride(0), stride_qs=q_index.stride(1), stride_qh=q_index.stride(2),
        stride_kb=k_index.stride(0), stride_kt=k_index.stride(1),
        HI=HI, DI=DI, BLOCK_D=power_of_two(DI), BLOCK_S=tiles.block_s, BLOCK_T=tiles.block_t,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)


def loss_query_grad(query_block, dtype, q_index, k_index, w_heads, g, bits, dq, dw, first, last, first_block,
                    blocks):
    """dq, dw (dkl = 1) of the queries of a chunk, blocks of query_block; w_heads (B,HI,S)"""
    S, HI, DI = q_index.shape[1:]
    T = k_index.shape[1]
    rows, width = g.shape
    head_pairs = triton.cdiv(HI, 2)
    tiles = loss_dq_tiles(head_pairs, blocks * query_block, dtype, q_index.device)
    loss_dq_kernel[(head_pairs, blocks * query_block // tiles.block_s)](
        q_ptr=q_index, k_ptr=k_index, w_ptr=w_heads, g_ptr=g, bits_ptr=bits, dq_ptr=dq, dw_ptr=dw,
        first_ptr=first, last_ptr=last,
        S=S, T=T, width=width, plane=rows * width, first_block=first_block,
        stride_qb=q_index.stride(0), stride_qs=q_index.stride(1), stride_qh=q_index.stride(2),
        stride_kb=k_index.stride(0), stride_kt=k_index.stride(1),
        HI=HI, DI=DI, BLOCK_D=power_of_two(DI), QUERY_BLOCK=query_block, BLOCK_S=tiles.block_s,
        BLOCK_T=tiles.block_t, NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)


def loss_key_grad(query_block, dtype, wq, g, bits, dk, first, last, S, first_block, blocks):
    """dk (groups,B,T,DI) += what the queries of a chunk contribute, blocks of query_block; wq (rows,HI,DI)"""
    HI, DI = wq.shape[1:]
    groups, B, T, _ = dk.shape
    rows, width = g.shape
    per_sequence = triton.cdiv(S, query_block)
    tiles = loss_dk_tiles(dtype, wq.device)
    sequences = (first_block + blocks - 1) // per_sequence + 1 - first_block // per_sequence
    loss_dk_kernel[(triton.cdiv(T, tiles.block_t), groups, sequences)](
        wq_ptr=wq, g_ptr=g, bits_ptr=bits, dk_ptr=dk, first_ptr=first, last_ptr=last,
        B=B, S=S, T=T, width=width, plane=rows * width, first_block=first_block, blocks=blocks,
        HI=HI, DI=DI, BLOCK_D=power_of_two(DI), QUERY_BLOCK=query_block, HEADS=min(8, HI),
        BLOCK_S=tiles.block_s, BLOCK_T=tiles.block_t, NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)


def scale_rows(x, weight, out):
    """x (n,HI,DI), its last dimension contiguous, times weight (n,HI) float32 -> into out (n,HI,DI),
    contiguous"""
    n, HI, DI = x.shape
    block_d = power_of_two(DI)
    block_rows = max(1, SCALED_ELEMENTS // block_d)
    scale_rows_kernel[(triton.cdiv(n * HI, block_rows),)](
        x_ptr=x, weight_ptr=weight.contiguous(), out_ptr=out,
        rows=n * HI, stride_s=x.stride(0), stride_h=x.stride(1),
        HI=HI, DI=DI, BLOCK_D=block_d, BLOCK_ROWS=block_rows,
        num_warps=4)


def dense_sweep(q, k, lse, scale, q_index, k_index, w, first, last, dkl, query_gradients):
    """One sweep over all chunks -> kl, kl_uniform (B,S); with query_gradients dq (B,S,HI,DI) and dw (B,S,HI)
    of sum kl; with dkl (B,S) dk (B,T,DI) float32 of sum dkl kl; else None for them."""
    B, S = q.shape[:2]
    T = k.shape[1]
    HI, DI = q_index.shape[2:]
    groups = triton.cdiv(HI, 8)
    device = q.device
    dtype = loss_dtype(q, q_index)
    target = loss_target_tiles(dtype, device)
    scores = loss_scores_tiles(dtype, device)
    block_s = scores.block_s
    per_sequence = triton.cdiv(S, block_s)
    all_blocks = B * per_sequence
    width = triton.cdiv(T, ALIGNED.value) * ALIGNED.value
    chunk = max(1, min(all_blocks, LOSS_CHUNK // max(1, block_s * width)))  # blocks
    rows = chunk * block_s

    kl = torch.empty(B, S, dtype=torch.float32, device=device)
    kl_uniform = torch.empty(B, S, dtype=torch.float32, device=device)
    p = torch.empty(rows, width, dtype=torch.float32, device=device)
    score = torch.empty(rows, width, dtype=torch.float32, device=device)
    bits = torch.empty(groups, rows, width, dtype=torch.uint8, device=device)
    g = None
    dq = None
    dk = None
    dw = None
    if dkl is not None:
        g = torch.empty(rows, width, dtype=q_index.dtype, device=device)
        wq = torch.zeros(rows, HI, DI, dtype=q_index.dtype, device=device)
        dk = torch.zeros(groups, B, T, DI, dtype=torch.float32, device=device)
    if query_gradients:
        dq = torch.empty(B, S, HI, DI, dtype=q_index.dtype, device=device)
        dw = torch.empty(B, S, HI, dtype=torch.float32, device=device)
    lse2 = (lse.transpose(1, 2) * LOG2E.value).contiguous()  # (B, H, S)
    w_heads = w.transpose(1, 2).contiguous()  # (B, HI, S)

    for first_block in range(0, all_blocks, chunk):
        blocks = min(chunk, all_blocks - first_block)
        loss_target(target, q, k, lse2, p, scale, first, last, first_block, blocks)
        loss_scores(scores, q_index, k_index, w_heads, score, bits, first, last, first_block, blocks)
        loss_row_kernel[(blocks * block_s,)](
            p_ptr=p, score_ptr=score, g_ptr=g, kl_ptr=kl, uniform_ptr=kl_uniform,
            first_ptr=first, last_ptr=last,
            S=S, T=T, width=width, plane=0, first_row=first_block * block_s,
            BLOCK_S=block_s, PLANES=1, BLOCK_T=1024,
            num_warps=4)
        if query_gradients:
            loss_query_grad(
                block_s, dtype, q_index, k_index, w_heads, g, bits, dq, dw, first, last, first_block, blocks)
        if dkl is None:
            continue
        for b in range(first_block // per_sequence, (first_block + blocks - 1) // per_sequence + 1):
            # where the chunk holds, or would hold, query 0 of b
            x0 = (b * per_sequence - first_block) * block_s
            lo = max(0, -x0)
            hi = min(S, blocks * block_s - x0)
            weight = w[b, lo:hi] * dkl[b, lo:hi, None]  # (hi - lo, HI)
            scale_rows(q_index[b, lo:hi], weight, wq[x0 + lo:x0 + hi])
        loss_key_grad(block_s, dtype, wq, g, bits, dk, first, last, S, first_block, blocks)
    return kl, kl_uniform, dq, None if dk is None else dk.sum(0), dw


@operation("indexer_loss_dense")
def indexer_loss_dense_operation(
        q: Tensor, k: Tensor, lse: Tensor, scale: float, q_index: Tensor, k_index: Tensor, w: Tensor,
        first: Tensor | None, last: Tensor | None,
        learns: bool) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Arguments as kernels.indexer_loss_dense, with unit strides, first and last (B,S) contiguous int32
    -> kl, kl_uniform, and the gradients dq, dk (float32), dw of sum kl, empty unless learns"""
    dkl = torch.ones(q.shape[:2], dtype=torch.float32, device=q.device) if learns else None  # (B, S)
    kl, kl_uniform, dq, dk, dw = dense_sweep(q, k, lse, scale, q_index, k_index, w, first, last, dkl, learns)
    if not learns:
        dq = q_index.new_empty(0)
        dk = k_index.new_empty(0, dtype=torch.float32)
        dw = w.new_empty(0, dtype=torch.float32)
    return kl, kl_uniform, dq, dk, dw


@indexer_loss_dense_operation.register_fake
def _(q, k, lse, scale, q_index, k_index, w, first, last, learns):
    kl = q.new_empty(q.shape[:2], dtype=torch.float32)
    dq = q_index.new_empty(q_index.shape if learns else 0)
    dk = k_index.new_empty(k_index.shape if learns else 0, dtype=torch.float32)
    dw = w.new_empty(w.shape if learns else 0, dtype=torch.float32)
    return kl, torch.empty_like(kl), dq, dk, dw


@operation("indexer_loss_dense_backward")
def indexer_loss_dense_backward(
        dkl: Tensor, q: Tensor, k: Tensor, lse: Tensor, scale: float, q_index: Tensor, k_index: Tensor,
        w: Tensor, first: Tensor | None, last: Tensor | None, dq: Tensor, dk: Tensor,
        dw: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dkl (B,S), arguments and gradients of the operation -> dq_index, dk_index, dw of sum dkl kl"""
    S = q.shape[1]
    T = k.shape[1]
    if dkl.numel() == 0:
        return torch.zeros_like(dq), dk.to(k_index.dtype, copy=True), dw.to(w.dtype, copy=True)
    dkl = dkl.float().contiguous()
    c = dkl.median()
    if last is None:
        last = torch.arange(T - S, T, dtype=torch.int32, device=q.device)  # (S,)
    last = torch.where(dkl == c, -1, last)  # (B, S): the second sweep sees the other queries alone
    rest = dense_sweep(q, k, lse, scale, q_index, k_index, w, first, last, dkl - c, False)[3]  # (B, T, DI)
    dq_index = torch.empty_like(dq)  # (B, S, HI, DI)
    scale_rows(dq.flatten(0, 1), dkl.flatten()[:, None].expand(-1, dq.shape[2]), dq_index)
    return dq_index, (c * dk + rest).to(k_index.dtype), (dw * dkl[..., None]).to(w.dtype)


@indexer_loss_dense_backward.register_fake
def _(dkl, q, k, lse, scale, q_index, k_index, w, first, last, dq, dk, dw):
    return tuple(x.new_empty(x.shape) for x in (q_index, k_index, w))


def keep_indexer_loss_dense(ctx, inputs, output):
    """For the backward: what the forward read, and the gradients that it made already."""
    q, k, lse, ctx.scale, q_index, k_index, w, first, last, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(q, k, lse, q_index, k_index, w, first, last, *output[2:])


def differentiate_indexer_loss_dense(ctx, dkl, *_):
    """Gradients of dkl (B,S) to q_index, k_index and w."""
    q, k, lse, q_index, k_index, w, first, last, dq, dk, dw = ctx.saved_tensors
    gradients = indexer_loss_dense_backward(
        dkl, q, k, lse, ctx.scale, q_index, k_index, w, first, last, dq, dk, dw)
    return None, None, None, None, *gradients, None, None, None


indexer_loss_dense_operation.register_autograd(
    differentiate_indexer_loss_dense, setup_context=keep_indexer_loss_dense)


def indexer_loss_dense(q, k, lse, scale, q_index, k_index, w, first=None, last=None):
    """What kernels.indexer_loss_dense promises: shapes, dtypes and errors stand there."""
    B, S, H, D = q.shape
    T, Hk = k.shape[1:3]
    HI, DI = q_index.shape[2:]
    fit(k=(k, (B, T, 1 if Hk == 1 else H, D)), lse=(lse, (B, S, H)), q_index=(q_index, (B, S, HI, DI)),
        k_index=(k_index, (B, T, DI)), w=(w, (B, S, HI)))
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q_index, k_index, w))
    kl, kl_uniform, *_ = indexer_loss_dense_operation(
        unit_stride(q.detach()), unit_stride(k.detach()), lse.detach(), scale,
        unit_stride(q_index), unit_stride(k_index), w,
        full_bounds(first, B, S), full_bounds(last, B, S), learns)
    return kl, kl_uniform.detach()


# ---- indexer_loss_sparse ----
# contract    kernels.indexer_loss_sparse
# in PyTorch  indexer.indexer_loss_sparse
# equation    as indexer_loss_dense, s in S_t
# tiling      a program takes BLOCK_S neighbouring queries with all heads, or BLOCK_H of them, and walks over
#             the union of their selections (sparse.py), BLOCK_U gathered tokens at a time as the M operand;
#             what belongs to query s goes to the token's slot among those that s chose. First p, then I, then
#             the row pass of the dense loss, whose g the backward reads by slot. dq and dw stay in the
#             program; dk is summed by float32 atomics
# FLOPs       per token of the union 2 BLOCK_S (H D + HI DI) forward, 6 BLOCK_S HI DI backward
# bytes       per token of the union 2 D + 2 DI forward; 2 DI and DI float32 atomics backward


@triton.jit
def loss_rows(block, group, blocks, S, H, BLOCK_S: tl.constexpr, BLOCK_H: tl.constexpr):
    """Rows (query, head) of a block and a group of heads -> sequence, query and head of each, is it real.
    Beyond the last head it is the last again: a q of zeros would make NaN of an infinite token."""
    row = tl.arange(0, BLOCK_S * BLOCK_H)
    s = block % blocks * BLOCK_S + row // BLOCK_H
    h = group * BLOCK_H + row % BLOCK_H
    return (block // blocks).to(tl.int64), s, tl.minimum(h, H - 1), (s < S) & (h < H)


@triton.jit
def slots_of(bits, used, BLOCK_S: tl.constexpr):
    """Which of the queries chose these tokens, and in which of its slots each stands, (tokens, BLOCK_S);
    slots used so far, before and after."""
    chosen = (bits[:, None] >> tl.arange(0, BLOCK_S)[None, :]) & 1
    return chosen != 0, used[None, :] + tl.cumsum(chosen, 0) - chosen, used + tl.sum(chosen, 0)


@triton.jit
def loss_sparse_target_kernel(
        q_ptr, latents_ptr, lse_ptr, lists_ptr, bits_ptr, length_ptr, p_ptr,
        scale_log2, S, K, blocks, list_width, first_block, plane,
        stride_qb, stride_qs, stride_qh, stride_lb, stride_lt,
        H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, BLOCK_S: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    """The share of BLOCK_H heads in p, of one block of queries: one plane of p."""
    local = tl.program_id(0)
    group = tl.program_id(1)
    block = first_block + local
    b, s, h, ok = loss_rows(block, group, blocks, S, H, BLOCK_S, BLOCK_H)
    q_offset = b * stride_qb + s.to(tl.int64) * stride_qs + h * stride_qh
    q1 = load_tile(q_ptr, q_offset, s < S, 0, D, D1)
    if D2 > 0:
        q2 = load_tile(q_ptr, q_offset, s < S, D1, D, D2)
    lse2 = tl.load(lse_ptr + (b * S + s) * H + h, mask=ok, other=float("inf")) * LOG2E
    length = tl.load(length_ptr + block)
    start = block.to(tl.int64) * list_width
    latents_ptr += b * stride_lb
    p_ptr += group.to(tl.int64) * plane + local.to(tl.int64) * BLOCK_S * K
    used = tl.zeros([BLOCK_S], tl.int32)
    for u0 in tl.range(0, length, BLOCK_U, num_stages=NUM_STAGES):
        token, bits = union_tokens(lists_ptr, bits_ptr, start, u0, length, BLOCK_S, BLOCK_U)
        at = token.to(tl.int64) * stride_lt
        every = bits >= 0  # all true: also tokens without bits may be read, see union_tokens
        logits = matmul(load_tile(latents_ptr, at, every, 0, D, D1), tl.trans(q1))
        if D2 > 0:
            logits = matmul(load_tile(latents_ptr, at, every, D1, D, D2), tl.trans(q2), logits)
        p = tl.exp2(logits * scale_log2 - lse2[None, :])
        p = tl.sum(tl.reshape(p, [BLOCK_U, BLOCK_S, BLOCK_H]), 2) * (1.0 / H)
        chosen, slot, used = slots_of(bits, used, BLOCK_S)
        tl.store(p_ptr + tl.arange(0, BLOCK_S)[None, :] * K + slot, p, mask=chosen)


@triton.jit
def loss_sparse_scores_kernel(
        q_ptr, k_ptr, w_ptr, lists_ptr, bits_ptr, length_ptr, score_ptr,
        S, K, blocks, list_width, first_block,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    """I of one block of queries."""
    block = first_block + tl.program_id(0)
    b, s, h, ok = loss_rows(block, 0, blocks, S, HI, BLOCK_S, BLOCK_H)
    q = load_tile(q_ptr, b * stride_qb + s.to(tl.int64) * stride_qs + h * stride_qh, s < S, 0, DI, BLOCK_D)
    w = tl.load(w_ptr + (b * S + s) * HI + h, mask=ok, other=0.0)
    length = tl.load(length_ptr + block)
    start = block.to(tl.int64) * list_width
    k_ptr += b * stride_kb
    score_ptr += tl.program_id(0).to(tl.int64) * BLOCK_S * K
    used = tl.zeros([BLOCK_S], tl.int32)
    for u0 in tl.range(0, length, BLOCK_U, num_stages=NUM_STAGES):
        token, bits = union_tokens(lists_ptr, bits_ptr, start, u0, length, BLOCK_S, BLOCK_U)
        at = token.to(tl.int64) * stride_kt
        every = bits >= 0  # all true, as in the target
        k = load_tile(k_ptr, at, every, 0, DI, BLOCK_D)
        dots = matmul(k, tl.trans(q))
        chosen, slot, used = slots_of(bits, used, BLOCK_S)
        relu = tl.maximum(dots, 0.0, propagate_nan=tl.PropagateNan.ALL)
        score = tl.sum(tl.reshape(relu * w[None, :], [BLOCK_U, BLOCK_S, BLOCK_H]), 2)
        tl.store(score_ptr + tl.arange(0, BLOCK_S)[None, :] * K + slot, score, mask=chosen)


@triton.jit
def loss_sparse_backward_kernel(
        q_ptr, k_ptr, w_ptr, lists_ptr, bits_ptr, length_ptr, g_ptr, dkl_ptr, largest_ptr,
        dq_ptr, dk_ptr, dw_ptr,
        S, T, K, blocks, list_width, g_rows,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt,
        HI: tl.constexpr, DI: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
        BLOCK_H: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    """dq, dw of one block of queries, and what it adds to dk. dkl: incoming gradients divided by the largest
    of them, so that dkl w q keeps its digits in fp16; g has g_rows rows per sequence."""
    block = tl.program_id(0)
    b, s, h, ok = loss_rows(block, 0, blocks, S, HI, BLOCK_S, BLOCK_H)
    q = load_tile(q_ptr, b * stride_qb + s.to(tl.int64) * stride_qs + h * stride_qh, s < S, 0, DI, BLOCK_D)
    weight = tl.load(w_ptr + (b * S + s) * HI + h, mask=ok, other=0.0)
    scale = tl.load(largest_ptr) / G_SCALE
    dkl = tl.load(dkl_ptr + b * S + s, mask=ok, other=0.0)
    weight *= dkl
    wq = (q.to(tl.float32) * weight[:, None]).to(q.dtype)
    length = tl.load(length_ptr + block)
    start = block.to(tl.int64) * list_width
    k_ptr += b * stride_kb
    g_ptr += (b * g_rows + block % blocks * BLOCK_S) * K
    d = tl.arange(0, BLOCK_D)
    used = tl.zeros([BLOCK_S], tl.int32)
    a = tl.zeros([BLOCK_D, BLOCK_S * BLOCK_H], tl.float32)  # A transposed
    for u0 in tl.range(0, length, BLOCK_U, num_stages=NUM_STAGES):
        token, bits = union_tokens(lists_ptr, bits_ptr, start, u0, length, BLOCK_S, BLOCK_U)
        chosen, slot, used = slots_of(bits, used, BLOCK_S)
        g = tl.load(g_ptr + tl.arange(0, BLOCK_S)[None, :] * K + slot, mask=chosen, other=0.0).to(tl.float32)
        g = tl.broadcast_to(g[:, :, None], [BLOCK_U, BLOCK_S, BLOCK_H])
        g = tl.reshape(g, [BLOCK_U, BLOCK_S * BLOCK_H])
        at = token.to(tl.int64) * stride_kt
        every = bits >= 0  # all true, as in the target
        k = load_tile(k_ptr, at, every, 0, DI, BLOCK_D)
        g = tl.where(matmul(k, tl.trans(q)) > 0, g, 0.0).to(k.dtype)
        a = matmul(tl.trans(k), g, a)
        tl.atomic_add(
            dk_ptr + (b * T + token)[:, None] * DI + d[None, :], matmul(g, wq) * scale,
            mask=(bits != 0)[:, None] & (d < DI)[None, :], sem="relaxed")
    a = a * scale
    row = (b * S + s) * HI + h
    tl.store(dw_ptr + row, tl.sum(tl.trans(q).to(tl.float32) * a, 0) * dkl, mask=ok)
    dq = (a * weight[None, :]).to(dq_ptr.dtype.element_ty)
    tl.store(dq_ptr + row[None, :] * DI + d[:, None], dq, mask=ok[None, :] & (d < DI)[:, None])


class SparseLossTiles(NamedTuple):
    """Of a kernel of the sparse loss."""
    block_s: int  # queries that share a list
    block_h: int  # heads of a program
    block_u: int  # tokens
    num_stages: int
    num_warps: int


def list_queries(S, heads, dtype):
    """How many queries share a list: as make 64 rows (query, head), at most 8; in float32, one."""
    if dtype.itemsize != 2 or S <= 1:
        return 1
    return min(8, max(1, 64 // power_of_two(heads, 1)))


def list_tokens(dtype, device):
    """Tokens of a list at a time."""
    if dtype.itemsize != 2:
        return 16
    return 64 if shared_memory(device) > BELOW_H100 else 32


def loss_sparse_target_tiles(S, H, HI, D1, dtype, device):
    """Tiles for S queries of H heads, whose first D1 columns are one product, and HI indexer heads."""
    block_s = list_queries(S, max(H, HI), dtype)
    large = dtype.itemsize == 2 and shared_memory(device) > BELOW_H100 and D1 <= 256
    block_h = max(16 // block_s, min(128 if large else 64, power_of_two(H, 1)))
    return SparseLossTiles(
        block_s=block_s, block_h=block_h, block_u=list_tokens(dtype, device),
        num_stages=2 if dtype.itemsize == 2 else 1, num_warps=4)


def loss_sparse_scores_tiles(S, H, HI, dtype, device):
    """Tiles for the same queries, all HI indexer heads in a program."""
    block_s = list_queries(S, max(H, HI), dtype)
    return SparseLossTiles(
        block_s=block_s, block_h=max(16 // block_s, power_of_two(HI, 1)), block_u=list_tokens(dtype, device),
        num_stages=3 if dtype.itemsize == 2 else 1, num_warps=4)


def loss_sparse_backward_tiles(S, HI, dtype, device):
    """More queries share a list than forward, where the heads of the attention are many."""
    block_s = list_queries(S, HI, dtype)
    return SparseLossTiles(
        block_s=block_s, block_h=max(16 // block_s, power_of_two(HI, 1)), block_u=list_tokens(dtype, device),
        num_stages=1 if HI <= 16 else 2, num_warps=4)


@operation("indexer_loss_sparse")
def indexer_loss_sparse_operation(
        q: Tensor, latents: Tensor, lse: Tensor, indices: Tensor, scale: float, q_index: Tensor,
        k_index: Tensor, w: Tensor, learns: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Arguments as kernels.indexer_loss_sparse, with unit strides, lse, indices and w contiguous
    -> kl, kl_uniform, g (B, S padded to whole blocks, K), see loss_row_kernel, empty unless learns"""
    B, S, H, D = q.shape
    T = latents.shape[1]
    K = indices.shape[2]
    HI, DI = q_index.shape[2:]
    D1, D2 = two_powers(D)
    target = loss_sparse_target_tiles(S, H, HI, D1, q.dtype, q.device)
    scores = loss_sparse_scores_tiles(S, H, HI, q.dtype, q.device)
    block_s = target.block_s
    blocks = triton.cdiv(S, block_s)
    planes = triton.cdiv(H, target.block_h)
    g = torch.empty((B, blocks * block_s, K) if learns else 0, dtype=q_index.dtype, device=q.device)
    if T == 0 or indices.numel() == 0:
        kl = torch.zeros(B, S, dtype=torch.float32, device=q.device)
        return kl, kl.clone(), g

    kl = torch.empty(B, S, dtype=torch.float32, device=q.device)
    kl_uniform = torch.empty(B, S, dtype=torch.float32, device=q.device)
    shared = union(indices, T, block_s)
    last_slot = (indices >= 0).sum(-1, dtype=torch.int32) - 1  # (B, S), as `last` of a row of K keys
    chunk = max(1, min(B * blocks, LOSS_CHUNK // (block_s * K)))  # blocks
    plane = chunk * block_s * K
    p = torch.empty(planes, chunk * block_s, K, dtype=torch.float32, device=q.device)
    score = torch.empty(chunk * block_s, K, dtype=torch.float32, device=q.device)
    for first_block in range(0, B * blocks, chunk):
        n = min(chunk, B * blocks - first_block)
        loss_sparse_target_kernel[(n, planes)](
            q_ptr=q, latents_ptr=latents, lse_ptr=lse,
            lists_ptr=shared.tokens, bits_ptr=shared.bits, length_ptr=shared.length, p_ptr=p,
            scale_log2=scale * LOG2E.value, S=S, K=K, blocks=blocks, list_width=shared.tokens.shape[-1],
            first_block=first_block, plane=plane,
            stride_qb=q.stride(0), stride_qs=q.stride(1), stride_qh=q.stride(2),
            stride_lb=latents.stride(0), stride_lt=latents.stride(1),
            H=H, D=D, D1=D1, D2=D2, BLOCK_S=block_s, BLOCK_H=target.block_h, BLOCK_U=target.block_u,
            NUM_STAGES=target.num_stages,
            num_warps=target.num_warps)
        loss_sparse_scores_kernel[(n,)](
            q_ptr=q_index, k_ptr=k_index, w_ptr=w,
            lists_ptr=shared.tokens, bits_ptr=shared.bits, length_ptr=shared.length, score_ptr=score,
            S=S, K=K, blocks=blocks, list_width=shared.tokens.shape[-1], first_block=first_block,
            stride_qb=q_index.stride(0), stride_qs=q_index.stride(1), stride_qh=q_index.stride(2),
            stride_kb=k_index.stride(0), stride_kt=k_index.stride(1),
            HI=HI, DI=DI, BLOCK_D=power_of_two(DI), BLOCK_S=block_s, BLOCK_H=scores.block_h,
            BLOCK_U=scores.block_u, NUM_STAGES=scores.num_stages,
            num_warps=scores.num_warps)
        loss_row_kernel[(n * block_s,)](
            p_ptr=p, score_ptr=score, g_ptr=g.view(-1, K)[first_block * block_s:] if learns else None,
            kl_ptr=kl, uniform_ptr=kl_uniform, first_ptr=None, last_ptr=last_slot,
            S=S, T=K, width=K, plane=plane, first_row=first_block * block_s,
            BLOCK_S=block_s, PLANES=planes, BLOCK_T=min(1024, power_of_two(K, 128)),
            num_warps=4)
    return kl, kl_uniform, g


@indexer_loss_sparse_operation.register_fake
def _(q, latents, lse, indices, scale, q_index, k_index, w, learns):
    B, S, H, _ = q.shape
    block_s = list_queries(S, max(H, q_index.shape[2]), q.dtype)
    padded = triton.cdiv(S, block_s) * block_s
    kl = q.new_empty((B, S), dtype=torch.float32)
    g = q_index.new_empty((B, padded, indices.shape[2]) if learns else 0)
    return kl, torch.empty_like(kl), g


@operation("indexer_loss_sparse_backward")
def indexer_loss_sparse_backward(
        dkl: Tensor, indices: Tensor, q_index: Tensor, k_index: Tensor, w: Tensor,
        g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """dkl (B,S), arguments and g of the operation -> dq_index, dk_index, dw of sum dkl kl"""
    B, S, HI, DI = q_index.shape
    T = k_index.shape[1]
    K = indices.shape[2]
    device = q_index.device
    dk = torch.zeros(B, T, DI, dtype=torch.float32, device=device)
    if T == 0 or indices.numel() == 0:
        return q_index.new_zeros(q_index.shape), dk.to(k_index.dtype), w.new_zeros(w.shape)

    tiles = loss_sparse_backward_tiles(S, HI, q_index.dtype, device)
    blocks = triton.cdiv(S, tiles.block_s)
    shared = union(indices, T, tiles.block_s)
    largest = dkl.abs().max().float().clamp(min=1e-30)
    dq = torch.empty(q_index.shape, dtype=q_index.dtype, device=device)
    dw = torch.empty(w.shape, dtype=w.dtype, device=device)
    loss_sparse_backward_kernel[(B * blocks,)](
        q_ptr=q_index, k_ptr=k_index, w_ptr=w,
        lists_ptr=shared.tokens, bits_ptr=shared.bits, length_ptr=shared.length,
        g_ptr=g, dkl_ptr=(dkl / largest).float().contiguous(), largest_ptr=largest,
        dq_ptr=dq, dk_ptr=dk, dw_ptr=dw,
        S=S, T=T, K=K, blocks=blocks, list_width=shared.tokens.shape[-1], g_rows=g.shape[1],
        stride_qb=q_index.stride(0), stride_qs=q_index.stride(1), stride_qh=q_index.stride(2),
        stride_kb=k_index.stride(0), stride_kt=k_index.stride(1),
        HI=HI, DI=DI, BLOCK_D=power_of_two(DI), BLOCK_S=tiles.block_s, BLOCK_H=tiles.block_h,
        BLOCK_U=tiles.block_u, NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)
    return dq, dk.to(k_index.dtype), dw


@indexer_loss_sparse_backward.register_fake
def _(dkl, indices, q_index, k_index, w, g):
    return tuple(x.new_empty(x.shape) for x in (q_index, k_index, w))


def keep_indexer_loss_sparse(ctx, inputs, output):
    """For the backward: the indexer's inputs, the selection, and g, see loss_row_kernel."""
    _, _, _, indices, _, q_index, k_index, w, _ = inputs
    ctx.set_materialize_grads(False)  # no zeros for the outputs that nobody differentiates
    ctx.save_for_backward(indices, q_index, k_index, w, output[2])


def differentiate_indexer_loss_sparse(ctx, dkl, *_):
    """Gradients of dkl (B,S) to q_index, k_index and w."""
    gradients = indexer_loss_sparse_backward(dkl, *ctx.saved_tensors)
    return None, None, None, None, None, *gradients, None


indexer_loss_sparse_operation.register_autograd(
    differentiate_indexer_loss_sparse, setup_context=keep_indexer_loss_sparse)


def indexer_loss_sparse(q, latents, lse, indices, scale, q_index, k_index, w):
    """What kernels.indexer_loss_sparse promises: shapes, dtypes and errors stand there."""
    B, S, H, D = q.shape
    T = latents.shape[1]
    HI, DI = q_index.shape[2:]
    fit(latents=(latents, (B, T, D)), lse=(lse, (B, S, H)), indices=(indices, (B, S, indices.shape[-1])),
        q_index=(q_index, (B, S, HI, DI)), k_index=(k_index, (B, T, DI)), w=(w, (B, S, HI)))
    check_indices(indices)
    learns = torch.is_grad_enabled() and any(x.requires_grad for x in (q_index, k_index, w))
    kl, kl_uniform, _ = indexer_loss_sparse_operation(
        unit_stride(q.detach()), unit_stride(latents.detach()), lse.detach().contiguous(),
        indices.contiguous(), scale, unit_stride(q_index), unit_stride(k_index), w.contiguous(), learns)
    return kl, kl_uniform.detach()
