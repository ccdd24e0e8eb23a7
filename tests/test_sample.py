"""sample.py as a user runs it: prompts, what is printed, where it stops, what it says of its speed."""
import re
import shutil
import subprocess
import sys

import pytest
import torch

import generate
from tests.scripts import call, edit_json, environment, finish, start

EOT = 256


@pytest.fixture
def ask(place, run):
    """-> a function that samples from the run's sparse checkpoint."""
    def sample(*args, stdin=b""):
        return call(place, "sample.py", f"--checkpoint={run[0]}/sparse", *args, stdin=stdin)
    return sample


def scripted(monkeypatch, *rows):
    """Let generation draw these tokens, a list per row, instead of the model's."""
    tokens = iter(zip(*rows))
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor(next(tokens)))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_sample(place, ask, attention):
    (place / "prompt.txt").write_text("line 12: the square of 12 is 144\n" * 3)
    greedy = ("--num_tokens=20", f"--attention={attention}", "--temperature=0")
    code, out, err = ask(*greedy, "--prompt_file=prompt.txt", "--chunk=17")
    assert code == 0, err
    assert out.startswith("line 12: the square")
    said = rf"{attention} attention, top-k 8: prompt 99 tokens in .* tokens/s; cache \d+ bytes per token"
    assert re.search(said, err)
    assert "these are 119 tokens, and the model was trained on contexts of 32" in err
    assert ask(*greedy, "-", stdin=(place / "prompt.txt").read_bytes())[1] == out
    assert ask(*greedy, f"--prompt={(place / 'prompt.txt').read_text()}")[1] == out


def test_same_seed_same_text(ask):
    draw = ("--num_tokens=30", "--top_k=50", "--top_p=0.9", "--cache=fp8", "--prompt=line")
    assert ask(*draw)[1] == ask(*draw)[1] != ask(*draw, "--seed=3")[1]


def test_a_prompt_of_many_times_the_candidates(place, run, ask):
    """By a model of k = 8 in two levels, FP8 caches: the same text whatever the chunks, and with all tokens
    as candidates that of one level."""
    text = "".join(f"line {i}: the square of {i} is {i * i}\n" for i in range(60))
    (place / "long.txt").write_text(text)
    shutil.copytree(run[0] / "sparse", place / "prompted")
    edit_json(place / "prompted" / "config.json", lambda config: config.update(index_exact_layers=0))
    options = (
        "--checkpoint=prompted", "--prompt_file=long.txt", "--num_tokens=20", "--temperature=0",
        "--cache=fp8")
    code, out, err = ask(*options, "--index_block=16", "--index_candidates=32", "--chunk=500")
    assert code == 0 and f"prompt {len(text)} tokens" in err and len(text) > 1500, err
    assert out.startswith(text)
    assert ask(*options, "--index_block=16", "--index_candidates=32")[1] == out
    every = ask(*options, "--index_block=16", "--index_candidates=9999")[1]
    assert every == ask(*options, "--index_block=0")[1]


def test_count(ask):
    code, out, err = ask("--count=3", "--num_tokens=12", "--prompt=line ")
    parts = out.split("-" * 20 + "\n")
    assert code == 0 and parts[0] == "" and len(parts) == 4, err
    assert all(part.startswith("line ") for part in parts[1:]) and len(set(parts)) == 4


def test_stops_at_the_end_of_text(ask, monkeypatch):
    """Which is not printed, and nothing behind it."""
    scripted(monkeypatch, [*b"ab", EOT, *b"cd"])
    code, out, err = ask("--prompt=x", "--num_tokens=5")
    assert (code, out) == (0, "xab\n"), err


def test_ignore_eos_goes_on(ask, monkeypatch):
    scripted(monkeypatch, [*b"ab", EOT, *b"cd"])
    assert ask("--prompt=x", "--num_tokens=5", "--ignore_eos")[1] == "xab<|endoftext|>cd\n"


