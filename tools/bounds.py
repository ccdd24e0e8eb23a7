"""Could blocks be skipped without losing a token that exact selection takes (docs/LONG.md)? How many fall, by
an upper bound of their index scores, below the k-th highest score.

    python -m tools.bounds --checkpoint=out/sparse
    python -m tools.bounds --checkpoint=out/sparse --lengths=16384,131072 --blocks=16,64 --data=FILE

One forward with exact selection for each context, of which queries of the last quarter are sampled; a context
is the beginning of the validation text taken as one document. Bounds of a block's scores, of which each needs
more than the one before could know without visiting every token:
  box        from the smallest and the largest value of each dimension of its keys
  per head   from the smallest and the largest q.k of each indexer head, the tightest that treats heads apart
  perfect    its highest score itself: what no bound can exceed
The weights w of the heads have signs: a bound takes the high end of q.k where w is positive, the low end
where it is not. `positive` is the share of w that are.
"""
import sys

import torch
from tqdm import tqdm

from evaluate import watching
from support import cli
from tools.recall import contexts, keep, load, new_parser, numbers

BOUNDS = ("box", "per head", "perfect")
ROWS = 4  # queries whose products of all heads and tokens are held at a time


def parse(argv):
    """-> the command line."""
    parser = new_parser(__doc__, "16384")
    parser.add_argument("--blocks", default="16,64", help="tokens of a block (default %(default)s)")
    options = parser.parse_args(argv)
    cli.check_ranges(options, ("rows", 1, 2**20))
    return options


def upper(w, low, high):
    """The most that sum_j w_j relu(x_j) can be for low_j <= x_j <= high_j: w (R,HI), low, high (R,HI,N) ->
    (R,N)"""
    rising = torch.einsum("rh,rhn->rn", w.clamp(min=0), high.relu())
    return rising + torch.einsum("rh,rhn->rn", w.clamp(max=0), low.relu())


def bounds(q, k, w, block):
    """Upper bounds of the highest score in each complete block: q (R,HI,DI), k (T,DI), w (R,HI) float32 ->
    {name of BOUNDS: (R, T // block)}. Holds (R,HI,T)."""
    N = len(k) // block
    k = k[:N * block]
    keys = k.unflatten(0, (N, block))  # (N, block, DI)
    least = keys.amin(1)  # (N, DI)
    most = keys.amax(1)
    rising = q.relu()  # (R, HI, DI)
    falling = (-q).relu()
    box = upper(w, rising @ least.T - falling @ most.T, rising @ most.T - falling @ least.T)
    dots = (q @ k.T).unflatten(-1, (N, block))  # (R, HI, N, block)
    per_head = upper(w, dots.amin(-1), dots.amax(-1))
    scores = torch.einsum("rh,rhnb->rnb", w, dots.relu())  # (R, N, block)
    return dict(zip(BOUNDS, (box, per_head, scores.amax(-1))))


def skippable(q, k, w, last, topk, blocks):
    """Of queries q (R,HI,DI) that see the tokens up to last (R,) of k (T,DI): which share of the complete
    blocks that they see lies below their topk-th highest score by each bound -> {(block, bound): (R,)}."""
    scores = torch.einsum("rh,rht->rt", w, (q @ k.T).relu())  # (R, T)
    seen = torch.arange(len(k), device=k.device) <= last[:, None]  # (R, T)
    threshold = scores.masked_fill(~seen, float("-inf")).topk(topk).values[:, -1:]  # (R, 1)
    shares = {}
    for block in blocks:
        complete = torch.arange(1, len(k) // block + 1, device=k.device) * block - 1 <= last[:, None]
        for name, bound in bounds(q, k, w, block).items():
            below = complete & (bound < threshold)  # (R, N)
            shares[block, name] = below.sum(-1) / complete.sum(-1)
    return shares


@torch.no_grad()
def measure(model, ids, blocks, rows):
    """Of a document ids (1,T), at the queries rows (R,), each of which sees at least k tokens and a block of
    any size: per layer with an indexer the share of w that is positive, and {(block, bound): (R,) share of
    its blocks that could be skipped}."""
    found = []

    def record(layer, selecting, attending):
        if not model.config.has_indexer(layer):
            return
        k = selecting.k[0].float()  # (T, DI)
        if selecting.k_scale is not None:
            k = k * selecting.k_scale[0, :, None]
        parts = []
        for some in rows.split(ROWS):
            q = selecting.q[0, some].float()  # (ROWS, HI, DI)
            w = selecting.w[0, some].float()  # (ROWS, HI)
            parts.append(skippable(q, k, w, some, selecting.topk, blocks))
        shares = {key: torch.cat([part[key] for part in parts]).cpu() for key in parts[0]}
        positive = (selecting.w[0, rows] > 0).float().mean().item()
        found.append((positive, shares))

    model.attention = "sparse"
    with watching(model, record):
        model(ids, logits_of=None)
    return found


def table(T, found):
    """Print and return one context's results: a list of dicts, one for each size of a block."""
    positive = sum(share for share, _ in found) / len(found)
    records = []
    for block in dict.fromkeys(block for block, _ in found[0][1]):
        record = dict(T=T, block=block, positive=positive)
        for name in BOUNDS:
            layers = [shares[block, name].mean().item() for _, shares in found]
            record[name] = sum(layers) / len(layers)
            record[f"{name}, by layer"] = layers
        records.append(record)
        means = "  ".join(f"{name} {record[name]:.3f}" for name in BOUNDS)
        layers = " ".join(f"{x:.2f}" for x in record["perfect, by layer"])
        print(f"T {T:>8,}  positive {positive:.2f}  blocks of {block:>3}: skippable  {means}  (perfect by "
              f"layer {layers})", flush=True)
    return records


def main():
    """Measure and tabulate each context; the results are kept beside the checkpoint."""
    options = parse(sys.argv[1:])
    lengths = numbers(options, "lengths")
    blocks = numbers(options, "blocks")
    model, tokens, folder, device = load(options)
    topk = model.config.index_topk
    lowest = max(topk, *blocks) * 4 // 3 + 2
    if min(lengths) < lowest or min(blocks) < 1:
        raise ValueError(f"--lengths={options.lengths}, --blocks={options.blocks}: a query in the last "
                         f"quarter is to see k={topk} tokens and a block of 1 token or more; take lengths "
                         f"from {lowest} on")
    records = []
    for T, ids, rows in tqdm(contexts(tokens, lengths, options, device), total=len(lengths), disable=None):
        records += table(T, measure(model, ids, blocks, rows))
    keep(records, folder, "bounds")
    return 0


if __name__ == "__main__":
    cli.run(main)
