"""What lerobot's processors of GR00T made of a robot's numbers, pictures and words, and of its actions."""

import dataclasses
import json
import shutil

import groot_recordings as golden
import numpy as np
import pytest
from etils import epath
from groot_recordings import GOLDEN

from clp_jax.data import open_dataset
from clp_jax.errors import InputError
from clp_jax.models import groot
from clp_jax.models.family import Lengths
from clp_jax.models.groot.pictures import stretched
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot

pytest.importorskip("tokenizers")

ROBOT = Robot("toy", {"wrist": "observation.images.wrist", "front": "observation.images.front"})
RECORDED = {"state": "observation.state", "actions": "action"}


@pytest.fixture(scope="module")
def recorded() -> dict:
    return golden.recording("processor")


@pytest.fixture(scope="module")
def tokenizer():
    return groot.load_tokenizer(golden.architecture("ckpt"), None, epath.Path(GOLDEN / "ckpt"))


def statistics(recorded) -> dict[str, NormStats]:
    bounds = {
        name: [recorded[f"stats/{key}/{bound}"].astype(float) for bound in ("min", "max")]
        for name, key in RECORDED.items()
    }
    return {name: NormStats((low + high) / 2, high - low, min=low, max=high) for name, (low, high) in bounds.items()}


@pytest.fixture(scope="module")
def processing(recorded, tokenizer):
    a = golden.architecture("ckpt", embodiment="so100", cameras=("front", "wrist"))
    return groot.processing(a, ROBOT, statistics(recorded), tokenizer, Lengths(5, 104))


def observation(recorded, row: int) -> dict:
    images = {camera: recorded[f"image/{camera}"][row] for camera in ROBOT.images}
    return {"state": recorded["state"][row], "images": images, "prompt": json.loads(str(recorded["tasks"]))[row]}


def held(chunk: np.ndarray, horizon: int) -> np.ndarray:
    return chunk[np.minimum(np.arange(horizon), len(chunk) - 1)]


@pytest.mark.parametrize("row", range(3))
def test_inputs_are_lerobots(recorded, processing, row):
    found = processing.inputs(**observation(recorded, row), actions=held(recorded["action"][row], 5))
    theirs = {key.removeprefix(f"out{row}/"): array for key, array in recorded.items() if key.startswith(f"out{row}/")}
    assert np.array_equal(found["state"], theirs["state"])
    assert np.array_equal(found["actions"], theirs["action"])
    assert np.array_equal(found["action_mask"], theirs["action_mask"])
    assert found["embodiment_id"] == theirs["embodiment_id"] == 2
    length = len(theirs["input_ids"])
    assert np.array_equal(found["tokenized_prompt"][-length:], theirs["input_ids"])
    assert found["tokenized_prompt_mask"].tolist() == [False] * (104 - length) + [True] * length
    assert np.array_equal(found["context_mask"], found["tokenized_prompt_mask"])
    for camera, pixels in zip(processing.cameras, theirs["pixel_values"], strict=True):
        levels = np.rint((pixels.transpose(1, 2, 0) * 0.5 + 0.5) * 255)
        assert np.abs(found[f"image/{camera}"] - levels).max() <= 1
        assert (found[f"image/{camera}"] != levels).mean() < 0.02
    described = groot.inputs(processing.architecture, Lengths(5, 104), processing.cameras)
    assert {key: (array.shape, array.dtype) for key, array in found.items()} == {
        key: (leaf.shape, leaf.dtype) for key, leaf in described.items()
    }


def test_prompts_are_padded_as_in_a_batch_of_upstreams(recorded, tokenizer):
    for i, task in enumerate(json.loads(str(recorded["tasks"]))):
        ids, mask = tokenizer(task, 57, images=0, tokens_per_image=16)
        assert np.array_equal(ids, recorded["padded/input_ids"][i])
        assert np.array_equal(mask, recorded["padded/attention_mask"][i].astype(bool))


