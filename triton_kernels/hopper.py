"""Sparse attention for Hopper (sm_90), written in Gluon: the published shape, latents 512 + 64, bf16, 64 or more heads.

The same functions as the portable twin, picked where plain Triton provably runs out: it cannot give the warps of one
program different work, and with every warp in step the tensor cores idle while latents are gathered and the softmax runs.
Each kernel here is a persistent grid, one program per SM, whose warpgroups each have one role and meet only at mbarriers:

    sparse_forward    out, lse     producer | scores (QK^T, softmax) | pv left | pv right           0.66x of a large bf16 matmul
    sparse_backward   dq, dlatents three products that do not fit one register file together, so three kernels:
        bwd_scores    P = exp(scale q.k - lse), dS = scale P (dout.v - delta)   both written out in bf16, a chunk of queries at a time
        bwd_dq        dq = dS K                                                 gathers the latents a second time
        bwd_dlatents  dlatents[idx] += dS^T q + [P^T dout | 0]                  float32 atomics, all 128 heads reduced before they leave
    loss_target       p            producer | scores, exp | scores, exp: the bulk of the warm-up loss

Names: f* = full barrier (the data is there), e* = empty barrier (the slot may be overwritten); slot `n % stages` is in its
use number `n // stages`, whose parity is the phase. Waiting for phase 1 passes on a fresh barrier. `mbarrier.arrive` counts once per
warpgroup, the arrival of `cp.async` once per thread. wgmma reads shared memory by the async proxy: `fence_async_shared` on the reader's side.
"""
import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy as ac, mbarrier, fence_async_shared, warpgroup_mma, warpgroup_mma_wait)

from triton_kernels.common import limits

LATENT, ROPE = gl.constexpr(512), gl.constexpr(64)
D = gl.constexpr(LATENT.value + ROPE.value)
ENTRY = gl.constexpr(LATENT.value + 4 * 4 + 2 * ROPE.value)    # bytes per token of the packed FP8 cache
LOG2E, LN2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
S128 = gl.constexpr(gl.NVMMASharedLayout(128, 16))             # bf16 rows of 128 bytes and more, swizzled as wgmma reads them
S64 = gl.constexpr(gl.NVMMASharedLayout(64, 16))               # rows of 64 bytes
SFLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))      # 8 lanes x 16 bytes of a row, 4 rows per warp
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))     # 16 e4m3 of a row per thread; its bf16 stores meet no bank twice
S128W = gl.constexpr(gl.NVMMASharedLayout(128, 32))            # the same seen as words
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
EVERY2 = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))   # of 64 elements: every warp holds all of them,
EVERY4 = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))   # of 128: a reduction needs no barrier between warps
BAR = gl.constexpr(mbarrier.MBarrierLayout())
# wgmma results [64, n] with columns renamed so that a thread's are neighbours, 8 in every 32 or 4 in every 16 (registers are only renamed)
BY8 = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]], [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
                                              [[16, 0], [32, 0]], [], [64, 128]))
BY4 = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
                                              [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 256]))
BY4_32 = gl.constexpr(gl.DistributedLinearLayout([[0, 1], [0, 2], [8, 0], [0, 16]], [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]],
                                                 [[16, 0], [32, 0]], [], [64, 32]))


@gluon.jit
def fill(dst, rows, C0: gl.constexpr):
    """cp.async of columns C0, C0 + 1, ... of the rows at these pointers into dst."""
    W: gl.constexpr = dst.shape[1]
    cols = gl.arange(0, W, gl.SliceLayout(0, COPY)) + C0
    ac.async_copy_global_to_shared(dst, gl.expand_dims(gl.multiple_of(rows, 16), 1) + gl.expand_dims(cols, 0))


@gluon.jit
def load_bytes(row, group: gl.constexpr):
    """The 128 e4m3 of this group of these entries of the packed cache, as 32 words (64, 32)."""
    cols = gl.arange(0, 32, gl.SliceLayout(0, WORDS)) + group * 32
    return gl.load(gl.expand_dims(gl.multiple_of(row.to(gl.pointer_type(gl.int32)), 16), 1) + gl.expand_dims(cols, 0))


