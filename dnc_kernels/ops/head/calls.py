"""The step of a segmentation head in five parts: what each works on, and what it gives.

N pixels at feature size, D channels, C classes, K sub-centroids per class, M = C*K. Sums that a kernel makes in parts have a
leading dimension P: rows that are added up in order, by the last part.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._op import record

#: Columns of `factors`, [7] of the compute dtype. unit: gradients are made of this multiple of the loss; pull, contrast and
#: distance: what the gradients of the sums of cross-entropy, PPC and PPD are multiplied by; scale: exp(log_scale); weight and
#: count: what the sums are divided by.
UNIT, PULL, CONTRAST, DISTANCE, SCALE, WEIGHT, COUNT = range(7)


@record
class LabelsCall(NamedTuple):
    """Arguments of `head_labels`."""

    labels: Tensor  # [B,H,W] int64, int32 or uint8
    classes: int
    ignore_index: int
    height: int  # of the features
    width: int
    middle: bool  # the label in the middle of a pixel's cell, else the first
    weighted: bool  # classes count differently at label size; else one number will do for all of them
    zeros: int  # that a later part wants cleared
    counters: int
    backend: str


@record
class Labels(NamedTuple):
    """Results of `head_labels`. A label outside [0,C), or `ignore_index`, leaves its pixel out."""

    small: Tensor  # [N] int64, -1 for none
    counts: Tensor  # [P,2C+1] int32: pixels of each class at label size, at feature size, labels that are none and not ignored
    zeros: Tensor | None  # int64
    counters: Tensor | None  # int64 zeros


@record
class Step(NamedTuple):
    """What both passes work on; tensors without a graph."""

    x: Tensor  # [B,D,h,w]
    weight: Tensor  # [D], gain of the embedding's LayerNorm
    bias: Tensor  # [D]
    eps: float
    centroids: Tensor  # [C,K,D]
    labels: Tensor  # [B,H,W] of the cross-entropy
    ignored: int  # the label of none
    at_features: bool  # these labels are `Labels.small`
    confidence: bool  # scores are multiplied by the length of the pixel's feature
    temperature: float
    log_scale: Tensor | None  # []
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None  # [C]
    norm_eps: float
    class_weight: Tensor | None  # [C]
    label_smoothing: float
    align_corners: bool
    ppc_weight: float
    ppd_weight: float
    contrast_temperature: float
    zeros: Tensor | None  # tables of the transport, of which the first pass makes the maxima; None: it does not begin there
    band_pixels: int
    whole: bool  # one band, whose partial sums come as they are; else P = 1
    parts: str  # the choice in force for the ops of other families: a backend, or auto for that of each kernel
    backend: str


@record
class FirstArguments(NamedTuple):
    """Arguments of the first pass as C++ takes them: those of a `Step`, and the labels of own similarities and the contrast."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    centroids: Tensor
    labels: Tensor
    ignored: int
    confidence: bool
    temperature: float
    norm_eps: float
    norm_weight: Tensor | None
    norm_bias: Tensor | None
    class_weight: Tensor | None
    label_smoothing: float
    align_corners: bool
    contrast_temperature: float
    band_pixels: int
    sampled: Tensor  # [N] int64, -1 for none


@record
class FiguresCall(NamedTuple):
    """Arguments of C++'s `label_figures`."""

    labels: Tensor  # [B,H,W] int64, int32 or uint8
    ignored: int
    classes: int
    weighted: bool
    middle: bool  # as of `LabelsCall`


@record
class Figures(NamedTuple):
    """Results of C++'s `label_figures`, those wanted."""

    counts: Tensor | None = None  # [C] int32 labels that count, of each class, or of all as the first one
    range: Tensor | None = None  # [3] int64: least, largest, number of those that are no class and not ignored
    small: Tensor | None = None  # [B,h,w] int64: those of the features, -1 for none
    small_counts: Tensor | None = None  # [C] int32 of `small`


@record
class FirstPass(NamedTuple):
    """Results of `head_first_pass`; those that were not asked for are None."""

    factors: Tensor  # [7]
    losses: Tensor  # [P,2] float64: summed cross-entropy
    prediction: Tensor  # [N] int64, -1 where scores are not finite
    group: Tensor  # [N] int64: the sampled label, -1 where scores are not finite
    own_similarity: Tensor  # [N,K]
    lse: Tensor | None  # [N] log-sum-exp of the contrast
    statistics: Tensor  # [3,N]: mean, rstd and inverse norm
    grad: Tensor | None  # like x, of the embedding
    grad_rstd: Tensor | None  # [N]
    grad_scale: Tensor  # [P] of log_scale; P = 0 with a norm over classes
    grad_norm: Tensor  # [P,2,C] of the norm over classes; P = 0 without
    embedding: Tensor | None  # like x


