"""Train a small DeepSeek-V3.2: dense attention first, then the indexer alone, then everything with sparse attention.

    python train.py                                     # all three stages; picks sizes for the device
    python train.py --stage=warmup --init_from=DIR      # put sparse attention on a model that exists

Stages (DeepSeek-V3.2-Exp, section 2.1.1; each starts from the checkpoint of the one before):
  dense    ordinary language-model training with full attention; stands in for the base model
  warmup   everything frozen but the indexer, which learns to predict where the dense attention looks (KL)
  sparse   every query reads only its top-k tokens; the model learns from the language-model loss, the indexer from its KL alone
  control  what the sparse stage is measured against: the same start, batches and steps with dense attention, indexers frozen; not part of --stage=all,
           and unlike other stages it takes its options from the run in out_dir

A run follows from its options: batch n is a function of (seed, n), so an interrupted run continues with --resume as if nothing had
happened. out_dir holds run.json (options, versions), metrics.jsonl, plot.png, summary.json and a checkpoint folder per stage.
"""
import json
import math
import os
import shutil
import signal
import sys
import time
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import torch

from support import files
from tqdm import tqdm

from support import tokenizer
from support import checkpoint
from support import cli
import data
from support import report
from config import Config
from model import Transformer
from support.report import STAGES

BEFORE = dict(warmup="dense", sparse="warmup", control="warmup")  # whose checkpoint a stage starts from


def option(default, help, *choices):
    """A dataclass field with its help text and, if any, the values it may take."""
    return field(default=default, metadata=dict(help=help, choices=choices or None))


@dataclass
class Options:
    """Every training option. Model sizes: the keys of model.Config."""
    stage: str = option("all", "which stage to run", "all", *STAGES)
    init_from: str = option("", "checkpoint folder to start from, ours or a published one")
    out_dir: str = option("out", "folder for checkpoints, metrics and plot")
    resume: bool = option(False, "continue the interrupted run in out_dir")
    overwrite: bool = option(False, "replace the earlier run in out_dir")
    data: str = option("python", "python, packages, shakespeare, web, web:N, or a text file or folder")
    tokenizer: str = option("", "bytes, a tiktoken name such as gpt2, or a checkpoint folder with its tokenizer.json (empty: that of --init_from, else bytes)")
    device: str = option("auto", "auto, cpu, cuda, cuda:1, mps")
    backend: str = option("auto", "attention path: PyTorch reference or Triton kernels (auto: triton on a CUDA GPU)", "auto", "torch", "triton")
    dtype: str = option("float32", "precision of the linear layers (autocast)", "float32", "bfloat16")
    seed: int = option(1337, "of initialisation and batch order")
    compile: bool = option(False, "torch.compile the model")
    recompute: bool = option(False, "activation checkpointing: less memory for a third more compute")
    train: str = option("all", "what the sparse stage trains besides the indexers", "all", "attention", "none")
    detach: bool = option(True, "keep the KL from teaching the main model, as the paper does (false: an ablation)")
    index_fp8: bool = option(True, "select by FP8 index scores, as the published inference does")
    block_size: int = option(256, "context length in tokens")
    batch_size: int = option(8, "sequences per micro-batch")
    gradient_accumulation_steps: int = option(1, "micro-batches per step")
    dense_steps: int = option(400, "optimizer steps of the dense stage")
    warmup_steps: int = option(100, "optimizer steps of the indexer's warm-up")
    sparse_steps: int = option(120, "optimizer steps of the sparse stage")
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
    compare: str = option("", "runs to draw beside this one in plot.png: folders or metrics.jsonl files, with commas between")


# Defaults that differ on a CUDA GPU: a model of 27M parameters at a context of 4096
GPU = dict(dtype="bfloat16", block_size=4096, dense_steps=1000, warmup_steps=200, sparse_steps=400, dense_lr=1e-3, warmup_lr=2e-3, sparse_lr=2e-4,
           ramp_steps=50, eval_interval=100, eval_steps=8, save_interval=200, hidden_size=512, intermediate_size=1536, num_hidden_layers=8,
           num_attention_heads=8, q_lora_rank=256, kv_lora_rank=128, qk_nope_head_dim=64, qk_rope_head_dim=32, v_head_dim=64,
           index_n_heads=8, index_head_dim=64, index_topk=512)
