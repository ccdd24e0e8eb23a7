"""train.py as a user runs it: all stages, interruption and resume, what lies in out_dir, and bad input (one
line, exit 2, nothing half-written)."""
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from model import Transformer
from support import cli, files, runs
from tests.scripts import (
    ROOT, SHORT, SIZES, call, edit_json, environment, finish, losses, metrics, refused, start, train)
from train import resolve


def weights(folder):
    return load_file(folder / "model.safetensors")


# ---- all stages ----

def test_all_stages(run):
    folder, out, err = run
    records = metrics(folder)
    assert [r["stage"] for r in records] == ["dense"] * 6 + ["warmup"] * 5 + ["sparse"] * 5
    assert [r["step"] for r in records] == [*range(6), *range(5), *range(5)]
    for r in records:
        assert {"loss", "lr", "tokens_per_second", "mfu", "memory_gb", "grad_norm"} <= r.keys()
        assert ("kl" in r) == (r["stage"] != "dense")
        assert "kl" not in r or (0 <= r["recall"] <= 1.001 and r["kl_uniform"] > 0)
        assert (r["grad_norm"] == 0) == (r["stage"] == "warmup")
        assert (r["index_grad_norm"] == 0) == (r["stage"] == "dense")
        assert r["grad_norm"] != r["index_grad_norm"]
    assert records[5]["loss"] < records[0]["loss"]
    stored = json.loads((folder / "run.json").read_text())
    assert stored["options"]["block_size"] == 32 and stored["options"]["index_topk"] == 8
    assert {"commit", "torch", "device", "command"} <= stored.keys()
    assert len(json.loads((folder / "summary.json").read_text())) == 5
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    names = ["dense", "metrics.jsonl", "plot.png", "run.json", "sparse", "summary.json", "warmup"]
    assert sorted(path.name for path in folder.iterdir()) == names
    assert "sample after" in out and "validation" in out


def test_warmup_changes_indexers_only_and_dense_changes_none(run):
    """(T14, T22) frozen means bit-equal: no gradient, no weight decay."""
    dense, warm, sparse = (weights(run[0] / stage) for stage in ("dense", "warmup", "sparse"))
    for name in dense:
        assert (dense[name] != warm[name]).any() == (".indexer." in name), name
        assert (warm[name] != sparse[name]).any(), name


