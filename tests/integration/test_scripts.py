"""TorchScript and RPC between real processes: what is called from Python works, and what cannot work says what to do instead.

Annotations are evaluated in this file, since TorchScript reads those of ignored functions.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.autograd as dist_autograd
import torch.distributed.rpc as rpc
from torch import Tensor, nn
from torch.distributed.nn import RemoteModule
from torch.futures import Future

from tests.integration.harness import on_group
from zmqagent.exceptions import InvalidTypeError, NotPicklableError, ScriptError

Outcome = tuple[type[BaseException], str]


@torch.jit.script
def scaled(x: Tensor, by: int = 2) -> Tensor:
    return x * by


@torch.jit.script
def total(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).sum()


@rpc.functions.async_execution
@torch.jit.script
def scaled_later(x: Tensor) -> Future[Tensor]:
    return torch.jit.fork(scaled, x)


@rpc.functions.async_execution
@torch.jit.script
def never_later() -> Tensor:
    return torch.zeros(2)


@torch.jit.script
def fails(x: Tensor) -> Tensor:
    if x.numel() > 0:
        raise ValueError("not this one")
    return x


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((2,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * x

    @torch.jit.export
    def halved(self, x: Tensor) -> Tensor:
        return x / self.weight


def scripted() -> nn.Module:
    module: nn.Module = torch.jit.script(Doubling())
    return module


def outcome_of(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Outcome:
    """The class and the text of what ``function`` raises."""
    with pytest.raises(BaseException) as caught:  # noqa: PT011 - the class is what is asked for
        function(*args, **kwargs)
    return type(caught.value), str(caught.value)


# Called from Python.


def _call_functions(to: str) -> dict[str, Any]:
    ones = torch.ones(2)
    return {
        "default": rpc.rpc_sync(to, scaled, args=(ones,)).tolist(),
        "keyword": rpc.rpc_async(to, scaled, args=(ones,), kwargs={"by": 3}).wait().tolist(),
        "remote": rpc.remote(to, scaled, args=(ones, 4)).to_here().tolist(),
        "list": rpc.rpc_sync(to, total, args=([ones, ones],)).item(),
        "async": rpc.rpc_sync(to, scaled_later, args=(ones,)).tolist(),
        "async remote": rpc.remote(to, scaled_later, args=(ones,)).to_here().tolist(),
    }


@pytest.mark.parametrize("to", ["worker1", "worker0"])
def test_script_functions_are_called_with_defaults_keywords_and_containers(to: str) -> None:
    assert on_group(_call_functions, to) == {
        "default": [2.0, 2.0],
        "keyword": [3.0, 3.0],
        "remote": [4.0, 4.0],
        "list": 4.0,
        "async": [2.0, 2.0],
        "async remote": [2.0, 2.0],
    }


def _use_modules() -> dict[str, Any]:
    ones = torch.ones(2)
    there = rpc.remote("worker1", scripted)
    remote = RemoteModule("worker1/cpu", scripted)
    return {
        "forward": there.rpc_sync().forward(ones).tolist(),
        "forward async": there.rpc_async().forward(ones).wait().tolist(),
        "forward remote": there.remote().forward(ones).to_here().tolist(),
        "exported": there.rpc_sync().halved(ones).tolist(),
        "fetched": there.to_here()(ones).tolist(),
        "sent": rpc.rpc_sync("worker1", torch.jit.script(Doubling()), args=(ones,)).tolist(),
        "RemoteModule": remote(ones).tolist(),
        "RemoteModule async": remote.forward_async(ones).wait().tolist(),
        "parameters": [parameter.to_here().tolist() for parameter in remote.remote_parameters()],
    }


def test_script_modules_live_elsewhere_and_travel() -> None:
    found = on_group(_use_modules)
    assert found.pop("exported") == [0.5, 0.5]
    assert found.pop("parameters") == [[2.0, 2.0]]
    assert {name: value for name, value in found.items() if value != [2.0, 2.0]} == {}


# What is refused, and where.


def _call_badly() -> dict[str, Outcome]:
    ones = torch.ones(2)
    return {
        "sync": outcome_of(rpc.rpc_sync, "worker1", scaled, args=(ones, 1, 2)),
        "async": outcome_of(rpc.rpc_async, "worker1", scaled, args=(ones, 1, 2)),
        "remote": outcome_of(rpc.remote, "worker1", scaled, args=(ones, 1, 2)),
    }


def test_arguments_that_do_not_fit_are_refused_where_the_call_is_made() -> None:
    for name, (kind, text) in on_group(_call_badly).items():
        assert kind is InvalidTypeError, name
        assert "scaled() expected at most 2 argument(s) but received 3 argument(s)" in text


def _fail_there() -> dict[str, Outcome]:
    ones = torch.ones(2)
    return {
        "raises": outcome_of(rpc.rpc_sync, "worker1", fails, args=(ones,)),
        "raises remote": outcome_of(rpc.remote("worker1", fails, args=(ones,)).to_here),
        "no future": outcome_of(rpc.rpc_sync, "worker1", never_later),
        "no future remote": outcome_of(rpc.remote("worker1", never_later).to_here),
    }


def test_what_goes_wrong_at_the_callee_is_told_to_the_caller() -> None:
    found = on_group(_fail_there)
    for name in ("raises", "raises remote"):
        assert "not this one" in found[name][1]
    for name in ("no future", "no future remote"):
        assert issubclass(found[name][0], RuntimeError)
        assert "Async functions must return an IValue of Future type, but got Tensor from never_later" in found[name][1]


def _give_rrefs() -> dict[str, Any]:
    theirs = rpc.remote("worker1", torch.ones, args=([2],))
    mine = rpc.RRef(torch.ones(2))
    outcomes: dict[str, Any] = {
        "user": outcome_of(rpc.rpc_sync, "worker1", scaled, args=(theirs,)),
        "owner": outcome_of(rpc.rpc_async, "worker1", scaled, args=(mine,)),
        "remote": outcome_of(rpc.remote, "worker1", scaled, args=(theirs,)),
        "keyword": outcome_of(rpc.rpc_sync, "worker1", scaled, kwargs={"x": theirs}),
        "inside a list": outcome_of(rpc.rpc_sync, "worker1", total, args=([theirs, mine],)),
    }
    return outcomes


def test_an_rref_for_a_script_function_is_refused_with_a_way_out_and_leaks_nothing() -> None:
    for name, (kind, text) in on_group(_give_rrefs).items():
        assert kind is ScriptError, name
        assert "takes an RRef, but TorchScript runs in C++" in text
        assert "Call a Python function" in text


def _send_a_method() -> Outcome:
    return outcome_of(rpc.rpc_async, "worker1", scripted().forward, args=(torch.ones(2),))


def test_a_script_modules_method_cannot_be_sent() -> None:
    kind, text = on_group(_send_a_method)
    assert issubclass(kind, NotPicklableError)
    assert "pickle" in text


# What TorchScript says where nothing of ours is on the way; the docs quote it.


@torch.jit.script
def call_inside(to: str, x: Tensor) -> Tensor:
    return rpc.rpc_sync(to, scaled, (x,))


@torch.jit.script
def fetch_inside(rref: rpc.RRef[Tensor]) -> Tensor:
    return rref.to_here()


@torch.jit.script
def wait_inside(future: Future[Tensor]) -> Tensor:
    return future.wait() + 1


class Holding(nn.Module):
    def __init__(self, rref: Any) -> None:
        super().__init__()
        self.rref = rref

    def forward(self) -> Tensor:
        value: Tensor = self.rref.to_here()
        return value


def _do_what_cannot_work() -> dict[str, Outcome]:
    ones = torch.ones(2)
    return {
        "Current RPC agent is not set! Did you initialize the RPC framework": outcome_of(call_inside, "worker1", ones),
        "Expected a value of type 'RRef[Tensor]'": outcome_of(fetch_inside, rpc.RRef(ones)),
        "Unable to cast Python instance of type <class 'zmqagent.rref.rref.RRef'>": outcome_of(
            torch.jit.script, Holding(rpc.RRef(ones))
        ),
        "Expected Tensor but got PyObject": outcome_of(wait_inside, rpc.rpc_async("worker1", scaled, args=(ones,))),
    }


@torch.jit.script
def hand_back(future: Future[Tensor]) -> Tensor:
    return future.wait()


def _wait_for_failures() -> tuple[str, dict[str, Outcome]]:
    def failed() -> Future[Tensor]:
        future: Future[Tensor] = rpc.rpc_async("worker1", fails, args=(torch.ones(2),))
        return future

    def waited() -> Future[Tensor]:
        return failed().then(lambda future: future.wait())

    in_place_of_a_value = type(hand_back(failed())).__name__
    return in_place_of_a_value, {"handed back": outcome_of(hand_back, waited()), "used": outcome_of(wait_inside, waited())}


def test_a_script_that_waits_for_a_failed_call_raises_if_it_is_given_a_future_that_waited_in_python() -> None:
    in_place_of_a_value, outcomes = on_group(_wait_for_failures)
    assert in_place_of_a_value == "Failed"  # as the docs say of a future that did not
    for name, (kind, text) in outcomes.items():
        assert issubclass(kind, RuntimeError), name
        assert "not this one" in text


def test_what_cannot_work_fails_at_once_as_the_docs_quote() -> None:
    docs = Path(__file__).parents[2] / "docs" / "compatibility.md"
    for quoted, (kind, text) in on_group(_do_what_cannot_work).items():
        assert issubclass(kind, RuntimeError)
        assert quoted in text
        assert f'"{quoted}"' in docs.read_text()


@rpc.functions.async_execution
@torch.jit.script
def call_inside_a_fork(to: str, x: Tensor) -> Future[Tensor]:
    return torch.jit.fork(call_inside, to, x)


def _call_what_calls_inside() -> dict[str, Outcome]:
    args = ("worker0", torch.ones(2))
    return {
        "sync": outcome_of(rpc.rpc_sync, "worker1", call_inside, args=args),
        "remote": outcome_of(rpc.remote("worker1", call_inside, args=args).to_here),
        "in a fork": outcome_of(rpc.rpc_sync, "worker1", call_inside_a_fork, args=args),
        "in a fork, remote": outcome_of(rpc.remote("worker1", call_inside_a_fork, args=args).to_here),
    }


def test_a_script_called_by_rpc_that_makes_a_call_itself_is_told_what_to_do_instead() -> None:
    for name, (kind, text) in on_group(_call_what_calls_inside).items():
        assert kind is ScriptError, name
        assert "Move the RPC into a Python function that is decorated with torch.jit.ignore" in text
        assert text.count("On WorkerInfo") == 1


# Called from scripts.


@torch.jit.script
def run_backward(context_id: int, loss: Tensor) -> None:
    dist_autograd.backward(context_id, [loss])


@torch.jit.script
def gradients_of(context_id: int) -> dict[Tensor, Tensor]:
    return dist_autograd.get_gradients(context_id)


def _train_in_scripts() -> list[Any]:
    leaf = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context_id:
        loss = rpc.rpc_sync("worker1", scaled, args=(leaf, 3)).sum()
        run_backward(context_id, loss)
        gradients = gradients_of(context_id)
    gone = outcome_of(run_backward, context_id, loss)
    return [len(gradients), gradients[leaf].tolist(), gone]


def test_scripts_reach_distributed_autograd() -> None:
    count, gradient, (kind, text) = on_group(_train_in_scripts)
    assert (count, gradient) == (1, [3.0, 3.0])
    assert issubclass(kind, RuntimeError)
    assert "Could not find autograd context with id" in text


@torch.jit.ignore
def scaled_there(x: Tensor) -> Tensor:
    scaled_x: Tensor = rpc.rpc_sync("worker1", scaled, args=(x,))
    return scaled_x


@torch.jit.script
def call_by_way_of_python(x: Tensor) -> Tensor:
    later = torch.jit.fork(scaled_there, x)
    return torch.jit.wait(later) + scaled_there(x)


def _call_from_a_script() -> list[list[float]]:
    leaf = torch.ones(2, requires_grad=True)
    with dist_autograd.context() as context_id:
        value = call_by_way_of_python(leaf)
        dist_autograd.backward(context_id, [value.sum()])
        return [value.tolist(), dist_autograd.get_gradients(context_id)[leaf].tolist()]


def test_a_script_makes_calls_and_gets_gradients_through_python_functions_that_the_compiler_ignores() -> None:
    assert on_group(_call_from_a_script) == [[4.0, 4.0], [4.0, 4.0]]
