"""Which messages fail, and which leave late: the choice alone.

Pure. Message types go by torch's names (``torch/csrc/distributed/rpc/message.h``). A message that travels inside another one, as
those of an autograd context do, counts as what it is inside.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from zmqagent.exceptions import InvalidOptionError
from zmqagent.testing.identity import identity
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["Fail", "Faults", "Send", "Verdict", "message_type"]

_TYPES: dict[str, MessageType] = {
    **{
        kind.name: kind
        for kind in (
            MessageType.SCRIPT_CALL,
            MessageType.PYTHON_CALL,
            MessageType.SCRIPT_REMOTE_CALL,
            MessageType.PYTHON_REMOTE_CALL,
            MessageType.PYTHON_RREF_FETCH_CALL,
            MessageType.RREF_USER_DELETE,
            MessageType.RREF_FORK_REQUEST,
            MessageType.RREF_CHILD_ACCEPT,
            MessageType.RREF_BACKWARD_REQ,
            MessageType.BACKWARD_AUTOGRAD_REQ,
            MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ,
        )
    },
    # torch fetches the results of operators and TorchScript functions by a message of its own; here all are fetched alike.
    "SCRIPT_RREF_FETCH_CALL": MessageType.PYTHON_RREF_FETCH_CALL,
}


def message_type(name: str) -> MessageType:
    """The message type here for torch's ``name``.

    Raises:
        InvalidOptionError: torch has no such message, or it has no counterpart here that could fail.

    >>> message_type("SCRIPT_RREF_FETCH_CALL").name
    'PYTHON_RREF_FETCH_CALL'
    """
    kind = _TYPES.get(name)
    if kind is None:
        raise InvalidOptionError(
            f"No mapping to rpc::MessageType exists for {name}. Those that can fail or be delayed are: {', '.join(_TYPES)}."
        )
    return kind


@dataclass(frozen=True, slots=True)
class Send:
    """Let the message go, ``delay`` seconds from now."""

    delay: float


@dataclass(frozen=True, slots=True)
class Fail:
    """Let this attempt to send the message fail, with ``text``."""

    text: str


Verdict = Send | Fail


class Faults:
    """Judges every attempt to send a message. Not thread-safe: whoever calls it holds a lock.

    Args:
        num_fail_sends: how many attempts to send one message fail before one succeeds. Messages to one worker are one message if
            they have one `identity`.
        messages_to_fail: the types of the messages that fail, by torch's names.
        messages_to_delay: by torch's names, how many seconds messages are held back, once they do not fail any more. Of several
            names for one type here, the longest delay counts.

    Raises:
        InvalidOptionError: a name is unknown.
    """

    def __init__(self, num_fail_sends: int, messages_to_fail: Iterable[str], messages_to_delay: Mapping[str, float]) -> None:
        self._num_fail_sends = num_fail_sends
        self._failing = {message_type(name) for name in messages_to_fail}
        self._delays: dict[MessageType, float] = {}
        for name, seconds in messages_to_delay.items():
            kind = message_type(name)
            self._delays[kind] = max(seconds, self._delays.get(kind, 0.0))
        self._failures: Counter[tuple[WorkerId, MessageType, bytes]] = Counter()

    def judge(self, to: WorkerId, message: Message) -> Verdict:
        """What is to become of this attempt to send ``message`` (not a wrapper of it) to ``to``.

        Raises:
            ProtocolError: ``message`` does not have the fields of its type.
        """
        if message.type in self._failing:
            key = (to, message.type, identity(message))
            if self._failures[key] < self._num_fail_sends:
                self._failures[key] += 1
                return Fail(
                    f"Send attempt failed intentionally for a {message.type.name} to worker {to} "
                    f"({self._failures[key]} of {self._num_fail_sends})"
                )
        return Send(self._delays.get(message.type, 0.0))
