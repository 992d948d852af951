"""The architecture, kept by reading the imports of every file: who may know whom, and which files are pure.

The rules are those of docs/design.md. The checker takes source text, so that the tests can also show it code that breaks them.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[2] / "zmqagent"
FILES = sorted(path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py"))

LEAVES = {"exceptions", "options", "version"}
"""May be imported by anyone."""

BELOW: dict[str, set[str]] = {
    "exceptions": set(),
    "version": set(),
    "options": {"exceptions"},
    "wire": set(),
    "transport": {"wire"},
    "agent": {"transport", "wire"},
    "rref": {"agent", "transport", "wire"},
    "autograd": {"agent", "transport", "wire"},
    "rpc": {"autograd", "rref", "agent", "transport", "wire"},
    "script_operators": set(),
    "torch_bindings": {"script_operators"},
    "worker": {"torch_bindings", "rpc", "autograd", "rref", "agent", "transport", "wire"},
    "dynamic_worker": {"worker", "torch_bindings", "rpc", "autograd", "rref", "agent", "transport", "wire"},
    "backend": {"dynamic_worker", "worker", "torch_bindings", "rpc", "autograd", "rref", "agent", "transport", "wire"},
    "__init__": {"backend"},
    "testing": {"backend", "agent", "transport", "wire"},
    "cli": {"__init__", "backend", "rpc", "autograd", "rref", "agent", "transport", "wire"},
    "__main__": {"cli"},
}
"""What each part of the package may import, besides itself and the leaves."""

PURE = {
    "exceptions.py",
    "options.py",
    "version.py",
    "transport/slots.py",
    "wire/types.py",
    "wire/autograd_commands.py",
    "wire/commands.py",
    "wire/fields.py",
    "wire/group_commands.py",
    "wire/rref_commands.py",
    "wire/wrappers.py",
    "wire/frames.py",
    "wire/frozen.py",
    "agent/calls.py",
    "agent/checks.py",
    "agent/directory.py",
    "agent/membership.py",
    "agent/membership_events.py",
    "agent/served.py",
    "agent/devices.py",
    "agent/strides.py",
    "rref/events.py",
    "rref/owners.py",
    "rref/protocol.py",
    "rref/users.py",
    "autograd/plan.py",
    "testing/faults.py",
    "testing/identity.py",
    "testing/options.py",
}
"""Files without sockets, threads, clock and randomness: those come in as events, arguments and instructions."""

IMPURE_MODULES = {
    *("zmq", "socket", "select", "selectors", "ssl", "mmap"),
    *("threading", "_thread", "queue", "concurrent", "asyncio", "multiprocessing", "subprocess", "signal", "os"),
    *("time", "sched", "random", "secrets", "uuid"),
}
UNKNOWN_TO_WIRE_AND_TRANSPORT = ("torch.autograd", "torch.distributed.autograd", "torch.distributed.rpc")
WHERE_RREF_AND_AUTOGRAD_MEET = {"rpc/request_callback.py"}
REBINDS_TORCH = "torch_bindings.py"
MAX_LINES = 500
"""About 400 is what to aim at; a file beyond this has more than one reason to change."""


@dataclass(frozen=True)
class Import:
    """One imported name: ``module`` in full, ``bound`` as what it is known in the file."""

    module: str
    bound: str
    line: int


def imports(tree: ast.AST) -> Iterator[Import]:
    """All imports of a file, those inside functions and for type checkers too; a relative one begins with a dot."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, alias.asname or alias.name.partition(".")[0], node.lineno)
        elif isinstance(node, ast.ImportFrom):
            for alias in node.names:
                origin = "." * node.level + (node.module or "")
                yield Import(f"{origin}.{alias.name}", alias.asname or alias.name, node.lineno)
        elif isinstance(node, ast.Call) and _name_of(node.func) in {"import_module", "__import__"}:
            for argument in node.args[:1]:
                if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                    yield Import(argument.value, "", node.lineno)


def layer_of(file: str) -> str:
    """The part of the package that ``file`` (a path inside it) belongs to."""
    return file.partition("/")[0].removesuffix(".py")


def violations(file: str, source: str) -> list[str]:
    """What ``source`` does that its place in the package forbids."""
    tree = ast.parse(source)
    return [
        f"{file}:{line}: {what}"
        for line, what in sorted({*_arrows(file, tree), *_impurities(file, tree), *_rebindings(file, tree)})
    ]


