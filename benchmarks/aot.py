"""Resources of every kernel on every architecture, on a machine without a GPU: Triton's here, CUDA C++'s in aot_cuda.py.

Every shipped Triton configuration is compiled for every architecture.

A configuration is compiled by calling the op's own launcher on tensors without memory, with a driver that claims to be the
architecture: what is compiled is what would run, with the same specialisation. Registers and spills are read from the machine
code by cuobjdump, which ships inside triton.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from importlib import import_module
from itertools import chain
from multiprocessing import get_context
from typing import Any

import torch

FAMILIES = ("similarity", "sinkhorn", "momentum", "embedding", "upsample")
#: Architectures that code and configurations are shipped for.
ARCHS = (80, 90, 100)
#: Architecture -> shared memory a block may have, in bytes (CUDA C++ programming guide, compute capabilities). 8.9 is as 8.6.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
#: Columns of tensor memory a block may have (PTX ISA, tcgen05.alloc).
TENSOR_MEMORY = 512
#: Instructions worth knowing about, as a line of PTX begins.
FEATURES = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async", "mbarrier", "redux", "atom", "red", "ld.local", "st.local")
#: What multiplies matrices of 16 bits on an architecture, at its full rate.
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
#: Triton kernels of products: they must use the tensor cores.
PRODUCTS = re.compile(
    r"^_?(class_scores|scores_gradient|centroid_(gradient|loss|distance)|nearest_centroid|subcentroid_\w+)_kernel$"
)


@dataclass(frozen=True)
class Case:
    """How a kernel is launched for a shape class, and the meta-parameters worth trying for it.

    prepare: makes inputs of a shape (the keys of a configuration's "when") on a device; returns what launches the kernel.
    candidates: for the tuner, from a shape.
    """

    prepare: Callable[[torch.device, dict[str, int]], Callable[[], None]]
    candidates: Callable[[dict[str, int]], list[dict[str, Any]]]


@dataclass(frozen=True)
class Row:
    """One kernel compiled for one architecture with one configuration; `spills` are bytes of stack and local memory a thread.

    Of CUDA C++ kernels `shared_bytes` is the static part and `threads` 0: the launch decides. Their `ptx_features` are read
    from machine code.
    """

    op: str
    kernel: str
    config: dict[str, Any]
    when: dict[str, int]
    arch: str
    registers: int
    spills: int
    shared_bytes: int
    threads: int
    ptx_features: list[str]
    backend: str = "triton"
    fences: int = 0  # of the whole device, between matrix products


class _Driver:
    """Claims to be a GPU of an architecture, which is also the device's index: compiled kernels are cached by it."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    def get_current_target(self) -> Any:
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", self.arch, 32)

    def get_current_device(self) -> int:
        return self.arch

    def get_current_stream(self, _: int) -> int:
        return 0


@contextmanager
def compiling(arch: int, found: Callable[[Any, Any], None]) -> Iterator[None]:
    """Compile what is launched inside the block for `arch` instead; `found` gets each kernel and what it compiled to."""
    from triton.runtime import driver

    from dnc_kernels.ops import _triton

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        compiled = kernel.warmup(*arguments, grid=grid, **options)
        columns = getattr(compiled.metadata, "tmem_size", None) or 0
        if columns > TENSOR_MEMORY:  # Triton would not load it
            raise RuntimeError(
                f"{kernel.fn.__name__} needs {columns} columns of tensor memory; a block may have {TENSOR_MEMORY}"
            )
        found(kernel, compiled)

    driver.set_active(_Driver(arch))
    _triton._recorder, _triton._kind = record, _triton.architecture(divmod(arch, 10))
    _triton._kind_shared = SHARED_LIMIT[arch]
    try:
        yield
    finally:
        _triton._recorder = _triton._kind = None
        _triton._kind_shared = math.inf


@contextmanager
def product_precision(when: dict[str, int]) -> Iterator[None]:
    """Torch's setting for float32 products that a shape class stands for: bits 19 are tf32."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if when.get("bits") == 19 else "ieee"
    try:
        yield
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


def resources(compiled: Any) -> tuple[int, int]:
    """Registers and bytes of local memory a thread, as the machine code states them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["STACK"] + usage["LOCAL"]


def features(ptx: str) -> list[str]:
    """Which of `FEATURES` a PTX text uses."""
    return [f for f in FEATURES if re.search(rf"^\s*(@!?%\w+ )?{re.escape(f)}\b", ptx, re.MULTILINE)]


def cases(family: str) -> dict[str, Case]:
    """Kernels of a family that have configurations, with how to launch them."""
    return import_module(f".triton_{family}", __package__).CASES


def row_of(op: str, kernel: str, config: dict[str, Any], when: dict[str, Any], arch: int, compiled: Any) -> Row:
    """What a kernel compiled to."""
    registers, spills = resources(compiled)
    return Row(
        op=op, kernel=kernel, config=config, when=when, arch=f"sm_{arch}", registers=registers, spills=spills,
        shared_bytes=compiled.metadata.shared, threads=32 * compiled.metadata.num_warps,
        ptx_features=features(compiled.asm["ptx"]),
    )  # fmt: skip


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


def faults(row: Row) -> list[str]:
    """What must not ship."""
    arch = int(row.arch.removeprefix("sm_"))
    found = []
    if row.spills:
        found.append(f"spills {row.spills} bytes")
    if row.shared_bytes > SHARED_LIMIT[arch]:
        found.append(f"needs {row.shared_bytes} bytes of shared memory; a block may have {SHARED_LIMIT[arch]}")
    found += [f"has {name}" for name in ("ld.local", "st.local") if name in row.ptx_features]
    if row.fences:
        found.append(f"has {row.fences} device-wide fences between products")
    needed = _needed(row, arch)
    if needed and needed not in row.ptx_features:
        found.append(f"has no {needed}")
    return found


def _needed(row: Row, arch: int) -> str | None:
    """The instruction that a kernel must have: for its products, or in place of a body."""
    if row.backend == "triton":
        return TENSOR_CORE[arch] if PRODUCTS.search(row.kernel) and row.when.get("bits") == 16 else None
    # a CUDA C++ kernel says in its name whose tensor cores it is for; wgmma is on 9.0 alone, and one without a body must fail
    if "_sm90_kernel" in row.kernel:
        return "wgmma" if arch == 90 else "trap"
    if "_sm80_kernel" in row.kernel:
        return "mma.sync" if arch != 90 else "trap"
    return None


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
            sources.append(_cuda_rows(families, archs, options.jobs))
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
    # triton reads it where kernels are defined, here and in the processes that compile
    if os.environ.pop("TRITON_INTERPRET", ""):
        print("TRITON_INTERPRET is ignored: the interpreter compiles nothing", file=sys.stderr)
    sys.exit(main())
