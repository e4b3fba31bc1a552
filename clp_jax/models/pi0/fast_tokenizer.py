"""Actions as tokens and back, as openpi writes them for π0-FAST.

A chunk of normalised actions is cosine-transformed along time, scaled and rounded; each coefficient becomes one
character, and byte pairs over these characters become tokens, which take places at the end of PaliGemma's vocabulary.
Facts: openpi models/tokenizer.py at commit 15a9616, and the processor of physical-intelligence/fast on the hub.
"""

import itertools
import logging
import os
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
from etils import epath
from jaxtyping import Bool, Float, Int

from clp_jax.errors import InputError, blamed_on
from clp_jax.files import parse_json, read_bytes
from clp_jax.processing.tokenizer import PromptTokenizer, discretise

logger = logging.getLogger(__name__)

FOLDER = "fast"
"""Below a checkpoint's assets: the files of the action tokenizer."""
HUB = "physical-intelligence/fast"
_TOKENIZER, _CONFIG = FILES = ("tokenizer.json", "processor_config.json")
_SPECIAL = 128
"""The last tokens of PaliGemma's vocabulary, which actions leave alone."""
_SURROGATES = 0xD800
"""The first number that stands for no character."""
_UNREADABLE = "\ufffd"
"""What takes the place of bytes that are no character."""


class ActionTokenizer:
    """Chunks of normalised actions to tokens of their own vocabulary, and back.

    Args:
      files: content of ``tokenizer.json`` and ``processor_config.json``.
      source: where they are from, for messages.

    Raises:
      InputError: a file is broken.
    """

    def __init__(self, files: dict[str, bytes], source: str):
        import tokenizers

        self.files, self.source = files, source
        try:
            self._pairs = tokenizers.Tokenizer.from_str(files[_TOKENIZER].decode())
        except Exception as error:  # the library raises bare exceptions
            reason = str(error).split("\n")[0]
            raise InputError(f"{source}/{_TOKENIZER} is no readable tokenizer: {reason}") from error
        self._scale, self._lowest = _settings(files[_CONFIG], f"{source}/{_CONFIG}")

    @property
    def vocab_size(self) -> int:
        """Number of tokens."""
        return self._pairs.get_vocab_size()

    def encode(self, actions: Float[np.ndarray, "h adim"]) -> list[int]:
        """Tokens of a chunk; coefficients below the lowest that has a character become that one, as in openpi.

        Raises:
          InputError: the actions are too large for any character, or this tokenizer lacks tokens that they need.
        """
        from scipy.fft import dct

        coefficients = np.around(np.asarray(dct(actions, axis=0, norm="ortho")) * self._scale)
        codes = np.maximum(coefficients - self._lowest, 0).ravel()
        if codes.max(initial=0) >= _SURROGATES:
            raise InputError(
                f"normalised actions reach {np.abs(actions).max():.3g}, which the action tokenizer cannot spell; look "
                "at the norm stats: do the 1 % and 99 % quantiles of a dimension nearly coincide?"
            )
        text = "".join(map(chr, codes.astype(int)))
        ids = self._pairs.encode(text).ids
        if self._pairs.decode(ids, skip_special_tokens=False) != text:
            raise InputError(
                f"the action tokenizer in {self.source} lacks tokens for these actions, the largest of which is "
                f"{np.abs(actions).max():.3g}; it was fitted to others. Fit it anew, or take {HUB}."
            )
        return ids

    def decode(self, ids: Int[np.ndarray, " t"], horizon: int, dim: int) -> Float[np.ndarray, "h adim"] | None:
        """The chunk, up to rounding; None if the tokens spell no chunk of this size.

        Openpi takes bytes that are no character for a coefficient of some thousands; here they spell no chunk.
        """
        from scipy.fft import idct

        if (ids < 0).any():
            return None
        text = self._pairs.decode(ids.tolist(), skip_special_tokens=False)
        if len(text) != horizon * dim or _UNREADABLE in text:
            return None
        coefficients = np.array([ord(character) for character in text]) + self._lowest
        return idct(coefficients.reshape(horizon, dim) / self._scale, axis=0, norm="ortho")


class Tokens(NamedTuple):
    """What π0-FAST reads of words, state and actions, padded on the right.

    Attributes:
      ids: token ids.
      valid: True where a token is no padding.
      causal: 1 where a token sees only what is before it: the actions.
      target: True where a token is to be learnt: the actions.
    """

    ids: Int[np.ndarray, " s"]
    valid: Bool[np.ndarray, " s"]
    causal: Int[np.ndarray, " s"]
    target: Bool[np.ndarray, " s"]


