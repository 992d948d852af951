"""The network in memory: what it promises, what its faults do, and that a seed decides everything."""

from __future__ import annotations

import doctest
from collections import Counter

import pytest

from zmqagent.exceptions import InvalidTypeError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport import inproc
from zmqagent.transport.base import PeerDown, PeerUp, Received
from zmqagent.transport.inproc import Faults, InprocTransport, Network, record
from zmqagent.wire.types import WorkerId

A, B, C = WorkerId(0), WorkerId(1), WorkerId(2)


def group(network: Network, size: int = 2) -> list[InprocTransport]:
    """Transports that know each other, their greetings read."""
    transports = [network.transport(record(number)) for number in range(size)]
    for transport in transports:
        for other in transports:
            transport.connect(other.record)
    for transport in transports:
        for _ in range(size - 1):
            (event,) = transport.receive(0)
            assert isinstance(event, PeerUp)
    return transports


def received(transport: InprocTransport) -> list[bytes]:
    """The first frames of all that ever arrives."""
    frames = []
    while events := transport.receive(None):
        (event,) = events
        assert isinstance(event, Received)
        frames.append(bytes(event.frames[0]))
    return frames


def test_frames_arrive_whole_and_are_the_receivers_own() -> None:
    a, b = group(Network(seed=0))
    frame = bytearray(b"hello")
    a.send(B, [frame, b"", memoryview(b"world")])
    frame[:] = b"later"
    assert b.receive(1.0) == (Received((b"hello", b"", b"world")),)


def test_a_worker_can_send_to_itself() -> None:
    a, _ = group(Network(seed=0))
    a.send(A, [b"note"])
    assert received(a) == [b"note"]


def test_addresses_are_those_of_the_record() -> None:
    a, _ = group(Network(seed=0))
    assert a.addresses == a.record.addresses == ("inproc://0/0",)


def test_waiting_moves_the_clock() -> None:
    network = Network(seed=0, faults=Faults(min_delay=2.0, max_delay=2.0))
    a, b = group(network)
    a.send(B, [b"slow"])
    assert not b.receive(0.5)
    assert network.now == 0.5
    (event,) = b.receive(10.0)
    assert isinstance(event, Received)
    assert network.now == 2.0


def test_a_wait_that_nothing_can_end_returns_at_once() -> None:
    network = Network(seed=0)
    a, _ = group(network)
    assert not a.receive(None)
    assert network.now == 0.0
    assert not a.receive(3600.0)
    assert network.now == 3600.0


def test_time_passes_by_steps_too() -> None:
    network = Network(seed=0)
    seen: list[float] = []
    for seconds in (3.0, 1.0, 2.0):
        network.call_later(seconds, lambda: seen.append(network.now))
    assert network.next_due() == 1.0
    network.advance(2.5)
    assert (seen, network.now) == ([1.0, 2.0], 2.5)
    assert network.step()
    assert not network.step()
    assert (seen, network.now) == ([1.0, 2.0, 3.0], 3.0)
    assert network.next_due() is None


def test_a_link_keeps_its_order_unless_told_otherwise() -> None:
    sent = [bytes([n]) for n in range(50)]
    orders = []
    for reorder in (0.0, 1.0):
        a, b = group(Network(seed=1, faults=Faults(reorder=reorder)))
        for frame in sent:
            a.send(B, [frame])
        orders.append(received(b))
    assert orders[0] == sent
    assert orders[1] != sent
    assert sorted(orders[1]) == sent


def test_messages_are_lost_and_copied_as_often_as_told() -> None:
    a, b = group(Network(seed=2, faults=Faults(drop=0.3, duplicate=0.3)))
    for n in range(1000):
        a.send(B, [n.to_bytes(2, "big")])
    times = Counter(Counter(received(b)).values())
    assert 130 < times[2] < 170, "seed 2: two copies, neither lost: 0.3 * 0.7 * 0.7"
    assert 180 < 1000 - times[1] - times[2] < 280, "seed 2: none left: 0.7 * 0.3 + 0.3 * 0.3 * 0.3"


def test_the_same_seed_gives_the_same_events() -> None:
    def run(seed: int) -> list[bytes]:
        a, b = group(Network(seed, Faults(drop=0.2, duplicate=0.2, reorder=0.5)))
        for n in range(100):
            a.send(B, [bytes([n])])
        return received(b)

    assert run(3) == run(3)
    assert run(3) != run(4)


