"""Checkpoints: small random ones made by transformers open here with the same logits, and what we save opens
there with the same logits. What a folder says otherwise, or in a form that we do not know, is refused in one
line that names file and key or tensor.

float32, scores not quantised, T well beyond index_topk (at T <= k the indexer does nothing and a test proves
nothing). All weights are random, norms and biases too, so that a term left out shows. transformers is needed
by these tests only.
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

from config import Config
from model import RMSNorm, Transformer
from moe import MoE
from sparse_attn import Cache
from support import checkpoint, files
from tests.common import relative_errors

transformers = pytest.importorskip("transformers")
torch.set_num_threads(1)
ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
T = 61
TOPK = 13
ROUNDING = 2e-5  # of float32 through the layers
SIZES = dict(
    vocab_size=131, hidden_size=48, intermediate_size=56, num_hidden_layers=3, num_attention_heads=3,
    num_key_value_heads=3, q_lora_rank=20, kv_lora_rank=24, qk_nope_head_dim=10, qk_rope_head_dim=8,
    v_head_dim=12, max_position_embeddings=256, moe_intermediate_size=18, n_routed_experts=8,
    n_shared_experts=2, num_experts_per_tok=3, first_k_dense_replace=1, routed_scaling_factor=1.7, n_group=1,
    topk_group=1)
INDEX = dict(index_n_heads=9, index_head_dim=16, index_topk=TOPK)
GROUPS = dict(n_group=4, topk_group=2)


def yarn(**kwargs):
    """A base, betas and lengths with which the ramp between the frequencies has inner points."""
    scaling = dict(type="yarn", factor=8.0, original_max_position_embeddings=32, beta_fast=2, beta_slow=0.25)
    return dict(rope_theta=50.0, rope_scaling=scaling | kwargs)


CASES = {
    "deepseek_v2": {
        "lite": dict(q_lora_rank=None),
        "lite_yarn": dict(q_lora_rank=None, **yarn(mscale=0.707, mscale_all_dim=0.707)),
        "latent_groups": dict(topk_method="group_limited_greedy", **GROUPS),
        "yarn_plain": yarn(beta_fast=None, beta_slow=None),
        "tied_bias": dict(tie_word_embeddings=True, attention_bias=True, n_shared_experts=1)},
    "deepseek_v3": {
        "groups": GROUPS,
        "moonlight": dict(q_lora_rank=None),
        "yarn": dict(**yarn(mscale=1.0, mscale_all_dim=1.0), **GROUPS),
        "yarn_amplitude": yarn(mscale=1.0, mscale_all_dim=0.5, truncate=False),
        "not_normalised": dict(norm_topk_prob=False, rope_theta=50000.0),
        "tied_bias": dict(tie_word_embeddings=True, attention_bias=True),
        "dense": dict(first_k_dense_replace=3)},
    "deepseek_v32": {
        "plain": dict(first_k_dense_replace=3, **INDEX),
        "groups": dict(**GROUPS, **INDEX),
        "yarn": dict(**yarn(mscale=1.0, mscale_all_dim=1.0), **INDEX),
        "tied_bias": dict(tie_word_embeddings=True, attention_bias=True, **INDEX),
        "odd": dict(INDEX, vocab_size=97, hidden_size=45, num_attention_heads=5, num_key_value_heads=5,
                    kv_lora_rank=21, v_head_dim=7, index_n_heads=11, index_head_dim=8, index_topk=7)},
    "glm_moe_dsa": {
        "plain": dict(INDEX, rms_norm_eps=1e-5),
        "shared": dict(indexer_types=["full", "shared", "full", "shared"], num_hidden_layers=4, **INDEX),
        "pattern": dict(index_topk_pattern="FSS", **INDEX),
        "frequency": dict(index_topk_freq=2, index_skip_topk_offset=1, num_hidden_layers=4, **INDEX),
        "yarn_groups": dict(**GROUPS, **yarn(mscale=1.0, mscale_all_dim=1.0), **INDEX),
        "layer_types": dict(mlp_layer_types=["sparse", "dense", "sparse"], first_k_dense_replace=0, **INDEX)},
    "glm4_moe_lite": {
        "plain": dict(rms_norm_eps=1e-5),
        "yarn": dict(mlp_layer_types=["dense", "dense", "sparse"], first_k_dense_replace=2,
                     **yarn(mscale_all_dim=1.0), **GROUPS)},
    "youtu": {
        "plain": dict(tie_word_embeddings=True, rope_theta=1.6e6, attention_bias=True)},
}
ALL = [(family, case) for family in CASES for case in CASES[family]]
WITHOUT_EXPERTS = ("moe_intermediate_size", "n_routed_experts", "n_shared_experts", "num_experts_per_tok",
                   "first_k_dense_replace", "routed_scaling_factor", "n_group", "topk_group")


def theirs(family, **sizes):
    """A random model of transformers, every tensor perturbed. Skips by name what the installed version
    lacks."""
    if family not in transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    sizes = SIZES | sizes
    if family == "youtu":
        sizes = {key: value for key, value in sizes.items() if key not in WITHOUT_EXPERTS}
    config = transformers.AutoConfig.for_model(
        family, **sizes, attn_implementation="eager", experts_implementation="eager")
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, x in model.state_dict().items():
            scale = 1.5 * x.shape[-1] ** -0.5
            if "norm" in name or "bias" in name:
                scale = 0.1
            elif name.endswith("gate.weight"):
                scale = 0.4
            mean = float("norm.weight" in name or "layernorm" in name)
            x.copy_(mean + torch.randn(x.shape, generator=generator) * scale)
    return model


def opened(folder):
    """A folder in transformers."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", experts_implementation="eager").eval()


def load(folder, **options):
    return Transformer.from_pretrained(folder, index_fp8=False, **options)


def tokens(vocab_size=97, length=T, batch=2):
    return torch.randint(vocab_size, (batch, length), generator=torch.Generator().manual_seed(1))


def difference(a, b):
    """Relative error of the worst row."""
    return relative_errors(a, b)[1]


@torch.no_grad()
def logits(model, idx):
    return model(idx)[0] if isinstance(model, Transformer) else model(idx, use_cache=False).logits


def read_config(folder):
    return json.loads((folder / "config.json").read_text())


def edit(folder, **values):
    """Change keys of config.json; None deletes."""
    config = read_config(folder) | values
    kept = {key: value for key, value in config.items() if value is not None or key not in values}
    (folder / "config.json").write_text(json.dumps(kept))


def change_tensors(folder, **values):
    """Change tensors of model.safetensors; None deletes."""
    path = folder / "model.safetensors"
    changed = load_file(path) | values
    save_file({name: x for name, x in changed.items() if x is not None}, path)


# ---- the same logits there and here ----

