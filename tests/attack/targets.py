"""What is attacked: small inputs of every kind that the product reads, and what it does with them."""

import functools
import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import toys
from attack import mutations
from attack.meeting import killed_finetune, race_analyse, race_export, race_finetune, race_prune
from attack.messages import messages
from attack.running import Silent, Target, by_command, run_command
from checkpoints import save_by_orbax
from etils import epath
from safetensors_folders import GROOT, SMOLVLA

from clp_jax.analysis import Analysis
from clp_jax.checkpoint import fingerprint, read_spec, write_params
from clp_jax.data import load_npz
from clp_jax.data.recording import open_recording
from clp_jax.errors import InputError
from clp_jax.loading import read_architecture
from clp_jax.models import Lengths, family_of
from clp_jax.plan import PrunePlan
from clp_jax.processing import norm_stats
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot, read_robot
from clp_jax.similarity import TowerSimilarity
from scripts.make_lerobot_toy import write

_LENGTHS = Lengths(toys.HORIZON, toys.PROMPT)
_ROBOT = Robot("toy", {"base_0_rgb": "observation.video", "left_wrist_0_rgb": "observation.still"})


def targets(folder: Path) -> dict[str, Callable[[], Target]]:
    """Every target by name, made in a folder when it is asked for."""
    makers = (
        *(checkpoint_ours, chunks_of_ours, checkpoint_orbax, smolvla_weights, groot_weights, smolvla_folder),
        *(record, export_record, plan, analysis, statistics, policy_statistics, robot_file, calibration),
        *(data_v21, data_v30, messages),
        *(race_prune, race_export, race_analyse, race_finetune, killed_finetune),
    )
    return {maker.__name__.replace("_", "-"): functools.partial(maker, folder / maker.__name__) for maker in makers}


def checkpoint_ours(folder: Path) -> Target:
    """A checkpoint as we write it: any file of it."""
    return by_command(_pruned(folder), _prune, whole=True)


def chunks_of_ours(folder: Path) -> Target:
    """The chunks of a checkpoint that we wrote, which have check sums: no byte may change without a word."""

    def flipped(rng: random.Random, step: Path) -> str:
        file = rng.choice(sorted(path for path in step.rglob("*") if re.fullmatch(r"[\d.]+", path.name)))
        return f"{file.name}: {mutations.damage(rng, file)}" if rng.random() < 0.2 else mutations.flip(rng, file)

    return by_command(_pruned(folder), _prune, damage=flipped, whole=True)


def checkpoint_orbax(folder: Path) -> Target:
    """A checkpoint as openpi's training writes it, in an OCDBT database."""
    save_by_orbax(folder / "step", toys.params(toys.architecture()), with_value=True)
    return by_command(folder / "step", _prune)


def smolvla_weights(folder: Path) -> Target:
    """lerobot's policy folder, cut."""
    return by_command(SMOLVLA, lambda source, out: _prune(source, out, "0,1,4,5"))


def groot_weights(folder: Path) -> Target:
    """NVIDIA's folder, cut."""
    return by_command(GROOT, lambda source, out: _prune(source, out, "dit=0,3"))


def smolvla_folder(folder: Path) -> Target:
    """The small files of a policy folder and of its vision-language model, as serving and training read them."""
    shutil.copytree(SMOLVLA, folder)
    shutil.copytree(SMOLVLA.parent / "vlm", folder / "vlm")

    def use(source: Path, out: Path) -> None:
        run_command(["inspect", str(source)])
        spec = read_spec(source)
        architecture = read_architecture(spec)
        family = family_of(architecture)
        assert spec.assets is not None
        robot = family.own_robot(architecture)
        family.load_tokenizer(architecture, None, spec.assets)
        found = family.norm_stats_of(spec.assets)
        _check_statistics(found or {})
        assert robot is not None
        family.side_files(spec.folder, depths=architecture.depths)

    def damage(rng: random.Random, copy: Path) -> str:
        return mutations.damage(rng, rng.choice([path for path in copy.iterdir() if path.name != "model.safetensors"]))

    return Target(folder, use, damage=damage)


def record(folder: Path) -> Target:
    """``clp.json`` of a pruned checkpoint, pruned again."""
    return by_command(_pruned(folder), _prune, damage=_only("clp.json"))


