"""Checkpoint folders in the layout of the published models: config.json, safetensors in one file or in
shards, tokenizer files.

Families: deepseek_v2 (V2-Lite), deepseek_v3 (V3, V3.1, Moonlight), deepseek_v32, glm_moe_dsa (GLM-5), and
those that are deepseek_v3 by another name (SAME). Tensors go from the memory-mapped files straight to where
they stay: on the CPU they remain mapped, on a GPU each is copied once, those of experts into their place in a
stack. FP8 weights are dequantised on the way. Nothing in a folder can execute code. What we would compute
otherwise than its publishers is refused by name, and so is a tensor that the model does not account for.
"""
import errno
import functools
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from config import Config, check_yarn
from support.files import locate, read_json, whole_folder, write_json
from support.tokenizer import save_tokenizer, token_ids

SHARD_BYTES = 5 * 10**9
COMPARED_ROWS = 4096  # of two tensors, held at a time

# ---- config.json ----

CLASSES = dict(
    deepseek_v2="DeepseekV2ForCausalLM",
    deepseek_v3="DeepseekV3ForCausalLM",
    deepseek_v32="DeepseekV32ForCausalLM",
    glm_moe_dsa="GlmMoeDsaForCausalLM")  # model_type -> class in transformers
# Families that compute what deepseek_v3 does, and are saved as such: Kimi K2; GLM-4.7-Flash; Youtu-LLM, which
# has no experts
SAME = dict(kimi_k2="deepseek_v3", glm4_moe_lite="deepseek_v3", youtu="deepseek_v3")
# The norms of the two latents take no eps from config.json: it is 1e-6 in every family, as in DeepSeek's own
# code and in transformers 5.17. Published GLM-5 configs say rms_norm_eps=1e-5, which vLLM and SGLang use for
# the latents, too; we follow the implementation that our logits are tested against.

REQUIRED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
    "max_position_embeddings", "rms_norm_eps")
REQUIRED_WITH_EXPERTS = (
    "num_experts_per_tok", "n_shared_experts", "moe_intermediate_size", "routed_scaling_factor",
    "first_k_dense_replace")
REQUIRED_WITH_INDEXER = ("index_topk", "index_n_heads", "index_head_dim")
PATTERN = ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset")  # what indexer_types says, too

FIELDS = {f.name: f.type for f in fields(Config) if f.name != "other"}
# What else is read, and what it must be
TYPES = FIELDS | dict(
    hidden_act=str, scoring_func=str, mlp_bias=bool, rope_interleave=bool, moe_layer_freq=int,
    num_key_value_heads=int, num_nextn_predict_layers=int, index_topk_freq=int, index_skip_topk_offset=int,
    index_topk_pattern=str | list, partial_rotary_factor=float, rope_parameters=dict,
    quantization_config=dict)
ROPE_TYPES = dict(
    type=str, rope_type=str, rope_theta=float, factor=float, original_max_position_embeddings=int,
    beta_fast=float, beta_slow=float, mscale=float, mscale_all_dim=float, attention_factor=float,
    truncate=bool, partial_rotary_factor=float)
QUANTISATION_TYPES = dict(quant_method=str, fmt=str, scale_fmt=str, weight_block_size=list)
USUAL_RANGE = 0.02  # of new weights beside published ones, where a config.json does not say
REWRITTEN = {  # keys that `write` drops or derives anew
    "architectures", "auto_map", "quantization_config", "dtype", "torch_dtype", "transformers_version",
    "rope_parameters", "num_key_value_heads", "scoring_func", "partial_rotary_factor"}