NEW_INDEXER = dict(index_n_heads=16, index_head_dim=128, index_topk=2048)  # for an --init_from without one
MODEL_FIELDS = [f for f in fields(Config) if f.type in (int, float, bool) and f.name != "vocab_size"]
FIXED = {f.name for f in MODEL_FIELDS} | {"stage", "init_from", "train", "detach", "data", "tokenizer", "seed", "block_size", "batch_size", "gradient_accumulation_steps"}


def start_folder(init_from, out_dir, stage):
    """The checkpoint that a run beginning with `stage` starts from: --init_from, else what the stage before left in out_dir; "" for a fresh model."""
    return init_from or (str(Path(out_dir) / BEFORE[stage]) if stage in BEFORE else "")


def resolve(argv):
    """-> Options, dict of model sizes, device. Precedence: command line, --config file, the run being resumed, the device's defaults.

    Raises ValueError or FileNotFoundError, one line with value and fix, for everything that can be known before work begins."""
    parser = cli.Parser(__doc__)
    given = cli.parse_fields(parser, (*fields(Options), *MODEL_FIELDS), GPU, argv)
    device = cli.device(given.get("device", "auto"))
    base = GPU if device.type == "cuda" else {}
    if given.get("init_from") or given.get("stage") in BEFORE:  # sizes come from the checkpoint
        base = {k: v for k, v in base.items() if k in Options.__dataclass_fields__}
    if given.get("resume"):
        path = Path(given.get("out_dir", Options.out_dir)) / "run.json"
        if not path.is_file():
            raise FileNotFoundError(f"--resume: {path} does not exist, there is no run to continue; leave --resume out")
        base = files.read_json(path).get("options")
        if not base or given.get("overwrite"):
            raise ValueError("--resume with --overwrite: choose one" if base else f"--resume: {path} holds no options; start anew with --overwrite")
        base["out_dir"] = str(path.parent)  # it may have been moved
        device = cli.device(given.get("device", base["device"]))
        for name in sorted(FIXED & given.keys()):
            if given[name] != base.get(name):
                raise ValueError(f"--{name}={given[name]}: the run being resumed has {base.get(name)}; leave the option out, or start another run")
    elif given.get("stage") == "control":  # of the run in out_dir, with its options
        run = files.run_options(given.get("out_dir", Options.out_dir))
        own = {"stage", "out_dir", "device"} | ({"init_from"} if run.get("stage") not in ("sparse", "control") else set())  # a sparse stage started there, too
        base |= {k: v for k, v in run.items() if k in Options.__dataclass_fields__.keys() - own or k == "index_topk"}
    values = base | given
    if values.get("init_from") and not values.get("resume") and not Path(values["init_from"]).is_dir():
        raise FileNotFoundError(f"--init_from={values['init_from']} does not exist; give the folder of a checkpoint")
    source = start_folder(values.get("init_from"), values.get("out_dir", Options.out_dir), values.get("stage"))
    values["tokenizer"] = values.get("tokenizer") or (tokenizer.tokenizer_name(source) if source and Path(source).is_dir() else "bytes")
    o = Options(**{k: v for k, v in values.items() if k in Options.__dataclass_fields__})
    for name in ("block_size", "batch_size", "gradient_accumulation_steps", "eval_interval", "eval_steps", "save_interval"):
        if getattr(o, name) < 1:
            raise ValueError(f"--{name}={getattr(o, name)}: must be at least 1")
    for name in ("dense_steps", "warmup_steps", "sparse_steps", "ramp_steps"):
        if getattr(o, name) < 0:
            raise ValueError(f"--{name}={getattr(o, name)}: cannot be negative")
    cli.check_ranges(o, ("dense_lr", 0, 1e30), ("warmup_lr", 0, 1e30), ("sparse_lr", 0, 1e30), ("min_lr", 0, 1), ("weight_decay", 0, 1e30), ("beta1", 0, 0.9999999),
                     ("beta2", 0, 0.9999999), ("grad_clip", 1e-12, 1e30), ("seed", 0, 2**63 - 1))
    for path in (Path(o.out_dir), *Path(o.out_dir).parents):
        if not o.out_dir or path.exists() and not path.is_dir():
            raise ValueError(f"--out_dir={o.out_dir}: {'name a folder' if not o.out_dir else f'{path} is a file; choose another'}")
    report.read_logs(o.compare)  # raises, as does the next line
    cli.backend(o.backend, device)
    if o.stage == "control" and o.train == "none":
        raise ValueError("--stage=control --train=none: nothing would be trained; use --train=all or attention")
    if not o.resume and o.stage in BEFORE and not Path(source).is_dir():
        raise FileNotFoundError(f"--stage={o.stage} starts from {source}, which does not exist; run the stage before, or give --init_from=DIR")
    sizes = {k: v for k, v in values.items() if k not in Options.__dataclass_fields__}
    if sizes.get("index_topk", 1) < 1:
        raise ValueError(f"--index_topk={sizes['index_topk']}: a query selects at least 1 token")
    if not source and not o.resume:
        check_context(Config(**sizes).check(), o)
    return o, sizes, device


