"""kernels.decode_block, a decoding step, is model.Block: the same h, the same bytes in the caches, the same
selections, whatever the model selects and attends by."""
import pytest
import torch

import generate
from sparse_attn import unpack_latents
from tests.common import FLOAT32, assert_close, device_of, poison, relative_errors, tiny_model
from tests.test_sharing import EXPERTS

pytest.importorskip("triton")
import kernels

CUDA = torch.cuda.is_available()
YARN = dict(
    type="yarn", factor=4, original_max_position_embeddings=32, beta_fast=32, beta_slow=1, mscale=1.0,
    mscale_all_dim=1.0)
PROMPT = 14  # tokens, more than k = 6
CAPACITY = 20


@pytest.fixture
def spy(monkeypatch):
    """-> a list of the sequences in each call of kernels.decode_block."""
    calls = []
    decode_block = kernels.decode_block

    def counted(layer, h, *args):
        calls.append(len(h))
        return decode_block(layer, h, *args)

    monkeypatch.setattr(kernels, "decode_block", counted)
    return calls


def random_model(**changes):
    """A model for the kernels whose norms have weights, and biases, of their own."""
    model = tiny_model("triton", **(dict(num_hidden_layers=2) | changes)).eval()
    with torch.no_grad():
        for p in model.parameters():
            if p.dim() == 1:
                p += 0.3 * torch.randn_like(p)
    return model


@torch.no_grad()
def steps(model, blocks, B, tokens, fp8=False, ragged=False, dtype=torch.float32):
    """Three steps behind a prompt that the reference reads, by kernels.decode_block or (blocks=False) not ->
    logits (B,3,vocab), the caches, the selections of each step."""
    device = model.lm_head.weight.device
    caches = generate.new_caches(model, B, CAPACITY, device, dtype, fp8)
    model.backend = "torch"
    model(tokens[:, :PROMPT], caches=caches, position=torch.arange(PROMPT, device=device))
    model.backend = "triton"
    parts = []
    chosen = []
    for t in range(PROMPT, PROMPT + 3):
        position = torch.tensor([t], device=device)
        if ragged:  # each row at a position of its own, none beyond the prompt's end
            position = t - torch.arange(B, device=device)[:, None] % 5
        selections = []
        options = dict(caches=caches, position=position, selections=selections)
        poison()
        if blocks:
            logits, _ = model(tokens[:, t:t + 1], **options)
        else:
            with torch.enable_grad():  # decode_block has no gradients
                logits = model(tokens[:, t:t + 1], **options)[0].detach()
        parts.append(logits)
        chosen.append([x for x in selections if x is not None])
    return torch.cat(parts, 1), caches, chosen


CASES = dict(
    sparse=dict(),
    dense=dict(attention="dense"),
    quantised=dict(index_fp8=True),
    interleaved=dict(index_fp8=True, indexer_rope_interleave=True),
    without_indexer=dict(attention="dense", index_topk=0),
    shared=dict(num_hidden_layers=3, indexer_types=["full", "shared", "full"]),
    experts=EXPERTS,
    yarn=dict(rope_scaling=YARN, max_position_embeddings=128),
    two_levels=dict(index_block=4, index_candidates=8, index_exact_layers=0),
    recent=dict(selector="recent"),
    wide=dict(
        num_hidden_layers=1, hidden_size=40, intermediate_size=130, num_attention_heads=5, q_lora_rank=70,
        kv_lora_rank=130, qk_nope_head_dim=20, qk_rope_head_dim=14, v_head_dim=33, index_n_heads=2,
        index_head_dim=32, index_fp8=True))


@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("case", CASES)
def test_a_step_is_the_blocks(case, B, spy):
    """One sequence, whose products are sums, and several, by tensor cores."""
    model = random_model(**CASES[case])
    tokens = torch.randint(0, 59, (B, CAPACITY), device=device_of("triton"))
    got, caches, chosen = steps(model, True, B, tokens)
    assert spy == [B] * (3 * model.config.num_hidden_layers)
    want, other_caches, other_chosen = steps(model, False, B, tokens)
    assert len(spy) == 3 * model.config.num_hidden_layers
    assert_close(got, want, *FLOAT32)
    for cache, other in zip(caches, other_caches):
        assert_close(cache.latents[:, :PROMPT + 3], other.latents[:, :PROMPT + 3], *FLOAT32)
        if cache.index_scales is not None:
            assert torch.equal(cache.index_scales, other.index_scales)
        if cache.index_keys is not None:
            assert_close(cache.index_keys.float(), other.index_keys.float(), 1e-3, 0.2)
    for step, other_step in zip(chosen, other_chosen):
        assert len(step) == len(other_step)
        assert all(torch.equal(x, y) for x, y in zip(step, other_step))


