"""Steps of training over several GPUs, with random weights and tokens: what docs/PARALLEL.md's table says.

    python tools/ranks.py                                            # on one GPU
    python tools/ranks.py million-blocks offload                     # one case, with --recompute=offload
    torchrun --standalone --nproc-per-node=4 tools/ranks.py          # on four
    torchrun --standalone --nproc-per-node=4 tools/ranks.py data dense-128k    # some of the cases
    torchrun --standalone --nproc-per-node=4 tools/ranks.py recompute          # all, with --recompute

Of a sequence of a million tokens on one GPU (docs/LONG.md) there are three cases: the model of the table,
with 4 indexer heads, and one with 8, as configs/16k.conf has them, that selects among all tokens or in two
levels. A line per case: milliseconds per step, tokens per second of all ranks, the peak of the fullest GPU,
bytes that a rank takes in per step by count, and the time that NCCL's kernels took in one profiled step.
"""
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

import parallel
from bench import SMALL_CONFIG, TWIN_CONFIG
from config import Config
from model import Transformer
from support import cli, report
from train import Options, adamw, trainable

STEPS = 3  # measured, after one that compiles
LONG_STEP = 15  # seconds; of steps that take longer one is enough
LONGEST_STEP = 80  # seconds; of steps that take longer the first, which compiles, is enough


class Case(NamedTuple):
    """A step that is measured."""
    config: Config
    stage: str
    train: str
    T: int  # tokens of a sequence
    batch: int  # sequences of each group
    shares: bool  # do all ranks share a sequence?
    recompute: bool
    offload: bool = False


EIGHT_HEADS = replace(SMALL_CONFIG, index_n_heads=8)
CASES = {
    "data": Case(SMALL_CONFIG, "sparse", "all", 16384, 4, False, False),
    "sparse-128k": Case(SMALL_CONFIG, "sparse", "all", 131072, 1, True, False),
    "dense-128k": Case(SMALL_CONFIG, "dense", "all", 131072, 1, True, False),
    "twin-128k": Case(TWIN_CONFIG, "warmup", "none", 131072, 1, True, True),
    "million": Case(SMALL_CONFIG, "sparse", "all", 2**20, 1, True, True),
    "million-exact": Case(EIGHT_HEADS, "sparse", "all", 2**20, 1, True, True),
    "million-blocks": Case(replace(EIGHT_HEADS, index_block=16), "sparse", "all", 2**20, 1, True, True)}
WORDS = ("recompute", "offload")  # in place of a case's name: options of all of them


def build(case, ranks):
    """-> a model with random weights, of which no GPU ever holds more than its part, and its optimizer. The
    twin is bf16, but for what learns."""
    with torch.device("meta"):
        model = Transformer(case.config)
    if case.config is TWIN_CONFIG:
        model.bfloat16()
    trainable(model, case.stage, case.train)
    parallel.shard(model, ranks).to_empty(device=ranks.device)
    torch.manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            rows = parallel.local_tensor(p)
            if p.dim() > 1:
                rows.normal_(std=case.config.initializer_range)
            else:
                rows.fill_(1)
    for name, x in model.named_buffers():
        x.zero_()
    model._apply(lambda x: x)  # the RoPE angles, which are no weights
    model.attention = "sparse" if case.stage == "sparse" else "dense"
    model.recompute = case.recompute
    model.offload = case.offload
    main, index = trainable(model, case.stage, case.train)
    return model, adamw(main, index, Options(), ranks.device)


def ids(case, ranks):
    """-> x, y (batch,T): runs of four equal tokens, so that neighbours select much alike; the same on ranks
    that share a sequence."""
    torch.manual_seed(0 if case.shares else ranks.rank)
    runs = torch.randint(0, case.config.vocab_size, (case.batch, case.T // 4 + 1), device=ranks.device)
    x = runs.repeat_interleave(4, 1)[:, :case.T + 1]
    return x[:, :-1], x[:, 1:]


def traffic(model, case, ranks):
    """Bytes that a rank takes in per step: of the parameters, in the forward and again in the backward, of
    the gradients, and of latents and indexer keys with their gradients."""
    others = (ranks.world - 1) / ranks.world
    total = 0
    for p in model.parameters():
        size = p.numel() * p.element_size()
        total += others * size * (2 + p.requires_grad)
    if ranks.context > 1:
        c = case.config
        width = c.kv_lora_rank + c.qk_rope_head_dim
        if case.stage != "dense":
            width += c.index_head_dim
        passes = 1 + (case.stage != "warmup") + case.recompute
        total += others * case.batch * case.T * c.num_hidden_layers * width * 2 * passes
    return total


def nccl_ms(step):
    """Milliseconds of NCCL's kernels in a step of this rank, including what they wait for others."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        step()
    events = [event for event in profile.key_averages() if "nccl" in event.key.lower()]
    return sum(event.device_time_total for event in events) / 1000


def seconds_of(step, steps, ranks):
    """Of a step, the mean of so many on the slowest rank."""
    began = time.perf_counter()
    for _ in range(steps):
        step()
    report.wait(ranks.device)
    [seconds] = ranks.largest([(time.perf_counter() - began) / steps])
    return seconds


def measure(name, case, ranks):
    """Print the line of a case."""
    if not case.shares:
        ranks = replace(ranks, context=1, group=None)
    report.reset_peak_memory(ranks.device)
    model, optimizer = build(case, ranks)
    x, y = ids(case, ranks)
    split = ranks.split(case.T)
    if split is not None:
        x, y = split.part(x), split.part(y)

    def step():
        with torch.autocast(ranks.device.type, torch.bfloat16):
            _, losses = model(x, None if case.stage == "warmup" else y, index_loss=case.stage != "dense",
                              logits_of=None, split=split)
        (losses.get("lm", 0) + losses.get("kl", 0)).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    seconds = seconds_of(step, 1, ranks)
    compiles = ", compilation included"
    if seconds < LONGEST_STEP:
        compiles = ""
        report.reset_peak_memory(ranks.device)
        seconds = seconds_of(step, STEPS if seconds < LONG_STEP else 1, ranks)
    [memory] = ranks.largest([report.peak_memory(ranks.device)])
    tokens = case.batch * case.T * ranks.data
    counted = traffic(model, case, ranks) / 1e9
    waits = nccl_ms(step) if ranks.world > 1 and ranks.device.type == "cuda" else 0
    print(f"{ranks.world} ranks, {name}: {1000 * seconds:,.0f} ms, {tokens / seconds:,.0f} tokens/s, "
          f"{memory:.1f} GB, takes in {counted:.2f} GB per step, NCCL {waits:,.0f} ms{compiles}",
          flush=True)


def main():
    """The cases that the command line names, or all."""
    words = [word for word in sys.argv[1:] if word in WORDS]
    names = [name for name in sys.argv[1:] if name not in WORDS] or list(CASES)
    unknown = [name for name in names if name not in CASES]
    if unknown:
        raise ValueError(f"{unknown[0]}: no such case; these are: {', '.join(CASES)}")
    ranks = parallel.start(parallel.device("auto"), parallel.world_size())
    for name in names:
        try:
            case = CASES[name]
            case = case._replace(recompute=case.recompute or bool(words), offload="offload" in words)
            measure(" ".join((name, *words)), case, ranks)
        except torch.OutOfMemoryError:
            if ranks.world > 1:  # the others wait for this one
                raise
            print(f"1 rank, {name}: out of memory", flush=True)
        if ranks.device.type == "cuda":
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    cli.run(main)
