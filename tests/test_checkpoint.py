"""Checkpoints: small random ones made by transformers open here with the same logits, and what we save opens there with the same logits.

float32, scores not quantised, T well beyond index_topk (at T <= k the indexer does nothing and a test proves nothing). All weights are
random, norms and biases too, so that a term left out shows. transformers is needed by these tests only.
"""
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

from support import files
from support import tokenizer
from support import checkpoint
from config import Config
from model import Transformer

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
T, TOPK = 61, 13
ROUNDING = 2e-5  # of float32 through the layers, relative to the largest logit
SIZES = dict(vocab_size=131, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3, num_key_value_heads=3, q_lora_rank=20, kv_lora_rank=24,
             qk_nope_head_dim=10, qk_rope_head_dim=8, v_head_dim=12, max_position_embeddings=256, moe_intermediate_size=18, n_routed_experts=8,
             n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=1.7, n_group=1, topk_group=1)
INDEX = dict(index_n_heads=9, index_head_dim=16, index_topk=TOPK)
GROUPS = dict(n_group=4, topk_group=2)


def yarn(**kwargs):
    """A base, betas and lengths with which the ramp between the frequencies has inner points."""
    return dict(rope_theta=50.0, rope_scaling=dict(type="yarn", factor=8.0, original_max_position_embeddings=32, **(dict(beta_fast=2, beta_slow=0.25) | kwargs)))


CASES = {
    "deepseek_v2": {
        "lite": dict(q_lora_rank=None), "lite_yarn": dict(q_lora_rank=None, **yarn(mscale=0.707, mscale_all_dim=0.707)),
        "latent_groups": dict(topk_method="group_limited_greedy", **GROUPS), "yarn_plain": yarn(beta_fast=None, beta_slow=None),
        "tied_bias": dict(tie_word_embeddings=True, attention_bias=True, n_shared_experts=1)},
    "deepseek_v3": {
        "groups": GROUPS, "moonlight": dict(q_lora_rank=None), "yarn": dict(**yarn(mscale=1.0, mscale_all_dim=1.0), **GROUPS),
        "yarn_amplitude": yarn(mscale=1.0, mscale_all_dim=0.5, truncate=False), "not_normalised": dict(norm_topk_prob=False, rope_theta=50000.0),
        "tied_bias": dict(tie_word_embeddings=True, attention_bias=True), "dense": dict(first_k_dense_replace=3)},
    "deepseek_v32": {
        "plain": dict(first_k_dense_replace=3, **INDEX), "groups": dict(**GROUPS, **INDEX), "yarn": dict(**yarn(mscale=1.0, mscale_all_dim=1.0), **INDEX),
        "tied_bias": dict(tie_word_embeddings=True, attention_bias=True, **INDEX),
        "odd": dict(INDEX, vocab_size=97, hidden_size=45, num_attention_heads=5, num_key_value_heads=5, kv_lora_rank=21, v_head_dim=7, index_n_heads=11, index_head_dim=8, index_topk=7)},
    "glm_moe_dsa": {
        "plain": dict(INDEX, rms_norm_eps=1e-5), "shared": dict(indexer_types=["full", "shared", "full", "shared"], num_hidden_layers=4, **INDEX),
        "pattern": dict(index_topk_pattern="FSS", **INDEX), "frequency": dict(index_topk_freq=2, index_skip_topk_offset=1, num_hidden_layers=4, **INDEX),
        "yarn_groups": dict(**GROUPS, **yarn(mscale=1.0, mscale_all_dim=1.0), **INDEX),
        "layer_types": dict(mlp_layer_types=["sparse", "dense", "sparse"], first_k_dense_replace=0, **INDEX)},
}
ALL = [(family, case) for family in CASES for case in CASES[family]]


