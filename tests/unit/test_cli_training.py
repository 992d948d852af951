"""The parts of the demo's job, without processes: turns, the server's ends of epochs, the data, what is shown and drawn."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from zmqagent.cli import training
from zmqagent.cli.display import Display
from zmqagent.cli.plot import plot
from zmqagent.cli.training import Digits, EpochDone, Job, ParameterServer, Report, StepDone, Turns

JOB = Job(epochs=2, batch_size=32, learning_rate=0.01, seed=0)


def test_nobody_updates_before_all_are_ready_and_all_go_on_after_the_last() -> None:
    turns = Turns(3)
    for _ in range(2):  # a second round starts afresh
        begun = {trainer: turns.begin(trainer) for trainer in (2, 0)}
        assert not any(future.done() for future in begun.values())
        begun[1] = turns.begin(1)
        ended = []
        for trainer in range(3):
            assert [begun[index].done() for index in range(3)] == [index <= trainer for index in range(3)]
            assert not any(future.done() for future in ended)
            ended.append(turns.end(trainer))
        assert all(future.done() for future in ended)


def test_turns_hold_when_trainers_are_threads() -> None:
    turns, order = Turns(3), []

    def trainer(index: int) -> None:
        for step in range(50):
            turns.begin(index).wait()
            order.append((step, index))
            turns.end(index).wait()

    threads = [threading.Thread(target=trainer, args=(index,)) for index in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert order == [(step, index) for step in range(50) for index in range(3)]


def test_the_server_averages_the_last_layers_and_tests_the_whole_network() -> None:
    reports: list[Report] = []
    _, held_out = training.load_digits(0)
    server = ParameterServer(JOB, held_out, reports.append)
    layers = [training.last_layer() for _ in range(2)]
    # The undecorated method: the decorator is a mark for torch's RPC, which then waits for the future.
    late = server.end_epoch(1, layers[1].state_dict(), [3.0])
    assert not late.done()
    early = server.end_epoch(0, layers[0].state_dict(), [1.0, 2.0])
    mean = (layers[0].weight + layers[1].weight) / 2
    for future in (late, early):
        torch.testing.assert_close(future.value()["weight"], mean.detach())

    layers[0].load_state_dict(early.value())
    right = layers[0](server.forward(held_out.images)).argmax(1) == held_out.labels
    assert reports == [EpochDone(1, [[1.0, 2.0], [3.0]], right.double().mean().item()), StepDone()]
    assert EpochDone(1, [[1.0, 2.0], [3.0]], 0.5).mean_loss == 2.0


def test_the_first_layers_are_those_of_a_dense_network() -> None:
    first = training.FirstLayers()
    images = torch.rand(5, training.PIXELS)
    expected = torch.relu(first.hidden(torch.relu(images @ first.embedding.weight)))
    torch.testing.assert_close(first(images), expected)
    assert isinstance(training.last_layer(), nn.Linear)


def test_the_seed_fixes_which_digits_are_held_out() -> None:
    def same(one: Digits, other: Digits) -> bool:
        return torch.equal(one.images, other.images) and torch.equal(one.labels, other.labels)

    train, held_out = training.load_digits(seed=3)
    again, held_out_again = training.load_digits(seed=3)
    assert same(train, again)
    assert same(held_out, held_out_again)
    assert not same(held_out, training.load_digits(seed=4)[1])
    assert (len(train.labels), len(held_out.labels)) == (1797 - training.HELD_OUT, training.HELD_OUT)
    assert train.images.aminmax() == (0, 1)
    assert sorted(set(held_out.labels.tolist())) == list(range(10))


@pytest.mark.parametrize("batch_size", [1, 7, 32, 718, 5000])
def test_steps_are_counted_as_trainers_make_them(batch_size: int) -> None:
    job = Job(1, batch_size, 0.1, 0)
    assert training.steps_in_epoch(job, 1437) == len(torch.arange(1437 // 2).split(batch_size))


EPOCHS = [EpochDone(1, [[2.0, 1.0], [2.0, 1.5]], 0.5), EpochDone(2, [[0.5, 0.4], [0.6, 0.3]], 0.9731)]


def shown(terminal: bool) -> str:
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=terminal, width=100, highlight=False, color_system=None)
    with Display(console, epochs=2, steps=8) as display:
        for report in (StepDone(), EPOCHS[0], StepDone(), EPOCHS[1]):
            display.show(report)
    return stream.getvalue()


def test_a_log_gets_one_line_an_epoch_and_no_bar() -> None:
    assert shown(terminal=False) == (
        "epoch 1/2   loss 1.6250   held-out accuracy 50.0%\nepoch 2/2   loss 0.4500   held-out accuracy 97.3%\n"
    )


def test_a_terminal_gets_the_lines_and_a_bar() -> None:
    text = shown(terminal=True)
    assert "epoch 2/2   loss 0.4500   held-out accuracy 97.3%" in text
    assert "2/8 batches" in text


@pytest.mark.parametrize(("name", "magic"), [("a.png", b"\x89PNG"), ("a.svg", b"<?xml"), ("a.PDF", b"%PDF")])
@pytest.mark.parametrize("epochs", [EPOCHS, EPOCHS[:1]], ids=["two epochs", "one epoch"])
def test_the_picture_is_of_the_kind_that_its_name_says(name: str, magic: bytes, epochs: list[EpochDone], tmp_path: Path) -> None:
    plot(epochs, 0.95, "a title", tmp_path / name)
    assert (tmp_path / name).read_bytes().startswith(magic)
