"""Which implementation runs: one pure resolver, a user's choice, and why.

Backends: ``reference`` (plain torch, any device, float64 too), ``cpu`` (C++), ``triton`` and ``cuda`` (C++) on NVIDIA GPUs.
The choice comes from an op's ``backend=`` argument, else the innermost `use_backend` block, else the environment variable
``DNC_KERNELS_BACKEND`` (read once, at import), else ``auto``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from . import _evidence
from .errors import FLOATS

#: What ``backend=`` may be.
Backend = Literal["auto", "reference", "cpu", "triton", "cuda"]
BACKENDS: tuple[str, ...] = get_args(Backend)
Isa = Literal["portable", "avx2", "avx512", "amx"]
ISAS: tuple[str, ...] = get_args(Isa)

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
    #: False: `auto` passes it over unless a GPU of the same capability has proven this build's source (`unproven`).
    proven: bool = True
    #: Oldest compute capability.
    capability: tuple[int, int] | None = None
    #: The only compute capabilities; empty: any from `capability` on.
    capabilities: tuple[tuple[int, int], ...] = ()
    #: Most sub-centroids a class; None: any number.
    max_subcentroids: int | None = None
    #: Most classes; None: any number.
    max_classes: int | None = None
    #: Most channels; None: any number.
    max_channels: int | None = None
    #: The channels come in groups of this many.
    channel_multiple: int = 1
    #: What `layout` may say of the pixels; empty: anything.
    layouts: tuple[str, ...] = ()

    def refuses(
        self, name: str, dtype: torch.dtype, capability: tuple[int, int] | None, layout: str | None, sizes: Mapping[str, int]
    ) -> str:
        """Why this kernel of backend `name` does not take a call, or the empty string. What is None or absent is not asked."""
        if dtype not in self.dtypes:
            return f"the {name} kernel does not take {str(dtype).removeprefix('torch.')}"
        if capability is not None and self.capability is not None and capability < self.capability:
            return f"the {name} kernel needs compute capability {_dotted(self.capability)}, this GPU has {_dotted(capability)}"
        if capability is not None and self.capabilities and capability not in self.capabilities:
            only = " or ".join(map(_dotted, self.capabilities))
            return f"the {name} kernel is for compute capability {only}, this GPU has {_dotted(capability)}"
        if self.max_subcentroids is not None and sizes.get("K", 0) > self.max_subcentroids:
            return f"the {name} kernel takes at most {self.max_subcentroids} sub-centroids a class, not {sizes['K']}"
        if self.max_classes is not None and sizes.get("C", 0) > self.max_classes:
            return f"the {name} kernel takes at most {self.max_classes} classes, not {sizes['C']}"
        if self.max_channels is not None and sizes.get("D", 0) > self.max_channels:
            return f"the {name} kernel takes at most {self.max_channels} channels, not {sizes['D']}"
        if self.channel_multiple > 1 and sizes.get("D", 0) % self.channel_multiple:
            return f"the {name} kernel takes channels in groups of {self.channel_multiple}, not {sizes['D']}"
        if self.layouts and layout is not None and layout not in self.layouts:
            return f"the {name} kernel takes pixels as {' or '.join(self.layouts)} of 16-byte units"
        return ""


def _dotted(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


#: What the CUDA C++ kernels of a family take at most, as fields of `Kernel`; csrc/include/dnc says it.
_LIMITS: dict[str, dict[str, Any]] = getattr(_native, "cuda_limits", {})
_HALF = (torch.float16, torch.bfloat16)
_HALF_AND_SINGLE = (torch.float32, torch.float16, torch.bfloat16)
#: Oldest compute capability that the GPU kernels are written for.
OLDEST_CAPABILITY = (8, 0)
_TRITON = Kernel("cuda", _HALF_AND_SINGLE, capability=OLDEST_CAPABILITY)
_UNPROVEN_CUDA = Kernel("cuda", _HALF_AND_SINGLE, proven=False, capability=OLDEST_CAPABILITY)
_CPU_AND_TRITON = {"cpu": Kernel("cpu"), "triton": _TRITON}
# a row of the plan lies in registers
_SINKHORN = {
    **_CPU_AND_TRITON,
    "triton": replace(_TRITON, max_subcentroids=64),
    "cuda": replace(_UNPROVEN_CUDA, **_LIMITS.get("sinkhorn", {})),
}

_CUDA_SIMILARITY = replace(_UNPROVEN_CUDA, dtypes=_HALF, layouts=("rows", "planes"), **_LIMITS.get("similarity", {}))
_SCORES = {**_CPU_AND_TRITON, "cuda": _CUDA_SIMILARITY}

#: Kernels of every op beside the reference, best first.
KERNELS: dict[str, dict[str, Kernel]] = {
    "centroid_distance": _CPU_AND_TRITON,
    "class_scores": _SCORES,
    "nearest_centroid": _SCORES,
    "centroid_cross_entropy": _SCORES,
    "subcentroid_cross_entropy": _CPU_AND_TRITON,
    "sinkhorn_assign": _SINKHORN,
    "sinkhorn_plan": _SINKHORN,
    "cluster_sums": {**_CPU_AND_TRITON, "cuda": _UNPROVEN_CUDA},
    "momentum_update_": {**_CPU_AND_TRITON, "cuda": _UNPROVEN_CUDA},
    "apply_momentum_": {**_CPU_AND_TRITON, "cuda": _UNPROVEN_CUDA},
    "normalize_embedding": {**_CPU_AND_TRITON, "cuda": _UNPROVEN_CUDA},
    "upsample_cross_entropy": {**_CPU_AND_TRITON, "cuda": _UNPROVEN_CUDA},
    "upsample_argmax": {**_CPU_AND_TRITON, "cuda": _UNPROVEN_CUDA},
    # no function of ops: the step of nn.DNCHead, around kernels of the other families. With backend "cuda" its own are Triton's
    "head_step": {"cpu": Kernel("cpu"), "triton": replace(_TRITON, max_subcentroids=64, max_classes=1024)},
}


#: Family of every op, by which kernels are proven.
FAMILY = {
    op: family
    for family, ops in {
        "similarity": (
            "centroid_distance", "class_scores", "nearest_centroid", "centroid_cross_entropy", "subcentroid_cross_entropy"
        ),
        "sinkhorn": ("sinkhorn_assign", "sinkhorn_plan"),
        "momentum": ("cluster_sums", "momentum_update_", "apply_momentum_"),
        "embedding": ("normalize_embedding",),
        "upsample": ("upsample_cross_entropy", "upsample_argmax"),
        "head": ("head_step",),
    }.items()
    for op in ops
}  # fmt: skip


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


#: Proofs that hold for this build's CUDA C++ kernels, by family and compute capability.
PROOFS = _evidence.valid(_evidence.read_proofs(), getattr(getattr(_native, "cuda", None), "sources", {}))
#: Measured choices, by op and compute capability.
DISPATCH = _evidence.read_dispatch()


def unusable(backend: str) -> str:
    """Why `backend` cannot run in this process, or the empty string."""
    return UNUSABLE[backend]


def unproven(op: str, name: str, capability: tuple[int, int] | None) -> str:
    """Why `auto` may not choose the kernel of backend `name`, or the empty string: no GPU of the capability has proven it."""
    if KERNELS[op][name].proven or (capability is not None and (FAMILY.get(op, ""), capability) in PROOFS):
        return ""
    like_this = "" if capability is None else f" of compute capability {_dotted(capability)}"
    return f"no GPU{like_this} has proven the {name} kernel yet; ask for it by name"


def proven_on(op: str) -> tuple[str, ...]:
    """GPUs that have proven this build's CUDA C++ kernel of `op`, with their compute capabilities."""
    return tuple(f"{p.device} ({_dotted(p.capability)})" for (family, _), p in PROOFS.items() if family == FAMILY[op])


