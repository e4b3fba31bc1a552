"""The small files of a GR00T folder: what a run keeps so that its steps can be loaded, served and exported."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.files import read_bytes, read_json_object
from clp_jax.models.groot.config_files import EAGLE, eagle_file
from clp_jax.models.groot.layout import config_with_depths

_EXPERIMENT = "experiment_cfg"
"""Statistics and modalities of the data, as NVIDIA's training and inference have them."""

_OF_EAGLE = (".json", ".txt", ".jinja")
"""Configuration, tokenizer and processor of the vision-language model; no weights, no code."""


def side_files(
    folder: epath.Path | None,
    *,
    vlm_config: str | os.PathLike[str] | None = None,
    depths: Mapping[str, int] | None = None,
    **others: Any,
) -> dict[str, bytes]:
    """Contents of the files beside the weights, by name relative to the folder that is to hold them.

    Args:
      folder: of the checkpoint that the weights came from.
      vlm_config: Eagle's ``config.json`` or its folder, if it was given.
      depths: of the towers, in place of those in ``config.json``.
      others: what a GR00T's files do not say.
    """
    del others
    if folder is None or not (folder / "config.json").exists():
        return {}
    config = read_json_object(folder / "config.json")
    if depths is not None:
        config = config_with_depths(config, {tower: depth for tower, depth in depths.items() if tower != "vision"})
    files = {"config.json": (json.dumps(config, indent=2) + "\n").encode()}
    if (folder / _EXPERIMENT).is_dir():
        of_data = [file for file in sorted((folder / _EXPERIMENT).iterdir()) if file.is_file()]
        files |= {f"{_EXPERIMENT}/{file.name}": read_bytes(file) for file in of_data}
    if (eagle := eagle_file(vlm_config, folder)) is not None:
        beside = [file for file in sorted(eagle.parent.iterdir()) if file.suffix in _OF_EAGLE]
        files |= {f"{EAGLE}/{file.name}": read_bytes(file) for file in beside} | {
            f"{EAGLE}/config.json": read_bytes(eagle)
        }
    return files
