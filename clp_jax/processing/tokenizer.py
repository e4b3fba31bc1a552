"""Prompts to PaliGemma's token ids, as openpi's tokenizer writes them (models/tokenizer.py)."""

import os
import secrets
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import read_bytes

FILE = "paligemma_tokenizer.model"
ADDRESS = f"https://storage.googleapis.com/big_vision/{FILE}"
"""Public; openpi fetches the same file from gs://big_vision."""


class PromptTokenizer:
    """A SentencePiece model with openpi's prompt formats.

    Args:
      model: content of a ``.model`` file.
    """

    def __init__(self, model: bytes):
        import sentencepiece

        self._pieces = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._pieces.vocab_size()

    def pieces(self, text: str, *, begin: bool = False, end: bool = False) -> list[int]:
        """Token ids of a text as it is, perhaps with the marks of a sequence's begin and end."""
        return self._pieces.encode(text, add_bos=begin, add_eos=end)

    def text(self, ids: list[int]) -> str:
        """The text that token ids spell; marks and padding spell nothing."""
        return self._pieces.decode(ids)

    def __call__(
        self, prompt: str, length: int, state: Float[np.ndarray, " d"] | None = None
    ) -> tuple[Int[np.ndarray, " s"], Bool[np.ndarray, " s"]]:
        """Token ids of a prompt and where they are no padding.

        As in openpi, tokens beyond ``length`` are cut, and with them the words that ask for an action.

        Args:
          prompt: the instruction.
          length: tokens of the result, padding (0) included.
          state: as for `encode`.
        """
        tokens = self.encode(prompt, state)[:length]
        ids = np.zeros(length, np.int32)
        ids[: len(tokens)] = tokens
        return ids, np.arange(length) < len(tokens)

    def encode(self, prompt: str, state: Float[np.ndarray, " d"] | None = None) -> list[int]:
        r"""All token ids of a prompt.

        Args:
          prompt: the instruction.
          state: normalised state that the prompt spells in 256 bins over [-1, 1] (π0.5), None for π0's format, the
            instruction and a line break.
        """
        text = prompt.strip().replace("_", " ").replace("\n", " ")
        if state is None:
            return self.pieces(text, begin=True) + self.pieces("\n")
        bins = " ".join(map(str, discretise(state)))
        return self.pieces(f"Task: {text}, State: {bins};\nAction: ", begin=True)


def discretise(state: Float[np.ndarray, " d"]) -> Int[np.ndarray, " d"]:
    """The bin of each value among 256 over [-1, 1]; -1 below, 255 above.

    >>> discretise(np.array([-1.2, -1.0, 0.0, 3.0])).tolist()
    [-1, 0, 128, 255]
    """
    return np.digitize(state, bins=np.linspace(-1, 1, 257)[:-1]) - 1


def load_tokenizer(path: str | os.PathLike[str] | None = None, *, assets: epath.Path | None = None) -> PromptTokenizer:
    """PaliGemma's tokenizer: from a file, a checkpoint's assets, a cache, or the network.

    Args:
      path: SentencePiece ``.model`` file; must exist if given.
      assets: a checkpoint's ``assets`` folder, perhaps with the file in it.

    Raises:
      InputError: the file is missing or broken, or there is none anywhere and no network.
    """
    if path is not None:
        file = epath.Path(path).expanduser()
        if not file.exists():  # etils 1.12 calls everything a file that is no folder
            raise InputError(f"there is no tokenizer file {path}.")
    else:
        file = next((found for found in _candidates(assets) if found.exists()), None) or _download()
    content = read_bytes(file)
    with blamed_on(file, "copy or download it again", verb="is no readable SentencePiece model"):
        return PromptTokenizer(content)


def _candidates(assets: epath.Path | None) -> list[epath.Path]:
    openpi = Path(os.environ.get("OPENPI_DATA_HOME", "~/.cache/openpi")).expanduser()
    beside = [] if assets is None else [assets / FILE]
    return [*beside, epath.Path(_cache()), epath.Path(openpi / "big_vision" / FILE)]


def _cache() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "clp_jax" / FILE


def _download() -> epath.Path:
    """The file in our cache, where it appears complete or not at all."""
    target = _cache()
    partial = target.with_name(f"{FILE}.{secrets.token_hex(4)}.partial")
    try:
        with urllib.request.urlopen(ADDRESS, timeout=30) as response:
            content = response.read()
    except (urllib.error.URLError, OSError) as error:
        raise InputError(
            f"PaliGemma's tokenizer is neither cached nor reachable at {ADDRESS}; give the file with --tokenizer."
        ) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    partial.write_bytes(content)
    partial.replace(target)
    return epath.Path(target)
