"""`zmqagent.agent.exchange`: what it does about each message that comes, without sockets."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from typing import Any

import pytest

from zmqagent.agent.base import Reply, Respond
from zmqagent.agent.codec import Codec
from zmqagent.agent.detour import Deliver, Detour
from zmqagent.agent.exchange import Exchange
from zmqagent.agent.executor import Executor, Task
from zmqagent.agent.serving import is_request
from zmqagent.exceptions import (
    ProtocolError,
    RpcTimeoutError,
    SendFailedError,
    ShutdownError,
    UnknownWorkerError,
    WorkerLostError,
)
from zmqagent.transport.base import Event, Frames, PeerRecord, Transport
from zmqagent.wire.commands import (
    Ack,
    Barrier,
    Failure,
    ForwardAutograd,
    Goodbye,
    Pickled,
    PythonCall,
    Return,
    RRefUserDelete,
    RunWithProfiling,
)
from zmqagent.wire.frames import Envelope, decode, encode
from zmqagent.wire.types import AutogradMetadata, ForkId, Message, MessageType, RRefId, WorkerId

ALICE = PeerRecord("alice", WorkerId(0), 10, "host", 1, ())
BOB = PeerRecord("bob", WorkerId(1), 20, "host", 2, ())
CALL = PythonCall(Pickled(b"call"), False).to_message()
DELETE = RRefUserDelete(RRefId(WorkerId(1), 1), ForkId(WorkerId(0), 2)).to_message()
DEADLINE_S = 30.0


class Recorder(Transport):
    """Keeps what is sent, or fails to send it."""

    addresses = ()

    def __init__(self) -> None:
        self.sent: list[list[memoryview]] = []
        self.on_send: Any = None

    def connect(self, peer: PeerRecord) -> None:
        """Everybody is connected."""

    def disconnect(self, worker_id: WorkerId, incarnation: int) -> None:
        """Nobody is."""

    def send(self, to: WorkerId, frames: Frames) -> None:
        if self.on_send is not None:
            self.on_send()
        self.sent.append([memoryview(frame) for frame in frames])

    def receive(self, timeout: float | None) -> Sequence[Event]:
        return ()

    def wake(self) -> None:
        """Nobody receives."""

    def close(self, linger: float = 1.0) -> None:
        """There is nothing to close."""


class Side:
    """Alice's exchange; tasks go to ``executor``, which runs nothing until told."""

    def __init__(self, detour: Detour | None = None) -> None:
        self.transport = Recorder()
        self.served: list[tuple[WorkerId, Message]] = []
        self.responds: list[Respond] = []
        self.unused: list[Message] = []
        self.exchange = Exchange(ALICE, self.transport, self.serve, self.unused.append, detour)
        self.executor = Executor(lambda timeout: None, lambda: None, 1, "alice")
        self.exchange.start(self.executor)
        self.replies: SimpleQueue[Reply] = SimpleQueue()

    def serve(self, source: WorkerId, message: Message, respond: Respond) -> None:
        self.served.append((source, message))
        self.responds.append(respond)

    def ask(self, message: Message = CALL, *, to: PeerRecord = BOB, timeout: float = 60.0, retry: bool = False) -> None:
        self.exchange.request(to, message, self.replies.put, timeout=timeout, retry=retry)

    def take_in(self, message: Message, number: int, to: int = 10, *, incarnation: int = 20) -> Task | None:
        """A message of Bob's arrives."""
        return self.exchange.take_in(frames(message, number, to, incarnation))

    def run(self) -> None:
        """Runs what was given to the executor, which stops."""
        for task in self.executor.stop():
            task()


def frames(message: Message, number: int, to: int = 10, incarnation: int = 20) -> list[memoryview]:
    return [memoryview(frame) for frame in Codec(BOB.worker_id, incarnation).encode(message, number, to)]


@pytest.fixture
def side() -> Iterator[Side]:
    side = Side()
    yield side
    side.executor.close()


