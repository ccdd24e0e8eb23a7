"""tools/bounds.py: a bound is never below what it bounds, and what it counts as skippable holds no selected
token."""
import json
import shutil

import pytest
import torch

import evaluate
import indexer
from tests.common import tiny_model
from tests.scripts import call, refused
from tests.test_generate import random_tokens
from tools import bounds


def by_definition(q, k, w, block):
    """The highest score in a block, bounded from products of each head, and from a box: token by token, in
    float64."""
    q, k, w = q.double(), k.double(), w.double()
    rows = {name: [] for name in bounds.BOUNDS}
    for n in range(len(k) // block):
        keys = k[n * block:(n + 1) * block]
        scores = [(q @ key).relu().mul(w).sum(-1) for key in keys]  # (R,) each
        rows["perfect"].append(torch.stack(scores).amax(0))
        ends = torch.stack([q @ key for key in keys])  # (block, R, HI)
        rows["per head"].append(highest(w, ends.amin(0), ends.amax(0)))
        corners = torch.stack((keys.amin(0), keys.amax(0)))  # (2, DI)
        products = q[..., None, :] * corners  # (R, HI, 2, DI)
        rows["box"].append(highest(w, products.amin(-2).sum(-1), products.amax(-2).sum(-1)))
    return {name: torch.stack(columns, -1) for name, columns in rows.items()}


def highest(w, low, high):
    """The larger end of each term, (R,HI) -> (R,)"""
    return torch.maximum(w * low.relu(), w * high.relu()).sum(-1)


@pytest.mark.parametrize("block", [1, 3, 8])
def test_bounds(block):
    """By their definition, and each above the next: to the rounding of sums of 16 products and 5 heads."""
    q = torch.randn(7, 5, 16)
    k = torch.randn(50, 16) + torch.randn(16)
    w = torch.randn(7, 5)
    got = bounds.bounds(q, k, w, block)
    want = by_definition(q, k, w, block)
    size = (q.abs().sum(-1) * w.abs()).sum(-1, keepdim=True) * k.abs().max()  # (R, 1): of no sum more
    error = 2 * (16 + 5) * 2**-24 * size
    for name in bounds.BOUNDS:
        assert got[name].shape == (7, 50 // block)
        assert ((got[name] - want[name]).abs() <= error).all(), name
    assert (got["box"] >= got["per head"] - error).all()
    assert (got["per head"] >= got["perfect"] - error).all()
    if block == 1:  # all of them are the score
        assert ((got["box"] - got["perfect"]).abs() <= error).all()
    else:
        assert (got["box"] > got["per head"] + error).any()
        assert (got["per head"] > got["perfect"] + error).any()


def test_skippable_blocks_hold_no_selected_token():
    """The perfect bound leaves out what lies below the k-th score of the model's own selection, and nothing
    that it takes. Few heads tie often, at 0: a tie is not below."""
    model = tiny_model(num_hidden_layers=2, index_fp8=True).eval()
    ids = random_tokens("torch", 1, 100)
    rows = torch.tensor([75, 90, 94, 99])
    found = bounds.measure(model, ids, (8, 3), rows)
    records = []
    with torch.no_grad(), evaluate.watching(model, lambda *record: records.append(record)):
        model(ids)
    assert len(found) == len(records) == 2
    for (positive, shares), (_, selecting, attending) in zip(found, records):
        assert positive == pytest.approx((selecting.w[0, rows] > 0).float().mean().item())
        [scores] = indexer.index_scores(*selecting[:3], selecting.k_scale)  # (100, 100)
        for block in (8, 3):
            for i, row in enumerate(rows.tolist()):
                threshold = scores[row, :row + 1].sort(descending=True).values[5]
                complete = (row + 1) // block
                below = {n for n in range(complete) if scores[row, n * block:][:block].amax() < threshold}
                assert shares[block, "perfect"][i].item() == pytest.approx(len(below) / complete)
                assert not below & {token // block for token in attending.indices[0, row].tolist()}
            assert (shares[block, "box"] <= shares[block, "per head"]).all()
            assert (shares[block, "per head"] <= shares[block, "perfect"]).all()
    assert any(0 < shares[3, "per head"].mean() < shares[3, "perfect"].mean() for _, shares in found)


def test_layers_that_share_are_not_counted_twice():
    model = tiny_model(indexer_types=["full", "shared", "full"]).eval()
    rows = torch.tensor([30, 39])
    assert len(bounds.measure(model, random_tokens("torch", 1, 40), (4,), rows)) == 2


def test_the_tools_of_docs_long(place, run):
    """bounds.py and recall.py on a run's checkpoint: a line for each context and size, and a file."""
    shutil.copytree(run[0], place / "looked-at")
    short = ("--checkpoint=looked-at/sparse", "--rows=5")
    code, out, err = call(place, "tools/bounds.py", *short, "--lengths=64,200", "--blocks=4,16")
    assert code == 0, err
    records = json.loads((place / "looked-at/bounds-sparse.json").read_text())
    assert [(record["T"], record["block"]) for record in records] == [(64, 4), (64, 16), (200, 4), (200, 16)]
    assert out.count("skippable") == 4
    for record in records:
        assert 0 <= record["box"] <= record["per head"] <= record["perfect"] < 1
        assert 0 < record["positive"] < 1 and len(record["perfect, by layer"]) == 2
    code, out, err = call(place, "tools/recall.py", *short, "--lengths=64,600", "--candidates=0,16")
    assert code == 0, err
    records = json.loads((place / "looked-at/recall-sparse.json").read_text())
    assert [record["T"] for record in records] == [64, 64, 600, 600] and records[0]["share"] == 1

    refused(call(place, "tools/bounds.py", *short, "--lengths=8"), "--lengths=8", "from 87 on")
    refused(call(place, "tools/bounds.py", *short, "--blocks=0"), "--blocks=0")
    refused(call(place, "tools/bounds.py", *short, "--lengths=99999999"), "--lengths=99999999", "--data")
