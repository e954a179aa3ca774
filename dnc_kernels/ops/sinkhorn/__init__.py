"""Entropic optimal transport of pixels to the sub-centroids of their class (family page: docs/sinkhorn.md)."""

from __future__ import annotations

import math
from typing import cast

import torch
from torch import Tensor

from ...backends import pick
from ...errors import check_device, check_float, check_integer, check_value
from . import op as ops
from . import reference


def sinkhorn_assign(
    similarity: Tensor,
    group: Tensor,
    num_groups: int,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    tolerance: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Sub-centroid of each pixel by balanced clustering: the argmax of `sinkhorn_plan` (DNC, eq. 5-7), every group in one call.

    Args:
        similarity: [N,K] of pixels and the K sub-centroids of their own group, any strides, read in place; float32, float64,
            float16 or bfloat16.
        group: [N] (or any shape of N elements) integers: class of each pixel in [0,num_groups); negative leaves a pixel out.
        num_groups: G > 0. Groups may have any number of pixels, none included.
        epsilon: entropy weight, finite and > 0, in the unit of `similarity`; the plan stays finite however small it is.
        iterations: T >= 0 pairs of marginal steps, sub-centroids first; 0: the nearest sub-centroid.
        tolerance: None, or >= 0: a group stops once max_k |K * column sum - 1| <= tolerance.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``; None: the choice in force.

    Returns:
        [N] int64 in [0,K); -1 where `group` is negative or a similarity of the pixel is not finite (such a pixel does not count
        in its group). Exact ties go to the lowest index; so does a group whose similarities are all equal. A group of one pixel
        has a uniform plan, and gets its nearest sub-centroid. Not differentiable. Deterministic, and independent of the number
        of threads. Extra memory on CPU: [N,K] floats of the compute type (float64 for float64, else float32), [N] int32, [N]
        floats where the range of similarity/epsilon is above 50, and at most a quarter of [N,K] or one [G,K] (K rounded up to
        a vector).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or number, or a group >= num_groups.
    """
    op = "sinkhorn_assign"
    check_integer(op, "group", group)
    flat, groups, limit = _check(op, similarity, group, num_groups, epsilon, iterations, tolerance)
    backend = pick(op, similarity, backend, C=groups, K=similarity.shape[1])
    if backend == "reference":
        _check_range(op, cast(Tensor, flat), groups)
        with torch.no_grad():
            return reference.sinkhorn(similarity, flat, groups, epsilon, iterations, limit).assignment
    return ops.sinkhorn_assign(similarity.detach(), cast(Tensor, flat), groups, epsilon, iterations, limit, backend)


def sinkhorn_plan(
    similarity: Tensor,
    group: Tensor | None = None,
    num_groups: int | None = None,
    *,
    epsilon: float = 0.05,
    iterations: int = 3,
    tolerance: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Soft assignment of each pixel: the entropic transport plan of its group, rows scaled to sum to 1 (DNC, eq. 5-7).

    Per group of n pixels, from v = 0, T times: ``u[k] = -log K - logsumexp_n(s/epsilon + v)``, then
    ``v[n] = -log n - logsumexp_k(s/epsilon + u)``; at the end ``plan[n] = softmax_k(s[n]/epsilon + u)``. It equals the released
    linear-domain Sinkhorn where that does not overflow.

    Args:
        similarity: [N,K], any strides, read in place; float32, float64, float16 or bfloat16.
        group: None: all pixels form one group. Else [N] (or any shape of N elements) integers in [0,num_groups); negative
            leaves a pixel out.
        num_groups: G > 0, given exactly when `group` is.
        epsilon: entropy weight, finite and > 0, in the unit of `similarity`.
        iterations: T >= 0; 0: the plan is softmax(similarity/epsilon).
        tolerance: None, or >= 0: a group stops once max_k |K * column sum - 1| <= tolerance, for columns of total mass 1 after
            a pixel step.
        backend: ``auto``, ``reference``, ``cpu``, ``triton`` or ``cuda``; None: the choice in force.

    Returns:
        [N,K], float64 for float64 `similarity`, else float32. Rows sum to 1; zero where `group` is negative; NaN where a
        similarity of the pixel is not finite (such a pixel does not count in its group, and gets no gradient). Differentiable
        in `similarity`, once, through all steps taken. Deterministic, and independent of the number of threads. Extra memory on
        CPU beside the result: [N] int32, [N] floats where the range of similarity/epsilon is above 50, [T+1,G,K], and at most a
        quarter of [N,K] or one [G,K] (K rounded up to a vector). The backward pass: its result, [N] int32, and the last again.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or number, or a group >= num_groups.
    """
    op = "sinkhorn_plan"
    flat, groups, limit = _check(op, similarity, group, num_groups, epsilon, iterations, tolerance)
    backend = pick(op, similarity, backend, C=groups, K=similarity.shape[1])
    if backend == "reference":
        if flat is not None:
            _check_range(op, flat, groups)
        return reference.sinkhorn(similarity, flat, groups, epsilon, iterations, limit).plan
    return ops.sinkhorn_plan(similarity, flat, groups, epsilon, iterations, limit, backend)[0]


def _check(
    op: str,
    similarity: Tensor,
    group: Tensor | None,
    num_groups: int | None,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
) -> tuple[Tensor | None, int, float]:
    """Check every argument; return group flat, int64 and contiguous, the number of groups, and the tolerance (-1: none)."""
    check_float(op, "similarity", similarity)
    check_value(similarity.ndim == 2 and similarity.shape[1] > 0, op, "similarity", "[N,K] with K > 0", similarity)
    check_value(0 < epsilon < math.inf, op, "epsilon", "finite and positive", epsilon)
    check_value(iterations >= 0, op, "iterations", "0 or more", iterations)
    check_value(tolerance is None or tolerance >= 0, op, "tolerance", "None or 0 or more", tolerance)
    limit = -1.0 if tolerance is None else float(tolerance)
    if group is None:
        check_value(num_groups is None or num_groups == 1, op, "num_groups", "None or 1 without group", num_groups)
        return None, 1, limit
    check_integer(op, "group", group)
    pixels = similarity.shape[0]
    check_value(group.numel() == pixels, op, "group", lambda: f"[N]=[{pixels}] to match similarity", group)
    check_device(op, "group", group, similarity, "similarity")
    if num_groups is None:
        raise ValueError(f"{op}: num_groups must be given with group; got None (the number of classes)")
    check_value(num_groups > 0, op, "num_groups", "positive", num_groups)
    return group.reshape(-1).to(torch.int64).contiguous(), num_groups, limit


def _check_range(op: str, group: Tensor, num_groups: int) -> None:
    """Raise ValueError for a group >= num_groups, as the kernels do. On CPU only: elsewhere it would wait for the device."""
    if group.device.type != "cpu" or torch.compiler.is_compiling() or type(group) is not Tensor or group.numel() == 0:
        return
    if group.max() >= num_groups:
        pixel = int((group >= num_groups).nonzero()[0])
        raise ValueError(
            f"{op}: group must be below num_groups, or negative to leave a pixel out; got {int(group[pixel])} at pixel {pixel}"
        )


__all__ = ["sinkhorn_assign", "sinkhorn_plan"]
