"""Which suites torch has, which tests they hold, and the classes that torch's generator makes of them for a backend.

The classes end up as globals of this module, since torch's tests pickle functions and methods by the name of their class.
"""

from __future__ import annotations

import unittest
from collections.abc import Callable
from typing import Any

import torch.testing._internal.distributed.rpc_utils as rpc_utils

from tests.conformance.fixtures import fixture_for

__all__ = ["CUDA_SUITES", "FAULTY_SUITES", "SUITES", "build", "starts_agents_everywhere", "test_names"]

FAULTY_SUITES: dict[str, type] = {suite.__name__: suite for suite in rpc_utils.FAULTY_AGENT_TESTS}
"""Suites for an agent that fails or delays messages on demand."""

SUITES: dict[str, type] = {
    suite.__name__: suite for suite in (*rpc_utils.GENERIC_TESTS, *rpc_utils.TENSORPIPE_TESTS, *rpc_utils.FAULTY_AGENT_TESTS)
}
"""All suites that need no accelerator, in torch's order."""

CUDA_SUITES: dict[str, type] = {
    suite.__name__: suite for suite in (*rpc_utils.GENERIC_CUDA_TESTS, *rpc_utils.TENSORPIPE_CUDA_TESTS)
}
"""The suites that need CUDA devices. A test that needs more of them than there are is skipped."""


def test_names(suite: str) -> list[str]:
    """The names of the suite's tests."""
    return list(unittest.TestLoader().getTestCaseNames(_suite(suite)))


def _suite(name: str) -> type:
    return SUITES.get(name) or CUDA_SUITES[name]


def build(backend: str, suite: str) -> type[unittest.TestCase]:
    """The suite mixed with the fixture of the backend.

    For a suite in `FAULTY_SUITES` this registers torch's faulty backend, which invalidates every `BackendType` taken
    earlier: call it in a process that runs nothing else.
    """
    prefix = "".join(word.capitalize() for word in backend.split("_"))
    fixture = fixture_for(backend, faulty=suite in FAULTY_SUITES)
    made: dict[str, Any] = rpc_utils.generate_tests(prefix, fixture, [_suite(suite)], __name__)
    globals().update(made)
    (case,) = made.values()
    return case


def starts_agents_everywhere(suite: str, test: str) -> bool:
    """Whether torch's `dist_init` decorator starts an agent on each rank of the test (the others start their own, or none)."""
    function: Callable[..., Any] | None = getattr(_suite(suite), test)
    while function is not None:
        code, closure = function.__code__, function.__closure__ or ()
        if "setup_rpc" in code.co_freevars:
            return bool(closure[code.co_freevars.index("setup_rpc")].cell_contents)
        function = getattr(function, "__wrapped__", None)
    return False