def read_config(folder):
    """The Config of a checkpoint folder, in the hub's form (rope_theta, rope_scaling) or that of transformers
    5 (rope_parameters).

    Keys that change nothing here are kept in Config.other. FileNotFoundError, ValueError: one line naming
    file, key and value."""
    path = locate(folder) / "config.json"
    values = read_json(path)
    try:
        return config_of(values)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def config_of(values):
    """dict of a config.json -> Config. ValueError: one line naming key and value."""
    family = family_of(values)
    check_types(values, TYPES)
    token_ids(values, "eos_token_id")
    null_means_none = ("q_lora_rank", "n_shared_experts", "n_routed_experts")
    none = {key: 0 for key in null_means_none if key in values and values[key] is None}
    values = {key: value for key, value in values.items() if value is not None} | none
    require(values, REQUIRED, "a published config.json states it")
    check_supported(values, family)
    check_quantisation(values)

    read = dict(model_type=family, initializer_range=values.get("initializer_range", USUAL_RANGE))
    read |= read_rope(values)
    read |= read_experts(values, family)
    read |= read_indexer(values, family)
    plain = {key: value for key, value in values.items() if key in FIELDS.keys() - {"rope_scaling"}}
    other = {key: value for key, value in values.items() if key not in FIELDS.keys() | REWRITTEN}
    return Config(**(plain | read), other=other).check()


def family_of(values):
    """The family among CLASSES that computes what model_type does."""
    family = values.get("model_type")
    if not isinstance(family, str) or family not in CLASSES.keys() | SAME.keys():
        raise ValueError(f"model_type={family!r} is not supported; these are: {', '.join(CLASSES | SAME)}")
    return SAME.get(family, family)


def refuse(key, value, supported):
    """Raise the ValueError of a key with a value that does not run here."""
    raise ValueError(f"{key}={value!r} is not supported, only {supported}")


def require(values, keys, why):
    """ValueError, naming the first, if one of the keys is not in the dict."""
    for key in keys:
        if key not in values:
            raise ValueError(f"{key} is missing; {why}")


def check_types(values, types, inside=""):
    """ValueError: a value of another type than `types` says. null passes, an int passes for a float, a bool
    for neither."""
    for key, kind in types.items():
        value = values.get(key)
        if value is None:
            continue
        kinds = (int, float) if kind is float else kind
        if not isinstance(value, kinds) or (isinstance(value, bool) and kind is not bool):
            refuse(inside + key, value, str(getattr(kind, "__name__", kind)).removesuffix(" | None"))


def check_supported(values, family):
    """ValueError: a value that asks for another model than ours."""
    supported = dict(
        hidden_act="silu",
        mlp_bias=False,
        moe_layer_freq=1,
        rope_interleave=True,
        partial_rotary_factor=1,
        scoring_func="softmax" if family == "deepseek_v2" else "sigmoid")
    for key, only in supported.items():
        if values.get(key, only) != only:
            refuse(key, values[key], only)
    heads = values["num_attention_heads"]
    if values.get("num_key_value_heads", heads) != heads:
        refuse("num_key_value_heads", values["num_key_value_heads"], f"num_attention_heads={heads} of them")
    if values.get("num_nextn_predict_layers", 0) < 0:
        refuse("num_nextn_predict_layers", values["num_nextn_predict_layers"], "a count")


def check_quantisation(values):
    """ValueError: quantization_config describes another format than e4m3 in blocks with a scale each."""
    quantisation = values.get("quantization_config", {})
    inside = "quantization_config."
    check_types(quantisation, QUANTISATION_TYPES, inside)
    for key, only in dict(quant_method="fp8", fmt="e4m3", scale_fmt="ue8m0").items():
        if quantisation.get(key) not in (None, only):
            refuse(inside + key, quantisation[key], only)
    block = quantisation.get("weight_block_size")
    if block is not None and not (len(block) == 2 and all(type(n) is int and n > 0 for n in block)):
        refuse(inside + "weight_block_size", block, "a list of two sizes, such as [128, 128]")


