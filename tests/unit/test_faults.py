"""`zmqagent.testing.faults`: which messages fail, how often, and which are late."""

from __future__ import annotations

import doctest

import pytest
import torch

from zmqagent.exceptions import InvalidOptionError
from zmqagent.testing import faults
from zmqagent.testing.faults import Fail, Faults, Send
from zmqagent.wire.commands import CleanupContexts, Pickled, PythonCall, RRefFetch, RRefForkRequest, RRefUserDelete
from zmqagent.wire.types import ForkId, Message, RRefId, WorkerId

ONE, TWO = WorkerId(1), WorkerId(2)
CALL = PythonCall(Pickled(b"call"), False).to_message()


def outcomes(judge: Faults, message: Message, times: int, to: WorkerId = ONE) -> list[bool]:
    """For each of so many attempts to send ``message``, whether it succeeds."""
    return [isinstance(judge.judge(to, message), Send) for _ in range(times)]


def test_a_message_fails_as_often_as_asked_and_never_again() -> None:
    judge = Faults(2, ["PYTHON_CALL"], {})
    assert outcomes(judge, CALL, 5) == [False, False, True, True, True]


def test_the_failure_says_in_torchs_words_that_it_was_meant() -> None:
    verdict = Faults(2, ["PYTHON_CALL"], {}).judge(ONE, CALL)
    assert verdict == Fail("Send attempt failed intentionally for a PYTHON_CALL to worker 1 (1 of 2)")


def test_each_message_has_a_count_of_its_own() -> None:
    judge = Faults(1, ["RREF_FORK_REQUEST", "PYTHON_CALL"], {})
    for message in (
        CALL,
        PythonCall(Pickled(b"another call"), False).to_message(),
        PythonCall(Pickled(b"call"), True).to_message(),
        *(RRefForkRequest(RRefId(0, 0), ForkId(1, number)).to_message() for number in range(3)),
    ):
        assert outcomes(judge, message, 2) == [False, True]
        assert outcomes(judge, message, 2, to=TWO) == [False, True]


def test_calls_that_differ_in_their_tensors_alone_are_one_message() -> None:
    judge = Faults(1, ["PYTHON_CALL"], {})
    first, second = (PythonCall(Pickled(b"call", (), [tensor]), False).to_message() for tensor in (torch.ones(1), torch.ones(2)))
    assert outcomes(judge, first, 1) == [False]
    assert outcomes(judge, second, 1) == [True]


def test_only_the_named_types_fail() -> None:
    judge = Faults(9, ["RREF_USER_DELETE"], {})
    assert outcomes(judge, RRefUserDelete(RRefId(0, 0), ForkId(1, 0)).to_message(), 1) == [False]
    assert outcomes(judge, RRefForkRequest(RRefId(0, 0), ForkId(1, 0)).to_message(), 1) == [True]
    assert outcomes(judge, CALL, 1) == [True]


@pytest.mark.parametrize(("count", "names"), [(0, ["PYTHON_CALL"]), (3, [])])
def test_without_a_count_or_a_name_nothing_fails(count: int, names: list[str]) -> None:
    assert outcomes(Faults(count, names, {}), CALL, 1) == [True]


def test_a_message_is_late_once_it_does_not_fail_any_more() -> None:
    judge = Faults(1, ["PYTHON_CALL"], {"PYTHON_CALL": 1.5})
    assert isinstance(judge.judge(ONE, CALL), Fail)
    assert judge.judge(ONE, CALL) == Send(1.5)
    assert judge.judge(ONE, CleanupContexts((1,)).to_message()) == Send(0.0)


@pytest.mark.parametrize("name", ["SCRIPT_RREF_FETCH_CALL", "PYTHON_RREF_FETCH_CALL"])
def test_either_name_of_a_fetch_means_every_fetch(name: str) -> None:
    fetch = RRefFetch(RRefId(1, 0)).to_message()
    assert outcomes(Faults(1, [name], {}), fetch, 2) == [False, True]
    assert Faults(0, [], {name: 1.0}).judge(ONE, fetch) == Send(1.0)


@pytest.mark.parametrize("delays", [(1.0, 2.0), (2.0, 1.0)])
def test_of_two_delays_for_one_message_the_longer_counts(delays: tuple[float, float]) -> None:
    names = ("SCRIPT_RREF_FETCH_CALL", "PYTHON_RREF_FETCH_CALL")
    judge = Faults(0, [], dict(zip(names, delays, strict=True)))
    assert judge.judge(ONE, RRefFetch(RRefId(1, 0)).to_message()) == Send(2.0)


@pytest.mark.parametrize("name", ["PYTHON_CALLS", "python_call", "", "PYTHON_RET", "FORWARD_AUTOGRAD_REQ", "BARRIER_REQ"])
def test_a_name_without_a_counterpart_is_refused_and_the_others_are_told(name: str) -> None:
    for asked in (([name], {}), ([], {name: 1.0})):
        with pytest.raises(
            InvalidOptionError, match=f"No mapping to rpc::MessageType exists for {name}. Those that can"
        ) as caught:
            Faults(1, *asked)
        assert "SCRIPT_CALL, PYTHON_CALL, " in str(caught.value)
        assert "CLEANUP_AUTOGRAD_CONTEXT_REQ, SCRIPT_RREF_FETCH_CALL" in str(caught.value)


def test_the_example_in_the_docs_of_names_runs() -> None:
    assert doctest.testmod(faults).failed == 0
