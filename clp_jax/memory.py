"""How much memory this process could have, containers included."""

import os
from pathlib import Path

ROOT = Path("/")


def free_memory(root: Path = ROOT) -> int:
    """Bytes that programs could have now: of the machine, or of the control group where that allows less.

    Caches that the kernel would give back count as free on Linux alone; elsewhere it is all memory of the machine.

    Args:
      root: of the file system, where ``proc/meminfo`` and ``sys/fs/cgroup`` (version 2 or 1) are.
    """
    try:
        free = _fields(root / "proc/meminfo")["MemAvailable:"] * 1024
    except (OSError, KeyError):
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(min([free, *_of_groups(root / "sys/fs/cgroup")]), 0)


def _of_groups(folder: Path) -> list[int]:
    """What is left of each limit that a control group has; a container sees its own at the top."""
    left = []
    for part, limit, used in (
        (".", "memory.max", "memory.current"),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        group = folder / part
        try:
            most, now = (int((group / name).read_text(encoding="ascii")) for name in (limit, used))
            cached = _fields(group / "memory.stat").get("inactive_file", 0)
        except (OSError, ValueError):  # no such group, or "max", which is no limit
            continue
        left.append(most - now + cached)
    return left


def _fields(file: Path) -> dict[str, int]:
    """The first two words of every line."""
    lines = (line.split() for line in file.read_text(encoding="ascii").splitlines())
    return {words[0]: int(words[1]) for words in lines if len(words) > 1}
