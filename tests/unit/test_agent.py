"""`zmqagent.agent.agent`: two agents in one process call each other, meet at barriers, and end."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from queue import SimpleQueue

import pytest
import torch

from zmqagent.agent.agent import ZmqRpcAgent
from zmqagent.agent.base import Reply, Respond
from zmqagent.exceptions import (
    CalleeError,
    InterruptedCallError,
    InvalidTypeError,
    RpcError,
    RpcTimeoutError,
    ShutdownError,
    UnknownWorkerError,
    WorkerLostError,
)
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.transport.hosts import describe_self
from zmqagent.transport.sockets import SocketTransport
from zmqagent.wire.commands import Ack, Failure, Pickled, PythonCall, Return
from zmqagent.wire.types import Message, WorkerId

DEADLINE_S = 30.0
ALICE, BOB = WorkerId(0), WorkerId(1)


class Node:
    """One worker: its agent, and what it does with requests (``serve``), which tests replace."""

    def __init__(self, worker_id: WorkerId, threads: int = 2) -> None:
        transport = SocketTransport(ipc=True, tcp_host=None, incarnation=worker_id + 1)
        self.transport = transport
        self.record = describe_self(f"worker{worker_id}", worker_id, worker_id + 1, transport.addresses)
        self.agent = ZmqRpcAgent(self.record, transport, ZmqRpcBackendOptions(num_worker_threads=threads))
        self.serve: Callable[[WorkerId, Message, Respond], None] = self.echo
        self.lost: SimpleQueue[tuple[WorkerId, RpcError]] = SimpleQueue()

    @staticmethod
    def echo(source: WorkerId, message: Message, respond: Respond) -> None:
        respond(Return(Pickled(message.payload, message.buffers, message.tensors)).to_message())

    def start(self, *others: Node) -> None:
        self.agent.enter([other.record for other in others])
        self.agent.start(
            lambda source, message, respond: self.serve(source, message, respond),
            lambda worker_id, error: self.lost.put((worker_id, error)),
            lambda answer: None,
        )

    def ask(self, to: WorkerId, timeout: float = 0.0, payload: bytes = b"", *tensors: torch.Tensor) -> SimpleQueue[Reply]:
        """Sends a call; its reply comes on the queue."""
        replies: SimpleQueue[Reply] = SimpleQueue()
        message = PythonCall(Pickled(payload, (), tensors), False).to_message()
        self.agent.request(to, message, replies.put, timeout=timeout)
        return replies


Pair = tuple[Node, Node]


@pytest.fixture
def pair() -> Iterator[Pair]:
    before = set(threading.enumerate())
    alice, bob = Node(ALICE), Node(BOB)
    alice.start(bob)
    bob.start(alice)
    yield alice, bob
    for node in (alice, bob):
        node.agent.shutdown()
    assert set(threading.enumerate()) <= before


def reply(replies: SimpleQueue[Reply]) -> Reply:
    return replies.get(timeout=DEADLINE_S)


def together(*actions: Callable[[], object]) -> None:
    threads = [threading.Thread(target=action) for action in actions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("to", [ALICE, BOB], ids=["itself", "another"])
def test_a_call_is_answered_with_copies_of_what_was_sent(pair: Pair, to: WorkerId) -> None:
    tensor = torch.arange(5000.0)
    replies = pair[0].ask(to, 0.0, b"payload", tensor)
    tensor.zero_()
    answer = reply(replies)
    assert isinstance(answer, Return)
    assert bytes(answer.body.payload) == b"payload"
    assert torch.equal(answer.body.tensors[0], torch.arange(5000.0))


def test_what_serving_raises_is_the_answer(pair: Pair) -> None:
    alice, bob = pair

    def serve(source: WorkerId, message: Message, respond: Respond) -> None:
        raise raising[0]

    raising: list[BaseException] = []
    bob.serve = serve
    for raised, cls, text in (
        (ValueError("broken"), CalleeError, "worker worker1 failed to serve a PYTHON_CALL: ValueError('broken')"),
        (SystemExit(3), CalleeError, "SystemExit(3)"),
        (InvalidTypeError("not so"), InvalidTypeError, "On WorkerInfo(id=1, name=worker1): not so"),
    ):
        raising[:] = [raised]
        answer = reply(alice.ask(BOB))
        assert type(answer) is cls
        assert text in str(answer)
    # It passes only when no request counts as under way any more.
    together(alice.agent.join, bob.agent.join)


def test_a_failure_of_the_user_s_function_comes_as_it_was_answered(pair: Pair) -> None:
    alice, bob = pair
    bob.serve = lambda source, message, respond: respond(Failure(0, "ValueError", "the user's").to_message())
    answer = reply(alice.ask(BOB))
    assert isinstance(answer, Failure)
    assert answer.text == "the user's"


def test_an_answer_that_cannot_be_sent_is_answered_by_the_reason(pair: Pair) -> None:
    alice, bob = pair

    def serve(source: WorkerId, message: Message, respond: Respond) -> None:
        respond(Return(Pickled(b"", (), results)).to_message())

    results: list[object] = []
    bob.serve = serve
    # The second has none of a tensor's attributes: no layer foresees it.
    for result in (torch.rand(2).to_mkldnn(), object()):
        results[:] = [result]
        answer = reply(alice.ask(BOB))
        assert isinstance(answer, RpcError)
        assert "On WorkerInfo(id=1, name=worker1)" in str(answer)


def test_a_request_may_be_answered_later_and_only_once(pair: Pair) -> None:
    alice, bob = pair
    responds: SimpleQueue[Respond] = SimpleQueue()
    bob.serve = lambda source, message, respond: responds.put(respond)
    replies = alice.ask(BOB)
    respond = responds.get(timeout=DEADLINE_S)
    assert alice.agent.get_metrics()["agent.client_active_calls"] == "1"
    assert bob.agent.get_metrics()["agent.server_active_calls"] == "1"
    respond(Return(Pickled()).to_message())
    assert isinstance(reply(replies), Return)
    with pytest.raises(RpcError, match="answered twice"):
        respond(Ack().to_message())
    assert bob.agent.get_metrics()["agent.server_active_calls"] == "0"


def test_a_call_without_an_answer_ends_with_its_deadline_and_the_late_answer_is_counted(pair: Pair) -> None:
    alice, bob = pair
    responds: SimpleQueue[Respond] = SimpleQueue()
    bob.serve = lambda source, message, respond: responds.put(respond)
    error = reply(alice.ask(BOB, timeout=1e-3))
    assert isinstance(error, RpcTimeoutError)
    respond = responds.get(timeout=DEADLINE_S)
    bob.serve = bob.echo
    respond(Ack().to_message())
    while alice.agent.get_metrics()["agent.late_replies"] == "0":
        assert isinstance(reply(alice.ask(BOB)), Return)


def test_the_default_timeout_is_the_one_that_was_set_last(pair: Pair) -> None:
    alice, bob = pair
    bob.serve = lambda source, message, respond: None
    alice.agent.set_rpc_timeout(1e-3)
    assert alice.agent.get_rpc_timeout() == 1e-3
    assert isinstance(reply(alice.ask(BOB, timeout=-1.0)), RpcTimeoutError)


def test_ctrl_c_fails_the_calls_under_way(pair: Pair) -> None:
    alice, bob = pair
    bob.serve = lambda source, message, respond: None
    replies = alice.ask(BOB)
    alice.agent._exchange.interrupt()
    assert isinstance(reply(replies), InterruptedCallError)


def test_a_callback_that_raises_keeps_nobody_from_their_answers(pair: Pair, caplog: pytest.LogCaptureFixture) -> None:
    alice, bob = pair

    def fail(answer: Reply) -> None:
        raise ValueError("a defect")

    alice.agent.request(BOB, PythonCall(Pickled(), False).to_message(), fail)
    assert isinstance(reply(alice.ask(BOB)), Return)
    together(alice.agent.join, bob.agent.join)
    assert "a callback of worker worker0 failed" in caplog.text


def test_shutdown_fails_the_calls_for_which_functions_that_still_run_wait(pair: Pair) -> None:
    """The functions wait for calls without a timeout, and shutdown waits for the functions."""
    alice, bob = pair
    got: SimpleQueue[Reply] = SimpleQueue()
    nested = threading.Event()

    def wait_for_alice(source: WorkerId, message: Message, respond: Respond) -> None:
        replies = bob.ask(ALICE)
        nested.set()
        got.put(reply(replies))

    alice.serve = lambda source, message, respond: None
    bob.serve = wait_for_alice
    alice.ask(BOB)
    assert nested.wait(DEADLINE_S)
    bob.agent.shutdown()
    error = got.get_nowait()
    assert isinstance(error, ShutdownError)
    assert "worker worker1 shut down" in str(error)


def test_shutdown_leaves_a_function_behind_that_blocks_on_something_else(
    pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqagent.agent.agent._PATIENCE_WITHOUT_JOIN", 0.01)
    alice, bob = pair
    blocked, release = threading.Event(), threading.Event()
    refused: SimpleQueue[RpcError] = SimpleQueue()

    def block(source: WorkerId, message: Message, respond: Respond) -> None:
        blocked.set()
        assert release.wait(DEADLINE_S)
        try:
            bob.ask(ALICE)
        except RpcError as error:
            refused.put(error)
        respond(Ack().to_message())

    bob.serve = block
    replies = alice.ask(BOB)
    assert blocked.wait(DEADLINE_S)
    bob.agent.shutdown()
    assert isinstance(reply(replies), WorkerLostError)
    assert "in block" in caplog.messages[-1]
    release.set()
    assert isinstance(refused.get(timeout=DEADLINE_S), ShutdownError)
    assert bob.agent._executor.join(DEADLINE_S)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_join_does_not_wait_for_a_request_that_is_never_answered_once_its_caller_has_given_up(pair: Pair) -> None:
    alice, bob = pair
    served = threading.Event()
    bob.serve = lambda source, message, respond: served.set()
    assert isinstance(reply(alice.ask(BOB, timeout=1e-3)), RpcTimeoutError)
    assert served.wait(DEADLINE_S)
    together(alice.agent.join, bob.agent.join)
    assert bob.agent.get_metrics()["agent.server_active_calls"] == "1"


def test_a_join_that_takes_long_says_what_it_waits_for(
    pair: Pair, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zmqagent.agent.agent.REPORT_EVERY", 1e-3)
    alice, bob = pair
    blocked, release = threading.Event(), threading.Event()

    def block(source: WorkerId, message: Message, respond: Respond) -> None:
        blocked.set()
        assert release.wait(DEADLINE_S)
        respond(Ack().to_message())

    bob.serve = block
    alice.ask(BOB)
    assert blocked.wait(DEADLINE_S)
    with ThreadPoolExecutor(2) as threads:
        joins = [threads.submit(node.agent.join) for node in pair]
        callers = "worker worker0 waits for the group: 1 of its own calls and 0 that it serves are under way"
        callees = "worker worker1 waits for the group: 0 of its own calls and 1 that it serves are under way"
        while not any(callers in text for text in caplog.messages):
            release.wait(1e-3)
        while not any(callees in text and "in block" in text for text in caplog.messages):
            release.wait(1e-3)
        release.set()
        for joined in joins:
            joined.result(DEADLINE_S)


def test_who_shuts_down_fails_the_calls_to_it_and_is_told_of_as_lost(pair: Pair) -> None:
    alice, bob = pair
    served = threading.Event()
    bob.serve = lambda source, message, respond: served.set()
    replies = alice.ask(BOB)
    assert served.wait(DEADLINE_S)
    bob.agent.shutdown()
    error = reply(replies)
    assert isinstance(error, WorkerLostError)
    assert "worker1" in str(error)
    worker_id, reason = alice.lost.get(timeout=DEADLINE_S)
    assert worker_id == BOB
    assert isinstance(reason, WorkerLostError)
    with pytest.raises(WorkerLostError):
        alice.ask(BOB)
    assert alice.agent.get_debug_info()["agent.member.worker1"] == "left"


def test_after_a_last_join_a_goodbye_is_no_loss(pair: Pair) -> None:
    alice, bob = pair
    together(lambda: alice.agent.join(shutdown=True), lambda: bob.agent.join(shutdown=True))
    bob.agent.shutdown()
    while alice.agent.get_debug_info()["agent.member.worker1"] != "left":
        assert isinstance(reply(alice.ask(ALICE)), Return)
    alice.agent.shutdown()
    assert alice.lost.empty()


def test_join_waits_for_a_call_under_way_and_says_when_it_ran_out_of_time(pair: Pair) -> None:
    alice, bob = pair
    bob.serve = lambda source, message, respond: None
    alice.ask(BOB)
    with pytest.raises(RpcTimeoutError, match=r"waited 0.001 s for its calls to end, and 1 of its own and 0 that it serves"):
        alice.agent.join(timeout=1e-3)


@pytest.mark.parametrize("waiting", [ALICE, BOB], ids=["leader", "follower"])
def test_a_barrier_to_which_one_does_not_come_ends_with_its_deadline(pair: Pair, waiting: WorkerId) -> None:
    with pytest.raises(RpcTimeoutError, match="in vain for all workers"):
        pair[waiting].agent.join(timeout=1e-3)


@pytest.mark.parametrize("waiting", [ALICE, BOB], ids=["leader", "follower"])
def test_shutdown_ends_a_wait_at_a_barrier(pair: Pair, waiting: WorkerId) -> None:
    agent = pair[waiting].agent
    with ThreadPoolExecutor(1) as thread:
        waits = thread.submit(agent.sync)
        agent.shutdown()
        assert isinstance(waits.exception(DEADLINE_S), RpcError)


def test_sync_lets_all_through_when_all_have_come(pair: Pair) -> None:
    passed: list[int] = []
    for turn in range(3):

        def meet(node: Node, turn: int = turn) -> None:
            node.agent.sync()
            passed.append(turn)

        together(*[partial(meet, node) for node in pair])
    assert passed == [0, 0, 1, 1, 2, 2]


def test_after_shutdown_nothing_is_sent_and_a_second_one_does_nothing(pair: Pair) -> None:
    alice, _ = pair
    alice.agent.shutdown()
    alice.agent.shutdown()
    with pytest.raises(ShutdownError, match="worker0 has shut down"):
        alice.ask(BOB)


def test_a_function_that_it_serves_may_shut_it_down(pair: Pair) -> None:
    alice, bob = pair
    ended = threading.Event()

    def serve(source: WorkerId, message: Message, respond: Respond) -> None:
        bob.agent.shutdown()
        ended.set()

    bob.serve = serve
    replies = alice.ask(BOB)
    assert ended.wait(DEADLINE_S)
    assert isinstance(reply(replies), WorkerLostError)


def test_members_are_found_by_name_id_and_info(pair: Pair) -> None:
    agent = pair[0].agent
    assert agent.get_worker_info().name == "worker0"
    info = agent.get_worker_info("worker1")
    assert (info.name, info.id) == ("worker1", 1)
    assert agent.get_worker_info(1).name == "worker1"
    assert agent.get_worker_info(info) is info
    assert [info.id for info in agent.get_worker_infos()] == [0, 1]
    assert agent.worker_name(WorkerId(7)) == "<unknown worker 7>"
    assert agent.worker_id == ALICE
    assert "'worker0' (0)" in repr(agent)
    with pytest.raises(UnknownWorkerError, match="worker2"):
        agent.get_worker_info("worker2")
    for wrong in (True, 1.5):
        with pytest.raises(InvalidTypeError):
            agent.get_worker_info(wrong)  # type: ignore[arg-type]


def test_the_wait_for_the_interpreter_s_lock_is_measured_when_asked_for(pair: Pair) -> None:
    alice, bob = pair
    name = "agent.gil_average_wait_time_us"
    reply(alice.ask(BOB))
    assert name not in bob.agent.get_metrics()
    bob.agent.enable_gil_profiling(True)
    assert float(bob.agent.get_metrics()[name]) == 0
    reply(alice.ask(BOB))
    assert float(bob.agent.get_metrics()[name]) > 0
