"""Runs user functions: resolves what a call names, runs it, and waits for futures it returns."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import lru_cache, partial
from typing import Any

import torch
from torch.futures import Future

from zmqagent.exceptions import CalleeError, InvalidTypeError, RemoteUserError, RpcError, ScriptError

__all__ = ["OnResult", "on_future", "on_result", "resolve_script_function", "script_ends"]

OnResult = Callable[[Any, "BaseException | None"], None]

_NO_FUTURE = "Functions decorated with @rpc.async_function must return a torch.futures.Future object"
"""torch's text."""

# What torch's C++ code says.
_NO_AGENT_IN_SCRIPT = "Current RPC agent is not set!"


def resolve_script_function(name: str, is_builtin: bool) -> Callable[..., Any]:
    """The builtin operator (``aten::add``) or the TorchScript function (``__torch__.module.function``) called ``name``.

    Raises:
        CalleeError: this process has none of that name.
    """
    if is_builtin:
        return _operator(name)
    function = torch.jit._state._python_cu.find_function(name)
    if function is None:
        raise CalleeError(
            f"this worker has no TorchScript function {name}: the module that defines it must be imported here as well"
        )
    return function


@lru_cache(maxsize=1024)
def _operator(name: str) -> Callable[..., Any]:
    # torch takes longer to find one than to run it.
    try:
        operator, _overloads = torch._C._jit_get_operation(name)
    except RuntimeError as error:
        raise CalleeError(f"{name} is no name of an operator: {error}") from error
    if operator is None:
        raise CalleeError(f"this worker's torch {torch.__version__} has no operator {name}")
    return operator


def script_ends(done: OnResult) -> OnResult:
    """``done`` for a call of a TorchScript function: errors, also those of a future it returned, reach it as `script_error`s."""
    return lambda value, error: done(value, script_error(error) if isinstance(error, Exception) else error)


def script_error(error: Exception) -> RpcError:
    """What a TorchScript function's caller gets for ``error``: an error of this package as it is, for what torch's code raised a
    ScriptError where the function makes an RPC of its own, and else a RemoteUserError. Exceptions have no types in TorchScript,
    and torch's own agent answers a RuntimeError."""
    if isinstance(error, RpcError):
        return error
    told: RpcError = RemoteUserError(f"the TorchScript function failed with {type(error).__name__}: {error}")
    if _NO_AGENT_IN_SCRIPT in str(error):
        told = ScriptError(
            "RPC inside TorchScript runs in C++, which cannot reach this agent. Move the RPC into a Python function that is "
            f"decorated with torch.jit.ignore, and call that. TorchScript says: {error}"
        )
    told.__cause__ = error
    return told


def on_result(function: Callable[[], Any], done: OnResult) -> None:
    """Runs ``function`` and hands its value, or the exception it raised, to ``done(value, error)``."""
    try:
        value = function()
    except BaseException as error:
        # KeyboardInterrupt and SystemExit too: a user function that raises them must not end a thread that serves others.
        done(None, error)
    else:
        done(value, None)


def on_future(function: Callable[[], Any], done: OnResult, streams: AbstractContextManager[None]) -> None:
    """`on_result` for a function that returns a future (``functions.async_execution``) of its value: ``done`` is called on the
    thread that completes that, within ``streams``."""

    def returned(future: Any, error: BaseException | None) -> None:
        if error is not None:
            done(None, error)
        elif isinstance(future, torch._C.Future):
            future.add_done_callback(partial(_take, done, streams))
        else:
            done(None, InvalidTypeError(f"{_NO_FUTURE}, but got {type(future)}"))

    on_result(function, returned)


def _take(done: OnResult, streams: AbstractContextManager[None], future: Future[Any]) -> None:
    # A future that carries devices runs its callbacks on streams that nobody else knows; what is kept of its value is to be
    # found on those of the others. It is done, so that `wait` only has the current streams wait for it.
    with streams:
        try:
            value = future.wait()
        except Exception as error:
            done(None, error)
        else:
            done(value, None)
