"""Decoding from caches is the forward without them, from FP8 caches too, and behind an end of text that of a
fresh prompt. (T25): docs/TRAPS.md. How tokens are drawn and where a text stops: tests/test_sampling.py."""
import pytest
import torch

import generate
import sparse_attn
from config import Config
from tests.common import FLOAT32, assert_close, device_of, tiny_model

END = 60  # ends a text
STOP = 59  # so does this


@pytest.fixture(params=["torch", "triton"])
def backend(request):
    if request.param == "triton":
        pytest.importorskip("triton")
    return request.param


def random_tokens(backend, B, S):
    return torch.randint(0, 59, (B, S), device=device_of(backend))


@torch.no_grad()
def cached(model, x, chunks, caches, **changes):
    """Logits of x (B,S), fed to the caches in chunks of these lengths."""
    parts = []
    for position in torch.arange(x.shape[1], device=x.device).split(chunks):
        parts.append(model(x[:, position], caches=caches, position=position, **changes)[0])
    return torch.cat(parts, 1)


def new_caches(model, B, capacity=40, cache=sparse_attn.Cache, **options):
    """One cache per layer."""
    device = model.lm_head.weight.device
    layers = range(model.config.num_hidden_layers)
    return [cache(model.config, B, capacity, device, torch.float32, **options) for _ in layers]


# ---- caches ----

@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("index_fp8", [False, True])
@pytest.mark.parametrize("chunks", [[1] * 30, [3] * 10, [13, 1, 1, 1, 14], [20, 1] + [1] * 9, [30]], ids=str)
def test_cached_decoding_chunked_prefill_and_one_forward_agree(attention, index_fp8, chunks):
    """(T25) Across the boundary of k = 6 tokens, before which nothing is selected."""
    model = tiny_model(attention=attention, index_fp8=index_fp8).eval()
    x = random_tokens("torch", 2, 30)
    caches = new_caches(model, 2, index_fp8=index_fp8)
    with torch.no_grad():
        full = model(x)[0]
    assert_close(cached(model, x, chunks, caches), full, *FLOAT32)
    # the length read on the device, from a cache longer than what it holds, as under a CUDA graph
    last = torch.full((2, 1), 29, dtype=torch.int32)
    with torch.no_grad():
        again = model(x[:, 29:], caches=caches, position=torch.tensor([29]), last=last)[0]
    assert_close(again, full[:, 29:], *FLOAT32)


def test_dense_prefill_then_sparse_decoding():
    """(T25) Indexer keys enter the cache in dense mode, too: a prompt read densely serves sparse decoding.
    (In one layer: of several, all but the first would see what dense attention made of the prompt.)"""
    model = tiny_model(num_hidden_layers=1).eval()
    x = random_tokens("torch", 1, 30)
    with torch.no_grad():
        sparse = model(x)[0]
    model.attention = "dense"
    caches = new_caches(model, 1)
    dense = cached(model, x, [29, 1], caches)
    model.attention = "sparse"
    with torch.no_grad():
        last = model(x[:, 29:], caches=caches, position=torch.tensor([29]))[0]
    assert_close(last, sparse[:, 29:], *FLOAT32)
    assert (last - dense[:, 29:]).norm() > 0.01 * last.norm()  # what was selected mattered


def rounded(latents, value_dim):
    """latents (..., value_dim + rope) as the published cache holds them: e4m3 with a power of two per 128
    values, the rope part in bf16; all in float64."""
    values = latents[..., :value_dim].double()
    parts = []
    for block in values.split(128, -1):
        scale = torch.exp2((block.abs().amax(-1, keepdim=True).clamp(min=1e-4) / 448).log2().ceil())
        parts.append((block / scale).to(torch.float8_e4m3fn).double() * scale)
    return torch.cat((*parts, latents[..., value_dim:].bfloat16().double()), -1)


class RoundedCache(sparse_attn.Cache):
    """A float32 cache of what an FP8 cache would hold."""

    def append(self, position, length, latents):
        return super().append(position, length, rounded(latents, self.value_dim).float())


def test_fp8_cache_layout():
    """The published layout: values, scales, rope part; 656 bytes per token at 512 + 64, 132 of an indexer
    key."""
    latents = torch.randn(2, 5, 576) * torch.tensor([1e-6, 1e-2, 1.0, 30.0, 1e4])[:, None]
    packed = sparse_attn.pack_latents(latents, 512)
    assert packed.shape == (2, 5, 656) and packed.dtype == torch.uint8
    expected = rounded(latents, 512)
    assert torch.equal(sparse_attn.unpack_latents(packed, 512, torch.float64), expected)
    values = packed[..., :512].contiguous().view(torch.float8_e4m3fn).double()
    scales = packed[..., 512:528].contiguous().view(torch.float32).double()
    assert torch.equal(values * scales.repeat_interleave(128, -1), expected[..., :512])
    assert torch.equal(packed[..., 528:].contiguous().view(torch.bfloat16).double(), expected[..., 512:])
    published = Config(kv_lora_rank=512, qk_rope_head_dim=64, index_head_dim=128)
    cache = sparse_attn.Cache(published, 1, 8, "cpu", torch.bfloat16, fp8=True, index_fp8=True)
    assert cache.bytes_per_token == 656 + 132


