"""view.py: what the page holds against the model's own selection and attention in float64, and the page in a
browser, with real keys and clicks."""
import base64
import json
import math
import re
import shutil
import zlib

import numpy as np
import pytest
import tokenizers
import torch

import indexer
import view
from model import watched
from support.tokenizer import FolderTokenizer, tokenizer
from tests.browser import CHROMIUM, Browser
from tests.common import tiny_model
from tests.scripts import call, edit_json, refused

STEP = 0.501  # half a step of a code, and what float32 adds to it
MISSED = 3
TRAP = 'x </script><script>document.title="taken"</script> <!-- &amp; é€😀 {{facts}} <b>"\'\n\ttab\r\n'


# ---- the data ----

def unpack(packed, T, k, missed, parts):
    """The layout that support/view.html reads, by itself -> dict of arrays; those of the selection are lists
    of a row per query."""
    content = zlib.decompress(base64.b64decode(packed))
    counts = [min(t + 1, k) for t in range(T)]
    ends = np.cumsum(counts)[:-1]
    N = sum(counts)
    offset = 0

    def take(dtype, *shape):
        nonlocal offset
        array = np.frombuffer(content, dtype, math.prod(shape), offset).reshape(shape)
        offset += array.nbytes
        return array

    gaps = take("<u2", N)
    found = dict(missed=take("<u2", T, missed), mass=take("<u2", T, parts) / 65535)
    attention = take("u1", parts, N)
    index = take("u1", N)
    found["missed_attention"] = take("u1", parts, T, missed)
    found["missed_index"] = take("u1", T, missed)
    assert offset == len(content)
    found["chosen"] = [np.cumsum(row.astype(int) + 1) - 1 for row in np.split(gaps, ends)]
    found["attention"] = [np.split(row, ends) for row in attention]
    found["index"] = np.split(index, ends)
    return found


def operations_of(model, idx):
    """What each layer gave to `select` (of a shared layer: the one before) and `sparse_attention`, in a
    forward of its own -> list of (arguments, arguments)."""
    seen = []
    last = None

    def wrap(layer, h, ops):
        def select(*arguments):
            nonlocal last
            last = arguments
            return ops.select(*arguments)

        def sparse_attention(*arguments):
            seen.append((last, arguments))
            return ops.sparse_attention(*arguments)

        return ops._replace(select=select, sparse_attention=sparse_attention)

    with watched(model, wrap), torch.no_grad():
        model(idx, logits_of=None)
    return seen


def assert_codes(got, p, what):
    """Codes of probabilities p, float64."""
    with np.errstate(divide="ignore"):
        want = np.clip(255 + 16 * np.log2(p), 0, 255)
    assert np.abs(got.astype(float) - want).max(initial=0) <= STEP, (what, got, want)


def check_query(t, found, by_head, selecting, attending):
    """A query's part of the page against a softmax over plain sums in float64."""
    q_index, k_index, w, _, k_scale, *_ = selecting
    q, latents, indices, scale, _ = attending
    selected = indices[0, t][indices[0, t] >= 0].numpy()
    assert found["chosen"][t].tolist() == selected.tolist()
    others = np.setdiff1d(np.arange(t + 1), selected)

    logits = (q[0, t].double() @ latents[0, :t + 1].double().T * scale).numpy()  # (H, t + 1)
    weights = np.exp(logits - logits.max(1, keepdims=True))
    dense = weights / weights.sum(1, keepdims=True)
    sparse = weights[:, selected] / weights[:, selected].sum(1, keepdims=True)
    parts = [slice(None), *range(len(dense))] if by_head else [slice(None)]  # the mean, then each head
    for r, heads in enumerate(parts):
        p = np.atleast_2d(dense[heads]).mean(0)  # (t + 1,)
        assert_codes(found["attention"][r][t], np.atleast_2d(sparse[heads]).mean(0), "attention")
        assert abs(found["mass"][t, r] - p[others].sum()) <= 1e-5 + 0.5 / 65535
    mean = dense.mean(0)

    dots = (q_index[0, t].double() @ k_index[0, :t + 1].double().T).clamp(min=0).numpy()  # (HI, t + 1)
    scores = (w[0, t].double().numpy()[:, None] * dots).sum(0)
    if k_scale is not None:
        scores = scores * k_scale[0, :t + 1].double().numpy()
    shares = np.exp(scores - scores[selected].max())
    shares = shares / shares[selected].sum()
    assert_codes(found["index"][t], shares[selected], "index")

    kept = found["missed_attention"][0, t] > 0
    missed = found["missed"][t][kept]
    assert np.isin(missed, others).all() and len(set(missed)) == len(missed)
    assert (np.diff(mean[missed]) <= 1e-6).all()
    rest = np.setdiff1d(others, missed)
    if not kept.all():  # all that can be told from nothing is there
        assert (mean[rest] < 2**-15.9).all()
    elif len(rest):
        assert mean[rest].max() <= mean[missed].min() + 1e-6
    for r, heads in enumerate(parts):
        p = np.atleast_2d(dense[heads]).mean(0)
        assert_codes(found["missed_attention"][r, t][kept], p[missed], "missed attention")
    assert_codes(found["missed_index"][t][kept], shares[missed], "missed index")


