"""Plain torch: what the similarity kernels must equal. Any float dtype, any device, differentiable; [N,C,K] is materialised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from .._common import compute_dtype, flat_pixels, full_precision, pixel_map


def similarity(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """[N,C,K]: <x,p>, <x,p>/(|x||p|) or -|x-p|^2, in the compute type."""
    dtype = compute_dtype(x, centroids)
    with full_precision(x):
        pixels, rows = flat_pixels(x).to(dtype), centroids.to(dtype).flatten(0, 1)
        if metric == "cosine":
            pixels, rows = F.normalize(pixels, dim=1), F.normalize(rows, dim=1)
        product = pixels @ rows.T
        if metric == "sqeuclidean":
            product = 2 * product - pixels.square().sum(1, keepdim=True) - rows.square().sum(1)
    return product.view(-1, *centroids.shape[:2])


def centroid_distance(x: Tensor, centroids: Tensor, metric: str) -> Tensor:
    """[N,C,K]: 1 - cosine, or |x-p|^2."""
    s = similarity(x, centroids, metric)
    return 1 - s if metric == "cosine" else -s


def class_scores(x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str) -> tuple[Tensor, Tensor, Tensor | None]:
    """Scores [N,C], winners [N,C] uint8, own-class similarities [N,K] (zero rows for labels outside [0,C))."""
    s = similarity(x, centroids, metric)
    scores, winner = s.max(2)
    scores = scores + torch.where(_finite(scores), 0.0, float("nan"))[:, None]
    own = None
    if labels is not None:
        valid = (labels >= 0) & (labels < centroids.shape[0])
        own = s[torch.arange(labels.shape[0], device=x.device), torch.where(valid, labels, 0)]
        own = torch.where(valid[:, None], own, 0.0)
    return scores, winner.to(torch.uint8), own


def nearest_centroid(x: Tensor, centroids: Tensor, metric: str) -> tuple[Tensor, Tensor, Tensor]:
    """Class [N], sub-centroid [N] and similarity [N] of the nearest sub-centroid of all."""
    score, index = similarity(x, centroids, metric).flatten(1).max(1)
    finite = score.isfinite()
    label, sub = index // centroids.shape[1], index % centroids.shape[1]
    return torch.where(finite, label, -1), torch.where(finite, sub, -1), torch.where(finite, score, float("nan"))


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
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss, prediction [N], own-class similarities [N,K]."""
    counts = (labels >= 0) & (labels < centroids.shape[0])  # ignore_index is no class
    logits, _, own = class_scores(x, centroids, labels, metric)
    labels = torch.where(counts, labels, ignore_index)
    assert own is not None
    if norm_weight is not None:
        bias = None if norm_bias is None else norm_bias.to(logits.dtype)
        with full_precision(x):
            logits = F.layer_norm(logits, logits.shape[1:], norm_weight.to(logits.dtype), bias, norm_eps)
    logits = logits / temperature
    if scale is not None:
        logits = logits * scale.to(logits.dtype)
    weight = None if class_weight is None else class_weight.to(logits.dtype)
    with full_precision(x):
        loss = F.cross_entropy(
            logits, labels, weight, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
        )
    prediction = torch.where(_finite(logits), logits.argmax(1), -1)
    return loss, prediction, own.detach()


def subcentroid_cross_entropy(
    x: Tensor, centroids: Tensor, target: Tensor, temperature: float, ignore_index: int, reduction: str
) -> Tensor:
    """Cross-entropy over all C*K similarities."""
    logits = similarity(x, centroids, "dot").flatten(1) / temperature
    target = torch.where((target >= 0) & (target < logits.shape[1]), target, ignore_index)
    with full_precision(x):
        return F.cross_entropy(logits, target, ignore_index=ignore_index, reduction=reduction)


def scores_into(x: Tensor, centroids: Tensor, labels: Tensor, scores: Tensor, winner: Tensor, own: Tensor) -> None:
    """What `op.scores_into` says."""
    made = class_scores(x, centroids, labels, "dot")
    assert made[2] is not None
    scores.copy_(pixel_map(x, made[0]))
    winner.copy_(pixel_map(x, made[1]))
    own.copy_(made[2])


