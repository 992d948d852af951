"""Messages with the caller's distributed autograd context and profiling attached, in both directions; answers in the caller's
thread state.

When torch attaches autograd: never without a current context; always for a Python user function, a Python ``remote``
and ``to_here``; for builtin operators and for all answers only if some tensor requires grad. The context of the caller is current
again while the answer is handled, so that callbacks of a future may go on building the graph; so is what else of the caller's
thread belongs to a call (`zmqagent.rpc.thread_state`).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch

from zmqagent.agent.base import UNSET_TIMEOUT, OnReply, Reply, ReplyTaker, Requester, UnreadAnswer
from zmqagent.agent.devices import DeviceMap
from zmqagent.autograd.container import DistAutogradContainer
from zmqagent.autograd.context import DistAutogradContext
from zmqagent.exceptions import ProtocolError, RpcError
from zmqagent.rpc.profiler import ProfiledCall
from zmqagent.rpc.shares import give_back
from zmqagent.rpc.thread_state import CLEAN, ThreadState, current_state, in_state
from zmqagent.wire.commands import ForwardAutograd, parse
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["Messenger"]


class Messenger:
    """Sends requests, and wraps and unwraps what belongs to an autograd context."""

    def __init__(self, requester: Requester, contexts: DistAutogradContainer) -> None:
        self._requester = requester
        self._contexts = contexts

    @property
    def devices(self) -> Sequence[torch.device]:
        """See `Requester.devices`."""
        return self._requester.devices

    def send(
        self,
        to: WorkerId,
        message: Message,
        on_reply: OnReply,
        *,
        timeout: float = UNSET_TIMEOUT,
        attach_always: bool,
        profiled: ProfiledCall | None = None,
    ) -> None:
        """Sends ``message`` as `Requester.request` does, in the calling thread's context if there is one. ``on_reply`` runs in
        that context, and in the state of the calling thread."""
        context = self._contexts.current_context_or_none()
        on_reply = _InState(current_state(), on_reply)
        metadata = None
        if context is not None:
            if attach_always or _any_requires_grad(message):
                metadata = context.attach_outgoing(to, message.tensors)
                message = ForwardAutograd(metadata, message).to_message()
            on_reply = partial(self._resume, context, to, on_reply)
        try:
            if profiled is None:
                self._requester.request(to, message, on_reply, timeout=timeout)
            else:
                self._send_profiled(to, message, on_reply, timeout, profiled)
        except BaseException:
            if context is not None and metadata is not None:
                # A backward pass would wait for gradients of what was never sent.
                context.withdraw_outgoing(metadata)
            raise

    def _send_profiled(self, to: WorkerId, message: Message, on_reply: OnReply, timeout: float, profiled: ProfiledCall) -> None:
        message, on_reply = profiled.begin(message, on_reply)
        try:
            self._requester.request(to, message, on_reply, timeout=timeout)
        except BaseException:
            profiled.abandon()
            raise

    def _resume(self, context: DistAutogradContext, source: WorkerId, on_reply: OnReply, reply: Reply) -> None:
        with self._contexts.activate(context):
            if isinstance(reply, ForwardAutograd):
                reply = self._unwrap_answer(context, source, reply)
            on_reply(reply)

    def _unwrap_answer(self, context: DistAutogradContext, source: WorkerId, answer: ForwardAutograd) -> Reply:
        try:
            # Its gradients go the way of a request.
            return parse(_unwrap(context, source, answer, None))
        except Exception as error:
            give_back(answer)
            # Whoever waits must be told, whatever is wrong with the answer or has become of the context.
            return error if isinstance(error, RpcError) else ProtocolError(f"the answer cannot be taken in: {error!r}")

    def unwrap_request(self, context: DistAutogradContext, source: WorkerId, wrapped: ForwardAutograd) -> Message:
        """The inner message, its tensors joined to ``context`` by a recv function. Their gradients go the way of an answer.

        Raises:
            ProtocolError: it belongs to another context.
        """
        return _unwrap(context, source, wrapped, self._requester.map_back(source))

    def wrap_answer(self, context: DistAutogradContext, to: WorkerId, answer: Message) -> Message:
        """``answer``, wrapped if the gradients of its tensors will have to come back here."""
        if not _any_requires_grad(answer):
            return answer
        return ForwardAutograd(context.attach_outgoing(to, answer.tensors), answer).to_message()

    def withdraw_answer(self, context: DistAutogradContext, answer: Message) -> None:
        """What `wrap_answer` returned was not sent: no gradients will come back."""
        if answer.type is MessageType.FORWARD_AUTOGRAD_RESP:
            context.withdraw_outgoing(ForwardAutograd.from_message(answer).metadata)


class _InState(ReplyTaker):
    """Has ``on_reply`` run in ``state``."""

    __slots__ = ("_on_reply", "_state")

    def __init__(self, state: ThreadState, on_reply: OnReply) -> None:
        self._state = state
        self._on_reply = on_reply

    def __call__(self, reply: Reply) -> None:
        with in_state(self._state):
            self._on_reply(reply)

    def take_unread(self, answer: UnreadAnswer) -> bool:
        # Whoever reads it later does so in a clean state.
        return self._state is CLEAN and isinstance(self._on_reply, ReplyTaker) and self._on_reply.take_unread(answer)


def _unwrap(context: DistAutogradContext, source: WorkerId, wrapped: ForwardAutograd, device_map: DeviceMap | None) -> Message:
    if wrapped.metadata.context_id != context.context_id:
        raise ProtocolError(
            f"a message of autograd context {context.context_id} names context {wrapped.metadata.context_id} as its own"
        )
    inner = wrapped.inner
    tensors = context.attach_incoming(wrapped.metadata, source, inner.tensors, device_map)
    return Message(inner.type, inner.fields, inner.payload, inner.buffers, tensors)


def _any_requires_grad(message: Message) -> bool:
    return any(tensor.requires_grad for tensor in message.tensors)