@pytest.mark.parametrize("attention", ["dense", "sparse"])
@pytest.mark.parametrize("rank", [20, 160])
def test_a_step_writes_the_fp8_cache(rank, attention):
    """Values and scales as `pack_latents` writes them, with two scales of a token; the rope part rounded to
    bf16, by the interpreter toward zero; and the logits that come of that."""
    model = random_model(attention=attention, kv_lora_rank=rank, num_hidden_layers=1)
    tokens = torch.randint(0, 59, (3, CAPACITY), device=device_of("triton"))
    got, [cache], _ = steps(model, True, 3, tokens, fp8=True)
    want, [other], _ = steps(model, False, 3, tokens, fp8=True)
    rope = cache.latents.shape[-1] - 2 * model.config.qk_rope_head_dim
    equal = (cache.latents == other.latents)[:, :PROMPT + 3]
    assert equal[..., :rope].float().mean() > 0.999  # but for values between two of e4m3
    if CUDA:
        assert equal[..., rope:].float().mean() > 0.995
    latents = unpack_latents(cache.latents, rank, torch.float32)
    assert_close(latents, unpack_latents(other.latents, rank, torch.float32), 2**-8, 2**-6)
    assert_close(got, want, *(2e-3, 5e-3) if CUDA else (2e-2, 5e-2))


def test_rows_at_positions_of_their_own(spy):
    """The angles, and the slots of the caches, of each row."""
    model = random_model(index_fp8=True)
    tokens = torch.randint(0, 59, (17, CAPACITY), device=device_of("triton"))
    got, caches, _ = steps(model, True, 17, tokens, ragged=True)
    assert spy == [17] * 6
    want, other, _ = steps(model, False, 17, tokens, ragged=True)
    assert_close(got, want, *FLOAT32)
    assert_close(caches[1].latents, other[1].latents, *FLOAT32)


@pytest.mark.parametrize("B", [1, 5, 33])
def test_a_step_in_bf16(B):
    """bf16 weights, and float32 weights under autocast: as far from the float32 model as the blocks are."""
    if not CUDA and B > 5:
        pytest.skip("slow in the interpreter")
    model = random_model(index_fp8=True, index_topk=CAPACITY)  # selections, which rounding changes, aside
    tokens = torch.randint(0, 59, (B, CAPACITY), device=device_of("triton"))
    exact, _, _ = steps(model, False, B, tokens)
    device = tokens.device.type
    for autocast in (True, False):
        if not autocast:
            model.bfloat16()
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            got, _, _ = steps(model, True, B, tokens, dtype=torch.bfloat16)
            want, _, _ = steps(model, False, B, tokens, dtype=torch.bfloat16)
        error, _ = relative_errors(got, exact)
        usual, _ = relative_errors(want, exact)
        assert 1e-4 < error < 1.5 * usual, f"autocast {autocast}: {error:.1e}, blocks {usual:.1e}"


def test_a_step_reads_new_weights():
    """Weights stay where they are: after an update a Decoder, and its CUDA graph, reads the new ones."""
    model = random_model(num_hidden_layers=1)
    device = model.lm_head.weight.device
    decoder = generate.make_decoder(model, 2, CAPACITY, device)
    token = torch.tensor([3, 4], device=device)
    position = torch.zeros(2, dtype=torch.long, device=device)
    with torch.inference_mode():
        before = decoder.step(token, position, position).clone()
    with torch.no_grad():
        for p in model.parameters():
            p *= 1.1
    with torch.inference_mode():
        after = decoder.step(token, position, position).clone()
        fresh = generate.make_decoder(model, 2, CAPACITY, device).step(token, position, position)
    assert torch.equal(after, fresh) and not torch.equal(after, before)


def test_one_position_of_all_rows():
    """Positions (S,), (1,1) and (B,1) are the same."""
    model = random_model(num_hidden_layers=1)
    device = model.lm_head.weight.device
    x = torch.tensor([[3], [4], [5]], device=device)
    logits = []
    for position in (torch.tensor([2]), torch.tensor([[2]]), torch.full((3, 1), 2)):
        caches = generate.new_caches(model, 3, CAPACITY, device, torch.float32)
        with torch.no_grad():
            logits.append(model(x, caches=caches, position=position.to(device))[0])
    assert torch.equal(logits[0], logits[1]) and torch.equal(logits[0], logits[2])


def test_an_fp8_cache_of_unaligned_scales_takes_the_blocks(spy):
    model = random_model(num_hidden_layers=1, attention="dense", kv_lora_rank=22)
    tokens = torch.randint(0, 59, (1, CAPACITY), device=device_of("triton"))
    steps(model, True, 1, tokens, fp8=True)
    assert spy == []


@pytest.mark.parametrize("changes", [dict(q_lora_rank=0), dict(attention_bias=True)], ids=str)
def test_other_models_take_the_blocks(changes, spy):
    model = random_model(num_hidden_layers=1, **changes)
    tokens = torch.randint(0, 59, (1, CAPACITY), device=device_of("triton"))
    got, _, _ = steps(model, True, 1, tokens)
    want, _, _ = steps(model, False, 1, tokens)
    assert spy == [] and torch.equal(got, want)
