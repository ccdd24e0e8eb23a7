"""Numbers and pictures about training runs: operations per token, what the machine reaches, the plot of the stages, a table of runs.

    python report.py results/16k                       # a Markdown table of the runs below
    python report.py results/16k/a --collect=out/a     # first keep of a run what is worth keeping: options, summary, evaluation, a thinned log
    python report.py out --compare=results/16k/a       # draw out/plot.png anew, with that run beside it
"""
import json
import platform
import re
import resource
import shutil
import sys
import time
from pathlib import Path

import torch

from support import files

from support import checkpoint
from support import cli


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
    return {"dense": 3 * dense, "control": 3 * dense, "warmup": dense - 2 * model.lm_head.weight.numel() + 3 * (2 * index + pairs * score), "sparse": 3 * sparse + 6 * index + (pairs + 3 * keys) * score}[stage]


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


STAGES = ("dense", "warmup", "sparse", "control")
DRAWN = ("lm", "val_loss", "kl", "kl_uniform", "recall")


def read_log(path):
    """The records of a metrics.jsonl. FileNotFoundError, ValueError: one line naming the file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; --compare takes folders of runs, or their metrics.jsonl")
    try:
        records = [json.loads(text) for text in path.read_text().splitlines()]
        good = all(r["stage"] in STAGES and isinstance(r["step"], int) and all(isinstance(r.get(k, 0), (int, float)) for k in DRAWN) for r in records)
    except (ValueError, TypeError, KeyError):
        good = False
    if not good:
        raise ValueError(f"{path}: not a metrics.jsonl of train.py; --compare takes folders of runs, or their metrics.jsonl")
    return records


def read_logs(names):
    """Folders of runs or metrics.jsonl files, with commas between -> {name of the folder: records}. Raises what `read_log` raises."""
    logs = {}
    for name in filter(None, names.split(",")):
        path = Path(name) / "metrics.jsonl" if Path(name).is_dir() else Path(name)
        label = path.resolve().parent.name
        logs[name if label in logs else label] = read_log(path)
    return logs


def last_tenth(records):
    """Those of the last tenth of the sparse stage, over which the table's KL is a mean."""
    sparse = [r for r in records if r["stage"] == "sparse"]
    return [r for r in sparse if r["step"] >= 0.9 * sparse[-1]["step"]]