def test_the_answer_completes_its_call_and_a_second_one_is_counted(side: Side) -> None:
    side.ask()
    assert side.exchange.activity.active() == (1, 0)
    task = side.take_in(Return(Pickled(b"1")).to_message(), 0)
    assert task is not None
    assert not is_request(task)
    task()
    assert isinstance(side.replies.get_nowait(), Return)
    assert side.exchange.activity.active() == (0, 0)
    late = side.take_in(Return(Pickled(b"2")).to_message(), 0)
    assert side.exchange.dropped()["agent.late_replies"] == 1
    assert late is not None
    late()
    assert [bytes(message.payload) for message in side.unused] == [b"2"]
    assert side.replies.empty()


def test_a_request_is_served_once_however_often_it_comes(side: Side) -> None:
    first, second = side.take_in(CALL, 5), side.take_in(CALL, 5)
    assert first is not None
    assert is_request(first)
    assert second is None
    assert side.exchange.dropped()["agent.duplicate_requests"] == 1


def test_an_idempotent_request_is_served_again(side: Side) -> None:
    assert side.take_in(DELETE, 5) is not None
    assert side.take_in(DELETE, 5) is not None


def test_what_was_forgotten_of_a_worker_is_new_again(side: Side) -> None:
    assert side.take_in(CALL, 5) is not None
    side.exchange.forget(BOB.worker_id, 20)
    assert side.take_in(CALL, 5) is not None


def test_a_message_that_cannot_be_read_is_dropped_and_logged(side: Side, caplog: pytest.LogCaptureFixture) -> None:
    assert side.exchange.take_in([memoryview(b"noise")]) is None
    assert "worker alice cannot read a message: " in caplog.text
    assert caplog.records[0].levelno == logging.WARNING


def test_messages_for_or_from_another_life_are_dropped(side: Side) -> None:
    assert side.take_in(CALL, 0, to=11) is None
    assert side.exchange.take_in(frames(CALL, 0), lambda worker, incarnation: False) is None
    accepted: list[tuple[int, int]] = []
    assert side.exchange.take_in(frames(CALL, 0), lambda *who: accepted.append(who) or True) is not None
    assert accepted == [(1, 20)]
    assert side.take_in(CALL, 1, to=0) is not None


@pytest.mark.parametrize(
    ("answer", "cls"),
    [
        (Failure(21, "WorkerLostError", "gone").to_message(), WorkerLostError),
        (Message(Ack().to_message().type, ("a field too many",)), ProtocolError),
    ],
    ids=["failure", "unreadable"],
)
def test_an_answer_that_is_none_fails_the_call(side: Side, answer: Message, cls: type) -> None:
    side.ask()
    task = side.take_in(answer, 0)
    assert task is not None
    task()
    assert type(side.replies.get_nowait()) is cls


def test_an_answer_whose_tensors_cannot_be_rebuilt_fails_the_call_and_is_left_unused(side: Side) -> None:
    side.ask()
    sent = Envelope(BOB.worker_id, 20, 10, 0, MessageType.PYTHON_RET, ((),), b"pickle", (), (("no tensor",),))
    task = side.exchange.take_in([memoryview(frame) for frame in encode(sent)])
    assert task is not None
    task()
    assert type(side.replies.get_nowait()) is ProtocolError
    side.run()
    ((payload, tensors),) = [(bytes(message.payload), message.tensors) for message in side.unused]
    assert (payload, tensors) == (b"pickle", ())


def test_an_answer_that_cannot_travel_is_replaced_by_the_reason_and_its_sender_knows(side: Side) -> None:
    for number, message in enumerate([Return(Pickled(b"1")).to_message(), Message(MessageType.PYTHON_RET, (object(),))]):
        task = side.take_in(CALL, number)
        assert task is not None
        task()
        assert side.responds[number](message) is (number == 0)
    assert [decode(frames).type for frames in side.transport.sent] == [MessageType.PYTHON_RET, MessageType.EXCEPTION]
    assert side.exchange.activity.active() == (0, 0)


def test_a_call_that_cannot_be_sent_raises_and_its_callback_never_runs(side: Side) -> None:
    def refuse() -> None:
        raise UnknownWorkerError("who is that?")

    side.transport.on_send = refuse
    with pytest.raises(UnknownWorkerError):
        side.ask()
    assert side.exchange.activity.active() == (0, 0)
    side.exchange.close(ShutdownError("the end"))
    assert side.replies.empty()


