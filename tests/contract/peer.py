"""A worker in a process of its own, to be killed, stopped or left alone."""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from tests.contract.harness import PATIENCE, Worker, start
from zmqagent.transport.base import PeerRecord, Received

CHECKOUT = Path(__file__).resolve().parents[2]


@contextmanager
def remote_peer(worker: Worker, kind: str, messages: int = 0) -> Iterator[tuple[BaseProcess, PeerRecord]]:
    """A peer in another process; all its ``messages`` have left it. ``worker`` is known to it, but does not know it yet.

    It then sends back whatever it receives until it is ended.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    ours, theirs = context.Pipe()
    with pytest.MonkeyPatch.context() as patch, ours:
        # The server of Python 3.11 does not take over sys.path.
        patch.setenv("PYTHONPATH", str(CHECKOUT))
        child = context.Process(target=_live, args=(theirs, worker.record, kind, messages))
        child.start()
        theirs.close()
        try:
            assert ours.poll(PATIENCE)
            yield child, ours.recv()
        finally:
            child.kill()
            child.join()
            child.close()


def _live(pipe: Connection, peer: PeerRecord, kind: str, messages: int) -> None:
    me = start(kind, 1)
    if messages:
        # Only the end of a transport tells that all has left it.
        sender = start(kind, 1)
        sender.transport.connect(peer)
        for number in range(messages):
            sender.transport.send(peer.worker_id, [b"%d" % number])
        sender.transport.close(linger=PATIENCE)
    me.transport.connect(peer)
    pipe.send(me.record)
    while True:
        for event in me.transport.receive(None):
            if isinstance(event, Received):
                me.transport.send(peer.worker_id, event.frames)
