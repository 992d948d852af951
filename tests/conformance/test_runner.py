"""The runner's own tests: that it can fail, that it ends what hangs, and that it names the cause."""

from __future__ import annotations

import os
import re
import sys
import time
import unittest
from pathlib import Path

import pytest

from tests.conformance import __main__, process, suites
from tests.conformance.causes import Verdict, find_cause
from tests.conformance.exclusions import NOT_APPLICABLE
from tests.conformance.fixtures import BACKENDS
from tests.conformance.process import Outcome, RunningTest, missing_agents
from tests.conformance.report import Report
from tests.conformance.suites import starts_agents_everywhere
from tests.conformance.table import table

TENSORPIPE_AGENT = "torch._C._distributed_rpc.TensorPipeAgent"
ZMQ_AGENT = "zmqagent.agent.agent.ZmqRpcAgent"


class Sample(unittest.TestCase):
    """What the controller is given in place of a suite of torch's."""

    __test__ = False

    def test_passes(self) -> None:
        pass

    def test_fails(self) -> None:
        raise ValueError("a reason")

    def test_is_skipped(self) -> None:
        self.skipTest("no accelerator")

    def test_dies(self) -> None:
        os._exit(3)

    def test_hangs(self) -> None:
        ready, tell = os.pipe()
        if os.fork() == 0:
            process.redirect_output(process.ForkedRanks.directory / "rank0.log")
            os.write(tell, b".")
        else:
            os.read(ready, 1)
        while True:
            time.sleep(60)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> object:
    monkeypatch.setattr(process, "build", lambda backend, suite: Sample)
    monkeypatch.setattr(process, "starts_agents_everywhere", lambda suite, test: False)

    def run(test: str, timeout: float = 60.0) -> Outcome:
        running = RunningTest("TENSORPIPE", "Sample", test, timeout)
        while not running.finished:
            time.sleep(0.01)
        return running.outcome(tmp_path)

    return run


@pytest.mark.parametrize(
    ("test", "verdict", "cause"),
    [
        ("test_passes", Verdict.PASSED, ""),
        ("test_fails", Verdict.FAILED, "ValueError: a reason"),
        ("test_is_skipped", Verdict.SKIPPED, "no accelerator"),
        ("test_dies", Verdict.FAILED, "RuntimeError: the process that leads the test died"),
    ],
)
def test_a_test_comes_to_its_verdict(run, test: str, verdict: Verdict, cause: str) -> None:
    outcome = run(test)
    assert outcome.verdict is verdict
    assert outcome.cause.startswith(cause)


def test_a_test_that_hangs_is_ended_with_its_children_and_leaves_their_stacks(run) -> None:
    held_by_all, inherited = os.pipe()
    outcome = run("test_hangs", timeout=2.0)
    assert outcome.verdict is Verdict.FAILED
    assert re.fullmatch(
        r"TimeoutError: still running after 2 s: rank0 at tests/conformance/test_runner.py:\d+ in test_hangs", outcome.cause
    )
    assert Path(outcome.log).read_text().count("in test_hangs") == 2
    os.close(inherited)
    # The end of file comes once no process of the test is left.
    assert os.read(held_by_all, 1) == b""
    os.close(held_by_all)


@pytest.mark.parametrize(
    ("backend", "agents", "everywhere", "complaint"),
    [
        ("ZMQ", [[ZMQ_AGENT], [ZMQ_AGENT]], True, ""),
        ("ZMQ", [[ZMQ_AGENT], []], True, "no ZMQ agent was started on rank(s) [1]"),
        ("ZMQ", [], True, "no ZMQ agent was started on rank(s) any"),
        ("ZMQ", [[], []], False, ""),
        ("ZMQ", [[ZMQ_AGENT], [TENSORPIPE_AGENT]], False, "another agent than ZMQ's"),
        ("TENSORPIPE", [[TENSORPIPE_AGENT]], True, ""),
        ("TENSORPIPE", [[ZMQ_AGENT]], True, "another agent than TENSORPIPE's"),
    ],
)
def test_a_pass_without_the_backends_agent_is_none(
    backend: str, agents: list[list[str]], everywhere: bool, complaint: str
) -> None:
    found = missing_agents(backend, agents, everywhere=everywhere)
    assert complaint in found if complaint else found == ""


