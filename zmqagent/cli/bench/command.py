"""``zmqagent bench``: what calls cost over ZMQ, and over torch's own backend next to it; or how cost grows.

This process measures nothing itself: it starts workers for each contender, tells them in turn what to run, and puts together what
they report.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

from zmqagent.cli.arguments import number, unwritable
from zmqagent.cli.bench import observed
from zmqagent.cli.bench.contenders import REFERENCES, VARIANTS, Contender
from zmqagent.cli.bench.curves import CURVES
from zmqagent.cli.bench.errors import ProcessFailed
from zmqagent.cli.bench.growth import GrowthPlan
from zmqagent.cli.bench.measure import Plan
from zmqagent.cli.bench.rows import ROWS
from zmqagent.cli.bench.tasks import Comparison, Growth, Outcome, Task

__all__ = ["add_parser", "bench"]

_WIDTH_OF_FILES = 160
_INTERRUPTED = 130
_UNUSABLE = 2
_IDLE_SECONDS, _QUICK_IDLE_SECONDS = 3.0, 0.3


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``bench`` to the commands of ``zmqagent``."""
    parser = commands.add_parser(
        "bench",
        help="measure what calls cost, next to TENSORPIPE",
        description="Two workers on this machine, each a process of its own: what calls, tensors, training steps and waiting "
        "cost; with --growth, how that grows with threads, payload, workers, RRefs, the length of graphs and calls made. What "
        "is compared takes turns in one run, and ratios are taken round by round.",
    )
    count = number(int, lambda value: value >= 1, "a whole number from 1 on")
    references, rows, curves = ", ".join(REFERENCES), ", ".join(row.key for row in ROWS), ", ".join(it.key for it in CURVES)
    parser.add_argument(
        "--vs", choices=(*REFERENCES, *VARIANTS), metavar="NAME", help=f"what to compare with: {references}, or a variant"
    )
    parser.add_argument(
        "--variant", action="append", choices=tuple(VARIANTS), help="of ZMQ; may be given several times (default: auto)"
    )
    parser.add_argument("--growth", action="store_true", help="measure how cost grows, instead of a table of what it is")
    parser.add_argument(
        "--only", action="append", metavar="ROW",
        help=f"leave out the other rows; may be given several times: {rows}; with --growth: {curves}",
    )  # fmt: skip
    parser.add_argument(
        "--rounds", type=count, metavar="N", help="rounds that count (default: 7; with --growth 3; in a quick run 2)"
    )
    parser.add_argument(
        "--threads", type=count, default=1, metavar="N", help="threads that torch computes with, in each worker (default: 1)"
    )
    parser.add_argument("--quick", action="store_true", help="as few and as small as possible: shows that it works, not how fast")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write everything that was measured into this file")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="also draw it into this file")
    parser.set_defaults(command=lambda options: bench(parser, options))


def bench(parser: argparse.ArgumentParser, options: argparse.Namespace) -> int:
    """Measures and reports; returns the exit code: 0, 1 (a process failed), 2 (it cannot run as asked), 130 (interrupted)."""
    task = _task(parser, options)
    obstacle = _obstacle(options)
    if obstacle:
        return _fail(obstacle, _UNUSABLE)
    try:
        outcome = _run(task)
    except KeyboardInterrupt:
        return _fail("interrupted; all processes have ended", _INTERRUPTED)
    except ProcessFailed as error:
        return _fail(f"{error}\nAll processes have ended.", 1)
    try:
        _tell(outcome, options)
    except OSError as error:
        return _fail(f"the results cannot be written: {error}", 1)
    return 0


def _task(parser: argparse.ArgumentParser, options: argparse.Namespace) -> Task:
    known = [it.key for it in (CURVES if options.growth else ROWS)]
    for key in options.only or []:
        if key not in known:
            parser.error(f"argument --only: invalid choice: {key!r} (choose from {', '.join(map(repr, known))})")
    asked = options.only or known
    reference = {**REFERENCES, **VARIANTS}.get(options.vs)
    variants = [VARIANTS[name] for name in dict.fromkeys(options.variant or ["auto"])]
    contenders = variants if reference is None else [reference, *(variant for variant in variants if variant != reference)]
    return (
        _growth(options, asked, contenders, reference) if options.growth else _comparison(options, asked, contenders, reference)
    )


def _comparison(
    options: argparse.Namespace, asked: list[str], contenders: list[Contender], reference: Contender | None
) -> Comparison:
    rows = [row for row in ROWS if row.key in asked and (row.quick or not options.quick)]
    rounds = options.rounds or (2 if options.quick else 7)
    idle_seconds = _QUICK_IDLE_SECONDS if options.quick else _IDLE_SECONDS
    return Comparison(Plan(contenders, rows, rounds, options.threads, options.quick, idle_seconds), reference)


def _growth(options: argparse.Namespace, asked: list[str], contenders: list[Contender], reference: Contender | None) -> Growth:
    curves = [curve for curve in CURVES if curve.key in asked]
    rounds = options.rounds or (2 if options.quick else 3)
    plan = GrowthPlan(contenders, curves, rounds, options.threads, options.quick, observed.machine_mb())
    return Growth(plan, reference)


def _run(task: Task) -> Outcome:
    # Where nobody watches, a bar would only leave garbage in a log.
    console = Console(stderr=True)
    progress = Progress(
        BarColumn(), TaskProgressColumn(), TimeRemainingColumn(), TextColumn("{task.description}"),
        console=console, transient=True, disable=not console.is_terminal,
    )  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="zmqagent-bench-") as directory, progress:
        bar = progress.add_task("starting the processes", total=task.steps() + 1)
        return task.run(Path(directory), lambda what: progress.update(bar, advance=1, description=what))


def _tell(outcome: Outcome, options: argparse.Namespace) -> None:
    # Tables go into files as they are, not cut to some width that a file has not.
    width = None if sys.stdout.isatty() else _WIDTH_OF_FILES
    console = Console(soft_wrap=True, markup=False, highlight=False, width=width)
    console.print(outcome.printed())
    if options.json is not None:
        options.json.write_text(json.dumps(outcome.document(), indent=1, ensure_ascii=False) + "\n")
    if options.plot is not None:
        outcome.draw(options.plot)
        console.print(f"The picture is in {options.plot.resolve()}")


def _obstacle(options: argparse.Namespace) -> str:
    """Why what is asked for could not be written in the end; empty if it could."""
    if options.json is not None and (trouble := unwritable(options.json)):
        return f"the results cannot be written to {options.json}: {trouble}"
    if options.plot is None:
        return ""
    if find_spec("matplotlib") is None:
        return "a picture needs matplotlib: pip install 'zmqagent[bench]'"
    from zmqagent.cli.pictures import undrawable

    return undrawable(options.plot)


def _fail(message: str, code: int) -> int:
    print(f"zmqagent bench: {message}", file=sys.stderr)
    return code
