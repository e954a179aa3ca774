"""The progress of training: a bar in a terminal, lines elsewhere."""

from __future__ import annotations

import time
from abc import ABC, abstractmethod
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
from rich.text import Text
from typing_extensions import Self

from .training import HeadName, Report

TITLES: dict[HeadName, str] = {"dnc": "DNC head", "softmax": "softmax head"}


def make_progress(console: Console, steps: int, measure: str = "mIoU") -> TrainingProgress:
    """A bar if the console is a terminal, else lines. `measure` is what is measured on the held-out images."""
    return (_Bars if console.is_terminal else _Lines)(console, steps, measure)


class TrainingProgress(ABC):
    """Shows runs of `steps` steps each; a context manager."""

    def __init__(self, console: Console, steps: int, measure: str) -> None:
        self.console, self.steps, self.measure = console, steps, measure

    @abstractmethod
    def begin(self, head: HeadName, seed: int, done: int = 0) -> Report:
        """The function to call after every step of a run that begins now, or goes on now after `done` steps."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        return None


class _Bars(TrainingProgress):
    def __init__(self, console: Console, steps: int, measure: str) -> None:
        super().__init__(console, steps, measure)
        self.progress = Progress(
            TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]:.3f}"), TextColumn("accuracy {task.fields[accuracy]:.3f}"),
            TextColumn(f"held-out {measure} {{task.fields[measured]}}"), _Rate(),
            TimeRemainingColumn(elapsed_when_finished=True), console=console,
        )  # fmt: skip

    def begin(self, head: HeadName, seed: int, done: int = 0) -> Report:
        task = self.progress.add_task(
            f"{TITLES[head]:12}  seed {seed}",
            total=self.steps,
            completed=done,
            loss=float("nan"),
            accuracy=float("nan"),
            measured="-",
        )

        def report(step: int, loss: float, accuracy: float, measured: float | None) -> None:
            self.progress.update(task, completed=step, loss=loss, accuracy=accuracy)
            if measured is not None:
                self.progress.update(task, measured=f"{measured:.3f}")

        return report

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()


class _Rate(ProgressColumn):
    """Steps per second."""

    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text("- steps/s" if speed is None else f"{speed:.1f} steps/s")


class _Lines(TrainingProgress):
    """Prints a line whenever the held-out images were measured."""

    def begin(self, head: HeadName, seed: int, done: int = 0) -> Report:
        first = time.perf_counter()

        def report(step: int, loss: float, accuracy: float, measured: float | None) -> None:
            nonlocal first
            if step == done + 1:
                first = time.perf_counter()  # starting the process is no part of the rate
            if measured is None:
                return
            rate = (step - done - 1) / max(time.perf_counter() - first, 1e-9)
            self.console.print(
                f"{TITLES[head]:12}  seed {seed}  step {step:{len(str(self.steps))}}/{self.steps}  loss {loss:.3f}"
                f"  accuracy {accuracy:.3f}  held-out {self.measure} {measured:.3f}  {rate:.1f} steps/s"
                f"  {(self.steps - step) / max(rate, 1e-9):.0f} s left",
                highlight=False, soft_wrap=True,
            )  # fmt: skip

        return report