def test_an_idempotent_call_whose_first_try_fails_is_tried_again_in_time(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("zmqagent.agent.exchange.time.monotonic", lambda: now)

    def refuse() -> None:
        raise SendFailedError("not just now")

    side.transport.on_send = refuse
    side.ask(DELETE, retry=True)
    assert side.exchange.activity.active() == (1, 0)
    with pytest.raises(SendFailedError):
        side.ask(CALL)
    side.transport.on_send = None
    now += 1.0
    assert side.exchange.tick() == []
    assert len(side.transport.sent) == 1
    task = side.take_in(Ack().to_message(), 0)
    assert task is not None
    task()
    assert isinstance(side.replies.get_nowait(), Ack)


def test_a_call_whose_worker_is_lost_while_it_is_sent_fails_once(side: Side) -> None:
    def lose() -> None:
        side.exchange.worker_lost(BOB.worker_id, WorkerLostError("gone"))
        raise WorkerLostError("cannot be sent to")

    side.transport.on_send = lose
    side.ask()
    side.run()
    assert isinstance(side.replies.get_nowait(), WorkerLostError)
    assert side.replies.empty()
    assert side.exchange.activity.active() == (0, 0)


def test_an_interrupt_while_a_call_is_sent_is_raised_though_the_call_has_failed(side: Side) -> None:
    def interrupt() -> None:
        side.exchange.interrupt()
        raise KeyboardInterrupt

    side.transport.on_send = interrupt
    with pytest.raises(KeyboardInterrupt):
        side.ask()


def test_only_the_calls_to_the_lost_worker_fail(side: Side) -> None:
    side.ask()
    side.exchange.worker_lost(WorkerId(7), WorkerLostError("somebody else"))
    assert side.exchange.activity.active() == (1, 0)


def test_closing_fails_the_calls_under_way_and_every_later_one(side: Side) -> None:
    side.ask()
    side.ask()
    side.exchange.close(ShutdownError("the end"))
    assert [type(side.replies.get_nowait()) for _ in range(2)] == [ShutdownError] * 2
    with pytest.raises(ShutdownError, match="the end"):
        side.ask()
    assert len(side.transport.sent) == 2


def test_a_call_whose_deadline_has_passed_fails_at_the_next_tick(side: Side) -> None:
    side.ask(timeout=1e-9)
    for task in side.exchange.tick():
        task()
    assert isinstance(side.replies.get_nowait(), RpcTimeoutError)
    assert side.exchange.tick() == []


def test_a_call_that_fails_is_named_by_what_it_is_and_not_by_its_wrappers(side: Side) -> None:
    side.ask(RunWithProfiling(0, ForwardAutograd(AutogradMetadata(1, 2), CALL).to_message()).to_message(), timeout=1e-9)
    for task in side.exchange.tick():
        task()
    assert "It was a PYTHON_CALL to worker bob" in str(side.replies.get_nowait())


def test_an_idempotent_call_is_sent_again_as_it_was(side: Side, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("zmqagent.agent.exchange.time.monotonic", lambda: now)
    side.ask(DELETE, retry=True)
    now += 1.0
    assert side.exchange.tick() == []
    assert side.transport.sent[1] == side.transport.sent[0]

    def refuse() -> None:
        raise WorkerLostError("not just now")

    side.transport.on_send = refuse
    now += 1.5
    assert side.exchange.tick() == []
    assert side.exchange.activity.active() == (1, 0)


def test_a_call_to_oneself_needs_no_transport_and_is_served_by_the_executor(side: Side) -> None:
    side.ask(to=ALICE)
    assert side.transport.sent == []
    assert side.served == []
    (task,) = side.executor.stop()
    assert is_request(task)
    task()
    ((source, message),) = side.served
    assert (source, bytes(message.payload)) == (ALICE.worker_id, b"call")
    side.responds[0](Return(Pickled(b"answer")).to_message())
    assert isinstance(side.replies.get_nowait(), Return)


def test_once_the_executor_has_stopped_completions_still_run_and_requests_do_not(side: Side) -> None:
    side.executor.stop()
    side.ask(to=ALICE)
    assert side.served == []
    side.exchange.worker_lost(ALICE.worker_id, WorkerLostError("gone"))
    assert isinstance(side.replies.get_nowait(), WorkerLostError)


def test_requests_that_wait_for_something_are_counted(side: Side) -> None:
    task = side.take_in(CALL, 0)
    assert task is not None
    task()
    activity = side.exchange.activity
    assert (activity.active(), activity.active_async(), activity.busy()) == ((0, 1), 1, 0)
    side.responds[0](Ack().to_message())
    assert (activity.active(), activity.active_async(), activity.busy()) == ((0, 0), 0, 0)


def test_who_waits_at_a_barrier_or_says_goodbye_is_idle(side: Side) -> None:
    side.ask(Barrier("tag", 0).to_message())
    assert side.exchange.activity.active() == (0, 0)
    task = side.take_in(Goodbye(1, "done").to_message(), 0)
    assert task is not None
    task()
    assert side.exchange.activity.active() == (0, 0)
    assert side.exchange.activity.wait_until_idle(0.0)


def test_an_answer_to_a_caller_that_is_gone_is_let_go(side: Side) -> None:
    task = side.take_in(CALL, 0)
    assert task is not None
    task()

    def refuse() -> None:
        raise WorkerLostError("gone")

    side.transport.on_send = refuse
    side.responds[0](Ack().to_message())
    assert side.exchange.activity.active() == (0, 0)


def test_a_notice_has_a_number_of_its_own_and_no_answer(side: Side) -> None:
    side.exchange.notify(BOB, Goodbye(1, "done").to_message())
    assert len(side.transport.sent) == 1
    assert side.exchange.activity.active() == (0, 0)


class Bend:
    """A detour that keeps what it is given."""

    def __init__(self) -> None:
        self.kept: list[tuple[WorkerId, list[Any], Deliver]] = []
        self.is_closed = False

    def send(self, to: WorkerId, frames: list[Any], deliver: Deliver) -> None:
        self.kept.append((to, frames, deliver))

    def close(self) -> None:
        self.is_closed = True


@pytest.fixture
def bend() -> Bend:
    return Bend()


@pytest.fixture
def bent(bend: Bend) -> Iterator[Side]:
    side = Side(bend)
    yield side
    side.executor.close()


def test_everything_that_is_sent_goes_through_the_detour(bent: Side, bend: Bend, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("zmqagent.agent.exchange.time.monotonic", lambda: now)
    bent.ask(DELETE, retry=True)
    now += 1.0
    bent.exchange.tick()
    bent.exchange.notify(BOB, Goodbye(1, "done").to_message())
    task = bent.take_in(CALL, 0)
    assert task is not None
    task()
    bent.responds[0](Ack().to_message())
    kinds = [decode(frames).type.name for _, frames, _ in bend.kept]
    assert kinds == ["RREF_USER_DELETE", "RREF_USER_DELETE", "GOODBYE", "RREF_ACK"]
    assert bent.transport.sent == []
    to, frames, deliver = bend.kept[2]
    deliver(to, frames)
    assert bent.transport.sent == [[memoryview(frame) for frame in frames]]


def test_a_call_to_oneself_goes_through_the_detour_too(bent: Side, bend: Bend) -> None:
    bent.ask(to=ALICE)
    ((to, frames, deliver),) = bend.kept
    deliver(to, frames)
    for task in bent.executor.stop():
        task()
    assert bent.served[0][0] == ALICE.worker_id


def test_the_time_of_a_call_runs_while_the_detour_keeps_it(bent: Side) -> None:
    bent.ask(timeout=1e-9)
    for task in bent.exchange.tick():
        task()
    assert isinstance(bent.replies.get_nowait(), RpcTimeoutError)


def test_the_detour_ends_with_the_exchange(bent: Side, bend: Bend) -> None:
    bent.exchange.close(ShutdownError("the end"))
    assert bend.is_closed
