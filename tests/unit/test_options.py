"""`zmqagent.options`: torch's options under the same names, checked where they are set."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch.distributed import rpc

from zmqagent.exceptions import InvalidOptionError, InvalidTypeError
from zmqagent.options import ZmqRpcBackendOptions

CUDA0, CUDA1 = torch.device("cuda:0"), torch.device("cuda:1")


def test_the_defaults_are_torchs() -> None:
    ours, torchs = ZmqRpcBackendOptions(), rpc.TensorPipeRpcBackendOptions()
    for name in ("num_worker_threads", "rpc_timeout", "init_method", "device_maps", "devices"):
        assert getattr(ours, name) == getattr(torchs, name)
    assert ours.transport == "auto"
    assert ours.bind_address is None
    assert ours.shared_memory is None
    assert ours.draw_rank is False


def test_init_rpc_takes_them_for_torchs_options() -> None:
    assert isinstance(ZmqRpcBackendOptions(), rpc.RpcBackendOptions)


def test_what_is_given_is_what_is_read() -> None:
    options = ZmqRpcBackendOptions(
        num_worker_threads=3,
        rpc_timeout=0.1,
        init_method="file:///tmp/meet",
        device_maps={"server": {"cuda:0": "cuda:1", "cpu": CUDA0}},
        devices=("cuda:0", CUDA1),
        transport="tcp",
        bind_address="127.0.0.1",
        shared_memory=1 << 20,
        draw_rank=True,
    )
    assert options.num_worker_threads == 3
    assert options.rpc_timeout == 0.1
    assert options.init_method == "file:///tmp/meet"
    assert options.device_maps == {"server": {CUDA0: CUDA1, torch.device("cpu"): CUDA0}}
    assert options.devices == [CUDA0, CUDA1]
    assert options.transport == "tcp"
    assert options.bind_address == "127.0.0.1"
    assert options.shared_memory == 1 << 20
    assert options.draw_rank is True
    assert repr(options) == (
        "ZmqRpcBackendOptions(num_worker_threads=3, rpc_timeout=0.1, init_method='file:///tmp/meet', "
        f"device_maps={options.device_maps!r}, devices={options.devices!r}, transport='tcp', bind_address='127.0.0.1', "
        "shared_memory=1048576, draw_rank=True)"
    )


def test_attributes_can_be_set_like_torchs() -> None:
    options = ZmqRpcBackendOptions()
    options.rpc_timeout = 5
    options.init_method = "tcp://localhost:1"
    options.num_worker_threads = 2
    assert (options.rpc_timeout, options.init_method, options.num_worker_threads) == (5.0, "tcp://localhost:1", 2)
    with pytest.raises(InvalidOptionError, match="rpc_timeout must be finite and not negative"):
        options.rpc_timeout = -1
    assert options.rpc_timeout == 5.0


@pytest.mark.parametrize(
    ("name", "value", "error", "text"),
    [
        ("num_worker_threads", 0, ValueError, "num_worker_threads must be positive, got 0"),
        ("num_worker_threads", 2.0, TypeError, "num_worker_threads must be an int, but got 2.0 (float)"),
        ("num_worker_threads", True, TypeError, "num_worker_threads must be an int, but got True (bool)"),
        ("rpc_timeout", -0.1, ValueError, "rpc_timeout must be finite and not negative (0 for no limit), got -0.1"),
        ("rpc_timeout", float("nan"), ValueError, "rpc_timeout must be finite"),
        ("rpc_timeout", float("inf"), ValueError, "rpc_timeout must be finite"),
        ("rpc_timeout", timedelta(seconds=1), TypeError, "rpc_timeout must be a number of seconds, but got datetime.timedelta"),
        ("rpc_timeout", True, TypeError, "rpc_timeout must be a number of seconds"),
        ("shared_memory", -1, ValueError, "shared_memory must not be negative, got -1"),
        ("shared_memory", 0.5, TypeError, "shared_memory must be an int (bytes) or None, but got 0.5 (float)"),
        ("shared_memory", True, TypeError, "shared_memory must be an int (bytes) or None"),
        ("init_method", "", ValueError, "init_method must not be empty"),
        ("init_method", None, TypeError, "init_method must be a str, but got None (NoneType)"),
        ("device_maps", [], TypeError, "device_maps must map names of workers to device maps"),
        ("device_maps", {0: {}}, TypeError, "a worker's name in device_maps must be a str, but got 0 (int)"),
        ("device_maps", {"a": [0]}, TypeError, "a device map must map devices to devices, but got [0] (list)"),
        ("device_maps", {"a": {0: 1.5}}, TypeError, "a device is an int, a str or a torch.device, but got 1.5 (float)"),
        ("device_maps", {"a": {True: 1}}, TypeError, "a device is an int, a str or a torch.device, but got True (bool)"),
        ("device_maps", {"a": {0: "gpu"}}, ValueError, "'gpu' is no device: Expected one of"),
        ("device_maps", {"a": {0: -1}}, ValueError, "-1 is no device"),
        ("device_maps", {"a": {256: 0}}, ValueError, "256 is no device: torch numbers devices from 0 to 127"),
        ("device_maps", {"a": {0: "cuda:128"}}, ValueError, "'cuda:128' is no device: torch numbers devices from 0 to 127"),
        ("device_maps", {"a": {1 << 64: 0}}, ValueError, f"{1 << 64} is no device: Overflow"),
        (
            "device_maps",
            {"a": {"cuda:0": 1, "cuda:2": "cuda:1"}},
            ValueError,
            "`device_map` only supports 1-to-1 mapping, trying to map cuda:2 and cuda:0 to cuda:1",
        ),
        (
            "device_maps",
            {"a": {0: 1, "cuda:0": 2}},
            ValueError,
            "`device_map` only supports 1-to-1 mapping, trying to map cuda:0 to cuda:2 and cuda:1",
        ),
        ("devices", 0, TypeError, "devices must be a list of devices, but got 0 (int)"),
        ("devices", "cuda:0", TypeError, "devices must be a list of devices, but got 'cuda:0' (str)"),
        ("devices", ["cpu"], ValueError, "`set_devices` expect a list of CUDA devices, but got device type cpu."),
        ("devices", [torch.device("cuda", 200)], ValueError, "torch numbers devices from 0 to 127"),
        ("devices", ["cuda"], ValueError, "Expected devices to have indices, got cuda: "),
        ("device_maps", {"a": {"cuda": 0}}, ValueError, "Expected devices to have indices, got cuda: "),
        ("device_maps", {"a": {"cpu": torch.device("xpu")}}, ValueError, 'Write "xpu:0" for the first'),
        ("device_maps", {"a": {"meta": 0}}, ValueError, "a device map cannot name 'meta'"),
        ("transport", "udp", ValueError, "transport must be one of 'auto', 'local', 'ipc', 'tcp', but got 'udp'"),
        ("bind_address", "", ValueError, "bind_address must not be empty"),
        ("bind_address", 5, TypeError, "bind_address must be a str, but got 5 (int)"),
        ("draw_rank", 1, TypeError, "draw_rank must be a bool, but got 1 (int)"),
    ],
)
def test_a_wrong_value_is_named_where_it_is_set(name: str, value: Any, error: type[Exception], text: str) -> None:
    ours = InvalidOptionError if error is ValueError else InvalidTypeError
    with pytest.raises(ours, match=re.escape(text)) as first:
        ZmqRpcBackendOptions(**{name: value})
    assert isinstance(first.value, error)
    options = ZmqRpcBackendOptions()
    with pytest.raises(ours, match=re.escape(text)):
        setattr(options, name, value)


def test_device_maps_grow_call_by_call() -> None:
    options = ZmqRpcBackendOptions(device_maps={"a": {"cuda:0": "cuda:1"}})
    options.set_device_map("a", {"cuda:1": "cuda:0"})
    options.set_device_map("a", {"cuda:0": "cuda:1"})
    options.set_device_map("b", {"cuda:0": "cuda:0"})
    assert options.device_maps == {"a": {CUDA0: CUDA1, CUDA1: CUDA0}, "b": {CUDA0: CUDA0}}


def test_a_device_that_is_mapped_keeps_its_target() -> None:
    options = ZmqRpcBackendOptions(device_maps={"a": {"cuda:0": "cuda:1"}})
    text = "`set_device_map` only supports 1-to-1 mapping, trying to map cuda:0 to cuda:0 and cuda:1"
    with pytest.raises(InvalidOptionError, match=re.escape(text)):
        options.set_device_map("a", {"cuda:0": "cuda:0"})
    assert options.device_maps == {"a": {CUDA0: CUDA1}}


def test_what_is_done_to_maps_and_devices_that_were_read_changes_no_options() -> None:
    options = ZmqRpcBackendOptions(device_maps={"a": {"cuda:0": "cuda:1"}}, devices=["cuda:0"])
    options.device_maps["b"] = {CUDA0: CUDA0}
    options.device_maps["a"][CUDA1] = CUDA1
    options.devices.append(CUDA0)
    assert (options.device_maps, options.devices) == ({"a": {CUDA0: CUDA1}}, [CUDA0])


def test_two_devices_never_go_to_one_though_given_in_two_calls() -> None:
    options = ZmqRpcBackendOptions(device_maps={"a": {"cuda:0": "cuda:1"}})
    with pytest.raises(InvalidOptionError, match="only supports 1-to-1 mapping, trying to map cuda:1 and cuda:0 to cuda:1"):
        options.set_device_map("a", {"cuda:1": "cuda:1"})
    assert options.device_maps == {"a": {CUDA0: CUDA1}}


def test_a_device_without_a_number_is_refused_where_it_is_added() -> None:
    options = ZmqRpcBackendOptions(device_maps={"a": {"cuda:0": "cuda:1"}}, devices=["cuda:0"])
    with pytest.raises(InvalidOptionError, match="Expected devices to have indices, got cuda"):
        options.set_device_map("a", {"cuda": "cuda:0"})
    with pytest.raises(InvalidOptionError, match="Expected devices to have indices, got cuda"):
        options.set_devices(["cuda:1", "cuda"])
    assert (options.device_maps, options.devices) == ({"a": {CUDA0: CUDA1}}, [CUDA0])


def test_the_options_own_their_maps_and_lists() -> None:
    maps: dict[str, dict[Any, Any]] = {"a": {"cuda:0": "cuda:1"}}
    devices: list[Any] = ["cuda:0"]
    options = ZmqRpcBackendOptions(device_maps=maps, devices=devices)
    maps["a"]["cuda:3"] = "cuda:4"
    devices.append("cuda:1")
    assert options.device_maps == {"a": {CUDA0: CUDA1}}
    assert options.devices == [CUDA0]


@pytest.mark.parametrize(("accelerator", "expected"), [(None, "cuda:3"), (torch.device("xpu"), "xpu:3")])
def test_numbers_mean_the_machines_accelerator(
    monkeypatch: pytest.MonkeyPatch, accelerator: torch.device | None, expected: str
) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: accelerator)
    options = ZmqRpcBackendOptions()
    options.set_devices([3])
    assert options.devices == [torch.device(expected)]


def test_tensorpipes_options_are_taken_over() -> None:
    theirs = rpc.TensorPipeRpcBackendOptions(
        num_worker_threads=7,
        rpc_timeout=0.1,
        init_method="tcp://localhost:1",
        device_maps={"a": {"cuda:0": "cuda:1"}},
        devices=["cuda:0"],
    )
    ours = ZmqRpcBackendOptions.from_tensorpipe(theirs)
    assert ours.num_worker_threads == 7
    assert ours.rpc_timeout == 0.1
    assert ours.init_method == "tcp://localhost:1"
    assert ours.device_maps == {"a": {CUDA0: CUDA1}}
    assert ours.devices == [CUDA0]


def test_the_cpu_has_no_number_as_tensors_have_it() -> None:
    options = ZmqRpcBackendOptions(device_maps={"b": {"cpu:0": "cuda:0", torch.device("cuda", 1): torch.device("cpu", 0)}})
    cpu = torch.device("cpu")
    assert options.device_maps["b"] == {cpu: torch.device("cuda:0"), torch.device("cuda:1"): cpu}
