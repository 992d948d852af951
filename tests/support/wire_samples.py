"""One good message of each type, for tests that damage them.

A new type of message gets a line in `REQUESTS` or `ANSWERS`; a test fails until it has one. The samples are of Bob, worker 1, to
Alice, worker 0 (see `tests/support/lone_worker.py`). Served in their order they make sense: a sample may need what those before
it have brought about.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch.distributed.rpc.internal import PythonUDF

from zmqagent.rpc import pickler, profile_records
from zmqagent.wire import commands as c
from zmqagent.wire.types import AutogradMetadata, ForkId, Message, MessageType, RRefId, WorkerId

__all__ = ["ANSWERS", "CONTEXT", "GOOD_CALL", "REQUESTS", "add"]

ALICE, BOB = WorkerId(0), WorkerId(1)
CONTEXT = (BOB << 48) + 1
RREF, SCRIPT_RREF = RRefId(BOB, 0), RRefId(BOB, 2)
FORK, SCRIPT_FORK, SECOND_FORK = ForkId(BOB, 1), ForkId(BOB, 3), ForkId(BOB, 4)
PASS = 1 << 16 | BOB


def add(tensor: torch.Tensor, array: np.ndarray[Any, Any], text: str = "") -> Any:
    return tensor + torch.from_numpy(array), text


def scalar() -> torch.Tensor:
    return torch.ones((), requires_grad=True) * 2


def _call(function: Any, *args: Any, **kwargs: Any) -> c.Pickled:
    return pickler.dumps(PythonUDF(function, args, kwargs))


# A pickle, an out-of-band buffer, a tensor in a frame of its own, and two in a frame that they share.
_BODY = _call(add, torch.arange(3000.0), np.arange(3000.0), text="text")
_SCRIPT_BODY = pickler.dumps(((torch.ones(2), torch.ones(2)), {}))

GOOD_CALL = c.PythonCall(_call(str.upper, "good"), False).to_message()
"""A call that a worker which serves on answers by "GOOD"."""

_REQUESTS: list[c.Command] = [
    c.PythonCall(_BODY, False),
    c.ScriptCall(_SCRIPT_BODY, "aten::add", True, False),
    c.PythonRemoteCall(_call(scalar), False, RREF, FORK),
    c.ScriptRemoteCall(_SCRIPT_BODY, "aten::add", True, False, SCRIPT_RREF, SCRIPT_FORK),
    c.RRefFetch(SCRIPT_RREF),
    c.RRefForkRequest(RREF, SECOND_FORK),
    c.RRefChildAccept(ForkId(ALICE, 1 << 40)),
    c.ForwardAutograd(AutogradMetadata(CONTEXT, 7), c.PythonCall(_call(scalar), False).to_message()),
    # The message id is the first that Alice draws, for her answer to the message before.
    c.BackwardAutograd(AutogradMetadata(CONTEXT, 0), PASS, False, (torch.ones(()),)),
    c.RunWithProfiling(0, c.PythonCall(_call(scalar), False).to_message()),
    c.AbortBackward(CONTEXT, PASS, "reason"),
    # In a context that Alice has opened herself, the first.
    c.RRefBackward(RREF, ALICE << 48, False),
    c.CleanupContexts((CONTEXT,)),
    c.RRefUserDeletes((c.RRefUserDelete(RREF, FORK),) * 2),
    c.Barrier("tag", 3),
    c.Join("carol", 2, 30, "elsewhere", 1, ("tcp://127.0.0.1:1",), 0, 1, ""),
    c.Leave(30, "reason"),
    c.Goodbye(1, "reason"),
]

REQUESTS: dict[MessageType, Message] = {message.type: message for message in (command.to_message() for command in _REQUESTS)}

_FETCH = REQUESTS[MessageType.PYTHON_RREF_FETCH_CALL]
_RETURN = c.Return(pickler.dumps((torch.arange(3000.0), np.arange(3000.0), "text"))).to_message()

ANSWERS: dict[MessageType, tuple[Message, Message]] = {
    answer.type: (request, answer)
    for request, answer in (
        (REQUESTS[MessageType.PYTHON_CALL], _RETURN),
        (REQUESTS[MessageType.PYTHON_REMOTE_CALL], c.RemoteReturn(RREF, FORK).to_message()),
        (REQUESTS[MessageType.RREF_USER_DELETE], c.Ack().to_message()),
        (REQUESTS[MessageType.FORWARD_AUTOGRAD_REQ], c.ForwardAutograd(AutogradMetadata(CONTEXT, 8), _RETURN).to_message()),
        (REQUESTS[MessageType.RUN_WITH_PROFILING_REQ], c.ProfiledReturn(profile_records.pack([]), _RETURN).to_message()),
        (REQUESTS[MessageType.BACKWARD_AUTOGRAD_REQ], c.Ack(MessageType.BACKWARD_AUTOGRAD_RESP).to_message()),
        (REQUESTS[MessageType.ABORT_BACKWARD_REQ], c.Ack(MessageType.ABORT_BACKWARD_RESP).to_message()),
        (REQUESTS[MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ], c.Ack(MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP).to_message()),
        (REQUESTS[MessageType.RREF_BACKWARD_REQ], c.Ack(MessageType.RREF_BACKWARD_RESP).to_message()),
        (REQUESTS[MessageType.PYTHON_CALL], c.Failure(0, "ValueError", "text", pickler.dumps(ValueError)).to_message()),
        (REQUESTS[MessageType.BARRIER_REQ], c.BarrierPassed(12).to_message()),
        (REQUESTS[MessageType.JOIN_REQ], c.Ack(MessageType.JOIN_RESP).to_message()),
        (REQUESTS[MessageType.LEAVE_REQ], c.Ack(MessageType.LEAVE_RESP).to_message()),
    )
}
"""Answers by their type, each with a request that it answers. Here Alice asks and Bob answers."""
