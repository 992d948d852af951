"""What ``zmqagent demo`` shows while it runs: a line an epoch, and on a terminal a progress bar below them."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from zmqagent.cli.training import EpochDone, Report

__all__ = ["Display"]


class Display:
    """Shows reports as they come; a context manager, since the terminal must be put back in order."""

    def __init__(self, console: Console, epochs: int, steps: int) -> None:
        self._console = console
        self._epochs = epochs
        # Where nobody watches, a bar would only leave garbage in a log.
        self._progress = Progress(
            TextColumn("{task.description}"),
            BarColumn(bar_width=None),
            TaskProgressColumn(),
            MofNCompleteColumn(),
            TextColumn("batches"),
            TimeElapsedColumn(),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task("starting the processes", total=steps)

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._progress.stop()

    def show(self, report: Report) -> None:
        """Moves the bar, and prints the line of an epoch that is done."""
        if isinstance(report, EpochDone):
            number = f"{report.epoch:>{len(str(self._epochs))}}/{self._epochs}"
            self._console.print(f"epoch {number}   loss {report.mean_loss:.4f}   held-out accuracy {report.accuracy:.1%}")
            self._progress.update(self._task, description=f"epoch {min(report.epoch + 1, self._epochs)}/{self._epochs}")
        else:
            if self._progress.tasks[0].completed == 0:
                self._progress.update(self._task, description=f"epoch 1/{self._epochs}")
            self._progress.advance(self._task)
