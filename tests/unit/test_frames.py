"""`zmqagent.wire.frames`: what is encoded is decoded, and nothing else is."""

from __future__ import annotations

import contextlib
import dataclasses
import re
import tracemalloc
from typing import Any

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from zmqagent.exceptions import InvalidTypeError, NotPicklableError, ProtocolError
from zmqagent.wire.frames import VERSION, Envelope, Label, Limits, decode, encode, read_label
from zmqagent.wire.types import MessageType, WorkerId

INT63 = st.integers(0, 2**63 - 1)
# Lone surrogates included: names of files may hold them.
TEXT = st.text(st.characters(categories=None), max_size=20)
SCALARS = (
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats(allow_nan=False) | TEXT | st.binary(max_size=20)
)
FIELDS = st.lists(st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4).map(tuple), max_leaves=8), max_size=6).map(
    tuple
)
BLOBS = st.lists(st.binary(max_size=50), max_size=4)
ENVELOPES = st.builds(
    Envelope,
    source=st.integers(0, 2**15 - 1).map(WorkerId),
    source_incarnation=INT63,
    destination_incarnation=INT63,
    call_id=INT63,
    type=st.sampled_from(MessageType),
    fields=FIELDS,
    payload=st.binary(max_size=50),
    buffers=BLOBS,
    tensors=st.lists(st.tuples(TEXT, st.integers(0, 9)), max_size=3).map(tuple),
    tensor_buffers=BLOBS,
)


def sample(**changes: Any) -> Envelope:
    return dataclasses.replace(
        Envelope(WorkerId(1), 2**62, 7, 5, MessageType.PYTHON_CALL, (True,), b"pickle", [b"ab"]), **changes
    )


def header_with(**changes: Any) -> list[bytes]:
    """The frames of a sample message whose header was altered at the given places (``_3=value``)."""
    frames = encode(sample(tensors=(("f",),), tensor_buffers=[b"data"]))
    content = list(msgpack.unpackb(frames[0]))
    for place, value in changes.items():
        content[int(place[1:])] = value
    return [msgpack.packb(content), *frames[1:]]


@given(ENVELOPES)
def test_what_is_encoded_is_decoded(envelope: Envelope) -> None:
    got = decode([bytes(frame) for frame in encode(envelope)])
    assert got == envelope


@given(ENVELOPES)
def test_the_frames_are_header_payload_buffers_and_tensor_buffers(envelope: Envelope) -> None:
    header, *body = encode(envelope)
    assert isinstance(header, bytes)
    assert body == [envelope.payload, *envelope.buffers, *envelope.tensor_buffers]


def test_payload_and_buffers_are_not_copied() -> None:
    payload, buffer, data = bytearray(b"pickle"), bytearray(b"ab"), bytearray(b"cd")
    frames = encode(sample(payload=payload, buffers=[buffer], tensors=((),), tensor_buffers=[data]))
    assert frames[1] is payload
    assert frames[2] is buffer
    assert frames[3] is data
    got = decode(frames)
    data[0] = 0
    assert got.tensor_buffers[0][0] == 0


def test_lists_arrive_as_tuples() -> None:
    assert decode(encode(sample(fields=(["a", [1, (2,)]],)))).fields == (("a", (1, (2,))),)


def test_a_lone_surrogate_and_a_pair_of_them_survive() -> None:
    text = ("caf\udce9", "\ud800", "\ud83d\ude00", "\U0001f600")
    assert decode(encode(sample(fields=text))).fields == text


@given(st.lists(st.binary(max_size=80), max_size=5))
def test_arbitrary_bytes_raise_protocol_errors_only(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError):
        decode(frames)


@given(st.binary(max_size=200))
def test_arbitrary_msgpack_behind_the_right_prefix_raises_protocol_errors_only(tail: bytes) -> None:
    prefix = encode(sample())[0][:6]
    with pytest.raises(ProtocolError):
        decode([prefix + tail, b"", b""])


