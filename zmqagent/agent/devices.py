"""Device maps: which device of the callee a tensor on a device of the caller goes to.

Pure functions over plain data: what the devices of each worker are comes in as arguments. The rules and the texts are those of
``torch/distributed/rpc/backend_registry.py``, for any type of accelerator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from zmqagent.exceptions import DeviceMapError, InvalidOptionError, ProtocolError

__all__ = [
    "DeviceMap",
    "DeviceMaps",
    "Target",
    "WorkerDevices",
    "cpu_only",
    "reverse_map",
    "target_device",
    "validate",
]

DeviceMap = Mapping[torch.device, torch.device]
"""From the caller's devices to the callee's."""

DeviceMaps = Mapping[str, DeviceMap]
"""A caller's device maps by the callee's name."""

Target = Callable[[torch.device], torch.device]
"""Names, for the device of a tensor that is to travel, the one it is to arrive on."""

_CPU = torch.device("cpu")


class WorkerDevices(NamedTuple):
    """What a worker tells the others of its devices: how many accelerators it has, and of which type ("" if none)."""

    accelerator_count: int
    maps: DeviceMaps
    devices: Sequence[torch.device]
    accelerator_type: str = ""

    def to_text(self) -> str:
        """The form in which workers tell each other; empty if there is nothing to tell."""
        if not (self.accelerator_count or self.maps or self.devices):
            return ""
        maps = {to: {str(here): str(there) for here, there in map_.items()} for to, map_ in self.maps.items()}
        return json.dumps([self.accelerator_count, maps, list(map(str, self.devices)), self.accelerator_type])

    @classmethod
    def from_text(cls, text: str) -> WorkerDevices:
        """What `to_text` was called on.

        Raises:
            ProtocolError: something else wrote the text, or it names a type of device that this process does not know.
        """
        if not text:
            return cls(0, {}, [])
        try:
            count, maps, devices, kind = json.loads(text)
            parsed = {str(to): {_parsed(here): _parsed(there) for here, there in map_.items()} for to, map_ in maps.items()}
            return cls(int(count), parsed, [_parsed(device) for device in devices], str(kind))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError(
                f"a worker tells of its devices in a form that this version of zmqagent does not know: {error}"
            ) from error


def _parsed(name: Any) -> torch.device:
    try:
        return torch.device(name)
    except RuntimeError as error:
        raise ProtocolError(
            f"a worker tells of device {name!r:.100}, which torch does not know in this process: import the package that adds "
            "this type of device on all workers whose device maps name it"
        ) from error


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
            if not set(devices) <= {_CPU, *owner.devices}:
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


def reverse_map(caller: WorkerDevices, name: str) -> dict[torch.device, torch.device]:
    """How the answers of worker ``name`` go back to ``caller``, from its devices to the caller's; empty if that has no map."""
    return {there: here for here, there in caller.maps.get(name, {}).items()}
