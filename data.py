"""Data: a corpus becomes two memory-mapped token files, training and validation, and those become batches.

Notable: the default corpus, the source text of Python's standard library, is on every machine already, so nothing is downloaded.
Every document is followed by one end-of-text token (EOT), which belongs to it. Whole documents go to training or to validation,
by a hash of their name, never by position. A batch is a pure function of (seed, number), so resuming needs no loader state, and
it says for each token where its document begins (`first`): attention and selection do not cross documents.

    python data.py --data=packages --tokenizer=bytes      # prepares and verifies ahead; train.py does the same by itself
"""
import functools
import glob
import gzip
import hashlib
import http.client
import json
import os
import re
import sys
import sysconfig
import time
import urllib.request
import uuid

import numpy as np
import torch
from tqdm import tqdm

from support import cli
from support.tokenizer import encode, tokenizer

SHAKESPEARE = ("https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
               "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed", 1115394)  # URL, sha256, bytes
# The English part of C4 (Raffel et al. 2020; cleaned Common Crawl, ODC-BY): 1024 shards of about 320 MB, 356,000 pages each.
C4 = "https://huggingface.co/datasets/allenai/c4/{}/1588ec454efa1a09f29cd18ddd04fe05fc8653a2/en/c4-train.{:05d}-of-01024.json.gz"
VALIDATION_SHARE = 0.1
SKIP_FOLDERS = {"test", "tests", "idle_test", "__pycache__", "site-packages", "dist-packages"}
NO_DOWNLOAD = "use --data=python, which needs no download, or a local file"


# ---- downloads ----

def download(url, path, sha256=None, size=None):
    """-> path, holding what url holds; a file that is there is kept. With size, goes on from path.part where an earlier try
    stopped; with sha256, the name appears only once the checksum holds.

    Raises ConnectionError (no network, interrupted: what came is kept) and ValueError (wrong checksum: what came is removed)."""
    if os.path.exists(path) and size in (None, os.path.getsize(path)):
        return path
    os.makedirs(os.path.dirname(path), exist_ok=True)
    part = path + ".part"
    have = os.path.getsize(part) if size and os.path.exists(part) else 0
    try:
        if not size or have < size:
            request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
            with urllib.request.urlopen(request, timeout=30) as reply:
                have *= reply.status == 206  # a server without ranges answers 200 and starts over
                bar = tqdm(desc=os.path.basename(path), total=size, initial=have, unit="B", unit_scale=True, disable=None)
                with bar, open(part, "ab" if have else "wb") as file:
                    while chunk := reply.read(2**20):
                        bar.update(file.write(chunk))
            if size and os.path.getsize(part) < size:
                raise ConnectionError(f"ended after {os.path.getsize(part):,} of {size:,} bytes")
    except (OSError, http.client.HTTPException) as error:
        raise ConnectionError(f"cannot download {url} ({error}): run again when it can be reached, or {NO_DOWNLOAD}") from None
    if sha256:
        digest = hashlib.sha256(np.memmap(part, np.uint8, "r")).hexdigest()
        if digest != sha256:
            os.remove(part)
            raise ValueError(f"{url} has sha256 {digest} instead of {sha256}; removed what came: run again, or {NO_DOWNLOAD}")
    os.replace(part, path)
    return path


def lfs_pointer(url, path):
    """-> (sha256, size) of a file, from its git-LFS pointer at url (kept at path): they come with the pinned revision.

    Raises what `download` raises, and ValueError if url holds no pointer."""
    with open(download(url, path), errors="replace") as file:
        found = re.search(r"^oid sha256:([0-9a-f]{64})\nsize (\d+)$", file.read(1024), re.M)
    if not found:
        os.remove(path)
        raise ValueError(f"{url} holds no git-LFS pointer (a proxy's page?): run again, or {NO_DOWNLOAD}")
    return found[1], int(found[2])


# ---- corpora ----

def default_cache():
    """-> the folder for downloads and token files: $DSA_DATA_DIR, else ~/.cache/dsa-data."""
    return os.environ.get("DSA_DATA_DIR") or os.path.join(os.path.expanduser("~"), ".cache", "dsa-data")


def remote_files(source, cache_dir):
    """-> [(url, path, sha256, size)] that `source` has to download; [] for a local source."""
    kind, _, shards = source.partition(":")
    if source == "shakespeare":
        url, sha256, size = SHAKESPEARE
        return [(url, os.path.join(cache_dir, "shakespeare.txt"), sha256, size)]
    if kind != "web":
        return []
    shards = shards or "1"
    if not (shards.isdecimal() and 1 <= int(shards) <= 1024):
        raise ValueError(f"--data={source}: write web:N, where N is the number of shards of about 320 MB, 1 to 1024")
    paths = [os.path.join(cache_dir, "c4", f"c4-train.{i:05d}.json.gz") for i in range(int(shards))]
    return [(C4.format("resolve", i), path, *lfs_pointer(C4.format("raw", i), path + ".pointer")) for i, path in enumerate(paths)]


