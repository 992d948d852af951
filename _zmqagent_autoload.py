"""Lets unmodified scripts run on ZMQ: what ``zmqagent run`` switches on, in the script and in every process it starts.

``autoload`` is zmqagent's ``torch.backends`` entry point: torch calls it at the end of every ``import torch``, in every program
of an environment that has zmqagent installed. So this is a module of its own, since anything imported out of ``zmqagent`` would
bring the whole package into programs that never asked for it; and it never raises, since that would make ``import torch`` fail.
"""

import os
import sys

__all__ = ["VARIABLE", "autoload", "wanted"]

VARIABLE = "ZMQAGENT_AUTOLOAD"
"""The environment variable that asks for ZMQ in place of TENSORPIPE; unset, empty or "0" leaves everything as it is."""


def wanted() -> bool:
    """Whether this process is to run on ZMQ."""
    return os.environ.get(VARIABLE, "") not in ("", "0")


def autoload() -> None:
    """From now on ``init_rpc`` starts ZMQ in this process where it would have started TENSORPIPE, if `VARIABLE` is set.

    What goes wrong is printed, with its traceback, and the process goes on with torch's own backend.
    """
    if not wanted():
        return
    try:
        from zmqagent.backend import replace_tensorpipe

        replace_tensorpipe()
    except Exception:
        _complain()


def _complain() -> None:
    # No warning: a filter may turn it into an exception. No logging: nobody has set it up this early.
    import traceback

    try:
        print(f"zmqagent: {VARIABLE} is set, but ZMQ could not take TENSORPIPE's place in this process:", file=sys.stderr)
        traceback.print_exc()
    except (OSError, ValueError):  # stderr is closed: there is nobody to tell
        return
