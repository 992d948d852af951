"""How much memory this process may take, by what the system has left and what it is allowed.

Knows Linux's ``/proc/meminfo`` and control groups of both versions (cgroups(7)). What cannot be read does not limit.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

__all__ = ["available_memory"]

_MEMINFO = Path("/proc/meminfo")
_MEMBERSHIP = Path("/proc/self/cgroup")
_MOUNTS = Path("/sys/fs/cgroup")


def available_memory() -> int | None:
    """In bytes; None where the system does not tell. What the members of a control group have taken already is not counted."""
    return min([*_free_memory(), *_limits()], default=None)


def _free_memory() -> Iterator[int]:
    for line in _lines(_MEMINFO):
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            yield int(value.removesuffix("kB")) * 1024


def _limits() -> Iterator[int]:
    """The limits of this process's control group and of all that it lies in."""
    for line in _lines(_MEMBERSHIP):
        # "number:controllers:path", where the second version's line has no controllers.
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, file = _MOUNTS, "memory.max"
        elif "memory" in controllers.split(","):
            root, file = _MOUNTS / "memory", "memory.limit_in_bytes"
        else:
            continue
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                # A group without a limit says "max", or a number beyond all memory.
                yield from [int(limit) for limit in _lines(folder / file) if limit.isdecimal()]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text().splitlines()
    except OSError:
        return []
