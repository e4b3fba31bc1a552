"""Training images: openpi's augmentation, beside openpi itself where it is installed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from clp_jax.models.pi0 import CAMERAS
from clp_jax.models.pi0.augmentation import augment_images as augment


@pytest.fixture(scope="module")
def images():
    y, x = jnp.mgrid[-1:1:40j, -1:1:40j]
    pattern = jnp.stack([x, y, jnp.sin(6 * x) * jnp.cos(5 * y)], axis=-1)
    return {camera: jnp.stack([pattern, -pattern, pattern]).astype(jnp.float32) for camera in CAMERAS}


@pytest.fixture(scope="module")
def augmented(images):
    return jax.jit(augment)(jax.random.key(3), images)


def test_images_keep_shape_dtype_and_range(images, augmented):
    assert list(augmented) == list(images)
    for camera, image in augmented.items():
        assert (image.shape, image.dtype) == (images[camera].shape, jnp.float32)
        assert float(jnp.abs(image).max()) <= 1.0 + 1e-6
        assert float(jnp.abs(image - images[camera]).max()) > 0.05


def test_each_observation_has_its_own_numbers_and_the_key_decides(images, augmented):
    base = augmented["base_0_rgb"]
    assert float(jnp.abs(base[0] - base[2]).max()) > 0.05  # the same picture
    again = jax.jit(augment)(jax.random.key(3), images)
    np.testing.assert_array_equal(again["base_0_rgb"], base)


def test_wrist_cameras_change_only_in_colour(images, augmented):
    """Pixels of one colour stay pixels of one colour: nothing moves."""
    flat = {camera: jnp.ones_like(image).at[:, :, 20:].set(-0.5) for camera, image in images.items()}
    changed = jax.jit(augment)(jax.random.key(0), flat)
    for camera in CAMERAS:
        left = np.asarray(changed[camera][:, :, :20])
        assert (np.ptp(left, axis=(1, 2)).max() < 1e-5) == ("wrist" in camera)


def test_augmentation_is_openpis(images, augmented):
    model = pytest.importorskip("openpi.models.model", reason="needs openpi")
    observation = model.Observation(
        images=dict(images),
        image_masks={camera: jnp.ones(3, bool) for camera in CAMERAS},
        state=jnp.zeros((3, 6)),
    )
    theirs = jax.jit(
        lambda key: model.preprocess_observation(key, observation, train=True, image_resolution=(40, 40)).images
    )(jax.random.key(3))
    for camera in CAMERAS:
        np.testing.assert_array_equal(augmented[camera], theirs[camera])
