"""post_train.py: batches and rewards, the chain as a user runs it, resuming, chatting, bad input."""
import json
import os
import signal
from random import Random

import pytest
import torch

import generate
import post_train
import rewards
import tasks
from config import Config
from model import Transformer
from support import chat, post_report, runs
from tests.scripts import SIZES, call, edit_json, finish, metrics, refused, start

TINY = (
    *SIZES, "--page=12", "--block_size=192", "--batch_size=1", "--dense_steps=3", "--warmup_steps=2",
    "--sparse_steps=2", "--judge_steps=2", "--distillation_steps=2", "--answers=2", "--specialist_steps=2",
    "--mixed_steps=2", "--rows=8", "--group=4", "--live_groups=1", "--draws=1", "--micro_rows=4",
    "--eval_tasks=2", "--eval_samples=2", "--ramp_steps=1")


def post(home, out_dir, *args):
    """post_train.py with a small model and few steps."""
    return call(home, "post_train.py", f"--out_dir={out_dir}", *TINY, *args)


def options_of(**values):
    return post_train.Options(**values)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A user's folder apart: the runs here have names that other tests' runs have, too."""
    return tmp_path_factory.mktemp("post")


@pytest.fixture(scope="module")
def chain(home):
    """-> the folder of a chain of all stages in two domains, run in a process of its own, and what it
    printed."""
    process = start(home, "post_train.py", "--out_dir=chain", *TINY, "--domains=math,writing")
    code, out, err = finish(process)
    assert code == 0, err
    return home / "chain", out


# ---- batches ----

@pytest.mark.parametrize("page, shortest, longest", [(24, 12, 24), (200, 100, 200), (3200, 100, 3200)])
def test_long_pages_are_learned_from_shorter_ones(page, shortest, longest):
    """Pages of a demonstration: of the task's own lengths up to EASY_PAGE, of all between beyond."""
    options = options_of(page=page, domains="search")
    [job] = [job for job in post_train.plan(options, "base") if job.name == "base"]
    lengths = []
    for seed in range(400):
        prompt, _ = post_train.demonstration(Random(seed), job, options)
        if prompt[-1] == tasks.ANSWER:
            lengths.append(len(tasks.decode(prompt[1:-1])) - len("read  ?"))
    assert shortest <= min(lengths) < 1.5 * shortest and 0.8 * longest < max(lengths) <= longest
    if page > post_train.EASY_PAGE:  # from 200 to 3200 their logarithms are spread evenly, each below by half
        middle = sorted(lengths)[len(lengths) // 2]
        assert 450 < middle < 800


def test_packed_documents():
    """By a loop over each row: documents whole, their bounds, the weight of each target."""
    options = options_of(batch_size=3, block_size=60)
    random = Random(1)
    documents = []
    for _ in range(40):
        task = tasks.make(random, "agent")
        documents.append((task.prompt(), task.demo(random)))
    source = iter(documents)
    ids, weight, first = post_train.packed(source, options)
    assert ids.shape == (3, 61) and weight.shape == first.shape == (3, 60) and first.dtype == torch.int32
    taken = iter(documents)
    for row in range(3):
        at = 0
        while at < 61 and ids[row, at] != tasks.EOT:
            prompt, out = next(taken)
            text = prompt + out
            assert ids[row, at:at + len(text)].tolist() == text
            assert (first[row, at:at + len(text)] == at).all()
            wanted = [post_train.PROMPT_WEIGHT] * (len(prompt) - 1) + tasks.own_tokens(out)
            assert weight[row, at:at + len(text) - 1].tolist() == pytest.approx([float(w) for w in wanted])
            if at:
                assert weight[row, at - 1] == 0
            at += len(text)
        assert not weight[row, at:].any()


# ---- rewards ----

def test_rewards():
    """A right answer is worth 1 less its length and the other language; a wrong one nothing, whatever its
    length and language; a rubric's what the judge says."""
    random = Random(0)
    math = tasks.make(random, "math", "think")
    writing = tasks.make(random, "writing")
    mine = tasks.WORDS["so"][math.language]
    other = tasks.WORDS["so"][1 - math.language]
    total = str(math.a + math.b)
    outs = [tasks.thinking(mine, total), tasks.thinking(other, total), tasks.thinking(mine, "x"),
            writing.demo(random), [tasks.USER, tasks.EOT]]
    batch = [math, math, math, writing, writing]

    def judge(batch, episodes):
        assert batch == [writing, writing] and episodes[1] is None
        return [(2 / 3, 1 / 3), (0.0, None)]

    options = options_of(length_penalty=0.1, language_penalty=0.3)
    scored = rewards.rewards_of(options, batch, outs, judge)
    lengths = [0.1 * len(out) / math.limit for out in outs[:2]]
    wanted = [1 - lengths[0], 1 - 0.3 - lengths[1], 0.0, 2 / 3, 0.0]
    assert [result["reward"] for result in scored] == pytest.approx(wanted)
    assert scored[3]["ok"] == 1.0 and scored[4]["ok"] == 0.0  # the truth, which is no reward
    facts = rewards.summary(scored, list(zip(batch, outs)))
    assert facts["ok math/think"] == pytest.approx(2 / 3) and facts["ok writing/direct"] == 0.5
    assert facts["judge"] == pytest.approx(1 / 3) and facts["agreement"] == pytest.approx(1 / 3)


def test_domains_of_mixed_and_sequential_steps():
    """Equally many groups of each; all in every step, or one after the other."""
    options = options_of(rows=32, group=4, mixed_steps=6)
    domains = ["math", "logic", "code"]
    for name, distinct in (("mixed-base", 3), ("sequential", 1)):
        job = post_train.Job(name, "grpo", "", 6, 1e-3, domains, 1)
        steps = [[post_train.domain_of(job, options, step, group) for group in range(8)] for step in range(6)]
        assert all(len(set(step)) == distinct for step in steps)
        counts = [sum(steps, []).count(domain) for domain in domains]
        assert counts == [16, 16, 16]
    assert [step[0] for step in steps] == ["math", "math", "logic", "logic", "code", "code"]


# ---- the chain ----

MODELS = ("dense", "warmup", "base", "judge", "specialist-math", "specialist-writing", "generalist",
          "mixed-base", "mixed", "sequential")


def test_chain(chain):
    folder, out = chain
    for name in MODELS:
        model = Transformer.from_pretrained(folder / name)
        assert model.attention == "sparse"
    assert not list(folder.glob("state-*")) and not list(folder.glob("*.part"))
    records = metrics(folder)
    steps = {name: [r["step"] for r in records if r["stage"] == name] for name in MODELS}
    assert all(steps[name] == [0, 1] for name in MODELS if name not in ("dense", "judge", "generalist"))
    for r in records:
        if "reward" in r:
            assert {"live", "length", "rollout_tokens_per_second", "lr"} <= r.keys()
            if "mismatch" in r:
                assert r["mismatch"] < 2e-5 and {"kl", "drift", "masked", "clipped", "index_kl"} <= r.keys()
    found = json.loads((folder / "evaluation.json").read_text())
    rows = post_report.rows_of(found)
    assert set(rows) == {(f"level {level}", row) for level in (1, 2)
                         for row in ("math/think", "math/direct", "writing/direct")}
    assert set(rows["level 1", "math/think"]) == {"base", "specialist-math", "generalist", "mixed-base",
                                                  "sequential", "mixed"}
    assert set(rows["level 2", "math/think"]) == {"base", "generalist", "mixed"}
    assert len(found["judge"]["agreement"]) == 3 and len(found["replay"]) == 8
    assert (folder / "plot.png").stat().st_size > 10000
    assert "| math/think, level 1 |" in out and "sample.py --chat" in out


def test_a_stage_is_not_replaced_unasked(home, chain):
    again = post(home, "chain", "--domains=math,writing", "--stage=mixed")
    refused(again, "mixed-base exists", "--overwrite")


def test_overwrite_keeps_what_the_run_starts_from(home, chain):
    args = [arg for arg in TINY if arg not in SIZES]
    refused(call(home, "post_train.py", "--out_dir=chain", "--init_from=chain/base", *args, "--stage=base",
                 "--overwrite", "--domains=math,writing"), "is what --overwrite would replace")
    assert (chain[0] / "base" / "config.json").is_file()


def test_what_a_later_stage_cannot_change(home, chain):
    for change in ("--page=13", "--seed=1", "--hidden_size=64"):
        result = call(home, "post_train.py", "--out_dir=chain", "--stage=mixed", "--overwrite", change)
        refused(result, change, "the run in chain has")


def test_evaluation_goes_on(home, chain):
    """With --resume nothing is measured twice."""
    path = chain[0] / "evaluation.json"
    edit_json(path, spoil)
    code, _, err = call(home, "post_train.py", "--out_dir=chain", "--stage=evaluate", "--resume")
    assert code == 0, err
    found = json.loads(path.read_text())
    assert found["base, level 1, math/think"]["ok at 1"] == 0.125
    assert "mixed, level 2, math/direct" in found


def test_evaluation_keeps_what_it_does_not_measure(home, chain):
    """Another call, without --resume, measures what it is asked for anew, and leaves the rest."""
    path = chain[0] / "evaluation.json"

    def mark(found):
        for level in (1, 2):
            found[f"base, level {level}, math/think"]["ok at 1"] = 0.375

    edit_json(path, mark)
    code, _, err = call(home, "post_train.py", "--out_dir=chain", "--stage=evaluate", "--level=2")
    assert code == 0, err
    found = json.loads(path.read_text())
    assert found["base, level 1, math/think"]["ok at 1"] == 0.375
    # of two tasks, two answers each
    assert found["base, level 2, math/think"]["ok at 1"] in (0, 0.25, 0.5, 0.75, 1)
    assert "base, level 3, math/think" in found


def spoil(found):
    found["base, level 1, math/think"]["ok at 1"] = 0.125
    del found["mixed, level 2, math/direct"]


def losses(folder):
    """What two equal runs have in common: everything but seconds."""
    same = []
    for record in metrics(folder):
        same.append({name: value for name, value in record.items() if "second" not in name})
    return same


@pytest.mark.parametrize("job,stage", [("base", "base"), ("specialist-search", "specialists")])
def test_resume_is_the_run(home, monkeypatch, job, stage):
    """Interrupted in the first step of a supervised and of a GRPO job: same numbers, same weights."""
    args = ("--domains=search", "--specialist_steps=3", "--sparse_steps=3")
    whole = home / "whole"
    if not whole.exists():
        for name in ("base", "specialists"):
            assert post(home, "whole", *args, f"--stage={name}")[0] == 0
    broken = f"broken-{stage}"
    if stage == "specialists":
        assert post(home, broken, *args, "--stage=base")[0] == 0
    learner = post_train.Supervised if stage == "base" else post_train.Learner
    original = learner.step

    def interrupted(self, run, at, *rest):
        if at.name == job and rest[-1] == 1:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, run, at, *rest)

    monkeypatch.setattr(learner, "step", interrupted)
    code, _, err = post(home, broken, *args, f"--stage={stage}")
    assert code == 130 and "--resume" in err, err
    assert (home / broken / f"state-{job}").is_dir() and not (home / broken / job).exists()
    monkeypatch.setattr(learner, "step", original)
    code, _, err = post(home, broken, *args, f"--stage={stage}", "--resume")
    assert code == 0, err
    if stage == "base":  # the options of the run are those of the stage that made its base
        assert call(home, "post_train.py", f"--out_dir={broken}", "--stage=specialists")[0] == 0
    assert losses(home / broken) == losses(whole)
    for model in ("base", "specialist-search"):
        a = (whole / model / "model.safetensors").read_bytes()
        assert a == (home / broken / model / "model.safetensors").read_bytes()


