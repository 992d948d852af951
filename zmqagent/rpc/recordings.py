"""torch's legacy profiler, and beside it what that cannot record: spans of calls, what callees did, callbacks on other threads.

torch's profiler is thread-local, and its records can only be taken out where they were made. So a `Profile` collects from
several places:

- the records of torch's profiler in the thread that the user profiles. `entered` and `left` stand around torch's own switching on
  and off, and `left` adds the rest of the profile to what torch returns;
- the records of `recording` on other threads: of a function that runs here for a caller who profiles, and of the callbacks of
  a profiled call's future;
- spans of calls, with what callees have sent.

torch hands its profiler on to the threads of ``torch.jit.fork``, where nothing tells whose it is. A call made there belongs to
the profile that the user has open, and to none if there are several.

What comes after a profile has ended is dropped.
"""

from __future__ import annotations

import enum
import itertools
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import torch
from torch._C import _autograd
from torch._C._profiler import ProfilerConfig, ProfilerState, RecordScope, _ExperimentalConfig

from zmqagent.rpc.profile_records import Record, Records, Values, from_remote, from_torch, started_by
from zmqagent.wire.types import WorkerId

__all__ = ["CallSpan", "Flags", "Profile", "entered", "flags_of", "left", "remember"]

_PATIENCE_S = 1.0
"""How long the end of a profile waits for callbacks on other threads, whose events would be lost. Those that completed what the
profiled thread waited for are returning at this moment; one that runs on is not waited for any longer."""

# In a dict, which rebinding torch's names does not reach: these are torch's own.
_TORCH: dict[str, Callable[..., Any]] = {
    "enable": _autograd._enable_profiler_legacy,
    "disable": _autograd._disable_profiler_legacy,
}

_handles = itertools.count(1 << 62)
"""Handles of spans; torch counts its own from 1."""


class Flags(enum.IntFlag):
    """What a profiler records besides names and times."""

    CUDA = 1
    SHAPES = 2
    MEMORY = 4
    STACK = 8
    FLOPS = 16
    MODULES = 32

    def config(self) -> ProfilerConfig:
        """For torch's profiler here; without the times of accelerators if there are none."""
        use_cuda = Flags.CUDA in self and torch.cuda.is_available()
        state = ProfilerState.CUDA if use_cuda else ProfilerState.CPU
        return ProfilerConfig(
            state,
            Flags.SHAPES in self,
            Flags.MEMORY in self,
            Flags.STACK in self,
            Flags.FLOPS in self,
            Flags.MODULES in self,
            _ExperimentalConfig(),
        )


_flags: WeakKeyDictionary[ProfilerConfig, Flags] = WeakKeyDictionary()


def remember(
    config: ProfilerConfig,
    state: ProfilerState,
    report_input_shapes: bool,
    profile_memory: bool,
    with_stack: bool,
    with_flops: bool,
    with_modules: bool,
    *_: Any,
    **__: Any,
) -> None:
    """Takes note of what ``config`` was made with, under torch's names, since it cannot be asked."""
    values = (state == ProfilerState.CUDA, report_input_shapes, profile_memory, with_stack, with_flops, with_modules)
    wanted = Flags(0)
    for flag, value in zip(Flags, values, strict=True):
        if value:
            wanted |= flag
    _flags[config] = wanted


def flags_of(config: ProfilerConfig) -> Flags:
    """What ``config`` was made with; nothing if that was before this package came."""
    return _flags.get(config, Flags(0))


