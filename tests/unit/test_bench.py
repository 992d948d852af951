"""The parts of the benchmark that need no processes: statistics, targets, results and how they are shown."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch.distributed.rpc import TensorPipeRpcBackendOptions

from zmqagent import ZmqRpcBackendOptions
from zmqagent.cli.bench import observed
from zmqagent.cli.bench.conditions import Conditions
from zmqagent.cli.bench.contenders import REFERENCES, VARIANTS, Contender
from zmqagent.cli.bench.measure import Measured, Plan
from zmqagent.cli.bench.plot import plot
from zmqagent.cli.bench.report import figure, report
from zmqagent.cli.bench.results import Line, document, floor_lines, lines
from zmqagent.cli.bench.rows import AT_THE_END, FLOORS, ROWS, SECTIONS
from zmqagent.cli.bench.statistics import Summary, percentile, ratios, summarise
from zmqagent.cli.bench.targets import Target, target

TENSORPIPE, AUTO = REFERENCES["TENSORPIPE"], VARIANTS["auto"]
METRICS = [*(metric for row in ROWS for metric in row.metrics), *AT_THE_END]
NUMBERS = st.lists(st.floats(-1e6, 1e6), min_size=1)


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([7.0], 0.99, 7.0),
        ([3.0, 1.0, 2.0], 0.5, 2.0),
        ([4.0, 1.0, 3.0, 2.0], 0.5, 2.5),
        ([1.0, 2.0, 3.0, 4.0, 5.0], 0.25, 2.0),
        ([float(number) for number in range(101)], 0.99, 99.0),
        ([1.0, 2.0], 0.0, 1.0),
        ([1.0, 2.0], 1.0, 2.0),
    ],
)
def test_percentiles_are_those_of_small_samples(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == expected


@given(NUMBERS)
def test_percentiles_grow_with_their_share_and_stay_within_the_values(values: list[float]) -> None:
    found = [percentile(values, share / 8) for share in range(9)]
    assert (found[0], found[-1]) == (min(values), max(values))
    assert all(low <= high or math.isclose(low, high) for low, high in pairwise(found))


@pytest.mark.parametrize(("values", "share"), [([], 0.5), ([1.0], -0.1), ([1.0], 1.1)])
def test_no_percentile_is_made_up(values: list[float], share: float) -> None:
    with pytest.raises(ValueError, match="no percentile"):
        percentile(values, share)


def test_a_summary_has_the_median_and_the_quartiles() -> None:
    assert summarise([5.0, 1.0, 2.0, 4.0, 3.0]) == Summary(median=3.0, low=2.0, high=4.0)


def test_ratios_are_taken_round_by_round_so_that_a_slow_round_cancels_out() -> None:
    assert ratios([1.0, 10.0, 2.0], [2.0, 20.0, 4.0]) == [0.5, 0.5, 0.5]


def test_a_ratio_to_nothing_is_infinite_and_rounds_must_match() -> None:
    assert ratios([1.0], [0.0]) == [math.inf]
    with pytest.raises(ValueError, match="shorter"):
        ratios([1.0, 2.0], [1.0])


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0.00"), (8.314, "8.31"), (83.14, "83.1"), (831.4, "831"), (8314.0, "8,314"), (99.99, "100.0")]
)
def test_figures_have_about_three_digits(value: float, text: str) -> None:
    assert figure(value) == text


def test_options_of_all_contenders_exist() -> None:
    for contender in (*VARIANTS.values(), *REFERENCES.values()):
        if contender.backend == "ZMQ":
            ZmqRpcBackendOptions(**contender.options)
        else:
            TensorPipeRpcBackendOptions(**contender.options)


def test_keys_are_unique_and_every_metric_has_a_section() -> None:
    keys = [metric.key for metric in (*METRICS, *FLOORS)]
    assert len(set(keys)) == len(keys)
    assert {metric.section for metric in METRICS} == set(SECTIONS)


def test_targets_are_upper_bounds_on_times_and_lower_bounds_on_rates() -> None:
    found = {metric.key: target("auto", "TENSORPIPE", metric) for metric in METRICS}
    assert found["noop.p50"] == Target(0.6, at_least=False)
    assert found["push-64.bandwidth"] == Target(4.0, at_least=True)
    assert found["idle.cpu"] == Target(1.0, at_least=False, of_ratio=False)
    assert found["push-256.bandwidth"] is None
    for key in ("noop.p50", "noop.p99", "async.rate", "echo-64.bandwidth", "train.step"):
        metric = next(metric for metric in METRICS if metric.key == key)
        assert target("ipc", "TENSORPIPE:uv", metric) is None
        assert target("tcp", "TENSORPIPE:uv", metric) == Target(1.0, at_least=metric.more_is_better)


def test_a_target_is_met_up_to_its_bound() -> None:
    assert [Target(0.6, at_least=False).met(ratio) for ratio in (0.5, 0.6, 0.7)] == [True, True, False]
    assert [Target(2.5, at_least=True).met(ratio) for ratio in (2.4, 2.5, 2.6)] == [False, True, True]


def results(reference: Contender | None, zmq: float, contenders: tuple[Contender, ...] = (TENSORPIPE, AUTO)) -> list[Line]:
    """Lines of two rounds in which TENSORPIPE always had 100, then 200, and ZMQ ``zmq`` times that."""
    factors = {contender.name: zmq if contender.backend == "ZMQ" else 1.0 for contender in contenders}
    figures = {name: {metric.key: [100 * factor, 200 * factor] for metric in METRICS} for name, factor in factors.items()}
    return lines(plan(contenders), reference, Measured(figures, floors={}))


def plan(contenders: tuple[Contender, ...]) -> Plan:
    return Plan(contenders, ROWS, rounds=2, threads=1, quick=False, idle_seconds=1)


def floors() -> list[Line]:
    return floor_lines(Measured({}, {metric.key: [12.0, 14.0] for metric in FLOORS}))


def printed(contenders: tuple[Contender, ...], reference: Contender | None, rows: list[Line]) -> str:
    output = io.StringIO()
    Console(file=output, width=200).print(report(["Under a full moon."], contenders, reference, rows, floors()))
    return output.getvalue()


def test_results_compare_with_the_reference_and_with_the_targets() -> None:
    by_key = {line.metric.key: line for line in results(TENSORPIPE, zmq=0.5)}
    noop = by_key["noop.p50"].results
    assert noop["TENSORPIPE"].ratio is None
    assert noop["TENSORPIPE"].met is None
    assert noop["auto"].summary.median == 75
    assert noop["auto"].ratio == Summary(0.5, 0.5, 0.5)
    assert noop["auto"].met is True
    assert by_key["async.rate"].results["auto"].met is False
    # 75 % of a core, whatever the reference takes.
    assert by_key["idle.cpu"].results["auto"].ratio is None
    assert by_key["idle.cpu"].results["auto"].met is False


def cells(text: str, title: str) -> list[str]:
    """What the table says behind a title."""
    (line,) = (line for line in text.splitlines() if line.strip().startswith(f"{title} "))
    return line.strip().removeprefix(title).split()


def test_the_table_shows_figures_ratios_and_targets() -> None:
    text = printed((TENSORPIPE, AUTO), TENSORPIPE, results(TENSORPIPE, zmq=0.5))
    assert cells(text, "no-op call, p50") == ["µs", "150", "75.0", "0.50", "(0.50-0.50)", "≤", "0.6", "x", "met"]
    assert cells(text, "asynchronous calls") == ["1/s", "150", "75.0", "0.50", "(0.50-0.50)", "≥", "2.5", "x", "not", "met"]
    assert cells(text, "CPU of a worker that waits") == ["%", "150", "75.0", "≤", "1", "not", "met"]
    assert cells(text, "Unix socket, there and back") == ["µs", "13.0"]
    assert "Under a full moon." in text
    assert "Ratios are taken in each round" in text
    assert "10 of 19 targets are met." in text


def test_without_a_reference_there_are_only_figures() -> None:
    text = printed((AUTO,), None, results(None, zmq=0.5, contenders=(AUTO,)))
    assert cells(text, "no-op call, p50") == ["µs", "75.0"]
    assert cells(text, "CPU of a worker that waits") == ["%", "75.0"]
    assert "target" not in text
    assert "Ratios" not in text
    assert "TENSORPIPE" not in text


@pytest.mark.parametrize("reference", [TENSORPIPE, None])
def test_the_picture_has_a_panel_for_each_kind_of_figure(reference: Contender | None, tmp_path: Path) -> None:
    path = tmp_path / "bench.svg"
    plot(results(reference, zmq=0.5), floors(), (TENSORPIPE, AUTO), reference, path)
    drawn = path.read_text()
    for words in (
        "time of a call, p99",
        "calls a second",
        "push, GB/s",
        "64 MB",
        "bare ZeroMQ",
        "into shared memory",
        "TENSORPIPE",
    ):
        assert words in drawn


def test_what_was_not_measured_is_not_drawn(tmp_path: Path) -> None:
    path = tmp_path / "bench.svg"
    rows = [line for line in results(TENSORPIPE, zmq=0.5) if line.metric.key.startswith("noop.")]
    plot(rows, floors(), (TENSORPIPE, AUTO), TENSORPIPE, path)
    drawn = path.read_text()
    assert "no-op" in drawn
    assert "remote" not in drawn
    assert "push" not in drawn


def test_the_document_is_json_and_has_every_round() -> None:
    conditions = asdict(Conditions.here(rounds=2, warm_up="a dance", torch_threads=1, stopped=["TENSORPIPE"], quick=False))
    made = document(conditions, (TENSORPIPE, AUTO), TENSORPIPE, results(TENSORPIPE, zmq=0.5), floors())
    read = json.loads(json.dumps(made, allow_nan=False))
    assert read == made
    row = next(row for row in read["rows"] if row["key"] == "noop.p50")
    assert row["results"]["auto"]["rounds"] == [50, 100]
    assert row["results"]["auto"]["ratio"] == {"median": 0.5, "low": 0.5, "high": 0.5}
    assert row["results"]["auto"]["target"] == {"bound": 0.6, "at_least": False, "of_ratio": True, "met": True}
    assert read["floors"][0]["rounds"] == [12, 14]


def test_conditions_say_what_was_pinned_and_stopped() -> None:
    here = Conditions.here(rounds=1, warm_up="a dance", torch_threads=2, stopped=["TENSORPIPE"], quick=True)
    told = " ".join(Conditions(**{**asdict(here), "cpus": 4, "may_run_on": [1, 3]}).sentences())
    assert "4 CPUs, pinned to 1, 3." in told
    assert "Medians of 1 round; warm-up: a dance." in told
    assert "torch computes with 2 threads" in told
    assert "the workers of TENSORPIPE, which would spin, were stopped" in told
    assert "A quick run" in told
    unpinned = " ".join(
        Conditions(**{**asdict(here), "cpus": 2, "may_run_on": [0, 1], "stopped": [], "quick": False}).sentences()
    )
    assert "2 CPUs, no process pinned." in unpinned
    assert "stopped" not in unpinned
    assert "quick" not in unpinned


def test_processes_are_seen_from_outside() -> None:
    spent = "import threading, sys; m = bytearray(64 * 2**20); del m; print(flush=True); sys.stdin.read()"
    with subprocess.Popen([sys.executable, "-c", spent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        assert 0 < observed.cpu_seconds(process.pid) < 60
        assert observed.peak_memory_mb(process.pid) > observed.memory_mb(process.pid) + 60
        assert observed.threads(process.pid) == 1
        assert observed.open_files(process.pid) == 3
        process.communicate()
