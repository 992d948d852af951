"""The backend as torch sees it: its registration, its options and its start. The only place that puts the parts together."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
import torch.distributed.rpc as rpc
from torch.distributed.rpc import backend_registry

from zmqagent import torch_bindings
from zmqagent.agent.detour import Detour
from zmqagent.agent.directory import UNDRAWN
from zmqagent.dynamic_worker import DynamicWorker
from zmqagent.exceptions import InvalidOptionError, InvalidTypeError
from zmqagent.options import ZmqRpcBackendOptions
from zmqagent.rpc import recordings, trace_spans
from zmqagent.rpc.profiler import server_profiler
from zmqagent.worker import Worker

if TYPE_CHECKING:
    from torch._C._distributed_rpc import _TensorPipeRpcBackendOptionsBase

__all__ = ["NAME", "register", "register_variant", "replace_tensorpipe"]

NAME = "ZMQ"

_logger = logging.getLogger(__name__)


@dataclasses.dataclass(slots=True)
class _Process:
    """What this process remembers between torch's calls."""

    autograd_rank: int | None = None
    """The rank of the last ``dist_autograd._init``, which torch calls before any agent exists, for whichever backend."""
    profiler_node: int | None = None
    replace_tensorpipe: bool = False


_process = _Process()


@dataclasses.dataclass(frozen=True, slots=True)
class _Variant:
    """A backend whose workers are this package's."""

    options: type[ZmqRpcBackendOptions]
    taken_over: type[_TensorPipeRpcBackendOptionsBase]
    """Which options of torch's own ``options.from_tensorpipe`` understands in full."""
    make_detour: Callable[[Any], Detour | None]


# By the name of the backend; added to as modules are imported.
_variants: dict[str, _Variant] = {}


def register() -> None:
    """Makes ``BackendType.ZMQ`` exist, in torch's own enum, so that members taken earlier stay valid. Harmless when repeated."""
    torch_bindings.install(
        {
            "_create_store_from_options": _create_store,
            "_init": _record_autograd_rank,
            "_set_profiler_node_id": _record_profiler_node,
            "init_backend": _init_backend,
            "register_backend": _register_backend,
            "ProfilerConfig.__init__": _make_profiler_config,
            "_enable_profiler_legacy": _enable_profiler_legacy,
            "_disable_profiler_legacy": _disable_profiler_legacy,
            "_enable_profiler": _enable_profiler,
            "_disable_profiler": _disable_profiler,
            "_enable_server_process_global_profiler": _enable_server_profiler,
            "_disable_server_process_global_profiler": _disable_server_profiler,
        }
    )
    register_variant(NAME, ZmqRpcBackendOptions, rpc.TensorPipeRpcBackendOptions, lambda options: None)


def register_variant(
    name: str,
    options: type[ZmqRpcBackendOptions],
    taken_over: type[_TensorPipeRpcBackendOptionsBase],
    make_detour: Callable[[Any], Detour | None],
) -> None:
    """Makes ``BackendType.<name>`` exist: workers with options of type ``options``, or of torch's type ``taken_over``, whose
    messages go through what ``make_detour(options)`` returns. Harmless when repeated."""
    _variants[name] = _Variant(options, taken_over, make_detour)
    if not backend_registry.backend_registered(name):
        _register_backend(name, partial(_construct_options, options), partial(_init_worker, name))


def replace_tensorpipe() -> None:
    """From now on a script of this process that names TENSORPIPE, or no backend, gets ZMQ."""
    register()
    _process.replace_tensorpipe = True


def _register_backend(name: str, construct_options: Callable[..., Any], init: Callable[..., Any]) -> Any:
    """torch's ``register_backend``, except that the enum keeps its identity: torch makes a new one, and every member that
    anybody holds becomes invalid."""
    backend_type = backend_registry.BackendType
    if backend_registry.backend_registered(name):
        raise RuntimeError(f"RPC backend {name}: already registered")
    value = backend_registry.BackendValue(construct_options, init)
    # Typed Any: these are the enum module's own attributes, which type checkers do not know.
    member: Any = object.__new__(backend_type)
    member._name_ = name
    member._value_ = value
    member.__objclass__ = backend_type
    member._sort_order_ = len(backend_type)
    backend_type._member_names_.append(name)
    backend_type._member_map_[name] = member
    backend_type._value2member_map_[value] = member
    # Enum refuses assignments to members; type's own does not.
    type.__setattr__(backend_type, name, member)
    return member


def _record_autograd_rank(rank: int) -> None:
    _process.autograd_rank = rank


