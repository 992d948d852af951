"""Workers of a group in one process, joined by a network in memory that delivers in random order.

Each worker has a real container and a real engine; calls, answers and gradients travel as real messages, their tensors copied
as a wire would. What is missing is the agent: a thread pool stands in for it.
"""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from zmqagent.agent.base import UNSET_TIMEOUT, OnReply, Reply
from zmqagent.autograd.container import DistAutogradContainer
from zmqagent.autograd.engine import DistEngine
from zmqagent.exceptions import RpcError, ShutdownError, UnknownWorkerError, WorkerLostError, error_class
from zmqagent.wire.commands import AbortBackward, Ack, BackwardAutograd, CleanupContexts, Failure, ForwardAutograd, parse
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["Call", "Network", "Worker"]

Function = Callable[..., Sequence[Tensor]]
"""What a call runs: takes the worker it runs on and the tensors, returns tensors."""


@dataclass
class Call:
    """One request under way."""

    source: WorkerId
    to: WorkerId
    message: Message
    on_reply: OnReply
    is_answered: bool = False


class Network:
    """``size`` workers. Use as a context manager; ``before_delivery`` may hold up or watch each request."""

    def __init__(self, size: int, seed: int, before_delivery: Callable[[Call], None] | None = None) -> None:
        self._rng = random.Random(seed)
        self._before_delivery = before_delivery
        # Protects what follows; `settle` waits on it until nothing is under way.
        self._changed = threading.Condition()
        self._tasks: list[Callable[[], None]] = []
        self._busy = 0
        self._open: dict[int, Call] = {}
        self._lost: set[WorkerId] = set()
        self._functions: dict[int, Function] = {}
        self.errors: list[BaseException] = []
        self._pool = ThreadPoolExecutor(64)
        self.workers = [Worker(self, WorkerId(number)) for number in range(size)]

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        for worker in self.workers:
            worker.engine.close()
            worker.container.close(ShutdownError("the test is over"))
        self.settle()
        self._pool.shutdown()
        assert not self.errors, self.errors

    def later(self, task: Callable[[], None]) -> None:
        """Runs ``task`` on a thread of the pool, in random order with the others that wait."""
        with self._changed:
            self._tasks.append(task)
            self._busy += 1
        self._pool.submit(self._run_one)

    def _run_one(self) -> None:
        with self._changed:
            task = self._tasks.pop(self._rng.randrange(len(self._tasks)))
        try:
            task()
        except BaseException as error:
            self.errors.append(error)
        # At rest means that nothing is held any more either.
        del task
        with self._changed:
            self._busy -= 1
            self._changed.notify_all()

    def settle(self) -> None:
        """Waits until no message is under way."""
        with self._changed:
            assert self._changed.wait_for(lambda: self._busy == 0, timeout=60), "the network does not come to rest"

    def register(self, function: Function) -> int:
        """A number under which any worker finds ``function``."""
        with self._changed:
            self._functions[number := len(self._functions)] = function
        return number

    def function(self, number: int) -> Function:
        with self._changed:
            return self._functions[number]

    def request(self, call: Call) -> None:
        with self._changed:
            if not 0 <= call.to < len(self.workers) or call.to in self._lost:
                raise UnknownWorkerError(f"no worker {call.to}")
            self._open[id(call)] = call
        self.later(lambda: self._deliver(call))

    def _deliver(self, call: Call) -> None:
        if self._before_delivery is not None:
            self._before_delivery(call)
        if call.to in self._lost:
            return
        message = Message(call.message.type, call.message.fields, tensors=[copied(tensor) for tensor in call.message.tensors])
        try:
            self.workers[call.to].serve(call.source, message, lambda answer: self._answer(call, answer))
        except Exception as error:
            self._answer(call, Failure(0, type(error).__name__, str(error)).to_message())

    def _answer(self, call: Call, answer: Message) -> None:
        if call.to in self._lost:
            return
        assert not call.is_answered, f"{call.message.type.name} was answered twice"
        call.is_answered = True
        answer = Message(answer.type, answer.fields, tensors=[copied(tensor) for tensor in answer.tensors])
        self._reply(call, parse(answer))

    def _reply(self, call: Call, reply: Reply) -> None:
        with self._changed:
            if self._open.pop(id(call), None) is None:
                return
        if isinstance(reply, Failure) and reply.code:
            reply = error_class(reply.code)(reply.text)
        self.later(lambda: call.on_reply(reply))

    def lose(self, worker_id: WorkerId) -> None:
        """Lets a worker die: nothing more comes from it, and the others get to know."""
        error = WorkerLostError(f"worker {worker_id} died")
        with self._changed:
            self._lost.add(worker_id)
            broken = [call for call in self._open.values() if call.to == worker_id]
        for call in broken:
            self._reply(call, error)
        for worker in self.workers:
            if worker.worker_id not in self._lost:
                worker.engine.on_worker_lost(worker_id, error)
                worker.container.release_opened_by(worker_id, error)


class Worker:
    """One worker; it is its own requester."""

    def __init__(self, network: Network, worker_id: WorkerId) -> None:
        self.network = network
        self.worker_id = worker_id
        self.container = DistAutogradContainer(self)
        self.engine = DistEngine(self.container, self)

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
        self.network.request(Call(self.worker_id, to, message, on_reply))

    def call(self, to: int, function: Function, *tensors: Tensor) -> Future[list[Tensor]]:
        """Runs ``function`` on another worker, in the calling thread's context."""
        context = self.container.current_context()
        inner = Message(MessageType.PYTHON_CALL, (self.network.register(function),), tensors=tensors)
        metadata = context.attach_outgoing(WorkerId(to), tensors)
        future: Future[list[Tensor]] = Future()

        def on_reply(reply: Reply) -> None:
            if isinstance(reply, ForwardAutograd):
                future.set_result(context.attach_incoming(reply.metadata, WorkerId(to), reply.inner.tensors))
            else:
                future.set_exception(reply if isinstance(reply, RpcError) else RuntimeError(str(reply)))

        self.request(WorkerId(to), ForwardAutograd(metadata, inner).to_message(), on_reply)
        return future

    def serve(self, source: WorkerId, message: Message, respond: Callable[[Message], None]) -> None:
        """What the request callback does."""
        command = parse(message)
        if isinstance(command, ForwardAutograd):
            context = self.container.get_or_create_context(command.metadata.context_id)
            tensors = context.attach_incoming(command.metadata, source, command.inner.tensors)
            with self.container.activate(context):
                results = self.network.function(command.inner.fields[0])(self, *tensors)
            answer = Message(MessageType.PYTHON_RET, (), tensors=results)
            respond(ForwardAutograd(context.attach_outgoing(source, results), answer).to_message())
        elif isinstance(command, BackwardAutograd):
            self.engine.on_backward(source, command, respond)
        elif isinstance(command, AbortBackward):
            self.engine.on_abort(command, respond)
        elif isinstance(command, CleanupContexts):
            for context_id in command.context_ids:
                self.container.on_cleanup(context_id, source)
            respond(Ack(MessageType.CLEANUP_AUTOGRAD_CONTEXT_RESP).to_message())
        else:
            raise AssertionError(f"no test sends a {command}")


def copied(tensor: Tensor) -> Tensor:
    """A tensor as it comes off a wire: a leaf with the same flag."""
    return tensor.detach().clone().requires_grad_(tensor.requires_grad)
