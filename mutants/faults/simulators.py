"""Faults of evaluation in simulators: what is saved, how it goes on, how two policies are compared."""

from mutants.mutant import Mutant, faults

_EVALUATION = "tests/evaluation"

MUTANTS: list[Mutant] = [
    *faults(
        "clp_jax/outputs/lines.py",
        f"{_EVALUATION}/test_saving.py",
        ("saving-half-a-line", "    if len(whole) < len(content):", "    if False:"),
    ),
    *faults(
        "clp_jax/evaluation/saving.py",
        f"{_EVALUATION}/test_saving.py",
        ("saving-same-settings", "    if changed:\n        raise", "    if False:\n        raise"),
        ("saving-plays-all-again", " if job not in done]", "]"),
        ("saving-leaves-an-empty-run", "            if not found.lines:", "            if False:"),
        (
            "saving-forgets-the-answers",
            'tuple(map(float, value.pop("latencies")))',
            '(0.0,) * bool(value.pop("latencies"))',
        ),
    ),
    *faults(
        "clp_jax/commands/evaluate_playing.py",
        f"{_EVALUATION}/test_saving.py",
        ("evaluate-other-policy", "| flags | identity(policy)", "| flags"),
        ("evaluate-silent-loss", "        if not saved:\n            raise", "        raise"),
    ),
    *faults(
        "clp_jax/evaluation/rollouts.py",
        f"{_EVALUATION}/test_gymnasium_env.py",
        ("rollout-after-the-end", "if success or environment.over:", "if success:"),
        ("rollout-same-start", "zlib.crc32(task.encode()), number]).generate", "zlib.crc32(task.encode())]).generate"),
    ),
    *faults(
        "clp_jax/evaluation/statistics.py",
        f"{_EVALUATION}/test_comparison.py",
        ("paired-unpaired-variance", "pairs * (2 * second + limit * (1 - limit))", "pairs * (2 * second + limit)"),
        ("paired-no-width", "difference + _TINY, 1.0", "difference, 1.0"),
    ),
    *faults(
        "clp_jax/evaluation/comparison.py",
        f"{_EVALUATION}/test_comparison.py",
        ("compare-other-starts", '"seed", "max_steps")', '"max_steps")'),
        ("compare-sides", "paired_difference(only_first, only_second", "paired_difference(only_second, only_first"),
    ),
    *faults(
        "clp_jax/evaluation/pictures.py",
        f"{_EVALUATION}/test_comparison.py",
        (
            "page-of-one",
            "for name in sorted(first & second) for folder in folders]",
            "for name in sorted(first & second) for folder in folders[:1]]",
        ),
    ),
    *faults(
        "clp_jax/evaluation/simpler.py",
        f"{_EVALUATION}/test_simpler.py",
        ("simpler-rotation", 'as_euler("XYZ")', 'as_euler("xyz")'),
        ("simpler-gripper", "1.0 if openness > 0.5 else -1.0", "openness"),
    ),
    *faults(
        "clp_jax/evaluation/suite.py",
        "tests/test_evaluation.py -k flags",
        ("suite-too-many-episodes", "if self.starts is not None and episodes > self.starts:", "if False:"),
    ),
]
