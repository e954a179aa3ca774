"""Calls of the Sinkhorn kernels: fields of the structs of csrc/include/dnc/sinkhorn.h, by their names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._op import record


@record
class SinkhornCall(NamedTuple):
    """Arguments of `sinkhorn_assign` and `sinkhorn_plan`."""

    similarity: Tensor  # [N,K], any strides
    group: Tensor | None  # [N] int64, contiguous, negative: left out; None: one group of all
    groups: int
    epsilon: float
    iterations: int
    tolerance: float  # below zero: none
    backend: str


@record
class SinkhornOut(NamedTuple):
    """What the kernel `sinkhorn` makes, those wanted."""

    assignment: Tensor | None = None  # [N] int64
    plan: Tensor | None = None  # [N,K] of the compute dtype, contiguous
    history: Tensor | None = None  # [iterations+1,groups,K] of the compute dtype, contiguous
    steps: Tensor | None = None  # [groups] int64


@record
class PlanOut(NamedTuple):
    """Results of `sinkhorn_plan`."""

    plan: Tensor  # these as in SinkhornOut
    history: Tensor | None  # for the derivative; the reference makes none
    steps: Tensor


@record
class SinkhornBackwardCall(NamedTuple):
    """Arguments of the derivative of `sinkhorn_plan`."""

    similarity: Tensor  # [N,K], any strides
    group: Tensor | None  # [N] int64
    groups: int
    epsilon: float
    history: Tensor  # as `sinkhorn_plan` gave it, like steps
    steps: Tensor
    grad_plan: Tensor  # [N,K] of the plan's dtype, any strides
    backend: str


@record
class SinkhornBackwardOut(NamedTuple):
    """What the kernel `sinkhorn_backward` makes."""

    grad_similarity: Tensor  # [N,K] of the plan's dtype, contiguous
