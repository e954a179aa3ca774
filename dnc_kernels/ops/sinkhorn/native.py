"""Launchers of the C++ Sinkhorn kernels (csrc/cpu/sinkhorn.cpp, sinkhorn_backward.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .._common import view


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
    """Into those given: assignment [N] int64; plan [N,K], history [iterations+1,G,K], both of the compute dtype; steps [G]."""
    native().sinkhorn(
        view(similarity), view(group), num_groups, epsilon, iterations, tolerance, view(assignment), view(plan), view(history),
        view(steps), torch.get_num_threads(),
    )  # fmt: skip


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
    """Gradient [N,K] of the similarity, in the compute dtype."""
    native().sinkhorn_backward(
        view(similarity), view(group), num_groups, epsilon, view(history), view(steps), view(grad_plan), view(grad),
        torch.get_num_threads(),
    )  # fmt: skip
