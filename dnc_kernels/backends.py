"""Which implementation runs: one pure resolver, a user's choice, and why.

Backends: ``reference`` (plain torch, any device, float64 too), ``cpu`` (C++), ``triton`` and ``cuda`` (C++) on NVIDIA GPUs.
The choice comes from an op's ``backend=`` argument, else the innermost `use_backend` block, else the environment variable
``DNC_KERNELS_BACKEND`` (read once, at import), else ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .errors import FLOATS

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
ISAS = ("portable", "avx2", "avx512")

_native: Any = None
NATIVE_ERROR = ""
try:
    _native = import_module("._C", __package__)
except ImportError as error:  # pure-Python checkout, or a binary for another Python
    NATIVE_ERROR = f"the extension dnc_kernels._C cannot be imported: {error}"


@dataclass(frozen=True)
class Kernel:
    """What a backend can do for an op, as data."""

    device: str
    dtypes: tuple[torch.dtype, ...] = FLOATS
    # A CUDA C++ kernel that no GPU has proven is opt-in: `auto` passes it over.
    proven: bool = True
    #: Oldest compute capability.
    capability: tuple[int, int] | None = None
    #: Most sub-centroids a class; None: any number.
    max_subcentroids: int | None = None


_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
#: Oldest compute capability that the GPU kernels are written for.
OLDEST_CAPABILITY = (8, 0)
_TRITON = Kernel("cuda", _HALF_AND_SINGLE, capability=OLDEST_CAPABILITY)
_CPU_AND_TRITON = {"cpu": Kernel("cpu"), "triton": _TRITON}
# a row of the plan lies in registers
_SINKHORN = {**_CPU_AND_TRITON, "triton": replace(_TRITON, max_subcentroids=64)}

#: Kernels of every op beside the reference, best first.
KERNELS: dict[str, dict[str, Kernel]] = {
    "centroid_distance": _CPU_AND_TRITON,
    "class_scores": _CPU_AND_TRITON,
    "nearest_centroid": _CPU_AND_TRITON,
    "centroid_cross_entropy": _CPU_AND_TRITON,
    "subcentroid_cross_entropy": _CPU_AND_TRITON,
    "sinkhorn_assign": _SINKHORN,
    "sinkhorn_plan": _SINKHORN,
    "cluster_sums": _CPU_AND_TRITON,
    "momentum_update_": {**_CPU_AND_TRITON, "cuda": Kernel("cuda", _HALF_AND_SINGLE, proven=False)},
    "apply_momentum_": _CPU_AND_TRITON,
    "normalize_embedding": _CPU_AND_TRITON,
    "upsample_cross_entropy": {**_CPU_AND_TRITON, "cuda": Kernel("cuda", _HALF_AND_SINGLE, proven=False)},
    "upsample_argmax": {**_CPU_AND_TRITON, "cuda": Kernel("cuda", _HALF_AND_SINGLE, proven=False)},
}


@dataclass(frozen=True)
class Resolution:
    """A backend and the reason it was chosen."""

    backend: str
    reason: str


#: Triton kernels run on CPU tensors, under Triton's interpreter: for tests. Triton reads the same variable at its import.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def _probe() -> dict[str, str]:
    """Why each backend cannot run in this process; empty: it can."""
    no_device = "" if torch.cuda.is_available() else "torch sees no CUDA device"
    cuda = NATIVE_ERROR
    if _native is not None and _native.cuda_archs is None:
        cuda = "this build has no CUDA kernels (build with DNC_KERNELS_BUILD=cuda where nvcc is found)"
    elif _native is not None:
        cuda = no_device
    if find_spec("triton") is None:
        triton = "triton is not installed (a CUDA build of torch brings it; else `pip install triton`)"
    else:
        triton = "" if INTERPRETED else no_device
    return {"reference": "", "cpu": NATIVE_ERROR, "triton": triton, "cuda": cuda}


#: Probed once, at import, so that no call does it: backend -> why it cannot run here, or the empty string.
UNUSABLE = _probe()


def unusable(backend: str) -> str:
    """Why `backend` cannot run in this process, or the empty string."""
    return UNUSABLE[backend]


def resolve(
    op: str,
    device: str,
    dtype: torch.dtype,
    choice: str = "auto",
    *,
    capability: tuple[int, int] | None = None,
    subcentroids: int | None = None,
) -> Resolution:
    """Backend for `op`, with the reason. Pure: no environment, no tensor, no side effect.

    Args:
        op: a key of `KERNELS`.
        device: type of the tensors' device.
        dtype: of the inputs; float64 if any of them is.
        choice: a backend, or ``auto``.
        capability: compute capability of a CUDA device; None: not asked about.
        subcentroids: K, where an op's kernels have a limit.

    Raises:
        RuntimeError: a backend named by `choice` cannot run this op here; the message says why.
        ValueError: `choice` is no backend.
    """
    if choice not in BACKENDS:
        raise ValueError(f"{op}: backend must be one of {', '.join(BACKENDS)}; got {choice!r}")
    if choice == "reference":
        return Resolution("reference", "chosen by name")

    def why_not(name: str) -> str:
        kernel = KERNELS[op].get(name)
        if kernel is None:
            return f"{op} has no {name} kernel"
        interpreted = name == choice == "triton" and INTERPRETED and device == "cpu"
        if kernel.device != device and not interpreted:
            return f"the {name} backend runs on {kernel.device} tensors, not {device}"
        if dtype not in kernel.dtypes:
            return f"the {name} kernel does not take {str(dtype).removeprefix('torch.')}"
        if kernel.capability is not None and capability is not None and capability < kernel.capability:
            have, need = (".".join(map(str, pair)) for pair in (capability, kernel.capability))
            return f"the {name} kernel needs compute capability {need}, this GPU has {have}"
        if kernel.max_subcentroids is not None and subcentroids is not None and subcentroids > kernel.max_subcentroids:
            return f"the {name} kernel takes at most {kernel.max_subcentroids} sub-centroids a class, not {subcentroids}"
        return unusable(name)

    if choice != "auto":
        reason = why_not(choice)
        if reason:
            raise RuntimeError(f"{op}: backend {choice!r} was asked for but cannot run: {reason}")
        return Resolution(choice, "chosen by name")
    reasons = []
    for name, kernel in KERNELS[op].items():
        reason = why_not(name) or ("" if kernel.proven else f"no GPU has proven the {name} kernel yet; ask for it by name")
        if not reason:
            return Resolution(name, f"first usable kernel for {device}")
        reasons.append(reason)
    return Resolution("reference", "; ".join(reasons) or f"{op} has only its reference")


def _checked(choice: str, name: str = "backend") -> str:
    if choice not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}; got {choice!r}")
    return choice


_choice = _checked(os.environ.get("DNC_KERNELS_BACKEND", "auto") or "auto", "DNC_KERNELS_BACKEND")


def chosen() -> str:
    """The user's choice in force: `use_backend`, else DNC_KERNELS_BACKEND, else ``auto``."""
    return _choice


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run the ops inside this block on backend `name` (process-wide, as torch's own backend switches are)."""
    global _choice
    before, _choice = _choice, _checked(name)
    try:
        yield
    finally:
        _choice = before


def pick(op: str, x: Tensor, backend: str | None, *others: Tensor, subcentroids: int | None = None) -> str:
    """Backend for a call on `x`: the argument if given, else the choice in force. A float64 tensor among `others` counts."""
    dtype = torch.float64 if any(t.dtype == torch.float64 for t in others) else x.dtype
    return resolve(
        op, x.device.type, dtype, _choice if backend is None else backend,
        capability=capability(x.device.index) if x.device.type == "cuda" else None, subcentroids=subcentroids,
    ).backend  # fmt: skip


@torch.compiler.assume_constant_result
def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; None: the current one."""
    return _capability(index)


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def cpu_isa() -> str:
    """Instruction set that the CPU kernels use now: ``portable``, ``avx2`` or ``avx512``."""
    return ISAS[native().current_isa()]


def usable_isas() -> tuple[str, ...]:
    """Instruction sets this processor can run, slowest first."""
    return ISAS[: native().best_isa() + 1]


@contextmanager
def use_isa(name: str) -> Iterator[None]:
    """Run the CPU kernels inside this block with instruction set `name` (process-wide).

    Raises:
        RuntimeError: this processor cannot run it.
    """
    before = cpu_isa()
    _set_isa(name)
    try:
        yield
    finally:
        _set_isa(before)


def _set_isa(name: str) -> None:
    if name not in ISAS:
        raise ValueError(f"instruction set must be one of {', '.join(ISAS)}; got {name!r}")
    if not native().set_isa(ISAS.index(name)):
        raise RuntimeError(f"this processor cannot run {name}; usable: {', '.join(usable_isas())}")


def native() -> Any:
    """The extension module.

    Raises:
        RuntimeError: it is not built.
    """
    if _native is None:
        raise RuntimeError(f"{NATIVE_ERROR}; run `pip install .` or `python setup.py build_ext --inplace`")
    return _native


if _native is not None and os.environ.get("DNC_KERNELS_CPU_ISA"):
    _set_isa(os.environ["DNC_KERNELS_CPU_ISA"])