def theirs(family, **sizes):
    """A random model of transformers, every tensor perturbed. Skips by name what the installed version lacks."""
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    config = transformers.AutoConfig.for_model(family, **(SIZES | sizes), attn_implementation="eager", experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            scale = 0.1 if "norm" in name or "bias" in name else 0.4 if name.endswith("gate.weight") else 1.5 * x.shape[-1] ** -0.5
            x.copy_(float("norm.weight" in name or "layernorm" in name) + torch.randn(x.shape, generator=generator) * scale)
    return model


def opened(folder):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()


def tokens(vocab_size=97, length=T, batch=2):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def difference(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@torch.no_grad()
def logits(model, idx):
    return model(idx)[0] if isinstance(model, Transformer) else model(idx, use_cache=False).logits


def edit(folder, **values):
    """Change keys of config.json; None deletes."""
    config = json.loads((folder / "config.json").read_text()) | values
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None or k not in values}))


@pytest.mark.parametrize("family,case", ALL)
def test_equal_to_transformers(family, case, tmp_path):
    reference, idx = theirs(family, **CASES[family][case]), tokens()
    reference.save_pretrained(tmp_path / "theirs")
    want = logits(reference, idx)
    model = Transformer.from_pretrained(tmp_path / "theirs", index_fp8=False)
    assert model.attention == ("sparse" if "index_topk" in CASES[family][case] else "dense")
    assert difference(logits(model, idx), want) < ROUNDING

    # prefill in two chunks, then one token at a time, all across the k boundary
    from sparse_attn import Cache
    caches = [Cache(model.config, 2, 24, "cpu", torch.float32, indexed=model.config.has_indexer(i)) for i in range(model.config.num_hidden_layers)]
    with torch.no_grad():
        parts = [model(idx[:, p], caches=caches, position=p)[0] for p in (torch.arange(0, 5), torch.arange(5, 16), *torch.arange(16, 24)[:, None])]
    assert difference(torch.cat(parts, 1), want[:, :24]) < ROUNDING

    model.save_pretrained(tmp_path / "ours")
    again = opened(tmp_path / "ours")
    assert again.config.model_type == family and again.config.eos_token_id == reference.config.eos_token_id
    assert difference(logits(again, idx), want) < ROUNDING
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "ours", index_fp8=False), idx), logits(model, idx))


def test_selection_matters(tmp_path):
    """The comparison above sees the indexer: dense attention, or half of k, gives other logits."""
    theirs("deepseek_v32", **CASES["deepseek_v32"]["groups"]).save_pretrained(tmp_path)
    sparse, dense = (logits(Transformer.from_pretrained(tmp_path, attention=a, index_fp8=False), tokens()) for a in ("sparse", "dense"))
    assert difference(dense[:, :TOPK], sparse[:, :TOPK]) < ROUNDING and difference(dense[:, TOPK + 10:], sparse[:, TOPK + 10:]) > 1e-2


@pytest.mark.parametrize("index_topk", (TOPK, 0))
def test_from_scratch(index_topk, tmp_path):
    """Our own model, dense layers only, opens in transformers: deepseek_v32 with an indexer, deepseek_v3 without."""
    torch.manual_seed(0)
    model = Transformer(Config(num_hidden_layers=2, index_topk=index_topk, index_n_heads=9), index_fp8=False).eval()
    model.save_pretrained(tmp_path / "m")
    again = opened(tmp_path / "m")
    assert again.config.model_type == ("deepseek_v32" if index_topk else "deepseek_v3")
    assert difference(logits(again, tokens()), logits(model, tokens())) < ROUNDING
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "m", index_fp8=False), tokens()), logits(model, tokens()))


