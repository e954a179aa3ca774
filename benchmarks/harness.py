"""Interleaved timing of variants of one problem, as rows that carry their own units and surroundings (docs/benchmarks.md).

A variant whose result fails its check against a float64 reference gets a row with a reason and no time.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import dnc_kernels
from dnc_kernels import backends

Row = dict[str, Any]
Call = Callable[[], Any]
Times = dict[str, list[float]]

#: Every column of a row, in order; docs/benchmarks.md says what each one means.
COLUMNS = (
    "op", "case", "variant", "kind", "backend", "status", "reason", "data", "shape", "dtype", "threads", "device", "capability",
    "cache", "rounds", "p50_ms", "p20_ms", "p80_ms", "ratio_to_best_baseline", "ratio_p20", "ratio_p80", "best_baseline",
    "ratio_to_baselines", "gflops", "pct_gemm_probe", "gemm_probe_gflops", "gb_per_s", "pct_copy_probe", "copy_probe_gb_per_s",
    "error_over_allowed", "peak_delta_mb", "allowed_peak_delta_mb", "goal_ratios", "goals_met", "cpu_isa", "machine_load_1min",
    "package_version", "torch_version", "python_version", "git_commit", "unix_time_s",
)  # fmt: skip
_GEMM, _COPY = "gemm probe", "copy probe"


@dataclass(frozen=True)
class Settings:
    """How to measure; the same for all cases of a run."""

    device: str = "cpu"
    threads: int = 2
    rounds: int = 100
    budget_s: float = 20.0  # for the rounds of one case, once 5 of them are made
    quick: bool = False  # tiny shapes
    compile: bool = True
    memory: bool = True
    cold: bool = True  # CUDA: flush the L2 cache before each call
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    def goals(self, dtype: str, least: dict[str, float]) -> dict[str, float]:
        """The goals that apply: they are set for float32 on the CPU at full size."""
        return {} if self.cuda or self.quick or dtype != "float32" else least


@dataclass(frozen=True)
class Variant:
    """One way to solve a case: `prepare` gets the inputs and returns the call that is timed, with everything counted in it."""

    name: str
    prepare: Callable[[Any], Call]
    baseline: bool = True
    compiled: bool = False
    backend: str = "torch"


@dataclass(frozen=True)
class Case:
    """A problem: inputs, what is right, and who solves it."""

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: str
    inputs: Call
    reference: Callable[[Any], Any]  # of the inputs, in float64
    check: Callable[[Any, Any], float]  # (result, reference) -> worst error / allowed error; above 1 is wrong
    variants: Sequence[Variant]
    data: str = "random"
    reset: Callable[[Any], None] | None = None  # of the inputs before every call, untimed: for ops that work in place
    flops: float = 0.0  # the useful ones
    bytes: float = 0.0  # read and written at least
    allowed_extra_bytes: float | None = None
    goals: Mapping[str, float] = field(default_factory=dict)  # baseline, or "best" -> least ratio


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def kernels(
    settings: Settings,
    dtype: str,
    ops: Sequence[str],
    prepare: Callable[[str], Callable[[Any], Call]],
    sizes: Mapping[str, int],
    layout: str | None = None,
) -> list[Variant]:
    """A variant for every backend that has all of `ops` here for these sizes and layout; the reference where none has.

    `prepare` gets its name. `layout`: of the pixels (`backends.layout`); None: it does not matter.
    """
    usable = []
    known = {key: size for key, size in sizes.items() if key in ("N", "C", "K", "D")}
    capability = backends.capability(None) if settings.cuda else None
    # Triton's interpreter, which runs on CPU tensors, is no way to measure
    for backend in set(backends.BACKENDS) - {"auto", "reference", *(() if settings.cuda else ("triton",))}:
        with suppress(RuntimeError):
            for op in ops:
                kind = torch.device(settings.device).type
                backends.resolve(op, kind, dtype_of(dtype), backend, capability=capability, layout=layout, **known)
            usable.append(backend)
    return [Variant(f"dnc_{b}", prepare(b), baseline=False, backend=b) for b in sorted(usable) or ["reference"]]


def compiled(
    settings: Settings, name: str, function: Callable[..., Any], prepare: Callable[[Callable[..., Any]], Callable[[Any], Call]]
) -> list[Variant]:
    """`function` under torch.compile, on CUDA also tuned by it. `prepare` gets the compiled function."""
    made = [Variant(f"{name}_compiled", prepare(torch.compile(function, dynamic=False)), compiled=True)]
    if settings.cuda:
        tuned = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
        made.append(Variant(f"{name}_autotuned", prepare(tuned), compiled=True))
    return made


def error_ratio(actual: Tensor, expected: Tensor, allowed: Tensor | float) -> float:
    """Worst |actual - expected| / allowed; inf for another shape or a NaN."""
    if actual.shape != expected.shape:
        return math.inf
    worst = ((actual.double() - expected).abs() / allowed).max().item() if actual.numel() else 0.0
    return math.inf if math.isnan(worst) else worst


def choice_ratio(choice: Tensor, scores: Tensor, margin: float) -> float:
    """Check of an argmax: how far the chosen score [N] of `scores` [N,K] lies below the best, over the rounding margin."""
    if choice.shape != scores.shape[:1] or not bool(((choice >= 0) & (choice < scores.shape[1])).all()):
        return math.inf
    return error_ratio(scores.gather(1, choice.long()[:, None])[:, 0], scores.amax(1), margin)


def summarize(times: Times, baselines: Sequence[str]) -> dict[str, Row]:
    """Time and ratio columns of each variant from its times in ms, one a round.

    A ratio is taken within a round, baseline / variant, so that a slow second of the machine hits both; the columns are its
    median and its 20th and 80th percentile. Above 1: faster than the baseline that has the lowest median time.
    """
    raced = [name for name in baselines if name in times]
    best = min(raced, key=lambda name: float(np.median(times[name])), default=None)
    rows: dict[str, Row] = {}
    for name, t in times.items():
        columns = ["p20_ms", "p50_ms", "p80_ms"], np.percentile(t, (20, 50, 80))
        rows[name] = {"rounds": len(t), "best_baseline": best} | dict(zip(columns[0], map(float, columns[1]), strict=True))
        rows[name]["ratio_to_baselines"] = {b: float(np.median(np.divide(times[b], t))) for b in raced}
        if best:
            ratios = map(float, np.percentile(np.divide(times[best], t), (20, 50, 80)))
            rows[name] |= dict(zip(("ratio_p20", "ratio_to_best_baseline", "ratio_p80"), ratios, strict=True))
    return rows


def run_case(case: Case, settings: Settings) -> list[Row]:
    """Check and time the variants of `case`, a row each."""
    torch.set_num_threads(settings.threads)
    torch._dynamo.reset()  # or a second shape would compile the dynamic, slower code
    rows = {v.name: _row(case, v, settings) for v in case.variants}
    times = _check_and_time(case, settings, rows)
    for name, columns in summarize(times, [v.name for v in case.variants if v.baseline]).items():
        if name in rows:
            rows[name] |= columns | _rates(case, times, name, settings)
    for v in case.variants:
        if settings.memory and v.name in times:
            rows[v.name] |= _memory(case, v, settings)
        _judge(rows[v.name], v, case)
    return list(rows.values())


def _check_and_time(case: Case, settings: Settings, rows: dict[str, Row]) -> Times:
    """Times of the probes and of the variants that are right before and after the rounds; verdicts go into `rows`."""
    inputs = case.inputs()
    reference = case.reference(inputs)

    def reset() -> None:
        if case.reset:
            case.reset(inputs)

    def attempt(name: str, prepare: Callable[[Any], Call]) -> Call | None:
        try:
            reset()
            call = prepare(inputs)
            rows[name]["error_over_allowed"] = worst = case.check(call(), reference)
        except Exception as error:  # a baseline that cannot run here keeps its row
            rows[name] |= {"status": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0][:300]}
            return None
        if not worst <= 1:
            rows[name] |= {"status": "wrong", "reason": f"error is {worst:.3g} times what is allowed against float64"}
            return None
        return call

    calls: dict[str, Call] = {}
    for v in case.variants:
        if v.compiled and not settings.compile:
            rows[v.name] |= {"status": "skipped", "reason": "torch.compile is left out of this run"}
        elif call := attempt(v.name, v.prepare):
            calls[v.name] = call
    times = _interleave(calls | _probes(case, settings), reset, settings)
    for name in calls:
        if not attempt(name, lambda _: calls[name]):  # noqa: B023  # called at once
            del times[name]
    return times


def peak(case: Case, tiny: Case, variant_name: str, settings: Settings) -> Row:
    """Extra peak memory of one call with `case`'s inputs in place. For a fresh process: on CPU it is the peak RSS of this one.

    A call on `tiny` shapes goes first, so that library code is loaded. Compilers keep hundreds of MB, so of a compiled
    variant the second call is measured; of all others the first.
    """
    torch.set_num_threads(settings.threads)

    def call_of(a_case: Case) -> Call:
        inputs = a_case.inputs()
        return next(v for v in a_case.variants if v.name == variant_name).prepare(inputs)

    call_of(tiny)()
    torch._dynamo.reset()
    call = call_of(case)
    if variant_name in [v.name for v in case.variants if v.compiled]:
        call()
    gc.collect()
    with suppress(OSError, AttributeError):  # glibc keeps freed blocks resident, and a call that reuses them would look free
        ctypes.CDLL(None).malloc_trim(0)
    if settings.cuda:
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        call()
        return {"peak_delta_mb": (torch.cuda.max_memory_allocated() - allocated) / 1e6}
    with suppress(OSError):  # refused: a peak made along with the inputs counts as inputs
        Path("/proc/self/clear_refs").write_text("5")  # the recorded peak becomes what is resident now
    before = _peak_rss()
    call()
    return {"peak_delta_mb": (_peak_rss() - before) / 1e6}


def _row(case: Case, variant: Variant, settings: Settings) -> Row:
    return dict.fromkeys(COLUMNS) | {
        "op": case.op, "case": case.name, "variant": variant.name, "kind": "baseline" if variant.baseline else "kernel",
        "backend": variant.backend, "status": "ok", "data": case.data, "shape": dict(case.shape), "dtype": case.dtype,
        "threads": settings.threads, "cache": "interleaved" if not settings.cuda else "cold" if settings.cold else "warm",
        "allowed_peak_delta_mb": None if variant.baseline or not case.allowed_extra_bytes else case.allowed_extra_bytes / 1e6,
        "machine_load_1min": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "unix_time_s": int(time.time()), **surroundings(settings.device),
    }  # fmt: skip


@cache
def surroundings(device: str) -> Row:
    """What a number needs to be worth keeping: device, versions, commit."""
    cpu = not device.startswith("cuda")
    return {
        "device": _cpu_name() if cpu else torch.cuda.get_device_name(device),
        "capability": None if cpu else ".".join(map(str, torch.cuda.get_device_capability(device))),
        "cpu_isa": backends.cpu_isa() if cpu and not backends.unusable("cpu") else None,
        "package_version": dnc_kernels.__version__, "torch_version": torch.__version__,
        "python_version": platform.python_version(), "git_commit": _commit(),
    }  # fmt: skip


def _judge(row: Row, variant: Variant, case: Case) -> None:
    """Compare a kernel's ratios with the goals of its case; goals_met stays None where a baseline is missing."""
    if not variant.baseline and case.goals:
        row["goal_ratios"] = dict(case.goals)
        ratios = {"best": row["ratio_to_best_baseline"], **(row["ratio_to_baselines"] or {})}
        if all(ratios.get(name) is not None for name in case.goals):
            row["goals_met"] = all(ratios[name] >= least for name, least in case.goals.items())


