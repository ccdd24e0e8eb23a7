"""Text that rewards exact recall: the standard library with random strings between its lines, each of which comes once more further on.

    python copies.py FOLDER                # then train.py --data=FOLDER; --distance bounds how far on

Ordinary text teaches small models little about copying, and evaluate.py's copy task then compares two attentions at chance.
"""
import heapq
import math
import random
import string
from pathlib import Path

import cli
import data

LENGTH = 32  # characters of a string, as in evaluate.py


def with_copies(text, rng, distance):
    """text (str) with a new random string behind every second line or so, and again from LENGTH to `distance` characters later, log-uniformly."""
    out, position, due = [], 0, []  # due: heap of (where it comes again, string)
    for line in text.splitlines(keepends=True):
        out.append(line)
        position += len(line)
        while due and due[0][0] <= position:
            out.append(heapq.heappop(due)[1] + "\n")
            position += LENGTH + 1
        if rng.random() < 0.5:
            out.append("".join(rng.choices(string.ascii_letters + string.digits + string.punctuation, k=LENGTH)) + "\n")
            position += LENGTH + 1
            heapq.heappush(due, (position + math.exp(rng.uniform(math.log(LENGTH), math.log(distance))), out[-1][:-1]))
    return "".join(out)


def main():
    """Write the folder, a file per document of the standard library."""
    parser = cli.Parser(__doc__)
    parser.add_argument("folder", type=Path, help="to write; must not exist yet")
    parser.add_argument("--distance", type=int, default=400, help="farthest repetition in characters, best within the context (default %(default)s)")
    o = parser.parse_args()
    if o.folder.exists():
        raise ValueError(f"{o.folder} exists; name a new folder")
    if o.distance <= LENGTH:
        raise ValueError(f"--distance={o.distance}: must be above the strings' {LENGTH} characters")
    o.folder.mkdir(parents=True)
    rng = random.Random(0)
    for number, (name, text) in enumerate(data.documents("python")):
        (o.folder / f"{number:04d}-{Path(name).name}.txt").write_text(with_copies(text, rng, o.distance), encoding="utf-8")
    print(f"{number + 1} documents: {o.folder}")
    return 0


if __name__ == "__main__":
    cli.run(main)