@pytest.mark.parametrize("family,case", ALL)
def test_equal_to_transformers(family, case, tmp_path):
    reference = theirs(family, **CASES[family][case])
    reference.save_pretrained(tmp_path / "theirs")
    idx = tokens()
    want = logits(reference, idx)
    model = load(tmp_path / "theirs")
    assert model.attention == ("sparse" if "index_topk" in CASES[family][case] else "dense")
    assert difference(logits(model, idx), want) < ROUNDING

    # prefill in two chunks, then one token at a time, all across the k boundary
    caches = []
    for layer in range(model.config.num_hidden_layers):
        indexed = model.config.has_indexer(layer)
        caches.append(Cache(model.config, 2, 24, "cpu", torch.float32, indexed=indexed))
    parts = []
    with torch.no_grad():
        for position in (torch.arange(0, 5), torch.arange(5, 16), *torch.arange(16, 24)[:, None]):
            parts.append(model(idx[:, position], caches=caches, position=position)[0])
    assert difference(torch.cat(parts, 1), want[:, :24]) < ROUNDING

    # saved, opened there and here
    model.save_pretrained(tmp_path / "ours")
    again = opened(tmp_path / "ours")
    assert again.config.model_type == checkpoint.SAME.get(family, family)
    assert again.config.eos_token_id == reference.config.eos_token_id
    assert difference(logits(again, idx), want) < ROUNDING
    assert torch.equal(logits(load(tmp_path / "ours"), idx), logits(model, idx))


def test_selection_matters(tmp_path):
    """The comparison above sees the indexer: dense attention gives other logits beyond k."""
    theirs("deepseek_v32", **CASES["deepseek_v32"]["groups"]).save_pretrained(tmp_path)
    sparse, dense = (logits(load(tmp_path, attention=kind), tokens()) for kind in ("sparse", "dense"))
    assert difference(dense[:, :TOPK], sparse[:, :TOPK]) < ROUNDING
    assert difference(dense[:, TOPK + 10:], sparse[:, TOPK + 10:]) > 1e-2


@pytest.mark.parametrize("family", ["deepseek_v3", "glm_moe_dsa"])
def test_eps_of_latent_norms(family, tmp_path):
    """1e-6 whatever rms_norm_eps says, as in transformers: seen on latents so small that it decides."""
    sizes = INDEX if family == "glm_moe_dsa" else {}
    reference = theirs(family, rms_norm_eps=1e-3, **sizes)
    with torch.no_grad():
        for layer in reference.model.layers:
            layer.self_attn.q_a_proj.weight *= 1e-3
            layer.self_attn.kv_a_proj_with_mqa.weight *= 1e-3
    reference.save_pretrained(tmp_path)
    want = logits(reference, tokens())
    model = load(tmp_path)
    assert difference(logits(model, tokens()), want) < ROUNDING
    for module in model.modules():
        if isinstance(module, RMSNorm):
            module.eps = 1e-3
    assert difference(logits(model, tokens()), want) > 1e-2


@pytest.mark.parametrize("index_topk", (TOPK, 0))
def test_from_scratch(index_topk, tmp_path):
    """Our own model, dense layers only, opens in transformers: deepseek_v32 with an indexer, deepseek_v3
    without."""
    torch.manual_seed(0)
    model = Transformer(Config(num_hidden_layers=2, index_topk=index_topk, index_n_heads=9), index_fp8=False)
    model.eval().save_pretrained(tmp_path / "m")
    again = opened(tmp_path / "m")
    assert again.config.model_type == ("deepseek_v32" if index_topk else "deepseek_v3")
    assert difference(logits(again, tokens()), logits(model, tokens())) < ROUNDING
    assert torch.equal(logits(load(tmp_path / "m"), tokens()), logits(model, tokens()))


# ---- config.json ----

def test_new_weights_where_config_json_says_nothing():
    """Indexers beside published weights begin with the usual deviation, not with that of our small models."""
    values = {key: value for key, value in V3.items() if key != "initializer_range"}
    assert checkpoint.config_of(values).initializer_range == 0.02 != Config.initializer_range
    assert checkpoint.config_of(values | dict(initializer_range=0.3)).initializer_range == 0.3


def test_hub_and_v5_forms_of_config(tmp_path):
    """rope_theta + rope_scaling as on the hub, and rope_parameters as transformers 5 writes it, mean the
    same, alone or together; absent optional keys too."""
    reference = theirs("deepseek_v3", **CASES["deepseek_v3"]["yarn"])
    reference.save_pretrained(tmp_path)
    want = logits(reference, tokens())
    form = read_config(tmp_path)["rope_parameters"]
    hub = yarn(mscale=1.0, mscale_all_dim=1.0)
    both = hub | dict(rope_parameters=form)
    for rope in (hub | dict(rope_parameters=None), both, dict(rope_parameters=form)):
        edit(tmp_path, rope_theta=None, rope_scaling=None)
        edit(tmp_path, **rope, scoring_func="sigmoid", topk_method="noaux_tc", moe_layer_freq=1,
             auto_map={"AutoConfig": "x.Y"}, num_nextn_predict_layers=1)
        model = load(tmp_path)
        assert difference(logits(model, tokens()), want) < ROUNDING
    model.save_pretrained(tmp_path / "again")
    saved = read_config(tmp_path / "again")
    assert saved["rope_scaling"]["factor"] == 8.0 and saved["num_nextn_predict_layers"] == 0
    assert saved["use_cache"] and "auto_map" not in saved and "rope_parameters" not in saved


@pytest.mark.parametrize("name", ["kimi_k2", "deepseek_v3"])
def test_deepseek_v3_by_another_name(name, tmp_path):
    """kimi_k2, which transformers does not know by that name, is deepseek_v3 with other sizes."""
    reference = theirs("deepseek_v3", **yarn(mscale=1.0, mscale_all_dim=1.0))
    reference.save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", model_type=name, architectures=["DeepseekV3ForCausalLM"])
    model = load(tmp_path / "m")
    assert difference(logits(model, tokens()), logits(reference, tokens())) < ROUNDING
    model.save_pretrained(tmp_path / "again")
    assert read_config(tmp_path / "again")["model_type"] == "deepseek_v3"


LITE = dict(
    model_type="deepseek_v2", vocab_size=102400, hidden_size=2048, intermediate_size=10944,
    num_hidden_layers=27, num_attention_heads=16, q_lora_rank=None, kv_lora_rank=512, qk_nope_head_dim=128,
    qk_rope_head_dim=64, v_head_dim=128, first_k_dense_replace=1, n_routed_experts=64, n_shared_experts=2,
    num_experts_per_tok=6, moe_intermediate_size=1408, n_group=1, topk_group=1, topk_method="greedy",
    norm_topk_prob=False, routed_scaling_factor=1.0, rms_norm_eps=1e-6, max_position_embeddings=163840,
    rope_theta=10000, rope_scaling=dict(
        beta_fast=32, beta_slow=1, factor=40, mscale=0.707, mscale_all_dim=0.707,
        original_max_position_embeddings=4096, type="yarn"))
