"""Faults of data: a robot's numbers, prompts and pictures, and the order in which they are read."""

from mutants.mutant import Mutant, faults

_TRANSFORMS = "tests/test_data_transforms.py"
_LEROBOT = "tests/test_data_lerobot.py"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/processing/transforms.py",
        _TRANSFORMS,
        ("delta-without-mask", "np.where(mask, state[:dims], 0)", "state[:dims]"),
        (
            "quantiles-as-deviations",
            "    if not quantiles:\n        return (x - stats",
            "    if True:\n        return (x - stats",
        ),
        ("normalise-epsilon", "_EPSILON = 1e-6", "_EPSILON = 1e-4"),
        ("quantile-epsilon", "(q99[:d] - q01[:d] + _EPSILON) * 2.0 - 1.0", "(q99[:d] - q01[:d]) * 2.0 - 1.0"),
        (
            "unnormalise-padding",
            "return np.concatenate([known, padding], axis=-1)",
            "return np.concatenate([known, 0 * padding], axis=-1)",
        ),
        ("resize-rounded", "int(height / ratio), int(width / ratio)", "round(height / ratio), round(width / ratio)"),
        (
            "resize-padding-on-the-left",
            "top, left = (size - new_height) // 2, (size - new_width) // 2",
            "top, left = size - new_height, size - new_width",
        ),
        ("pixels-rounded", "image = (255 * image).astype(np.uint8)", "image = np.rint(255 * image).astype(np.uint8)"),
    ),
    *faults(
        "clp_jax/models/pi0/processing.py",
        _TRANSFORMS,
        (
            "delta-after-normalisation",
            "actions = transforms.to_delta(actions, state, robot.delta)",
            "actions = transforms.to_delta(actions, 0 * state, robot.delta)",
        ),
        (
            "state-in-prompt-raw",
            "self.tokenizer(prompt, self.max_token_len, state if",
            "self.tokenizer(prompt, self.max_token_len, 2 * state if",
        ),
    ),
    *faults(
        "clp_jax/processing/tokenizer.py",
        _TRANSFORMS,
        ("prompt-without-line-break", 'begin=True) + self.pieces("\\n")', "begin=True)"),
        ("state-bins", "np.linspace(-1, 1, 257)[:-1]", "np.linspace(-1, 1, 256)"),
    ),
    *faults(
        "clp_jax/processing/norm_stats.py",
        "tests/test_norm_stats.py",
        ("statistics-beyond-the-episode", "np.minimum(rows + step, last)", "np.minimum(rows + step, len(state) - 1)"),
        ("statistics-of-absolute-actions", "if dimension < len(delta) and delta[dimension]", "if False"),
        ("statistics-sample-deviation", "values.std(dtype=np.float64)", "values.std(dtype=np.float64, ddof=1)"),
    ),
    *faults(
        "clp_jax/data/lerobot.py",
        f"{_LEROBOT}::test_chunks_are_held_at_the_end_of_the_episode {_LEROBOT}::test_every_frame_is_its_own",
        (
            "chunk-into-the-next-episode",
            "return np.minimum(wanted, end - 1), wanted >= end",
            "return np.minimum(wanted, int(self._ends[-1]) - 1), wanted >= end",
        ),
        (
            "chunk-padding-one-late",
            "return np.minimum(wanted, end - 1), wanted >= end",
            "return np.minimum(wanted, end - 1), wanted > end",
        ),
        (
            "episode-border",
            'np.searchsorted(self._ends, row, side="right")',
            'np.searchsorted(self._ends, row, side="left")',
        ),
        ("frame-of-the-file", "place.row + frame", "frame"),
    ),
    *faults(
        "clp_jax/data/recording.py",
        f"{_LEROBOT}::test_observations_follow_the_table {_LEROBOT}::test_a_prompt_replaces_the_tasks",
        (
            "actions-one-row-late",
            "actions=self.actions[chunk]",
            "actions=self.actions[np.minimum(chunk + 1, len(self.actions) - 1)]",
        ),
        ("prompt-of-another-task", "prompt=texts[numbers[row]]", "prompt=texts[numbers[0]]"),
    ),
    *faults(
        "clp_jax/data/loader.py",
        "tests/test_data_loader.py",
        (
            "loader-every-epoch-alike",
            "grain.MapDataset.range(len(rows)).shuffle(seed=seed)",
            "grain.MapDataset.range(len(rows))",
        ),
        ("loader-part-batches", "drop_remainder=True", "drop_remainder=False"),
        (
            "loader-every-process-the-same",
            "mine = slice(process_index * share, (process_index + 1) * share)",
            "mine = slice(0, share)",
        ),
        ("loader-held-out-rows", "read(rows[chosen[mine]])", "read(chosen[mine])"),
    ),
    *faults(
        "clp_jax/data/proof/rows.py",
        "tests/data/test_proof.py",
        ("proof-tolerance-of-times", "_LEROBOT_TOLERANCE = 1e-4", "_LEROBOT_TOLERANCE = 1e-2"),
        ("proof-row-number-twice", "firsts[1:] <= lasts[:-1]", "firsts[1:] < lasts[:-1]"),
        ("proof-row-number-beside-meta", "if episode.first is not None and number != episode.first:", "if False:"),
    ),
    *faults(
        "clp_jax/data/proof/videos.py",
        "tests/data/test_proof_pictures.py",
        ("proof-frame-twice", "if len(others) or len(np.unique(nearest)) < len(nearest):", "if len(others):"),
    ),
    *faults(
        "clp_jax/processing/norm_stats.py",
        "tests/test_norm_stats.py::test_statistics_of_no_data_are_refused",
        ("statistics-of-one-bound", "if lower is not upper:", "if False:"),
        ("statistics-bounds-without-deviation", "(std == 0) & (lower < upper)", "(std == 0) & (lower > upper)"),
        ("statistics-bounds-in-either-order", "np.flatnonzero(lower > upper)", "np.flatnonzero(lower > np.inf)"),
    ),
    *faults(
        "clp_jax/data/recordings.py",
        "tests/data/test_mixtures.py::test_episodes_that_are_there_twice_are_noted",
        ("repetition-unnoticed", "if first != name else []", "if first == name else []"),
    ),
    *faults(
        "clp_jax/data/calibration.py",
        "tests/test_data.py",
        (
            "hold-out-splits-episodes",
            "held = np.isin(episodes, chosen)",
            "held = np.isin(np.arange(len(episodes)), chosen)",
        ),
    ),
]
