"""Faults of training and of what is saved and resumed."""

from mutants.mutant import Mutant, faults

_TRAINING = "tests/test_training.py"
_PARITY = "tests/test_training_parity.py::test_steps_equal_openpis[pi0]"
_OPTIMIZER = "tests/test_optimizer.py"
_STEP = "tests/test_training_step.py"
_DEPTHS = "tests/test_depths.py"
_ADVISING = "tests/test_advising.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/training/loop.py",
        "tests/test_training.py::test_sigterm_while_the_last_save_is_written_makes_nothing_of_it",
        ("sigterm-ends-the-last-save", "        saved.wait()  # nor may", "    saved.wait()  # nor may"),
    ),
    *faults(
        "clp_jax/commands/advise_runs.py",
        f"{_ADVISING}::test_a_rung_is_a_run_of_its_own",
        ("advise-schedule-of-the-last-rung", '"decay_steps": steps', '"decay_steps": config.steps'),
    ),
    *faults(
        "clp_jax/commands/advise.py",
        f"{_ADVISING}::test_a_killed_command_goes_on_inside_a_rung_and_trains_no_other_again",
        ("advise-state-stays-after-its-rung", "        trainer.forget(candidate, rung)\n", ""),
    ),
    *faults(
        "clp_jax/training/step.py",
        f"{_DEPTHS}::test_a_step_trains_one_cut_as_if_it_were_alone[pi0-others0]",
        ("depths-turn-never-changes", "state.step % len(turns)", "0 * state.step"),
        ("depths-cut-of-another-size", "smaller(architecture, cut), rows_of(", "architecture, rows_of("),
    ),
    *faults(
        "clp_jax/planning.py",
        f"{_DEPTHS}::test_every_cut_lies_in_the_next_larger",
        ("depths-not-nested", "inner=plans[-1] if plans else None", "inner=None"),
    ),
    *faults(
        "clp_jax/training/held_out.py",
        f"{_DEPTHS}::test_losses_of_cuts_are_those_of_the_cut_models",
        (
            "depths-loss-of-the-whole",
            "of_model(smaller(architecture, cut), rows(params))",
            "of_model(architecture, params)",
        ),
    ),
    *faults(
        "clp_jax/training/step.py",
        _STEP,
        (
            "ema-one-step-late",
            "decay * old + (1 - decay) * new, average, params)",
            "decay * old + (1 - decay) * new, average, state.params)",
        ),
        (
            "accumulation-parts-alike",
            "lambda old, x: old + means.weight * x, total, gradient), means",
            "lambda old, x: old + x, total, gradient), Means(means.values, jnp.ones(()))",
        ),
        (
            "accumulation-is-a-sum",
            "jax.tree.map(lambda x: x / weight.sum(), total)",
            "total",
        ),
        (
            "accumulation-one-augmentation",
            "own = augmentation_key if settings.accumulate == 1 else jax.random.fold_in(augmentation_key, number)",
            "own = augmentation_key",
        ),
        (
            "accumulation-augments-otherwise",
            "own = augmentation_key if settings.accumulate == 1 else jax.random.fold_in(augmentation_key, number)",
            "own = jax.random.fold_in(augmentation_key, number)",
        ),
        ("batch-observations-alike", "jnp.sum(loss.weight * each) / jnp.sum(loss.weight)", "each.mean()"),
        (
            "frozen-change",
            "params = merge_parts(optax.apply_updates(trained, updates), frozen)",
            "params = merge_parts(optax.apply_updates(trained, updates), jax.tree.map(lambda x: x * 0.999, frozen))",
        ),
    ),
    *faults(
        "clp_jax/training/step.py",
        _PARITY,
        ("every-step-the-same-key", "key = jax.random.fold_in(rng, state.step)", "key = jax.random.fold_in(rng, 0)"),
        ("norm-of-biases-too", 'path.split("/")[-1] not in _NO_KERNEL', "path"),
        ("augmentation-off", "        if settings.augment:", "        if False:"),
    ),
    *faults(
        "clp_jax/models/pi0/__init__.py",
        _PARITY,
        (
            "augmentation-key",
            '"time": time}, jax.random.split(rng, 3)[0]',
            '"time": time}, jax.random.split(rng, 3)[1]',
        ),
    ),
    *faults(
        "clp_jax/training/optimizer.py",
        _OPTIMIZER,
        (
            "clip-after-adam",
            "optax.chain(optax.clip_by_global_norm(settings.clip_norm), adamw)",
            "optax.chain(adamw, optax.clip_by_global_norm(settings.clip_norm))",
        ),
        ("clip-off", "optax.clip_by_global_norm(settings.clip_norm)", "optax.clip_by_global_norm(1e9)"),
        (
            "clip-each-leaf",
            "optax.clip_by_global_norm(settings.clip_norm)",
            "optax.clip_by_block_rms(settings.clip_norm)",
        ),
        ("weight-decay-off", "weight_decay=settings.weight_decay,", "weight_decay=0.0,"),
        (
            "schedule-one-step-late",
            "        learning_rate(settings),\n",
            "        lambda count: learning_rate(settings)(count + 1),\n",
        ),
        (
            "schedule-first-rate",
            "settings.peak_lr / (settings.warmup_steps + 1),",
            "settings.peak_lr / settings.warmup_steps,",
        ),
        (
            "schedule-longer-decay",
            "max(settings.decay_steps, settings.warmup_steps + 1)",
            "settings.decay_steps + settings.warmup_steps",
        ),
        ("schedule-cosine-late", "done = jnp.asarray(step, jnp.float32)", "done = jnp.asarray(step, jnp.float32) + 1"),
    ),
    *faults(
        "clp_jax/training/freezing.py",
        f"{_TRAINING}::test_rules_freeze_and_except",
        (
            "freeze-wins-over-train",
            "rules = [(rule, _TRAINED) for rule in train] + [(rule, _FROZEN) for rule in freeze]",
            "rules = [(rule, _FROZEN) for rule in freeze] + [(rule, _TRAINED) for rule in train]",
        ),
    ),
    *faults(
        "clp_jax/training/state.py",
        f"{_TRAINING}::test_trained_parameters_are_float32_and_frozen_ones_as_asked",
        (
            "trained-as-stored",
            "return jnp.float32 if path not in frozen else (frozen_dtype or leaf.dtype)",
            "return leaf.dtype if path not in frozen else (frozen_dtype or leaf.dtype)",
        ),
    ),
    *faults(
        "clp_jax/training/saving.py",
        f"{_TRAINING}::test_saved_params_are_the_average_and_load_as_a_checkpoint {_TRAINING}::test_resumed_run_equals_an_uninterrupted_one_bit_for_bit",
        (
            "saved-not-averaged",
            "_with_value(state.ema_params if averaged else state.params)",
            "_with_value(state.params)",
        ),
        (
            "resumed-from-the-average",
            "TrainState(rest.step, live or main, opt_state, main if live else None)",
            "TrainState(rest.step, main, opt_state, main if live else None)",
        ),
        (
            "resumed-average-is-live",
            "TrainState(rest.step, live or main, opt_state, main if live else None)",
            "TrainState(rest.step, live or main, opt_state, live or None)",
        ),
    ),
    *faults(
        "clp_jax/training/loop.py",
        f"{_TRAINING}::test_resumed_run_equals_an_uninterrupted_one_bit_for_bit",
        (
            "resumed-data-from-the-start",
            "batches.set_state(position.encode())",
            "pass",
        ),
    ),
    *faults(
        "clp_jax/training/program.py",
        f"{_TRAINING}::test_first_loss_is_that_of_openpis_key",
        (
            "run-key",
            "rng, _ = jax.random.split(jax.random.key(seed))",
            "_, rng = jax.random.split(jax.random.key(seed))",
        ),
    ),
    *faults(
        "clp_jax/training/loop.py",
        f"{_TRAINING}::test_first_loss_is_that_of_openpis_key {_TRAINING}::test_what_is_evaluated_is_what_is_saved",
        (
            "evaluated-not-averaged",
            "averaged = state.params if state.ema_params is None else state.ema_params",
            "averaged = state.params",
        ),
    ),
    *faults(
        "clp_jax/training/resumption.py",
        "tests/test_resumption.py",
        ("resumed-with-other-statistics", '| {"statistics_fingerprint": entry.get("statistics_fingerprint")}', ""),
        ("resumed-with-another-prompt", 'if name != "name"}', 'if name not in ("name", "prompt")}'),
    ),
]
