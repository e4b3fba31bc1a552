"""The small files of a SmolVLA folder: what a run keeps so that its steps can be loaded, served and exported."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.files import read_bytes, read_json_object
from clp_jax.models.smolvla.layout import config_with_depths
from clp_jax.models.smolvla.processors import with_statistics
from clp_jax.models.smolvla.tokenizer import find_tokenizer
from clp_jax.models.smolvla.vlm import vlm_places
from clp_jax.processing import policy_files
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.tokenizer_files import BESIDE, FILE


def side_files(
    folder: epath.Path | None,
    *,
    vlm_config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    norm_stats: Mapping[str, NormStats] | None = None,
    depths: Mapping[str, int] | None = None,
    image_sizes: Mapping[str, tuple[int, int]] | None = None,
    **others: Any,
) -> dict[str, bytes]:
    """Contents of the files beside the weights, by name relative to the folder that is to hold them.

    Args:
      folder: policy folder that the weights came from.
      vlm_config: ``config.json`` of the vision-language model, or its folder, if it was given.
      tokenizer: ``tokenizer.json`` or its folder, if it was given.
      norm_stats: in place of the folder's.
      depths: of the towers, in place of those in ``config.json``.
      image_sizes: height and width per camera, in place of those in ``config.json``.
      others: what a SmolVLA's files do not say.
    """
    del others
    if folder is None:
        return {}
    config = read_json_object(folder / "config.json")
    files = _of_vlm(folder, config.get("vlm_model_name"), vlm_config, tokenizer)
    states = {name: read_bytes(folder / name) for name in policy_files.state_files(folder)}
    for name in (policy_files.PREPROCESSOR, policy_files.POSTPROCESSOR):
        if not (folder / name).exists():
            continue
        files[name] = read_bytes(folder / name)
        if norm_stats is not None:
            read = {file: policy_files.read_vectors(folder / file) for file in states}
            content, changed = with_statistics(read_json_object(folder / name), read, norm_stats)
            files[name], states = _json(content), states | changed
    files |= states
    if depths is not None:
        config = config_with_depths(config, depths)
    for camera, (height, width) in (image_sizes or {}).items():
        config["input_features"][camera]["shape"] = [3, height, width]
    return files | {"config.json": _json(config)}


def _json(content: Mapping[str, Any]) -> bytes:
    """A JSON file as lerobot writes it."""
    return (json.dumps(content, indent=4) + "\n").encode()


def _of_vlm(
    folder: epath.Path,
    name: str | None,
    vlm_config: str | os.PathLike[str] | None,
    tokenizer: str | os.PathLike[str] | None,
) -> dict[str, bytes]:
    """Configuration and tokenizer of the vision-language model, below ``vlm``."""
    files = {}
    if vlm_config is not None:
        given = epath.Path(vlm_config)
        places = [given if given.is_dir() else given.parent]
        files["vlm/config.json"] = read_bytes((given / "config.json") if given.is_dir() else given)
    else:
        places = vlm_places(folder, name)
        found = next((place / "config.json" for place in places if (place / "config.json").exists()), None)
        files |= {} if found is None else {"vlm/config.json": read_bytes(found)}
    beside = [place / FILE for place in places if (place / FILE).exists()]
    file = find_tokenizer(tokenizer, folder) or next(iter(beside), None)
    if file is not None:
        files[f"vlm/{FILE}"] = read_bytes(file)
        files |= {f"vlm/{name}": read_bytes(file.parent / name) for name in BESIDE if (file.parent / name).exists()}
    return files
