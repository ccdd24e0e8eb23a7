"""Chapter 3: sparse attention."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from triton_kernels.common import fit, has_fp8, is_hopper, limits, LOG2E


def hopper_kernels(x):  # temporary, until the rewritten chapter takes this file's place
    if not is_hopper(x):
        return None
    from triton_kernels import hopper
    return hopper


# ===========================================================================================================================================
# 3  Sparse attention. With few heads, a block of neighbouring queries shares the union of their selections: one gathered latent serves all
#    its rows (query, head), and a bit per query masks what that query did not select. The backward is three matrix products over the lists.
# ===========================================================================================================================================

# ---------------------------------------------------------------------------------------------------------------------------------------
# Union of the selections of BQ neighbouring queries:  lists[b, :length[b]] ascending tokens, bits[b, u] bit i = query i of the block chose it.
#   one program per block, persistent; its scratch row holds BQ bits per token, 32 // BQ tokens to a word
#   scatter the selections into the row, compact the words that are not zero, expand these words into tokens
#   reads 4 S K bytes, writes 8 bytes per entry; scanning costs T / (32 // BQ) words per block, in L2


@triton.jit
def sparse_union_kernel(Index, Scratch, Words, Lists, Bits, Length, S, K, blocks, total, row_words, width,
                        BQ: tl.constexpr, GP: tl.constexpr, BK: tl.constexpr, BW: tl.constexpr, BE: tl.constexpr,
                        PAD: tl.constexpr):
    PER: tl.constexpr = 32 // BQ  # tokens per word
    pid = tl.program_id(0)
    row = Scratch + pid.to(tl.int64) * row_words
    found = Words + pid.to(tl.int64) * 2 * width  # (word number, word) of the words that are not zero
    n, e, g = tl.arange(0, BW), tl.arange(0, BE), tl.arange(0, GP)
    for step in range(tl.cdiv(total - pid, tl.num_programs(0))):
        b = pid + step * tl.num_programs(0)
        low, high = 2147483647, -1
        for i in range(tl.minimum(BQ, S - (b % blocks) * BQ)):
            source = Index + ((b // blocks).to(tl.int64) * S + (b % blocks) * BQ + i) * K
            for j in range(0, K, BK):
                t = tl.load(source + j + tl.arange(0, BK), mask=j + tl.arange(0, BK) < K, other=-1)
                tl.atomic_or(row + t // PER, 1 << (t % PER * BQ + i), mask=t >= 0, sem="relaxed")
                low, high = tl.minimum(low, tl.min(tl.where(t < 0, 2147483647, t))), tl.maximum(high, tl.max(t))
        tl.debug_barrier()
        count = 0
        for j in range(low // PER, high // PER + 1, BW):
            ok = j + n <= high // PER
            w = tl.load(row + j + n, mask=ok, other=0, cache_modifier=".cg")
            hit = (w != 0).to(tl.int32)
            at = found + count + tl.cumsum(hit, 0) - 1
            tl.store(at, j + n, mask=w != 0)
            tl.store(at + width, w, mask=w != 0)
            tl.store(row + j + n, 0, mask=w != 0)
            count += tl.sum(hit, 0)
        tl.debug_barrier()
        out, length = b.to(tl.int64) * width, 0
        for j in range(0, count, BE):
            first = tl.load(found + j + e, mask=j + e < count, other=0, cache_modifier=".cg") * PER
            w = tl.load(found + width + j + e, mask=j + e < count, other=0, cache_modifier=".cg")
            bits = tl.where(g[None, :] < PER, (w[:, None] >> (g * BQ)[None, :]) & ((1 << BQ) - 1), 0)
            hit = (bits != 0).to(tl.int32)
            per_word = tl.sum(hit, 1)
            at = out + length + (tl.cumsum(per_word, 0) - per_word)[:, None] + tl.cumsum(hit, 1) - 1
            tl.store(Lists + at, first[:, None] + g[None, :], mask=bits != 0)
            tl.store(Bits + at, bits, mask=bits != 0)
            length += tl.sum(per_word, 0)
        pad = tl.arange(0, PAD)
        tl.store(Lists + out + length + pad, high + tl.zeros([PAD], tl.int32))
        tl.store(Bits + out + length + pad, tl.zeros([PAD], tl.int32))
        tl.store(Length + b, length)
        tl.debug_barrier()


@triton.jit
def sparse_length_kernel(Index, Length, K, BK: tl.constexpr):
    """One query per block needs no union, only where its list ends."""
    r = tl.program_id(0)
    last = -1
    for j in range(0, K, BK):
        n = j + tl.arange(0, BK)
        t = tl.load(Index + r.to(tl.int64) * K + n, mask=n < K, other=-1)
        last = tl.maximum(last, tl.max(tl.where(t < 0, -1, n)))
    tl.store(Length + r, last + 1)


def sparse_union(indices, T, BQ):
    """indices (B,S,K) -> lists, bits (B * blocks, width) int32 and length (B * blocks) int32 of the blocks of BQ neighbouring queries;
    128 entries without bits follow each list, for tiles that reach past its end. Memory: 8 bytes for each of
    S * K entries (the bound without a host synchronisation), and at most 64 MB of scratch."""
    B, S, K = indices.shape
    blocks, new = triton.cdiv(S, BQ), lambda *shape: torch.empty(shape, dtype=torch.int32, device=indices.device)
    length, BK = new(B * blocks), min(1024, triton.next_power_of_2(K))
    if BQ == 1:
        sparse_length_kernel[(B * S,)](indices, length, K, BK)
        return indices, indices, length
    width, row_words = triton.cdiv(min(BQ * K, T), 128) * 128 + 128, triton.cdiv(T, 32 // BQ)
    programs = min(B * blocks, 1056, max(16, (1 << 24) // row_words))
    lists, bits, words = new(B * blocks, width), new(B * blocks, width), new(programs, 2, width)
    scratch = torch.zeros(programs, row_words, dtype=torch.int32, device=indices.device)
    sparse_union_kernel[(programs,)](indices, scratch, words, lists, bits, length, S, K, blocks, B * blocks, row_words, width,
                                     BQ, triton.next_power_of_2(32 // BQ), BK, 1024, 256, 128, num_warps=4)
    return lists, bits, length


@triton.jit
def sparse_rows(block, group, S, H, blocks, HB: tl.constexpr, BQ: tl.constexpr, N: tl.constexpr):
    """Rows of a program: BQ queries x HB heads, padded to N -> query within the block, row number in (B,S,H), is it real."""
    row = tl.arange(0, N)
    i, head = row // HB, group * HB + row % HB
    query = block % blocks * BQ + i
    return i, ((block // blocks).to(tl.int64) * S + query) * H + head, (i < BQ) & (query < S) & (head < H)


@triton.jit
def sparse_length(Length, block, width):
    if Length is None:
        length = width
    else:
        length = tl.load(Length + block)
    return length


@triton.jit
def sparse_tokens(Lists, Bits, start, j, length, BQ: tl.constexpr, BN: tl.constexpr):
    """Entries j ... j + BN of a list -> token, bits (0: nobody chose it, or past the end, where the last token is repeated)."""
    n = j + tl.arange(0, BN)
    if BQ == 1:
        t = tl.load(Lists + start + tl.minimum(n, length - 1))
        bits = ((t >= 0) & (n < length)).to(tl.int32)
        t = tl.maximum(t, 0)
    else:
        t, bits = tl.load(Lists + start + n), tl.load(Bits + start + n)
    return t, bits


# ---------------------------------------------------------------------------------------------------------------------------------------
# Forward:  out = softmax(scale q . latents[S_t]) latents[S_t, :value_dim]   (paper eq. 2), online softmax over the list of the block.
#   program = N rows (query, head) of one block, or one of SPLITS pieces of its list (few queries: decoding)
#   tile = BN gathered latents, used twice: scores with the whole vector, values with its first D numbers
#   2 S H K (2 D + R) operations counted, U / K times as many done; gathers U (D + R) numbers per block, U = length of the union
# Latents of more than 256 numbers leave no room for N x D accumulators: there the forward is the first two products of the backward below.


@triton.jit
def sparse_forward_kernel(Q, KV, Lists, Bits, Length, Out, Lse, scale_log2, S, T, H, blocks, width, rows_total, SPLITS,
                          HB: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
                          STAGES: tl.constexpr):
    W: tl.constexpr = D + R
    block, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, g, ok = sparse_rows(block, group, S, H, blocks, HB, BQ, N)
    d, r = tl.arange(0, D), tl.arange(0, R)
    q = tl.load(Q + g[:, None] * W + d[None, :], mask=ok[:, None], other=0.)
    qr = tl.load(Q + g[:, None] * W + D + r[None, :], mask=ok[:, None], other=0.)
    m, l, acc = tl.full([N], -1e38, tl.float32), tl.zeros([N], tl.float32), tl.zeros([N, D], tl.float32)
    length = sparse_length(Length, block, width)
    piece = tl.cdiv(tl.cdiv(length, BN), SPLITS) * BN
    start, latents = block.to(tl.int64) * width, KV + (block // blocks).to(tl.int64) * T * W
    for j in tl.range(split * piece, tl.minimum(length, (split + 1) * piece), BN, num_stages=STAGES):
        t, bits = sparse_tokens(Lists, Bits, start, j, length, BQ, BN)
        kp = latents + t[:, None].to(tl.int64) * W
        k, kr = tl.load(kp + d[None, :]), tl.load(kp + D + r[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.dot(qr, tl.trans(kr), s, input_precision="ieee")
        s = tl.where(((bits[None, :] >> i[:, None]) & 1) != 0, s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        a, p = tl.exp2(m - m_new), tl.exp2(s - m_new[:, None])
        l, m = l * a + tl.sum(p, 1), m_new
        acc = tl.dot(p.to(k.dtype), k, acc * a[:, None], input_precision="ieee")
    # computed afresh (min(length, 0) is 0, which the compiler cannot know): row addresses kept through the loop would cost 40 registers
    _, g, ok = sparse_rows(block + tl.minimum(length, 0), group, S, H, blocks, HB, BQ, N)
    some = l > 0  # a row that selected nothing gives 0 and -inf
    g += split.to(tl.int64) * rows_total
    tl.store(Out + g[:, None] * D + d[None, :], (acc / tl.where(some, l, 1.)[:, None]).to(Out.dtype.element_ty), mask=ok[:, None])
    tl.store(Lse + g, tl.where(some, (m + tl.log2(l)) * 0.6931471805599453, float("-inf")), mask=ok)


@triton.jit
def sparse_combine_kernel(Part, PartLse, Out, Lse, rows, SPLITS, D: tl.constexpr, DP: tl.constexpr):
    """out = sum_i exp(lse_i - lse) out_i over the pieces of a list."""
    g, d = tl.program_id(0).to(tl.int64), tl.arange(0, DP)
    m, l, acc = float("-inf"), 0., tl.zeros([DP], tl.float32)
    for i in range(SPLITS):
        lse = tl.load(PartLse + i * rows + g)
        m_new = tl.maximum(m, lse)
        ref = tl.where(m_new == float("-inf"), 0., m_new)
        a, e = tl.exp(m - ref), tl.exp(lse - ref)
        acc = acc * a + tl.load(Part + (i * rows + g) * D + d, mask=d < D, other=0.) * e
        l, m = l * a + e, m_new
    tl.store(Out + g * D + d, (acc / tl.where(l > 0, l, 1.)).to(Out.dtype.element_ty), mask=d < D)
    tl.store(Lse + g, tl.where(l > 0, m + tl.log(tl.where(l > 0, l, 1.)), float("-inf")))


@triton.jit
def sparse_e4m3(x, dtype: tl.constexpr):
    """e4m3 numbers, or their bytes where the GPU knows no e4m3 (below sm_89): moved into fp16's fields they are 2^-8 of their value, exactly."""
    if x.dtype == tl.uint8:
        y = x.to(tl.int16)
        x = (((y & 128) << 8) | ((y & 127) << 7)).to(tl.float16, bitcast=True).to(tl.float32) * 256.
    return x.to(dtype)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Backward.  P = exp(scale q.k - lse), dP = dout . v, delta = sum(out dout), dS = scale P (dP - delta):
