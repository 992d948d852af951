"""`zmqagent.rpc.recordings`: what torch's legacy profiler shows besides its own records."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.autograd import ProfilerConfig, ProfilerState, _disable_profiler_legacy, _enable_profiler_legacy
from torch.autograd.profiler_legacy import profile

import zmqagent.backend
from zmqagent.rpc import recordings
from zmqagent.rpc.profile_records import Record, Values
from zmqagent.rpc.recordings import CallSpan, Flags, Profile, flags_of
from zmqagent.wire.types import WorkerId

NODE = WorkerId(4)
REMOTE = [[Record(Values("push", "aten::add", 1, 7, 2, 1)), Record(Values("pop", "", 1, 7, 2, 1))]]


@pytest.fixture(autouse=True)
def no_profiler_is_left_on() -> Iterator[None]:
    zmqagent.backend.register()
    yield
    assert not torch.autograd._profiler_enabled()


def on_thread(function: Callable[[], Any]) -> None:
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


def names(profiled: Any) -> list[str]:
    return [event.name for event in profiled.function_events]


def pushed(records: list[list[Record]]) -> list[str]:
    return [record.name() for each in records for record in each if record.kind() == "push"]


def span(name: str = "rpc_sync#f(a -> b)") -> CallSpan:
    begun = CallSpan.begin(name, NODE, time.time_ns())
    assert begun is not None
    return begun


@pytest.mark.parametrize("flag", [*Flags, Flags(0), Flags.SHAPES | Flags.STACK])
def test_a_configuration_is_remembered_and_made_again(flag: Flags) -> None:
    wanted = Flags(flag) & ~Flags.CUDA  # this machine has no accelerator: its flag is dropped
    assert flags_of(Flags(flag).config()) == wanted


def test_a_configuration_made_by_keywords_is_remembered_too() -> None:
    config = ProfilerConfig(
        state=ProfilerState.CPU,
        report_input_shapes=False,
        profile_memory=True,
        with_stack=False,
        with_flops=True,
        with_modules=False,
        experimental_config=torch.profiler._ExperimentalConfig(),
    )
    assert flags_of(config) == Flags.MEMORY | Flags.FLOPS


def test_the_flag_for_accelerators_is_told_to_callees() -> None:
    config = ProfilerConfig(ProfilerState.CUDA, True, False, False, False, False, torch.profiler._ExperimentalConfig())
    assert flags_of(config) == Flags.CUDA | Flags.SHAPES


def test_without_calls_torchs_own_records_come_back() -> None:
    _enable_profiler_legacy(Flags(0).config())
    events = _disable_profiler_legacy()
    assert all(isinstance(event, torch._C._autograd.ProfilerEvent) for each in events for event in each)


def test_a_call_shows_as_a_span_with_what_its_callee_did() -> None:
    with profile() as profiled:
        torch.ones(1)
        call = span()
        on_thread(lambda: call.end(time.time_ns(), REMOTE))
    assert {"aten::ones", "rpc_sync#f(a -> b)", "rpc_sync#f(a -> b)#remote_op: aten::add"} <= set(names(profiled))
    by_name = {event.name: event for event in profiled.function_events}
    ours, local = by_name["rpc_sync#f(a -> b)"], by_name["aten::ones"]
    assert (ours.node_id, ours.thread, ours.is_async, ours.is_remote) == (NODE, local.thread, True, False)
    assert by_name["rpc_sync#f(a -> b)#remote_op: aten::add"].node_id == 2
    assert ours.time_range.start >= local.time_range.end


def test_a_call_that_ends_after_the_profile_is_dropped() -> None:
    with profile() as profiled:
        call = span()
    call.end(time.time_ns(), REMOTE)
    assert names(profiled) == []
    with profile() as later:
        torch.ones(1)
    assert "aten::ones" in names(later)
    assert not [name for name in names(later) if "rpc" in name]


def test_a_call_of_a_thread_that_got_its_profiler_from_another_is_shown() -> None:
    with profile() as profiled:
        on_thread(lambda: span().end(time.time_ns(), REMOTE))
    assert {"rpc_sync#f(a -> b)", "rpc_sync#f(a -> b)#remote_op: aten::add"} <= set(names(profiled))


def test_of_two_profiles_neither_shows_a_call_that_may_be_of_either() -> None:
    spans: list[CallSpan | None] = []

    def call() -> None:
        with profile():
            on_thread(lambda: spans.append(CallSpan.begin("rpc_sync#f(a -> b)", NODE, time.time_ns())))

    with profile():
        on_thread(call)
    assert spans == [None]


def test_a_call_is_not_shown_if_the_profile_of_its_thread_is_over() -> None:
    with profile():
        pass
    assert CallSpan.begin("rpc_sync#f(a -> b)", NODE, time.time_ns()) is None


def test_a_thread_that_ends_takes_its_open_profile_along() -> None:
    on_thread(lambda: _enable_profiler_legacy(Flags(0).config()))
    with profile() as profiled:
        on_thread(lambda: span().end(time.time_ns(), REMOTE))
    assert "rpc_sync#f(a -> b)" in names(profiled)


def test_what_another_thread_does_for_a_profile_is_shown() -> None:
    def callback(of: Profile) -> None:
        with of.recording():
            torch.ones(1)

    with profile() as profiled:
        of = span().profile
        on_thread(lambda: callback(of))
    assert names(profiled).count("aten::ones") == 1


def test_the_end_of_a_profile_takes_a_recording_of_its_own_thread_along() -> None:
    of = Profile(Flags(0))
    with of.recording():
        torch.ones(1)
        assert "aten::ones" in pushed(of.close())
        assert not torch.autograd._profiler_enabled()


def test_the_end_of_a_profile_waits_for_a_recording_that_is_ending(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "_PATIENCE_S", 60.0)
    of = Profile(Flags(0))
    is_running, may_end = threading.Event(), threading.Event()

    def callback() -> None:
        with of.recording():
            torch.ones(1)
            is_running.set()
            may_end.wait()

    thread = threading.Thread(target=callback)
    thread.start()
    is_running.wait()
    closing = threading.Thread(target=lambda: shown.extend(pushed(of.close())))
    shown: list[str] = []
    closing.start()
    may_end.set()
    closing.join()
    thread.join()
    assert "aten::ones" in shown


def test_the_end_of_a_profile_does_not_wait_for_one_that_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "_PATIENCE_S", 0.01)
    of = Profile(Flags(0))
    is_running, is_over = threading.Event(), threading.Event()

    def callback() -> None:
        with of.recording():
            is_running.set()
            is_over.wait()

    thread = threading.Thread(target=callback)
    thread.start()
    is_running.wait()
    assert of.close() == []
    is_over.set()
    thread.join()


def test_nothing_is_recorded_for_a_profile_that_has_ended() -> None:
    of = Profile(Flags(0))
    of.close()
    with of.recording():
        assert not torch.autograd._profiler_enabled()


def test_a_thread_that_profiles_already_is_left_alone() -> None:
    with profile() as profiled, Profile(Flags(0)).recording():
        torch.ones(1)
    assert "aten::ones" in names(profiled)


def test_an_error_ends_a_recording() -> None:
    of = Profile(Flags(0))
    with pytest.raises(ZeroDivisionError), of.recording():
        torch.ones(1 // 0)
    assert not torch.autograd._profiler_enabled()
    with of.recording():
        torch.ones(1)
    assert "aten::ones" in pushed(of.close())


def test_user_code_may_switch_the_profiler_off_that_records_it() -> None:
    of = Profile(Flags(0))
    with of.recording():
        torch.ones(1)
        (events,) = _disable_profiler_legacy()
    assert "aten::ones" in {event.name() for event in events}
    assert of.close() == []


def test_memory_and_shapes_are_recorded_if_wanted() -> None:
    def allocates(flags: Flags) -> tuple[bool, bool]:
        of = Profile(flags)
        with of.recording():
            torch.ones(3).add_(torch.ones(3))
        records = [record for each in of.close() for record in each]
        return any(record.cpu_memory_usage() for record in records), any([3] in record.shapes() for record in records)

    assert allocates(Flags(0)) == (False, False)
    assert allocates(Flags.MEMORY) == (True, False)
    assert allocates(Flags.SHAPES) == (False, True)
