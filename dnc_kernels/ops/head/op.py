"""A segmentation head's loss, band by band: nothing of [N,C], [N,D] or [B,C,H,W] exists but the gradient of the features.

Two passes over bands of rows. `first_pass`: embedding, class scores, contrast, and the upsampled cross-entropy with its
gradient. Then the caller clusters, which needs the own-class similarities [N,K] of all pixels. `second_pass`: what the cluster
of a pixel decides (its target's share of the gradient, the sums that move the sub-centroids), and the gradient of the
embedding, in place.

Gradients are made in the forward pass because the sub-centroids need none and the loss is a scalar. They are those of a
multiple of the loss, chosen so that in half precision they neither vanish nor overflow, and meet its reciprocal together with
the incoming gradient in backward (`dnc_kernels/nn/_made.py`).
"""

from __future__ import annotations

from bisect import bisect_left
from typing import cast

import torch
from torch import Tensor

from ...backends import Backend, pick
from .._common import compute_dtype, kernels, pixel_count, pixel_map
from .._op import Op
from ..embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut
from ..embedding.op import normalize_embedding
from ..momentum import cluster_sums
from ..similarity.calls import ScoresBackwardCall, ScoresBackwardOut, ScoresCall, ScoresOut, SweepCall, SweepOut
from ..similarity.op import class_scores, product
from ..upsample.calls import UpsampleCall
from ..upsample.op import cross_entropy_with_gradient
from ..upsample.reference import target_rows_of
from .bands import Logits, Workspace, bands
from .calls import FirstPass, Second, SecondPass, Step


def _first_out(
    call: Step, sampled: Tensor, pull: Tensor, contrast: Tensor | None, gradient: bool, keep_embedding: bool
) -> FirstPass:
    x, n, (classes, k, _) = call.x, pixel_count(call.x), call.centroids.shape
    dtype, statistics = compute_dtype(x, call.centroids), compute_dtype(x)
    return FirstPass(
        total=x.new_empty((), dtype=dtype),
        prediction=x.new_empty(n, dtype=torch.int64),
        own_similarity=x.new_empty((n, k), dtype=dtype),
        lse=None if contrast is None else x.new_empty(n, dtype=dtype),
        statistics=x.new_empty((3, n), dtype=statistics),
        grad=torch.empty_like(x) if gradient else None,
        grad_rstd=x.new_empty(n, dtype=statistics) if gradient and call.confidence else None,
        grad_scale=x.new_empty((), dtype=dtype),
        grad_norm=x.new_empty((2, classes), dtype=dtype),
        embedding=torch.empty_like(x) if keep_embedding else None,
    )


def _first_pass(
    call: Step,
    out: FirstPass,
    sampled: Tensor,
    pull: Tensor,
    contrast: Tensor | None,
    gradient: bool,
    keep_embedding: bool,
) -> None:
    x, labels, centroids = call.x, call.labels, call.centroids
    for t in (out.total, out.grad_scale, out.grad_norm, out.grad_rstd):
        if t is not None:
            t.zero_()
    head = Logits(call.temperature, call.scale, call.norm_weight, call.norm_bias, call.norm_eps)
    height, label_rows = x.shape[2], labels.shape[1]
    # at equal sizes nothing is interpolated, and bands do not touch each other
    apart = tuple(labels.shape[1:]) == tuple(x.shape[2:])
    lower = target_rows_of(height, label_rows, call.align_corners)
    sums = torch.zeros((), dtype=torch.float64, device=x.device)
    classes, k = centroids.shape[:2]
    work = Workspace(x, classes, out.own_similarity.dtype, keep_embedding, call.band_pixels)
    embedding = pick("normalize_embedding", x, call.backend)
    upsampling = pick("upsample_cross_entropy", work.logits, call.backend, N=labels.numel(), C=classes)
    embedded = out.embedding if work.embedding is None else work.embedding  # its layout decides, which is not always that of x
    assert embedded is not None
    sweep, winners = (
        pick(op, embedded, call.backend, centroids, N=pixel_count(x), C=classes, K=k)
        for op in ("subcentroid_cross_entropy", "class_scores")
    )
    for band in bands(x, call.band_pixels):
        part, pixels = band.of(x), slice(band.first, band.last)
        e = work.embedding_of(band, out.embedding)
        made = NormalizeOut(e, *out.statistics[:, pixels])
        normalize_embedding.into(NormalizeCall(part, call.weight, call.bias, call.eps, embedding), made)
        to_e = None if out.grad is None else band.of(out.grad)
        own_scores, own_winner = (work.window(t, band, with_row_above=False) for t in (work.scores, work.winner))
        results = (own_scores, own_winner, out.own_similarity[pixels])
        if contrast is None or out.lse is None:
            class_scores.into(ScoresCall(e, centroids, sampled[pixels], "dot", winners), ScoresOut(*results))
            if to_e is not None:
                to_e.zero_()
        else:
            kernels("similarity", sweep).scores_and_contrast(
                SweepCall(e, centroids, sampled[pixels], call.contrast_temperature, contrast, sweep),
                SweepOut(*results, out.lse[pixels], to_e),
            )
        if call.confidence:
            length = pixel_map(part, out.statistics[1, pixels].reciprocal())
            work.window(work.length, band, with_row_above=False).copy_(length)
        finite = own_scores[:, 0].isfinite().reshape(-1)

        # the cross-entropy of the label rows between the last row of the band above and the last row of this one
        first, last = apart or band.top == 0, apart or band.bottom == height
        top = band.top if first else band.top - 1
        maps = (work.scores, work.winner, work.length, work.logits, work.to_logits)
        scores, winner, length, logits, to_logits = (work.window(t, band, with_row_above=not first) for t in maps)
        scratch, logits = logits, head.forward(scores, length if call.confidence else None, logits)
        out.prediction[pixels] = torch.where(finite, logits[:, :, band.top - top :].argmax(1).reshape(-1), -1)
        # label rows whose lower feature row is in [top, bottom - 1), or to the end
        above, below = bisect_left(lower, top), bisect_left(lower, band.bottom - (not last))
        window = (0, 0, 0, 0) if apart else (height, top, label_rows, above)
        upsample = UpsampleCall(
            logits, labels[band.begin : band.end, above:below], *window, call.align_corners, call.class_weight, call.ignored,
            call.label_smoothing, None, upsampling,
        )  # fmt: skip
        sums += cross_entropy_with_gradient(upsample, gradient, to_logits)[0]
        if out.grad is not None:
            to_logits *= pull
            if not first and work.pending_grad is not None:
                to_logits[:, :, :1] += work.pending_grad
            done = slice(0, to_logits.shape[2] - (not last))  # the next band adds to the last row
            complete = band._replace(top=top, bottom=top + done.stop, first=band.first - (band.top - top) * x.shape[3])
            lengths = length[:, :, done] if call.confidence else None
            to_scores, to_length, to_scale, to_norm = head.backward_(
                to_logits[:, :, done], scores[:, :, done], lengths, scratch[:, :, done]
            )
            target = complete.of(out.grad)
            kernels("similarity", winners).class_scores_backward(
                ScoresBackwardCall(target, centroids, None, "dot", winner[:, :, done], to_scores, None, True, winners),
                ScoresBackwardOut(target, None),
            )
            if to_length is not None and lengths is not None and out.grad_rstd is not None:
                # d length / d rstd = -length^2
                per_pixel = (-to_length * lengths.square()).reshape(-1)
                out.grad_rstd[complete.first : complete.first + len(per_pixel)] = per_pixel
            out.grad_scale.add_(to_scale)
            out.grad_norm.add_(to_norm)
        if not last:
            work.carry(band, to_logits if gradient else None)
    out.total.copy_(sums)


