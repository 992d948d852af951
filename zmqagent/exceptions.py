"""The errors zmqagent raises: one class a cause.

::

    RpcError (RuntimeError)                 code
    ├── LocalError                               this process, or its user, did something wrong
    │   ├── NotInitializedError               1  a call before init_rpc or after shutdown
    │   ├── AlreadyInitializedError           2  a second init_rpc, or a second container with another id
    │   ├── InvalidOptionError (ValueError)   3  an option, a name or a rank out of its range
    │   ├── InvalidTypeError (TypeError)      4  an argument of the wrong type
    │   ├── UnknownWorkerError                5  a destination that is no member of the group
    │   ├── RendezvousError                   6  init_rpc could not bring the group together
    │   ├── NotPicklableError (PicklingError, TypeError, AttributeError)
    │   │                                     7  arguments or a result that pickle refuses
    │   ├── RRefUsageError                    8  an RRef used against its rules
    │   ├── AutogradContextError              9  a context that is missing, or a second one on a thread
    │   ├── BackwardError                    10  roots or graph that backward cannot start from
    │   ├── DeviceMapError (ValueError)      11  a tensor on a device that no map names
    │   └── ScriptError                      12  RPC or an RRef inside TorchScript
    └── RemoteError                              a peer, or the way to it, failed
        ├── RpcTimeoutError (TimeoutError)   20  no answer within the call's timeout
        ├── WorkerLostError (ConnectionError) 21 the peer died, or left, while something waited for it
        ├── ShutdownError                    22  this agent shut down while the call was under way
        ├── ProtocolError                    23  bytes that are no message of this protocol
        ├── CalleeError (AttributeError)     24  the callee could not run the call (no such function, ...)
        │   └── UnreadableCallError          29  it could not even read the call, RRefs in it included
        ├── RemoteUserError                  25  a user function's exception that cannot be rebuilt here
        ├── RRefCreationError                26  the remote() that was to create an RRef failed
        ├── RemoteBackwardError              27  a backward pass failed on some worker
        ├── InterruptedCallError             28  ^C ended the wait for the answer
        └── SendFailedError (ConnectionError) 30 a message could not be sent just now

Every class is a ``RuntimeError``, which is what torch's own agent raises; where torch's Python layer raises something more
precise, the class is that too. ``code`` names the class on the wire, so that an error raised by a peer's agent arrives as the
same class. A user function's own exception arrives as its own type whenever that can be rebuilt (see ``rpc/failures.py``).
"""

from __future__ import annotations

import pickle
from typing import ClassVar

__all__ = [
    "AlreadyInitializedError",
    "AutogradContextError",
    "BackwardError",
    "CalleeError",
    "DeviceMapError",
    "InterruptedCallError",
    "InvalidOptionError",
    "InvalidTypeError",
    "LocalError",
    "NotInitializedError",
    "NotPicklableError",
    "ProtocolError",
    "RRefCreationError",
    "RRefUsageError",
    "RemoteBackwardError",
    "RemoteError",
    "RemoteUserError",
    "RendezvousError",
    "RpcError",
    "RpcTimeoutError",
    "ScriptError",
    "SendFailedError",
    "ShutdownError",
    "UnknownWorkerError",
    "UnreadableCallError",
    "WorkerLostError",
    "error_class",
]


class RpcError(RuntimeError):
    """The root of all errors of this package."""

    code: ClassVar[int] = 0


class LocalError(RpcError):
    """This process, or the code that called, is at fault."""


class NotInitializedError(LocalError):
    """A call before ``init_rpc`` or after ``shutdown``."""

    code = 1


class AlreadyInitializedError(LocalError):
    """Something that exists once in a process was asked for again."""

    code = 2


class InvalidOptionError(LocalError, ValueError):
    """An option, a name, a rank or a timeout lies outside its range."""

    code = 3


class InvalidTypeError(LocalError, TypeError):
    """An argument has the wrong type."""

    code = 4


class UnknownWorkerError(LocalError):
    """The destination is no member of the group."""

    code = 5


class RendezvousError(LocalError):
    """``init_rpc`` could not bring the group together."""

    code = 6


class NotPicklableError(LocalError, pickle.PicklingError, TypeError, AttributeError):
    """The arguments or the result of a call cannot be pickled. (Python's pickle raises any of the three bases for it.)"""

    code = 7


class RRefUsageError(LocalError):
    """An RRef was used where its rules forbid it."""

    code = 8


class AutogradContextError(LocalError):
    """A distributed autograd context is missing, gone, or there already."""

    code = 9


class BackwardError(LocalError):
    """The roots given to ``backward`` cannot start a pass."""

    code = 10


class DeviceMapError(LocalError, ValueError):
    """A tensor lies on a device that the device map to its destination does not name."""

    code = 11


class ScriptError(LocalError):
    """RPC, or an RRef, was used inside TorchScript, which runs in C++ and cannot reach this agent."""

    code = 12


class RemoteError(RpcError):
    """A peer, or the way to it, failed."""


class RpcTimeoutError(RemoteError, TimeoutError):
    """No answer came within the call's timeout."""

    code = 20


class WorkerLostError(RemoteError, ConnectionError):
    """The peer died or left while something waited for it."""

    code = 21


class ShutdownError(RemoteError):
    """This agent shut down while the call was under way."""

    code = 22


class ProtocolError(RemoteError):
    """Bytes arrived that are no message of this protocol."""

    code = 23


class CalleeError(RemoteError, AttributeError):
    """The callee could not run the call: it lacks the function, or cannot unpickle the arguments."""

    code = 24


class UnreadableCallError(CalleeError):
    """The callee could not read the call, its pickle or its tensors, so that it holds nothing of what the call brought."""

    code = 29


class RemoteUserError(RemoteError):
    """A user function raised an exception whose type cannot be rebuilt here; the text holds its traceback."""

    code = 25


class RRefCreationError(RemoteError):
    """The ``remote`` call that was to create an RRef failed."""

    code = 26


class RemoteBackwardError(RemoteError):
    """A distributed backward pass failed on some worker."""

    code = 27


class InterruptedCallError(RemoteError):
    """^C ended the wait for the answer."""

    code = 28


class SendFailedError(RemoteError, ConnectionError):
    """A message could not be sent just now, and nothing of it has left; another try may succeed."""

    code = 30


def _subclasses(cls: type[RpcError]) -> list[type[RpcError]]:
    return [cls, *(found for sub in cls.__subclasses__() for found in _subclasses(sub))]


_BY_CODE: dict[int, type[RpcError]] = {cls.code: cls for cls in reversed(_subclasses(RpcError))}


def error_class(code: int) -> type[RpcError]:
    """The class that ``code`` stands for on the wire; an unknown code gives `RemoteError`.

    >>> error_class(21).__name__
    'WorkerLostError'
    """
    return _BY_CODE.get(code, RemoteError) if code else RpcError
