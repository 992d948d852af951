"""`zmqagent.agent.incoming`: descriptions of tensors are checked before anything is built, whoever sent them."""

from __future__ import annotations

import contextlib
import itertools
import warnings
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.tensor_travel import travel, wire
from zmqagent.agent.incoming import Incoming
from zmqagent.agent.pinned import PINNED
from zmqagent.agent.tensors import pack, unpack
from zmqagent.exceptions import ProtocolError

# torch warns once a process of these kinds; the tests that make them here are not the place to read that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

DENSE = (0, "float32", 0, "", (2, 3), (3, 1), 0, 0, 0, 24)
INDICES = (0, "int64", 0, "", (1, 2), (2, 1), 0, 0, 0, 16)
VALUES = (0, "float32", 0, "", (2,), (1,), 0, 0, 16, 8)


def dense(**changes: Any) -> tuple[Any, ...]:
    names = ["kind", "dtype", "flags", "device", "sizes", "strides", "offset", "buffer", "start", "size"]
    return tuple((dict(zip(names, DENSE, strict=True)) | changes).values())


@pytest.mark.parametrize(
    ("description", "text"),
    [
        (None, "tensor kind None is unknown"),
        ((), "tensor kind None is unknown"),
        ((99,), "tensor kind 99 is unknown"),
        (((),), r"tensor kind \(\) is unknown"),
        (DENSE[:-1], "kind 0 has 9 values"),
        (dense(dtype="float33"), "dtype 'float33' is unknown"),
        (dense(dtype=3), "dtype 3 is unknown"),
        (dense(dtype="qint8"), "dtype 'qint8' is unknown"),
        (dense(flags=-1), "its kind has these flags"),
        (dense(flags=8), "its kind has these flags"),
        (dense(flags=True), "its kind has these flags"),
        (dense(flags=1, dtype="int32"), "tensors that require grad are floating-point or complex"),
        (dense(flags=2), "the conjugate bit is for complex tensors"),
        (dense(device=None), "places in buffers are not negative"),
        (dense(device="nowhere"), "device 'nowhere', which torch does not know"),
        (dense(device="xpu:99"), "device xpu:99, which this worker does not have"),
        (dense(sizes=(-2, 3)), "sizes are not negative"),
        (dense(sizes=[2, 3]), "sizes are not negative"),
        (dense(sizes=(2, True)), "sizes are not negative"),
        (dense(sizes=(1 << 40, 1 << 40), strides=(0, 0)), "sizes have a limit"),
        (dense(sizes=(1,) * 65, strides=(1,) * 65), "sizes are not negative"),
        (dense(strides=(3,)), "each size has its stride"),
        (dense(strides=(3, -1)), "each size has its stride"),
        (dense(strides=None), "each size has its stride"),
        (dense(offset=-1), "places in buffers are not negative"),
        (dense(offset=1 << 63), "places in buffers are not negative"),
        (dense(offset=1), "a tensor needs 28 bytes, and 24 arrived for it"),
        (dense(strides=(1 << 62, 1 << 62)), "a tensor needs [0-9]+ bytes, and 24 arrived"),
        (dense(sizes=(1 << 40, 1)), "a tensor needs [0-9]+ bytes, and 24 arrived"),
        (dense(buffer=1), "bytes 0 to 24 of buffer 1, which did not arrive"),
        (dense(start=1), "bytes 1 to 25 of buffer 0, which did not arrive"),
        (dense(size=20), "a tensor needs 24 bytes, and 20 arrived"),
        (dense(start=1.0), "places in buffers are not negative"),
        ((1, "float32", 0, (1 << 62,), (4,)), "sizes have a limit"),
        ((2, 0, (9,), VALUES, VALUES), "16 bytes arrived that belong to no tensor"),
        ((2, 0, (9,), dense(dtype="int64", sizes=(1, 1 << 50), strides=(0, 0)), VALUES), "indices and scales do not overlap"),
        (
            (5, dense(dtype="qint8", sizes=(1 << 50,), strides=(0,)), 0, *[dense(sizes=(1 << 50,), strides=(0,))] * 2),
            "indices and scales do not overlap",
        ),
        ((2, 0, (9,), INDICES, (1, "float32", 0, (2,), (1,))), "its parts are strided"),
        ((2, 0, (9,), INDICES, dense(flags=1)), "its kind has these flags"),
        ((2, 0, (1,), INDICES, VALUES), "cannot be built from what arrived"),
        ((2, 8, (9,), INDICES, VALUES), "cannot be built from what arrived: cannot set is_coalesced"),
        ((2, 0, (-1,), INDICES, VALUES), "sizes are not negative"),
        ((2, 0, 5, INDICES, VALUES), "sizes are not negative"),
        ((3, "csx", 0, (1,), INDICES, INDICES, VALUES), "sparse layout 'csx' is unknown"),
        ((3, None, 0, (1,), INDICES, INDICES, VALUES), "sparse layout None is unknown"),
        ((3, "csr", 0, (2, 2), INDICES, INDICES, VALUES), "cannot be built from what arrived"),
        ((4, dense(), 0.5, 0), "dtype 'float32' is unknown to this version of zmqagent, or wrong"),
        ((4, dense(dtype="qint8", size=6), 1, 0), "has a scale and a zero point"),
        ((4, dense(dtype="qint8", size=6, flags=1), 1.0, 0), "its kind has these flags"),
        ((5, dense(dtype="qint8", size=6), 2, VALUES, VALUES), "the axis of a quantized tensor is one of its dimensions"),
        ((5, dense(dtype="qint8", size=6), 1, VALUES, VALUES), "a scale and a zero point for each channel"),
    ],
)
def test_a_description_that_is_wrong_is_refused(description: Any, text: str) -> None:
    # The indices are (2, 1), so the sparse tensor is not coalesced.
    buffer = memoryview(bytearray(torch.tensor([2, 1, 0]).numpy().tobytes()))
    with pytest.raises(ProtocolError, match=text):
        unpack([description], [buffer])