def _first_flops(
    call: Step, sampled: Tensor, pull: Tensor, contrast: Tensor | None, gradient: bool, keep_embedding: bool
) -> int:
    scores = product(call)  # the contrast shares them
    return scores + gradient * (product(call, k=1) + (contrast is not None) * scores)


#: ``first_pass(step, sampled, pull, contrast, gradient, keep_embedding)``. sampled [N]: labels of own similarities and of the
#: contrast, -1 for none; pull and contrast []: what the gradients of both sums are multiplied by; contrast None: no contrast.
first_pass = Op("head", "head_first_pass", _first_out, launch=_first_pass, flops=_first_flops)


def _second_out(call: Second) -> SecondPass:
    x, dtype = call.x, compute_dtype(call.x)
    m = 0 if call.cluster is None else call.centroids.shape[0] * call.centroids.shape[1]
    return SecondPass(
        grad_affine=x.new_empty((2, x.shape[1]), dtype=dtype),
        sums=x.new_empty((m, x.shape[1]), dtype=dtype),
        counts=x.new_empty(m, dtype=torch.int64),
    )


def _second_pass(call: Second, out: SecondPass) -> None:
    x, target, pull = call.x, call.target, call.pull
    for t in out:
        t.zero_()
    classes, k = call.centroids.shape[:2]
    embedding = pick("normalize_embedding", x, call.backend)
    winners = pick("class_scores", x, call.backend, call.centroids, C=classes, K=k)
    keep = call.embedding is not None
    work = Workspace(x, 0, out.sums.dtype, keep or call.cluster is None, call.band_pixels)
    to_affine = torch.empty_like(out.grad_affine)
    for band in bands(x, call.band_pixels):
        part, pixels = band.of(x), slice(band.first, band.last)
        mean, rstd, inverse_norm = statistics = call.statistics[:, pixels]
        if call.cluster is not None:
            e = work.embedding_of(band, call.embedding)
            if not keep:
                made = NormalizeOut(e, *torch.empty_like(statistics))
                normalize_embedding.into(NormalizeCall(part, call.weight, call.bias, call.eps, embedding), made)
            some = cluster_sums(e, call.cluster[pixels], len(out.counts), backend=cast(Backend, call.backend))
            out.sums.add_(some.sums)
            out.counts.add_(some.counts)
        if call.grad is None:
            continue
        to_e = band.of(call.grad)
        if target is not None and pull is not None:
            label = torch.div(target[pixels], k, rounding_mode="floor")
            to_own = pull.new_zeros(len(label), k).scatter_(1, (target[pixels] % k)[:, None], pull[pixels, None])
            kernels("similarity", winners).class_scores_backward(
                ScoresBackwardCall(to_e, call.centroids, label, "dot", None, None, to_own, True, winners),
                ScoresBackwardOut(to_e, None),
            )
        to_rstd = None if call.grad_rstd is None else call.grad_rstd[pixels]
        kernels("embedding", embedding).normalize_embedding_backward(
            NormalizeBackwardCall(part, call.weight, call.bias, mean, rstd, inverse_norm, to_e, to_rstd, embedding),
            NormalizeBackwardOut(to_e, *to_affine),
        )
        out.grad_affine.add_(to_affine)


#: ``second_pass(call)``: what the cluster of a pixel decides, and the gradient of x.
second_pass = Op("head", "head_second_pass", _second_out, launch=_second_pass, mutates=("grad",))
