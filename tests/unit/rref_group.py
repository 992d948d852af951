"""Two and more workers' RRef contexts in one process, joined by a requester that delivers when it is told to."""

from __future__ import annotations

import io
import pickle
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch.distributed.rpc import internal
from torch.futures import Future

from zmqagent.agent.base import UNSET_TIMEOUT, OnReply, Reply
from zmqagent.exceptions import RpcError, UnknownWorkerError
from zmqagent.rref.context import NewRemote, RRefContext
from zmqagent.rref.rref import OwnerRRef, RRef
from zmqagent.wire.commands import Ack, Failure, RRefChildAccept, RRefForkRequest, RRefUserDeletes, parse
from zmqagent.wire.types import Message, RRefId, WorkerId

__all__ = ["EMPTY", "Calls", "Group", "Member", "counts", "dumps", "fetched", "loads"]

EMPTY = {"num_owner_rrefs": "0", "num_pending_futures": "0", "num_pending_users": "0", "num_forks": "0"}


def dumps(context: RRefContext, obj: Any) -> tuple[bytes, Any]:
    """Pickles as the RPC pickler does: with torch's table set, in a scope of ``context``."""
    with context.pickling() as forks:
        internal._thread_local_tensor_tables.send_tables = []
        try:
            file = io.BytesIO()
            pickle.Pickler(file, protocol=5).dump(obj)
        finally:
            del internal._thread_local_tensor_tables.send_tables
    return file.getvalue(), forks


def loads(context: RRefContext, data: bytes) -> tuple[Any, Any]:
    """Unpickles in a scope of ``context``; gives the object and what awaits confirmation."""
    with context.unpickling() as pending:
        obj = pickle.loads(data)
    return obj, pending


class Calls:
    """Answers fetches from the owner's context at once, and records backward passes."""

    def __init__(self, group: Group) -> None:
        self._group = group
        self.passes: list[tuple[Any, ...]] = []
        self.timeouts: list[float] = []

    def fetch(self, owner: WorkerId, rref_id: RRefId, timeout: float) -> Future[Any]:
        self.timeouts.append(timeout)
        future: Future[Any] = Future()

        def ready(rref: OwnerRRef | None, error: BaseException | None) -> None:
            if error is not None:
                future.set_exception(error)
            else:
                assert rref is not None
                future.set_result(rref.value())

        self._group[owner].context.when_owner_ready(rref_id, ready)
        return future

    def backward_on_owner(self, owner: WorkerId, rref_id: RRefId, context_id: int, retain_graph: bool) -> None:
        self.passes.append(("owner", owner, rref_id, context_id, retain_graph))

    def backward_here(self, root: torch.Tensor, context_id: int, retain_graph: bool) -> None:
        self.passes.append(("here", root, context_id, retain_graph))


class Member:
    """A worker: its context, and its requester (itself)."""

    def __init__(self, group: Group, worker_id: int) -> None:
        self.worker_id = WorkerId(worker_id)
        self._group = group
        self.calls = Calls(group)
        self.context = RRefContext(self, self.calls, clock=lambda: group.now)

    def worker_name(self, worker_id: WorkerId) -> str:
        return f"worker{worker_id}"

    def request(
        self,
        to: WorkerId,
        message: Message,
        on_reply: OnReply,
        *,
        timeout: float = UNSET_TIMEOUT,
        retry: bool = False,
        device_map: Mapping[Any, Any] | None = None,
    ) -> None:
        assert retry, "control messages are sent again"
        if self._group.refuse is not None:
            raise self._group.refuse
        if to not in self._group.members:
            raise UnknownWorkerError(f"no worker {to}")
        self._group.queue.append((self.worker_id, to, message, on_reply))


class Group:
    """Some workers. Control messages wait in ``queue`` until `deliver`."""

    def __init__(self, size: int) -> None:
        self.now = 0.0
        self.refuse: RpcError | None = None
        self.queue: deque[tuple[WorkerId, WorkerId, Message, OnReply]] = deque()
        self.members: dict[WorkerId, Member] = {}
        for worker_id in range(size):
            self.members[WorkerId(worker_id)] = Member(self, worker_id)

    def __getitem__(self, worker_id: int) -> Member:
        return self.members[WorkerId(worker_id)]

    def drain(self) -> None:
        """Makes sure that every user that died has been reported."""
        for member in self.members.values():
            member.context.drain()

    def deliver(self, answer: Callable[[Message], Reply | None] = lambda _: None) -> list[str]:
        """Delivers all control messages, and those that follow from them. ``answer`` may answer in the receiver's place."""
        delivered = []
        self.drain()
        while self.queue:
            source, to, message, on_reply = self.queue.popleft()
            delivered.append(f"{source}->{to} {message.type.name}")
            on_reply(answer(message) or self._serve(source, to, message))
            self.drain()
        return delivered

    def _serve(self, source: WorkerId, to: WorkerId, message: Message) -> Reply:
        command = parse(message)
        context = self[to].context
        try:
            if isinstance(command, RRefUserDeletes):
                context.on_user_deletes(command.deletes)
            elif isinstance(command, RRefForkRequest):
                context.on_fork_request(source, command.rref_id, command.fork_id)
            else:
                assert isinstance(command, RRefChildAccept)
                context.on_child_accept(command.fork_id)
        except RpcError as error:
            return Failure(0, type(error).__name__, str(error))
        return Ack()

    def remote(self, caller: int, owner: int, value: Any) -> NewRemote:
        """A whole ``remote`` call: made, run, answered."""
        new = self[caller].context.new_remote(WorkerId(owner))
        self[owner].context.create_owner(new.rref_id, new.fork_id).set_value(value)
        self[caller].context.confirm_remote(new.rref_id, new.fork_id)
        return new

    def send(self, source: int, to: int, obj: Any) -> tuple[Any, Any]:
        """Pickles on one worker, unpickles on another."""
        data, forks = dumps(self[source].context, obj)
        forks.sent_to(WorkerId(to))
        return loads(self[to].context, data)

    def share(self, source: int, to: int, rref: RRef) -> RRef:
        """Sends one RRef."""
        shared: RRef = self.send(source, to, rref)[0]
        return shared

    def close(self) -> None:
        for member in self.members.values():
            member.context.close()


def counts(group: Group, worker: int) -> tuple[int, int, int, int]:
    """Owners, forks, pending users and unanswered control messages."""
    info = group[worker].context.debug_info()
    keys = ("num_owner_rrefs", "num_forks", "num_pending_users", "num_pending_futures")
    return tuple(int(info[key]) for key in keys)  # type: ignore[return-value]


def fetched(context: RRefContext, rref_id: RRefId) -> list[Any]:
    """Asks for a value; the list gets what comes of it."""
    results: list[Any] = []

    def ready(owner: OwnerRRef | None, error: BaseException | None) -> None:
        results.append(error if error is not None or owner is None else owner.value())

    context.when_owner_ready(rref_id, ready)
    return results
