"""Side-by-side timing: every kernel, training, prefill and decoding, each beside the baseline that a user
would compare it with, measured in the same run on the same GPU.

    python bench.py                            # everything: a table, bench.json, plots
    python bench.py --only=select,train-4k     # parts of it, each a few minutes on one H100
    python bench.py --only=train               # all parts of that name: train-4k, train-6k, ...

Kernels have the layer shape of DeepSeek-V3.2 unless a row says otherwise: 128 heads, latents 512 + 64,
indexer 64 x 128, k 2048. Their times are medians with a cold L2, once the clock has settled. FLOPs are
counted as they are needed: a pair or a selected token that is not visible counts as nothing.
"""
import functools
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import data
import tasks
from config import Config
from generate import Decoder, make_decoder, new_caches, stream
from graphed import EAGER_CALLS, Graphed, repeatable
from model import Transformer
from rollout import Roller
from sparse_attn import pack_latents
from support import cli, report, tokenizer
from train import GPU, Options, trainable

DEVICE = "cuda"
BF16 = torch.bfloat16


# ---- shapes ----

class Shape(NamedTuple):
    """Of one layer's attention and indexer."""
    heads: int
    rank: int  # of the latents, besides rope
    rope: int
    nope: int
    value: int
    index_heads: int
    index_dim: int
    topk: int

    @property
    def qk(self):
        """Dimensions of a query and a key of one head (MHA mode)."""
        return self.nope + self.rope

    @property
    def width(self):
        """Dimensions of a latent, and of a query against latents (MQA mode)."""
        return self.rank + self.rope

    @property
    def scale(self):
        return self.qk**-0.5

    def __str__(self):
        return f"{self.heads} heads, latents {self.rank} + {self.rope}, k {self.topk}"


V32 = Shape(heads=128, rank=512, rope=64, nope=128, value=128, index_heads=64, index_dim=128, topk=2048)
SMALL = Shape(heads=12, rank=128, rope=32, nope=64, value=64, index_heads=4, index_dim=64, topk=512)
HEADS = (128, 64, 16)  # of the published shape
CHUNK = 4096  # queries of a long prompt that are computed at a time
CONTEXTS = (32768, 131072)  # behind which they come
LONGEST = 2**20  # behind which selection filters
FAR = (2**17, 2**19, 2**20)  # of which selection in two levels runs beside exact selection
TO_A_MILLION = (2**14, 2**16, 2**17, 2**18, 2**19, 2**20)
SEQUENCE = 8192  # tokens of a sequence that is trained on, in the rows of one layer
BATCH = 128  # sequences that decode at a time
MATMUL = 8192  # rows and columns of the matrices that the baselines multiply

VOCABULARY = 50304
SMALL_CONFIG = Config(  # of GPT-2-small's size, hence 124M in the rows: 117M parameters, indexers included
    vocab_size=VOCABULARY, hidden_size=768, intermediate_size=2048, num_hidden_layers=12,
    num_attention_heads=SMALL.heads, q_lora_rank=384, kv_lora_rank=SMALL.rank, qk_nope_head_dim=SMALL.nope,
    qk_rope_head_dim=SMALL.rope, v_head_dim=SMALL.value, index_n_heads=SMALL.index_heads,
    index_head_dim=SMALL.index_dim, index_topk=SMALL.topk, max_position_embeddings=2**20,
    initializer_range=0.02, tie_word_embeddings=True)
STEP_TOKENS = 65536  # of a training step, or one sequence where that is longer
RUN = 4  # random ids come in runs of so many: neighbours then select much alike, as in a trained model
TRAINED = (4096, 6144, 8192, 16384, 32768, 65536, 131072)  # contexts of training steps
BESIDE_GPT = (4096, 16384)
LONG = (16384, 32768, 65536, 131072)  # contexts of a trained checkpoint
DECODED = ((1, 4096), (1, 131072), (16, 65536), (64, 16384))  # batch and context of decoding steps
SAMPLED = (2**17, 2**19, 2**20)  # prompts of sample.py
SAMPLED_STEPS = 64  # decoding steps behind them
ROLLED_ROWS = 256  # of a batch that a trainer learns from
ROLLED_STEPS = 128


# ---- FLOPs ----

def causal_pairs(S, T):
    """Pairs (query, key) that S queries see at the end of T keys."""
    return S * (T - S) + S * (S + 1) // 2


def score_flops(shape, pairs):
    """Of index scores: a product of index_dim per head and pair."""
    return 2 * pairs * shape.index_heads * shape.index_dim


def dense_flops(shape, pairs, backward=False):
    """Of dense attention in MHA mode: q k and p v; with its backward also q k again, dq, dk, and p (dout v),
    dv."""
    products = shape.qk + shape.value
    if backward:
        products += 3 * shape.qk + 2 * shape.value
    return 2 * pairs * shape.heads * products


def sparse_flops(shape, slots, backward=False):
    """Of sparse attention, slots: used ones of all selections. The products of `dense_flops`, in MQA mode."""
    products = shape.width + shape.rank
    if backward:
        products += 3 * shape.width + 2 * shape.rank
    return 2 * slots * shape.heads * products


# ---- measuring ----

def milliseconds(function):
    """Median time of function() in ms, L2 flushed before each call, once the clock has settled: a card at its
    power limit follows the load for 0.1 s."""
    from triton.testing import do_bench
    return do_bench(function, warmup=200, rep=200, return_mode="median")


def replayed(function):
    """-> what repeats function() as a CUDA graph, as decoding does: its kernels without the host's time."""
    if DEVICE != "cuda":
        return function
    for _ in range(EAGER_CALLS):
        function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def seconds_of(function):
    """Time of one function() from an idle GPU to an idle GPU, in seconds."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    function()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def wall_seconds(function, settle=0.2, measured=0.5):
    """Median of `seconds_of` over calls of `measured` seconds, three at least if they take no longer than 10
    seconds, after some of `settle` seconds."""
    settled = 0.0
    while settled < settle:
        settled += seconds_of(function)
    seconds = []
    while sum(seconds) < measured or (len(seconds) < 3 and sum(seconds) < 10):
        seconds.append(seconds_of(function))
    return statistics.median(seconds)


def launches(function):
    """Kernels that function() runs on the GPU."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile
    with profile(activities=[ProfilerActivity.CUDA]) as trace:
        function()
        torch.cuda.synchronize()
    names = [event.name for event in trace.events() if event.device_type == DeviceType.CUDA]
    return sum(not name.startswith(("Memcpy", "Memset")) for name in names)