V3 = LITE | dict(
    model_type="deepseek_v3", vocab_size=129280, hidden_size=7168, intermediate_size=18432,
    num_hidden_layers=61, num_attention_heads=128, q_lora_rank=1536, first_k_dense_replace=3,
    n_routed_experts=256, n_shared_experts=1, num_experts_per_tok=8, moe_intermediate_size=2048, n_group=8,
    topk_group=4, topk_method="noaux_tc", norm_topk_prob=True, num_nextn_predict_layers=1)
KIMI = V3 | dict(
    model_type="kimi_k2", vocab_size=163840, num_attention_heads=64, n_routed_experts=384, n_group=1,
    topk_group=1, first_k_dense_replace=1, routed_scaling_factor=2.827, num_nextn_predict_layers=0)
GLM = V3 | dict(
    model_type="glm_moe_dsa", vocab_size=154880, hidden_size=6144, intermediate_size=12288,
    num_hidden_layers=78, num_attention_heads=64, q_lora_rank=2048, qk_nope_head_dim=192, v_head_dim=256,
    n_group=1, topk_group=1, index_n_heads=32, index_head_dim=128, index_topk=2048, index_topk_freq=4,
    index_skip_topk_offset=3, rope_theta=None, rope_scaling=None,
    rope_parameters=dict(rope_theta=8000000, rope_type="default"))


@pytest.mark.parametrize("published, size, indexers", [
    (LITE, 15_706_484_224, 0), (V3, 671_026_419_200, 0), (KIMI, None, 0), (GLM, None, 21)],
    ids=["V2-Lite", "V3", "Kimi-K2", "GLM-5.2"])
def test_published_sizes(published, size, indexers, tmp_path):
    """The published configs give the published numbers of parameters (correction bias counted), and GLM-5.2
    has 21 indexers in 78 layers."""
    (tmp_path / "config.json").write_text(json.dumps(published))
    with torch.device("meta"):
        model = Transformer(checkpoint.read_config(tmp_path))
    assert size in (None, sum(x.numel() for x in model.state_dict().values()))
    assert len(model.indexer_parameters()) == 5 * indexers


LONG = dict(type="longrope", factor=4)
SECRET = dict(type="yarn", factor=4, secret=1)
BAD = {
    "family": (dict(model_type="llama"), "model_type='llama' is not"),
    "missing_key": (dict(kv_lora_rank=None), "kv_lora_rank is missing"),
    "missing_expert_key": (dict(num_experts_per_tok=None), "num_experts_per_tok is missing"),
    "rope_type": (dict(rope_parameters=None, rope_scaling=LONG), "rope_scaling.type='longrope'"),
    "rope_key": (dict(rope_parameters=None, rope_scaling=SECRET), "rope_scaling=.*secret"),
    "rope_twice": (
        dict(rope_scaling=dict(type="yarn", factor=4)), "rope_scaling=.* and rope_parameters=.* contradict"),
    "theta_twice": (dict(rope_theta=5.0), "rope_theta=5.0 and rope_parameters.rope_theta=10000.0 contradict"),
    "rope_types": (
        dict(rope_parameters=dict(type="yarn", rope_type="default")), "rope_parameters=.*one of the two"),
    "default_factor": (dict(rope_parameters=dict(rope_type="default", factor=4)), "rope_parameters=.*factor"),
    "part_rotates": (dict(partial_rotary_factor=0.5), "partial_rotary_factor=0.5 is not supported"),
    "part_rotates_inside": (dict(rope_parameters=dict(partial_rotary_factor=0.5)), "rope_parameters.partial"),
    "activation": (dict(hidden_act="gelu"), "hidden_act='gelu' is not supported"),
    "scoring": (dict(scoring_func="softmax"), "scoring_func='softmax' is not supported"),
    "rope_pairs": (dict(rope_interleave=False), "rope_interleave=False is not supported"),
    "key_heads": (dict(num_key_value_heads=1), "num_key_value_heads=1 is not .*num_attention_heads=3"),
    "method": (dict(topk_method="greedy"), "topk_method=greedy"),
    "normalised": (dict(model_type="deepseek_v2", topk_method="greedy"), "not normalised"),
    "quantisation": (dict(quantization_config=dict(quant_method="awq")), "quant_method='awq' is not supp"),
    "format": (dict(quantization_config=dict(fmt="e5m2")), "quantization_config.fmt='e5m2' is not supported"),
    "groups": (dict(n_group=3), "n_group=3"),
    "shape": (dict(kv_lora_rank=25), "is of shape .* config.json asks for"),
    "more_layers": (dict(num_hidden_layers=4), "tensor model.layers.3.* is missing"),
    "fewer_layers": (
        dict(num_hidden_layers=2, num_nextn_predict_layers=0), "is of layer 2, and .*num_hidden_layers=2"),
    "bias": (dict(attention_bias=False), "bias has no place"),
    "no_groups": (dict(n_group=None), "n_group is missing"),
    "layer_types": (
        dict(mlp_layer_types=["sparse", "dense", "sparse"]), "mlp_layer_types=.*first_k_dense_replace=1"),
    "frequency": (dict(index_topk_freq=4), "index_topk_freq=4 is not supported"),
    "predict_layers": (dict(num_nextn_predict_layers=-1), "num_nextn_predict_layers=-1"),
    "index_topk": (dict(index_topk=4), "index_n_heads is missing"),
    "shared_twice": (
        dict(model_type="glm_moe_dsa", index_topk_pattern="FFS", indexer_types=["full"] * 3, **INDEX),
        "indexer_types=.* contradicts index_topk_pattern=FFS"),
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


# Every key that is read, with a right value: of a config.json as a whole, and of the objects in it
FULL = V3 | dict(
    hidden_act="silu", scoring_func="sigmoid", mlp_bias=False, rope_interleave=True, moe_layer_freq=1,
    num_key_value_heads=128, partial_rotary_factor=1.0, attention_bias=False, tie_word_embeddings=False,
    initializer_range=0.02, eos_token_id=1, mlp_layer_types=["dense"] * 3 + ["sparse"] * 58)
FULL_GLM = GLM | dict(
    index_topk_pattern="F" * 78, indexer_types=["full"] * 78, indexer_rope_interleave=True,
    index_block=16, index_candidates=4096, index_exact_layers=2, selector="indexer",
    mlp_layer_types=["dense"] * 3 + ["sparse"] * 75)
FULL_YARN = dict(
    type="yarn", rope_type="yarn", rope_theta=10000.0, factor=40.0, original_max_position_embeddings=4096,
    beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0, attention_factor=1.0, truncate=True,
    partial_rotary_factor=1.0)
FULL_FP8 = dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128])
WRONG = ["4", "", "x", 1.5, -1, -1.5, True, False, [], ["4"], [1], [None], {}, {"a": 1}, [[]], 2**62, 1e300]
WRONG_NUMBERS = ("NaN", "Infinity", "-Infinity", "1e999", "1" + "0" * 400)


