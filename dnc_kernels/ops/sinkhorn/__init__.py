"""Entropic optimal transport of pixels to the sub-centroids of their class (family page: docs/sinkhorn.md)."""

from __future__ import annotations

import math

from torch import Tensor

from ..._tensors import check_ignore_index, flat_labels, flat_pixels, like_pixels, pixel_map, without_ignored
from ...backends import Backend, pick
from ...errors import MOST, check_float, check_number, check_value, renamed, whole_number
from .._common import check_labels, remembered
from . import op as ops
from .calls import SinkhornCall


@renamed(group="labels", num_groups="num_classes")
def sinkhorn_assign(
    similarity: Tensor,
    labels: Tensor,
    num_classes: int,
    *,
    ignore_index: int = -100,
    epsilon: float = 0.05,
    iterations: int = 3,
    tolerance: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Sub-centroid of each pixel by balanced clustering: the argmax of `sinkhorn_plan` (DNC, eq. 5-7), every class in one call.

    Args:
        similarity: [N,K] or [B,K,H,W], of pixels and the K sub-centroids of their own class, as `class_scores` gives it
            (`own_similarity`; read in place, as are rows of any strides); float32, float64, float16 or bfloat16.
        labels: [N] or [B,H,W] (for rows any shape of N elements), any integer dtype, in [0,num_classes); `ignore_index` or any
            negative id leaves a pixel out.
        num_classes: C > 0. Classes may have any number of pixels, none included.
        ignore_index: outside [0,num_classes).
        epsilon: entropy weight, finite and > 0, in the unit of `similarity`; the plan stays finite however small it is.
        iterations: T >= 0 pairs of marginal steps, sub-centroids first; 0: the nearest sub-centroid.
        tolerance: None, or >= 0: a class stops once max_k |K * column sum - 1| <= tolerance.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        [N] or [B,H,W] int64 in [0,K); -1 where a pixel is left out or its similarities are not all finite (such a pixel does
        not count in its class). Exact ties go to the lowest index; so does a class whose similarities are all equal. A class
        of one pixel has a uniform plan, and gets its nearest sub-centroid. Not differentiable. Deterministic, and independent
        of the number of threads. Extra memory on CPU: [N,K] floats of the compute type (float64 for float64, else float32),
        [N] int32, [N] floats where the range of similarity/epsilon is above 50, and at most a quarter of [N,K] or one [C,K]
        (K rounded up to a vector).

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or number; on CPU also a label at or beyond num_classes that is not
            `ignore_index` (on a GPU it is left out).
    """
    op = "sinkhorn_assign"
    call = _call(op, similarity, labels, num_classes, ignore_index, epsilon, iterations, tolerance, backend)
    if similarity.requires_grad:
        call = call._replace(similarity=call.similarity.detach())
    return like_pixels(similarity, ops.sinkhorn_assign(call))


@renamed(group="labels", num_groups="num_classes")
def sinkhorn_plan(
    similarity: Tensor,
    labels: Tensor | None = None,
    num_classes: int | None = None,
    *,
    ignore_index: int = -100,
    epsilon: float = 0.05,
    iterations: int = 3,
    tolerance: float | None = None,
    backend: Backend | None = None,
) -> Tensor:
    """Soft assignment of each pixel: the entropic transport plan of its class, rows scaled to sum to 1 (DNC, eq. 5-7).

    Per class of n pixels, from v = 0, T times: ``u[k] = -log K - logsumexp_n(s/epsilon + v)``, then
    ``v[n] = -log n - logsumexp_k(s/epsilon + u)``; at the end ``plan[n] = softmax_k(s[n]/epsilon + u)``. It equals the
    linear-domain Sinkhorn of the authors' code where that does not overflow.

    Args:
        similarity: [N,K] or [B,K,H,W], as of `sinkhorn_assign`.
        labels: None: all pixels form one class. Else [N] or [B,H,W], any integer dtype, in [0,num_classes); `ignore_index` or
            any negative id leaves a pixel out.
        num_classes: C > 0, given exactly when `labels` is.
        ignore_index: outside [0,num_classes).
        epsilon: entropy weight, finite and > 0, in the unit of `similarity`.
        iterations: T >= 0; 0: the plan is softmax(similarity/epsilon).
        tolerance: None, or >= 0: a class stops once max_k |K * column sum - 1| <= tolerance, for columns of total mass 1 after
            a pixel step.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        [N,K] or [B,K,H,W], float64 for float64 `similarity`, else float32. Each pixel's K numbers sum to 1; zeros where it is
        left out; NaN where a similarity of the pixel is not finite (such a pixel does not count in its class, and gets no
        gradient). Differentiable in `similarity`, through all steps taken. Deterministic, and independent of the number
        of threads. Extra memory on CPU apart from the result: [N] int32, [N] floats where the range of similarity/epsilon is
        above 50, [T+1,C,K], and at most a quarter of [N,K] or one [C,K] (K rounded up to a vector). The backward pass: its
        result, [N] int32, and the last again.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or number; on CPU also a label at or beyond num_classes that is not
            `ignore_index` (on a GPU it is left out).
    """
    op = "sinkhorn_plan"
    call = _call(op, similarity, labels, num_classes, ignore_index, epsilon, iterations, tolerance, backend)
    return pixel_map(similarity, ops.sinkhorn_plan(call).plan)


def _call(
    op: str,
    similarity: Tensor,
    labels: Tensor | None,
    num_classes: int | None,
    ignore_index: int,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
    backend: Backend | None,
) -> SinkhornCall:
    """The arguments of `op`, checked."""
    _check(op, similarity, labels, num_classes, ignore_index, epsilon, iterations, tolerance)
    rows, group, groups = flat_pixels(similarity), None, 1
    if labels is not None:
        group = without_ignored(flat_labels(labels), ignore_index)
        groups = whole_number(op, "num_classes", num_classes)
    return SinkhornCall(
        similarity=rows,
        group=group,
        groups=groups,
        epsilon=float(epsilon),
        iterations=whole_number(op, "iterations", iterations, least=0),
        tolerance=-1.0 if tolerance is None else float(tolerance),
        backend=pick(op, rows, backend, C=groups, K=rows.shape[1]),
    )


@remembered
def _check(
    op: str,
    similarity: Tensor,
    labels: Tensor | None,
    num_classes: int | None,
    ignore_index: int,
    epsilon: float,
    iterations: int,
    tolerance: float | None,
) -> None:
    check_float(op, "similarity", similarity)
    check_value(
        similarity.ndim in (2, 4) and similarity.shape[1] > 0, op, "similarity", "[N,K] or [B,K,H,W] with K > 0", similarity
    )
    check_number(op, "epsilon", epsilon, "finite and positive", lambda v: 0 < v < math.inf)
    whole_number(op, "iterations", iterations, least=0, most=MOST)
    if tolerance is not None:
        check_number(op, "tolerance", tolerance, "None or 0 or more", lambda v: v >= 0)
    if labels is None and op == "sinkhorn_plan":
        alone = num_classes is None or whole_number(op, "num_classes", num_classes) == 1
        check_value(alone, op, "num_classes", "None or 1 without labels", num_classes)
        return
    if num_classes is None:
        raise ValueError(f"{op}: num_classes must be given with labels; got None")
    check_ignore_index(op, ignore_index, whole_number(op, "num_classes", num_classes, most=MOST))
    if similarity.ndim == 2 and isinstance(labels, Tensor) and labels.numel() == similarity.shape[0]:
        labels = labels.reshape(-1)  # a label map of rows: the order is the same
    check_labels(op, labels, similarity, "similarity")  # type: ignore[arg-type]  # it refuses None


__all__ = ["sinkhorn_assign", "sinkhorn_plan"]
