"""Calls that are profiled: by torch's legacy profiler, with what the callee did, and as spans in Kineto's traces.

torch's ``rpc_sync``, ``rpc_async`` and ``remote`` ask for a context manager before they pickle and send a call, and get it from
`RpcProfiler.profiled_call`. While its body runs, `current_call` tells `Invoker` how the call is profiled, if it is.

Under the legacy profiler the request is wrapped (`RunWithProfiling`); the callee runs it under a profiler of its own and sends
the records with the answer (`ProfiledReturn`). The server-process-global profiler records what this worker does for others,
whoever asked; a request that is profiled for both is recorded once. It belongs to the process: a range may begin before a worker
starts and end after that has shut down.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Protocol

import torch
from torch._C._profiler import ActiveProfilerType, ProfilerConfig
from torch.distributed.rpc import WorkerInfo
from torch.distributed.rpc.internal import RPCExecMode, _build_rpc_profiling_key
from torch.futures import Future

from zmqagent.agent.base import OnReply, Reply, Requester, Respond
from zmqagent.exceptions import NotInitializedError, RpcError
from zmqagent.rpc import profile_records, trace_spans
from zmqagent.rpc.profile_records import Records
from zmqagent.rpc.recordings import CallSpan, Flags, Profile, flags_of
from zmqagent.rpc.shares import give_back
from zmqagent.wire.commands import Failure, ProfiledReturn, RunWithProfiling, parse
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["ProfiledCall", "RpcProfiler", "ServerProfiler", "current_call", "server_profiler"]


class ProfiledCall(Protocol):
    """How one call is profiled."""

    def begin(self, message: Message, on_reply: OnReply) -> tuple[Message, OnReply]:
        """The call is about to be sent: what to send, and what to do with the reply, in place of ``message`` and ``on_reply``."""

    def abandon(self) -> None:
        """The call was not sent after all."""


class _Current(threading.local):
    call: ProfiledCall | None = None


_current = _Current()

_NOT_PROFILED = nullcontext()


def current_call() -> ProfiledCall | None:
    """How the call that this thread is making is profiled; None if it is not."""
    return _current.call


class _Scope:
    """The body of torch's calling functions; calls made while one is pickled have scopes of their own."""

    def __init__(self, call: ProfiledCall | None) -> None:
        self._call = call
        self._former: ProfiledCall | None = None

    def __enter__(self) -> _Scope:
        self._former, _current.call = _current.call, self._call
        return self

    def __exit__(self, *_: object) -> None:
        _current.call = self._former

    def _call_end_callbacks_on_future(self, future: Future[Any]) -> Future[Any]:
        # torch ends the event of the call here. This one has ended whenever the future is done, which may be handed out itself.
        return future


class RpcProfiler:
    """The profiling of one worker's calls and requests."""

    def __init__(self, requester: Requester) -> None:
        self._requester = requester

    # Calls of this worker.

    def profiled_call(
        self, is_legacy: bool, builtin: str | None, function: Any, mode: RPCExecMode, to: WorkerInfo
    ) -> AbstractContextManager[Any]:
        """torch's ``_enable_rpc_profiler``; for calls under Kineto too, of which torch takes no notice."""
        if not torch.autograd._profiler_enabled():
            return _NOT_PROFILED
        name = builtin or _name(function)
        me = self._requester.worker_name(self._requester.worker_id)
        if is_legacy:
            key = _build_rpc_profiling_key(mode, name, me, to.name)
            span = CallSpan.begin(key, self._requester.worker_id, time.time_ns())
            return _Scope(None if span is None else _LegacyCall(span, resumes=mode is RPCExecMode.ASYNC))
        if _is_kineto():
            return _Scope(_TracedCall(f"rpc#{name}({me} -> {to.name})"))
        return _NOT_PROFILED

    def traced(self, name: str, to: WorkerId) -> ProfiledCall | None:
        """How a call that is not made by torch's calling functions is profiled: as a span called ``name``, under Kineto only."""
        if not (torch.autograd._profiler_enabled() and _is_kineto()):
            return None
        me = self._requester.worker_name(self._requester.worker_id)
        return _TracedCall(f"rpc#{name}({me} -> {self._requester.worker_name(to)})")

    # Requests of others.

    def serve(self, request: RunWithProfiling, respond: Respond) -> tuple[Profile, Respond]:
        """A profile for what is done to serve ``request``, and how to answer, which ends it."""
        profile = Profile(Flags(request.flags & sum(Flags)) | _flags_for(server_profiler.ranges))
        return profile, partial(_respond, profile, respond)

    def recorded(self, function: Callable[[], Any], profile: Profile | None) -> Callable[[], Any]:
        """``function``, so that running it is recorded for ``profile`` and for the server-process-global profiler, if there are
        any."""
        ranges = server_profiler.ranges
        if profile is None and not ranges:
            return function

        def run() -> Any:
            recorder = profile or Profile(_flags_for(ranges))
            try:
                with recorder.recording():
                    return function()
            finally:
                records = recorder.so_far()
                for each in ranges:
                    each.add(records)

        return run


