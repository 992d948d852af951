"""Requests out and answers in, requests in and answers out: the traffic of one worker.

`Exchange` is the shell around the two machines that know calls: `Calls`, what this worker asked others, and `Served`, what others
asked of it. It takes in what the threads of the executor receive, and hands it back as a task, so that neither
user code nor the decoding of tensors holds up receiving.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any

from zmqagent.agent.activity import Activity, weight
from zmqagent.agent.base import OnReply, OnUnreadableRequest, OnUnusedAnswer, Reply, ReplyTaker, RequestCallback, UnreadAnswer
from zmqagent.agent.buffers import Allocate, from_heap
from zmqagent.agent.calls import CallId, Calls, Complete, Instruction
from zmqagent.agent.codec import Codec
from zmqagent.agent.detour import Detour
from zmqagent.agent.devices import Target, cpu_only
from zmqagent.agent.executor import Executor, Task
from zmqagent.agent.gil import GilProfiler
from zmqagent.agent.refusals import Refusals
from zmqagent.agent.served import Served
from zmqagent.agent.serving import Answer, Serving, is_request
from zmqagent.exceptions import CalleeError, ProtocolError, RpcError, SendFailedError, ShutdownError, UnreadableCallError
from zmqagent.transport.base import PeerRecord, Transport
from zmqagent.wire.commands import Failure
from zmqagent.wire.frames import Envelope, Label, decode, read_label
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import Message, MessageType, WorkerId
from zmqagent.wire.wrappers import type_inside

__all__ = ["Exchange"]

_logger = logging.getLogger(__name__)

_IDEMPOTENT = frozenset(
    {
        MessageType.RREF_USER_DELETE,
        MessageType.RREF_FORK_REQUEST,
        MessageType.RREF_CHILD_ACCEPT,
        MessageType.CLEANUP_AUTOGRAD_CONTEXT_REQ,
        MessageType.ABORT_BACKWARD_REQ,
        MessageType.BARRIER_REQ,
        MessageType.JOIN_REQ,
        MessageType.LEAVE_REQ,
    }
)
"""Served again when they come again, since it may have been the answer that was lost."""

_FROM_ANYBODY = frozenset({MessageType.JOIN_REQ, MessageType.LEAVE_REQ})
"""Taken in though the sender is no member: it wants to become one, or is none any more before that was heard."""


@frozen
class _Waiting:
    """A call under way: whom to tell, and what to send if it has to be sent again."""

    on_reply: OnReply
    frames: list[Any] | None
    counted: int
    asked: MessageType


class Exchange:
    """Sends and receives for one worker. All methods may be called from any thread, `receive` by one at a time.

    Args:
        me: this worker.
        transport: moves frames.
        serve: what requests are handed to.
        on_unused: what answers are handed to that nobody takes.
        detour: what messages go through on their way out, if anything; closed by `close`.
        answer_target: by caller, for a tensor's device in an answer the one it is to arrive on.
    """

    def __init__(
        self,
        me: PeerRecord,
        transport: Transport,
        serve: RequestCallback,
        on_unused: OnUnusedAnswer,
        detour: Detour | None = None,
        answer_target: Callable[[WorkerId], Target] = lambda caller: cpu_only,
    ) -> None:
        self._me = me
        self._transport = transport
        self._detour = detour
        self._serve = serve
        self._on_unused = on_unused
        self._answer_target = answer_target
        self._on_unreadable: OnUnreadableRequest = lambda request, error: error
        self._codec = Codec(me.worker_id, me.incarnation)
        self._executor: Executor | None = None
        self.gil = GilProfiler()
        # Protects _calls, _waiting and _closed_for; held for single steps of the machine. Drawing one of _numbers
        # is a single step of the interpreter.
        self._lock = threading.Lock()
        self._calls = Calls()
        self._waiting: dict[CallId, _Waiting] = {}
        self._numbers: defaultdict[WorkerId, itertools.count[int]] = defaultdict(itertools.count)
        self._closed_for: ShutdownError | None = None
        # Orders the threads that receive.
        self._served_lock = threading.Lock()
        self._served = Served()
        self.refusals = Refusals(me.name)
        self.activity = Activity()

    def start(self, executor: Executor, on_unreadable: OnUnreadableRequest = lambda request, error: error) -> None:
        """From now on tasks that do not come from receiving are given to ``executor``, and requests whose tensors cannot be
        rebuilt to ``on_unreadable``."""
        self._executor = executor
        self._on_unreadable = on_unreadable

    # Requests of this worker.

    def request(
        self,
        peer: PeerRecord,
        message: Message,
        on_reply: OnReply,
        *,
        timeout: float,
        retry: bool = False,
        target: Target = cpu_only,
    ) -> None:
        """Sends ``message`` to ``peer``; see `Requester.request`. ``timeout`` is in seconds, 0 for none; ``target`` names, for a
        tensor's device, the one it is to arrive on. Raises what `Codec.encode` and `Transport.send` raise, and ShutdownError once
        closed."""
        to = peer.worker_id
        call_id = (to, next(self._numbers[to]))
        # What is sent again must be what was meant at first, and memory that was lent is its receiver's.
        allocate = from_heap if retry else self._allocate_for(to)
        frames = self._codec.encode(message, call_id[1], peer.incarnation, target, allocate)
        counted = weight(message.type)
        now = time.monotonic()
        with self._lock:
            if self._closed_for is not None:
                raise type(self._closed_for)(*self._closed_for.args)
            self._calls.start(call_id, peer.name, type_inside(message).name, timeout=timeout, retry=retry, now=now)
            self._waiting[call_id] = _Waiting(on_reply, frames if retry else None, counted, message.type)
        self.activity.count_client(counted)
        # The answer may come the way that has brought what this thread runs.
        self._transport.let_go()
        try:
            self._send(to, frames)
        except BaseException as error:
            if retry and isinstance(error, SendFailedError):
                # As good as lost on its way, and the next try is due in any case.
                _logger.debug("a try to send a %s to worker %d failed: %s", message.type.name, to, error)
            # A call that has failed meanwhile tells of it by its callback, and must not do so twice.
            elif self._withdraw(call_id) or not isinstance(error, RpcError):
                raise

    def notify(self, peer: PeerRecord, message: Message) -> None:
        """Sends ``message``, to which there is no answer."""
        number = next(self._numbers[peer.worker_id])
        self._send(peer.worker_id, self._codec.encode(message, number, peer.incarnation))

    def _allocate_for(self, to: WorkerId) -> Allocate:
        return from_heap if to == self._me.worker_id else partial(self._transport.allocate, to)

    def _send(self, to: WorkerId, frames: list[Any]) -> None:
        if self._detour is None:
            self._deliver(to, frames)
        else:
            self._detour.send(to, frames, self._deliver)

    def _deliver(self, to: WorkerId, frames: list[Any]) -> None:
        if to != self._me.worker_id:
            self._transport.send(to, frames)
            return
        # A call to oneself takes the same way, less the socket: the callee gets copies of its own, as everywhere.
        task = self.take_in([memoryview(frame) for frame in frames])
        if task is not None:
            self.submit([task])

    def _withdraw(self, call_id: CallId) -> bool:
        """Takes back a call that was not sent; False if it has ended already, and its callback counts it down."""
        with self._lock:
            self._calls.withdrawn(call_id)
            withdrawn = self._waiting.pop(call_id, None)
        if withdrawn is None:
            return False
        self.activity.count_client(-withdrawn.counted)
        return True

    # The machine's instructions.

    def worker_lost(self, worker_id: WorkerId, reason: RpcError) -> None:
        """No answer will come from ``worker_id`` any more."""
        self.submit(self._step(partial(self._calls.worker_lost, worker_id, reason)))

    def interrupt(self) -> None:
        """^C: the calls under way fail, so that whoever waits for them is let go."""
        self.submit(self._step(self._calls.interrupted))

    def close(self, reason: ShutdownError) -> None:
        """The calls under way and all later ones fail with ``reason``. The callbacks run on the calling thread, since no other
        will run anything."""

        def step() -> list[Instruction]:
            self._closed_for = reason
            return self._calls.closed(reason)

        if self._detour is not None:
            self._detour.close()
        for task in self._step(step):
            task()

    def tick(self) -> list[Task]:
        """What time has brought: tasks that complete calls whose time is over. Sends again what is to be sent again."""
        return self._step(partial(self._calls.tick, time.monotonic()))

    def _step(self, step: Callable[[], list[Instruction]]) -> list[Task]:
        """Has the machine take a step, sends again what it says, and returns the completions as tasks."""
        tasks: list[Task] = []
        again: list[tuple[WorkerId, list[Any] | None]] = []
        # One hold for the machine and the table beside it: a call may be answered or withdrawn at any other moment.
        with self._lock:
            for instruction in step():
                if isinstance(instruction, Complete):
                    tasks.append(partial(self._complete, self._waiting.pop(instruction.call_id), instruction.error))
                else:
                    again.append((instruction.call_id[0], self._waiting[instruction.call_id].frames))
        for to, frames in again:
            if frames is not None:
                self._resend(to, frames)
        return tasks

    def _resend(self, to: WorkerId, frames: list[Any]) -> None:
        try:
            self._send(to, frames)
        except RpcError as error:
            # The call itself lives on: it ends with the loss of its worker, which is reported on its own, or with its last try.
            _logger.debug("could not send again to worker %d: %s", to, error)

    def submit(self, tasks: Iterable[Task]) -> None:
        """Has ``tasks`` run on the threads of this worker. Once these have ended, completions run on this one, and requests (of
        this worker to itself) are dropped."""
        assert self._executor is not None
        for task in tasks:
            try:
                self._executor.submit(task)
            except ShutdownError:
                if not is_request(task):
                    task()

    # Receiving.

    def take_in(self, frames: Any, accepts: Callable[[WorkerId, int], bool] | None = None) -> Task | None:
        """What is to be done about received frames. ``accepts`` tells whether an incarnation of a worker is to be heard."""
        try:
            envelope = decode(frames)
        except ProtocolError as error:
            return self._refuse(frames, error, accepts)
        if not self._is_meant(envelope, accepts):
            return None
        if envelope.type.is_response:
            return self._take_answer(envelope)
        with self._served_lock:
            is_new = self._served.admit(envelope.source, envelope.source_incarnation, envelope.call_id)
        if not is_new and envelope.type not in _IDEMPOTENT:
            return None
        return Serving(self._serve_one, envelope)

    def _is_meant(self, message: Envelope | Label, accepts: Callable[[WorkerId, int], bool] | None) -> bool:
        """Whether sender and receiver of a message are who they were when it was sent."""
        source = message.source
        from_anybody = message.type in _FROM_ANYBODY
        if accepts is not None and not from_anybody and not accepts(source, message.source_incarnation):
            _logger.debug("dropped a message of a former life of worker %d", source)
            return False
        if message.destination_incarnation not in (0, self._me.incarnation):
            _logger.debug("dropped a message that worker %d meant for a former worker", source)
            return False
        return True

    def _refuse(self, frames: Any, error: ProtocolError, accepts: Callable[[WorkerId, int], bool] | None) -> Task | None:
        """What is to be done about a message that cannot be read: whoever waits for its answer, or for this answer, is told."""
        self.refusals.note(f"cannot read a message: {error}")
        label = read_label(frames)
        if label is None or not self._is_meant(label, accepts):
            return None
        if label.is_request:
            return partial(self._answer_refused, label, error)
        if label.is_response:
            waiting = self._end_call(label)
            return partial(self._complete, waiting, error) if waiting is not None else None
        return None

    def _answer_refused(self, label: Label, error: ProtocolError) -> None:
        self._answer(label, self.failure(error))

    def forget(self, source: WorkerId, incarnation: int) -> None:
        """Nothing more comes from this incarnation."""
        with self._served_lock:
            self._served.forget(source, incarnation)

    def _take_answer(self, envelope: Envelope) -> Task | None:
        waiting = self._end_call(envelope)
        if waiting is None:
            return partial(self._leave_unused, envelope)
        if isinstance(waiting.on_reply, ReplyTaker):
            answer = UnreadAnswer(envelope.type, envelope.fields, partial(self._read, waiting, envelope))
            if waiting.on_reply.take_unread(answer):
                self.activity.count_client(-waiting.counted)
                return None
        return partial(self._complete_with, waiting, envelope)

    def _end_call(self, answer: Envelope | Label) -> _Waiting | None:
        """The call that is answered, which is under way no more; None if it was not."""
        call_id = (answer.source, answer.call_id)
        with self._lock:
            return self._waiting.pop(call_id) if self._calls.answered(call_id) else None

    def _leave_unused(self, envelope: Envelope) -> None:
        self._on_unused(_without_tensors(envelope))

    def _read(self, waiting: _Waiting, envelope: Envelope) -> Reply:
        try:
            return self._codec.reply(waiting.asked, envelope)
        except ProtocolError as error:
            self.refusals.note(f"cannot read an answer of worker {envelope.source}: {error}")
            self.submit([partial(self._leave_unused, envelope)])
            return error

    def _complete_with(self, waiting: _Waiting, envelope: Envelope) -> None:
        self._complete(waiting, self._read(waiting, envelope))

    def _complete(self, waiting: _Waiting, reply: Reply) -> None:
        try:
            waiting.on_reply(reply)
        except Exception:
            # A defect of the layer above, which must not keep others from their answers.
            _logger.exception("a callback of worker %s failed", self._me.name)
        finally:
            self.activity.count_client(-waiting.counted)

    # Requests of others.

    def _serve_one(self, envelope: Envelope) -> None:
        if self.gil.is_enabled:
            self.gil.sample()
        answer = Answer(envelope, self._answer, self.activity)
        try:
            self._serve(envelope.source, self._read_request(envelope), answer)
        except RpcError as error:
            if isinstance(error, (ProtocolError, UnreadableCallError)):
                self.refusals.note(f"refused a {envelope.type.name} of worker {envelope.source}: {error}")
            answer.fail(self.failure(error))
        except BaseException as error:
            # SystemExit too: whoever asked waits for an answer, whatever was raised.
            _logger.exception("worker %s failed to serve a %s", self._me.name, envelope.type.name)
            answer.fail(self.failure(CalleeError(f"worker {self._me.name} failed to serve a {envelope.type.name}: {error!r}")))
        answer.defer()

    def _read_request(self, envelope: Envelope) -> Message:
        try:
            return self._codec.message(envelope)
        except Exception as error:
            # Out of memory, for example. Others may wait already for what the request was to bring about.
            reason = error if isinstance(error, RpcError) else ProtocolError(f"the request could not be read: {error!r}")
            raise self._on_unreadable(_without_tensors(envelope), reason) from error

    def _answer(self, request: Envelope | Label, message: Message) -> bool:
        """Sends the answer to ``request``; False if it cannot be encoded, and a `Failure` went in its place."""
        to, incarnation, number = request.source, request.source_incarnation, request.call_id
        encoded = True
        try:
            try:
                target = self._answer_target(to) if message.tensors else cpu_only
                frames = self._codec.encode(message, number, incarnation, target, self._allocate_for(to))
            except Exception as error:
                # The result cannot travel, and the caller should know why.
                encoded = False
                reason = error if isinstance(error, RpcError) else CalleeError(f"the result cannot be encoded: {error!r}")
                frames = self._codec.encode(self.failure(reason), number, incarnation)
            self._send(to, frames)
        except RpcError as error:
            # The caller is gone, or this worker is: nobody waits for the answer.
            _logger.debug("the answer to worker %d was not sent: %s", to, error)
        return encoded

    def failure(self, error: RpcError) -> Message:
        """The answer that says that a request has failed here."""
        text = f"On WorkerInfo(id={self._me.worker_id}, name={self._me.name}): {error}"
        return Failure(error.code, type(error).__qualname__, text).to_message()

    def dropped(self) -> Mapping[str, int]:
        """How many answers came too late, how many requests came twice, and how many messages could not be read."""
        return {
            "agent.late_replies": self._calls.late_replies,
            "agent.duplicate_requests": self._served.duplicates,
            "agent.refused_messages": self.refusals.total,
        }


def _without_tensors(envelope: Envelope) -> Message:
    return Message(envelope.type, envelope.fields, envelope.payload, envelope.buffers)
