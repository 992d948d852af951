"""Runs commands as a user would: in processes of their own, in an environment where zmqagent is installed.

That torch finds zmqagent's entry point does not depend on how the tests are run: the environment gets metadata of its own, which
name the entry points of setup.cfg and stand before those of an installed zmqagent.
"""

from __future__ import annotations

import configparser
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

__all__ = ["ROOT", "environment", "run_command"]

ROOT = Path(__file__).resolve().parents[2]


def environment(directory: Path, **variables: str) -> dict[str, str]:
    """The variables of a process that finds this checkout's zmqagent installed; ``directory`` holds what that takes."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    info = directory / "site" / "zmqagent-0.dist-info"
    info.mkdir(parents=True, exist_ok=True)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: zmqagent\nVersion: 0\n")
    (info / "entry_points.txt").write_text(f"[torch.backends]{setup['options.entry_points']['torch.backends']}\n")
    inherited = {
        name: value
        for name, value in os.environ.items()
        if name not in {"ZMQAGENT_AUTOLOAD", "TORCH_DEVICE_BACKEND_AUTOLOAD", "RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
    }
    return {**inherited, "PYTHONPATH": os.pathsep.join([str(info.parent), str(ROOT)]), **variables}


def run_command(
    *arguments: str | Path, env: Mapping[str, str], cwd: Path, timeout: float = 100
) -> subprocess.CompletedProcess[str]:
    """Runs Python with ``arguments``; the process and all that it started are killed when the time is up."""
    process = subprocess.Popen(
        [sys.executable, *map(str, arguments)],
        env=dict(env),
        cwd=cwd,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # a process group of its own, to be killed as one
    )
    try:
        output, errors = process.communicate(timeout=timeout)
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        raise
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)
