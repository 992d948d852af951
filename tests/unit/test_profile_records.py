"""`zmqagent.rpc.profile_records`: records that pass for torch's, survive the wire, and are shown under the name of their call."""

from __future__ import annotations

import itertools
import typing
from typing import Any

import msgpack
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._C._profiler import ProfilerConfig, ProfilerState, _ExperimentalConfig
from torch.autograd import _disable_profiler_legacy, _enable_profiler_legacy
from torch.autograd.profiler_legacy import _parse_legacy_records

from zmqagent.exceptions import ProtocolError
from zmqagent.rpc.profile_records import Record, Records, Values, from_remote, from_torch, pack, unpack

PUSH = Values("push", "aten::add", 1, 7, 0, 2_000, shapes=((2, 3), ()), stack=("file.py(3)",), flops=6)
POP = Values("pop", "", 1, 7, 0, 5_000)
INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
TEXTS = st.text(max_size=5)


@pytest.fixture(scope="module")
def recorded() -> list[list[Any]]:
    """What torch's profiler returns for a few operators."""
    _enable_profiler_legacy(ProfilerConfig(ProfilerState.CPU, True, True, False, True, False, _ExperimentalConfig()))
    with torch.autograd.profiler.record_function("a block"):
        torch.mm(torch.ones(2, 3), torch.ones(3, 4))
    events: list[list[Any]] = _disable_profiler_legacy()
    return events


def described(events: list[Any]) -> list[tuple[Any, ...]]:
    """What torch's parser makes of records, times rounded to its own resolution."""
    return [
        (
            *(event.name, event.thread, event.node_id, event.is_remote, event.is_async, event.scope, event.flops),
            *(event.input_shapes, event.cpu_memory_usage, event.sequence_nr, event.id, event.stack),
            *(round(event.time_range.start, 1), round(event.time_range.end, 1)),
        )
        for event in events
    ]


def test_torch_makes_the_same_events_of_converted_records_as_of_its_own(recorded: list[list[Any]]) -> None:
    expected = described(_parse_legacy_records(recorded))
    assert {"a block", "aten::mm"} <= {event[0] for event in expected}
    assert described(_parse_legacy_records(from_torch(recorded))) == expected


def test_the_times_of_records_count_from_the_epoch(recorded: list[list[Any]]) -> None:
    for event, record in zip(itertools.chain(*recorded), itertools.chain(*from_torch(recorded)), strict=True):
        assert record.start_us() == pytest.approx(event.start_us(), abs=1)


def test_records_survive_the_wire_without_marks(recorded: list[list[Any]]) -> None:
    (sent,) = from_torch(recorded)
    (got,) = unpack(memoryview(pack([sent])))
    assert [record.values for record in got] == [record.values for record in sent if record.kind() != "mark"]
    assert all(record.is_remote() for record in got)


@given(
    st.builds(
        Values,
        kind=TEXTS,
        name=st.text(st.characters(), max_size=5),
        **{name: INTEGERS for name, kind in typing.get_type_hints(Values).items() if kind is int},
        is_async=st.booleans(),
        cuda_us=st.floats(allow_nan=False),
        shapes=st.lists(st.lists(INTEGERS, max_size=2).map(tuple), max_size=2).map(tuple),
        stack=st.lists(TEXTS, max_size=2).map(tuple),
    )
)
def test_any_values_survive_the_wire(values: Values) -> None:
    assert unpack(pack([[Record(values)]])) == [[Record(values, remote=True)]]


@pytest.mark.parametrize(
    "bad",
    [
        5,
        [5],
        [[5]],
        [[PUSH[:-1]]],
        [[(*PUSH, 0)]],
        [[PUSH._replace(cpu_ns=True)]],
        [[PUSH._replace(name=b"bytes")]],
        [[PUSH._replace(shapes=(3,))]],
        [[PUSH._replace(shapes=(("x",),))]],
        [[PUSH._replace(stack=(3,))]],
        {"a": 1},
    ],
)
def test_what_are_no_records_is_refused(bad: Any) -> None:
    with pytest.raises(ProtocolError, match="profiled call"):
        unpack(msgpack.packb(bad))


@given(st.binary(max_size=60))
def test_any_bytes_are_read_or_refused(data: bytes) -> None:
    try:
        records = unpack(data)
    except ProtocolError:
        return
    assert unpack(pack(records)) == [[record for record in each if record.kind() != "mark"] for each in records]


def remote(records: Records, began_ns: int, ended_ns: int) -> list[Record]:
    (shown,) = from_remote(records, "rpc_sync#f(a -> b)", began_ns, ended_ns)
    return shown


def test_what_a_callee_did_is_shown_under_the_name_of_the_call() -> None:
    push, pop = remote([[Record(PUSH), Record(POP)]], 1_000, 6_000)
    assert push.name() == "rpc_sync#f(a -> b)#remote_op: aten::add"
    assert pop.name() == ""
    assert push.is_remote()
    assert pop.is_remote()
    assert (push.start_us(), push.cpu_elapsed_us(pop)) == (2.0, 3.0)


def test_records_of_a_host_with_another_clock_are_moved_to_the_middle_of_the_call() -> None:
    push, pop = remote([[Record(PUSH), Record(POP)]], 1_000_000, 1_007_000)
    assert (push.start_us(), pop.start_us()) == (1002.0, 1005.0)


def test_a_call_without_records_shows_none() -> None:
    assert from_remote([], "f", 1, 2) == []
    assert remote([[]], 1, 2) == []


class CudaEvent:
    """As torch's, for a machine with an accelerator."""

    def __init__(self, name: str, ns: int, device: int = -1, cuda_us: float = 0.0) -> None:
        self._name, self._ns, self._device, self._cuda_us = name, ns, device, cuda_us

    def name(self) -> str:
        return self._name

    def start_us(self) -> float:
        return self._ns / 1000

    def cpu_elapsed_us(self, other: CudaEvent) -> float:
        return (other._ns - self._ns) / 1000

    def has_cuda(self) -> bool:
        return self._device >= 0

    def device(self) -> int:
        return self._device

    def cuda_elapsed_us(self, other: CudaEvent) -> float:
        assert self._device == other._device
        return other._cuda_us - self._cuda_us

    def __getattr__(self, question: str) -> Any:
        answers: dict[str, Any] = {"kind": "push", "shapes": [], "stack": [], "is_async": False, "is_remote": False}
        return lambda: answers.get(question, 3)


def test_times_of_accelerators_are_kept_as_differences() -> None:
    events = [
        CudaEvent("__start_profile", 1_000),
        CudaEvent("k", 2_000, device=1, cuda_us=70.0),
        CudaEvent("other", 2_000, device=0, cuda_us=1.0),
        CudaEvent("", 3_000, device=1, cuda_us=95.5),
    ]
    (records,) = unpack(pack(from_torch([events])))
    _start, push, _other, pop = records
    assert push.has_cuda()
    assert push.device() == 1
    assert push.cuda_elapsed_us(pop) == 25.5
    assert push.cuda_memory_usage() == 3
