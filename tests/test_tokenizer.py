"""Tests of support/tokenizer.py: text is text, ids are bounded by the largest, BOS stands before documents
and prompts alike, nothing that a tokenizer.json stores of a run applies, and streams print what decoding the
whole gives."""
import json
import shutil

import numpy as np
import pytest
import tiktoken
import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

import data
from support import files, tokenizer
from support.tokenizer import EOT

TEXT = "def f(x):\n\treturn 'é€😀' \x00\x7f\u2028  # 1234567 <s>  \r\n"
TEMPLATE = processors.TemplateProcessing


# ---- tokenizers of our own making, a kind each ----

def byte_level(vocabulary=(), merges=(), **options):
    """Bytes as GPT-2 writes them, ids 0..255, and further pieces."""
    alphabet = {piece: i for piece, i in tokenizer.bytes_contents()["model"]["vocab"].items()}
    vocab = alphabet | {piece: 256 + i for i, piece in enumerate(vocabulary)}
    inner = tokenizers.Tokenizer(models.BPE(vocab, list(merges), **options))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return inner


def metaspace():
    """SentencePiece-like: a space before the first word, ▁ for spaces, bytes for what is unknown."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0)]
    pieces += [(f"<0x{i:02X}>", -20.0) for i in range(256)]
    pieces += [(piece, -1.0) for piece in ("▁hello", "▁world", "▁a")]
    pieces += [(piece, -6.0) for piece in "▁abcdehlorsw</>.,!\n"]
    inner = tokenizers.Tokenizer(models.Unigram(pieces, 0, True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    inner.add_special_tokens([AddedToken(piece, special=True) for piece in ("<unk>", "<s>", "</s>")])
    return inner


def metaspace_of_library():
    """The same by the library's own pair of pre-tokenizer and decoder."""
    inner = metaspace()
    inner.normalizer = None
    inner.pre_tokenizer = pre_tokenizers.Metaspace()
    inner.decoder = decoders.Metaspace()
    return inner


def word_piece():
    words = "[UNK] [CLS] [SEP] hello world ##s ##ing a , . walk ! [ ]".split()
    vocab = {word: i for i, word in enumerate(words)}
    inner = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    inner.add_special_tokens(["[UNK]", "[CLS]", "[SEP]"])
    return inner


def word_level():
    inner = tokenizers.Tokenizer(models.WordLevel({"?": 0, "<eos>": 1, "a": 2, "b": 3}, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(["<eos>"])
    return inner


def folder_of(tmp_path, inner, settings=None, generation=None, eos=1, change=None):
    """A folder with this tokenizer -> FolderTokenizer. change(contents) edits tokenizer.json."""
    tmp_path.mkdir(exist_ok=True)
    contents = json.loads(inner.to_str())
    if change:
        change(contents)
    files.write_json(tmp_path / "tokenizer.json", contents)
    files.write_json(tmp_path / "config.json", {} if eos is None else dict(eos_token_id=eos))
    if settings is not None:
        files.write_json(tmp_path / "tokenizer_config.json", settings)
    if generation is not None:
        files.write_json(tmp_path / "generation_config.json", generation)
    return tokenizer.load_tokenizer(tmp_path)


def small_bpe(eot):
    """A tiktoken encoding with a hole between its tokens and EOT."""
    ranks = {bytes([i]): i for i in range(256)} | {b"ab": 256}
    return tiktoken.Encoding(
        "small", pat_str=r"\s?\w+|\s+|[^\w\s]+", mergeable_ranks=ranks, special_tokens={EOT: eot})


def documents(made, texts, begins=None):
    return [ids.tolist() for ids in made.encode_documents(texts, begins)]


# ---- bytes and tiktoken ----

@pytest.mark.parametrize("text", [
    "", "plain\n\ttext\r\n", "é漢🎉 \x00\x7f", EOT, " " * 5000 + "x" * 5000, "\u2028b\x85c", TEXT])
def test_bytes(text):
    made = tokenizer.tokenizer("bytes")
    assert documents(made, [text]) == [made.encode(text)] == [list(text.encode())]
    assert made.decode(made.encode(text)) == text
    assert (made.name, made.n_vocab, made.eot, made.end_ids, made.bos) == ("bytes", 257, 256, (256,), None)


def test_every_character_survives():
    text = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x3000 + 0xE000)]))
    made = tokenizer.tokenizer("bytes")
    assert documents(made, [text]) == [made.encode(text)] and made.decode(made.encode(text)) == text


