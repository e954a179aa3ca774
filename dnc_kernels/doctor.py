"""What works here, what does not and why, and what to do: ``python -m dnc_kernels doctor``, or `check` from code."""

from __future__ import annotations

import argparse
import os
import platform
import sys
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import cast

import numpy
import torch

from . import __version__, _source, _threads, backends
from ._json import dumps
from ._selftest import CASES, data, worst_error

#: Largest error allowed by the self-test, relative to the largest element: 32 roundings of float32, for sums of some 100 terms.
BOUND = 32 * torch.finfo(torch.float32).eps
OLDEST_TORCH = (2, 11)
_REBUILD = "run `pip install .` in a checkout, or `python setup.py build_ext --inplace` for work in place"
# what the instruction sets need, and what later kernels may use
_CPU_FLAGS = ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_bf16", "avx512_fp16", "amx_bf16")


@dataclass(frozen=True)
class Problem:
    """Something that is wrong, and what to do about it. `serious`: results or the chosen backend are affected."""

    what: str
    fix: str
    serious: bool = True


@dataclass(frozen=True)
class SelfTest:
    """One op on one backend (and instruction set) in float32, compared with the float64 reference."""

    op: str
    backend: str
    isa: str | None
    error: float | None
    failure: str = ""
    proven: bool = True

    @property
    def ok(self) -> bool:
        """Whether it ran and its error lies within `BOUND`."""
        return self.error is not None and self.error <= BOUND


@dataclass(frozen=True)
class Choice:
    """What the resolver picks for float32 tensors of a device, and why."""

    op: str
    device: str
    backend: str
    reason: str
    unproven: tuple[str, ...]
    #: GPUs that have proven this build's CUDA C++ kernel of the op.
    proven_on: tuple[str, ...] = ()


@dataclass
class Report:
    """Everything the doctor looked at."""

    versions: dict[str, str] = field(default_factory=dict)
    build: dict[str, str] = field(default_factory=dict)
    processor: dict[str, str] = field(default_factory=dict)
    threads: dict[str, str] = field(default_factory=dict)
    cuda: dict[str, str] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)
    backends: dict[str, str] = field(default_factory=dict)  # name -> why it cannot run, or ""
    choices: list[Choice] = field(default_factory=list)
    self_tests: list[SelfTest] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)

    @property
    def healthy(self) -> bool:
        """No serious problem."""
        return not any(problem.serious for problem in self.problems)


def check(*, self_test: bool = True) -> Report:
    """Examine the installation, and compare every op with float64 unless `self_test` is False (it takes about a second)."""
    report = Report()
    _look_at_versions(report)
    _look_at_build(report)
    _look_at_processor(report)
    _look_at_threads(report)
    _look_at_cuda(report)
    report.environment = {name: value for name, value in sorted(os.environ.items()) if name.startswith("DNC_KERNELS_")}
    _look_at_backends(report)
    if self_test:
        _run_self_tests(report)
    return report


def _look_at_versions(report: Report) -> None:
    native = backends._native
    report.versions = {
        "dnc_kernels": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "triton": _triton_version(),
        "compiler": getattr(native, "compiler", "unknown"),
        "folder": str(Path(__file__).parent),
    }
    oldest = ".".join(map(str, OLDEST_TORCH))
    if tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2]) < OLDEST_TORCH:
        report.problems.append(
            Problem(f"torch {torch.__version__} is older than {oldest}", f'run `pip install "torch>={oldest}"`')
        )
    try:
        installed = metadata.version("dnc_kernels")
    except metadata.PackageNotFoundError:
        return  # a checkout on sys.path
    if native is not None and installed != __version__:
        what = f"the extension is version {__version__}, the installed package {installed}"
        report.problems.append(Problem(what, _REBUILD))


def _look_at_build(report: Report) -> None:
    native = backends._native
    if native is None:  # a problem of its own
        return
    built = {"source": getattr(native, "source", "unknown"), "commit": getattr(native, "commit", "unknown")}
    report.build = {"file": str(native.__file__), **built}
    source = _source.source(_source.ROOT)
    if source is None:
        return  # installed: no source to compare with
    commit = _source.commit(_source.ROOT)
    report.build |= {"checkout_source": source, "checkout_commit": commit}
    if built["source"] != source:
        what = f"{report.build['file']} was built from other source ({built['commit']}) than this checkout's csrc ({commit})"
        fix = "build it anew: `make install`, or `python setup.py build_ext --inplace` with this Python"
        report.problems.append(Problem(what, fix))


def _triton_version() -> str:
    try:
        return metadata.version("triton")
    except metadata.PackageNotFoundError:
        return "not installed"