def test_from_a_checkpoint_of_train(home, run):
    """Its indexer is kept, and learns on in the sparse stage."""
    folder = run[0] / "sparse"
    args = [arg for arg in TINY if arg not in SIZES]
    code, _, err = call(home, "post_train.py", "--out_dir=from-train", f"--init_from={folder}", *args,
                        "--stage=base", "--domains=math")
    assert code == 0, err
    old = Transformer.from_pretrained(folder)
    new = Transformer.from_pretrained(home / "from-train" / "base")
    assert new.config.index_topk == old.config.index_topk
    assert not (home / "from-train" / "dense").exists()
    step = {name: (p - dict(old.named_parameters())[name]).abs().max() for name, p in new.named_parameters()}
    assert 0 < max(step.values()) < 0.01


def test_later_stages_of_a_run_from_a_checkpoint(home):
    """They know its sizes and its page from the run: neither has to be given again."""
    torch.manual_seed(0)
    sizes = dict(size.removeprefix("--").split("=") for size in SIZES)
    sizes = {name: int(value) for name, value in sizes.items()} | dict(index_topk=5)
    Transformer(Config(vocab_size=300, **sizes)).save_pretrained(home / "k5", "bytes")
    args = [arg for arg in TINY if arg not in SIZES and "--page" not in arg]
    code, _, err = call(home, "post_train.py", "--out_dir=from-k5", "--init_from=k5", *args, "--stage=base",
                        "--domains=math")
    assert code == 0, err
    code, out, err = call(home, "post_train.py", "--out_dir=from-k5", "--stage=specialists")
    assert code == 0 and "--page=24" in out, err
    assert Transformer.from_pretrained(home / "from-k5" / "specialist-math").config.index_topk == 5