def test_isaacs_instructions_are_written_as_they_are(processing, tokenizer):
    isaac = dataclasses.replace(processing, robot=dataclasses.replace(ROBOT, processor="isaac"))
    for one, said in ((isaac, "pick up a cup"), (processing, "['pick up a cup']")):
        ids = one._tokens("pick up a cup")[0]
        assert f"</img>{said}<|im_end|>" in tokenizer._model.decode(ids, skip_special_tokens=False)
    ids = isaac._tokens("")[0]
    assert "</img>Perform the default behavior.<|im_end|>" in tokenizer._model.decode(ids, skip_special_tokens=False)


def test_outputs_are_lerobots(recorded, processing):
    found = processing.outputs(recorded["model_actions"], state=recorded["state"][0])
    assert np.array_equal(found, recorded["robot_actions"])


def test_a_dimension_that_never_changes_is_zero_and_nothing_is_clipped(recorded, processing):
    state = recorded["stats/observation.state/max"] + np.float32(5)
    found = processing.inputs(**observation(recorded, 0) | {"state": state})["state"]
    assert found[2] == 0
    assert (np.delete(found[:6], 2) > 1).all()


def test_images_of_floats_and_of_channels_first_are_the_same(recorded, processing):
    given = observation(recorded, 1)
    images = {camera: image.transpose(2, 0, 1) for camera, image in given["images"].items()}
    again = processing.inputs(**given | {"images": images})
    for camera in processing.cameras:
        assert np.array_equal(again[f"image/{camera}"], processing.inputs(**given)[f"image/{camera}"])
    plain = np.full((5, 9, 3), 0.5)
    assert (processing.inputs(**given | {"images": dict.fromkeys(ROBOT.images, plain)})["image/front"] == 127).all()


def test_a_tall_image_is_made_narrow_before_it_is_made_low(recorded):
    levels = np.rint((recorded["tall_pixel_values"].transpose(1, 2, 0) * 0.5 + 0.5) * 255)
    assert np.abs(stretched(recorded["tall"], 56) - levels).max() <= 1


def test_an_image_of_the_models_size_stays_as_it_is(recorded):
    image = np.arange(4 * 4 * 3, dtype=np.uint8).reshape(4, 4, 3)
    assert stretched(image, 4) is image


def test_what_does_not_fit_is_refused(recorded, processing, tokenizer):
    a, stats = processing.architecture, processing.norm_stats
    for message, changes in {
        "delta": {"robot": dataclasses.replace(ROBOT, delta=(True,))},
        "--embodiment one of new_embodiment": {"architecture": dataclasses.replace(a, embodiment=None)},
        r"'gr1' has number 24, the model has weights for 4": {"architecture": dataclasses.replace(a, embodiment="gr1")},
        "lack min and max of actions": {
            "norm_stats": stats | {"actions": dataclasses.replace(stats["actions"], min=None, max=None)}
        },
        "lack actions": {"norm_stats": {"state": stats["state"]}},
        "token 327 in the tokenizer and 326 in": {"architecture": dataclasses.replace(a, image_token=326)},
        "330 tokens, the model 329": {"architecture": dataclasses.replace(a, vocab_size=329)},
    }.items():
        with pytest.raises(InputError, match=message):
            dataclasses.replace(processing, **changes)
    with pytest.raises(InputError, match="state have 7 dimensions, the statistics 6"):
        processing.check_dims(7, 5)
    with pytest.raises(InputError, match="leave out --state-in-prompt"):
        groot.processing(a, ROBOT, stats, tokenizer, Lengths(5, 104), state_in_prompt=True)
    with pytest.raises(InputError, match=r"'push' and 2 images have \d+ tokens, more than 40; give a larger"):
        dataclasses.replace(processing, max_token_len=40).prompt_tokens("push", 6)
    wide = {name: NormStats(*[np.ones(11)] * 2, min=-np.ones(11), max=np.ones(11)) for name in RECORDED}
    with pytest.raises(InputError, match="state have 11 dimensions, the model at most 10"):
        dataclasses.replace(processing, norm_stats=wide).check_dims(11, 11)


