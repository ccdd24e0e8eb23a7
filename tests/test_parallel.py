"""Several processes (docs/PARALLEL.md): the same losses as one, runs that go on, and what happens where one
of them fails. gloo on the CPU; on GPUs the same through NCCL."""
import json
import os
import resource
import shutil
import signal
import time
from unittest import mock

import pytest
import torch

import parallel
import sparse_attn
from support import runs
from tests.common import FLOAT32, MEAN_ROW, assert_close, device_of
from tests.scripts import ROOT, SHORT, SIZES, call, finish, launch, losses, metrics, refused, train
from triton_kernels import dense

OF_TORCH = ("FutureWarning", "returned a view tensor")  # what torch says of names and of blocks' outputs
SMALL = ("--data=text.txt", "--device=cpu", *SIZES, *SHORT)


def on_ranks(place, ranks, *args, **kwargs):
    """train.py on so many ranks, to the end -> (exit code, standard output, standard error) of each."""
    return [finish(process) for process in launch(place, ranks, "train.py", *args, **kwargs)]


def told(results):
    """What several processes said on standard error."""
    return "".join(err for _, _, err in results)


def assert_near(one, several, stages=("dense", "warmup", "sparse")):
    """The same losses and gradient norms within 1e-6, some eps of what they are sums of; recall is of other
    queries."""
    records = [record for record in metrics(one) if record["stage"] in stages]
    for a, b in zip(records, metrics(several), strict=True):
        assert (a["stage"], a["step"], a["lr"]) == (b["stage"], b["step"], b["lr"])
        assert a.keys() == b.keys()
        for name in a.keys() & {"loss", "lm", "kl", "kl_uniform", "val_loss"}:
            assert a[name] == pytest.approx(b[name], rel=0, abs=1e-6), (name, a, b)
        for name in ("grad_norm", "index_grad_norm"):
            assert a[name] == pytest.approx(b[name], rel=1e-6, abs=1e-6), (name, a, b)


# ---- who owns what ----

@pytest.mark.parametrize("context,length,start", [(1, 2, 0), (2, 12, 0), (4, 8, 16), (3, 30, 7)])
def test_split_covers_the_sequence_once_and_evenly(context, length, start):
    """Each rank has two chunks whose numbers add up to 2 C - 1, hence as many pairs as any other."""
    parts = []
    for rank in range(context):
        split = parallel.Split(parallel.Ranks(torch.device("cpu"), rank, context, context), length, start)
        parts.append(split.position)
        assert split.length == start + length
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(start, start + length))
    assert len({int(part.sum()) for part in parts}) == 1


@pytest.mark.parametrize("world,count", [(1, 3), (2, 4), (3, 7), (4, 2)])
def test_turns(world, count):
    """Every batch counts once, and all ranks compute equally often."""
    turns = [parallel.Ranks(torch.device("cpu"), rank, world).turns(count) for rank in range(world)]
    assert len({len(of_rank) for of_rank in turns}) == 1
    counted = [number for of_rank in turns for number, counts in of_rank if counts]
    assert sorted(counted) == [*range(count)]


# ---- the dense stage's pieces ----

def plain_piece(q, k, v, scale, causal=True):
    """What cuDNN computes of a piece."""
    logits = torch.einsum("bshd,bthd->bhst", q, k) * scale
    if causal:
        mask = torch.ones(q.shape[1], k.shape[1], dtype=torch.bool, device=q.device).tril()
        logits = logits.masked_fill(~mask, float("-inf"))
    out = torch.einsum("bhst,bthd->bshd", logits.softmax(-1), v)
    return out, logits.logsumexp(-1).transpose(1, 2)


def plain_backward(dout, q, k, v, out, lse, scale, causal):
    """Its gradients, from out and lse of the whole row."""
    logits = torch.einsum("bshd,bthd->bhst", q, k) * scale
    p = torch.exp(logits - lse.transpose(1, 2)[..., None])
    if causal:
        p = p.tril()
    dp = torch.einsum("bshd,bthd->bhst", dout, v)
    ds = p * (dp - (dout * out).sum(-1).transpose(1, 2)[..., None]) * scale
    return (torch.einsum("bhst,bthd->bshd", ds, k), torch.einsum("bhst,bshd->bthd", ds, q),
            torch.einsum("bhst,bshd->bthd", p, dout))


