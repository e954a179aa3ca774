"""The embedding as torch ops, forward and backward, whatever kernel runs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..._tensors import compute_dtype, pixel_count
from .._op import Op, needed, save_call, saved_call
from . import reference
from .calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut


def _out(call: NormalizeCall) -> NormalizeOut:
    x, n, dtype = call.x, pixel_count(call.x), compute_dtype(call.x)
    mean, rstd, inverse_norm = x.new_empty(n, dtype=dtype), x.new_empty(n, dtype=dtype), x.new_empty(n, dtype=dtype)
    return NormalizeOut(torch.empty_like(x), mean, rstd, inverse_norm)


normalize_embedding = Op("embedding", "normalize_embedding", _out, reference.normalize_embedding)


def _backward_out(call: NormalizeBackwardCall, wanted: list[bool]) -> NormalizeBackwardOut:
    x, dtype = call.x, compute_dtype(call.x)
    return NormalizeBackwardOut(
        torch.empty_like(x) if wanted[0] else None,
        x.new_empty(x.shape[1], dtype=dtype) if wanted[1] else None,
        x.new_empty(x.shape[1], dtype=dtype) if wanted[2] else None,
    )


normalize_embedding_backward = Op("embedding", "normalize_embedding_backward", _backward_out)


def _save(ctx: Any, out: NormalizeOut, call: NormalizeCall) -> None:
    save_call(ctx, call, out.mean, out.rstd, out.inverse_norm)


def _backward(ctx: Any, grad_y: Tensor | None, grad_rstd: Tensor | None) -> NormalizeBackwardOut:
    (x, weight, bias, _, backend), (mean, rstd, inverse_norm) = saved_call(ctx)
    if grad_y is None:  # the length alone was used
        grad_y = torch.zeros((), dtype=x.dtype, device=x.device).expand(x.shape)
    if grad_rstd is not None:
        grad_rstd = grad_rstd.contiguous()
    call = NormalizeBackwardCall(x, weight, bias, mean, rstd, inverse_norm, grad_y, grad_rstd, backend)
    return normalize_embedding_backward(call, needed(ctx))


normalize_embedding.differentiable(("x", "weight", "bias"), ("y", "rstd"), _save, _backward)
