"""The backend FAULTY_ZMQ: its registration, and the worker of this process."""

from __future__ import annotations

import torch

from zmqagent.backend import register_variant
from zmqagent.testing.injector import FaultInjector
from zmqagent.testing.options import FaultyZmqRpcBackendOptions

__all__ = ["register", "stop_faults"]

_NAME = "FAULTY_ZMQ"

_injectors: list[FaultInjector] = []
"""That of the worker which this process started last: there is one at a time."""


def register() -> None:
    """Makes ``BackendType.FAULTY_ZMQ`` exist. Harmless when repeated."""
    # The options of FAULTY_TENSORPIPE have this class in common with TENSORPIPE's, and not the one that torch makes public.
    taken_over = torch._C._distributed_rpc._TensorPipeRpcBackendOptionsBase
    register_variant(_NAME, FaultyZmqRpcBackendOptions, taken_over, _make_injector)


def _make_injector(options: FaultyZmqRpcBackendOptions) -> FaultInjector:
    _injectors[:] = [FaultInjector(options)]
    return _injectors[0]


def stop_faults() -> None:
    """From now on all that this process sends is sent as by ZMQ. What is late already leaves when its time has come.

    To be called before ``rpc.shutdown()`` by a worker whose ``PYTHON_CALL`` messages fail: a graceful shutdown calls Python
    functions on other workers. Does nothing in a process that has started no worker of FAULTY_ZMQ.
    """
    for injector in _injectors:
        injector.stop()