def _look_at_processor(report: Report) -> None:
    name, flags = platform.processor() or platform.machine(), set()
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() == "flags":
                flags = set(value.split())
    except OSError:  # not Linux
        pass
    report.processor = {
        "name": name,
        "features": " ".join(flag for flag in _CPU_FLAGS if flag in flags) or "none of those the kernels use",
    }
    if backends._native is not None:
        report.processor["instruction_sets"] = " ".join(backends.usable_isas())
        report.processor["instruction_set_in_use"] = backends.cpu_isa()
        if backends.cpu_isa() != backends.usable_isas()[-1]:
            what = f"the CPU kernels use {backends.cpu_isa()}, though this processor runs {backends.usable_isas()[-1]}"
            report.problems.append(Problem(what, "unset DNC_KERNELS_CPU_ISA, unless this is a test", serious=False))


def _look_at_threads(report: Report) -> None:
    threads, cores, allowed, load = torch.get_num_threads(), _threads.cores(), _threads.quota(), _threads.load()
    waiting = _threads.waiting(_threads.maps(), os.environ)
    report.threads = {
        "threads": str(threads),
        "cores": str(cores),
        "quota_cores": "none" if allowed is None else f"{allowed:g}",
        "load_1min": "unknown" if load is None else f"{load:.2f}",
        "openmp": waiting.path or "unknown",
        "waiting_threads": f"{'spin' if waiting.spins else 'sleep'} ({waiting.setting or 'by default'})",
    }
    why = _threads.crowded(threads, cores, allowed, load)
    if why and waiting.spins:
        what = f"{why}, and threads that wait spin: a step can take many times as long"
        report.problems.append(Problem(what, waiting.remedy, serious=False))


def _look_at_cuda(report: Report) -> None:
    archs = getattr(backends._native, "cuda_archs", None)
    report.cuda = {"archs_in_binary": archs or "none", "torch_cuda": torch.version.cuda or "none"}
    if not torch.cuda.is_available():
        return
    major, minor = torch.cuda.get_device_capability()
    report.cuda["device"] = torch.cuda.get_device_name()
    report.cuda["capability"] = f"{major}.{minor}"
    if (major, minor) < backends.OLDEST_CAPABILITY:
        oldest = ".".join(map(str, backends.OLDEST_CAPABILITY))
        what = f"the GPU's compute capability {major}.{minor} is older than {oldest}: its ops run in plain torch"
        report.problems.append(Problem(what, "use a GPU of the Ampere generation or later", serious=False))
    if backends._native is None:
        return
    if archs is None:
        fix = "build with DNC_KERNELS_BUILD=cuda where nvcc is found"
        report.problems.append(Problem("there is a GPU, but this build has no CUDA kernels", fix, serious=False))
    elif not backends.runs_on(archs, major, minor):
        what = f"no CUDA code in this build runs on a GPU of capability {major}.{minor} (built for {archs})"
        suffix = "a" if major >= 9 else ""
        report.problems.append(Problem(what, f"build with DNC_KERNELS_CUDA_ARCHS={major}{minor}{suffix}-real"))


def _look_at_backends(report: Report) -> None:
    names = [name for name in backends.BACKENDS if name != "auto"]
    report.backends = {name: backends.unusable(name) for name in names}
    if backends._native is None:
        report.problems.append(Problem(backends.NATIVE_ERROR, _REBUILD))
    choice = backends.chosen()
    report.environment.setdefault("choice in force", choice)
    if choice != "auto" and report.backends[choice]:
        what = f"backend {choice!r} is chosen but cannot run: {report.backends[choice]}"
        report.problems.append(Problem(what, "unset DNC_KERNELS_BACKEND, or leave the `use_backend` block"))
    for op, kernels in backends.KERNELS.items():
        for device in ("cpu", "cuda"):
            capability = backends.capability(None) if device == "cuda" and torch.cuda.is_available() else None
            found = backends.resolve(op, device, torch.float32, capability=capability)
            here = {name: kernel for name, kernel in kernels.items() if kernel.device == device}
            unproven = tuple(name for name in here if backends.unproven(op, name, capability))
            proven_on = backends.proven_on(op) if "cuda" in here else ()
            reason = found.reason if here else f"{op} has no kernel for {device} yet"
            report.choices.append(Choice(op, device, found.backend, reason, unproven, proven_on))


def _run_self_tests(report: Report) -> None:
    problem = data()
    sizes = {"K": problem.centroids.shape[1], "D": problem.x.shape[1]}
    places: list[tuple[str, str | None, str]] = [("reference", None, "cpu")]
    if not report.backends["cpu"]:
        places += [("cpu", isa, "cpu") for isa in backends.usable_isas()]
    if torch.cuda.is_available():
        places += [(name, None, "cuda") for name in ("triton", "cuda") if not report.backends[name]]
    for op, kernels in backends.KERNELS.items():
        for backend, isa, device in places:
            capability = backends.capability(None) if device == "cuda" else None
            if backend != "reference":
                kernel = kernels.get(backend)
                if kernel is None or kernel.refuses(backend, torch.float32, capability, "rows", sizes):
                    continue
            error, failure = None, ""
            try:
                with backends.use_backend("reference"):
                    expected = CASES[op](problem.to(torch.float64, "cpu"))
                with (
                    backends.use_backend(cast(backends.Backend, backend)),
                    backends.use_isa(cast(backends.Isa, isa)) if isa else nullcontext(),
                ):
                    error = worst_error(CASES[op](problem.to(torch.float32, device)), expected)
            except Exception as raised:  # a doctor reports what it finds
                failure = f"{type(raised).__name__}: {raised}"
            proven = backend == "reference" or not backends.unproven(op, backend, capability)
            report.self_tests.append(SelfTest(op, backend, isa, error, failure, proven))
    _judge(report)


