"""Which messages are one message, sent again.

Pure. What a sender draws anew at every attempt does not count: the ids of an RRef that a call creates, of a backward pass, and of
the shares in RRefs among the arguments of a call. Neither do tensors and other buffers, which travel beside the pickle.
"""

from __future__ import annotations

import hashlib
import io
import pickletools
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from zmqagent.wire.commands import BackwardAutograd, PythonRemoteCall, ScriptRemoteCall, parse
from zmqagent.wire.types import ForkId, Message, RRefId

__all__ = ["identity"]

_RREF = b"receive_rref"
"""What an RRef in a pickle names as its constructor."""

_INTEGER = r"[KMJ\x8a]"
_MEMOIZE = r"[\x94qr]?"
_SHARE = re.compile(
    rf"\({_INTEGER}{{3}}(?P<fork_id>{_INTEGER}{{2}}){_INTEGER}[\x8cXhj]{_MEMOIZE}t{_MEMOIZE}\x85{_MEMOIZE}R", re.DOTALL
)
"""A function is called with one `ForkData`, as pickle's opcodes have it: each is one character here, without its argument."""

_FRAME = "\x95"


def identity(message: Message) -> bytes:
    """16 bytes, equal for messages of one type that are attempts to send one message.

    Raises:
        ProtocolError: ``message`` does not have the fields of its type.
    """
    # Payloads may be large, and tables of identities live as long as the worker.
    digest = hashlib.blake2b(_encoded(_without_drawn_ids(message).fields), digest_size=16)
    for part in _parts(bytes(message.payload)):
        digest.update(part)
    return digest.digest()


def _without_drawn_ids(message: Message) -> Message:
    command = parse(message)
    if isinstance(command, PythonRemoteCall | ScriptRemoteCall):
        return replace(command, rref_id=RRefId(0, 0), fork_id=ForkId(0, 0)).to_message()
    if isinstance(command, BackwardAutograd):
        return replace(command, pass_id=0).to_message()
    return message


def _parts(payload: bytes) -> Iterator[bytes]:
    """``payload``, cut up; without the ids of forks, if it is a pickle that has any."""
    if _RREF not in payload:
        yield payload
        return
    file = io.BytesIO(payload)
    try:
        # The lengths of frames depend on how large the ids are.
        operations = [(op.code, arg) for op, arg, _ in pickletools.genops(file) if op.code != _FRAME]
    except ValueError:
        # A user's pickler may write anything.
        yield payload
        return
    shares = _SHARE.finditer("".join(code for code, _ in operations))
    drawn = {number for share in shares for number in range(*share.span("fork_id"))}
    for number, operation in enumerate(operations):
        if number not in drawn:
            yield _encoded(operation)
    # Such a pickler may also add something.
    yield file.read()


def _encoded(value: tuple[Any, ...]) -> bytes:
    return repr(value).encode("utf-8", "surrogatepass")
