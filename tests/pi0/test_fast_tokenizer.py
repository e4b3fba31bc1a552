"""Actions as tokens, beside recordings of openpi's own tokenizer with a small vocabulary."""

import json
import logging
import shutil

import huggingface_hub.constants
import numpy as np
import pytest
from etils import epath
from recordings import GOLDEN

from clp_jax.errors import InputError
from clp_jax.models.pi0.fast_tokenizer import FILES, HUB, FastTokenizer, load_action_tokenizer
from clp_jax.processing.tokenizer import load_tokenizer

FAST = GOLDEN / "tokenizer/fast"
RECORDED = json.loads((GOLDEN / "golden_fast_tokenizer.json").read_text())
SCALE = 10
"""By which the recorded tokenizer multiplies coefficients before it rounds them."""


@pytest.fixture(scope="module")
def tokenizer():
    words = load_tokenizer(GOLDEN / "tokenizer/tiny_paligemma.model")
    return FastTokenizer(words, load_action_tokenizer(str(FAST), None))


def array(case, key):
    return None if case[key] is None else np.array(case[key], case[f"{key}_dtype"])


def smooth(seed, horizon=10, dim=7):
    rng, time = np.random.default_rng(seed), np.linspace(0, 1, horizon)[:, None]
    return rng.uniform(-0.5, 0.5, dim) + rng.uniform(-0.3, 0.3, dim) * np.sin(2 * time + rng.uniform(0, 6, dim))


@pytest.mark.parametrize("case", RECORDED["tokenized"])
def test_tokens_and_masks_are_openpis(tokenizer, case):
    found = tokenizer(case["prompt"], case["max_len"], array(case, "state"), array(case, "actions"))
    for ours, theirs in zip(found, ("tokens", "mask", "ar_mask", "loss_mask"), strict=True):
        np.testing.assert_array_equal(ours, case[theirs], err_msg=theirs)
    assert [entry.dtype for entry in found] == [np.int32, bool, np.int32, bool]


@pytest.mark.parametrize("case", RECORDED["decoded"], ids=lambda case: case["what"])
def test_decoded_actions_are_openpis(tokenizer, case):
    shape = case["horizon"], case["dim"]
    found = tokenizer.decode(np.array(case["tokens"], np.int32), *shape)
    if case["actions"] is None:  # openpi's zeros: of tokens that are no chunk, or of actions that are all zero
        assert found is None or not found.any()
    else:
        np.testing.assert_allclose(found, case["actions"], atol=1e-8)
    assert found is None or found.shape == shape


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("size", [(10, 7), (12, 14), (1, 2)])
def test_actions_come_back_within_the_rounding_of_their_coefficients(tokenizer, seed, size):
    """The transform keeps lengths: errors of at most a half in each coefficient are no longer in the actions."""
    actions = smooth(seed, *size)
    tokens = tokenizer("go", 500, np.zeros(8), actions)
    found = tokenizer.decode(tokens.ids[tokens.target], *size)
    errors = np.linalg.norm(found - actions, axis=0)
    assert 0 < errors.max() <= np.sqrt(size[0]) * 0.5 / SCALE


def test_tokens_without_a_chunk_are_told_from_actions_that_are_zero(tokenizer):
    tokens = tokenizer("go", 160, np.zeros(8), np.zeros((10, 7)))
    zeros = tokenizer.decode(tokens.ids[tokens.target], 10, 7)
    assert zeros is not None
    assert not zeros.any()
    for nothing in ([], [1], [0] * 9, tokens.ids[:9], [809] * 9, [tokenizer.vocab_size + 7]):
        assert tokenizer.decode(np.array(nothing, np.int32), 10, 7) is None


def test_bytes_that_are_no_character_are_no_coefficient_of_thousands(tokenizer):
    broken = tokenizer.actions._pairs.token_to_id("ł")  # the byte 0xA0, which begins no character
    added = broken is None and tokenizer.actions._pairs.add_tokens(["\ufffd"])
    ids = [broken if broken is not None else tokenizer.actions.vocab_size - added] * 2
    assert "\ufffd" in tokenizer.actions._pairs.decode(ids)
    assert tokenizer.actions.decode(np.array(ids), 2, 1) is None


def test_actions_that_no_character_spells_are_refused(tokenizer):
    with pytest.raises(InputError, match=r"reach 1e\+06, which the action tokenizer cannot spell; look at the norm"):
        tokenizer("go", 160, np.zeros(8), np.full((10, 7), 1e6))
    with pytest.raises(InputError, match=r"lacks tokens for these actions, the largest of which is 90; it was fitted"):
        tokenizer("go", 160, np.zeros(8), np.full((10, 7), 90.0))


def test_cut_actions_are_warned_of_ever_more_rarely(tokenizer, caplog):
    tokenizer = FastTokenizer(tokenizer.words, tokenizer.actions)
    with caplog.at_level(logging.WARNING):
        for seed in range(9):
            found = tokenizer("pick_up", 50, np.zeros(8), smooth(seed))
            assert found.valid.all()
    assert [record.message.rpartition("(")[2] for record in caplog.records] == [f"{n} so far)." for n in (1, 2, 4, 8)]
    assert "the end of the actions is cut; give a larger --max-token-len" in caplog.text


def test_actions_need_room_in_the_vocabulary_of_words():
    words = load_tokenizer(GOLDEN / "tokenizer/tiny_spm.model")
    actions = load_action_tokenizer(str(FAST), None)
    FastTokenizer(words, actions)
    actions.__class__ = type("Large", (type(actions),), {"vocab_size": 384})
    with pytest.raises(InputError, match="384 action tokens do not fit into a vocabulary of 512"):
        FastTokenizer(words, actions)


def in_hub_cache(cache):
    """A folder of the hub's cache with the two files."""
    home = cache / f"models--{HUB.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs/main").write_text("a" * 40)
    shutil.copytree(FAST, home / "snapshots" / ("a" * 40))


def test_action_tokenizer_is_the_one_given_else_the_checkpoints_else_the_hubs(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="nor cached, nor reachable on the hub; give a folder with its"):
        load_action_tokenizer(None, epath.Path(tmp_path))
    in_hub_cache(tmp_path / "hub")
    assert "hub" in load_action_tokenizer(None, epath.Path(tmp_path)).source
    shutil.copytree(FAST, tmp_path / "fast")
    assert load_action_tokenizer(None, epath.Path(tmp_path)).source == str(tmp_path / "fast")
    given = load_action_tokenizer(str(FAST / "tokenizer.json"), epath.Path(tmp_path))
    assert given.source == str(FAST)
    assert sorted(given.files) == sorted(FILES)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("tokenizer.json", None, r"lacks tokenizer.json; --fast-tokenizer is a folder with both"),
        ("tokenizer.json", "{}", r"tokenizer.json is no readable tokenizer"),
        ("processor_config.json", "{", r"processor_config.json is no valid JSON"),
        ("processor_config.json", '{"scale": 10}', r"no configuration of an action tokenizer: it lacks 'min_token'"),
        ("processor_config.json", '{"scale": 0, "min_token": 1}', r"scale is 0.0, expected a number above 0"),
    ],
)
def test_broken_folder_is_refused(tmp_path, file, content, message):
    folder = shutil.copytree(FAST, tmp_path / "fast")
    (folder / file).unlink()
    if content is not None:
        (folder / file).write_text(content)
    with pytest.raises(InputError, match=message):
        load_action_tokenizer(str(folder), None)