def _judge(report: Report) -> None:
    """One problem for each op that failed in the self-test, with every place where it did."""
    for op in dict.fromkeys(test.op for test in report.self_tests):
        bad = [test for test in report.self_tests if test.op == op and not test.ok]
        if not bad:
            continue
        where = ", ".join(f"{test.backend} {test.isa}" if test.isa else test.backend for test in bad)
        found = bad[0].failure or f"error {bad[0].error:.2g} > {BOUND:.2g}"
        fix = f"{_REBUILD}, then run the doctor again"
        if all(test.backend != "reference" for test in bad):
            fix += "; until it is healthy, DNC_KERNELS_BACKEND=reference gives right results"
        serious = any(test.proven for test in bad)
        report.problems.append(Problem(f"{op} fails the self-test on {where}: {found}", fix, serious))


def _table(rows: list[list[str]]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  " + "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def text(report: Report) -> str:
    """The report for people."""
    lines: list[str] = []
    for title, values in (
        ("versions", report.versions),
        ("build", {key: value[:12] if key.endswith("source") else value for key, value in report.build.items()}),
        ("processor", report.processor),
        ("threads", report.threads),
        ("cuda", report.cuda),
        ("environment", report.environment),
    ):
        if values:
            lines += [title, *_table([[key, value] for key, value in values.items()]), ""]
    lines += [
        "backends",
        *_table([[name, f"cannot run: {why}" if why else "usable"] for name, why in report.backends.items()]),
        "",
    ]
    rows = [["op", "tensors on", "runs on", "because"]]
    for choice in report.choices:
        proof = f" [unproven: {', '.join(choice.unproven)}]" if choice.unproven else ""
        if choice.proven_on:
            proof += f" [cuda proven on {', '.join(choice.proven_on)}]"
        rows.append([choice.op, choice.device, choice.backend, _because(choice, report.backends) + proof])
    lines += ["what `auto` picks for float32", *_table(rows), ""]
    if report.self_tests:
        columns = list(dict.fromkeys((test.backend, test.isa) for test in report.self_tests))
        found = {(test.op, test.backend, test.isa): test for test in report.self_tests}
        rows = [["op", *(isa or backend for backend, isa in columns)]]
        for op in dict.fromkeys(test.op for test in report.self_tests):
            rows.append([op, *(_cell(found.get((op, *column))) for column in columns)])
        lines += [f"self-test: largest error in float32 relative to float64 (allowed: {BOUND:.1e})", *_table(rows), ""]
    serious = sum(problem.serious for problem in report.problems)
    lines.append(f"problems: {serious or 'none'}, notes: {len(report.problems) - serious or 'none'}")
    for problem in report.problems:
        lines += [f"  {'PROBLEM' if problem.serious else 'note'}: {problem.what}", f"    what to do: {problem.fix}"]
    return "\n".join(lines)


def _because(choice: Choice, why_not: dict[str, str]) -> str:
    """The reason without what the report has said before it: why a backend cannot run here, and whose tensors these are."""
    parts = []
    for part in dict.fromkeys(choice.reason.split("; ")):
        names = [name for name, why in why_not.items() if why == part and name in backends.KERNELS[choice.op]]
        parts.append(f"{' and '.join(names)} cannot run" if names else part)
    elsewhere = f"the cpu backend runs on cpu tensors, not {choice.device}"
    return "; ".join(part for part in parts if part != elsewhere) or choice.reason


def _cell(test: SelfTest | None) -> str:
    if test is None:
        return "-"
    if test.error is None:
        return "raises"
    return f"{test.error:.1e}" + ("" if test.ok else " WRONG") + ("" if test.proven else " (unproven)")


def main(argv: list[str] | None = None) -> int:
    """Print the report; 0 if healthy, else 1."""
    parser = argparse.ArgumentParser(prog="python -m dnc_kernels doctor", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--no-self-test", action="store_true", help="only look, run no kernel")
    options = parser.parse_args(argv)
    report = check(self_test=not options.no_self_test)
    if options.json:
        tests = [{**asdict(t), "ok": t.ok} for t in report.self_tests]
        print(dumps({**asdict(report), "self_tests": tests, "healthy": report.healthy}, indent=2))
    else:
        print(text(report))
    return 0 if report.healthy else 1


if __name__ == "__main__":
    sys.exit(main())
