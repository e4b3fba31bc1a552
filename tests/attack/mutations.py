"""What a bad disk, a careless editor or an attacker does to files; all of it drawn from one `random.Random`.

A function takes the generator and what is to be damaged, and says in a few words what it did.
"""

import json
import os
import random
import shutil
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MARK = "@@ to be replaced @@"
_DEEP = 100_000
RAW = (
    *("null", "true", "[]", "{}", '""', '"text"', '"../../x"', '"/dev/zero"', '"\\ud800"', '"a\\u0000b"', "[null]"),
    *("0", "-1", "1", "0.5", "3e38", "1e300", "1e400", "NaN", "-Infinity", "9" * 30, "9" * 5000, "281474976710656"),
    *("[" * _DEEP + "]" * _DEEP, '{"a":' * _DEEP + "1" + "}" * _DEEP, "[" * 999 + "]" * 999, "{", "[0,", "[1, 1]"),
)
"""JSON, or nearly, that nobody expects in its place."""


def damage(rng: random.Random, folder: Path) -> str:
    """Damages one file of a folder, or a file, in place."""
    files = [folder] if folder.is_file() else sorted(path for path in folder.rglob("*") if path.is_file())
    file = rng.choice(files)
    ways: list[Callable[[random.Random, Path, list[Path]], str]] = [_content, _content, _content, _bytes, _file]
    return f"{file.relative_to(folder) if file != folder else file.name}: {rng.choice(ways)(rng, file, files)}"


def _content(rng: random.Random, file: Path, files: list[Path]) -> str:
    """Damages what the file means, in the language of its kind."""
    if file.suffix in (".json", ".zarray") or file.name in (".zarray", "_METADATA", "_CHECKPOINT_METADATA"):
        return _json_file(rng, file)
    kinds = {".jsonl": _lines, ".safetensors": _header, ".parquet": _table}
    return kinds[file.suffix](rng, file) if file.suffix in kinds else _bytes(rng, file, files)


def flip(rng: random.Random, file: Path) -> str:
    """Flips one bit."""
    content = bytearray(file.read_bytes())
    at = rng.randrange(len(content))
    content[at] ^= 1 << rng.randrange(8)
    file.write_bytes(content)
    return f"{file}: a bit of byte {at}"


def _bytes(rng: random.Random, file: Path, files: list[Path]) -> str:
    content = bytearray(file.read_bytes())
    if not content:
        file.write_bytes(rng.randbytes(9))
        return "made of noise"
    at = rng.randrange(len(content))
    way = rng.choice(["flip", "flip", "flip", "cut", "noise", "zeros", "longer", "twice"])
    if way == "flip":
        content[at] ^= 1 << rng.randrange(8)
    elif way == "cut":
        del content[at:]
    elif way in ("noise", "zeros"):
        end = min(len(content), at + rng.choice([1, 8, 64, 1000]))
        content[at:end] = rng.randbytes(end - at) if way == "noise" else bytes(end - at)
    elif way == "longer":
        content += rng.randbytes(rng.choice([1, 100]))
    else:
        content[at:at] = content[: rng.randrange(1, 200)]
    file.write_bytes(content)
    return f"{way} at byte {at}"


def _file(rng: random.Random, file: Path, files: list[Path]) -> str:
    """Puts something else in the file's place."""
    way = rng.choice(["none", "empty", "folder", "pipe", "socket", "device", "circle", "outside", "other", "huge"])
    other = rng.choice(files)
    content = other.read_bytes()
    if way == "huge":
        os.truncate(file, 2**36)  # takes no place
        return way
    file.unlink()
    if way == "empty":
        file.touch()
    elif way == "folder":
        file.mkdir()
    elif way == "pipe":
        os.mkfifo(file)
    elif way == "socket":
        os.mknod(file, stat.S_IFSOCK | 0o600)
    elif way in ("device", "circle", "outside"):
        file.symlink_to({"device": "/dev/zero", "circle": file.name, "outside": "/etc/hostname"}[way])
    elif way == "other":
        file.write_bytes(content)
        return f"replaced by {other.name}"
    return way


def _json_file(rng: random.Random, file: Path) -> str:
    text, what = damaged_json(rng, json.loads(file.read_text()))
    file.write_text(text)
    return what


