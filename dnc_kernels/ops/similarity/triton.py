"""Launchers of the Triton similarity kernels; the functions are those of native.py.

Products run in the dtype of x: sub-centroids are rounded to it once, when they are packed. float32 products follow torch's own
setting (``torch.backends.cuda.matmul.fp32_precision``): full float32, or tf32.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton import cdiv, next_power_of_2

from .._common import METRICS, pixel_count
from .._triton import (
    SCRATCH,
    configuration,
    dot_precision,
    kept_rows,
    launch,
    map_kind,
    pixels_of,
    processors,
    steps_held,
    tile_of,
    vectors,
)
from . import triton_loss, triton_scores
from .triton_contrast import subcentroid_cross_entropy
from .triton_nearest import centroid_distance, nearest_centroid
from .triton_pack import Slots, pack_rows

#: Beyond this many classes the scores of 16-bit pixels are kept in bfloat16 between the two products of a loss.
SPILL_CLASSES = 4096
#: Pixels whose class gradients exist at a time while the gradient of the sub-centroids is made, and the most numbers of them.
GRADIENT_BAND, GRADIENT_NUMBERS = 16384, 2**25


class _Packed(NamedTuple):
    """Sub-centroids in the order of the products, and the meta-parameters they were packed for."""

    rows: Tensor  # [tiles * groups * BLOCK_K * BLOCK_C, depth]
    bias: Tensor  # as many, for sqeuclidean
    tiles: int  # of classes
    groups: int  # of k
    blocks: dict[str, int]
    options: dict[str, int]  # num_warps, num_stages, ...

    @property
    def depth(self) -> int:
        """D, rounded up to whole blocks."""
        return self.rows.shape[-1]


def bits_of(x: Tensor) -> int:
    """What products of x are made of: 16, 19 (tf32) or 32 bits."""
    if x.dtype != torch.float32:
        return 16
    return 19 if dot_precision(x) == "tf32" else 32


def _blocks(use: Mapping[str, Any], shape: Mapping[str, int]) -> dict[str, int]:
    """Block sizes of a configuration, no larger than a shape needs; BLOCK_D holds all channels where the tile of x is kept."""
    blocks = {key: size for key, size in use.items() if key.startswith("BLOCK_")}
    for key, size, least in (("BLOCK_C", shape["C"], 16), ("BLOCK_K", shape["K"], 1), ("BLOCK_GRAD", shape["D"], 16)):
        if key in blocks:
            blocks[key] = tile_of(size, blocks[key], least)
    whole = tile_of(shape["D"])
    blocks["BLOCK_D"] = whole if whole <= use.get("KEEP_D", 0) else min(blocks["BLOCK_D"], whole)
    return blocks


def _one_step(blocks: Mapping[str, int], shape: Mapping[str, int]) -> bool:
    """Whether a tile of pixels is a step of the only loop, as of a loss without gradients: the next pixels are on their way."""
    return not shape.get("grad", True) and blocks["BLOCK_C"] >= shape["C"] and blocks["BLOCK_K"] >= shape["K"]


def _shared_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory of class scores and the loss: the tile of x, or its part of a step, and the rows of a step."""
    blocks, size = _blocks(use, shape), 2 if shape["bits"] == 16 else 4
    rows, pixels, stages = blocks["BLOCK_C"] * blocks["BLOCK_K"], blocks["BLOCK_N"], use["num_stages"]
    if blocks["BLOCK_D"] < shape["D"]:
        tile = stages * (pixels + rows)
    elif _one_step(blocks, shape):
        tile = steps_held(use, shape) * (pixels + rows)
    else:
        tile = kept_rows(pixels, rows, use, shape)
    numbers = max(tile * blocks["BLOCK_D"], stages * blocks["BLOCK_C"] * blocks.get("BLOCK_GRAD", 0))
    # similarities may reach the maximum over k, and the own ones their sums, through another layout: from tensor memory, or
    # where a warp group has but a part of the columns
    parted = shape["tcgen05"] or (not shape["mma_sync"] and pixels < 16 * use["num_warps"])
    return numbers * size + (max(8 * pixels * rows + 1024, SCRATCH) if parted else SCRATCH)


