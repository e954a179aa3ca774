"""Launchers of the Sinkhorn kernels in Triton: triton_forward.py, triton_backward.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from .._triton import configuration, launch
from .calls import SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut
from .triton_backward import sinkhorn_gradient_size_kernel, sinkhorn_plan_gradient_kernel, sinkhorn_step_gradient_kernel
from .triton_forward import sinkhorn_maxima_kernel, sinkhorn_result_kernel, sinkhorn_sums_kernel


class Tables(NamedTuple):
    """What the passes over the pixels of G groups leave for each other (triton_forward.py)."""

    sums: Tensor  # [3 G K] int64; all that is int64 starts at 0
    largest: Tensor  # [G K] int64
    members: Tensor  # [G] int64: pixels of each
    last: Tensor  # [2 G] int64
    base: Tensor  # [2 G K] float32


def _table_sizes(groups: int, width: int) -> tuple[int, ...]:
    cells = groups * width
    return 3 * cells, cells, groups, 2 * groups


def table_size(groups: int, width: int) -> int:
    """int64 zeros that `tables_of` takes."""
    return sum(map(_aligned, _table_sizes(groups, width)))


def tables_of(zeros: Tensor, groups: int, width: int) -> Tables:
    """Tables in int64 zeros [`table_size`]."""
    parts = zeros.split([_aligned(size) for size in _table_sizes(groups, width)])
    sums, largest, members, last = parts
    base = torch.empty(2 * groups * width, dtype=torch.float32, device=zeros.device)
    return Tables(sums, largest, members, last, base)


def _aligned(size: int) -> int:
    """Numbers of 8 bytes to a multiple of 128 bytes, where a tensor of its own would start."""
    return (size + 15) // 16 * 16


class Scale(NamedTuple):
    """Numbers of a call: 1/epsilon; what sums are multiplied by to be integers, and its reciprocal."""

    inverse: float
    scale: float
    unit: float


def scale_of(pixels: int, epsilon: float) -> Scale:
    """For so many pixels."""
    q = 62 - pixels.bit_length()
    return Scale(_inverse(epsilon), 2.0**q, 2.0**-q)


def column_sums(
    similarity: Tensor, group: Tensor | None, groups: int, iterations: int, tolerance: float, numbers: Scale, tables: Tables,
    history: Tensor | None = None,
) -> None:  # fmt: skip
    """The passes between `sinkhorn_maxima_kernel` and the result. One launch for each iteration."""
    grid, shared = shape_of("sinkhorn", similarity, group, groups)
    label = similarity if group is None else group  # not read where there is none
    kept = tables.base if history is None else history
    for t in range(1, iterations + 1):
        launch(
            sinkhorn_sums_kernel, grid, similarity, label, tables.largest, tables.members, tables.base, tables.sums,
            tables.last, kept, t, similarity.shape[0], groups, *similarity.stride(), *numbers, max(tolerance, 0.0),
            FIRST=t == 1, HAS_TOLERANCE=tolerance >= 0, HAS_HISTORY=history is not None, **shared,
        )  # fmt: skip


def _inverse(epsilon: float) -> float:
    """1/epsilon where float32 can hold it."""
    return min(1 / epsilon if epsilon > 1e-300 else 1e30, 1e30)


def shape_of(kernel: str, similarity: Tensor, group: Tensor | None, groups: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, for pixels and groups alike, and the meta-parameters that all kernels share."""
    pixels, width = similarity.shape
    use = configuration("sinkhorn", kernel, similarity.device, N=pixels, G=groups, K=width)
    # Triton 3.6 cannot compile a sum over tiles of one column
    block_k = max(triton.next_power_of_2(width), 2)
    # whatever configuration is nearest, a tile has as many cells as its warps have registers for
    block_n = max(min(use.pop("BLOCK_N"), use.pop("CELLS") // block_k), 16)
    grid = (triton.cdiv(max(pixels, groups), block_n),)
    return grid, {"K": width, "BLOCK_N": block_n, "BLOCK_K": block_k, "HAS_GROUP": group is not None, **use}


def sinkhorn(call: SinkhornCall, out: SinkhornOut) -> None:
    """Write those of assignment [N] int64, plan [N,K], history [iterations+1,G,K] and steps [G] int64 that are given.

    Memory: 40 G K + 24 G bytes. Launches: iterations + 2 and one to clear that memory.
    """
    similarity, group, groups, epsilon, iterations, tolerance, _ = call
    assignment, plan, history, steps = out
    pixels, width = similarity.shape
    grid, shared = shape_of("sinkhorn", similarity, group, groups)
    numbers, tolerance = scale_of(pixels, epsilon), min(tolerance, 1e30)
    source = (pixels, groups, *similarity.stride())
    label = similarity if group is None else group  # not read where there is none
    zeros = torch.zeros(table_size(groups, width), dtype=torch.int64, device=similarity.device)
    tables = tables_of(zeros, groups, width)
    count, base = tables.members, tables.base
    if iterations > 0:
        launch(sinkhorn_maxima_kernel, grid, similarity, label, tables.largest, count, *source, **shared)
    elif history is not None:
        history.zero_()
    column_sums(similarity, group, groups, iterations, tolerance, numbers, tables, history)
    if iterations == 0 and steps is not None:
        steps.zero_()
    launch(
        sinkhorn_result_kernel, grid, similarity, label, count, base, tables.sums, tables.last,
        label if assignment is None else assignment, base if plan is None else plan, base if history is None else history,
        count if steps is None else steps, iterations, *source, numbers.inverse, numbers.unit, max(tolerance, 0.0),
        ITERATED=iterations > 0, HAS_TOLERANCE=tolerance >= 0, HAS_ASSIGNMENT=assignment is not None, HAS_PLAN=plan is not None,
        HAS_HISTORY=history is not None, HAS_STEPS=steps is not None, **shared,
    )  # fmt: skip


def sinkhorn_backward(call: SinkhornBackwardCall, out: SinkhornBackwardOut) -> None:
    """Write the gradient [N,K] float32 of the similarity, from `history` and `steps` as `sinkhorn` wrote them.

    Memory: 32 G K + 24 G bytes. Launches: iterations + 3, one of them clears that memory.
    """
    similarity, group, groups, epsilon, history, steps, grad_plan, _ = call
    grad = out.grad_similarity
    pixels, width = similarity.shape
    iterations = history.shape[0] - 1
    grid, shared = shape_of("sinkhorn_backward", similarity, group, groups)
    label = similarity if group is None else group  # not read where there is none
    source = (pixels, groups, *similarity.stride())
    inverse = _inverse(epsilon)
    # |A| is at most twice the largest |G|
    q = 61 - pixels.bit_length()

    cells = groups * width
    sizes = [_aligned(size) for size in (4 * cells, groups, groups)]
    sums, size, count = torch.zeros(sum(sizes), dtype=torch.int64, device=similarity.device).split(sizes)
    bound = torch.empty(2 * groups, dtype=torch.float32, device=similarity.device)
    up = grad_plan.stride()
    if iterations > 0:
        launch(sinkhorn_gradient_size_kernel, grid, similarity, label, grad_plan, size, count, *source, *up, **shared)
    launch(
        sinkhorn_plan_gradient_kernel, grid, similarity, label, grad_plan, history, steps, size, sums, grad,
        *source, *up, inverse, 2.0**q, ITERATED=iterations > 0, **shared,
    )  # fmt: skip
    for t in range(iterations, 0, -1):
        launch(
            sinkhorn_step_gradient_kernel, grid, similarity, label, history, steps, size, count, sums, bound, grad,
            t, *source, inverse, 2.0**-q, FIRST=t == 1, **shared,
        )  # fmt: skip
