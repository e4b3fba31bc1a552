"""Policy folders of lerobot's and steps of runs that began from them, for tests of a SmolVLA's processors."""

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

from etils import epath
from safetensors_folders import SMOLVLA
from smolvla_recordings import KEEPS, cut, params

from clp_jax.checkpoint import read_spec, write_params
from clp_jax.models import smolvla
from clp_jax.plan import PrunePlan
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.prune_folder import prune_folder

KEEP = list(KEEPS[""])


def copy_policy(place: Path) -> epath.Path:
    """A copy of the recorded policy folder, the vision-language model beside it."""
    shutil.copytree(SMOLVLA.parent / "vlm", place / "vlm")
    return epath.Path(shutil.copytree(SMOLVLA, place / "policy"))


def change_steps(file: Path | epath.Path, make: Callable[[list], list]) -> None:
    """Change the steps of a processor file."""
    content = json.loads(file.read_text())
    file.write_text(json.dumps(content | {"steps": make(content["steps"])}))


def without(name: str) -> Callable[[list], list]:
    """Steps without those of a name."""
    return lambda steps: [step for step in steps if step["registry_name"] != name]


def unnamed(steps: list) -> list:
    """Steps that name no file, as of a policy that was saved without statistics."""
    return [{key: value for key, value in step.items() if key != "state_file"} for step in steps]


def write_side_files(folder: epath.Path, out: Path, norm_stats: Mapping[str, NormStats] | None) -> None:
    """What a run keeps beside the weights of its steps."""
    for name, content in smolvla.side_files(folder, norm_stats=norm_stats).items():
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_bytes(content)


def make_step(folder: epath.Path, place: Path, robot: Robot, norm_stats: Mapping[str, NormStats] | None = None) -> Path:
    """A step of a run that read a robot: the weights of a cut of a policy folder, and its files beside them."""
    spec = read_spec(str(folder))
    plan = PrunePlan.of(spec.kind, spec.depths, {"vlm": KEEP, "action": KEEP}, coupled=spec.groups)
    prune_folder(spec, plan, place / "cut")
    write_side_files(epath.Path(place / "cut"), place / "assets" / "policy", norm_stats)
    record = json.loads((place / "cut" / "clp.json").read_text())
    conventions = json.loads(json.dumps(Conventions(robot, 7, 24).to_json()))
    flags = {"data": "d", "steps": 1, "batch_size": 1}
    record["steps"].append({"command": "finetune", "source": "s", "config": flags, "conventions": conventions})
    write_params(place / "1", cut(params(), tuple(KEEP)), assets=place / "assets", record=record)
    return place / "1"
