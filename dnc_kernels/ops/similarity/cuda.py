"""Launchers of the CUDA C++ similarity kernels (csrc/cuda/similarity*.cu); the functions are those of cpu.py.

Class scores, the nearest sub-centroid and the loss with the gradient of x have CUDA kernels; no other op of the family gets
here. The gradients of class scores and of a loss' sub-centroids have none: Triton makes them, where it is installed.
"""

from __future__ import annotations

from importlib.util import find_spec

from .._common import kernels
from .._cpu import contiguous
from .._cuda import aligned, launch
from . import reference
from .calls import LossCall, LossOut, NearestCall, NearestOut, ScoresBackwardCall, ScoresBackwardOut, ScoresCall, ScoresOut

_HAS_TRITON = find_spec("triton") is not None


def class_scores(call: ScoresCall, out: ScoresOut) -> None:
    """Scores, winners and own similarities."""
    launch("class_scores", contiguous(aligned(call)), out)


def class_scores_backward(call: ScoresBackwardCall, out: ScoresBackwardOut) -> None:
    """Gradients, those given; without triton by dense products."""
    made_by = kernels("similarity", "triton") if _HAS_TRITON else reference
    made_by.class_scores_backward(call, out)


def nearest_centroid(call: NearestCall, out: NearestOut) -> None:
    """Class, sub-centroid and similarity of the nearest."""
    launch("nearest_centroid", contiguous(aligned(call)), out)


def centroid_cross_entropy(call: LossCall, out: LossOut) -> None:
    """Results and gradients, those given. A label outside [0,C) is ignored."""
    if out.grad_centroids is None:
        launch("centroid_cross_entropy", contiguous(aligned(call)), out)
    elif _HAS_TRITON:
        kernels("similarity", "triton").centroid_cross_entropy(call, out)
    else:
        raise RuntimeError(
            "centroid_cross_entropy: backend 'cuda' leaves the gradient of centroids to Triton, which is not installed; "
            "`pip install triton`, detach the centroids, or choose backend 'reference'"
        )
