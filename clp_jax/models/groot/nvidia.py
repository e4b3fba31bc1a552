"""A folder in NVIDIA's own layout, which Isaac-GR00T (release n1.5) and lerobot 0.4 load as it is at any depth."""

import json
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.errors import InputError
from clp_jax.models.groot.architecture import Architecture
from clp_jax.models.groot.metadata import has_nameless_parts, read_metadata
from clp_jax.models.groot.side_files import side_files
from clp_jax.models.layers.lerobot import Wanted

LOADER = "check_groot.py"
"""The program in the folder that compares the actions of lerobot's model with the recorded ones."""

INSTALL = "lerobot[groot]==0.4.4"
"""What pip needs for it."""

TIED = {"backbone/llm/lm_head": "backbone/llm/embed_tokens"}
"""The head is never trained by itself: upstream has one tensor for both and takes the embedding's values."""

LOAD = """With NVIDIA's code (Isaac-GR00T, release n1.5):

```python
from gr00t.model.gr00t_n1 import GR00T_N1_5

model = GR00T_N1_5.from_pretrained("THIS_FOLDER", tune_visual=False)
```

`Gr00tPolicy(model_path="THIS_FOLDER", ...)` and `scripts/gr00t_finetune.py --base-model-path THIS_FOLDER` take it too.
With lerobot 0.4.4 or 0.5 (0.6 no longer has this model):

```python
from lerobot.policies.groot.groot_n1 import GR00TN15

model = GR00TN15.from_pretrained("THIS_FOLDER")
```

```console
$ python THIS_FOLDER/check_groot.py    # compares with the JAX model's actions in check.npz
$ lerobot-train --policy.type=groot --policy.base_model_path=THIS_FOLDER ...
```

`config.json` says the depths (`select_layer`, and `num_layers` twice): nothing has to be patched. Inference needs the
entry of its embodiment in `experiment_cfg/metadata.json`. The folder `eagle`, if it is here, is a copy of the
configuration of the vision-language model; upstream has its own. `GrootPolicy.from_pretrained` of lerobot takes a
folder with one `model.safetensors` for another layout: give it as `base_model_path`."""


def why_not(architecture: Architecture, record: Mapping[str, Any] | None) -> str | None:
    """Why upstream cannot load this model; None where it can."""
    vision = ({} if record is None else record["plan"]["towers"]).get("vision")
    if vision is None or len(vision["keep"]) == vision["depth"]:
        return None
    return (
        f"the image encoder has {architecture.vision.depth} of {vision['depth']} blocks, but upstream takes its depth "
        "from Eagle's own configuration and could not load it; use --to stablehlo."
    )


def unlike(folder: epath.Path | None) -> tuple[str, ...]:
    """What NVIDIA's data configurations would miss in the statistics of a checkpoint's own files.

    Args:
      folder: of these files, if there are any.
    """
    nameless = [tag for tag, entry in read_metadata(folder).items() if has_nameless_parts(entry)]
    return tuple(
        f"experiment_cfg/metadata.json has the whole state or all actions of {tag} as one part, for the run knew no "
        "names of parts; data configurations of Isaac-GR00T do not find theirs there: train with --data-config."
        for tag in nameless
    )


def folder_files(architecture: Architecture, wanted: Wanted) -> dict[str, bytes]:
    """The checkpoint's own config, statistics and Eagle configuration by name, with what was asked for put in.

    Raises:
      InputError: the checkpoint has no config.
    """
    files = side_files(wanted.folder, depths=architecture.depths)
    if "config.json" not in files:
        raise InputError(f"{wanted.source} has no config.json of NVIDIA's (assets/policy of a step); copy it there.")
    config = json.loads(files["config.json"])
    horizon = wanted.lengths.horizon
    config |= {"action_horizon": horizon, "torch_dtype": wanted.dtype}
    config["action_head_cfg"] |= {"action_horizon": horizon, "num_inference_timesteps": wanted.num_steps}
    return files | {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
