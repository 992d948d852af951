"""``zmqagent run``: a script that nobody edited, on ZMQ.

Python itself runs the script: this process sets one variable and becomes ``python script.py ARGS``. So ``__main__``,
``sys.path``, exit codes, tracebacks and what spawned children import again are Python's own, and the script gets ZMQ in the same
way as its children do, whoever starts them: ``import torch`` calls the ``torch.backends`` entry point, which reads the variable.
What that needs is checked first, since without it the script would quietly run on TENSORPIPE.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from importlib import metadata

from _zmqagent_autoload import VARIABLE

__all__ = ["add_parser", "run"]

_ENTRY_POINT = "_zmqagent_autoload:autoload"


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Adds ``run`` to the commands of ``zmqagent``."""
    parser = commands.add_parser(
        "run",
        help="run an unmodified script on ZMQ",
        usage="%(prog)s [-h] (script.py | -m module) ...",
        description="Runs a script, or a module as python -m does, unchanged: wherever it starts torch's RPC with TENSORPIPE, or "
        "names no backend, ZMQ is started instead. The same goes for every process that it starts.",
        epilog="With torchrun: zmqagent run -m torch.distributed.run --nproc-per-node 2 script.py",
    )
    parser.add_argument("-m", dest="module", nargs=argparse.REMAINDER, metavar="module ...", help="a module, and its arguments")
    parser.add_argument("script", nargs=argparse.REMAINDER, metavar="script.py ...", help="a script, and its arguments")
    parser.set_defaults(command=lambda options: run(parser, options.script, options.module))


def run(parser: argparse.ArgumentParser, script: list[str], module: list[str] | None) -> int:
    """Becomes the Python that runs ``script`` or ``module`` (each with its arguments); returns only if that cannot be."""
    if module is not None:
        if script or not module:
            parser.error("-m takes the name of a module" if not module else "give a script or -m module, not both")
        command = ["-m", *module]
    elif script:
        command = script
    else:
        parser.error("what is to be run? Give a script, or -m and a module")
    obstacle = _obstacle()
    if obstacle:
        print(f"zmqagent run: {obstacle}", file=sys.stderr)
        return 2
    sys.stdout.flush()
    sys.stderr.flush()
    # The flags of this interpreter (-W, -X, ...), as multiprocessing passes them to its children.
    flags: list[str] = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    os.execve(sys.executable, [sys.executable, *flags, *command], {**os.environ, VARIABLE: "1"})


def _obstacle() -> str:
    """Why `VARIABLE` would have no effect; empty if it will."""
    if os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1") != "1":
        return "TORCH_DEVICE_BACKEND_AUTOLOAD forbids torch to load any extension; unset it, or set it to 1"
    if _ENTRY_POINT not in {entry.value for entry in metadata.entry_points(group="torch.backends")}:
        return (
            "torch does not find zmqagent's entry point, because the package lies on the path without being installed; install "
            f"it into the environment of {sys.executable}"
        )
    return ""
