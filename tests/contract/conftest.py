from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest

from tests.contract.harness import KINDS, Worker, start


@pytest.fixture(params=sorted(KINDS))
def kind(request: pytest.FixtureRequest) -> str:
    """One run for each kind of transport."""
    return str(request.param)


@pytest.fixture
def worker(kind: str) -> Iterator[Callable[[int], Worker]]:
    """Starts workers that are closed after the test."""
    with ExitStack() as stack:

        def make(worker_id: int) -> Worker:
            made = start(kind, worker_id)
            stack.callback(made.transport.close, linger=0)
            return made

        yield make
