"""The job that ``zmqagent demo`` runs: one parameter server and its trainers learn to read handwritten digits.

The network is cut in two. The server owns the first layers: an embedding of each pixel position, weighted by how bright the pixel
is, and a hidden layer. Each trainer has the last layer and its own share of the images. A step of a trainer is a forward pass
through the server and its own layer, a distributed backward pass that leaves gradients on both, and a step of a
`DistributedOptimizer` over the parameters of both. At the end of an epoch the server averages the trainers' layers and tests the
whole network on images that nobody trained on.

Trainers compute side by side and update in turn: when all have their gradients, the first steps, then the second. So no update
changes weights that a backward pass still needs (autograd would refuse to go on), and a seed fixes every number.

This is torch's public RPC API and nothing else: the module knows no backend, and computes the same on each.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from itertools import chain
from statistics import fmean
from typing import Any

import torch
import torch.distributed.autograd as dist_autograd
from torch import Tensor, nn
from torch.distributed import rpc
from torch.distributed.optim import DistributedOptimizer
from torch.futures import Future

__all__ = [
    "HELD_OUT",
    "Digits",
    "EpochDone",
    "Job",
    "ParameterServer",
    "Report",
    "StepDone",
    "load_digits",
    "serve",
    "steps_in_epoch",
    "train",
    "trainer_name",
]

PIXELS = 64
CLASSES = 10
HIDDEN = 128
HELD_OUT = 360


@dataclass(frozen=True)
class Job:
    """What is to be trained: sizes and seed, the same for every worker."""

    epochs: int
    batch_size: int
    learning_rate: float
    seed: int
    trainers: int = 2


@dataclass(frozen=True)
class StepDone:
    """A trainer's batch went through the server."""


@dataclass(frozen=True)
class EpochDone:
    """All trainers finished an epoch: the losses of each one's steps, and the share of held-out digits read right (0 to 1)."""

    epoch: int
    losses: list[list[float]]
    accuracy: float

    @property
    def mean_loss(self) -> float:
        """The mean over all steps of all trainers."""
        return fmean(chain.from_iterable(self.losses))


Report = StepDone | EpochDone


@dataclass(frozen=True)
class Digits:
    """Images (count x 64, brightness from 0 to 1) and what they show (count, int64)."""

    images: Tensor
    labels: Tensor


def load_digits(seed: int) -> tuple[Digits, Digits]:
    """scikit-learn's 1,797 handwritten digits, 8 x 8 pixels, shuffled: those to train on, and `HELD_OUT` others to test on."""
    from sklearn.datasets import load_digits as load

    data = load()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(seed))
    images = torch.from_numpy(data.data).to(torch.float32).div(16)[order]
    labels = torch.from_numpy(data.target).to(torch.int64)[order]
    return Digits(images[HELD_OUT:], labels[HELD_OUT:]), Digits(images[:HELD_OUT], labels[:HELD_OUT])


def trainer_name(index: int) -> str:
    """The RPC name of a trainer."""
    return f"trainer{index}"


