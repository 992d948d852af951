"""What RRefs need of calls and of autograd. `rref` knows neither; this is the `RRefCalls` that it is given."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch.futures import Future

from zmqagent.agent.base import NO_TIMEOUT, Reply, Requester
from zmqagent.autograd.engine import DistEngine
from zmqagent.exceptions import ProtocolError, RpcError
from zmqagent.rpc import failures
from zmqagent.rpc.call_future import CallFuture
from zmqagent.rpc.messenger import Messenger
from zmqagent.rpc.profiler import RpcProfiler
from zmqagent.wire.commands import Ack, Failure, RRefBackward, RRefFetch
from zmqagent.wire.types import RRefId, WorkerId

__all__ = ["RpcRRefCalls"]


class RpcRRefCalls:
    """Fetches values and starts backward passes for RRefs. See `zmqagent.rref.rref.RRefCalls`."""

    def __init__(self, requester: Requester, messenger: Messenger, engine: DistEngine, profiler: RpcProfiler) -> None:
        self._requester = requester
        self._messenger = messenger
        self._engine = engine
        self._profiler = profiler

    def fetch(self, owner: WorkerId, rref_id: RRefId, timeout: float) -> Future[Any]:
        """Asks ``owner`` for the value of an RRef; the future holds it."""
        future = CallFuture(self._requester.devices)
        message = RRefFetch(rref_id).to_message()
        profiled = self._profiler.traced("RRef.to_here", owner)
        self._messenger.send(owner, message, future, timeout=timeout, attach_always=True, profiled=profiled)
        return future

    def backward_on_owner(self, owner: WorkerId, rref_id: RRefId, context_id: int, retain_graph: bool) -> None:
        """Runs a backward pass from the RRef's value where that is, and returns when it has ended.

        Raises:
            RpcError, or what the pass raised there.
        """
        # Python's own waiting, which ^C ends. A backward may take hours, so there is no timeout; the owner's death ends it.
        ended = threading.Event()
        replies: list[Reply] = []

        def on_reply(reply: Reply) -> None:
            replies.append(reply)
            ended.set()

        self._requester.request(owner, RRefBackward(rref_id, context_id, retain_graph).to_message(), on_reply, timeout=NO_TIMEOUT)
        ended.wait()
        (reply,) = replies
        if isinstance(reply, RpcError):
            raise reply
        if isinstance(reply, Failure):
            raise failures.rebuild(reply)
        if not isinstance(reply, Ack):
            raise ProtocolError(f"RRef.backward was answered by a {type(reply).__name__}")

    def backward_here(self, root: torch.Tensor, context_id: int, retain_graph: bool) -> None:
        """Runs a distributed backward pass from ``root``, a value that this worker owns."""
        self._engine.backward(context_id, [root], retain_graph)
