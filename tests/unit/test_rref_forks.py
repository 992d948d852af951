"""The scopes in which RRefs are pickled and unpickled."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from zmqagent.rref.events import MintedFork
from zmqagent.rref.forks import (
    Forks,
    PendingUsers,
    current_forks,
    current_pending,
    receive_rref,
    unpack_fork,
)
from zmqagent.wire.types import ForkId, RRefId, WorkerId

FORK = MintedFork(RRefId(0, 1), ForkId(0, 2))
DATA = (3, 0, 1, 0, 2, 4, "PyObject")


class Settled:
    """What a scope reports."""

    def __init__(self) -> None:
        self.reports: list[tuple[tuple[MintedFork, ...], WorkerId | None]] = []

    def __call__(self, forks: tuple[MintedFork, ...], to: WorkerId | None) -> None:
        self.reports.append((forks, to))


def test_a_share_is_packed_in_torchs_order() -> None:
    assert unpack_fork(DATA) == (3, RRefId(0, 1), ForkId(0, 2), 4)


def test_the_innermost_scope_is_the_one_of_the_thread() -> None:
    assert current_forks() is None
    with Forks(Settled()) as outer:
        with Forks(Settled()) as inner:
            assert current_forks() is inner
        assert current_forks() is outer
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(current_forks()))
        thread.start()
        thread.join()
        assert seen == [None]
    assert current_forks() is None


def test_forks_are_reported_sent_once() -> None:
    settled = Settled()
    with Forks(settled) as forks:
        forks.shares.append(DATA)
    assert settled.reports == []
    forks.sent_to(WorkerId(5))
    forks.sent_to(WorkerId(6))
    assert settled.reports == [((FORK,), 5)]


def test_forks_of_a_message_that_its_receiver_could_not_unpickle_are_cancelled_after_it_was_sent() -> None:
    settled = Settled()
    with Forks(settled) as forks:
        forks.shares.append(DATA)
    forks.sent_to(WorkerId(5))
    forks.cancel()
    forks.cancel()
    assert settled.reports == [((FORK,), 5), ((FORK,), None)]


def test_what_was_cancelled_is_not_sent() -> None:
    settled = Settled()
    with Forks(settled) as forks:
        forks.shares.append(DATA)
    forks.cancel()
    forks.sent_to(WorkerId(5))
    assert settled.reports == [((FORK,), None)]
    assert len(forks) == 0


def test_a_message_without_rrefs_reports_nothing() -> None:
    settled = Settled()
    with Forks(settled) as forks:
        pass
    forks.sent_to(WorkerId(5))
    forks.cancel()
    assert settled.reports == []


def test_pickling_that_fails_cancels_its_forks() -> None:
    settled = Settled()

    def pickle_something_bad() -> None:
        with Forks(settled) as forks:
            forks.shares.append(DATA)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        pickle_something_bad()
    assert settled.reports == [((FORK,), None)]
    assert current_forks() is None


def test_an_rref_is_rebuilt_in_the_scope_that_unpickles() -> None:
    received: list[Any] = []
    pending = PendingUsers(received.append)
    with pending as inside:
        assert inside is pending
        assert current_pending() is pending
        receive_rref(DATA)
    assert received == [DATA]
    assert current_pending() is None


def test_outside_of_a_scope_torchs_own_entry_rebuilds_it(monkeypatch: pytest.MonkeyPatch) -> None:
    received: list[Any] = []

    class Stand:
        _deserialize = staticmethod(received.append)

    monkeypatch.setattr("zmqagent.rref.forks.PyRRef", Stand)
    receive_rref(DATA)
    assert received == [DATA]
