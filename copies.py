"""A corpus that teaches copying over long distances: Python's standard library with random strings strewn in, which come back later.

    python copies.py out/copies                          # then: python train.py --data=out/copies

Half of the bytes are text, in its order; the rest are strings of 16 to 48 random characters, the kind that evaluate.py asks for. Four of
five have been in the document before; how far back the string last stood is drawn log-uniformly, so that every distance is practised. What
stands between is of any length: nothing but the string itself tells that it returns. The same seed gives the same corpus.
"""
import argparse
import math
import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data


def characters(text):
    """The alphabet of evaluate.copy_task: what makes up at least 1/10000 of the text."""
    values, counts = np.unique(np.frombuffer(text[:2**22].encode("utf-32-le"), np.uint32), return_counts=True)
    return np.array([chr(v) for v, n in zip(values, counts) if n * 10000 >= counts.sum()])


def document(random, text, alphabet, length):
    """-> `length` characters: pieces of text (str, read from its beginning) and strings, in turns. random: numpy RandomState."""
    pieces, strings, last, at, read = [], [], [], 0, 0
    while at < length:
        n = int(math.exp(random.uniform(math.log(4), math.log(128))))
        pieces.append(text[read:read + n])
        read, at = read + n, at + n
        back = at - np.array(last)
        wanted = math.exp(random.uniform(math.log(32), math.log(length)))
        fit = np.flatnonzero(np.abs(np.log(back / wanted)) < 0.5) if random.rand() < 0.9 else []
        if len(fit):
            i = random.choice(fit)
        else:
            i = len(strings)
            strings.append("".join(random.choice(alphabet, random.randint(16, 49))))
            last.append(0)
        pieces.append(strings[i])
        last[i] = at
        at += len(strings[i])
    return "".join(pieces)[:length]


def main():
    """Write the corpus, a file per document."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="where the documents go")
    parser.add_argument("--documents", type=int, default=3000, help="how many [3000]")
    parser.add_argument("--length", type=int, default=32768, help="characters of each [32768]")
    parser.add_argument("--seed", type=int, default=0)
    o = parser.parse_args()
    text = "\n".join(text for _, text in data.documents("python", data.default_cache()))
    random, alphabet, folder = np.random.RandomState(o.seed), characters(text), Path(o.folder)
    folder.mkdir(parents=True, exist_ok=True)
    for n in tqdm(range(o.documents), desc="documents", disable=None):
        start = random.randint(len(text) - o.length)
        (folder / f"{n:05d}.txt").write_text(document(random, text[start:start + o.length], alphabet, o.length), encoding="utf-8", newline="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
