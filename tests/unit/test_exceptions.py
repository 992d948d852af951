"""`zmqagent.exceptions`: the tree in the docstring is the tree of the classes, and codes find their class."""

from __future__ import annotations

import inspect
import pickle
import re

import pytest

from zmqagent import exceptions
from zmqagent.exceptions import InvalidOptionError, ProtocolError, RpcError, RpcTimeoutError, error_class

CLASSES = [cls for _, cls in inspect.getmembers(exceptions, inspect.isclass) if issubclass(cls, RpcError)]


def test_every_class_is_public() -> None:
    assert {cls.__name__ for cls in CLASSES} == set(exceptions.__all__) - {"error_class"}


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_is_what_torch_raises(cls: type[RpcError]) -> None:
    assert issubclass(cls, RuntimeError)
    assert cls.__doc__


def test_the_docstring_shows_the_tree_as_it_is() -> None:
    # A name, the builtins it also is, and its code, which may have moved to the next line.
    entries = re.findall(r"── (\w+)(?: \(([\w, ]+)\))?[\s│]+(\d+) ", exceptions.__doc__ or "")
    shown = {name: (builtins, int(code)) for name, builtins, code in entries}
    leaves = {cls.__name__: cls for cls in CLASSES if cls.code}
    assert set(shown) == set(leaves)
    for name, (builtins, code) in shown.items():
        assert leaves[name].code == code
        others = [base.__name__ for base in leaves[name].__bases__ if not issubclass(base, RpcError)]
        assert others == (builtins.split(", ") if builtins else [])


def test_codes_are_given_once() -> None:
    codes = [cls.code for cls in CLASSES if cls.code]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize("cls", [cls for cls in CLASSES if cls.code])
def test_a_code_finds_its_class(cls: type[RpcError]) -> None:
    assert error_class(cls.code) is cls


@pytest.mark.parametrize("code", [0, -1, 9999])
def test_a_code_of_a_later_release_is_still_an_error(code: int) -> None:
    assert issubclass(error_class(code), RpcError)


@pytest.mark.parametrize("cls", CLASSES)
def test_errors_can_be_pickled(cls: type[RpcError]) -> None:
    got = pickle.loads(pickle.dumps(cls("what happened")))
    assert type(got) is cls
    assert str(got) == "what happened"


def test_errors_are_caught_as_the_builtin_that_torch_raises() -> None:
    for cls, builtin in [(InvalidOptionError, ValueError), (RpcTimeoutError, TimeoutError), (ProtocolError, RuntimeError)]:
        with pytest.raises(builtin):
            raise cls("x")
