"""The one place where something may get between a worker and the wire. A worker in production has no detour."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

from zmqagent.wire.types import WorkerId

__all__ = ["Deliver", "Detour"]

Deliver = Callable[[WorkerId, list[Any]], None]
"""Sends the frames of one message straight to a worker, as if there were no detour."""


class Detour(Protocol):
    """Is given every message that its worker sends, those to itself included. Both methods may be called from any thread."""

    def send(self, to: WorkerId, frames: list[Any], deliver: Deliver) -> None:
        """Passes the message on by ``deliver(to, frames)``, now or later and from any thread, or fails.

        Raises:
            SendFailedError: this attempt has failed; see `zmqagent.agent.base.Requester.request` for what becomes of the call.
            RpcError: whatever ``deliver`` raised.
        """

    def close(self) -> None:
        """The worker shuts down: drops what has not been passed on, and ends the detour's threads. Idempotent."""
