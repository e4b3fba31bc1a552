"""Our π0-FAST against recordings of openpi's own code."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import toys
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
from clp_jax.models.pi0 import Observation, architecture_of
from clp_jax.models.pi0.fast import Pi0Fast, cross_entropy, sample_tokens

LOGIT_TOLERANCE = 5e-5
"""Logits are sums over the width of the deepest hidden states, each with its own HIDDEN_TOLERANCE."""


@pytest.fixture(scope="module", params=["pi0_fast", "pi0_fast_pruned9"])
def case(request):
    params = checkpoint("pi0_fast_released")
    params = pruned(params) if request.param.endswith("pruned9") else params
    return build(architecture_of(params, dtype="float32")), params, recording(request.param)


@pytest.mark.slow
def test_logits_loss_and_hidden_states(case):
    model, params, theirs = case
    g, obs = recording("pi0_fast"), observation("pi0_fast")
    logits, towers = jax.jit(lambda p, o: model.apply({"params": p}, o, capture=True))(params, obs)
    valid = g["tokenized_prompt_mask"][:, :-1]
    wanted = theirs.get("logits", theirs.get("text_logits"))
    assert largest_difference(np.asarray(logits)[valid], wanted[valid]) < OUTPUT_TOLERANCE
    assert largest_difference(cross_entropy(logits, obs), theirs["loss"]) < OUTPUT_TOLERANCE
    if "hidden" in theirs:
        shown = theirs["hidden_idx"]
        seen = np.asarray(towers["vlm"].valid)[:, shown]
        states = np.asarray(towers["vlm"].states)[:, :, shown]
        assert largest_difference(states[:, seen], theirs["hidden"][:, seen]) < HIDDEN_TOLERANCE


class Told(Pi0Fast):
    """Tells of the logits of every step of decoding, as they come."""

    def prefill(self, *args, **kwargs):
        return self._tell(super().prefill(*args, **kwargs))

    def decode(self, *args, **kwargs):
        return self._tell(super().decode(*args, **kwargs))

    def _tell(self, results):
        jax.debug.callback(TOLD.append, results[0], ordered=True)
        return results


TOLD: list[np.ndarray] = []


@pytest.mark.slow
def test_tokens_and_logits_of_every_decoding_step_with_masked_cameras(case):
    """Two of the three observations lack a camera, whose tokens openpi reads with what they make of empty slots."""
    model, params, theirs = case
    g, steps = recording("pi0_fast"), theirs["sampled_tokens"].shape[1]
    prompt = g["sample_tokenized_prompt"]
    obs = dataclasses.replace(
        observation("pi0_fast"),
        tokenized_prompt=prompt,
        tokenized_prompt_mask=g["sample_tokenized_prompt_mask"],
        token_ar_mask=np.zeros_like(prompt),
    )
    assert not all(mask.all() for mask in obs.image_masks.values())
    TOLD.clear()
    told = Told(model.architecture)
    tokens = jax.jit(lambda p, o: sample_tokens(told, p, o, max_decoding_steps=steps))(params, obs)
    assert np.array_equal(tokens, theirs["sampled_tokens"])
    jax.effects_barrier()
    assert len(TOLD) == 1 + steps
    for i, logits in enumerate(TOLD):
        assert largest_difference(logits, theirs["decode_logits"][:, i]) < LOGIT_TOLERANCE, i


class Scripted(Pi0Fast):
    """Says these tokens, one step after another, whatever it is asked."""

    script: tuple[tuple[int, ...], ...] = ()

    def apply(self, _, *args, method, **__):
        words = jax.nn.one_hot(jnp.asarray(self.script), 8)
        if method == "prefill":
            cache = jnp.zeros((1, 2, 1, 1, 1))
            return words[:, 0], (cache, cache), jnp.ones((2, 3), bool)
        _, cache, slot, *_ = args
        return words[:, jnp.minimum(slot - 3 + 1, words.shape[1] - 1)], cache


def test_decoding_ends_with_the_last_sequence_and_leaves_empty_what_follows_an_end():
    script = (5, 1, 1, 6), (4, 7, 1, 6)
    model = Scripted(toys.architecture("pi0_fast"), script=script)
    tokens = sample_tokens(model, {}, Observation.of(toys.data(model.architecture, 2).arrays), max_decoding_steps=4)
    assert tokens.tolist() == [[5, 1, 0, 0], [4, 7, 1, 0]]
