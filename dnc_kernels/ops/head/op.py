"""A segmentation head's training step in five ops: nothing of [N,C], [N,D] or [B,C,H,W] exists beyond a band of pixels but the
gradient of the features.

`head_labels`: labels at the features' size. `head_first_pass`, band by band: embedding, class scores, contrast, and the
upsampled cross-entropy with its gradient. `head_cluster`: optimal transport of the pixels of a class, which needs their own
similarities [N,K] at once, and what follows for a pixel. `head_second_pass`, band by band: the target's share of the gradient,
the sums that move the sub-centroids, and the gradient of the embedding, in place. `head_finish`: the loss, and on a GPU the
update.

Gradients are made in the forward pass because the sub-centroids need none and the loss is a scalar. They are those of a
multiple of the loss, chosen so that in half precision they neither vanish nor overflow, and meet its reciprocal together with
the incoming gradient in backward (`dnc_kernels/nn/_made.py`).

Reference, and what runs on a CPU: reference.py. On a GPU: triton.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..._tensors import compute_dtype, pixel_count
from .._common import kernels
from .._op import Op
from ..similarity.op import product
from .calls import (
    ClusterCall,
    Clusters,
    FinishCall,
    Finished,
    FirstPass,
    Labels,
    LabelsCall,
    Second,
    SecondPass,
    Step,
)


def _by(name: str) -> Callable[..., None]:
    """Launches the part of that name where its backend says."""

    def launch(call: Any, *more: Any) -> None:
        getattr(kernels("head", call.backend), name)(call, *more)

    return launch


def _triton() -> Any:
    return kernels("head", "triton")


def is_triton(op: str, x: Tensor, parts: str, **sizes: int) -> bool:
    """Whether an op of another family runs on Triton within a step that does."""
    return bool(_triton().part(op, x, parts, **sizes) == "triton")


def table_size(classes: int, k: int) -> int:
    """`LabelsCall.zeros` for a transport that begins in the first pass."""
    return int(kernels("sinkhorn", "triton").table_size(classes, k))


def _labels_out(call: LabelsCall) -> Labels:
    labels = call.labels
    rows = _triton().label_programs(labels) if call.backend == "triton" and not torch.compiler.is_compiling() else 1
    n = labels.shape[0] * call.height * call.width
    return Labels(
        small=labels.new_empty(n, dtype=torch.int64),
        counts=labels.new_empty((rows, 2 * call.classes + 1), dtype=torch.int32),
        zeros=labels.new_empty(call.zeros, dtype=torch.int64) if call.zeros else None,
        counters=labels.new_empty(call.counters, dtype=torch.int64) if call.counters else None,
    )


#: ``head_labels(call)``.
head_labels = Op("head", "head_labels", _labels_out, launch=_by("head_labels"))


def _first_out(
    call: Step, sampled: Tensor, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None,
    gradient: bool, keep_embedding: bool,
) -> FirstPass:  # fmt: skip
    x, n, (classes, k, _) = call.x, pixel_count(call.x), call.centroids.shape
    dtype, statistics = compute_dtype(x, call.centroids), compute_dtype(x)
    exact = call.whole and call.backend == "triton"
    losses = _triton().loss_programs(call) if exact else 1
    grad = torch.empty_like(x) if gradient else None
    gradients = _triton().gradient_programs(grad, call.centroids) if exact and gradient else 1
    return FirstPass(
        factors=x.new_empty(7, dtype=dtype),
        losses=x.new_empty((losses, 2), dtype=torch.float64),
        prediction=x.new_empty(n, dtype=torch.int64),
        group=x.new_empty(n, dtype=torch.int64),
        own_similarity=x.new_empty((n, k), dtype=dtype),
        lse=x.new_empty(n, dtype=dtype) if call.ppc_weight else None,
        statistics=x.new_empty((3, n), dtype=statistics),
        grad=grad,
        grad_rstd=x.new_empty(n, dtype=statistics) if gradient and call.confidence else None,
        grad_scale=x.new_empty(gradients if gradient and call.norm_weight is None else 0, dtype=dtype),
        grad_norm=x.new_empty((gradients if gradient and call.norm_weight is not None else 0, 2, classes), dtype=dtype),
        embedding=torch.empty_like(x) if keep_embedding else None,
    )


def _first_flops(
    call: Step, sampled: Tensor, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None,
    gradient: bool, keep_embedding: bool,
) -> int:  # fmt: skip
    scores = product(call)  # the contrast shares them
    return scores + gradient * (product(call, k=1) + bool(call.ppc_weight) * scores)


#: ``head_first_pass(step, sampled, counts, amounts, factors, gradient, keep_embedding)``. sampled [N]: labels of own
#: similarities and of the contrast, -1 for none. counts: of `head_labels`. amounts [2] float64: the class weights of the
#: labelled pixels and the number of sampled ones, where they are not those of the counts. factors [7]: where they are known.
#: A weight of 0 leaves its part of the loss out.
head_first_pass = Op(
    "head", "head_first_pass", _first_out, launch=_by("head_first_pass"), flops=_first_flops, mutates=("zeros",)
)


def _cluster_out(call: ClusterCall) -> Clusters:
    own, group, n = call.own_similarity, call.group, len(call.group)
    rows, buckets = 1, -(-call.classes * own.shape[1] // 16)
    if call.whole and call.backend == "triton":
        rows = max(1, -(-n // _triton().cluster_tile(own, group, call.classes)))
    return Clusters(
        target=torch.empty_like(group),
        pull=own.new_empty(n) if call.pulls else None,
        moving=torch.empty_like(group),
        sums=own.new_empty((rows, 2), dtype=torch.float64),
        histogram=group.new_empty((rows, buckets), dtype=torch.int32) if call.tile else None,
        cursor=group.new_empty(2, dtype=torch.int32) if call.tile else None,
        counters=group.new_empty(call.classes * own.shape[1] + 3) if call.counters is None else None,
        state=own.new_empty(2, dtype=torch.float64) if call.num_updates is not None else None,
    )


#: ``head_cluster(call)``.
head_cluster = Op("head", "head_cluster", _cluster_out, launch=_by("head_cluster"), mutates=("zeros", "counters"))


def _second_out(call: Second) -> SecondPass:
    x, dtype = call.x, compute_dtype(call.x)
    m = 0 if call.cluster is None else call.centroids.shape[0] * call.centroids.shape[1]
    rows, exact = 1, call.whole and call.backend == "triton"
    if exact and call.grad is not None:
        rows = _triton().affine_programs(call)
    affine = x.new_empty((rows if call.grad is not None else 0, 2, x.shape[1]), dtype=dtype)
    if call.histogram is not None:
        units = _triton().units_of(call)
        return SecondPass(affine, units.sums, units.counts, units.bucket)
    return SecondPass(
        affine, x.new_empty((m, x.shape[1]), dtype=dtype), x.new_empty(m, dtype=torch.int64), x.new_empty(1, dtype=torch.int32)
    )


#: ``head_second_pass(call)``.
head_second_pass = Op(
    "head", "head_second_pass", _second_out, launch=_by("head_second_pass"), mutates=("grad", "histogram", "cursor")
)


def sorting_of(embedding: Tensor, clusters: int, own_similarity: Tensor, group: Tensor, classes: int) -> tuple[int, int]:
    """(tile, unit): how many pixels `head_cluster` and `head_second_pass` sort, and add up, at a time, on Triton."""
    tile = _triton().cluster_tile(own_similarity, group, classes)
    return tile, kernels("momentum", "triton").sorting_of(embedding, clusters, tile).unit


def _finish_out(call: FinishCall, decay: float, dead: float) -> Finished:
    dtype, channels, classes = call.factors.dtype, call.channels, call.grad_norm.shape[2]
    loss, cross_entropy, ppc, ppd = (call.factors.new_empty(()) for _ in range(4))
    accuracy = call.factors.new_empty((), dtype=torch.float32)
    grads = call.factors.new_empty(2 * channels + 1 + 2 * classes, dtype=dtype)
    return Finished(loss, cross_entropy, ppc, ppd, accuracy, grads)


_BUFFERS = (
    "prototypes", "previous", "num_updates", "last_counts", "idle_updates", "wins", "class_counts",
    "nonfinite_pixels", "bad_labels",
)  # fmt: skip
#: ``head_finish(call, decay, dead)``: decay of the wins, and the share of a class's wins below which a sub-centroid is idle.
head_finish = Op("head", "head_finish", _finish_out, launch=_by("head_finish"), mutates=_BUFFERS)
