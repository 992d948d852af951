"""A process of the tool: started from a server that has torch imported already, told what to run, and watched while it does.

One kind of process serves every purpose: it runs the functions that it is sent, one after the other, on its main thread, and
sends back what they return. Between them it waits in a read.
"""

from __future__ import annotations

import contextlib
import fcntl
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TypeVar

import zmqagent
from zmqagent.cli.bench.errors import ProcessFailed

__all__ = ["Process", "answers"]

T = TypeVar("T")

_DEADLINE_S = 600.0
_TIME_TO_LEAVE_S = 5.0
_TIME_TO_BE_FOUND_DEAD_S = 1.0

_server = multiprocessing.get_context("forkserver")
_server.set_forkserver_preload(["zmqagent.cli.bench.preload"])


class Process:
    """A process that runs what `ask` gives it. It ends with `end`, and when the process that started it does."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.connection, theirs = _server.Pipe()
        lifeline, self._lifeline = _server.Pipe(duplex=False)
        self._process = _server.Process(target=_live, args=(theirs, lifeline), name=name, daemon=True)
        with _inherited_by_server():
            self._process.start()
        assert self._process.pid is not None
        self._pid = self._process.pid
        theirs.close()
        lifeline.close()

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when the process has ended."""
        return self._process.sentinel

    def ask(self, function: Callable[..., Any], *args: Any) -> None:
        """Makes the process run ``function``; `answers` has what it returned."""
        with contextlib.suppress(BrokenPipeError):  # a process that died is found when its answer is awaited
            self.connection.send((function, args))

    def take(self) -> Any:
        """What the function returned that the process has answered.

        Raises:
            ProcessFailed: the function raised, or the process died.
        """
        try:
            value, trouble = self.connection.recv()
        except (EOFError, ConnectionResetError):
            raise self.death() from None
        if trouble:
            raise ProcessFailed(f"{self.name} failed:\n{trouble}")
        return value

    def observe(self, look: Callable[[int], T]) -> T:
        """What ``look`` says of the process of that number.

        Raises:
            ProcessFailed: there is no such process any more, so that ``look`` raised an ``OSError``.
        """
        try:
            return look(self._pid)
        except OSError:
            raise self.death() from None

    def pause(self) -> None:
        """Stops the process, all of its threads, until `resume`.

        Raises:
            ProcessFailed: it died.
        """
        self.observe(lambda pid: os.kill(pid, signal.SIGSTOP))

    def resume(self) -> None:
        """Lets a stopped process go on; does nothing to others.

        Raises:
            ProcessFailed: it died.
        """
        self.observe(lambda pid: os.kill(pid, signal.SIGCONT))

    def end(self, patience: float = _TIME_TO_LEAVE_S) -> None:
        """Lets the process leave by itself for ``patience`` seconds, then kills it; afterwards there is none."""
        self.connection.close()
        self._process.join(patience)
        self._lifeline.close()
        self._process.kill()
        self._process.join()
        self._process.close()

    def death(self) -> ProcessFailed:
        """What to say of a process that has ended without being told to."""
        self._process.join(_TIME_TO_BE_FOUND_DEAD_S)
        return ProcessFailed(f"{self.name} died with exit code {self._process.exitcode}")


def answers(asked: Sequence[Process], bystanders: Sequence[Process] = (), deadline: float = _DEADLINE_S) -> list[Any]:
    """What the processes in ``asked`` have answered, in that order.

    Raises:
        ProcessFailed: a function raised, a process (of ``bystanders`` too, whose help the others need) died, or the answers
            took longer than ``deadline`` seconds.
    """
    end = time.monotonic() + deadline
    values: dict[Process, Any] = {}
    while len(values) < len(asked):
        missing: dict[object, Process] = {process.connection: process for process in asked if process not in values}
        dying: dict[object, Process] = {process.sentinel: process for process in (*asked, *bystanders) if process not in values}
        ready = multiprocessing.connection.wait([*missing, *dying], max(0.0, end - time.monotonic()))  # type: ignore[list-item]
        if not ready:
            names = " and ".join(process.name for process in missing.values())
            raise ProcessFailed(f"{names} did not answer within {deadline:g} s")
        for event in ready:
            # A process that answered and then died shows both; the answer may tell why.
            process = missing.get(event) or dying[event]
            if process not in values:
                try:
                    values[process] = process.take()
                except ProcessFailed as failure:
                    raise _cause(failure, [other for other in (*asked, *bystanders) if other is not process]) from None
    return [values[process] for process in asked]


def _cause(failure: ProcessFailed, others: Sequence[Process]) -> ProcessFailed:
    """The death of one of ``others``, if that is what a process failed of; its peers may notice it first."""
    dead = multiprocessing.connection.wait([other.sentinel for other in others], _TIME_TO_BE_FOUND_DEAD_S)
    return next((other.death() for other in others if other.sentinel in dead), failure)


@contextlib.contextmanager
def _inherited_by_server() -> Iterator[None]:
    """What the server of processes, which starts with the first of them, is to inherit, and they from it."""
    # ^C on a terminal goes to every process; it is for the first one to end the others. (The tracker is another process of
    # `multiprocessing`; to start it clears the mask.)
    resource_tracker.ensure_running()
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    # Some versions of Python let the server import its modules by this variable only.
    paths = [str(Path(zmqagent.__file__).parents[1]), *filter(None, [os.environ.get("PYTHONPATH")])]
    try:
        with _environment(PYTHONPATH=os.pathsep.join(paths), OMP_NUM_THREADS="1"):
            yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    former = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _live(connection: Connection, lifeline: Connection) -> None:
    _die_with(lifeline)
    # TENSORPIPE's need of files grows beyond the usual limit of 1,024 with the group.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    # No filter: torch demands that some of its warnings be shown, whatever the filters say.
    warnings.showwarning = _show_unless_torch_speaks_of_itself
    # Nobody asks any more, or waits for the answer: EOFError or OSError.
    with contextlib.suppress(EOFError, OSError):
        while True:
            function, args = connection.recv()
            connection.send(_answer(function, args))
    # An agent may still run, and would keep the process alive.
    os._exit(0)


def _answer(function: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Any, str]:
    """What the function returned, and the traceback of what it raised, if it did."""
    try:
        return function(*args), ""
    except BaseException:
        return None, traceback.format_exc()


def _die_with(lifeline: Connection) -> None:
    """Has the kernel kill this process when the other end of ``lifeline`` closes, however that comes to be.

    The process that measures may be killed while this one is stopped and could not read an end of file.
    """
    descriptor = lifeline.fileno()
    fcntl.fcntl(descriptor, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(descriptor, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_ASYNC)


def _show_unless_torch_speaks_of_itself(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, file: object = None, line: str | None = None
) -> None:
    """Drops what torch says of its own code, as TENSORPIPE starts and of its optimizers: nobody here could act on it."""
    if not str(message).startswith(("You are using a Backend", "`TorchScript` support for functional optimizers")):
        sys.stderr.write(warnings.formatwarning(message, category, filename, lineno, line))
