"""The most of some minutes on a GPU: `make gpu-run PHASE=works|numbers|tune MINUTES=8 OUT=DIR`, then `take DIR`.

works: is every kernel right? Primitives, the CUDA C++ kernels' proof, Triton's tests, failures again with blocking launches and
under memcheck, a dozen times, large tests. numbers: rows of all ops and of the head's step, a trace, two kernels under ncu.
tune: configurations for the two Triton kernels that are furthest from their limits. After a mend: PARTS="tests times" names
parts of any phase, FAMILIES and TESTS what the tests are.

Nothing is lost: every test, row and verdict is a line of OUT/results.jsonl from the moment it is known. Nothing blocks: every
step is a process with a limit, and what no longer fits is dropped from the end, with a line that says so. DRY=1 goes the same
way on a machine without a GPU: Triton's interpreter, CUDA C++ on the host, tiny shapes.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from . import ROOT, gpu_steps, processes, pytest_record
from .families import CUDA_FAMILIES, cuda_tests
from .gpu_take import BAD, RESULTS, events, rows_of, source, summary, take
from .processes import Ended, Step
from .record import Line, append, commit, read

#: Seconds that a phase is planned for; with fewer, every step has its share of them.
PLANNED = {"works": 360, "numbers": 420, "tune": 300}
#: Seconds kept for stopping what runs and for the summary.
_RESERVE = 2 * processes.GRACE + 2
_LOG = "log.txt"
#: What ncu looks at.
_SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "WarpStateStats", "Occupancy")
#: Tests that hang, crash and fail, for a rehearsal.
PLANTED = ROOT / "benchmarks" / "planted_faults.py"
_LONGEST_LOG = 200_000  # characters of a step's output


class Run:
    """A run: where its results go, and how much of its time is left.

    parts: names of parts in place of the phase's; families, tests: what `_tests` runs in place of all.
    """

    def __init__(
        self, out: Path, phase: str, seconds: float, *, dry: bool, plant: bool = False, parts: Sequence[str] = (),
        families: Sequence[str] | None = None, tests: Sequence[str] = (),
    ) -> None:  # fmt: skip
        self.out, self.phase, self.dry, self.plant = out, phase, dry, plant
        self.parts, self.families, self.tests = parts, families, tests
        self.record = out / RESULTS
        self.start = time.monotonic()
        self.deadline = self.start + seconds - _RESERVE
        self.share = 1.0 if parts else min(1.0, seconds / PLANNED[phase])
        self.temporary = tempfile.TemporaryDirectory(prefix="gpu-run-", ignore_cleanup_errors=True)  # the steps' output
        self.environment: Line = {}

    def tell(self, event: str, **content: Any) -> None:
        """A line of the results."""
        append(self.record, {"event": event, **content})

    def lines(self) -> list[Line]:
        """All lines so far."""
        return list(read(self.record))

    def steps(self, *steps: Step, then: Callable[[Ended], None] | None = None) -> list[Ended]:
        """Run steps side by side and record what became of each; drops them where less than a third of their time is left."""
        scaled = [Step(s.name, s.command, s.seconds * self.share, s.env) for s in steps]
        left = self.deadline - time.monotonic()
        if not steps or left < max(s.seconds for s in scaled) / 3:
            for step in steps:
                self.tell("dropped", step=step.name, reason=f"{max(left, 0):.0f} s were left")
            return []
        print(f"[{time.monotonic() - self.start:4.0f} s] {', '.join(s.name for s in steps)}", flush=True)
        ended = []
        for one in processes.run(scaled, self.deadline, Path(self.temporary.name), ROOT):
            self._log(one)
            detail = "" if one.status == "ok" else _last_line(one.output)
            line = {"step": one.step.name, "status": one.status, "returncode": one.returncode, "seconds": round(one.seconds, 1)}
            self.tell("step", **line, detail=detail)
            ended.append(one)
            if then:
                then(one)
        return ended

    def _log(self, ended: Ended) -> None:
        text = f"==== {ended.step.name}: {ended.status}, {ended.seconds:.1f} s\n{ended.output[-_LONGEST_LOG:]}\n"
        with suppress(OSError), (self.out / _LOG).open("a") as log:
            log.write(text)

    def python(self, name: str, limit: float, *arguments: str) -> Step:
        """A step that is a module of ours."""
        return Step(name, [sys.executable, "-m", *arguments], limit)

    def child(self, name: str, limit: float, what: str, **request: Any) -> Step:
        """A step that is a function of `gpu_steps`; the request is its arguments."""
        request |= {"record": str(self.record), "step": name, "dry": self.dry}
        return self.python(name, limit, "benchmarks.gpu_steps", what, json.dumps(request))

    def take(self) -> None:
        """Let this tree follow what is known so far, so that `auto` does in later steps; keep copies of the files in OUT."""
        try:
            if not self.dry:
                take(self.out)
        except Exception as error:
            self.tell(
                "step", step="take", status="failed", returncode=None, seconds=0.0, detail=f"{type(error).__name__}: {error}"
            )
        for name, files in (
            ("proofs.json", [ROOT / "dnc_kernels" / "proofs.json"]),
            ("dispatch.json", sorted((ROOT / "dnc_kernels" / "dispatch").glob("*.json"))),
            ("configurations.json", sorted(ROOT.glob("dnc_kernels/ops/*/configs/*.json"))),
        ):
            with suppress(OSError, json.JSONDecodeError):
                content = {str(file.relative_to(ROOT)): json.loads(file.read_text()) for file in files}
                (self.out / name).write_text(json.dumps(content, indent=1) + "\n")


def _last_line(text: str) -> str:
    return text.strip().rpartition("\n")[2][:300]


def prepare(run: Run) -> bool:
    """Look at the machine, and build the extension where it cannot be used; whether kernels can run here."""

    def look(name: str) -> Line:
        run.steps(run.child(name, 40 / run.share, "environment"))  # with few minutes too: all else follows from it
        return (events(run.lines(), "environment") or [{}])[-1]

    run.environment = look("environment")
    if run.environment.get("build", "it breaks the process that imports it") and not run.dry:
        run.steps(Step("build", ["make", "gpu-build", f"PYTHON={sys.executable}"], 240))
        run.environment = look("environment again")
    return run.dry or bool(run.environment.get("gpu"))


def _primitives(run: Run) -> None:
    """What the CUDA C++ kernels rest on, piece by piece."""
    host = ["--host"] if run.dry else []
    run.steps(run.python("primitives", 25, "benchmarks.primitives", *host), then=lambda ended: _tell_primitives(run, ended))


def _tell_primitives(run: Run, ended: Ended) -> None:
    for text in ended.output.splitlines():
        with suppress(json.JSONDecodeError):
            if isinstance(line := json.loads(text), dict) and "primitive" in line:
                run.tell("primitive", **line)


def _tests(run: Run) -> None:
    """The families' CUDA C++ tests side by side, and Triton's in the meantime; a verdict on a family as it ends."""
    from . import prove

    sources, workers = run.environment.get("sources") or {}, max(1, (os.cpu_count() or 1) - 7)
    chosen = [family for family in run.families or CUDA_FAMILIES if family != "none"]
    select = "cuda and sanitize" if run.dry else "cuda and not large"
    steps = [prove.step(family, run.record, 170, select=select) for family in chosen]
    others = [path for path in sorted((ROOT / "tests").glob("test_*.py")) if not path.name.endswith("_cuda.py")]
    triton: list[Path | str] = [
        p for p in others if p.name.endswith("_gpu.py") or "mark.triton" in (text := p.read_text()) or "mark.gpu" in text
    ]
    if run.dry:  # one tiny file, under the interpreter
        triton, workers = [ROOT / "tests" / "test_momentum_triton.py"], 1
    triton = [*run.tests] or triton
    select = "(triton or gpu and not cuda) and not large" + (" and not slow" if run.dry else "")
    steps.append(pytest_record.step("triton", triton, run.record, seconds=170, workers=workers, select=select))
    if run.plant:
        steps.append(pytest_record.step("planted", [PLANTED], run.record, seconds=140, each=10))
    families = {step.name: family for step, family in zip(steps, chosen, strict=False)}

    def judge(ended: Ended) -> None:
        family = families.get(ended.step.name)
        if family is None:
            return
        gpu, capability = run.environment.get("gpu", ""), tuple(run.environment.get("capability") or (0, 0))
        proof = prove.verdict(family, ended, events(run.lines(), "test"), sources, gpu, capability)
        if isinstance(proof, str) or run.dry:
            reason = proof if isinstance(proof, str) else "no GPU ran its tests"
            run.tell("proof", family=family, proven=False, reason=reason)
        else:
            run.tell("proof", proven=True, **asdict(proof))
        run.take()

    run.steps(*steps, then=judge)


def _again(run: Run) -> None:
    """Failures once more: all with blocking launches, which names the kernel; the first few under memcheck."""
    from . import sanitize

    failed = [line["test"] for line in events(run.lines(), "test") if line["outcome"] in BAD and "::" in line["test"]]
    first: dict[tuple[str, bool], str] = {}  # of every function and backend
    for test in failed:
        first.setdefault((test.partition("[")[0], "triton" in test), test)
    if not failed:
        return
    tests = list(dict.fromkeys([*first.values(), *failed]))[:24]  # of every function one, before a second of any
    workers = min(len(tests), 2 if run.dry else 6)
    blocking = {"CUDA_LAUNCH_BLOCKING": "1"}
    each = 10 if run.dry else 20
    run.steps(pytest_record.step("failures again", tests, run.record, seconds=45, workers=workers, each=each, env=blocking))
    sanitizer = sanitize.find()
    if sanitizer is None or run.dry:
        run.tell(
            "dropped", step="memcheck of failures", reason="compute-sanitizer was not found" if not sanitizer else "dry run"
        )
        return
    run.steps(
        *(
            pytest_record.step(
                f"memcheck {number} of {name.rpartition('::')[2]}", [test], run.record, seconds=45, workers=0, each=40,
                env=sanitize.ENVIRONMENT, under=sanitize.under(sanitizer, "memcheck", ours="cuda" in test and not triton),
            )
            for number, ((name, triton), test) in enumerate(list(first.items())[:4], 1)
        )
    )  # fmt: skip


def _large(run: Run) -> None:
    """Tests of 4 to 20 GB, one at a time."""
    if not run.dry:
        tests = sorted(p for p in (ROOT / "tests").glob("test_*.py") if "mark.large" in p.read_text())
        run.steps(pytest_record.step("large", tests, run.record, seconds=60, select="large"))


def _memcheck_of_small_tests(run: Run) -> None:
    """The tests that cover every CUDA C++ kernel once, under memcheck, the families side by side."""
    from . import sanitize

    sanitizer = sanitize.find()
    if sanitizer is not None and not run.dry:
        under = sanitize.under(sanitizer, "memcheck")
        run.steps(
            *(
                pytest_record.step(
                    f"memcheck {family}", cuda_tests(family), run.record, seconds=60, workers=0, each=30,
                    select="cuda and sanitize and not large", env=sanitize.ENVIRONMENT, under=under,
                )
                for family in CUDA_FAMILIES
            )
        )  # fmt: skip


def _rows(
    run: Run, name: str, seconds: float, cases: Sequence[gpu_steps.Chosen], *, baselines: str = "none",
    dtypes: Sequence[str] = ("bfloat16",),
) -> None:  # fmt: skip
    """Rows of benchmarks, alone on the GPU. A case that breaks its process costs the others nothing: they run in a new one."""
    end = min(time.monotonic() + seconds * run.share, run.deadline)
    begun: list[Any] = []
    for number in range(1, 20):
        left, label = end - time.monotonic(), name if number == 1 else f"{name} {number}"
        if number > 1 and left < 10 * run.share:
            run.tell("dropped", step=label, reason=f"{max(left, 0):.0f} s were left")
            break
        request = {"cases": cases, "skip": begun, "baselines": baselines, "dtypes": dtypes, "seconds": max(0.0, left - 3)}
        ended = run.steps(run.child(label, left / run.share, "rows", **request))
        now = [line["case"] for line in events(run.lines(), "begin") if line["step"] == label]
        begun += now
        if not ended or ended[0].status != "failed" or not now:
            break
    run.take()


def _times(run: Run) -> None:
    """A dozen times, for a first look."""
    _rows(run, "times", 80, gpu_steps.TIMES)


def _kernels(run: Run) -> None:
    """What those times are spent in, kernel by kernel."""
    run.steps(run.child("kernels", 45, "kernels", cases=gpu_steps.TIMES, seconds=40 * run.share))


def _all_rows(run: Run) -> None:
    """Rows of every op on every backend, and then of the head's step by what `auto` chooses from them."""
    _rows(run, "rows", 190, gpu_steps.ROWS, baselines="headline")
    _rows(run, "head", 80, gpu_steps.HEAD)