@pytest.mark.parametrize("pieces", [True, False])
@pytest.mark.parametrize("early,late,T", [(0, 15, 20), (5, 10, 20), (0, 5, 10), (7, 12, 30)])
def test_split_attention(early, late, T, pieces, monkeypatch):
    """Pieces merged by their lse, and each differentiated with the merged out and lse, or the flash kernel
    with bounds: the reference's results and gradients. Logits are of size 4, so that here the one and there
    the other piece has the mass."""
    if pieces:
        monkeypatch.setattr(dense, "cudnn_takes", lambda q, v: True)
        monkeypatch.setattr(dense, "cudnn_attention", plain_piece)
        monkeypatch.setattr(dense, "cudnn_backward", plain_backward)
    device = device_of("triton")
    torch.manual_seed(early)
    shapes = ((10, 8), (T, 8), (T, 6))
    inputs = [torch.randn(2, n, 3, d, device=device) for n, d in shapes]
    inputs[1] *= 3
    dout = torch.randn(2, 10, 3, 6, device=device)
    results = []
    for function in (sparse_attn.split_attention, dense.split_attention):
        tensors = [x.clone().requires_grad_() for x in inputs]
        out, lse = function(*tensors, 0.5, early, late)
        out.backward(dout)
        results.append([out, lse, *[x.grad for x in tensors]])
    for want, got in zip(*results, strict=True):
        assert_close(got, want, *FLOAT32, floor=MEAN_ROW)


def test_split_attention_refuses():
    """Chunks of unequal lengths, or beyond the keys."""
    q, k = (torch.zeros(1, n, 1, 4) for n in (6, 12))
    for queries, early, late in ((q[:, :5], 0, 6), (q, 0, 10), (q, -1, 3), (q, 4, 3)):
        with pytest.raises(ValueError, match="two chunks of equal length"):
            dense.split_attention(queries, k, k, 1.0, early, late)


def test_pieces_are_an_operation(monkeypatch):
    """torch.library's checks: schema, fake tensors, autograd."""
    monkeypatch.setattr(dense, "cudnn_attention", plain_piece)
    monkeypatch.setattr(dense, "cudnn_backward", plain_backward)
    q, k, v = (torch.randn(1, n, 2, 4, requires_grad=True) for n in (4, 8, 8))
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(dense.split_attention_pieces.overload, (q, k, v, 0.5, 0, 6), test_utils=tests)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="cuDNN needs a GPU")
@pytest.mark.parametrize("D,V", [(64, 64), (192, 128)])
def test_pieces_by_cudnn(D, V):
    """Against the flash kernel with bounds, bf16: forward and gradients within bf16's rounding of the largest
    element."""
    torch.manual_seed(0)
    T = 1024
    shapes = ((512, D), (T, D), (T, V))
    inputs = [torch.randn(2, n, 4, d, device="cuda", dtype=torch.bfloat16) for n, d in shapes]
    dout = torch.randn(2, 512, 4, V, device="cuda", dtype=torch.bfloat16)
    last = torch.cat((torch.arange(256), 768 + torch.arange(256))).expand(2, -1).int().cuda()
    results = []
    for pieces in (False, True):
        tensors = [x.clone().requires_grad_() for x in inputs]
        if pieces:
            assert dense.cudnn_takes(tensors[0], tensors[2])
            out, lse = dense.split_attention(*tensors, D**-0.5, 0, 768)
        else:
            out, lse = dense.dense_attention(*tensors, D**-0.5, None, last)
        out.backward(dout)
        results.append([out, lse, *[x.grad for x in tensors]])
    for want, got in zip(*results, strict=True):
        assert (got - want).abs().max() <= 2**-6 * want.abs().max()


# ---- the same as one process ----

