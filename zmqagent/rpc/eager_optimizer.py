"""`DistributedOptimizer` without TorchScript.

For torch's functional optimizers `DistributedOptimizer` calls two functions by RPC: one compiles the local optimizer, the other
is itself a TorchScript function that takes an RRef. TorchScript runs in C++ and cannot hold an RRef of this package, so the calls
go to the functions below, which run the same optimizer classes eagerly.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed.rpc as rpc

__all__ = ["EAGER_FORMS", "eager_form"]


@contextmanager
def _without_script_warning() -> Iterator[None]:
    """Keeps torch from warning of TorchScript, which is not used here; all other warnings come through."""
    with warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        if "TorchScript" not in str(warning.message):
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _new_local_optimizer(optim_cls: type, local_params_rref: list[Any], *args: Any, **kwargs: Any) -> Any:
    """Makes the optimizer of this worker's parameters, and an RRef to it."""
    # Imported here, since it takes most of a second and few programs need it.
    from torch.distributed.optim.optimizer import _ScriptLocalOptimizer

    with _without_script_warning():
        local_optimizer = _ScriptLocalOptimizer(optim_cls, local_params_rref, *args, **kwargs)
    return rpc.RRef(local_optimizer)


def _local_optimizer_step(local_optim_rref: Any, autograd_ctx_id: int) -> None:
    """Applies the context's gradients. Steps are serialized on each worker, as `DistributedOptimizer` documents."""
    from torch.distributed.optim.optimizer import _LocalOptimizer

    with _LocalOptimizer.global_lock:
        local_optim_rref.local_value().step(autograd_ctx_id)


_MODULE = "torch.distributed.optim.optimizer"

EAGER_FORMS: dict[str, Callable[..., Any]] = {
    f"{_MODULE}._new_script_local_optimizer": _new_local_optimizer,
    f"__torch__.{_MODULE}._script_local_optimizer_step": _local_optimizer_step,
}
"""What is called instead, by the qualified name of torch's function."""


def eager_form(function: Any) -> Callable[..., Any] | None:
    """What is called instead of the Python function ``function``, if it is one of torch's optimizer."""
    if getattr(function, "__module__", None) != _MODULE:
        return None
    return EAGER_FORMS.get(f"{_MODULE}.{getattr(function, '__qualname__', '')}")