def test_bytes_pass_no_loop(monkeypatch):
    """Bytes are views of the text, not the ids of tiktoken's own loop, which makes some 30 MB a second."""
    made = tokenizer.tokenizer("bytes")
    monkeypatch.setattr(made, "encode_ordinary_batch", None)
    assert documents(made, ["é", ""]) == [[0xC3, 0xA9], []]


def test_tiktoken(monkeypatch):
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: small_bpe(70_000))
    made = tokenizer.tokenizer("gpt2")
    assert (made.n_vocab, made.eot, made.end_ids, made.bos) == (70_001, 70_000, (70_000,), None)
    assert documents(made, ["ab", ""]) == [[256], []]
    # 300 and 69,999 are ids below the largest that are no tokens
    assert made.decode([300, 256, 69_999, 99, 70_001, -1, 2**40, 70_000]) == f"abc{EOT}"


def test_tokenizer_errors(monkeypatch):
    with pytest.raises(ValueError, match="unknown tokenizer 'nope': choose from bytes, .*gpt2"):
        tokenizer.tokenizer("nope")

    def no_network(name):
        raise ConnectionError("HTTPSConnectionPool(...): Max retries exceeded\nand more lines")

    monkeypatch.setattr(tiktoken, "get_encoding", no_network)
    with pytest.raises(ValueError, match="TIKTOKEN_CACHE_DIR .*--tokenizer=bytes") as error:
        tokenizer.tokenizer("gpt2")
    assert "\n" not in str(error.value)
    without = tiktoken.Encoding("without", pat_str=".", mergeable_ranks={b"a": 0}, special_tokens={})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: without)
    with pytest.raises(ValueError, match=r"has no <\|endoftext\|>"):
        tokenizer.tokenizer("gpt2")


# ---- what spells a token is text ----

@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("kind", ["apart", "in the vocabulary", "whole words"])
def test_spelled_tokens_are_text(tmp_path, kind, special):
    """Marked special or not, and also where the vocabulary of the model would reach it."""
    inner = byte_level([] if kind == "apart" else [EOT], ignore_merges=kind == "whole words")
    inner.add_tokens([AddedToken(EOT, special=special)])
    made = folder_of(tmp_path, inner, eos=256)
    assert made.eot == 256 and made.n_vocab == 257
    text = f"a{EOT}b"
    for spelled in (text, EOT):
        ids = list(spelled.encode())
        assert documents(made, [spelled]) == made.encode_ordinary_batch([spelled]) == [ids]
        assert made.encode(spelled) == ids
    assert made.encode(text, special=True) == [97, 256, 98]
    assert made.decode([97, 256]) == f"a{EOT}"


def test_bytes_spell_tokens_as_text():
    made = tokenizer.tokenizer("bytes")
    assert 256 not in made.encode(EOT) and made.encode(f"a{EOT}", special=True) == [97, 256]


def test_spelled_tokens_are_text_in_other_models(tmp_path):
    unigram = folder_of(tmp_path / "unigram", metaspace(), eos=2)
    ids = unigram.encode("a</s> <s>")
    assert not {1, 2} & set(ids) and unigram.decode(ids) == "a</s> <s>"
    assert 2 in unigram.encode("a</s>", special=True)
    pieces = folder_of(tmp_path / "pieces", word_piece(), eos=2)
    assert pieces.encode("hello [CLS]") == [3, 12, 0, 13] and pieces.encode("[CLS]", special=True) == [1]
    words = folder_of(tmp_path / "words", word_level())
    assert words.encode("a <eos> b") == [2, 0, 3] and words.encode("a <eos>", special=True) == [2, 1]


@pytest.mark.parametrize("special", [False, True])
@pytest.mark.parametrize("before", [None, pre_tokenizers.UnicodeScripts()])
def test_spelled_bytes_are_text(tmp_path, before, special):
    """Unigram's pieces for the bytes of unknown characters: text that spells one is not that byte."""
    inner = metaspace()
    if before:
        inner.pre_tokenizer = before
    made = folder_of(tmp_path, inner, eos=2)
    for text in ("<0x41>", "a <0x0A> b <0xC3>", "<<0xFF>>", "<0x4", "é"):
        assert made.decode(made.encode(text, special=special)) == text