def read_rope(values):
    """-> rope_theta and rope_scaling of Config. The hub writes both, transformers 5 puts them into
    rope_parameters; a file that has both forms must say the same twice."""
    forms = {}
    thetas = {"rope_theta": values["rope_theta"]} if "rope_theta" in values else {}
    for key in ("rope_scaling", "rope_parameters"):
        if values.get(key):
            forms[key], theta = rope_form(key, values[key])
            if theta is not None:
                thetas[f"{key}.rope_theta"] = theta
    for found in (forms, thetas):
        if any(value != next(iter(found.values())) for value in found.values()):
            both = " and ".join(f"{key}={value}" for key, value in found.items())
            raise ValueError(f"{both} contradict each other; leave one of them out")

    theta = float(next(iter(thetas.values()), 10000.0))
    yarn = dict(next(iter(forms.values()), {}))
    if yarn.get("rope_type", "default") == "default":
        return dict(rope_theta=theta, rope_scaling=None)
    yarn.setdefault("original_max_position_embeddings", values["max_position_embeddings"])
    if yarn["original_max_position_embeddings"] > 0:
        ratio = values["max_position_embeddings"] / yarn["original_max_position_embeddings"]
        yarn.setdefault("factor", ratio)
    check_yarn(next(iter(forms)), yarn, theta)
    return dict(rope_theta=theta, rope_scaling=yarn)


def rope_form(name, form):
    """One of the two forms -> it without nulls, its type under the key rope_type, and its rope_theta or
    None."""
    check_types(form, ROPE_TYPES, name + ".")
    unknown = sorted(form.keys() - ROPE_TYPES.keys())
    if unknown:
        refuse(name, form, f"the keys {', '.join(ROPE_TYPES)}")
    form = {key: value for key, value in form.items() if value is not None}
    part = form.pop("partial_rotary_factor", 1)
    if part != 1:
        refuse(f"{name}.partial_rotary_factor", part, "1")
    theta = form.pop("rope_theta", None)
    kinds = {key: form.pop(key) for key in ("rope_type", "type") if key in form}
    for key, kind in kinds.items():
        if kind not in ("default", "yarn"):
            refuse(f"{name}.{key}", kind, "default or yarn")
    if len(set(kinds.values())) > 1:
        refuse(name, kinds, "one of the two")
    kind = next(iter(kinds.values()), "default")
    if kind == "default" and form:
        refuse(name, form, "rope_theta beside type default")
    return dict(rope_type=kind, **form), theta


def read_experts(values, family):
    """-> the keys of Config about experts that config.json leaves to the family."""
    v2 = family == "deepseek_v2"
    read = dict(n_routed_experts=0, topk_method="greedy" if v2 else "noaux_tc", norm_topk_prob=not v2)
    read = {key: values.get(key, value) for key, value in read.items()}
    types = values.get("mlp_layer_types")
    if types is not None:
        layers = values["num_hidden_layers"]
        if len(types) != layers or any(kind not in ("dense", "sparse") for kind in types):
            refuse("mlp_layer_types", types, f"dense or sparse for each of num_hidden_layers={layers}")
        dense_first = (*types, "sparse").index("sparse")
        read["first_k_dense_replace"] = values.get("first_k_dense_replace", dense_first)
        if family in ("deepseek_v2", "deepseek_v3"):
            # other programs read the number and not the list, in these families
            said = min(read["first_k_dense_replace"], layers)
            if types != ["dense"] * said + ["sparse"] * (layers - said):
                refuse("mlp_layer_types", types, f"what first_k_dense_replace={said} says, in this family")
    if read["n_routed_experts"]:
        groups = ("n_group", "topk_group") if read["topk_method"] != "greedy" else ()
        require(values | read, REQUIRED_WITH_EXPERTS + groups, "a model with n_routed_experts needs it")
    return read