def fits(key, right, wrong):
    """Is the wrong value of the right type after all, and may it be accepted?"""
    if isinstance(right, bool):
        return isinstance(wrong, bool)
    if key == "eos_token_id" and wrong == [1]:
        return True
    numbers = (int, float) if isinstance(right, float) or key in ("rope_theta", "rms_norm_eps") else int
    negative = key in ("index_topk_freq", "index_skip_topk_offset")  # as in transformers
    if isinstance(right, (int, float)) and isinstance(wrong, numbers) and not isinstance(wrong, bool):
        return wrong >= 0 or negative
    return False


def walk():
    """(name, key, right value, function that puts a value there -> dict of a config.json)"""
    for name, full in (("v3", FULL), ("glm", FULL_GLM)):
        for key, right in full.items():
            def put(value, full=full, key=key):
                return full | {key: value}
            yield name, key, right, put
    bare = {key: value for key, value in FULL.items() if key != "rope_theta"}
    for parent, inner in (("rope_scaling", FULL_YARN), ("rope_parameters", FULL_YARN),
                          ("quantization_config", FULL_FP8)):
        for key, right in inner.items():
            def put(value, parent=parent, inner=inner, key=key):
                rope = dict(rope_scaling=None) if parent == "rope_parameters" else {}
                return bare | rope | {parent: inner | {key: value}}
            yield parent, f"{parent}.{key}", right, put


WALK = list(walk())


def test_the_walk_begins_with_what_is_right(tmp_path):
    """And visits every key that is read."""
    for _, _, right, put in WALK:
        (tmp_path / "config.json").write_text(json.dumps(put(right)))
        checkpoint.read_config(tmp_path)
    visited = {key for _, key, _, _ in WALK}
    read = checkpoint.TYPES.keys() - {"quantization_config", "rope_parameters"} | {"eos_token_id"}
    for parent, types in (("rope_scaling", checkpoint.ROPE_TYPES), ("rope_parameters", checkpoint.ROPE_TYPES),
                          ("quantization_config", checkpoint.QUANTISATION_TYPES)):
        read |= {f"{parent}.{key}" for key in types}
    assert read <= visited


@pytest.mark.parametrize("name, key, right, put", WALK, ids=[f"{name}-{key}" for name, key, _, _ in WALK])
def test_wrong_types(name, key, right, put, tmp_path):
    """Each key with each wrong type: refused in a line that names file and key, or right after all."""
    path = tmp_path / "config.json"
    for wrong in WRONG:
        path.write_text(json.dumps(put(wrong)))
        try:
            checkpoint.read_config(tmp_path)
        except ValueError as error:
            message = str(error)
            assert message.startswith(f"{path}: ") and "\n" not in message, (wrong, message)
            assert key.split(".")[0] in message and key.split(".")[-1] in message, (wrong, message)
        else:
            empty = wrong == {} and key in ("rope_scaling", "rope_parameters", "quantization_config")
            assert fits(key.split(".")[-1], right, wrong) or empty, wrong
    for wrong in WRONG_NUMBERS:
        path.write_text(json.dumps(put("HERE")).replace('"HERE"', wrong))
        with pytest.raises(ValueError, match="config.json: no valid JSON") as error:
            checkpoint.read_config(tmp_path)
        assert "\n" not in str(error.value)


# ---- tensors ----

def test_shards_and_layers_beyond(tmp_path, monkeypatch, capsys):
    """Sharded folders of transformers and of ours; multi-token prediction layers in the files are left
    alone."""
    reference = theirs("deepseek_v3", **GROUPS)
    reference.save_pretrained(tmp_path / "theirs", max_shard_size="40KB")
    assert (tmp_path / "theirs" / "model.safetensors.index.json").exists()
    shard = sorted((tmp_path / "theirs").glob("*.safetensors"))[0]
    beyond = {}
    for name in ("eh_proj", "enorm", "shared_head.norm", "mlp.up_proj"):
        beyond[f"model.layers.3.{name}.weight"] = torch.ones(2, 2)
    save_file(load_file(shard) | beyond, shard)
    model = Transformer.from_pretrained(tmp_path / "theirs")
    assert difference(logits(model, tokens()), logits(reference, tokens())) < ROUNDING
    assert capsys.readouterr().err.count("left out") == 0
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 40_000)
    model.save_pretrained(tmp_path / "ours")
    shards = sorted((tmp_path / "ours").glob("*.safetensors"))
    assert len(shards) > 3 and max(shard.stat().st_size for shard in shards) < 60_000
    assert difference(logits(opened(tmp_path / "ours"), tokens()), logits(reference, tokens())) < ROUNDING


def tiny(folder, **sizes):
    """A folder of ours, and its model."""
    torch.manual_seed(0)
    small = dict(hidden_size=32, num_hidden_layers=2, index_topk=8, initializer_range=0.2)
    model = Transformer(Config(**(small | sizes)), index_fp8=False).eval()
    model.save_pretrained(folder)
    return model


WEIGHT = "model.layers.1.self_attn.o_proj.weight"
SCALE = WEIGHT + "_scale_inv"
INDEXER = "model.layers.1.self_attn.indexer.wk.weight"


def refused(folder, *words):
    """from_pretrained refuses this folder in one line that holds these words."""
    with pytest.raises(ValueError) as error:
        Transformer.from_pretrained(folder, dtype=torch.float32)
    message = str(error.value)
    assert "\n" not in message and str(folder) in message and all(word in message for word in words), message


KINDS = dict(
    int8=torch.int8, uint8=torch.uint8, int32=torch.int32, int64=torch.int64, bool=torch.bool,
    float64=torch.float64, e5m2=torch.float8_e5m2, e4m3=torch.float8_e4m3fn, e4m3fnuz=torch.float8_e4m3fnuz)


