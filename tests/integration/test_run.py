"""``zmqagent run``: scripts that nobody edited run on ZMQ, and notice nothing else."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.commands import environment, run_command

UNEDITED = """
import os, sys, tempfile
import torch
import torch.distributed.rpc as rpc

def double(x):
    return 2 * x

def run(rank, init_method):
    backend = {"named": rpc.BackendType.TENSORPIPE, "unnamed": None}[sys.argv[1]]
    options = rpc.TensorPipeRpcBackendOptions(num_worker_threads=4, init_method=init_method)
    rpc.init_rpc(f"worker{rank}", backend=backend, rank=rank, world_size=2, rpc_backend_options=options)
    if rank == 0:
        agent = rpc.api._get_current_rpc_agent()
        print(rpc.rpc_sync("worker1", double, args=(torch.ones(2),)).tolist(), type(agent).__module__.split(".")[0])
    rpc.shutdown()

if __name__ == "__main__":
    if "RANK" in os.environ:
        run(int(os.environ["RANK"]), "env://")
    else:
        with tempfile.TemporaryDirectory() as directory:
            torch.multiprocessing.spawn(run, (f"file://{directory}/meet",), nprocs=2)
"""

INQUISITIVE = """
import json, os, sys
print(json.dumps([__name__, __file__, __package__, sys.argv, sys.path[0], sys.modules["__main__"].__dict__ is globals()]))
if sys.argv[1:] == ["fail"]:
    raise KeyError("mine")
sys.exit(int(sys.argv[1]))
"""


def zmqagent(*arguments: str | Path, directory: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_command("-m", "zmqagent", *arguments, env=environment(directory, **variables), cwd=directory)


@pytest.fixture
def script(tmp_path: Path) -> Path:
    (tmp_path / "scripts").mkdir()
    path = tmp_path / "scripts" / "script.py"
    path.write_text(UNEDITED)
    return path


@pytest.mark.parametrize("backend", ["named", "unnamed"])
def test_spawned_children_of_an_unedited_script_speak_zmq(backend: str, script: Path, tmp_path: Path) -> None:
    done = zmqagent("run", script, backend, directory=tmp_path)
    assert (done.stdout, done.returncode) == ("[2.0, 2.0] zmqagent\n", 0), done.stderr


def test_without_run_the_same_script_speaks_tensorpipe(script: Path, tmp_path: Path) -> None:
    done = run_command(script, "named", env=environment(tmp_path), cwd=tmp_path)
    assert (done.stdout, done.returncode) == ("[2.0, 2.0] torch\n", 0), done.stderr


def test_workers_of_torchrun_speak_zmq(script: Path, tmp_path: Path) -> None:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    done = zmqagent("run", *launcher, script, "named", directory=tmp_path)
    assert (done.stdout, done.returncode) == ("[2.0, 2.0] zmqagent\n", 0), done.stderr


@pytest.mark.parametrize("how", [("script.py",), ("-m", "script")], ids=["script", "module"])
@pytest.mark.parametrize("argument", ["0", "7", "fail"])
def test_a_script_sees_what_it_sees_under_python(how: tuple[str, ...], argument: str, script: Path) -> None:
    script.write_text(INQUISITIVE)
    directory = script.parent
    plain = run_command(*how, argument, env=environment(directory), cwd=directory)
    done = zmqagent("run", *how, argument, directory=directory)
    assert plain.stdout.count("__main__") == 1
    assert (done.stdout, done.stderr, done.returncode) == (plain.stdout, plain.stderr, plain.returncode)


def test_a_script_that_is_not_there_is_told_as_python_tells_it(tmp_path: Path) -> None:
    done = zmqagent("run", "missing.py", directory=tmp_path)
    assert done.returncode == 2
    assert "missing.py': [Errno 2] No such file or directory" in done.stderr
