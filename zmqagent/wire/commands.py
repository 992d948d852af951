"""One small class a message type, to and from `Message`.

Pure. A command says what is asked or answered in the terms of torch's RPC; `Message` is the same in a shape that `frames` can
put on the wire. What runs functions and answers is here, the rest in the modules that this one imports.

`parse` turns a received `Message` into its command and raises `ProtocolError` if the message does not fit: fields too many, too
few, of other types or out of range, or a body that its type does not have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ClassVar

from zmqagent.exceptions import ProtocolError
from zmqagent.wire.autograd_commands import AbortBackward, BackwardAutograd, CleanupContexts
from zmqagent.wire.fields import take, take_bare, take_shares, to_fork_id, to_rref_id
from zmqagent.wire.frozen import frozen
from zmqagent.wire.group_commands import Barrier, BarrierPassed, Goodbye, Join, Leave
from zmqagent.wire.rref_commands import RRefBackward, RRefChildAccept, RRefFetch, RRefForkRequest, RRefUserDelete, RRefUserDeletes
from zmqagent.wire.types import ForkData, ForkId, Message, MessageType, RRefId
from zmqagent.wire.wrappers import ForwardAutograd, ProfiledReturn, RunWithProfiling

__all__ = [
    "AbortBackward",
    "Ack",
    "BackwardAutograd",
    "Barrier",
    "BarrierPassed",
    "CleanupContexts",
    "Command",
    "Failure",
    "ForwardAutograd",
    "Goodbye",
    "Join",
    "Leave",
    "Pickled",
    "ProfiledReturn",
    "PythonCall",
    "PythonRemoteCall",
    "RRefBackward",
    "RRefChildAccept",
    "RRefFetch",
    "RRefForkRequest",
    "RRefUserDelete",
    "RRefUserDeletes",
    "RemoteReturn",
    "Return",
    "RunWithProfiling",
    "ScriptCall",
    "ScriptRemoteCall",
    "parse",
]


@frozen
class Pickled:
    """An object as the RPC pickler leaves it: the pickle, its out-of-band buffers, and the tensors taken out of it."""

    payload: bytes | bytearray | memoryview = b""
    buffers: Sequence[Any] = ()
    tensors: Sequence[Any] = ()


def _message(type: MessageType, fields: tuple[Any, ...], body: Pickled) -> Message:
    return Message(type, fields, body.payload, body.buffers, body.tensors)


def _body(message: Message) -> Pickled:
    return Pickled(message.payload, message.buffers, message.tensors)


@frozen
class PythonCall:
    """Run a pickled function; ``body`` is a pickled tuple of it, its arguments and its named arguments."""

    type: ClassVar[MessageType] = MessageType.PYTHON_CALL
    body: Pickled
    is_async: bool

    def to_message(self) -> Message:
        return _message(self.type, (self.is_async,), self.body)

    @classmethod
    def from_message(cls, message: Message) -> PythonCall:
        (is_async,) = take(message, bool)
        return cls(_body(message), is_async)


@frozen
class ScriptCall:
    """Run a builtin operator (``aten::add``) or a TorchScript function by its qualified name; ``body`` pickles (args, kwargs)."""

    type: ClassVar[MessageType] = MessageType.SCRIPT_CALL
    body: Pickled
    name: str
    is_builtin: bool
    is_async: bool

    def to_message(self) -> Message:
        return _message(self.type, (self.name, self.is_builtin, self.is_async), self.body)

    @classmethod
    def from_message(cls, message: Message) -> ScriptCall:
        name, is_builtin, is_async = take(message, str, bool, bool)
        return cls(_body(message), name, is_builtin, is_async)


@frozen
class Return:
    """The result of a `PythonCall`, a `ScriptCall` or an `RRefFetch`, pickled. ``shares`` are those in the pickle once more, for
    a receiver that cannot use the result, and gives them back."""

    type: ClassVar[MessageType] = MessageType.PYTHON_RET
    body: Pickled
    shares: tuple[ForkData, ...] = ()

    def to_message(self) -> Message:
        return _message(self.type, (self.shares,), self.body)

    @classmethod
    def from_message(cls, message: Message) -> Return:
        return cls(_body(message), take_shares(message))


@frozen
class PythonRemoteCall:
    """Run a pickled function and keep its result as the OwnerRRef ``rref_id``; ``fork_id`` is the caller's share."""

    type: ClassVar[MessageType] = MessageType.PYTHON_REMOTE_CALL
    body: Pickled
    is_async: bool
    rref_id: RRefId
    fork_id: ForkId

    def to_message(self) -> Message:
        return _message(self.type, (self.is_async, *self.rref_id, *self.fork_id), self.body)

    @classmethod
    def from_message(cls, message: Message) -> PythonRemoteCall:
        is_async, a, b, c, d = take(message, bool, int, int, int, int)
        return cls(_body(message), is_async, to_rref_id(a, b), to_fork_id(c, d))


