"""`zmqagent.agent.interrupts`: ^C ends a wait in C++, and a program's own handler is left alone.

What ^C does to a process is seen from outside: each program runs in one of its own, and is sent SIGINT once it waits.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from zmqagent.agent import interrupts
from zmqagent.agent.interrupts import InterruptWatch

DEADLINE_S = 60.0

_PREAMBLE = """
import atexit, os, signal, sys, threading
import torch
from torch.futures import Future
from zmqagent.agent.interrupts import InterruptWatch

future = Future()
busy = threading.Lock()
def fail():
    with busy:
        future.set_exception(RuntimeError("the calls under way have failed"))
# A thread that comes back from C++ while the interpreter ends would abort the process; the agent ends its threads before that.
atexit.register(busy.acquire)

def say(text):
    print(text, flush=True)

# Runs on another thread, which gets the interpreter when the main one lets it go, and that one waits soon after.
def say_when_waiting():
    say("waits")
"""


def interrupted(program: str) -> tuple[int, str]:
    """Runs a program, presses ^C when it says "waits", and returns its exit code and all it wrote."""
    root = str(Path(__file__).parents[2])
    process = subprocess.Popen(
        [sys.executable, "-c", _PREAMBLE + textwrap.dedent(program)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=root,
        # Started by a shell in the background, a process would ignore SIGINT.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        assert process.stdout is not None
        lines: list[str] = []
        for line in process.stdout:
            lines.append(line)
            if line == "waits\n":
                process.send_signal(signal.SIGINT)
        return process.wait(DEADLINE_S), "".join(lines)
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    "wait",
    ["future.wait()", "torch.futures.wait_all([future])", "future.then(lambda f: f.value()).wait()"],
    ids=["wait", "wait_all", "then"],
)
def test_ctrl_c_ends_a_wait_in_cpp(wait: str) -> None:
    code, output = interrupted(f"""
        watch = InterruptWatch(fail)
        try:
            threading.Timer(0.0, say_when_waiting).start()
            {wait}
        finally:
            watch.close()
    """)
    assert "KeyboardInterrupt" in output
    # What Python ends with after a KeyboardInterrupt that nobody caught.
    assert code == -signal.SIGINT


def test_a_wait_in_python_ends_by_itself_and_no_call_fails() -> None:
    code, output = interrupted("""
        watch = InterruptWatch(fail)
        try:
            threading.Timer(0.0, say_when_waiting).start()
            threading.Event().wait()
        except KeyboardInterrupt:
            watch.close()
            say("caught" if not future.done() else "a call has failed")
    """)
    assert (code, output) == (0, "waits\ncaught\n")


def test_a_handler_of_the_program_s_own_is_left_alone() -> None:
    code, output = interrupted("""
        done = threading.Event()
        def own(number, frame):
            say("own handler")
            done.set()
        signal.signal(signal.SIGINT, own)
        watch = InterruptWatch(fail)
        assert signal.getsignal(signal.SIGINT) is own
        assert signal.set_wakeup_fd(-1) == -1
        say("waits")
        done.wait()
        watch.close()
        assert signal.getsignal(signal.SIGINT) is own
        say("failed" if future.done() else "untouched")
    """)
    assert (code, output) == (0, "waits\nown handler\nuntouched\n")


def test_a_forked_child_has_python_s_own_handler_and_its_parent_keeps_the_watch() -> None:
    code, output = interrupted("""
        watch = InterruptWatch(fail)
        child = os.fork()
        if child == 0:
            clean = signal.getsignal(signal.SIGINT) is signal.default_int_handler and signal.set_wakeup_fd(-1) == -1
            watch.close()
            watch.close()
            os._exit(0 if clean else 1)
        assert os.waitpid(child, 0)[1] == 0
        try:
            threading.Timer(0.0, say_when_waiting).start()
            future.wait()
        finally:
            watch.close()
    """)
    assert code == -signal.SIGINT, output


@pytest.fixture
def default_handler() -> Iterator[None]:
    """Python's own handler and no descriptor, before and after."""
    former = signal.signal(signal.SIGINT, signal.default_int_handler)
    former_fd = signal.set_wakeup_fd(-1)
    open_before = set(os.listdir("/proc/self/fd"))
    threads_before = set(threading.enumerate())
    try:
        yield
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
        assert signal.set_wakeup_fd(-1) == -1
        assert set(os.listdir("/proc/self/fd")) == open_before
        assert set(threading.enumerate()) == threads_before
        assert interrupts._active is None
    finally:
        signal.signal(signal.SIGINT, former)
        signal.set_wakeup_fd(former_fd)


def never() -> None:
    raise AssertionError("nobody pressed ^C")


@pytest.mark.usefixtures("default_handler")
def test_closing_gives_everything_back_and_may_be_repeated() -> None:
    watch = InterruptWatch(never)
    assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    watch.close()
    watch.close()


@pytest.mark.usefixtures("default_handler")
def test_closing_twice_leaves_the_watch_alone_that_was_made_meanwhile() -> None:
    first = InterruptWatch(never)
    first.close()
    second = InterruptWatch(never)
    handler = signal.getsignal(signal.SIGINT)
    first.close()
    assert signal.getsignal(signal.SIGINT) == handler
    second.close()


@pytest.mark.usefixtures("default_handler")
def test_a_second_watch_at_the_same_time_changes_nothing() -> None:
    first = InterruptWatch(never)
    handler = signal.getsignal(signal.SIGINT)
    InterruptWatch(never).close()
    assert signal.getsignal(signal.SIGINT) == handler
    first.close()


def on_another_thread(function: object) -> None:
    assert callable(function)
    thread = threading.Thread(target=function)
    thread.start()
    thread.join()


@pytest.mark.usefixtures("default_handler")
def test_one_made_on_another_thread_does_nothing() -> None:
    made: list[InterruptWatch] = []
    on_another_thread(lambda: made.append(InterruptWatch(never)))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    made[0].close()


@pytest.mark.usefixtures("default_handler")
def test_one_closed_on_another_thread_makes_room_for_the_next() -> None:
    first = InterruptWatch(never)
    on_another_thread(first.close)
    second = InterruptWatch(never)
    assert interrupts._active is second
    second.close()


@pytest.mark.usefixtures("default_handler")
def test_one_closed_on_another_thread_may_be_closed_again_on_the_main_one() -> None:
    watch = InterruptWatch(never)
    on_another_thread(watch.close)
    watch.close()


@pytest.mark.usefixtures("default_handler")
def test_a_handler_set_later_stays_when_the_watch_is_closed() -> None:
    watch = InterruptWatch(never)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    watch.close()
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.mark.usefixtures("default_handler")
def test_whoever_had_the_wakeup_descriptor_gets_the_signals_and_the_descriptor_back() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    watch = InterruptWatch(never)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    assert os.read(read_end, 16) == bytes([signal.SIGINT])
    watch.close()
    assert signal.set_wakeup_fd(-1) == write_end
    os.close(read_end)
    os.close(write_end)


@pytest.mark.usefixtures("default_handler")
def test_a_wakeup_descriptor_that_was_closed_meanwhile_is_not_put_back() -> None:
    read_end, write_end = os.pipe()
    os.set_blocking(write_end, False)
    signal.set_wakeup_fd(write_end)
    watch = InterruptWatch(never)
    os.close(read_end)
    os.close(write_end)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    watch.close()
