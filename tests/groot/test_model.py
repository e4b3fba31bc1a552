"""What must hold for any GR00T-N1.5: gates, draws, cameras, padding dimensions."""

import dataclasses

import groot_recordings as golden
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from groot_recordings import KEPT, largest_difference

from clp_jax.errors import InputError
from clp_jax.models import groot
from clp_jax.trees import flatten, unflatten

SAME_TOLERANCE = 2e-5
"""The same sums in differently compiled programs: DiT states reach 28, where float32 has steps of 2e-6."""


def gates_of(architecture, kept):
    return {
        name: np.isin(np.arange(architecture.depths[name]), blocks).astype(np.float32)[:, None]
        for name, blocks in kept.items()
    }


@pytest.mark.slow
def test_closed_gates_are_the_pruned_model():
    gated = golden.runner(golden.architecture("ckpt"))(
        golden.checkpoint("ckpt"), golden.inputs(), gates_of(golden.architecture("ckpt"), KEPT)
    )
    pruned = golden.ours("ckpt_pruned")
    assert largest_difference(gated["velocity"], pruned["velocity"]) < SAME_TOLERANCE
    assert largest_difference(gated["actions"], pruned["actions"]) < SAME_TOLERANCE
    for name, kept in KEPT.items():
        states = gated["towers"][name].states
        after = [0, *(block + 1 for block in kept)]
        assert largest_difference(states[np.array(after)], pruned["towers"][name].states) < SAME_TOLERANCE * 10, name


@pytest.mark.slow
def test_a_block_whose_branches_are_zero_is_a_removed_one():
    flat = {path: np.array(leaf) for path, leaf in flatten(golden.checkpoint("ckpt")).items()}
    outputs = ("o/kernel", "down/kernel", "down/bias", "out/kernel", "out/bias")
    for path, leaf in flat.items():
        stack = golden.stack_of(groot.STACKS, path)
        if stack is not None and stack.tower in KEPT and path.endswith(outputs):
            dropped = [row for row, i in enumerate(stack.blocks(len(leaf))) if i not in KEPT[stack.tower]]
            leaf[dropped] = 0.0
    zeroed = golden.runner(golden.architecture("ckpt"))(unflatten(flat), golden.inputs())
    assert largest_difference(zeroed["velocity"], golden.ours("ckpt_pruned")["velocity"]) < SAME_TOLERANCE


@pytest.mark.slow
def test_an_odd_number_of_dit_blocks_ends_with_one_that_reads_the_prompt():
    kept = {"dit": [0, 5, 8], "vision": [0, 2]}
    architecture = golden.architecture("ckpt")
    pruned = golden.sliced(golden.checkpoint("ckpt"), kept)
    shorter = golden.runner(architecture.with_depths({"dit": 3, "vision": 2}))(pruned, golden.inputs())
    gated = golden.runner(architecture)(golden.checkpoint("ckpt"), golden.inputs(), gates_of(architecture, kept))
    assert largest_difference(gated["velocity"], shorter["velocity"]) < SAME_TOLERANCE
    assert largest_difference(gated["actions"], shorter["actions"]) < SAME_TOLERANCE
    assert shorter["towers"]["dit"].states.shape[0] == 4
    ungated = golden.runner(architecture.with_depths({"dit": 3, "vision": 2}))
    open_gates = {"dit": np.ones((3, 1), np.float32)}
    again = ungated(pruned, golden.inputs(), open_gates)
    assert largest_difference(again["velocity"], shorter["velocity"]) < SAME_TOLERANCE


@pytest.mark.slow
def test_a_gate_per_observation_closes_a_block_for_that_observation():
    architecture, params, inputs = golden.architecture("ckpt_pruned"), golden.checkpoint("ckpt_pruned"), golden.inputs()
    model = groot.build(architecture)
    gates = {name: jnp.ones((depth, 3)).at[:, 1].set(0.0) for name, depth in architecture.depths.items()}
    run = jax.jit(lambda params, gates: groot.forward(model, params, inputs, gates=gates)[0])
    velocity = run(params, gates)
    whole = golden.ours("ckpt_pruned")["velocity"]
    assert largest_difference(velocity[::2], whole[::2]) < SAME_TOLERANCE
    assert largest_difference(velocity[1], whole[1]) > 0.1


@pytest.mark.slow
def test_draws_of_noise_share_a_pass_over_the_prompt():
    architecture, params, inputs = golden.architecture("ckpt_pruned"), golden.checkpoint("ckpt_pruned"), golden.inputs()
    drawn = inputs | {
        "noise": np.stack([inputs["noise"], inputs["sample_noise"]], axis=1),
        "time": np.stack([inputs["time"], inputs["time"][::-1]], axis=1),
    }
    model = groot.build(architecture)
    loss = jax.jit(lambda params, inputs: groot.losses(model, params, inputs))
    both = loss(params, drawn)
    assert both.each.shape == (3, 2)
    for j in range(2):
        one = loss(params, inputs | {"noise": drawn["noise"][:, j], "time": drawn["time"][:, j]})
        assert largest_difference(both.each[:, j], one.each) < SAME_TOLERANCE
        np.testing.assert_array_equal(both.weight, one.weight)
    towers = jax.eval_shape(lambda p: groot.forward(model, p, drawn, capture=True)[1], params)
    assert {name: tower.states.shape[1] for name, tower in towers.items()} == {"vision": 3, "llm": 3, "vl": 3, "dit": 6}