def test_evaluation_of_what_was_replaced_goes(home):
    """With --resume only what was measured of the same checkpoint stays."""
    args = ("--domains=math", "--stage=base")
    assert post(home, "replaced", *args)[0] == 0
    path = home / "replaced" / "evaluation.json"
    path.write_text("{}")
    assert call(home, "post_train.py", "--out_dir=replaced", "--stage=evaluate", "--resume")[0] == 0
    assert json.loads(path.read_text())
    assert post(home, "replaced", *args, "--overwrite")[0] == 0 and not path.exists()


def test_a_device_without_fp8_is_compared_without(home, chain, monkeypatch):
    options = ("--out_dir=chain", "--stage=evaluate", "--resume", "--index_fp8=false")
    monkeypatch.setattr(post_train.cli, "has_e4m3", lambda device: False)
    code, out, err = call(home, "post_train.py", *options)
    assert code == 0 and "own cache" in out and "FP8 cache" not in out, err


def test_full_disk_names_the_state(tmp_path):
    """What can be gone on from has another name than train.py's."""
    (tmp_path / "state-specialist-math").mkdir()
    (tmp_path / "state-mixed.part").mkdir()
    with pytest.raises(OSError, match="state-specialist-math is complete"), runs.saving(tmp_path):
        raise OSError("full")


