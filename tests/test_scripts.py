"""The scripts as a user runs them: all stages, interruption and resume, sampling, and bad input (one line, exit 2, nothing half-written)."""
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from support import tokenizer

from config import Config
from model import Transformer
from train import resolve, trainable

HERE = Path(__file__).parent
SIZES = ("--hidden_size=32 --intermediate_size=48 --num_hidden_layers=2 --num_attention_heads=2 --q_lora_rank=16 --kv_lora_rank=16 --qk_nope_head_dim=8 "
         "--qk_rope_head_dim=8 --v_head_dim=8 --index_n_heads=2 --index_head_dim=16 --index_topk=8").split()
SHORT = "--dense_steps=6 --warmup_steps=5 --sparse_steps=5 --block_size=32 --batch_size=2 --eval_interval=4 --eval_steps=1 --save_interval=2 --ramp_steps=2".split()


@pytest.fixture(scope="session")
def place(tmp_path_factory):
    """A folder with a text file, data cache apart from the user's, and the environment for subprocesses."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "text.txt").write_text("".join(f"line {i}: the square of {i % 97} is {(i % 97) ** 2}\n" for i in range(2000)))
    return folder


def start(place, script, *args, **kwargs):
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | dict(DSA_DATA_DIR=str(place / "cache"), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1", PYTHONUNBUFFERED="1", HTTPS_PROXY="http://127.0.0.1:9")
    return subprocess.Popen([sys.executable, str(HERE / script), *map(str, args)], cwd=place, env=env, text=True, stdin=subprocess.PIPE,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, **kwargs)


def call(place, script, *args, stdin=""):
    process = start(place, script, *args)
    out, err = process.communicate(stdin, timeout=300)
    return process.returncode, out, err


def train(place, out_dir, *args):
    return call(place, "train.py", "--data=text.txt", f"--out_dir={out_dir}", *SIZES, *SHORT, *args)


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def losses(folder):
    return [(r["stage"], r["step"], r["loss"], r.get("kl"), r.get("val_loss")) for r in metrics(folder)]


@pytest.fixture(scope="session")
def run(place):
    code, out, err = train(place, "out")
    assert code == 0, err
    return place / "out", out, err


def test_all_stages(run):
    folder, out, err = run
    records = metrics(folder)
    assert [(r["stage"], r["step"]) for r in records] == [("dense", i) for i in range(6)] + [("warmup", i) for i in range(5)] + [("sparse", i) for i in range(5)]
    for r in records:
        assert {"loss", "lr", "tokens_per_second", "mfu", "memory_gb", "grad_norm"} <= r.keys() and ("kl" in r) == (r["stage"] != "dense")
        assert "kl" not in r or 0 <= r["recall"] <= 1.001 and r["kl_uniform"] > 0
        assert (r["grad_norm"] == 0) == (r["stage"] == "warmup") and (r["index_grad_norm"] == 0) == (r["stage"] == "dense")
    assert records[5]["loss"] < records[0]["loss"]
    stored = json.loads((folder / "run.json").read_text())
    assert stored["options"]["block_size"] == 32 and stored["options"]["index_topk"] == 8 and {"commit", "torch", "device", "command"} <= stored.keys()
    assert len(json.loads((folder / "summary.json").read_text())) == 5
    assert (folder / "plot.png").read_bytes()[:4] == b"\x89PNG"
    assert sorted(p.name for p in folder.iterdir()) == ["dense", "metrics.jsonl", "plot.png", "run.json", "sparse", "summary.json", "warmup"]
    assert "sample after" in out and "validation" in out


def test_warmup_changes_indexers_only_and_dense_changes_none(run):
    """(T14, T22) frozen means bit-equal: no gradient, no weight decay."""
    from safetensors.torch import load_file
    dense, warm, sparse = (load_file(run[0] / s / "model.safetensors") for s in ("dense", "warmup", "sparse"))
    for name in dense:
        assert (dense[name] != warm[name]).any() == (".indexer." in name), name
        assert (warm[name] != sparse[name]).any(), name


@pytest.mark.parametrize("how,when", [(signal.SIGINT, "dense"), (signal.SIGTERM, "warmup"), (signal.SIGKILL, "sparse"), (signal.SIGKILL, "dense")])
def test_interrupted_and_resumed_is_the_uninterrupted_run(place, run, how, when):
    name = f"cut,{how.name}={when}"  # a comma separates no folders here
    process = start(place, "train.py", "--data=text.txt", f"--out_dir={name}", *SIZES, *SHORT)
    deadline = time.time() + 120
    while process.poll() is None and time.time() < deadline:
        if (place / name / "metrics.jsonl").exists() and sum(r["stage"] == when for r in metrics_so_far(place / name)) >= 3:
            process.send_signal(how)
            break
        time.sleep(0.005)
    _, err = process.communicate(timeout=120)
    if process.returncode == 0:
        pytest.fail("the run was over before the signal came")
    assert process.returncode == {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGKILL: -9}[how], err
    code, _, err = call(place, "train.py", "--resume", f"--out_dir={name}")
    assert code == 0, err
    assert losses(place / name) == losses(run[0])
    assert not list((place / name).glob("state-*"))


def metrics_so_far(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().split("\n")[:-1]]


def test_stage_by_stage_is_all_at_once(place, run):
    for stage in ("dense", "warmup", "sparse"):
        code, _, err = train(place, "single", f"--stage={stage}", "--max_position_embeddings=32")  # no longer than the context: the sample at the end fits
        assert code == 0, err
    assert [x[:4] for x in losses(place / "single")] == [x[:4] for x in losses(run[0])]
    assert json.loads((place / "single" / "summary.json").read_text()) == json.loads((run[0] / "summary.json").read_text())
    before = sorted(p.name for p in (place / "single").iterdir())
    for refused in ("--data=nowhere.txt", "--index_topk=32", "--init_from=single/sparse", "--resume"):  # nothing is deleted for a run that cannot start
        assert train(place, "single", "--overwrite", refused)[0] == 2
        assert sorted(p.name for p in (place / "single").iterdir()) == before
    assert train(place, "single", "--overwrite", "--stage=sparse")[0] == 0
    assert [x[:4] for x in losses(place / "single")] == [x[:4] for x in losses(run[0])]


@pytest.fixture(scope="session")
def control(place, run):
    """A copy of the run with a dense control added to it."""
    shutil.copytree(run[0], place / "with-control")
    code, _, err = call(place, "train.py", "--out_dir=with-control", "--stage=control")  # with the run's options
    assert code == 0, err
    return place / "with-control"


def test_control_is_the_sparse_stage_with_dense_attention(place, run, control):
    """From the same start, over the same batches (with k = context - 1, step 0 is nearly the same), indexers frozen; the run's own log and summary stay."""
    from safetensors.torch import load_file
    assert losses(control)[:16] == losses(run[0]) and [(r["stage"], r["step"], r["lr"]) for r in metrics(control)[16:]] == [("control", r["step"], r["lr"]) for r in metrics(run[0])[11:]]
    assert all(r["index_grad_norm"] == 0 < r["grad_norm"] and "kl" not in r for r in metrics(control)[16:])
    summary, before = (json.loads((folder / "summary.json").read_text()) for folder in (control, run[0]))
    assert summary == before | {"val_loss, dense attention, after control": metrics(control)[-1]["val_loss"]}
    warm, after = (load_file(control / s / "model.safetensors") for s in ("warmup", "control"))
    assert all((warm[name] != after[name]).any() == (".indexer." not in name) for name in warm)
    code, _, err = train(place, "nearly-dense", "--stage=sparse", f"--init_from={run[0]}/warmup", "--index_topk=31", f"--compare={control},{run[0]}/metrics.jsonl")
    assert code == 0, err
    ours, theirs = metrics(place / "nearly-dense")[0], metrics(control)[16]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-4) and abs(ours["loss"] - metrics(control)[11]["loss"]) > 1e-4
    assert train(place, "with-control", "--stage=control")[0] == 2
    shutil.copytree(run[0], place / "cut-control")
    process = start(place, "train.py", "--data=text.txt", "--out_dir=cut-control", "--stage=control", *SIZES, *SHORT)
    while process.poll() is None and sum(r["stage"] == "control" for r in metrics_so_far(place / "cut-control")) < 2:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=120) and process.returncode == 143
    code, _, err = call(place, "train.py", "--resume", "--out_dir=cut-control")
    assert code == 0 and losses(place / "cut-control") == losses(control), err


