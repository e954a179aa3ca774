"""Launchers of the C++ similarity kernels (csrc/cpu/similarity.cpp, similarity_loss.cpp, similarity_contrast.cpp)."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from .._cpu import contiguous, run
from .calls import (
    ContrastCall,
    ContrastOut,
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


class _Matrix(NamedTuple):
    distance: bool
    scores: Tensor


def centroid_distance(call: DistanceCall, out: Tensor) -> None:
    """Class scores with every sub-centroid as a class of its own."""
    x, (classes, k, channels) = call.x, call.centroids.shape
    rows = call.centroids.reshape(classes * k, 1, channels).contiguous()
    # the pixels of x are flat in the result, whatever the layout of x
    shape = (x.shape[0], classes * k) if x.ndim == 2 else (x.shape[0], x.shape[2], x.shape[3], classes * k)
    matrix = out.view(shape) if x.ndim == 2 else out.view(shape).permute(0, 3, 1, 2)
    run("class_scores", call._replace(centroids=rows), _Matrix(True, matrix), op="centroid_distance")


def class_scores(call: ScoresCall, out: ScoresOut) -> None:
    """Scores, winners and own similarities."""
    run("class_scores", contiguous(call), out)


def class_scores_backward(call: ScoresBackwardCall, out: ScoresBackwardOut) -> None:
    """Gradients, those given."""
    run("class_scores_backward", contiguous(call), out, op="class_scores")


def nearest_centroid(call: NearestCall, out: NearestOut) -> None:
    """Class, sub-centroid and similarity of the nearest."""
    run("nearest_centroid", contiguous(call), out)


def centroid_cross_entropy(call: LossCall, out: LossOut) -> None:
    """Results and gradients, those given. A bad label fills nothing and raises."""
    run("centroid_cross_entropy", contiguous(call), out)


def subcentroid_cross_entropy(call: ContrastCall, out: ContrastOut) -> None:
    """Losses and, where given, the gradient."""
    run("subcentroid_cross_entropy", contiguous(call), out)


def scores_and_contrast(call: SweepCall, out: SweepOut) -> None:
    """Class scores, log-sum-exp and, where given, its gradient."""
    run("subcentroid_cross_entropy", contiguous(call), out)
