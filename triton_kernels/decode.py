"""Chapter 7: a decoding step. One token of each sequence passes a block of the model.

Each of its products reads a weight once and takes a few microseconds, about what the launch of a kernel
costs: so a step takes as long as it has kernels. Written out in PyTorch a block has some 100 of them, or 40
when compiled. Here it has six, beside those that select and attend:

    entry    h                    -> norm; what q_a_proj, kv_a_proj_with_mqa, wk and weights_proj make of it
    heads    of these, a program  -> per head: q, absorbed; per head of the indexer: q^I, quantised, and w;
                                     one more: c^KV, k^R and k^I, which enter the caches
             select, sparse_attention (or dense_attention), as in model.Attention
    values   what they attend to  -> W^UV of each head
    linear   of that              -> o_proj, added to h
    gate     h                    -> norm; silu(gate_proj) * up_proj
    linear   of that              -> down_proj, added to h

What is rounded, and to what, is as in model.Block. Weights stay where they are, so a step that a CUDA graph
replays after an optimizer's update reads the new ones.

In PyTorch  model.Block.forward, of one token each, with a cache
Bytes       all weights of the block once for each BLOCK_B sequences, and what select and attention read
"""
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

import sparse_attn
from moe import MLP
from precision import exact, product_dtype
from triton_kernels.common import (
    BELOW_A100, BELOW_H100, SCALE_BLOCK, load_tile, matmul, on_device_of, power_of_two, shared_memory,
    store_tile)
from triton_kernels.index import e4m3_of, hadamard

NORM_EPS = tl.constexpr(1e-6)  # of the norms of both latents and of the indexer's keys


# ---- pieces ----

