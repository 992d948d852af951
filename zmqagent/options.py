"""What a user may choose when a worker starts.

A leaf: knows of torch's devices and of nothing in this package but the errors. Values are checked where they are set, so that a
wrong one is reported from the line that holds it; what depends on other workers is checked when they meet (``agent/devices.py``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch.distributed.rpc import RpcBackendOptions
from torch.distributed.rpc.constants import DEFAULT_INIT_METHOD, DEFAULT_NUM_WORKER_THREADS, DEFAULT_RPC_TIMEOUT_SEC

from zmqagent.exceptions import InvalidOptionError, InvalidTypeError

if TYPE_CHECKING:
    from torch._C._distributed_rpc import _TensorPipeRpcBackendOptionsBase
    from typing_extensions import Self

__all__ = ["DeviceLike", "TransportName", "ZmqRpcBackendOptions"]

DeviceLike = int | str | torch.device
"""A device: by its number (of the machine's accelerator), by its name, or as torch has it."""

TransportName = Literal["auto", "local", "ipc", "tcp"]

_TRANSPORTS = ("auto", "local", "ipc", "tcp")


class ZmqRpcBackendOptions(RpcBackendOptions):
    """The options of the ZMQ backend, for ``rpc.init_rpc(..., rpc_backend_options=...)``.

    All are attributes too, and can be set until ``init_rpc`` reads them.

    Args:
        num_worker_threads: how many threads run what other workers ask for. More are added for as long as all of them wait.
        rpc_timeout: seconds until a call that has no timeout of its own fails; 0 for no limit.
        init_method: where the workers meet: ``env://``, ``tcp://host:port?rank=..&world_size=..`` or ``file:///path``.
        device_maps: by callee's name, which of its devices a tensor on one of this worker's devices goes to. Answers and
            gradients come back the reverse way. A tensor on the CPU stays there without a map.
        devices: the accelerators of this worker that the maps of all workers may name; by default all it has.
        transport: how workers reach each other: ``"local"`` (by Unix sockets, on one host), ``"ipc"`` (on one host by ZeroMQ),
            ``"tcp"`` (by ZeroMQ), or ``"auto"``: local to peers on the same host, tcp to others.
        bind_address: the address or name of an interface to listen on; by default the one that reaches the meeting point.
        shared_memory: how many bytes this worker may share at a time with workers on its host, so that large tensors that it
            sends them are copied only once; 0 for none. By default 1 GiB, or an eighth of the memory left if that is less.
            No more is taken than is needed.
        draw_rank: in a dynamic group (``init_rpc`` without ``world_size``), ``init_rpc`` may be called without a rank too: the
            worker gets one that nobody in the group has had.

    Raises:
        InvalidOptionError: a value is out of its range (also a ``ValueError``).
        InvalidTypeError: a value has the wrong type (also a ``TypeError``).
    """

    def __init__(
        self,
        *,
        num_worker_threads: int = DEFAULT_NUM_WORKER_THREADS,
        rpc_timeout: float = DEFAULT_RPC_TIMEOUT_SEC,
        init_method: str = DEFAULT_INIT_METHOD,
        device_maps: Mapping[str, Mapping[DeviceLike, DeviceLike]] | None = None,
        devices: Iterable[DeviceLike] | None = None,
        transport: TransportName = "auto",
        bind_address: str | None = None,
        shared_memory: int | None = None,
        draw_rank: bool = False,
    ) -> None:
        super().__init__(_seconds(rpc_timeout), _text("init_method", init_method))
        self.num_worker_threads = num_worker_threads
        self.rpc_timeout = rpc_timeout
        self.init_method = init_method
        self.device_maps = {} if device_maps is None else device_maps
        self.devices = [] if devices is None else devices
        self.transport = transport
        self.bind_address = bind_address
        self.shared_memory = shared_memory
        self.draw_rank = draw_rank

    @classmethod
    def from_tensorpipe(cls, options: _TensorPipeRpcBackendOptionsBase) -> Self:
        """The same threads, timeout, meeting point, maps and devices; TensorPipe's transports and channels have no counterpart.

        Raises:
            InvalidTypeError, InvalidOptionError: as the constructor.
        """
        return cls(
            num_worker_threads=options.num_worker_threads,
            rpc_timeout=_without_float32_noise(options.rpc_timeout),
            init_method=options.init_method,
            device_maps=cast("Mapping[str, Mapping[DeviceLike, DeviceLike]]", options.device_maps),
            devices=options.devices,
        )

    @property
    def num_worker_threads(self) -> int:
        """How many threads run what other workers ask for."""
        return self._num_worker_threads

    @num_worker_threads.setter
    def num_worker_threads(self, value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int):
            raise InvalidTypeError(f"num_worker_threads must be an int, but got {_described(value)}")
        if value < 1:
            raise InvalidOptionError(f"num_worker_threads must be positive, got {value}")
        self._num_worker_threads = value

    @property
    def rpc_timeout(self) -> float:
        """Seconds until a call that has no timeout of its own fails; 0 for no limit."""
        return self._rpc_timeout

    @rpc_timeout.setter
    def rpc_timeout(self, value: float) -> None:
        # torch's base class holds a float32; what was set is what is read back.
        self._rpc_timeout = _seconds(value)

    @property
    def init_method(self) -> str:
        """Where the workers meet."""
        return self._init_method

    @init_method.setter
    def init_method(self, value: str) -> None:
        self._init_method = _text("init_method", value)

    @property
    def device_maps(self) -> dict[str, dict[torch.device, torch.device]]:
        """By callee's name, from this worker's devices to the callee's. What is read is a copy, as with torch."""
        return {to: dict(device_map) for to, device_map in self._device_maps.items()}

    @device_maps.setter
    def device_maps(self, value: Mapping[str, Mapping[DeviceLike, DeviceLike]]) -> None:
        if not isinstance(value, Mapping):
            raise InvalidTypeError(f"device_maps must map names of workers to device maps, but got {_described(value)}")
        self._device_maps = {_text("a worker's name in device_maps", to): _device_map(map_) for to, map_ in value.items()}

    @property
    def devices(self) -> list[torch.device]:
        """This worker's accelerators; empty: those that the maps name. What is read is a copy, as with torch."""
        return list(self._devices)

    @devices.setter
    def devices(self, value: Iterable[DeviceLike]) -> None:
        self._devices = _device_list(value)

    @property
    def transport(self) -> TransportName:
        """How workers reach each other."""
        return self._transport

    @transport.setter
    def transport(self, value: TransportName) -> None:
        if value not in _TRANSPORTS:
            raise InvalidOptionError(f"transport must be one of {', '.join(map(repr, _TRANSPORTS))}, but got {value!r}")
        self._transport: TransportName = value

    @property
    def bind_address(self) -> str | None:
        """The interface to listen on; None: the one that reaches the meeting point."""
        return self._bind_address

    @bind_address.setter
    def bind_address(self, value: str | None) -> None:
        self._bind_address = None if value is None else _text("bind_address", value)

    @property
    def shared_memory(self) -> int | None:
        """How many bytes this worker may share with workers on its host; None: by the memory there is."""
        return self._shared_memory

    @shared_memory.setter
    def shared_memory(self, value: int | None) -> None:
        if value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise InvalidTypeError(f"shared_memory must be an int (bytes) or None, but got {_described(value)}")
        if value is not None and value < 0:
            raise InvalidOptionError(f"shared_memory must not be negative, got {value}")
        self._shared_memory = value

    @property
    def draw_rank(self) -> bool:
        """Whether a worker of a dynamic group that comes without a rank is given one."""
        return self._draw_rank

    @draw_rank.setter
    def draw_rank(self, value: bool) -> None:
        if not isinstance(value, bool):
            raise InvalidTypeError(f"draw_rank must be a bool, but got {_described(value)}")
        self._draw_rank = value

    def set_device_map(self, to: str, device_map: Mapping[DeviceLike, DeviceLike]) -> None:
        """Adds to the device map for callee ``to``; may be called several times for one callee.

        Raises:
            InvalidOptionError: a device is mapped already, to another one, or two devices go to one.
        """
        known = self._device_maps.get(_text("a worker's name in set_device_map", to), {})
        added = _device_map(device_map)
        for here, there in added.items():
            if known.get(here, there) != there:
                raise InvalidOptionError(
                    f"`set_device_map` only supports 1-to-1 mapping, trying to map {here} to {there} and {known[here]}"
                )
        self._device_maps[to] = _device_map(known | added)

    def set_devices(self, devices: Iterable[DeviceLike]) -> None:
        """Sets this worker's accelerators.

        Raises:
            InvalidOptionError: one of them is no accelerator.
        """
        self.devices = devices

    def __repr__(self) -> str:
        names = (
            *("num_worker_threads", "rpc_timeout", "init_method", "device_maps", "devices"),
            *("transport", "bind_address", "shared_memory", "draw_rank"),
        )
        return f"{type(self).__name__}({', '.join(f'{name}={getattr(self, name)!r}' for name in names)})"


def _described(value: Any) -> str:
    return f"{value!r:.100} ({type(value).__name__})"


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise InvalidTypeError(f"{name} must be a str, but got {_described(value)}")
    if not value:
        raise InvalidOptionError(f"{name} must not be empty")
    return value


def _seconds(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidTypeError(f"rpc_timeout must be a number of seconds, but got {_described(value)}")
    if not (math.isfinite(value) and value >= 0):
        raise InvalidOptionError(f"rpc_timeout must be finite and not negative (0 for no limit), got {value}")
    return float(value)


def _without_float32_noise(value: float) -> float:
    """0.1 for the 0.10000000149011612 that a float32 makes of it."""
    return float(f"{value:.7g}")


def _device(value: Any) -> torch.device:
    if isinstance(value, bool) or not isinstance(value, int | str | torch.device):
        raise InvalidTypeError(f"a device is an int, a str or a torch.device, but got {_described(value)}")
    try:
        if isinstance(value, int):
            accelerator = torch.accelerator.current_accelerator()
            # Scripts count CUDA devices on machines without any, too; whether they exist is checked when the workers meet.
            device = torch.device("cuda" if accelerator is None else accelerator.type, value)
        else:
            device = torch.device(value)
    except (RuntimeError, ValueError) as error:
        raise InvalidOptionError(f"{value!r} is no device: {error}") from error
    number = _number(value)
    if number is not None and (number < 0 or device.index != number):
        # torch keeps the lowest byte of a number: it takes 256 for 0.
        raise InvalidOptionError(f"{value!r} is no device: torch numbers devices from 0 to 127")
    # As tensors have it: they know one CPU, which has no number.
    return torch.device("cpu") if device.type == "cpu" else device


def _number(value: int | str | torch.device) -> int | None:
    if isinstance(value, int):
        return value
    _, colon, number = str(value).partition(":")
    return int(number) if colon else None


def _indexed(device: torch.device) -> torch.device:
    """``device``, if it is one that a tensor can be on."""
    if device.type == "meta":
        raise InvalidOptionError("a device map cannot name 'meta': meta tensors have no data, and travel without a map")
    kind = device.type
    if str(device) == kind != "cpu":
        raise InvalidOptionError(
            f'Expected devices to have indices, got {kind}: "{kind}" is whichever device is current, and every tensor is on a '
            f'certain one. Write "{kind}:0" for the first'
        )
    return device


def _device_map(value: Any) -> dict[torch.device, torch.device]:
    if not isinstance(value, Mapping):
        raise InvalidTypeError(f"a device map must map devices to devices, but got {_described(value)}")
    here_to_there: dict[torch.device, torch.device] = {}
    there_to_here: dict[torch.device, torch.device] = {}
    for key, target in value.items():
        here, there = _indexed(_device(key)), _indexed(_device(target))
        if there in there_to_here:
            raise InvalidOptionError(
                f"`device_map` only supports 1-to-1 mapping, trying to map {here} and {there_to_here[there]} to {there}"
            )
        if here in here_to_there:
            # By two names, such as 0 and "cuda:0".
            raise InvalidOptionError(
                f"`device_map` only supports 1-to-1 mapping, trying to map {here} to {there} and {here_to_there[here]}"
            )
        here_to_there[here] = there
        there_to_here[there] = here
    return here_to_there


def _device_list(value: Any) -> list[torch.device]:
    if isinstance(value, str) or not isinstance(value, Iterable):
        raise InvalidTypeError(f"devices must be a list of devices, but got {_described(value)}")
    devices = [_device(item) for item in value]
    for device in devices:
        if device.type in ("cpu", "meta"):
            raise InvalidOptionError(
                f"`set_devices` expect a list of CUDA devices, but got device type {device.type}. Accelerators of "
                "any other type will do as well"
            )
    return [_indexed(device) for device in devices]