def _probe_work(settings: Settings) -> tuple[int, float, int]:
    """Size n of the probes, operations of a product of two [n,n], elements of a copy (150 or 270 MB read, as much written)."""
    n = 128 if settings.quick else 8192 if settings.cuda else 1536
    return n, 2.0 * n**3, n**2 * (1 if settings.cuda else 16)


def _probes(case: Case, settings: Settings) -> dict[str, Call]:
    """A large matrix product and a large copy: what the machine can do in these very rounds."""
    (n, _, elements), calls = _probe_work(settings), {}
    if case.flops:
        a = torch.randn(n, n, device=settings.device).to(dtype_of(case.dtype))
        product = torch.empty_like(a)
        calls[_GEMM] = lambda: torch.mm(a, a, out=product)
    if case.bytes:
        source, target = torch.ones(elements, device=settings.device), torch.zeros(elements, device=settings.device)
        calls[_COPY] = lambda: target.copy_(source)
    for call in calls.values():
        call()
    return calls


def _rates(case: Case, times: Times, name: str, settings: Settings) -> Row:
    """Speed in units of the machine, and as a share of the probe that ran in the same rounds."""
    columns: Row = {}
    _, flops, elements = _probe_work(settings)
    for probe, unit, work, probe_work in (
        (_GEMM, "gflops", case.flops, flops),
        (_COPY, "gb_per_s", case.bytes, 8.0 * elements),
    ):
        if work:
            share = probe.replace(" ", "_")
            columns[unit] = work / float(np.median(times[name])) / 1e6
            columns[f"{share}_{unit}"] = probe_work / float(np.median(times[probe])) / 1e6
            columns[f"pct_{share}"] = 100 * work / probe_work * float(np.median(np.divide(times[probe], times[name])))
    return columns


