"""Chapter 6: sparse attention, and the target of the warm-up loss, for Hopper (sm_90), in Gluon.

Plain Triton gives all warps of a program the same work, and in step with each other they leave the tensor
cores idle while latents are gathered and the softmax runs. Here every warpgroup (4 warps, 128 threads) of a
program has one role, and they meet only at barriers:

    operation        result                     warpgroups of a program
    gluon_forward    out, lse                   producer | scores | pv left | pv right
    gluon_backward   dq, dlatents               three kernels: the accumulators do not fit one register file
        1  scores    P and dS, in bf16          producer | consumer | consumer
        2  dq        dS K                       producer | consumer | consumer
        3  dlatents  dS^T Q + [P^T dO | 0]      producer | consumer | consumer
    gluon_target     p of the warm-up loss      producer | consumer | consumer

Regime: sm_90, bf16, the published latents of 512 + 64 (the forward also from the packed FP8 cache), 64 heads
and more; the target: 16 heads and more of 64, 128 or 192 dimensions. The rest is for the portable chapters.
`supported` and `target_supported` say which; that shapes fit each other is checked by the callers.

The attention kernels are persistent: one program per multiprocessor, which takes every n-th work item. An
item is 64 rows (query, head), all of one query: numbered through (B, S, H), item i begins at row 64 i.

Tiles pass from warpgroup to warpgroup through a ring of stages in shared memory: tile n lies in stage
n % STAGES, as use n // STAGES of that stage. Its writer arrives at the barrier full_x when the data is there,
its readers arrive at empty_x when they are done with it. A barrier ends a phase when as many have arrived as
it counts, and phases are told apart by one bit, 0, 1, 0, 1, ...: wait(barrier, bit) returns once the latest
phase of that bit has ended. So use u is read after wait(full_x, u & 1), and written after wait(empty_x,
u & 1 ^ 1), the phase before; on a new barrier the latter returns at once, as it should: nobody has to leave
before the first use. With two stages, tile 5 is use 2 of stage 1: its reader waits for bit 0, its writer for
bit 1. As a phase is one bit, nobody may wait for the use after next.

    barrier        who arrives            what it says
    full_left      producer               the tile's rope piece, its left piece and its tokens are there
    full_right     producer               its right piece is there
    empty_left     pv left, pv right      the left piece is read, and P, which lies in the place of rope
    empty_right    pv right               the right piece is read
    full_q         producer               the item's Q (and dO) is there
    empty_q        scores, consumers      the item's last product with it is done
    full_p         scores                 P is there, and alpha
    full_inverse   scores                 1 / l of a finished item is there
    empty_inverse  pv left, pv right      it is read
    full_piece     producer               a piece of 64 columns is there
    empty_piece    its consumers          it is read
    full_tile      producer               a tile is there
    empty_tile     its consumers          it is read
    turn           the other consumer     its products of a tile are all under way: yours may follow

`mbarrier.arrive` counts once per warpgroup, the arrival of cp.async once per thread. wgmma reads shared
memory through the async proxy: `fence_async_shared` stands between a wait, or a store, and the product.
"""
import torch
import torch.nn.functional as F
import triton
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy, fence_async_shared, mbarrier, warpgroup_mma, warpgroup_mma_wait)

from triton_kernels.common import (
    LN2, LOG2E, LOWEST_LSE, SCALE_BLOCK, launch_delta, load_bounds, multiprocessors, tile_of_program,
    token_rows, visible_range)

# ---- sizes ----

V = gl.constexpr(512)  # dimensions of a value, which is the latent,
R = gl.constexpr(64)  # of the rope part,
D = gl.constexpr(V.value + R.value)  # of a key: both
HALF = gl.constexpr(V.value // 2)  # of a latent: left, right
ENTRY = gl.constexpr(V.value + 4 * (V.value // SCALE_BLOCK.value) + 2 * R.value)  # bytes of the FP8 cache
HEADS = gl.constexpr(64)  # of a work item: the rows of a wgmma
PAIR = gl.constexpr(128)  # heads of two items, which dq and dlatents take together
PIECE = gl.constexpr(64)  # columns: 128 bytes, the widest row that wgmma reads
THREADS = gl.constexpr(128)  # of a warpgroup
LINE = gl.constexpr(128)  # bytes of a line of the caches

GROWTH = gl.constexpr(12.0)  # of a row's maximum, in log2 units, below which alpha stays 1
SLOTS = gl.constexpr(64)  # of a tile
SCORE_SLOTS = gl.constexpr(128)  # of a tile of the backward's scores
SCORE_STAGES = gl.constexpr(5)
DQ_STAGES = gl.constexpr(4)
TARGET_BLOCK = gl.constexpr(128)  # queries, and keys, of a tile of the target,
TARGET_ROWS = gl.constexpr(64)  # queries of either consumer
TARGET_STAGES = gl.constexpr(6)
TARGET_GROUP = gl.constexpr(8)  # blocks of queries side by side, so that their keys come from L2

# Registers per thread that a kernel's later warpgroups ask for; the first one keeps what is left of 65,536.
PV_REGISTERS = gl.constexpr(160)
PRODUCER_REGISTERS = gl.constexpr(56)
PRODUCER_FP8_REGISTERS = gl.constexpr(112)
SCORE_REGISTERS = gl.constexpr(208)
DQ_REGISTERS = gl.constexpr(208)
DLATENTS_REGISTERS = gl.constexpr(216)
TARGET_REGISTERS = gl.constexpr(216)

SCRATCH_BYTES = 2**30  # of P and dS in the backward

# ---- layouts in shared memory ----

SHARED_128 = gl.constexpr(gl.NVMMASharedLayout(128, 16))  # bf16 rows of 128 bytes or more, as wgmma reads
SHARED_64 = gl.constexpr(gl.NVMMASharedLayout(64, 16))  # bf16 rows of 64 bytes
SHARED_WORDS = gl.constexpr(gl.NVMMASharedLayout(128, 32))  # SHARED_128 seen as words of two bf16
SHARED_FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))  # vectors
BARRIER = gl.constexpr(mbarrier.MBarrierLayout())

# ---- layouts in registers ----

# cp.async: 8 lanes to the 128 bytes of a row, 16 bytes each
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
# the same where columns change places in pairs: 4 bytes each
COPY_PAIRS = gl.constexpr(gl.BlockedLayout([1, 2], [4, 8], [4, 1], [1, 0]))
# e4m3 in words of four: 16 bytes to a lane, so that its stores as bf16 meet no bank twice
WORDS = gl.constexpr(gl.BlockedLayout([1, 4], [8, 4], [4, 1], [1, 0]))
# lines of the entries of a tile: 8 lanes to an entry
LINES = gl.constexpr(gl.BlockedLayout([1, 1], [4, 8], [4, 1], [1, 0]))
# vectors: an element to a thread
ONE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# vectors of 64 and 128 that every warp holds whole, so that a reduction needs no barrier between warps
EVERY_WARP_64 = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
EVERY_WARP_128 = gl.constexpr(gl.BlockedLayout([4], [32], [4], [0]))

# Results of wgmma: 64 rows, by the columns of one instruction. Lane c (of every four) holds the columns
# 8 j + 2 c + e, for e = 0, 1 and all j.
WGMMA_32 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
WGMMA_64 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
WGMMA_128 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))
WGMMA_256 = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))

# The same registers with the columns renamed, so that what a lane holds leaves in 16 bytes: of every 32
# columns 8 c ... 8 c + 7 (bf16), of every 16 columns 4 c ... 4 c + 3 (float32). The lists say which (row,
# column) each bit of the register's, the lane's and the warp's number stands for.
BY_8 = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64]],
    [[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 128]))
BY_4 = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
    [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 256]))
BY_4_ROPE = gl.constexpr(gl.DistributedLinearLayout(
    [[0, 1], [0, 2], [8, 0], [0, 16]],
    [[0, 4], [0, 8], [1, 0], [2, 0], [4, 0]], [[16, 0], [32, 0]], [], [64, 32]))


@gluon.jit
def copy_rows(to, row_ptr, COLUMN: gl.constexpr):
    """cp.async of columns COLUMN, COLUMN + 1, ... of the rows at these pointers into shared memory."""
    WIDTH: gl.constexpr = to.shape[1]
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, COPY)) + COLUMN
    row_ptr = gl.expand_dims(gl.multiple_of(row_ptr, 16), 1)
    async_copy.async_copy_global_to_shared(to, row_ptr + gl.expand_dims(d, 0))