def export_record(folder: Path) -> Target:
    """``clp.json`` of a pruned checkpoint, inspected and exported."""

    def use(source: Path, out: Path) -> None:
        run_command(["inspect", str(source), "--json"])
        words = ["--to", "openpi", "--check", "bits", "--out", str(out)]
        run_command(["export", "--checkpoint", str(source), *words])

    step = mutations.copied(_pruned(folder), folder / "step")
    content = json.loads((step / "clp.json").read_text())
    config = {"action_horizon": 4, "max_token_len": 5, "state_in_prompt": False}
    config |= {"data": "set", "steps": 3, "batch_size": 2}
    trained = {"command": "finetune", "source": "here", "source_fingerprint": "0", "config": config}
    (step / "clp.json").write_text(json.dumps(content | {"steps": [*content["steps"], trained]}))
    return Target(step, use, damage=_only("clp.json"))


def plan(folder: Path) -> Target:
    """An edited plan."""
    full = _full(folder)
    folder.mkdir()
    _plan(toys.architecture().depths).save(folder / "plan.json")

    def words(source: Path, out: Path) -> list[str]:
        return ["prune", "--checkpoint", str(full), "--plan", str(source), "--out", str(out)]

    return by_command(folder / "plan.json", words)


def analysis(folder: Path) -> Target:
    """The folder of an analysis."""
    full = _full(folder)
    architecture = toys.architecture()
    rng = np.random.default_rng(0)
    towers = {tower: _similarity(rng, architecture.depths[tower]) for tower in ("vlm", "action")}
    meta = {"observations": 12, "checkpoint_fingerprint": fingerprint(read_spec(full))}
    (folder / "analysis").mkdir(parents=True)
    made = Analysis("pi0", architecture.towers, (("vlm", "action"),), towers, {}, meta)
    made.save(folder / "analysis" / "similarity.npz")
    _plan(architecture.depths).save(folder / "analysis" / "plan.json")

    def words(source: Path, out: Path) -> list[str]:
        depth = ["--keep-layers", "2"]
        return ["prune", "--checkpoint", str(full), "--analysis", str(source), "--out", str(out), *depth]

    return by_command(folder / "analysis", words, damage=_archive)


def statistics(folder: Path) -> Target:
    """openpi's ``norm_stats.json``."""
    entry = NormStats(np.arange(3.0), np.ones(3), np.zeros(3) - 4, np.ones(3) * 4)
    norm_stats.save(folder, {"state": entry, "actions": entry})
    return Target(folder, lambda source, out: _check_statistics(norm_stats.load(source)))


def policy_statistics(folder: Path) -> Target:
    """The statistics in the processors of a policy folder."""
    folder.mkdir()
    for file in SMOLVLA.glob("policy_*"):
        shutil.copy(file, folder)

    def use(source: Path, out: Path) -> None:
        from clp_jax.processing.policy_files import norm_stats_of, state_files

        for name in state_files(epath.Path(source)):
            assert (source / name).resolve().is_relative_to(source.resolve()) or not (source / name).exists()
        _check_statistics(norm_stats_of(epath.Path(source)) or {})

    return Target(folder, use)


def robot_file(folder: Path) -> Target:
    """A robot described by its owner."""
    folder.mkdir()
    value = {"images": {"base_0_rgb": "top"}, "state": ["joints", "gripper"], "actions": "action", "delta": [7, -1]}
    (folder / "my.json").write_text(json.dumps(value | {"units": "own", "prompt": "go", "action_dim": 8}))
    return Target(folder / "my.json", lambda source, out: read_robot(source))


def calibration(folder: Path) -> Target:
    """A ``.npz`` of observations."""
    folder.mkdir()
    architecture = toys.architecture()
    np.savez_compressed(folder / "data.npz", **toys.data(architecture, 3).arrays)
    return Target(folder / "data.npz", lambda source, out: load_npz(source, architecture), damage=_archive)


def data_v21(folder: Path) -> Target:
    """A LeRobot data set, one file an episode."""
    return _data_set(folder, "v2.1")


def data_v30(folder: Path) -> Target:
    """A LeRobot data set, several episodes a file."""
    return _data_set(folder, "v3.0")


