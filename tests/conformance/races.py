"""Takes out of a rank what makes torch's tests fail at times on any backend, however its agent behaves.

Both races are between torch and its own tests; TENSORPIPE loses them as ZMQ does, the more often the busier the machine is.
"""

from __future__ import annotations

import threading
from functools import wraps
from typing import Any

import torch.distributed as dist

__all__ = ["settle_process_groups"]

_JOIN_S = 60.0

_kept: list[Any] = []


def settle_process_groups() -> None:
    """Keeps process groups alive until this process ends, and lets ``new_group`` wait for the process group it divides.

    A gloo group's destructor waits for the group's threads with the GIL held. Such a thread needs the GIL itself if it holds the
    last reference to a tensor that Python has seen, as after the all-reduce that ends ``DistributedDataParallel.join``: they wait
    for each other for ever. (``DdpComparisonTest`` ends the group right after it.)

    ``DdpUnderDistAutogradTest`` calls ``new_group`` on its trainers by RPC as soon as the caller has entered the process group,
    which does not mean that the trainer has.
    """
    entered = threading.Event()
    init_process_group, new_group = dist.init_process_group, dist.new_group

    @wraps(init_process_group)
    def keeping_init_process_group(*args: Any, **kwargs: Any) -> None:
        init_process_group(*args, **kwargs)
        _kept.append(dist.group.WORLD)
        entered.set()

    @wraps(new_group)
    def waiting_new_group(*args: Any, **kwargs: Any) -> Any:
        entered.wait(_JOIN_S)
        _kept.append(new_group(*args, **kwargs))
        return _kept[-1]

    dist.init_process_group, dist.new_group = keeping_init_process_group, waiting_new_group