def test_indexers_of_another_size_start_anew(place, run):
    from safetensors.torch import load_file
    resized = lambda stage, *args: train(place, "resized", f"--stage={stage}", "--index_n_heads=4", *args)
    code, out, err = resized("warmup", f"--init_from={run[0]}/dense")
    assert code == 0 and "indexers start anew: 4 heads of 16 instead of 2 of 16" in out, err
    before, after = (load_file(folder / "model.safetensors") for folder in (run[0] / "dense", place / "resized" / "warmup"))
    assert all((before[n] == after[n]).all() for n in before if ".indexer." not in n) and after["model.layers.0.self_attn.indexer.weights_proj.weight"].shape == (4, 32)
    code, out, err = resized("sparse", "--detach=false")
    assert code == 0 and "anew" not in out and json.loads((place / "resized" / "run.json").read_text())["options"]["detach"] is False, err
    code, _, err = resized("sparse", "--overwrite", f"--init_from={run[0]}/warmup")
    assert code == 2 and "--index_n_heads=4: the checkpoint" in err and "start with --stage=warmup" in err and err.count("\n") == 1


def test_runs_are_collected_compared_and_tabulated(place, run, control):
    code, _, err = call(place, "evaluate.py", f"--checkpoint={control}/sparse", "--batches=2", "--copies=2")
    assert code == 0, err
    code, out, err = call(place, "report.py", "kept/a", f"--collect={control}", "--plots")
    assert code == 0 and sorted(p.name for p in (place / "kept" / "a").iterdir()) == \
        ["copy.png", "distances.png", "evaluation.json", "loss.png", "metrics.jsonl", "plot.png", "recall.png", "run.json", "summary.json"], err
    full, kept = metrics(control), metrics(place / "kept" / "a")
    assert [(r["stage"], r["step"]) for r in kept] == [(r["stage"], r["step"]) for r in full if r["step"] % 5 == 0 or "val_loss" in r]
    assert kept[0]["loss"] == float(f"{full[0]['loss']:.8g}")
    shutil.copytree(run[0], place / "kept" / "b10", ignore=shutil.ignore_patterns("dense", "warmup", "sparse"))
    shutil.copytree(place / "kept" / "b10", place / "kept" / "b9")
    code, out, err = call(place, "report.py", "kept")
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in out.splitlines()]
    assert code == 0 and [r[0] for r in cells] == ["run", "---", "a", "b9", "b10"] and len({len(r) for r in cells}) == 1, err
    summary = json.loads((control / "summary.json").read_text())
    assert dict(zip(cells[0], cells[2]))["dense control"] == f"{summary['val_loss, dense attention, after control']:.4f}" and cells[3][3] == ""
    picture = place / "kept" / "b9" / "plot.png"
    before = picture.read_bytes()
    code, _, err = call(place, "report.py", "kept/b9", "--compare=kept/a,kept/b10/metrics.jsonl")
    assert code == 0 and before != picture.read_bytes() and picture.read_bytes()[:4] == b"\x89PNG", err


