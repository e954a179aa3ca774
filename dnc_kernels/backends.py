"""Which implementation runs: one pure resolver, a user's choice, and why.

Backends: ``reference`` (plain torch, any device, float64 too), ``cpu`` (C++), ``cuda`` (C++), later ``triton``.
The choice comes from an op's ``backend=`` argument, else the innermost `use_backend` block, else the environment variable
``DNC_KERNELS_BACKEND`` (read once, at import), else ``auto``.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .errors import FLOATS

BACKENDS = ("auto", "reference", "cpu", "cuda")
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
    # A CUDA or Triton kernel that no GPU has proven is opt-in: `auto` passes it over.
    proven: bool = True


_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
_CPU = {"cpu": Kernel("cpu")}

#: Kernels of every op beside the reference, best first.
KERNELS: dict[str, dict[str, Kernel]] = {
    "centroid_distance": _CPU,
    "class_scores": _CPU,
    "nearest_centroid": _CPU,
    "centroid_cross_entropy": _CPU,
    "subcentroid_cross_entropy": _CPU,
    "sinkhorn_assign": _CPU,
    "sinkhorn_plan": _CPU,
    "cluster_sums": _CPU,
    "momentum_update_": {**_CPU, "cuda": Kernel("cuda", _HALF_AND_SINGLE, proven=False)},
    "apply_momentum_": _CPU,
    "normalize_embedding": _CPU,
    "upsample_cross_entropy": _CPU,
    "upsample_argmax": _CPU,
}


@dataclass(frozen=True)
class Resolution:
    """A backend and the reason it was chosen."""

    backend: str
    reason: str


def _probe() -> dict[str, str]:
    """Why each backend cannot run in this process; empty: it can."""
    cuda = NATIVE_ERROR
    if _native is not None and _native.cuda_archs is None:
        cuda = "this build has no CUDA kernels (build with DNC_KERNELS_BUILD=cuda where nvcc is found)"
    elif _native is not None and not torch.cuda.is_available():
        cuda = "torch sees no CUDA device"
    return {"reference": "", "cpu": NATIVE_ERROR, "cuda": cuda}


#: Probed once, at import, so that no call does it: backend -> why it cannot run here, or the empty string.
UNUSABLE = _probe()


def unusable(backend: str) -> str:
    """Why `backend` cannot run in this process, or the empty string."""
    return UNUSABLE[backend]


def resolve(op: str, device: str, dtype: torch.dtype, choice: str = "auto") -> Resolution:
    """Backend for `op` on a device type and input dtype, with the reason. Pure: no environment, no tensor, no side effect.

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
        if kernel.device != device:
            return f"the {name} backend runs on {kernel.device} tensors, not {device}"
        if dtype not in kernel.dtypes:
            return f"the {name} kernel does not take {str(dtype).removeprefix('torch.')}"
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


def pick(op: str, x: Tensor, backend: str | None) -> str:
    """Backend for a call on `x`: the argument if given, else the choice in force."""
    return resolve(op, x.device.type, x.dtype, _choice if backend is None else backend).backend


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
