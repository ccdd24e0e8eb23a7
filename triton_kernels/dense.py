"""Chapter 2: dense attention."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from triton_kernels.common import fit, limits, LOG2E

# ===========================================================================================================================================
# 2  Dense attention with its log-sum-exp, and the losses that train the indexer. They never differentiate the attention: the gradient with
#    respect to a score is softmax(I) - p, so one sweep yields loss and gradients, for a bounded chunk of rows at a time and never S x T.
# ===========================================================================================================================================

def _bounds(first, last, B, S, T, device):
    """first, last as contiguous (B,S) int32, within 0..T-1 where they are given; None -> causal with the queries at the end."""
    first = torch.zeros(B, S, dtype=torch.int32, device=device) if first is None else first.int().clamp(min=0).expand(B, S).contiguous()
    last = torch.arange(T - S, T, dtype=torch.int32, device=device).expand(B, S) if last is None else last.int().clamp(max=T - 1).expand(B, S)
    return first, last.contiguous()


def _unit(*tensors):
    """Tensors whose last dimension has stride 1 and whose heads, if they have some, are near enough for 32 bits; others are copied."""
    return [x if x.stride(-1) == 1 and (x.dim() < 4 or x.shape[2] * x.stride(2) < 2**31) else x.contiguous() for x in tensors]


def hopper_kernels(x):
    """kernels_hopper where x lies on a Hopper GPU, else None."""
    if not x.is_cuda or torch.cuda.get_device_capability(x.device)[0] != 9:
        return None
    from triton_kernels import hopper
    return hopper


def _split(D):
    """A head size as powers of two, so that 192 = 128 + 64 or 576 = 512 + 64 is not padded to 256 or 1024 -> (largest, rest or 0)."""
    large = max(16, 1 << (D.bit_length() - 1))
    return (large, max(16, triton.next_power_of_2(D - large))) if D > large else (large, 0)


@triton.jit
def matmul(a, b, acc=None):
    """a @ b + acc in float32, float32 operands not rounded to tf32"""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def load_tile(P, row, ok, start, D: tl.constexpr, BD: tl.constexpr):
    """P[row, start : start + BD], zero where the row is not ok or the column is not below D -> (rows, BD)"""
    d = start + tl.arange(0, BD)
    return tl.load(P + row[:, None] + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)


@triton.jit
def load_bounds(FIRST, LAST, b, i, S, T):
    """-> first, last of the queries i, and the range [lo, hi) of keys that any of them sees (empty: lo >= hi)"""
    ok = i < S
    first = tl.maximum(tl.load(FIRST + b * S + i, mask=ok, other=0), 0)
    last = tl.minimum(tl.load(LAST + b * S + i, mask=ok, other=-1), T - 1)
    return first, last, tl.min(tl.where(first <= last, first, T)), tl.max(tl.where(first <= last, last + 1, 0))


@triton.jit
def full_tiles(first, last, ok, lo, hi, BN: tl.constexpr):
    """Cut [lo, hi) for steps of BN -> (lo, mid, end): in the tiles of [mid, end) every row sees every key, so they need no mask"""
    mid = tl.minimum(lo + tl.cdiv(tl.maximum(tl.max(tl.where(ok, first, 0)) - lo, 0), BN) * BN, tl.maximum(lo, hi))
    full = tl.minimum(tl.min(tl.where(ok, last + 1, hi)), hi)
    return mid, mid + tl.maximum(full - mid, 0) // BN * BN


@triton.jit
def rows_seeing(FIRST, LAST, b, n0, n1, r0, r1, S, BLOCK: tl.constexpr):
    """-> the smallest range [lo, hi) of queries within [r0, r1) that holds every query seeing any of the keys [n0, n1), and mid: from there on all see all"""
    lo = r1
    hi = r0
    mid = r0
    for r in range(r0, r1, BLOCK):
        i = r + tl.arange(0, BLOCK)
        first = tl.load(FIRST + b * S + i, mask=i < r1, other=0)
        last = tl.load(LAST + b * S + i, mask=i < r1, other=-1)
        sees = (first <= last) & (first < n1) & (last >= n0)
        lo = tl.minimum(lo, tl.min(tl.where(sees, i, r1)))
        block_hi = tl.max(tl.where(sees, i + 1, r0))
        if block_hi > r0:  # queries that see nothing do not count behind the last that sees, but between others
            mid = tl.where((hi > r0) & (hi < r), r, mid)
            hi = block_hi
            all_of_them = sees & (first <= n0) & (last >= n1 - 1)
            mid = tl.maximum(mid, tl.max(tl.where(all_of_them | (i >= block_hi), r0, i + 1)))
    return lo, hi, mid


# dense_attention: out[t] = sum_s softmax_s(scale q_t.k_s) v_s over first_t <= s <= last_t.
# Causal without documents is cuDNN's. The rest: a program keeps BM rows and streams BN keys, from the first that a row sees to the last. Rows are
# (query, head) pairs of the G = H / Hk heads that share a key head: one kernel for MHA (G = 1), MQA (G = H), and decoding, where few rows
# are split SPLITS ways over the keys and combined. Backward recomputes p from lse: keys kept for dk and dv, rows kept for dq; no atomics.
# 2 (d + dv) operations per pair and head forward, 2 (3 d + 2 dv) backward plus 2 (d + dv) for the second recomputation.


@triton.jit
def flash_forward_kernel(Q, K, V, OUT, LSE, FIRST, LAST, sqb, sqs, sqh, skb, skt, skh, svb, svt, svh, scale_log2, S, T, H: tl.constexpr,
                         G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
                         BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, V_IN_K: tl.constexpr, STAGES: tl.constexpr):
    b = tl.program_id(1) // (H // G)
    hk = tl.program_id(1) % (H // G)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    i = r // G
    h = hk * G + r % G
    first, last, lo, hi = load_bounds(FIRST, LAST, b, i, S, T)
    share = tl.cdiv(tl.cdiv(hi - lo, SPLITS), BN) * BN
    lo += tl.program_id(2) * share
    hi = tl.minimum(hi, lo + share)
    row = i.to(tl.int64) * sqs + h * sqh + b.to(tl.int64) * sqb
    q1 = load_tile(Q, row, i < S, 0, D, D1)
    if D2 > 0:
        q2 = load_tile(Q, row, i < S, D1, D, D2)
    K += b.to(tl.int64) * skb + hk * skh
    V += b.to(tl.int64) * svb + hk * svh
    m = tl.full([BM], -1e30, tl.float32)
    l = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BV], tl.float32)
    mid, end = full_tiles(first, last, i < S, lo, hi, BN)
    for part in tl.static_range(3):
        for j in tl.range(lo if part == 0 else mid if part == 1 else end, mid if part == 0 else end if part == 1 else hi, BN, num_stages=STAGES):
            n = j + tl.arange(0, BN)
            key = n.to(tl.int64) * skt
            k1 = load_tile(K, key, n < hi, 0, D, D1)
            s = matmul(q1, tl.trans(k1))
            if D2 > 0:
                s = matmul(q2, tl.trans(load_tile(K, key, n < hi, D1, D, D2)), s)
            s *= scale_log2
            if part != 1:
                s = tl.where((n >= first[:, None]) & (n <= last[:, None]), s, float("-inf"))
            m_new = tl.maximum(m, tl.max(s, 1))
            alpha = tl.exp2(m - m_new)
            p = tl.exp2(s - m_new[:, None])
            l = l * alpha + tl.sum(p, 1)
            v = k1 if V_IN_K else load_tile(V, n.to(tl.int64) * svt, n < hi, 0, DV, BV)
            acc = matmul(p.to(v.dtype), v, acc * alpha[:, None])
            m = m_new
    o = ((tl.program_id(2) * (tl.num_programs(1) // (H // G)) + b).to(tl.int64) * S + i) * H + h
    d = tl.arange(0, BV)
    acc = tl.where(l[:, None] > 0, acc / l[:, None], 0.0)
    tl.store(OUT + o[:, None] * DV + d[None, :], acc.to(OUT.dtype.element_ty), mask=(i < S)[:, None] & (d < DV)[None, :])
    tl.store(LSE + o, tl.where(l > 0, (m + tl.log2(l)) / LOG2E, float("-inf")), mask=i < S)


@triton.jit
def flash_combine_kernel(PART, PART_LSE, OUT, LSE, rows, DV: tl.constexpr, BV: tl.constexpr, SPLITS: tl.constexpr, BS: tl.constexpr):
    """out = sum_i exp(lse_i - lse) out_i over the SPLITS parts of one row"""
    r = tl.program_id(0).to(tl.int64)
    i, d = tl.arange(0, BS).to(tl.int64), tl.arange(0, BV)
    lse = tl.load(PART_LSE + i * rows + r, mask=i < SPLITS, other=float("-inf"))
    top = tl.maximum(tl.max(lse), -1e30)
    share = tl.exp(lse - top)
    total = tl.sum(share)
    x = tl.load(PART + (i[:, None] * rows + r) * DV + d[None, :], mask=(i < SPLITS)[:, None] & (d < DV)[None, :], other=0.0)
    out = tl.where(total > 0, tl.sum(x * share[:, None], 0) / total, 0.0)
    tl.store(OUT + r * DV + d, out.to(OUT.dtype.element_ty), mask=d < DV)
    tl.store(LSE + r, tl.where(total > 0, top + tl.log(total), float("-inf")))


@triton.jit
def flash_delta_kernel(OUT, DOUT, LSE, DELTA, LSE2, rows, S, H: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr, BR: tl.constexpr):
    """delta = out . dout per (query, head), what softmax's backward subtracts; delta and the base-2 lse in (B,H,S), as the backward reads them"""
    r = tl.program_id(0) * BR + tl.arange(0, BR)
    o = r.to(tl.int64) * DV
    delta = tl.sum(load_tile(OUT, o, r < rows, 0, DV, BV).to(tl.float32) * load_tile(DOUT, o, r < rows, 0, DV, BV).to(tl.float32), 1)
    t = (r // H // S * H + r % H) * S + r // H % S
    tl.store(DELTA + t, delta, mask=r < rows)
    tl.store(LSE2 + t, tl.load(LSE + r, mask=r < rows, other=0.0) * LOG2E, mask=r < rows)


@triton.jit
def flash_dkdv_kernel(Q, K, V, DOUT, LSE2, DELTA, DK, DV_, FIRST, LAST, sqb, sqs, sqh, skb, skt, skh, svb, svt, svh, scale, S, T, H: tl.constexpr,
                      G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
                      BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    b = tl.program_id(1) // (H // G)
    hk = tl.program_id(1) % (H // G)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    key = b.to(tl.int64) * skb + hk * skh + n.to(tl.int64) * skt
    k1 = load_tile(K, key, n < T, 0, D, D1)
    v = load_tile(V, b.to(tl.int64) * svb + hk * svh + n.to(tl.int64) * svt, n < T, 0, DV, BV)
    dk1 = tl.zeros([BN, D1], tl.float32)
    dv = tl.zeros([BN, BV], tl.float32)
    if D2 > 0:
        k2 = load_tile(K, key, n < T, D1, D, D2)
        dk2 = tl.zeros([BN, D2], tl.float32)
    lo, hi, mid = rows_seeing(FIRST, LAST, b, n0, tl.minimum(n0 + BN, T), 0, S, S, 1024)
    lo, hi = lo * G, hi * G
    mid = lo + tl.cdiv(tl.maximum(mid * G - lo, 0), BM) * BM
    for part in tl.static_range(2):
        for j in tl.range(lo if part == 0 else mid, tl.minimum(mid, hi) if part == 0 else hi, BM, num_stages=STAGES):
            r = j + tl.arange(0, BM)
            i = r // G
            h = hk * G + r % G
            ok = r < hi
            o = (b.to(tl.int64) * S + i) * H + h
            t = (b * H + h) * S + i
            row = b.to(tl.int64) * sqb + i.to(tl.int64) * sqs + h * sqh
            q1 = load_tile(Q, row, ok, 0, D, D1)
            s = matmul(k1, tl.trans(q1))
            if D2 > 0:
                q2 = load_tile(Q, row, ok, D1, D, D2)
                s = matmul(k2, tl.trans(q2), s)
            p = tl.exp2(s * (scale * LOG2E) - tl.load(LSE2 + t, mask=ok, other=float("inf"))[None, :])
            if part == 0:
                first = tl.load(FIRST + b * S + i, mask=ok, other=0)
                last = tl.load(LAST + b * S + i, mask=ok, other=-1)
                p = tl.where((n[:, None] >= first) & (n[:, None] <= last), p, 0.0)
            dout = load_tile(DOUT, o * DV, ok, 0, DV, BV)
            dv = matmul(p.to(dout.dtype), dout, dv)
            ds = (p * (matmul(v, tl.trans(dout)) - tl.load(DELTA + t, mask=ok, other=0.0)[None, :])).to(q1.dtype)
            dk1 = matmul(ds, q1, dk1)
            if D2 > 0:
                dk2 = matmul(ds, q2, dk2)
    o = (b.to(tl.int64) * T + n) * (H // G) + hk
    d = tl.arange(0, BV)
    tl.store(DV_ + o[:, None] * DV + d[None, :], dv.to(DV_.dtype.element_ty), mask=(n < T)[:, None] & (d < DV)[None, :])
    d = tl.arange(0, D1)
    tl.store(DK + o[:, None] * D + d[None, :], (dk1 * scale).to(DK.dtype.element_ty), mask=(n < T)[:, None] & (d < D)[None, :])
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        tl.store(DK + o[:, None] * D + d[None, :], (dk2 * scale).to(DK.dtype.element_ty), mask=(n < T)[:, None] & (d < D)[None, :])


@triton.jit
def flash_dq_kernel(Q, K, V, DOUT, LSE2, DELTA, DQ, FIRST, LAST, sqb, sqs, sqh, skb, skt, skh, svb, svt, svh, scale, S, T, H: tl.constexpr,
                    G: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, DV: tl.constexpr, BV: tl.constexpr,
                    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    b = tl.program_id(1) // (H // G)
    hk = tl.program_id(1) % (H // G)
    r = tl.program_id(0) * BM + tl.arange(0, BM)
    i = r // G
    h = hk * G + r % G
    ok = i < S
    first, last, lo, hi = load_bounds(FIRST, LAST, b, i, S, T)
    o = (b.to(tl.int64) * S + i) * H + h
    row = b.to(tl.int64) * sqb + i.to(tl.int64) * sqs + h * sqh
    q1 = load_tile(Q, row, ok, 0, D, D1)
    dout = load_tile(DOUT, o * DV, ok, 0, DV, BV)
    lse = tl.load(LSE2 + (b * H + h) * S + i, mask=ok, other=0.0)
    delta = tl.load(DELTA + (b * H + h) * S + i, mask=ok, other=0.0)
    dq1 = tl.zeros([BM, D1], tl.float32)
    if D2 > 0:
        q2 = load_tile(Q, row, ok, D1, D, D2)
        dq2 = tl.zeros([BM, D2], tl.float32)
    K += b.to(tl.int64) * skb + hk * skh
    V += b.to(tl.int64) * svb + hk * svh
    mid, end = full_tiles(first, last, ok, lo, hi, BN)
    for part in tl.static_range(3):
        for j in tl.range(lo if part == 0 else mid if part == 1 else end, mid if part == 0 else end if part == 1 else hi, BN, num_stages=STAGES):
            n = j + tl.arange(0, BN)
            key = n.to(tl.int64) * skt
            k1 = load_tile(K, key, n < hi, 0, D, D1)
            s = matmul(q1, tl.trans(k1))
            if D2 > 0:
                k2 = load_tile(K, key, n < hi, D1, D, D2)
                s = matmul(q2, tl.trans(k2), s)
            p = tl.exp2(s * (scale * LOG2E) - lse[:, None])
            if part != 1:
                p = tl.where((n >= first[:, None]) & (n <= last[:, None]), p, 0.0)
            v = load_tile(V, n.to(tl.int64) * svt, n < hi, 0, DV, BV)
            ds = (p * (matmul(dout, tl.trans(v)) - delta[:, None])).to(k1.dtype)
            dq1 = matmul(ds, k1, dq1)
            if D2 > 0:
                dq2 = matmul(ds, k2, dq2)
    d = tl.arange(0, D1)
    tl.store(DQ + o[:, None] * D + d[None, :], (dq1 * scale).to(DQ.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])
    if D2 > 0:
        d = D1 + tl.arange(0, D2)
        tl.store(DQ + o[:, None] * D + d[None, :], (dq2 * scale).to(DQ.dtype.element_ty), mask=ok[:, None] & (d < D)[None, :])


class FlashAttention(torch.autograd.Function):
    """dense_attention with its backward: products recomputed tile by tile, no atomics."""

    @staticmethod
    def tiles(x, width, backward):
        """-> rows held, keys streamed (backward: the held and the streamed side of either kernel), stages, warps; less where shared memory is short"""
        if x.dtype == torch.float32:
            held, streamed, stages, warps = (16, 16, 1, 8) if width > 512 else (32, 32, 1, 4)  # wider, ptxas works for minutes and spills
        elif width > 512:
            held, streamed, stages, warps = (32, 32, 1, 8) if backward else (64, 32, 2, 8)
        elif backward:
            held, streamed, stages, warps = (64, 128, 2, 4) if width <= 192 else (128, 64, 2, 8)
        else:
            held, streamed, stages, warps = 128, 64, 3, 8
        while streamed > 16 and 2 * (held + stages * streamed) * width > limits(x.device)[0]:
            held, stages, streamed = max(16, held // 2), max(1, stages - 1), streamed // 2 if stages == 1 else streamed
        return held, streamed, stages, warps

    @staticmethod
    def forward(ctx, q, k, v, scale, first, last):
        (B, S, H, D), (T, Hk, DV) = q.shape, v.shape[1:]
        G, (D1, D2), BV = H // Hk, _split(D), max(16, triton.next_power_of_2(DV))
        BM, BN, stages, warps = FlashAttention.tiles(q, D1 + D2 + BV, False)
        BM = min(BM, max(16, triton.next_power_of_2(S * G)))
        blocks = triton.cdiv(S * G, BM) * B * Hk
        splits = max(1, min(2 * limits(q.device)[1] // blocks, T // 256, 128))
        out = torch.empty(B, S, H, DV, dtype=v.dtype, device=q.device)
        lse = torch.empty(B, S, H, dtype=torch.float32, device=q.device)
        part = out if splits == 1 else torch.empty(splits, *out.shape, dtype=torch.float32, device=q.device)
        part_lse = lse if splits == 1 else torch.empty(splits, *lse.shape, dtype=torch.float32, device=q.device)
        v_in_k = v.data_ptr() == k.data_ptr() and v.stride() == k.stride() and DV == D1
        flash_forward_kernel[triton.cdiv(S * G, BM), B * Hk, splits](
            q, k, v, part, part_lse, first, last, *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], scale * LOG2E.value, S, T, H, G, D, D1, D2,
            DV, BV, BM, BN, splits, v_in_k, stages, num_warps=warps)
        if splits > 1:
            flash_combine_kernel[B * S * H,](part, part_lse, out, lse, B * S * H, DV, BV, splits, triton.next_power_of_2(splits), num_warps=4)
        ctx.save_for_backward(q, k, v, out, lse, first, last)
        ctx.scale = scale
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx, dout, _):
        q, k, v, out, lse, first, last = ctx.saved_tensors
        (B, S, H, D), (T, Hk, DV), dout = q.shape, v.shape[1:], dout.contiguous()
        G, (D1, D2), BV = H // Hk, _split(D), max(16, triton.next_power_of_2(DV))
        held, streamed, stages, warps = FlashAttention.tiles(q, D1 + D2 + BV, True)
        delta, lse2 = torch.empty_like(lse), torch.empty_like(lse)
        flash_delta_kernel[triton.cdiv(B * S * H, 16),](out, dout, lse, delta, lse2, B * S * H, S, H, DV, BV, 16)
        dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
        strides = (*q.stride()[:3], *k.stride()[:3], *v.stride()[:3])
        shape = (ctx.scale, S, T, H, G, D, D1, D2, DV, BV)
        flash_dkdv_kernel[triton.cdiv(T, held), B * Hk](q, k, v, dout, lse2, delta, dk, dv, first, last, *strides, *shape, streamed, held, stages,
                                                        num_warps=warps)
        flash_dq_kernel[triton.cdiv(S * G, held), B * Hk](q, k, v, dout, lse2, delta, dq, first, last, *strides, *shape, held, streamed, stages,
                                                          num_warps=warps)
        return dq, dk, dv, None, None, None


def dense_attention(q, k, v, scale, first=None, last=None):
    """Softmax attention over everything visible. q (B,S,H,d), k (B,T,Hk,d), v (B,T,Hk,dv), Hk divides H: H (MHA), 1 (MQA on latents)
    -> out (B,S,H,dv) in v's dtype, lse (B,S,H) float32, natural logarithm of sum exp(scale q.k). Differentiable in q, k, v, not through lse.
    A row that sees nothing: out 0, lse -inf. ValueError: Hk does not divide H, other shapes do not fit."""
    (B, S, H, d), (T, Hk, dv) = q.shape, v.shape[1:]
    if H % Hk:
        raise ValueError(f"dense_attention: {H} query heads over {Hk} key heads; the key heads must divide the query heads")
    if B * Hk >= 2**16:
        raise ValueError(f"dense_attention: {B} sequences x {Hk} key heads; a launch takes less than 65536, so split the batch")
    fit(k=(k, (B, T, Hk, d)), v=(v, (B, T, Hk, dv)))
    plain = first is None and last is None and S == T > 1 and Hk == H and q.is_cuda and q.dtype in (torch.bfloat16, torch.float16)
    if plain and d % 8 == dv % 8 == 0 and torch.version.cuda and (max(d, dv) <= 128 or torch.cuda.get_device_capability(q.device) >= (9, 0)
                                                                   and (d, dv) == (192, 128)):
        out, lse = torch.ops.aten._scaled_dot_product_cudnn_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), None, True, 0.0, True, False, scale=scale)[:2]
        return out.transpose(1, 2), lse.view(B, H, S).transpose(1, 2)
    return FlashAttention.apply(*_unit(q, k, v), scale, *_bounds(first, last, B, S, T, q.device))