def test_hub_and_v5_forms_of_config(tmp_path):
    """rope_theta + rope_scaling as on the hub, and rope_parameters as transformers 5 writes it, mean the same; absent optional keys too."""
    reference = theirs("deepseek_v3", **CASES["deepseek_v3"]["yarn"])
    reference.save_pretrained(tmp_path)
    assert "rope_parameters" in json.loads((tmp_path / "config.json").read_text())
    want = logits(reference, tokens())
    edit(tmp_path, rope_parameters=None, **yarn(mscale=1.0, mscale_all_dim=1.0), scoring_func="sigmoid",
         topk_method="noaux_tc", moe_layer_freq=1, auto_map={"AutoConfig": "x.Y"}, num_nextn_predict_layers=1)
    model = Transformer.from_pretrained(tmp_path)
    assert difference(logits(model, tokens()), want) < ROUNDING
    model.save_pretrained(tmp_path / "again")
    saved = json.loads((tmp_path / "again" / "config.json").read_text())
    assert saved["rope_scaling"]["factor"] == 8.0 and saved["num_nextn_predict_layers"] == 0 and saved["use_cache"] and "auto_map" not in saved


def test_published_sizes(tmp_path):
    """The published configs give the published numbers of parameters (correction bias counted), and GLM-5.2 has 21 indexers in 78 layers."""
    lite = dict(model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944, num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None,
                kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2,
                num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1, topk_group=1, topk_method="greedy", norm_topk_prob=False, routed_scaling_factor=1.0,
                rms_norm_eps=1e-6, max_position_embeddings=163840, rope_theta=10000, rope_scaling=dict(
                    beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707, original_max_position_embeddings=4096, type="yarn"))
    v3 = lite | dict(model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432, num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536,
                     first_k_dense_replace=3, n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8, topk_group=4,
                     topk_method="noaux_tc", norm_topk_prob=True, num_nextn_predict_layers=1)
    glm = v3 | dict(model_type="glm_moe_dsa", vocab_size=154880, hidden_size=6144, intermediate_size=12288, num_hidden_layers=78, num_attention_heads=64, q_lora_rank=2048,
                    qk_nope_head_dim=192, v_head_dim=256, n_group=1, topk_group=1, index_n_heads=32, index_head_dim=128, index_topk=2048, index_topk_freq=4,
                    index_skip_topk_offset=3, rope_theta=None, rope_scaling=None, rope_parameters=dict(rope_theta=8000000, rope_type="default"))
    for config, size, indexers in ((lite, 15_706_484_224, 0), (v3, 671_026_419_200, 0), (glm, None, 21)):
        (tmp_path / "config.json").write_text(json.dumps(config))
        with torch.device("meta"):
            model = Transformer(checkpoint.read_config(tmp_path))
        assert size in (None, sum(x.numel() for x in model.state_dict().values())) and len(model.indexer_parameters()) == 5 * indexers


def test_shards_and_layers_beyond(tmp_path, monkeypatch):
    """Sharded folders of transformers and of ours; multi-token prediction layers in the files are left alone."""
    reference = theirs("deepseek_v3", **GROUPS)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    shard = sorted((tmp_path / "theirs").glob("*.safetensors"))[0]
    save_file(load_file(shard) | {"model.layers.3.eh_proj.weight": torch.ones(2, 2)}, shard)
    model = Transformer.from_pretrained(tmp_path / "theirs")
    assert difference(logits(model, tokens()), logits(reference, tokens())) < ROUNDING
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path / "ours")
    files = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(files) > 3 and max(f.stat().st_size for f in files) < 60_000
    assert difference(logits(opened(tmp_path / "ours"), tokens()), logits(reference, tokens())) < ROUNDING


def test_memory_mapped_and_dtype(tmp_path):
    """dtype: as stored, or converted except the correction bias. Tied weights are one parameter."""
    reference = theirs("deepseek_v3", tie_word_embeddings=True).to(torch.bfloat16)
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()
    reference.save_pretrained(tmp_path)
    kinds = lambda model: {name.endswith("bias"): x.dtype for name, x in model.state_dict().items()}
    model = Transformer.from_pretrained(tmp_path)
    assert kinds(model) == {False: torch.bfloat16, True: torch.float32} and model.lm_head.weight is model.model.embed_tokens.weight
    assert kinds(Transformer.from_pretrained(tmp_path, dtype=torch.float32)) == {False: torch.float32, True: torch.float32}
    model.save_pretrained(tmp_path)  # over the files that it is mapped from
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path), tokens()), logits(model, tokens()))


