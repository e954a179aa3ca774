"""Launchers of the CUDA C++ embedding kernels (csrc/cuda/embedding*.cu); the functions are those of native.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import launch


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
    """Embedding into `y`, of any strides; statistics [N], contiguous. One launch."""
    launch("normalize_embedding", x, x, weight, bias, eps, y, mean, rstd, inverse_norm)


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
    """Gradients, where given: `grad_x` like x, and may be `grad_y` itself; those of [D] float32. One launch, or two."""
    launch(
        "normalize_embedding_backward", x,
        x, weight, bias, mean, rstd, inverse_norm, grad_y, grad_rstd, grad_x, grad_weight, grad_bias,
    )  # fmt: skip
