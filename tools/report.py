"""Keep what is worth keeping of training runs, and tabulate them.

    python -m tools.report results/16k                       # a Markdown table of the runs below
    python -m tools.report results/16k/a --collect=out/a     # first keep of a run what is worth keeping
    python -m tools.report out --compare=results/16k/a       # draw out/plot.png anew, with that run beside it

Kept are the options, the summary, the evaluation of the sparse checkpoint and a thinned log.
"""
import json
import re
import shutil
from pathlib import Path

from support import cli, files
from support.report import plot, read_log

KEPT_RECORDS = 200  # of a log, about


# ---- keep a run ----

def last_tenth(records):
    """Those of the last tenth of the sparse stage, over which the table's KL is a mean."""
    sparse = [r for r in records if r["stage"] == "sparse"]
    return [r for r in sparse if r["step"] >= 0.9 * sparse[-1]["step"]]


def rounded(value):
    """A JSON value with its floats rounded to 8 digits, as many as float32 has."""
    if isinstance(value, dict):
        return {key: rounded(x) for key, x in value.items()}
    if isinstance(value, list):
        return [rounded(x) for x in value]
    return float(f"{value:.8g}") if isinstance(value, float) else value


def thinned(records):
    """Every n-th record, n at least 5, such that some KEPT_RECORDS stay, and all that are drawn or tabulated:
    those with a validation loss, and the last tenth of the sparse stage."""
    n = max(5, len(records) // KEPT_RECORDS)
    end = last_tenth(records)
    return [r for r in records if r["step"] % n == 0 or "val_loss" in r or r in end]


def collect(run, folder, plots):
    """Keep options, summary, evaluation and thinned log of a run in `folder`, and with `plots` the pictures.
    ValueError, FileNotFoundError: the run lacks a file; then nothing is written."""
    kept = thinned(read_log(run / "metrics.jsonl"))
    measured = run / "evaluation-sparse"
    results = {}
    for path in (run / "run.json", run / "summary.json", *measured.glob("evaluation.json")):
        results[path.name] = rounded(files.read_json(path))

    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(rounded(r)) + "\n" for r in kept]
    (folder / "metrics.jsonl").write_text("".join(lines))
    for name, result in results.items():
        (folder / name).write_text(json.dumps(result, indent=1) + "\n")
    if plots:
        for path in (run / "plot.png", *measured.glob("*.png")):
            shutil.copyfile(path, folder / path.name)


# ---- the table ----

def mean(values):
    """Of a list; None of an empty one."""
    return sum(values) / len(values) if values else None


def row(folder):
    """-> {column: number or None} of a collected run. Losses: summary.json, nats per token. KL: mean over the
    last tenth of the sparse stage."""
    summary = files.read_json(folder / "summary.json")

    def loss(attention, stage):
        return summary.get(f"val_loss, {attention} attention, after {stage}")

    columns = {
        "sparse": loss("sparse", "sparse"),
        "same weights, dense": loss("dense", "sparse"),
        "dense control": loss("dense", "control"),
        "KL": mean([r["kl"] for r in last_tenth(read_log(folder / "metrics.jsonl"))])}
    if not (folder / "evaluation.json").is_file():
        return columns
    evaluation = files.read_json(folder / "evaluation.json")
    layers = evaluation["layers"]
    copied = evaluation["copy"]
    return columns | {
        "recall": layers["selected"][-1],
        "of oracle": layers["of oracle"][-1],
        "copied, dense": mean(copied["dense"]),
        "copied, sparse": mean(copied["sparse"]),
        "worst distance": min(s - d for s, d in zip(copied["sparse"], copied["dense"]))}


def order(named_row):
    """Sort key of (name, columns): runs with a dense control first, then by name, where 9 comes before 10."""
    name, columns = named_row
    parts = [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    return columns["dense control"] is None, parts


def print_table(rows):
    """[(name, {column: number or None})] as a Markdown table."""
    columns = list(dict.fromkeys(column for _, values in rows for column in values))
    print(f"| {' | '.join(['run', *columns])} |")
    print(f"| {' | '.join(['---'] * (1 + len(columns)))} |")
    for name, values in rows:
        cells = ["" if values.get(column) is None else f"{values[column]:.4f}" for column in columns]
        print(f"| {' | '.join([name, *cells])} |")


def main():
    """Collect and draw if asked to, then print the table."""
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="of a run, or of several")
    parser.add_argument("--collect", type=Path, metavar="RUN", help="out_dir of a run to keep in FOLDER")
    parser.add_argument("--plots", action="store_true", help="with --collect: keep its pictures too")
    parser.add_argument("--compare", default="", help="draw plot.png in FOLDER anew, with these runs in it: "
                        "folders or metrics.jsonl files, with commas between")
    options = parser.parse_args()
    if options.plots and not options.collect:
        raise ValueError("--plots keeps the pictures of a run; name it with --collect=RUN")
    if options.collect:
        collect(options.collect, options.folder, options.plots)
    if options.compare:
        plot(options.folder / "metrics.jsonl", options.folder / "plot.png", options.compare)

    folder = options.folder
    runs = [path for path in (folder, *folder.glob("*/")) if (path / "summary.json").is_file()]
    if not runs:
        raise FileNotFoundError(f"{folder}: no run here, nor one folder below; a run has a summary.json")
    rows = [(path.resolve().name, row(path)) for path in runs]
    print_table(sorted(rows, key=order))
    return 0


if __name__ == "__main__":
    cli.run(main)
