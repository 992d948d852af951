"""The distributed engine: runs backward passes over the contexts of one worker.

A pass begins with `DistEngine.backward` on the worker that opens it. There, and on every worker that gradients reach, the local
graph runs in stages (`staging`) as gradients arrive; recvs send gradients on. The worker that opened the pass runs its
stages on the thread that called `backward`; elsewhere a thread of the agent that delivered gradients does.

The answer to the message that drew a worker into a pass means "my part is done, and so is everything it led to", or says why it
failed. The opener then tells all workers that a pass has failed, so that it ends everywhere. Gradient messages have no deadline:
a pass may take hours, and ends by its answers, a failure, a lost worker, the release of its context, or shutdown.

No lock is held while a message is sent or awaited. Only `PassRegister.turn` and the leaves' queues are held while nodes run.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.autograd.profiler import record_function

from zmqagent.agent.base import NO_TIMEOUT, Reply, Requester, Respond
from zmqagent.autograd.container import DistAutogradContainer
from zmqagent.autograd.context import DistAutogradContext
from zmqagent.autograd.functions import CONTEXT_GONE, Wire
from zmqagent.autograd.pass_errors import as_error, as_raised, failure
from zmqagent.autograd.passes import Arrival, BackwardPass, Engager
from zmqagent.autograd.plan import Edge
from zmqagent.autograd.roots import check_arguments, root_edges
from zmqagent.autograd.staging import StagedGraph
from zmqagent.exceptions import (
    AutogradContextError,
    BackwardError,
    RemoteBackwardError,
    RpcError,
    ShutdownError,
)
from zmqagent.wire.commands import AbortBackward, Ack, BackwardAutograd
from zmqagent.wire.types import MessageType, WorkerId

__all__ = ["DistEngine"]

_logger = logging.getLogger(__name__)

_PATIENCE = 10.0
"""Seconds after which a pass that waits for gradients says which ones."""

_SEND_NAME = "torch::distributed::autograd::SendRpcBackward"
_BACKWARD_NAME = "torch::distributed::autograd::backward"

_ACK = Ack(MessageType.BACKWARD_AUTOGRAD_RESP)


class DistEngine:
    """Runs one worker's part of all backward passes. All methods may be called from any thread.

    Args:
        container: this worker's contexts; the engine registers itself there, to hear of releases.
        requester: sends gradients to other workers, and to this one.
    """

    def __init__(self, container: DistAutogradContainer, requester: Requester) -> None:
        self._container = container
        self._requester = requester
        # Protects the two below and the pass registers of all contexts, for single steps; nothing is sent or run under it.
        self._lock = threading.Lock()
        self._under_way: set[BackwardPass] = set()
        self._closed: RpcError | None = None
        container.observe(self)

    # Opening a pass.

    def backward(self, context_id: int, roots: Sequence[Tensor], retain_graph: bool = False) -> None:
        """Runs a backward pass from ``roots`` through all workers that they depend on, and waits until it is over.

        Gradients accumulate in the context on each worker (`DistAutogradContext.gradients`); ``.grad`` stays as it is. ^C ends
        the wait, and the pass.

        Args:
            context_id: the context in which the roots were computed.
            roots: scalars that require grad.
            retain_graph: keep the graph for another pass.

        Raises:
            InvalidTypeError: an argument has the wrong type.
            AutogradContextError: the context is not known here, or was released meanwhile.
            BackwardError: the roots cannot start a pass, or another one was opened here for this context and is not over.
            RemoteBackwardError: some part of the pass failed, here or elsewhere; the text names the worker at each hop.
            WorkerLostError: a worker that the pass needs died.
            ShutdownError: this agent shut down meanwhile.
        """
        check_arguments(context_id, roots, retain_graph)
        context = self._container.retrieve_context(context_id)
        edges = root_edges(roots)
        with record_function(_BACKWARD_NAME):
            opened = self._open(context, edges, [torch.ones_like(root) for root in roots], retain_graph)
            try:
                self._run_until_over(opened)
            except BaseException as error:
                self._fail(opened, error)
                raise
            finally:
                self._forget(opened)
                if opened.error is not None:
                    self._abort_elsewhere(opened)
            if opened.error is not None:
                raise as_raised(opened.error, self._requester.worker_id)

    def _open(
        self, context: DistAutogradContext, edges: Sequence[Edge], gradients: Sequence[Tensor], retain_graph: bool
    ) -> BackwardPass:
        with self._lock:
            register = context.passes
            older = register.current
            if older is not None and older.engager is None:
                raise BackwardError(
                    f"a backward pass of autograd context {context.context_id} is under way on this worker: wait until it is over"
                )
            opened = self._begin(context, register.draw(self._requester.worker_id), retain_graph, None, {None: edges})
            opened.take_in(Arrival(None, gradients))
        self._after_begin(opened, older)
        return opened

    def _begin(
        self,
        context: DistAutogradContext,
        pass_id: int,
        retain_graph: bool,
        engager: Engager | None,
        roots: dict[int | None, Sequence[Edge]],
    ) -> BackwardPass:
        """Registers a pass; the caller holds the lock and then calls `_after_begin` without it."""
        if self._closed is not None:
            raise type(self._closed)(*self._closed.args)
        sends = context._send_functions()
        for message_id, send in sends.items():
            roots[message_id] = send.next_functions
        begun = BackwardPass(pass_id, context, roots, sends, retain_graph, engager)
        context.passes.begin(begun)
        self._under_way.add(begun)
        return begun

    def _after_begin(self, begun: BackwardPass, older: BackwardPass | None) -> None:
        if older is not None:
            self._fail(older, BackwardError(f"a newer backward pass of autograd context {begun.context.context_id} has begun"))
        # Asked after the pass was registered: what happens from now on finds it.
        loss = begun.context.loss()
        if begun.context.is_released:
            loss = AutogradContextError(CONTEXT_GONE)
        if loss is not None:
            self._fail(begun, loss)

    # Running.

    def _run_until_over(self, opened: BackwardPass) -> None:
        """The opener's part: runs what arrives, on the calling thread, until the pass is over."""
        patience: float | None = _PATIENCE
        while not opened.is_over:
            arrivals = opened.await_arrivals(patience)
            if arrivals:
                self._run(opened, arrivals)
            elif patience is not None and not opened.is_over:
                self.report_overdue()
                patience = None

    def _run_while_claimed(self, engaged: BackwardPass) -> None:
        """The part of a thread that has delivered gradients: runs what has arrived, unless another thread is at it."""
        arrivals = engaged.claim()
        while arrivals:
            self._run(engaged, arrivals)
            arrivals = engaged.claim_next()

    def _run(self, running: BackwardPass, arrivals: Sequence[Arrival]) -> None:
        """Takes ``arrivals`` into the graph and runs all stages that can run now."""
        register = running.context.passes
        try:
            with register.turn:
                if running.is_over:
                    return
                register.sender = partial(self._send_gradients, running)
                try:
                    graph = self._graph_of(running)
                    numbers = {message_id: number for number, message_id in enumerate(running.roots)}
                    for arrival in arrivals:
                        _arrive(running, graph, numbers[arrival.message_id], arrival)
                    while not running.is_over and graph.step():
                        pass
                finally:
                    register.sender = None
        except BaseException as error:
            # Whatever a user's function raises ends the pass; what is no Exception (^C) also ends this thread's work.
            self._fail(running, error)
            if not isinstance(error, Exception):
                raise
            return
        if graph.is_finished and running.ran():
            self._succeed(running)

    def _graph_of(self, running: BackwardPass) -> StagedGraph:
        graph = running.graph
        if graph is None:
            graph = StagedGraph(list(running.roots.values()), running.context.accumulated, running.retain_graph)
            running.graph = graph
        return graph

    def _send_gradients(self, running: BackwardPass, wire: Wire, gradients: Sequence[Tensor]) -> None:
        """What a recv does when it runs: its gradients go to the worker that its tensors came from."""
        running.set_off(wire.metadata.message_id)
        command = BackwardAutograd(wire.metadata, running.pass_id, running.retain_graph, gradients)
        self._requester.request(
            wire.source,
            command.to_message(),
            partial(self._on_answer, running),
            timeout=NO_TIMEOUT,
            device_map=wire.device_map,
        )

    def _on_answer(self, running: BackwardPass, reply: Reply) -> None:
        if isinstance(reply, Ack):
            if running.answered():
                self._succeed(running)
        else:
            self._fail(running, as_error(reply))

    # Serving other workers.

    def on_backward(self, source: WorkerId, command: BackwardAutograd, respond: Respond) -> None:
        """Serves gradients that came from ``source``, and runs what they make possible on the calling thread.

        The answer comes when they are taken over, or, if they drew this worker into the pass, when its part is done.
        """
        try:
            engaged, is_first = self._join(source, command, respond)
        except RpcError as error:
            respond(failure(error, self._requester.worker_id))
            return
        try:
            engaged.take_in(Arrival(command.metadata.message_id, command.gradients))
        except BackwardError as error:
            if is_first:
                # The end of the pass is the answer, and has been given if it ended for another reason.
                self._fail(engaged, error)
            else:
                respond(failure(error, self._requester.worker_id))
            return
        if not is_first:
            respond(_ACK.to_message())
        if engaged.engager is not None:
            self._run_while_claimed(engaged)

    def _join(self, source: WorkerId, command: BackwardAutograd, respond: Respond) -> tuple[BackwardPass, bool]:
        """The pass that ``command`` belongs to, and whether the command began it here."""
        context = self._container.retrieve_context(command.metadata.context_id)
        message_id = command.metadata.message_id
        with self._lock:
            older = context.passes.current
            if older is not None and older.pass_id == command.pass_id and not older.is_over:
                return older, False
            if message_id not in context._send_functions():
                raise BackwardError(f"Could not find send function for autograd message id: {message_id}")
            if not context.passes.admits(command.pass_id):
                raise BackwardError(
                    f"backward pass {command.pass_id} of autograd context {context.context_id} is over on this worker"
                )
            begun = self._begin(context, command.pass_id, command.retain_graph, Engager(source, respond), {})
        self._after_begin(begun, older)
        return begun, True

    def on_abort(self, command: AbortBackward, respond: Respond) -> None:
        """Ends a pass that has failed elsewhere, and passes that on; harmless if the pass or its context is unknown."""
        context = self._container.find_context(command.context_id)
        if context is not None:
            with self._lock:
                is_news = context.passes.abort(command.pass_id)
                current = context.passes.current
            if is_news:
                if current is not None and current.pass_id == command.pass_id:
                    self._fail(current, RemoteBackwardError(command.reason))
                self._tell_of_failure(context, command)
        respond(Ack(MessageType.ABORT_BACKWARD_RESP).to_message())

    # The end of a pass.

    def _succeed(self, ended: BackwardPass) -> None:
        self._forget(ended)
        if ended.engager is not None:
            ended.engager.respond(_ACK.to_message())

    def _fail(self, failed: BackwardPass, error: BaseException) -> None:
        """Ends ``failed`` on this worker, unless it is over; whoever drew this worker in gets to know."""
        if not failed.fail(error):
            return
        self._forget(failed)
        if failed.engager is not None:
            failed.engager.respond(failure(error, self._requester.worker_id))

    def _forget(self, ended: BackwardPass) -> None:
        with self._lock:
            self._under_way.discard(ended)
            if ended.context.passes.current is ended:
                ended.context.passes.current = None

    def _abort_elsewhere(self, failed: BackwardPass) -> None:
        """Tells the workers that the context has spread to; they pass it on."""
        context = failed.context
        with self._lock:
            context.passes.abort(failed.pass_id)
            is_closed = self._closed is not None
        if not is_closed:
            reason = str(as_raised(failed.error, self._requester.worker_id)) if failed.error is not None else ""
            self._tell_of_failure(context, AbortBackward(context.context_id, failed.pass_id, reason))

    def _tell_of_failure(self, context: DistAutogradContext, command: AbortBackward) -> None:
        for worker_id in context._known_worker_ids() - {self._requester.worker_id}:
            try:
                self._requester.request(worker_id, command.to_message(), _log_unanswered_abort, retry=True)
            except RpcError as fault:
                # The peer is gone, or this worker shuts down; the pass ends there by that.
                _logger.debug("worker %d is not told that a backward pass failed: %s", worker_id, fault)

    # What ends passes from outside.

    def on_context_released(self, context_id: int, error: RpcError) -> None:
        """Ends the pass of a context that is gone."""
        for affected in self._passes():
            if affected.context.context_id == context_id:
                self._fail(affected, error)

    def on_worker_lost(self, worker_id: WorkerId, error: RpcError) -> None:
        """Ends the passes, and dooms later ones, that cannot complete without ``worker_id``, which died or left by ``error``."""
        for context in self._container.contexts():
            context.lose(worker_id, error)
        for affected in self._passes():
            if affected.is_concerned_by(worker_id):
                self._fail(affected, error)

    def close(self, error: RpcError | None = None) -> None:
        """Ends all passes by ``error`` and begins no more. Idempotent."""
        with self._lock:
            self._closed = error or ShutdownError("the agent has shut down: no backward pass can run")
        for affected in self._passes():
            self._fail(affected, self._closed)

    def passes_under_way(self) -> int:
        """How many passes have begun on this worker and are not over."""
        with self._lock:
            return len(self._under_way)

    def report_overdue(self) -> None:
        """Logs, once a pass, which gradients it still waits for ten seconds after it began.

        To be called now and then: a worker that did not open the pass has no thread that waits.
        """
        now = time.monotonic()
        for waiting in self._passes():
            for send in waiting.overdue_sends(now, _PATIENCE):
                _logger.warning(
                    "backward of autograd context %d has waited %.0f s for gradients from %s (worker %d) for the tensors sent "
                    "with autograd message id %d; if they were not used there, they never come",
                    waiting.context.context_id,
                    now - waiting.begun_at,
                    self._requester.worker_name(send.peer),
                    send.peer,
                    send.message_id,
                )

    def _passes(self) -> list[BackwardPass]:
        with self._lock:
            return list(self._under_way)


def _arrive(running: BackwardPass, graph: StagedGraph, root: int, arrival: Arrival) -> None:
    if arrival.message_id is None:
        graph.arrive(root, arrival.gradients)
        return
    with record_function(_SEND_NAME):
        graph.arrive(root, running.sends[arrival.message_id].placed(arrival.gradients))


def _log_unanswered_abort(reply: Reply) -> None:
    if isinstance(reply, RpcError):
        _logger.debug("the end of a backward pass was not acknowledged: %s", reply)
