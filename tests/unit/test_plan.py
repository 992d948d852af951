"""The plan against brute force on random graphs of bare nodes."""

from __future__ import annotations

import random
from collections.abc import Iterable

from zmqagent.autograd.plan import Edge, Plan

GRAPHS = 3000
"""How many random graphs are planned; about 0.1 ms each."""


class Inner:
    """A node that only has a shape."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.next_functions: tuple[tuple[Inner | None, int], ...] = ()

    def __repr__(self) -> str:
        return self.name


class Leaf(Inner):
    pass


class Recv(Inner):
    """As the real one, it has something behind it that is none of the plan's business."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.next_functions = ((Leaf(f"anchor of {name}"), 0),)


def make_plan(*roots: Iterable[Inner]) -> Plan:
    return Plan([[(node, 0) for node in root] for root in roots], Leaf, Recv)


def joined(name: str, *targets: Inner | None) -> Inner:
    node = Inner(name)
    node.next_functions = tuple((target, number) for number, target in enumerate(targets))
    return node


def test_a_single_root_gives_one_stage_that_is_the_last() -> None:
    leaf, recv = Leaf("leaf"), Recv("recv")
    plan = make_plan([joined("a", leaf, None, recv)])
    assert plan.next_stage() is None
    plan.arrive(0)
    stage = plan.next_stage()
    assert stage is not None
    assert stage.is_last
    assert plan.is_finished
    assert plan.next_stage() is None
    assert (plan.leaves, plan.recvs, len(plan)) == ([leaf], [recv], 3)


def test_a_recv_runs_when_its_own_roots_are_there() -> None:
    recv, leaf = Recv("recv"), Leaf("leaf")
    behind = joined("behind", leaf)
    above = joined("above", recv, behind, leaf)
    other = joined("other", behind)
    plan = make_plan([above], [other])
    plan.arrive(0)
    stage = plan.next_stage()
    assert stage is not None
    assert (stage.is_last, list(stage.nodes), list(stage.recvs)) == (False, [above, recv], [recv])
    assert list(stage.leaving) == [(behind, 1), (leaf, 2)]
    assert plan.next_stage() is None
    assert set(plan.rest()) == {other, behind, leaf}


def test_a_recv_that_a_missing_root_reaches_waits() -> None:
    recv = Recv("recv")
    shared = joined("shared", recv)
    plan = make_plan([joined("a", shared)], [joined("b", shared)])
    plan.arrive(0)
    assert plan.next_stage() is None
    plan.arrive(1)
    stage = plan.next_stage()
    assert stage is not None
    assert stage.is_last


def test_a_root_may_enter_at_a_leaf_or_a_recv_and_at_one_node_twice() -> None:
    leaf, recv = Leaf("leaf"), Recv("recv")
    plan = Plan([[(recv, 0), (recv, 1), (leaf, 0)], [(leaf, 0)]], Leaf, Recv)
    plan.arrive(0)
    stage = plan.next_stage()
    assert stage is not None
    assert (list(stage.nodes), list(stage.leaving)) == ([recv], [])
    plan.arrive(1)
    assert plan.next_stage() is not None
    assert plan.rest() == [leaf]


def test_an_empty_graph_has_a_last_stage_too() -> None:
    plan = make_plan([], [])
    plan.arrive(0)
    assert plan.next_stage() is None
    plan.arrive(1)
    assert plan.next_stage() is not None
    assert plan.rest() == []


def test_a_deep_graph_needs_no_deep_stack() -> None:
    node: Inner = Recv("recv")
    for number in range(20_000):
        node = joined(str(number), node)
    plan = make_plan([node], [Leaf("missing")])
    plan.arrive(0)
    stage = plan.next_stage()
    assert stage is not None
    assert len(stage.nodes) == 20_001


def random_roots(rng: random.Random) -> list[list[Edge]]:
    """Roots that enter a random graph at random nodes."""
    nodes: list[Inner] = []
    for number in range(rng.randint(2, 25)):
        kind = rng.random()
        if number == 0 or kind < 0.15:
            nodes.append(Leaf(f"leaf{number}"))
        elif kind < 0.4:
            nodes.append(Recv(f"recv{number}"))
        else:
            targets = [rng.choice([*nodes, None]) for _ in range(rng.randint(1, 3))]
            nodes.append(joined(f"node{number}", *targets))
    return [[(rng.choice(nodes), 0) for _ in range(rng.randint(1, 2))] for _ in range(rng.randint(1, 5))]


def below(starts: Iterable[Inner]) -> set[Inner]:
    """The nodes that ``starts`` reach, themselves included; by definition, not by speed."""
    found: set[Inner] = set()
    for node in starts:
        found.add(node)
        if type(node) is Inner:
            found |= below(target for target, _ in node.next_functions if target is not None)
    return found


def check_random_plan(seed: int) -> None:
    rng = random.Random(seed)
    roots = random_roots(rng)
    reached = [below(node for node, _ in root) for root in roots]
    everything = set().union(*reached)
    plan = Plan(roots, Leaf, Recv)
    assert set(plan.leaves) == {node for node in everything if type(node) is Leaf}
    assert set(plan.recvs) == {node for node in everything if type(node) is Recv}
    missing = set(range(len(roots)))
    done: list[Inner] = []
    for root in rng.sample(sorted(missing), len(roots)):
        plan.arrive(root)
        missing.discard(root)
        while (stage := plan.next_stage()) is not None and not stage.is_last:
            assert set(stage.recvs) <= set(stage.nodes)
            assert all(below([node]) & set(stage.recvs) for node in stage.nodes), "nothing runs before it must"
            done.extend(stage.nodes)
            border = [e for node in stage.nodes if type(node) is Inner for e in node.next_functions if e[0] not in (None, *done)]
            assert list(stage.leaving) == list(dict.fromkeys(border))
        if missing:
            free = everything - set().union(*(reached[number] for number in missing))
            assert {node for node in free if type(node) is Recv} <= set(done), "every recv runs as soon as it can"
            assert set(done) <= free, "no node runs before all that flows into it is there"
    assert plan.is_finished
    order = [*done, *plan.rest()]
    assert len(order) == len(set(order)), "no node runs twice"
    assert set(order) == everything, "no node is left out"
    position = {node: number for number, node in enumerate(order)}
    for node in order:
        for target, _ in node.next_functions if type(node) is Inner else ():
            assert target is None or position[node] < position[target], "roots first"


def test_random_graphs_run_each_node_once_and_each_recv_at_once() -> None:
    first = random.randrange(1 << 40)
    print(f"seeds from {first}")
    for seed in range(first, first + GRAPHS):
        try:
            check_random_plan(seed)
        except Exception as error:
            raise AssertionError(f"seed {seed}") from error
