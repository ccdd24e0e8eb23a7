"""What scripts share towards the user: options with one-line errors, the device, interruptions, exit codes (0
done, 2 bad input, 130 Ctrl-C)."""
import argparse
import ctypes
import difflib
import importlib.util
import math
import os
import re
import signal
import subprocess
import sys
import time
import traceback
from contextlib import contextmanager
from pathlib import Path

import torch

from support import files


# ---- options ----

# files and folders, in which ~ is the user's home: a shell leaves it alone behind an =
PLACES = ("out_dir", "init_from", "data", "tokenizer", "config", "checkpoint", "prompt_file", "text", "out")


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, whose errors are one line, with the nearest known option named, and
    exit 2."""

    def __init__(self, description):
        super().__init__(
            description=description, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter)
        self.source = ""  # of the options, where that is no command line; stands before an error

    def parse_args(self, args=None):
        known, unknown = self.parse_known_args(args)
        if unknown:
            near = difflib.get_close_matches(unknown[0].split("=")[0], self._option_string_actions, 1)
            advice = f"; did you mean {near[0]}?" if near else "; --help lists them"
            self.error(f"unknown option {unknown[0]}{advice}")
        for name in PLACES:
            value = getattr(known, name, None)
            if isinstance(value, str):
                setattr(known, name, os.path.expanduser(value))
        return known

    def error(self, message):
        self.exit(2, f"{self.prog}: {self.source}{one_line(message)}\n")


def one_line(message):
    """An error's text without its line breaks."""
    return " ".join(str(message).split("\n"))


def boolean(text):
    """Option value true/false (also 1/0, yes/no). Raises ArgumentTypeError."""
    if text.lower() not in ("true", "false", "1", "0", "yes", "no"):
        raise argparse.ArgumentTypeError(f"{text!r}: write true or false")
    return text.lower() in ("true", "1", "yes")


def add_field(parser, field, gpu):
    """Offer a dataclass field made by config.option as --name. gpu: its default on a GPU, or None."""
    kind = boolean if field.type is bool else field.type
    choices = field.metadata["choices"]
    default = f"default {'none' if field.default == '' else field.default}"
    if gpu is not None:
        default += f", on a GPU {gpu}"
    alone = True if field.type is bool else field.metadata["alone"]
    flag = {} if alone is None else dict(nargs="?", const=alone)
    parser.add_argument(
        f"--{field.name}", type=kind, choices=choices,
        metavar=None if choices else field.type.__name__.upper(),
        help=f"{field.metadata['help']} ({default})", **flag)


def config_lines(path):
    """The lines `name = value` of a config file -> ["--name=value", ...]; # begins a comment, at the start of
    a line or behind a space, and quotes around a value are no part of it. FileNotFoundError; ValueError names
    the line."""
    if not Path(path).exists():
        raise FileNotFoundError(f"--config={path}: no such file")
    lines = []
    for number, line in enumerate(files.read_text(Path(path)).splitlines(), 1):
        name, equals, value = re.sub(r"(^|\s)#.*", "", line).partition("=")
        name = name.strip()
        value = re.sub(r"""^(["'])(.*)\1$""", r"\2", value.strip())
        if equals and name.isidentifier() and value:
            lines.append(f"--{name}={value}")
        elif name or equals:
            raise ValueError(f"--config={path}, line {number}: expected `name = value`, found "
                             f"{line.strip()!r}")
        if name == "config":
            raise ValueError(f"--config={path}, line {number}: a config file cannot name another; put its "
                             "lines here")
    return lines


def parse_fields(parser, fields, gpu, argv):
    """The options of dataclass fields, from argv and below it from a --config file -> dict of those given.

    fields: made by config.option. gpu: {name: default that differs on a GPU}, for --help. FileNotFoundError,
    ValueError: see `config_lines`."""
    parser.add_argument("--config", metavar="FILE",
                        help="file of `name = value` lines; the command line overrides it")
    for field in fields:
        add_field(parser, field, gpu.get(field.name))

    def given(args):
        return {name: value for name, value in vars(parser.parse_args(args)).items() if value is not None}

    if sum(argument.partition("=")[0] == "--config" for argument in argv) > 1:
        raise ValueError("--config is given twice; put the lines of both into one file")
    options = given(argv)
    path = options.pop("config", None)
    if path is None:
        return options
    parser.source = f"--config={path}: "
    return given(config_lines(path)) | options


def check_ranges(options, *ranges):
    """ValueError for the first of the ranges (name, low, high) that its option does not lie in; a high of
    math.inf bounds nothing, but the option must be finite."""
    for name, low, high in ranges:
        value = getattr(options, name)
        if low <= value <= high and value < math.inf:  # NaN compares false
            continue
        bounds = f"be at least {low}" if high == math.inf else f"lie between {low} and {high}"
        raise ValueError(f"--{name}={value}: must {bounds}")


def check_stored(path, values, fields):
    """ValueError naming the file, the key and the value of the first of `values`, read from a file, that is
    not of its field's type and choices."""
    for field in fields:
        value = values.get(field.name, field.default)
        files.check_option(path, field.name, value, field.type, field.metadata["choices"])