def test_fp8_blocks(tmp_path):
    """e4m3 weights with one scale per 128 x 128 block load as the dequantised bf16 model does, experts and odd sizes included."""
    generator = torch.Generator().manual_seed(2)
    reference = theirs("deepseek_v32", **INDEX, **GROUPS, hidden_size=150, intermediate_size=260, moe_intermediate_size=130)
    reference.save_pretrained(tmp_path / "fp8")
    tensors = load_file(tmp_path / "fp8" / "model.safetensors")
    plain, quantised = {}, {}
    for name, x in tensors.items():
        plain[name] = quantised[name] = x if name.endswith("bias") else x.bfloat16()
        if x.dim() == 2 and "embed" not in name and "lm_head" not in name and not name.endswith("gate.weight"):
            (rows, columns), grid = x.shape, [-(-n // 128) for n in x.shape]
            scale = 0.01 * torch.rand(grid, generator=generator) + 0.005
            values = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
            quantised |= {name: values, name + "_scale_inv": scale}
            plain[name] = (values.float() * torch.kron(scale, torch.ones(128, 128))[:rows, :columns]).bfloat16()
    save_file(quantised, tmp_path / "fp8" / "model.safetensors")
    shutil.copytree(tmp_path / "fp8", tmp_path / "bf16")
    save_file(plain, tmp_path / "bf16" / "model.safetensors")
    edit(tmp_path / "fp8", quantization_config=dict(quant_method="fp8", fmt="e4m3", weight_block_size=[128, 128], activation_scheme="dynamic"))
    a, b = (Transformer.from_pretrained(tmp_path / kind) for kind in ("fp8", "bf16"))
    assert all(torch.equal(x, y) and x.dtype == y.dtype for x, y in zip(a.state_dict().values(), b.state_dict().values()))
    a.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in json.loads((tmp_path / "saved" / "config.json").read_text())
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "saved"), tokens()), logits(b, tokens()))


@pytest.mark.parametrize("family,case,saved_as", (("deepseek_v2", "lite", "deepseek_v2"), ("deepseek_v2", "latent_groups", "deepseek_v2"),
                                                  ("deepseek_v3", "moonlight", "deepseek_v3"), ("deepseek_v3", "yarn", "deepseek_v32")))
def test_graft(family, case, saved_as, tmp_path):
    """New indexers on a dense checkpoint: the same logits, KL trains them alone, and the result saves, opens here and where its class exists."""
    reference, idx = theirs(family, **CASES[family][case]), tokens()
    reference.save_pretrained(tmp_path / "dense")
    torch.manual_seed(3)
    model = Transformer.from_pretrained(tmp_path / "dense", index=INDEX, index_fp8=False)
    assert model.attention == "dense" and difference(logits(model, idx), logits(reference, idx)) < ROUNDING
    index = model.indexer_parameters()
    assert len(index) == 5 * 3 and all(p.dtype == torch.float32 for p in index)
    optimizer = torch.optim.AdamW(index, lr=3e-2)
    kls = []
    for _ in range(20):
        model.zero_grad()
        losses = model(idx, index_loss=True, return_logits=False)[1]
        losses["kl"].backward()
        kls.append(losses["kl"].item())
        assert all((p.grad is not None) == any(p is q for q in index) for p in model.parameters())
        optimizer.step()
    assert kls[-1] < 0.9 * kls[0]
    model.attention = "sparse"
    want = logits(model, idx)
    model.save_pretrained(tmp_path / "sparse")
    again = Transformer.from_pretrained(tmp_path / "sparse", index_fp8=False)
    assert again.attention == "sparse" and again.config.model_type == saved_as and torch.equal(logits(again, idx), want)
    there = opened(tmp_path / "sparse")
    assert there.config.model_type == saved_as
    assert difference(logits(there, idx), want if saved_as == "deepseek_v32" else logits(reference, idx)) < ROUNDING
    anew = Transformer.from_pretrained(tmp_path / "sparse", index=dict(INDEX, index_n_heads=INDEX["index_n_heads"] + 1), index_fp8=False)  # in place of what is there
    for name, p in anew.state_dict().items():
        old = model.state_dict()[name]
        assert (old.shape != p.shape if "weights_proj" in name or "wq_b" in name else "k_norm" in name or torch.equal(old, p) != (".indexer." in name)), name