def test_added_tokens_that_are_ordinary_text(tmp_path):
    """A piece that merges make is a piece, whoever lists it among the added tokens; so is one character."""
    inner = byte_level(["aa", "aaaa"], [("a", "a"), ("aa", "aa")])
    inner.add_tokens(["aa", "b"])
    made = folder_of(tmp_path, inner)
    assert documents(made, ["aaaa", "aab"]) == [[257], [256, 98]]


# ---- nothing of somebody's run ----

def truncation(contents):
    contents["truncation"] = dict(direction="Right", max_length=3, strategy="LongestFirst", stride=0)


def padding(contents):
    contents["padding"] = dict(strategy=dict(Fixed=9), direction="Right", pad_to_multiple_of=None, pad_id=0,
                               pad_type_id=0, pad_token="?")


def dropout(contents):
    contents["model"]["dropout"] = 0.9


@pytest.mark.parametrize("change", [truncation, padding, dropout])
def test_stored_settings_of_a_run(tmp_path, change):
    inner = byte_level(["aa", "aaaa"], [("a", "a"), ("aa", "aa")])
    made = folder_of(tmp_path, inner, change=change)
    for _ in range(5):
        assert documents(made, ["aaaabcd", "c"]) == [[257, 98, 99, 100], [99]]
        assert made.encode("aaaabcd") == made.encode("aaaabcd", special=True) == [257, 98, 99, 100]


# ---- ids up to the largest ----

def test_ids_beyond_the_number_of_tokens(tmp_path):
    """An added token far beyond the vocabulary: 258 tokens, the largest id is 70,000, in every file."""
    def change(contents):
        contents["model"]["vocab"][EOT] = 70_000
        contents["added_tokens"][0]["id"] = 70_000

    inner = byte_level()
    inner.add_special_tokens([EOT])
    made = folder_of(tmp_path / "m", inner, eos=70_000, change=change)
    assert made.n_vocab == 70_001 and made.eot == 70_000
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for i in range(6):
        (corpus / f"{i}.txt").write_text(f"document {i} " * 20)
    train, validation = data.prepare(str(corpus), str(tmp_path / "m"), str(tmp_path / "cache"))
    for file in (train, validation):
        assert file.header["vocab_size"] == 70_001 and file.tokens.dtype == np.uint32
        assert (file.tokens == 70_000).sum() == file.header["documents"]
    assert train.header["documents"] + validation.header["documents"] == 6


# ---- BOS, and nothing else ----

def bos_tokenizer():
    inner = byte_level()
    inner.add_special_tokens([EOT, "<bos>", "<sep>", "<mask>"])
    return inner


BY_PROCESSOR = {
    "template": TEMPLATE("<bos> $A", None, [("<bos>", 257)]),
    "template with an end": TEMPLATE("<bos> $A <sep>", "<bos> $A $B", [("<bos>", 257), ("<sep>", 258)]),
    "bert": processors.BertProcessing(("<sep>", 258), ("<bos>", 257)),
    "sequence": processors.Sequence([
        processors.ByteLevel(trim_offsets=False), TEMPLATE("<bos> $A", None, [("<bos>", 257)])]),
}
ADDED = dict(add_bos_token=True, bos_token="<bos>")


@pytest.mark.parametrize("processor", BY_PROCESSOR)
@pytest.mark.parametrize("settings", [None, ADDED, dict(add_bos_token=False)])
def test_bos_by_the_post_processor(tmp_path, monkeypatch, processor, settings):
    monkeypatch.setattr(data, "PIECE", 100)
    inner = bos_tokenizer()
    inner.post_processor = BY_PROCESSOR[processor]
    check_bos(folder_of(tmp_path, inner, settings, eos=256), tmp_path)


@pytest.mark.parametrize("settings", [ADDED, dict(ADDED, bos_token=dict(content="<bos>", special=True))])
def test_bos_by_add_bos_token(tmp_path, monkeypatch, settings):
    monkeypatch.setattr(data, "PIECE", 100)
    check_bos(folder_of(tmp_path, bos_tokenizer(), settings, eos=256), tmp_path)