def check_context(c, o):
    """ValueError: a context that is too long for the model of this Config, or too short for its k."""
    if o.block_size > c.max_position_embeddings:
        raise ValueError(f"--block_size={o.block_size}: longer than the model's max_position_embeddings={c.max_position_embeddings}")
    if o.stage in ("all", "sparse") and o.block_size <= c.index_topk:
        raise ValueError(f"--block_size={o.block_size}: not longer than index_topk={c.index_topk}, so the sparse stage would select everything; lower --index_topk")


def build(o, sizes, device, stages, vocab_size):
    """-> the model to start `stages` with: fresh, or from --init_from, or from what the stage before left in out_dir."""
    kwargs = dict(backend=cli.backend(o.backend, device), index_fp8=o.index_fp8)
    folder = start_folder(o.init_from, o.out_dir, stages[0])
    if not folder:
        model = Transformer(Config(vocab_size=vocab_size, **sizes), **kwargs).to(device)
    else:
        old = checkpoint.read_config(folder)
        index = {k: sizes.get(k, getattr(old, k) if old.index_topk else v) for k, v in NEW_INDEXER.items()}
        resized = any(index[k] != getattr(old, k) for k in ("index_n_heads", "index_head_dim"))
        anew = "warmup" in stages and resized if old.index_topk else not {"warmup", "sparse"}.isdisjoint(stages)
        model = Transformer.from_pretrained(folder, device=device, index=index if anew else None, dtype=torch.float32 if o.dtype == "float32" else None, **kwargs)
        if anew:
            there = f"instead of {old.index_n_heads} of {old.index_head_dim}" if old.index_topk else "where there were none"
            print(f"indexers start anew: {index['index_n_heads']} heads of {index['index_head_dim']} {there} in {folder}")
        for name, value in sizes.items():
            if name == "index_topk":  # how many are selected is no property of the weights
                model.config.index_topk = value
                model.config.check()
            elif getattr(model.config, name) != value:
                raise ValueError(f"--{name}={value}: the checkpoint {folder} has {getattr(model.config, name)}; leave the option out"
                                 + (", or start with --stage=warmup, where indexers may start anew" if name in NEW_INDEXER else ""))
        if model.config.vocab_size < vocab_size:
            raise ValueError(f"--tokenizer={o.tokenizer} has {vocab_size} tokens, the checkpoint {folder} only {model.config.vocab_size}; use the tokenizer it was trained with")
    check_context(model.config, o)
    return model.train()