def test_a_tokenizer_is_found_or_asked_for(tmp_path, tokenizer):
    a = golden.architecture("ckpt")
    ids = tokenizer("push", 40, images=0, tokens_per_image=16)[0]
    for where in ("inside", "policy/eagle", "eagle"):
        step = epath.Path(tmp_path / where.replace("/", "_") / "step")
        step.mkdir(parents=True)
        with pytest.raises(InputError, match="--tokenizer"):
            groot.load_tokenizer(a, None, step)
        target = {"inside": step, "policy/eagle": step / where, "eagle": step.parent / where}[where]
        shutil.copytree(GOLDEN / "eagle", target, dirs_exist_ok=True)
        found = groot.load_tokenizer(a, None, step)("push", 40, images=0, tokens_per_image=16)[0]
        assert np.array_equal(found, ids)
    (tmp_path / "none").mkdir()
    with pytest.raises(InputError, match="there is no tokenizer"):
        groot.load_tokenizer(a, str(tmp_path / "none"), None)


def test_one_file_is_the_same_tokenizer(tmp_path, tokenizer):
    tokenizer._model.save(str(tmp_path / "tokenizer.json"))
    with pytest.raises(InputError, match="padding token"):
        groot.load_tokenizer(golden.architecture("ckpt"), str(tmp_path), None)
    shutil.copy(GOLDEN / "eagle/tokenizer_config.json", tmp_path)
    again = groot.load_tokenizer(golden.architecture("ckpt"), str(tmp_path / "tokenizer.json"), None)
    for ours, theirs in zip(
        again("l'été", 60, images=1, tokens_per_image=2),
        tokenizer("l'été", 60, images=1, tokens_per_image=2),
        strict=True,
    ):
        assert np.array_equal(ours, theirs)


def test_files_of_a_tokenizer_that_contradict_each_other_are_refused(tmp_path):
    for name in ("vocab.json", "tokenizer_config.json"):
        shutil.copy(GOLDEN / "eagle" / name, tmp_path)
    a = golden.architecture("ckpt")
    with pytest.raises(InputError, match=r"vocab.json without merges.txt"):
        groot.load_tokenizer(a, str(tmp_path), None)
    shutil.copy(GOLDEN / "eagle/merges.txt", tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    del config["added_tokens_decoder"]["321"]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"'<\|im_end\|>' would be 321, its file says 322"):
        groot.load_tokenizer(a, str(tmp_path), None)
    shutil.copy(GOLDEN / "eagle/added_tokens.json", tmp_path)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"pad_token": "<|endoftext|>"}))
    assert groot.load_tokenizer(a, str(tmp_path), None).image_token == 327
    vocabulary = json.loads((tmp_path / "added_tokens.json").read_text())
    (tmp_path / "added_tokens.json").write_text(json.dumps(dict(list(vocabulary.items())[:3])))
    with pytest.raises(InputError, match="has no token <IMG_CONTEXT>"):
        groot.load_tokenizer(a, str(tmp_path), None)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"320": 5}}))
    with pytest.raises(InputError, match=r"the added tokens of .* cannot be read"):
        groot.load_tokenizer(a, str(tmp_path), None)
    (tmp_path / "vocab.json").write_text("[1")
    with pytest.raises(InputError, match=r"vocab\.json is no valid JSON"):
        groot.load_tokenizer(a, str(tmp_path), None)


def test_observations_of_which_no_action_counts_are_refused(tmp_path):
    arrays = {key: value for key, value in golden.inputs().items() if key not in ("noise", "time", "sample_noise")}
    np.savez(tmp_path / "data.npz", **(arrays | {"action_mask": np.zeros_like(arrays["action_mask"], bool)}))
    with pytest.raises(InputError, match="action_mask leave no action of any observation"):
        open_dataset(tmp_path / "data.npz", golden.architecture("ckpt"))