def test_thinned_logs_are_small(place):
    from support import report
    (place / "long").mkdir()
    for name in ("run.json", "summary.json"):
        (place / "long" / name).write_text("{}")
    numbers = dict.fromkeys("loss lm kl kl_uniform recall lr grad_norm index_grad_norm tokens_per_second mfu memory_gb".split(), 123456.78901234567)
    (place / "long" / "metrics.jsonl").write_text("".join(json.dumps(dict(stage="dense", step=i, **numbers)) + "\n" for i in range(2000)))
    report.collect(place / "long", place / "thin", False)
    assert len(metrics(place / "thin")) == 200 and (place / "thin" / "metrics.jsonl").stat().st_size < 70000


def test_compared_runs_lie_stage_over_stage(place, control, monkeypatch):
    """A run that begins with its sparse stage is drawn over the sparse stage of a longer one, and so is the control."""
    import matplotlib.pyplot as plt
    from support import report
    (place / "late").mkdir()
    late = [r for r in metrics(control) if r["stage"] == "sparse"] + [dict(stage="sparse", step=9, loss=1.0, lm=1.0, val_loss=1.0, kl=0.5, recall=0.5)]
    (place / "late" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in late))
    axes = []
    monkeypatch.setattr(plt, "close", lambda figure: axes.extend(figure.axes))
    report.plot(control / "metrics.jsonl", place / "late" / "plot.png", str(place / "late"))
    spans = {line.get_label(): [*map(int, (min(line.get_xdata()), max(line.get_xdata())))] for line in axes[0].lines}
    assert spans["dense control"] == [11 + 3, 11 + 4] and spans["late"][1] == 11 + 9 and spans["training"] == [0, 5]
    spans = [[*map(int, (min(line.get_xdata()), max(line.get_xdata())))] for line in axes[1].lines if line.get_label() == "late"]
    assert spans == [[11, 20]] and [line.get_label() for line in axes[2].lines].count("late") == 1