def test_two_micro_batches_are_one_batch(place):
    """(T18) Gradients of micro-batches add up to those of the whole batch: the same losses to rounding."""
    small = ("--stage=dense", "--dense_steps=3")
    split = ("--batch_size=1", "--gradient_accumulation_steps=2")
    assert train(place, "whole", *small)[0] == 0
    assert train(place, "split", *small, *split)[0] == 0
    for a, b in zip(metrics(place / "whole"), metrics(place / "split"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=1e-4)


# ---- interrupted and resumed ----

SIGNALS = [
    (signal.SIGINT, "dense", 130), (signal.SIGTERM, "warmup", 143), (signal.SIGKILL, "sparse", -9),
    (signal.SIGKILL, "dense", -9)]


@pytest.mark.parametrize("how,when,expected", SIGNALS)
def test_interrupted_and_resumed_is_the_uninterrupted_run(place, run, how, when, expected):
    name = f"cut,{how.name}={when}"  # a comma separates no folders here
    process = start(place, "train.py", "--data=text.txt", f"--out_dir={name}", *SIZES, *SHORT)
    signal_at(process, place / name, how, when, 3)
    code, _, err = finish(process)
    assert code != 0, "the run was over before the signal came"
    assert code == expected, err
    code, _, err = call(place, "train.py", "--resume", f"--out_dir={name}")
    assert code == 0, err
    assert losses(place / name) == losses(run[0])
    assert not runs.states(place / name)


def signal_at(process, folder, how, stage, steps):
    """Send a signal once so many steps of a stage are in the log."""
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        there = (folder / "metrics.jsonl").exists()
        if there and sum(r["stage"] == stage for r in metrics(folder)) >= steps:
            process.send_signal(how)
            return
        time.sleep(0.005)


@pytest.fixture(scope="session")
def stopped(place):
    """-> a function: a copy of a run that was interrupted in its third step, under this name."""
    step = torch.optim.AdamW.step
    steps = []

    def interrupted(*args, **kwargs):
        steps.append(1)
        if len(steps) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return step(*args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.optim.AdamW, "step", interrupted)
        code, _, err = train(place, "stopped")
    assert code == 130 and "stopped after dense step 3" in err, err
    [state] = runs.states(place / "stopped")
    assert state.name == "state-0-0000003"

    def copy(name):
        shutil.copytree(place / "stopped", place / name)
        return place / name

    return copy


def test_resume_drops_an_unfinished_line_and_keeps_what_it_does_not_know(place, run, stopped):
    """A killed process leaves half a line; folders whose names begin like those of states are not ours."""
    folder = stopped("half a line")
    log = folder / "metrics.jsonl"
    log.write_text(log.read_text() + '{"stage": "dense", "st')
    (folder / "state-of-the-art").mkdir()
    (folder / "state-0-0000004.part").mkdir()
    assert call(place, "train.py", "--resume", f"--out_dir={folder.name}")[0] == 0
    assert losses(folder) == losses(run[0])
    assert [path.name for path in folder.glob("state-*")] == ["state-of-the-art"]


def torn(path):
    path.write_bytes(path.read_bytes()[:2000])


def changed(**values):
    """-> a function that replaces values in a trainer state."""
    return lambda path: torch.save(torch.load(path, weights_only=True) | values, path)


def other_shapes(path):
    trainer = torch.load(path, weights_only=True)
    for moments in trainer["optimizer"]["state"].values():
        moments["exp_avg"] = torch.zeros(3)
    torch.save(trainer, path)


STATES = dict(
    truncated=torn, missing=lambda path: path.unlink(), empty=lambda path: path.write_bytes(b""),
    text=lambda path: path.write_text("hello"), list=lambda path: torch.save([1], path),
    code=lambda path: torch.save(dict(stage=torn), path), stage=changed(stage="wrong"),
    step=changed(step="3"), negative=changed(step=-1), corpus=changed(corpus=None),
    optimizer=changed(optimizer={}), shapes=other_shapes)


@pytest.mark.parametrize("what", STATES)
def test_damaged_trainer_state(place, stopped, what):
    """One line that names the file; what is there stays as it is."""
    folder = stopped(f"state {what}")
    [state] = runs.states(folder)
    STATES[what](state / "trainer.pt")
    before = losses(folder)
    refused(call(place, "train.py", "--resume", f"--out_dir={folder.name}"), "trainer.pt", "--overwrite")
    assert losses(folder) == before and runs.states(folder) == [state]


STORED = dict(
    batch_size="2", stage="all of it", seed=True, dense_lr=None, compile="no", block_size=32.5,
    hidden_size="32", data=["text.txt"], schedule="linear")


@pytest.mark.parametrize("key", STORED)
def test_options_of_a_wrong_type_in_run_json(place, stopped, key):
    folder = stopped(f"stored {key}")
    edit_json(folder / "run.json", lambda values: values["options"].update({key: STORED[key]}))
    result = call(place, "train.py", "--resume", f"--out_dir={folder.name}")
    refused(result, "run.json", f"{key}={STORED[key]!r}")


@pytest.mark.parametrize("options", [[1], "abc", None, {}, 7])
def test_run_json_without_options(place, stopped, options):
    folder = stopped(f"options {options}")
    edit_json(folder / "run.json", lambda values: values.update(options=options))
    refused(call(place, "train.py", "--resume", f"--out_dir={folder.name}"), "run.json")


def test_resume_ignores_options_it_does_not_know(place, run, stopped):
    """Of a newer version."""
    folder = stopped("newer")
    edit_json(folder / "run.json", lambda values: values["options"].update(momentum="lots"))
    assert call(place, "train.py", "--resume", "--out_dir=newer")[0] == 0
    assert losses(folder) == losses(run[0])


def test_resumes_without_what_it_started_from(place, run):
    (place / "moved").mkdir()
    stored = json.loads((run[0] / "run.json").read_text())
    stored["options"]["init_from"] = "gone"
    (place / "moved" / "run.json").write_text(json.dumps(stored))
    assert resolve(["--resume", f"--out_dir={place / 'moved'}"])[0].init_from == "gone"


DAMAGED = [
    ("summary.json", '{"val_loss, dense attention, after dense": "1"}'), ("summary.json", "[]"),
    ("summary.json", "{"), ("metrics.jsonl", '{"epoch": 1}\n{}\n'), ("metrics.jsonl", "17\n{}\n"),
    ("metrics.jsonl", "{\n{}\n"), ("metrics.jsonl", '{"stage": "dense", "step": 0, "kl": "low"}\n{}\n')]


@pytest.mark.parametrize("name,text", DAMAGED)
def test_damaged_log_or_summary(place, run, name, text):
    """Refused before anything is written, not once the control has been trained."""
    folder = place / f"damaged-{DAMAGED.index((name, text))}"
    shutil.copytree(run[0], folder)
    (folder / name).write_text(text)
    refused(call(place, "train.py", "--stage=control", f"--out_dir={folder.name}"), f"{folder.name}/{name}")
    assert (folder / name).read_text() == text and not (folder / "control").exists()


# ---- stage by stage ----

def test_stage_by_stage_is_all_at_once(place, run):
    for stage in ("dense", "warmup", "sparse"):
        # no longer than the context: the sample at the end fits
        code, _, err = train(place, "single", f"--stage={stage}", "--max_position_embeddings=32")
        assert code == 0, err
    single = place / "single"
    assert losses(single) == losses(run[0])
    assert runs.read_summary(single) == runs.read_summary(run[0])
    before = sorted(path.name for path in single.iterdir())
    for option in ("--data=nowhere.txt", "--index_topk=32", "--init_from=single/sparse", "--resume"):
        refused(train(place, "single", "--overwrite", option))
        # nothing is deleted for a run that cannot start
        assert sorted(path.name for path in single.iterdir()) == before
    assert train(place, "single", "--overwrite", "--stage=sparse")[0] == 0
    assert losses(single) == losses(run[0])


def test_control_is_the_sparse_stage_with_dense_attention(place, run, control):
    """From the same start, over the same batches (with k = context - 1, step 0 is nearly the same), indexers
    frozen; the run's own log and summary stay."""
    records = metrics(control)
    assert losses(control)[:16] == losses(run[0])
    for own, sparse in zip(records[16:], metrics(run[0])[11:], strict=True):
        assert (own["stage"], own["step"], own["lr"]) == ("control", sparse["step"], sparse["lr"])
        assert own["index_grad_norm"] == 0 < own["grad_norm"] and "kl" not in own
    assert runs.read_summary(control) == runs.read_summary(run[0]) | {
        "val_loss, dense attention, after control": records[-1]["val_loss"]}
    warm, after = (weights(control / stage) for stage in ("warmup", "control"))
    assert all((warm[name] != after[name]).any() == (".indexer." not in name) for name in warm)
    code, _, err = train(place, "nearly-dense", "--stage=sparse", f"--init_from={run[0]}/warmup",
                         "--index_topk=31", f"--compare={control},{run[0]}/metrics.jsonl")
    assert code == 0, err
    ours = metrics(place / "nearly-dense")[0]["loss"]
    assert ours == pytest.approx(records[16]["loss"], rel=1e-4) and abs(ours - records[11]["loss"]) > 1e-4
    refused(train(place, "with-control", "--stage=control"), "exists")


def test_control_is_resumed(place, run, control):
    shutil.copytree(run[0], place / "cut-control")
    process = start(place, "train.py", "--data=text.txt", "--out_dir=cut-control", "--stage=control", *SIZES,
                    *SHORT)
    signal_at(process, place / "cut-control", signal.SIGTERM, "control", 2)
    assert finish(process)[0] == 143
    code, _, err = call(place, "train.py", "--resume", "--out_dir=cut-control")
    assert code == 0 and losses(place / "cut-control") == losses(control), err


def test_indexers_of_another_size_start_anew(place, run):
    def resized(stage, *args):
        return train(place, "resized", f"--stage={stage}", "--index_n_heads=4", *args)

    code, out, err = resized("warmup", f"--init_from={run[0]}/dense")
    assert code == 0 and "indexers start anew: 4 heads of 16 instead of 2 of 16" in out, err
    before = weights(run[0] / "dense")
    after = weights(place / "resized" / "warmup")
    assert all((before[name] == after[name]).all() for name in before if ".indexer." not in name)
    assert after["model.layers.0.self_attn.indexer.weights_proj.weight"].shape == (4, 32)
    code, out, err = resized("sparse", "--detach=false")
    stored = json.loads((place / "resized" / "run.json").read_text())
    assert code == 0 and "anew" not in out and stored["options"]["detach"] is False, err
    result = resized("sparse", "--overwrite", f"--init_from={run[0]}/warmup")
    refused(result, "--index_n_heads=4: the checkpoint", "start with --stage=warmup")


def test_graft_onto_a_published_checkpoint(place):
    """--init_from a DeepSeek-V2 model in bf16 as transformers saves it, with its own tokenizer: warm-up
    leaves all but the new indexers as they were."""
    transformers = pytest.importorskip("transformers")
    from tokenizers import Tokenizer, models, pre_tokenizers
    config = transformers.DeepseekV2Config(
        vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2,
        num_attention_heads=2, q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8,
        v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_shared_experts=1, first_k_dense_replace=1,
        topk_method="greedy", max_position_embeddings=128, eos_token_id=1)
    transformers.DeepseekV2ForCausalLM(config).bfloat16().save_pretrained(place / "v2")
    letters = {letter: i for i, letter in enumerate("abcdefghijklmnopqrstuvwxyz0123456789:", 2)}
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<eos>": 1, **letters}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(place / "v2" / "tokenizer.json"))

    def graft(*args, out="grafted"):
        return call(place, "train.py", "--data=text.txt", *SHORT, "--dtype=bfloat16", f"--out_dir={out}",
                    *args)

    # there is no k to set where there are no indexers, unless they are added
    result = graft("--init_from=v2", "--stage=dense", "--index_topk=8", out="none")
    refused(result, "--index_topk=8", "warmup")
    index = ("--index_topk=8", "--index_n_heads=2", "--index_head_dim=16")
    code, _, err = graft("--init_from=v2", "--stage=warmup", *index)
    assert code == 0, err
    before = weights(place / "v2")
    after = weights(place / "grafted" / "warmup")
    assert all((before[name] == after[name]).all() for name in before)
    new = after.keys() - before.keys()
    assert new and all(".self_attn.indexer." in name for name in new)
    assert all("loss" in r and r["grad_norm"] == 0 for r in metrics(place / "grafted"))
    code, _, err = graft("--stage=sparse", "--train=attention")
    assert code == 0, err
    sparse = weights(place / "grafted" / "sparse")
    assert all((x.dtype == torch.float32) == (".indexer." in name) for name, x in sparse.items())
    changed_names = {name for name, x in sparse.items() if (x != after[name]).any()}
    assert changed_names and all(".self_attn." in name for name in changed_names)
    code, _, err = call(place, "sample.py", "--checkpoint=grafted/sparse", "--prompt=line", "--num_tokens=12")
    assert code == 0 and "sparse attention, top-k 8" in err, err


def test_no_context_of_one_token(place):
    """It would train, and have nothing to attend to; the shortest context trains to the end."""
    refused(train(place, "one", "--stage=dense", "--block_size=1"), "--block_size=1: must be at least 2")
    assert not (place / "one").exists()
    code, _, err = train(place, "two", "--block_size=2", "--index_topk=1", "--eval_steps=2")
    assert code == 0, err


@pytest.mark.parametrize("tokens", [1, 2, 3, 33])
def test_corpora_of_hardly_a_token(place, tokens):
    """33 tokens are one window of training, none of validation."""
    (place / f"tokens-{tokens}.txt").write_text("a" * tokens)
    result = call(place, "train.py", f"--data=tokens-{tokens}.txt", "--out_dir=hardly", *SIZES, *SHORT)
    refused(result, "text")
    assert not (place / "hardly").exists()


# ---- options ----

def test_options_from_a_file(place):
    lines = ("# a comment", "stage = dense", "dense_steps = 3  # few", "gradient_accumulation_steps = 2",
             "recompute = true")
    (place / "options.cfg").write_text("\n".join(lines) + "\n")
    code, out, err = train(place, "from-file", "--config=options.cfg", "--dense_steps=2")
    assert code == 0, err
    assert "--dense_steps=2" in out and "--gradient_accumulation_steps=2" in out
    assert len(metrics(place / "from-file")) == 2


CONFIGS = {
    "a byte order mark": b"\xef\xbb\xbfseed = 3\n", "CRLF": b"seed = 3\r\ndata = te#xt.txt\r\n",
    "no line end": b"#\n\n  # seed = 4\nseed=3",
    "a # in a value": b"data = te#xt.txt # and a comment\nseed = 3"}


@pytest.mark.parametrize("what", CONFIGS)
def test_config_files(place, what):
    (place / "one.cfg").write_bytes(CONFIGS[what])
    shutil.copy(place / "text.txt", place / "te#xt.txt")
    here = os.getcwd()
    os.chdir(place)
    try:
        options, _, _ = resolve(["--config=one.cfg", "--stage=dense"])
    finally:
        os.chdir(here)
    assert options.seed == 3 and options.data == ("te#xt.txt" if b"data" in CONFIGS[what] else "python")


def test_not_finite(place):
    code, _, err = train(place, "boom", "--dense_lr=1e30", "--grad_clip=1e30", "--ramp_steps=0",
                         "--save_interval=1", "--dense_steps=20")
    assert code == 1
    assert re.search(r"dense step \d+, batches \d+\.\.\d+: not finite.*last good checkpoint: .*state-0-", err)
    assert all(json.dumps(r).count("NaN") == 0 for r in metrics(place / "boom"))


def test_out_of_memory(capsys):
    def main():
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nAnd more")

    with pytest.raises(SystemExit) as end:
        cli.run(main, smaller="lower --batch_size")
    _, err = capsys.readouterr()
    assert end.value.code == 2 and err.count("\n") == 1
    assert "out of GPU memory; lower --batch_size (CUDA out of memory. Tried" in err
    with pytest.raises(torch.OutOfMemoryError):
        cli.run(main)


# ---- what lies in out_dir ----

def test_out_dir_may_be_a_link(place, run):
    """It stays one, and so does a stage's folder or a file in it."""
    (place / "disk").mkdir()
    (place / "link").symlink_to("disk")
    assert train(place, "link")[0] == 0
    assert (place / "link").is_symlink() and losses(place / "disk") == losses(run[0])
    shutil.move(place / "disk" / "sparse", place / "elsewhere")
    shutil.move(place / "disk" / "summary.json", place / "summary.json")
    (place / "disk" / "sparse").symlink_to(place / "elsewhere")
    (place / "disk" / "summary.json").symlink_to(place / "summary.json")
    (place / "elsewhere" / "left over").write_text("of the run before")
    refused(train(place, "link", "--stage=sparse"), "link/sparse exists")
    assert train(place, "link", "--stage=sparse", "--overwrite", "--seed=2")[0] == 0
    assert (place / "disk" / "sparse").is_symlink() and (place / "disk" / "summary.json").is_symlink()
    assert not (place / "elsewhere" / "left over").exists()
    assert json.loads((place / "summary.json").read_text())
    Transformer.from_pretrained(place / "elsewhere")


def test_links_that_lead_nowhere(place, run):
    """One line before work begins, and nothing made where they point."""
    (place / "astray").symlink_to("not there")
    (place / "circle").symlink_to("circle")
    (place / "to a file").symlink_to("text.txt")
    for name in ("astray", "astray/a/b", "circle", "to a file"):
        refused(train(place, name), name.split("/")[0])
    shutil.copytree(run[0], place / "stage-link", ignore=shutil.ignore_patterns("sparse"))
    (place / "stage-link" / "sparse").symlink_to("../not there")
    refused(train(place, "stage-link", "--stage=sparse"), "sparse", "not there")
    assert not (place / "not there").exists()
    assert losses(place / "stage-link") == losses(run[0])


def test_checkpoints_that_a_killed_process_put_aside(place, run):
    """Between two renames a checkpoint has another name: it counts as there."""
    shutil.copytree(run[0], place / "aside")
    aside = files.put_aside(place / "aside" / "warmup")
    os.rename(place / "aside" / "warmup", aside)
    refused(train(place, "aside", "--stage=warmup"), "aside/warmup exists")
    assert aside.is_dir()
    assert train(place, "aside", "--stage=sparse", "--overwrite")[0] == 0
    assert train(place, "aside", "--stage=warmup", "--overwrite")[0] == 0
    again = [record for record in losses(place / "aside") if record[0] == "warmup"]
    assert again == losses(run[0])[6:11] and not aside.exists()


def limited(place, limit, *args):
    """train.py in a process that writes no file beyond so many bytes, as if the disk were full."""
    def limit_files():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *args], cwd=place, env=environment(place), text=True,
        capture_output=True, preexec_fn=limit_files)
    return process.returncode, process.stdout, process.stderr


