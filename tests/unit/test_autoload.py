"""The extension point that torch calls at every ``import torch``: it costs nothing unasked, and never breaks that import."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.commands import environment, run_command

# Fake packages in place of zmqagent: what ``zmqagent/backend.py`` of each contains.
RECORDS = "def replace_tensorpipe():\n    print('replaced')\n"
RAISES = "def replace_tensorpipe():\n    raise RuntimeError('no ZMQ today')\n"
FAILS_TO_IMPORT = "raise ImportError('libzmq is missing')\n"
LACKS_THE_FUNCTION = ""

CALL = "import _zmqagent_autoload; _zmqagent_autoload.autoload(); print('went on')"


def run_with(backend: str, code: str, directory: Path, *flags: str, **variables: str) -> subprocess.CompletedProcess[str]:
    package = directory / "site" / "zmqagent"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "backend.py").write_text(backend)
    return run_command(*flags, "-c", code, env=environment(directory, **variables), cwd=directory)


@pytest.mark.parametrize("variables", [{}, {"ZMQAGENT_AUTOLOAD": ""}, {"ZMQAGENT_AUTOLOAD": "0"}])
def test_nothing_is_imported_or_replaced_unless_asked_for(variables: dict[str, str], tmp_path: Path) -> None:
    code = f"{CALL}; import sys; print(sorted({{'zmqagent', 'torch', 'zmq', 'traceback'}} & sys.modules.keys()))"
    done = run_with(RECORDS, code, tmp_path, **variables)
    assert (done.stdout, done.stderr) == ("went on\n[]\n", "")


def test_torch_calls_the_entry_point_and_brings_in_nothing_else(tmp_path: Path) -> None:
    # What begins with "__editable__" is setuptools' own, where this checkout is installed as editable.
    code = """
import sys, torch
names = [name for name in sys.modules if "zmqagent" in name or name == "zmq"]
print([name for name in names if not name.startswith('__editable__')])
"""
    done = run_command("-c", code, env=environment(tmp_path), cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("['_zmqagent_autoload']\n", "")


def test_tensorpipe_is_replaced_if_asked_for(tmp_path: Path) -> None:
    done = run_with(RECORDS, CALL, tmp_path, ZMQAGENT_AUTOLOAD="1")
    assert (done.stdout, done.stderr) == ("replaced\nwent on\n", "")


@pytest.mark.parametrize(
    ("backend", "cause"),
    [
        (RAISES, "RuntimeError: no ZMQ today"),
        (FAILS_TO_IMPORT, "ImportError: libzmq is missing"),
        (LACKS_THE_FUNCTION, "ImportError: cannot import name 'replace_tensorpipe'"),
    ],
)
def test_a_fault_is_told_and_does_not_spread(backend: str, cause: str, tmp_path: Path) -> None:
    done = run_with(backend, CALL, tmp_path, "-W", "error", ZMQAGENT_AUTOLOAD="1")
    assert done.stdout == "went on\n"
    assert "ZMQ could not take TENSORPIPE's place" in done.stderr
    assert cause in done.stderr


@pytest.mark.parametrize("stderr", ["None", "open('gone', 'w'); sys.stderr.close()"])
def test_a_fault_that_nobody_can_be_told_does_not_spread(stderr: str, tmp_path: Path) -> None:
    done = run_with(RAISES, f"import sys; sys.stderr = {stderr}; {CALL}", tmp_path, ZMQAGENT_AUTOLOAD="1")
    assert done.returncode == 0
    assert done.stdout.endswith("went on\n")


def test_import_torch_survives_a_fault(tmp_path: Path) -> None:
    code = "import torch; from torch.distributed import rpc; print(torch.ones(1).item(), list(rpc.BackendType))"
    done = run_with(RAISES, code, tmp_path, "-W", "error", ZMQAGENT_AUTOLOAD="1")
    assert done.stdout == "1.0 [BackendType.TENSORPIPE]\n"
    assert "RuntimeError: no ZMQ today" in done.stderr


@pytest.mark.parametrize("first", ["torch", "zmqagent"])
def test_the_backend_is_there_whatever_is_imported_first(first: str, tmp_path: Path) -> None:
    code = f"import {first}; from torch.distributed import rpc; print(rpc.BackendType.ZMQ)"
    done = run_command("-c", code, env=environment(tmp_path, ZMQAGENT_AUTOLOAD="1"), cwd=tmp_path)
    assert (done.stdout, done.stderr) == ("BackendType.ZMQ\n", "")
