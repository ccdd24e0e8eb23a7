"""Train a small DeepSeek-V3.2: dense attention first, then the indexer alone, then everything with sparse
attention.

    python train.py                                     # all three stages; picks sizes for the device
    python train.py --stage=warmup --init_from=DIR      # put sparse attention on a model that exists
    torchrun --standalone --nproc-per-node=4 train.py   # on four GPUs, see parallel.py

Stages (DeepSeek-V3.2-Exp, section 2.1; each starts from the checkpoint of the one before):
  dense    ordinary language-model training with full attention; stands in for the base model
  warmup   everything frozen but the indexer, which learns to predict where the dense attention looks (KL)
  sparse   every query reads only its top-k tokens; the model learns from the language-model loss, the indexer
           from its KL alone
  control  the sparse stage's baseline: the same start, batches and steps with dense attention and frozen
           indexers; not part of --stage=all, and it takes its options from the run in out_dir

A run follows from its options: batch n is a function of (seed, n), so an interrupted run continues with
--resume as if nothing had happened. out_dir holds run.json (options, versions), metrics.jsonl, plot.png
(drawn anew at evaluations), summary.json and a checkpoint folder per stage.
"""
import json
import math
import signal
import sys
import time
from contextlib import closing
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

import data
import parallel
from config import Config, option
from graphed import Graphed, repeatable
from model import Transformer
from support import checkpoint, cli, files, logs, report, runs, tokenizer
from support.report import STAGES


# ---- options ----

