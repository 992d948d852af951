"""The script in docs/testing.md runs as it stands there, and fails as the page says when there are more faults."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.support.commands import ROOT, environment, run_command


@pytest.fixture
def script() -> str:
    (block,) = re.findall(r"^```python\n(.*?)^```$", (ROOT / "docs" / "testing.md").read_text(), re.MULTILINE | re.DOTALL)
    return str(block)


def test_the_client_of_the_page_on_testing_comes_through(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(script)
    done = run_command(path, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "the client came through\n"


def test_with_one_more_failure_it_gives_up_as_the_page_says(script: str, tmp_path: Path) -> None:
    path = tmp_path / "script.py"
    path.write_text(script.replace("num_fail_sends=2", "num_fail_sends=3"))
    done = run_command(path, env=environment(tmp_path), cwd=tmp_path)
    assert done.returncode == 1
    assert "SendFailedError: Send attempt failed intentionally for a PYTHON_CALL to worker 1 (3 of 3)" in done.stderr
    page = " ".join((ROOT / "docs" / "testing.md").read_text().split())
    assert "`SendFailedError: Send attempt failed intentionally for a PYTHON_CALL to worker 1 (3 of 3)`" in page
