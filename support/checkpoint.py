"""Checkpoint folders in the layout of the published models: config.json, safetensors in one file or in shards, tokenizer files.

Families: deepseek_v2 (V2-Lite), deepseek_v3 (V3, V3.1, Moonlight), deepseek_v32 and glm_moe_dsa (GLM-5). Tensors go from the memory-mapped
files straight to where they stay: on the CPU they remain mapped, on a GPU each is copied once, those of experts into their place in a stack.
FP8 weights are dequantised on the way. Nothing in a folder can execute code, and what we would compute otherwise than its publishers is refused.
"""
import json
import os
import shutil
from dataclasses import asdict, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import Config
from support.files import locate, read_json
from support.tokenizer import save_tokenizer

SHARD_BYTES = 5 * 10**9
CLASSES = dict(deepseek_v2="DeepseekV2ForCausalLM", deepseek_v3="DeepseekV3ForCausalLM", deepseek_v32="DeepseekV32ForCausalLM",
               glm_moe_dsa="GlmMoeDsaForCausalLM")  # model_type -> class in transformers
REQUIRED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "q_lora_rank", "kv_lora_rank",
            "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim", "max_position_embeddings", "rms_norm_eps")
REQUIRED_WITH_EXPERTS = ("num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "routed_scaling_factor", "first_k_dense_replace")
REQUIRED_WITH_INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
ROPE_KEYS = {"type", "rope_type", "rope_theta", "factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
             "attention_factor", "truncate"}
REWRITTEN = {"architectures", "auto_map", "quantization_config", "dtype", "torch_dtype", "transformers_version", "rope_parameters",
             "num_key_value_heads", "num_mtp_layers", "scoring_func"}  # keys that `write` drops or derives anew


# ---- config.json ----

def read_config(folder):
    """The Config of a checkpoint folder, in the hub's form (rope_theta, rope_scaling) or that of transformers 5 (rope_parameters).

    Keys that change nothing here are kept in Config.other. FileNotFoundError, ValueError: one line naming file, key and fix."""
    path = locate(folder) / "config.json"
    values = read_json(path)
    family = values.get("model_type")
    if family not in CLASSES:
        raise ValueError(f"{path}: model_type={family} is not supported; these are: {', '.join(CLASSES)}")

    def refuse(key, value, supported):
        raise ValueError(f"{path}: {key}={value!r} is not supported, only {supported}")

    def require(keys, why):
        for key in keys:
            if values.get(key) is None:
                raise ValueError(f"{path}: {key} is missing; {why}")

    known = {f.name: f.type for f in fields(Config) if f.name != "other"}
    for key, kind in (known | dict(rope_parameters=dict, quantization_config=dict)).items():
        value, kinds = values.get(key), (int, float) if kind is float else kind
        if value is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool)):
            refuse(key, value, getattr(kind, "__name__", kind))
    absent = {key: 0 for key in ("q_lora_rank", "n_shared_experts", "n_routed_experts") if key in values and values[key] is None}
    values = {k: v for k, v in values.items() if v is not None} | absent
    require(REQUIRED, "a published config.json states it")
    v2 = family == "deepseek_v2"
    for key, supported in dict(hidden_act=("silu",), mlp_bias=(False,), moe_layer_freq=(1,), rope_interleave=(True,), scoring_func=("softmax" if v2 else "sigmoid",),
                               num_key_value_heads=(values["num_attention_heads"],)).items():
        if values.get(key, supported[0]) not in supported:
            refuse(key, values[key], " or ".join(map(str, supported)))
    quantised = values.get("quantization_config", {}).get("quant_method", "fp8")
    if quantised != "fp8":
        refuse("quantization_config.quant_method", quantised, "fp8")

    rope = dict(values.pop("rope_scaling", None) or values.pop("rope_parameters", None) or {})
    values["rope_theta"] = float(rope.pop("rope_theta", values.get("rope_theta", 10000.0)))
    if rope.pop("partial_rotary_factor", 1.0) != 1.0 or rope.keys() - ROPE_KEYS:
        refuse("rope_scaling", rope, f"the keys {', '.join(sorted(ROPE_KEYS))}")
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "yarn"):
        refuse("rope_scaling.type", kind, "default or yarn")
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
        if not rope.get("factor"):
            rope["factor"] = values["max_position_embeddings"] / rope["original_max_position_embeddings"]
        values["rope_scaling"] = rope

    if family in ("deepseek_v2", "deepseek_v3"):
        values.pop("mlp_layer_types", None)
    elif "first_k_dense_replace" not in values and "mlp_layer_types" in values:
        values["first_k_dense_replace"] = (*values["mlp_layer_types"], "sparse").index("sparse")
    values = dict(n_routed_experts=0, topk_method="greedy" if v2 else "noaux_tc", norm_topk_prob=not v2) | values
    if values["n_routed_experts"]:
        groups = ("n_group", "topk_group") if values["topk_method"] != "greedy" else ()
        require(REQUIRED_WITH_EXPERTS + groups, "a model with n_routed_experts needs it")

    if family in ("deepseek_v32", "glm_moe_dsa") or values.get("index_topk"):
        require(REQUIRED_WITH_INDEXER, f"{family} has an indexer")
    values = dict(index_topk=0, indexer_rope_interleave=family == "glm_moe_dsa") | values
    if family == "glm_moe_dsa" and "indexer_types" not in values:
        pattern = values.get("index_topk_pattern")
        frequency, offset = max(values.get("index_topk_freq", 1), 1), values.get("index_skip_topk_offset", 2)
        values["indexer_types"] = [{"F": "full", "S": "shared"}.get(x, x) for x in pattern] if pattern else \
            ["shared" if max(i - offset + 1, 0) % frequency else "full" for i in range(values["num_hidden_layers"])]
    config = Config(**{k: v for k, v in values.items() if k in known}, other={k: v for k, v in values.items() if k not in {*known, *REWRITTEN}})
    try:
        return config.check()
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def published_config(config, dtype):
    """-> dict for config.json, of the family whose class in transformers computes what the model does.

    An indexer makes deepseek_v3 a deepseek_v32, and without one a deepseek_v32 is a deepseek_v3. No published family has an indexer without a q
    latent, or on deepseek_v2: those keep their own, and other programs open them as the dense model that they were."""
    values, family, layers = asdict(config), config.model_type, config.num_hidden_layers
    if family != "deepseek_v2" and not (config.index_topk and config.q_lora_rank):
        family = "deepseek_v3"
    elif family != "deepseek_v2":
        family = "glm_moe_dsa" if config.indexer_rope_interleave or config.indexer_types else "deepseek_v32"
    types = ["sparse" if config.has_experts(i) else "dense" for i in range(layers)]
    values |= dict(model_type=family, architectures=[CLASSES[family]], torch_dtype=str(dtype).removeprefix("torch."), q_lora_rank=config.q_lora_rank or None,
                   num_key_value_heads=config.num_attention_heads, first_k_dense_replace=(*types, "sparse").index("sparse"), hidden_act="silu",
                   num_nextn_predict_layers=0, scoring_func="softmax" if family == "deepseek_v2" else "sigmoid")
    other = dict(bos_token_id=None, eos_token_id=None) | (values.pop("other") or {})
    values["mlp_layer_types"] = types if family in ("deepseek_v32", "glm_moe_dsa") else None
    if not config.index_topk:
        values = {k: v for k, v in values.items() if not k.startswith("index")}
    return other | {k: v for k, v in values.items() if v is not None or k in ("q_lora_rank", "rope_scaling")}


