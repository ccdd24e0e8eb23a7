"""A corpus that teaches copying over long distances: Python's standard library with random strings strewn in, which come back later.

    python copies.py out/copies && python train.py --data=out/copies

Half of the characters are text, in its order; the rest are strings of 16 to 48 random characters, the kind that evaluate.py asks for. Most have
been in the document before; how far back is drawn log-uniformly, so that every distance is practised. What stands between is of any length:
nothing but its own beginning tells that a string returns. The same seed and Python give the same corpus.
"""
import math
import shutil
from pathlib import Path

import numpy as np
from tqdm import tqdm

from support import cli
import data


def characters(text):
    """The frequent characters of the text -> (n,) str, the alphabet of evaluate.copy_task."""
    return np.array([*map(chr, data.frequent(np.frombuffer(text.encode("utf-32-le"), np.uint32)))])


def document(random, text, alphabet, length):
    """-> str of `length` characters: pieces of text, read from its beginning, and strings, in turns. random: numpy RandomState."""
    pieces, strings, last, at, read = [], [], np.empty(0), 0, 0
    while at < length:
        n = int(math.exp(random.uniform(math.log(4), math.log(128))))
        pieces.append(text[read:read + n])
        read, at = read + n, at + n
        wanted = math.exp(random.uniform(math.log(32), math.log(length)))  # how far back
        fit = np.flatnonzero(np.abs(np.log((at - last) / wanted)) < 0.5) if random.rand() < 0.9 else []
        if len(fit):
            i = random.choice(fit)
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
    o = parser.parse_args()
    if o.folder.exists():
        raise ValueError(f"{o.folder} exists; remove it, or name another folder")
    cli.check_ranges(o, ("documents", 1, 99999), ("length", 64, 2**20), ("seed", 0, 2**32 - 1))
    text = "\n".join(text for _, text in data.documents("python"))
    random, alphabet = np.random.RandomState(o.seed), characters(text)
    part = o.folder.with_name(o.folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    for n in tqdm(range(o.documents), desc="documents", disable=None, dynamic_ncols=True):
        start = random.randint(len(text) - o.length)
        (part / f"{n:05d}.txt").write_text(document(random, text[start:start + o.length], alphabet, o.length), encoding="utf-8", newline="")
    part.rename(o.folder)
    print(f"{o.documents} documents of {o.length} characters: {o.folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
