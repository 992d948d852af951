"""`zmqagent.rpc.trace_spans`: calls as spans in Kineto's traces."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

import zmqagent.backend
from zmqagent.rpc import trace_spans
from zmqagent.rpc.trace_spans import TraceSpan
from zmqagent.wire.types import Message, MessageType


def kineto(**options: Any) -> Any:
    zmqagent.backend.register()
    return profile(activities=[ProfilerActivity.CPU], **options)


def carrying(*tensors: Any, payload: bytes = b"", buffers: Any = ()) -> Message:
    return Message(MessageType.PYTHON_CALL, (), payload, buffers, tensors)


def begun(name: str = "rpc#f(a -> b)", carried: int = 1) -> TraceSpan:
    span = trace_spans.begin(name, carried)
    assert span is not None
    return span


def event(profiled: Any, name: str) -> Any:
    (found,) = [event for event in profiled.events() if event.name == name]
    return found


def test_a_span_lasts_until_another_thread_ends_it() -> None:
    with kineto() as profiled:
        span = begun()
        torch.ones(1)
        thread = threading.Thread(target=span.end)
        thread.start()
        thread.join()
        torch.zeros(1)
    ours, within, after = (event(profiled, name).time_range for name in ("rpc#f(a -> b) 1 B", "aten::ones", "aten::zeros"))
    assert ours.start <= within.start <= within.end <= ours.end <= after.start


def test_the_exact_size_is_an_input_if_shapes_are_recorded() -> None:
    with kineto(record_shapes=True) as profiled:
        begun(carried=1_234_567).end()
    assert event(profiled, "rpc#f(a -> b) 1.23 MB").concrete_inputs == [1_234_567]


def test_a_span_whose_call_goes_on_ends_with_the_profile() -> None:
    with kineto() as profiled:
        span = begun()
    assert not trace_spans._open
    span.end()
    assert event(profiled, "rpc#f(a -> b) 1 B").time_range.elapsed_us() > 0


def test_a_span_may_be_ended_twice() -> None:
    with kineto():
        span = begun()
        span.end()
        span.end()


def test_no_span_begins_on_another_thread_than_the_one_that_profiles() -> None:
    spans: list[TraceSpan | None] = []
    with kineto():
        thread = threading.Thread(target=lambda: spans.append(trace_spans.begin("rpc#f(a -> b)", 1)))
        thread.start()
        thread.join()
        begun().end()
    assert spans == [None]


def test_no_span_begins_after_the_profile() -> None:
    with kineto():
        pass
    assert trace_spans.begin("rpc#f(a -> b)", 1) is None


@pytest.mark.parametrize(
    ("amount", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1 kB"), (4_096, "4.1 kB"), (999_600, "1 MB"), (123_456, "123 kB"), (5e12, "5e+03 GB")],
)
def test_sizes_are_rounded_to_three_digits(amount: float, text: str) -> None:
    assert trace_spans._rounded(amount) == text


def test_a_message_carries_its_pickle_its_buffers_and_its_tensors() -> None:
    message = carrying(torch.ones(3), torch.ones(2, dtype=torch.int64), payload=b"pickle", buffers=[b"abc", memoryview(b"d")])
    assert trace_spans.size(message) == 6 + 4 + 12 + 16


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state")
@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc])
def test_a_sparse_tensor_carries_its_indices_and_values(layout: torch.layout) -> None:
    blocks = {"blocksize": (1, 1)} if layout in (torch.sparse_bsr, torch.sparse_bsc) else {}
    sparse = torch.eye(4).to_sparse(layout=layout, **blocks)
    indices = 4 * 2 * 8 if layout is torch.sparse_coo else (5 + 4) * 8
    assert trace_spans.size(carrying(sparse)) == 4 * 4 + indices


def test_a_tensor_without_elements_to_send_carries_nothing() -> None:
    assert trace_spans.size(carrying(torch.ones(5, device="meta"))) == 0
