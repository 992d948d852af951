"""``zmqagent bench``: what calls cost over ZMQ, and over torch's own backend next to it.

This process measures nothing itself: it starts two workers a contender, tells them in turn what to run, and puts together what
they report.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from zmqagent.cli.arguments import number, unwritable
from zmqagent.cli.bench.conditions import Conditions
from zmqagent.cli.bench.contenders import REFERENCES, VARIANTS, Contender
from zmqagent.cli.bench.errors import ProcessFailed
from zmqagent.cli.bench.measure import Measured, Plan, measure
from zmqagent.cli.bench.report import report
from zmqagent.cli.bench.results import document, floor_lines, lines
from zmqagent.cli.bench.rows import ROWS

__all__ = ["add_parser", "bench"]

_WIDTH_OF_FILES = 160
_INTERRUPTED = 130
_UNUSABLE = 2
_ROUNDS, _QUICK_ROUNDS = 7, 2
_IDLE_SECONDS, _QUICK_IDLE_SECONDS = 3.0, 0.3


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``bench`` to the commands of ``zmqagent``."""
    parser = commands.add_parser(
        "bench",
        help="measure what calls cost, next to TENSORPIPE",
        description="Two workers on this machine, each a process of its own: what calls, tensors, training steps and waiting "
        "cost. What is compared takes turns in one run, and ratios are taken round by round.",
    )
    count = number(int, lambda value: value >= 1, "a whole number from 1 on")
    parser.add_argument(
        "--vs",
        choices=(*REFERENCES, *VARIANTS),
        metavar="NAME",
        help=f"what to compare with: {', '.join(REFERENCES)}, or a variant",
    )
    parser.add_argument(
        "--variant",
        action="append",
        choices=tuple(VARIANTS),
        help="of ZMQ, to be measured; may be given several times (default: auto)",
    )
    parser.add_argument(
        "--only", action="append", choices=tuple(row.key for row in ROWS), metavar="ROW",
        help=f"leave out the other rows; may be given several times: {', '.join(row.key for row in ROWS)}",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=count, metavar="N", help=f"rounds that count (default: {_ROUNDS}, in a quick run {_QUICK_ROUNDS})"
    )
    parser.add_argument(
        "--threads", type=count, default=1, metavar="N", help="threads that torch computes with, in each worker (default: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="as few and as small as possible: shows that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured into this file")
    parser.set_defaults(command=bench)


def bench(options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code: 0, 1 (a process failed), 2 (it cannot run as asked), 130 (interrupted)."""
    obstacle = _obstacle(options.json)
    if obstacle:
        return _fail(obstacle, _UNUSABLE)
    reference = {**REFERENCES, **VARIANTS}.get(options.vs)
    plan = _plan(options, reference)
    stopped = [contender.label for contender in plan.contenders if contender.spins]
    conditions = Conditions.here(plan.rounds, plan.threads, stopped, plan.quick)
    try:
        measured = _measure(plan)
    except KeyboardInterrupt:
        return _fail("interrupted; all processes have ended", _INTERRUPTED)
    except ProcessFailed as error:
        return _fail(f"{error}\nAll processes have ended.", 1)
    rows, floors = lines(plan, reference, measured), floor_lines(measured)
    console = Console(soft_wrap=True, markup=False, highlight=False, width=None if sys.stdout.isatty() else _WIDTH_OF_FILES)
    console.print(report(conditions.sentences(), plan.contenders, reference, rows, floors))
    if options.json is None:
        return 0
    return _write(document(asdict(conditions), plan.contenders, reference, rows, floors), options.json)


def _plan(options: argparse.Namespace, reference: Contender | None) -> Plan:
    variants = [VARIANTS[name] for name in dict.fromkeys(options.variant or ["auto"])]
    contenders = variants if reference is None else [reference, *(variant for variant in variants if variant != reference)]
    rows = [row for row in ROWS if (not options.only or row.key in options.only) and (row.quick or not options.quick)]
    return Plan(
        contenders=contenders,
        rows=rows,
        rounds=options.rounds or (_QUICK_ROUNDS if options.quick else _ROUNDS),
        threads=options.threads,
        quick=options.quick,
        idle_seconds=_QUICK_IDLE_SECONDS if options.quick else _IDLE_SECONDS,
    )


def _measure(plan: Plan) -> Measured:
    # Where nobody watches, a bar would only leave garbage in a log.
    console = Console(stderr=True)
    progress = Progress(
        BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="zmqagent-bench-") as directory, progress:
        task = progress.add_task("starting the processes", total=plan.slices() + 1)

        def announce(what: str) -> None:
            progress.update(task, advance=1, description=what)

        return measure(plan, Path(directory), announce)


def _obstacle(path: Path | None) -> str:
    """Why nothing could be written to ``path`` in the end; empty if it could."""
    trouble = unwritable(path) if path is not None else ""
    return f"the results cannot be written to {path}: {trouble}" if trouble else ""


def _write(results: dict[str, Any], path: Path) -> int:
    try:
        path.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
    except OSError as error:
        return _fail(f"the results cannot be written: {error}", 1)
    return 0


def _fail(message: str, code: int) -> int:
    print(f"zmqagent bench: {message}", file=sys.stderr)
    return code
