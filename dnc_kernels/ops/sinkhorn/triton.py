"""Launchers of the Sinkhorn kernels in Triton: triton_forward.py, triton_backward.py."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from .._triton import configuration, launch
from .calls import SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut
from .triton_backward import sinkhorn_gradient_size_kernel, sinkhorn_plan_gradient_kernel, sinkhorn_step_gradient_kernel
from .triton_forward import sinkhorn_maxima_kernel, sinkhorn_result_kernel, sinkhorn_sums_kernel


def _inverse(epsilon: float) -> float:
    """1/epsilon where float32 can hold it."""
    return min(1 / epsilon if epsilon > 1e-300 else 1e30, 1e30)


def _shape(kernel: str, similarity: Tensor, group: Tensor | None, groups: int) -> tuple[tuple[int], dict[str, Any]]:
    """Grid, for pixels and groups alike, and the meta-parameters that all kernels share."""
    pixels, width = similarity.shape
    use = configuration("sinkhorn", kernel, similarity.device, N=pixels, G=groups, K=width)
    # Triton 3.6 cannot compile a sum over tiles of one column
    block_k = max(triton.next_power_of_2(width), 2)
    # whatever configuration is nearest, a tile has as many cells as its warps have registers for
    block_n = max(min(use.pop("BLOCK_N"), use.pop("CELLS") // block_k), 16)
    grid = (triton.cdiv(max(pixels, groups), block_n),)
    return grid, {"K": width, "BLOCK_N": block_n, "BLOCK_K": block_k, "HAS_GROUP": group is not None, **use}


def _zeros(device: torch.device, *sizes: int) -> tuple[Tensor, ...]:
    """int64 zeros of each size, cleared by one launch; each starts at a multiple of 128 bytes, as a tensor of its own would."""
    rounded = [(size + 15) // 16 * 16 for size in sizes]
    return torch.zeros(sum(rounded), dtype=torch.int64, device=device).split(rounded)


def sinkhorn(call: SinkhornCall, out: SinkhornOut) -> None:
    """Write those of assignment [N] int64, plan [N,K], history [iterations+1,G,K] and steps [G] int64 that are given.

    Memory: 40 G K + 24 G bytes. Launches: iterations + 2 and one to clear that memory.
    """
    similarity, group, groups, epsilon, iterations, tolerance, _ = call
    assignment, plan, history, steps = out
    pixels, width = similarity.shape
    grid, shared = _shape("sinkhorn", similarity, group, groups)
    inverse = _inverse(epsilon)
    q = 62 - pixels.bit_length()
    scale, unit = 2.0**q, 2.0**-q
    bounded, tolerance = tolerance >= 0, min(max(tolerance, 0.0), 1e30)
    source = (pixels, groups, *similarity.stride())
    label = similarity if group is None else group  # not read where there is none
    cells = groups * width
    sums, largest, count, last = _zeros(similarity.device, 3 * cells, cells, groups, 2 * groups)
    base = torch.empty(2 * cells, dtype=torch.float32, device=similarity.device)
    kept = base if history is None else history
    if iterations > 0:
        launch(sinkhorn_maxima_kernel, grid, similarity, label, largest, count, *source, **shared)
    elif history is not None:
        history.zero_()
    for t in range(1, iterations + 1):
        launch(
            sinkhorn_sums_kernel, grid, similarity, label, largest, count, base, sums, last, kept, t, *source,
            inverse, scale, unit, tolerance,
            FIRST=t == 1, HAS_TOLERANCE=bounded, HAS_HISTORY=history is not None, **shared,
        )  # fmt: skip
    if iterations == 0 and steps is not None:
        steps.zero_()
    launch(
        sinkhorn_result_kernel, grid, similarity, label, count, base, sums, last,
        label if assignment is None else assignment, base if plan is None else plan, kept, count if steps is None else steps,
        iterations, *source, inverse, unit, tolerance,
        ITERATED=iterations > 0, HAS_TOLERANCE=bounded, HAS_ASSIGNMENT=assignment is not None, HAS_PLAN=plan is not None,
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
    grid, shared = _shape("sinkhorn_backward", similarity, group, groups)
    label = similarity if group is None else group  # not read where there is none
    source = (pixels, groups, *similarity.stride())
    inverse = _inverse(epsilon)
    # |A| is at most twice the largest |G|
    q = 61 - pixels.bit_length()

    cells = groups * width
    sums, size, count = _zeros(similarity.device, 4 * cells, groups, groups)
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
