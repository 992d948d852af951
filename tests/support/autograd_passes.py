"""What tests of backward passes share."""

from __future__ import annotations

from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from tests.support.autograd_network import Worker
from zmqagent.autograd.container import ContextLease
from zmqagent.wire.commands import Failure, parse
from zmqagent.wire.types import Message

__all__ = ["WAIT", "Answers", "gradients_of", "product_with", "weights"]

WAIT = 30.0
"""Seconds after which something that must happen is taken to hang."""


def weights(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def gradients_of(worker: Worker, lease: ContextLease) -> dict[Tensor, Tensor]:
    return worker.container.retrieve_context(lease._context_id()).gradients()


def product_with(weight: Tensor) -> Any:
    return lambda worker, *tensors: [tensor * weight for tensor in tensors]


class Answers:
    """Collects what a request is answered with."""

    def __init__(self) -> None:
        self.future: Future[Message] = Future()

    def __call__(self, message: Message) -> None:
        self.future.set_result(message)

    def error(self) -> str:
        answer = parse(self.future.result(WAIT))
        assert isinstance(answer, Failure)
        return answer.text
