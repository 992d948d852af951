"""`zmqagent.agent.news`: everything is told, once and in order, though many threads tell."""

from __future__ import annotations

from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from zmqagent.agent.executor import Task
from zmqagent.agent.news import News


def test_news_are_told_in_order_whatever_thread_tells_them() -> None:
    told: list[int] = []
    with ThreadPoolExecutor(8) as threads:

        def submit(tasks: Iterable[Task]) -> None:
            for task in tasks:
                threads.submit(task)

        news = News(submit)
        for number in range(500):
            news.tell(partial(told.append, number))
    assert told == list(range(500))


def test_one_piece_of_news_that_fails_does_not_hold_up_the_next() -> None:
    told: list[str] = []
    with ThreadPoolExecutor(1) as threads:
        news = News(lambda tasks: [threads.submit(task) for task in tasks] and None)
        news.tell(lambda: told[0].upper() and None)  # raises IndexError
        news.tell(partial(told.append, "next"))
    assert told == ["next"]
