"""The goodbyes of workers, as messages without an answer. (Who leaves a dynamic group in peace announces that: `Admission`.)"""

from __future__ import annotations

import logging

from zmqagent.agent.exchange import Exchange
from zmqagent.agent.group import Group
from zmqagent.agent.membership_events import SayGoodbye
from zmqagent.exceptions import RpcError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.commands import Goodbye, parse
from zmqagent.wire.types import Message, WorkerId

__all__ = ["Farewell"]

_logger = logging.getLogger(__name__)


class Farewell:
    """Says goodbye for one worker, and hears those of others. Both methods may be called from any thread."""

    def __init__(self, me: PeerRecord, group: Group, exchange: Exchange) -> None:
        self._me = me
        self._group = group
        self._exchange = exchange

    def say(self, goodbye: SayGoodbye) -> None:
        """This worker goes."""
        message = Goodbye(self._me.incarnation, goodbye.reason).to_message()
        for worker_id in goodbye.to:
            try:
                self._exchange.notify(self._group.find(worker_id).record, message)
            except RpcError as error:
                # It is going itself, or has gone.
                _logger.debug("no goodbye to worker %d: %s", worker_id, error)

    def serve(self, source: WorkerId, message: Message) -> None:
        """Another one goes. By now its next life may have joined, which stays."""
        goodbye = parse(message)
        assert isinstance(goodbye, Goodbye)
        self._group.on_goodbye(source, goodbye.incarnation, goodbye.reason)
