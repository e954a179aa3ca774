"""The mathematics of the ops in plain torch and float64, from their definitions, sharing no code with the package."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def rows(t: Tensor) -> Tensor:
    """[N,D] float64 of [N,D] or [B,D,H,W]."""
    t = t.double()
    return t if t.ndim == 2 else t.permute(0, 2, 3, 1).reshape(-1, t.shape[1])


def mapped(like: Tensor, values: Tensor) -> Tensor:
    """[N,...] as rows, or [B,...,H,W] as the map `like` [B,D,H,W] is; lone numbers [N] as [N] or [B,H,W]."""
    if like.ndim == 2:
        return values
    return values.reshape(like.shape[0], like.shape[2], like.shape[3], *values.shape[1:]).movedim((1, 2), (-2, -1))


def left_out(labels: Tensor, bound: int, ignore_index: int) -> Tensor:
    """[N] int64 ids in [0,bound), -1 where left out; numbers are compared as Python has them, whatever their dtype."""
    kept = [i if 0 <= i < bound and i != ignore_index else -1 for i in labels.flatten().tolist()]
    return torch.tensor(kept, dtype=torch.int64)


def similarity(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """[N,C,K] of rows x [N,D]."""
    p = centroids.double()
    if metric == "sqeuclidean":
        return -(x[:, None, None] - p).square().sum(3)
    if metric == "cosine":
        x, p = (t / t.norm(dim=-1, keepdim=True).clamp_min(1e-12) for t in (x, p))
    return torch.einsum("nd,ckd->nck", x, p)


def similarity_size(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """[N,C,K]: magnitude of what `similarity` adds up."""
    if metric == "cosine":
        return torch.full((len(x), *centroids.shape[:2]), 2.0, dtype=torch.float64)
    long_x, long_p = x.norm(dim=1)[:, None, None], centroids.double().norm(dim=2)
    return long_x * long_p if metric == "dot" else long_x.square() + long_p.square()


def pull_size(x: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Tensor]:
    """Magnitudes of the derivatives of `similarity`: in x [N,1], in the centroids [C,K,1]."""
    p = centroids.double()
    long_x, long_p = x.norm(dim=1, keepdim=True), p.norm(dim=2, keepdim=True)
    most_x = long_x.max() if len(x) else torch.zeros((), dtype=torch.float64)
    if metric == "cosine":
        return 3 / long_x.clamp_min(1e-12), 3 / long_p.clamp_min(1e-12)
    if metric == "dot":
        return long_p.max().expand_as(long_x), most_x.expand_as(long_p)
    return 2 * (long_x + long_p.max()), 2 * (long_p + most_x)


def cross_entropy(logits: Tensor, labels: Tensor, weight: Tensor | None, smoothing: float, reduction: str) -> Tensor:
    """As torch has it; labels of -1 are left out."""
    weight = None if weight is None else weight.double()
    return F.cross_entropy(logits, labels, weight, ignore_index=-1, label_smoothing=smoothing, reduction=reduction)


def shares(labels: Tensor, classes: int, weight: Tensor | None, smoothing: float, reduction: str) -> Tensor:
    """What the cross-entropy of each pixel [...] is multiplied by, all of its classes together; zero where left out."""
    w = torch.ones(classes, dtype=torch.float64) if weight is None else weight.double()
    own = torch.where(labels >= 0, w[labels.clamp_min(0)], 0)
    spread = smoothing * w.mean() if smoothing else 0  # a weight of inf times 0 is NaN
    amount = torch.where(labels >= 0, (1 - smoothing) * own + spread, 0)
    return amount / own.sum() if reduction == "mean" else amount


def interpolated(scores: Tensor, size: tuple[int, int], align_corners: bool) -> Tensor:
    """[B,C,H,W] float64; what has the size already as it is."""
    scores = scores.double()
    if tuple(scores.shape[2:]) == tuple(size):
        return scores
    return F.interpolate(scores, size=tuple(size), mode="bilinear", align_corners=align_corners)


def transport(
    s: Tensor, group: Tensor, groups: int, epsilon: float, iterations: int, tolerance: float | None
) -> tuple[Tensor, Tensor]:
    """Plan [N,K] of similarities s [N,K], class by class, and whether it is clear when each pixel's class stopped [N].

    group: [N], -1 where left out. Rows of zeros where left out, NaN where a similarity is not finite.
    """
    plan, clear = torch.zeros_like(s), torch.ones(len(s), dtype=torch.bool)
    finite = s.isfinite().all(1)
    plan[(group >= 0) & ~finite] = math.nan
    k = s.shape[1]
    for g in range(groups):
        mine = ((group == g) & finite).nonzero()[:, 0]
        if not len(mine):
            continue
        z = (s[mine] - s[mine].detach().max()) / epsilon  # which loses no digit of what all have
        u, v = z.new_zeros(k), z.new_zeros(len(mine), 1)
        for t in range(iterations):
            new = -math.log(k) - torch.logsumexp(z + v, 0)
            if t and tolerance is not None:
                off = float(((u - new).detach().exp() - 1).abs().max())
                clear[mine] &= not 0.9 * tolerance <= off <= 1.1 * tolerance + 1e-6
                if off <= tolerance:
                    break
            u = new
            v = -math.log(len(mine)) - torch.logsumexp(z + u, 1, keepdim=True)
        plan[mine] = (z + u).softmax(1)
    return plan, clear


def cluster_sums(x: Tensor, cluster: Tensor, clusters: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sums [M,D], counts [M] and sums of lengths [M] of rows x [N,D] that are finite and have a cluster."""
    kept = (cluster >= 0) & x.isfinite().all(1)
    where = torch.where(kept, cluster, clusters)
    x = torch.where(kept[:, None], x, 0)
    sums = torch.zeros(clusters + 1, x.shape[1], dtype=torch.float64).index_add(0, where, x)
    counts = torch.zeros(clusters + 1, dtype=torch.int64).index_add(0, where, torch.ones_like(where))
    sizes = torch.zeros(clusters + 1, dtype=torch.float64).index_add(0, where, x.norm(dim=1))
    return sums[:-1], counts[:-1], sizes[:-1]


