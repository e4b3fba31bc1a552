"""π0-FAST: the same vision-language model without an action expert; actions are generated as tokens.

Training positions count all tokens, decoding positions count valid ones and skip the first after the prompt; both are
upstream's, and so are the float32 queries. Source: openpi models/pi0_fast.py and gemma_fast.py, commit 15a9616.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from clp_jax.aliases import Array, Tree
from clp_jax.models.layers.attention import attention_mask, token_positions
from clp_jax.models.layers.scan import Rows
from clp_jax.models.pi0.architecture import Architecture
from clp_jax.models.pi0.flow import PaliGemma, language_gates
from clp_jax.models.pi0.gemma import KVCache
from clp_jax.models.pi0.observation import Observation
from clp_jax.models.towers import Capture, Gates, TowerStates

_END_OF_SEQUENCE = 1


class Pi0Fast(nn.Module):
    """π0-FAST; parameters are openpi's tree."""

    architecture: Architecture
    rows: Rows = None

    def setup(self) -> None:
        self.PaliGemma = PaliGemma(self.architecture, self.rows)

    def __call__(
        self, observation: Observation, *, gates: Gates = Gates(), capture: Capture = False
    ) -> tuple[Float[Array, "b s v"], dict[str, TowerStates]]:
        """Logits for prompt tokens 1, 2, ... (each input predicts the next token; the last is no input).

        Returns:
          Logits [b, prompt - 1, vocab] and the states of ``vision`` and ``vlm`` (empty if not captured).
        """
        tokens, valid, towers = self.PaliGemma.embed_prefix(observation, gates, capture=capture)
        mask = self._mask(observation, valid)[:, :-1, :-1]
        tokens, valid = tokens[:, :-1], valid[:, :-1]
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape[:2])
        (out,), _, states = self.PaliGemma.llm(
            [tokens],
            positions=[positions],
            masks=[mask],
            gates=language_gates(self.architecture, gates),
            capture=capture,
        )
        if states is not None:
            towers |= {"vlm": TowerStates(states[0].states, valid, states[0].writes)}
        return self.PaliGemma.llm.decode(out[:, 1 - observation.tokenized_prompt.shape[1] :]), towers

    def prefill(
        self, observation: Observation, room: int, *, gates: Gates = Gates()
    ) -> tuple[Float[Array, "b v"], KVCache, Bool[Array, "b p"]]:
        """Logits of the first new token, the right-aligned prefix's cache with room for more, and its validity.

        The empty slots are there from the start: a masked camera's tokens see nothing and so take the mean of all
        values, empty slots included, and as openpi has it, later tokens read what comes of that.
        """
        tokens, valid, _ = self.PaliGemma.embed_prefix(observation, gates, capture=False)
        tokens, valid, mask = jax.vmap(_right_align)(tokens, valid, self._mask(observation, valid))
        sizes = self.architecture.vlm
        slots = sizes.depth, tokens.shape[0], tokens.shape[1] + room, sizes.num_kv_heads, sizes.head_dim
        empty = jnp.zeros(slots, self.architecture.dtype)
        (out,), kv_cache, _ = self.PaliGemma.llm(
            [tokens],
            positions=[token_positions(valid)],
            masks=[jnp.pad(mask, ((0, 0), (0, 0), (0, room)))],
            kv_cache=(empty, empty),
            cache_index=jnp.int32(0),
            gates=language_gates(self.architecture, gates),
        )
        return self.PaliGemma.llm.decode(out[:, -1:])[:, 0], kv_cache, valid

    def decode(
        self,
        token: Int[Array, " b"],
        kv_cache: KVCache,
        index: Int[Array, ""],
        visible: Bool[Array, "b s"],
        position: Int[Array, " b"],
        *,
        gates: Gates = Gates(),
    ) -> tuple[Float[Array, "b v"], KVCache]:
        """Logits after one more token, written into the cache's slot ``index``."""
        (out,), kv_cache, _ = self.PaliGemma.llm(
            [self.PaliGemma.llm.embed(token[:, None])],
            positions=[position[:, None]],
            masks=[visible[:, None, :]],
            kv_cache=kv_cache,
            cache_index=index,
            gates=language_gates(self.architecture, gates),
        )
        return self.PaliGemma.llm.decode(out)[:, 0], kv_cache

    def _mask(self, observation: Observation, valid: Bool[Array, "b s"]) -> Bool[Array, "b s s"]:
        prompt_starts = jnp.asarray(observation.token_ar_mask, dtype=jnp.int32)
        image_tokens = valid.shape[1] - prompt_starts.shape[1]
        return attention_mask(valid, jnp.pad(prompt_starts, ((0, 0), (image_tokens, 0))) != 0)