def clean_up():
    """Give back the memory of what is no longer used, compiled models included."""
    torch.compiler.reset()
    gc.collect()
    torch.cuda.empty_cache()


def measure_baselines():
    """What this GPU reaches: TFLOP/s of a large product in bf16 and FP8, GB/s of a large copy, read and
    written."""
    a = randn(MATMUL, MATMUL)
    b = randn(MATMUL, MATMUL)
    bf16 = 2 * MATMUL**3 / milliseconds(lambda: a @ b) / 1e9
    a8 = a.to(torch.float8_e4m3fn)
    b8 = b.to(torch.float8_e4m3fn).t()
    one = torch.ones((), device=DEVICE)
    fp8 = 2 * MATMUL**3 / milliseconds(lambda: torch._scaled_mm(a8, b8, one, one, out_dtype=BF16)) / 1e9
    x = randn(8, MATMUL, MATMUL)
    copy = 2 * x.numel() * x.element_size() / milliseconds(lambda: x.clone()) / 1e6
    print(f"baselines: bf16 matmul {MATMUL}^3 {bf16:.0f} TFLOP/s, FP8 scaled_mm {MATMUL}^3 {fp8:.0f} TFLOP/s,"
          f" copy {copy:.0f} GB/s\n")
    return dict(bf16=bf16, fp8=fp8, copy=copy)


class Table:
    """Rows (what, time in ms, figure against a baseline), printed as they come, and what is drawn.

    baselines: see `measure_baselines`. curves: {plot: {name: [(context, value), ...]}}."""

    def __init__(self, baselines):
        self.baselines = baselines
        self.rows = []
        self.curves = {}

    def add(self, what, ms, figure, unit):
        """Keep a row, and print it. figure: a number in `unit`."""
        self.rows.append(dict(what=what, ms=ms, figure=figure, unit=unit))
        print(f"{what:<72} {ms:>9.3f} ms   {figure:>9,.2f} {unit}", flush=True)

    def rate(self, what, function, flops, baseline="bf16"):
        """Of what is bound by arithmetic: its share of a large product's rate."""
        ms = milliseconds(function)
        reached = flops / ms / 1e9
        self.add(what, ms, reached / self.baselines[baseline], f"x {baseline} matmul ({reached:.0f} TFLOP/s)")

    def traffic(self, what, function, size):
        """Of what is bound by memory, where it moves `size` bytes at least: its share of a copy's rate."""
        ms = milliseconds(function)
        reached = size / ms / 1e6
        self.add(what, ms, reached / self.baselines["copy"], f"x copy ({reached:.0f} GB/s)")

    def faster(self, what, function, other, name):
        """How many times faster than other(), called `name`, which does the same."""
        ms = milliseconds(function)
        self.add(what, ms, milliseconds(other) / ms, f"x faster than {name}")

    def times(self, what, function, other, name):
        """How many times as long as other(), called `name`, which a step needs anyway."""
        ms = milliseconds(function)
        self.add(what, ms, ms / milliseconds(other), f"x the time of {name}")

    def point(self, plot, curve, context, value):
        self.curves.setdefault(plot, {}).setdefault(curve, []).append((context, value))


# ---- inputs ----

def randn(*shape, dtype=BF16):
    """Standard normal numbers on the GPU."""
    return torch.randn(shape, device=DEVICE, dtype=dtype)


def selection(S, T, k, overlap=0.8):
    """(1,S,k) int32: each query, one of the last S of T tokens, keeps about `overlap` of the tokens of the
    one before (more where it sees few more than k) and draws the rest anew from what it sees. overlap 0:
    independent."""
    out = torch.full((1, S, k), -1, dtype=torch.int32, device=DEVICE)
    score = torch.rand(T, device=DEVICE)
    renew = (1 - overlap) / (1 - min(k / T, 0.99))  # a redrawn token may be drawn again
    for s in range(S):
        score = torch.where(torch.rand(T, device=DEVICE) < renew, torch.rand(T, device=DEVICE), score)
        n = T - S + s + 1  # visible
        out[0, s, :min(k, n)] = score[:n].topk(min(k, n)).indices.sort().values.int()
    return out


def random_selection(B, S, T, k):
    """(B,S,k) int32: k of T tokens, drawn anew for each query."""
    return torch.rand(B, S, T, device=DEVICE).topk(k, -1).indices.sort(-1).values.int()


def index_inputs(shape, B, S, T):
    """Random e4m3 q (B,S,HI,DI) and k (B,T,DI), float32 w (B,S,HI) and k_scale (B,T)."""
    q = randn(B, S, shape.index_heads, shape.index_dim).to(torch.float8_e4m3fn)
    k = randn(B, T, shape.index_dim).to(torch.float8_e4m3fn)
    w = randn(B, S, shape.index_heads, dtype=torch.float32)
    return q, k, w, torch.rand(B, T, device=DEVICE)


def learning_index(shape, B, S):
    """The same as the losses take them: bf16 q (B,S,HI,DI) and k (B,S,DI), float32 w (B,S,HI), to be
    learnt."""
    q = randn(B, S, shape.index_heads, shape.index_dim).requires_grad_()
    k = randn(B, S, shape.index_dim).requires_grad_()
    w = randn(B, S, shape.index_heads, dtype=torch.float32) * (shape.index_heads * shape.index_dim) ** -0.5
    return q, k, w.requires_grad_()


def packed_cache(shape, B, T):
    """(B,T,bytes) uint8: an FP8 cache, packed row by row to save memory."""
    return torch.cat([pack_latents(randn(1, T, shape.width), shape.rank) for _ in range(B)])