def read_indexer(values, family):
    """-> the keys of Config about indexers that config.json leaves to the family."""
    glm = family == "glm_moe_dsa"
    if glm or family == "deepseek_v32" or values.get("index_topk"):
        require(values, REQUIRED_WITH_INDEXER, f"{family} has an indexer")
    read = dict(index_topk=0, indexer_rope_interleave=glm)
    read = {key: values.get(key, value) for key, value in read.items()}
    pattern = values.get("index_topk_pattern")
    frequency = max(values.get("index_topk_freq", 1), 1)
    if not glm:
        if pattern is not None or frequency > 1:
            name = "index_topk_freq" if pattern is None else "index_topk_pattern"
            refuse(name, values[name], "an indexer in every layer, or indexer_types, in this family")
        return read
    types = []
    if pattern is not None:
        types = [dict(F="full", S="shared").get(str(kind), kind) for kind in pattern]
    else:
        offset = values.get("index_skip_topk_offset", 2)
        for layer in range(values["num_hidden_layers"]):
            shared = max(layer - offset + 1, 0) % frequency
            types.append("shared" if shared else "full")
    said = "indexer_types" in values
    if said and types != values["indexer_types"] and (pattern is not None or frequency > 1):
        raise ValueError(f"indexer_types={values['indexer_types']} contradicts index_topk_pattern={pattern}, "
                         f"index_topk_freq={frequency}; leave all but one of them out")
    read["indexer_types"] = values["indexer_types"] if said else types
    return read


def sharing(config, indexer_types):
    """-> the Config with these indexer_types, without the other keys that say which layers share."""
    other = {key: value for key, value in (config.other or {}).items() if key not in PATTERN}
    return replace(config, indexer_types=indexer_types, other=other)


def published_config(config, dtype):
    """-> dict for config.json, of the family whose class in transformers computes what the model does.

    An indexer makes deepseek_v3 a deepseek_v32, and without one a deepseek_v32 is a deepseek_v3. No published
    family has an indexer without a q latent, or on deepseek_v2: those keep their own, and other programs open
    them as the dense model that they were."""
    layers = config.num_hidden_layers
    family = config.model_type
    if family != "deepseek_v2":
        family = "deepseek_v3"
        if config.index_topk and config.q_lora_rank:
            glm = config.indexer_rope_interleave or config.indexer_types
            family = "glm_moe_dsa" if glm else "deepseek_v32"
    types = ["sparse" if config.has_experts(layer) else "dense" for layer in range(layers)]
    values = asdict(config)
    other = dict(bos_token_id=None, eos_token_id=None) | (values.pop("other") or {})
    values |= dict(
        model_type=family,
        architectures=[CLASSES[family]],
        torch_dtype=str(dtype).removeprefix("torch."),
        q_lora_rank=config.q_lora_rank or None,
        num_key_value_heads=config.num_attention_heads,
        first_k_dense_replace=(*types, "sparse").index("sparse"),
        mlp_layer_types=types if family in ("deepseek_v32", "glm_moe_dsa") else None,
        hidden_act="silu",
        scoring_func="softmax" if family == "deepseek_v2" else "sigmoid",
        num_nextn_predict_layers=0)
    null = ("q_lora_rank", "rope_scaling")
    values = other | {key: value for key, value in values.items() if value is not None or key in null}
    if not config.index_topk:
        values = {key: value for key, value in values.items() if not key.startswith("index")}
    if not config.index_block:  # then no published family needs to know of it
        for key in ("index_block", "index_candidates", "index_exact_layers"):
            values.pop(key, None)
    if config.selector == "indexer":
        values.pop("selector")
    return values


# ---- tensors in files ----

PLAIN = ("BF16", "F16", "F32")  # dtypes, as safetensors calls them, whose values are the weights
SCALES = ("F32", "BF16", "F8_E8M0", "U8")  # of the scales beside F8_E4M3; U8 holds the bits of F8_E8M0
TORCH = dict(BF16=torch.bfloat16, F16=torch.float16, F32=torch.float32)
# What the multi-token prediction layers of these families hold: a block, and their own five
BLOCK = ("self_attn.", "mlp.", "input_layernorm.", "post_attention_layernorm.")
PREDICTION = ("embed_tokens.", "enorm.", "hnorm.", "eh_proj.", "shared_head.")


