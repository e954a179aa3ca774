"""Interleaved timing of variants of one problem, as rows that carry their own units and surroundings (docs/benchmarks.md).

A variant whose result fails its check against a float64 reference gets a row with a reason and no time.
"""

from __future__ import annotations

import gc
import math
import os
import platform
import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dnc_kernels
from dnc_kernels import backends

from . import memory
from .case import Case, Row, Settings, Variant, dtype_of
from .clock import Call, CudaClock, Timing, cpu_clock
from .record import commit

Times = dict[str, list[float]]

#: Every column of a row, in order; docs/benchmarks.md says what each one means.
COLUMNS = (
    "op", "case", "variant", "kind", "backend", "status", "reason", "data", "shape", "shape_class", "dtype", "threads",
    "device", "capability", "cache", "rounds", "p50_ms", "p20_ms", "p80_ms", "host_us", "pct_queued",
    "ratio_to_best_baseline", "ratio_p20", "ratio_p80", "best_baseline", "ratio_to_baselines", "gflops", "pct_gemm_probe",
    "gemm_probe_gflops", "gb_per_s", "pct_copy_probe", "copy_probe_gb_per_s", "error_over_allowed", "peak_delta_mb",
    "allowed_peak_delta_mb", "goal_ratios", "goals_met", "cpu_isa", "machine_load_1min", "package_version", "torch_version",
    "python_version", "git_commit", "binary_source", "unix_time_s",
)  # fmt: skip
_GEMM, _COPY = "gemm probe", "copy probe"


class GpuLost(RuntimeError):
    """A call has ruined the GPU's context (by an illegal address, say): nothing more can run in this process."""


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


def chosen(case: Case, settings: Settings) -> Iterator[tuple[Variant, str]]:
    """The variants of a case, each with the reason why it does not run, or the empty string."""
    compiles = settings.baselines == "all" or (settings.baselines == "headline" and case.headline)
    for v in case.variants:
        if not v.baseline or settings.baselines != "none":
            yield v, "torch.compile is left out of this run" if v.compiled and not compiles else ""


def run_case(case: Case, settings: Settings) -> Iterator[Row]:
    """Check and time the variants of `case`. A row each: of what cannot be timed at once, of the others after the last round.

    Raises:
        GpuLost: after a variant's row.
    """
    torch.set_num_threads(case.threads or settings.threads)
    torch._dynamo.reset()  # or a second shape would compile the dynamic, slower code
    _freeze_modules()
    inputs = case.inputs()
    reference = case.reference(inputs)
    rows: dict[str, Row] = {}
    calls: dict[str, Call] = {}

    def reset() -> None:
        if case.reset:
            case.reset(inputs)

    def attempt(row: Row, prepare: Callable[[Any], Call]) -> Call | None:
        try:
            reset()
            call = prepare(inputs)
            with backends.recorded_calls() as asked:
                result = call()
            row["shape_class"] = next((when for op, when in asked if op == case.op and row["kind"] == "kernel"), None)
            worst = case.check(result, reference)
            row["error_over_allowed"] = worst if math.isfinite(worst) else None  # JSON has no NaN
        except Exception as error:  # a baseline that cannot run here keeps its row
            row |= {"status": "failed", "reason": _first_line(error)}
            return None
        if not worst <= 1:
            row |= {"status": "wrong", "reason": f"error is {worst:.3g} times what is allowed against float64"}
            return None
        return call

    for v, skipped in chosen(case, settings):
        row = _row(case, v, settings)
        if skipped:
            row |= {"status": "skipped", "reason": skipped}
        elif call := attempt(row, v.prepare):
            rows[v.name], calls[v.name] = row, call
            continue
        yield row
        demand_gpu(settings, f"{case.op} {case.name} {v.name}")
    timings = _interleave(
        {name: _repeated(call, case.calls) for name, call in calls.items()} | _probes(case, settings), reset, settings
    )
    for name, call in calls.items():
        if settings.cuda and settings.memory:
            reset()
            rows[name] |= memory.on_cuda(call)
        if not attempt(rows[name], lambda _: call):  # noqa: B023  # called at once
            del timings[name]
    times = {name: [t.ms / (case.calls if name in calls else 1) for t in taken] for name, taken in timings.items()}
    summary = summarize(times, [v.name for v in case.variants if v.baseline])
    for v in case.variants:
        if v.name not in rows:
            continue
        if v.name in times:
            rows[v.name] |= summary[v.name] | _launches(timings[v.name]) | _rates(case, times, v.name, settings)
            if not settings.cuda:  # the host is what works
                rows[v.name]["host_us"] = 1e3 * rows[v.name]["p50_ms"]
            if settings.memory and not settings.cuda:
                rows[v.name] |= memory.in_fresh_process(case, v, settings)
        _judge(rows[v.name], v, case)
        yield rows[v.name]


