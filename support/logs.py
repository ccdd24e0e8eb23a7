"""What a training run shows while it goes on: its plot, and its numbers in TensorBoard or Weights & Biases
where they are installed."""
import importlib.util
import shutil
import time

from tqdm import tqdm

from support import report

LOGS = ("none", "tensorboard", "wandb")
PROJECT = "deepseek-sparse-attention"  # in Weights & Biases
PLOT_SHARE = 0.02  # of the run's time so far, which refreshing the plot may take


def check(name):
    """ValueError if the package that --log=name needs is not installed."""
    if name != "none" and not importlib.util.find_spec(name):
        raise ValueError(f"--log={name}: {name} is not installed; pip install {name}, or leave --log out "
                         "(metrics.jsonl and plot.png are always written)")


class Log:
    """--log=none: a record of metrics.jsonl goes nowhere else."""

    def add(self, record, step):
        """A record, and its step counted from the first stage on."""

    def close(self):
        """Until everything is written."""


class TensorBoard(Log):
    """A folder of events per stage, so that stages are curves of their own, the control over the sparse
    stage."""

    def __init__(self, out, options):
        from torch.utils.tensorboard import SummaryWriter
        self.open = SummaryWriter
        self.out = out / "tensorboard"
        self.writers = {}

    def writer(self, record, step):
        """The stage's, in a fresh folder; a stage that is resumed repeats the steps from here on."""
        stage = record["stage"]
        if stage not in self.writers:
            if record["step"] == 0:
                shutil.rmtree(self.out / stage, ignore_errors=True)
            self.writers[stage] = self.open(str(self.out / stage), purge_step=step)
        return self.writers[stage]

    def add(self, record, step):
        writer = self.writer(record, step)
        for name, value in record.items():
            if name not in ("stage", "step"):
                writer.add_scalar(name, value, step)

    def close(self):
        for writer in self.writers.values():
            writer.close()


class WeightsAndBiases(Log):
    """One run there for each start of train.py; those of one out_dir are a group. WANDB_MODE=offline needs no
    account."""

    def __init__(self, out, options):
        import wandb
        try:
            self.run = wandb.init(project=PROJECT, group=out.resolve().name, dir=str(out), config=options)
        except Exception as error:  # of a network or an account the library raises many kinds
            raise ValueError(f"--log=wandb: {error}; log in, set WANDB_MODE=offline, or leave --log "
                             "out") from None

    def add(self, record, step):
        values = {f"{record['stage']}/{name}": value for name, value in record.items()}
        del values[f"{record['stage']}/stage"]
        del values[f"{record['stage']}/step"]
        self.run.log(values, step=step)

    def close(self):
        self.run.finish()


def start(name, out, options):
    """-> the Log that --log=name asks for. ValueError: Weights & Biases refuses."""
    kinds = dict(none=lambda out, options: Log(), tensorboard=TensorBoard, wandb=WeightsAndBiases)
    return kinds[name](out, options)


class LivePlot:
    """plot.png of a run that goes on. Drawing takes a third of a second, seconds where the log is long: it is
    left out while the drawings so far took more than PLOT_SHARE of the time since the run began."""

    def __init__(self, out, compare):
        import matplotlib.pyplot  # noqa: F401  now, since the first drawing is measured, too
        self.out = out
        self.compare = compare
        self.began = time.perf_counter()
        self.spent = 0.0

    def refresh(self):
        """Draw what metrics.jsonl holds by now, if there is time. What cannot be drawn or written now may be
        at the next evaluation: no reason to end a run."""
        start = time.perf_counter()
        if self.spent > PLOT_SHARE * (start - self.began):
            return
        try:
            report.plot(self.out / "metrics.jsonl", self.out / "plot.png", self.compare)
        except (OSError, ValueError) as error:
            tqdm.write(f"plot.png is not refreshed: {error}")
        self.spent += time.perf_counter() - start