def moved(before: Tensor, sums: Tensor, counts: Tensor, momentum: float) -> tuple[Tensor, Tensor]:
    """Sub-centroids [M,D] after the momentum update of `before` [M,D], and the length [M,1] that was divided by."""
    before = before.double()
    length = sums.norm(dim=1, keepdim=True)
    new = momentum * before + (1 - momentum) * sums / length
    norm = new.norm(dim=1, keepdim=True)
    ok = (counts > 0)[:, None] & length.isfinite() & (length > 0) & norm.isfinite() & (norm > 0)
    return torch.where(ok, new / norm, before), torch.where(ok, norm, 1)


def embedded(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    """Embedding [N,D], its affine before the last normalisation [N,D], and sqrt(var + eps) [N] of rows x [N,D]."""
    mean = x.mean(1, keepdim=True)
    length = ((x - mean).square().mean(1, keepdim=True) + eps).sqrt()
    z = (x - mean) / length
    z = z if weight is None else z * weight.double()
    z = z if bias is None else z + bias.double()
    zero = (z == 0).all(1, keepdim=True)
    norm = torch.where(zero, 1, z).norm(dim=1, keepdim=True).clamp_min(1e-12)
    return torch.where(zero, 0, z / norm), z, length[:, 0]


def nearest_labels(labels: Tensor, size: tuple[int, int], mode: str) -> Tensor:
    """[B,h,w] of labels [B,H,W]: what F.interpolate picks."""
    return F.interpolate(labels[:, None].float(), size=tuple(size), mode=mode)[:, 0].to(torch.int64)