def test_each_of_several_stops_by_itself(ask, monkeypatch):
    """What comes behind its end is neither printed nor counted: 9 tokens, of which the first step made 3."""
    scripted(monkeypatch, [*b"a", EOT, *b"zzz"], [*b"bcd", EOT, *b"z"], [EOT, *b"zzzz"])
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    code, out, err = ask("--prompt=x", "--num_tokens=5", "--count=3")
    line = "-" * 20
    assert (code, out) == (0, f"{line}\nxa\n{line}\nxbcd\n{line}\nx\n"), err
    # 2 + 4 + 1 tokens, 3 of them in the first step; three more steps of a second each
    assert f"then {(7 - 3) / 3:.1f} tokens/s" in err


def test_any_end_of_text_of_the_model(place, run, monkeypatch):
    """A list in config.json: every one of them stops."""
    shutil.copytree(run[0] / "sparse", place / "two ends")
    edit_json(place / "two ends" / "config.json", lambda values: values.update(eos_token_id=[EOT, ord("!")]))
    scripted(monkeypatch, [*b"ab!cd"], [*b"b", EOT, *b"!cd"])
    sample = ("sample.py", "--checkpoint=two ends", "--prompt=x", "--num_tokens=5", "--count=2")
    code, out, err = call(place, *sample)
    assert code == 0 and out.replace("-" * 20 + "\n", "") == "xab\nxb\n", err


def test_characters_of_several_tokens(ask, monkeypatch):
    """Bytes of one character come out together, an incomplete one at the end as a replacement."""
    scripted(monkeypatch, [*"é€😀".encode(), *"€".encode()[:2]])
    code, out, err = ask("--prompt=ß", "--num_tokens=11")
    assert code == 0 and out.startswith("ßé€😀") and set(out[4:-1]) == {"\ufffd"}, (out, err)


@pytest.mark.parametrize("how", ["file", "stdin", "option"])
def test_a_byte_order_mark_is_no_text(place, ask, how):
    text = "\ufeffline 1"
    (place / "bom.txt").write_text(text, encoding="utf-8")
    args = dict(file="--prompt_file=bom.txt", stdin="-", option=f"--prompt={text}")
    code, out, err = ask(args[how], "--num_tokens=3", "--temperature=0", stdin=text.encode())
    plain = ask("--prompt=line 1", "--num_tokens=3", "--temperature=0")
    assert code == 0 and out == plain[1] and "prompt 6 tokens" in err


def test_a_spelled_special_token_is_text(ask):
    """13 bytes, or with --special one token."""
    tokens = ("--prompt=<|endoftext|>ab", "--num_tokens=3")
    assert "prompt 15 tokens" in ask(*tokens)[2]
    code, out, err = ask(*tokens, "--special")
    assert code == 0 and "prompt 3 tokens" in err and out.startswith("<|endoftext|>ab")


def test_without_a_prompt_a_document_begins(ask):
    code, out, err = ask("--num_tokens=3", "--temperature=0")
    assert code == 0 and "prompt 1 tokens" in err and not out.startswith("<|endoftext|>")
    special = ask("--num_tokens=3", "--temperature=0", "--special", "--prompt=<|endoftext|>")
    assert special[1] == "<|endoftext|>" + out


def test_in_a_process_of_its_own(place, run):
    """A prompt through a pipe; and a reader that closes it early is no error."""
    sample = ("sample.py", f"--checkpoint={run[0]}/sparse", "--num_tokens=10", "--temperature=0")
    code, out, err = finish(start(place, *sample, "-"), "line 1: ")
    assert code == 0 and out.startswith("line 1: ") and err.startswith("[sparse attention"), err
    process = start(place, *sample)
    process.stdout.close()
    process.stdin.close()
    assert process.wait(120) == 0 and "Traceback" not in process.stderr.read()


@pytest.mark.parametrize("backend", ["torch", "triton"])
def test_the_compiler_stays_out(place, run, backend):
    """Importing torch's compiler would take longer than a short answer."""
    told = [f"--checkpoint={run[0]}/sparse", "--prompt=line", "--num_tokens=2", f"--backend={backend}"]
    code = (f"import sys; sys.argv = {['sample.py', *told]}; import sample; sample.main(); "
            "assert 'torch._dynamo' not in sys.modules")
    if backend == "triton":
        pytest.importorskip("triton")
        if torch.cuda.is_available():
            pytest.skip("here the kernels run, and are not interpreted")
    interpreted = environment(place) | dict(TRITON_INTERPRET="1")
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=place, env=interpreted, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