@pytest.mark.parametrize("by_head", [True, False])
@pytest.mark.parametrize("sizes", [
    dict(),
    dict(index_fp8=True),
    dict(indexer_types=["full", "shared", "full"])])
@pytest.mark.parametrize("slices", [2**24, 300])
def test_the_page_holds_what_the_model_reads(monkeypatch, by_head, sizes, slices):
    """Every query of every layer asked for, those within k and those beyond."""
    monkeypatch.setattr(indexer, "SLICE", slices)
    model = tiny_model(**sizes).eval()
    ids = torch.randint(61, (29,)).tolist()
    with torch.no_grad():
        packed = view.read(model, ids, [0, 1, 2], MISSED, by_head)
    operations = operations_of(model, torch.tensor([ids]))
    parts = 1 + 3 * by_head
    beyond = 0
    for layer, (selecting, attending) in enumerate(operations):
        found = unpack(packed[layer], 29, 6, MISSED, parts)
        for t in range(29):
            check_query(t, found, by_head, selecting, attending)
        beyond += found["mass"][6:, 0].sum()
        assert not found["mass"][:6].any() and not found["missed_attention"][:, :6].any()
    assert beyond > 1  # there is something to miss


def test_only_the_layers_asked_for():
    model = tiny_model().eval()
    ids = torch.randint(61, (20,)).tolist()
    with torch.no_grad():
        every = view.read(model, ids, [0, 1, 2], MISSED, False)
        some = view.read(model, ids, [0, 2], MISSED, False)
    assert some == {0: every[0], 2: every[2]}
    assert view.chosen_layers("2,0", 3) == [0, 2]


def test_more_missed_than_tokens():
    model = tiny_model().eval()
    ids = torch.randint(61, (9,)).tolist()
    with torch.no_grad():
        packed = view.read(model, ids, [1], 100, False)
    found = unpack(packed[1], 9, 6, 9, 1)
    kept = (found["missed_attention"][0] > 0).sum(1)
    assert kept.tolist()[:6] == [0] * 6 and (kept <= [0] * 6 + [1, 2, 3]).all() and kept.sum() > 0


def test_codes():
    """255 is 1, 16 steps down a half; what is too small for a code is 0, and nothing is off by more than half
    a step."""
    powers = torch.tensor([1, 0.5, 0.25, 2**-15.9375, 2**-17, 0.0])
    assert view.codes(powers).tolist() == [255, 239, 223, 0, 0, 0]
    p = torch.rand(1000).double().exp2() / 2
    back = 2 ** ((view.codes(p).double() - 255) / 16)
    assert ((back / p).log2().abs() <= 1 / 32 + 1e-9).all()


