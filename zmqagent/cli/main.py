"""The ``zmqagent`` command: its subcommands, and what becomes of their exit codes."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

from zmqagent.cli import demo, run
from zmqagent.cli.bench import command as bench
from zmqagent.version import __version__

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line ``arguments`` (default: the process's own); returns the exit code.

    Raises:
        SystemExit: with code 2 after a usage error, with 0 after ``--help`` and ``--version``.
    """
    options = _parser().parse_args(arguments)
    command: Callable[[argparse.Namespace], int] = options.command
    return command(options)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="zmqagent",
        description="A backend for torch.distributed.rpc in pure Python over ZeroMQ.",
    )
    parser.add_argument("--version", action="version", version=f"zmqagent {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    demo.add_parser(commands)
    run.add_parser(commands)
    bench.add_parser(commands)
    return parser
