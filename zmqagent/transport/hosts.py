"""Who this process is to its peers: the host it runs on, when it started, and which of its addresses reaches a given machine.

Knows the operating system, and nothing of ZeroMQ.
"""

from __future__ import annotations

import os
import platform
import socket
import uuid
from collections.abc import Sequence
from pathlib import Path

from zmqagent.exceptions import RendezvousError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = ["describe_self", "host_identity", "local_address_towards", "process_start"]

LOOPBACK = "127.0.0.1"

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_PID_NAMESPACE = Path("/proc/self/ns/pid")
# Kept free for documentation by RFC 5737: whatever leads there is the default route. Nothing is ever sent.
_BEYOND = "192.0.2.1"
# Field 22 of /proc/<pid>/stat (proc(5)), counted from the field after the name, which is the third.
_START_FIELD = 22 - 3


def host_identity() -> str:
    """A text that two processes share exactly if they run under one kernel and see each other's process ids.

    It holds the machine's name, its boot, and the process-id namespace: containers on one machine are hosts of their own, and so
    are virtual machines cloned from one snapshot. Where the kernel tells neither boot nor namespace (macOS), the machine's
    hardware address stands in.
    """
    try:
        return f"{platform.node()}/{_BOOT_ID.read_text().strip()}/{_PID_NAMESPACE.stat().st_ino}"
    except OSError:
        return f"{platform.node()}/{uuid.getnode():012x}"


def process_start(pid: int) -> int:
    """When process ``pid`` started, in the kernel's clock ticks since boot; 0 if it is gone or the system does not tell.

    Together with the pid this names a process for as long as the machine runs, though pids are used again.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_bytes()
    except OSError:
        return 0
    # The name, in parentheses, may itself hold blanks and parentheses: only its last one ends it.
    return int(stat.rpartition(b")")[2].split()[_START_FIELD])


def describe_self(name: str, worker_id: WorkerId, incarnation: int, addresses: Sequence[str], devices: str = "") -> PeerRecord:
    """The record that this process publishes; ``addresses`` are those of its transport, ``devices`` what it tells of its own."""
    pid = os.getpid()
    return PeerRecord(name, worker_id, incarnation, host_identity(), pid, tuple(addresses), process_start(pid), devices=devices)


def local_address_towards(host: str, port: int) -> str:
    """The address of this machine's interface that reaches ``host``, usually the machine of the rendezvous store.

    A worker that binds it can be reached by all that reach the store the same way. Loopback names and addresses stay loopback; so
    does an empty ``host`` (the store is a file: workers on several machines must then name their address themselves). A name
    that merely *resolves* to loopback, as a machine's own name does on Debian, leads to the interface of the default route, since
    other machines resolve the name otherwise.

    Args:
        host: a name or a numeric IPv4 or IPv6 address.
        port: any port; nothing is sent.

    Raises:
        RendezvousError: ``host`` cannot be resolved, or no interface leads there.
    """
    if not host or host == "localhost":
        return LOOPBACK
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)
        family, _, _, _, target = found[0]
        local = _route(family, target)
    except OSError as error:
        raise RendezvousError(
            f"no interface of this machine leads to {host!r}, where the rendezvous store is said to be: {error}. Check the "
            "address in init_method or MASTER_ADDR."
        ) from error
    if _is_loopback(local) and not _is_numeric(host):
        return _default_interface() or local
    return local


def _route(family: int, target: tuple[str | int, ...] | tuple[int, bytes]) -> str:
    """The local address that the kernel picks towards ``target``: connecting a datagram socket sends nothing."""
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(target)
        return str(probe.getsockname()[0])


def _default_interface() -> str | None:
    try:
        return _route(socket.AF_INET, (_BEYOND, 9))
    except OSError:
        return None


def _is_loopback(address: str) -> bool:
    return address == "::1" or address.startswith("127.")


def _is_numeric(host: str) -> bool:
    try:
        socket.getaddrinfo(host, None, flags=socket.AI_NUMERICHOST)
    except socket.gaierror:
        return False
    return True
