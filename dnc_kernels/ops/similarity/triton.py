"""Launchers of the Triton similarity kernels; the functions are those of cpu.py.

Products run in the dtype of x: sub-centroids are rounded to it once, when they are packed. float32 products follow torch's own
setting (``torch.backends.cuda.matmul.fp32_precision``): full float32, or tf32.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..._tensors import pixel_count
from .._common import weight_of_counted
from .._triton import (
    Pixels,
    Plan,
    cdiv,
    dot_precision,
    launch,
    map_kind,
    pixels_of,
    planned,
    processors,
    tile_of,
)
from . import triton_scores
from .calls import LossCall, LossOut, ScoresBackwardCall, ScoresBackwardOut, ScoresCall, ScoresOut
from .triton_blocks import Packing, blocks_of, packing_of
from .triton_contrast import scores_and_contrast, subcentroid_cross_entropy
from .triton_loss import Classes, Results, Sizes, Slab, Sums, centroid_loss_kernel
from .triton_nearest import centroid_distance, nearest_centroid
from .triton_pack import pack_rows

#: Beyond this many classes the scores of 16-bit pixels are kept in bfloat16 between the two products of a loss.
SPILL_CLASSES = 4096
#: Pixels whose class gradients exist at a time while the gradient of the sub-centroids is made, and the most numbers of them.
GRADIENT_BAND, GRADIENT_NUMBERS = 16384, 2**25


@planned
def _squares_plan(x: Tensor) -> Plan:
    n, at = pixel_count(x), pixels_of(x)
    blocks = {"BLOCK_N": 32, "BLOCK_D": 128} if at.stride_d == 1 else {"BLOCK_N": 128, "BLOCK_D": 32}
    return Plan((cdiv(n, blocks["BLOCK_N"]),), (at, n, x.shape[1]), {"X_MAP": map_kind(x, at), **blocks, "num_warps": 4})


def _squares(x: Tensor, metric: str) -> Tensor | None:
    """[N] |x|^2 where the metric needs it."""
    if metric == "dot":
        return None
    square = x.new_empty(pixel_count(x), dtype=torch.float32)
    plan = _squares_plan(x)
    launch(triton_scores.row_squares_kernel, plan.grid, x, square, *plan.arguments, **plan.options)
    return square


@planned
def _scores_plan(
    x: Tensor, centroids: Tensor, scores: Tensor, metric: str, precision: str, processors: int
) -> tuple[Packing, Plan]:
    n, (classes, k, channels), at, scores_at = pixel_count(x), centroids.shape, pixels_of(x), pixels_of(scores)
    blocks, options = blocks_of("class_scores", x, centroids)
    packing, depth = packing_of(blocks, centroids)
    tiles, groups = packing.slots.class_tiles, packing.slots.k_tiles
    programs = cdiv(n, blocks["BLOCK_N"])
    # few pixels and many classes: the class tiles of a pixel are shared out
    splits = max(1, min(tiles, 2 * processors // max(programs, 1)))
    span = cdiv(tiles, splits)
    constants = {
        "METRIC": metric, "EVEN_K": k % blocks["BLOCK_K"] == 0, "X_MAP": map_kind(x, at),
        "SCORES_MAP": map_kind(scores, scores_at), "KEEP": blocks["BLOCK_D"] >= channels, "PRECISION": precision, **blocks,
        "BLOCK_OWN": tile_of(k, None, 1), **options,
    }  # fmt: skip
    arguments = (at, scores_at, n, classes, k, channels, depth, tiles, groups, span)
    return packing, Plan((programs, cdiv(tiles, span)), arguments, constants)


def scores_packing(x: Tensor, centroids: Tensor, scores: Tensor) -> Packing:
    """How `class_scores` of metric dot wants its rows."""
    return _scores_plan(x, centroids, scores, "dot", dot_precision(x), processors(x.device))[0]


def class_scores(call: ScoresCall, out: ScoresOut, rows: Tensor | None = None) -> None:
    """Scores, winners and own similarities. rows: the sub-centroids, packed as `scores_packing` says."""
    (x, centroids, labels, metric, _), (scores, winner, own) = call, out
    packing, plan = _scores_plan(x, centroids, scores, metric, dot_precision(x), processors(x.device))
    bias = None
    if rows is None:
        rows, bias = pack_rows(centroids, metric, x.dtype, *packing)
    # scores and winners share their addresses
    placed = winner
    if winner.stride() != scores.stride():
        placed = torch.empty_strided(scores.shape, scores.stride(), dtype=torch.uint8, device=x.device)
    launch(
        triton_scores.class_scores_kernel, plan.grid, x, rows, bias, _squares(x, metric), labels, scores, placed, own,
        *plan.arguments, **plan.options,
    )  # fmt: skip
    if placed is not winner:
        winner.copy_(placed)


@planned
def _scores_gradient_plan(
    x: Tensor, centroids: Tensor, scores: Tensor, winner: Tensor, grad_x: Tensor, accumulate: bool, precision: str
) -> tuple[Packing, Plan]:
    (classes, k, channels), tensors = centroids.shape, (scores, winner, grad_x)
    scores_at, winner_at, grad_at = at = tuple(map(pixels_of, tensors))
    blocks, options = blocks_of("scores_gradient", x, centroids)
    packing, depth = packing_of(blocks, centroids)
    slots = packing.slots.k_tiles * blocks.pop("BLOCK_K")
    maps = dict(zip(("SCORES_MAP", "WINNER_MAP", "GRAD_MAP"), map(map_kind, tensors, at), strict=True))
    n = pixel_count(x)
    return packing, Plan(
        (cdiv(n, blocks["BLOCK_N"]), cdiv(channels, blocks["BLOCK_D"])),
        (scores_at, winner_at, grad_at, n, classes, k, channels, slots, depth, packing.slots.class_tiles),
        {"ACCUMULATE": accumulate, **maps, "PRECISION": precision, **blocks, **options},
    )


def class_scores_backward(call: ScoresBackwardCall, out: ScoresBackwardOut) -> None:
    """Gradients, those given."""
    x, centroids, labels, metric, winner, grad_scores, grad_own, accumulate, _ = call
    grad_x, grad_centroids = out
    classes = centroids.shape[0]
    if labels is None or grad_own is None:
        labels = grad_own = None
    if grad_scores is None or winner is None:
        grad_scores = winner = None
    square = _squares(x, metric)
    if grad_x is not None:
        total = x.new_zeros(pixel_count(x), dtype=torch.float32) if metric == "sqeuclidean" else None
        if grad_scores is not None and winner is not None:
            packing, plan = _scores_gradient_plan(x, centroids, grad_scores, winner, grad_x, accumulate, dot_precision(x))
            rows, _ = pack_rows(centroids, metric, x.dtype, *packing)
            launch(
                triton_scores.scores_gradient_kernel, plan.grid, grad_scores, winner, rows, grad_x, total, *plan.arguments,
                **plan.options,
            )  # fmt: skip
            accumulate = True
        if grad_own is not None and labels is not None:
            _add_own_gradient(grad_x, centroids, labels, grad_own, metric, accumulate)
            if total is not None:
                total += torch.where((labels >= 0) & (labels < classes), grad_own.sum(1), 0)
        _finish_metric(x, square, total, grad_x, metric)
    if grad_centroids is not None:
        factor = None if square is None or metric != "cosine" else square.clamp_min(1e-24).rsqrt()
        sent = (grad_scores, winner, labels, grad_own)
        grad_centroids.copy_(_centroid_chain(centroids, *_centroid_sums(x, centroids, sent, factor, 0, pixel_count(x)), metric))


def strip(at: Pixels) -> dict[str, int]:
    """Blocks of a kernel that is no product: what lies side by side in memory is its long side."""
    return {"BLOCK_N": 16, "BLOCK_D": 128} if at.stride_d == 1 else {"BLOCK_N": 128, "BLOCK_D": 16}


@planned
def _own_gradient_plan(grad_x: Tensor, centroids: Tensor, accumulate: bool) -> Plan:
    n, (classes, k, channels), at = pixel_count(grad_x), centroids.shape, pixels_of(grad_x)
    blocks = strip(at)
    return Plan(
        (cdiv(n, blocks["BLOCK_N"]), cdiv(channels, blocks["BLOCK_D"])), (at, n, classes, k, channels),
        {"ACCUMULATE": accumulate, "GRAD_MAP": map_kind(grad_x, at), **blocks, "num_warps": 4},
    )  # fmt: skip


def _add_own_gradient(
    grad_x: Tensor, centroids: Tensor, labels: Tensor, grad_own: Tensor, metric: str, accumulate: bool
) -> None:
    """Into or onto grad_x: what own similarities send, before `_finish_metric`."""
    rows, plan = centroids.to(torch.float32), _own_gradient_plan(grad_x, centroids, accumulate)
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=2)
    launch(
        triton_scores.own_gradient_kernel, plan.grid, grad_own, labels, rows.contiguous(), grad_x, *plan.arguments,
        **plan.options,
    )  # fmt: skip


@planned
def _metric_plan(x: Tensor, grad_x: Tensor, metric: str) -> Plan:
    n, at, grad_at = pixel_count(x), pixels_of(x), pixels_of(grad_x)
    blocks = strip(at)
    return Plan(
        (cdiv(n, blocks["BLOCK_N"]),), (at, grad_at, n, x.shape[1]),
        {"METRIC": metric, "X_MAP": map_kind(x, at), "GRAD_MAP": map_kind(grad_x, grad_at), **blocks, "num_warps": 4},
    )  # fmt: skip


def _finish_metric(x: Tensor, square: Tensor | None, total: Tensor | None, grad_x: Tensor, metric: str) -> None:
    """Turn dS p into the gradient of x, in place."""
    if metric != "dot":
        plan = _metric_plan(x, grad_x, metric)
        launch(triton_scores.metric_gradient_kernel, plan.grid, x, square, total, grad_x, *plan.arguments, **plan.options)


class _Sums(NamedTuple):
    """How sums over pixels are made for the gradient of the sub-centroids."""

    at: tuple[Pixels | None, ...]  # of x, scores and winners
    sizes: tuple[int, ...]  # C, K, D
    options: dict[str, Any]
    tiles: int  # of classes
    groups: int  # of k
    depth: int  # tiles of channels
    programs: int  # that fill the device


@planned
def _sums_plan(
    x: Tensor, centroids: Tensor, scores: Tensor | None, winner: Tensor | None, precision: str, processors: int
) -> _Sums:
    (classes, k, channels), tensors = centroids.shape, (x, scores, winner)
    blocks, options = blocks_of("centroid_gradient", x, centroids)
    tiles, groups, depth = cdiv(classes, blocks["BLOCK_C"]), cdiv(k, blocks["BLOCK_K"]), cdiv(channels, blocks["BLOCK_D"])
    at = tuple(None if t is None else pixels_of(t) for t in tensors)
    maps = (0 if t is None or a is None else map_kind(t, a) for t, a in zip(tensors, at, strict=True))
    constants = {
        **dict(zip(("X_MAP", "SCORES_MAP", "WINNER_MAP"), maps, strict=True)), "PRECISION": precision, **blocks, **options
    }  # fmt: skip
    return _Sums(at, (classes, k, channels), constants, tiles, groups, depth, cdiv(2 * processors, tiles * groups * depth))


def _centroid_sums(
    x: Tensor, centroids: Tensor, sent: tuple[Tensor | None, ...], factor: Tensor | None, first: int, last: int
) -> tuple[Tensor, Tensor]:
    """dS^T x [C,K,D] and the sums of dS [C,K] over pixels [first, last).

    sent: gradient of the scores and winners, whose rows begin with pixel `first`, labels and gradient of own similarities.
    """
    classes, k, channels = centroids.shape
    if first == last:
        return x.new_zeros(centroids.shape, dtype=torch.float32), x.new_zeros((classes, k), dtype=torch.float32)
    scores, winner, labels, own = sent
    plan = _sums_plan(x, centroids, scores, winner, dot_precision(x), processors(x.device))
    block_n, columns = plan.options["BLOCK_N"], plan.options["BLOCK_K"] * plan.options["BLOCK_C"]
    # enough programs to fill the device, but no more partial sums than pixels' worth of work
    splits = max(1, min(plan.programs, cdiv(last - first, 8 * block_n)))
    span = cdiv(cdiv(last - first, splits), block_n) * block_n
    splits = cdiv(last - first, span)
    partial = x.new_empty((splits, plan.tiles, plan.groups, columns, channels), dtype=torch.float32)
    total = partial.new_empty(partial.shape[:-1])
    launch(
        triton_scores.centroid_gradient_kernel, (plan.tiles * plan.groups, plan.depth, splits), x, scores, winner, labels, own,
        factor, partial, total, *plan.at, first, last, *plan.sizes, plan.groups, span, **plan.options,
    )  # fmt: skip

    def unpack(t: Tensor) -> Tensor:
        copies, width = plan.options["BLOCK_K"], plan.options["BLOCK_C"]
        order = t.sum(0).view(plan.tiles, plan.groups, copies, width, -1).permute(0, 3, 1, 2, 4)
        return order.reshape(plan.tiles * width, plan.groups * copies, -1)[:classes, :k]

    return unpack(partial), unpack(total[..., None])[..., 0]


def _centroid_chain(centroids: Tensor, product: Tensor, total: Tensor, metric: str) -> Tensor:
    """Gradient of the sub-centroids from dS^T x (x of unit length for cosine) and the sums of dS."""
    if metric == "dot":
        return product
    p = centroids.to(torch.float32)
    if metric == "sqeuclidean":
        return 2 * (product - p * total[..., None])
    length = p.norm(dim=2, keepdim=True).clamp_min(1e-12)
    unit = p / length
    return (product - unit * (unit * product).sum(2, keepdim=True)) / length


def _gradient_factor(call: LossCall) -> Tensor | None:
    """What the gradient of a pixel's loss is multiplied by: [N] for reduction none, [] or None."""
    grad_loss = call.grad_loss
    if grad_loss is None or call.reduction == "sum":
        return grad_loss
    if call.reduction == "none":
        return grad_loss.contiguous()
    weight = _weight_of(call)
    return torch.where(weight > 0, grad_loss / weight, 0.0)


