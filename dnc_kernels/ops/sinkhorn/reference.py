"""Plain torch: what the Sinkhorn kernels must equal. Log domain, all groups at once, any dtype and device, differentiable."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..._tensors import compute_dtype
from .._common import check_label_range
from .calls import PlanOut, SinkhornCall, SinkhornOut


def sinkhorn_assign(call: SinkhornCall) -> Tensor:
    """Assignment [N]; raises for a label at or beyond the number of groups."""
    assignment = _checked("sinkhorn_assign", call).assignment
    assert assignment is not None
    return assignment


def sinkhorn_plan(call: SinkhornCall) -> PlanOut:
    """Plan [N,K] and steps [G]; raises for a label at or beyond the number of groups."""
    _, plan, history, steps = _checked("sinkhorn_plan", call)
    assert plan is not None and steps is not None
    return PlanOut(plan, history, steps)


def _checked(op: str, call: SinkhornCall) -> SinkhornOut:
    if call.group is not None:
        check_label_range(op, call.group, call.groups)
    return sinkhorn(call)


def sinkhorn(call: SinkhornCall) -> SinkhornOut:
    """Every group solved; a label at or beyond the number of groups leaves its pixel out. No history."""
    similarity, group, num_groups, epsilon, iterations, tolerance, _ = call
    pixels, width = similarity.shape
    dtype = compute_dtype(similarity)
    s = similarity.to(dtype)
    if group is None:
        group = torch.zeros(pixels, dtype=torch.int64, device=s.device)
    inside = (group >= 0) & (group < num_groups)
    used = inside & s.isfinite().all(1)
    # row num_groups collects what is left out
    target = torch.where(used, group, num_groups)
    index = target[:, None].expand(-1, width)
    s = torch.where(used[:, None], s, 0)
    count = torch.zeros(num_groups + 1, dtype=torch.int64, device=s.device).index_add(0, target, torch.ones_like(target))

    def largest(x: Tensor) -> Tensor:  # [G+1,K], not differentiated: it cancels
        m = x.new_full((num_groups + 1, width), -math.inf).scatter_reduce(0, index, x.detach(), "amax")
        return torch.where(m.isfinite(), m, 0)

    def log_sum(x: Tensor) -> Tensor:
        m = largest(x)
        total = torch.zeros_like(m).index_add(0, target, torch.exp(x - m[target]))
        return m + torch.where(count[:, None] > 0, total, 1).log()

    # a constant per group changes u alone; the limits keep every number finite at any epsilon
    far, top = (1e30, torch.finfo(torch.float32).max) if dtype == torch.float32 else (1e300, torch.finfo(torch.float64).max)
    peak = largest(s).amax(1, keepdim=True)
    z = ((s - peak[target]).clamp(-top, top) * min(1 / epsilon, far)).clamp(min=-far)

    u = z.new_zeros(num_groups + 1, width)
    v = z.new_zeros(pixels, 1)
    steps = torch.zeros_like(count)
    done = count == 0
    for t in range(iterations):
        updated = -math.log(width) - log_sum(z + v)
        if t > 0 and tolerance >= 0:
            # the updated u divides by the column sums of the coupling that stands
            done = done | (((u - updated).exp() - 1).abs().amax(1) <= tolerance)
        u = torch.where(done[:, None], u, updated)
        steps = steps + (~done).to(steps.dtype)
        v = -count[target].to(dtype).log()[:, None] - (z + u[target]).logsumexp(1, keepdim=True)

    score = z + u[target]
    plan = torch.where(used[:, None], score.softmax(1), 0)
    plan = torch.where((inside & ~used)[:, None], math.nan, plan)
    alone = (count[target] == 1) | (iterations == 0)
    assignment = torch.where(alone, s.argmax(1), score.argmax(1)) if pixels else target
    return SinkhornOut(torch.where(used, assignment, -1), plan, None, steps[:-1])