def _lines(rng: random.Random, file: Path) -> str:
    lines = file.read_text().splitlines()
    at = rng.randrange(len(lines))
    way = rng.choice(["edit", "edit", "edit", "lose", "repeat", "shuffle"])
    if way == "edit":
        lines[at], way = damaged_json(rng, json.loads(lines[at]))
    elif way == "lose":
        del lines[at]
    elif way == "repeat":
        lines.insert(at, lines[at])
    else:
        rng.shuffle(lines)
    file.write_text("".join(line + "\n" for line in lines))
    return f"line {at}: {way}"


def _header(rng: random.Random, file: Path) -> str:
    """The header of a safetensors file, its length right."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    if rng.random() < 0.3:
        tensors = [entry for name, entry in header.items() if name != "__metadata__"]
        entry = rng.choice(tensors)
        entry["dtype"] = what = rng.choice(["F32", "BF16", "F16", "I32", "F64", "BOOL", "F8_E4M3", "F4", "X"])
        text = json.dumps(header)
    else:
        text, what = damaged_json(rng, header)
    head = text.encode()
    file.write_bytes(len(head).to_bytes(8, "little") + head + content[8 + length :])
    return f"header: {what}"


def _table(rng: random.Random, file: Path) -> str:
    """A column of a parquet file."""
    table = pq.read_table(file)
    at = rng.randrange(table.num_columns)
    key, column = table.column_names[at], table.column(at)
    way = rng.choice(["drop", "twice", "null", "text", "other", "cut", "shuffle", "none", "extra", "big", "bool"])
    if way == "drop":
        table = table.remove_column(at)
    elif way == "twice":
        table = table.append_column(key, column)
    elif way == "extra":
        table = table.append_column("extra", pa.array([{"a": [1]}] * len(table)))
    elif way == "cut":
        table = table.slice(0, len(table) // 2)
    elif way == "none":
        table = table.slice(0, 0)
    elif way == "shuffle":
        order = list(range(len(table)))
        rng.shuffle(order)
        table = table.take(order)
    else:
        constant = {"text": "text", "big": 2**62, "bool": True}
        if way == "null":
            values = column.to_pylist()
            values[rng.randrange(len(values))] = None
            new = pa.array(values, column.type)
        elif way == "other":
            new = table.column(rng.randrange(table.num_columns))
        else:
            new = pa.array([constant[way]] * len(table))
        table = table.set_column(at, key, new)
    pq.write_table(table, file)
    return f"column {key}: {way}"


def damaged_json(rng: random.Random, value: Any) -> tuple[str, str]:
    """JSON text of a value with one thing wrong somewhere in it, and what."""
    holder = {"": json.loads(json.dumps(value))}
    container, key = _place(rng, holder)
    raw = rng.choice(RAW)
    way = rng.choice(["replace", "replace", "replace", "delete", "twice", "rename", "extra", "exchange"])
    where = f"{key!r}"
    if container is holder or way == "replace" or (way == "twice" and isinstance(container, list)):
        container[key] = _MARK
        return json.dumps(holder[""]).replace(json.dumps(_MARK), raw), f"{where} is {raw[:30]}"
    if way == "delete":
        del container[key]
    elif way == "rename" and isinstance(container, dict):
        container[f"{key}x"] = container.pop(key)
    elif way == "extra" and isinstance(container, dict):
        container["extra"] = _MARK
    elif way == "twice":
        again = json.dumps(container[key])
        container[key] = _MARK
        return (
            json.dumps(holder[""]).replace(json.dumps(_MARK), f"{again}, {json.dumps(key)}: {raw}"),
            f"{where} twice, then {raw[:30]}",
        )
    else:
        other, other_key = _place(rng, holder)
        if other is not holder:
            container[key], other[other_key] = other[other_key], json.loads(json.dumps(container[key]))
        way = f"exchanged with {other_key!r}"
    return json.dumps(holder[""]).replace(json.dumps(_MARK), raw), f"{where}: {way}"


def _place(rng: random.Random, holder: dict[str, Any]) -> tuple[Any, Any]:
    """A container and a key or index in it, deep places as likely as shallow ones."""
    container, key = holder, ""
    while isinstance(container[key], dict | list) and container[key] and rng.random() < 0.8:
        container = container[key]
        key = rng.choice(sorted(container) if isinstance(container, dict) else range(len(container)))
    return container, key


def copied(source: Path, target: Path) -> Path:
    """A copy of a file or folder that may be damaged."""
    if source.is_dir():
        return Path(shutil.copytree(source, target, symlinks=True))
    return Path(shutil.copy(source, target))