def test_options_from_a_file(place):
    (place / "options.cfg").write_text("# a comment\nstage = dense\ndense_steps = 3  # few\ngradient_accumulation_steps = 2\nrecompute = true\n")
    code, out, err = train(place, "from-file", "--config=options.cfg", "--dense_steps=2")
    assert code == 0, err
    assert "--dense_steps=2" in out and "--gradient_accumulation_steps=2" in out and len(metrics(place / "from-file")) == 2


def test_not_finite(place):
    code, _, err = train(place, "boom", "--dense_lr=1e30", "--grad_clip=1e30", "--ramp_steps=0", "--save_interval=1", "--dense_steps=20")
    assert code == 1
    assert re.search(r"dense step \d+, batch \d+: not finite.*last good checkpoint: .*state-0-", err)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_sample(place, run, attention):
    (place / "prompt.txt").write_text("line 12: the square of 12 is 144\n" * 3)
    ask = lambda *args, stdin="": call(place, "sample.py", f"--checkpoint={run[0]}/sparse", "--num_tokens=20", f"--attention={attention}", *args, stdin=stdin)
    code, out, err = ask("--prompt_file=prompt.txt", "--temperature=0", "--chunk=17")
    assert code == 0, err
    assert out.startswith("line 12: the square") and re.search(rf"{attention} attention, top-k 8: prompt 99 tokens in .* tokens/s; cache \d+ bytes per token", err)
    assert "these are 119 tokens, and the model was trained on contexts of 32" in err
    assert ask("-", "--temperature=0", stdin=(place / "prompt.txt").read_text())[1] == out
    code, out, err = ask("--count=2", "--top_k=5", "--top_p=0.9", "--cache=fp8", "--seed=3")
    assert code == 0 and out.count("-" * 20) == 2, err


