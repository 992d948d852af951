from __future__ import annotations

import gc
import threading
import weakref

import pytest
import torch
from torch import Tensor

from tests.support.autograd_network import Call, Network, Worker
from zmqagent.autograd.container import ContextLease, DistAutogradContainer
from zmqagent.exceptions import AutogradContextError, ShutdownError
from zmqagent.wire.types import AutogradMetadata, MessageType, WorkerId

WAIT = 30.0


def contexts_of(network: Network) -> list[str]:
    network.settle()
    return [worker.container.debug_info()["num_autograd_contexts"] for worker in network.workers]


def spread(network: Network) -> ContextLease:
    """A context that worker 0 opens and that reaches worker 2 by way of worker 1."""

    def hop(there: Worker, tensor: Tensor) -> list[Tensor]:
        return there.call(2, lambda _, t: [t * 2], tensor).result(WAIT)

    worker = network.workers[0]
    lease = worker.container.new_context()
    worker.call(1, hop, torch.ones(1)).result(WAIT)
    return lease


def test_ids_carry_the_worker_in_their_upper_bits() -> None:
    with Network(4, 0) as network:
        container = network.workers[3].container
        assert container.get_max_id() == (3 << 48) + 281474976710655
        for number in range(3):
            lease = container.new_context()
            context = container.retrieve_context(lease._context_id())
            assert lease._context_id() == context._context_id() == (3 << 48) + number
            assert context.attach_outgoing(WorkerId(1), []) == AutogradMetadata(context.context_id, (3 << 48) + number)
            container.release_context(lease._context_id())


_seen_by_script: list[tuple[int, object]] = []
_look = {"current": lambda: None}


# Without types: the compiler takes that for tensors, and cannot read annotations that are strings, as in this file.
@torch.jit.ignore
def look(x):
    _seen_by_script.append((threading.get_ident(), _look["current"]()))
    return x


@torch.jit.script
def look_around(x: Tensor) -> Tensor:
    return torch.jit.wait(torch.jit.fork(look, x)) + look(x)


def test_a_script_keeps_the_context_when_it_forks_and_when_it_goes_on_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    with Network(1, 0) as network:
        container = network.workers[0].container
        monkeypatch.setitem(_look, "current", container.current_context_or_none)
        lease = container.new_context()
        look_around(torch.ones(1))
        container.release_context(lease._context_id())
        look_around(torch.ones(1))
    context = lease.context
    assert [seen for _, seen in _seen_by_script] == [context, context, None, None]
    assert any(thread != threading.get_ident() for thread, _ in _seen_by_script)


def test_what_leaves_a_context_open_does_not_leave_it_to_the_thread() -> None:
    with Network(1, 0) as network:
        container = network.workers[0].container
        with container.activate(None):
            left = container.new_context()
        assert container.current_context_or_none() is None
        assert container.find_context(left._context_id()) is left.context


def test_a_thread_has_one_current_context() -> None:
    with Network(1, 0) as network:
        container = network.workers[0].container
        with pytest.raises(AutogradContextError, match="Current thread doesn't have a valid autograd context"):
            container.current_context()
        lease = container.new_context()
        assert container.current_context()._context_id() == lease._context_id()
        with pytest.raises(AutogradContextError, match=r"Already have an autograd context id for this thread\."):
            container.new_context()
        seen = []
        other = threading.Thread(target=lambda: seen.append(container.current_context_or_none()))
        other.start()
        other.join(WAIT)
        assert seen == [None]
        container.release_context(lease._context_id())
        assert container.current_context_or_none() is None


def test_activating_a_context_restores_the_one_before() -> None:
    with Network(1, 0) as network:
        container = network.workers[0].container
        lease = container.new_context()
        mine = container.current_context()
        other = container.get_or_create_context(5 << 48)
        with container.activate(other):
            assert container.current_context() is other
            with container.activate(None):
                assert container.current_context_or_none() is None
            assert container.current_context() is other
        assert container.current_context() is mine
        del lease


def test_what_is_released_cannot_be_found() -> None:
    with Network(1, 0) as network:
        container = network.workers[0].container
        lease = container.new_context()
        context_id = lease._context_id()
        container.is_valid_context(context_id)
        container.release_context(context_id)
        for look in (container.retrieve_context, container.is_valid_context, container.release_context):
            with pytest.raises(AutogradContextError, match=f"Could not find autograd context with id: {context_id}"):
                look(context_id)
        assert lease._send_functions() == {}


def test_a_released_context_is_cleaned_up_wherever_it_has_spread() -> None:
    with Network(3, 0) as network:
        lease = spread(network)
        context_id = lease._context_id()
        assert contexts_of(network) == ["1", "1", "1"]
        assert network.workers[1].container.retrieve_context(context_id)._known_worker_ids() == {0, 2}
        network.workers[0].container.release_context(context_id)
        assert contexts_of(network) == ["0", "0", "0"]


