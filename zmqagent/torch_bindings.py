"""The one place that rebinds torch's private names: a table of seams, install and uninstall. No logic.

torch starts only C++ agents, but all its Python code reaches the agent through names that its modules imported. Each such name
becomes a dispatcher here: it calls what `activate` put in its place while an agent of this package runs, and torch's own function
otherwise. So TENSORPIPE works in the same process, before and after, and a script that took a name out of torch's modules before
zmqagent was imported is served too: the names are found by identity in every loaded module.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.rpc import api

from zmqagent.script_operators import NAMESPACE

__all__ = [
    "FUNCTIONS",
    "HOOKS",
    "METHODS",
    "OPERATORS",
    "SWAPS",
    "activate",
    "deactivate",
    "install",
    "is_active",
    "original",
    "release_gatherings",
    "uninstall",
]

_RPC = "torch._C._distributed_rpc"
_AUTOGRAD = "torch._C._distributed_autograd"
_REGISTRY = "torch.distributed.rpc.backend_registry"
_FUTURES = "torch.futures"
_PROFILERS = "torch._C._autograd"
_API = "torch.distributed.rpc.api"
_RENDEZVOUS = "torch.distributed.rendezvous"


@dataclass(frozen=True, slots=True)
class Seam:
    """One name of torch's: the module, the class in it (for methods), the attribute; and whether a method takes its object."""

    module: str
    name: str
    owner: str = ""
    takes_self: bool = False

    @property
    def key(self) -> str:
        """The name under which `activate` takes its replacement."""
        return f"{self.owner}.{self.name}" if self.owner else self.name

    def holder(self) -> Any:
        """The module or class that has the attribute."""
        module = importlib.import_module(self.module)
        return getattr(module, self.owner) if self.owner else module


FUNCTIONS: tuple[Seam, ...] = (
    Seam(_RPC, "_cleanup_python_rpc_handler"),
    Seam(_RPC, "_delete_all_user_and_unforked_owner_rrefs"),
    Seam(_RPC, "_destroy_rref_context"),
    Seam(_RPC, "_disable_jit_rref_pickle"),
    Seam(_RPC, "_disable_server_process_global_profiler"),
    Seam(_RPC, "_enable_jit_rref_pickle"),
    Seam(_RPC, "_enable_server_process_global_profiler"),
    Seam(_RPC, "_get_current_rpc_agent"),
    Seam(_RPC, "_invoke_remote_builtin"),
    Seam(_RPC, "_invoke_remote_python_udf"),
    Seam(_RPC, "_invoke_remote_torchscript"),
    Seam(_RPC, "_invoke_rpc_builtin"),
    Seam(_RPC, "_invoke_rpc_python_udf"),
    Seam(_RPC, "_invoke_rpc_torchscript"),
    Seam(_RPC, "_is_current_rpc_agent_set"),
    Seam(_RPC, "_reset_current_rpc_agent"),
    Seam(_RPC, "_rref_context_get_debug_info"),
    Seam(_RPC, "_set_profiler_node_id"),
    Seam(_RPC, "_set_rpc_timeout"),
    Seam(_RPC, "enable_gil_profiling"),
    Seam(_RPC, "get_rpc_timeout"),
    Seam(_AUTOGRAD, "_current_context"),
    Seam(_AUTOGRAD, "_get_debug_info"),
    Seam(_AUTOGRAD, "_get_max_id"),
    Seam(_AUTOGRAD, "_init"),
    Seam(_AUTOGRAD, "_is_valid_context"),
    Seam(_AUTOGRAD, "_new_context"),
    Seam(_AUTOGRAD, "_release_context"),
    Seam(_AUTOGRAD, "_retrieve_context"),
    Seam(_AUTOGRAD, "backward"),
    Seam(_AUTOGRAD, "get_gradients"),
    Seam(_PROFILERS, "_disable_profiler"),
    Seam(_PROFILERS, "_disable_profiler_legacy"),
    Seam(_PROFILERS, "_enable_profiler"),
    Seam(_PROFILERS, "_enable_profiler_legacy"),
    Seam(_API, "_enable_rpc_profiler"),
    Seam(_API, "_all_gather"),
    Seam(_API, "_wait_all_workers"),
    Seam(_API, "shutdown"),
    Seam(_RENDEZVOUS, "_create_store_from_options"),
    Seam(_REGISTRY, "init_backend"),
    Seam(_REGISTRY, "register_backend"),
    Seam(_FUTURES, "collect_all"),
    Seam(_FUTURES, "wait_all"),
)
"""Functions, rebound wherever a module holds them."""

METHODS: tuple[Seam, ...] = (
    Seam(_API, "__new__", owner="RRef"),
    Seam(_RPC, "_deserialize", owner="PyRRef"),
    Seam("torch._C._profiler", "__init__", owner="ProfilerConfig", takes_self=True),
    Seam("torch.autograd.profiler", "_call_end_callbacks_on_future", owner="record_function", takes_self=True),
)
"""Methods, rebound on their class."""

HOOKS: tuple[Seam, ...] = (Seam("torch.distributed.nn.api.remote_module", "__prepare_scriptable__", owner="_RemoteModule"),)
"""Methods that torch calls if a class has them, added by this package. While no agent of ours runs, each returns its object."""

SWAPS: tuple[Seam, ...] = (
    Seam(_API, "_default_pickler"),
    Seam(_API, "_internal_rpc_pickler"),
    Seam("torch._jit_internal", "_TensorExtractor"),
)
"""Objects that are no plain functions: replaced while an agent of this package runs, and put back afterwards."""

