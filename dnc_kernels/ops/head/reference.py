"""The parts of a step in plain torch and the ops of other families, whatever their backend: what the kernels are compared with,
and what runs where there are none.

    logits = LayerNorm over the classes of the scores, or scores * exp(log_scale) * length / temperature
    target = c*K + k of the transport;  PPC = lse - <e, p[target]> / T;  PPD = (1 - <e, p[target]>)^2   (ProtoSeg, eq. 11, 12)
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor

from ..._tensors import pixel_count, pixel_map
from ...backends import Backend, pick
from .._common import kernels
from ..embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut
from ..embedding.op import normalize_embedding
from ..momentum import cluster_sums
from ..similarity.calls import ScoresBackwardCall, ScoresBackwardOut, ScoresCall, ScoresOut, SweepCall, SweepOut
from ..similarity.op import class_scores
from ..sinkhorn import sinkhorn_assign
from ..upsample.calls import UpsampleCall
from ..upsample.op import cross_entropy_with_gradient
from .bands import Logits, Workspace, bands, label_rows
from .calls import (
    CONTRAST,
    COUNT,
    DISTANCE,
    PULL,
    SCALE,
    UNIT,
    WEIGHT,
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


def label_places(source: int, target: int, middle: bool, device: torch.device) -> Tensor:
    """[target] int64: the label, of `source`, of each feature: in the middle of its cell, or the first.

    torch multiplies in fp32 by a scale rounded to fp32; integer arithmetic picks other pixels at some sizes, such as 2 to 82.
    """
    scale = torch.full((), source, dtype=torch.float32, device=device) / target
    place = torch.arange(target, dtype=torch.float32, device=device) + (0.5 if middle else 0.0)
    return (place * scale).to(torch.int64).clamp(max=source - 1)


def head_labels(call: LabelsCall, out: Labels) -> None:
    """Labels at feature size, counts and zeros."""
    labels, classes = call.labels, call.classes
    labels = labels if labels.dtype.itemsize > 1 else labels.to(torch.int32)  # of 8 bits it meets no ignore_index of -1
    named = (labels >= 0) & (labels != call.ignore_index)
    inside = named & (labels < classes)
    out.counts[0, :classes] = 0
    if call.weighted:
        out.counts[0, :classes] = _per_class(torch.where(inside, labels, -1).to(torch.int64).reshape(-1), classes)
    else:
        out.counts[0, 0] = inside.sum()
    out.counts[0, -1] = named.sum() - inside.sum()
    small, (_, height, width) = call.labels, call.labels.shape
    if (height, width) != (call.height, call.width):
        rows = label_places(height, call.height, call.middle, small.device)
        columns = label_places(width, call.width, call.middle, small.device)
        small = small[:, rows[:, None], columns]
    small = small.reshape(-1).to(torch.int64)
    kept = (small >= 0) & (small < classes) & (small != call.ignore_index)
    out.small.copy_(torch.where(kept, small, -1))
    out.counts[0, classes:-1] = _per_class(out.small, classes)
    for t in (out.zeros, out.counters):
        if t is not None:
            t.zero_()


def _per_class(labels: Tensor, classes: int) -> Tensor:
    """[C] int32 numbers of labels [N]; negative: none."""
    counts = torch.zeros(classes + 1, dtype=torch.int32, device=labels.device)
    return counts.index_add_(0, torch.where(labels < 0, classes, labels), counts.new_ones(1).expand(len(labels)))[:-1]


def amounts_of(counts: Tensor, class_weight: Tensor | None, at_features: bool) -> Tensor:
    """[2] float64: the class weights of the labelled pixels, and how many have a label at feature size, of `Labels.counts`."""
    total, classes = counts.sum(0).to(torch.float64), counts.shape[1] // 2
    few = total[classes : 2 * classes]
    large = few if at_features else total[:classes]
    # a class without a pixel counts nothing, whatever its weight
    weight = large if class_weight is None else torch.where(large > 0, large * class_weight, 0)
    return torch.stack([weight.sum(), few.sum()])


def factors_of(call: Step, amounts: Tensor, out: Tensor) -> None:
    """`FirstPass.factors`: in half precision gradients get the size of probabilities and unit vectors."""
    weight, count = torch.where(amounts > 0, amounts, 1).to(out.dtype).unbind()
    scale = torch.ones_like(count) if call.log_scale is None else call.log_scale.exp()
    half = call.x.dtype in (torch.float16, torch.bfloat16)
    unit = count * call.temperature / scale if half else torch.ones_like(count)
    out[UNIT], out[PULL] = unit, unit / weight
    out[CONTRAST], out[DISTANCE] = call.ppc_weight * unit / count, call.ppd_weight * unit / count
    out[SCALE], out[WEIGHT], out[COUNT] = scale, weight, count


def write_factors(call: Step, out: Tensor, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None) -> None:
    """`FirstPass.factors`, of what is known."""
    if factors is not None:
        out.copy_(factors)
        return
    if amounts is None:
        assert counts is not None
        amounts = amounts_of(counts, call.class_weight, call.at_features)
    factors_of(call, amounts, out)


def head_first_pass(
    call: Step, out: FirstPass, sampled: Tensor, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None,
    gradient: bool, keep_embedding: bool,
) -> None:  # fmt: skip
    """Up to the gradient of the embedding, band by band."""
    x, labels, centroids = call.x, call.labels, call.centroids
    write_factors(call, out.factors, counts, amounts, factors)
    pull, contrast, scale = out.factors[PULL], out.factors[CONTRAST], out.factors[SCALE]
    for t in (out.grad_scale, out.grad_norm, out.grad_rstd):
        if t is not None:
            t.zero_()
    head = Logits(call.temperature, None if call.log_scale is None else scale, call.norm_weight, call.norm_bias, call.norm_eps)
    sums = torch.zeros((), dtype=torch.float64, device=x.device)
    classes, k = centroids.shape[:2]
    work = Workspace(x, classes, out.own_similarity.dtype, keep_embedding, call.band_pixels)
    embedding = pick("normalize_embedding", x, call.parts)
    upsampling = pick("upsample_cross_entropy", work.logits, call.parts, N=labels.numel(), C=classes)
    embedded = out.embedding if work.embedding is None else work.embedding  # its layout decides, which is not always that of x
    assert embedded is not None
    sweep, winners = (
        pick(op, embedded, call.parts, centroids, N=pixel_count(x), C=classes, K=k)
        for op in ("subcentroid_cross_entropy", "class_scores")
    )
    for rows, done in label_rows(call, bands(x, call.band_pixels)):
        band = rows.band
        part, pixels = band.of(x), band.pixels
        e = work.embedding_of(band, out.embedding)
        made = NormalizeOut(e, *out.statistics[:, pixels])
        normalize_embedding.into(NormalizeCall(part, call.weight, call.bias, call.eps, embedding), made)
        to_e = None if out.grad is None else band.of(out.grad)
        own_scores, own_winner = (work.own(t, band) for t in (work.scores, work.winner))
        results = (own_scores, own_winner, out.own_similarity[pixels])
        if out.lse is None:
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
            work.own(work.length, band).copy_(length)
        finite = own_scores[:, 0].isfinite().reshape(-1)

        # the cross-entropy of the label rows between the last row of the band above and the last row of this one
        maps = (work.scores, work.winner, work.length, work.logits, work.to_logits)
        scores, winner, length, logits, to_logits = (work.window(t, band, rows.carried) for t in maps)
        scratch, logits = logits, head.forward(scores, length if call.confidence else None, logits)
        out.prediction[pixels] = torch.where(finite, logits[:, :, int(rows.carried) :].argmax(1).reshape(-1), -1)
        out.group[pixels] = torch.where(finite, sampled[pixels], -1)
        upsample = UpsampleCall(
            logits, rows.of(labels), *rows.window, call.align_corners, call.class_weight, call.ignored,
            call.label_smoothing, None, upsampling,
        )  # fmt: skip
        sums += cross_entropy_with_gradient(upsample, gradient, to_logits)[0]
        if out.grad is not None:
            to_logits *= pull
            work.add_pending(rows, to_logits)
            part_of = slice(0, done.bottom - done.top)  # the next band adds to the last row
            lengths = length[:, :, part_of] if call.confidence else None
            to_scores, to_length, to_scale, to_norm = head.backward_(
                to_logits[:, :, part_of], scores[:, :, part_of], lengths, scratch[:, :, part_of]
            )
            target = done.of(out.grad)
            kernels("similarity", winners).class_scores_backward(
                ScoresBackwardCall(target, centroids, None, "dot", winner[:, :, part_of], to_scores, None, True, winners),
                ScoresBackwardOut(target, None),
            )
            if to_length is not None and lengths is not None and out.grad_rstd is not None:
                # d length / d rstd = -length^2
                out.grad_rstd[done.pixels] = (-to_length * lengths.square()).reshape(-1)
            if call.norm_weight is None:
                out.grad_scale.add_(to_scale * scale)  # that of its logarithm
            else:
                out.grad_norm.add_(to_norm)
        if not rows.last:
            work.carry(band, to_logits if out.grad is not None else None)
    out.losses[0, 0], out.losses[0, 1] = sums, 0


def head_cluster(call: ClusterCall, out: Clusters) -> None:
    """The transport and what follows from it."""
    own, group, k, classes = call.own_similarity, call.group, call.own_similarity.shape[1], call.classes
    sub = assignment_of(call)
    inside = (group >= 0) & (sub >= 0)
    target = torch.where(inside, group * k + sub, -1)
    towards = to_target(own, target)
    out.target.copy_(target)
    ppc = towards.new_zeros(())
    if call.lse is not None:
        ppc = torch.where(inside, call.lse - towards / call.contrast_temperature, 0).sum()
    ppd = torch.where(inside, (1 - towards).square(), 0).sum()
    out.sums[0, 0], out.sums[0, 1] = ppc, ppd
    if out.pull is not None:
        out.pull.copy_(pull_of(call.factors, target, towards, call.contrast_temperature))
    finite = call.prediction >= 0
    labelled = finite & (call.small >= 0)
    correct = labelled & (call.prediction == call.small)
    out.moving.copy_(torch.where(correct, target, -1) if call.correct_only else target)
    counters = call.counters if out.counters is None else out.counters.zero_()
    assert counters is not None
    won = torch.where(inside, group * k + own.argmax(1), classes * k)
    counters[: classes * k + 1].index_add_(0, won, torch.ones_like(won))
    counters[classes * k :] = torch.stack([correct.sum(), labelled.sum(), (~finite).sum()])


def assignment_of(call: ClusterCall) -> Tensor:
    """[N] int64: the sub-centroid of each pixel in its class, -1 where a similarity is not finite."""
    if call.assignment is not None:
        return call.assignment
    own, group, backend = call.own_similarity, call.group, cast(Backend, call.parts)
    return sinkhorn_assign(own, group, call.classes, epsilon=call.epsilon, iterations=call.iterations, backend=backend)


def to_target(own: Tensor, target: Tensor) -> Tensor:
    """[N]: similarity to the target, of own similarities [N,K]; without meaning where there is none."""
    return own.gather(1, (target.clamp(min=0) % own.shape[1])[:, None])[:, 0]


def pull_of(factors: Tensor, target: Tensor, towards: Tensor, temperature: float) -> Tensor:
    """[N]: gradient of the similarity to the target; 0 where there is none."""
    pull = -factors[CONTRAST] / temperature - 2 * factors[DISTANCE] * (1 - towards)
    return torch.where(target >= 0, pull, 0)


def head_second_pass(call: Second, out: SecondPass) -> None:
    """What the cluster of a pixel decides, and the gradient of x in place, band by band."""
    x, target, pull = call.x, call.target, call.pull
    out.grad_affine.zero_(), out.sums.zero_(), out.counts.zero_()
    classes, k = call.centroids.shape[:2]
    embedding = pick("normalize_embedding", x, call.parts)
    winners = pick("class_scores", x, call.parts, call.centroids, C=classes, K=k)
    keep = call.embedding is not None
    work = Workspace(x, 0, out.sums.dtype, keep or call.cluster is None, call.band_pixels)
    to_affine = torch.empty_like(out.grad_affine[0]) if len(out.grad_affine) else None
    for band in bands(x, call.band_pixels):
        part, pixels = band.of(x), band.pixels
        mean, rstd, inverse_norm = statistics = call.statistics[:, pixels]
        if call.cluster is not None:
            e = work.embedding_of(band, call.embedding)
            if not keep:
                made = NormalizeOut(e, *torch.empty_like(statistics))
                normalize_embedding.into(NormalizeCall(part, call.weight, call.bias, call.eps, embedding), made)
            some = cluster_sums(e, call.cluster[pixels], len(out.counts), backend=cast(Backend, call.parts))
            out.sums.add_(some.sums)
            out.counts.add_(some.counts)
        if call.grad is None or to_affine is None:
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
        out.grad_affine[0].add_(to_affine)


def head_finish(call: FinishCall, out: Finished, decay: float, dead: float) -> None:
    """Numbers and gradients; the update is `nn.SubCentroids`' own."""
    factors, dtype = call.factors, out.loss.dtype
    cross_entropy = call.losses[:, 0].sum() / factors[WEIGHT]
    ppc = ppd = cross_entropy.new_zeros(())
    if call.parts is not None:
        both = call.parts.sum(0) / factors[COUNT]
        ppc, ppd = both[0] if call.ppc else ppc, both[1] if call.ppd_weight else ppd
    out.cross_entropy.copy_(cross_entropy), out.ppc.copy_(ppc), out.ppd.copy_(ppd)
    out.loss.copy_(cross_entropy + call.ppc_weight * ppc + call.ppd_weight * ppd)
    correct, labelled, _ = call.counters[-3:]
    out.accuracy.copy_(correct.to(torch.float32) / labelled.clamp(min=1))
    parts = (call.grad_affine.sum(0), call.grad_scale.sum(0, keepdim=True), call.grad_norm.sum(0))
    out.grads.copy_(torch.cat([t.to(dtype).flatten() for t in parts]))
