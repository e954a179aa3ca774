"""The C++ Sinkhorn kernels as torch ops."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import native
from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, view


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn_assign", mutates_args=(), device_types="cpu")
def sinkhorn_assign(
    similarity: Tensor, group: Tensor, num_groups: int, epsilon: float, iterations: int, tolerance: float
) -> Tensor:
    """Assignment [N] (csrc/cpu/sinkhorn.cpp)."""
    assignment = torch.empty_like(group)
    none = view(None)
    native().sinkhorn(
        view(similarity), view(group), num_groups, epsilon, iterations, tolerance, view(assignment), none, none, none,
        torch.get_num_threads(),
    )  # fmt: skip
    return assignment


@sinkhorn_assign.register_fake
def _(similarity: Tensor, group: Tensor, num_groups: int, epsilon: float, iterations: int, tolerance: float) -> Tensor:
    return torch.empty_like(group)


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn_plan", mutates_args=(), device_types="cpu")
def sinkhorn_plan(
    similarity: Tensor, group: Tensor | None, num_groups: int, epsilon: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan [N,K], history [iterations+1,G,K] for the backward pass, steps [G] (csrc/cpu/sinkhorn.cpp)."""
    plan, history, steps = _outputs(similarity, num_groups, iterations)
    native().sinkhorn(
        view(similarity), view(group), num_groups, epsilon, iterations, tolerance, view(None), view(plan), view(history),
        view(steps), torch.get_num_threads(),
    )  # fmt: skip
    return plan, history, steps


@sinkhorn_plan.register_fake
def _(
    similarity: Tensor, group: Tensor | None, num_groups: int, epsilon: float, iterations: int, tolerance: float
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(similarity, num_groups, iterations)


def _outputs(similarity: Tensor, num_groups: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(similarity)
    return (
        similarity.new_empty(tuple(similarity.shape), dtype=dtype),
        similarity.new_empty((iterations + 1, num_groups, similarity.shape[1]), dtype=dtype),
        similarity.new_empty(num_groups, dtype=torch.int64),
    )


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn_plan_backward", mutates_args=(), device_types="cpu")
def sinkhorn_plan_backward(
    similarity: Tensor, group: Tensor | None, num_groups: int, epsilon: float, history: Tensor, steps: Tensor, grad_plan: Tensor
) -> Tensor:
    """Gradient [N,K] of the similarity, in the plan's dtype (csrc/cpu/sinkhorn_backward.cpp)."""
    grad = history.new_empty(tuple(similarity.shape))
    native().sinkhorn_backward(
        view(similarity), view(group), num_groups, epsilon, view(history), view(steps), view(grad_plan), view(grad),
        torch.get_num_threads(),
    )  # fmt: skip
    return grad


@sinkhorn_plan_backward.register_fake
def _(
    similarity: Tensor, group: Tensor | None, num_groups: int, epsilon: float, history: Tensor, steps: Tensor, grad_plan: Tensor
) -> Tensor:
    return history.new_empty(tuple(similarity.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    similarity, group, ctx.num_groups, ctx.epsilon = inputs[:4]
    _, history, steps = output
    ctx.save_for_backward(similarity, group, history, steps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_plan: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_plan is None:
        return None, None, None, None, None, None
    similarity, group, history, steps = ctx.saved_tensors
    grad = sinkhorn_plan_backward(similarity, group, ctx.num_groups, ctx.epsilon, history, steps, grad_plan.to(history.dtype))
    return grad.to(similarity.dtype), None, None, None, None, None


sinkhorn_plan.register_autograd(_backward, setup_context=_setup_context)
for _op in (sinkhorn_assign, sinkhorn_plan, sinkhorn_plan_backward):
    keep_dtypes_under_autocast(_op)
