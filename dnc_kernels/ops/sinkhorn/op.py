"""Sinkhorn as torch ops, forward and backward, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, kernels


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn_assign", mutates_args=())
def sinkhorn_assign(
    similarity: Tensor, group: Tensor, num_groups: int, epsilon: float, iterations: int, tolerance: float, backend: str
) -> Tensor:
    """Assignment [N]."""
    assignment = torch.empty_like(group)
    kernels("sinkhorn", backend).sinkhorn(
        similarity, group, num_groups, epsilon, iterations, tolerance, assignment, None, None, None
    )
    return assignment


@sinkhorn_assign.register_fake
def _(
    similarity: Tensor, group: Tensor, num_groups: int, epsilon: float, iterations: int, tolerance: float, backend: str
) -> Tensor:
    return torch.empty_like(group)


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn_plan", mutates_args=())
def sinkhorn_plan(
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int,
    epsilon: float,
    iterations: int,
    tolerance: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Plan [N,K], history [iterations+1,G,K] for the backward pass, steps [G]."""
    plan, history, steps = _outputs(similarity, num_groups, iterations)
    kernels("sinkhorn", backend).sinkhorn(
        similarity, group, num_groups, epsilon, iterations, tolerance, None, plan, history, steps
    )
    return plan, history, steps


@sinkhorn_plan.register_fake
def _(
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int,
    epsilon: float,
    iterations: int,
    tolerance: float,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _outputs(similarity, num_groups, iterations)


def _outputs(similarity: Tensor, num_groups: int, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(similarity)
    return (
        similarity.new_empty(tuple(similarity.shape), dtype=dtype),
        similarity.new_empty((iterations + 1, num_groups, similarity.shape[1]), dtype=dtype),
        similarity.new_empty(num_groups, dtype=torch.int64),
    )


@torch.library.custom_op(f"{NAMESPACE}::sinkhorn_plan_backward", mutates_args=())
def sinkhorn_plan_backward(
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int,
    epsilon: float,
    history: Tensor,
    steps: Tensor,
    grad_plan: Tensor,
    backend: str,
) -> Tensor:
    """Gradient [N,K] of the similarity,, in the plan's dtype."""
    grad = history.new_empty(tuple(similarity.shape))
    kernels("sinkhorn", backend).sinkhorn_backward(similarity, group, num_groups, epsilon, history, steps, grad_plan, grad)
    return grad


@sinkhorn_plan_backward.register_fake
def _(
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int,
    epsilon: float,
    history: Tensor,
    steps: Tensor,
    grad_plan: Tensor,
    backend: str,
) -> Tensor:
    return history.new_empty(tuple(similarity.shape))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    similarity, group, ctx.num_groups, ctx.epsilon, *_, ctx.backend = inputs
    _, history, steps = output
    ctx.save_for_backward(similarity, group, history, steps)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, grad_plan: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    if grad_plan is None:
        return (None,) * 7
    similarity, group, history, steps = ctx.saved_tensors
    grad = sinkhorn_plan_backward(
        similarity, group, ctx.num_groups, ctx.epsilon, history, steps, grad_plan.to(history.dtype), ctx.backend
    )
    return grad.to(similarity.dtype), *(None,) * 6


sinkhorn_plan.register_autograd(_backward, setup_context=_setup_context)
for _op in (sinkhorn_assign, sinkhorn_plan, sinkhorn_plan_backward):
    keep_dtypes_under_autocast(_op)
