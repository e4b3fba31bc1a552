"""Prompts to token ids, as NVIDIA's processor of Eagle writes them."""

import os

import numpy as np
from etils import epath
from jaxtyping import Bool, Int

from clp_jax.errors import InputError
from clp_jax.models.groot.config_files import EAGLE
from clp_jax.processing.tokenizer_files import FILE, MERGES, VOCABULARY, padding_token, read_tokenizer

_HEAD = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n"
_TAIL = "<|im_end|>\n<|im_start|>assistant\n"
_IMAGE = "<IMG_CONTEXT>"
_DEFAULT, _DEFAULT_PLAIN = "Perform the task.", "Perform the default behavior."


class EagleTokenizer:
    """The tokenizer of the vision-language model.

    Args:
      file: ``tokenizer.json``, or ``vocab.json`` beside its ``merges.txt``; a file beside it names the padding token.

    Raises:
      InputError: a file is broken, nothing says which token is padding, or there is no token for images.
    """

    def __init__(self, file: epath.Path):
        self._model = read_tokenizer(file)
        self._pad = padding_token(self._model, file)
        self._model.no_padding()
        self._model.no_truncation()
        self._model.encode_special_tokens = False
        image = self._model.token_to_id(_IMAGE)
        if image is None:
            raise InputError(
                f"{file} has no token {_IMAGE}; give the tokenizer of Eagle, not that of its language model."
            )
        self.image_token: int = image
        """Stands in the places of the images."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._model.get_vocab_size()

    def __call__(
        self, prompt: str, length: int, *, images: int, tokens_per_image: int, plain: bool = False
    ) -> tuple[Int[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
        """Token ids of images and instruction, and where they are no padding, which is on the left.

        Args:
          prompt: the instruction; upstream's own in place of an empty one. It is written as a list of Python,
            ``['pick up the cup']``: so it reaches the model in lerobot, and in NVIDIA's policy, which has arrays of
            texts.
          length: tokens of the result.
          images: how many there are; they come before the instruction.
          tokens_per_image: places of each.
          plain: write the instruction as it is: so it reaches the model in NVIDIA's training.

        Raises:
          InputError: there are more tokens; nothing is cut, upstream's prompts have any length.
        """
        shown = "".join(f"<image {i + 1}><img>{_IMAGE * tokens_per_image}</img>" for i in range(images))
        text = (prompt or _DEFAULT_PLAIN) if plain else [prompt or _DEFAULT]
        tokens = self._model.encode(f"{_HEAD}{shown}{text}{_TAIL}", add_special_tokens=False).ids
        if len(tokens) > length:
            raise InputError(
                f"the prompt {prompt!r} and {images} images have {len(tokens)} tokens, more than {length}; give a "
                "larger --max-token-len."
            )
        ids = np.full(length, self._pad, np.int32)
        ids[length - len(tokens) :] = tokens
        return ids, np.arange(length) >= length - len(tokens)


def find_tokenizer(path: str | os.PathLike[str] | None, assets: epath.Path | None) -> epath.Path | None:
    """The file of a tokenizer: the one given, else the checkpoint's, in its folder or in ``eagle`` in or beside it.

    Args:
      path: file or folder, which must exist if given.
      assets: NVIDIA's folder, or the ``assets`` of a run with its folder ``policy``.

    Raises:
      InputError: the given path is no tokenizer.
    """
    if path is not None:
        given = epath.Path(path).expanduser()
        file = _in(given) if given.is_dir() else given
        if file is None or not file.exists():
            raise InputError(f"there is no tokenizer {path}; --tokenizer is a {FILE}, a {VOCABULARY} or their folder.")
        return file
    bases = [] if assets is None else [assets / "policy", assets]
    places = [place for base in bases for place in (base, base / EAGLE, base.parent / EAGLE)]
    return next((found for place in places if (found := _in(place)) is not None), None)


def load_tokenizer(path: str | os.PathLike[str] | None, assets: epath.Path | None) -> EagleTokenizer:
    """The tokenizer that `find_tokenizer` finds; nothing is fetched from a network.

    Raises:
      InputError: there is none.
    """
    file = find_tokenizer(path, assets)
    if file is None:
        raise InputError(
            f"the checkpoint does not hold the tokenizer of Eagle; give the folder with its {VOCABULARY}, {MERGES} and "
            "tokenizer_config.json (in NVIDIA's code, and on the hub as lerobot/eagle2hg-processor-groot-n1p5) with "
            "--tokenizer."
        )
    return EagleTokenizer(file)


def _in(folder: epath.Path) -> epath.Path | None:
    """The file of a tokenizer in a folder, one file rather than several."""
    return next((folder / name for name in (FILE, VOCABULARY) if (folder / name).exists()), None)
