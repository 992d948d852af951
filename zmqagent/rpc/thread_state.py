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

__all__ = ["ThreadState", "clean_state", "current_state", "in_state"]


@dataclass(frozen=True, slots=True)
class ThreadState:
    """The state of one thread; by default torch's initial one."""

    grad_mode: bool = True
    inference_mode: bool = False
    autocast: tuple[tuple[str, torch.dtype], ...] = ()
    """The device types for which it is enabled, with the dtype that is cast to."""
    keeps_casts: bool = True
    function_modes: tuple[Any, ...] = ()


_CLEAN = ThreadState()


def current_state() -> ThreadState:
    """The state of the calling thread."""
    if _is_clean():
        return _CLEAN
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
    return in_state(_CLEAN)


@contextmanager
def in_state(state: ThreadState) -> Iterator[None]:
    """Gives the body ``state``, and the thread its own back afterwards."""
    if state is _CLEAN and _is_clean():
        try:
            yield
        finally:
            if not _is_clean():
                _clean_up()
        return
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
        yield


def _is_clean() -> bool:
    # Asked several times for every call: these four take 0.3 us together, the guards of `in_state` ten times that.
    return (
        torch.is_grad_enabled()
        and not torch.is_inference_mode_enabled()
        and not torch._C._is_any_autocast_enabled()
        and not torch._C._len_torch_function_stack()
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
