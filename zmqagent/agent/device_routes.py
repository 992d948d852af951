"""Where the tensors in one worker's messages are to arrive.

Requests, and the gradients of answers, follow this worker's map for the peer. Answers, and the gradients of requests, follow the
reverse of the peer's map for this worker.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache, partial

import torch

from zmqagent.agent.accelerator import ACCELERATOR, Accelerator
from zmqagent.agent.devices import DeviceMap, DeviceMaps, Target, WorkerDevices, reverse_map, target_device
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.transport.base import PeerRecord

__all__ = ["DeviceRoutes", "devices_of_this_worker"]

_NO_MAP: Mapping[torch.device, torch.device] = {}


def devices_of_this_worker(options: ZmqRpcBackendOptions) -> WorkerDevices:
    """What a worker with these ``options`` tells the others of its devices."""
    accelerator = torch.accelerator.current_accelerator()
    kind = "" if accelerator is None else accelerator.type
    return WorkerDevices.of(torch.accelerator.device_count(), options.device_maps, options.devices, kind)


class DeviceRoutes:
    """The device maps that one worker follows.

    Args:
        name: of this worker.
        maps: its own, by callee. The others know them as they are now: they must not change.
        devices: its accelerators that maps may name; by default those that they do name.
        accelerator: tells which devices can be handed over.
    """

    def __init__(
        self,
        name: str,
        maps: DeviceMaps,
        devices: Sequence[torch.device] = (),
        accelerator: Accelerator = ACCELERATOR,
    ) -> None:
        self._name = name
        self._maps = maps
        self._accelerator = accelerator
        # In order, without doubles. It only grows, by single steps of the interpreter, so that no lock is needed.
        self._handed_over: dict[torch.device, None] = {}
        self._add([*devices, *(device for device_map in maps.values() for device in device_map)])

    def take_in(self, record: PeerRecord) -> None:
        """Notes which of this worker's devices a member of the group, which may be this worker, has in its maps."""
        self._add(_map_back(record.devices, self._name))

    def _add(self, devices: Iterable[torch.device]) -> None:
        for device in devices:
            if device.type != "cpu" and self._accelerator.hands_over(device):
                self._handed_over[device] = None

    def handed_over(self) -> Sequence[torch.device]:
        """The accelerators of this worker that messages bring tensors to, as far as futures can carry them: all that it was
        given, or that the maps of the group name."""
        return tuple(self._handed_over)

    def map_to(self, name: str) -> Mapping[torch.device, torch.device]:
        """From this worker's devices to those of worker ``name``, for what this one asks it."""
        return self._maps.get(name, _NO_MAP)

    def map_back(self, caller: PeerRecord) -> DeviceMap:
        """From this worker's devices to those of ``caller``, for what that asked this one."""
        return _map_back(caller.devices, self._name)

    def of_request(self, callee: PeerRecord, device_map: DeviceMap | None) -> Target:
        """Where a tensor of a request goes; ``device_map`` is to be followed in place of `map_to`, if given."""
        chosen: DeviceMap = self.map_to(callee.name) if device_map is None else device_map
        return partial(target_device, chosen, callee.name, "Request")

    def of_answer(self, caller: PeerRecord) -> Target:
        """Where a tensor of an answer goes."""
        return partial(target_device, self.map_back(caller), caller.name, "Response")


@lru_cache(maxsize=1024)
def _map_back(devices: str, name: str) -> DeviceMap:
    return reverse_map(WorkerDevices.from_text(devices), name)