def test_models_on_two_ranks(place):
    """Losses and gradients of all stages, prompts, checkpoints: see tests/ranks.py."""
    for code, out, err in [finish(process) for process in launch(place, 2, "tests/ranks.py", "2", "cpu")]:
        assert code == 0 and not any(words in err for words in OF_TORCH), err


@pytest.mark.parametrize("ranks,context", [(2, 1), (2, 2), (4, 2), (4, 4)])
def test_models_by_nccl(place, ranks, context):
    """The same on as many GPUs, with the kernels."""
    if torch.cuda.device_count() < ranks:
        pytest.skip(f"needs {ranks} GPUs")
    with mock.patch("tests.scripts.environment", lambda place: dict(os.environ, PYTHONPATH=str(ROOT))):
        processes = launch(place, ranks, "tests/ranks.py", context, "cuda")
    for code, out, err in [finish(process) for process in processes]:
        assert code == 0, err


@pytest.fixture(scope="session")
def place(place, tmp_path_factory):
    """A user's folder apart: the runs here have names that other tests' runs have, too."""
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copy(place / "text.txt", folder)
    return folder


@pytest.fixture(scope="session")
def one(place):
    """A run of one process with two micro-batches a step."""
    assert train(place, "one process", "--gradient_accumulation_steps=2")[0] == 0
    return place / "one process"


def test_four_ranks_train_as_one(place, one):
    """Two groups of two: micro-batches over the groups, each sequence over a group's ranks. The files are
    those of one process, and only rank 0 speaks."""
    stage = ("--stage=sparse", f"--init_from={one}/warmup", "--context_parallel=2")
    results = on_ranks(place, 4, *SMALL, *stage, "--out_dir=four")
    assert [code for code, _, _ in results] == [0] * 4, told(results)
    assert "sample after" in results[0][1] and not any(out + err for _, out, err in results[1:])
    assert not any(words in results[0][2] for words in OF_TORCH), results[0][2]
    assert_near(one, place / "four", ["sparse"])
    names = [sorted(path.name for path in (folder / "sparse").iterdir()) for folder in (one, place / "four")]
    assert names[0] == names[1]
    sizes = [(folder / "sparse" / "model.safetensors").stat().st_size for folder in (one, place / "four")]
    assert sizes[0] == sizes[1]


def stop_after(processes, folder, records, rank, number):
    """Send a signal to one rank once there are so many records -> (code, out, err) of all."""
    log = folder / "metrics.jsonl"
    while not log.exists() or len(log.read_text().splitlines()) < records:
        assert all(process.poll() is None for process in processes), [finish(p) for p in processes]
        time.sleep(0.02)
    os.kill(processes[rank].pid, number)
    return [finish(process) for process in processes]


@pytest.fixture(scope="session")
def shared(one):
    """Options of a sparse stage whose sequences two ranks share."""
    return (*SMALL, "--stage=sparse", f"--init_from={one}/warmup", "--context_parallel=2",
            "--sparse_steps=12", "--gradient_accumulation_steps=2", "--save_interval=8")


@pytest.fixture(scope="session")
def stopped(place, shared):
    """-> the folder of such a run that SIGTERM to one of the ranks stopped."""
    processes = launch(place, 2, "train.py", *shared, "--out_dir=stopped")
    results = stop_after(processes, place / "stopped", 3, 1, signal.SIGTERM)
    assert [code for code, _, _ in results] == [143, 143], told(results)
    assert told(results).count("stopped after") == 1
    assert len(runs.states(place / "stopped")) == 1
    return place / "stopped"


def test_resumed(place, shared, stopped):
    """The run goes on bit for bit on as many ranks, and to rounding as one process, which reads the state as
    any other."""
    results = on_ranks(place, 2, *shared, "--out_dir=whole")
    assert [code for code, _, _ in results] == [0, 0], told(results)
    for name in ("parts", "alone"):
        shutil.copytree(stopped, place / name)
    results = on_ranks(place, 2, "--resume", "--out_dir=parts")
    assert [code for code, _, _ in results] == [0, 0], told(results)
    assert losses(place / "parts") == losses(place / "whole")
    assert call(place, "train.py", "--resume", "--out_dir=alone", "--context_parallel=1")[0] == 0
    assert_near(place / "alone", place / "whole")


