"""The words of the protocol: ids, message types and the message itself.

Pure: nothing here knows of sockets, threads, clocks or torch. The numbers of `MessageType` are torch's own
(``torch/csrc/distributed/rpc/message.h``), so that logs and fault injection speak torch's language; those from 0x40 on are ours.
"""

from __future__ import annotations

import enum
import reprlib
from collections.abc import Sequence
from typing import Any, NamedTuple, NewType

from zmqagent.wire.frozen import frozen

__all__ = [
    "ANSWERS",
    "MAX_INT",
    "MAX_WORKER_ID",
    "REQUEST_BIT",
    "RESPONSE_BIT",
    "AutogradMetadata",
    "ForkData",
    "ForkId",
    "Message",
    "MessageType",
    "RRefId",
    "WorkerId",
    "shown",
]

WorkerId = NewType("WorkerId", int)
"""A worker's rank in its group, an int16 in torch."""

MAX_WORKER_ID = (1 << 15) - 1
MAX_INT = (1 << 63) - 1
"""The largest of all other integers that travel; none is negative."""

REQUEST_BIT = 0x100
RESPONSE_BIT = 0x200


class RRefId(NamedTuple):
    """Names one RRef in the whole group: the worker that minted the id, and that worker's running number."""

    created_on: int
    local_id: int

    def __str__(self) -> str:
        return f"GloballyUniqueId(created_on={self.created_on}, local_id={self.local_id})"


class ForkId(NamedTuple):
    """Names one fork (one user's share) of an RRef; drawn from the same counter as `RRefId`."""

    created_on: int
    local_id: int

    def __str__(self) -> str:
        return f"GloballyUniqueId(created_on={self.created_on}, local_id={self.local_id})"


ForkData = tuple[int, int, int, int, int, int, str]
"""A share in an RRef as it is pickled, in torch's order: owner, RRef id (2), fork id (2), parent, type."""


class AutogradMetadata(NamedTuple):
    """Ties the tensors of one message to a context: ``context_id`` and the id of the send/recv pair."""

    context_id: int
    message_id: int


class MessageType(enum.IntEnum):
    """What a message is; the bits 0x100 and 0x200 tell requests from responses, as in torch."""

    SCRIPT_CALL = 0x00 | REQUEST_BIT
    SCRIPT_RET = 0x01 | RESPONSE_BIT
    PYTHON_CALL = 0x02 | REQUEST_BIT
    PYTHON_RET = 0x03 | RESPONSE_BIT
    SCRIPT_REMOTE_CALL = 0x04 | REQUEST_BIT
    PYTHON_REMOTE_CALL = 0x05 | REQUEST_BIT
    REMOTE_RET = 0x06 | RESPONSE_BIT
    SCRIPT_RREF_FETCH_CALL = 0x07 | REQUEST_BIT
    PYTHON_RREF_FETCH_CALL = 0x08 | REQUEST_BIT
    SCRIPT_RREF_FETCH_RET = 0x09 | RESPONSE_BIT
    PYTHON_RREF_FETCH_RET = 0x0A | RESPONSE_BIT
    RREF_USER_DELETE = 0x0B | REQUEST_BIT
    RREF_FORK_REQUEST = 0x0C | REQUEST_BIT
    RREF_CHILD_ACCEPT = 0x0D | REQUEST_BIT
    RREF_ACK = 0x0E | RESPONSE_BIT
    FORWARD_AUTOGRAD_REQ = 0x0F | REQUEST_BIT
    FORWARD_AUTOGRAD_RESP = 0x10 | RESPONSE_BIT
    BACKWARD_AUTOGRAD_REQ = 0x11 | REQUEST_BIT
    BACKWARD_AUTOGRAD_RESP = 0x12 | RESPONSE_BIT
    CLEANUP_AUTOGRAD_CONTEXT_REQ = 0x13 | REQUEST_BIT
    CLEANUP_AUTOGRAD_CONTEXT_RESP = 0x14 | RESPONSE_BIT
    RUN_WITH_PROFILING_REQ = 0x15 | REQUEST_BIT
    RUN_WITH_PROFILING_RESP = 0x16 | RESPONSE_BIT
    RREF_BACKWARD_REQ = 0x17 | REQUEST_BIT
    RREF_BACKWARD_RESP = 0x18 | RESPONSE_BIT
    EXCEPTION = 0x37 | RESPONSE_BIT
    UNKNOWN = 0x3C
    # Ours: torch keeps the barrier in a process group, never says goodbye, and never tells peers of a failed pass.
    BARRIER_REQ = 0x40 | REQUEST_BIT
    BARRIER_RESP = 0x41 | RESPONSE_BIT
    GOODBYE = 0x42 | REQUEST_BIT
    ABORT_BACKWARD_REQ = 0x43 | REQUEST_BIT
    ABORT_BACKWARD_RESP = 0x44 | RESPONSE_BIT
    JOIN_REQ = 0x45 | REQUEST_BIT
    JOIN_RESP = 0x46 | RESPONSE_BIT
    LEAVE_REQ = 0x47 | REQUEST_BIT
    LEAVE_RESP = 0x48 | RESPONSE_BIT

    @property
    def is_request(self) -> bool:
        """True for messages that expect an answer (`GOODBYE` alone has none)."""
        return bool(self & REQUEST_BIT)

    @property
    def is_response(self) -> bool:
        """True for answers."""
        return bool(self & RESPONSE_BIT)


