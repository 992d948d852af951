"""Device maps between processes that have a fake accelerator: where tensors, answers, RRefs' values and gradients arrive."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import Tensor, nn
from torch.distributed.optim import DistributedOptimizer

import zmqagent
from tests.integration.harness import run_ranks, worker
from tests.integration.test_dynamic_groups import Stage, join
from tests.support import fake_device
from zmqagent.exceptions import DeviceMapError, InvalidOptionError, UnreadableCallError

Maps = dict[str, dict[Any, Any]]


def lead(function: Callable[[], Any], maps: Sequence[Maps]) -> Any:
    """What ``function()`` returned on worker0 of a group whose workers have these device maps, and four fake devices each."""
    return run_ranks(partial(_lead_or_serve, function, maps), len(maps))[0]


def _lead_or_serve(function: Callable[[], Any], maps: Sequence[Maps], rank: int, meeting_point: str) -> Any:
    fake_device.install()
    with worker(rank, len(maps), meeting_point, device_maps=maps[rank]):
        return function() if rank == 0 else None


def _compute_alone(rank: int, meeting_point: str) -> None:
    fake_device.install()
    x = torch.arange(6.0).to("fake:2")
    y = x.view(2, 3).t() + 1
    assert (y.device, y.cpu().tolist()) == (torch.device("fake:2"), [[1.0, 4.0], [2.0, 5.0], [3.0, 6.0]])
    x[0] = 7
    assert x.view(2, 3)[0, 0].item() == 7
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        x + x.to("fake:1")
    weight = torch.ones(2, device="fake:0", requires_grad=True)
    (weight * 3).relu().sum().backward()
    assert weight.grad is not None
    assert (weight.grad.device, weight.grad.tolist()) == (torch.device("fake:0"), [3.0, 3.0])


def test_the_fake_device_computes_and_differentiates_as_the_cpu_does() -> None:
    run_ranks(_compute_alone, 1)


def places(*tensors: Tensor) -> list[str]:
    return [str(tensor.device) for tensor in tensors]


def places_and_back(*tensors: Tensor) -> tuple[list[str], tuple[Tensor, ...]]:
    """Where the tensors arrived, and the tensors."""
    return places(*tensors), tensors


FORTH: list[Maps] = [{"worker1": {0: 1, "fake:1": "fake:0", "fake:2": "cpu", "cpu": 3}}, {}]


def _call_with_tensors() -> None:
    sent = [torch.arange(4.0) + i for i in range(4)]
    here = [sent[0].to("fake:0"), sent[1].to("fake:1"), sent[2].to("fake:2"), sent[3]]
    there, back = rpc.rpc_sync("worker1", places_and_back, args=tuple(here))
    assert there == ["fake:1", "fake:0", "cpu", "fake:3"]
    assert places(*back) == ["fake:0", "fake:1", "fake:2", "cpu"]
    assert [tensor.cpu().tolist() for tensor in back] == [tensor.tolist() for tensor in sent]
    assert places(rpc.rpc_sync("worker1", torch.add, args=(here[0], 1))) == ["fake:0"]
    agent: Any = rpc.api._get_current_rpc_agent()
    assert agent._get_device_map(rpc.get_worker_info("worker1"))[torch.device("cpu")] == torch.device("fake:3")
    assert agent._get_device_map(rpc.get_worker_info("worker0")) == {}
    # The others know the maps as they were at the start.
    agent._get_backend_options().set_device_map("worker1", {3: 2})
    with pytest.raises(DeviceMapError):
        rpc.rpc_sync("worker1", places, args=(made_on("fake:3"),))


def test_requests_follow_the_callers_map_and_answers_its_reverse() -> None:
    lead(_call_with_tensors, FORTH)


def made_on(device: str) -> Tensor:
    return torch.ones(3, device=device)


def to_here_of(rref: Any) -> list[str]:
    return places(rref.to_here())


def _fetch_rrefs() -> None:
    kept = rpc.remote("worker1", made_on, args=("fake:1",))
    assert places(kept.to_here()) == ["fake:0"]
    assert rpc.rpc_sync("worker1", to_here_of, args=(kept,)) == ["fake:1"]
    assert places(rpc.remote("worker1", torch.add, args=(torch.ones(2, device="fake:1"), 1)).to_here()) == ["fake:1"]
    mine = rpc.RRef(torch.ones(2, device="fake:3"))
    # The owner's values follow the map of who fetches them, in reverse.
    assert rpc.rpc_sync("worker1", to_here_of, args=(mine,)) == ["fake:2"]


def test_an_rrefs_value_goes_where_the_map_of_who_fetches_it_says() -> None:
    lead(_fetch_rrefs, [FORTH[0], {"worker0": {2: 3}, "worker1": {1: 1}}])


_noted: list[Tensor] = []


def note_call(tensor: Tensor) -> None:
    _noted.append(tensor)


def calls_noted() -> list[Tensor]:
    return _noted


def _send_without_a_map() -> None:
    text = "Request device mapping is not available for destination worker1, but found tensor on device: fake:3"
    with pytest.raises(DeviceMapError, match=text):
        rpc.rpc_async("worker1", note_call, args=(made_on("fake:3"),))
    with pytest.raises(DeviceMapError, match=text):
        rpc.remote("worker1", note_call, args=(made_on("fake:3"),))
    assert rpc.rpc_sync("worker1", calls_noted) == []
    text = "Response device mapping is not available for destination worker0, but found tensor on device: fake:2"
    with pytest.raises(DeviceMapError, match=text):
        rpc.rpc_sync("worker1", made_on, args=("fake:2",))
    rref = rpc.remote("worker1", made_on, args=("fake:2",))
    with pytest.raises(DeviceMapError, match=text):
        rref.to_here()
    assert places(rpc.rpc_sync("worker1", made_on, args=("fake:1",))) == ["fake:0"]


def test_a_tensor_whose_device_has_no_map_is_refused_with_torchs_text_in_both_directions() -> None:
    lead(_send_without_a_map, FORTH)


def made_requiring_grad(device: str) -> Tensor:
    return made_on(device).requires_grad_()


def _differentiate_after_refusals() -> None:
    weight = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context:
        with pytest.raises(DeviceMapError, match="Request device mapping"):
            rpc.rpc_sync("worker1", torch.mul, args=(weight.to("fake:0"), 3))
        with pytest.raises(DeviceMapError, match="Response device mapping"):
            rpc.rpc_sync("worker1", made_requiring_grad, args=("fake:0",))
        dist_autograd.backward(context, [rpc.rpc_sync("worker1", torch.mul, args=(weight, 3)).sum()])
        assert dist_autograd.get_gradients(context)[weight].tolist() == [3, 3]


def test_a_backward_pass_waits_for_no_gradients_of_what_was_refused() -> None:
    lead(_differentiate_after_refusals, [{}, {}])


class Layer(nn.Module):
    """Computes on one device, and notes where its input was."""

    def __init__(self, device: str, then: Any = None) -> None:
        super().__init__()
        self.linear = nn.Linear(2, 2).to(device)
        self.then = then
        self.seen: list[str] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen += places(x)
        y = self.linear(x)
        return y if self.then is None else self.then.rpc_sync().forward(y)

    def parameter_rrefs(self) -> list[Any]:
        return [rpc.RRef(parameter) for parameter in self.parameters()]

    def gradient_places(self, context: int) -> list[str]:
        gradients = dist_autograd.get_gradients(context)
        return places(*(gradients[parameter] for parameter in self.parameters()))

    def seen_and_places(self) -> tuple[list[str], list[str]]:
        return self.seen, places(*self.parameters())


CHAIN: list[Maps] = [
    {"worker1": {"cpu": 0}},
    {"worker2": {0: "cpu"}},
    {},
]
"""From worker to worker the CPU's tensors go to an accelerator, and those back to the CPU."""


