"""Rounds of random calls, each in a process of its own so that a crash is a finding, and their report."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, Verbosity, given, seed, settings
from hypothesis import strategies as st

from . import calls, heads, judge, layers, values
from .calls import Call

#: Calls of a round, which is of one op.
ROUND = 100
#: Share of the calls with an illegal argument.
SPOILED = 1, 5
#: A call that takes longer is a finding, in seconds.
HANGS = 120.0


@dataclass
class Finding:
    """A fault of an op on a backend, the smallest call found that shows it, and how many calls did."""

    op: str
    backend: str
    kind: str
    text: str
    code: str
    count: int = 1

    @property
    def name(self) -> str:
        return f"{self.op} on {self.backend}: {self.kind}"


@dataclass
class Report:
    """Calls by op and backend, and what was found."""

    calls: Counter[str] = field(default_factory=Counter)
    findings: dict[str, Finding] = field(default_factory=dict)

    def add(self, found: Finding) -> None:
        if found.name in self.findings:
            self.findings[found.name].count += 1
        else:
            self.findings[found.name] = found

    def __str__(self) -> str:
        backends = sorted({name.split()[1] for name in self.calls})
        ops = sorted({name.split()[0] for name in self.calls})
        lines = [f"{'calls':<28}" + "".join(f"{b:>14}" for b in (*backends, "all"))]
        for op in ops:
            counts = [self.calls[f"{op} {b}"] for b in backends]
            lines.append(f"{op:<28}" + "".join(f"{n:>14}" for n in (*counts, sum(counts))))
        totals = [sum(self.calls[f"{op} {b}"] for op in ops) for b in backends]
        lines.append(f"{'all':<28}" + "".join(f"{n:>14}" for n in (*totals, sum(totals))))
        for number, found in enumerate(sorted(self.findings.values(), key=lambda f: (f.kind, f.op)), 1):
            lines += ["", f"{number}. {found.name} ({found.count} calls)", f"   {found.text}", ""]
            lines += [f"    {line}" for line in found.code.splitlines()]
        return "\n".join([*lines, "", f"{len(self.findings)} faults"])


class _Found(Exception):
    """A new finding, for hypothesis to make smaller."""


def targets() -> dict[str, Any]:
    """What can be fuzzed: name -> ``draw, spoil -> call`` with op, backend, isa, code(), and run(call)."""
    ops = {op: (lambda draw, spoil, op=op: calls.call_of(draw, op, spoil), judge.run) for op in calls.DRAWN}
    return {**ops, **heads.TARGETS, **layers.TARGETS}


def one_round(op: str, number: int, size: int, report: Report, before: Any = None, deadline: float = math.inf, *, spoil: bool = True
) -> None:  # fmt: skip
    """Make `size` calls of one op, the same for each `number`. before: told of every call first. spoil: some are illegal.

    What is new is made smaller by hypothesis, in calls that do not count; then the round goes on.
    """
    draw_call, run = targets()[op]
    left, attempt = size, 0

    def calls_of(data: Any) -> None:
        nonlocal left
        if time.monotonic() > deadline:
            return
        call = draw_call(data.draw, spoil and data.draw(st.integers(1, SPOILED[1])) > SPOILED[1] - SPOILED[0])
        if before is not None:
            before(call)
        if not smallest:
            left -= 1
            report.calls[f"{op} {_where(call)}"] += 1
        found = _finding(op, call, run)
        if found is None or (smallest and found.name not in smallest):
            return
        if not smallest and found.name in report.findings:
            report.findings[found.name].count += 1
            return
        found.code = call.code()
        smallest[found.name] = found
        raise _Found

    while left > 0 and time.monotonic() < deadline:
        smallest: dict[str, Finding] = {}
        options = settings(
            max_examples=left, deadline=None, database=None, derandomize=False, phases=(Phase.generate, Phase.shrink),
            suppress_health_check=list(HealthCheck), report_multiple_bugs=False, print_blob=False, verbosity=Verbosity.quiet,
        )  # fmt: skip
        with suppress(_Found):
            seed(1000 * number + attempt)(options(given(st.data())(calls_of)))()
        for found in smallest.values():
            report.add(found)
            print(found.name, file=sys.stderr, flush=True)
        attempt += 1


def _finding(op: str, call: Any, run: Any) -> Finding | None:
    backend = call.backend if call.illegal is None else "any"  # arguments are checked before one is chosen
    try:
        run(call)
    except judge.Fault as e:
        return Finding(op, backend, e.kind, str(e), "")
    except Exception as e:
        return Finding(op, backend, f"the oracle: {type(e).__name__}", traceback.format_exc(limit=-3), "")
    return None


def _where(call: Call) -> str:
    return f"cpu-{call.isa}" if call.isa else str(call.backend) if call.illegal != "backend" else "none"


def rounds(start: int, total: int, op: str | None) -> Iterator[tuple[str, int, int]]:
    """Op, number and size of the rounds from `start` on that make `total` calls."""
    names = [op] if op else list(targets())
    made, number = 0, start
    while made < total:
        size = min(ROUND, total - made)
        yield names[number % len(names)], number, size
        made, number = made + size, number + 1


def child(options: dict[str, Any]) -> None:
    """Do rounds; after each write the report, and before each call what it is."""
    report = Report(Counter(options["calls"]), {k: Finding(**v) for k, v in options["findings"].items()})
    folder = Path(options["folder"])
    at_work = (folder / "call").open("w+")

    def before(call: Call) -> None:
        at_work.seek(0)
        text = f"{call.op}\n{_where(call)}\n{call!r}"
        at_work.write(f"{len(text)}\n{text}")
        at_work.flush()

    torch.set_num_threads(1)
    deadline = time.monotonic() + options["seconds"]
    for op, number, size in rounds(options["round"], options["left"], options["op"]):
        one_round(op, number, size, report, before, deadline)
        state = {"round": number + 1, "calls": report.calls, "findings": {k: asdict(f) for k, f in report.findings.items()}}
        temporary = folder / "state.new"
        temporary.write_text(json.dumps(state))
        temporary.rename(folder / "state")
        if time.monotonic() > deadline:
            break


def supervise(total: int, first: int, op: str | None, seconds: float, folder: Path) -> Report:
    """Run children until all calls are made; one that dies or hangs is a finding, and the next goes on after its round."""
    report, number, left = Report(), first * 1_000_003, total
    end = time.monotonic() + seconds
    while left > 0 and (remaining := end - time.monotonic()) > 0:
        options = {
            "round": number, "left": left, "op": op, "seconds": remaining, "folder": str(folder), "calls": report.calls,
            "findings": {k: asdict(f) for k, f in report.findings.items()},
        }  # fmt: skip
        (folder / "options").write_text(json.dumps(options))
        (folder / "call").write_text("")
        (folder / "state").unlink(missing_ok=True)
        process = subprocess.Popen([sys.executable, "-m", "tests.fuzz", "--child", str(folder)])
        died = _wait(process, folder / "call")
        state = folder / "state"
        if state.exists():
            was = json.loads(state.read_text())
            report = Report(Counter(was["calls"]), {k: Finding(**v) for k, v in was["findings"].items()})
            done, number = was["round"] - number, was["round"]
            left -= max(done, 0) * ROUND
        if died:
            report.add(_crashed(died, (folder / "call").read_text()))
            number, left = number + 1, left - ROUND
        else:
            break
    return report


def _wait(process: subprocess.Popen[bytes], call: Path) -> str:
    """Why the child has died, or the empty string."""
    try:
        while True:
            try:
                code = process.wait(timeout=5)
            except subprocess.TimeoutExpired:
                if time.time() - call.stat().st_mtime > HANGS:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                    return f"no end within {HANGS:.0f} s"
                continue
            if code == 0:
                return ""
            return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
    finally:
        if process.poll() is None:
            process.kill()


def _crashed(why: str, text: str) -> Finding:
    length, _, rest = text.partition("\n")
    op, where, call = (*rest[: int(length or 0)].split("\n", 2), "", "", "")[:3]
    try:  # the record says how to make it again
        code = eval(call, {**vars(calls), "torch": torch, **_records()}).code()
    except Exception:
        code = call
    return Finding(op, where, "crash", why, code)


def _records() -> dict[str, Any]:
    return {"Call": Call, "Spec": values.Spec, "HeadCall": heads.HeadCall, "LayerCall": layers.LayerCall}