def trainable(model, stage, train):
    """Freeze what the stage does not train -> (parameters of the model, parameters of the indexers) that it does."""
    index = set(model.indexer_parameters())
    chosen = lambda n: stage == "dense" or stage != "warmup" and (train == "all" or train == "attention" and ".self_attn." in n)
    for name, p in model.named_parameters():
        p.requires_grad_(stage in ("warmup", "sparse") if p in index else chosen(name))
        if p.requires_grad:
            p.data = p.data.float()  # of a bf16 checkpoint: most steps of a small learning rate are below half a bf16 digit, they would be lost
    learn = [p for p in model.parameters() if p.requires_grad]
    return [p for p in learn if p not in index], [p for p in learn if p in index]


def learning_rate(o, step, steps, peak):
    """Linear ramp over ramp_steps, then a cosine down to min_lr * peak at the last step, or constant."""
    if step < o.ramp_steps:
        return peak * (step + 1) / (o.ramp_steps + 1)
    progress = (step - o.ramp_steps) / max(1, steps - 1 - o.ramp_steps)
    return peak if o.schedule == "constant" else peak * (o.min_lr + (1 - o.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1, progress))))


@torch.no_grad()
def evaluate(model, batches, o, device, attention):
    """Validation loss in nats per token over eval_steps batches, always the same ones, with attention "dense" or "sparse"."""
    trained_with, model.attention = model.attention, attention
    losses = []
    for n in range(o.eval_steps):
        x, y, first = (t.to(device) for t in batches.batch(n))
        with torch.autocast(device.type, torch.bfloat16, enabled=o.dtype == "bfloat16"):
            losses.append(model(x, y, first, return_logits=False)[1]["lm"].item())
    model.attention = trained_with
    return sum(losses) / len(losses)


def save_state(model, optimizer, stage, step, corpus, o):
    """The folder state-<stage>-<step> for --resume; it appears whole, then older ones go. corpus: hash of the training tokens."""
    folder = Path(o.out_dir) / f"state-{STAGES.index(stage)}-{step:07d}"
    part = folder.with_name(folder.name + ".part")
    model.save_pretrained(part)
    torch.save(dict(stage=stage, step=step, corpus=corpus, optimizer=optimizer.state_dict()), part / "trainer.pt")
    os.replace(part, folder)
    for old in states(o.out_dir)[:-1]:
        shutil.rmtree(old)


def states(out_dir):
    """The complete states in out_dir, the latest last."""
    return sorted(p for p in Path(out_dir).glob("state-*") if p.suffix not in (".part", ".old"))