def _train_along_a_chain() -> None:
    last = rpc.remote("worker2", Layer, args=("cpu",))
    middle = rpc.remote("worker1", Layer, args=("fake:0", last))
    parameters = [rref for layer in (middle, last) for rref in layer.rpc_sync().parameter_rrefs()]
    optimizer = DistributedOptimizer(torch.optim.SGD, parameters, lr=0.1)
    x = torch.ones(3, 2, requires_grad=True)
    with dist_autograd.context() as context:
        y = middle.rpc_sync().forward(x)
        dist_autograd.backward(context, [y.sum()])
        optimizer.step(context)
        assert places(y, dist_autograd.get_gradients(context)[x]) == ["cpu", "cpu"]
        assert middle.rpc_sync().gradient_places(context) == ["fake:0", "fake:0"]
        assert last.rpc_sync().gradient_places(context) == ["cpu", "cpu"]
    assert middle.rpc_sync().seen_and_places() == (["fake:0"], ["fake:0"] * 2)
    assert last.rpc_sync().seen_and_places() == (["cpu"], ["cpu"] * 2)


def test_gradients_go_back_along_a_chain_of_maps_and_end_where_the_parameters_are() -> None:
    lead(_train_along_a_chain, CHAIN)


def pass_on(*tensors: Tensor) -> tuple[list[list[str]], tuple[Tensor, ...]]:
    """Sends the tensors to worker2 and back: where they were here, there, and here again."""
    there, back = rpc.rpc_sync("worker2", places_and_back, args=tensors)
    return [places(*tensors), there, places(*back)], back