@record
class ClusterCall(NamedTuple):
    """Arguments of `head_cluster`: optimal transport within each class, and what follows from it for a pixel."""

    own_similarity: Tensor  # [N,K]
    group: Tensor  # [N]
    prediction: Tensor  # [N]
    small: Tensor  # [N]
    lse: Tensor | None  # [N]
    assignment: Tensor | None  # [N]: k, where it is known
    zeros: Tensor | None  # tables of the transport, whose maxima the first pass has left there; None: not begun
    counters: Tensor | None  # [M+3] int64 zeros to count in; None: they are a result
    factors: Tensor  # [7]
    classes: int
    epsilon: float
    iterations: int
    contrast_temperature: float
    pulls: bool  # whether the target has a share of the gradient
    correct_only: bool  # only pixels classified correctly move sub-centroids
    tile: int  # sort the pixels that move sub-centroids in tiles of so many; 0: not
    num_updates: Tensor | None  # []: then `Clusters.state` is made
    warmup: int  # updates that move nothing
    schedule: str  # of the momentum: constant (first), recent (fraction, start), ramp (start, end, steps)
    first: float
    second: float
    third: float
    whole: bool  # as of `Step`
    parts: str
    backend: str


@record
class Clusters(NamedTuple):
    """Results of `head_cluster`."""

    target: Tensor  # [N] int64: c*K + k, or -1
    pull: Tensor | None  # [N]: gradient of the similarity to the target
    moving: Tensor  # [N] int64: the target of the pixels that move sub-centroids, -1 for the others
    sums: Tensor  # [P,2] float64 of PPC and PPD
    histogram: Tensor | None  # [tiles,buckets] int32
    cursor: Tensor | None  # [2] int32
    counters: Tensor | None  # [M+3] int64: wins of each sub-centroid; pixels that are correct, have a label, are not finite
    state: Tensor | None  # [2] float64: momentum of this update, 1 where it moves and 0 in the warm-up


@record
class TargetsCall(NamedTuple):
    """Arguments of C++'s `head_targets`: those of a `ClusterCall` once the assignment is known."""

    own_similarity: Tensor
    group: Tensor
    prediction: Tensor
    small: Tensor
    assignment: Tensor
    lse: Tensor | None
    factors: Tensor
    classes: int
    contrast_temperature: float
    correct_only: bool


@record
class Targets(NamedTuple):
    """Results of C++'s `head_targets`, as of `Clusters`."""

    target: Tensor
    pull: Tensor | None
    moving: Tensor
    sums: Tensor  # [2]
    counters: Tensor


@record
class Second(NamedTuple):
    """Arguments of `head_second_pass`: those of the step, what the first pass made, and what clustering decided."""

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
    histogram: Tensor | None  # [tiles,buckets] int32 of `cluster`, which is used up; then sums come in units
    cursor: Tensor | None  # [2] int32
    tile: int
    band_pixels: int
    whole: bool  # as of `Step`
    parts: str
    backend: str


@record
class SecondPass(NamedTuple):
    """Results of `head_second_pass`; without clusters M = 0."""

    grad_affine: Tensor  # [P,2,D] of weight and bias
    sums: Tensor  # [M,D] of the pixels of each cluster, or [units,16,D]
    counts: Tensor  # [M] int64, or [units,16] int32
    bucket: Tensor  # [3,buckets] int32 of units, else one number: no result is left out where an op changes an argument


@record
class SecondArguments(NamedTuple):
    """Arguments of the second pass as C++ takes them: those of a `Second`, and where its results go."""

    x: Tensor
    weight: Tensor
    bias: Tensor
    eps: float
    centroids: Tensor
    statistics: Tensor
    grad: Tensor | None
    grad_rstd: Tensor | None
    embedding: Tensor | None
    target: Tensor | None
    pull: Tensor | None
    cluster: Tensor | None
    band_pixels: int
    grad_affine: Tensor  # [2,D]
    sums: Tensor  # [M,D]
    counts: Tensor  # [M] int64


@record
class FinishCall(NamedTuple):
    """Arguments of `head_finish`: partial sums, and for a fused update the buffers that it changes."""

    losses: Tensor  # [P,2]
    parts: Tensor | None  # [P,2] of PPC and PPD
    factors: Tensor  # [7]
    counts: Tensor  # [P,2C+1]
    counters: Tensor  # [M+3], or the last three
    grad_scale: Tensor  # [P]
    grad_norm: Tensor  # [P,2,C]
    grad_affine: Tensor  # [P,2,D]
    ppc_weight: float
    ppd_weight: float
    ppc: bool  # whether there is a contrast
    # the rest: the update, where `prototypes` is given
    sums: Tensor | None
    pixels: Tensor | None  # `SecondPass.counts`
    bucket: Tensor | None
    prototypes: Tensor | None  # [C,K,D]
    previous: Tensor | None  # [C,K,D]: becomes what the sub-centroids were
    num_updates: Tensor | None  # []
    last_counts: Tensor | None  # [C,K]
    idle_updates: Tensor | None  # [C,K]
    wins: Tensor | None  # [C,K]
    class_counts: Tensor | None  # [C]
    nonfinite_pixels: Tensor | None  # []
    bad_labels: Tensor | None  # []
    state: Tensor | None  # [2]
    unit: int  # pixels, where sums come in units
    channels: int
    backend: str


@record
class Finished(NamedTuple):
    """Results of `head_finish`."""

    loss: Tensor  # []
    cross_entropy: Tensor  # []
    ppc: Tensor  # []
    ppd: Tensor  # []
    accuracy: Tensor  # []
    grads: Tensor  # [2D+1+2C]: of weight, bias, log_scale, norm_weight and norm_bias, one behind the other
