"""Messages of this worker to frames, and frames of others back to messages: tensors packed, header written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from zmqagent.agent.devices import cpu_only
from zmqagent.agent.tensors import pack, unpack
from zmqagent.wire.frames import Envelope, encode
from zmqagent.wire.types import Message, WorkerId

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
        target: Callable[[torch.device], torch.device] = cpu_only,
    ) -> list[Any]:
        """The frames of ``message``. They hold copies of the tensors' bytes, so that nothing that happens to the tensors later
        changes what is sent, or sent again.

        Raises:
            NotPicklableError, DeviceMapError, InvalidTypeError: it cannot be sent; the text says what in it.
        """
        descriptions, buffers = pack(message.tensors, target) if message.tensors else ((), [])
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
            ProtocolError: the tensors do not fit their descriptions.
        """
        tensors = unpack(envelope.tensors, envelope.tensor_buffers) if envelope.tensors else ()
        return Message(envelope.type, envelope.fields, envelope.payload, envelope.buffers, tensors)
