"""Checkpoint folders in the layout of the published models: config.json and model.safetensors. Nothing in them can execute code."""
import json
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file


def read_config(folder, Config):
    """The Config of a checkpoint folder. FileNotFoundError, ValueError: one line naming file, key and fix."""
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint is a folder with config.json and model.safetensors, such as out/sparse")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(values, dict) or values.get("model_type") != "deepseek_v32":
        raise ValueError(f"{path}: model_type={values.get('model_type') if isinstance(values, dict) else None} is not supported; deepseek_v32 is")
    known = {f.name for f in fields(Config)}
    return Config(**{k: v for k, v in values.items() if k in known})


def read_weights(folder, model, device):
    """Give model (on the meta device) the folder's tensors, each read straight to `device`."""
    path = Path(folder) / "model.safetensors"
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; the checkpoint is incomplete")
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            state = {name: file.get_tensor(name) for name in file.keys()}
    except SafetensorError as error:
        raise ValueError(f"{path}: truncated or no safetensors file ({error}); copy it again") from None
    if model.config.tie_word_embeddings:
        state["lm_head.weight"] = state.get("model.embed_tokens.weight")
    for name, p in model.state_dict().items():
        if state.get(name) is None or state[name].shape != p.shape:
            found = "missing" if state.get(name) is None else f"of shape {tuple(state[name].shape)}"
            raise ValueError(f"{path}: {name} is {found}, config.json asks for {tuple(p.shape)}; weights and config belong to different models")
    model.load_state_dict(state, assign=True)


def write(folder, config, model):
    """Write config.json and model.safetensors beside `folder` under another name, then rename: it appears whole or not at all."""
    folder = Path(folder)
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    (part / "config.json").write_text(json.dumps({"architectures": ["DeepseekV32ForCausalLM"], **config}, indent=2) + "\n")
    state = {k: v.detach().contiguous() for k, v in model.state_dict().items() if not (k == "lm_head.weight" and config["tie_word_embeddings"])}
    save_file(state, part / "model.safetensors", metadata={"format": "pt"})
    if folder.exists():
        shutil.rmtree(folder)
    os.replace(part, folder)
