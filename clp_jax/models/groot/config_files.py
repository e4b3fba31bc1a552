"""Where the two files are that say what the shapes of a GR00T-N1.5 do not."""

import os
from collections.abc import Mapping
from typing import Any

from etils import epath

from clp_jax.errors import InputError
from clp_jax.files import read_json_object

Found = tuple[str, Mapping[str, Any]]
"""Name of a file, for errors, and its content."""

EAGLE = "eagle"
"""Of Eagle's files, in a checkpoint or beside it."""


def checkpoint_config(folder: epath.Path | None) -> Found | None:
    """NVIDIA's config.json: the checkpoint's own, or that of the folder which a policy of lerobot was made from."""
    config = None if folder is None else _read(folder / "config.json")
    if config is None or config.get("type") != "groot":
        return None if config is None else ("config.json", config)
    base = epath.Path(str(config.get("base_model_path", ""))) / "config.json"
    config = _read(base)
    return None if config is None else (str(base), config)


def eagle_config(given: str | os.PathLike | None, folder: epath.Path | None) -> Found | None:
    """Eagle's config.json, if there is one: see `eagle_file`."""
    path = eagle_file(given, folder)
    config = None if path is None else _read(path)
    return None if config is None else (str(path), config)


def eagle_file(given: str | os.PathLike | None, folder: epath.Path | None) -> epath.Path | None:
    """Where Eagle's config.json is: the given one, or that of a folder ``eagle`` in or beside the checkpoint's.

    Raises:
      InputError: the given file does not exist.
    """
    if given is not None:
        path = epath.Path(os.fspath(given)).expanduser()
        path = path / "config.json" if path.is_dir() else path
        if not path.exists():
            raise InputError(f"there is no file {path}; give Eagle's config.json or its folder with --vlm-config.")
        return path
    places = () if folder is None else (folder / EAGLE / "config.json", folder.parent / EAGLE / "config.json")
    return next((path for path in places if path.exists()), None)


def _read(path: epath.Path) -> dict[str, Any] | None:
    return read_json_object(path) if path.exists() else None
