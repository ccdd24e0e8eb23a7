"""Generate text from a checkpoint folder, streaming it as it comes.

    python sample.py --prompt="def main("                    # from out/sparse
    echo "def main(" | python sample.py - --temperature=0    # prompt from standard input
"""
import sys
import time
from pathlib import Path

import torch

from support import files
from support import tokenizer
from support import checkpoint
from support import cli
from generate import stream
from config import Config
from model import Transformer


def options(argv):
    """-> the parsed command line. ValueError: one line naming value and fix."""
    parser = cli.Parser(__doc__)
    parser.add_argument("stdin", nargs="?", choices=["-"], help="read the prompt from standard input")
    parser.add_argument("--checkpoint", default="out/sparse", help="folder with config.json and weights, ours or a published one (default %(default)s)")
    parser.add_argument("--prompt", help="text to continue (default: end of text, so that a document begins)")
    parser.add_argument("--prompt_file", help="file with the text to continue")
    parser.add_argument("--num_tokens", type=int, default=500, help="tokens to generate (default %(default)s)")
    parser.add_argument("--count", type=int, default=1, help="independent continuations (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0 takes the most likely token (default %(default)s)")
    parser.add_argument("--top_k", type=int, help="sample from the k most likely tokens")
    parser.add_argument("--top_p", type=float, help="sample from the most likely tokens of this total probability")
    parser.add_argument("--seed", type=int, default=1337)
    parser.add_argument("--attention", choices=["dense", "sparse"], help="default: sparse if the checkpoint has an indexer")
    parser.add_argument("--index_fp8", type=cli.boolean, default=True, help="score quantised indexer keys and queries (default true)")
    parser.add_argument("--cache", choices=["auto", "fp8"], default="auto", help="latent cache in the model's precision, or in the published FP8 layout")
    parser.add_argument("--chunk", type=int, default=1024, help="prompt tokens that enter the cache at once (default %(default)s)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: bfloat16 on a GPU, else float32)")
    parser.add_argument("--backend", choices=["auto", "torch", "triton"], default="auto", help="attention path (auto: triton on a CUDA GPU)")
    o = parser.parse_args(argv)
    if sum(x is not None for x in (o.stdin, o.prompt, o.prompt_file)) > 1:
        raise ValueError("give one of --prompt, --prompt_file and -, not several")
    for name, low in (("num_tokens", 1), ("count", 1), ("chunk", 1), ("temperature", 0), ("top_k", 1)):
        if getattr(o, name) is not None and not getattr(o, name) >= low:
            raise ValueError(f"--{name}={getattr(o, name)}: must be at least {low}")
    if o.top_p is not None and not 0 < o.top_p <= 1:
        raise ValueError(f"--top_p={o.top_p}: a probability above 0 and up to 1")
    return o


def main():
    """Load, stream to standard output, report speed on standard error."""
    o = options(sys.argv[1:])
    text = sys.stdin.read() if o.stdin else o.prompt or ""
    if o.prompt_file:
        if not Path(o.prompt_file).is_file():
            raise FileNotFoundError(f"--prompt_file={o.prompt_file}: no such file")
        try:
            text = Path(o.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"--prompt_file={o.prompt_file}: no UTF-8 text ({error.reason})") from None
    device = cli.device(o.device)
    dtype = getattr(torch, o.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    checkpoint.read_config(o.checkpoint)
    tokens_of = tokenizer.load_tokenizer(o.checkpoint)
    model = Transformer.from_pretrained(o.checkpoint, cli.backend(o.backend, device), o.attention, o.index_fp8, device=device, dtype=dtype)
    ids = tokens_of.encode(text) or [tokens_of.eot]
    if ids == [None]:
        raise ValueError(f"{o.checkpoint} names no end-of-text token to begin with; give a --prompt")
    if max(ids) >= model.config.vocab_size:
        raise ValueError(f"{o.checkpoint}: its tokenizer gives id {max(ids)}, the model has {model.config.vocab_size}; they belong to different models")
    prompt = torch.tensor([ids], device=device).expand(o.count, -1)
    generator = torch.Generator(device).manual_seed(o.seed)
    tokens = stream(model, prompt, o.num_tokens, o.temperature, o.top_k, o.top_p, generator, o.chunk, o.cache == "fp8")

    rows, times, pending = [], [], []
    began = time.perf_counter()
    for token in tokens:
        if not rows and o.count == 1:
            print(text, end="", flush=True)
        rows.append(token.tolist())
        times.append(time.perf_counter())
        pending.append(rows[-1][0])
        piece = tokens_of.decode(pending)
        if o.count == 1 and (not piece.endswith("\ufffd") or len(pending) > 4):  # a character may take several tokens
            print(piece, end="", flush=True)
            pending = []
    print(tokens_of.decode(pending) if o.count == 1 else "\n".join(f"{'-' * 20}\n{text}{tokens_of.decode(list(row))}" for row in zip(*rows)))
    decode = f"{o.count * (len(times) - 1) / (times[-1] - times[0]):.1f} tokens/s" if len(times) > 1 else "one token"
    print(f"[{model.attention} attention, top-k {model.config.index_topk}: prompt {len(ids)} tokens in {times[0] - began:.2f} s, then {decode}; "
          f"cache {model.cache_bytes_per_token:,} bytes per token over {model.config.num_hidden_layers} layers]", file=sys.stderr)
    trained = files.run_options(files.locate(o.checkpoint).parent).get("block_size")
    if trained and len(ids) + len(times) > trained:
        print(f"[these are {len(ids) + len(times)} tokens, and the model was trained on contexts of {trained}: beyond them it may talk nonsense]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
