"""What is known of backward passes: which are under way or over in a context, and how far one has come on this worker.

State without I/O. A `BackwardPass` is one worker's part of one pass; it is told what happened and answers what to do. When it is
over follows Dijkstra and Scholten's rule for diffusing computations (1980): the message that drew a worker into the pass is
answered last, when all that this worker set off has been answered. The worker that opened the pass is drawn in by its user.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor

from zmqagent.agent.base import Respond
from zmqagent.autograd.functions import GradientSender, SendRpcBackward
from zmqagent.autograd.plan import Edge
from zmqagent.autograd.staging import StagedGraph
from zmqagent.exceptions import BackwardError
from zmqagent.wire.types import WorkerId

if TYPE_CHECKING:
    from zmqagent.autograd.context import DistAutogradContext

__all__ = ["Arrival", "BackwardPass", "Engager", "PassRegister", "opener_of"]

_WORKER_BITS = 16


def opener_of(pass_id: int) -> WorkerId:
    """The worker on which ``backward`` was called."""
    return WorkerId(pass_id & ((1 << _WORKER_BITS) - 1))


class PassRegister:
    """The passes of one context on one worker. The engine's lock protects it, except for `turn` and `sender`.

    A pass id is a running number and, in its lowest bits, the opener. Numbers grow with each pass that a worker has seen of the
    context, so a later pass nearly always has the greater id; it need not if its opener saw nothing of the earlier one. Hence
    passes of the same opener are compared strictly, and others only if they meet while one is still running.
    """

    def __init__(self) -> None:
        # Held while the engine runs nodes of this context's graph: a pass that ended early may still be inside a user's function
        # when the next one arrives. Whoever runs a pass takes it; it is free again when that function returns.
        self.turn = threading.Lock()
        # How recvs send in the pass that has the turn.
        self.sender: GradientSender | None = None
        self.current: BackwardPass | None = None
        self._number = 0
        self._seen: dict[WorkerId, int] = {}
        self._aborted: dict[WorkerId, int] = {}

    def draw(self, worker_id: WorkerId) -> int:
        """The id for a pass that ``worker_id`` opens now."""
        self._number += 1
        return (self._number << _WORKER_BITS) | worker_id

    def admits(self, pass_id: int) -> bool:
        """Whether a message of ``pass_id`` may begin a pass here: not if it is over, or older than one that is running."""
        if pass_id <= self._seen.get(opener_of(pass_id), -1):
            return False
        return self.current is None or self.current.pass_id < pass_id

    def begin(self, begun: BackwardPass) -> None:
        """Notes that ``begun`` is under way from now on, and in place of any other."""
        self._note(begun.pass_id)
        self.current = begun

    def abort(self, pass_id: int) -> bool:
        """Notes that ``pass_id`` is over everywhere; False if that was known."""
        opener = opener_of(pass_id)
        if pass_id <= self._aborted.get(opener, -1):
            return False
        self._aborted[opener] = pass_id
        self._note(pass_id)
        return True

    def _note(self, pass_id: int) -> None:
        opener = opener_of(pass_id)
        self._seen[opener] = max(pass_id, self._seen.get(opener, -1))
        self._number = max(self._number, pass_id >> _WORKER_BITS)


@dataclass(frozen=True, slots=True)
class Arrival:
    """The gradients of one root: of the send ``message_id``, or of the opener's own roots (None)."""

    message_id: int | None
    gradients: Sequence[Tensor]


@dataclass(frozen=True, slots=True)
class Engager:
    """Who drew this worker into the pass, and how to answer."""

    worker_id: WorkerId
    respond: Respond