def test_images_fill_the_prompt_in_the_order_of_their_cameras():
    architecture, params, inputs = golden.architecture("ckpt_pruned"), golden.checkpoint("ckpt_pruned"), golden.inputs()
    ids = inputs["tokenized_prompt"]
    twice = np.concatenate([np.full((3, 16), architecture.image_token, np.int32), ids], axis=1)
    inputs |= {"tokenized_prompt": twice, "tokenized_prompt_mask": np.ones(twice.shape, bool)}
    first, second = inputs.pop("image/ego_view"), np.zeros((3, 56, 56, 3), np.uint8)
    model = groot.build(architecture)

    def prompt(**images):
        @jax.jit  # a dict that is its argument would have its keys sorted
        def states(params):
            _, towers = groot.forward(model, params, {**images, **inputs}, capture=True)
            return towers["llm"].states[0], towers["vision"].states[0]

        return states(params)

    embedded, states = prompt(**{"image/wrist": second, "image/ego": first})
    other, _ = prompt(**{"image/ego": second, "image/wrist": first})
    assert states.shape[:2] == (3, 32)
    places = np.asarray(twice[0] == architecture.image_token).nonzero()[0]
    np.testing.assert_allclose(embedded[0, places[:16]], other[0, places[16:]], atol=SAME_TOLERANCE)
    np.testing.assert_allclose(embedded[0, places[16:]], other[0, places[:16]], atol=SAME_TOLERANCE)
    assert not np.allclose(embedded[0, places[:16]], other[0, places[:16]], atol=1e-2)
    # The recorded embeddings are those of the images that the prompt had room for.
    np.testing.assert_allclose(embedded[0, places[:16]], golden.recording()["mlp1_out"][0], atol=5e-5)


def test_images_are_upstream_s_pixel_values():
    u8 = golden.inputs()["image/ego_view"]
    pixels = np.asarray(groot.model_image(u8, 56))
    # XLA turns the division by 255 into a product: one step of float32.
    assert largest_difference(pixels.transpose(0, 3, 1, 2), golden.recording()["pixel_values"]) < 2e-7
    np.testing.assert_array_equal(groot.model_image(pixels, 56), pixels)
    with pytest.raises(InputError, match="resize it"):
        groot.model_image(u8, 224)


def test_times_are_upstream_s():
    architecture = golden.architecture("ckpt")
    batch = {"actions": np.zeros((4000, 5, 7), np.float32)}
    drawn, _ = groot.draw(architecture, jax.random.key(0), batch)
    fixed = groot.fixed_draw(architecture, batch)
    # Beta(1.5, 1) has mean 0.6 and a fifth of its mass below 0.342.
    for time in (np.asarray(drawn["time"]), fixed["time"]):
        assert abs(time.mean() - (0.999 - 0.6) / 0.999) < 0.01
        assert abs((time > (0.999 - 0.342) / 0.999).mean() - 0.2) < 0.02
        assert time.min() > -0.0011 and time.max() < 1.0
    several, _ = groot.draw(architecture, jax.random.key(0), {"actions": np.zeros((2, 5, 7))}, samples=3)
    assert several["noise"].shape == (2, 3, 5, 7) and several["time"].shape == (2, 3)


def test_an_observation_without_a_counted_dimension_has_no_loss():
    architecture = golden.architecture("ckpt")
    inputs = golden.inputs()
    inputs["action_mask"] = inputs["action_mask"] & np.array([True, True, False])[:, None, None]
    weights = np.asarray(groot.error_weights(architecture, inputs))
    np.testing.assert_allclose(weights.sum(axis=(1, 2)), [1.0, 1.0, 0.0], rtol=1e-6)
    del inputs["action_mask"]
    np.testing.assert_allclose(groot.error_weights(architecture, inputs), 1 / 35, rtol=1e-6)


def test_inputs_are_completed_or_refused():
    architecture, inputs = golden.architecture("ckpt"), golden.inputs()
    without = {key: array for key, array in inputs.items() if key != "action_mask"}
    assert groot.complete(architecture, without)["action_mask"].all()
    assert groot.complete(architecture, inputs)["action_mask"] is inputs["action_mask"]
    with pytest.raises(InputError, match=r"16 image tokens .* hold 16 for each image"):
        groot.complete(architecture, inputs | {"image/wrist": inputs["image/ego_view"]})
    with pytest.raises(InputError, match="from 0 to 3"):
        groot.complete(architecture, inputs | {"embodiment_id": np.array([1, 31, 0])})


@pytest.mark.slow
def test_augmented_images_are_other_views_of_the_same_scene():
    image = golden.inputs()["image/ego_view"].astype(np.float32) / 127.5 - 1
    inputs = {"image/a": image, "image/b": image, "state": np.zeros((3, 10))}
    architecture = dataclasses.replace(golden.architecture("ckpt"), cameras=("a", "b"))
    augmented = jax.jit(lambda key: groot.augment(architecture, key, inputs))(jax.random.key(1))
    changed = np.asarray(augmented["image/a"])
    assert changed.shape == image.shape and changed.min() >= -1 and changed.max() <= 1
    np.testing.assert_allclose(changed, augmented["image/b"], atol=1e-6)
    assert np.abs(changed - image).mean() > 0.02
    grey = np.full((1, 56, 56, 3), 0.5, np.float32)
    out = np.asarray(groot.augment(architecture, jax.random.key(2), {"image/a": grey})["image/a"])
    np.testing.assert_allclose(out, out[0, 0, 0, 0], atol=1e-5)
