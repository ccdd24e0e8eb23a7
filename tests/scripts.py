"""Scripts as a user runs them, for tests: in a process of their own, or, faster, in this one."""
import contextlib
import importlib
import io
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from unittest import mock

import torch

from support import cli

with contextlib.suppress(ImportError):
    import triton  # with or without its interpreter as conftest.py chose: a script here sees other variables

ROOT = Path(__file__).parent.parent
SIZES = (
    "--hidden_size=32 --intermediate_size=48 --num_hidden_layers=2 --num_attention_heads=2 --q_lora_rank=16 "
    "--kv_lora_rank=16 --qk_nope_head_dim=8 --qk_rope_head_dim=8 --v_head_dim=8 --index_n_heads=2 "
    "--index_head_dim=16 --index_topk=8").split()
SHORT = (
    "--dense_steps=6 --warmup_steps=5 --sparse_steps=5 --block_size=32 --batch_size=2 --eval_interval=4 "
    "--eval_steps=1 --save_interval=2 --ramp_steps=2").split()


def environment(place):
    """Of a user without a GPU and without a network, whose data cache lies in `place`."""
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return inherited | dict(
        DSA_DATA_DIR=str(place / "cache"), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1",
        PYTHONPATH=str(ROOT), HTTPS_PROXY="http://127.0.0.1:9")


def start(place, script, *args, **kwargs):
    """A script in a process of its own, in the folder `place` -> subprocess.Popen."""
    command = [sys.executable, str(ROOT / script), *map(str, args)]
    return subprocess.Popen(
        command, cwd=place, env=environment(place), text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **kwargs)


def launch(place, ranks, script, *args, options=None, **kwargs):
    """A script on so many ranks in the folder `place`, as torchrun starts it -> list of subprocess.Popen.
    options: {rank: further options of this one}."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = dict(
        WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    processes = []
    for rank in range(ranks):
        own = dict(RANK=str(rank), LOCAL_RANK=str(rank))
        further = (options or {}).get(rank, ())
        processes.append(subprocess.Popen(
            [sys.executable, str(ROOT / script), *map(str, args), *further], cwd=place,
            env=environment(place) | world | own, text=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs))
    return processes


def finish(process, stdin=""):
    """Wait for a process -> exit code, standard output, standard error."""
    out, err = process.communicate(stdin, timeout=300)
    return process.returncode, out, err


def call(place, script, *args, stdin=b""):
    """The same of a script in this process: what it imports has been imported."""
    main = importlib.import_module(script.removesuffix(".py").replace("/", ".")).main
    out = io.StringIO()
    err = io.StringIO()
    folder = os.getcwd()
    threads = torch.get_num_threads()
    with (mock.patch.dict(os.environ, environment(place), clear=True),
          mock.patch.object(sys, "argv", [script, *map(str, args)]),
          mock.patch.object(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin))),
          mock.patch.object(torch.cuda, "is_available", lambda: False),
          contextlib.redirect_stdout(out), contextlib.redirect_stderr(err)):
        try:
            os.chdir(place)
            torch.set_num_threads(1)
            cli.run(main)
        except SystemExit as end:
            code = end.code
        finally:
            os.chdir(folder)
            torch.set_num_threads(threads)
    return code, out.getvalue(), err.getvalue()


def train(place, out_dir, *args):
    """train.py with a small model and few steps."""
    return call(place, "train.py", "--data=text.txt", f"--out_dir={out_dir}", *SIZES, *SHORT, *args)


def refused(result, *words):
    """Assert that a call ended with exit code 2 and one line that holds the words."""
    code, out, err = result
    assert code == 2 and err.count("\n") == 1 and "Traceback" not in err, (code, out, err)
    for word in words:
        assert word in err, err


def metrics(folder):
    """The records of a run; of one that is going on, without an unfinished last line."""
    lines = (folder / "metrics.jsonl").read_text().split("\n")[:-1]
    return [json.loads(line) for line in lines]


def losses(folder):
    """What two equal runs have in common."""
    keys = ("stage", "step", "loss", "kl", "val_loss", "grad_norm", "index_grad_norm")
    return [[record.get(key) for key in keys] for record in metrics(folder)]


def edit_json(path, change):
    """Apply change(values) to the object in a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))
