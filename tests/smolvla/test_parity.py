"""SmolVLA against recordings of lerobot 0.6.1."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from smolvla_recordings import (
    CAMERAS,
    HIDDEN_TOLERANCE,
    KEEPS,
    RELATIVE_TOLERANCE,
    SAMPLE_TOLERANCE,
    VELOCITY_TOLERANCE,
    architecture,
    assert_close,
    batch_loss,
    blocks,
    cut,
    grad_norms,
    inputs,
    params,
    parts,
    recording,
)

from clp_jax.errors import InputError
from clp_jax.models import abstract_params, smolvla
from clp_jax.models.layers.torch_rules import to_tensors
from clp_jax.models.smolvla.images import model_image
from clp_jax.models.smolvla.model import cameras_of
from clp_jax.models.smolvla.times import accurate_time_embedding
from clp_jax.trees import difference, flatten, unflatten

PIXEL_TOLERANCE = 1e-6
TIME_TOLERANCE = 5e-7
"""Eight roundings of numbers below 1; in plain float32 the embedding of width 720 is off by 2e-4."""

BF16_APART = 2.0
"""Two roundings, each as far from float32 as lerobot's bfloat16 is, are at most twice that apart."""
BF16_ROUNDING = 1.25
"""On average ours is no further from float32 than lerobot's bfloat16 (measured: 0.9 to 1.1 of it)."""

_VISION_KEYS = "vision_model.encoder.layers.{}.self_attn.k_proj.bias"


def test_images_are_lerobots():
    g = recording()
    for camera in CAMERAS:
        ours = model_image(inputs()[f"image/observation.images.{camera}"], 128)
        assert_close(ours.transpose(0, 3, 1, 2), g[f"image_seen/{camera}"], PIXEL_TOLERANCE)


def test_float_images_of_another_size_are_refused():
    with pytest.raises(InputError, match="120 x 160 pixels is float32; only uint8 images are resized"):
        model_image(np.zeros((1, 120, 160, 3), np.float32), 128)


