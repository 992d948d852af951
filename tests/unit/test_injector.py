"""`zmqagent.testing.injector`: what becomes of each message on its way out."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest

from zmqagent.agent.codec import Codec
from zmqagent.exceptions import SendFailedError, WorkerLostError
from zmqagent.testing import FaultyZmqRpcBackendOptions
from zmqagent.testing.injector import FaultInjector
from zmqagent.wire.commands import CleanupContexts, ForwardAutograd, Goodbye, Pickled, PythonCall, RRefFetch
from zmqagent.wire.types import AutogradMetadata, Message, RRefId, WorkerId

TO = WorkerId(1)
CALL = PythonCall(Pickled(b"call"), False).to_message()
FETCH = RRefFetch(RRefId(1, 0)).to_message()
DEADLINE_S = 30.0
LONG_S = 3600.0


class Sender:
    """Sends through an injector, and keeps what gets through, with the thread that brought it."""

    def __init__(self, **faults: Any) -> None:
        self.injector = FaultInjector(FaultyZmqRpcBackendOptions(**faults))
        self.delivered: SimpleQueue[tuple[list[Any], threading.Thread]] = SimpleQueue()

    def deliver(self, to: WorkerId, frames: list[Any]) -> None:
        assert to == TO
        self.delivered.put((frames, threading.current_thread()))

    def send(self, message: Message) -> list[Any]:
        frames = Codec(WorkerId(0), 10).encode(message, 0, 20)
        self.injector.send(TO, frames, self.deliver)
        return frames


@pytest.fixture
def senders() -> Iterator[list[Sender]]:
    made: list[Sender] = []
    yield made
    for sender in made:
        sender.injector.close()


def test_what_no_fault_concerns_passes_at_once(senders: list[Sender]) -> None:
    senders.append(
        sender := Sender(num_fail_sends=9, messages_to_fail=["PYTHON_CALL"], messages_to_delay={"SCRIPT_CALL": LONG_S})
    )
    for message in (FETCH, CleanupContexts((3,)).to_message(), Goodbye(1, "done").to_message()):
        frames = sender.send(message)
        assert sender.delivered.get_nowait() == (frames, threading.current_thread())


def test_an_attempt_that_fails_raises_and_sends_nothing(senders: list[Sender]) -> None:
    senders.append(sender := Sender(num_fail_sends=1, messages_to_fail=["PYTHON_CALL"]))
    with pytest.raises(SendFailedError, match="Send attempt failed intentionally for a PYTHON_CALL to worker 1"):
        sender.send(CALL)
    assert sender.delivered.empty()
    assert sender.send(CALL) == sender.delivered.get_nowait()[0]


def test_a_message_of_an_autograd_context_counts_as_what_it_is_inside(senders: list[Sender]) -> None:
    senders.append(sender := Sender(num_fail_sends=1, messages_to_fail=["PYTHON_CALL"]))
    with pytest.raises(SendFailedError):
        sender.send(ForwardAutograd(AutogradMetadata(1, 1), CALL).to_message())
    # The ids of the wrapper are drawn anew for each attempt.
    sender.send(ForwardAutograd(AutogradMetadata(1, 2), CALL).to_message())
    sender.send(CALL)
    sender.send(ForwardAutograd(AutogradMetadata(1, 3), FETCH).to_message())


def test_late_messages_leave_on_a_thread_of_their_own_the_shortest_delay_first(senders: list[Sender]) -> None:
    senders.append(sender := Sender(messages_to_delay={"PYTHON_CALL": 0.3, "PYTHON_RREF_FETCH_CALL": 0.001}))
    longer, shorter = sender.send(CALL), sender.send(FETCH)
    (first, thread), (second, _) = (sender.delivered.get(timeout=DEADLINE_S) for _ in range(2))
    assert (first, second) == (shorter, longer)
    assert thread.name == "zmqagent-faults"


def test_closing_drops_what_is_held_back_and_ends_the_thread(senders: list[Sender]) -> None:
    senders.append(sender := Sender(messages_to_delay={"PYTHON_CALL": LONG_S}))
    sender.send(CALL)
    sender.injector.close()
    assert sender.delivered.empty()
    assert "zmqagent-faults" not in {thread.name for thread in threading.enumerate()}
    sender.send(CALL)
    sender.injector.close()
    assert sender.delivered.empty()


def test_a_late_message_whose_peer_is_gone_keeps_no_other_back(senders: list[Sender], caplog: pytest.LogCaptureFixture) -> None:
    senders.append(sender := Sender(messages_to_delay={"PYTHON_CALL": 0.001, "PYTHON_RREF_FETCH_CALL": 0.1}))

    def refuse(to: WorkerId, frames: list[Any]) -> None:
        raise WorkerLostError("gone")

    with caplog.at_level(logging.DEBUG, "zmqagent.testing.injector"):
        sender.injector.send(TO, Codec(WorkerId(0), 10).encode(CALL, 0, 20), refuse)
        frames = sender.send(FETCH)
        assert sender.delivered.get(timeout=DEADLINE_S)[0] == frames
    assert "a message to worker 1 was late, and could not be sent any more: gone" in caplog.text


def test_once_stopped_it_lets_everything_pass_but_what_is_late_stays_late(senders: list[Sender]) -> None:
    delays = {"PYTHON_RREF_FETCH_CALL": 0.2}
    senders.append(sender := Sender(num_fail_sends=9, messages_to_fail=["PYTHON_CALL"], messages_to_delay=delays))
    late = sender.send(FETCH)
    sender.injector.stop()
    for message in (CALL, FETCH):
        frames = sender.send(message)
        assert sender.delivered.get_nowait()[0] == frames
    assert sender.delivered.get(timeout=DEADLINE_S)[0] == late
