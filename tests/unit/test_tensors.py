"""`zmqagent.agent.tensors`: every kind of tensor arrives as it was, frozen at the call, and nothing else is believed."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.testing._internal.two_tensor import TwoTensor

from tests.unit.tensor_travel import travel, wire
from zmqagent.agent.buffers import LENDABLE, SMALL
from zmqagent.agent.tensor_kinds import DTYPES
from zmqagent.agent.tensors import pack, unpack
from zmqagent.exceptions import DeviceMapError, NotPicklableError

# torch warns once a process of these kinds; the tests that make them here are not the place to read that.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sparse (CSR|CSC|BSR|BSC) tensor support is in beta"),
    pytest.mark.filterwarnings("ignore:ComplexHalf support is experimental"),
    pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor, torch.quantize_per_channel"),
    pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors is in prototype stage"),
]

LARGE = 2 * SMALL


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().reshape(-1).view(torch.uint8)


def a_tensor(dtype: torch.dtype, *sizes: int) -> torch.Tensor:
    """Bits at random; ones for bool, where other bits are no values."""
    count = torch.Size(sizes).numel() * dtype.itemsize
    raw = torch.randint(0, 2 if dtype is torch.bool else 256, (count,), dtype=torch.uint8)
    return torch.empty(0, dtype=dtype).set_(raw.untyped_storage(), 0, sizes)


@pytest.mark.parametrize("count", [3, LARGE])
@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_arrives_bit_by_bit(name: str, count: int) -> None:
    tensor = a_tensor(DTYPES[name], count)
    (got,) = travel(tensor)
    assert got.dtype is tensor.dtype
    assert got.shape == tensor.shape
    assert torch.equal(byte_copy(got), byte_copy(tensor))


def byte_copy(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor of any dtype, also of those that no operation knows."""
    size = tensor.numel() * tensor.itemsize
    begin = tensor.storage_offset() * tensor.itemsize
    return torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage(), begin, (size,)).clone()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(1.5),
        torch.empty(0),
        torch.empty(3, 0, 2),
        torch.empty_strided((0, 4), (9, 7)),
        torch.arange(12.0).reshape(3, 4).t(),
        torch.arange(LARGE * 2.0).reshape(2, -1).t(),
        torch.ones(2, 3, 4, 5).contiguous(memory_format=torch.channels_last),
        torch.arange(10.0)[3:7],
        torch.arange(LARGE * 3.0)[5:-7],
        torch.tensor(2.0).expand(3, 4),
        torch.arange(3.0).expand(1 << 40, 3),
        torch.arange(6.0).unfold(0, 3, 1),
        torch.arange(4.0).as_strided((2, 2), (1, 1), 1),
    ],
    ids=lambda t: f"{tuple(t.shape)}-{t.stride()}",
)
def test_values_and_strides_of_a_tensor_without_gaps_arrive(tensor: torch.Tensor) -> None:
    (got,) = travel(tensor)
    assert got.stride() == tensor.stride()
    assert got.shape == tensor.shape
    if tensor.numel() < 1 << 30:
        assert torch.equal(got, tensor)
    else:
        assert torch.equal(got[:2], tensor[:2])


@pytest.mark.parametrize("columns", [slice(2, 3), slice(0, 9, 3)])
def test_a_large_view_with_gaps_arrives_as_a_compact_copy(columns: slice) -> None:
    view = torch.arange(LARGE * 20.0).reshape(LARGE, 20)[:, columns]
    _, buffers = pack([view])
    assert sum(map(len, buffers)) == view.numel() * 4
    (got,) = travel(view)
    assert torch.equal(got, view)
    assert got.is_contiguous()


@pytest.mark.parametrize("view", [torch.arange(100.0).reshape(10, 10)[:, 3], torch.arange(LARGE * 3.0).reshape(-1, 3)[:, :2]])
def test_a_view_with_few_gaps_keeps_its_strides(view: torch.Tensor) -> None:
    (got,) = travel(view)
    assert torch.equal(got, view)
    assert got.stride() == view.stride()


