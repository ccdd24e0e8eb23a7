"""Chapter 2: dense attention with its log-sum-exp. Causal without documents it is cuDNN's; everything else is
done by the flash kernels of this file.
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common import (
    LOG2E, LOWEST, fit, full_bounds, launch_combine, launch_delta, load_bounds, load_tile, matmul,
    multiprocessors, operation, power_of_two, queries_seeing, shared_memory, store_tile, two_powers,
    unit_stride, visible_range)

WIDE = 512  # columns of q and v together beyond which tiles are small
NARROW = 192  # columns up to which the backward holds half as much and streams twice as much
PART_KEYS = 256  # keys that a part has at least, where few rows split the keys into parts
MOST_PARTS = 128


# ---- which keys a tile of queries sees ----

@triton.jit
def whole_tiles(first, last, ok, lo, hi, BLOCK_T: tl.constexpr):
    """Cut the keys [lo, hi) for steps of BLOCK_T -> (begin, end): in the tiles of [begin, end) every row sees
    every key, so they need no mask."""
    masked = tl.maximum(tl.max(tl.where(ok, first, 0)) - lo, 0)
    begin = tl.minimum(lo + tl.cdiv(masked, BLOCK_T) * BLOCK_T, tl.maximum(lo, hi))
    full = tl.minimum(tl.min(tl.where(ok, last + 1, hi)), hi)
    return begin, begin + tl.maximum(full - begin, 0) // BLOCK_T * BLOCK_T



# ---- dense_attention ----
# contract    kernels.dense_attention
# in PyTorch  logits = einsum("bshd,bthd->bsht", q, k) * scale, masked
#             out = einsum("bsht,bthd->bshd", softmax(logits), v)
# equation    out[t] = sum_s p[t,s] v[s],  p[t,s] = exp(scale q[t].k[s] - lse[t]),  first[t] <= s <= last[t]
#             dv = p^T dout,  ds = p (dout v^T - out.dout),  dq = scale ds k,  dk = scale ds^T q
# tiling      a program keeps N rows and streams the keys that any of them sees, BLOCK_T at a time. A row is a
#             pair (query, head) of the GROUP = H / Hk heads that share a key head: one kernel for MHA
#             (GROUP = 1), MQA (GROUP = H) and decoding, where few rows split the keys into PARTS, combined
#             afterwards. The backward recomputes p from lse: one kernel keeps keys for dk and dv, another
#             keeps rows for dq; no atomics
# FLOPs       per visible pair and head 2 (D + V) forward, 2 (3 D + 2 V) backward, and 2 (D + V) for
#             computing p and dout v^T a second time
# bytes       what is kept once; what is streamed once per tile of the kept side, mostly from L2


@triton.jit
def dense_rows(row, key_head, GROUP: tl.constexpr):
    """Rows of one key head: its GROUP heads of query 0, then of query 1, ..."""
    return row // GROUP, key_head * GROUP + row % GROUP


@triton.jit
def load_and_multiply(held1, held2, ptr, offset, ok, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr):
    """Load a tile x (rows, D) as its first D1 columns and its other D2 -> x1, x2, and held x^T."""
    x1 = load_tile(ptr, offset, ok, 0, D, D1)
    x2 = x1
    product = matmul(held1, tl.trans(x1))
    if D2 > 0:
        x2 = load_tile(ptr, offset, ok, D1, D, D2)
        product = matmul(held2, tl.trans(x2), product)
    return x1, x2, product


@triton.jit
def flash_forward_kernel(
        q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, first_ptr, last_ptr,
        scale_log2, S, T,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
        V: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
        PARTS: tl.constexpr, V_IN_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    b = tl.program_id(1) // (H // GROUP)
    key_head = tl.program_id(1) % (H // GROUP)
    s, h = dense_rows(tl.program_id(0) * N + tl.arange(0, N), key_head, GROUP)
    ok = s < S
    first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
    lo, hi = visible_range(first, last, T)

    # this program's part of the keys
    part_keys = tl.cdiv(tl.cdiv(hi - lo, PARTS), BLOCK_T) * BLOCK_T
    lo += tl.program_id(2) * part_keys
    hi = tl.minimum(hi, lo + part_keys)

    # what is kept
    q_offset = s.to(tl.int64) * stride_qs + h * stride_qh + b.to(tl.int64) * stride_qb
    q1 = load_tile(q_ptr, q_offset, ok, 0, D, D1)
    q2 = q1
    if D2 > 0:
        q2 = load_tile(q_ptr, q_offset, ok, D1, D, D2)
    k_ptr += b.to(tl.int64) * stride_kb + key_head * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + key_head * stride_vh
    m = tl.full([N], LOWEST, tl.float32)
    l = tl.zeros([N], tl.float32)
    acc = tl.zeros([N, BLOCK_V], tl.float32)

    # online softmax over the keys; only the tiles before and behind [begin, end) need a mask
    begin, end = whole_tiles(first, last, ok, lo, hi, BLOCK_T)
    cuts = (lo, begin, end, hi)
    for i in tl.static_range(3):
        for t0 in tl.range(cuts[i], cuts[i + 1], BLOCK_T, num_stages=NUM_STAGES):
            t = t0 + tl.arange(0, BLOCK_T)
            k1, _, logits = load_and_multiply(q1, q2, k_ptr, t.to(tl.int64) * stride_kt, t < hi, D, D1, D2)
            logits *= scale_log2
            if i != 1:
                logits = tl.where((t >= first[:, None]) & (t <= last[:, None]), logits, float("-inf"))
            m_new = tl.maximum(m, tl.max(logits, 1))
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(logits - m_new[:, None])
            l = l * alpha + tl.sum(p, 1)
            if V_IN_K:
                v = k1
            else:
                v = load_tile(v_ptr, t.to(tl.int64) * stride_vt, t < hi, 0, V, BLOCK_V)
            acc = matmul(p.to(v.dtype), v, acc * alpha[:, None])
            m = m_new

    # out and lse of this part; a row without a visible key gives 0 and -inf, one of NaN keeps its NaN. One
    # part: by the bounds, so that a row of scores that are all -inf stays NaN as in the reference; a part
    # cannot know what the others see
    if PARTS == 1:
        empty = first > last
    else:
        empty = l == 0
    row = ((tl.program_id(2) * (tl.num_programs(1) // (H // GROUP)) + b).to(tl.int64) * S + s) * H + h
    store_tile(out_ptr, row * V, ok, 0, V, BLOCK_V, tl.where(empty[:, None], 0.0, acc / l[:, None]))
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), (m + tl.log2(l)) / LOG2E), mask=ok)


@triton.jit
def flash_dkdv_kernel(
        q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dk_ptr, dv_ptr, first_ptr, last_ptr,
        scale, S, T,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
        V: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
        NUM_STAGES: tl.constexpr):
    """dk and dv of BLOCK_T keys; all products transposed, (BLOCK_T, N). lse2, delta (B,H,S)."""
    b = tl.program_id(1) // (H // GROUP)
    key_head = tl.program_id(1) % (H // GROUP)
    t0 = tl.program_id(0) * BLOCK_T
    t = t0 + tl.arange(0, BLOCK_T)

    # what is kept
    k_offset = b.to(tl.int64) * stride_kb + key_head * stride_kh + t.to(tl.int64) * stride_kt
    k1 = load_tile(k_ptr, k_offset, t < T, 0, D, D1)
    k2 = k1
    v_offset = b.to(tl.int64) * stride_vb + key_head * stride_vh + t.to(tl.int64) * stride_vt
    v = load_tile(v_ptr, v_offset, t < T, 0, V, BLOCK_V)
    dk1 = tl.zeros([BLOCK_T, D1], tl.float32)
    dv = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    if D2 > 0:
        k2 = load_tile(k_ptr, k_offset, t < T, D1, D, D2)
        dk2 = tl.zeros([BLOCK_T, D2], tl.float32)

    # the rows that see any of these keys; from mid on they see all and need no mask
    lo, hi, mid = queries_seeing(first_ptr, last_ptr, b, t0, tl.minimum(t0 + BLOCK_T, T), 0, S, S, T)
    lo *= GROUP
    hi *= GROUP
    mid = lo + tl.cdiv(tl.maximum(mid * GROUP - lo, 0), N) * N
    starts = (lo, mid)
    stops = (tl.minimum(mid, hi), hi)
    for i in tl.static_range(2):
        for first_row in tl.range(starts[i], stops[i], N, num_stages=NUM_STAGES):
            row = first_row + tl.arange(0, N)
            ok = row < hi
            s, h = dense_rows(row, key_head, GROUP)
            q_offset = b.to(tl.int64) * stride_qb + s.to(tl.int64) * stride_qs + h * stride_qh
            statistic = (b * H + h) * S + s
            q1, q2, logits = load_and_multiply(k1, k2, q_ptr, q_offset, ok, D, D1, D2)
            lse2 = tl.load(lse2_ptr + statistic, mask=ok, other=float("inf"))
            p = tl.exp2(logits * (scale * LOG2E) - lse2[None, :])
            if i == 0:
                first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
                p = tl.where((t[:, None] >= first) & (t[:, None] <= last), p, 0.0)
            dout = load_tile(dout_ptr, ((b.to(tl.int64) * S + s) * H + h) * V, ok, 0, V, BLOCK_V)
            dv = matmul(p.to(dout.dtype), dout, dv)
            dp = matmul(v, tl.trans(dout))
            delta = tl.load(delta_ptr + statistic, mask=ok, other=0.0)
            ds = (p * (dp - delta[None, :])).to(q1.dtype)
            dk1 = matmul(ds, q1, dk1)
            if D2 > 0:
                dk2 = matmul(ds, q2, dk2)

    key = (b.to(tl.int64) * T + t) * (H // GROUP) + key_head
    store_tile(dv_ptr, key * V, t < T, 0, V, BLOCK_V, dv)
    store_tile(dk_ptr, key * D, t < T, 0, D, D1, dk1 * scale)
    if D2 > 0:
        store_tile(dk_ptr, key * D, t < T, D1, D, D2, dk2 * scale)


@triton.jit
def flash_dq_kernel(
        q_ptr, k_ptr, v_ptr, dout_ptr, lse2_ptr, delta_ptr, dq_ptr, first_ptr, last_ptr,
        scale, S, T,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh, stride_vb, stride_vt, stride_vh,
        H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr,
        V: tl.constexpr, BLOCK_V: tl.constexpr, N: tl.constexpr, BLOCK_T: tl.constexpr,
        NUM_STAGES: tl.constexpr):
    """dq of N rows. lse2, delta (B,H,S)."""
    b = tl.program_id(1) // (H // GROUP)
    key_head = tl.program_id(1) % (H // GROUP)
    s, h = dense_rows(tl.program_id(0) * N + tl.arange(0, N), key_head, GROUP)
    ok = s < S
    first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
    lo, hi = visible_range(first, last, T)

    # what is kept
    row = (b.to(tl.int64) * S + s) * H + h
    q_offset = b.to(tl.int64) * stride_qb + s.to(tl.int64) * stride_qs + h * stride_qh
    q1 = load_tile(q_ptr, q_offset, ok, 0, D, D1)
    q2 = q1
    dout = load_tile(dout_ptr, row * V, ok, 0, V, BLOCK_V)
    lse2 = tl.load(lse2_ptr + (b * H + h) * S + s, mask=ok, other=0.0)
    delta = tl.load(delta_ptr + (b * H + h) * S + s, mask=ok, other=0.0)
    dq1 = tl.zeros([N, D1], tl.float32)
    if D2 > 0:
        q2 = load_tile(q_ptr, q_offset, ok, D1, D, D2)
        dq2 = tl.zeros([N, D2], tl.float32)
    k_ptr += b.to(tl.int64) * stride_kb + key_head * stride_kh
    v_ptr += b.to(tl.int64) * stride_vb + key_head * stride_vh

    # only the tiles before and behind [begin, end) need a mask
    begin, end = whole_tiles(first, last, ok, lo, hi, BLOCK_T)
    cuts = (lo, begin, end, hi)
    for i in tl.static_range(3):
        for t0 in tl.range(cuts[i], cuts[i + 1], BLOCK_T, num_stages=NUM_STAGES):
            t = t0 + tl.arange(0, BLOCK_T)
            k1, k2, logits = load_and_multiply(q1, q2, k_ptr, t.to(tl.int64) * stride_kt, t < hi, D, D1, D2)
            p = tl.exp2(logits * (scale * LOG2E) - lse2[:, None])
            if i != 1:
                p = tl.where((t >= first[:, None]) & (t <= last[:, None]), p, 0.0)
            v = load_tile(v_ptr, t.to(tl.int64) * stride_vt, t < hi, 0, V, BLOCK_V)
            ds = (p * (matmul(dout, tl.trans(v)) - delta[:, None])).to(k1.dtype)
            dq1 = matmul(ds, k1, dq1)
            if D2 > 0:
                dq2 = matmul(ds, k2, dq2)

    store_tile(dq_ptr, row * D, ok, 0, D, D1, dq1 * scale)
    if D2 > 0:
        store_tile(dq_ptr, row * D, ok, D1, D, D2, dq2 * scale)


class DenseTiles(NamedTuple):
    """Of flash_forward_kernel, flash_dkdv_kernel or flash_dq_kernel."""
    block_kept: int  # of the side that a program keeps: rows, in the dkdv kernel keys
    block_streamed: int  # of a step along the other side
    num_stages: int
    num_warps: int


def dense_tiles(width, backward, dtype, device):
    """Tiles for q, k, v of `width` padded columns in all; smaller where shared memory is short."""
    if dtype == torch.float32:  # larger ones of many columns keep ptxas busy for minutes, and spill
        if width > WIDE:
            tiles = DenseTiles(block_kept=16, block_streamed=16, num_stages=1, num_warps=8)
        else:
            tiles = DenseTiles(block_kept=32, block_streamed=32, num_stages=1, num_warps=4)
    elif width > WIDE:
        if backward:
            tiles = DenseTiles(block_kept=32, block_streamed=32, num_stages=1, num_warps=8)
        else:
            tiles = DenseTiles(block_kept=64, block_streamed=32, num_stages=2, num_warps=8)
    elif not backward:
        tiles = DenseTiles(block_kept=128, block_streamed=64, num_stages=3, num_warps=8)
    elif width <= NARROW:
        tiles = DenseTiles(block_kept=64, block_streamed=128, num_stages=2, num_warps=4)
    else:
        tiles = DenseTiles(block_kept=128, block_streamed=64, num_stages=2, num_warps=8)

    kept, streamed, num_stages, num_warps = tiles
    while streamed > 16 and 2 * (kept + num_stages * streamed) * width > shared_memory(device):
        kept = max(16, kept // 2)
        if num_stages == 1:
            streamed //= 2
        num_stages = max(1, num_stages - 1)
    return DenseTiles(block_kept=kept, block_streamed=streamed, num_stages=num_stages, num_warps=num_warps)


@operation("flash_attention")
def flash_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, first: Tensor | None,
                    last: Tensor | None) -> tuple[Tensor, Tensor]:
    """Arguments as kernels.dense_attention, with unit strides, first and last (B,S) contiguous int32 -> out,
    lse"""
    B, S, H, D = q.shape
    T, Hk, V = v.shape[1:]
    group = H // Hk
    D1, D2 = two_powers(D)
    out = torch.empty(B, S, H, V, dtype=v.dtype, device=q.device)
    lse = torch.empty(B, S, H, dtype=torch.float32, device=q.device)
    if lse.numel() == 0:
        return out, lse

    # few rows: the keys are split into parts, so that two programs per multiprocessor have something to do
    tiles = dense_tiles(D1 + D2 + power_of_two(V), False, q.dtype, q.device)
    N = min(tiles.block_kept, power_of_two(S * group))
    blocks = triton.cdiv(S * group, N)
    parts = max(1, min(2 * multiprocessors(q.device) // (blocks * B * Hk), T // PART_KEYS, MOST_PARTS))
    part = out
    part_lse = lse
    if parts > 1:
        part = torch.empty(parts, B, S, H, V, dtype=torch.float32, device=q.device)
        part_lse = torch.empty(parts, B, S, H, dtype=torch.float32, device=q.device)

    flash_forward_kernel[(blocks, B * Hk, parts)](
        q_ptr=q, k_ptr=k, v_ptr=v, out_ptr=part, lse_ptr=part_lse, first_ptr=first, last_ptr=last,
        scale_log2=scale * LOG2E.value, S=S, T=T,
        stride_qb=q.stride(0), stride_qs=q.stride(1), stride_qh=q.stride(2),
        stride_kb=k.stride(0), stride_kt=k.stride(1), stride_kh=k.stride(2),
        stride_vb=v.stride(0), stride_vt=v.stride(1), stride_vh=v.stride(2),
        H=H, GROUP=group, D=D, D1=D1, D2=D2, V=V, BLOCK_V=power_of_two(V), N=N, BLOCK_T=tiles.block_streamed,
        PARTS=parts, V_IN_K=v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and V == D1,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)
    if parts > 1:
        launch_combine(part, part_lse, out, lse)
    return out, lse


@flash_attention.register_fake
def _(q, k, v, scale, first, last):
    shape = (*q.shape[:3], v.shape[3])
    return q.new_empty(shape, dtype=v.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


@operation("flash_attention_backward")
def flash_attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                             scale: float, first: Tensor | None,
                             last: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """dout (B,S,H,V), arguments and results of flash_attention -> dq, dk, dv in the dtypes of q, k, v"""
    B, S, H, D = q.shape
    T, Hk, V = v.shape[1:]
    group = H // Hk
    D1, D2 = two_powers(D)
    tiles = dense_tiles(D1 + D2 + power_of_two(V), True, q.dtype, q.device)
    dout = dout.contiguous()
    delta, lse2 = launch_delta(out, dout, lse, heads_first=True)  # (B, H, S)
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dk = torch.empty(k.shape, dtype=k.dtype, device=q.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=q.device)
    pointers = dict(
        q_ptr=q, k_ptr=k, v_ptr=v, dout_ptr=dout, lse2_ptr=lse2, delta_ptr=delta,
        first_ptr=first, last_ptr=last)
    sizes = dict(scale=scale, S=S, T=T)
    strides = dict(
        stride_qb=q.stride(0), stride_qs=q.stride(1), stride_qh=q.stride(2),
        stride_kb=k.stride(0), stride_kt=k.stride(1), stride_kh=k.stride(2),
        stride_vb=v.stride(0), stride_vt=v.stride(1), stride_vh=v.stride(2))
    constants = dict(
        H=H, GROUP=group, D=D, D1=D1, D2=D2, V=V, BLOCK_V=power_of_two(V), NUM_STAGES=tiles.num_stages)
    flash_dkdv_kernel[(triton.cdiv(T, tiles.block_kept), B * Hk)](
        **pointers, dk_ptr=dk, dv_ptr=dv,
        **sizes,
        **strides,
        **constants, N=tiles.block_streamed, BLOCK_T=tiles.block_kept,
        num_warps=tiles.num_warps)
    flash_dq_kernel[(triton.cdiv(S * group, tiles.block_kept), B * Hk)](
        **pointers, dq_ptr=dq,
        **sizes,
        **strides,
        **constants, N=tiles.block_kept, BLOCK_T=tiles.block_streamed,
        num_warps=tiles.num_warps)
    return dq, dk, dv


@flash_attention_backward.register_fake
def _(dout, q, k, v, out, lse, scale, first, last):
    return tuple(x.new_empty(x.shape) for x in (q, k, v))


def keep_flash_attention(ctx, inputs, output):
    """For the backward: what the forward read and gave, and its scale."""
    q, k, v, ctx.scale, first, last = inputs
    out, lse = output
    ctx.save_for_backward(q, k, v, out, lse, first, last)


def differentiate_flash_attention(ctx, dout, dlse):
    """Gradients of dout (B,S,H,V) to q, k, v; lse has none."""
    q, k, v, out, lse, first, last = ctx.saved_tensors
    dq, dk, dv = flash_attention_backward(dout, q, k, v, out, lse, ctx.scale, first, last)
    return dq, dk, dv, None, None, None


flash_attention.register_autograd(differentiate_flash_attention, setup_context=keep_flash_attention)


def cudnn_takes(q, v):
    """Does cuDNN's attention know these heads? A key head per query head, 16-bit heads of up to 128
    dimensions or, from Hopper on, of 192 with values of 128."""
    H, D = q.shape[2:]
    Hk, V = v.shape[2:]
    if Hk != H or not q.is_cuda or not torch.version.cuda:
        return False
    if q.dtype not in (torch.bfloat16, torch.float16):
        return False
    if D % 8 or V % 8:
        return False
    if max(D, V) <= 128:
        return True
    return (D, V) == (192, 128) and torch.cuda.get_device_properties(q.device).major >= 9


def cudnn_attention(q, k, v, scale, causal=True):
    """Attention by cuDNN, which takes and gives (B,H,S,D): causal with S = T, or to all keys -> out
    (B,S,H,V), lse (B,S,H)"""
    B, S, H, _ = q.shape
    results = torch.ops.aten._scaled_dot_product_cudnn_attention(
        q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, causal, False, scale=scale)
    out, lse = results[:2]
    return out.transpose(1, 2), lse.view(B, H, S).transpose(1, 2)


def check_heads(q, k, v):
    """ValueError: key heads that do not divide the query heads, too many of them, shapes that do not fit."""
    B, _, H, D = q.shape
    T, Hk, V = v.shape[1:]
    if Hk == 0 or H % Hk:
        raise ValueError(f"{H} query heads over {Hk} key heads: the key heads must divide the query heads")
    if B * Hk >= 2**16:
        raise ValueError(f"{B} sequences x {Hk} key heads: a launch takes less than 65536; split the batch")
    fit(k=(k, (B, T, Hk, D)), v=(v, (B, T, Hk, V)))


def dense_attention(q, k, v, scale, first=None, last=None):
    """What kernels.dense_attention promises: shapes, dtypes and errors stand there."""
    B, S = q.shape[:2]
    check_heads(q, k, v)
    causal = first is None and last is None and S == v.shape[1] and S >= 2
    if causal and cudnn_takes(q, v):
        out, lse = cudnn_attention(q, k, v, scale)
    else:
        out, lse = flash_attention(
            unit_stride(q), unit_stride(k), unit_stride(v), scale,
            full_bounds(first, B, S), full_bounds(last, B, S))
    return out, lse.detach()


# ---- split_attention: two chunks of a sequence, whose other chunks are other ranks' ----
# contract    kernels.split_attention
# equation    as dense_attention, over two sets of keys: lse = log(exp lse1 + exp lse2),
#             out = exp(lse1 - lse) out1 + exp(lse2 - lse) out2
#             backward: p[t,s] = exp(scale q[t].k[s] - lse[t]) and out.dout are those of the whole row, so
#             each piece gets the merged out and lse, and its dq, dk, dv are summands of the whole
# tiling      of each chunk two pieces that cuDNN knows: its own keys, causal, and all earlier ones, unmasked


def cudnn_backward(dout, q, k, v, out, lse, scale: float, causal: bool):
    """dout, out (B,S,H,V), lse (B,S,H) of the whole row; the rest as `cudnn_attention` -> dq, dk, dv. PyTorch
    caches cuDNN's graph by the layout of q, k, v alone: dout, out and lse must always come in the same
    one."""
    stats = lse.transpose(1, 2).contiguous()[..., None]  # (B, H, S, 1)
    none = torch.zeros((), dtype=torch.int64, device=q.device)  # seed and offset of a dropout of 0
    dq, dk, dv = torch.ops.aten._scaled_dot_product_cudnn_attention_backward(
        dout.contiguous().transpose(1, 2), q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
        out.contiguous().transpose(1, 2), stats, none, none, None, None, None, q.shape[1], k.shape[1], 0.0,
        causal, scale=scale)
    return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)


def pieces(S, early, late):
    """Of two chunks of S / 2 queries -> [(rows, keys, causal)], slices: what each call computes."""
    half = S // 2
    calls = []
    for number, start in enumerate((early, late)):
        rows = slice(number * half, (number + 1) * half)
        calls.append((rows, slice(start, start + half), True))
        if start:
            calls.append((rows, slice(0, start), False))
    return calls


@operation("split_attention")
def split_attention_pieces(q: Tensor, k: Tensor, v: Tensor, scale: float, early: int,
                           late: int) -> tuple[Tensor, Tensor]:
    """Arguments as kernels.split_attention, heads as `cudnn_takes` -> out, lse"""
    B, S, H, _ = q.shape
    out = torch.zeros(B, S, H, v.shape[3], dtype=torch.float32, device=q.device)
    lse = torch.full((B, S, H), float("-inf"), dtype=torch.float32, device=q.device)
    for rows, keys, causal in pieces(S, early, late):
        part, part_lse = cudnn_attention(q[:, rows], k[:, keys], v[:, keys], scale, causal)
        merged = torch.logaddexp(lse[:, rows], part_lse)  # (B, S / 2, H)
        out[:, rows] *= torch.exp(lse[:, rows] - merged)[..., None]
        out[:, rows] += torch.exp(part_lse - merged)[..., None] * part
        lse[:, rows] = merged
    return out.to(v.dtype), lse


@split_attention_pieces.register_fake
def _(q, k, v, scale, early, late):
    shape = (*q.shape[:3], v.shape[3])
    return q.new_empty(shape, dtype=v.dtype), q.new_empty(q.shape[:3], dtype=torch.float32)


@operation("split_attention_backward")
def split_attention_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                             scale: float, early: int, late: int) -> tuple[Tensor, Tensor, Tensor]:
    """dout (B,S,H,V), arguments and results of split_attention -> dq, dk, dv in the dtypes of q, k, v; added
    up in float32"""
    dq, dk, dv = (torch.zeros(x.shape, dtype=torch.float32, device=x.device) for x in (q, k, v))
    for rows, keys, causal in pieces(q.shape[1], early, late):
        parts = cudnn_backward(
            dout[:, rows], q[:, rows], k[:, keys], v[:, keys], out[:, rows], lse[:, rows], scale, causal)
        dq[:, rows] += parts[0]
        dk[:, keys] += parts[1]
        dv[:, keys] += parts[2]
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


@split_attention_backward.register_fake
def _(dout, q, k, v, out, lse, scale, early, late):
    return tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))


def keep_split(ctx, inputs, output):
    """For the backward: what the forward read and gave, its scale, and where the chunks begin."""
    q, k, v, ctx.scale, ctx.early, ctx.late = inputs
    ctx.save_for_backward(q, k, v, *output)


def differentiate_split(ctx, dout, dlse):
    """Gradients of dout (B,S,H,V) to q, k, v; lse has none."""
    grads = split_attention_backward(dout, *ctx.saved_tensors, ctx.scale, ctx.early, ctx.late)
    return *grads, None, None, None


split_attention_pieces.register_autograd(differentiate_split, setup_context=keep_split)


def split_attention(q, k, v, scale, early, late):
    """What kernels.split_attention promises: shapes, dtypes and errors stand there."""
    B, S = q.shape[:2]
    check_heads(q, k, v)
    half = S // 2
    if S % 2 or not 0 <= early <= late or late + half > k.shape[1]:
        raise ValueError(f"{S} queries from the positions {early} and {late} on, over {k.shape[1]} keys: two "
                         "chunks of equal length that lie within the keys")
    if cudnn_takes(q, v) and half >= 2:
        out, lse = split_attention_pieces(q, k, v, scale, early, late)
    else:
        chunk = torch.arange(half, dtype=torch.int32, device=q.device)  # (S / 2,)
        last = torch.cat((early + chunk, late + chunk))  # (S,)
        out, lse = flash_attention(
            unit_stride(q), unit_stride(k), unit_stride(v), scale, None, full_bounds(last, B, S))
    return out, lse.detach()
