"""Messages around messages: what belongs to a distributed autograd context, and what is profiled.

Pure. The wrapped message's type and fields travel inside the wrapper's fields; payload, buffers and tensors pass through
untouched.
Profiling is the outermost wrapper.
"""

from __future__ import annotations

from typing import Any, ClassVar

from zmqagent.exceptions import ProtocolError
from zmqagent.wire.fields import known_type, take
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import AutogradMetadata, Message, MessageType

__all__ = ["ForwardAutograd", "ProfiledReturn", "RunWithProfiling", "type_inside"]


@frozen
class ForwardAutograd:
    """Another message whose tensors belong to a distributed autograd context."""

    type: ClassVar[MessageType] = MessageType.FORWARD_AUTOGRAD_REQ
    metadata: AutogradMetadata
    inner: Message

    def to_message(self) -> Message:
        inner = self.inner
        fields = (*self.metadata, int(inner.type), inner.fields)
        kind = MessageType.FORWARD_AUTOGRAD_REQ if inner.type.is_request else MessageType.FORWARD_AUTOGRAD_RESP
        return Message(kind, fields, inner.payload, inner.buffers, inner.tensors)

    @classmethod
    def from_message(cls, message: Message) -> ForwardAutograd:
        context_id, message_id, inner_type, inner_fields = take(message, int, int, int, tuple)
        inner = Message(known_type(inner_type), inner_fields, message.payload, message.buffers, message.tensors)
        return cls(AutogradMetadata(context_id, message_id), inner)


@frozen
class RunWithProfiling:
    """Another request, to be served under torch's legacy profiler; ``flags`` say what that is to record."""

    type: ClassVar[MessageType] = MessageType.RUN_WITH_PROFILING_REQ
    flags: int
    inner: Message

    def to_message(self) -> Message:
        inner = self.inner
        return Message(self.type, (self.flags, int(inner.type), inner.fields), inner.payload, inner.buffers, inner.tensors)

    @classmethod
    def from_message(cls, message: Message) -> RunWithProfiling:
        flags, inner_type, inner_fields = take(message, int, int, tuple)
        inner = Message(known_type(inner_type), inner_fields, message.payload, message.buffers, message.tensors)
        return cls(flags, inner)


@frozen
class ProfiledReturn:
    """Another answer, with what the profiler recorded on the way to it: ``records``, which travel as one more buffer."""

    type: ClassVar[MessageType] = MessageType.RUN_WITH_PROFILING_RESP
    records: Any
    inner: Message

    def to_message(self) -> Message:
        inner = self.inner
        buffers = (*inner.buffers, self.records)
        return Message(self.type, (int(inner.type), inner.fields), inner.payload, buffers, inner.tensors)

    @classmethod
    def from_message(cls, message: Message) -> ProfiledReturn:
        inner_type, inner_fields = take(message, int, tuple)
        if not message.buffers:
            raise ProtocolError(f"a {message.type.name} message brings records in a buffer, but none arrived")
        *buffers, records = message.buffers
        return cls(records, Message(known_type(inner_type), inner_fields, message.payload, tuple(buffers), message.tensors))


def type_inside(request: Message) -> MessageType:
    """The type of the message within all wrappers of ``request``, which was made here; its own type if it is no wrapper."""
    kind, fields = request.type, request.fields
    while kind in (MessageType.RUN_WITH_PROFILING_REQ, MessageType.FORWARD_AUTOGRAD_REQ):
        *_, inner_type, fields = fields
        kind = MessageType(inner_type)
    return kind
