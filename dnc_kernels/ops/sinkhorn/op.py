"""Sinkhorn as torch ops, forward and backward, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._tensors import compute_dtype
from .._common import kernels
from .._op import Op, save_call, saved_call
from . import reference
from .calls import PlanOut, SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut


def _assignment_out(call: SinkhornCall) -> Tensor:
    return call.similarity.new_empty(call.similarity.shape[0], dtype=torch.int64)


def _launch_assign(call: SinkhornCall, assignment: Tensor) -> None:
    kernels("sinkhorn", call.backend).sinkhorn(call, SinkhornOut(assignment))


def _plan_out(call: SinkhornCall) -> PlanOut:
    similarity, dtype = call.similarity, compute_dtype(call.similarity)
    return PlanOut(
        similarity.new_empty(similarity.shape, dtype=dtype),
        similarity.new_empty((call.iterations + 1, call.groups, similarity.shape[1]), dtype=dtype),
        similarity.new_empty(call.groups, dtype=torch.int64),
    )


def _launch_plan(call: SinkhornCall, out: PlanOut) -> None:
    kernels("sinkhorn", call.backend).sinkhorn(call, SinkhornOut(None, *out))


def _gradient_out(call: SinkhornBackwardCall) -> Tensor:
    return call.history.new_empty(call.similarity.shape)


def _launch_backward(call: SinkhornBackwardCall, grad: Tensor) -> None:
    kernels("sinkhorn", call.backend).sinkhorn_backward(call, SinkhornBackwardOut(grad))


sinkhorn_assign = Op("sinkhorn", "sinkhorn_assign", _assignment_out, reference.sinkhorn_assign, launch=_launch_assign)
sinkhorn_plan = Op("sinkhorn", "sinkhorn_plan", _plan_out, reference.sinkhorn_plan, launch=_launch_plan)
sinkhorn_plan_backward = Op("sinkhorn", "sinkhorn_plan_backward", _gradient_out, launch=_launch_backward)


def _save(ctx: Any, out: PlanOut, call: SinkhornCall) -> None:
    save_call(ctx, call, out.history, out.steps)


def _backward(ctx: Any, grad_plan: Tensor) -> tuple[Tensor]:
    (similarity, group, groups, epsilon, _, _, backend), (history, steps) = saved_call(ctx)
    assert history is not None and steps is not None
    grad_plan = grad_plan.to(history.dtype)
    call = SinkhornBackwardCall(similarity, group, groups, epsilon, history, steps, grad_plan, backend)
    return (sinkhorn_plan_backward(call).to(similarity.dtype),)


sinkhorn_plan.differentiable(("similarity",), ("plan",), _save, _backward)
