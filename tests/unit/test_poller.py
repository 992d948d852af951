"""`zmqagent.transport.poller`: each descriptor goes to one thread at a time, and back to all when that has done with it."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest

from zmqagent.transport import poller as module
from zmqagent.transport.base import Event, Received
from zmqagent.transport.poller import Epoll, Poller, Source, Turns

DEADLINE_S = 30.0


@pytest.fixture(params=[Epoll, Turns])
def poller(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Poller]:
    monkeypatch.setattr(module, "READINESS", request.param)
    made = Poller()
    yield made
    made.close()


class Line:
    """A connection whose bytes arrive as one event each."""

    def __init__(self) -> None:
        self.far, self.near = socket.socketpair()
        self.near.setblocking(False)
        self.source = Source(self.near.fileno(), self.read)

    def read(self) -> Sequence[Event]:
        return [Received((self.near.recv(1),))]

    def close(self) -> None:
        self.far.close()
        self.near.close()


@pytest.fixture
def line(poller: Poller) -> Iterator[Line]:
    made = Line()
    poller.add(made.source)
    yield made
    poller.remove(made.source)
    made.close()


def elsewhere(poller: Poller, timeout: float | None) -> Sequence[Event] | None:
    """What another thread gets."""
    with ThreadPoolExecutor(1) as other:
        return other.submit(poller.wait, timeout).result(DEADLINE_S)


def test_what_arrives_wakes_one_of_those_who_wait(poller: Poller, line: Line) -> None:
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(poller.wait, DEADLINE_S) for _ in range(3)]
        line.far.send(b"ab")
        while not any(each.done() for each in waiting):
            threading.Event().wait(0.001)
        (first,) = [each.result() for each in waiting if each.done()]
        assert first == [Received((b"a",))]
        poller.close()
        assert sorted(map(str, (each.result(DEADLINE_S) for each in waiting))) == ["None", "None", str(first)]


def test_a_source_is_its_handlers_until_that_waits_again(poller: Poller, line: Line) -> None:
    line.far.send(b"abc")
    assert poller.wait(DEADLINE_S) == [Received((b"a",))]
    assert elsewhere(poller, 0.0) == ()
    assert poller.wait(DEADLINE_S) == [Received((b"b",))]


def test_a_source_that_was_let_go_is_anybodys(poller: Poller, line: Line) -> None:
    line.far.send(b"abc")
    assert poller.wait(DEADLINE_S) == [Received((b"a",))]
    poller.let_go()
    assert elsewhere(poller, DEADLINE_S) == [Received((b"b",))]


def test_a_source_is_not_kept_for_longer_than_it_may_be(poller: Poller, line: Line) -> None:
    line.far.send(b"abc")
    assert poller.wait(DEADLINE_S) == [Received((b"a",))]
    assert poller.let_go_overdue(since=0.0)
    assert elsewhere(poller, 0.0) == ()
    assert not poller.let_go_overdue(since=float("inf"))
    assert elsewhere(poller, DEADLINE_S) == [Received((b"b",))]


class Burst(Line):
    """Whose bytes arrive two at a time, as an event each."""

    def read(self) -> Sequence[Event]:
        return [Received((bytes([byte]),)) for byte in self.near.recv(2)]


@pytest.mark.parametrize("way", ["wait", "let_go", "let_go_overdue"])
def test_what_is_left_for_the_end_of_several_events_is_done_however_that_comes(poller: Poller, way: str) -> None:
    line = Burst()
    poller.add(line.source)
    line.far.send(b"abc")
    done: list[int] = []
    assert not poller.at_end_of_several(lambda: done.append(0))
    assert len(poller.wait(DEADLINE_S) or ()) == 2
    end = lambda: done.append(1)  # noqa: E731 - the same object twice
    assert poller.at_end_of_several(end)
    assert poller.at_end_of_several(end)
    assert done == []
    {
        "wait": lambda: poller.wait(DEADLINE_S),
        "let_go": poller.let_go,
        "let_go_overdue": lambda: poller.let_go_overdue(float("inf")),
    }[way]()
    assert done == [1]
    # One event alone is answered at once.
    if way != "wait":
        assert len(poller.wait(DEADLINE_S) or ()) == 1
    assert not poller.at_end_of_several(end)
    poller.remove(line.source)
    line.close()


def test_the_thread_that_was_woken_does_not_keep_the_wakings_from_others(poller: Poller) -> None:
    for _ in range(3):
        poller.wake()
        assert elsewhere(poller, DEADLINE_S) is None


def test_a_source_that_was_removed_is_handled_no_more(poller: Poller, line: Line) -> None:
    line.far.send(b"ab")
    assert poller.wait(DEADLINE_S) == [Received((b"a",))]
    poller.remove(line.source)
    poller.remove(line.source)
    assert poller.wait(0.0) == ()


def test_closing_ends_every_wait_now_and_later(poller: Poller) -> None:
    with ThreadPoolExecutor(4) as pool:
        waiting = [pool.submit(poller.wait, None) for _ in range(4)]
        poller.close()
        assert [each.result(DEADLINE_S) for each in waiting] == [None] * 4
    assert poller.wait(None) is None
    poller.close()
