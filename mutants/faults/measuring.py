"""Faults of CKA, of choosing blocks, and of cutting them out."""

from mutants.mutant import Mutant, faults

_CKA = "tests/test_cka.py"
_SIMILARITY = "tests/test_similarity.py"
_SELECTION = "tests/test_selection.py"
_CONTRACT = "tests/test_family_contract.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/cka.py",
        f"{_CKA}::test_equals_the_definition_at_any_tile {_CKA}::test_hsic_equals_the_definition_itself",
        ("cka-biased-trace", "((n - 1) * (n - 2))", "((n - 1) * n)"),
        ("cka-biased-diagonal", "n / (n - 2) * sums.diagonal", "sums.diagonal"),
        ("cka-debiased-denominator", "(n * (n - 3))", "(n * (n - 2))"),
        ("cka-biased-denominator", "/ (n - 1) ** 2", "/ n**2"),
        ("cka-tiles-off-the-diagonal", "jnp.where(own, 1.0, 2.0)", "1.0"),
        ("cka-diagonal-left-in", "jnp.where(own & jnp.eye(gram.shape[-1], dtype=bool), 0, gram)", "gram"),
    ),
    *faults(
        "clp_jax/grams.py",
        f"{_CKA}::test_equals_the_definition_at_any_tile {_CKA}::test_hsic_equals_the_definition_itself",
        ("cka-not-centred", "gram - row - column", "gram"),
        ("cka-raw-like-rms", "(rms - across)", "rms"),
        ("cka-total-of-rows", "/ (2 * (n - 1))", "/ (n - 1)"),
        ("cka-far-rows-without-one-another", "precision=HIGHEST) + among_far", "precision=HIGHEST)"),
    ),
    *faults(
        "clp_jax/tiles.py",
        f"{_CKA}::test_equals_the_definition_at_any_tile",
        ("tiles-last-one-twice", " & (start + jnp.arange(self.rows) >= block * self.rows)", ""),
    ),
    *faults(
        "clp_jax/tiles.py",
        f"{_CKA}::test_rows_that_are_not_valid_do_not_count",
        ("tiles-padding-counts", "jnp.where(self.mask(block)[None, :, None], rows, 0)", "rows"),
    ),
    *faults(
        "clp_jax/tiles.py",
        f"{_CKA}::test_keeps_its_digits_when_the_mean_is_100000_times_the_spread",
        ("cka-counted-from-zero", "rows = rows - mean[:, None, :]", "pass"),
    ),
    *faults(
        "clp_jax/tiles.py",
        f"{_CKA}::test_channel_share_is_the_largest_share_of_the_centred_variance_of_valid_rows",
        ("cka-rounded-mean", "return mean, mean_without(mean)", "return mean, 0 * mean"),
    ),
    *faults(
        "clp_jax/grams.py",
        f"{_CKA}::test_is_within_its_promise_of_float64_with_massive_activations",
        ("cka-one-bfloat16-part", "BF16_BF16_F32_X3", "BF16_BF16_F32"),
        ("cka-far-tokens-like-the-others", "jnp.arange(len(places)) < tiles.count // 4", "jnp.arange(len(places)) < 0"),
        ("cka-length-by-its-rounded-inverse", "_ROUNDING = 1e-3", "_ROUNDING = 0.0"),
        ("cka-short-tokens-like-the-others", "> 4 * origin.centre.shape[1]", "> jnp.inf"),
        ("cka-every-token-as-a-short-one", "> 4 * origin.centre.shape[1]", "> 0"),
    ),
    *faults(
        "clp_jax/cka.py",
        f"{_CKA}::test_is_within_its_promise_of_float64_with_massive_activations",
        ("cka-far-products-of-two-parts", " + jnp.sum(more, axis=0)", ""),
    ),
    *faults(
        "clp_jax/similarity.py",
        _SIMILARITY,
        ("similarity-unread-state", "[i not in incomparable for i", "[True for i"),
        ("similarity-empty-slots", "t.valid & batch.present[:, None]", "t.valid"),
        ("similarity-padding-sampled", "jnp.argsort(~valid[:, order]", "jnp.argsort(valid[:, order]"),
    ),
    *faults(
        "clp_jax/sensitivity.py",
        "tests/test_sensitivity.py",
        ("gates-half-curvature", "matrix = 2.0 * jnp.einsum", "matrix = jnp.einsum"),
    ),
    *faults(
        "clp_jax/selection/twins.py",
        f"{_SELECTION} -k clp",
        ("twins-last-block-stays", "similarity[0] = np.nan", "similarity[-1] = np.nan"),
        ("twins-strictly-above", "twins = twin_similarity >= tau\n    if", "twins = twin_similarity > tau\n    if"),
    ),
    *faults(
        "clp_jax/selection/twins.py",
        f"{_SELECTION}::test_literal_anchor_keeps_the_first_block_of_every_run",
        ("twins-other-anchor", "np.roll(twins, 1)", "np.roll(twins, -1)"),
    ),
    *faults(
        "clp_jax/selection/twins.py",
        f"{_SELECTION}::test_criterion_removes_exactly_what_it_may",
        ("twins-protected-go", "return twins & unprotected(evidence)", "return twins"),
    ),
    *faults(
        "clp_jax/selection/jumps.py",
        f"{_SELECTION} -k jump",
        (
            "jumps-other-state",
            "up_to + 1 - length] + damage[begin, end]",
            "up_to + 1 - length] + damage[begin, end - 1]",
        ),
        ("jumps-without-a-kept-block", "cost = kept[begin, :", "cost = np.minimum(kept, jumped)[begin, :"),
    ),
    *faults(
        "clp_jax/selection/jumps.py",
        f"{_SELECTION}::test_criterion_removes_exactly_what_it_may",
        ("jumps-protected-go", "if begin in evidence.protected:", "if begin - 1 in evidence.protected:"),
        ("jumps-odd-runs", "if length % period or", "if"),
    ),
    *faults(
        "clp_jax/selection/gates.py",
        f"{_SELECTION} -k gauss_newton",
        ("gauss-newton-without-half", "* chosen).sum(1) / 2", "* chosen).sum(1)"),
    ),
    *faults(
        "clp_jax/models/stacks.py",
        f"{_CONTRACT}::test_two_cuts_are_their_composition tests/groot/test_layout.py",
        ("prune-row-for-block", "if block in kept", "if row in kept"),
    ),
    *faults(
        "clp_jax/prune.py",
        "tests/test_prune.py",
        ("prune-first-rows", "leaf[np.asarray(keep)]", "leaf[: len(keep)]"),
    ),
    *faults(
        "clp_jax/plan.py",
        "tests/test_plan.py",
        ("compose-later-numbers", "before.keep[index] for index in after.keep", "index for index in after.keep"),
        ("parity-rule-off", "return all(block % period == place % period", "return all(block == block"),
    ),
    *faults(
        "clp_jax/models/pi0/__init__.py",
        f"{_CONTRACT}::test_stacks_cover_every_block_of_every_tower_once tests/test_prune.py",
        ("prune-leaf-of-the-other-tower", '[^/]+_1(?:/.*)?", "action")', 'mlp_1(?:/.*)?", "action")'),
    ),
    *faults(
        "clp_jax/models/smolvla/layout.py",
        f"{_CONTRACT}::test_stacks_cover_every_block_of_every_tower_once",
        ("prune-odd-blocks-as-even", 'Stack(r"vlm/odd/.*", "vlm", first=1', 'Stack(r"vlm/odd/.*", "vlm", first=0'),
    ),
    *faults(
        "clp_jax/checkpoint/orbax/slicing.py",
        "tests/test_checkpoint.py",
        ("orbax-rows-shifted", "self._copy_chunk(number, rows[0] // self.height)", "self._copy_chunk(number, number)"),
    ),
    *faults(
        "clp_jax/checkpoint/safetensors/slicing.py",
        "tests/checkpoint/test_safetensors_slicing.py",
        ("tensors-old-numbers", "called = [numbered(found[2], place)]", "called = [numbered(found[2], found[1])]"),
    ),
    *faults(
        "clp_jax/models/smolvla/stored.py",
        "tests/checkpoint/test_safetensors_slicing.py",
        ("config-depth-smolvla", 'config[_VLM_DEPTH] = depths["vlm"]', "pass"),
    ),
    *faults(
        "clp_jax/models/groot/stored.py",
        "tests/checkpoint/test_safetensors_slicing.py",
        (
            "tied-head-missing",
            "for name, head in wanted.items() if name not in stored}",
            "for name, head in wanted.items() if not stored}",
        ),
    ),
    *faults(
        "clp_jax/models/groot/layout.py",
        "tests/groot/test_layout.py",
        (
            "config-depth-groot",
            '"vl": ("action_head_cfg", "vl_self_attention_cfg", "num_layers")',
            '"vl": ("action_head_cfg", "diffusion_model_cfg", "num_layers")',
        ),
    ),
    *faults(
        "clp_jax/least_squares.py",
        "tests/test_least_squares.py",
        ("fit-no-ridge", "+ ridge * jnp.eye(len(scale))", "+ 1e-7 * jnp.eye(len(scale))"),
        ("fit-reads-padding", "(jnp.where(counted > 0, y, 0.0) for y in (x, error, wanted))", "(x, error, wanted)"),
        ("fit-chosen-on-its-own-data", "solve(sums, held_out, strength)", "solve(sums, sums, strength)"),
        ("fit-held-out-error-once", "held_out.error - 2 * jnp.sum", "held_out.error - jnp.sum"),
        (
            "fit-forgets-gates",
            "change = change * jnp.where(per_channel > 0",
            "change = change + 0 * jnp.where(per_channel > 0",
        ),
    ),
    *faults(
        "clp_jax/commands/prune.py",
        "tests/test_healing.py::test_healing_needs_data_and_episodes_to_hold_out",
        (
            "heal-plan-checked-late",
            "    if stated is not None:  # before minutes of reading\n        check_plan(stated, shape)\n",
            "",
        ),
        ("heal-of-nothing-told-late", "check_removes(stated)", "pass"),
    ),
    *faults(
        "clp_jax/healing.py",
        "tests/test_healing.py",
        ("heal-own-state", "tower.states[place + 1]", "tower.states[place]"),
        ("heal-one-state-early", "expected[name].states[target]", "expected[name].states[target - 1]"),
        (
            "heal-cut-model-as-target",
            "build(architecture, rows), full,",
            "build(architecture, rows), jax.tree.map(jnp.zeros_like, full),",
        ),
        ("heal-worse-is-kept", "if not after < before:", "if False:"),
        (
            "heal-first-round-only-in-params",
            "leaves[kernel] = self.changed[kernel] = _add",
            "self.changed[kernel] = _add",
        ),
    ),
]
