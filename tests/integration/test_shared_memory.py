"""Large tensors between workers of one host: theirs to keep and to change, whatever becomes of the other side."""

from __future__ import annotations

import gc
import os
import signal
import time
from typing import Any

import pytest

from tests.integration.harness import on_group, run_ranks, worker
from zmqagent.transport.shared_memory import is_supported

pytestmark = pytest.mark.skipif(not is_supported(), reason="this system has no memfd")

COUNT = 1 << 18  # of float32: 1 MiB
PATIENCE = 30.0

_kept: list[Any] = []


# What callees run.


def is_shared(tensor: Any) -> bool:
    """Whether the tensor lies in memory that another worker has lent."""
    address = tensor.data_ptr()
    with open("/proc/self/maps") as maps:
        for line in maps:
            begin, end = (int(part, 16) for part in line.split()[0].split("-"))
            if begin <= address < end:
                return "memfd:zmqagent" in line
    return False


def double(tensor: Any) -> tuple[bool, bool, Any]:
    was_shared = is_shared(tensor)
    tensor.mul_(2)
    return was_shared, tensor.requires_grad, tensor


def keep(tensor: Any) -> bool:
    _kept.append(tensor)
    return is_shared(tensor)


def check_kept(values: list[float]) -> bool:
    return [(tensor.min().item(), tensor.max().item()) for tensor in _kept] == [(value, value) for value in values]


def drop() -> None:
    _kept.clear()


def mappings() -> int:
    gc.collect()
    with open("/proc/self/maps") as maps:
        count = maps.read().count("memfd:zmqagent")
    return count + sum("memfd:zmqagent" in os.readlink(entry.path) for entry in os.scandir("/proc/self/fd") if entry.is_symlink())


def get_pid() -> int:
    return os.getpid()


def fork_and_change() -> tuple[bool, int]:
    """Has a child look at what this worker kept, and change it; its exit status says what it saw."""
    (tensor,) = _kept
    go, tell = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.read(go, 1)
            seen = tensor.min().item(), tensor.max().item()
            tensor.numpy().fill(9)
            os._exit(0 if seen == (1.0, 1.0) else 1)
        finally:
            os._exit(2)
    tensor.numpy().fill(5)
    os.write(tell, b"x")
    _, status = os.waitpid(pid, 0)
    return (tensor.min().item(), tensor.max().item()) == (5.0, 5.0), status


# What rank 0 runs.


def warm_up(to: str = "worker1") -> None:
    """Returns once ``to`` has accepted what it was invited to."""
    import torch
    import torch.distributed.rpc as rpc

    deadline = time.monotonic() + PATIENCE
    while not rpc.rpc_sync(to, is_shared, args=(torch.ones(COUNT),)):
        assert time.monotonic() < deadline


def send_back_and_forth() -> Any:
    import torch
    import torch.distributed.rpc as rpc

    warm_up()
    sent = torch.ones(COUNT)
    answers = []
    for _ in range(4):
        was_shared, _, got = rpc.rpc_sync("worker1", double, args=(sent,))
        answers.append((was_shared, bool((got == 2).all()), bool((sent == 1).all())))
        got.add_(1)
    return answers, is_shared(got)


def test_tensors_arrive_by_memory_both_ways_writable_and_private() -> None:
    answers, came_shared = on_group(send_back_and_forth)
    assert answers == [(True, True, True)] * 4
    assert came_shared


def differentiate() -> bool:
    import torch
    import torch.distributed.autograd as dist_autograd
    import torch.distributed.rpc as rpc

    warm_up()
    weight = torch.ones(COUNT, requires_grad=True)
    with dist_autograd.context() as context_id:
        product = rpc.rpc_sync("worker1", torch.mul, args=(weight, torch.full((COUNT,), 3.0)))
        dist_autograd.backward(context_id, [product.sum()])
        gradient = dist_autograd.get_gradients(context_id)[weight]
    return bool((gradient == 3).all())


def test_gradients_travel_by_memory_too() -> None:
    assert on_group(differentiate)


def overfill() -> Any:
    import torch
    import torch.distributed.rpc as rpc

    warm_up()
    shared = [rpc.rpc_sync("worker1", keep, args=(torch.full((COUNT,), float(i)),)) for i in range(20)]
    warm_up("worker2")
    intact = rpc.rpc_sync("worker1", check_kept, args=([float(i) for i in range(20)],))
    rpc.rpc_sync("worker1", drop)
    warm_up()
    return sum(shared), intact


def test_a_worker_that_keeps_all_it_gets_is_sent_bytes_and_starves_nobody() -> None:
    shared, intact = on_group(overfill, world_size=3, shared_memory=16 << 20)
    # Half of the memory, less what was on its way back.
    assert 4 <= shared <= 8
    assert intact


