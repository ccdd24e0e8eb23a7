"""Logs, tables and plots of post-training."""
import os

from support import files, runs

CURVES = (("reward", "reward"), ("length", "tokens of an answer"), ("kl", "KL to the start (nats)"),
          ("mismatch", "rollout against trainer (nats)"), ("live", "groups with signal"))
DRIFT = ("drift", "log-probability lost since the rollout (nats)")  # instead of a KL that has no weight


def is_record(value):
    """Is this value of a JSON line a record of post_train.py?"""
    if not isinstance(value, dict):
        return False
    return isinstance(value.get("stage"), str) and type(value.get("step")) is int


def read_log(out):
    """The records of a run's metrics.jsonl, as `runs.read_records`."""
    return runs.read_records(out, is_record, "post_train.py")


def rows_of(found):
    """evaluation.json -> {(level, domain/mode): {model: its measures}}."""
    rows = {}
    for key, measures in found.items():
        if key.count(", ") == 2:
            model, level, row = key.split(", ")
            rows.setdefault((level, row), {})[model] = measures
    return rows


def column(model):
    """The table's column of a model: all specialists share one, each in its rows."""
    return "specialist" if model.startswith("specialist-") else model


def table(found):
    """evaluation.json -> Markdown tables: the share of right answers (on rubrics: of true points) at
    temperature 1, and at 0 behind the stroke; then further measures; then rollout against trainer."""
    rows = rows_of(found)
    models = ["base", "specialist", "generalist", "mixed-base", "sequential", "mixed"]
    lines = [f"| at temperature 1 / 0 | {' | '.join(models)} |", "| --- " * (len(models) + 1) + "|"]
    for (level, row), by_model in rows.items():
        cells = dict.fromkeys(models, "")
        for model, measures in by_model.items():
            cells[column(model)] = f"{measures['ok at 1']:.2f} / {measures['ok at 0']:.2f}"
        lines.append(f"| {row}, {level} | {' | '.join(cells.values())} |")
    lines += ["", "| model, task | pass@k | tokens | language | judge | dense at 0 |", "| --- " * 6 + "|"]
    for (level, row), by_model in rows.items():
        for model, measures in by_model.items():
            cells = [measures.get(name) for name in (
                "pass@k", "length at 1", "language at 1", "judge at 1", "ok at 0, dense")]
            shown = ["" if value is None else f"{value:.2f}" for value in cells]
            lines.append(f"| {model}, {row}, {level} | {' | '.join(shown)} |")
    if "judge" in found:
        shares = ", ".join(f"{share:.3f}" for share in found["judge"]["agreement"])
        lines += ["", f"judge right on each rubric point: {shares}"]
    if "replay" in found:
        lines += ["", "| rollout against trainer, nats | mean | maximum |", "| --- | --- | --- |"]
        for case, (mean, largest) in found["replay"].items():
            lines.append(f"| {case} | {mean:.1e} | {largest:.1e} |")
    return "\n".join(lines)


def plot(out, path):
    """The curves of metrics.jsonl and, if there is an evaluation.json, accuracy of models and tasks, to a
    PNG."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    stages = {}
    for record in read_log(out):
        if "reward" in record:
            stages.setdefault(record["stage"], []).append(record)
    found = files.read_json(out / "evaluation.json") if (out / "evaluation.json").exists() else {}
    rows = rows_of(found)
    curves = CURVES
    if not any(record.get("kl") for of_stage in stages.values() for record in of_stage):
        curves = [DRIFT if key == "kl" else (key, label) for key, label in CURVES]
    figure, axes = plt.subplots(2, 3, figsize=(16, 9))
    for axis, (key, label) in zip(axes.flat, curves):
        for stage, of_stage in stages.items():
            points = [(record["step"], record[key]) for record in of_stage if key in record]
            if points:
                axis.plot(*zip(*points), label=stage, linewidth=0.9)
        axis.set_xlabel("step")
        axis.set_ylabel(label)
        axis.grid(alpha=0.3)
    if stages:
        axes.flat[0].legend(fontsize=7)

    axis = axes.flat[5]
    models = list(dict.fromkeys(model for by_model in rows.values() for model in by_model))
    if models:
        shares = [[by_model.get(model, {}).get("ok at 1", float("nan")) for model in models]
                  for by_model in rows.values()]
        axis.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
        axis.set_xticks(range(len(models)), models, rotation=60, ha="right", fontsize=7)
        axis.set_yticks(range(len(rows)), [f"{row}, {level}" for level, row in rows], fontsize=7)
        axis.set_title("right at temperature 1", fontsize=9)
    figure.tight_layout()
    part = f"{path}.part"
    figure.savefig(part, dpi=100, format="png")
    os.replace(part, path)
    plt.close(figure)
