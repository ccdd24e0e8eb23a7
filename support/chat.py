"""Checkpoints that one can talk to: which ids begin a turn, for this project and for others.

The turn tokens are added tokens of the folder's tokenizer.json, and chat_template.jinja puts them around
messages, so that transformers renders a conversation to the ids that the model was trained on. In the bytes
tokenizer they take the ids of bytes that UTF-8 never holds.
"""
from support import files
from support.tokenizer import EOT

# thinking: the answer's place is taken by a chain of thought, behind which the answer follows
TEMPLATE = """\
{%- for message in messages -%}
{%- if message.role == 'user' -%}<|user|>{{ message.content }}
{%- elif message.role == 'assistant' -%}
{%- if message.reasoning_content is defined -%}<|think|>{{ message.reasoning_content }}{%- endif -%}
<|answer|>{{ message.content }}<|endoftext|>
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '<|think|>' if enable_thinking else '<|answer|>' }}{%- endif -%}
"""


def save(model, folder, turns):
    """Write a checkpoint folder of a model that reads bytes and the turn tokens {name: id}."""
    with files.whole_folder(folder) as part:
        model.save_pretrained(part, "bytes")
        contents = files.read_json(part / "tokenizer.json")
        vocabulary = contents["model"]["vocab"]
        names = {token: name for name, token in turns.items()}
        contents["model"]["vocab"] = {names.get(token, piece): token for piece, token in vocabulary.items()}
        added = contents["added_tokens"]
        for name, token in turns.items():
            added.append(added[0] | dict(id=token, content=name))
        contents["added_tokens"] = sorted(added, key=token_of)
        files.write_json(part / "tokenizer.json", contents)
        settings = files.read_json(part / "tokenizer_config.json")
        files.write_json(part / "tokenizer_config.json", settings | dict(extra_special_tokens=list(turns)))
        (part / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")


def token_of(entry):
    """The id of an added token."""
    return entry["id"]


def turns_of(folder):
    """-> {name: id} of the turn tokens of a checkpoint folder. ValueError: it has none."""
    folder = files.locate(folder)
    path = folder / "tokenizer.json"
    contents = files.read_json(path) if path.is_file() else {}
    turns = {}
    for entry in contents.get("added_tokens") or ():
        if entry.get("content") != EOT:
            turns[entry.get("content")] = entry.get("id")
    if not {"<|user|>", "<|think|>", "<|answer|>"} <= turns.keys():
        raise ValueError(f"{folder}: its tokenizer names no turn tokens, so it was not trained to chat; use "
                         "a checkpoint of post_train.py, or leave --chat out")
    return turns
