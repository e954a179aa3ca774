"""The training step of `DNCHead` as the ops of `ops.head`: which of them a head's options ask for, and what goes in between."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .._tensors import compute_dtype, pixel_count
from ..backends import chosen, pick
from ..ops.head import (
    UNIT,
    ClusterCall,
    FinishCall,
    Finished,
    FirstPass,
    Labels,
    LabelsCall,
    Step,
    amounts_of,
    default_band,
    head_cluster,
    head_finish,
    head_first_pass,
    head_labels,
    head_second_pass,
    is_triton,
    sorting_of,
    table_size,
)
from . import _sync
from ._base import DNCLoss
from ._made import Again, Made, MadeInParts, second_call
from ._usage import dead_below
from .subcentroids import WINS_DECAY

if TYPE_CHECKING:
    from .head import DNCHead

#: Fields of `FinishCall` that are there for an update.
_BUFFERS = (
    "prototypes", "num_updates", "last_counts", "idle_updates", "wins", "class_counts", "nonfinite_pixels", "bad_labels"
)  # fmt: skip
_UPDATE = ("sums", "pixels", "bucket", "previous", "state", *_BUFFERS)


#: Of `inputs_of`.
Inputs = tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]


class _Plan(NamedTuple):
    """What a step does, and where."""

    update: bool
    backend: str
    parts: str
    compiling: bool
    band_pixels: int
    whole: bool  # in one band
    clusters: bool
    transports: bool  # the clustering is `ops.sinkhorn_assign` of these pixels
    begins: bool  # in the first pass, and ends in `head_cluster`
    moves: bool  # `head_finish` moves the sub-centroids
    gradient: bool

    @property
    def fused(self) -> bool:
        """On a GPU's kernels."""
        return self.backend == "triton"


def _plan(head: DNCHead, x: Tensor, p: Tensor, inputs: Inputs, update: bool) -> _Plan:
    parts, compiling = chosen(), torch.compiler.is_compiling()
    classes, k = p.shape[:2]
    # the step has no kernels of its own in CUDA C++, those of its parts have
    backend = pick("head_step", x, "triton" if parts == "cuda" else parts, p, C=classes, K=k)
    fused, alone = backend == "triton", _sync.ranks(head.peers) == 1
    band_pixels = head.band_pixels or default_band(x, classes, head.scores == "norm")
    # partial sums of one band have a size that a graph for any size does not know
    whole = not compiling and pixel_count(x) <= band_pixels
    clusters = update or head.ppc_weight > 0 or head.ppd_weight > 0
    transports = head._transports(update)
    begins = fused and whole and clusters and transports and head.iterations > 0
    return _Plan(
        update=update,
        backend=backend,
        parts=parts,
        compiling=compiling,
        band_pixels=band_pixels,
        whole=whole,
        clusters=clusters,
        transports=transports,
        begins=begins and is_triton("sinkhorn_assign", x, parts, K=k),
        moves=fused and update and alone and head._updates_at_once(),
        gradient=torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs),
    )


def inputs_of(head: DNCHead, x: Tensor) -> Inputs:
    """What a step is differentiated in: features, weight and bias of the embedding, log_scale, weight and bias of the norm."""
    head._in_full_precision()
    dtype = compute_dtype(x, head.prototypes)
    weight, bias = (t.to(compute_dtype(x)) for t in (head.feat_norm.weight, head.feat_norm.bias))
    log_scale = gains = shift = None
    if head.scores == "norm":
        gains, shift = head.mask_norm.weight.to(dtype), head.mask_norm.bias.to(dtype)
    elif head.scores == "scale":
        log_scale = head.logit_scale.to(dtype).reshape(())
    return x, weight, bias, log_scale, gains, shift


class Result(NamedTuple):
    """A step that was made: its numbers, and the gradients of `unit` times the loss."""

    numbers: Finished
    unit: Tensor
    to_x: Tensor | None
    again: Again | None
    compiling: bool


