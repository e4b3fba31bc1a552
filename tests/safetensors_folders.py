"""Folders of safetensors files for tests: written and read by the format's own library where it can."""

import json
import shutil
from pathlib import Path

import safetensors

GOLDEN = Path(__file__).parent / "golden"
SMOLVLA = GOLDEN / "smolvla" / "ckpt"
GROOT = GOLDEN / "groot" / "ckpt"
GROOT_PRUNED = GOLDEN / "groot" / "ckpt_pruned"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"

Tensor = tuple[str, tuple[int, ...], bytes]
"""Dtype by the format's name, shape and bytes."""


def groot_keep() -> dict[str, list[int]]:
    """What the recorded cut keeps, by our names of the towers."""
    keep = json.loads((GOLDEN / "groot" / "keep.json").read_text())
    return {"llm": keep["llm"], "vl": keep["vl_self_attention"], "dit": keep["dit"]}


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """Every tensor of all weights of a folder, as the format's own library reads them."""
    index = folder / INDEX
    names = dict.fromkeys(json.loads(index.read_text())["weight_map"].values()) if index.exists() else [WEIGHTS]
    found = {}
    for name in names:
        for key, entry in safetensors.deserialize((folder / name).read_bytes()):
            assert key not in found
            found[key] = (entry["dtype"], tuple(entry["shape"]), bytes(entry["data"]))
    return found


def header_of(file: Path) -> dict:
    """The JSON of a file's header, in its order."""
    data = file.read_bytes()
    return json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])


def write_raw(file: Path, header: dict | bytes, data: bytes) -> None:
    """Any header before any bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data)


def write_file(file: Path, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None) -> None:
    """A file with these tensors in this order."""
    header, data = {} if metadata is None else {"__metadata__": metadata}, b""
    for name, (dtype, shape, content) in tensors.items():
        place = [len(data), len(data) + len(content)]
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": place}
        data += content
    write_raw(file, header, data)


def copied(source: Path, target: Path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(source, target))


def change_config(folder: Path, change) -> None:
    """Lets a function change the config in place."""
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def sharded(source: Path, target: Path, count: int, *, spread: bool = False) -> Path:
    """The same checkpoint in shards: by order of the names, or every tensor in another file than the one before."""
    copied(source, target)
    tensors = tensors_of(source)
    names = list(tensors)
    parts = [names[number::count] for number in range(count)]
    if not spread:
        size = -(-len(names) // count)
        parts = [names[start : start + size] for start in range(0, len(names), size)]
    weight_map = {}
    for number, part in enumerate(parts, 1):
        file = f"model-{number:05}-of-{count:05}.safetensors"
        write_file(target / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    write_index(target, weight_map, {"total_size": sum(len(content) for _, _, content in tensors.values())})
    (target / WEIGHTS).unlink()
    return target


def write_index(folder: Path, weight_map: dict[str, str], metadata: dict | None = None) -> None:
    """The index as transformers writes it."""
    (folder / INDEX).write_text(json.dumps({"metadata": metadata or {}, "weight_map": weight_map}, indent=2) + "\n")