def test_full_disk_before_the_first_state(place):
    assert train(place, "fill the cache", "--stage=dense", "--dense_steps=0")[0] == 0
    result = limited(place, 60000, "--data=text.txt", "--out_dir=full", *SIZES, *SHORT)
    refused(result, "state-0-0000002", "File too large", "no state was saved before")
    assert sorted(path.name for path in (place / "full").iterdir()) == ["metrics.jsonl", "run.json"]


@pytest.mark.parametrize("what", ["weights", "optimizer", "log"])
def test_full_disk_leaves_the_last_state(place, run, stopped, what):
    """Wherever it happens, the run goes on from the state before once there is room."""
    folder = stopped(f"full at {what}")
    [state] = runs.states(folder)
    sizes = {path.name: path.stat().st_size for path in state.iterdir()}
    log = (folder / "metrics.jsonl").stat().st_size
    weights_end = sizes["model.safetensors"]
    limit = dict(weights=weights_end - 1, optimizer=weights_end + 99, log=log + 9)
    assert sizes["trainer.pt"] > limit["optimizer"] and (folder / "run.json").stat().st_size > limit["log"]
    result = limited(place, limit[what], "--resume", f"--out_dir={folder.name}")
    refused(result, "state-0-0000003 is complete, go on with --resume")
    assert runs.states(folder) == [state] and not list(folder.glob("*.part")) + list(folder.glob(".*"))
    assert call(place, "train.py", "--resume", f"--out_dir={folder.name}")[0] == 0
    assert losses(folder) == losses(run[0])


