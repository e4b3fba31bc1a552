"""Faults of GR00T-N1.5."""

from mutants.mutant import Mutant, faults

_PARITY = "tests/groot/test_parity.py"
_STATES = f"{_PARITY}::test_states_of_every_tower[golden]"
_OUTPUTS = f"{_PARITY}::test_velocity_loss_and_actions[golden]"
_MODEL = "tests/groot/test_model.py"
_PRECISION = "tests/test_precision.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/models/groot/dit.py",
        f"{_STATES} {_OUTPUTS}",
        ("groot-adaln-order", "scale, shift = jnp.split(self.modulation", "shift, scale = jnp.split(self.modulation"),
        (
            "groot-adaln-order-of-the-output",
            "shift, scale = jnp.split(self.proj_out_1",
            "scale, shift = jnp.split(self.proj_out_1",
        ),
        (
            "groot-own-blocks-read-the-prompt",
            "_apply(block, own, between, time, None, None if",
            "_apply(block, own, between, time, seen, None if",
        ),
        ("groot-time-frequencies", "np.arange(half) / (half - 1)", "np.arange(half) / half"),
    ),
    *faults(
        "clp_jax/models/groot/dit.py",
        f"{_MODEL}::test_an_odd_number_of_dit_blocks_ends_with_one_that_reads_the_prompt {_MODEL}::test_closed_gates_are_the_pruned_model",
        (
            "groot-gates-swapped",
            "None if gates is None else gates[0], mask",
            "None if gates is None else gates[-1], mask",
        ),
        ("groot-odd-block-left-out", "y, end = pair(y, last)", "_, end = pair(y, last)"),
    ),
    *faults(
        "clp_jax/models/groot/transformer.py",
        f"{_STATES} {_OUTPUTS}",
        ("groot-epsilon-of-blocks", "BLOCK_EPS = 1e-5", "BLOCK_EPS = 1e-3"),
    ),
    *faults(
        "clp_jax/models/groot/transformer.py",
        f"{_PRECISION}::test_groot_attention {_PRECISION}::test_groot_language_model_attention {_PRECISION}::test_norms",
        (
            "groot-rounded-scores",
            "preferred_element_type=jnp.float32) * scale",
            "preferred_element_type=keys.dtype) * scale",
        ),
        (
            "groot-rounded-softmax",
            "jax.nn.softmax(logits, axis=-1)",
            "jax.nn.softmax(logits.astype(values.dtype), axis=-1)",
        ),
    ),
    *faults(
        "clp_jax/models/groot/head.py",
        f"{_STATES} {_OUTPUTS}",
        ("groot-embodiment", "jnp.asarray(p)[robots]", "jnp.asarray(p)[0 * robots]"),
    ),
    *faults(
        "clp_jax/models/groot/qwen.py",
        f"{_STATES} {_OUTPUTS} {_PARITY}::test_eager_padding_is_the_mean_of_all_values",
        ("groot-padding-rows", 'self.padding == "flash"', 'self.padding == "eager"'),
        (
            "groot-prompt-padding-seen",
            "jnp.tril(jnp.ones((s, s), bool)) & valid[:, None, :]",
            "jnp.tril(jnp.ones((s, s), bool)) & jnp.ones_like(valid)[:, None, :]",
        ),
        (
            "groot-keys-not-normed",
            'RMSNorm(size.eps, name="k_norm")(heads("k", size.num_kv_heads))',
            '0 * RMSNorm(size.eps, name="k_norm")(heads("k", size.num_kv_heads)) + heads("k", size.num_kv_heads)',
        ),
    ),
    *faults(
        "clp_jax/models/groot/qwen.py",
        f"{_PRECISION}::test_groot_attention {_PRECISION}::test_groot_language_model_attention {_PRECISION}::test_norms",
        ("qwen-rounded-norm", "wide = x.astype(jnp.float32)", "wide = x"),
    ),
    *faults(
        "clp_jax/models/groot/model.py",
        f"{_OUTPUTS} {_MODEL}::test_times_are_upstream_s {_MODEL}::test_images_are_upstream_s_pixel_values {_PARITY}::test_losses_of_observations_and_of_the_batch",
        (
            "groot-bucket-rounded",
            "return (time * buckets).astype(jnp.int32)",
            "return jnp.round(time * buckets).astype(jnp.int32)",
        ),
        ("groot-sampling-times", "int(i / num_steps * buckets)", "int((i + 1) / num_steps * buckets)"),
        ("groot-sampling-step", "velocity / num_steps", "velocity / (num_steps + 1)"),
    ),
    *faults(
        "clp_jax/models/groot/model.py",
        f"{_MODEL}::test_images_fill_the_prompt_in_the_order_of_their_cameras",
        ("groot-camera-order", "return sorted(key.removeprefix", "return list(key.removeprefix"),
    ),
    *faults(
        "clp_jax/models/groot/__init__.py",
        f"{_OUTPUTS} {_MODEL}::test_times_are_upstream_s {_PARITY}::test_losses_of_observations_and_of_the_batch",
        (
            "groot-time-runs-back",
            '(1 - t) * inputs["noise"] + t * per_draw',
            't * inputs["noise"] + (1 - t) * per_draw',
        ),
        (
            "groot-times-of-the-draw",
            "quantile ** (1.0 / architecture.noise_alpha)",
            "quantile ** architecture.noise_alpha",
        ),
        ("groot-masked-dimensions-count", 'other) * per_draw(counted, inputs["time"])', "other)"),
    ),
    *faults(
        "clp_jax/models/groot/training.py",
        "tests/groot/test_training.py::test_no_weight_decay_where_upstream_has_none",
        ("groot-decays-norms", "bias|.*/(?:vlln|norm[13]|encoder_norm|LayerNorm_[01])/scale", "bias"),
    ),
    *faults(
        "clp_jax/models/layers/lora.py",
        "tests/groot/test_lora.py::test_a_merged_model_answers_alike",
        ("adapters-without-scale", ".reshape(y.shape) * adapters.scale", ".reshape(y.shape)"),
    ),
]
