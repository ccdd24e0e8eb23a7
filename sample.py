"""Generate text from a checkpoint folder, streaming it as it comes.

    python sample.py --prompt="def main("                    # from out/sparse
    echo "def main(" | python sample.py - --temperature=0    # prompt from standard input
    torchrun --standalone --nproc-per-node=4 sample.py --prompt_file=FILE    # a prompt over four GPUs
    python sample.py --chat --checkpoint=out/post/mixed --domain=agent --think    # a task of post_train.py
    python sample.py --chat --checkpoint=out/post/mixed --prompt="add 47 85"      # a question of your own
"""
import math
import os
import sys
import time
from itertools import chain
from random import Random

import torch

import parallel
import tasks
from generate import LEAST_TOP_P, check, compile_ahead, paced, stream
from model import Transformer
from rollout import Turns
from support import chat, checkpoint, cli, files, tokenizer


def parse(argv):
    """-> the parsed command line. ValueError: one line naming value and fix."""
    parser = cli.Parser(__doc__)
    add = parser.add_argument
    add("stdin", nargs="?", choices=["-"], help="read the prompt from standard input")
    add("--checkpoint", default="out/sparse", help="folder with config.json and weights, ours or a published "
        "one (default %(default)s)")
    add("--prompt", help="text to continue (default: none, a document begins)")
    add("--prompt_file", help="file with the text to continue")
    add("--special", action="store_true", help="special tokens that the prompt spells, such as <|endoftext|>"
        ", count as these tokens (default: as text)")
    add("--chat", action="store_true", help="the prompt is a user's turn, for a checkpoint of post_train.py")
    add("--think", action="store_true", help="--chat: think first, with tools (default: answer directly)")
    add("--domain", choices=list(tasks.DOMAINS), help="--chat: ask a task of this domain, drawn "
        "by --seed; its tool answers calls, and its checker has the last word")
    add("--level", type=int, default=1, help="--domain: difficulty (default %(default)s)")
    add("--page", type=int, default=40, help="--domain=search: length of a page (default %(default)s)")
    add("--num_tokens", type=int, default=500, help="most tokens to generate (default %(default)s)")
    add("--ignore_eos", action="store_true", help="do not stop at an end of text: another text begins there")
    add("--count", type=int, default=1, help="independent continuations (default %(default)s)")
    add("--temperature", type=float, default=0.8, help="0 takes the most likely token (default %(default)s)")
    add("--top_k", type=int, help="sample from the k most likely tokens")
    add("--top_p", type=float, help="sample from the most likely tokens of this total probability")
    add("--seed", type=int, default=1337, help="of the random choices (default %(default)s)")
    add("--attention", choices=["dense", "sparse"], help="default: sparse if the checkpoint has an indexer")
    add("--index_fp8", type=cli.boolean, default=True, help="score quantised indexer keys and queries "
        "(default true)")
    add("--index_block", type=int, help="select in two levels, by blocks of so many tokens (default: as the "
        "checkpoint was trained; 0: among all tokens)")
    add("--index_candidates", type=int, help="with --index_block: tokens in the best blocks, which are "
        "scored (default: as the checkpoint was trained)")
    add("--cache", choices=["auto", "fp8"], default="auto", help="latent cache in the model's precision, or "
        "in the published FP8 layout")
    add("--chunk", type=int, help="prompt tokens that enter the cache at once (default: on a GPU what its "
        "memory allows, else 1024)")
    add("--compile", action="store_true",
        help="torch.compile the steps where they have no kernels of their own (on a GPU those of models with "
        "biases, or without a query latent): faster, and later to start")
    add("--device", default="auto", help="auto, cpu, cuda, cuda:1, mps")
    add("--dtype", choices=["float32", "bfloat16"], help="of the weights (default: bfloat16 on a GPU, else "
        "float32)")
    add("--backend", choices=["auto", "torch", "triton"], default="auto", help="attention path (auto: triton "
        "on a CUDA GPU)")
    add("--shard", action="store_true", help="under torchrun: spread the weights over the processes, for "
        "models that one GPU cannot hold; slower per token")
    options = parser.parse_args(argv)
    if options.stdin and parallel.world_size() > 1:
        raise ValueError("-: the processes of torchrun have no standard input; use --prompt_file")
    if sum(source is not None for source in (options.stdin, options.prompt, options.prompt_file)) > 1:
        raise ValueError("give one of --prompt, --prompt_file and -, not several")
    cli.check_ranges(
        options, ("num_tokens", 1, math.inf), ("count", 1, math.inf), ("temperature", 0, math.inf),
        ("seed", 0, 2**63 - 1), ("level", 1, 6), ("page", 4, 100000))
    if (options.think or options.domain) and not options.chat:
        raise ValueError("--think and --domain belong to --chat; add it")
    if options.chat and (options.count > 1 or options.special or options.ignore_eos):
        raise ValueError("--chat answers once; leave --count, --special and --ignore_eos out")
    if options.domain and (options.stdin or options.prompt or options.prompt_file):
        raise ValueError(f"--domain={options.domain} asks its own question; leave the prompt out")
    for name in ("top_k", "chunk"):
        if getattr(options, name) is not None:
            cli.check_ranges(options, (name, 1, math.inf))
    if options.top_p is not None:
        cli.check_ranges(options, ("top_p", LEAST_TOP_P, 1))
    return options