def test_a_small_view_of_a_large_storage_sends_only_what_it_touches() -> None:
    whole = torch.arange(1_000_000.0)
    view = whole[500_000:500_010]
    descriptions, buffers = pack([view])
    assert [len(buffer) for buffer in buffers] == [40]
    (got,) = unpack(*wire(descriptions, buffers))
    assert torch.equal(got, view)
    assert got.untyped_storage().nbytes() == 40


@pytest.mark.parametrize("size", [20, LARGE])
def test_views_that_share_memory_share_it_on_arrival(size: int) -> None:
    base = torch.arange(float(size))
    descriptions, buffers = pack([base, base[5:10], base.view(2, -1), base[::2], base])
    assert [len(buffer) for buffer in buffers] == [size * 4]
    whole, part, matrix, steps, again = unpack(*wire(descriptions, buffers))
    whole[6] = -1.0
    assert part[1] == -1.0
    assert matrix[0, 6] == -1.0
    assert steps[3] == -1.0
    assert again[6] == -1.0
    assert torch.equal(part[2:], base[7:10])


@pytest.mark.parametrize(("rows", "sent"), [(10, 181), (LARGE, LARGE)])
def test_the_same_view_with_gaps_twice_is_sent_once(rows: int, sent: int) -> None:
    column = torch.arange(rows * 20.0).reshape(rows, 20)[:, 3]
    descriptions, buffers = pack([column, column.detach()])
    assert sum(map(len, buffers)) == sent * 4
    first, second = unpack(*wire(descriptions, buffers))
    first[2] = -1.0
    assert second[2] == -1.0


def test_views_of_other_dtypes_share_memory() -> None:
    raw = torch.zeros(80, dtype=torch.uint8)
    longs, odd, shorts = travel(raw[16:64].view(torch.int64), raw[9:30], raw[10:20].view(torch.int16))
    odd[7] = 1
    assert longs[0] == 1
    shorts[3] = 0x0102
    assert int(longs[0]) == 0x0102
    assert torch.equal(odd[:9], torch.tensor([0, 0, 0, 0, 0, 0, 0, 2, 1], dtype=torch.uint8))


def test_columns_of_a_large_matrix_travel_alone() -> None:
    matrix = torch.arange(1_000_000.0).reshape(1000, 1000)
    columns = matrix[:, 3], matrix[:, 7]
    _, buffers = pack(columns)
    assert sum(map(len, buffers)) == 2 * 4000
    assert all(map(torch.equal, travel(*columns), columns))


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 20), st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), max_size=3)), max_size=4))
def test_any_views_of_one_storage_arrive_with_their_values_and_their_sharing(shapes: list[Any]) -> None:
    base = torch.arange(100.0)
    views = [base.as_strided([n for n, _ in dims], [s for _, s in dims], offset) for offset, dims in shapes]
    got = travel(*views)
    for view, arrived in zip(views, got, strict=True):
        assert torch.equal(arrived, view)
    # Writing to one shows in the others exactly where it does at home.
    for mark, (view, arrived) in enumerate(zip(views, got, strict=True)):
        view.fill_(-mark - 1.0)
        arrived.fill_(-mark - 1.0)
        for other, there in zip(views, got, strict=True):
            assert torch.equal(other, there)


def test_the_payload_is_frozen_at_the_call() -> None:
    tensors = [torch.zeros(size) for size in (3, LARGE)] + [torch.zeros(LARGE, 4)[:, 1]]
    descriptions, buffers = pack(tensors)
    for tensor in tensors:
        tensor.fill_(1.0)
    assert all(not got.any() for got in unpack(*wire(descriptions, buffers)))


