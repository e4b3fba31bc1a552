"""Faults of π0, π0.5, π0-FAST and of what all models share."""

from mutants.mutant import Mutant, faults

_PARITY = "tests/test_models_parity.py"
_PI0 = f"{_PARITY}::test_hidden_states_of_every_block[pi0] {_PARITY}::test_velocity_and_loss[pi0]"
_PI05 = f"{_PARITY}::test_hidden_states_of_every_block[pi05] {_PARITY}::test_velocity_and_loss[pi05]"
_MASKS = f"{_PARITY}::test_prefix_tokens_and_masks[pi0]"
_SAMPLED = f"{_PARITY}::test_sampled_actions[pi0]"
_PRECISION = "tests/test_precision.py"
_FAST = "tests/test_pi0_fast_parity.py"
_CONTRACT = "tests/test_family_contract.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/models/layers/attention.py",
        f"{_MASKS} {_PI0}",
        ("rope-base", "base: float = 10_000.0", "base: float = 9_000.0"),
        ("rope-direction", "second * cos + first * sin", "second * cos - first * sin"),
        ("positions-from-one", "jnp.cumsum(valid, axis=1) - 1", "jnp.cumsum(valid, axis=1)"),
        ("mask-strictly-earlier", "block[:, None, :] <= block[:, :, None]", "block[:, None, :] < block[:, :, None]"),
        ("mask-padding-is-seen", " & valid[:, None, :] & valid", " & valid"),
    ),
    *faults(
        "clp_jax/models/layers/attention.py",
        f"{_PRECISION}::test_gemma_attention {_PRECISION}::test_smolvla_attention {_PRECISION}::test_the_order_of_the_axes_of_logits_changes_nothing",
        (
            "attention-rounded-scores",
            "q, keys, preferred_element_type=jnp.float32)",
            "q, keys, preferred_element_type=keys.dtype)",
        ),
        (
            "attention-rounded-softmax",
            "jax.nn.softmax(jnp.where(seen, logits, masked), axis=-1)",
            "jax.nn.softmax(jnp.where(seen, logits, masked).astype(values.dtype), axis=-1)",
        ),
        ("attention-blind-read", "weights = jnp.where(seen.any(", "jnp.where(seen.any("),
    ),
    *faults(
        "clp_jax/models/layers/flow.py",
        _PI0,
        ("time-longest-period", "= 4e-3, 4.0", "= 4e-3, 4.01"),
    ),
    *faults(
        "clp_jax/models/layers/flow.py",
        f"{_PARITY}::test_gradients[pi0]",
        ("time-runs-back", "t * noise + (1 - t) * per_draw", "(1 - t) * noise + t * per_draw"),
    ),
    *faults(
        "clp_jax/models/layers/gating.py",
        f"{_CONTRACT}::test_gate_zero_is_the_pruned_model[pi0]",
        ("gate-inverted", "(1 - gate) * x + gate * y", "gate * x + (1 - gate) * y"),
    ),
    *faults(
        "clp_jax/models/layers/siglip.py",
        _MASKS,
        (
            "siglip-exact-gelu",
            "hidden = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, **init)(x))",
            "hidden = nn.gelu(nn.Dense(self.mlp_dim, dtype=self.dtype, **init)(x), approximate=False)",
        ),
    ),
    *faults(
        "clp_jax/models/layers/siglip.py",
        f"{_PRECISION}::test_siglip_patches_and_positions",
        ("siglip-patches-rounded", 'name="embedding", dtype=jnp.float32', 'name="embedding", dtype=self.dtype'),
    ),
    *faults(
        "clp_jax/models/pi0/flow.py",
        f"{_MASKS} {_PI0}",
        (
            "positions-of-the-suffix",
            "jnp.sum(prefix_valid, axis=-1, dtype=jnp.int32)[:, None]",
            "prefix_valid.shape[1]",
        ),
        (
            "state-sees-actions",
            "[jnp.ones(1, dtype=bool), first_action]",
            "[jnp.ones(1, dtype=bool), jnp.zeros_like(first_action)]",
        ),
        ("camera-masks-shuffled", "jnp.repeat(masks, tokens, axis=1)", "jnp.tile(masks, (1, tokens))"),
    ),
    *faults(
        "clp_jax/models/pi0/flow.py",
        _SAMPLED,
        ("sampling-step", "dt = -1.0 / num_steps", "dt = -1.0 / (num_steps + 1)"),
    ),
    *faults(
        "clp_jax/models/layers/flow.py",
        f"{_PARITY}::test_gradients[pi0] tests/smolvla/test_parity.py::test_losses_are_lerobots",
        ("loss-sign-of-noise", "return noise - per_draw(actions, time)", "return per_draw(actions, time) - noise"),
    ),
    *faults(
        "clp_jax/models/pi0/flow.py",
        f"{_PARITY}::test_noise_and_times_are_those_of_openpi",
        ("draw-other-times", "1.5, 1, shape[:1]) * 0.999 + 0.001", "1.5, 1, shape[:1]) * 0.999"),
        (
            "draw-keys-swapped",
            "_, noise_rng, time_rng = jax.random.split(rng, 3)",
            "_, time_rng, noise_rng = jax.random.split(rng, 3)",
        ),
    ),
    *faults(
        "clp_jax/models/pi0/gemma.py",
        _PI0,
        ("rms-epsilon", "keepdims=True) + 1e-6", "keepdims=True) + 1e-4"),
        ("embedding-scale", "return x * jnp.sqrt(self.width).astype(x.dtype)", "return x"),
        (
            "keys-and-values-swapped",
            'k, v = self.kv[i]("BSD,2KDH->2BSKH", x)',
            'v, k = self.kv[i]("BSD,2KDH->2BSKH", x)',
        ),
    ),
    *faults(
        "clp_jax/models/pi0/gemma.py",
        _PI05,
        (
            "adarms-scale",
            "normed * (1 + scale).astype(jnp.float32) + shift",
            "normed * scale.astype(jnp.float32) + shift",
        ),
        ("adarms-order", "scale, shift, gate = jnp.split(modulation", "shift, scale, gate = jnp.split(modulation"),
        ("adarms-without-gate", "x + (update if gate is None else update * gate)", "x + update"),
    ),
    *faults(
        "clp_jax/models/pi0/gemma.py",
        "tests/test_dead_work.py",
        ("dead-block-too-early", "jnp.arange(1, depth + 1) < depth", "jnp.arange(1, depth + 1) < depth - 1"),
    ),
    *faults(
        "clp_jax/models/pi0/gemma.py",
        f"{_PRECISION}::test_gemma_attention {_PRECISION}::test_norms {_PRECISION}::test_pi0_rounds_its_rotated_queries_and_pi0_fast_does_not",
        ("gemma-rounded-norm", "        x = x.astype(jnp.float32)\n        # `1 + scale`", "        # `1 + scale`"),
        ("fast-rounded-queries", "(q if self.float32_queries else q.astype(values.dtype))", "q.astype(values.dtype)"),
        ("pi0-float32-queries", "(q if self.float32_queries else q.astype(values.dtype))", "q"),
    ),
    *faults(
        "clp_jax/models/pi0/fast.py",
        f"{_FAST}::test_tokens_and_logits_of_every_decoding_step_with_masked_cameras[pi0_fast] {_FAST}::test_logits_loss_and_hidden_states[pi0_fast]",
        (
            "fast-slot",
            "variables, token, kv_cache, prefix + i, visible,",
            "variables, token, kv_cache, prefix + i + 1, visible,",
        ),
        ("fast-position", "visible, length + i + 1,", "visible, length + i,"),
        ("fast-sees-itself-not", "(slots[None, :] < prefix + i + 1)", "(slots[None, :] < prefix + i)"),
        (
            "fast-without-room",
            "jnp.pad(mask, ((0, 0), (0, 0), (0, room)))",
            "jnp.pad(mask, ((0, 0), (0, 0), (0, room)), constant_values=True)",
        ),
        (
            "fast-prefill-positions",
            "positions=[token_positions(valid)]",
            "positions=[jnp.broadcast_to(jnp.arange(valid.shape[1]), valid.shape)]",
        ),
        ("fast-prefix-is-causal", "(image_tokens, 0))) != 0", "(image_tokens, 0))) == 0"),
        (
            "fast-loss-of-other-tokens",
            "jnp.asarray(observation.token_loss_mask)[:, 1:]",
            "jnp.asarray(observation.token_loss_mask)[:, :-1]",
        ),
    ),
    *faults(
        "clp_jax/models/pi0/fast.py",
        f"{_FAST}::test_decoding_ends_with_the_last_sequence_and_leaves_empty_what_follows_an_end",
        ("fast-ends-with-the-first", "return ~jnp.all(ended) & (i", "return ~jnp.any(ended) & (i"),
        (
            "fast-goes-on-after-the-end",
            "token = jnp.where(ended, 0, jnp.argmax(",
            "token = jnp.where(False, 0, jnp.argmax(",
        ),
    ),
    *faults(
        "clp_jax/models/pi0/observation.py",
        "tests/test_observation.py",
        (
            "pi0-resize-rounded",
            "int(height / ratio), int(width / ratio)",
            "round(height / ratio), round(width / ratio)",
        ),
        ("pi0-resize-pads-with-grey", "constant_values=-1.0", "constant_values=0.0"),
        ("pi0-pixels", "/ 255.0 * 2.0 - 1.0", "/ 256.0 * 2.0 - 1.0"),
        ("pi0-camera-order", "cameras = sorted(key.removeprefix", "cameras = list(key.removeprefix"),
    ),
    *faults(
        "clp_jax/models/pi0/lora.py",
        f"{_PARITY}::test_lora_checkpoint",
        ("lora-without-scale", "b[part].astype(x.dtype)) * self.lora_scale", "b[part].astype(x.dtype))"),
    ),
    *faults(
        "clp_jax/models/pi0/lora.py",
        "tests/test_lora_merge.py",
        ("lora-merge-per-head", "b = b.sum(axis=-3, keepdims=True)", "pass"),
        ("lora-merge-scales-all", 'lora_scale if path.endswith("/w") else 1.0', "lora_scale"),
    ),
    *faults(
        "clp_jax/models/pi0/lora.py",
        "tests/test_training.py::test_lora_freezes_what_openpi_froze",
        ("lora-trains-embedder-and-norms", '("PaliGemma/llm/.*", True)', '("PaliGemma/llm/layers/.*", True)'),
        ("lora-trains-norms-of-blocks", '("PaliGemma/llm/.*", True)', '("PaliGemma/llm/(?!.*norm).*", True)'),
    ),
    *faults(
        "clp_jax/models/pi0/augmentation.py",
        "tests/test_augmentation.py",
        ("augment-wrist", 'wrist="wrist" in camera', "wrist=False"),
    ),
    *faults(
        "clp_jax/models/pi0/augmentation.py",
        "tests/test_training_parity.py::test_steps_equal_openpis[pi0]",
        (
            "augment-order",
            "augmax.Chain(crop, augmax.Resize(width, height), augmax.Rotate((-_DEGREES, _DEGREES)), colours)",
            "augmax.Chain(colours, crop, augmax.Resize(width, height), augmax.Rotate((-_DEGREES, _DEGREES)))",
        ),
    ),
]