def _data_set(folder: Path, version: str) -> Target:
    cameras = {"observation.video": "video", "observation.still": "image"}
    write(folder, version, {"observation.state": 5, "action": 3}, cameras, size=(24, 32))

    def use(source: Path, out: Path) -> None:
        checked = _outcome(lambda: run_command(["check", "--data", str(source)]))
        recording = open_recording(source, _ROBOT)
        for row in range(len(recording.data)):
            for key in cameras:
                recording.data.image(key, row)
        if not np.isfinite(recording.state).all() or not np.isfinite(recording.actions).all():
            raise Silent("state or actions are not finite")
        if checked is not None:
            raise checked

    return Target(folder, use)


def _outcome(function: Callable[[], Any]) -> InputError | None:
    try:
        function()
    except InputError as error:
        return error
    return None


def _full(folder: Path) -> Path:
    """The toy as a checkpoint of ours with statistics; one for all targets."""
    full = folder.parent / "full"
    if not full.exists():
        entry = NormStats(np.zeros(6), np.ones(6))
        norm_stats.save(folder.parent / "assets" / "robot", {"state": entry, "actions": entry})
        write_params(full, toys.params(toys.architecture()), assets=folder.parent / "assets")
    return full


def _pruned(folder: Path) -> Path:
    """It cut; one for all targets."""
    pruned = folder.parent / "pruned"
    if not pruned.exists():
        run_command(_prune(_full(folder), pruned, "0,1,3"))
    return pruned


def _prune(source: Path, out: Path, keep: str = "0,1") -> list[str]:
    return ["prune", "--checkpoint", str(source), "--keep", *keep.split(), "--out", str(out)]


def _plan(depths: dict[str, int]) -> PrunePlan:
    towers = ("vlm", "action")
    return PrunePlan.of("pi0", depths, dict.fromkeys(towers, (0, 2)), coupled=(towers,))


def _only(name: str) -> Callable[[random.Random, Path], str]:
    return lambda rng, folder: mutations.damage(rng, folder / name)


def _archive(rng: random.Random, source: Path) -> str:
    """Damages a ``.npz``: its bytes, or an array of it in a file that is otherwise whole."""
    file = source if source.is_file() else rng.choice(sorted(source.iterdir()))
    if file.suffix != ".npz" or rng.random() < 0.4:
        return mutations.damage(rng, file)
    with np.load(file) as archive:
        arrays = dict(archive)
    key = rng.choice(sorted(arrays))
    way, array = rng.choice(["drop", "nan", "huge", "shape", "text", "dtype", "zero", "json"]), arrays[key]
    if key == "meta" and way != "drop":
        text, way = mutations.damaged_json(rng, json.loads(str(array)))
        arrays[key] = np.array(text)
    elif way == "drop":
        del arrays[key]
    else:
        new = {
            "nan": np.full(array.shape, np.nan, np.float32),
            "huge": np.full(array.shape, 1e300),
            "shape": array[..., None],
            "text": np.full(array.shape, "text"),
            "dtype": array.astype(np.complex64) if array.dtype.kind != "U" else array,
            "zero": np.zeros((0, *array.shape[1:]), array.dtype),
            "json": np.array(json.dumps([1])),
        }
        arrays[key] = new[way]
    np.savez(file, **arrays)
    if rng.random() < 0.2:
        content = file.read_bytes()
        file.write_bytes(re.sub(rb"'shape': \((\d+)", rb"'shape': (9\1", content))
        way += ", shapes that lie"
    return f"{key}: {way}"


def _check_statistics(stats: dict[str, NormStats]) -> None:
    """What no data have must have been refused."""
    largest = np.finfo(np.float32).max
    for name, entry in stats.items():
        for key, vector in vars(entry).items():
            if vector is not None and not (np.asarray(vector).ndim == 1 and (np.abs(vector) <= largest).all()):
                raise Silent(f"{name}.{key} is {vector}")
        if (np.asarray(entry.std) < 0).any():
            raise Silent(f"{name} has a negative deviation")
        if (entry.q01 is None) != (entry.q99 is None) or (entry.q01 is not None and (entry.q01 > entry.q99).any()):
            raise Silent(f"{name} has quantiles in the wrong order")


def _similarity(rng: np.random.Generator, depth: int) -> TowerSimilarity:
    matrices = rng.uniform(0.5, 1, (5, depth + 1, depth + 1)).astype(np.float32)
    four, ones = np.stack([matrices[0]] * 4), np.ones(depth + 1, bool)
    share = np.full(depth + 1, 0.2, np.float32)
    return TowerSimilarity(four, *matrices[1:], share, np.stack([four] * 3), ones, 288)