@cache
def _freeze_modules() -> None:
    """What torch has loaded is no garbage: looking through it takes 0.3 s a time, more than a case of small kernels."""
    gc.collect()
    gc.freeze()


def failed(case: Case, settings: Settings, error: Exception) -> Row:
    """The row of a case of which nothing could be measured."""
    nobody = Variant("case", lambda _: lambda: None, baseline=False, backend="none")
    return _row(case, nobody, settings) | {"status": "failed", "reason": _first_line(error)}


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0][:300]


def demand_gpu(settings: Settings, last: str) -> None:
    """Raise GpuLost where the GPU does not answer any more."""
    if settings.cuda:
        try:
            torch.cuda.synchronize()
        except Exception as error:
            raise GpuLost(f"the GPU is lost to this process after {last}: {_first_line(error)}") from error


def _repeated(call: Call, calls: int) -> Call:
    def repeat() -> None:
        for _ in range(calls):
            call()

    return call if calls == 1 else repeat


def _launches(timings: Sequence[Timing]) -> Row:
    """Host time and share of calls that were launched whole before the device began. Host time of a call that was not would
    hold its waiting for the device.
    """
    if any(t.queued is None for t in timings):
        return {}
    host = [t.host_us for t in timings if t.queued and t.host_us is not None]
    return {"host_us": float(np.median(host)) if host else None, "pct_queued": 100 * len(host) / len(timings)}


def _row(case: Case, variant: Variant, settings: Settings) -> Row:
    return dict.fromkeys(COLUMNS) | {
        "op": case.op, "case": case.name, "variant": variant.name, "kind": "baseline" if variant.baseline else "kernel",
        "backend": variant.backend, "status": "ok", "data": case.data, "shape": dict(case.shape), "dtype": case.dtype,
        "threads": case.threads or settings.threads,
        "cache": "interleaved" if not settings.cuda else "cold" if settings.cold else "warm",
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
        "python_version": platform.python_version(), "git_commit": commit(),
        "binary_source": None if backends.unusable("cpu") else backends.native().source[:12],
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


def _interleave(calls: Mapping[str, Call], reset: Callable[[], None], settings: Settings) -> dict[str, list[Timing]]:
    """Rounds in which each call runs once, in a new (seeded) order each round, until enough of them or of time."""
    order, shuffle = list(calls), random.Random(0).shuffle
    timings: dict[str, list[Timing]] = {name: [] for name in calls}
    clock = cpu_clock
    if settings.cuda:
        clock = CudaClock(settings.device, settings.cold)
        for call in calls.values():
            reset()
            clock.warm_up(call)
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
                timings[name].append(clock(calls[name]))
    finally:
        gc.enable()
    return timings


def _cpu_name() -> str:
    with suppress(OSError, IndexError):
        return Path("/proc/cpuinfo").read_text().partition("model name")[2].splitlines()[0].strip("\t :")
    return platform.processor() or platform.machine()
