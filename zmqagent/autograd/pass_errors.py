"""Why a backward pass failed: as its caller reads it, as it travels, and as it arrives."""

from __future__ import annotations

from zmqagent.agent.base import Reply
from zmqagent.exceptions import ProtocolError, RemoteBackwardError, RpcError
from zmqagent.wire.commands import Failure
from zmqagent.wire.types import Message, WorkerId

__all__ = ["as_error", "as_raised", "failure"]


def as_raised(error: BaseException, here: WorkerId) -> BaseException:
    """``error`` as `backward` raises it: errors of other kinds than ours say on which worker they happened."""
    if isinstance(error, RpcError) or not isinstance(error, Exception):
        return error
    wrapped = RemoteBackwardError(_at_node(here, error))
    wrapped.__cause__ = error
    return wrapped


def failure(error: BaseException, here: WorkerId) -> Message:
    """``error`` as an answer to the worker whose gradients began the pass here."""
    return Failure(RemoteBackwardError.code, type(error).__name__, _at_node(here, error)).to_message()


def as_error(reply: Reply) -> RpcError:
    """Why gradients were not accepted."""
    if isinstance(reply, RpcError):
        return reply
    if isinstance(reply, Failure):
        return RemoteBackwardError(reply.text)
    return ProtocolError(f"gradients were answered by a {type(reply).__name__}")


def _at_node(here: WorkerId, error: BaseException) -> str:
    return f"Error on Node {here}: {str(error) or type(error).__name__}"
