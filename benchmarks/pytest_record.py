"""A plugin of pytest for runs on a GPU: a line for every test as it ends, and no test that spoils the next one.

    python -m pytest -p benchmarks.pytest_record --record results.jsonl -n 1 --timeout 60 ...

A kernel's error surfaces at the next synchronisation, and spoils its process for good. So every test ends with a
synchronisation of its own, and a process that no longer works is given up inside the test that broke it: pytest-xdist reports
the test as crashed and starts another worker. pytest-timeout ends a test that hangs in the same way.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from .processes import Step
from .record import append

#: Workers share the cores: references on the CPU take one each, and a thread that waits sleeps.
_ONE_THREAD = {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}
_BROKEN = 70  # exit status of a worker whose CUDA context is spoilt


def pytest_addoption(parser: pytest.Parser) -> None:
    """Options of this plugin."""
    parser.addoption("--record", help="append a JSON line for every test to this file")
    parser.addoption("--step", default="", help="what the lines call this run")


def pytest_configure(config: pytest.Config) -> None:
    """One recorder in the process that the others report to."""
    if config.getoption("record") and not hasattr(config, "workerinput"):
        config.pluginmanager.register(_Recorder(config), "dnc-recorder")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    """Wait for the test's kernels, so that their errors are its own."""
    try:
        result = yield
        synchronize()
        return result
    except Exception as error:
        if hasattr(item.config, "workerinput") and (broken := _broken()):
            line = {"event": "note", "step": item.config.getoption("step"), "test": item.nodeid}
            append(Path(item.config.getoption("record")), line | {"detail": f"{broken}; raised: {_first_line(str(error))}"})
            os._exit(_BROKEN)
        raise


def synchronize() -> None:
    """Wait for the kernels of this process, if it can have any."""
    torch = sys.modules.get("torch")  # a test without torch has no kernels
    if torch is not None and torch.cuda.is_initialized():
        torch.cuda.synchronize()


def _broken() -> str:
    """What CUDA says in a process that is spoilt, or the empty string."""
    try:
        synchronize()
    except Exception as error:
        return _first_line(str(error))
    return ""


def _first_line(text: str) -> str:
    return text.strip().partition("\n")[0][:300]


class _Recorder:
    """Writes a line for every test; on SIGTERM also for those that are still running."""

    def __init__(self, config: pytest.Config) -> None:
        self.file, self.step = Path(config.getoption("record")), config.getoption("step")
        self.limit = float(getattr(config.option, "timeout", None) or float("inf"))
        self.started: dict[str, float] = {}
        signal.signal(signal.SIGTERM, self._stopped)

    def _write(self, test: str, outcome: str, seconds: float, detail: str = "") -> None:
        line = {"event": "test", "step": self.step, "test": test, "outcome": outcome, "seconds": round(seconds, 3)}
        append(self.file, line | {"detail": detail})

    def _stopped(self, *_: Any) -> None:
        for test, start in self.started.items():
            self._write(test, "hung", time.monotonic() - start, "was running when its time was over")
        os._exit(1)

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.started[nodeid] = time.monotonic()

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "teardown" and report.passed:
            return
        if report.when == "setup" and report.passed:
            return
        start = self.started.pop(report.nodeid, time.monotonic())
        seconds = max(report.duration, time.monotonic() - start if report.when == "???" else 0.0)
        if report.failed:
            crashed = report.when == "???"  # what xdist reports of a worker that is gone
            outcome = ("hung" if seconds >= 0.9 * self.limit else "crashed") if crashed else "failed"
            self._write(report.nodeid, outcome, seconds, self._reason(report))
        elif report.skipped:
            reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
            self._write(report.nodeid, "skipped", seconds, _first_line(reason))
        else:
            self._write(report.nodeid, "passed", seconds)

    @staticmethod
    def _reason(report: pytest.TestReport) -> str:
        crash = getattr(report.longrepr, "reprcrash", None)
        return _first_line(crash.message if crash else str(report.longrepr))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self._write(report.nodeid, "failed", 0.0, _first_line(str(report.longrepr).strip().rpartition("\n")[2]))


def step(
    name: str,
    tests: Sequence[str | Path],
    record: Path,
    *,
    seconds: float,
    workers: int = 1,
    select: str = "",
    each: float = 60.0,
    env: Mapping[str, str] | None = None,
    under: Sequence[str] = (),
) -> Step:
    """A run of tests that writes to `record`: `select` is a marker expression, `each` the seconds that a test may take.

    `under`: a command that pytest runs under, such as compute-sanitizer's.
    """
    options = ["-p", "benchmarks.pytest_record", "--record", str(record), "--step", name, "-p", "no:cacheprovider"]
    options += ["-n", str(workers), "--dist", "worksteal", "--max-worker-restart", str(20 * workers)]
    options += ["--timeout", str(each), "--timeout-method", "thread", *(["-m", select] if select else [])]
    command = [*under, sys.executable, "-m", "pytest", *options, *map(str, tests)]
    return Step(name, command, seconds, {**_ONE_THREAD, **(env or {})})