# ---- gluon_forward ----
# contract    kernels.sparse_attention; an FP8 entry enters as bf16(value x scale), exact for powers of two
# in PyTorch  x = scale * q @ k[idx].T;  out = softmax(x, -1) @ k[idx, :512]
# equation    out[t,h] = sum_j p_j k[idx_j, :512], p = softmax_j(scale q[t,h] . k[idx_j])
# tiling      an item is 64 heads of a query, a tile 64 slots in three pieces: rope (64 columns), left and
#             right (256 each). Two stages. What passes between the four warpgroups:
#
#    producer --(rope, left, right, tokens; Q)--> scores --(P, alpha; at the end 1 / l)--> pv left, pv right
#       ^                                           |                                              |
#       '----------------- empty_q -----------------'                                              |
#       '----------------- empty_left, empty_right ------------------------------------------------'
#
#             scores: S = Q K^T and the online softmax; P takes the place of the rope piece, which is of its
#             size and dead once S is there. pv: O[:, half] = alpha O[:, half] + P V[:, half], in 64 x 256
#             float32. The reference maximum moves only when a row grew more than 2^12 above it, so alpha is
#             nearly always 1, and the product with it is skipped
# FLOPs       2 S H K (D + V)
# bytes       2 D (FP8: 656) for every slot and 64 heads, from L2


@gluon.jit
def load_query(q_ptr, q_left, q_right, q_rope, full_q, empty_q, phase, item):
    """Copy the item's Q, once that of the item before is read."""
    mbarrier.wait(empty_q, phase)
    row_ptr = q_ptr + (item.to(gl.int64) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, COPY))) * D
    copy_rows(q_rope, row_ptr, V)
    copy_rows(q_left, row_ptr, 0)
    copy_rows(q_right, row_ptr, HALF)
    async_copy.mbarrier_arrive(full_q, increment_count=False)


