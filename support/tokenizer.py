"""Tokenizers: bytes, those of tiktoken, and the tokenizer.json of a checkpoint folder."""
import hashlib
import json
import os
import shutil
from pathlib import Path

import numpy as np
import tiktoken

from support.files import locate, read_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model", "chat_template.jinja", "generation_config.json")


def tokenizer(name="bytes"):
    """-> tiktoken.Encoding. "bytes": the 256 bytes and <|endoftext|> = 256. Any name that tiktoken knows,
    such as gpt2. A checkpoint folder: its tokenizer.json, as an object with the same methods.

    Raises ValueError for an unknown name, for an encoding without <|endoftext|>, and when its file cannot be
    fetched."""
    if name == "bytes":  # nothing merges: the ids are the bytes, however the pattern cuts the text; short pieces are fastest
        return tiktoken.Encoding("bytes", pat_str=r"(?s:.{1,64})", mergeable_ranks={bytes([i]): i for i in range(256)},
                                 special_tokens={"<|endoftext|>": 256})
    if os.path.isdir(name):
        return FolderTokenizer(name)
    if name not in tiktoken.list_encoding_names():
        raise ValueError(f"unknown tokenizer {name!r}: choose from bytes, {', '.join(tiktoken.list_encoding_names())}")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer {name!r} cannot be fetched ({type(error).__name__}): connect once, set TIKTOKEN_CACHE_DIR to "
                         "a folder that holds its file, or use --tokenizer=bytes, which needs no download") from None
    if "<|endoftext|>" not in encoding.special_tokens_set:
        raise ValueError(f"tokenizer {name!r} has no <|endoftext|>, which separates documents: use --tokenizer=bytes")
    return encoding


def encode(encoding, texts):
    """-> one array of ids per text, as encode_ordinary gives them: text that spells a special token stays
    text."""
    if encoding.name == "bytes":
        return [np.frombuffer(text.encode(), np.uint8) for text in texts]
    return [np.array(ids) for ids in encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())]


class FolderTokenizer:
    """A folder's tokenizer.json, through the `tokenizers` library. encode (a prompt: special tokens and the
    leading BOS count), decode, eot (int or None); and what data.py uses of tiktoken.Encoding: name, n_vocab,
    eot_token, encode_ordinary_batch (special tokens stay text)."""

    def __init__(self, folder):
        from tokenizers import Tokenizer
        folder = locate(folder)
        path, settings = folder / "tokenizer.json", folder / "tokenizer_config.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; put the model's tokenizer.json there (other tokenizer formats are not read)")
        try:
            self.inner = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ValueError(f"{path}: no tokenizer ({error}); copy it again") from None
        self.name, self.n_vocab = f"folder-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}", self.inner.get_vocab_size()
        settings = read_json(settings) if settings.is_file() else {}
        bos = settings.get("bos_token") if settings.get("add_bos_token") else None
        self.bos = self.inner.token_to_id(bos["content"] if isinstance(bos, dict) else bos) if bos else None
        eos = read_json(folder / "config.json").get("eos_token_id")
        self.eot = self.eot_token = eos[0] if isinstance(eos, list) else eos

    def encode_ordinary_batch(self, texts, num_threads=None):
        self.inner.encode_special_tokens = True
        return [x.ids for x in self.inner.encode_batch(texts, add_special_tokens=False)]

    def encode(self, text):
        self.inner.encode_special_tokens = False
        ids = self.inner.encode(text).ids
        return ids if self.bos is None or ids[:1] == [self.bos] else [self.bos, *ids]

    def decode(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)


def tokenizer_name(folder):
    """What data.tokenizer calls the tokenizer of a checkpoint folder: the name that `save_tokenizer` noted,
    else the folder itself."""
    path = locate(folder) / "tokenizer_config.json"
    return (read_json(path).get("tiktoken") if path.is_file() else None) or str(folder)


class StandIn:
    """Of branch train, until the tokenizers of branch data are merged: their interface."""

    def __init__(self, inner, end_ids):
        self.inner = inner
        self.n_vocab = inner.n_vocab
        self.bos = getattr(inner, "bos", None)
        self.end_ids = tuple(end_ids)
        self.eot = self.end_ids[0] if end_ids else None

    def encode(self, text, special=False):
        if isinstance(self.inner, FolderTokenizer):
            return self.inner.encode(text) if special else self.inner.encode_ordinary_batch([text])[0]
        return self.inner.encode(text, allowed_special="all") if special else self.inner.encode_ordinary(text)

    def decode(self, ids):
        return self.inner.decode([i for i in ids if i < self.n_vocab])

    def stream(self, ids=()):
        return StandInStream(self)


class StandInStream:
    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.ids = []

    def add(self, token):
        self.ids.append(token)
        text = self.tokenizer.decode(self.ids)
        if text.endswith("\ufffd") and len(self.ids) < 5:
            return ""
        self.ids = []
        return text

    def rest(self):
        return self.tokenizer.decode(self.ids)


def load_tokenizer(folder):
    """Stand-in, see above."""
    eos = read_json(locate(folder) / "config.json").get("eos_token_id")
    inner = tokenizer(tokenizer_name(folder))
    ends = eos if isinstance(eos, list) else [] if eos is None else [eos]
    return StandIn(inner, ends)


def save_tokenizer(folder, name):
    """Note in a checkpoint folder which tokenizer it was trained with: "bytes", a name that tiktoken knows,
    or the checkpoint folder to copy it from.

    "bytes" is also written as a tokenizer.json that transformers opens: byte-level BPE without merges, ids
    0..255 and <|endoftext|> = 256."""
    folder, eot = Path(folder), tokenizer(name).eot_token
    config = read_json(folder / "config.json")
    if config.get("eos_token_id") is None:  # or generation elsewhere would stop at a family's default id
        (folder / "config.json").write_text(json.dumps(config | dict(eos_token_id=eot), indent=2) + "\n")
    if name != "bytes" and os.path.isdir(name):
        for file in TOKENIZER_FILES:
            if (locate(name) / file).is_file():
                shutil.copyfile(locate(name) / file, folder / file)
        return
    settings = dict(tiktoken=name, eos_token="<|endoftext|>")
    if name == "bytes":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        # GPT-2's alphabet: printable bytes stand for themselves, the others for the code points from 256 on
        printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
        vocabulary = {chr(b if b in printable else 256 + sum(c not in printable for c in range(b))): b for b in range(256)}
        level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
        special = dict(id=eot, content="<|endoftext|>", single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        contents = dict(version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None, pre_tokenizer=level, post_processor=None,
                         decoder=level, model=dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None, end_of_word_suffix=None,
                                                   fuse_unk=False, byte_fallback=False, ignore_merges=False, vocab=vocabulary, merges=[]))
        (folder / "tokenizer.json").write_text(json.dumps(contents, ensure_ascii=False))
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