@dataclass(eq=False)
class BackwardPass:
    """This worker's part of one pass: which gradients are still to come, and what it has set off.

    Args:
        pass_id: the id, the same on all workers.
        context: the context, held for as long as the pass is under way.
        roots: for each root the edges through which its gradients enter, by the send's message id, or None for the opener's own.
        sends: the sends among the roots.
        retain_graph: whether the graph can be run again.
        engager: who is to be answered; None on the worker that opened the pass.
    """

    pass_id: int
    context: DistAutogradContext
    roots: Mapping[int | None, Sequence[Edge]]
    sends: Mapping[int, SendRpcBackward]
    retain_graph: bool
    engager: Engager | None
    begun_at: float = field(default_factory=time.monotonic)
    graph: StagedGraph | None = None
    """The staged graph, built by whoever runs first."""

    def __post_init__(self) -> None:
        # Protects all below; agent threads and the opener's user wait for nothing else while they hold it. The opener waits on it
        # until the pass is over, which an answer, a lost worker, a release or a shutdown brings about.
        self._changed = threading.Condition()
        self._missing = set(self.roots)
        self._inbox: list[Arrival] = []
        self._is_driven = False
        self._has_run = False
        self._outstanding = 0
        self._sent: set[int] = set()
        self._is_over = False
        self._error: BaseException | None = None
        self._has_reported = False

    @property
    def is_over(self) -> bool:
        """True once nothing more is to be done for this pass."""
        return self._is_over

    @property
    def error(self) -> BaseException | None:
        """Why the pass failed."""
        return self._error

    def missing_sends(self) -> list[SendRpcBackward]:
        """The sends that have got no gradients yet."""
        with self._changed:
            return [self.sends[message_id] for message_id in self._missing if message_id is not None]

    def take_in(self, arrival: Arrival) -> None:
        """Takes in the gradients of a root.

        Raises:
            BackwardError: there is no such root, or it has its gradients, or they are too few or too many.
        """
        edges = self.roots.get(arrival.message_id)
        if edges is None:
            raise BackwardError(f"Could not find send function for autograd message id: {arrival.message_id}")
        if len(edges) != len(arrival.gradients):
            raise BackwardError(
                f"{len(arrival.gradients)} gradients came for autograd message id {arrival.message_id}, "
                f"which sent {len(edges)} tensors that require grad"
            )
        with self._changed:
            if self._is_over:
                raise BackwardError(f"backward pass {self.pass_id} is over on this worker")
            if arrival.message_id not in self._missing:
                raise BackwardError(f"gradients for autograd message id {arrival.message_id} came twice in one backward pass")
            self._missing.remove(arrival.message_id)
            self._inbox.append(arrival)
            self._changed.notify_all()

    def claim(self) -> list[Arrival]:
        """What has arrived and is to be run now by the caller, who then calls `claim_next`; empty if there is nothing to do, or
        another thread does it."""
        with self._changed:
            if self._is_driven or self._is_over:
                return []
            return self._take_arrivals()

    def claim_next(self) -> list[Arrival]:
        """As `claim`, for the thread that has run what it claimed before; if empty, that thread is done."""
        with self._changed:
            return [] if self._is_over else self._take_arrivals()

    def await_arrivals(self, timeout: float | None) -> list[Arrival]:
        """What has arrived, for the opener's own thread; waits for something if need be. Empty once the pass is over, and after
        ``timeout`` seconds."""
        with self._changed:
            self._changed.wait_for(lambda: self._inbox or self._is_over, timeout)
            return [] if self._is_over else self._take_arrivals()

    def _take_arrivals(self) -> list[Arrival]:
        arrivals, self._inbox = self._inbox, []
        self._is_driven = bool(arrivals)
        return arrivals

    def set_off(self, message_id: int) -> None:
        """Notes that the gradients of a recv are about to be sent.

        Raises:
            BackwardError: the pass is over, or they have been sent before.
        """
        with self._changed:
            if self._is_over:
                raise BackwardError(f"backward pass {self.pass_id} is over on this worker")
            if message_id in self._sent:
                raise BackwardError(f"the recv function of autograd message id {message_id} ran twice in one backward pass")
            self._sent.add(message_id)
            self._outstanding += 1

    def answered(self) -> bool:
        """Notes that a gradient message was answered; True if the pass is over by that."""
        with self._changed:
            self._outstanding -= 1
            return self._settle()

    def ran(self) -> bool:
        """Notes that every node has run; True if the pass is over by that."""
        with self._changed:
            self._has_run = True
            return self._settle()

    def _settle(self) -> bool:
        if self._is_over or not self._has_run or self._outstanding:
            return False
        self._end()
        return True

    def fail(self, error: BaseException) -> bool:
        """Ends the pass by ``error``; False if it was over."""
        with self._changed:
            if self._is_over:
                return False
            self._error = error
            self._end()
            return True

    def _end(self) -> None:
        self._is_over = True
        self._inbox.clear()
        self.graph = None
        self._changed.notify_all()

    def is_concerned_by(self, worker_id: WorkerId) -> bool:
        """Whether the pass cannot go on without ``worker_id``."""
        if opener_of(self.pass_id) == worker_id or (self.engager is not None and self.engager.worker_id == worker_id):
            return True
        return any(send.peer == worker_id for send in self.missing_sends())

    def overdue_sends(self, now: float, patience: float) -> list[SendRpcBackward]:
        """The sends that still wait ``patience`` seconds after the pass began; they are returned once."""
        if self._has_reported or now - self.begun_at < patience:
            return []
        self._has_reported = True
        return self.missing_sends()
