"""Launchers of the C++ similarity kernels (csrc/cpu/similarity.cpp, similarity_loss.cpp, similarity_contrast.cpp)."""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends import native
from .._common import METRICS, REDUCTIONS, view


def centroid_distance(x: Tensor, centroids: Tensor, metric: str, out: Tensor) -> None:
    """Into out [N,C,K], contiguous: class_scores with every sub-centroid as a class of its own."""
    classes, k, channels = centroids.shape
    rows = centroids.reshape(classes * k, 1, channels).contiguous()
    # the pixels of x are flat in the result, whatever the layout of x
    shape = (x.shape[0], classes * k) if x.ndim == 2 else (x.shape[0], x.shape[2], x.shape[3], classes * k)
    matrix = out.view(shape) if x.ndim == 2 else out.view(shape).permute(0, 3, 1, 2)
    native().class_scores(
        "centroid_distance", view(x), view(rows), view(None), METRICS.index(metric), True, view(matrix), view(None), view(None),
        torch.get_num_threads(),
    )  # fmt: skip


def class_scores(
    x: Tensor, centroids: Tensor, labels: Tensor | None, metric: str, scores: Tensor, winner: Tensor, own: Tensor | None
) -> None:
    """Into scores and winner, of any strides, and own [N,K], contiguous."""
    native().class_scores(
        "class_scores", view(x), view(centroids.contiguous()), view(labels), METRICS.index(metric), False, view(scores),
        view(winner), view(own), torch.get_num_threads(),
    )  # fmt: skip


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
    """Gradients into those given, from those of the scores and of own [N,K]; `accumulate`: added to grad_x (metric dot)."""
    native().class_scores_backward(
        view(x), view(centroids.contiguous()), view(labels), METRICS.index(metric), view(winner), view(grad_scores),
        view(grad_own), view(grad_x), accumulate, view(grad_centroids), torch.get_num_threads(),
    )  # fmt: skip


def nearest_centroid(x: Tensor, centroids: Tensor, metric: str, label: Tensor, sub: Tensor, score: Tensor) -> None:
    """Into label and sub [N] int64 and score [N]."""
    native().nearest_centroid(
        view(x), view(centroids.contiguous()), METRICS.index(metric), view(label), view(sub), view(score),
        torch.get_num_threads(),
    )  # fmt: skip


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
    grad_loss: Tensor | None,
    loss: Tensor | None,
    prediction: Tensor | None,
    own: Tensor | None,
    grad_x: Tensor | None,
    grad_centroids: Tensor | None,
    grad_weight: Tensor | None,
    grad_bias: Tensor | None,
    grad_scale: Tensor | None,
) -> None:
    """Into those given: loss [] or [N], prediction [N] int64, own [N,K], gradients for grad_loss [] or [N] (None: 1).

    grad_x has the dtype of x; everything else, inputs of [C] included, the compute dtype. A bad label fills nothing and raises.
    """
    native().centroid_cross_entropy(
        view(x), view(centroids.contiguous()), view(labels), METRICS.index(metric), view(norm_weight), view(norm_bias),
        norm_eps, view(scale), temperature, view(class_weight), ignore_index, label_smoothing, REDUCTIONS.index(reduction),
        view(grad_loss), view(loss), view(prediction), view(own), view(grad_x), view(grad_centroids), view(grad_weight),
        view(grad_bias), view(grad_scale), torch.get_num_threads(),
    )  # fmt: skip


def subcentroid_cross_entropy(
    x: Tensor,
    centroids: Tensor,
    target: Tensor | None,
    temperature: float,
    ignore_index: int,
    scale: Tensor | None,
    loss: Tensor,
    grad_x: Tensor | None,
    labels: Tensor | None,
    scores: Tensor | None,
    winner: Tensor | None,
    own: Tensor | None,
) -> None:
    """Contrast of a target [N], or with target None the log-sum-exp alone and class scores beside it (labels [N]).

    Into loss [N] and, where given, grad_x like x (`scale` times the gradient; None: 1), scores and winner, own [N,K].
    """
    native().subcentroid_cross_entropy(
        view(x), view(centroids.contiguous()), view(target), temperature, ignore_index, view(scale), view(loss), view(grad_x),
        view(labels), view(scores), view(winner), view(own), torch.get_num_threads(),
    )  # fmt: skip