def test_graft_in_bfloat16(tmp_path):
    """float32 indexers in a bf16 model: trains, selects and decodes, with and without autocast."""
    theirs("deepseek_v2", q_lora_rank=None).to(torch.bfloat16).save_pretrained(tmp_path / "m")
    model = Transformer.from_pretrained(tmp_path / "m", index=INDEX)
    for attention in ("dense", "sparse"):
        model.attention = attention
        for enabled in (False, True):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                model(tokens(), index_loss=True)[1]["kl"].backward()
        assert model.generate(tokens(length=20), 4, temperature=0).shape == (2, 24)
    assert {p.grad.dtype for p in model.indexer_parameters()} == {torch.float32} and model.lm_head.weight.grad is None


def test_shared_layers_train_and_cache(tmp_path):
    """KL exists in layers with an indexer only; recomputation hands the selection on; shared layers keep no index keys."""
    theirs("glm_moe_dsa", **CASES["glm_moe_dsa"]["shared"]).save_pretrained(tmp_path)
    model = Transformer.from_pretrained(tmp_path, index_fp8=False)
    results = []
    for model.recompute in (False, True):
        model.zero_grad()
        losses = model(tokens(), tokens(), index_loss=True)[1]
        (losses["kl"] + losses["lm"]).backward()
        results.append([losses["kl"].item(), losses["lm"].item(), *(p.grad.norm().item() for p in model.parameters())])
    assert results[0] == pytest.approx(results[1], rel=1e-4) and sum(".indexer." in n for n, _ in model.named_parameters()) == 10
    assert model(tokens(), tokens(), return_logits=False)[1]["lm"].item() == pytest.approx(results[0][1], rel=1e-5)
    model.generate(tokens(length=4), 2)
    entry = (24 + 8) * 4
    assert model.cache_bytes_per_token == 2 * entry + 2 * (entry + 16 * 4)


def test_experts(tmp_path):
    """Outputs and gradients of the grouped path and the loop equal a sum over experts in float64; routing weights get gradients."""
    from moe import MoE
    torch.manual_seed(0)
    config = Config(hidden_size=16, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3, moe_intermediate_size=24, routed_scaling_factor=2.0)
    moe = MoE(config).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 5, 16, dtype=torch.float64)
    inputs = [x, *moe.parameters()]
    got = torch.autograd.grad((moe(x) * direction).sum(), inputs)
    weights, chosen = moe.route(x.flatten(0, 1))
    dense = torch.zeros(10, 8, dtype=torch.float64).scatter(1, chosen, weights.double())
    gate, up = torch.einsum("nh,eih->nei", x.flatten(0, 1), moe.experts["gate_up_proj"]).chunk(2, -1)
    each = torch.einsum("nei,ehi->neh", torch.nn.functional.silu(gate) * up, moe.experts["down_proj"])
    out = torch.einsum("neh,ne->nh", each, dense).view_as(x) + moe.shared_experts(x)
    assert difference(moe(x), out) < 1e-6
    for a, b in zip(got, torch.autograd.grad((out * direction).sum(), inputs)):
        assert difference(a, b) < 1e-5 and a.abs().max() > 0
    if torch.cuda.is_available():
        moe, x = moe.to("cuda", torch.bfloat16), x.detach().to("cuda", torch.bfloat16)
        assert difference(moe(x).double().cpu(), out) < 3e-2


