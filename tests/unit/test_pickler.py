"""`zmqagent.rpc.pickler`: whatever pickle takes goes and comes back, large buffers beside the pickle."""

from __future__ import annotations

import pickle
import sys
import threading
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.rpc import internal as torch_internal
from torch.distributed.rpc.internal import PythonUDF

from zmqagent.exceptions import CalleeError, NotPicklableError, RRefUsageError
from zmqagent.rpc import pickler
from zmqagent.wire.commands import Pickled

_DTYPES = [*"?bhilqBHILQefdgFDG", "datetime64[ns]", "timedelta64[s]", "S5", "U7", ">i4", "<f8", "V3"]


def there_and_back(obj: Any) -> Any:
    return pickler.loads(pickler.dumps(obj))


def _array(dtype: str, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    raw = np.frombuffer(bytes(range(1, 250)) * 16, dtype=np.uint8)
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if dtype == "?":
        return (raw[:size] % 2).astype(bool).reshape(shape)
    if dtype.startswith("U"):
        return np.array(["ä", "\U0001f600"] * int(np.prod(shape)))[: int(np.prod(shape))].astype(dtype).reshape(shape)
    return np.frombuffer(raw[:size].tobytes(), dtype=dtype).reshape(shape)


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("shape", [(4, 6), (0, 3), ()], ids=["2-d", "zero-size", "0-d"])
def test_an_array_of_any_dtype_and_shape_comes_back(dtype: str, shape: tuple[int, ...]) -> None:
    assert_same(there_and_back(_array(dtype, shape)), _array(dtype, shape))


@pytest.mark.parametrize(
    "make",
    [
        lambda: np.arange(24).reshape(4, 6)[::2, ::3],
        lambda: np.asfortranarray(np.arange(24.0).reshape(4, 6)),
        lambda: np.arange(10)[::-1],
        lambda: np.broadcast_to(np.arange(3), (4, 3)),
        lambda: np.array([(1, 2.5, "ü")], dtype=[("a", "i4"), ("b", "f8"), ("c", "U3")]),
        lambda: np.array([(1, [2, 3])], dtype=[("a", "i4"), ("nested", "i2", 2)]),
        lambda: np.float32(2.5),
        lambda: np.datetime64("2024-02-29"),
        lambda: np.rec.array([(1, 2.0)], dtype=[("x", "i4"), ("y", "f4")]),
    ],
)
def test_unusual_layouts_and_scalars_come_back(make: Any) -> None:
    assert_same(there_and_back(make()), make())


def test_object_and_masked_arrays_come_back() -> None:
    objects = np.array([1, "two", None, [3.0]], dtype=object)
    assert there_and_back(objects).tolist() == objects.tolist()
    masked = np.ma.masked_array(np.arange(4.0), mask=[False, True, False, True], fill_value=9)
    back = there_and_back(masked)
    assert back.filled().tolist() == [0.0, 9.0, 2.0, 9.0]
    assert back.mask.tolist() == masked.mask.tolist()


@pytest.mark.parametrize("size", [10, 5_000, 300_000])
def test_an_array_travels_beside_the_pickle_as_a_frozen_copy_and_arrives_writable(size: int) -> None:
    array = np.zeros(size)
    body = pickler.dumps({"array": array})
    array.fill(1)
    assert len(body.payload) < 1000
    assert sum(memoryview(buffer).nbytes for buffer in body.buffers) == array.nbytes
    back = pickler.loads(body)["array"]
    assert not back.any()
    back.fill(2)
    assert (back == 2).all()


def test_a_tensor_is_told_by_its_place_in_a_table() -> None:
    tensor = torch.arange(100_000.0)
    body = pickler.dumps([tensor, {"again": tensor}])
    assert len(body.payload) < 300
    assert all(sent is tensor for sent in body.tensors)
    first, second = pickler.loads(body)
    assert first is tensor
    assert second["again"] is tensor


class _SendsWithin:
    """Pickles something else while it is pickled."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> Any:
        inner = pickler.dumps(torch.zeros(1))
        assert len(inner.tensors) == 1
        return there_and_back_of, (self.tensor,)


def there_and_back_of(tensor: torch.Tensor) -> torch.Tensor:
    there_and_back(torch.zeros(2))
    return tensor


def test_pickling_may_nest_on_both_sides() -> None:
    tensors = [torch.full((1,), float(number)) for number in range(3)]
    assert [t.item() for t in there_and_back([tensors[0], _SendsWithin(tensors[1]), tensors[2]])] == [0.0, 1.0, 2.0]


class _Raises:
    def __reduce__(self) -> Any:
        raise KeyError("refuses")


class _RaisesOurs:
    def __reduce__(self) -> Any:
        raise RRefUsageError("ours")


@pytest.mark.parametrize("make", [lambda: threading.Lock(), lambda: lambda: 0, _Raises, lambda: (_ for _ in ())])
def test_what_pickle_refuses_is_not_picklable_and_nothing_stays_behind(make: Any) -> None:
    with pytest.raises(NotPicklableError, match=r"cannot pickle an object of type list") as caught:
        pickler.dumps([torch.ones(1), make()])
    assert isinstance(caught.value, pickle.PicklingError)
    assert caught.value.__cause__ is not None
    assert pickler.dumps([torch.ones(1)]).tensors[0].item() == 1
    assert len(pickler.dumps(torch.ones(1)).tensors) == 1


def test_the_error_names_the_function_of_a_call() -> None:
    with pytest.raises(NotPicklableError, match="the call of assert_same and its arguments"):
        pickler.dumps_call(PythonUDF(assert_same, (threading.Lock(),), {}))


def test_a_call_travels_without_the_name_of_its_class() -> None:
    call = PythonUDF(assert_same, (1,), {"expected": 2})
    body = pickler.dumps_call(call)
    assert b"PythonUDF" not in body.payload
    assert pickler.loads_call(body) == call
    # As a pickler of the user's leaves it.
    assert pickler.loads_call(Pickled(pickle.dumps(call))) == call


@pytest.mark.parametrize("other", [None, (), (len,), (len, ()), (1, 2, 3), [len, (), {}], (len, (), {}, None)])
def test_what_is_no_call_is_refused(other: Any) -> None:
    with pytest.raises(CalleeError, match=r"a call carries a function and its arguments, but a .* arrived"):
        pickler.loads_call(pickler.dumps(other))


def test_a_call_of_what_cannot_be_called_fails_where_it_is_called() -> None:
    assert pickler.loads_call(pickler.dumps_call(PythonUDF(None, (), {}))) == (None, (), {})
    assert pickler.loads_call(pickler.dumps_call(PythonUDF(len, 5, []))) == (len, 5, [])


def test_a_users_reducer_for_arrays_goes_before_this_packages() -> None:
    registered = torch_internal._internal_rpc_pickler._class_reducer_dict
    registered[np.ndarray] = lambda array: (str, ("the user's",))
    try:
        assert there_and_back(np.ones(1)) == "the user's"
    finally:
        del registered[np.ndarray]
        torch_internal._internal_rpc_pickler._dispatch_table[np.ndarray] = pickler._reduce_array


def test_an_error_of_this_package_passes_unchanged() -> None:
    with pytest.raises(RRefUsageError, match=r"^ours$"):
        pickler.dumps(_RaisesOurs())


def vanishing() -> None:
    """Deleted by a test before it is unpickled."""


def test_a_function_that_is_missing_is_told_in_torchs_words(monkeypatch: pytest.MonkeyPatch) -> None:
    body = pickler.dumps(vanishing)
    monkeypatch.delattr(sys.modules[__name__], "vanishing")
    with pytest.raises(CalleeError, match=r"(?s)vanishing.*Default RPC pickler does not serialize function code"):
        pickler.loads(body)


@pytest.mark.parametrize("payload", [b"", b"garbage", pickle.dumps([1, 2])[:-3], b"cno_such_module\nx\n."])
def test_bytes_that_are_no_pickle_are_a_callee_error(payload: bytes) -> None:
    with pytest.raises(CalleeError, match="cannot unpickle what was sent"):
        pickler.loads(Pickled(payload))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_a_script_module_that_is_sent_itself_comes_back() -> None:
    module = torch.jit.script(torch.nn.Linear(2, 2))
    x = torch.ones(1, 2)
    assert torch.equal(there_and_back(module)(x), module(x))
