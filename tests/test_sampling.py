"""Generation: what is sampled, where it stops, and what a token sees."""
import functools

import pytest
import torch

import generate
from config import Config
from generate import document_starts, sample
from model import Transformer

V = 64
TINY = dict(
    vocab_size=V, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2,
    q_lora_rank=16, kv_lora_rank=24, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=12, index_n_heads=2,
    index_head_dim=16, index_topk=6, initializer_range=0.4)


def tiny(**changes):
    torch.manual_seed(0)
    return Transformer(Config(**TINY | changes), "torch", index_fp8=False).eval()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(logits, times=300, **options):
    """The ids that `sample` draws from logits (vocab,)."""
    rows = logits.expand(times, -1)
    return set(sample(rows, generator=seeded(), **options).tolist())


# ---- sample ----

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_with_ties(dtype):
    """Exactly k tokens; of equal ones the lower ids, also where the ties straddle k."""
    logits = torch.tensor([1.0, 5.0, 3.0, 5.0, 5.0, 3.0], dtype=dtype)
    assert drawn(logits, top_k=1) == {1}
    assert drawn(logits, top_k=2) == {1, 3}
    assert drawn(logits, top_k=3) == {1, 3, 4}
    assert drawn(logits, top_k=4, temperature=9.0) == {1, 2, 3, 4}
    assert drawn(logits, top_k=99, temperature=9.0) == {0, 1, 2, 3, 4, 5}
    assert drawn(torch.zeros(6), top_k=1) == {0} and drawn(torch.zeros(6), top_k=5) == {0, 1, 2, 3, 4}


def test_temperature_zero_is_the_first_maximum():
    logits = torch.tensor([[1.0, 5.0, 5.0], [2.0, 2.0, 2.0]])
    assert sample(logits, temperature=0).tolist() == [1, 0]
    assert sample(logits, temperature=0, top_k=2, top_p=0.5).tolist() == [1, 0]


def test_top_p_is_the_smallest_set():
    """Probabilities 1/2, 1/4, 1/8, 1/8: a token stays while those before it hold less than p."""
    logits = torch.tensor([0.25, 0.5, 0.125, 0.125]).log()
    sets = {1e-9: {1}, 0.49: {1}, 0.51: {0, 1}, 0.74: {0, 1}, 0.76: {0, 1, 2}, 0.9: {0, 1, 2, 3}}
    for top_p, kept in sets.items():
        assert drawn(logits, top_p=top_p) == kept, top_p
    assert drawn(torch.zeros(4), top_p=0.5) == {0, 1}  # ties: exactly half
    # of what top_k leaves: 2/3 and 1/3
    assert drawn(logits, top_k=2, top_p=0.6) == {1} and drawn(logits, top_k=2, top_p=0.7) == {0, 1}


def test_top_p_one_drops_nothing():
    """Not one of a large vocabulary, whose rarest tokens a running sum in float32 would not see."""
    logits = torch.randn(2, 129280, generator=seeded()) * 4
    for top_k, kept in ((None, 129280), (1000, 1000)):
        p = generate.restrict(logits, top_k=top_k, top_p=1.0).softmax(-1)
        assert (p > 0).sum(-1).tolist() == [kept] * 2


def test_frequencies_are_the_probabilities():
    """40,000 draws: within five standard deviations of softmax(logits / temperature)."""
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    n = 40000
    for options, kept in ((dict(), [0, 1, 2, 3]), (dict(top_k=3), [0, 1, 2]), (dict(top_p=0.8), [1, 2])):
        p = torch.zeros(4)
        p[kept] = (logits[kept] / 1.3).softmax(-1)
        counts = sample(logits.expand(n, -1), 1.3, generator=seeded(3), **options).bincount(minlength=4)
        assert ((counts - n * p).abs() <= 5 * (n * p * (1 - p)).sqrt()).all(), options


# ---- where a document begins ----

def test_document_starts_are_those_of_training():
    """By a loop, and as data.Batches has them: an end of text belongs to the document that it ends."""
    idx = torch.tensor([[5, 9, 5, 5, 8, 9, 5], [9, 9, 1, 2, 3, 4, 8]])
    expected = torch.zeros_like(idx)
    for b in range(2):
        for t in range(1, 7):
            expected[b, t] = t if idx[b, t - 1] in (8, 9) else expected[b, t - 1]
    starts = document_starts(idx, [9, 8])
    assert torch.equal(starts, expected.int()) and starts.dtype == torch.int32
    assert not document_starts(idx, []).any()
    assert document_starts(idx[:, :1], [9]).tolist() == [[0], [0]]