# ---- chat ----

def test_transformers_renders_the_same_ids(chain):
    transformers = pytest.importorskip("transformers")
    made = transformers.AutoTokenizer.from_pretrained(chain[0] / "mixed")

    def render(messages, **options):
        return made.apply_chat_template(messages, tokenize=True, return_dict=False, **options)

    task = tasks.make(Random(0), "math", "think")
    task.question += " öß\u4e2d"
    message = dict(role="user", content=task.question)
    assert render([message], add_generation_prompt=True, enable_thinking=True) == task.prompt()
    task.mode = "direct"
    assert render([message], add_generation_prompt=True) == task.prompt()
    answered = dict(role="assistant", content="12", reasoning_content="5+7=12")
    assert render([message, answered]) == [
        *task.prompt()[:-1], tasks.THINK, *tasks.thinking("5+7=12", "12")]
    assert made.decode([tasks.CALL, 97, tasks.REPLY]) == "<|call|>a<|reply|>"


def test_chat(home, chain):
    for args in (["--domain=math"], ["--domain=math", "--think"], ["--prompt=hello"]):
        code, out, err = call(home, "sample.py", "--chat", "--checkpoint=chain/mixed", *args)
        assert code == 0 and out.startswith("<|user|>"), err
        assert ("<|think|>" if "--think" in args else "<|answer|>") in out
        assert ("[math: " in err) == ("--domain=math" in args)


@pytest.mark.parametrize("tokens, shown", [
    (20, "<|call|>a<|reply|>none<|end|><|answer|>x\n"), (5, "<|call|>a<|reply|>no\n")])
def test_chat_shows_what_a_tool_replies(home, chain, tokens, shown, monkeypatch):
    """Whole, or as far as the limit lets it."""
    script = iter([tasks.CALL, 97, tasks.REPLY, tasks.ANSWER, 120, tasks.EOT])
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor([next(script)]))
    code, out, err = call(home, "sample.py", "--chat", "--checkpoint=chain/mixed", "--prompt=hello",
                          "--think", f"--num_tokens={tokens}")
    assert code == 0, err
    assert out == "<|user|>hello<|think|>" + shown


@pytest.mark.parametrize("args,words", [
    (["--think"], ["--chat"]), (["--chat"], ["--prompt=TEXT"]),
    (["--chat", "--count=2", "--prompt=a"], ["once"]),
    (["--chat", "--domain=agent"], ["agent has think"]), (["--chat", "--domain=poetry"], ["invalid choice"]),
    (["--chat", "--domain=math", "--prompt=a"], ["its own question"]),
    (["--chat", "--domain=math", "--level=9"], ["--level=9"])])
def test_chat_refuses(home, chain, args, words):
    refused(call(home, "sample.py", "--checkpoint=chain/mixed", *args), *words)


def test_chat_needs_turn_tokens(home, run, chain):
    result = call(home, "sample.py", "--chat", "--prompt=a", f"--checkpoint={run[0]}/sparse")
    refused(result, "no turn tokens")
    assert chat.turns_of(chain[0] / "base") == tasks.TURNS


# ---- bad input ----

