"""What a kernel compiled to on an architecture, what of that must not ship, and the tools that read it."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from typing import Any

#: Architectures that code and configurations are shipped for.
ARCHS = (80, 90, 100)
#: Architecture -> shared memory a block may have, in bytes (CUDA C++ programming guide, compute capabilities). 8.9 is as 8.6.
SHARED_LIMIT = {80: 166_912, 86: 101_376, 90: 232_448, 100: 232_448, 120: 101_376}
#: Instructions worth knowing about, as a line of PTX begins.
FEATURES = ("wgmma", "tcgen05.mma", "mma.sync", "cp.async", "mbarrier", "redux", "atom", "red", "ld.local", "st.local")
#: What multiplies matrices of 16 bits on an architecture, at its full rate.
TENSOR_CORE = {80: "mma.sync", 86: "mma.sync", 90: "wgmma", 100: "tcgen05.mma", 120: "mma.sync"}
#: Triton kernels of products: they must use the tensor cores.
PRODUCTS = re.compile(
    r"^_?(class_scores|scores_gradient|centroid_(gradient|loss|distance)|head_gradient|nearest_centroid|subcentroid_\w+)_kernel$"
)


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


@cache
def cuobjdump() -> str:
    """NVIDIA's reader of machine code: the one inside triton, else what PATH has."""
    try:
        from triton import knobs
    except ImportError:
        return "cuobjdump"
    return str(knobs.nvidia.cuobjdump.path)


def run(*command: str) -> str:
    """What a command prints.

    Raises:
        RuntimeError: it fails; with the end of what it says.
    """
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout


def usage(dump: str) -> dict[str, int]:
    """REG, STACK, SHARED and LOCAL of one kernel, from ``cuobjdump --dump-resource-usage``."""
    return {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", dump)}
