"""The commands about RRefs that exist: their values, the lives and deaths of shares, a backward pass; see `commands`. Pure."""

from __future__ import annotations

from typing import ClassVar

from zmqagent.exceptions import ProtocolError
from zmqagent.wire.fields import take_bare, to_fork_id, to_rref_id
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import ForkId, Message, MessageType, RRefId, shown

__all__ = ["RRefBackward", "RRefChildAccept", "RRefFetch", "RRefForkRequest", "RRefUserDelete", "RRefUserDeletes"]


@frozen
class RRefFetch:
    """Ask the owner for the value of ``rref_id``; answered once the value exists."""

    type: ClassVar[MessageType] = MessageType.PYTHON_RREF_FETCH_CALL
    rref_id: RRefId

    def to_message(self) -> Message:
        return Message(self.type, tuple(self.rref_id))

    @classmethod
    def from_message(cls, message: Message) -> RRefFetch:
        a, b = take_bare(message, int, int)
        return cls(to_rref_id(a, b))


@frozen
class RRefUserDelete:
    """A user's share has died (G1). It travels with others for the same owner, in an `RRefUserDeletes`."""

    type: ClassVar[MessageType] = MessageType.RREF_USER_DELETE
    rref_id: RRefId
    fork_id: ForkId

    def to_message(self) -> Message:
        return RRefUserDeletes((self,)).to_message()


@frozen
class RRefUserDeletes:
    """The deaths of one or more shares in RRefs of one owner."""

    type: ClassVar[MessageType] = MessageType.RREF_USER_DELETE
    deletes: tuple[RRefUserDelete, ...]

    def to_message(self) -> Message:
        return Message(self.type, (tuple([(*delete.rref_id, *delete.fork_id) for delete in self.deletes]),))

    @classmethod
    def from_message(cls, message: Message) -> RRefUserDeletes:
        (deletes,) = take_bare(message, tuple)
        for delete in deletes:
            if type(delete) is not tuple or [*map(type, delete)] != [int] * 4:
                raise ProtocolError(f"the death of a share in an RRef is told by four integers, but {shown(delete)} arrived")
        return cls(tuple([RRefUserDelete(to_rref_id(a, b), to_fork_id(c, d)) for a, b, c, d in deletes]))


@frozen
class RRefForkRequest:
    """A new user tells the owner of itself."""

    type: ClassVar[MessageType] = MessageType.RREF_FORK_REQUEST
    rref_id: RRefId
    fork_id: ForkId

    def to_message(self) -> Message:
        return Message(self.type, (*self.rref_id, *self.fork_id))

    @classmethod
    def from_message(cls, message: Message) -> RRefForkRequest:
        a, b, c, d = take_bare(message, int, int, int, int)
        return cls(to_rref_id(a, b), to_fork_id(c, d))


@frozen
class RRefChildAccept:
    """A child tells its parent that the owner knows it (G2)."""

    type: ClassVar[MessageType] = MessageType.RREF_CHILD_ACCEPT
    fork_id: ForkId

    def to_message(self) -> Message:
        return Message(self.type, tuple(self.fork_id))

    @classmethod
    def from_message(cls, message: Message) -> RRefChildAccept:
        a, b = take_bare(message, int, int)
        return cls(to_fork_id(a, b))


@frozen
class RRefBackward:
    """Start a backward pass on the owner from the value of ``rref_id``."""

    type: ClassVar[MessageType] = MessageType.RREF_BACKWARD_REQ
    rref_id: RRefId
    context_id: int
    retain_graph: bool

    def to_message(self) -> Message:
        return Message(self.type, (*self.rref_id, self.context_id, self.retain_graph))

    @classmethod
    def from_message(cls, message: Message) -> RRefBackward:
        a, b, context_id, retain_graph = take_bare(message, int, int, int, bool)
        return cls(to_rref_id(a, b), context_id, retain_graph)