BAD = {
    "family": (dict(model_type="llama"), "model_type=llama is not"),
    "missing_key": (dict(kv_lora_rank=None), "kv_lora_rank is missing"),
    "missing_expert_key": (dict(num_experts_per_tok=None), "num_experts_per_tok is missing"),
    "rope_type": (dict(rope_parameters=None, rope_scaling=dict(type="longrope", factor=4)), "rope_scaling.*longrope"),
    "rope_key": (dict(rope_parameters=None, rope_scaling=dict(type="yarn", factor=4, secret=1)), "secret"),
    "activation": (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "scoring": (dict(scoring_func="softmax"), "scoring_func='softmax' is not supported"),
    "rope_pairs": (dict(rope_interleave=False), "rope_interleave=False is not supported"),
    "method": (dict(topk_method="greedy"), "topk_method=greedy"),
    "normalised": (dict(model_type="deepseek_v2", topk_method="greedy"), "not normalised"),
    "quantisation": (dict(quantization_config=dict(quant_method="awq")), "quant_method='awq' is not supported"),
    "groups": (dict(n_group=3), "n_group=3"),
    "shape": (dict(kv_lora_rank=25), "is of shape .* config.json asks for"),
    "more_layers": (dict(num_hidden_layers=4), "tensor model.layers.3.* is missing"),
    "bias": (dict(attention_bias=False), "bias has no place"),
    "type": (dict(hidden_size="48"), "hidden_size='48' is not supported, only int"),
    "boolean": (dict(v_head_dim=True), "v_head_dim=True is not supported, only int"),
    "no_groups": (dict(n_group=None), "n_group is missing"),
    "rope_shape": (dict(rope_parameters=[1]), "rope_parameters"),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    folder = tmp_path_factory.mktemp("good")
    theirs("deepseek_v3", attention_bias=True).save_pretrained(folder, max_shard_size="40KB")
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_config(case, good, tmp_path):
    shutil.copytree(good, tmp_path / "m")
    values, message = BAD[case]
    edit(tmp_path / "m", **values)
    with pytest.raises(ValueError, match=message) as error:
        Transformer.from_pretrained(tmp_path / "m")
    assert "\n" not in str(error.value) and str(tmp_path / "m") in str(error.value)


def test_bad_files(good, tmp_path):
    def broken(change, kind, message):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(good, tmp_path / "m")
        change(tmp_path / "m", sorted((tmp_path / "m").glob("*.safetensors"))[1])
        with pytest.raises(kind, match=message) as error:
            Transformer.from_pretrained(tmp_path / "m")
        assert "\n" not in str(error.value)

    broken(lambda folder, shard: shutil.rmtree(folder), FileNotFoundError, "config.json: no such file")
    broken(lambda folder, shard: (folder / "config.json").write_text("{"), ValueError, "no valid JSON")
    broken(lambda folder, shard: (folder / "config.json").write_text("[]"), ValueError, "holds a list")
    broken(lambda folder, shard: shard.unlink(), FileNotFoundError, "model-00002.*incomplete")
    broken(lambda folder, shard: os.truncate(shard, shard.stat().st_size - 8), ValueError, "model-00002.*truncated")
    broken(lambda folder, shard: os.truncate(shard, 0), ValueError, "model-00002.*truncated")
    broken(lambda folder, shard: (folder / "model.safetensors.index.json").unlink(), FileNotFoundError, "model.safetensors: no such file")
    broken(lambda folder, shard: save_file(dict(list(load_file(shard).items())[1:]), shard), ValueError, "is missing, but .* lists it")
    broken(lambda folder, shard: save_file({k: x.to(torch.float8_e4m3fn) for k, x in load_file(shard).items()}, shard), ValueError, "is FP8, its .*_scale_inv is missing")
    with pytest.raises(ValueError, match="index_head_dim=12"):
        Transformer.from_pretrained(good, index=dict(INDEX, index_head_dim=12))


def test_killed_while_saving(tmp_path):
    """A folder that is being replaced stays readable at every moment: kill -9 at random times, then load."""
    theirs("deepseek_v3", num_hidden_layers=1).save_pretrained(tmp_path / "m")
    script = ("import sys, torch; sys.path.insert(0, sys.argv[1]); torch.set_num_threads(1)\nfrom model import Transformer\n"
              "m = Transformer.from_pretrained(sys.argv[2]); print('go', flush=True)\nwhile True: m.save_pretrained(sys.argv[2])")
    for delay in (0.011, 0.107):
        with subprocess.Popen([sys.executable, "-c", script, os.path.dirname(os.path.abspath(__file__)), str(tmp_path / "m")], stdout=subprocess.PIPE) as process:
            process.stdout.readline()
            time.sleep(delay)
            process.kill()
        Transformer.from_pretrained(tmp_path / "m")
    model = Transformer.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")  # also tidies up: m.old can be left beside m, or in its place
    (tmp_path / "m").rename(tmp_path / "m.old")  # the moment between the two renames
    model = Transformer.from_pretrained(tmp_path / "m")
    model.save_pretrained(tmp_path / "m")
    assert {p.name for p in tmp_path.iterdir()} <= {"m", "m.part"} and (tmp_path / "m" / "model.safetensors").is_file()


def test_tokenizers(tmp_path):
    """The bytes tokenizer opens in transformers with the same ids; other tokenizers come from their tokenizer.json."""
    pytest.importorskip("tiktoken")
    text = "def f(x):\n\treturn 'é€😀' \x00\x7f\u2028  # 1234567 <s>  \r\n"
    Transformer(Config(num_hidden_layers=1)).save_pretrained(tmp_path / "m", "bytes")
    ours = tokenizer.load_tokenizer(tmp_path / "m")
    assert ours.encode(text) == list(text.encode()) and ours.decode([*ours.encode(text), 299]) == text and ours.eot == 256
    there = transformers.AutoTokenizer.from_pretrained(tmp_path / "m")
    assert there(text)["input_ids"] == list(text.encode()) and there.decode(list(text.encode()), clean_up_tokenization_spaces=False) == text
    assert len(there) == 257 and there.eos_token_id == 256 and there("a<|endoftext|>b")["input_ids"] == [97, 256, 98]
    assert transformers.AutoConfig.from_pretrained(tmp_path / "m").eos_token_id == 256

    (tmp_path / "other").mkdir()
    shutil.copy(tmp_path / "m" / "tokenizer.json", tmp_path / "other")
    shutil.copy(tmp_path / "m" / "config.json", tmp_path / "other")
    (tmp_path / "other" / "tokenizer_config.json").write_text(json.dumps(dict(add_bos_token=True, bos_token="<|endoftext|>")))
    (tmp_path / "m" / "config.json").write_text((tmp_path / "m" / "config.json").read_text().replace('"eos_token_id": 256', '"eos_token_id": null'))
    tokenizer.save_tokenizer(tmp_path / "m", tmp_path / "other")
    tokenizer = tokenizer.load_tokenizer(tmp_path / "m")
    assert isinstance(tokenizer, tokenizer.FolderTokenizer) and tokenizer.n_vocab == 257 and tokenizer.eot == 256
    assert tokenizer.encode("ab<|endoftext|>") == [256, 97, 98, 256] and tokenizer.decode(tokenizer.encode(text))[13:] == text
    assert tokenizer.encode_ordinary_batch(["a", "<|endoftext|>"]) == [[97], list(b"<|endoftext|>")]
    assert files.read_json(tmp_path / "m" / "config.json")["eos_token_id"] == 256
    (tmp_path / "m" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        tokenizer.load_tokenizer(tmp_path / "m")
