"""Messages of this worker to frames, and frames of others back to messages: tensors packed, header written."""

from __future__ import annotations

from typing import Any

from zmqagent.agent.base import Reply
from zmqagent.agent.buffers import Allocate, from_heap
from zmqagent.agent.devices import Target, cpu_only
from zmqagent.agent.tensors import pack, unpack
from zmqagent.exceptions import ProtocolError, error_class
from zmqagent.wire.commands import Failure, parse
from zmqagent.wire.frames import Envelope, encode
from zmqagent.wire.types import ANSWERS, Message, MessageType, WorkerId

__all__ = ["Codec"]


class Codec:
    """Encodes under one worker's name."""

    def __init__(self, worker_id: WorkerId, incarnation: int) -> None:
        self._worker_id = worker_id
        self._incarnation = incarnation

    def encode(
        self,
        message: Message,
        call_id: int,
        destination_incarnation: int,
        target: Target = cpu_only,
        allocate: Allocate = from_heap,
    ) -> list[Any]:
        """The frames of ``message``. They hold copies of the tensors' bytes, so that nothing that happens to the tensors later
        changes what is sent, or sent again. ``allocate`` is asked for the memory of large ones.

        Raises:
            NotPicklableError, DeviceMapError, InvalidTypeError: it cannot be sent; the text says what in it.
        """
        descriptions, buffers = pack(message.tensors, target, allocate=allocate) if message.tensors else ((), [])
        return encode(
            Envelope(
                self._worker_id,
                self._incarnation,
                destination_incarnation,
                call_id,
                message.type,
                message.fields,
                message.payload,
                message.buffers,
                descriptions,
                buffers,
            )
        )

    @staticmethod
    def message(envelope: Envelope) -> Message:
        """The message in a received envelope, its tensors rebuilt.

        Raises:
            ProtocolError: tensors and descriptions do not fit each other.
        """
        has_tensors = envelope.tensors or envelope.tensor_buffers
        tensors = unpack(envelope.tensors, envelope.tensor_buffers) if has_tensors else ()
        return Message(envelope.type, envelope.fields, envelope.payload, envelope.buffers, tensors)

    @classmethod
    def reply(cls, asked: MessageType, envelope: Envelope) -> Reply:
        """What a received envelope answers to a request of type ``asked``.

        Raises:
            ProtocolError: it is no answer to that, or cannot be read.
        """
        kind = envelope.type
        if kind is not MessageType.EXCEPTION and kind not in ANSWERS.get(asked, ()):
            raise ProtocolError(f"a {asked.name} was answered by a {kind.name}, which is no answer to it")
        try:
            command = parse(cls.message(envelope))
        except ProtocolError:
            raise
        except Exception as error:
            # Out of memory, for example: the call has failed, and its caller must know.
            raise ProtocolError(f"the answer could not be read: {error!r}") from error
        if isinstance(command, Failure) and command.code:
            return error_class(command.code)(command.text)
        return command