def _scores_gradient_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory: the rows of a step, or the sums on their way out."""
    blocks, size = _blocks(use, shape), 2 if shape["bits"] == 16 else 4
    return max(use["num_stages"] * blocks["BLOCK_C"] * size, blocks["BLOCK_N"] * 4) * blocks["BLOCK_D"] + SCRATCH


def _centroid_gradient_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory: dS and the pixels of a step (float16 as float32), or the sums on their way out."""
    blocks = _blocks(use, shape)
    rows = blocks["BLOCK_C"] * blocks["BLOCK_K"]
    step = blocks["BLOCK_N"] * (rows + use["num_stages"] * blocks["BLOCK_D"])
    if shape["tcgen05"]:  # what dS is made of comes ahead as well: gradients of scores and of own similarities, winners
        step += (use["num_stages"] - 1) * blocks["BLOCK_N"] * (2 * blocks["BLOCK_C"] + rows)
    return 4 * max(step, rows * blocks["BLOCK_D"]) + SCRATCH


_NEED = {
    "class_scores": _shared_bytes,
    "centroid_loss": _shared_bytes,
    "scores_gradient": _scores_gradient_bytes,
    "centroid_gradient": _centroid_gradient_bytes,
}


def _configured(kernel: str, x: Tensor, centroids: Tensor, **state: int) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and launch options. `x`: pixels that a kernel reads, or writes where it reads none. `state`: for its need."""
    classes, k, channels = centroids.shape
    shape = {"C": classes, "K": k, "D": channels, "bits": bits_of(x)}
    use = configuration("similarity", kernel, x.device, _NEED[kernel], **shape, **state, even=vectors(x, pixels_of(x)))
    blocks = _blocks(use, shape)
    return blocks, {key: value for key, value in use.items() if key != "KEEP_D" and key not in blocks}


def _pack(kernel: str, x: Tensor, centroids: Tensor, metric: str, **state: int) -> _Packed:
    blocks, options = _configured(kernel, x, centroids, **state)
    classes, k, _ = centroids.shape
    width, copies = blocks["BLOCK_C"], blocks["BLOCK_K"]
    slots = Slots(width, copies, cdiv(k, copies), cdiv(classes, width))
    deepest = max(blocks[key] for key in ("BLOCK_D", "BLOCK_GRAD") if key in blocks)
    rows, bias = pack_rows(centroids, metric, x.dtype, copies * width, deepest, slots)
    return _Packed(rows, bias, slots.class_tiles, slots.k_tiles, blocks, options)


def _squares(x: Tensor, metric: str) -> Tensor:
    """[N] |x|^2 where the metric needs it."""
    if metric == "dot":
        return x.new_empty(1, dtype=torch.float32)
    n, at = pixel_count(x), pixels_of(x)
    square = x.new_empty(n, dtype=torch.float32)
    blocks = {"BLOCK_N": 32, "BLOCK_D": 128} if at.stride_d == 1 else {"BLOCK_N": 128, "BLOCK_D": 32}
    launch(
        triton_scores.row_squares_kernel, (cdiv(n, blocks["BLOCK_N"]),), x, square, n, x.shape[1], *at, MAP=map_kind(x, at),
        **blocks, num_warps=4,
    )  # fmt: skip
    return square


def _maps(**tensors: Tensor) -> tuple[tuple[int, ...], dict[str, int]]:
    """Addresses of several [N,C] or [B,C,H,W] tensors: positional arguments, and the MAP constants by name."""
    where = {name: (t, pixels_of(t)) for name, t in tensors.items()}
    return tuple(i for _, at in where.values() for i in at), {name: map_kind(*pair) for name, pair in where.items()}


def class_scores(
    x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, scores: Tensor, winner: Tensor, own: Tensor | None
) -> None:
    """Into scores and winner, of any strides, and own [N,K], contiguous."""
    n, (classes, k, channels) = pixel_count(x), centroids.shape
    packed, square = _pack("class_scores", x, centroids, metric), _squares(x, metric)
    tiles, groups = packed.tiles, packed.groups
    programs = cdiv(n, packed.blocks["BLOCK_N"])
    # few pixels and many classes: the class tiles of a pixel are shared out
    splits = max(1, min(tiles, 2 * processors(x.device) // max(programs, 1)))
    span = cdiv(tiles, splits)
    # scores and winners share their addresses
    placed = (
        winner
        if winner.stride() == scores.stride()
        else torch.empty_strided(scores.shape, scores.stride(), dtype=torch.uint8, device=x.device)
    )
    at, maps = _maps(MAP=x, SCORE_MAP=scores)
    launch(
        triton_scores.class_scores_kernel, (programs, cdiv(tiles, span)), x, packed.rows, packed.bias, square,
        x if labels is None else labels, scores, placed, x if own is None else own, n, classes, k, channels, packed.depth,
        tiles, groups, span, *at, METRIC=METRICS.index(metric), OWN=own is not None,
        EVEN_K=k % packed.blocks["BLOCK_K"] == 0, **maps, KEEP=packed.blocks["BLOCK_D"] >= channels,
        PRECISION=dot_precision(x), **packed.blocks, BLOCK_OWN=next_power_of_2(k), **packed.options,
    )  # fmt: skip
    if placed is not winner:
        winner.copy_(placed)


def class_scores_backward(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor | None,
    metric: str,
    winner: Tensor | None,
    grad_scores: Tensor | None,
    grad_own: Tensor | None,
    grad_x: Tensor | None,
    accumulate: bool,
    grad_centroids: Tensor | None,
) -> None:
    """Gradients into those given, from those of the scores and of own [N,K]; `accumulate`: added to grad_x (metric dot)."""
    n, (classes, k, channels) = pixel_count(x), centroids.shape
    if labels is None:
        grad_own = None
    square = _squares(x, metric)
    if grad_x is not None:
        total = square.new_zeros(n if metric == "sqeuclidean" else 1)
        if grad_scores is not None and winner is not None:
            packed = _pack("scores_gradient", x, centroids, metric)
            depth = packed.groups * packed.blocks.pop("BLOCK_K")
            at, maps = _maps(MAP=grad_x, SCORE_MAP=grad_scores, WINNER_MAP=winner)
            launch(
                triton_scores.scores_gradient_kernel,
                (cdiv(n, packed.blocks["BLOCK_N"]), cdiv(channels, packed.blocks["BLOCK_D"])), grad_scores, winner, packed.rows,
                grad_x, total, n, classes, k, channels, depth, packed.depth, packed.tiles, *at, TOTAL=metric == "sqeuclidean",
                ACCUMULATE=accumulate, **maps, PRECISION=dot_precision(x), **packed.blocks, **packed.options,
            )  # fmt: skip
            accumulate = True
        if grad_own is not None and labels is not None:
            _add_own_gradient(grad_x, centroids, labels, grad_own, metric, accumulate)
            if metric == "sqeuclidean":
                total += torch.where((labels >= 0) & (labels < classes), grad_own.sum(1), 0)
        _finish_metric(x, square, total, grad_x, metric)
    if grad_centroids is not None:
        factor = square.clamp_min(1e-24).rsqrt() if metric == "cosine" else None
        inputs = tuple(square if t is None else t for t in (grad_scores, winner, labels, grad_own))
        given = {"SCORES": grad_scores is not None, "OWN": grad_own is not None}
        if grad_scores is None:  # their addresses are not used, but have the rank of a map
            inputs = (x, x, *inputs[2:])
        sums = _centroid_sums(x, centroids, inputs, given, factor, 0, n)
        grad_centroids.copy_(_centroid_chain(centroids, *sums, metric))


def _add_own_gradient(
    grad_x: Tensor, centroids: Tensor, labels: Tensor, grad_own: Tensor, metric: str, accumulate: bool
) -> None:
    """Into or onto grad_x: what own similarities send, before `_finish_metric`."""
    n, (classes, k, channels) = pixel_count(grad_x), centroids.shape
    rows = centroids.to(torch.float32)
    if metric == "cosine":
        rows = torch.nn.functional.normalize(rows, dim=2)
    at, maps = _maps(MAP=grad_x)
    blocks = {"BLOCK_N": 16, "BLOCK_D": 128} if pixels_of(grad_x).stride_d == 1 else {"BLOCK_N": 128, "BLOCK_D": 16}
    launch(
        triton_scores.own_gradient_kernel, (cdiv(n, blocks["BLOCK_N"]), cdiv(channels, blocks["BLOCK_D"])), grad_own, labels,
        rows.contiguous(), grad_x, n, classes, k, channels, *at, ACCUMULATE=accumulate, **maps, **blocks, num_warps=4,
    )  # fmt: skip


def _finish_metric(x: Tensor, square: Tensor, total: Tensor, grad_x: Tensor, metric: str) -> None:
    """Turn dS p into the gradient of x, in place."""
    if metric == "dot":
        return
    at, maps = _maps(MAP=x, GRAD_MAP=grad_x)
    n = pixel_count(x)
    blocks = {"BLOCK_N": 16, "BLOCK_D": 128} if pixels_of(x).stride_d == 1 else {"BLOCK_N": 128, "BLOCK_D": 16}
    launch(
        triton_scores.metric_gradient_kernel, (cdiv(n, blocks["BLOCK_N"]),), x, square, total, grad_x, n, x.shape[1], *at,
        METRIC=METRICS.index(metric), **maps, **blocks, num_warps=4,
    )  # fmt: skip


def _centroid_sums(
    x: Tensor,
    centroids: Tensor,
    inputs: tuple[Tensor, ...],
    given: dict[str, bool],
    factor: Tensor | None,
    first: int,
    last: int,
) -> tuple[Tensor, Tensor]:
    """dS^T x [C,K,D] and the sums of dS [C,K] over pixels [first, last)."""
    classes, k, channels = centroids.shape
    if first == last:
        return x.new_zeros(centroids.shape, dtype=torch.float32), x.new_zeros((classes, k), dtype=torch.float32)
    blocks, options = _configured("centroid_gradient", x, centroids)
    tiles, groups = cdiv(classes, blocks["BLOCK_C"]), cdiv(k, blocks["BLOCK_K"])
    columns, depth = blocks["BLOCK_K"] * blocks["BLOCK_C"], cdiv(channels, blocks["BLOCK_D"])
    # enough programs to fill the device, but no more partial sums than pixels' worth of work
    splits = max(1, min(cdiv(2 * processors(x.device), tiles * groups * depth), cdiv(last - first, 8 * blocks["BLOCK_N"])))
    span = cdiv(cdiv(last - first, splits), blocks["BLOCK_N"]) * blocks["BLOCK_N"]
    splits = cdiv(last - first, span)
    partial = x.new_empty((splits, tiles, groups, columns, channels), dtype=torch.float32)
    total = partial.new_empty(partial.shape[:-1])
    at, maps = _maps(MAP=x, SCORE_MAP=inputs[0], WINNER_MAP=inputs[1])
    launch(
        triton_scores.centroid_gradient_kernel, (tiles * groups, depth, splits), x, *inputs,
        total if factor is None else factor, partial, total, first, last, classes, k, channels, groups, span, *at,
        FACTOR=factor is not None, **given, **maps, PRECISION=dot_precision(x), **blocks, **options,
    )  # fmt: skip

    def unpack(t: Tensor) -> Tensor:
        order = t.sum(0).view(tiles, groups, blocks["BLOCK_K"], blocks["BLOCK_C"], -1).permute(0, 3, 1, 2, 4)
        return order.reshape(tiles * blocks["BLOCK_C"], groups * blocks["BLOCK_K"], -1)[:classes, :k]

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


def _gradient_factor(
    grad_loss: Tensor | None, labels: Tensor, ignore_index: int, class_weight: Tensor | None, classes: int, reduction: str
) -> tuple[Tensor, int]:
    """What the gradient of a pixel's loss is multiplied by, and FACTOR of the kernel."""
    if grad_loss is None:
        return labels, 0
    if reduction == "none":
        return grad_loss.contiguous(), 2
    if reduction == "sum":
        return grad_loss, 1
    weight = _weight_of(labels, ignore_index, class_weight, classes)
    return torch.where(weight > 0, grad_loss / weight, 0.0), 1


