"""Where a worker listens, and which of a peer's endpoints can be reached from here.

A Unix socket lives in a private directory that only its owner can enter. A killed process leaves its directory behind; the
name says which process that was, and the next worker to start on the host removes the directories of processes that are gone.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import socket
import tempfile
import weakref
from pathlib import Path

from zmqagent.exceptions import InvalidOptionError
from zmqagent.transport.base import PeerRecord
from zmqagent.transport.hosts import host_identity, process_start

__all__ = ["MAX_IPC_PATH", "SocketDirectory", "is_wildcard", "reachable_address", "stream_path", "sweep", "tcp_endpoint"]

MAX_IPC_PATH = 107
"""The longest path of a Unix socket in bytes: ``sun_path`` of unix(7) without its closing zero."""

_SOCKET = "in"
_NAME = re.compile(r"zmqagent-(?P<host>[0-9a-f]{8})-(?P<pid>\d+)-(?P<start>\d+)-\w+")
# What mkdtemp adds to the prefix, a slash, and the socket's own name.
_REST = 16


class SocketDirectory:
    """A fresh directory of mode 0700 for one Unix socket. Removed by `remove`, when collected, or at exit; never by a fork."""

    def __init__(self) -> None:
        prefix = f"zmqagent-{_host_digest()}-{os.getpid()}-{process_start(os.getpid())}-"
        base = _base_directory(len(prefix))
        sweep(base)
        self.path = Path(tempfile.mkdtemp(prefix=prefix, dir=base))
        self._finalizer = weakref.finalize(self, _remove, self.path, os.getpid())

    @property
    def socket_path(self) -> str:
        """Where the socket lies."""
        return str(self.path / _SOCKET)

    @property
    def endpoint(self) -> str:
        """Its ZeroMQ endpoint."""
        return f"ipc://{self.socket_path}"

    @property
    def stream_address(self) -> str:
        """Its address if it is no ZeroMQ socket, but a plain stream socket."""
        return f"unix://{self.socket_path}"

    def remove(self) -> None:
        """Removes the directory with what is in it. Idempotent."""
        self._finalizer()


def sweep(base: Path) -> None:
    """Removes from ``base`` the directories of this user's processes on this host that are gone."""
    for entry in base.glob(f"zmqagent-{_host_digest()}-*"):
        match = _NAME.fullmatch(entry.name)
        # Where process_start tells nothing (0), a pid that was used again keeps the directory: harmless, and swept later.
        if match and not _runs(int(match["pid"]), int(match["start"])):
            # Another worker may be sweeping too, and another user's directory stays.
            shutil.rmtree(entry, ignore_errors=True)


def reachable_address(peer: PeerRecord, host: str) -> str | None:
    """The first of the peer's addresses that can be reached from ``host``; None if there is none.

    A Unix socket counts only where it can be opened: containers may share process ids and not files, and users do not share
    private directories.
    """
    for address in peer.addresses:
        scheme, _, where = address.partition("://")
        if scheme == "tcp" or (scheme == "ipc" and peer.host == host and os.access(where, os.W_OK)):
            return address
    return None


def stream_path(address: str) -> str | None:
    """The path of the Unix stream socket at ``address``, if that is one that can be opened from here; else None."""
    scheme, _, path = address.partition("://")
    return path if scheme == "unix" and os.access(path, os.W_OK) else None


def tcp_endpoint(host: str, port: int) -> str:
    """The ZeroMQ endpoint for ``host``, a name or an address, in numbers; port 0 leaves the choice to the kernel.

    Raises:
        InvalidOptionError: ``host`` is neither an address nor a name that resolves.
    """
    return f"tcp://{_resolve(host)}:{port or '*'}"


def is_wildcard(host: str) -> bool:
    """Whether ``host`` stands for all interfaces: good to listen on, useless to connect to.

    Raises:
        InvalidOptionError: ``host`` is neither an address nor a name that resolves.
    """
    return _resolve(host) in ("0.0.0.0", "[::]")


def _resolve(host: str) -> str:
    try:
        family, _, _, _, sockaddr = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise InvalidOptionError(f"cannot listen on {host!r}: {error}. Give an address of this machine.") from error
    return f"[{sockaddr[0]}]" if family == socket.AF_INET6 else str(sockaddr[0])


def _host_digest() -> str:
    # /tmp may be shared between containers, where a pid says nothing of a process of another container.
    return hashlib.sha256(host_identity().encode()).hexdigest()[:8]


def _base_directory(prefix_length: int) -> Path:
    base = Path(tempfile.gettempdir())
    # TMPDIR is long on macOS and on many clusters; /tmp exists wherever Unix sockets do.
    fits = len(os.fsencode(base)) + 1 + prefix_length + _REST <= MAX_IPC_PATH
    return base if fits else Path("/tmp")


def _runs(pid: int, start: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process_start(pid) in (start, 0)


def _remove(path: Path, owner: int) -> None:
    if os.getpid() == owner:
        shutil.rmtree(path, ignore_errors=True)
