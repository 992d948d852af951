"""The RRef protocol on a network that loses, delays, copies and reorders: G1, G2, and every count drains.

A failure names its seed. To replay one with every event printed: ``RREF_SIMULATION_SEED=<seed> pytest -s <this file>``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterable
from typing import Any

import pytest

from tests.simulation.rref_world import World
from zmqagent.rref import events as ev
from zmqagent.rref.owners import OwnerLedger, Tombstones
from zmqagent.rref.protocol import RRefProtocol
from zmqagent.rref.users import UserLedger, UserState
from zmqagent.transport.inproc import Faults

REPLAY = os.environ.get("RREF_SIMULATION_SEED")
SEEDS = 2500
DEATH_SEEDS = 600
ACTS = 30
MOST_STEPS = 20_000


def run(seed: int, *, deaths: bool = False, trace: bool = False) -> None:
    """One random program on one random network, from the first RRef to the last count of zero."""
    chance = random.Random(seed ^ 0x5EED)
    faults = Faults(
        drop=chance.choice([0.0, 0.1, 0.3]),
        duplicate=chance.choice([0.0, 0.2, 0.5]),
        reorder=chance.choice([0.0, 0.3, 1.0]),
        min_delay=0.001,
        max_delay=chance.choice([0.01, 0.1, 0.5]),
    )
    world = World(seed, chance.randint(3, 5), faults, trace)
    acts, steps = 0, 0
    victim = chance.choice(list(world.workers)) if deaths else None
    while acts < ACTS:
        if chance.random() < 0.25:
            world.act()
            acts += 1
            if victim is not None and acts == ACTS // 2:
                world.kill(victim)
        else:
            world.step()
        world.drain()
        world.check()
    if chance.random() < 0.3:
        world.shut_down()
    world.wind_down()
    while world.step():
        world.wind_down()
        world.check()
        steps += 1
        assert steps < MOST_STEPS, f"not at rest after {steps} steps: {world.under_way()}"
    world.check_drained()


def explore(seeds: Iterable[int], *, deaths: bool = False, trace: bool = False) -> None:
    for seed in seeds:
        try:
            run(seed, deaths=deaths, trace=trace)
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}") from error


def explore_or_replay(count: int, *, deaths: bool = False) -> None:
    explore([int(REPLAY)] if REPLAY else range(count), deaths=deaths, trace=bool(REPLAY))


def test_values_live_while_users_do_and_every_count_drains() -> None:
    explore_or_replay(SEEDS)


def test_the_survivors_of_a_death_drain_too() -> None:
    explore_or_replay(DEATH_SEEDS, deaths=True)


def _without_waiting_for_children(monkeypatch: pytest.MonkeyPatch) -> None:
    delete_if_due: Callable[..., Any] = UserLedger._delete_if_due

    def hasty(self: UserLedger, user: Any) -> Any:
        for child in user.children if user.dropped else ():
            self._children.pop(child)
        if user.dropped:
            user.children.clear()
        return delete_if_due(self, user)

    monkeypatch.setattr(UserLedger, "_delete_if_due", hasty)


def _without_waiting_for_confirmation(monkeypatch: pytest.MonkeyPatch) -> None:
    delete_if_due: Callable[..., Any] = UserLedger._delete_if_due

    def hasty(self: UserLedger, user: Any) -> Any:
        if user.dropped and user.state is UserState.PENDING:
            user.state = UserState.CONFIRMED
        return delete_if_due(self, user)

    monkeypatch.setattr(UserLedger, "_delete_if_due", hasty)


def _without_memory_of_deleted_forks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Tombstones, "__contains__", lambda self, key: False)


def _without_resending(monkeypatch: pytest.MonkeyPatch) -> None:
    answered: Callable[..., Any] = RRefProtocol._answered

    def resigned(self: RRefProtocol, event: ev.Answered, now: float) -> Any:
        if event.outcome is ev.Outcome.TIMED_OUT:
            self._unanswered -= 1
            return []
        return answered(self, event, now)

    monkeypatch.setattr(RRefProtocol, "_answered", resigned)


def _without_phantoms(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: Callable[..., Any] = UserLedger.sent

    def forgetful(self: UserLedger, fork: ev.MintedFork, to: Any) -> Any:
        child = self._children.get(fork.fork_id)
        if child is not None and self._users[child.parent].owner == to:
            return self.accepted(fork.fork_id)
        return accepted(self, fork, to)

    monkeypatch.setattr(UserLedger, "sent", forgetful)


def _without_early_registration(monkeypatch: pytest.MonkeyPatch) -> None:
    forked: Callable[..., Any] = OwnerLedger.forked

    def lazy(self: OwnerLedger, event: ev.OwnerForked, now: float) -> Any:
        instructions = forked(self, event, now)
        if tuple(event.fork_id) != tuple(event.rref_id):
            instructions += self.deleted(ev.UserDeleted(event.rref_id, event.fork_id), now)
        return instructions

    monkeypatch.setattr(OwnerLedger, "forked", lazy)


def _functions_start_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UserLedger, "awaited", lambda self, event: [ev.Resume(event.token, None)])


@pytest.mark.parametrize(
    ("break_protocol", "complaint"),
    [
        (_without_waiting_for_children, "G2"),
        (_without_waiting_for_confirmation, "before its confirmation"),
        (_without_memory_of_deleted_forks, "is left with"),
        (_without_resending, "is left with"),
        (_without_phantoms, "G2|dropped"),
        (_without_early_registration, "the owner dropped"),
        (_functions_start_at_once, "starts before"),
    ],
)
def test_a_broken_protocol_is_found(
    monkeypatch: pytest.MonkeyPatch, break_protocol: Callable[[pytest.MonkeyPatch], None], complaint: str
) -> None:
    break_protocol(monkeypatch)
    with pytest.raises(AssertionError, match=complaint):
        explore(range(SEEDS))
