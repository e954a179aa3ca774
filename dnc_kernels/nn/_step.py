"""A segmentation head's loss, band by band: nothing of [N,C], [N,D] or [B,C,H,W] exists but the gradient of the features.

Two passes over bands of rows. `first_pass`: embedding, class scores, contrast, and the upsampled cross-entropy with its
gradient. Then the caller clusters, which needs the own-class similarities [N,K] of all pixels. `second_pass`: what the cluster
of a pixel decides (its target's share of the gradient, the sums that move the sub-centroids), and the gradient of the
embedding, in place.

Gradients are made in the forward pass because the sub-centroids need none and the loss is a scalar. They are those of a
multiple of the loss, chosen so that in half precision they neither vanish nor overflow, and meet its reciprocal together with
the incoming gradient in backward (`_made.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..backends import pick
from ..ops._common import (
    NAMESPACE,
    compute_dtype,
    keep_dtypes_under_autocast,
    kernels,
    pixel_count,
    pixel_map,
)
from ..ops.similarity import op as scores_op
from ..ops.similarity import op_loss as contrast_op
from ..ops.similarity.class_norm import class_norm, class_norm_backward_
from ..ops.upsample import op as upsample_op
from ..ops.upsample.reference import target_rows_of

#: Pixels of a band by default, about, on a CPU: embedding and scores stay in cache, and calls cost little beside the work.
BAND_PIXELS = 2048
#: On other devices, where a call costs more and there is more to keep busy. A step of 131072 pixels of 256 channels in bfloat16
#: and 150 classes takes an H100 3.6 ms in one band of them, and 4.7 ms in four (docs/cuda.md).
DEVICE_BAND_PIXELS = 131072
#: And at most as many as take this much memory, about.
DEVICE_BAND_BYTES = 2**30


class Band(NamedTuple):
    """Rows [top, bottom) of samples [begin, end): pixels [first, last) of all. More than one sample: all of their rows."""

    begin: int
    end: int
    top: int
    bottom: int
    first: int
    last: int

    def of(self, maps: Tensor) -> Tensor:
        """[samples,D,rows,w] of maps [B,D,h,w], a view."""
        return maps[self.begin : self.end, :, self.top : self.bottom]


def default_band(x: Tensor, classes: int) -> int:
    """Pixels of a band where nobody chose: by what features [B,D,h,w] lie on, and what D channels and C classes take."""
    if x.device.type == "cpu":
        return BAND_PIXELS
    return max(1, min(DEVICE_BAND_PIXELS, DEVICE_BAND_BYTES // (8 * x.shape[1] + 32 * classes)))


def bands(x: Tensor, pixels: int) -> Iterator[Band]:
    """The bands of features [B,D,h,w], in order, of about so many pixels."""
    batch, _, height, width = x.shape
    rows = min(height, max(1, pixels // max(width, 1)))
    samples = max(1, pixels // max(height * width, 1)) if rows == height else 1
    for begin in range(0, batch, samples):
        end = min(begin + samples, batch)
        for top in range(0, height, rows):
            bottom = min(top + rows, height)
            first = (begin * height + top) * width
            yield Band(begin, end, top, bottom, first, first + (end - begin) * (bottom - top) * width)


# Logits of a band and their gradients. A logit is LayerNorm over the classes of the scores, or the score times the pixel's
# length (optional), times `scale` (optional), over `temperature`.


class Logits(NamedTuple):
    """How scores become logits."""

    temperature: float
    scale: Tensor | None  # 0-d
    norm_weight: Tensor | None  # [C]
    norm_bias: Tensor | None
    norm_eps: float

    def factor(self, length: Tensor | None) -> Tensor | float:
        """What a score is multiplied by without a norm."""
        factor: Tensor | float = 1 / self.temperature
        for part in (self.scale, length):
            factor = factor if part is None else part * factor
        return factor

    def forward(self, scores: Tensor, length: Tensor | None, out: Tensor) -> Tensor:
        """Logits [B,C,rows,w]; in `out` where that saves a copy."""
        if self.norm_weight is None:
            return torch.mul(scores, self.factor(length), out=out)
        assert self.norm_bias is not None
        return class_norm(scores, self.norm_weight, self.norm_bias, self.norm_eps, out)

    def backward_(
        self, grad: Tensor, scores: Tensor, length: Tensor | None, scratch: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
        """Gradients of the scores, the length, the scale [] and the norm's weight and bias [2,C]; overwrites the first and last
        argument.
        """
        to_scale, to_norm = grad.new_zeros(()), grad.new_zeros(2, grad.shape[1])
        if self.norm_weight is None:
            along = torch.mul(grad, scores, out=scratch).sum(1, keepdim=True)
            if self.scale is not None:
                to_scale = (along if length is None else along * length).sum() / self.temperature
            to_length = None if length is None else along * self.factor(None)
            return grad.mul_(self.factor(length)), to_length, to_scale, to_norm
        assert self.norm_bias is not None
        to_scores, to_norm = class_norm_backward_(grad, scores, self.norm_weight, self.norm_bias, self.norm_eps)
        return to_scores, None, to_scale, to_norm


class Workspace:
    """Tensors of one band, used by all: memory that is given back and taken again costs a page fault each time.

    Maps have one row more than the band: row 0 is the last row of the band above, whose logits are upsampled together with it.
    """

    def __init__(self, x: Tensor, classes: int, dtype: torch.dtype, keep_embedding: bool, band_pixels: int) -> None:
        largest = next(bands(x, band_pixels), Band(0, 0, 0, 0, 0, 0))
        samples, rows, width = largest.end - largest.begin, largest.bottom - largest.top, x.shape[3]
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        layout: Any = {"memory_format": torch.channels_last} if last else {}

        def empty(channels: int, rows: int, dtype: torch.dtype) -> Tensor:
            return torch.empty((samples, channels, rows, width), dtype=dtype, device=x.device, **layout)

        self.embedding = None if keep_embedding else empty(x.shape[1], rows, x.dtype)
        self.scores, self.logits, self.to_logits = (empty(classes, rows + 1, dtype) for _ in range(3))
        self.winner, self.length = empty(classes, rows + 1, torch.uint8), empty(1, rows + 1, dtype)
        self.pending_grad: Tensor | None = None

    def embedding_of(self, band: Band, kept: Tensor) -> Tensor:
        """Where the embedding of a band goes: into all of it where that is kept."""
        if self.embedding is None:
            return band.of(kept)
        return self.embedding[: band.end - band.begin, :, : band.bottom - band.top]

    def window(self, maps: Tensor, band: Band, *, with_row_above: bool) -> Tensor:
        """The rows of a band in one of the maps."""
        return maps[: band.end - band.begin, :, 1 - with_row_above : 1 + band.bottom - band.top]

    def carry(self, band: Band, grad: Tensor | None) -> None:
        """The band's last row becomes the row above; `grad` is what its logits have received so far."""
        row = band.bottom - band.top
        for maps in (self.scores, self.winner, self.length):
            maps[:, :, 0] = maps[:, :, row]
        self.pending_grad = None if grad is None else grad[:, :, -1:].clone()


