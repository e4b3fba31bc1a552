"""The arithmetic between robot and model, against recordings of openpi."""

import dataclasses
import json

import numpy as np
import pytest
import toys
from hypothesis import given
from hypothesis import strategies as st
from recordings import GOLDEN, recording

from clp_jax.errors import InputError
from clp_jax.models.pi0.processing import Processing
from clp_jax.models.pi0.robots import ALOHA, LIBERO
from clp_jax.processing import norm_stats, transforms
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.tokenizer import discretise, load_tokenizer

STATS = GOLDEN / "ckpt/pi05_released/assets/physical-intelligence/libero/norm_stats.json"


@pytest.fixture(scope="module")
def stats() -> dict[str, NormStats]:
    return norm_stats.load(STATS)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")


@pytest.mark.parametrize("way", ["zscore", "quantile"])
@pytest.mark.parametrize("name", ["state", "actions"])
def test_normalisation_is_openpis_forth_and_back(stats, way, name):
    g, quantiles = recording("transforms"), way == "quantile"
    raw, normal = g[f"norm_in/{name}"], g[f"norm_{way}/{name}"]
    np.testing.assert_allclose(
        transforms.normalise(raw, stats[name], quantiles=quantiles), normal, rtol=1e-5, atol=1e-6
    )
    back = transforms.unnormalise(normal, stats[name], quantiles=quantiles)
    np.testing.assert_allclose(back, g[f"unnorm_{way}/{name}"], rtol=1e-5, atol=1e-6)
    padded = transforms.pad(normal, 32)
    unpadded = transforms.unnormalise(padded, stats[name], quantiles=quantiles)
    np.testing.assert_allclose(unpadded, g[f"unnorm_padded32_{way}/{name}"], rtol=1e-5, atol=2e-6)
    beyond = transforms.unnormalise(padded + 0.5, stats[name], quantiles=quantiles)[..., normal.shape[-1] :]
    np.testing.assert_array_equal(beyond, 0.5)


def test_delta_actions_are_openpis_forth_and_back():
    g = recording("transforms")
    actions, state, mask = g["norm_in/actions"][0], g["norm_in/state"][0], [True] * 6 + [False]
    delta = transforms.to_delta(actions, state, mask)
    np.testing.assert_array_equal(delta, g["delta_actions"])
    np.testing.assert_array_equal(transforms.to_absolute(delta, state, mask), g["absolute_actions"])


def test_resize_is_openpis_to_the_bit():
    g = recording("transforms")
    np.testing.assert_array_equal(transforms.resize_with_pad(g["resize_in"], 224), g["resize_pil_224"])