OPERATORS: Mapping[str, str] = {
    "backward": f"{NAMESPACE}::dist_backward",
    "get_gradients": f"{NAMESPACE}::get_gradients",
}
"""`Seam.key` -> the operator that stands for the function in a script; torch's own know only torch's own contexts."""

# Protects the five tables below while they change. Dispatchers read _replacements without it: one look-up in one dict, which
# is replaced whole and never changed in place.
_lock = threading.Lock()
_replacements: Mapping[str, Any] = {}
_standing: Mapping[str, Any] = {}
_originals: dict[str, Any] = {}
_shadowed: dict[Seam, Any] = {}  # the methods' own descriptors; a seam that is missing here was inherited
_swapped: dict[Seam, Any] = {}


def install(standing: Mapping[str, Callable[..., Any]]) -> None:
    """Puts a dispatcher in place of every function and method of the table. Does nothing if that was done before.

    ``standing`` are replacements, by `Seam.key`, that hold whether an agent of this package runs or not; they reach torch's
    function through `original`.
    """
    global _standing, _replacements
    with _lock:
        if _originals:
            return
        dispatchers: dict[int, tuple[str, Any]] = {}
        for seam in FUNCTIONS:
            function = getattr(seam.holder(), seam.name)
            _originals[seam.key] = function
            dispatchers[id(function)] = (seam.key, _dispatcher(seam.key, function))
        _rebind({number: dispatcher for number, (_, dispatcher) in dispatchers.items()})
        _tell_compiler(dispatchers)
        for seam in METHODS:
            method = getattr(seam.holder(), seam.name)
            _originals[seam.key] = method
            if seam.name in vars(seam.holder()):
                _shadowed[seam] = vars(seam.holder())[seam.name]
            dispatcher = _dispatcher(seam.key, method)
            setattr(seam.holder(), seam.name, dispatcher if seam.takes_self else staticmethod(dispatcher))
        for seam in HOOKS:
            setattr(seam.holder(), seam.name, _dispatcher(seam.key, _itself))
        _standing = dict(standing)
        _replacements = _standing


def uninstall() -> None:
    """Gives every name of the table back to torch. An agent that still runs can no longer be reached through torch's names."""
    global _standing, _replacements
    deactivate()
    with _lock:
        if not _originals:
            return
        installed = {id(getattr(seam.holder(), seam.name)): _originals[seam.key] for seam in FUNCTIONS}
        for number in installed:
            # The id may be another function's soon.
            torch.jit._builtins._get_builtin_table().pop(number, None)
        _rebind(installed)
        for seam in METHODS:
            if seam in _shadowed:
                setattr(seam.holder(), seam.name, _shadowed.pop(seam))
            else:
                delattr(seam.holder(), seam.name)
        for seam in HOOKS:
            delattr(seam.holder(), seam.name)
        _originals.clear()
        _standing = _replacements = {}


def activate(replacements: Mapping[str, Any]) -> None:
    """Makes ``replacements`` (by `Seam.key`) take the place of torch's functions, methods and objects, until `deactivate`."""
    global _replacements
    with _lock:
        _replacements = {**_standing, **replacements}
        for seam in SWAPS:
            if seam.key in replacements:
                _swapped[seam] = getattr(seam.holder(), seam.name)
                setattr(seam.holder(), seam.name, replacements[seam.key])


def deactivate() -> None:
    """Ends what `activate` began; harmless if nothing is active."""
    global _replacements
    with _lock:
        _replacements = _standing
        for seam, value in _swapped.items():
            setattr(seam.holder(), seam.name, value)
        _swapped.clear()
        api._all_gather_sequence_id_to_states.default_factory = api.AllGatherStates


def release_gatherings() -> None:
    """Lets go whoever waits in torch's ``_all_gather``, now or later: after a loss nobody can complete one."""

    def released() -> api.AllGatherStates:
        states = api.AllGatherStates()
        states.proceed_signal.set()
        return states

    with api._all_gather_dict_lock:
        api._all_gather_sequence_id_to_states.default_factory = released
        for states in api._all_gather_sequence_id_to_states.values():
            states.proceed_signal.set()


def is_active() -> bool:
    """Whether an agent of this package takes torch's calls now."""
    return _replacements is not _standing


def original(key: str) -> Callable[..., Any]:
    """torch's own function behind a seam."""
    return _originals[key]  # type: ignore[no-any-return]


def _dispatcher(key: str, function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def dispatch(*args: Any, **kwargs: Any) -> Any:
        return _replacements.get(key, function)(*args, **kwargs)

    return dispatch


def _itself(owner: Any) -> Any:
    return owner


def _tell_compiler(dispatchers: Mapping[int, tuple[str, Any]]) -> None:
    """TorchScript's compiler knows some of the functions by their ids; it is to know the dispatchers by theirs as well."""
    known = torch.jit._builtins._get_builtin_table()
    for number, (key, dispatcher) in dispatchers.items():
        if number in known:
            known[id(dispatcher)] = OPERATORS.get(key, known[number])


def _rebind(replacements: Mapping[int, Any]) -> None:
    """Replaces, in every loaded module, each attribute whose object's id is a key of ``replacements``."""
    for module in list(sys.modules.values()):
        names = getattr(module, "__dict__", None)
        # This module's own tables are dicts, not attributes, so its originals stay.
        if not isinstance(names, dict):
            continue
        for name, value in list(names.items()):
            replacement = replacements.get(id(value))
            if replacement is not None:
                names[name] = replacement