def _other_dtypes(run: Run) -> None:
    """Rows of other dtypes than bfloat16."""
    _rows(run, "other dtypes", 60, gpu_steps.OTHER_DTYPES, dtypes=("float16", "float32"))


def _trace(run: Run) -> None:
    """A Chrome trace of the head's step."""
    run.steps(run.child("trace", 40, "trace", to=str(run.out / "head_step.trace.json.gz")))


def _profiles(run: Run) -> None:
    """Two kernels under ncu, one after the other. It must not touch the GPU's clocks."""
    ncu = shutil.which("ncu")
    if ncu is None:
        run.tell("dropped", step="profiles", reason="ncu was not found")
        return
    for op, case, backend, kernel in gpu_steps.PROFILES:
        sections = [word for section in _SECTIONS for word in ("--section", section)]
        options = ["--clock-control", "none", *sections, "--kernel-name", f"regex:{kernel}", "--launch-skip", "1"]
        call = run.child(f"profile {op} {backend}", 40, "call", case=[op, case], backend=backend)
        profiled = [ncu, *options, "--launch-count", "1", "--csv", "--page", "details", *call.command]
        for ended in run.steps(Step(call.name, profiled, call.seconds)):
            for name, metrics in gpu_steps.metrics(ended.output).items():
                run.tell("profile", op=op, backend=backend, kernel=name, metrics=metrics)


