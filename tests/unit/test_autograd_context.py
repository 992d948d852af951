from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from zmqagent.autograd.context import DistAutogradContext
from zmqagent.autograd.functions import SendRpcBackward
from zmqagent.wire.types import AutogradMetadata, WorkerId

PEER = WorkerId(2)
RECV_NAME = "torch::distributed::autograd::RecvRpcBackward"


@pytest.fixture
def context() -> DistAutogradContext:
    return DistAutogradContext(5, itertools.count(100).__next__)


def received(context: DistAutogradContext, *tensors: Tensor, message_id: int = 7) -> list[Tensor]:
    return context.attach_incoming(AutogradMetadata(5, message_id), PEER, tensors)


class Passing:
    """Stands in for a running pass: catches what recvs send."""

    def __init__(self, context: DistAutogradContext) -> None:
        self.sent: list[Tensor] = []
        context.passes.sender = lambda wire, gradients: self.sent.extend(gradients)


@pytest.fixture
def sent(context: DistAutogradContext) -> Iterator[list[Tensor]]:
    yield Passing(context).sent
    context.passes.sender = None


def test_a_send_has_the_edges_of_the_tensors_that_require_grad(context: DistAutogradContext) -> None:
    leaf, plain = torch.ones(2, requires_grad=True), torch.ones(2)
    split = (leaf * 2).unbind(0)
    assert context.attach_outgoing(PEER, [leaf, plain, split[1]]) == AutogradMetadata(5, 100)
    (send,) = context._send_functions().values()
    assert isinstance(send, SendRpcBackward)
    assert (send.name(), send.peer, send.message_id) == ("torch::distributed::autograd::SendRpcBackward", PEER, 100)
    (first, first_input), (second, second_input) = send.next_functions
    assert (first.name(), first.variable is leaf, first_input) == ("torch::autograd::AccumulateGrad", True, 0)
    assert (second is split[0].grad_fn, second_input) == (True, 1)


def test_a_message_without_grad_makes_its_destination_known_and_nothing_else(context: DistAutogradContext) -> None:
    context.attach_outgoing(PEER, [torch.ones(1)])
    context.attach_outgoing(WorkerId(3), [])
    plain = torch.ones(1)
    assert received(context, plain)[0] is plain
    assert (context._known_worker_ids(), context._send_functions(), context._recv_functions()) == ({2, 3}, {}, {})


def test_functions_are_listed_by_message_id(context: DistAutogradContext) -> None:
    for message_id in (9, 3, 6):
        received(context, torch.ones(1, requires_grad=True), message_id=message_id)
    assert list(context._recv_functions()) == [3, 6, 9]


def test_a_recv_is_the_grad_fn_of_all_tensors_of_its_message(context: DistAutogradContext) -> None:
    whole, one, two = received(context, torch.ones(2).long(), *(torch.ones(2, requires_grad=True) for _ in range(2)))
    (node,) = context._recv_functions().values()
    assert (whole.requires_grad, one.grad_fn is node, two.grad_fn is node, node.name()) == (False, True, True, RECV_NAME)
    (left, _), (right, _) = (one + two).grad_fn.next_functions
    assert left is right is node


def test_undefined_gradients_are_sent_as_zeros(context: DistAutogradContext, sent: list[Tensor]) -> None:
    _, two = received(context, *(torch.ones(2, requires_grad=True) for _ in range(2)))
    (two * 3).sum().backward()
    assert [gradient.tolist() for gradient in sent] == [[0.0, 0.0], [3.0, 3.0]]


def test_received_tensors_can_be_changed_in_place(context: DistAutogradContext, sent: list[Tensor]) -> None:
    storage = torch.arange(6.0)
    tensors = received(context, storage.detach().requires_grad_(), storage[1:4].requires_grad_(), torch.ones(3).requires_grad_())
    for tensor in tensors:
        tensor.mul_(2)
    assert [tensor._is_view() for tensor in tensors] == [False] * 3
    tensors[2].sum().backward()
    assert sent[2].tolist() == [2.0, 2.0, 2.0]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
