"""torch's thread-local state on the threads of the pool: grad mode, inference mode, autocast, function modes (a default device is
one of them).

A thread of the pool serves many callers, one after the other. A function that is called by RPC starts from torch's initial state,
whatever the one before left behind. What an answer sets off, its unpickling and the callbacks of its future, belongs to
the code that made the call, and runs in the state in which that was made, as with torch's own agent.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch._C import _is_any_autocast_enabled, _len_torch_function_stack
from torch._C import is_grad_enabled as _is_grad_enabled
from torch._C import is_inference_mode_enabled as _is_inference_mode_enabled

__all__ = ["CLEAN", "ThreadState", "clean_state", "current_state", "in_state"]


@dataclass(frozen=True, slots=True)
class ThreadState:
    """The state of one thread; by default torch's initial one."""

    grad_mode: bool = True
    inference_mode: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """The device types for which it is enabled, with the dtype that is cast to."""
    keeps_casts: bool = True
    function_modes: tuple[Any, ...] = ()


CLEAN = ThreadState()
"""torch's initial state."""


def current_state() -> ThreadState:
    """The state of the calling thread."""
    if _is_clean():
        return CLEAN
    enabled = [device_type for device_type in _device_types() if torch.is_autocast_enabled(device_type)]
    return ThreadState(
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        tuple((device_type, torch.get_autocast_dtype(device_type)) for device_type in enabled),
        torch.is_autocast_cache_enabled(),
        tuple(torch._C._get_function_stack_at(i) for i in range(torch._C._len_torch_function_stack())),
    )


def clean_state() -> AbstractContextManager[None]:
    """Gives the body torch's initial state, and the thread its own back afterwards."""
    return _Scope(CLEAN)


def in_state(state: ThreadState) -> AbstractContextManager[None]:
    """Gives the body ``state``, and the thread its own back afterwards."""
    return _Scope(state)


class _Scope:
    """A ``with`` block in a state. (As a generator, it would cost several times as much, at every call.)"""

    __slots__ = ("_guards", "_state")

    def __init__(self, state: ThreadState) -> None:
        self._state = state
        self._guards: ExitStack | None = None

    def __enter__(self) -> None:
        if self._state is not CLEAN or not _is_clean():
            self._guards = _enter_guards(self._state)

    def __exit__(self, *error: Any) -> None:
        if self._guards is not None:
            self._guards.__exit__(*error)
        elif not _is_clean():
            _clean_up()


def _enter_guards(state: ThreadState) -> ExitStack:
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled() != state.inference_mode:
            stack.enter_context(torch.inference_mode(state.inference_mode))
        # After inference mode, which changes it.
        stack.enter_context(torch.set_grad_enabled(state.grad_mode))
        dtypes = dict(state.autocast)
        for device_type in _device_types():
            if device_type in dtypes:
                stack.enter_context(torch.autocast(device_type, dtypes[device_type], cache_enabled=state.keeps_casts))
            elif torch.is_autocast_enabled(device_type):
                stack.enter_context(torch.autocast(device_type, enabled=False))
        stack.enter_context(_with_function_modes(state.function_modes))
        return stack.pop_all()


def _is_clean() -> bool:
    # Asked several times for every call: these four take 0.2 us together, the guards of `in_state` twenty times that.
    return (
        _is_grad_enabled()
        and not _is_inference_mode_enabled()
        and not _is_any_autocast_enabled()
        and not _len_torch_function_stack()
    )


def _clean_up() -> None:
    """Removes what the body set and did not take back. (Inference mode alone has no setter: its guard ends it.)"""
    torch.set_grad_enabled(True)
    for device_type in _device_types():
        torch.set_autocast_enabled(device_type, False)
    _replace_function_modes(())


def _device_types() -> set[str]:
    device = torch.accelerator.current_accelerator()
    return {"cpu"} if device is None else {"cpu", device.type}


@contextmanager
def _with_function_modes(modes: Sequence[Any]) -> Iterator[None]:
    """Replaces the thread's stack of function modes for the body."""
    former = _replace_function_modes(modes)
    try:
        yield
    finally:
        _replace_function_modes(former)


def _replace_function_modes(modes: Sequence[Any]) -> list[Any]:
    former = [torch._C._pop_torch_function_stack() for _ in range(torch._C._len_torch_function_stack())]
    for mode in modes:
        torch._C._push_on_torch_function_stack(mode)
    return former[::-1]
