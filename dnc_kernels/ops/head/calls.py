"""The step of a segmentation head: what both of its passes work on, and what they give."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._op import record


@record
class Step(NamedTuple):
    """What both passes work on, whatever the weights of the parts of the loss; tensors without a graph."""

    x: Tensor  # [B,D,h,w]
    weight: Tensor  # [D], gain of the embedding's LayerNorm
    bias: Tensor  # [D]
    eps: float
    centroids: Tensor  # [C,K,D]
    labels: Tensor  # [B,H,W] of the cross-entropy
    ignored: int  # the label of none
    confidence: bool  # scores are multiplied by the length of the pixel's feature
    temperature: float
    scale: Tensor | None  # []
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None  # [C]
    norm_eps: float
    class_weight: Tensor | None  # [C]
    label_smoothing: float
    align_corners: bool
    contrast_temperature: float
    band_pixels: int
    backend: str  # the choice in force: a backend, or auto for that of each kernel


@record
class FirstPass(NamedTuple):
    """Results of the first pass; those that were not asked for are None."""

    total: Tensor  # [] summed cross-entropy
    prediction: Tensor  # [N] int64, -1 where scores are not finite
    own_similarity: Tensor  # [N,K]
    lse: Tensor | None  # [N] log-sum-exp of the contrast
    statistics: Tensor  # [3,N]: mean, rstd and inverse norm
    grad: Tensor | None  # like x, of the embedding
    grad_rstd: Tensor | None  # [N]
    grad_scale: Tensor  # []
    grad_norm: Tensor  # [2,C] of the norm over classes
    embedding: Tensor | None  # like x


@record
class Second(NamedTuple):
    """Arguments of the second pass: those of the step, what the first pass made, and what clustering decided."""

    x: Tensor  # [B,D,h,w]
    weight: Tensor  # [D]
    bias: Tensor  # [D]
    eps: float
    centroids: Tensor  # [C,K,D]
    statistics: Tensor  # [3,N]
    grad: Tensor | None  # like x: that of the embedding becomes that of x, in place
    grad_rstd: Tensor | None  # [N]
    embedding: Tensor | None  # like x, where it was kept
    target: Tensor | None  # [N]: c*K + k, or -1
    pull: Tensor | None  # [N]: gradient of the similarity to the target
    cluster: Tensor | None  # [N]: c*K + k of the pixels that move sub-centroids, -1 for the others
    band_pixels: int
    backend: str


@record
class SecondPass(NamedTuple):
    """Results of the second pass."""

    grad_affine: Tensor  # [2,D] of weight and bias
    sums: Tensor  # [M,D] of the pixels of each cluster; M = 0 without clusters
    counts: Tensor  # [M] int64
