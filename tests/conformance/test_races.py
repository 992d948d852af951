"""The guards against races of torch's own tests."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch.distributed as dist

from tests.conformance.races import settle_process_groups


def test_new_group_waits_for_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    asked = threading.Event()

    def init_process_group() -> None:
        asked.wait(30)
        order.append("init")

    def new_group(ranks: list[int]) -> Any:
        order.append(f"new_group {ranks}")
        return object()

    monkeypatch.setattr(dist, "init_process_group", init_process_group)
    monkeypatch.setattr(dist, "new_group", new_group)
    settle_process_groups()

    def call() -> None:
        asked.set()
        dist.new_group([0, 1])

    caller = threading.Thread(target=call)
    caller.start()
    dist.init_process_group()
    caller.join()

    assert order == ["init", "new_group [0, 1]"]
