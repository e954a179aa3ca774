"""Launchers of the C++ embedding kernels (csrc/cpu/embedding.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .._common import view


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    inverse_norm: Tensor,
) -> None:
    """Embedding into `y`, of any strides; statistics [N], contiguous."""
    outputs = (view(t) for t in (y, mean, rstd, inverse_norm))
    native().normalize_embedding(view(x), view(weight), view(bias), eps, *outputs, torch.get_num_threads())


def normalize_backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    inverse_norm: Tensor,
    grad_y: Tensor,
    grad_rstd: Tensor | None,
    grad_x: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
) -> None:
    """Gradients, where given: `grad_x` like x, and may be `grad_y` itself; those of [D] have the compute dtype."""
    native().normalize_embedding_backward(
        view(x), view(weight), view(bias), view(mean), view(rstd), view(inverse_norm), view(grad_y), view(grad_rstd),
        view(grad_x), view(grad_weight), view(grad_bias), torch.get_num_threads(),
    )  # fmt: skip