def _weight_of(labels: Tensor, ignore_index: int, class_weight: Tensor | None, classes: int) -> Tensor:
    """[]: sum of the class weights of the pixels that count, in float32."""
    counted = (labels != ignore_index) & (labels >= 0) & (labels < classes)
    if class_weight is None:
        return counted.sum().to(torch.float32)
    return torch.where(counted, class_weight[torch.where(counted, labels, 0)], 0).sum()


def centroid_cross_entropy(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    scale: Tensor | None,
    class_weight: Tensor | None,
    metric: str,
    norm_eps: float,
    temperature: float,
    ignore_index: int,
    label_smoothing: float,
    reduction: str,
    grad_loss: Tensor | None,
    loss: Tensor | None,
    prediction: Tensor | None,
    own: Tensor | None,
    grad_x: Tensor | None,
    grad_centroids: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Into those given: loss [] or [N], prediction [N] int64, own [N,K], gradients for grad_loss [] or [N] (None: 1).

    grad_x has the dtype of x; everything else, inputs of [C] included, float32. A label outside [0,C) is ignored.
    """
    n, (classes, k, channels) = pixel_count(x), centroids.shape
    packed, square = _pack("centroid_loss", x, centroids, metric, grad=grad_x is not None), _squares(x, metric)
    options = dict(packed.options)
    block_n, block_c = packed.blocks["BLOCK_N"], packed.blocks["BLOCK_C"]
    tiles, groups = packed.tiles, packed.groups
    one_tile, save = tiles == 1, grad_centroids is not None
    factor, factor_kind = _gradient_factor(grad_loss, labels, ignore_index, class_weight, classes, reduction)
    forward = own is not None and prediction is not None
    parameters = grad_weight is not None or grad_bias is not None
    per_processor = options.pop("PROGRAMS", 1)
    columns = tiles * block_c
    band = max(block_n, min(GRADIENT_BAND, GRADIENT_NUMBERS // columns)) if save else max(n, 1)
    programs = max(1, min(cdiv(min(n, band), block_n), per_processor * processors(x.device)))
    # whole tiles, so that no address of the slab needs a mask
    slab_rows = cdiv(min(n, band), block_n) * block_n if save else (0 if one_tile else programs * block_n)
    spill = classes > SPILL_CLASSES and x.dtype != torch.float32 and not save
    slab_dtype = torch.bfloat16 if spill else torch.float32
    slab_r, slab_w = (x.new_empty((max(slab_rows, 1), columns), dtype=t) for t in (slab_dtype, torch.uint8))
    row_total = square.new_empty(n if metric == "sqeuclidean" and grad_x is not None else 1)
    at, maps = _maps(MAP=x, GRAD_MAP=x if grad_x is None else grad_x)

    def given(t: Tensor | None) -> Tensor:
        return square if t is None else t

    each = loss if loss is not None and reduction == "none" else square.new_empty(n if forward else 1)
    scale_sums, norm_sums = [], []
    centroid_sums: tuple[Tensor, Tensor] | None = None
    for first in range(0, n, band):
        last = min(first + band, n)
        some = square.new_empty(cdiv(last - first, block_n))
        some_norm = square.new_empty((programs, 2, columns) if parameters else (1,))
        launch(
            triton_loss.centroid_loss_kernel, (programs,), x, packed.rows, packed.bias, square, labels, given(norm_weight),
            given(norm_bias), given(scale), given(class_weight), factor, each, given(prediction), given(own),
            given(grad_x), row_total, some, some_norm, slab_r, slab_w, first, last, classes, k, channels, packed.depth, columns,
            tiles, groups, ignore_index, norm_eps, 1.0 / temperature, label_smoothing, *at, METRIC=METRICS.index(metric),
            NORM=norm_weight is not None, SHIFT=norm_bias is not None, SCALE=scale is not None, WEIGHT=class_weight is not None,
            SMOOTH=label_smoothing > 0, FACTOR=factor_kind, FORWARD=forward, GRAD=grad_x is not None,
            PARAMETERS=parameters, SAVE=save, ONE_TILE=one_tile, EVEN_K=k % packed.blocks["BLOCK_K"] == 0, **maps,
            KEEP=packed.blocks["BLOCK_D"] >= channels, PRECISION=dot_precision(x), **packed.blocks,
            BLOCK_OWN=next_power_of_2(k), **options,
        )  # fmt: skip
        scale_sums.append(some)
        norm_sums.append(some_norm)
        if save:
            rows = square.clamp_min(1e-24).rsqrt() if metric == "cosine" else None
            if factor_kind:
                rows = factor.expand(n).contiguous() if rows is None else rows * factor
            here = _centroid_sums(
                x, centroids, (slab_r, slab_w, labels, square), {"SCORES": True, "OWN": False}, rows, first, last
            )
            centroid_sums = here if centroid_sums is None else (centroid_sums[0] + here[0], centroid_sums[1] + here[1])
    if grad_x is not None:
        _finish_metric(x, square, row_total, grad_x, metric)
    if grad_centroids is not None:
        if centroid_sums is None:
            grad_centroids.zero_()
        else:
            grad_centroids.copy_(_centroid_chain(centroids, *centroid_sums, metric))
    if loss is not None and reduction != "none":
        total = each.sum(dtype=torch.float64)
        if reduction == "mean":
            total = total / _weight_of(labels, ignore_index, class_weight, classes)
        loss.copy_(total)
    if grad_scale is not None:
        grad_scale.copy_(torch.cat([square.new_zeros(0), *scale_sums]).sum(dtype=torch.float64))
    if parameters:
        made = torch.stack(norm_sums).sum((0, 1)) if norm_sums else square.new_zeros((2, columns))
        for target, part in ((grad_weight, made[0]), (grad_bias, made[1])):
            if target is not None:
                target.copy_(part[:classes])


__all__ = [
    "centroid_cross_entropy",
    "centroid_distance",
    "class_scores",
    "class_scores_backward",
    "nearest_centroid",
    "subcentroid_cross_entropy",
]
