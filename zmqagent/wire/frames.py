"""A message to and from the list of buffers that travels.

Pure: bytes in, bytes out; tensors are buffers and descriptions here, and nothing is known of sockets, threads, clocks or torch.

The frames of a message are, in order: the header, the payload (one pickle, possibly empty), the pickle's out-of-band buffers,
the tensors' buffers. The header is one msgpack array::

    [MAGIC, VERSION, source, source incarnation, destination incarnation, call id, message type,
     fields, number of out-of-band buffers, sizes of all frames after the header, tensor descriptions]

Its first six bytes (the array's marker, `MAGIC`, `VERSION`) keep their place in every version, so that a worker of another
release is told apart from garbage. `decode` raises `ProtocolError` and nothing else, whatever arrives, and takes no more memory
than a small multiple of what arrived. Of a message that it refuses, `read_label` still tells whose it is if it can.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import msgpack

from zmqagent.exceptions import InvalidTypeError, NotPicklableError, ProtocolError
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import MAX_INT, MAX_WORKER_ID, REQUEST_BIT, RESPONSE_BIT, MessageType, WorkerId, shown

__all__ = ["DEFAULT_LIMITS", "VERSION", "Envelope", "Label", "Limits", "decode", "encode", "read_label"]

VERSION = 1
"""The version of the protocol. It changes whenever a worker of the last release could misread a message of this one."""

_MAGIC = "zmq"
_LENGTH = 11
_PREFIX = bytes([0x90 | _LENGTH]) + msgpack.packb(_MAGIC) + bytes([VERSION])
_TYPES = {int(t): t for t in MessageType}
# What msgpack takes for a header at first. Ordinary ones have 40 to 200 bytes; its default of 256 KB costs more than the packing.
_BUFFER_SIZE = 1024
# Of a header beyond this size the structure is checked before any of it is built.
_LARGE_HEADER = 4096
# The values before the fields take 39 bytes at most.
_LABEL_BYTES = 48


@dataclass(frozen=True, slots=True)
class Limits:
    """What a message may hold at most. They stop a broken or hostile peer before its numbers are believed; the defaults lie far
    above what any real message needs, and both sides of a group must agree on them."""

    header_bytes: int = 1 << 26
    frames: int = 1 << 20
    message_bytes: int = 1 << 40
    depth: int = 32


DEFAULT_LIMITS = Limits()


@frozen
class Envelope:
    """One message with everything its receiver must know.

    ``source`` with ``source_incarnation`` names the sender for ever; ``destination_incarnation`` is the receiver the sender meant
    (0: unknown), so that a restarted worker does not take its predecessor's mail. ``call_id`` is the request's number, drawn by
    the caller; its answer bears the same. ``tensors`` describes tensors by tuples of plain values, and ``tensor_buffers`` holds
    their bytes. The rest is as in `Message`. Decoded envelopes hold flat ``memoryview`` objects of the frames they came in.
    """

    source: WorkerId
    source_incarnation: int
    destination_incarnation: int
    call_id: int
    type: MessageType
    fields: tuple[Any, ...] = ()
    payload: bytes | bytearray | memoryview = b""
    buffers: Sequence[Any] = ()
    tensors: Sequence[Any] = ()
    tensor_buffers: Sequence[Any] = ()


class Label(NamedTuple):
    """What the beginning of a header says of a message that cannot be read as a whole. ``type`` may be a number that is unknown
    here; the rest is as in `Envelope`."""

    source: WorkerId
    source_incarnation: int
    destination_incarnation: int
    call_id: int
    type: int

    @property
    def is_request(self) -> bool:
        """Whether its sender waits for an answer."""
        return bool(self.type & REQUEST_BIT) and self.type != MessageType.GOODBYE

    @property
    def is_response(self) -> bool:
        """Whether it is an answer."""
        return not self.type & REQUEST_BIT and bool(self.type & RESPONSE_BIT)


def encode(envelope: Envelope, limits: Limits = DEFAULT_LIMITS) -> list[Any]:
    """The frames of ``envelope``. Payload and buffers are passed on, not copied.

    Raises:
        InvalidTypeError: a field is no plain value (see `Message.fields`).
        NotPicklableError: the message exceeds ``limits``.
    """
    body = [envelope.payload, *envelope.buffers, *envelope.tensor_buffers]
    sizes = [memoryview(frame).nbytes for frame in body]
    content = (
        _MAGIC,
        VERSION,
        envelope.source,
        envelope.source_incarnation,
        envelope.destination_incarnation,
        envelope.call_id,
        envelope.type,
        envelope.fields,
        len(envelope.buffers),
        sizes,
        envelope.tensors,
    )
    try:
        # Python's default handler refuses lone surrogates, which file names and user strings may hold. A packer for each message:
        # one shared between threads would have to be locked, and that costs as much as making one.
        header = msgpack.Packer(unicode_errors="surrogatepass", buf_size=_BUFFER_SIZE).pack(content)
    except (TypeError, ValueError, OverflowError) as error:
        raise InvalidTypeError(
            f"a {envelope.type.name} message carries None, bool, 64-bit int, float, str, bytes and sequences of them: {error}"
        ) from error
    excess = _excess(limits, len(header), len(body) + 1, sum(sizes))
    if excess:
        raise NotPicklableError(
            f"the {envelope.type.name} message would have {excess}; send fewer or smaller objects, or split the call"
        )
    body.insert(0, header)
    return body


def decode(frames: Sequence[Any], limits: Limits = DEFAULT_LIMITS) -> Envelope:
    """The envelope that ``frames`` (objects with the buffer protocol, flat bytes) carry. Nothing is copied but the header.

    Raises:
        ProtocolError: these are no frames of a message of this `VERSION`, or they exceed ``limits``.
    """
    if len(frames) < 2:
        raise ProtocolError(f"a message has at least 2 frames, {len(frames)} arrived")
    header, *body = [memoryview(frame) for frame in frames]
    sizes = tuple([frame.nbytes for frame in body])
    excess = _excess(limits, header.nbytes, len(frames), sum(sizes))
    if excess:
        raise ProtocolError(f"a message with {excess} arrived")
    if header[: len(_PREFIX)] != _PREFIX:
        _refuse_prefix(bytes(header[: len(_PREFIX)]))
    # The prefix has told that this is an array of so many values.
    content = _unpack(header)
    source, source_incarnation, destination_incarnation, call_id, number, fields, count, declared, tensors = content[2:]
    _check_number("source", source, MAX_WORKER_ID)
    _check_number("source incarnation", source_incarnation)
    _check_number("destination incarnation", destination_incarnation)
    _check_number("call id", call_id)
    kind = _TYPES.get(number) if type(number) is int else None
    if kind is None:
        raise ProtocolError(f"message type {shown(number)} from worker {source} is unknown to protocol version {VERSION}")
    if type(fields) is not tuple or type(tensors) is not tuple:
        raise ProtocolError(f"fields and tensor descriptions of a {kind.name} message are arrays")
    _check_depth(fields, limits.depth)
    _check_number("number of out-of-band buffers", count, len(body) - 1)
    if declared != sizes:
        raise ProtocolError(f"a {kind.name} message declares frames of sizes {shown(declared)}, but {shown(sizes)} arrived")
    return Envelope(
        source,
        source_incarnation,
        destination_incarnation,
        call_id,
        kind,
        fields,
        body[0],
        body[1 : count + 1],
        tensors,
        body[count + 1 :],
    )


def read_label(frames: Sequence[Any]) -> Label | None:
    """Whose message it is that `decode` refuses, and for which call; None if the header does not say. Never raises.

    The header may be cut anywhere behind that, and whatever follows may be wrong.
    """
    if not frames:
        return None
    start = bytes(memoryview(frames[0])[:_LABEL_BYTES])
    if not start.startswith(_PREFIX):
        return None
    unpacker = msgpack.Unpacker(use_list=False, max_buffer_size=_LABEL_BYTES)
    unpacker.feed(start[len(_PREFIX) :])
    try:
        label = Label(*[unpacker.unpack() for _ in Label._fields])
    except (ValueError, msgpack.UnpackException, RecursionError):
        return None
    is_valid = all(type(value) is int and 0 <= value <= MAX_INT for value in label) and label.source <= MAX_WORKER_ID
    return label if is_valid else None


def _excess(limits: Limits, header_bytes: int, frames: int, body_bytes: int) -> str:
    """What is too large, in words; empty if nothing is."""
    if header_bytes > limits.header_bytes:
        return f"a header of {header_bytes} bytes, the limit is {limits.header_bytes}"
    if frames > limits.frames:
        return f"{frames} frames, the limit is {limits.frames}"
    if header_bytes + body_bytes > limits.message_bytes:
        return f"{header_bytes + body_bytes} bytes, the limit is {limits.message_bytes}"
    return ""


def _refuse_prefix(prefix: bytes) -> NoReturn:
    version = prefix[5] if len(prefix) == len(_PREFIX) else 0
    if prefix[1:5] == _PREFIX[1:5] and version != VERSION:
        raise ProtocolError(
            f"a message of protocol version {version} arrived, and this worker speaks version {VERSION}: run the same release of "
            "zmqagent on all workers"
        )
    raise ProtocolError(f"these bytes are no message of zmqagent: they begin with {prefix!r}")


def _refuse_map(_: Any) -> NoReturn:
    raise ProtocolError("a header holds no maps")


def _refuse_extension(code: int, _: bytes) -> NoReturn:
    raise ProtocolError(f"a header holds no extension types, {code} arrived")


def _unpack(header: memoryview) -> Any:
    try:
        if header.nbytes > _LARGE_HEADER:
            # msgpack takes memory for as many values as an array claims to have, at each level: a short header could claim much.
            skimmer = msgpack.Unpacker(max_buffer_size=header.nbytes)
            skimmer.feed(header)
            skimmer.skip()
        return msgpack.unpackb(
            header,
            use_list=False,
            raw=False,
            strict_map_key=True,
            unicode_errors="surrogatepass",
            max_map_len=0,
            max_ext_len=0,
            object_hook=_refuse_map,
            ext_hook=_refuse_extension,
        )
    except (ValueError, msgpack.UnpackException, RecursionError) as error:
        # msgpack's own errors: cut short, too long, bad UTF-8, a map, nested too deeply.
        raise ProtocolError(f"the header is no valid msgpack: {type(error).__name__}: {error}") from error


def _check_number(name: str, value: Any, largest: int = MAX_INT) -> None:
    # bool is an int to isinstance, yet never a number here.
    if type(value) is not int or not 0 <= value <= largest:
        raise ProtocolError(f"the {name} is an integer from 0 to {largest}, {shown(value)} arrived")


def _check_depth(value: tuple[Any, ...], left: int) -> None:
    if not left:
        raise ProtocolError("the fields are nested too deeply")
    for item in value:
        if type(item) is tuple:
            _check_depth(item, left - 1)
