"""A worker of a dynamic group (``init_rpc`` without ``world_size``): it joins and leaves while others run."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlparse

import torch.distributed as dist
from torch.distributed.rpc import api
from torch.distributed.rpc.constants import DEFAULT_SHUTDOWN_TIMEOUT

from zmqagent import torch_bindings
from zmqagent.agent.agent import ZmqRpcAgent
from zmqagent.agent.checks import check_name, check_worker_id
from zmqagent.agent.detour import Detour
from zmqagent.agent.device_routes import devices_of_this_worker
from zmqagent.agent.directory import UNDRAWN
from zmqagent.agent.roster import Roster, check_dynamic, directory_store
from zmqagent.exceptions import InvalidOptionError, RendezvousError, RpcError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.rpc.gathering import Gatherings
from zmqagent.transport.base import PeerRecord
from zmqagent.transport.binding import bind
from zmqagent.transport.endpoints import reachable_address
from zmqagent.transport.hosts import describe_self, host_identity
from zmqagent.transport.probe import has_ended
from zmqagent.wire.types import WorkerId
from zmqagent.worker import Worker, draw_incarnation

__all__ = ["DynamicWorker"]

_ID_BITS = 32
"""Each life of a worker draws its ids of RRefs and contexts from a range of its own: the group may still know a former life's."""

_LIVES = 1 << 15
"""After so many joins the ranges come again; ids of contexts have no more bits."""

# Stores that this process serves to others, by address: they join and leave through these for as long as the process lives.
_hosted: dict[tuple[str, int], dist.Store] = {}


class DynamicWorker(Worker):
    """All parts of one worker. `join` enters the group; torch's ``shutdown`` leaves it."""

    def __init__(self, agent: ZmqRpcAgent, ordinal: int) -> None:
        super().__init__(agent, first_local_id=(ordinal % _LIVES) << _ID_BITS)
        self._gatherings = Gatherings(agent)

    @classmethod
    def join(
        cls, store: dist.Store, name: str, rank: int, options: ZmqRpcBackendOptions, detour: Detour | None = None
    ) -> DynamicWorker:
        """Joins the group that meets at ``store``, or begins it, and starts to serve. In place of a ``rank`` of -1 one is
        drawn, if ``options`` say so.

        Raises:
            RendezvousError: the group is static, or a member that lives does not answer.
            InvalidOptionError, InvalidTypeError: a name, a rank or an option that is illegal, or that a member has.
        """
        check_name(name)
        if rank == UNDRAWN and not options.draw_rank:
            raise InvalidOptionError(
                "rank parameter missing: give init_rpc a rank, or have one drawn by ZmqRpcBackendOptions(draw_rank=True)"
            )
        if rank != UNDRAWN:
            check_worker_id(rank)
        check_dynamic(store)
        roster = Roster(directory_store(store), options.rpc_timeout, has_ended)
        incarnation = draw_incarnation()
        transport = bind(options, incarnation, share_host=False)
        try:
            devices = devices_of_this_worker(options).to_text()
            newcomer = describe_self(name, WorkerId(rank), incarnation, transport.addresses, devices)
            me, others = roster.enter(newcomer)
        except BaseException:
            transport.close(linger=0)
            raise
        worker = cls(ZmqRpcAgent(me, transport, options, detour, roster), me.ordinal)
        try:
            worker._begin(others)
            check_dynamic(store)
            _check_reachable(others)
            worker.agent.announce(options.rpc_timeout)
        except BaseException:
            worker._abandon()
            raise
        if _hosts_store(options.init_method, rank):
            _keep(store)
        return worker

    def replacements(self) -> Mapping[str, Any]:
        """See `Worker.replacements`."""
        return {
            **super().replacements(),
            "_all_gather": self._gatherings.gather,
            "_wait_all_workers": torch_bindings.original("_wait_all_workers"),
            "shutdown": self._shutdown,
        }

    def _shutdown(self, graceful: bool = True, timeout: float = DEFAULT_SHUTDOWN_TIMEOUT) -> None:
        """torch's ``shutdown``, for one worker of many that stay: calls end that are under way, RRefs are given back, and the
        others are told. It does not wait for RRefs to values of this worker that others hold: these raise when they are used."""
        try:
            if graceful:
                self._leave(timeout)
        finally:
            api._finalize_shutdown()

    def _leave(self, timeout: float) -> None:
        self.agent.refuse_calls()
        self._gatherings.close()
        limit = {"timeout": timeout} if timeout else {}
        if api._ignore_rref_leak:
            self._rrefs.delete_all_users(**limit)
        else:
            # Values that others still refer to are errors then, so they get the time to let go.
            self._rrefs.delete_all_users_and_unforked_owners(**limit)
        self.agent.join(shutdown=True, timeout=timeout)

    def _on_worker_joined(self, worker_id: WorkerId) -> None:
        self._rrefs.on_worker_joined(worker_id)
        self._note_members()

    def _on_worker_lost(self, worker_id: WorkerId, error: RpcError) -> None:
        self._end_work_with(worker_id, error)
        self._note_members()

    def _note_members(self) -> None:
        # The names of all workers, which torch's Python code keeps.
        api._init_rpc_states(self.agent)
        self._gatherings.on_change()

    def _end(self) -> None:
        self._gatherings.close()
        Gatherings.current = None
        super()._end()


def _check_reachable(others: tuple[PeerRecord, ...]) -> None:
    host = host_identity()
    for other in others:
        if reachable_address(other, host) is None and not has_ended(other):
            raise RendezvousError(
                f"worker {other.name!r} ({other.worker_id}) of this group cannot be reached from here under any of its addresses "
                f"({', '.join(other.addresses)}): have all workers use transport='auto' or 'tcp'. If the group is of the past, "
                "meet at another store."
            )


def _hosts_store(init_method: str, rank: int) -> bool:
    """Whether torch has this process serve the store."""
    scheme = urlparse(init_method).scheme
    return scheme in ("tcp", "env") and (int(os.environ.get("RANK", rank)) if scheme == "env" else rank) == 0


def _keep(store: dist.Store) -> None:
    served = directory_store(store)
    if isinstance(served, dist.TCPStore):
        _hosted[served.host, served.port] = served
