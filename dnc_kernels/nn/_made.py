"""The gradients of a loss that `ops/head` makes in the forward pass, as autograd sees them; and those of its parts.

`loss` alone: backward multiplies what was made by the incoming gradient. A mixture with the parts of the loss: backward runs
both passes again, with the incoming gradients as the weights of the parts.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops._common import scale_saved
from ..ops._op import NAMESPACE
from ..ops.head.calls import FirstPass, Second, Step
from ..ops.head.op import first_pass, second_pass


class Factors(NamedTuple):
    """What the gradients of the sums of cross-entropy, contrast and distance are multiplied by, [] each; None: not made."""

    pull: Tensor
    contrast: Tensor | None
    distance: Tensor | None


def run_second(
    step: Step,
    factors: Factors,
    first: FirstPass,
    target: Tensor | None,
    towards: Tensor | None,
    moving: Tensor | None,
) -> tuple[tuple[Tensor | None, ...], Tensor, Tensor]:
    """`second_pass` after the first.

    Returns the gradients of x, weight, bias, scale, norm_weight and norm_bias, and sums and counts of `moving`.

    target [N]: ``c*K + k``, -1 for none; towards [N]: similarity to it.
    """
    pull = None
    if target is not None and towards is not None and (factors.contrast is not None or factors.distance is not None):
        pull = torch.zeros_like(towards)
        if factors.contrast is not None:
            pull -= factors.contrast / step.contrast_temperature
        if factors.distance is not None:
            pull -= 2 * factors.distance * (1 - towards)
        pull = torch.where(target >= 0, pull, 0)
    call = Second(
        x=step.x,
        weight=step.weight,
        bias=step.bias,
        eps=step.eps,
        centroids=step.centroids,
        statistics=first.statistics,
        grad=first.grad,
        grad_rstd=first.grad_rstd,
        embedding=first.embedding,
        target=target,
        pull=pull,
        cluster=moving,
        band_pixels=step.band_pixels,
        backend=step.backend,
    )
    made = second_pass(call)
    return (first.grad, *made.grad_affine, first.grad_scale, *first.grad_norm), made.sums, made.counts


def to_target(own: Tensor, target: Tensor) -> Tensor:
    """[N]: similarity to the target, of own similarities [N,K]; without meaning where there is none."""
    return own.gather(1, (target.clamp(min=0) % own.shape[1])[:, None])[:, 0]


class Again:
    """Makes the gradients of any mixture of the parts of a loss, by both passes again, in backward.

    Holds the features, the labels, the target of every pixel [N] and the sub-centroids of that step, until it is dropped.
    """

    def __init__(self, step: Step, target: Tensor, total_weight: Tensor, count: Tensor, unit: Tensor) -> None:
        # an update moves the sub-centroids before backward, and DistributedDataParallel writes to every buffer
        weight = None if step.class_weight is None else step.class_weight.clone()
        self.step = step._replace(centroids=step.centroids.clone(), class_weight=weight)
        self.target, self.total_weight, self.count, self.unit = target, total_weight, count, unit
        self.versions = self._versions()

    def _versions(self) -> dict[str, int]:
        named = self.step._asdict().items()
        return {name: t._version for name, t in named if isinstance(t, Tensor) and not t.is_inference()}

    def gradients(self, cross_entropy: Tensor | None, ppc: Tensor | None, ppd: Tensor | None) -> tuple[Tensor | None, ...]:
        """Gradients of the inputs of the step for incoming gradients [] of the means; None: of none."""
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

        def factor(gradient: Tensor | None, over: Tensor) -> Tensor | None:
            return None if gradient is None else gradient / size * self.unit / over

        pull = factor(cross_entropy, self.total_weight)
        factors = Factors(torch.zeros_like(size) if pull is None else pull, factor(ppc, self.count), factor(ppd, self.count))
        # the class of the pixels that have a target
        sampled = torch.div(self.target, self.step.centroids.shape[1], rounding_mode="floor")
        first = first_pass(self.step, sampled, factors.pull, factors.contrast, True, False)
        towards = to_target(first.own_similarity, self.target)
        made, _, _ = run_second(self.step, factors, first, self.target, towards, None)
        return tuple(None if g is None else scale_saved(g, size / self.unit) for g in made)


class Made(torch.autograd.Function):
    """A loss whose gradients exist already, in a graph of torch.compile.

    ``apply(weights, values, unit, *gradients, *inputs)`` with the values [4] of loss, cross_entropy, ppc and ppd: the gradients
    are those of `unit` times the loss, as many as there are inputs. A graph would make the gradients of the parts in every
    step, used or not, so none are made; `_of_loss_alone` sees to it that none are used.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: tuple[float, float], values: Tensor, unit: Tensor, *tensors: Tensor | None
    ) -> tuple[Tensor, ...]:
        ctx.count, ctx.is_cross_entropy = len(tensors) // 2, not any(weights)
        ctx.save_for_backward(unit, *tensors[: ctx.count])
        return tuple(value.clone() for value in values.unbind())

    @staticmethod
    def backward(ctx: Any, loss: Tensor, *parts: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.is_cross_entropy:
            loss, parts = loss + parts[0], parts[1:]
        alone = _of_loss_alone(loss, torch.stack(parts))
        return *(None,) * (3 + ctx.count), *_scaled(ctx, alone)


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

    ``apply(again, weights, loss, cross_entropy, ppc, ppd, unit, *gradients, *inputs)`` with the weights of PPC and PPD in the
    loss (a part of weight 0 has no gradient) and `again` None where both are 0: then the loss is its cross-entropy.
    """

    @staticmethod
    def forward(
        ctx: Any,
        again: Again | None,
        weights: tuple[float, float],
        loss: Tensor,
        cross_entropy: Tensor,
        ppc: Tensor,
        ppd: Tensor,
        unit: Tensor,
        *tensors: Tensor | None,
    ) -> tuple[Tensor, ...]:
        ctx.again, ctx.weights, ctx.count = again, weights, len(tensors) // 2
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(unit, *tensors[: ctx.count])
        outputs = loss.clone(), cross_entropy.clone(), ppc.clone(), ppd.clone()
        ctx.mark_non_differentiable(*(t for t, weight in zip(outputs[2:], weights, strict=True) if not weight))
        return outputs

    @staticmethod
    def backward(ctx: Any, loss: Tensor | None, *parts: Tensor | None) -> tuple[Tensor | None, ...]:
        _refuse_second_derivatives()
        again: Again | None = ctx.again
        made: tuple[Tensor | None, ...]
        if again is None or all(g is None for g in parts):
            made = _scaled(ctx, _sum(loss, parts[0]))
        else:
            shares = (None if loss is None or not w else w * loss for w in (1, *ctx.weights))
            made = _needed(ctx, again.gradients(*(_sum(a, b) for a, b in zip(shares, parts, strict=True))))
        if not torch._C._autograd._get_current_graph_task_keep_graph():
            ctx.again = None  # what it holds goes with the saved tensors
        return *(None,) * (7 + ctx.count), *made


def _refuse_second_derivatives() -> None:
    if not torch.compiler.is_compiling() and torch.is_grad_enabled():
        raise RuntimeError(
            "DNCHead.loss made its gradient in the forward pass, which has no derivative of its own: call backward without "
            'create_graph=True, or for second derivatives use DNCHead(checkpoint="none") inside '
            '`with dnc_kernels.use_backend("reference")`'
        )


def _sum(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a + b


def _needed(ctx: Any, made: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    return tuple(g if need else None for g, need in zip(made, ctx.needs_input_grad[-ctx.count :], strict=True))


def _scaled(ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
    """The gradients that were made, times the incoming one."""
    unit, *made = ctx.saved_tensors
    if grad is None:
        return (None,) * ctx.count
    grad = grad / unit
    return tuple(None if g is None else scale_saved(g, grad) for g in _needed(ctx, made))
