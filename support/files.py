"""Text as it is, JSON with one-line errors, and files and folders that change whole.

One rule for text wherever it enters (corpora, prompts, standard input, config files): UTF-8, a byte order
mark in front is dropped, and nothing else is changed; CRLF stays CRLF.
"""
import json
import math
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path


# ---- reading ----

def text_of(content, name):
    """bytes -> str by the rule above. ValueError, naming `name`: no UTF-8."""
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{name}: no UTF-8 text ({error.reason} at byte {error.start:,}); "
                         "convert it to UTF-8") from None


def read_text(path):
    """The text of a file or pipe by the rule above. FileNotFoundError; ValueError: a folder, or no UTF-8."""
    path = Path(path)
    if path.is_dir():
        raise ValueError(f"{path}: is a folder; name a file")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file")
    return text_of(path.read_bytes(), path)


def finite(text):
    """A JSON number as float. ValueError: NaN, Infinity, or beyond what a float holds."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def whole(text):
    """A JSON number as int. ValueError: beyond 64 bits."""
    value = int(text)
    if not -2**63 <= value < 2**63:
        raise ValueError(f"a whole number of {len(text)} digits is beyond 64 bits")
    return value


def read_json(path):
    """The object in a JSON file. FileNotFoundError; ValueError: no JSON, no object, a number that is not
    finite or beyond 64 bits."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file; a checkpoint is a folder with config.json and "
                                "model.safetensors, such as out/sparse")
    try:
        text = text_of(path.read_bytes(), "content")
        values = json.loads(text, parse_int=whole, parse_float=finite, parse_constant=finite)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: no valid JSON ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: holds a {type(values).__name__}, not an object")
    return values


def check_option(path, name, value, kind, choices=None):
    """ValueError naming a run.json, an option in it and its value, if that is not of this type, or not one of
    the choices."""
    kinds = (int, float) if kind is float else kind
    typed = isinstance(value, kinds) and (kind is bool or not isinstance(value, bool))
    if not typed or (choices and value not in choices):
        wanted = f"one of {', '.join(choices)}" if choices else f"of type {kind.__name__}"
        raise ValueError(f"{path}: {name}={value!r} is not {wanted}; mend the file, or start the run anew "
                         "with --overwrite")


def run_options(folder, **kinds):
    """The options in the run.json of a run's folder, by name; {} where there is none. kinds: of those that
    the caller uses, their types. ValueError names file, key and value: no object, or not of its type."""
    path = Path(folder) / "run.json"
    options = read_json(path).get("options", {}) if path.is_file() else {}
    if not isinstance(options, dict):
        raise ValueError(f"{path}: options={options!r} is no object of options by name; start the run anew")
    for name, kind in kinds.items():
        if name in options:
            check_option(path, name, options[name], kind)
    return options


# ---- writing ----

def put_aside(folder):
    """Where `whole_folder` keeps the old folder while the new one takes its name. Hidden: a NAME.old is
    somebody's own copy."""
    return folder.with_name(f".{folder.name}.old")


def locate(folder):
    """The folder, or where `whole_folder` had put it aside when it was killed between two renames. A folder
    that is there keeps the name it was given."""
    folder = Path(os.path.abspath(folder))
    aside = put_aside(Path(os.path.realpath(folder)))
    return aside if not folder.exists() and aside.exists() else folder


def destination(folder):
    """The folder behind the links in this path, absolute; whether it exists does not matter. For looking
    ahead, before work begins.

    FileNotFoundError: a link leads nowhere. ValueError: it is a file, or has no name."""
    folder = Path(os.path.abspath(folder))
    for place in (folder, *folder.parents):
        if place.is_symlink() and not place.exists():
            raise FileNotFoundError(f"{place}: a link to {os.readlink(place)}, which does not exist; mount "
                                    "or make that folder, or remove the link")
        if place.exists() and not place.is_dir():
            raise ValueError(f"{place}: is a file; name a folder")
    real = Path(os.path.realpath(folder))
    if not real.name:
        raise ValueError(f"{folder}: cannot be replaced as a whole; name a folder in it")
    return real


def not_written(path, error):
    """What to raise for an OSError of the system, of which `path` has been spared."""
    return OSError(f"{path}: not written ({error.strerror or error}); what was there is as it was")


def flush(folder):
    """Until everything in a folder is on disk: some file systems say only then that they are full."""
    for path in (*folder.rglob("*"), folder):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


@contextmanager
def whole_folder(folder):
    """Yield an empty folder to write into, which takes the name `folder` when the block ends: it appears
    whole or not at all, whatever is raised and whenever the process dies.

    It is written beside its place as NAME.part; what was there is put aside, where `locate` finds it, until
    the new one has its name. A link stays a link, the folder behind it is replaced. Raises what `destination`
    raises, and OSError, one line: the disk is full, a rename is refused. Write with functions that raise
    OSError: torch.save does so into an open file, not into a path."""
    folder = destination(folder)
    part = folder.with_name(folder.name + ".part")
    aside = put_aside(folder)
    try:
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        yield part
        flush(part)
        if folder.exists():
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(folder, aside)
        try:
            os.replace(part, folder)
        except OSError:
            if aside.exists():
                os.replace(aside, folder)
            raise
    except OSError as error:
        if error.errno is None:  # not of the system: a line of ours
            raise
        raise not_written(folder, error) from None
    finally:
        shutil.rmtree(part, ignore_errors=True)
    shutil.rmtree(aside, ignore_errors=True)


def replace_text(path, text):
    """Write a file in UTF-8 so that it is the old one or the new one, whenever the process dies. A link stays
    a link. OSError: one line."""
    path = Path(os.path.realpath(path))
    part = path.with_name(path.name + ".part")
    try:
        with open(part, "w", encoding="utf-8", newline="") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise not_written(path, error) from None


def write_json(path, values):
    """An object as JSON, into a folder that is being written."""
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