def without_code(name: str, capability: tuple[int, int] | None) -> str:
    """Why this build's CUDA C++ kernels have no machine code for a capability, or the empty string."""
    archs = getattr(_native, "cuda_archs", None)
    if name != "cuda" or capability is None or archs is None or runs_on(archs, *capability):
        return ""
    return f"this build has no code for compute capability {_dotted(capability)} (it was built for {archs})"


def runs_on(archs: str, major: int, minor: int) -> bool:
    """Whether a binary for `archs` (as CMake writes them, separated by spaces) has code for compute capability `major.minor`.

    SASS runs on its own major version from its own minor on, and PTX on anything newer; with suffix a either runs on exactly
    its own capability, with f on its own major version.
    """
    for arch in archs.split():
        parts = re.fullmatch(r"(\d+)(\d)([af]?)(-real|-virtual)?", arch)
        if parts is None:
            continue
        built = int(parts[1]), int(parts[2])
        within = parts[3] == "f" or parts[4] == "-real"
        if built == (major, minor) or (parts[3] != "a" and built < (major, minor) and (built[0] == major or not within)):
            return True
    return False


def resolve(
    op: str,
    device: str,
    dtype: torch.dtype,
    choice: str = "auto",
    *,
    capability: tuple[int, int] | None = None,
    layout: str | None = None,
    **sizes: int,
) -> Resolution:
    """Backend for `op`, with the reason. Pure: no environment, no tensor, no side effect.

    Args:
        op: a key of `KERNELS`.
        device: type of the tensors' device.
        dtype: of the inputs; float64 if any of them is.
        choice: a backend, or ``auto``.
        capability: compute capability of a CUDA device; None: not asked about.
        layout: of the pixels, as the function of that name says; None: not asked about.
        sizes: N, C, K and D, as far as they are known: for the limits of kernels and the measured classes.

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
        return kernel.refuses(name, dtype, capability, layout, sizes) or without_code(name, capability) or unusable(name)

    if choice != "auto":
        reason = why_not(choice)
        if reason:
            raise RuntimeError(f"{op}: backend {choice!r} was asked for but cannot run: {reason}")
        return Resolution(choice, "chosen by name")
    reasons = {name: why_not(name) or unproven(op, name, capability) for name in KERNELS[op]}
    usable = [name for name, reason in reasons.items() if not reason]
    if not usable:
        return Resolution("reference", "; ".join(reasons.values()) or f"{op} has only its reference")
    if capability is not None and (op, capability) in DISPATCH:
        found = _evidence.nearest(DISPATCH[op, capability], sizes, 8 * dtype.itemsize, layout)
        if found is not None and found.backend in usable:
            return Resolution(found.backend, f"measured faster in {found.rows}")
    return Resolution(usable[0], f"first usable kernel for {device}")


def _checked(choice: str, name: str = "backend") -> str:
    if choice not in BACKENDS:
        raise ValueError(f"{name} must be one of {', '.join(BACKENDS)}; got {choice!r}")
    return choice


_default = _checked(os.environ.get("DNC_KERNELS_BACKEND", "auto") or "auto", "DNC_KERNELS_BACKEND")
#: The choice in force in this thread or task.
_choice = ContextVar("backend", default=_default)
#: The last of the choices in force in the process, of the blocks that are open: a graph of torch.compile cannot read a context
#: variable, and is traced anew where a global that it has read changes.
_choice_of_graphs = _default
_open_blocks: dict[object, str] = {}


def chosen() -> str:
    """The user's choice in force: `use_backend`, else DNC_KERNELS_BACKEND, else ``auto``."""
    return _choice_of_graphs if torch.compiler.is_compiling() else _choice.get()


