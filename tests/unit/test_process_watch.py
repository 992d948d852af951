"""The watch over processes where there are pidfds and where there are none, and the waker beside it."""

from __future__ import annotations

import dataclasses
import os
import select
import selectors
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from zmqagent.transport.base import PeerDown, PeerRecord, PeerUp
from zmqagent.transport.process_watch import POLL_INTERVAL, ProcessWatch, has_ended
from zmqagent.transport.waker import Waker
from zmqagent.wire.types import WorkerId

PEER = WorkerId(1)


@pytest.fixture
def selector() -> Iterator[selectors.BaseSelector]:
    with selectors.DefaultSelector() as made:
        yield made


@pytest.fixture
def child() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        yield process
        process.kill()


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def peer(process: subprocess.Popen[bytes]) -> PeerRecord:
    return PeerRecord("w", PEER, 5, "here", process.pid, ())


UP = PeerUp(PEER, 5)


def down(process: subprocess.Popen[bytes]) -> PeerDown:
    return PeerDown(PEER, 5, f"its process {process.pid} on this host has ended")


def test_an_end_is_told_by_a_descriptor(selector: selectors.BaseSelector, child: subprocess.Popen[bytes]) -> None:
    watch = ProcessWatch(selector)
    watch.add(peer(child), 0.0)
    assert watch.take() == [UP]
    assert watch.next_check() is None
    end(child)
    for key, _ in selector.select(30):
        key.data(1.0)
    assert watch.take() == [down(child)]
    assert not selector.get_map()


def test_a_process_has_ended_once_it_runs_no_more_though_nobody_has_noticed(child: subprocess.Popen[bytes]) -> None:
    assert not has_ended(peer(child))
    child.send_signal(signal.SIGSTOP)
    assert not has_ended(peer(child))
    child.kill()
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    # A zombie has its pid until its parent asks for it.
    assert has_ended(peer(child))
    child.wait()
    assert has_ended(peer(child))


def test_a_later_process_with_the_same_pid_is_another(child: subprocess.Popen[bytes]) -> None:
    assert has_ended(dataclasses.replace(peer(child), started=1))


class TestWithoutPidfd:
    @pytest.fixture(autouse=True, params=["missing", "forbidden"])
    def no_pidfd(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
        def forbidden(_pid: int) -> int:
            raise PermissionError

        if request.param == "missing":
            monkeypatch.delattr(os, "pidfd_open")
        else:
            monkeypatch.setattr(os, "pidfd_open", forbidden)

    def test_a_process_has_ended_once_it_is_gone(self, child: subprocess.Popen[bytes]) -> None:
        assert not has_ended(peer(child))
        end(child)
        assert has_ended(peer(child))

    def test_an_end_is_found_by_looking(self, selector: selectors.BaseSelector, child: subprocess.Popen[bytes]) -> None:
        watch = ProcessWatch(selector)
        watch.add(peer(child), 10.0)
        assert watch.next_check() == 10.0 + POLL_INTERVAL
        end(child)
        watch.check(10.0)
        assert watch.take() == [UP]
        watch.check(10.0 + POLL_INTERVAL)
        assert watch.take() == [down(child)]
        assert watch.next_check() is None

    def test_a_living_process_is_looked_at_again_and_again(
        self, selector: selectors.BaseSelector, child: subprocess.Popen[bytes]
    ) -> None:
        watch = ProcessWatch(selector)
        watch.add(peer(child), 10.0)
        watch.check(11.0)
        assert watch.next_check() == 11.0 + POLL_INTERVAL
        assert watch.take() == [UP]
        watch.close()
        assert watch.next_check() is None

    def test_a_process_of_another_user_counts_as_alive(
        self, selector: selectors.BaseSelector, child: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def kill(_pid: int, _signal: int) -> None:
            raise PermissionError

        with monkeypatch.context() as patch:
            patch.setattr(os, "kill", kill)
            watch = ProcessWatch(selector)
            watch.add(peer(child), 0.0)
        assert watch.take() == [UP]


class TestWaker:
    def readable(self, waker: Waker) -> bool:
        return bool(select.select([waker], [], [], 0)[0])

    @pytest.fixture(params=["eventfd", "pipe"])
    def waker(self, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Waker]:
        with monkeypatch.context() as patch:
            if request.param == "pipe":
                patch.delattr(os, "eventfd")
            made = Waker()
        yield made
        made.close()

    def test_it_is_readable_from_set_until_clear(self, waker: Waker) -> None:
        assert not self.readable(waker)
        waker.set()
        waker.set()
        assert self.readable(waker)
        waker.clear()
        assert not self.readable(waker)
        waker.clear()

    def test_setting_it_very_often_never_blocks(self, waker: Waker) -> None:
        for _ in range(20_000):
            waker.set()
        assert self.readable(waker)

    def test_setting_it_after_close_does_not_touch_whoever_has_the_descriptor_now(self, waker: Waker) -> None:
        number = waker.fileno()
        waker.close()
        waker.close()
        reader, writer = os.pipe()
        os.set_blocking(reader, False)
        assert number in (reader, writer)
        try:
            waker.set()
            with pytest.raises(BlockingIOError):
                os.read(reader, 1)
        finally:
            os.close(reader)
            os.close(writer)
