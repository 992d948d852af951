"""Who a process is to its peers, and which address of its machine leads where."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zmqagent.exceptions import RendezvousError
from zmqagent.transport import hosts
from zmqagent.transport.hosts import describe_self, host_identity, local_address_towards, process_start
from zmqagent.wire.types import WorkerId


class TestIdentity:
    def test_another_boot_or_namespace_is_another_host(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        before = host_identity()
        boot = tmp_path / "boot_id"
        boot.write_text("another boot\n")
        with monkeypatch.context() as patch:
            patch.setattr(hosts, "_BOOT_ID", boot)
            assert "another boot" in host_identity()
        with monkeypatch.context() as patch:
            patch.setattr(hosts, "_PID_NAMESPACE", tmp_path)
            assert host_identity() != before
        assert host_identity() == before

    def test_a_system_that_tells_no_boot_has_an_identity_too(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setattr(hosts, "_BOOT_ID", tmp_path / "missing")
        assert host_identity() == host_identity() != ""


class TestProcessStart:
    def test_it_stays_the_same_and_tells_processes_apart(self) -> None:
        own = process_start(os.getpid())
        assert own == process_start(os.getpid()) > 0
        with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as later:
            assert process_start(later.pid) > own
            later.kill()

    def test_a_name_with_blanks_and_parentheses_does_not_confuse_it(self, tmp_path: Path) -> None:
        program = tmp_path / "a) b (c"
        program.symlink_to(Path("/bin/cat"))
        with subprocess.Popen([program], stdin=subprocess.PIPE) as child:
            assert process_start(child.pid) >= process_start(os.getpid())
            child.kill()

    def test_a_process_that_is_gone_has_none(self) -> None:
        with subprocess.Popen([sys.executable, "-c", ""]) as child:
            child.wait()
        assert process_start(child.pid) == 0


def test_the_record_describes_this_process() -> None:
    record = describe_self("w", WorkerId(3), 7, ["ipc:///x"])
    assert (record.name, record.worker_id, record.incarnation, record.addresses) == ("w", 3, 7, ("ipc:///x",))
    assert (record.host, record.pid, record.started) == (host_identity(), os.getpid(), process_start(os.getpid()))


class TestLocalAddress:
    @pytest.mark.parametrize("host", ["", "localhost", "127.0.0.1", "127.0.0.9"])
    def test_loopback_stays_loopback(self, host: str) -> None:
        assert local_address_towards(host, 29500).startswith("127.")

    def test_loopback_stays_loopback_in_ipv6(self) -> None:
        assert local_address_towards("::1", 29500) == "::1"

    def test_it_is_the_address_of_the_interface_that_leads_there(self, monkeypatch: pytest.MonkeyPatch) -> None:
        routes = {"10.1.2.3": "10.1.0.1", "10.9.9.9": "10.9.0.1"}
        monkeypatch.setattr(hosts, "_route", lambda _family, target: routes[target[0]])
        assert local_address_towards("10.1.2.3", 29500) == "10.1.0.1"
        assert local_address_towards("10.9.9.9", 29500) == "10.9.0.1"

    def test_a_name_that_resolves_to_loopback_leads_to_the_default_route(self, monkeypatch: pytest.MonkeyPatch) -> None:
        _resolve_all_to(monkeypatch, "127.0.1.1")
        monkeypatch.setattr(hosts, "_route", lambda _family, target: "127.0.0.1" if target[0] == "127.0.1.1" else "10.0.0.7")
        assert local_address_towards("this-machine", 29500) == "10.0.0.7"

    def test_without_a_default_route_it_stays_loopback(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def route(_family: int, target: tuple[Any, ...]) -> str:
            if target[0] != "127.0.1.1":
                raise OSError("no route")
            return "127.0.0.1"

        _resolve_all_to(monkeypatch, "127.0.1.1")
        monkeypatch.setattr(hosts, "_route", route)
        assert local_address_towards("this-machine", 29500) == "127.0.0.1"

    def test_a_host_that_cannot_be_resolved_is_an_error_that_names_it(self) -> None:
        with pytest.raises(RendezvousError, match="leads to 'no such host'"):
            local_address_towards("no such host", 29500)


def _resolve_all_to(monkeypatch: pytest.MonkeyPatch, address: str) -> None:
    def resolve(host: str, port: int | None, **options: Any) -> Any:
        if options.get("flags", 0) & socket.AI_NUMERICHOST:
            raise socket.gaierror("not numeric")
        return [(socket.AF_INET, socket.SOCK_DGRAM, 0, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", resolve)