@pytest.mark.parametrize("args,words", [
    (["--domains=math,poetry"], ["--domains=math,poetry", "choose from"]),
    (["--rows=9", "--group=4"], ["--rows=9", "multiple"]), (["--group=1"], ["--group=1"]),
    (["--level=0"], ["--level=0"]), (["--level=6", "--block_size=900"], ["--level=6"]),
    (["--max_position_embeddings=100"], ["--block_size=192", "max_position_embeddings=100"]),
    (["--max_position_embeddings=192", "--page=40"], ["rollouts", "max_position_embeddings=192"]),
    (["--stage=evaluate"], ["base", "does not exist"]),
    (["--clip=0"], ["--clip=0"]), (["--top_p=1.5"], ["--top_p=1.5"]),
    (["--temperature=0"], ["--temperature=0"]), (["--rl_lr=nan"], ["--rl_lr=nan"]),
    (["--live_groups=99"], ["--live_groups=99", "--draws"]),
    (["--block_size=64"], ["--block_size=64", "--page"]),
    (["--page=500"], ["--block_size=192", "--page"]), (["--index_topk=0"], ["--index_topk=0"]),
    (["--index_topk=192"], ["--block_size=192"]), (["--num_attention_heads=0"], ["num_attention_heads=0"]),
    (["--init_from=nowhere"], ["nowhere"]), (["--stage=specialists"], ["specialist-math", "does not exist"]),
    (["--stage=sideways"], ["invalid choice"]), (["--resume"], ["run.json", "does not exist"]),
    (["--backend=triton"], ["CUDA GPU"]), (["--device=tpu"], ["--device=tpu"]),
    (["--steps=3"], ["--steps=3"])])
def test_bad_options(home, args, words):
    refused(post(home, "bad", *args), *words)
    assert not (home / "bad").exists()


def test_what_a_stage_needs_is_found_missing_before_it_starts(home):
    """Not after other jobs of the stage, or in the middle of it."""
    assert post(home, "needs", "--domains=math", "--stage=base")[0] == 0
    for args, missing in (
            (["--stage=distillation"], "specialist-math"),
            (["--stage=specialists", "--domains=math,writing"], "judge"),
            (["--stage=mixed", "--domains=writing"], "generalist")):
        refused(call(home, "post_train.py", "--out_dir=needs", *args), missing, "does not exist")
    assert not (home / "needs" / "specialist-math").exists()


def test_torchrun_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(ValueError, match="2 processes of torchrun.*start it with python"):
        post_train.resolve([])


def test_checkpoints_that_cannot_be_started_from(home, run):
    refused(post(home, "bad", f"--init_from={run[0]}/dense", "--hidden_size=64"), "--hidden_size=64")
    torch.manual_seed(0)
    Transformer(Config(vocab_size=300, index_topk=0)).save_pretrained(home / "dense-only", "bytes")
    args = [arg for arg in TINY if arg not in SIZES]
    refused(call(home, "post_train.py", "--init_from=dense-only", *args), "no indexer")
    Transformer(Config(vocab_size=60)).save_pretrained(home / "small-words", "bytes")
    refused(call(home, "post_train.py", "--init_from=small-words", *args), "in bytes")


def test_damaged_files(home, chain):
    resume = ("post_train.py", "--out_dir=damaged", "--resume", "--stage=all")
    folder = home / "damaged"
    folder.mkdir()
    (folder / "run.json").write_text("{")
    refused(call(home, *resume), "run.json", "JSON")
    (folder / "run.json").write_text(json.dumps(dict(options=dict(rows="many"))))
    refused(call(home, *resume), "rows='many'")
    (folder / "run.json").write_text((chain[0] / "run.json").read_text())
    state = folder / "state-dense"
    state.mkdir()
    (state / "trainer.pt").write_bytes(b"no")
    refused_late(call(home, *resume), "trainer.pt", "remove")
    (folder / "metrics.jsonl").write_text("no\n{}\n")
    (state / "trainer.pt").unlink()
    state.rmdir()
    refused_late(call(home, *resume), "metrics.jsonl, line 1")


def refused_late(result, *words):
    """As `refused`, of something that is found when a stage begins."""
    code, _, err = result
    assert code == 2 and err.count("\n") == 1, err
    for word in words:
        assert word in err, err


def test_every_option_says_what_it_is(home):
    code, out, _ = call(home, "post_train.py", "--help")
    assert code == 0
    shown = " ".join(out.split())
    for field in post_train.fields(post_train.Options):
        assert f"--{field.name}" in shown and " ".join(field.metadata["help"].split()) in shown, field.name
