"""Device maps: which device of the callee a tensor on a device of the caller goes to.

Pure functions over plain data: what the devices of each worker are comes in as arguments. The rules and the texts are those of
``torch/distributed/rpc/backend_registry.py``, for any type of accelerator.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from zmqagent.exceptions import DeviceMapError, InvalidOptionError, ProtocolError

__all__ = [
    "DeviceMap",
    "DeviceMaps",
    "DeviceName",
    "Target",
    "WorkerDevices",
    "cpu_only",
    "reverse_map",
    "target_device",
    "validate",
]


@dataclass(frozen=True, slots=True, repr=False)
class DeviceName:
    """A device by its type and number. Unlike a `torch.device` it may be of a type that torch does not know in this process, as
    those of other workers may be that come with a package of their own."""

    type: str
    index: int | None = None

    def __str__(self) -> str:
        return self.type if self.index is None else f"{self.type}:{self.index}"

    def __repr__(self) -> str:
        # As torch's texts show devices.
        return f"device(type={self.type!r})" if self.index is None else f"device(type={self.type!r}, index={self.index})"

    @classmethod
    def of(cls, device: torch.device) -> DeviceName:
        """The name of ``device``."""
        return cls(device.type, device.index)

    @classmethod
    def from_text(cls, text: str) -> DeviceName:
        """What `str` was called on. Raises ValueError if that was no device."""
        kind, colon, number = text.partition(":")
        if not kind:
            raise ValueError(f"{text!r:.100} is no device")
        return cls(kind, int(number) if colon else None)


DeviceMap = Mapping[torch.device, torch.device | DeviceName]
"""From devices of this worker to those of another."""

DeviceMaps = Mapping[str, Mapping[torch.device, torch.device]]
"""A worker's own device maps, from its devices to the callee's, by the callee's name."""

Target = Callable[[torch.device], str]
"""Names, for the device of a tensor that is to travel, the one it is to arrive on: as text, since it is another worker's."""

_CPU = DeviceName("cpu")


class WorkerDevices(NamedTuple):
    """What a worker tells the others of its devices: how many accelerators it has, and of which type ("" if none)."""

    accelerator_count: int
    maps: Mapping[str, Mapping[DeviceName, DeviceName]]
    devices: Sequence[DeviceName]
    accelerator_type: str = ""

    @classmethod
    def of(
        cls, accelerator_count: int, maps: DeviceMaps, devices: Sequence[torch.device], accelerator_type: str = ""
    ) -> WorkerDevices:
        """Of this worker, with devices as torch knows them here."""
        name = DeviceName.of
        names = {to: {name(here): name(there) for here, there in map_.items()} for to, map_ in maps.items()}
        return cls(accelerator_count, names, list(map(name, devices)), accelerator_type)

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
            ProtocolError: something else wrote the text.
        """
        if not text:
            return cls(0, {}, [])
        try:
            count, maps, devices, kind = json.loads(text)
            name = DeviceName.from_text
            names = {str(to): {name(here): name(there) for here, there in map_.items()} for to, map_ in maps.items()}
            return cls(int(count), names, list(map(name, devices)), str(kind))
        except (ValueError, TypeError, AttributeError, OverflowError, RecursionError) as error:
            raise ProtocolError(
                f"a worker tells of its devices in a form that this version of zmqagent does not know: {error}"
            ) from error


def cpu_only(device: torch.device) -> str:
    """`target_device` without any map.

    Raises:
        DeviceMapError: ``device`` is not the CPU.
    """
    return target_device({}, "the callee", "Request", device)


def target_device(device_map: DeviceMap, destination: str, direction: str, device: torch.device) -> str:
    """The name of the device that a tensor on ``device`` goes to; ``direction`` is "Request" or "Response".

    Raises:
        DeviceMapError: no map names the device; tensors on the CPU stay there without one.
    """
    target = device_map.get(device)
    if target is not None:
        return str(target)
    if device.type == "cpu":
        return "cpu"
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
    name: str, worker: WorkerDevices, target_name: str, target: WorkerDevices | None, device_map: Mapping[DeviceName, DeviceName]
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


def _exist(devices: Sequence[DeviceName], worker: WorkerDevices) -> bool:
    return all(
        device.type == "cpu"
        or (
            device.type == (worker.accelerator_type or device.type)
            and device.index is not None
            and 0 <= device.index < worker.accelerator_count
        )
        for device in devices
    )


def reverse_map(caller: WorkerDevices, name: str) -> DeviceMap:
    """How the answers of this worker, ``name``, go back to ``caller``; empty if that has no map for it."""
    return {torch.device(str(there)): here for here, there in caller.maps.get(name, {}).items()}
