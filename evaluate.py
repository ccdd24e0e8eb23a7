"""How good is a checkpoint's sparse attention? Dense beside sparse attention, same weights, same text.

    python evaluate.py                                        # out/sparse, on the validation text of its run
    python evaluate.py --checkpoint=DIR --block_size=16384
    torchrun --standalone --nproc-per-node=4 evaluate.py      # batches spread over four GPUs

Measures (results as tables, evaluation.json and a plot of each but entropy and overlap in --out_dir):
  loss      validation loss by tokens in sight (of the same document, itself included); up to k, sparse
            attention is dense attention
  recall    share of the dense attention's mass, mean over heads, that the selection holds; beside it, for the
            same k, the last k tokens and the oracle, which takes the k largest of that mass
  entropy   of softmax(I) over everything in sight and over the selection, and of the attention (head mean):
            e^entropy tokens count
  distance  how far back the selected tokens lie, and the attention's mass, in tokens; 1 is the query itself
  overlap   of neighbouring queries: the share of its selection that a query has in common with the one
            before, and the union of the selections of 8 in a row over k (1: all select the same, 8: nothing
            in common)
  copy      text that ends in the first half of a random string that it holds once before: is the second half
            predicted? (share of tokens whose argmax is right given the true ones before, by distance from
            string to string)
  sweep     with --sweep: validation loss against k, powers of two from 64 (or 1/16 of a short context) up to
            the context, of these weights, with the selection by the checkpoint's selector and by others
Recall, entropy, distance and overlap are taken in the sparse forward, whose hidden states are those in use,
at a random sample of the queries that see more than k tokens: below, nothing is chosen (overlap: all 8
queries do). Buckets are named by their upper bounds: 64 means 33..64.
"""
import functools
import json
import math
import os
import shutil
import sys
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import data
import indexer
import parallel
from config import SELECTORS
from model import Transformer, watched
from precision import exact
from sparse_attn import attention_mass
from support import checkpoint, cli, files, report, tokenizer

ATTENTIONS = ("dense", "sparse")
BASELINES = ("selected", "last k", "oracle")  # the selection itself, and what it is held against
ENTROPIES = ("indexer", "selection", "attention")
DISTANCES = ("selected", "attention")
NEIGHBOURS = {"overlap": 2, "union/k": 8}  # queries in a row


# ---- options ----

