"""One worker's machine of the RRef protocol, and the ids and errors that its tests speak of."""

from __future__ import annotations

from zmqagent.exceptions import RpcError, ShutdownError, WorkerLostError
from zmqagent.rref import events as ev
from zmqagent.rref.protocol import Counts, RRefProtocol
from zmqagent.wire.types import ForkId, RRefId, WorkerId

__all__ = [
    "A_FORK",
    "LOST",
    "ME",
    "MINE",
    "MY_FORK",
    "NONE_LEFT",
    "OTHER",
    "OWNER",
    "PARENT",
    "SHUT",
    "THEIRS",
    "THEIR_FORK",
    "VALUE",
    "Machine",
    "confirmed_user",
    "refusal",
]

ME, OWNER, PARENT, OTHER = WorkerId(0), WorkerId(1), WorkerId(2), WorkerId(3)
NONE_LEFT = Counts(0, 0, 0, 0, 0, 0)
LOST = WorkerLostError("worker1 is gone")
SHUT = ShutdownError("shut down")
MINE, MY_FORK = RRefId(ME, 0), ForkId(ME, 1)
"""An RRef that this worker owns, and a fork that it minted itself."""
THEIRS, THEIR_FORK = RRefId(PARENT, 0), ForkId(PARENT, 1)
"""An RRef that worker PARENT creates, and the creator's fork: owned by this worker, or by OWNER, as the test needs."""
A_FORK = ForkId(OTHER, 7)
VALUE = object()


class Machine:
    """The protocol of one worker, with the time and the instructions at hand."""

    def __init__(self) -> None:
        self.protocol = RRefProtocol(ME)
        self.now = 0.0

    def __call__(self, event: ev.Event) -> list[ev.Instruction]:
        return self.protocol.handle(event, self.now)

    @property
    def counts(self) -> Counts:
        return self.protocol.counts

    def answer(self, instruction: ev.Instruction, outcome: ev.Outcome = ev.Outcome.DELIVERED) -> list[ev.Instruction]:
        assert isinstance(instruction, ev.Send)
        return self(ev.Answered(instruction, outcome, None if outcome is ev.Outcome.DELIVERED else LOST))


def refusal(instructions: list[ev.Instruction]) -> RpcError:
    (error,) = [i.error for i in instructions if isinstance(i, ev.Refuse)]
    return error


def confirmed_user(machine: Machine, fork: ForkId = A_FORK) -> None:
    """A share in an RRef of OWNER that OWNER itself gave."""
    assert machine(ev.UserUnpickled(THEIRS, fork, OWNER, OWNER)) == []
