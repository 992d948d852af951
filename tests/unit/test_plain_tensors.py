"""`zmqagent.agent.plain_tensors`: the short way is taken by tensors that lose nothing on it, and by no others."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.unit.tensor_travel import travel, wire
from zmqagent.agent.buffers import CPU, SMALL, from_heap
from zmqagent.agent.devices import cpu_only
from zmqagent.agent.plain_tensors import pack_plain
from zmqagent.agent.tensor_kinds import Kind
from zmqagent.agent.tensors import pack, unpack
from zmqagent.exceptions import ProtocolError

LARGE = 2 * SMALL


def is_plain(*tensors: torch.Tensor) -> bool:
    return pack_plain(tensors, cpu_only, from_heap) is not None


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.ones(2, 3),
        torch.ones(0, 3),
        torch.ones(1, LARGE),
        torch.ones(3, requires_grad=True) * 2,
        torch.nn.Parameter(torch.ones(3)),
        torch.arange(10)[3:7],
        torch.ones(2, dtype=torch.complex64),
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.dtype}",
)
def test_common_tensors_are_plain(tensor: torch.Tensor) -> None:
    assert is_plain(tensor)
    (got,) = travel(tensor)
    assert torch.equal(got, tensor)
    assert got.requires_grad == tensor.requires_grad
    assert got.is_leaf
    assert got.dtype is tensor.dtype
    assert got.stride() == tensor.stride()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.ones(2, 3).t(),
        torch.ones(4, 1).t(),
        torch.empty_strided((0, 4), (9, 7)),
        torch.ones(3).expand(2, 3),
        torch.ones(2, dtype=torch.complex64).conj(),
        torch.ones(2, dtype=torch.complex64).conj().imag,
        torch.ones(2, device="meta"),
        torch.eye(2).to_sparse(),
        torch.ones(2).as_subclass(Subclass),
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.layout}-{t.device}",
)
def test_tensors_that_are_more_than_their_elements_in_order_are_not_plain(tensor: torch.Tensor) -> None:
    assert not is_plain(tensor)
    assert not is_plain(torch.ones(1), tensor)


def test_a_tensor_whose_storage_has_shrunk_is_not_plain() -> None:
    tensor = torch.ones(10)
    tensor.untyped_storage().resize_(39)
    assert not is_plain(tensor)


def test_tensors_that_share_memory_are_not_plain() -> None:
    base = torch.ones(10)
    assert not is_plain(base[:5], base[5:])
    assert is_plain(base[:5], base.clone())


def test_tensors_that_change_device_on_their_way_are_not_plain() -> None:
    assert pack_plain([torch.ones(1)], lambda device: torch.device("meta"), from_heap) is None


@pytest.mark.parametrize("size", [3, LARGE])
def test_plain_tensors_are_frozen_at_the_call(size: int) -> None:
    tensor = torch.zeros(size)
    descriptions, buffers = pack([tensor])
    tensor.fill_(1)
    assert not unpack(*wire(descriptions, buffers))[0].any()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 3, SMALL - 1, SMALL, SMALL + 1, LARGE]), max_size=6))
def test_small_and_large_ones_arrive_in_order_and_writable(sizes: list[int]) -> None:
    tensors = [torch.randint(0, 256, (size,), dtype=torch.uint8) for size in sizes]
    descriptions, buffers = pack(tensors)
    assert all(description[0] == Kind.PLAIN for description in descriptions)
    assert len(buffers) == sum(size > SMALL for size in sizes) + any(0 < size <= SMALL for size in sizes)
    got = unpack(*wire(descriptions, buffers))
    assert len(got) == len(tensors)
    for arrived, sent in zip(got, tensors, strict=True):
        assert torch.equal(arrived, sent)
        arrived.fill_(7)
    assert all(bool((arrived == 7).all()) for arrived in got)


PLAIN = (6, "float32", 0, (2, 3), 0, 0)


@pytest.mark.parametrize(
    ("place", "value", "text"),
    [
        (1, "float33", "dtype 'float33' is unknown"),
        (1, "qint8", "dtype 'qint8' is unknown"),
        (1, "complex32", "dtype 'complex32' is unknown"),
        (1, None, "dtype None is unknown"),
        (2, 2, "its kind has these flags"),
        (2, True, "its kind has these flags"),
        (3, [2, 3], "sizes are not negative"),
        (3, (2, -3), "sizes are not negative"),
        (3, (2, True), "sizes are not negative"),
        (3, (1 << 40, 1 << 40), "sizes have a limit"),
        (3, (1 << 40, 3), "bytes 0 to [0-9]+ of buffer 0, which did not arrive"),
        (3, (2, 2), "8 bytes arrived that belong to no tensor"),
        (3, (0, 3), "24 bytes arrived that belong to no tensor"),
        (3, (1 << 62, 0, 1 << 62), "24 bytes arrived that belong to no tensor"),
        (4, 1, "bytes 0 to 24 of buffer 1, which did not arrive"),
        (4, -1, "places in buffers are not negative"),
        (5, 4, "bytes 4 to 28 of buffer 0, which did not arrive"),
        (5, -4, "places in buffers are not negative"),
        (5, 0.0, "places in buffers are not negative"),
    ],
)
def test_a_plain_description_that_is_wrong_is_refused(place: int, value: Any, text: str) -> None:
    assert unpack([PLAIN], [memoryview(bytearray(24))])[0].device == CPU
    with pytest.raises(ProtocolError, match=text):
        unpack([(*PLAIN[:place], value, *PLAIN[place + 1 :])], [memoryview(bytearray(24))])


def test_a_plain_description_of_the_wrong_length_is_refused() -> None:
    with pytest.raises(ProtocolError, match="kind 6 has 5 values"):
        unpack([PLAIN[:-1]], [memoryview(bytearray(24))])


def test_plain_integers_cannot_require_grad() -> None:
    with pytest.raises(ProtocolError, match="tensors that require grad are floating-point or complex"):
        unpack([(6, "int32", 1, (2, 3), 0, 0)], [memoryview(bytearray(24))])


def test_plain_pieces_do_not_overlap() -> None:
    with pytest.raises(ProtocolError, match="pieces of memory do not overlap"):
        unpack([PLAIN, (6, "float32", 0, (1,), 0, 4)], [memoryview(bytearray(24))])