# ---- devices ----

def device(name):
    """"auto" (a CUDA GPU if there is one, else cpu), "cpu", "cuda", "cuda:1", "mps" -> torch.device, which
    becomes the current one: Triton launches, streams and statistics without a device go there. ValueError if
    it is not there."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        there = torch.zeros(1, device=name)
        there.cpu()  # "meta" holds no numbers
    except (RuntimeError, AssertionError, NotImplementedError, ImportError):
        raise ValueError(f"--device={name}: not available on this machine; use --device=cpu or leave it "
                         "out") from None
    if there.is_cuda:
        torch.cuda.set_device(there.device)
    if there.is_cpu:
        keep_freed_memory()
    return there.device


def keep_freed_memory():
    """Let this process keep the memory that it frees, for its next tensors, where the C library is glibc: a
    training step on a CPU takes and frees hundreds of MB, and getting them from the system page by page takes
    up to a third of its time."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, TypeError):  # another C library; Windows
        return
    mallopt(-4, 0)  # M_MMAP_MAX: no mapping of its own for a large tensor
    mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD, bytes that may lie free
    mallopt(-2, 2**28)  # M_TOP_PAD, bytes taken at a time


def has_e4m3(device):
    """Does this device know float8_e4m3fn? (mps does not.)"""
    try:
        torch.zeros(1, device=device).to(torch.float8_e4m3fn)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def check_e4m3(device, option, instead):
    """ValueError if an option asks for float8_e4m3fn on a device that has none; instead: the option that does
    without."""
    if not has_e4m3(device):
        raise ValueError(f"{option} needs float8_e4m3fn, which --device={device.type} does not have; use "
                         f"{instead} or --device=cpu")


def backend(name, device):
    """"auto" -> None (see model.pick_backend), "torch", "triton". ValueError for triton where it cannot
    run."""
    if name == "triton" and device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(f"--backend=triton needs a CUDA GPU, and the device is {device}; use "
                         "--backend=torch")
    if name == "triton" and not importlib.util.find_spec("triton"):
        raise ValueError("--backend=triton: triton is not installed; pip install triton, or use "
                         "--backend=torch")
    return None if name == "auto" else name


# ---- the program ----

def git(*args):
    """A git command on this source tree -> CompletedProcess."""
    return subprocess.run(["git", "-C", str(Path(__file__).parent), *args], capture_output=True, text=True)


def commit():
    """The commit of this source tree, with "+" if it has changes; "unknown" outside a git checkout."""
    try:
        head = git("rev-parse", "--short", "HEAD")
        changes = git("status", "--porcelain", "-uno")
    except OSError:
        return "unknown"
    if head.returncode:
        return "unknown"
    return head.stdout.strip() + ("+" if changes.stdout else "")


@contextmanager
def interruptible():
    """Yield a list that SIGINT and SIGTERM are appended to instead of ending the process at once; a second
    one does."""
    caught = []

    def handler(number, frame):
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    before = {number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield caught
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def run(main, closed=None, smaller=None):
    """sys.exit(main()); what functions raise about bad input becomes one line and exit 2, Ctrl-C exit 130.
    closed: what to say, with exit 1, if standard output is closed before the end (None: nothing, and exit 0,
    as its reader has seen enough). smaller: what takes less memory, to be said with exit 2 where the GPU's
    does not suffice. Under torchrun, see `fail`."""
    os.environ["MPLBACKEND"] = "agg"  # a notebook's, which its shell commands inherit, may not be there
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="backslashreplace")  # of what the terminal's encoding cannot say
    try:
        sys.exit(main())
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        if closed:
            fail(closed, 1)
        sys.exit(0)
    except (ValueError, OSError) as error:
        fail(error, 2)
    except KeyboardInterrupt:
        end(130)
    except Exception as error:
        full = error if isinstance(error, torch.OutOfMemoryError) else error.__context__  # capturing a graph
        if smaller and isinstance(full, torch.OutOfMemoryError):
            fail(f"out of GPU memory; {smaller} ({str(full).splitlines()[0]})", 2)
        if "RANK" not in os.environ:
            raise
        if isinstance(error, torch.distributed.DistError) or "gloo" in str(error):
            fail("another process has ended, so this one does; where it trained, the last complete state is "
                 "in --out_dir: go on with --resume", 1)
        traceback.print_exc(file=sys.__stderr__)
        end(1)


def fail(message, code):
    """End with one line. Of torchrun's processes mostly all fail, and by the same error: rank 0 says it, and
    the others wait for torchrun to end them, unless the error is their own."""
    rank = int(os.environ.get("RANK", 0))
    where = ""
    if rank:
        time.sleep(1)
        where = f"rank {rank}: "
    stream = sys.__stderr__ if rank else sys.stderr  # parallel.start silences the others
    print(f"{Path(sys.argv[0]).name}: {where}{one_line(message)}", file=stream)
    end(code)


def end(code):
    """Exit; as one of several processes without saying goodbye to the others, which may not be there."""
    if "RANK" in os.environ:
        sys.stdout.flush()
        sys.__stderr__.flush()
        os._exit(code)
    sys.exit(code)