@pytest.mark.parametrize("width", [36, 720])
def test_time_embedding_is_as_accurate_as_in_float64(width):
    time = np.concatenate([np.linspace(0.001, 1.0, 999), recording()["time"], recording()["sample_t"]])
    time = time.astype(np.float32)
    angle = time.astype(np.float64)[:, None] * 2 * np.pi / (4e-3 * 1e3 ** np.linspace(0.0, 1.0, width // 2))
    exact = np.concatenate([np.sin(angle), np.cos(angle)], axis=1)
    ours = jax.jit(lambda t: accurate_time_embedding(t, width, 4e-3, 4.0))(time)
    np.testing.assert_allclose(ours, exact, rtol=0, atol=TIME_TOLERANCE)


def test_time_embedding_is_lerobots():
    g = recording()
    for time, embedding in (("time", "time_emb"), ("sample_t", "sample_time_emb")):
        assert_close(accurate_time_embedding(g[time], 36, 4e-3, 4.0), g[embedding], TIME_TOLERANCE)


@functools.cache
def program(sizes, parts=("forward", "losses", "sample")):
    """Velocity with states, loss and samples, or some of them, compiled once."""
    model = smolvla.build(sizes)
    steps = smolvla.num_steps(sizes)
    functions = {
        "forward": lambda tree, given, _: smolvla.forward(model, tree, given, capture=True),
        "losses": lambda tree, given, _: smolvla.losses(model, tree, given),
        "sample": lambda tree, given, noise: smolvla.sample(model, tree, given, noise=noise, num_steps=steps),
    }
    run = jax.jit(lambda *arguments: [functions[part](*arguments) for part in parts])
    return lambda tree, given: run(tree, given, recording()["sample_noise"])


@functools.cache
def outputs(dtype="float32"):
    return program(architecture(dtype))(params(), inputs())


def test_prefix_is_lerobots():
    g, model = recording(), smolvla.build(architecture())
    run = jax.jit(lambda p, x: model.apply({"params": p}, x, {}, capture=False, method="embed_prefix"))
    tokens, valid, starts, _ = run(params(), inputs())
    assert_close(tokens, g["prefix_embs"], HIDDEN_TOLERANCE)
    np.testing.assert_array_equal(valid, g["prefix_pad_mask"])
    np.testing.assert_array_equal(starts, g["prefix_att_mask"])


@pytest.mark.slow
def test_states_of_all_blocks_are_lerobots():
    g, (velocity, towers) = recording(), outputs()[0]
    valid = np.asarray(towers["vlm"].valid)
    np.testing.assert_array_equal(valid, g["prefix_pad_mask"])
    assert_close(np.asarray(towers["vlm"].states)[:, valid], g["hidden_prefix"][:, valid], HIDDEN_TOLERANCE)
    assert_close(towers["action"].states, g["hidden_suffix"], HIDDEN_TOLERANCE)
    assert towers["vision"].states.shape == (4, 3, 3 * 64, 40)
    assert_close(velocity, g["v_t"], VELOCITY_TOLERANCE)


@pytest.mark.slow
def test_losses_are_lerobots():
    """Without captured states, so without the dead work of the VLM's last block."""
    g, loss = recording(), outputs()[1]
    np.testing.assert_allclose(loss.each, g["loss_per_sample"], rtol=RELATIVE_TOLERANCE)
    np.testing.assert_allclose(batch_loss(loss), g["loss"], rtol=RELATIVE_TOLERANCE)


@pytest.mark.parametrize(("padded", "recorded"), [(True, "loss"), (False, "loss_no_is_pad")])
def test_weights_of_errors_give_lerobots_loss(padded, recorded):
    g, given = recording(), inputs()
    if not padded:
        del given["action_is_pad"]
    each = (smolvla.error_weights(architecture(), given) * g["loss_elements"]).sum((1, 2))
    within = 7 - g["action_is_pad"].sum(1) if padded else np.full(3, 7)
    np.testing.assert_allclose((within * each).sum() / within.sum(), g[recorded], rtol=RELATIVE_TOLERANCE)


@pytest.mark.slow
def test_draws_of_one_observation_share_its_prefix():
    given, run = inputs(), program(architecture())
    other = {**given, "noise": given["noise"][::-1], "time": given["time"][::-1]}
    both = {key: np.stack([given[key], other[key]], axis=1) for key in ("noise", "time")}
    model = smolvla.build(architecture())
    several = jax.jit(lambda p, x: smolvla.losses(model, p, x).each)(params(), {**given, **both})
    assert several.shape == (3, 2)
    np.testing.assert_allclose(several[:, 0], recording()["loss_per_sample"], rtol=RELATIVE_TOLERANCE)
    np.testing.assert_allclose(several[:, 1], run(params(), other)[1].each, rtol=RELATIVE_TOLERANCE)


def test_sampled_actions_are_lerobots():
    assert_close(outputs()[2], recording()["sampled_padded"], SAMPLE_TOLERANCE)


@functools.cache
def gradients():
    """The gradient of the batch's loss as tensors of the file."""
    model = smolvla.build(architecture())
    tree = jax.jit(jax.grad(lambda p, x: batch_loss(smolvla.losses(model, p, x))))(params(), inputs())
    leaves = flatten(tree)
    shapes = flatten(abstract_params(architecture()))
    return dict(to_tensors(shapes, smolvla.layout(shapes), blocks, lambda path: parts(path, leaves)))


@pytest.mark.slow
def test_gradients_are_lerobots():
    recorded = {key.removeprefix("grad:"): g for key, g in recording().items() if key.startswith("grad:")}
    assert len(recorded) > 20
    for name, theirs in recorded.items():
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(gradients()[name], theirs, rtol=0, atol=1e-5 * scale, err_msg=name)


@pytest.mark.slow
def test_norms_of_gradients_are_lerobots():
    norms = grad_norms()["norms"]
    assert norms.keys() == gradients().keys()
    for name, theirs in norms.items():
        ours = np.linalg.norm(gradients()[name])
        if theirs is None:
            assert ours == 0, name
        elif any(_VISION_KEYS.format(i) in name for i in range(3)):
            assert ours < 1e-6, f"{name}: softmax does not depend on it, what is left is rounding"
        else:
            np.testing.assert_allclose(ours, theirs, rtol=2 * RELATIVE_TOLERANCE, err_msg=name)


@pytest.mark.slow
@pytest.mark.parametrize("prefix", KEEPS)
def test_pruned_model_is_lerobots(prefix):
    keep, g = KEEPS[prefix], recording("_pruned")
    assert tuple(g[f"{prefix}keep"]) == keep
    sizes = architecture().with_depths({"vlm": len(keep), "action": len(keep)})
    tree = cut(params(), keep)
    assert difference(abstract_params(sizes), tree, dtypes=True) == []
    (velocity, towers), loss, actions = program(sizes)(tree, inputs())
    valid = np.asarray(towers["vlm"].valid)
    theirs = g[f"{prefix}hidden_prefix"]
    assert_close(np.asarray(towers["vlm"].states)[:, valid], theirs[:, valid], HIDDEN_TOLERANCE)
    assert_close(towers["action"].states, g[f"{prefix}hidden_suffix"], HIDDEN_TOLERANCE)
    assert_close(velocity, g[f"{prefix}v_t"], VELOCITY_TOLERANCE)
    np.testing.assert_allclose(loss.each, g[f"{prefix}loss_per_sample"], rtol=RELATIVE_TOLERANCE)
    np.testing.assert_allclose(batch_loss(loss), g[f"{prefix}loss"], rtol=RELATIVE_TOLERANCE)
    assert_close(actions[..., :8], g[f"{prefix}sampled_actions"], SAMPLE_TOLERANCE)


def _without(given, camera):
    return {key: value for key, value in given.items() if not key.endswith(f"/observation.images.{camera}")}


def _empty(sizes, count):
    names = tuple(f"observation.images.empty_camera_{i}" for i in range(count))
    return dataclasses.replace(sizes, empty_cameras=count, cameras=sizes.cameras + names)


VARIANTS = {
    "camera_absent": (lambda a: a, lambda x: _without(x, "side")),
    "camera_absent_empty1": (lambda a: _empty(a, 1), lambda x: _without(x, "side")),
    "empty1": (lambda a: _empty(a, 1), lambda x: x),
    "prefix_length48": (lambda a: dataclasses.replace(a, prefix_length=48), lambda x: x),
    "special_tokens": (lambda a: dataclasses.replace(a, image_tokens=(4, 5)), lambda x: x),
    "steps4": (lambda a: dataclasses.replace(a, num_steps=4), lambda x: x),
    "cameras_reversed": (lambda a: dataclasses.replace(a, cameras=a.cameras[::-1]), lambda x: x),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(VARIANTS.keys() - {"steps4"}))
def test_variant_is_lerobots(name):
    change, pick = VARIANTS[name]
    sizes, given, g = change(architecture()), pick(inputs()), recording("_variants")
    velocity, towers = program(sizes, ("forward",))(params(), given)[0]
    tokens, valid = np.asarray(towers["vlm"].states[0]), np.asarray(towers["vlm"].valid)
    np.testing.assert_array_equal(valid, g[f"{name}/prefix_pad_mask"])
    assert_close(tokens[valid], g[f"{name}/prefix_embs"][valid], HIDDEN_TOLERANCE)
    assert_close(velocity, g[f"{name}/v_t"], VELOCITY_TOLERANCE)


@pytest.mark.parametrize("name", ["steps4", "camera_absent_empty1"])
def test_samples_of_a_variant_are_lerobots(name):
    change, pick = VARIANTS[name]
    (actions,) = program(change(architecture()), ("sample",))(params(), pick(inputs()))
    assert_close(actions[..., :8], recording("_variants")[f"{name}/sampled_actions"], SAMPLE_TOLERANCE)


def test_unknown_camera_is_refused():
    with pytest.raises(InputError, match=r"no camera observation.images.back; it has observation.images.top, "):
        cameras_of(architecture(), {"image/observation.images.back": None})
    with pytest.raises(InputError, match="there is no image"):
        cameras_of(architecture(), {})


@pytest.mark.slow
def test_bfloat16_is_lerobots_mixed_model():
    """Rounding is chaotic, so the yardstick is how far lerobot's bfloat16 is from its float32.

    Errors of single elements partly cancel in the loss: it is off by less than their mean, by luck much less.
    """
    g, exact = recording("_bf16"), recording()
    (velocity, towers), loss, actions = outputs("bfloat16")
    assert towers["vlm"].states.dtype == towers["action"].states.dtype == jnp.bfloat16
    assert velocity.dtype == jnp.float32
    given = inputs()
    ours = {
        "loss_elements": (given["noise"] - given["actions"] - np.asarray(velocity)) ** 2,
        "hidden_suffix": np.asarray(towers["action"].states, np.float32),
        "v_t": np.asarray(velocity),
        "sampled_actions": np.asarray(actions)[..., :8],
    }
    for name, array in ours.items():
        theirs = np.abs(g[name] - exact[name])
        assert np.abs(array - g[name]).max() < BF16_APART * theirs.max(), name
        assert np.abs(array - exact[name]).mean() < BF16_ROUNDING * theirs.mean(), name
    counted = np.asarray(smolvla.error_weights(architecture(), given)) > 0
    furthest = np.abs(g["loss_elements"] - exact["loss_elements"])[counted].mean()
    np.testing.assert_allclose(batch_loss(loss), exact["loss"], rtol=0, atol=furthest)


@pytest.mark.slow
def test_bfloat16_keeps_float32_where_lerobot_does():
    """The odd blocks' projections of keys and values, and those of state, time and actions, feel a float32 last bit."""
    step = np.float32(1 + 2.0**-12)
    run, velocity = program(architecture("bfloat16")), np.asarray(outputs("bfloat16")[0][0])
    leaves = flatten(params())
    for path in ("action/odd/v_proj", "action_in_proj/kernel", "action_time_mlp_out/kernel", "action_out_proj/kernel"):
        nudged = unflatten({**leaves, path: leaves[path] * step})
        assert np.abs(np.asarray(run(nudged, inputs())[0][0]) - velocity).max() > 0, path
    nudged = unflatten({**leaves, "action/even/v_proj": leaves["action/even/v_proj"] * step})
    np.testing.assert_array_equal(run(nudged, inputs())[0][0], velocity)
