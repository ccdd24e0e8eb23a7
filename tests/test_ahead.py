"""Kernels compiled ahead (triton_kernels/ahead.py, generate.compile_ahead): in a process of its own, without
Triton's interpreter, which compiles nothing."""
import os
import subprocess
import sys
from concurrent.futures import Future
from pathlib import Path
from threading import Timer

import pytest
import torch

import generate
from config import Config
from model import Transformer

pytest.importorskip("triton")

CUDA = torch.cuda.is_available()
KERNELS = """
import sys
from concurrent.futures import wait
from contextlib import nullcontext

import torch
import triton
import triton.language as tl
from triton import knobs
from triton.compiler.compiler import CompiledKernel
from triton.runtime import driver
from triton_kernels.ahead import compile_ahead

if not torch.cuda.is_available():  # compile for Hopper, launch nothing
    from tests.compiling import Hopper
    driver.set_active(Hopper())
    torch.cuda.device = lambda device: nullcontext()
    CompiledKernel.run = property(lambda kernel: lambda *arguments: None)
    CompiledKernel._init_handles = lambda kernel: None
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


@triton.jit
def add_kernel(x_ptr, n, ADDEND: tl.constexpr):
    tl.store(x_ptr + n, tl.load(x_ptr + n) + ADDEND)


@triton.jit
def broken_kernel(x_ptr):
    tl.store(x_ptr, tl.arange(0, 3))


x = torch.zeros(64, device=device)
compiled = []
knobs.runtime.jit_post_compile_hook = lambda *, fn, **_: compiled.append(fn.name.split(".")[-1])


def add(n, addend):
    add_kernel[(1,)](x_ptr=x, n=n, ADDEND=addend)


def first():
    add(16, 1)
    add(48, 1)  # the same variant
    broken_kernel[(1,)](x_ptr=x)


def second():
    add(16, 1)
    add(17, 1)
    add(16, 2)


lists = compile_ahead([first, second], device)
assert knobs.runtime.jit_cache_hook is None
assert [len(futures) for futures in lists] == [2, 2], lists
for futures in lists:
    wait(futures)
failed = [future.exception() is not None for futures in lists for future in futures]
assert failed == [False, True, False, False], failed
assert compiled == ["add_kernel"] * 3, compiled
assert not x.any()

second()
assert len(compiled) == 3, compiled
if torch.cuda.is_available():
    assert x[16] == 3 and x[17] == 1 and x.sum() == 4
try:
    first()
except triton.compiler.errors.CompilationError:
    sys.exit(0)
"""
SAMPLE = """
import sys
import threading

from triton import knobs

import sample

late = []


def note(*, fn, **_):
    if threading.current_thread() is threading.main_thread():
        late.append(fn.name)


knobs.runtime.jit_cache_hook = note
sys.argv = ["sample.py", *sys.argv[1:]]
sample.main()
print(late, file=sys.stderr)
sys.exit(bool(late))
"""


def run(tmp_path, code, *arguments):
    """A Python process with an empty cache of compiled kernels."""
    script = tmp_path / "script.py"  # not -c: Triton reads the source of its kernels
    script.write_text(code)
    root = Path(__file__).parent.parent
    environment = os.environ | dict(TRITON_CACHE_DIR=str(tmp_path / "triton"), PYTHONPATH=str(root))
    environment.pop("TRITON_INTERPRET", None)
    return subprocess.run(
        [sys.executable, str(script), *arguments], cwd=root, env=environment, capture_output=True, text=True)


def test_rehearsed_compiled_then_launched(tmp_path):
    done = run(tmp_path, KERNELS)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(not CUDA, reason="the kernels of a GPU")
@pytest.mark.parametrize("prompt,options", [
    ("ab" * 300, []), ("ab" * 300, ["--cache=fp8", "--count=2"]), ("a", ["--attention=dense"]),
    ("ab<|endoftext|>" * 40, ["--special", "--count=3"]),
    ("ab" * 300, ["--index_block=4", "--index_candidates=96"])],
    ids=["", "fp8", "dense", "documents", "blocks"])
def test_nothing_is_compiled_late(tmp_path, prompt, options):
    """What sample.py launches, compile_ahead has foreseen."""
    config = Config(
        vocab_size=257, num_hidden_layers=3, index_topk=64, indexer_types=["full", "shared", "full"])
    Transformer(config, "torch").to(torch.bfloat16).save_pretrained(tmp_path / "model", "bytes")
    done = run(
        tmp_path, SAMPLE, f"--checkpoint={tmp_path / 'model'}", f"--prompt={prompt}", "--num_tokens=4",
        *options)
    assert done.returncode == 0, done.stderr


def test_paced():
    """The first token waits for the first list, the second for both; then nothing waits."""
    lists = [[Future(), Future()], [Future()]]
    waited = []

    def tokens():
        for token in range(4):
            waited.append([future.done() for futures in lists for future in futures])
            yield token

    def finish(futures):
        for future in futures:
            future.set_result(None)

    rows = generate.paced(tokens(), lists)
    for futures in lists:
        Timer(0.2, finish, [futures]).start()
        next(rows)
    assert waited == [[True, True, False], [True, True, True]]
    assert list(rows) == [2, 3]
    assert list(generate.paced(iter([7]), [[], []])) == [7]


def test_one_of_each_kind():
    config = Config(
        num_hidden_layers=6, index_block=4, index_candidates=32, index_topk=8, index_exact_layers=3,
        indexer_types=["full", "shared", "full", "full", "full", "shared"])
    with torch.device("meta"):
        model = Transformer(config)
    layers = list(model.model.layers)
    generate.one_of_each_kind(model)
    kept = [layers.index(layer) for layer in model.model.layers]
    assert kept == [0, 1, 3, 5]
    kinds = [(model.config.has_indexer(i), model.config.block_of(i)) for i in range(4)]
    assert kinds == [(True, 0), (False, 0), (True, 4), (False, 4)]