def test_it_is_known_which_tests_start_an_agent_on_every_rank() -> None:
    assert starts_agents_everywhere("RpcTest", "test_add")
    assert starts_agents_everywhere("RpcTest", "test_wait_all_workers_twice_dense") is False
    assert starts_agents_everywhere("RpcTest", "test_reinit") is False


REMOTE = """RuntimeError: Process 0 exited with error code 10 and exception:
Traceback (most recent call last):
  File "/v/site-packages/torch/distributed/rpc/api.py", line 80, in wrapper
    return func(*args, **kwargs)
RuntimeError: timed out in _all_gather after 5.00 seconds

Process 2 exited with error code 10 and exception:
Traceback (most recent call last):
  File "/src/zmqagent/rpc/invoke.py", line 12, in rpc_sync
    raise error
zmqagent.exceptions.CalleeError: worker1 has no function f
"""


def test_the_cause_is_not_what_another_failure_led_to() -> None:
    assert find_cause(REMOTE, {}) == "[rank 2] CalleeError: worker1 has no function f (zmqagent/rpc/invoke.py:12 in rpc_sync)"


def test_the_cause_is_the_root_of_a_chain() -> None:
    chain = (
        'File "/a/b.py", line 1, in f\nKeyError: 3\n\nDuring handling of the above exception, another exception occurred:\n\n'
        'File "/a/b.py", line 2, in g\nValueError: bad'
    )
    assert find_cause(chain, {}) == "KeyError: 3 (/a/b.py:1 in f)"


def test_the_logs_are_searched_when_the_result_tells_nothing() -> None:
    text = "RuntimeError: Process 1 terminated or timed out after 3 seconds"
    logs = {"rank0": "all is well", "rank1": "TypeError: no such thing"}
    assert find_cause(text, logs) == "[rank1] TypeError: no such thing"


def test_a_failure_makes_the_run_fail_and_is_printed_with_its_cause(capsys: pytest.CaptureFixture[str]) -> None:
    report = Report("ZMQ", 3)
    report.add(Outcome("S", "test_passes", Verdict.PASSED, 1.0))
    report.add(Outcome("S", "test_left_out", Verdict.SKIPPED, 0.0, "not applicable"))
    assert not report.has_failures
    report.add(Outcome("S", "test_fails", Verdict.FAILED, 1.0, "cause"))
    assert report.has_failures
    report.close(3.0)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "FAIL  S.test_fails (1.0 s)  cause"
    assert lines[-1] == "1 passed, 1 failed, 1 skipped"


def test_the_table_shows_both_backends_and_what_did_not_pass() -> None:
    passed = {"suite": "S", "test": "a", "verdict": "passed", "cause": ""}
    failed = {"suite": "S", "test": "b", "verdict": "failed", "cause": "x | y"}
    runs = [
        {"backend": "ZMQ", "torch": "2.13.0+cpu", "tests": [passed, failed]},
        {"backend": "TENSORPIPE", "torch": "2.13.0+cpu", "tests": [passed]},
    ]
    lines = table(runs).splitlines()
    assert lines[0] == "torch 2.13.0+cpu:"
    assert "| S | 2 | 1 | 1 | 0 | 1 | 0 | 0 |" in lines
    assert lines[-1] == "| S.b | failed: x \\| y | not run |"


# What is left out.


def test_every_exclusion_is_one_of_torchs_tests_and_stands_once() -> None:
    tests = {f"{suite}.{test}" for suite in (*suites.SUITES, *suites.CUDA_SUITES) for test in suites.test_names(suite)}
    for backend in BACKENDS:
        assert NOT_APPLICABLE.get(backend, {}).keys() <= tests


def test_no_more_than_45_tests_are_left_out_for_torchscript() -> None:
    reasons = NOT_APPLICABLE["ZMQ"].values()
    assert 0 < sum("TorchScript" in reason for reason in reasons) <= 45


def test_the_suites_for_cuda_are_torchs_and_are_refused_where_there_is_no_device(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert {suite for suite in suites.CUDA_SUITES if "Cuda" in suite} == set(suites.CUDA_SUITES)
    assert not suites.CUDA_SUITES.keys() & suites.SUITES.keys()
    monkeypatch.setattr(sys, "argv", ["conformance", "--backend", "ZMQ", "--cuda", "--only", "test_device_maps_gpu$"])
    monkeypatch.setattr(__main__, "_has_cuda_devices", lambda: False)
    assert __main__.main() == 2
    assert capsys.readouterr().out == "this machine has no CUDA device: 1 tests were not run\n"
