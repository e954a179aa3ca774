"""Where sub-centroids start: random directions, orthogonal ones, or pixels of the data."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import ops
from .._tensors import flat_pixels, full_precision


def uniform(shape: tuple[int, ...], device: torch.device, generator: Generator | None) -> Tensor:
    """Uniform numbers in (0,1), fp32, drawn where the generator lives so that a CPU generator serves every device."""
    if generator is None:
        drawn = torch.rand(shape, device=device, dtype=torch.float32)
    else:
        drawn = torch.rand(shape, generator=generator, device=generator.device, dtype=torch.float32).to(device)
    return drawn.clamp_(torch.finfo(torch.float32).tiny, 1 - torch.finfo(torch.float32).eps)


def gumbel_(uniform: Tensor) -> Tensor:
    """Standard Gumbel noise, in place: the argmax of ``log(weight) + noise`` is a draw in proportion to weight."""
    return uniform.log_().neg_().log_().neg_()


def random_directions(rows: int, channels: int, device: torch.device, generator: Generator | None) -> Tensor:
    """[M,D] independent directions, uniform on the sphere."""
    where = device if generator is None else generator.device
    return F.normalize(torch.randn(rows, channels, generator=generator, device=where, dtype=torch.float32), dim=1).to(device)


def orthogonal_directions(rows: int, channels: int, device: torch.device, generator: Generator | None) -> Tensor:
    """[M,D] directions in blocks of D orthogonal ones; so the K of a class are orthogonal where one block holds them."""
    where = device if generator is None else generator.device
    blocks = -(-rows // channels)
    square = torch.randn(blocks, channels, channels, generator=generator, device=where, dtype=torch.float32)
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
    centroids, known = spread(pixels, group, start, None, generator)
    for _ in range(refinements):
        own = own_similarity(pixels, centroids, group)
        nearest = torch.where(known[index], own, -torch.inf).argmax(1)
        sums = ops.cluster_sums(pixels, torch.where(usable, index * k + nearest, -1), classes * k).sums.view_as(centroids)
        length = sums.norm(dim=2, keepdim=True)
        centroids = torch.where((length > 0) & known[..., None], sums / length, centroids)
    return centroids, counts


def spread(
    pixels: Tensor, group: Tensor, centroids: Tensor, known: Tensor | None, generator: Generator | None
) -> tuple[Tensor, Tensor]:
    """k-means++: each sub-centroid that is not known becomes a pixel of its class, drawn in proportion to the squared distance
    from those that are.

    Args:
        pixels: [N,D] unit rows, finite.
        group: [N] class of each, negative: left out.
        centroids: [C,K,D]; what is not known stays where its class has no distinct pixel left.
        known: [C,K] bool; None: none is.
        generator: source of the draws.

    Returns:
        [C,K,D], and which are known now [C,K].
    """
    index = group.clamp(min=0)
    centroids = centroids.clone()
    distance = pixels.new_ones(len(pixels))  # 1 - cosine to the nearest: half the squared distance
    if known is None:
        known = torch.zeros(centroids.shape[:2], dtype=torch.bool, device=pixels.device)
    else:
        known = known.clone()
        nearest = torch.where(known[index], own_similarity(pixels, centroids, group), -torch.inf).amax(1)
        distance = torch.where(nearest > -torch.inf, 1 - nearest, distance)
    for j in range(centroids.shape[1]):
        # rounding leaves a chosen pixel and its copies at a distance of some eps: not distinct
        weight = torch.where(distance > 8 * torch.finfo(pixels.dtype).eps, distance, 0)
        noise = gumbel_(uniform((len(pixels),), pixels.device, generator)).to(pixels.dtype)
        pick, best = first_of_each_class(weight.log() + noise, group, len(centroids))
        new = (best > -torch.inf) & ~known[:, j]
        centroids[:, j] = torch.where(new[:, None], pixels[pick], centroids[:, j])
        cosine = (pixels * centroids[:, j][index]).sum(1)
        distance = torch.where(new[index], torch.minimum(distance, 1 - cosine), distance)
        known[:, j] |= new
    return centroids, known


def own_similarity(x: Tensor, centroids: Tensor, group: Tensor) -> Tensor:
    """[N,K]: similarity of rows x [N,D] to the sub-centroids [C,K,D] of their class; without meaning where group is negative.

    N*K*D multiplications in place of the N*C*K*D that scores of all classes take, which only a GPU has to spare: of few rows a
    class each meets its own sub-centroids (64 MB of them at a time), of many there is one product a class.
    """
    classes, k, channels = centroids.shape
    few = len(x) < 8 * classes
    if not few and x.device.type != "cpu":
        own = ops.class_scores(x, centroids, group).own_similarity
        assert own is not None
        return own
    x, centroids = (t.to(torch.promote_types(x.dtype, centroids.dtype)) for t in (x, centroids))
    own = x.new_zeros(len(x), k)
    with full_precision(x):
        if few:
            rows = max(1, 2**24 // (k * channels))
            for part, some, ids in zip(own.split(rows), x.split(rows), group.clamp(min=0).split(rows), strict=True):
                part.copy_(torch.bmm(centroids[ids], some[:, :, None])[..., 0])
            return own
        order = group.argsort(stable=True)
        present, sizes = group[order].unique_consecutive(return_counts=True)
        for c, mine in zip(present.tolist(), order.split(sizes.tolist()), strict=True):
            if c >= 0:
                own[mine] = x[mine] @ centroids[c].T
    return own