# ---- where generation stops ----

def scripted(monkeypatch, rows):
    """Let generation draw these tokens, a list per row, instead of the model's."""
    tokens = iter(zip(*rows))
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor(next(tokens)))


def test_each_row_stops_by_itself_at_any_end(monkeypatch):
    """-1 from then on, also where it would draw the end again; the last row ends the stream."""
    scripted(monkeypatch, [[1, 9, 9, 3, 1, 1], [2, 2, 2, 8, 2, 2], [3, 3, 3, 3, 9, 3]])
    idx = torch.ones(3, 4, dtype=torch.long)
    rows = [token.tolist() for token in generate.stream(tiny(), idx, 6, end_ids=(9, 8))]
    assert rows == [[1, 2, 3], [9, 2, 3], [-1, 2, 3], [-1, 8, 3], [-1, -1, 9]]


def test_rows_that_ended_are_filled_up(monkeypatch):
    scripted(monkeypatch, [[1, 8, 5, 5], [2, 2, 9, 5]])
    idx = torch.tensor([[9, 9], [8, 7]])
    out = tiny().generate(idx, 4, end_ids=(9, 8))
    assert out.tolist() == [[9, 9, 1, 8, 9], [8, 7, 2, 2, 9]]


@pytest.mark.parametrize("options", [dict(), dict(end_ids=(9,), go_on=True), dict(end_ids=[])])
def test_nothing_stops(monkeypatch, options):
    scripted(monkeypatch, [[1, 9, 9, 4], [2, 9, 3, 3]])
    idx = torch.tensor([[1, 9], [1, 2]])  # ends in the prompt stop nothing, not even as its last token
    assert tiny().generate(idx, 4, **options)[:, 2:].tolist() == [[1, 9, 9, 4], [2, 9, 3, 3]]


def test_an_end_in_the_prompt_does_not_stop(monkeypatch):
    scripted(monkeypatch, [[1, 2, 3]])
    assert tiny().generate(torch.tensor([[4, 9]]), 3, end_ids=(9,)).tolist() == [[4, 9, 1, 2, 3]]


def test_no_token_is_asked_for():
    assert tiny().generate(torch.tensor([[4, 9]]), 0, end_ids=(9,)).tolist() == [[4, 9]]


@pytest.mark.parametrize("options,message", [
    (dict(n=-1), "4 tokens \\+ -1"), (dict(n=100), "max_position_embeddings=32"),
    (dict(temperature=-1.0), "temperature=-1"), (dict(temperature=float("nan")), "temperature=nan"),
    (dict(temperature=float("inf")), "temperature=inf"),
    (dict(top_k=0), "top_k=0"), (dict(top_p=0.0), "top_p=0"), (dict(top_p=1.5), "top_p=1.5"),
    (dict(chunk=0), "chunk=0"), (dict(T=0), "prompt of 0 tokens")])
def test_what_is_refused(options, message):
    idx = torch.ones(1, options.pop("T", 4), dtype=torch.long)
    with pytest.raises(ValueError, match=message) as error:
        tiny(max_position_embeddings=32).generate(idx, options.pop("n", 3), **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_damaged_model_is_refused(temperature):
    """Not hidden by an argmax that happens to be a token."""
    model = tiny()
    model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="not a number"):
        model.generate(torch.ones(1, 4, dtype=torch.long), 3, temperature=temperature)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_damage_that_shows_later_is_refused(value, monkeypatch):
    """Of a word that the prompt does not hold, and that comes second."""
    model = tiny()
    model.model.embed_tokens.weight.data[7] = float(value)
    words = iter((3, 7, 5, 5))
    monkeypatch.setattr(generate, "sample", lambda *args: torch.tensor([next(words)]))
    rows = generate.stream(model, torch.ones(1, 4, dtype=torch.long), 4)
    assert [next(rows).item(), next(rows).item()] == [3, 7]
    with pytest.raises(ValueError, match="not a number"):
        next(rows)


# ---- what a token sees ----

def greedy(model, tokens, n, **options):
    """-> the n tokens that follow a list of tokens."""
    idx = torch.tensor([tokens])
    return model.generate(idx, n, temperature=0, **options)[0, len(tokens):].tolist()