def test_any_worker_may_release_a_context() -> None:
    with Network(3, 0) as network:
        lease = spread(network)
        network.workers[2].container.release_context(lease._context_id())
        assert contexts_of(network) == ["0", "0", "0"]


def test_a_dropped_lease_ends_the_context_everywhere() -> None:
    """A `with` object that is forgotten without leaving the block."""
    with Network(3, 0) as network:
        lease = spread(network)
        context_id = lease._context_id()
        remains = weakref.ref(lease.context)
        network.settle()
        del lease
        gc.collect()
        assert remains() is None
        assert network.workers[0].container.find_context(context_id) is None
        assert network.workers[0].container.current_context_or_none() is None
        network.workers[0].container.collect()
        assert contexts_of(network) == ["0", "0", "0"]


def test_a_released_lease_tells_nobody_again_when_it_is_dropped() -> None:
    cleanups: list[WorkerId] = []

    def watch(call: Call) -> None:
        if call.message.type is MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ:
            cleanups.append(call.to)

    with Network(3, 0, watch) as network:
        lease = spread(network)
        network.workers[0].container.release_context(lease._context_id())
        network.settle()
        before = len(cleanups)
        del lease
        gc.collect()
        network.workers[0].container.collect()
        assert contexts_of(network) == ["0", "0", "0"]
        assert len(cleanups) == before


def test_a_message_that_comes_after_the_cleanup_does_not_bring_the_context_back() -> None:
    with Network(3, 0) as network:
        container = network.workers[1].container
        container.on_cleanup(77, WorkerId(0))
        late = container.get_or_create_context(77)
        assert container.get_or_create_context(77) is not late
        with pytest.raises(AutogradContextError, match="Could not find"):
            container.retrieve_context(77)
        with container.activate(late):
            network.workers[1].call(2, lambda _, t: [t], torch.ones(1)).result(WAIT)
        network.settle()
        assert contexts_of(network) == ["0", "0", "1"]
        del late
        gc.collect()
        container.collect()
        assert contexts_of(network) == ["0", "0", "0"]


def test_a_late_message_never_brings_back_a_context_that_was_opened_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqagent.autograd.container._REMEMBERED_RELEASES", 0)
    with Network(1, 0) as network:
        container = network.workers[0].container
        context_id = container.new_context()._context_id()
        gc.collect()
        container.get_or_create_context(context_id)
        assert contexts_of(network) == ["0"]


def test_the_same_id_gives_the_same_context() -> None:
    with Network(1, 0) as network:
        container = network.workers[0].container
        assert container.get_or_create_context(1 << 48) is container.get_or_create_context(1 << 48)
        assert container.contexts() == [container.retrieve_context(1 << 48)]


def test_contexts_of_a_dead_opener_go_and_those_of_its_next_life_are_new() -> None:
    with Network(2, 0) as network:
        container = network.workers[1].container
        for context_id in (0, 1, 5 << 48):
            container.get_or_create_context(context_id)
        container.on_cleanup(1, WorkerId(0))
        container.release_opened_by(WorkerId(0), ShutdownError("worker 0 has left"))
        assert [context.context_id for context in container.contexts()] == [5 << 48]
        again = container.get_or_create_context(1)
        assert container.retrieve_context(1) is again


def test_closing_ends_all_contexts_and_tells_nobody() -> None:
    with Network(3, 0) as network:
        lease = spread(network)
        network.workers[0].container.close(ShutdownError("over"))
        assert contexts_of(network) == ["0", "1", "1"]
        network.workers[1].container.release_context(lease._context_id())


def test_released_ids_are_remembered_within_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("zmqagent.autograd.container._REMEMBERED_RELEASES", 3)
    with Network(2, 0) as network:
        container = network.workers[1].container
        for context_id in range(10):
            container.on_cleanup(context_id, WorkerId(0))
        assert list(container._released) == [7, 8, 9]


def test_ids_begin_after_those_of_a_former_life() -> None:
    with Network(2, 0) as network:
        container = DistAutogradContainer(network.workers[1], first_local_id=7 << 32)
        lease = container.new_context()
        assert lease._context_id() == (1 << 48) + (7 << 32)
        assert lease.context.attach_outgoing(WorkerId(0), []).message_id == (1 << 48) + (7 << 32)


def test_a_cleanup_goes_to_nobody_who_knows_and_a_worker_never_tells_itself() -> None:
    cleanups: list[tuple[WorkerId, WorkerId]] = []

    def watch(call: Call) -> None:
        if call.message.type is MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ:
            cleanups.append((call.source, call.to))

    with Network(3, 0, watch) as network:
        lease = spread(network)
        lease.context.attach_outgoing(WorkerId(0), ())
        network.workers[0].container.release_context(lease._context_id())
        network.settle()
        assert contexts_of(network) == ["0", "0", "0"]
        assert cleanups == [(0, 1), (1, 2)]
