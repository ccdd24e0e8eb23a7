"""How good is a checkpoint's sparse attention? Dense beside sparse attention, same weights, same text.

    python evaluate.py                                        # out/sparse, on the validation text of its run
    python evaluate.py --checkpoint=DIR --block_size=16384

Measures (results as tables, evaluation.json and four plots in --out_dir):
  loss      validation loss by tokens in sight (of the same document, itself included); up to k, sparse attention is dense attention
  recall    share of the dense attention's mass, mean over heads, that the selection holds; beside it, for the same k, the last k
            tokens and the oracle, which takes the k largest of that mass
  entropy   of softmax(I) over everything in sight and over the selection, and of the attention (head mean): e^entropy tokens count
  distance  how far back the selected tokens lie, and the attention's mass, in tokens; 1 is the query itself
  overlap   of neighbouring queries: the share of its selection that a query has in common with the one before, and the union of the
            selections of 8 in a row over k (1: all select the same, 8: nothing in common)
  copy      text that ends in the first half of a random string that it holds once before: is the second half predicted?
            (share of tokens whose argmax is right given the true ones before, by distance from string to string)
Recall, entropy, distance and overlap are taken in the sparse forward, whose hidden states are those in use, at a random sample of the queries that
see more than k tokens: below, nothing is chosen (overlap: all 8 queries do). Buckets are named by their upper bounds: 64 means 33..64.
"""
import functools
import json
import math
import os
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from support import files
from support import tokenizer
from support import checkpoint
from support import cli
import data
import indexer
from support import report
from config import Config
from model import Transformer

YARDSTICKS = ("selected", "last k", "oracle")
ENTROPIES = ("indexer", "selection", "attention")
NEIGHBOURS = {"overlap": 2, "union/k": 8}  # queries in a row


