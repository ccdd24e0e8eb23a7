"""Tests of data.py: what goes in comes out, split by document, rebuilt when needed, never half-written; batches repeat exactly.

Nothing here leaves the machine: downloads come from a server on 127.0.0.1, and "no network" is a port where nobody listens."""
import gzip
import hashlib
import http.server
import json
import os
import re
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import tiktoken
import torch

from support import files

from tools import copies
import data

HERE = os.path.dirname(os.path.abspath(__file__))


def folder_of(tmp_path, n=40, name="corpus"):
    """A folder of n different text files of 1 to a few lines."""
    folder = tmp_path / name
    for i in range(n):
        file = folder / f"sub{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {i}: é 漢 🎉\n" * (1 + i % 5), encoding="utf-8")
    return str(folder)


def decoded(file):
    """-> the texts of a TokenFile's documents."""
    ids, eot = np.asarray(file.tokens), file.header["eot"]
    assert ids[-1] == eot
    return [bytes(part[part != eot].astype(np.uint8)).decode() for part in np.split(ids, np.flatnonzero(ids == eot)[:-1] + 1)]


# ---- tokenizers ----

@pytest.mark.parametrize("text", ["", "plain\n\ttext\r\n", "é漢🎉 \x00\x7f", "<|endoftext|>", " " * 5000 + "x" * 5000,
                                  "\u2028b\x85c"])
def test_bytes_are_what_encode_ordinary_gives(text):
    encoding = data.tokenizer("bytes")
    [ids] = data.encode(encoding, [text])
    assert ids.tolist() == encoding.encode_ordinary(text) == list(text.encode())
    assert encoding.decode(ids.tolist()) == text and (encoding.eot_token, encoding.n_vocab) == (256, 257)


def test_every_character_survives():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000 + 0xE000)]))
    encoding = data.tokenizer("bytes")
    assert data.encode(encoding, [text])[0].tolist() == encoding.encode_ordinary(text)


def small_bpe(eot):
    """A BPE encoding of 256 bytes and a few merges, with EOT = eot."""
    ranks = {bytes([i]): i for i in range(256)} | {b"do": 256, b"cu": 257, b"docu": 258, b"me": 259, b"nt": 260, b"ment": 261}
    return tiktoken.Encoding("small", pat_str=r"\s?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": eot})


def test_text_that_spells_a_special_token_stays_text():
    for encoding in (data.tokenizer("bytes"), small_bpe(262)):
        [ids] = data.encode(encoding, ["a<|endoftext|>b"])
        assert encoding.eot_token not in ids and encoding.decode(ids.tolist()) == "a<|endoftext|>b"


@pytest.mark.parametrize("eot, dtype", [(262, "uint16"), (70_000, "uint32")])
def test_tiktoken_encodings(tmp_path, monkeypatch, eot, dtype):
    encoding = small_bpe(eot)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    for file in data.prepare(folder_of(tmp_path), "gpt2", str(tmp_path / "cache")):
        assert file.header["dtype"] == dtype == str(file.tokens.dtype) and file.header["vocab_size"] == eot + 1
        ids = file.tokens.tolist()
        documents = encoding.decode(ids).split("<|endoftext|>")[:-1]
        assert len(documents) == file.header["documents"] == ids.count(eot) and 258 in ids
        assert [i for document in documents for i in encoding.encode_ordinary(document) + [eot]] == ids


def test_tokenizer_errors(monkeypatch):
    with pytest.raises(ValueError, match="unknown tokenizer 'nope': choose from bytes, .*gpt2"):
        data.tokenizer("nope")

    def no_network(name):
        raise ConnectionError("HTTPSConnectionPool(...): Max retries exceeded\nand more lines")
    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR .*--tokenizer=bytes") as error:
        data.tokenizer("gpt2")
    assert "\n" not in str(error.value)
    without = tiktoken.Encoding("without", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: without)
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>"):
        data.tokenizer("gpt2")


