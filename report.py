"""Numbers and pictures about a training run: operations per token, what the machine reaches, the plot of the three stages."""
import json
import platform
import resource
import sys
import time
from pathlib import Path

import torch


def flops_per_token(model, T, stage):
    """Operations that training on one token of a context of T needs, recomputation not counted: 2 per weight and pair, backward twice forward."""
    c, L = model.config, model.config.num_hidden_layers
    index = sum(p.numel() for p in model.indexer_parameters())
    weights = sum(p.numel() for p in model.parameters()) - index - (0 if c.tie_word_embeddings else model.model.embed_tokens.weight.numel())
    if c.n_routed_experts:  # a token passes num_experts_per_tok of them
        weights -= sum(p.numel() for n, p in model.named_parameters() if ".experts." in n) * (1 - c.num_experts_per_tok / c.n_routed_experts)
    pairs, keys, H = (T + 1) / 2, sum(min(t, c.index_topk) for t in range(1, T + 1)) / T, c.num_attention_heads
    dense = 2 * weights + L * pairs * 2 * H * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    sparse = 2 * weights + L * keys * 2 * H * (2 * c.kv_lora_rank + c.qk_rope_head_dim)
    score = 2 * c.index_n_heads * c.index_head_dim * L  # per pair
    return {"dense": 3 * dense, "warmup": dense - 2 * model.lm_head.weight.numel() + 3 * (2 * index + pairs * score), "sparse": 3 * sparse + 6 * index + (pairs + 3 * keys) * score}[stage]


def matmul_rate(device, dtype):
    """Operations per second that a large matrix product reaches here: what utilisation is measured against."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=dtype)
    seconds = []
    for _ in range(5):
        wait(device)
        start = time.perf_counter()
        a @ a
        wait(device)
        seconds.append(time.perf_counter() - start)
    return 2 * n**3 / min(seconds)


def wait(device):
    """Until the GPU has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_memory(device):
    """GB: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9


def machine(device):
    """-> dict of strings: device, python, torch, triton."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return dict(device=name, python=platform.python_version(), torch=torch.__version__, triton=triton)


def line(record):
    """One metrics record as a line of text."""
    values = [f"{record['stage']:>6} step {record['step'] + 1:>6}: loss {record['loss']:.4f}", f"validation {record['val_loss']:.4f}"]
    if "kl" in record:
        values += [f"KL {record['kl']:.4f} (uniform {record['kl_uniform']:.4f})", f"recall {record['recall']:.3f}"]
    return ", ".join(values + [f"{record['tokens_per_second']:,.0f} tokens/s, {100 * record['mfu']:.0f}% MFU, {record['memory_gb']:.1f} GB"])


def plot(log_path, path):
    """Language-model loss, indexer KL and recall of metrics.jsonl over all stages, one time line, to a PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    records = [json.loads(text) for text in Path(log_path).read_text().splitlines()]
    order = {"dense": 0, "warmup": 1, "sparse": 2}
    records.sort(key=lambda r: (order[r["stage"]], r["step"]))
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True)
    def draw(axis, key, label, style="-", **kwargs):
        for stage in order:  # a line per stage: none is drawn across one that does not measure this
            points = [(x, r[key]) for x, r in enumerate(records) if key in r and r["stage"] == stage]
            if points:
                axis.plot(*zip(*points), style, label=label, **kwargs)
                label = None
    draw(axes[0], "lm", "training", color="C0", linewidth=0.8, alpha=0.6)
    draw(axes[0], "val_loss", "validation (same attention as the stage)", "o-", color="C1", markersize=3)
    draw(axes[1], "kl", "indexer", color="C2")
    draw(axes[1], "kl_uniform", "an indexer that knows nothing", "--", color="gray")
    draw(axes[2], "recall", "selected share of the dense attention mass", color="C3")
    for axis, label in zip(axes, ("loss (nats per token)", "KL to attention (nats)", "recall")):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize=8) if axis.lines else None
        axis.set_ylim(0, 1.02 if label == "recall" else None) if label != "loss (nats per token)" else None
    previous = None
    for x, stage in enumerate([r["stage"] for r in records]):
        if stage != previous:
            for axis in axes:
                axis.axvline(x, color="black", linewidth=0.8)
            axes[0].annotate(f" {stage}", (x, 1.02), xycoords=("data", "axes fraction"))
        previous = stage
    axes[2].set_xlabel("optimizer step, stages in sequence")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)