def _tune(run: Run) -> None:
    """Better configurations for the two Triton kernels that lose most against their limits, and what they bring."""
    rows = rows_of(run.lines()) or [
        row for path in sorted(ROOT.glob(f"benchmarks/results/{run.environment.get('folder')}/*.jsonl")) for row in read(path)
    ]
    for family, kernel, op in gpu_steps.worst(rows):
        run.steps(
            run.python(f"tune {kernel}", 90, "benchmarks.tune", "--family", family, "--kernel", kernel),
            then=lambda ended, f=family, k=kernel: _configurations(run, f, k),  # type: ignore[misc]
        )
        run.take()
        tests = sorted(path for name in ("triton", "gpu") for path in (ROOT / "tests").glob(f"test_*_{name}.py"))
        run.steps(
            pytest_record.step(f"{family} as tuned", tests, run.record, seconds=40, workers=9, select="triton and not large")
        )
        _rows(run, f"{op} as tuned", 20, [(op, "*")])


def _configurations(run: Run, family: str, kernel: str) -> None:
    kind = run.environment.get("folder", "")
    path = ROOT / "dnc_kernels" / "ops" / family / "configs" / f"{kind}.json"
    with suppress(OSError, json.JSONDecodeError, KeyError):
        run.tell("configuration", family=family, kernel=kernel, kind=kind, entries=json.loads(path.read_text())[kernel])


