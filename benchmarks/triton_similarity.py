"""Launches of the similarity kernels for shape classes: what is compiled ahead of time, and what the tuner times."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import triton_contrast
from .aot import Case

#: Pixels of a shape class: those of an ADE20K step with 1024^2 crops at stride 4.
PIXELS = 131072


def inputs(device: torch.device, when: dict[str, int]) -> tuple[Tensor, Tensor, Tensor]:
    """X [N,D] near its class, centroids [C,K,D], labels [N], one pixel in ten without."""
    dtype = torch.bfloat16 if when["bits"] == 16 else torch.float32
    classes, k, channels = when["C"], when["K"], when["D"]
    pixels = max(4096, min(PIXELS, 2**33 // (classes * channels)))
    if device.type == "meta":
        return (
            torch.empty(pixels, channels, dtype=dtype, device=device),
            torch.empty(classes, k, channels, device=device),
            torch.empty(pixels, dtype=torch.int64, device=device),
        )
    generator = torch.Generator(device).manual_seed(0)
    centroids = F.normalize(torch.randn(classes, k, channels, generator=generator, device=device), dim=2)
    labels = torch.randint(0, classes, (pixels,), generator=generator, device=device)
    x = centroids[labels, 0] + torch.randn(pixels, channels, generator=generator, device=device) / channels**0.5
    labels[::10] = -100
    return F.normalize(x, dim=1).to(dtype), centroids, labels


def class_scores(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Scores, winners and own similarities."""
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = inputs(device, when)
    scores = x.new_empty((len(x), when["C"]), dtype=torch.float32)
    winner, own = scores.to(torch.uint8), scores.new_empty((len(x), when["K"]))
    return lambda: triton.class_scores(x, centroids, labels, "dot", scores, winner, own)


def _gradient(device: torch.device, when: dict[str, int], *, to_x: bool) -> Callable[[], None]:
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = inputs(device, when)
    grad = x.new_empty((len(x), when["C"]), dtype=torch.float32)
    winner = grad.to(torch.uint8)
    if device.type != "meta":
        grad.normal_()
        winner.random_(when["K"])
    target = torch.empty_like(x) if to_x else None
    to_centroids = None if to_x else torch.empty_like(centroids)
    return lambda: triton.class_scores_backward(x, centroids, labels, "dot", winner, grad, None, target, False, to_centroids)


def scores_gradient(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Gradient of the pixels from that of their scores."""
    return _gradient(device, when, to_x=True)


def centroid_gradient(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Gradient of the sub-centroids from that of the scores."""
    return _gradient(device, when, to_x=False)


def centroid_loss(device: torch.device, when: dict[str, int]) -> Callable[[], None]:
    """Loss, prediction, own similarities and dX in one pass, with LayerNorm over the classes."""
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = inputs(device, when)
    gain = torch.ones(when["C"], device=device)
    shift = torch.zeros_like(gain)
    loss = gain.new_empty(())
    prediction, own = torch.empty_like(labels), gain.new_empty((len(x), when["K"]))
    grads = (torch.empty_like(x), None, torch.empty_like(gain), torch.empty_like(gain), None)
    return lambda: triton.centroid_cross_entropy(
        x, centroids, labels, gain, shift, None, None, "dot", 1e-5, 1.0, -100, 0.0, "sum", None, loss, prediction, own, *grads
    )


def _candidates(**choices: tuple[int, ...]) -> Callable[[dict[str, int]], list[dict[str, Any]]]:
    def made(when: dict[str, int]) -> list[dict[str, Any]]:
        return [dict(zip(choices, values, strict=True)) for values in product(*choices.values())]

    return made


_TILES: dict[str, tuple[int, ...]] = {
    "BLOCK_N": (64, 128),
    "BLOCK_C": (32, 64, 128),
    "BLOCK_K": (1, 2, 4),
    "BLOCK_D": (64, 128, 256, 512),
    "num_warps": (4, 8),
    "num_stages": (2, 3, 4),
}

CASES = {
    "class_scores": Case(class_scores, _candidates(**_TILES)),
    "scores_gradient": Case(scores_gradient, _candidates(**{**_TILES, "BLOCK_D": (64, 128, 256)})),
    "centroid_gradient": Case(
        centroid_gradient, _candidates(**{**_TILES, "BLOCK_N": (32, 64, 128), "BLOCK_D": (64, 128, 256)})
    ),
    **triton_contrast.CASES,
    "centroid_loss": Case(centroid_loss, _candidates(**_TILES, BLOCK_GRAD=(128, 256, 512), PROGRAMS=(1, 2))),
}