class Stored(NamedTuple):
    """A tensor in an open, memory-mapped safetensors file."""
    name: str
    path: Path
    file: Any

    @property
    def shape(self):
        """Its dimensions; nothing is read."""
        return tuple(self.file.get_slice(self.name).get_shape())

    @property
    def dtype(self):
        """As safetensors calls it, such as F8_E4M3."""
        return self.file.get_slice(self.name).get_dtype()

    def rows(self, start, stop):
        """Read a slice of its first dimension."""
        return self.file.get_slice(self.name)[start:stop]

    def read(self):
        """Read all of it."""
        return self.file.get_tensor(self.name)


def weight_files(folder):
    """-> paths of a folder's safetensors files, and {tensor name: file name} of its index, {} without one."""
    single = folder / "model.safetensors"
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        if not single.is_file():
            raise FileNotFoundError(f"{single}: no such file, and no {index.name} either; weights in other "
                                    "formats are not read")
        return [single], {}
    weight_map = read_json(index).get("weight_map")
    named = isinstance(weight_map, dict) and all(isinstance(name, str) for name in weight_map.values())
    if not named or not weight_map or any(name != Path(name).name for name in weight_map.values()):
        raise ValueError(f"{index}: weight_map={str(weight_map)[:60]} does not name a file of this folder "
                         "for each tensor; copy it again")
    names = sorted(set(weight_map.values()))
    if single.is_file() and names != [single.name]:
        raise ValueError(f"{single}: stands beside {index.name}, which lists other files; remove the one "
                         "that is not of this model")
    return [folder / name for name in names], weight_map


def open_tensors(folder):
    """-> {tensor name: Stored} of a folder's safetensors files, after a look at every header."""
    paths, weight_map = weight_files(folder)
    try:
        str(folder).encode()
    except UnicodeEncodeError:
        raise ValueError(f"{folder}: the folder's name is no UTF-8, and safetensors opens no file in it; "
                         "rename the folder") from None
    tensors = {}
    for path in paths:
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file, but the index lists it; the checkpoint is "
                                    "incomplete, copy this shard")
        try:
            file = safe_open(path, "pt")
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{path}: truncated or no safetensors file ({error}); copy it again") from None
        for name in file.keys():
            if name in tensors:
                raise ValueError(f"{path}: {name} is in {tensors[name].path.name}, too; remove the file that "
                                 "is not of this model")
            tensors[name] = Stored(name, path, file)
    for name, file_name in weight_map.items():
        if name not in tensors:
            raise ValueError(f"{folder / file_name}: {name} is missing, but the index lists it; copy this "
                             "shard again")
    return tensors