def options(argv):
    """-> the command line, completed by the run.json beside the checkpoint, and the Config. FileNotFoundError, ValueError: one line naming value and fix."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--checkpoint", default="out/sparse", help="folder with config.json and weights, ours or a published one (default %(default)s)")
    parser.add_argument("--data", help="python, packages, shakespeare, web[:N], or a text file or folder (default: that of the run, else python)")
    parser.add_argument("--tokenizer", help="bytes, a tiktoken name, or a folder with tokenizer.json (default: the checkpoint's)")
    parser.add_argument("--block_size", type=int, help="context length in tokens (default: that of the run, else 4 k)")
    parser.add_argument("--batch_size", type=int, help="sequences at a time (default: that of the run, else 8)")
    parser.add_argument("--batches", type=int, default=8, help="validation batches (default %(default)s); the first ones are train.py's")
    parser.add_argument("--rows", type=int, default=64, help="queries per sequence for recall, entropy and distance (default %(default)s)")
    parser.add_argument("--copies", type=int, default=32, help="random strings to copy, at each distance (default %(default)s)")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--index_fp8", type=cli.boolean, help="score quantised indexer keys and queries (default: as the run, else true)")
    parser.add_argument("--out_dir", help="folder for the results (default: evaluation-NAME beside the checkpoint NAME)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the linear layers, autocast (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--backend", choices=["auto", "torch", "triton"], default="auto", help="attention path (auto: triton on a CUDA GPU)")
    o = parser.parse_args(argv)
    folder = files.locate(o.checkpoint)
    config = checkpoint.read_config(folder)
    if not config.index_topk:
        raise ValueError(f"--checkpoint={o.checkpoint}: has no indexer (index_topk=0); train one: train.py --stage=warmup --init_from={o.checkpoint}")
    run = dict(data="python", block_size=min(4 * config.index_topk, config.max_position_embeddings), batch_size=8, index_fp8=True) | files.run_options(folder.parent)
    o.tokenizer = o.tokenizer or run.get("tokenizer") or tokenizer.tokenizer_name(folder)
    o.out_dir = o.out_dir or str(folder.parent / f"evaluation-{folder.name}")
    for name in ("data", "block_size", "batch_size", "index_fp8"):
        setattr(o, name, run[name] if getattr(o, name) is None else getattr(o, name))
    for name, low in (("block_size", 8), ("batch_size", 1), ("batches", 1), ("rows", 1), ("copies", 1)):
        if getattr(o, name) < low:
            raise ValueError(f"--{name}={getattr(o, name)}: must be at least {low}")
    if o.block_size > config.max_position_embeddings:
        raise ValueError(f"--block_size={o.block_size}: longer than the model's max_position_embeddings={config.max_position_embeddings}")
    if o.block_size <= config.index_topk:
        raise ValueError(f"--block_size={o.block_size}: not longer than index_topk={config.index_topk}, so everything would be selected; raise --block_size")
    there = next(p for p in (Path(o.out_dir).absolute(), *Path(o.out_dir).absolute().parents) if p.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out_dir={o.out_dir}: cannot write to {there}; choose another folder")
    return o, config


def bounds(n):
    """-> (buckets,) int64: 1, 2, 4, ... up to the first power of two >= n; bucket b holds the numbers above bound b - 1, up to bound b."""
    return 2 ** torch.arange(math.ceil(math.log2(n)) + 1)


def by_bucket(values, n, edges):
    """Sum values (..., N) over the places in each bucket (see `bounds`) of n (..., N) -> (..., buckets). No atomics: runs repeat bit by bit."""
    bucket = torch.bucketize(n, edges.to(n.device))
    return torch.stack([values.masked_fill(bucket != b, 0).sum(-1) for b in range(len(edges))], -1)


def watching(model, record):
    """-> a context in which each layer of a sparse forward, whatever the backend, calls record(layer, index, attention) with the arguments of
    `select` (in a layer that shares a selection: those of the layer it comes from) and of `sparse_attention`."""
    index = []

    def watch(module, args, layer):
        h, run, *rest = args

        def select(*arguments):
            index[:] = arguments
            return run.ops.select(*arguments)

        def sparse_attention(*arguments):
            with torch.autocast(h.device.type, enabled=False):
                record(layer, index, arguments)
            return run.ops.sparse_attention(*arguments)

        ops = run.ops._replace(select=select, sparse_attention=sparse_attention)
        return h, replace(run, ops=ops), *rest

    hooks = ExitStack()
    for layer, block in enumerate(model.model.layers):
        hooks.enter_context(block.self_attn.register_forward_pre_hook(functools.partial(watch, layer=layer)))
    return hooks


def layer_statistics(index, attention, rows, edges):
    """What `watching` saw of a layer, at the queries rows (R,) int64 -> recall by YARDSTICKS (B,R,3), ENTROPIES in nats (B,R,3),
    share of each bucket of distances in the selection and in the attention's mass (B,R,2,buckets), NEIGHBOURS (B,R,2), NaN unless all
    queries see more than k tokens of one document. A tensor holds near indexer.SLICE elements."""
    (q_index, k_index, w, topk, k_scale, first, _), (q, latents, indices, scale, _) = index, attention
    q, q_index, w, all_indices, indices = q[:, rows], q_index[:, rows], w[:, rows], indices, indices[:, rows]
    (B, R, H, _), T = q.shape, latents.shape[1]
    last = rows.expand(B, -1)
    first = torch.zeros_like(last) if first is None else first[:, rows]
    row = rows[:, None] - torch.arange(max(NEIGHBOURS.values()), device=rows.device)  # (R,8): a query and those before it
    alike = row[:, -1] - first >= topk  # (B,R): the farthest sees more than k tokens of the query's document, so they all do
    entropy = lambda p: torch.special.entr(p).sum(-1)

    def some(part):
        seen = indexer.visible(R, T, first, last, part, q.device)
        logits = torch.einsum("bshd,btd->bsht", q[:, part].float(), latents.float()) * scale
        p = logits.masked_fill(~seen[:, :, None], float("-inf")).softmax(-1).mean(2)  # (B, part, T), the head mean
        scores = indexer.index_scores(q_index, k_index, w, k_scale, first, last, part)
        back = last[:, part, None] - torch.arange(T, device=q.device) + 1
        selected = lambda x, empty: x.gather(-1, indices[:, part].clamp(min=0).long()).masked_fill(indices[:, part] < 0, empty)
        recall = selected(p, 0).sum(-1), p.masked_fill(back > topk, 0).sum(-1), p.topk(min(topk, T)).values.sum(-1)
        entropies = entropy(scores.softmax(-1)), entropy(selected(scores, float("-inf")).softmax(-1)), entropy(p)
        chosen = (indices[:, part] >= 0).float()
        distance = by_bucket(chosen / chosen.sum(-1, keepdim=True), selected(back, 1), edges), by_bucket(p, back, edges)
        near = all_indices[:, row[part].clamp(min=0)]  # (B, part, 8, k)
        union = [(near[:, :, :n].flatten(2).sort(-1).values.diff(dim=-1) > 0).sum(-1) + 1 for n in NEIGHBOURS.values()]
        near = torch.stack((2 - union[0] / topk, union[1] / topk), -1).masked_fill(~alike[:, part, None], float("nan"))
        return torch.stack(recall, -1), torch.stack(entropies, -1), torch.stack(distance, -2), near

    return indexer.over_rows(some, R, B * T * max(H, q_index.shape[2]))


def predict(model, x, y, first, attention, dtype):
    """Read x (B,S) and predict y (B,n), the tokens after its last n -> nats (B,n) float32, is it the most likely token (B,n) bool."""
    model.attention, kept, n = attention, [], y.shape[1]
    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        with model.model["norm"].register_forward_hook(lambda module, args, out: kept.append(out[:, -n:])):
            model(x, first=first, return_logits=False)

        def some(part):
            logits = model.lm_head(kept[0][:, part]).float()
            return F.cross_entropy(logits.transpose(1, 2), y[:, part], reduction="none"), logits.argmax(-1) == y[:, part]

        return indexer.over_rows(some, n, x.shape[0] * model.config.vocab_size)


def measure_text(model, batches, o, device):
    """-> nats {"dense", "sparse"}: (N,), sight (N,), one entry per validation token; and of the sampled queries their sight (M,) and
    per layer what `layer_statistics` gives, (M,3), (M,3), (M,2,buckets), (M,2). All on the CPU."""
    nats, sights, row_sights, layers = dict(dense=[], sparse=[]), [], [], [[] for _ in model.model.layers]
    S, topk, generator = o.block_size, model.config.index_topk, torch.Generator().manual_seed(o.seed)
    for number in tqdm(range(o.batches), desc="validation text", disable=None, dynamic_ncols=True):
        x, y, first = (t.to(device) for t in batches.batch(number))
        sight = torch.arange(1, S + 1, device=device) - first
        useful = (sight > topk).any(0)
        useful[-1] |= ~useful.any()  # never without a row
        rows = useful.nonzero()[:, 0]
        rows = rows[torch.randperm(len(rows), generator=generator)[:o.rows].to(device)]
        chooses = sight[:, rows] > topk
        record = lambda layer, *seen: layers[layer].append([s[chooses].cpu() for s in layer_statistics(*seen, rows, bounds(S))])
        nats["dense"].append(predict(model, x, y, first, "dense", o.dtype)[0].flatten().cpu())
        with watching(model, record):
            nats["sparse"].append(predict(model, x, y, first, "sparse", o.dtype)[0].flatten().cpu())
        sights.append(sight.flatten().cpu())
        row_sights.append(sight[:, rows][chooses].cpu())
    return {k: torch.cat(v) for k, v in nats.items()}, torch.cat(sights), torch.cat(row_sights), [[torch.cat(t) for t in zip(*layer)] for layer in layers]


def copy_task(tokens, eot, T, count, seed):
    """-> length of the strings, size of their alphabet, {distance: samples (count, T + 1) int64}, the same texts and strings at every distance.

    A sample: text from `tokens` without its EOTs, hence one document; its last `length` tokens are a string, which begins once more
    `distance` tokens before. Strings: uniform over the alphabet, the tokens that make up at least 1/10000 of the text."""
    random, length = np.random.RandomState(seed % 2**32), min(32, T // 4)
    alphabet = data.frequent(tokens, eot)
    starts = random.randint(max(1, len(tokens) - 2 * T), size=count)
    text = np.stack([np.resize(piece[piece != eot], T + 1) for piece in (np.asarray(tokens[s:s + 2 * T + 2]) for s in starts)]).astype(np.int64)
    text[:, -length:] = strings = random.choice(alphabet, (count, length))
    farthest, samples = T + 1 - length, {}
    for distance in sorted({d for d in bounds(T).tolist() if length <= d <= farthest} | {farthest}):
        samples[distance] = torch.from_numpy(text.copy())
        samples[distance][:, farthest - distance:farthest - distance + length] = torch.from_numpy(strings)
    return length, len(alphabet), samples


def measure_copies(model, samples, length, o, device):
    """-> {"dense", "sparse"}: accuracy over the second halves of the strings, a list over the distances of samples."""
    accuracy = dict(dense=[], sparse=[])
    for x in tqdm(samples.values(), desc="copying", disable=None, dynamic_ncols=True):
        for attention in accuracy:
            right = [predict(model, part[:, :-1], part[:, -(length // 2):], None, attention, o.dtype)[1] for part in x.to(device).split(o.batch_size)]
            accuracy[attention].append(torch.cat(right).float().mean().item())
    return accuracy


def bucketed(name, n, values):
    """Means of values {name: (N,)} per bucket of n (N,) that is not empty, and over all -> columns {name: bounds, "count", **means}."""
    edges = bounds(int(n.max()))
    counts = by_bucket(torch.ones(len(n), dtype=torch.double), n, edges)
    full = counts > 0
    columns = {name: [*edges[full].tolist(), "all"], "count": [*counts[full].long().tolist(), len(n)]}
    for key, x in values.items():
        columns[key] = [*(by_bucket(x.double(), n, edges) / counts)[full].tolist(), x.double().mean().item()]
    return columns


def summarise(nats, sight, row_sight, layers):
    """What `measure_text` gives -> tables, each a dict of columns: loss, recall, layers, distances (mean over layers, then layer by layer)."""
    recalls, entropies, distances, near = (torch.stack([t.double().nanmean(0) for t in ts]) for ts in zip(*layers))  # (L,3), (L,3), (L,2,buckets), (L,2)
    layered = lambda x: [*x.tolist(), x.mean().item()]
    by_sight = torch.stack([recall for recall, *_ in layers]).mean(0)
    return {
        "loss": bucketed("in sight", sight, nats | {"sparse - dense": nats["sparse"] - nats["dense"]}),
        "recall": bucketed("in sight", row_sight, {name: by_sight[:, i] for i, name in enumerate(YARDSTICKS)}),
        "layers": {"layer": [*range(len(layers)), "all"]} | {name: layered(recalls[:, i]) for i, name in enumerate(YARDSTICKS)} |
                  {"of oracle": layered(recalls[:, 0] / recalls[:, 2])} | {f"H({name})": layered(entropies[:, i]) for i, name in enumerate(ENTROPIES)} |
                  {name: layered(near[:, i]) for i, name in enumerate(NEIGHBOURS) if near.isfinite().all()},
        "distances": {"back": (2 ** torch.arange(distances.shape[2])).tolist()} |
                     {name: distances[:, i].mean(0).tolist() for i, name in enumerate(("selected", "attention"))} |
                     {f"{name}, layer {n}": x.tolist() for n, layer in enumerate(distances) for name, x in zip(("selected", "attention"), layer)}}


def table(title, columns):
    """{name: values} as lines of text, right-aligned under their names."""
    cells = [[name, *(f"{v:.4f}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v for v in values)] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    return "\n".join([title, *("  " + "  ".join(c.rjust(w) for c, w in zip(row, widths)) for row in zip(*cells)), ""])


def plot(columns, names, ylabel, xlabel, path, k=None):
    """Columns over the first one, to a PNG; k: draw the line below which everything is selected, on a logarithmic axis."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4))
    x = [v for v in next(iter(columns.values())) if v != "all"]
    for name, style in zip(names, ("o-", "s--", "^:")):
        axis.plot(x, columns[name][:len(x)], style, label=name, markersize=4)
    if k:
        axis.set_xscale("log", base=2)
        axis.axvline(k, color="gray", linewidth=0.8, label=f"k = {k}")
    axis.set_xticks(x, x, fontsize=8)
    axis.set(xlabel=xlabel, ylabel=ylabel, ylim=None if "loss" in ylabel else (0, 1.05 * axis.dataLim.ymax))
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(results, k, out):
    """evaluation.json and the plots, complete in a folder of their own before the first one appears in `out`."""
    out = out.resolve()  # "." has no name
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["loss"], ("dense", "sparse"), "validation loss (nats per token)", "tokens in sight", part / "loss.png", k)
    plot(results["layers"], YARDSTICKS, "share of the dense attention mass", "layer", part / "recall.png")
    plot(results["copy"], ("dense", "sparse"), "tokens copied right", "distance (tokens)", part / "copy.png", k)
    plot(results["distances"], ("selected", "attention"), "share", "tokens back, 1 is the query itself", part / "distances.png", k)
    out.mkdir(exist_ok=True)
    for file in part.iterdir():
        os.replace(file, out / file.name)
    part.rmdir()