def parse(argv):
    """-> the command line as given, None where nothing was."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--checkpoint", default="out/sparse",
        help="folder with config.json and weights, ours or a published one (default %(default)s)")
    parser.add_argument(
        "--data",
        help="python, packages, english, shakespeare, web[:N], a text file or folder (default: that of the "
        "run, else python)")
    parser.add_argument(
        "--tokenizer",
        help="bytes, a tiktoken name, or a folder with tokenizer.json (default: the checkpoint's)")
    parser.add_argument(
        "--block_size", type=int, help="context length in tokens (default: that of the run, else 4 k)")
    parser.add_argument(
        "--batch_size", type=int, help="sequences at a time (default: that of the run, else 8)")
    parser.add_argument(
        "--batches", type=int, default=8,
        help="validation batches (default %(default)s); the first ones are train.py's")
    parser.add_argument(
        "--rows", type=int, default=64,
        help="queries per sequence for recall, entropy and distance (default %(default)s)")
    parser.add_argument(
        "--copies", type=int, default=32,
        help="random strings to copy, at each distance (default %(default)s)")
    parser.add_argument(
        "--sweep", default="", metavar="SELECTORS",
        help=f"loss against k: all, or some of {', '.join(SELECTORS)} with commas between, beside the "
        "checkpoint's own (default: no sweep)")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument(
        "--index_fp8", type=cli.boolean,
        help="score quantised indexer keys and queries (default: as the run, else true)")
    parser.add_argument(
        "--out_dir", help="folder for the results (default: evaluation-NAME beside the checkpoint NAME)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument(
        "--dtype", choices=["float32", "bfloat16"],
        help="of the linear layers, autocast (default: bfloat16 on a GPU, else float32)")
    parser.add_argument(
        "--backend", choices=["auto", "torch", "triton"], default="auto",
        help="attention path (auto: triton on a CUDA GPU)")
    parser.add_argument(
        "--shard", action="store_true",
        help="under torchrun: spread the weights over the processes, for models that one GPU cannot hold")
    return parser.parse_args(argv)


def resolve(argv):
    """-> the command line, completed by the run.json beside the checkpoint, and the Config.
    FileNotFoundError, ValueError: one line naming value and fix."""
    options = parse(argv)
    folder = files.locate(options.checkpoint)
    config = checkpoint.read_config(folder)
    if not config.index_topk:
        raise ValueError(f"--checkpoint={options.checkpoint}: has no indexer (index_topk=0); train one: "
                         f"train.py --stage=warmup --init_from={options.checkpoint}")
    context = min(4 * config.index_topk, config.max_position_embeddings)
    run = dict(data="python", block_size=context, batch_size=8, index_fp8=True)
    kinds = dict(data=str, block_size=int, batch_size=int, index_fp8=bool)
    run |= files.run_options(folder.parent, **kinds)
    options.tokenizer = options.tokenizer or tokenizer.tokenizer_name(folder)
    options.out_dir = options.out_dir or str(folder.parent / f"evaluation-{folder.name}")
    for name in kinds:
        if getattr(options, name) is None:
            setattr(options, name, run[name])
    check(options, config)
    return options, config


def check(options, config):
    """ValueError for numbers that are too small or too large, and for an out_dir that cannot be written."""
    cli.check_ranges(
        options, ("block_size", 8, math.inf), ("batch_size", 1, math.inf), ("batches", 1, math.inf),
        ("rows", 1, math.inf), ("copies", 1, math.inf), ("seed", 0, 2**63 - 1))
    if options.block_size > config.max_position_embeddings:
        raise ValueError(f"--block_size={options.block_size}: longer than the model's "
                         f"max_position_embeddings={config.max_position_embeddings}")
    if options.block_size <= config.index_topk:
        raise ValueError(f"--block_size={options.block_size}: not longer than "
                         f"index_topk={config.index_topk}, so everything would be selected; raise "
                         "--block_size")
    swept_selectors(options.sweep, config.selector)
    out = Path(options.out_dir).absolute()
    there = next(path for path in (out, *out.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ValueError(f"--out_dir={options.out_dir}: cannot write to {there}; choose another folder")


# ---- buckets ----

def bucket_bounds(n):
    """-> (buckets,) int64: 1, 2, 4, ... up to the first power of two >= n; bucket b holds the numbers above
    bound b - 1, up to bound b."""
    return 2 ** torch.arange(math.ceil(math.log2(n)) + 1)


def by_bucket(values, n, edges):
    """Sum values (..., N) whose n (..., N) lies in each bucket (see `bucket_bounds`) -> (..., buckets). No
    atomics: runs repeat bit by bit."""
    bucket = torch.bucketize(n, edges.to(n.device))  # (..., N)
    sums = [values.masked_fill(bucket != b, 0).sum(-1) for b in range(len(edges))]
    return torch.stack(sums, -1)


def bucketed(name, n, values):
    """Means of values {name: (N,)} per bucket of n (N,) that is not empty, and over all -> columns {name:
    bounds, "count", **means}."""
    edges = bucket_bounds(int(n.max()))
    counts = by_bucket(torch.ones(len(n), dtype=torch.double), n, edges)  # (buckets,)
    full = counts > 0
    columns = {
        name: [*edges[full].tolist(), "all"],
        "count": [*counts[full].long().tolist(), len(n)]}
    for key, x in values.items():
        x = x.double()
        means = by_bucket(x, n, edges) / counts  # (buckets,)
        columns[key] = [*means[full].tolist(), x.mean().item()]
    return columns


# ---- what a layer selects ----

class SelectArguments(NamedTuple):
    """Of a layer's `select`, see indexer.py."""
    q: Tensor  # (B, S, HI, DI)
    k: Tensor  # (B, T, DI)
    w: Tensor  # (B, S, HI)
    topk: int
    k_scale: Tensor | None  # (B, T)
    first: Tensor | None  # (B, S)
    last: Tensor | None  # (B, S)


