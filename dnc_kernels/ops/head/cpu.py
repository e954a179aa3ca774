"""The parts of a step on a CPU: C++ for the two passes and the labels (csrc/cpu/head*.cpp), the rest as reference.py has it."""

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
)
from .reference import head_cluster, head_finish

_of_step: Any = attrgetter(*FirstArguments._fields[:-1])
_of_second: Any = attrgetter(*SecondArguments._fields[:-3])


def head_labels(call: LabelsCall, out: Labels) -> None:
    """Labels at feature size, counts and zeros."""
    figures = Figures(counts=out.counts[0, : call.classes], range=torch.empty(2, dtype=torch.int64))
    run("label_figures", FiguresCall(call.labels, call.ignore_index, call.classes, call.weighted), figures)
    reference.small_labels(call, out)
    assert figures.range is not None
    if int(figures.range[1]) >= call.classes:  # in a graph; else they have been checked, and it is the ignored one
        out.counts[0, -1] = ((call.labels >= call.classes) & (call.labels != call.ignore_index)).sum()


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


def label_range(labels: Tensor) -> tuple[int, int]:
    """The least and the largest of labels, of which there are some."""
    ours = readable(labels) and labels.ndim == 3 and labels.dtype in LABEL_DTYPES and not backends.unusable("cpu")
    if not ours:
        least, most = labels.aminmax()
        return int(least), int(most)
    found = torch.empty(2, dtype=torch.int64)
    run("label_figures", FiguresCall(labels.detach(), -1, 0, False), Figures(range=found))
    least, most = found.tolist()
    return least, most


__all__ = ["head_cluster", "head_finish", "head_first_pass", "head_labels", "head_second_pass", "label_range"]