@pytest.mark.parametrize(("shape", "kept"), [((45, 64), (19, 28)), ((64, 45), (28, 19)), ((21, 64), (9, 28))])
def test_edges_that_are_no_whole_number_of_pixels_are_rounded_down(shape, kept):
    image = transforms.resize_with_pad(np.full((*shape, 3), 255, np.uint8), 28)[..., 0]
    rows, columns = (np.flatnonzero((image > 0).any(axis=axis)) for axis in (1, 0))
    assert (len(rows), len(columns)) == kept
    assert (rows[0], columns[0]) == tuple((28 - n) // 2 for n in kept)


def test_an_image_that_would_vanish_is_refused():
    with pytest.raises(InputError, match="4000 x 50 pixels leaves no row or column in a square of 28"):
        transforms.resize_with_pad(np.zeros((4000, 50, 3), np.uint8), 28)


def test_image_is_parsed_from_floats_and_from_channels_first():
    image = np.arange(2 * 4 * 3, dtype=np.uint8).reshape(2, 4, 3)
    np.testing.assert_array_equal(transforms.parse_image(np.transpose(image, (2, 0, 1))), image)
    np.testing.assert_array_equal(
        transforms.parse_image(image / np.float32(255)), np.trunc(image / np.float32(255) * 255)
    )
    assert not transforms.parse_image(np.full((2, 4, 3), 0.9 / 255)).any()


@pytest.mark.parametrize("case", json.loads((GOLDEN / "golden_tokenizers.json").read_text())["paligemma"])
def test_prompt_is_tokenised_as_by_openpi(tokenizer, case):
    state = None if case["state"] is None else np.array(case["state"], np.float32)
    ids, mask = tokenizer(case["prompt"], case["max_len"], state)
    np.testing.assert_array_equal(ids, case["tokens"])
    np.testing.assert_array_equal(mask, case["mask"])


@pytest.mark.parametrize("case", json.loads((GOLDEN / "golden_tokenizers.json").read_text())["digitize"])
def test_state_falls_into_openpis_bins(case):
    np.testing.assert_array_equal(discretise(np.array(case["state"], np.float32)), case["bins"])


def test_tokenizer_that_is_missing_broken_or_out_of_reach_is_refused(tmp_path, monkeypatch):
    (tmp_path / "x.model").write_bytes(b"no model")
    with pytest.raises(InputError, match="no readable SentencePiece model"):
        load_tokenizer(tmp_path / "x.model")
    with pytest.raises(InputError, match="there is no tokenizer file"):
        load_tokenizer(tmp_path / "y.model")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OPENPI_DATA_HOME", str(tmp_path / "openpi"))
    monkeypatch.setattr("clp_jax.processing.tokenizer.ADDRESS", "http://127.0.0.1:9/nothing")
    with pytest.raises(InputError, match="give the file with --tokenizer"):
        load_tokenizer()


def libero_chain(tag, stats, tokenizer) -> Processing:
    kind = "pi05" if tag.startswith("pi05") else "pi0"
    vision = dataclasses.replace(toys.VISION, patch_size=112)  # 224 pixels
    arch = dataclasses.replace(toys.architecture(kind), vision=vision, action_dim=32, vocab_size=512)
    delta = (True,) * 6 + (False,) if tag == "pi0_extradelta" else ()
    robot = dataclasses.replace(LIBERO, delta=delta)
    return Processing(robot, arch, stats, tokenizer, 10, 64 if kind == "pi05" else 48, tag == "pi05")


@pytest.mark.parametrize("tag", ["pi0", "pi0_extradelta", "pi05", "pi05_nodsi"])
def test_libero_observation_becomes_openpis_model_input(stats, tokenizer, tag):
    g = recording("transforms")
    inputs = libero_chain(tag, stats, tokenizer).inputs(
        state=g["libero_in/observation/state"],
        images={
            "base_0_rgb": g["libero_in/observation/image"],
            "left_wrist_0_rgb": g["libero_in/observation/wrist_image"],
        },
        prompt=json.loads((GOLDEN / "golden_tokenizers.json").read_text())["libero_prompt"],
    )
    compared = {
        key.removeprefix(f"libero_model_in/{tag}/"): g[key] for key in g if key.startswith(f"libero_model_in/{tag}/")
    }
    assert len(compared) >= 6
    assert not compared["image_mask/right_wrist_0_rgb"]
    for key, value in compared.items():
        if key.endswith("/right_wrist_0_rgb"):  # openpi adds the camera, black and masked; we leave it out
            assert key not in inputs
        elif key == "state":
            np.testing.assert_array_equal(inputs[key], value.astype(np.float32))
        else:
            np.testing.assert_array_equal(inputs[key], value)


@pytest.mark.parametrize("tag", ["pi0", "pi0_extradelta", "pi05"])
def test_outputs_undo_inputs(stats, tokenizer, tag):
    rng, g = np.random.default_rng(0), recording("transforms")
    chain = libero_chain(tag, stats, tokenizer)
    state, actions = g["libero_in/observation/state"], rng.standard_normal((10, 7))
    images = dict.fromkeys(chain.cameras, g["libero_in/observation/image"])
    inputs = chain.inputs(state=state, images=images, prompt="go", actions=actions)
    assert inputs["actions"].shape == (10, 32)
    assert not inputs["actions"][:, 7:].any()
    np.testing.assert_allclose(chain.outputs(inputs["actions"], state=state), actions, rtol=1e-5, atol=1e-5)


@given(st.lists(st.floats(0.0, 1.0), min_size=14, max_size=14))
def test_aloha_actions_convert_forth_and_back(values):
    actions = np.array([values])
    back = transforms.aloha_actions_from_pi(transforms.aloha_actions_to_pi(actions))
    np.testing.assert_allclose(back, actions, atol=1e-12)


def test_aloha_units_are_openpis():
    """Values that openpi's aloha_policy gives for these inputs (commit 15a9616)."""
    values = np.linspace(0.0, 1.0, 14).astype(np.float32)
    signs = np.array([1, -1, -1, 1, 1, 1, 0, 1, -1, -1, 1, 1, 1, 0])
    grippers = {"state": (-0.194121568, 0.945652797), "actions": (-0.193992303, 0.9434)}
    found = {"state": transforms.aloha_state_to_pi(values), "actions": transforms.aloha_actions_to_pi(values[None])[0]}
    for name, (left, right) in grippers.items():
        expected = values * signs
        expected[[6, 13]] = left, right
        np.testing.assert_allclose(found[name], expected, rtol=1e-6)
    assert ALOHA.units == "aloha"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"norm_stats": {}}, "lack state and actions"),
        ({"architecture": dataclasses.replace(toys.architecture("pi05"), vocab_size=100)}, "512 tokens, the model 100"),
    ],
)
def test_chain_that_cannot_work_is_refused(stats, tokenizer, change, message):
    with pytest.raises(InputError, match=message):
        dataclasses.replace(libero_chain("pi05", stats, tokenizer), **change)


def test_quantile_normalisation_needs_quantiles(stats, tokenizer):
    bare = {name: NormStats(entry.mean, entry.std) for name, entry in stats.items()}
    with pytest.raises(InputError, match="quantiles, which the norm stats lack"):
        libero_chain("pi05", bare, tokenizer)
    libero_chain("pi0", bare, tokenizer)