class AttentionArguments(NamedTuple):
    """Of a layer's `sparse_attention`, see sparse_attn.py."""
    q: Tensor  # (B, S, H, D)
    latents: Tensor  # (B, T, D)
    indices: Tensor  # (B, S, K)
    scale: float
    value_dim: int


class Statistics(NamedTuple):
    """Of a layer, at R queries of B sequences."""
    recall: Tensor  # (B, R, 3): BASELINES
    entropy: Tensor  # (B, R, 3) nats: ENTROPIES
    distance: Tensor  # (B, R, 2, buckets): DISTANCES, shares that sum to one
    neighbours: Tensor  # (B, R, 2): NEIGHBOURS, NaN unless all 8 see more than k tokens of one document


def watching(model, record):
    """-> a context in which each layer of a sparse forward, whatever the backend, calls record(layer,
    SelectArguments, AttentionArguments); in a layer that shares a selection, the former are those of the
    layer it comes from."""
    selecting = None

    def wrap(layer, h, ops):
        def noting(operation):
            def select(*arguments):
                nonlocal selecting
                selecting = SelectArguments(*arguments[:len(SelectArguments._fields)])
                return operation(*arguments)
            return select

        def sparse_attention(*arguments):
            with exact(h):
                record(layer, selecting, AttentionArguments(*arguments))
            return ops.sparse_attention(*arguments)

        return ops._replace(
            select=noting(ops.select), select_by_blocks=noting(ops.select_by_blocks),
            select_as=noting(ops.select_as), sparse_attention=sparse_attention)

    return watched(model, wrap)


def selected(x, chosen, empty):
    """x (B,R,T) at the tokens chosen (B,R,k), `empty` in an empty slot -> (B,R,k)"""
    return x.gather(-1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, empty)


def entropy(p):
    """p (..., n) -> (...) nats"""
    return torch.special.entr(p).sum(-1)


def distances(p, chosen, back, edges):
    """Shares of each bucket of back (B,R,T), how many tokens back a key lies, in the selection chosen (B,R,k)
    and in the mass p (B,R,T) -> (B,R,2,buckets)"""
    used = (chosen >= 0).float()  # (B, R, k)
    of_selection = by_bucket(used / used.sum(-1, keepdim=True), selected(back, chosen, 1), edges)
    of_mass = by_bucket(p, back, edges)  # (B, R, buckets)
    return torch.stack((of_selection, of_mass), -2)


def neighbours(indices, rows, alike, topk):
    """How much the selections indices (B,S,k) of the queries rows (R,) share with those before them ->
    (B,R,2), NaN where not alike (B,R)."""
    before = torch.arange(max(NEIGHBOURS.values()), device=rows.device)  # (8,)
    near = indices[:, (rows[:, None] - before).clamp(min=0)]  # (B, R, 8, k)
    unions = []
    for n in NEIGHBOURS.values():
        tokens = near[:, :, :n].flatten(2).sort(-1).values  # (B, R, n k)
        unions.append((tokens.diff(dim=-1) > 0).sum(-1) + 1)  # (B, R)
    of_two, of_eight = unions
    shares = torch.stack((2 - of_two / topk, of_eight / topk), -1)  # (B, R, 2)
    return shares.masked_fill(~alike[..., None], float("nan"))