@gluon.jit
def forward_producer(
        q_ptr, latents_ptr, indices_ptr,
        k_left, k_right, k_rope, q_left, q_right, q_rope, tokens,
        full_left, empty_left, full_right, empty_right, full_q, empty_q,
        items, S, capacity,
        H: gl.constexpr, K: gl.constexpr):
    """Gather the tiles of the selection, and the items' Q."""
    r = gl.arange(0, SLOTS, gl.SliceLayout(1, COPY))
    n = 0
    q_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        s = (item // (H // HEADS)).to(gl.int64)
        index_ptr = indices_ptr + s * K
        base_ptr = latents_ptr + (s // S) * capacity * D
        following = gl.load(index_ptr + r)
        for tile in range(K // SLOTS):
            stage = n & 1
            phase = ((n >> 1) & 1) ^ 1
            token = following
            if tile + 1 < K // SLOTS:
                following = gl.load(index_ptr + (tile + 1) * SLOTS + r)  # a tile ahead: nobody waits for it
            row_ptr = base_ptr + gl.maximum(token, 0).to(gl.int64) * D  # empty: row 0, which scores masks

            # rope, left and the tokens
            mbarrier.wait(empty_left.index(stage), phase)
            async_copy.async_copy_global_to_shared(
                tokens.index(stage), index_ptr + tile * SLOTS + gl.arange(0, SLOTS, ONE))
            copy_rows(k_rope.index(stage), row_ptr, V)
            copy_rows(k_left.index(stage), row_ptr, 0)
            async_copy.mbarrier_arrive(full_left.index(stage), increment_count=False)

            # right
            mbarrier.wait(empty_right.index(stage), phase)
            copy_rows(k_right.index(stage), row_ptr, HALF)
            async_copy.mbarrier_arrive(full_right.index(stage), increment_count=False)

            # Q, behind the item's first tile, which need not wait for the last item's products
            if tile == 0:
                load_query(q_ptr, q_left, q_right, q_rope, full_q, empty_q, q_phase, item)
                q_phase ^= 1
            n += 1


@gluon.jit
def prefetch_entries(entry_ptr):
    """Ask L2 for these entries of the cache, which would come from memory too late: 6 lines each, as they
    begin anywhere in a line."""
    line = gl.arange(0, 8, gl.SliceLayout(0, LINES)) * LINE
    at = gl.expand_dims(entry_ptr, 1) + gl.expand_dims(gl.minimum(line, ENTRY - 16), 0)
    gl.inline_asm_elementwise(
        "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [at], dtype=gl.int32, is_pure=False, pack=1)


@gluon.jit
def load_values(entry_ptr, INDEX: gl.constexpr):
    """Group INDEX of the values of these entries of the cache, four e4m3 to a word -> (64, 32), and their
    scale (64,)."""
    word = gl.arange(0, SCALE_BLOCK // 4, gl.SliceLayout(0, WORDS)) + INDEX * (SCALE_BLOCK // 4)
    scale = gl.load((entry_ptr + V).to(gl.pointer_type(gl.float32)) + INDEX)
    entry_ptr = gl.multiple_of(entry_ptr.to(gl.pointer_type(gl.int32)), 16)
    return gl.load(gl.expand_dims(entry_ptr, 1) + gl.expand_dims(word, 0)), scale


@gluon.jit
def store_values(to, words, scale, INDEX: gl.constexpr):
    """Group INDEX of the values, times its scale, as bf16 into `to`: half a tile, in words of two bf16."""
    # e4m3 -> fp16, exactly -> float32, times the scale -> bf16; the first of two neighbours in the low half
    low, high = gl.inline_asm_elementwise(
        """{
        .reg .b16 a, b, h0, h1, h2, h3;
        .reg .b32 x, y;
        .reg .f32 f0, f1, f2, f3;
        mov.b32 {a, b}, $2;
        cvt.rn.f16x2.e4m3x2 x, a;       cvt.rn.f16x2.e4m3x2 y, b;
        mov.b32 {h0, h1}, x;            mov.b32 {h2, h3}, y;
        cvt.f32.f16 f0, h0;             cvt.f32.f16 f1, h1;
        cvt.f32.f16 f2, h2;             cvt.f32.f16 f3, h3;
        mul.f32 f0, f0, $3;             mul.f32 f1, f1, $3;
        mul.f32 f2, f2, $3;             mul.f32 f3, f3, $3;
        cvt.rn.bf16x2.f32 $0, f1, f0;   cvt.rn.bf16x2.f32 $1, f3, f2;
        }""",
        "=r,=r,r,f", [words, gl.expand_dims(scale, 1)], dtype=(gl.int32, gl.int32), is_pure=True, pack=1)
    pairs = gl.reshape(gl.join(low, high), [SLOTS, SCALE_BLOCK // 2])
    to.slice((INDEX % 2) * (SCALE_BLOCK // 2), SCALE_BLOCK // 2, 1).store(pairs)


@gluon.jit
def forward_producer_fp8(
        q_ptr, cache_ptr, indices_ptr,
        k_left, k_right, k_rope, q_left, q_right, q_rope, tokens,
        full_left, empty_left, full_right, empty_right, full_q, empty_q,
        items, S, capacity,
        H: gl.constexpr, K: gl.constexpr):
    """The same from the packed cache, 512 e4m3 | 4 float32 scales | 64 bf16: e4m3 become bf16 on the way."""
    TILES: gl.constexpr = K // SLOTS
    r = gl.arange(0, SLOTS, gl.SliceLayout(1, COPY))
    r_words = gl.arange(0, SLOTS, gl.SliceLayout(1, WORDS))
    r_lines = gl.arange(0, SLOTS, gl.SliceLayout(1, LINES))
    n = 0
    q_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        s = (item // (H // HEADS)).to(gl.int64)
        index_ptr = indices_ptr + s * K
        base_ptr = cache_ptr + (s // S) * capacity * ENTRY
        second_ptr = index_ptr + gl.minimum(1, TILES - 1) * SLOTS
        token = gl.load(index_ptr + r)
        entry_ptr = base_ptr + gl.maximum(gl.load(index_ptr + r_words), 0).to(gl.int64) * ENTRY
        following = gl.load(second_ptr + r_words)
        following_line = gl.load(second_ptr + r_lines)
        even, even_scale = load_values(entry_ptr, 0)
        odd, odd_scale = load_values(entry_ptr, 1)
        for tile in range(TILES):
            stage = n & 1
            phase = ((n >> 1) & 1) ^ 1
            rope_ptr = base_ptr + gl.maximum(token, 0).to(gl.int64) * ENTRY + (ENTRY - 2 * R)
            following_ptr = base_ptr + gl.maximum(following, 0).to(gl.int64) * ENTRY

            # the next tile's entries on their way to L2, by one of the query's programs; indices a tile ahead
            if (tile + 1 < TILES) & ((H == HEADS) | (item % 2 == 0)):
                prefetch_entries(base_ptr + gl.maximum(following_line, 0).to(gl.int64) * ENTRY)
            next_ptr = index_ptr + gl.minimum(tile + 1, TILES - 1) * SLOTS  # the last tile's once more
            after_next_ptr = index_ptr + gl.minimum(tile + 2, TILES - 1) * SLOTS
            token = gl.load(next_ptr + r)
            following = gl.load(after_next_ptr + r_words)
            following_line = gl.load(after_next_ptr + r_lines)

            # rope and tokens as they are, left through registers; values are fetched two groups ahead
            mbarrier.wait(empty_left.index(stage), phase)
            async_copy.async_copy_global_to_shared(
                tokens.index(stage), index_ptr + tile * SLOTS + gl.arange(0, SLOTS, ONE))
            copy_rows(k_rope.index(stage), rope_ptr.to(gl.pointer_type(gl.bfloat16)), 0)
            async_copy.mbarrier_arrive(full_left.index(stage), increment_count=False)
            left = k_left.index(stage)._reinterpret(gl.int32, [SLOTS, HALF // 2], SHARED_WORDS)
            right = k_right.index(stage)._reinterpret(gl.int32, [SLOTS, HALF // 2], SHARED_WORDS)
            store_values(left, even, even_scale, 0)
            even, even_scale = load_values(entry_ptr, 2)
            store_values(left, odd, odd_scale, 1)
            odd, odd_scale = load_values(entry_ptr, 3)
            fence_async_shared()
            mbarrier.arrive(full_left.index(stage))

            # right
            mbarrier.wait(empty_right.index(stage), phase)
            store_values(right, even, even_scale, 2)
            even, even_scale = load_values(following_ptr, 0)
            store_values(right, odd, odd_scale, 3)
            odd, odd_scale = load_values(following_ptr, 1)
            fence_async_shared()
            mbarrier.arrive(full_right.index(stage))
            entry_ptr = following_ptr

            if tile == 0:
                load_query(q_ptr, q_left, q_right, q_rope, full_q, empty_q, q_phase, item)
                q_phase ^= 1
            n += 1


@gluon.jit
def forward_scores(
        lse_ptr, scale_log2,
        k_left, k_right, k_rope, tokens, q_left, q_right, q_rope, alpha_out, inverse,
        full_left, full_right, full_q, empty_q, full_p, full_inverse, empty_inverse,
        items,
        K: gl.constexpr):
    """S = Q K^T and the online softmax: P, alpha, 1 / l for the pv groups, and lse."""
    ROW: gl.constexpr = gl.SliceLayout(1, WGMMA_64)
    n = 0
    q_phase = 0
    inverse_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        mbarrier.wait(full_q, q_phase)
        q_phase ^= 1
        m = gl.full([HEADS], LOWEST_LSE, gl.float32, ROW)  # in log2 units
        l = gl.full([HEADS], 0.0, gl.float32, ROW)
        highest = gl.full([SLOTS], -1, gl.int32, EVERY_WARP_64)  # token selected so far
        zero = gl.zeros([HEADS, SLOTS], gl.float32, WGMMA_64)
        for tile in range(K // SLOTS):
            stage = n & 1
            phase = (n >> 1) & 1

            # S
            mbarrier.wait(full_left.index(stage), phase)
            fence_async_shared()
            logits = warpgroup_mma(
                q_rope, k_rope.index(stage).permute((1, 0)), zero, use_acc=False, is_async=True)
            logits = warpgroup_mma(q_left, k_left.index(stage).permute((1, 0)), logits, is_async=True)
            mbarrier.wait(full_right.index(stage), phase)
            fence_async_shared()
            logits = warpgroup_mma(q_right, k_right.index(stage).permute((1, 0)), logits, is_async=True)
            token = tokens.index(stage).load(EVERY_WARP_64)
            holes = gl.min(token, 0) < 0
            highest = gl.maximum(highest, token)
            logits = warpgroup_mma_wait(0, deps=[logits])
            if tile + 1 == K // SLOTS:
                mbarrier.arrive(empty_q)  # before the last softmax, under which the next Q arrives

            # the softmax so far
            if holes:
                selected = tokens.index(stage).load(gl.SliceLayout(0, WGMMA_64)) >= 0
                logits = gl.where(gl.expand_dims(selected, 0), logits, float("-inf"))
            top = gl.max(logits, 1) * scale_log2
            m_new = gl.where(top > m + GROWTH, top, m)
            alpha = gl.exp2(m - m_new)
            p = gl.exp2(logits * scale_log2 - gl.expand_dims(m_new, 1))
            m = m_new

            # P over the rope piece: Triton puts the warpgroup's own barrier between its last read and this
            k_rope.index(stage).store(p.to(gl.bfloat16))
            alpha_out.index(stage).store(alpha)
            fence_async_shared()
            mbarrier.arrive(full_p.index(stage))
            l = l * alpha + gl.sum(p, 1)
            n += 1

        # a query that selected nothing: out 0, lse -inf. Not "unless l > 0", which would hide a NaN, nor
        # "where l == 0", which would hide logits that are all -inf
        mbarrier.wait(empty_inverse, inverse_phase)
        inverse_phase ^= 1
        inverse.store(gl.where(gl.max(highest, 0) < 0, 0.0, 1.0 / l))
        mbarrier.arrive(full_inverse)
        gl.store(lse_ptr + item.to(gl.int64) * HEADS + gl.arange(0, HEADS, ROW), (m + gl.log2(l)) * LN2)


@gluon.jit
def forward_pv(
        out_ptr,
        values, p, alpha, inverse,
        empty_left, empty_right, full_p, full_inverse, empty_inverse,
        items,
        COLUMN: gl.constexpr, K: gl.constexpr):
    """O = alpha O + P V of half of the columns, those from COLUMN on."""
    # 128 columns an instruction: ptxas refuses 256, as each of 512 threads starts with 128 registers
    ROW: gl.constexpr = gl.SliceLayout(1, WGMMA_128)
    n = 0
    inverse_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        acc = gl.zeros([HEADS, HALF], gl.float32, WGMMA_128)
        for tile in range(K // SLOTS):
            stage = n & 1
            mbarrier.wait(full_p.index(stage), (n >> 1) & 1)
            if gl.max((alpha.index(stage).load(EVERY_WARP_64) != 1.0).to(gl.int32), 0) > 0:
                acc = acc * gl.expand_dims(alpha.index(stage).load(ROW), 1)
            fence_async_shared()
            acc = warpgroup_mma(p.index(stage), values.index(stage), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            mbarrier.arrive(empty_left.index(stage))
            if COLUMN > 0:
                mbarrier.arrive(empty_right.index(stage))
            n += 1

        mbarrier.wait(full_inverse, inverse_phase)
        inverse_phase ^= 1
        scale = inverse.load(ROW)
        mbarrier.arrive(empty_inverse)
        row = (item.to(gl.int64) * HEADS + gl.arange(0, HEADS, ROW)) * V
        d = gl.arange(0, HALF, gl.SliceLayout(0, WGMMA_128)) + COLUMN
        at_ptr = out_ptr + gl.expand_dims(row, 1) + gl.expand_dims(d, 0)
        gl.store(at_ptr, (acc * gl.expand_dims(scale, 1)).to(gl.bfloat16))


@gluon.jit
def gluon_forward_kernel(
        q_ptr, latents_ptr, indices_ptr, out_ptr, lse_ptr,
        scale_log2, items, S, capacity,
        H: gl.constexpr, K: gl.constexpr, FP8: gl.constexpr):
    k_left = gl.allocate_shared_memory(gl.bfloat16, [2, SLOTS, HALF], SHARED_128)
    k_right = gl.allocate_shared_memory(gl.bfloat16, [2, SLOTS, HALF], SHARED_128)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [2, SLOTS, R], SHARED_128)
    q_left = gl.allocate_shared_memory(gl.bfloat16, [HEADS, HALF], SHARED_128)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [HEADS, HALF], SHARED_128)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, R], SHARED_128)
    tokens = gl.allocate_shared_memory(gl.int32, [2, SLOTS], SHARED_FLAT)
    alpha = gl.allocate_shared_memory(gl.float32, [2, HEADS], SHARED_FLAT)
    inverse = gl.allocate_shared_memory(gl.float32, [HEADS], SHARED_FLAT)
    full_left = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_left = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full_right = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_right = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full_p = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    full_inverse = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    empty_inverse = gl.allocate_shared_memory(gl.int64, [1], BARRIER)

    # data from FP8 is stored by the producer, which arrives once, after the copies of rope and tokens
    for i in gl.static_range(2):
        mbarrier.init(full_left.index(i), count=THREADS + 1 if FP8 else THREADS)
        mbarrier.init(full_right.index(i), count=1 if FP8 else THREADS)
        mbarrier.init(empty_left.index(i), count=2)
        mbarrier.init(empty_right.index(i), count=1)
        mbarrier.init(full_p.index(i), count=1)
    mbarrier.init(full_q, count=THREADS)
    mbarrier.init(empty_q, count=1)
    mbarrier.init(full_inverse, count=1)
    mbarrier.init(empty_inverse, count=2)

    gl.warp_specialize([
        (forward_scores, (
            lse_ptr, scale_log2,
            k_left, k_right, k_rope, tokens, q_left, q_right, q_rope, alpha, inverse,
            full_left, full_right, full_q, empty_q, full_p, full_inverse, empty_inverse,
            items, K)),
        (forward_pv, (
            out_ptr,
            k_left, k_rope, alpha, inverse,
            empty_left, empty_right, full_p, full_inverse, empty_inverse,
            items, 0, K)),
        (forward_pv, (
            out_ptr,
            k_right, k_rope, alpha, inverse,
            empty_left, empty_right, full_p, full_inverse, empty_inverse,
            items, HALF, K)),
        (forward_producer_fp8 if FP8 else forward_producer, (
            q_ptr, latents_ptr, indices_ptr,
            k_left, k_right, k_rope, q_left, q_right, q_rope, tokens,
            full_left, empty_left, full_right, empty_right, full_q, empty_q,
            items, S, capacity, H, K)),
    ], [4, 4, 4], [PV_REGISTERS, PV_REGISTERS, PRODUCER_FP8_REGISTERS if FP8 else PRODUCER_REGISTERS])


def supported(q, latents, indices, value_dim):
    """Do the attention kernels take, on a Hopper GPU, q (B,S,H,D), latents (B,T,D or bytes), indices (B,S,K)?
    bf16, latents also as the packed FP8 cache, 512 + 64 dimensions, at least 64 heads, T and K not 0."""
    widths = {torch.bfloat16: D.value, torch.uint8: ENTRY.value}
    if q.dtype != torch.bfloat16 or latents.dtype not in widths:
        return False
    if value_dim != V.value or q.shape[3] != D.value or latents.shape[2] != widths[latents.dtype]:
        return False
    return q.shape[2] >= HEADS.value and latents.shape[1] > 0 and indices.shape[2] > 0


def padded(x, multiple, value=0.0):
    """x, contiguous, its dimension 2 (heads, or slots) padded to a multiple."""
    missing = -x.shape[2] % multiple
    if missing:
        x = F.pad(x, (0, 0) * (x.dim() - 3) + (0, missing), value=value)
    return x.contiguous()


def gluon_forward(q, latents, indices, scale):
    """q (B,S,H,576) bf16, latents (B,T,576) bf16 or the packed FP8 cache (B,T,656) uint8, indices (B,S,K)
    int32, -1 empty, as `supported` wants them -> out (B,S,H,512) bf16, lse (B,S,H) float32, natural
    logarithm, both contiguous. Deterministic."""
    B, S, H, _ = q.shape
    q = padded(q, HEADS.value)  # (B, S, HP, 576)
    indices = padded(indices, SLOTS.value, -1)  # (B, S, KP)
    latents, capacity = token_rows(latents)
    HP = q.shape[2]
    out = torch.empty(B, S, HP, V.value, dtype=q.dtype, device=q.device)
    lse = torch.empty(B, S, HP, dtype=torch.float32, device=q.device)
    items = B * S * HP // HEADS.value
    if items:
        gluon_forward_kernel[(min(items, multiprocessors(q.device)),)](
            q_ptr=q, latents_ptr=latents, indices_ptr=indices, out_ptr=out, lse_ptr=lse,
            scale_log2=scale * LOG2E.value, items=items, S=S, capacity=capacity,
            H=HP, K=indices.shape[2], FP8=latents.dtype == torch.uint8,
            num_warps=4)
    return out[:, :, :H].contiguous(), lse[:, :, :H].contiguous()


# ---- gluon_backward ----
# contract    kernels.sparse_attention: its gradients
# in PyTorch  p = softmax(x, -1);  ds = scale * p * (dout @ k[idx, :512].T - (out * dout).sum(-1))
#             dq = ds @ k[idx];  dlatents[idx] += ds.T @ q;  dlatents[idx, :512] += p.T @ dout
# tiling      three kernels over a chunk of queries at a time; between them P and dS lie in memory, in bf16
# FLOPs       2 S H K (3 D + 2 V)

# ---- backward, 1: scores ----
# equation    P[t,h,j] = exp(scale q[t,h] . k[idx_j] - lse[t,h]), dS = scale P (dout . v - delta),
#             delta[t,h] = sum(out dout)
# tiling      an item is 64 heads of a query; their Q and dO stay in shared memory (136 KB). A tile is 128
#             slots, which pass through the ring in pieces, 128 x 64 (16 KB): each serves S and dP and is
#             gone. The consumers take turns, one in its softmax and its stores while the other multiplies:
#             one begins when the other has seen the last piece of its tile, so that it never waits for the
#             use after next of a stage. Q and dO come piece by piece, too, with those of the item's first
#             tile. The slots of a tile lie in shared memory in an order in which a lane's results are 8
#             consecutive ones: 16-byte stores.
# FLOPs       2 S H K (D + V)
# bytes       2 D for every slot and 64 heads, from L2; 4 S H K written


@gluon.jit
def slot_of(r):
    """The slot that row r of a tile holds: of every 32, row 8 j + 2 c + e (column c of wgmma's lanes) holds
    slot 8 c + 2 j + e. Lane 0 has the rows 0, 1, 8, 9, 16, 17, 24, 25: they hold slots 0 ... 7."""
    return (r & ~31) | ((r >> 1 & 3) * 8 + (r >> 3 & 3) * 2 + (r & 1))


@gluon.jit
def in_slot_order(x):
    """(64, 128), columns as `slot_of` has them -> in the order of the slots, 8 of every 32 in a lane.
    Registers are only renamed."""
    x = gl.reshape(x, [HEADS, 4, 4, 4, 2])  # columns (32 b, 8 j, 2 c, e)
    x = gl.reshape(gl.permute(x, [0, 1, 3, 2, 4]), [HEADS, SCORE_SLOTS])  # (32 b, 8 c, 2 j, e)
    return gl.convert_layout(x, BY_8)


@gluon.jit
def scores_producer(
        q_ptr, dout_ptr, latents_ptr, indices_ptr,
        q, dout, k,
        full_piece, empty_piece, empty_q,
        first_row, items, S, T,
        H: gl.constexpr, K: gl.constexpr):
    """Gather the tiles, piece by piece, and with those of an item's first tile its Q and dO: full_piece
    speaks for all copies before it."""
    r = gl.arange(0, HEADS, gl.SliceLayout(1, COPY))
    slot = slot_of(gl.arange(0, SCORE_SLOTS, gl.SliceLayout(1, COPY)))
    stage = 0
    phase = 1
    q_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        s = (item // (H // HEADS)).to(gl.int64)
        index_ptr = indices_ptr + s * K + slot
        base_ptr = latents_ptr + ((s + first_row) // S) * T * D
        row = item.to(gl.int64) * HEADS + r
        following = gl.load(index_ptr)
        for tile in range(K // SCORE_SLOTS):
            token = following
            if tile + 1 < K // SCORE_SLOTS:
                following = gl.load(index_ptr + (tile + 1) * SCORE_SLOTS)
            row_ptr = base_ptr + gl.maximum(token, 0).to(gl.int64) * D
            for c in gl.static_range(D // PIECE):
                if tile == 0:
                    mbarrier.wait(empty_q.index(c), q_phase)
                    copy_rows(q.index(c), q_ptr + row * D, c * PIECE)
                    if c < V // PIECE:
                        copy_rows(dout.index(c), dout_ptr + row * V, c * PIECE)
                mbarrier.wait(empty_piece.index(stage), phase)
                copy_rows(k.index(stage), row_ptr, c * PIECE)
                async_copy.mbarrier_arrive(full_piece.index(stage), increment_count=False)
                stage += 1
                if stage == SCORE_STAGES:
                    stage = 0
                    phase ^= 1
        q_phase ^= 1


@gluon.jit
def scores_consumer(
        p_ptr, ds_ptr, indices_ptr, lse_ptr, delta_ptr, scale,
        q, dout, k,
        full_piece, empty_piece, empty_q, turn,
        items,
        WHO: gl.constexpr, H: gl.constexpr, K: gl.constexpr):
    """P and dS of every second tile, from tile WHO on."""
    ROW: gl.constexpr = gl.SliceLayout(1, WGMMA_128)
    PIECES: gl.constexpr = D // PIECE
    slot = slot_of(gl.arange(0, SCORE_SLOTS, gl.SliceLayout(0, WGMMA_128)))
    n = WHO * PIECES  # pieces before this tile's
    turn_phase = 1 - WHO
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        s = (item // (H // HEADS)).to(gl.int64)
        row = item.to(gl.int64) * HEADS + gl.arange(0, HEADS, ROW)
        lse2 = gl.load(lse_ptr + row) * LOG2E
        lse2 = gl.where(lse2 == float("-inf"), float("inf"), lse2)
        delta = gl.load(delta_ptr + row) * scale
        zero = gl.zeros([HEADS, SCORE_SLOTS], gl.float32, WGMMA_128)
        for tile in range(WHO, K // SCORE_SLOTS, 2):
            tile_ptr = indices_ptr + s * K + tile * SCORE_SLOTS
            holes = gl.min(gl.load(tile_ptr + gl.arange(0, SCORE_SLOTS, EVERY_WARP_128)), 0) < 0

            # S and dP, from the same pieces; a piece is given back once the next one's products are under way
            logits = zero
            dp = zero
            mbarrier.wait(turn.index(WHO), turn_phase)
            turn_phase ^= 1
            for c in gl.static_range(PIECES):
                stage = (n + c) % SCORE_STAGES
                mbarrier.wait(full_piece.index(stage), ((n + c) // SCORE_STAGES) & 1)
                fence_async_shared()
                piece = k.index(stage).permute((1, 0))
                logits = warpgroup_mma(q.index(c), piece, logits, use_acc=c > 0, is_async=True)
                if c < PIECES - 1:
                    dp = warpgroup_mma(dout.index(c), piece, dp, use_acc=c > 0, is_async=True)
                if c == PIECES - 1:
                    mbarrier.arrive(turn.index(1 - WHO))
                    logits, dp = warpgroup_mma_wait(1, deps=[logits, dp])
                elif c > 0:
                    logits, dp = warpgroup_mma_wait(2, deps=[logits, dp])
                if c > 0:
                    mbarrier.arrive(empty_piece.index((n + c - 1) % SCORE_STAGES))
                    if tile + 2 >= K // SCORE_SLOTS:
                        mbarrier.arrive(empty_q.index(c - 1))
            logits, dp = warpgroup_mma_wait(0, deps=[logits, dp])
            mbarrier.arrive(empty_piece.index((n + PIECES - 1) % SCORE_STAGES))
            if tile + 2 >= K // SCORE_SLOTS:
                mbarrier.arrive(empty_q.index(PIECES - 1))
            n += 2 * PIECES

            # P and dS
            if holes:
                logits = gl.where(gl.expand_dims(gl.load(tile_ptr + slot) >= 0, 0), logits, float("-inf"))
            p = gl.exp2(logits * (scale * LOG2E) - gl.expand_dims(lse2, 1))
            ds = p * (dp * scale - gl.expand_dims(delta, 1))
            p = in_slot_order(p.to(gl.bfloat16))
            ds = in_slot_order(ds.to(gl.bfloat16))
            at = (item.to(gl.int64) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(1, BY_8))) * K
            at = gl.expand_dims(at + tile * SCORE_SLOTS, 1)
            at = at + gl.expand_dims(gl.arange(0, SCORE_SLOTS, gl.SliceLayout(0, BY_8)), 0)
            gl.store(p_ptr + at, p)
            gl.store(ds_ptr + at, ds)


@gluon.jit
def backward_scores_kernel(
        q_ptr, dout_ptr, latents_ptr, indices_ptr, lse_ptr, delta_ptr, p_ptr, ds_ptr,
        scale, first_row, items, S, T,
        H: gl.constexpr, K: gl.constexpr):
    q = gl.allocate_shared_memory(gl.bfloat16, [D // PIECE, HEADS, PIECE], SHARED_128)
    dout = gl.allocate_shared_memory(gl.bfloat16, [V // PIECE, HEADS, PIECE], SHARED_128)
    k = gl.allocate_shared_memory(gl.bfloat16, [SCORE_STAGES, SCORE_SLOTS, PIECE], SHARED_128)
    full_piece = gl.allocate_shared_memory(gl.int64, [SCORE_STAGES, 1], BARRIER)
    empty_piece = gl.allocate_shared_memory(gl.int64, [SCORE_STAGES, 1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [D // PIECE, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)

    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(SCORE_STAGES):
        mbarrier.init(full_piece.index(i), count=THREADS)
        mbarrier.init(empty_piece.index(i), count=1)
    for i in gl.static_range(D // PIECE):
        mbarrier.init(empty_q.index(i), count=2)

    gl.warp_specialize([
        (scores_producer, (
            q_ptr, dout_ptr, latents_ptr, indices_ptr,
            q, dout, k,
            full_piece, empty_piece, empty_q,
            first_row, items, S, T, H, K)),
        (scores_consumer, (
            p_ptr, ds_ptr, indices_ptr, lse_ptr, delta_ptr, scale,
            q, dout, k,
            full_piece, empty_piece, empty_q, turn,
            items, 0, H, K)),
        (scores_consumer, (
            p_ptr, ds_ptr, indices_ptr, lse_ptr, delta_ptr, scale,
            q, dout, k,
            full_piece, empty_piece, empty_q, turn,
            items, 1, H, K)),
    ], [4, 4], [SCORE_REGISTERS, SCORE_REGISTERS])


# ---- backward, 2: dq ----
# equation    dq[t,h] = sum_j dS[t,h,j] k[idx_j]
# tiling      items 2 i and 2 i + 1 are the same 128 heads of a query and either half of the columns: 256 of
#             the latent, 32 of the rope part. A tile is 64 slots, gathered half rows (36 KB) and dS (16 KB),
#             in four stages. Each consumer has 64 heads: 144 registers of accumulator a thread
# FLOPs       2 S H K D
# bytes       2 D for every slot and 128 heads, from L2; 4 S H K, as dS is read for either half


@gluon.jit
def dq_producer(
        latents_ptr, indices_ptr, ds_ptr,
        ds, k, k_rope,
        full_tile, empty_tile,
        first_row, items, S, T,
        H: gl.constexpr, K: gl.constexpr):
    """Gather half rows of the tiles, and dS of both consumers."""
    r = gl.arange(0, SLOTS, gl.SliceLayout(1, COPY))
    stage = 0
    phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        half = item % 2
        s = (item // (H // HEADS)).to(gl.int64)  # H // 128 pairs x 2 halves
        index_ptr = indices_ptr + s * K + r
        base_ptr = latents_ptr + ((s + first_row) // S) * T * D + half * HALF
        row = (item // 2).to(gl.int64) * PAIR + r
        following = gl.load(index_ptr)
        for tile in range(K // SLOTS):
            token = following
            if tile + 1 < K // SLOTS:
                following = gl.load(index_ptr + (tile + 1) * SLOTS)
            row_ptr = base_ptr + gl.maximum(token, 0).to(gl.int64) * D
            mbarrier.wait(empty_tile.index(stage), phase)
            copy_rows(ds.index(2 * stage), ds_ptr + row * K + tile * SLOTS, 0)
            copy_rows(ds.index(2 * stage + 1), ds_ptr + (row + HEADS) * K + tile * SLOTS, 0)
            copy_rows(k.index(stage), row_ptr, 0)
            copy_rows(k_rope.index(stage), row_ptr + (V - half * (HALF - R // 2)), 0)
            async_copy.mbarrier_arrive(full_tile.index(stage), increment_count=False)
            stage += 1
            if stage == DQ_STAGES:
                stage = 0
                phase ^= 1


@gluon.jit
def dq_consumer(
        dq_ptr,
        ds, k, k_rope,
        full_tile, empty_tile,
        items,
        WHO: gl.constexpr, K: gl.constexpr):
    """dq of the heads 64 WHO ... of the item's 128."""
    stage = 0
    phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        acc = gl.zeros([HEADS, HALF], gl.float32, WGMMA_256)
        rope = gl.zeros([HEADS, R // 2], gl.float32, WGMMA_32)
        for tile in range(K // SLOTS):
            mbarrier.wait(full_tile.index(stage), phase)
            fence_async_shared()
            acc = warpgroup_mma(ds.index(2 * stage + WHO), k.index(stage), acc, is_async=True)
            rope = warpgroup_mma(ds.index(2 * stage + WHO), k_rope.index(stage), rope, is_async=True)
            acc, rope = warpgroup_mma_wait(0, deps=[acc, rope])
            mbarrier.arrive(empty_tile.index(stage))
            stage += 1
            if stage == DQ_STAGES:
                stage = 0
                phase ^= 1

        half = item % 2
        row = (item // 2).to(gl.int64) * PAIR + WHO * HEADS
        at = (row + gl.arange(0, HEADS, gl.SliceLayout(1, WGMMA_256))) * D
        d = half * HALF + gl.arange(0, HALF, gl.SliceLayout(0, WGMMA_256))
        gl.store(dq_ptr + gl.expand_dims(at, 1) + gl.expand_dims(d, 0), acc.to(gl.bfloat16))
        at = (row + gl.arange(0, HEADS, gl.SliceLayout(1, WGMMA_32))) * D
        d = V + half * (R // 2) + gl.arange(0, R // 2, gl.SliceLayout(0, WGMMA_32))
        gl.store(dq_ptr + gl.expand_dims(at, 1) + gl.expand_dims(d, 0), rope.to(gl.bfloat16))


@gluon.jit
def backward_dq_kernel(
        latents_ptr, indices_ptr, ds_ptr, dq_ptr,
        first_row, items, S, T,
        H: gl.constexpr, K: gl.constexpr):
    ds = gl.allocate_shared_memory(gl.bfloat16, [2 * DQ_STAGES, HEADS, SLOTS], SHARED_128)
    k = gl.allocate_shared_memory(gl.bfloat16, [DQ_STAGES, SLOTS, HALF], SHARED_128)
    k_rope = gl.allocate_shared_memory(gl.bfloat16, [DQ_STAGES, SLOTS, R // 2], SHARED_64)
    full_tile = gl.allocate_shared_memory(gl.int64, [DQ_STAGES, 1], BARRIER)
    empty_tile = gl.allocate_shared_memory(gl.int64, [DQ_STAGES, 1], BARRIER)

    for i in gl.static_range(DQ_STAGES):
        mbarrier.init(full_tile.index(i), count=THREADS)
        mbarrier.init(empty_tile.index(i), count=2)

    gl.warp_specialize([
        (dq_producer, (
            latents_ptr, indices_ptr, ds_ptr,
            ds, k, k_rope,
            full_tile, empty_tile,
            first_row, items, S, T, H, K)),
        (dq_consumer, (
            dq_ptr,
            ds, k, k_rope,
            full_tile, empty_tile,
            items, 0, K)),
        (dq_consumer, (
            dq_ptr,
            ds, k, k_rope,
            full_tile, empty_tile,
            items, 1, K)),
    ], [4, 4], [DQ_REGISTERS, DQ_REGISTERS])


# ---- backward, 3: dlatents ----
# equation    dlatents[idx_j] += sum_h dS[t,h,j] q[t,h] + [P[t,h,j] dout[t,h] | 0]
# tiling      items as in dq; their Q and dO stay in shared memory (136 KB). A tile is 64 slots of P and dS
#             (32 KB), one stage for each consumer; they alternate: one sends its atomics while the other
#             multiplies. All 128 heads are summed before they leave: it is bound by the atomics
# FLOPs       2 S H K (D + V)
# bytes       8 S H K, as P and dS are read for either half; D float32 atomics for every slot and 128 heads


@gluon.jit
def copy_pairs(to, row_ptr, COLUMN: gl.constexpr):
    """copy_rows with the columns in another order: of every 16, position 8 j + 2 c + e gets column 4 c + 2 j
    + e. Then lane c of wgmma's results has 4 consecutive columns: lane 0 has positions 0, 1, 8, 9, which are
    0 ... 3."""
    WIDTH: gl.constexpr = to.shape[1]
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, COPY_PAIRS))
    d = (d & ~15) | ((d >> 1 & 3) * 4 + (d >> 3 & 1) * 2 + (d & 1))
    d = gl.max_contiguous(gl.multiple_of(d, 2), 2)
    row_ptr = gl.convert_layout(row_ptr, gl.SliceLayout(1, COPY_PAIRS), assert_trivial=True)
    row_ptr = gl.expand_dims(gl.multiple_of(row_ptr, 16), 1)
    async_copy.async_copy_global_to_shared(to, row_ptr + gl.expand_dims(d + COLUMN, 0))


@gluon.jit
def dlatents_producer(
        q_ptr, dout_ptr, p_ptr, ds_ptr,
        q, q_rope, dout, p, ds,
        full_q, empty_q, full_tile, empty_tile,
        items,
        K: gl.constexpr):
    """Q and dO of an item, then its P and dS by tiles, for the consumers in turn."""
    r = gl.arange(0, PAIR, gl.SliceLayout(1, COPY))
    phase = 1
    q_phase = 1
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        half = item % 2
        row = (item // 2).to(gl.int64) * PAIR + r
        mbarrier.wait(empty_q, q_phase)
        q_phase ^= 1
        copy_pairs(q, q_ptr + row * D + half * HALF, 0)
        copy_pairs(q_rope, q_ptr + row * D + half * (R // 2), V)
        copy_pairs(dout, dout_ptr + row * V + half * HALF, 0)
        async_copy.mbarrier_arrive(full_q, increment_count=False)
        for tile in range(0, K // SLOTS, 2):
            for who in gl.static_range(2):
                mbarrier.wait(empty_tile.index(who), phase)
                copy_rows(ds.index(who), ds_ptr + row * K + (tile + who) * SLOTS, 0)
                copy_rows(p.index(who), p_ptr + row * K + (tile + who) * SLOTS, 0)
                async_copy.mbarrier_arrive(full_tile.index(who), increment_count=False)
            phase ^= 1


@gluon.jit
def add_rows(to_ptr, row, keep, x, LAYOUT: gl.constexpr):
    """to_ptr[row, ...] += x (64, n), columns as copy_pairs left them, by float32 atomics of 16 bytes."""
    WIDTH: gl.constexpr = x.shape[1]
    x = gl.reshape(x, [SLOTS, WIDTH // 16, 2, 4, 2])  # columns (16 b, 8 j, 2 c, e)
    x = gl.reshape(gl.permute(x, [0, 1, 3, 2, 4]), [SLOTS, WIDTH])  # (16 b, 4 c, 2 j, e)
    x = gl.convert_layout(x, LAYOUT)
    row = gl.convert_layout(row, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    keep = gl.convert_layout(keep, gl.SliceLayout(1, LAYOUT), assert_trivial=True)
    d = gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    at = gl.expand_dims(gl.multiple_of(row, 16), 1) + gl.expand_dims(d, 0)
    gl.atomic_add(to_ptr + at, x, mask=gl.expand_dims(keep, 1), sem="relaxed")


@gluon.jit
def dlatents_consumer(
        dlatents_ptr, indices_ptr,
        q, q_rope, dout, p, ds,
        full_q, empty_q, full_tile, empty_tile,
        first_row, items, S, T,
        WHO: gl.constexpr, H: gl.constexpr, K: gl.constexpr):
    """Gradients of every second tile, from tile WHO on."""
    r = gl.arange(0, SLOTS, gl.SliceLayout(1, WGMMA_256))
    phase = 0
    q_phase = 0
    for item in range(gl.program_id(0), items, gl.num_programs(0)):
        half = item % 2
        s = (item // (H // HEADS)).to(gl.int64)
        index_ptr = indices_ptr + s * K + r
        mbarrier.wait(full_q, q_phase)
        q_phase ^= 1
        for tile in range(WHO, K // SLOTS, 2):
            token = gl.load(index_ptr + tile * SLOTS)

            # the products
            mbarrier.wait(full_tile.index(WHO), phase)
            phase ^= 1
            fence_async_shared()
            ds_t = ds.index(WHO).permute((1, 0))
            p_t = p.index(WHO).permute((1, 0))
            zero = gl.zeros([SLOTS, HALF], gl.float32, WGMMA_256)
            x = warpgroup_mma(ds_t, q, zero, use_acc=False, is_async=True)
            x = warpgroup_mma(p_t, dout, x, is_async=True)
            zero = gl.zeros([SLOTS, R // 2], gl.float32, WGMMA_32)
            rope = warpgroup_mma(ds_t, q_rope, zero, use_acc=False, is_async=True)
            x, rope = warpgroup_mma_wait(0, deps=[x, rope])
            mbarrier.arrive(empty_tile.index(WHO))
            if tile + 2 >= K // SLOTS:
                mbarrier.arrive(empty_q)

            # the atomics
            row = ((s + first_row) // S * T + gl.maximum(token, 0)) * D
            add_rows(dlatents_ptr + half * HALF, row, token >= 0, x, BY_4)
            add_rows(dlatents_ptr + V + half * (R // 2), row, token >= 0, rope, BY_4_ROPE)


@gluon.jit
def backward_dlatents_kernel(
        q_ptr, dout_ptr, p_ptr, ds_ptr, indices_ptr, dlatents_ptr,
        first_row, items, S, T,
        H: gl.constexpr, K: gl.constexpr):
    q = gl.allocate_shared_memory(gl.bfloat16, [PAIR, HALF], SHARED_128)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [PAIR, R // 2], SHARED_64)
    dout = gl.allocate_shared_memory(gl.bfloat16, [PAIR, HALF], SHARED_128)
    p = gl.allocate_shared_memory(gl.bfloat16, [2, PAIR, SLOTS], SHARED_128)
    ds = gl.allocate_shared_memory(gl.bfloat16, [2, PAIR, SLOTS], SHARED_128)
    full_tile = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    empty_tile = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    full_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    empty_q = gl.allocate_shared_memory(gl.int64, [1], BARRIER)

    for i in gl.static_range(2):
        mbarrier.init(full_tile.index(i), count=THREADS)
        mbarrier.init(empty_tile.index(i), count=1)
    mbarrier.init(full_q, count=THREADS)
    mbarrier.init(empty_q, count=2)

    gl.warp_specialize([
        (dlatents_producer, (
            q_ptr, dout_ptr, p_ptr, ds_ptr,
            q, q_rope, dout, p, ds,
            full_q, empty_q, full_tile, empty_tile,
            items, K)),
        (dlatents_consumer, (
            dlatents_ptr, indices_ptr,
            q, q_rope, dout, p, ds,
            full_q, empty_q, full_tile, empty_tile,
            first_row, items, S, T, 0, H, K)),
        (dlatents_consumer, (
            dlatents_ptr, indices_ptr,
            q, q_rope, dout, p, ds,
            full_q, empty_q, full_tile, empty_tile,
            first_row, items, S, T, 1, H, K)),
    ], [4, 4], [DLATENTS_REGISTERS, DLATENTS_REGISTERS])


def gluon_backward(q, latents, indices, out, lse, dout, scale, scratch_bytes=SCRATCH_BYTES):
    """The gradients of gluon_forward's out, bf16 latents only: its arguments and results, dout (B,S,H,512)
    bf16
    -> dq (B,S,H,576) bf16, dlatents (B,T,576) float32, both contiguous. lse is not differentiated.

    dq is deterministic; dlatents is summed by float32 atomics, whose order varies. Up to `scratch_bytes` hold
    P and dS of a chunk of queries."""
    B, S, H, _ = q.shape
    T = latents.shape[1]
    q = padded(q, PAIR.value)  # (B, S, HP, 576)
    out = padded(out, PAIR.value)  # (B, S, HP, 512)
    dout = padded(dout, PAIR.value)  # (B, S, HP, 512)
    lse = padded(lse, PAIR.value, float("-inf"))  # (B, S, HP)
    indices = padded(indices, 2 * SCORE_SLOTS.value, -1)  # (B, S, KP): whole tiles for either consumer
    latents = latents.contiguous()
    HP = q.shape[2]
    K = indices.shape[2]
    dq = torch.empty_like(q)
    dlatents = torch.zeros(B, T, D.value, dtype=torch.float32, device=q.device)
    delta, _ = launch_delta(out, dout)  # (B, S, HP)

    # a chunk of queries at a time, in whole waves of programs
    programs = multiprocessors(q.device)
    chunk = scratch_bytes // (4 * HP * K)
    if chunk > programs:
        chunk -= chunk % programs
    chunk = max(1, min(chunk, B * S))
    p = torch.empty(chunk, HP, K, dtype=q.dtype, device=q.device)
    ds = torch.empty_like(p)
    for first_row in range(0, B * S, chunk):
        rows = slice(first_row, first_row + chunk)
        q_rows = q.flatten(0, 1)[rows]  # (chunk, HP, 576)
        dout_rows = dout.flatten(0, 1)[rows]  # (chunk, HP, 512)
        indices_rows = indices.flatten(0, 1)[rows]  # (chunk, K)
        items = len(q_rows) * HP // HEADS.value
        grid = (min(items, programs),)
        backward_scores_kernel[grid](
            q_ptr=q_rows, dout_ptr=dout_rows, latents_ptr=latents, indices_ptr=indices_rows,
            lse_ptr=lse.flatten(0, 1)[rows], delta_ptr=delta.flatten(0, 1)[rows], p_ptr=p, ds_ptr=ds,
            scale=scale, first_row=first_row, items=items, S=S, T=T,
            H=HP, K=K,
            num_warps=4)
        backward_dq_kernel[grid](
            latents_ptr=latents, indices_ptr=indices_rows, ds_ptr=ds, dq_ptr=dq.flatten(0, 1)[rows],
            first_row=first_row, items=items, S=S, T=T,
            H=HP, K=K,
            num_warps=4)
        backward_dlatents_kernel[grid](
            q_ptr=q_rows, dout_ptr=dout_rows, p_ptr=p, ds_ptr=ds, indices_ptr=indices_rows,
            dlatents_ptr=dlatents,
            first_row=first_row, items=items, S=S, T=T,
            H=HP, K=K,
            num_warps=4)
    return dq[:, :, :H].contiguous(), dlatents


# ---- gluon_target ----
# contract    p of the warm-up loss (kernels.indexer_loss_dense), of a chunk of blocks of 128 queries
# in PyTorch  p = torch.exp2(scale * LOG2E * q @ k.T - lse2).mean(heads)
# equation    p[t,s] = 1 / H sum_h exp(scale q[t,h] . k[s,h] - lse[t,h])
# tiling      a program takes 128 queries x 128 keys, all heads one after the other, in pieces of 64 columns
#             of a head: 128 x 64 of Q and of K (32 KB), six stages. Each consumer has 64 queries: while one
#             takes exponentials the other multiplies. It is bound by what L2 delivers; a tile that outgrows
#             that would need more than 255 registers a thread
# FLOPs       2 H D per pair
# bytes       H D / 32 per pair, from L2; 4 written


@gluon.jit
def target_producer(
        q_ptr, k_ptr,
        q, k,
        full_piece, empty_piece,
        pieces, stride_qs, stride_qh, stride_kt, stride_kh, queries, keys,
        PIECES: gl.constexpr):
    """The pieces of all heads; rows beyond the last repeat it."""
    i = gl.arange(0, TARGET_ROWS, gl.SliceLayout(1, COPY))
    t = gl.arange(0, TARGET_BLOCK, gl.SliceLayout(1, COPY))
    upper_ptr = q_ptr + gl.minimum(i, queries - 1) * stride_qs
    lower_ptr = q_ptr + gl.minimum(i + TARGET_ROWS, queries - 1) * stride_qs
    key_ptr = k_ptr + gl.minimum(t, keys - 1) * stride_kt
    stage = 0
    phase = 1
    for n in range(pieces):
        mbarrier.wait(empty_piece.index(stage), phase)
        at = n // PIECES * stride_qh + n % PIECES * PIECE
        copy_rows(q.index(2 * stage), upper_ptr + at, 0)
        copy_rows(q.index(2 * stage + 1), lower_ptr + at, 0)
        copy_rows(k.index(stage), key_ptr + (n // PIECES * stride_kh + n % PIECES * PIECE), 0)
        async_copy.mbarrier_arrive(full_piece.index(stage), increment_count=False)
        stage += 1
        if stage == TARGET_STAGES:
            stage = 0
            phase ^= 1


@gluon.jit
def target_consumer(
        p_ptr, lse2_ptr,
        q, k,
        full_piece, empty_piece,
        pieces, scale_log2, S, width, queries, inverse,
        WHO: gl.constexpr, PIECES: gl.constexpr):
    """p of the queries 64 WHO ... of the block; without pieces it leaves p as it is."""
    i = WHO * TARGET_ROWS + gl.arange(0, TARGET_ROWS, gl.SliceLayout(1, WGMMA_128))
    p = gl.zeros([TARGET_ROWS, TARGET_BLOCK], gl.float32, WGMMA_128)
    zero = gl.zeros([TARGET_ROWS, TARGET_BLOCK], gl.float32, WGMMA_128)
    row_ptr = lse2_ptr + gl.minimum(i, queries - 1)
    n = 0
    for h in range(pieces // PIECES):
        lse2 = gl.load(row_ptr)
        row_ptr += S
        logits = zero
        for c in gl.static_range(PIECES):
            stage = (n + c) % TARGET_STAGES
            mbarrier.wait(full_piece.index(stage), ((n + c) // TARGET_STAGES) & 1)
            fence_async_shared()
            logits = warpgroup_mma(
                q.index(2 * stage + WHO), k.index(stage).permute((1, 0)), logits, use_acc=c > 0,
                is_async=True)
            if c > 0:
                logits = warpgroup_mma_wait(1, deps=[logits])
                mbarrier.arrive(empty_piece.index((n + c - 1) % TARGET_STAGES))
        logits = warpgroup_mma_wait(0, deps=[logits])
        mbarrier.arrive(empty_piece.index((n + PIECES - 1) % TARGET_STAGES))
        n += PIECES
        p += gl.exp2(logits * scale_log2 - gl.expand_dims(lse2, 1))
    if pieces > 0:
        at = gl.expand_dims(i.to(gl.int64) * width, 1)
        at = at + gl.expand_dims(gl.arange(0, TARGET_BLOCK, gl.SliceLayout(0, WGMMA_128)), 0)
        gl.store(p_ptr + at, p * inverse)


@gluon.jit
def gluon_target_kernel(
        q_ptr, k_ptr, lse2_ptr, p_ptr, first_ptr, last_ptr,
        scale_log2, inverse, S, T, width, H, first_block, blocks, key_blocks,
        stride_qb, stride_qs, stride_qh, stride_kb, stride_kt, stride_kh,
        PIECES: gl.constexpr):
    # this program's tile: block of queries `block` of the chunk, keys from t0 on
    block, b, s0, t0 = tile_of_program(
        S, first_block, blocks, key_blocks, TARGET_BLOCK, TARGET_BLOCK, TARGET_GROUP)
    b = b.to(gl.int64)

    # nothing to do where none of its queries sees one of its keys
    s = s0 + gl.arange(0, TARGET_BLOCK, ONE)
    first, last = load_bounds(first_ptr, last_ptr, b, s, S, T)
    lo, hi = visible_range(first, last, T)
    pieces = gl.where((lo < t0 + TARGET_BLOCK) & (hi > t0), H * PIECES, 0)

    q = gl.allocate_shared_memory(gl.bfloat16, [2 * TARGET_STAGES, TARGET_ROWS, PIECE], SHARED_128)
    k = gl.allocate_shared_memory(gl.bfloat16, [TARGET_STAGES, TARGET_BLOCK, PIECE], SHARED_128)
    full_piece = gl.allocate_shared_memory(gl.int64, [TARGET_STAGES, 1], BARRIER)
    empty_piece = gl.allocate_shared_memory(gl.int64, [TARGET_STAGES, 1], BARRIER)
    for i in gl.static_range(TARGET_STAGES):
        mbarrier.init(full_piece.index(i), count=THREADS)
        mbarrier.init(empty_piece.index(i), count=2)

    q_ptr += b * stride_qb + s0.to(gl.int64) * stride_qs
    k_ptr += b * stride_kb + t0.to(gl.int64) * stride_kt
    p_ptr += block.to(gl.int64) * TARGET_BLOCK * width + t0
    lse2_ptr += b * H * S + s0
    gl.warp_specialize([
        (target_producer, (
            q_ptr, k_ptr,
            q, k,
            full_piece, empty_piece,
            pieces, stride_qs, stride_qh, stride_kt, stride_kh, S - s0, T - t0, PIECES)),
        (target_consumer, (
            p_ptr, lse2_ptr,
            q, k,
            full_piece, empty_piece,
            pieces, scale_log2, S, width, S - s0, inverse, 0, PIECES)),
        (target_consumer, (
            p_ptr, lse2_ptr,
            q, k,
            full_piece, empty_piece,
            pieces, scale_log2, S, width, S - s0, inverse, 1, PIECES)),
    ], [4, 4], [TARGET_REGISTERS, TARGET_REGISTERS])


def target_supported(q):
    """Does gluon_target take, on a Hopper GPU, these queries (B,S,H,D)? bf16, heads of 64, 128 or 192
    dimensions, and 16 of them or more, enough to fill the ring."""
    return q.dtype == torch.bfloat16 and q.shape[3] in (64, 128, 192) and q.shape[2] >= 16


def gluon_target(q, k, lse2, p, scale, first, last, first_block, blocks):
    """Write p (128 blocks,width) float32 of `blocks` blocks of 128 queries from first_block on, as
    target_supported wants them. Blocks are numbered through the sequences, each of which begins a new one;
    width is T rounded up to 128.

    q (B,S,H,D), k (B,T,H or 1,D) bf16, last dimension contiguous, lse2 (B,H,S) float32 contiguous, in base 2;
    first, last (B,S) int32 contiguous, the visible range, or None: 0 and T - S + i. Tiles that no query sees
    are left as they were. Deterministic."""
    _, S, H, D = q.shape
    T = k.shape[1]
    key_blocks = triton.cdiv(T, TARGET_BLOCK.value)
    stride_qb, stride_qs, stride_qh, _ = q.stride()
    stride_kb, stride_kt, stride_kh, _ = k.stride()
    if k.shape[2] == 1:
        stride_kh = 0
    gluon_target_kernel[(blocks * key_blocks,)](
        q_ptr=q, k_ptr=k, lse2_ptr=lse2, p_ptr=p, first_ptr=first, last_ptr=last,
        scale_log2=scale * LOG2E.value, inverse=1 / H, S=S, T=T, width=p.shape[1], H=H,
        first_block=first_block, blocks=blocks, key_blocks=key_blocks,
        stride_qb=stride_qb, stride_qs=stride_qs, stride_qh=stride_qh,
        stride_kb=stride_kb, stride_kt=stride_kt, stride_kh=stride_kh,
        PIECES=D // PIECE.value,
        num_warps=4)