@pytest.mark.parametrize("size", [5, LARGE])
def test_sparse_coo_tensors_arrive(size: int) -> None:
    dense = torch.eye(size)[:, :7].clone()
    coalesced = dense.to_sparse()
    loose = torch.sparse_coo_tensor([[1, 1]], [2.0, 3.0], (size,), check_invariants=True)
    hybrid = dense.to_sparse(1)
    for sparse in (coalesced, loose, hybrid):
        (got,) = travel(sparse)
        assert got.layout is torch.sparse_coo
        assert got.is_coalesced() == sparse.is_coalesced()
        assert torch.equal(got.to_dense(), sparse.to_dense())
        assert got._values().shape == sparse._values().shape


@pytest.mark.parametrize("layout", [torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc], ids=str)
def test_compressed_sparse_tensors_arrive(layout: torch.layout) -> None:
    blocks = (2, 2) if layout in (torch.sparse_bsr, torch.sparse_bsc) else None
    dense = torch.diag(torch.arange(6.0))
    sparse = dense.to_sparse(layout=layout, blocksize=blocks).requires_grad_()
    (got,) = travel(sparse)
    assert got.layout is layout
    assert got.requires_grad
    assert torch.equal(got.detach().to_dense(), dense)


@pytest.mark.parametrize("dtype", [torch.qint8, torch.quint8, torch.qint32], ids=str)
def test_quantized_tensors_arrive(dtype: torch.dtype) -> None:
    values = torch.randn(5, 6)
    scales, zeros = torch.rand(5, dtype=torch.float64) + 0.1, torch.arange(5)
    for quantized in (
        torch.quantize_per_tensor(values, 0.1, 3, dtype),
        torch.quantize_per_tensor(values, 0.1, 3, dtype).t(),
        torch.quantize_per_tensor(values, 0.1, 3, dtype)[:, 2],
        torch.quantize_per_channel(values, scales, zeros, 0, dtype),
        torch.quantize_per_channel(values, scales.float(), zeros.float(), 0, torch.quint8),
    ):
        (got,) = travel(quantized)
        assert got.qscheme() is quantized.qscheme()
        assert got.dtype is quantized.dtype
        assert torch.equal(got.int_repr(), quantized.int_repr())
        assert torch.equal(got.dequantize(), quantized.dequantize())


def test_conjugate_and_negative_bits_arrive() -> None:
    z = torch.randn(3, dtype=torch.complex64)
    plain, conjugate, negative, gaps = travel(z, z.conj(), z.conj().imag, torch.randn(99, 99, dtype=torch.complex64)[:, 1].conj())
    assert conjugate.is_conj()
    assert negative.is_neg()
    assert gaps.is_conj()
    assert torch.equal(conjugate, z.conj())
    assert torch.equal(negative, z.conj().imag)
    plain[0] = 5 + 7j
    assert conjugate[0] == 5 - 7j
    assert negative[0] == -7


@pytest.mark.parametrize("size", [3, LARGE])
def test_tensors_that_require_grad_arrive_as_leaves_that_do(size: int) -> None:
    weight = torch.ones(size, requires_grad=True)
    leaf, output, plain = travel(weight, weight * 2, weight.detach() + 1)
    assert [t.requires_grad for t in (leaf, output, plain)] == [True, True, False]
    assert leaf.is_leaf
    assert output.is_leaf
    (leaf * output).sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.tolist() == [2.0] * size
    with torch.no_grad():
        leaf += 1.0


def test_sparse_tensors_that_require_grad_arrive_as_such() -> None:
    (got,) = travel(torch.eye(3).to_sparse().requires_grad_())
    assert got.requires_grad
    assert got.is_leaf


def test_meta_tensors_arrive_without_memory() -> None:
    tensor = torch.empty_strided((1 << 20, 1 << 20), (1, 1 << 20), dtype=torch.float16, device="meta").requires_grad_()
    descriptions, buffers = pack([tensor])
    assert buffers == []
    (got,) = unpack(*wire(descriptions, buffers))
    assert got.is_meta
    assert got.requires_grad
    assert (got.shape, got.stride(), got.dtype) == (tensor.shape, tensor.stride(), tensor.dtype)