def local_roots(source):
    """-> [(file or folder, ending of the files that count)] of a local source."""
    if source in ("python", "packages"):
        installed = {os.path.realpath(path) for path in sys.path if path.endswith("-packages")}  # site-packages, dist-packages
        return [(root, ".py") for root in [sysconfig.get_path("stdlib"), *(sorted(installed) if source == "packages" else [])]]
    if not os.path.exists(source):
        raise FileNotFoundError(f"--data={source}: no such file or folder, and none of python, packages, shakespeare, web, web:N")
    return [(source, "")]


def local_files(source):
    """-> [(name, path, size, mtime)] in an order that depends only on names. Hidden entries are left out, and in Python's own
    trees SKIP_FOLDERS (tests are mostly long tables). Whether a file is text turns out when it is read."""
    found = []
    for root, ending in local_roots(source):
        if os.path.isfile(root):
            found.append((os.path.basename(root), root))
        for folder, folders, names in os.walk(root):
            folders[:] = [f for f in folders if not f.startswith(".") and not (ending and f in SKIP_FOLDERS)]
            paths = (os.path.join(folder, n) for n in names if n.endswith(ending) and not n.startswith("."))
            found += [(os.path.relpath(p, root).replace(os.sep, "/"), p) for p in paths if os.path.isfile(p)]
    return [(name, path, os.stat(path).st_size, os.stat(path).st_mtime_ns) for name, path in sorted(found)]


def documents(source="python", cache_dir=None):
    """-> iterator of (name, text), a file or web page each, in a fixed order, without files that are empty, binary or seen before.

    source: "python" (the standard library), "packages" (that and every installed package), "shakespeare" (one document), "web" or
    "web:N" (N shards of C4; names are URLs), or the path of a text file or folder.
    Raises FileNotFoundError, ValueError, ConnectionError."""
    remote, seen = remote_files(source, cache_dir or default_cache()), set()
    for url, path, sha256, size in remote:
        with (gzip.open if path.endswith(".gz") else open)(download(url, path, sha256, size), "rt", encoding="utf-8") as file:
            if source == "shakespeare":
                yield source, file.read()
                continue
            for page in map(json.loads, file):
                yield page["url"], page["text"].encode("utf-8", "replace").decode()  # JSON can spell half a surrogate
    for name, path, _, _ in [] if remote else local_files(source):
        with open(path, "rb") as file:
            content = file.read()
        digest = hashlib.sha1(content).digest()
        if digest in seen or not content.strip() or b"\0" in content:
            continue
        seen.add(digest)
        try:
            yield name, content.decode("utf-8-sig")
        except UnicodeDecodeError:
            continue


def name_hash(name):
    """-> a fraction in [0, 1), for a name the same on every machine; up to VALIDATION_SHARE it means validation."""
    return int(hashlib.sha1(name.encode("utf-8", "surrogateescape")).hexdigest()[:8], 16) / 2**32


# ---- token files ----

class TokenFile:
    """A token file, read-only. tokens: memory map (N,) of uint16 or uint32. header: a dict of tokenizer, vocab_size, eot, dtype,
    count (N), documents, fingerprint (of source and tokenizer) and sha256 (of the tokens).

    Layout: MAGIC, the header as JSON, spaces up to HEADER bytes, the tokens in little-endian order.
    Raises FileNotFoundError, and ValueError for a foreign or truncated file."""
    MAGIC, HEADER = b"DSATOK1\n", 1024

    def __init__(self, path):
        self.path = path
        with open(path, "rb") as file:
            head = file.read(self.HEADER)
        try:
            if not head.startswith(self.MAGIC):
                raise ValueError
            self.header = json.loads(head[len(self.MAGIC):])
            dtype, count = np.dtype(self.header["dtype"]), self.header["count"]
            size = self.HEADER + count * dtype.itemsize
        except (ValueError, TypeError, KeyError):
            raise ValueError(f"{path} is no token file of this program: give the text itself to --data") from None
        if os.path.getsize(path) != size:
            raise ValueError(f"{path} is truncated (its header promises {count:,} tokens): delete it, it will be rebuilt")
        self.tokens = np.memmap(path, dtype, "r", self.HEADER, (count,))

    def verify(self):
        """Raises ValueError unless the tokens have the checksum that the header names. Reads the whole file."""
        if hashlib.sha256(self.tokens).hexdigest() != self.header["sha256"]:
            raise ValueError(f"{self.path} is damaged (its tokens do not match its checksum): delete it, it will be rebuilt")


