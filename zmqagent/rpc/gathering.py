"""``_all_gather`` for groups whose members change.

torch's own fixes the participants when a worker calls it, names a gathering after them, and has each wait for ever. Here a leader
decides: the participant that joined first, so that newcomers never change who leads. Everyone gives it an object by one call, and
gets all objects as the answer once everyone has come. Without names, *everyone* are those who are in the group at that moment:
who leaves meanwhile is not waited for, who joins is. When the leader leaves, the others turn to the next one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar, NamedTuple

from torch.distributed.rpc import api, functions
from torch.distributed.rpc.constants import DEFAULT_SHUTDOWN_TIMEOUT
from torch.futures import Future

from zmqagent.agent.agent import ZmqRpcAgent
from zmqagent.agent.base import NO_TIMEOUT, UNSET_TIMEOUT
from zmqagent.agent.membership_events import Member, MemberState
from zmqagent.exceptions import (
    InvalidOptionError,
    NotInitializedError,
    RpcError,
    RpcTimeoutError,
    ShutdownError,
    UnknownWorkerError,
    WorkerLostError,
)

__all__ = ["Gatherings", "contribute"]

Names = tuple[str, ...]
"""Who takes part, in alphabetical order; empty for all members."""


class _Outcome(NamedTuple):
    """What became of a gathering: the objects by name, or an error; neither if the leader leaves and the next is to be asked."""

    objects: dict[str, Any] | None = None
    error: RpcError | None = None


@dataclass(slots=True)
class _Gathering:
    """What has been given to the leader so far, and who is to be told of the outcome."""

    objects: dict[str, Any] = field(default_factory=dict)
    waiters: list[Callable[[_Outcome], None]] = field(default_factory=list)
    met: set[str] = field(default_factory=set)
    """Those named whom the leader has known meanwhile. Of others it may hear later than whoever named them."""


class Gatherings:
    """One worker's part in gatherings. All methods may be called from any thread. `close` ends it, and all who wait."""

    current: ClassVar[Gatherings | None] = None
    """The one of the worker that runs in this process."""

    def __init__(self, agent: ZmqRpcAgent) -> None:
        self._agent = agent
        self._me = agent.get_worker_info().name
        # Protects the fields below; notified when anything changes, in here or in the group.
        self._changed = threading.Condition()
        self._pending: dict[Names, _Gathering] = {}
        self._is_closed = False
        Gatherings.current = self

    def gather(self, obj: Any, worker_names: Iterable[str] | None = None, timeout: float = UNSET_TIMEOUT) -> dict[str, Any]:
        """torch's ``_all_gather``: the objects that all workers, or those named, have called this with, by name.

        Args:
            obj: what this worker contributes.
            worker_names: who takes part; by default all members.
            timeout: seconds; by default, or with 0, there is no limit.

        Raises:
            RpcTimeoutError: somebody did not come in time.
            WorkerLostError: the leader, or one of those named, died or left.
            UnknownWorkerError, InvalidOptionError: a name that is no member's; names without this worker's.
            ShutdownError: this worker leaves.
        """
        names = tuple(sorted(worker_names or ()))
        if names and self._me not in names:
            raise InvalidOptionError(f"worker {self._me!r} takes no part in a gathering of {', '.join(names)}")
        is_limited = timeout not in (UNSET_TIMEOUT, DEFAULT_SHUTDOWN_TIMEOUT)
        deadline = time.monotonic() + timeout if is_limited else float("inf")
        while True:
            leader = self._leader(names)
            if leader.record.name == self._me:
                outcome = self._lead(names, obj, timeout, deadline)
            else:
                outcome = self._follow(leader, names, obj, deadline)
            if outcome.error is not None:
                raise outcome.error
            if outcome.objects is not None:
                return outcome.objects
            self._await_departure(leader, deadline)

    def take(self, names: Names, name: str, obj: Any, waiter: Callable[[_Outcome], None]) -> None:
        """Takes in what worker ``name`` gives to a gathering that this worker leads; ``waiter`` gets the outcome."""
        with self._changed:
            if not self._is_closed:
                gathering = self._pending.setdefault(names, _Gathering())
                gathering.objects[name] = obj
                gathering.waiters.append(waiter)
                waiter = _nobody
        waiter(_Outcome())
        self.on_change()

    def on_change(self) -> None:
        """Somebody came, or joined or left the group: ends the gatherings that this decides."""
        with self._changed:
            self._changed.notify_all()
            ended = [(names, outcome) for names in self._pending if (outcome := self._outcome(names)) is not None]
            told = [(waiter, outcome) for names, outcome in ended for waiter in self._pending.pop(names).waiters]
        for waiter, outcome in told:
            waiter(outcome)

    def close(self) -> None:
        """This worker leaves: whoever waits for it as the leader is sent on, whoever waits on it gets a `ShutdownError`."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
            waiters = [waiter for gathering in self._pending.values() for waiter in gathering.waiters]
            self._pending.clear()
        for waiter in waiters:
            waiter(_Outcome())

    # What this worker does itself.

    def _leader(self, names: Names) -> Member:
        if names:
            members = [self._agent.find_member(name) for name in names]
        else:
            members = [m for m in self._agent.get_members() if not m.state.is_gone]
        return min(members, key=lambda member: member.record.ordinal)

    def _lead(self, names: Names, obj: Any, timeout: float, deadline: float) -> _Outcome:
        outcomes: list[_Outcome] = []

        def waiter(outcome: _Outcome) -> None:
            with self._changed:
                outcomes.append(outcome)
                self._changed.notify_all()

        self.take(names, self._me, obj, waiter)
        with self._changed:
            # Python's own wait, which ^C ends.
            is_over = self._changed.wait_for(lambda: outcomes, _seconds_until(deadline))
        if not is_over:
            self._give_up(names, waiter, timeout)
            with self._changed:
                # What ended it at the last moment is being told.
                self._changed.wait_for(lambda: outcomes)
        return outcomes[0]

    def _give_up(self, names: Names, waiter: Callable[[_Outcome], None], timeout: float) -> None:
        """Ends, for all who wait, the gathering that ``waiter`` waits for, unless it has ended."""
        with self._changed:
            gathering = self._pending.get(names)
            if gathering is None or waiter not in gathering.waiters:
                return
            del self._pending[names]
            missing = sorted(self._participants(names) - gathering.objects.keys())
        text = f"Followers {missing} timed out in _all_gather after {timeout:.2f} seconds."
        for told in gathering.waiters:
            told(_Outcome(error=RpcTimeoutError(text)))

    def _follow(self, leader: Member, names: Names, obj: Any, deadline: float) -> _Outcome:
        timeout = _seconds_until(deadline)
        try:
            outcome: _Outcome = api.rpc_sync(
                leader.record.name, contribute, args=(names, self._me, obj), timeout=NO_TIMEOUT if timeout is None else timeout
            )
            return outcome
        except WorkerLostError as error:
            # A leader that leaves has told everybody or nobody what became of the gathering; of one that died nobody knows.
            is_lost = self._state(leader) is MemberState.LOST
            return _Outcome(error=error) if names or is_lost else _Outcome()

    def _await_departure(self, leader: Member, deadline: float) -> None:
        with self._changed:
            is_over = self._changed.wait_for(lambda: self._is_closed or self._state(leader).is_gone, _seconds_until(deadline))
            if self._is_closed:
                raise ShutdownError(f"worker {self._me!r} leaves the group, and takes part in no gathering any more")
        if not is_over:
            raise RpcTimeoutError(
                f"worker {leader}, which leads the gathering, is leaving, but had not left when the time was up"
            )

    def _state(self, member: Member) -> MemberState:
        """The present state of a member; LEFT if it was replaced."""
        same = (m.state for m in self._agent.get_members() if m.record.incarnation == member.record.incarnation)
        return next(same, MemberState.LEFT)

    # What the leader decides; the caller holds the lock.

    def _participants(self, names: Names) -> set[str]:
        return set(names) or {info.name for info in self._agent.get_worker_infos()}

    def _outcome(self, names: Names) -> _Outcome | None:
        """What has become of a gathering; None as long as it goes on."""
        gathering = self._pending[names]
        objects = gathering.objects
        for name in names:
            member = self._find(name)
            if member is None:
                if name in gathering.met:
                    return _Outcome(
                        error=WorkerLostError(f"worker {name!r} is not in the group any more: another has its id now")
                    )
                continue
            gathering.met.add(name)
            if member.state.is_gone:
                return _Outcome(error=WorkerLostError(f"worker {member} is not in the group any more: {member.reason}"))
        participants = self._participants(names)
        if participants <= objects.keys():
            return _Outcome({name: objects[name] for name in sorted(participants)})
        return None

    def _find(self, name: str) -> Member | None:
        """Who bears a name now; None if only others have heard of that worker yet."""
        try:
            return self._agent.find_member(name)
        except UnknownWorkerError:
            return None


@functions.async_execution  # type: ignore[untyped-decorator]
def contribute(names: Names, name: str, obj: Any) -> Future[_Outcome]:
    """Called on the leader, by RPC: worker ``name`` gives ``obj`` to a gathering.

    Raises:
        NotInitializedError: no worker of a dynamic group runs here.
    """
    if Gatherings.current is None:
        raise NotInitializedError("this process is no worker of a dynamic group")
    future: Future[_Outcome] = Future()
    Gatherings.current.take(names, name, obj, partial(_give, future))
    return future


def _give(future: Future[_Outcome], outcome: _Outcome) -> None:
    future.set_result(outcome)


def _nobody(outcome: _Outcome) -> None:
    """Has been told, or will be."""


def _seconds_until(deadline: float) -> float | None:
    return None if deadline == float("inf") else max(0.001, deadline - time.monotonic())
