"""One worker of a group in this process: every part of it, put together, and what it lends torch in place of torch's own."""

from __future__ import annotations

import functools
import random
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.rpc import api

from zmqagent import torch_bindings
from zmqagent.agent.agent import ZmqRpcAgent
from zmqagent.agent.checks import check_group, check_name, check_worker_id
from zmqagent.agent.detour import Detour
from zmqagent.agent.device_routes import devices_of_this_worker
from zmqagent.agent.rendezvous import Rendezvous
from zmqagent.agent.roster import check_static
from zmqagent.autograd.cleanup import GatheredCleanups
from zmqagent.autograd.container import DistAutogradContainer
from zmqagent.autograd.engine import DistEngine
from zmqagent.exceptions import AlreadyInitializedError, InvalidTypeError, RpcError, ShutdownError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.rpc.failures import raising
from zmqagent.rpc.futures import collect_all, wait_all
from zmqagent.rpc.invoke import CallPickler, Invoker
from zmqagent.rpc.messenger import Messenger
from zmqagent.rpc.profiler import RpcProfiler
from zmqagent.rpc.remote_module import scriptable_form
from zmqagent.rpc.request_callback import RpcRequestCallback
from zmqagent.rpc.result_tensors import TensorExtractor
from zmqagent.rpc.rref_calls import RpcRRefCalls
from zmqagent.rpc.shares import give_back
from zmqagent.rref.context import RRefContext
from zmqagent.transport.base import PeerRecord
from zmqagent.transport.binding import bind
from zmqagent.transport.hosts import describe_self, host_identity
from zmqagent.transport.probe import has_ended
from zmqagent.wire.types import WorkerId

__all__ = ["Worker", "draw_incarnation"]

_INCARNATION_BITS = 63


