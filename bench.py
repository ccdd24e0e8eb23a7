"""Side-by-side timing: every kernel beside the yardstick a user would compare it with, measured in the same run on the same GPU.

    python bench.py                       # everything: a table, bench.json, two PNGs; minutes on one H200
    python bench.py --only=select,train   # some of it

Layer shapes are those of DeepSeek-V3.2 unless a line says otherwise: 128 heads, latents 512 + 64, indexer 64 x 128, k 2048. Times are medians, of a
kernel with a cold L2; the forward of 1M tokens runs once. Operations are counted as they are needed: a pair or a selected token that is not visible counts as nothing.
"""
import json
import statistics
import time
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.nn.functional as F

from support import tokenizer
from support import checkpoint
from support import cli
import data
from support import report
from config import Config
from model import Transformer
from sparse_attn import pack_latents
from train import trainable

BF16, HEADS, RANK, ROPE, QK, V, HI, DI, TOPK = torch.bfloat16, 128, 512, 64, 192, 128, 64, 128, 2048
SCALE, RUN = QK**-0.5, 4


def milliseconds(function):
    """Median time of function() in ms, L2 flushed before each call, once the clock has settled: a card at its power limit follows the load for 0.1 s."""
    from triton.testing import do_bench
    return do_bench(function, warmup=200, rep=200, return_mode="median")


def randn(*shape, dtype=BF16):
    """Standard normal numbers on the GPU."""
    return torch.randn(shape, device="cuda", dtype=dtype)


def selection(S, T, k, overlap=0.8):
    """(1,S,k) int32: each query keeps `overlap` of the tokens of the one before and draws the rest anew from what it sees."""
    out = torch.full((1, S, k), -1, dtype=torch.int32, device="cuda")
    score = torch.rand(T, device="cuda")
    renew = (1 - overlap) / (1 - min(k / T, 0.99))  # a redrawn token may be drawn again
    for s in range(S):
        score = torch.where(torch.rand(T, device="cuda") < renew, torch.rand(T, device="cuda"), score)
        n = T - S + s + 1
        out[0, s, :min(k, n)] = score[:n].topk(min(k, n)).indices.sort().values.int()
    return out


def index_inputs(S, T, B=1):
    """Random e4m3 q (B,S,HI,DI) and k (B,T,DI), float32 w (B,S,HI) and k_scale (B,T)."""
    q, k = (torch.randn(B, n, *h, DI, device="cuda").to(torch.float8_e4m3fn) for n, h in ((S, (HI,)), (T, ())))
    return q, k, torch.randn(B, S, HI, device="cuda"), torch.rand(B, T, device="cuda")


class Table:
    """Rows (what, time in ms, figure against the yardstick), printed as they come."""

    def __init__(self):
        self.rows = []
        a, b = randn(8192, 8192), randn(8192, 8192)
        self.bf16 = 2 * 8192**3 / milliseconds(lambda: a @ b) / 1e9
        a, b, one = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn).t(), torch.ones((), device="cuda")
        self.fp8 = 2 * 8192**3 / milliseconds(lambda: torch._scaled_mm(a, b, one, one, out_dtype=BF16)) / 1e9
        print(f"yardsticks: bf16 matmul 8192^3 {self.bf16:.0f} TFLOP/s, FP8 scaled_mm 8192^3 {self.fp8:.0f} TFLOP/s\n")

    def add(self, what, ms, figure, unit):
        self.rows.append(dict(what=what, ms=ms, figure=figure, unit=unit))
        print(f"{what:<72} {ms:>9.3f} ms   {figure:>9,.2f} {unit}", flush=True)

    def rate(self, what, function, operations, yardstick="bf16"):
        ms = milliseconds(function)
        self.add(what, ms, operations / ms / 1e9 / getattr(self, yardstick), f"x {yardstick} matmul ({operations / ms / 1e9:.0f} TFLOP/s)")


