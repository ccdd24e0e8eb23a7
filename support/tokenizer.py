"""Tokenizers: bytes, those of tiktoken, and the tokenizer.json of a checkpoint folder, behind one interface.

Text is text: what spells a special or added token is encoded like any other text, unless a prompt asks for
more. Where a tokenizer begins texts with a token (BOS), so do prompts and training documents; nothing else is
added. What a tokenizer.json stores of somebody's run (truncation, padding, dropout) is switched off.
"""
import hashlib
import json
import os
import shutil
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
import tiktoken
import tokenizers
from tokenizers.models import WordLevel

from support.files import locate, read_json, write_json

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "tokenizer.model",
    "chat_template.jinja", "generation_config.json")
EOT = "<|endoftext|>"
BEFORE = "\n"  # what stands before a piece that does not begin its document
REPLACEMENT = "\ufffd"  # decoders write it for bytes that are no character, or not yet


def tokenizer(name="bytes"):
    """-> Tokenizer. "bytes": the 256 bytes and <|endoftext|> = 256. Any name that tiktoken knows, such as
    gpt2. A checkpoint folder: its tokenizer.json.

    ValueError: an unknown name, an encoding without <|endoftext|>, one whose file cannot be fetched; and with
    FileNotFoundError what is wrong with which file of a folder."""
    if name != "bytes" and os.path.isdir(name):
        return FolderTokenizer(name)
    return TiktokenTokenizer(named_encoding(name))


def named_encoding(name):
    """-> tiktoken.Encoding of "bytes" or of a name that tiktoken knows."""
    if name == "bytes":
        return bytes_encoding()
    names = tiktoken.list_encoding_names()
    if name not in names:
        raise ValueError(f"unknown tokenizer {name!r}: choose from bytes, {', '.join(names)}, or a folder "
                         "with a tokenizer.json")
    try:
        encoding = tiktoken.get_encoding(name)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"tokenizer {name!r} cannot be fetched ({type(error).__name__}): connect once, set "
            "TIKTOKEN_CACHE_DIR to a folder that holds its file, or use --tokenizer=bytes, which needs no "
            "download") from None
    if EOT not in encoding.special_tokens_set:
        raise ValueError(f"tokenizer {name!r} has no {EOT}, which separates documents: use --tokenizer=bytes")
    return encoding


def bytes_encoding():
    """Nothing merges: the ids are the bytes, however the pattern cuts the text; short pieces are fastest."""
    return tiktoken.Encoding(
        "bytes",
        pat_str=r"(?s:.{1,64})",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={EOT: 256})


class Tokenizer:
    """What scripts use of a tokenizer.

    name; n_vocab: the largest id + 1, added tokens included; eot: the id that separates documents, or None;
    end_ids: tuple of the ids at which generation stops; bos: the id that begins texts, or None."""

    def __init__(self, name, n_vocab, begin, end_ids):
        self.name = name
        self.n_vocab = n_vocab
        self.begin = list(begin)  # what texts begin with: BOS, in a few families two tokens, mostly none
        self.bos = self.begin[0] if self.begin else None
        self.end_ids = tuple(end_ids)
        self.eot = self.end_ids[0] if self.end_ids else None

    def encode_ordinary_batch(self, texts):
        """-> a list of ids per text, nothing added: what spells a special or added token stays text."""
        raise NotImplementedError

    def lost(self):
        """-> the printable ASCII characters, without the space, of which it makes no token, and says
        nothing."""
        return ""

    def encode_documents(self, texts, begins=None):
        """-> an array of ids per text, BOS first where the tokenizer begins texts with it.

        begins: for each text, does it begin its document (None: they all do), or go on behind a line of
        it?"""
        begins = begins or [True] * len(texts)
        begin = np.array(self.begin, dtype=np.int64)
        documents = []
        for ids, first in zip(self.encode_pieces(texts, begins), begins):
            documents.append(np.concatenate((begin, ids)) if first and self.begin else np.asarray(ids))
        return documents

    def encode_pieces(self, texts, begins):
        """-> ids per text, of documents that come in pieces."""
        return [np.array(ids, dtype=np.int64) for ids in self.encode_ordinary_batch(texts)]

    def encode(self, text, special=False):
        """A prompt -> list of ids: BOS if the tokenizer begins texts with it, and the text. With special,
        what spells a special or added token is that token (and a BOS that is spelled is not doubled)."""
        ids = self.encode_special(text) if special else self.encode_ordinary_batch([text])[0]
        return ids if special and self.begin and ids[:len(self.begin)] == self.begin else self.begin + ids

    def decode(self, ids):
        """-> text; ids beyond the vocabulary, which a model may have for padding, decode to nothing."""
        return self.decode_known([i for i in ids if 0 <= i < self.n_vocab])

    def stream(self, ids=()):
        """-> Stream, for printing token by token what follows a text of these ids."""
        ids = list(ids)
        context = ids
        for position, token in enumerate(ids):
            if token in self.end_ids or token in self.begin:
                context = ids[position + 1:]  # a text that begins here is decoded like one
        return Stream(self.decode, context)


