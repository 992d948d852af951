"""`zmqagent.rpc.profiler`: which calls are sent wrapped, what comes back with answers, and what a server records."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.rpc as rpc
from torch.autograd.profiler_legacy import _parse_legacy_records, profile
from torch.distributed.rpc.internal import RPCExecMode

import zmqagent.backend
from zmqagent import torch_bindings
from zmqagent.agent.base import Reply
from zmqagent.exceptions import CalleeError, NotInitializedError, ProtocolError
from zmqagent.rpc.profile_records import Record, Values, pack, unpack
from zmqagent.rpc.profiler import RpcProfiler, current_call, server_profiler
from zmqagent.rpc.recordings import Flags, Profile
from zmqagent.wire.commands import Failure, Pickled, ProfiledReturn, PythonCall, Return, RunWithProfiling, parse
from zmqagent.wire.types import Message, WorkerId

PEER = rpc.WorkerInfo("b", 1)
CALL = PythonCall(Pickled(b"call"), False).to_message()
ANSWER = Return(Pickled(b"value", (b"buffer",), ("tensor",)))
FAILED = Failure(0, "ValueError", "bad")


class Agent:
    """Just the names that the profiler asks for."""

    worker_id = WorkerId(0)

    def worker_name(self, worker_id: int) -> str:
        return "ab"[worker_id]


@pytest.fixture
def profiler() -> Iterator[RpcProfiler]:
    zmqagent.backend.register()
    yield RpcProfiler(Agent())  # type: ignore[arg-type]
    assert current_call() is None
    assert not torch.autograd._profiler_enabled()
    assert not server_profiler.ranges


def begun(profiler: RpcProfiler, function: Any = len, mode: RPCExecMode = RPCExecMode.SYNC) -> tuple[Message, Any, list[Reply]]:
    """A call under the profiler that is on in this thread: what is sent, what takes the reply, and the replies it passes on."""
    replies: list[Reply] = []
    with profiler.profiled_call(rpc.api._get_should_profile(), None, function, mode, PEER):
        call = current_call()
        assert call is not None
        message, on_reply = call.begin(CALL, replies.append)
    return message, on_reply, replies


def answered(answer: Message, node: int = 1) -> Any:
    """The answer to a profiled call that added two tensors."""
    records = [[Record(Values("push", "aten::add", 1, 7, node, 1)), Record(Values("pop", "", 1, 7, node, 2))]]
    return parse(ProfiledReturn(pack(records), answer).to_message())


def names(profiled: Any) -> list[str]:
    return [event.name for event in profiled.function_events]


def test_without_a_profiler_a_call_is_not_touched(profiler: RpcProfiler) -> None:
    with profiler.profiled_call(False, None, len, RPCExecMode.SYNC, PEER):
        assert current_call() is None
    assert profiler.traced("RRef.to_here", WorkerId(1)) is None


def test_under_the_legacy_profiler_a_call_is_wrapped_with_what_is_wanted(profiler: RpcProfiler) -> None:
    with profile(record_shapes=True, profile_memory=True):
        message, _on_reply, _replies = begun(profiler)
    assert parse(message) == RunWithProfiling(Flags.SHAPES | Flags.MEMORY, CALL)


def test_the_answer_comes_out_of_its_wrapper_and_the_callees_events_go_into_the_profile(profiler: RpcProfiler) -> None:
    with profile() as profiled:
        _message, on_reply, replies = begun(profiler)
        on_reply(answered(ANSWER.to_message()))
    assert replies == [ANSWER]
    assert set(names(profiled)) == {"rpc_sync#len(a -> b)", "rpc_sync#len(a -> b)#remote_op: aten::add"}


@pytest.mark.parametrize("reply", [ANSWER, FAILED, CalleeError("no such function")])
def test_a_reply_without_records_is_passed_on_and_the_call_is_shown(profiler: RpcProfiler, reply: Any) -> None:
    with profile() as profiled:
        _message, on_reply, replies = begun(profiler)
        on_reply(reply)
    assert replies == [reply]
    assert names(profiled) == ["rpc_sync#len(a -> b)"]


def test_records_that_cannot_be_read_fail_the_call_and_the_profile_goes_on(profiler: RpcProfiler) -> None:
    with profile() as profiled:
        _message, on_reply, replies = begun(profiler)
        on_reply(ProfiledReturn(b"\xc1", ANSWER.to_message()))
        torch.ones(1)
    (error,) = replies
    assert isinstance(error, ProtocolError)
    assert {"rpc_sync#len(a -> b)", "aten::ones"} <= set(names(profiled))


def test_a_call_that_is_not_sent_is_shown_until_then(profiler: RpcProfiler) -> None:
    with profile() as profiled, profiler.profiled_call(True, None, len, RPCExecMode.SYNC, PEER):
        call = current_call()
        assert call is not None
        call.begin(CALL, lambda reply: None)
        call.abandon()
    assert names(profiled) == ["rpc_sync#len(a -> b)"]


def test_a_call_whose_profile_nobody_knows_is_sent_as_it_is(profiler: RpcProfiler) -> None:
    torch_bindings.original("_enable_profiler_legacy")(Flags(0).config())
    with profiler.profiled_call(True, None, len, RPCExecMode.SYNC, PEER) as scope:
        assert current_call() is None
        future: torch.futures.Future[int] = torch.futures.Future()
        assert scope._call_end_callbacks_on_future(future) is future
    torch_bindings.original("_disable_profiler_legacy")()


@pytest.mark.parametrize(("mode", "is_shown"), [(RPCExecMode.ASYNC, True), (RPCExecMode.SYNC, False)])
def test_callbacks_of_an_asynchronous_calls_future_are_recorded(profiler: RpcProfiler, mode: RPCExecMode, is_shown: bool) -> None:
    def callback(reply: Reply) -> None:
        torch.zeros(1)

    with profile() as profiled:
        with profiler.profiled_call(True, None, len, mode, PEER):
            call = current_call()
            assert call is not None
            _message, on_reply = call.begin(CALL, callback)
        thread = threading.Thread(target=on_reply, args=(ANSWER,))
        thread.start()
        thread.join()
    assert ("aten::zeros" in names(profiled)) is is_shown


class Callable:
    def __call__(self) -> None:
        pass


@pytest.mark.parametrize(
    ("function", "name"),
    [(max, "max"), (Agent.worker_name, "Agent.worker_name"), (Callable(), "Callable"), (partial(max), "partial")],
)
def test_whatever_can_be_called_has_a_name(profiler: RpcProfiler, function: Any, name: str) -> None:
    with profile() as profiled:
        _message, on_reply, _replies = begun(profiler, function)
        on_reply(ANSWER)
    assert names(profiled) == [f"rpc_sync#{name}(a -> b)"]


def test_a_call_that_pickling_another_makes_is_profiled_for_itself(profiler: RpcProfiler) -> None:
    with profile(), profiler.profiled_call(True, None, len, RPCExecMode.SYNC, PEER):
        outer = current_call()
        begun(profiler)
        assert current_call() is outer


# Under Kineto.


def test_under_kineto_a_call_is_a_span_and_what_is_sent_is_not_touched(profiler: RpcProfiler) -> None:
    with torch.profiler.profile() as profiled:
        message, on_reply, replies = begun(profiler)
        on_reply(ANSWER)
    assert message is CALL
    assert replies == [ANSWER]
    assert "rpc#len(a -> b) 4 B" in [event.name for event in profiled.events()]


def test_under_kineto_the_fetch_of_a_value_is_a_span(profiler: RpcProfiler) -> None:
    with torch.profiler.profile() as profiled:
        call = profiler.traced("RRef.to_here", WorkerId(1))
        assert call is not None
        call.begin(CALL, lambda reply: None)
        call.abandon()
    assert "rpc#RRef.to_here(a -> b) 4 B" in [event.name for event in profiled.events()]


# What a callee does.


def served(profiler: RpcProfiler, answer: Message, flags: int = 0) -> tuple[Profile, list[Message]]:
    """A request that ran one operator and was answered."""
    answers: list[Message] = []
    request = RunWithProfiling(flags, CALL)

    def respond(message: Message) -> bool:
        answers.append(message)
        return True

    of, respond_profiled = profiler.serve(request, respond)
    profiler.recorded(lambda: torch.ones(1), of)()
    assert respond_profiled(answer)
    return of, answers


@pytest.mark.parametrize("answer", [ANSWER.to_message(), FAILED.to_message()])
def test_an_answer_takes_along_what_was_recorded(profiler: RpcProfiler, answer: Message) -> None:
    _of, (sent,) = served(profiler, answer)
    wrapped = parse(sent)
    assert isinstance(wrapped, ProfiledReturn)
    assert wrapped.inner == answer
    assert "aten::ones" in {record.name() for each in unpack(wrapped.records) for record in each}


def test_an_error_of_the_agent_travels_bare(profiler: RpcProfiler) -> None:
    refused = Failure(24, "CalleeError", "no such function").to_message()
    assert served(profiler, refused)[1] == [refused]


def test_flags_of_another_release_are_ignored(profiler: RpcProfiler) -> None:
    of, _answers = served(profiler, ANSWER.to_message(), flags=Flags.MEMORY | 1 << 20)
    assert of.flags == Flags.MEMORY


def test_without_a_profiler_a_function_is_run_as_it_is(profiler: RpcProfiler) -> None:
    assert profiler.recorded(len, None) is len


# The server-process-global profiler.


def ran(profiler: RpcProfiler, function: Any) -> None:
    profiler.recorded(lambda: function(1), None)()


def shown(results: Any) -> list[set[str]]:
    return [{event.name for event in _parse_legacy_records(records)} for records in results]


def test_each_range_holds_what_was_served_within_it(profiler: RpcProfiler) -> None:
    ran(profiler, torch.empty)
    server_profiler.enable(Flags(0).config())
    ran(profiler, torch.ones)
    server_profiler.enable(Flags(0).config())
    ran(profiler, torch.zeros)
    (inner,) = shown(server_profiler.disable())
    outer = shown(server_profiler.disable())
    assert "aten::zeros" in inner
    assert len(outer) == 2
    assert "aten::ones" in outer[0]
    assert outer[1] == inner


def test_a_range_that_was_never_entered_cannot_be_left(profiler: RpcProfiler) -> None:
    with pytest.raises(NotInitializedError, match="server-process-global profiler is not enabled"):
        server_profiler.disable()


def test_a_request_that_is_profiled_for_caller_and_server_is_recorded_for_both(profiler: RpcProfiler) -> None:
    server_profiler.enable(Flags.MEMORY.config())
    of, (sent,) = served(profiler, ANSWER.to_message(), flags=Flags.SHAPES)
    (result,) = shown(server_profiler.disable())
    assert of.flags == Flags.SHAPES | Flags.MEMORY
    wrapped = parse(sent)
    assert isinstance(wrapped, ProfiledReturn)
    assert "aten::ones" in {record.name() for each in unpack(wrapped.records) for record in each}
    assert "aten::ones" in result


def test_a_function_that_raises_is_shown_too(profiler: RpcProfiler) -> None:
    server_profiler.enable(Flags(0).config())
    with pytest.raises(RuntimeError, match="negative dimension"):
        ran(profiler, lambda one: torch.ones(-one))
    (result,) = shown(server_profiler.disable())
    assert "aten::ones" in result
