"""What a reply means to the future that waits for it."""

from __future__ import annotations

from typing import Any

from torch.futures import Future

from zmqagent.agent.base import Reply
from zmqagent.exceptions import ProtocolError, RpcError
from zmqagent.rpc import pickler
from zmqagent.rpc.failures import Failed
from zmqagent.rpc.result_tensors import set_result
from zmqagent.rpc.shares import give_back
from zmqagent.wire.commands import Failure, Return

__all__ = ["complete", "value_of"]


def complete(future: Future[Any], reply: Reply) -> None:
    """Gives ``future`` (made by `new_future`) the value that ``reply`` brought, or what makes its ``wait`` raise."""
    value = value_of(reply)
    set_result(future, value, reply.body.tensors if isinstance(reply, Return) and not isinstance(value, Failed) else ())


def value_of(reply: Reply) -> Any:
    """The value that ``reply`` brought, or a `Failed`."""
    if isinstance(reply, (RpcError, Failure)):
        return Failed.by(reply)
    if not isinstance(reply, Return):
        return Failed.by(ProtocolError(f"a call was answered by a {type(reply).__name__}, which is no result"))
    try:
        return pickler.loads(reply.body)
    except RpcError as error:
        give_back(reply)
        return Failed.by(error)