class Profile:
    """Collects what one profiler is to show."""

    def __init__(self, flags: Flags) -> None:
        self.flags = flags
        # Protects all below; told when a recording ends.
        self._changed = threading.Condition()
        self._records: Records = []
        self._spans: list[CallSpan] = []
        self._running = 0
        self._is_open = True

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Has torch's profiler record what the body does on this thread. Does nothing if one is on here already, or if this
        profile has ended."""
        recording = None if torch.autograd._profiler_enabled() else self._start()
        if recording is None:
            yield
            return
        try:
            yield
        finally:
            # Unless it was stopped in the middle, by `close` or by user code that switched torch's profiler off.
            if _here.recording is recording and torch.autograd._profiler_enabled():
                self._stop(recording)

    def _start(self) -> _Recording | None:
        with self._changed:
            if not self._is_open:
                return None
            _TORCH["enable"](self.flags.config())
            self._running += 1
        _here.recording = _Recording(self)
        return _here.recording

    def _stop(self, recording: _Recording) -> None:
        _here.recording = None
        events = _TORCH["disable"]()
        recording.thread_id = started_by(events).thread_id()
        records = from_torch(events)
        with self._changed:
            self._records += records
            self._running -= 1
            self._changed.notify_all()

    def add(self, span: CallSpan, records: Records) -> None:
        """A call has ended, and ``records`` are what its callee sent."""
        with self._changed:
            if self._is_open:
                self._spans.append(span)
                self._records += records

    def so_far(self) -> Records:
        """What has been collected."""
        with self._changed:
            return [*self._records, *(span.records() for span in self._spans)]

    def close(self) -> Records:
        """Ends the profile, and with it a recording for it on this thread; returns what was collected."""
        recording = _here.recording
        if recording is not None and recording.profile is self and torch.autograd._profiler_enabled():
            self._stop(recording)
        with self._changed:
            self._changed.wait_for(lambda: not self._running, _PATIENCE_S)
            self._is_open = False
        return self.so_far()


class _Recording:
    """One thread's profiler while it is on."""

    def __init__(self, profile: Profile) -> None:
        self.profile = profile
        self.thread_id = 0
        """torch's number of the thread, which shows when the records are there."""


class _Here(threading.local):
    recording: _Recording | None = None


_here = _Here()

# Protects the set: what users have switched on, and not off yet. The threads themselves keep these alive: one that ends takes its
# own along.
_entered_lock = threading.Lock()
_entered: WeakSet[_Recording] = WeakSet()


class CallSpan:
    """A call of a thread that is being profiled, from when it was made until `end`; made by `begin`."""

    def __init__(self, recording: _Recording, name: str, node: WorkerId, now_ns: int) -> None:
        self._recording = recording
        self._name = name
        self._node = node
        self._began_ns = self._ended_ns = now_ns
        self._handle = next(_handles)

    @classmethod
    def begin(cls, name: str, node: WorkerId, now_ns: int) -> CallSpan | None:
        """Takes the time in ns since the epoch, as do torch's records. torch's legacy profiler must be on in this thread; None if
        it cannot be told whose profile that is."""
        recording = _here.recording or _only_entered()
        return None if recording is None else cls(recording, name, node, now_ns)

    @property
    def profile(self) -> Profile:
        """What the call belongs to."""
        return self._recording.profile

    def end(self, now_ns: int, callees: Records) -> None:
        """The call is over; ``callees`` are the records that its answer brought."""
        self._ended_ns = now_ns
        self.profile.add(self, from_remote(callees, self._name, self._began_ns, now_ns))

    def records(self) -> list[Record]:
        """The span as torch would have recorded it."""
        thread = self._recording.thread_id
        scope = RecordScope.USER_SCOPE.value
        push = Values("push", self._name, thread, self._handle, self._node, self._began_ns, is_async=True, scope=scope)
        return [Record(push), Record(Values("pop", "", thread, self._handle, self._node, self._ended_ns))]


def _only_entered() -> _Recording | None:
    with _entered_lock:
        recordings = list(_entered)
    return recordings[0] if len(recordings) == 1 else None


def entered(config: ProfilerConfig) -> None:
    """The user has switched torch's profiler on in this thread."""
    recording = _Recording(Profile(flags_of(config)))
    with _entered_lock:
        _entered.add(recording)
    _here.recording = recording


def left(events: list[list[Any]]) -> list[list[Any]]:
    """The user has switched it off, and ``events`` is what torch returned: returns that and the rest of the profile."""
    recording = _here.recording
    if recording is None or not events:
        return events
    _here.recording = None
    with _entered_lock:
        _entered.discard(recording)
    recording.thread_id = started_by(events).thread_id()
    rest = recording.profile.close()
    return [*from_torch(events), *rest] if rest else events
