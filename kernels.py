"""The Triton twins of indexer.py, sparse_attn.py and model.cross_entropy: same names, same signatures, same results, to which tests hold each pair.

Three chapters: the indexer (quantise, index_scores, select), dense attention and the two losses of the indexer, sparse attention; and a page
on the language-model loss. Each operation opens with its equation, its tiling and its count of bytes and operations, then the kernel, then the
launcher, whose docstring is the contract. Portable from Ampere on: tiles follow the device's shared memory, and below sm_89, which has no FP8
products, e4m3 is converted in registers. Where plain Triton runs out on a Hopper GPU (many heads), sparse_attention hands over to kernels_hopper.py.
Arguments are as in indexer.py: B batch, S queries, T keys, H and HI heads; `first`, `last` the visible range of every query.
"""
import functools
import logging

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
SELECT_CHUNK = 2**28  # scores that `select` holds at a time: 1 GB; less makes more chunks, each with a tail of idle processors
SELECT_DIRECT = 2048  # keys up to which a row is its own candidate list
SELECT_FILTER = 256, 32768, 8192, 64, 1024  # `select` filters from so many queries, keys, keys per indexer head and per topk on, up to so large a topk
LOSS_CHUNK = 2**25  # pairs (query, key) that a chunk of the dense loss holds at a time: 18 bytes each at 64 indexer heads
G_SCALE = tl.constexpr(64.0)  # gradients with respect to scores are kept times this: float16 would lose those of long rows


def limits(device):
    """-> bytes of shared memory that a program may use, number of multiprocessors (of the interpreter: few)."""
    if device.type != "cuda":
        return 2**20, 4
    properties = torch.cuda.get_device_properties(device)
    return properties.shared_memory_per_block_optin, properties.multi_processor_count


@functools.cache
def has_fp8(device):
    """Does this GPU multiply e4m3 (sm_89 and newer)? If not, that is said in a log line, once."""
    has = torch.cuda.get_device_capability(device) >= (8, 9)
    if not has:
        logging.getLogger(__name__).warning("%s has no FP8 tensor cores (they come with sm_89): e4m3 is multiplied as 16-bit floats", torch.cuda.get_device_name(device))
    return has


def fit(**tensors):
    """name=(tensor or None, shape): ValueError naming the first tensor that has another shape."""
    for name, (x, shape) in tensors.items():
        if x is not None and x.shape != shape:
            raise ValueError(f"{name} is {tuple(x.shape)} and should be {tuple(shape)} to fit the other arguments")


# ===========================================================================================================================================
# 1  The lightning indexer: quantise, index_scores, select
# ===========================================================================================================================================

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
    import kernels_hopper
    return kernels_hopper


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


# ===========================================================================================================================================
# 4  The language-model loss of a slice of logits. Not of the attention path, but as PyTorch operations a tenth of a dense training step.
# ===========================================================================================================================================

# cross_entropy: nats[t] = log sum_s exp(x[t,s]) - x[t,y_t], then x[t,s] becomes softmax(x[t])_s - [s = y_t].
# A program per row walks it twice: a maximum and a sum per lane, then the gradient, in the logits' place.
# Bytes per logit: its size read, read again (half of the rows are still in L2) and written; operations ~3 exponentials: bound by memory.

@triton.jit
def cross_entropy_kernel(X, Y, NATS, V, GRAD: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    x_row, j = X + row * V, tl.arange(0, BLOCK)
    y = tl.load(Y + row)
    target = tl.load(x_row + y, mask=(y >= 0) & (y < V), other=float("nan")).to(tl.float32)  # before anything is overwritten
    m = tl.full([BLOCK], -3.4028235e38, tl.float32)
    l = tl.zeros([BLOCK], tl.float32)
    for v in range(0, V, BLOCK):
        x = tl.load(x_row + v + j, mask=v + j < V, other=float("-inf")).to(tl.float32)
        m_new = tl.maximum(m, x)
        l = l * tl.exp(m - m_new) + tl.exp(x - m_new)
        m = m_new
    top = tl.max(m)
    rest = tl.log(tl.sum(l * tl.exp(m - top)))  # log sum exp, less the maximum: added to it, a probability near 1 would lose its distance from 1
    tl.store(NATS + row, rest - (target - top))
    if GRAD:
        for v in range(0, V, BLOCK):
            x = tl.load(x_row + v + j, mask=v + j < V, other=float("-inf")).to(tl.float32)
            p = tl.exp(x - top - rest) - (v + j == y).to(tl.float32)
            tl.store(x_row + v + j, p.to(X.dtype.element_ty), mask=v + j < V)


def cross_entropy(logits, targets, grad):
    """logits (N,vocab) contiguous, targets (N,) int64 -> (N,) float32, -log softmax(logits)[target], in nats, NaN for a target that is
    none of the vocabulary; with grad its gradient softmax(logits) - [s = target] takes the logits' place."""
    nats = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    if len(logits):
        cross_entropy_kernel[len(logits),](logits, targets.contiguous(), nats, logits.shape[1], grad, min(4096, triton.next_power_of_2(logits.shape[1])), num_warps=8)
    return nats
