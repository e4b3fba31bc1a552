"""What π0's encoder is given: cameras in openpi's order, pixels resized as openpi's image_tools does it."""

import numpy as np
import pytest
import toys
from recordings import recording

from clp_jax.models.pi0 import Observation
from clp_jax.models.pi0.observation import model_image


def test_resized_pixels_are_openpis():
    """openpi's resizing of uint8 rounds to a whole step of 2 / 255, ours stays in float32."""
    g = recording("transforms")
    ours = np.asarray(model_image(g["resize_in"][None], 224))[0]
    assert np.abs((ours + 1) / 2 * 255 - g["resize_jax_224_u8"]).max() < 0.5 + 1e-3


@pytest.mark.parametrize("scale", [1, 255])
def test_pixels_span_minus_one_to_one(scale):
    image = np.array([0, scale], np.uint8).reshape(1, 1, 2, 1).repeat(3, axis=3).repeat(2, axis=1)
    np.testing.assert_allclose(model_image(image, 2)[0, 0, :, 0], [-1, scale / 255 * 2 - 1], rtol=1e-6)


@pytest.mark.parametrize(("shape", "kept"), [((45, 64), (19, 28)), ((64, 45), (28, 19)), ((21, 64), (9, 28))])
def test_edges_are_rounded_down_and_padding_is_black_on_both_sides(shape, kept):
    white = np.full((1, *shape, 3), 255, np.uint8)
    image = np.asarray(model_image(white, 28))[0, :, :, 0]
    rows, columns = (np.flatnonzero((image > 0).any(axis=axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == kept
    assert (rows[0], columns[0]) == tuple((28 - n) // 2 for n in kept)
    outside = np.delete(image, rows, axis=0) if kept[0] < 28 else np.delete(image, columns, axis=1)
    assert (outside == -1).all()


def test_cameras_are_read_in_openpis_order_whatever_the_order_of_the_keys():
    arrays = toys.data(toys.architecture(), 2).arrays
    backwards = dict(reversed(arrays.items()))
    assert list(Observation.of(backwards).images) == ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
    for camera, image in Observation.of(backwards).images.items():
        np.testing.assert_array_equal(image, arrays[f"image/{camera}"])
