"""What every transport guarantees, checked on each of them."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest

from tests.contract.harness import PATIENCE, Worker, introduce, receiving, start
from zmqagent.exceptions import InvalidTypeError, ShutdownError, UnknownWorkerError, WorkerLostError
from zmqagent.transport.base import PeerUp, Received
from zmqagent.wire.types import WorkerId

Make = Callable[[int], Worker]
KIB = 1 << 10
MIB = 1 << 20


def pattern(size: int) -> bytes:
    """Bytes that show when a piece is missing, doubled or moved."""
    return (bytes(range(251)) * (size // 251 + 1))[:size]


class TestDelivery:
    def test_messages_go_both_ways(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        a.transport.send(b.id, [b"ping", b"1"])
        assert b.message() == [b"ping", b"1"]
        b.transport.send(a.id, [b"pong"])
        assert a.message() == [b"pong"]

    def test_a_worker_can_send_to_itself(self, worker: Make) -> None:
        a = worker(0)
        a.transport.connect(a.record)
        a.transport.send(a.id, [b"note"])
        assert a.message() == [b"note"]

    @pytest.mark.parametrize("size", [0, 1, 64 * KIB - 1, 64 * KIB, 32 * MIB])
    def test_frames_arrive_as_they_were(self, worker: Make, size: int) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        body = pattern(size)
        with receiving(a):
            a.transport.send(b.id, [b"head", body, b""])
            assert b.message() == [b"head", body, b""]

    def test_a_message_of_a_thousand_frames_stays_one(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        frames = [pattern(i) for i in range(1000)]
        a.transport.send(b.id, frames)
        assert b.message() == frames

    def test_any_contiguous_buffer_is_a_frame(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        numbers = memoryview(bytearray(pattern(160 * KIB))).cast("d")
        a.transport.send(b.id, [bytearray(b"x"), memoryview(b"yz"), numbers[:8], numbers])
        assert b.message() == [b"x", b"yz", numbers[:8].tobytes(), numbers.tobytes()]

    def test_received_frames_can_be_sent_on(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        a.transport.send(b.id, [b"small", pattern(MIB)])
        event = b.news()
        assert isinstance(event, Received)
        b.transport.send(a.id, event.frames)
        assert a.message() == [b"small", pattern(MIB)]

    def test_received_memory_is_writable_and_stays_as_it_is(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        a.transport.send(b.id, [pattern(100), pattern(MIB)])
        event = b.news()
        assert isinstance(event, Received)
        small, large = (memoryview(frame) for frame in event.frames)
        del event
        small[0] = large[0] = 77
        for _ in range(50):
            a.transport.send(b.id, [bytes(100), bytes(MIB)])
            b.message()
        assert small.tobytes() == b"\x4d" + pattern(100)[1:]
        assert large.tobytes() == b"\x4d" + pattern(MIB)[1:]

    def test_messages_sent_before_the_peer_receives_arrive(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        a.transport.connect(b.record)
        for number in range(100):
            a.transport.send(b.id, [b"%d" % number])
        assert {b.message()[0] for _ in range(100)} == {b"%d" % n for n in range(100)}

    def test_many_threads_send_at_once_and_no_message_is_torn(self, worker: Make) -> None:
        a, b, c = worker(0), worker(1), worker(2)
        introduce(a, b, c)

        def send(thread: int) -> None:
            for number in range(100):
                name = b"%d/%d" % (thread, number)
                for to in (b, c):
                    a.transport.send(to.id, [name, name * 30, pattern(70 * KIB), name])

        with ThreadPoolExecutor(8) as pool, receiving(a):
            list(pool.map(send, range(8)))
            for receiver in (b, c):
                seen = set()
                for _ in range(800):
                    name, middle, body, last = receiver.message()
                    assert (middle, body, last) == (name * 30, pattern(70 * KIB), name)
                    seen.add(name)
                assert len(seen) == 800


class TestAnswers:
    """Several messages that came together may be answered together, but never late."""

    def test_they_arrive_though_the_thread_that_sent_them_waits_for_something_else(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        for number in range(40):
            a.transport.send(b.id, [b"%d" % number])
        answered = set()
        for _ in range(40):
            answered.add(b.message()[0])
            b.transport.send(a.id, [b"answer"])
        assert len(answered) == 40
        # Not by receiving again, which would do too.
        with ThreadPoolExecutor(1) as clock:
            while not clock.submit(self._has_come, a, b).result(PATIENCE):
                pass
        for _ in range(40):
            assert a.message() == [b"answer"]

    @staticmethod
    def _has_come(a: Worker, b: Worker) -> bool:
        b.transport.check()
        a.events += a.transport.receive(0.01)
        return sum(isinstance(event, Received) for event in a.events) == 40

    def test_what_another_thread_sends_does_not_wait_for_them(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        for number in range(4):
            a.transport.send(b.id, [b"%d" % number])
        for _ in range(4):
            b.message()
        b.transport.send(a.id, [b"gathered"])
        with ThreadPoolExecutor(1) as other:
            other.submit(b.transport.send, a.id, [b"at once"]).result(PATIENCE)
        assert sorted([a.message(), a.message()]) == [[b"at once"], [b"gathered"]]


class TestReceive:
    def test_each_message_goes_to_one_of_the_threads_that_receive(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        got: list[bytes] = []
        done = threading.Event()

        def take() -> None:
            while not done.is_set():
                for event in b.transport.receive(PATIENCE):
                    if isinstance(event, Received):
                        got.append(bytes(event.frames[0]))
                        if len(got) == 300:
                            done.set()
            b.transport.wake()

        with ThreadPoolExecutor(3) as pool, receiving(a):
            takers = [pool.submit(take) for _ in range(3)]
            for number in range(300):
                a.transport.send(b.id, [b"%d" % number])
            assert done.wait(PATIENCE)
            b.transport.wake()
            for taker in takers:
                taker.result(PATIENCE)
        assert len(set(got)) == 300

    def test_it_returns_nothing_when_the_time_is_over(self, worker: Make) -> None:
        a = worker(0)
        assert not a.transport.receive(0)
        assert not a.transport.receive(0.01)

    def test_wake_ends_a_receive_that_waits_without_limit(self, worker: Make) -> None:
        a = worker(0)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(a.transport.receive, None)
            a.transport.wake()
            assert not waiting.result(PATIENCE)

    def test_wake_ends_the_next_receive_and_only_that(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        assert isinstance(a.event(), PeerUp)
        a.transport.wake()
        a.transport.wake()
        assert not a.transport.receive(None)
        b.transport.send(a.id, [b"x"])
        assert a.message() == [b"x"]

    def test_close_ends_a_receive_that_waits_without_limit(self, worker: Make) -> None:
        a = worker(0)
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(a.transport.receive, None)
            a.transport.close()
            assert not waiting.result(PATIENCE)

    def test_it_returns_nothing_once_closed(self, worker: Make) -> None:
        a = worker(0)
        a.transport.close()
        assert not a.transport.receive(None)


class TestRefusals:
    def test_an_unknown_destination(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        a.transport.connect(b.record)
        with pytest.raises(UnknownWorkerError, match="7"):
            a.transport.send(WorkerId(7), [b"x"])

    def test_a_disconnected_destination(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        a.transport.disconnect(b.id, b.record.incarnation)
        with pytest.raises(UnknownWorkerError):
            a.transport.send(b.id, [b"x"])

    def test_disconnecting_a_stranger_is_ignored(self, worker: Make) -> None:
        a = worker(0)
        a.transport.disconnect(WorkerId(7), 1)
        assert not a.transport.receive(0)

    def test_sending_after_close(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        a.transport.send(b.id, [b"x"])
        a.transport.close()
        for act in (lambda: a.transport.send(b.id, [b"x"]), lambda: a.transport.connect(b.record)):
            with pytest.raises(ShutdownError):
                act()

    @pytest.mark.parametrize("frames", [[], ["text"], [b"fine", None], [memoryview(b"abcdef")[::2]]])
    def test_what_is_no_message_is_refused_whole(self, worker: Make, frames: list[object]) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        with pytest.raises(InvalidTypeError):
            a.transport.send(b.id, frames)
        a.transport.send(b.id, [b"next"])
        assert b.message() == [b"next"]


class TestEnd:
    def test_close_sends_what_was_accepted(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        for _ in range(10):
            a.transport.send(b.id, [pattern(MIB)])
        with ThreadPoolExecutor(1) as pool:
            # The peer reads meanwhile: that much fits into no socket's buffer.
            closing = pool.submit(a.transport.close, PATIENCE)
            for _ in range(10):
                assert b.message() == [pattern(MIB)]
            closing.result(PATIENCE)

    def test_disconnect_sends_what_was_accepted(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        for _ in range(10):
            a.transport.send(b.id, [pattern(MIB)])
        a.transport.disconnect(b.id, b.record.incarnation)
        with receiving(a):
            for _ in range(10):
                assert b.message() == [pattern(MIB)]

    def test_close_ends_though_a_peer_never_reads(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        for _ in range(10):
            a.transport.send(b.id, [pattern(MIB)])
        a.transport.disconnect(b.id, b.record.incarnation)
        a.transport.close(linger=0.01)
        a.transport.close()

    def test_close_ends_while_peers_and_own_threads_send(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        stop = threading.Event()

        def flood(sender: Worker, to: Worker) -> None:
            try:
                while not stop.is_set():
                    sender.transport.send(to.id, [b"x" * 100, bytes(70 * KIB)])
            except (ShutdownError, WorkerLostError):
                return

        with ThreadPoolExecutor(4) as pool:
            floods = [pool.submit(flood, *pair) for pair in ((a, b), (b, a)) * 2]
            assert isinstance(a.news(), Received)
            a.transport.close(linger=0)
            stop.set()
            for flooding in floods:
                flooding.result(PATIENCE)

    def test_a_newer_incarnation_takes_over(self, worker: Make) -> None:
        a, old = worker(0), worker(1)
        introduce(a, old)
        a.transport.send(old.id, [b"to the old"])
        assert old.message() == [b"to the old"]
        new = worker(1)
        introduce(a, new)
        a.transport.send(new.id, [b"to the new"])
        assert new.message() == [b"to the new"]
        assert not any(isinstance(event, Received) for event in old.transport.receive(0))
        new.transport.send(a.id, [b"back"])
        assert a.message() == [b"back"]

    def test_disconnecting_a_former_incarnation_leaves_the_newer_one(self, worker: Make) -> None:
        a, old, new = worker(0), worker(1), worker(1)
        introduce(a, old)
        introduce(a, new)
        a.transport.disconnect(old.id, old.record.incarnation)
        a.transport.send(new.id, [b"still there"])
        assert new.message() == [b"still there"]

    def test_connecting_the_same_incarnation_again_changes_nothing(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        introduce(a, b)
        a.transport.send(b.id, [b"1"])
        a.transport.connect(dataclasses.replace(b.record, name="alias"))
        a.transport.send(b.id, [b"2"])
        assert {b.message()[0], b.message()[0]} == {b"1", b"2"}

    def test_a_peer_that_no_address_reaches_is_reported_by_send(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        a.transport.connect(dataclasses.replace(b.record, addresses=()))
        with pytest.raises(WorkerLostError, match=r"worker 'worker1' \(1\) cannot be reached"):
            a.transport.send(b.id, [b"x"])

    def test_closing_leaves_no_threads(self, kind: str) -> None:
        before = set(threading.enumerate())
        a, b = start(kind, 0), start(kind, 1)
        introduce(a, b)
        a.transport.send(b.id, [b"x"])
        assert b.message() == [b"x"]
        for each in (a, b):
            each.transport.close()
        assert set(threading.enumerate()) <= before