BAD = [
    ("train.py", "--bach_size=3", "unknown option --bach_size=3; did you mean --batch_size"),
    ("train.py", "--index_topk=0", "--index_topk=0: a query selects at least 1 token"),
    ("train.py", "--index_topk=-3", "index_topk=-3"),
    ("train.py", "--index_topk=32", "--block_size=32: not longer than index_topk=32"),
    ("train.py", "--block_size=0", "--block_size=0: must be at least 1"),
    ("train.py", "--max_position_embeddings=16", "--block_size=32: longer than the model's max_position_embeddings=16"),
    ("train.py", "--batch_size=two", "invalid int value: 'two'"),
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
    ("train.py", "--device=cuda", "--device=cuda: not available"),
    ("train.py", "--device=tpu", "--device=tpu: not available"),
    ("train.py", "--backend=triton", "--backend=triton needs a CUDA GPU"),
    ("train.py", "--config=none.cfg", "--config=none.cfg: no such file"),
    ("train.py", "--config=bad.cfg", "line 2: expected `name = value`"),
    ("train.py", "--resume", "there is no run to continue"),
    ("train.py", "--stage=sparse", "run the stage before"),
    ("train.py", "--stage=control", "--stage=control starts from bad/warmup, which does not exist"),
    ("train.py", "--stage=control --train=none", "nothing would be trained"),
    ("train.py", "--n_routed_experts=4 --n_shared_experts=-1", "n_shared_experts=-1: must be at least 0"),
    ("train.py", "--tokenizer=no-end", "no-end: its config.json names no eos_token_id"),
    ("train.py", "--compare=out,nowhere", "nowhere: no such file; --compare takes"),
    ("train.py", "--compare=text.txt", "text.txt: not a metrics.jsonl"),
    ("train.py", "--compare=foreign/config.json", "config.json: not a metrics.jsonl"),
    ("train.py", "--detach=maybe", "write true or false"),
    ("train.py", "--init_from=nowhere", "nowhere does not exist"),
    ("train.py", "--init_from=truncated", "truncated"),
    ("train.py", "--init_from=other-shape", "belong to different models"),
    ("train.py", "--out_dir=out", "--resume"),
    ("report.py", "nowhere", "nowhere: no run here"),
    ("copies.py", "out", "out exists; remove it"),
    ("copies.py", "new --documents=0", "--documents=0: must lie between 1 and"),
    ("report.py", "kept-nowhere --collect=out/warmup", "out/warmup/metrics.jsonl: no such file"),
    ("report.py", "out --plots", "--plots keeps the pictures of a run"),
    ("report.py", "foreign --compare=out", "foreign/metrics.jsonl: no such file"),
    ("sample.py", "--checkpoint=nowhere", "nowhere"),
    ("sample.py", "--checkpoint=foreign", "model_type=gpt2"),
    ("sample.py", "--checkpoint=nojson", "JSON"),
    ("sample.py", "--checkpoint=truncated", "truncated"),
    ("sample.py", "--checkpoint=out/sparse --prompt_file=none.txt", "--prompt_file=none.txt: no such file"),
    ("sample.py", "--checkpoint=out/sparse --temperature=-1", "--temperature=-1.0: must be at least 0"),
    ("sample.py", "--checkpoint=out/sparse --top_p=2", "--top_p=2.0"),
    ("sample.py", "--checkpoint=out/sparse --num_tokens=100000", "max_position_embeddings"),
    ("sample.py", "--checkpoint=out/sparse --prompt=a -", "not several"),
    ("sample.py", "--checkpoint=out/sparse --device=cuda", "--device=cuda: not available"),
    ("sample.py", "--checkpoint=out/sparse --sead=1", "did you mean --seed"),
]


@pytest.fixture(scope="session")
def bad_files(place, run):
    (place / "empty.txt").write_text("")
    (place / "binary.bin").write_bytes(bytes(range(256)) * 100)
    (place / "short.txt").write_text("too short")
    (place / "bad.cfg").write_text("stage = dense\nwhat is this\n")
    for name in ("foreign", "nojson", "truncated", "other-shape", "no-end"):
        (place / name).mkdir()
        for file in (run[0] / "sparse").iterdir():
            (place / name / file.name).write_bytes(file.read_bytes())
    (place / "foreign" / "config.json").write_text('{"model_type": "gpt2"}')
    (place / "nojson" / "config.json").write_text("{")
    (place / "no-end" / "config.json").write_text("{}")
    (place / "no-end" / "tokenizer_config.json").unlink()
    weights = place / "truncated" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])
    config = place / "other-shape" / "config.json"
    config.write_text(config.read_text().replace('"hidden_size": 32', '"hidden_size": 40'))


@pytest.mark.parametrize("script,options,message", BAD, ids=[f"{s[:-3]} {o}" for s, o, _ in BAD])
def test_bad_input(place, bad_files, script, options, message):
    before = {p: p.stat().st_mtime_ns for p in place.rglob("*") if "cache" not in p.parts}
    options = options.split()
    sizes = [] if any("init_from" in o for o in options) else SIZES
    if script == "train.py":
        options = ["--data=text.txt", "--out_dir=bad", *sizes, *SHORT, *options]
    code, out, err = call(place, script, *options)
    assert code == 2, (out, err)
    assert message in err and err.count("\n") == 1 and "Traceback" not in err, err
    assert {p: p.stat().st_mtime_ns for p in place.rglob("*") if "cache" not in p.parts} == before


