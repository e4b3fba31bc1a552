"""A policy folder of lerobot 0.6 for SmolVLA: the checkpoint's own at the depth of the weights. No loader is needed."""

from collections.abc import Mapping
from typing import Any

import jax
from etils import epath

from clp_jax.errors import InputError
from clp_jax.files import read_json_object
from clp_jax.folders import files_below
from clp_jax.models.layers.lerobot import PolicyFiles, Wanted, robot_keys, what_no_rename_does
from clp_jax.models.smolvla.architecture import Architecture
from clp_jax.models.smolvla.layout import config_with_depths
from clp_jax.models.smolvla.processors import check_statistics_are_named, with_robot_keys
from clp_jax.models.smolvla.vlm import vlm_places
from clp_jax.processing import norm_stats
from clp_jax.processing.conventions import Conventions
from clp_jax.processing.policy_files import POSTPROCESSOR, PREPROCESSOR, state_files

LOADER = "check_lerobot.py"
"""The program in the folder that compares lerobot's actions with the recorded ones."""

INSTALL = "lerobot[smolvla]==0.6.1"
"""What pip needs for it."""

PREFIX = ""
"""The names of the layout are those of the file."""

ONE_DTYPE = False
"""lerobot itself stores the vision-language model in bfloat16 and the projections in float32."""

LOAD = """Where lerobot 0.6.1 is installed (Python 3.12, `pip install 'lerobot[smolvla]==0.6.1'`):

```python
from lerobot.policies.factory import make_pre_post_processors
from lerobot.policies.smolvla.modeling_smolvla import SmolVLAPolicy

policy = SmolVLAPolicy.from_pretrained("THIS_FOLDER", strict=True)
preprocess, postprocess = make_pre_post_processors(policy.config, pretrained_path="THIS_FOLDER")
```

```console
$ python THIS_FOLDER/check_lerobot.py    # compares with the JAX model's actions in check.npz
$ lerobot-eval --policy.path=THIS_FOLDER ...
```

`config.json` says the depth, so lerobot loads the folder as it is. Without `strict=True` it only logs weights that are
missing and goes on with random ones. It fetches configuration and tokenizer of the vision-language model from where
`vlm_model_name` points, and with `load_vlm_weights` computes in bfloat16, whatever is stored here."""

_CONFIG = "config.json"
_VLM = "vlm"
_VLM_FILES = (".json", ".txt", ".jinja")


def why_not(architecture: Architecture, record: Mapping[str, Any] | None) -> str | None:
    """Why lerobot cannot load this model; None where it can."""
    cut = {} if record is None else record["plan"]["towers"]
    vision = cut.get("vision")
    if vision is None or len(vision["keep"]) == vision["depth"]:
        return None
    return (
        f"the image encoder has {architecture.vision.depth} of {vision['depth']} blocks, but lerobot takes its depth "
        "from the vision-language model's own configuration and could not load it; use --to stablehlo."
    )


def unused_tensors(
    architecture: Architecture, leaves: Mapping[str, jax.ShapeDtypeStruct]
) -> dict[str, jax.ShapeDtypeStruct]:
    """None: every tensor of lerobot's file has its parameter."""
    del architecture, leaves
    return {}


def policy_files(architecture: Architecture, wanted: Wanted) -> PolicyFiles:
    """The checkpoint's own config, processors, statistics and VLM configuration, with what was asked for put in.

    Raises:
      InputError: the checkpoint lacks one of them.
    """
    folder = wanted.folder
    if folder is None:
        raise InputError(f"{wanted.source} has no files of a lerobot policy (assets/policy); copy them there.")
    said = _read(folder, _CONFIG)
    config = config_with_depths(said, {tower.name: tower.depth for tower in architecture.towers})
    defaults = {"chunk_size": architecture.chunk_size, "tokenizer_max_length": architecture.tokenizer_max_length}
    defaults |= {"n_action_steps": architecture.n_action_steps, "num_steps": architecture.num_steps}
    asked = {
        "chunk_size": wanted.lengths.horizon,
        "n_action_steps": min(architecture.n_action_steps, wanted.lengths.horizon),
        "tokenizer_max_length": wanted.lengths.prompt,
        "num_steps": wanted.num_steps,
    }
    config |= {key: value for key, value in asked.items() if value != defaults[key]}
    contents = {_CONFIG: config}
    for name in (PREPROCESSOR, POSTPROCESSOR):
        contents[name] = _with_prompt(_read(folder, name), architecture, wanted.lengths.prompt)
        if _has_statistics(wanted.assets):
            check_statistics_are_named(contents[name], str(folder / name))
    copies = {name: folder / name for name in state_files(folder)}
    if wanted.robot is not None:
        contents[PREPROCESSOR] = with_robot_keys(contents[PREPROCESSOR], robot_keys(wanted.robot))
    return PolicyFiles(contents, {}, copies | _vlm_files(folder, config))


def _has_statistics(assets: epath.Path | None) -> bool:
    """Whether a run saved its statistics with the step."""
    return assets is not None and any(file.name == norm_stats.FILE for file in files_below(assets))


def _with_prompt(processor: dict[str, Any], architecture: Architecture, prompt: int) -> dict[str, Any]:
    """The processor, which cuts prompts at another length if one was asked for."""
    if prompt != architecture.tokenizer_max_length:
        for step in processor["steps"]:
            if "max_length" in step.get("config", {}):
                step["config"]["max_length"] = prompt
    return processor


def _vlm_files(folder: epath.Path, config: Mapping[str, Any]) -> dict[str, epath.Path]:
    """Configuration and tokenizer of the vision-language model, where the checkpoint has them: no weights."""
    for place in vlm_places(folder, config.get("vlm_model_name")):
        if (place / _CONFIG).exists():
            files = sorted(file for file in place.iterdir() if file.suffix in _VLM_FILES)
            return {f"{_VLM}/{file.name}": file for file in files if not file.name.endswith(".index.json")}
    return {}


def _read(folder: epath.Path, name: str) -> dict[str, Any]:
    return read_json_object(_existing(folder, name))


def unlike(architecture: Architecture, conventions: Conventions) -> tuple[str, ...]:
    """What lerobot's processors do not do of what the conventions ask for, one sentence each."""
    del architecture
    return () if conventions.robot is None else what_no_rename_does(conventions.robot)


def _existing(folder: epath.Path, name: str) -> epath.Path:
    if not (folder / name).exists():
        raise InputError(f"{folder} has no {name}, which lerobot's policies need; copy it from the policy's folder.")
    return folder / name


__all__ = [
    "INSTALL",
    "LOAD",
    "LOADER",
    "ONE_DTYPE",
    "PREFIX",
    "policy_files",
    "unlike",
    "unused_tensors",
    "why_not",
]
