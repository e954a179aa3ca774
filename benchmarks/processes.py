"""Commands run side by side, each in a process of its own with a limit: a crash or a hang of one never stops another."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

#: Seconds between a polite end (SIGTERM, so that a program may say what it was doing) and SIGKILL, and until a process that
#: survives that is left alone, as one that waits for a broken driver is.
GRACE = 3.0


@dataclass(frozen=True)
class Step:
    """A command and its limit in seconds; `env` is added to the environment."""

    name: str
    command: Sequence[str]
    seconds: float
    env: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Ended:
    """What became of a step: ``ok``, ``failed`` (`returncode` is not 0) or ``stopped`` (at its limit)."""

    step: Step
    status: str
    returncode: int | None
    seconds: float
    output: str


class _Running:
    """A step that has started."""

    def __init__(self, step: Step, folder: Path, cwd: Path) -> None:
        self.step, self.start, self.stopped, self.killed = step, time.monotonic(), 0.0, False
        self.log = folder / f"{step.name.replace(' ', '-').replace('/', '-')}.log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                list(step.command), cwd=cwd, env={**os.environ, **step.env}, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def send(self, number: int) -> None:
        """A signal to the process and all that it started."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, number)

    def poll(self, deadline: float) -> Ended | None:
        """What became of it, once it is over or beyond help; stops it when its time is up."""
        now = time.monotonic()
        ended = self.process.poll() is not None
        if not ended and not self.stopped and now > min(self.start + self.step.seconds, deadline):
            self.stopped = now
            self.send(signal.SIGTERM)
        elif not ended and self.stopped and now > self.stopped + GRACE and not self.killed:
            self.killed = True
            self.send(signal.SIGKILL)
        if not ended and not (self.killed and now > self.stopped + 2 * GRACE):
            return None
        self.send(signal.SIGKILL)  # whatever it started
        status = "stopped" if self.stopped else "failed" if self.process.returncode else "ok"
        with suppress(OSError):
            return Ended(self.step, status, self.process.returncode, now - self.start, self.log.read_text(errors="replace"))
        return Ended(self.step, status, self.process.returncode, now - self.start, "")


def run(steps: Sequence[Step], deadline: float, folder: Path, cwd: Path) -> Iterator[Ended]:
    """Start all steps at once, their output into files of `folder`; yields each as it ends, all by `deadline` (time.monotonic).

    A reader that stops, by an exception too, ends them all.
    """
    running: list[_Running] = []
    try:
        for step in steps:
            try:
                running.append(_Running(step, folder, cwd))
            except OSError as error:
                yield Ended(step, "failed", None, 0.0, f"{type(error).__name__}: {error}")
        while running:
            for one in list(running):
                if ended := one.poll(deadline):
                    running.remove(one)
                    yield ended
            time.sleep(0.05)
    finally:
        for one in running:
            one.send(signal.SIGKILL)