def check_bos(made, folder):
    """BOS before a prompt and before each document of a corpus; no end, and not twice."""
    assert made.bos == 257
    assert made.encode("ab") == [257, 97, 98] and made.encode("") == [257]
    assert made.encode("<bos>ab", special=True) == [257, 97, 98]
    assert documents(made, ["ab", ""]) == [[257, 97, 98], [257]]
    assert documents(made, ["ab\n", "c"], [True, False]) == [[257, 97, 98, 10], [99]]
    corpus = folder / "corpus"
    corpus.mkdir()
    text = "line\n" * 300  # comes in pieces
    for name in ("a", "b", "c"):
        (corpus / name).write_text(name + text)
    for file in data.prepare(str(corpus), str(folder), str(folder / "cache")):
        tokens = np.asarray(file.tokens)
        begins = np.flatnonzero(tokens == 257)
        assert begins.tolist() == [0, *(np.flatnonzero(tokens == 256) + 1)[:-1]]
        assert len(tokens) == file.header["documents"] * (len(text) + 3)
        assert file.header["begin"] == [257]


def test_bos_changes_the_token_files(tmp_path):
    """The same tokenizer.json, another setting beside it: what was made before is made anew."""
    corpus = tmp_path / "text"
    corpus.mkdir()
    for i in range(5):
        (corpus / f"{i}.txt").write_text(f"text {i}")
    for settings, count in ((None, 0), (ADDED, 1)):
        folder_of(tmp_path / "m", bos_tokenizer(), settings, eos=256)
        train, _ = data.prepare(str(corpus), str(tmp_path / "m"), str(tmp_path / "cache"))
        assert (np.asarray(train.tokens) == 257).sum() == count * train.header["documents"]


def test_two_tokens_that_begin_texts(tmp_path):
    inner = bos_tokenizer()
    inner.post_processor = TEMPLATE("<mask> <bos> $A", None, [("<mask>", 259), ("<bos>", 257)])
    made = folder_of(tmp_path, inner, eos=256)
    assert made.bos == 259 and documents(made, ["a"]) == [made.encode("a")] == [[259, 257, 97]]


def test_no_bos_unless_it_is_asked_for(tmp_path):
    for i, settings in enumerate((None, {}, dict(bos_token="<bos>"), dict(ADDED, add_bos_token=False))):
        made = folder_of(tmp_path / str(i), bos_tokenizer(), settings, eos=256)
        assert made.bos is None and made.encode("ab") == [97, 98]


# ---- the ends of a text ----

@pytest.mark.parametrize("eos, generation, ends", [
    (256, None, (256,)), ([256, 10], None, (256, 10)), (256, dict(eos_token_id=[13, 256]), (256, 13)),
    (None, dict(eos_token_id=258), (258,)), (256, {}, (256,)), (256, dict(eos_token_id=None), (256,)),
    (None, None, ()), ([5, 4], dict(eos_token_id=3), (5, 4, 3))])
def test_end_ids(tmp_path, eos, generation, ends):
    made = folder_of(tmp_path, bos_tokenizer(), None, generation, eos)
    assert made.end_ids == ends and made.eot == (ends[0] if ends else None)


def test_end_ids_of_a_noted_tokenizer(tmp_path):
    """What separates documents in training ends a text, and what the folder says besides."""
    files.write_json(tmp_path / "config.json", dict(eos_token_id=10))
    tokenizer.save_tokenizer(tmp_path, "bytes")
    made = tokenizer.load_tokenizer(tmp_path)
    assert made.eot == 256 and made.end_ids == (256, 10)


def test_eos_of_another_model(tmp_path):
    with pytest.raises(ValueError, match="config.json: eos_token_id=260 is beyond the largest id .*259"):
        folder_of(tmp_path, bos_tokenizer(), eos=260)


WRONG = ["256", 1.5, True, [], {}, ["256"], [256, None], [[256]], -1, [256, -1]]


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("value", WRONG, ids=json.dumps)
def test_wrong_eos(tmp_path, file, value):
    with pytest.raises(ValueError, match="eos_token_id=") as error:
        if file == "config.json":
            folder_of(tmp_path, bos_tokenizer(), eos=value)
        else:
            folder_of(tmp_path, bos_tokenizer(), generation=dict(eos_token_id=value))
    assert "\n" not in str(error.value) and str(tmp_path / file) in str(error.value)