@torch.library.custom_op(f"{NAMESPACE}::head_first_pass", mutates_args=())
def first_pass(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    centroids: Tensor,
    labels: Tensor,
    ignored: int,
    sampled: Tensor,
    confidence: bool,
    temperature: float,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    class_weight: Tensor | None,
    label_smoothing: float,
    align_corners: bool,
    pull: Tensor,
    contrast: Tensor | None,
    contrast_temperature: float,
    gradient: bool,
    keep_embedding: bool,
    band_pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Summed cross-entropy []; prediction [N] (-1: not finite), own similarities [N,K], log-sum-exp [N]; statistics [3,N];
    gradients of the embedding, of rstd [N], of the scale [], of the norm over classes [2,C]; the embedding.

    labels [B,H,W]: of the cross-entropy, `ignored` for none; sampled [N]: of own similarities and contrast, -1 for none. pull
    and contrast []: what the gradients of both sums are multiplied by; contrast None: no contrast.
    """
    results = _first_fake(
        x, weight, bias, eps, centroids, labels, ignored, sampled, confidence, temperature, scale, norm_weight, norm_bias,
        norm_eps, class_weight, label_smoothing, align_corners, pull, contrast, contrast_temperature, gradient, keep_embedding,
        band_pixels,
    )  # fmt: skip
    total, prediction, own, lse, statistics, grad, grad_rstd, grad_scale, grad_norm, kept = results
    for t in (total, grad_scale, grad_norm, grad_rstd):
        t.zero_()
    head = Logits(temperature, scale, norm_weight, norm_bias, norm_eps)
    height, label_rows = x.shape[2], labels.shape[1]
    # at equal sizes nothing is interpolated, and bands do not touch each other
    apart = tuple(labels.shape[1:]) == tuple(x.shape[2:])
    lower = target_rows_of(height, label_rows, align_corners)
    sums = torch.zeros((), dtype=torch.float64, device=x.device)
    classes, k = centroids.shape[:2]
    work = Workspace(x, classes, own.dtype, keep_embedding, band_pixels)
    embedding = kernels("embedding", pick("normalize_embedding", x, None))
    upsampling = pick("upsample_cross_entropy", work.logits, None, N=labels.numel(), C=classes)
    embedded = kept if work.embedding is None else work.embedding  # its layout decides, which is not always that of x
    sweep, winners = (
        pick(op, embedded, None, centroids, N=pixel_count(x), C=classes, K=k)
        for op in ("subcentroid_cross_entropy", "class_scores")
    )
    for band in bands(x, band_pixels):
        part, pixels = band.of(x), slice(band.first, band.last)
        e = work.embedding_of(band, kept)
        embedding.normalize(part, weight, bias, eps, e, *statistics[:, pixels])
        to_e = band.of(grad) if gradient else None
        own_scores, own_winner = (work.window(t, band, with_row_above=False) for t in (work.scores, work.winner))
        outputs = (own_scores, own_winner, own[pixels])
        if contrast is None:
            scores_op.scores_into(e, centroids, sampled[pixels], *outputs, winners)
            if to_e is not None:
                to_e.zero_()
        else:
            contrast_op.scores_and_contrast_into(
                e, centroids, sampled[pixels], contrast_temperature, contrast, *outputs, lse[pixels], to_e, sweep
            )
        if confidence:
            work.window(work.length, band, with_row_above=False).copy_(pixel_map(part, statistics[1, pixels].reciprocal()))
        finite = outputs[0][:, 0].isfinite().reshape(-1)

        # the cross-entropy of the label rows between the last row of the band above and the last row of this one
        first, last = apart or band.top == 0, apart or band.bottom == height
        top = band.top if first else band.top - 1
        maps = (work.scores, work.winner, work.length, work.logits, work.to_logits)
        scores, winner, length, logits, to_logits = (work.window(t, band, with_row_above=not first) for t in maps)
        scratch, logits = logits, head.forward(scores, length if confidence else None, logits)
        prediction[pixels] = torch.where(finite, logits[:, :, band.top - top :].argmax(1).reshape(-1), -1)
        # label rows whose lower feature row is in [top, bottom - 1), or to the end
        above, below = bisect_left(lower, top), bisect_left(lower, band.bottom - (not last))
        sums += upsample_op.cross_entropy_with_gradient(
            logits, labels[band.begin : band.end, above:below], align_corners=align_corners, class_weight=class_weight,
            ignore_index=ignored, label_smoothing=label_smoothing, grad=gradient, out=to_logits,
            window=None if apart else (height, top, label_rows, above), backend=upsampling,
        )[0]  # fmt: skip
        if gradient:
            to_logits *= pull
            if not first and work.pending_grad is not None:
                to_logits[:, :, :1] += work.pending_grad
            done = slice(0, to_logits.shape[2] - (not last))  # the next band adds to the last row
            complete = band._replace(top=top, bottom=top + done.stop, first=band.first - (band.top - top) * x.shape[3])
            lengths = length[:, :, done] if confidence else None
            to_scores, to_length, to_scale, to_norm = head.backward_(
                to_logits[:, :, done], scores[:, :, done], lengths, scratch[:, :, done]
            )
            scores_op.add_scores_gradient_(complete.of(grad), centroids, winner[:, :, done], to_scores, winners)
            if to_length is not None and lengths is not None:
                # d length / d rstd = -length^2
                per_pixel = (-to_length * lengths.square()).reshape(-1)
                grad_rstd[complete.first : complete.first + len(per_pixel)] = per_pixel
            grad_scale += to_scale
            grad_norm += to_norm
        if not last:
            work.carry(band, to_logits if gradient else None)
    total.copy_(sums)
    return results


@first_pass.register_fake
def _first_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    centroids: Tensor,
    labels: Tensor,
    ignored: int,
    sampled: Tensor,
    confidence: bool,
    temperature: float,
    scale: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    norm_eps: float,
    class_weight: Tensor | None,
    label_smoothing: float,
    align_corners: bool,
    pull: Tensor,
    contrast: Tensor | None,
    contrast_temperature: float,
    gradient: bool,
    keep_embedding: bool,
    band_pixels: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    dtype, n = compute_dtype(x, centroids), pixel_count(x)
    rows = x.new_empty((3, n), dtype=compute_dtype(x))
    return (
        x.new_empty((), dtype=dtype),
        x.new_empty(n, dtype=torch.int64),
        x.new_empty((n, centroids.shape[1]), dtype=dtype),
        x.new_empty(n if contrast is not None else 0, dtype=dtype),
        rows,
        torch.empty_like(x) if gradient else x.new_empty(0),
        x.new_empty(n if gradient and confidence else 0, dtype=compute_dtype(x)),
        x.new_empty((), dtype=dtype),
        x.new_empty((2, centroids.shape[0]), dtype=dtype),
        torch.empty_like(x) if keep_embedding else x.new_empty(0),
    )


@torch.library.custom_op(f"{NAMESPACE}::head_second_pass", mutates_args=("grad",))
def second_pass(
    grad: Tensor,
    x: Tensor,
    embedded: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    statistics: Tensor,
    grad_rstd: Tensor,
    centroids: Tensor,
    target: Tensor | None,
    pull: Tensor | None,
    cluster: Tensor | None,
    gradient: bool,
    band_pixels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`grad` becomes the gradient of x; returns that of weight and bias [2,D], and sums [M,D] and counts [M] of `cluster` [N].

    target [N]: ``c*K + k`` or -1; pull [N]: gradient of the similarity to it.
    """
    grad_affine, sums, counts = _second_fake(
        grad, x, embedded, weight, bias, eps, statistics, grad_rstd, centroids, target, pull, cluster, gradient,
        band_pixels,
    )  # fmt: skip
    for t in (grad_affine, sums, counts):
        t.zero_()
    embedding = kernels("embedding", pick("normalize_embedding", x, None))
    classes, k = centroids.shape[:2]
    winners = pick("class_scores", x, None, centroids, C=classes, K=k)
    keep = embedded.ndim == 4
    work = Workspace(x, 0, sums.dtype, keep or cluster is None, band_pixels)
    to_affine = torch.empty_like(grad_affine)
    for band in bands(x, band_pixels):
        part, pixels = band.of(x), slice(band.first, band.last)
        if cluster is not None:
            e = work.embedding_of(band, embedded)
            if not keep:
                embedding.normalize(part, weight, bias, eps, e, *torch.empty_like(statistics[:, pixels]))
            some = ops.cluster_sums(e, cluster[pixels], len(counts))
            sums += some.sums
            counts += some.counts
        if not gradient:
            continue
        to_e = band.of(grad)
        if target is not None and pull is not None:
            label = torch.div(target[pixels], k, rounding_mode="floor")
            to_own = pull.new_zeros(len(label), k).scatter_(1, (target[pixels] % k)[:, None], pull[pixels, None])
            scores_op.add_own_gradient_(to_e, centroids, label, to_own, winners)
        to_rstd = grad_rstd[pixels] if len(grad_rstd) else None
        embedding.normalize_backward(part, weight, bias, *statistics[:, pixels], to_e, to_rstd, to_e, *to_affine)
        grad_affine += to_affine
    return grad_affine, sums, counts


@second_pass.register_fake
def _second_fake(
    grad: Tensor,
    x: Tensor,
    embedded: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    statistics: Tensor,
    grad_rstd: Tensor,
    centroids: Tensor,
    target: Tensor | None,
    pull: Tensor | None,
    cluster: Tensor | None,
    gradient: bool,
    band_pixels: int,
) -> tuple[Tensor, Tensor, Tensor]:
    m = centroids.shape[0] * centroids.shape[1] if cluster is not None else 0
    return (
        x.new_empty((2, x.shape[1]), dtype=compute_dtype(x)),
        x.new_empty((m, x.shape[1]), dtype=compute_dtype(x)),
        x.new_empty(m, dtype=torch.int64),
    )


for _op in (first_pass, second_pass):
    keep_dtypes_under_autocast(_op)