# ---- devices ----

@pytest.mark.parametrize("name", ["cuda", "cuda:99", "tpu", "meta", "mps", "xla", "hpu", "", "cpu:x"])
def test_devices_that_are_not_there(name):
    if name == "cuda" and torch.cuda.is_available():
        pytest.skip("it is there")
    if name == "mps" and torch.backends.mps.is_available():
        pytest.skip("it is there")
    with pytest.raises(ValueError, match=f"--device={name}: not available") as error:
        cli.device(name)
    assert "\n" not in str(error.value)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_a_cpu_keeps_freed_memory(tmp_path):
    """Pages that a freed tensor of 64 MB leaves behind hold the next one of 32, which the system need not
    bring: 8192 pages, or 16 huge ones."""
    code = """
import resource, torch
from support import cli
cli.device("cpu")
torch.ones(2**24)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
torch.ones(2**23)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    result = subprocess.run([sys.executable, "-c", code], env=environment(tmp_path), check=True,
                            capture_output=True, text=True)
    assert int(result.stdout) < 8


def without_e4m3(monkeypatch):
    """As on mps: converting to e4m3 raises."""
    to = torch.Tensor.to

    def refuse(x, *args, **kwargs):
        if torch.float8_e4m3fn in args:
            raise TypeError("Trying to convert Float8_e4m3fn to the MPS backend but it does not have support "
                            "for that dtype.")
        return to(x, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "to", refuse)


def test_devices_without_e4m3(place, run, monkeypatch):
    """Refused before training, in a line that names the option that does without; with it everything
    works."""
    without_e4m3(monkeypatch)
    refused(train(place, "e4m3"), "--index_fp8=true needs float8_e4m3fn", "--index_fp8=false", "--device=cpu")
    assert not (place / "e4m3").exists()
    code, _, err = train(place, "no-e4m3", "--index_fp8=false")
    assert code == 0, err
    sample = ("sample.py", "--checkpoint=no-e4m3/sparse", "--num_tokens=20")
    refused(call(place, *sample), "--index_fp8=false")
    refused(call(place, *sample, "--index_fp8=false", "--cache=fp8"), "--cache=fp8 needs", "--cache=auto")
    assert call(place, *sample, "--index_fp8=false")[0] == 0


ON_ITS_GPU = """
import sys, torch
script, *sys.argv[1:] = sys.argv[1:]
code = __import__(script).main()
print("peaks:", *(torch.cuda.max_memory_allocated(n) for n in range(2)))
sys.exit(code)
"""


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_the_second_gpu(place):
    """--device=cuda:1 trains and samples there, with nothing on cuda:0, and reports the memory of that
    GPU."""
    env = environment(place)
    del env["CUDA_VISIBLE_DEVICES"]

    def run_on(n, script, *args):
        command = [sys.executable, "-c", ON_ITS_GPU, script, f"--device=cuda:{n}", *args]
        process = subprocess.run(command, cwd=place, env=env, text=True, capture_output=True)
        assert process.returncode == 0, process.stderr
        peaks = [int(bytes_used) for bytes_used in process.stdout.split("peaks:")[1].split()]
        assert peaks[n] > 0 and peaks[1 - n] == 0

    for n in (0, 1):
        run_on(n, "train", "--data=text.txt", f"--out_dir=gpu-{n}", *SIZES, *SHORT)
        run_on(n, "sample", f"--checkpoint=gpu-{n}/sparse", "--num_tokens=20", "--count=2")
    for a, b in zip(metrics(place / "gpu-0"), metrics(place / "gpu-1"), strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-3) and b["memory_gb"] > 0


# ---- bad input ----

BAD = [
    ("train.py", "--bach_size=3", "unknown option --bach_size=3; did you mean --batch_size"),
    ("train.py", "--index_topk=0", "--index_topk=0: a query selects at least 1 token"),
    ("train.py", "--index_topk=-3", "index_topk=-3"),
    ("train.py", "--index_topk=32", "--block_size=32: not longer than index_topk=32"),
    ("train.py", "--block_size=0", "--block_size=0: must be at least 2"),
    ("train.py", "--max_position_embeddings=16", "longer than the model's max_position_embeddings=16"),
    ("train.py", "--batch_size=two", "invalid int value: 'two'"),
    ("train.py", "--dense_lr=nan", "--dense_lr=nan: must be at least 0"),
    ("train.py", "--dense_lr=inf", "--dense_lr=inf: must be at least 0"),
    ("train.py", "--min_lr=1.5", "--min_lr=1.5: must lie between 0 and 1"),
    ("train.py", "--seed=9223372036854775808", "--seed=9223372036854775808: must lie between 0 and"),
    ("train.py", "--stage=wram", "invalid choice: 'wram'"),
    ("train.py", "--qk_rope_head_dim=7", "qk_rope_head_dim=7"),
    ("train.py", "--data=nowhere.txt", "--data=nowhere.txt: no such file or folder"),
    ("train.py", "--data=empty.txt", "--data=empty.txt"),
    ("train.py", "--data=binary.bin", "--data=binary.bin"),
    ("train.py", "--data=short.txt", "fewer than one window"),
    ("train.py", "--data=shakespeare", "cannot download"),
    ("train.py", "--data=web:0", "web:N"),
    ("train.py", "--tokenizer=gpt2", "--tokenizer=bytes, which needs no download"),
    ("train.py", "--tokenizer=nobody", "unknown tokenizer"),
    ("train.py", "--backend=triton", "--backend=triton needs a CUDA GPU"),
    ("train.py", "--config=none.cfg", "--config=none.cfg: no such file"),
    ("train.py", "--config=bad.cfg", "line 2: expected `name = value`"),
    ("train.py", "--config=nameless.cfg", "line 1: expected `name = value`"),
    ("train.py", "--config=nested.cfg", "line 1: a config file cannot name another"),
    ("train.py", "--config=latin.cfg", "latin.cfg: no UTF-8 text"),
    ("train.py", "--config=unknown.cfg", "unknown option --bach_size=3; did you mean --batch_size"),
    ("train.py", "--resume", "there is no run to continue"),
    ("train.py", "--stage=sparse", "run the stage before"),
    ("train.py", "--stage=control", "--stage=control starts from bad/warmup, which does not exist"),
    ("train.py", "--stage=control --train=none", "nothing would be trained"),
    ("train.py", "--n_routed_experts=4 --n_shared_experts=-1", "n_shared_experts=-1: must be"),
    ("train.py", "--tokenizer=no-end", "no-end: its config.json names no eos_token_id"),
    ("train.py", "--compare=out,nowhere", "nowhere: no such file; --compare takes"),
    ("train.py", "--compare=text.txt", "text.txt: not a metrics.jsonl"),
    ("train.py", "--compare=foreign/config.json", "config.json: not a metrics.jsonl"),
    ("train.py", "--detach=maybe", "write true or false"),
    ("train.py", "--init_from=nowhere", "nowhere does not exist"),
    ("train.py", "--init_from=truncated", "truncated"),
    ("train.py", "--init_from=other-shape", "belong to different models"),
    ("train.py", "--out_dir=out", "--resume"),
    ("train.py", "--out_dir=", "--out_dir=: name a folder"),
    ("train.py", "--out_dir=text.txt/out", "text.txt: is a file"),
    ("tools/report.py", "nowhere", "nowhere: no run here"),
    ("tools/report.py", "kept-nowhere --collect=out/warmup", "out/warmup/metrics.jsonl: no such file"),
    ("tools/report.py", "out --plots", "--plots keeps the pictures of a run"),
    ("tools/report.py", "foreign --compare=out", "foreign/metrics.jsonl: no such file"),
    ("sample.py", "--checkpoint=nowhere", "nowhere"),
    ("sample.py", "--checkpoint=foreign", "is not supported"),
    ("sample.py", "--checkpoint=nojson", "JSON"),
    ("sample.py", "--checkpoint=truncated", "truncated"),
    ("sample.py", "--checkpoint=no-end", "names no end-of-text token to begin with"),
    ("sample.py", "--checkpoint=damaged", "the model's next token is not a number"),
    ("sample.py", "--checkpoint=out/sparse --prompt_file=none.txt", "none.txt: no such file"),
    ("sample.py", "--checkpoint=out/sparse --prompt_file=latin.cfg", "latin.cfg: no UTF-8 text"),
    ("sample.py", "--checkpoint=out/sparse --temperature=-1", "--temperature=-1.0: must be at least 0"),
    ("sample.py", "--checkpoint=out/sparse --temperature=nan", "--temperature=nan: must be at least 0"),
    ("sample.py", "--checkpoint=out/sparse --temperature=inf", "--temperature=inf: must be at least 0"),
    ("sample.py", "--checkpoint=out/sparse --top_p=2", "--top_p=2.0"),
    ("sample.py", "--checkpoint=out/sparse --top_p=nan", "--top_p=nan"),
    ("sample.py", "--checkpoint=out/sparse --top_k=0", "--top_k=0: must be at least 1"),
    ("sample.py", "--checkpoint=out/sparse --num_tokens=0", "--num_tokens=0: must be at least 1"),
    ("sample.py", "--checkpoint=out/sparse --num_tokens=100000", "max_position_embeddings"),
    ("sample.py", "--checkpoint=out/sparse --prompt=a -", "not several"),
    ("sample.py", "--checkpoint=out/sparse --device=cuda:99", "--device=cuda:99: not available"),
    ("sample.py", "--checkpoint=out/sparse --sead=1", "did you mean --seed"),
]


@pytest.fixture(scope="session")
def bad_files(place, run):
    for name, content in {
            "empty.txt": b"", "binary.bin": bytes(range(256)) * 100, "short.txt": b"too short",
            "bad.cfg": b"stage = dense\nwhat is this\n", "nameless.cfg": b"= 3\n",
            "latin.cfg": b"seed = 3 # caf\xe9", "nested.cfg": b"config = bad.cfg\n",
            "unknown.cfg": b"bach_size = 3\n"}.items():
        (place / name).write_bytes(content)
    for name in ("foreign", "nojson", "truncated", "other-shape", "no-end", "damaged"):
        shutil.copytree(run[0] / "sparse", place / name)
    (place / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    (place / "nojson" / "config.json").write_text("{")
    edit_json(place / "no-end" / "config.json", lambda values: values.update(eos_token_id=None))
    (place / "no-end" / "tokenizer_config.json").unlink()
    edit_json(place / "other-shape" / "config.json", lambda values: values.update(hidden_size=40))
    path = place / "truncated" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    model = Transformer.from_pretrained(place / "damaged")
    model.model.norm.weight.data.fill_(float("nan"))
    model.save_pretrained(place / "damaged", "bytes")


def changes(place):
    """When each file and folder was last changed, the data cache apart."""
    return {path: path.lstat().st_mtime_ns for path in place.rglob("*") if "cache" not in path.parts}


@pytest.mark.parametrize("script,options,message", BAD, ids=[f"{case[0]} {case[1]}" for case in BAD])
def test_bad_input(place, bad_files, script, options, message):
    before = changes(place)
    options = options.split()
    if script == "train.py":
        sizes = [] if any("init_from" in option for option in options) else SIZES
        options = ["--data=text.txt", "--out_dir=bad", *sizes, *SHORT, *options]
    refused(call(place, script, *options), message)
    assert changes(place) == before


@pytest.mark.parametrize("script", ["train.py", "sample.py"])
def test_in_a_process_of_its_own(place, script):
    """--help, and a bad option: the exit code, and nothing but a line."""
    code, out, err = finish(start(place, script, "--help"))
    assert code == 0 and "--seed" in out and not err
    result = finish(start(place, script, "--sead=1"))
    refused(result, f"{script}: unknown option --sead=1; did you mean --seed")