#            dq = dS k,  dk = dS^T q,  dv = P^T dout,  dlatents = dk with dv added to its first value_dim columns.
#   score:   program = one tile of BN tokens x N rows; streams columns of q, dout and gathered k like a plain matrix product; writes P, dS
#   product: program = N rows x DC columns; loops over the list (second gather), dq in registers. Up to 128 numbers: score and product in one
#   latent:  program = DC columns of a block, or all if they fit; loops over the list; a tile of dlatents leaves as float32 atomics, no gather
#   2 S H K (3 (D + R) + 2 D) operations, U (D + R) atomics per block (0.95 T/s on an H200: the bound of few heads); P and dS: 4 N bytes per entry,
#   in chunks of blocks of at most 1 GB
# FORWARD: the same score kernel writes P relative to the maximum of its tile, the product kernel rescales tile by tile and multiplies by values.


@triton.jit
def sparse_delta_kernel(Out, DOut, Delta, rows, D: tl.constexpr, DP: tl.constexpr, BR: tl.constexpr):
    g, d = tl.program_id(0) * BR + tl.arange(0, BR), tl.arange(0, DP)
    at, ok = g[:, None].to(tl.int64) * D + d[None, :], (g < rows)[:, None] & (d < D)[None, :]
    x = tl.load(Out + at, mask=ok, other=0.).to(tl.float32) * tl.load(DOut + at, mask=ok, other=0.).to(tl.float32)
    tl.store(Delta + g, tl.sum(x, 1), mask=g < rows)