def plot(log_path, path, compare=""):
    """Language-model loss, indexer KL and recall of metrics.jsonl over all stages, one time line, to a PNG. A control lies over the sparse
    stage, the runs of `compare` (see `read_logs`) stage over stage."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    own, others = read_log(log_path), read_logs(compare)
    everything = sum(others.values(), own)
    length = {stage: max((r["step"] + 1 for r in everything if r["stage"] == stage), default=0) for stage in STAGES}
    begins = dict(dense=0, warmup=length["dense"], sparse=length["dense"] + length["warmup"], control=length["dense"] + length["warmup"])
    figure, axes = plt.subplots(3, 1, figsize=(9, 8), sharex=True)

    def draw(axis, records, key, label, style="-", **kwargs):
        for stage in STAGES:  # a line per stage: none is drawn across one that does not measure this
            points = [(begins[stage] + r["step"], r[key]) for r in records if key in r and r["stage"] == stage]
            if points:
                axis.plot(*zip(*points), style, label=label, **kwargs)
                label = None

    control, own = ([r for r in own if (r["stage"] == "control") == chosen] for chosen in (True, False))
    for n, (name, records) in enumerate([("dense control", control), *others.items()]):
        color = ("C4", "0.3", "C5", "C6", "C8", "C9")[n % 6]
        draw(axes[0], records, "lm", None, color=color, linewidth=0.6, alpha=0.4)
        for axis, key, style in zip(axes, ("val_loss", "kl", "recall"), ("s--", "-", "-")):
            draw(axis, records, key, name, style, color=color, linewidth=0.8, markersize=6, markerfacecolor="none")
    draw(axes[0], own, "lm", "training", color="C0", linewidth=0.8, alpha=0.6)
    draw(axes[0], own, "val_loss", "validation (same attention as the stage)", "o-", color="C1", markersize=3)
    draw(axes[1], own, "kl", "indexer", color="C2")
    draw(axes[1], own, "kl_uniform", "an indexer that knows nothing", "--", color="gray")
    draw(axes[2], own, "recall", "selected share of the dense attention mass", color="C3")
    for axis, label in zip(axes, ("loss (nats per token)", "KL to attention (nats)", "recall")):
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="best", fontsize=8) if axis.lines else None
        axis.set_ylim(0, 1.02 if label == "recall" else None) if label != "loss (nats per token)" else None
    for stage in STAGES[:3]:
        if length[stage]:
            for axis in axes:
                axis.axvline(begins[stage], color="black", linewidth=0.8)
            axes[0].annotate(f" {stage}", (begins[stage], 1.02), xycoords=("data", "axes fraction"))
    axes[2].set_xlabel("optimizer step, stages in sequence")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def rounded(x):
    """A JSON value with its floats rounded to 8 digits, as many as float32 has."""
    if isinstance(x, (dict, list)):
        return {k: rounded(v) for k, v in x.items()} if isinstance(x, dict) else [*map(rounded, x)]
    return float(f"{x:.8g}") if isinstance(x, float) else x


def collect(run, folder, plots):
    """Keep what is worth keeping of a run: options, summary, the evaluation of its sparse checkpoint if there is one, its log thinned to some 200
    records (every n-th step, n at least 5, all with a validation loss, and the last tenth of the sparse stage); and with `plots` the pictures.
    ValueError, FileNotFoundError: it lacks a file."""
    records, measured = read_log(run / "metrics.jsonl"), run / "evaluation-sparse"
    n, end = max(5, len(records) // 200), last_tenth(records)
    kept = [json.dumps(rounded(r)) + "\n" for r in records if r["step"] % n == 0 or "val_loss" in r or r in end]
    results = {path.name: rounded(files.read_json(path)) for path in (run / "run.json", run / "summary.json", *measured.glob("evaluation.json"))}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(kept))
    for name, result in results.items():
        (folder / name).write_text(json.dumps(result, indent=1) + "\n")
    for path in (run / "plot.png", *measured.glob("*.png")) if plots else ():
        shutil.copyfile(path, folder / path.name)


def row(folder):
    """-> {column: number or None} of a collected run. Losses: summary.json, nats per token. KL: mean over the last tenth of the sparse stage."""
    summary, evaluation = files.read_json(folder / "summary.json"), folder / "evaluation.json"
    after = lambda attention, stage: summary.get(f"val_loss, {attention} attention, after {stage}")
    kl = [r["kl"] for r in last_tenth(read_log(folder / "metrics.jsonl"))]
    columns = {"sparse": after("sparse", "sparse"), "same weights, dense": after("dense", "sparse"), "dense control": after("dense", "control"),
               "KL": sum(kl) / len(kl) if kl else None}
    if evaluation.is_file():
        results = files.read_json(evaluation)
        layers, copy = results["layers"], results["copy"]
        mean = lambda x: sum(x) / len(x)
        columns |= {"recall": layers["selected"][-1], "of oracle": layers["of oracle"][-1], "copied, dense": mean(copy["dense"]), "copied, sparse": mean(copy["sparse"]),
                    "worst distance": min(s - d for s, d in zip(copy["sparse"], copy["dense"]))}
    return columns


def main():
    """Collect and draw if asked to, then print the table."""
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="of a run, or of several")
    parser.add_argument("--collect", type=Path, metavar="RUN", help="out_dir of a run to keep in FOLDER: JSON, and the log thinned")
    parser.add_argument("--plots", action="store_true", help="with --collect: keep its pictures too")
    parser.add_argument("--compare", default="", help="draw plot.png in FOLDER anew, with these runs in it: folders or metrics.jsonl files, with commas between")
    o = parser.parse_args()
    if o.plots and not o.collect:
        raise ValueError("--plots keeps the pictures of a run; name it with --collect=RUN")
    if o.collect:
        collect(o.collect, o.folder, o.plots)
    if o.compare:
        plot(o.folder / "metrics.jsonl", o.folder / "plot.png", o.compare)
    runs = [p for p in (o.folder, *o.folder.glob("*/")) if (p / "summary.json").is_file()]
    if not runs:
        raise FileNotFoundError(f"{o.folder}: no run here, nor one folder below; a run has a summary.json")
    natural = lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    rows = sorted(((p.resolve().name, row(p)) for p in runs), key=lambda r: (r[1]["dense control"] is None, natural(r[0])))
    columns = list(dict.fromkeys(key for _, values in rows for key in values))
    for line in (["run", *columns], ["---"] * (1 + len(columns)), *([name, *("" if values.get(k) is None else f"{values[k]:.4f}" for k in columns)] for name, values in rows)):
        print(f"| {' | '.join(line)} |")


if __name__ == "__main__":
    cli.run(main)