@pytest.mark.parametrize("with_scale", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_weights_in_formats_that_we_do_not_know(tmp_path, kind, with_scale):
    """Refused by name, never multiplied as if they were the numbers."""
    if kind == "e4m3" and with_scale:
        pytest.skip("the pair that we know")
    tiny(tmp_path)
    x = (load_file(tmp_path / "model.safetensors")[WEIGHT] * 100).to(KINDS[kind])
    change_tensors(tmp_path, **{WEIGHT: x, SCALE: torch.ones(1, 1) if with_scale else None})
    refused(tmp_path, WEIGHT, "scale" if kind == "e4m3" else checkpoint_name(KINDS[kind]))


def checkpoint_name(dtype):
    """What safetensors calls a dtype."""
    names = {torch.int8: "I8", torch.uint8: "U8", torch.int32: "I32", torch.int64: "I64", torch.bool: "BOOL",
             torch.float64: "F64", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
             torch.float16: "F16"}
    return names[dtype]


@pytest.mark.parametrize("kind", [torch.int8, torch.int32, torch.float64, torch.float8_e5m2, torch.float16])
def test_scales_in_formats_that_we_do_not_know(tmp_path, kind):
    tiny(tmp_path)
    x = load_file(tmp_path / "model.safetensors")[WEIGHT].to(torch.float8_e4m3fn)
    change_tensors(tmp_path, **{WEIGHT: x, SCALE: torch.ones(1, 1).to(kind)})
    refused(tmp_path, SCALE, checkpoint_name(kind))


@pytest.mark.parametrize("grid", [(1,), (), (2, 1), (1, 2)])
def test_scales_of_another_shape(tmp_path, grid):
    tiny(tmp_path)
    x = load_file(tmp_path / "model.safetensors")[WEIGHT].to(torch.float8_e4m3fn)
    change_tensors(tmp_path, **{WEIGHT: x, SCALE: torch.ones(grid)})
    refused(tmp_path, SCALE, "not of shape (1, 1)")


def test_vectors_in_fp8_and_scales_of_nothing(tmp_path):
    tiny(tmp_path)
    norm = "model.norm.weight"
    ones = torch.ones(32).to(torch.float8_e4m3fn)
    change_tensors(tmp_path, **{norm: ones, norm + "_scale_inv": torch.ones(1)})
    refused(tmp_path, norm, "F8_E4M3")
    tiny(tmp_path)
    change_tensors(tmp_path, **{SCALE: torch.ones(1, 1)})
    refused(tmp_path, SCALE, "has no place")


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "e8m0", "bits of e8m0"])
def test_scales(tmp_path, kind):
    """Exponents are powers of two, 2^(x - 127): of type e8m0, or as the bits that they are; NaN stays NaN."""
    tiny(tmp_path, hidden_size=300)
    stored = load_file(tmp_path / "model.safetensors")[WEIGHT]
    rows, columns = stored.shape
    x = stored.to(torch.float8_e4m3fn)
    exponents = torch.tensor([[120], [127], [130]], dtype=torch.uint8)
    scale = 2.0 ** (exponents.float() - 127)  # (3, 1)
    if kind == "bits of e8m0":
        scale = exponents
    elif kind == "e8m0":
        scale = exponents.view(torch.float8_e8m0fnu)
    else:
        scale = scale.to(getattr(torch, kind))
    change_tensors(tmp_path, **{WEIGHT: x, SCALE: scale})
    factors = torch.tensor([2.0**-7, 1.0, 8.0]).repeat_interleave(128)[:rows, None]
    want = x.float() * factors
    for dtype in (torch.float32, torch.bfloat16, None):
        got = Transformer.from_pretrained(tmp_path, dtype=dtype).state_dict()[WEIGHT]
        assert got.dtype == (dtype or torch.bfloat16) and torch.equal(got.float(), want.to(got.dtype).float())
    if "e8m0" in kind:
        nan = torch.full((3, 1), 255, dtype=torch.uint8)
        change_tensors(tmp_path, **{SCALE: nan if kind == "bits of e8m0" else nan.view(torch.float8_e8m0fnu)})
        assert Transformer.from_pretrained(tmp_path).state_dict()[WEIGHT].isnan().all()


def test_fp8_blocks(tmp_path):
    """e4m3 weights with one scale per 128 x 128 block load as the dequantised bf16 model does, experts and
    odd sizes included."""
    generator = torch.Generator().manual_seed(2)
    sizes = dict(hidden_size=150, intermediate_size=260, moe_intermediate_size=130)
    theirs("deepseek_v32", **INDEX, **GROUPS, **sizes).save_pretrained(tmp_path / "fp8")
    plain = {}
    quantised = {}
    for name, x in load_file(tmp_path / "fp8" / "model.safetensors").items():
        plain[name] = x if name.endswith("bias") else x.bfloat16()
        quantised[name] = plain[name]
        if x.dim() == 2 and not name.endswith(("embed_tokens.weight", "lm_head.weight", "gate.weight")):
            rows, columns = x.shape
            grid = [-(-n // 128) for n in x.shape]
            scale = 0.01 * torch.rand(grid, generator=generator) + 0.005
            values = (x / 0.01).clamp(-448, 448).to(torch.float8_e4m3fn)
            quantised |= {name: values, name + "_scale_inv": scale}
            factors = torch.kron(scale, torch.ones(128, 128))[:rows, :columns]
            plain[name] = (values.float() * factors).bfloat16()
    save_file(quantised, tmp_path / "fp8" / "model.safetensors")
    shutil.copytree(tmp_path / "fp8", tmp_path / "bf16")
    save_file(plain, tmp_path / "bf16" / "model.safetensors")
    edit(tmp_path / "fp8", quantization_config=dict(
        quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0", weight_block_size=[128, 128],
        activation_scheme="dynamic", modules_to_not_convert=["lm_head"]))
    a, b = (Transformer.from_pretrained(tmp_path / kind) for kind in ("fp8", "bf16"))
    for x, y in zip(a.state_dict().values(), b.state_dict().values()):
        assert torch.equal(x, y) and x.dtype == y.dtype
    a.save_pretrained(tmp_path / "saved")
    assert "quantization_config" not in read_config(tmp_path / "saved")
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path / "saved"), tokens()), logits(b, tokens()))


