"""The embedding as torch ops, forward and backward, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, kernels, pixel_count


@torch.library.custom_op(f"{NAMESPACE}::normalize_embedding", mutates_args=())
def normalize_embedding(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embedding in the shape, dtype and memory format of x; mean, rstd and inverse_norm [N]."""
    outputs = _outputs(x)
    kernels("embedding", backend).normalize(x, weight, bias, eps, *outputs)
    return outputs


@normalize_embedding.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, backend: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    mean, rstd, inverse_norm = (x.new_empty(pixel_count(x), dtype=compute_dtype(x)) for _ in range(3))
    return torch.empty_like(x), mean, rstd, inverse_norm


@torch.library.custom_op(f"{NAMESPACE}::normalize_embedding_backward", mutates_args=())
def normalize_embedding_backward(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    inverse_norm: Tensor,
    grad_y: Tensor,
    grad_rstd: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x like x, grad_weight and grad_bias [D]; one that is not needed has no elements."""
    grads = _gradients(x, need_x, need_weight, need_bias)
    wanted = (g if need else None for g, need in zip(grads, (need_x, need_weight, need_bias), strict=True))
    grad_rstd = None if grad_rstd is None else grad_rstd.contiguous()
    kernels("embedding", backend).normalize_backward(x, weight, bias, mean, rstd, inverse_norm, grad_y, grad_rstd, *wanted)
    return grads


@normalize_embedding_backward.register_fake
def _(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    inverse_norm: Tensor,
    grad_y: Tensor,
    grad_rstd: Tensor | None,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    return _gradients(x, need_x, need_weight, need_bias)


def _gradients(x: Tensor, need_x: bool, need_weight: bool, need_bias: bool) -> tuple[Tensor, Tensor, Tensor]:
    dtype = compute_dtype(x)
    return (
        torch.empty_like(x) if need_x else x.new_empty(0),
        x.new_empty(x.shape[1] if need_weight else 0, dtype=dtype),
        x.new_empty(x.shape[1] if need_bias else 0, dtype=dtype),
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, bias, _, ctx.backend = inputs
    _, mean, rstd, inverse_norm = output
    ctx.mark_non_differentiable(mean, inverse_norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, inverse_norm)


def _backward(
    ctx: Any, grad_y: Tensor | None, _mean: Any, grad_rstd: Tensor | None, _inverse_norm: Any
) -> tuple[Tensor | None, ...]:
    if grad_y is None and grad_rstd is None:
        return (None,) * 5
    if grad_y is None:  # the length alone was used
        x = ctx.saved_tensors[0]
        grad_y = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    need = ctx.needs_input_grad[:3]
    grads = normalize_embedding_backward(*ctx.saved_tensors, grad_y, grad_rstd, *need, ctx.backend)
    grad_x, grad_weight, grad_bias = (g if n else None for g, n in zip(grads, need, strict=True))
    return grad_x, grad_weight, grad_bias, None, None


normalize_embedding.register_autograd(_backward, setup_context=_save)

for _op in (normalize_embedding, normalize_embedding_backward):
    keep_dtypes_under_autocast(_op)
