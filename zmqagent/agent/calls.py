"""What this worker asked others and has not been answered yet: deadlines, retries, late replies.

Pure: a machine that is told what happened, with the time at which it did, and says what is to be done (`Instruction`). Its
methods are its events; they are on the path of every call, and an object for each would cost as much as the rest.

A call ends exactly once, by the first of: its answer, its deadline, the loss of its worker, ^C, the end of the agent. Whatever
comes later for it is counted and dropped. An idempotent call is sent again after 1 s, 1.5 s, 2.25 s ... (torch's schedule) until
an answer comes. Its timeout begins with the last try: a living worker that is slow to answer must not cost an RRef.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

from zmqagent.exceptions import InterruptedCallError, RpcError, RpcTimeoutError
from zmqagent.wire.types import WorkerId

__all__ = ["MAX_TRIES", "CallId", "Calls", "Complete", "Instruction", "Resend"]

CallId = tuple[WorkerId, int]
"""A call's destination, and its number among the calls to it."""

MAX_TRIES = 5
_FIRST_PAUSE = 1.0
_BACKOFF = 1.5

_COMPACT_FROM = 256
"""Below so many entries the heap of deadlines is not worth compacting."""


@dataclass(frozen=True, slots=True)
class Complete:
    """The call has failed: give ``error`` to whoever waits for it."""

    call_id: CallId
    error: RpcError


@dataclass(frozen=True, slots=True)
class Resend:
    """Send the call's message again."""

    call_id: CallId


Instruction = Complete | Resend


@dataclass(slots=True)
class _Call:
    worker: str
    what: str
    timeout: float
    deadline: float
    tries: int


class Calls:
    """The calls under way. Times are seconds of any clock that never goes back; a timeout of 0 means none."""

    def __init__(self) -> None:
        self._calls: dict[CallId, _Call] = {}
        # (deadline, call id), at most one for each call; the entries of calls that have ended are skipped.
        self._deadlines: list[tuple[float, CallId]] = []
        self._late = 0

    def __len__(self) -> int:
        return len(self._calls)

    @property
    def late_replies(self) -> int:
        """How many answers came for calls that had ended, or came twice."""
        return self._late

    def start(self, call_id: CallId, worker: str, what: str, *, timeout: float, retry: bool, now: float) -> None:
        """A call begins. ``worker`` and ``what`` name its destination and its kind in errors; ``retry``: it is idempotent."""
        wait = _FIRST_PAUSE if retry else timeout
        call = self._calls[call_id] = _Call(worker, what, timeout, now + wait, 1 if retry else 0)
        if wait:
            self._await(call_id, call)

    def answered(self, call_id: CallId) -> bool:
        """An answer came; False if nobody waits for it any more."""
        if self._calls.pop(call_id, None) is None:
            self._late += 1
            return False
        return True

    def withdrawn(self, call_id: CallId) -> None:
        """The call could not be sent, and its caller knows."""
        self._calls.pop(call_id, None)

    def next_deadline(self) -> float:
        """When `tick` has something to do; infinity if no deadline is set."""
        heap = self._deadlines
        while heap:
            deadline, call_id = heap[0]
            if call_id in self._calls:
                return deadline
            heapq.heappop(heap)
        return float("inf")

    def tick(self, now: float) -> list[Instruction]:
        """Time has passed."""
        done: list[Instruction] = []
        while self.next_deadline() <= now:
            _, call_id = heapq.heappop(self._deadlines)
            call = self._calls[call_id]
            if 0 < call.tries < MAX_TRIES:
                pause = _FIRST_PAUSE * _BACKOFF**call.tries
                call.tries += 1
                call.deadline = now + (pause if call.tries < MAX_TRIES else max(pause, call.timeout))
                self._await(call_id, call)
                done.append(Resend(call_id))
            else:
                done.append(self._fail(call_id, _timeout_error(call)))
        return done

    def worker_lost(self, worker_id: WorkerId, reason: RpcError) -> list[Instruction]:
        """No answer will come from ``worker_id`` any more, for ``reason`` (whose class the errors of its calls have)."""
        return [
            self._fail(call_id, _no_answer(call, reason))
            for call_id, call in list(self._calls.items())
            if call_id[0] == worker_id
        ]

    def interrupted(self) -> list[Instruction]:
        """^C: whoever waits is to be let go."""
        return [
            self._fail(
                call_id, InterruptedCallError(f"^C ended the wait for the answer to a {call.what} to worker {call.worker}")
            )
            for call_id, call in list(self._calls.items())
            # Nobody waits for an idempotent message, and the state of RRefs and contexts hangs on it.
            if not call.tries
        ]

    def closed(self, reason: RpcError) -> list[Instruction]:
        """The agent ends."""
        return [self._fail(call_id, _no_answer(call, reason)) for call_id, call in list(self._calls.items())]

    def _await(self, call_id: CallId, call: _Call) -> None:
        heapq.heappush(self._deadlines, (call.deadline, call_id))
        if len(self._deadlines) > _COMPACT_FROM and len(self._deadlines) > 4 * len(self._calls):
            # Answered calls leave their entries behind until these reach the top, which takes a whole timeout.
            self._deadlines = [(c.deadline, i) for i, c in self._calls.items() if c.timeout or c.tries]
            heapq.heapify(self._deadlines)

    def _fail(self, call_id: CallId, error: RpcError) -> Complete:
        del self._calls[call_id]
        return Complete(call_id, error)


def _no_answer(call: _Call, reason: RpcError) -> RpcError:
    return type(reason)(f"a {call.what} to worker {call.worker} has no answer: {reason}")


def _timeout_error(call: _Call) -> RpcError:
    if call.tries:
        return RpcTimeoutError(
            f"The RPC has not succeeded after the specified number of max retries ({MAX_TRIES}). It was a {call.what} to worker "
            f"{call.worker}."
        )
    return RpcTimeoutError(
        f"RPC ran for more than set timeout ({round(call.timeout * 1000)} ms) and will now be marked with an error. It was a "
        f"{call.what} to worker {call.worker}, which may still run it. Give it more time with timeout= (seconds; 0 for no limit) "
        "or rpc_timeout."
    )