def _send_along_a_chain() -> None:
    sent = (made_on("fake:0"), made_on("fake:3"), made_on("cpu"))
    (first, second, again), back = rpc.rpc_sync("worker1", pass_on, args=sent)
    assert first == again == ["fake:1", "cpu", "fake:0"]
    assert second == ["fake:3", "fake:2", "fake:1"]
    assert places(*back) == ["fake:0", "fake:3", "cpu"]


def test_tensors_find_their_way_through_a_chain_of_three_workers_and_back() -> None:
    maps: list[Maps] = [
        {"worker1": {"fake:0": "fake:1", "fake:3": "cpu", "cpu": "fake:0"}},
        {"worker2": {"fake:1": "fake:3", "cpu": "fake:2", "fake:0": "fake:1"}},
        {},
    ]
    lead(_send_along_a_chain, maps)


def add_both(a: Tensor, b: Tensor) -> Tensor:
    assert places(a, b) == ["cpu", "cpu"]
    return a * 2 + b * 3


def _differentiate_two_that_meet() -> None:
    a, b = made_on("fake:0").requires_grad_(), made_on("cpu").requires_grad_()
    with dist_autograd.context() as context:
        dist_autograd.backward(context, [rpc.rpc_sync("worker1", add_both, args=(a, b)).sum()])
        gradients = dist_autograd.get_gradients(context)
        assert places(gradients[a], gradients[b]) == ["fake:0", "cpu"]
        assert (gradients[a].tolist(), gradients[b].tolist()) == ([2] * 3, [3] * 3)


def test_gradients_part_again_where_two_devices_led_to_one() -> None:
    lead(_differentiate_two_that_meet, [{"worker1": {0: "cpu"}}, {}])


def _differentiate_in_steps() -> None:
    weight = torch.ones(2, device="fake:0", requires_grad=True)
    with dist_autograd.context() as context:
        doubled = weight * 2
        far = rpc.rpc_sync("worker1", torch.mul, args=(doubled, 3))
        # What runs before the gradients of `doubled` come back ends at a node that waits for them.
        dist_autograd.backward(context, [(far + doubled).sum()])
        gradient = dist_autograd.get_gradients(context)[weight]
        assert (places(gradient), gradient.tolist()) == (["fake:0"], [8, 8])


def test_a_graph_on_an_accelerator_runs_in_stages() -> None:
    lead(_differentiate_in_steps, [{"worker1": {0: 0}}, {}])


def _differentiate_without_a_way_back() -> None:
    weight = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context:
        far = rpc.rpc_sync("worker1", torch.mul, args=(weight, 3))
        near = far.to("fake:0")
        dist_autograd.backward(context, [near.sum()])
        assert dist_autograd.get_gradients(context)[weight].tolist() == [3, 3]


