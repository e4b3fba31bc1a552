"""Faults of serving, exports, both stored forms and counted operations."""

from mutants.mutant import Mutant, faults

_SERVING = "tests/test_serving.py"
_POLICY = "tests/test_serving_policy.py"
_CONTRACT = "tests/test_family_contract.py"
_OPERATIONS = "tests/test_operations.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/checkpoint/manifest.py",
        "tests/checkpoint/test_manifest.py",
        ("manifest-other-bytes-of-a-file", "and _sum_of(file) == crc32", "and _sum_of(file) is not None"),
        ("manifest-a-folder-for-a-file", "file.exists() and not file.is_dir()", "file.is_dir() or file.exists()"),
    ),
    *faults(
        "clp_jax/folders.py",
        "tests/test_folders.py",
        ("folders-closed-looks-empty", "        if closed:\n", "        if False:\n"),
    ),
    *faults(
        "clp_jax/outputs/ownership.py",
        "tests/test_outputs.py::test_an_output_where_nobody_may_write_is_one_line",
        ("outputs-read-only-unnamed", "(errno.EACCES, errno.EPERM, errno.EROFS)", "(errno.EACCES, errno.EPERM)"),
    ),
    *faults(
        "clp_jax/models/groot/metadata.py",
        "tests/groot/test_export.py::test_statistics_without_names_of_parts_are_told",
        ("groot-nameless-parts-unsaid", "statistics, Mapping) and any(", "statistics, Mapping) and all("),
    ),
    *faults(
        "clp_jax/models/pi0/processing.py",
        f"{_POLICY}::test_libero_actions_are_openpis tests/test_data_transforms.py::test_outputs_undo_inputs",
        (
            "serve-absolute-without-state",
            "actions = transforms.to_absolute(actions, state, robot.delta)[:, :dim]",
            "actions = transforms.to_absolute(actions, 0 * state, robot.delta)[:, :dim]",
        ),
        (
            "serve-statistics-of-the-state",
            'actions = transforms.unnormalise(actions, norm_stats["actions"], quantiles=quantiles)',
            'actions = transforms.unnormalise(actions, norm_stats["state"], quantiles=quantiles)',
        ),
    ),
    *faults(
        "clp_jax/serving/policy.py",
        f"{_SERVING}::test_batches_of_any_size_equal_one_by_one {_SERVING}::test_own_noise_is_that_of_the_requests_number {_SERVING}::test_given_noise_gives_the_actions_of_the_model_itself",
        (
            "serve-filled-up-in-front",
            "rows = [*entries, *[entries[0]] * (bucket - len(entries))]",
            "rows = [*[entries[0]] * (bucket - len(entries)), *entries]",
        ),
        (
            "serve-one-noise-for-all",
            "jax.random.normal(jax.random.fold_in(key, number), shape)",
            "jax.random.normal(key, shape)",
        ),
        (
            "serve-noise-of-the-request-unread",
            'return jnp.where(given[:, None, None], batch["noise"], drawn)',
            "return drawn",
        ),
    ),
    *faults(
        "clp_jax/serving/policy.py",
        "tests/test_serving_depths.py::test_each_request_of_a_batch_is_answered_by_its_depth_as_by_the_cut_model",
        (
            "serve-answers-of-neighbours",
            "found[place] = self._outcome(",
            "found[len(found)] = self._outcome(",
        ),
    ),
    *faults(
        "clp_jax/serving/depths.py",
        "tests/test_serving_depths.py",
        ("serve-depth-over-its-time", "time <= wish.milliseconds", "time >= wish.milliseconds"),
        (
            "serve-depth-of-the-fewest-blocks",
            "return max(fitting, key=blocks.__getitem__) if fitting",
            "return min(fitting, key=blocks.__getitem__) if fitting",
        ),
    ),
    *faults(
        "clp_jax/serving/requests.py",
        f"{_POLICY}::test_what_openpis_clients_send_is_read {_POLICY}::test_libero_actions_are_openpis",
        (
            "serve-parts-of-the-state",
            "np.concatenate([np.empty(0), *(self._part(values, text) for text in self.processing.robot.state)])",
            "np.concatenate([np.empty(0), *(self._part(values, text) for text in self.processing.robot.state)])[::-1]",
        ),
    ),
    *faults(
        "clp_jax/models/layers/torch_rules.py",
        f"{_CONTRACT}::test_both_stored_forms_are_the_same_model_and_are_cut_alike[smolvla] tests/smolvla/test_parity.py::test_prefix_is_lerobots tests/smolvla/test_layout.py tests/groot/test_layout.py tests/test_export_pytorch.py",
        (
            "export-not-transposed",
            "lambda x: (x.T,), lambda parts, _: parts[0].T)",
            "lambda x: (x.T,), lambda parts, _: parts[0].T.T)",
        ),
    ),
    *faults(
        "clp_jax/export/weights.py",
        "tests/test_export.py",
        ("export-stored-dtype", "yield w.astype(dtype, copy=False)", "yield w"),
        (
            "export-adapters-dropped",
            "yield self._lora.merge_weight(path, w, a, b, lora_scale=scale).astype(dtype)",
            "yield w.astype(dtype)",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/__init__.py",
        f"{_CONTRACT}::test_draw_follows_its_key {_CONTRACT}::test_fixed_draw_is_fixed_and_starts_alike_for_more_observations",
        (
            "contract-draw-ignores-its-key",
            "noise = jax.random.normal(noise_rng, (*leading",
            "noise = jax.random.normal(jax.random.key(0), (*leading",
        ),
        (
            "contract-fixed-draw-of-the-batch",
            "time = (spread(b) ** (2.0 / 3.0) * 0.999 + 0.001).astype(np.float32)",
            "time = (np.linspace(0.1, 0.9, b) ** (2.0 / 3.0)).astype(np.float32)",
        ),
    ),
    *faults(
        "clp_jax/models/smolvla/__init__.py",
        f"{_CONTRACT}::test_weights_of_the_error_make_the_loss[smolvla]",
        (
            "contract-weights-do-not-sum",
            "return within[:, :, None] * counted / (steps",
            "return 2.0 * within[:, :, None] * counted / (steps",
        ),
    ),
    *faults(
        "clp_jax/models/groot/model.py",
        f"{_CONTRACT}::test_sample_has_the_shape_of_a_chunk[groot_n15]",
        (
            "contract-sample-of-another-dtype",
            "return x + (velocity / num_steps).astype(x.dtype), None\n",
            "return (x + velocity / num_steps).astype(jnp.float16), None\n",
        ),
    ),
    *faults(
        "clp_jax/models/groot/__init__.py",
        f"{_CONTRACT}::test_observations_of_zeros_are_finite[groot_n15]",
        (
            "contract-zeros-are-nan",
            "return Loss(total / jnp.maximum(weight, 1.0).reshape",
            "return Loss(total / weight.reshape",
        ),
    ),
    *faults(
        "clp_jax/models/pi0/fast.py",
        f"{_CONTRACT}::test_observations_of_zeros_are_finite[pi0_fast]",
        ("contract-no-targets-is-nan", "/ jnp.clip(jnp.sum(counted, axis=-1), 1)", "/ jnp.sum(counted, axis=-1)"),
    ),
    *faults(
        "clp_jax/sensitivity.py",
        f"{_CONTRACT}::test_other_gates_compile_nothing",
        (
            "contract-recompiles",
            "sums = [total(params, batch, gates) for batch in fixed]",
            "sums = [_loss_step.__wrapped__(architecture, _rows(fixed))(params, batch, gates) for batch in fixed]",
        ),
    ),
    *faults(
        "clp_jax/sampling.py",
        f"{_CONTRACT}::test_nothing_is_asked_of_a_family_that_the_protocol_does_not_promise",
        ("contract-undeclared-name", "family.num_steps(", "family.number_of_steps("),
    ),
    *faults(
        "clp_jax/models/towers.py",
        f"{_CONTRACT}::test_stacks_cover_every_block_of_every_tower_once",
        (
            "stack-without-its-first-block",
            "return range(self.first, self.first + self.step * rows, self.step)",
            "return range(0, self.step * rows, self.step)",
        ),
    ),
    *faults(
        "clp_jax/operations/products.py",
        _OPERATIONS,
        (
            "count-multiplications-only",
            "return 2 * math.prod(out.shape) * math.prod(left.shape[axis] for",
            "return math.prod(out.shape) * math.prod(left.shape[axis] for",
        ),
        ("count-passes-at-highest", '"HIGHEST": 6', '"HIGHEST": 3'),
    ),
    *faults(
        "clp_jax/operations/program.py",
        _OPERATIONS,
        ("count-one-layer-of-a-scan", "total += inner.times(times)", "total += inner"),
        (
            "count-cheapest-branch",
            "return max((operations for operations, _ in found)",
            "return min((operations for operations, _ in found)",
        ),
        ("count-dead-code", "if eqn.effects or not read.isdisjoint(eqn.outvars):", "if True:"),
    ),
    *faults(
        "clp_jax/scale/hlo.py",
        "tests/test_scale.py -k collective",
        ("scale-collectives-once", "inner = times * (trip_count(program, instruction) or 1)", "inner = times"),
    ),
]
