"""The commands by which workers keep together as a group; see `commands`. Pure."""

from __future__ import annotations

from typing import ClassVar

from zmqagent.exceptions import ProtocolError
from zmqagent.wire.fields import take_bare
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import Message, MessageType

__all__ = ["Barrier", "BarrierPassed", "Goodbye", "Join", "Leave"]


@frozen
class Barrier:
    """The sender has reached the barrier ``tag`` and contributes ``value`` to the sum that all get back."""

    type: ClassVar[MessageType] = MessageType.BARRIER_REQ
    tag: str
    value: int

    def to_message(self) -> Message:
        return Message(self.type, (self.tag, self.value))

    @classmethod
    def from_message(cls, message: Message) -> Barrier:
        return cls(*take_bare(message, str, int))


@frozen
class BarrierPassed:
    """All workers have reached the barrier; ``total`` is the sum of what they contributed."""

    type: ClassVar[MessageType] = MessageType.BARRIER_RESP
    total: int

    def to_message(self) -> Message:
        return Message(self.type, (self.total,))

    @classmethod
    def from_message(cls, message: Message) -> BarrierPassed:
        return cls(*take_bare(message, int))


@frozen
class Goodbye:
    """The sender's ``incarnation`` shuts down now and will answer nothing more; no answer is expected."""

    type: ClassVar[MessageType] = MessageType.GOODBYE
    incarnation: int
    reason: str

    def to_message(self) -> Message:
        return Message(self.type, (self.incarnation, self.reason))

    @classmethod
    def from_message(cls, message: Message) -> Goodbye:
        return cls(*take_bare(message, int, str))


@frozen
class Join:
    """The sender has joined a dynamic group; the fields are those of its `PeerRecord`."""

    type: ClassVar[MessageType] = MessageType.JOIN_REQ
    name: str
    worker_id: int
    incarnation: int
    host: str
    pid: int
    addresses: tuple[str, ...]
    started: int
    ordinal: int
    devices: str

    def to_message(self) -> Message:
        process = (self.name, self.worker_id, self.incarnation, self.host, self.pid, self.addresses)
        return Message(self.type, (*process, self.started, self.ordinal, self.devices))

    @classmethod
    def from_message(cls, message: Message) -> Join:
        command = cls(*take_bare(message, str, int, int, str, int, tuple, int, int, str))
        if not all(isinstance(address, str) for address in command.addresses):
            raise ProtocolError("the addresses of a worker that joins are texts, but others arrived")
        return command


@frozen
class Leave:
    """The sender's ``incarnation`` leaves a dynamic group. It has no call under way, and waits for the answer."""

    type: ClassVar[MessageType] = MessageType.LEAVE_REQ
    incarnation: int
    reason: str

    def to_message(self) -> Message:
        return Message(self.type, (self.incarnation, self.reason))

    @classmethod
    def from_message(cls, message: Message) -> Leave:
        return cls(*take_bare(message, int, str))