def test_a_damaged_model_is_refused():
    model = tiny_model().eval()
    model.model["layers"][1].self_attn.kv_b_proj.weight.data[0, 0] = float("nan")
    with torch.no_grad(), pytest.raises(ValueError, match="not a number"):
        view.read(model, list(range(20)), [0, 1, 2], MISSED, False)


# ---- the text ----

def test_pieces_of_bytes():
    """Together they are the text; a character of several tokens stands at the last of them."""
    tokens_of = tokenizer("bytes")
    text = "aé€\n😀 b"
    pieces = view.pieces(tokens_of, tokens_of.encode(text))
    assert pieces == ["a", "", "é", "", "", "€", "\n", "", "", "", "😀", " ", "b"]
    cut = view.pieces(tokens_of, tokens_of.encode(text)[:5])  # within the euro sign
    assert cut[:4] == ["a", "", "é", ""] and set(cut[4]) == {"\ufffd"}


def test_pieces_of_a_tokenizer_json(tmp_path):
    """Word pieces whose decoder makes spaces, none before the first; and one that stands for half a
    character."""
    vocabulary = {"▁the": 0, "▁cat": 1, "s": 2, "<0xC3>": 3, "<0xA9>": 4, "?": 5, "<0x0A>": 6}
    inner = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, [], unk_token="?", byte_fallback=True))
    inner.decoder = tokenizers.decoders.Sequence([
        tokenizers.decoders.Replace("▁", " "), tokenizers.decoders.ByteFallback(),
        tokenizers.decoders.Fuse(), tokenizers.decoders.Strip(" ", 1, 0)])
    inner.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "config.json").write_text("{}")
    tokens_of = FolderTokenizer(tmp_path)
    pieces = view.pieces(tokens_of, [0, 1, 2, 6, 3, 4, 1])
    assert pieces == ["the", " cat", "s", "\n", "", "é", " cat"]


# ---- the script ----

@pytest.fixture(scope="module")
def made(place, run):
    """The script on a text that holds traps -> the page's path, the text, its layers as `unpack` reads
    them."""
    text = TRAP + (place / "text.txt").read_text()[:260]
    (place / "trap.txt").write_text(text, newline="")
    code, out, err = call(place, "view.py", f"--checkpoint={run[0]}/sparse", "--text=trap.txt",
                          "--title=<i>A & B</i>", f"--missed={MISSED}")
    assert code == 0, err
    path = run[0] / "view-trap.html"
    page = path.read_text()
    T = len(text.encode())
    assert f"{path}: {T} tokens, 2 layers, {len(page) / 1e6:.1f} MB" in out
    assert "trained on contexts of 32" in err
    packed = re.findall(r'<script type="text/plain" id="layer-\d+">([^<]+)</script>', page)
    return path, text, [unpack(layer, T, 8, MISSED, 3) for layer in packed]


def facts_of(path):
    """The facts in a page."""
    return json.loads(re.search(r'id="page-facts">([^<]+)</script>', path.read_text())[1])


def test_nothing_in_the_text_is_markup(made):
    """Not a script's end, not a comment, not a placeholder of the template."""
    path, text, _ = made
    page = path.read_text()
    assert page.count("<script") == page.count("</script>") == 2 + 2  # facts, program, two layers
    assert "<i>" not in page.split("<script")[0] and "&lt;i&gt;A &amp; B&lt;/i&gt;" in page
    facts = facts_of(path)
    assert "".join(facts["tokens"]) == text and facts["title"] == "<i>A & B</i>"


def test_the_page_needs_nothing_else(made):
    """No address but data: and the name of SVG's namespace."""
    page = made[0].read_text()
    assert set(re.findall(r"https?://[^\s'\"<]+", page)) == {"http://www.w3.org/2000/svg"}
    assert not re.search(r"<link(?![^>]*href=\"data:)|\bsrc=|@import|url\(", page)
    assert "default-src 'none'" in page


