"""What a received message's fields and body are checked against before a command is made of them.

Pure. Everything raises `ProtocolError`; its text says what the message type carries, and what arrived.
"""

from __future__ import annotations

from typing import Any

from zmqagent.exceptions import ProtocolError
from zmqagent.wire.types import MAX_INT, MAX_WORKER_ID, ForkData, ForkId, Message, MessageType, RRefId, shown

__all__ = ["known_type", "take", "take_bare", "take_shares", "take_without_pickle", "to_fork_id", "to_rref_id"]


def take(message: Message, *types: type) -> tuple[Any, ...]:
    """The fields of ``message``, checked against ``types`` one by one; integers also against their range."""
    fields = message.fields
    # bool is an int to isinstance, yet never a valid id here: compare exact types.
    if tuple(map(type, fields)) != types:
        wanted = ", ".join(t.__name__ for t in types)
        got = ", ".join(type(f).__name__ for f in fields[: len(types) + 1])
        raise ProtocolError(f"a {message.type.name} message carries the fields ({wanted}), but ({got}) arrived")
    for field in fields:
        if type(field) is int and not 0 <= field <= MAX_INT:
            raise ProtocolError(f"integers in a {message.type.name} message go from 0 to {MAX_INT}, and {field} arrived")
    return fields


def take_without_pickle(message: Message, *types: type) -> tuple[Any, ...]:
    """`take`, for a message whose body is tensors and nothing else."""
    if message.payload or message.buffers:
        raise ProtocolError(
            f"a {message.type.name} message carries no pickle, and one of {len(message.payload)} bytes, with "
            f"{len(message.buffers)} buffers, arrived"
        )
    return take(message, *types)


def take_bare(message: Message, *types: type) -> tuple[Any, ...]:
    """`take`, for a message without a body."""
    if message.tensors:
        raise ProtocolError(f"a {message.type.name} message carries no tensors, and {len(message.tensors)} arrived")
    return take_without_pickle(message, *types)


def take_shares(message: Message) -> tuple[ForkData, ...]:
    """The only field of ``message``: the shares in RRefs that its pickle holds."""
    (shares,) = take(message, tuple)
    for share in shares:
        if type(share) is not tuple or [type(value) for value in share] != [int] * 6 + [str]:
            raise ProtocolError(f"a share in an RRef is six integers and a text, but a {message.type.name} has {shown(share)}")
        owner, created_on, local_id, forked_on, fork_number, parent, _ = share
        for worker_id, number in ((created_on, local_id), (forked_on, fork_number), (owner, 0), (parent, 0)):
            to_rref_id(worker_id, number)
    return tuple(shares)


def to_rref_id(created_on: int, local_id: int) -> RRefId:
    """The id that two fields of a message are."""
    _check_id(created_on, local_id)
    return RRefId(created_on, local_id)


def to_fork_id(created_on: int, local_id: int) -> ForkId:
    """The id that two fields of a message are."""
    _check_id(created_on, local_id)
    return ForkId(created_on, local_id)


def _check_id(created_on: int, local_id: int) -> None:
    if not (0 <= created_on <= MAX_WORKER_ID and 0 <= local_id <= MAX_INT):
        raise ProtocolError(
            f"an id of an RRef or a fork is a worker's, from 0 to {MAX_WORKER_ID}, and a number, and not {created_on}, {local_id}"
        )


def known_type(number: int) -> MessageType:
    """The type with this number."""
    try:
        return MessageType(number)
    except ValueError:
        raise ProtocolError(f"message type {number:#x} is unknown to this version of zmqagent") from None
