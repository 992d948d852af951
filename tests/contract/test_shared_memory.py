"""Memory that a worker lends to peers on its host: sent as a reference, used as it is, and given back whatever happens."""

from __future__ import annotations

import gc
import os
import signal
import socket
from collections.abc import Callable, Iterator

import pytest

from tests.contract.harness import PATIENCE, SHARED_MEMORY, Worker, introduce, receiving, start
from tests.contract.peer import remote_peer
from zmqagent.exceptions import SendFailedError
from zmqagent.transport import lending, local
from zmqagent.transport.arena import Arena
from zmqagent.transport.base import PeerDown, Received
from zmqagent.transport.shared_memory import Reference, is_supported
from zmqagent.transport.sockets import SocketTransport
from zmqagent.transport.stream import LENT, prefix

pytestmark = [
    pytest.mark.skipif(not is_supported(), reason="this system has no memfd"),
    pytest.mark.parametrize("kind", ["local"]),
]

Make = Callable[[int], Worker]
SIZE = 1 << 20


def memory_for(a: Worker, b: Worker, size: int = SIZE, fill: bytes = b"x") -> memoryview:
    """Memory of ``a`` for ``b``, which takes in what comes meanwhile."""
    memory = a.transport.allocate(b.id, size)
    while memory is None:
        # The first message opens the connection, and what is asked for then invites.
        a.transport.send(b.id, [b"hello"])
        a.transport.allocate(b.id, size)
        a.transport.send(b.id, [b"accepted"])
        while b.message() != [b"accepted"]:
            pass
        memory = a.transport.allocate(b.id, size)
    memory[:] = fill * size
    return memory


def arena_of(worker: Worker) -> Arena:
    arena = worker.transport._carriers[0]._lender._arena  # type: ignore[attr-defined]
    assert isinstance(arena, Arena)
    return arena


def received(worker: Worker) -> list[memoryview]:
    event = worker.news()
    assert isinstance(event, Received)
    return [memoryview(frame) for frame in event.frames]


def mapped() -> int:
    """How many mappings and descriptors of shared memory this process has."""
    gc.collect()
    with open("/proc/self/maps") as maps:
        count = maps.read().count("memfd:zmqagent")
    for fd in os.listdir("/proc/self/fd"):
        try:
            count += "memfd:zmqagent" in os.readlink(f"/proc/self/fd/{fd}")
        except OSError:
            continue  # That of the listing itself.
    return count


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    before = mapped()
    yield
    assert mapped() == before