_RESULT = frozenset({MessageType.PYTHON_RET})
_CREATED = frozenset({MessageType.REMOTE_RET})
_ACKNOWLEDGED = frozenset({MessageType.RREF_ACK})

ANSWERS: dict[MessageType, frozenset[MessageType]] = {
    MessageType.SCRIPT_CALL: _RESULT,
    MessageType.PYTHON_CALL: _RESULT,
    MessageType.PYTHON_RREF_FETCH_CALL: _RESULT,
    MessageType.SCRIPT_REMOTE_CALL: _CREATED,
    MessageType.PYTHON_REMOTE_CALL: _CREATED,
    MessageType.RREF_USER_DELETE: _ACKNOWLEDGED,
    MessageType.RREF_FORK_REQUEST: _ACKNOWLEDGED,
    MessageType.RREF_CHILD_ACCEPT: _ACKNOWLEDGED,
    # An answer is wrapped only if its tensors require grad, or something was recorded.
    MessageType.FORWARD_AUTOGRAD_REQ: _RESULT | _CREATED | {MessageType.FORWARD_AUTOGRAD_RESP},
    MessageType.RUN_WITH_PROFILING_REQ: frozenset({MessageType.RUN_WITH_PROFILING_RESP}),
    MessageType.BACKWARD_AUTOGRAD_REQ: frozenset({MessageType.BACKWARD_AUTOGRAD_RESP}),
    MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ: frozenset({MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP}),
    MessageType.RREF_BACKWARD_REQ: frozenset({MessageType.RREF_BACKWARD_RESP}),
    MessageType.BARRIER_REQ: frozenset({MessageType.BARRIER_RESP}),
    MessageType.JOIN_REQ: frozenset({MessageType.JOIN_RESP}),
    MessageType.LEAVE_REQ: frozenset({MessageType.LEAVE_RESP}),
    MessageType.GOODBYE: frozenset(),
    MessageType.ABORT_BACKWARD_REQ: frozenset({MessageType.ABORT_BACKWARD_RESP}),
}
"""What may answer a request, beside `MessageType.EXCEPTION` (which answers any but `MessageType.GOODBYE`)."""


@frozen
class Message:
    """One message, before it is cut into frames.

    ``fields`` are small values that msgpack encodes (None, bool, int, float, str, bytes, and lists or tuples of them; after the
    wire every sequence is a tuple). ``payload`` is one pickle, ``buffers`` its out-of-band buffers (pickle protocol 5), and
    ``tensors`` the tensors that the pickle refers to by their index: objects that this layer passes on without looking.
    """

    type: MessageType
    fields: tuple[Any, ...] = ()
    payload: bytes | bytearray | memoryview = b""
    buffers: Sequence[Any] = ()
    tensors: Sequence[Any] = ()


_brief = reprlib.Repr()
_brief.maxtuple = 8
_brief.maxlevel = 3
_brief.maxother = _brief.maxstring = 100


def shown(value: object) -> str:
    """``value``, which a peer sent, as an error may show it: however long or nested, in about a line.

    >>> shown((1, ("x" * 1000, None)))[:30]
    "(1, ('xxxxxxxxxxxxxxxxxxxxxxxx"
    """
    # Cut first: the whole text of a long one could be many times its size.
    return _brief.repr(value[:100] if isinstance(value, bytes) else value)