# ---- corpora ----

def test_standard_library():
    names = [name for name, _ in data.documents("python")]
    assert names == sorted(names) and len(set(names)) == len(names) > 300 and "json/decoder.py" in names
    assert not any(part in data.SKIP_FOLDERS for name in names for part in name.split("/"))
    assert dict(data.documents("python"))["json/__init__.py"] == open(json.__file__, encoding="utf-8").read()


def test_packages_hold_the_standard_library_and_more():
    packages, python = ({name for name, *_ in data.local_files(source)} for source in ("packages", "python"))
    assert python < packages and {"numpy/__init__.py", "torch/nn/functional.py"} <= packages - python


def test_folder_leaves_out_what_is_no_text(tmp_path):
    folder = tmp_path / "mixed"
    (folder / ".git").mkdir(parents=True)
    (folder / "tests").mkdir()  # skipped in Python's trees only
    for name, content in {"b.md": b"second", "a.txt": "\ufeffférst".encode(), "copy.txt": b"second", "tests/x": b"third", "empty": b"",
                          "blank": b" \n", "bin": b"x\0", "latin1": b"\xe9", ".hidden": b"h", ".git/config": b"i"}.items():
        (folder / name).write_bytes(content)
    (folder / "broken").symlink_to(folder / "nowhere")
    os.mkfifo(folder / "pipe")  # opening it would hang
    assert list(data.documents(str(folder))) == [("a.txt", "férst"), ("b.md", "second"), ("tests/x", "third")]


@pytest.mark.parametrize("content", [b"", b"  \n", b"\x00\x01", b"\xff\xfe\x00"])
def test_files_without_text(tmp_path, content):
    (tmp_path / "file").write_bytes(content)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="file: no text in UTF-8"):
        data.prepare(str(tmp_path / "file"), cache_dir=str(cache))
    assert not list(cache.iterdir())


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data=shakespear: no such file or folder, and none of python"):
        data.prepare("shakespear", cache_dir=str(tmp_path))
    for bad in ("web:0", "web:x", "web:1025", "web:-1", "web:1:2"):
        with pytest.raises(ValueError, match="write web:N"):
            data.prepare(bad, cache_dir=str(tmp_path))


# ---- the split ----

def test_split_by_document_name(tmp_path):
    folder = folder_of(tmp_path, 300)
    train, validation = data.prepare(folder, cache_dir=str(tmp_path / "cache"))
    names = {text: name for name, text in data.documents(folder)}
    sides = [[names[text] for text in decoded(file)] for file in (train, validation)]
    assert sorted(sides[0] + sides[1]) == sorted(names.values()) and len(sides[0]) == train.header["documents"]
    assert min(map(data.name_hash, sides[0])) > 0.1 >= max(map(data.name_hash, sides[1])) and 10 < len(sides[1]) < 60
    assert data.name_hash("json/decoder.py") == 0xbc8c91ce / 2**32  # sha1: the same on every machine


def test_split_does_not_depend_on_neighbours(tmp_path):
    folder = folder_of(tmp_path, 200)
    before = set(decoded(data.prepare(folder, cache_dir=str(tmp_path / "cache"))[1]))
    for i in range(0, 200, 2):
        os.remove(f"{folder}/sub{i % 3}/{i}.txt")
    after = data.prepare(folder, cache_dir=str(tmp_path / "cache"))
    assert set(decoded(after[1])) <= before and not before & set(decoded(after[0]))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_documents_leave_no_split_empty(tmp_path, n):
    folder = folder_of(tmp_path, n)
    train, validation = data.prepare(folder, cache_dir=str(tmp_path / "cache"))
    assert sorted(decoded(train) + decoded(validation)) == sorted(text for _, text in data.documents(folder))
    assert train.header["documents"] + validation.header["documents"] == n


