"""Where a worker listens, by its options."""

from __future__ import annotations

import os
from urllib.parse import urlparse

from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.transport.hosts import local_address_towards
from zmqagent.transport.memory_limit import available_memory
from zmqagent.transport.sockets import SocketTransport

__all__ = ["bind"]

_MOST_SHARED = 1 << 30


def bind(options: ZmqRpcBackendOptions, incarnation: int, *, share_host: bool) -> SocketTransport:
    """A transport on which this worker can be reached: a Unix stream socket alone if all workers are known to share a host, TCP
    too otherwise; or what ``options`` say.

    Raises:
        RendezvousError, InvalidOptionError: no interface leads to the meeting point, or the address is not this machine's.
    """
    local = options.transport in ("auto", "local")
    tcp = options.transport == "tcp" or (options.transport == "auto" and not share_host)
    address = None
    if tcp:
        address = options.bind_address or local_address_towards(_store_host(options.init_method), 0)
    return SocketTransport(
        local=local,
        ipc=options.transport == "ipc",
        tcp_host=address,
        incarnation=incarnation,
        shared_memory=_default_share() if options.shared_memory is None else options.shared_memory,
    )


def _default_share() -> int:
    """Bytes of shared memory, if the options name none."""
    available = available_memory()
    return _MOST_SHARED if available is None else min(_MOST_SHARED, available // 8)


def _store_host(init_method: str) -> str:
    """The host of the rendezvous store; empty if it is a file."""
    url = urlparse(init_method)
    return os.environ.get("MASTER_ADDR", "") if url.scheme == "env" else url.hostname or ""
