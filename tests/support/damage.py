"""Ways to damage a message, whatever its type: each gives frames that no receiver may take for the message they were made of.

Frames are cut, grown, lost and repeated; headers are written anew with one wrong value; well-formed messages hold what their type
does not have.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import msgpack

from zmqagent.wire.types import Message

__all__ = ["Damage", "all_damages", "flip_bits", "label_of"]

_JUNK: tuple[Any, ...] = (None, True, -1, 1 << 63, 1.5, "x", b"x", (), ((((),),),))
_DESCRIPTION = (0, "float32", 0, "", (1,), (1,), 0, 0, 0, 4)
_HUGE = 1 << 60
_FIELDS, _TENSORS = 7, 10


Encode = Callable[[Message], list[bytes]]
"""Gives the frames of a message as its sender makes them."""


class Damage(NamedTuple):
    """One way to damage: ``apply(message, encode)`` gives the frames that arrive."""

    name: str
    apply: Callable[[Message, Encode], list[bytes]]


def label_of(frames: list[bytes]) -> bytes:
    """The beginning of a header: marker, magic, version, sender, receiver, call and type."""
    unpacker = msgpack.Unpacker(max_array_len=100)
    unpacker.feed(frames[0])
    unpacker.read_array_header()
    for _ in range(7):
        unpacker.skip()
    return frames[0][: unpacker.tell()]


def all_damages(message: Message, encode: Encode) -> list[Damage]:
    """All that this module knows for messages like ``message``."""
    frames = encode(message)
    return [*_cuts_and_growths(frames), *_rewrites(frames), *_other_contents(message)]


def _of_frames(name: str, change: Callable[[list[bytes]], list[bytes]]) -> Damage:
    return Damage(name, lambda message, encode: change(encode(message)))


def _cuts_and_growths(frames: list[bytes]) -> Iterator[Damage]:
    header, *body = frames
    for size in range(len(header)):
        yield _of_frames(f"header cut to {size}", lambda frames, size=size: [frames[0][:size], *frames[1:]])
    yield _of_frames("header grown", lambda frames: [frames[0] + b"\0", *frames[1:]])
    yield _of_frames("header alone", lambda frames: frames[:1])
    yield _of_frames("no header", lambda frames: frames[1:])
    yield _of_frames("last frame lost", lambda frames: frames[:-1])
    yield _of_frames("a frame more", lambda frames: [*frames, b"more"])
    yield _of_frames("an empty frame more", lambda frames: [*frames, b""])
    yield _of_frames("a thousand frames more", lambda frames: [*frames, *[b""] * 1000])
    for place, frame in enumerate(body, 1):
        sizes = range(len(frame)) if len(frame) <= 32 else (0, 1, len(frame) // 2, len(frame) - 1)
        for size in sizes:
            yield _of_frames(
                f"frame {place} cut to {size}", lambda f, place=place, size=size: [*f[:place], f[place][:size], *f[place + 1 :]]
            )
        for more in (1, 1 << 16):
            yield _of_frames(
                f"frame {place} grown by {more}",
                lambda f, place=place, more=more: [*f[:place], f[place] + bytes(more), *f[place + 1 :]],
            )


def _rewrites(frames: list[bytes]) -> Iterator[Damage]:
    def rewritten(frames: list[bytes], place: int, value: Any) -> list[bytes]:
        content = list(msgpack.unpackb(frames[0], use_list=False))
        content[place] = value
        return [msgpack.packb(content), *frames[1:]]

    content = msgpack.unpackb(frames[0], use_list=False)
    for place in range(len(content)):
        for value in (*_JUNK, {}, {"a": 1}, msgpack.ExtType(1, b"x"), [_HUGE], [[_HUGE] * 5]):
            # An array may be right where there is one.
            if type(value) in (tuple, list) and (place == _FIELDS or not (value or content[place])):
                continue
            yield _of_frames(
                f"place {place} is {value!r}", lambda frames, place=place, value=value: rewritten(frames, place, value)
            )
    for depth in (31, 600, 1020, 100_000):
        nested = b"\x91" * depth + b"\x90"
        for place in range(2, len(content)):
            yield _of_frames(
                f"place {place} is nested {depth} deep",
                lambda frames, place=place, nested=nested: [_with_raw(frames[0], place, nested), *frames[1:]],
            )
    yield _of_frames(
        "arrays that claim much", lambda frames: [_with_raw(frames[0], _FIELDS, b"\xdd\x00\x01\x00\x00" * 300), *frames[1:]]
    )


def _with_raw(header: bytes, place: int, raw: bytes) -> bytes:
    content = msgpack.unpackb(header, use_list=False)
    parts = [raw if number == place else msgpack.packb(value) for number, value in enumerate(content)]
    return header[:1] + b"".join(parts)


def _other_contents(message: Message) -> Iterator[Damage]:
    def changed(name: str, **changes: Any) -> Damage:
        return Damage(name, lambda message, encode: encode(dataclasses.replace(message, **changes)))

    fields = message.fields
    yield changed("a field more", fields=(*fields, 1))
    yield changed("a thousand fields more", fields=(*fields, *range(1000)))
    for place, field in enumerate(fields):
        yield changed(f"field {place} missing", fields=(*fields[:place], *fields[place + 1 :]))
        # What is wrong inside a wrapped answer is found by whoever unwraps it.
        if type(field) is tuple and message.type.is_request:
            yield changed(f"field {place} grown", fields=(*fields[:place], (*field, None), *fields[place + 1 :]))
        for value in _JUNK:
            if type(value) is type(field) and not (type(value) is int and not 0 <= value < 1 << 63):
                continue
            yield changed(f"field {place} is {value!r}", fields=(*fields[:place], value, *fields[place + 1 :]))
    if not message.payload:
        yield changed("a pickle", payload=b"N.")
        yield changed("a buffer", buffers=(b"buffer",))
    for name, description in {
        "an unknown kind": (99,),
        "no kind": None,
        "huge sizes": (0, "float32", 0, "", (_HUGE,), (1,), 0, 0, 0, 4),
        "a huge place": (0, "float32", 0, "", (1,), (1,), _HUGE, _HUGE, _HUGE, _HUGE),
        "a huge stride": (0, "float32", 0, "", (2,), (_HUGE,), 0, 0, 0, 4),
        "huge indices": (2, 0, (4,), (0, "int64", 0, "", (1, _HUGE), (0, 0), 0, 0, 0, 8), _DESCRIPTION),
        "a thousand dimensions": (0, "float32", 0, "", (1,) * 1000, (1,) * 1000, 0, 0, 0, 4),
        "an unknown dtype": (0, "float33", 0, "", (1,), (1,), 0, 0, 0, 4),
        "another device": (0, "float32", 0, "cuda:99", (1,), (1,), 0, 0, 0, 4),
        "a deep one": ((((((0,),),),),),),
    }.items():
        yield _of_frames(f"a tensor of {name}", lambda frames, d=description: _with_tensors(frames, (d,)))


def _with_tensors(frames: list[bytes], descriptions: Any) -> list[bytes]:
    content = list(msgpack.unpackb(frames[0], use_list=False))
    content[_TENSORS] = descriptions
    return [msgpack.packb(content), *frames[1:]]


def flip_bits(frames: list[bytes], rng: random.Random, frame: int) -> list[bytes]:
    """``frames`` with one to three bits of one frame changed."""
    flipped = bytearray(frames[frame])
    for _ in range(rng.randint(1, 3)):
        flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
    return [*frames[:frame], bytes(flipped), *frames[frame + 1 :]]
