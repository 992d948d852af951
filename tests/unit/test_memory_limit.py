"""`zmqagent.transport.memory_limit`: the least of what is left and of what any control group allows."""

from __future__ import annotations

from pathlib import Path

import pytest

from zmqagent.transport import memory_limit
from zmqagent.transport.memory_limit import available_memory

GIB = 1 << 30


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A root for what the kernel would tell, with 8 GiB left."""
    monkeypatch.setattr(memory_limit, "_MEMINFO", tmp_path / "meminfo")
    monkeypatch.setattr(memory_limit, "_MEMBERSHIP", tmp_path / "cgroup")
    monkeypatch.setattr(memory_limit, "_MOUNTS", tmp_path / "mounts")
    write(tmp_path / "meminfo", f"MemTotal:  99 kB\nMemAvailable:   {8 * GIB // 1024} kB\nBuffers: 1 kB\n")
    return tmp_path


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def test_without_control_groups_it_is_what_is_left(system: Path) -> None:
    assert available_memory() == 8 * GIB


def test_the_limit_of_an_outer_group_counts(system: Path) -> None:
    write(system / "cgroup", "0::/outer/inner\n")
    write(system / "mounts/outer/inner/memory.max", "max\n")
    write(system / "mounts/outer/memory.max", f"{2 * GIB}\n")
    # Not a group: it lies above the mount.
    write(system / "memory.max", "1\n")
    assert available_memory() == 2 * GIB


def test_groups_of_the_first_version_count(system: Path) -> None:
    write(system / "cgroup", "7:cpu,cpuacct:/a:b\n4:hugetlb,memory:/a:b\n0::/\n")
    write(system / "mounts/memory/a:b/memory.limit_in_bytes", f"{GIB}\n")
    write(system / "mounts/memory/memory.limit_in_bytes", f"{(1 << 63) - 4096}\n")
    assert available_memory() == GIB


def test_a_group_as_seen_from_inside_a_container_counts(system: Path) -> None:
    # The path is the host's, and what is mounted is the group itself.
    write(system / "cgroup", "0::/../../elsewhere\n")
    write(system / "mounts/memory.max", f"{3 * GIB}\n")
    assert available_memory() == 3 * GIB


def test_a_limit_beyond_what_is_left_does_not_count(system: Path) -> None:
    write(system / "cgroup", "0::/\n")
    write(system / "mounts/memory.max", f"{20 * GIB}\n")
    assert available_memory() == 8 * GIB


def test_a_system_that_tells_nothing_has_no_answer(system: Path) -> None:
    (system / "meminfo").unlink()
    assert available_memory() is None


def test_this_system_has_some_or_tells_nothing() -> None:
    available = available_memory()
    assert available is None or available > 1 << 20
