"""Whether a worker that is only known by its record still lives."""

from __future__ import annotations

import os
import socket
from urllib.parse import urlparse

from zmqagent.transport.base import PeerRecord
from zmqagent.transport.hosts import host_identity
from zmqagent.transport.process_watch import is_process

__all__ = ["has_ended"]

_CONNECT_TIMEOUT = 5.0
"""Seconds until a host that does not answer counts as down: a lost first packet costs one, the second two more."""


def has_ended(peer: PeerRecord) -> bool:
    """Whether the worker of this record has ended for certain, or its host cannot be reached.

    On this host the process tells; a former life of this very process has ended, since a process has one at a time. On other
    hosts a worker lives if anything accepts connections at its address; one without such an address may live.
    """
    if peer.host == host_identity():
        return peer.pid == os.getpid() or not is_process(peer)
    addresses = [urlparse(address) for address in peer.addresses if address.startswith("tcp://")]
    return bool(addresses) and not any(_accepts(address.hostname or "", address.port or 0) for address in addresses)


def _accepts(host: str, port: int) -> bool:
    try:
        socket.create_connection((host, port), _CONNECT_TIMEOUT).close()
    except OSError:
        return False
    return True