def random_ids(config, B, T):
    """(B,T) int64 ids in runs of RUN."""
    ids = torch.randint(0, config.vocab_size, (B, T // RUN + 1), device=DEVICE)
    return ids.repeat_interleave(RUN, 1)[:, :T]


# ---- kernels ----

def bench_select(table):
    """Quantisation, index scores, top-k, and selection as a whole."""
    import kernels
    x = randn(CHUNK, V32.index_heads, V32.index_dim)
    size = x.numel() * (2 + 1) + 4 * x.shape[0] * x.shape[1]  # bf16 read, e4m3 and a scale per vector written
    table.traffic(f"quantise and rotate, {CHUNK} x {V32.index_heads} queries of {V32.index_dim}",
                  lambda: kernels.quantise(x, rotate=True), size)

    for shape in (V32, SMALL):
        heads = "" if shape is V32 else f", {shape.index_heads} indexer heads of {shape.index_dim}"
        for T in CONTEXTS:
            q, k, w, k_scale = index_inputs(shape, 1, CHUNK, T)
            table.rate(f"index scores, S {CHUNK}, T {T}{heads}",
                       lambda: kernels.index_scores(q, k, w, k_scale),
                       score_flops(shape, causal_pairs(CHUNK, T)), "fp8")

    for rows, T, topk in ((CHUNK, CONTEXTS[0], V32.topk), (CHUNK // 4, CONTEXTS[1], V32.topk),
                          (STEP_TOKENS, CHUNK, SMALL.topk), (1, CONTEXTS[1], SMALL.topk)):
        scores = randn(1, rows, T, dtype=torch.float32)
        last = torch.full((1, rows), T - 1, dtype=torch.int32, device=DEVICE)
        select_best = replayed(lambda: kernels.topk(scores, topk, None, last))
        of_torch = replayed(lambda: scores.topk(topk, -1))
        table.faster(f"top-k {topk} of {T}, {rows} rows", select_best, of_torch, "torch.topk")

    for what, shape, B, S, T in (
            ("", V32, 1, CHUNK, CONTEXTS[1]),
            (", few heads", SMALL, 1, CHUNK, CONTEXTS[1]),
            (", few heads, filtered", SMALL, 1, CHUNK // 4, LONGEST),
            (", a training step", SMALL, STEP_TOKENS // CHUNK, CHUNK, CHUNK),
            (", few keys", SMALL, 2 * STEP_TOKENS // CHUNK, CHUNK // 2, CHUNK // 2),
            (", decoding", V32, BATCH // 2, 1, CONTEXTS[1]),
            (", decoding, few heads", SMALL, 1, 1, CONTEXTS[1])):
        select_row(table, what, shape, B, S, T)


def select_row(table, what, shape, B, S, T):
    """`select` beside scores and torch.topk, a chunk of queries at a time as memory demands."""
    import kernels
    q, k, w, k_scale = index_inputs(shape, B, S, T)
    last = torch.arange(T - S, T, device=DEVICE, dtype=torch.int32).expand(B, S)

    def scores_and_topk():
        for start in range(0, S, 512):
            part = slice(start, start + 512)
            scores = kernels.index_scores(q[:, part], k, w[:, part], k_scale, None, last[:, part])
            scores.topk(shape.topk, -1)

    def select():
        kernels.select(q, k, w, shape.topk, k_scale)

    batch = "" if B == 1 else f"{B} x "
    calls = (select, scores_and_topk)
    if S == 1:
        calls = map(replayed, calls)
    table.faster(f"select whole, {batch}S {S}, T {T}{what}", *calls, "scores + torch.topk")


def bench_blocks(table):
    """Selection in two levels (docs/LONG.md) beside exact selection: a chunk of queries behind a long
    context, one query, and whole contexts (of the published shape, the shortest); candidates by default.
    Random vectors."""
    import kernels
    few = SMALL._replace(index_heads=2 * SMALL.index_heads)
    cases = [(few, CHUNK, T) for T in FAR] + [(V32, CHUNK, T) for T in FAR] + [(few, 1, T) for T in FAR]
    cases += [(few, T, T) for T in FAR] + [(V32, FAR[0], FAR[0])]
    for shape, S, T in cases:
        q, k, w, k_scale = index_inputs(shape, 1, S, T)
        args = (q, k, w, shape.topk, k_scale)
        few_heads = "" if shape is V32 else f", {shape.index_heads} indexer heads of {shape.index_dim}"
        calls = (functools.partial(kernels.select_by_blocks, *args), functools.partial(kernels.select, *args))
        if S == 1:
            calls = map(replayed, calls)
        table.faster(f"select by blocks, S {S}, T {T}{few_heads}", *calls, "select")


def bench_dense(table):
    """Dense attention: one document (cuDNN, where it knows the heads), packed documents, and decoding in MQA
    mode."""
    import kernels
    for shape, B, S in ((V32, 1, SEQUENCE), (SMALL, STEP_TOKENS // CHUNK, CHUNK)):
        q = randn(B, S, shape.heads, shape.qk).requires_grad_()
        k = randn(B, S, shape.heads, shape.qk).requires_grad_()
        v = randn(B, S, shape.heads, shape.value).requires_grad_()
        g = randn(B, S, shape.heads, shape.value)
        position = torch.arange(S, device=DEVICE, dtype=torch.int32).expand(B, S)
        length = S // 5
        for what, first in (("", None), (f", documents of {length}", position // length * length)):
            pairs = B * causal_pairs(S, S)
            if first is not None:
                pairs = (position - first + 1).sum().item()

            def forward():
                return kernels.dense_attention(q, k, v, shape.scale, first)[0]

            def forward_backward():
                torch.autograd.grad(forward(), (q, k, v), g)

            label = f"{B} x {S}, {shape.heads} heads{what}"
            with torch.no_grad():
                table.rate(f"dense forward, {label}", forward, dense_flops(shape, pairs))
            flops = dense_flops(shape, pairs, backward=True)
            table.rate(f"dense forward + backward, {label}", forward_backward, flops)

    for B, T in ((1, CONTEXTS[1]), (BATCH // 8, CONTEXTS[0])):
        latents = randn(B, T, 1, SMALL.width)
        q = randn(B, 1, SMALL.heads, SMALL.width)
        decode = replayed(lambda: kernels.dense_attention(q, latents, latents[..., :SMALL.rank], SMALL.scale))
        table.traffic(f"dense decode, batch {B}, T {T}, {SMALL}", decode,
                      latents.numel() * latents.element_size())


def bench_sparse(table):
    """Sparse attention: forward, backward, and decoding from the FP8 cache."""
    import kernels

    def forward_row(shape, T, indices, name):
        q = randn(1, CHUNK, shape.heads, shape.width)
        latents = randn(1, T, shape.width)
        flops = sparse_flops(shape, (indices >= 0).sum().item())
        table.rate(f"sparse forward, S {CHUNK}, T {T}{name}",
                   lambda: kernels.sparse_attention(q, latents, indices, shape.scale, shape.rank), flops)

    for T in CONTEXTS:
        indices = selection(CHUNK, T, V32.topk)
        for heads in HEADS:
            name = "" if heads == V32.heads else f", {heads} heads"
            forward_row(V32._replace(heads=heads), T, indices, name)
    forward_row(SMALL, CONTEXTS[0], selection(CHUNK, CONTEXTS[0], SMALL.topk), f", {SMALL}")

    def backward_row(shape, indices, name):
        q = randn(1, SEQUENCE, shape.heads, shape.width).requires_grad_()
        latents = randn(1, SEQUENCE, shape.width).requires_grad_()
        g = randn(1, SEQUENCE, shape.heads, shape.rank)
        flops = sparse_flops(shape, (indices >= 0).sum().item(), backward=True)

        def step():
            out, _ = kernels.sparse_attention(q, latents, indices, shape.scale, shape.rank)
            torch.autograd.grad(out, (q, latents), g)

        table.rate(f"sparse forward + backward, S {SEQUENCE}, {name}", step, flops)

    shared = selection(SEQUENCE, SEQUENCE, V32.topk)
    for heads in HEADS:
        backward_row(V32._replace(heads=heads), shared, f"{heads} heads")
    few = V32._replace(heads=HEADS[-1])
    backward_row(few, selection(SEQUENCE, SEQUENCE, few.topk, overlap=0), f"{few.heads} heads, independent")
    backward_row(SMALL, selection(SEQUENCE, SEQUENCE, SMALL.topk), str(SMALL))

    T = CONTEXTS[0] // 2
    packed = packed_cache(V32, BATCH, T)
    for heads in HEADS:
        name = "" if heads == V32.heads else f", {heads} heads"
        for S in (1, 2):
            q = randn(BATCH, S, heads, V32.width)
            indices = random_selection(BATCH, S, T, V32.topk)
            decode = replayed(lambda: kernels.sparse_attention(q, packed, indices, V32.scale, V32.rank))
            table.rate(f"decode, batch {BATCH}, {S} queries, FP8 cache{name}", decode,
                       sparse_flops(V32._replace(heads=heads), BATCH * S * V32.topk))
    del packed

    # a few queries, whose lists are cut in parts: bound by what is gathered
    for B in (1, BATCH // 2):
        latents = randn(B, T, SMALL.width)
        q = randn(B, 1, SMALL.heads, SMALL.width)
        indices = random_selection(B, 1, T, SMALL.topk)
        decode = replayed(lambda: kernels.sparse_attention(q, latents, indices, SMALL.scale, SMALL.rank))
        table.traffic(f"decode, batch {B}, {SMALL}", decode,
                      B * SMALL.topk * SMALL.width * latents.element_size())


def bench_loss(table):
    """The indexer's losses and the language model's, with their gradients."""
    import kernels
    for shape, B, S in ((V32, 1, SEQUENCE), (V32, 1, CONTEXTS[0]), (SMALL, STEP_TOKENS // CHUNK, CHUNK)):
        q = randn(B, S, shape.heads, shape.qk)
        k = randn(B, S, shape.heads, shape.qk)
        v = randn(B, S, shape.heads, shape.value)
        index = learning_index(shape, B, S)
        lse = kernels.dense_attention(q, k, v, shape.scale)[1]  # (B, S, H)

        def dense_loss():
            kl, _ = kernels.indexer_loss_dense(q, k, lse, shape.scale, *index)
            torch.autograd.grad(kl.mean(), index)

        what = f"S {S}" if shape is V32 else f"{B} x {S}, {shape.heads} heads"
        table.times(f"indexer loss, dense, {what}, forward + backward", dense_loss,
                    lambda: kernels.dense_attention(q, k, v, shape.scale), "the cuDNN dense forward")

    for shape in (V32, SMALL):
        q = randn(1, SEQUENCE, shape.heads, shape.width)
        latents = randn(1, SEQUENCE, shape.width)
        indices = selection(SEQUENCE, SEQUENCE, shape.topk)
        index = learning_index(shape, 1, SEQUENCE)
        lse = kernels.sparse_attention(q, latents, indices, shape.scale, shape.rank)[1]  # (1, S, H)

        def sparse_loss():
            kl, _ = kernels.indexer_loss_sparse(q, latents, lse, indices, shape.scale, *index)
            torch.autograd.grad(kl.mean(), index)

        table.times(f"indexer loss, sparse, S {SEQUENCE}, {shape.heads} heads, forward + backward",
                    sparse_loss,
                    lambda: kernels.sparse_attention(q, latents, indices, shape.scale, shape.rank),
                    "the sparse forward")

    logits = randn(SEQUENCE, VOCABULARY)
    targets = torch.randint(0, VOCABULARY, (SEQUENCE,), device=DEVICE)

    def of_torch():
        x = logits.detach().requires_grad_()
        torch.autograd.grad(F.cross_entropy(x.float(), targets, reduction="sum"), x)

    table.faster(f"cross entropy with its gradient, {SEQUENCE} x {VOCABULARY}",
                 lambda: kernels.cross_entropy(logits, targets, True), of_torch, "F.cross_entropy")


def bench_context(table):
    """Prefill and decoding of one layer's attention, projections aside, against the context length."""
    import kernels

    def point(curve, T, ms, tokens):
        table.point("context", curve, T, 1000 * ms / tokens)

    B = BATCH // 2
    for T in (CHUNK, 4 * CHUNK, 16 * CHUNK, 32 * CHUNK):
        q_index, k_index, w, k_scale = index_inputs(V32, 1, CHUNK, T)
        q = randn(1, CHUNK, V32.heads, V32.width)
        latents = randn(1, T, V32.width)

        def dsa(q, latents, q_index, k_index, w, k_scale):
            indices = kernels.select(q_index, k_index, w, V32.topk, k_scale)
            kernels.sparse_attention(q, latents, indices, V32.scale, V32.rank)

        ms = milliseconds(functools.partial(dsa, q, latents, q_index, k_index, w, k_scale))
        point("prefill, DSA", T, ms, CHUNK)

        # one chunk behind T - CHUNK cached tokens: hardly any pair masked
        q_heads = randn(1, V32.heads, CHUNK, V32.qk)
        k = randn(1, V32.heads, T, V32.qk)
        v = randn(1, V32.heads, T, V32.value)
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            ms = milliseconds(lambda: F.scaled_dot_product_attention(q_heads, k, v, is_causal=T == CHUNK))
        point("prefill, dense MHA (cuDNN)", T, ms, CHUNK)
        del q_heads, k, v, latents

        # from the FP8 caches; dense is the same attention kernel with every token selected
        q_index, k_index, w, k_scale = index_inputs(V32, B, 1, T)
        q = randn(B, 1, V32.heads, V32.width)
        latents = packed_cache(V32, B, T)
        everything = torch.arange(T, dtype=torch.int32, device=DEVICE).expand(B, 1, T).contiguous()
        ms = milliseconds(replayed(functools.partial(dsa, q, latents, q_index, k_index, w, k_scale)))
        point("decode, DSA", T, ms, B)
        ms = milliseconds(
            replayed(lambda: kernels.sparse_attention(q, latents, everything, V32.scale, V32.rank)))
        point("decode, dense MLA", T, ms, B)
        del latents

    curves = table.curves["context"]
    for kind, dense, where in (("prefill", "prefill, dense MHA (cuDNN)", ""),
                               ("decode", "decode, dense MLA", f", batch {B}")):
        T, ours = curves[f"{kind}, DSA"][-1]
        _, theirs = curves[dense][-1]
        table.add(f"{kind} at {T}, one layer's attention, per token{where}", ours / 1000, theirs / ours,
                  "x cheaper than dense")


def bench_far(table):
    """Attention of one layer of the small model, 8 indexer heads, for a chunk of queries behind up to a
    million tokens: dense, and sparse with either selection."""
    import kernels
    few = SMALL._replace(index_heads=2 * SMALL.index_heads)
    for T in TO_A_MILLION:
        q_index, k_index, w, k_scale = index_inputs(few, 1, CHUNK, T)
        q = randn(1, CHUNK, few.heads, few.width)
        latents = randn(1, T, few.width)
        arguments = (q_index, k_index, w, few.topk, k_scale)

        def exact():
            indices = kernels.select(*arguments)
            kernels.sparse_attention(q, latents, indices, few.scale, few.rank)

        def two_levels():
            indices = kernels.select_by_blocks(*arguments)
            kernels.sparse_attention(q, latents, indices, few.scale, few.rank)

        q_heads = randn(1, few.heads, CHUNK, few.qk)
        k = randn(1, few.heads, T, few.qk)
        v = randn(1, few.heads, T, few.value)

        def dense():
            with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
                F.scaled_dot_product_attention(q_heads, k, v)

        times = []
        for name, function in (("dense MHA (cuDNN)", dense), ("sparse, exact selection", exact),
                               ("sparse, selection in two levels", two_levels)):
            times.append(milliseconds(function))
            table.point("far", name, T, 1000 * times[-1] / CHUNK)
        for name, ms in (("exact selection", times[1]), ("two levels", times[2])):
            table.add(f"attention, {name}, S {CHUNK}, T {T}", ms, times[0] / ms, "x faster than dense")


# ---- training ----

class Speed(NamedTuple):
    """Of training steps."""
    tokens: float  # per second
    memory: float  # GB, the peak
    first: float  # seconds that the first step took, in which kernels are compiled


def training(objective, parameters, x, graphs):
    """Steps on x (B,T + 1) int64, each row one document, that lower objective(x, y), graphs: repeated by a
    CUDA graph -> Speed."""
    optimizer = torch.optim.AdamW(parameters, fused=True)

    def learn():
        with torch.autocast(DEVICE, BF16):
            loss = objective(x[:, :-1], x[:, 1:])
        loss.backward()
        return {}

    learn = Graphed(learn, graphs)

    def step():
        learn()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graphs)

    first = seconds_of(step)
    torch.cuda.reset_peak_memory_stats()
    if graphs:
        for _ in range(EAGER_CALLS):  # the last of these captures
            step()
    seconds = wall_seconds(step)
    optimizer.zero_grad()
    tokens = x.shape[0] * (x.shape[1] - 1)
    return Speed(tokens / seconds, torch.cuda.max_memory_allocated() / 1e9, first)


def stage_training(model, compiled, x):
    """Steps of the dense or the sparse stage, by model.attention, as a CUDA graph where train.py does so ->
    Speed. Compiled once, a model remains so."""
    if compiled:
        model.compile_layers(dynamic=False)

    def objective(x, y):
        _, losses = model(x, y, index_loss=model.attention == "sparse", logits_of=None)
        return losses["lm"] + losses.get("kl", 0)

    graphs = DEVICE == "cuda" and repeatable(model.config, x.shape[1] - 1)
    return training(objective, model.parameters(), x, graphs)


def stage_speeds(model, x):
    """-> {(attention, compiled): Speed} of all four ways. The hungriest comes first: what does not fit shows
    early."""
    speeds = {}
    for attention, compiled in (("sparse", False), ("dense", False), ("dense", True), ("sparse", True)):
        model.attention = attention
        clean_up()
        speeds[model.attention, compiled] = stage_training(model, compiled, x)
    return speeds


def speed_rows(table, name, T, batch, speeds):
    """Dense and sparse steps of `stage_speeds`, without and with --compile; sparse ones beside the better
    dense one."""
    best = max(speeds["dense", compiled].tokens for compiled in (False, True))
    for attention in ("dense", "sparse"):
        for compiled in (False, True):
            speed = speeds[attention, compiled]
            what = f"{name}, {attention}" + (", --compile" if compiled else "")
            ms = 1000 * T / speed.tokens
            took = f"{speed.memory:.0f} GB, first step {speed.first:.0f} s"
            if attention == "dense":
                table.add(what, ms, speed.tokens, f"tokens/s ({took})")
            else:
                table.add(what, ms, speed.tokens / best,
                          f"x the better dense ({speed.tokens:,.0f} tokens/s, {took})")
    for compiled in (False, True):
        speed = speeds["sparse", compiled]
        what = f"{name}, memory of a sparse step" + (", --compile" if compiled else "")
        memory = speed.memory * STEP_TOKENS / (batch * T)
        table.add(what, 1000 * batch * T / speed.tokens, memory, f"GB per {STEP_TOKENS} tokens")


def default_config(**changes):
    """That of the default run on a GPU, but for changes."""
    names = {f.name for f in fields(Config)}
    sizes = {name: value for name, value in GPU.items() if name in names}
    return Config(**sizes | changes)


def small_model():
    """The 124M model on the GPU."""
    with torch.device(DEVICE):
        return Transformer(SMALL_CONFIG)


def bench_train(table, T):
    """Training steps of the 124M model at a context of T, dense and sparse."""
    batch = max(1, STEP_TOKENS // T)
    x = random_ids(SMALL_CONFIG, batch, T + 1)
    name = f"training, 124M, context {T}"
    for recompute in (False, True):  # the second where a GPU of 80 GB takes the longest no other way
        model = small_model()
        model.recompute = recompute
        try:
            speeds = stage_speeds(model, x)
            break
        except torch.OutOfMemoryError:
            del model
        clean_up()  # not where the error still holds all that it was raised in
    else:
        print(f"{name}: out of GPU memory, left out")
        return
    if recompute:
        name += ", recompute"
    speed_rows(table, name, T, batch, speeds)
    for attention in ("dense", "sparse"):
        table.point("train", f"training, {attention}", T, speeds[attention, False].memory)


def bench_default(table):
    """Training steps of the model that train.py builds on a GPU by default (27M), at its context and
    batch."""
    config = default_config()
    with torch.device(DEVICE):
        model = Transformer(config)
    T = GPU["block_size"]
    batch = Options.batch_size
    speeds = stage_speeds(model, random_ids(config, batch, T + 1))
    speed_rows(table, f"training, default run, context {T}", T, batch, speeds)


class GPTBlock(nn.Module):
    """Pre-norm: causal attention and a GELU MLP, no biases."""

    def __init__(self, hidden, heads):
        super().__init__()
        self.heads = heads
        self.attention_norm = nn.LayerNorm(hidden, bias=False)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.out = nn.Linear(hidden, hidden, bias=False)
        self.mlp_norm = nn.LayerNorm(hidden, bias=False)
        self.up = nn.Linear(hidden, 4 * hidden, bias=False)
        self.down = nn.Linear(4 * hidden, hidden, bias=False)

    def forward(self, h):
        qkv = self.qkv(self.attention_norm(h))  # (B, T, 3 hidden)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)  # (B, heads, T, dim) each
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        h = h + self.out(out.transpose(1, 2).flatten(2))  # (B, T, hidden)
        return h + self.down(F.gelu(self.up(self.mlp_norm(h)), approximate="tanh"))


class GPT(nn.Module):
    """The baseline of the dense stage: a plain GPT-2 of 124M parameters, learned positions not counted, whose
    head is the embedding."""

    def __init__(self, context, vocabulary=VOCABULARY, hidden=768, layers=12, heads=12):
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, hidden)
        self.positions = nn.Embedding(context, hidden)
        self.blocks = nn.ModuleList(GPTBlock(hidden, heads) for _ in range(layers))
        self.norm = nn.LayerNorm(hidden, bias=False)
        for name, p in self.named_parameters():
            if p.dim() > 1:
                into_residual = name.endswith(("out.weight", "down.weight"))
                nn.init.normal_(p, std=0.02 / (2 * layers) ** 0.5 if into_residual else 0.02)

    def forward(self, x, y):
        """x, y (B,T) int64 -> mean cross entropy of the tokens y, () float32"""
        h = self.tokens(x) + self.positions.weight[:x.shape[1]]  # (B, T, hidden)
        for block in self.blocks:
            h = block(h)
        logits = F.linear(self.norm(h), self.tokens.weight)  # (B, T, vocabulary)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())


# on a Hopper GPU, and what else there is
FASTEST_SDPA = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]


def bench_gpt(table, T):
    """The dense stage beside a plain GPT of the same size, vocabulary, batch, optimizer and precision, both
    compiled."""
    x = random_ids(SMALL_CONFIG, STEP_TOKENS // T, T + 1)
    with torch.device(DEVICE):
        gpt = GPT(T)
    with sdpa_kernel(FASTEST_SDPA, set_priority=True):
        plain = training(torch.compile(gpt, dynamic=False), gpt.parameters(), x, DEVICE == "cuda")
    table.add(f"plain GPT, 124M, context {T}, torch.compile", 1000 * T / plain.tokens, plain.tokens,
              f"tokens/s ({plain.memory:.0f} GB)")
    del gpt
    clean_up()
    model = small_model()
    model.attention = "dense"
    dense = stage_training(model, True, x)
    table.add(f"dense stage, 124M, context {T}, --compile", 1000 * T / dense.tokens,
              dense.tokens / plain.tokens,
              f"x the plain GPT ({dense.tokens:,.0f} tokens/s, {dense.memory:.0f} GB)")


def bench_long(table, folder):
    """Training steps of a trained checkpoint (--checkpoint) on one long document of real text, dense and
    sparse."""
    if not folder:
        print("long: left out, it takes a trained --checkpoint")
        return
    model = Transformer.from_pretrained(folder, device=DEVICE).train()
    text = data.prepare("python", tokenizer.tokenizer_name(folder))[0].tokens
    for T in LONG:
        tokens = text[:max(1, STEP_TOKENS // T) * T + 1].astype("int64")
        x = torch.from_numpy(tokens).to(DEVICE).unfold(0, T + 1, T)  # (B, T + 1)
        for attention in ("dense", "sparse"):
            model.attention = attention
            speed = stage_training(model, False, x)
            table.add(f"training, {folder}, context {T}, {attention}", 1000 * T / speed.tokens,
                      speed.tokens, f"tokens/s ({speed.memory:.0f} GB)")


TWIN_CONFIG = Config(  # DeepSeek-V2-Lite, 15.7B parameters, with indexers
    model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
    num_hidden_layers=27, num_attention_heads=16, q_lora_rank=0, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, index_n_heads=16, index_head_dim=128, index_topk=2048,
    n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408,
    topk_method="greedy", norm_topk_prob=False, max_position_embeddings=163840,
    initializer_range=0.02,
    rope_scaling=dict(
        type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
        mscale=0.707, mscale_all_dim=0.707))
TWIN_STEPS = (  # stage, context, what learns besides the indexers, recompute
    ("warmup", 8192, "none", False),
    ("warmup", 32768, "none", False),
    ("warmup", 32768, "none", True),
    ("sparse", 32768, "none", True),
    ("sparse", 32768, "attention", True))


@contextmanager
def at_most(size):
    """No more than `size` bytes of GPU memory, as on a smaller GPU."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / total))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@at_most(80e9)
def bench_graft(table):
    """A random-weight twin of DeepSeek-V2-Lite in bf16 with float32 indexers grafted: steps of one sequence
    within 80 GB."""
    torch.set_default_dtype(BF16)
    try:
        with torch.device(DEVICE):
            model = Transformer(TWIN_CONFIG)
    finally:
        torch.set_default_dtype(torch.float32)
    for block in model.model.layers:
        block.self_attn.indexer.float()

    for stage, T, learn, model.recompute in TWIN_STEPS:
        model.attention = "sparse" if stage == "sparse" else "dense"
        of_model, of_indexers = trainable(model, stage, learn)
        optimizer = torch.optim.AdamW(of_model + of_indexers, fused=True)
        x = torch.randint(0, TWIN_CONFIG.vocab_size, (1, T + 1), device=DEVICE)
        targets = x[:, 1:] if learn == "attention" else None

        def step():
            with torch.autocast(DEVICE, BF16):
                _, losses = model(x[:, :-1], targets, index_loss=True, logits_of=None)
            (losses["kl"] + losses.get("lm", 0)).backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(step)
        what = f"{stage} step, 15.7B twin, {T} tokens, --train={learn}"
        if model.recompute:
            what += " --recompute"
        table.add(what, ms, torch.cuda.max_memory_allocated() / 1e9, "GB peak")
        del optimizer


# ---- inference ----

def bench_million(table):
    """One forward of 1M tokens, sparse."""
    model = small_model()
    x = torch.randint(0, VOCABULARY, (1, SMALL_CONFIG.max_position_embeddings), device=DEVICE)
    torch.cuda.reset_peak_memory_stats()
    with torch.no_grad(), torch.autocast(DEVICE, BF16):
        seconds = seconds_of(lambda: model(x, logits_of=None))
    memory = torch.cuda.max_memory_allocated() / 1e9
    table.add("forward, 124M, 1M tokens, sparse", 1000 * seconds, memory, "GB peak")


def full_caches(model, B, T):
    """Caches of T tokens, all random."""
    caches = new_caches(model, B, T, DEVICE, BF16)
    for layer, cache in enumerate(caches):
        cache.latents.normal_()
        if model.config.has_indexer(layer):
            cache.index_keys.copy_(randn(*cache.index_keys.shape))
            cache.index_scales.uniform_()
    return caches


@torch.inference_mode()
def decoding(model, B, T):
    """Steps at the end of a context of T, as `stream` takes them -> ms of one, kernels of one."""
    token = torch.randint(0, VOCABULARY, (B,), device=DEVICE)
    position = torch.full((B,), T - 1, device=DEVICE)
    first = torch.zeros(B, dtype=torch.int32, device=DEVICE)
    decoder = Decoder(model, full_caches(model, B, T))

    def step():
        decoder.step(token, position, first)

    def steps():
        for _ in range(20):
            step()

    step()  # compiles, captures
    return 1000 * wall_seconds(steps) / 20, launches(step)


def bench_decode(table):
    """Decoding steps of the 124M model, one CUDA graph each."""
    model = small_model().to(BF16).eval()
    for B, T in DECODED:
        what = f"decoding step, 124M, batch {B}, context {T}"
        times = {}
        for attention in ("dense", "sparse"):
            model.attention = attention
            clean_up()
            times[attention], kernels_run = decoding(model, B, T)
            table.add(f"{what}, {attention}, launches", times[attention], kernels_run, "kernels")
        table.add(f"{what}, dense", times["dense"], 1000 * B / times["dense"], "tokens/s")
        table.add(f"{what}, sparse", times["sparse"], times["dense"] / times["sparse"], "x faster than dense")


def bench_prefill(table):
    """The first token behind a prompt of 128K tokens, with the defaults of sample.py."""
    model = small_model().to(BF16).eval()
    T = CONTEXTS[1]
    prompt = random_ids(SMALL_CONFIG, 1, T)
    seconds = {}
    for attention in ("dense", "sparse"):
        model.attention = attention

        def first_token():
            next(stream(model, prompt, 1, temperature=0.8))

        first_token()  # compiles
        seconds[model.attention] = wall_seconds(first_token, settle=0)
    what = f"prefill, 124M, {T} tokens"
    table.add(f"{what}, dense", 1000 * seconds["dense"], T / seconds["dense"], "tokens/s")
    table.add(f"{what}, sparse", 1000 * seconds["sparse"], seconds["dense"] / seconds["sparse"],
              "x faster than dense")


def sampling(model, prompt):
    """A prompt (1,T) and steps behind it, as by sample.py --cache=fp8 -> seconds to the first token, seconds
    of a step, with its sampling."""
    rows = stream(model, prompt, 2 + SAMPLED_STEPS, temperature=0.8, fp8_cache=True)
    prefill = seconds_of(lambda: next(rows))
    next(rows)  # captures

    def steps():
        for _ in range(SAMPLED_STEPS):
            next(rows)

    return prefill, seconds_of(steps) / SAMPLED_STEPS


def bench_sample(table, T):
    """What sample.py --cache=fp8 does with a prompt of T tokens: the first token and a step behind it, by the
    124M model with 8 indexer heads, whose layers select among all tokens or, but for the first two, in two
    levels."""
    heads = 2 * SMALL_CONFIG.index_n_heads
    config = replace(SMALL_CONFIG, index_n_heads=heads, max_position_embeddings=2 * T)
    prompt = random_ids(config, 1, T)
    exact = None
    for name, block in (("exact selection", 0), ("two levels", 16)):
        with torch.device(DEVICE):
            model = Transformer(replace(config, index_block=block))
        model = model.to(BF16).eval()
        torch.cuda.reset_peak_memory_stats()
        sampling(model, prompt)  # compiles
        prefill, step = sampling(model, prompt)
        memory = torch.cuda.max_memory_allocated() / 1e9
        exact = exact or (prefill, step)
        what = f"sample.py, 124M, prompt of {T} tokens, {name}"
        table.add(f"{what}, first token", 1000 * prefill, exact[0] / prefill,
                  f"x exact's speed ({T / prefill:,.0f} tokens/s, {memory:.1f} GB)")
        table.add(f"{what}, a step", 1000 * step, exact[1] / step,
                  f"x exact's speed ({1 / step:,.0f} tokens/s)")
        del model
        clean_up()


class Monologue(tasks.Task):
    """Nothing to solve: a prompt, and an answer up to its limit."""
    question = "go on " * 18
    mode = "direct"
    limit = ROLLED_STEPS

    def __init__(self):
        pass


def bench_rollout(table):
    """Rows of a prompt and ROLLED_STEPS tokens: as sample.py would answer them, and as rollouts, where the
    weights are float32 and all that a trainer needs is kept; no tool replies. The model of the default run,
    reading bytes with the k of configs/post_gpu.conf; its weights being random, some rows end early, which
    saves nothing."""
    with torch.device(DEVICE):
        model = Transformer(default_config(vocab_size=tasks.EOT + 1, index_topk=64))
    batch = [Monologue() for _ in range(ROLLED_ROWS)]
    autocast = functools.partial(torch.autocast, DEVICE, BF16, cache_enabled=False)
    roller = Roller(model, torch.device(DEVICE), autocast)
    prompts = torch.tensor([task.prompt() for task in batch], device=DEVICE)

    def roll_out():
        return roller(batch, traced=True)

    written = int(roll_out().own.sum())  # compiles, captures
    rolled = wall_seconds(roll_out, settle=0)
    model.to(BF16)
    decoder = make_decoder(model, ROLLED_ROWS, prompts.shape[1] + ROLLED_STEPS, torch.device(DEVICE))

    def decode():
        for _ in stream(model, prompts, ROLLED_STEPS, end_ids=(tasks.EOT,), go_on=True, decoder=decoder):
            pass

    decode()
    decoded = wall_seconds(decode, settle=0)
    what = f"{ROLLED_ROWS} rows of {ROLLED_STEPS} tokens, 27M"
    tokens = ROLLED_ROWS * ROLLED_STEPS
    table.add(f"{what}, sample.py, a step", 1000 * decoded / ROLLED_STEPS, tokens / decoded, "tokens/s")
    table.add(f"{what}, rollout, a step", 1000 * rolled / ROLLED_STEPS, decoded / rolled,
              f"x sample.py's speed ({written / rolled:,.0f} tokens/s up to the rows' ends)")


def bench_cold(table):
    """From the start of sample.py to its first token behind a prompt of 1K, nothing compiled before."""
    with tempfile.TemporaryDirectory() as folder:
        small_model().to(BF16).save_pretrained(Path(folder) / "model", "bytes")
        clean_up()
        prompt = Path(folder) / "prompt.txt"
        prompt.write_text("def main():\n    pass\n\n" * 50)
        environment = os.environ | dict(
            TRITON_CACHE_DIR=f"{folder}/triton", TORCHINDUCTOR_CACHE_DIR=f"{folder}/inductor")
        command = [sys.executable, str(Path(__file__).with_name("sample.py")), f"--checkpoint={folder}/model",
                   f"--prompt_file={prompt}", "--num_tokens=2"]
        start = time.perf_counter()
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment) as process:
            begun = process.stdout.read(1)  # the prompt is printed with the first token
            seconds = time.perf_counter() - start
            process.stdout.read()
        if not begun or process.returncode:
            raise RuntimeError(f"{' '.join(command)} failed, see above")
    table.add("first token of a cold sample.py, 124M, prompt of 1K", 1000 * seconds, seconds, "s")


# ---- the run ----

def parts(checkpoint):
    """-> {name: function of a Table}; checkpoint: for the part `long`."""
    found = dict(
        select=bench_select, blocks=bench_blocks, dense=bench_dense, sparse=bench_sparse, loss=bench_loss,
        context=bench_context, far=bench_far, default=bench_default)
    for T in TRAINED:
        found[f"train-{T // 1024}k"] = functools.partial(bench_train, T=T)
    for T in BESIDE_GPT:
        found[f"gpt-{T // 1024}k"] = functools.partial(bench_gpt, T=T)
    for T in SAMPLED:
        found[f"sample-{T // 1024}k"] = functools.partial(bench_sample, T=T)
    found |= dict(
        decode=bench_decode, prefill=bench_prefill, rollout=bench_rollout, cold=bench_cold,
        million=bench_million, graft=bench_graft,
        long=functools.partial(bench_long, folder=checkpoint))
    return found


def choose(only, names):
    """The names that --only asks for, themselves or by what stands before their dash. ValueError: one that is
    none."""
    chosen = []
    for wanted in only.split(","):
        matching = [name for name in names if wanted in (name, name.partition("-")[0])]
        if not matching:
            raise ValueError(f"--only={only}: no part {wanted!r}; choose from {', '.join(names)}")
        chosen += matching
    return list(dict.fromkeys(chosen))


def plot(curves, label, path):
    """{name: [(context, value), ...]} as lines on logarithmic axes, to a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, points in curves.items():
        style = "--o" if "dense" in name else "-o"
        color = "C1" if name.startswith("decode") else "C0"
        axis.plot(*zip(*points), style, label=name, color="C2" if "two levels" in name else color)
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(table, machine, out):
    """bench.json, with what was measured so far."""
    results = dict(machine=machine, baselines=table.baselines, rows=table.rows, curves=table.curves)
    (out / "bench.json").write_text(json.dumps(results, indent=1) + "\n")


def main():
    """Run the chosen parts; results are written after each."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--only", help="parts to run, separated by commas (default: all)")
    parser.add_argument(
        "--checkpoint", help="trained model for the part `long`, such as out/16k/seed-1337/sparse")
    parser.add_argument(
        "--out_dir", default="results/bench", help="where bench.json and the PNGs go (default %(default)s)")
    options = parser.parse_args()
    functions = parts(options.checkpoint)
    names = choose(options.only, functions) if options.only else list(functions)
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here, and without one there is nothing to time")
    torch.manual_seed(0)
    out = Path(options.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    machine = report.machine(torch.device(DEVICE)) | dict(commit=cli.commit())
    print(" | ".join(f"{name} {value}" for name, value in machine.items()))

    table = Table(measure_baselines())
    for name in names:
        try:
            functions[name](table)
        except torch.OutOfMemoryError as error:
            reason = str(error).splitlines()[0]
            print(f"{name}: out of GPU memory, the rest of this part is left out ({reason})")
        clean_up()
        write(table, machine, out)
    for name, label, file in (("context", "microseconds per token, one layer's attention", "time.png"),
                              ("far", "microseconds per token, one layer's attention", "far.png"),
                              ("train", "peak memory of a training step (GB)", "memory.png")):
        if name in table.curves:
            plot(table.curves[name], label, out / file)
    return 0


if __name__ == "__main__":
    cli.run(main)
