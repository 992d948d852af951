"""A user function's exception, from the callee to the caller; and how a future raises it there.

On the callee, an exception becomes a `Failure` that carries its type (pickled, if that is possible), its name and the whole text.
On the caller it becomes the same type again with torch's text, "On {worker}:\\n{repr}\\n{traceback}". What cannot be rebuilt (the
type is unknown here, or wants other arguments) arrives as a `RemoteUserError` with that text.

A future holds a `Failed` and builds the exception at each ``wait``: one exception object raised in several threads would collect
the tracebacks of all of them.
"""

from __future__ import annotations

import logging
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch.futures import Future

from zmqagent.exceptions import CalleeError, NotPicklableError, RemoteUserError, RpcError, RRefCreationError
from zmqagent.rpc import pickler
from zmqagent.wire.commands import Failure, Pickled

__all__ = [
    "Failed",
    "describe_error",
    "describe_exception",
    "describe_kept",
    "new_future",
    "raising",
    "rebuild",
    "untraced",
    "unwrapped",
]

_logger = logging.getLogger(__name__)


def describe_exception(error: BaseException, worker: str) -> Failure:
    """The `Failure` for an exception that a user function raised on ``worker`` (the text of its WorkerInfo).

    Logs the text as an error, so that it can be read on the worker where it happened, as with torch.
    """
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    text = f"On {worker}:\n{_shown(error)}\n{trace}"
    _logger.error("%s", text)
    kind = type(error)
    return Failure(0, f"{kind.__module__}.{kind.__qualname__}", text, _pickled_type(error))


def _shown(error: BaseException) -> str:
    try:
        shown = repr(error)
    except Exception as why:
        return f"<a {type(error).__qualname__} whose repr fails with {type(why).__name__}>"
    return shown if _is_rebuilt(error) else _unescaped(shown)


class _Legible(str):
    """The whole text of an exception from another worker. It is shown as it is also by those who show the `repr` of it, as
    `KeyError` does of what it was made of."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


def _is_rebuilt(error: BaseException) -> bool:
    """Whether `rebuild` made ``error``; known of a `KeyError` and of an error of this package."""
    return any(isinstance(arg, _Legible) for arg in error.args)


def _unescaped(text: str) -> str:
    """``text`` with the escapes of `repr` resolved, so that a message of several lines reads as such."""
    try:
        return text.encode("latin-1", "backslashreplace").decode("unicode_escape")
    except UnicodeDecodeError:
        return text


def describe_error(error: RpcError, worker: str) -> Failure:
    """The `Failure` for an error of this package: it arrives as the same class."""
    return Failure(error.code, type(error).__qualname__, f"On {worker}: {error}")


def describe_kept(error: BaseException | None, worker: str) -> Failure:
    """The `Failure` for an error that an OwnerRRef keeps: one that this package gave it, or what `rebuild` made when its
    function failed, which has its whole text already."""
    if error is None:
        error = RRefCreationError("the RRef has no value and never will")
    if isinstance(error, RpcError) and not _is_rebuilt(error):
        return describe_error(error, worker)
    kind = type(error)
    text = str(error.args[0]) if len(error.args) == 1 and isinstance(error.args[0], str) else str(error)
    return Failure(0, f"{kind.__module__}.{kind.__qualname__}", text, _pickled_type(error))


def _pickled_type(error: BaseException) -> Pickled:
    # SystemExit and KeyboardInterrupt are addressed to this process: rebuilt at the caller they would end that one.
    if not isinstance(error, Exception):
        return Pickled()
    try:
        return pickler.dumps(type(error))
    except NotPicklableError:
        return Pickled()


def rebuild(failure: Failure) -> Exception:
    """The exception that ``failure`` describes, as it is raised at the caller."""
    text = failure.text
    if not failure.body.payload:
        return _substitute(f"a {failure.type_name} was raised, which cannot be sent. {text}")
    try:
        kind = pickler.loads(failure.body)
    except CalleeError:
        return _substitute(f"a {failure.type_name} was raised, a type that this process does not know. {text}")
    try:
        error = kind(_Legible(text) if isinstance(kind, type) and issubclass(kind, KeyError | RpcError) else text)
    except Exception as why:
        # A constructor that wants other arguments may raise anything.
        return _substitute(
            f"Failed to create original exception type. Error msg was {why}. Original exception on remote side was {text}"
        )
    if isinstance(error, Exception):
        return error
    return _substitute(f"a {failure.type_name} was raised. {text}")


def _substitute(text: str) -> RemoteUserError:
    return RemoteUserError(_Legible(text))


@dataclass(frozen=True, slots=True)
class Failed:
    """What a future holds in place of a value: how to make the exception that its ``wait`` raises."""

    make: Callable[[], Exception]

    @classmethod
    def by(cls, cause: Failure | RpcError) -> Failed:
        """For a user function's `Failure`, or an error of the agent."""
        if isinstance(cause, Failure):
            return cls(lambda: rebuild(cause))
        kept = untraced(cause)
        return cls(lambda: _again(kept))


def untraced(error: RpcError) -> RpcError:
    """A copy of ``error`` to keep. A traceback would keep alive all frames that led to it, and in them whatever the caller has at
    hand; often also what keeps the error, a future or an RRef, which then would never die."""
    cause = error.__cause__
    while cause is not None:
        cause.__traceback__ = None
        cause = cause.__cause__
    return _again(error)


def _again(error: RpcError) -> RpcError:
    fresh = type(error)(*error.args)
    fresh.__cause__ = error.__cause__
    return fresh


def unwrapped(value: Any) -> Any:
    """``value`` of a future, unless that is a `Failed`: raises its error. Runs at each ``wait`` and ``value`` (torch's hook)."""
    if isinstance(value, Failed):
        raise value.make()
    return value


def raising(future: Future[Any]) -> Future[Any]:
    """``future``, so that a `Failed` as its result makes ``wait`` raise."""
    future._set_unwrap_func(unwrapped)
    return future


def new_future(devices: Iterable[torch.device] = ()) -> Future[Any]:
    """A future whose ``set_result(Failed(...))`` makes ``wait`` raise.

    Whoever takes its value, and the callbacks that it runs, come behind the streams that its tensors on ``devices`` were made on
    (`Requester.devices`); so do the futures that ``then`` returns.
    """
    return raising(Future(devices=list(devices)))
