"""`zmqagent.testing.identity`: what makes two messages attempts to send one."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest

from zmqagent.rref.forks import receive_rref
from zmqagent.testing.identity import identity
from zmqagent.wire.commands import BackwardAutograd, Pickled, PythonCall, PythonRemoteCall, ScriptRemoteCall
from zmqagent.wire.types import AutogradMetadata, ForkId, Message, RRefId

IDS = [0, 0xFF, 0x100, 0xFFFF, 0x1_0000, 0x7FFF_FFFF, 0x8000_0000, (1 << 63) - 1]
"""Around the limits between pickle's forms of an integer."""
BODY = Pickled(b"call")


class Shared:
    """Pickled as an RRef is."""

    def __init__(self, rref_number: int, fork_number: int) -> None:
        self._share = (1, 0, rref_number, 0, fork_number, 0, "PyObject")

    def __reduce__(self) -> Any:
        return receive_rref, (self._share,)


def call(arguments: Any, protocol: int = 5) -> Message:
    return PythonCall(Pickled(pickle.dumps(arguments, protocol)), False).to_message()


def python_remote(rref_id: RRefId, fork_id: ForkId) -> Message:
    return PythonRemoteCall(BODY, False, rref_id, fork_id).to_message()


def script_remote(rref_id: RRefId, fork_id: ForkId) -> Message:
    return ScriptRemoteCall(BODY, "aten::add", True, False, rref_id, fork_id).to_message()


@pytest.mark.parametrize("make", [python_remote, script_remote])
def test_a_repeated_remote_is_one_message(make: Callable[..., Message]) -> None:
    assert identity(make(RRefId(0, 1), ForkId(0, 2))) == identity(make(RRefId(0, 3), ForkId(0, 4)))


def test_remotes_of_other_functions_are_others() -> None:
    first, second = (
        ScriptRemoteCall(BODY, name, True, False, RRefId(0, 1), ForkId(0, 2)).to_message() for name in ("aten::add", "aten::sub")
    )
    assert identity(first) != identity(second)


def gradients(message_id: int, pass_id: int) -> Message:
    return BackwardAutograd(AutogradMetadata(5, message_id), pass_id, True, ()).to_message()


def test_the_gradients_of_the_next_pass_are_one_message_with_those_of_the_last_and_not_with_those_from_elsewhere() -> None:
    assert identity(gradients(1, 1)) == identity(gradients(1, 2))
    assert identity(gradients(1, 1)) != identity(gradients(2, 1))


@pytest.mark.parametrize("protocol", range(2, 6))
def test_calls_with_one_rref_are_one_message_however_large_the_ids_of_the_shares(protocol: int) -> None:
    # Of two the second refers to the texts of the first.
    made = {identity(call(["text", Shared(7, fork), (2, Shared(8, fork + 1))], protocol)) for fork in IDS[:-1]}
    made |= {identity(call(["text", Shared(7, IDS[-1]), (2, Shared(8, IDS[-1]))], protocol))}
    assert len(made) == 1


def test_calls_with_different_rrefs_are_different_messages() -> None:
    assert len({identity(call([Shared(number, 0)])) for number in IDS}) == len(IDS)


def test_calls_with_one_rref_and_different_other_arguments_are_different_messages() -> None:
    others: list[Any] = [1, 2, "text", (1, 0, 7, 0, 1, 0, "PyObject"), (1, 0, 7, 0, 2, 0, "PyObject"), (1, 0, 7, 0, 2, 0, "no")]
    assert len({identity(call([Shared(7, 0), other])) for other in others}) == len(others)


@pytest.mark.parametrize(
    ("first", "second"), [(b"\xffreceive_rref 1", b"\xffreceive_rref 2"), (b"receive_rref", b"receive_rref\xff"), (b"", b"1")]
)
def test_what_is_no_pickle_counts_as_it_is(first: bytes, second: bytes) -> None:
    one, other = (PythonCall(Pickled(payload), False).to_message() for payload in (first, second))
    assert identity(one) == identity(one)
    assert identity(one) != identity(other)


def test_what_follows_a_pickle_counts_too() -> None:
    pickled = pickle.dumps([Shared(7, 0)])
    first, second = (PythonCall(Pickled(pickled + rest), False).to_message() for rest in (b"1", b"2"))
    assert identity(first) != identity(second)