def steps_in_epoch(job: Job, images: int) -> int:
    """How many batches one trainer makes of its share of ``images``."""
    return -(-(images // job.trainers) // job.batch_size)


class FirstLayers(nn.Module):
    """What the server owns: pixels (batch x 64) to features (batch x 128)."""

    positions: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.EmbeddingBag(PIXELS, HIDDEN, mode="sum")
        nn.init.normal_(self.embedding.weight, std=0.2)
        self.hidden = nn.Linear(HIDDEN, HIDDEN)
        self.register_buffer("positions", torch.arange(PIXELS))

    def forward(self, images: Tensor) -> Tensor:
        positions = self.positions.expand(len(images), -1)
        embedded = self.embedding(positions, per_sample_weights=images)
        return torch.relu(self.hidden(torch.relu(embedded)))


def last_layer() -> nn.Linear:
    """What each trainer has: features (batch x 128) to one score a class (batch x 10)."""
    return nn.Linear(HIDDEN, CLASSES)


class Turns:
    """Lets trainers update one after the other, in the order of their indices, once all of them are ready to.

    Answers are futures, so that no thread of the server waits.
    """

    def __init__(self, trainers: int) -> None:
        self._trainers = trainers
        # Guards the two below, for trainers call at the same time; futures are completed outside it, as that sends answers.
        self._lock = threading.Lock()
        self._ready: dict[int, Future[None]] = {}
        self._done: dict[int, Future[None]] = {}

    def begin(self, trainer: int) -> Future[None]:
        """Completes when it is this trainer's turn to update."""
        future: Future[None] = Future()
        with self._lock:
            self._ready[trainer] = future
            first = self._ready[0] if len(self._ready) == self._trainers else None
        if first is not None:
            first.set_result(None)
        return future

    def end(self, trainer: int) -> Future[None]:
        """Ends this trainer's turn; completes when all have updated."""
        future: Future[None] = Future()
        with self._lock:
            self._done[trainer] = future
            if len(self._done) < self._trainers:
                released = [self._ready[trainer + 1]]
            else:
                released = list(self._done.values())
                self._ready, self._done = {}, {}
        for waiting in released:
            waiting.set_result(None)
        return future


class ParameterServer:
    """The first layers, served to all trainers. Its methods run on the threads of the RPC agent, several at once."""

    def __init__(self, job: Job, held_out: Digits, report: Callable[[Report], None]) -> None:
        torch.manual_seed(job.seed)
        self._job = job
        self._held_out = held_out
        self._report = report
        self._first = FirstLayers()
        self._turns = Turns(job.trainers)
        # Guards the three below: trainers end their epochs at the same time.
        self._lock = threading.Lock()
        self._epoch = 0
        self._ended: dict[int, tuple[dict[str, Tensor], list[float]]] = {}
        self._averaged: Future[dict[str, Tensor]] = Future()

    def parameters(self) -> list[rpc.RRef[Any]]:
        """References to the parameters of the first layers, for the trainers' optimizers."""
        return [rpc.RRef(parameter) for parameter in self._first.parameters()]

    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch, with a graph behind them that leads back to the first layers."""
        features: Tensor = self._first(images)
        self._report(StepDone())
        return features

    @rpc.functions.async_execution  # type: ignore[untyped-decorator]
    def begin_update(self, trainer: int) -> Future[None]:
        """Answers when it is the trainer's turn to update the parameters."""
        return self._turns.begin(trainer)

    @rpc.functions.async_execution  # type: ignore[untyped-decorator]
    def end_update(self, trainer: int) -> Future[None]:
        """Answers when all trainers have updated."""
        return self._turns.end(trainer)

    @rpc.functions.async_execution  # type: ignore[untyped-decorator]
    def end_epoch(self, trainer: int, state: dict[str, Tensor], losses: list[float]) -> Future[dict[str, Tensor]]:
        """Takes a trainer's last layer and losses; gives all trainers the mean of their layers, once the last of them called."""
        with self._lock:
            self._ended[trainer] = (state, losses)
            answer = self._averaged
            if len(self._ended) < self._job.trainers:
                return answer
            ended = [self._ended[index] for index in range(self._job.trainers)]
            self._epoch = epoch = self._epoch + 1
            self._ended, self._averaged = {}, Future()
        mean = {key: torch.stack([state[key] for state, _ in ended]).mean(0) for key in state}
        self._report(EpochDone(epoch, [losses for _, losses in ended], self._accuracy(mean)))
        answer.set_result(mean)
        return answer

    def _accuracy(self, last: dict[str, Tensor]) -> float:
        with torch.no_grad():
            scores = nn.functional.linear(self._first(self._held_out.images), last["weight"], last["bias"])
        return (scores.argmax(1) == self._held_out.labels).double().mean().item()


def train(server: rpc.RRef[ParameterServer], index: int, job: Job, digits: Digits) -> None:
    """All epochs of one trainer, over its share of ``digits``. Called by RPC on the trainer."""
    torch.manual_seed(job.seed)
    last = last_layer()
    parameters = [*server.rpc_sync().parameters(), *map(rpc.RRef, last.parameters())]
    optimizer = DistributedOptimizer(torch.optim.NAdam, parameters, lr=job.learning_rate)
    share = torch.arange(index, len(digits.labels), job.trainers)[: len(digits.labels) // job.trainers]
    shuffling = torch.Generator().manual_seed(job.seed * job.trainers + index)
    for _ in range(job.epochs):
        losses = []
        for batch in share[torch.randperm(len(share), generator=shuffling)].split(job.batch_size):
            with dist_autograd.context() as context_id:
                features = server.rpc_sync().forward(digits.images[batch])
                loss = nn.functional.cross_entropy(last(features), digits.labels[batch])
                dist_autograd.backward(context_id, [loss])
                server.rpc_sync(timeout=0).begin_update(index)
                optimizer.step(context_id)
                server.rpc_sync(timeout=0).end_update(index)
            losses.append(loss.item())
        last.load_state_dict(server.rpc_sync(timeout=0).end_epoch(index, last.state_dict(), losses))


def serve(job: Job, report: Callable[[Report], None]) -> None:
    """The server's whole job: hand every trainer the server, its share and the order to begin, and wait for all of them."""
    to_train, held_out = load_digits(job.seed)
    server = rpc.RRef(ParameterServer(job, held_out, report))
    # No timeout: a call that lasts as long as the training. A trainer that fails or dies ends its call with an error.
    calls = [
        rpc.rpc_async(trainer_name(index), train, args=(server, index, job, to_train), timeout=0) for index in range(job.trainers)
    ]
    torch.futures.wait_all(calls)
