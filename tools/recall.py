"""How much of exact selection do two levels find (docs/LONG.md)? By layer, context, candidates and distance.

    python -m tools.recall --checkpoint=out/sparse
    python -m tools.recall --checkpoint=out/sparse --lengths=16384,131072 --candidates=2048,4096 --data=FILE

One forward with exact selection for each context; in it, at sampled queries of the last quarter, each layer
selects in two levels as well, from the same scores. A context is the beginning of the validation text taken
as one document, so that all of it is in sight. For each context and number of candidates:
  share    of the tokens that exact selection takes, how many two levels take
  mass     of the attention that lies on exact selection, how much lies on theirs
  by distance    share, of exact selection's tokens so far back (buckets named by their upper bounds)
"""
import json
import sys

import torch
from tqdm import tqdm

import data
import indexer
from evaluate import bucket_bounds, selected, watching
from model import Transformer, operations
from sparse_attn import attention_mass
from support import cli, files, tokenizer


def new_parser(description, lengths):
    """-> a parser of what `load` and `contexts` read. lengths: the default of --lengths."""
    parser = cli.Parser(description)
    add = parser.add_argument
    add("--checkpoint", default="out/sparse",
        help="folder with config.json and weights (default %(default)s)")
    add("--data", help="where the text comes from (default: that of the run, else python)")
    add("--lengths", default=lengths, help="contexts in tokens (default %(default)s)")
    add("--rows", type=int, default=64, help="queries that are sampled (default %(default)s)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    add("--backend", choices=["auto", "torch", "triton"], default="auto")
    return parser


def parse(argv):
    """-> the command line."""
    parser = new_parser(__doc__, "16384,65536,131072")
    add = parser.add_argument
    add("--candidates", default="0", help="tokens in the best blocks; 0: max(8 k, T / 32), the default")
    add("--block", type=int, default=16, help="tokens of a block (default %(default)s)")
    options = parser.parse_args(argv)
    cli.check_ranges(options, ("block", 1, 64), ("rows", 1, 2**20))
    return options


def numbers(options, name):
    """An option of comma-separated numbers -> list of int. ValueError: anything else."""
    text = getattr(options, name)
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ValueError(f"--{name}={text}: numbers with commas between, such as 4096,8192") from None


def load(options):
    """-> the model of --checkpoint, selecting among all tokens, the validation tokens of its run or of
    --data, the checkpoint's folder, the device."""
    device = cli.device(options.device)
    folder = files.locate(options.checkpoint)
    run = files.run_options(folder.parent, data=str)
    name = tokenizer.tokenizer_name(folder)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    model = Transformer.from_pretrained(
        options.checkpoint, cli.backend(options.backend, device), "sparse", device=device, dtype=dtype)
    model.config.index_block = 0
    _, validation = data.prepare(options.data or run.get("data", "python"), name)
    return model, validation.tokens, folder, device


def contexts(tokens, lengths, options, device):
    """Yield for each length T the beginning of the text, ids (1,T), and options.rows queries of its last
    quarter, (R,). ValueError: the text is too short."""
    if max(lengths) > len(tokens):
        raise ValueError(f"--lengths={options.lengths}: the validation text has {len(tokens):,} tokens; take "
                         "more text (--data) or less length")
    for T in lengths:
        ids = torch.from_numpy(tokens[:T].astype("int64"))[None].to(device)  # (1, T)
        yield T, ids, torch.linspace(T * 3 // 4, T - 1, min(options.rows, T), device=device).long()


@torch.no_grad()
def measure(model, ids, candidates, block, rows):
    """What two levels find of a document ids (1,T) at the queries rows (R,), for each number of candidates ->
    per number and layer (share (R,), mass (R,), share by distance (R,buckets), NaN where exact selection
    takes none)."""
    T = ids.shape[1]
    edges = bucket_bounds(T).to(ids.device)
    found = [[] for _ in candidates]

    def record(layer, selecting, attending):
        exact = attending.indices[:, rows]  # (1, R, k)
        last = rows[None].int()  # (1, R)
        first = torch.zeros_like(last)
        q = attending.q[:, rows]  # (1, R, H, D)
        seen = indexer.visible(len(rows), T, first, last, slice(None), rows.device)  # (1, R, T)
        p = attention_mass(q, attending.latents, attending.scale, seen)  # (1, R, T)
        mass = selected(p, exact, 0).sum(-1)  # (1, R)
        back = (last[..., None] - exact + 1).clamp(min=1)  # (1, R, k)
        bucket = torch.bucketize(back, edges)[0]  # (R, k)
        for C, of_layers in zip(candidates, found):
            chosen = ops.select_by_blocks(
                selecting.q[:, rows], selecting.k, selecting.w[:, rows], selecting.topk, selecting.k_scale,
                first, last, block=block, candidates=C)
            taken = selected(indexer.membership(chosen, T), exact, False)[0]  # (R, k) bool
            there = exact[0] >= 0  # (R, k)
            by_distance = []
            for b in range(len(edges)):
                here = there & (bucket == b)
                by_distance.append((taken & here).sum(-1) / here.sum(-1))  # 0 / 0: NaN
            share = taken.sum(-1) / there.sum(-1)  # (R,)
            of_mass = (selected(p, chosen, 0).sum(-1) / mass)[0]  # (R,)
            of_layers.append((share.cpu(), of_mass.cpu(), torch.stack(by_distance, -1).cpu()))

    ops = operations(model.backend_on(ids.device))
    model.attention = "sparse"
    with watching(model, record):
        model(ids, logits_of=None)
    return found


def table(T, candidates, found):
    """Print and return one context's results: a list of dicts."""
    records = []
    edges = bucket_bounds(T)
    for C, of_layers in zip(candidates, found):
        # (L, R), (L, R), (L, R, buckets)
        share, mass, by_distance = [torch.stack(x) for x in zip(*of_layers)]
        distances = by_distance.flatten(0, 1).nanmean(0)  # (buckets,)
        record = dict(
            T=T, candidates=C, share=share.mean().item(), mass=mass.mean().item(),
            share_by_layer=share.mean(1).tolist(), mass_by_layer=mass.mean(1).tolist(),
            share_by_distance={
                int(edge): x.item() for edge, x in zip(edges, distances) if x.isfinite()})
        records.append(record)
        layers = " ".join(f"{x:.3f}" for x in record["share_by_layer"])
        far = " ".join(f"{edge}: {x:.2f}" for edge, x in record["share_by_distance"].items())
        print(f"T {T:>8,}  candidates {C:>6,}  share {record['share']:.3f} (layers {layers})  "
              f"mass {record['mass']:.3f}  by distance {far}", flush=True)
    return records


def keep(records, folder, name):
    """Write what was found of the checkpoint in `folder` to a file beside it."""
    path = folder.parent / f"{name}-{folder.name}.json"
    path.write_text(json.dumps(records, indent=2) + "\n")
    print(f"wrote {path}")


def main():
    """Measure and tabulate each context; the results are kept beside the checkpoint."""
    options = parse(sys.argv[1:])
    lengths = numbers(options, "lengths")
    asked = numbers(options, "candidates")
    model, tokens, folder, device = load(options)
    records = []
    for T, ids, rows in tqdm(contexts(tokens, lengths, options, device), total=len(lengths), disable=None):
        candidates = [C or indexer.default_candidates(model.config.index_topk, T) for C in asked]
        records += table(T, candidates, measure(model, ids, candidates, options.block, rows))
    keep(records, folder, "recall")
    return 0


if __name__ == "__main__":
    cli.run(main)
