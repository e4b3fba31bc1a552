"""The small files of a GR00T folder: what a run keeps so that its steps can be loaded, served and exported."""

import json
import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.files import read_bytes, read_json_object
from clp_jax.models.groot.config_files import EAGLE, eagle_file
from clp_jax.models.groot.layout import config_with_depths
from clp_jax.models.groot.metadata import FILE as METADATA
from clp_jax.models.groot.metadata import only_tag, read_metadata, with_statistics
from clp_jax.models.groot.tokenizer import find_tokenizer
from clp_jax.processing.norm_stats import NormStats
from clp_jax.processing.robots import Robot
from clp_jax.processing.tokenizer_files import ALL as OF_TOKENIZER

_EXPERIMENT = "experiment_cfg"
"""Statistics and modalities of the data, as NVIDIA's training and inference have them."""

_OF_EAGLE = (".json", ".txt", ".jinja")
"""Configuration, tokenizer and processor of the vision-language model; no weights, no code."""


def side_files(
    folder: epath.Path | None,
    *,
    vlm_config: str | os.PathLike[str] | None = None,
    tokenizer: str | os.PathLike[str] | None = None,
    embodiment: str | None = None,
    norm_stats: Mapping[str, NormStats] | None = None,
    depths: Mapping[str, int] | None = None,
    robot: Robot | None = None,
    videos: Mapping[str, tuple[int, int, float]] | None = None,
    **others: Any,
) -> dict[str, bytes]:
    """Contents of the files beside the weights, by name relative to the folder that is to hold them.

    Args:
      folder: of the checkpoint that the weights came from.
      vlm_config: Eagle's ``config.json`` or its folder, if it was given.
      tokenizer: file or folder, if it was given.
      embodiment: tag or number of the robot, if it was given: the files then speak of it alone.
      norm_stats: of the robot, in place of the folder's.
      depths: of the towers, in place of those in ``config.json``.
      robot: whose statistics these are, with the names of its parts.
      videos: per camera of the robot height and width of its pictures, and how many there are in a second.
      others: what a GR00T's files do not say.
    """
    del others
    if folder is None or not (folder / "config.json").exists():
        return {}
    config = read_json_object(folder / "config.json")
    if depths is not None:
        config = config_with_depths(config, {tower: depth for tower, depth in depths.items() if tower != "vision"})
    files = {"config.json": _json(config)} | _of_data(folder, embodiment, norm_stats, robot, videos or {})
    if (eagle := eagle_file(vlm_config, folder)) is not None:
        beside = [file for file in sorted(eagle.parent.iterdir()) if file.suffix in _OF_EAGLE]
        files |= {f"{EAGLE}/{file.name}": read_bytes(file) for file in beside} | {
            f"{EAGLE}/config.json": read_bytes(eagle)
        }
    if (found := find_tokenizer(tokenizer, folder)) is not None:
        files = {name: content for name, content in files.items() if name not in {f"{EAGLE}/{n}" for n in OF_TOKENIZER}}
        beside = [found.parent / name for name in OF_TOKENIZER if (found.parent / name).exists()]
        files |= {f"{EAGLE}/{file.name}": read_bytes(file) for file in beside}
    return files


def _of_data(
    folder: epath.Path,
    embodiment: str | None,
    norm_stats: Mapping[str, NormStats] | None,
    robot: Robot | None,
    videos: Mapping[str, tuple[int, int, float]],
) -> dict[str, bytes]:
    """What training left about its data; of one robot alone where it is said."""
    place = folder / _EXPERIMENT
    found = sorted(file for file in place.iterdir() if file.is_file()) if place.is_dir() else []
    files = {f"{_EXPERIMENT}/{file.name}": read_bytes(file) for file in found}
    metadata, tag = read_metadata(folder), embodiment or only_tag(folder)
    if tag is not None and norm_stats is not None and all(entry.min is not None for entry in norm_stats.values()):
        return files | {METADATA: _json(with_statistics(metadata, tag, norm_stats, robot, videos))}
    return files | {METADATA: _json({tag: metadata[tag]})} if tag in metadata else files


def _json(content: Any) -> bytes:
    return (json.dumps(content, indent=2) + "\n").encode()
