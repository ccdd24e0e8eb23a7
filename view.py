"""A picture of what each token looks at: one HTML file that opens from disk, without server or network.

    python view.py --text=FILE                                  # with out/sparse
    python view.py --checkpoint=DIR --text=FILE --max_tokens=1024 --out=view.html

The model reads the text once, by the reference in PyTorch. The page shows the text; choose a token, and it
shows by layer the tokens that this query selected, coloured by attention, the indexer's scores beside it,
what dense attention would have read and the selection missed, and how far back all that lies.

Queries come in slices, so memory is bounded, and what is kept of a query is its k selected tokens and the few
largest missed ones, with probabilities in 16 steps an octave: 4096 tokens are a few MB. The page itself is
support/view.html.
"""
import base64
import html
import json
import math
import os
import re
import sys
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from evaluate import watching
from indexer import index_scores, over_rows, visible
from model import Transformer
from sparse_attn import masked_softmax
from support import checkpoint, cli, files, tokenizer

TEMPLATE = Path(__file__).parent / "support" / "view.html"
STEPS = 16  # of a probability's code, per octave: the code is off by 2.2% at most
HEADS_LIMIT = 2**25  # probabilities up to which the page holds those of each head, too
PAGE_LIMIT = 2**28  # bytes of a page before compression, beyond which browsers give up


# ---- options ----

