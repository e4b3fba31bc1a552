"""Geometry of the images that SmolVLA's encoder reads, where it is no whole number of pixels."""

import numpy as np
import pytest

from clp_jax.models.smolvla.images import model_image


@pytest.mark.parametrize(("shape", "kept"), [((45, 64), (19, 28)), ((64, 45), (28, 19)), ((21, 64), (9, 28))])
def test_edges_are_rounded_down_and_padding_is_black_on_the_left_and_on_top(shape, kept):
    white = np.full((1, *shape, 3), 255, np.uint8)
    image = np.asarray(model_image(white, 28))[0, :, :, 0]
    assert (image[28 - kept[0] :, 28 - kept[1] :] == 1).all()
    assert (image[: 28 - kept[0]] == -1).all()
    assert (image[:, : 28 - kept[1]] == -1).all()
