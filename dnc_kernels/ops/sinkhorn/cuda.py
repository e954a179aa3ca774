"""Launchers of the CUDA C++ Sinkhorn kernels (csrc/cuda/sinkhorn.cu, sinkhorn_backward.cu), with the functions of native.py."""

from __future__ import annotations

from torch import Tensor

from .._cuda import launch


def sinkhorn(
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int,
    epsilon: float,
    iterations: int,
    tolerance: float,
    assignment: Tensor | None,
    plan: Tensor | None,
    history: Tensor | None,
    steps: Tensor | None,
) -> None:
    """Write those of assignment [N] int64, plan [N,K], history [iterations+1,G,K] and steps [G] int64 that are given.

    Memory: 36 G K + 16 G + 10 N bytes. One cooperative launch, and one to clear a part of that memory.
    """
    launch(
        "sinkhorn", similarity, similarity, group, num_groups, epsilon, iterations, tolerance, assignment, plan, history, steps
    )


def sinkhorn_backward(
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int,
    epsilon: float,
    history: Tensor,
    steps: Tensor,
    grad_plan: Tensor,
    grad: Tensor,
) -> None:
    """Write grad [N,K] float32, the gradient of the similarity, from `history` and `steps` as `sinkhorn` wrote them.

    Memory: 32 G K + 20 G + 10 N bytes. One cooperative launch, and one to clear a part of that memory.
    """
    launch("sinkhorn_backward", similarity, similarity, group, num_groups, epsilon, history, steps, grad_plan, grad)
