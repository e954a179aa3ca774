"""What a run on a GPU (gpu_run.py) measures, and its child processes: ``python -m benchmarks.gpu_steps WHAT REQUEST``.

A child of its own for everything that touches the GPU: the run itself never does, so nothing there can take it along.
"""

from __future__ import annotations

import csv
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from .built import other
from .families import CUDA_FAMILIES, source
from .record import Line, append

#: op and case of a benchmark, * for all of its cases.
Chosen = tuple[str, str]

#: What the first run times, the most telling first.
TIMES: tuple[Chosen, ...] = (
    ("centroid_cross_entropy", "ade20k"), ("nearest_centroid", "ade20k"), ("class_scores", "ade20k"),
    ("sinkhorn_assign", "ade20k"), ("momentum_update_", "ade20k"), ("normalize_embedding", "nchw"),
    ("upsample_cross_entropy", "ade20k_large_x4"), ("subcentroid_cross_entropy", "ade20k"),
    ("centroid_cross_entropy", "cityscapes"), ("upsample_argmax", "ade20k_large_x4"), ("centroid_cross_entropy", "imagenet"),
    ("head_step", "8x512x512 C=150"),
)  # fmt: skip
_OPS = (
    "centroid_cross_entropy", "nearest_centroid", "class_scores", "sinkhorn_assign", "momentum_update_",
    "upsample_cross_entropy", "normalize_embedding", "upsample_argmax", "subcentroid_cross_entropy",
    "sinkhorn_plan", "cluster_sums", "apply_momentum_", "clustering_and_momentum", "centroid_distance",
)  # fmt: skip
ROWS: tuple[Chosen, ...] = tuple((op, "*") for op in _OPS)
HEAD: tuple[Chosen, ...] = (("head_step", "*"), ("segmentation_step", "*"))
#: Where float16 and float32 pixels take other kernels than bfloat16.
OTHER_DTYPES: tuple[Chosen, ...] = (
    ("centroid_cross_entropy", "ade20k"), ("nearest_centroid", "ade20k"), ("class_scores", "ade20k"),
    ("momentum_update_", "ade20k"), ("normalize_embedding", "nchw"), ("subcentroid_cross_entropy", "ade20k"),
)  # fmt: skip
#: The training step that is traced.
TRACED: Chosen = ("head_step", "8x512x512 C=150")
#: op, case, backend and the kernel (a regular expression) that ncu looks at.
PROFILES = (
    ("centroid_cross_entropy", "ade20k", "cuda", "loss_sm90"),
    ("centroid_cross_entropy", "ade20k", "triton", "centroid_loss"),
)
#: op -> family and name of the Triton kernel that its configurations are of.
KERNELS = {
    "centroid_cross_entropy": ("similarity", "centroid_loss"), "class_scores": ("similarity", "class_scores"),
    "nearest_centroid": ("similarity", "nearest_centroid"),
    "subcentroid_cross_entropy": ("similarity", "subcentroid_cross_entropy"),
    "upsample_cross_entropy": ("upsample", "log_sum_exp"), "upsample_argmax": ("upsample", "argmax"),
}  # fmt: skip


def environment(request: Line) -> int:
    """A line on the machine: versions, the GPU, the extension, and why that has to be built (`build`; empty: it need not)."""
    import torch

    line: Line = {
        "event": "environment", "python": platform.python_version(), "torch": torch.__version__,
        **{name: _version(name) for name in ("triton", "numpy", "pytest", "pytest-xdist", "pytest-timeout")},
        "cores": len(os.sched_getaffinity(0)), "gpu": "", "build": "",
    }  # fmt: skip
    if torch.cuda.is_available():
        from dnc_kernels._evidence import slug

        gpu = torch.cuda.get_device_properties(0)
        line |= {
            "gpu": gpu.name, "folder": slug(gpu.name), "capability": (gpu.major, gpu.minor), "cuda": torch.version.cuda,
            "memory_gb": round(gpu.total_memory / 1e9), "multiprocessors": gpu.multi_processor_count,
        }  # fmt: skip
    line["build"] = reason = _build(line.get("capability"))
    if not reason:
        from dnc_kernels import backends

        line |= {"sources": backends.native().cuda.sources, "archs": backends.native().cuda_archs}
    append(Path(request["record"]), line)
    print(json.dumps(line, indent=1))
    return 0


def _build(capability: tuple[int, int] | None) -> str:
    """Why the extension cannot serve on this GPU as it is, or the empty string."""
    from dnc_kernels import backends

    if backends._native is None:
        return backends.NATIVE_ERROR
    if backends._native.cuda_archs is None:
        return "the extension has no CUDA kernels"
    if old := [family for family in CUDA_FAMILIES if backends.native().cuda.sources.get(family) != source(family)]:
        return f"the extension was built from other source ({', '.join(old)})"
    if why := other():
        return why
    return backends.without_code("cuda", capability)


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "missing"


def rows(request: Line) -> int:
    """Rows of the chosen cases, each as soon as it is known; ends by itself once its seconds are over."""
    from .suite import case_rows, select

    end, record = time.monotonic() + request["seconds"], Path(request["record"])
    settings = _settings(request)
    cases = select(settings)
    for op, name in request["cases"]:
        for case in cases:
            this = [op, case.name, case.dtype]
            if case.op != op or this in request["skip"] or not (name in ("*", case.name) or request["dry"]):
                continue
            append(record, {"event": "begin", "step": request["step"], "case": this})
            if time.monotonic() > end:
                append(record, {"event": "dropped", "step": " ".join(this), "reason": "its time was over"})
                continue
            for row in case_rows([case], settings):
                append(record, row)
    return 0


