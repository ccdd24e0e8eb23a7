"""The README points at what it names."""
import re

from tests.scripts import ROOT


def test_readme_points_at_what_it_names():
    """The reading order's lines hold definitions, and its pictures and files exist."""
    text = (ROOT / "README.md").read_text()
    places = re.findall(r"\[(\S+\.py):(\d+)\]\((\S+\.py)#L(\d+)\)\s+`(\w+)`", text)
    assert len(places) > 10
    for file, line, linked, anchor, name in places:
        assert (file, line) == (linked, anchor)
        there = (ROOT / file).read_text().splitlines()[int(line) - 1]
        assert re.match(rf"(def|class) {name}\b", there), (file, line, name)
    for target in re.findall(r"\]\((results/[^)]+)\)", text):
        assert (ROOT / target).exists(), target
