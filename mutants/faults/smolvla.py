"""Faults of SmolVLA."""

from mutants.mutant import Mutant, faults

_PARITY = "tests/smolvla/test_parity.py"
_PREFIX = f"{_PARITY}::test_prefix_is_lerobots"
_STATES = f"{_PARITY}::test_states_of_all_blocks_are_lerobots"
_BF16 = f"{_PARITY}::test_bfloat16_is_lerobots_mixed_model {_PARITY}::test_bfloat16_keeps_float32_where_lerobot_does"
_LOSS = f"{_PARITY}::test_losses_are_lerobots {_PARITY}::test_weights_of_errors_give_lerobots_loss"
_PRECISION = "tests/test_precision.py"

_PROCESSORS = "tests/smolvla/test_processors.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/models/smolvla/processors.py",
        _PROCESSORS,
        ("smolvla-statistics-in-named-files-alone", "not in (NORMALIZER, UNNORMALIZER):", "not in (NORMALIZER,):"),
        ("smolvla-unknown-steps-pass", "        if name not in known:\n", "        if False:\n"),
        (
            "smolvla-nameless-statistics-exported",
            'if any(kind != "IDENTITY" for kind in',
            'if any(kind == "" for kind in',
        ),
        ("smolvla-other-renames-dropped", "rename_map=kept | renames(keys)", "rename_map=renames(keys)"),
        ("smolvla-postprocessor-unread", "not np.array_equal(before, after)", "False"),
        ("smolvla-renames-the-other-way", "found[name] = key", "found[key] = name"),
    ),
    *faults(
        "clp_jax/models/layers/lerobot.py",
        _PROCESSORS,
        (
            "lerobot-export-renames-the-other-way",
            "{key: name for name, key in keys",
            "{name: key for name, key in keys",
        ),
        (
            "lerobot-export-forgets-the-state",
            "camera, key in robot.images.items()} | state",
            "camera, key in robot.images.items()}",
        ),
    ),
    *faults(
        "clp_jax/commands/conventions.py",
        f"{_PROCESSORS}::test_a_step_is_served_with_the_keys_that_its_run_read",
        (
            "smolvla-keys-of-the-run-forgotten",
            "start=own if base.robot is None else base.robot",
            "start=own or base.robot",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/model.py",
        f"{_PREFIX} {_STATES}",
        (
            "smolvla-state-is-no-block",
            "jnp.arange(tokens.shape[1] + missing) == tokens.shape[1] - 1",
            "jnp.arange(tokens.shape[1] + missing) < 0",
        ),
        ("smolvla-unscaled-images", "tokens = tokens * jnp.asarray(math.sqrt(a.vlm.width), tokens.dtype)", "pass"),
        (
            "smolvla-actions-see-each-other",
            "attention_mask(valid, valid)",
            "attention_mask(valid, jnp.zeros_like(valid))",
        ),
        (
            "smolvla-positions-of-actions",
            "jnp.sum(prefix_valid, axis=-1, dtype=jnp.int32)[:, None]",
            "prefix_valid.shape[1]",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/model.py",
        f"{_PARITY}::test_variant_is_lerobots[special_tokens] {_PARITY}::test_variant_is_lerobots[camera_absent_empty1] "
        f"{_PARITY}::test_variant_is_lerobots[cameras_reversed]",
        ("smolvla-frame-is-masked", "(2, 1)), constant_values=True", "(2, 1)), constant_values=False"),
        (
            "smolvla-empty-camera-seen",
            "jnp.pad(masks, ((0, 0), (0, empty)))",
            "jnp.pad(masks, ((0, 0), (0, empty)), constant_values=True)",
        ),
        ("smolvla-sorted-cameras", "[camera for camera in architecture.cameras if camera in given]", "sorted(given)"),
    ),
    *faults(
        "clp_jax/models/smolvla/model.py",
        f"{_PARITY}::test_sampled_actions_are_lerobots",
        ("smolvla-sampling-times", "1.0 + step * dt for step in", "1.0 + (step + 1) * dt for step in"),
    ),
    *faults(
        "clp_jax/models/smolvla/decoder.py",
        _STATES,
        ("smolvla-odd-blocks-read-as-even", "self._projected(step.weights.action, own) if odd else own", "own"),
        (
            "smolvla-odd-positions",
            "positions, mask = positions - positions[:, :1], mask",
            "positions, mask = positions, mask",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/decoder.py",
        f"{_PRECISION}::test_smolvla_attention {_PRECISION}::test_norms",
        ("smolvla-rounded-norm", "wide = x.astype(jnp.float32)", "wide = x"),
    ),
    *faults(
        "clp_jax/models/smolvla/decoder.py",
        _BF16,
        (
            "smolvla-rounded-projection",
            "(x.reshape(*x.shape[:2], -1).astype(jnp.float32) for x in seen)",
            "(x.reshape(*x.shape[:2], -1) for x in seen)",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/images.py",
        f"{_PARITY}::test_images_are_lerobots {_PREFIX} tests/smolvla/test_images.py",
        (
            "smolvla-resize-rounded",
            "int(height / ratio), int(width / ratio)",
            "round(height / ratio), round(width / ratio)",
        ),
        ("smolvla-resize-antialiased", "antialias=False", "antialias=True"),
        (
            "smolvla-padding-centred",
            "((0, 0), (size - new[0], 0), (size - new[1], 0), (0, 0))",
            "((0, 0), (0, size - new[0]), (0, size - new[1]), (0, 0))",
        ),
        ("smolvla-folded-by-columns", "transpose(0, 1, 3, 2, 4, 5)", "transpose(0, 1, 3, 4, 2, 5)"),
    ),
    *faults(
        "clp_jax/models/smolvla/times.py",
        f"{_PARITY}::test_time_embedding_is_as_accurate_as_in_float64",
        (
            "smolvla-time-in-float32",
            "_HALF_OF_THE_BITS = np.uint32(0xFFFFF000)",
            "_HALF_OF_THE_BITS = np.uint32(0xFFFFFFFF)",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/__init__.py",
        _LOSS,
        (
            "smolvla-padding-counts",
            '1.0 - jnp.asarray(inputs["action_is_pad"]).astype(jnp.float32)',
            'jnp.ones(inputs["actions"].shape[:2])',
        ),
        ("smolvla-padded-dimensions-count", "< architecture.true_action_dim\n", "< architecture.action_dim\n"),
    ),
    *faults(
        "clp_jax/models/smolvla/processing.py",
        "tests/smolvla/test_processing.py",
        ("smolvla-epsilon", "_EPSILON = 1e-8", "_EPSILON = 1e-6"),
    ),
    *faults(
        "clp_jax/models/smolvla/tokenizer.py",
        "tests/smolvla/test_processing.py tests/smolvla/test_own_robot.py",
        (
            "smolvla-prompt-without-line-break",
            'prompt if prompt.endswith("\\n") else f"{prompt}\\n"',
            "prompt",
        ),
        ("smolvla-padding-token", "ids = np.full(length, self._pad, np.int32)", "ids = np.zeros(length, np.int32)"),
    ),
    *faults(
        "clp_jax/models/smolvla/training.py",
        "tests/smolvla/test_layout.py",
        ("smolvla-warm-up", "first = 1.0 / (warmup + 1)", "first = 1.0 / warmup"),
        ("smolvla-last-block-trained", "last = architecture.vlm.depth - 1", "last = architecture.vlm.depth - 2"),
        ("smolvla-head-trained", '_NEVER_TRAINED = r"lm_head|vlm/norm"', '_NEVER_TRAINED = r"lm_head"'),
    ),
    *faults(
        "clp_jax/models/smolvla/training.py",
        "tests/smolvla/test_training.py::test_settings_are_lerobots",
        ("smolvla-clip", '"clip_norm": t.clip_norm', '"clip_norm": 1e9'),
    ),
]
