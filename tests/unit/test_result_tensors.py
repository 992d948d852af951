"""`zmqagent.rpc.result_tensors`: torch learns which tensors a result has, without pickling what is known."""

from __future__ import annotations

import io
import threading
from types import SimpleNamespace
from typing import Any

import torch
from torch.futures import Future

from zmqagent.rpc.failures import Failed
from zmqagent.rpc.result_tensors import TensorExtractor, set_result


def extracted(value: Any) -> list[torch.Tensor]:
    """What torch finds in ``value`` with this class in place of its own."""
    tensors: list[torch.Tensor] = []
    TensorExtractor(io.BytesIO(), protocol=-1, tensors=tensors).dump(value)
    return tensors


class Asking(Future[Any]):
    """Asks for the tensors of its result, as torch's futures with devices do, and then for those of what a callback made."""

    found: list[list[Any]]

    def set_result(self, result: Any) -> None:
        super().set_result(result)
        self.found = [extracted(result), extracted([MADE])]


class AskingLess(Future[Any]):
    """Asks for nothing of its own, as torch's futures without devices do."""

    found: list[list[Any]]

    def set_result(self, result: Any) -> None:
        super().set_result(result)
        self.found = [extracted([MADE])]


MADE = torch.ones(2)
HERE, META = torch.ones(3), torch.ones(3, device="meta")
# All that is looked at is where it lies, and this machine may have no such device.
THERE: Any = SimpleNamespace(device=torch.device("cuda:0"))


def test_the_tensors_of_an_answer_are_those_that_came_with_it_if_they_have_streams() -> None:
    future, unpicklable = Asking(), (threading.Lock, lambda: 5)
    set_result(future, unpicklable, [HERE, THERE, META])
    assert future.wait() is unpicklable
    answer, made = future.found
    assert answer == [THERE]
    assert made[0] is MADE


def test_what_is_known_of_one_result_is_not_taken_for_anothers() -> None:
    future = AskingLess()
    set_result(future, 5, [THERE])
    assert future.found[0][0] is MADE
    assert extracted(5) == []


def test_an_error_in_place_of_a_value_has_no_tensors() -> None:
    assert extracted([Failed(lambda: KeyError("why")), MADE])[0] is MADE
