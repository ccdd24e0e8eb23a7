"""What users give to scripts and did not expect: places, streams, environments, files of other programs. Each
was once lost data, a wrong number, or a traceback."""
import os
import re
import shutil
import subprocess
import sys

import pytest
import tokenizers
import torch
from tokenizers import models, pre_tokenizers

from model import Transformer
from support import files, tokenizer
from tests.scripts import ROOT, SHORT, SIZES, call, edit_json, environment, finish, refused, start, train


@pytest.fixture
def copied(place, run, request):
    """-> a copy of the run, for this test alone."""
    name = re.sub(r"\W", "-", request.node.name)
    shutil.copytree(run[0], place / name)
    return place / name


def folder_tokenizer(folder, model, eos=None):
    """A folder with this tokenizer of the library, splitting at spaces."""
    folder.mkdir()
    inner = tokenizers.Tokenizer(model)
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.save(str(folder / "tokenizer.json"))
    if eos is not None:
        files.write_json(folder / "config.json", dict(eos_token_id=eos))
    return folder


# ---- nothing that was there is lost ----

def test_overwrite_keeps_what_the_run_reads(place, copied):
    refused(train(place, copied.name, "--overwrite", f"--tokenizer={copied.name}/sparse"),
            "--tokenizer=", "is what --overwrite would replace")
    assert (copied / "sparse" / "model.safetensors").is_file()


def test_overwrite_waits_until_the_log_is_there(place, copied, monkeypatch):
    """What may refuse to begin does so before checkpoints go."""
    def no_account(*args):
        raise ValueError("no account")

    monkeypatch.setattr("support.logs.start", no_account)
    refused(train(place, copied.name, "--overwrite"), "no account")
    assert {path.name for path in copied.iterdir()} >= {"dense", "warmup", "sparse"}


