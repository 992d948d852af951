"""`zmqagent.wire.commands`: every command survives the wire, and a message whose fields do not fit is refused."""

from __future__ import annotations

import dataclasses
import typing
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from zmqagent.exceptions import ProtocolError
from zmqagent.wire import commands as c
from zmqagent.wire.frames import Envelope, decode, encode
from zmqagent.wire.types import AutogradMetadata, ForkId, Message, MessageType, RRefId, WorkerId

RREF, FORK, CONTEXT = RRefId(1, 2), ForkId(3, 4), AutogradMetadata(5, 6)
BODY = c.Pickled(b"pickle", (b"buffer",), ("tensor",))

COMMANDS: list[c.Command] = [
    c.PythonCall(BODY, True),
    c.ScriptCall(BODY, "aten::add", True, False),
    c.Return(BODY),
    c.Return(BODY, ((0, 1, 2, 3, 4, 5, "PyObject"), (0, 1, 2, 3, 6, 5, "PyObject"))),
    c.PythonRemoteCall(BODY, False, RREF, FORK),
    c.ScriptRemoteCall(BODY, "__torch__.f", False, True, RREF, FORK),
    c.RemoteReturn(RREF, FORK),
    c.RRefFetch(RREF),
    c.RRefUserDeletes((c.RRefUserDelete(RREF, FORK),) * 2),
    c.RRefForkRequest(RREF, FORK),
    c.RRefChildAccept(FORK),
    c.ForwardAutograd(CONTEXT, c.PythonCall(BODY, False).to_message()),
    c.ForwardAutograd(CONTEXT, c.Return(BODY).to_message()),
    c.RunWithProfiling(6, c.PythonCall(BODY, False).to_message()),
    c.ProfiledReturn(b"records", c.Return(BODY).to_message()),
    c.BackwardAutograd(CONTEXT, 7, True, ("gradient",)),
    c.AbortBackward(1 << 48, 7, "über"),
    c.CleanupContexts((1 << 48, 2)),
    c.RRefBackward(RREF, 9, False),
    c.Ack(),
    c.Ack(MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP),
    c.Failure(22, "ShutdownError", "gone", BODY),
    c.Barrier("join", 3),
    c.BarrierPassed(12),
    c.Goodbye(1, "done"),
    c.Join("worker-1", 1, (1 << 63) - 1, "host", 4711, ("ipc://a", "tcp://b:1"), 99, 3, "[1]"),
    c.Leave((1 << 63) - 1, "done"),
]


def through_the_wire(message: Message) -> Message:
    """``message`` as its receiver sees it; tensors are put into frames by others."""
    sent = Envelope(WorkerId(0), 1, 2, 3, message.type, message.fields, message.payload, message.buffers)
    got = decode([bytes(frame) for frame in encode(sent)])
    return Message(got.type, got.fields, bytes(got.payload), tuple(map(bytes, got.buffers)), message.tensors)


def test_every_command_is_tried_here() -> None:
    assert {type(command) for command in COMMANDS} == set(typing.get_args(c.Command))


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_every_command_survives_the_wire(command: c.Command) -> None:
    assert c.parse(through_the_wire(command.to_message())) == command


def test_a_wrapper_is_a_request_or_a_response_like_what_it_wraps() -> None:
    request, response = (c.ForwardAutograd(CONTEXT, inner.to_message()) for inner in (c.PythonCall(BODY, False), c.Return(BODY)))
    assert request.to_message().type is MessageType.FORWARD_AUTOGRAD_REQ
    assert response.to_message().type is MessageType.FORWARD_AUTOGRAD_RESP


def test_a_wrapped_command_can_be_parsed_in_turn() -> None:
    got = c.parse(through_the_wire(c.ForwardAutograd(CONTEXT, c.PythonCall(BODY, True).to_message()).to_message()))
    assert isinstance(got, c.ForwardAutograd)
    assert c.parse(got.inner) == c.PythonCall(BODY, True)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: type(command).__name__)
def test_a_field_too_many_too_few_or_of_another_type_is_refused(command: c.Command) -> None:
    message = command.to_message()
    fields = message.fields
    wrong: list[tuple[Any, ...]] = [(*fields, 1)]
    wrong += [fields[:-1]] if fields else []
    wrong += [(*fields[:i], 1.5, *fields[i + 1 :]) for i in range(len(fields))]
    # An int is no bool here, nor a bool an int.
    wrong += [(*fields[:i], int(f) if type(f) is bool else True, *fields[i + 1 :]) for i, f in enumerate(fields)]
    for other in wrong:
        with pytest.raises(ProtocolError, match=rf"a {message.type.name} message carries the fields \("):
            c.parse(dataclasses.replace(message, fields=other))


