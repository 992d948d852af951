"""The agent of one worker: what torch calls an RpcAgent, and what the layers above see as a `Requester`.

It joins the parts of its layer: the transport, the group, the exchange of requests, and the executor whose threads receive and
run. It unpickles nothing; requests go up through the `RequestCallback`.

How it ends. `join` waits until no worker of the group has a call under way. `shutdown` says goodbye, stops the threads, fails
what still waits, and closes the transport; it may be called at any time, from any thread, and more than once. Functions that
still run after that cannot be ended from outside. It waits for them for a while, says in the log where they are, and goes.
"""

from __future__ import annotations

import atexit
import itertools
import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch
from torch.distributed.rpc import WorkerInfo

from zmqagent.agent.admission import Admission, Departures
from zmqagent.agent.barriers import Barriers
from zmqagent.agent.base import (
    UNSET_TIMEOUT,
    OnReply,
    OnUnreadableRequest,
    OnUnusedAnswer,
    RequestCallback,
    Respond,
    check_timeout,
)
from zmqagent.agent.clock import Clock
from zmqagent.agent.detour import Detour
from zmqagent.agent.device_routes import DeviceRoutes
from zmqagent.agent.devices import DeviceMap, Target
from zmqagent.agent.exchange import Exchange
from zmqagent.agent.executor import REPORT_EVERY, Executor, Task
from zmqagent.agent.farewell import Farewell
from zmqagent.agent.group import Group
from zmqagent.agent.interrupts import InterruptWatch
from zmqagent.agent.membership_events import Member, MemberState, SendAnnouncement, WorkerCame, WorkerGone
from zmqagent.agent.news import News
from zmqagent.agent.serving import is_request
from zmqagent.exceptions import InvalidTypeError, ProtocolError, RpcError, RpcTimeoutError, ShutdownError, UnknownWorkerError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.transport.base import Event, PeerRecord, Received, Transport
from zmqagent.wire.types import Message, MessageType, WorkerId

__all__ = ["OnWorkerJoined", "OnWorkerLost", "ZmqRpcAgent"]

_logger = logging.getLogger(__name__)

OnWorkerJoined = Callable[[WorkerId], None]
OnWorkerLost = Callable[[WorkerId, RpcError], None]

_GROUP_ENDED = "the group has ended"
"""The reason of a goodbye after the last barrier. What such a worker holds is not reclaimed: it must have let it go before."""

_EXIT_WAIT = 1.0
"""Seconds that the interpreter's exit waits for functions that still run, if nobody called `shutdown`."""

_PATIENCE = 60.0
"""Seconds that `shutdown` waits for functions that still run after a last `join`. No call waits for them any more, but they may
have something to finish, such as the callbacks of a future."""

_PATIENCE_WITHOUT_JOIN = 1.0
"""The same if the group has not come to its end together (``graceful=False``): enough for those that wait for a call, which fails
now."""

_JOIN_PAUSE = 0.01
"""Seconds between two rounds of `join`: somebody still serves a call, and asking without a pause would slow that down."""

_HOUSEKEEPING = 1.0
"""Seconds between two looks at what nobody needs any more."""


