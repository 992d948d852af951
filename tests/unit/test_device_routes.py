"""`zmqagent.agent.device_routes`: which devices the futures of a worker carry."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from tests.support.late_accelerator import LateAccelerator
from zmqagent.agent.device_routes import DeviceRoutes
from zmqagent.agent.devices import DeviceMaps, WorkerDevices
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

CPU = torch.device("cpu")
GPU = [torch.device("cuda", index) for index in range(4)]


def peer(name: str, maps: Mapping[str, Mapping[torch.device, torch.device]]) -> PeerRecord:
    return PeerRecord(name, WorkerId(1), 10, "host", 1, (), devices=WorkerDevices.of(4, maps, [], "cuda").to_text())


MAPS: DeviceMaps = {"b": {GPU[2]: GPU[0], CPU: GPU[1]}, "c": {GPU[2]: CPU}}


def test_futures_carry_what_the_maps_of_the_group_name_of_this_worker() -> None:
    routes = DeviceRoutes("a", MAPS, accelerator=LateAccelerator())
    assert routes.handed_over() == (GPU[2],)
    routes.take_in(peer("b", {"a": {GPU[3]: GPU[1], GPU[0]: CPU}, "c": {GPU[0]: GPU[0]}}))
    routes.take_in(peer("c", {"a": {GPU[0]: GPU[1]}}))
    assert routes.handed_over() == (GPU[2], GPU[1])


def test_a_list_of_devices_is_what_futures_carry() -> None:
    routes = DeviceRoutes("a", MAPS, [GPU[3], GPU[2]], LateAccelerator())
    routes.take_in(peer("b", {"a": {GPU[3]: GPU[3]}}))
    assert routes.handed_over() == (GPU[3], GPU[2])


def test_futures_carry_no_devices_that_they_cannot_hand_over() -> None:
    routes = DeviceRoutes("a", MAPS, accelerator=LateAccelerator(hands_over=False))
    routes.take_in(peer("b", {"a": {GPU[3]: GPU[1]}}))
    assert routes.handed_over() == ()
