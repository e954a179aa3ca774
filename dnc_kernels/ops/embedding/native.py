"""The C++ embedding kernel as torch ops, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...backends import native
from .._common import NAMESPACE, compute_dtype, keep_dtypes_under_autocast, view


@torch.library.custom_op(f"{NAMESPACE}::normalize_embedding", mutates_args=(), device_types="cpu")
def normalize_embedding(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Embedding in the shape, dtype and memory format of x; mean, rstd and inverse_norm [N] (csrc/cpu/embedding.cpp)."""
    outputs = _outputs(x)
    normalize_into(x, weight, bias, eps, *outputs)
    return outputs


def normalize_into(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    y: Tensor,
    mean: Tensor,
    rstd: Tensor,
    inverse_norm: Tensor,
) -> None:
    """The same into given tensors: `y` of any strides, statistics [N] contiguous. No autograd."""
    outputs = (view(t) for t in (y, mean, rstd, inverse_norm))
    native().normalize_embedding(view(x), view(weight), view(bias), eps, *outputs, torch.get_num_threads())


@normalize_embedding.register_fake
def _(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _outputs(x)


def _outputs(x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    pixels = x.shape[0] if x.ndim == 2 else x.shape[0] * x.shape[2] * x.shape[3]
    mean, rstd, inverse_norm = (x.new_empty(pixels, dtype=compute_dtype(x)) for _ in range(3))
    return torch.empty_like(x), mean, rstd, inverse_norm


@torch.library.custom_op(f"{NAMESPACE}::normalize_embedding_backward", mutates_args=(), device_types="cpu")
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
) -> tuple[Tensor, Tensor, Tensor]:
    """grad_x like x, grad_weight and grad_bias [D]; one that is not needed has no elements (csrc/cpu/embedding.cpp)."""
    grads = _gradients(x, need_x, need_weight, need_bias)
    wanted = (view(g if need else None) for g, need in zip(grads, (need_x, need_weight, need_bias), strict=True))
    native().normalize_embedding_backward(
        view(x),
        view(weight),
        view(bias),
        view(mean),
        view(rstd),
        view(inverse_norm),
        view(grad_y),
        view(None if grad_rstd is None else grad_rstd.contiguous()),
        *wanted,
        torch.get_num_threads(),
    )
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
    x, weight, bias, _ = inputs
    _, mean, rstd, inverse_norm = output
    ctx.mark_non_differentiable(mean, inverse_norm)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, inverse_norm)


def _backward(
    ctx: Any, grad_y: Tensor | None, _mean: Any, grad_rstd: Tensor | None, _inverse_norm: Any
) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
    if grad_y is None and grad_rstd is None:
        return None, None, None, None
    if grad_y is None:  # the length alone was used
        x = ctx.saved_tensors[0]
        grad_y = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    need = ctx.needs_input_grad[:3]
    grads = normalize_embedding_backward(*ctx.saved_tensors, grad_y, grad_rstd, *need)
    grad_x, grad_weight, grad_bias = (g if n else None for g, n in zip(grads, need, strict=True))
    return grad_x, grad_weight, grad_bias, None


def gradient_in_place_(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    inverse_norm: Tensor,
    grad_rstd: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Turn the gradient of the embedding into that of x, in place; return grad_weight and grad_bias [D]. No autograd."""
    grad_weight, grad_bias = (x.new_empty(x.shape[1], dtype=compute_dtype(x)) for _ in range(2))
    native().normalize_embedding_backward(
        view(x), view(weight), view(bias), view(mean), view(rstd), view(inverse_norm), view(grad), view(grad_rstd), view(grad),
        view(grad_weight), view(grad_bias), torch.get_num_threads(),
    )  # fmt: skip
    return grad_weight, grad_bias


normalize_embedding.register_autograd(_backward, setup_context=_save)

for _op in (normalize_embedding, normalize_embedding_backward):
    keep_dtypes_under_autocast(_op)