def prompt_text(options):
    """The text to continue, "" for none. FileNotFoundError, ValueError: a file that is not there or no
    UTF-8."""
    if options.stdin:
        if sys.stdin is None:
            raise ValueError("-: standard input is closed; use --prompt or --prompt_file")
        return files.text_of(sys.stdin.buffer.read(), "standard input")
    if options.prompt_file:
        return files.read_text(options.prompt_file)
    return files.text_of(os.fsencode(options.prompt or ""), "--prompt")


def prompt_ids(options, text, tokens_of, vocab_size):
    """-> list of token ids, at least one: without text the end of another one, behind which a document
    begins. ValueError: the tokenizer has none, or does not fit the model."""
    ids = tokens_of.encode(text, special=options.special)
    if not ids and tokens_of.eot is None:
        raise ValueError(f"{options.checkpoint} names no end-of-text token to begin with; give a --prompt")
    ids = ids or [tokens_of.eot]
    if max(ids) >= vocab_size:
        raise ValueError(f"{options.checkpoint}: its tokenizer gives id {max(ids)}, the model has "
                         f"{vocab_size}; they belong to different models")
    return ids


class Printer:
    """Collects the continuations, and prints a single one as it comes."""

    def __init__(self, text, tokens_of, ids, count, stops):
        self.text = text
        self.single = count == 1
        self.streams = [tokens_of.stream(ids) for _ in range(count)]
        self.pieces = [[] for _ in range(count)]
        self.silent = set(tokens_of.end_ids) if stops else set()  # where generation stops is not text
        self.tokens = 0

    def add(self, row):
        """The next token of each continuation, -1 where it has ended."""
        if self.single and not self.tokens:
            print(self.text, end="", flush=True)  # only now: what can be refused has been
        for stream_of, pieces, token in zip(self.streams, self.pieces, row):
            if token == -1:
                continue
            self.tokens += 1
            piece = "" if token in self.silent else stream_of.add(token)
            pieces.append(piece)
            if self.single:
                print(piece, end="", flush=True)

    def finish(self):
        """Print what is left."""
        for stream_of, pieces in zip(self.streams, self.pieces):
            rest = stream_of.rest()
            if self.single:
                print(rest)
            else:
                print(f"{'-' * 20}\n{self.text}{''.join(pieces)}{rest}")


class Chat(tasks.Task):
    """A question of the user's own: no tool answers, and nothing is checked."""

    def __init__(self, question, think, limit):
        self.question = question
        self.mode = "think" if think else "direct"
        self.limit = limit

    def tool(self, text):
        return "none"


def chat_task(options, text):
    """-> the task that --chat asks. ValueError: the domain does not have the mode, there is no question."""
    if options.domain:
        mode = "think" if options.think else "direct"
        return tasks.make(Random(options.seed), options.domain, mode, options.level, options.page)
    if not text:
        raise ValueError("--chat: ask something: --prompt=TEXT, or --domain=NAME for a task")
    return Chat(text, options.think, options.num_tokens)


def talk(options, model, tokens_of, task, prompt, compiling, ranks):
    """Answer a task, its prompt (1,tokens): the conversation to standard output as it comes, turns by their
    names, the checker's word to standard error."""
    names = {token: name for name, token in tasks.TURNS.items()}
    generator = torch.Generator(ranks.device).manual_seed(options.seed)
    turns = Turns([task], tokens_of.end_ids)
    text = tokens_of.stream()
    print(f"<|user|>{task.question}{names[int(prompt[0, -1])]}", end="", flush=True)
    rows = stream(
        model, prompt, task.limit, temperature=options.temperature, top_k=options.top_k, top_p=options.top_p,
        generator=generator, chunk=options.chunk, fp8_cache=options.cache == "fp8", end_ids=tokens_of.end_ids,
        compiled=options.compile, ranks=ranks, steer=turns)
    shown = 0
    for _ in paced(rows, compiling):
        out = turns.outs[0]  # also holds what the tool replies
        for token in out[shown:]:
            if token in names:
                print(text.rest() + names[token], end="", flush=True)
                text = tokens_of.stream()
            elif token not in tokens_of.end_ids:
                print(text.add(token), end="", flush=True)
        shown = len(out)
    print(text.rest())
    if options.domain:
        print(f"[{options.domain}: {'right' if task.outcome(turns.outs[0]) else 'wrong'}]", file=sys.stderr)


