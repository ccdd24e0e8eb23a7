"""Post-training as DeepSeek-V3.2-Exp did it: specialists by reinforcement learning, distilled into one model,
which learns on in all domains at once; with sparse attention throughout.

    python post_train.py                                       # the whole chain on a new model
    python post_train.py --init_from=out/sparse                # on a checkpoint of train.py on bytes
    python post_train.py --stage=specialists --domains=math    # a part of it, from what is in out_dir

Stages, and the checkpoints in out_dir that they leave:
  base          base: trained on sloppy demonstrations of all tasks (dense, warm-up and sparse stage as in
                train.py; from a checkpoint the sparse stage alone), and judge: the base, taught to write a
                verdict on each point of a rubric
  specialists   specialist-DOMAIN: from the base by GRPO, one for each domain
  distillation  generalist: the base, trained on what the specialists wrote and checkers passed
  mixed         mixed-base, mixed: GRPO in all domains at once, from the base, and from the generalist at the
                next level of difficulty
  sequential    sequential: the control of mixed-base, the same steps domain after domain
  evaluate      evaluation.json and tables: accuracy of every model in every domain and mode

The tasks are those of tasks.py, the loss is grpo.py's. A run follows from its options: step n of a checkpoint
is a function of (seed, checkpoint, n), so an interrupted run continues with --resume as if nothing had
happened. out_dir also holds run.json, metrics.jsonl and plot.png.
"""
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from random import Random
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.utils import clip_grad_norm_
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

import exam
import grpo
import parallel
import tasks
from config import Config, option
from generate import LEAST_TOP_P
from model import Transformer
from rewards import Judge, judge_agreement, rewards_of, subjective, summary
from rollout import Roller, join, part, prompt_columns, rounded
from support import checkpoint, chat, cli, files, post_report, report, runs, tokenizer
from train import MODEL_FIELDS, adamw, learning_rate, trainable

STAGES = ("base", "specialists", "distillation", "mixed", "sequential", "evaluate")
PROMPT_WEIGHT = 0.02  # of a prompt's tokens in supervised losses: enough to learn what prompts look like
PACKERS = 6  # processes that pack batches for a GPU
ANSWERS_AT_ONCE = 512  # for distillation, at least, on a CPU, where many steps of few rows are slower
EASY_PAGE = 200  # letters, where demonstrations of longer pages begin
HARDER_SHARE = 0.2  # of the base's demonstrations that are of the next level


# ---- options ----