def test_what_moves_within_a_worker_needs_no_map() -> None:
    lead(_differentiate_without_a_way_back, [{}, {}])


def _let_no_copy_through(source: Tensor, destination: Tensor) -> None:
    raise RuntimeError("the fake accelerator is out of memory")


def have_no_memory() -> None:
    fake_device.on_copy(_let_no_copy_through)


def _ask_what_has_no_memory() -> None:
    rpc.rpc_sync("worker1", have_no_memory)
    text = "a tensor cannot be built from what arrived: the fake accelerator is out of memory"
    with pytest.raises(UnreadableCallError, match=text):
        rpc.rpc_sync("worker1", places, args=(made_on("fake:0"),))
    with pytest.raises(UnreadableCallError, match=text):
        rpc.remote("worker1", places, args=(made_on("fake:0"),)).to_here(timeout=0)
    with dist_autograd.context(), pytest.raises(UnreadableCallError, match=text):
        rpc.remote("worker1", torch.add, args=(made_on("fake:0"), 1)).to_here(timeout=0)
    rref = rpc.remote("worker1", places, args=(made_on("fake:0"),))
    with pytest.raises(UnreadableCallError, match=text):
        rpc.rpc_sync("worker1", to_here_of, args=(rref,))
    assert rpc.rpc_sync("worker1", places, args=(made_on("cpu"),)) == ["cpu"]


def test_an_rref_whose_call_found_no_memory_on_the_device_has_that_error() -> None:
    lead(_ask_what_has_no_memory, [{"worker1": {0: 0}}, {}])


def _start_with(rank: int, meeting_point: str, maps: Sequence[Maps], devices: Sequence[list[Any]]) -> str:
    fake_device.install(2)
    options = zmqagent.ZmqRpcBackendOptions(init_method=meeting_point, device_maps=maps[rank], devices=devices[rank])
    with pytest.raises(InvalidOptionError) as caught:
        rpc.init_rpc(
            f"worker{rank}",
            backend=rpc.BackendType.ZMQ,  # type: ignore[attr-defined]
            rank=rank,
            world_size=len(maps),
            rpc_backend_options=options,
        )
    return str(caught.value)


@pytest.mark.parametrize(
    ("maps", "devices", "text"),
    [
        (
            [{"worker1": {0: 2}}, {}],
            [[], []],
            "Node worker0 has target devices with invalid indices in its device map for worker1",
        ),
        (
            [{}, {"worker0": {3: 0}}],
            [[], []],
            "Node worker1 has source devices with invalid indices in its device map for worker0",
        ),
        ([{}, {"nobody": {0: 0}}], [[], []], "Node worker1 has invalid target node names in its device maps"),
        ([{}, {}], [[0, 0], []], "Node worker0 has duplicated devices"),
        ([{"worker1": {0: 1}}, {}], [[], [0]], "Node worker0 has unexpected target devices in its device map for worker1"),
        ([{"worker1": {0: "cuda:0"}}, {}], [[], []], "Node worker0 has target devices with invalid indices"),
    ],
)
def test_maps_that_do_not_fit_are_refused_with_torchs_text_on_every_worker(
    maps: list[Maps], devices: list[list[Any]], text: str
) -> None:
    for told in run_ranks(_start_with, 2, maps, devices):
        assert text in told


def _start_without_the_type(rank: int, meeting_point: str) -> str:
    """Only worker0 has fake devices, and says that worker1 has one."""
    if rank == 0:
        fake_device.install(2)
    maps: Maps = {"worker1": {0: "fake:1"}} if rank == 0 else {}
    with pytest.raises(InvalidOptionError) as caught, worker(rank, 3, meeting_point, device_maps=maps):
        pass
    return str(caught.value)


def test_a_map_to_a_type_of_device_that_the_callee_does_not_know_is_refused_on_every_worker() -> None:
    told = run_ranks(_start_without_the_type, 3)
    assert "Node worker0 has target devices with invalid indices in its device map for worker1" in told[0]
    assert "device count = 0" in told[0]
    assert told == [told[0]] * 3


