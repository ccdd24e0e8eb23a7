"""The folder of a training run: its log and summary, and the states that an interrupted run goes on from."""
import json
import re
import shutil
from contextlib import contextmanager
from pathlib import Path

import torch

from support import cli, files, report

STATE = r"state-\d-\d{7}"  # number of the stage, steps done


# ---- reading ----

def states(out):
    """The complete states in a run's folder, the latest last."""
    return sorted(path for path in out.glob("state-*") if re.fullmatch(STATE, path.name))


def latest_state(out, last_stage):
    """The folder of the state to resume from. ValueError if there is none."""
    found = states(out)
    if not found:
        finished = files.locate(out / last_stage).exists()
        reason = "the run has finished" if finished else "it stopped before its first saved state"
        raise ValueError(f"--resume: nothing to continue in {out}, {reason}; --overwrite starts anew")
    return found[-1]


def read_trainer(state, stages):
    """The trainer's part of a state folder -> dict of stage (one of `stages`), step, corpus, optimizer (on
    the CPU) and folder. ValueError names file, key and value."""
    path = state / "trainer.pt"
    try:
        trainer = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the library raises many kinds
        reason = cli.one_line(error)[:80]
        raise ValueError(f"{path}: no trainer state, or a truncated one ({reason}); start anew with "
                         "--overwrite") from None
    values = trainer if isinstance(trainer, dict) else {}
    step = values.get("step")
    right = dict(
        stage=values.get("stage") in stages,
        step=type(step) is int and step >= 0,
        corpus=isinstance(values.get("corpus"), str),
        optimizer=isinstance(values.get("optimizer"), dict))
    for key, is_right in right.items():
        if not is_right:
            shown = repr(values[key])[:40] if key in values else "missing"
            raise ValueError(f"{path}: {key} is {shown}, no trainer state of this run; start anew with "
                             "--overwrite")
    return trainer | dict(folder=state)


def restore(optimizer, trainer, shard):
    """Give an optimizer what `read_trainer` read -> the step to go on with. shard: parallel.sharded_state.
    ValueError names the file."""
    try:
        optimizer.load_state_dict(shard(optimizer, trainer["optimizer"]))
        fits = all(moments["exp_avg"].shape == p.shape for p, moments in optimizer.state.items())
    except (ValueError, KeyError, IndexError, TypeError, AttributeError):
        fits = False
    if not fits:
        raise ValueError(f"{trainer['folder'] / 'trainer.pt'}: its optimizer belongs to another model; start "
                         "anew with --overwrite")
    return trainer["step"]


def read_records(out, is_record=report.is_record, script="train.py"):
    """The records of a run's metrics.jsonl, [] where there is none. A last line that a killed process left
    unfinished is dropped. ValueError: one that is no record of this script."""
    path = out / "metrics.jsonl"
    if not path.exists():
        return []
    lines = files.read_text(path).splitlines()
    records = []
    for number, text in enumerate(lines, 1):
        try:
            record = json.loads(text)
        except ValueError:
            record = None
        if is_record(record):
            records.append(record)
        elif number < len(lines):
            raise ValueError(f"{path}, line {number}: {text[:40]!r} is no record of {script}; move the file "
                             "away")
    return records


def read_summary(out):
    """The losses in a run's summary.json, {} where there is none. ValueError names file, key and value."""
    path = out / "summary.json"
    summary = files.read_json(path) if path.exists() else {}
    for name, value in summary.items():
        if type(value) not in (int, float):
            raise ValueError(f"{path}: {name}={value!r} is not a loss; remove the file")
    return summary


def check_earlier(options, earlier, names):
    """ValueError if a run would replace the folders `earlier`, which are there, without being told to, or
    with --overwrite one that the options of these names say it reads."""
    replaced = [path.resolve() for path in earlier]
    for name in names:
        value = getattr(options, name)
        if options.overwrite and value and Path(value).resolve() in replaced:
            raise ValueError(f"--{name}={value} is what --overwrite would replace; choose another --out_dir")
    if earlier and not (options.resume or options.overwrite):
        raise ValueError(f"{earlier[-1]} exists: continue with --resume, replace it with --overwrite, or "
                         "choose another --out_dir")


# ---- writing ----

@contextmanager
def saving(out):
    """If something cannot be written, above all to a full disk, say where the run can go on."""
    try:
        yield
    except OSError as error:
        found = sorted(path for path in out.glob("state-*") if not path.suffix)  # post_train.py's, too
        advice = f"{found[-1]} is complete, go on with --resume" if found else "no state was saved before"
        raise OSError(f"{error}; make room: {advice}") from None


def write_text(path, text):
    """A small file of a run's folder: the old one or the new one, whenever the process dies."""
    with saving(path.parent):
        files.replace_text(path, text)


def append_record(out, record):
    """A line of metrics.jsonl."""
    path = out / "metrics.jsonl"
    with saving(out):
        try:
            with open(path, "a") as log:
                log.write(json.dumps(record) + "\n")
        except OSError as error:
            raise files.not_written(path, error) from None


def save_state(out, model, optimizer, stage, step, corpus):
    """The folder state-<stage>-<step> for --resume; it appears whole, then older ones go. optimizer: its
    state_dict."""
    folder = out / f"state-{report.STAGES.index(stage)}-{step:07d}"
    trainer = dict(stage=stage, step=step, corpus=corpus, optimizer=optimizer)
    with saving(out), files.whole_folder(folder) as part:
        model.save_pretrained(part)
        with open(part / "trainer.pt", "wb") as file:
            torch.save(trainer, file)
    for old in states(out)[:-1]:
        shutil.rmtree(old)


def remove_states(out):
    """All states, and what a killed process left of unfinished ones."""
    for path in out.iterdir():
        if re.fullmatch(rf"\.?{STATE}(\.\w+)*", path.name):
            shutil.rmtree(path)


def clear(folder):
    """Remove a folder; one that is a link is emptied, and stays a link."""
    if not folder.is_symlink():
        shutil.rmtree(folder)
        return
    for path in folder.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