def _name(function: Any) -> str:
    if isinstance(function, torch.jit.ScriptFunction):
        return str(torch._jit_internal._qualified_name(function))
    return getattr(function, "__qualname__", None) or type(function).__qualname__


def _is_kineto() -> bool:
    return torch._C._autograd._profiler_type() == ActiveProfilerType.KINETO


class _LegacyCall:
    """A call under torch's legacy profiler. ``resumes``: callbacks of its future are recorded as well, as with torch's agent."""

    def __init__(self, span: CallSpan, *, resumes: bool) -> None:
        self._span = span
        self._resumes = resumes

    def begin(self, message: Message, on_reply: OnReply) -> tuple[Message, OnReply]:
        return RunWithProfiling(int(self._span.profile.flags), message).to_message(), partial(self._end, on_reply)

    def abandon(self) -> None:
        self._span.end(time.time_ns(), [])

    def _end(self, on_reply: OnReply, reply: Reply) -> None:
        now = time.time_ns()
        records: Records = []
        if isinstance(reply, ProfiledReturn):
            records, reply = _unwrapped(reply)
        self._span.end(now, records)
        if not self._resumes:
            on_reply(reply)
            return
        with self._span.profile.recording():
            on_reply(reply)


def _unwrapped(answer: ProfiledReturn) -> tuple[Records, Reply]:
    try:
        return profile_records.unpack(answer.records), parse(answer.inner)
    except RpcError as error:
        give_back(answer)
        return [], error


class _TracedCall:
    """A call under Kineto."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._span: trace_spans.TraceSpan | None = None

    def begin(self, message: Message, on_reply: OnReply) -> tuple[Message, OnReply]:
        self._span = trace_spans.begin(self._name, trace_spans.size(message))
        return message, partial(self._end, on_reply)

    def abandon(self) -> None:
        if self._span is not None:
            self._span.end()

    def _end(self, on_reply: OnReply, reply: Reply) -> None:
        # Before the future is done: whoever waits for it may then end the profile at once.
        self.abandon()
        on_reply(reply)


def _respond(profile: Profile, respond: Respond, answer: Message) -> bool:
    records = profile.close()
    if answer.type is MessageType.EXCEPTION:
        failure = parse(answer)
        if isinstance(failure, Failure) and failure.code:
            # The agent at the other end turns its kind of errors into exceptions, and looks into no wrapper for them.
            return respond(answer)
    return respond(ProfiledReturn(profile_records.pack(records), answer).to_message())


class _Range:
    """One range of the server-process-global profiler."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        # Protects the list: many threads add, while the one that ends the range takes it.
        self._lock = threading.Lock()
        self._results: list[Records] = []

    def add(self, records: Records) -> None:
        """What was recorded of one request."""
        with self._lock:
            self._results.append(records)

    def results(self) -> list[Records]:
        """What was recorded until now."""
        with self._lock:
            return list(self._results)


def _flags_for(ranges: Sequence[_Range]) -> Flags:
    return ranges[-1].flags if ranges else Flags(0)


class ServerProfiler:
    """The server-process-global profiler, which records what the workers of this process do for others."""

    def __init__(self) -> None:
        # Protects changes of the tuple, which is replaced whole and read without it.
        self._lock = threading.Lock()
        self.ranges: tuple[_Range, ...] = ()
        """Those that were entered and not left, from the outermost to the innermost."""

    def enable(self, config: ProfilerConfig) -> None:
        """Begins a range: from now on all requests of others are recorded."""
        with self._lock:
            self.ranges = (*self.ranges, _Range(flags_of(config)))

    def disable(self) -> list[Records]:
        """Ends the innermost range; returns what was recorded in it, by request.

        Raises:
            NotInitializedError: there is none.
        """
        with self._lock:
            if not self.ranges:
                raise NotInitializedError("the server-process-global profiler is not enabled: enter it before you exit it")
            *outer, innermost = self.ranges
            self.ranges = tuple(outer)
        return innermost.results()


server_profiler = ServerProfiler()
"""This process's."""