def test_experts_of_several_dtypes(tmp_path):
    """A stack takes the widest, so that none of its experts is rounded."""
    theirs("deepseek_v3").save_pretrained(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.experts.{}.down_proj.weight"
    change_tensors(tmp_path, **{name.format(0): stored[name.format(0)].bfloat16()})
    stack = Transformer.from_pretrained(tmp_path).state_dict()["model.layers.1.mlp.experts.down_proj"]
    assert stack.dtype == torch.float32 and torch.equal(stack[5], stored[name.format(5)])
    assert torch.equal(stack[0], stored[name.format(0)].bfloat16().float())


def test_memory_mapped_and_dtype(tmp_path):
    """dtype: as stored, or converted except the correction bias. Tied weights are one parameter."""
    reference = theirs("deepseek_v3", tie_word_embeddings=True).to(torch.bfloat16)
    for layer in reference.model.layers[1:]:
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float()
    reference.save_pretrained(tmp_path)

    def kinds(model):
        return {name.endswith("bias"): x.dtype for name, x in model.state_dict().items()}

    model = Transformer.from_pretrained(tmp_path)
    assert kinds(model) == {False: torch.bfloat16, True: torch.float32}
    assert model.lm_head.weight is model.model.embed_tokens.weight
    wide = Transformer.from_pretrained(tmp_path, dtype=torch.float32)
    assert kinds(wide) == {False: torch.float32, True: torch.float32}
    model.save_pretrained(tmp_path)  # over the files that it is mapped from
    assert torch.equal(logits(Transformer.from_pretrained(tmp_path), tokens()), logits(model, tokens()))


# ---- tensors that the config does not account for ----

def test_a_head_beside_tied_embeddings(tmp_path, monkeypatch):
    """Equal to the embedding, in any dtype that holds it, or refused, whichever row differs."""
    monkeypatch.setattr(checkpoint, "COMPARED_ROWS", 100)
    model = tiny(tmp_path, tie_word_embeddings=True)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    embedding = model.lm_head.weight.detach().clone()
    change_tensors(tmp_path, **{"lm_head.weight": embedding})
    assert torch.equal(logits(load(tmp_path), tokens()), logits(model, tokens()))
    for row in (0, 256):
        other = embedding.clone()
        other[row, 3] += 1e-3
        change_tensors(tmp_path, **{"lm_head.weight": other})
        refused(tmp_path, "lm_head.weight differs", "tie_word_embeddings")
    for other in (embedding[:-1], embedding.bfloat16(), embedding * torch.nan):
        change_tensors(tmp_path, **{"lm_head.weight": other})
        refused(tmp_path, "lm_head.weight differs")


def test_leftovers(tmp_path):
    for name in ("surplus", "lm_head.bias", "model.layers.0.self_attn.q_b_proj.lora_A.weight",
                 "model.layers.0.mlp.gate.weight", "model.layers.x.mlp.gate.weight",
                 "model.layers.2.adapter.weight", "0.eh_proj.weight", "model.layers.0.eh_proj.weight"):
        tiny(tmp_path)
        edit(tmp_path, num_nextn_predict_layers=1)
        change_tensors(tmp_path, **{name: torch.ones(2, 2)})
        refused(tmp_path, name, "has no place")


def test_rope_frequencies_in_the_file(tmp_path):
    """Early conversions store them: ours, also rounded, or refused."""
    model = tiny(tmp_path)
    name = "model.layers.0.self_attn.rotary_emb.inv_freq"
    for kind in (torch.float32, torch.bfloat16):
        change_tensors(tmp_path, **{name: model.rope_frequencies.to(kind)})
        load(tmp_path)
    for other in (model.rope_frequencies * 1.01, model.rope_frequencies[:-1].clone()):
        change_tensors(tmp_path, **{name: other})
        refused(tmp_path, name)


def test_layers_are_cut_only_on_purpose(tmp_path, capsys):
    """By num_nextn_predict_layers, and then it is said; the layers that remain are those of the file."""
    model = tiny(tmp_path, num_hidden_layers=4)
    two = dict(num_hidden_layers=2, mlp_layer_types=["dense"] * 2, first_k_dense_replace=2)
    for extra in (0, 1, None):
        edit(tmp_path, **two, num_nextn_predict_layers=extra)
        said = f"num_nextn_predict_layers={extra or 0}"
        refused(tmp_path, "tensor model.layers.", said, "on purpose")
    edit(tmp_path, num_nextn_predict_layers=2)
    cut = load(tmp_path)
    assert "layers [2, 3] are left out" in capsys.readouterr().err
    del model.model.layers[2:]
    model.config.num_hidden_layers = 2
    assert torch.equal(logits(cut, tokens()), logits(model, tokens()))


def test_indexers_that_share(tmp_path, capsys):
    """On a checkpoint with an indexer in every layer, config.json can let layers share: said. Without a word
    about indexers in it, theirs are refused."""
    tiny(tmp_path)
    edit(tmp_path, model_type="glm_moe_dsa", indexer_types=["full", "shared"], indexer_rope_interleave=False)
    model = load(tmp_path)
    assert model.model.layers[1].self_attn.indexer is None
    assert "the indexers of layers [1] are left out" in capsys.readouterr().err
    index_keys = ("index_topk", "index_n_heads", "index_head_dim", "indexer_types", "indexer_rope_interleave")
    edit(tmp_path, model_type="deepseek_v3", **dict.fromkeys(index_keys))
    refused(tmp_path, "indexer", "has no place")


def test_without_indexers(tmp_path, capsys):
    """A model that shares selections, read without any indexer: dense, and saved as what it then is."""
    reference = theirs("glm_moe_dsa", **CASES["glm_moe_dsa"]["frequency"])
    reference.save_pretrained(tmp_path / "m")
    edit(tmp_path / "m", index_topk=0)
    model = load(tmp_path / "m")
    assert model.attention == "dense" and "indexers of layers [0, 2] are left out" in capsys.readouterr().err
    model.save_pretrained(tmp_path / "dense")
    assert read_config(tmp_path / "dense")["model_type"] == "deepseek_v3"
    assert torch.equal(logits(load(tmp_path / "dense"), tokens()), logits(model, tokens()))
    assert difference(logits(opened(tmp_path / "dense"), tokens()), logits(model, tokens())) < ROUNDING


def test_bad_files(good, tmp_path):
    def broken(change, kind, message):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(good, tmp_path / "m")
        change(tmp_path / "m", sorted((tmp_path / "m").glob("*.safetensors"))[1])
        with pytest.raises(kind, match=message) as error:
            Transformer.from_pretrained(tmp_path / "m")
        assert "\n" not in str(error.value)

    def written(name, text):
        return lambda folder, shard: (folder / name).write_text(text)

    def removed(name):
        return lambda folder, shard: (folder / name).unlink()

    def cut(size):
        return lambda folder, shard: os.truncate(shard, size % shard.stat().st_size)

    def without_first(folder, shard):
        save_file(dict(list(load_file(shard).items())[1:]), shard)

    def in_fp8(folder, shard):
        save_file({name: x.to(torch.float8_e4m3fn) for name, x in load_file(shard).items()}, shard)

    def twice(folder, shard):
        other = sorted(folder.glob("*.safetensors"))[0]
        save_file(load_file(shard) | load_file(other), shard)

    def beside(folder, shard):
        shutil.copy(shard, folder / "model.safetensors")

    broken(lambda folder, shard: shutil.rmtree(folder), FileNotFoundError, "config.json: no such file")
    broken(written("config.json", "{"), ValueError, "config.json: no valid JSON")
    broken(written("config.json", "[]"), ValueError, "config.json: holds a list")
    broken(written("config.json", "[" * 100_000), ValueError, "config.json: no valid JSON")
    broken(lambda folder, shard: shard.unlink(), FileNotFoundError, "model-00002.*incomplete")
    broken(cut(-8), ValueError, "model-00002.*truncated")
    broken(cut(0), ValueError, "model-00002.*truncated")
    index = "model.safetensors.index.json"
    broken(removed(index), FileNotFoundError, "model.safetensors: no such file")
    broken(without_first, ValueError, "is missing, but the index lists it")
    broken(in_fp8, ValueError, "F8_E4M3|is FP8, its .*_scale_inv is missing")
    broken(twice, ValueError, "model-00002.* is in model-00001.*, too")
    broken(beside, ValueError, "model.safetensors: stands beside .*index.json")
    for value in ([], {}, 3, "x", {"a": 3}, {"a": None}, {"a": ["b"]}, {"a": "../b.safetensors"}, None):
        broken(written(index, json.dumps(dict(weight_map=value))), ValueError, "index.json: weight_map=")
    with pytest.raises(ValueError, match="index_head_dim=12"):
        Transformer.from_pretrained(good, index=dict(INDEX, index_head_dim=12))


# ---- new indexers ----

@pytest.mark.parametrize("family,case,saved_as", (
    ("deepseek_v2", "lite", "deepseek_v2"), ("deepseek_v2", "latent_groups", "deepseek_v2"),
    ("deepseek_v3", "moonlight", "deepseek_v3"), ("deepseek_v3", "yarn", "deepseek_v32")))
def test_graft(family, case, saved_as, tmp_path):
    """New indexers on a dense checkpoint: the same logits, KL trains them alone, and the result saves, opens
    here and where its class exists."""
    reference = theirs(family, **CASES[family][case])
    idx = tokens()
    reference.save_pretrained(tmp_path / "dense")
    torch.manual_seed(3)
    model = load(tmp_path / "dense", index=INDEX)
    assert model.attention == "dense" and difference(logits(model, idx), logits(reference, idx)) < ROUNDING
    index = model.indexer_parameters()
    assert len(index) == 5 * 3 and all(p.dtype == torch.float32 for p in index)
    optimizer = torch.optim.AdamW(index, lr=3e-2)
    kls = []
    for _ in range(20):
        model.zero_grad()
        losses = model(idx, index_loss=True, logits_of=None)[1]
        losses["kl"].backward()
        kls.append(losses["kl"].item())
        assert all((p.grad is not None) == any(p is q for q in index) for p in model.parameters())
        optimizer.step()
    assert kls[-1] < 0.9 * kls[0]

    model.attention = "sparse"
    want = logits(model, idx)
    model.save_pretrained(tmp_path / "sparse")
    again = load(tmp_path / "sparse")
    assert again.attention == "sparse" and again.config.model_type == saved_as
    assert torch.equal(logits(again, idx), want)
    there = opened(tmp_path / "sparse")
    assert there.config.model_type == saved_as
    expected = want if saved_as == "deepseek_v32" else logits(reference, idx)
    assert difference(logits(there, idx), expected) < ROUNDING

    # in place of what is there
    anew = load(tmp_path / "sparse", index=dict(INDEX, index_n_heads=INDEX["index_n_heads"] + 1))
    before = model.state_dict()
    for name, p in anew.state_dict().items():
        if "weights_proj" in name or "wq_b" in name:
            assert before[name].shape != p.shape, name
        elif "k_norm" not in name:
            assert torch.equal(before[name], p) != (".indexer." in name), name


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
    assert {p.grad.dtype for p in model.indexer_parameters()} == {torch.float32}
    assert model.lm_head.weight.grad is None


def test_shared_layers_train_and_cache(tmp_path):
    """Recomputation hands on the selection and what it was made of; shared layers have no indexer and keep no
    index keys."""
    theirs("glm_moe_dsa", **CASES["glm_moe_dsa"]["shared"]).save_pretrained(tmp_path)
    model = load(tmp_path)
    results = []
    for model.recompute in (False, True):
        model.zero_grad()
        losses = model(tokens(), tokens(), index_loss=True)[1]
        (losses["kl"] + losses["lm"]).backward()
        norms = [p.grad.norm().item() for p in model.parameters()]
        results.append([losses["kl"].item(), losses["lm"].item(), *norms])
    assert results[0] == pytest.approx(results[1], rel=1e-4)
    assert sum(".indexer." in name for name, _ in model.named_parameters()) == 10
    loss = model(tokens(), tokens(), logits_of=None)[1]["lm"].item()
    assert loss == pytest.approx(results[0][1], rel=1e-5)
    model.generate(tokens(length=4), 2)
    entry = (24 + 8) * 4
    assert model.cache_bytes_per_token == 2 * entry + 2 * (entry + 16 * 4)


def test_experts():
    """Outputs and gradients of the grouped path and the loop equal a sum over experts in float64; routing
    weights get gradients."""
    torch.manual_seed(0)
    config = Config(hidden_size=16, n_routed_experts=8, n_group=4, topk_group=2, num_experts_per_tok=3,
                    moe_intermediate_size=24, routed_scaling_factor=2.0)
    moe = MoE(config).double()
    for p in moe.parameters():
        torch.nn.init.normal_(p, std=0.3)
    x = torch.randn(2, 5, 16, dtype=torch.float64, requires_grad=True)
    direction = torch.randn(2, 5, 16, dtype=torch.float64)
    inputs = [x, *moe.parameters()]
    got = torch.autograd.grad((moe(x) * direction).sum(), inputs)
    weights, chosen = moe.route(x.flatten(0, 1))  # (10, 3)
    dense = torch.zeros(10, 8, dtype=torch.float64).scatter(1, chosen, weights.double())
    gate, up = torch.einsum("nh,eih->nei", x.flatten(0, 1), moe.experts["gate_up_proj"]).chunk(2, -1)
    hidden = torch.nn.functional.silu(gate) * up  # (10, 8, 24)
    each = torch.einsum("nei,ehi->neh", hidden, moe.experts["down_proj"])  # (10, 8, 16)
    out = torch.einsum("neh,ne->nh", each, dense).view_as(x) + moe.shared_experts(x)
    assert difference(moe(x), out) < 1e-6  # routing weights are float32
    for a, b in zip(got, torch.autograd.grad((out * direction).sum(), inputs)):
        assert difference(a, b) < 1e-5 and a.abs().max() > 0
    if torch.cuda.is_available():
        moe = moe.to("cuda", torch.bfloat16)
        x = x.detach().to("cuda", torch.bfloat16)
        assert difference(moe(x).double().cpu(), out) < 3e-2


# ---- folders appear whole ----

def in_a_process(code, *args):
    """Start Python code with these arguments in a process of its own."""
    environment = {**os.environ, "PYTHONPATH": ROOT}
    command = [sys.executable, "-c", code, *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True)


def test_killed_while_saving(tmp_path):
    """A folder that is being replaced stays readable at every moment: kill -9 while saving, then load; saving
    again tidies up."""
    tiny(tmp_path / "m")
    script = (
        "import sys\n"
        "from model import Transformer\n"
        "m = Transformer.from_pretrained(sys.argv[1])\n"
        "print('go', flush=True)\n"
        "while True:\n"
        "    m.save_pretrained(sys.argv[1])\n")
    with in_a_process(script, tmp_path / "m") as process:
        process.stdout.readline()
        time.sleep(0.107)
        process.kill()
    load(tmp_path / "m").save_pretrained(tmp_path / "m")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_killed_at_random_times(tmp_path):
    """The same of a folder of three files, ten kills: all three are of one writing."""
    script = (
        "import itertools, sys\n"
        "from support import files\n"
        "for i in itertools.count():\n"
        "    with files.whole_folder(sys.argv[1]) as part:\n"
        "        for name in 'abc':\n"
        "            (part / name).write_text(str(i) * 1000)\n"
        "    if i == 0:\n"
        "        print('go', flush=True)\n")
    folder = tmp_path / "m"
    for attempt in range(10):
        with in_a_process(script, folder) as process:
            process.stdout.readline()
            time.sleep(0.0131 * attempt)
            process.kill()
        found = files.locate(folder)
        assert sorted(path.name for path in found.iterdir()) == ["a", "b", "c"]
        assert len({(found / name).read_text() for name in "abc"}) == 1
        assert {path.name for path in tmp_path.iterdir()} <= {"m", "m.part", files.put_aside(folder).name}


def test_between_the_renames(tmp_path):
    """The moment in which only the old folder is there, put aside; also behind a link."""
    (tmp_path / "disk").mkdir()
    tiny(tmp_path / "disk" / "m")
    (tmp_path / "m").symlink_to(tmp_path / "disk" / "m")
    (tmp_path / "disk" / "m").rename(files.put_aside(tmp_path / "disk" / "m"))
    for folder in (tmp_path / "disk" / "m", tmp_path / "m"):
        model = load(folder)
    model.save_pretrained(tmp_path / "disk" / "m")
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["m"]


def test_links_stay_links(tmp_path):
    (tmp_path / "disk").mkdir()
    model = tiny(tmp_path / "disk" / "m")
    (tmp_path / "link").symlink_to(os.path.join("disk", "m"))
    (tmp_path / "over").symlink_to("link")
    (tmp_path / "out").symlink_to("disk")
    for folder in ("link", "over", "out/m", "out/new"):
        for change in range(2):
            with torch.no_grad():
                model.lm_head.weight += 1
            model.save_pretrained(tmp_path / folder)
            assert torch.equal(logits(load(tmp_path / folder), tokens()), logits(model, tokens()))
    for link, target in (("link", "disk/m"), ("over", "link"), ("out", "disk")):
        assert os.readlink(tmp_path / link) == target
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["m", "new"]


@pytest.mark.parametrize("folder", ["link", "link/m", "loop", "file", "file/m", "/"])
def test_places_where_no_folder_can_be(tmp_path, folder):
    """Refused in a line before anything is written, by the look ahead and by saving."""
    model = tiny(tmp_path / "m")
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "file").write_text("text")
    before = sorted(tmp_path.iterdir())
    for attempt in (files.destination, model.save_pretrained):
        with pytest.raises((ValueError, FileNotFoundError)) as error:
            attempt(tmp_path / folder)
        assert "\n" not in str(error.value) and folder.split("/")[0] in str(error.value)
    assert sorted(tmp_path.iterdir()) == before and os.path.islink(tmp_path / "link")


