"""Prompts to token ids, as lerobot's processor of SmolVLA writes them, by the ``tokenizers`` library."""

import os

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.folders import leads_out
from clp_jax.processing.policy_files import tokenizer_name
from clp_jax.processing.tokenizer_files import FILE, padding_token, read_tokenizer


class VlmTokenizer:
    """The tokenizer of a vision-language model.

    Args:
      file: ``tokenizer.json``; the name of its padding token stands in a file beside it.

    Raises:
      InputError: the file is broken, or nothing says which token is padding.
    """

    def __init__(self, file: epath.Path):
        self._model = read_tokenizer(file)
        self._pad = padding_token(self._model, file)
        self._model.no_padding()
        self._model.no_truncation()

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._model.get_vocab_size()

    def __call__(self, prompt: str, length: int) -> tuple[Int[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
        """Token ids of a prompt and where they are no padding.

        As in lerobot, tokens beyond ``length`` are cut.

        Args:
          prompt: the instruction.
          length: tokens of the result, padding on the right included.
        """
        tokens = self.encode(prompt)[:length]
        ids = np.full(length, self._pad, np.int32)
        ids[: len(tokens)] = tokens
        return ids, np.arange(length) < len(tokens)

    def encode(self, prompt: str) -> list[int]:
        """All token ids of a prompt; a line break is added where it does not end in one."""
        return self._model.encode(prompt if prompt.endswith("\n") else f"{prompt}\n").ids


def find_tokenizer(path: str | os.PathLike[str] | None, assets: epath.Path | None) -> epath.Path | None:
    """``tokenizer.json``: the one given, or that of a checkpoint; None if a checkpoint has none.

    It is looked for in the checkpoint, in its folder ``vlm``, and in the folders that ``vlm_model_name`` of its
    ``config.json`` and the tokenizer's name in its ``policy_preprocessor.json`` point at, in or beside it. A
    name that leads out of a folder is not followed.

    Args:
      path: file or folder, which must exist if given.
      assets: a policy folder, or the ``assets`` of a run with its folder ``policy``.

    Raises:
      InputError: the given path is no tokenizer.
    """
    if path is not None:
        given = epath.Path(path).expanduser()
        file = given / FILE if given.is_dir() else given
        if not file.exists():
            raise InputError(f"there is no tokenizer {file}; --tokenizer is a tokenizer.json or its folder.")
        return file
    folders = [] if assets is None else [assets / "policy", assets]
    folders = [folder for folder in folders if (folder / "config.json").exists()]
    for folder in folders:
        config = read_json_object(folder / "config.json")
        named = (config.get("vlm_model_name"), tokenizer_name(folder))
        names = [name for name in named if name and not leads_out(name)]
        places = [folder, folder / "vlm", *(base / name for name in names for base in (folder, folder.parent))]
        if (file := next((place / FILE for place in places if (place / FILE).exists()), None)) is not None:
            return file
    return None


def load_tokenizer(path: str | os.PathLike[str] | None, assets: epath.Path | None) -> VlmTokenizer:
    """The tokenizer that `find_tokenizer` finds; nothing is fetched from a network.

    Raises:
      InputError: there is none.
    """
    file = find_tokenizer(path, assets)
    if file is None:
        raise InputError(
            "the checkpoint does not hold the tokenizer of its vision-language model; download tokenizer.json and "
            "tokenizer_config.json of the model that vlm_model_name in config.json names, and give their folder with "
            "--tokenizer."
        )
    return VlmTokenizer(file)
