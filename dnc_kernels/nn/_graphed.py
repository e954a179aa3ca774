"""The step of a head as a CUDA graph, inside an eager training loop."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..errors import check_value, describe
from ..ops.head import scale_saved
from . import _sync
from ._base import DNCLoss
from ._labels import labels_of_step
from ._made import sizes_of, taken
from ._step import inputs_of, make_step

if TYPE_CHECKING:
    from .head import DNCHead


class GraphedLoss:
    """``graphed(features, labels)`` is what `DNCHead.loss` is, launched as one CUDA graph; made by `DNCHead.graphed`.

    A call copies the features (after the head's projection, which is no part of the graph) and the labels to the graph's own
    tensors, and replays the graph, which moves the sub-centroids as `loss` does. Bit-equal to eager mode.

    - Shapes, dtypes and memory formats are those of the examples; drop the last, smaller batch of a data loader.
    - The numbers are copies. The gradients are the graph's own until `backward`, which has to come before the next call.
    - Only `loss` carries a gradient; the parts do not, so weights are those of the constructor.
    - Parameters and buffers are read and written where they are: an optimizer's steps and `load_state_dict` are seen;
      ``load_state_dict(assign=True)``, `to()` and a change of an option of the head are not. Make a new one then.
    """

    def __init__(self, head: DNCHead, features: Tensor, labels: Tensor, update: bool) -> None:
        op = f"{type(head).__name__}.graphed"
        _check(op, head, features)
        self._head, self._update = head, update
        with torch.no_grad():
            self._x = head._projected(features).detach().clone(memory_format=torch.preserve_format)
        self._labels = labels.clone()
        self._calls = 0
        buffers = {name: buffer.clone() for name, buffer in head.named_buffers()}
        try:
            self._replay, (self._values, self._unit, self._to_x, self._grads) = capture(self._make)
        finally:  # making it has moved the sub-centroids
            with torch.no_grad():
                for name, buffer in head.named_buffers():
                    buffer.copy_(buffers[name])

    def _make(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        head = self._head
        x = self._x.detach().requires_grad_()
        labels, ignored = labels_of_step("DNCHead.graphed", self._labels, head.num_classes, head.ignore_index)
        with torch.enable_grad():
            made = make_step(head, inputs_of(head, x), labels, ignored, self._update, parts=False)
        assert made.to_x is not None
        return (
            torch.stack([*made.numbers[:4], made.numbers.accuracy.to(made.unit.dtype)]),
            made.unit,
            made.to_x,
            made.numbers.grads,
        )

    def __call__(self, features: Tensor, labels: Tensor) -> DNCLoss:
        """`DNCHead.loss` of features and labels like the examples.

        Raises:
            ValueError: other shapes, dtypes or devices.
        """
        op = f"{type(self._head).__name__}.graphed"
        x = self._head._projected(features)
        for name, given, own in (("features", x, self._x), ("labels", labels, self._labels)):
            same = given.shape == own.shape and given.dtype == own.dtype and given.device == own.device
            if not same:
                check_value(False, op, name, f"like the example, {describe(own)}", given, "make another graph for these")
        with torch.no_grad():
            self._x.copy_(x)
            self._labels.copy_(labels)
            self._replay()
            self._calls += 1
            values = self._values.clone()
        _, *rest = values.unbind()
        loss = values[0]
        inputs = inputs_of(self._head, x)
        if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs):
            loss = _Replayed.apply(self, values, *inputs)
        cross_entropy, ppc, ppd, accuracy = rest
        return DNCLoss(loss, cross_entropy, ppc, ppd, accuracy)


class _Replayed(torch.autograd.Function):
    """``apply(graphed, values, *inputs)``: the loss, the first of the values, whose gradients the graph has made."""

    @staticmethod
    def forward(ctx: Any, graphed: GraphedLoss, values: Tensor, *inputs: Tensor | None) -> Tensor:
        ctx.graphed, ctx.call, ctx.sizes = graphed, graphed._calls, sizes_of(inputs)
        return values[0].clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        graphed: GraphedLoss = ctx.graphed
        if graphed._calls != ctx.call:
            raise RuntimeError(
                "DNCHead.graphed: a later call has overwritten the gradients of this one; call backward before the next call"
            )
        grad = grad / graphed._unit
        to_x = scale_saved(graphed._to_x, grad) if ctx.needs_input_grad[2] else None
        return None, None, *taken(ctx, to_x, graphed._grads * grad)


def _check(op: str, head: DNCHead, features: Tensor) -> None:
    check_value(
        features.device.type == "cuda" or _stand_in, op, "features", "on a CUDA device", str(features.device), "use loss"
    )
    plain = head.checkpoint != "none"
    check_value(
        plain, op, "checkpoint", "all or scores", "none", "its parts are ops of autograd; use torch.cuda.make_graphed_callables"
    )
    check_value(
        not head._start_pending, op, "init", "without a start to come", "data", "run the steps up to the start with loss"
    )
    check_value(not head._observers, op, "Monitor", "none", "one that observes the head", "use loss for the steps that it sees")
    check_value(head.accumulation_steps == 1, op, "accumulation_steps", "1", str(head.accumulation_steps), "use loss")
    check_value(head.generator is None, op, "generator", "None", "a generator", "draws of a graph come from torch's own")
    alone = _sync.ranks(head.peers) == 1
    check_value(
        alone, op, "sync", "one rank, or none", "several ranks", "use loss: what ranks exchange is no part of the graph"
    )


#: Set by tests, in place of a GPU.
_stand_in = False


def capture(call: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
    """What replays a call as a CUDA graph, and the tensors that a replay writes."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):  # kernels are compiled and chosen before the capture
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()
    return graph.replay, results
