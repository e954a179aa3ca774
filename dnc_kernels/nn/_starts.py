"""Where sub-centroids start: random directions, orthogonal ones, or pixels of the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import ops
from ..ops._common import flat_pixels


def uniform(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Uniform numbers in (0,1), fp32, drawn where the generator lives so that a CPU generator serves every device."""
    drawn = torch.rand(shape, device=device) if generator is None else _seeded(shape, generator).to(device)
    return drawn.clamp(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps)


@torch._disable_dynamo  # as in `_sync`
def _seeded(shape: tuple[int, ...], generator: Generator) -> Tensor:
    # torch.compile cannot trace a generator
    return torch.rand(shape, generator=generator, device=generator.device)


def gumbel(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Standard Gumbel noise: the argmax of ``log(weight) + gumbel`` is a draw in proportion to weight."""
    return -torch.log(-torch.log(uniform(shape, device, generator)))


def random_directions(rows: int, channels: int, device: torch.device, generator: Generator | None) -> Tensor:
    """[M,D] independent directions, uniform on the sphere."""
    where = device if generator is None else generator.device
    return F.normalize(torch.randn(rows, channels, generator=generator, device=where), dim=1).to(device)


def orthogonal_directions(rows: int, channels: int, device: torch.device, generator: Generator | None) -> Tensor:
    """[M,D] directions in blocks of D orthogonal ones; so the K of a class are orthogonal where one block holds them."""
    where = device if generator is None else generator.device
    blocks = -(-rows // channels)
    square = torch.randn(blocks, channels, channels, generator=generator, device=where)
    basis, triangle = torch.linalg.qr(square)
    # QR alone is not uniform: its signs follow the factorisation
    basis = basis * triangle.diagonal(dim1=1, dim2=2).sign()[:, None]
    return F.normalize(basis.reshape(-1, channels)[:rows], dim=1).to(device)


def first_of_each_class(key: Tensor, group: Tensor, groups: int) -> tuple[Tensor, Tensor]:
    """Index of the pixel with the largest key of each group (the first on ties) and that key; -Inf and 0 for an empty group.

    Args:
        key: [N] float; -Inf leaves a pixel out.
        group: [N] int64, negative: left out.
        groups: C.
    """
    index = group.clamp(min=0)
    key = torch.where(group >= 0, key, -torch.inf)
    best = key.new_full((groups,), -torch.inf).scatter_reduce_(0, index, key, "amax")
    n = len(key)
    position = torch.where((key == best[index]) & (key > -torch.inf), torch.arange(n, device=key.device), n)
    first = torch.full((groups,), n, dtype=torch.int64, device=key.device).scatter_reduce_(0, index, position, "amin")
    return torch.where(first < n, first, 0), best


def data_start(
    x: Tensor, group: Tensor, start: Tensor, *, refinements: int, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """k-means++ per class on unit features, all classes at once, then spherical k-means steps.

    The first sub-centroid of a class is one of its pixels at random, each next one a pixel drawn in proportion to its squared
    distance from those chosen so far. A class with fewer distinct pixels than K keeps `start` for the rest; one without pixels
    keeps all of it.

    Args:
        x: [N,D] or [B,D,H,W] float features, normalised here.
        group: [N] class of each pixel, negative: left out.
        start: [C,K,D] fp32 or fp64.
        refinements: k-means steps.
        generator: source of the draws.

    Returns:
        [C,K,D] unit rows, and the number of pixels of each class [C].
    """
    classes, k, _ = start.shape
    pixels = F.normalize(flat_pixels(x).to(start.dtype), dim=1)
    usable = (group >= 0) & pixels.isfinite().all(1) & (pixels.abs().amax(1) > 0)
    group = torch.where(usable, group, -1)
    index = group.clamp(min=0)
    counts = torch.zeros(classes, dtype=torch.int64, device=x.device).index_add_(0, index, usable.to(torch.int64))
    if len(pixels) == 0:
        return start.clone(), counts
    pixels = torch.where(usable[:, None], pixels, 0)
    centroids, chosen = start.clone(), torch.zeros(classes, k, dtype=torch.bool, device=x.device)
    distance = pixels.new_ones(len(pixels))  # 1 - cosine to the nearest chosen: half the squared distance
    for j in range(k):
        # rounding leaves a chosen pixel and its copies at a distance of some eps: not distinct
        weight = torch.where(distance > 8 * torch.finfo(pixels.dtype).eps, distance, 0)
        noise = gumbel((len(pixels),), x.device, generator).to(pixels.dtype)
        pick, best = first_of_each_class(weight.log() + noise, group, classes)
        chosen[:, j] = best > -torch.inf
        centroids[:, j] = torch.where(chosen[:, j, None], pixels[pick], start[:, j])
        cosine = (pixels * centroids[:, j][index]).sum(1)
        distance = torch.where(chosen[:, j][index], torch.minimum(distance, 1 - cosine), distance)
    for _ in range(refinements):
        own = ops.class_scores(pixels, centroids, group).own_similarity
        assert own is not None
        nearest = torch.where(chosen[index], own, -torch.inf).argmax(1)
        sums = ops.cluster_sums(pixels, torch.where(usable, index * k + nearest, -1), classes * k).sums.view_as(centroids)
        length = sums.norm(dim=2, keepdim=True)
        centroids = torch.where((length > 0) & chosen[..., None], sums / length, centroids)
    return centroids, counts
