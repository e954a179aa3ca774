"""What a benchmark is made of: a case, who solves it, how it is measured, and how far from right a result may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from dnc_kernels import backends
from dnc_kernels.backends import Backend

from .clock import Call

Row = dict[str, Any]
#: Which baselines run: all, all but compiled ones, compiled ones for headline cases only, or none.
BASELINES = ("all", "eager", "headline", "none")


@dataclass(frozen=True)
class Settings:
    """How to measure; the same for all cases of a run."""

    device: str = "cpu"
    threads: int = 2
    rounds: int = 100
    budget_s: float = 20.0  # for the rounds of one case, once 5 of them are made
    quick: bool = False  # tiny shapes
    large: bool = False  # CUDA: the cases that take seconds and tens of GB, too
    baselines: str = "all"  # one of BASELINES
    autotuned: bool = False  # CUDA: also baselines that torch.compile has tuned, for minutes
    memory: bool = True
    cold: bool = True  # CUDA: flush the L2 cache before each call
    dtypes: tuple[str, ...] = ("float32",)

    @property
    def cuda(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.startswith("cuda")

    @property
    def listed(self) -> bool:
        """Whether cases can only be listed here: they are for a GPU, and there is none."""
        return self.cuda and not torch.cuda.is_available()

    @property
    def score_dtypes(self) -> tuple[str, ...]:
        """Dtypes of cases on scores and similarities, which our ops return in float32 whatever the features are."""
        return tuple(dict.fromkeys(("float32", *self.dtypes)))

    def goals(self, dtype: str, least: dict[str, float]) -> dict[str, float]:
        """The goals that apply: they are set for float32 on the CPU at full size."""
        return {} if self.cuda or self.quick or dtype != "float32" else least

    def generator(self) -> torch.Generator:
        """Seeded source of a case's inputs, which are drawn where they are used."""
        return torch.Generator(self.device).manual_seed(0)


@dataclass(frozen=True)
class Variant:
    """One way to solve a case: `prepare` gets the inputs and returns the call that is timed, with everything counted in it."""

    name: str
    prepare: Callable[[Any], Call]
    baseline: bool = True
    compiled: bool = False
    backend: str = "torch"


@dataclass(frozen=True)
class Case:
    """A problem: inputs, what is right, and who solves it."""

    op: str
    name: str
    shape: Mapping[str, int]
    dtype: str
    inputs: Call
    reference: Callable[[Any], Any]  # of the inputs, in float64
    check: Callable[[Any, Any], float]  # (result, reference) -> worst error / allowed error; above 1 is wrong
    variants: Sequence[Variant]
    data: str = "random"
    reset: Callable[[Any], None] | None = None  # of the inputs before every call, untimed: for ops that work in place
    flops: float = 0.0  # the useful ones
    bytes: float = 0.0  # read and written at least
    allowed_extra_bytes: float | None = None
    goals: Mapping[str, float] = field(default_factory=dict)  # baseline, or "best" -> least ratio
    headline: bool = False  # one of the few whose compiled baselines a short run can afford
    threads: int | None = None  # instead of the settings'
    calls: int = 1  # of a timing, of which a row has the mean: for calls of microseconds


def dtype_of(name: str) -> torch.dtype:
    """The torch dtype called `name`."""
    dtype: torch.dtype = getattr(torch, name)
    return dtype


def kernels(
    settings: Settings,
    dtype: str,
    ops: Sequence[str],
    prepare: Callable[[Backend], Callable[[Any], Call]],
    sizes: Mapping[str, int],
    layout: str | None = None,
) -> list[Variant]:
    """A variant for every backend that has all of `ops` here for these sizes and layout; the reference where none has.

    `prepare` gets its name. `layout`: of the pixels (`backends.layout`); None: it does not matter.
    """
    usable = []
    known = {key: size for key, size in sizes.items() if key in ("N", "C", "K", "D")}
    kind = torch.device(settings.device).type
    # Triton's interpreter, which runs on CPU tensors, is no way to measure
    for backend in set(get_args(Backend)) - {"auto", "reference", *(() if settings.cuda else ("triton",))}:
        if settings.listed:
            written = [backends.KERNELS[op].get(backend) for op in ops]
            if all(k and k.device == kind and not k.refuses(backend, dtype_of(dtype), None, layout, known) for k in written):
                usable.append(backend)
            continue
        capability = backends.capability(None) if settings.cuda else None
        with suppress(RuntimeError):
            for op in ops:
                backends.resolve(op, kind, dtype_of(dtype), backend, capability=capability, layout=layout, **known)
            usable.append(backend)
    return [Variant(f"dnc_{b}", prepare(b), baseline=False, backend=b) for b in sorted(usable) or ["reference"]]


def compiled(
    settings: Settings, name: str, function: Callable[..., Any], prepare: Callable[[Callable[..., Any]], Callable[[Any], Call]]
) -> list[Variant]:
    """`function` under torch.compile; where the settings say so also tuned. `prepare` gets the compiled function."""
    made = [Variant(f"{name}_compiled", prepare(torch.compile(function, dynamic=False)), compiled=True)]
    if settings.cuda and settings.autotuned:
        tuned = torch.compile(function, dynamic=False, mode="max-autotune-no-cudagraphs")
        made.append(Variant(f"{name}_autotuned", prepare(tuned), compiled=True))
    return made


def error_ratio(actual: Tensor, expected: Tensor, allowed: Tensor | float) -> float:
    """Worst |actual - expected| / allowed; inf for another shape or a NaN."""
    if actual.shape != expected.shape:
        return math.inf
    worst = ((actual.double() - expected).abs() / allowed).max().item() if actual.numel() else 0.0
    return math.inf if math.isnan(worst) else worst


def norm_ratio(actual: Tensor, expected: Tensor, share: float) -> float:
    """`error_ratio` of the whole: |actual - expected| over `share` of |expected|."""
    off = (actual.double() - expected).norm()
    return error_ratio(off, torch.zeros_like(off), share * expected.norm())


def choice_ratio(choice: Tensor, scores: Tensor, margin: float) -> float:
    """Check of an argmax: how far the chosen score [N] of `scores` [N,K] lies below the best, over the rounding margin."""
    if choice.shape != scores.shape[:1] or not bool(((choice >= 0) & (choice < scores.shape[1])).all()):
        return math.inf
    return error_ratio(scores.gather(1, choice.long()[:, None])[:, 0], scores.amax(1), margin)