def parse(argv):
    """-> the parsed command line. ValueError, FileNotFoundError: one line naming value and fix."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("--checkpoint", default="out/sparse", help="folder with config.json and weights, ours or a published "
        "one (default %(default)s)")
    add("--text", help="file with the text to read")
    add("--out", help="the page (default: view-NAME.html beside the checkpoint, for a text NAME.txt)")
    add("--title", help="heading of the page (default: the name of the text's file)")
    add("--max_tokens", type=int, default=4096, help="tokens from the text's beginning (default %(default)s)")
    add("--layers", default="all", help="all, or numbers such as 0,5,11 (default %(default)s)")
    add("--heads", choices=["auto", "all", "mean"], default="auto", help="attention of each head, or their "
        "mean alone; auto: each, unless the page becomes large (default %(default)s)")
    add("--missed", type=int, default=16, help="largest unselected tokens that are kept of a query (default "
        "%(default)s)")
    add("--index_fp8", type=cli.boolean, help="score quantised indexer keys and queries (default: as the "
        "run, else true)")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: bfloat16 on a GPU, else "
        "float32)")
    options = parser.parse_args(argv)
    if not options.text:
        raise ValueError("--text=FILE: name the text to read")
    # positions are stored in 16 bits
    cli.check_ranges(options, ("max_tokens", 2, 2**16), ("missed", 1, 2**16))
    folder = files.locate(options.checkpoint)
    options.title = options.title or Path(options.text).name
    options.out = options.out or str(folder.parent / f"view-{Path(options.text).stem}.html")
    run = files.run_options(folder.parent, index_fp8=bool, block_size=int)
    options.trained = run.get("block_size", math.inf)
    if options.index_fp8 is None:
        options.index_fp8 = run.get("index_fp8", True)
    place = Path(options.out).absolute()
    if place.is_dir() or not place.parent.is_dir() or not os.access(place.parent, os.W_OK):
        raise ValueError(f"--out={options.out}: cannot be written; name a file in a folder that exists")
    if os.path.realpath(options.out) == os.path.realpath(options.text):
        raise ValueError(f"--out={options.out}: is the text itself, which the page would replace; name "
                         "another file")
    return options


def chosen_layers(names, count):
    """"all" or numbers with commas between -> their list, ascending. ValueError: no number of a layer."""
    if names == "all":
        return list(range(count))
    try:
        layers = sorted({int(name) for name in names.split(",")})
    except ValueError:
        layers = [-1]
    if layers[0] < 0 or layers[-1] >= count:
        raise ValueError(f"--layers={names}: write all, or numbers from 0 to {count - 1} with commas between")
    return layers


def read_ids(options, tokens_of, config):
    """-> the ids that the page shows, how many the text has. ValueError: too few for a choice, too many for
    the model, or a tokenizer of another one."""
    ids = tokens_of.encode(files.read_text(options.text))
    shown = ids[:options.max_tokens]
    k = config.index_topk
    if len(shown) <= k:
        raise ValueError(f"--text={options.text}: {len(shown)} tokens are not more than index_topk={k}, so "
                         "all would be selected; take a longer text, or raise --max_tokens")
    if len(shown) > config.max_position_embeddings:
        raise ValueError(f"--max_tokens={options.max_tokens}: the model reads up to "
                         f"max_position_embeddings={config.max_position_embeddings}; lower it")
    if max(shown) >= config.vocab_size:
        raise ValueError(f"{options.checkpoint}: its tokenizer gives id {max(shown)}, the model has "
                         f"{config.vocab_size}; they belong to different models")
    return shown, len(ids)


def shows_heads(options, config, T, layers):
    """Does the page hold the attention of each head? ValueError: it would be too large for a browser."""
    heads = config.num_attention_heads
    slots = T * layers * (min(config.index_topk, T) + options.missed)
    by_head = options.heads == "all" or (options.heads == "auto" and slots * heads <= HEADS_LIMIT)
    size = slots * (4 + (heads if by_head else 0))
    if size > PAGE_LIMIT:
        raise ValueError(f"--layers={options.layers}, --heads={options.heads}: {layers} layers of {T} tokens "
                         f"are {size / 1e6:,.0f} MB, too large for a browser; name fewer --layers, use "
                         "--heads=mean, or lower --max_tokens")
    return by_head


# ---- what a layer reads ----

class Reads(NamedTuple):
    """Of a layer's T queries: their K selected tokens, and M of those that were missed. R: the mean over
    heads and, where the page shows them, each head. Probabilities as `codes`."""
    chosen: Tensor  # (1, T, K) int32 ascending positions, -1 in empty slots
    attention: Tensor  # (1, T, R, K) uint8, sparse attention
    index: Tensor  # (1, T, K) uint8, softmax of the index scores over the selection
    missed: Tensor  # (1, T, M) int32, the largest first by dense attention's head mean, -1 in empty slots
    missed_attention: Tensor  # (1, T, R, M) uint8, dense attention
    missed_index: Tensor  # (1, T, M) uint8, exp(score) beside the softmax of `index`
    missed_mass: Tensor  # (1, T, R) float32, dense attention's share of everything that was not selected


def codes(p):
    """Probabilities -> uint8: 255 is 1, each step below divides by 2^(1/16); 0 is all that is too small."""
    return (255 + STEPS * p.log2()).round().clamp(0, 255).to(torch.uint8)


def layer_reads(selecting, attending, missed, by_head, done):
    """What `evaluate.watching` saw of a layer -> Reads. done(n): n more queries are ready. ValueError: a
    probability or score that is not a number."""
    _, T, H, _ = attending.q.shape
    latents = attending.latents.float()  # (1, T, D)
    M = min(missed, T)

    def by_row(p):
        """p (1, rows, H, n) -> (1, rows, R, n)"""
        mean = p.mean(2, keepdim=True)
        return torch.cat((mean, p), 2) if by_head else mean

    def some(rows):
        chosen = attending.indices[:, rows]  # (1, rows, K)
        used = chosen >= 0
        slot = chosen.clamp(min=0).long()
        seen = visible(T, T, None, None, rows, chosen.device)  # (1, rows, T)

        # Attention over the selection, and over everything
        q = attending.q[:, rows].float()  # (1, rows, H, D)
        logits = torch.einsum("bshd,btd->bsht", q, latents) * attending.scale  # (1, rows, H, T)
        selected = logits.gather(-1, slot[:, :, None].expand(-1, -1, H, -1))  # (1, rows, H, K)
        sparse = masked_softmax(selected, used[:, :, None])[0]
        dense = masked_softmax(logits, seen[:, :, None])[0]  # (1, rows, H, T)

        # What only the latter reads; column T takes the empty slots
        unread = F.pad(seen, (0, 1)).scatter(-1, slot.masked_fill(~used, T), False)[..., :T]  # (1, rows, T)
        rest = by_row(dense.masked_fill(~unread[:, :, None], 0))  # (1, rows, R, T)
        missed_tokens = rest[:, :, 0].topk(M).indices  # (1, rows, M)
        missed_slot = missed_tokens[:, :, None].expand(-1, -1, rest.shape[2], -1)  # (1, rows, R, M)
        missed_attention = codes(rest.gather(-1, missed_slot))
        empty = missed_attention[:, :, 0] == 0  # (1, rows, M)

        # The indexer's view of both
        scores = index_scores(
            selecting.q, selecting.k, selecting.w, selecting.k_scale, rows=rows)  # (1, rows, T)
        if dense.isnan().any() or scores.isnan().any():
            raise ValueError("attention is not a number: the model's weights are damaged, or overflow in "
                             "this dtype")
        index, lse = masked_softmax(scores.gather(-1, slot), used)  # (1, rows, K), (1, rows)
        missed_index = torch.exp(scores.gather(-1, missed_tokens) - lse[..., None])  # (1, rows, M)

        done(chosen.shape[1])
        return Reads(
            chosen=chosen,
            attention=codes(by_row(sparse)),
            index=codes(index),
            missed=missed_tokens.masked_fill(empty, -1).int(),
            missed_attention=missed_attention.masked_fill(empty[:, :, None], 0),
            missed_index=codes(missed_index).masked_fill(empty, 0),
            missed_mass=rest.sum(-1))

    heads = max(H, selecting.q.shape[2])
    return Reads(*over_rows(some, T, 4 * T * heads))  # logits, dense, and rest twice


def read(model, ids, layers, missed, by_head):
    """What the queries of a text, a list of ids, read in each of these layers -> {layer: packed Reads}."""
    packed = {}
    idx = torch.tensor([ids], device=model.lm_head.weight.device)  # (1, T)
    with tqdm(total=len(layers) * len(ids), desc="reading", unit=" queries", disable=None,
              dynamic_ncols=True) as bar:

        def record(layer, selecting, attending):
            if layer in layers:
                packed[layer] = pack(layer_reads(selecting, attending, missed, by_head, bar.update))

        with watching(model, record):
            model(idx, logits_of=None)
    return packed


# ---- the page ----

def pack(reads):
    """Reads -> base64 of deflated arrays, in the order in which support/view.html unpacks them: uint16 gaps
    between selected positions, missed positions, missed mass in 1/65535; then the uint8 codes. Empty slots of
    the selection are left out: query t has min(t + 1, k)."""
    reads = Reads(*[field[0].cpu().numpy() for field in reads])
    used = reads.chosen >= 0  # (T, K)
    gaps = np.diff(reads.chosen, prepend=-1) - 1  # (T, K)
    arrays = [
        gaps[used].astype("<u2"),
        reads.missed.clip(0).astype("<u2"),
        (reads.missed_mass.clip(0, 1) * 65535).round().astype("<u2")]
    for attention in reads.attention.swapaxes(0, 1):  # (T, K), the mean first
        arrays.append(attention[used])
    arrays.append(reads.index[used])
    arrays.append(reads.missed_attention.swapaxes(0, 1))  # (R, T, M)
    arrays.append(reads.missed_index)
    return base64.b64encode(zlib.compress(b"".join(array.tobytes() for array in arrays))).decode()


def pieces(tokens_of, ids):
    """-> the text that each token adds, together the whole; "" while a character is incomplete: it stands at
    the token that completes it."""
    stream = tokens_of.stream()
    texts = [stream.add(token) for token in ids]
    texts[-1] += stream.rest()
    return texts


def harmless(values):
    """JSON for a script element of HTML: no text in it can end the element."""
    return json.dumps(values, separators=(",", ":")).replace("<", "\\u003c")


def page(facts, packed):
    """facts: what the page tells and shows beside the layers, see `main`; packed: {layer: packed Reads} ->
    the HTML."""
    layers = []
    for layer, text in packed.items():
        layers.append(f'<script type="text/plain" id="layer-{layer}">{text}</script>')
    parts = dict(title=html.escape(facts["title"]), facts=harmless(facts), layers="\n".join(layers))
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda place: parts[place[1]], template)


@torch.no_grad()
def main():
    """Read the text, write the page."""
    options = parse(sys.argv[1:])
    config = checkpoint.read_config(options.checkpoint)
    if not config.index_topk:
        raise ValueError(f"--checkpoint={options.checkpoint}: has no indexer (index_topk=0); train one: "
                         f"train.py --stage=warmup --init_from={options.checkpoint}")
    layers = chosen_layers(options.layers, config.num_hidden_layers)
    tokens_of = tokenizer.load_tokenizer(options.checkpoint)
    ids, available = read_ids(options, tokens_of, config)
    by_head = shows_heads(options, config, len(ids), len(layers))
    device = cli.device(options.device)
    if options.index_fp8:
        cli.check_e4m3(device, "--index_fp8=true", "--index_fp8=false")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    model = Transformer.from_pretrained(
        options.checkpoint, "torch", "sparse", options.index_fp8, device=device, dtype=dtype)

    packed = read(model, ids, layers, options.missed, by_head)
    facts = dict(
        title=options.title,
        checkpoint=options.checkpoint,
        tokens=pieces(tokens_of, ids),
        available=available,
        layers=layers,
        heads=config.num_attention_heads,
        byHead=by_head,
        k=config.index_topk,
        missed=min(options.missed, len(ids)),
        trained=options.trained if len(ids) > options.trained else None)
    text = page(facts, packed)
    files.replace_text(options.out, text)

    cut = "" if available == len(ids) else f" of {available:,} (--max_tokens)"
    print(f"{options.out}: {len(ids):,} tokens{cut}, {len(layers)} layers, {len(text) / 1e6:.1f} MB; open it "
          "in a browser")
    if facts["trained"]:
        print(f"[these are {len(ids):,} tokens, and the model was trained on contexts of {facts['trained']}]",
              file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