def test_options(place, run):
    """The first tokens, some layers, no heads, another file."""
    code, out, err = call(
        place, "view.py", f"--checkpoint={run[0]}/sparse", "--text=text.txt", "--max_tokens=30", "--layers=1",
        "--heads=mean", "--out=some.html", "--index_fp8=false")
    assert code == 0 and "some.html: 30 tokens of " in out and "1 layers" in out and err == "", err
    facts = facts_of(place / "some.html")
    assert len(facts["tokens"]) == 30 and facts["layers"] == [1] and not facts["byHead"]
    assert facts["title"] == "text.txt" and facts["trained"] is None and facts["available"] > 30


@pytest.mark.parametrize("options, words", [
    ((), ["--text=FILE"]),
    (["--text=nowhere.txt"], ["nowhere.txt: no such file"]),
    (["--text=bytes.bin"], ["bytes.bin: no UTF-8"]),
    (["--text=short.txt"], ["short.txt", "index_topk=8", "longer text"]),
    (["--text=empty.txt"], ["empty.txt", "0 tokens"]),
    (["--text=text.txt", "--max_tokens=8"], ["index_topk=8", "--max_tokens"]),
    (["--text=text.txt", "--max_tokens=65537"], ["--max_tokens=65537", "65536"]),
    (["--text=text.txt", "--layers=2"], ["--layers=2", "from 0 to 1"]),
    (["--text=text.txt", "--layers=a"], ["--layers=a", "from 0 to 1"]),
    (["--text=text.txt", "--missed=0"], ["--missed=0"]),
    (["--text=text.txt", "--heads=some"], ["--heads", "some"]),
    (["--text=text.txt", "--out=nowhere/view.html"], ["--out=nowhere/view.html", "cannot be written"]),
    (["--text=text.txt", "--out=."], ["--out=."]),
    (["--text=text.txt", "--checkpoint=nowhere"], ["nowhere"]),
    (["--text=text.txt", "--chekpoint=out"], ["did you mean --checkpoint"]),
])
def test_bad_input(place, run, options, words):
    (place / "bytes.bin").write_bytes(b"\xff\xfe\x00")
    (place / "short.txt").write_text("12345678")
    (place / "empty.txt").write_text("")
    refused(call(place, "view.py", f"--checkpoint={run[0]}/sparse", *options), *words)


def test_a_checkpoint_without_an_indexer(place, run):
    shutil.copytree(run[0] / "sparse", place / "no-indexer")
    edit_json(place / "no-indexer" / "config.json", lambda values: values.update(index_topk=0))
    result = call(place, "view.py", "--checkpoint=no-indexer", "--text=text.txt")
    refused(result, "no indexer", "--stage=warmup")


def test_a_page_too_large_for_a_browser(place, run, monkeypatch):
    read_text = ("view.py", f"--checkpoint={run[0]}/sparse", "--text=text.txt", "--max_tokens=99")
    monkeypatch.setattr(view, "PAGE_LIMIT", 10000)
    refused(call(place, *read_text), "too large", "--layers")
    monkeypatch.setattr(view, "PAGE_LIMIT", 2**28)
    monkeypatch.setattr(view, "HEADS_LIMIT", 1000)
    code, _, err = call(place, *read_text, "--out=large.html")
    assert code == 0 and not facts_of(place / "large.html")["byHead"], err


# ---- in a browser ----

browser_only = pytest.mark.skipif(not CHROMIUM, reason="chromium is not installed")


@pytest.fixture
def browser(made, tmp_path):
    """The page in a browser, which in the end has complained of nothing and asked for nothing else."""
    with Browser(tmp_path) as browser:
        browser.open(made[0])
        yield browser
        assert browser.errors == []
        assert browser.requests == [made[0].as_uri()]


def chosen_in(browser):
    """Number of the token that the page has chosen; what a screen reader is told of it agrees."""
    told = browser.one("#text", "x => x.getAttribute('aria-activedescendant')")
    marked = browser.each("#text .query, #text [aria-selected]", "x => x.id")
    assert marked == [told]
    return int(told[1:])


def coloured(browser):
    """-> {token: level} and the missed tokens, as the page shows them."""
    levels = browser.each("#text [data-level]", "x => [Number(x.id.slice(1)), Number(x.dataset.level)]")
    missed = browser.each("#text [data-missed]", "x => Number(x.id.slice(1))")
    return dict(levels), missed