def test_sparse_tensors_pass_and_their_gradients_are_sparse(context: DistAutogradContext, sent: list[Tensor]) -> None:
    sparse = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,)).requires_grad_()
    (tensor,) = received(context, sparse)
    torch.sparse.sum(tensor).backward()
    assert sent[0].is_sparse
    assert sent[0].to_dense().tolist() == [1.0, 1.0, 0.0]


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled:UserWarning")
@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta state:UserWarning")
def test_sparse_leaves_and_results_can_be_sent(context: DistAutogradContext) -> None:
    leaf = torch.sparse_coo_tensor([[0, 1]], [1.0, 2.0], (3,)).requires_grad_()
    compressed = torch.eye(3).to_sparse_csr().requires_grad_()
    result = leaf * 2
    context.attach_outgoing(PEER, [leaf, result, compressed])
    (send,) = context._send_functions().values()
    (first, _), (second, _), (third, _) = send.next_functions
    assert (first.variable is leaf, second is result.grad_fn, third.variable is compressed) == (True, True, True)


def test_a_received_tensor_can_be_sent_on_untouched(context: DistAutogradContext) -> None:
    (tensor,) = received(context, torch.ones(2, requires_grad=True))
    context.attach_outgoing(WorkerId(3), [tensor])
    (send,) = context._send_functions().values()
    assert send.next_functions == ((tensor.grad_fn, 0),)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_what_arrives_requires_grad_in_any_mode_of_the_caller(context: DistAutogradContext, mode: type) -> None:
    tensor = torch.ones(2, requires_grad=True)
    with mode():
        (arrived,) = received(context, tensor)
    assert arrived.requires_grad
    assert arrived.grad_fn is not None


def test_a_leaf_can_be_sent_without_grad_mode(context: DistAutogradContext) -> None:
    leaf = torch.ones(2, requires_grad=True)
    with torch.no_grad():
        context.attach_outgoing(PEER, [leaf])
    (send,) = context._send_functions().values()
    assert send.next_functions[0][0].variable is leaf


def test_a_recv_does_not_keep_its_context() -> None:
    context = DistAutogradContext(5, itertools.count().__next__)
    tensors = received(context, torch.ones(2, requires_grad=True))
    remains = weakref.ref(context)
    del context
    gc.collect()
    assert remains() is None
    with pytest.raises(RuntimeError, match="Autograd context no longer valid! This usually means the autograd context"):
        tensors[0].sum().backward()


def test_a_send_keeps_the_graph_of_a_python_function() -> None:
    class Double(torch.autograd.Function):
        @staticmethod
        def forward(ctx: object, tensor: Tensor) -> Tensor:
            return tensor * 2

        @staticmethod
        def backward(ctx: object, gradient: Tensor) -> Tensor:
            return gradient * 2

    leaf = torch.ones(1, requires_grad=True)
    send = SendRpcBackward(0, PEER, [Double.apply(leaf * 3)])
    gc.collect()
    ((node, number),) = send.next_functions
    (gradient,) = torch.autograd.grad([torch.autograd.graph.GradientEdge(node, number)], [leaf], [torch.ones(1)])
    assert gradient.item() == 6.0


def test_the_gradients_handed_out_are_a_copy_of_the_table(context: DistAutogradContext) -> None:
    leaf = torch.ones(1, requires_grad=True)
    context.accumulated[leaf] = torch.ones(1)
    context.gradients().clear()
    assert list(context.gradients()) == [leaf]


def test_its_text_says_what_it_holds(context: DistAutogradContext) -> None:
    context.attach_outgoing(PEER, [torch.ones(1, requires_grad=True)])
    context.release()
    assert repr(context) == "<DistAutogradContext 5 sends=1 recvs=0 known_workers=[2] released>"
