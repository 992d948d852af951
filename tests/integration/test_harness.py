"""The harness itself: what a rank comes to is told, and nothing stays behind."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest

from tests.integration.harness import RankError, run_ranks


def _number(rank: int, meeting_point: str, factor: int) -> int:
    return rank * factor


def test_each_ranks_value_comes_back() -> None:
    assert run_ranks(_number, 3, 5) == [0, 5, 10]


def _raise_on_one(rank: int, meeting_point: str, directory: str) -> None:
    (Path(directory) / str(rank)).write_text(str(os.getpid()))
    if rank == 1:
        raise ValueError("on rank one")
    threading.Event().wait()


def test_a_rank_that_raises_is_told_and_ends_the_others(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"rank 1 raised\n(?s:.*)ValueError: on rank one"):
        run_ranks(_raise_on_one, 2, str(tmp_path))
    for pid in [int(path.read_text()) for path in tmp_path.iterdir()]:
        assert not Path(f"/proc/{pid}").exists()


def _hang(rank: int, meeting_point: str) -> None:
    threading.Event().wait()


def test_a_rank_that_hangs_leaves_its_stacks() -> None:
    with pytest.raises(RankError, match=r"rank 0 is still running\n(?s:.*)in _hang"):
        run_ranks(_hang, 1, deadline=1.0)


def _die(rank: int, meeting_point: str) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_rank_that_dies_is_told_unless_it_was_to() -> None:
    with pytest.raises(RankError, match="rank 0 died with exit code -9"):
        run_ranks(_die, 1)
    assert run_ranks(_die, 1, dying=(0,)) == [None]