class Worker:
    """All parts of one worker. `start` joins the group; torch's ``shutdown`` ends it through the names in `replacements`."""

    def __init__(self, agent: ZmqRpcAgent, first_local_id: int = 0) -> None:
        self.agent = agent
        self._contexts = DistAutogradContainer(agent, first_local_id, GatheredCleanups(agent))
        self._engine = DistEngine(self._contexts, agent)
        messenger = Messenger(agent, self._contexts)
        self._profiler = RpcProfiler(agent)
        rref_calls = RpcRRefCalls(agent, messenger, self._engine, self._profiler)
        self._rrefs = RRefContext(agent, rref_calls, first_local_id=first_local_id)
        self._invoker = Invoker(messenger, self._rrefs)
        self._callback = RpcRequestCallback(agent, messenger, self._contexts, self._engine, self._rrefs, self._profiler)

    @classmethod
    def start(
        cls,
        store: dist.Store,
        name: str,
        rank: int,
        world_size: int,
        options: ZmqRpcBackendOptions,
        detour: Detour | None = None,
    ) -> Worker:
        """Finds the group through ``store`` and starts to serve it. What it sends goes through ``detour``, if there is one.

        Raises:
            RendezvousError: somebody did not come in time, or could not join.
            InvalidOptionError, InvalidTypeError: a name, a rank or an option that is illegal, or that two workers share.
        """
        rendezvous = Rendezvous(store, name, rank, world_size, options.rpc_timeout)
        with rendezvous.refusing_on_failure():
            check_name(name)
            check_worker_id(rank, world_size)
            check_static(store, has_ended)
            hosts = rendezvous.hosts(host_identity())
            incarnation = draw_incarnation()
            transport = bind(options, incarnation, share_host=len(set(hosts)) == 1)
            try:
                devices = devices_of_this_worker(options).to_text()
                me = describe_self(name, WorkerId(rank), incarnation, transport.addresses, devices)
                records = rendezvous.records(me)
                check_group(records, world_size)
                worker = cls(ZmqRpcAgent(me, transport, options, detour))
            except BaseException:
                transport.close(linger=0)
                raise
            worker._begin_or_abandon(records)
        return worker

    def _begin_or_abandon(self, records: Iterable[PeerRecord]) -> None:
        try:
            self._begin(records)
        except BaseException:
            self._abandon()
            raise

    def _begin(self, records: Iterable[PeerRecord]) -> None:
        """Takes in the group, and starts to serve it."""
        self.agent.enter(records)
        # What torch's profilers record from now on bears this worker's id.
        torch_bindings.original("_set_profiler_node_id")(int(self.agent.worker_id))
        # Before the first request is served: what it runs may make calls of its own, or be a part of torch's shutdown.
        torch_bindings.activate(self.replacements())
        api._init_rpc_states(self.agent)
        self.agent.start(
            self._callback,
            self._on_worker_lost,
            give_back,
            self._keep_house,
            self._on_worker_joined,
            self._callback.on_unreadable,
        )

    def _abandon(self) -> None:
        """Undoes whatever `_begin` did."""
        self._rrefs.close()
        self.agent.shutdown()
        self._end()

    def _keep_house(self) -> None:
        self._contexts.collect()
        self._engine.report_overdue()

    def _on_worker_lost(self, worker_id: WorkerId, error: RpcError) -> None:
        torch_bindings.release_gatherings()
        self._end_work_with(worker_id, error)

    def _on_worker_joined(self, worker_id: WorkerId) -> None:
        raise AssertionError(f"worker {worker_id} joined a static group")

    def _end_work_with(self, worker_id: WorkerId, error: RpcError) -> None:
        self._engine.on_worker_lost(worker_id, error)
        self._contexts.release_opened_by(worker_id, error)
        self._rrefs.on_worker_lost(worker_id, error)

    def replacements(self) -> Mapping[str, Any]:
        """What takes the place of torch's functions while this worker runs, by `Seam.key`."""
        return {**self._agent_names(), **self._call_names(), **self._rref_names(), **self._autograd_names()}

    def _agent_names(self) -> dict[str, Any]:
        agent = self.agent
        return {
            "_get_current_rpc_agent": lambda: agent,
            "_is_current_rpc_agent_set": lambda: True,
            "_reset_current_rpc_agent": self._end,
            "_cleanup_python_rpc_handler": lambda: None,
            "_wait_all_workers": self._wait_all_workers,
            "get_rpc_timeout": agent.get_rpc_timeout,
            "_set_rpc_timeout": agent.set_rpc_timeout,
            "enable_gil_profiling": agent.enable_gil_profiling,
        }

    def _call_names(self) -> dict[str, Any]:
        pickler = CallPickler(self._rrefs)
        return {
            "_default_pickler": pickler,
            "_internal_rpc_pickler": pickler,
            "_invoke_rpc_builtin": self._invoker.rpc_builtin,
            "_invoke_rpc_python_udf": self._invoker.rpc_python_udf,
            "_invoke_rpc_torchscript": self._invoker.rpc_torchscript,
            "_invoke_remote_builtin": self._invoker.remote_builtin,
            "_invoke_remote_python_udf": self._invoker.remote_python_udf,
            "_invoke_remote_torchscript": self._invoker.remote_torchscript,
            "_RemoteModule.__prepare_scriptable__": scriptable_form,
            "_enable_rpc_profiler": self._profiler.profiled_call,
            "record_function._call_end_callbacks_on_future": _end_with_future,
            "collect_all": lambda futures: collect_all(futures, self.agent.devices),
            "_TensorExtractor": TensorExtractor,
            "wait_all": wait_all,
        }

    def _rref_names(self) -> dict[str, Any]:
        rrefs = self._rrefs

        def delete_all(timeout: timedelta = timedelta(seconds=100)) -> None:
            rrefs.delete_all_users_and_unforked_owners(timeout.total_seconds())

        def new_rref(cls: type, value: Any, type_hint: Any = None) -> Any:
            return rrefs.local(value, type_hint)

        return {
            "RRef.__new__": new_rref,
            "PyRRef._deserialize": rrefs.unpickle,
            "_delete_all_user_and_unforked_owner_rrefs": delete_all,
            "_destroy_rref_context": rrefs.destroy,
            "_rref_context_get_debug_info": rrefs.debug_info,
        }

    def _autograd_names(self) -> dict[str, Any]:
        contexts, engine = self._contexts, self._engine
        return {
            "_init": self._init_autograd,
            "_new_context": contexts.new_context,
            "_release_context": contexts.release_context,
            "_retrieve_context": contexts.retrieve_context,
            "_current_context": contexts.current_context,
            "_is_valid_context": contexts.is_valid_context,
            "_get_max_id": contexts.get_max_id,
            "_get_debug_info": contexts.debug_info,
            "backward": engine.backward,
            "get_gradients": functools.partial(_gradients, contexts),
        }

    def _init_autograd(self, worker_id: int) -> None:
        if worker_id != self.agent.worker_id:
            raise AlreadyInitializedError(
                f"Container is already initialized with worker_id: {self.agent.worker_id}, cannot initialize with different "
                f"worker_id: {worker_id}"
            )

    def _wait_all_workers(self, timeout: float = 0) -> None:
        """torch's first step of a graceful shutdown, which would wait for ever for a worker that has died."""
        self.agent.check_complete()
        torch_bindings.original("_wait_all_workers")(timeout)
        self.agent.check_complete()

    def _end(self) -> None:
        """The last step of torch's ``shutdown``: the agent has ended."""
        self._contexts.close(ShutdownError(f"worker {self.agent.get_worker_info().name} has shut down"))
        torch_bindings.deactivate()


def _end_with_future(record: Any, future: Any) -> Any:
    """torch's own, which returns a future that would take a call's failure for its value."""
    return raising(torch_bindings.original("record_function._call_end_callbacks_on_future")(record, future))


def _gradients(contexts: DistAutogradContainer, context_id: int) -> Any:
    if type(context_id) is not int:
        raise InvalidTypeError(f"get_gradients(): an autograd context's id is an int, not a {type(context_id).__name__}")
    return contexts.retrieve_context(context_id).gradients()


def draw_incarnation() -> int:
    """A number that no other life of any worker has."""
    return random.SystemRandom().getrandbits(_INCARNATION_BITS)
