"""Device maps: which device of the callee a tensor on a device of the caller goes to.

Pure functions over plain data: what the devices of each worker are comes in as arguments. The rules and the texts are those of
``torch/distributed/rpc/backend_registry.py``, for any type of accelerator.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from zmqagent.exceptions import DeviceMapError, InvalidOptionError

__all__ = ["DeviceMap", "DeviceMaps", "WorkerDevices", "cpu_only", "device_list", "reverse_maps", "target_device", "validate"]

DeviceMap = Mapping[torch.device, torch.device]
"""From the caller's devices to the callee's."""

DeviceMaps = Mapping[str, DeviceMap]
"""A caller's device maps by the callee's name."""

_CPU = torch.device("cpu")


class WorkerDevices(NamedTuple):
    """What a worker tells the others of its devices: how many accelerators it has, and of which type ("" if none)."""

    accelerator_count: int
    maps: DeviceMaps
    devices: Sequence[torch.device]
    accelerator_type: str = ""


def cpu_only(device: torch.device) -> torch.device:
    """`target_device` without any map.

    Raises:
        DeviceMapError: ``device`` is not the CPU.
    """
    return target_device({}, "the callee", "Request", device)


def target_device(device_map: DeviceMap, destination: str, direction: str, device: torch.device) -> torch.device:
    """The device that a tensor on ``device`` goes to; ``direction`` is "Request" or "Response".

    Raises:
        DeviceMapError: no map names the device; tensors on the CPU stay there without one.
    """
    target = device_map.get(device)
    if target is not None:
        return target
    if device.type == "cpu":
        return _CPU
    raise DeviceMapError(
        f"tensors travel from CPU to CPU unless a device map says otherwise: {direction} device mapping is not available for "
        f"destination {destination}, but found tensor on device: {device}. Move the tensor to the CPU first, or name its device "
        "with set_device_map on the options of the worker that calls"
    )


def validate(workers: Mapping[str, WorkerDevices], is_static_group: bool = True) -> None:
    """Checks what all workers said of their devices against each other. In a dynamic group a map may name a worker that has not
    joined yet.

    Raises:
        InvalidOptionError: names the worker at fault and what it said.
    """
    for name, worker in workers.items():
        _validate_devices(name, worker)
    for name, worker in workers.items():
        if is_static_group and not worker.maps.keys() <= workers.keys():
            raise InvalidOptionError(
                f"Node {name} has invalid target node names in its device maps\n"
                f"device maps = {list(worker.maps)}\nnode names = {list(workers)}"
            )
        for target_name, device_map in worker.maps.items():
            _validate_map(name, worker, target_name, workers.get(target_name), device_map)


def _validate_devices(name: str, worker: WorkerDevices) -> None:
    devices = worker.devices
    if len(set(devices)) != len(devices):
        raise InvalidOptionError(f"Node {name} has duplicated devices\ndevices = {list(devices)}")
    if not _exist(devices, worker):
        raise InvalidOptionError(
            f"Node {name} has devices with invalid indices\ndevices = {list(devices)}\ndevice count = {worker.accelerator_count}"
        )


def _validate_map(
    name: str, worker: WorkerDevices, target_name: str, target: WorkerDevices | None, device_map: DeviceMap
) -> None:
    told = f"in its device map for {target_name}\ndevice map = {dict(device_map)}"
    if len(set(device_map.values())) != len(device_map):
        raise InvalidOptionError(f"Node {name} has duplicated target devices {told}")
    ends = [("source", worker, list(device_map.keys()))]
    if target is not None:
        ends.append(("target", target, list(device_map.values())))
    for end, owner, devices in ends:
        if owner.devices:
            if not set(devices) <= set(owner.devices):
                raise InvalidOptionError(f"Node {name} has unexpected {end} devices {told}\ndevices = {list(owner.devices)}")
        elif not _exist(devices, owner):
            raise InvalidOptionError(
                f"Node {name} has {end} devices with invalid indices {told}\ndevice count = {owner.accelerator_count}"
            )


def _exist(devices: Sequence[torch.device], worker: WorkerDevices) -> bool:
    return all(
        device.type == "cpu"
        or (
            device.type == (worker.accelerator_type or device.type)
            and device.index is not None
            and 0 <= device.index < worker.accelerator_count
        )
        for device in devices
    )


def reverse_maps(name: str, workers: Mapping[str, WorkerDevices]) -> dict[str, dict[torch.device, torch.device]]:
    """By caller: how the answers of worker ``name`` go back, from its devices to the caller's."""
    return {
        caller: {there: here for here, there in worker.maps[name].items()}
        for caller, worker in workers.items()
        if name in worker.maps
    }


def device_list(devices: Sequence[torch.device], maps: DeviceMaps, reverse: DeviceMaps) -> list[torch.device]:
    """The accelerators a worker uses, sorted: those it was told, or else all that its maps in both directions name."""
    used = set(devices)
    if not used:
        used = {device for device_map in (*maps.values(), *reverse.values()) for device in device_map}
        used.discard(_CPU)
    return sorted(used, key=lambda device: (device.type, device.index or 0))
