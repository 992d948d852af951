"""The two seams between the agent and what stands above it: requests going down, requests coming up.

`rref` and `autograd` see the agent only as a `Requester`, so that both can be tested without sockets. The agent sees everything
above it only as a `RequestCallback` (torch's own term), so that it never unpickles and imports nothing from above.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch

from zmqagent.agent.devices import DeviceMap
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError, RpcError
from zmqagent.wire.commands import Command
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = [
    "NO_TIMEOUT",
    "UNSET_TIMEOUT",
    "OnReply",
    "OnUnreadableRequest",
    "OnUnusedAnswer",
    "Reply",
    "ReplyTaker",
    "RequestCallback",
    "Requester",
    "Respond",
    "UnreadAnswer",
    "check_timeout",
]

UNSET_TIMEOUT = -1.0
"""As a timeout: the agent's default (``rpc_timeout`` of the options, or what ``_set_rpc_timeout`` set)."""

NO_TIMEOUT = 0.0
"""As a timeout: none; only an answer, the peer's death or shutdown ends the call."""


def check_timeout(timeout: Any, *, may_be_unset: bool = True) -> float:
    """A timeout as a user gave it: seconds, `NO_TIMEOUT`, or `UNSET_TIMEOUT` where that ``may_be_unset``.

    >>> check_timeout(-1)
    -1.0

    Raises:
        InvalidTypeError: it is no number.
        InvalidOptionError: it is another negative number, infinite or not a number.
    """
    # Asking an abstract class takes longer than all the rest.
    if type(timeout) is not float and not isinstance(timeout, numbers.Real):
        raise InvalidTypeError(f"a timeout is a number of seconds, not a {type(timeout).__name__}; 0 stands for no limit")
    try:
        seconds = float(timeout)
    except OverflowError:
        seconds = math.inf
    if not (0 <= seconds < math.inf or (seconds == UNSET_TIMEOUT and may_be_unset)):
        others = "0 for no limit, or -1 for the agent's default" if may_be_unset else "or 0 for no limit"
        raise InvalidOptionError(f"a timeout is a finite number of seconds, {others}, and not {timeout!s:.40}")
    return seconds


Reply = Command | RpcError
"""What became of a request: the peer's answer, or why there is none. A peer's `Failure` with an error code arrives as that
`RpcError`; one with code 0 (a user function raised) arrives as the `Failure`, for whoever can unpickle it."""

OnReply = Callable[[Reply], None]


class UnreadAnswer:
    """A peer's answer as it arrived.

    Args:
        type: of the message.
        fields: of the message.
        read: makes the `Reply` of it; to be called once at most.
    """

    __slots__ = ("fields", "read", "type")

    def __init__(self, type: MessageType, fields: tuple[Any, ...], read: Callable[[], Reply]) -> None:
        self.type = type
        self.fields = fields
        self.read = read


class ReplyTaker:
    """An `OnReply` that may take an answer before it is read, which spares a thread of the agent the reading."""

    __slots__ = ()

    def __call__(self, reply: Reply) -> None:
        """See `OnReply`."""
        raise NotImplementedError

    def take_unread(self, answer: UnreadAnswer) -> bool:
        """Whether it takes ``answer`` and sees to it that it is read; if not, it is called with the reply, as any `OnReply`. Runs
        on a thread that receives, hence no user code, and does not block."""
        raise NotImplementedError


Respond = Callable[[Message], bool]
"""Answers a request. False if the message cannot travel: whoever asked was told so in its place."""

OnUnusedAnswer = Callable[[Message], None]
"""Told of an answer that nobody takes: its call has ended already, or its tensors, which are left out, cannot be rebuilt here."""


OnUnreadableRequest = Callable[[Message, RpcError], RpcError]
"""Told of a request whose tensors, which are left out, cannot be rebuilt here, and why. Returns what whoever asked is told."""


class Requester(Protocol):
    """The agent, as the layers above it see it. All methods may be called from any thread."""

    @property
    def worker_id(self) -> WorkerId:
        """This worker's id."""

    def worker_name(self, worker_id: WorkerId) -> str:
        """The name of a member of the group; a readable stand-in if the id is unknown."""

    @property
    def devices(self) -> Sequence[torch.device]:
        """The accelerators of this worker that tensors arrive on, if a `torch.futures.Future` can carry them; else none."""

    def map_back(self, caller: WorkerId) -> DeviceMap:
        """From this worker's devices to those of ``caller``: how the answers to its requests, and the gradients of these, go."""

    def request(
        self,
        to: WorkerId,
        message: Message,
        on_reply: OnReply,
        *,
        timeout: float = UNSET_TIMEOUT,
        retry: bool = False,
        device_map: DeviceMap | None = None,
    ) -> None:
        """Sends ``message`` to ``to`` (which may be this worker itself).

        ``on_reply`` runs exactly once, later, on a thread of the agent that holds no lock and does not receive: it may block,
        send and run user code. It never runs inside this call. ``retry`` is for idempotent messages: they are sent again (5
        tries, 1 s x 1.5^n apart) until an answer comes. ``device_map``, from this worker's devices to the callee's, says where
        tensors are to arrive; None stands for this worker's own map for the callee.

        Raises:
            RpcError: a fault found before anything was accepted (unknown worker, device without a map, shutdown); then
                ``on_reply`` never runs. `SendFailedError` is one only without ``retry``: with it, a later try may succeed.
        """


class RequestCallback(Protocol):
    """What the agent hands every request to."""

    def __call__(self, source: WorkerId, message: Message, respond: Respond) -> None:
        """Serves one request, on a thread of the agent that may run user code.

        ``respond`` must be called exactly once, now or later and from any thread; an exception raised here is answered by the
        agent as a `Failure`. Tensors of ``message`` are torch tensors again.
        """