class ZmqRpcAgent:
    """One worker's agent. Made by the backend; programs get it from ``rpc.api._get_current_rpc_agent()``.

    Args:
        me: this worker's record, as the others know it.
        transport: bound, not used by anybody else; closed by `shutdown`.
        options: of this worker.
        detour: what its messages go through on their way out, if anything; closed by `shutdown`.
        roster: keeps the directory of a dynamic group; None for a static one.
    """

    def __init__(
        self,
        me: PeerRecord,
        transport: Transport,
        options: ZmqRpcBackendOptions,
        detour: Detour | None = None,
        roster: Departures | None = None,
    ) -> None:
        self._me = me
        self._info = WorkerInfo(me.name, me.worker_id)
        self._transport = transport
        self._options = options
        self._rpc_timeout = float(options.rpc_timeout)
        self._routes = DeviceRoutes(me.name, options.device_maps, options.devices)
        self._exchange = Exchange(me, transport, self._serve, lambda answer: self._on_unused(answer), detour, self._answer_target)
        self._group = Group(
            me,
            transport,
            on_came=self._on_worker_came,
            on_gone=self._on_worker_gone,
            send_announcement=self._announce,
            send_barrier=lambda asked: self._barriers.send(asked),
            say_goodbye=lambda goodbye: self._farewell.say(goodbye),
        )
        self._farewell = Farewell(me, self._group, self._exchange)
        self._news = News(self._exchange.submit)
        self._barriers = Barriers(me, self._group, self._exchange, self._wait)
        self._admission = (
            None if roster is None else Admission(me, self._group, transport, self._exchange, roster, self._news.tell)
        )
        self._clock = Clock(self._tick, f"zmqagent-{me.name}")
        self._executor = Executor(
            self._receive, transport.wake, options.num_worker_threads, f"zmqagent-{me.name}", self._clock.hurry
        )
        self._interrupts: InterruptWatch | None = None
        self._callback: RequestCallback | None = None
        self._on_worker_lost: OnWorkerLost | None = None
        self._on_worker_joined: OnWorkerJoined = lambda worker_id: None
        self._on_unused: OnUnusedAnswer = lambda answer: None
        self._keep_house: Task = lambda: None
        self._house_kept_at = time.monotonic()
        self._joins = 0
        self._has_ended = False
        # Lets one thread through to shut down.
        self._shutdown_lock = threading.Lock()
        self._is_shut_down = False

    def __repr__(self) -> str:
        return f"<ZmqRpcAgent {self._me.name!r} ({self._me.worker_id}), {self._transport!r}>"

    def enter(self, records: Iterable[PeerRecord]) -> None:
        """Takes in the group, this worker first."""
        for record in (self._me, *records):
            self._routes.take_in(record)
            self._group.join(record)

    def start(
        self,
        callback: RequestCallback,
        on_worker_lost: OnWorkerLost,
        on_unused: OnUnusedAnswer,
        keep_house: Task = lambda: None,
        on_worker_joined: OnWorkerJoined = lambda worker_id: None,
        on_unreadable: OnUnreadableRequest = lambda request, error: error,
    ) -> None:
        """Begins to serve. ``callback`` gets the requests of peers, ``on_unreadable`` those whose tensors cannot be rebuilt, and
        ``on_unused`` the answers that nobody takes. On a thread of the agent ``on_worker_lost`` is told of each peer that has
        gone, once its calls have failed, and ``keep_house`` is called about once a second. ``on_worker_joined`` is told there of
        each worker that joins a dynamic group from now on, before that worker knows that it has joined."""
        self._callback = callback
        self._on_worker_lost = on_worker_lost
        self._on_unused = on_unused
        self._keep_house = keep_house
        self._on_worker_joined = on_worker_joined
        self._exchange.start(self._executor, on_unreadable)
        self._executor.start()
        self._clock.start()
        self._interrupts = InterruptWatch(self._exchange.interrupt)
        self._pid = os.getpid()
        atexit.register(self._at_exit)

    def announce(self, timeout: float) -> None:
        """In a dynamic group, after `start`: tells the members that this worker has joined; returns once all of them know.

        Args:
            timeout: seconds; 0 for no limit.

        Raises:
            RendezvousError: a member did not answer in time, or would not have this worker.
        """
        assert self._admission is not None
        try:
            self._admission.join(timeout)
        except BaseException:
            # ^C too: somebody may know this worker already.
            self._admission.leave(float("inf"))
            raise

    # What the layers above ask (`Requester`).

    @property
    def worker_id(self) -> WorkerId:
        """This worker's id."""
        return self._me.worker_id

    def worker_name(self, worker_id: WorkerId) -> str:
        """The name of a member of the group; a readable stand-in if the id is unknown."""
        return self._group.name_of(worker_id)

    @property
    def devices(self) -> Sequence[torch.device]:
        """See `Requester.devices`."""
        return self._routes.handed_over()

    def map_back(self, caller: WorkerId) -> DeviceMap:
        """See `Requester.map_back`."""
        return self._routes.map_back(self._group.find(caller).record)

    def request(
        self,
        to: WorkerId,
        message: Message,
        on_reply: OnReply,
        *,
        timeout: float = UNSET_TIMEOUT,
        retry: bool = False,
        device_map: DeviceMap | None = None,
    ) -> None:
        """See `Requester.request`."""
        if os.getpid() != self._me.pid:
            # Before any lock: a forked child has copies of them, which may be held for ever.
            raise ShutdownError(f"this process was forked from worker {self._me.name} and is none itself; call init_rpc here")
        if self._is_shut_down:
            raise ShutdownError(f"worker {self._me.name} has shut down and sends nothing more")
        peer = self._group.destination(to)
        given = check_timeout(timeout)
        seconds = self._rpc_timeout if given == UNSET_TIMEOUT else given
        while True:
            target = self._routes.of_request(peer, device_map)
            try:
                return self._exchange.request(peer, message, on_reply, timeout=seconds, retry=retry, target=target)
            except UnknownWorkerError:
                # The group knows it, but the transport not yet, or no more. Each further round takes another change of the group.
                peer = self._group.reach(to)

    # What torch asks.

    @property
    def is_static_group(self) -> bool:
        """Whether all workers are known from the start."""
        return self._admission is None

    def get_worker_info(self, worker: str | int | WorkerInfo | None = None) -> WorkerInfo:
        """The WorkerInfo of a member by name or id; of this worker without an argument.

        Raises:
            UnknownWorkerError: the group has no such member.
        """
        if worker is None:
            return self._info
        if isinstance(worker, WorkerInfo):
            return worker
        if isinstance(worker, bool) or not isinstance(worker, (str, int)):
            raise InvalidTypeError(f"a worker is named by its name or its id, not by a {type(worker).__name__}")
        record = self._group.find(worker if isinstance(worker, str) else WorkerId(worker)).record
        return WorkerInfo(record.name, record.worker_id)

    def get_worker_infos(self) -> list[WorkerInfo]:
        """The WorkerInfos of all members, by id; of a dynamic group those who are there at the moment."""
        members = [m for m in self._group.members() if self.is_static_group or not m.state.is_gone]
        return [WorkerInfo(member.record.name, member.record.worker_id) for member in members]

    def find_member(self, name: str) -> Member:
        """The member that bears ``name`` now, or bore it last; raises `UnknownWorkerError` if there is none."""
        return self._group.find(name)

    def get_members(self) -> tuple[Member, ...]:
        """All members that there are or were, by id, with their states."""
        return self._group.members()

    def _get_device_map(self, dst: WorkerInfo) -> dict[torch.device, torch.device]:
        """The device map of this worker towards ``dst``."""
        return dict(self._routes.map_to(dst.name))

    def _get_backend_options(self) -> ZmqRpcBackendOptions:
        return self._options

    def get_rpc_timeout(self) -> float:
        """The default timeout in seconds; 0 for none."""
        return self._rpc_timeout

    def set_rpc_timeout(self, seconds: float) -> None:
        """Sets the default timeout of later calls; 0 for none.

        Raises:
            InvalidTypeError, InvalidOptionError: it is no finite number, or negative.
        """
        self._rpc_timeout = check_timeout(seconds, may_be_unset=False)

    def enable_gil_profiling(self, flag: bool) -> None:
        """Begins, or ends, to measure how long threads that serve requests wait for the interpreter's lock."""
        self._exchange.gil.is_enabled = flag

    def get_metrics(self) -> dict[str, str]:
        """torch's metrics of an agent, and how many messages came late, twice, or such that they could not be read."""
        client, server = self._exchange.activity.active()
        metrics = {
            "agent.thread_pool_size": self._executor.size,
            "agent.num_idle_threads": self._executor.num_idle(),
            "agent.client_active_calls": client,
            "agent.server_active_calls": server,
            "agent.server_active_async_calls": self._exchange.activity.active_async(),
            **self._exchange.dropped(),
            **self._exchange.gil.metrics(),
        }
        return {name: str(value) for name, value in metrics.items()}

    def get_debug_info(self) -> dict[str, str]:
        """The metrics, and the state of each member."""
        info = self.get_metrics()
        for member in self._group.members():
            info[f"agent.member.{member.record.name}"] = member.state.value
        return info

    def sync(self) -> None:
        """Waits until every worker has reached this call (torch's RpcAgent has it too). In a dynamic group, whose workers have
        not been there for equally many of these, it does nothing."""
        if self.is_static_group:
            self._joins += 1
            self._barriers.wait(f"sync/{self._joins}", 0, float("inf"))

    def check_complete(self) -> None:
        """Raises the `WorkerLostError` of a member that is lost, if there is one."""
        for member in self._group.members():
            if member.state is MemberState.LOST:
                self._group.destination(member.record.worker_id)

    def join(self, shutdown: bool = False, timeout: float = 0) -> None:
        """Waits until no worker of the group has a call under way; in a dynamic group, until this worker has none.

        Args:
            shutdown: this is the end. A static group ends: peers that go from then on were expected to. A dynamic one goes on
                without this worker, which leaves: it takes no more calls, lets those end that it serves, and tells the others.
            timeout: seconds; 0 for no limit.

        Raises:
            RpcTimeoutError: a call is still under way, here or, in a static group, elsewhere.
            WorkerLostError: a worker of a static group died that should have come too.
        """
        deadline = time.monotonic() + timeout if timeout else float("inf")
        if self._admission is not None:
            if shutdown:
                self.refuse_calls()
            if not self._wait(partial(self._exchange.activity.wait_until_idle, serving=shutdown), deadline):
                raise self._busy(timeout)
            if shutdown:
                self._admission.leave(deadline)
            return
        self._joins += 1
        for turn in itertools.count():
            if not self._wait(self._exchange.activity.wait_until_idle, deadline) or (turn and time.monotonic() > deadline):
                raise self._busy(timeout)
            # A call that another worker makes may bring forth new ones here: only a round in which nobody had any ends it.
            if self._barriers.wait(f"join/{self._joins}/{turn}", self._exchange.activity.busy(), deadline) == 0:
                break
            time.sleep(_JOIN_PAUSE)
        if shutdown:
            self._group.end()
            self._has_ended = True

    def _wait(self, wait: Callable[[float], bool], deadline: float) -> bool:
        """Waits by ``wait``, in Python, where ^C is seen. Says now and then which calls are under way, since only the user can
        know whether these will ever end."""
        while not wait(min(REPORT_EVERY, max(0.0, deadline - time.monotonic()))):
            if time.monotonic() >= deadline:
                return False
            client, server = self._exchange.activity.active()
            if client or server:
                calls = f"{client} of its own calls and {server} that it serves are under way"
                _logger.warning("worker %s waits for the group: %s. %s", self._me.name, calls, self._executor.report())
        return True

    def _busy(self, timeout: float) -> RpcTimeoutError:
        client, server = self._exchange.activity.active()
        return RpcTimeoutError(
            f"worker {self._me.name} waited {timeout:g} s for its calls to end, and {client} of its own and {server} that it "
            "serves are still under way"
        )

    def refuse_calls(self) -> None:
        """In a dynamic group: from now on no call of another worker begins here, as this one leaves; those under way go on."""
        assert self._admission is not None
        self._admission.refuse_calls()

    def shutdown(self) -> None:
        """Ends the agent: says goodbye, ends the threads, fails what waits, closes the transport. Idempotent.

        Functions that still run are waited for, one minute after a last `join` and one second without, and then left behind.
        """
        with self._shutdown_lock:
            if self._is_shut_down:
                return
            self._is_shut_down = True
        reason = ShutdownError(f"worker {self._me.name} shut down")
        if self._admission is not None:
            self._admission.depart()
        self._group.leave(_GROUP_ENDED if self._has_ended else "it shut down")
        if self._interrupts is not None:
            self._interrupts.close()
        self._clock.stop()
        # Requests that had not begun are dropped: their callers learn it from the goodbye. Completions are owed to callers here.
        for task in self._executor.stop():
            if not is_request(task):
                task()
        # Before the threads have ended: a function that one of them runs may wait for the answer to a call.
        self._exchange.close(reason)
        if self._executor.wait_for_end(_PATIENCE if self._has_ended else _PATIENCE_WITHOUT_JOIN):
            atexit.unregister(self._at_exit)
        self._exchange.refusals.report(at_once=True)
        self._transport.close()

    def _at_exit(self) -> None:
        """The interpreter ends, and nobody called `shutdown`. A thread that came back from C++ after that would abort the
        process, so the threads end first. The others notice that this worker is gone."""
        # A forked child has a copy of this agent, and none of its threads.
        if self._pid == os.getpid():
            assert self._interrupts is not None
            self._interrupts.close()
            self._clock.stop()
            self._executor.stop()
            self._executor.join(_EXIT_WAIT)

    # Receiving, on the idle threads of the executor, and on the clock's.

    def _receive(self) -> list[Task]:
        return self._take_in(self._transport.receive(None))

    def _take_in(self, events: Sequence[Event]) -> list[Task]:
        tasks = []
        for event in events:
            if isinstance(event, Received):
                task = self._exchange.take_in(event.frames, self._group.accepts)
                if task is not None:
                    tasks.append(task)
            else:
                self._group.on_peer_event(event)
        return tasks

    def _tick(self) -> bool:
        """What time brings; says whether there is more to come soon."""
        self._exchange.submit(self._take_in(self._transport.check()))
        self._exchange.submit(self._exchange.tick())
        now = time.monotonic()
        if now - self._house_kept_at >= _HOUSEKEEPING:
            self._house_kept_at = now
            self._exchange.refusals.report()
            self._exchange.submit([self._keep_house, self._transport.tidy])
        return self._executor.look()

    def _serve(self, source: WorkerId, message: Message, respond: Respond) -> None:
        if message.type is MessageType.BARRIER_REQ:
            self._barriers.serve(source, message, respond)
        elif message.type is MessageType.GOODBYE:
            self._farewell.serve(source, message)
        elif message.type is MessageType.JOIN_REQ or message.type is MessageType.LEAVE_REQ:
            self._serve_announcement(source, message, respond)
        else:
            if self._admission is not None:
                self._admission.check(source, message)
            assert self._callback is not None
            self._callback(source, message, respond)

    def _answer_target(self, caller: WorkerId) -> Target:
        return self._routes.of_answer(self._group.find(caller).record)

    # The group's affairs.

    def _serve_announcement(self, source: WorkerId, message: Message, respond: Respond) -> None:
        if self._admission is None:
            raise ProtocolError(f"worker {source} announced itself, but the group of worker {self._me.name!r} is static")
        self._admission.serve(source, message, respond)

    def _announce(self, announcement: SendAnnouncement) -> None:
        assert self._admission is not None
        self._admission.send(announcement)

    def _on_worker_came(self, came: WorkerCame) -> None:
        self._routes.take_in(came.record)
        if self._callback is None:
            return  # One of those who are there when this worker comes.
        self._news.tell(partial(self._on_worker_joined, came.record.worker_id))

    def _on_worker_gone(self, gone: WorkerGone) -> None:
        worker_id = gone.record.worker_id
        self._exchange.worker_lost(worker_id, gone.error)
        self._exchange.forget(worker_id, gone.record.incarnation)
        if self._admission is not None and not gone.expected:
            self._exchange.submit([partial(self._admission.forget, gone.record)])
        if self._group.find(worker_id).reason != _GROUP_ENDED and self._on_worker_lost is not None:
            self._news.tell(partial(self._on_worker_lost, worker_id, gone.error))
