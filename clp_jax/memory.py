"""How much memory this process could have, containers included."""

import os
from pathlib import Path

ROOT = Path("/")


def free_memory(root: Path = ROOT) -> int:
    """Bytes that programs could have now: of the machine, or of the control group where that allows less.

    Caches that the kernel would give back count as free on Linux alone; elsewhere it is all memory of the machine.

    Args:
      root: of the file system, where ``proc/meminfo``, ``proc/self/cgroup`` and ``sys/fs/cgroup`` (version 2 or 1) are.
    """
    try:
        free = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min([free, *_of_groups(root)]), 0)


def _of_groups(root: Path) -> list[int]:
    """What is left of each limit of this process's control group and of those above it, as Slurm nests them.

    A container sees its own at the top, and may be told a path that is none there.
    """
    top, left = root / "sys/fs/cgroup", []
    for group, limit, used in (
        *((group, "memory.max", "memory.current") for group in _lineage(root, top, "")),
        *(
            (group, "memory.limit_in_bytes", "memory.usage_in_bytes")
            for group in _lineage(root, top / "memory", "memory")
        ),
    ):
        try:
            most, now = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
            cached = _fields(group / "memory.stat").get("inactive_file", 0)
        except (OSError, ValueError):  # no such group, or "max", which is no limit
            continue
        left.append(most - now + cached)
    return left


def _lineage(root: Path, top: Path, controller: str) -> list[Path]:
    """The folders of this process's group and of all above it; the top one alone where nothing says which it is."""
    try:
        lines = (root / "proc/self/cgroup").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [top]
    paths = (path for _, names, path in (line.split(":", 2) for line in lines) if controller in names.split(","))
    own = top / next(paths, "").lstrip("/")
    return [own, *own.parents[: len(own.parts) - len(top.parts)]]


def _fields(file: Path) -> dict[str, int]:
    """The first two words of every line."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