def cross_entropy(logits: Float[Array, "b s v"], observation: Observation) -> Float[Array, " b"]:
    """Of the target tokens, averaged over the targets of each observation."""
    targets = jnp.asarray(observation.tokenized_prompt)[:, 1:]
    log_likelihood = jnp.take_along_axis(jax.nn.log_softmax(logits, axis=-1), targets[..., None], axis=-1)[..., 0]
    return _mean_over_targets(-log_likelihood, observation)


def divergence(
    logits: Float[Array, "b s v"], wanted: Float[Array, "b s v"], observation: Observation
) -> Float[Array, " b"]:
    """KL(wanted || logits) at the places of the target tokens, averaged as `cross_entropy` is.

    Its gradient is that of a cross entropy whose targets are the wanted probabilities; where they agree it is 0.
    """
    ours, theirs = (jax.nn.log_softmax(x.astype(jnp.float32), axis=-1) for x in (logits, wanted))
    return _mean_over_targets(jnp.sum(jnp.exp(theirs) * (theirs - ours), axis=-1), observation)


def _mean_over_targets(each: Float[Array, "b s"], observation: Observation) -> Float[Array, " b"]:
    counted = jnp.asarray(observation.token_loss_mask)[:, 1:].astype(each.dtype)
    return jnp.sum(each * counted, axis=-1) / jnp.clip(jnp.sum(counted, axis=-1), 1)


def sample_tokens(
    model: Pi0Fast, params: Tree, observation: Observation, *, max_decoding_steps: int = 256, gates: Gates = Gates()
) -> Int[Array, "b steps"]:
    """Greedy decoding until every sequence has ended or ``max_decoding_steps``; slots after a sequence's end stay 0.

    (In openpi a batch goes on until all sequences end in one step, and what follows an end is not 0.)
    """
    variables = {"params": params}
    prefilled: Any = model.apply(variables, observation, max_decoding_steps, gates=gates, method="prefill")
    logits, kv_cache, valid = prefilled
    b, prefix = valid.shape
    length = jnp.sum(valid, axis=-1, dtype=jnp.int32)
    slots = jnp.arange(prefix + max_decoding_steps)

    def step(carry):
        i, logits, tokens, kv_cache, ended = carry
        token = jnp.where(ended, 0, jnp.argmax(logits, axis=-1).astype(jnp.int32))
        tokens = tokens.at[:, i].set(token)
        visible = (slots[None, :] >= (prefix - length)[:, None]) & (slots[None, :] < prefix + i + 1)
        logits, kv_cache = model.apply(
            variables, token, kv_cache, prefix + i, visible, length + i + 1, gates=gates, method="decode"
        )
        return i + 1, logits, tokens, kv_cache, ended | (token == _END_OF_SEQUENCE)

    def unfinished(carry):
        i, _, _, _, ended = carry
        return ~jnp.all(ended) & (i < max_decoding_steps)

    start = jnp.int32(0), logits, jnp.zeros((b, max_decoding_steps), jnp.int32), kv_cache, jnp.zeros(b, bool)
    return jax.lax.while_loop(unfinished, step, start)[2]


def _right_align(tokens: Array, valid: Array, mask: Array) -> tuple[Array, Array, Array]:
    """Roll one sequence so that its last valid token is the last of all."""
    shift = -(jnp.max(valid * jnp.arange(valid.shape[0])) + 1)
    return jnp.roll(tokens, shift, axis=0), jnp.roll(valid, shift), jnp.roll(mask, (shift, shift), axis=(0, 1))