@gluon.jit
def convert_bytes(dst, word, row, group: gl.constexpr):
    """dst[:, 128 group ...] = bf16(e4m3 x the group's scale), as pairs: dst is (64, 128) words."""
    scale = gl.load((row + LATENT).to(gl.pointer_type(gl.float32)) + group)
    lo, hi = gl.inline_asm_elementwise("""{
        .reg .b16 a, b, h0, h1, h2, h3; .reg .b32 x, y; .reg .f32 f0, f1, f2, f3;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 x, a;       cvt.rn.f16x2.e4m3x2 y, b;
        mov.b32 {h0, h1}, x;            mov.b32 {h2, h3}, y;
        cvt.f32.f16 f0, h0;             cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;             cvt.f32.f16 f3, h3;
        mul.f32 f0, f0, $3;             mul.f32 f1, f1, $3;
        mul.f32 f2, f2, $3;             mul.f32 f3, f3, $3;
        cvt.rn.bf16x2.f32 $0, f1, f0;   cvt.rn.bf16x2.f32 $1, f3, f2; }""",
        "=r,=r,r,f", [word, gl.expand_dims(scale, 1)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    dst.slice((group % 2) * 64, 64, 1).store(gl.reshape(gl.join(lo, hi), [64, 64]))


# ---------------------------------------------------------------------------------------------------------------------
# Forward.   out[s, h] = softmax_j(scale q[s, h] . k[idx[s, j]]) @ k[idx[s, j], :512]
#
# Work item: a query and 64 of its heads. Tile: 64 gathered tokens, two slots. 2 * 64 * 64 * (576 + 512) operations and 72 KB
# gathered from L2 per tile. Four warpgroups:
#   producer   cp.async, the tile in pieces: rope (64 columns) and left (256), then right (256)
#   scores     S = Q K^T, online softmax; P goes over the tile's rope piece (dead by then, and of the same size)
#   pv x 2     O[:, half] = alpha O[:, half] + P V[:, half]: a 64 x 256 float32 accumulator each
# The reference maximum moves only when a row grew by more than 2^12, so alpha is 1 almost always and the multiply is skipped.

@gluon.jit
def fwd_producer(q, latents, idx, sL, sR, sP, qL, qR, qP, sIdx, fK, eK, fR, eR, fQ, eQ, nwork, S, T, H: gl.constexpr, K: gl.constexpr):
    r = gl.arange(0, 64, gl.SliceLayout(1, COPY))
    n = 0
    qp = 1
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        s = (w // (H // 64)).to(gl.int64)
        ip = idx + s * K
        base = latents + (s // S) * T * D
        nxt = gl.load(ip + r)
        for t in range(K // 64):
            k = n & 1
            ph = ((n >> 1) & 1) ^ 1
            cur = nxt
            if t + 1 < K // 64:
                nxt = gl.load(ip + (t + 1) * 64 + r)           # indices one tile ahead: no one waits for them
            rows = base + gl.maximum(cur, 0).to(gl.int64) * D  # an empty slot loads row 0, scores masks it
            mbarrier.wait(eK.index(k), ph)
            ac.async_copy_global_to_shared(sIdx.index(k), ip + t * 64 + gl.arange(0, 64, ONE))
            fill(sP.index(k), rows, LATENT)
            fill(sL.index(k), rows, 0)
            ac.mbarrier_arrive(fK.index(k), increment_count=False)
            mbarrier.wait(eR.index(k), ph)
            fill(sR.index(k), rows, LATENT // 2)
            ac.mbarrier_arrive(fR.index(k), increment_count=False)
            if t == 0:
                mbarrier.wait(eQ, qp)
                qp ^= 1
                qrow = q + (s * H + (w % (H // 64)) * 64 + r) * D
                fill(qP, qrow, LATENT)
                fill(qL, qrow, 0)
                fill(qR, qrow, LATENT // 2)
                ac.mbarrier_arrive(fQ, increment_count=False)
            n += 1


@gluon.jit
def fwd_producer_fp8(q, cache, idx, sL, sR, sP, qL, qR, qP, sIdx, fK, eK, fR, eR, fQ, eQ, nwork, S, T, H: gl.constexpr, K: gl.constexpr):
    """The same from the packed cache: 512 e4m3 | 4 float32 scales | 64 bf16; converted to bf16 on the way."""
    r = gl.arange(0, 64, gl.SliceLayout(1, COPY))
    x = gl.arange(0, 64, gl.SliceLayout(1, WORDS))
    n = 0
    qp = 1
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        s = (w // (H // 64)).to(gl.int64)
        ip = idx + s * K
        base = cache + (s // S) * T * ENTRY
        row = base + gl.maximum(gl.load(ip + x), 0).to(gl.int64) * ENTRY
        b0 = load_bytes(row, 0)
        b1 = load_bytes(row, 1)
        for t in range(K // 64):
            k = n & 1
            ph = ((n >> 1) & 1) ^ 1
            rows = base + gl.maximum(gl.load(ip + t * 64 + r), 0).to(gl.int64) * ENTRY + (LATENT + 16)
            u = gl.minimum(t + 1, K // 64 - 1)                 # the last tile fetches itself once more
            nrow = base + gl.maximum(gl.load(ip + u * 64 + x), 0).to(gl.int64) * ENTRY
            mbarrier.wait(eK.index(k), ph)
            ac.async_copy_global_to_shared(sIdx.index(k), ip + t * 64 + gl.arange(0, 64, ONE))
            fill(sP.index(k), rows.to(gl.pointer_type(gl.bfloat16)), 0)
            ac.mbarrier_arrive(fK.index(k), increment_count=False)
            left = sL.index(k)._reinterpret(gl.int32, [64, 128], S128W)
            right = sR.index(k)._reinterpret(gl.int32, [64, 128], S128W)
            convert_bytes(left, b0, row, 0)
            b0 = load_bytes(row, 2)                            # always two groups ahead
            convert_bytes(left, b1, row, 1)
            b1 = load_bytes(row, 3)
            fence_async_shared()
            mbarrier.arrive(fK.index(k))
            mbarrier.wait(eR.index(k), ph)
            convert_bytes(right, b0, row, 2)
            b0 = load_bytes(nrow, 0)
            convert_bytes(right, b1, row, 3)
            b1 = load_bytes(nrow, 1)
            fence_async_shared()
            mbarrier.arrive(fR.index(k))
            row = nrow
            if t == 0:
                mbarrier.wait(eQ, qp)
                qp ^= 1
                qrow = q + (s * H + (w % (H // 64)) * 64 + r) * D
                fill(qP, qrow, LATENT)
                fill(qL, qrow, 0)
                fill(qR, qrow, LATENT // 2)
                ac.mbarrier_arrive(fQ, increment_count=False)
            n += 1


@gluon.jit
def fwd_scores(lse, scale_log2, sL, sR, sP, sIdx, qL, qR, qP, sA, sF, fK, fR, fQ, eQ, fS, fF, eF, nwork, K: gl.constexpr):
    MS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    row: gl.constexpr = gl.SliceLayout(1, MS)
    n = 0
    qp = 0
    fp = 1
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        mbarrier.wait(fQ, qp)
        qp ^= 1
        m = gl.full([64], -1e30, gl.float32, row)              # reference maximum in log2 units; finite: no inf - inf
        l = gl.full([64], 0.0, gl.float32, row)
        zero = gl.zeros([64, 64], gl.float32, MS)
        for t in range(K // 64):
            k = n & 1
            ph = (n >> 1) & 1
            mbarrier.wait(fK.index(k), ph)
            fence_async_shared()
            x = warpgroup_mma(qP, sP.index(k).permute((1, 0)), zero, use_acc=False, is_async=True)
            x = warpgroup_mma(qL, sL.index(k).permute((1, 0)), x, is_async=True)
            mbarrier.wait(fR.index(k), ph)
            fence_async_shared()
            x = warpgroup_mma(qR, sR.index(k).permute((1, 0)), x, is_async=True)
            holes = gl.min(sIdx.index(k).load(EVERY2), 0) < 0
            x = warpgroup_mma_wait(0, deps=[x])
            if t + 1 == K // 64:
                mbarrier.arrive(eQ)                            # Q may be replaced while the last softmax runs
            if holes:
                x = gl.where(gl.expand_dims(sIdx.index(k).load(gl.SliceLayout(0, MS)) >= 0, 0), x, float("-inf"))
            top = gl.max(x, 1) * scale_log2
            mn = gl.where(top > m + 12.0, top, m)
            alpha = gl.exp2(m - mn)
            p = gl.exp2(x * scale_log2 - gl.expand_dims(mn, 1))
            m = mn
            sP.index(k).store(p.to(gl.bfloat16))               # over the rope part: Triton puts the group's barrier between its last read and this
            sA.index(k).store(alpha)
            fence_async_shared()
            mbarrier.arrive(fS.index(k))                       # contains the warpgroup's own barrier
            l = l * alpha + gl.sum(p, 1)
            n += 1
        mbarrier.wait(eF, fp)
        fp ^= 1
        sF.store(gl.where(l > 0, 1.0 / l, 0.0))                # a query without any token gives out 0
        mbarrier.arrive(fF)
        gl.store(lse + w.to(gl.int64) * 64 + gl.arange(0, 64, row), (m + gl.log2(l)) * LN2)        # and lse = -inf


@gluon.jit
def fwd_pv(out, sV, sP, sA, sF, eV, eP, fS, fF, eF, nwork, C0: gl.constexpr, K: gl.constexpr):
    # 128 columns per instruction: with 512 threads ptxas refuses 256 (it checks the 128 registers that a thread starts with)
    MO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row: gl.constexpr = gl.SliceLayout(1, MO)
    n = 0
    fp = 0
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        acc = gl.zeros([64, 256], gl.float32, MO)
        for t in range(K // 64):
            k = n & 1
            mbarrier.wait(fS.index(k), (n >> 1) & 1)
            if gl.max((sA.index(k).load(EVERY2) != 1.0).to(gl.int32), 0) > 0:
                acc = acc * gl.expand_dims(sA.index(k).load(row), 1)
            fence_async_shared()
            acc = warpgroup_mma(sP.index(k), sV.index(k), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            if C0 > 0:
                mbarrier.arrive(eP.index(k))                   # eK counts both pv groups: both read P
            mbarrier.arrive(eV.index(k))
            n += 1
        mbarrier.wait(fF, fp)
        fp ^= 1
        inv = sF.load(row)
        mbarrier.arrive(eF)
        at = (w.to(gl.int64) * 64 + gl.arange(0, 64, row)) * LATENT
        cols = gl.arange(0, 256, gl.SliceLayout(0, MO)) + C0
        gl.store(out + gl.expand_dims(at, 1) + gl.expand_dims(cols, 0), (acc * gl.expand_dims(inv, 1)).to(gl.bfloat16))


@gluon.jit
def fwd(q, latents, idx, out, lse, scale_log2, nwork, S, T, H: gl.constexpr, K: gl.constexpr, FP8: gl.constexpr):
    sL = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], S128)
    sR = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 256], S128)
    sP = gl.allocate_shared_memory(gl.bfloat16, [2, 64, 64], S128)
    qL = gl.allocate_shared_memory(gl.bfloat16, [64, 256], S128)
    qR = gl.allocate_shared_memory(gl.bfloat16, [64, 256], S128)
    qP = gl.allocate_shared_memory(gl.bfloat16, [64, 64], S128)
    sIdx = gl.allocate_shared_memory(gl.int32, [2, 64], SFLAT)
    sA = gl.allocate_shared_memory(gl.float32, [2, 64], SFLAT)
    sF = gl.allocate_shared_memory(gl.float32, [64], SFLAT)
    fK = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    eK = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    fR = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    eR = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    fS = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    fQ = gl.allocate_shared_memory(gl.int64, [1], BAR)
    eQ = gl.allocate_shared_memory(gl.int64, [1], BAR)
    fF = gl.allocate_shared_memory(gl.int64, [1], BAR)
    eF = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(fK.index(i), count=129 if FP8 else 128)
        mbarrier.init(fR.index(i), count=1 if FP8 else 128)
        mbarrier.init(eK.index(i), count=2)
        mbarrier.init(eR.index(i), count=1)
        mbarrier.init(fS.index(i), count=1)
    mbarrier.init(fQ, count=128)
    mbarrier.init(eQ, count=1)
    mbarrier.init(fF, count=1)
    mbarrier.init(eF, count=2)
    # registers of a thread: these for the workers, the rest of 512 for scores
    RPROD: gl.constexpr = 88 if FP8 else 40
    gl.warp_specialize([
        (fwd_scores, (lse, scale_log2, sL, sR, sP, sIdx, qL, qR, qP, sA, sF, fK, fR, fQ, eQ, fS, fF, eF, nwork, K)),
        (fwd_pv, (out, sL, sP, sA, sF, eK, eK, fS, fF, eF, nwork, 0, K)),
        (fwd_pv, (out, sR, sP, sA, sF, eR, eK, fS, fF, eF, nwork, 256, K)),
        (fwd_producer_fp8 if FP8 else fwd_producer, (q, latents, idx, sL, sR, sP, qL, qR, qP, sIdx, fK, eK, fR, eR, fQ, eQ, nwork, S, T, H, K)),
    ], [4, 4, 4], [160, 160, RPROD])


# ---------------------------------------------------------------------------------------------------------------------
# Backward, 1: scores.   P = exp2(scale_log2 q.k - lse_log2), dS = scale P (dout.v - delta), delta = sum(out dout)
#
# Work item: a query and 64 of its heads, Q and dO stay in shared memory (136 KB). Tile: 128 gathered tokens, 2 * 64 * 128 * (576 + 512)
# operations, that pass through a ring of 128 x 64 pieces (16 KB): each piece serves S and dP and is gone. Three warpgroups:
#   producer     gathers the pieces; with those of a query's first tile come Q and dO, piece by piece too
#   consumer x 2 alternate over the tiles: one is in its softmax and stores while the other multiplies. A consumer starts when the other has seen
#                its last piece (`turn`): a phase is one bit, so no one may wait for the use after next of a slot
# The tokens of a tile lie in shared memory in an order in which a thread's results are 8 consecutive slots: 16-byte stores.

@gluon.jit
def slot_of(r):
    """Row r of a tile holds this slot of the selection: a wgmma thread has columns 8 j + 2 c + (0, 1) of every 32."""
    return (r & ~31) | ((r >> 1 & 3) * 8 + (r >> 3 & 3) * 2 + (r & 1))


@gluon.jit
def scores_producer(q, dout, latents, idx, sQ, sO, sK, fK, eK, eQ, s0, nwork, S, T, H: gl.constexpr, K: gl.constexpr, NK: gl.constexpr):
    r = gl.arange(0, 64, gl.SliceLayout(1, COPY))
    slot = slot_of(gl.arange(0, 128, gl.SliceLayout(1, COPY)))
    k = 0
    ph = 1
    qp = 1
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        s = (w // (H // 64)).to(gl.int64)
        ip = idx + s * K + slot
        base = latents + ((s + s0) // S) * T * D
        head = s * H + (w % (H // 64)) * 64 + r
        nxt = gl.load(ip)
        for t in range(K // 128):
            cur = nxt
            if t + 1 < K // 128:
                nxt = gl.load(ip + (t + 1) * 128)
            rows = base + gl.maximum(cur, 0).to(gl.int64) * D
            for c in gl.static_range(9):
                if t == 0:
                    mbarrier.wait(eQ.index(c), qp)
                    fill(sQ.index(c), q + head * D, c * 64)
                    if c < 8:
                        fill(sO.index(c), dout + head * LATENT, c * 64)
                mbarrier.wait(eK.index(k), ph)
                fill(sK.index(k), rows, c * 64)
                ac.mbarrier_arrive(fK.index(k), increment_count=False)
                k += 1
                if k == NK:
                    k = 0
                    ph ^= 1
        qp ^= 1


@gluon.jit
def scores_consumer(P, dS, idx, lse, delta, scale, sQ, sO, sK, fK, eK, eQ, turn, nwork, WHO: gl.constexpr, H: gl.constexpr, K: gl.constexpr,
                    NK: gl.constexpr):
    MS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    row: gl.constexpr = gl.SliceLayout(1, MS)
    slot = slot_of(gl.arange(0, 128, gl.SliceLayout(0, MS)))
    n = WHO * 9                                                # pieces before this tile's
    tp = 1 - WHO
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        s = (w // (H // 64)).to(gl.int64)
        head = s * H + (w % (H // 64)) * 64 + gl.arange(0, 64, row)
        lse2 = gl.load(lse + head) * LOG2E
        lse2 = gl.where(lse2 > float("-inf"), lse2, float("inf"))
        dlt = gl.load(delta + head) * scale
        zero = gl.zeros([64, 128], gl.float32, MS)
        for t in range(WHO, K // 128, 2):
            holes = gl.min(gl.load(idx + s * K + t * 128 + gl.arange(0, 128, EVERY4)), 0) < 0
            x = zero
            dp = zero
            mbarrier.wait(turn.index(WHO), tp)
            tp ^= 1
            for c in gl.static_range(9):
                k = (n + c) % NK
                mbarrier.wait(fK.index(k), ((n + c) // NK) & 1)
                fence_async_shared()
                x = warpgroup_mma(sQ.index(c), sK.index(k).permute((1, 0)), x, use_acc=c > 0, is_async=True)
                if c < 8:
                    dp = warpgroup_mma(sO.index(c), sK.index(k).permute((1, 0)), dp, use_acc=c > 0, is_async=True)
                if c == 8:
                    mbarrier.arrive(turn.index(1 - WHO))
                    x, dp = warpgroup_mma_wait(1, deps=[x, dp])
                elif c > 0:
                    x, dp = warpgroup_mma_wait(2, deps=[x, dp])
                if c > 0:                                      # piece c - 1 is used up
                    mbarrier.arrive(eK.index((n + c - 1) % NK))
                    if t + 2 >= K // 128:
                        mbarrier.arrive(eQ.index(c - 1))
            x, dp = warpgroup_mma_wait(0, deps=[x, dp])
            mbarrier.arrive(eK.index((n + 8) % NK))
            if t + 2 >= K // 128:
                mbarrier.arrive(eQ.index(8))
            n += 18
            if holes:
                x = gl.where(gl.expand_dims(gl.load(idx + s * K + t * 128 + slot) >= 0, 0), x, float("-inf"))
            p = gl.exp2(x * (scale * LOG2E) - gl.expand_dims(lse2, 1))
            ds = p * (dp * scale - gl.expand_dims(dlt, 1))
            # columns (32 b, 8 j, 2 c, 1 e) of the tile -> slots (32 b, 8 c, 2 j, 1 e): registers only
            p = gl.reshape(gl.permute(gl.reshape(p.to(gl.bfloat16), [64, 4, 4, 4, 2]), [0, 1, 3, 2, 4]), [64, 128])
            ds = gl.reshape(gl.permute(gl.reshape(ds.to(gl.bfloat16), [64, 4, 4, 4, 2]), [0, 1, 3, 2, 4]), [64, 128])
            at = (w.to(gl.int64) * 64 + gl.arange(0, 64, gl.SliceLayout(1, BY8))) * K + t * 128
            at = gl.expand_dims(at, 1) + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, BY8)), 0)
            gl.store(P + at, gl.convert_layout(p, BY8))
            gl.store(dS + at, gl.convert_layout(ds, BY8))


@gluon.jit
def bwd_scores(q, dout, latents, idx, lse, delta, P, dS, scale, s0, nwork, S, T, H: gl.constexpr, K: gl.constexpr, NK: gl.constexpr):
    sQ = gl.allocate_shared_memory(gl.bfloat16, [9, 64, 64], S128)
    sO = gl.allocate_shared_memory(gl.bfloat16, [8, 64, 64], S128)
    sK = gl.allocate_shared_memory(gl.bfloat16, [NK, 128, 64], S128)
    fK = gl.allocate_shared_memory(gl.int64, [NK, 1], BAR)
    eK = gl.allocate_shared_memory(gl.int64, [NK, 1], BAR)
    eQ = gl.allocate_shared_memory(gl.int64, [9, 1], BAR)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(NK):
        mbarrier.init(fK.index(i), count=128)
        mbarrier.init(eK.index(i), count=1)
    for i in gl.static_range(9):
        mbarrier.init(eQ.index(i), count=2)
    gl.warp_specialize([
        (scores_producer, (q, dout, latents, idx, sQ, sO, sK, fK, eK, eQ, s0, nwork, S, T, H, K, NK)),
        (scores_consumer, (P, dS, idx, lse, delta, scale, sQ, sO, sK, fK, eK, eQ, turn, nwork, 0, H, K, NK)),
        (scores_consumer, (P, dS, idx, lse, delta, scale, sQ, sO, sK, fK, eK, eQ, turn, nwork, 1, H, K, NK)),
    ], [4, 4], [208, 208])


# ---------------------------------------------------------------------------------------------------------------------
# Backward, 2: dq[s, h] = sum_j dS[s, h, j] k[idx[s, j]]
#
# Work item: a query, 128 of its heads and half of the columns (256 of the latent, 32 of the rope part). Tile: 64 gathered half rows
# (36 KB) and 128 x 64 of dS (16 KB), four slots; 2 * 128 * 64 * 288 operations. Producer, and two consumers of 64 heads each with 144
# registers of accumulator per thread.

@gluon.jit
def dq_producer(latents, idx, dS, sS, sK, sR, fT, eT, s0, nwork, S, T, H: gl.constexpr, K: gl.constexpr, NS: gl.constexpr):
    r = gl.arange(0, 64, gl.SliceLayout(1, COPY))
    k = 0
    ph = 1
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        half = w % 2
        s = (w // (H // 64)).to(gl.int64)                      # H // 128 groups of heads x 2 halves
        ip = idx + s * K + r
        base = latents + ((s + s0) // S) * T * D + half * 256
        head = (w // 2).to(gl.int64) * 128 + r
        nxt = gl.load(ip)
        for t in range(K // 64):
            cur = nxt
            if t + 1 < K // 64:
                nxt = gl.load(ip + (t + 1) * 64)
            rows = base + gl.maximum(cur, 0).to(gl.int64) * D
            mbarrier.wait(eT.index(k), ph)
            fill(sS.index(2 * k), dS + head * K + t * 64, 0)
            fill(sS.index(2 * k + 1), dS + (head + 64) * K + t * 64, 0)
            fill(sK.index(k), rows, 0)
            fill(sR.index(k), rows + (LATENT - half * 224), 0)
            ac.mbarrier_arrive(fT.index(k), increment_count=False)
            k += 1
            if k == NS:
                k = 0
                ph ^= 1


@gluon.jit
def dq_consumer(dq, sS, sK, sR, fT, eT, nwork, WHO: gl.constexpr, K: gl.constexpr, NS: gl.constexpr):
    MO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    MR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    k = 0
    ph = 0
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        acc = gl.zeros([64, 256], gl.float32, MO)
        rope = gl.zeros([64, 32], gl.float32, MR)
        for t in range(K // 64):
            mbarrier.wait(fT.index(k), ph)
            fence_async_shared()
            acc = warpgroup_mma(sS.index(2 * k + WHO), sK.index(k), acc, is_async=True)
            rope = warpgroup_mma(sS.index(2 * k + WHO), sR.index(k), rope, is_async=True)
            acc, rope = warpgroup_mma_wait(0, deps=[acc, rope])
            mbarrier.arrive(eT.index(k))
            k += 1
            if k == NS:
                k = 0
                ph ^= 1
        half = w % 2
        head = (w // 2).to(gl.int64) * 128 + WHO * 64
        at = (head + gl.arange(0, 64, gl.SliceLayout(1, MO))) * D
        cols = half * 256 + gl.arange(0, 256, gl.SliceLayout(0, MO))
        gl.store(dq + gl.expand_dims(at, 1) + gl.expand_dims(cols, 0), acc.to(gl.bfloat16))
        at = (head + gl.arange(0, 64, gl.SliceLayout(1, MR))) * D
        cols = LATENT + half * 32 + gl.arange(0, 32, gl.SliceLayout(0, MR))
        gl.store(dq + gl.expand_dims(at, 1) + gl.expand_dims(cols, 0), rope.to(gl.bfloat16))


@gluon.jit
def bwd_dq(latents, idx, dS, dq, s0, nwork, S, T, H: gl.constexpr, K: gl.constexpr, NS: gl.constexpr):
    sS = gl.allocate_shared_memory(gl.bfloat16, [2 * NS, 64, 64], S128)
    sK = gl.allocate_shared_memory(gl.bfloat16, [NS, 64, 256], S128)
    sR = gl.allocate_shared_memory(gl.bfloat16, [NS, 64, 32], S64)
    fT = gl.allocate_shared_memory(gl.int64, [NS, 1], BAR)
    eT = gl.allocate_shared_memory(gl.int64, [NS, 1], BAR)
    for i in gl.static_range(NS):
        mbarrier.init(fT.index(i), count=128)
        mbarrier.init(eT.index(i), count=2)
    gl.warp_specialize([
        (dq_producer, (latents, idx, dS, sS, sK, sR, fT, eT, s0, nwork, S, T, H, K, NS)),
        (dq_consumer, (dq, sS, sK, sR, fT, eT, nwork, 0, K, NS)),
        (dq_consumer, (dq, sS, sK, sR, fT, eT, nwork, 1, K, NS)),
    ], [4, 4], [208, 208])


# ---------------------------------------------------------------------------------------------------------------------
# Backward, 3: dlatents[idx[s, j]] += sum_h dS[s, h, j] q[s, h] + [P[s, h, j] dout[s, h] | 0]
#
# Work item: a query, 128 of its heads and half of the columns: Q and dO (136 KB) stay in shared memory. Tile: 64 tokens, P and dS
# 128 x 64 (32 KB); 2 * 64 * 128 * 544 operations, 64 * 288 float32 atomics. Producer, and two consumers, one slot each, that alternate
# over the tiles: one sends its atomics while the other multiplies. Bound by the atomics: S K 576 of them at 0.95e12 per second.

@gluon.jit
def fill_pairs(dst, rows, C0: gl.constexpr):
    """fill with columns (16 b, 4 c, 2 j, 1 e) at (16 b, 8 j, 2 c, 1 e): then a wgmma thread's results are 4 consecutive columns."""
    W: gl.constexpr = dst.shape[1]
    PAIR: gl.constexpr = gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0])
    n = gl.arange(0, W, gl.SliceLayout(0, PAIR))
    cols = (n & ~15) | ((n >> 1 & 3) * 4 + (n >> 3 & 1) * 2 + (n & 1))
    cols = gl.max_contiguous(gl.multiple_of(cols, 2), 2)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, PAIR), assert_trivial=True)
    ac.async_copy_global_to_shared(dst, gl.expand_dims(gl.multiple_of(rows, 16), 1) + gl.expand_dims(cols + C0, 0))


@gluon.jit
def dl_producer(q, dout, P, dS, sQ, sR, sO, sP, sS, fQ, eQ, fT, eT, nwork, K: gl.constexpr):
    r = gl.arange(0, 128, gl.SliceLayout(1, COPY))
    ph = 1
    qp = 1
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        half = w % 2
        head = (w // 2).to(gl.int64) * 128 + r
        mbarrier.wait(eQ, qp)
        qp ^= 1
        fill_pairs(sQ, q + head * D + half * 256, 0)
        fill_pairs(sR, q + head * D + half * 32, LATENT)
        fill_pairs(sO, dout + head * LATENT + half * 256, 0)
        ac.mbarrier_arrive(fQ, increment_count=False)
        for t in range(0, K // 64, 2):
            for k in gl.static_range(2):
                mbarrier.wait(eT.index(k), ph)
                fill(sS.index(k), dS + head * K + (t + k) * 64, 0)
                fill(sP.index(k), P + head * K + (t + k) * 64, 0)
                ac.mbarrier_arrive(fT.index(k), increment_count=False)
            ph ^= 1


@gluon.jit
def add_rows(dlatents, rows, keep, x, MX: gl.constexpr):
    """dlatents[rows, :] += x by float32 atomics, 16 bytes each (columns as in fill_pairs)."""
    W: gl.constexpr = x.shape[1]
    x = gl.convert_layout(gl.reshape(gl.permute(gl.reshape(x, [64, W // 16, 2, 4, 2]), [0, 1, 3, 2, 4]), [64, W]), MX)
    rows = gl.convert_layout(rows, gl.SliceLayout(1, MX), assert_trivial=True)
    keep = gl.convert_layout(keep, gl.SliceLayout(1, MX), assert_trivial=True)
    at = gl.expand_dims(gl.multiple_of(rows, 16), 1) + gl.expand_dims(gl.arange(0, W, gl.SliceLayout(0, MX)), 0)
    gl.atomic_add(dlatents + at, x, mask=gl.expand_dims(keep, 1), sem="relaxed")


@gluon.jit
def dl_consumer(dlatents, idx, sQ, sR, sO, sP, sS, fQ, eQ, fT, eT, s0, nwork, S, T, WHO: gl.constexpr, H: gl.constexpr, K: gl.constexpr):
    MO: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16])
    MR: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16])
    r = gl.arange(0, 64, gl.SliceLayout(1, MO))
    ph = 0
    qp = 0
    for w in range(gl.program_id(0), nwork, gl.num_programs(0)):
        half = w % 2
        s = (w // (H // 64)).to(gl.int64)
        ip = idx + s * K + r
        mbarrier.wait(fQ, qp)
        qp ^= 1
        for t in range(WHO, K // 64, 2):
            i = gl.load(ip + t * 64)
            mbarrier.wait(fT.index(WHO), ph)
            ph ^= 1
            fence_async_shared()
            zero = gl.zeros([64, 256], gl.float32, MO)
            x = warpgroup_mma(sS.index(WHO).permute((1, 0)), sQ, zero, use_acc=False, is_async=True)
            x = warpgroup_mma(sP.index(WHO).permute((1, 0)), sO, x, is_async=True)
            y = warpgroup_mma(sS.index(WHO).permute((1, 0)), sR, gl.zeros([64, 32], gl.float32, MR), use_acc=False, is_async=True)
            x, y = warpgroup_mma_wait(0, deps=[x, y])
            mbarrier.arrive(eT.index(WHO))
            if t + 2 >= K // 64:
                mbarrier.arrive(eQ)
            rows = ((s + s0) // S * T + gl.maximum(i, 0)) * D
            add_rows(dlatents + half * 256, rows, i >= 0, x, BY4)
            add_rows(dlatents + LATENT + half * 32, rows, i >= 0, y, BY4_32)


@gluon.jit
def bwd_dlatents(q, dout, P, dS, idx, dlatents, s0, nwork, S, T, H: gl.constexpr, K: gl.constexpr):
    sQ = gl.allocate_shared_memory(gl.bfloat16, [128, 256], S128)
    sR = gl.allocate_shared_memory(gl.bfloat16, [128, 32], S64)
    sO = gl.allocate_shared_memory(gl.bfloat16, [128, 256], S128)
    sP = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 64], S128)
    sS = gl.allocate_shared_memory(gl.bfloat16, [2, 128, 64], S128)
    fT = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    eT = gl.allocate_shared_memory(gl.int64, [2, 1], BAR)
    fQ = gl.allocate_shared_memory(gl.int64, [1], BAR)
    eQ = gl.allocate_shared_memory(gl.int64, [1], BAR)
    for i in gl.static_range(2):
        mbarrier.init(fT.index(i), count=128)
        mbarrier.init(eT.index(i), count=1)
    mbarrier.init(fQ, count=128)
    mbarrier.init(eQ, count=2)
    gl.warp_specialize([
        (dl_producer, (q, dout, P, dS, sQ, sR, sO, sP, sS, fQ, eQ, fT, eT, nwork, K)),
        (dl_consumer, (dlatents, idx, sQ, sR, sO, sP, sS, fQ, eQ, fT, eT, s0, nwork, S, T, 0, H, K)),
        (dl_consumer, (dlatents, idx, sQ, sR, sO, sP, sS, fQ, eQ, fT, eT, s0, nwork, S, T, 1, H, K)),
    ], [4, 4], [216, 216])


# ---------------------------------------------------------------------------------------------------------------------
# Warm-up target.   p[t, s] = 1/H sum_h exp2(scale_log2 q[t, h] . k[s, h] - lse2[t, h]), of a chunk of 128-row blocks
#
# Program: 128 queries x 128 keys, all heads one after the other. Ring of NS pieces, 64 columns of a head: 128 x 64 of Q and of K (32 KB). Producer,
# and two consumers of 64 rows each: while one takes exponentials the other multiplies. 2 D operations for 4 D / 128 bytes per pair and head:
# bound by what L2 delivers (8 TB/s: 520 TFLOP/s); a tile that outgrows that would need more than 255 registers.

@gluon.jit
def target_producer(Q, K, sQ, sK, f, e, steps, sqs, sqh, skt, skh, rows, keys, C: gl.constexpr, NS: gl.constexpr):
    i = gl.arange(0, 64, gl.SliceLayout(1, COPY))
    n = gl.arange(0, 128, gl.SliceLayout(1, COPY))
    q0 = Q + gl.minimum(i, rows - 1) * sqs
    q1 = Q + gl.minimum(i + 64, rows - 1) * sqs
    k0 = K + gl.minimum(n, keys - 1) * skt
    k = 0
    ph = 1
    for t in range(steps):
        mbarrier.wait(e.index(k), ph)
        at = t // C * sqh + t % C * 64
        fill(sQ.index(2 * k), q0 + at, 0)
        fill(sQ.index(2 * k + 1), q1 + at, 0)
        fill(sK.index(k), k0 + (t // C * skh + t % C * 64), 0)
        ac.mbarrier_arrive(f.index(k), increment_count=False)
        k += 1
        if k == NS:
            k = 0
            ph ^= 1


@gluon.jit
def target_consumer(P, LSE2, sQ, sK, f, e, steps, scale_log2, S, TP, rows, inverse, WHO: gl.constexpr, C: gl.constexpr, NS: gl.constexpr):
    MS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16])
    i = WHO * 64 + gl.arange(0, 64, gl.SliceLayout(1, MS))
    p = gl.zeros([64, 128], gl.float32, MS)
    zero = gl.zeros([64, 128], gl.float32, MS)
    lse = LSE2 + gl.minimum(i, rows - 1)
    n = 0
    for h in range(steps // C):
        l = gl.load(lse)
        lse += S
        x = zero
        for c in gl.static_range(C):
            k = (n + c) % NS
            mbarrier.wait(f.index(k), ((n + c) // NS) & 1)
            fence_async_shared()
            x = warpgroup_mma(sQ.index(2 * k + WHO), sK.index(k).permute((1, 0)), x, use_acc=c > 0, is_async=True)
            if c > 0:
                x = warpgroup_mma_wait(1, deps=[x])
                mbarrier.arrive(e.index((n + c - 1) % NS))
        x = warpgroup_mma_wait(0, deps=[x])
        mbarrier.arrive(e.index((n + C - 1) % NS))
        n += C
        p += gl.exp2(x * scale_log2 - gl.expand_dims(l, 1))
    if steps > 0:
        at = gl.expand_dims(i.to(gl.int64) * TP, 1) + gl.expand_dims(gl.arange(0, 128, gl.SliceLayout(0, MS)), 0)
        gl.store(P + at, p * inverse)


@gluon.jit
def loss_target_kernel(Q, K, LSE2, P, FIRST, LAST, sqb, sqs, sqh, skb, skt, skh, scale_log2, inverse, S, T, TP, block0, BLOCKS, KEYS, H,
                       C: gl.constexpr, NS: gl.constexpr):
    pid = gl.program_id(0)
    group = pid // (8 * KEYS) * 8
    size = gl.minimum(8, BLOCKS - group)
    block = group + pid % (8 * KEYS) % size
    n0 = pid % (8 * KEYS) // size * 128
    per_batch = (S + 127) // 128
    b = ((block0 + block) // per_batch).to(gl.int64)
    i0 = (block0 + block) % per_batch * 128
    ROW: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    i = i0 + gl.arange(0, 128, ROW)
    first = gl.maximum(gl.load(FIRST + b * S + i, mask=i < S, other=0), 0)
    last = gl.minimum(gl.load(LAST + b * S + i, mask=i < S, other=-1), T - 1)
    lo = gl.min(gl.where(first <= last, first, T), 0)
    hi = gl.max(gl.where(first <= last, last + 1, 0), 0)
    steps = gl.where((lo < n0 + 128) & (hi > n0), H * C, 0)
    sQ = gl.allocate_shared_memory(gl.bfloat16, [2 * NS, 64, 64], S128)
    sK = gl.allocate_shared_memory(gl.bfloat16, [NS, 128, 64], S128)
    f = gl.allocate_shared_memory(gl.int64, [NS, 1], BAR)
    e = gl.allocate_shared_memory(gl.int64, [NS, 1], BAR)
    for s in gl.static_range(NS):
        mbarrier.init(f.index(s), count=128)
        mbarrier.init(e.index(s), count=2)
    Q += b * sqb + i0.to(gl.int64) * sqs
    K += b * skb + n0.to(gl.int64) * skt
    P += block.to(gl.int64) * 128 * TP + n0
    LSE2 += b * H * S + i0
    gl.warp_specialize([
        (target_producer, (Q, K, sQ, sK, f, e, steps, sqs, sqh, skt, skh, S - i0, T - n0, C, NS)),
        (target_consumer, (P, LSE2, sQ, sK, f, e, steps, scale_log2, S, TP, S - i0, inverse, 0, C, NS)),
        (target_consumer, (P, LSE2, sQ, sK, f, e, steps, scale_log2, S, TP, S - i0, inverse, 1, C, NS)),
    ], [4, 4], [216, 216])


@triton.jit
def bwd_delta(out, dout, delta, n, V: tl.constexpr, R: tl.constexpr):
    r = tl.program_id(0).to(tl.int64) * R + tl.arange(0, R)
    at = r[:, None] * V + tl.arange(0, V)[None, :]
    o = tl.load(out + at, mask=r[:, None] < n, other=0.).to(tl.float32)
    tl.store(delta + r, tl.sum(o * tl.load(dout + at, mask=r[:, None] < n, other=0.).to(tl.float32), 1), mask=r < n)


# ---------------------------------------------------------------------------------------------------------------------
# Launchers

def target_supported(q):
    """Whether loss_target takes these queries (B,S,H,D): bf16 on a Hopper GPU, heads of 64, 128 or 192 numbers, enough of them to fill a ring."""
    return q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and q.dtype == torch.bfloat16 and q.shape[3] in (64, 128, 192) and q.shape[2] >= 16


def loss_target(q, k, lse2, p, scale, first, last, block0, blocks):
    """p (rows,TP) float32 of `blocks` blocks of 128 rows from block0 on; q (B,S,H,D), k (B,T,H or 1,D) bf16, lse2 (B,H,S) in base 2, first, last (B,S) int32.
    Tiles that no row sees are left as they were. Deterministic."""
    (B, S, H, D), T, TP = q.shape, k.shape[1], p.shape[1]
    keys = triton.cdiv(T, 128)
    loss_target_kernel[(blocks * keys,)](q, k, lse2, p, first, last, *q.stride()[:3], *k.stride()[:2], 0 if k.shape[2] == 1 else k.stride(2), scale * LOG2E.value,
                                         1 / H, S, T, TP, block0, blocks, keys, H, D // 64, 6, num_warps=4)


def supported(q, latents, indices, value_dim):
    """Whether the kernels of this file take these arguments: bf16 on a Hopper GPU, latents 512 + 64, at least 64 heads."""
    entry = {torch.bfloat16: D.value, torch.uint8: ENTRY.value}.get(latents.dtype)
    return (q.is_cuda and torch.cuda.get_device_capability(q.device)[0] == 9 and q.dtype == torch.bfloat16 and latents.shape[-1] == entry
            and value_dim == LATENT.value and q.shape[-1] == D.value and q.shape[2] >= 64 and indices.shape[-1] > 0)


def _check(q, latents, indices):
    if q.dim() != 4 or latents.dim() != 3 or indices.dim() != 3 or indices.shape[:2] != q.shape[:2] or latents.shape[0] != q.shape[0]:
        raise ValueError(f"shapes must be q (B,S,H,{D.value}), latents (B,T,{D.value}), indices (B,S,K); got {tuple(q.shape)}, "
                         f"{tuple(latents.shape)}, {tuple(indices.shape)}")
    if not supported(q, latents, indices, LATENT.value):
        raise ValueError(f"the Hopper kernels take bf16 on an sm_90 GPU with {LATENT.value} + {ROPE.value} latents (bf16 or packed FP8) and 64 or "
                         f"more heads; got {q.dtype} {tuple(q.shape)}, {latents.dtype} {tuple(latents.shape)} on {q.device}; use the portable kernels")


def _pad(x, dim, multiple, value=0):
    """x, contiguous, with `dim` padded up to the next multiple."""
    missing = -x.shape[dim] % multiple
    if missing:
        x = torch.cat([x, x.new_full([missing if d == dim % x.dim() else n for d, n in enumerate(x.shape)], value)], dim)
    return x.contiguous()


def sparse_forward(q, latents, indices, scale):
    """q (B,S,H,576) bf16, latents (B,T,576) bf16 or the packed FP8 cache (B,T,656) uint8, indices (B,S,K) int32, -1 empty
    -> out (B,S,H,512) bf16, lse (B,S,H) float32, natural log. An FP8 entry enters as bf16(value x scale): exact for scales that are powers of two.

    Softmax over the selected tokens only; a row that selected nothing gives out 0, lse -inf. Deterministic. ValueError on other shapes or dtypes.
    """
    _check(q, latents, indices)
    B, S, H, _ = q.shape
    q, indices, latents = _pad(q, 2, 64), _pad(indices.int(), 2, 64, -1), latents.contiguous()
    HP = q.shape[2]
    out = q.new_empty(B, S, HP, LATENT.value)
    lse = q.new_empty(B, S, HP, dtype=torch.float32)
    work = B * S * HP // 64
    if work:
        fwd[(min(work, limits(q.device)[1]),)](q, latents, indices, out, lse, scale * LOG2E.value, work, S, latents.shape[1], HP, indices.shape[2],
                                               latents.dtype == torch.uint8, num_warps=4)
    return out[:, :, :H], lse[:, :, :H]


def sparse_backward(q, latents, indices, out, lse, dout, scale, scratch_bytes=2**30):
    """The gradients of sparse_forward's out: -> dq (B,S,H,576) bf16, dlatents (B,T,576) float32. lse is not differentiated.

    dq is deterministic; dlatents is summed by float32 atomics, whose order varies. Up to `scratch_bytes` hold P and dS of a chunk of queries.
    """
    _check(q, latents, indices)
    B, S, H, _ = q.shape
    T = latents.shape[1]
    q, dout, out = _pad(q, 2, 128), _pad(dout.to(q.dtype), 2, 128), _pad(out, 2, 128)
    lse, indices, latents = _pad(lse, 2, 128, float("-inf")), _pad(indices.int(), 2, 256, -1), latents.contiguous()
    HP, K = q.shape[2], indices.shape[2]
    dq = torch.empty_like(q)
    dlatents = latents.new_zeros(B, T, D.value, dtype=torch.float32)
    delta = torch.empty_like(lse)
    if not delta.numel():
        return dq[:, :, :H], dlatents
    bwd_delta[(triton.cdiv(delta.numel(), 16),)](out, dout, delta, delta.numel(), LATENT.value, 16)
    sms = limits(q.device)[1]
    chunk = max(1, scratch_bytes // (4 * HP * K))
    chunk = min(chunk - chunk % sms if chunk > sms else chunk, B * S)           # whole waves of programs
    P = q.new_empty(chunk, HP, K)
    dS = torch.empty_like(P)
    flat = [x.flatten(0, 1) for x in (q, dout, indices, lse, delta, dq)]
    for s0 in range(0, B * S, chunk):
        qc, doutc, idx, lsec, deltac, dqc = (x[s0:s0 + chunk] for x in flat)
        work = len(qc) * HP // 64
        grid = (min(work, sms),)
        bwd_scores[grid](qc, doutc, latents, idx, lsec, deltac, P, dS, scale, s0, work, S, T, HP, K, 5, num_warps=4)
        bwd_dq[grid](latents, idx, dS, dqc, s0, work, S, T, HP, K, 4, num_warps=4)
        bwd_dlatents[grid](qc, doutc, P, dS, idx, dlatents, s0, work, S, T, HP, K, num_warps=4)
    return dq[:, :, :H], dlatents
