"""The gradients of a loss that `ops/head` makes in the forward pass, as autograd sees them; and those of its parts.

`loss` alone: backward multiplies what was made by the incoming gradient. A mixture with the parts of the loss: backward runs
both passes again, with the incoming gradients as the weights of the parts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..ops import NAMESPACE
from ..ops.head import (
    COUNT,
    SCALE,
    UNIT,
    WEIGHT,
    Clusters,
    FirstPass,
    Second,
    Step,
    head_first_pass,
    head_second_pass,
    pull_of,
    scale_saved,
    to_target,
)


def second_call(
    step: Step,
    first: FirstPass,
    target: Tensor | None,
    pull: Tensor | None,
    *,
    embedding: Tensor | None = None,
    clusters: Clusters | None = None,
    tile: int = 0,
) -> Second:
    """The second pass after the first. clusters: whose sums move sub-centroids; None: nothing moves."""
    return Second(
        x=step.x,
        weight=step.weight,
        bias=step.bias,
        eps=step.eps,
        centroids=step.centroids,
        statistics=first.statistics,
        grad=first.grad,
        grad_rstd=first.grad_rstd,
        embedding=embedding,
        target=target,
        pull=pull,
        cluster=None if clusters is None else clusters.moving,
        histogram=None if clusters is None else clusters.histogram,
        cursor=None if clusters is None else clusters.cursor,
        tile=tile,
        band_pixels=step.band_pixels,
        whole=step.whole,
        parts=step.parts,
        backend=step.backend,
    )


class Again:
    """Makes the gradients of any mixture of the parts of a loss, by both passes again, in backward.

    Holds the features, the labels, the target of every pixel [N] and the sub-centroids of that step, until it is dropped.
    """

    def __init__(self, step: Step, target: Tensor, factors: Tensor, centroids: Tensor | None) -> None:
        # an update moves the sub-centroids before backward, and DistributedDataParallel writes to every buffer
        centroids = step.centroids.clone() if centroids is None else centroids
        # partial sums in one row, whatever makes them
        self.step = step._replace(centroids=centroids, zeros=None, whole=False)
        self.target, self.factors = target, factors
        self.versions = self._versions()

    def _versions(self) -> dict[str, int]:
        named = self.step._asdict().items()
        return {name: t._version for name, t in named if isinstance(t, Tensor) and not t.is_inference()}

    def gradients(self, cross_entropy: Tensor | None, ppc: Tensor | None, ppd: Tensor | None) -> tuple[Tensor, Tensor]:
        """Gradient of the features and of the other inputs [2D+1+2C] for incoming gradients [] of the means; None: of none."""
        for name, version in self._versions().items():
            if version != self.versions[name]:
                raise RuntimeError(
                    f"DNCHead.loss: {name} was changed in place after the loss; cross_entropy, ppc and ppd are computed again "
                    f"in backward, so leave it alone or pass a clone (the gradient of `loss` alone does not need it)"
                )
        weights = [g for g in (cross_entropy, ppc, ppd) if g is not None]
        # a mixture of size 1 gives gradients that float16 holds, as those of the loss are; its size is applied in float32
        size = torch.stack(weights).abs().amax()
        size = torch.where(size > 0, size, 1)

        unit, weight, count = (self.factors[i] for i in (UNIT, WEIGHT, COUNT))
        zero = torch.zeros_like(size)
        shares = (cross_entropy, weight), (ppc, count), (ppd, count)
        pulls = [zero if g is None else g / size * unit / over for g, over in shares]
        factors = torch.cat([unit[None], torch.stack(pulls), self.factors[SCALE:]])
        # the class of the pixels that have a target
        sampled = torch.div(self.target, self.step.centroids.shape[1], rounding_mode="floor")
        step = self.step._replace(ppc_weight=0.0 if ppc is None else 1.0)
        first = head_first_pass(step, sampled, None, None, factors, True, False)
        pull = None
        if ppc is not None or ppd is not None:
            towards = to_target(first.own_similarity, self.target)
            pull = pull_of(factors, self.target, towards, step.contrast_temperature)
        second = head_second_pass(second_call(step, first, self.target, pull))
        small = [t.sum(0).flatten() for t in (second.grad_affine, first.grad_scale, first.grad_norm)]
        grads = torch.cat(small)
        factor = size / unit
        assert first.grad is not None
        return scale_saved(first.grad, factor), grads * factor


class Made(torch.autograd.Function):
    """A loss whose gradients exist already, in a graph of torch.compile.

    ``apply(weights, values, unit, to_x, grads, *inputs)`` with the values [4] of loss, cross_entropy, ppc and ppd, and the
    gradients of `unit` times the loss: of the first input, and of the others [2D+1+2C]. A graph would make the gradients of the
    parts in every step, used or not, so none are made; `_of_loss_alone` sees to it that none are used.
    """

    @staticmethod
    def forward(
        ctx: Any,
        weights: tuple[float, float],
        values: Tensor,
        unit: Tensor,
        to_x: Tensor,
        grads: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.is_cross_entropy, ctx.sizes = not any(weights), sizes_of(inputs)
        ctx.save_for_backward(unit, to_x, grads)
        return tuple(value.clone() for value in values.unbind())

    @staticmethod
    def backward(ctx: Any, loss: Tensor, *parts: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_cross_entropy:
            loss, parts = loss + parts[0], parts[1:]
        alone = _of_loss_alone(loss, torch.stack(parts))
        return *(None,) * 5, *_scaled(ctx, alone)


def _of_loss_alone(loss: Tensor, parts: Tensor) -> Tensor:
    """The incoming gradient of the loss []; where one of the parts' is not 0 an error, or NaN where asking would wait."""
    if loss.device.type == "cpu":
        return _checked(loss, parts)
    return torch.where((parts != 0).any(), torch.nan, loss)