@triton.jit
def inverse_rms(x_ptr, offset, ok, eps, K: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    """1 / rms of the K numbers of each row that begins at x_ptr + offset -> (rows, 1) float32"""
    squares = tl.zeros([offset.shape[0], BLOCK_K], tl.float32)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        x = load_tile(x_ptr, offset, ok, start, K, BLOCK_K).to(tl.float32)
        squares += x * x
    return 1.0 / tl.sqrt_rn(tl.sum(squares, 1) / K + eps)[:, None]


@triton.jit
def operand(
        x_ptr, offset, ok, norm_ptr, scale, start, K: tl.constexpr, ROUND: tl.constexpr,
        BLOCK_K: tl.constexpr):
    """The numbers start ... start + BLOCK_K of the rows that begin at x_ptr + offset, times scale (rows, 1)
    and the weights at norm_ptr unless that is None, rounded to ROUND."""
    x = load_tile(x_ptr, offset, ok, start, K, BLOCK_K)
    if norm_ptr is not None:
        k = start + tl.arange(0, BLOCK_K)
        weight = tl.load(norm_ptr + k, mask=k < K, other=0.0).to(tl.float32)
        x = x.to(tl.float32) * scale * weight[None, :]
    return x.to(ROUND)


@triton.jit
def no_product(ROWS: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr):
    """What `add_product` adds to at first: (ROWS, N); of one row (N, BLOCK_K), see there."""
    if ROWS == 1:
        acc = tl.zeros([N, BLOCK_K], tl.float32)
    else:
        acc = tl.zeros([ROWS, N], tl.float32)
    return acc


@triton.jit
def add_product(
        x, w_ptr, n, n_ok, start, acc, K: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_K: tl.constexpr):
    """acc + x W^T, of the columns start ... of the rows n of W (N,K), multiplied in PRODUCT. A tensor core
    would multiply one row as 16: its products are kept apart, and added up by `sum_of`."""
    w = load_tile(w_ptr, n.to(tl.int64) * K, n_ok, start, K, BLOCK_K).to(PRODUCT)
    x = x.to(PRODUCT)
    if x.shape[0] == 1:
        acc += x.to(tl.float32) * w.to(tl.float32)
    else:
        acc = matmul(x, tl.trans(w), acc)
    return acc


@triton.jit
def sum_of(acc, ROWS: tl.constexpr):
    """-> (ROWS, N), of what `add_product` gives"""
    if ROWS == 1:
        acc = tl.sum(acc, 1)[None, :]
    return acc


@triton.jit
def product(
        x_ptr, offset, ok, norm_ptr, scale, w_ptr, n, n_ok,
        K: tl.constexpr, ROUND: tl.constexpr, PRODUCT: tl.constexpr, BLOCK_K: tl.constexpr,
        NUM_STAGES: tl.constexpr):
    """x W^T for the rows n of W (N,K) -> (rows, len(n)) float32; x is that of `operand`."""
    ROWS: tl.constexpr = offset.shape[0]
    acc = no_product(ROWS, n.shape[0], BLOCK_K)
    for start in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        x = operand(x_ptr, offset, ok, norm_ptr, scale, start, K, ROUND, BLOCK_K)
        acc = add_product(x, w_ptr, n, n_ok, start, acc, K, PRODUCT, BLOCK_K)
    return sum_of(acc, ROWS)


@triton.jit
def turned(
        x, row, ok, cos_ptr, sin_ptr, angle_stride,
        START: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr):
    """x (rows, n), its dimensions START ... START + ROPE turned by RoPE, in float32 -> the same, in x's
    dtype."""
    HALF: tl.constexpr = ROPE // 2
    d = tl.arange(0, x.shape[1])
    r = d - START
    inside = (r >= 0) & (r < ROPE)
    if INTERLEAVED:
        pair = r // 2
        second = r % 2 == 1
        partner = tl.where(second, d - 1, d + 1)
    else:
        pair = r % HALF
        second = r >= HALF
        partner = tl.where(second, d - HALF, d + HALF)
    at = row[:, None] * angle_stride + pair[None, :]
    mask = ok[:, None] & inside[None, :]
    cos = tl.load(cos_ptr + at, mask=mask, other=1.0)
    sin = tl.load(sin_ptr + at, mask=mask, other=0.0)
    y = x.to(tl.float32)
    other = tl.gather(y, tl.broadcast_to(tl.where(inside, partner, d)[None, :], x.shape), 1)
    return (y * cos + tl.where(second[None, :], other, -other) * sin).to(x.dtype)


@triton.jit
def batch_rows(B, BLOCK_B: tl.constexpr):
    """Sequences of this program, and which of them there are. Programs side by side share their weights."""
    row = tl.program_id(0) * BLOCK_B + tl.arange(0, BLOCK_B)
    return row, row < B


# ---- entry ----
# in PyTorch  x = input_layernorm(h);  q_a_proj(x), kv_a_proj_with_mqa(x), wk(x), weights_proj(x.float())
# tiling      a program per BLOCK_N outputs of one of the four and BLOCK_B sequences

@triton.jit
def project(
        h_ptr, norm_ptr, w_ptr, out_ptr, eps, row, ok, tile,
        HIDDEN: tl.constexpr, N: tl.constexpr, ROUND: tl.constexpr, PRODUCT: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    """Outputs tile * BLOCK_N ... of one projection, rounded to what out_ptr points to."""
    offset = row.to(tl.int64) * HIDDEN
    n = tile * BLOCK_N + tl.arange(0, BLOCK_N)
    scale = inverse_rms(h_ptr, offset, ok, eps, HIDDEN, BLOCK_K, NUM_STAGES)
    y = product(
        h_ptr, offset, ok, norm_ptr, scale, w_ptr, n, n < N, HIDDEN, ROUND, PRODUCT, BLOCK_K, NUM_STAGES)
    store_tile(out_ptr, row.to(tl.int64) * N, ok, tile * BLOCK_N, N, BLOCK_N, y)


@triton.jit
def entry_kernel(
        h_ptr, norm_ptr, q_a_ptr, kv_a_ptr, wk_ptr, weights_ptr,
        q_latent_ptr, kv_ptr, key_ptr, w_ptr,
        B, eps,
        HIDDEN: tl.constexpr, Q: tl.constexpr, KV: tl.constexpr, DI: tl.constexpr, HI: tl.constexpr,
        ROUND: tl.constexpr, INDEX: tl.constexpr, WEIGHTS: tl.constexpr, BLOCK_B: tl.constexpr,
        BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    Q_TILES: tl.constexpr = (Q + BLOCK_N - 1) // BLOCK_N
    KV_TILES: tl.constexpr = (KV + BLOCK_N - 1) // BLOCK_N
    KEY_TILES: tl.constexpr = (DI + BLOCK_N - 1) // BLOCK_N
    row, ok = batch_rows(B, BLOCK_B)
    tile = tl.program_id(1)
    if tile < Q_TILES:
        project(
            h_ptr, norm_ptr, q_a_ptr, q_latent_ptr, eps, row, ok, tile,
            HIDDEN, Q, ROUND, ROUND, BLOCK_N, BLOCK_K, NUM_STAGES)
    elif tile < Q_TILES + KV_TILES:
        project(
            h_ptr, norm_ptr, kv_a_ptr, kv_ptr, eps, row, ok, tile - Q_TILES,
            HIDDEN, KV, ROUND, ROUND, BLOCK_N, BLOCK_K, NUM_STAGES)
    elif wk_ptr is not None:
        tile -= Q_TILES + KV_TILES
        if tile < KEY_TILES:
            project(
                h_ptr, norm_ptr, wk_ptr, key_ptr, eps, row, ok, tile,
                HIDDEN, DI, ROUND, INDEX, BLOCK_N, BLOCK_K, NUM_STAGES)
        else:  # in float32, or products that it holds exactly
            project(
                h_ptr, norm_ptr, weights_ptr, w_ptr, eps, row, ok, tile - KEY_TILES,
                HIDDEN, HI, ROUND, WEIGHTS, BLOCK_N, BLOCK_K, NUM_STAGES)


# ---- heads ----
# in PyTorch  model.Attention.absorb, indexer.Indexer, model.Attention.make_scorer, Cache.append
# tiling      a program per head of the attention, per head of the indexer and one for what enters the caches,
#             and BLOCK_B sequences

@triton.jit
def query_head(
        q_latent_ptr, norm_ptr, q_b_ptr, kv_b_ptr, cos_ptr, sin_ptr, angle_stride, q_ptr, head, row, ok,
        H: tl.constexpr, Q: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
        RANK: tl.constexpr, ROUND: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
        BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    """q of one head, absorbed: [W^UK^T q ; q^R]."""
    offset = row.to(tl.int64) * Q
    scale = inverse_rms(q_latent_ptr, offset, ok, NORM_EPS, Q, BLOCK_K, NUM_STAGES)
    d = tl.arange(0, BLOCK_D)
    q = product(
        q_latent_ptr, offset, ok, norm_ptr, scale, q_b_ptr, head * (NOPE + ROPE) + d, d < NOPE + ROPE,
        Q, ROUND, ROUND, BLOCK_K, NUM_STAGES)
    q = turned(q.to(ROUND), row, ok, cos_ptr, sin_ptr, angle_stride, NOPE, ROPE, True)
    to = (row.to(tl.int64) * H + head) * (RANK + ROPE)
    rope = ok[:, None] & ((d >= NOPE) & (d < NOPE + ROPE))[None, :]
    tl.store(q_ptr + (to + RANK - NOPE)[:, None] + d[None, :], q, mask=rope)
    q = tl.where((d < NOPE)[None, :], q, 0.0).to(ROUND)
    w_row = (head * (NOPE + VALUE) + d).to(tl.int64) * RANK
    for start in range(0, RANK, BLOCK_V):
        w = load_tile(kv_b_ptr, w_row, d < NOPE, start, RANK, BLOCK_V).to(ROUND)
        if row.shape[0] == 1:
            y = tl.sum(tl.trans(q).to(tl.float32) * w.to(tl.float32), 0)[None, :]
        else:
            y = matmul(q, w)
        store_tile(q_ptr, to, ok, start, RANK, BLOCK_V, y)


@triton.jit
def index_head(
        q_latent_ptr, norm_ptr, wq_b_ptr, w_ptr, cos_ptr, sin_ptr, angle_stride, q_ptr, w_out_ptr, j, row, ok,
        root, w_factor,
        Q: tl.constexpr, HI: tl.constexpr, DI: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr,
        FP8: tl.constexpr, ROUND: tl.constexpr, INDEX: tl.constexpr, BLOCK_DI: tl.constexpr,
        LOG_DI: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    """q^I of head j and its w, with FP8 quantised: its scale enters w."""
    offset = row.to(tl.int64) * Q
    scale = inverse_rms(q_latent_ptr, offset, ok, NORM_EPS, Q, BLOCK_K, NUM_STAGES)
    d = tl.arange(0, BLOCK_DI)
    q = product(
        q_latent_ptr, offset, ok, norm_ptr, scale, wq_b_ptr, j * DI + d, d < DI,
        Q, ROUND, INDEX, BLOCK_K, NUM_STAGES)
    q = turned(q.to(INDEX), row, ok, cos_ptr, sin_ptr, angle_stride, 0, ROPE, INTERLEAVED).to(ROUND)
    at = row.to(tl.int64) * HI + j
    w = tl.load(w_ptr + at, mask=ok, other=0.0) * w_factor
    if FP8:
        q, q_scale = e4m3_of(hadamard(q, root, LOG_DI).to(tl.float32), True)
        w *= q_scale
    store_tile(q_ptr, at * DI, ok, 0, DI, BLOCK_DI, q)
    tl.store(w_out_ptr + at, w, mask=ok)


@triton.jit
def cache_latent(
        kv_ptr, norm_ptr, cos_ptr, sin_ptr, angle_stride, cache_ptr, scales_ptr, rope_ptr, slot, row, ok,
        RANK: tl.constexpr, ROPE: tl.constexpr, PACKED: tl.constexpr, BLOCK_RANK: tl.constexpr,
        BLOCK_ROPE: tl.constexpr, BLOCK: tl.constexpr, SCALES: tl.constexpr):
    """c^KV, normalised, and k^R of a token into its slot. PACKED: bytes of an entry of the FP8 cache, else
    0."""
    offset = row.to(tl.int64) * (RANK + ROPE)
    scale = inverse_rms(kv_ptr, offset, ok, NORM_EPS, RANK, BLOCK_RANK, 1)
    latent = operand(kv_ptr, offset, ok, norm_ptr, scale, 0, RANK, kv_ptr.dtype.element_ty, BLOCK_RANK)
    rope = load_tile(kv_ptr, offset + RANK, ok, 0, ROPE, BLOCK_ROPE)
    rope = turned(rope, row, ok, cos_ptr, sin_ptr, angle_stride, 0, ROPE, True)
    if PACKED > 0:
        BLOCKS: tl.constexpr = BLOCK_RANK // BLOCK
        values = tl.reshape(latent.to(tl.float32), [latent.shape[0], BLOCKS, BLOCK])
        values, scales = e4m3_of(values, True)
        store_tile(cache_ptr, slot * PACKED, ok, 0, RANK, BLOCK_RANK, tl.reshape(values, latent.shape))
        store_tile(scales_ptr, slot * (PACKED // 4) + RANK // 4, ok, 0, SCALES, BLOCKS, scales)
        store_tile(
            rope_ptr, slot * (PACKED // 2) + (RANK + 4 * SCALES) // 2, ok, 0, ROPE, BLOCK_ROPE, rope)
    else:
        store_tile(cache_ptr, slot * (RANK + ROPE), ok, 0, RANK, BLOCK_RANK, latent)
        store_tile(cache_ptr, slot * (RANK + ROPE) + RANK, ok, 0, ROPE, BLOCK_ROPE, rope)


@triton.jit
def cache_key(
        key_ptr, weight_ptr, bias_ptr, cos_ptr, sin_ptr, angle_stride, cache_ptr, scales_ptr, slot, row, ok,
        root,
        DI: tl.constexpr, ROPE: tl.constexpr, INTERLEAVED: tl.constexpr, FP8: tl.constexpr,
        ROUND: tl.constexpr, BLOCK_DI: tl.constexpr, LOG_DI: tl.constexpr):
    """k^I of a token, the LayerNorm of what wk made, into its slot, with FP8 quantised."""
    d = tl.arange(0, BLOCK_DI)
    x = load_tile(key_ptr, row.to(tl.int64) * DI, ok, 0, DI, BLOCK_DI)
    y = x.to(tl.float32)
    y = tl.where((d < DI)[None, :], y - tl.sum(y, 1)[:, None] / DI, 0.0)
    y *= 1.0 / tl.sqrt_rn(tl.sum(y * y, 1) / DI + NORM_EPS)[:, None]
    weight = tl.load(weight_ptr + d, mask=d < DI, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + d, mask=d < DI, other=0.0).to(tl.float32)
    k = (y * weight[None, :] + bias[None, :]).to(x.dtype)
    k = turned(k, row, ok, cos_ptr, sin_ptr, angle_stride, 0, ROPE, INTERLEAVED).to(ROUND)
    if FP8:
        k, k_scale = e4m3_of(hadamard(k, root, LOG_DI).to(tl.float32), True)
        tl.store(scales_ptr + slot, k_scale, mask=ok)
    store_tile(cache_ptr, slot * DI, ok, 0, DI, BLOCK_DI, k)


@triton.jit
def heads_kernel(
        q_latent_ptr, kv_ptr, key_ptr, w_ptr,
        q_norm_ptr, kv_norm_ptr, q_b_ptr, kv_b_ptr, wq_b_ptr, key_weight_ptr, key_bias_ptr,
        cos_ptr, sin_ptr, position_ptr,
        q_ptr, q_index_ptr, w_out_ptr,
        cache_ptr, cache_scales_ptr, cache_rope_ptr, keys_ptr, key_scales_ptr,
        B, angle_stride, position_stride, capacity, root, w_factor,
        H: tl.constexpr, Q: tl.constexpr, NOPE: tl.constexpr, ROPE: tl.constexpr, VALUE: tl.constexpr,
        RANK: tl.constexpr, HI: tl.constexpr, DI: tl.constexpr, INTERLEAVED: tl.constexpr,
        PACKED: tl.constexpr, FP8: tl.constexpr, ROUND: tl.constexpr, INDEX: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_ROPE: tl.constexpr, BLOCK_RANK: tl.constexpr,
        BLOCK_V: tl.constexpr, BLOCK_DI: tl.constexpr, LOG_DI: tl.constexpr, BLOCK: tl.constexpr,
        SCALES: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    row, ok = batch_rows(B, BLOCK_B)
    head = tl.program_id(1)
    if head < H:
        query_head(
            q_latent_ptr, q_norm_ptr, q_b_ptr, kv_b_ptr, cos_ptr, sin_ptr, angle_stride, q_ptr, head, row, ok,
            H, Q, NOPE, ROPE, VALUE, RANK, ROUND, BLOCK_D, BLOCK_V, BLOCK_K, NUM_STAGES)
    elif head == H:
        position = tl.load(position_ptr + row * position_stride, mask=ok, other=0)
        slot = row.to(tl.int64) * capacity + position
        cache_latent(
            kv_ptr, kv_norm_ptr, cos_ptr, sin_ptr, angle_stride, cache_ptr, cache_scales_ptr, cache_rope_ptr,
            slot, row, ok, RANK, ROPE, PACKED, BLOCK_RANK, BLOCK_ROPE, BLOCK, SCALES)
        if key_ptr is not None:
            cache_key(
                key_ptr, key_weight_ptr, key_bias_ptr, cos_ptr, sin_ptr, angle_stride, keys_ptr,
                key_scales_ptr, slot, row, ok, root, DI, ROPE, INTERLEAVED, FP8, ROUND, BLOCK_DI, LOG_DI)
    elif key_ptr is not None:
        index_head(
            q_latent_ptr, q_norm_ptr, wq_b_ptr, w_ptr, cos_ptr, sin_ptr, angle_stride, q_index_ptr, w_out_ptr,
            head - H - 1, row, ok, root, w_factor,
            Q, HI, DI, ROPE, INTERLEAVED, FP8, ROUND, INDEX, BLOCK_DI, LOG_DI, BLOCK_K, NUM_STAGES)


# ---- values, linear, gate ----
# in PyTorch  values  einsum("bshr,hvr->bshv", out, W^UV)
#             linear  h + x @ W.T
#             gate    F.silu(gate_proj(x)) * up_proj(x) of x = post_attention_layernorm(h)
# tiling      a program per head, or per BLOCK_N outputs, and BLOCK_B sequences

@triton.jit
def values_kernel(
        attended_ptr, kv_b_ptr, out_ptr,
        B,
        H: tl.constexpr, NOPE: tl.constexpr, VALUE: tl.constexpr, RANK: tl.constexpr, ROUND: tl.constexpr,
        BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    row, ok = batch_rows(B, BLOCK_B)
    head = tl.program_id(1)
    n = tl.arange(0, BLOCK_N)
    at = row.to(tl.int64) * H + head
    y = product(
        attended_ptr, at * RANK, ok, None, None, kv_b_ptr, head * (NOPE + VALUE) + NOPE + n, n < VALUE,
        RANK, ROUND, ROUND, BLOCK_K, NUM_STAGES)
    store_tile(out_ptr, at * VALUE, ok, 0, VALUE, BLOCK_N, y)


@triton.jit
def linear_kernel(
        x_ptr, w_ptr, h_ptr, out_ptr,
        B,
        N: tl.constexpr, K: tl.constexpr, ROUND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    row, ok = batch_rows(B, BLOCK_B)
    start = tl.program_id(1) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    offset = row.to(tl.int64)
    y = product(x_ptr, offset * K, ok, None, None, w_ptr, n, n < N, K, ROUND, ROUND, BLOCK_K, NUM_STAGES)
    h = load_tile(h_ptr, offset * N, ok, start, N, BLOCK_N).to(tl.float32)
    store_tile(out_ptr, offset * N, ok, start, N, BLOCK_N, h + y.to(ROUND).to(tl.float32))


@triton.jit
def gate_kernel(
        h_ptr, norm_ptr, gate_ptr, up_ptr, out_ptr,
        B, eps,
        N: tl.constexpr, K: tl.constexpr, ROUND: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_N: tl.constexpr,
        BLOCK_K: tl.constexpr, NUM_STAGES: tl.constexpr):
    row, ok = batch_rows(B, BLOCK_B)
    start = tl.program_id(1) * BLOCK_N
    n = start + tl.arange(0, BLOCK_N)
    offset = row.to(tl.int64) * K
    scale = inverse_rms(h_ptr, offset, ok, eps, K, BLOCK_K, NUM_STAGES)
    gate = no_product(BLOCK_B, BLOCK_N, BLOCK_K)
    up = no_product(BLOCK_B, BLOCK_N, BLOCK_K)
    for k in tl.range(0, K, BLOCK_K, num_stages=NUM_STAGES):
        x = operand(h_ptr, offset, ok, norm_ptr, scale, k, K, ROUND, BLOCK_K)
        gate = add_product(x, gate_ptr, n, n < N, k, gate, K, ROUND, BLOCK_K)
        up = add_product(x, up_ptr, n, n < N, k, up, K, ROUND, BLOCK_K)
    gate = sum_of(gate, BLOCK_B).to(ROUND).to(tl.float32)
    up = sum_of(up, BLOCK_B).to(ROUND).to(tl.float32)
    silu = (gate / (1.0 + tl.exp(-gate))).to(ROUND).to(tl.float32)
    store_tile(out_ptr, row.to(tl.int64) * N, ok, start, N, BLOCK_N, silu * up)


# ---- tiles and launches ----

class DecodeTiles(NamedTuple):
    """Of the kernels of a step."""
    block_b: int  # sequences
    block_n: int  # outputs
    block_k: int  # numbers of a row that are multiplied at a time, at most
    weight_bytes: int  # of the weights that they meet
    num_stages: int
    num_warps: int

    def columns(self, K, outputs, weight):
        """Of K numbers of a row how many are multiplied at a time, by so many rows of a weight."""
        fit = self.weight_bytes // (outputs * weight.element_size())
        return max(16, min(self.block_k, power_of_two(K), fit))


def decode_tiles(B, dtype, device):
    """DecodeTiles for B sequences."""
    small = shared_memory(device) <= BELOW_A100
    weight_bytes = 32768 if shared_memory(device) > BELOW_H100 else 16384
    if small:
        weight_bytes = 8192
    if B == 1:
        return DecodeTiles(
            block_b=1, block_n=8, block_k=1024, weight_bytes=weight_bytes, num_stages=3, num_warps=8)
    if dtype == torch.float32:
        return DecodeTiles(block_b=16, block_n=16, block_k=32, weight_bytes=8192, num_stages=2, num_warps=4)
    if small:
        return DecodeTiles(
            block_b=16, block_n=16, block_k=128, weight_bytes=weight_bytes, num_stages=3, num_warps=4)
    if B <= 16:
        return DecodeTiles(
            block_b=16, block_n=16, block_k=256, weight_bytes=weight_bytes, num_stages=4, num_warps=4)
    return DecodeTiles(block_b=16, block_n=32, block_k=128, weight_bytes=16384, num_stages=4, num_warps=8)


def triton_dtype(dtype):
    """torch's dtype as Triton names it."""
    return {torch.float32: tl.float32, torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}[dtype]


def arguments(tiles, dtype):
    """What all launches pass."""
    return dict(
        ROUND=triton_dtype(dtype), BLOCK_B=tiles.block_b, NUM_STAGES=tiles.num_stages,
        num_warps=tiles.num_warps)


def launch_entry(attention, norm, h, tiles, dtype, index_dtype):
    """h (B,1,hidden) -> q_latent (B,q_lora_rank), kv (B,rank + rope), and of a layer with an indexer key
    (B,DI) and w (B,HI) float32: the projections of the normalised h, as they are."""
    indexer = attention.indexer
    B, _, hidden = h.shape
    projections = [attention.q_a_proj.weight, attention.kv_a_proj_with_mqa.weight]
    Q, _ = attention.q_a_proj.weight.shape
    KV, _ = attention.kv_a_proj_with_mqa.weight.shape
    q_latent = h.new_empty(B, Q, dtype=dtype)
    kv = h.new_empty(B, KV, dtype=dtype)
    key = None
    w = None
    HI = 0
    DI = 0
    if indexer:
        HI = indexer.heads
        DI = indexer.dim
        key = h.new_empty(B, DI, dtype=index_dtype)
        w = h.new_empty(B, HI, dtype=torch.float32)
        projections += [indexer.wk.weight, indexer.weights_proj.weight]
    outputs = sum(triton.cdiv(n, tiles.block_n) for n in (Q, KV, DI, HI))
    widest = max(projections, key=Tensor.element_size)
    w_dtype = indexer.weights_proj.weight.dtype if indexer else dtype
    entry_kernel[(triton.cdiv(B, tiles.block_b), outputs)](
        h_ptr=h, norm_ptr=norm.weight,
        q_a_ptr=attention.q_a_proj.weight, kv_a_ptr=attention.kv_a_proj_with_mqa.weight,
        wk_ptr=indexer.wk.weight if indexer else None,
        weights_ptr=indexer.weights_proj.weight if indexer else None,
        q_latent_ptr=q_latent, kv_ptr=kv, key_ptr=key, w_ptr=w,
        B=B, eps=norm.eps,
        HIDDEN=hidden, Q=Q, KV=KV, DI=DI, HI=HI, INDEX=triton_dtype(index_dtype),
        WEIGHTS=triton_dtype(w_dtype if w_dtype == dtype else torch.float32), BLOCK_N=tiles.block_n,
        BLOCK_K=tiles.columns(hidden, tiles.block_n, widest),
        **arguments(tiles, dtype))
    return q_latent, kv, key, w


def launch_heads(attention, state, cache, projected, tiles, dtype, index_dtype):
    """What launch_entry returns -> q (B,1,H,rank + rope), absorbed, and of a layer with an indexer q_index
    (B,1,HI,DI) and w (B,1,HI), as they score; the token enters the cache."""
    indexer = attention.indexer
    q_latent, kv, key, w = projected
    B, Q = q_latent.shape
    H = attention.heads
    rank = attention.rank
    q = kv.new_empty(B, 1, H, rank + attention.rope)
    q_index = None
    w_scaled = None
    fp8 = False
    HI = 0
    DI = 1
    if indexer:
        HI = indexer.heads
        DI = indexer.dim
        fp8 = cache.index_scales is not None
        q_index = kv.new_empty(B, 1, HI, DI, dtype=torch.float8_e4m3fn if fp8 else dtype)
        w_scaled = w.new_empty(B, 1, HI)

    def bytes_of(x):
        return x.view(torch.uint8) if fp8 else x  # not every GPU knows e4m3

    latents = cache.latents
    packed = latents.dtype == torch.uint8
    position = state.slots[1].expand(B, 1)
    angle_stride = state.cos.expand(B, 1, 1, -1).stride(0)
    block_d = power_of_two(attention.nope + attention.rope)
    block_di = power_of_two(DI)
    columns = tiles.columns(Q, block_d, attention.q_b_proj.weight)
    if indexer:
        columns = min(columns, tiles.columns(Q, block_di, indexer.wq_b.weight))
    heads_kernel[(triton.cdiv(B, tiles.block_b), H + 1 + HI)](
        q_latent_ptr=q_latent, kv_ptr=kv, key_ptr=key, w_ptr=w,
        q_norm_ptr=attention.q_a_layernorm.weight, kv_norm_ptr=attention.kv_a_layernorm.weight,
        q_b_ptr=attention.q_b_proj.weight, kv_b_ptr=attention.kv_b_proj.weight,
        wq_b_ptr=indexer.wq_b.weight if indexer else None,
        key_weight_ptr=indexer.k_norm.weight if indexer else None,
        key_bias_ptr=indexer.k_norm.bias if indexer else None,
        cos_ptr=state.cos, sin_ptr=state.sin, position_ptr=position,
        q_ptr=q, q_index_ptr=bytes_of(q_index), w_out_ptr=w_scaled,
        cache_ptr=latents, cache_scales_ptr=latents.view(torch.float32) if packed else None,
        cache_rope_ptr=latents.view(torch.bfloat16) if packed else None,
        keys_ptr=bytes_of(cache.index_keys), key_scales_ptr=cache.index_scales,
        B=B, angle_stride=angle_stride, position_stride=position.stride(0), capacity=cache.capacity,
        root=DI**-0.5, w_factor=HI**-0.5 * DI**-0.5 if indexer else 0.0,
        H=H, Q=Q, NOPE=attention.nope, ROPE=attention.rope, VALUE=attention.value, RANK=rank, HI=HI, DI=DI,
        INTERLEAVED=bool(indexer) and indexer.interleaved, PACKED=latents.shape[2] if packed else 0, FP8=fp8,
        INDEX=triton_dtype(index_dtype),
        BLOCK_D=block_d, BLOCK_ROPE=power_of_two(attention.rope), BLOCK_RANK=power_of_two(rank),
        BLOCK_V=tiles.columns(rank, block_d, attention.kv_b_proj.weight), BLOCK_DI=block_di,
        LOG_DI=block_di.bit_length() - 1,
        BLOCK=min(SCALE_BLOCK.value, power_of_two(rank)), SCALES=triton.cdiv(rank, SCALE_BLOCK.value),
        BLOCK_K=columns,
        **arguments(tiles, dtype))
    return q, q_index, w_scaled


def attend(attention, q, q_index, w, state, selection, cache):
    """What launch_heads returns -> what the heads attend to (B,1,H,rank), and the Selection: the middle of
    model.Attention.forward."""
    T = state.length
    latents = cache.latents[:, :T]
    if not attention.selects(T, state):
        if latents.dtype == torch.uint8:
            latents = sparse_attn.unpack_latents(latents, attention.rank, q.dtype)
        k = latents[:, :, None]
        out, _ = state.dense_attention(q, k, k[..., :attention.rank], attention.scale)
        return out, selection

    scorer = None
    if attention.indexer:
        k_scale = None if cache.index_scales is None else cache.index_scales[:, :T]
        scorer = attention.scorer(q_index, cache.index_keys[:, :T], w, k_scale, state)
    selection = attention.select(q, latents, scorer, selection, state)
    out, _ = state.ops.sparse_attention(q, latents, selection.indices, attention.scale, attention.rank)
    return out, selection


def launch_values(attention, attended, tiles, dtype):
    """attended (B,1,H,rank) -> values (B,1,H value)"""
    B, _, H, rank = attended.shape
    values = attended.new_empty(B, 1, H * attention.value)
    kv_b = attention.kv_b_proj.weight
    block_n = power_of_two(attention.value)
    values_kernel[(triton.cdiv(B, tiles.block_b), H)](
        attended_ptr=attended.contiguous(), kv_b_ptr=kv_b, out_ptr=values,
        B=B,
        H=H, NOPE=attention.nope, VALUE=attention.value, RANK=rank,
        BLOCK_N=block_n, BLOCK_K=tiles.columns(rank, block_n, kv_b),
        **arguments(tiles, dtype))
    return values


def launch_linear(h, x, weight, tiles, dtype):
    """h (B,1,N) + x (B,1,K) weight^T, the product rounded to dtype -> (B,1,N) in h's dtype"""
    B = len(h)
    N, K = weight.shape
    out = torch.empty_like(h)
    linear_kernel[(triton.cdiv(B, tiles.block_b), triton.cdiv(N, tiles.block_n))](
        x_ptr=x, w_ptr=weight, h_ptr=h, out_ptr=out,
        B=B,
        N=N, K=K, BLOCK_N=tiles.block_n, BLOCK_K=tiles.columns(K, tiles.block_n, weight),
        **arguments(tiles, dtype))
    return out


def launch_gate(mlp, norm, h, tiles, dtype):
    """h (B,1,hidden) -> silu(gate_proj) * up_proj of it, normalised (B,1,inner)"""
    B = len(h)
    gate = mlp.gate_proj.weight
    N, K = gate.shape
    out = h.new_empty(B, 1, N, dtype=dtype)
    gate_kernel[(triton.cdiv(B, tiles.block_b), triton.cdiv(N, tiles.block_n))](
        h_ptr=h, norm_ptr=norm.weight, gate_ptr=gate, up_ptr=mlp.up_proj.weight, out_ptr=out,
        B=B, eps=norm.eps,
        N=N, K=K, BLOCK_N=tiles.block_n, BLOCK_K=tiles.columns(K, 2 * tiles.block_n, gate),
        **arguments(tiles, dtype))
    return out


def decode_block(layer, h, state, selection, cache):
    """What kernels.decode_block promises: shapes and dtypes stand there."""
    attention = layer.self_attn
    h = h.contiguous()
    dtype = product_dtype(h)
    index_dtype = dtype
    if attention.indexer and not torch.is_autocast_enabled(h.device.type):
        index_dtype = attention.indexer.wk.weight.dtype
    tiles = decode_tiles(len(h), dtype, h.device)
    with exact(h), on_device_of(h):
        projected = launch_entry(attention, layer.input_layernorm, h, tiles, dtype, index_dtype)
        heads = launch_heads(attention, state, cache, projected, tiles, dtype, index_dtype)
        attended, selection = attend(attention, *heads, state, selection, cache)
        values = launch_values(attention, attended, tiles, dtype)
        h = launch_linear(h, values, attention.o_proj.weight, tiles, dtype)
        if isinstance(layer.mlp, MLP):
            inner = launch_gate(layer.mlp, layer.post_attention_layernorm, h, tiles, dtype)
            return launch_linear(h, inner, layer.mlp.down_proj.weight, tiles, dtype), selection, None
    return h + layer.mlp(layer.post_attention_layernorm(h)), selection, None
