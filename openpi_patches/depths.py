"""How deep a checkpoint is, read from the shapes in it; no array is read."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RECORD_FILE = "clp.json"
TORCH_FILE = "model.safetensors"

_STACKS = {"llm": "PaliGemma/llm/layers/", "vision": "PaliGemma/img/Transformer/encoderblock/"}
_TORCH_LAYERS = {
    "llm": r"paligemma_with_expert\.(?:paligemma\.model\.language_model|gemma_expert\.model)\.layers\.(\d+)\.",
    "vision": r"paligemma_with_expert\.paligemma\.model\.vision_tower\.vision_model\.encoder\.layers\.(\d+)\.",
}


class PatchError(RuntimeError):
    """openpi cannot be patched, or a checkpoint does not say how deep it is; the message says what to do."""


@dataclass(frozen=True)
class Depths:
    """Blocks of a model: ``llm`` of every Gemma expert (they share one stack), ``vision`` of SigLIP."""

    llm: int
    vision: int


def depths_of_params(params: Mapping[str, Any]) -> Depths:
    """The depths of a nested parameter tree (arrays, or anything with a shape) below ``params``.

    Raises:
      PatchError: it is no π0-family tree, or leaves of one stack disagree.

    >>> class Leaf: shape = (3, 8)
    >>> stack = {"layers": {"mlp": Leaf()}}, {"Transformer": {"encoderblock": {"bias": Leaf()}}}
    >>> depths_of_params({"PaliGemma": {"llm": stack[0], "img": stack[1]}})
    Depths(llm=3, vision=3)
    """
    shapes = dict(_shapes(params, ""))
    found = {}
    for tower, prefix in _STACKS.items():
        depths = {shape[0] for path, shape in shapes.items() if path.startswith(prefix) and shape}
        if len(depths) != 1:
            what = f"disagree about its depth: {sorted(depths)}" if depths else "are missing"
            raise PatchError(f"not the parameters of a π0-family model: the leaves below {prefix} {what}.")
        found[tower] = depths.pop()
    return Depths(**found)


def depths_of_safetensors(file: Path) -> Depths:
    """The depths of openpi's PyTorch model, counted from the names in the header of its weights.

    Raises:
      PatchError: no π0-family model, or its experts differ in depth.
    """
    with file.open("rb") as stream:
        header = json.loads(stream.read(int.from_bytes(stream.read(8), "little")))
    found = {}
    for tower, pattern in _TORCH_LAYERS.items():
        indices: dict[str, set[int]] = {}
        for name in header:
            if match := re.match(pattern, name):
                indices.setdefault(name[: match.start(1)], set()).add(int(match.group(1)))
        depths = {len(numbers) for numbers in indices.values()}
        if len(depths) != 1 or any(max(numbers) + 1 != len(numbers) for numbers in indices.values()):
            raise PatchError(f"{file}: the layers of the tower {tower!r} are missing, have gaps or differ in number.")
        found[tower] = depths.pop()
    return Depths(**found)


def depths_of_checkpoint(path: str | Path) -> Depths:
    """The depths of a checkpoint on this machine.

    Args:
      path: step folder, its ``params``, or a folder with ``model.safetensors``.

    Raises:
      PatchError: there is no such checkpoint, or its ``clp.json`` and its weights say different things.
    """
    path = Path(path).expanduser().resolve()
    if (path / TORCH_FILE).exists():
        step, depths = path, depths_of_safetensors(path / TORCH_FILE)
    else:
        item = path / "params" if (path / "params").is_dir() else path
        if not (item / "_METADATA").exists():
            raise PatchError(f"{path} is no checkpoint: give a step folder, its params, or a folder with {TORCH_FILE}.")
        step, depths = item.parent, depths_of_params(_metadata(item))
    _check_record(step / RECORD_FILE, depths)
    return depths


def _metadata(item: Path) -> Mapping[str, Any]:
    """The tree of array descriptions of an Orbax item, without a trailing "value"."""
    import orbax.checkpoint as ocp

    with ocp.PyTreeCheckpointer() as checkpointer:
        metadata: Any = checkpointer.metadata(item)
    metadata = getattr(metadata, "item_metadata", metadata)  # what newer Orbax wraps it in
    return getattr(metadata, "tree", metadata)["params"]


def _shapes(tree: Mapping[str, Any], prefix: str) -> Iterable[tuple[str, tuple[int, ...]]]:
    for key, node in tree.items():
        if isinstance(node, Mapping):
            yield from _shapes(node, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", tuple(node.shape)


def _check_record(file: Path, depths: Depths) -> None:
    """Compares with ``clp.json``, where the checkpoint has one (what openpi's training saves has none)."""
    if not file.exists():
        return
    towers = json.loads(file.read_text())["plan"]["towers"]
    for name, found in (("vlm", depths.llm), ("action", depths.llm), ("vision", depths.vision)):
        if name in towers and len(towers[name]["keep"]) != found:
            raise PatchError(
                f"{file} keeps {len(towers[name]['keep'])} blocks of the tower {name!r}, the weights beside it have "
                f"{found}: they do not belong together; copy the checkpoint again."
            )
