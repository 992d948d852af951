"""`zmqagent.wire.types`: the numbers and texts are torch's own."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from zmqagent.wire.types import ANSWERS, ForkId, MessageType, RRefId, shown

# torch/csrc/distributed/rpc/message.h
TORCHS = {
    "SCRIPT_CALL": 0x100,
    "SCRIPT_RET": 0x201,
    "PYTHON_CALL": 0x102,
    "PYTHON_RET": 0x203,
    "SCRIPT_REMOTE_CALL": 0x104,
    "PYTHON_REMOTE_CALL": 0x105,
    "REMOTE_RET": 0x206,
    "SCRIPT_RREF_FETCH_CALL": 0x107,
    "PYTHON_RREF_FETCH_CALL": 0x108,
    "SCRIPT_RREF_FETCH_RET": 0x209,
    "PYTHON_RREF_FETCH_RET": 0x20A,
    "RREF_USER_DELETE": 0x10B,
    "RREF_FORK_REQUEST": 0x10C,
    "RREF_CHILD_ACCEPT": 0x10D,
    "RREF_ACK": 0x20E,
    "FORWARD_AUTOGRAD_REQ": 0x10F,
    "FORWARD_AUTOGRAD_RESP": 0x210,
    "BACKWARD_AUTOGRAD_REQ": 0x111,
    "BACKWARD_AUTOGRAD_RESP": 0x212,
    "CLEANUP_AUTOGRAD_CONTEXT_REQ": 0x113,
    "CLEANUP_AUTOGRAD_CONTEXT_RESP": 0x214,
    "RUN_WITH_PROFILING_REQ": 0x115,
    "RUN_WITH_PROFILING_RESP": 0x216,
    "RREF_BACKWARD_REQ": 0x117,
    "RREF_BACKWARD_RESP": 0x218,
    "EXCEPTION": 0x237,
    "UNKNOWN": 0x3C,
}


def test_torchs_messages_have_torchs_numbers() -> None:
    assert {name: MessageType[name].value for name in TORCHS} == TORCHS


def test_our_own_messages_stay_clear_of_torchs_numbers() -> None:
    ours = [t for t in MessageType if t.name not in TORCHS]
    assert ours
    assert all((t & 0xFF) >= 0x40 for t in ours)


@pytest.mark.parametrize("type_", MessageType)
def test_a_message_is_a_request_or_a_response(type_: MessageType) -> None:
    assert type_.is_request + type_.is_response == (type_ is not MessageType.UNKNOWN)


@pytest.mark.parametrize("name", [t.name for t in MessageType if t.name.endswith("_REQ")])
def test_every_request_has_its_response(name: str) -> None:
    assert MessageType[name].is_request
    assert MessageType[name.removesuffix("_REQ") + "_RESP"].is_response


@pytest.mark.parametrize("kind", [RRefId, ForkId])
def test_ids_read_like_torchs(kind: type[RRefId | ForkId]) -> None:
    assert str(kind(3, 14)) == "GloballyUniqueId(created_on=3, local_id=14)"


def test_the_documentation_lists_every_message_with_its_number() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire-protocol.md").read_text(encoding="utf-8")
    listed = {name: int(number, 16) for number, name in re.findall(r"^\| (0x[0-9a-f]+) \| (\w+) \|", text, re.MULTILINE)}
    reserved = re.search(r"torch's other types \(([^)]*)\)", text)
    assert reserved is not None
    numbers = {int(number, 16) for number in reserved[1].split(", ")}
    assert listed == {t.name: t.value for t in MessageType if t.value not in numbers}
    assert numbers <= {t.value for t in MessageType}


def test_the_documentation_says_what_answers_each_request() -> None:
    text = (Path(__file__).parents[2] / "docs" / "wire-protocol.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| 0x1[0-9a-f]+ \| (\w+) \|.*\| (\w+) \|$", text, re.MULTILINE))
    assert set(listed) == {request.name for request in ANSWERS}
    for request, answers in ANSWERS.items():
        assert listed[request.name] in {answer.name for answer in answers} or (listed[request.name], answers) == ("none", set())


def test_what_a_peer_sent_is_shown_in_a_line_however_long_or_deep_it_is() -> None:
    deep: tuple[object, ...] = ()
    for _ in range(100_000):
        deep = (deep,)
    for value in (deep, (1,) * 1_000_000, "x" * 1_000_000, b"x" * 1_000_000, {"a": "\ud800" * 1000}):
        assert len(shown(value)) < 700
    assert shown((1, "text", (2.5, None))) == "(1, 'text', (2.5, None))"