def _interleave(calls: Mapping[str, Call], reset: Callable[[], None], settings: Settings) -> Times:
    """Times in ms: rounds in which each call runs once, in a new (seeded) order each round, until enough of them or of time."""
    order, shuffle = list(calls), random.Random(0).shuffle
    times: Times = {name: [] for name in calls}
    clock = _cuda_clock(settings) if settings.cuda else _cpu_clock
    gc.collect()
    gc.disable()
    try:
        start = time.perf_counter()
        for done in range(settings.rounds):
            if done >= 5 and time.perf_counter() - start > settings.budget_s:
                break
            shuffle(order)
            for name in order:
                reset()
                times[name].append(clock(calls[name]))
    finally:
        gc.enable()
    return times


def _cpu_clock(call: Call) -> float:
    time.sleep(0.005)  # idle threads of another OpenMP runtime (faiss) spin for a few ms after its call: let them fall asleep
    start = time.perf_counter()
    result = call()
    elapsed = time.perf_counter() - start
    del result  # freeing it is not timed
    return elapsed * 1e3


def _cuda_clock(settings: Settings) -> Callable[[Call], float]:
    """Clock by device events. The flush of the L2 cache also keeps the device busy while the call's launches queue up."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    # 256 MB: five times the 50 MB L2 of an H100
    junk = torch.empty(2**26 if settings.cold else 0, dtype=torch.int32, device=settings.device)

    def clock(call: Call) -> float:
        junk.zero_()
        start.record()
        call()
        end.record()
        torch.cuda.synchronize()
        return float(start.elapsed_time(end))

    return clock


def _memory(case: Case, variant: Variant, settings: Settings) -> Row:
    """`peak` in a fresh process."""
    request = {"op": case.op, "case": case.name, "dtype": case.dtype, "variant": variant.name, "settings": asdict(settings)}
    command = [sys.executable, "-m", "benchmarks", "peak", json.dumps(request)]
    child = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=600)
    if child.returncode:
        return {"reason": "peak memory: " + (child.stderr.strip().splitlines() or ["no message"])[-1][:300]}
    row: Row = json.loads(child.stdout.splitlines()[-1])
    return row


def _peak_rss() -> float:
    """VmHWM in bytes (Linux)."""
    status = Path("/proc/self/status").read_text()
    return 1024.0 * int(status.partition("VmHWM:")[2].split()[0])


def _cpu_name() -> str:
    with suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().partition("model name")[2].splitlines()[0].strip("\t :")
    return platform.processor() or platform.machine()


def _commit() -> str:
    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        ).stdout.strip()

    with suppress(OSError, subprocess.CalledProcessError):
        return git("rev-parse", "--short=12", "HEAD") + ("-dirty" if git("status", "--porcelain", "-uno") else "")
    return "unknown"
