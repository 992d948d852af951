"""Under which conditions something was measured: without them a figure says little."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass

import torch
import zmq

from zmqagent.version import __version__

__all__ = ["Conditions"]


@dataclass(frozen=True)
class Conditions:
    """Versions, the machine, and what was asked for.

    Attributes:
        versions: of what took part, by name.
        system: the operating system and the kind of processor.
        cpus: how many there are.
        may_run_on: the numbers of those that the processes may run on.
        rounds: how many counted.
        warm_up: what went before and was discarded, in words.
        torch_threads: what ``torch.set_num_threads`` got in each worker.
        stopped: the labels of the contenders whose workers were stopped whenever it was another one's turn.
        quick: whether it was a quick run, whose figures mean nothing.
    """

    versions: dict[str, str]
    system: str
    cpus: int
    may_run_on: list[int]
    rounds: int
    warm_up: str
    torch_threads: int
    stopped: list[str]
    quick: bool

    @classmethod
    def here(cls, rounds: int, warm_up: str, torch_threads: int, stopped: list[str], quick: bool) -> Conditions:
        """Those of this machine, and of processes that this one starts."""
        return cls(
            versions={
                "zmqagent": __version__,
                "torch": torch.__version__,
                "Python": platform.python_version(),
                "pyzmq": zmq.__version__,
                "libzmq": zmq.zmq_version(),
            },
            system=f"{platform.system()} {platform.release()}, {platform.machine()}",
            cpus=os.cpu_count() or 1,
            may_run_on=sorted(os.sched_getaffinity(0)),
            rounds=rounds,
            warm_up=warm_up,
            torch_threads=torch_threads,
            stopped=stopped,
            quick=quick,
        )

    def sentences(self) -> list[str]:
        """The same, to be read."""
        versions = ", ".join(f"{name} {version}" for name, version in self.versions.items())
        pinned = len(self.may_run_on) < self.cpus
        where = f"pinned to {', '.join(map(str, self.may_run_on))}" if pinned else "no process pinned"
        told = [
            f"{versions}; {self.system}, {_counted(self.cpus, 'CPU')}, {where}.",
            f"Medians of {_counted(self.rounds, 'round')}; warm-up: {self.warm_up}. In each worker torch computes with "
            f"{_counted(self.torch_threads, 'thread')}.",
        ]
        if self.stopped:
            told.append(
                f"While another one was measured, the workers of {' and '.join(self.stopped)}, which would spin, were stopped."
            )
        if self.quick:
            told.append("A quick run: it shows that the benchmark works; its figures mean nothing.")
        return told


def _counted(count: int, thing: str) -> str:
    return f"{count} {thing}{'' if count == 1 else 's'}"
