"""Two runs side by side, as a table for the docs: ``python -m tests.conformance.table ZMQ.json TENSORPIPE.json``."""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

__all__ = ["table"]


def table(runs: list[dict[str, Any]]) -> str:
    """A Markdown table of what became of each suite in the runs (as `Report.write_json` wrote them), and of what did not pass."""
    backends = [run["backend"] for run in runs]
    verdicts = [{(test["suite"], test["test"]): test for test in run["tests"]} for run in runs]
    names = list(dict.fromkeys(name for tests in verdicts for name in tests))
    heads = [head for backend in backends for head in (f"{backend}: passed", "failed", "skipped")]
    lines = [f"torch {', '.join(dict.fromkeys(run['torch'] for run in runs))}:", ""]
    lines += [_row("suite", "tests", *heads), _row("---", "---:", *("---:" for _ in heads))]
    for suite in dict.fromkeys(suite for suite, _ in names):
        own = [name for name in names if name[0] == suite]
        lines.append(_row(suite, str(len(own)), *_counts(verdicts, own)))
    lines.append(_row("**all**", str(len(names)), *_counts(verdicts, names)))
    rest = [name for name in names if any(_verdict(tests, name) != "passed" for tests in verdicts)]
    if rest:
        lines += ["", _row("not passed everywhere", *backends), _row("---", *("---" for _ in runs))]
        lines += [_row(".".join(name), *(_story(tests, name) for tests in verdicts)) for name in rest]
    return "\n".join(lines)


def _row(*cells: str) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _counts(runs: list[dict[tuple[str, str], dict[str, Any]]], names: list[tuple[str, str]]) -> list[str]:
    counts = [Counter(_verdict(tests, name) for name in names) for tests in runs]
    return [str(count[verdict]) for count in counts for verdict in ("passed", "failed", "skipped")]


def _verdict(tests: dict[tuple[str, str], dict[str, Any]], name: tuple[str, str]) -> str:
    return str(tests[name]["verdict"]) if name in tests else "not run"


def _story(tests: dict[tuple[str, str], dict[str, Any]], name: tuple[str, str]) -> str:
    cause = tests[name]["cause"] if name in tests else ""
    return f"{_verdict(tests, name)}: {cause}" if cause else _verdict(tests, name)


def main() -> int:
    """Print the table of the files named on the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.conformance.table", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, metavar="JSON")
    print(table([json.loads(path.read_text()) for path in parser.parse_args().files]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
