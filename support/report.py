"""Numbers and pictures of training runs: FLOPs per token, what the device reaches, peak memory, log lines,
the plot of the stages."""
import json
import os
import platform
import resource
import sys
import time
from pathlib import Path

import torch

from indexer import RECENT, default_candidates
from moe import MoE

STAGES = ("dense", "warmup", "sparse", "control")
DRAWN = ("lm", "val_loss", "kl", "kl_uniform", "recall")


# ---- FLOPs ----

def flops_per_token(model, T, stage, pairs=None, keys=None):
    """FLOPs per token of a training step of this stage on contexts of T tokens, in which a query sees `pairs`
    keys in the mean and, in the sparse stage, attends to `keys` of them; None: as in one document.

    Counted as PaLM (arXiv 2204.02311, appendix B) counts for its utilisation: matrix products alone, 2 per
    multiplication and addition, and nothing that is computed a second time to save memory. What learns is
    read off requires_grad, see train.trainable."""
    if pairs is None:
        pairs = (T + 1) / 2
    if keys is None:
        k = min(model.config.index_topk or T, T)
        keys = k - k * (k - 1) / (2 * T)  # the mean of min(t, k), t from 1 to T
    total = 0
    learns = model.model.embed_tokens.weight.requires_grad  # does anything so far need a gradient?
    for i, block in enumerate(model.model.layers):
        attention = block.self_attn
        below = learns
        learns = below or attention.o_proj.weight.requires_grad
        total += attention_flops(attention, stage, pairs, keys, below, learns)
        if model.config.index_topk and stage in ("warmup", "sparse"):
            passes_on = not model.detach
            if attention.indexer:
                two_levels = model.config.block_of(i) > 0
                total += indexer_flops(
                    attention, stage, T, pairs, two_levels, below and passes_on, learns and passes_on)
            total += index_loss_flops(attention, stage, pairs, keys)
        total += mlp_flops(block.mlp, learns)
    if stage != "warmup":  # which has no use for logits
        total += linear_flops(model.lm_head.weight, learns)
    return total


def linear_flops(weight, input_learns):
    """Of a linear layer: the product, and one of the same size for each gradient, of the weight and of the
    input."""
    return 2 * weight.numel() * (1 + weight.requires_grad + input_learns)


def attention_flops(a, stage, pairs, keys, below, learns):
    """Of the main attention. below, learns: is there a gradient to pass on, to its input and within it?"""
    if a.q_a_proj:
        total = linear_flops(a.q_a_proj.weight, below) + linear_flops(a.q_b_proj.weight, learns)
    else:
        total = linear_flops(a.q_proj.weight, below)
    total += linear_flops(a.kv_a_proj_with_mqa.weight, below)
    total += linear_flops(a.kv_b_proj.weight, learns)  # expanding latents costs as much as absorbing it
    total += linear_flops(a.o_proj.weight, learns)
    passes = 3 if learns else 1  # forward, and backward twice that
    if stage == "sparse":
        return total + passes * keys * 2 * a.heads * (a.rank + a.rope + a.rank)
    return total + passes * pairs * 2 * a.heads * (a.nope + a.rope + a.value)


def score_flops(config):
    """Of the index score of a pair: q.k for each head, then the sum over heads."""
    return 2 * config.index_n_heads * (config.index_head_dim + 1)


def indexer_flops(a, stage, T, pairs, two_levels, h_learns, latent_learns):
    """Of a layer's indexer: projections and selection, in one or two levels."""
    index = a.indexer
    total = linear_flops(index.wq_b.weight, latent_learns if a.q_a_proj else h_learns)
    total += linear_flops(index.wk.weight, h_learns)
    total += linear_flops(index.weights_proj.weight, h_learns)
    if stage == "warmup":
        return total
    scored = pairs
    if a.config.selector != "indexer":
        scored = 0
    if two_levels:  # all tokens by two heads, those of the best blocks by all
        candidates = a.config.index_candidates or default_candidates(a.config.index_topk, T)
        scored = min(pairs, pairs * 2 / a.config.index_n_heads + candidates + RECENT)
    return total + scored * score_flops(a.config)


def index_loss_flops(a, stage, pairs, keys):
    """Of what a layer's attention teaches the indexer whose selection it uses, its own or an earlier layer's,
    with its backward. The target takes the products of queries and keys once more: only now are the
    attention's sums known. Index scores count where they are first needed; for a layer that shares them they
    are computed again, which is no work."""
    scores = 3 * score_flops(a.config) if a.indexer else 0
    if stage == "warmup":
        return pairs * (scores + 2 * a.heads * (a.nope + a.rope))
    return keys * (scores + 2 * a.heads * (a.rank + a.rope))


def mlp_flops(mlp, learns):
    """Of a dense MLP or of a mixture: a token passes num_experts_per_tok of the routed experts."""
    if not isinstance(mlp, MoE):
        return sum(linear_flops(weight, learns) for weight in mlp.parameters())
    share = mlp.config.num_experts_per_tok / mlp.config.n_routed_experts
    total = linear_flops(mlp.gate.weight, learns)
    total += share * sum(linear_flops(stack, learns) for stack in mlp.experts.values())
    if mlp.shared_experts:
        total += mlp_flops(mlp.shared_experts, learns)
    return total


# ---- what the device does ----

