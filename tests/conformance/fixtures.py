"""What torch's suites need to know of a backend, and what happens in each rank of a test.

torch starts a fresh interpreter for every rank, which imports torch for seconds. Here a rank is forked from a process that has
imported everything, started no thread and run nothing: the same state, a hundred times sooner.
"""

from __future__ import annotations

import os
import sys
from functools import wraps
from pathlib import Path
from typing import Any, ClassVar

import torch.distributed.rpc as rpc
import torch.multiprocessing
from torch.testing._internal.distributed.rpc.rpc_agent_test_fixture import RpcAgentTestFixture
from torch.testing._internal.distributed.rpc.tensorpipe_rpc_agent_test_fixture import TensorPipeRpcAgentTestFixture

from tests.conformance.races import settle_process_groups

__all__ = ["BACKENDS", "ForkedRanks", "fixture_for", "redirect_output"]


class ForkedRanks:
    """Makes the ranks of a test by fork, gives each a log of its own, and notes which agents it starts."""

    directory: ClassVar[Path] = Path()
    """Where the ranks of the running test leave ``rank<N>.log`` and ``rank<N>.agents``."""

    def _spawn_processes(self) -> None:
        self._start_processes(torch.multiprocessing.get_context("fork").Process)  # type: ignore[attr-defined]

    @classmethod
    def _run(cls, rank: int, test_name: str, file_name: str, parent_pipe: Any, **kwargs: Any) -> None:
        redirect_output(cls.directory / f"rank{rank}.log")
        _note_agents(cls.directory / f"rank{rank}.agents")
        settle_process_groups()
        super()._run(rank, test_name, file_name, parent_pipe, **kwargs)  # type: ignore[misc]

    def _check_return_codes(self, fn: Any, elapsed_time: float) -> None:
        super()._check_return_codes(fn, elapsed_time)  # type: ignore[misc]
        # torch looks at the first rank only.
        crashed = {i: p.exitcode for i, p in enumerate(self.processes) if (p.exitcode or 0) < 0}  # type: ignore[attr-defined]
        if crashed:
            raise RuntimeError("; ".join(f"Process {i} was killed by signal {-code}" for i, code in crashed.items()))


class TensorPipeFixture(ForkedRanks, TensorPipeRpcAgentTestFixture):
    """torch's own agent, for comparison."""


class ZmqFixture(ForkedRanks, RpcAgentTestFixture):
    """The agent of this package."""

    transport: ClassVar[str | None] = None

    @property
    def rpc_backend(self) -> Any:
        return rpc.backend_registry.BackendType["ZMQ"]

    @property
    def rpc_backend_options(self) -> Any:
        import zmqagent

        return zmqagent.ZmqRpcBackendOptions(init_method=self.init_method, **self._chosen())

    def _chosen(self) -> dict[str, Any]:
        return {} if self.transport is None else {"transport": self.transport}

    def get_shutdown_error_regex(self) -> str:
        return ".*"

    def get_timeout_error_regex(self) -> str:
        return "RPC ran for more than"


class FaultyZmqFixture(ZmqFixture):
    """The agent of this package with injected faults. A test says which by torch's `dist_init`."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # What torch's own fixture fails and delays where a test does not say.
        self._messages_to_fail = [
            "RREF_FORK_REQUEST",
            "RREF_CHILD_ACCEPT",
            "RREF_USER_DELETE",
            "CLEANUP_AUTOGRAD_CONTEXT_REQ",
        ]
        self._messages_to_delay = {"PYTHON_CALL": 1.5, "SCRIPT_CALL": 1.5}

    @property
    def rpc_backend(self) -> Any:
        return rpc.backend_registry.BackendType["FAULTY_ZMQ"]

    @property
    def rpc_backend_options(self) -> Any:
        from zmqagent.testing import FaultyZmqRpcBackendOptions

        return FaultyZmqRpcBackendOptions(
            init_method=self.init_method,
            num_worker_threads=8,
            num_fail_sends=3,
            messages_to_fail=self._messages_to_fail,
            messages_to_delay=self._messages_to_delay,
            **self._chosen(),
        )

    def setup_fault_injection(self, faulty_messages: list[str] | None, messages_to_delay: dict[str, float] | None) -> None:
        if faulty_messages is not None:
            self._messages_to_fail = faulty_messages
        if messages_to_delay is not None:
            self._messages_to_delay = messages_to_delay


BACKENDS = ("ZMQ", "TENSORPIPE")


def fixture_for(backend: str, *, faulty: bool = False) -> type[RpcAgentTestFixture]:
    """The fixture of a backend, or of its variant that injects faults."""
    if backend == "ZMQ":
        return FaultyZmqFixture if faulty else ZmqFixture
    if not faulty:
        return TensorPipeFixture
    # Imported late: it registers a backend, which remakes the enum of all backends.
    from torch.testing._internal.distributed.rpc.faulty_rpc_agent_test_fixture import FaultyRpcAgentTestFixture

    return type("FaultyTensorPipeFixture", (ForkedRanks, FaultyRpcAgentTestFixture), {})


def redirect_output(path: Path) -> None:
    """Send everything this process writes to stdout and stderr, from C++ too, to ``path``."""
    sys.stdout.flush()
    sys.stderr.flush()
    log = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.close(log)


def _note_agents(path: Path) -> None:
    """From now on, write the full class name of each agent that this process starts into ``path``, one a line."""
    init_rpc = rpc.init_rpc

    @wraps(init_rpc)
    def noting_init_rpc(*args: Any, **kwargs: Any) -> None:
        init_rpc(*args, **kwargs)
        if not rpc.api._is_current_rpc_agent_set():
            return  # A backend that a test registered, without an agent.
        agent = type(rpc.api._get_current_rpc_agent())
        with path.open("a") as notes:
            notes.write(f"{agent.__module__}.{agent.__qualname__}\n")

    rpc.init_rpc = noting_init_rpc