def bench_select(table):
    """Index scores, top-k, and selection as a whole."""
    import kernels
    for S, T in ((4096, 32768), (4096, 131072)):
        q, k, w, k_scale = index_inputs(S, T)
        pairs = S * (T - S) + S * (S + 1) / 2
        table.rate(f"index scores, S {S}, T {T}", lambda: kernels.index_scores(q, k, w, k_scale), 2 * pairs * HI * DI, "fp8")
        if T == 131072:
            last = torch.arange(T - S, T, device="cuda", dtype=torch.int32)[None]
            chunks = [(q[:, i:i + 512], k, w[:, i:i + 512], k_scale, None, last[:, i:i + 512]) for i in range(0, S, 512)]
            ours = milliseconds(lambda: kernels.select(q, k, w, TOPK, k_scale))
            theirs = milliseconds(lambda: [kernels.index_scores(*chunk).topk(TOPK, -1) for chunk in chunks])
            table.add(f"select whole, S {S}, T {T}", ours, theirs / ours, "x faster than scores + torch.topk")
    for S, T in ((4096, 32768), (1024, 131072)):
        x = torch.randn(1, S, T, device="cuda")
        last = torch.full((1, S), T - 1, dtype=torch.int32, device="cuda")
        ours, theirs = milliseconds(lambda: kernels.topk(x, TOPK, None, last)), milliseconds(lambda: x.topk(TOPK, -1))
        table.add(f"top-k 2048 of {T}, {S} rows", ours, theirs / ours, "x faster than torch.topk")


def bench_sparse(table):
    """Sparse attention forward, backward, and decoding from the FP8 cache."""
    import kernels
    for T in (32768, 131072):
        S = 4096
        q, latents, indices = randn(1, S, HEADS, RANK + ROPE), randn(1, T, RANK + ROPE), selection(S, T, TOPK)
        table.rate(f"sparse forward, S {S}, T {T}", lambda: kernels.sparse_attention(q, latents, indices, SCALE, RANK), 2 * S * HEADS * TOPK * (2 * RANK + ROPE))
    S = 8192
    for heads in (HEADS, 16):
        q, latents, indices = randn(1, S, heads, RANK + ROPE).requires_grad_(), randn(1, S, RANK + ROPE).requires_grad_(), selection(S, S, TOPK)
        g = randn(1, S, heads, RANK)
        step = lambda: torch.autograd.grad(kernels.sparse_attention(q, latents, indices, SCALE, RANK)[0], (q, latents), g)
        chosen = (indices >= 0).sum().item()
        table.rate(f"sparse forward + backward, S {S}, {heads} heads", step, 2 * heads * chosen * (2 * RANK + ROPE + 3 * (RANK + ROPE) + 2 * RANK))
    B, T = 128, 16384
    packed = torch.cat([pack_latents(randn(1, T, RANK + ROPE), RANK) for _ in range(B)])
    for n in (1, 2):
        q, indices = randn(B, n, HEADS, RANK + ROPE), torch.rand(B, n, T, device="cuda").topk(TOPK, -1).indices.sort(-1).values.int()
        table.rate(f"decode, batch {B}, {n} queries, FP8 cache", lambda: kernels.sparse_attention(q, packed, indices, SCALE, RANK), 2 * B * n * HEADS * TOPK * (2 * RANK + ROPE))


def bench_loss(table):
    """The warm-up loss with its gradients."""
    import kernels
    for S in (8192, 32768):
        q, k, v = randn(1, S, HEADS, QK), randn(1, S, HEADS, QK), randn(1, S, HEADS, V)
        index = randn(1, S, HI, DI).requires_grad_(), randn(1, S, DI).requires_grad_(), (randn(1, S, HI, dtype=torch.float32) * (HI * DI) ** -0.5).requires_grad_()
        lse = kernels.dense_attention(q, k, v, SCALE)[1]
        ours = milliseconds(lambda: torch.autograd.grad(kernels.indexer_loss_dense(q, k, lse, SCALE, *index)[0].mean(), index))
        dense = milliseconds(lambda: kernels.dense_attention(q, k, v, SCALE))
        table.add(f"indexer loss, dense, S {S}, forward + backward", ours, ours / dense, "x the time of the cuDNN dense forward")