@dataclass
class Options:
    """Every training option. Model sizes: the keys of config.Config."""
    stage: str = option("all", "which stage to run", "all", *STAGES)
    init_from: str = option("", "checkpoint folder to start from, ours or a published one")
    out_dir: str = option("out", "folder for checkpoints, metrics and plot")
    resume: bool = option(False, "continue the interrupted run in out_dir")
    overwrite: bool = option(False, "replace the earlier run in out_dir")
    data: str = option("python", "python, packages, english, shakespeare, web, web:N, a text file or folder")
    tokenizer: str = option("", "bytes, a tiktoken name such as gpt2, or a checkpoint folder with its "
                            "tokenizer.json (empty: that of --init_from, else bytes)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    backend: str = option("auto", "attention path: PyTorch reference or Triton kernels (auto: triton on a "
                          "CUDA GPU)", "auto", "torch", "triton")
    dtype: str = option("float32", "precision of the linear layers (autocast)", "float32", "bfloat16")
    seed: int = option(1337, "of initialisation and batch order")
    compile: bool = option(False, "torch.compile the layers")
    cuda_graph: bool = option(
        True, "a CUDA graph repeats forward and backward, which spares the host their launches, and keeps "
        "their memory, so that an evaluation takes its own beside it; not with several GPUs, contexts beyond "
        "32K, experts, recompute=offload or another selector than the indexer")
    recompute: str = option(
        "false", "activation checkpointing: less memory for a third more compute; offload: what it keeps, "
        "blocks' inputs and selections, waits for the backward in host memory. Compiled layers keep no "
        "selections, and select again", "false", "true", "offload", alone="true")
    train: str = option("all", "what the sparse stage trains besides the indexers",
                        "all", "attention", "none")
    detach: bool = option(True, "keep the KL from teaching the main model, as the paper does (false: an "
                          "ablation)")
    index_fp8: bool = option(True, "select by FP8 index scores, as the published inference does")
    share_selection: int = option(
        1, "layers in a row that use one selection, which the first of them makes; the indexers of the "
        "others are dropped (1: every layer makes its own, or as the checkpoint has it)")
    yarn_factor: float = option(
        0.0, "extend the checkpoint --init_from by YaRN to so many times the context that it was trained at "
        "(0: leave its positions alone)")
    block_size: int = option(256, "context length in tokens")
    batch_size: int = option(8, "sequences per micro-batch")
    gradient_accumulation_steps: int = option(
        1, "micro-batches per step, of all processes together (under torchrun by default one for each group)")
    context_parallel: int = option(1, "processes of torchrun that share each sequence; groups of so many "
                                   "share the micro-batches")
    dense_steps: int = option(300, "optimizer steps of the dense stage")
    warmup_steps: int = option(80, "optimizer steps of the indexer's warm-up")
    sparse_steps: int = option(60, "optimizer steps of the sparse stage")
    dense_lr: float = option(3e-3, "peak learning rate of the dense stage")
    warmup_lr: float = option(1e-2, "peak learning rate of the indexer's warm-up (paper: 1e-3)")
    sparse_lr: float = option(5e-4, "peak learning rate of the sparse stage (paper: 7.3e-6)")
    schedule: str = option("cosine", "learning rate after the ramp", "cosine", "constant")
    ramp_steps: int = option(20, "steps over which a stage's learning rate rises")
    min_lr: float = option(0.1, "final learning rate of the cosine, as a fraction of the peak")
    weight_decay: float = option(0.1, "AdamW, on matrices")
    beta1: float = option(0.9, "AdamW")
    beta2: float = option(0.95, "AdamW")
    grad_clip: float = option(1.0, "largest gradient norm, of the model and of the indexers separately")
    eval_interval: int = option(50, "steps between validation losses")
    eval_steps: int = option(4, "validation batches")
    save_interval: int = option(50, "steps between states to --resume from")
    compare: str = option("", "runs to draw beside this one in plot.png: folders or metrics.jsonl files, "
                          "with commas between")
    log: str = option("none", "where the metrics go besides metrics.jsonl, if it is installed", *logs.LOGS)


# Defaults that differ on a CUDA GPU: a model of 27M parameters at a context of 4096
GPU = dict(
    dtype="bfloat16", block_size=4096,
    dense_steps=1000, warmup_steps=200, sparse_steps=400,
    dense_lr=1e-3, warmup_lr=2e-3, sparse_lr=2e-4,
    ramp_steps=50, eval_interval=100, eval_steps=8, save_interval=200,
    hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
    q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
    index_n_heads=8, index_head_dim=64, index_topk=512, initializer_range=0.02)
# Of a Config, what may differ from the checkpoint's: weights do not depend on it
SELECTION = ("index_topk", "index_block", "index_candidates", "index_exact_layers", "selector")
NEW_INDEXER = dict(index_n_heads=16, index_head_dim=128, index_topk=2048)  # for an --init_from without one
TEXT_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of config.json
BEFORE = dict(warmup="dense", sparse="warmup", control="warmup")  # whose checkpoint a stage starts from

TRAINING = tuple(field.name for field in fields(Options))
CONFIG_FIELDS = [f for f in fields(Config) if f.name != "vocab_size"]
MODEL_FIELDS = [f for f in CONFIG_FIELDS if f.type in (int, float, bool) or f.metadata.get("choices")]
# What a run being resumed cannot change: its batches, its weights, or what they learn would be others
FIXED = {"stage", "init_from", "train", "detach", "share_selection", "yarn_factor", "data", "tokenizer",
         "seed", "block_size", "batch_size", "gradient_accumulation_steps",
         *(field.name for field in MODEL_FIELDS)}
RANGES = (
    ("block_size", 2, math.inf), ("batch_size", 1, math.inf), ("gradient_accumulation_steps", 1, math.inf),
    ("dense_steps", 0, math.inf), ("warmup_steps", 0, math.inf), ("sparse_steps", 0, math.inf),
    ("dense_lr", 0, math.inf), ("warmup_lr", 0, math.inf), ("sparse_lr", 0, math.inf),
    ("ramp_steps", 0, math.inf), ("min_lr", 0, 1), ("weight_decay", 0, math.inf),
    ("beta1", 0, 0.9999999), ("beta2", 0, 0.9999999), ("grad_clip", 1e-12, math.inf),
    ("eval_interval", 1, math.inf), ("eval_steps", 1, math.inf), ("save_interval", 1, math.inf),
    ("context_parallel", 1, math.inf), ("share_selection", 1, math.inf), ("seed", 0, 2**63 - 1))


def resolve(argv):
    """-> Options, dict of the model sizes given, device. Precedence: command line, --config file, the run
    that is resumed or that a control belongs to, the device's defaults.

    ValueError or FileNotFoundError, one line with value and fix, for everything that can be known before work
    begins."""
    given = cli.parse_fields(cli.Parser(__doc__), (*fields(Options), *MODEL_FIELDS), GPU, argv)
    if given.get("resume"):
        earlier = resumed_options(given)
    elif given.get("stage") == "control":
        earlier = control_options(given)
    else:
        earlier = {}
    device = parallel.device(given.get("device", earlier.get("device", "auto")))
    defaults = {} if given.get("resume") else device_defaults(given, device)
    groups = parallel.world_size() // max(1, given.get("context_parallel", 1))
    defaults = defaults | dict(gradient_accumulation_steps=max(1, groups))
    values = defaults | earlier | given

    options = Options(**{name: value for name, value in values.items() if name in TRAINING})
    sizes = {name: value for name, value in values.items() if name not in TRAINING}
    check_options(options, device)
    check_start(options)
    options.tokenizer = options.tokenizer or tokenizer_of(start_folder(options))
    if sizes.get("index_topk", 1) < 1:
        raise ValueError(f"--index_topk={sizes['index_topk']}: a query selects at least 1 token")
    if not (start_folder(options) or options.resume):
        check_context(Config(**sizes).check(), options)
    return options, sizes, device


def resumed_options(given):
    """The options of the run in out_dir, which the options given may not contradict."""
    path = Path(given.get("out_dir", Options.out_dir)) / "run.json"
    if not path.is_file():
        raise FileNotFoundError(f"--resume: {path} does not exist, there is no run to continue; leave "
                                "--resume out")
    if given.get("overwrite"):
        raise ValueError("--resume with --overwrite: choose one")
    options = stored_options(path)
    if not options:
        raise ValueError(f"--resume: {path} holds no options; start anew with --overwrite")
    for name in sorted(FIXED & given.keys()):
        if given[name] != options.get(name):
            raise ValueError(f"--{name}={given[name]}: the run being resumed has {options.get(name)}; leave "
                             "the option out, or start another run")
    return options | dict(out_dir=str(path.parent))  # it may have been moved


def control_options(given):
    """The training options, and k, of the run in out_dir that a control belongs to; {} where there is
    none."""
    path = Path(given.get("out_dir", Options.out_dir)) / "run.json"
    options = stored_options(path) if path.is_file() else {}
    own = {"stage", "out_dir", "device"}
    if options.get("stage") not in ("sparse", "control"):
        # the sparse stage of that run started from its warm-up, and so does the control
        own |= {"init_from", "yarn_factor"}
    taken = (set(TRAINING) - own) | {"index_topk"}
    return {name: value for name, value in options.items() if name in taken}


def stored_options(path):
    """The options in a run.json. ValueError names file, key and value."""
    options = files.run_options(path.parent)
    if isinstance(options.get("recompute"), bool):  # of a run before it had a third value
        options["recompute"] = str(options["recompute"]).lower()
    cli.check_stored(path, options, (*fields(Options), *MODEL_FIELDS))
    return options


def device_defaults(given, device):
    """Defaults that differ on this device; sizes of a model that exists come from its checkpoint."""
    if device.type != "cuda":
        return {}
    if given.get("init_from") or given.get("stage") in BEFORE:
        return {name: value for name, value in GPU.items() if name in TRAINING}
    return GPU


def start_folder(options):
    """The checkpoint that a run begins with: --init_from, else what the stage before left in out_dir; "" for
    a fresh model."""
    if options.init_from:
        return options.init_from
    return str(Path(options.out_dir) / BEFORE[options.stage]) if options.stage in BEFORE else ""


def tokenizer_of(folder):
    """The name of a checkpoint's tokenizer; bytes without a checkpoint."""
    return tokenizer.tokenizer_name(folder) if folder and files.locate(folder).is_dir() else "bytes"


def check_options(options, device):
    """ValueError or FileNotFoundError for options that are wrong by themselves or on this device."""
    cli.check_ranges(options, *RANGES)
    parallel.check_context(options.context_parallel, options.block_size)
    groups = parallel.world_size() // options.context_parallel
    if options.gradient_accumulation_steps % groups:
        raise ValueError(f"--gradient_accumulation_steps={options.gradient_accumulation_steps}: the "
                         f"micro-batches of a step go to {groups} groups of processes; use a multiple of "
                         f"{groups}, or another number of processes")
    if options.yarn_factor and not 1 < options.yarn_factor <= 2**20:
        raise ValueError(f"--yarn_factor={options.yarn_factor}: must be above 1 and at most {2**20}, or 0 to "
                         "leave positions as they are")
    if options.yarn_factor and not options.init_from:
        raise ValueError(f"--yarn_factor={options.yarn_factor}: extends a checkpoint; name it, "
                         "--init_from=DIR")
    if not options.out_dir:
        raise ValueError("--out_dir=: name a folder")
    files.destination(options.out_dir)
    report.read_logs(options.compare)
    logs.check(options.log)
    cli.backend(options.backend, device)
    if options.index_fp8:
        cli.check_e4m3(device, "--index_fp8=true", "--index_fp8=false")
    if options.stage == "control" and options.train == "none":
        raise ValueError("--stage=control --train=none: nothing would be trained; use --train=all or "
                         "attention")


def check_start(options):
    """FileNotFoundError unless there is a checkpoint where one is needed; what --resume needs is in
    out_dir."""
    if options.resume:
        return
    if options.init_from and not files.locate(options.init_from).is_dir():
        raise FileNotFoundError(f"--init_from={options.init_from} does not exist; give the folder of a "
                                "checkpoint")
    folder = start_folder(options)
    if folder and not files.locate(folder).is_dir():
        raise FileNotFoundError(f"--stage={options.stage} starts from {folder}, which does not exist; run "
                                "the stage before, or give --init_from=DIR")


def check_context(config, options):
    """ValueError: a context that is too long for the model of this Config, or too short for its k."""
    if options.block_size > config.max_position_embeddings:
        raise ValueError(f"--block_size={options.block_size}: longer than the model's "
                         f"max_position_embeddings={config.max_position_embeddings}")
    if options.stage in ("all", "sparse") and options.block_size <= config.index_topk:
        raise ValueError(f"--block_size={options.block_size}: not longer than "
                         f"index_topk={config.index_topk}, so the sparse stage would select everything; "
                         "lower --index_topk")


# ---- the model ----

def build(options, sizes, device, stages, vocab_size, prepare):
    """-> the model to start `stages` with: fresh, or of the checkpoint in `start_folder`; prepare: see
    Transformer.from_pretrained. ValueError: it has no place for the options given."""
    switches = dict(backend=cli.backend(options.backend, device), index_fp8=options.index_fp8)
    folder = start_folder(options)
    if not folder:
        config = Config(vocab_size=vocab_size, **sizes)
        config.indexer_types = indexer_types(config, options.share_selection)
        return prepare(Transformer(config, **switches).to(device))
    old = checkpoint.read_config(folder)
    index_sizes = new_indexers(old, sizes, stages)
    if index_sizes:
        there = "where there were none"
        if old.index_topk:
            there = f"instead of {old.index_n_heads} of {old.index_head_dim}"
        print(f"indexers start anew: {index_sizes['index_n_heads']} heads of {index_sizes['index_head_dim']} "
              f"{there} in {folder}")
    if not (old.index_topk or index_sizes) and options.share_selection > 1:
        raise ValueError(f"--share_selection={options.share_selection}: {folder} has no indexers; give the "
                         "option to the stage that makes them, warmup")
    types = indexer_types(old, options.share_selection, folder)
    yarn = extension(old, options.yarn_factor, folder) if options.yarn_factor else None
    dtype = torch.float32 if options.dtype == "float32" else None
    model = Transformer.from_pretrained(
        folder, device=device, index=index_sizes, indexer_types=types, yarn=yarn, dtype=dtype,
        prepare=prepare, **switches)
    if options.tokenizer != tokenizer_of(folder):  # of another text than the ids that the checkpoint names
        other = model.config.other or {}
        model.config.other = {key: value for key, value in other.items() if key not in TEXT_ENDS}
    for name, p in model.named_parameters():
        if not parallel.local_tensor(p).isfinite().all():
            raise ValueError(f"{folder}: {name} holds numbers that are not finite; copy the checkpoint "
                             "again, or take an earlier one")
    fit(model.config, sizes, folder)
    if model.config.vocab_size < vocab_size:
        raise ValueError(f"--tokenizer={options.tokenizer} has {vocab_size} tokens, the checkpoint {folder} "
                         f"only {model.config.vocab_size}; use the tokenizer it was trained with")
    return model


def new_indexers(old, sizes, stages):
    """-> sizes of the indexers that a checkpoint of this Config is given anew, or None if it keeps its own. A
    warm-up can replace indexers by others of another size."""
    index_sizes = {}
    for name, default in NEW_INDEXER.items():
        index_sizes[name] = sizes.get(name, getattr(old, name) if old.index_topk else default)
    if old.index_topk:
        resized = any(index_sizes[name] != getattr(old, name) for name in ("index_n_heads", "index_head_dim"))
        return index_sizes if resized and "warmup" in stages else None
    return index_sizes if "warmup" in stages or "sparse" in stages else None


def indexer_types(config, group, folder=""):
    """-> indexer_types that a model of this Config is to have instead, the first of each group of layers full
    and the others shared; None: those that it has. ValueError: a checkpoint in which other layers share."""
    types = ["shared" if layer % group else "full" for layer in range(config.num_hidden_layers)]
    old = config.indexer_types or []
    if group == 1 or old == types:
        return None
    if "shared" in old:
        raise ValueError(f"--share_selection={group}: the checkpoint {folder} has indexer_types={old}, and "
                         "its shared layers no indexers; leave the option out")
    return types


def extension(old, factor, folder):
    """-> rope_scaling that extends a checkpoint of this Config to `factor` times the context of its run, or,
    where no run.json names one, of its config; as DeepSeek-V3 was (arXiv 2412.19437, section 4.3; the keys of
    V3.2's config.json). ValueError: it has been extended, or run.json names no number."""
    if old.rope_scaling:
        raise ValueError(f"--yarn_factor={factor}: the checkpoint {folder} has rope_scaling="
                         f"{old.rope_scaling} already; leave the option out")
    run = files.run_options(files.locate(folder).parent, block_size=int)
    trained = run.get("block_size", old.max_position_embeddings)
    print(f"YaRN extends {folder} from {trained} to {int(factor * trained)} tokens")
    return dict(
        type="yarn", factor=factor, original_max_position_embeddings=trained, beta_fast=32.0, beta_slow=1.0,
        mscale=1.0, mscale_all_dim=1.0)


def fit(config, sizes, folder):
    """Take k, and how its candidates are found, from the sizes given, since these are no property of the
    weights. ValueError for other sizes that the checkpoint does not have."""
    for name, value in sizes.items():
        if name in SELECTION and config.index_topk:
            setattr(config, name, value)
            config.check()
        elif getattr(config, name) != value:
            advice = "leave the option out"
            if name in NEW_INDEXER:
                advice += ", or start with --stage=warmup, where indexers may start anew"
            raise ValueError(f"--{name}={value}: the checkpoint {folder} has {getattr(config, name)}; "
                             f"{advice}")


def trainable(model, stage, train):
    """Freeze what the stage does not train -> (parameters of the model, parameters of the indexers) that it
    does, in float32: most steps of a small learning rate are below half a bf16 digit, they would be lost."""
    indexers = set(model.indexer_parameters())
    main = []
    index = []
    for name, p in model.named_parameters():
        if p in indexers:
            learns = stage in ("warmup", "sparse")
        elif stage in ("sparse", "control"):
            learns = train == "all" or (train == "attention" and ".self_attn." in name)
        else:
            learns = stage == "dense"
        p.requires_grad_(learns)
        if not learns:
            continue
        if p.dtype != torch.float32:
            p.data = p.data.float()
        if p in indexers:
            index.append(p)
        else:
            main.append(p)
    return main, index


def adamw(main, index, options, device):
    """AdamW with weight decay on matrices only."""
    groups = []
    for parameters in (main, index):
        matrices = [p for p in parameters if p.dim() > 1]
        vectors = [p for p in parameters if p.dim() <= 1]
        groups.append(dict(params=matrices, weight_decay=options.weight_decay))
        groups.append(dict(params=vectors, weight_decay=0.0))
    return torch.optim.AdamW(groups, betas=(options.beta1, options.beta2), fused=device.type == "cuda")


def learning_rate(options, step, steps, peak):
    """Linear ramp over ramp_steps, then a cosine down to min_lr * peak at the last step, or constant."""
    if step < options.ramp_steps:
        return peak * (step + 1) / (options.ramp_steps + 1)
    if options.schedule == "constant":
        return peak
    progress = (step - options.ramp_steps) / max(1, steps - 1 - options.ramp_steps)
    return peak * (options.min_lr + (1 - options.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


# ---- the run ----

@dataclass
class Run:
    """What the stages of a run share."""
    options: Options
    device: torch.device
    ranks: parallel.Ranks
    split: parallel.Split | None  # this rank's part of a sequence, where several share it
    out: Path
    stages: list  # still to be trained
    replaced: list  # whose records and summary this run writes anew
    earlier: list  # folders that it replaces
    saved: dict | None  # the trainer state that its first stage continues from
    model: Transformer
    rate: float  # FLOPs per second that the devices of all ranks reach
    batches: data.Batches
    validation: data.Batches
    training_file: data.TokenFile
    validation_file: data.TokenFile
    log: logs.Log = logs.Log()  # on rank 0 what --log asks for
    live: logs.LivePlot | None = None  # on rank 0

    def autocast(self):
        """A context for linear layers in options.dtype."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.options.dtype == "bfloat16")

    def batch(self, batches, number):
        """-> x, y, first (batch_size, block_size, or this rank's part of it) on the device, see data.Batches;
        first is None where no document begins: attention without bounds is faster."""
        x, y, first = batches.batch(number)
        tensors = [x, y, first] if first.any() else [x, y]
        if self.split is not None:
            tensors = [self.split.part(t) for t in tensors]
        tensors = [t.to(self.device, non_blocking=True) for t in tensors]
        return tensors if len(tensors) == 3 else [*tensors, None]


def set_up(options, sizes, device):
    """Everything that can still be refused: what lies in out_dir, text, checkpoint -> Run. Nothing is written
    yet."""
    ranks = parallel.start(device, options.context_parallel, asdict(options) | sizes)
    out = Path(options.out_dir)
    stages = list(STAGES[:3]) if options.stage == "all" else [options.stage]
    # with all stages also a control, which belongs to the warm-up that it started from
    replaced = list(STAGES) if options.stage == "all" else stages
    earlier = earlier_folders(out, replaced)
    saved = None
    if options.resume:
        saved = runs.read_trainer(runs.latest_state(out, stages[-1]), stages)
        stages = stages[stages.index(saved["stage"]):]
        replaced = stages
    runs.check_earlier(options, earlier, ("init_from", "tokenizer"))
    for stage in stages:
        files.destination(out / stage)  # raises if it is a link that leads nowhere

    prepared = ranks.on_rank_0(data.prepare, options.data, options.tokenizer)
    prepared = prepared or data.prepare(options.data, options.tokenizer)  # the others find it done
    training_file, validation_file = prepared
    eot = training_file.header["eot"]
    batches = data.Batches(training_file.tokens, options.block_size, options.batch_size, eot, options.seed)
    validation = data.Batches(validation_file.tokens, options.block_size, options.batch_size, eot, 0)
    if saved and saved["corpus"] != training_file.header["sha256"]:
        raise ValueError(f"--resume: the text of --data={options.data} has changed since the run was "
                         "interrupted, its batches would be others; start anew with --overwrite")

    def prepare(model):
        """What any of the stages trains is float32 before it is sharded."""
        for stage in stages:
            trainable(model, stage, options.train)
        return parallel.shard(model, ranks)

    torch.manual_seed(options.seed)
    if saved:
        backend = cli.backend(options.backend, device)
        model = Transformer.from_pretrained(
            saved["folder"], backend, index_fp8=options.index_fp8, device=device, prepare=prepare)
    else:
        model = build(options, sizes, device, stages, training_file.header["vocab_size"], prepare)
    check_context(model.config, options)
    model.train()
    model.recompute = options.recompute != "false"
    model.offload = options.recompute == "offload"
    model.detach = options.detach
    if options.compile:
        model.compile_layers()
    [rate] = ranks.total([report.matmul_rate(device, getattr(torch, options.dtype))])
    return Run(
        options=options, device=device, ranks=ranks, split=ranks.split(options.block_size),
        out=out, stages=stages, replaced=replaced, earlier=earlier, saved=saved,
        model=model, rate=rate,
        batches=batches, validation=validation, training_file=training_file, validation_file=validation_file)


def earlier_folders(out, stages):
    """The states in out_dir, and the checkpoints of these stages."""
    found = runs.states(out)
    for stage in stages:
        if files.locate(out / stage).exists():
            found.append(out / stage)
    return found


def begin(run):
    """The first writes: remove what the run replaces, note its options, cut the log where it goes on."""
    records = [record for record in runs.read_records(run.out) if stays(record, run)]
    config = run.model.config
    sizes = {field.name: getattr(config, field.name) for field in MODEL_FIELDS}
    options = asdict(run.options) | dict(resume=False, overwrite=False) | sizes
    run.out.mkdir(parents=True, exist_ok=True)
    run.log = logs.start(run.options.log, run.out, options)  # may fail, for want of an account
    run.live = logs.LivePlot(run.out, run.options.compare)
    if run.options.overwrite:
        for path in run.earlier:
            runs.clear(files.locate(path))
    command = " ".join(sys.argv)
    facts = dict(options=options, command=command, commit=cli.commit(), **report.machine(run.device))
    runs.write_text(run.out / "run.json", json.dumps(facts, indent=2) + "\n")
    runs.write_text(run.out / "metrics.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    describe(run, facts)


def stays(record, run):
    """Does a record of the log stay? What was logged after the state was saved happens again, and so does a
    stage that is run anew."""
    if record["stage"] not in run.replaced:
        return True
    resumed = run.saved and record["stage"] == run.saved["stage"]
    return bool(resumed) and record["step"] < run.saved["step"]


def describe(run, facts):
    """Print what is trained, on what, with which options."""
    options = run.options
    model = run.model
    parameters = sum(p.numel() for p in model.parameters()) / 1e6
    in_indexers = sum(p.numel() for p in model.indexer_parameters()) / 1e6
    ranks = run.ranks
    layers = model.config.num_hidden_layers
    if ranks.world > 1:
        print(f"{ranks.world} processes: {ranks.data} x micro-batches, {ranks.context} x context")
    print(f"{facts['device']} | torch {facts['torch']} | commit {facts['commit']} | "
          f"backend {options.backend}, {options.dtype} | GB: {report.memory_meaning(run.device)}")
    print(f"model: {parameters:.1f}M parameters ({in_indexers:.2f}M in indexers), "
          f"{layers} layers, context {options.block_size}, top-k {model.config.index_topk}, "
          f"selector {model.config.selector}")
    full = [layer for layer in range(layers) if model.config.has_indexer(layer)]
    if 0 < len(full) < layers:
        print(f"indexers in layers {full}; a layer without one uses the selection of the layer before")
    print(f"data: {options.data}, {len(run.training_file.tokens):,} training and "
          f"{len(run.validation_file.tokens):,} validation tokens")
    given = [f"--{name}={value}" for name, value in facts["options"].items() if value != ""]
    print(f"options: {' '.join(given)}")


def save_stage(run, stage, summary):
    """The stage's checkpoint, its validation losses in summary.json, and the plot so far."""
    dtype = run.model.lm_head.weight.dtype
    for p in trained(run.model):
        if p.dtype != dtype:
            p.data.copy_(p.data.to(dtype))  # as it will be saved
    plain = parallel.whole_model(run.model, run.ranks)
    run.ranks.on_rank_0(write_stage, run, plain, stage, dtype)
    attentions = ("dense",)
    if stage in ("warmup", "sparse"):
        attentions = ("dense", "sparse")
    for attention in attentions:
        summary[f"val_loss, {attention} attention, after {stage}"] = evaluate(run, attention)
    run.ranks.on_rank_0(write_summary, run, summary)


def trained(model):
    """The parameters of the main model that learnt in this stage."""
    indexers = set(model.indexer_parameters())
    return [p for p in model.parameters() if p.requires_grad and p not in indexers]


def write_stage(run, model, stage, dtype):
    """The checkpoint of a stage, its main model in one dtype again: that of a bf16 checkpoint of which only
    the attention was trained in float32."""
    for p in trained(model):
        p.data = p.data.to(dtype)
    with runs.saving(run.out):
        model.save_pretrained(run.out / stage, run.options.tokenizer)


def write_summary(run, summary):
    """The losses so far, and the plot."""
    runs.write_text(run.out / "summary.json", json.dumps(summary, indent=2) + "\n")
    with runs.saving(run.out):
        report.plot(run.out / "metrics.jsonl", run.out / "plot.png", run.options.compare)


# ---- training ----

@torch.no_grad()
def evaluate(run, attention):
    """Validation loss in nats per token over eval_steps batches, always the same ones, with attention "dense"
    or "sparse"."""
    model = run.model
    trained_with = model.attention
    model.attention = attention
    losses = []
    for number, counts in run.ranks.turns(run.options.eval_steps):
        x, y, first = run.batch(run.validation, number)
        with run.autocast():
            loss = model(x, y, first, logits_of=None, split=run.split)[1]["lm"]
        losses.append(loss if counts else torch.zeros_like(loss))
    model.attention = trained_with
    [total] = run.ranks.total([sum(torch.stack(losses).tolist())])
    # each rank of a group has the mean over its own part of a batch
    return total / run.ranks.context / run.options.eval_steps


def batch_numbers(options, stage, step):
    """The numbers of a step's micro-batches, of all ranks: they count on from stage to stage."""
    steps_before = sum(getattr(options, f"{before}_steps") for before in STAGES[:STAGES.index(stage)])
    first = (steps_before + step) * options.gradient_accumulation_steps
    return range(first, first + options.gradient_accumulation_steps)


def read(losses, norms):
    """Dicts of losses and other numbers, one per micro-batch, and the two gradient norms -> dict of floats,
    the former as means; the one time in a step that the host waits for the device's numbers."""
    names = list(losses[0])
    numbers = torch.stack([micro[name] for micro in losses for name in names] + norms).tolist()
    *values, grad_norm, index_grad_norm = numbers
    means = dict.fromkeys(names, 0)
    for start in range(0, len(values), len(names)):  # of a micro-batch
        for name, value in zip(names, values[start:]):
            means[name] += value / len(losses)
    return means | dict(grad_norm=grad_norm, index_grad_norm=index_grad_norm)


def tokens_read(run, x, first):
    """How many tokens a query of x (B,S) sees in its document and, of these, selects, in the mean of the
    batch -> dict of (); x and first as `Run.batch` gives them."""
    position = torch.arange(x.shape[1], device=x.device) if run.split is None else run.split.position  # (S,)
    visible = position + 1 - (0 if first is None else first)  # (S,) or (B, S)
    selected = visible.clamp(max=run.model.config.index_topk)
    return dict(visible=visible.float().mean(), selected=selected.float().mean())


def gradient_norm(parameters, options, device):
    """Clip the gradients of these parameters together -> their norm before, ()."""
    norm = clip_grad_norm_(parameters, options.grad_clip)
    return parallel.whole_tensor(norm).to(device)


def graphs(run):
    """Does a CUDA graph repeat this run's micro-batches?"""
    options = run.options
    kernels = run.device.type == "cuda" and run.model.backend_on(run.device) == "triton"
    alone = run.ranks.world == 1 and options.recompute != "offload"  # the device waits for no one
    return options.cuda_graph and kernels and alone and repeatable(run.model.config, options.block_size)


def train_stage(run, stage, caught):
    """Train one stage, or the rest of the one that was interrupted -> 0, or the exit code of a run that
    stops: 1 for losses that are not finite, 130 or 143 for the signal in `caught`."""
    options = run.options
    model = run.model
    like = "sparse" if stage == "control" else stage  # whose steps, learning rate and batches it has
    steps = getattr(options, f"{like}_steps")
    peak_lr = getattr(options, f"{like}_lr")
    indexing = stage in ("warmup", "sparse")
    model.attention = "sparse" if stage == "sparse" else "dense"
    groups = trainable(model, stage, options.train)
    optimizer = adamw(*groups, options, run.device)
    resumed = run.saved and stage == run.saved["stage"]
    start = runs.restore(optimizer, run.saved, parallel.sharded_state) if resumed else 0
    tokens_per_step = options.batch_size * options.block_size * options.gradient_accumulation_steps
    report.reset_peak_memory(run.device)

    def learn(x, y, first):
        """-> what to log of a micro-batch; its gradients are added up. The warm-up needs no logits."""
        targets = None if stage == "warmup" else y
        with run.autocast():
            losses = model(x, targets, first, index_loss=indexing, logits_of=None, split=run.split)[1]
        objective = losses.get("lm", 0) + losses.get("kl", 0)
        (objective / micro_batches).backward()
        return {name: loss.detach() for name, loss in losses.items()} | tokens_read(run, x, first)

    micro_batches = options.gradient_accumulation_steps // run.ranks.data
    graphed = graphs(run)
    micro_step = Graphed(learn, graphed)
    bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, disable=None, dynamic_ncols=True)
    for step in bar:
        began = time.perf_counter()

        # This step's learning rate
        lr = learning_rate(options, step, steps, peak_lr)
        for group in optimizer.param_groups:
            group["lr"] = lr

        # Micro-batches, whose gradients add up to that of the mean loss
        losses = []
        batches = batch_numbers(options, like, step)
        numbers = batches[run.ranks.data_rank::run.ranks.data]  # of this rank
        for number in numbers:
            parallel.synchronise(model, number == numbers[-1])
            x, y, first = run.batch(run.batches, number)  # (batch_size, block_size) each, or this rank's part
            losses.append(micro_step(x, y, first))

        # Clip the model and the indexers apart: one norm over both would couple their objectives
        norms = [gradient_norm(group, options, run.device) for group in groups]

        # Stop before a step by something that is not finite
        values = run.ranks.means(read(losses, norms))
        if not all(map(math.isfinite, values.values())):
            print(f"train.py: {stage} step {step}, batches {batches[0]}..{batches[-1]}: not finite: "
                  f"{values}; last good checkpoint: {last_good(run)}. Lower --{like}_lr or raise "
                  "--ramp_steps", file=sys.stderr)
            return 1

        # Step, and count meanwhile what it takes
        optimizer.step()
        optimizer.zero_grad(set_to_none=not graphed)  # a graph adds to the gradients that it has seen
        flops = report.flops_per_token(
            model, options.block_size, stage, values["visible"], values["selected"])
        report.wait(run.device)

        # Log
        speed = tokens_per_step / (time.perf_counter() - began)
        record = dict(
            stage=stage, step=step, loss=values.get("lm", values.get("kl")), **values, lr=lr,
            tokens_per_second=speed, mfu=speed * flops / run.rate,
            memory_gb=run.ranks.largest([report.peak_memory(run.device)])[0])
        names = ("loss", "kl", "recall", "index_recall")
        shown = {name: f"{record[name]:.3f}" for name in names if name in record}
        bar.set_postfix(shown | dict(tok_s=f"{speed:.0f}"))

        # Evaluate
        if (step + 1) % options.eval_interval == 0 or step + 1 == steps:
            record["val_loss"] = evaluate(run, model.attention)
            tqdm.write(report.line(record))
        run.ranks.on_rank_0(write_record, run, record, batches[0] // options.gradient_accumulation_steps)

        # Save what --resume goes on from. A signal to one rank stops all
        [stop] = run.ranks.largest([caught[0] if caught else 0])
        if stop or (step + 1) % options.save_interval == 0 or step + 1 == steps:
            save_state(run, optimizer, stage, step + 1)
        if stop:
            run.ranks.on_rank_0(print_stop, run, stage, step + 1)
            return 130 if stop == signal.SIGINT else 143
    bar.close()
    optimizer.zero_grad(set_to_none=True)
    return 0


def write_record(run, record, step):
    """A step's record to metrics.jsonl and --log, and after an evaluation the plot so far. step: counted from
    the first stage on."""
    runs.append_record(run.out, record)
    run.log.add(record, step)
    if "val_loss" in record:
        run.live.refresh()


def save_state(run, optimizer, stage, step):
    """What --resume goes on from: weights and optimizer whole, as of one process."""
    plain = parallel.whole_model(run.model, run.ranks)
    moments = parallel.whole(optimizer.state_dict(), run.ranks)
    corpus = run.training_file.header["sha256"]
    run.ranks.on_rank_0(runs.save_state, run.out, plain, moments, stage, step, corpus)


def print_stop(run, stage, step):
    """Where an interrupted run goes on."""
    print(f"\nstopped after {stage} step {step}; continue with: python train.py --resume "
          f"--out_dir={run.options.out_dir}", file=sys.stderr)


def last_good(run):
    """Where training could go on from."""
    found = runs.states(run.out)
    return found[-1] if found else run.options.init_from or "none yet"


def print_sample(run, stage):
    """Continue the beginning of the validation text."""
    options = run.options
    length = options.block_size // 2
    tokens = torch.from_numpy(run.validation_file.tokens[:length].astype("int64"))  # (length,)
    prompt = tokens[None].to(run.device)  # (1, length)
    eot = run.validation_file.header["eot"]
    run.model.eval()
    with run.autocast():
        out = run.model.generate(prompt, min(256, options.block_size - length), temperature=0.8, top_k=50,
                                 end_ids=(eot,), go_on=True, ranks=run.ranks)  # (1, length + n)
    text = tokenizer.load_tokenizer(run.out / stage).decode(out[0, length:].tolist())
    print(f"sample after the first {length} tokens of the validation text:\n{text}\n")


def main():
    """Options, data, model, then the stages one after the other."""
    run = set_up(*resolve(sys.argv[1:]))
    again = tuple(f"after {stage}" for stage in run.replaced)
    summary = {name: loss for name, loss in runs.read_summary(run.out).items() if not name.endswith(again)}
    run.ranks.on_rank_0(begin, run)
    with cli.interruptible() as caught, closing(run.log):
        for stage in run.stages:
            code = train_stage(run, stage, caught)
            if code:
                return code
            save_stage(run, stage, summary)
    run.ranks.on_rank_0(runs.remove_states, run.out)

    print("\n".join(f"{name}: {loss:.4f}" for name, loss in summary.items()))
    last = run.stages[-1]
    print_sample(run, last)
    folder = run.out / last
    todo = f"python sample.py --checkpoint={folder}"
    if last in ("warmup", "sparse"):
        todo += f", python evaluate.py --checkpoint={folder}"
    else:
        todo += " --attention=dense"
    print(f"checkpoint: {folder}   plot: {run.out / 'plot.png'}   next: {todo}")
    return 0


if __name__ == "__main__":
    cli.run(
        main,
        closed="standard output was closed, and training stopped: go on with --resume, without the pipe",
        smaller="lower --batch_size and raise --gradient_accumulation_steps as much, or use --recompute or "
                "--cuda_graph=false")
