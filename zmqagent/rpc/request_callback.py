"""What a worker does with each request: message type to handler. The only place where RRefs and autograd meet.

Handlers run on a thread of the agent, from a clean thread-local state, in the autograd context that the request brought. They
answer through ``respond``, now or later; what they raise, the agent answers as a `Failure`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from zmqagent.agent.accelerator import current_streams
from zmqagent.agent.base import Requester, Respond
from zmqagent.autograd.container import DistAutogradContainer
from zmqagent.autograd.context import DistAutogradContext
from zmqagent.autograd.engine import DistEngine
from zmqagent.exceptions import CalleeError, ProtocolError, RpcError, UnreadableCallError
from zmqagent.rpc import failures, pickler
from zmqagent.rpc.messenger import Messenger
from zmqagent.rpc.profiler import RpcProfiler
from zmqagent.rpc.recordings import Profile
from zmqagent.rpc.scripts import check_returns_future
from zmqagent.rpc.thread_state import clean_state
from zmqagent.rpc.user_code import OnResult, on_future, on_result, resolve_script_function, script_ends
from zmqagent.rref.context import RRefContext
from zmqagent.rref.rref import OwnerRRef, backward_root
from zmqagent.wire.commands import (
    AbortBackward,
    Ack,
    BackwardAutograd,
    CleanupContexts,
    Command,
    Failure,
    ForwardAutograd,
    Pickled,
    PythonCall,
    PythonRemoteCall,
    RemoteReturn,
    Return,
    RRefBackward,
    RRefChildAccept,
    RRefFetch,
    RRefForkRequest,
    RRefUserDeletes,
    RunWithProfiling,
    ScriptCall,
    ScriptRemoteCall,
    parse,
)
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["RpcRequestCallback"]

_Call = PythonCall | ScriptCall | PythonRemoteCall | ScriptRemoteCall
_Load = Callable[[Pickled], Callable[[], Any]]


@frozen
class _Request:
    """One request while it is served: who asked, how to answer, and the autograd context and profile that came with it."""

    source: WorkerId
    respond: Respond
    context: DistAutogradContext | None
    profile: Profile | None = None


class RpcRequestCallback:
    """Serves the requests of all peers. See `zmqagent.agent.base.RequestCallback` for the contract."""

    def __init__(
        self,
        requester: Requester,
        messenger: Messenger,
        contexts: DistAutogradContainer,
        engine: DistEngine,
        rrefs: RRefContext,
        profiler: RpcProfiler,
    ) -> None:
        self._requester = requester
        self._messenger = messenger
        self._contexts = contexts
        self._engine = engine
        self._rrefs = rrefs
        self._profiler = profiler
        self._handlers: dict[type[Command], Callable[[_Request, Any], None]] = {
            PythonCall: self._python_call,
            ScriptCall: self._script_call,
            PythonRemoteCall: self._python_remote_call,
            ScriptRemoteCall: self._script_remote_call,
            RRefFetch: self._rref_fetch,
            RRefUserDeletes: self._rref_user_deletes,
            RRefForkRequest: self._rref_fork_request,
            RRefChildAccept: self._rref_child_accept,
            RRefBackward: self._rref_backward,
            BackwardAutograd: self._backward_autograd,
            AbortBackward: self._abort_backward,
            CleanupContexts: self._cleanup_context,
        }

    def __call__(self, source: WorkerId, message: Message, respond: Respond) -> None:
        command = parse(message)
        profile = context = None
        if isinstance(command, RunWithProfiling):
            profile, respond = self._profiler.serve(command, respond)
            command = parse(command.inner)
        if isinstance(command, ForwardAutograd):
            # Before a context is made for it: one that a broken message names is never released.
            self._handler(parse(command.inner))
            context = self._contexts.get_or_create_context(command.metadata.context_id)
            command = parse(self._messenger.unwrap_request(context, source, command))
        handler = self._handler(command)
        with self._contexts.activate(context), clean_state():
            handler(_Request(source, respond, context, profile), command)

    def on_unreadable(self, message: Message, error: RpcError) -> RpcError:
        """See `zmqagent.agent.base.OnUnreadableRequest`: a call whose tensors are not there is as good as one whose pickle cannot
        be read, so that its RRef has the error for a value."""
        command = parse(message)
        while isinstance(command, RunWithProfiling | ForwardAutograd):
            command = parse(command.inner)
        if not isinstance(command, _Call):
            return error
        unreadable = UnreadableCallError(str(error))
        if isinstance(command, PythonRemoteCall | ScriptRemoteCall):
            self._owner(command).set_error(unreadable)
        return unreadable

    def _handler(self, command: Command) -> Callable[[_Request, Any], None]:
        handler = self._handlers.get(type(command))
        if handler is None:
            raise ProtocolError(f"a {type(command).__name__} is no request that this worker serves")
        return handler

    # Calls. The function, or what it names, is loaded first; it runs when the owners know of the RRefs among its arguments.

    def _python_call(self, request: _Request, call: PythonCall) -> None:
        self._run(request, call, self._load_function, partial(self._answering(call), request))

    def _script_call(self, request: _Request, call: ScriptCall) -> None:
        done = partial(self._answering(call), request)
        self._run(request, call, partial(self._load_script, call), done if call.is_builtin else script_ends(done))

    def _answering(self, call: PythonCall | ScriptCall) -> Callable[[_Request, Any, BaseException | None], None]:
        # What returns a future is answered on whichever thread completes that.
        return self._answer_from_elsewhere if call.is_async else self._answer

    def _python_remote_call(self, request: _Request, call: PythonRemoteCall) -> None:
        keep = partial(self._keep, request, call, self._owner(call))
        self._run_remote(request, call, self._load_function, keep)

    def _script_remote_call(self, request: _Request, call: ScriptRemoteCall) -> None:
        keep = partial(self._keep, request, call, self._owner(call))
        self._run_remote(request, call, partial(self._load_script, call), keep if call.is_builtin else script_ends(keep))

    def _owner(self, call: PythonRemoteCall | ScriptRemoteCall) -> OwnerRRef:
        # It exists from now on, so that fetches which overtake the function find something to wait for.
        return self._rrefs.create_owner(call.rref_id, call.fork_id)

    def _run_remote(self, request: _Request, call: PythonRemoteCall | ScriptRemoteCall, load: _Load, keep: OnResult) -> None:
        try:
            self._run(request, call, load, keep)
        except BaseException as error:
            # Whatever it was, fetches wait for a value or for this.
            keep(None, error)

    def _run(self, request: _Request, call: _Call, load: _Load, done: OnResult) -> None:
        with self._rrefs.unpickling() as pending:
            try:
                function = load(call.body)
            except CalleeError as error:
                raise UnreadableCallError(str(error)) from error
        if pending:
            self._rrefs.when_confirmed(pending, partial(self._resume, request, function, call.is_async, done))
        else:
            self._start(request, function, call.is_async, done)

    def _resume(
        self,
        request: _Request,
        function: Callable[[], Any],
        is_async: bool,
        done: OnResult,
        error: RpcError | None,
    ) -> None:
        """Goes on with a call whose RRefs have been confirmed, or have not, by ``error``; runs on any thread."""
        with self._contexts.activate(request.context), clean_state():
            if error is not None:
                done(None, error)
            else:
                self._start(request, function, is_async, done)

    def _start(self, request: _Request, function: Callable[[], Any], is_async: bool, done: OnResult) -> None:
        function = self._profiler.recorded(function, request.profile)
        if is_async:
            on_future(function, done, current_streams(self._requester.devices))
        else:
            on_result(function, done)

    def _load_function(self, body: Pickled) -> Callable[[], Any]:
        function, args, kwargs = pickler.loads_call(body)
        # What cannot be called so is the caller's mistake, and comes back to it as Python's own error.
        return lambda: function(*args, **kwargs)

    def _load_script(self, call: ScriptCall | ScriptRemoteCall, body: Pickled) -> Callable[[], Any]:
        function = resolve_script_function(call.name, call.is_builtin)
        arguments = pickler.loads(body)
        try:
            args, kwargs = arguments
            args, kwargs = tuple(args), dict(kwargs)
        except (TypeError, ValueError) as error:
            raise CalleeError(f"a call of {call.name} carries arguments and a dict of named ones: {error}") from error
        if call.is_async and not call.is_builtin:
            check_returns_future(function)
        return partial(function, *args, **kwargs)

    def _describe(self, error: BaseException) -> Failure:
        return failures.describe_exception(error, self._me())

    def _me(self) -> str:
        me = self._requester.worker_id
        return f"WorkerInfo(id={me}, name={self._requester.worker_name(me)})"

    def _answer_from_elsewhere(self, request: _Request, value: Any, error: BaseException | None) -> None:
        """`_answer`, on a thread that may be anybody's."""
        with self._contexts.activate(request.context), clean_state():
            self._answer(request, value, error)

    def _answer(self, request: _Request, value: Any, error: BaseException | None) -> None:
        """Sends a function's value, or its exception, back."""
        if error is not None:
            request.respond(self._describe(error).to_message())
        else:
            self._respond_with(request, value)

    def _respond_with(self, request: _Request, value: Any) -> None:
        try:
            with self._rrefs.pickling() as forks:
                body = pickler.dumps(value)
                answer = Return(body, tuple(forks.shares)).to_message()
                if request.context is not None:
                    answer = self._messenger.wrap_answer(request.context, request.source, answer)
        except RpcError as refused:
            request.respond(failures.describe_error(refused, self._me()).to_message())
            return
        except BaseException as raised:
            # A reducer of the user's may raise SystemExit; the caller is owed an answer all the same.
            request.respond(self._describe(raised).to_message())
            return
        if request.respond(answer):
            forks.sent_to(request.source)
        else:
            forks.cancel()
            if request.context is not None:
                self._messenger.withdraw_answer(request.context, answer)

    # RRefs.

    def _keep(
        self,
        request: _Request,
        call: PythonRemoteCall | ScriptRemoteCall,
        owner: OwnerRRef,
        value: Any,
        error: BaseException | None,
    ) -> None:
        """Makes a remote call's value, or its exception, the owner's, and tells the creator that it is there."""
        if error is None:
            owner.set_value(value)
        else:
            owner.set_error(failures.rebuild(self._describe(error)))
        if isinstance(error, UnreadableCallError):
            request.respond(failures.describe_error(error, self._me()).to_message())
        else:
            request.respond(RemoteReturn(call.rref_id, call.fork_id).to_message())

    def _rref_fetch(self, request: _Request, fetch: RRefFetch) -> None:
        def ready(owner: OwnerRRef | None, error: BaseException | None) -> None:
            if owner is None or error is not None:
                request.respond(failures.describe_kept(error, self._me()).to_message())
            else:
                self._answer_from_elsewhere(request, owner.value(), None)

        self._rrefs.when_owner_ready(fetch.rref_id, ready)

    def _rref_user_deletes(self, request: _Request, command: RRefUserDeletes) -> None:
        self._rrefs.on_user_deletes(command.deletes)
        request.respond(Ack().to_message())

    def _rref_fork_request(self, request: _Request, fork: RRefForkRequest) -> None:
        self._rrefs.on_fork_request(request.source, fork.rref_id, fork.fork_id)
        request.respond(Ack().to_message())

    def _rref_child_accept(self, request: _Request, accept: RRefChildAccept) -> None:
        self._rrefs.on_child_accept(accept.fork_id)
        request.respond(Ack().to_message())

    def _rref_backward(self, request: _Request, backward: RRefBackward) -> None:
        def ready(owner: OwnerRRef | None, error: BaseException | None) -> None:
            if owner is None or error is not None:
                request.respond(failures.describe_kept(error, self._me()).to_message())
                return
            with clean_state():
                try:
                    root = backward_root(owner.value())
                    run = partial(self._engine.backward, backward.context_id, [root], backward.retain_graph)
                    self._profiler.recorded(run, None)()
                except Exception as failed:
                    request.respond(self._describe(failed).to_message())
                else:
                    request.respond(Ack(MessageType.RREF_BACKWARD_RESP).to_message())

        self._rrefs.when_owner_ready(backward.rref_id, ready)

    # Distributed autograd.

    def _backward_autograd(self, request: _Request, gradients: BackwardAutograd) -> None:
        self._profiler.recorded(partial(self._engine.on_backward, request.source, gradients, request.respond), None)()

    def _abort_backward(self, request: _Request, abort: AbortBackward) -> None:
        self._engine.on_abort(abort, request.respond)

    def _cleanup_context(self, request: _Request, cleanup: CleanupContexts) -> None:
        for context_id in cleanup.context_ids:
            self._contexts.on_cleanup(context_id, request.source)
        request.respond(Ack(MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP).to_message())
