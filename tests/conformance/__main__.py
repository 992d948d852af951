"""The command: ``python -m tests.conformance --backend ZMQ``."""

from __future__ import annotations

import argparse
import importlib
import multiprocessing.connection
import os
import re
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

# Before torch is imported: a test has several processes, and each would use every core.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from tests.conformance.causes import Verdict
from tests.conformance.exclusions import NOT_APPLICABLE
from tests.conformance.fixtures import BACKENDS, ZmqFixture
from tests.conformance.process import Outcome, RunningTest
from tests.conformance.report import Report
from tests.conformance.suites import CUDA_SUITES, SUITES, test_names

_POLL_S = 0.1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.conformance", description="Runs torch's own RPC suites on a backend.")
    parser.add_argument("--backend", choices=BACKENDS, required=True)
    parser.add_argument("--suite", action="append", metavar="NAME", help="only this suite (repeatable)")
    parser.add_argument("--cuda", action="store_true", help="the suites that need CUDA devices, in place of the others")
    parser.add_argument("--only", metavar="REGEX", type=re.compile, help="only tests whose Suite.test matches")
    parser.add_argument("--jobs", metavar="N", type=int, default=1, help="tests at the same time (default 1)")
    parser.add_argument("--timeout", metavar="S", type=float, default=120.0, help="seconds for one test (default 120)")
    parser.add_argument("--transport", choices=("local", "ipc", "tcp"), help="of ZMQ (default: the agent's own choice)")
    parser.add_argument("--json", metavar="F", type=Path, help="write all outcomes there")
    parser.add_argument("--logs", metavar="DIR", type=Path, default=Path("conformance-logs"), help="of failures (%(default)s)")
    parser.add_argument("--list", action="store_true", help="print the tests instead of running them")
    arguments = parser.parse_args()
    arguments.choices = CUDA_SUITES if arguments.cuda else SUITES
    for suite in arguments.suite or ():
        if suite not in arguments.choices:
            parser.error(f"there is no suite {suite}, but {', '.join(arguments.choices)}")
    return arguments


def _select(arguments: argparse.Namespace) -> list[tuple[str, str]]:
    tests = [(suite, test) for suite in arguments.suite or arguments.choices for test in test_names(suite)]
    return [pair for pair in tests if arguments.only is None or arguments.only.search(".".join(pair))]


def _has_cuda_devices() -> bool:
    """Asked in a process of its own: CUDA cannot be used in a process that was forked from one that has looked at it."""
    asked = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    return int(subprocess.run(asked, check=True, capture_output=True, text=True).stdout) > 0


def _run(arguments: argparse.Namespace, tests: list[tuple[str, str]]) -> Iterator[Outcome]:
    """Run the tests, ``jobs`` at a time, and yield their outcomes as they come."""
    waiting, running = deque(tests), list[RunningTest]()
    try:
        while waiting or running:
            while waiting and len(running) < arguments.jobs:
                running.append(RunningTest(arguments.backend, *waiting.popleft(), timeout=arguments.timeout))
            multiprocessing.connection.wait([test.connection for test in running], timeout=_POLL_S)
            for test in [test for test in running if test.finished]:
                running.remove(test)
                yield test.outcome(arguments.logs)
    finally:
        for test in running:
            test.kill()


def main() -> int:
    """Run the chosen tests; 0 if none failed, 1 if one did, 2 if none was chosen or can run here."""
    arguments = _arguments()
    tests = _select(arguments)
    if arguments.list or not tests:
        print("\n".join(".".join(pair) for pair in tests) or "no test matches", flush=True)
        return 0 if tests else 2
    if arguments.cuda and not _has_cuda_devices():
        print(f"this machine has no CUDA device: {len(tests)} tests were not run", flush=True)
        return 2
    if arguments.backend == "ZMQ":
        importlib.import_module("zmqagent.testing")  # Once, so that no rank has to.
        ZmqFixture.transport = arguments.transport
    excluded = NOT_APPLICABLE.get(arguments.backend, {})
    report = Report(arguments.backend, len(tests))
    started = time.monotonic()
    for suite, test in tests:
        if reason := excluded.get(f"{suite}.{test}"):
            report.add(Outcome(suite, test, Verdict.SKIPPED, 0.0, f"not applicable: {reason}"))
    for outcome in _run(arguments, [pair for pair in tests if ".".join(pair) not in excluded]):
        report.add(outcome)
    report.close(time.monotonic() - started)
    if arguments.json:
        report.write_json(arguments.json)
    return 1 if report.has_failures else 0


if __name__ == "__main__":
    sys.exit(main())