def sources(name, shape, available):
    """The published tensors that make up our tensor `name` -> [(name, shape, place in ours)]: itself, or
    those of a stack's experts."""
    parent, _, kind = name.rpartition(".")
    if name in available or not parent.endswith(".experts"):
        return [(name, tuple(shape), ...)]
    experts, rows, columns = shape
    halves = (("gate_proj", slice(0, rows // 2)), ("up_proj", slice(rows // 2, rows)))
    parts = halves if kind == "gate_up_proj" else (("down_proj", slice(0, rows)),)
    found = []
    for expert in range(experts):
        for part, place in parts:
            size = (place.stop - place.start, columns)
            found.append((f"{parent}.{expert}.{part}.weight", size, (expert, place)))
    return found


def dequantise(values, scale, block, dtype, start=0):
    """values (rows,in) e4m3, the rows from `start` on of a matrix (out,in), scale (ceil(out / block[0]),
    ceil(in / block[1])): one factor per block
    -> (rows,in) in dtype. A scale of type e8m0, or its bits as uint8, is the power of two 2^(bits - 127), NaN
    for 255 (OCP Microscaling formats, section 5.4.1)."""
    rows, columns = values.shape
    if scale.dtype == torch.uint8:
        scale = scale.view(torch.float8_e8m0fnu)
    scale = scale.float().to(values.device)
    scale = scale.repeat_interleave(block[0], 0)[start:start + rows]  # (rows, in / block)
    scale = scale.repeat_interleave(block[1], 1)[:, :columns]  # (rows, in)
    return (values.float() * scale).to(dtype)


# ---- what is there is what the model asks for ----

def check_source(name, shape, tensors, block):
    """ValueError unless this tensor is stored in this shape and in a format that we know -> the names that it
    takes up: its own, and that of its scales."""
    stored = tensors[name]
    if stored.shape != shape:
        raise ValueError(f"{stored.path}: {name} is of shape {stored.shape}, config.json asks for {shape}; "
                         "weights and config belong to different models")
    if stored.dtype in PLAIN:
        return [name]
    if stored.dtype != "F8_E4M3" or len(shape) != 2:
        raise ValueError(f"{stored.path}: {name} is of type {stored.dtype} and shape {shape}; supported are "
                         f"{', '.join(PLAIN)}, and F8_E4M3 matrices with scales per block")
    scale = name + "_scale_inv"
    grid = tuple(-(-n // b) for n, b in zip(shape, block))
    if scale not in tensors or tensors[scale].shape != grid:
        raise ValueError(f"{stored.path}: {name} is FP8, its {scale} is missing or not of shape {grid}; use "
                         f"a checkpoint with FP8 blocks of {tuple(block)} or in bf16")
    if tensors[scale].dtype not in SCALES:
        raise ValueError(f"{tensors[scale].path}: {scale} is of type {tensors[scale].dtype}; scales of type "
                         f"{', '.join(SCALES)} are supported")
    return [name, scale]


def equal(a, b):
    """Do two Stored tensors hold the same numbers? Some rows at a time."""
    if a.shape != b.shape:
        return False
    for start in range(0, a.shape[0], COMPARED_ROWS):
        rows = (start, start + COMPARED_ROWS)
        if not torch.equal(a.rows(*rows).float(), b.rows(*rows).float()):
            return False
    return True


def same_frequencies(stored, config):
    """Are these the RoPE frequencies without YaRN, but for a rounding to bf16? Early conversions store
    them."""
    dim = config.qk_rope_head_dim
    ours = config.rope_theta ** -(torch.arange(0, dim, 2, dtype=torch.float32) / dim)  # (dim / 2,)
    if config.rope_scaling or stored.shape != tuple(ours.shape):
        return False
    return torch.allclose(stored.read().float(), ours, rtol=2**-8, atol=0)


def place_of(name):
    """A tensor's name -> number of its layer and its name in it; -1 and the name outside the layers."""
    number, _, inside = name.removeprefix("model.layers.").partition(".")
    if name.startswith("model.layers.") and number.isdecimal():
        return int(number), inside
    return -1, name


def check_leftovers(folder, tensors, used, config, values, new_indexers):
    """ValueError for a tensor that is stored and not `used`, by name, unless config.json accounts for it;
    what it leaves out on purpose is said in a line.

    Accounted for are the layers of multi-token prediction, an output head that equals the embedding it is
    tied to, RoPE frequencies that are ours, and the indexers of layers that select as the one before
    (training-free sharing on a checkpoint that has an indexer everywhere), or that are made anew."""
    layers = config.num_hidden_layers
    extra = values.get("num_nextn_predict_layers") or 0
    beyond = set()  # layers behind the last, and those of them that predict
    predicting = set()
    idle = set()  # layers whose stored indexer is not asked for
    for name in sorted(tensors.keys() - used):
        stored = tensors[name]
        layer, inside = place_of(name)
        if layer >= layers + extra:
            raise ValueError(f"{stored.path}: tensor {name} is of layer {layer}, and config.json has "
                             f"num_hidden_layers={layers} and num_nextn_predict_layers={extra}; to leave "
                             "layers out on purpose, count them in num_nextn_predict_layers")
        if layer >= layers and inside.startswith(PREDICTION + BLOCK):
            beyond.add(layer)
            if inside.startswith(PREDICTION):
                predicting.add(layer)
            continue
        if 0 <= layer < layers and inside.startswith("self_attn.indexer."):
            if new_indexers:
                continue
            if values.get("index_topk") is not None and not config.has_indexer(layer):
                idle.add(layer)
                continue
        if name.endswith("rotary_emb.inv_freq") and same_frequencies(stored, config):
            continue
        if name == "lm_head.weight":  # left over only if tied
            if equal(stored, tensors["model.embed_tokens.weight"]):
                continue
            raise ValueError(f"{stored.path}: {name} differs from model.embed_tokens.weight, and config.json "
                             "has tie_word_embeddings=true; set it to false to use both")
        raise ValueError(f"{stored.path}: tensor {name} has no place in the model that config.json "
                         "describes; this variant is not supported")

    if beyond - predicting:
        print(f"{folder}: layers {sorted(beyond - predicting)} are left out: config.json counts them in "
              f"num_nextn_predict_layers={extra}, but they predict nothing", file=sys.stderr)
    if idle:
        print(f"{folder}: the indexers of layers {sorted(idle)} are left out: the model has none there",
              file=sys.stderr)


def own_rows(p):
    """-> start, stop: the rows of a parameter that this process has, all unless it is sharded. Sharded like
    torch.chunk: equal parts, the last ones shorter or empty."""
    if not hasattr(p, "device_mesh"):
        return 0, len(p)
    step = -(-len(p) // p.device_mesh.size())
    start = min(len(p), p.device_mesh.get_local_rank() * step)
    return start, min(len(p), start + step)


def sharded_like(rows, p):
    """This process's rows of a parameter -> what takes its place."""
    if not hasattr(p, "device_mesh"):
        return rows
    from torch.distributed.tensor import DTensor  # takes a second to import
    return DTensor.from_local(
        rows.contiguous(), p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def read_weights(folder, model, device, dtype=None, new_indexers=False, prepare=None):
    """Give model (on the meta device) the folder's tensors on `device`, as stored or in `dtype` (but for
    correction bias and weights_proj); FP8 weights become bf16 or `dtype`.

    new_indexers: indexers start from random float32 weights, whatever the folder has. prepare: see
    Transformer.from_pretrained; of a parameter that it shards each process reads its rows alone. Names,
    shapes and types are checked before any tensor is read. ValueError, FileNotFoundError: one line naming
    file and tensor."""
    folder = locate(folder)
    config = model.config
    values = read_json(folder / "config.json")
    tensors = open_tensors(folder)
    block = (values.get("quantization_config") or {}).get("weight_block_size") or (128, 128)

    # which stored tensors make up each of ours
    wanted = dict(model.state_dict())
    if config.tie_word_embeddings:
        del wanted["lm_head.weight"]
    fresh = [name for name in wanted if new_indexers and ".indexer." in name]
    plan = {name: sources(name, p.shape, tensors) for name, p in wanted.items() if name not in fresh}

    # all there, in a format that we know, and nothing else
    used = set()
    for parts in plan.values():
        for source, shape, _ in parts:
            if source not in tensors:
                raise ValueError(f"{folder}: tensor {source} is missing, config.json asks for it; weights "
                                 "and config belong to different models")
            used.update(check_source(source, shape, tensors, block))
    check_leftovers(folder, tensors, used, config, values, new_indexers)

    # what each is read as; rounding correction biases and weights_proj would change choices
    dtypes = dict.fromkeys(fresh, torch.float32)
    for name, parts in plan.items():
        keep = dtype is None or name.endswith(("e_score_correction_bias", "weights_proj.weight"))
        found = [TORCH.get(tensors[source].dtype, dtype or torch.bfloat16) for source, _, _ in parts]
        dtypes[name] = functools.reduce(torch.promote_types, found) if keep else dtype
    for name, p in model.named_parameters():
        p.data = p.data.to(dtypes[name])
    if prepare is not None:
        prepare(model)
        wanted = dict(model.state_dict())
        dtypes |= {name: p.dtype for name, p in model.named_parameters()}

    def read(source, start, stop):
        """Some rows of a stored tensor, on the device; FP8 in the widest dtype that it may be wanted in."""
        stored = tensors[source]
        x = stored.read() if (start, stop) == (0, stored.shape[0]) else stored.rows(start, stop)
        x = x.to(device)
        if x.dtype == torch.float8_e4m3fn:
            x = dequantise(x, tensors[source + "_scale_inv"].read(), block, dtype or torch.bfloat16, start)
        return x

    state = {}
    for name, parts in plan.items():
        start, stop = own_rows(wanted[name])
        source, _, place = parts[0]
        if place is ...:
            rows = read(source, start, stop).to(dtypes[name])
        else:  # a stack of experts
            rows = torch.empty((stop - start, *wanted[name].shape[1:]), dtype=dtypes[name], device=device)
            for source, shape, (expert, place) in parts:
                if start <= expert < stop:
                    rows[expert - start, place] = read(source, 0, shape[0])
        state[name] = sharded_like(rows, wanted[name])
    for name in fresh:
        x = torch.zeros(wanted[name].shape, device=device)
        if "k_norm.weight" in name:
            x.fill_(1)
        elif not name.endswith("bias"):
            x.normal_(std=config.initializer_range)
        start, stop = own_rows(wanted[name])
        state[name] = sharded_like(x[start:stop], wanted[name])
    model.load_state_dict(state, strict=False, assign=True)
    if config.tie_word_embeddings:  # one parameter again, not two that share memory
        model.lm_head.weight = model.model.embed_tokens.weight


# ---- writing ----

def published_tensors(model):
    """Yield (published name, tensor): the model's own, with stacks of experts taken apart and without a tied
    lm_head."""
    for name, x in model.state_dict().items():
        if name.rpartition(".")[0].endswith(".experts"):
            for source, _, place in sources(name, x.shape, ()):
                yield source, x[place]
        elif name != "lm_head.weight" or not model.config.tie_word_embeddings:
            yield name, x


def nbytes(x):
    """Bytes of a tensor's numbers."""
    return x.numel() * x.element_size()


def write_tensors(folder, model):
    """model.safetensors, or shards of some SHARD_BYTES and their index."""
    shards = [{}]
    size = 0
    for name, x in published_tensors(model):
        size += nbytes(x)
        if size > SHARD_BYTES and shards[-1]:
            shards.append({})
            size = nbytes(x)
        shards[-1][name] = x
    count = len(shards)
    names = [f"model-{i:05d}-of-{count:05d}.safetensors" for i in range(1, count + 1)]
    if count == 1:
        names = ["model.safetensors"]
    weight_map = {}
    for file_name, shard in zip(names, shards):
        contents = {name: x.detach().cpu().contiguous() for name, x in shard.items()}
        try:
            save_file(contents, folder / file_name, metadata={"format": "pt"})
        except SafetensorError as error:  # a full disk, told by a library that knows no OSError
            raise OSError(errno.EIO, str(error)) from None
        weight_map |= dict.fromkeys(shard, file_name)
    if count > 1:
        total = sum(nbytes(x) for shard in shards for x in shard.values())
        index = dict(metadata=dict(total_size=total), weight_map=weight_map)
        write_json(folder / "model.safetensors.index.json", index)


def write(folder, model, tokenizer=None):
    """Write a checkpoint folder; tokenizer: see `save_tokenizer`. It appears whole or not at all, see
    files.whole_folder, which also says what is raised."""
    with whole_folder(folder) as part:
        write_tensors(part, model)
        write_json(part / "config.json", published_config(model.config, model.lm_head.weight.dtype))
        if tokenizer:
            save_tokenizer(part, tokenizer)