@contextmanager
def use_backend(name: Backend) -> Iterator[None]:
    """Run the ops inside this block on backend `name`.

    Each thread and each task of asyncio chooses for itself. Backward passes run on what their forward pass ran on. Functions of
    torch.compile take the choice made last in the process, whatever thread made it.
    """
    global _choice_of_graphs
    block, token = object(), _choice.set(_checked(name))
    _open_blocks[block] = _choice_of_graphs = name
    try:
        yield
    finally:
        _choice.reset(token)
        del _open_blocks[block]
        _choice_of_graphs = next(reversed([_default, *_open_blocks.values()]))


#: Ops whose kernels read features in place, channels or pixels side by side: measured choices hold for a `layout` each.
LAYOUTS_APART = frozenset(op for op in KERNELS if FAMILY[op] in ("similarity", "momentum", "embedding")) - {"apply_momentum_"}
_recorded: list[tuple[str, dict[str, int | str]]] | None = None


@contextmanager
def recorded_calls() -> Iterator[list[tuple[str, dict[str, int | str]]]]:
    """Collect the op and the shape class of every call inside this block (process-wide), in the words of measured choices."""
    global _recorded
    before, _recorded = _recorded, []
    try:
        yield _recorded
    finally:
        _recorded = before


def transformed() -> bool:
    """Whether a transform of torch.func or forward-mode differentiation is at work, which kernels do not see: then every op is
    its reference, which torch differentiates, batches and linearises as its own.
    """
    return forward_ad._current_level >= 0 or _in_functorch()


_in_functorch: Callable[[], bool] = torch._C._are_functorch_transforms_active


