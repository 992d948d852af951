"""What Linux tells of a process from outside, without its help and so without disturbing it.

Functions of a process raise an ``OSError`` if there is none of that number.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

__all__ = ["cpu_seconds", "machine_mb", "memory_mb", "open_files", "peak_memory_mb", "threads"]


def cpu_seconds(pid: int) -> float:
    """The processor time that all threads of a process have used so far."""
    # The number of a process's CPU clock, as clock_getcpuclockid(3) makes it; Python has no function for that of others.
    return time.clock_gettime((~pid << 3) | 2)


def memory_mb(pid: int) -> float:
    """The memory that a process has in RAM (RSS, what it shares with others included), in MB of 2**20 bytes."""
    return _status(pid, "VmRSS") / 1024


def peak_memory_mb(pid: int) -> float:
    """The most memory that a process ever had in RAM, as `memory_mb` counts it."""
    return _status(pid, "VmHWM") / 1024


def open_files(pid: int) -> int:
    """How many descriptors a process has."""
    return len(os.listdir(f"/proc/{pid}/fd"))


def threads(pid: int) -> int:
    """How many threads a process has."""
    return _status(pid, "Threads")


def machine_mb() -> float:
    """The memory of this machine, in MB of 2**20 bytes."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**20


def _status(pid: int, field: str) -> int:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == field:
            return int(value.split()[0])
    # A process that ended, and is not reaped yet, has neither memory nor threads.
    raise ProcessLookupError(f"/proc/{pid}/status has no {field}")
