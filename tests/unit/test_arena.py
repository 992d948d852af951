"""`zmqagent.transport.arena` and `peer_arena`: memory is lent once, comes back by itself, and never changes under its holder."""

from __future__ import annotations

import gc
import mmap
import os
import random
import threading
import weakref
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from zmqagent.exceptions import ProtocolError, SendFailedError
from zmqagent.transport.arena import Arena
from zmqagent.transport.peer_arena import PeerArena
from zmqagent.transport.shared_memory import DATA_BEGIN, MAX_SLOTS, PINNED, Reference, create, is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no memfd")

PAGE = mmap.PAGESIZE
SIZE = 64 * PAGE
PEER, OTHER = "peer", "other"


@pytest.fixture
def arena() -> Iterator[Arena]:
    made = Arena(SIZE)
    yield made
    made.close()


@pytest.fixture
def peer(arena: Arena) -> PeerArena:
    return PeerArena(os.dup(arena.fd))


def lent(arena: Arena, data: bytes, holder: str = PEER) -> Reference:
    memory = arena.allocate(holder, len(data))
    assert memory is not None
    memory[:] = data
    reference = arena.lend(memory, holder)
    assert reference is not None
    return reference


def pages(fd: int) -> int:
    """How many pages of a memfd there are."""
    return os.fstat(fd).st_blocks * 512 // PAGE


