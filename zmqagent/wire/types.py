"""The words of the protocol: ids, message types and the message itself.

Pure: nothing here knows of sockets, threads, clocks or torch. The numbers of `MessageType` are torch's own
(``torch/csrc/distributed/rpc/message.h``), so that logs and fault injection speak torch's language; those from 0x40 on are ours.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NewType

__all__ = ["AutogradMetadata", "ForkData", "ForkId", "Message", "MessageType", "RRefId", "WorkerId"]

WorkerId = NewType("WorkerId", int)
"""A worker's rank in its group, an int16 in torch."""

_REQUEST = 0x100
_RESPONSE = 0x200


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

    SCRIPT_CALL = 0x00 | _REQUEST
    SCRIPT_RET = 0x01 | _RESPONSE
    PYTHON_CALL = 0x02 | _REQUEST
    PYTHON_RET = 0x03 | _RESPONSE
    SCRIPT_REMOTE_CALL = 0x04 | _REQUEST
    PYTHON_REMOTE_CALL = 0x05 | _REQUEST
    REMOTE_RET = 0x06 | _RESPONSE
    SCRIPT_RREF_FETCH_CALL = 0x07 | _REQUEST
    PYTHON_RREF_FETCH_CALL = 0x08 | _REQUEST
    SCRIPT_RREF_FETCH_RET = 0x09 | _RESPONSE
    PYTHON_RREF_FETCH_RET = 0x0A | _RESPONSE
    RREF_USER_DELETE = 0x0B | _REQUEST
    RREF_FORK_REQUEST = 0x0C | _REQUEST
    RREF_CHILD_ACCEPT = 0x0D | _REQUEST
    RREF_ACK = 0x0E | _RESPONSE
    FORWARD_AUTOGRAD_REQ = 0x0F | _REQUEST
    FORWARD_AUTOGRAD_RESP = 0x10 | _RESPONSE
    BACKWARD_AUTOGRAD_REQ = 0x11 | _REQUEST
    BACKWARD_AUTOGRAD_RESP = 0x12 | _RESPONSE
    CLEANUP_AUTOGRAD_CONTEXT_REQ = 0x13 | _REQUEST
    CLEANUP_AUTOGRAD_CONTEXT_RESP = 0x14 | _RESPONSE
    RUN_WITH_PROFILING_REQ = 0x15 | _REQUEST
    RUN_WITH_PROFILING_RESP = 0x16 | _RESPONSE
    RREF_BACKWARD_REQ = 0x17 | _REQUEST
    RREF_BACKWARD_RESP = 0x18 | _RESPONSE
    EXCEPTION = 0x37 | _RESPONSE
    UNKNOWN = 0x3C
    # Ours: torch keeps the barrier in a process group, never says goodbye, and never tells peers of a failed pass.
    BARRIER_REQ = 0x40 | _REQUEST
    BARRIER_RESP = 0x41 | _RESPONSE
    GOODBYE = 0x42 | _REQUEST
    ABORT_BACKWARD_REQ = 0x43 | _REQUEST
    ABORT_BACKWARD_RESP = 0x44 | _RESPONSE
    JOIN_REQ = 0x45 | _REQUEST
    JOIN_RESP = 0x46 | _RESPONSE
    LEAVE_REQ = 0x47 | _REQUEST
    LEAVE_RESP = 0x48 | _RESPONSE

    @property
    def is_request(self) -> bool:
        """True for messages that expect an answer (`GOODBYE` alone has none)."""
        return bool(self & _REQUEST)

    @property
    def is_response(self) -> bool:
        """True for answers."""
        return bool(self & _RESPONSE)


@dataclass(frozen=True, slots=True)
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
