"""`zmqagent.agent.admission`: agents of one process join, refuse, leave and come back, at a store that they share."""

from __future__ import annotations

import dataclasses
import itertools
import threading
from collections.abc import Iterator
from queue import SimpleQueue
from typing import Any

import pytest
import torch.distributed as dist

from zmqagent.agent.agent import ZmqRpcAgent
from zmqagent.agent.base import Reply, Respond
from zmqagent.agent.devices import DeviceMap, Target
from zmqagent.agent.membership_events import MemberState
from zmqagent.agent.roster import Roster
from zmqagent.exceptions import InvalidOptionError, RendezvousError, RpcError, RpcTimeoutError, WorkerLostError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.transport.base import PeerRecord
from zmqagent.transport.hosts import describe_self
from zmqagent.transport.sockets import SocketTransport
from zmqagent.wire.commands import Join, Pickled, PythonCall, Return
from zmqagent.wire.types import Message, WorkerId

DEADLINE_S = 30.0
incarnations = itertools.count(1)


class Node:
    """One worker of a dynamic group."""

    def __init__(self, store: dist.Store, worker_id: int) -> None:
        incarnation = next(incarnations)
        transport = SocketTransport(ipc=True, tcp_host=None, incarnation=incarnation)
        roster = Roster(store, DEADLINE_S, lambda peer: False)
        newcomer = describe_self(f"worker-{worker_id}", WorkerId(worker_id), incarnation, transport.addresses)
        self.record, self.others = roster.enter(newcomer)
        self.agent = ZmqRpcAgent(self.record, transport, ZmqRpcBackendOptions(num_worker_threads=2), roster=roster)
        self.heard: SimpleQueue[str] = SimpleQueue()
        self.entered, self.released = threading.Event(), threading.Event()

    def serve(self, source: WorkerId, message: Message, respond: Respond) -> None:
        if message.payload == b"block":
            self.entered.set()
            assert self.released.wait(DEADLINE_S)
        respond(Return(Pickled(b"served")).to_message())

    def start(self) -> None:
        self.agent.enter(self.others)
        self.agent.start(
            self.serve,
            lambda worker_id, error: self.heard.put(f"-{worker_id}"),
            lambda answer: None,
            on_worker_joined=lambda worker_id: self.heard.put(f"+{worker_id}"),
        )

    def ask(self, to: Node, payload: bytes = b"") -> SimpleQueue[Reply]:
        replies: SimpleQueue[Reply] = SimpleQueue()
        message = PythonCall(Pickled(payload), False).to_message()
        self.agent.request(to.record.worker_id, message, replies.put, timeout=DEADLINE_S)
        return replies

    def names(self) -> list[str]:
        return [info.name for info in self.agent.get_worker_infos()]


class Town:
    """Where nodes come and go."""

    def __init__(self) -> None:
        self.store = dist.HashStore()
        self.nodes: list[Node] = []

    def come(self, worker_id: int) -> Node:
        node = Node(self.store, worker_id)
        self.nodes.append(node)
        node.start()
        node.agent.announce(DEADLINE_S)
        return node


@pytest.fixture
def town() -> Iterator[Town]:
    before = set(threading.enumerate())
    town = Town()
    yield town
    for node in town.nodes:
        node.released.set()
        node.agent.shutdown()
    assert set(threading.enumerate()) <= before


def value(replies: SimpleQueue[Reply]) -> Any:
    reply = replies.get(timeout=DEADLINE_S)
    return bytes(reply.body.payload) if isinstance(reply, Return) else reply


def test_when_a_join_is_over_everyone_has_heard_of_it(town: Town) -> None:
    first, second = town.come(0), town.come(1)
    assert first.heard.get_nowait() == "+1"
    assert first.names() == second.names() == ["worker-0", "worker-1"]
    assert second.heard.empty()
    assert not first.agent.is_static_group
    assert value(first.ask(second)) == value(second.ask(first)) == b"served"


def test_a_newcomer_waits_for_one_that_is_still_joining_and_not_the_other_way_round(town: Town) -> None:
    first = Node(town.store, 0)
    town.nodes.append(first)
    second = Node(town.store, 1)
    town.nodes.append(second)
    second.start()
    joined = threading.Event()
    joining = threading.Thread(target=lambda: (second.agent.announce(DEADLINE_S), joined.set()))
    joining.start()
    first.start()
    first.agent.announce(DEADLINE_S)
    assert joined.wait(DEADLINE_S)
    joining.join()
    assert first.heard.get(timeout=DEADLINE_S) == "+1"


def test_who_leaves_refuses_what_is_new_and_ends_what_has_begun(town: Town) -> None:
    first, second = town.come(0), town.come(1)
    under_way = second.ask(first, b"block")
    assert first.entered.wait(DEADLINE_S)
    first.agent.refuse_calls()
    refused = value(second.ask(first))
    assert isinstance(refused, WorkerLostError)
    assert "worker 'worker-0' (0) is leaving the group and takes no more calls" in str(refused)
    assert value(first.ask(first)) == b"served"
    with pytest.raises(RpcTimeoutError, match="0 of its own and 1 that it serves are still under way"):
        first.agent.join(shutdown=True, timeout=0.01)
    first.released.set()
    first.agent.join(shutdown=True, timeout=DEADLINE_S)
    assert value(under_way) == b"served"
    # Known when `join` returns.
    assert second.names() == ["worker-1"]
    with pytest.raises(WorkerLostError, match=r"worker 'worker-0' \(0\) has left the group: it shut down"):
        second.ask(first)


