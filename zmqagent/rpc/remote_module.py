"""`torch.distributed.nn` remote modules with a TorchScript interface, without RRefs inside TorchScript.

torch compiles such a `RemoteModule` together with the RRef that it holds, and has a TorchScript function take that RRef on the
other side. Here the compiled module is a substitute, whose methods have the interface's types and call the remote module in
Python, and the function on the other side is the Python one that remote modules without an interface use.
"""

from __future__ import annotations

import linecache
import sys
import types
from typing import Any

import torch
from torch.futures import Future

from zmqagent.exceptions import ScriptError

__all__ = ["is_remote_forward", "remote_forward", "scriptable_form"]


def is_remote_forward(name: str) -> bool:
    """Whether ``name`` is that of the TorchScript function which torch generates for an interface."""
    return name.startswith("__torch__._remote_module_") and name.endswith("._remote_forward")


def remote_forward(module_rref: Any, device: str, is_device_map_set: bool, *args: Any, **kwargs: Any) -> Any:
    """What runs on the module's owner instead of that function."""
    # Imported here, since few programs need it.
    from torch.distributed.nn.api import remote_module

    eager: Any = remote_module._NON_SCRIPTABLE_REMOTE_MODULE_MODULE
    return eager._remote_forward(module_rref, device, is_device_map_set, *args, **kwargs)


def scriptable_form(remote_module: Any) -> torch.nn.Module:
    """What ``torch.jit.script`` compiles in place of ``remote_module``; it keeps that alive.

    Raises:
        ScriptError: the module was created without an interface.
    """
    if not remote_module.is_scriptable:
        raise ScriptError(
            "a RemoteModule that was created without a module interface cannot be compiled to TorchScript: call it from a Python "
            "function that is decorated with torch.jit.ignore"
        )
    # An attribute of a compiled module cannot be a Python object, but it can be a future, which may hold one.
    held: Future[Any] = Future()
    held.set_result(remote_module)
    interface = remote_module.generated_methods[0].__globals__["module_interface_cls"]
    form: torch.nn.Module = _generated(interface).ScriptableRemoteModule(held)
    return form


# TorchScript reads source text, and the methods differ from interface to interface. Nothing but the types does: names and types
# come from a compiled interface. The attribute has the name by which torch knows that a compiled module cannot be sent.
_TEMPLATE = """
from typing import *

import torch
from torch import Tensor
from torch.futures import Future
from zmqagent.rpc.failures import unwrapped


@torch.jit.ignore
def _forward(held: Future[Any], {arguments}) -> {result}:
    return held.wait().forward({names})


@torch.jit.ignore
def _begin(held: Future[Any], {arguments}) -> Future[Any]:
    return held.wait().forward_async({names})


@torch.jit.ignore
def _typed(value: Any) -> {result}:
    return unwrapped(value)


def _finish(future: Future[Any]) -> {result}:
    # A wait in TorchScript suspends the fork. One in Python would hold a thread that the end of the call may depend on.
    return _typed(future.wait())


class ScriptableRemoteModule(torch.nn.Module):
    module_rref: Future[Any]

    def __init__(self, held):
        super().__init__()
        self.module_rref = held

    def forward(self, {arguments}) -> {result}:
        return _forward(self.module_rref, {names})

    @torch.jit.export
    def forward_async(self, {arguments}) -> Future[{result}]:
        # The call's own future holds a Python object, of which the compiler knows no type; that of the fork has one.
        return torch.jit.fork(_finish, _begin(self.module_rref, {names}))

    @torch.jit.export
    def __getstate__(self):
        raise RuntimeError("Cannot pickle RemoteModule in python pickler. RemoteModule can only be pickled when using RPC")

    @torch.jit.export
    def __setstate__(self, state):
        raise RuntimeError("Cannot unpickle RemoteModule in python pickler. RemoteModule can only be unpickled when using RPC")
"""


def _generated(interface: Any) -> Any:
    """The module made from the template for ``interface``, once in a process."""
    from torch.distributed.nn.jit import instantiator

    name = "_zmqagent_" + torch._jit_internal._qualified_name(interface).replace(".", "_")
    if name not in sys.modules:
        names, arguments, result = instantiator.get_arg_return_types_from_interface(interface)
        source = _TEMPLATE.format(names=names, arguments=arguments, result=result)
        module = types.ModuleType(name)
        # On its own: under this file's __future__ import the annotations would stay strings, which the compiler cannot read.
        exec(compile(source, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
        # Where the compiler looks for the text.
        linecache.cache[f"<{name}>"] = (len(source), None, source.splitlines(keepends=True), f"<{name}>")
        sys.modules[name] = module
    return sys.modules[name]