class FastTokenizer:
    """Prompts with states and actions in openpi's form.

    Args:
      words: PaliGemma's tokenizer.
      actions: the action tokenizer.

    Raises:
      InputError: PaliGemma's vocabulary has no room for that many action tokens.
    """

    def __init__(self, words: PromptTokenizer, actions: ActionTokenizer):
        self.words, self.actions = words, actions
        self._last = words.vocab_size - 1 - _SPECIAL
        self._cut, self._undecodable = itertools.count(1), itertools.count(1)
        if actions.vocab_size > self._last:
            raise InputError(
                f"{actions.vocab_size} action tokens do not fit into a vocabulary of {words.vocab_size}; give "
                "PaliGemma's tokenizer with --tokenizer and its action tokenizer with --fast-tokenizer."
            )

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self.words.vocab_size

    def prefix(self, prompt: str, state: Float[np.ndarray, " d"]) -> list[int]:
        """Tokens of an instruction and of a normalised state in 256 bins over [-1, 1]; all of them."""
        text = prompt.lower().strip().replace("_", " ")
        bins = " ".join(map(str, discretise(state)))
        return self.words.pieces(f"Task: {text}, State: {bins};\n", begin=True)

    def __call__(
        self,
        prompt: str,
        length: int,
        state: Float[np.ndarray, " d"],
        actions: Float[np.ndarray, "h adim"] | None = None,
    ) -> Tokens:
        """Tokens of an observation.

        As in openpi, tokens beyond ``length`` are cut: actions lose their last movements, and a warning says so.

        Args:
          prompt: the instruction.
          length: tokens of the result, padding (0) included.
          state: normalised, not padded.
          actions: the chunk to learn, normalised, not padded; None where the model is to find it.
        """
        prefix, suffix = self.prefix(prompt, state), [] if actions is None else self._suffix(actions)
        tokens = [*prefix, *suffix][:length]
        if suffix and len(prefix) + len(suffix) > length:
            _now_and_then(
                self._cut,
                f"the state, actions and words of {prompt[:80]!r} have {len(prefix) + len(suffix)} tokens, more than "
                f"{length}: the end of the actions is cut; give a larger --max-token-len",
            )
        places, ids = np.arange(length), np.zeros(length, np.int32)
        ids[: len(tokens)] = tokens
        valid = places < len(tokens)
        learnt = valid & (places >= len(prefix))
        return Tokens(ids, valid, learnt.astype(np.int32), learnt)

    def decode(self, tokens: Int[np.ndarray, " t"], horizon: int, dim: int) -> Float[np.ndarray, "h adim"] | None:
        """Normalised actions of what a model wrote; None if it wrote no chunk of this size.

        As in openpi, tokens become text and what stands between "Action: " and "|" becomes tokens again.
        """
        if tokens.max(initial=0) >= self.words.vocab_size:
            return None
        _, found, rest = self.words.text(tokens.tolist()).partition("Action: ")
        if not found:
            return None
        written = rest.split("Action: ")[0].split("|")[0].strip()
        return self.actions.decode(self._last - np.array(self.words.pieces(written), int), horizon, dim)

    def warn_of_undecodable(self) -> None:
        """Says in the log that an answer held no actions, ever more rarely."""
        _now_and_then(self._undecodable, "the model wrote no actions: zeros, the middle of the range, stand for them")

    def _suffix(self, actions: Float[np.ndarray, "h adim"]) -> list[int]:
        ids = [self._last - number for number in self.actions.encode(actions)]
        return [*self.words.pieces("Action: "), *ids, *self.words.pieces("|", end=True)]


def load_action_tokenizer(path: str | os.PathLike[str] | None, assets: epath.Path | None) -> ActionTokenizer:
    """The action tokenizer: the folder given, the checkpoint's, or the hub's, cached or fetched.

    Args:
      path: folder with its two files, or one of them; must exist if given.
      assets: a checkpoint's ``assets`` folder, perhaps with a folder ``fast`` in it.

    Raises:
      InputError: a file is missing or broken, or there is none anywhere and no network.
    """
    if path is not None:
        given = epath.Path(path).expanduser()
        folder = given if given.is_dir() else given.parent
    elif assets is not None and (assets / FOLDER).is_dir():
        folder = assets / FOLDER
    else:
        folder = _of_hub()
    missing = [name for name in FILES if not (folder / name).exists()]
    if missing:
        raise InputError(f"{folder} lacks {' and '.join(missing)}; --fast-tokenizer is a folder with both, as {HUB}.")
    return ActionTokenizer({name: read_bytes(folder / name) for name in FILES}, str(folder))


def _of_hub() -> epath.Path:
    """The folder in the hub's cache, where it is fetched to if it is not there."""
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    wanted: dict[str, Any] = {"repo_id": HUB, "allow_patterns": FILES}
    try:
        return epath.Path(huggingface_hub.snapshot_download(**wanted, local_files_only=True))
    except LocalEntryNotFoundError:
        pass
    try:
        return epath.Path(huggingface_hub.snapshot_download(**wanted))
    except Exception as error:  # of the network, in many classes
        raise InputError(
            f"the action tokenizer {HUB} is neither in the checkpoint's assets/{FOLDER}, nor cached, nor reachable on "
            f"the hub; give a folder with its {' and '.join(FILES)} as --fast-tokenizer."
        ) from error


def _settings(content: bytes, source: str) -> tuple[float, int]:
    """Scale and lowest coefficient."""
    value = parse_json(content, source)
    with blamed_on(source, "copy it again", verb="is no configuration of an action tokenizer"):
        scale, lowest = float(value["scale"]), int(value["min_token"])
    if not 0 < scale < float("inf"):
        raise InputError(f"{source}: scale is {scale}, expected a number above 0.")
    return scale, lowest


def _now_and_then(count: Iterator[int], text: str) -> None:
    """A warning the 1st, 2nd, 4th, 8th... time."""
    number = next(count)
    if number & (number - 1) == 0:
        logger.warning("%s (%d so far).", text, number)
