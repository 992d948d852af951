"""What can be told of a TorchScript function without running it: whether a call of it makes sense.

TorchScript runs in C++ and knows torch's own RRefs only. What a function takes and returns is declared in its schema.
"""

from __future__ import annotations

from typing import Any

import torch

from zmqagent.exceptions import InvalidTypeError, ScriptError

__all__ = ["check_arguments", "check_returns_future"]


def check_arguments(name: str, args: tuple[Any, ...], kwargs: dict[str, Any], *, hold_rrefs: bool) -> None:
    """Checks at the caller that the TorchScript function ``name`` can be called so; takes some 2 us. A function that is not
    defined here is left to the callee.

    Raises:
        ScriptError: there are RRefs among the arguments, or inside them.
        InvalidTypeError: the arguments do not match the function's schema; the text is torch's.
    """
    if hold_rrefs:
        raise ScriptError(
            f"the TorchScript function {name} takes an RRef, but TorchScript runs in C++, which knows only RRefs of torch's "
            "own agent. Call a Python function, and have it fetch the value (to_here, local_value) and call the TorchScript "
            "function."
        )
    function: Any = torch.jit._state._python_cu.find_function(name)
    if function is None:
        return
    try:
        torch._C._check_schema_allow_fake_script_object(function.schema, *args, **kwargs)
    except RuntimeError as error:
        raise InvalidTypeError(str(error)) from None


def check_returns_future(function: Any) -> None:
    """Checks that a TorchScript function can be run as ``functions.async_execution`` wants it.

    Raises:
        InvalidTypeError: the function's declared result is no ``Future``.
    """
    (result,) = function.schema.returns
    if not isinstance(result.type, torch._C.FutureType):
        got = f"{result.type} from {function.name}"
        raise InvalidTypeError(f"Async functions must return an IValue of Future type, but got {got}")