def wait(device):
    """Until the device has done what it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def matmul_rate(device, dtype):
    """FLOPs per second that a large matrix product reaches here: what utilisation (MFU) is measured
    against."""
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


def reset_peak_memory(device):
    """Let `peak_memory` begin anew, where that can be: on a CUDA GPU."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device):
    """GB, see `memory_meaning`."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


def memory_meaning(device):
    """What `peak_memory` is the peak of."""
    if device.type == "cuda":
        return "peak of the tensors on the GPU in each stage"
    return "peak of the whole process since it began, all stages so far"


def machine(device):
    """-> dict of strings: device, python, torch, triton."""
    try:
        from triton import __version__ as triton
    except ImportError:
        triton = "not installed"
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = f"{device.type} ({platform.machine()}, {torch.get_num_threads()} threads)"
    return dict(device=name, python=platform.python_version(), torch=torch.__version__, triton=triton)


# ---- logs ----

def line(record):
    """A metrics record with a validation loss, as a line of text."""
    parts = [
        f"{record['stage']:>6} step {record['step'] + 1:>6}: loss {record['loss']:.4f}",
        f"validation {record['val_loss']:.4f}"]
    if "kl" in record:
        parts.append(f"KL {record['kl']:.4f} (uniform {record['kl_uniform']:.4f})")
        parts.append(f"recall {record['recall']:.3f}")
    if "index_recall" in record:
        parts.append(f"of exact selection {record['index_recall']:.3f}")
    parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
    parts.append(f"{100 * record['mfu']:.0f}% MFU")
    parts.append(f"{record['memory_gb']:.1f} GB")
    return ", ".join(parts)


def is_record(value):
    """Is this value of a JSON line a record of train.py?"""
    if not isinstance(value, dict) or value.get("stage") not in STAGES:
        return False
    if not isinstance(value.get("step"), int):
        return False
    return all(isinstance(value.get(key, 0), (int, float)) for key in DRAWN)


def read_log(path):
    """The records of a metrics.jsonl. FileNotFoundError, ValueError: one line naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --compare takes folders of runs, or their "
                                "metrics.jsonl")
    try:
        records = [json.loads(text) for text in path.read_text().splitlines()]
    except ValueError:
        records = [None]
    if not all(map(is_record, records)):
        raise ValueError(f"{path}: not a metrics.jsonl of train.py; --compare takes folders of runs, or "
                         "their metrics.jsonl")
    return records


def read_logs(names):
    """Folders of runs or metrics.jsonl files, with commas between -> {name of the folder: records}. Raises
    what `read_log` raises."""
    logs = {}
    for name in filter(None, names.split(",")):
        path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        label = path.resolve().parent.name
        logs[name if label in logs else label] = read_log(path)
    return logs


# ---- the plot ----

COLOURS = ("C4", "0.3", "C5", "C6", "C8", "C9")  # of the control and of other runs
AXES = ("loss (nats per token)", "KL to attention (nats)", "recall")


def stage_starts(records):
    """-> {stage: where it begins on the common time line}, {stage: steps of its longest run}. A control lies
    over the sparse stage."""
    steps = dict.fromkeys(STAGES, 0)
    for r in records:
        steps[r["stage"]] = max(steps[r["stage"]], r["step"] + 1)
    starts = dict(dense=0, warmup=steps["dense"], sparse=steps["dense"] + steps["warmup"])
    starts["control"] = starts["sparse"]
    return starts, steps


def draw(axis, records, starts, key, label, style="-", **kwargs):
    """One curve: a line per stage, since none is drawn across a stage that does not measure this."""
    for stage in STAGES:
        points = [(starts[stage] + r["step"], r[key]) for r in records if key in r and r["stage"] == stage]
        if points:
            axis.plot(*zip(*points), style, label=label, **kwargs)
            label = None


def plot(log_path, path, compare=""):
    """Language-model loss, indexer KL and recall of metrics.jsonl over all stages, one time line, to a PNG. A
    control lies over the sparse stage, the runs of `compare` (see `read_logs`) stage over stage."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    log = read_log(log_path)
    own = [r for r in log if r["stage"] != "control"]
    others = {"dense control": [r for r in log if r["stage"] == "control"], **read_logs(compare)}
    starts, steps = stage_starts(sum(others.values(), own))
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True)

    for n, (name, records) in enumerate(others.items()):
        look = dict(color=COLOURS[n % len(COLOURS)])
        draw(axes[0], records, starts, "lm", None, linewidth=0.6, alpha=0.4, **look)
        look.update(linewidth=0.8, markersize=6, markerfacecolor="none")
        draw(axes[0], records, starts, "val_loss", name, "s--", **look)
        draw(axes[1], records, starts, "kl", name, **look)
        draw(axes[2], records, starts, "recall", name, **look)
    draw(axes[0], own, starts, "lm", "training", color="C0", linewidth=0.8, alpha=0.6)
    draw(axes[0], own, starts, "val_loss", "validation (same attention as the stage)", "o-", color="C1",
         markersize=3)
    draw(axes[1], own, starts, "kl", "indexer", color="C2")
    draw(axes[1], own, starts, "kl_uniform", "an indexer that knows nothing", "--", color="gray")
    draw(axes[2], own, starts, "recall", "selected share of the dense attention mass", color="C3")

    for axis, label in zip(axes, AXES):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        if axis.lines:
            axis.legend(loc="best", fontsize=8)
    axes[1].set_ylim(bottom=0)
    axes[2].set_ylim(0, 1.02)
    for stage in STAGES[:3]:
        if not steps[stage]:
            continue
        for axis in axes:
            axis.axvline(starts[stage], color="black", linewidth=0.8)
        axes[0].annotate(f" {stage}", (starts[stage], 1.02), xycoords=("data", "axes fraction"))
    axes[2].set_xlabel("optimizer step, stages in sequence")
    figure.tight_layout()
    part = f"{path}.part"
    figure.savefig(part, dpi=110, format="png")
    os.replace(part, path)
    plt.close(figure)
