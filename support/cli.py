"""What the scripts share: option parsing with one-line errors, files that change whole, interruptions, exit codes (0 done, 2 bad input, 130 Ctrl-C)."""
import argparse
import difflib
import importlib.util
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import torch


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations whose errors are one line, with the nearest known option named, and exit 2."""

    def __init__(self, description):
        super().__init__(description=description, allow_abbrev=False)

    def parse_args(self, args=None):
        known, unknown = self.parse_known_args(args)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            self.error(f"unknown option {unknown[0]}" + (f"; did you mean {near[0]}?" if near else "; --help lists them"))
        return known

    def error(self, message):
        self.exit(2, f"{self.prog}: {message}\n")


def boolean(text):
    """Option value true/false (also 1/0, yes/no). Raises ArgumentTypeError."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() in ("true", "1", "yes")


def parse_fields(parser, fields, gpu, argv):
    """Add --name=VALUE for dataclass fields and parse argv over the lines `name = value` (# starts a comment) of a --config file
    -> dict of the options given. A field's metadata may hold help and choices; gpu: defaults that differ on a GPU, for --help.
    FileNotFoundError; ValueError names the line."""
    parser.add_argument("--config", metavar="FILE", help="file of `name = value` lines; the command line overrides it")
    for f in fields:
        kind, choices = boolean if f.type is bool else f.type, f.metadata.get("choices")
        default = f"default {f.default}" + (f", on a GPU {gpu[f.name]}" if f.name in gpu else "")
        parser.add_argument(f"--{f.name}", type=kind, choices=choices, metavar=None if choices else f.type.__name__.upper(),
                            help=f"{f.metadata.get('help', 'model: see model.Config')} ({default})", **(dict(nargs="?", const=True) if f.type is bool else {}))
    given = lambda args: {k: v for k, v in vars(parser.parse_args(args)).items() if v is not None}
    options = given(argv)
    path = options.pop("config", None)
    if path is None:
        return options
    if not Path(path).is_file():
        raise FileNotFoundError(f"--config={path}: no such file")
    lines = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        name, equals, value = (part.strip() for part in line.partition("#")[0].partition("="))
        if equals and name.isidentifier() and value:
            lines.append(f"--{name}={value}")
        elif name:
            raise ValueError(f"--config={path}, line {number}: expected `name = value`, found {line.strip()!r}")
    options = given(lines) | options
    if "config" in options:
        raise ValueError(f"--config={path}: a config file cannot name another; put its lines here")
    return options


def device(name):
    """"auto" (a CUDA GPU if there is one, else cpu), "cpu", "cuda", "cuda:1", "mps" -> torch.device. ValueError if it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.zeros(1, device=name).cpu().new_empty(0, device=name).device  # .cpu() fails on "meta"
    except (RuntimeError, AssertionError, NotImplementedError):
        raise ValueError(f"--device={name}: not available on this machine; use --device=cpu or leave it out") from None


def backend(name, device):
    """"auto" -> None (see model.pick_backend), "torch", "triton". ValueError for triton where it cannot run."""
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"--backend=triton needs a CUDA GPU, and the device is {device}; use --backend=torch")
    if name == "triton" and not importlib.util.find_spec("triton"):
        raise ValueError("--backend=triton: triton is not installed; pip install triton, or use --backend=torch")
    return None if name == "auto" else name


def check_ranges(options, *ranges):
    """ValueError for the first of the ranges (name, low, high) that its option does not lie in."""
    for name, low, high in ranges:
        if not low <= getattr(options, name) <= high:
            raise ValueError(f"--{name}={getattr(options, name)}: must lie between {low} and {high}")


def commit():
    """The commit of this source tree, with "+" if it has changes; "unknown" outside a git checkout."""
    git = lambda *args: subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)
    try:
        head, dirty = git("rev-parse", "--short", "HEAD"), git("status", "--porcelain", "-uno")
    except OSError:
        return "unknown"
    return "unknown" if head.returncode else head.stdout.strip() + ("+" if dirty.stdout else "")


@contextmanager
def interruptible():
    """Yield a list that SIGINT and SIGTERM are appended to instead of ending the process at once; a second Ctrl-C does."""
    caught = []
    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)
    before = {s: signal.signal(s, handler) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def run(main):
    """sys.exit(main()); what functions raise about bad input becomes one line and exit 2, Ctrl-C exit 130."""
    try:
        sys.exit(main())
    except BrokenPipeError:  # the reader of our output has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        sys.exit(0)
    except (ValueError, OSError) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