class TokenWriter:
    """A token file in the making, under a temporary name until `finish` has it complete on disk. `discard` removes what is left."""

    def __init__(self, path, dtype):
        self.path, self.temporary, self.dtype = path, f"{path}.{uuid.uuid4().hex[:8]}.tmp", dtype
        self.file, self.digest, self.count, self.documents = open(self.temporary, "wb"), hashlib.sha256(), 0, 0
        self.file.write(bytes(TokenFile.HEADER))

    def write(self, ids):
        ids = ids.astype(self.dtype)
        self.file.write(ids)
        self.digest.update(ids)
        self.count += len(ids)

    def finish(self, **header):
        header.update(dtype=self.dtype, count=self.count, documents=self.documents, sha256=self.digest.hexdigest())
        self.file.seek(0)
        self.file.write((TokenFile.MAGIC + json.dumps(header).encode()).ljust(TokenFile.HEADER))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()
        os.replace(self.temporary, self.path)

    def discard(self):
        self.file.close()
        if os.path.exists(self.temporary):
            os.remove(self.temporary)


def pieces(source, cache_dir, cut):
    """-> lists of (split, piece of text, does it end its document?), about 4 MB a list: bounded memory, and work for all threads.

    Split 1, validation, gets the documents with name_hash <= cut; with cut None, the last tenth of every document.
    Documents beyond 1 MB come in pieces that end behind a line."""
    pending, size = [], 0
    for name, text in documents(source, cache_dir):
        tail = len(text) * 9 // 10
        spans = [(0, 0, tail), (1, tail, len(text))] if cut is None else [(int(name_hash(name) <= cut), 0, len(text))]
        for split, start, stop in spans:
            while start < stop:
                end = stop if stop - start <= 2**20 else text.rfind("\n", start, start + 2**20) + 1 or start + 2**20
                pending.append((split, text[start:end], end == stop))
                size, start = size + end - start, end
                if size >= 2**22:
                    yield pending
                    pending, size = [], 0
    yield pending


def build(source, encoding, paths, header, cache_dir, cut):
    """Tokenize a corpus into the token files `paths` (train, validation); until both are complete, neither is touched.

    In a corpus so small that one of them would stay empty, validation is the document with the lowest hash, or the last tenth of
    the only document. Raises ValueError if there is no text."""
    for stale in [s for path in paths for s in glob.glob(glob.escape(path) + ".*.tmp")]:
        if time.time() - os.path.getmtime(stale) > 3600:  # left by a killed process; a younger one may be in use
            os.remove(stale)
    total = None if remote_files(source, cache_dir) else sum(size for _, _, size, _ in local_files(source))
    writers = [TokenWriter(path, "uint16" if encoding.n_vocab <= 2**16 else "uint32") for path in paths]
    try:
        with tqdm(desc=f"tokenizing {source}", total=total, unit="B", unit_scale=True, disable=None) as bar:
            for batch in pieces(source, cache_dir, cut):
                for (split, text, ends), ids in zip(batch, encode(encoding, [text for _, text, _ in batch])):
                    writers[split].write(np.append(ids, encoding.eot_token) if ends else ids)
                    writers[split].documents += ends
                    bar.update(len(text))
        if all(writer.documents for writer in writers):
            for writer in writers:
                writer.finish(**header)
            return
    finally:
        for writer in writers:
            writer.discard()
    hashes = [name_hash(name) for name, _ in documents(source, cache_dir)]
    if not hashes or cut != VALIDATION_SHARE:
        raise ValueError(f"--data={source}: no text in UTF-8 to train on (empty or binary): give a text file or a folder of them")
    build(source, encoding, paths, header, cache_dir, min(hashes) if len(hashes) > 1 else None)