def main():
    """Answer, and compile no more once that is over, or cannot be."""
    compiling = []
    try:
        return answer(parse(sys.argv[1:]), compiling)
    finally:
        for future in chain(*compiling):
            future.cancel()


def answer(options, compiling):
    """Load, stream to standard output, report speed on standard error. compiling: to be filled with the
    futures of `compile_ahead`."""
    text = prompt_text(options)
    device = parallel.device(options.device)
    ranks = parallel.start(device, parallel.world_size(), vars(options))
    config = checkpoint.read_config(options.checkpoint)
    if options.index_fp8 and config.index_topk:
        cli.check_e4m3(device, "--index_fp8=true", "--index_fp8=false")
    if options.cache == "fp8":
        cli.check_e4m3(device, "--cache=fp8", "--cache=auto")
    dtype = getattr(torch, options.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    tokens_of = tokenizer.load_tokenizer(options.checkpoint)
    if options.chat:
        task = chat_task(options, text)
        turn_ids = chat.turns_of(options.checkpoint)
        if turn_ids != tasks.TURNS:
            raise ValueError(f"{options.checkpoint}: its turn tokens are {turn_ids}, those of tasks.py are "
                             f"{tasks.TURNS}")
        ids = task.prompt()
        n = task.limit
    else:
        ids = prompt_ids(options, text, tokens_of, config.vocab_size)
        n = options.num_tokens
        run = files.run_options(files.locate(options.checkpoint).parent, block_size=int)
    prompt = torch.tensor([ids], device=device).expand(options.count, -1)  # (count, tokens)

    def prepare(model):
        """What is to be done before the weights are read."""
        for name in ("index_block", "index_candidates"):
            if getattr(options, name) is not None:
                setattr(model.config, name, getattr(options, name))
        model.config.check()
        check(len(ids), n, options.temperature, options.top_k, options.top_p, options.chunk, model.config)
        if options.shard:
            parallel.shard(model, ranks=ranks)
        if ranks.world == 1:
            compiling.extend(compile_ahead(
                model, prompt, n, device, tokens_of.end_ids, options.cache == "fp8", options.chunk))

    model = Transformer.from_pretrained(
        options.checkpoint, cli.backend(options.backend, device), options.attention, options.index_fp8,
        device=device, dtype=dtype, prepare=prepare)
    if options.chat:
        talk(options, model, tokens_of, task, prompt, compiling, ranks)
        return 0

    generator = torch.Generator(device).manual_seed(options.seed)
    printer = Printer(text, tokens_of, ids, options.count, stops=not options.ignore_eos)
    rows = stream(
        model, prompt, options.num_tokens, temperature=options.temperature, top_k=options.top_k,
        top_p=options.top_p, generator=generator, chunk=options.chunk, fp8_cache=options.cache == "fp8",
        end_ids=tokens_of.end_ids, go_on=options.ignore_eos, compiled=options.compile, ranks=ranks)
    began = time.perf_counter()
    times = []
    for row in paced(rows, compiling):
        printer.add(row.tolist())
        times.append(time.perf_counter())
    printer.finish()

    speed = "one token each"
    if len(times) > 1:
        speed = f"{(printer.tokens - options.count) / (times[-1] - times[0]):.1f} tokens/s"
    print(f"[{model.attention} attention, top-k {config.index_topk}: prompt {len(ids)} tokens in "
          f"{times[0] - began:.2f} s, then {speed}; cache {model.cache_bytes_per_token:,} bytes per token "
          f"over {config.num_hidden_layers} layers]", file=sys.stderr)
    total = len(ids) + len(times)
    if total > run.get("block_size", total):
        print(f"[these are {total} tokens, and the model was trained on contexts of {run['block_size']}: "
              "beyond them it may talk nonsense]", file=sys.stderr)
    return 0


if __name__ == "__main__":
    cli.run(main)