def _arrows(file: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    layer = layer_of(file)
    reached: dict[str, int] = {}
    for found in imports(tree):
        if found.module.startswith("."):
            yield found.line, f"imports {found.module} relatively"
        parts = found.module.split(".")
        if parts[0] == "zmqagent":
            target = parts[1] if len(parts) > 1 and parts[1] in BELOW else "__init__"
            reached[target] = found.line
            if target not in BELOW[layer] | LEAVES | {layer}:
                yield found.line, f"{layer} imports {target}"
        if layer in {"wire", "transport"} and any(_inside(found.module, name) for name in UNKNOWN_TO_WIRE_AND_TRANSPORT):
            yield found.line, f"{layer} imports {found.module}"
    if layer == "rpc" and {"rref", "autograd"} <= reached.keys() and file not in WHERE_RREF_AND_AUTOGRAD_MEET:
        yield reached["autograd"], "rref and autograd meet here"


def _impurities(file: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if file in PURE:
        for found in imports(tree):
            if found.module.partition(".")[0] in IMPURE_MODULES:
                yield found.line, f"a pure file imports {found.module}"


def _rebindings(file: str, tree: ast.AST) -> Iterator[tuple[int, str]]:
    if file == REBINDS_TORCH:
        return
    names = {found.bound for found in imports(tree) if _inside(found.module, "torch")}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            owner: ast.expr = node.value
        elif isinstance(node, ast.Call) and node.args and _name_of(node.func) in {"setattr", "delattr"}:
            owner = node.args[0]
        else:
            continue
        if _root_of(owner) in names:
            yield node.lineno, f"changes an attribute of torch's {ast.unparse(owner)}"


def _inside(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def _name_of(function: ast.expr) -> str:
    if isinstance(function, ast.Attribute):
        return function.attr
    return function.id if isinstance(function, ast.Name) else ""


def _root_of(expression: ast.expr) -> str:
    while isinstance(expression, ast.Attribute):
        expression = expression.value
    return expression.id if isinstance(expression, ast.Name) else ""


@pytest.mark.parametrize("file", FILES)
def test_file_keeps_to_its_place(file: str) -> None:
    assert violations(file, (PACKAGE / file).read_text()) == []


@pytest.mark.parametrize("file", FILES)
def test_file_has_one_purpose(file: str) -> None:
    source = (PACKAGE / file).read_text()
    tree = ast.parse(source)
    assert ast.get_docstring(tree) or not tree.body, "a file says what it is for"
    assert len(source.splitlines()) <= MAX_LINES
    if not file.endswith("__init__.py"):
        named = [t.id for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)]
        assert named.count("__all__") == 1


def test_every_file_named_pure_exists() -> None:
    assert sorted(PURE - set(FILES)) == []


@pytest.mark.parametrize(
    ("file", "source", "complaint"),
    [
        ("wire/frames.py", "from zmqagent.transport.base import Frames", "wire imports transport"),
        ("wire/frames.py", "import threading", "a pure file imports threading"),
        ("wire/frames.py", "def f():\n    from time import monotonic", "a pure file imports time.monotonic"),
        ("transport/zmq.py", "from torch.autograd import Function", "transport imports torch.autograd.Function"),
        ("transport/zmq.py", "import torch.distributed.rpc as rpc", "transport imports torch.distributed.rpc"),
        ("transport/zmq.py", "from torch.distributed import rpc", "transport imports torch.distributed.rpc"),
        ("agent/agent.py", "from zmqagent.rref.rref import UserRRef", "agent imports rref"),
        ("agent/agent.py", "from zmqagent import rpc", "agent imports rpc"),
        ("agent/agent.py", "import zmqagent", "agent imports __init__"),
        ("agent/agent.py", "from . import calls", "imports ..calls relatively"),
        ("agent/agent.py", "import importlib\nimportlib.import_module('zmqagent.rpc.invoke')", "agent imports rpc"),
        (
            "rref/rref.py",
            "if TYPE_CHECKING:\n    from zmqagent.autograd.context import DistAutogradContext",
            "rref imports autograd",
        ),
        ("autograd/engine.py", "from zmqagent.rref.rref import OwnerRRef", "autograd imports rref"),
        ("rpc/invoke.py", "from zmqagent.rref import rref\nfrom zmqagent.autograd import engine", "rref and autograd meet here"),
        ("rpc/invoke.py", "from zmqagent.backend import start", "rpc imports backend"),
        ("rpc/invoke.py", "from zmqagent.cli.main import main", "rpc imports cli"),
        ("torch_bindings.py", "from zmqagent.rpc import invoke", "torch_bindings imports rpc"),
        ("exceptions.py", "from zmqagent.options import ZmqRpcBackendOptions", None),
        (
            "backend.py",
            "import torch\ntorch.distributed.rpc.rpc_sync = None",
            "changes an attribute of torch's torch.distributed.rpc",
        ),
        ("backend.py", "from torch.distributed import rpc as r\nsetattr(r.api, 'a', 1)", "changes an attribute of torch's r.api"),
        ("backend.py", "from torch.distributed.rpc import RRef\ndel RRef.__new__", "changes an attribute of torch's RRef"),
    ],
)
def test_a_file_out_of_place_is_found(file: str, source: str, complaint: str | None) -> None:
    found = violations(file, source)
    if complaint is None:
        assert found == []
    else:
        assert [text.split(": ", 1)[1] for text in found] == [complaint]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("backend.py", "from zmqagent.rpc import invoke\nfrom zmqagent.rref import rref\nfrom zmqagent.autograd import engine"),
        ("rpc/request_callback.py", "from zmqagent.rref import rref\nfrom zmqagent.autograd import engine"),
        ("transport/zmq.py", "import threading, zmq, time\nfrom zmqagent.wire.types import Message"),
        ("wire/frames.py", "from zmqagent.exceptions import ProtocolError\nimport msgpack"),
        ("torch_bindings.py", "import torch\ntorch.distributed.rpc.rpc_sync = None"),
        ("agent/agent.py", "import torch\nself.torch = torch\nx.rpc.y = 1"),
        ("cli/main.py", "import zmqagent\nfrom zmqagent.backend import start"),
    ],
)
def test_a_file_in_its_place_is_left_alone(file: str, source: str) -> None:
    assert violations(file, source) == []
