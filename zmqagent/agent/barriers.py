"""The barriers of a static group, between the machine that decides (`Membership`) and the messages that carry them."""

from __future__ import annotations

import threading
from collections.abc import Callable

from zmqagent.agent.base import Reply, Respond
from zmqagent.agent.exchange import Exchange
from zmqagent.agent.group import Group
from zmqagent.agent.membership_events import SendBarrier
from zmqagent.exceptions import ProtocolError, RpcError, RpcTimeoutError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.commands import Barrier, BarrierPassed, parse
from zmqagent.wire.types import Message, WorkerId

__all__ = ["Barriers"]


class Barriers:
    """One worker's side of the barriers. All methods may be called from any thread.

    Args:
        me: this worker.
        group: its view of the group.
        exchange: for what is sent.
        patiently: waits by a function that takes seconds, until a time of the monotonic clock; says whether it was in time.
    """

    def __init__(
        self,
        me: PeerRecord,
        group: Group,
        exchange: Exchange,
        patiently: Callable[[Callable[[float], bool], float], bool],
    ) -> None:
        self._me = me
        self._group = group
        self._exchange = exchange
        self._patiently = patiently

    def wait(self, tag: str, value: int, deadline: float) -> int:
        """Waits until all workers have come to ``tag`` and returns the sum of their values.

        Raises:
            RpcTimeoutError: somebody had not come by ``deadline``, a time of the monotonic clock.
            RpcError: the barrier cannot be passed any more.
        """
        ended = threading.Event()
        outcomes: list[int | RpcError] = []

        def token(outcome: int | RpcError) -> None:
            outcomes.append(outcome)
            ended.set()

        self._group.enter_barrier(self._me.worker_id, tag, value, token)
        # Without a deadline it ends with the loss of a member, or shutdown.
        if not self._patiently(ended.wait, deadline):
            raise RpcTimeoutError(f"worker {self._me.name} waited in vain for all workers to come to the barrier {tag}")
        (outcome,) = outcomes
        if isinstance(outcome, RpcError):
            raise outcome
        return outcome

    def serve(self, source: WorkerId, message: Message, respond: Respond) -> None:
        """Serves the request of a worker that has come to a barrier."""
        barrier = parse(message)
        assert isinstance(barrier, Barrier)

        def answer(outcome: int | RpcError) -> None:
            if isinstance(outcome, RpcError):
                respond(self._exchange.failure(outcome))
            else:
                respond(BarrierPassed(outcome).to_message())

        self._group.enter_barrier(source, barrier.tag, barrier.value, answer)

    def send(self, asked: SendBarrier) -> None:
        """Asks the leader to let this worker pass."""

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, BarrierPassed):
                assert callable(asked.token)
                asked.token(reply.total)
            else:
                error = reply if isinstance(reply, RpcError) else ProtocolError(f"a barrier was answered by {reply!r:.100}")
                self._group.barrier_unanswered(asked, error)

        peer = self._group.find(asked.leader).record
        try:
            self._exchange.request(peer, Barrier(asked.tag, asked.value).to_message(), on_reply, timeout=0)
        except RpcError as error:
            self._group.barrier_unanswered(asked, error)