def test_a_subclass_without_behaviour_of_its_own_arrives_as_a_plain_tensor() -> None:
    class Named(torch.Tensor):
        pass

    (got, weight) = travel(torch.ones(3).as_subclass(Named), torch.nn.Parameter(torch.ones(2)))
    assert type(got) is torch.Tensor
    assert type(weight) is torch.Tensor
    assert weight.requires_grad


def test_tensors_that_cannot_travel_are_refused_by_name() -> None:
    with FakeTensorMode():
        fake = torch.ones(3)
    emptied = torch.ones(3)
    emptied.untyped_storage().resize_(4)
    wrapped: list[torch.Tensor] = []
    torch.func.vmap(lambda t: wrapped.append(t) or t)(torch.ones(2, 2))
    jagged = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=torch.jagged)
    quarter = torch.quantize_per_channel(torch.ones(2, 4), torch.ones(2), torch.zeros(2), 0, torch.quint4x2)
    for tensor, text in [
        (fake, r"a torch._subclasses.fake_tensor.FakeTensor cannot be sent as a tensor"),
        (TwoTensor(torch.ones(2), torch.ones(2)), r"two_tensor.TwoTensor cannot be sent as a tensor"),
        (jagged, r"nested_tensor.NestedTensor cannot be sent as a tensor"),
        (torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]), "a nested tensor cannot be sent; send unbind"),
        (torch.ones(2, 2).to_mkldnn(), r"layout torch._mkldnn cannot be sent; convert it with to_dense"),
        (
            torch.sparse_coo_tensor(size=(2, 2), device="meta", check_invariants=False),
            "a meta tensor that is sparse or quantized cannot be sent",
        ),
        (quarter, "a tensor of dtype torch.quint4x2 cannot be sent; convert it first"),
        (emptied, "a tensor that needs 12 bytes has a storage of 4: was it resized"),
        (wrapped[0], "a tensor without memory of its own cannot be sent"),
    ]:
        with pytest.raises(NotPicklableError, match=text):
            pack([torch.ones(1), tensor])


def test_the_target_device_is_asked_and_named() -> None:
    asked = []

    def target(device: torch.device) -> str:
        asked.append(device)
        return "meta"

    pack([torch.ones(LARGE), torch.ones(3).to_sparse()], target)
    assert asked == [torch.device("cpu")] * 3
    # No accelerator is needed to see where a tensor is put: "meta" is a device like any other to torch.
    got = unpack(*wire(*pack([torch.ones(LARGE)], target)))
    assert got[0].is_meta


def test_a_tensor_on_a_device_without_a_map_is_refused() -> None:
    def refuse(device: torch.device) -> str:
        raise DeviceMapError(f"no map for {device}")

    with pytest.raises(DeviceMapError, match="no map for cpu"):
        pack([torch.ones(1)], refuse)


def test_small_tensors_share_one_frame() -> None:
    tensors = [torch.full((n,), float(n)) for n in range(1, 50)] + [torch.ones(LARGE)]
    descriptions, buffers = pack(tensors)
    assert len(buffers) == 2
    got = unpack(*wire(descriptions, buffers))
    assert all(map(torch.equal, got, tensors))
    assert len({t.untyped_storage().data_ptr() for t in got}) == len(tensors)


