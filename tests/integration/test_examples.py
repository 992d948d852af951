"""Every example runs as its first lines say, by itself and under torchrun; each checks its own result."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment, run_command

EXAMPLES = sorted((ROOT / "examples").glob("*.py"))

LAST_LINE = {
    "distributed_autograd": r"step 200   loss 0\.00\d+",
    "first_call": "all calls gave what they should",
    "parameter_server": r"losses \[.*\]; 9\d\.\d% of 1000 new points told apart",
    "pipeline": r"9\d\.\d% of 1000 new points put into the right ring",
    "reinforcement_learning": r"round +\d+   the pole stays up for +\d+\.\d steps",
    "rref_remote_objects": r"mean \[.*\], variance \[.*\]",
}


def last_line(text: str) -> str:
    return text.splitlines()[-1] if text else ""


def test_the_table_of_examples_is_complete() -> None:
    text = (ROOT / "examples" / "README.md").read_text()
    assert sorted(re.findall(r"^\| \[(\w+)\.py\]", text, re.MULTILINE)) == sorted(path.stem for path in EXAMPLES)
    assert sorted(LAST_LINE) == [path.stem for path in EXAMPLES]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_starts_its_own_processes(path: Path, tmp_path: Path) -> None:
    done = run_command(path, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(LAST_LINE[path.stem], last_line(done.stdout))


@pytest.mark.parametrize("name", ["first_call", "rref_remote_objects"])
def test_example_runs_under_torchrun(name: str, tmp_path: Path) -> None:
    path = ROOT / "examples" / f"{name}.py"
    (processes,) = re.findall(r"torchrun --nproc-per-node (\d)", path.read_text().partition('"""\n\n')[0])
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes)
    done = run_command(*launcher, path, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(LAST_LINE[name], done.stdout)


def test_a_wrong_number_of_processes_is_refused_at_once(tmp_path: Path) -> None:
    path = ROOT / "examples" / "pipeline.py"
    done = run_command(path, env=environment(tmp_path, RANK="0", WORLD_SIZE="2"), cwd=tmp_path)
    assert done.returncode == 1
    assert "start 3 processes: torchrun --nproc-per-node 3" in done.stderr


@pytest.mark.parametrize("name", ["first_call", "distributed_autograd"])
def test_example_runs_on_tensorpipe_too(name: str, tmp_path: Path) -> None:
    done = run_command(ROOT / "examples" / f"{name}.py", "--backend", "TENSORPIPE", env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(LAST_LINE[name], last_line(done.stdout))
