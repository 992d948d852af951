"""One distributed autograd context on one worker.

A context collects what the backward pass will need: the send and recv functions of all messages that carried its tensors, the
workers it has spread to, and the gradients of this worker's leaves. It does no I/O and knows neither the container that holds it
nor the engine that uses it; what the engine has to remember for a context is kept here as a `PassRegister`.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from typing import Any

from torch import Tensor

from zmqagent.agent.devices import DeviceMap
from zmqagent.autograd.functions import GradientSender, SendRpcBackward, Wire, receive_tensors
from zmqagent.autograd.passes import PassRegister
from zmqagent.wire.types import AutogradMetadata, WorkerId

__all__ = ["DistAutogradContext"]


class DistAutogradContext:
    """What one worker knows of one context. Made by `DistAutogradContainer` only.

    The methods whose names begin with an underscore are those of torch's class of the same name.

    Args:
        context_id: the id, unique in the group; its upper 16 bits are the worker that opened the context.
        draw_message_id: gives ids for send/recv pairs, unique in the group.
    """

    def __init__(self, context_id: int, draw_message_id: Callable[[], int]) -> None:
        self.context_id = context_id
        self._draw_message_id = draw_message_id
        # Protects the maps below, which calls on several threads fill; held for single steps, never while anything is awaited.
        self._lock = threading.Lock()
        self._sends: dict[int, SendRpcBackward] = {}
        self._recvs: dict[int, Any] = {}
        self._gradients: dict[Tensor, Tensor] = {}
        # Shared with the note that a finalizer leaves when this context dies unreleased.
        self.known_workers: set[WorkerId] = set()
        self._lost_workers: dict[WorkerId, Exception] = {}
        self._released = False
        self.passes = PassRegister()

    # What torch's class offers.

    def _context_id(self) -> int:
        return self.context_id

    def _send_functions(self) -> dict[int, SendRpcBackward]:
        with self._lock:
            return dict(sorted(self._sends.items()))

    def _recv_functions(self) -> dict[int, Any]:
        with self._lock:
            return dict(sorted(self._recvs.items()))

    def _known_worker_ids(self) -> set[WorkerId]:
        with self._lock:
            return set(self.known_workers)

    # Messages.

    def attach_outgoing(self, to: WorkerId, tensors: Sequence[Tensor]) -> AutogradMetadata:
        """Joins the tensors of a message that is about to go ``to`` another worker to this context.

        The destination counts as known from now on, whether or not any tensor requires grad: the context will exist there.
        """
        message_id = self._draw_message_id()
        travelling = [tensor for tensor in tensors if tensor.requires_grad]
        send = SendRpcBackward(message_id, to, travelling) if travelling else None
        with self._lock:
            self.known_workers.add(to)
            if send is not None:
                self._sends[message_id] = send
        return AutogradMetadata(self.context_id, message_id)

    def withdraw_outgoing(self, metadata: AutogradMetadata) -> None:
        """The message that `attach_outgoing` was called for was not sent: no gradients will come for its tensors."""
        with self._lock:
            self._sends.pop(metadata.message_id, None)

    def attach_incoming(
        self,
        metadata: AutogradMetadata,
        source: WorkerId,
        tensors: Sequence[Tensor],
        device_map: DeviceMap | None = None,
    ) -> list[Tensor]:
        """Joins the tensors of a message that came from ``source`` to this context.

        Args:
            metadata: what `attach_outgoing` returned there.
            source: the worker to send the gradients to.
            tensors: the tensors as they came off the wire: leaves, with the ``requires_grad`` they had at the sender.
            device_map: from this worker's devices to the source's, for the gradients; None: this worker's own
                map for the source, by which it asked for what has come.

        Returns:
            The tensors to hand to the user, in the same order: those that require grad now have the recv function as ``grad_fn``.
        """
        received = list(tensors)
        places = [place for place, tensor in enumerate(received) if tensor.requires_grad]
        if not places:
            return received
        wire = Wire(weakref.ref(self), metadata, source, device_map)
        node, joined = receive_tensors(wire, [received[place] for place in places])
        for place, tensor in zip(places, joined, strict=True):
            received[place] = tensor
        with self._lock:
            self._recvs[metadata.message_id] = node
        return received

    # Gradients.

    def gradients(self) -> dict[Tensor, Tensor]:
        """The gradients accumulated on this worker so far, by leaf."""
        with self._lock:
            return dict(self._gradients)

    @property
    def accumulated(self) -> MutableMapping[Tensor, Tensor]:
        """The gradients themselves, for the engine; passes of one context never change them at the same time."""
        return self._gradients

    @property
    def gradient_sender(self) -> GradientSender | None:
        """How a recv that runs now sends its gradients; None while no pass runs."""
        return self.passes.sender

    # Its end.

    @property
    def is_released(self) -> bool:
        """True once the context has been released; whoever still holds it can do nothing more with it."""
        return self._released

    def release(self) -> set[WorkerId]:
        """Ends the context and returns the workers it had spread to."""
        with self._lock:
            self._released = True
            return set(self.known_workers)

    def lose(self, worker_id: WorkerId, error: Exception) -> None:
        """Notes that a worker died: the sends made to it so far will never get gradients."""
        with self._lock:
            if any(send.peer == worker_id for send in self._sends.values()):
                self._lost_workers[worker_id] = error

    def loss(self) -> Exception | None:
        """Why no backward pass can complete here any more, if a worker that holds part of the graph died."""
        with self._lock:
            return next(iter(self._lost_workers.values()), None)

    def __repr__(self) -> str:
        with self._lock:
            counts = f"sends={len(self._sends)} recvs={len(self._recvs)} known_workers={sorted(self.known_workers)}"
        return f"<DistAutogradContext {self.context_id} {counts}{' released' if self._released else ''}>"