def test_one_that_joined_unheard_is_told_by_one_that_leaves(town: Town) -> None:
    """The newcomer is in the directory and has said nothing yet: it would wait for an answer for ever."""
    first = town.come(0)
    newcomer = Node(town.store, 1)
    town.nodes.append(newcomer)
    first.agent.shutdown()
    newcomer.start()
    newcomer.agent.announce(DEADLINE_S)
    assert newcomer.names() == ["worker-1"]


@pytest.mark.parametrize("how", ["gracefully", "abruptly"])
def test_one_that_comes_back_is_another_member(town: Town, how: str) -> None:
    first, old = town.come(0), town.come(1)
    if how == "gracefully":
        old.agent.join(shutdown=True)
    old.agent.shutdown()
    new = town.come(1)
    assert value(first.ask(new)) == value(new.ask(first)) == b"served"
    assert [first.heard.get(timeout=DEADLINE_S) for _ in range(3)] == ["+1", "-1", "+1"]
    assert first.agent.get_members()[1].record == new.record
    assert new.record.ordinal > old.record.ordinal
    assert first.agent.get_members()[1].state is MemberState.UP


def test_one_that_is_back_before_its_departure_is_carried_out_stays_connected(town: Town) -> None:
    first, old = town.come(0), town.come(1)
    assert old.agent._admission is not None
    old.agent._admission.depart()
    back: list[Node] = []
    # The answer to the departure lets the next life begin, and the old one is disconnected only then.
    first.agent._group.on_goodbye(WorkerId(1), old.record.incarnation, "it shut down", lambda: back.append(town.come(1)))
    assert value(first.ask(back[0])) == value(back[0].ask(first)) == b"served"


def test_a_goodbye_that_is_served_late_is_not_that_of_the_next_life(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    first, old = town.come(0), town.come(1)
    serve = first.agent._farewell.serve
    goodbyes: SimpleQueue[tuple[WorkerId, Message]] = SimpleQueue()
    monkeypatch.setattr(first.agent._farewell, "serve", lambda source, message: goodbyes.put((source, message)))
    old.agent.shutdown()
    goodbye = goodbyes.get(timeout=DEADLINE_S)
    new = town.come(1)
    serve(*goodbye)
    assert first.agent.get_members()[1].state is MemberState.UP
    assert value(first.ask(new)) == b"served"


def test_a_member_that_the_transport_does_not_know_yet_can_be_called(town: Town) -> None:
    first, second = town.come(0), town.come(1)
    first.agent._transport.disconnect(WorkerId(1), second.record.incarnation)
    assert value(first.ask(second)) == b"served"


def test_a_call_that_a_departure_overtakes_says_who_has_left(town: Town, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = town.come(0), town.come(1)
    of_request = first.agent._routes.of_request

    def meanwhile(peer: PeerRecord, device_map: DeviceMap | None) -> Target:
        first.agent._group.on_goodbye(WorkerId(1), peer.incarnation, "it shut down")
        return of_request(peer, device_map)

    monkeypatch.setattr(first.agent._routes, "of_request", meanwhile)
    with pytest.raises(WorkerLostError, match=r"worker 'worker-1' \(1\) has left the group: it shut down"):
        first.ask(second)


def test_in_a_dynamic_group_sync_does_not_wait_for_the_others(town: Town) -> None:
    first, _ = town.come(0), town.come(1)
    first.agent.sync()


def test_a_worker_of_a_static_group_lets_nobody_in(town: Town) -> None:
    """Whoever announces itself there has found it by mistake, or by an error."""
    transport = SocketTransport(ipc=True, tcp_host=None, incarnation=next(incarnations))
    record = describe_self("static", WorkerId(0), transport._incarnation, transport.addresses)
    static = ZmqRpcAgent(record, transport, ZmqRpcBackendOptions())
    newcomer = Node(town.store, 1)
    town.nodes.append(newcomer)
    newcomer.start()
    static.enter([newcomer.record])
    static.start(newcomer.serve, lambda worker_id, error: None, lambda answer: None)
    newcomer.agent._group.join(record)
    try:
        with pytest.raises(RpcError, match="announced itself, but the group of worker 'static' is static"):
            newcomer.agent.announce(DEADLINE_S)
    finally:
        static.shutdown()


def test_a_newcomer_of_an_illegal_name_is_not_taken_in_and_that_is_logged(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    """Such a one cannot be in the directory: it is no worker of this package."""
    first = town.come(0)
    card = {**dataclasses.asdict(first.record), "name": "no name", "worker_id": 5, "incarnation": 99, "ordinal": 9}
    with pytest.raises(InvalidOptionError, match="Worker name must match"):
        first.agent._serve(WorkerId(5), Join(**card).to_message(), lambda message: True)
    assert "worker worker-0 does not take in worker 5: Worker name must match" in caplog.text
    assert first.names() == ["worker-0"]


def test_a_newcomer_that_is_refused_hears_why_and_is_forgotten_when_it_goes(town: Town, caplog: pytest.LogCaptureFixture) -> None:
    first = town.come(0)
    newcomer = Node(town.store, 1)
    town.nodes.append(newcomer)
    newcomer.start()
    admission = newcomer.agent._admission
    assert admission is not None
    admission._me = dataclasses.replace(newcomer.record, name="no name")
    with pytest.raises(RendezvousError, match=r"could not join: .*Worker name must match"):
        newcomer.agent.announce(DEADLINE_S)
    # Its goodbye was answered.
    assert "did not answer to that" not in caplog.text
    assert first.names() == ["worker-0"]
    newcomer.agent.shutdown()
    again = town.come(1)
    assert value(first.ask(again)) == value(again.ask(first)) == b"served"
