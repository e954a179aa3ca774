"""Resources of every kernel on every architecture, on a machine without a GPU.

Every shipped Triton configuration is compiled for every architecture (aot_triton.py), or with --sweep calls of other shapes
(triton_sweep.py); CUDA C++ kernels are read from the extension, or compiled (aot_cuda.py).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict
from importlib import import_module
from itertools import chain
from multiprocessing import get_context
from typing import Any

import torch

from .aot_triton import Launch, compiling, product_precision, row_of
from .families import CUDA_FAMILIES, FAMILIES
from .machine_code import ARCHS, SHARED_LIMIT, Row, faults


def cases(family: str) -> dict[str, Launch]:
    """Kernels of a family that have configurations, with how to launch them."""
    return import_module(f".triton_{family}", __package__).CASES


def compile_one(family: str, kernel: str, arch: int, when: dict[str, int], use: dict[str, Any]) -> list[Row]:
    """Rows of every kernel that the launcher of `kernel` launches; the first is `kernel` itself."""
    from dnc_kernels.ops import _triton

    rows: list[Row] = []

    def found(jit: Any, compiled: Any) -> None:
        rows.append(row_of(f"{family}.{kernel}", jit.fn.__name__, use, when, arch, compiled))

    with product_precision(when), _triton.configured(kernel, **use), compiling(arch, found):
        cases(family)[kernel].prepare(torch.device("meta"), when)()
    return rows


def jobs(families: Sequence[str] = FAMILIES, archs: Sequence[int] = ARCHS, every: int = 1) -> list[tuple[Any, ...]]:
    """Arguments of `compile_one` for every so many of the shipped configurations, the first of each kernel among them.

    Architectures take turns: with as many as `every`, most shape classes are compiled for one of them.
    """
    from dnc_kernels.ops import _triton

    return [
        (family, kernel, arch, entry["when"], entry["use"])
        for family in families
        for turn, arch in enumerate(archs)
        for kernel, entries in _triton.stored(family, f"sm_{arch}").items()
        for i, entry in enumerate(entries)
        if i == 0 or i % every == turn % every
    ]


def _compile(job: tuple[Any, ...]) -> list[Row]:
    return compile_one(*job)


def _triton_rows(work: Sequence[tuple[Any, ...]], processes: int) -> Iterator[Row]:
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        for rows in pool.map(_compile, work):
            yield from rows


def _cuda_rows(families: Sequence[str], archs: Sequence[int], processes: int) -> Iterator[Row]:
    from . import aot_cuda

    if reason := aot_cuda.missing():
        print(f"CUDA C++ kernels are left out: {reason}", file=sys.stderr)
        return
    yield from aot_cuda.rows(families, archs, processes)


def main(arguments: Sequence[str] | None = None) -> int:
    """Compile and print; 1 where a kernel spills, overflows shared memory or misses the tensor cores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.aot", description=main.__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object a line; else a table")
    parser.add_argument("--family", action="append", choices=FAMILIES, help="all; may be repeated")
    parser.add_argument("--backend", action="append", choices=("triton", "cuda"), help="both; may be repeated")
    parser.add_argument("--arch", action="append", type=int, choices=list(SHARED_LIMIT), help="all; may be repeated")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)), help="processes (one a core)")
    parser.add_argument("--sweep", action="store_true", help="Triton kernels at shapes between those of the configurations")
    parser.add_argument("--every", type=int, default=1, help="every so many Triton configurations, or calls of the sweep (1)")
    options = parser.parse_args(arguments)
    families, faults_of = options.family or FAMILIES, faults
    if options.sweep:
        from . import triton_sweep

        faults_of = triton_sweep.faults
        sources = [triton_sweep.rows(families, options.arch or tuple(SHARED_LIMIT), options.every)]
    else:
        archs, backends, sources = options.arch or ARCHS, options.backend or ("triton", "cuda"), []
        if "triton" in backends:
            sources.append(_triton_rows(jobs(families, archs, options.every), options.jobs))
        if "cuda" in backends:
            sources.append(_cuda_rows([f for f in families if f in CUDA_FAMILIES], archs, options.jobs))
    compiled = failed = 0
    for row in chain.from_iterable(sources):
        wrong = faults_of(row)
        compiled, failed = compiled + 1, failed + bool(wrong)
        if options.json:
            print(json.dumps({**asdict(row), "faults": wrong}), flush=True)
            continue
        config = " ".join(f"{k}={v}" for k, v in row.config.items())
        print(
            f"{row.arch:6s} {row.kernel:28s} {row.registers:3d} registers, {row.spills} B spilled, "
            f"{row.shared_bytes:6d} B shared, {' '.join(row.ptx_features)}; {row.when} {config} {'; '.join(wrong)}",
            flush=True,
        )
    used = os.times()
    seconds = used.user + used.system + used.children_user + used.children_system
    print(f"{compiled} kernels, {failed} with a fault, {seconds:.0f} CPU seconds", file=sys.stderr)
    return int(failed > 0)


if __name__ == "__main__":
    # triton and the package read it where they are imported, which is later, here and in the processes that compile
    if os.environ.pop("TRITON_INTERPRET", ""):
        print("TRITON_INTERPRET is ignored: the interpreter compiles nothing", file=sys.stderr)
    sys.exit(main())