def _settings(request: Line) -> Any:
    from .case import Settings

    dry = request["dry"]
    return Settings(
        device="cpu" if dry else "cuda", threads=1 if dry else 8, rounds=2 if dry else 100, budget_s=1.0, quick=dry,
        memory=not dry, baselines=request.get("baselines", "none"), dtypes=tuple(request.get("dtypes", ("bfloat16",))),
    )  # fmt: skip


def _prepared(request: Line, case: Chosen, backend: str | None = None) -> Callable[[], Any]:
    """The call of a case's kernel, of a backend where one is named."""
    from .suite import select

    op, name = case
    cases = [c for c in select(_settings(request), [op]) if request["dry"] or c.name == name]
    variants = [v for v in cases[0].variants if not v.baseline]
    variant = next((v for v in variants if v.backend == backend), variants[0])
    return _call(cases[0], variant)


def _call(case: Any, variant: Any) -> Callable[[], None]:
    """The call of a case's variant, on inputs of its own that are put back before each."""
    inputs = case.inputs()
    run = variant.prepare(inputs)

    def call() -> None:
        if case.reset:
            case.reset(inputs)
        run()

    return call


def call(request: Line) -> int:
    """Call one case four times, for a profiler that looks at one launch."""
    import torch

    run = _prepared(request, tuple(request["case"]), request["backend"])
    for _ in range(4):
        run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return 0


def trace(request: Line) -> int:
    """A Chrome trace of one training step of the head, after three that warm it up."""
    from torch import profiler

    run = _prepared(request, TRACED)
    for _ in range(3):
        run()
    with profiler.profile(record_shapes=True) as steps:
        run()
    steps.export_chrome_trace(request["to"])
    print(steps.key_averages().table(sort_by=f"self_{'cpu' if request['dry'] else 'device'}_time_total", row_limit=40))
    return 0


def kernels(request: Line) -> int:
    """Which kernels the chosen cases spend their time in: for every variant of ours a line with a call's launches and
    microseconds by name, the longest first. The L2 cache is as the call before left it.
    """
    import torch
    from torch import profiler

    from .harness import chosen
    from .suite import select

    end, record, settings = time.monotonic() + request["seconds"], Path(request["record"]), _settings(request)
    cases = [c for op, name in request["cases"] for c in select(settings, [op]) if request["dry"] or c.name == name]
    activity = profiler.ProfilerActivity.CUDA if settings.cuda else profiler.ProfilerActivity.CPU
    calls = 3
    for case in cases:
        for variant, _ in chosen(case, settings):
            line = {"op": case.op, "case": case.name, "dtype": case.dtype, "variant": variant.name}
            if time.monotonic() > end:
                append(
                    record, {"event": "dropped", "step": " ".join(["kernels", *line.values()]), "reason": "its time was over"}
                )
                continue
            run = _call(case, variant)
            for _ in range(3):
                run()
            if settings.cuda:
                torch.cuda.synchronize()
            with profiler.profile(activities=[activity]) as seen:
                for _ in range(calls):
                    run()
                if settings.cuda:
                    torch.cuda.synchronize()
            attribute = f"self_{'device' if settings.cuda else 'cpu'}_time_total"
            spent = [(getattr(e, attribute) / calls, e.count / calls, _short(e.key)) for e in seen.key_averages()]
            spent = sorted((e for e in spent if e[0] > 0), reverse=True)
            listed = [{"kernel": name, "launches": round(count, 2), "us": round(us, 1)} for us, count, name in spent[:40]]
            total = {"launches": round(sum(e[1] for e in spent), 1), "us": round(sum(e[0] for e in spent), 1)}
            append(record, {"event": "kernels", **line, **total, "kernels": listed})
    return 0


def _short(kernel: str) -> str:
    """A kernel's name without types, of which torch's have hundreds of characters; what tells them apart comes first."""
    name = kernel.removeprefix("void ").replace("at::native::", "").replace("(anonymous namespace)::", "")
    return name.replace("dnc::cuda::", "")[:90]


def metrics(output: str) -> dict[str, dict[str, str]]:
    """Kernel -> metric -> value and unit, from what ``ncu --csv --page details`` prints after the program's own output."""
    lines = output.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith('"ID"')), len(lines))
    found: dict[str, dict[str, str]] = {}
    for row in csv.DictReader(lines[start:]):
        if row.get("Metric Name"):
            value = f"{row.get('Metric Value')} {row.get('Metric Unit') or ''}".strip()
            found.setdefault((row.get("Kernel Name") or "").partition("(")[0], {})[row["Metric Name"]] = value
    return found


def worst(rows: Iterable[Line], count: int = 2) -> list[tuple[str, str, str]]:
    """Family, kernel and op of the Triton kernels that lose most time against their limit, by the probes of their rows."""
    lost: dict[str, float] = {}
    for row in rows:
        if row.get("backend") == "triton" and row["op"] in KERNELS and row.get("p50_ms"):
            share = max(row.get("pct_gemm_probe") or 0, row.get("pct_copy_probe") or 0) / 100
            lost[row["op"]] = max(lost.get(row["op"], 0.0), row["p50_ms"] * (1 - share))
    order = sorted(lost, key=lost.__getitem__, reverse=True) or list(KERNELS)
    return [(*KERNELS[op], op) for op in order[:count]]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the child that is named; its request is a JSON object."""
    what, request = arguments or sys.argv[1:]
    return {"environment": environment, "rows": rows, "call": call, "kernels": kernels, "trace": trace}[what](
        json.loads(request)
    )


if __name__ == "__main__":
    sys.exit(main())