def bench_context(table):
    """Prefill and decoding of one layer's attention, projections aside, against the context length."""
    import kernels
    curves = {}
    def point(curve, T, ms, tokens):
        curves.setdefault(curve, []).append((T, 1000 * ms / tokens))
    for T in (4096, 16384, 65536, 131072):
        S = 4096
        index, q, latents = index_inputs(S, T), randn(1, S, HEADS, RANK + ROPE), randn(1, T, RANK + ROPE)
        def dsa():
            return kernels.sparse_attention(q, latents, kernels.select(*index[:3], TOPK, index[3]), SCALE, RANK)
        point("prefill, DSA", T, milliseconds(dsa), S)
        q, k, v = randn(1, HEADS, S, QK), randn(1, HEADS, T, QK), randn(1, HEADS, T, V)  # one chunk behind T - S cached tokens: hardly any pair masked
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.CUDNN_ATTENTION):
            point("prefill, dense MHA (cuDNN)", T, milliseconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=T == S)), S)
        del q, k, v, latents
        B = 64  # decoding from the FP8 caches; dense is the same attention kernel with every token selected
        index, q, latents = index_inputs(1, T, B), randn(B, 1, HEADS, RANK + ROPE), torch.stack([pack_latents(randn(T, RANK + ROPE), RANK) for _ in range(B)])
        everything = torch.arange(T, dtype=torch.int32, device="cuda").expand(B, 1, T).contiguous()
        point("decode, DSA", T, milliseconds(dsa), B)
        point("decode, dense MLA", T, milliseconds(lambda: kernels.sparse_attention(q, latents, everything, SCALE, RANK)), B)
        del latents
    for kind, ours, dense in (("prefill", "prefill, DSA", "prefill, dense MHA (cuDNN)"), ("decode", "decode, DSA", "decode, dense MLA")):
        (T, a), (_, b) = curves[ours][-1], curves[dense][-1]
        table.add(f"{kind} at {T}, one layer's attention, per token" + (", batch 64" if kind == "decode" else ""), a / 1000, b / a, "x cheaper than dense")
    return curves