def main():
    """The run: options, data, model, then the stages one after the other."""
    o, sizes, device = resolve(sys.argv[1:])
    out, stages = Path(o.out_dir), list(STAGES[:3]) if o.stage == "all" else [o.stage]
    replaced = STAGES if o.stage == "all" else stages  # a control belongs to the warm-up that it started from
    earlier = [p for p in (*states(out), *(out / s for s in replaced)) if p.exists()]
    if o.overwrite and o.init_from and Path(o.init_from).resolve() in [p.resolve() for p in earlier]:
        raise ValueError(f"--init_from={o.init_from} is what --overwrite would replace; choose another --out_dir")
    if earlier and not (o.resume or o.overwrite):
        raise ValueError(f"{earlier[-1]} exists: continue with --resume, replace it with --overwrite, or choose another --out_dir")
    resumed = states(out)[-1] if o.resume and states(out) else None
    if o.resume and not resumed:
        state = "the run has finished" if (out / stages[-1]).exists() else "it stopped before its first saved state"
        raise ValueError(f"--resume: nothing to continue in {out}, {state}; --overwrite starts anew")

    train_tokens, val_tokens = data.prepare(o.data, o.tokenizer)
    eot, vocab_size = train_tokens.header["eot"], train_tokens.header["vocab_size"]
    batches = data.Batches(train_tokens.tokens, o.block_size, o.batch_size, eot, o.seed)
    val_batches = data.Batches(val_tokens.tokens, o.block_size, o.batch_size, eot, 0)
    torch.manual_seed(o.seed)
    if resumed:
        model = Transformer.from_pretrained(resumed, device=device, backend=cli.backend(o.backend, device), index_fp8=o.index_fp8).train()
        saved = torch.load(resumed / "trainer.pt", map_location=device, weights_only=True)
        stages = replaced = stages[stages.index(saved["stage"]):]
        if saved["corpus"] != train_tokens.header["sha256"]:
            raise ValueError(f"--resume: the text of --data={o.data} has changed since the run was interrupted, its batches would be others; start anew with --overwrite")
    else:
        model, saved = build(o, sizes, device, stages, vocab_size), None
    c, model.recompute, model.detach = model.config, o.recompute, o.detach
    forward = torch.compile(model) if o.compile else model

    if o.overwrite:  # only now, when nothing can be refused any more
        for path in earlier:
            shutil.rmtree(path)
    out.mkdir(parents=True, exist_ok=True)
    sizes = {f.name: getattr(c, f.name) for f in MODEL_FIELDS}
    run = dict(options=asdict(o) | dict(resume=False, overwrite=False) | sizes, command=" ".join(sys.argv), commit=cli.commit(), **report.machine(device))
    files.replace_text(out / "run.json", json.dumps(run, indent=2) + "\n")
    log_path = out / "metrics.jsonl"
    if log_path.exists():  # what was logged after the state was saved happens again, and so does a stage that is run anew
        done = lambda r: r["stage"] not in replaced or resumed and r["stage"] == saved["stage"] and r["step"] < saved["step"]
        kept = [line for line in log_path.read_text().splitlines() if line.endswith("}") and done(json.loads(line))]
        files.replace_text(log_path, "".join(line + "\n" for line in kept))
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{run['device']} | torch {run['torch']} | commit {run['commit']} | backend {o.backend}, {o.dtype}\n"
          f"model: {parameters / 1e6:.1f}M parameters ({sum(p.numel() for p in model.indexer_parameters()) / 1e6:.2f}M in indexers), {c.num_hidden_layers} layers, "
          f"context {o.block_size}, top-k {c.index_topk}\ndata: {o.data}, {len(train_tokens.tokens):,} training and {len(val_tokens.tokens):,} validation tokens")
    print("options: " + " ".join(f"--{k}={v}" for k, v in run["options"].items() if v != ""))
    rate = report.matmul_rate(device, getattr(torch, o.dtype))
    tokens_per_step = o.batch_size * o.block_size * o.gradient_accumulation_steps
    summary = json.loads((out / "summary.json").read_text()) if (out / "summary.json").exists() else {}
    summary = {k: v for k, v in summary.items() if not k.endswith(tuple(f"after {stage}" for stage in replaced))}

    with cli.interruptible() as caught, open(log_path, "a") as log:
        for stage in stages:
            like = "sparse" if stage == "control" else stage  # whose batches, steps and learning rate it has
            steps, peak_lr, indexing = getattr(o, f"{like}_steps"), getattr(o, f"{like}_lr"), stage in ("warmup", "sparse")
            start = saved["step"] if saved and stage == saved["stage"] else 0
            model.attention = "sparse" if stage == "sparse" else "dense"
            groups = trainable(model, stage, o.train)
            optimizer = torch.optim.AdamW([dict(params=[p for p in g if (p.dim() > 1) == decay], weight_decay=o.weight_decay * decay) for g in groups for decay in (True, False)],
                                          betas=(o.beta1, o.beta2), fused=device.type == "cuda")
            if saved and stage == saved["stage"]:
                optimizer.load_state_dict(saved["optimizer"])
            operations = report.flops_per_token(model, o.block_size, stage)
            bar = tqdm(range(start, steps), desc=stage, initial=start, total=steps, disable=None, dynamic_ncols=True)
            for step in bar:
                began = time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(o, step, steps, peak_lr)
                means = {}
                for micro in range(o.gradient_accumulation_steps):
                    number = (sum(getattr(o, f"{s}_steps") for s in STAGES[:STAGES.index(like)]) + step) * o.gradient_accumulation_steps + micro
                    x, y, first = (t.to(device, non_blocking=True) for t in batches.batch(number))
                    with torch.autocast(device.type, torch.bfloat16, enabled=o.dtype == "bfloat16"):
                        losses = forward(x, None if stage == "warmup" else y, first, index_loss=indexing, return_logits=False)[1]
                    objective = sum(losses[k] for k in ("lm", "kl") if k in losses)
                    (objective / o.gradient_accumulation_steps).backward()
                    for k, v in losses.items():
                        means[k] = means.get(k, 0) + v.item() / o.gradient_accumulation_steps
                norms = [torch.nn.utils.clip_grad_norm_(g, o.grad_clip).item() if g else 0.0 for g in groups]
                if not all(map(math.isfinite, (*means.values(), *norms))):
                    last = states(out)[-1] if states(out) else o.init_from or "none yet"
                    print(f"train.py: {stage} step {step}, batch {number}: not finite: {means}, gradient norms {norms}; last good checkpoint: {last}. "
                          f"Lower --{like}_lr or raise --ramp_steps", file=sys.stderr)
                    return 1
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                report.wait(device)
                speed = tokens_per_step / (time.perf_counter() - began)
                record = dict(stage=stage, step=step, loss=means.get("lm", means.get("kl")), **means, lr=optimizer.param_groups[0]["lr"], grad_norm=norms[0], index_grad_norm=norms[1],
                              tokens_per_second=speed, mfu=speed * operations / rate, memory_gb=report.peak_memory(device))
                if (step + 1) % o.eval_interval == 0 or step + 1 == steps:
                    record["val_loss"] = evaluate(model, val_batches, o, device, model.attention)
                    tqdm.write(report.line(record))
                log.write(json.dumps(record) + "\n")
                log.flush()
                bar.set_postfix({k: f"{record[k]:.3f}" for k in ("loss", "kl", "recall") if k in record} | dict(tok_s=f"{speed:.0f}"))
                if caught or (step + 1) % o.save_interval == 0 or step + 1 == steps:
                    save_state(model, optimizer, stage, step + 1, train_tokens.header["sha256"], o)
                if caught:
                    print(f"\nstopped after {stage} step {step + 1}; continue with: python train.py --resume --out_dir={o.out_dir}", file=sys.stderr)
                    return 130 if caught[0] == signal.SIGINT else 143
            bar.close()
            for p in groups[0]:  # the main model is saved in one dtype: that of a bf16 checkpoint of which only the attention was trained
                p.data = p.data.to(model.lm_head.weight.dtype)
            model.save_pretrained(out / stage, o.tokenizer)
            for attention in ("dense", "sparse") if indexing else ("dense",):
                summary[f"val_loss, {attention} attention, after {stage}"] = evaluate(model, val_batches, o, device, attention)
            files.replace_text(out / "summary.json", json.dumps(summary, indent=2) + "\n")
            report.plot(log_path, out / "plot.png", o.compare)
    for old in out.glob("state-*"):
        shutil.rmtree(old)
    print("\n".join(f"{k}: {v:.4f}" for k, v in summary.items()))
    prompt = torch.from_numpy(val_tokens.tokens[:o.block_size // 2].astype("int64"))[None].to(device)
    model.eval()
    with torch.autocast(device.type, torch.bfloat16, enabled=o.dtype == "bfloat16"):
        text = tokenizer.load_tokenizer(out / stages[-1]).decode(model.generate(prompt, min(256, o.block_size - prompt.shape[1]), temperature=0.8, top_k=50)[0, prompt.shape[1]:].tolist())
    print(f"sample after the first {prompt.shape[1]} tokens of the validation text:\n{text}\n\ncheckpoint: {out / stages[-1]}   plot: {out / 'plot.png'}   "
          f"next: python sample.py --checkpoint={out / stages[-1]}" + (" --attention=dense" if not indexing else f", python evaluate.py --checkpoint={out / stages[-1]}"))
    return 0


if __name__ == "__main__":
    cli.run(main)
