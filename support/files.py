"""Files that change whole, and JSON with one-line errors."""
import json
import os
from pathlib import Path


def locate(folder):
    """The folder, or where `write` had put it aside when it was killed between two renames."""
    folder = Path(os.path.abspath(folder))
    aside = folder.with_name(folder.name + ".old")
    return aside if not folder.exists() and aside.exists() else folder


def read_json(path):
    """The object in a JSON file. FileNotFoundError, ValueError: one line naming it."""
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint is a folder with config.json and model.safetensors, such as out/sparse")
    try:
        values = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def run_options(folder):
    """The options in the run.json of a run's folder, by name; {} where there is none."""
    path = Path(folder) / "run.json"
    return read_json(path).get("options", {}) if path.is_file() else {}


def replace_text(path, text):
    """Write a file so that it is the old one or the new one, whenever the process dies."""
    part = path.with_name(path.name + ".part")
    part.write_text(text)
    os.replace(part, path)