def test_lent_memory_arrives_as_it_is_and_is_the_receivers(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    memory = memory_for(a, b)
    a.transport.send(b.id, [b"head", memory, b"tail"])
    head, got, tail = received(b)
    assert (bytes(head), bytes(tail)) == (b"head", b"tail")
    # It is the very same memory.
    memory[0] = 7
    assert got[0] == 7
    del memory
    gc.collect()
    other = memory_for(a, b, fill=b"y")
    assert bytes(got[1:]) == b"x" * (SIZE - 1)
    got[:] = b"z" * SIZE
    assert bytes(other) == b"y" * SIZE
    del got, head, tail, other
    assert arena_of(a).in_use() == 0


def test_what_is_lent_cannot_be_sent_again(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    memory = memory_for(a, b)
    a.transport.send(b.id, [memory])
    with pytest.raises(SendFailedError, match="shared memory can be sent once"):
        a.transport.send(b.id, [memory])
    assert bytes(received(b)[0]) == b"x" * SIZE


def test_memory_for_one_peer_may_go_to_another_as_bytes(worker: Make) -> None:
    a, b, c = worker(0), worker(1), start("tcp", 2)
    introduce(a, b)
    by_tcp = start("tcp", 3)
    by_tcp.transport.connect(c.record)
    memory = memory_for(a, b)
    by_tcp.transport.send(c.id, [memory])
    assert c.message() == [b"x" * SIZE]
    for other in (c, by_tcp):
        other.transport.close(linger=0)
    del memory
    assert arena_of(a).in_use() == 0


def test_a_part_of_the_memory_goes_as_bytes(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    memory = memory_for(a, b)
    a.transport.send(b.id, [memory[1:]])
    assert b.message() == [b"x" * (SIZE - 1)]
    del memory
    assert arena_of(a).in_use() == 0


def test_a_peer_that_keeps_everything_leaves_the_other_half(worker: Make) -> None:
    a, hoarder, c = worker(0), worker(1), worker(2)
    introduce(a, hoarder, c)
    kept = []
    memory: memoryview | None = memory_for(a, hoarder)
    while memory is not None:
        memory[:] = bytes([len(kept)]) * SIZE
        a.transport.send(hoarder.id, [memory])
        kept += received(hoarder)
        memory = a.transport.allocate(hoarder.id, SIZE)
    assert len(kept) == SHARED_MEMORY // 2 // SIZE
    # Bytes still go, and others still borrow.
    with receiving(hoarder):
        a.transport.send(hoarder.id, [b"m" * SIZE])
    assert hoarder.message() == [b"m" * SIZE]
    a.transport.send(c.id, [memory_for(a, c)])
    assert bytes(received(c)[0]) == b"x" * SIZE
    assert [bytes(frame) for frame in kept] == [bytes([i]) * SIZE for i in range(len(kept))]


def test_without_shared_memory_there_is_none(worker: Make, kind: str) -> None:
    b = worker(1)
    without = SocketTransport(local=True, incarnation=5)
    without.connect(b.record)
    for _ in range(3):
        without.send(b.id, [b"x"])
        assert without.allocate(b.id, SIZE) is None
        assert b.message() == [b"x"]
    without.close(linger=0)
    assert without.allocate(b.id, SIZE) is None


def test_a_system_that_has_none_to_give_is_asked_once(
    worker: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked = []

    def refuse(size: int) -> Arena:
        asked.append(size)
        raise OSError("out of memory")

    monkeypatch.setattr(lending, "Arena", refuse)
    a, b = worker(0), worker(1)
    introduce(a, b)
    for _ in range(3):
        a.transport.send(b.id, [b"x"])
        assert a.transport.allocate(b.id, SIZE) is None
        assert b.message() == [b"x"]
    a.transport.tidy()
    assert asked == [SHARED_MEMORY]
    assert "no memory is shared with workers on this host, since there is none to be had: out of memory" in caplog.text


@pytest.mark.parametrize("trouble", ["mapping", "descriptor"])
def test_a_peer_that_cannot_map_the_memory_gets_bytes(
    worker: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    def refuse(descriptor: int) -> None:
        os.close(descriptor)
        raise OSError("no addresses left")

    if trouble == "mapping":
        monkeypatch.setattr(lending, "PeerArena", refuse)
    else:
        # The kernel drops a descriptor for which there is no room.
        monkeypatch.setattr(local, "ANCILLARY_BYTES", 0)
    a, b = worker(0), worker(1)
    introduce(a, b)
    for _ in range(4):
        a.transport.send(b.id, [b"x"])
        assert a.transport.allocate(b.id, SIZE) is None
        assert b.message() == [b"x"]
    assert "cannot share memory with a worker on this host" in caplog.text
    # The records know the error, and by its traceback both transports.
    caplog.clear()


def test_a_connection_that_broke_begins_anew(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    memory = memory_for(a, b)
    (inbound,) = b.transport._carriers[0]._inbound  # type: ignore[attr-defined]
    b.transport._carriers[0]._hang_up(inbound)  # type: ignore[attr-defined]
    with receiving(b):
        a.transport.send(b.id, [b"still", memory])
    # By a new connection, on which nothing is shared yet; what had been lent for the first one came back.
    assert b.message() == [b"still", b"x" * SIZE]
    del memory
    assert arena_of(a).in_use() == 0
    a.transport.send(b.id, [memory_for(a, b)])
    assert bytes(received(b)[0]) == b"x" * SIZE
    assert arena_of(a).in_use() == 0


def test_memory_can_be_lent_while_other_messages_wait_to_be_written(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    memory_for(a, b)
    a.transport.send(b.id, [b"m" * 8 * SIZE])
    memory = a.transport.allocate(b.id, 4)
    assert memory is not None
    memory[:] = b"lent"
    a.transport.send(b.id, [memory, b"after"])
    with receiving(a):
        assert b.message() == [b"m" * 8 * SIZE]
        assert b.message() == [b"lent", b"after"]


def test_who_refers_to_memory_that_is_not_shared_is_hung_up_on(worker: Make, caplog: pytest.LogCaptureFixture) -> None:
    a = worker(0)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(PATIENCE)
        stranger.connect(a.record.addresses[0].removeprefix("unix://"))
        stranger.send(prefix([LENT | 32]) + Reference(0, 1, 1 << 40, 1).pack())
        with receiving(a):
            assert stranger.recv(1) == b""
    assert "hung up on a peer on this host: a message refers to shared memory, and none is shared" in caplog.text


def test_descriptors_that_nobody_asked_for_are_closed(worker: Make) -> None:
    a = worker(0)
    counts = set()
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(a.record.addresses[0].removeprefix("unix://"))
        for _ in range(10):
            socket.send_fds(stranger, [prefix([1]) + b"x"], [stranger.fileno()] * 3)
            assert a.message() == [b"x"]
            counts.add(len(os.listdir("/proc/self/fd")))
    assert len(counts) == 1


def test_what_a_killed_peer_had_comes_back_and_what_a_stopped_one_has_stays(worker: Make, kind: str) -> None:
    a = worker(0)
    with remote_peer(a, kind) as (process, record):
        a.transport.connect(record)
        b = Worker(a.transport, record)
        memory = None
        while memory is None:
            # It sends everything back, which says that it has read that, and the invitation before.
            a.transport.send(b.id, [b"hello"])
            assert a.message() == [b"hello"]
            memory = a.transport.allocate(b.id, SIZE)
        memory[:] = b"x" * SIZE
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        a.transport.send(b.id, [memory])
        del memory
        a.transport.tidy()
        assert arena_of(a).in_use() == SIZE
        other = a.transport.allocate(b.id, SIZE)
        assert other is not None
        other[:] = b"y" * SIZE
        os.kill(process.pid, signal.SIGCONT)
        assert a.message() == [b"x" * SIZE]
        os.kill(process.pid, signal.SIGSTOP)
        a.transport.send(b.id, [other])
        del other
        process.kill()
        while not isinstance(a.event(), PeerDown):
            pass
        # Not yet reaped, but nobody uses it any more. (What came back before the stop may have been given back late.)
        a.transport.tidy()
        assert arena_of(a).in_use() == 0


def test_what_a_peer_had_that_was_disconnected_comes_back_when_it_ends(worker: Make, kind: str) -> None:
    a = worker(0)
    with remote_peer(a, kind) as (process, record):
        a.transport.connect(record)
        memory = None
        while memory is None:
            a.transport.send(record.worker_id, [b"hello"])
            assert a.message() == [b"hello"]
            memory = a.transport.allocate(record.worker_id, SIZE)
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        a.transport.send(record.worker_id, [memory])
        del memory
        a.transport.disconnect(record.worker_id, record.incarnation)
        a.transport.tidy()
        assert arena_of(a).in_use() == SIZE
        process.kill()
        process.join()
        a.transport.tidy()
        assert arena_of(a).in_use() == 0


def test_what_was_borrowed_outlives_its_owner(worker: Make) -> None:
    a, b = start("local", 0), worker(1)
    introduce(a, b)
    a.transport.send(b.id, [memory_for(a, b)])
    (got,) = received(b)
    a.transport.close(linger=0)
    del a
    gc.collect()
    assert bytes(got) == b"x" * SIZE
    got[:] = b"y" * SIZE
