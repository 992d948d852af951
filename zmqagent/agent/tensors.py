"""Tensors to and from (descriptions, buffers).

`pack` makes of each tensor a description (a tuple of plain values, which goes into the message's header) and puts its bytes,
frozen, into buffers; `unpack` builds tensors from both. Sockets, messages and autograd contexts are unknown here.

What is kept: the kind (strided, sparse, quantized, meta), dtype, sizes and strides, the conjugate and negative bits, whether it
requires grad (an arriving tensor is a leaf), and that tensors of one message share memory. What is not: the graph behind a
tensor, its gradient and hooks, its dimensions' names, and the strides of a large view that leaves out most of its memory, which
travels as a contiguous copy if it is alone in there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from zmqagent.agent.buffers import Allocate, from_heap
from zmqagent.agent.devices import Target, cpu_only
from zmqagent.agent.incoming import Incoming
from zmqagent.agent.outgoing import Outgoing, settle
from zmqagent.agent.pinned import PINNED, PinnedPool
from zmqagent.agent.plain_tensors import pack_plain
from zmqagent.agent.streams import CopiesOut
from zmqagent.agent.tensor_kinds import Description
from zmqagent.exceptions import ProtocolError

__all__ = ["Description", "pack", "unpack"]


def pack(
    tensors: Sequence[torch.Tensor],
    target: Target = cpu_only,
    pool: PinnedPool = PINNED,
    allocate: Allocate = from_heap,
) -> tuple[tuple[Description, ...], list[bytes | memoryview]]:
    """Descriptions of ``tensors``, in order, and buffers with their bytes as they are now.

    ``target`` names, for a tensor's device, the one it is to arrive on. Every byte is copied once, also from an accelerator,
    behind what the calling thread's current stream there has been given. ``allocate`` is asked for the memory of large copies.

    Raises:
        NotPicklableError: a tensor of a kind that cannot travel; the text names it.
        DeviceMapError: raised by ``target``.
    """
    # Without the guard a subclass would see, and might change, every call made here.
    with torch._C.DisableTorchFunctionSubclass():
        plain = pack_plain(tensors, target, allocate)
        if plain is not None:
            return plain
        with CopiesOut(pool) as copies:
            outgoing = Outgoing(target, copies, allocate)
            descriptions = [outgoing.describe(tensor) for tensor in tensors]
            buffers = outgoing.freeze()
    return tuple([settle(description) for description in descriptions]), buffers


def unpack(descriptions: Sequence[Any], buffers: Sequence[memoryview], pool: PinnedPool = PINNED) -> list[torch.Tensor]:
    """The tensors that `pack` was given. They are leaves, writable, and keep alive what they need of ``buffers``. Those on an
    accelerator are whole for the calling thread's current stream there; where threads do not hand over work under way, for all.

    A large buffer that is writable and aligned becomes the tensor's memory; anything else is copied into torch's own. Nothing is
    taken before the sizes have been checked against the buffers.

    Raises:
        ProtocolError: a description that `pack` does not make, or that does not fit the buffers.
    """
    incoming = Incoming(buffers)
    builders = [incoming.check(description) for description in descriptions]
    incoming.check_rest()
    try:
        incoming.place(pool)
        return [build() for build in builders]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        # torch checks the rest: indices of sparse tensors, scales of quantized ones, devices this worker has not.
        raise ProtocolError(f"a tensor cannot be built from what arrived: {error}") from error