def test_a_meta_tensor_that_torch_refuses_is_refused() -> None:
    with pytest.raises(ProtocolError, match="a tensor cannot be built from what arrived: only Tensors of floating point"):
        unpack([(1, "int8", 1, (1,), (1,))], [])


@pytest.mark.parametrize("descriptions", [[], [dense(sizes=(1, 3), size=12)], [dense(sizes=(0, 3))]], ids=len)
def test_bytes_that_belong_to_no_tensor_are_refused(descriptions: list[Any]) -> None:
    with pytest.raises(ProtocolError, match=r"(12|24) bytes arrived that belong to no tensor"):
        unpack(descriptions, [memoryview(bytearray(24))])


def test_sparse_tensors_whose_parts_are_expanded_arrive() -> None:
    indices = torch.zeros(1, 1, dtype=torch.int64).expand(2, 3)
    sent = torch.sparse_coo_tensor(indices, torch.ones(1).expand(3), (2, 2), check_invariants=False)
    (got,) = unpack(*wire(*pack([sent])))
    assert torch.equal(got.to_dense(), torch.tensor([[3.0, 0.0], [0.0, 0.0]]))


def test_pieces_that_overlap_are_refused() -> None:
    with pytest.raises(ProtocolError, match="pieces of memory do not overlap"):
        unpack([dense(), dense(sizes=(1, 1), start=4, size=4)], [memoryview(bytearray(24))])


SAMPLES = (
    torch.arange(6.0).reshape(2, 3),
    torch.eye(3).to_sparse(),
    torch.ones(2, device="meta"),
    torch.ones(2, dtype=torch.complex64).conj(),
)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, len(SAMPLES) - 1), st.data())
def test_a_description_with_any_value_changed_is_built_or_refused(which: int, data: st.DataObject) -> None:
    descriptions, buffers = wire(*pack([SAMPLES[which]]))
    junk = st.none() | st.integers(-3, 70) | st.sampled_from([1 << 62, 1 << 63, "int64", "bool", "", (), (0,), (1 << 61, 4), 0.5])

    def change(value: Any) -> Any:
        if type(value) is not tuple or not value or data.draw(st.integers(0, 3)) == 0:
            return data.draw(junk)
        place = data.draw(st.integers(0, len(value) - 1))
        return (*value[:place], change(value[place]), *value[place + 1 :])

    with contextlib.suppress(ProtocolError), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        unpack([change(descriptions[0])], buffers)


def test_nothing_is_built_before_all_is_checked() -> None:
    incoming = Incoming([memoryview(bytearray(24))])
    build = incoming.check(DENSE)
    with pytest.raises(ProtocolError):
        incoming.check((99,))
    incoming.place(PINNED)
    assert build().shape == (2, 3)


def test_every_pair_of_kinds_travels_in_one_message() -> None:
    for pair in itertools.permutations(SAMPLES, 2):
        for got, sent in zip(travel(*pair), pair, strict=True):
            assert got.layout is sent.layout
            assert got.device == sent.device


def test_a_device_that_this_worker_has_is_accepted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("xpu"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    Incoming([memoryview(bytearray(24))]).check(dense(device="xpu:1"))
    with pytest.raises(ProtocolError, match="device xpu:2, which this worker does not have"):
        Incoming([memoryview(bytearray(24))]).check(dense(device="xpu:2"))
