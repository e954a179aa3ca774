"""Compile a Triton kernel for an architecture that is not here, and read what it became.

An op's own launcher is called on tensors without memory, with a driver that claims to be the architecture: what is compiled is
what would run, with the same specialisation. Registers and spills are read from the machine code.
"""

from __future__ import annotations

import math
import re
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from .machine_code import FEATURES, SHARED_LIMIT, Row, cuobjdump, run, usage

#: Columns of tensor memory a block may have (PTX ISA, tcgen05.alloc).
TENSOR_MEMORY = 512


@dataclass(frozen=True)
class Launch:
    """How a kernel is launched for a shape class, and the meta-parameters worth trying for it.

    prepare: makes inputs of a shape (the keys of a configuration's "when") on a device; returns what launches the kernel.
    candidates: for the tuner, from a shape.
    """

    prepare: Callable[[torch.device, dict[str, int]], Callable[[], None]]
    candidates: Callable[[dict[str, int]], list[dict[str, Any]]]


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
def compiling(arch: int, found: Callable[[Any, Any], None], family: str | None = None) -> Iterator[None]:
    """Compile what is launched inside the block for `arch` instead; `found` gets each kernel and what it compiled to.

    family: alone, with what all families share; kernels of the others are left out.
    """
    from triton.runtime import driver

    from dnc_kernels.ops import _triton

    def record(kernel: Any, grid: tuple[int, ...], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        *_, package, _ = kernel.fn.__module__.split(".")
        if family is not None and package not in (family, "ops"):
            return
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
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        used = usage(run(cuobjdump(), "--dump-resource-usage", file.name))
    return used["REG"], used["STACK"] + used["LOCAL"]


def features(ptx: str) -> list[str]:
    """Which of `FEATURES` a PTX text uses."""
    return [f for f in FEATURES if re.search(rf"^\s*(@!?%\w+ )?{re.escape(f)}\b", ptx, re.MULTILINE)]


def row_of(op: str, kernel: str, config: dict[str, Any], when: dict[str, Any], arch: int, compiled: Any) -> Row:
    """What a kernel compiled to."""
    registers, spills = resources(compiled)
    return Row(
        op=op, kernel=kernel, config=config, when=when, arch=f"sm_{arch}", registers=registers, spills=spills,
        shared_bytes=compiled.metadata.shared, threads=32 * compiled.metadata.num_warps,
        ptx_features=features(compiled.asm["ptx"]),
    )  # fmt: skip
