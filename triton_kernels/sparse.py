"""Chapter 3: sparse attention. With few heads a block of neighbouring queries shares the union of its
selections: one gathered latent serves all rows (query, head) of the block, and a bit per query masks what
that query did not select. The backward is three matrix products over the same lists.
"""
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from triton_kernels.common import (
    BELOW_A100, LN2, LOG2E, SCALE_BLOCK, check_indices, e4m3_to_fp16, fit, has_fp8, is_hopper,
    launch_combine, launch_delta, matmul, multiprocessors, operation, power_of_two, shared_memory,
    token_rows)

LOWEST_LOGIT = tl.constexpr(-1e38)  # where a running maximum starts; finite, so that no inf - inf arises
HIGHEST_TOKEN = tl.constexpr(2147483647)  # where a running minimum of tokens starts
SHARED_ROWS = 64  # rows (query, head) that share a list: 64 // H queries
MOST_SHARING = 31  # queries that share a list, a bit of an int32 each
FEW_QUERIES = 8  # up to so many (decoding) read their own lists: no kernel runs before the attention
SMALL_VALUE = 128  # dimensions of a value; up to here q, dout and dq of 64 rows stay in registers together
MEDIUM_VALUE = 256  # up to here the output of 64 rows does, on four warps
LARGE_VALUE = 512  # up to here a tile of 64 latents fits into the memory of a data-centre GPU twice
FEW_HEADS = 16  # up to here a tile of rows of one query is the smallest that a product takes
SOME_HEADS = 32  # up to here half a tile of 64 rows holds all heads
MANY_HEADS = 64  # beyond, the backward holds 128 rows at a time
SCORES_BYTES = 2**30  # of P and dS that the backward holds at a time
UNION_PROGRAMS = 2112  # of the union's kernel at most: 16 per multiprocessor of an H100
UNION_PROGRAMS_LEAST = 16
UNION_SCRATCH = 2**27  # words of scratch memory of all these programs: 512 MB, which 1M tokens need
UNION_SHORT_ROW = 4096  # words of a scratch row, up to which small tiles are faster
UNION_PAD = 128  # entries without bits behind each list, for tiles that reach beyond its end
P_SCALE = tl.constexpr(256.0)  # brings P times a scale near the largest of 128 values: fp16 keeps its digits


# ---- union ----
# contract    `union`
# in PyTorch  per block of queries: torch.unique(selections of the block), and who selected each token
# equation    list = union of S_t over the queries t of the block, ascending; bit i of an entry: query i chose
# tiling      persistent programs, a block at a time; a scratch row holds BLOCK_S bits per token, in words of
#             32 // BLOCK_S tokens: scatter the selections into the row, compact the words that are not zero,
#             expand these into tokens
# bytes       4 S K read, 8 per entry written; of the row T / (32 // BLOCK_S) words per block scanned, in L2

class SharedLists(NamedTuple):
    """What the blocks of neighbouring queries selected; see `union`."""
    tokens: Tensor  # (B * blocks, width) int32, or the indices themselves, (B, S, K)
    bits: Tensor  # who selected them: int32 of the same shape, or the indices again
    length: Tensor | None  # (B * blocks,) int32; None: all lists are as wide as the selection


