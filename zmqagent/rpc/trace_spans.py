"""Calls as spans in the trace of torch's Kineto profiler (``torch.profiler.profile``), which torch's own RPC leaves out.

A span begins when its call is sent and lasts until the answer is there, whichever thread takes that. torch ends a recorded
function on another thread only through a future that was tied to it on the thread which began it; such a future is all that is
kept here. It must not end after Kineto has stopped: Kineto would write into memory that it has given up. So `end_all` stands
before each stop, and spans of calls that are still under way end there.

Nor must one begin after that. torch hands its profiler to the threads of ``torch.jit.fork``, and these find it on even when it
has stopped. So `begin` heeds only the thread that switched Kineto on, of which `entered` is told.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

import torch
from torch.futures import Future

from zmqagent.wire.types import Message

__all__ = ["TraceSpan", "begin", "end_all", "entered", "size"]

# Protects the two below, and keeps spans from beginning and ending while Kineto stops. Reentrant, since garbage may be collected
# while it is held, and a finaliser make a call.
_lock = threading.RLock()
_open: set[TraceSpan] = set()
_profiled_thread: int | None = None

_COMPRESSED_ROWS = ("crow_indices", "col_indices", "values")
_COMPRESSED_COLUMNS = ("ccol_indices", "row_indices", "values")
_SPARSE: dict[torch.layout, Sequence[str]] = {
    torch.sparse_coo: ("_indices", "_values"),
    torch.sparse_csr: _COMPRESSED_ROWS,
    torch.sparse_bsr: _COMPRESSED_ROWS,
    torch.sparse_csc: _COMPRESSED_COLUMNS,
    torch.sparse_bsc: _COMPRESSED_COLUMNS,
}


class TraceSpan:
    """One span that has begun; made by `begin`."""

    def __init__(self, tied: Future[None]) -> None:
        self._tied = tied

    def end(self) -> None:
        """Ends the span, unless it has ended."""
        with _lock:
            if self in _open:
                _open.discard(self)
                self._tied.set_result(None)


def begin(name: str, carried: int) -> TraceSpan | None:
    """Begins a span; None if this is not the thread that switched Kineto on. Its name tells the amount of bytes that are
    ``carried`` in round figures, so that calls of a kind stay together; with ``record_shapes`` its input is the exact number."""
    with _lock:
        if threading.get_ident() != _profiled_thread:
            return None
        tied: Future[None] = Future()
        # torch's operators look at their arguments' overrides otherwise, which takes longer than all the rest.
        with torch._C.DisableTorchFunctionSubclass():
            handle = torch.autograd._record_function_with_args_enter(f"{name} {_rounded(carried)}", carried)
            torch.ops.profiler._call_end_callbacks_on_jit_fut(handle, tied)
        span = TraceSpan(tied)
        _open.add(span)
        return span


def entered() -> None:
    """This thread has switched Kineto on."""
    global _profiled_thread
    with _lock:
        _profiled_thread = threading.get_ident()


def end_all() -> None:
    """Kineto is about to stop."""
    global _profiled_thread
    with _lock:
        _profiled_thread = None
        while _open:
            _open.pop()._tied.set_result(None)


def _rounded(amount: float) -> str:
    for unit in ("B", "kB", "MB"):
        if amount < 999.5:
            return f"{amount:.3g} {unit}"
        amount /= 1000
    return f"{amount:.3g} GB"


def size(message: Message) -> int:
    """Bytes that ``message`` carries: pickle, buffers and the elements of tensors, without the header."""
    buffers = sum(memoryview(buffer).nbytes for buffer in message.buffers)
    return len(message.payload) + buffers + sum(part.nbytes for tensor in message.tensors for part in _parts(tensor))


def _parts(tensor: torch.Tensor) -> Sequence[torch.Tensor]:
    """The strided tensors that ``tensor`` is sent as; none for what is refused, or has no elements to send."""
    if tensor.is_meta or tensor.is_nested:
        return ()
    if tensor.layout is torch.strided:
        return (tensor,)
    return [getattr(tensor, part)() for part in _SPARSE.get(tensor.layout, ())]
