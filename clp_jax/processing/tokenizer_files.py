"""Tokenizers in Hugging Face's files, by the ``tokenizers`` library: one file, or vocabulary and merges."""

import json
from typing import Any

from etils import epath

from clp_jax.errors import InputError

FILE = "tokenizer.json"
VOCABULARY, MERGES = "vocab.json", "merges.txt"
CONFIG, SPECIAL = "tokenizer_config.json", "special_tokens_map.json"
ADDED = "added_tokens.json"
ALL = (FILE, VOCABULARY, MERGES, CONFIG, SPECIAL, ADDED)
"""Every file that a tokenizer may have."""
BESIDE = (CONFIG, SPECIAL)
"""Files that may name the padding token."""

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Where Qwen's tokenizers split text before they merge bytes; no file of vocabulary and merges says it."""


def read_tokenizer(file: epath.Path) -> Any:
    """A tokenizer without padding or truncation.

    Args:
      file: ``tokenizer.json``; or ``vocab.json`` of a tokenizer of Qwen's, beside its ``merges.txt`` and what names
        its added tokens (``tokenizer_config.json`` or ``added_tokens.json``).

    Raises:
      InputError: a file is missing or broken.
    """
    from tokenizers import Tokenizer

    try:
        return _byte_pairs(file.parent) if file.name == VOCABULARY else Tokenizer.from_str(file.read_text())
    except InputError:
        raise
    except Exception as error:  # the library raises bare exceptions
        reason = str(error).split("\n")[0]
        raise InputError(f"{file} is no readable {file.name}: {reason}") from error


def padding_token(model: Any, file: epath.Path) -> int:
    """The id of the padding token.

    Args:
      model: from `read_tokenizer`.
      file: that it was read from; what names the token stands in a file beside it.

    Raises:
      InputError: nothing says which token it is.
    """
    for place in (file.parent / name for name in BESIDE):
        name = json.loads(place.read_text()).get("pad_token") if place.exists() else None
        name = name.get("content") if isinstance(name, dict) else name
        number = None if name is None else model.token_to_id(name)
        if number is not None:
            return number
    if model.padding is not None:
        return model.padding["pad_id"]
    config = file.parent / "config.json"
    said = json.loads(config.read_text()) if config.exists() else {}
    for part in (said, said.get("text_config", {})):
        if part.get("pad_token_id") is not None:
            return part["pad_token_id"]
    raise InputError(
        f"neither {file} nor config.json, {' nor '.join(BESIDE)} beside it name a padding token; copy them there."
    )


def _byte_pairs(folder: epath.Path) -> Any:
    """Merges of bytes with Qwen's rules around them."""
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

    if not (folder / MERGES).exists():
        raise InputError(f"{folder} has {VOCABULARY} without {MERGES}; copy it there.")
    lines = [line for line in (folder / MERGES).read_text().split("\n") if line and not line.startswith("#version")]
    merges = [tuple(line.split(" ")) for line in lines]
    model = Tokenizer(models.BPE(json.loads((folder / VOCABULARY).read_text()), merges))
    model.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    for number, fields in sorted(_added(folder).items()):
        model.add_tokens([AddedToken(**fields)])
        if model.token_to_id(fields["content"]) != number:
            raise InputError(
                f"{folder}: the added token {fields['content']!r} would be {model.token_to_id(fields['content'])}, its "
                f"file says {number}; the files are not of one tokenizer."
            )
    return model


def _added(folder: epath.Path) -> dict[int, dict[str, Any]]:
    """Tokens beside the vocabulary, by id."""
    config = json.loads((folder / CONFIG).read_text()) if (folder / CONFIG).exists() else {}
    if listed := config.get("added_tokens_decoder"):
        return {int(number): dict(fields) for number, fields in listed.items()}
    file = folder / ADDED
    plain = json.loads(file.read_text()) if file.exists() else {}
    return {number: {"content": text, "special": True, "normalized": False} for text, number in plain.items()}