JUNK: st.SearchStrategy[Any] = st.recursive(
    SCALARS | st.builds(msgpack.ExtType, st.integers(0, 127), st.binary(max_size=3)),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@given(st.integers(2, 10), JUNK)
def test_a_header_with_any_other_value_decodes_or_raises_protocol_error(place: int, value: Any) -> None:
    frames = encode(sample(tensors=(("f",),), tensor_buffers=[b"data"]))
    content = list(msgpack.unpackb(frames[0]))
    content[place] = value
    try:
        got = decode([msgpack.packb(content, unicode_errors="surrogatepass"), *frames[1:]])
    except ProtocolError:
        return
    assert decode(encode(got)) == got


@settings(max_examples=300)
@given(ENVELOPES, st.data())
def test_a_message_with_a_changed_byte_decodes_or_raises_protocol_error(envelope: Envelope, data: st.DataObject) -> None:
    header, *body = encode(envelope)
    place = data.draw(st.integers(0, len(header) - 1))
    damaged = bytearray(header)
    damaged[place] ^= data.draw(st.integers(1, 255))
    with contextlib.suppress(ProtocolError):
        decode([damaged, *body])


@given(ENVELOPES, st.data())
def test_a_message_with_a_frame_cut_grown_lost_or_repeated_is_refused(envelope: Envelope, data: st.DataObject) -> None:
    frames = encode(envelope)
    which = data.draw(st.integers(0, len(frames) - 1))
    frame = bytes(frames[which])
    replacements = [[frame + b"\0"], [], [frame, frame]] + ([[frame[:-1]]] if frame else [])
    frames[which : which + 1] = data.draw(st.sampled_from(replacements))
    with pytest.raises(ProtocolError):
        decode(frames)


@pytest.mark.parametrize("depth", [100, 600, 100_000])
def test_deep_nesting_raises_protocol_error(depth: int) -> None:
    frames = encode(sample(fields=()))
    nested = b"\x91" * depth + b"\x90"
    # The fields are the first empty array of the header.
    with pytest.raises(ProtocolError):
        decode([frames[0].replace(b"\x90", nested, 1), *frames[1:]])


@pytest.mark.parametrize("place", range(2, 11))
@pytest.mark.parametrize("depth", [31, 600, 1020, 100_000])
def test_deep_nesting_anywhere_raises_nothing_but_protocol_error(place: int, depth: int) -> None:
    frames = encode(sample(tensors=(("f",),), tensor_buffers=[b"data"]))
    content = [msgpack.packb(value) for value in msgpack.unpackb(frames[0])]
    content[place] = b"\x91" * depth + b"\x90"
    with contextlib.suppress(ProtocolError):
        decode([b"\x9b" + b"".join(content), *frames[1:]])


def test_a_header_whose_arrays_claim_much_takes_no_more_memory_than_a_few_times_its_size() -> None:
    header = encode(sample())[0]
    size = 1 << 20
    # As many arrays as msgpack allows within each other, each of which claims to be as long as the header.
    claims = b"".join(b"\xdd" + size.to_bytes(4, "big") for _ in range(900))
    tracemalloc.start()
    try:
        with pytest.raises(ProtocolError, match="no valid msgpack"):
            decode([header[:-6] + claims + bytes(size), b"", b""])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 8 * size


def test_the_label_of_a_message_survives_whatever_follows_it() -> None:
    frames = encode(sample(source=WorkerId(7), type=MessageType.PYTHON_RET))
    wanted = Label(WorkerId(7), 2**62, 7, 5, MessageType.PYTHON_RET)
    header = frames[0]
    seen = [read_label([header[:size]]) for size in range(len(header) + 1)]
    shortest = seen.index(wanted)
    assert shortest < len(header) - 6
    assert seen == [None] * shortest + [wanted] * (len(header) + 1 - shortest)
    assert read_label([header[:shortest] + b"\xc1" * 1000, b"anything"]) == wanted


def test_the_label_says_who_waits() -> None:
    for kind, waits_for_answer, answers in (
        (MessageType.PYTHON_CALL, True, False),
        (MessageType.GOODBYE, False, False),
        (MessageType.PYTHON_RET, False, True),
        (0x1FE, True, False),
        (0x2FE, False, True),
        (0x0FE, False, False),
    ):
        label = Label(WorkerId(0), 1, 2, 3, kind)
        assert (label.is_request, label.is_response) == (waits_for_answer, answers)


@given(st.lists(st.binary(max_size=80), max_size=3) | ENVELOPES.map(encode), st.data())
def test_reading_a_label_raises_nothing_and_gives_what_fits(frames: list[bytes], data: st.DataObject) -> None:
    if frames and frames[0]:
        damaged = bytearray(frames[0])
        damaged[data.draw(st.integers(0, len(damaged) - 1))] ^= data.draw(st.integers(0, 255))
        frames[0] = bytes(damaged)
    label = read_label(frames)
    if label is not None:
        assert all(type(value) is int and 0 <= value < 1 << 63 for value in label)
        assert label.source < 1 << 15


def test_fields_may_nest_as_deep_as_the_limit_says() -> None:
    value: tuple[Any, ...] = ()
    for _ in range(3):
        value = (value,)
    assert decode(encode(sample(fields=value)), Limits(depth=4)).fields == value
    with pytest.raises(ProtocolError, match="nested too deeply"):
        decode(encode(sample(fields=value)), Limits(depth=3))


def test_another_version_is_told_from_garbage() -> None:
    header, *body = encode(sample())
    other = bytearray(header)
    other[5] = VERSION + 1
    text = f"protocol version {VERSION + 1} arrived, and this worker speaks version {VERSION}: run the same release"
    with pytest.raises(ProtocolError, match=text):
        decode([other, *body])
    with pytest.raises(ProtocolError, match="no message of zmqagent: they begin with b'GET / '"):
        decode([b"GET / HTTP/1.1\r\n", b""])


@pytest.mark.parametrize("frames", [[], [b"\x9b"]])
def test_a_message_has_header_and_payload(frames: list[bytes]) -> None:
    with pytest.raises(ProtocolError, match=f"at least 2 frames, {len(frames)} arrived"):
        decode(frames)


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"_2": -1}, "the source is an integer from 0 to 32767, -1 arrived"),
        ({"_2": 1 << 15}, "the source is an integer"),
        ({"_3": True}, "the source incarnation is an integer"),
        ({"_4": 1 << 63}, "the destination incarnation is an integer"),
        ({"_5": 1.5}, "the call id is an integer"),
        ({"_6": 0xFFFF}, "message type 65535 from worker 1 is unknown to protocol version"),
        ({"_6": "x"}, "message type 'x' from worker 1 is unknown"),
        ({"_7": 3}, "fields and tensor descriptions of a PYTHON_CALL message are arrays"),
        ({"_10": None}, "fields and tensor descriptions of a PYTHON_CALL message are arrays"),
        ({"_7": [{}]}, "a header holds no maps"),
        ({"_7": [msgpack.ExtType(5, b"")]}, "a header holds no extension types, 5 arrived"),
        ({"_8": 3}, "the number of out-of-band buffers is an integer from 0 to 2, 3 arrived"),
        ({"_9": [6, 2, 5]}, r"declares frames of sizes \(6, 2, 5\), but \(6, 2, 4\) arrived"),
        ({"_9": [6, 2]}, r"declares frames of sizes \(6, 2\), but \(6, 2, 4\) arrived"),
    ],
)
def test_a_wrong_value_in_the_header_is_named(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ProtocolError, match=text):
        decode(header_with(**changes))


