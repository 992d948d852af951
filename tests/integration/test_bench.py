"""``zmqagent bench``, as a user starts it: that it runs and what it writes; how fast anything is, is nothing for a test."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import environment, run_command

TIMEOUT = 100


def bench(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_command("-m", "zmqagent", "bench", *options, env=environment(directory), cwd=directory, timeout=TIMEOUT)


@pytest.mark.timeout(TIMEOUT + 20)
def test_a_quick_run_compares_and_writes_what_it_found(tmp_path: Path) -> None:
    done = bench(tmp_path, "--quick", "--vs", "TENSORPIPE", "--json", "found.json")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "no-op call, p50" in done.stdout
    assert "targets are met." in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["schema"], found["kind"], found["reference"]) == (1, "comparison", "TENSORPIPE")
    assert [contender["name"] for contender in found["contenders"]] == ["TENSORPIPE", "auto"]
    assert {"noop.p99", "async.rate", "push-16.bandwidth", "train-step.step", "memory.peak"} < {
        row["key"] for row in found["rows"]
    }
    for row in found["rows"]:
        assert row["results"].keys() == {"TENSORPIPE", "auto"}
        for result in row["results"].values():
            assert len(result["rounds"]) == (1 if row["key"] in {"memory.peak", "idle.cpu"} else 2)
            assert result["low"] <= result["median"] <= result["high"]
            assert result["median"] > 0 or row["key"] == "idle.cpu"
    assert len(found["floors"]) == 4
    assert all(floor["median"] > 0 for floor in found["floors"])


@pytest.mark.timeout(TIMEOUT + 20)
def test_a_quick_run_shows_how_cost_grows(tmp_path: Path) -> None:
    done = bench(
        tmp_path, "--growth", "--quick", "--rounds", "1", "--vs", "TENSORPIPE", "--json", "grown.json", "--plot", "grown.png"
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert "workers, each having called all" in done.stdout
    assert f"The picture is in {tmp_path}/grown.png" in done.stdout
    assert (tmp_path / "grown.png").read_bytes().startswith(b"\x89PNG")
    grown = json.loads((tmp_path / "grown.json").read_text())
    assert (grown["schema"], grown["kind"]) == (1, "growth")
    assert [curve["key"] for curve in grown["curves"]] == ["threads", "payload", "group", "references", "graph", "memory"]
    for curve in grown["curves"]:
        for metric in curve["metrics"]:
            assert metric["results"].keys() == {"TENSORPIPE", "auto"}
            for points in metric["results"].values():
                assert len(points) == len(curve["points"])
                assert all(point["median"] > 0 and len(point["rounds"]) == 1 for point in points)


class LongRun:
    """A benchmark in the midst of its rounds, on a terminal, and the processes that it started."""

    def __init__(self, directory: Path) -> None:
        self._terminal, theirs = os.openpty()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "zmqagent", "bench", "--vs", "TENSORPIPE", "--only", "noop", "--rounds", "100000"],
            env=environment(directory, TERM="xterm", COLUMNS="100"),
            cwd=directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=theirs,
            start_new_session=True,
        )
        os.close(theirs)
        # Not all that it does is shown, for the terminal is written to only now and then.
        self._read_until(rb"round \d+/100000: noop, ZMQ")
        servers = {child for child in children(self.process.pid) if children(child)}
        self.workers = [worker for server in servers for worker in children(server)]

    def read(self) -> bytes:
        """What the terminal shows next; nothing when all processes that write to it have ended."""
        try:
            return os.read(self._terminal, 4096)
        except OSError:  # how the end of a terminal shows
            return b""

    def _read_until(self, pattern: bytes) -> None:
        seen = b""
        while not re.search(pattern, seen):
            more = self.read()
            assert more, seen.decode()
            seen += more

    def last_words(self) -> str:
        """What it says until all processes have ended that it started."""
        return b"".join(iter(self.read, b"")).decode()

    def end(self) -> None:
        """Leaves nothing behind."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self._terminal)


@pytest.fixture
def long_run(tmp_path: Path) -> Iterator[LongRun]:
    run = LongRun(tmp_path)
    try:
        yield run
    finally:
        run.end()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_alive(pid: int) -> bool:
    """Whether a process runs or is stopped; one that ended and that nobody has asked about yet does not count."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_interrupting_it_ends_all_processes(long_run: LongRun) -> None:
    assert len(long_run.workers) == 6
    os.killpg(long_run.process.pid, signal.SIGINT)  # what ^C on a terminal does
    said = long_run.last_words()
    assert long_run.process.wait(TIMEOUT) == 130
    assert "zmqagent bench: interrupted; all processes have ended" in said
    assert "Traceback" not in said
    assert not any(map(is_alive, long_run.workers))


@pytest.mark.parametrize(("index", "name"), [(0, "TENSORPIPE's caller"), (3, "ZMQ's worker1")], ids=["waiting", "measured"])
def test_a_worker_that_dies_ends_it_with_a_reason(index: int, name: str, long_run: LongRun) -> None:
    os.kill(sorted(long_run.workers)[index], signal.SIGKILL)
    said = long_run.last_words()
    assert long_run.process.wait(TIMEOUT) == 1
    assert f"zmqagent bench: {name} died with exit code -9" in said
    assert "All processes have ended." in said
    assert not any(map(is_alive, long_run.workers))


def test_workers_end_with_it_even_those_that_it_had_stopped(long_run: LongRun) -> None:
    long_run.process.kill()
    long_run.last_words()  # comes to an end when the last of them has
    assert not any(map(is_alive, long_run.workers))