def texts(seed, *lengths):
    """Random tokens of 1..60, none of which ends a text."""
    random = seeded(seed)
    return [torch.randint(1, 60, (n,), generator=random).tolist() for n in lengths]


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("chunk", [1, 5, 1024])
def test_a_document_is_a_prompt_of_its_own(attention, chunk):
    """Behind an end of text, within the prompt: the same greedy continuation as without what stands before
    it, also with prefill in chunks that end within a document, with selections of 6 from up to 30 tokens."""
    model = tiny()
    model.attention = attention
    for seed in range(4):
        before, own = texts(seed, 13, 17)
        options = dict(end_ids=(61, 62), chunk=chunk, go_on=True)
        alone = greedy(model, own, 12, **options)
        assert greedy(model, before + [62] + own, 12, **options) == alone
        # and seeing it makes a difference
        if chunk == 1024:
            assert greedy(model, before + [62] + own, 12) != alone


def test_compiled_steps(monkeypatch):
    """torch.compile changes nothing but the speed of a step."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    model = tiny()
    prompt = texts(3, 15)[0]
    assert greedy(model, prompt, 12, compiled=True) == greedy(model, prompt, 12)


def test_default_chunk(monkeypatch):
    """What a GPU's free memory allows, what the allocator holds back counted in."""
    config = tiny().config
    assert generate.default_chunk(config, 1, torch.device("cpu")) == 1024
    gpu = torch.device("cuda")
    for name, value in dict(memory_reserved=3 * 10**9, memory_allocated=10**9).items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    chunks = []
    for free in (0, 6 * 10**9, 10**12):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free, 10**12))
        chunks.append([generate.default_chunk(config, B, gpu) for B in (1, 40, 10**6)])
    assert chunks[0][0] > chunks[0][2] == 1024 and chunks[2][0] == 32768
    assert chunks[1][1] == pytest.approx(4 * chunks[0][1], abs=4)


def test_rows_with_documents_of_their_own():
    """Two prompts side by side, only one of which holds an end of text."""
    model = tiny()
    before, own, other = texts(7, 9, 10, 20)
    idx = torch.tensor([before + [62] + own, other])
    options = dict(end_ids=(62,), go_on=True)
    out = model.generate(idx, 10, temperature=0, **options)
    assert out[0, 20:].tolist() == greedy(model, own, 10, **options)
    assert out[1, 20:].tolist() == greedy(model, other, 10, **options)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_going_on_begins_a_document(attention, monkeypatch):
    """What is generated behind a generated end of text: the logits are those of a prompt that holds nothing
    but the new document. One row ends early, the other never: each sees its own text. Angles of RoPE at other
    positions round otherwise, so not to the last bit."""
    model = tiny()
    model.attention = attention
    seen = []
    prompt = torch.tensor([texts(1, 8)[0], texts(2, 8)[0]])
    script = torch.stack((torch.arange(5, 16), torch.arange(21, 32)))  # (2, 11)
    script[0, 1] = 62
    tokens = iter(script.T)

    def watched(logits, *args):
        seen.append(logits)
        return next(tokens)

    monkeypatch.setattr(generate, "sample", watched)
    model.generate(prompt, 11, end_ids=(62,), go_on=True)
    new = script[:1, 2:]  # (1, 9) behind the end of text
    with torch.no_grad():
        alone, _ = model(new)  # (1, 9, vocab)
        whole, _ = model(torch.cat((prompt, script), 1)[1:])  # (1, 19, vocab)
    for i in range(8):
        torch.testing.assert_close(seen[i + 3][0], alone[0, i], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(seen[i + 3][1], whole[0, 10 + i], rtol=1e-4, atol=1e-4)


def test_packed_training_and_generation_agree():
    """The logits of a packed row, as training sees it, are those of its prefill with documents."""
    model = tiny()
    first_text, second = texts(3, 11, 14)
    idx = torch.tensor([first_text + [62] + second])
    first = document_starts(idx, [62])
    with torch.no_grad():
        packed, _ = model(idx, first=first)
    tokens = list(generate.stream(model, idx, 1, temperature=0, end_ids=(62,), chunk=4))
    assert tokens[0].item() == packed[0, -1].argmax().item()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("n", range(torch.cuda.device_count()))
def test_graph_of_a_decoding_step_with_documents(n):
    """One CUDA graph for every position, on whichever GPU the model is: the tokens of the reference, stopped
    rows and documents included."""
    device = f"cuda:{n}"
    prompt = torch.tensor([texts(1, 8)[0] + [62] + texts(2, 8)[0], texts(3, 17)[0]])
    for options in (dict(end_ids=(62,), go_on=True), dict(end_ids=tuple(range(0, V, 5)))):
        outs = []
        for backend in ("torch", "triton"):
            model = tiny()
            model.backend = backend
            model.to(device)
            outs.append(model.generate(prompt.to(device), 24, temperature=0, **options).tolist())
        assert outs[0] == outs[1]
