"""Tokenizers in Hugging Face's files, by the ``tokenizers`` library: one file, or vocabulary and merges."""

from typing import Any

from etils import epath

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_json_object, read_text

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

    if file.name == VOCABULARY:
        return _byte_pairs(file.parent)
    text = read_text(file)
    with blamed_on(file, "copy or download it again", verb=f"is no readable {FILE}"):
        return Tokenizer.from_str(text)


def padding_token(model: Any, file: epath.Path) -> int:
    """The id of the padding token.

    Args:
      model: from `read_tokenizer`.
      file: that it was read from; what names the token stands in a file beside it.

    Raises:
      InputError: nothing says which token it is.
    """
    with blamed_on(f"the padding token of {file}"):
        return _padding(model, file)


def _padding(model: Any, file: epath.Path) -> int:
    for place in (file.parent / name for name in BESIDE):
        name = read_json_object(place).get("pad_token") if place.exists() else None
        name = name.get("content") if isinstance(name, dict) else name
        number = None if name is None else model.token_to_id(name)
        if number is not None:
            return number
    if model.padding is not None:
        return model.padding["pad_id"]
    config = file.parent / "config.json"
    said = read_json_object(config) if config.exists() else {}
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
    lines = [line for line in read_text(folder / MERGES).split("\n") if line and not line.startswith("#version")]
    vocabulary = read_json_object(folder / VOCABULARY)
    with blamed_on(folder / MERGES, "copy or download it again", verb=f"does not fit {VOCABULARY}"):
        model = Tokenizer(models.BPE(vocabulary, [tuple(line.split(" ")) for line in lines]))
    model.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(_WORDS), "isolated")
    model.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    model.decoder = decoders.ByteLevel()
    with blamed_on(f"the added tokens of {folder}"):
        added = [(number, AddedToken(**fields)) for number, fields in sorted(_added(folder).items())]
    for number, token in added:
        model.add_tokens([token])
        if (found := model.token_to_id(token.content)) != number:
            raise InputError(
                f"{folder}: the added token {token.content!r} would be {found}, its file says {number}; the files are "
                "not of one tokenizer."
            )
    return model


def _added(folder: epath.Path) -> dict[int, dict[str, Any]]:
    """Tokens beside the vocabulary, by id."""
    config = read_json_object(folder / CONFIG) if (folder / CONFIG).exists() else {}
    if listed := config.get("added_tokens_decoder"):
        return {int(number): dict(fields) for number, fields in listed.items()}
    file = folder / ADDED
    plain = read_json_object(file) if file.exists() else {}
    return {number: {"content": text, "special": True, "normalized": False} for text, number in plain.items()}