# ---- failures: one line, all end, the last state stays ----

def test_a_rank_dies(place, stopped):
    folder = place / "died"
    shutil.copytree(stopped, folder)
    before = runs.states(folder)
    count = len(metrics(folder))
    processes = launch(place, 2, "train.py", "--resume", "--out_dir=died", "--save_interval=1000")
    results = stop_after(processes, folder, count + 1, 1, signal.SIGKILL)
    assert [code for code, _, _ in results] == [1, -9]
    assert results[0][2].count("\n") == 1 and "another process has ended" in results[0][2]
    assert runs.states(folder) == before and not list(folder.glob("*.part"))


def test_full_disk_on_rank_0(place, stopped):
    """All ranks end, and the state before stays."""
    folder = place / "no room"
    shutil.copytree(stopped, folder)
    [state] = before = runs.states(folder)
    limit = (state / "model.safetensors").stat().st_size - 1

    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    results = on_ranks(
        place, 2, "--resume", "--out_dir=no room", "--save_interval=1", preexec_fn=limit_files)
    for result in results:
        refused(result, f"{state.name} is complete, go on with --resume")
    assert runs.states(folder) == before and not list(folder.glob("*.part"))


def test_other_options_on_another_rank(place):
    results = on_ranks(place, 2, *SMALL, "--out_dir=other", options={1: ["--rope_theta=7"]})
    assert [code for code, _, _ in results] == [2, 2]
    assert results[0][2].startswith("train.py: --rope_theta=7.0 on rank 1, and None on rank 0; start all")
    assert not (place / "other").exists()


REFUSED = {
    "--context_parallel=3": "--context_parallel=3: must divide the number of processes, which is 4",
    "--context_parallel=4 --block_size=36": "--block_size=36: --context_parallel=4 cuts it into 8 chunks",
    "--gradient_accumulation_steps=3": "--gradient_accumulation_steps=3: the micro-batches of a step go to 4",
    "--device=cuda:1": "--device=cuda:1: under torchrun every process takes a GPU of its own",
    "--device=cuda": "--nproc-per-node=4: this machine has 0 GPUs"}


@pytest.mark.parametrize("options", REFUSED)
def test_refused_before_anything_starts(options, monkeypatch):
    """By every rank, hence before they meet."""
    import train as script
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    ranks = dict(WORLD_SIZE="4", RANK="0", LOCAL_WORLD_SIZE="4", LOCAL_RANK="0")
    with mock.patch.dict(os.environ, ranks):
        with pytest.raises(ValueError, match=REFUSED[options].split(":")[0]) as error:
            script.resolve(["--data=text.txt", "--out_dir=refused", *SIZES, *SHORT, *options.split()])
    assert REFUSED[options] in str(error.value) and "\n" not in str(error.value)


# ---- sample.py and evaluate.py ----

def test_sample_and_evaluate_sharded(place, one):
    """Weights in parts, the prompt and the batches shared: what one process prints and measures."""
    prompt = (place / "text.txt").read_text()[:75]
    (place / "prompt.txt").write_text(prompt)
    sample = ("--checkpoint=one process/sparse", "--prompt_file=prompt.txt", "--num_tokens=12")
    measure = ("--checkpoint=one process/sparse", "--batches=3", "--copies=4")
    code, text, _ = call(place, "sample.py", *sample)
    assert code == 0 and call(place, "evaluate.py", *measure, "--out_dir=measured 1")[0] == 0

    sampling = launch(place, 2, "sample.py", *sample, "--shard", "--device=cpu")
    measuring = launch(place, 2, "evaluate.py", *measure, "--shard", "--device=cpu", "--out_dir=measured 2")
    results = [finish(process) for process in (*sampling, *measuring)]
    assert [code for code, _, _ in results] == [0] * 4, told(results)
    assert results[0][1] == text and not results[1][1]
    want, got = (json.loads((place / f"measured {n}" / "evaluation.json").read_text()) for n in (1, 2))
    for name in ("loss", "recall", "layers", "distances", "copy"):
        assert got[name] == want[name], name