@triton.jit
def union_kernel(
        indices_ptr, scratch_ptr, words_ptr, lists_ptr, bits_ptr, length_ptr,
        S, K, blocks, total, row_words, width,
        BLOCK_S: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_W: tl.constexpr,
        BLOCK_E: tl.constexpr, PAD: tl.constexpr):
    PER_WORD: tl.constexpr = 32 // BLOCK_S  # tokens
    program = tl.program_id(0)
    scratch_row_ptr = scratch_ptr + program.to(tl.int64) * row_words
    # words that are not zero: `width` places for their positions, then as many for the words
    found_ptr = words_ptr + program.to(tl.int64) * 2 * width
    k = tl.arange(0, BLOCK_K)
    w = tl.arange(0, BLOCK_W)
    e = tl.arange(0, BLOCK_E)
    g = tl.arange(0, BLOCK_T)
    for step in range(tl.cdiv(total - program, tl.num_programs(0))):
        block = program + step * tl.num_programs(0)

        # scatter: set the bit of every (token, query)
        low = HIGHEST_TOKEN
        high = -1
        s = (block % blocks) * BLOCK_S
        for i in range(tl.minimum(BLOCK_S, S - s)):
            selection_ptr = indices_ptr + ((block // blocks).to(tl.int64) * S + s + i) * K
            for j in range(0, K, BLOCK_K):
                t = tl.load(selection_ptr + j + k, mask=j + k < K, other=-1)
                bit = 1 << (t % PER_WORD * BLOCK_S + i)
                tl.atomic_or(scratch_row_ptr + t // PER_WORD, bit, mask=t >= 0, sem="relaxed")
                low = tl.minimum(low, tl.min(tl.where(t < 0, HIGHEST_TOKEN, t)))
                high = tl.maximum(high, tl.max(t))
        tl.debug_barrier()

        # compact: the words that are not zero, and zeros in their place for the next block
        count = 0
        for j in range(low // PER_WORD, high // PER_WORD + 1, BLOCK_W):
            word = tl.load(
                scratch_row_ptr + j + w, mask=j + w <= high // PER_WORD, other=0, cache_modifier=".cg")
            hit = (word != 0).to(tl.int32)
            to_ptr = found_ptr + count + tl.cumsum(hit, 0) - 1
            tl.store(to_ptr, j + w, mask=word != 0)
            tl.store(to_ptr + width, word, mask=word != 0)
            tl.store(scratch_row_ptr + j + w, 0, mask=word != 0)
            count += tl.sum(hit, 0)
        tl.debug_barrier()

        # expand: a word into its tokens
        out = block.to(tl.int64) * width
        length = 0
        for j in range(0, count, BLOCK_E):
            first = tl.load(found_ptr + j + e, mask=j + e < count, other=0, cache_modifier=".cg") * PER_WORD
            word = tl.load(found_ptr + width + j + e, mask=j + e < count, other=0, cache_modifier=".cg")
            bits = (word[:, None] >> (g * BLOCK_S)[None, :]) & ((1 << BLOCK_S) - 1)
            bits = tl.where(g[None, :] < PER_WORD, bits, 0)
            hit = (bits != 0).to(tl.int32)
            hits = tl.sum(hit, 1)
            to = out + length + (tl.cumsum(hits, 0) - hits)[:, None] + tl.cumsum(hit, 1) - 1
            tl.store(lists_ptr + to, first[:, None] + g[None, :], mask=bits != 0)
            tl.store(bits_ptr + to, bits, mask=bits != 0)
            length += tl.sum(hits, 0)

        # the last token again, without bits
        pad = tl.arange(0, PAD)
        tl.store(lists_ptr + out + length + pad, high + tl.zeros([PAD], tl.int32))
        tl.store(bits_ptr + out + length + pad, tl.zeros([PAD], tl.int32))
        tl.store(length_ptr + block, length)
        tl.debug_barrier()


@triton.jit
def selection_length_kernel(indices_ptr, length_ptr, K, BLOCK_K: tl.constexpr):
    """A block of one query needs no union, only where its list ends."""
    row = tl.program_id(0)
    last = -1
    for j in range(0, K, BLOCK_K):
        k = j + tl.arange(0, BLOCK_K)
        t = tl.load(indices_ptr + row.to(tl.int64) * K + k, mask=k < K, other=-1)
        last = tl.maximum(last, tl.max(tl.where(t < 0, -1, k)))
    tl.store(length_ptr + row, last + 1)


def union(indices, T, block_s):
    """indices (B,S,K) contiguous int32 of tokens below T, K at least 1, block_s 1..31 -> SharedLists of the
    B * ceil(S / block_s) blocks of block_s neighbouring queries.

    tokens[b, :length[b]] ascend, bit i of bits[b, u] says that query i of the block chose tokens[b, u];
    UNION_PAD entries follow that repeat the last token without bits. block_s = 1: tokens and bits are the
    indices themselves, length is that of a list up to its last token; `union_tokens` reads both. No
    host synchronisation, hence memory for the longest lists, 8 bytes for each of S * K entries, and scratch:
    of bits some T block_s / 8 bytes and of words 8 * width for each program (UNION_PROGRAMS at most), at most
    512 MB of either in all, or what UNION_PROGRAMS_LEAST take."""
    B, S, K = indices.shape
    blocks = triton.cdiv(S, block_s)
    int32 = dict(dtype=torch.int32, device=indices.device)
    length = torch.empty(B * blocks, **int32)
    block_k = min(1024, power_of_two(K, 1))
    if block_s == 1:
        selection_length_kernel[(B * S,)](
            indices_ptr=indices, length_ptr=length,
            K=K,
            BLOCK_K=block_k)
        return SharedLists(indices, indices, length)

    width = triton.cdiv(min(block_s * K, T), UNION_PAD) * UNION_PAD + UNION_PAD
    row_words = triton.cdiv(T, 32 // block_s)
    block_w, block_e = (512, 128) if row_words <= UNION_SHORT_ROW else (1024, 256)
    room = UNION_SCRATCH // max(row_words, 2 * width)
    programs = min(B * blocks, UNION_PROGRAMS, max(UNION_PROGRAMS_LEAST, room))
    lists = torch.empty(B * blocks, width, **int32)
    bits = torch.empty(B * blocks, width, **int32)
    words = torch.empty(programs, 2, width, **int32)
    scratch = torch.zeros(programs, row_words, **int32)
    union_kernel[(programs,)](
        indices_ptr=indices, scratch_ptr=scratch, words_ptr=words,
        lists_ptr=lists, bits_ptr=bits, length_ptr=length,
        S=S, K=K, blocks=blocks, total=B * blocks, row_words=row_words, width=width,
        BLOCK_S=block_s, BLOCK_T=power_of_two(32 // block_s, 1), BLOCK_K=block_k, BLOCK_W=block_w,
        BLOCK_E=block_e, PAD=UNION_PAD,
        num_warps=4)
    return SharedLists(lists, bits, length)


# ---- how kernels read lists ----

@triton.jit
def union_length(length_ptr, block, width):
    """Entries of a block's list; without lengths all lists are as wide as the selection."""
    if length_ptr is None:
        length = width
    else:
        length = tl.load(length_ptr + block)
    return length


@triton.jit
def union_tokens(
        lists_ptr, bits_ptr, start, j, length,
        BLOCK_S: tl.constexpr, BLOCK_U: tl.constexpr, spare=None):
    """Entries j ... j + BLOCK_U of the list at `start` -> token, bits. An entry without bits, which nobody
    chose, is a token that may be read all the same: beyond the end of a list its last token, in an empty slot
    `spare` or token 0."""
    u = j + tl.arange(0, BLOCK_U)
    if BLOCK_S == 1:
        t = tl.load(lists_ptr + start + tl.minimum(u, length - 1))
        bits = ((t >= 0) & (u < length)).to(tl.int32)
        if spare is None:
            t = tl.maximum(t, 0)
        else:
            t = tl.where(t < 0, spare, t)
    else:
        t = tl.load(lists_ptr + start + u)
        bits = tl.load(bits_ptr + start + u)
    return t, bits


@triton.jit
def selected_token(lists_ptr, start, width, BLOCK_U: tl.constexpr):
    """One of the tokens of a selection (the first slot's, unless that is empty), -1 if there is none."""
    token = tl.load(lists_ptr + start)
    if token < 0:
        for j in range(0, width, BLOCK_U):
            u = j + tl.arange(0, BLOCK_U)
            token = tl.maximum(token, tl.max(tl.load(lists_ptr + start + u, mask=u < width, other=-1)))
    return token


@triton.jit
def block_rows(
        block, group, S, H, blocks,
        BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_N: tl.constexpr):
    """Rows of a program: BLOCK_S queries x BLOCK_H heads, filled up to BLOCK_N -> query within the block, row
    number in (B,S,H), is it real. Rows that fill up belong to query 31, which no block has: bits are shifted
    by it, and what a shift by 32 gives is undefined."""
    n = tl.arange(0, BLOCK_N)
    i = n // BLOCK_H
    h = group * BLOCK_H + n % BLOCK_H
    s = block % blocks * BLOCK_S + i
    row = ((block // blocks).to(tl.int64) * S + s) * H + h
    return tl.minimum(i, 31), row, (i < BLOCK_S) & (s < S) & (h < H)


class Rows(NamedTuple):
    """How the rows (query, head) of a (B,S,H) are laid out in programs."""
    block_h: int  # heads of a program
    groups: int  # programs for all heads
    block_s: int  # queries of a block
    blocks: int  # of a sequence


def sharing_queries(H, dtype):
    """-> how many queries may share a list: one in float32, whose tiles are small."""
    return 1 if dtype == torch.float32 else max(1, min(SHARED_ROWS // H, MOST_SHARING))


def share_rows(S, H, block_n, queries):
    """-> Rows of tiles of block_n rows, where up to so many queries may share a list."""
    block_h = min(H, block_n)
    block_s = min(queries, S, block_n // block_h)
    return Rows(block_h, triton.cdiv(H, block_h), block_s, triton.cdiv(S, block_s))


def list_parts(programs, tiles, device):
    """-> parts per list, so that few queries still fill the GPU; at least two tiles each."""
    return max(1, min(tiles // 2, multiprocessors(device) // programs))


def part_buffers(parts, out, lse):
    """-> where the parts of lists leave their results: out and lse themselves if there is one."""
    if parts == 1:
        return out, lse
    part = out.new_empty(parts, *out.shape, dtype=torch.float32)
    return part, lse.new_empty(parts, *lse.shape)


def pad_columns(x, V, BLOCK_V, BLOCK_R):
    """Columns [V | rest] of x -> [BLOCK_V | BLOCK_R], zeros between."""
    R = x.shape[-1] - V
    if (V, R) == (BLOCK_V, BLOCK_R):
        return x
    values = F.pad(x[..., :V], (0, BLOCK_V - V))
    rope = F.pad(x[..., V:], (0, BLOCK_R - R))
    return torch.cat((values, rope), -1)


def crop_columns(x, V, R, BLOCK_V):
    """The inverse of `pad_columns`."""
    if x.shape[-1] == V + R:
        return x
    return torch.cat((x[..., :V], x[..., BLOCK_V:BLOCK_V + R]), -1)


def nothing_selected(q, V):
    """-> out (B,S,H,V) and lse (B,S,H) of queries without a token."""
    return q.new_zeros(*q.shape[:3], V), q.new_full(q.shape[:3], float("-inf"), dtype=torch.float32)


def hopper_chapter(q, latents, indices, V):
    """triton_kernels.hopper where its kernels take these arguments, else None."""
    if not is_hopper(q):
        return None
    from triton_kernels import hopper
    return hopper if hopper.supported(q, latents, indices, V) else None


# ---- sparse_attention ----
# contract    kernels.sparse_attention
# in PyTorch  sparse_attn.sparse_attention
# equation    out[t] = sum_{s in S_t} softmax_s(scale q_t . c_s) c_s[:V]   (eq. 2)
# tiling      a program per block and group of heads, BLOCK_N rows (query, head), or, where queries are few,
#             one for each part of the list; online softmax over tiles of BLOCK_U gathered latents, each used
#             twice: the scores take all columns, the values the first V
# FLOPs       2 S H K (D + V) counted, U / K times as many done
# bytes       2 U D gathered per block, from L2

@triton.jit
def flash_kernel(
        q_ptr, latents_ptr, lists_ptr, bits_ptr, length_ptr, out_ptr, lse_ptr,
        scale_log2, S, capacity, H, blocks, width, rows, parts,
        BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, V: tl.constexpr, R: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    D: tl.constexpr = V + R
    block = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    i, row, ok = block_rows(block, group, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
    v = tl.arange(0, V)
    r = tl.arange(0, R)
    q = tl.load(q_ptr + row[:, None] * D + v[None, :], mask=ok[:, None], other=0.0)
    q_rope = tl.load(q_ptr + row[:, None] * D + V + r[None, :], mask=ok[:, None], other=0.0)

    # online softmax over this part of the list
    m = tl.full([BLOCK_N], LOWEST_LOGIT, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    acc = tl.zeros([BLOCK_N, V], tl.float32)
    length = union_length(length_ptr, block, width)
    start = block.to(tl.int64) * width
    spare = None
    if length_ptr is None:  # empty slots must not stand for a token that nobody selected
        spare = selected_token(lists_ptr, start, width, BLOCK_U)
        length = tl.where(spare < 0, 0, length)
    share = tl.cdiv(tl.cdiv(length, BLOCK_U), parts) * BLOCK_U
    sequence_ptr = latents_ptr + (block // blocks).to(tl.int64) * capacity * D
    for j in tl.range(part * share, tl.minimum(length, (part + 1) * share), BLOCK_U, num_stages=NUM_STAGES):
        t, bits = union_tokens(lists_ptr, bits_ptr, start, j, length, BLOCK_S, BLOCK_U, spare)
        token_ptr = sequence_ptr + t[:, None].to(tl.int64) * D
        k = tl.load(token_ptr + v[None, :])
        k_rope = tl.load(token_ptr + V + r[None, :])
        logits = matmul(q, tl.trans(k))
        logits = matmul(q_rope, tl.trans(k_rope), logits)
        logits = tl.where(((bits[None, :] >> i[:, None]) & 1) != 0, logits * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(logits, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(logits - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        acc = matmul(p.to(k.dtype), k, acc * alpha[:, None])

    # rows once more: kept through the loop, their addresses would cost 40 registers
    block += tl.minimum(length, 0)  # 0, which the compiler cannot know
    _, row, ok = block_rows(block, group, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
    row += part.to(tl.int64) * rows
    empty = l == 0  # nothing selected; not: "unless l > 0", which would hide a NaN
    l = tl.where(empty, 1.0, l)
    out = acc / l[:, None]
    tl.store(out_ptr + row[:, None] * V + v[None, :], out.to(out_ptr.dtype.element_ty), mask=ok[:, None])
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2), mask=ok)


class FlashTiles(NamedTuple):
    """Of flash_kernel."""
    block_n: int  # rows
    block_u: int  # tokens
    num_stages: int
    num_warps: int
    maxnreg: int | None  # registers of a thread


def is_blackwell(device):
    """Is this a GPU of sm_100 or newer?"""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 10


def flash_tiles(H, V, dtype, device):
    """FlashTiles for H heads and values of V columns."""
    if dtype == torch.float32 or V > LARGE_VALUE:
        return FlashTiles(block_n=16, block_u=16, num_stages=1, num_warps=4, maxnreg=None)
    if shared_memory(device) > BELOW_A100:
        if V <= MEDIUM_VALUE:
            maxnreg = 168 if V <= SMALL_VALUE else None  # three programs per multiprocessor
            return FlashTiles(block_n=64, block_u=64, num_stages=3, num_warps=4, maxnreg=maxnreg)
        if H <= SOME_HEADS:
            return FlashTiles(block_n=32, block_u=64, num_stages=2, num_warps=4, maxnreg=None)
        if is_blackwell(device):  # compiled for sm_100, tiles of 64 x 64 take 353 KB of shared memory
            return FlashTiles(block_n=64, block_u=32, num_stages=3, num_warps=8, maxnreg=None)
        return FlashTiles(block_n=64, block_u=64, num_stages=2, num_warps=8, maxnreg=None)
    if V <= SMALL_VALUE:
        return FlashTiles(block_n=64, block_u=64, num_stages=2, num_warps=4, maxnreg=None)
    if V <= MEDIUM_VALUE:
        return FlashTiles(block_n=32, block_u=32, num_stages=2, num_warps=4, maxnreg=None)
    return FlashTiles(block_n=16, block_u=32, num_stages=1, num_warps=4, maxnreg=None)


@operation("sparse_attention")
def sparse_attention_operation(
        q: Tensor, latents: Tensor, indices: Tensor, scale: float,
        value_dim: int) -> tuple[Tensor, Tensor]:
    """Latents in q's dtype -> out (B,S,H,value_dim), lse (B,S,H) float32."""
    B, S, H, D = q.shape
    T = latents.shape[1]
    K = indices.shape[2]
    if B * S * H * T * K == 0:
        return nothing_selected(q, value_dim)
    q = q.contiguous()
    indices = indices.contiguous()
    hopper = hopper_chapter(q, latents, indices, value_dim)
    if hopper is not None:
        out, lse = hopper.gluon_forward(q, latents, indices, scale)
        return out.contiguous(), lse.contiguous()

    # odd sizes
    V = power_of_two(value_dim)
    R = power_of_two(D - value_dim)
    q = pad_columns(q, value_dim, V, R)  # (B, S, H, V + R)
    latents, capacity = token_rows(pad_columns(latents, value_dim, V, R))  # (B, T, V + R)

    # lists, and how many programs work at each
    tiles = flash_tiles(H, V, q.dtype, q.device)
    if S > FEW_QUERIES:
        rows = share_rows(S, H, tiles.block_n, sharing_queries(H, q.dtype))
        shared = union(indices, T, rows.block_s)
    else:
        rows = share_rows(S, H, tiles.block_n, 1)
        shared = SharedLists(indices, indices, None)
    parts = list_parts(B * rows.blocks * rows.groups, triton.cdiv(K, tiles.block_u), q.device)

    out = q.new_empty(B, S, H, V)
    lse = q.new_empty(B, S, H, dtype=torch.float32)
    part, part_lse = part_buffers(parts, out, lse)
    flash_kernel[(B * rows.blocks, rows.groups, parts)](
        q_ptr=q, latents_ptr=latents, lists_ptr=shared.tokens, bits_ptr=shared.bits, length_ptr=shared.length,
        out_ptr=part, lse_ptr=part_lse,
        scale_log2=scale * LOG2E.value, S=S, capacity=capacity, H=H, blocks=rows.blocks,
        width=shared.tokens.shape[-1], rows=B * S * H, parts=parts,
        BLOCK_H=rows.block_h, BLOCK_S=rows.block_s, V=V, R=R,
        BLOCK_N=min(tiles.block_n, power_of_two(rows.block_h * rows.block_s)), BLOCK_U=tiles.block_u,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps, maxnreg=tiles.maxnreg)
    if parts > 1:
        launch_combine(part, part_lse, out, lse)
    return out[..., :value_dim].contiguous(), lse


@sparse_attention_operation.register_fake
def _(q, latents, indices, scale, value_dim):
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, value_dim), q.new_empty(B, S, H, dtype=torch.float32)


# ---- sparse_attention, backward ----
# equation    P = exp(scale q . c - lse),  dP = dout . c[:V],  dS = scale P (dP - delta),  delta = out . dout
#             dq = dS c,  dlatents = dS^T q, with P^T dout added to its first V columns
# tiling      fused   where q, dout and dq of a block fit on chip together (up to SMALL_VALUE): a program per
#                     block loops over the list once, dq in registers, values in two halves; a tile of
#                     dlatents leaves as float32 atomics
#             else a kernel for each product:
#             score   a program per tile of BLOCK_U tokens x BLOCK_N rows streams columns of q, dout and
#                     gathered latents like a plain matrix product and writes P and dS
#             query   a program per BLOCK_N rows x BLOCK_V columns loops over the list (second gather), dq in
#                     registers
#             latent  a program per block and BLOCK_V columns, or all if they fit, loops over the list;
#                     atomics as above, without a gather
# FLOPs       2 S H K (3 D + 2 V) counted, U / K times as many done
# bytes       U D atomics per block (an H200 does at most 0.95 T/s; without them the fused kernel takes 12%
#             less); of three kernels P and dS, 4 BLOCK_N bytes per entry, SCORES_BYTES at a time at most

@triton.jit
def fused_kernel(
        q_ptr, latents_ptr, lists_ptr, bits_ptr, length_ptr, dout_ptr, lse_ptr, delta_ptr,
        dq_ptr, dlatents_ptr,
        scale, scale_log2, S, T, H, blocks, width,
        BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    D: tl.constexpr = V + R
    HALF: tl.constexpr = V // 2  # whole values would spill registers
    block = tl.program_id(0)
    group = tl.program_id(1)
    i, row, ok = block_rows(block, group, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
    v = tl.arange(0, HALF)
    r = tl.arange(0, R)
    q0 = tl.load(q_ptr + row[:, None] * D + v[None, :], mask=ok[:, None], other=0.0)
    q1 = tl.load(q_ptr + row[:, None] * D + HALF + v[None, :], mask=ok[:, None], other=0.0)
    q_rope = tl.load(q_ptr + row[:, None] * D + V + r[None, :], mask=ok[:, None], other=0.0)
    dout0 = tl.load(dout_ptr + row[:, None] * V + v[None, :], mask=ok[:, None], other=0.0)
    dout1 = tl.load(dout_ptr + row[:, None] * V + HALF + v[None, :], mask=ok[:, None], other=0.0)
    delta = tl.load(delta_ptr + row, mask=ok, other=0.0)
    lse = tl.load(lse_ptr + row, mask=ok, other=float("-inf")) * LOG2E
    lse = tl.where(lse == float("-inf"), float("inf"), lse)  # nothing selected: P = 0

    acc0 = tl.zeros([BLOCK_N, HALF], tl.float32)
    acc1 = tl.zeros([BLOCK_N, HALF], tl.float32)
    acc_rope = tl.zeros([BLOCK_N, R], tl.float32)
    length = union_length(length_ptr, block, width)
    start = block.to(tl.int64) * width
    first_token = (block // blocks).to(tl.int64) * T
    for j in tl.range(0, length, BLOCK_U, num_stages=NUM_STAGES):
        t, bits = union_tokens(lists_ptr, bits_ptr, start, j, length, BLOCK_S, BLOCK_U)
        offset = (first_token + t)[:, None] * D
        k0 = tl.load(latents_ptr + offset + v[None, :])
        k1 = tl.load(latents_ptr + offset + HALF + v[None, :])
        k_rope = tl.load(latents_ptr + offset + V + r[None, :])

        # P and dS
        logits = matmul(q0, tl.trans(k0))
        logits = matmul(q1, tl.trans(k1), logits)
        logits = matmul(q_rope, tl.trans(k_rope), logits)
        dp = matmul(dout0, tl.trans(k0))
        dp = matmul(dout1, tl.trans(k1), dp)
        chosen = ((bits[None, :] >> i[:, None]) & 1) != 0
        p = tl.where(chosen, tl.exp2(logits * scale_log2 - lse[:, None]), 0.0)
        ds = (p * (dp - delta[:, None]) * scale).to(k0.dtype)
        p = p.to(k0.dtype)

        # dq stays here, dlatents leaves
        acc0 = matmul(ds, k0, acc0)
        acc1 = matmul(ds, k1, acc1)
        acc_rope = matmul(ds, k_rope, acc_rope)
        used = (bits != 0)[:, None]
        x = matmul(tl.trans(p), dout0, matmul(tl.trans(ds), q0))
        tl.atomic_add(dlatents_ptr + offset + v[None, :], x, mask=used, sem="relaxed")
        x = matmul(tl.trans(p), dout1, matmul(tl.trans(ds), q1))
        tl.atomic_add(dlatents_ptr + offset + HALF + v[None, :], x, mask=used, sem="relaxed")
        x = matmul(tl.trans(ds), q_rope)
        tl.atomic_add(dlatents_ptr + offset + V + r[None, :], x, mask=used, sem="relaxed")

    # rows once more, as in the forward
    block += tl.minimum(length, 0)
    _, row, ok = block_rows(block, group, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
    dq_row = dq_ptr + row[:, None] * D
    tl.store(dq_row + v[None, :], acc0.to(dq_ptr.dtype.element_ty), mask=ok[:, None])
    tl.store(dq_row + HALF + v[None, :], acc1.to(dq_ptr.dtype.element_ty), mask=ok[:, None])
    tl.store(dq_row + V + r[None, :], acc_rope.to(dq_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["first_block"])
def score_kernel(
        q_ptr, latents_ptr, lists_ptr, bits_ptr, length_ptr, dout_ptr, lse_ptr, delta_ptr, p_ptr, ds_ptr,
        scale, scale_log2, first_block, S, T, H, blocks, width, token_tiles,
        GROUPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
        BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    D: tl.constexpr = V + R
    local = tl.program_id(0) // token_tiles  # block and group of heads, counted within this chunk of blocks
    tile = tl.program_id(0) % token_tiles
    j = tile * BLOCK_U
    block = first_block + local // GROUPS
    length = union_length(length_ptr, block, width)
    if j < length:
        i, row, ok = block_rows(block, local % GROUPS, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
        t, bits = union_tokens(lists_ptr, bits_ptr, block.to(tl.int64) * width, j, length, BLOCK_S, BLOCK_U)
        token = (block // blocks).to(tl.int64) * T + t
        v = tl.arange(0, BLOCK_V)
        r = tl.arange(0, R)
        q_row = q_ptr + row[:, None] * D
        dout_row = dout_ptr + row[:, None] * V
        token_ptr = latents_ptr + token[:, None] * D

        # q . c and dout . c[:V], tokens first: they fill the rows of the tile
        q_rope = tl.load(q_row + V + r[None, :], mask=ok[:, None], other=0.0)
        k_rope = tl.load(token_ptr + V + r[None, :])
        logits = matmul(k_rope, tl.trans(q_rope))
        dp = tl.zeros([BLOCK_U, BLOCK_N], tl.float32)
        for column in tl.range(0, V, BLOCK_V, num_stages=NUM_STAGES):
            k = tl.load(token_ptr + column + v[None, :])
            q = tl.load(q_row + column + v[None, :], mask=ok[:, None], other=0.0)
            logits = matmul(k, tl.trans(q), logits)
            dout = tl.load(dout_row + column + v[None, :], mask=ok[:, None], other=0.0)
            dp = matmul(k, tl.trans(dout), dp)

        # P and dS
        chosen = ((bits[:, None] >> i[None, :]) & 1) != 0
        u = j + tl.arange(0, BLOCK_U)
        n = tl.arange(0, BLOCK_N)
        to = (local.to(tl.int64) * width + u)[:, None] * BLOCK_N + n[None, :]
        real = (u < length)[:, None]
        lse = tl.load(lse_ptr + row, mask=ok, other=float("-inf")) * LOG2E
        lse = tl.where(lse == float("-inf"), float("inf"), lse)  # nothing selected: P = 0
        p = tl.where(chosen, tl.exp2(logits * scale_log2 - lse[None, :]), 0.0)
        ds = p * (dp - tl.load(delta_ptr + row, mask=ok, other=0.0)[None, :]) * scale
        tl.store(ds_ptr + to, ds.to(ds_ptr.dtype.element_ty), mask=real)
        tl.store(p_ptr + to, p.to(p_ptr.dtype.element_ty), mask=real)


@triton.jit
def query_columns(
        latents_ptr, lists_ptr, bits_ptr, ds_ptr, dq_ptr,
        row, ok, start, ds_start, first_token, length, column,
        BLOCK_S: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    """dq = dS c of one block, columns column ... column + COLUMNS"""
    d = column + tl.arange(0, COLUMNS)
    n = tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_N, COLUMNS], tl.float32)
    for j in tl.range(0, length, BLOCK_U, num_stages=NUM_STAGES):
        t, _ = union_tokens(lists_ptr, bits_ptr, start, j, length, BLOCK_S, BLOCK_U)
        u = j + tl.arange(0, BLOCK_U)
        ds_row = ds_ptr + (ds_start + u)[:, None] * BLOCK_N
        ds = tl.load(ds_row + n[None, :], mask=(u < length)[:, None], other=0.0)
        k = tl.load(latents_ptr + (first_token + t)[:, None] * D + d[None, :])
        acc = matmul(tl.trans(ds), k, acc)
    tl.store(dq_ptr + row[:, None] * D + d[None, :], acc.to(dq_ptr.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["first_block"])
def query_kernel(
        latents_ptr, lists_ptr, bits_ptr, length_ptr, ds_ptr, dq_ptr,
        first_block, S, T, H, blocks, width,
        GROUPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
        BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    CHUNKS: tl.constexpr = V // BLOCK_V + 1  # the last has the rope columns
    local = tl.program_id(0) // CHUNKS
    column_chunk = tl.program_id(0) % CHUNKS
    block = first_block + local // GROUPS
    _, row, ok = block_rows(block, local % GROUPS, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
    length = union_length(length_ptr, block, width)
    start = block.to(tl.int64) * width
    ds_start = local.to(tl.int64) * width
    first_token = (block // blocks).to(tl.int64) * T
    if column_chunk < V // BLOCK_V:
        query_columns(
            latents_ptr, lists_ptr, bits_ptr, ds_ptr, dq_ptr,
            row, ok, start, ds_start, first_token, length, column_chunk * BLOCK_V,
            BLOCK_S, V + R, BLOCK_V, BLOCK_N, BLOCK_U, NUM_STAGES)
    else:
        query_columns(
            latents_ptr, lists_ptr, bits_ptr, ds_ptr, dq_ptr,
            row, ok, start, ds_start, first_token, length, V,
            BLOCK_S, V + R, R, BLOCK_N, BLOCK_U, NUM_STAGES)


@triton.jit
def latent_columns(
        q_ptr, dout_ptr, lists_ptr, bits_ptr, p_ptr, ds_ptr, dlatents_ptr,
        row, ok, start, p_start, first_token, length, column,
        BLOCK_S: tl.constexpr, V: tl.constexpr, R: tl.constexpr, COLUMNS: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr, VALUES: tl.constexpr, ROPE: tl.constexpr):
    """dlatents of one block, columns column ... column + COLUMNS. VALUES: they belong to values; ROPE: and
    the last R columns, too."""
    D: tl.constexpr = V + R
    d = column + tl.arange(0, COLUMNS)
    n = tl.arange(0, BLOCK_N)
    q = tl.load(q_ptr + row[:, None] * D + d[None, :], mask=ok[:, None], other=0.0)
    if ROPE:
        r = V + tl.arange(0, R)
        q_rope = tl.load(q_ptr + row[:, None] * D + r[None, :], mask=ok[:, None], other=0.0)
    if VALUES:
        dout = tl.load(dout_ptr + row[:, None] * V + d[None, :], mask=ok[:, None], other=0.0)
    for j in tl.range(0, length, BLOCK_U, num_stages=NUM_STAGES):
        t, bits = union_tokens(lists_ptr, bits_ptr, start, j, length, BLOCK_S, BLOCK_U)
        u = j + tl.arange(0, BLOCK_U)
        at = (p_start + u)[:, None] * BLOCK_N + n[None, :]
        real = (u < length)[:, None]
        ds = tl.load(ds_ptr + at, mask=real, other=0.0, eviction_policy="evict_first")
        token_ptr = dlatents_ptr + (first_token + t)[:, None] * D
        x = matmul(ds, q)  # (BLOCK_U, COLUMNS)
        if VALUES:
            p = tl.load(p_ptr + at, mask=real, other=0.0, eviction_policy="evict_first")
            x = matmul(p, dout, x)
        chosen = (bits != 0)[:, None]
        tl.atomic_add(token_ptr + d[None, :], x, mask=chosen, sem="relaxed")
        if ROPE:
            tl.atomic_add(token_ptr + r[None, :], matmul(ds, q_rope), mask=chosen, sem="relaxed")


@triton.jit(do_not_specialize=["first_block"])
def latent_kernel(
        q_ptr, dout_ptr, lists_ptr, bits_ptr, length_ptr, p_ptr, ds_ptr, dlatents_ptr,
        first_block, S, T, H, blocks, width,
        GROUPS: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_S: tl.constexpr, V: tl.constexpr, R: tl.constexpr,
        BLOCK_V: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr, NUM_STAGES: tl.constexpr):
    CHUNKS: tl.constexpr = V // BLOCK_V
    PROGRAMS: tl.constexpr = CHUNKS + (CHUNKS > 1)  # one takes all columns, or one more the rope part
    local = tl.program_id(0) // PROGRAMS
    column_chunk = tl.program_id(0) % PROGRAMS
    block = first_block + local // GROUPS
    _, row, ok = block_rows(block, local % GROUPS, S, H, blocks, BLOCK_H, BLOCK_S, BLOCK_N)
    length = union_length(length_ptr, block, width)
    start = block.to(tl.int64) * width
    p_start = local.to(tl.int64) * width
    first_token = (block // blocks).to(tl.int64) * T
    if column_chunk < CHUNKS:
        latent_columns(
            q_ptr, dout_ptr, lists_ptr, bits_ptr, p_ptr, ds_ptr, dlatents_ptr,
            row, ok, start, p_start, first_token, length, column_chunk * BLOCK_V,
            BLOCK_S, V, R, BLOCK_V, BLOCK_N, BLOCK_U, NUM_STAGES, True, CHUNKS == 1)
    else:
        latent_columns(
            q_ptr, dout_ptr, lists_ptr, bits_ptr, p_ptr, ds_ptr, dlatents_ptr,
            row, ok, start, p_start, first_token, length, V,
            BLOCK_S, V, R, R, BLOCK_N, BLOCK_U, NUM_STAGES, False, False)


class FusedTiles(NamedTuple):
    """Of fused_kernel."""
    block_u: int  # tokens
    num_stages: int
    num_warps: int


class ProductTiles(NamedTuple):
    """Of score_kernel, query_kernel or latent_kernel."""
    block_v: int  # columns
    block_u: int  # tokens
    num_stages: int
    num_warps: int


def backward_rows(H, dtype, device):
    """-> rows (query, head) of a tile, the same in all kernels of launch_products, which share P and dS."""
    if dtype == torch.float32:
        return 16
    return 128 if shared_memory(device) > BELOW_A100 and H > MANY_HEADS else 64


def fused_tiles(V, dtype, device):
    """-> FusedTiles, or None where each product takes a kernel. Half of less than 32 columns is no tile of a
    product."""
    if dtype == torch.float32 or not 32 <= V <= SMALL_VALUE or shared_memory(device) <= BELOW_A100:
        return None
    return FusedTiles(block_u=64, num_stages=2, num_warps=4)


def score_tiles(H, V, dtype, device):
    """ProductTiles of score_kernel, for H heads and values of V columns."""
    if dtype == torch.float32:
        return ProductTiles(block_v=min(32, V), block_u=16, num_stages=1, num_warps=4)
    if shared_memory(device) > BELOW_A100:
        num_warps = 8 if H > MANY_HEADS else 4
        return ProductTiles(block_v=min(32, V), block_u=128, num_stages=4, num_warps=num_warps)
    return ProductTiles(block_v=min(32, V), block_u=64, num_stages=3, num_warps=4)


def query_tiles(V, dtype, device):
    """ProductTiles of query_kernel."""
    if dtype == torch.float32:
        return ProductTiles(block_v=min(32, V), block_u=16, num_stages=1, num_warps=4)
    if shared_memory(device) > BELOW_A100:
        return ProductTiles(block_v=min(128, V), block_u=64, num_stages=3, num_warps=4)
    return ProductTiles(block_v=min(128, V), block_u=32, num_stages=2, num_warps=4)


def latent_tiles(V, dtype, device):
    """ProductTiles of latent_kernel."""
    if dtype == torch.float32:
        return ProductTiles(block_v=min(32, V), block_u=16, num_stages=1, num_warps=4)
    if shared_memory(device) > BELOW_A100:
        return ProductTiles(block_v=min(128, V), block_u=64, num_stages=3, num_warps=4)
    return ProductTiles(block_v=min(64, V), block_u=32, num_stages=2, num_warps=4)


def launch_fused(tiles, q, latents, indices, lse, delta, dout, scale, dq, dlatents):
    """Padded q (B,S,H,V+R), latents (B,T,V+R), dout (B,S,H,V) -> into dq, and added to dlatents (float32)."""
    B, S, H, D = q.shape
    T = latents.shape[1]
    V = dout.shape[-1]
    rows = share_rows(S, H, SHARED_ROWS, sharing_queries(H, q.dtype))
    shared = union(indices, T, rows.block_s)
    fused_kernel[(B * rows.blocks, rows.groups)](
        q_ptr=q, latents_ptr=latents,
        lists_ptr=shared.tokens, bits_ptr=shared.bits, length_ptr=shared.length,
        dout_ptr=dout, lse_ptr=lse, delta_ptr=delta, dq_ptr=dq, dlatents_ptr=dlatents,
        scale=scale, scale_log2=scale * LOG2E.value, S=S, T=T, H=H, blocks=rows.blocks,
        width=shared.tokens.shape[-1],
        BLOCK_H=rows.block_h, BLOCK_S=rows.block_s, V=V, R=D - V, BLOCK_N=SHARED_ROWS,
        BLOCK_U=tiles.block_u, NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)


def launch_products(q, latents, indices, lse, delta, dout, scale, dq, dlatents):
    """The same by a kernel for each product."""
    B, S, H, D = q.shape
    T = latents.shape[1]
    V = dout.shape[-1]

    # lists, and room for P and dS of some blocks
    block_n = backward_rows(H, q.dtype, q.device)
    rows = share_rows(S, H, block_n, sharing_queries(H, q.dtype))
    shared = union(indices, T, rows.block_s)
    width = shared.tokens.shape[-1]
    total = B * rows.blocks
    chunk = max(1, min(total, SCORES_BYTES // (2 * rows.groups * width * block_n * q.element_size())))
    p = q.new_empty(chunk, rows.groups, width, block_n)
    ds = torch.empty_like(p)

    pointers = dict(lists_ptr=shared.tokens, bits_ptr=shared.bits, length_ptr=shared.length)
    sizes = dict(S=S, T=T, H=H, blocks=rows.blocks, width=width)
    constants = dict(
        GROUPS=rows.groups, BLOCK_H=rows.block_h, BLOCK_S=rows.block_s, V=V, R=D - V, BLOCK_N=block_n)
    score = score_tiles(H, V, q.dtype, q.device)
    query = query_tiles(V, q.dtype, q.device)
    latent = latent_tiles(V, q.dtype, q.device)
    token_tiles = triton.cdiv(width, score.block_u)
    column_chunks = V // latent.block_v
    for first_block in range(0, total, chunk):
        programs = min(chunk, total - first_block) * rows.groups
        score_kernel[(programs * token_tiles,)](
            **pointers, q_ptr=q, latents_ptr=latents, dout_ptr=dout, lse_ptr=lse, delta_ptr=delta,
            p_ptr=p, ds_ptr=ds,
            **sizes, scale=scale, scale_log2=scale * LOG2E.value, first_block=first_block,
            token_tiles=token_tiles,
            **constants, BLOCK_V=score.block_v, BLOCK_U=score.block_u, NUM_STAGES=score.num_stages,
            num_warps=score.num_warps)
        query_kernel[(programs * (V // query.block_v + 1),)](
            **pointers, latents_ptr=latents, ds_ptr=ds, dq_ptr=dq,
            **sizes, first_block=first_block,
            **constants, BLOCK_V=query.block_v, BLOCK_U=query.block_u, NUM_STAGES=query.num_stages,
            num_warps=query.num_warps)
        latent_kernel[(programs * (column_chunks + (column_chunks > 1)),)](
            **pointers, q_ptr=q, dout_ptr=dout, p_ptr=p, ds_ptr=ds, dlatents_ptr=dlatents,
            **sizes, first_block=first_block,
            **constants, BLOCK_V=latent.block_v, BLOCK_U=latent.block_u, NUM_STAGES=latent.num_stages,
            num_warps=latent.num_warps)


@operation("sparse_attention_backward")
def sparse_attention_backward(
        q: Tensor, latents: Tensor, indices: Tensor, out: Tensor, lse: Tensor, dout: Tensor,
        scale: float) -> tuple[Tensor, Tensor]:
    """What went into the operation and came out of it, and the gradient of out -> dq, dlatents in q's dtype,
    which is latents', too."""
    B, S, H, D = q.shape
    T = latents.shape[1]
    value_dim = out.shape[-1]
    if B * S * H * T * indices.shape[2] == 0:
        return q.new_zeros(q.shape), latents.new_zeros(latents.shape)
    q = q.contiguous()
    latents = latents.contiguous()
    indices = indices.contiguous()
    dout = dout.contiguous()
    hopper = hopper_chapter(q, latents, indices, value_dim)
    if hopper is not None:
        dq, dlatents = hopper.gluon_backward(q, latents, indices, out, lse, dout, scale)
        return dq.contiguous(), dlatents.to(q.dtype)
    delta, _ = launch_delta(out, dout)  # (B, S, H)

    # odd sizes
    V = power_of_two(value_dim)
    R = power_of_two(D - value_dim)
    q = pad_columns(q, value_dim, V, R)  # (B, S, H, V + R)
    dout = pad_columns(dout, value_dim, V, 0)  # (B, S, H, V)
    latents = pad_columns(latents, value_dim, V, R)  # (B, T, V + R)
    dq = torch.empty_like(q)
    dlatents = torch.zeros_like(latents, dtype=torch.float32)

    tiles = fused_tiles(V, q.dtype, q.device)
    if tiles is None:
        launch_products(q, latents, indices, lse, delta, dout, scale, dq, dlatents)
    else:
        launch_fused(tiles, q, latents, indices, lse, delta, dout, scale, dq, dlatents)
    rope_dim = D - value_dim
    dlatents = crop_columns(dlatents, value_dim, rope_dim, V).to(q.dtype)
    return crop_columns(dq, value_dim, rope_dim, V), dlatents


@sparse_attention_backward.register_fake
def _(q, latents, indices, out, lse, dout, scale):
    return q.new_empty(q.shape), latents.new_empty(latents.shape)


def keep_sparse_attention(ctx, inputs, output):
    """For the backward: what the forward read and gave, and its scale."""
    q, latents, indices, ctx.scale, _ = inputs
    ctx.save_for_backward(q, latents, indices, *output)


def differentiate_sparse_attention(ctx, dout, _):
    """Gradients of dout (B,S,H,V) to q and latents; lse has none."""
    dq, dlatents = sparse_attention_backward(*ctx.saved_tensors, dout, ctx.scale)
    return dq, dlatents, None, None, None


sparse_attention_operation.register_autograd(
    differentiate_sparse_attention, setup_context=keep_sparse_attention)


# ---- sparse_attention from an FP8 cache ----
# contract    kernels.sparse_attention
# in PyTorch  sparse_attn.sparse_attention
# equation    as above; an entry is V e4m3 values | a float32 scale per 128 of them | the rope part in bf16.
#             e4m3 is exact in bf16 and fp16, so nothing is dequantised: the scale of 128 values multiplies
#             their scores, and P before it meets them
# tiling      a program per query and group of heads, or one for each part of the list where queries are few;
#             values in one, two or four pieces of BLOCK_V columns
# FLOPs       2 S H K (D + V)
# bytes       K (V + 4 ceil(V / 128) + 2 R) gathered per program

@triton.jit
def fp8_query(q_ptr, row, ok, D: tl.constexpr, V: tl.constexpr, BLOCK_V: tl.constexpr, PIECE: tl.constexpr):
    """Columns of q that meet one piece of the values -> (rows, BLOCK_V)"""
    v = PIECE * BLOCK_V + tl.arange(0, BLOCK_V)
    return tl.load(q_ptr + row[:, None] * D + v[None, :], mask=ok[:, None] & (v < V)[None, :], other=0.0)


@triton.jit
def fp8_values(
        cache_ptr, scales_ptr, byte, scale_at, used,
        V: tl.constexpr, BLOCK_V: tl.constexpr, PIECE: tl.constexpr, dtype: tl.constexpr):
    """One piece of the gathered values -> values (BLOCK_U, BLOCK_V) without their scale, in dtype, and scales
    (BLOCK_U,)."""
    v = PIECE * BLOCK_V + tl.arange(0, BLOCK_V)
    k = tl.load(cache_ptr + byte[:, None] + v[None, :], mask=used[:, None] & (v < V)[None, :], other=0.0)
    if k.dtype == tl.uint8:
        k = e4m3_to_fp16(k)
    return k.to(dtype), tl.load(scales_ptr + scale_at + PIECE, mask=used & (PIECE * BLOCK_V < V), other=0.0)


@triton.jit
def fp8_store(out_ptr, acc, l, row, ok, V: tl.constexpr, BLOCK_V: tl.constexpr, PIECE: tl.constexpr):
    v = PIECE * BLOCK_V + tl.arange(0, BLOCK_V)
    out = (acc / l[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * V + v[None, :], out, mask=ok[:, None] & (v < V)[None, :])


@triton.jit
def fp8_kernel(
        q_ptr, cache_ptr, scales_ptr, rope_ptr, indices_ptr, out_ptr, lse_ptr,
        scale_log2, S, capacity, H, K, rows, parts,
        V: tl.constexpr, R: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_V: tl.constexpr, PIECES: tl.constexpr,
        SCALES: tl.constexpr, BYTES: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_U: tl.constexpr,
        NUM_STAGES: tl.constexpr):
    D: tl.constexpr = V + R
    query = tl.program_id(0)
    group = tl.program_id(1)
    part = tl.program_id(2)
    _, row, ok = block_rows(query, group, S, H, S, BLOCK_N, 1, BLOCK_N)
    r = tl.arange(0, BLOCK_R)
    q_rope = tl.load(
        q_ptr + row[:, None] * D + V + r[None, :], mask=ok[:, None] & (r < R)[None, :], other=0.0)
    q0 = fp8_query(q_ptr, row, ok, D, V, BLOCK_V, 0)
    m = tl.full([BLOCK_N], LOWEST_LOGIT, tl.float32)
    l = tl.zeros([BLOCK_N], tl.float32)
    acc0 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if PIECES > 1:
        q1 = fp8_query(q_ptr, row, ok, D, V, BLOCK_V, 1)
        acc1 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
    if PIECES > 2:
        q2 = fp8_query(q_ptr, row, ok, D, V, BLOCK_V, 2)
        q3 = fp8_query(q_ptr, row, ok, D, V, BLOCK_V, 3)
        acc2 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)
        acc3 = tl.zeros([BLOCK_N, BLOCK_V], tl.float32)

    # online softmax over this part of the list
    share = tl.cdiv(tl.cdiv(K, BLOCK_U), parts) * BLOCK_U
    start = query.to(tl.int64) * K
    first_token = (query // S).to(tl.int64) * capacity
    for j in tl.range(part * share, tl.minimum(K, (part + 1) * share), BLOCK_U, num_stages=NUM_STAGES):
        t, bits = union_tokens(indices_ptr, indices_ptr, start, j, K, 1, BLOCK_U)
        used = bits != 0
        token = first_token + t
        byte = token * BYTES
        scale_at = token * (BYTES // 4) + V // 4
        rope_row = rope_ptr + token[:, None] * (BYTES // 2) + (V + 4 * SCALES) // 2

        # scores
        k_rope = tl.load(rope_row + r[None, :], mask=used[:, None] & (r < R)[None, :], other=0.0).to(q0.dtype)
        k0, f0 = fp8_values(cache_ptr, scales_ptr, byte, scale_at, used, V, BLOCK_V, 0, q0.dtype)
        logits = matmul(q_rope, tl.trans(k_rope)) + matmul(q0, tl.trans(k0)) * f0[None, :]
        if PIECES > 1:
            k1, f1 = fp8_values(cache_ptr, scales_ptr, byte, scale_at, used, V, BLOCK_V, 1, q0.dtype)
            logits += matmul(q1, tl.trans(k1)) * f1[None, :]
        if PIECES > 2:
            k2, f2 = fp8_values(cache_ptr, scales_ptr, byte, scale_at, used, V, BLOCK_V, 2, q0.dtype)
            k3, f3 = fp8_values(cache_ptr, scales_ptr, byte, scale_at, used, V, BLOCK_V, 3, q0.dtype)
            logits += matmul(q2, tl.trans(k2)) * f2[None, :] + matmul(q3, tl.trans(k3)) * f3[None, :]
        logits = tl.where(used[None, :], logits * scale_log2, float("-inf"))

        # softmax, values
        m_new = tl.maximum(m, tl.max(logits, 1))
        alpha = tl.exp2(m - m_new)
        p = tl.exp2(logits - m_new[:, None])
        l = l * alpha + tl.sum(p, 1)
        m = m_new
        p *= P_SCALE
        acc0 = matmul((p * f0[None, :]).to(q0.dtype), k0, acc0 * alpha[:, None])
        if PIECES > 1:
            acc1 = matmul((p * f1[None, :]).to(q0.dtype), k1, acc1 * alpha[:, None])
        if PIECES > 2:
            acc2 = matmul((p * f2[None, :]).to(q0.dtype), k2, acc2 * alpha[:, None])
            acc3 = matmul((p * f3[None, :]).to(q0.dtype), k3, acc3 * alpha[:, None])

    empty = l == 0  # not: "unless l > 0", which would hide a NaN
    l = tl.where(empty, 1.0, l)
    row += part.to(tl.int64) * rows
    tl.store(lse_ptr + row, tl.where(empty, float("-inf"), (m + tl.log2(l)) * LN2), mask=ok)
    l *= P_SCALE
    fp8_store(out_ptr, acc0, l, row, ok, V, BLOCK_V, 0)
    if PIECES > 1:
        fp8_store(out_ptr, acc1, l, row, ok, V, BLOCK_V, 1)
    if PIECES > 2:
        fp8_store(out_ptr, acc2, l, row, ok, V, BLOCK_V, 2)
        fp8_store(out_ptr, acc3, l, row, ok, V, BLOCK_V, 3)


class Fp8Tiles(NamedTuple):
    """Of fp8_kernel."""
    block_n: int  # rows
    block_u: int  # tokens
    num_stages: int
    num_warps: int


def fp8_tiles(H, V, dtype, device):
    """Fp8Tiles for H heads and values of V columns."""
    if dtype == torch.float32:
        return Fp8Tiles(block_n=16, block_u=16, num_stages=1, num_warps=4)
    if shared_memory(device) > BELOW_A100:
        block_n = min(64, power_of_two(H))
        if H <= FEW_HEADS:
            return Fp8Tiles(block_n=block_n, block_u=64, num_stages=2, num_warps=4)
        if H <= SOME_HEADS:
            return Fp8Tiles(block_n=block_n, block_u=32, num_stages=2, num_warps=4)
        return Fp8Tiles(block_n=block_n, block_u=32, num_stages=3, num_warps=8)
    most = 16
    if V <= SMALL_VALUE:
        most = 64
    elif V <= MEDIUM_VALUE:
        most = 32
    return Fp8Tiles(block_n=min(most, power_of_two(H)), block_u=16, num_stages=2, num_warps=4)


def fp8_dtype(device):
    """How a kernel reads e4m3: as such, or as bytes where the GPU has no FP8."""
    return torch.float8_e4m3fn if device.type == "cuda" and has_fp8(device) else torch.uint8


@operation("sparse_attention_fp8")
def sparse_attention_fp8_operation(
        q: Tensor, packed: Tensor, indices: Tensor, scale: float,
        value_dim: int) -> tuple[Tensor, Tensor]:
    """Packed cache (B,T,bytes) uint8 -> out (B,S,H,value_dim), lse (B,S,H) float32."""
    B, S, H, D = q.shape
    T = packed.shape[1]
    K = indices.shape[2]
    if B * S * H * T * K == 0:
        return nothing_selected(q, value_dim)
    q = q.contiguous()
    indices = indices.contiguous()
    hopper = hopper_chapter(q, packed, indices, value_dim)
    programs = B * S * triton.cdiv(H, 64)
    enough = multiprocessors(q.device) // 2  # programs; fewer: only lists in parts fill the GPU
    if hopper is not None and programs >= enough:
        out, lse = hopper.gluon_forward(q, packed, indices, scale)
        return out.contiguous(), lse.contiguous()

    packed, capacity = token_rows(packed)
    tiles = fp8_tiles(H, value_dim, q.dtype, q.device)
    groups = triton.cdiv(H, tiles.block_n)
    parts = list_parts(B * S * groups, triton.cdiv(K, tiles.block_u), q.device)
    scales = triton.cdiv(value_dim, SCALE_BLOCK.value)
    out = q.new_empty(B, S, H, value_dim)
    lse = q.new_empty(B, S, H, dtype=torch.float32)
    part, part_lse = part_buffers(parts, out, lse)
    fp8_kernel[(B * S, groups, parts)](
        q_ptr=q, cache_ptr=packed.view(fp8_dtype(q.device)), scales_ptr=packed.view(torch.float32),
        rope_ptr=packed.view(torch.bfloat16), indices_ptr=indices, out_ptr=part, lse_ptr=part_lse,
        scale_log2=scale * LOG2E.value, S=S, capacity=capacity, H=H, K=K, rows=B * S * H, parts=parts,
        V=value_dim, R=D - value_dim, BLOCK_R=power_of_two(D - value_dim),
        BLOCK_V=min(SCALE_BLOCK.value, power_of_two(value_dim)), PIECES=4 if scales == 3 else scales,
        SCALES=scales, BYTES=packed.shape[-1], BLOCK_N=tiles.block_n, BLOCK_U=tiles.block_u,
        NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)
    if parts > 1:
        launch_combine(part, part_lse, out, lse)
    return out, lse


@sparse_attention_fp8_operation.register_fake
def _(q, packed, indices, scale, value_dim):
    B, S, H, _ = q.shape
    return q.new_empty(B, S, H, value_dim), q.new_empty(B, S, H, dtype=torch.float32)


# ---- the public function ----

def check_arguments(q, latents, indices, value_dim):
    """ValueError: shapes or dtypes that do not fit."""
    if q.dim() != 4 or latents.dim() != 3 or indices.dim() != 3:
        raise ValueError(f"q {tuple(q.shape)}, latents {tuple(latents.shape)}, "
                         f"indices {tuple(indices.shape)} should be (B,S,H,D), (B,T,D), (B,S,K)")
    B, S, _, D = q.shape
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        raise ValueError(f"q is {q.dtype} and should be float32, float16 or bfloat16")
    if not 0 < value_dim <= D:
        raise ValueError(f"value_dim={value_dim} should lie within 1..{D}, the width of q")
    entry = D
    if latents.dtype == torch.uint8:
        entry = value_dim + 4 * -(-value_dim // SCALE_BLOCK.value) + 2 * (D - value_dim)
        if entry % 4 or value_dim % 4 or value_dim > 512:
            raise ValueError(f"value_dim={value_dim}, entries of {entry} bytes: an FP8 cache takes a "
                             "value_dim that is a multiple of 4 up to 512, and entries of 4 n bytes")
    fit(latents=(latents, (B, latents.shape[1], entry)), indices=(indices, (B, S, indices.shape[2])))
    check_indices(indices)


def sparse_attention(q, latents, indices, scale, value_dim):
    """What kernels.sparse_attention promises: shapes, dtypes and errors stand there."""
    check_arguments(q, latents, indices, value_dim)
    if latents.dtype == torch.uint8:
        out, lse = sparse_attention_fp8_operation(q, latents, indices, scale, value_dim)
    else:
        out, lse = sparse_attention_operation(q, latents.to(q.dtype), indices, scale, value_dim)
    return out, lse.detach()