def send_without() -> tuple[bool, int]:
    import torch
    import torch.distributed.rpc as rpc

    shared = [rpc.rpc_sync("worker1", keep, args=(torch.ones(COUNT),)) for _ in range(4)]
    return any(shared), mappings()


def test_shared_memory_can_be_switched_off() -> None:
    assert on_group(send_without, shared_memory=0) == (False, 0)


def fork_callee() -> Any:
    import torch
    import torch.distributed.rpc as rpc

    warm_up()
    assert rpc.rpc_sync("worker1", keep, args=(torch.ones(COUNT),))
    result = rpc.rpc_sync("worker1", fork_and_change)
    for _ in range(3):
        warm_up()
    return result, rpc.rpc_sync("worker1", check_kept, args=([5.0],))


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")
def test_a_callee_that_forks_and_its_child_have_a_tensor_each() -> None:
    assert on_group(fork_callee) == ((True, 0), True)


def keep_while_stopped() -> bool:
    import torch
    import torch.distributed.rpc as rpc

    warm_up()
    pid = rpc.rpc_sync("worker1", get_pid)
    for i in range(3):
        rpc.rpc_sync("worker1", keep, args=(torch.full((COUNT,), float(i)),))
    os.kill(pid, signal.SIGSTOP)
    futures = [rpc.rpc_async("worker1", keep, args=(torch.full((COUNT,), float(i)),)) for i in range(3, 6)]
    warm_up("worker2")
    os.kill(pid, signal.SIGCONT)
    torch.futures.wait_all(futures)
    # They are served in any order.
    return bool(rpc.rpc_sync("worker1", check_kept_sorted, args=([float(i) for i in range(6)],)))


def check_kept_sorted(values: list[float]) -> bool:
    _kept.sort(key=lambda tensor: tensor[0].item())
    return check_kept(values)


def test_a_worker_that_was_stopped_and_continued_finds_its_tensors_unchanged() -> None:
    assert on_group(keep_while_stopped, world_size=3, shared_memory=16 << 20)


def lose_the_sender(rank: int, meeting_point: str) -> bool | None:
    import torch
    import torch.distributed.rpc as rpc

    context = worker(rank, 2, meeting_point)
    context.__enter__()
    if rank == 0:
        warm_up()
        rpc.rpc_sync("worker1", keep, args=(torch.full((COUNT,), 4.0),))
        os.kill(os.getpid(), signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    while not _kept:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    call = rpc.rpc_async("worker0", time.sleep, args=(PATIENCE,), timeout=0)
    with pytest.raises(RuntimeError, match="worker0"):
        call.wait()
    assert is_shared(_kept[0])
    _kept[0].add_(1)
    is_intact = check_kept([5.0])
    drop()
    rpc.shutdown(graceful=False)
    return is_intact and mappings() == 0


def test_a_tensor_outlives_the_worker_that_sent_it_and_leaves_nothing_behind() -> None:
    assert run_ranks(lose_the_sender, 2, dying=[0])[1] is True


def lose_the_receiver(rank: int, meeting_point: str) -> Any:
    import torch
    import torch.distributed.rpc as rpc

    context = worker(rank, 3, meeting_point, shared_memory=8 << 20)
    context.__enter__()
    if rank:
        deadline = time.monotonic() + PATIENCE
        while not _kept:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        if rank == 1:
            signal.pause()
        rpc.shutdown(graceful=False)
        return None
    arena = None
    for to in ("worker1", "worker2"):
        warm_up(to)
        arena = rpc.api._get_current_rpc_agent()._transport._carriers[0]._lender._arena
    pid = rpc.rpc_sync("worker1", get_pid)
    while rpc.rpc_sync("worker1", keep, args=(torch.ones(COUNT),)):
        pass
    os.kill(pid, signal.SIGKILL)
    deadline = time.monotonic() + PATIENCE
    # The agent's own housekeeping finds it out.
    while arena.in_use():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    is_served = rpc.rpc_sync("worker2", keep, args=(torch.ones(COUNT),))
    rpc.shutdown(graceful=False)
    return is_served


def test_what_a_killed_worker_had_is_lent_again() -> None:
    assert run_ranks(lose_the_receiver, 3, dying=[1])[0] is True


def use_and_shut_down(rank: int, meeting_point: str) -> int:
    with worker(rank, 2, meeting_point):
        if rank == 0:
            warm_up()
    return mappings()


def test_nothing_is_left_after_a_shutdown() -> None:
    assert run_ranks(use_and_shut_down, 2) == [0, 0]