def layer_statistics(selecting, attending, rows, edges):
    """What `watching` saw of a layer, at the queries rows (R,) int64 -> Statistics, distances by the buckets
    of edges. A tensor holds near indexer.SLICE elements."""
    R = len(rows)
    B, T, _ = attending.latents.shape
    topk = selecting.topk
    q = attending.q[:, rows]  # (B, R, H, D)
    indices = attending.indices[:, rows]  # (B, R, k)
    q_index = selecting.q[:, rows]  # (B, R, HI, DI)
    k_index = selecting.k
    w = selecting.w[:, rows]  # (B, R, HI)
    last = rows.expand(B, -1)  # (B, R)
    first = torch.zeros_like(last) if selecting.first is None else selecting.first[:, rows]
    # the farthest of the 8 sees more than k tokens of the query's document, so they all do
    alike = rows - (max(NEIGHBOURS.values()) - 1) - first >= topk  # (B, R)

    def measure(part):
        seen = indexer.visible(R, T, first, last, part, rows.device)  # (B, part, T)
        p = attention_mass(q[:, part], attending.latents, attending.scale, seen)  # (B, part, T)
        scores = indexer.index_scores(q_index, k_index, w, selecting.k_scale, first, last, part)
        back = last[:, part, None] - torch.arange(T, device=rows.device) + 1  # (B, part, T)
        chosen = indices[:, part]  # (B, part, k)
        recall = (
            selected(p, chosen, 0).sum(-1),
            p.masked_fill(back > topk, 0).sum(-1),
            p.topk(min(topk, T)).values.sum(-1))
        entropies = (
            entropy(scores.softmax(-1)),
            entropy(selected(scores, chosen, float("-inf")).softmax(-1)),
            entropy(p))
        return (
            torch.stack(recall, -1),
            torch.stack(entropies, -1),
            distances(p, chosen, back, edges),
            neighbours(attending.indices, rows[part], alike[:, part], topk))

    elements_per_row = B * T * max(q.shape[2], q_index.shape[2])
    return Statistics(*indexer.over_rows(measure, R, elements_per_row))


# ---- validation text ----

class TextMeasures(NamedTuple):
    """Of N validation tokens, and of M sampled queries that see more than k. All on the CPU."""
    nats: dict  # of ATTENTIONS: (N,) float32
    sight: Tensor  # (N,) tokens that the token sees, itself included
    row_sight: Tensor  # (M,) the same of the queries
    layers: list  # of Statistics, with (M, ...) instead of (B, R, ...)


