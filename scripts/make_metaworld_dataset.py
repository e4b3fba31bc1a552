"""Record MetaWorld's scripted experts as a LeRobot data set (v3.0), which `clp finetune --robot metaworld` reads.

``python scripts/make_metaworld_dataset.py --tasks drawer-open drawer-close --episodes 50 --out metaworld``

While an episode is recorded, the executed action is disturbed in most steps and the expert's own action is what is
stored: the set shows how to come back from states that an expert alone never sees. Only successful episodes count. Each
is a file in ``.OUT.episodes`` beside the output until all are there: a killed run goes on from them when it is started
again with the same flags.
"""

import concurrent.futures
import dataclasses
import io
import json
import multiprocessing
import os
import shutil
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from clp_jax.data.lerobot_writer import Recorded, png_of, write_lerobot
from clp_jax.errors import InputError
from clp_jax.evaluation.metaworld import FPS, INSTRUCTIONS, MAX_STEPS, Expert, MetaWorld, check_tasks
from clp_jax.outputs import staged
from clp_jax.progress import progress

_MOST_ATTEMPTS = 4
"""Attempts per wanted episode after which a task is given up."""
_OF_THE_RUN = ("out", "processes", "overwrite")
"""Flags that do not change what is recorded."""
_SHARE_BELOW = "the expert of {task} succeeded in {done} of {tried} attempts; record it with less --noise."


@dataclasses.dataclass(frozen=True, kw_only=True)
class MakeMetaworldDataset:
    """Record MetaWorld's experts."""

    tasks: tuple[str, ...]
    """Names without version, e.g. drawer-open; the word all takes every one."""
    out: str
    """Folder to create."""
    episodes: int = 50
    """Successful episodes a task."""
    image_size: int = 64
    """Pixels of the picture's edge."""
    seed: int = 0
    """Of places and noise; evaluate with another one."""
    noise: float = 0.3
    """Standard deviation of what is added to the executed displacement."""
    noise_share: float = 0.7
    """Share of the steps that are disturbed."""
    after_success: int = 4
    """Steps recorded after success."""
    max_steps: int = 250
    """Actions after which an attempt has failed."""
    processes: int = dataclasses.field(default_factory=lambda: os.cpu_count() or 1)
    """Simulators at a time."""
    overwrite: bool = False
    """Replace an existing output."""


def main() -> int:
    """Read the flags, record, turn errors into exit codes."""
    import tyro

    try:
        run(tyro.cli(MakeMetaworldDataset, config=(tyro.conf.FlagCreatePairsOff,)))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def run(config: MakeMetaworldDataset) -> None:
    """Record what is missing, then write the data set."""
    tasks = tuple(INSTRUCTIONS) if config.tasks == ("all",) else config.tasks
    check_tasks(list(tasks))
    if len(set(tasks)) < len(tasks) or config.episodes < 1 or not 0 < config.max_steps <= MAX_STEPS:
        raise InputError(f"give each task once, at least one episode and 1 to {MAX_STEPS} steps.")
    config, out = dataclasses.replace(config, tasks=tasks), Path(config.out).absolute()
    parts = out.with_name(f".{out.name}.episodes")
    with staged(out, by="scripts/make_metaworld_dataset.py", overwrite=config.overwrite) as folder:
        _open_parts(parts, config)
        recorded = _record(parts, config)
        episodes = (_read(file, task) for task in tasks for file in recorded[task])
        write_lerobot(Path(folder), episodes, fps=FPS, robot_type="metaworld")
        flags = {key: value for key, value in dataclasses.asdict(config).items() if key not in _OF_THE_RUN}
        (Path(folder) / "recorded_with.json").write_text(json.dumps(flags, indent=2))
    shutil.rmtree(parts)
    print(f"{len(tasks)} tasks, {len(tasks) * config.episodes} episodes: {out}")


def _open_parts(parts: Path, config: MakeMetaworldDataset) -> None:
    """Episodes of an earlier run are only continued with the flags that decide what they hold."""
    free = {"tasks", "episodes", *_OF_THE_RUN}
    decisive = {key: value for key, value in dataclasses.asdict(config).items() if key not in free}
    settings = parts / "flags.json"
    parts.mkdir(parents=True, exist_ok=True)
    if not settings.exists():
        _write_whole(settings, json.dumps(decisive).encode())
    elif json.loads(settings.read_text()) != decisive:
        raise InputError(f"{parts} was begun with other flags, {settings.read_text()}; use those or remove it.")