def training(model, x, compile=False):
    """x (B,T + 1) int64 -> tokens/s and peak GB of a training step; T tokens of a sequence are one document."""
    B, T = x.shape[0], x.shape[1] - 1
    optimizer, forward = torch.optim.AdamW(model.parameters(), fused=True), torch.compile(model, dynamic=False) if compile else model

    def step():
        with torch.autocast("cuda", BF16):
            losses = forward(x[:, :-1], x[:, 1:], index_loss=model.attention == "sparse", return_logits=False)[1]
        (losses["lm"] + losses.get("kl", 0)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    torch.cuda.reset_peak_memory_stats()
    seconds = []
    while len(seconds) < 3 or sum(seconds) < 0.5:
        torch.cuda.synchronize()
        start = time.perf_counter()
        step()
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return B * T / statistics.median(seconds), torch.cuda.max_memory_allocated() / 1e9


def bench_train(table):
    """Training steps of a 12-layer model of GPT-2-small size (12 heads, latents 128 + 32, k 512, vocabulary 50304), dense and sparse; 1M tokens forward."""
    config = Config(vocab_size=50304, hidden_size=768, intermediate_size=2048, num_hidden_layers=12, num_attention_heads=12, q_lora_rank=384, kv_lora_rank=128,
                    qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64, index_n_heads=4, index_head_dim=64, index_topk=512, max_position_embeddings=2**20,
                    tie_word_embeddings=True)
    model = Transformer(config).cuda()
    name, memory = "training, 124M", {"training, dense": [], "training, sparse": []}
    # random ids in runs of RUN: neighbours select much alike, as in a trained model
    ids = lambda T: torch.randint(0, config.vocab_size, (max(1, 65536 // T), T // RUN + 1), device="cuda").repeat_interleave(RUN, 1)[:, :T + 1]
    for T in (4096, 8192, 16384, 32768, 65536, 131072):
        for model.recompute in (False, True):  # the second where a GPU of 80 GB takes the longest no other way
            torch.cuda.empty_cache()
            try:
                points = []
                for model.attention in ("dense", "sparse"):
                    points.append(training(model, ids(T)))
                break
            except torch.OutOfMemoryError:
                model.zero_grad()
        else:
            print(f"{name}, context {T}: out of GPU memory, left out, as is what is longer")
            break
        (dense, dense_gb), (sparse, sparse_gb) = points
        how = ", recompute" * model.recompute
        table.add(f"{name}, context {T}, dense{how}", T / dense * 1000, dense, f"tokens/s ({dense_gb:.0f} GB)")
        table.add(f"{name}, context {T}, sparse{how}", T / sparse * 1000, sparse / dense, f"x dense ({sparse:,.0f} tokens/s, {sparse_gb:.0f} GB)")
        for curve, size in zip(memory.values(), (dense_gb, sparse_gb)):
            curve.append((T, size))
    model.recompute = False
    model.attention = "dense"
    for T, gpt in ((4096, 414e3), (16384, 242e3)):  # what a plain 124M GPT with torch.compile reached on an H200
        dense = training(model, ids(T), compile=True)[0]
        table.add(f"dense stage, 124M, context {T}, --compile", T / dense * 1000, dense / gpt, f"x a plain GPT's {gpt / 1000:.0f}K ({dense:,.0f} tokens/s)")
    model.attention = "sparse"
    sparse = training(model, ids(T), compile=True)[0]
    table.add(f"{name}, context {T}, sparse, --compile", T / sparse * 1000, sparse / dense, f"x dense, --compile ({sparse:,.0f} tokens/s)")
    x = torch.randint(0, config.vocab_size, (1, 2**20), device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    start = time.perf_counter()
    with torch.no_grad(), torch.autocast("cuda", BF16):
        model(x, return_logits=False)
    torch.cuda.synchronize()
    table.add("forward, 124M, 1M tokens, sparse", 1000 * (time.perf_counter() - start), torch.cuda.max_memory_allocated() / 1e9, "GB peak")
    return memory


def bench_long(table, folder):
    """Training steps of a trained checkpoint (--checkpoint) on one long document of real text, dense and sparse."""
    if not folder:
        print("long: left out, it takes a trained --checkpoint")
        return
    model, text = Transformer.from_pretrained(folder, device="cuda").train(), data.prepare("python", tokenizer.tokenizer_name(folder))[0].tokens
    for T in (16384, 32768, 65536, 131072):
        x = torch.from_numpy(text[:max(1, 65536 // T) * T + 1].astype("int64")).cuda().unfold(0, T + 1, T)
        for model.attention in ("dense", "sparse"):
            speed, memory = training(model, x)
            table.add(f"training, {folder}, context {T}, {model.attention}", T / speed * 1000, speed, f"tokens/s ({memory:.0f} GB)")


@contextmanager
def at_most(size):
    """No more than `size` bytes of GPU memory, as on a smaller GPU."""
    torch.cuda.set_per_process_memory_fraction(min(1.0, size / torch.cuda.get_device_properties(0).total_memory))
    try:
        yield
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


@at_most(80e9)
def bench_graft(table):
    """A random-weight twin of DeepSeek-V2-Lite (15.7B, bf16) with indexers grafted: warm-up and sparse steps of one sequence within 80 GB."""
    config = Config(model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=0,
                    kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, index_n_heads=16, index_head_dim=128, index_topk=2048,
                    n_routed_experts=64, num_experts_per_tok=6, n_shared_experts=2, moe_intermediate_size=1408, topk_method="greedy", norm_topk_prob=False,
                    max_position_embeddings=163840, rope_scaling=dict(type="yarn", factor=40, original_max_position_embeddings=4096, beta_fast=32, beta_slow=1,
                                                                      mscale=0.707, mscale_all_dim=0.707))
    torch.set_default_dtype(BF16)
    try:
        with torch.device("cuda"):
            model = Transformer(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.rope_frequencies = model.rope_frequencies.float()
    for block in model.model.layers:
        block.self_attn.indexer.float()
    for stage, T, learn, model.recompute in (("warmup", 8192, "none", False), ("warmup", 32768, "none", False), ("warmup", 32768, "none", True),
                                             ("sparse", 32768, "none", True), ("sparse", 32768, "attention", True)):
        model.attention = "sparse" if stage == "sparse" else "dense"
        optimizer, x = torch.optim.AdamW(sum(trainable(model, stage, learn), []), fused=True), torch.randint(0, config.vocab_size, (1, T + 1), device="cuda")
        def step():
            with torch.autocast("cuda", BF16):
                losses = model(x[:, :-1], x[:, 1:] if learn == "attention" else None, index_loss=True, return_logits=False)[1]
            (losses["kl"] + losses.get("lm", 0)).backward()
            optimizer.step()
            optimizer.zero_grad()
        step()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        ms = milliseconds(step)
        table.add(f"{stage} step, 15.7B twin, {T} tokens, --train={learn}{' --recompute' * model.recompute}", ms, torch.cuda.max_memory_allocated() / 1e9, "GB peak")
        del optimizer


def plot(curves, label, path):
    """{name: [(context, value), ...]} as lines on logarithmic axes, to a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4.5))
    for name, points in curves.items():
        axis.plot(*zip(*points), "--o" if "dense" in name else "-o", label=name, color="C0" if name.startswith(("prefill", "training")) else "C1")
    axis.set(xscale="log", yscale="log", xlabel="context (tokens)", ylabel=label)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main():
    """Run the chosen parts; results are written after each."""
    parser = cli.Parser(__doc__)
    parts = dict(select=bench_select, sparse=bench_sparse, loss=bench_loss, context=bench_context, train=bench_train, graft=bench_graft,
                 long=lambda table: bench_long(table, o.checkpoint))
    parser.add_argument("--only", default=",".join(parts), help="parts to run, separated by commas (default %(default)s)")
    parser.add_argument("--checkpoint", help="trained model for the part `long`, such as out/16k/seed-1337/sparse")
    parser.add_argument("--out_dir", default="results/bench", help="where bench.json and the PNGs go (default %(default)s)")
    o = parser.parse_args()
    unknown = set(o.only.split(",")) - parts.keys()
    if unknown:
        raise ValueError(f"--only={o.only}: no part {sorted(unknown)[0]!r}; choose from {', '.join(parts)}")
    if not torch.cuda.is_available():
        raise ValueError("no CUDA GPU here, and without one there is nothing to time")
    torch.manual_seed(0)
    out = Path(o.out_dir)
    out.mkdir(parents=True, exist_ok=True)
    machine = report.machine(torch.device("cuda")) | dict(commit=cli.commit())
    print(" | ".join(f"{k} {v}" for k, v in machine.items()))
    table, curves = Table(), {}
    for name in o.only.split(","):
        try:
            curves[name] = parts[name](table)
        except torch.OutOfMemoryError as error:
            print(f"{name}: out of GPU memory, the rest of this part is left out ({str(error).splitlines()[0]})")
        torch.cuda.empty_cache()
        (out / "bench.json").write_text(json.dumps(dict(machine=machine, yardsticks=dict(bf16=table.bf16, fp8=table.fp8), rows=table.rows, curves=curves), indent=1) + "\n")
    for name, label, file in (("context", "microseconds per token, one layer's attention", "time.png"), ("train", "peak memory of a training step (GB)", "memory.png")):
        if curves.get(name):
            plot(curves[name], label, out / file)
    return 0


if __name__ == "__main__":
    cli.run(main)