@dataclass
class Options:
    """Every option. Model sizes: the keys of config.Config."""
    stage: str = option("all", "which stage to run", "all", *STAGES)
    init_from: str = option("", "checkpoint folder with an indexer that the base starts from")
    out_dir: str = option("out/post", "folder for checkpoints, metrics and plot")
    resume: bool = option(False, "continue the interrupted run in out_dir")
    overwrite: bool = option(False, "replace the checkpoints in out_dir that this run makes anew")
    quick: bool = option(False, "few steps of everything: to see that it runs")
    domains: str = option("", "domains, with commas between (empty: all of tasks.py)")
    level: int = option(1, "difficulty of the tasks; the generalist's RL and some demonstrations are one "
                        "above")
    page: int = option(24, "length of the pages of search, in characters; above k, or nothing is selected")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    backend: str = option("auto", "attention path: PyTorch reference or Triton kernels (auto: triton on a "
                          "CUDA GPU)", "auto", "torch", "triton")
    dtype: str = option("float32", "precision of the linear layers (autocast)", "float32", "bfloat16")
    seed: int = option(1337, "of initialisation, tasks and sampling")
    index_fp8: bool = option(True, "select by FP8 index scores, as the published inference does")
    fp8_cache: bool = option(False, "rollouts keep latents in the published FP8 layout")

    block_size: int = option(128, "supervised: context length in tokens")
    batch_size: int = option(16, "supervised: sequences per step")
    dense_steps: int = option(1200, "supervised: steps of the dense stage")
    warmup_steps: int = option(60, "supervised: steps of the indexers' warm-up")
    sparse_steps: int = option(150, "supervised: steps of the base's sparse stage")
    judge_steps: int = option(250, "supervised: steps of the reward model")
    distillation_steps: int = option(200, "supervised: steps of the generalist")
    dense_lr: float = option(3e-3, "supervised: peak learning rate of the dense stage")
    warmup_lr: float = option(1e-2, "supervised: peak learning rate of the warm-up")
    sparse_lr: float = option(1e-3, "supervised: peak learning rate of the sparse stages")
    answers: int = option(600, "distillation: answers of a specialist to learn from, for each mode")

    specialist_steps: int = option(25, "GRPO: steps of a specialist")
    mixed_steps: int = option(40, "GRPO: steps in all domains, also of the control")
    rows: int = option(128, "GRPO: answers that are sampled at a time")
    group: int = option(8, "GRPO: answers to one prompt")
    live_groups: int = option(8, "GRPO: sample again until so many groups have unequal rewards")
    draws: int = option(2, "GRPO: but at most so often")
    rl_lr: float = option(3e-4, "GRPO: peak learning rate")
    updates: int = option(2, "GRPO: updates of the weights per step")
    micro_rows: int = option(32, "GRPO: answers per forward and backward")
    clip: float = option(0.2, "GRPO: bound of the ratio's distance from 1")
    kl_weight: float = option(0.0, "GRPO: weight of the KL to the model that a stage starts from")
    drift_bound: float = option(0.1, "GRPO: a bad answer that has become less likely by more than this, in "
                                "nats per token, is left out")
    normalise: bool = option(False, "GRPO: divide advantages by the group's standard deviation")
    temperature: float = option(1.0, "GRPO: temperature of rollouts")
    top_p: float = option(1.0, "GRPO: rollouts sample from the most likely tokens of this probability")
    keep_selection: bool = option(True, "GRPO: the trainer attends to what the rollout selected (false: it "
                                  "selects anew, an ablation)")
    train_indexer: bool = option(True, "GRPO: the indexers learn by their KL (false: they are frozen)")
    length_penalty: float = option(0.1, "reward: taken off a right answer as long as the limit")
    language_penalty: float = option(0.3, "reward: taken off a right answer whose chain is in the other "
                                     "language")

    eval_tasks: int = option(32, "evaluation: tasks for each domain and mode")
    eval_samples: int = option(4, "evaluation: answers to each at temperature 1, for pass@k")
    schedule: str = option("cosine", "learning rate after the ramp", "cosine", "constant")
    ramp_steps: int = option(10, "steps over which a learning rate rises")
    min_lr: float = option(0.1, "final learning rate of the cosine, as a fraction of the peak")
    weight_decay: float = option(0.0, "AdamW, on matrices")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    grad_clip: float = option(1.0, "largest gradient norm, of the model and of the indexers separately")
    save_interval: int = option(50, "steps between states to --resume from")


QUICK = dict(
    dense_steps=150, warmup_steps=20, sparse_steps=30, judge_steps=40, distillation_steps=30, answers=64,
    specialist_steps=3, mixed_steps=4, rows=32, group=4, live_groups=2, draws=1, micro_rows=32, eval_tasks=8,
    eval_samples=2)
# Defaults that differ on a CUDA GPU: the model of 27M parameters of train.py
GPU = dict(
    dtype="bfloat16", block_size=1024, batch_size=32, page=160,
    dense_steps=2000, warmup_steps=100, sparse_steps=200, judge_steps=300, distillation_steps=300,
    dense_lr=1e-3, warmup_lr=2e-3, sparse_lr=3e-4, answers=1000,
    specialist_steps=40, mixed_steps=60, rows=512, live_groups=48, draws=3, rl_lr=3e-5, micro_rows=256,
    eval_tasks=128, ramp_steps=20, save_interval=500,
    hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    index_n_heads=8, index_head_dim=64, index_topk=64, initializer_range=0.02)
SMALL = dict(index_topk=8)  # of a new model on other devices: below what a page holds
# What later stages and a run being resumed cannot change: the base was made for it
FIXED = {"init_from", "seed", "page", *(field.name for field in MODEL_FIELDS)}
OPTIONS = tuple(field.name for field in fields(Options))
RANGES = (
    ("level", 1, 5), ("page", 4, 100000), ("seed", 0, 2**63 - 1), ("block_size", 64, math.inf),
    ("batch_size", 1, math.inf), ("dense_steps", 0, math.inf), ("warmup_steps", 0, math.inf),
    ("sparse_steps", 0, math.inf), ("judge_steps", 0, math.inf), ("distillation_steps", 0, math.inf),
    ("dense_lr", 0, math.inf), ("warmup_lr", 0, math.inf), ("sparse_lr", 0, math.inf),
    ("answers", 1, math.inf), ("specialist_steps", 0, math.inf), ("mixed_steps", 0, math.inf),
    ("rows", 2, math.inf), ("group", 2, math.inf), ("live_groups", 1, math.inf), ("draws", 1, math.inf),
    ("rl_lr", 0, math.inf), ("updates", 1, math.inf), ("micro_rows", 1, math.inf), ("clip", 1e-9, 1),
    ("kl_weight", 0, math.inf), ("drift_bound", 0, math.inf), ("temperature", 1e-3, math.inf),
    ("top_p", LEAST_TOP_P, 1), ("length_penalty", 0, 1), ("language_penalty", 0, 1),
    ("eval_tasks", 1, math.inf), ("eval_samples", 1, math.inf), ("ramp_steps", 0, math.inf), ("min_lr", 0, 1),
    ("weight_decay", 0, math.inf), ("beta1", 0, 0.9999999), ("beta2", 0, 0.9999999),
    ("grad_clip", 1e-12, math.inf), ("save_interval", 1, math.inf))


