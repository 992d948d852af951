"""The commands of a distributed autograd context: gradients, the failure of a pass, the context's end; see `commands`. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from zmqagent.exceptions import ProtocolError
from zmqagent.wire.fields import take_bare, take_without_pickle
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import AutogradMetadata, Message, MessageType, shown

__all__ = ["AbortBackward", "BackwardAutograd", "CleanupContexts"]


@frozen
class BackwardAutograd:
    """Gradients (``tensors``, one for each tensor of the forward message that required grad) for the send function
    ``metadata.message_id``. ``pass_id`` tells one backward pass of a context from the next."""

    type: ClassVar[MessageType] = MessageType.BACKWARD_AUTOGRAD_REQ
    metadata: AutogradMetadata
    pass_id: int
    retain_graph: bool
    gradients: Sequence[Any]

    def to_message(self) -> Message:
        fields = (*self.metadata, self.pass_id, self.retain_graph)
        return Message(self.type, fields, tensors=self.gradients)

    @classmethod
    def from_message(cls, message: Message) -> BackwardAutograd:
        context_id, message_id, pass_id, retain_graph = take_without_pickle(message, int, int, int, bool)
        return cls(AutogradMetadata(context_id, message_id), pass_id, retain_graph, message.tensors)


@frozen
class AbortBackward:
    """The backward pass ``pass_id`` of a context has failed elsewhere for ``reason``: end it here too, and pass it on."""

    type: ClassVar[MessageType] = MessageType.ABORT_BACKWARD_REQ
    context_id: int
    pass_id: int
    reason: str

    def to_message(self) -> Message:
        return Message(self.type, (self.context_id, self.pass_id, self.reason))

    @classmethod
    def from_message(cls, message: Message) -> AbortBackward:
        return cls(*take_bare(message, int, int, str))


@frozen
class CleanupContexts:
    """The contexts have been released: erase them, and pass it on."""

    type: ClassVar[MessageType] = MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ
    context_ids: tuple[int, ...]

    def to_message(self) -> Message:
        return Message(self.type, (self.context_ids,))

    @classmethod
    def from_message(cls, message: Message) -> CleanupContexts:
        (context_ids,) = take_bare(message, tuple)
        for context_id in context_ids:
            if type(context_id) is not int:
                raise ProtocolError(f"the id of an autograd context is an integer, but {shown(context_id)} arrived")
        return cls(context_ids)
