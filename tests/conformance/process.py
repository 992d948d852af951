"""One test in a process group of its own: started, watched, ended.

The runner, which has imported torch and started no thread, forks a *controller* for each test. The controller leads a new
process group, plays the part of torch's main process (it forks the ranks and judges their exit codes) and sends back what
became of the test. Whatever the test has left behind goes with the group.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import time
import unittest
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path

from tests.conformance.causes import Verdict, find_cause, where_stuck
from tests.conformance.fixtures import ForkedRanks, redirect_output
from tests.conformance.suites import build, starts_agents_everywhere

__all__ = ["Outcome", "RunningTest", "missing_agents"]

AGENT_MODULES = {"ZMQ": "zmqagent.", "TENSORPIPE": "torch._C."}
"""How the full class name of a backend's agent begins."""

_DUMP_STACKS = signal.SIGUSR1
_TIME_TO_DUMP_S = 1.5
_fork = multiprocessing.get_context("fork")


@dataclass(frozen=True)
class Outcome:
    """What became of one test."""

    suite: str
    test: str
    verdict: Verdict
    seconds: float
    cause: str = ""
    log: str = ""
    agents: list[list[str]] = field(default_factory=list)

    @property
    def name(self) -> str:
        return f"{self.suite}.{self.test}"


class RunningTest:
    """A test under way.

    Poll `finished`, or wait on `connection`, and then call `outcome` once; call `kill` to be rid of it early.
    """

    def __init__(self, backend: str, suite: str, test: str, timeout: float) -> None:
        self.suite, self.test, self._backend = suite, test, backend
        # Short: sockets are made in here, and the path of a Unix socket has at most 107 bytes.
        self._directory = Path(tempfile.mkdtemp(prefix="zc"))
        self._started = time.monotonic()
        self._deadline = self._started + timeout
        self.connection, theirs = _fork.Pipe(duplex=False)
        self._controller = _fork.Process(target=_control, args=(backend, suite, test, self._directory, theirs))
        self._controller.start()
        # The controller does the same: whichever comes first, the group exists before anyone needs it.
        os.setpgid(self._controller_pid, self._controller_pid)
        theirs.close()

    @property
    def finished(self) -> bool:
        return self.connection.poll() or self._controller_is_gone() or time.monotonic() > self._deadline

    def outcome(self, logs: Path) -> Outcome:
        """End the test, whether or not it is over, and tell what became of it; keep the logs of a failure in ``logs``."""
        seconds = time.monotonic() - self._started
        verdict, text = self._verdict()
        self.kill()
        agents = self._agents()
        if verdict is Verdict.PASSED:
            missing = missing_agents(self._backend, agents, everywhere=starts_agents_everywhere(self.suite, self.test))
            if missing:
                verdict, text = Verdict.FAILED, missing
        cause = log = ""
        if verdict is Verdict.FAILED:
            ranks = {path.stem: path.read_text(errors="replace") for path in sorted(self._directory.glob("*.log"))}
            cause = find_cause(text, ranks)
            if stuck := where_stuck(ranks):
                cause = f"{cause}: {stuck}"
            log = str(self._keep_log(logs, text, ranks))
        elif verdict is Verdict.SKIPPED:
            cause = text
        shutil.rmtree(self._directory, ignore_errors=True)
        return Outcome(self.suite, self.test, verdict, round(seconds, 2), cause, log, agents)

    def kill(self) -> None:
        """End every process of the test."""
        # The controller is reaped last: until then its process id cannot name another group.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._controller_pid, signal.SIGKILL)
        self._controller.join()
        self.connection.close()

    @property
    def _controller_pid(self) -> int:
        assert self._controller.pid is not None
        return self._controller.pid

    def _controller_is_gone(self) -> bool:
        options = os.WEXITED | os.WNOHANG | os.WNOWAIT
        return os.waitid(os.P_PID, self._controller_pid, options) is not None

    def _verdict(self) -> tuple[Verdict, str]:
        try:
            if self.connection.poll():
                verdict, text = self.connection.recv()
                return verdict, text
        except EOFError:
            pass
        if self._controller_is_gone():
            return Verdict.FAILED, "RuntimeError: the process that leads the test died"
        self._dump_stacks()
        return Verdict.FAILED, f"TimeoutError: still running after {self._deadline - self._started:.0f} s"

    def _dump_stacks(self) -> None:
        try:
            os.killpg(self._controller_pid, _DUMP_STACKS)
        except ProcessLookupError:
            return
        # No process reports that its stacks are written; those that cannot write them in time are stuck for good.
        time.sleep(_TIME_TO_DUMP_S)

    def _agents(self) -> list[list[str]]:
        ranks = sorted(path.stem for path in self._directory.glob("rank*.log"))
        notes = (self._directory / f"{rank}.agents" for rank in ranks)
        return [path.read_text().split() if path.exists() else [] for path in notes]

    def _keep_log(self, logs: Path, text: str, ranks: dict[str, str]) -> Path:
        logs.mkdir(parents=True, exist_ok=True)
        kept = logs / f"{self.suite}.{self.test}.log"
        parts = {"result": text, **ranks}
        kept.write_text("\n".join(f"===== {name} =====\n{part}" for name, part in parts.items()))
        return kept


def missing_agents(backend: str, agents: list[list[str]], *, everywhere: bool) -> str:
    """Why a test that passed proves nothing: no agent of ``backend`` where there should have been one. Empty if all is well.

    ``agents`` has the class names of the agents that each rank started; ``everywhere`` says that each rank had to start one.
    """
    module = AGENT_MODULES[backend]
    strangers = [name for started in agents for name in started if not name.startswith(module)]
    if strangers:
        return f"RuntimeError: the test passed on another agent than {backend}'s: {strangers[0]}"
    idle = [rank for rank, started in enumerate(agents) if not started]
    if everywhere and (idle or not agents):
        return f"RuntimeError: the test passed, but no {backend} agent was started on rank(s) {idle or 'any'}"
    return ""


def _control(backend: str, suite: str, test: str, directory: Path, connection: Connection) -> None:
    """The controller's life."""
    os.setpgid(0, 0)
    redirect_output(directory / "controller.log")
    faulthandler.enable(sys.__stderr__)
    # The ranks inherit the handler; each writes to what is its stderr then.
    faulthandler.register(_DUMP_STACKS, sys.__stderr__)
    tempfile.tempdir = str(directory)
    ForkedRanks.directory = directory
    result = unittest.TestResult()
    build(backend, suite)(test).run(result)
    connection.send(_judge(result))


def _judge(result: unittest.TestResult) -> tuple[Verdict, str]:
    troubles = [*result.errors, *result.failures]
    if troubles:
        return Verdict.FAILED, "\n".join(text for _, text in troubles)
    if result.skipped:
        return Verdict.SKIPPED, result.skipped[0][1]
    if result.testsRun != 1:
        return Verdict.FAILED, "RuntimeError: the test was not run"
    return Verdict.PASSED, ""
