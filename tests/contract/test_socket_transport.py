"""What `SocketTransport` guarantees beyond the contract: deaths, forks, exits, and what it leaves behind."""

from __future__ import annotations

import dataclasses
import errno
import os
import signal
import socket
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from tests.contract.harness import KINDS, PATIENCE, Worker, introduce, receiving, start
from tests.contract.peer import CHECKOUT, remote_peer
from zmqagent.exceptions import InvalidOptionError, SendFailedError, WorkerLostError
from zmqagent.transport import connection_watch
from zmqagent.transport.base import PeerDown, PeerRecord, PeerSuspected, PeerUp, Received
from zmqagent.transport.endpoints import MAX_IPC_PATH
from zmqagent.transport.hosts import describe_self
from zmqagent.transport.sockets import SocketTransport
from zmqagent.wire.frames import DEFAULT_LIMITS
from zmqagent.wire.types import WorkerId

Make = Callable[[int], Worker]


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorter times for the watch over connections, so that a test need not wait for the real ones."""
    monkeypatch.setattr(connection_watch, "HEARTBEAT_INTERVAL", 0.05)
    monkeypatch.setattr(connection_watch, "HEARTBEAT_TIMEOUT", 0.2)
    monkeypatch.setattr(connection_watch, "RECONNECTION_GRACE", 0.3)
    monkeypatch.setattr(connection_watch, "FIRST_CONNECTION_GRACE", 0.3)


@pytest.fixture
def make_zmq() -> Iterator[Callable[..., Worker]]:
    made: list[SocketTransport] = []

    def make(worker_id: int = 0, **options: Any) -> Worker:
        transport = SocketTransport(incarnation=worker_id + 1, **options)
        made.append(transport)
        return Worker(transport, describe_self(f"w{worker_id}", WorkerId(worker_id), worker_id + 1, transport.addresses))

    yield make
    for transport in made:
        transport.close(linger=0)


def elsewhere(record: PeerRecord) -> PeerRecord:
    """The same worker as it would look on another host."""
    return dataclasses.replace(record, host="another host")


class TestDeathOnThisHost:
    def test_a_killed_peer_is_reported_and_sending_to_it_refused(self, worker: Make, kind: str) -> None:
        a = worker(0)
        with remote_peer(a, kind) as (child, peer):
            a.transport.connect(peer)
            assert a.event() == PeerUp(peer.worker_id, peer.incarnation)
            a.transport.send(peer.worker_id, [b"echo"])
            assert a.message() == [b"echo"]
            child.kill()
            down = a.event()
            assert down == PeerDown(peer.worker_id, peer.incarnation, f"its process {peer.pid} on this host has ended")
            with pytest.raises(WorkerLostError, match=r"worker 'worker1' \(1\) is lost: its process"):
                a.transport.send(peer.worker_id, [b"x"])
            assert not a.transport.receive(0)

    def test_what_a_killed_peer_had_sent_arrives_before_the_news_of_its_death(self, worker: Make, kind: str) -> None:
        a = worker(0)
        with remote_peer(a, kind, messages=200) as (child, peer):
            a.transport.connect(peer)
            child.kill()
            child.join(PATIENCE)
            assert sorted(int(a.message()[0]) for _ in range(200)) == list(range(200))
            assert isinstance(a.event(), PeerDown)

    def test_a_death_is_reported_though_others_never_cease_to_send(self, worker: Make, kind: str) -> None:
        a, busy = worker(0), worker(2)
        introduce(a, busy)
        with remote_peer(a, kind) as (child, peer):
            a.transport.connect(peer)
            child.kill()
            for _ in range(10_000_000):
                busy.transport.send(a.id, [b"noise"])
                busy.transport.send(a.id, [b"noise"])
                if isinstance(a.event(), PeerDown):
                    break
            else:
                pytest.fail("the death was never reported")

    def test_a_peer_that_was_dead_before_it_was_connected_is_reported(self, worker: Make, kind: str) -> None:
        a = worker(0)
        with remote_peer(a, kind) as (child, peer):
            child.kill()
            child.join(PATIENCE)
            a.transport.connect(peer)
            assert isinstance(a.event(), PeerDown)

    def test_a_process_that_got_the_same_pid_is_not_taken_for_the_peer(self, worker: Make) -> None:
        a, b = worker(0), worker(1)
        a.transport.connect(dataclasses.replace(b.record, started=b.record.started - 1))
        assert isinstance(a.event(), PeerDown)

    def test_the_death_of_an_older_incarnation_is_not_reported(self, worker: Make, kind: str) -> None:
        a, new = worker(0), worker(1)
        with remote_peer(a, kind) as (child, old):
            a.transport.connect(old)
            assert isinstance(a.event(), PeerUp)
            a.transport.connect(new.record)
            child.kill()
            child.join(PATIENCE)
            assert a.event() == PeerUp(new.id, new.record.incarnation)
            new.transport.connect(a.record)
            new.transport.send(a.id, [b"x"])
            assert a.message() == [b"x"]
            assert not a.transport.receive(0.05)

    def test_the_death_of_a_disconnected_peer_is_not_reported(self, worker: Make, kind: str) -> None:
        a = worker(0)
        with remote_peer(a, kind) as (child, peer):
            a.transport.connect(peer)
            assert isinstance(a.event(), PeerUp)
            child.kill()
            child.join(PATIENCE)
            a.transport.disconnect(peer.worker_id, peer.incarnation)
            a.transport.connect(a.record)
            assert a.event() == PeerUp(a.id, a.record.incarnation)
            assert not a.transport.receive(0.05)


class TestDeathElsewhere:
    def test_a_peer_is_up_once_its_connection_stands(self, make_zmq: Callable[..., Worker]) -> None:
        a, b = make_zmq(0, ipc=False, tcp_host="127.0.0.1"), make_zmq(1, ipc=False, tcp_host="127.0.0.1")
        a.transport.connect(elsewhere(b.record))
        assert a.event() == PeerUp(b.id, b.record.incarnation)

    @pytest.mark.usefixtures("impatient")
    def test_a_killed_peer_is_suspected_and_then_given_up(self, make_zmq: Callable[..., Worker]) -> None:
        a = make_zmq(0, ipc=False, tcp_host="127.0.0.1")
        with remote_peer(a, "tcp") as (child, peer):
            a.transport.connect(elsewhere(peer))
            assert isinstance(a.event(), PeerUp)
            a.transport.send(peer.worker_id, [b"echo"])
            assert a.message() == [b"echo"]
            child.kill()
            assert isinstance(a.event(), PeerSuspected)
            down = a.event()
            assert isinstance(down, PeerDown)
            assert f"no connection to {peer.addresses[0]} for 0.3 s" in down.reason
            with pytest.raises(WorkerLostError, match="no connection"):
                a.transport.send(peer.worker_id, [b"x"])

    @pytest.mark.usefixtures("impatient")
    def test_a_stopped_peer_is_noticed_by_its_heartbeats(self, make_zmq: Callable[..., Worker]) -> None:
        a = make_zmq(0, ipc=False, tcp_host="127.0.0.1")
        with remote_peer(a, "tcp") as (_, peer):
            a.transport.connect(elsewhere(peer))
            assert isinstance(a.event(), PeerUp)
            os.kill(peer.pid, signal.SIGSTOP)
            assert isinstance(a.event(), PeerSuspected)
            assert isinstance(a.event(), PeerDown)

    def test_a_peer_that_comes_back_in_time_is_up_again(
        self, make_zmq: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(connection_watch, "HEARTBEAT_INTERVAL", 0.05)
        monkeypatch.setattr(connection_watch, "HEARTBEAT_TIMEOUT", 0.2)
        monkeypatch.setattr(connection_watch, "RECONNECTION_GRACE", PATIENCE)
        a = make_zmq(0, ipc=False, tcp_host="127.0.0.1")
        with remote_peer(a, "tcp") as (_, peer):
            a.transport.connect(elsewhere(peer))
            assert isinstance(a.event(), PeerUp)
            os.kill(peer.pid, signal.SIGSTOP)
            assert isinstance(a.event(), PeerSuspected)
            os.kill(peer.pid, signal.SIGCONT)
            assert isinstance(a.event(), PeerUp)
            a.transport.send(peer.worker_id, [b"echo"])
            assert a.message() == [b"echo"]

    @pytest.mark.usefixtures("impatient")
    def test_a_peer_that_never_answers_is_given_up(self, make_zmq: Callable[..., Worker]) -> None:
        a = make_zmq(0, ipc=False, tcp_host="127.0.0.1")
        with socket.create_server(("127.0.0.1", 0)) as mute:
            address = f"tcp://127.0.0.1:{mute.getsockname()[1]}"
            a.transport.connect(PeerRecord("mute", WorkerId(1), 2, "another host", 1, (address,)))
            assert isinstance(a.event(), PeerDown)

    def test_a_peer_without_a_tcp_address_is_given_up_at_once(self, make_zmq: Callable[..., Worker]) -> None:
        a, b = make_zmq(0, ipc=True, tcp_host=None), make_zmq(1, ipc=True, tcp_host=None)
        a.transport.connect(elsewhere(b.record))
        down = a.event()
        assert isinstance(down, PeerDown)
        assert "listens on no TCP address" in down.reason

    @pytest.mark.usefixtures("impatient")
    def test_a_peer_that_is_slow_to_read_is_not_suspected(self, make_zmq: Callable[..., Worker]) -> None:
        a, b = make_zmq(0, ipc=False, tcp_host="127.0.0.1"), make_zmq(1, ipc=False, tcp_host="127.0.0.1")
        a.transport.connect(elsewhere(b.record))
        assert isinstance(a.event(), PeerUp)
        for _ in range(64):
            a.transport.send(b.id, [bytes(1 << 20)])
        # Several times what it takes to miss a heartbeat.
        assert not a.transport.receive(1.0)

    def test_an_address_that_passes_to_another_worker_ends_the_first(self, make_zmq: Callable[..., Worker]) -> None:
        a, b = make_zmq(0, ipc=False, tcp_host="127.0.0.1"), make_zmq(1, ipc=False, tcp_host="127.0.0.1")
        a.transport.connect(elsewhere(b.record))
        assert a.event() == PeerUp(b.id, b.record.incarnation)
        other = dataclasses.replace(elsewhere(b.record), worker_id=WorkerId(2), incarnation=9, name="heir")
        a.transport.connect(other)
        events = {a.event(), a.event()}
        down = PeerDown(b.id, b.record.incarnation, f"its address {b.record.addresses[0]} belongs to worker 'heir' now")
        assert events == {down, PeerUp(other.worker_id, 9)}


class TestAddresses:
    def test_ipc_comes_first_where_both_are_asked_for(self, make_zmq: Callable[..., Worker]) -> None:
        ipc, tcp = make_zmq(ipc=True, tcp_host="127.0.0.1").transport.addresses
        assert ipc.startswith("ipc://")
        assert tcp.startswith("tcp://127.0.0.1:")
        assert int(tcp.rpartition(":")[2]) > 0

    def test_a_peer_on_another_host_is_reached_by_tcp_alone(self, make_zmq: Callable[..., Worker]) -> None:
        a, b = make_zmq(0, ipc=True, tcp_host="127.0.0.1"), make_zmq(1, ipc=True, tcp_host="127.0.0.1")
        a.transport.connect(elsewhere(b.record))
        a.transport.send(b.id, [b"by tcp"])
        assert b.message() == [b"by tcp"]
        a.transport.disconnect(b.id, b.record.incarnation)
        a.transport.connect(elsewhere(dataclasses.replace(b.record, addresses=b.record.addresses[:1])))
        with pytest.raises(WorkerLostError):
            a.transport.send(b.id, [b"by ipc"])

    def test_ipv6(self, make_zmq: Callable[..., Worker]) -> None:
        a, b = make_zmq(0, ipc=False, tcp_host="::1"), make_zmq(1, ipc=False, tcp_host="::1")
        assert a.transport.addresses[0].startswith("tcp://[::1]:")
        a.transport.connect(elsewhere(b.record))
        assert isinstance(a.event(), PeerUp)
        a.transport.send(b.id, [b"six"])
        assert b.message() == [b"six"]
        a.transport.disconnect(b.id, b.record.incarnation)
        assert not a.transport.receive(0.01)

    def test_a_name_is_published_as_a_number(self, make_zmq: Callable[..., Worker]) -> None:
        (address,) = make_zmq(ipc=False, tcp_host="localhost").transport.addresses
        assert address.startswith(("tcp://127.0.0.1:", "tcp://[::1]:"))

    def test_the_socket_lies_in_a_private_directory_under_a_short_path(self, make_zmq: Callable[..., Worker]) -> None:
        transport = make_zmq(ipc=True, tcp_host=None).transport
        path = Path(transport.addresses[0].removeprefix("ipc://"))
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
        assert len(os.fsencode(path)) <= MAX_IPC_PATH
        transport.close()
        assert not path.parent.exists()

    def test_all_interfaces_are_used_only_when_asked_for(self, make_zmq: Callable[..., Worker]) -> None:
        a = make_zmq(0, ipc=False, tcp_host="127.0.0.1", bind_host="0.0.0.0")
        assert a.transport.addresses[0].startswith("tcp://127.0.0.1:")
        port = int(a.transport.addresses[0].rpartition(":")[2])
        with socket.create_connection(("127.0.0.2", port)):
            pass
        b = make_zmq(1, ipc=False, tcp_host="127.0.0.1")
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.2", int(b.transport.addresses[0].rpartition(":")[2])))

    @pytest.mark.parametrize(
        ("options", "text"),
        [
            ({"ipc": False, "tcp_host": None}, "must listen on"),
            ({"ipc": True, "tcp_host": "0.0.0.0"}, "peers cannot connect to '0.0.0.0'"),
            ({"ipc": True, "tcp_host": "192.0.2.1"}, "cannot listen on tcp://192.0.2.1"),
            ({"ipc": False, "tcp_host": "no such host"}, "cannot listen on 'no such host'"),
        ],
    )
    def test_what_cannot_be_listened_on_is_refused_and_leaves_nothing(self, options: dict[str, Any], text: str) -> None:
        before = open_files()
        with pytest.raises(InvalidOptionError, match=text):
            SocketTransport(incarnation=1, **options)
        assert open_files() == before

    def test_a_port_in_use_is_refused(self, make_zmq: Callable[..., Worker]) -> None:
        (address,) = make_zmq(ipc=False, tcp_host="127.0.0.1").transport.addresses
        with pytest.raises(InvalidOptionError, match="in use"):
            SocketTransport(ipc=False, tcp_host="127.0.0.1", tcp_port=int(address.rpartition(":")[2]), incarnation=1)


class _Interrupting:
    """A socket whose next message is broken off in the middle, as ^C would."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self._sends = 0

    def send(self, part: Any, *flags: int) -> int:
        self._sends += 1
        if not flags:
            self._real.send(part[: len(part) // 2])
        if not flags or self._sends == 2:
            raise KeyboardInterrupt
        return int(self._real.send(part, *flags) or 0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def test_a_message_that_was_interrupted_is_gone_whole(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    a.transport.send(b.id, [b"before", b"1"])
    link = a.transport._links[b.id]  # type: ignore[attr-defined]
    link._socket = _Interrupting(link._socket)
    with pytest.raises(KeyboardInterrupt):
        a.transport.send(b.id, [b"torn", b"2"])
    a.transport.send(b.id, [b"after", b"3"])
    assert sorted([b.message(), b.message()]) == [[b"after", b"3"], [b"before", b"1"]]


def open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.parametrize("kind", ["ipc", "tcp"])
def test_a_parting_zmq_socket_is_closed_when_its_time_is_over(worker: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqagent.transport.zmq._PARTING", 0.0)
    a, b = worker(0), worker(1)
    a.transport.connect(b.record)
    carrier = a.transport._carriers[0]  # type: ignore[attr-defined]
    a.transport.send(b.id, [b"x"])
    a.transport.disconnect(b.id, b.record.incarnation)
    ((_, parting),) = carrier._parting
    a.transport.connect(b.record)
    assert parting.closed
    assert carrier._parting == []


def test_it_says_where_it_listens_and_to_how_many_it_is_connected(worker: Make) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    assert repr(a.transport) == f"<SocketTransport {a.record.incarnation:x} at {a.record.addresses[0]}, 1 peers>"
    a.transport.close()
    assert repr(a.transport).endswith(", closed>")


def test_closing_leaves_no_open_files(kind: str) -> None:
    def live() -> None:
        a, b = start(kind, 0), start(kind, 1)
        introduce(a, b)
        a.transport.connect(elsewhere(dataclasses.replace(b.record, worker_id=WorkerId(2))))
        a.transport.send(b.id, [bytes(1 << 20)])
        assert isinstance(b.news(), Received)
        a.transport.receive(0)
        for each in (a, b):
            each.transport.close()

    live()  # pyzmq opens files of its own for the first large frame.
    before = open_files()
    live()
    assert open_files() == before


SETUP = """
import dataclasses, gc, os, sys, threading
from pathlib import Path
from tests.contract.harness import start, introduce
a, b = start("ipc", 0), start("ipc", 1)
introduce(a, b)
a.transport.connect(dataclasses.replace(b.record, host="another host", worker_id=2))
a.transport.send(1, [b"small", bytes(1 << 20)])
a.transport.receive(0)
"""


def run(script: str) -> str:
    """What the script prints; it must end by itself, well, and silently."""
    command = [sys.executable, "-W", "ignore", "-c", SETUP + script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, cwd=CHECKOUT, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def test_a_process_ends_though_it_never_closed_its_transport() -> None:
    script = """
def receive():
    while a.transport.receive(None):
        pass
threading.Thread(target=receive, daemon=True).start()
a.transport.send(1, [bytes(10 << 20)])
print(*a.transport.addresses)
"""
    address = run(script).strip()
    assert not Path(address.removeprefix("ipc://")).parent.exists()


def test_a_transport_that_is_dropped_unclosed_does_not_block() -> None:
    script = """
del a, b
gc.collect()
print("collected")
"""
    assert run(script) == "collected\n"


def test_a_forked_child_neither_uses_nor_closes_its_parents_sockets() -> None:
    script = """
from zmqagent.exceptions import ShutdownError
child = os.fork()
if child == 0:
    refused = 0
    for act in (lambda: a.transport.send(1, [b"x"]), lambda: a.transport.connect(b.record), lambda: a.transport.disconnect(1, 2)):
        try:
            act()
        except ShutdownError as error:
            refused += "forked" in str(error)
    assert refused == 3
    assert not a.transport.receive(None)
    a.transport.wake()
    a.transport.close()
    del a, b
    gc.collect()
    sys.exit(7)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
a.transport.send(1, [b"still there"])
b.message()
print(*b.message())
a.transport.close()
b.transport.close()
"""
    assert run(script) == "b'still there'\n"


@pytest.mark.parametrize("fails", ["socket", "connect"])
def test_without_the_means_for_a_connection_one_send_fails_and_a_later_one_succeeds(
    make_zmq: Callable[..., Worker], monkeypatch: pytest.MonkeyPatch, fails: str
) -> None:
    a, b = make_zmq(0, ipc=True, tcp_host=None), make_zmq(1, ipc=True, tcp_host=None)
    introduce(a, b)

    def refuse(*_: Any) -> None:
        raise zmq.ZMQError(errno.EMFILE)

    with monkeypatch.context() as patch:
        patch.setattr(zmq.Context if fails == "socket" else zmq.Socket, fails, refuse)
        with pytest.raises(SendFailedError, match=r"worker 'w1' \(1\) cannot be connected to just now: Too many open files"):
            a.transport.send(WorkerId(1), [b"x"])
    a.transport.send(WorkerId(1), [b"y"])
    assert b.message() == [b"y"]


@pytest.mark.parametrize("kind", ["ipc"])
def test_a_frame_larger_than_any_message_is_refused_by_its_head(worker: Make) -> None:
    carrier = worker(0).transport._carriers[0]  # type: ignore[attr-defined]
    assert carrier._pull.getsockopt(zmq.MAXMSGSIZE) == DEFAULT_LIMITS.message_bytes


@pytest.mark.parametrize("kind", ["local"])
def test_who_sends_no_messages_over_a_stream_is_hung_up_on(worker: Make, caplog: pytest.LogCaptureFixture) -> None:
    a, b = worker(0), worker(1)
    introduce(a, b)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.settimeout(PATIENCE)
        stranger.connect(a.record.addresses[0].removeprefix("unix://"))
        stranger.send(b"\xff" * 100)
        with receiving(a):
            assert stranger.recv(1) == b""
    assert "hung up on a peer on this host: a message of 4294967295 frames" in caplog.text
    b.transport.send(a.id, [b"well"])
    assert a.message() == [b"well"]
