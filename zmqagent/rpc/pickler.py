"""Objects to and from (pickle, out-of-band buffers, tensors).

Tensors never enter the pickle: it refers to them by their index in a table, as torch's own RPC pickler does, and through torch's
own thread-local tables, so that reducers and picklers that users wrote for torch's work here unchanged. Buffers of numpy arrays
and the like leave the pickle too (protocol 5). RRefs pickle themselves (see ``rref/rref.py``).
"""

from __future__ import annotations

import io
import pickle
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.distributed.rpc import internal as torch_internal
from torch.distributed.rpc.internal import PythonUDF

from zmqagent.agent.buffers import freeze_buffers, writable
from zmqagent.exceptions import CalleeError, NotPicklableError, RpcError
from zmqagent.wire.commands import Pickled

__all__ = ["dumps", "dumps_call", "loads", "loads_call"]

_torch_pickler = torch_internal._internal_rpc_pickler
_tables: threading.local = torch_internal._thread_local_tensor_tables


def dumps(obj: object) -> Pickled:
    """Pickles ``obj``, with its tensors and large buffers beside the pickle.

    The tensors are the caller's own (they are frozen when the message is packed), the buffers are copies already.

    Raises:
        NotPicklableError: pickle refuses the object, or something in it.
        RpcError: what a reducer of this package raises, unchanged.
    """
    return _dumps(obj, obj)


def dumps_call(call: PythonUDF) -> Pickled:
    """Pickles a call, as a plain tuple: its class would have to be looked up by name on both sides. Raises as `dumps`."""
    return _dumps(tuple(call), call)


def _dumps(obj: object, described: object) -> Pickled:
    file = io.BytesIO()
    buffers: list[pickle.PickleBuffer] = []
    pickler = pickle.Pickler(file, protocol=5, buffer_callback=buffers.append)
    pickler.dispatch_table = _dispatch_table(obj)
    # Pickling may nest, so the former table comes back.
    former = getattr(_tables, "send_tables", None)
    tensors: list[torch.Tensor] = []
    _tables.send_tables = tensors
    try:
        pickler.dump(obj)
    except RpcError:
        raise
    except Exception as error:
        # Reducers are user code: whatever they raise means that this object cannot be sent.
        raise NotPicklableError(f"cannot pickle {_describe(described)} to send it: {type(error).__name__}: {error}") from error
    finally:
        _tables.send_tables = former
    return Pickled(file.getvalue(), freeze_buffers(buffers), tensors)


def loads(body: Pickled) -> Any:
    """Rebuilds what `dumps` took apart.

    Raises:
        CalleeError: the pickle names something that this process lacks, or its code fails here.
        RpcError: what a reducer of this package raises, unchanged.
    """
    former = getattr(_tables, "recv_tables", None)
    _tables.recv_tables = body.tensors
    try:
        return pickle.loads(body.payload, buffers=[writable(buffer) for buffer in body.buffers])
    except RpcError:
        raise
    except AttributeError as error:
        raise CalleeError(
            f"{error}. Default RPC pickler does not serialize function code. Ensure that UDFs are defined on both caller and "
            "callee modules."
        ) from error
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
            raise  # ^C, while the user's own thread reads an answer.
        # SystemExit too: it must not end a thread of this worker, and whoever waits for the object must be told.
        raise CalleeError(f"cannot unpickle what was sent: {type(error).__name__}: {error}") from error
    finally:
        _tables.recv_tables = former


def loads_call(body: Pickled) -> tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]:
    """The function and its arguments that `dumps_call` took apart, or a pickler of the user's (as a `PythonUDF`). Whether the
    function can be called with these is left to the call itself.

    Raises:
        CalleeError: as `loads`, or it is something else.
        RpcError: what a reducer of this package raises, unchanged.
    """
    call = loads(body)
    if isinstance(call, tuple) and len(call) == len(PythonUDF._fields):
        function, args, kwargs = call
        if callable(function) or (isinstance(args, tuple) and isinstance(kwargs, dict)):
            return call
    raise CalleeError(f"a call carries a function and its arguments, but a {type(call).__qualname__} arrived")


def _reduce_array(array: np.ndarray[Any, Any]) -> Any:
    """Takes every array without Python objects out of the pickle; numpy leaves views with gaps, dates and time spans in it."""
    if array.dtype.hasobject:
        return array.__reduce_ex__(5)
    if not (array.flags.c_contiguous or array.flags.f_contiguous):
        array = array.copy()
    try:
        memoryview(array)  # type: ignore[arg-type]
    except ValueError:
        # Dates and time spans, also inside records, have no buffers.
        return _restore_array, (array.reshape(-1).view("u1"), array.dtype, array.shape)
    return array.__reduce_ex__(5)


def _restore_array(data: np.ndarray[Any, Any], dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return data.view(dtype).reshape(shape)


_torch_pickler._dispatch_table.setdefault(np.ndarray, _reduce_array)


def _dispatch_table(obj: object) -> dict[type, Any]:
    """torch's table, with what users registered there; ScriptModules save themselves when they are the object sent."""
    table: dict[type, Any] = _torch_pickler._dispatch_table
    table.update(_torch_pickler._class_reducer_dict)
    if isinstance(obj, torch.jit.ScriptModule) and type(obj) not in table:
        table[type(obj)] = _torch_pickler._script_module_reducer
    return table


def _describe(obj: object) -> str:
    """What is being sent, for an error's text: the function of a call, else the type of a result."""
    if isinstance(obj, PythonUDF):
        function = getattr(obj.func, "__qualname__", None) or repr(obj.func)
        return f"the call of {function} and its arguments"
    return f"an object of type {type(obj).__qualname__}"
