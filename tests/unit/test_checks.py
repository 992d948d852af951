"""`zmqagent.agent.checks`: what a worker may be called, and which workers may form a group."""

from __future__ import annotations

from typing import Any

import pytest

from zmqagent.agent.checks import check_group, check_name, check_worker_id
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId


def record(worker_id: int, *, name: str | None = None) -> PeerRecord:
    return PeerRecord(name or f"worker{worker_id}", WorkerId(worker_id), 100 + worker_id, "host", 1, ("ipc://x",))


@pytest.mark.parametrize("name", ["a", "worker-0", "a:b_C9", "x" * 127])
def test_legal_names_pass(name: str) -> None:
    check_name(name)


@pytest.mark.parametrize("name", ["", "a b", "é", "a\n", "a/b", "x" * 128])
def test_illegal_names_are_refused_in_torchs_words(name: str) -> None:
    with pytest.raises(InvalidOptionError, match=r"Worker name must match \^\[A-Za-z0-9-_:\]\*\$, and must be non-empty"):
        check_name(name)


def test_a_name_that_is_no_text_is_refused() -> None:
    with pytest.raises(InvalidTypeError, match="not a int"):
        check_name(3)  # type: ignore[arg-type]


def test_ids_in_range_pass() -> None:
    check_worker_id(0)
    check_worker_id(32767)
    check_worker_id(1, world_size=2)


@pytest.mark.parametrize(("worker_id", "size"), [(-1, None), (32768, None), (2, 2), (32768, 99999)])
def test_ids_out_of_range_are_refused(worker_id: int, size: int | None) -> None:
    with pytest.raises(InvalidOptionError, match=f"but got {worker_id}"):
        check_worker_id(worker_id, size)


@pytest.mark.parametrize("worker_id", [True, 1.0, "1"])
def test_ids_that_are_no_ints_are_refused(worker_id: Any) -> None:
    with pytest.raises(InvalidTypeError, match="is an int"):
        check_worker_id(worker_id)


def test_a_group_without_conflicts_passes() -> None:
    check_group([record(0), record(1)], world_size=2)


def test_two_workers_of_one_name_are_refused_in_torchs_words() -> None:
    text = "RPC worker name a is not unique. Workers 0 and 1 share the same name."
    with pytest.raises(InvalidOptionError, match=text):
        check_group([record(0, name="a"), record(1, name="a")])


def test_two_workers_of_one_id_are_refused() -> None:
    with pytest.raises(InvalidOptionError, match=r"Worker id 1 is not unique\. Workers a and b share it"):
        check_group([record(1, name="a"), record(1, name="b")])
