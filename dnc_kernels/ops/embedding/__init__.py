"""The embedding of a pixel, l2_normalize(LayerNorm(x)), in one pass (family page: docs/embedding.md)."""

from __future__ import annotations

import math
from typing import Literal, overload

from torch import Tensor

from ..._tensors import check_pixels, compute_dtype, like_pixels
from ...backends import Backend, pick
from ...errors import check_device, check_float, check_number, check_value
from .._common import contiguous_in, remembered
from . import op as ops
from .calls import NormalizeCall


@overload
def normalize_embedding(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, eps: float = ...,
    return_length: Literal[False] = ..., backend: Backend | None = ...,
) -> Tensor: ...  # fmt: skip
@overload
def normalize_embedding(
    x: Tensor, weight: Tensor | None = ..., bias: Tensor | None = ..., *, eps: float = ..., return_length: Literal[True],
    backend: Backend | None = ...,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
def normalize_embedding(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    return_length: bool = False,
    backend: Backend | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Unit-length LayerNorm of every pixel: ``z = (x - mean) / sqrt(var + eps) * weight + bias; y = z / max(|z|, 1e-12)``.

    Equals ``F.normalize(F.layer_norm(x, [D], weight, bias, eps))`` over the channels; the variance is the biased one. A pixel
    with ``z = 0`` has embedding 0 and gradient 0. A pixel with a NaN or Inf feature is NaN in all its channels; the others are
    unaffected.

    Args:
        x: features [N,D] or [B,D,H,W], any strides, read in place; float32, float64, float16 or bfloat16.
        weight: [D], any of these dtypes; None: 1.
        bias: [D], any of these dtypes; None: 0.
        eps: added to the variance; finite, not negative.
        return_length: also return ``sqrt(var + eps)``, what LayerNorm divides the pixel by: how long its centred feature was.
        backend: what runs (docs/backends.md); None: the choice in force, by default ``auto``.

    Returns:
        The embedding in the shape, dtype and memory format of `x`, computed in float64 for float64 `x`, else in float32; with
        `return_length` a pair of it and the lengths [N] or [B,H,W] in that compute dtype, from the same pass. Differentiable
        in `x`, `weight` and `bias`, any number of times. Deterministic, bit-equal for any number of
        threads. Never synchronises. Keeps 3 numbers per pixel for the backward pass, and no copy of `x`.

    Raises:
        ValueError, TypeError: wrong shape, device, dtype or eps.
    """
    _check(x, weight, bias, eps)
    dtype = compute_dtype(x)
    call = NormalizeCall(
        x, contiguous_in(dtype, weight), contiguous_in(dtype, bias), float(eps), pick("normalize_embedding", x, backend)
    )
    y, _, rstd, _ = ops.normalize_embedding(call)
    return (y, like_pixels(x, rstd.reciprocal())) if return_length else y


@remembered
def _check(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> None:
    op = "normalize_embedding"
    check_pixels(op, x)
    check_number(op, "eps", eps, "finite and not negative", lambda v: 0 <= v < math.inf)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            check_float(op, name, vector)
            fits = vector.ndim == 1 and vector.shape[0] == x.shape[1]
            check_value(fits, op, name, lambda: f"[D]=[{x.shape[1]}] to match x", vector)
            check_device(op, name, vector, x)


__all__ = ["normalize_embedding"]