def test_the_plot_needs_no_backend_of_a_notebook(place):
    values = environment(place) | dict(MPLBACKEND="module://not_there.backend_inline")
    command = [sys.executable, ROOT / "train.py", "--data=text.txt", "--out_dir=notebook", "--stage=dense",
               *SIZES, *SHORT]
    done = subprocess.run(command, cwd=place, env=values, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (place / "notebook" / "plot.png").is_file()


def test_a_page_does_not_replace_its_text(place, run):
    shutil.copy(place / "text.txt", place / "own.txt")
    refused(call(place, "view.py", f"--checkpoint={run[0]}/sparse", "--text=own.txt", "--out=./own.txt"),
            "is the text itself")
    assert (place / "own.txt").read_bytes() == (place / "text.txt").read_bytes()


# ---- the corpus ----

def test_a_corpus_around_the_run(place, tmp_path):
    """--data=.: what a run writes is no text to train on, and no change of the text."""
    shutil.copy(place / "text.txt", tmp_path / "a.txt")
    (tmp_path / "b.txt").write_text("another document\n" * 200)
    options = ("--data=.", "--out_dir=out", *SIZES, *SHORT)
    code, _, err = call(tmp_path, "train.py", *options)
    assert code == 0, err
    code, _, err = call(tmp_path, "train.py", *options, "--stage=sparse", "--overwrite")
    assert code == 0 and "tokenizing" not in err, err
    (tmp_path / "b.txt").write_text("another document\n" * 201)
    code, _, err = call(tmp_path, "train.py", *options, "--stage=sparse", "--overwrite")
    assert code == 0 and "1 runs of train.py (first: out)" in err, err


def test_a_long_name_in_another_script(place):
    name = "長い名前" * 20 + ".txt"  # 244 bytes
    shutil.copy(place / "text.txt", place / name)
    code, _, err = call(place, "train.py", f"--data={name}", "--out_dir=long-name", "--stage=dense", *SIZES,
                        *SHORT)
    assert code == 0, err


def test_a_tokenizer_that_drops_characters_says_so(place):
    vocabulary = {"<e>": 0, "l": 1, "i": 2, "n": 3, "e": 4, "square": 5, "1": 6, ":": 7}
    folder_tokenizer(place / "drops", models.BPE(vocabulary, []), 0)
    code, _, err = call(place, "train.py", "--data=text.txt", "--tokenizer=drops", "--out_dir=dropping",
                        "--stage=dense", *SIZES, *SHORT)
    assert code == 0 and "left out all ! \"" in err and " A B " in err and " 1 " not in err, err
    assert tokenizer.tokenizer("bytes").lost() == ""


@pytest.mark.parametrize("model", [
    models.WordLevel({"<e>": 0, "line": 1}, unk_token="[UNK]"),
    models.WordPiece({"<e>": 0, "line": 1}, unk_token="[UNK]"),
    models.BPE({"<e>": 0, "l": 1}, [], unk_token="<unk>")], ids=["WordLevel", "WordPiece", "BPE"])
def test_a_tokenizer_without_its_unknown_token(place, model, tmp_path):
    folder = folder_tokenizer(tmp_path / "no-unknown", model, 0)
    refused(train(place, "no-unknown", f"--tokenizer={folder}"), "tokenizer.json: cannot encode this text")
    with pytest.raises(ValueError, match="cannot encode"):
        tokenizer.load_tokenizer(folder).encode("zebra", special=True)


def test_a_prompt_of_known_tokens_needs_no_unknown_token(place, run, tmp_path):
    """With --special `<e>` is its token, which as text the tokenizer could not say."""
    shutil.copytree(run[0] / "sparse", tmp_path / "sparse")
    (tmp_path / "sparse" / "tokenizer_config.json").unlink()
    edit_json(tmp_path / "sparse" / "config.json", lambda values: values.update(eos_token_id=0))
    inner = tokenizers.Tokenizer(models.WordLevel({"<e>": 0, "line": 1}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<e>"])
    inner.save(str(tmp_path / "sparse" / "tokenizer.json"))
    asked = ("sample.py", f"--checkpoint={tmp_path / 'sparse'}", "--prompt=<e> line", "--num_tokens=1")
    code, out, err = call(place, *asked, "--special")
    assert code == 0 and out.startswith("<e> line") and "prompt 2 tokens" in err, err
    refused(call(place, *asked), "tokenizer.json: cannot encode this text")


def test_a_folder_with_a_tokenizer_alone(tmp_path):
    """Its end of text stands in tokenizer_config.json."""
    model = models.WordLevel({"?": 0, "a": 1, "<e>": 2}, unk_token="?")
    folder = folder_tokenizer(tmp_path / "alone", model)
    files.write_json(folder / "tokenizer_config.json", dict(eos_token="<e>"))
    assert tokenizer.load_tokenizer(folder).end_ids == (2,)


def test_the_end_of_text_is_the_tokenizers(place, run, tmp_path):
    """--tokenizer of its own beside --init_from: config.json names the ends of that one, not of the old."""
    shutil.copytree(run[0] / "dense", tmp_path / "published")
    edit_json(tmp_path / "published" / "config.json", lambda values: values.update(eos_token_id=10))
    shutil.copytree(run[0] / "dense", tmp_path / "own")
    (tmp_path / "own" / "tokenizer_config.json").unlink()
    edit_json(tmp_path / "own" / "config.json", lambda values: values.update(eos_token_id=256))
    code, _, err = train(place, "own-end", "--stage=warmup", f"--init_from={tmp_path / 'published'}",
                         f"--tokenizer={tmp_path / 'own'}")
    assert code == 0, err
    assert tokenizer.load_tokenizer(place / "own-end" / "warmup").end_ids == (256,)


# ---- evaluating ----

def evaluate(place, folder, *args):
    return call(place, "evaluate.py", f"--checkpoint={folder}/sparse", "--batches=1", "--batch_size=2",
                "--copies=1", *args)


def test_float32_is_float32(place, copied):
    """A bf16 checkpoint is read as the same weights in float32 are."""
    found = []
    for dtype in (torch.bfloat16, torch.float32):
        model = Transformer.from_pretrained(copied / "sparse", dtype=torch.bfloat16)
        model.to(dtype).save_pretrained(copied / "sparse", "bytes")
        code, _, err = evaluate(place, copied, "--dtype=float32")
        assert code == 0, err
        found.append(files.read_json(copied / "evaluation-sparse" / "evaluation.json")["loss"])
    assert found[0] == found[1]


def test_what_is_not_finite_is_no_result(place, copied):
    model = Transformer.from_pretrained(copied / "sparse")
    model.model.norm.weight.data[0] = float("inf")
    model.save_pretrained(copied / "sparse", "bytes")
    refused(evaluate(place, copied), "losses are not finite")
    refused(train(place, "from-damaged", "--stage=warmup", f"--init_from={copied}/sparse"),
            "model.norm.weight holds numbers that are not finite")


OF_A_CHECKPOINT = ("--checkpoint={}/sparse",)
VIEWED = (*OF_A_CHECKPOINT, "--text=text.txt")
EXTENDED = ("--init_from={}/sparse", "--stage=sparse", "--yarn_factor=2", "--data=text.txt", "--out_dir=far")


@pytest.mark.parametrize("script,options,name,value", [
    ("evaluate.py", OF_A_CHECKPOINT, "block_size", "32"), ("evaluate.py", OF_A_CHECKPOINT, "batch_size", 2.0),
    ("evaluate.py", OF_A_CHECKPOINT, "data", None), ("evaluate.py", OF_A_CHECKPOINT, "data", ["text.txt"]),
    ("evaluate.py", OF_A_CHECKPOINT, "index_fp8", "no"), ("view.py", VIEWED, "index_fp8", 1),
    ("view.py", VIEWED, "block_size", True), ("sample.py", OF_A_CHECKPOINT, "block_size", "32"),
    ("train.py", EXTENDED, "block_size", [32]), ("tools/recall.py", OF_A_CHECKPOINT, "data", 3)])
def test_a_value_of_the_wrong_type_in_run_json(place, copied, script, options, name, value):
    edit_json(copied / "run.json", lambda values: values["options"].update({name: value}))
    result = call(place, script, *(option.format(copied) for option in options))
    refused(result, "run.json", f"{name}={value!r} is not of type")


def test_a_moved_run_has_its_tokenizer(place, run, copied):
    edit_json(copied / "run.json", lambda values: values["options"].update(tokenizer="gone"))
    code, _, err = evaluate(place, copied)
    assert code == 0, err


def test_a_run_of_another_script(place, copied):
    refused(call(place, "post_train.py", "--stage=specialists", f"--out_dir={copied.name}", "--quick",
                 "--domains=math"), "run.json", "is of a run of train.py")


# ---- streams and the environment ----

@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes by name here")
def test_a_pipe_by_name_is_read(place, run):
    os.mkfifo(place / "pipe")
    process = start(place, "sample.py", f"--checkpoint={run[0]}/sparse", "--prompt_file=pipe",
                    "--num_tokens=3")
    (place / "pipe").write_text("line 1")
    code, out, err = finish(process)
    assert code == 0 and out.startswith("line 1"), err


def test_a_folder_is_no_prompt(place, run):
    refused(call(place, "sample.py", f"--checkpoint={run[0]}/sparse", f"--prompt_file={place}"),
            "is a folder")


@pytest.mark.skipif(sys.platform != "linux", reason="every name is UTF-8 here")
def test_a_folder_whose_name_is_no_utf8(place, run, tmp_path):
    """It is the name that is wrong, not the file."""
    folder = tmp_path / os.fsdecode(b"caf\xe9") / "sparse"
    shutil.copytree(run[0] / "sparse", folder)
    refused(call(place, "sample.py", f"--checkpoint={folder}"), "the folder's name is no UTF-8")


def test_standard_input_closed(place, run):
    command = f"{sys.executable} {ROOT / 'sample.py'} --checkpoint={run[0]}/sparse - <&-"
    done = subprocess.run(command, shell=True, cwd=place, env=environment(place), capture_output=True,
                          text=True)
    refused((done.returncode, done.stdout, done.stderr), "standard input is closed")


def test_a_closed_output_is_said(place):
    """train.py | head -1: training stops, which is no success."""
    process = start(place, "train.py", "--data=text.txt", "--out_dir=closed", *SIZES, *SHORT)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait() == 1 and "standard output was closed" in err and "Traceback" not in err, err


def test_a_terminal_that_cannot_say_it(place, run):
    values = environment(place) | dict(PYTHONIOENCODING="ascii")
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", f"--checkpoint={run[0]}/sparse", "--prompt=é漢",
         "--num_tokens=2"], cwd=place, env=values, capture_output=True, text=True)
    assert done.returncode == 0 and "\\xe9\\u6f22" in done.stdout, done.stderr


@pytest.mark.parametrize("size", ["2", "", "two"])
def test_a_world_without_a_rank(place, run, size):
    values = environment(place) | dict(WORLD_SIZE=size)
    done = subprocess.run(
        [sys.executable, ROOT / "sample.py", f"--checkpoint={run[0]}/sparse"], cwd=place, env=values,
        capture_output=True, text=True)
    refused((done.returncode, done.stdout, done.stderr), f"WORLD_SIZE={size} in the environment")


# ---- options ----

def test_home_and_quotes(place, monkeypatch):
    (place / "quoted.cfg").write_text("out_dir = \"~/quoted run\"\nstage = 'dense'\n")
    options = ("--config=quoted.cfg", "--data=text.txt", *SIZES, *SHORT)
    code, _, err = call(place, "train.py", *options, "--bach=1")
    assert code == 2
    monkeypatch.setattr(os.path, "expanduser", lambda path: path.replace("~", str(place), 1))
    code, _, err = call(place, "train.py", *options)
    assert code == 0 and (place / "quoted run" / "dense").is_dir(), err


def test_config_files(place):
    (place / "a.cfg").write_text("batch_size = two\n")
    refused(train(place, "config", "--config=a.cfg"), "--config=a.cfg: argument --batch_size")
    refused(train(place, "config", "--config=a.cfg", "--config=a.cfg"), "--config is given twice")


@pytest.mark.parametrize("script,option,words", [
    ("sample.py", "--top_p=1e-50", "--top_p=1e-50: must lie between 1e-09 and 1"),
    ("evaluate.py", "--seed=99999999999999999999", "--seed=99999999999999999999: must lie between 0 and")])
def test_extreme_values(place, run, script, option, words):
    refused(call(place, script, f"--checkpoint={run[0]}/sparse", option), words)


def test_an_extreme_extension(place, run):
    refused(train(place, "far", f"--init_from={run[0]}/sparse", "--stage=sparse", "--yarn_factor=1e308"),
            "--yarn_factor=1e+308: must be above 1")