@pytest.mark.parametrize("key", ["add_bos_token", "bos_token", "tiktoken"])
@pytest.mark.parametrize("value", [3, 1.5, [], ["<bos>"], {}, {"content": 3}, "no such name"], ids=json.dumps)
def test_wrong_settings(tmp_path, key, value):
    with pytest.raises(ValueError) as error:
        folder_of(tmp_path, bos_tokenizer(), ADDED | {key: value})
    assert "\n" not in str(error.value)
    assert key in str(error.value) or "unknown tokenizer 'no such name'" in str(error.value)


@pytest.mark.parametrize("content", [
    "", "{", "[]", "3", "{}", '{"model": 3}', '{"model": {}}',
    '{"model": {"type": "BPE"}, "added_tokens": 3}',
    '{"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}',
    '{"model": {"type": "BPE", "vocab": {"a": 1}, "merges": [3]}}', "\ud83d", '{"a": NaN}', "[" * 100_000])
def test_wrong_tokenizer_json(tmp_path, content):
    folder_of(tmp_path, bos_tokenizer(), eos=256)
    (tmp_path / "tokenizer.json").write_text(content, encoding="utf-8", errors="surrogatepass")
    with pytest.raises(ValueError, match="tokenizer.json: ") as error:
        tokenizer.load_tokenizer(tmp_path)
    assert "\n" not in str(error.value)


# ---- decoding ----

KINDS = dict(bytes=byte_level, metaspace=metaspace, library=metaspace_of_library, word_piece=word_piece,
             word_level=word_level)


def streamed(made, ids, context=()):
    stream = made.stream(context)
    return [*(stream.add(i) for i in ids), stream.rest()]


@pytest.mark.parametrize("kind", KINDS)
def test_ids_beyond_the_vocabulary(tmp_path, kind):
    made = folder_of(tmp_path, KINDS[kind]())
    ids = made.encode("a hello a")
    with_more = [made.n_vocab, ids[0], 2**40, *ids[1:], -1, made.n_vocab + 7]
    assert made.decode(with_more) == made.decode(ids) == "".join(streamed(made, with_more))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("text", [
    "hello world", "a", " hello  world ", "hello worlds, walking a. a!", "héllo 漢字🎉🎉 é", "a\n\n b",
    "\ufffd a \ufffd"])
def test_a_stream_prints_what_decoding_the_whole_gives(tmp_path, kind, text):
    made = folder_of(tmp_path, KINDS[kind]())
    ids = made.encode(text)
    parts = streamed(made, ids)
    assert "".join(parts) == made.decode(ids)
    if kind in ("bytes", "metaspace"):
        assert made.decode(ids) == text
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in text  # no half characters


@pytest.mark.parametrize("kind", ["bytes", "metaspace", "library", "word_piece"])
def test_a_stream_behind_a_prompt(tmp_path, kind):
    """The first word that is generated keeps its space, unless a text begins with it."""
    made = folder_of(tmp_path, KINDS[kind](), eos=2)
    ids = made.encode("hello world hello")
    prompt = made.encode("hello")
    assert made.decode(prompt) + "".join(streamed(made, ids[len(prompt):], prompt)) == "hello world hello"
    assert "".join(streamed(made, ids, [*prompt, 2])) == "hello world hello"


@pytest.mark.parametrize("kind", KINDS)
def test_random_ids_stream(tmp_path, kind):
    """Also where they are no text: halves of characters, stray continuations, words that go on nothing."""
    made = folder_of(tmp_path, KINDS[kind]())
    random = np.random.RandomState(0)
    for _ in range(200):
        ids = random.randint(0, made.n_vocab + 3, 30).tolist()
        if kind == "metaspace":  # a stray byte would undo characters before it, which are out already
            ids = [i for i in ids if not 3 <= i < 259]
        assert "".join(streamed(made, ids)) == made.decode(ids)