def make_step(head: DNCHead, inputs: Inputs, labels: Tensor, ignored: int, update: bool, *, parts: bool = True) -> Result:
    """The step of a head for the inputs of `inputs_of` and the labels of `labels_of_step`; without a graph.

    parts: parts of the loss may be asked for their gradients.
    """
    x = inputs[0]
    p = (head.prototypes if head.training else head.snapshot()).to(compute_dtype(x, head.prototypes))
    plan = _plan(head, x, p, inputs, update)
    with torch.no_grad():
        early = _labels(head, plan, x, labels, ignored)
        fixed = [None if t is None else t.detach() for t in inputs]
        if not plan.fused and (plan.compiling or labels.device.type != "cpu"):
            # nobody has looked at the labels, and only a GPU's kernels leave out what is no class
            beyond = (labels < 0) | (labels >= head.num_classes) | (labels == ignored)
            labels, ignored = torch.where(beyond, -1, labels.to(torch.int64)), -1
        step = _step(head, plan, early, labels, ignored, p, *fixed)
        numbers, first, again = _run(head, plan, step, early, parts)
    return Result(numbers, first.factors[UNIT], first.grad, again, plan.compiling)


def loss_in_bands(head: DNCHead, x: Tensor, labels: Tensor, ignored: int, update: bool) -> DNCLoss:
    """Does `DNCHead.loss` for projected features x and labels of `labels_of_step`."""
    inputs = inputs_of(head, x)
    made = make_step(head, inputs, labels, ignored, update)
    numbers, weights = made.numbers, (head.ppc_weight, head.ppd_weight)
    values: Any = numbers[:4]
    if made.to_x is not None and made.compiling:
        values = Made.apply(weights, torch.stack(values), made.unit, made.to_x, numbers.grads, *inputs)
    elif made.to_x is not None:
        values = MadeInParts.apply(made.again, weights, values, made.unit, made.to_x, numbers.grads, *inputs)
    loss, cross_entropy, ppc, ppd = values
    return DNCLoss(loss, cross_entropy, ppc, ppd, numbers.accuracy)


def _labels(head: DNCHead, plan: _Plan, x: Tensor, labels: Tensor, ignored: int) -> Labels:
    classes, k = head.num_classes, head.num_subcentroids
    return head_labels(
        LabelsCall(
            labels=labels,
            classes=classes,
            ignore_index=ignored,
            height=x.shape[2],
            width=x.shape[3],
            middle=head.label_mode == "nearest-exact",
            weighted=head.class_weight is not None and head.loss_size == "labels",
            zeros=table_size(classes, k) if plan.begins else 0,
            counters=classes * k + 3 if plan.fused and not plan.compiling else 0,
            backend=plan.backend,
        )
    )


def _step(
    head: DNCHead, plan: _Plan, early: Labels, labels: Tensor, ignored: int, p: Tensor, x: Any, weight: Any, bias: Any,
    log_scale: Tensor | None, gains: Tensor | None, shift: Tensor | None,
) -> Step:  # fmt: skip
    at_features = head.loss_size == "features"
    return Step(
        x=x,
        weight=weight,
        bias=bias,
        eps=head.feat_norm.eps,
        centroids=p,
        labels=early.small.view(x.shape[0], *x.shape[2:]) if at_features else labels,
        ignored=-1 if at_features else ignored,
        at_features=at_features,
        confidence=head.confidence == "length" and head.scores != "norm",
        temperature=head.temperature if head.scores == "temperature" else 1.0,
        log_scale=log_scale,
        norm_weight=gains,
        norm_bias=shift,
        norm_eps=head.mask_norm.eps if gains is not None else 0.0,
        class_weight=head.class_weight,
        label_smoothing=head.label_smoothing,
        align_corners=head.align_corners,
        ppc_weight=head.ppc_weight,
        ppd_weight=head.ppd_weight,
        contrast_temperature=head.ppc_temperature,
        zeros=early.zeros,
        band_pixels=plan.band_pixels,
        whole=plan.whole,
        parts=plan.parts,
        backend=plan.backend,
    )