def pick(op: str, x: Tensor, backend: str | None, *others: Tensor, **sizes: int) -> str:
    """Backend for a call on `x`: the argument if given, else the choice in force. A float64 tensor among `others` counts.

    `sizes` are those of `resolve`; N and D are read from x [N,D] or [B,D,H,W] where they are not given.
    """
    choice = chosen() if backend is None else backend
    if forward_ad._current_level >= 0 or _in_functorch():  # what `transformed` says, without a call
        if choice in BACKENDS[2:]:
            raise RuntimeError(
                f"{op}: backend {choice!r} was asked for but cannot run: a kernel sees no transform of torch.func and no "
                'forward-mode derivative; leave the choice to "auto", which takes the reference here'
            )
        return "reference"
    dtype = x.dtype
    for t in others:
        if t.dtype == torch.float64:
            dtype = torch.float64
    if x.is_cpu and choice in ("auto", "cpu") and _recorded is None:  # what `resolve` says, in a tenth of the time
        kernel = KERNELS[op].get("cpu")
        if kernel is not None and dtype in kernel.dtypes and not UNUSABLE["cpu"]:
            return "cpu"
    # not x.shape[2:].numel(), which makes numbers of symbolic sizes under torch.export; no op takes x without channels
    sizes = {"N": x.numel() // x.shape[1], "D": x.shape[1], **sizes}
    kind, gpu = x.device.type, capability(x.device.index) if x.device.type == "cuda" else None
    if x.is_cuda and _recorded is None and not torch.compiler.is_compiling() and type(x) is Tensor:
        return _remembered(op, dtype, choice, gpu, layout(x), tuple(sizes.items()))
    if _recorded is not None:
        _recorded.append((op, {**sizes, "bits": 8 * dtype.itemsize} | ({"layout": layout(x)} if op in LAYOUTS_APART else {})))
    # asked where it decides only: a question about strides under torch.compile(dynamic=True) may split a graph in two
    possible = {
        name: k for name, k in KERNELS[op].items()
        if choice == name or (choice == "auto" and k.device == kind and not unproven(op, name, gpu))
    }  # fmt: skip
    measured = DISPATCH.get((op, gpu), ()) if gpu is not None and len(possible) > 1 else ()
    asked = any(k.layouts for k in possible.values()) or any("layout" in entry.when for entry in measured)
    return resolve(op, kind, dtype, choice, capability=gpu, layout=layout(x) if asked else None, **sizes).backend


@lru_cache(maxsize=4096)
def _remembered(
    op: str, dtype: torch.dtype, choice: str, gpu: tuple[int, int] | None, pixels: str, sizes: tuple[tuple[str, int], ...]
) -> str:
    """What `resolve` says of tensors of a GPU. It takes 10 us, as long as some kernels."""
    return resolve(op, "cuda", dtype, choice, capability=gpu, layout=pixels, **dict(sizes)).backend


def layout(x: Tensor) -> str:
    """How x [N,D] or [B,D,H,W] lies in 16-byte units, pixel after pixel without a gap between the lines or samples of a map:
    ``rows`` (channels side by side, as [N,D] and channels_last are), ``planes`` (pixels side by side, NCHW), else ``strided``.
    """
    if x.ndim not in (2, 4):
        return "strided"
    unit = 16 // x.dtype.itemsize
    if x.ndim == 2:
        return "rows" if x.stride(1) == 1 and x.stride(0) % unit == 0 and x.stride(0) >= x.shape[1] else "strided"
    samples, channels, height, width = x.shape
    sample, channel, line, step = x.stride()
    if height != 1 and line != width * step:  # a crop
        return "strided"
    if channel == 1 and step % unit == 0 and step >= channels and (samples == 1 or sample == height * width * step):
        return "rows"
    # where they begin cannot be traced: `_cuda.aligned` sees to it
    if step == 1 and channel % unit == 0 and channel >= height * width and (samples == 1 or (sample % unit == 0 < sample)):
        return "planes"
    return "strided"


def capability(index: int | None) -> tuple[int, int]:
    """Compute capability of a CUDA device; None: the current one."""
    return _capability(index)


# all that torch.compiler.assume_constant_result does; the decorator would import the compiler
capability._dynamo_marked_constant = True  # type: ignore[attr-defined]


@cache
def _capability(index: int | None) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def cpu_isa() -> str:
    """Instruction set that the CPU kernels use now: ``portable``, ``avx2``, ``avx512`` or ``amx``."""
    return ISAS[native().current_isa()]


def usable_isas() -> tuple[str, ...]:
    """Instruction sets this processor can run, slowest first."""
    return ISAS[: native().best_isa() + 1]


@contextmanager
def use_isa(name: Isa) -> Iterator[None]:
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


#: ``signature(values)``: bytes that tell calls apart by dtypes, devices and shapes of tensors, and by other plain values; None
#: where one is not plain, as a tensor subclass is, or where the extension is not built.
signature: Callable[[tuple[Any, ...]], bytes | None] = getattr(_native, "signature", lambda values: None)

if _native is not None and os.environ.get("DNC_KERNELS_CPU_ISA"):
    _set_isa(os.environ["DNC_KERNELS_CPU_ISA"])