def test_a_stream_costs_the_same_at_every_token(tmp_path):
    made = folder_of(tmp_path, byte_level())
    lengths = []

    def decode(ids):
        lengths.append(len(ids))
        return made.decode(ids)

    stream = tokenizer.Stream(decode, list(b"prompt" * 100))
    lengths.clear()
    for byte in "é漢🎉 text ".encode() * 100:
        stream.add(byte)
    assert max(lengths[2:]) <= 8 and max(lengths[:2]) <= 602


# ---- pieces of a document ----

@pytest.mark.parametrize("kind", ["metaspace", "library", "prefix"])
def test_pieces_get_no_space_of_their_own(tmp_path, kind):
    """Tokenizers that put a space before what they are given put it before a document, not before each piece
    of it; then the pieces' ids are those of the whole."""
    inner = KINDS.get(kind, byte_level)()
    if kind == "prefix":
        inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    made = folder_of(tmp_path, inner)
    pieces = ["hello a\n", "world\n", "\n", " a hello"]
    got = documents(made, pieces, [True, False, False, False])
    assert sum(got, []) == made.encode("".join(pieces))


def test_a_line_end_that_merges_with_what_follows(tmp_path):
    made = folder_of(tmp_path, byte_level(["ĊĠ"], [("Ċ", "Ġ")]))
    assert documents(made, ["a\n", " b"], [True, False]) == [[97, 10], [32, 98]]


# ---- checkpoint folders ----

def test_bytes_open_in_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    files.write_json(tmp_path / "config.json", dict(model_type="deepseek_v3"))
    tokenizer.save_tokenizer(tmp_path, "bytes")
    assert tokenizer.tokenizer_name(tmp_path) == tokenizer.load_tokenizer(tmp_path).name == "bytes"
    there = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = list(TEXT.encode())
    assert there(TEXT)["input_ids"] == ids and there.decode(ids, clean_up_tokenization_spaces=False) == TEXT
    assert len(there) == 257 and there.eos_token_id == 256
    assert there(f"a{EOT}b")["input_ids"] == [97, 256, 98]
    assert transformers.AutoConfig.from_pretrained(tmp_path).eos_token_id == 256


@pytest.mark.parametrize("add", [None, True, False])
@pytest.mark.parametrize("processor", [None, *BY_PROCESSOR])
def test_bos_as_in_transformers(tmp_path, processor, add):
    """What a post-processor puts first there stands first here. add_bos_token alone is read here and by
    transformers 4, not by 5."""
    transformers = pytest.importorskip("transformers")
    inner = bos_tokenizer()
    if processor:
        inner.post_processor = BY_PROCESSOR[processor]
    settings = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token="<bos>", eos_token=EOT)
    if add is not None:
        settings["add_bos_token"] = add
    made = folder_of(tmp_path, inner, settings, eos=256)
    there = transformers.PreTrainedTokenizerFast.from_pretrained(tmp_path)("ab")["input_ids"]
    assert made.encode("ab")[0] == there[0] or (add and not processor)
    assert (made.bos == 257) == bool(processor or add)


def test_a_folder_is_copied(tmp_path):
    """With everything that decides about its ids; the copy does not need the original."""
    inner = bos_tokenizer()
    original = folder_of(tmp_path / "a", inner, ADDED, dict(eos_token_id=[256, 10]), [256, 258])
    (tmp_path / "b").mkdir()
    files.write_json(tmp_path / "b" / "config.json", dict(eos_token_id=None))
    tokenizer.save_tokenizer(tmp_path / "b", str(tmp_path / "a"))
    shutil.rmtree(tmp_path / "a")
    copy = tokenizer.load_tokenizer(tmp_path / "b")
    for name in ("name", "n_vocab", "eot", "end_ids", "bos"):
        assert getattr(copy, name) == getattr(original, name), name
    assert files.read_json(tmp_path / "b" / "config.json")["eos_token_id"] == [256, 258, 10]
    assert tokenizer.tokenizer_name(tmp_path / "b") == str(tmp_path / "b")
    (tmp_path / "b" / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match="tokenizer.json: no such file"):
        tokenizer.load_tokenizer(tmp_path / "b")


def test_byte_order_marks(tmp_path):
    folder_of(tmp_path, bos_tokenizer(), ADDED, dict(eos_token_id=10), 256)
    for path in tmp_path.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    made = tokenizer.load_tokenizer(tmp_path)
    assert made.end_ids == (256, 10) and made.encode("a") == [257, 97]
