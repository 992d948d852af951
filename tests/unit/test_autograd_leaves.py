from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from torch import Tensor

from zmqagent.autograd.leaves import LeafQueues, gradients_in_place, memory_of_their_own


def leaf(value: float = 1.0) -> Tensor:
    return torch.tensor([value], requires_grad=True)


def test_all_leaves_show_the_contexts_gradients_and_get_their_own_back() -> None:
    one, two, three = leaf(), leaf(), leaf()
    one.grad = users = torch.tensor([7.0])
    gradients = {one: torch.tensor([1.0]), three: torch.tensor([3.0])}
    with gradients_in_place([one, two, three], gradients):
        assert [x.grad if x.grad is None else x.grad.item() for x in (one, two, three)] == [1.0, None, 3.0]
        two.grad = torch.tensor([2.0])
        three.grad = None
    assert one.grad is users
    assert two.grad is None
    assert {key: value.item() for key, value in gradients.items()} == {one: 1.0, two: 2.0}


def test_a_failure_inside_gives_the_user_back_what_was_there() -> None:
    one = leaf()
    one.grad = users = torch.tensor([7.0])
    with pytest.raises(ZeroDivisionError), gradients_in_place([one], {}):
        raise ZeroDivisionError
    assert one.grad is users


def test_who_shares_a_leaf_waits_and_who_shares_none_does_not() -> None:
    queues = LeafQueues()
    shared, mine, other = leaf(), leaf(), leaf()
    waiter_entered = threading.Event()

    def wait_for_shared() -> None:
        with queues.hold([shared, other]):
            waiter_entered.set()

    with queues.hold([shared, mine]):
        waiter = threading.Thread(target=wait_for_shared)
        waiter.start()
        stranger = threading.Thread(target=lambda: queues.hold([leaf()]).__enter__())
        stranger.start()
        stranger.join(timeout=10)
        assert not stranger.is_alive()
        assert not waiter_entered.is_set()
    waiter.join(timeout=10)
    assert waiter_entered.is_set()


def test_many_threads_over_overlapping_leaves_exclude_each_other_and_all_finish() -> None:
    queues = LeafQueues()
    leaves = [leaf() for _ in range(5)]
    holders = [0] * 5
    faults: list[int] = []

    def work(number: int) -> None:
        chosen = [(number * step + start) % 5 for start, step in ((0, 1), (1, 3))]
        for _ in range(200):
            with queues.hold([leaves[index] for index in set(chosen)]):
                for index in set(chosen):
                    holders[index] += 1
                    if holders[index] != 1:
                        faults.append(index)
                for index in set(chosen):
                    holders[index] -= 1

    threads = [threading.Thread(target=work, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
        assert not thread.is_alive()
    assert faults == []


def test_a_thread_that_holds_leaves_may_hold_them_again() -> None:
    queues = LeafQueues()
    one, two = leaf(), leaf()
    with queues.hold([one, two]), queues.hold([two]):
        pass
    assert queues._queues == {}


class _Both(torch.autograd.Function):
    """Gives both inputs the same gradient: the same tensor, or two tensors on the same memory."""

    came_in = 0
    same_tensor = False

    @staticmethod
    def forward(ctx: Any, one: Tensor, two: Tensor) -> Tensor:
        return one + two

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (gradient,) = gradients
        _Both.came_in = gradient.data_ptr()
        return gradient, gradient if _Both.same_tensor else gradient.data


def gradients_after(passes: int, *leaves: Tensor, root: Tensor) -> list[Tensor]:
    """The leaves' gradients after some passes from ``root``."""
    nodes = [torch.autograd.graph.get_gradient_edge(leaf).node for leaf in leaves]
    # What flows into the root is made by the graph: of a gradient from outside the caller holds a reference.
    loss = (root * 3).sum()
    for _ in range(passes):
        with memory_of_their_own(nodes):
            torch.autograd.backward([loss], inputs=list(leaves), retain_graph=True)
    return [leaf.grad for leaf in leaves if leaf.grad is not None]


def test_two_leaves_never_share_the_memory_of_their_gradients() -> None:
    one, two, third = leaf(), leaf(), leaf()
    first, second, other = gradients_after(2, one, two, third, root=_Both.apply(one, two) + third * 2)
    assert first.untyped_storage().data_ptr() != second.untyped_storage().data_ptr()
    assert [first.item(), second.item(), other.item()] == [6.0, 6.0, 12.0]


def test_one_tensor_for_two_leaves_is_copied_for_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_Both, "same_tensor", True)
    one, two = leaf(), leaf()
    first, second = gradients_after(1, one, two, root=_Both.apply(one, two))
    assert len({first.data_ptr(), second.data_ptr(), _Both.came_in}) == 3


def test_gradients_that_share_nothing_are_taken_over_uncopied() -> None:
    seen: list[int] = []
    one, two = leaf(), leaf()
    one_out, two_out = one.clone(), two.clone()
    for out in (one_out, two_out):
        out.register_hook(lambda gradient: seen.append(gradient.data_ptr()))
    first, second = gradients_after(1, one, two, root=one_out * 2 + two_out * 3)
    assert {first.data_ptr(), second.data_ptr()} == set(seen)


def test_no_hook_stays_on_a_leaf() -> None:
    one, two = leaf(), leaf()
    nodes = [torch.autograd.graph.get_gradient_edge(x).node for x in (one, two)]
    with memory_of_their_own(nodes):
        pass
    one.grad = two.grad = None
    (_Both.apply(one, two) * 3).sum().backward()
    assert one.grad is not None
    assert two.grad is not None
    assert one.grad.untyped_storage().data_ptr() == two.grad.untyped_storage().data_ptr()
