"""What stands in for torch's ``_invoke_rpc_*`` and ``_invoke_remote_*``, with their signatures.

``rpc_sync``, ``rpc_async`` and ``remote`` are torch's own Python functions; they end in one of the six functions here. What they
have pickled before comes from `CallPickler`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributed.rpc import PyRRef, WorkerInfo
from torch.distributed.rpc.internal import PythonUDF, _internal_rpc_pickler
from torch.futures import Future

from zmqagent.agent.base import OnReply, Reply
from zmqagent.exceptions import (
    ProtocolError,
    RpcError,
    RRefCreationError,
    SendFailedError,
    UnreadableCallError,
    WorkerLostError,
)
from zmqagent.rpc import pickler
from zmqagent.rpc.call_future import CallFuture
from zmqagent.rpc.eager_optimizer import EAGER_FORMS, eager_form
from zmqagent.rpc.failures import Failed, new_future, untraced
from zmqagent.rpc.messenger import Messenger
from zmqagent.rpc.profiler import current_call
from zmqagent.rpc.remote_module import is_remote_forward, remote_forward
from zmqagent.rpc.scripts import check_arguments
from zmqagent.rref.context import RRefContext
from zmqagent.rref.forks import Forks
from zmqagent.wire.commands import (
    Pickled,
    PythonCall,
    PythonRemoteCall,
    RemoteReturn,
    ScriptCall,
    ScriptRemoteCall,
)
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import ForkId, Message, RRefId, WorkerId

__all__ = ["CallPickler", "Invoker"]


@frozen
class _PickledCall:
    """A pickled call on its way through torch's Python code, with the forks of RRefs that were minted for it."""

    body: Pickled
    forks: Forks


class CallPickler:
    """Takes the place of torch's default RPC pickler, so that buffers leave the pickle and forks can be taken back."""

    def __init__(self, rrefs: RRefContext) -> None:
        self._rrefs = rrefs

    def serialize(self, obj: Any) -> tuple[_PickledCall, Sequence[torch.Tensor]]:
        """Pickles a call; the first part of the result only means something to `Invoker`."""
        if isinstance(obj, PythonUDF) and (eager := eager_form(obj.func)):
            obj = obj._replace(func=eager)
        call = _pickle(self._rrefs, obj)
        return call, call.body.tensors

    def __getattr__(self, name: str) -> Any:
        # Users register reducers with it, and may deserialize: that is torch's own.
        return getattr(_internal_rpc_pickler, name)


def _pickle(rrefs: RRefContext, obj: Any) -> _PickledCall:
    with rrefs.pickling() as forks:
        body = pickler.dumps_call(obj) if isinstance(obj, PythonUDF) else pickler.dumps(obj)
        return _PickledCall(body, forks)


def _settle(forks: Forks, on_reply: OnReply, reply: Reply) -> None:
    if isinstance(reply, UnreadableCallError):
        # Nobody there will ever claim the shares in RRefs that the call brought.
        forks.cancel()
    on_reply(reply)


