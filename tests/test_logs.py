"""What a run shows while it goes on: its plot at every evaluation, and --log with packages that are fakes."""
import importlib.machinery
import sys
import time
import types

import pytest

from support import logs, report
from tests import scripts
from tests.scripts import SHORT, SIZES, finish, launch, metrics, refused, train


def fake_package(monkeypatch, name, **contents):
    """A module of this name that looks installed."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    for key, value in contents.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def writers(monkeypatch):
    """A fake TensorBoard -> its writers so far."""
    made = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            self.folder = folder
            self.purge_step = purge_step
            self.scalars = []
            self.closed = False
            made.append(self)

        def add_scalar(self, name, value, step):
            assert isinstance(value, (int, float)) and not self.closed
            self.scalars.append((name, step, value))

        def close(self):
            self.closed = True

    fake_package(monkeypatch, "tensorboard")
    fake_package(monkeypatch, "torch.utils.tensorboard", SummaryWriter=SummaryWriter)
    return made


@pytest.fixture
def wandb_runs(monkeypatch):
    """A fake wandb -> its runs so far."""
    made = []

    class Run:
        def __init__(self, **options):
            self.options = options
            self.logged = []
            self.finished = False
            made.append(self)

        def log(self, values, step):
            self.logged.append((step, values))

        def finish(self):
            self.finished = True

    fake_package(monkeypatch, "wandb", init=Run)
    return made


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_package_that_is_not_installed(place, monkeypatch, name):
    """One line, before any work."""
    monkeypatch.setattr(logs.importlib.util, "find_spec", lambda package: None)
    result = train(place, f"no-{name}", f"--log={name}")
    refused(result, f"--log={name}", "not installed", f"pip install {name}")
    assert not (place / f"no-{name}").exists()


def test_an_unknown_log(place):
    refused(train(place, "other-log", "--log=mlflow"), "mlflow")


def test_tensorboard(place, writers):
    """A curve per stage, all on one time line; what metrics.jsonl holds, and nothing else."""
    code, _, err = train(place, "tb", "--log=tensorboard")
    assert code == 0, err
    out = place / "tb"
    assert [writer.folder for writer in writers] == [
        str(out.relative_to(place) / "tensorboard" / stage) for stage in ("dense", "warmup", "sparse")]
    assert all(writer.closed for writer in writers)
    before = 0
    for writer, stage in zip(writers, ("dense", "warmup", "sparse")):
        records = [record for record in metrics(out) if record["stage"] == stage]
        expected = []
        for record in records:
            for name, value in record.items():
                if name not in ("stage", "step"):
                    expected.append((name, before + record["step"], value))
        assert writer.scalars == expected
        before += len(records)
    assert "val_loss" in [name for name, _, _ in writers[0].scalars]


def test_tensorboard_of_a_resumed_stage_goes_on(tmp_path, writers):
    """A stage from its first step on begins a fresh folder, one that is resumed repeats from there."""
    folder = tmp_path / "tensorboard" / "sparse"
    folder.mkdir(parents=True)
    (folder / "events").write_text("")
    logs.TensorBoard(tmp_path, {}).add(dict(stage="sparse", step=3, loss=1.0), 13)
    assert (folder / "events").exists() and writers[-1].purge_step == 13
    logs.TensorBoard(tmp_path, {}).add(dict(stage="sparse", step=0, loss=1.0), 10)
    assert not folder.exists() and writers[-1].purge_step == 10


def test_wandb(place, wandb_runs):
    code, _, err = train(place, "wb", "--log=wandb")
    assert code == 0, err
    [run] = wandb_runs
    assert run.finished and run.options["group"] == "wb" and run.options["config"]["dense_steps"] == 6
    assert [step for step, _ in run.logged] == list(range(16))
    records = metrics(place / "wb")
    for (_, values), record in zip(run.logged, records):
        stage = record.pop("stage")
        record.pop("step")
        assert values == {f"{stage}/{name}": value for name, value in record.items()}


def test_wandb_that_refuses(place, monkeypatch):
    def init(**options):
        raise RuntimeError("api_key not configured\n(no-tty)")

    fake_package(monkeypatch, "wandb", init=init)
    result = train(place, "refused", "--log=wandb")
    refused(result, "--log=wandb", "api_key not configured", "WANDB_MODE=offline")


def test_only_rank_0_logs(place, tmp_path, monkeypatch):
    """Two processes, and a wandb on the path that notes in a file who logs."""
    (tmp_path / "wandb.py").write_text(
        "import os\n"
        "class Run:\n"
        "    def log(self, values, step):\n"
        "        with open('logged', 'a') as file:\n"
        "            file.write(os.environ['RANK'])\n"
        "    def finish(self):\n"
        "        pass\n"
        "def init(**options):\n"
        "    return Run()\n")
    here = tmp_path / "run"
    here.mkdir()
    (here / "text.txt").write_text((place / "text.txt").read_text())
    environment = scripts.environment
    path = f"{scripts.ROOT}:{tmp_path}"
    monkeypatch.setattr(scripts, "environment", lambda place: environment(place) | dict(PYTHONPATH=path))
    short = [*SHORT, "--dense_steps=2", "--warmup_steps=1", "--sparse_steps=1"]
    processes = launch(here, 2, "train.py", "--data=text.txt", "--log=wandb", "--device=cpu", *SIZES, *short)
    for process in processes:
        code, _, err = finish(process)
        assert code == 0, err
    assert (here / "logged").read_text() == "0" * 4


# ---- the plot ----

def test_the_plot_is_there_at_the_first_evaluation(place, monkeypatch):
    """And at each later one that there is time for; drawn of what was logged until then."""
    drawn = []
    plot = report.plot

    def counted(log, path, compare):
        plot(log, path, compare)
        drawn.append(len(log.read_text().splitlines()))

    monkeypatch.setattr(report, "plot", counted)
    monkeypatch.setattr(logs, "PLOT_SHARE", 1e9)
    code, _, err = train(place, "live")
    assert code == 0, err
    # evaluations after 4 and 6, 4 and 5, 4 and 5 steps, and the ends of the stages
    assert drawn == [4, 6, 6, 10, 11, 11, 15, 16, 16]


def test_drawing_takes_its_share_of_the_time(tmp_path, monkeypatch):
    """By a clock of our own: 1 s a drawing, asked for every 10 s, at a share of 2%."""
    now = [0.0]
    drawn = []
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])

    def plot(log, path, compare):
        now[0] += 1
        drawn.append(int(now[0]))

    monkeypatch.setattr(report, "plot", plot)
    live = logs.LivePlot(tmp_path, "")
    while now[0] < 1000:
        now[0] += 10
        live.refresh()
    assert drawn[0] == 11 and len(drawn) >= 19
    assert all(seconds_before <= 0.02 * end for seconds_before, end in enumerate(drawn))


def test_a_plot_that_fails_ends_no_run(place, monkeypatch, capsys):
    """--compare with a log that another run is writing: its last line may be half there."""
    live = logs.LivePlot(place, "nowhere")
    (place / "metrics.jsonl").write_text("")
    live.refresh()
    assert "plot.png is not refreshed: nowhere" in capsys.readouterr().out