@frozen
class ScriptRemoteCall:
    """`ScriptCall` whose result is kept as the OwnerRRef ``rref_id``."""

    type: ClassVar[MessageType] = MessageType.SCRIPT_REMOTE_CALL
    body: Pickled
    name: str
    is_builtin: bool
    is_async: bool
    rref_id: RRefId
    fork_id: ForkId

    def to_message(self) -> Message:
        fields = (self.name, self.is_builtin, self.is_async, *self.rref_id, *self.fork_id)
        return _message(self.type, fields, self.body)

    @classmethod
    def from_message(cls, message: Message) -> ScriptRemoteCall:
        name, is_builtin, is_async, a, b, c, d = take(message, str, bool, bool, int, int, int, int)
        return cls(_body(message), name, is_builtin, is_async, to_rref_id(a, b), to_fork_id(c, d))


@frozen
class RemoteReturn:
    """The function has ended and the owner holds its value, or its error, as the RRef."""

    type: ClassVar[MessageType] = MessageType.REMOTE_RET
    rref_id: RRefId
    fork_id: ForkId

    def to_message(self) -> Message:
        return Message(self.type, (*self.rref_id, *self.fork_id))

    @classmethod
    def from_message(cls, message: Message) -> RemoteReturn:
        a, b, c, d = take_bare(message, int, int, int, int)
        return cls(to_rref_id(a, b), to_fork_id(c, d))


@frozen
class Ack:
    """The plain answer to a request that has no result; ``type`` is the response type that belongs to the request."""

    type: MessageType = MessageType.RREF_ACK

    def to_message(self) -> Message:
        return Message(self.type)

    @classmethod
    def from_message(cls, message: Message) -> Ack:
        take_bare(message)
        return cls(message.type)


@frozen
class Failure:
    """The request failed. ``code`` is an error class of `zmqagent.exceptions` (0: a user function raised). ``body`` then
    pickles the exception's type; ``type_name`` names it for a reader who cannot unpickle it. ``text`` is the whole story."""

    type: ClassVar[MessageType] = MessageType.EXCEPTION
    code: int
    type_name: str
    text: str
    body: Pickled = Pickled()

    def to_message(self) -> Message:
        return _message(self.type, (self.code, self.type_name, self.text), self.body)

    @classmethod
    def from_message(cls, message: Message) -> Failure:
        code, type_name, text = take(message, int, str, str)
        return cls(code, type_name, text, _body(message))


Command = (
    PythonCall
    | ScriptCall
    | Return
    | PythonRemoteCall
    | ScriptRemoteCall
    | RemoteReturn
    | RRefFetch
    | RRefUserDeletes
    | RRefForkRequest
    | RRefChildAccept
    | ForwardAutograd
    | RunWithProfiling
    | ProfiledReturn
    | BackwardAutograd
    | AbortBackward
    | CleanupContexts
    | RRefBackward
    | Ack
    | Failure
    | Barrier
    | BarrierPassed
    | Goodbye
    | Join
    | Leave
)

_PARSERS: dict[MessageType, Callable[[Message], Command]] = {
    MessageType.PYTHON_CALL: PythonCall.from_message,
    MessageType.PYTHON_RET: Return.from_message,
    MessageType.SCRIPT_CALL: ScriptCall.from_message,
    MessageType.PYTHON_REMOTE_CALL: PythonRemoteCall.from_message,
    MessageType.SCRIPT_REMOTE_CALL: ScriptRemoteCall.from_message,
    MessageType.REMOTE_RET: RemoteReturn.from_message,
    MessageType.PYTHON_RREF_FETCH_CALL: RRefFetch.from_message,
    MessageType.RREF_USER_DELETE: RRefUserDeletes.from_message,
    MessageType.RREF_FORK_REQUEST: RRefForkRequest.from_message,
    MessageType.RREF_CHILD_ACCEPT: RRefChildAccept.from_message,
    MessageType.RREF_ACK: Ack.from_message,
    MessageType.FORWARD_AUTOGRAD_REQ: ForwardAutograd.from_message,
    MessageType.FORWARD_AUTOGRAD_RESP: ForwardAutograd.from_message,
    MessageType.RUN_WITH_PROFILING_REQ: RunWithProfiling.from_message,
    MessageType.RUN_WITH_PROFILING_RESP: ProfiledReturn.from_message,
    MessageType.BACKWARD_AUTOGRAD_REQ: BackwardAutograd.from_message,
    MessageType.BACKWARD_AUTOGRAD_RESP: Ack.from_message,
    MessageType.ABORT_BACKWARD_REQ: AbortBackward.from_message,
    MessageType.ABORT_BACKWARD_RESP: Ack.from_message,
    MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ: CleanupContexts.from_message,
    MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP: Ack.from_message,
    MessageType.RREF_BACKWARD_REQ: RRefBackward.from_message,
    MessageType.RREF_BACKWARD_RESP: Ack.from_message,
    MessageType.EXCEPTION: Failure.from_message,
    MessageType.BARRIER_REQ: Barrier.from_message,
    MessageType.BARRIER_RESP: BarrierPassed.from_message,
    MessageType.GOODBYE: Goodbye.from_message,
    MessageType.JOIN_REQ: Join.from_message,
    MessageType.JOIN_RESP: Ack.from_message,
    MessageType.LEAVE_REQ: Leave.from_message,
    MessageType.LEAVE_RESP: Ack.from_message,
}


def parse(message: Message) -> Command:
    """The command that ``message`` carries.

    Raises:
        ProtocolError: the type has no command, or the fields do not fit it.
    """
    parser = _PARSERS.get(message.type)
    if parser is None:
        raise ProtocolError(f"no command is defined for messages of type {message.type.name}")
    return parser(message)