# ---- weights ----

def open_tensors(folder):
    """-> {tensor name: (open memory-mapped file, its path)} of a folder's safetensors files, after a look at every header."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.is_file() and not index.is_file():
        raise FileNotFoundError(f"{single}: no such file, and no {index.name} either; weights in other formats are not read")
    weight_map = {} if single.is_file() else read_json(index).get("weight_map", {})
    tensors = {}
    for path in [folder / name for name in sorted(set(weight_map.values()))] or [single]:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but {index.name} lists it; the checkpoint is incomplete, copy this shard")
        try:
            file = safe_open(path, "pt")
            tensors |= {name: (file, path) for name in file.keys()}
        except SafetensorError as error:
            raise ValueError(f"{path}: truncated or no safetensors file ({error}); copy it again") from None
    for name in weight_map:
        if name not in tensors:
            raise ValueError(f"{folder / weight_map[name]}: {name} is missing, but {index.name} lists it; copy this shard again")
    return tensors


def sources(name, shape, available):
    """The published tensors that make up our tensor `name` -> [(name, shape, place in ours)]: itself, or those of a stack's experts."""
    parent, _, kind = name.rpartition(".")
    if name in available or not parent.endswith(".experts"):
        return [(name, tuple(shape), ...)]
    experts, rows, columns = shape
    parts = (("gate_proj", slice(0, rows // 2)), ("up_proj", slice(rows // 2, rows))) if kind == "gate_up_proj" else (("down_proj", slice(0, rows)),)
    return [(f"{parent}.{e}.{part}.weight", (place.stop - place.start, columns), (e, place)) for e in range(experts) for part, place in parts]


def dequantise(values, scale, block, dtype):
    """values (out,in) e4m3, scale (ceil(out / block[0]), ceil(in / block[1])): one factor per block -> (out,in) in dtype."""
    (rows, columns), scale = values.shape, scale.float().to(values.device)
    scale = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return (values.float() * scale).to(dtype)


def read_weights(folder, model, device, dtype=None, new_indexers=False):
    """Give model (on the meta device) the folder's tensors on `device`, as stored or in `dtype` (but for correction bias and weights_proj);
    FP8 weights become bf16 or `dtype`.

    new_indexers: indexers start from random float32 weights, whatever the folder has. Names and shapes are checked before any tensor is read. Tensors of layers
    beyond num_hidden_layers (multi-token prediction) are left alone."""
    folder, config = locate(folder), model.config
    tensors, path = open_tensors(folder), folder / "config.json"
    block = read_json(path).get("quantization_config", {}).get("weight_block_size") or (128, 128)
    wanted = {name: p for name, p in model.state_dict().items() if not (name == "lm_head.weight" and config.tie_word_embeddings)}
    fresh = {name for name in wanted if new_indexers and ".indexer." in name}
    plan = {name: sources(name, p.shape, tensors) for name, p in wanted.items() if name not in fresh}

    expected = {source: shape for parts in plan.values() for source, shape, _ in parts}
    for source, shape in list(expected.items()):
        if source not in tensors:
            raise ValueError(f"{folder}: tensor {source} is missing, config.json asks for it; weights and config belong to different models")
        file, file_path = tensors[source]
        found = file.get_slice(source)
        if tuple(found.get_shape()) != shape:
            raise ValueError(f"{file_path}: {source} is of shape {tuple(found.get_shape())}, config.json asks for {shape}; weights and config belong to different models")
        if found.get_dtype() == "F8_E4M3":
            scale = source + "_scale_inv"
            grid = tuple(-(-n // b) for n, b in zip(shape, block))
            if scale not in tensors or tuple(tensors[scale][0].get_slice(scale).get_shape()) != grid:
                raise ValueError(f"{file_path}: {source} is FP8, its {scale} is missing or not of shape {grid}; use a checkpoint with FP8 blocks of {tuple(block)} or in bf16")
            expected[scale] = grid
    for name in sorted(tensors.keys() - expected.keys()):
        layer = name.removeprefix("model.layers.").split(".")[0]
        beyond = layer.isdecimal() and (int(layer) >= config.num_hidden_layers or (".indexer." in name and (new_indexers or not config.has_indexer(int(layer)))))
        if not (beyond or name.endswith("rotary_emb.inv_freq") or name == "lm_head.weight"):
            raise ValueError(f"{tensors[name][1]}: tensor {name} has no place in the model that config.json describes; this variant is not supported")

    def read(source, keep):
        x = tensors[source][0].get_tensor(source).to(device)
        if x.dtype == torch.float8_e4m3fn:
            return dequantise(x, tensors[source + "_scale_inv"][0].get_tensor(source + "_scale_inv"), block, dtype or torch.bfloat16)
        return x if keep or dtype is None else x.to(dtype)

    state = {}
    for name, parts in plan.items():
        for source, _, place in parts:
            x = read(source, keep=name.endswith(("e_score_correction_bias", "weights_proj.weight")))  # rounding them would change choices
            if place is ...:
                state[name] = x
                continue
            if name not in state:
                state[name] = torch.empty(wanted[name].shape, dtype=x.dtype, device=device)
            state[name][place] = x
    for name in fresh:
        x = torch.zeros(wanted[name].shape, device=device)
        state[name] = x if name.endswith("bias") else x.fill_(1) if "k_norm" in name else x.normal_(std=config.initializer_range)
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:  # one parameter again, not two that share memory
        model.lm_head.weight = model.model.embed_tokens.weight


def published_tensors(model):
    """Yield (published name, tensor): the model's own, with stacks of experts taken apart and without a tied lm_head."""
    for name, x in model.state_dict().items():
        if name.rpartition(".")[0].endswith(".experts"):
            for source, _, place in sources(name, x.shape, ()):
                yield source, x[place]
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield name, x


def write(folder, model, tokenizer=None):
    """Write a checkpoint folder; tokenizer: see `save_tokenizer`. It appears whole or not at all: it is written beside its place as .part, and
    what was there is put aside as .old, where `locate` finds it, until the new one has its name."""
    folder = Path(os.path.abspath(folder))
    part, aside = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".old")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    shards, size = [{}], 0
    for name, x in published_tensors(model):
        size += x.numel() * x.element_size()
        if size > SHARD_BYTES and shards[-1]:
            shards, size = [*shards, {}], x.numel() * x.element_size()
        shards[-1][name] = x
    names = ["model.safetensors"] if len(shards) == 1 else [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    for name, shard in zip(names, shards):
        save_file({k: x.detach().cpu().contiguous() for k, x in shard.items()}, part / name, metadata={"format": "pt"})
    if len(shards) > 1:
        total = sum(x.numel() * x.element_size() for shard in shards for x in shard.values())
        index = dict(metadata=dict(total_size=total), weight_map={k: name for name, shard in zip(names, shards) for k in shard})
        (part / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    (part / "config.json").write_text(json.dumps(published_config(model.config, model.lm_head.weight.dtype), indent=2) + "\n")
    if tokenizer:
        save_tokenizer(part, tokenizer)
    if folder.exists():
        shutil.rmtree(aside, ignore_errors=True)
        os.replace(folder, aside)
    os.replace(part, folder)
    shutil.rmtree(aside, ignore_errors=True)
