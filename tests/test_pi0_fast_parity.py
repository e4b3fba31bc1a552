"""Our π0-FAST against recordings of openpi's own code."""

import dataclasses

import jax
import numpy as np
import pytest
from recordings import (
    HIDDEN_TOLERANCE,
    OUTPUT_TOLERANCE,
    checkpoint,
    largest_difference,
    observation,
    pruned,
    recording,
)

from clp_jax.models import build
from clp_jax.models.pi0 import architecture_of
from clp_jax.models.pi0.fast import compute_loss, sample_tokens

LOGIT_TOLERANCE = 5e-5
"""Logits are sums over the width of the deepest hidden states, each with its own HIDDEN_TOLERANCE."""


@pytest.fixture(scope="module", params=["pi0_fast", "pi0_fast_pruned9"])
def case(request):
    params = checkpoint("pi0_fast_released")
    params = pruned(params) if request.param.endswith("pruned9") else params
    return build(architecture_of(params, dtype="float32")), params, recording(request.param)


def test_logits_loss_and_hidden_states(case):
    model, params, theirs = case
    g, obs = recording("pi0_fast"), observation("pi0_fast")
    logits, towers = jax.jit(lambda p, o: model.apply({"params": p}, o, capture=True))(params, obs)
    valid = g["tokenized_prompt_mask"][:, :-1]
    wanted = theirs.get("logits", theirs.get("text_logits"))
    assert largest_difference(np.asarray(logits)[valid], wanted[valid]) < OUTPUT_TOLERANCE
    assert (
        largest_difference(jax.jit(lambda p, o: compute_loss(model, p, o))(params, obs), theirs["loss"])
        < OUTPUT_TOLERANCE
    )
    if "hidden" in theirs:
        shown = theirs["hidden_idx"]
        seen = np.asarray(towers["vlm"].valid)[:, shown]
        states = np.asarray(towers["vlm"].states)[:, :, shown]
        assert largest_difference(states[:, seen], theirs["hidden"][:, seen]) < HIDDEN_TOLERANCE


def test_greedy_tokens(case):
    model, params, theirs = case
    g = recording("pi0_fast")
    prompt = g["sample_tokenized_prompt"]
    obs = dataclasses.replace(
        observation("pi0_fast"),
        tokenized_prompt=prompt,
        tokenized_prompt_mask=g["sample_tokenized_prompt_mask"],
        token_ar_mask=np.zeros_like(prompt),
    )
    tokens = jax.jit(lambda p, o: sample_tokens(model, p, o, max_decoding_steps=12))(params, obs)
    assert np.array_equal(tokens, theirs["sampled_tokens"])


def test_logits_of_every_decoding_step_with_masked_cameras(case):
    """Two of the three observations lack a camera, whose tokens openpi reads with what they make of empty slots."""
    model, params, theirs = case
    steps = theirs["sampled_tokens"].shape[1]
    g = recording("pi0_fast")
    prompt = g["sample_tokenized_prompt"]
    obs = dataclasses.replace(
        observation("pi0_fast"),
        tokenized_prompt=prompt,
        tokenized_prompt_mask=g["sample_tokenized_prompt_mask"],
        token_ar_mask=np.zeros_like(prompt),
    )
    assert not all(mask.all() for mask in obs.image_masks.values())
    variables = {"params": params}
    logits, kv_cache, valid = jax.jit(lambda v, o: model.apply(v, o, steps, method="prefill"))(variables, obs)
    assert largest_difference(logits, theirs["decode_logits"][:, 0]) < LOGIT_TOLERANCE
    prefix, length = valid.shape[1], np.asarray(valid).sum(axis=1, dtype=np.int32)
    slots = np.arange(prefix + steps)
    decode = jax.jit(lambda v, *inputs: model.apply(v, *inputs, method="decode"))
    for i in range(steps):
        token = theirs["sampled_tokens"][:, i].astype(np.int32)
        visible = (slots >= (prefix - length)[:, None]) & (slots < prefix + i + 1)
        logits, kv_cache = decode(variables, token, kv_cache, np.int32(prefix + i), visible, length + i + 1)
        assert largest_difference(logits, theirs["decode_logits"][:, i + 1]) < LOGIT_TOLERANCE, i
