"""Which names, ids, device maps and groups of workers are legal. Pure."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from zmqagent.agent.devices import WorkerDevices
from zmqagent.agent.devices import validate as validate_devices
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError
from zmqagent.transport.base import PeerRecord
from zmqagent.wire.types import WorkerId

__all__ = ["MAX_WORKER_ID", "check_group", "check_name", "check_worker_id"]

MAX_WORKER_ID = (1 << 15) - 1

_NAME = re.compile(r"[A-Za-z0-9\-_:]+")
_NAME_LIMIT = 128


def check_name(name: str) -> None:
    """Checks a worker's name, by torch's rules.

    Raises:
        InvalidTypeError: ``name`` is no text.
        InvalidOptionError: it is empty, too long, or has other signs than letters, digits, "-", "_" and ":".
    """
    if not isinstance(name, str):
        raise InvalidTypeError(f"a worker's name is a str, not a {type(name).__name__}")
    if not _NAME.fullmatch(name) or len(name) >= _NAME_LIMIT:
        raise InvalidOptionError(
            f"Worker name must match ^[A-Za-z0-9-_:]*$, and must be non-empty and shorter than {_NAME_LIMIT} chars, "
            f"but got {name}"
        )


def check_worker_id(worker_id: int, world_size: int | None = None) -> None:
    """Checks a worker's id against the ids of an int16 and, in a static group, against the group's size.

    Raises:
        InvalidTypeError: ``worker_id`` is no int.
        InvalidOptionError: it is out of range.
    """
    if type(worker_id) is not int:
        raise InvalidTypeError(f"a worker's id (its rank) is an int, not a {type(worker_id).__name__}")
    limit = MAX_WORKER_ID + 1 if world_size is None else min(world_size, MAX_WORKER_ID + 1)
    if not 0 <= worker_id < limit:
        raise InvalidOptionError(f"a worker's id (its rank) must be at least 0 and less than {limit}, but got {worker_id}")


def check_group(records: Collection[PeerRecord], world_size: int | None = None) -> None:
    """Checks the records of workers that want to be one group.

    Raises:
        InvalidTypeError: a name or an id of the wrong type.
        InvalidOptionError: an illegal name or id, or one that two workers share; a device map that does not fit the devices.
        ProtocolError: what a worker tells of its devices cannot be read here.
    """
    for record in records:
        check_name(record.name)
        check_worker_id(record.worker_id, world_size)
    _check_distinct(records)
    devices = {record.name: WorkerDevices.from_text(record.devices) for record in records}
    validate_devices(devices, is_static_group=world_size is not None)


def _check_distinct(records: Iterable[PeerRecord]) -> None:
    by_name: dict[str, WorkerId] = {}
    by_id: dict[WorkerId, str] = {}
    for name, worker_id in ((r.name, r.worker_id) for r in records):
        if worker_id in by_id:
            raise InvalidOptionError(
                f"Worker id {worker_id} is not unique. Workers {by_id[worker_id]} and {name} share it: give each its own rank."
            )
        if name in by_name:
            raise InvalidOptionError(
                f"RPC worker name {name} is not unique. Workers {by_name[name]} and {worker_id} share the same name."
            )
        by_name[name] = worker_id
        by_id[worker_id] = name