def test_the_refusal_names_what_was_wanted_and_what_came() -> None:
    text = r"a RREF_CHILD_ACCEPT message carries the fields \(int, int\), but \(str\) arrived"
    with pytest.raises(ProtocolError, match=text):
        c.parse(Message(MessageType.RREF_CHILD_ACCEPT, ("x",)))


WITH_PICKLE = (c.PythonCall, c.ScriptCall, c.Return, c.PythonRemoteCall, c.ScriptRemoteCall, c.Failure)
WRAPPERS = (c.ForwardAutograd, c.RunWithProfiling, c.ProfiledReturn)


@pytest.mark.parametrize(
    "command",
    [command for command in COMMANDS if not isinstance(command, WITH_PICKLE + WRAPPERS)],
    ids=lambda c: type(c).__name__,
)
def test_a_body_is_refused_where_none_belongs(command: c.Command) -> None:
    message = command.to_message()
    with pytest.raises(
        ProtocolError, match=f"a {message.type.name} message carries no pickle, and one of 4 bytes, with 0 buffers"
    ):
        c.parse(dataclasses.replace(message, payload=b"more"))
    with pytest.raises(ProtocolError, match="and one of 0 bytes, with 1 buffers, arrived"):
        c.parse(dataclasses.replace(message, buffers=(b"more",)))
    if not isinstance(command, c.BackwardAutograd):
        with pytest.raises(ProtocolError, match=f"a {message.type.name} message carries no tensors, and 2 arrived"):
            c.parse(dataclasses.replace(message, tensors=("more", "still")))


@pytest.mark.parametrize("value", [-1, 1 << 63])
def test_an_integer_out_of_range_is_refused(value: int) -> None:
    with pytest.raises(ProtocolError, match=f"a BARRIER_RESP message go from 0 to [0-9]+, and {value} arrived"):
        c.parse(Message(MessageType.BARRIER_RESP, (value,)))


@pytest.mark.parametrize("fields", [(1 << 15, 0, 0, 0), (0, 0, 1 << 15, 0)])
def test_an_id_that_no_worker_drew_is_refused(fields: tuple[int, ...]) -> None:
    with pytest.raises(ProtocolError, match="an id of an RRef or a fork is a worker's, from 0 to 32767, and a number"):
        c.parse(Message(MessageType.RREF_FORK_REQUEST, fields))


@pytest.mark.parametrize("delete", [5, (), (0, 1, 2), (0, 1, 2, "3"), (0, 1, 2, 3, 4), (1 << 15, 0, 0, 0), (0, -1, 0, 0)])
def test_the_death_of_no_share_is_refused(delete: Any) -> None:
    with pytest.raises(ProtocolError, match=r"told by four integers|an id of an RRef or a fork is a worker's"):
        c.parse(Message(MessageType.RREF_USER_DELETE, (((0, 1, 2, 3), delete),)))


@pytest.mark.parametrize(
    "share", [5, (), (0, 1, 2, 3, 4, 5), (0, 1, 2, 3, 4, 5, 6), (-1, 1, 2, 3, 4, 5, ""), (0, 1, 2, 3, 4, 1 << 15, "")]
)
def test_a_share_that_is_none_is_refused(share: Any) -> None:
    with pytest.raises(ProtocolError, match=r"a share in an RRef is six integers|an id of an RRef or a fork is a worker's"):
        c.parse(Message(MessageType.PYTHON_RET, ((share,),)))


def test_a_type_without_a_command_is_refused() -> None:
    with pytest.raises(ProtocolError, match="no command is defined for messages of type UNKNOWN"):
        c.parse(Message(MessageType.UNKNOWN))


def test_an_unknown_type_within_a_wrapper_is_refused() -> None:
    with pytest.raises(ProtocolError, match="message type 0xffff is unknown"):
        c.parse(Message(MessageType.FORWARD_AUTOGRAD_REQ, (1, 2, 0xFFFF, ())))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(0, 600) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=5,
)


@given(st.sampled_from(MessageType), st.lists(VALUES, max_size=7).map(tuple))
def test_any_fields_are_parsed_or_refused(type_: MessageType, fields: tuple[Any, ...]) -> None:
    try:
        command = c.parse(Message(type_, fields))
    except ProtocolError:
        return
    assert command.to_message().fields == fields


def test_addresses_that_are_no_texts_are_refused() -> None:
    message = c.Join("w", 1, 2, "host", 3, (b"ipc://a",), 4, 5, "").to_message()  # type: ignore[arg-type]
    with pytest.raises(ProtocolError, match="the addresses of a worker that joins are texts"):
        c.parse(through_the_wire(message))
