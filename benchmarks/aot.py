"""Compile every shipped Triton configuration for every architecture, on a machine without a GPU.

A configuration is compiled by calling the op's own launcher on tensors without memory, with a driver that claims to be the
architecture: what is compiled is what would run, with the same specialisation. Registers and spills are read from the machine
code by cuobjdump, which ships inside triton.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch

FAMILIES = ("similarity", "sinkhorn", "momentum", "embedding", "upsample")
#: Architecture -> shared memory a block may have, in bytes (CUDA C++ programming guide, compute capabilities).
SHARED_LIMIT = {80: 166_912, 90: 232_448, 100: 232_448}
#: Instructions worth knowing about, as they appear in PTX.
FEATURES = (
    "wgmma",
    "tcgen05",
    "mma.sync",
    "cp.async",
    "cp.async.bulk.tensor",
    "mbarrier",
    "setmaxnreg",
    "redux",
    "atom",
    "red.",
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
    """One kernel compiled for one architecture with one configuration."""

    op: str
    kernel: str
    config: dict[str, Any]
    when: dict[str, int]
    arch: str
    registers: int
    spills: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    ptx_features: list[str]


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
        found(kernel, kernel.warmup(*arguments, grid=grid, **options))

    driver.set_active(_Driver(arch))
    _triton._recorder, _triton._kind = record, f"sm_{arch}"
    try:
        yield
    finally:
        _triton._recorder = _triton._kind = None


def resources(compiled: Any) -> tuple[int, int, int]:
    """Registers a thread, bytes spilled to local memory, bytes of stack, as the machine code states them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        usage = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return usage["REG"], usage["LOCAL"], usage["STACK"]


def cases(family: str) -> dict[str, Case]:
    """Kernels of a family that have configurations, with how to launch them."""
    return import_module(f".triton_{family}", __package__).CASES


def compile_one(family: str, kernel: str, arch: int, when: dict[str, int], use: dict[str, Any]) -> list[Row]:
    """Rows of every kernel that the launcher of `kernel` launches; the first is `kernel` itself."""
    from dnc_kernels.ops import _triton

    rows: list[Row] = []

    def found(jit: Any, compiled: Any) -> None:
        registers, local, stack = resources(compiled)
        ptx = compiled.asm["ptx"]
        rows.append(
            Row(
                op=f"{family}.{kernel}", kernel=jit.fn.__name__, config=use, when=when, arch=f"sm_{arch}", registers=registers,
                spills=local, stack_bytes=stack, shared_bytes=compiled.metadata.shared,
                threads=32 * compiled.metadata.num_warps, ptx_features=[f for f in FEATURES if re.search(rf"^\s*(@%?\w+ )?{re.escape(f)}\.", ptx, re.M)],
            )
        )  # fmt: skip

    with _triton.configured(kernel, **use), compiling(arch, found):
        cases(family)[kernel].prepare(torch.device("meta"), when)()
    return rows


def jobs(families: tuple[str, ...] = FAMILIES, archs: tuple[int, ...] = tuple(SHARED_LIMIT)) -> list[tuple[Any, ...]]:
    """Arguments of `compile_one` for every shipped configuration."""
    from dnc_kernels.ops import _triton

    listed = []
    for family in families:
        for arch in archs:
            for kernel, entries in _triton.stored(family, f"sm_{arch}").items():
                listed += [(family, kernel, arch, entry["when"], entry["use"]) for entry in entries]
    return listed
