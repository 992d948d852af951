"""Whole groups of `RRefProtocol` machines on a bad network, and an observer who sees all of them at once.

A random program makes RRefs, passes them around as arguments and results, nests them in values, and drops them. The call layer
here keeps its promises and no more: user calls arrive at most once, control messages are repeated until answered and reach the
protocol as often as the network copies them. After each step `World.check` compares what the machines believe with what is true.
"""

from __future__ import annotations

import pickle
import random
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

from tests.simulation.rref_observer import Done, Handle, Observer, Owner, Request, User, Worker
from zmqagent.exceptions import RpcError, RpcTimeoutError, RRefCreationError, WorkerLostError
from zmqagent.rref import events as ev
from zmqagent.rref.protocol import RRefProtocol
from zmqagent.rref.users import UserState
from zmqagent.transport.base import PeerDown, Received
from zmqagent.transport.inproc import Faults, Network, record
from zmqagent.wire.commands import RRefChildAccept, RRefUserDelete
from zmqagent.wire.types import ForkId, RRefId, WorkerId

FETCH_TIMEOUT = 20.0
ForkData = tuple[WorkerId, RRefId, ForkId, WorkerId]


class World(Observer):
    """The group and the network; and, as `Observer`, what is true of them."""

    def __init__(self, seed: int, size: int, faults: Faults, trace: bool = False) -> None:
        super().__init__()
        self.random = random.Random(seed)
        self.network = Network(seed, faults)
        self.trace = trace
        self.shut = False
        for number in range(size):
            transport = self.network.transport(record(number))
            self.workers[WorkerId(number)] = Worker(WorkerId(number), transport, RRefProtocol(WorkerId(number)))
        for a in self.workers.values():
            for b in self.workers.values():
                a.transport.connect(b.transport.record)

    # ------------------------------------------------------------------------------------------------------- the machines

    def handle(self, worker: Worker, event: ev.Event) -> None:
        if self.trace:
            print(f"{self.network.now:8.3f} worker{worker.id} {event}")
        instructions = worker.protocol.handle(event, self.network.now)
        refused = [i.error for i in instructions if isinstance(i, ev.Refuse)]
        if not refused:
            self._note_what_the_owner_knows(event)
        for instruction in instructions:
            if isinstance(instruction, ev.Send):
                self._check_send(instruction)
                self._control(worker, instruction)
        for instruction in instructions:
            if isinstance(instruction, ev.FailOwner):
                assert isinstance(instruction.owner, Owner)
                instruction.owner.finish(None, instruction.error)
            elif isinstance(instruction, ev.Resume):
                instruction.token(instruction.error)  # type: ignore[operator]
        for error in refused:
            raise error

    def _control(self, worker: Worker, sent: ev.Send) -> None:
        def done(_: Any, error: RpcError | None) -> None:
            if error is None:
                outcome = ev.Outcome.DELIVERED
            else:
                outcome = ev.Outcome.TIMED_OUT if isinstance(error, RpcTimeoutError) else ev.Outcome.FAILED
            self.handle(worker, ev.Answered(sent, outcome, error))

        self.request(worker, sent.to, "control", sent.command, done, tries=3)

    # ------------------------------------------------------------------------------------------------------ the call layer

    def request(self, worker: Worker, to: WorkerId, kind: str, body: Any, done: Done, tries: int | None = None) -> int:
        number = worker.next_request
        worker.next_request += 1
        frame = pickle.dumps(("request", worker.id, number, kind, body))
        worker.requests[number] = Request(to, frame, done, tries)
        self._try(worker, number)
        return number

    def _try(self, worker: Worker, number: int) -> None:
        request = worker.requests.get(number)
        if request is None or not worker.alive:
            return
        if request.tries_left == 0:
            del worker.requests[number]
            request.done(None, RpcTimeoutError("no answer after all tries"))
            return
        if request.tries_left is not None:
            request.tries_left -= 1
        if not self._send(worker, request.to, request.frame):
            del worker.requests[number]
            request.done(None, WorkerLostError(f"worker {request.to} is gone"))
            return
        self.network.call_later(request.pause, lambda: self._try(worker, number))
        request.pause *= 1.5

    def _send(self, worker: Worker, to: WorkerId, frame: bytes) -> bool:
        try:
            worker.transport.send(to, [frame])
        except WorkerLostError:
            return False
        return True

    def _receive(self, worker: Worker, frame: bytes) -> None:
        direction, source, number, kind, body = pickle.loads(frame)
        if direction == "answer":
            request = worker.requests.pop(number, None)
            if request is not None:
                request.done(body, None if kind == "ok" else RpcError(kind))
            return
        if kind == "control":
            self._serve_control(worker, source, number, body)
            return
        if (source, number) in worker.answers:
            answer = worker.answers[source, number]
            if answer is not None:
                self._send(worker, source, answer)
            return
        worker.answers[source, number] = None
        self._serve_call(worker, source, number, kind, body)

    def _answer(self, worker: Worker, source: WorkerId, number: int, body: Any, verdict: str = "ok") -> None:
        frame = pickle.dumps(("answer", worker.id, number, verdict, body))
        if (source, number) in worker.answers:
            worker.answers[source, number] = frame
        if worker.alive:
            self._send(worker, source, frame)

    def _serve_control(self, worker: Worker, source: WorkerId, number: int, command: ev.ControlCommand) -> None:
        verdict = "ok"
        if isinstance(command, RRefUserDelete):
            self.handle(worker, ev.UserDeleted(command.rref_id, command.fork_id))
        elif isinstance(command, RRefChildAccept):
            self.handle(worker, ev.ChildAccepted(command.fork_id))
        else:
            try:
                self.handle(worker, ev.ForkRequested(command.rref_id, command.fork_id, source))
            except RpcError as error:
                self._excuse(self.deaths or command.fork_id not in self.live_users[command.rref_id], error)
                verdict = str(error)
        self._answer(worker, source, number, None, verdict)

    # ------------------------------------------------------------------------------------------------------------ pickling

    def pickle(self, worker: Worker, handles: Iterable[Handle]) -> tuple[list[ForkData], tuple[ev.MintedFork, ...]]:
        """The handles as a message carries them; RRefs that cannot be used are left out, as an error would stop the call."""
        data: list[ForkData] = []
        minted = []
        for handle in handles:
            fork = ForkId(worker.id, worker.protocol.draw())
            if isinstance(handle, Owner):
                self.handle(worker, ev.OwnerForked(handle.rref_id, fork, handle, handle.created))
                data.append((worker.id, handle.rref_id, fork, worker.id))
            else:
                if worker.protocol.user_state(handle.fork_id)[0] not in (UserState.PENDING, UserState.CONFIRMED):
                    continue
                self.handle(worker, ev.UserForked(handle.fork_id, fork))
                self.parent[fork] = handle.fork_id
                self.children[handle.fork_id].add(fork)
                data.append((handle.owner, handle.rref_id, fork, worker.id))
            self.in_flight[handle.rref_id].add(fork)
            minted.append(ev.MintedFork(handle.rref_id, fork))
        return data, tuple(minted)

    def unpickle(self, worker: Worker, data: Iterable[ForkData]) -> tuple[list[Handle], tuple[ForkId, ...], RpcError | None]:
        """The handles, those of them that await a confirmation, and why they cannot be used if so."""
        handles: list[Handle] = []
        pending = []
        failure = None
        for owner_id, rref_id, fork_id, parent in data:
            if owner_id == worker.id:
                owner = worker.owner(rref_id)
                self.known.add(fork_id)  # a phantom, of which no more than this will be known
                try:
                    self.handle(worker, ev.OwnerUnpickled(rref_id, fork_id, parent, owner, owner.created))
                except RpcError as error:
                    self._excuse(self.deaths or rref_id in self.given_up, error)
                    failure = error.with_traceback(None)  # which holds this frame, hence the handles
                    owner.finish(None, error)
                handles.append(owner)
            else:
                self.handle(worker, ev.UserUnpickled(rref_id, fork_id, owner_id, parent))
                handles.append(User(self, worker.id, owner_id, rref_id, fork_id))
                pending.append(fork_id)
            self.in_flight[rref_id].discard(fork_id)
        return handles, tuple(pending), failure

    def cancel(self, worker: Worker, minted: tuple[ev.MintedFork, ...]) -> None:
        for fork in minted:
            self.cancelled.add(fork.fork_id)
            self.in_flight[fork.rref_id].discard(fork.fork_id)
            if fork.fork_id in self.parent:
                self.children[self.parent[fork.fork_id]].discard(fork.fork_id)
        if worker.alive:
            self.handle(worker, ev.ForksCancelled(minted))

    # ---------------------------------------------------------------------------------------------------------- user calls

    def _serve_call(self, worker: Worker, source: WorkerId, number: int, kind: str, body: Any) -> None:
        if kind == "fetch":
            self._serve_fetch(worker, source, number, body)
            return
        rref_id, fork_id, data = body
        owner = None
        if kind == "remote":
            owner = worker.owner(rref_id)
            owner.created = True
            self.handle(worker, ev.OwnerCreated(rref_id, fork_id, source, owner))
        if data and self.random.random() < 0.05:
            self._fail_to_unpickle(worker, source, number, owner, data)
            return
        arguments, pending, failure = self.unpickle(worker, data)
        worker.running += 1
        start = partial(self._start, worker, source, number, owner, arguments, pending)
        if failure is not None:
            start(failure)
        else:
            self.handle(worker, ev.ConfirmationAwaited(start, pending))

    def _fail_to_unpickle(self, worker: Worker, source: WorkerId, number: int, owner: Owner | None, data: list[ForkData]) -> None:
        """Unpickling stops at some place; the shares before it are claimed and dropped, those behind it never claimed."""
        self.unpickle(worker, data[: self.random.randrange(len(data))])
        if owner is not None:
            owner.finish([], None)
        self._answer(worker, source, number, None, "cannot unpickle")

    def _start(
        self,
        worker: Worker,
        source: WorkerId,
        number: int,
        owner: Owner | None,
        arguments: list[Handle],
        pending: Sequence[ForkId],
        error: RpcError | None,
    ) -> None:
        if error is None and not self.deaths:
            assert set(pending) <= self.known, "a user function starts before the owners know of its arguments"
        run = partial(self._run, worker, source, number, owner, list(arguments) if error is None else [])
        arguments.clear()
        if self.random.random() < 0.3:
            self.network.call_later(self.random.uniform(0, 0.5), run)
        else:
            run()

    def _run(self, worker: Worker, source: WorkerId, number: int, owner: Owner | None, arguments: list[Handle]) -> None:
        """The user function: keeps some arguments, and returns some RRefs."""
        if not worker.alive:
            return
        worker.running -= 1
        worker.held += [handle for handle in arguments if self.random.random() < 0.3]
        if owner is not None:
            owner.finish([handle for handle in arguments if self.random.random() < 0.5], None)
            self._answer(worker, source, number, None)
        else:
            chosen = self._some([*arguments, *worker.held], 2)
            self._answer_with_rrefs(worker, source, number, chosen)

    def _answer_with_rrefs(self, worker: Worker, source: WorkerId, number: int, handles: Iterable[Handle]) -> None:
        data, minted = self.pickle(worker, handles)
        self._answer(worker, source, number, data)
        self.handle(worker, ev.ForksSent(minted, source))

    def _serve_fetch(self, worker: Worker, source: WorkerId, number: int, rref_id: RRefId) -> None:
        def ready(value: list[Handle] | None, error: RpcError | None) -> None:
            worker.running -= 1
            if not worker.alive:
                return
            if error is not None:
                # At shutdown a user may be deleted while its value is being fetched.
                self._excuse(self.deaths or self.shut or rref_id in self.given_up, error)
            self._answer_with_rrefs(worker, source, number, value or [])

        owner = worker.owner(rref_id)
        worker.running += 1
        try:
            self.handle(worker, ev.OwnerFetched(rref_id, owner, owner.created))
        except RpcError as error:
            ready(None, error)
        else:
            owner.when_ready(ready)

    # ----------------------------------------------------------------------------------------------- what the program does

    def act(self) -> None:
        """One random act of a random worker's program."""
        worker = self.random.choice([w for w in self.workers.values() if w.alive])
        to = self.random.choice([w.id for w in self.workers.values() if w.alive])
        kind = self.random.choices(
            ["remote", "call", "drop", "fetch", "local", "cancel", "give up"], weights=[6, 10, 6, 4, 2, 1, 1]
        )[0]
        if kind in ("remote", "give up"):
            self._remote(worker, to, give_up=kind == "give up")
        elif kind == "call":
            self._call(worker, to)
        elif kind == "drop" and worker.held:
            del worker.held[self.random.randrange(len(worker.held))]
        elif kind == "fetch" and worker.held:
            self._fetch(worker, self.random.choice(worker.held))
        elif kind == "local":
            owner = worker.owner(RRefId(worker.id, worker.protocol.draw()))
            owner.created = True
            owner.finish(self._some(worker.held, 2), None)
            self.owner_of[owner.rref_id] = worker.id
            self.created.add(owner.rref_id)
            worker.held.append(owner)
        elif kind == "cancel":
            _, minted = self._arguments(worker)
            self.cancel(worker, minted)

    def _some(self, handles: Sequence[Handle], most: int) -> list[Handle]:
        return self.random.sample(handles, self.random.randint(0, min(most, len(handles))))

    def _arguments(self, worker: Worker) -> tuple[list[ForkData], tuple[ev.MintedFork, ...]]:
        """Some of the program's RRefs, pickled; half of the time the program forgets one of them at once."""
        chosen = self._some(worker.held, 3)
        data, minted = self.pickle(worker, chosen)
        if chosen and self.random.random() < 0.5:
            worker.held.remove(chosen[0])
        return data, minted

    def _call(self, worker: Worker, to: WorkerId) -> None:
        data, minted = self._arguments(worker)

        def done(answer: list[ForkData] | None, error: RpcError | None) -> None:
            if error is None and worker.alive:
                self._take_result(worker, answer or [])
            elif error is not None and not isinstance(error, WorkerLostError):
                self.cancel(worker, minted)

        self.request(worker, to, "call", (None, None, data), done)
        self.handle(worker, ev.ForksSent(minted, to))

    def _take_result(self, worker: Worker, data: list[ForkData]) -> None:
        handles, pending, _ = self.unpickle(worker, data)
        self.handle(worker, ev.ConfirmationAwaited(lambda _: worker.held.extend(handles), pending))

    def _fetch(self, worker: Worker, handle: Handle) -> None:
        if isinstance(handle, Owner) or worker.protocol.user_state(handle.fork_id)[0] is UserState.FAILED:
            return

        def done(data: list[ForkData] | None, error: RpcError | None, keep: list[Handle]) -> None:
            keep.clear()
            if error is None:
                self._take_result(worker, data or [])

        # Who waits for a value holds the RRef meanwhile, up to the deadline of the fetch.
        number = self.request(worker, handle.owner, "fetch", handle.rref_id, partial(done, keep=[handle]))
        self.network.call_later(FETCH_TIMEOUT, partial(self._give_up_fetch, worker, number))

    def _give_up_fetch(self, worker: Worker, number: int) -> None:
        request = worker.requests.get(number)
        if request is not None and worker.alive:
            # A late answer is still unpickled, for the RRefs in it: nobody else would ever claim them.
            request.done, done = partial(self._take_late_answer, worker), request.done
            done(None, RpcTimeoutError("the value did not come in time"))

    def _take_late_answer(self, worker: Worker, data: list[ForkData] | None, error: RpcError | None) -> None:
        if error is None:
            self.unpickle(worker, data or [])

    def _remote(self, worker: Worker, to: WorkerId, give_up: bool) -> None:
        data, minted = self._arguments(worker)
        rref_id = RRefId(worker.id, worker.protocol.draw())
        self.owner_of[rref_id] = to
        if to == worker.id:
            fork_id = ForkId(*rref_id)
            owner = worker.owner(rref_id)
            owner.created = True
            self.handle(worker, ev.OwnerForked(rref_id, fork_id, owner, True))
            worker.held.append(owner)
        else:
            fork_id = ForkId(worker.id, worker.protocol.draw())
            self.handle(worker, ev.UserCreated(rref_id, fork_id, to))
            worker.held.append(User(self, worker.id, to, rref_id, fork_id))

        def done(_: Any, error: RpcError | None) -> None:
            if error is None:
                event: ev.Event = ev.SelfRemoteEnded(rref_id, None) if to == worker.id else ev.CreationConfirmed(fork_id)
            else:
                if not isinstance(error, WorkerLostError | RpcTimeoutError):
                    self.cancel(worker, minted)
                self.given_up.add(rref_id)
                failure = RRefCreationError(str(error))
                event = ev.SelfRemoteEnded(rref_id, failure) if to == worker.id else ev.CreationFailed(fork_id, failure)
            if worker.alive:
                self.handle(worker, event)

        number = self.request(worker, to, "remote", (rref_id, fork_id, data), done)
        self.handle(worker, ev.ForksSent(minted, to))
        if give_up:
            self.network.call_later(self.random.uniform(0, 0.1), partial(self._time_out, worker, number, minted))

    def _time_out(self, worker: Worker, number: int, minted: tuple[ev.MintedFork, ...]) -> None:
        """The caller stops waiting; the message may still arrive, or come to nothing if it carries no RRefs."""
        request = worker.requests.get(number)
        if request is None or not worker.alive:
            return
        done = request.done
        if minted:
            # The parents of its arguments wait for them: only the program gives up, the call layer goes on.
            request.done = lambda _, error: self.cancel(worker, minted) if error is not None else None
        else:
            del worker.requests[number]
        done(None, RpcTimeoutError("gave up"))

    # -------------------------------------------------------------------------------------------------------------- steps

    def step(self) -> bool:
        """Lets the next thing happen on the network; False if nothing is under way."""
        happened = self.network.step()
        for worker in self.workers.values():
            while worker.transport._inbox and worker.alive:
                (event,) = worker.transport.receive(0)
                if isinstance(event, Received):
                    self._receive(worker, event.frames[0])
                elif isinstance(event, PeerDown):
                    self._peer_down(worker, event)
        return happened

    def _peer_down(self, worker: Worker, down: PeerDown) -> None:
        error = WorkerLostError(f"worker {down.worker_id} is gone")
        for number in [number for number, request in worker.requests.items() if request.to == down.worker_id]:
            worker.requests.pop(number).done(None, error)
        self.handle(worker, ev.WorkerLost(down.worker_id, error))

    def drain(self) -> None:
        """Reports the users that died."""
        noted = True
        while noted:
            noted = False
            for worker in self.workers.values():
                while worker.notes:
                    noted = True
                    fork_id = worker.notes.pop()
                    if worker.alive:
                        self.handle(worker, ev.UserDropped(fork_id))

    def shut_down(self) -> None:
        """Deletes every user, whoever still refers to it."""
        self.shut = True
        for worker in self.workers.values():
            if worker.alive:
                for forks in self.live_users.values():
                    forks -= {fork for fork in forks if worker.protocol.user_state(fork)[0] is not UserState.DELETED}
                self.handle(worker, ev.AllUsersDropped())

    def wind_down(self) -> None:
        """The programs forget all their RRefs, also what a late answer brought."""
        for worker in self.workers.values():
            worker.held.clear()
        self.drain()

    def kill(self, worker_id: WorkerId) -> None:
        self.deaths = True
        dead = self.workers[worker_id]
        dead.alive = False
        self.network.kill(worker_id)
        dead.held.clear()
        dead.requests.clear()