def _record_profiler_node(node: int) -> None:
    _process.profiler_node = node


def _make_profiler_config(config: Any, *args: Any, **kwargs: Any) -> None:
    torch_bindings.original("ProfilerConfig.__init__")(config, *args, **kwargs)
    recordings.remember(config, *args, **kwargs)


# A profile may begin before a worker starts and end after that has shut down, so these stand always.


def _enable_profiler_legacy(config: Any) -> None:
    torch_bindings.original("_enable_profiler_legacy")(config)
    recordings.entered(config)


def _disable_profiler_legacy(*options: Any) -> Any:
    return recordings.left(torch_bindings.original("_disable_profiler_legacy")(*options))


def _enable_profiler(*args: Any, **kwargs: Any) -> None:
    torch_bindings.original("_enable_profiler")(*args, **kwargs)
    trace_spans.entered()


def _disable_profiler() -> Any:
    trace_spans.end_all()
    return torch_bindings.original("_disable_profiler")()


# Both enter torch's own as well, for its own agent: nobody knows yet which will run.


def _enable_server_profiler(config: Any) -> None:
    torch_bindings.original("_enable_server_process_global_profiler")(config)
    server_profiler.enable(config)


def _disable_server_profiler() -> list[Any]:
    ours = server_profiler.disable()
    return [*torch_bindings.original("_disable_server_process_global_profiler")(), *ours]


def _init_backend(backend: Any, *args: Any, **kwargs: Any) -> Any:
    """torch's ``init_backend``. For other backends it first makes the two calls of torch's that were only recorded."""
    if _process.replace_tensorpipe and backend.name == "TENSORPIPE":
        backend = backend_registry.BackendType[NAME]
    if backend.name not in _variants:
        if _process.autograd_rank is not None:
            torch_bindings.original("_init")(_process.autograd_rank)
        if _process.profiler_node is not None:
            torch_bindings.original("_set_profiler_node_id")(_process.profiler_node)
    return torch_bindings.original("init_backend")(backend, *args, **kwargs)


def _create_store(options: Any, rank: int) -> Any:
    """torch's ``_create_store_from_options``, which makes the store of a dynamic group and insists on a rank."""
    is_drawn = rank == UNDRAWN and isinstance(options, ZmqRpcBackendOptions) and options.draw_rank
    # torch only looks whether it is 0, the rank whose process serves the store.
    return torch_bindings.original("_create_store_from_options")(options, 1 if is_drawn else rank)


def _construct_options(
    options: type[ZmqRpcBackendOptions], rpc_timeout: float, init_method: str, **kwargs: Any
) -> ZmqRpcBackendOptions:
    return options(rpc_timeout=rpc_timeout, init_method=init_method, **kwargs)


def _init_worker(
    backend: str, store: dist.Store, name: str, rank: int, world_size: int | None, rpc_backend_options: rpc.RpcBackendOptions
) -> Any:
    """Starts a worker of the variant ``backend`` and returns its agent, as ``init_rpc`` expects of a backend."""
    if not isinstance(store, dist.Store):
        raise InvalidTypeError(f"`store` must be a c10d::Store. {store}")
    options = _own_options(backend, rpc_backend_options)
    if not world_size:
        return DynamicWorker.join(store, name, rank, options, _variants[backend].make_detour(options)).agent
    if not 0 <= rank < world_size:
        raise InvalidOptionError(
            f"rank {rank} of worker {name!r} lies outside 0 to {world_size - 1}, the ranks of a group of {world_size}"
        )
    return Worker.start(store, name, rank, world_size, options, _variants[backend].make_detour(options)).agent


def _own_options(backend: str, given: rpc.RpcBackendOptions) -> ZmqRpcBackendOptions:
    """``given``, or what it means here, as options of the variant ``backend``."""
    own = _variants[backend]
    if isinstance(given, own.taken_over):
        return own.options.from_tensorpipe(given)
    for name, other in _variants.items():
        # What only another variant heeds would be passed over in silence.
        is_more = other.options is not own.options and issubclass(other.options, own.options)
        if is_more and isinstance(given, other.options | other.taken_over):
            raise InvalidTypeError(
                f"`rpc_backend_options` is a `{type(given).__qualname__}`, which is for backend=rpc.BackendType.{name}, and the "
                f"backend is {backend}"
            )
    if not isinstance(given, own.options):
        raise InvalidTypeError(
            f"`rpc_backend_options` must be a `{own.options.__name__}` or a `TensorPipeRpcBackendOptions`, but got "
            f"{type(given).__qualname__}"
        )
    return given
