"""Chapter 4: the indexer's losses."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from triton_kernels.common import fit, limits, LOG2E
from triton_kernels.dense import _bounds, _split, _unit, hopper_kernels, load_bounds, load_tile, matmul, rows_seeing
from triton_kernels.sparse import union as sparse_union
from triton_kernels.sparse import union_tokens as sparse_tokens

LOSS_CHUNK = 2**25  # pairs (query, key) that a chunk of the dense loss holds at a time: 18 bytes each at 64 indexer heads
G_SCALE = tl.constexpr(64.0)  # gradients with respect to scores are kept times this: float16 would lose those of long rows

# indexer_loss_dense: kl[t] = sum_s p log p - p log softmax(I), p = mean over heads of exp(scale q.k - lse), I = sum_j w_j relu(q_j . k).
# Rows go through in chunks of whole 128-row blocks. Per chunk: p by tiles, all heads accumulated in registers (H d products and H exponentials per
# pair: the bulk of the work, done once); I by tiles, which also leaves one bit per indexer head, "was the relu open?"; a pass over rows gives kl and
# g = softmax(I) - p. With the bits the gradients need no second q.k: A_j = sum_s (g * bit_j) k_s, dq_j = w_j A_j, dw_j = q_j . A_j, and
# dk_s = sum_tj (g * bit_j) (w_tj q_tj).   Operations per pair: 2 H d + 6 HI dI.   Bytes per pair, by chunk: p 4, I 4, g 2, bits HI / 8.
# The incoming gradient r_t scales rows of dq and dw afterwards. dk sums over rows: c dk, c the median of r, plus a second sweep weighted by r - c in
# which every block of rows with r = c returns at once: free when the loss is a mean over rows, exact for any r.


@triton.jit
def loss_tile(BLOCKS, KEYS, GROUP: tl.constexpr):
    """-> block of rows, block of keys of this program: GROUP blocks of rows side by side, so that their keys come from L2"""
    pid = tl.program_id(0)
    group = pid // (GROUP * KEYS) * GROUP
    size = tl.minimum(GROUP, BLOCKS - group)
    return group + pid % (GROUP * KEYS) % size, pid % (GROUP * KEYS) // size


@triton.jit
def loss_target_kernel(Q, K, LSE2, P, FIRST, LAST, sqb, sqs, sqh, skb, skt, skh, scale_log2, S, T, TP, block0, BLOCKS, KEYS, H: tl.constexpr,
                       D: tl.constexpr, DC: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """p of one tile. Heads and their columns of DC are one loop, so that loads never drain."""
    CHUNKS: tl.constexpr = (D + DC - 1) // DC
    block, kb = loss_tile(BLOCKS, KEYS, 8)
    per_batch = tl.cdiv(S, BM)
    b = (block0 + block) // per_batch
    i0 = (block0 + block) % per_batch * BM
    n0 = kb * BN
    _, _, lo, hi = load_bounds(FIRST, LAST, b, i0 + tl.arange(0, BM), S, T)
    if (lo >= n0 + BN) | (hi <= n0):
        return
    i = tl.minimum(tl.arange(0, BM), S - 1 - i0)
    n = tl.minimum(tl.arange(0, BN), T - 1 - n0)
    Q += b.to(tl.int64) * sqb + i0.to(tl.int64) * sqs
    K += b.to(tl.int64) * skb + n0.to(tl.int64) * skt
    LSE2 += b.to(tl.int64) * H * S + i0 + i
    p = tl.zeros([BM, BN], tl.float32)
    s = tl.zeros([BM, BN], tl.float32)
    for t in tl.range(0, H * CHUNKS, num_stages=STAGES):
        h = t // CHUNKS
        d = t % CHUNKS * DC + tl.arange(0, DC)
        q = tl.load(Q + i[:, None] * sqs + (h * sqh + d)[None, :], mask=(d < D)[None, :], other=0.0)
        k = tl.load(K + n[:, None] * skt + (h * skh + d)[None, :], mask=(d < D)[None, :], other=0.0)
        s = matmul(q, tl.trans(k), s)
        if t % CHUNKS == CHUNKS - 1:
            p += tl.exp2(s * scale_log2 - tl.load(LSE2 + h * S)[:, None])
            s = tl.zeros([BM, BN], tl.float32)
    o = (block * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * TP + n0 + tl.arange(0, BN)[None, :]
    tl.store(P + o, p * (1.0 / H))


@triton.jit
def loss_scores_kernel(Q, K, W, I, BITS, FIRST, LAST, sqb, sqs, sqh, skb, skt, S, T, TP, plane, block0, BLOCKS, KEYS, HI: tl.constexpr,
                       D: tl.constexpr, BD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """I, and for each group of 8 heads a plane of bytes: bit 7 - j % 8 says that head j's relu is open (at exactly 0 it is closed)"""
    block, kb = loss_tile(BLOCKS, KEYS, 8)
    per_batch = tl.cdiv(S, BM)
    b = (block0 + block) // per_batch
    i0 = (block0 + block) % per_batch * BM
    n0 = kb * BN
    _, _, lo, hi = load_bounds(FIRST, LAST, b, i0 + tl.arange(0, BM), S, T)
    if (lo >= n0 + BN) | (hi <= n0):
        return
    i = tl.minimum(tl.arange(0, BM), S - 1 - i0)
    n = tl.minimum(tl.arange(0, BN), T - 1 - n0)
    Q += b.to(tl.int64) * sqb + i0.to(tl.int64) * sqs
    W += b.to(tl.int64) * HI * S + i0 + i
    d = tl.arange(0, BD)
    k = tl.load(K + b.to(tl.int64) * skb + n0.to(tl.int64) * skt + n[:, None] * skt + d[None, :], mask=(d < D)[None, :], other=0.0)
    o = (block * BM + tl.arange(0, BM)).to(tl.int64)[:, None] * TP + n0 + tl.arange(0, BN)[None, :]
    score = tl.zeros([BM, BN], tl.float32)
    bits = tl.zeros([BM, BN], tl.uint32)
    for j in tl.range(0, HI, num_stages=STAGES):
        q = tl.load(Q + i[:, None] * sqs + (j * sqh + d)[None, :], mask=(d < D)[None, :], other=0.0)
        s = matmul(q, tl.trans(k))
        score += tl.maximum(s, 0.0) * tl.load(W + j * S)[:, None]
        bits = (bits << 1) | ((0.0 - s).to(tl.uint32, bitcast=True) >> 31)
        if (j % 8 == 7) | (j == HI - 1):
            tl.store(BITS + (j // 8) * plane.to(tl.int64) + o, (bits << (7 - j % 8)).to(tl.uint8))
    tl.store(I + o, score)


@triton.jit
def loss_row_kernel(P, I, G, FIRST, LAST, KL, UNIFORM, row0, TP, plane, S, BM: tl.constexpr, PLANES: tl.constexpr, GRAD: tl.constexpr,
                    BN: tl.constexpr):
    """One row: kl, kl_uniform, g = sum(p) softmax(I) - p. p is the sum of PLANES buffers. Rows of a batch are padded to a multiple of BM."""
    x = tl.program_id(0)
    per_batch = tl.cdiv(S, BM) * BM
    b = (row0 + x) // per_batch
    i = (row0 + x) % per_batch
    real = i < S
    first = tl.maximum(tl.load(FIRST + b * S + i, mask=real, other=0), 0)
    end = tl.minimum(tl.load(LAST + b * S + i, mask=real, other=-1) + 1, TP)
    start = first // 128 * 128
    P += x.to(tl.int64) * TP
    I += x.to(tl.int64) * TP
    G += x.to(tl.int64) * TP
    m = tl.full([BN], -1e30, tl.float32)
    l = tl.zeros([BN], tl.float32)
    mass = tl.zeros([BN], tl.float32)
    for j in tl.range(start, end, BN, num_stages=2):
        n = j + tl.arange(0, BN)
        ok = (n >= first) & (n < end)
        score = tl.load(I + n, mask=ok, other=float("-inf"))
        for a in tl.static_range(PLANES):
            mass += tl.load(P + a * plane + n, mask=ok, other=0.0)
        m_new = tl.maximum(m, score)
        l = l * tl.exp2((m - m_new) * LOG2E) + tl.exp2((score - m_new) * LOG2E)
        m = m_new
    top = tl.max(m)
    total = tl.sum(mass)
    lse = top + tl.log(tl.maximum(tl.sum(l * tl.exp2((m - top) * LOG2E)), 1e-30))
    cross = tl.zeros([BN], tl.float32)
    entropy = tl.zeros([BN], tl.float32)
    for j in tl.range(start, end, BN, num_stages=2):
        n = j + tl.arange(0, BN)
        ok = (n >= first) & (n < end)
        score = tl.load(I + n, mask=ok, other=0.0) - lse
        p = tl.zeros([BN], tl.float32)
        for a in tl.static_range(PLANES):
            p += tl.load(P + a * plane + n, mask=ok, other=0.0)
        plogp = p * tl.log(tl.maximum(p, 1e-37))
        entropy += plogp
        cross += tl.where(ok, plogp - p * score, 0.0)
        if GRAD:
            g = tl.where(ok, (total * tl.exp2(score * LOG2E) - p) * G_SCALE, 0.0)
            tl.store(G + n, g.to(G.dtype.element_ty), mask=n < TP)
    if GRAD:  # the products with g need no masks: it is zero wherever nothing is visible
        n = tl.arange(0, BN)
        zero = tl.zeros([BN], G.dtype.element_ty)
        for j in range(0, tl.minimum(start, TP), BN):
            tl.store(G + j + n, zero, mask=j + n < start)
        for j in range(start + tl.cdiv(tl.maximum(end - start, 0), BN) * BN, TP, BN):
            tl.store(G + j + n, zero, mask=j + n < TP)
    if real:
        tl.store(KL + b * S + i, tl.sum(cross))
        tl.store(UNIFORM + b * S + i, tl.sum(entropy) + total * tl.log(tl.maximum(end - first, 1).to(tl.float32)))


@triton.jit
def loss_dq_kernel(Q, K, W, G, BITS, DQ, DW, FIRST, LAST, sqb, sqs, sqh, skb, skt, S, T, TP, plane, block0, HI: tl.constexpr, D: tl.constexpr,
                   BD: tl.constexpr, PAD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """dq, dw of two heads (of one, if there is one) of BM rows, which divide the blocks of PAD, for r = 1"""
    j = tl.program_id(0) * 2
    x = tl.program_id(1) * BM
    per_batch = tl.cdiv(S, PAD) * PAD
    b = (block0 * PAD + x) // per_batch
    i = (block0 * PAD + x) % per_batch + tl.arange(0, BM)
    _, _, lo, hi = load_bounds(FIRST, LAST, b, i, S, T)
    x = (x + tl.arange(0, BM)).to(tl.int64) * TP
    d = tl.arange(0, BD)
    K += b.to(tl.int64) * skb
    BITS += (j // 8).to(tl.int64) * plane
    a0 = tl.zeros([BM, BD], tl.float32)
    a1 = tl.zeros([BM, BD], tl.float32)
    for n0 in tl.range(lo // BN * BN, hi, BN, num_stages=STAGES):
        n = n0 + tl.arange(0, BN)
        k = load_tile(K, n.to(tl.int64) * skt, n < T, 0, D, BD)
        g = tl.load(G + x[:, None] + n[None, :])
        bits = tl.load(BITS + x[:, None] + n[None, :])
        a0 = matmul(tl.where((bits >> (7 - j % 8)) & 1 != 0, g, 0.0).to(k.dtype), k, a0)
        if HI > 1:
            a1 = matmul(tl.where((bits >> (6 - j % 8)) & 1 != 0, g, 0.0).to(k.dtype), k, a1)
    Q += b.to(tl.int64) * sqb + j * sqh
    o = (b.to(tl.int64) * S + i) * HI + j
    ok = (i < S)[:, None] & (d < D)[None, :]
    a0 = a0 / G_SCALE
    w = tl.load(W + (b.to(tl.int64) * HI + j) * S + i, mask=i < S, other=0.0)
    tl.store(DW + o, tl.sum(load_tile(Q, i.to(tl.int64) * sqs, i < S, 0, D, BD).to(tl.float32) * a0, 1), mask=i < S)
    tl.store(DQ + o[:, None] * D + d[None, :], (a0 * w[:, None]).to(DQ.dtype.element_ty), mask=ok)
    if j + 1 < HI:
        a1 = a1 / G_SCALE
        w = tl.load(W + (b.to(tl.int64) * HI + j + 1) * S + i, mask=i < S, other=0.0)
        tl.store(DW + o + 1, tl.sum(load_tile(Q + sqh, i.to(tl.int64) * sqs, i < S, 0, D, BD).to(tl.float32) * a1, 1), mask=i < S)
        tl.store(DQ + (o + 1)[:, None] * D + d[None, :], (a1 * w[:, None]).to(DQ.dtype.element_ty), mask=ok)


@triton.jit
def loss_dk_kernel(WQ, G, BITS, DK, FIRST, LAST, S, T, TP, plane, B, block0, BLOCKS, HI: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
                   PAD: tl.constexpr, HEADS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """dk of a block of keys from one group of HEADS <= 8 heads, added to what earlier chunks left. wq = r w q of the chunk's rows (padded as they are)"""
    group = tl.program_id(1)
    n0 = tl.program_id(0) * BN
    n = n0 + tl.arange(0, BN)
    d = tl.arange(0, BD)
    per_batch = tl.cdiv(S, PAD)
    b0 = block0 // per_batch
    b = b0 + tl.program_id(2)
    x0 = (b * per_batch - block0) * PAD  # where the chunk's buffers hold (or would hold) row 0 of this batch
    r0 = tl.maximum(0, -x0)
    r1 = tl.minimum(S, BLOCKS * PAD - x0)
    lo, hi, _ = rows_seeing(FIRST, LAST, b, n0, n0 + BN, r0, r1, S, 1024)
    if lo < hi:
        BITS += group.to(tl.int64) * plane
        acc = tl.zeros([BN, BD], tl.float32)
        for i0 in tl.range(lo // BM * BM, hi, BM, num_stages=STAGES):
            i = i0 + tl.arange(0, BM)
            x = (x0 + i).to(tl.int64)
            g = tl.load(G + x[None, :] * TP + n[:, None])
            bits = tl.load(BITS + x[None, :] * TP + n[:, None])
            for j in tl.static_range(HEADS):
                ok = (i < r1) & (group * 8 + j < HI)
                wq = tl.load(WQ + x[:, None] * (HI * D) + (group * 8 + j) * D + d[None, :], mask=ok[:, None] & (d < D)[None, :], other=0.0)
                acc = matmul(tl.where((bits >> (7 - j)) & 1 != 0, g, 0.0).to(wq.dtype), wq, acc)
        o = DK + ((group * B + b).to(tl.int64) * T + n)[:, None] * D + d[None, :]
        ok = (n < T)[:, None] & (d < D)[None, :]
        tl.store(o, tl.load(o, mask=ok, other=0.0) + acc / G_SCALE, mask=ok)


def _loss_tiles(x):
    """-> rows of a block, keys of a tile, stages, warps"""
    if x.dtype == torch.float32:
        return 32, 32, 1, 4
    return (128, 128, 3, 8) if limits(x.device)[0] > 200_000 else (128, 64, 2, 8)


def loss_target(q, k, lse2, p, scale, first, last, block0, blocks):
    """p of a chunk of row blocks; lse2 (B,H,S) in base 2"""
    hopper = hopper_kernels(q)
    if hopper and hopper.target_supported(q):
        return hopper.loss_target(q, k, lse2, p, scale, first, last, block0, blocks)
    (B, S, H, D), T, TP = q.shape, k.shape[1], p.shape[1]
    BM, BN, stages, warps = _loss_tiles(q)
    keys = triton.cdiv(T, BN)
    loss_target_kernel[blocks * keys,](
        q, k, lse2, p, first, last, *q.stride()[:3], *k.stride()[:2], 0 if k.shape[2] == 1 else k.stride(2), scale * LOG2E.value, S, T, TP, block0,
        blocks, keys, H, D, min(64, max(16, triton.next_power_of_2(D))), BM, BN, stages + 1, num_warps=warps)


def loss_query_grad(q_index, k_index, wt, g, bits, dq, dw, first, last, block0, blocks):
    """dq, dw (r = 1) of a chunk of row blocks; wt (B,HI,S)"""
    (B, S, HI, dI), T, (_, rows, TP) = q_index.shape, k_index.shape[1], bits.shape
    PAD, BN, stages, warps = _loss_tiles(q_index)
    BM = PAD
    while BM > 16 and triton.cdiv(HI, 2) * blocks * (PAD // BM) < 2 * limits(q_index.device)[1]:  # few heads: smaller tiles to fill the device
        BM, warps = BM // 2, 4
    loss_dq_kernel[triton.cdiv(HI, 2), blocks * (PAD // BM)](
        q_index, k_index, wt, g, bits, dq, dw, first, last, *q_index.stride()[:3], *k_index.stride()[:2], S, T, TP, rows * TP, block0, HI, dI,
        max(16, triton.next_power_of_2(dI)), PAD, BM, min(BN, 64), stages, num_warps=warps)


def loss_key_grad(wq, g, bits, dk, first, last, block0, blocks):
    """dk (groups,B,T,dI) += what a chunk of row blocks contributes; wq (rows,HI,dI)"""
    (_, HI, dI), (groups, B, T, _), (_, rows, TP), S = wq.shape, dk.shape, bits.shape, first.shape[1]
    BM, BN, stages, warps = _loss_tiles(wq)
    per_batch = triton.cdiv(S, BM)
    batches = (block0 + blocks - 1) // per_batch + 1 - block0 // per_batch
    loss_dk_kernel[triton.cdiv(T, BN), groups, batches](
        wq, g, bits, dk, first, last, S, T, TP, rows * TP, B, block0, blocks, HI, dI, max(16, triton.next_power_of_2(dI)), BM, min(8, HI), 32, BN,
        stages - 1, num_warps=warps)


def _dense_sweep(q, k, lse, scale, q_index, k_index, w, first, last, r, want_dq):
    """Sweep all chunks: kl, kl_uniform (B,S); with r (B,S): dk_index (B,T,dI) float32 of sum r kl; with want_dq: dq_index, dw of sum kl."""
    (B, S), T, (HI, dI), groups = q.shape[:2], k.shape[1], q_index.shape[2:], triton.cdiv(q_index.shape[2], 8)
    BM, BN, stages, warps = _loss_tiles(q)
    TP, per_batch = triton.cdiv(T, 128) * 128, triton.cdiv(S, BM)
    rows = BM * max(1, min(B * per_batch, LOSS_CHUNK // (BM * TP)))  # of a chunk
    new = lambda *shape, dtype=torch.float32, zero=False: (torch.zeros if zero else torch.empty)(*shape, dtype=dtype, device=q.device)
    p, score, bits = new(rows, TP), new(rows, TP), new(groups, rows, TP, dtype=torch.uint8)
    kl, uniform = new(B, S), new(B, S)
    dk, dq, dw, g = None, None, None, p
    if r is not None:
        dk, g, wq = new(groups, B, T, dI, zero=True), new(rows, TP, dtype=q_index.dtype), new(rows, HI, dI, dtype=q_index.dtype, zero=True)
    if want_dq:
        dq, dw = new(B, S, HI, dI, dtype=q_index.dtype), new(B, S, HI)
    lse2, wt = (lse.transpose(1, 2) * LOG2E.value).contiguous(), w.transpose(1, 2).contiguous()
    for block0 in range(0, B * per_batch, rows // BM):
        blocks = min(rows // BM, B * per_batch - block0)
        keys = triton.cdiv(T, BN)
        loss_target(q, k, lse2, p, scale, first, last, block0, blocks)
        loss_scores_kernel[blocks * keys,](
            q_index, k_index, wt, score, bits, first, last, *q_index.stride()[:3], *k_index.stride()[:2], S, T, TP, rows * TP, block0, blocks, keys,
            HI, dI, max(16, triton.next_power_of_2(dI)), BM, BN, stages, num_warps=warps)
        loss_row_kernel[blocks * BM,](p, score, g, first, last, kl, uniform, block0 * BM, TP, 0, S, BM, 1, r is not None, 1024, num_warps=4)
        if want_dq:
            loss_query_grad(q_index, k_index, wt, g, bits, dq, dw, first, last, block0, blocks)
        if r is not None:
            for b in range(block0 // per_batch, (block0 + blocks - 1) // per_batch + 1):  # the chunk's rows of batch b
                x0 = (b * per_batch - block0) * BM
                lo, hi = max(0, -x0), min(S, blocks * BM - x0)
                torch.mul(q_index[b, lo:hi], (w[b, lo:hi] * r[b, lo:hi, None])[..., None], out=wq[x0 + lo:x0 + hi])
            loss_key_grad(wq, g, bits, dk, first, last, block0, blocks)
    return kl, uniform, None if dk is None else dk.sum(0), dq, dw


class IndexerLossDense(torch.autograd.Function):
    """indexer_loss_dense: unit gradients come with the forward and are scaled by the incoming gradient of each row."""

    @staticmethod
    def forward(ctx, q, k, lse, scale, q_index, k_index, w, first, last, grad):
        r = torch.ones(q.shape[:2], device=q.device) if grad else None
        kl, uniform, dk, dq, dw = _dense_sweep(q, k, lse, scale, q_index, k_index, w, first, last, r, grad)
        if grad:
            ctx.save_for_backward(q, k, lse, q_index, k_index, w, first, last, dk, dq, dw)
        ctx.scale = scale
        ctx.mark_non_differentiable(uniform)
        return kl, uniform

    @staticmethod
    def backward(ctx, r, _):
        q, k, lse, q_index, k_index, w, first, last, dk, dq, dw = ctx.saved_tensors
        r = r.float()
        c = r.median()
        rest = _dense_sweep(q, k, lse, ctx.scale, q_index, k_index, w, first, torch.where(r == c, -1, last), r - c, False)[2]
        dq_index = torch.mul(dq, r[..., None, None], out=torch.empty_like(dq))
        return None, None, None, None, dq_index, (c * dk + rest).to(k_index.dtype), (dw * r[..., None]).to(w.dtype), None, None, None


def indexer_loss_dense(q, k, lse, scale, q_index, k_index, w, first=None, last=None):
    """Warm-up loss, KL(p_t || softmax(I_t)) over all visible tokens (paper eq. 3), p the mean over heads of exp(scale q.k - lse).

    q (B,S,H,d), k (B,T,H or 1,d), lse (B,S,H) natural logarithm, of the frozen attention: no gradient. q_index (B,S,HI,dI), k_index (B,T,dI),
    w (B,S,HI) float32 receive one -> kl (B,S), kl_uniform (B,S) float32; 0 for a row that sees nothing. Deterministic. ValueError: shapes that don't fit."""
    (B, S, H, d), T, (HI, dI) = q.shape, k.shape[1], q_index.shape[2:]
    fit(k=(k, (B, T, k.shape[2] if k.shape[2] == 1 else H, d)), lse=(lse, (B, S, H)), q_index=(q_index, (B, S, HI, dI)), k_index=(k_index, (B, T, dI)), w=(w, (B, S, HI)))
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_index, k_index, w))
    q, k, q_index, k_index = _unit(q.detach(), k.detach(), q_index, k_index)
    return IndexerLossDense.apply(q, k, lse.detach(), scale, q_index, k_index, w, *_bounds(first, last, B, S, T, q.device), grad)


# indexer_loss_sparse: the same over the selection S_t, p from the latents and the lse of the sparse attention.
# A program takes a block of QP neighbouring queries with all heads (or HB of them) and walks over the union of their selections (section 3), BN
# gathered tokens at a time as the M operand; what belongs to query i goes to the token's place among those that i chose. First p, then I, then the
# row pass of the dense loss, whose g (rows,K) the backward reads by place: A_j = sum_s g [q_j.k_s > 0] k_s gives dq and dw as there, dk_s by atomics.
# Operations per entry of the union: 2 QP (H D + HI dI) forward, 6 QP HI dI backward. Bytes gathered: 2 D + 2 dI, and 2 dI backward; dI float32 atomics.


@triton.jit
def loss_rows(block, group, blocks, S, H, QP: tl.constexpr, HB: tl.constexpr):
    """QP queries x HB heads of a block -> batch, query, head of each row, is it real"""
    row = tl.arange(0, QP * HB)
    query, h = block % blocks * QP + row // HB, group * HB + row % HB
    return (block // blocks).to(tl.int64), query, h, (query < S) & (h < H)


@triton.jit
def loss_places(bits, base, QP: tl.constexpr):
    """-> which of QP queries chose these tokens, at which place of its own, (tokens, QP) each, and how many it has chosen so far"""
    chosen = (bits[:, None] >> tl.arange(0, QP)[None, :]) & 1
    return chosen != 0, base[None, :] + tl.cumsum(chosen, 0) - chosen, base + tl.sum(chosen, 0)


@triton.jit
def loss_sparse_target_kernel(Q, LATENTS, LSE, LISTS, BITS, LENGTH, P, sqb, sqs, sqh, slb, slt, scale_log2, S, K, blocks, width, block0, plane,
                              H: tl.constexpr, D: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, QP: tl.constexpr, HB: tl.constexpr,
                              BN: tl.constexpr, STAGES: tl.constexpr):
    local, group = tl.program_id(0), tl.program_id(1)
    block = block0 + local
    b, query, h, ok = loss_rows(block, group, blocks, S, H, QP, HB)
    row = b * sqb + query.to(tl.int64) * sqs + h * sqh
    q1 = load_tile(Q, row, ok, 0, D, D1)
    if D2 > 0:
        q2 = load_tile(Q, row, ok, D1, D, D2)
    lse = tl.load(LSE + (b * S + query) * H + h, mask=ok, other=float("inf")) * LOG2E
    length, start, LATENTS = tl.load(LENGTH + block), block.to(tl.int64) * width, LATENTS + b * slb
    base = tl.zeros([QP], tl.int32)
    P += group.to(tl.int64) * plane + local.to(tl.int64) * QP * K
    for j in tl.range(0, length, BN, num_stages=STAGES):
        t, bits = sparse_tokens(LISTS, BITS, start, j, length, QP, BN)
        token = t.to(tl.int64) * slt
        s = matmul(load_tile(LATENTS, token, bits >= 0, 0, D, D1), tl.trans(q1))
        if D2 > 0:
            s = matmul(load_tile(LATENTS, token, bits >= 0, D1, D, D2), tl.trans(q2), s)
        p = tl.sum(tl.reshape(tl.exp2(s * scale_log2 - lse[None, :]), [BN, QP, HB]), 2) * (1.0 / H)
        chosen, place, base = loss_places(bits, base, QP)
        tl.store(P + tl.arange(0, QP)[None, :] * K + place, p, mask=chosen)


@triton.jit
def loss_sparse_scores_kernel(Q, KEYS, W, LISTS, BITS, LENGTH, I, sqb, sqs, sqh, skb, skt, S, K, blocks, width, block0, HI: tl.constexpr,
                              D: tl.constexpr, BD: tl.constexpr, QP: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    block = block0 + tl.program_id(0)
    b, query, h, ok = loss_rows(block, 0, blocks, S, HI, QP, HB)
    q = load_tile(Q, b * sqb + query.to(tl.int64) * sqs + h * sqh, ok, 0, D, BD)
    w = tl.load(W + (b * S + query) * HI + h, mask=ok, other=0.0)
    length, start, KEYS = tl.load(LENGTH + block), block.to(tl.int64) * width, KEYS + b * skb
    base = tl.zeros([QP], tl.int32)
    I += tl.program_id(0).to(tl.int64) * QP * K
    for j in tl.range(0, length, BN, num_stages=STAGES):
        t, bits = sparse_tokens(LISTS, BITS, start, j, length, QP, BN)
        s = matmul(load_tile(KEYS, t.to(tl.int64) * skt, bits >= 0, 0, D, BD), tl.trans(q))
        chosen, place, base = loss_places(bits, base, QP)
        tl.store(I + tl.arange(0, QP)[None, :] * K + place, tl.sum(tl.reshape(tl.maximum(s, 0.0) * w[None, :], [BN, QP, HB]), 2), mask=chosen)


@triton.jit
def loss_sparse_backward_kernel(Q, KEYS, W, LISTS, BITS, LENGTH, G, R, LARGEST, DQ, DK, DW, sqb, sqs, sqh, skb, skt, S, T, K, blocks, width, rows, HI: tl.constexpr,
                                D: tl.constexpr, BD: tl.constexpr, QP: tl.constexpr, HB: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    """R: incoming gradients divided by the LARGEST of them, so that r w q keeps its digits in fp16; G has `rows` rows per sequence"""
    block = tl.program_id(0)
    b, query, h, ok = loss_rows(block, 0, blocks, S, HI, QP, HB)
    q = load_tile(Q, b * sqb + query.to(tl.int64) * sqs + h * sqh, ok, 0, D, BD)
    wr, scale = tl.load(W + (b * S + query) * HI + h, mask=ok, other=0.0), tl.load(LARGEST) / G_SCALE
    r = tl.load(R + b * S + query, mask=ok, other=0.0)
    wr *= r
    wq = (q.to(tl.float32) * wr[:, None]).to(q.dtype)
    length, start, KEYS = tl.load(LENGTH + block), block.to(tl.int64) * width, KEYS + b * skb
    base, d = tl.zeros([QP], tl.int32), tl.arange(0, BD)
    G += (b * rows + block % blocks * QP) * K
    a = tl.zeros([BD, QP * HB], tl.float32)  # A^T
    for j in tl.range(0, length, BN, num_stages=STAGES):
        t, bits = sparse_tokens(LISTS, BITS, start, j, length, QP, BN)
        chosen, place, base = loss_places(bits, base, QP)
        g = tl.load(G + tl.arange(0, QP)[None, :] * K + place, mask=chosen, other=0.0).to(tl.float32)
        g = tl.reshape(tl.broadcast_to(g[:, :, None], [BN, QP, HB]), [BN, QP * HB])
        k = load_tile(KEYS, t.to(tl.int64) * skt, bits >= 0, 0, D, BD)
        g = tl.where(matmul(k, tl.trans(q)) > 0, g, 0.0).to(k.dtype)
        a = matmul(tl.trans(k), g, a)
        tl.atomic_add(DK + (b * T + t)[:, None] * D + d[None, :], matmul(g, wq) * scale, mask=(bits != 0)[:, None] & (d < D)[None, :], sem="relaxed")
    a, row = a * scale, (b * S + query) * HI + h
    tl.store(DW + row, tl.sum(tl.trans(q).to(tl.float32) * a, 0) * r, mask=ok)
    tl.store(DQ + row[None, :] * D + d[:, None], (a * wr[None, :]).to(DQ.dtype.element_ty), mask=ok[None, :] & (d < D)[:, None])


def _sharing(heads, S, dtype):
    """-> how many queries share a list: as many as make 64 rows (query, head), at most 16; one where products are float32 (or there is only one)"""
    return min(16, max(1, 64 // triton.next_power_of_2(heads))) if dtype.itemsize == 2 and S > 1 else 1


class IndexerLossSparse(torch.autograd.Function):
    """indexer_loss_sparse with its backward; dk_index is summed by float32 atomics."""

    @staticmethod
    def forward(ctx, q, latents, lse, indices, scale, q_index, k_index, w, grad):
        (B, S, H, D), T, K, (HI, dI) = q.shape, latents.shape[1], indices.shape[2], q_index.shape[2:]
        (D1, D2), half = _split(D), q.element_size() == 2
        wide = half and limits(q.device)[0] > 200_000
        most = 64 if D1 > 256 or not wide else 128  # rows of p's program
        QP = _sharing(max(H, HI), S, q.dtype)
        HB, HBI, BN = max(16 // QP, min(most, triton.next_power_of_2(H))), max(16 // QP, triton.next_power_of_2(HI)), 64 if wide else 32 if half else 16
        lists, bits, length = sparse_union(indices, T, QP)
        planes, blocks, width = triton.cdiv(H, HB), triton.cdiv(S, QP), lists.shape[-1]
        last = (indices >= 0).sum(-1, dtype=torch.int32) - 1  # the last used place, as `last` of a row of K keys
        kl, uniform = torch.empty(B, S, device=q.device), torch.empty(B, S, device=q.device)
        g = torch.empty(B * blocks * QP, K, dtype=q_index.dtype, device=q.device) if grad else kl
        chunk = max(1, min(B * blocks, LOSS_CHUNK // (QP * K)))
        p, score = torch.empty(planes, chunk * QP, K, device=q.device), torch.empty(chunk * QP, K, device=q.device)
        tile = (dI, max(16, triton.next_power_of_2(dI)), QP, HBI, BN)
        for block0 in range(0, B * blocks, chunk):
            n = min(chunk, B * blocks - block0)
            loss_sparse_target_kernel[n, planes](
                q, latents, lse, lists, bits, length, p, *q.stride()[:3], *latents.stride()[:2], scale * LOG2E.value, S, K, blocks, width, block0,
                chunk * QP * K, H, D, D1, D2, QP, HB, BN, 2 if half else 1, num_warps=4)
            loss_sparse_scores_kernel[n,](
                q_index, k_index, w, lists, bits, length, score, *q_index.stride()[:3], *k_index.stride()[:2], S, K, blocks, width, block0, HI, *tile,
                3 if half else 1, num_warps=4)
            loss_row_kernel[n * QP,](p, score, g[block0 * QP:] if grad else g, torch.zeros_like(last), last, kl, uniform, block0 * QP, K, chunk * QP * K, S, QP,
                                     planes, grad, min(1024, max(128, triton.next_power_of_2(K))), num_warps=4)
        ctx.save_for_backward(indices, q_index, k_index, w, g)
        ctx.rows, ctx.BN = blocks * QP, BN
        ctx.mark_non_differentiable(uniform)
        return kl, uniform

    @staticmethod
    def backward(ctx, r, _):
        indices, q_index, k_index, w, g = ctx.saved_tensors
        (B, S, HI, dI), T, K = q_index.shape, k_index.shape[1], indices.shape[2]
        QP = _sharing(HI, S, q_index.dtype)  # more than forward, where the main heads are many
        lists, bits, length = sparse_union(indices, T, QP)
        blocks, largest = triton.cdiv(S, QP), r.abs().max().float().clamp(min=1e-30)
        dq = torch.empty(q_index.shape, dtype=q_index.dtype, device=q_index.device)
        dk, dw = torch.zeros(B, T, dI, device=q_index.device), torch.empty_like(w)
        loss_sparse_backward_kernel[B * blocks,](
            q_index, k_index, w, lists, bits, length, g, (r / largest).float().contiguous(), largest, dq, dk, dw, *q_index.stride()[:3], *k_index.stride()[:2],
            S, T, K, blocks, lists.shape[-1], ctx.rows, HI, dI, max(16, triton.next_power_of_2(dI)), QP, max(16 // QP, triton.next_power_of_2(HI)), ctx.BN, 2, num_warps=4)
        return None, None, None, None, None, dq, dk.to(k_index.dtype), dw, None


def indexer_loss_sparse(q, latents, lse, indices, scale, q_index, k_index, w):
    """Sparse-stage loss, KL(p_{t,S_t} || softmax(I_{t,S_t})) over the selection only (paper eq. 4), p the mean over heads of exp(scale q.latent - lse).

    q (B,S,H,D) absorbed, latents (B,T,D), lse (B,S,H) natural logarithm over the selection, indices (B,S,K) int32 ascending, then -1, as from `select`.
    Gradients to q_index (B,S,HI,dI), k_index (B,T,dI) (float32 atomics: sums in no fixed order), w (B,S,HI) float32
    -> kl (B,S), kl_uniform (B,S) float32; 0 for a row with nothing selected. ValueError: shapes or types that don't fit."""
    (B, S, H, D), T, (HI, dI) = q.shape, latents.shape[1], q_index.shape[2:]
    fit(latents=(latents, (B, T, D)), lse=(lse, (B, S, H)), indices=(indices, (B, S, indices.shape[-1])), q_index=(q_index, (B, S, HI, dI)),
        k_index=(k_index, (B, T, dI)), w=(w, (B, S, HI)))
    if indices.dtype != torch.int32:
        raise ValueError(f"indices are int32, not {indices.dtype}: pass indices.int()")
    grad = torch.is_grad_enabled() and any(x.requires_grad for x in (q_index, k_index, w))
    q, latents, q_index, k_index = _unit(q.detach(), latents.detach(), q_index, k_index)
    return IndexerLossSparse.apply(q, latents, lse.detach().contiguous(), indices.contiguous(), scale, q_index, k_index, w.contiguous(), grad)