def _weight_of(call: LossCall) -> Tensor:
    """[]: sum of the class weights of the pixels that count, in float32."""
    return weight_of_counted(call.labels, call.ignore_index, call.centroids.shape[0], call.class_weight, torch.float32)


class _Loss(NamedTuple):
    """How a loss is computed."""

    packing: Packing
    at: tuple[Pixels, Pixels | None]  # of x and grad_x
    sizes: Sizes
    options: dict[str, Any]
    per_processor: int  # programs


@planned
def _loss_plan(x: Tensor, centroids: Tensor, grad_x: Tensor | None, metric: str, save: bool, precision: str) -> _Loss:
    (classes, k, channels), at = centroids.shape, pixels_of(x)
    grad_at = None if grad_x is None else pixels_of(grad_x)
    blocks, options = blocks_of("centroid_loss", x, centroids, grad=grad_x is not None)
    packing, depth = packing_of(blocks, centroids)
    tiles, groups = packing.slots.class_tiles, packing.slots.k_tiles
    per_processor = options.pop("PROGRAMS", 1)
    constants = {
        "METRIC": metric, "SAVE": save, "ONE_TILE": tiles == 1, "EVEN_K": k % blocks["BLOCK_K"] == 0, "X_MAP": map_kind(x, at),
        "GRAD_MAP": 0 if grad_x is None or grad_at is None else map_kind(grad_x, grad_at),
        "KEEP": blocks["BLOCK_D"] >= channels, "PRECISION": precision, **blocks, "BLOCK_OWN": tile_of(k, None, 1), **options,
    }  # fmt: skip
    sizes = Sizes(classes, k, channels, depth, tiles * blocks["BLOCK_C"], tiles, groups)
    return _Loss(packing, (at, grad_at), sizes, constants, per_processor)