class TestLending:
    def test_what_is_lent_is_read_where_it_lies(self, arena: Arena, peer: PeerArena) -> None:
        memory = arena.allocate(PEER, 100)
        assert memory is not None
        assert memory.nbytes == 100
        memory[:] = bytes(range(100))
        reference = arena.lend(memory, PEER)
        assert reference is not None
        got = peer.view(Reference.unpack(reference.pack()))
        assert bytes(got) == bytes(range(100))
        got[3] = 77
        assert memory[3] == 77

    def test_memory_is_in_use_until_the_last_view_of_it_dies(self, arena: Arena, peer: PeerArena) -> None:
        got = peer.view(lent(arena, b"x" * 2 * PAGE))
        part = np.frombuffer(got[5:10], np.uint8)
        del got
        assert arena.in_use() == 2 * PAGE
        del part
        assert arena.in_use() == 0
        assert arena.holders() == set()

    def test_memory_that_is_never_lent_is_free_when_it_dies(self, arena: Arena) -> None:
        memory = arena.allocate(PEER, SIZE // 2)
        assert memory is not None
        part = memory[:10]
        del memory
        assert arena.allocate(PEER, 1) is None
        del part
        assert arena.allocate(PEER, SIZE // 2) is not None

    def test_the_owners_view_may_die_before_the_loan_ends(self, arena: Arena, peer: PeerArena) -> None:
        got = peer.view(lent(arena, b"kept"))
        gc.collect()
        assert arena.in_use() == PAGE
        other = arena.allocate(PEER, 4)
        assert other is not None
        other[:] = b"next"
        assert bytes(got) == b"kept"

    def test_memory_is_lent_once(self, arena: Arena, peer: PeerArena) -> None:
        memory = arena.allocate(PEER, 4)
        assert memory is not None
        reference = arena.lend(memory, PEER)
        assert reference is not None
        for _ in range(2):
            with pytest.raises(SendFailedError, match="lent already"):
                arena.lend(memory, PEER)
            peer.view(reference)
            # Neither when it has come back.
            assert arena.in_use() == 0

    def test_other_memory_and_parts_are_not_lent(self, arena: Arena) -> None:
        assert arena.lend(memoryview(bytearray(4)), PEER) is None
        assert arena.lend(np.zeros(4, np.uint8).data, PEER) is None
        memory = arena.allocate(PEER, 4)
        assert memory is not None
        assert arena.lend(memory[1:], PEER) is None
        assert arena.lend(memory, PEER) is not None

    def test_the_late_word_of_an_earlier_loan_means_nothing(self, arena: Arena, peer: PeerArena) -> None:
        former = lent(arena, b"former")
        arena.reclaim(PEER)
        latter = lent(arena, b"latter", OTHER)
        assert latter.slot == former.slot
        peer.view(former)
        assert arena.holders() == {OTHER}
        peer.view(latter)
        assert arena.holders() == set()

    def test_the_lowest_memory_is_used_again(self, arena: Arena, peer: PeerArena) -> None:
        first, second = lent(arena, b"1"), lent(arena, b"2")
        peer.view(first)
        third = lent(arena, b"3")
        assert third.offset == first.offset < second.offset


class TestBounds:
    def test_one_holder_gets_half(self, arena: Arena, peer: PeerArena) -> None:
        held = [peer.view(lent(arena, b"x" * PAGE)) for _ in range(32)]
        assert arena.allocate(PEER, 1) is None
        theirs = [arena.allocate(OTHER, PAGE) for _ in range(32)]
        assert None not in theirs
        assert arena.allocate("third", 1) is None
        held.pop()
        assert arena.allocate(PEER, PAGE) is not None

    def test_memory_counts_for_the_one_it_is_lent_to(self, arena: Arena) -> None:
        memory = arena.allocate(OTHER, SIZE // 2)
        assert memory is not None
        arena.lend(memory, PEER)
        assert arena.allocate(PEER, 1) is None
        assert arena.allocate(OTHER, SIZE // 2) is not None

    def test_a_size_beyond_the_share_is_refused(self, arena: Arena) -> None:
        assert arena.allocate(PEER, SIZE // 2 + 1) is None
        assert arena.allocate(PEER, 1 << 60) is None

    def test_there_are_so_many_slots_and_no_more(self) -> None:
        arena = Arena(4 * MAX_SLOTS * PAGE)
        memory = [arena.allocate(PEER, 1) for _ in range(MAX_SLOTS)]
        assert None not in memory
        assert arena.allocate(OTHER, 1) is None
        memory.pop()
        assert arena.allocate(OTHER, 1) is not None
        arena.close()

    def test_an_arena_of_no_size_lends_nothing(self) -> None:
        arena = Arena(0)
        assert arena.allocate(PEER, 1) is None
        arena.close()

    def test_a_closed_arena_lends_nothing_and_what_was_lent_stays(self, arena: Arena, peer: PeerArena) -> None:
        got = peer.view(lent(arena, b"kept"))
        arena.close()
        arena.close()
        assert arena.allocate(PEER, 1) is None
        assert bytes(got) == b"kept"


class TestTheHoldersEnd:
    def test_what_a_dead_holder_had_is_free(self, arena: Arena) -> None:
        for _ in range(3):
            lent(arena, b"x")
        theirs = lent(arena, b"y", OTHER)
        arena.reclaim(PEER)
        assert arena.holders() == {OTHER}
        assert arena.in_use() == PAGE
        assert lent(arena, b"z").offset < theirs.offset

    def test_memory_on_its_way_to_a_dead_holder_is_not_free_yet(self, arena: Arena) -> None:
        memory = arena.allocate(PEER, 4)
        assert memory is not None
        arena.reclaim(PEER)
        assert arena.in_use() == PAGE
        del memory
        assert arena.in_use() == 0


class TestTrimming:
    def test_pages_that_were_free_for_a_while_go_back(self, arena: Arena, peer: PeerArena) -> None:
        held = peer.view(lent(arena, b"x" * 4 * PAGE))
        peer.view(lent(arena, b"x" * 20 * PAGE))
        before = pages(arena.fd)
        arena.trim(0.0)
        arena.trim(9.0)
        assert pages(arena.fd) == before
        arena.trim(10.0)
        assert pages(arena.fd) == before - 20
        assert bytes(held) == b"x" * 4 * PAGE
        del held
        arena.trim(11.0)
        # Only the words are left.
        assert pages(arena.fd) <= DATA_BEGIN // PAGE

    def test_what_is_used_again_and_again_stays_warm(self, arena: Arena, peer: PeerArena) -> None:
        peer.view(lent(arena, b"x" * 20 * PAGE))
        for now in range(0, 100, 5):
            peer.view(lent(arena, b"x" * 10 * PAGE))
            arena.trim(float(now))
        assert 10 <= pages(arena.fd) <= 10 + DATA_BEGIN // PAGE

    def test_gaps_below_what_is_in_use_go_back_too(self, arena: Arena, peer: PeerArena) -> None:
        low = peer.view(lent(arena, b"x" * 20 * PAGE))
        high = peer.view(lent(arena, b"y" * PAGE))
        del low
        before = pages(arena.fd)
        for now in range(0, 50, 5):
            arena.trim(float(now))
        assert pages(arena.fd) == before - 20
        assert bytes(high) == b"y" * PAGE

    def test_much_goes_back_a_piece_at_a_time(self) -> None:
        arena = Arena(128 << 20)
        taken = []
        big = arena.allocate(PEER, 40 << 20)
        assert big is not None
        big[::PAGE] = bytes(len(big[::PAGE]))
        del big
        for now in (0.0, 10.0, 11.0, 12.0, 13.0):
            arena.trim(now)
            taken.append(pages(arena.fd) * PAGE >> 20)
        assert taken == [40, 24, 8, 0, 0]
        arena.close()


class TestTheOtherSide:
    @pytest.mark.parametrize(
        "wrong",
        [
            Reference(MAX_SLOTS, 1, DATA_BEGIN, 1),
            Reference(0, 0, DATA_BEGIN, 1),
            Reference(0, PINNED, DATA_BEGIN, 1),
            Reference(0, 1, 0, 1),
            Reference(0, 1, DATA_BEGIN + 8, 1),
            Reference(0, 1, DATA_BEGIN + SIZE, 1),
            Reference(0, 1, DATA_BEGIN, 0),
            Reference(0, 1, DATA_BEGIN, SIZE + 1),
            Reference(0, 1, 1 << 63, 1 << 63),
        ],
        ids=str,
    )
    def test_a_reference_to_no_slot_is_refused(self, peer: PeerArena, wrong: Reference) -> None:
        with pytest.raises(ProtocolError, match="is no place in shared memory"):
            peer.view(wrong)

    def test_a_slot_that_is_still_used_is_not_taken_again(self, arena: Arena, peer: PeerArena) -> None:
        reference = lent(arena, b"x")
        got = peer.view(reference)
        with pytest.raises(ProtocolError, match=r"while .* was still in use"):
            peer.view(reference._replace(loan=9))
        assert bytes(got) == b"x"
        assert arena.in_use() == PAGE

    @pytest.mark.parametrize("data", [b"", b"x" * 31, b"x" * 33])
    def test_a_reference_has_its_size(self, data: bytes) -> None:
        with pytest.raises(ProtocolError, match="32 bytes"):
            Reference.unpack(data)

    def test_a_descriptor_of_something_else_is_refused_and_closed(self) -> None:
        read, write = os.pipe()
        plain = os.memfd_create("plain", os.MFD_ALLOW_SEALING)
        os.ftruncate(plain, SIZE)
        for fd in (read, write, plain, create(PAGE)):
            with pytest.raises(ProtocolError, match="shared memory"):
                PeerArena(fd)
            with pytest.raises(OSError, match="Bad file descriptor"):
                os.fstat(fd)

    def test_an_arena_cannot_shrink_or_grow(self, arena: Arena) -> None:
        for size in (0, SIZE * 2):
            with pytest.raises(PermissionError):
                os.ftruncate(arena.fd, size)

    def test_a_view_keeps_the_peers_arena_and_nothing_else_does(self, arena: Arena) -> None:
        peer = PeerArena(os.dup(arena.fd))
        watch = weakref.ref(peer)
        got = peer.view(lent(arena, b"x"))
        del peer
        gc.collect()
        assert watch() is not None
        del got
        gc.collect()
        assert watch() is None
        assert arena.in_use() == 0


def in_a_child(run: Callable[[], None]) -> Callable[[], None]:
    """Forks, and has the child run ``run`` when what is returned is called; that raises unless ``run`` returned."""
    go, gone = os.pipe(), os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(go[0], 1)
            run()
            os._exit(0)
        finally:
            os._exit(1)

    def proceed() -> None:
        os.write(go[1], b"x")
        assert os.waitpid(pid, 0)[1] == 0
        for fd in (*go, *gone):
            os.close(fd)

    return proceed


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
class TestFork:
    def test_a_child_finds_what_its_parent_had_borrowed_unchanged(self, arena: Arena, peer: PeerArena) -> None:
        got = [peer.view(lent(arena, b"as it was"))]

        def look() -> None:
            assert bytes(got[0]) == b"as it was"
            got[0][:] = b"childs!!!"
            got.clear()

        proceed = in_a_child(look)
        got[0][:] = b"parents!!"
        proceed()
        assert bytes(got[0]) == b"parents!!"
        # And never comes back, since the child's might live longer than the parent's.
        got.clear()
        assert arena.in_use() == PAGE
        arena.reclaim(PEER)
        assert arena.in_use() == PAGE
        assert lent(arena, b"another").offset == DATA_BEGIN + PAGE

    def test_what_is_borrowed_later_comes_back(self, arena: Arena, peer: PeerArena) -> None:
        in_a_child(lambda: None)()
        got = peer.view(lent(arena, b"x"))
        assert bytes(got) == b"x"
        del got
        assert arena.in_use() == 0

    def test_the_child_of_an_owner_neither_lends_nor_takes_back(self, arena: Arena, peer: PeerArena) -> None:
        memory = [arena.allocate(PEER, 8)]
        got = peer.view(lent(arena, b"x" * 20 * PAGE))

        def look() -> None:
            memory.clear()
            assert arena.allocate(PEER, 8) is None
            for now in range(0, 60, 5):
                arena.trim(float(now))

        in_a_child(look)()
        assert arena.in_use() == 21 * PAGE
        assert bytes(got) == b"x" * 20 * PAGE


@pytest.mark.parametrize("seed", range(5))
def test_many_threads_lend_and_give_back_and_nothing_is_lost_or_mixed_up(seed: int) -> None:
    arena = Arena(SIZE)
    errors: list[BaseException] = []

    def work(name: int) -> None:
        draw = random.Random(seed * 100 + name)
        peer = PeerArena(os.dup(arena.fd))
        kept: list[tuple[memoryview, bytes]] = []
        try:
            for _ in range(300):
                data = bytes([draw.randrange(256)]) * draw.randrange(1, 5 * PAGE)
                memory = arena.allocate(name, len(data))
                if memory is not None:
                    memory[:] = data
                    reference = arena.lend(memory, name)
                    assert reference is not None
                    kept.append((peer.view(reference), data))
                if memory is None or draw.random() < 0.4:
                    for _ in range(min(len(kept), draw.randrange(4))):
                        got, expected = kept.pop(draw.randrange(len(kept)))
                        assert bytes(got) == expected
                arena.trim(draw.random() * 100)
            assert all(bytes(got) == expected for got, expected in kept)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    assert arena.in_use() == 0
    arena.close()
