"""`zmqagent.agent.gil`: the mean of what was measured, while it is asked for."""

from __future__ import annotations

import pytest

from zmqagent.agent.gil import GilProfiler


def test_the_mean_wait_is_told_in_microseconds_while_profiling_is_on(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([10.0, 10.001, 20.0, 20.003])
    monkeypatch.setattr("zmqagent.agent.gil.time.perf_counter", lambda: next(clock))
    profiler = GilProfiler()
    profiler.is_enabled = True
    assert profiler.metrics() == {"agent.gil_average_wait_time_us": 0.0}
    profiler.sample()
    profiler.sample()
    assert profiler.metrics() == {"agent.gil_average_wait_time_us": pytest.approx(2000.0)}
    profiler.is_enabled = False
    assert profiler.metrics() == {}
