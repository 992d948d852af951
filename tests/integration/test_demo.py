"""``zmqagent demo``, as a user starts it: it learns, computes the same on either backend, and ends cleanly if it cannot."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.commands import environment, run_command

# Three processes that compute, on a machine that may have fewer cores and other work.
TIMEOUT = 240
pytestmark = pytest.mark.timeout(2 * TIMEOUT + 60)


def demo(directory: Path, *options: str) -> subprocess.CompletedProcess[str]:
    return run_command("-m", "zmqagent", "demo", *options, env=environment(directory), cwd=directory, timeout=TIMEOUT)


def epochs(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("epoch ")]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_line(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ")


def test_it_learns_to_read_digits_and_draws_how(tmp_path: Path) -> None:
    done = demo(tmp_path, "--epochs", "12")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    assert len(epochs(done.stdout)) == 12
    assert re.search(r"Success: read 9\d\.\d% of the 360 held-out digits right; asked were 95\.0%\.\n$", done.stdout)
    assert f"The loss curve is in {tmp_path}/loss.png\n" in done.stdout
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def short_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, subprocess.CompletedProcess[str]]]:
    """Runs that are too short for what they are asked to reach, by backend: where each took place, and what became of it."""
    directories = {backend: tmp_path_factory.mktemp(backend) for backend in ("ZMQ", "TENSORPIPE")}
    options = ("--epochs", "2", "--accuracy", "100", "--plot", "curve.svg")
    return {backend: (directory, demo(directory, *options, "--backend", backend)) for backend, directory in directories.items()}


ShortRuns = dict[str, tuple[Path, subprocess.CompletedProcess[str]]]


def test_a_seed_gives_the_same_numbers_on_either_backend(short_runs: ShortRuns) -> None:
    lines = {backend: epochs(done.stdout) for backend, (_, done) in short_runs.items()}
    assert len(lines["ZMQ"]) == 2
    assert lines["ZMQ"] == lines["TENSORPIPE"]


def test_too_little_learned_is_a_failure(short_runs: ShortRuns) -> None:
    for directory, done in short_runs.values():
        assert done.returncode == 1
        assert "too little was learned" in done.stderr
        assert "Success" not in done.stdout
        assert (directory / "curve.svg").exists()


@pytest.fixture
def long_demo(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """A demo in the midst of its training, and the processes that it started."""
    process = subprocess.Popen(
        [sys.executable, "-m", "zmqagent", "demo", "--epochs", "100000"],
        env=environment(tmp_path),
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("epoch "):
                break
        workers = [pid for pid in children(process.pid) if "spawn_main" in command_line(pid)]
        assert len(workers) == 3
        yield process, workers
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


LongDemo = tuple[subprocess.Popen[str], list[int]]


def test_interrupting_it_ends_all_processes(long_demo: LongDemo) -> None:
    process, workers = long_demo
    os.killpg(process.pid, signal.SIGINT)  # what ^C on a terminal does
    _, errors = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, errors) == (130, "zmqagent demo: interrupted; all processes have ended\n")
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)


@pytest.mark.parametrize("index", [0, 1], ids=["server", "trainer"])
def test_a_process_that_dies_ends_it_with_a_reason(index: int, long_demo: LongDemo) -> None:
    process, workers = long_demo
    os.kill(workers[index], signal.SIGKILL)
    _, errors = process.communicate(timeout=TIMEOUT)
    assert process.returncode == 1
    assert "zmqagent demo: " in errors
    assert "failed; the others have been ended" in errors
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