#: The parts of every phase, in the order of their worth.
PHASES: dict[str, tuple[Callable[[Run], None], ...]] = {
    "works": (_primitives, _tests, _again, _times, _kernels, _large, _memcheck_of_small_tests),
    "numbers": (_all_rows, _kernels, _trace, _profiles, _other_dtypes, _memcheck_of_small_tests),
    "tune": (_tune,),
}


#: All of them by name.
PARTS = {part.__name__.strip("_"): part for parts in PHASES.values() for part in parts}


def execute(run: Run) -> int:
    """A whole run; 0 where no test, primitive or kernel's row was wrong."""
    date = time.strftime("%Y-%m-%dT%H%M%S", time.gmtime())
    run.tell("run", phase=run.phase, minutes=round((run.deadline + _RESERVE - run.start) / 60, 2), dry=run.dry, commit=commit(),
             source=source(), date=date)  # fmt: skip
    try:
        usable = prepare(run)
        for part in [PARTS[name] for name in run.parts] or PHASES[run.phase]:
            name = part.__name__.strip("_").replace("_", " ")
            if not usable:
                run.tell("dropped", step=name, reason="torch sees no CUDA device; DRY=1 goes the same way without one")
            elif time.monotonic() > run.deadline:  # before it imports or plans anything
                run.tell("dropped", step=name, reason="no time was left")
            else:
                part(run)
        return int(not run.environment or _wrong(run.lines()))
    except KeyboardInterrupt:
        run.tell("dropped", step="the rest", reason="the run was stopped")
        return 1
    except Exception as error:  # a fault of this module: what is known is kept
        traceback.print_exc()
        run.tell("dropped", step="the rest", reason=f"{type(error).__name__}: {error}")
        return 1
    finally:
        run.tell("end", seconds=round(time.monotonic() - run.start, 1))
        run.temporary.cleanup()
        print(_cut(summary(run.lines())), flush=True)