@torch.no_grad()
def main():
    """Measure, print, and write everything at the end."""
    o, config = options(sys.argv[1:])
    device, k = cli.device(o.device), config.index_topk
    o.dtype = o.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    backend = cli.backend(o.backend, device)
    validation = data.prepare(o.data, o.tokenizer)[1]
    eot, vocab_size = validation.header["eot"], validation.header["vocab_size"]
    if vocab_size > config.vocab_size:
        raise ValueError(f"--tokenizer={o.tokenizer} has {vocab_size} tokens, the checkpoint only {config.vocab_size}; "
                         "use the tokenizer it was trained with")
    batches = data.Batches(validation.tokens, o.block_size, o.batch_size, eot, 0)
    if not any((torch.arange(o.block_size) - batches.batch(n)[2] >= k).any() for n in range(o.batches)):
        raise ValueError(f"--data={o.data}: no document goes beyond index_topk={k} tokens in {o.batches} batches, so nothing is chosen; "
                         "take longer texts or more --batches")
    model = Transformer.from_pretrained(o.checkpoint, backend, "sparse", o.index_fp8, device=device)
    results = dict(options=vars(o), index_topk=k, commit=cli.commit(), **report.machine(device))
    print(f"{o.checkpoint}: {config.num_hidden_layers} layers, top-k {k}, context {o.block_size} | {o.data}, {o.batches} x {o.batch_size} sequences, "
          f"{o.rows} queries of each | {results['device']}, {o.dtype}, commit {results['commit']}\n")
    results |= summarise(*measure_text(model, batches, o, device))
    length, alphabet, samples = copy_task(validation.tokens, eot, o.block_size, o.copies, o.seed)
    results["copy"] = dict(distance=list(samples)) | measure_copies(model, samples, length, o, device)
    results["copy_task"] = dict(length=length, cue=length - length // 2, strings=o.copies, alphabet=alphabet, chance=1 / alphabet)
    write(results, k, Path(o.out_dir))
    print(table("validation loss (nats per token) by tokens in sight", results["loss"]))
    print(table(f"share of the dense attention mass, queries with more than {k} tokens in sight, mean over layers", results["recall"]))
    print(table("the same by layer; entropies (nats) of the indexer, of its selection, and of the attention; overlap of neighbouring selections", results["layers"]))
    print(table("how many tokens back: shares of the selection and of the attention mass", dict(list(results["distances"].items())[:3])))
    print(table(f"copying the second half of a random string of {length} tokens (chance {1 / alphabet:.3f}) by distance", results["copy"]))
    print(f"evaluation.json, loss.png, recall.png, copy.png, distances.png: {o.out_dir}")
    return 0


if __name__ == "__main__":
    cli.run(main)
