"""One request of another worker: the task of serving it, and the one answer that it gets."""

from __future__ import annotations

import threading
from collections.abc import Callable

from zmqagent.agent.activity import Activity, weight
from zmqagent.agent.executor import Task
from zmqagent.exceptions import ProtocolError
from zmqagent.wire.frames import Envelope
from zmqagent.wire.frozen import frozen
from zmqagent.wire.types import Message, MessageType

__all__ = ["Answer", "Serving", "is_request"]


@frozen
class Serving:
    """The task of serving one request; told apart from completions, since it is dropped when the worker shuts down."""

    serve: Callable[[Envelope], None]
    envelope: Envelope

    def __call__(self) -> None:
        self.serve(self.envelope)


def is_request(task: Task) -> bool:
    """Whether a task is the serving of a request that has not begun; what else there is to do is owed to callers here."""
    return isinstance(task, Serving)


class Answer:
    """Answers one request, once: the `Respond` of `zmqagent.agent.base`.

    Args:
        request: what is answered.
        send: sends the answer to a request; False if that cannot travel, and a failure went in its place.
        activity: counts the request until it is answered.
    """

    def __init__(self, request: Envelope, send: Callable[[Envelope, Message], bool], activity: Activity) -> None:
        self._request = request
        self._send = send
        self._activity = activity
        self._weight = weight(request.type)
        # Protects the two flags: the handler's thread may return while another one answers.
        self._lock = threading.Lock()
        self._is_answered = False
        self._is_deferred = False
        activity.count_server(self._weight, 0)

    def __call__(self, message: Message) -> bool:
        if not self._claim():
            raise ProtocolError(f"call {self._request.call_id} of worker {self._request.source} was answered twice")
        return self._answer(message)

    def fail(self, failure: Message) -> None:
        """Answers with ``failure``, unless the request was answered before, or nobody waits for an answer."""
        if self._claim() and self._request.type is not MessageType.GOODBYE:
            self._answer(failure)

    def defer(self) -> None:
        """The handler has returned; if it has not answered, something else will."""
        with self._lock:
            self._is_deferred = not self._is_answered
            if self._is_deferred:
                self._activity.count_server(0, self._weight)

    def _claim(self) -> bool:
        """Whether the caller of this is the one to answer."""
        with self._lock:
            is_first = not self._is_answered
            self._is_answered = True
        return is_first

    def _answer(self, message: Message) -> bool:
        try:
            return self._send(self._request, message)
        finally:
            self._activity.count_server(-self._weight, -self._weight if self._is_deferred else 0)
