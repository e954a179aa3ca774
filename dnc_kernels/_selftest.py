"""Every op once on a small problem: what the doctor compares with float64."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import ops


@dataclass
class Data:
    """A small problem: 257 pixels, 5 classes of 3 sub-centroids, 33 channels, one class absent, some pixels ignored."""

    x: Tensor
    centroids: Tensor
    labels: Tensor
    cluster: Tensor
    group: Tensor
    similarity: Tensor
    weight: Tensor
    maps: Tensor
    map_labels: Tensor

    def to(self, dtype: torch.dtype, device: str) -> Data:
        """A copy that a case may change."""
        moved = {}
        for name, tensor in vars(self).items():
            moved[name] = tensor.to(device, dtype if tensor.is_floating_point() else tensor.dtype, copy=True)
        return Data(**moved)


def data() -> Data:
    generator = torch.Generator().manual_seed(20)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    pixels, classes, k, channels = 257, 5, 3, 33
    labels = torch.arange(pixels) * 7 % (classes - 1)
    labels[::11] = -100
    group = torch.where(labels < 0, -1, labels)
    cluster = torch.where(labels < 0, -1, labels * k + torch.arange(pixels) % k)
    map_labels = torch.randint(0, classes, (2, 13, 10), generator=generator)
    map_labels[:, 0] = -100
    return Data(
        x=normal(pixels, channels),
        centroids=torch.nn.functional.normalize(normal(classes, k, channels), dim=2),
        labels=labels,
        cluster=cluster,
        group=group,
        similarity=0.3 * normal(pixels, k),
        weight=normal(pixels, k),
        maps=normal(2, classes, 5, 4),
        map_labels=map_labels,
    )


def _grad(loss: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(loss, inputs)


def _centroid_distance(d: Data) -> tuple[Tensor, ...]:
    x = d.x.requires_grad_()
    distance = ops.centroid_distance(x, d.centroids)
    return distance, *_grad(distance.square().sum(), x)


def _class_scores(d: Data) -> tuple[Tensor, ...]:
    x = d.x.requires_grad_()
    scores, winner, own = ops.class_scores(x, d.centroids, d.labels)
    assert own is not None  # for the type checker: labels were given
    return scores, winner, own, *_grad(scores.square().sum() + own.square().sum(), x)


def _centroid_cross_entropy(d: Data) -> tuple[Tensor, ...]:
    x, weight = d.x.requires_grad_(), torch.ones_like(d.centroids[:, 0, 0]).requires_grad_()
    loss, prediction, own = ops.centroid_cross_entropy(
        x, d.centroids, d.labels, norm_weight=weight, norm_bias=torch.zeros_like(weight)
    )
    return loss, prediction, own, *_grad(loss, x, weight)


def _subcentroid_cross_entropy(d: Data) -> tuple[Tensor, ...]:
    x = d.x.requires_grad_()
    loss = ops.subcentroid_cross_entropy(x, d.centroids, d.cluster, temperature=0.5, ignore_index=-1)
    return loss, *_grad(loss, x)


def _sinkhorn_plan(d: Data) -> tuple[Tensor, ...]:
    similarity = d.similarity.requires_grad_()
    plan = ops.sinkhorn_plan(similarity, d.group, 5)
    return plan, *_grad((plan * d.weight).sum(), similarity)


def _momentum_update_(d: Data) -> tuple[Tensor, ...]:
    ops.momentum_update_(d.centroids, d.x, d.cluster, momentum=0.9)
    return (d.centroids,)


def _apply_momentum_(d: Data) -> tuple[Tensor, ...]:
    ops.apply_momentum_(d.centroids, d.x[:15].contiguous(), torch.arange(15, device=d.x.device) % 4, momentum=0.9)
    return (d.centroids,)


def _normalize_embedding(d: Data) -> tuple[Tensor, ...]:
    x, weight = d.x.requires_grad_(), d.x[0].detach().clone().requires_grad_()
    y = ops.normalize_embedding(x, weight, d.x[1].detach())
    return y, *_grad((y * d.x.detach()).sum(), x, weight)


def _upsample_cross_entropy(d: Data) -> tuple[Tensor, ...]:
    maps = d.maps.requires_grad_()
    loss = ops.upsample_cross_entropy(maps, d.map_labels)
    return loss, *_grad(loss, maps)


def _head_step(d: Data) -> tuple[Tensor, ...]:
    from .nn import DNCHead  # which is made of the ops

    batch, classes, height, width = d.maps.shape
    x = d.x[: batch * height * width].T.reshape(1, -1, batch * height, width).contiguous().requires_grad_()
    head = DNCHead(
        x.shape[1],
        classes,
        d.centroids.shape[1],
        momentum=0.9,
        device=x.device,
        dtype=x.dtype,
        generator=torch.Generator(x.device),
    )
    head.prototypes.copy_(d.centroids)
    labels = d.map_labels.reshape(1, -1, d.map_labels.shape[2])
    loss = head.loss(x, labels).loss
    return *_grad(loss, x), head.prototypes


#: A case maps the data, in float32 or float64, to results and, where the op is differentiable, gradients.
CASES: dict[str, Callable[[Data], tuple[Tensor, ...]]] = {
    "centroid_distance": _centroid_distance,
    "class_scores": _class_scores,
    "nearest_centroid": lambda d: tuple(ops.nearest_centroid(d.x, d.centroids)),
    "centroid_cross_entropy": _centroid_cross_entropy,
    "subcentroid_cross_entropy": _subcentroid_cross_entropy,
    "sinkhorn_assign": lambda d: (ops.sinkhorn_assign(d.similarity, d.group, 5),),
    "sinkhorn_plan": _sinkhorn_plan,
    "cluster_sums": lambda d: tuple(ops.cluster_sums(d.x, d.cluster, 15)),
    "momentum_update_": _momentum_update_,
    "apply_momentum_": _apply_momentum_,
    "normalize_embedding": _normalize_embedding,
    "upsample_cross_entropy": _upsample_cross_entropy,
    "upsample_argmax": lambda d: (ops.upsample_argmax(d.maps, (13, 10)),),
    "head_step": _head_step,
}


def worst_error(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Largest error relative to the largest element; infinite for a different index, count, shape or place of a NaN."""
    worst = 0.0
    for got, want in zip(actual, expected, strict=True):
        got, want = got.detach().cpu(), want.detach().cpu()
        if got.shape != want.shape or got.isnan().any() or (not want.is_floating_point() and not torch.equal(got, want)):
            return float("inf")
        if want.is_floating_point():
            worst = max(worst, float((got.double() - want).abs().max() / want.abs().max()))
    return worst
