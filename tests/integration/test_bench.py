"""``zmqagent bench``, as a user starts it: that it runs and what it writes; how fast anything is, is nothing for a test."""

from __future__ import annotations

import json
import subprocess
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
