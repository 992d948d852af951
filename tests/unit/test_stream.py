"""`zmqagent.transport.stream`: messages come out of a stream as they went in, however it is cut, and so do references."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import NoReturn

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqagent.exceptions import ProtocolError
from zmqagent.transport.shared_memory import Reference
from zmqagent.transport.stream import BLOCK_BYTES, LENT, REFERENCE_BYTES, StreamReader, invitation, prefix
from zmqagent.wire.frames import Limits


class Sink:
    """Reads a stream. What a reference means is its bytes doubled."""

    def __init__(self, limits: Limits | None = None) -> None:
        self.invitations: list[bytes] = []
        self.messages: list[list[bytes]] = []
        view = lambda content: memoryview(bytes(content) * 2)  # noqa: E731
        arguments = () if limits is None else (limits,)
        self._reader = StreamReader(lambda content: self.invitations.append(bytes(content)), view, *arguments)

    def feed(self, data: bytes) -> None:
        while data:
            for space in self._reader.space():
                part = data[: space.nbytes]
                space[: len(part)] = part
                data = data[len(part) :]
                for message in self._reader.took(len(part)):
                    self.messages.append([bytes(frame) for frame in message])
                break


def stream(frames: Sequence[bytes], lent: Sequence[int] = ()) -> bytes:
    sizes = [len(frame) | (LENT if i in lent else 0) for i, frame in enumerate(frames)]
    return prefix(sizes) + b"".join(frames)


def test_a_reference_has_the_size_that_the_stream_expects() -> None:
    assert len(Reference(1, 2, 3, 4).pack()) == REFERENCE_BYTES


_FRAMES = st.lists(st.tuples(st.integers(0, 40), st.booleans()), min_size=1, max_size=5)


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.none(), _FRAMES), max_size=6), st.lists(st.integers(1, 60), min_size=1, max_size=40), st.booleans())
def test_messages_references_and_invitations_come_out_however_the_stream_is_cut(
    sent: list[list[tuple[int, bool]] | None], cuts: list[int], is_long: bool
) -> None:
    data = b""
    messages, invitations = [], []
    for number, message in enumerate(sent):
        if message is None:
            invitations.append(bytes([number]) * REFERENCE_BYTES)
            data += invitation(invitations[-1])
            continue
        lent = [i for i, (_, is_lent) in enumerate(message) if is_lent]
        frames = [bytes([number + i]) * (REFERENCE_BYTES if i in lent else size) for i, (size, _) in enumerate(message)]
        if is_long:
            frames.append(b"x" * BLOCK_BYTES)
        data += stream(frames, lent)
        messages.append([frame * (1 + (i in lent)) for i, frame in enumerate(frames)])
    sink = Sink()
    for cut in cuts:
        sink.feed(data[:cut])
        data = data[cut:]
    sink.feed(data)
    assert sink.messages == messages
    assert sink.invitations == invitations


@pytest.mark.parametrize(
    "data",
    [b"\xff\xff\xff\xff", prefix([1 << 50]), prefix([LENT | 1 << 50]), prefix([(LENT - 1) | LENT, 1]), prefix([1] * 11)],
    ids=len,
)
def test_what_exceeds_the_limits_is_refused(data: bytes) -> None:
    with pytest.raises(ProtocolError, match="the limits are 10 frames and 1048576 bytes"):
        Sink(Limits(frames=10, message_bytes=1 << 20)).feed(data)


def test_a_reference_that_means_nothing_ends_the_stream() -> None:
    def refuse(content: memoryview) -> NoReturn:
        raise ProtocolError("nothing is shared")

    data = stream([b"x" * 7], lent=[0])
    reader = StreamReader(refuse, refuse)
    reader.space()[0][: len(data)] = data
    with pytest.raises(ProtocolError, match="nothing is shared"):
        reader.took(len(data))
    data = invitation(b"x" * REFERENCE_BYTES)
    reader = StreamReader(refuse, refuse)
    reader.space()[0][: len(data)] = data
    with pytest.raises(ProtocolError, match="nothing is shared"):
        reader.took(len(data))


def test_many_frames_make_a_long_prefix() -> None:
    frames = [struct.pack("<I", i) for i in range(20_000)]
    sink = Sink()
    sink.feed(stream(frames))
    assert sink.messages == [frames]