def test_a_copy_of_ones_own_is_left_alone(tmp_path):
    """Neither overwritten nor taken for the folder that it is a copy of."""
    model = tiny(tmp_path / "m")
    (tmp_path / "m").rename(tmp_path / "m.old")
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "m")
    before = (tmp_path / "m.old" / "model.safetensors").read_bytes()
    model.lm_head.weight.data += 1
    for _ in range(2):
        model.save_pretrained(tmp_path / "m")
    assert (tmp_path / "m.old" / "model.safetensors").read_bytes() == before


def test_full_disk(tmp_path):
    """As a limit on the size of files, for the little files too and for the weights alone: one line, and the
    last good folder."""
    tiny(tmp_path / "m")
    before = {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()}
    script = (
        "import resource, signal, sys\n"
        "from model import Transformer\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "m = Transformer.from_pretrained(sys.argv[1])\n"
        "for limit in (1, 1000, 40000):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try:\n"
        "        m.save_pretrained(sys.argv[1], 'bytes')\n"
        "    except OSError as error:\n"
        "        sys.stderr.write(f'{error}\\n')\n")
    with in_a_process(script, tmp_path / "m") as process:
        said = process.stderr.read().splitlines()
    assert process.returncode == 0 and len(said) == 3, said
    for line in said:
        assert line.startswith(f"{tmp_path / 'm'}: not written (") and line.endswith("is as it was")
    assert [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name: path.read_bytes() for path in (tmp_path / "m").iterdir()} == before


