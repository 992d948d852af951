"""How cost grows: which points are measured, in which order, and how what came out is shown; without processes."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import pytest
from rich.console import Console

from zmqagent.cli.bench import growth
from zmqagent.cli.bench.conditions import Conditions
from zmqagent.cli.bench.contenders import REFERENCES, VARIANTS, Contender
from zmqagent.cli.bench.curves import CURVES, Curve
from zmqagent.cli.bench.group import Group
from zmqagent.cli.bench.growth import Grown, GrowthPlan, grow
from zmqagent.cli.bench.growth_plot import plot_growth
from zmqagent.cli.bench.growth_results import growth_document, growth_report
from zmqagent.cli.bench.plot import colours
from zmqagent.cli.bench.rows import Metric

TENSORPIPE, AUTO, TCP = REFERENCES["TENSORPIPE"], VARIANTS["auto"], VARIANTS["tcp"]
PLENTY_MB = 2**20


class FakeGroup(Group):
    """Tells what was asked of it."""

    def __init__(self, contender: Contender, size: int, asked: list[tuple[str, int]]) -> None:
        super().__init__(contender, processes=[], init_seconds=0.0)
        self.size = size
        self.asked = asked


def note(group: Group, point: int) -> dict[str, float]:
    assert isinstance(group, FakeGroup)
    group.asked.append((group.contender.name, point))
    return {"cost": float(point), "size": float(group.size), "unasked": 0.0}


def curve(of_groups: bool = False, repeats: bool = True) -> Curve:
    metrics = (Metric("steps.cost", "cost", "µs", "growth"), Metric("steps.size", "workers", "", "growth"))
    return Curve("steps", "steps", (1, 2, 32), (1,), metrics, note, of_groups, repeats)


def plan(*curves: Curve, contenders: tuple[Contender, ...] = (TENSORPIPE, AUTO), machine_mb: float = PLENTY_MB) -> GrowthPlan:
    return GrowthPlan(contenders, curves, rounds=2, threads=1, quick=False, machine_mb=machine_mb)


Run = Callable[[GrowthPlan], tuple[Grown, list[tuple[str, int]], list[str]]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Run:
    """Runs a plan on groups without processes: what came out, what was asked of whom, and what was announced."""
    asked: list[tuple[str, int]] = []
    announced: list[str] = []

    @contextmanager
    def running_group(contender: Contender, size: int, threads: int, directory: Path) -> Iterator[Group]:
        assert (threads, directory) == (1, tmp_path)
        yield FakeGroup(contender, size, asked)

    monkeypatch.setattr(growth, "running_group", running_group)
    return lambda plan: (grow(plan, tmp_path, announced.append), asked, announced)


def test_contenders_take_turns_at_every_point_after_a_warm_up(run: Run) -> None:
    grown, asked, announced = run(plan(curve()))
    assert asked[:2] == [("TENSORPIPE", 1), ("auto", 1)]
    first, second = asked[2:8], asked[8:]
    assert first == [(name, point) for point in (1, 2, 32) for name in ("TENSORPIPE", "auto")]
    assert second == [(name, point) for point in (1, 2, 32) for name in ("auto", "TENSORPIPE")]
    assert grown == {
        "steps.cost": {name: [[1, 1], [2, 2], [32, 32]] for name in ("TENSORPIPE", "auto")},
        "steps.size": {name: [[2, 2]] * 3 for name in ("TENSORPIPE", "auto")},
    }
    assert announced[4] == "32 steps: TENSORPIPE"


def test_every_size_has_a_group_of_its_own(run: Run) -> None:
    grown, asked, _ = run(plan(curve(of_groups=True)))
    assert len(asked) == 12
    assert grown["steps.size"]["auto"] == [[1, 1], [2, 2], [32, 32]]


def test_what_accumulates_has_one_round(run: Run) -> None:
    grown, _, _ = run(plan(curve(repeats=False)))
    assert grown["steps.cost"]["auto"] == [[1], [2], [32]]


@pytest.mark.parametrize("curves", [(curve(), curve(of_groups=True)), (curve(repeats=False),)])
def test_steps_are_as_many_as_announced(curves: tuple[Curve, ...], run: Run) -> None:
    planned = plan(*curves, machine_mb=16_000)
    _, _, announced = run(planned)
    assert len(announced) == planned.slices()


def test_groups_that_need_more_than_half_of_the_memory_are_left_out(run: Run) -> None:
    planned = plan(curve(of_groups=True), machine_mb=2 * 32 * 31 * 16 - 1)
    grown, _, _ = run(planned)
    assert grown["steps.cost"] == {"TENSORPIPE": [[1, 1], [2, 2], []], "auto": [[1, 1], [2, 2], [32, 32]]}
    text = printed(planned, grown)
    assert "TENSORPIPE was not measured with 32 workers, which would take more than half of this machine's memory." in text
    assert growth_document({}, planned, grown)["curves"][0]["metrics"][0]["results"]["TENSORPIPE"][2] is None


def printed(plan: GrowthPlan, grown: Grown) -> str:
    output = io.StringIO()
    Console(file=output, width=120).print(growth_report(["Under a full moon."], plan, grown))
    return output.getvalue()


def test_the_table_has_a_column_a_point_and_a_row_a_contender(run: Run) -> None:
    planned = plan(curve())
    rows = [line.split() for line in printed(planned, run(planned)[0]).splitlines()]
    for row in (
        ["steps", "1", "2", "32"],
        ["cost,", "µs"],
        ["TENSORPIPE", "1.00", "2.00", "32.0"],
        ["ZMQ", "2.00", "2.00", "2.00"],
    ):
        assert row in rows


def test_the_document_is_json_and_has_every_round(run: Run) -> None:
    planned = plan(curve())
    conditions = asdict(Conditions.here(rounds=2, warm_up="a dance", torch_threads=1, stopped=[], quick=False))
    made = growth_document(conditions, planned, run(planned)[0])
    read = json.loads(json.dumps(made, allow_nan=False))
    assert read == made
    (told,) = read["curves"]
    assert (told["key"], told["points"]) == ("steps", [1, 2, 32])
    assert told["metrics"][0]["results"]["auto"][2] == {"median": 32, "low": 32, "high": 32, "rounds": [32, 32]}


def test_a_picture_is_drawn_also_where_points_are_missing(run: Run, tmp_path: Path) -> None:
    planned = plan(curve(), curve(of_groups=True), contenders=(TENSORPIPE, AUTO, TCP), machine_mb=16_000)
    path = tmp_path / "growth.svg"
    plot_growth(planned, run(planned)[0], TENSORPIPE, path)
    drawn = path.read_text()
    assert all(words in drawn for words in ("cost, µs", "workers", "steps", "TENSORPIPE", "ZMQ tcp"))


def test_colours_tell_contenders_apart_and_the_reference_steps_back() -> None:
    with_reference = colours((TENSORPIPE, AUTO, TCP), TENSORPIPE)
    assert len(set(with_reference.values())) == 3
    assert with_reference["auto"] == colours((AUTO, TCP), None)["auto"]


def test_points_grow_and_keys_are_unique() -> None:
    keys = [metric.key for known in CURVES for metric in known.metrics]
    assert len(set(keys)) == len(keys)
    for known in CURVES:
        assert list(known.points) == sorted(set(known.points))
        assert list(known.quick) == sorted(set(known.quick))
