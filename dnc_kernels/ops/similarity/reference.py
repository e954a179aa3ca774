"""Plain torch: what the similarity kernels must equal. Any float dtype, any device, differentiable; [N,C,K] is materialised."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..._tensors import compute_dtype, flat_pixels, full_precision, like_pixels, pixel_map
from .._common import check_label_range
from .calls import (
    ContrastCall,
    DistanceCall,
    LossCall,
    LossOut,
    NearestCall,
    NearestOut,
    ScoresBackwardCall,
    ScoresBackwardOut,
    ScoresCall,
    ScoresOut,
    SweepCall,
    SweepOut,
)


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


def centroid_distance(call: DistanceCall) -> Tensor:
    """[N,C,K]: 1 - cosine, or |x-p|^2."""
    s = similarity(call.x, call.centroids, call.metric)
    return 1 - s if call.metric == "cosine" else -s


def class_scores(call: ScoresCall) -> ScoresOut:
    """Scores and winners like the pixels, own-class similarities [N,K] (zero rows for negative labels)."""
    if call.labels is not None:
        check_label_range("class_scores", call.labels, call.centroids.shape[0])
    scores, winner, own = _class_scores(call.x, call.centroids, call.labels, call.metric)
    return ScoresOut(pixel_map(call.x, scores), pixel_map(call.x, winner), own)


def _class_scores(x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str) -> tuple[Tensor, Tensor, Tensor | None]:
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


def nearest_centroid(call: NearestCall) -> NearestOut:
    """Class [N], sub-centroid [N] and similarity [N] of the nearest sub-centroid of all."""
    score, index = similarity(call.x, call.centroids, call.metric).flatten(1).max(1)
    finite = score.isfinite()
    label, sub = index // call.centroids.shape[1], index % call.centroids.shape[1]
    return NearestOut(torch.where(finite, label, -1), torch.where(finite, sub, -1), torch.where(finite, score, float("nan")))


def centroid_cross_entropy(call: LossCall, wanted: list[bool]) -> LossOut:
    """Loss, prediction [N], own-class similarities [N,K]; its gradients are autograd's."""
    x, labels, classes = call.x, call.labels, call.centroids.shape[0]
    check_label_range("centroid_cross_entropy", labels, classes, call.ignore_index)
    counts = (labels >= 0) & (labels < classes)  # ignore_index is no class
    x, finite = _shielded(x, counts)
    logits, _, own = _class_scores(x, call.centroids, labels, call.metric)
    assert own is not None
    finite = finite & _finite(logits)
    logits = torch.where((finite | counts)[:, None], logits, 0)
    with full_precision(x):
        if call.norm_weight is not None:
            logits = F.layer_norm(logits, logits.shape[1:], call.norm_weight, call.norm_bias, call.norm_eps)
        logits = logits / call.temperature
        if call.scale is not None:
            logits = logits * call.scale
        loss = F.cross_entropy(
            logits, torch.where(counts, labels, call.ignore_index), call.class_weight, ignore_index=call.ignore_index,
            reduction=call.reduction, label_smoothing=call.label_smoothing,
        )  # fmt: skip
    prediction = torch.where(finite & _finite(logits), logits.argmax(1), -1)
    return LossOut(loss, prediction, own.detach())


def subcentroid_cross_entropy(call: ContrastCall, reduction: str) -> Tensor:
    """Cross-entropy over all C*K similarities."""
    labels = call.centroids.shape[0] * call.centroids.shape[1]
    check_label_range("subcentroid_cross_entropy", call.target, labels, call.ignore_index)
    counts = (call.target >= 0) & (call.target < labels)
    target = torch.where(counts, call.target, call.ignore_index)
    logits = similarity(_shielded(call.x, counts)[0], call.centroids, "dot").flatten(1) / call.temperature
    logits = torch.where(counts[:, None], logits, 0)
    with full_precision(call.x):
        return F.cross_entropy(logits, target, ignore_index=call.ignore_index, reduction=reduction)


def scores_and_contrast(call: SweepCall, out: SweepOut) -> None:
    """What the launchers of that name do. No autograd."""
    x, labels, dtype = call.x, call.labels, out.loss.dtype
    for target, value in zip(out, class_scores(ScoresCall(x, call.centroids, labels, "dot", call.backend)), strict=False):
        target.copy_(value)  # type: ignore[union-attr,arg-type]
    kept = (labels >= 0)[:, None]
    logits = similarity(x, call.centroids, "dot").flatten(1) / call.temperature
    if out.grad_x is not None:
        rows = logits.softmax(1) @ (call.centroids.to(dtype).flatten(0, 1) * (call.scale / call.temperature))
        out.grad_x.copy_(pixel_map(x, torch.where(kept, rows, 0)))
    out.loss.copy_(torch.where(kept[:, 0], logits.logsumexp(1), 0))


def similarity_backward(
    pixels: Tensor, rows: Tensor, grad: Tensor, metric: str, to_pixels: bool, to_rows: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of pixels [N,D] and sub-centroids [M,D] for that of their similarities [N,M], where wanted. No autograd."""
    grad_pixels = grad_rows = None
    pixels = torch.where((grad != 0).any(1, keepdim=True), pixels, 0)  # one that is sent nothing must not get 0 * NaN
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


def class_scores_backward(call: ScoresBackwardCall, out: ScoresBackwardOut) -> None:
    """What the launchers of that name do, by dense products over 4096 pixels at a time. No autograd."""
    (classes, k, _), dtype = call.centroids.shape, compute_dtype(call.x, call.centroids)
    rows, pixels = call.centroids.to(dtype).flatten(0, 1), flat_pixels(call.x)
    to_pixels = None if out.grad_x is None else pixels.new_empty(pixels.shape, dtype=dtype)
    to_rows = torch.zeros_like(rows)
    for first in range(0, len(pixels), 4096):
        band = slice(first, first + 4096)
        some = pixels[band].to(dtype)
        grad = some.new_zeros(len(some), classes, k)
        if call.grad_scores is not None and call.winner is not None:
            winner, to_scores = flat_pixels(call.winner)[band].long(), flat_pixels(call.grad_scores)[band].to(dtype)
            grad.scatter_(2, winner[..., None], to_scores[..., None])
        if call.grad_own_similarity is not None and call.labels is not None:
            y = call.labels[band]
            kept = (y >= 0) & (y < classes)
            own = torch.where(kept[:, None], call.grad_own_similarity[band].to(dtype), 0)
            grad.scatter_add_(1, torch.where(kept, y, 0)[:, None, None].expand(-1, 1, k), own[:, None])
        wanted = out.grad_x is not None, out.grad_centroids is not None
        made = similarity_backward(some, rows, grad.flatten(1), call.metric, *wanted)
        if to_pixels is not None and made[0] is not None:
            to_pixels[band] = made[0]
        if made[1] is not None:
            to_rows += made[1]
    if out.grad_x is not None and to_pixels is not None:
        total = pixel_map(call.x, to_pixels)
        out.grad_x.copy_(total + out.grad_x if call.accumulate else total)
    if out.grad_centroids is not None:
        out.grad_centroids.copy_(to_rows.view_as(call.centroids))


def _shielded(x: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """x with zeros for what is neither counted [N] nor finite, whose gradient would be 0 * NaN; which pixels [N] are finite."""
    finite = x.detach().isfinite().all(1)
    return torch.where((finite | like_pixels(x, counts))[:, None], x, 0), finite.flatten()


def _finite(scores: Tensor) -> Tensor:
    return scores.detach().isfinite().all(1)
