"""Calls of the embedding kernels: fields of the structs of csrc/include/dnc/embedding.h, by their names."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._op import record


@record
class NormalizeCall(NamedTuple):
    """Arguments of `normalize_embedding`."""

    x: Tensor  # [N,D] or [B,D,H,W]
    weight: Tensor | None  # [D], contiguous, of the compute dtype
    bias: Tensor | None  # likewise
    eps: float
    backend: str


@record
class NormalizeOut(NamedTuple):
    """Results of `normalize_embedding`."""

    y: Tensor  # like x, any strides
    mean: Tensor  # [N]; this and the next two contiguous, of the compute dtype
    rstd: Tensor  # [N]
    inverse_norm: Tensor  # [N]


@record
class NormalizeBackwardCall(NamedTuple):
    """Arguments of the derivative of `normalize_embedding`: its own, its statistics, and the gradients of y and rstd."""

    x: Tensor
    weight: Tensor | None
    bias: Tensor | None
    mean: Tensor
    rstd: Tensor
    inverse_norm: Tensor
    grad_y: Tensor  # the shape of x, any strides
    grad_rstd: Tensor | None  # [N], contiguous
    backend: str


@record
class NormalizeBackwardOut(NamedTuple):
    """Gradients, those wanted."""

    grad_x: Tensor | None  # like x, any strides; may be grad_y itself
    grad_weight: Tensor | None  # [D] of the compute dtype
    grad_bias: Tensor | None  # likewise