def centroid_cross_entropy(call: LossCall, out: LossOut) -> None:
    """Results and gradients, those given. A label outside [0,C) is ignored."""
    x, centroids, labels, metric, grad_x, n = call.x, call.centroids, call.labels, call.metric, out.grad_x, pixel_count(call.x)
    save = out.grad_centroids is not None
    plan = _loss_plan(x, centroids, grad_x, metric, save, dot_precision(x))
    rows, bias = pack_rows(centroids, metric, x.dtype, *plan.packing)
    square, factor, sizes = _squares(x, metric), _gradient_factor(call), plan.sizes
    block_n, columns = plan.options["BLOCK_N"], sizes.columns
    band = max(block_n, min(GRADIENT_BAND, GRADIENT_NUMBERS // columns)) if save else max(n, 1)
    bands, tiles = cdiv(n, band), cdiv(min(n, band), block_n)  # tiles of pixels a band
    programs = max(1, min(tiles, plan.per_processor * processors(x.device)))
    slab = Slab(None, None)
    if save or sizes.tiles > 1:
        spill = sizes.classes > SPILL_CLASSES and x.dtype != torch.float32 and not save
        # whole tiles, so that no address of the slab needs a mask
        shape = ((tiles if save else programs) * block_n, columns)
        slab = Slab(*(x.new_empty(shape, dtype=t) for t in (torch.bfloat16 if spill else torch.float32, torch.uint8)))

    def numbers(*sizes: int) -> Tensor:
        return x.new_empty(sizes, dtype=torch.float32)

    each = out.loss
    if each is not None and call.reduction != "none":
        each = numbers(n)
    row_total = numbers(n) if metric == "sqeuclidean" and grad_x is not None else None
    scale_sums = None if out.grad_scale is None else numbers(n // band * tiles + cdiv(n % band, block_n))
    with_norm = out.grad_norm_weight is not None or out.grad_norm_bias is not None
    norm_sums = numbers(bands, programs, 2, columns) if with_norm else None
    classes = Classes(call.norm_weight, call.norm_bias, call.class_weight)
    results = Results(each, out.prediction, out.own_similarity, grad_x)
    norm_eps = None if call.norm_weight is None else call.norm_eps
    smoothing = call.label_smoothing if call.label_smoothing > 0 else None
    centroid_sums: tuple[Tensor, Tensor] | None = None
    for i in range(bands):
        first, last = i * band, min((i + 1) * band, n)
        sums = Sums(
            row_total, None if scale_sums is None else scale_sums[i * tiles :], None if norm_sums is None else norm_sums[i]
        )
        launch(
            centroid_loss_kernel, (programs,), x, rows, bias, square, labels, call.scale, factor, classes, results, sums, slab,
            *plan.at, sizes, first, last, call.ignore_index, norm_eps, 1.0 / call.temperature, smoothing,
            PER_PIXEL=factor is not None and call.reduction == "none", **plan.options,
        )  # fmt: skip
        if save:
            by = None if square is None or metric != "cosine" else square.clamp_min(1e-24).rsqrt()
            if factor is not None:
                by = factor.expand(n).contiguous() if by is None else by * factor
            here = _centroid_sums(x, centroids, (*slab, None, None), by, first, last)
            centroid_sums = here if centroid_sums is None else (centroid_sums[0] + here[0], centroid_sums[1] + here[1])
    if grad_x is not None:
        _finish_metric(x, square, row_total, grad_x, metric)
    if out.grad_centroids is not None:
        if centroid_sums is None:
            out.grad_centroids.zero_()
        else:
            out.grad_centroids.copy_(_centroid_chain(centroids, *centroid_sums, metric))
    if out.loss is not None and each is not None and call.reduction != "none":
        total = each.sum(dtype=torch.float64)
        if call.reduction == "mean":
            total = total / _weight_of(call)
        out.loss.copy_(total)
    if out.grad_scale is not None and scale_sums is not None:
        out.grad_scale.copy_(scale_sums.sum(dtype=torch.float64))
    if norm_sums is not None:
        made = norm_sums.sum((0, 1))
        for target, part in ((out.grad_norm_weight, made[0]), (out.grad_norm_bias, made[1])):
            if target is not None:
                target.copy_(part[: sizes.classes])


__all__ = [
    "centroid_cross_entropy",
    "centroid_distance",
    "class_scores",
    "class_scores_backward",
    "nearest_centroid",
    "scores_and_contrast",
    "subcentroid_cross_entropy",
]