def _lead_those_without_the_type(rank: int, meeting_point: str) -> None:
    if rank == 0:
        fake_device.install(2)
    with worker(rank, 2, meeting_point, device_maps={"worker1": {0: "cpu"}} if rank == 0 else {}):
        if rank == 0:
            weight = made_on("fake:0").requires_grad_()
            there, back = rpc.rpc_sync("worker1", places_and_back, args=(weight,))
            assert (there, places(*back)) == (["cpu"], ["fake:0"])
            with dist_autograd.context() as context:
                dist_autograd.backward(context, [rpc.rpc_sync("worker1", torch.mul, args=(weight, 3)).sum()])
                gradient = dist_autograd.get_gradients(context)[weight]
                assert (places(gradient), gradient.tolist()) == (["fake:0"], [3] * 3)


def test_a_worker_serves_callers_whose_type_of_device_it_does_not_know() -> None:
    run_ranks(_lead_those_without_the_type, 2)


def _join_without_the_type(rank: int, meeting_point: str) -> None:
    stage = Stage(meeting_point)
    if rank == 0:
        fake_device.install(2)
        join(0, meeting_point, device_maps={"worker1": {0: "cpu"}, "worker2": {0: 1}})
        stage.reach("founded")
        stage.wait("joined", "refused")
        assert places(rpc.rpc_sync("worker1", torch.add, args=(made_on("fake:0"), 1))) == ["fake:0"]
        stage.reach("called")
    elif rank == 1:
        stage.wait("founded")
        join(1, meeting_point)
        stage.reach("joined")
        stage.wait("called")
    else:
        stage.wait("joined")
        with pytest.raises(InvalidOptionError, match="Node worker0 has target devices with invalid indices"):
            join(2, meeting_point)
        fake_device.install(2)
        # Of the members, worker1 has no such device, and does not know the type.
        with pytest.raises(InvalidOptionError, match="Node worker3 has target devices with invalid indices"):
            join(3, meeting_point, device_maps={"worker1": {0: 0}})
        stage.reach("refused")
        return
    rpc.shutdown()


def test_a_worker_that_joins_is_checked_also_by_those_who_do_not_know_its_type_of_device() -> None:
    run_ranks(_join_without_the_type, 3)


def _join_with_a_map(rank: int, meeting_point: str) -> None:
    fake_device.install(2)
    stage = Stage(meeting_point)
    if rank == 0:
        join(0, meeting_point, device_maps={"worker1": {1: 0}, "worker2": {0: 2}})
        stage.reach("founded")
        # No join is refused while somebody serves: the founder stays until both have tried.
        stage.wait("called", "refused")
    elif rank == 1:
        stage.wait("founded")
        join(1, meeting_point, device_maps={"worker0": {0: 1, "cpu": 0}, "nobody": {0: 1}})
        there, back = rpc.rpc_sync("worker0", places_and_back, args=(made_on("fake:0"), made_on("cpu")))
        assert (there, places(*back)) == (["fake:1", "fake:0"], ["fake:0", "cpu"])
        assert rpc.rpc_sync("worker0", places_at_worker1) == ["fake:0"]
        stage.reach("called")
    else:
        stage.wait("called")
        with pytest.raises(
            InvalidOptionError, match="Node worker0 has target devices with invalid indices in its device map for"
        ):
            join(2, meeting_point)
        with pytest.raises(InvalidOptionError, match="Node worker3 has source devices with invalid indices"):
            join(3, meeting_point, device_maps={"worker0": {2: 0}})
        stage.reach("refused")
        return
    rpc.shutdown()


def places_at_worker1() -> list[str]:
    """Where a tensor arrives that this worker sends to the one that has joined."""
    return rpc.rpc_sync("worker1", places, args=(made_on("fake:1"),))


def test_a_worker_that_joins_follows_its_map_and_is_refused_if_one_does_not_fit() -> None:
    run_ranks(_join_with_a_map, 3)
