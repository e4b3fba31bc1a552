"""What a model sees: camera images, state, prompt tokens, and their masks."""

from collections.abc import Mapping
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Float

from clp_jax.aliases import AnyArray, Array, Leaf


@flax.struct.dataclass
class Observation:
    """A batch of observations, with openpi's field names.

    Attributes:
      images: per camera, float32 in [-1, 1] or uint8 [b, h, w, 3].
      image_masks: per camera, True where the image is valid.
      state: robot state, normalised and padded [b, adim].
      tokenized_prompt: token ids [b, s].
      tokenized_prompt_mask: True where a token is not padding [b, s].
      token_ar_mask: π0-FAST only: 1 where a token starts a causal step [b, s].
      token_loss_mask: π0-FAST only: True where a token is a target [b, s].
    """

    images: Mapping[str, Leaf]
    image_masks: Mapping[str, Leaf]
    state: Leaf
    tokenized_prompt: Leaf
    tokenized_prompt_mask: Leaf
    token_ar_mask: Leaf | None = None
    token_loss_mask: Leaf | None = None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Observation":
        """From openpi's nested model-input dictionary (``image``, ``image_mask``, ``state``, ...)."""
        masks = data["image_mask"]
        return cls(
            images=dict(data["image"]),
            image_masks={camera: masks[camera] for camera in data["image"]},
            state=data["state"],
            tokenized_prompt=data["tokenized_prompt"],
            tokenized_prompt_mask=data["tokenized_prompt_mask"],
            token_ar_mask=data.get("token_ar_mask"),
            token_loss_mask=data.get("token_loss_mask"),
        )

    @classmethod
    def of(cls, inputs: Mapping[str, Leaf]) -> "Observation":
        """From arrays by flat key; cameras in sorted order, which is openpi's, whatever the order of the keys."""
        cameras = sorted(key.removeprefix("image/") for key in inputs if key.startswith("image/"))
        return cls(
            images={camera: inputs[f"image/{camera}"] for camera in cameras},
            image_masks={camera: inputs[f"image_mask/{camera}"] for camera in cameras},
            state=inputs["state"],
            tokenized_prompt=inputs["tokenized_prompt"],
            tokenized_prompt_mask=inputs["tokenized_prompt_mask"],
            token_ar_mask=inputs.get("token_ar_mask"),
            token_loss_mask=inputs.get("token_loss_mask"),
        )

    @property
    def batch_size(self) -> int:
        """Observations in the batch."""
        return self.state.shape[0]


def model_image(image: AnyArray, size: int) -> Float[Array, "b h w 3"]:
    """An image batch as the encoder reads it: float32 in [-1, 1], resized with padding to ``size`` pixels.

    uint8 becomes ``x / 255 * 2 - 1``. A different size is resized linearly without distortion and padded with -1, as
    openpi does in shared/image_tools.py.
    """
    x = jnp.asarray(image)
    if x.dtype == jnp.uint8:
        x = x.astype(jnp.float32) / 255.0 * 2.0 - 1.0
    x = x.astype(jnp.float32)
    height, width = x.shape[1:3]
    if (height, width) == (size, size):
        return x
    ratio = max(width / size, height / size)
    new = int(height / ratio), int(width / ratio)
    x = jax.image.resize(x, (x.shape[0], *new, x.shape[3]), "linear").clip(-1.0, 1.0)
    (top, left) = ((size - n) // 2 for n in new)
    padding = ((0, 0), (top, size - new[0] - top), (left, size - new[1] - left), (0, 0))
    return jnp.pad(x, padding, constant_values=-1.0)
