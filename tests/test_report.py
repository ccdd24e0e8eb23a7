"""Plots of runs, and what tools/report.py keeps and tabulates."""
import json
import shutil

import matplotlib.pyplot as plt

from support import report
from tests.scripts import call, metrics
from tools.report import collect


def test_runs_are_collected_compared_and_tabulated(place, run, control):
    code, _, err = call(place, "evaluate.py", f"--checkpoint={control}/sparse", "--batches=2", "--copies=2")
    assert code == 0, err
    code, out, err = call(place, "tools/report.py", "kept/a", f"--collect={control}", "--plots")
    kept = place / "kept"
    names = ["copy.png", "distances.png", "evaluation.json", "loss.png", "metrics.jsonl", "plot.png",
             "recall.png", "run.json", "summary.json"]
    assert code == 0 and sorted(path.name for path in (kept / "a").iterdir()) == names, err
    full = metrics(control)
    thin = metrics(kept / "a")
    expected = [(r["stage"], r["step"]) for r in full if r["step"] % 5 == 0 or "val_loss" in r]
    assert [(r["stage"], r["step"]) for r in thin] == expected
    assert thin[0]["loss"] == float(f"{full[0]['loss']:.8g}")

    shutil.copytree(run[0], kept / "b10", ignore=shutil.ignore_patterns("dense", "warmup", "sparse"))
    shutil.copytree(kept / "b10", kept / "b9")
    code, out, err = call(place, "tools/report.py", "kept")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in out.splitlines()]
    assert code == 0 and [row[0] for row in table] == ["run", "---", "a", "b9", "b10"], err
    assert len({len(row) for row in table}) == 1
    summary = json.loads((control / "summary.json").read_text())
    a = dict(zip(table[0], table[2]))
    assert a["dense control"] == f"{summary['val_loss, dense attention, after control']:.4f}"
    assert table[3][3] == ""

    picture = kept / "b9" / "plot.png"
    before = picture.read_bytes()
    code, _, err = call(place, "tools/report.py", "kept/b9", "--compare=kept/a,kept/b10/metrics.jsonl")
    assert code == 0 and before != picture.read_bytes() and picture.read_bytes()[:4] == b"\x89PNG", err


def test_thinned_logs_are_small(place):
    (place / "long").mkdir()
    for name in ("run.json", "summary.json"):
        (place / "long" / name).write_text("{}")
    keys = "loss lm kl kl_uniform recall lr grad_norm index_grad_norm tokens_per_second mfu memory_gb".split()
    numbers = dict.fromkeys(keys, 123456.78901234567)
    lines = [json.dumps(dict(stage="dense", step=i, **numbers)) + "\n" for i in range(2000)]
    (place / "long" / "metrics.jsonl").write_text("".join(lines))
    collect(place / "long", place / "thin", False)
    assert len(metrics(place / "thin")) == 200
    assert (place / "thin" / "metrics.jsonl").stat().st_size < 70000


def span(line):
    """First and last step of a curve."""
    return [int(min(line.get_xdata())), int(max(line.get_xdata()))]


def test_compared_runs_lie_stage_over_stage(place, control, monkeypatch):
    """A run that begins with its sparse stage is drawn over the sparse stage of a longer one, and so is the
    control."""
    (place / "late").mkdir()
    late = [r for r in metrics(control) if r["stage"] == "sparse"]
    late.append(dict(stage="sparse", step=9, loss=1.0, lm=1.0, val_loss=1.0, kl=0.5, recall=0.5))
    (place / "late" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in late))
    axes = []
    monkeypatch.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
    report.plot(control / "metrics.jsonl", place / "late" / "plot.png", str(place / "late"))
    spans = {line.get_label(): span(line) for line in axes[0].lines}
    assert spans["dense control"] == [11 + 3, 11 + 4] and spans["late"][1] == 11 + 9
    assert spans["training"] == [0, 5]
    assert [span(line) for line in axes[1].lines if line.get_label() == "late"] == [[11, 20]]
    assert [line.get_label() for line in axes[2].lines].count("late") == 1


def test_a_line_of_the_log():
    record = dict(stage="sparse", step=9, loss=1.23456, val_loss=2.0, tokens_per_second=1234.5, mfu=0.256,
                  memory_gb=1.04)
    want = "sparse step     10: loss 1.2346, validation 2.0000, 1,234 tokens/s, 26% MFU, 1.0 GB"
    assert report.line(record) == want
    index = dict(kl=0.1, kl_uniform=0.5, recall=0.9)
    assert "KL 0.1000 (uniform 0.5000), recall 0.900, 1,234 tokens/s" in report.line(record | index)
