from __future__ import annotations

import threading
from typing import Any

import pytest

from zmqagent.agent.base import OnReply
from zmqagent.autograd import cleanup
from zmqagent.autograd.cleanup import GatheredCleanups
from zmqagent.exceptions import UnknownWorkerError
from zmqagent.wire.commands import CleanupContexts, parse
from zmqagent.wire.types import Message, WorkerId

ONE, TWO, GONE = WorkerId(1), WorkerId(2), WorkerId(3)


class Requester:
    """Keeps what is sent; one worker has gone."""

    worker_id = WorkerId(0)

    def __init__(self) -> None:
        self.sent: list[tuple[WorkerId, tuple[int, ...]]] = []

    def request(self, to: WorkerId, message: Message, on_reply: OnReply, **how: Any) -> None:
        assert how == {"retry": True}
        if to == GONE:
            raise UnknownWorkerError("no such worker")
        command = parse(message)
        assert isinstance(command, CleanupContexts)
        self.sent.append((to, command.context_ids))


@pytest.fixture
def gathered(monkeypatch: pytest.MonkeyPatch) -> threading.Event:
    """Set once all is told that is to be gathered."""
    event = threading.Event()
    monkeypatch.setattr(cleanup.time, "sleep", lambda seconds: event.wait(30))
    return event


def test_contexts_that_end_shortly_after_one_another_are_told_together(gathered: threading.Event) -> None:
    requester = Requester()
    cleanups = GatheredCleanups(requester)  # type: ignore[arg-type]
    for context_id in range(100):
        cleanups.tell({ONE, TWO} if context_id % 2 else {ONE}, context_id)
    assert not requester.sent
    gathered.set()
    cleanups.close()
    assert dict(requester.sent) == {ONE: tuple(range(100)), TWO: tuple(range(1, 100, 2))}
    assert len(requester.sent) == 2


def test_a_message_has_its_limit(gathered: threading.Event) -> None:
    requester = Requester()
    cleanups = GatheredCleanups(requester)  # type: ignore[arg-type]
    for context_id in range(600):
        cleanups.tell({ONE}, context_id)
    gathered.set()
    cleanups.close()
    assert [len(context_ids) for _, context_ids in requester.sent] == [256, 256, 88]


def test_a_worker_that_has_gone_keeps_no_other_from_being_told(gathered: threading.Event) -> None:
    requester = Requester()
    cleanups = GatheredCleanups(requester)  # type: ignore[arg-type]
    cleanups.tell([GONE, ONE], 7)
    gathered.set()
    cleanups.close()
    assert requester.sent == [(ONE, (7,))]


def test_closing_ends_the_thread_and_none_begins_after_that(gathered: threading.Event) -> None:
    gathered.set()
    cleanups = GatheredCleanups(Requester())  # type: ignore[arg-type]
    cleanups.tell({ONE}, 1)
    thread = cleanups._thread
    assert thread is not None
    cleanups.close()
    assert not thread.is_alive()
    late = GatheredCleanups(Requester())  # type: ignore[arg-type]
    late.close()
    late.tell({ONE}, 2)
    assert late._thread is None
