"""`zmqagent.agent.devices`: device maps of a whole group are checked against each other, with torch's texts."""

from __future__ import annotations

import re
from functools import partial

import pytest
import torch

from zmqagent.agent.devices import DeviceName, WorkerDevices, cpu_only, reverse_map, target_device, validate
from zmqagent.exceptions import DeviceMapError, InvalidOptionError, ProtocolError

CPU = torch.device("cpu")
GPU = [torch.device("cuda", index) for index in range(4)]


def test_cpu_tensors_stay_on_the_cpu_without_a_map() -> None:
    assert cpu_only(CPU) == "cpu"
    assert target_device({GPU[0]: GPU[1]}, "b", "Request", CPU) == "cpu"


def test_a_map_names_the_target_of_every_device() -> None:
    target = partial(target_device, {GPU[0]: GPU[1], CPU: GPU[2]}, "b", "Request")
    assert target(GPU[0]) == "cuda:1"
    assert target(CPU) == "cuda:2"


def test_a_device_without_a_map_is_refused_with_torchs_text() -> None:
    text = "Response device mapping is not available for destination b, but found tensor on device: cuda:3"
    with pytest.raises(DeviceMapError, match=re.escape(text)):
        target_device({GPU[0]: GPU[1]}, "b", "Response", GPU[3])
    with pytest.raises(DeviceMapError, match="Request device mapping is not available"):
        cpu_only(GPU[0])


GOOD = {
    "a": WorkerDevices.of(2, {"b": {GPU[0]: GPU[1], GPU[1]: GPU[0]}, "a": {CPU: CPU}}, []),
    "b": WorkerDevices.of(2, {"a": {GPU[1]: CPU}}, [GPU[0], GPU[1]]),
    "c": WorkerDevices.of(0, {}, []),
}


def test_maps_that_fit_are_accepted() -> None:
    validate(GOOD)
    validate({})
    # A list of accelerators says nothing of the CPU, which every worker has.
    validate({"a": WorkerDevices.of(2, {"b": {CPU: GPU[0]}}, [GPU[0]]), "b": WorkerDevices.of(2, {"a": {GPU[0]: CPU}}, [GPU[0]])})


@pytest.mark.parametrize(
    ("faulty", "text"),
    [
        (WorkerDevices.of(2, {}, [GPU[0], GPU[0]]), "Node a has duplicated devices\ndevices = [device("),
        (WorkerDevices.of(2, {}, [GPU[2]]), "Node a has devices with invalid indices\ndevices = "),
        (WorkerDevices.of(2, {}, [torch.device("cuda")]), "Node a has devices with invalid indices"),
        (WorkerDevices.of(2, {}, [GPU[0]], "xpu"), "Node a has devices with invalid indices"),
        (WorkerDevices.of(2, {"z": {}}, []), "Node a has invalid target node names in its device maps\ndevice maps = ['z']"),
        (
            WorkerDevices.of(2, {"b": {GPU[0]: GPU[1], GPU[1]: GPU[1]}}, []),
            "Node a has duplicated target devices in its device map for b",
        ),
        (WorkerDevices.of(2, {"b": {GPU[1]: GPU[0]}}, [GPU[0]]), "Node a has unexpected source devices in its device map for b"),
        (
            WorkerDevices.of(2, {"b": {GPU[3]: GPU[0]}}, []),
            "Node a has source devices with invalid indices in its device map for b\ndevice map = ",
        ),
        (WorkerDevices.of(2, {"b": {GPU[0]: GPU[2]}}, []), "Node a has unexpected target devices in its device map for b"),
        (
            WorkerDevices.of(2, {"c": {GPU[0]: GPU[0]}}, []),
            "Node a has target devices with invalid indices in its device map for c",
        ),
    ],
)
def test_a_map_that_does_not_fit_is_refused_with_torchs_text(faulty: WorkerDevices, text: str) -> None:
    with pytest.raises(InvalidOptionError, match=re.escape(text)) as caught:
        validate(GOOD | {"a": faulty})
    assert isinstance(caught.value, ValueError)


def test_accelerators_of_any_type_are_accepted() -> None:
    xpu = torch.device("xpu:0")
    validate({"a": WorkerDevices.of(1, {"a": {xpu: xpu}}, [], "xpu")})


def test_a_map_may_lead_from_one_type_of_accelerator_to_another() -> None:
    xpu = torch.device("xpu:0")
    workers = {"a": WorkerDevices.of(1, {"b": {xpu: GPU[0]}}, [], "xpu"), "b": WorkerDevices.of(1, {}, [], "cuda")}
    validate(workers)
    assert reverse_map(workers["a"], "b") == {GPU[0]: DeviceName("xpu", 0)}
    with pytest.raises(InvalidOptionError, match="target devices with invalid indices"):
        validate(workers | {"b": WorkerDevices.of(1, {}, [], "xpu")})


def test_a_map_in_a_dynamic_group_may_name_a_worker_that_is_yet_to_come() -> None:
    workers = {"a": WorkerDevices.of(1, {"later": {GPU[0]: GPU[3]}}, [])}
    validate(workers, is_static_group=False)
    with pytest.raises(InvalidOptionError, match="invalid target node names"):
        validate(workers)


def test_answers_go_back_the_way_the_requests_came() -> None:
    assert reverse_map(GOOD["a"], "b") == {GPU[1]: DeviceName("cuda", 0), GPU[0]: DeviceName("cuda", 1)}
    assert reverse_map(GOOD["b"], "a") == {CPU: DeviceName("cuda", 1)}
    assert reverse_map(GOOD["c"], "a") == {}


@pytest.mark.parametrize("worker", GOOD.values())
def test_what_a_worker_tells_of_its_devices_arrives_as_it_was(worker: WorkerDevices) -> None:
    assert WorkerDevices.from_text(worker.to_text()) == worker


def test_a_worker_without_devices_tells_nothing() -> None:
    assert WorkerDevices.of(0, {}, []).to_text() == ""


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[1]",
        "7",
        '[1, {"b": 2}, [], ""]',
        '[1, {}, [3.5], ""]',
        '["many", {}, [], ""]',
        "[" * 9999,
        '[1, {}, ["cuda:x"], ""]',
        '[1, {}, [""], ""]',
    ],
)
def test_words_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(ProtocolError, match="a worker tells of"):
        WorkerDevices.from_text(text)


QUANTUM = WorkerDevices.from_text('[2, {"b": {"quantum:0": "cpu"}}, ["quantum:0", "quantum:1"], "quantum"]')


def test_a_worker_may_have_devices_that_torch_does_not_know_in_this_process() -> None:
    validate({"a": QUANTUM, "b": WorkerDevices.of(2, {}, [], "cuda")})
    assert WorkerDevices.from_text(QUANTUM.to_text()) == QUANTUM
    assert target_device(reverse_map(QUANTUM, "b"), "a", "Response", CPU) == "quantum:0"


def test_maps_to_devices_that_torch_does_not_know_in_this_process_are_checked_as_all_are() -> None:
    text = (
        "Node a has target devices with invalid indices in its device map for b\n"
        "device map = {device(type='quantum', index=0): device(type='quantum', index=1)}\ndevice count = 0"
    )
    faulty = WorkerDevices.from_text('[2, {"b": {"quantum:0": "quantum:1"}}, [], "quantum"]')
    with pytest.raises(InvalidOptionError, match=re.escape(text)):
        validate({"a": faulty, "b": WorkerDevices.of(0, {}, [])})