def scores_and_contrast_into(
    x: Tensor,
    centroids: Tensor,
    labels: Tensor,
    temperature: float,
    scale: Tensor,
    scores: Tensor,
    winner: Tensor,
    own: Tensor,
    lse: Tensor,
    gradient: Tensor | None,
) -> None:
    """What `op_loss.scores_and_contrast_into` says."""
    scores_into(x, centroids, labels, scores, winner, own)
    dtype, kept = lse.dtype, (labels >= 0)[:, None]
    logits = similarity(x, centroids, "dot").flatten(1) / temperature
    if gradient is not None:
        rows = logits.softmax(1) @ (centroids.to(dtype).flatten(0, 1) * (scale / temperature))
        gradient.copy_(pixel_map(x, torch.where(kept, rows, 0)))
    lse.copy_(torch.where(kept[:, 0], logits.logsumexp(1), 0))


def add_scores_gradient_(grad: Tensor, centroids: Tensor, winner: Tensor, grad_scores: Tensor) -> None:
    """What `op.add_scores_gradient_` says."""
    to_scores = flat_pixels(grad_scores)
    dense = to_scores.new_zeros(len(to_scores), *centroids.shape[:2])
    dense.scatter_(2, flat_pixels(winner).long()[..., None], to_scores[..., None])
    grad += pixel_map(grad, dense.flatten(1) @ centroids.to(dense.dtype).flatten(0, 1))


def add_own_gradient_(grad: Tensor, centroids: Tensor, labels: Tensor, grad_own: Tensor) -> None:
    """What `op.add_own_gradient_` says."""
    rows = torch.einsum("nk,nkd->nd", grad_own, centroids.to(grad_own.dtype)[labels.clamp(min=0)])
    grad += pixel_map(grad, torch.where((labels >= 0)[:, None], rows, 0))


def similarity_backward(
    pixels: Tensor, rows: Tensor, grad: Tensor, metric: str, to_pixels: bool, to_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of pixels [N,D] and sub-centroids [M,D] for that of their similarities [N,M], where wanted. No autograd."""
    grad_pixels = grad_rows = None
    if metric == "cosine":
        length_x, length_p = (t.norm(dim=1, keepdim=True).clamp_min(1e-12) for t in (pixels, rows))
        unit_x, unit_p = pixels / length_x, rows / length_p
        if to_pixels:
            u = grad @ unit_p
            grad_pixels = (u - unit_x * (unit_x * u).sum(1, keepdim=True)) / length_x
        if to_rows:
            u = grad.T @ unit_x
            grad_rows = (u - unit_p * (unit_p * u).sum(1, keepdim=True)) / length_p
        return grad_pixels, grad_rows
    if to_pixels:
        grad_pixels = grad @ rows
    if to_rows:
        grad_rows = grad.T @ pixels
    if metric == "sqeuclidean":
        if grad_pixels is not None:
            grad_pixels = 2 * (grad_pixels - pixels * grad.sum(1, keepdim=True))
        if grad_rows is not None:
            grad_rows = 2 * (grad_rows - rows * grad.sum(0)[:, None])
    return grad_pixels, grad_rows


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
    """What the launchers of that name do, by dense products over 4096 pixels at a time. No autograd."""
    (classes, k, _), dtype = centroids.shape, compute_dtype(x, centroids)
    rows, pixels = centroids.to(dtype).flatten(0, 1), flat_pixels(x)
    to_pixels = None if grad_x is None else pixels.new_empty(pixels.shape, dtype=dtype)
    to_rows = torch.zeros_like(rows)
    for first in range(0, len(pixels), 4096):
        band = slice(first, first + 4096)
        some = pixels[band].to(dtype)
        grad = some.new_zeros(len(some), classes, k)
        if grad_scores is not None and winner is not None:
            grad.scatter_(2, flat_pixels(winner)[band].long()[..., None], flat_pixels(grad_scores)[band].to(dtype)[..., None])
        if grad_own is not None and labels is not None:
            y = labels[band]
            kept = (y >= 0) & (y < classes)
            own = torch.where(kept[:, None], grad_own[band].to(dtype), 0)
            grad.scatter_add_(1, torch.where(kept, y, 0)[:, None, None].expand(-1, 1, k), own[:, None])
        made = similarity_backward(some, rows, grad.flatten(1), metric, grad_x is not None, grad_centroids is not None)
        if to_pixels is not None and made[0] is not None:
            to_pixels[band] = made[0]
        if made[1] is not None:
            to_rows += made[1]
    if grad_x is not None and to_pixels is not None:
        total = pixel_map(x, to_pixels)
        grad_x.copy_(total + grad_x if accumulate else total)
    if grad_centroids is not None:
        grad_centroids.copy_(to_rows.view_as(centroids))


def _finite(scores: Tensor) -> Tensor:
    return scores.detach().isfinite().all(1)