def test_single_document_gives_its_tail(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    train, validation = data.prepare(str(tmp_path / "book.txt"), cache_dir=str(tmp_path / "cache"))
    assert decoded(train) == [text[: len(text) * 9 // 10]] and decoded(validation) == [text[len(text) * 9 // 10 :]]
    (tmp_path / "one.txt").write_text("x")
    with pytest.raises(ValueError, match="no text"):
        data.prepare(str(tmp_path / "one.txt"), cache_dir=str(tmp_path / "cache"))


def test_long_documents_keep_every_character(tmp_path):
    folder = tmp_path / "long"
    folder.mkdir()
    texts = {"lines": "é some line\n" * 400_000, "no_line_end": "x漢" * 1_500_000, "short": "a\n"}
    for name, text in texts.items():
        (folder / name).write_text(text, encoding="utf-8")
    files = data.prepare(str(folder), cache_dir=str(tmp_path / "cache"))
    assert sorted(decoded(files[0]) + decoded(files[1])) == sorted(texts.values())
    for part in data.pieces(str(folder), None, 0.1):
        assert all(len(text) <= 2**20 and (ends or "x" in text or text.endswith("\n")) for _, text, ends in part)


# ---- token files ----

def test_files_are_reused_and_rebuilt(tmp_path, monkeypatch):
    folder, cache = folder_of(tmp_path), str(tmp_path / "cache")
    builds, build = [], data.build
    monkeypatch.setattr(data, "build", lambda *args: builds.append(1) or build(*args))
    count = lambda name="bytes": (data.prepare(folder, name, cache), len(builds))[1]
    assert [count(), count()] == [1, 1]
    file = f"{folder}/sub0/0.txt"
    stat = os.stat(file)
    with open(file, "a") as f:
        f.write("more")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # another size, the same time
    assert [count(), count()] == [2, 2]
    with open(file, "r+") as f:
        f.write("D")
    os.utime(file, ns=(0, 12345))  # the same size, another time
    assert [count(), count()] == [3, 3]
    os.rename(file, f"{folder}/sub0/renamed.txt")
    assert [count(), count()] == [4, 4]
    os.remove(f"{folder}/sub0/3.txt")
    assert [count(), count()] == [5, 5]
    encoding = small_bpe(262)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    assert [count("gpt2"), count("gpt2"), count()] == [6, 6, 6]
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_bpe(300))  # another vocabulary under the same name
    assert count("gpt2") == 7
    for split in (0, 1):
        path = data.prepare(folder, "bytes", cache)[split].path
        for damage in (lambda c: c[:-1], lambda c: c[:100], lambda c: b"", lambda c: bytes(50) + c[50:], lambda c: c + b"tail"):
            with open(path, "rb") as f:
                content = f.read()
            with open(path, "wb") as f:
                f.write(damage(content))
            before = len(builds)
            assert [count(), count()] == [before + 1] * 2
        os.remove(path)
        assert count() == before + 2


def test_header_and_checksum(tmp_path):
    train, validation = data.prepare(folder_of(tmp_path), cache_dir=str(tmp_path / "cache"))
    head = open(train.path, "rb").read(1024)
    header = json.loads(head[8:])
    assert header == train.header
    assert [header[key] for key in ("tokenizer", "vocab_size", "eot", "dtype")] == ["bytes", 257, 256, "uint16"]
    body = open(train.path, "rb").read()[1024:]
    assert len(body) == 2 * header["count"] and hashlib.sha256(body).hexdigest() == header["sha256"]
    assert not train.tokens.flags.writeable
    train.verify()
    with open(train.path, "r+b") as f:
        f.seek(2000)
        f.write(b"?")
    with pytest.raises(ValueError, match="damaged"):
        data.TokenFile(train.path).verify()


@pytest.mark.parametrize("content", [b"", b"short", bytes(5000), b"DSATOK1\n" + b"{" * 2000, b"DSATOK1\n{}" + b" " * 2000,
                                     b"DSATOK1\n" + json.dumps({"dtype": "uint16", "count": None}).encode().ljust(2000)], ids=lambda x: ascii(x)[:20])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign.bin is (no token file|truncated)"):
        data.TokenFile(str(path))


def test_same_content_same_files(tmp_path):
    a, b = (data.prepare(folder_of(tmp_path / where), cache_dir=str(tmp_path / f"cache_{where}")) for where in "ab")
    assert [file.header["sha256"] for file in a] == [file.header["sha256"] for file in b]


def test_two_folders_of_one_name_do_not_share_files(tmp_path):
    paths = {data.prepare(folder_of(tmp_path / where), cache_dir=str(tmp_path / "cache"))[0].path for where in "ab"}
    assert len(paths) == 2


def test_kill_leaves_no_half_file(tmp_path):
    folder, cache = folder_of(tmp_path), tmp_path / "cache"
    code = ("import data, os, signal, sys\n"
            "finish = data.TokenWriter.finish\n"
            "def die(self, **header):\n"  # kill -9 when everything is written but the header and the name
            "    self.file.flush(); os.kill(os.getpid(), signal.SIGKILL)\n"
            "data.TokenWriter.finish = die\n"
            "data.prepare(sys.argv[1], cache_dir=sys.argv[2])\n")
    killed = subprocess.run([sys.executable, "-c", code, folder, str(cache)], cwd=HERE)
    left = list(cache.iterdir())
    assert killed.returncode == -signal.SIGKILL and len(left) == 2 and all(path.suffix == ".tmp" for path in left)
    os.utime(left[0], (0, 0))  # one is old by now; the other might belong to a living process
    for file in data.prepare(folder, cache_dir=str(cache)):
        file.verify()
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".bin", ".tmp"] and not left[0].exists()


def test_exception_leaves_nothing(tmp_path, monkeypatch):
    folder, cache = folder_of(tmp_path), tmp_path / "cache"
    before = {file.path: open(file.path, "rb").read() for file in data.prepare(folder, cache_dir=str(cache))}
    os.remove(f"{folder}/sub0/0.txt")

    def fail(self, ids):
        raise OSError("No space left on device")
    monkeypatch.setattr(data.TokenWriter, "write", fail)
    with pytest.raises(OSError, match="No space"):
        data.prepare(folder, cache_dir=str(cache))
    assert {str(path): path.read_bytes() for path in cache.iterdir()} == before


# ---- downloads, from a server of our own ----

class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.files {path: bytes}, in ranges if server.ranges, hangs up after server.limit bytes, notes what it has seen."""

    def do_GET(self):
        body = self.server.files.get(self.path)
        self.server.seen.append((self.path, self.headers.get("Range")))
        if body is None:
            return self.send_error(404)
        start = int(self.headers["Range"][6:-1]) if self.server.ranges and "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][: self.server.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files, server.seen, server.ranges, server.limit = {}, [], True, None
    server.url = f"http://127.0.0.1:{server.server_port}"
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


CONTENT = bytes(range(256)) * 20_000
SHA256 = hashlib.sha256(CONTENT).hexdigest()


@pytest.mark.parametrize("ranges", [True, False])
def test_download_and_resume(server, tmp_path, ranges):
    server.files["/file"], server.ranges, path = CONTENT, ranges, tmp_path / "sub" / "file"
    server.limit = 1_000_000
    with pytest.raises(ConnectionError, match="ended after 1,000,000 of 5,120,000 bytes.*run again") as error:
        data.download(server.url + "/file", str(path), SHA256, len(CONTENT))
    assert "\n" not in str(error.value) and not path.exists() and os.path.getsize(f"{path}.part") == 1_000_000
    server.limit = None
    assert data.download(server.url + "/file", str(path), SHA256, len(CONTENT)) == str(path)
    assert path.read_bytes() == CONTENT and os.listdir(path.parent) == ["file"]
    assert server.seen == [("/file", None), ("/file", "bytes=1000000-")]
    data.download(server.url + "/file", str(path), SHA256, len(CONTENT))
    assert len(server.seen) == 2  # what is there is not fetched again


def test_download_complete_but_not_renamed(server, tmp_path):
    (tmp_path / "file.part").write_bytes(CONTENT)
    data.download(server.url + "/file", str(tmp_path / "file"), SHA256, len(CONTENT))
    assert not server.seen and (tmp_path / "file").read_bytes() == CONTENT


def test_download_truncated_file_is_fetched_again(server, tmp_path):
    server.files["/file"] = CONTENT
    (tmp_path / "file").write_bytes(CONTENT[:5])
    data.download(server.url + "/file", str(tmp_path / "file"), SHA256, len(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


@pytest.mark.parametrize("part", [None, b"x" * 10, CONTENT + b"x"], ids=["none", "other", "longer"])
def test_download_wrong_checksum(server, tmp_path, part):
    server.files["/file"] = CONTENT if part else CONTENT[::-1]
    if part:
        (tmp_path / "file.part").write_bytes(part)
    with pytest.raises(ValueError, match=f"instead of {SHA256}.*--data=python"):
        data.download(server.url + "/file", str(tmp_path / "file"), SHA256, len(CONTENT))
    assert not os.listdir(tmp_path)


def test_no_network(server, tmp_path):
    for url in ("http://127.0.0.1:9/file", "http://no-such-host.invalid/file", server.url + "/missing"):
        with pytest.raises(ConnectionError, match=re.escape(url) + ".*--data=python") as error:
            data.download(url, str(tmp_path / "file"), SHA256, 10)
        assert "\n" not in str(error.value) and not os.listdir(tmp_path)


def pages(shard, n=200):
    return [{"url": f"https://example.org/{shard}/{i}", "text": f"page {i} of {shard}\n\ud83d" + "é" * i} for i in range(n)]


def serve_c4(server, monkeypatch, shards=2):
    monkeypatch.setattr(data, "C4", server.url + "/{}/c4.{:05d}.json.gz")
    for shard in range(shards):
        content = gzip.compress("".join(json.dumps(page) + "\n" for page in pages(shard)).encode())
        sha256 = hashlib.sha256(content).hexdigest()
        server.files[f"/resolve/c4.{shard:05d}.json.gz"] = content
        server.files[f"/raw/c4.{shard:05d}.json.gz"] = (f"version https://git-lfs.github.com/spec/v1\n"
                                                        f"oid sha256:{sha256}\nsize {len(content)}\n").encode()


def test_web(server, tmp_path, monkeypatch):
    serve_c4(server, monkeypatch)
    cache = str(tmp_path / "cache")
    train, validation = data.prepare("web:2", cache_dir=cache)
    texts = [page["text"].replace("\ud83d", "?") for shard in range(2) for page in pages(shard)]
    assert sorted(decoded(train) + decoded(validation)) == sorted(texts) and validation.header["documents"] > 10
    assert [path for path, _ in server.seen] == [f"/{kind}/c4.0000{shard}.json.gz" for kind in ("raw", "resolve") for shard in (0, 1)]
    one = data.prepare("web", cache_dir=cache)
    assert one[0].header["documents"] + one[1].header["documents"] == 200 and one[0].path != train.path
    server.files.clear()  # from here on there is no network, and the raw shards may go as well
    for shard in range(2):
        os.remove(f"{cache}/c4/c4-train.{shard:05d}.json.gz")
    again = data.prepare("web:2", cache_dir=cache)
    assert again[0].header == train.header and len(server.seen) == 4
    os.remove(train.path)
    with pytest.raises(ConnectionError, match="resolve/c4.00000"):
        data.prepare("web:2", cache_dir=cache)


def test_web_without_a_pointer(server, tmp_path, monkeypatch):
    serve_c4(server, monkeypatch, 1)
    server.files["/raw/c4.00000.json.gz"] = b"<html>Please log in</html>"
    with pytest.raises(ValueError, match="holds no git-LFS pointer"):
        data.prepare("web", cache_dir=str(tmp_path))
    serve_c4(server, monkeypatch, 1)
    data.prepare("web", cache_dir=str(tmp_path))  # what was wrong has not been kept


def test_web_pins_a_revision():
    url = data.C4.format("raw", 7)
    assert re.fullmatch(r"https://huggingface.co/datasets/allenai/c4/raw/[0-9a-f]{40}/en/c4-train.00007-of-01024.json.gz", url)


def test_shakespeare(server, tmp_path, monkeypatch):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 100
    monkeypatch.setattr(data, "SHAKESPEARE", (server.url + "/input.txt", hashlib.sha256(text.encode()).hexdigest(), len(text)))
    server.files["/input.txt"] = text.encode()
    train, validation = data.prepare("shakespeare", cache_dir=str(tmp_path))
    assert decoded(train)[0] + decoded(validation)[0] == text and train.header["documents"] == validation.header["documents"] == 1


# ---- batches ----

def test_windows_and_targets():
    tokens = np.random.RandomState(0).randint(0, 50, 1000).astype(np.uint16)
    batches = data.Batches(tokens, 16, 4, eot=0, seed=3)
    for number in range(40):
        x, y, first = batches.batch(number)
        assert x.shape == y.shape == first.shape == (4, 16)
        assert (x.dtype, y.dtype, first.dtype) == (torch.int64, torch.int64, torch.int32)
        for row, target, begin in zip(x.tolist(), y.tolist(), first.tolist()):
            window = row + target[-1:]
            assert row[1:] == target[:-1] and window in np.lib.stride_tricks.sliding_window_view(tokens, 17).tolist()
            expected, start = [], 0
            for i in range(16):  # the definition: a document begins behind an EOT, which belongs to the document before
                start = i if i and row[i - 1] == 0 else start
                expected.append(start)
            assert begin == expected


def test_first_by_hand():
    tokens = np.array([5, 6, 9, 9, 7, 8, 9], np.uint16)  # EOT = 9, one window
    x, y, first = data.Batches(tokens, 6, 1, eot=9).batch(0)
    assert x.tolist() == [[5, 6, 9, 9, 7, 8]] and y.tolist() == [[6, 9, 9, 7, 8, 9]] and first.tolist() == [[0, 0, 0, 3, 4, 4]]


@pytest.mark.parametrize("N, S", [(1000, 16), (1001, 16), (33, 16), (32, 16), (31, 16), (17, 16), (5, 1), (2, 1)])
def test_an_epoch_visits_each_window_once(N, S):
    batches = data.Batches(np.arange(N), S, 1, eot=-1, seed=7)
    offsets = set()
    for epoch in range(12):
        starts = [int(batches.batch(epoch * batches.windows + i)[0][0, 0]) for i in range(batches.windows)]
        assert sorted(starts) == list(range(min(starts), min(starts) + S * batches.windows, S)) and max(starts) + S < N
        assert min(starts) < S or batches.windows == 1
        offsets.add(min(starts))
    assert batches.windows >= max(1, N // S - 1) and (len(offsets) > 1 or N <= S + 1 or S == 1)


def test_batch_is_a_pure_function():
    tokens = np.random.RandomState(0).randint(0, 50, 3000)
    make = lambda seed=1: data.Batches(tokens, 32, 5, eot=0, seed=seed)
    forward = make()
    straight = [forward.batch(n) for n in range(60)]  # more than three epochs; a batch may cross two
    shuffled = make()
    for n in np.random.RandomState(1).permutation(60):
        assert all(torch.equal(a, b) for a, b in zip(shuffled.batch(n), straight[n]))
    assert all(torch.equal(a, b) for a, b in zip(make().batch(37), straight[37]))  # resumed
    assert not torch.equal(make(2).batch(0)[0], straight[0][0])
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    make(3).batch(0)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_order_never_changes():
    """A checkpoint of today resumes with the same data next year: this pins the permutation."""
    starts = data.epoch_starts(100, 10, 1337, 0).tolist()
    assert starts == [32, 42, 52, 22, 72, 12, 62, 2, 82]
    assert data.epoch_starts(100, 10, 1337 + 2**32, 0).tolist() == starts


def test_too_few_tokens():
    with pytest.raises(ValueError, match=r"16 tokens, fewer than one window of block_size \+ 1 = 17.*--block_size"):
        data.Batches(np.zeros(16, np.uint16), 16, 1, eot=1)
    data.Batches(np.zeros(17, np.uint16), 16, 1, eot=1).batch(5)


def test_batches_of_a_token_file(tmp_path):
    train, _ = data.prepare(folder_of(tmp_path), cache_dir=str(tmp_path / "cache"))
    x, y, first = data.Batches(train.tokens, 64, 2, train.header["eot"]).batch(0)
    assert (x < 257).all() and (first <= torch.arange(64)).all() and (first > 0).any()
    assert ((x[:, :-1] == 256) == (first[:, 1:] == torch.arange(1, 64))).all()


# ---- the script ----

def test_script(tmp_path):
    folder = folder_of(tmp_path)
    done = subprocess.run([sys.executable, os.path.join(HERE, "data.py"), f"--data={folder}"], capture_output=True, text=True,
                          env={**os.environ, "DSA_DATA_DIR": str(tmp_path / "cache")})
    train, validation = data.prepare(folder, cache_dir=str(tmp_path / "cache"))
    assert done.returncode == 0 and f"{train.header['count']:,} tokens" in done.stdout and validation.path in done.stdout


@pytest.mark.parametrize("arg", ["--data=/no/such/file", "--tokenizer=nope", "--nope", "--data=web:0", "--data=/dev/null"])
def test_script_bad_input(tmp_path, arg, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", f"--cache_dir={tmp_path}", arg])
    with pytest.raises(SystemExit) as exit:
        data.cli.run(data.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out and re.fullmatch(r"data.py: .*\n", err) and not os.listdir(tmp_path)


def test_bytes_pass_no_loop(monkeypatch):
    """Bytes are views of the text, not the ids of tiktoken's own loop, which makes some 30 MB a second."""
    encoding = data.tokenizer("bytes")
    monkeypatch.setattr(encoding, "encode_ordinary_batch", None)
    assert [x.tolist() for x in data.encode(encoding, ["é", ""])] == [[0xC3, 0xA9], []]


def test_copies_return_at_every_distance():
    """Text and strings of two alphabets: the text stays in order, most strings return whole, as often in every octave of distance, and never at a rhythm."""
    letters, digits = np.array(list("abcdefgh \n")), np.array(list("0123456789ABCDEFGHIJKLMNOP"))
    text = "".join(np.random.RandomState(0).choice(letters, 40000))
    make = lambda seed: copies.document(np.random.RandomState(seed), text, digits, 32768)
    document = make(1)
    assert len(document) == 32768 and document == make(1) != make(2)
    assert text.startswith("".join(c for c in document if c in letters))
    found = list(re.finditer("[0-9A-P]+", document))[:-1]
    assert all(16 <= len(m[0]) <= 48 for m in found) and 0.4 < sum(len(m[0]) for m in found) / 32768 < 0.6
    last, back = {}, []
    for m in found:
        back += [m.start() - last[m[0]]] if m[0] in last else []
        last[m[0]] = m.start()
    octaves = np.bincount(np.log2(back).astype(int), minlength=15)[6:14] / len(back)
    assert len(back) > 0.6 * len(found) and octaves.min() > 0.04 and octaves.max() < 0.3, octaves
    assert len(set(back)) > 0.7 * len(back)
    assert set(copies.characters("ab" * 9999 + "c")) == {"a", "b"}