@torch.library.custom_op(f"{NAMESPACE}::gradient_of_loss_alone", mutates_args=())
def _checked(loss: Tensor, parts: Tensor) -> Tensor:
    if parts.any():
        raise RuntimeError(
            'DNCHead.loss: under torch.compile cross_entropy, ppc and ppd have no gradients; use DNCHead(checkpoint="none"), '
            "or set ppc_weight and ppd_weight in the constructor and go backward through loss alone"
        )
    return loss.clone()


@_checked.register_fake
def _(loss: Tensor, parts: Tensor) -> Tensor:
    return torch.empty_like(loss)


class MadeInParts(torch.autograd.Function):
    """`Made`, and the parts of the loss, whose gradients are made again in backward where one is asked for.

    ``apply(again, weights, values, unit, to_x, grads, *inputs)`` with the weights of PPC and PPD in the loss (one of weight 0
    has no gradient), the four values as a tuple, which are the results themselves, and `again` None where both are 0: then the
    loss is its cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        again: Again | None,
        weights: tuple[float, float],
        values: tuple[Tensor, ...],
        unit: Tensor,
        to_x: Tensor,
        grads: Tensor,
        *inputs: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.weights, ctx.sizes = again, weights, sizes_of(inputs)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(unit, to_x, grads)
        ctx.mark_non_differentiable(*(t for t, weight in zip(values[2:], weights, strict=True) if not weight))
        return values

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        again: Again | None = ctx.again
        made: tuple[Tensor | None, ...]
        if again is None or all(g is None for g in parts):
            made = _scaled(ctx, _sum(loss, parts[0]))
        else:
            shares = (None if loss is None or not w else w * loss for w in (1, *ctx.weights))
            made = taken(ctx, *again.gradients(*(_sum(a, b) for a, b in zip(shares, parts, strict=True))))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.again = None  # what it holds goes with the saved tensors
        return *(None,) * 6, *made


def _refuse_second_derivatives() -> None:
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(
            "DNCHead.loss made its gradient in the forward pass, which has no derivative of its own: call backward without "
            'create_graph=True, or for second derivatives use DNCHead(checkpoint="none") inside '
            '`with dnc_kernels.use_backend("reference")`'
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def sizes_of(inputs: tuple[Tensor | None, ...]) -> list[torch.Size | None]:
    """Of the inputs behind the features: their gradients lie one behind the other."""
    return [None if t is None else t.shape for t in inputs[1:]]


def taken(ctx: Any, to_x: Tensor | None, grads: Tensor) -> tuple[Tensor | None, ...]:
    """The gradients of the inputs, those needed, apart. grads: of a norm over classes, or of a scale, or of neither."""
    wants_x, *wanted = ctx.needs_input_grad[-1 - len(ctx.sizes) :]
    channels = ctx.sizes[0].numel()
    classes = (len(grads) - 2 * channels - 1) // 2
    places = (0, channels, 2 * channels, 2 * channels + 1, 2 * channels + 1 + classes)
    taken: list[Tensor | None] = [to_x if wants_x else None]
    for i, (size, want) in enumerate(zip(ctx.sizes, wanted, strict=True)):
        taken.append(grads.narrow(0, places[i], size.numel()).view(size) if want and size is not None else None)
    return tuple(taken)


def _scaled(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that were made, times the incoming one."""
    unit, to_x, grads = ctx.saved_tensors
    if grad is None:
        return (None,) * (1 + len(ctx.sizes))
    grad = grad / unit
    return taken(ctx, scale_saved(to_x, grad) if ctx.needs_input_grad[-1 - len(ctx.sizes)] else None, grads * grad)
