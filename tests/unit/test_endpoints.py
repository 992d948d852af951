"""Directories of sockets, what is left of killed processes, and the choice among a peer's addresses."""

from __future__ import annotations

import gc
import os
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmqagent.exceptions import InvalidOptionError
from zmqagent.transport import endpoints
from zmqagent.transport.base import PeerRecord
from zmqagent.transport.endpoints import MAX_IPC_PATH, SocketDirectory, is_wildcard, reachable_address, sweep, tcp_endpoint
from zmqagent.transport.hosts import process_start
from zmqagent.wire.types import WorkerId


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The directory that temporary ones are made in; pytest's own has too long a path."""
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.setattr("tempfile.gettempdir", lambda: short)
        yield Path(short)


class TestDirectory:
    def test_it_is_private_new_each_time_and_short(self, base: Path) -> None:
        one, other = SocketDirectory(), SocketDirectory()
        assert one.path != other.path
        assert one.path.parent == base
        assert stat.S_IMODE(one.path.stat().st_mode) == 0o700
        assert len(os.fsencode(one.endpoint.removeprefix("ipc://"))) <= MAX_IPC_PATH

    def test_removing_takes_its_contents_along_and_can_be_repeated(self, base: Path) -> None:
        directory = SocketDirectory()
        (directory.path / "in").touch()
        directory.remove()
        directory.remove()
        assert list(base.iterdir()) == []

    def test_one_that_nobody_removed_goes_with_its_owner(self, base: Path) -> None:
        directory = SocketDirectory()
        del directory
        gc.collect()
        assert list(base.iterdir()) == []

    def test_a_base_with_a_long_path_is_not_used(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        long = tmp_path / ("x" * 90)
        long.mkdir()
        monkeypatch.setattr("tempfile.gettempdir", lambda: str(long))
        directory = SocketDirectory()
        try:
            assert directory.path.parent == Path("/tmp")
        finally:
            directory.remove()

    def test_a_forked_child_does_not_remove_it(self, base: Path) -> None:
        directory = SocketDirectory()
        endpoints._remove(directory.path, owner=os.getpid() + 1)
        assert directory.path.exists()
        directory.remove()


class TestSweep:
    def leftover(self, base: Path, pid: int, start: int, host: str | None = None) -> Path:
        path = base / f"zmqagent-{host or endpoints._host_digest()}-{pid}-{start}-abcdefgh"
        path.mkdir()
        (path / "in").touch()
        return path

    def test_the_next_start_removes_what_a_dead_process_left(self, base: Path) -> None:
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
            path = self.leftover(base, child.pid, process_start(child.pid))
            sweep(base)
            assert path.exists()
            child.kill()
        SocketDirectory()
        assert not path.exists()

    def test_a_pid_that_was_used_again_does_not_keep_it(self, base: Path) -> None:
        path = self.leftover(base, os.getpid(), process_start(os.getpid()) - 1)
        sweep(base)
        assert not path.exists()

    def test_directories_of_other_hosts_and_of_other_programs_stay(self, base: Path) -> None:
        gone = 2**22 + 1  # above any pid
        kept = [self.leftover(base, gone, 1, host="00000000"), base / f"zmqagent-{endpoints._host_digest()}-notes"]
        kept[1].mkdir()
        sweep(base)
        assert all(path.exists() for path in kept)


class TestReachableAddress:
    def peer(self, *addresses: str, host: str = "here") -> PeerRecord:
        return PeerRecord("w", WorkerId(1), 1, host, 1, addresses)

    def test_the_first_that_works_is_taken(self, tmp_path: Path) -> None:
        path = tmp_path / "in"
        path.touch()
        ipc, tcp = f"ipc://{path}", "tcp://127.0.0.1:1"
        assert reachable_address(self.peer(ipc, tcp), "here") == ipc
        assert reachable_address(self.peer(tcp, ipc), "here") == tcp

    def test_a_unix_socket_is_for_the_same_host_only(self, tmp_path: Path) -> None:
        path = tmp_path / "in"
        path.touch()
        peer = self.peer(f"ipc://{path}", "tcp://10.0.0.1:1", host="there")
        assert reachable_address(peer, "here") == "tcp://10.0.0.1:1"

    def test_a_unix_socket_that_cannot_be_seen_from_here_is_passed_over(self, tmp_path: Path) -> None:
        ipc = f"ipc://{tmp_path / 'missing'}"
        assert reachable_address(self.peer(ipc, "tcp://10.0.0.1:1"), "here") == "tcp://10.0.0.1:1"
        assert reachable_address(self.peer(ipc), "here") is None


class TestTcpEndpoint:
    def test_addresses_become_endpoints(self) -> None:
        assert tcp_endpoint("127.0.0.1", 0) == "tcp://127.0.0.1:*"
        assert tcp_endpoint("127.0.0.1", 5) == "tcp://127.0.0.1:5"
        assert tcp_endpoint("::1", 5) == "tcp://[::1]:5"

    def test_wildcards_are_known_however_they_are_written(self) -> None:
        assert all(is_wildcard(host) for host in ("0.0.0.0", "::", "0"))
        assert not any(is_wildcard(host) for host in ("127.0.0.1", "::1"))

    def test_what_does_not_resolve_is_refused(self) -> None:
        with pytest.raises(InvalidOptionError, match="cannot listen on 'no such host'"):
            tcp_endpoint("no such host", 0)
