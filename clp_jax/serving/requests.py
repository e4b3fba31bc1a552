"""What clients send, checked, as a model's inputs; and the model's actions as what clients expect.

A robot's values come under the data set's keys as openpi's clients spell them: ``observation/image`` or ``image``,
``images/cam_high`` or nested maps, with dots or slashes, with or without ``observation`` in front. Keys that nobody
asks for are ignored, as openpi does (ALOHA sends a fourth camera).
"""

import dataclasses
import functools
import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from clp_jax.errors import InputError
from clp_jax.models import Architecture, Lengths, family_of
from clp_jax.models.family import LongPrompts, Processing, over_long
from clp_jax.processing.columns import part

_DEEPEST = 4
"""Maps inside maps of a request: openpi's clients have two."""
_CHARACTERS_PER_TOKEN = 100
"""A prompt of more is refused without tokenising it."""


@dataclasses.dataclass(frozen=True)
class RobotRequests:
    """Requests in a robot's units.

    Attributes:
      processing: between the robot and the model.
      architecture: of the model.
      long_prompts: what becomes of prompts with more tokens than the model reads.
    """

    processing: Processing
    architecture: Architecture
    long_prompts: LongPrompts = "cut"

    @property
    def name(self) -> str:
        """The robot's."""
        return self.processing.robot.name

    @property
    def cameras(self) -> tuple[str, ...]:
        """The model's cameras of which it gets an image."""
        return self.processing.cameras

    @property
    def images(self) -> dict[str, str]:
        """Per camera of the model the key of a request."""
        return {camera: self._key(key) for camera, key in self.processing.robot.images.items()}

    @property
    def keys(self) -> tuple[str, ...]:
        """What a request must hold."""
        state = tuple(dict.fromkeys(map(self._state_key, self.processing.robot.state)))
        return (*self.images.values(), *state, *(() if self._default_prompt is not None else ("prompt",)))

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt, padding included."""
        return self.processing.max_token_len

    @property
    def action_dim(self) -> int:
        """Dimensions of an answer's actions."""
        return self.processing.action_dim

    def inputs(self, values: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Float[np.ndarray, " d"]]:
        """The model's inputs by the keys of `clp_jax.data.calibration`, without a batch axis, and the robot's state.

        Args:
          values: by canonical key, from `flat`.

        Raises:
          InputError: a value is missing or is not what the key says.
        """
        _check_present(values, self.keys)
        state = np.concatenate([np.empty(0), *(self._part(values, text) for text in self.processing.robot.state)])
        self._check_state(state)
        images = {camera: _image(values, key) for camera, key in self.images.items()}
        prompt = _text(values.get("prompt", self._default_prompt))
        if len(prompt) > _CHARACTERS_PER_TOKEN * self.prompt_length:
            raise InputError(f"the prompt has {len(prompt)} characters; {self.prompt_length} tokens cannot hold it.")
        if (phrase := over_long(self.processing, prompt, len(state))) is not None:
            if self.long_prompts == "refuse":
                raise InputError(f"{phrase}; send a shorter one, or serve with a larger --max-token-len.")
            _warn_once(f"{phrase}: the rest is cut; serve with a larger --max-token-len to keep it.")
        with np.errstate(over="ignore"):  # of float64 in float32; what becomes infinite is refused
            inputs = self.processing.inputs(state=state, images=images, prompt=prompt)
        _check_finite(inputs["state"], "the normalised state")
        self._check_sizes(inputs)
        return inputs, state

    def actions(self, sampled: np.ndarray, state: Float[np.ndarray, " d"]) -> Float[np.ndarray, "h rdim"]:
        """The robot's actions from what the model sampled."""
        return self.processing.outputs(sampled, state=state)

    def note(self, sampled: np.ndarray) -> str | None:
        """What a client must know of an answer made of this sample; None where it is as it should be."""
        return self.processing.note(sampled)

    @property
    def _default_prompt(self) -> str | None:
        return self.processing.robot.prompt

    def _key(self, key: str) -> str:
        return canonical(self.processing.robot.client.get(key, key))

    def _state_key(self, text: str) -> str:
        """Key of the request that holds a part of the state: the part's own, else that of its column."""
        return self._key(text if text in self.processing.robot.client else part(text).key)

    def _part(self, values: Mapping[str, Any], text: str) -> Float[np.ndarray, " d"]:
        """A part of the state: what has a key of its own as it is, else what is chosen of its column."""
        robot, chosen = self.processing.robot, part(text)
        key, alone = self._state_key(text), text in robot.client
        vector = _vector(values, key)
        wanted = chosen.width if alone and chosen.width is not None else robot.widths.get(chosen.key)
        if wanted not in (None, len(vector)):
            raise InputError(f"{key} has {len(vector)} dimensions, robot {self.name!r} has {wanted}.")
        return vector if alone else chosen._replace(key=key).of(vector)

    def _check_sizes(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Programs are compiled for one size of each camera, where the model and not the host resizes."""
        lengths = Lengths(self.processing.action_horizon, self.prompt_length)
        described = family_of(self.architecture).inputs(self.architecture, lengths, self.cameras)
        for camera, key in self.images.items():
            found, wanted = inputs[f"image/{camera}"].shape[:2], described[f"image/{camera}"].shape[:2]
            if found != wanted:
                raise InputError(
                    f"{key} is {found[0]} x {found[1]} pixels (height x width); this checkpoint says "
                    f"{wanted[0]} x {wanted[1]}, send that size."
                )

    def _check_state(self, state: np.ndarray) -> None:
        known = len(self.processing.norm_stats["state"].mean) if self.processing.robot.state else 0
        wanted = 14 if self.processing.robot.units == "aloha" else known
        # Statistics as long as the model's actions may be padded: then they do not tell the robot's dimensions.
        padded = self.processing.robot.units != "aloha" and known == self.architecture.action_dim
        if len(state) != wanted and not (padded and self._spread_of_state <= len(state) < known):
            raise InputError(f"the state has {len(state)} dimensions, {self.name} has {wanted}.")

    @property
    def _spread_of_state(self) -> int:
        """Dimensions up to the last one that varies in the statistics: padding does not."""
        return int(max(np.flatnonzero(self.processing.norm_stats["state"].std), default=-1)) + 1


@dataclasses.dataclass(frozen=True)
class ModelRequests:
    """Requests that are the model's inputs already; so are the answers: normalised, padded and relative as trained.

    Attributes:
      architecture: of the model.
      lengths: chunk and prompt.

    Raises:
      InputError: a model that has no actions to answer with.
    """

    architecture: Architecture
    lengths: Lengths
    name = "model-ready"

    def __post_init__(self):
        if (reason := family_of(self.architecture).why_no_actions(self.architecture)) is not None:
            raise InputError(reason)

    @property
    def cameras(self) -> tuple[str, ...]:
        """All of the model's cameras."""
        described = family_of(self.architecture).inputs(self.architecture, self.lengths)
        return tuple(key.removeprefix("image/") for key in described if key.startswith("image/"))

    @property
    def prompt_length(self) -> int:
        """Tokens of a prompt, padding included."""
        return self.lengths.prompt

    @property
    def keys(self) -> tuple[str, ...]:
        """What a request must hold."""
        return tuple(self._rules())

    @property
    def action_dim(self) -> int:
        """Dimensions of an answer's actions."""
        assert self.architecture.action_dim is not None
        return self.architecture.action_dim

    def inputs(self, values: Mapping[str, Any]) -> tuple[dict[str, np.ndarray], Float[np.ndarray, " d"]]:
        """As `RobotRequests.inputs`; masks may be left out where the family knows what that means."""
        rules = self._rules()
        _check_present(values, tuple(canonical(key) for key, leaf in rules.items() if leaf.dtype != np.bool_))
        given = {
            key: _exactly(values, canonical(key), leaf.dtype, leaf.shape)[None]
            for key, leaf in rules.items()
            if canonical(key) in values
        }
        completed = family_of(self.architecture).complete(self.architecture, given)  # a mask that it knows may lack
        _check_present({**values, **{canonical(key): None for key in completed}}, tuple(map(canonical, rules)))
        result = {key: completed[key][0] for key in rules}
        _check_finite(result["state"], "state")
        tokens, seen = result["tokenized_prompt"], result["tokenized_prompt_mask"]
        if tokens.min(initial=0) < 0 or tokens.max(initial=0) >= self.architecture.vocab_size:
            raise InputError(f"tokenized_prompt holds ids beyond the vocabulary of {self.architecture.vocab_size}.")
        if not seen.any() and not any(result.get(f"image_mask/{camera}", True) for camera in self.cameras):
            raise InputError("every camera and the whole prompt are masked; there is nothing to act on.")
        return result, result["state"]

    def actions(
        self, sampled: Float[np.ndarray, "h adim"], state: Float[np.ndarray, " d"]
    ) -> Float[np.ndarray, "h adim"]:
        """The model's actions as they are."""
        del state
        return sampled

    def note(self, sampled: Float[np.ndarray, "h adim"]) -> str | None:
        """Nothing."""
        del sampled

    def _rules(self) -> dict[str, Any]:
        family = family_of(self.architecture)
        described = family.inputs(self.architecture, self.lengths)
        return {key: leaf for key, leaf in described.items() if key not in family.OF_LOSSES}


Requests = RobotRequests | ModelRequests


def flat(request: Any) -> dict[str, Any]:
    """The values of a request by canonical key, maps inside it dissolved.

    Raises:
      InputError: no map, a key that is no text, or a value that is there twice.

    >>> flat({"observation/state": 2, "images": {"cam_high": 1}})
    {'state': 2, 'images/cam_high': 1}
    """
    if not isinstance(request, Mapping):
        raise InputError(f"a request is a map from keys to values, not {type(request).__name__}.")
    values: dict[str, Any] = {}
    waiting: list[tuple[int, str, Any]] = [(1, "", request)]
    while waiting:
        depth, prefix, mapping = waiting.pop()
        if depth > _DEEPEST:
            raise InputError(f"the request holds maps more than {_DEEPEST} deep.")
        for key, value in mapping.items():
            if not isinstance(key, str):
                raise InputError(f"a key of the request is {type(key).__name__}, not text.")
            name = f"{prefix}/{key}" if prefix else key
            if isinstance(value, Mapping):
                waiting.append((depth + 1, name, value))
            elif canonical(name) in values:
                raise InputError(f"the request holds {canonical(name)[:80]!r} twice.")
            else:
                values[canonical(name)] = value
    return values


def canonical(key: str) -> str:
    """One spelling of a key.

    >>> canonical("observation.images.cam_high"), canonical("observation/state"), canonical("state")
    ('images/cam_high', 'state', 'state')
    """
    return key.replace(".", "/").removeprefix("observation/")


def chunk(values: Mapping[str, Any], key: str, horizon: int, dim: int) -> Float[np.ndarray, "h adim"]:
    """An array of the shape of an action chunk, float32, finite.

    Raises:
      InputError: it is anything else.
    """
    array = _array(values, key, "f")
    if array.shape != (horizon, dim):
        raise InputError(f"{key} has shape {array.shape}, expected {(horizon, dim)}.")
    with np.errstate(over="ignore"):  # what becomes infinite is refused
        array = array.astype(np.float32)
    _check_finite(array, key)
    return array


@functools.lru_cache(maxsize=64)
def _warn_once(text: str) -> None:
    """A client repeats its prompt many times a second."""
    logging.getLogger(__name__).warning(text)


def _check_present(values: Mapping[str, Any], keys: tuple[str, ...]) -> None:
    missing = [key for key in keys if key not in values]
    if missing:
        held = ", ".join(sorted(values))[:200] or "nothing"
        raise InputError(f"the request lacks {', '.join(missing)}; it holds {held}.")


def _array(values: Mapping[str, Any], key: str, kinds: str) -> np.ndarray:
    """The value as an array whose dtype is of one of the kinds."""
    names = {"f": "floats", "i": "integers", "u": "unsigned integers", "b": "bools"}
    try:
        array = np.asarray(values[key])
    except ValueError:
        raise InputError(f"{key} is a ragged list, expected an array.") from None
    if array.dtype.kind not in kinds:
        found = array.dtype if array.dtype.kind in names else type(values[key]).__name__
        raise InputError(f"{key} is {found}, expected {' or '.join(names[kind] for kind in kinds)}.")
    return array


def _exactly(values: Mapping[str, Any], key: str, dtype: Any, shape: tuple[int, ...]) -> np.ndarray:
    array = _array(values, key, "fiub")
    if array.dtype != dtype or array.shape != shape:
        raise InputError(f"{key} is {array.dtype} {array.shape}, expected {np.dtype(dtype)} {shape}.")
    return array


def _vector(values: Mapping[str, Any], key: str) -> Float[np.ndarray, " d"]:
    """A part of the state in float64, as openpi's statistics are; a single number is a vector of one."""
    array = np.atleast_1d(_array(values, key, "fiub"))  # a gripper may be open or not
    if array.ndim != 1:
        raise InputError(f"{key} has shape {array.shape}, expected one axis.")
    _check_finite(array, key)
    return array.astype(np.float64)


def _text(prompt: Any) -> str:
    """A prompt: text or its bytes in UTF-8, by itself or the one entry of an array or a list; openpi reads as much."""
    if isinstance(prompt, list) and len(prompt) == 1:
        prompt = prompt[0]
    if isinstance(prompt, np.ndarray) and prompt.size == 1:
        prompt = prompt.item()
    try:
        prompt = prompt.decode() if isinstance(prompt, bytes) else prompt
    except UnicodeDecodeError as error:
        raise InputError(f"the bytes of prompt are no UTF-8: {error.reason} at byte {error.start}.") from None
    if isinstance(prompt, np.ndarray | list):
        raise InputError(f"prompt has {len(prompt)} entries, expected one text.")
    if not isinstance(prompt, str):
        raise InputError(f"prompt is a {type(prompt).__name__}, expected text.")
    return prompt


def _image(values: Mapping[str, Any], key: str) -> np.ndarray:
    """uint8, or float in [0, 1]; three channels, first or last."""
    image = _array(values, key, "uf")
    if image.ndim != 3 or 3 not in (image.shape[0], image.shape[2]):
        raise InputError(f"{key} has shape {image.shape}, expected height, width and 3 channels, or channels first.")
    sides = image.shape[1:] if image.shape[0] == 3 else image.shape[:2]
    if min(sides) * 100 < max(sides) or min(sides) < 1:
        raise InputError(f"{key} is {sides[0]} x {sides[1]} pixels, which is no camera's image.")
    if image.dtype.kind == "u" and image.dtype != np.uint8:
        raise InputError(f"{key} is {image.dtype}, expected uint8, or floats in [0, 1].")
    if image.dtype.kind == "f" and not (image.min() >= 0 and image.max() <= 1):
        raise InputError(f"{key} is float outside [0, 1]; send uint8, or x / 255.")
    return image


def _check_finite(array: np.ndarray, key: str) -> None:
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{key} holds NaN or infinite values.")
