"""`zmqagent.transport.binding`: the endpoints that options, and what is known of the group, lead to."""

from __future__ import annotations

from typing import Any

import pytest

from zmqagent.options import TransportName, ZmqRpcBackendOptions
from zmqagent.transport import binding
from zmqagent.transport.binding import bind


@pytest.mark.parametrize(
    ("transport", "share_host", "schemes"),
    [
        ("auto", True, ["unix"]),
        ("auto", False, ["unix", "tcp"]),
        ("local", False, ["unix"]),
        ("ipc", False, ["ipc"]),
        ("tcp", True, ["tcp"]),
    ],
)
def test_a_worker_listens_where_all_that_may_come_can_reach_it(
    transport: TransportName, share_host: bool, schemes: list[str]
) -> None:
    options = ZmqRpcBackendOptions(transport=transport, init_method="tcp://127.0.0.1:29500")
    bound = bind(options, 1, share_host=share_host)
    assert [address.partition(":")[0] for address in bound.addresses] == schemes
    assert all("//127.0.0.1:" in address for address in bound.addresses if address.startswith("tcp"))
    bound.close()


@pytest.mark.parametrize(("init_method", "variable"), [("env://", "localhost"), ("file:///tmp/meet", "192.0.2.7")])
def test_the_interface_is_the_one_that_leads_to_the_store(
    monkeypatch: pytest.MonkeyPatch, init_method: str, variable: str
) -> None:
    """A file leads nowhere, whatever the environment says."""
    monkeypatch.setenv("MASTER_ADDR", variable)
    bound = bind(ZmqRpcBackendOptions(transport="tcp", init_method=init_method), 1, share_host=False)
    assert bound.addresses[0].startswith("tcp://127.0.0.1:")
    bound.close()


def test_the_interface_can_be_chosen() -> None:
    options = ZmqRpcBackendOptions(transport="tcp", init_method="tcp://192.0.2.7:29500", bind_address="127.0.0.1")
    bound = bind(options, 1, share_host=False)
    assert bound.addresses[0].startswith("tcp://127.0.0.1:")
    bound.close()


@pytest.mark.parametrize(
    ("option", "available", "shared"),
    [(None, 80 << 20, 10 << 20), (None, 1 << 40, 1 << 30), (None, None, 1 << 30), (5 << 20, 1 << 40, 5 << 20), (0, 1 << 40, 0)],
)
def test_shared_memory_is_what_is_asked_for_or_an_eighth_of_what_is_left(
    monkeypatch: pytest.MonkeyPatch, option: int | None, available: int | None, shared: int
) -> None:
    made: dict[str, Any] = {}
    monkeypatch.setattr(binding, "available_memory", lambda: available)
    monkeypatch.setattr(binding, "SocketTransport", lambda **arguments: made.update(arguments))
    bind(ZmqRpcBackendOptions(shared_memory=option), 1, share_host=True)
    assert made["shared_memory"] == shared