def test_help(place):
    code, out, _ = call(place, "train.py", "--help")
    assert code == 0 and all(f"--{name}" in out for name in ("stage", "init_from", "index_topk", "sparse_lr", "config"))
    assert call(place, "sample.py", "--help")[0] == 0


def test_graft_onto_a_published_checkpoint(place):
    """--init_from a DeepSeek-V2 model in bf16 as transformers saves it, with its own tokenizer: warm-up leaves all but the new indexers as they were."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from tokenizers import Tokenizer, models, pre_tokenizers
    config = transformers.DeepseekV2Config(vocab_size=300, hidden_size=32, intermediate_size=48, moe_intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
                                           q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, n_routed_experts=4, num_experts_per_tok=2,
                                           n_shared_experts=1, first_k_dense_replace=1, topk_method="greedy", max_position_embeddings=128, eos_token_id=1)
    transformers.DeepseekV2ForCausalLM(config).bfloat16().save_pretrained(place / "v2")
    tokenizer = Tokenizer(models.WordLevel({"?": 0, "<eos>": 1, **{c: i for i, c in enumerate("abcdefghijklmnopqrstuvwxyz0123456789:", 2)}}, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.save(str(place / "v2" / "tokenizer.json"))
    graft = lambda *args: call(place, "train.py", "--data=text.txt", *SHORT, "--dtype=bfloat16", "--out_dir=grafted", *args)
    code, _, err = graft("--init_from=v2", "--stage=warmup", "--index_topk=8", "--index_n_heads=2", "--index_head_dim=16")
    assert code == 0, err
    before, after = load_file(place / "v2" / "model.safetensors"), load_file(place / "grafted" / "warmup" / "model.safetensors")
    assert all((before[name] == after[name]).all() for name in before) and {n.split(".indexer.")[0][-9:] for n in after.keys() - before.keys()} == {"self_attn"}
    assert all("loss" in r and r["grad_norm"] == 0 for r in metrics(place / "grafted"))
    code, _, err = graft("--stage=sparse", "--train=attention")
    assert code == 0, err
    sparse = load_file(place / "grafted" / "sparse" / "model.safetensors")
    assert all((x.dtype == torch.float32) == (".indexer." in name) for name, x in sparse.items())
    changed = {name for name, x in sparse.items() if (x != after[name]).any()}
    assert changed and all(".self_attn." in name for name in changed)
    code, out, err = call(place, "sample.py", "--checkpoint=grafted/sparse", "--prompt=line", "--num_tokens=12")
    assert code == 0 and "sparse attention, top-k 8" in err, err


def test_bfloat16_weights_train_in_float32():
    """Steps of a small learning rate, less than half a bf16 digit of most weights, add up."""
    model = Transformer(Config(num_hidden_layers=1)).bfloat16()
    main, index = trainable(model, "sparse", "attention")
    assert {p.dtype for p in main + index} == {torch.float32} and {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    before, optimizer = [p.detach().clone() for p in main], torch.optim.AdamW(main, lr=1e-6)
    for p in main:
        p.grad = torch.ones_like(p)
    for _ in range(3):
        optimizer.step()
    assert all((p != old).all() for p, old in zip(main, before))


def test_resumes_without_what_it_started_from(place, run):
    (place / "moved").mkdir()
    stored = json.loads((run[0] / "run.json").read_text())
    stored["options"]["init_from"] = "gone"
    (place / "moved" / "run.json").write_text(json.dumps(stored))
    assert resolve(["--resume", f"--out_dir={place / 'moved'}"])[0].init_from == "gone"


def test_readme_points_at_what_it_names():
    """The reading order's lines hold definitions, and its pictures and files exist."""
    text = (HERE / "README.md").read_text()
    places = re.findall(r"\[(\w+\.py):(\d+)\]\((\w+\.py)#L(\d+)\)", text)
    assert len(places) > 10
    for file, line, linked, anchor in places:
        assert (file, line) == (linked, anchor) and (HERE / file).read_text().splitlines()[int(line) - 1].startswith(("def ", "class ")), (file, line)
    for target in re.findall(r"\]\((results/[^)]+)\)", text):
        assert (HERE / target).exists(), target