def test_whatever_is_raised_leaves_the_last_good_folder(tmp_path, monkeypatch):
    """While writing, and in either rename."""
    folder = tmp_path / "m"
    folder.mkdir()
    (folder / "a").write_text("old")

    def save(error=None):
        with files.whole_folder(folder) as part:
            (part / "a").write_text("new")
            if error:
                raise error

    for error in (KeyboardInterrupt(), RuntimeError("two\nlines"), FileNotFoundError("a line of ours")):
        with pytest.raises(type(error)) as raised:
            save(error)
        assert raised.value is error
    replace = os.replace
    for refused_rename in (1, 2):
        calls = []

        def failing(source, target):
            calls.append(target)
            if len(calls) == refused_rename:
                raise OSError(16, "Device or resource busy")
            replace(source, target)

        monkeypatch.setattr(os, "replace", failing)
        with pytest.raises(OSError, match="m: not written .Device or resource busy.; what was there is"):
            save()
        monkeypatch.undo()
        assert len(calls) >= refused_rename
        assert [path.name for path in tmp_path.iterdir()] == ["m"] and (folder / "a").read_text() == "old"
    save()
    assert [path.name for path in tmp_path.iterdir()] == ["m"] and (folder / "a").read_text() == "new"


# ---- text and JSON ----

def test_replace_text(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run.json").symlink_to("disk/real.json")
    for text in ("é\r\n", "two\n"):
        files.replace_text(tmp_path / "run.json", text)
        assert (tmp_path / "disk" / "real.json").read_bytes() == text.encode()
    assert os.readlink(tmp_path / "run.json") == "disk/real.json"
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["real.json"]
    with pytest.raises(OSError, match="f: not written .*; what was there is as it was"):
        files.replace_text(tmp_path / "run.json" / "f", "x")


def test_read_text(tmp_path):
    """One rule: a byte order mark in front is dropped, CRLF stays, and what is no UTF-8 is refused."""
    path = tmp_path / "x.txt"
    marked = b"\xef\xbb\xbfa\r\nb\xef\xbb\xbf"
    for content, text in ((marked, "a\r\nb\ufeff"), (b"", ""), ("é".encode(), "é")):
        path.write_bytes(content)
        assert files.read_text(path) == text == files.text_of(content, "standard input")
    for content in (b"caf\xe9", "a".encode("utf-16")):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="x.txt: no UTF-8 text .*convert it"):
            files.read_text(path)
    with pytest.raises(FileNotFoundError, match="y.txt: no such file"):
        files.read_text(tmp_path / "y.txt")


def test_run_options(tmp_path):
    assert files.run_options(tmp_path) == {}
    for text, options in (('{}', {}), ('\ufeff{"options": {"a": 1}}', {"a": 1})):
        (tmp_path / "run.json").write_text(text, encoding="utf-8")
        assert files.run_options(tmp_path) == options
    for value in ([], 3, "x", None, True):
        (tmp_path / "run.json").write_text(json.dumps(dict(options=value)))
        with pytest.raises(ValueError, match="run.json: options="):
            files.run_options(tmp_path)