def resolve(argv):
    """-> Options, dict of the model sizes given, device. Precedence: command line, --config file, the run
    that is in out_dir, --quick, the device's defaults. ValueError or FileNotFoundError: one line with value
    and fix."""
    given = cli.parse_fields(cli.Parser(__doc__), (*fields(Options), *MODEL_FIELDS), GPU, argv)
    if parallel.world_size() > 1:
        raise ValueError(f"{parallel.world_size()} processes of torchrun: post-training runs in one; start "
                         "it with python")
    out = Path(given.get("out_dir", Options.out_dir))
    earlier = {}
    if given.get("resume") and not (out / "run.json").is_file():
        raise FileNotFoundError(f"--resume: {out / 'run.json'} does not exist, there is no run to continue; "
                                "leave --resume out")
    if given.get("resume") and given.get("overwrite"):
        raise ValueError("--resume with --overwrite: choose one")
    if (given.get("resume") or not begins_anew(given)) and (out / "run.json").is_file():
        earlier = files.run_options(out)
        if "data" in earlier:  # an option of train.py
            raise ValueError(f"{out / 'run.json'}: is of a run of train.py; choose another --out_dir")
        cli.check_stored(out / "run.json", earlier, (*fields(Options), *MODEL_FIELDS))
        for name in sorted(FIXED & given.keys()):
            if given[name] != earlier.get(name):
                raise ValueError(f"--{name}={given[name]}: the run in {out} has {earlier.get(name)}; leave "
                                 "the option out, or choose another --out_dir")
        dropped = ("out_dir",) if given.get("resume") else ("out_dir", "stage", "device")
        earlier = {name: value for name, value in earlier.items() if name not in dropped}
    device = cli.device(given.get("device", earlier.get("device", "auto")))
    defaults = GPU if device.type == "cuda" else SMALL
    if given.get("quick"):
        defaults = defaults | QUICK
    init_from = given.get("init_from", earlier.get("init_from"))
    if init_from:  # sizes are the checkpoint's
        topk = given.get("index_topk") or checkpoint.read_config(init_from).index_topk
        defaults = {name: value for name, value in defaults.items() if name in OPTIONS}
        defaults["page"] = max(defaults.get("page", Options.page), 5 * topk // 2)
    values = defaults | earlier | given
    options = Options(**{name: value for name, value in values.items() if name in OPTIONS})
    sizes = {name: value for name, value in values.items() if name not in OPTIONS}
    check_options(options, sizes, device)
    return options, sizes, device


def begins_anew(given):
    """Is a run, by its options, one that makes its own base?"""
    return given.get("stage", "all") in ("all", "base")


def check_options(options, sizes, device):
    """ValueError or FileNotFoundError for options that are wrong by themselves or on this device."""
    cli.check_ranges(options, *RANGES)
    if not options.out_dir:
        raise ValueError("--out_dir=: name a folder")
    files.destination(options.out_dir)
    unknown = [name for name in domains_of(options) if name not in tasks.DOMAINS]
    if unknown:
        raise ValueError(f"--domains={options.domains}: {unknown[0]!r} is none; choose from "
                         f"{', '.join(tasks.DOMAINS)}")
    if options.rows % options.group:
        raise ValueError(f"--rows={options.rows}: must be a multiple of --group={options.group}")
    if options.live_groups > options.rows // options.group * options.draws:
        raise ValueError(f"--live_groups={options.live_groups}: more than --draws={options.draws} times "
                         f"--rows={options.rows} hold in groups of {options.group}")
    cli.backend(options.backend, device)
    if options.index_fp8 or options.fp8_cache:
        cli.check_e4m3(device, "--index_fp8=true or --fp8_cache=true", "--index_fp8=false")
    if options.init_from:
        config = checkpoint.read_config(options.init_from)
        name = tokenizer.tokenizer_name(options.init_from)
        if not config.index_topk:
            raise ValueError(f"--init_from={options.init_from}: has no indexer (index_topk=0); train one: "
                             f"train.py --stage=warmup --init_from={options.init_from}")
        if name != "bytes" or config.vocab_size <= tasks.EOT:
            raise ValueError(f"--init_from={options.init_from}: its tokenizer is {name}; the tasks are "
                             "written in bytes: use a checkpoint of train.py --tokenizer=bytes")
        other = [name for name in sizes if name != "index_topk" and sizes[name] != getattr(config, name)]
        if other:
            raise ValueError(f"--{other[0]}={sizes[other[0]]}: the checkpoint {options.init_from} has "
                             f"{getattr(config, other[0])}; leave the option out")
        topk = sizes.get("index_topk", config.index_topk)
    else:
        config = Config(**sizes).check()
        topk = config.index_topk
    if topk < 1:
        raise ValueError(f"--index_topk={topk}: a query selects at least 1 token")
    if options.block_size <= topk:
        raise ValueError(f"--block_size={options.block_size}: not longer than index_topk={topk}, so nothing "
                         "would be selected; lower --index_topk")
    longest, widest = longest_task(options)
    if longest > options.block_size:
        raise ValueError(f"--block_size={options.block_size}: a task takes up to {longest} tokens; raise it, "
                         "or lower --page or --level")
    if max(options.block_size, widest) > config.max_position_embeddings:
        raise ValueError(f"--block_size={options.block_size}, and rollouts of up to {widest} tokens: longer "
                         f"than max_position_embeddings={config.max_position_embeddings}; lower --block_size "
                         "or --page")


def longest_task(options):
    """At the next level, which is the harder one -> tokens of the longest task, prompt and answer; of a
    rollout, whose rows are as long as its longest prompt and its longest answer."""
    batch = tasks.batch(Random(0), domains_of(options), 50, options.level + 1, options.page)
    longest = max(len(task.prompt()) + task.limit for task in batch)
    return longest, prompt_columns(batch) + rounded(max(task.limit for task in batch))


def domains_of(options):
    """-> list of the domains of a run."""
    return options.domains.split(",") if options.domains else list(tasks.DOMAINS)


# ---- what is to be done ----

class Job(NamedTuple):
    """The training of one checkpoint."""
    name: str  # of its folder in out_dir
    kind: str  # dense, warmup, sparse: supervised stages of train.py; grpo
    start: str  # folder of the checkpoint that it starts from; "": a new model
    steps: int
    lr: float
    domains: list
    level: int


def plan(options, stage):
    """-> list of the Jobs of a stage."""
    domains = domains_of(options)
    level = options.level
    out = Path(options.out_dir)
    if stage == "base":
        jobs = []
        if not options.init_from:
            jobs.append(Job("dense", "dense", "", options.dense_steps, options.dense_lr, domains, level))
            start = str(out / "dense")
            steps = options.warmup_steps
            jobs.append(Job("warmup", "warmup", start, steps, options.warmup_lr, domains, level))
        start = options.init_from or str(out / "warmup")
        jobs.append(Job("base", "sparse", start, options.sparse_steps, options.sparse_lr, domains, level))
        if subjective(domains):
            start = str(out / "base")
            jobs.append(Job("judge", "sparse", start, options.judge_steps, options.sparse_lr, domains, level))
        return jobs
    base = str(out / "base")
    generalist = str(out / "generalist")
    rl = (options.mixed_steps, options.rl_lr, domains)
    if stage == "specialists":
        steps = options.specialist_steps
        return [Job(f"specialist-{d}", "grpo", base, steps, options.rl_lr, [d], level) for d in domains]
    if stage == "distillation":
        steps = options.distillation_steps
        return [Job("generalist", "sparse", base, steps, options.sparse_lr, domains, level)]
    if stage == "mixed":
        return [Job("mixed-base", "grpo", base, *rl, level),
                Job("mixed", "grpo", generalist, *rl, level + 1)]
    if stage == "sequential":
        return [Job("sequential", "grpo", base, *rl, level)]
    return []


@dataclass
class Run:
    """What the jobs of a run share."""
    options: Options
    sizes: dict
    device: torch.device
    out: Path
    caught: list  # signals that ask to stop

    def autocast(self):
        """A context for linear layers in options.dtype. Casts of weights are not cached: a CUDA graph would
        go on reading those of its capture."""
        enabled = self.options.dtype == "bfloat16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled, cache_enabled=False)

    def load(self, folder):
        """-> the model in a checkpoint folder, with sparse attention."""
        backend = cli.backend(self.options.backend, self.device)
        model = Transformer.from_pretrained(
            folder, backend, index_fp8=self.options.index_fp8, device=self.device, dtype=torch.float32)
        model.config.index_topk = self.sizes.get("index_topk", model.config.index_topk)
        return model

    def new(self):
        """-> a new model."""
        torch.manual_seed(self.options.seed)
        backend = cli.backend(self.options.backend, self.device)
        config = Config(vocab_size=tasks.EOT + 1, **self.sizes)
        return Transformer(config, backend, index_fp8=self.options.index_fp8).to(self.device)

    def roller(self, model):
        """-> what rolls this model out."""
        return Roller(model, self.device, self.autocast, self.options.fp8_cache)

    def judge(self):
        """-> the reward model."""
        return Judge(self.roller(self.load(self.out / "judge")))

    def random(self, job, step):
        """-> the source of a step's choices, and the torch.Generators of its samples and of its order."""
        random = random_of(self.options, job, step)
        sampling = torch.Generator(self.device).manual_seed(random.getrandbits(62))
        order = torch.Generator().manual_seed(random.getrandbits(62))
        return random, sampling, order


def random_of(options, job, step):
    """-> the source of a step's choices."""
    return Random(f"{options.seed} {job} {step}")


# ---- states ----

def state_folder(run, job):
    """Where a job's state for --resume lies."""
    return run.out / f"state-{job.name}"


def save_state(run, job, model, optimizer, step):
    """The folder state-NAME for --resume; it appears whole."""
    trainer = dict(job=job.name, step=step, optimizer=optimizer.state_dict())
    with runs.saving(run.out), files.whole_folder(state_folder(run, job)) as part_folder:
        model.save_pretrained(part_folder)
        with open(part_folder / "trainer.pt", "wb") as file:
            torch.save(trainer, file)


def read_state(folder, job):
    """-> the trainer's part of a state. ValueError names the file."""
    path = folder / "trainer.pt"
    try:
        trainer = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged file the library raises many kinds
        raise ValueError(f"{path}: no trainer state, or a truncated one ({cli.one_line(error)[:80]}); "
                         f"remove {folder}") from None
    fits = isinstance(trainer, dict) and trainer.get("job") == job.name and type(trainer.get("step")) is int
    if not fits or not 0 <= trainer["step"] <= job.steps:
        raise ValueError(f"{path}: no trainer state of {job.name}; remove {folder}")
    return trainer | dict(folder=folder)


def keep_records(run, names):
    """Cut the log where the run goes on: names {job: its first step that is logged anew}."""
    path = run.out / "metrics.jsonl"
    kept = []
    for record in post_report.read_log(run.out):
        if record["step"] < names.get(record["stage"], math.inf):
            kept.append(json.dumps(record) + "\n")
    runs.write_text(path, "".join(kept))


# ---- supervised stages ----

def demonstration(random, job, options):
    """-> prompt, ids behind it, of a sloppy demonstration; of the judge's of its own task, a true one. Long
    pages come in all lengths from EASY_PAGE: it is on short ones that reading is learned."""
    level = job.level + (random.random() < HARDER_SHARE)
    if job.name == "judge":
        task = tasks.make(random, random.choice(subjective(job.domains)), None, level, options.page)
        verdict = tasks.Verdict(task, tasks.candidate(random, task))
        return verdict.prompt(), verdict.demo()
    page = options.page
    if page > EASY_PAGE:
        page = round(EASY_PAGE * (page / EASY_PAGE) ** random.random())
    task = tasks.make(random, random.choice(job.domains), None, level, page)
    return task.prompt(), task.demo(random, tasks.SLOPPY)


class Batches(Dataset):
    """What a supervised job reads: batch n is a function of (seed, job, n)."""

    def __init__(self, run, job):
        self.options = run.options
        self.job = job
        self.answers = None  # of the specialists, for the generalist alone
        if job.name == "generalist":
            lines = (run.out / "distillation.jsonl").read_text().splitlines()
            self.answers = [json.loads(line) for line in lines]

    def __getitem__(self, step):
        return packed(self.documents(random_of(self.options, self.job.name, step)), self.options)

    def documents(self, random):
        """Yield (prompt, ids behind it) to learn from."""
        while True:
            if self.answers is None:
                yield demonstration(random, self.job, self.options)
            else:
                document = random.choice(self.answers)
                yield document["prompt"], document["out"]


def packed(documents, options):
    """Pack documents, an iterator of (prompt, ids behind it), one behind the other into rows; one that does
    not fit into what is left begins the next row -> ids (B,S+1), weight (B,S) of each target, first (B,S)."""
    width = options.block_size + 1
    ids = [[]]
    weight = [[]]
    first = [[]]
    while True:
        prompt, out = next(documents)
        text = (prompt + out)[:width]
        if len(ids[-1]) + len(text) > width:
            missing = width - len(ids[-1])
            first[-1] += range(len(ids[-1]), width)
            ids[-1] += [tasks.EOT] * missing
            weight[-1] += [0.0] * missing
            if len(ids) == options.batch_size:
                break
            for rows in (ids, weight, first):
                rows.append([])
        first[-1] += [len(ids[-1])] * len(text)
        own = [1.0 if mine else 0.0 for mine in tasks.own_tokens(out)]
        weights = [PROMPT_WEIGHT] * len(prompt) + own
        weights[0] = 0.0  # nothing predicts a first token
        weight[-1] += weights[:len(text)]
        ids[-1] += text
    return (torch.tensor(ids), torch.tensor(weight)[:, 1:],
            torch.tensor(first, dtype=torch.int32)[:, :-1])


class Supervised:
    """The steps of a supervised job. On a GPU other processes pack the batches, since the host would take as
    long for one as the GPU for its step."""

    def __init__(self, run, job, start):
        workers = min(PACKERS, os.cpu_count()) if run.device.type == "cuda" else 0
        self.batches = iter(DataLoader(
            Batches(run, job), batch_size=None, sampler=range(start, job.steps), num_workers=workers))

    def step(self, run, job, model, optimizer, groups, step):
        """-> dict of floats."""
        ids, weight, first = (x.to(run.device) for x in next(self.batches))
        indexing = job.kind != "dense"
        with run.autocast():
            logits, losses = model(ids[:, :-1], first=first, index_loss=indexing)
            nats = F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        lm = (nats * weight.flatten()).sum() / weight.sum()
        total = losses.get("kl", 0)
        if job.kind != "warmup":
            total = lm + total
        total.backward()
        norms = [clip_grad_norm_(group, run.options.grad_clip).to(run.device) for group in groups]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        values = dict(loss=lm, **losses, grad_norm=norms[0], index_grad_norm=norms[1])
        return dict(zip(values, torch.stack([value.detach().float() for value in values.values()]).tolist()))


# ---- reinforcement learning ----

def domain_of(job, options, step, group):
    """The domain of a group in a step: all in turn, or in the sequential control one after the other."""
    if job.name == "sequential":
        return job.domains[step * len(job.domains) // job.steps]
    return job.domains[(step * (options.rows // options.group) + group) % len(job.domains)]


def draw_groups(run, job, roller, judge, step):
    """Sample answers until enough groups have something to tell apart -> the Rollout of those groups (None
    if there are none), their rewards (N,), and the step's metrics."""
    options = run.options
    random, generator, _ = run.random(job.name, step)
    draws = []
    for _ in range(options.draws):
        batch = []
        for group in range(options.rows // options.group):
            domain = domain_of(job, options, step, group)
            batch += [tasks.make(random, domain, None, job.level, options.page)] * options.group
        draws.append(batch)
    columns = max(prompt_columns(batch) for batch in draws)

    began = time.perf_counter()
    kept = []
    rewards = []
    scored = []
    asked = []
    tokens = 0
    groups = 0
    for batch in draws:
        top_p = options.top_p if options.top_p < 1 else None
        rollout = roller(
            batch, options.temperature, top_p, generator=generator, traced=True, columns=columns)
        results = rewards_of(options, batch, rollout.outs, judge)
        scored += results
        asked += list(zip(batch, rollout.outs))
        tokens += int(rollout.own.sum())
        values = torch.tensor([result["reward"] for result in results]).view(-1, options.group)
        live = (values.amax(1) > values.amin(1)).nonzero()[:, 0]  # groups
        groups += len(live)
        if len(live):
            rows = (live[:, None] * options.group + torch.arange(options.group)).flatten()
            kept.append(part(rollout, rows.to(run.device)))
            rewards.append(values[live].flatten())
        if groups >= options.live_groups:
            break
    seconds = time.perf_counter() - began
    facts = summary(scored, asked)
    facts["live"] = groups / (len(scored) // options.group)
    facts["rollout_seconds"] = seconds
    facts["rollout_tokens_per_second"] = tokens / seconds
    if not kept:
        return None, None, facts
    return join(kept), torch.cat(rewards), facts


class Learner:
    """The steps of a GRPO job."""

    def __init__(self, run, job, model):
        self.roller = run.roller(model)
        self.judge = run.judge() if subjective(job.domains) else None
        self.reference = None
        if run.options.kl_weight:
            self.reference = run.load(job.start)
            self.reference.requires_grad_(False)

    def step(self, run, job, model, optimizer, groups, step):
        """-> dict of floats."""
        options = run.options
        rollout, rewards, facts = draw_groups(run, job, self.roller, self.judge, step)
        if rollout is None:
            return facts
        advantage = grpo.advantages(rewards, options.group, options.normalise).to(run.device)
        _, _, order = run.random(job.name, step)
        began = time.perf_counter()
        facts |= grpo.step(
            model, self.reference, optimizer, groups, rollout, advantage, options, run.autocast, order)
        return facts | dict(update_seconds=time.perf_counter() - began)


# ---- distillation ----

def write_answers(run):
    """distillation.jsonl: prompts and the specialists' answers that pass: right by the checker, in the
    prompt's language; of several to a prompt the shortest. On rubrics the judge must grant every point."""
    options = run.options
    lines = []
    for domain in domains_of(options):
        roller = run.roller(run.load(run.out / f"specialist-{domain}"))
        judge = run.judge() if subjective([domain]) else None
        for mode in tasks.DOMAINS[domain].modes:
            written, asked = answers_of(run, roller, judge, domain, mode)
            lines += written
            print(f"distillation: {domain}, {mode}: {len(written)} answers kept, of {asked} prompts")
    if not lines:
        print("distillation: nothing that the specialists wrote passes, so the generalist is the base; train "
              "them longer: --specialist_steps")
    runs.write_text(run.out / "distillation.jsonl", "".join(lines))


def answers_of(run, roller, judge, domain, mode):
    """-> lines of JSON, number of prompts that were asked, at most four times as many as answers wanted."""
    options = run.options
    lines = []
    asked = 0
    samples = min(4, options.rows)
    rows = max(options.rows, ANSWERS_AT_ONCE) if run.device.type == "cpu" else options.rows
    draw = 0
    while len(lines) < options.answers and asked < 4 * options.answers:
        random, generator, _ = run.random(f"answers {domain} {mode}", draw)
        draw += 1
        count = min(rows // samples, options.answers, 4 * options.answers - asked)
        prompts = [tasks.make(random, domain, mode, options.level, options.page) for _ in range(count)]
        batch = [task for task in prompts for _ in range(samples)]
        outs = roller(batch, generator=generator).outs
        scored = rewards_of(options, batch, outs, judge)
        asked += len(prompts)
        for i in range(0, len(batch), samples):
            passed = []
            for out, result in zip(outs[i:i + samples], scored[i:i + samples]):
                right = result["judge"] if "judge" in result else result["ok"]
                if right == 1.0 and result["language"] == 1.0:
                    passed.append(out)
            if passed:
                best = min(passed, key=len)
                lines.append(json.dumps(dict(prompt=batch[i].prompt(), out=best)) + "\n")
    return lines[:options.answers], asked


# ---- a job ----

def run_job(run, job):
    """Train one checkpoint, or the rest of it -> 0, or the exit code of a run that stops: 1 for numbers that
    are not finite, 130 or 143 for the signal that was caught."""
    options = run.options
    folder = files.locate(state_folder(run, job))
    saved = read_state(folder, job) if options.resume and folder.exists() else None
    keep_records(run, {job.name: saved["step"] if saved else 0})
    if job.name == "generalist":
        if not saved:
            write_answers(run)
        if not (run.out / "distillation.jsonl").read_text():
            job = job._replace(steps=0)
    if saved:
        model = run.load(folder)
    else:
        model = run.load(job.start) if job.start else run.new()
    model.train()
    stage = "sparse" if job.kind == "grpo" else job.kind
    model.attention = "sparse" if stage == "sparse" else "dense"
    groups = trainable(model, stage, "all")
    if job.kind == "grpo" and not options.train_indexer:
        for p in groups[1]:
            p.requires_grad_(False)
    optimizer = adamw(*groups, options, run.device)
    start = runs.restore(optimizer, saved, parallel.sharded_state) if saved else 0
    if job.kind == "grpo":
        learner = Learner(run, job, model)
    else:
        learner = Supervised(run, job, start)

    bar = tqdm(range(start, job.steps), desc=job.name, initial=start, total=job.steps, disable=None,
               dynamic_ncols=True)
    for step in bar:
        began = time.perf_counter()
        lr = learning_rate(options, step, job.steps, job.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        values = learner.step(run, job, model, optimizer, groups, step)
        if not all(map(math.isfinite, values.values())):
            print(f"post_train.py: {job.name} step {step}: not finite: {values}. Lower the learning rate or "
                  "raise --ramp_steps", file=sys.stderr)
            return 1
        seconds = time.perf_counter() - began
        runs.append_record(run.out, dict(stage=job.name, step=step, **values, lr=lr, seconds=seconds))
        shown = {name: f"{values[name]:.3f}" for name in ("loss", "reward", "live", "kl") if name in values}
        bar.set_postfix(shown)
        if run.caught or (step + 1) % options.save_interval == 0:
            save_state(run, job, model, optimizer, step + 1)
        if run.caught:
            print(f"\nstopped after {job.name} step {step + 1}; continue with the same command and --resume, "
                  "without --overwrite", file=sys.stderr)
            return 130 if run.caught[0] == signal.SIGINT else 143
    bar.close()
    with runs.saving(run.out):
        chat.save(model, run.out / job.name, tasks.TURNS)
    shutil.rmtree(state_folder(run, job), ignore_errors=True)
    if job.name == "judge":
        report_agreement(run)
    return 0


def report_agreement(run):
    """Log and print how often the new judge is right, before anything is trained by its word."""
    shares = judge_agreement(run.judge(), domains_of(run.options), run.options, exam.SEED)
    runs.append_record(run.out, dict(stage="judge", step=run.options.judge_steps, agreement=shares))
    line = "judge: right on " + ", ".join(f"{share:.3f}" for share in shares) + " of the points of rubrics"
    if min(shares) < 0.95:
        line += "; below 0.95 a policy learns what it gets wrong: raise --judge_steps"
    print(line)


# ---- the program ----

def check_start(options, stages):
    """FileNotFoundError, ValueError: a checkpoint to start from is missing, or one is in the way."""
    made = []
    for stage in stages:
        for job in plan(options, stage):
            folder = Path(options.out_dir) / job.name
            if files.locate(folder).exists():
                runs.check_earlier(options, [folder], ("init_from",))
            if job.start and job.start not in made and not files.locate(job.start).is_dir():
                raise FileNotFoundError(f"{job.name} starts from {job.start}, which does not exist; run the "
                                        "stage before")
            made.append(str(folder))
        for name in also_read(options, stage):
            folder = Path(options.out_dir) / name
            if str(folder) not in made and not files.locate(folder).is_dir():
                raise FileNotFoundError(f"--stage={stage} reads {folder}, which does not exist; run the "
                                        "stage before, with these --domains")


def also_read(options, stage):
    """-> names of the checkpoints that a stage reads besides those that its jobs start from."""
    domains = domains_of(options)
    names = []
    if stage == "distillation":
        names += [f"specialist-{domain}" for domain in domains]
    if stage == "evaluate":
        names.append("base")
    if stage != "base" and subjective(domains):
        names.append("judge")
    return names


def begin(run, stages):
    """The first writes: remove what the run replaces, note its options."""
    options = run.options
    run.out.mkdir(parents=True, exist_ok=True)
    if options.overwrite:
        for stage in stages:
            for job in plan(options, stage):
                (run.out / "evaluation.json").unlink(missing_ok=True)  # of the checkpoints that go
                for folder in (run.out / job.name, state_folder(run, job)):
                    if folder.exists():
                        runs.clear(folder)
    stored = asdict(options) | dict(resume=False, overwrite=False) | run.sizes
    command = " ".join(sys.argv)
    facts = dict(options=stored, command=command, commit=cli.commit(), **report.machine(run.device))
    # a later stage may be tried with options of its own: they are not those of the run
    if begins_anew(asdict(options)) or not (run.out / "run.json").exists():
        runs.write_text(run.out / "run.json", json.dumps(facts, indent=2) + "\n")
    print(f"{facts['device']} | torch {facts['torch']} | commit {facts['commit']} | backend "
          f"{options.backend}, {options.dtype}")
    print("options: " + " ".join(f"--{name}={value}" for name, value in stored.items() if value != ""))


def main():
    """The options, then job after job, the tables, the plot."""
    options, sizes, device = resolve(sys.argv[1:])
    stages = list(STAGES) if options.stage == "all" else [options.stage]
    check_start(options, stages)
    with cli.interruptible() as caught:
        run = Run(options, sizes, device, Path(options.out_dir), caught)
        begin(run, stages)
        for stage in stages:
            for job in plan(options, stage):
                if options.resume and files.locate(run.out / job.name).exists():
                    continue
                code = run_job(run, job)
                if code:
                    return code
            if stage == "evaluate":
                code = exam.evaluate(run, domains_of(options))
                if code:
                    return code
    with runs.saving(run.out):
        post_report.plot(run.out, run.out / "plot.png")
    last = [name for name in ("mixed", "generalist", "base") if (run.out / name).exists()][:1]
    domain = domains_of(options)[0]
    think = " --think" if "think" in tasks.DOMAINS[domain].modes else ""
    print(f"checkpoints: {run.out}   plot: {run.out / 'plot.png'}   next: python sample.py --chat "
          f"--checkpoint={run.out / (last[0] if last else 'base')} --domain={domain}{think}")
    return 0


if __name__ == "__main__":
    cli.run(
        main,
        closed="standard output was closed, and training stopped: go on with --resume, without the pipe",
        smaller="lower --rows and --micro_rows, or --batch_size")