def arrive(size: int, shift: int, read_only: bool, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, int]:
    """A tensor of ``size`` bytes that arrives ``shift`` bytes behind a multiple of 64, and the address it arrived at."""
    descriptions, (data,) = pack([torch.zeros(size // dtype.itemsize, dtype=dtype)])
    room = torch.zeros(size + 128, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + shift
    room[begin : begin + size] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    view = memoryview(room.numpy())[begin : begin + size]
    return unpack(descriptions, [view.toreadonly() if read_only else view])[0], room.data_ptr() + begin


@pytest.mark.parametrize(
    ("size", "shift", "read_only", "dtype", "copied"),
    [
        (LARGE, 0, False, torch.float32, False),
        (LARGE, 56, False, torch.float64, False),
        (LARGE, 56, False, torch.complex128, True),
        (LARGE, 4, False, torch.float32, True),
        (LARGE, 0, True, torch.float32, True),
        (SMALL, 0, False, torch.float32, True),
    ],
)
def test_only_large_writable_aligned_buffers_become_the_memory_of_tensors(
    size: int, shift: int, read_only: bool, dtype: torch.dtype, copied: bool
) -> None:
    tensor, address = arrive(size, shift, read_only, dtype)
    assert (tensor.data_ptr() != address) == copied
    assert tensor.data_ptr() % dtype.itemsize == 0
    tensor += 1
    assert tensor.real.sum() == tensor.numel()


def test_the_strictest_dtype_of_shared_memory_sets_its_alignment() -> None:
    base = torch.zeros(LARGE, dtype=torch.uint8)
    descriptions, (data,) = pack([base, base.view(torch.complex128)])
    room = torch.zeros(LARGE + 128, dtype=torch.uint8)
    begin = -room.data_ptr() % 64 + 56
    got = unpack(descriptions, [memoryview(room.numpy())[begin : begin + len(data)]])
    assert got[1].data_ptr() % 16 == 0
    assert got[0].data_ptr() == got[1].data_ptr()


def test_a_tensor_keeps_its_buffer_alive() -> None:
    descriptions, buffers = pack([torch.arange(float(LARGE))])
    (got,) = unpack(descriptions, [memoryview(bytearray(buffers[0]))])
    del buffers
    assert torch.equal(got, torch.arange(float(LARGE)))


def test_the_first_tensor_of_a_kind_arrives_without_torchs_warning() -> None:
    # torch warns once a process, so the receiver is a process of its own, in which warnings are errors.
    quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    tensors = [torch.ones(2, dtype=torch.complex32), torch.eye(2).to_sparse_csr(), quantized]
    descriptions, buffers = pack(tensors)
    script = (
        "import sys, warnings; import torch; from zmqagent.agent.tensors import unpack; warnings.simplefilter('error');"
        f"got = unpack({descriptions!r}, [memoryview(b) for b in {[bytes(b) for b in buffers]!r}]);"
        "sys.exit([t.layout for t in got] != [torch.strided, torch.sparse_csr, torch.strided])"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_a_default_device_set_by_the_user_reaches_nothing() -> None:
    with torch.device("meta"):
        (got, large) = travel_under_default(torch.ones(3, device="cpu"), torch.ones(LARGE, device="cpu"))
    assert got.tolist() == [1.0] * 3
    assert large.sum() == LARGE


def travel_under_default(*tensors: torch.Tensor) -> list[torch.Tensor]:
    return unpack(*wire(*pack(tensors)))


def test_large_copies_are_made_in_the_memory_that_is_allocated_for_them() -> None:
    given: list[memoryview] = []

    def allocate(size: int) -> memoryview | None:
        given.append(memoryview(bytearray(size)))
        return given[-1] if len(given) < 4 else None

    base = torch.arange(LENDABLE / 4)
    gaps = torch.arange(LENDABLE * 1.0).reshape(-1, 4)[:, 1]
    sent = [base, base[1:], gaps, torch.ones(LENDABLE), torch.full((LENDABLE,), 2.0), torch.ones(SMALL)]
    descriptions, buffers = pack(sent, allocate=allocate)
    # The first two share memory; there is none left for the fifth; the last is not worth asking.
    assert [len(memory) for memory in given] == [LENDABLE, LENDABLE, 4 * LENDABLE, 4 * LENDABLE]
    assert [memory is buffer for memory, buffer in zip(given, buffers, strict=False)] == [True, True, True, False]
    assert all(map(torch.equal, unpack(*wire(descriptions, buffers)), sent))


def test_a_plain_copy_is_made_in_the_memory_that_is_allocated_for_it() -> None:
    memory = memoryview(bytearray(LENDABLE))
    sent = torch.arange(LENDABLE / 4)
    descriptions, buffers = pack([sent], allocate=lambda size: memory)
    assert buffers == [memory]
    assert buffers[0] is memory
    assert torch.equal(unpack(*wire(descriptions, buffers))[0], sent)