class Stream:
    """Text of a growing sequence, by difference: decoders look at neighbours (a character may take several
    tokens, the first word has no space before it), so each token is decoded behind those before it.

    To keep the cost of a token constant, it is decoded behind the tokens since the last but one time that
    text came out, not behind all of them."""

    def __init__(self, decode, context):
        self.decode = decode
        self.window = list(context)  # the ids that are decoded
        self.pending = len(self.window)  # from here on: ids that came after text was last given
        self.given = len(decode(self.window))  # characters of the window's text

    def add(self, token):
        """-> the text that this token settles: "" while a character is incomplete."""
        self.window.append(token)
        text = self.decode(self.window)
        # what ends the text may become a character, with what stands before it (byte fallback)
        settled = text.rstrip(REPLACEMENT)
        new = settled[self.given:]
        self.given += len(new)
        if new and settled == text:
            self.window = self.window[self.pending:]
            self.pending = len(self.window)
            self.given = len(self.decode(self.window))
        return new

    def rest(self):
        """-> what is left when no token follows."""
        return self.decode(self.window)[self.given:]


class TiktokenTokenizer(Tokenizer):
    """A tiktoken.Encoding with <|endoftext|>. end_ids: further ids at which generation stops."""

    def __init__(self, encoding, end_ids=()):
        self.encoding = encoding
        eot = encoding.eot_token
        ends = dict.fromkeys((eot, *end_ids))
        super().__init__(encoding.name, encoding.n_vocab, (), ends)

    def encode_ordinary_batch(self, texts):
        return self.encoding.encode_ordinary_batch(texts, num_threads=os.cpu_count())

    def encode_pieces(self, texts, begins):
        if self.name == "bytes":  # views of the text: tiktoken's own loop makes some 30 MB a second
            return [np.frombuffer(text.encode(), np.uint8) for text in texts]
        return super().encode_pieces(texts, begins)

    def encode_special(self, text):
        return self.encoding.encode(text, allowed_special="all")

    def decode_known(self, ids):
        try:
            return self.encoding.decode(ids)
        except KeyError:  # some encodings have holes
            return self.encoding.decode([i for i in ids if self.is_token(i)])

    def is_token(self, i):
        try:
            self.encoding.decode_single_token_bytes(i)
        except KeyError:
            return False
        return True


# ---- the tokenizer.json of a folder ----

def token_ids(values, key):
    """The token ids under a key of a config: null, one, or a list -> tuple. ValueError: anything else."""
    value = values.get(key)
    if value is None:
        return ()
    ids = value if isinstance(value, list) else [value]
    if not ids or any(type(i) is not int or i < 0 for i in ids):
        raise ValueError(f"{key}={value!r} is not supported, only a token id or a list of them")
    return tuple(ids)


def folder_end_ids(folder):
    """-> tuple of all ids of eos_token_id in config.json and generation_config.json, in this order."""
    ids = []
    generation = folder / "generation_config.json"
    for path in (folder / "config.json", *([generation] if generation.is_file() else [])):
        values = read_json(path)
        try:
            ids += token_ids(values, "eos_token_id")
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    return tuple(dict.fromkeys(ids))


def setting(path, key, kind):
    """A value of tokenizer_config.json (or a file like it), None where there is none. ValueError: it is no
    `kind`. A token may be given as an object with its text as content."""
    value = read_json(path).get(key) if path.is_file() else None
    if kind is str and isinstance(value, dict):
        value = value.get("content", value)
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{path}: {key}={value!r} is not supported, only {kind.__name__}")
    return value