class Invoker:
    """Sends calls on behalf of torch's ``rpc_sync``, ``rpc_async`` and ``remote``."""

    def __init__(self, messenger: Messenger, rrefs: RRefContext) -> None:
        self._messenger = messenger
        self._rrefs = rrefs

    # Calls that answer with a value.

    def rpc_builtin(self, dst: WorkerInfo, name: str, timeout: float, *args: Any, **kwargs: Any) -> Future[Any]:
        """Runs the operator ``name`` (``aten::add``) on ``dst``."""
        call = _pickle(self._rrefs, (args, kwargs))
        message = ScriptCall(call.body, name, is_builtin=True, is_async=False).to_message()
        return self._call(dst, call, message, timeout, attach_always=False)

    def rpc_python_udf(
        self, dst: WorkerInfo, pickled: _PickledCall | bytes, tensors: Sequence[torch.Tensor], timeout: float, is_async: bool
    ) -> Future[Any]:
        """Runs a pickled function on ``dst``; ``pickled`` is bytes if the user brought a pickler."""
        call = self._own(pickled, tensors)
        return self._call(dst, call, PythonCall(call.body, is_async).to_message(), timeout, attach_always=True)

    def rpc_torchscript(
        self, dst_name: str, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], timeout: float, is_async: bool
    ) -> Future[Any]:
        """Runs the TorchScript function ``name`` on the worker ``dst_name``."""
        dst = self._worker(dst_name)
        eager = remote_forward if is_remote_forward(name) else EAGER_FORMS.get(name)
        if eager is not None:
            call = _pickle(self._rrefs, PythonUDF(eager, args, kwargs))
            return self._call(dst, call, PythonCall(call.body, is_async).to_message(), timeout, attach_always=True)
        call = self._script_arguments(name, args, kwargs)
        message = ScriptCall(call.body, name, is_builtin=False, is_async=is_async).to_message()
        return self._call(dst, call, message, timeout, attach_always=False)

    # Calls whose value stays on the callee, as an RRef.

    def remote_builtin(self, dst: WorkerInfo, name: str, timeout: float, *args: Any, **kwargs: Any) -> PyRRef[Any]:
        """Runs the operator ``name`` on ``dst`` and returns an RRef to its value."""
        call = _pickle(self._rrefs, (args, kwargs))

        def message(rref_id: RRefId, fork_id: ForkId) -> Message:
            return ScriptRemoteCall(call.body, name, True, False, rref_id, fork_id).to_message()

        return self._remote(dst, call, message, timeout, attach_always=False)

    def remote_python_udf(
        self, dst: WorkerInfo, pickled: _PickledCall | bytes, tensors: Sequence[torch.Tensor], timeout: float, is_async: bool
    ) -> PyRRef[Any]:
        """Runs a pickled function on ``dst`` and returns an RRef to its value."""
        call = self._own(pickled, tensors)

        def message(rref_id: RRefId, fork_id: ForkId) -> Message:
            return PythonRemoteCall(call.body, is_async, rref_id, fork_id).to_message()

        return self._remote(dst, call, message, timeout, attach_always=True)

    def remote_torchscript(
        self, dst_name: str, name: str, timeout: float, is_async: bool, *args: Any, **kwargs: Any
    ) -> PyRRef[Any]:
        """Runs the TorchScript function ``name`` on ``dst_name`` and returns an RRef to its value."""
        call = self._script_arguments(name, args, kwargs)

        def message(rref_id: RRefId, fork_id: ForkId) -> Message:
            return ScriptRemoteCall(call.body, name, False, is_async, rref_id, fork_id).to_message()

        return self._remote(self._worker(dst_name), call, message, timeout, attach_always=False)

    # What they share.

    def _call(self, dst: WorkerInfo, call: _PickledCall, message: Message, timeout: float, *, attach_always: bool) -> Future[Any]:
        future = CallFuture(self._messenger.devices)
        self._send(WorkerId(dst.id), call, message, future, timeout, attach_always)
        return future

    def _send(
        self,
        to: WorkerId,
        call: _PickledCall,
        message: Message,
        on_reply: OnReply,
        timeout: float,
        attach_always: bool,
    ) -> None:
        if call.forks:
            on_reply = partial(_settle, call.forks, on_reply)
        try:
            self._messenger.send(to, message, on_reply, timeout=timeout, attach_always=attach_always, profiled=current_call())
        except (WorkerLostError, SendFailedError) as error:
            # No fault of the caller's: it learns of it where it would learn of a loss a moment later.
            call.forks.cancel()
            on_reply(error)
            return
        except BaseException:
            call.forks.cancel()
            raise
        call.forks.sent_to(to)

    def _remote(
        self,
        dst: WorkerInfo,
        call: _PickledCall,
        message: Callable[[RRefId, ForkId], Message],
        timeout: float,
        *,
        attach_always: bool,
    ) -> PyRRef[Any]:
        rref, rref_id, fork_id = self._rrefs.new_remote(WorkerId(dst.id))
        creation = new_future(self._messenger.devices)
        rref._set_future(creation)

        def failed(error: RpcError) -> None:
            error = untraced(error)
            self._rrefs.creation_failed(rref_id, fork_id, error)
            creation.set_result(Failed.by(error))

        def on_reply(reply: Reply) -> None:
            # Who could not read the call has made the RRef all the same, with that error in place of its value.
            if reply == RemoteReturn(rref_id, fork_id) or isinstance(reply, UnreadableCallError):
                self._rrefs.confirm_remote(rref_id, fork_id)
                creation.set_result(None)
            elif isinstance(reply, RpcError):
                failed(reply)
            else:
                failed(ProtocolError(f"a remote call was answered by a {type(reply).__name__}, and not for its own RRef"))

        try:
            self._send(WorkerId(dst.id), call, message(rref_id, fork_id), on_reply, timeout, attach_always)
        except BaseException as error:
            failed(error if isinstance(error, RpcError) else RRefCreationError(f"the remote call was not sent: {error!r}"))
            raise
        return rref  # type: ignore[return-value]

    def _own(self, pickled: _PickledCall | bytes, tensors: Sequence[torch.Tensor]) -> _PickledCall:
        if isinstance(pickled, _PickledCall):
            return pickled
        # A pickler of the user's, by _use_rpc_pickler: no buffers beside the pickle, and no scope open while it worked.
        return _PickledCall(Pickled(pickled, (), tensors), self._rrefs.pickled_without_scope())

    def _script_arguments(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _PickledCall:
        # First, since an RRef that cannot be pickled at all has a complaint of its own.
        call = _pickle(self._rrefs, (args, kwargs))
        try:
            check_arguments(name, args, kwargs, hold_rrefs=len(call.forks) > 0)
        except BaseException:
            call.forks.cancel()
            raise
        return call

    def _worker(self, name: str) -> WorkerInfo:
        info: WorkerInfo = torch.distributed.rpc.get_worker_info(name)
        return info
