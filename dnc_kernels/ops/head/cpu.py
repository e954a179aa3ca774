"""The parts of a step on a CPU: C++ (csrc/cpu/head*.cpp), but for the few numbers of the end, which reference.py has."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from ... import backends
from .._common import contiguous_in, readable
from .._cpu import run
from ..upsample.calls import LABEL_DTYPES
from . import reference
from .calls import (
    ClusterCall,
    Clusters,
    Figures,
    FiguresCall,
    FirstArguments,
    FirstPass,
    Labels,
    LabelsCall,
    Second,
    SecondArguments,
    SecondPass,
    Step,
    Targets,
    TargetsCall,
)
from .reference import head_finish

_of_step: Any = attrgetter(*FirstArguments._fields[:-1])
_of_second: Any = attrgetter(*SecondArguments._fields[:-3])


def head_labels(call: LabelsCall, out: Labels) -> None:
    """Labels at feature size, counts and zeros."""
    classes, counts = call.classes, out.counts[0]
    small = out.small.view(len(call.labels), call.height, call.width)
    figures = Figures(counts[:classes], torch.empty(3, dtype=torch.int64), small, counts[classes:-1])
    run("label_figures", FiguresCall(call.labels, call.ignore_index, classes, call.weighted, call.middle), figures)
    assert figures.range is not None
    counts[-1] = figures.range[2]
    for t in (out.zeros, out.counters):
        if t is not None:
            t.zero_()


def head_first_pass(
    call: Step, out: FirstPass, sampled: Tensor, counts: Tensor | None, amounts: Tensor | None, factors: Tensor | None,
    gradient: bool, keep_embedding: bool,
) -> None:  # fmt: skip
    """Up to the gradient of the embedding, in one parallel region. A bad label raises; then the results mean nothing."""
    reference.write_factors(call, out.factors, counts, amounts, factors)
    compute, statistics = out.own_similarity.dtype, out.statistics.dtype
    call = call._replace(
        weight=call.weight.to(statistics).contiguous(),
        bias=call.bias.to(statistics).contiguous(),
        centroids=call.centroids.contiguous(),
        norm_weight=contiguous_in(compute, call.norm_weight),
        norm_bias=contiguous_in(compute, call.norm_bias),
        class_weight=contiguous_in(compute, call.class_weight),
    )
    arguments = (*_of_step(call), sampled.to(torch.int64).contiguous())
    run("head_first_pass", FirstArguments._make(arguments), out)


def head_cluster(call: ClusterCall, out: Clusters) -> None:
    """The transport and what follows from it, which is one parallel region."""
    assignment = reference.assignment_of(call)
    counters = call.counters if out.counters is None else out.counters
    assert counters is not None
    arguments = TargetsCall(
        call.own_similarity, call.group, call.prediction, call.small, assignment.to(torch.int64).contiguous(), call.lse,
        call.factors, call.classes, call.contrast_temperature, call.correct_only,
    )  # fmt: skip
    run("head_targets", arguments, Targets(out.target, out.pull, out.moving, out.sums[0], counters))


def head_second_pass(call: Second, out: SecondPass) -> None:
    """Gradients and sums, those that the call is about, in one parallel region."""
    statistics = call.statistics.dtype
    compute = torch.float64 if call.centroids.dtype == torch.float64 else out.grad_affine.dtype
    call = call._replace(
        weight=call.weight.to(statistics).contiguous(),
        bias=call.bias.to(statistics).contiguous(),
        centroids=call.centroids.contiguous(),
        target=contiguous_in(torch.int64, call.target),
        pull=contiguous_in(compute, call.pull),
        cluster=contiguous_in(torch.int64, call.cluster),
    )
    grad_affine = out.grad_affine[0] if len(out.grad_affine) else call.weight.new_empty((2, call.x.shape[1]))
    run("head_second_pass", SecondArguments._make((*_of_second(call), grad_affine, out.sums, out.counts)))


def label_range(labels: Tensor, classes: int, ignore_index: int) -> tuple[int, int]:
    """Of labels, of which there are some: the least, and how many are no class and not `ignore_index`."""
    ours = readable(labels) and labels.ndim == 3 and labels.dtype in LABEL_DTYPES and not backends.unusable("cpu")
    if not ours:
        least, most = labels.aminmax()
        wrong = int(((labels >= classes) & (labels != ignore_index)).sum()) if int(most) >= classes else 0
        return int(least), wrong
    found = torch.empty(3, dtype=torch.int64)
    run("label_figures", FiguresCall(labels.detach(), ignore_index, classes, False, False), Figures(range=found))
    least, _, wrong = found.tolist()
    return least, wrong


__all__ = ["head_cluster", "head_finish", "head_first_pass", "head_labels", "head_second_pass", "label_range"]
