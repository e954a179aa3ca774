"""Blocks of the kernels of class scores, their gradients and the loss, and the shared memory that they need for them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .._triton import SCRATCH, cdiv, configuration, dot_precision, kept_rows, pixels_of, steps_held, tile_of, vectors
from .triton_pack import Slots


class Packing(NamedTuple):
    """How sub-centroids are packed for a product: arguments of `pack_rows`."""

    block_m: int
    block_d: int
    slots: Slots


def bits_of(x: Tensor) -> int:
    """What products of x are made of: 16, 19 (tf32) or 32 bits."""
    return 16 if x.dtype != torch.float32 else 19 if dot_precision(x) == "tf32" else 32


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


def _head_gradient_bytes(use: Mapping[str, Any], shape: Mapping[str, int]) -> int:
    """Shared memory of scores_gradient; with one k a step is a class tile, whose gradients, logits and winners come ahead."""
    blocks = _blocks(use, shape)
    ahead = steps_held(use, shape) * blocks["BLOCK_N"] * blocks["BLOCK_C"] * 9 if shape["K"] == 1 else 0
    return _scores_gradient_bytes(use, shape) + ahead


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
    "head_gradient": _head_gradient_bytes,
}


def blocks_of(
    kernel: str, x: Tensor, centroids: Tensor, family: str = "similarity", **state: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Block sizes and launch options. `x`: pixels that a kernel reads, or writes where it reads none. `state`: for its need."""
    classes, k, channels = centroids.shape
    shape = {"C": classes, "K": k, "D": channels, "bits": bits_of(x)}
    use = configuration(family, kernel, x.device, _NEED[kernel], **shape, **state, even=vectors(x, pixels_of(x)))
    blocks = _blocks(use, shape)
    return blocks, {key: value for key, value in use.items() if key != "KEEP_D" and key not in blocks}


def packing_of(blocks: Mapping[str, int], centroids: Tensor) -> tuple[Packing, int]:
    """How sub-centroids are packed for these blocks, and the channels that rows then have."""
    classes, k, channels = centroids.shape
    width, copies = blocks["BLOCK_C"], blocks["BLOCK_K"]
    deepest = max(blocks["BLOCK_D"], blocks.get("BLOCK_GRAD", 0))
    slots = Slots(width, copies, cdiv(k, copies), cdiv(classes, width))
    return Packing(copies * width, deepest, slots), cdiv(channels, deepest) * deepest