@triton.jit(do_not_specialize=["first_block"])
def sparse_score_kernel(Q, KV, Scales, Rope, Lists, Bits, Length, DOut, Lse, Delta, P, DS, TileMax, TileSum, scale, scale_log2, first_block,
                        S, T, H, blocks, width, tiles, FORWARD: tl.constexpr, FP8: tl.constexpr, BYTES: tl.constexpr, G: tl.constexpr,
                        HB: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, R: tl.constexpr, DC: tl.constexpr, N: tl.constexpr,
                        BN: tl.constexpr, STAGES: tl.constexpr):
    W: tl.constexpr = D + R
    local, tile = tl.program_id(0) // tiles, tl.program_id(0) % tiles  # local: block and head group within this chunk of blocks
    j, block, group = tile * BN, first_block + local // G, local % G
    length = sparse_length(Length, block, width)
    if j < length:
        i, g, ok = sparse_rows(block, group, S, H, blocks, HB, BQ, N)
        t, bits = sparse_tokens(Lists, Bits, block.to(tl.int64) * width, j, length, BQ, BN)
        token = (block // blocks).to(tl.int64) * T + t
        c, r, ok2 = tl.arange(0, DC), tl.arange(0, R), ok[:, None]
        q_row, do_row = Q + g[:, None] * W, DOut + g[:, None] * D
        qr = tl.load(q_row + D + r[None, :], mask=ok2, other=0.)
        if FP8:
            kr = tl.load(Rope + token[:, None] * (BYTES // 2) + (D + D // 32) // 2 + r[None, :]).to(qr.dtype)
            k_row = KV + token[:, None] * BYTES
        else:
            k_row = KV + token[:, None] * W
            kr = tl.load(k_row + D + r[None, :])
        s, dp = tl.dot(kr, tl.trans(qr), input_precision="ieee"), tl.zeros([BN, N], tl.float32)  # (BN, N): tokens fill the rows of the tile
        for at in tl.range(0, D, DC, num_stages=STAGES):
            k, q = tl.load(k_row + at + c[None, :]), tl.load(q_row + at + c[None, :], mask=ok2, other=0.)
            if FP8:
                f = tl.load(Scales + token * (BYTES // 4) + D // 4 + at // 128)
                s += tl.dot(sparse_e4m3(k, q.dtype), tl.trans(q), input_precision="ieee") * f[:, None]
            else:
                s = tl.dot(k, tl.trans(q), s, input_precision="ieee")
            if not FORWARD:
                dp = tl.dot(k, tl.trans(tl.load(do_row + at + c[None, :], mask=ok2, other=0.)), dp, input_precision="ieee")
        chosen = ((bits[:, None] >> i[None, :]) & 1) != 0
        n, row = j + tl.arange(0, BN), tl.arange(0, N)
        to, real = (local.to(tl.int64) * width + n)[:, None] * N + row[None, :], (n < length)[:, None]
        if FORWARD:
            s = tl.where(chosen, s * scale_log2, float("-inf"))
            m = tl.maximum(tl.max(s, 0), -1e38)
            p = tl.exp2(s - m[None, :])
            tl.store(TileMax + tl.program_id(0).to(tl.int64) * N + row, m)
            tl.store(TileSum + tl.program_id(0).to(tl.int64) * N + row, tl.sum(p, 0))
        else:
            lse = tl.load(Lse + g, mask=ok, other=float("-inf")) * 1.4426950408889634
            lse = tl.where(lse == float("-inf"), float("inf"), lse)
            p = tl.where(chosen, tl.exp2(s * scale_log2 - lse[None, :]), 0.)
            ds = p * (dp - tl.load(Delta + g, mask=ok, other=0.)[None, :]) * scale
            tl.store(DS + to, ds.to(DS.dtype.element_ty), mask=real)
        tl.store(P + to, p.to(P.dtype.element_ty), mask=real)


@triton.jit
def sparse_product(KV, Scales, Lists, Bits, P, TileMax, m, l, Out, g, ok, start, p_start, tile_start, batch_row, length, column,
                   FORWARD: tl.constexpr, FP8: tl.constexpr, STRIDE: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, C: tl.constexpr,
                   BQ: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr, STAGES: tl.constexpr):
    """out (N, C) = P^T k of one list, columns column ... column + C."""
    c, row, acc = column + tl.arange(0, C), tl.arange(0, N), tl.zeros([N, C], tl.float32)
    for j in tl.range(0, length, BN, num_stages=STAGES):
        t, bits = sparse_tokens(Lists, Bits, start, j, length, BQ, BN)
        n = j + tl.arange(0, BN)
        p = tl.load(P + (p_start + n)[:, None] * N + row[None, :], mask=(n < length)[:, None], other=0.)
        k = tl.load(KV + (batch_row + t)[:, None] * STRIDE + c[None, :])
        if FORWARD:
            x = p.to(tl.float32) * tl.exp2(tl.load(TileMax + (tile_start + j // TILE) * N + row) - m)[None, :]
            if FP8:
                x *= tl.load(Scales + (batch_row + t) * (STRIDE // 4) + D // 4 + column // 128)[:, None] * 256.
                k = sparse_e4m3(k, p.dtype)
            p = x.to(p.dtype)
        acc = tl.dot(tl.trans(p), k, acc, input_precision="ieee")
    if FORWARD:
        acc /= l[:, None]
    tl.store(Out + g[:, None] * OUT + c[None, :], acc.to(Out.dtype.element_ty), mask=ok[:, None])


@triton.jit(do_not_specialize=["first_block"])
def sparse_product_kernel(KV, Scales, Lists, Bits, Length, P, Out, TileMax, TileSum, Lse, first_block, S, T, H, blocks, width, tiles,
                          FORWARD: tl.constexpr, FP8: tl.constexpr, STRIDE: tl.constexpr, G: tl.constexpr, HB: tl.constexpr, BQ: tl.constexpr,
                          D: tl.constexpr, R: tl.constexpr, DC: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, TILE: tl.constexpr,
                          STAGES: tl.constexpr):
    CHUNKS: tl.constexpr = D // DC if FORWARD else D // DC + 1  # the rope columns are the last chunk of dq
    local, chunk = tl.program_id(0) // CHUNKS, tl.program_id(0) % CHUNKS
    block = first_block + local // G
    i, g, ok = sparse_rows(block, local % G, S, H, blocks, HB, BQ, N)
    length, start, p_start = sparse_length(Length, block, width), block.to(tl.int64) * width, local.to(tl.int64) * width
    tile_start, batch_row, row = local.to(tl.int64) * tiles, (block // blocks).to(tl.int64) * T, tl.arange(0, N)
    m, l = tl.full([N], -1e38, tl.float32), tl.zeros([N], tl.float32)
    if FORWARD:
        for tile in range(tl.cdiv(length, TILE)):
            m_tile, l_tile = tl.load(TileMax + (tile_start + tile) * N + row), tl.load(TileSum + (tile_start + tile) * N + row)
            m_new = tl.maximum(m, m_tile)
            l, m = l * tl.exp2(m - m_new) + l_tile * tl.exp2(m_tile - m_new), m_new
        if chunk == 0:
            tl.store(Lse + g, tl.where(l > 0, (m + tl.log2(l)) * 0.6931471805599453, float("-inf")), mask=ok)
        l = tl.where(l > 0, l, 1.) * (256. if FP8 else 1.)
    if chunk < D // DC:
        sparse_product(KV, Scales, Lists, Bits, P, TileMax, m, l, Out, g, ok, start, p_start, tile_start, batch_row, length, chunk * DC,
                       FORWARD, FP8, STRIDE, D, D if FORWARD else D + R, DC, BQ, N, BN, TILE, STAGES)
    elif not FORWARD:
        sparse_product(KV, Scales, Lists, Bits, P, TileMax, m, l, Out, g, ok, start, p_start, tile_start, batch_row, length, D,
                       FORWARD, FP8, STRIDE, D, D + R, R, BQ, N, BN, TILE, STAGES)


@triton.jit(do_not_specialize=["first_block"])
def sparse_score_query_kernel(Q, KV, Lists, Bits, Length, DOut, Lse, Delta, P, DS, DQ, scale, scale_log2, first_block, S, T, H, blocks, width,
                              G: tl.constexpr, HB: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, R: tl.constexpr, N: tl.constexpr,
                              BN: tl.constexpr, STAGES: tl.constexpr):
    """The first two products in one pass, for latents small enough that q, dout and dq of a block stay on chip."""
    W: tl.constexpr = D + R
    local = tl.program_id(0)
    block = first_block + local // G
    i, g, ok = sparse_rows(block, local % G, S, H, blocks, HB, BQ, N)
    d, r, ok2, row = tl.arange(0, D), tl.arange(0, R), ok[:, None], tl.arange(0, N)
    q, qr = tl.load(Q + g[:, None] * W + d[None, :], mask=ok2, other=0.), tl.load(Q + g[:, None] * W + D + r[None, :], mask=ok2, other=0.)
    do, delta = tl.load(DOut + g[:, None] * D + d[None, :], mask=ok2, other=0.), tl.load(Delta + g, mask=ok, other=0.)
    lse = tl.load(Lse + g, mask=ok, other=float("-inf")) * 1.4426950408889634
    lse = tl.where(lse == float("-inf"), float("inf"), lse)
    acc, acc_r = tl.zeros([N, D], tl.float32), tl.zeros([N, R], tl.float32)
    length, start, p_start = sparse_length(Length, block, width), block.to(tl.int64) * width, local.to(tl.int64) * width
    latents = KV + (block // blocks).to(tl.int64) * T * W
    for j in tl.range(0, length, BN, num_stages=STAGES):
        t, bits = sparse_tokens(Lists, Bits, start, j, length, BQ, BN)
        kp = latents + t[:, None].to(tl.int64) * W
        k, kr = tl.load(kp + d[None, :]), tl.load(kp + D + r[None, :])
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
        s = tl.dot(qr, tl.trans(kr), s, input_precision="ieee")
        dp = tl.dot(do, tl.trans(k), input_precision="ieee")
        p = tl.where(((bits[None, :] >> i[:, None]) & 1) != 0, tl.exp2(s * scale_log2 - lse[:, None]), 0.)
        ds = (p * (dp - delta[:, None]) * scale).to(k.dtype)
        n = j + tl.arange(0, BN)
        to, real = (p_start + n)[None, :] * N + row[:, None], (n < length)[None, :]
        tl.store(P + to, p.to(k.dtype), mask=real)
        tl.store(DS + to, ds, mask=real)
        acc, acc_r = tl.dot(ds, k, acc, input_precision="ieee"), tl.dot(ds, kr, acc_r, input_precision="ieee")
    _, g, ok = sparse_rows(block + tl.minimum(length, 0), local % G, S, H, blocks, HB, BQ, N)  # as in the forward: frees registers
    tl.store(DQ + g[:, None] * W + d[None, :], acc.to(DQ.dtype.element_ty), mask=ok[:, None])
    tl.store(DQ + g[:, None] * W + D + r[None, :], acc_r.to(DQ.dtype.element_ty), mask=ok[:, None])


@triton.jit
def sparse_latent_grad(Q, DOut, Lists, Bits, P, DS, DKV, start, p_start, batch_row, length, g, ok, column,
                       D: tl.constexpr, W: tl.constexpr, C: tl.constexpr, BQ: tl.constexpr, N: tl.constexpr, BN: tl.constexpr,
                       STAGES: tl.constexpr, VALUES: tl.constexpr, R: tl.constexpr):
    """Columns column ... column + C, and with R the last R, too."""
    c, row = column + tl.arange(0, C), tl.arange(0, N)
    q = tl.load(Q + g[:, None] * W + c[None, :], mask=ok[:, None], other=0.)
    if R:
        r = D + tl.arange(0, R)
        qr = tl.load(Q + g[:, None] * W + r[None, :], mask=ok[:, None], other=0.)
    if VALUES:
        do = tl.load(DOut + g[:, None] * D + c[None, :], mask=ok[:, None], other=0.)
    for j in tl.range(0, length, BN, num_stages=STAGES):
        t, bits = sparse_tokens(Lists, Bits, start, j, length, BQ, BN)
        n = j + tl.arange(0, BN)
        at, real = (p_start + n)[:, None] * N + row[None, :], (n < length)[:, None]
        ds, to = tl.load(DS + at, mask=real, other=0., eviction_policy="evict_first"), DKV + (batch_row + t)[:, None] * W
        x = tl.dot(ds, q, input_precision="ieee")  # (BN, C)
        if VALUES:
            x = tl.dot(tl.load(P + at, mask=real, other=0., eviction_policy="evict_first"), do, x, input_precision="ieee")
        tl.atomic_add(to + c[None, :], x, mask=(bits != 0)[:, None], sem="relaxed")
        if R:
            tl.atomic_add(to + r[None, :], tl.dot(ds, qr, input_precision="ieee"), mask=(bits != 0)[:, None], sem="relaxed")


@triton.jit(do_not_specialize=["first_block"])
def sparse_latent_grad_kernel(Q, DOut, Lists, Bits, Length, P, DS, DKV, first_block, S, T, H, blocks, width,
                              G: tl.constexpr, HB: tl.constexpr, BQ: tl.constexpr, D: tl.constexpr, R: tl.constexpr, DC: tl.constexpr,
                              N: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    W: tl.constexpr = D + R
    CHUNKS: tl.constexpr = D // DC
    PARTS: tl.constexpr = CHUNKS + (CHUNKS > 1)  # one program takes everything, or one more takes the rope part
    local, chunk = tl.program_id(0) // PARTS, tl.program_id(0) % PARTS
    block = first_block + local // G
    i, g, ok = sparse_rows(block, local % G, S, H, blocks, HB, BQ, N)
    length, start, p_start = sparse_length(Length, block, width), block.to(tl.int64) * width, local.to(tl.int64) * width
    batch_row = (block // blocks).to(tl.int64) * T
    if chunk < CHUNKS:
        sparse_latent_grad(Q, DOut, Lists, Bits, P, DS, DKV, start, p_start, batch_row, length, g, ok, chunk * DC, D, W, DC, BQ, N, BN, STAGES, True,
                           0 if CHUNKS > 1 else R)
    else:
        sparse_latent_grad(Q, DOut, Lists, Bits, P, DS, DKV, start, p_start, batch_row, length, g, ok, D, D, W, R, BQ, N, BN, STAGES, False, 0)


# ---------------------------------------------------------------------------------------------------------------------------------------
# The same forward from packed FP8 latents: value_dim e4m3 numbers | a float32 scale per 128 of them | rope in bf16.
#   e4m3 is exact in bf16 and fp16, so nothing is dequantised: the scale of a 128-wide piece multiplies its scores, and P before its values


@triton.jit
def sparse_piece(KV8, Scales, at, scale_at, some, D: tl.constexpr, C: tl.constexpr, PIECE: tl.constexpr, dtype: tl.constexpr):
    """One 128-wide piece of gathered latents -> numbers (BN, C), scale (BN,)."""
    c = PIECE * C + tl.arange(0, C)
    k = sparse_e4m3(tl.load(KV8 + at[:, None] + c[None, :], mask=some[:, None] & (c < D)[None, :], other=0.), dtype)
    return k, tl.load(Scales + scale_at + PIECE, mask=some & (PIECE * C < D), other=0.)


@triton.jit
def sparse_query_piece(Q, g, ok, W: tl.constexpr, D: tl.constexpr, C: tl.constexpr, PIECE: tl.constexpr):
    c = PIECE * C + tl.arange(0, C)
    return tl.load(Q + g[:, None] * W + c[None, :], mask=ok[:, None] & (c < D)[None, :], other=0.)


@triton.jit
def sparse_store_piece(Out, acc, l, g, ok, D: tl.constexpr, C: tl.constexpr, PIECE: tl.constexpr):
    c = PIECE * C + tl.arange(0, C)
    tl.store(Out + g[:, None] * D + c[None, :], (acc / l[:, None]).to(Out.dtype.element_ty), mask=ok[:, None] & (c < D)[None, :])


@triton.jit
def sparse_forward_fp8_kernel(Q, KV8, Scales, Rope, Index, Out, Lse, scale_log2, S, T, H, K, rows_total, SPLITS,
                              D: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr,
                              SCALES: tl.constexpr, BYTES: tl.constexpr, N: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr):
    W: tl.constexpr = D + R
    query, group, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    i, g, ok = sparse_rows(query, group, S, H, S, N, 1, N)
    r = tl.arange(0, RP)
    qr = tl.load(Q + g[:, None] * W + D + r[None, :], mask=ok[:, None] & (r < R)[None, :], other=0.)
    q0 = sparse_query_piece(Q, g, ok, W, D, C, 0)
    m, l = tl.full([N], -1e38, tl.float32), tl.zeros([N], tl.float32)
    acc0 = tl.zeros([N, C], tl.float32)
    if PIECES > 1:
        q1, acc1 = sparse_query_piece(Q, g, ok, W, D, C, 1), tl.zeros([N, C], tl.float32)
    if PIECES > 2:
        q2, acc2 = sparse_query_piece(Q, g, ok, W, D, C, 2), tl.zeros([N, C], tl.float32)
        q3, acc3 = sparse_query_piece(Q, g, ok, W, D, C, 3), tl.zeros([N, C], tl.float32)
    piece = tl.cdiv(tl.cdiv(K, BN), SPLITS) * BN
    start, entry = query.to(tl.int64) * K, (query // S).to(tl.int64) * T
    end = tl.minimum(K, (split + 1) * piece)
    for j in tl.range(split * piece, end, BN, num_stages=STAGES):
        t, bits = sparse_tokens(Index, Index, start, j, K, 1, BN)
        some, token = bits != 0, entry + t
        at, scale_at = token * BYTES, token * (BYTES // 4) + D // 4
        rope = Rope + token[:, None] * (BYTES // 2) + (D + 4 * SCALES) // 2 + r[None, :]
        kr = tl.load(rope, mask=some[:, None] & (r < R)[None, :], other=0.).to(q0.dtype)
        k0, f0 = sparse_piece(KV8, Scales, at, scale_at, some, D, C, 0, q0.dtype)
        s = tl.dot(qr, tl.trans(kr), input_precision="ieee") + tl.dot(q0, tl.trans(k0), input_precision="ieee") * f0[None, :]
        if PIECES > 1:
            k1, f1 = sparse_piece(KV8, Scales, at, scale_at, some, D, C, 1, q0.dtype)
            s += tl.dot(q1, tl.trans(k1), input_precision="ieee") * f1[None, :]
        if PIECES > 2:
            k2, f2 = sparse_piece(KV8, Scales, at, scale_at, some, D, C, 2, q0.dtype)
            k3, f3 = sparse_piece(KV8, Scales, at, scale_at, some, D, C, 3, q0.dtype)
            s += tl.dot(q2, tl.trans(k2), input_precision="ieee") * f2[None, :] + tl.dot(q3, tl.trans(k3), input_precision="ieee") * f3[None, :]
        s = tl.where(some[None, :], s * scale_log2, float("-inf"))
        m_new = tl.maximum(m, tl.max(s, 1))
        a, p = tl.exp2(m - m_new), tl.exp2(s - m_new[:, None])
        l, m = l * a + tl.sum(p, 1), m_new
        p *= 256.  # 256 x scale is of the size of the piece's largest value, so P x scale keeps its digits in fp16 too
        acc0 = tl.dot((p * f0[None, :]).to(q0.dtype), k0, acc0 * a[:, None], input_precision="ieee")
        if PIECES > 1:
            acc1 = tl.dot((p * f1[None, :]).to(q0.dtype), k1, acc1 * a[:, None], input_precision="ieee")
        if PIECES > 2:
            acc2 = tl.dot((p * f2[None, :]).to(q0.dtype), k2, acc2 * a[:, None], input_precision="ieee")
            acc3 = tl.dot((p * f3[None, :]).to(q0.dtype), k3, acc3 * a[:, None], input_precision="ieee")
    some = l > 0
    g += split.to(tl.int64) * rows_total
    tl.store(Lse + g, tl.where(some, (m + tl.log2(l)) * 0.6931471805599453, float("-inf")), mask=ok)
    l = tl.where(some, l, 1.) * 256.
    sparse_store_piece(Out, acc0, l, g, ok, D, C, 0)
    if PIECES > 1:
        sparse_store_piece(Out, acc1, l, g, ok, D, C, 1)
    if PIECES > 2:
        sparse_store_piece(Out, acc2, l, g, ok, D, C, 2)
        sparse_store_piece(Out, acc3, l, g, ok, D, C, 3)


# ---------------------------------------------------------------------------------------------------------------------------------------
# Launchers


def sparse_config(H, D, dtype, device):
    """Tiles by shape. BQ: queries that share a list, rows: N of the two-product path and of the backward, two: rows in all (B S H) from which
    the forward takes two products, registers: cap per thread. Tuples: (columns DC,) tokens BN, stages, warps; flash has N in front."""
    if dtype == torch.float32:
        product = (32, 16, 1, 4)
        return dict(BQ=1, rows=16, two=None, registers=None, flash=(16, 16, 1, 4), fp8=(16, 1, 4), fused=None,
                    score=product, product=product, latent=product)
    config = dict(BQ=max(1, min(64 // H, 31)), two=4096 if D > 256 else None, registers=None, fused=None)
    if limits(device)[0] > 160_000:  # data-centre GPUs: A100, H100, B200
        many = H > 64
        config.update(rows=128 if many else 64, flash=(64, 64, 3, 4) if D <= 256 else (64, 32, 3, 8), fp8=(32, 3, 8),
                      score=(32, 128, 4, 8 if many else 4), product=(128, 64, 3, 4), latent=(128, 64, 3, 4))
        if D <= 128:
            config.update(registers=168, fused=(64, 2, 4))
    else:
        config.update(rows=64, flash=(64, 64, 2, 4) if D <= 128 else (32, 32, 2, 4) if D <= 256 else (16, 32, 1, 4), fp8=(16, 2, 4),
                      score=(32, 64, 3, 4), product=(128, 32, 2, 4), latent=(64, 32, 2, 4))
    return config


def sparse_splits(programs, tiles, device):
    """Pieces per list so that few queries still fill the GPU; at least two tiles a piece."""
    return max(1, min(tiles // 2, limits(device)[1] // programs))


def sparse_blocks(H, S, BQ, N):
    """-> heads per program, head groups, queries per block, blocks per sequence."""
    HB = min(H, N)
    BQ = min(BQ, S, N // HB)
    return HB, triton.cdiv(H, HB), BQ, triton.cdiv(S, BQ)


def sparse_forward(q, latents, indices, scale, D, config=None, budget=1 << 30):
    """Latents in q's dtype, D and rope powers of two, or packed FP8 -> out, lse. Wide latents and many rows: two products; else one flash pass."""
    (B, S, H, W), T, K, fp8 = q.shape, latents.shape[1], indices.shape[2], latents.dtype == torch.uint8
    config = config or sparse_config(H, D, q.dtype, q.device)
    values = torch.float8_e4m3fn if q.is_cuda and has_fp8(q.device) else torch.uint8
    views = [latents.view(x) for x in (values, torch.float32, torch.bfloat16)] if fp8 else [latents, latents, latents]
    out, lse = torch.empty(B, S, H, D, device=q.device, dtype=q.dtype), torch.empty(B, S, H, device=q.device)
    even = D % 128 == 0 and W - D >= 16 and (W - D) & (W - D - 1) == 0  # always, but for an odd FP8 cache
    if config["two"] is not None and B * S * H >= config["two"] and even:
        N = config["rows"]
        HB, G, BQ, blocks = sparse_blocks(H, S, 1 if fp8 else config["BQ"], N)
        lists, bits, length = sparse_union(indices, T, BQ)
        width = lists.shape[-1]
        (DC, BN, stages, warps), (DC2, BN2, stages2, warps2) = config["score"], config["product"]
        DC, tiles, size = 128 if fp8 else DC, triton.cdiv(width, BN), latents.shape[-1]
        chunk = max(1, min(B * blocks, budget // (G * width * N * q.element_size())))
        p = torch.empty(chunk, G, width, N, device=q.device, dtype=q.dtype)
        tile_max, tile_sum = torch.empty(2, chunk, G, tiles, N, device=q.device).unbind()
        for first in range(0, B * blocks, chunk):
            n = min(chunk, B * blocks - first) * G
            sparse_score_kernel[(n * tiles,)](
                q, *views, lists, bits, length, q, lse, lse, p, p, tile_max, tile_sum, scale, scale * LOG2E.value, first, S, T, H, blocks, width, tiles,
                True, fp8, size, G, HB, BQ, D, W - D, DC, N, BN, stages, num_warps=warps)
            sparse_product_kernel[(n * (D // DC2),)](
                *views[:2], lists, bits, length, p, out, tile_max, tile_sum, lse, first, S, T, H, blocks, width, tiles,
                True, fp8, size, G, HB, BQ, D, W - D, DC2, N, BN2, BN, stages2, num_warps=warps2)
        return out, lse
    N, BN, stages, warps = config["flash"]
    HB, G, BQ, blocks = sparse_blocks(H, S, 1 if fp8 else config["BQ"], N)
    if fp8:
        N = HB = max(16, min(N, triton.next_power_of_2(H)))
        BN, stages, warps = config["fp8"]
    if S > 8 and not fp8:
        lists, bits, length = sparse_union(indices, T, BQ)
    else:  # decoding: too few queries to share a list, and a kernel less to launch
        BQ, blocks, lists, bits, length = 1, S, indices, indices, None
    N = max(16, min(N, triton.next_power_of_2(HB * BQ)))
    splits = sparse_splits(B * blocks * G, triton.cdiv(K, BN), q.device)
    if splits > 1:
        part, part_lse = torch.empty(splits, B, S, H, D, device=q.device), torch.empty(splits, B, S, H, device=q.device)
    else:
        part, part_lse = out, lse
    if fp8:
        pieces = triton.cdiv(D, 128)
        sparse_forward_fp8_kernel[(B * S, G, splits)](
            q, *views, indices, part, part_lse, scale * LOG2E.value, S, T, H, K, B * S * H, splits, D, W - D, max(16, triton.next_power_of_2(W - D)),
            min(128, max(16, triton.next_power_of_2(D))), 4 if pieces == 3 else pieces, pieces, latents.shape[-1], N, BN, stages, num_warps=warps)
    else:
        sparse_forward_kernel[(B * blocks, G, splits)](
            q, latents, lists, bits, length, part, part_lse, scale * LOG2E.value, S, T, H, blocks, lists.shape[-1], B * S * H, splits,
            HB, BQ, D, W - D, N, BN, stages, num_warps=warps, maxnreg=config["registers"])
    if splits > 1:
        sparse_combine_kernel[(B * S * H,)](part, part_lse, out, lse, B * S * H, splits, D, triton.next_power_of_2(D), num_warps=1)
    return out, lse


def sparse_backward(q, latents, indices, scale, out, lse, dout, config=None, budget=1 << 30):
    """-> dq in q's dtype, dlatents float32. Works through chunks of blocks whose P and dS fit into budget bytes."""
    (B, S, H, W), T, D = q.shape, latents.shape[1], out.shape[-1]
    R, config = W - D, config or sparse_config(H, D, q.dtype, q.device)
    N = config["rows"]
    HB, G, BQ, blocks = sparse_blocks(H, S, config["BQ"], N)
    lists, bits, length = sparse_union(indices, T, BQ)
    width = lists.shape[-1]
    delta, dq, dlatents = torch.empty_like(lse), torch.empty_like(q), torch.zeros(latents.shape, device=q.device)
    sparse_delta_kernel[(triton.cdiv(lse.numel(), 16),)](out, dout, delta, lse.numel(), D, triton.next_power_of_2(D), 16)
    chunk = max(1, min(B * blocks, budget // (2 * G * width * N * q.element_size())))
    p, ds = torch.empty(2, chunk, G, width, N, device=q.device, dtype=q.dtype).unbind()
    for first in range(0, B * blocks, chunk):
        n = min(chunk, B * blocks - first) * G
        if config["fused"]:
            BN, stages, warps = config["fused"]
            sparse_score_query_kernel[(n,)](q, latents, lists, bits, length, dout, lse, delta, p, ds, dq, scale, scale * LOG2E.value, first,
                                            S, T, H, blocks, width, G, HB, BQ, D, R, N, BN, stages, num_warps=warps)
        else:
            DC, BN, stages, warps = config["score"]
            tiles = triton.cdiv(width, BN)
            sparse_score_kernel[(n * tiles,)](
                q, latents, latents, latents, lists, bits, length, dout, lse, delta, p, ds, lse, lse, scale, scale * LOG2E.value, first,
                S, T, H, blocks, width, tiles, False, False, 0, G, HB, BQ, D, R, min(DC, D), N, BN, stages, num_warps=warps)
            DC, BN, stages, warps = config["product"]
            DC = min(DC, D)
            sparse_product_kernel[(n * (D // DC + 1),)](
                latents, latents, lists, bits, length, ds, dq, lse, lse, lse, first, S, T, H, blocks, width, tiles,
                False, False, W, G, HB, BQ, D, R, DC, N, BN, BN, stages, num_warps=warps)
        DC, BN, stages, warps = config["latent"]
        DC = min(DC, D)
        sparse_latent_grad_kernel[(n * (D // DC + (D > DC)),)](
            q, dout, lists, bits, length, p, ds, dlatents, first, S, T, H, blocks, width, G, HB, BQ, D, R, DC, N, BN, stages, num_warps=warps)
    return dq, dlatents


def sparse_pad(x, D, DP, RP):
    """Columns [D | R] -> [DP | RP], zeros between."""
    return x if x.shape[-1] == DP + RP else torch.cat((F.pad(x[..., :D], (0, DP - D)), F.pad(x[..., D:], (0, RP - x.shape[-1] + D))), -1)


def sparse_hopper(q, latents, indices, value_dim):
    """kernels_hopper where its kernels take these arguments (sm_90, the published latents, many heads), else None."""
    hopper = hopper_kernels(q)
    return hopper if hopper and hopper.supported(q, latents, indices, value_dim) else None


class SparseAttention(torch.autograd.Function):
    """sparse_attention with its backward; sizes padded to powers of two on the way in, cropped on the way out."""

    @staticmethod
    def forward(ctx, q, latents, indices, scale, value_dim):
        DP, RP = max(16, triton.next_power_of_2(value_dim)), max(16, triton.next_power_of_2(q.shape[-1] - value_dim))
        hopper = sparse_hopper(q, latents, indices, value_dim)
        if hopper:
            out, lse = hopper.sparse_forward(q, latents, indices, scale)
        else:
            out, lse = sparse_forward(sparse_pad(q, value_dim, DP, RP), sparse_pad(latents, value_dim, DP, RP), indices, scale, DP)
        ctx.save_for_backward(q, latents, indices, out, lse)
        ctx.sizes = scale, value_dim, DP, RP
        ctx.mark_non_differentiable(lse)
        return out[..., :value_dim], lse

    @staticmethod
    def backward(ctx, dout, _):
        (q, latents, indices, out, lse), (scale, D, DP, RP) = ctx.saved_tensors, ctx.sizes
        hopper = sparse_hopper(q, latents, indices, D)
        if hopper:
            dq, dlatents = hopper.sparse_backward(q, latents, indices, out, lse, dout, scale)
            return dq, dlatents.to(latents.dtype), None, None, None
        dout = (F.pad(dout, (0, DP - D)) if DP > D else dout).contiguous()
        dq, dlatents = sparse_backward(sparse_pad(q, D, DP, RP), sparse_pad(latents, D, DP, RP), indices, scale, out, lse, dout)
        R = q.shape[-1] - D
        crop = lambda x: x if DP + RP == D + R else torch.cat((x[..., :D], x[..., DP:DP + R]), -1)
        return crop(dq), crop(dlatents).to(latents.dtype), None, None, None


def sparse_attention(q, latents, indices, scale, value_dim):
    """Softmax attention over the selected tokens only, MQA mode   (paper eq. 2)

    q (B,S,H,D) with W^UK absorbed, latents (B,T,D) = [c^KV ; k^R] (used in q's dtype) or a packed FP8 cache (B,T,bytes) uint8 (forward only),
    indices (B,S,K) int32, -1 = empty place -> out (B,S,H,value_dim) in q's dtype, lse (B,S,H) float32, natural logarithm, not differentiated.
    A row with nothing selected: out 0, lse -inf, gradient 0. Differentiable in q and latents; dlatents is summed in float32 by atomics, so
    its last bits vary from run to run. Memory beyond outputs: 8 bytes x B S K (lists), at most 1 GB for P and dS, 4 bytes x B T D (dlatents).
    ValueError: shapes or dtypes that do not fit."""
    (B, S, H, D), packed = q.shape, latents.dtype == torch.uint8
    entry = value_dim + 4 * triton.cdiv(value_dim, 128) + 2 * (D - value_dim) if packed else D
    if not 0 < value_dim <= D:
        raise ValueError(f"value_dim={value_dim} should lie within 1..{D}, the width of q")
    if packed and (entry % 4 or value_dim % 4 or value_dim > 512):
        raise ValueError(f"an FP8 cache takes a value_dim that is a multiple of 4 up to 512, and entries of 4 n bytes, not {value_dim} and {entry}")
    fit(latents=(latents, (B, latents.shape[1], entry)), indices=(indices, (B, S, indices.shape[-1])))
    if indices.dtype != torch.int32:
        raise ValueError(f"indices are int32, not {indices.dtype}: pass indices.int()")
    q, latents, indices = q.contiguous(), latents.contiguous(), indices.contiguous()
    if packed:
        hopper = sparse_hopper(q, latents, indices, value_dim)
        if hopper and B * S * triton.cdiv(H, 64) >= limits(q.device)[1] // 2:  # fewer: only lists in pieces fill the GPU
            return hopper.sparse_forward(q, latents, indices, scale)
        return sparse_forward(q, latents, indices, scale, value_dim)
    return SparseAttention.apply(q, latents.to(q.dtype), indices, scale, value_dim)


# temporary: the names of the rewritten chapter
union = sparse_union
union_tokens = sparse_tokens
