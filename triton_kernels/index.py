"""Chapter 1: the lightning indexer."""
import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from triton_kernels.common import fit, has_fp8, limits

SELECT_CHUNK = 2**28  # scores that `select` holds at a time: 1 GB; less makes more chunks, each with a tail of idle processors
SELECT_DIRECT = 2048  # keys up to which a row is its own candidate list
SELECT_FILTER = 256, 32768, 8192, 64, 1024  # `select` filters from so many queries, keys, keys per indexer head and per topk on, up to so large a topk
# quantise ---------------------------------------------------------------------------------------------------------------------------
# y = H x (optional; H the orthonormal Walsh-Hadamard matrix), scale = max(amax |y|, 1e-4) / 448 [rounded up to 2^n], value = e4m3(y / scale)
# A program takes ROWS vectors, all d elements of them; a butterfly splits and joins a length-2 dimension, in registers.
# e4m3 is rounded with integers, not with a cast: the same bits on every GPU (below sm_89 there is no such cast) and in the interpreter.
# Bytes: reads d elements, writes d bytes and 4 per block; operations ~25 d: bound by memory.

@triton.jit
def _quantise_kernel(X, V, SC, R, d, root, ROWS: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr, NB: tl.constexpr, LOG: tl.constexpr,
                     ROTATE: tl.constexpr, UE8M0: tl.constexpr):
    r = tl.program_id(0).to(tl.int64)*ROWS + tl.arange(0, ROWS); j = tl.arange(0, D)
    mask = (r < R)[:, None] & (j < d)[None, :]
    x = tl.load(X + r[:, None]*d + j[None, :], mask=mask, other=0.0)
    if ROTATE:
        y = x.to(tl.float32)
        for i in tl.static_range(LOG):
            a, b = tl.split(tl.permute(tl.reshape(y, [ROWS, D >> (i + 1), 2, 1 << i]), [0, 1, 3, 2]))
            y = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 1, 3, 2]), [ROWS, D])
        x = (y*root).to(x.dtype)
    y = tl.reshape(x.to(tl.float32), [ROWS, D // BLOCK, BLOCK])
    scale = tl.maximum(tl.max(tl.abs(y), 2), 1e-4)*(1/448)                                  # [ROWS, D // BLOCK]
    if UE8M0:
        u = scale.to(tl.int32, bitcast=True)
        scale = ((u + 0x7fffff) & 0x7f800000).to(tl.float32, bitcast=True)
    nb = tl.arange(0, D // BLOCK)
    tl.store(SC + r[:, None]*NB + nb[None, :], scale, mask=(r < R)[:, None] & (nb < NB)[None, :])
    y = tl.reshape(tl.minimum(tl.maximum(tl.div_rn(y, tl.broadcast_to(scale[:, :, None], y.shape)), -448.0), 448.0), [ROWS, D])
    u = y.to(tl.int32, bitcast=True); m = u & 0x7fffffff
    normal = ((m + 0x7ffff + ((m >> 20) & 1)) >> 20) - (120 << 3)                            # exponent bias 127 -> 7, 3 bits of mantissa, to nearest even
    tiny = (m.to(tl.float32, bitcast=True) + 16384.0).to(tl.int32, bitcast=True) - 0x46800000  # below 2^-6: units of 2^-9, the last place of 2^14
    e4m3 = tl.where(m < 0x3c800000, tiny, normal) | ((u >> 24) & 0x80)
    tl.store(V + r[:, None]*d + j[None, :], e4m3.to(tl.uint8), mask=mask)


def quantise(x, block=128, rotate=False, ue8m0=True):
    """x (..., d) float -> values (..., d) float8_e4m3fn, scales (..., ceil(d / block)) float32; x is close to values * scale of its block.

    amax clamped at 1e-4, scale = amax * float32(1/448), ue8m0: rounded up to a power of two (act_quant of the V3.2-Exp inference code).
    rotate: the orthonormal Walsh-Hadamard transform of the last dimension first, rounded to x's dtype. Bit-equal to indexer.quantise.
    ValueError: rotate with a d that is no power of two; a smaller block that is none."""
    d = x.shape[-1]
    if rotate and d & (d - 1):
        raise ValueError(f"index_head_dim={d} is no power of two, which the Hadamard rotation needs; choose 32, 64 or 128")
    x = x.contiguous()
    block = min(block, d); nb = triton.cdiv(d, block); R = x.numel() // d
    pad = triton.next_power_of_2(block)
    if pad != block and nb > 1:
        raise ValueError(f"block={block} is no power of two and smaller than d={d}; choose 32, 64 or 128")
    D = pad*triton.next_power_of_2(nb)
    values = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    scales = torch.empty((*x.shape[:-1], nb), dtype=torch.float32, device=x.device)
    rows = max(1, min(4096 // D, triton.next_power_of_2(max(1, R // (4*limits(x.device)[1])))))
    if R:
        _quantise_kernel[(triton.cdiv(R, rows),)](x, values.view(torch.uint8), scales, R, d, d**-0.5, rows, D, pad, nb, D.bit_length() - 1,
                                                  rotate, ue8m0, num_warps=4 if rows*D >= 2048 else 1)
    return values, scales


# index scores -----------------------------------------------------------------------------------------------------------------------
# I[t,s] = k_scale[s] * sum_j w[t,j] relu(q[t,j] . k[s])
# A program keeps BQ queries x HP heads (up to 256 columns) and streams SPAN keys in tiles of BK: tl.dot(keys, queries^T) has the keys as rows,
# and the columns are dealt so that relu, weight and the sum over heads stay inside a thread. Tiles that none of its queries sees are skipped
# (-inf with FILL; without it, what a query does not see is left undefined). BITS: two bits per pair instead of a score, for `select`.
# WHOLE: no tile reaches beyond k, and nothing is masked. On Hopper instructions are the limit, and the power they take: masks count.
# Operations: 2 HI dI per pair on the tensor cores and 2 HI (max, fma) beside them; bytes: 4 (BITS: 1/4) per pair, keys once per BQ queries (L2).

@triton.jit
def _e4m3_to_fp16(x):
    """e4m3 bits (uint8) -> the same value in fp16 (exact): for GPUs without FP8"""
    b = x.to(tl.int16)
    return (((b & 0x80) << 8) | ((b & 0x7f) << 7)).to(tl.float16, bitcast=True)*256.0


@triton.jit
def _select_bounds(FIRST, LAST, at, i, S, T, ok, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr):
    """first and last visible position of query i (at: its place in FIRST and LAST), clamped to 0..T-1"""
    first = tl.minimum(i, 0); last = T - S + i
    if HAS_FIRST: first = tl.maximum(tl.load(FIRST + at, mask=ok, other=0), 0)
    if HAS_LAST: last = tl.minimum(tl.load(LAST + at, mask=ok, other=-1), T - 1)
    return first, last


@triton.jit
def _columns(BQ: tl.constexpr, HP: tl.constexpr):
    """query, head of each column. Of every 8 columns of a tensor core's result a thread holds two, 2l and 2l+1: l is the query, the rest its heads"""
    L: tl.constexpr = max(1, min(4, BQ, 128 // HP))
    c = tl.arange(0, BQ*HP)
    return c // (L*HP)*L + c // 2 % L, c // (2*L) % (HP // 2)*2 + c % 2


@triton.jit
def _score(k, q, w, BQ: tl.constexpr, HP: tl.constexpr, DECODE_E4M3: tl.constexpr):
    """sum_j w_j relu(k . q_j) of keys k (n, DP) and columns q (BQ*HP, DP), w -> (n, BQ)"""
    L: tl.constexpr = max(1, min(4, BQ, 128 // HP))
    if DECODE_E4M3: k = _e4m3_to_fp16(k)
    x = tl.dot(k, tl.trans(q), input_precision="tf32x3")
    x = tl.maximum(x, 0.0)*w[None, :]
    x = tl.permute(tl.reshape(x, [k.shape[0], BQ // L, HP // 2, L, 2]), [0, 1, 3, 2, 4])
    return tl.sum(tl.reshape(x, [k.shape[0], BQ, HP]), 2)


@triton.jit
def _scores_kernel(Q, K, W, KS, TH, FIRST, LAST, OUT, S, T, LD, row0, ROWS, SPAN, HI, dI, skb, skt, ssb, sst, BQ: tl.constexpr, HP: tl.constexpr,
                   DP: tl.constexpr, BK: tl.constexpr, HAS_KS: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
                   DECODE_E4M3: tl.constexpr, FILL: tl.constexpr, BITS: tl.constexpr, WHOLE: tl.constexpr):
    b = tl.program_id(2).to(tl.int64); tile = tl.program_id(0)*BQ; end = tl.minimum(row0 + ROWS, S)
    i, h = _columns(BQ, HP); i += row0 + tile; d = tl.arange(0, DP)
    okc = (i < end) & (h < HI); at = (b*S + i)*HI + h
    q = tl.load(Q + at[:, None]*dI + d[None, :], mask=okc[:, None] & (d < dI)[None, :], other=0.0)     # [BQ*HP, DP]
    w = tl.load(W + at, mask=okc, other=0.0)
    if DECODE_E4M3: q = _e4m3_to_fp16(q)
    r = tl.arange(0, BQ); i = row0 + tile + r; ok = i < end
    first, last = _select_bounds(FIRST, LAST, b*S + i, i, S, T, ok, HAS_FIRST, HAS_LAST)
    sees = ok & (first <= last)
    begin = tl.program_id(1)*SPAN; stop = tl.minimum(begin + SPAN, T)
    lo = tl.maximum(tl.min(tl.where(sees, first, T), 0) // BK*BK, begin); hi = tl.minimum(tl.max(tl.where(sees, last + 1, 0), 0), stop)
    out = OUT + (b*ROWS + tile + r)*LD                                                                  # [BQ]
    s_ = tl.arange(0, BK)
    if BITS:
        limit = tl.load(TH + b*ROWS + tile + r, mask=ok, other=0.0)
        words = OUT + (b*tl.num_programs(0) + tl.program_id(0))*LD*BQ + r[None, :]*(BK // 16) + tl.arange(0, BK // 16)[:, None]
    if FILL:
        none = tl.full([BK, BQ], float("-inf"), tl.float32)
        for s0 in range(begin, tl.minimum(lo, stop), BK):
            tl.store(out[None, :] + (s0 + s_)[:, None], none, mask=ok[None, :] & (s0 + s_ < stop)[:, None])
        for s0 in range(tl.maximum(begin, lo + tl.cdiv(tl.maximum(hi - lo, 0), BK)*BK), stop, BK):
            tl.store(out[None, :] + (s0 + s_)[:, None], none, mask=ok[None, :] & (s0 + s_ < stop)[:, None])
    if HAS_KS: scale = tl.load(KS + b*ssb + (lo + s_).to(tl.int64)*sst, mask=lo + s_ < T, other=0.0)
    for s0 in tl.range(lo, hi, BK):
        s = s0 + s_; oks = s < T; p = K + b*skb + s.to(tl.int64)[:, None]*skt + d[None, :]
        if WHOLE: k = tl.load(p)
        else: k = tl.load(p, mask=oks[:, None] & (d < dI)[None, :], other=0.0)
        score = _score(k, q, w, BQ, HP, DECODE_E4M3)                                                      # [BK, BQ]
        if HAS_KS:
            score = score*scale[:, None]
            scale = tl.load(KS + b*ssb + (s + BK).to(tl.int64)*sst, mask=s + BK < T, other=0.0)           # of the next tile: no one waits for it
        if BITS:
            bit = (1 << (s_ % 16))[:, None]
            bits = tl.where(score > limit[None, :], bit | (bit << 16), tl.where(score >= limit[None, :], bit, 0))
            tl.store(words + s0 // 16*BQ, tl.sum(tl.reshape(bits, [BK // 16, 16, BQ]), 1))
        else:
            if FILL: score = tl.where((s[:, None] >= first[None, :]) & (s[:, None] <= last[None, :]), score, float("-inf"))
            tl.store(out[None, :] + s[:, None], score, mask=ok[None, :] & oks[:, None])


def _scores_tiles(q, rows):
    """-> BQ, HP, DP, BK, emulate e4m3, warps, stages"""
    HI, dI = q.shape[2:]
    fp8 = q.dtype == torch.float8_e4m3fn
    emulate = fp8 and q.is_cuda and not has_fp8(q.device)
    size = 2 if emulate else q.element_size()
    HP = max(2, triton.next_power_of_2(HI)); DP = max(32 if size == 1 else 16, triton.next_power_of_2(dI))
    columns = max(HP, 256 if size*DP <= 128 else 256 // size)
    BQ = max(16 // HP, 1, min(columns // HP, triton.next_power_of_2(rows)))
    BK = 32 if size == 4 and limits(q.device)[0] < 140*1024 else 64                                            # float32 tiles of 64 keys need 135 KB
    return BQ, HP, DP, BK, emulate, 8 if BQ*HP == 256 else 4, 4 if size == 1 else 3


def _scores_into(out, q, k, w, k_scale, first, last, row0, rows, LD, fill=False, threshold=None):
    """out (B,rows,LD >= T): scores of the queries row0..row0+rows; without fill, what a query does not see is undefined. With threshold (B,rows):
    bits of the comparison, a word per 16 keys, LD words per query -> BQ, BK: stored as (B, tile of BQ queries, tile of BK keys, query, word)"""
    (B, S, HI, dI), T = q.shape, k.shape[1]
    BQ, HP, DP, BK, emulate, warps, stages = _scores_tiles(q, rows)
    if emulate: q, k = q.view(torch.uint8), k.view(torch.uint8)
    tiles = triton.cdiv(rows, BQ)
    span = triton.cdiv(B*tiles*T, 16*limits(q.device)[1])
    span = min(max(triton.cdiv(span, BK)*BK, 256), 8192)
    _scores_kernel[(tiles, triton.cdiv(T, span), B)](
        q, k, w, *(w if x is None else x for x in (k_scale, threshold, first, last)), out, S, T, LD, row0, rows, span, HI, dI, *k.stride()[:2],
        *((0, 0) if k_scale is None else k_scale.stride()), BQ, HP, DP, BK, k_scale is not None, first is not None, last is not None, emulate, fill,
        threshold is not None, T % BK == 0 and dI == DP, num_warps=warps, num_stages=stages)
    return BQ, BK


def _select_inputs(q, k, w, k_scale, first, last):
    """check, and make contiguous what the kernels address without strides"""
    if q.dtype != k.dtype:
        raise ValueError(f"q is {q.dtype} but k is {k.dtype}: quantise both or neither")
    if (q.dtype == torch.float8_e4m3fn) != (k_scale is not None):
        raise ValueError(f"k is {k.dtype} and k_scale is {'given' if k_scale is not None else 'None'}: e4m3 keys need their scales, float keys have none")
    (B, S, HI, dI), T = q.shape, k.shape[1]
    fit(k=(k, (B, T, dI)), w=(w, (B, S, HI)), k_scale=(k_scale, (B, T)))
    bounds = [None if x is None else x.expand(B, S).int().contiguous() for x in (first, last)]
    return q.contiguous(), k if k.stride(2) == 1 else k.contiguous(), w.float().contiguous(), k_scale, *bounds


def index_scores(q, k, w, k_scale=None, first=None, last=None):
    """I[t,s] = k_scale[s] sum_j w[t,j] relu(q[t,j] . k[s])   (DeepSeek-V3.2-Exp, eq. 1)

    q (B,S,HI,dI), k (B,T,dI) both bf16/fp16/fp32, or both e4m3 with k_scale (B,T) float32; w (B,S,HI) float32 with HI^-1/2 dI^-1/2 (and q's scale) in it.
    first, last (B,S) int32: the visible range, None: 0 and T - S + i. -> (B,S,T) float32, -inf where not visible. ValueError: types or shapes that don't fit."""
    q, k, w, k_scale, first, last = _select_inputs(q, k, w, k_scale, first, last)
    out = torch.empty(q.shape[0], q.shape[1], k.shape[1], dtype=torch.float32, device=q.device)
    _scores_into(out, q, k, w, k_scale, first, last, 0, q.shape[1], k.shape[1], fill=True)
    return out


# select -----------------------------------------------------------------------------------------------------------------------------
# S_t = the K highest of I[t, first..last]; ties to the lower position; ascending.
# Rows of queries go in chunks: scores of a chunk (above), then one program per row finds its K best, exactly, in one reading of the row:
#   guess   a threshold t from a sample spread over the row, such that K..CAP scores reach it mostly (else: another guess)
#   gather  a bit per score: reaches t? Then a scan over the popcounts of the words, and each word writes its positions to its place, in order
#   finish  the exact K-th value among these candidates by counting, then ranks by one scan: the higher ones and the first ties.
# A row of at most CAP visible scores is its own candidate list. Many ties of t: t is the K-th value, and the row is walked once more.
# Bytes: 4 per score written and read once; operations ~6 per score, ~15 counts of sample and candidates: these bound it, not the bytes.

@triton.jit
def _ordered(x):
    """float32 -> int32 of the same order; -0.0 counts as 0.0"""
    i = (x + 0.0).to(tl.int32, bitcast=True)
    return tl.where(i < 0, i ^ 0x7fffffff, i)


@triton.jit
def _popcount(x):
    x = x - ((x >> 1) & 0x55555555)
    x = (x & 0x33333333) + ((x >> 2) & 0x33333333)
    x = (x + (x >> 4)) & 0x0f0f0f0f
    return ((x*0x01010101) >> 24) & 0xff


@triton.jit
def _kth(v, k, lo, hi, clo, slack):
    """A t in [lo, hi] with k <= count(v >= t) <= k + slack if there is one, else (ties) the largest t with count(v >= t) >= k;
    given count(v >= lo) = clo >= k and no v above hi. First t = 0, where relu makes ties, then regula falsi and bisection in turn."""
    chi = clo*0; turn = clo*0
    if (lo < 1) & (hi >= 1):                                                                            # afterwards hi - lo fits int32
        c = tl.sum((v >= 1).to(tl.int32), 0)
        if c >= k:
            lo = lo*0 + 1; clo = c
        else:
            hi = hi*0; chi = c
            c = tl.sum((v >= 0).to(tl.int32), 0)
            if c >= k:
                lo = lo*0; clo = c
            else:
                hi = hi*0 - 1; chi = c
    if clo <= k + slack: hi = lo
    while lo < hi:
        step = (hi - lo) >> 1
        if turn == 0: step = ((hi - lo).to(tl.float32)*((clo - k).to(tl.float32)/(clo - chi).to(tl.float32))).to(tl.int32)
        mid = lo + 1 + tl.minimum(step, hi - lo - 1)
        c = tl.sum((v >= mid).to(tl.int32), 0)
        if c >= k:
            lo = mid; clo = c
            if c <= k + slack: hi = mid
        else:
            hi = mid - 1; chi = c
        turn = 1 - turn
    return lo


@triton.jit
def _gather(x, bitmap, scratch, first, last, LD, tf, CAP, WORDS: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr):
    """Positions of x[first..last] >= tf, ascending, to scratch (the first CAP of them) -> how many there are. 32 WORDS positions at a time."""
    bit = tl.arange(0, 32)[None, :]; group = tl.arange(0, TILE//32); total = first*0
    for start in range(first // TILE*TILE, last + 1, 32*WORDS):
        for s in range(start, tl.minimum(start + 32*WORDS, last + 1), TILE):
            p = tl.multiple_of(s, TILE) + group[:, None]*32 + bit                                       # [TILE/32, 32]
            if MASKED: v = tl.load(x + p, mask=p < LD, other=float("-inf"))
            else: v = tl.load(x + p)
            tl.store(bitmap + (s - start)//32 + group, tl.sum(tl.where(v >= tf, 1, 0) << bit, 1))
        tl.debug_barrier()
        p = start + tl.arange(0, WORDS)*32; ok = p <= last
        word = tl.load(bitmap + tl.arange(0, WORDS), mask=ok, other=0, cache_modifier=".cg")
        word &= tl.where(p < first, -2 << tl.minimum(tl.maximum(first - p - 1, 0), 31), -1)
        word &= (2 << tl.minimum(tl.maximum(last - p, 0), 31)) - 1
        count = _popcount(word); place = total + tl.cumsum(count, 0) - count; total += tl.sum(count, 0)
        for i in range(tl.max(count, 0)):
            low = word & -word
            j = ((low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) & 255) - 127                     # which bit: the exponent
            tl.store(scratch + place, p + j, mask=(word != 0) & (place < CAP))
            word &= word - 1; place += 1
        tl.debug_barrier()
    return total


@triton.jit
def _emit(out, p, c, ok, v, K, gt0, tie0, need, WIDE: tl.constexpr):
    """Write the positions p (ascending) with c > v and the first `need` with c == v, after gt0 and tie0 of them before these -> gt, ties"""
    gt = ((c > v) & ok).to(tl.int32); tie = ((c == v) & ok).to(tl.int32)
    if WIDE: both = tl.cumsum((gt.to(tl.int64) << 32) + tie, 0)
    else: both = tl.cumsum((gt << 16) + tie, 0)
    higher = gt0 + (both >> (32 if WIDE else 16)).to(tl.int32) - gt                                     # exclusive ranks
    equal = tie0 + (both & (0xffffffff if WIDE else 0xffff)).to(tl.int32) - tie
    at = higher + tl.minimum(equal, need)
    tl.store(out + at, p, mask=((gt != 0) | ((tie != 0) & (equal < need))) & (at < K))
    return gt0 + tl.sum(gt, 0), tie0 + tl.sum(tie, 0)


@triton.jit
def _finish(out, p, c, ok, tot, K, WIDE: tl.constexpr):
    """Write those of the positions p that have the K highest of the `tot` values c (where ok; elsewhere they are -2^31)"""
    t = _kth(c, K, tl.min(tl.where(ok, c, 2147483647), 0), tl.max(c, 0), tot, tot*0)
    _emit(out, p, c, ok, t, K, tot*0, tot*0, K - tl.sum((c > t).to(tl.int32), 0), WIDE)


@triton.jit
def _topk_kernel(X, FIRST, LAST, OUT, SCRATCH, NROW, S, T, LD, row0, ROWS, K, KP: tl.constexpr, CAP: tl.constexpr, SAMPLE: tl.constexpr,
                 WORDS: tl.constexpr, TILE: tl.constexpr, DIRECT: tl.constexpr, MASKED: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr,
                 WIDE: tl.constexpr):
    kp = tl.arange(0, KP); jc = tl.arange(0, CAP); js = tl.arange(0, SAMPLE)
    scratch = SCRATCH + tl.program_id(0)*(CAP + WORDS + 1); bitmap = scratch + CAP  # odd: one element a thread in every layout, nothing to convert
    for turn in range(tl.cdiv(NROW - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + turn*tl.num_programs(0)
        i = row0 + row % ROWS; at = (row // ROWS).to(tl.int64)*S + i
        first, last = _select_bounds(FIRST, LAST, at, i, S, T, i < S, HAS_FIRST, HAS_LAST)
        n = tl.maximum(last - first + 1, 0); x = X + row.to(tl.int64)*LD; out = OUT + at*K
        if n <= K:
            tl.store(out + kp, tl.where(kp < n, first + kp, -1), mask=kp < K)
        else:
            tot = n; v = n*0; walk = n*0
            if not DIRECT:
                if n > CAP:
                    lo = n*0 - 2139095041; hi = n*0 + 2139095040; tries = n*0; done = n*0               # lo, hi: -inf, inf
                    mean = SAMPLE*(K/n); rank = tl.minimum(mean + 4*tl.sqrt(mean) + 3, SAMPLE*0.9)
                    while done == 0:
                        if tries < 3:
                            sp = first + ((js // 8).to(tl.int64)*(n - 8) // (SAMPLE // 8)).to(tl.int32) + js % 8  # runs of 8: memory reads no less
                            s = _ordered(tl.load(x + sp)); r = rank.to(tl.int32)
                            v = _kth(s, r, tl.min(s, 0), tl.max(s, 0), n*0 + SAMPLE, r // 16)
                        else:
                            v = (lo & hi) + ((lo ^ hi) >> 1)
                        v = tl.minimum(tl.maximum(v, lo), hi)
                        tf = tl.where(v < 0, v ^ 0x7fffffff, v).to(tl.float32, bitcast=True)
                        tot = _gather(x, bitmap, scratch, first, last, LD, tf, CAP, WORDS, TILE, MASKED)
                        above = tot
                        if tot > CAP:
                            above = n*0
                            for j in range(0, n, SAMPLE):
                                above += tl.sum((tl.load(x + first + j + js, mask=j + js < n, other=float("-inf")) > tf).to(tl.int32), 0)
                        if (tot >= K) & (tot <= CAP):
                            done += 1
                        else:
                            if tot < K: hi = v - 1
                            else: lo = v + 1
                            if ((tot > CAP) & (above < K)) | (lo > hi):
                                done += 1; walk += 1
                            rank = tl.minimum(tl.maximum(rank*((K + CAP)*0.5/(tot + 1)), 1.0), SAMPLE*0.9); tries += 1
                    tl.debug_barrier()
            if walk == 0:
                ok = jc < tot; p = first + jc
                if not DIRECT:
                    if n > CAP: p = tl.load(scratch + jc, mask=ok, other=0, cache_modifier=".cg")
                c = tl.where(ok, _ordered(tl.load(x + p, mask=ok, other=0.0)), -2147483648)
                _finish(out, p, c, ok, tot, K, WIDE)
            if not DIRECT:
                if walk != 0:
                    if v == -1: v = n*0                                                                 # -0.0 as a float, by which it was gathered: 0
                    higher = n*0; equal = n*0; gt = n*0
                    for j in range(0, n, CAP):
                        c = _ordered(tl.load(x + first + j + jc, mask=j + jc < n, other=0.0))
                        gt += tl.sum(((c > v) & (j + jc < n)).to(tl.int32), 0)
                    for j in range(0, n, CAP):
                        c = _ordered(tl.load(x + first + j + jc, mask=j + jc < n, other=0.0))
                        higher, equal = _emit(out, first + j + jc, c, j + jc < n, v, K, higher, equal, tl.maximum(K - gt, 0), WIDE)
                    filled = higher + tl.minimum(equal, tl.maximum(K - gt, 0))                          # less than K only if there are NaNs
                    tl.store(out + kp, kp*0 - 1, mask=(kp >= filled) & (kp < K))
                tl.debug_barrier()                                                                      # scratch is used again


def _topk_into(out, scores, T, first, last, row0, rows, LD):
    """out (B,S,K)[:, row0:row0+rows] = top-k of scores (B,rows,LD >= T)"""
    B, S, K = out.shape
    direct, sample = T <= SELECT_DIRECT, 1024 if T <= 16384 else 2048 if T <= 65536 else 8192
    mean = sample*min(K, T)/T; rank = mean + 4*mean**0.5 + 3                                            # as in the kernel, for its longest rows
    cap = triton.next_power_of_2(T if direct else max(1024, int((rank + 2.5*rank**0.5)*T/sample)))
    sms = limits(out.device)[1]; small = cap <= 2048 and B*rows > 2*sms                                 # few rows: none of them should take long
    warps, tile = (max(1, cap // 1024), 4096) if direct else (4, 2048) if small else (max(8, min(32, cap // 512)), 4096)
    programs, words = min(B*rows, sms*(32 // warps)), 512 if T <= 16384 else 1024
    scratch = torch.empty(1 if direct else programs*(cap + words + 1), dtype=torch.int32, device=out.device)
    _topk_kernel[(programs,)](scores, out if first is None else first, out if last is None else last, out, scratch, B*rows, S, T, LD, row0, rows, K,
                              triton.next_power_of_2(K), cap, sample, words, tile, direct, LD % tile != 0, first is not None, last is not None, cap > 32768,
                              num_warps=warps, maxnreg=64)


def topk(scores, topk, first=None, last=None):
    """Selection from scores that exist: scores (B,S,T) float32 -> (B,S,topk) int32, as `select`. ValueError: topk < 1."""
    if topk < 1:
        raise ValueError(f"topk={topk}: select at least one token")
    B, S, T = scores.shape
    first, last = [None if x is None else x.expand(B, S).int().contiguous() for x in (first, last)]
    out = torch.empty(B, S, topk, dtype=torch.int32, device=scores.device)
    _topk_into(out, scores.contiguous(), T, first, last, 0, S, T)
    return out


# select, filtered -------------------------------------------------------------------------------------------------------------------
# The same set for many queries of few heads over long contexts, where above all the scores' way through memory costs. Scores are computed, not kept:
#   threshold  a row's threshold t from its scores of every STRIDE-th key, so that K..CAP scores exceed it nearly always (about 1.5 K do)
#   filter     all scores once more, of which two bits remain: > t, >= t
#   collect    a program per row: positions of the bits > t; if these are K..CAP, their scores again from gathered keys, and the exact K best.
#              Fewer than K, but K with the ties of t: then t is the K-th value, and the bits are the answer. Neither: BAD, for the path above.
# How the scores of the last step are rounded does not matter: the filter alone decides the candidates, the last step alone their order.
# Bytes: 1/4 per pair, 4/STRIDE for the sample, ~2 K gathered keys per row; operations: those of the scores, once.

@triton.jit
def _threshold_kernel(X, FIRST, LAST, TH, S, T, LD, row0, ROWS, K, STRIDE, SAMPLE: tl.constexpr, HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr):
    row = tl.program_id(0); i = row0 + row % ROWS
    first, last = _select_bounds(FIRST, LAST, (row // ROWS).to(tl.int64)*S + i, i, S, T, i < S, HAS_FIRST, HAS_LAST)
    t = first*0 - 2139095041                                                                            # -inf: all are candidates
    if last - first >= K:
        lo = tl.cdiv(first, STRIDE); n = last // STRIDE - lo + 1
        mean = n*(K/(last - first + 1)); rank = (mean + 3.5*tl.sqrt(mean) + 3).to(tl.int32)
        if rank < n:
            j = tl.arange(0, SAMPLE)
            v = _ordered(tl.load(X + row.to(tl.int64)*LD + lo + j, mask=j < n, other=float("-inf")))
            t = _kth(v, rank, tl.min(tl.where(j < n, v, 2147483647), 0), tl.max(v, 0), n, rank // 16)
    tl.store(TH + row, tl.where(t < 0, t ^ 0x7fffffff, t).to(tl.float32, bitcast=True))


@triton.jit
def _places(dst, words, first, last, need, LIMIT, BQ, W: tl.constexpr):
    """Positions first..last whose score is > t, with the first `need` ties, ascending, to dst (the first LIMIT) -> how many are > t, = t"""
    gt0 = first*0; tie0 = first*0
    for j0 in range(first // 16, last // 16 + 1, 1024):
        j = j0 + tl.arange(0, 1024); p = j*16
        word = tl.load(words + j // W*(W*BQ) + j % W, mask=p <= last, other=0)
        seen = (0xffff << tl.minimum(tl.maximum(first - p, 0), 16)) & (0xffff >> tl.minimum(tl.maximum(p + 15 - last, 0), 16))
        gt = (word >> 16) & seen; tie = word & seen & ~gt
        count = (_popcount(gt) << 16) + _popcount(tie)                                                  # at most 16384 of each
        before = tl.cumsum(count, 0) - count; count = tl.sum(count, 0)
        equal = tie0 + (before & 0xffff); at = gt0 + (before >> 16) + tl.minimum(equal, need)
        word = gt | tl.where(equal < need, tie, 0)
        for i in range(tl.max(_popcount(word), 0)):
            low = word & -word; tied = ((low & tie) != 0).to(tl.int32)
            ok = (word != 0) & ((tied == 0) | (equal < need))
            tl.store(dst + at, p + (low.to(tl.float32).to(tl.int32, bitcast=True) >> 23) - 127, mask=ok & (at < LIMIT))
            at += ok.to(tl.int32); equal += tied; word &= word - 1
        gt0 += count >> 16; tie0 += count & 0xffff
    return gt0, tie0


@triton.jit
def _collect_kernel(Q, K, W, KS, FIRST, LAST, BITS, OUT, BAD, SCRATCH, NROW, S, T, LD, row0, ROWS, HI, dI, skb, skt, ssb, sst, TOPK, KP: tl.constexpr,
                    CAP: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr, HP: tl.constexpr, DP: tl.constexpr, BC: tl.constexpr, HAS_KS: tl.constexpr,
                    HAS_FIRST: tl.constexpr, HAS_LAST: tl.constexpr, DECODE_E4M3: tl.constexpr):
    kp = tl.arange(0, KP); jc = tl.arange(0, CAP); d = tl.arange(0, DP); h = tl.arange(0, HP); oks = (h < HI)[:, None] & (d < dI)[None, :]
    scratch = SCRATCH + tl.program_id(0).to(tl.int64)*(2*CAP + 1)  # odd, as above: positions, scores
    for turn in range(tl.cdiv(NROW - tl.program_id(0), tl.num_programs(0))):
        row = tl.program_id(0) + turn*tl.num_programs(0)
        b = (row // ROWS).to(tl.int64); r = row % ROWS; i = row0 + r; at = b*S + i; out = OUT + at*TOPK
        first, last = _select_bounds(FIRST, LAST, at, i, S, T, i < S, HAS_FIRST, HAS_LAST)
        n = tl.maximum(last - first + 1, 0); bad = n*0
        if n <= TOPK:
            tl.store(out + kp, tl.where(kp < n, first + kp, -1), mask=kp < TOPK)
        else:
            words = BITS + (b*tl.cdiv(ROWS, BQ) + r // BQ)*LD*BQ + r % BQ*(BK // 16)
            tot, ties = _places(scratch, words, first, last, 0, CAP, BQ, BK // 16)
            bad += ((tot > CAP) | (tot + ties < TOPK)).to(tl.int32)
            if tot < TOPK:
                if bad == 0: _places(out, words, first, last, TOPK - tot, TOPK, BQ, BK // 16)
            elif bad == 0:
                q = tl.load(Q + (at*HI + h)[:, None]*dI + d[None, :], mask=oks, other=0.0)
                w = tl.load(W + at*HI + h, mask=h < HI, other=0.0)
                if DECODE_E4M3: q = _e4m3_to_fp16(q)
                tl.debug_barrier()
                for c0 in tl.range(0, tot, BC):
                    c = c0 + tl.arange(0, BC); ok = c < tot
                    p = tl.load(scratch + c, mask=ok, other=0, cache_modifier=".cg").to(tl.int64)
                    k = tl.load(K + b*skb + p[:, None]*skt + d[None, :], mask=ok[:, None] & (d < dI)[None, :], other=0.0)
                    score = _score(k, q, w, 1, HP, DECODE_E4M3)                                         # [BC, 1]
                    if HAS_KS: score = score*tl.load(KS + b*ssb + p*sst, mask=ok, other=0.0)[:, None]
                    tl.store(scratch + CAP + c[:, None], _ordered(score), mask=ok[:, None])
                tl.debug_barrier()
                _finish(out, tl.load(scratch + jc, mask=jc < tot, other=0, cache_modifier=".cg"),
                        tl.load(scratch + CAP + jc, mask=jc < tot, other=-2147483648, cache_modifier=".cg"), jc < tot, tot, TOPK, False)
            tl.debug_barrier()                                                                          # scratch is used again
        tl.store(BAD + at, bad.to(tl.int8))


def _collect_tiles(q, K):
    """-> CAP, HP, BC, warps, stages, registers"""
    cap = max(1024, 2*triton.next_power_of_2(K))
    return cap, max(16, triton.next_power_of_2(q.shape[2])), 128 if q.shape[3]*q.element_size() <= 128 else 64, max(4, cap // 512), 3, 128


def _select_filtered(out, q, k, w, k_scale, first, last):
    """`select` into out -> (B,S) bool: rows still to do, as their threshold was no good"""
    (B, S, HI, dI), T, K = q.shape, k.shape[1], out.shape[2]
    stride = max(K // 64, 8, T // 16384) | 1                                                            # odd: no resonance with what is aligned
    words, samples, has, sms = triton.cdiv(T, 128)*8, triton.cdiv(T, stride*16)*16, (first is not None, last is not None), limits(q.device)[1]
    end = torch.arange(T - S, T, dtype=torch.int32, device=q.device).expand(B, S) if last is None else last.clamp(max=T - 1)
    every = lambda x: None if x is None else x[:, ::stride]
    some = None if first is None else (first.clamp(min=0) + stride - 1) // stride, (end // stride).contiguous()  # the bounds among the sampled keys
    bad = torch.empty(B, S, dtype=torch.int8, device=q.device)
    pad = triton.next_power_of_2(samples); cap, HC, BC, warps, stages, registers = _collect_tiles(q, K)
    for n, row0, rows, part in _chunks(B, S, words + samples):
        q_, k_, w_, ks, lo, hi, out_, bad_ = (part(x) for x in (q, k, w, k_scale, first, last, out, bad))
        scores = torch.empty(n, rows, samples, dtype=torch.float32, device=q.device)
        _scores_into(scores, q_, every(k_), w_, every(ks), *(part(x) for x in some), row0, rows, samples)
        threshold = torch.empty(n, rows, dtype=torch.float32, device=q.device)
        lo_, hi_ = (out_ if x is None else x for x in (lo, hi))
        _threshold_kernel[(n*rows,)](scores, lo_, hi_, threshold, S, T, samples, row0, rows, K, stride, pad, *has, num_warps=max(1, min(16, pad // 512)))
        BQ, _, DP, _, emulate, _, _ = _scores_tiles(q, rows)
        bits = torch.empty(n, triton.cdiv(rows, BQ)*BQ, words, dtype=torch.int32, device=q.device)
        BQ, BK = _scores_into(bits, q_, k_, w_, ks, lo, hi, row0, rows, words, threshold=threshold)
        if emulate: q_, k_ = q_.view(torch.uint8), k_.view(torch.uint8)
        programs = min(n*rows, sms*max(1, 65536 // (32*warps*registers)))
        scratch = torch.empty(programs*(2*cap + 1), dtype=torch.int32, device=q.device)
        _collect_kernel[(programs,)](q_, k_, w_, w_ if ks is None else ks, lo_, hi_, bits, out_, bad_, scratch, n*rows, S, T, words, row0, rows, HI, dI,
                                     *k.stride()[:2], *((0, 0) if ks is None else ks.stride()), K, triton.next_power_of_2(K), cap, BQ, BK, HC, DP, BC,
                                     ks is not None, *has, emulate, num_warps=warps, num_stages=stages, maxnreg=registers)
    return bad.bool()


def _select_exact(out, q, k, w, k_scale, first, last):
    """`select` into out by scores that exist, a chunk at a time"""
    (B, S), T = out.shape[:2], k.shape[1]
    LD = triton.cdiv(T, 16)*16 if T <= SELECT_DIRECT else triton.cdiv(T, 4096)*4096
    for n, row0, rows, part in _chunks(B, S, LD):
        scores = torch.empty(n, rows, LD, dtype=torch.float32, device=q.device)
        _scores_into(scores, *(part(x) for x in (q, k, w, k_scale, first, last)), row0, rows, LD)
        _topk_into(part(out), scores, T, part(first), part(last), row0, rows, LD)


def _chunks(B, S, LD):
    """Cut B x S rows such that SELECT_CHUNK holds LD elements for each -> batch rows, first query, queries, function that takes a tensor's batch rows"""
    batch = max(1, min(B, SELECT_CHUNK // (LD*min(S, 256)))); rows = max(1, min(S, SELECT_CHUNK // (LD*batch)))
    for b in range(0, B, batch):
        for r in range(0, S, rows):
            yield min(batch, B - b), r, min(rows, S - r), lambda x, b=b: None if x is None else x[b:b + batch]


def select(q, k, w, topk, k_scale=None, first=None, last=None):
    """S_t = the topk visible keys with the highest index score -> (B,S,topk) int32: ascending positions, then -1 for unused places.

    Arguments as `index_scores`. Equal scores go to the lower position (-0.0 equals 0.0); the same bits in every run. topk may exceed T.
    Memory: the result and about one SELECT_CHUNK of scores. From SELECT_FILTER on the host reads once whether rows are left over; elsewhere, and
    while a CUDA graph is captured, it reads nothing. ValueError: topk < 1."""
    if topk < 1:
        raise ValueError(f"index_topk={topk}: select at least one token")
    q, k, w, k_scale, first, last = _select_inputs(q, k, w, k_scale, first, last)
    (B, S, _, _), T = q.shape, k.shape[1]
    out = torch.empty(B, S, topk, dtype=torch.int32, device=q.device)
    queries, keys, per_head, per_topk, most = SELECT_FILTER
    if S < queries or T < max(keys, per_head*q.shape[2], per_topk*topk) or topk > most or (q.is_cuda and torch.cuda.is_current_stream_capturing()):
        _select_exact(out, q, k, w, k_scale, first, last)
        return out
    bad = _select_filtered(out, q, k, w, k_scale, first, last)
    if bad.any():
        if last is None: last = torch.arange(T - S, T, dtype=torch.int32, device=q.device).expand(B, S)
        for b in range(B):
            r = bad[b].nonzero()[:, 0]
            if len(r) == 0: continue
            r = F.pad(r, (0, -len(r) % 64), value=int(r[0]))                                            # of few sizes: no kernel is compiled for each
            rest = torch.empty(1, len(r), topk, dtype=torch.int32, device=q.device)
            at, one = (lambda x: None if x is None else x[b:b + 1, r]), (lambda x: None if x is None else x[b:b + 1])
            _select_exact(rest, at(q), one(k), at(w), one(k_scale), at(first), at(last))
            out[b, r] = rest[0]
    return out