def _run(head: DNCHead, plan: _Plan, step: Step, early: Labels, parts: bool) -> tuple[Finished, FirstPass, Again | None]:
    """The step, and its update; what its parts' gradients are made of, where they may be asked for."""
    sampled, amounts = head._sampled(early.small), None
    joint = head._over_ranks(plan.update)
    if sampled is not early.small or joint:
        amounts = torch.stack([amounts_of(early.counts, step.class_weight, step.at_features)[0], (sampled >= 0).sum()])
        if joint:
            (both,) = _sync.sum_over_ranks(head.peers, amounts)
            amounts = both / _sync.ranks(head.peers)
    needs_embedding = plan.update and (head._start_pending or head.revive_after is not None)
    # in one band of a GPU nothing is won by making it again
    keep = needs_embedding or (plan.update and (head.checkpoint == "scores" or (plan.fused and plan.whole)))
    first = head_first_pass(step, sampled, early.counts, amounts, None, plan.gradient, keep)
    classes, k, channels = step.centroids.shape
    tile, unit, found = 0, 0, None
    if plan.moves and plan.whole and is_triton("cluster_sums", step.x, plan.parts, C=classes, K=k):
        assert first.embedding is not None
        tile, unit = sorting_of(first.embedding, classes * k, first.own_similarity, first.group, classes)
    if plan.clusters:
        found = head_cluster(_cluster_call(head, plan, step, first, early, tile))
    counters = _counters(first, early) if found is None else early.counters if found.counters is None else found.counters
    assert counters is not None
    target, pull = (None, None) if found is None or found.pull is None else (found.target, found.pull)
    # elsewhere it is made again, whoever else needs it: the bits of a step do not depend on that
    embedding = first.embedding if plan.fused or head.checkpoint == "scores" else None
    moving = found if plan.update else None
    second = head_second_pass(second_call(step, first, target, pull, embedding=embedding, clusters=moving, tile=tile))
    keep_old = parts and plan.gradient and not plan.compiling and bool(head.ppc_weight or head.ppd_weight)
    moved: dict[str, Any] = dict.fromkeys(_UPDATE)
    if plan.moves:
        assert found is not None
        moved = {name: getattr(head, name) for name in _BUFFERS}
        moved["previous"] = torch.empty_like(head.prototypes) if keep_old else None
        moved.update(sums=second.sums, pixels=second.counts, bucket=second.bucket if unit else None, state=found.state)
    finish = FinishCall(
        losses=first.losses,
        parts=None if found is None else found.sums,
        factors=first.factors,
        counts=early.counts,
        counters=counters,
        grad_scale=first.grad_scale,
        grad_norm=first.grad_norm,
        grad_affine=second.grad_affine,
        ppc_weight=head.ppc_weight,
        ppd_weight=head.ppd_weight,
        ppc=first.lse is not None,
        unit=unit,
        channels=channels,
        backend=plan.backend,
        **moved,
    )
    result, again = head_finish(finish, WINS_DECAY, dead_below(k)), None
    if keep_old:
        assert found is not None
        again = Again(step, found.target, first.factors, finish.previous)
    if plan.update and not plan.moves:
        assert found is not None
        counts = early.counts.sum(0)
        tally = torch.cat([counts[classes:-1], counters[-1:], counts[-1:]])
        e = first.embedding if needs_embedding else None
        sums = (second.sums, second.counts)
        won = counters[: classes * k]
        head._write_down(head._update(e, found.target, None, first.own_similarity, tally, sums=sums, won=won))
    return result, first, again


def _cluster_call(head: DNCHead, plan: _Plan, step: Step, first: FirstPass, early: Labels, tile: int) -> ClusterCall:
    assignment = None
    if not plan.transports:
        assignment = head._assign(first.own_similarity, first.group, joint=plan.update)
    schedule, numbers = head._schedule() if plan.moves else ("constant", (0.0, 0.0, 0.0))
    return ClusterCall(
        own_similarity=first.own_similarity,
        group=first.group,
        prediction=first.prediction,
        small=early.small,
        lse=first.lse,
        assignment=assignment,
        zeros=early.zeros,
        counters=early.counters,
        factors=first.factors,
        classes=head.num_classes,
        epsilon=head.epsilon,
        iterations=head.iterations,
        contrast_temperature=step.contrast_temperature,
        pulls=plan.gradient and bool(head.ppc_weight or head.ppd_weight),
        correct_only=head.update_from == "correct",
        tile=tile,
        num_updates=head.num_updates if plan.moves else None,
        warmup=head.warmup_steps,
        schedule=schedule,
        first=numbers[0],
        second=numbers[1],
        third=numbers[2],
        whole=plan.whole,
        parts=plan.parts,
        backend=plan.backend,
    )


def _counters(first: FirstPass, early: Labels) -> Tensor:
    """[3]: what `head_cluster` counts for the accuracy, where nothing is clustered."""
    finite = first.prediction >= 0
    labelled = finite & (early.small >= 0)
    correct = labelled & (first.prediction == early.small)
    return torch.stack([correct.sum(), labelled.sum(), (~finite).sum()])
