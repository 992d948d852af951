"""The command line: what it accepts, what it refuses and how it says so, and what ``run`` turns into."""

from __future__ import annotations

import os
import sys
from importlib import metadata
from pathlib import Path

import pytest

from zmqagent.cli import demo
from zmqagent.cli.bench import command as bench
from zmqagent.cli.main import main
from zmqagent.version import __version__

ENTRY_POINT = metadata.EntryPoint("zmqagent", "_zmqagent_autoload:autoload", "torch.backends")


def refusal(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """What is said of arguments that are refused; the exit code must be 2."""
    code: object
    try:
        code = main(arguments)
    except SystemExit as stopped:
        code = stopped.code
    assert code == 2
    return capsys.readouterr().err


@pytest.fixture
def becomes(monkeypatch: pytest.MonkeyPatch) -> list[tuple[list[str], dict[str, str]]]:
    """Records what the process would turn into, where zmqagent's entry point is installed."""
    recorded: list[tuple[list[str], dict[str, str]]] = []

    def record(path: str, command: list[str], variables: dict[str, str]) -> None:
        assert path == command[0] == sys.executable
        recorded.append((command, variables))
        raise SystemExit(0)  # as execve does not return

    monkeypatch.setattr(os, "execve", record)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [ENTRY_POINT] if group == ENTRY_POINT.group else [])
    monkeypatch.delenv("TORCH_DEVICE_BACKEND_AUTOLOAD", raising=False)
    return recorded


def test_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["--version"])
    assert stopped.value.code == 0
    assert capsys.readouterr().out == f"zmqagent {__version__}\n"


def test_help_names_the_commands_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    lines = capsys.readouterr().out.partition("COMMAND\n")[2].splitlines()
    assert [line.split()[0] for line in lines] == ["demo", "run", "bench"]


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        ([], "COMMAND"),
        (["fly"], "invalid choice: 'fly'"),
        (["demo", "--backend", "GLOO"], "invalid choice: 'GLOO'"),
        (["demo", "--epochs", "0"], "must be a whole number from 1 on, not 0"),
        (["demo", "--epochs", "many"], "must be a whole number from 1 on, not many"),
        (["demo", "--batch-size", "1.5"], "must be a whole number from 1 on, not 1.5"),
        (["demo", "--learning-rate", "nan"], "must be a number above 0 and up to 1, not nan"),
        (["demo", "--seed", "-1"], "must be a whole number from 0 to 2**32 - 1, not -1"),
        (["demo", "--accuracy", "101"], "must be a number from 0 to 100, not 101"),
        (["bench", "--vs", "GLOO"], "invalid choice: 'GLOO'"),
        (["bench", "--variant", "pigeon"], "invalid choice: 'pigeon'"),
        (["bench", "--only", "lunch"], "invalid choice: 'lunch' (choose from 'noop', "),
        (["bench", "--only", "group"], "invalid choice: 'group'"),
        (["bench", "--growth", "--only", "noop"], "invalid choice: 'noop' (choose from 'threads', "),
        (["bench", "--rounds", "0"], "must be a whole number from 1 on, not 0"),
        (["bench", "--threads", "-1"], "must be a whole number from 1 on, not -1"),
        (["run"], "Give a script, or -m and a module"),
        (["run", "-m"], "-m takes the name of a module"),
        (["run", "--fast", "script.py"], "--fast"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], complaint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert complaint in refusal(arguments, capsys)


@pytest.mark.parametrize("command", ["demo", "bench"])
@pytest.mark.parametrize(
    ("plot", "complaint"),
    [("missing/it.png", "no such directory"), ("it.docx", "must end in one of"), ("it", "must end in one of")],
)
def test_a_picture_that_cannot_be_written_is_refused_before_the_work(
    command: str, plot: str, complaint: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert complaint in refusal([command, "--plot", str(tmp_path / plot)], capsys)


def test_results_that_cannot_be_written_are_refused_before_anything_is_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "missing" / "results.json", tmp_path):
        assert f"the results cannot be written to {path}: there is no such directory" in refusal(
            ["bench", "--json", str(path)], capsys
        )


def test_a_missing_extra_is_named_with_its_cure(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(demo, "find_spec", lambda module: None)
    complaint = refusal(["demo"], capsys)
    assert "scikit-learn and matplotlib" in complaint
    assert "pip install 'zmqagent[demo]'" in complaint
    monkeypatch.setattr(bench, "find_spec", lambda module: None)
    assert "a picture needs matplotlib: pip install 'zmqagent[bench]'" in refusal(["bench", "--plot", "it.png"], capsys)


@pytest.mark.parametrize(
    ("arguments", "command"),
    [
        (["script.py"], ["script.py"]),
        (["script.py", "--epochs", "3", "-m", "x"], ["script.py", "--epochs", "3", "-m", "x"]),
        (["-m", "package.module", "--help", "-x"], ["-m", "package.module", "--help", "-x"]),
        (["script.py", "--help"], ["script.py", "--help"]),
    ],
)
def test_run_becomes_the_python_that_runs_the_script(
    arguments: list[str], command: list[str], becomes: list[tuple[list[str], dict[str, str]]]
) -> None:
    with pytest.raises(SystemExit):
        main(["run", *arguments])
    ((became, variables),) = becomes
    assert became[-len(command) :] == command
    assert all(flag.startswith("-") for flag in became[1 : -len(command)])
    assert variables == {**os.environ, "ZMQAGENT_AUTOLOAD": "1"}


def test_run_refuses_where_torch_would_not_find_zmqagent(
    becomes: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(metadata, "entry_points", lambda group: [])
    assert "without being installed" in refusal(["run", "script.py"], capsys)
    assert becomes == []


def test_run_refuses_where_torch_loads_no_extensions(
    becomes: list[object], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    assert "TORCH_DEVICE_BACKEND_AUTOLOAD" in refusal(["run", "script.py"], capsys)
    assert becomes == []