def test_a_header_with_too_few_values_is_refused() -> None:
    frames = encode(sample())
    short = msgpack.packb(msgpack.unpackb(frames[0])[:-1])
    with pytest.raises(ProtocolError, match=r"they begin with"):
        decode([short, *frames[1:]])


def test_a_header_that_is_cut_short_or_too_long_is_refused() -> None:
    header, *body = encode(sample())
    for wrong in (header[:-1], header + b"\0"):
        with pytest.raises(ProtocolError, match="no valid msgpack"):
            decode([wrong, *body])


@pytest.mark.parametrize(
    ("limits", "text"),
    [
        (Limits(header_bytes=10), "a header of [0-9]+ bytes, the limit is 10"),
        (Limits(frames=2), "3 frames, the limit is 2"),
        (Limits(message_bytes=30), "[0-9]+ bytes, the limit is 30"),
    ],
)
def test_limits_hold_on_both_sides(limits: Limits, text: str) -> None:
    with pytest.raises(NotPicklableError, match=f"the PYTHON_CALL message would have {text}; send fewer"):
        encode(sample(), limits)
    with pytest.raises(ProtocolError, match=text):
        decode(encode(sample()), limits)


@pytest.mark.parametrize("value", [{1}, object(), 1 << 64, 1j])
def test_a_field_that_is_no_plain_value_is_refused_where_it_is_sent(value: Any) -> None:
    with pytest.raises(InvalidTypeError, match=re.escape("a PYTHON_CALL message carries None, bool")):
        encode(sample(fields=(value,)))
