"""When a death may be told: after what the dead had still sent, but not never."""

from __future__ import annotations

import selectors
import subprocess
import sys
from collections.abc import Iterator

import pytest
import zmq

from zmqagent.transport.base import PeerDown, PeerRecord, PeerUp
from zmqagent.transport.liveness import LAST_WORDS, SETTLE, Liveness
from zmqagent.wire.types import WorkerId


@pytest.fixture
def dead() -> PeerRecord:
    with subprocess.Popen([sys.executable, "-c", ""]) as process:
        process.wait()
    return PeerRecord("w", WorkerId(1), 5, "here", process.pid, ())


@pytest.fixture
def liveness() -> Iterator[Liveness]:
    with zmq.Context() as context, selectors.DefaultSelector() as selector:
        made = Liveness(context, selector, "here")
        yield made
        made.close()


def test_a_death_is_told_once_all_is_received_and_time_was_given_to_receive(liveness: Liveness, dead: PeerRecord) -> None:
    liveness.watch(dead, 10.0)
    assert liveness.next_event(10.0, drained=True) is None
    assert liveness.next_check() == 10.0 + SETTLE
    assert liveness.next_event(10.0 + SETTLE, drained=False) is None
    assert isinstance(liveness.next_event(10.0 + SETTLE, drained=True), PeerDown)
    assert liveness.next_event(99.0, drained=True) is None
    assert liveness.next_check() is None


def test_a_death_is_told_in_the_end_though_messages_never_cease(liveness: Liveness, dead: PeerRecord) -> None:
    liveness.watch(dead, 10.0)
    assert liveness.next_event(10.0, drained=False) is None
    assert liveness.next_event(10.0 + 0.9 * LAST_WORDS, drained=False) is None
    assert isinstance(liveness.next_event(10.0 + LAST_WORDS, drained=False), PeerDown)


def test_what_was_found_of_a_forgotten_peer_is_not_told(liveness: Liveness, dead: PeerRecord) -> None:
    liveness.watch(dead, 10.0)
    liveness.forget(dead.worker_id)
    assert liveness.next_event(99.0, drained=True) is None
    liveness.watch(dead, 10.0)
    assert liveness.next_event(10.0, drained=True) is None
    liveness.forget(dead.worker_id)
    assert liveness.next_event(99.0, drained=True) is None


def test_good_news_is_told_at_once(liveness: Liveness, dead: PeerRecord) -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        alive = PeerRecord("w", WorkerId(2), 6, "here", process.pid, ())
        liveness.watch(dead, 10.0)
        liveness.watch(alive, 10.0)
        assert liveness.next_event(10.0, drained=False) == PeerUp(WorkerId(2), 6)
        process.kill()