def _cut(text: str, most: int = 11_000) -> str:
    """What a run is, and what stands last: the faults. What lies between can be long."""
    return text if len(text) <= most else f"{text[:500]}\n...\n{text[500 - most :]}"


def _wrong(lines: Sequence[Line]) -> bool:
    return (
        any(line["outcome"] in BAD for line in events(lines, "test"))
        or any(line["status"] != "ok" for line in events(lines, "primitive"))
        or any(row["kind"] == "kernel" and row["status"] in ("wrong", "failed") for row in rows_of(lines))
        or any(line["status"] != "ok" for line in events(lines, "step"))
    )


def _stopped(*_: Any) -> None:
    raise KeyboardInterrupt


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a phase, or take its results."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_run", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for phase in PLANNED:
        one = commands.add_parser(phase, help=f"about {PLANNED[phase] // 60} minutes")
        one.add_argument("--minutes", type=float, default=PLANNED[phase] / 60, help="all ends within these")
        one.add_argument("--out", type=Path, default=Path("gpu-out"), help="folder of the results (gpu-out)")
        one.add_argument("--dry", action="store_true", help="without a GPU: interpreter, host, tiny shapes")
        one.add_argument("--parts", nargs="+", choices=PARTS, default=(), help="these in place of the phase's, in this order")
        one.add_argument("--families", nargs="+", choices=[*CUDA_FAMILIES, "none"], help="whose CUDA C++ tests run: all")
        one.add_argument("--tests", nargs="+", default=(), help="in place of Triton's: files, or file::test")
        one.add_argument("--plant", action="store_true", help="more tests, with faults that must be found")
    taking = commands.add_parser("take", help="put the results of a run into this tree, and say what they are")
    taking.add_argument("out", type=Path, help="the folder that came back")
    options = parser.parse_args(arguments)
    if options.command == "take":
        print(summary(list(read(options.out / RESULTS))))
        try:
            print("\n".join(f"took {what}" for what in take(options.out)) or "nothing to take")
        except ValueError as error:
            print(f"benchmarks.gpu_run: {error}", file=sys.stderr)
            return 1
        return 0
    if not options.minutes > 0.5:
        parser.error("--minutes must be above 0.5: stopping what runs takes some seconds")
    out = options.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    seconds = 60 * options.minutes
    faulthandler.dump_traceback_later(seconds + 10, exit=True)  # whatever happens, it ends
    signal.signal(signal.SIGTERM, _stopped)
    asked = {"parts": options.parts, "families": options.families, "tests": options.tests}
    return execute(Run(out, options.command, seconds, dry=options.dry, plant=options.plant, **asked))


if __name__ == "__main__":
    sys.exit(main())
