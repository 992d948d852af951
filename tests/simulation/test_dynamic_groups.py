"""Dynamic groups under thousands of interleavings of joins, departures, failed joins and deaths: nobody is missed, nobody waits.

A failure names its seed: ``play(seed)``.
"""

from __future__ import annotations

import random

from tests.simulation.group_world import Phase, World

SEEDS = 3000
STARTS = 9


def play(seed: int) -> World:
    """One random history, from the first start until nothing is under way."""
    chance = random.Random(seed ^ 0xD1CE)
    world = World(seed)
    leaving, dying = chance.choice([0.0, 0.02, 0.05]), chance.choice([0.0, 0.01, 0.04])
    starts = 0
    while starts < STARTS:
        draw = chance.random()
        if draw < 0.1:
            world.start()
            starts += 1
        elif draw < 0.1 + leaving:
            world.leave()
        elif draw < 0.1 + leaving + dying:
            world.kill()
        else:
            world.act()
        world.check()
    while world.act():
        world.check()
    world.give_up_leaving()
    world.check_at_rest()
    return world


def test_members_know_each_other_and_every_join_ends() -> None:
    reached: dict[Phase, int] = {}
    for seed in range(SEEDS):
        try:
            world = play(seed)
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        for life in world.lives.values():
            reached[life.phase] = reached.get(life.phase, 0) + 1
    # The histories are worth something: all ends occur, and often.
    assert min(reached[phase] for phase in (Phase.MEMBER, Phase.OVER, Phase.DEAD, Phase.REFUSED)) > SEEDS / 4