def _record(parts: Path, config: MakeMetaworldDataset) -> dict[str, list[Path]]:
    """Per task the files of its first successful attempts; which these are does not depend on the processes."""
    spawn = multiprocessing.get_context("spawn")
    wanted = dict.fromkeys(config.tasks, config.episodes)
    with (
        concurrent.futures.ProcessPoolExecutor(config.processes, mp_context=spawn) as pool,
        progress("recording", total=len(wanted) * config.episodes, unit="episodes") as advance,
    ):
        done = dict.fromkeys(wanted, 0)
        tried = dict(done)
        while missing := {task: wanted[task] - done[task] for task in wanted if done[task] < wanted[task]}:
            jobs = []
            for task, count in missing.items():
                if tried[task] >= _MOST_ATTEMPTS * config.episodes:
                    raise InputError(_SHARE_BELOW.format(task=task, done=done[task], tried=tried[task]))
                jobs += [pool.submit(_attempt, parts, config, task, tried[task] + i) for i in range(count)]
                tried[task] += count
            for job in concurrent.futures.as_completed(jobs):
                task, success = job.result()
                done[task] += success
                advance(int(success))
    return {task: [_part(parts, task, i) for i in range(tried[task]) if _succeeded(parts, task, i)] for task in wanted}


_environments: dict[str, MetaWorld] = {}
"""Of this process: making one takes a second."""


def _attempt(parts: Path, config: MakeMetaworldDataset, task: str, attempt: int) -> tuple[str, bool]:
    """Record one attempt, unless it is there already; whether it succeeded."""
    file = _part(parts, task, attempt)
    if not file.exists():
        if task not in _environments:
            while _environments:
                _environments.popitem()[1].close()
            _environments[task] = MetaWorld(
                task, seed=config.seed, image_size=config.image_size, max_steps=config.max_steps
            )
        file.parent.mkdir(exist_ok=True)
        _write_whole(file, _packed(rollout(_environments[task], config, attempt)))
    return task, _succeeded(parts, task, attempt)


def rollout(environment: MetaWorld, config: MakeMetaworldDataset, episode: int) -> dict[str, list[Any]] | None:
    """What was seen and what the expert would have done, at every step; None if it failed."""
    rng = np.random.default_rng([config.seed, zlib.crc32(environment.task.encode()), episode, 1])
    environment.reset(episode)
    expert, rows, left = Expert(environment), {"image": [], "state": [], "action": []}, None
    for _ in range(config.max_steps):
        action = expert.action()
        for key, value in (("image", environment.picture()), ("state", environment.state()), ("action", action)):
            rows[key].append(value)
        disturbed = action.copy()
        if rng.random() < config.noise_share:
            disturbed[:3] += config.noise * rng.standard_normal(3)
        if environment.step(disturbed) and left is None:
            left = config.after_success
        if left is not None:
            left -= 1
            if left < 0:
                return rows
    return None


def _packed(rows: dict[str, list[Any]] | None) -> bytes:
    """An attempt as a file: empty if it failed."""
    if rows is None:
        return b""
    pngs = [png_of(picture) for picture in rows["image"]]
    stream = io.BytesIO()
    np.savez(
        stream,
        state=np.stack(rows["state"]),
        action=np.stack(rows["action"]),
        sizes=np.array([len(png) for png in pngs]),
        pngs=np.frombuffer(b"".join(pngs), np.uint8),
    )
    return stream.getvalue()


def _read(file: Path, task: str) -> Recorded:
    with np.load(file) as arrays:
        content, ends = arrays["pngs"].tobytes(), np.cumsum(arrays["sizes"]).tolist()
        pngs = [content[start:end] for start, end in zip([0, *ends], ends, strict=False)]
        vectors = {"observation.state": arrays["state"], "action": arrays["action"]}
    return Recorded(INSTRUCTIONS[task], vectors, {"observation.image": pngs})


def _part(parts: Path, task: str, attempt: int) -> Path:
    return parts / task / f"{attempt:05d}.npz"


def _succeeded(parts: Path, task: str, attempt: int) -> bool:
    return _part(parts, task, attempt).stat().st_size > 0


def _write_whole(file: Path, content: bytes) -> None:
    """Complete or absent."""
    new = file.with_name(f"{file.name}.new")
    new.write_bytes(content)
    new.replace(file)


if __name__ == "__main__":
    sys.exit(main())
