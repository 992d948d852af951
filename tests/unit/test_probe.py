"""`zmqagent.transport.probe`: a worker known only by its record lives, has ended, or cannot be judged."""

from __future__ import annotations

import dataclasses
import os
import socket
import subprocess
import sys

from zmqagent.transport.base import PeerRecord
from zmqagent.transport.hosts import describe_self, process_start
from zmqagent.transport.probe import has_ended
from zmqagent.wire.types import WorkerId


def record_of(pid: int, started: int) -> PeerRecord:
    return dataclasses.replace(describe_self("w", WorkerId(0), 1, ("ipc:///tmp/x",)), pid=pid, started=started)


def elsewhere(*addresses: str) -> PeerRecord:
    return PeerRecord("w", WorkerId(0), 1, "another host", os.getpid(), addresses)


def test_a_process_on_this_host_has_ended_when_it_is_no_more() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        started = process_start(child.pid)
        assert not has_ended(record_of(child.pid, started))
        assert has_ended(record_of(child.pid, started + 1)), "that pid belongs to another process now"
        child.communicate(b"\n")
    assert has_ended(record_of(child.pid, started))


def test_a_former_life_of_this_process_has_ended() -> None:
    assert has_ended(record_of(os.getpid(), process_start(os.getpid())))


def test_a_worker_elsewhere_lives_if_its_address_accepts_connections() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"
        assert not has_ended(elsewhere("ipc:///tmp/x", address))
    assert has_ended(elsewhere("ipc:///tmp/x", address))


def test_a_worker_elsewhere_without_a_tcp_address_may_live() -> None:
    assert not has_ended(elsewhere("ipc:///tmp/x"))