@pytest.mark.parametrize("attention", ["dense", "sparse"])
def test_decoding_reads_what_the_fp8_cache_holds(attention, backend):
    """Logits are those of float32 latents rounded in the same way, in dense and sparse mode and across k; and
    not those of unrounded ones. Two blocks of scales per token."""
    sizes = dict(num_hidden_layers=1, num_attention_heads=2, index_n_heads=2, kv_lora_rank=160)
    model = tiny_model(backend, attention, **sizes).eval()
    x = random_tokens(backend, 1, 13)
    chunks = [4, 7, 2]  # a single token is kernels.decode_block's: tests/test_decode.py
    got = cached(model, x, chunks, new_caches(model, 1, fp8=True))
    assert_close(got, cached(model, x, chunks, new_caches(model, 1, cache=RoundedCache)), *FLOAT32)
    exact = cached(model, x, chunks, new_caches(model, 1))
    assert 1e-3 < (got - exact).norm() / exact.norm() < 2**-4


# ---- what is generated ----

def test_greedy_text_is_the_forwards():
    """Each token is the most likely one after those before it; a seed fixes a sampled text."""
    model = tiny_model().eval()
    x = random_tokens("torch", 2, 11)
    out = model.generate(x, 9, temperature=0, chunk=4)
    assert torch.equal(out[:, :11], x)
    for t in range(11, 20):
        assert torch.equal(model(out[:, :t])[0][:, -1].argmax(-1), out[:, t])
    draws = []
    for seed in (1, 1, 2):
        generator = torch.Generator().manual_seed(seed)
        draws.append(model.generate(x, 9, generator=generator, top_k=20, top_p=0.9))
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


@pytest.mark.parametrize("fp8_cache", [False, True])
def test_backends_generate_alike(fp8_cache):
    """The same text at temperature 0, after a prompt of two documents read in chunks."""
    pytest.importorskip("triton")
    model = tiny_model("triton", num_hidden_layers=1, index_fp8=True).eval()
    x = random_tokens("triton", 1, 16)
    x[0, 9] = END
    texts = []
    for model.backend in ("torch", "triton"):
        options = dict(temperature=0, chunk=10, fp8_cache=fp8_cache, end_ids=[END], go_on=True)
        texts.append(model.generate(x, 3, **options))
    assert torch.equal(*texts)


class Script:
    """In place of generate.sample: draws the columns of tokens (B,n) and keeps the logits that it was
    given."""

    def __init__(self, tokens):
        self.columns = iter(torch.tensor(tokens).T)
        self.logits = []

    def __call__(self, logits, *options):
        self.logits.append(logits)
        return next(self.columns)


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("chunk", [5, 1024])
def test_nothing_is_seen_beyond_an_end_of_text(attention, chunk, monkeypatch):
    """(T10) As in training: after an end of text, in the prompt or sampled, logits are those of a fresh
    prompt, and what stood before changes no bit of them. Documents are longer than k = 6. (Scores are not
    quantised here: a rotated key would round otherwise at another position.)"""
    model = tiny_model(attention=attention).eval()
    before = random_tokens("torch", 1, 9)
    prompt = random_tokens("torch", 1, 8)
    sampled = [3, END, *range(10, 20)]

    def logits_after(before, prompt):
        """Of all steps (12, vocab): the prompt is a document of `before`, an end of text, and `prompt`."""
        script = Script([sampled])
        monkeypatch.setattr(generate, "sample", script)
        x = torch.cat((before, torch.tensor([[END]]), prompt), 1)
        model.generate(x, len(sampled), chunk=chunk, end_ids=[STOP, END], go_on=True)
        return torch.cat(script.logits)

    got = logits_after(before, prompt)
    assert torch.equal(logits_after((before + 1) % 59, prompt), got)
    other = logits_after(before, (prompt + 1) % 59)
    assert not torch.equal(other[:2], got[:2])
    assert torch.equal(other[3:], got[3:])  # from the first token after the sampled end of text on

    with torch.no_grad():
        fresh = model(prompt)[0][0, -1:]
        second = model(torch.tensor([sampled[2:]]))[0][0]
    # another position: angles near 30 are off by 30 x 2^-24 in each of three layers
    assert_close(got[:1], fresh, 1e-5, 1e-4)
    assert_close(got[3:], second[:9], 1e-5, 1e-4)