def prepare(source="python", tokenizer_name="bytes", cache_dir=None):
    """-> (train, validation) TokenFiles of a corpus, found in cache_dir (default: `default_cache`), or built there if missing,
    truncated, or made from other files (names, sizes, times), from other downloads or with another tokenizer.

    Raises what `tokenizer`, `documents` and `build` raise, and ValueError for a tokenizer without an end-of-text token."""
    encoding, cache_dir = tokenizer(tokenizer_name), cache_dir or default_cache()
    if encoding.eot_token is None:
        raise ValueError(f"--tokenizer={tokenizer_name}: its config.json names no eos_token_id, which separates documents")
    remote = remote_files(source, cache_dir)
    where = [url for url, *_ in remote] or [os.path.abspath(root) for root, _ in local_roots(source)]
    what = [sha256 for _, _, sha256, _ in remote] or [(name, size, mtime) for name, _, size, mtime in local_files(source)]
    digest = lambda *things: hashlib.sha256(json.dumps(things).encode()).hexdigest()
    header = dict(tokenizer=encoding.name, vocab_size=encoding.n_vocab, eot=encoding.eot_token,
                  fingerprint=digest(encoding.name, encoding.n_vocab, encoding.eot_token, VALIDATION_SHARE, what))
    label = re.sub(r"\W+", "-", os.path.basename(os.path.abspath(source)))
    stem = os.path.join(cache_dir, f"{label}-{digest(where)[:8]}-{encoding.name}")
    paths = [f"{stem}-train.bin", f"{stem}-validation.bin"]
    try:
        files = [TokenFile(path) for path in paths]
    except (FileNotFoundError, ValueError):
        files = []
    if not files or any(file.header["fingerprint"] != header["fingerprint"] for file in files):
        os.makedirs(cache_dir, exist_ok=True)
        single = len(what) == 1 and (source == "shakespeare" or not remote)
        build(source, encoding, paths, header, cache_dir, None if single else VALIDATION_SHARE)
        files = [TokenFile(path) for path in paths]
    return tuple(files)


def frequent(tokens, eot=None):
    """The numbers, but eot, that make up at least 1/10000 of tokens (N,), judged by the first 4M -> (n,) int64, ascending."""
    counts = np.bincount(tokens[:2**22])
    if eot is not None:
        counts[eot:eot + 1] = 0
    return np.flatnonzero(counts * 10000 >= counts.sum())


# ---- batches ----

@functools.lru_cache(maxsize=4)
def epoch_starts(N, S, seed, epoch):
    """-> where the windows of one epoch begin, shuffled: N tokens, cut from a random offset below S into windows of S + 1 tokens,
    each overlapping the next by one token, a target here and an input there. Every epoch has the same number of windows."""
    random = np.random.RandomState([seed % 2**32, epoch])  # whose streams numpy promises never to change, unlike Generator's
    windows = max(1, N // S - 1)
    return random.randint(min(S, N - windows * S)) + random.permutation(windows) * S


class Batches:
    """Batches of windows from tokens (N,), in shuffled epochs. `batch(number)` depends on the arguments here and on the number,
    nothing else: micro-batch m of step s on rank r of R, with A micro-batches a step, is number (s * A + m) * R + r; resuming is
    asking for the next number; validation is batch(0), batch(1), ... of its split. Raises ValueError if N < block_size + 1."""

    def __init__(self, tokens, block_size, batch_size, eot, seed=0):
        if len(tokens) < block_size + 1:
            raise ValueError(f"a split of the corpus has {len(tokens):,} tokens, fewer than one window of block_size + 1 = "
                             f"{block_size + 1:,}: take more text (--data) or a smaller --block_size")
        self.tokens, self.block_size, self.batch_size, self.eot, self.seed = tokens, block_size, batch_size, eot, seed
        self.windows = len(epoch_starts(len(tokens), block_size, seed, 0))  # per epoch

    def batch(self, number):
        """-> x, y (B, S) int64: tokens, and the token after each (behind an EOT: the first of the next document);
        first (B, S) int32: for each token of x, the first position in the window that belongs to the same document."""
        S, windows = self.block_size, []
        for item in range(number * self.batch_size, (number + 1) * self.batch_size):
            start = epoch_starts(len(self.tokens), S, self.seed, item // self.windows)[item % self.windows]
            windows.append(self.tokens[start : start + S + 1].astype(np.int64))
        window = np.stack(windows)
        begins = np.where(window[:, :-2] == self.eot, np.arange(1, S), 0)  # (B, S-1): position i + 1 if a document begins there
        first = np.maximum.accumulate(np.pad(begins, ((0, 0), (1, 0))), 1).astype(np.int32)
        return tuple(torch.from_numpy(np.ascontiguousarray(array)) for array in (window[:, :-1], window[:, 1:], first))


def main():
    """Prepare a corpus, verify it, print its size."""
    parser = cli.Parser(__doc__)
    parser.add_argument("--data", default="python", help="python, packages, shakespeare, web[:N], a text file or folder (default %(default)s)")
    parser.add_argument("--tokenizer", default="bytes", help="bytes, or a name that tiktoken knows, such as gpt2 (default %(default)s)")
    parser.add_argument("--cache_dir", help="folder for downloads and token files [$DSA_DATA_DIR, else ~/.cache/dsa-data]")
    args = parser.parse_args()
    for split, file in zip(("train", "validation"), prepare(args.data, args.tokenizer, args.cache_dir)):
        file.verify()
        print(f"{split:<10} {file.header['documents']:>9,} documents {file.header['count']:>14,} tokens "
              f"({file.header['tokenizer']}, {file.header['dtype']})  {file.path}")
    return 0


if __name__ == "__main__":
    cli.run(main)