def without_special(contents):
    """The contents of a tokenizer.json -> the same for text alone: no text gives an added token.

    Without their list, the added tokens would still be reached where the model's vocabulary holds them as
    whole words or pieces; there they get a name that begins with a noncharacter, which no text holds. Those
    that merges work with, or that are one character, are ordinary text."""
    model = dict(contents["model"])
    ordinary = set()
    for merge in model.get("merges") or ():
        first, second = merge if isinstance(merge, list) else merge.split(" ", 1)
        ordinary |= {first, second, first + second}
    hidden = {}
    for token in contents.get("added_tokens") or ():
        content = token["content"]
        if len(content) > 1 and content not in ordinary:
            hidden[content] = f"\uffff{content}"
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {hidden.get(piece, piece): i for piece, i in model["vocab"].items()}
    else:  # Unigram: pairs of piece and score
        model["vocab"] = [[hidden.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in hidden:
        model["unk_token"] = hidden[model["unk_token"]]
    return contents | dict(model=model, added_tokens=[], post_processor=None)


def without_spelled_bytes(contents):
    """The contents of a tokenizer.json -> the same, but text like <0x41> is not the byte of this name:
    Unigram would find it among its pieces, which are there for characters that it does not know."""
    if contents["model"].get("type") != "Unigram" or not contents["model"].get("byte_fallback"):
        return contents
    apart = dict(
        type="Split", pattern=dict(Regex="<(?=0x[0-9A-F]{2}>)"), behavior="Isolated", invert=False)
    steps = [step for step in (contents.get("pre_tokenizer"), apart) if step]
    return contents | dict(pre_tokenizer=dict(type="Sequence", pretokenizers=steps))


def leading_ids(processor):
    """-> the ids that a post-processor puts before a text."""
    if processor is None:
        return []
    encoding = tokenizers.Tokenizer(WordLevel({"?": 0}, unk_token="?")).encode("?")
    processed = processor.process(encoding)
    return processed.ids[:processed.special_tokens_mask.index(0)]


class FolderTokenizer(Tokenizer):
    """A folder's tokenizer.json, through the `tokenizers` library.

    It begins texts with BOS if its post-processor does, or add_bos_token in tokenizer_config.json says so.
    eos_token_id in config.json, and behind it in generation_config.json, names the ends of a text; the first
    is eot. inner is the tokenizer as it is stored, plain the same for text alone. FileNotFoundError,
    ValueError: one line naming file, key and value."""

    def __init__(self, folder):
        folder = locate(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; put the model's tokenizer.json there (other "
                                    "tokenizer formats are not read)")
        contents = read_json(path) | dict(truncation=None, padding=None)
        try:
            if contents["model"].get("dropout"):
                contents["model"] = contents["model"] | dict(dropout=None)
            contents = without_spelled_bytes(contents)
            self.inner = tokenizers.Tokenizer.from_str(json.dumps(contents))
            self.plain = tokenizers.Tokenizer.from_str(json.dumps(without_special(contents)))
        except Exception as error:  # the library raises nothing more specific
            said = " ".join(f"{type(error).__name__}: {error}".split())
            raise ValueError(f"{path}: no tokenizer ({said}); copy it again") from None

        begin = leading_ids(self.inner.post_processor)
        bos = self.added_bos(folder)
        if bos is not None and bos not in begin:
            begin = [bos, *begin]
        self.path = path
        ids = self.inner.get_vocab(with_added_tokens=True).values()
        n_vocab = max(ids, default=-1) + 1
        name = f"folder-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}"
        ends = folder_end_ids(folder) if (folder / "config.json").is_file() else self.stored_end(folder)
        super().__init__(name, n_vocab, begin, ends)
        if self.eot is not None and self.eot >= n_vocab:
            raise ValueError(f"{folder / 'config.json'}: eos_token_id={self.eot} is beyond the largest id of "
                             f"{path.name}, {n_vocab - 1}; they belong to different models")

    def added_bos(self, folder):
        """-> the id of bos_token if add_bos_token asks for it, else None."""
        path = folder / "tokenizer_config.json"
        if not setting(path, "add_bos_token", bool):
            return None
        older = folder / "special_tokens_map.json"
        token = setting(path, "bos_token", str) or setting(older, "bos_token", str)
        bos = self.inner.token_to_id(token) if token else None
        if bos is None:
            raise ValueError(f"{path}: add_bos_token=true, but bos_token={token!r} is no token of "
                             "tokenizer.json; name the one that begins texts")
        return bos

    def stored_end(self, folder):
        """-> a tuple of the id of eos_token, of a folder that holds a tokenizer alone; empty if none is
        named."""
        token = setting(folder / "tokenizer_config.json", "eos_token", str)
        eos = self.inner.token_to_id(token) if token else None
        return () if eos is None else (eos,)

    @contextmanager
    def one_line_errors(self):
        """A block in which the library encodes. ValueError, one line, for whatever it raises there."""
        try:
            yield
        except Exception as error:  # the library raises nothing more specific
            said = " ".join(str(error).split())
            raise ValueError(f"{self.path}: cannot encode this text ({said}); give the tokenizer the token "
                             "that it names for what it does not know") from None

    def encode_ordinary_batch(self, texts):
        with self.one_line_errors():
            return [x.ids for x in self.plain.encode_batch_fast(texts, add_special_tokens=False)]

    def lost(self):
        found = []
        for code in range(33, 127):
            with suppress(ValueError):  # where it says so, nothing is lost
                if not self.encode_ordinary_batch([chr(code)])[0]:
                    found.append(chr(code))
        return "".join(found)

    def encode_pieces(self, texts, begins):
        """Some tokenizers put a space before what they are given. Within a document that would be a space too
        many: a piece is encoded behind a line end, whose ids are then taken off."""
        texts = [text if first else BEFORE + text for text, first in zip(texts, begins)]
        pieces = self.encode_ordinary_batch(texts)
        [before] = self.encode_ordinary_batch([BEFORE])
        for i, first in enumerate(begins):
            if first:
                continue
            if pieces[i][:len(before)] == before:
                pieces[i] = pieces[i][len(before):]
            else:  # the line end became part of another token
                [pieces[i]] = self.encode_ordinary_batch([texts[i][len(BEFORE):]])
        return [np.array(ids, dtype=np.int64) for ids in pieces]

    def encode_special(self, text):
        with self.one_line_errors():
            return self.inner.encode(text, add_special_tokens=False).ids

    def decode_known(self, ids):
        return self.inner.decode(ids, skip_special_tokens=False)


# ---- checkpoint folders ----

def tokenizer_name(folder):
    """What `tokenizer` calls the tokenizer of a checkpoint folder: the name that `save_tokenizer` noted, else
    the folder itself."""
    return setting(locate(folder) / "tokenizer_config.json", "tiktoken", str) or str(folder)


def load_tokenizer(folder):
    """-> the Tokenizer of a checkpoint folder: the one that `save_tokenizer` noted, else the folder's
    tokenizer.json. FileNotFoundError: it has neither."""
    folder = locate(folder)
    name = setting(folder / "tokenizer_config.json", "tiktoken", str)
    if not name:
        return FolderTokenizer(folder)
    return TiktokenTokenizer(named_encoding(name), folder_end_ids(folder))


def save_tokenizer(folder, name):
    """Note in a checkpoint folder which tokenizer it was trained with: "bytes", a name that tiktoken knows,
    or the checkpoint folder to copy it from.

    "bytes" is also written as a tokenizer.json that transformers opens."""
    folder = Path(folder)
    ends = list(tokenizer(name).end_ids)
    config = read_json(folder / "config.json")
    if config.get("eos_token_id") is None:  # or generation elsewhere would stop at a family's default id
        config["eos_token_id"] = ends if len(ends) > 1 else next(iter(ends), None)
        write_json(folder / "config.json", config)
    if name != "bytes" and os.path.isdir(name):
        for file in TOKENIZER_FILES:
            if (locate(name) / file).is_file():
                shutil.copyfile(locate(name) / file, folder / file)
        return
    settings = dict(tiktoken=name, eos_token=EOT)
    if name == "bytes":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
        write_json(folder / "tokenizer.json", bytes_contents())
    write_json(folder / "tokenizer_config.json", settings)


def bytes_contents():
    """The bytes tokenizer as a tokenizer.json: byte-level BPE without merges, ids 0..255 and <|endoftext|> =
    256."""
    # GPT-2's alphabet: printable bytes stand for themselves, the others for the code points from 256 on
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    vocabulary = {}
    others = 0
    for byte in range(256):
        if byte in printable:
            vocabulary[chr(byte)] = byte
        else:
            vocabulary[chr(256 + others)] = byte
            others += 1
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=False, use_regex=False)
    special = dict(id=256, content=EOT, single_word=False, lstrip=False, rstrip=False, normalized=False,
                   special=True)
    model = dict(type="BPE", dropout=None, unk_token=None, continuing_subword_prefix=None,
                 end_of_word_suffix=None, fuse_unk=False, byte_fallback=False, ignore_merges=False,
                 vocab=vocabulary, merges=[])
    return dict(version="1.0", truncation=None, padding=None, added_tokens=[special], normalizer=None,
                pre_tokenizer=level, post_processor=None, decoder=level, model=model)