def predict(model, x, y, first, attention, dtype):
    """Read x (B,S) and predict y (B,n), the tokens after its last n -> nats (B,n) float32, is it the most
    likely token (B,n) bool. first (B,S) or None; dtype: "bfloat16" or "float32"."""
    n = y.shape[1]
    kept = []

    def keep(module, args, out):
        kept.append(out[:, -n:])

    def compare(part):
        logits = F.linear(kept[0][:, part], weight).float()  # (B, part, vocab)
        nats = F.cross_entropy(logits.transpose(1, 2), y[:, part], reduction="none")  # (B, part)
        return nats, logits.argmax(-1) == y[:, part]

    with torch.autocast(x.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        before = model.attention
        model.attention = attention
        with model.model["norm"].register_forward_hook(keep):
            model(x, first=first, logits_of=None)
        model.attention = before
        weight = parallel.whole_tensor(model.lm_head.weight)  # (vocab, hidden)
        return indexer.over_rows(compare, n, x.shape[0] * model.config.vocab_size)


def sample_rows(sight, topk, count, generator):
    """Up to count queries that see more than topk tokens in some sequence, at least one query; sight (B,S) ->
    (R,) int64"""
    useful = (sight > topk).any(0)  # (S,)
    if not useful.any():
        useful[-1] = True
    rows = useful.nonzero()[:, 0]  # (queries,)
    drawn = torch.randperm(len(rows), generator=generator)[:count]
    return rows[drawn.to(rows.device)]


def measure_batch(model, batch, rows, options):
    """Dense and sparse attention on a batch x, y, first (B,S), at the queries rows (R,) -> TextMeasures."""
    topk = model.config.index_topk
    edges = bucket_bounds(options.block_size)
    x, y, first = [tensor.to(rows.device) for tensor in batch]
    sight = tokens_in_sight(first)  # (B, S)
    chooses = sight[:, rows] > topk  # (B, R)
    layers = [[] for _ in model.model.layers]

    def record(layer, selecting, attending):
        statistics = layer_statistics(selecting, attending, rows, edges)
        layers[layer] = Statistics(*[measure[chooses].cpu() for measure in statistics])

    nats = dict(dense=predict(model, x, y, first, "dense", options.dtype)[0].flatten().cpu())
    with watching(model, record):
        nats["sparse"] = predict(model, x, y, first, "sparse", options.dtype)[0].flatten().cpu()
    return TextMeasures(nats, sight.flatten().cpu(), sight[:, rows][chooses].cpu(), layers)


def tokens_in_sight(first):
    """first (B,S), where the document of each token begins -> (B,S), itself included"""
    return torch.arange(1, first.shape[1] + 1, device=first.device) - first


def measure_text(model, batches, options, ranks):
    """Dense and sparse attention on the validation batches, which the ranks share -> TextMeasures."""
    generator = torch.Generator().manual_seed(options.seed)
    rows = []  # of each batch (R,)
    for number in range(options.batches):
        sight = tokens_in_sight(batches.batch(number)[2])  # (B, S)
        rows.append(sample_rows(sight, model.config.index_topk, options.rows, generator).to(ranks.device))

    measured = {}
    for number, counts in tqdm(ranks.turns(options.batches), desc="validation text", disable=None,
                               dynamic_ncols=True):
        measures = measure_batch(model, batches.batch(number), rows[number], options)
        if counts:
            measured[number] = measures
    return joined([measures for _, measures in sorted(all_of(measured, ranks).items())])


def all_of(measured, ranks):
    """What each rank measured, by number -> that of all."""
    return functools.reduce(dict.__or__, ranks.gathered(measured))


def joined(parts):
    """TextMeasures of several batches -> of all."""
    layers = []
    for of_layer in zip(*[part.layers for part in parts]):
        layers.append(Statistics(*map(torch.cat, zip(*of_layer))))
    return TextMeasures(
        nats={attention: torch.cat([part.nats[attention] for part in parts]) for attention in ATTENTIONS},
        sight=torch.cat([part.sight for part in parts]),
        row_sight=torch.cat([part.row_sight for part in parts]),
        layers=layers)


def summarise(measures):
    """TextMeasures -> tables, each a dict of columns: loss, recall, layers, distances (mean over layers, then
    layer by layer)."""
    losses = measures.nats | {"sparse - dense": measures.nats["sparse"] - measures.nats["dense"]}
    recall = torch.stack([layer.recall for layer in measures.layers]).mean(0)  # (M, 3)
    recall_by_name = {name: recall[:, i] for i, name in enumerate(BASELINES)}
    return {
        "loss": bucketed("in sight", measures.sight, losses),
        "recall": bucketed("in sight", measures.row_sight, recall_by_name),
        "layers": layer_table(measures.layers),
        "distances": distance_table(measures.layers)}


def layer_means(layers, field):
    """Of one field of the Statistics, the mean over queries -> (layers, ...) float64"""
    return torch.stack([getattr(layer, field).double().nanmean(0) for layer in layers])


def layer_table(layers):
    """Columns over the layers and, last, their mean."""

    def column(x):
        return [*x.tolist(), x.mean().item()]

    recall = layer_means(layers, "recall")  # (L, 3)
    entropies = layer_means(layers, "entropy")  # (L, 3)
    shares = layer_means(layers, "neighbours")  # (L, 2)
    columns = {"layer": [*range(len(layers)), "all"]}
    for i, name in enumerate(BASELINES):
        columns[name] = column(recall[:, i])
    columns["of oracle"] = column(recall[:, 0] / recall[:, 2])
    for i, name in enumerate(ENTROPIES):
        columns[f"H({name})"] = column(entropies[:, i])
    if shares.isfinite().all():
        for i, name in enumerate(NEIGHBOURS):
            columns[name] = column(shares[:, i])
    return columns


def distance_table(layers):
    """Columns over the buckets of distances: the mean over layers, then layer by layer."""
    shares = layer_means(layers, "distance")  # (L, 2, buckets)
    columns = {"back": (2 ** torch.arange(shares.shape[2])).tolist()}
    for i, name in enumerate(DISTANCES):
        columns[name] = shares[:, i].mean(0).tolist()
    for layer, of_layer in enumerate(shares):
        for name, share in zip(DISTANCES, of_layer):
            columns[f"{name}, layer {layer}"] = share.tolist()
    return columns


# ---- copying ----

def copy_task(tokens, eot, T, count, seed):
    """-> length of the strings, size of their alphabet, {distance: samples (count, T + 1) int64}, the same
    texts and strings at every distance.

    A sample: text from `tokens` without its EOTs, hence one document; its last `length` tokens are a string,
    which begins once more `distance` tokens before. Strings: uniform over the alphabet, the tokens that make
    up at least 1/10000 of the text."""
    random = np.random.RandomState(seed % 2**32)
    length = min(32, T // 4)
    alphabet = data.frequent(tokens, eot)

    # texts that end in their string
    texts = []
    for start in random.randint(max(1, len(tokens) - 2 * T), size=count):
        piece = np.asarray(tokens[start:start + 2 * T + 2])
        texts.append(np.resize(piece[piece != eot], T + 1))
    text = np.stack(texts).astype(np.int64)  # (count, T + 1)
    strings = random.choice(alphabet, (count, length))
    text[:, -length:] = strings

    # the same with the string once before
    farthest = T + 1 - length
    powers = [distance for distance in bucket_bounds(T).tolist() if length <= distance <= farthest]
    samples = {}
    for distance in sorted({*powers, farthest}):
        begin = farthest - distance
        samples[distance] = torch.from_numpy(text.copy())
        samples[distance][:, begin:begin + length] = torch.from_numpy(strings)
    return length, len(alphabet), samples


def measure_copies(model, samples, length, options, ranks):
    """-> {"dense", "sparse"}: accuracy over the second halves of the strings, a list over the distances of
    samples, which the ranks share."""
    measured = {}
    half = length // 2
    samples = list(samples.values())
    for number, counts in tqdm(ranks.turns(len(samples)), desc="copying", disable=None, dynamic_ncols=True):
        accuracy = {}
        for attention in ATTENTIONS:
            right = []
            for part in samples[number].to(ranks.device).split(options.batch_size):
                right.append(predict(model, part[:, :-1], part[:, -half:], None, attention, options.dtype)[1])
            accuracy[attention] = torch.cat(right).float().mean().item()
        if counts:
            measured[number] = accuracy
    measured = all_of(measured, ranks)
    accuracies = [measured[number] for number in range(len(samples))]
    return {attention: [accuracy[attention] for accuracy in accuracies] for attention in ATTENTIONS}


# ---- loss against k ----

def swept_selectors(names, own):
    """Of --sweep: "all", or names with commas between -> list of config.SELECTORS, the checkpoint's `own`
    first. ValueError: another name."""
    names = list(SELECTORS) if names == "all" else list(filter(None, names.split(",")))
    for name in names:
        if name not in SELECTORS:
            raise ValueError(f"--sweep={name}: write all, or some of {', '.join(SELECTORS)} with commas "
                             "between")
    return list(dict.fromkeys([own, *names]))


@contextmanager
def selecting_by(model, selector, topk):
    """A context in which the model selects topk tokens by one of config.SELECTORS."""
    config = model.config
    before = dict(selector=config.selector, index_topk=config.index_topk)
    config.selector = selector
    config.index_topk = topk
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def measure_sweep(model, batches, options, ranks):
    """-> columns over k, powers of two below the context: validation loss, nats per token, by each selector
    and with dense attention, of the batches that the ranks share."""
    names = swept_selectors(options.sweep, model.config.selector)
    T = options.block_size
    sizes = [k for k in bucket_bounds(T).tolist() if min(64, T / 16) <= k < T]
    measured = {}
    for number, counts in tqdm(ranks.turns(options.batches), desc="loss against k", disable=None,
                               dynamic_ncols=True):
        x, y, first = [tensor.to(ranks.device) for tensor in batches.batch(number)]  # (B, S) each
        dense = predict(model, x, y, first, "dense", options.dtype)[0].mean().item()
        losses = dict.fromkeys(names, ())
        for name in names:
            for k in sizes:
                with selecting_by(model, name, k):
                    nats, _ = predict(model, x, y, first, "sparse", options.dtype)
                losses[name] += (nats.mean().item(),)
        if counts:
            measured[number] = losses | dict(dense=[dense] * len(sizes))

    measured = [losses for _, losses in sorted(all_of(measured, ranks).items())]
    columns = {"k": sizes}
    for name in (*names, "dense"):
        columns[name] = np.mean([losses[name] for losses in measured], 0).tolist()
    return columns


# ---- tables and plots ----

STYLES = ("o-", "s--", "^:", "v-.", "D-", "x--", "k:")  # of as many curves as a sweep can have


def cell(value):
    """A value of a table as text."""
    if isinstance(value, float):
        return f"{value:.4f}"
    return f"{value:,}" if isinstance(value, int) else value


def table(title, columns):
    """{name: values} as lines of text, right-aligned under their names."""
    cells = [[name, *map(cell, values)] for name, values in columns.items()]
    widths = [max(map(len, column)) for column in cells]
    lines = [title]
    for row in zip(*cells):
        lines.append("  " + "  ".join(text.rjust(width) for text, width in zip(row, widths)))
    return "\n".join([*lines, ""])


def plot(columns, names, path, ylabel, xlabel, k=None, top=None):
    """Columns over the first one, to a PNG; k: draw the line below which everything is selected, on a
    logarithmic axis. top: where the axis ends; the legend says which columns lie above."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, axis = plt.subplots(figsize=(7, 4))
    x = [value for value in next(iter(columns.values())) if value != "all"]
    for name, style in zip(names, STYLES):
        values = columns[name][:len(x)]
        above = top is not None and min(values) > top
        axis.plot(x, values, style, label=f"{name}: above {top:.2f}" if above else name, markersize=4)
    if k:
        axis.set_xscale("log", base=2)
        axis.axvline(k, color="gray", linewidth=0.8, label=f"k = {k}")
    axis.set_xticks(x, x, fontsize=8)
    axis.set(xlabel=xlabel, ylabel=ylabel)
    if "loss" not in ylabel:
        axis.set_ylim(0, 1.05 * axis.dataLim.ymax or 1)  # all may be 0
    if top is not None:
        least = axis.dataLim.ymin
        axis.set_ylim(least - 0.1 * (top - least), top)
    axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    plt.close(figure)


def write(results, k, out):
    """evaluation.json and the plots, complete in a folder of their own before the first one appears in
    `out`."""
    out = out.resolve()  # "." has no name
    part = out.with_name(out.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "evaluation.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results["loss"], ATTENTIONS, part / "loss.png",
         "validation loss (nats per token)", "tokens in sight", k)
    plot(results["layers"], BASELINES, part / "recall.png",
         "share of the dense attention mass", "layer")
    plot(results["copy"], ATTENTIONS, part / "copy.png",
         "tokens copied right", "distance (tokens)", k)
    plot(results["distances"], DISTANCES, part / "distances.png",
         "share", "tokens back, 1 is the query itself", k)
    if "sweep" in results:
        names = list(results["sweep"])[1:]  # the model's own selector first
        own = max(results["sweep"][names[0]])
        dense = max(results["sweep"]["dense"])
        plot(results["sweep"], names, part / "sweep.png", "validation loss (nats per token)",
             "tokens that a query reads", k, top=dense + 1.5 * abs(own - dense))
    out.mkdir(exist_ok=True)
    for file in part.iterdir():
        os.replace(file, out / file.name)
    part.rmdir()


def print_tables(results, k, out_dir):
    """What was measured, as text."""
    task = results["copy_task"]
    titles = {
        "loss": "validation loss (nats per token) by tokens in sight",
        "recall": f"share of the dense attention mass, queries with more than {k} tokens in sight, mean over "
                  "layers",
        "layers": "the same by layer; entropies (nats) of the indexer, of its selection, and of the "
                  "attention; overlap of neighbouring selections",
        "distances": "how many tokens back: shares of the selection and of the attention mass",
        "copy": f"copying the second half of a random string of {task['length']} tokens "
                f"(chance {task['chance']:.3f}) by distance"}
    pictures = "loss.png, recall.png, copy.png, distances.png"
    if "sweep" in results:
        titles["sweep"] = "validation loss (nats per token) of these weights, reading k tokens selected by"
        pictures += ", sweep.png"
    for name, title in titles.items():
        columns = results[name]
        if name == "distances":
            columns = {column: columns[column] for column in ("back", *DISTANCES)}  # not layer by layer
        print(table(title, columns))
    print(f"evaluation.json, {pictures}: {out_dir}")


# ---- the run ----

def validation_batches(options, config):
    """-> the validation TokenFile of --data, and its Batches. ValueError: a tokenizer that is not the
    checkpoint's, or text in which nothing is chosen."""
    validation = data.prepare(options.data, options.tokenizer)[1]
    vocab_size = validation.header["vocab_size"]
    if vocab_size > config.vocab_size:
        raise ValueError(f"--tokenizer={options.tokenizer} has {vocab_size} tokens, the checkpoint only "
                         f"{config.vocab_size}; use the tokenizer it was trained with")
    k = config.index_topk
    eot = validation.header["eot"]
    batches = data.Batches(validation.tokens, options.block_size, options.batch_size, eot, 0)
    position = torch.arange(options.block_size)
    if not any((position - batches.batch(number)[2] >= k).any() for number in range(options.batches)):
        raise ValueError(f"--data={options.data}: no document goes beyond index_topk={k} tokens in "
                         f"{options.batches} batches, so nothing is chosen; take longer texts or more "
                         "--batches")
    return validation, batches


@torch.no_grad()
def main():
    """Measure, print, and write everything at the end."""
    options, config = resolve(sys.argv[1:])
    k = config.index_topk
    device = parallel.device(options.device)
    ranks = parallel.start(device, 1, vars(options))
    options.dtype = options.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    backend = cli.backend(options.backend, device)
    prepared = ranks.on_rank_0(validation_batches, options, config)
    validation, batches = prepared or validation_batches(options, config)  # the others find the text prepared
    prepare = functools.partial(parallel.shard, ranks=ranks) if options.shard else None
    dtype = torch.float32 if options.dtype == "float32" else None  # None: as stored, under autocast
    model = Transformer.from_pretrained(
        options.checkpoint, backend, "sparse", options.index_fp8, device=device, dtype=dtype, prepare=prepare)
    results = dict(options=vars(options), index_topk=k, selector=config.selector, commit=cli.commit(),
                   **report.machine(device))
    print(f"{options.checkpoint}: {config.num_hidden_layers} layers, top-k {k}, selector {config.selector}, "
          f"context {options.block_size} | {options.data}, {options.batches} x {options.batch_size} "
          f"sequences, {options.rows} queries of each | {results['device']}, {options.dtype}, commit "
          f"{results['commit']}\n")

    measures = measure_text(model, batches, options, ranks)
    if not all(nats.isfinite().all() for nats in measures.nats.values()):
        raise ValueError(f"--checkpoint={options.checkpoint}: losses are not finite; the weights are "
                         f"damaged, or overflow in {options.dtype}")
    results |= summarise(measures)
    length, alphabet, samples = copy_task(
        validation.tokens, validation.header["eot"], options.block_size, options.copies, options.seed)
    results["copy"] = dict(distance=list(samples)) | measure_copies(model, samples, length, options, ranks)
    results["copy_task"] = dict(
        length=length,
        cue=length - length // 2,
        strings=options.copies,
        alphabet=alphabet,
        chance=1 / alphabet)
    if options.sweep:
        results["sweep"] = measure_sweep(model, batches, options, ranks)

    ranks.on_rank_0(write, results, k, Path(options.out_dir))
    print_tables(results, k, options.out_dir)
    return 0


if __name__ == "__main__":
    cli.run(main)