def test_a_cut_loses_all_until_it_is_healed() -> None:
    network = Network(seed=0)
    a, b, c = group(network, 3)
    network.cut(B, A)
    a.send(B, [b"lost"])
    a.send(C, [b"kept"])
    network.heal()
    a.send(B, [b"after"])
    assert received(b) == [b"after"]
    assert received(c) == [b"kept"]


def test_a_death_is_reported_after_all_that_the_dead_sent() -> None:
    network = Network(seed=0)
    a, b = group(network)
    a.send(B, [b"last words"])
    network.kill(A, "killed")
    assert b.receive(1.0) == (Received((b"last words",)),)
    assert b.receive(1.0) == (PeerDown(A, 0, "killed"),)
    with pytest.raises(WorkerLostError, match="worker0 is gone: killed"):
        b.send(A, [b"hello?"])
    with pytest.raises(ShutdownError):
        a.send(B, [b"from beyond"])
    assert not a.receive(1.0)


def test_nothing_comes_from_the_dead_once_they_are_declared_dead() -> None:
    network = Network(seed=0, faults=Faults(min_delay=5.0, max_delay=5.0, reorder=1.0))
    a, b = group(network)
    a.send(B, [b"slow"])
    network.faults = Faults(max_delay=0.01)
    network.kill(A)
    assert b.receive(1.0) == (PeerDown(A, 0, "killed"),)
    assert received(b) == []


def test_what_is_under_way_to_the_dead_is_lost() -> None:
    network = Network(seed=0)
    a, _ = group(network)
    a.send(B, [b"too late"])
    network.kill(B)
    assert a.receive(1.0) == (PeerDown(B, 0, "killed"),)


def test_a_closed_transport_is_gone_for_its_peers() -> None:
    a, b = group(Network(seed=0))
    a.close()
    a.close()
    assert b.receive(1.0) == (PeerDown(A, 0, "closed its transport"),)


def test_a_new_incarnation_is_another_peer() -> None:
    network = Network(seed=0)
    a, b = group(network)
    a.send(B, [b"from the old one"])
    network.kill(A)
    again = network.transport(record(0, incarnation=1))
    again.connect(b.record)
    b.connect(again.record)
    assert b.receive(0) == (PeerUp(A, 1),)
    again.send(B, [b"from the new one"])
    b.send(A, [b"to the new one"])
    assert received(b) == [b"from the new one"]
    assert again.receive(0) == (PeerUp(B, 0),)
    assert received(again) == [b"to the new one"]


def test_a_peer_may_come_after_it_was_connected_to() -> None:
    network = Network(seed=0)
    a = network.transport(record(0))
    a.connect(record(1))
    assert not a.receive(1.0)
    network.transport(record(1))
    assert a.receive(1.0) == (PeerUp(B, 0),)


def test_a_worker_has_one_place_on_the_network() -> None:
    network = Network(seed=0)
    network.transport(record(0))
    with pytest.raises(ValueError, match="worker0, incarnation 0, is on this network already"):
        network.transport(record(0))


def test_disconnecting_a_former_incarnation_leaves_the_newer_one() -> None:
    a, b = group(Network(seed=0))
    a.disconnect(B, b.record.incarnation + 1)
    a.send(B, [b"still there"])
    assert received(b) == [b"still there"]


def test_only_peers_can_be_sent_to() -> None:
    a, b = group(Network(seed=0))
    with pytest.raises(UnknownWorkerError, match="worker0 is not connected to worker 7"):
        a.send(WorkerId(7), [b"x"])
    a.send(B, [b"accepted"])
    a.disconnect(B, b.record.incarnation)
    a.disconnect(B, b.record.incarnation)
    with pytest.raises(UnknownWorkerError):
        a.send(B, [b"x"])
    assert received(b) == [b"accepted"]
    b.send(A, [b"from a stranger"])
    assert received(a) == [b"from a stranger"]


@pytest.mark.parametrize("frames", [[], [b"x", "text"], [memoryview(b"abcd")[::2]]])
def test_a_message_is_made_of_contiguous_buffers(frames: list[object]) -> None:
    a, _ = group(Network(seed=0))
    with pytest.raises(InvalidTypeError):
        a.send(B, frames)


def test_waking_ends_one_wait() -> None:
    a, b = group(Network(seed=0))
    b.send(A, [b"message"])
    a.wake()
    a.wake()
    assert not a.receive(None)
    (event,) = a.receive(None)
    assert isinstance(event, Received)


def test_the_example_in_the_docstring_holds() -> None:
    assert doctest.testmod(inproc, extraglobs={"WorkerId": WorkerId}).failed == 0