def assert_shows(browser, found, t, head=0):
    """The text's colours, the numbers and the lists are those of query t in this layer."""
    levels, missed = coloured(browser)
    p = 2 ** ((found["attention"][head][t].astype(float) - 255) / 16)
    want = np.clip(10 + np.ceil(np.log2(p) - 1 / 32 + 1e-9), 1, 10).astype(int)
    assert levels == dict(zip(found["chosen"][t].tolist(), want.tolist()))
    assert missed == sorted(found["missed"][t][found["missed_attention"][0, t] > 0].tolist())
    assert browser.text("#count") == f"{min(t + 1, 8)} of {t + 1}"
    kept = browser.text("#kept")
    assert abs(float(kept.strip("<>%")) / 100 - (1 - found["mass"][t, head])) <= 0.0051, kept
    listed = browser.each("#strongest button", "x => Number(x.dataset.token)")
    order = np.lexsort((-found["index"][t].astype(int), -found["attention"][head][t].astype(int)))
    assert listed == found["chosen"][t][order][:8].tolist()


@browser_only
def test_the_text_is_there(browser, made):
    _, text, _ = made
    assert browser.text("#text") == text
    assert browser.evaluate("document.title").startswith("<i>A & B</i>")
    assert browser.text("h1") == "<i>A & B</i>"
    assert len(browser.each("#text [role=option]", "x => x.id")) == len(text.encode())


@browser_only
def test_a_click_shows_what_the_token_reads(browser, made):
    """Early tokens, which read all, late ones, and one that is half a character."""
    _, text, layers = made
    half = text.encode().index("é".encode())
    assert_shows(browser, layers[1], chosen_in(browser))
    for t in (0, 5, half, half + 40, 200):
        browser.click(f"#t{t}")
        assert chosen_in(browser) == t
        assert_shows(browser, layers[1], t)
    browser.click(f"#t{half}")
    assert "part of “é”" in browser.text("#query-name")


@browser_only
def test_keys_of_the_text(browser, made):
    _, text, layers = made
    T = len(text.encode())
    browser.click("#t120")
    for key, t in (("ArrowRight", 121), ("ArrowLeft", 120), ("PageDown", 184), ("PageUp", 120), ("Home", 0),
                   ("ArrowLeft", 0), ("End", T - 1), ("ArrowRight", T - 1)):
        browser.key(key)
        assert chosen_in(browser) == t, key
        assert_shows(browser, layers[1], t)
    browser.click("#t120")
    here = browser.middle("#text .query")
    browser.key("ArrowDown")
    below = browser.middle("#text .query")
    browser.key("ArrowUp")
    assert chosen_in(browser) == 120
    assert below["y"] > here["y"] and abs(below["x"] - here["x"]) < 12


@browser_only
def test_layers_and_heads(browser, made):
    """By keys anywhere, by buttons, and by arrows within their group; Tab goes past a group."""
    _, _, layers = made
    browser.click("#t150")
    browser.key(",")
    assert_shows(browser, layers[0], 150)
    browser.key(",")  # the first stays the first
    assert_shows(browser, layers[0], 150)
    browser.key(".")
    assert_shows(browser, layers[1], 150)
    for head in (1, 2, 0):
        browser.key("h")
        assert_shows(browser, layers[1], 150, head)
    browser.click("#layers button:nth-child(1)")
    assert_shows(browser, layers[0], 150)
    browser.click("#heads button:last-child")
    assert_shows(browser, layers[0], 150, 2)

    browser.click("#t151")
    browser.key("Tab")
    active = "document.activeElement"
    assert browser.evaluate(f"{active}.closest('#layers') && {active}.getAttribute('aria-checked')") == "true"
    browser.key("ArrowDown")
    assert_shows(browser, layers[1], 151, 2)
    browser.key("Tab")
    assert browser.evaluate(f"!!{active}.closest('#heads')")
    browser.key("ArrowRight")
    assert_shows(browser, layers[1], 151, 0)
    checked = browser.each("[aria-checked=true]", "x => x.textContent")
    assert len(checked) == 2 and checked[1] == "mean"


