"""A corpus that teaches copying over long distances: Python's standard library with random strings strewn in,
which come back later.

    python -m tools.copies out/copies && python train.py --data=out/copies

Half of the characters are text, in its order; the rest are strings of 16 to 48 random characters, the kind
that evaluate.py asks for. Most have been in the document before; how far back is drawn log-uniformly, so that
every distance is practised. What stands between is of any length: nothing but its own beginning tells that a
string returns. The same seed and Python give the same corpus.
"""
import math
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
from support import cli


def log_uniform(random, low, high):
    """-> float between low and high, its logarithm uniform; random: numpy RandomState."""
    return math.exp(random.uniform(math.log(low), math.log(high)))


def characters(text):
    """The frequent characters of the text -> (n,) str, the alphabet of evaluate.copy_task."""
    codes = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    return np.array([chr(code) for code in data.frequent(codes)])


def document(random, text, alphabet, length):
    """-> str of `length` characters: pieces of text, read from its beginning, and strings, in turns. random:
    numpy RandomState."""
    pieces = []
    strings = []
    last = np.empty(0)  # where each string began when it came last
    at = 0  # characters so far
    read = 0  # of the text
    while at < length:
        n = int(log_uniform(random, 4, 128))
        pieces.append(text[read:read + n])
        read += n
        at += n

        # a string from about as far back as drawn, if there is one, else a new one; and sometimes anyway
        wanted = log_uniform(random, 32, length)
        near = []
        if random.rand() < 0.9:
            near = np.flatnonzero(np.abs(np.log((at - last) / wanted)) < 0.5)
        if len(near):
            i = random.choice(near)
        else:
            i = len(strings)
            strings.append("".join(random.choice(alphabet, random.randint(16, 49))))
            last = np.append(last, 0)
        pieces.append(strings[i])
        last[i] = at
        at += len(strings[i])
    return "".join(pieces)[:length]


def main():
    """Write the corpus, a file per document."""
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="where the documents go")
    parser.add_argument("--documents", type=int, default=3000, help="how many (default %(default)s)")
    parser.add_argument("--length", type=int, default=32768, help="characters of each (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    folder = options.folder
    length = options.length
    if folder.exists():
        raise ValueError(f"{folder} exists; remove it, or name another folder")
    cli.check_ranges(options, ("documents", 1, 99999), ("length", 64, 2**20), ("seed", 0, 2**32 - 1))

    text = "\n".join(text for _, text in data.documents("python"))
    alphabet = characters(text)
    random = np.random.RandomState(options.seed)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for n in tqdm(range(options.documents), desc="documents", disable=None, dynamic_ncols=True):
        start = random.randint(len(text) - length)
        content = document(random, text[start:start + length], alphabet, length)
        (part / f"{n:05d}.txt").write_text(content, encoding="utf-8", newline="")
    part.rename(folder)
    print(f"{options.documents} documents of {length} characters: {folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
