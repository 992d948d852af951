"""What stands in for torch's ``_invoke_rpc_*`` and ``_invoke_remote_*``, with their signatures.

``rpc_sync``, ``rpc_async`` and ``remote`` are torch's own Python functions; they end in one of the six functions here.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torch.distributed.rpc import PythonUDF, WorkerInfo  # type: ignore[attr-defined]
from torch.futures import Future

from zmqagent.agent.base import Reply
from zmqagent.exceptions import ProtocolError, RpcError, ScriptError, UnknownWorkerError
from zmqagent.rpc import pickler
from zmqagent.rpc.eager_optimizer import EAGER_FORMS
from zmqagent.rpc.failures import Failed, new_future
from zmqagent.rpc.messenger import Messenger
from zmqagent.rref.context import RRefContext
from zmqagent.rref.rref import RRef
from zmqagent.wire.commands import Failure, Pickled, PythonCall, PythonRemoteCall, RemoteReturn, Return, ScriptCall, ScriptRemoteCall
from zmqagent.wire.types import ForkId, Message, RRefId, WorkerId

__all__ = ["CallPickler", "Invoker"]