@browser_only
def test_enter_goes_to_a_listed_token(browser, made):
    _, _, layers = made
    browser.click("#t150")
    for _ in range(3):
        browser.key("Tab")
    row = browser.evaluate("Number(document.activeElement.dataset.token)")
    assert row in layers[1]["chosen"][150]
    browser.key("Enter")
    assert chosen_in(browser) == row
    assert_shows(browser, layers[1], row)
    assert browser.evaluate("document.activeElement.id") == "text"  # where the arrows go on


@browser_only
def test_what_is_said(browser):
    """The live region, the names of all that can be reached, the histogram in words."""
    browser.click("#t150")
    browser.wait("document.querySelector('#live').textContent.includes('token 151')")
    said = browser.text("#live")
    assert "reads 8 of 151 tokens" in said and "layer 1" in said and "Most: " in said
    assert "How many tokens back" in browser.one("#histogram", "x => x.getAttribute('aria-label')")
    browser.call("Accessibility.enable")
    nodes = browser.call("Accessibility.getFullAXTree")["nodes"]
    kinds = {}
    for node in nodes:
        if not node["ignored"]:
            kinds.setdefault(node["role"]["value"], []).append(node.get("name", {}).get("value", ""))
    assert kinds["listbox"] == ["Text, by tokens"] and len(kinds["radio"]) == 2 + 3
    for kind in ("button", "radio", "radiogroup", "listbox", "option", "complementary"):
        assert all(kinds[kind]), (kind, kinds[kind])


@browser_only
def test_light_and_dark(browser, made, tmp_path):
    """As the system is, and the other one by button and key."""
    paper = "getComputedStyle(document.body).backgroundColor"

    def brightness(browser):
        return sum(map(int, re.findall(r"\d+", browser.evaluate(paper))))

    assert brightness(browser) > 600
    browser.click("#theme")
    assert brightness(browser) < 150
    browser.key("t")
    assert brightness(browser) > 600
    with Browser(tmp_path / "dark", dark=True) as other:
        other.open(made[0])
        assert brightness(other) < 150 and other.errors == []
        other.click("#theme")
        assert brightness(other) > 600


@browser_only
def test_help_and_tip(browser, made):
    _, _, layers = made
    shown = "document.querySelector('#about').checkVisibility()"
    assert not browser.evaluate(shown)
    browser.key("?")
    assert browser.evaluate(shown)
    browser.click("#help")
    assert not browser.evaluate(shown)
    browser.click("#t150")
    tip = "document.querySelector('#tip:not([hidden])')?.textContent"
    assert not browser.evaluate(tip)
    earlier = layers[1]["chosen"][150][0]
    browser.hover(f"#t{earlier}")
    assert f"{150 - earlier} tokens back" in browser.evaluate(tip)
    browser.key("ArrowRight")
    assert not browser.evaluate(tip)  # it was the other query's


@browser_only
def test_a_narrow_window(made, tmp_path):
    """Nothing is wider than a phone."""
    with Browser(tmp_path, width=390, height=844) as browser:
        browser.open(made[0])
        browser.click("#t20")
        assert chosen_in(browser) == 20
        assert browser.evaluate("document.documentElement.scrollWidth") <= 390
        assert browser.errors == []


@browser_only
def test_a_broken_page_is_noticed(made, tmp_path):
    """That these tests can fail: a page whose data is cut says so on the console."""
    path = tmp_path / "broken.html"
    path.write_text(made[0].read_text().replace("deflate", "gzip"))
    with Browser(tmp_path / "profile") as browser:
        with pytest.raises(AssertionError, match="never true"):
            browser.call("Page.navigate", url=path.as_uri())
            browser.wait("document.documentElement?.dataset.complete", seconds=3)
        assert browser.errors and "cannot be read" in browser.text("#query-place")
