"""Plain torch: what the embedding kernel must equal. Any float dtype, any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from ..._tensors import compute_dtype
from .calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut

SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's bound


def normalize_embedding(call: NormalizeCall) -> NormalizeOut:
    """l2_normalize(LayerNorm(x)) over the channels, and its statistics."""
    x, weight, bias, eps, _ = call
    wide = x.to(compute_dtype(x))
    mean = wide.mean(1, keepdim=True)
    centered = wide - mean
    rstd = torch.rsqrt(centered.square().mean(1, keepdim=True) + eps)
    z = _affine(centered * rstd, weight, bias)
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    # 0 for z = 0: that pixel's embedding and gradient are 0, not 1e12 times the incoming one
    inverse_norm = torch.where(length == 0, 0.0, 1 / length.clamp_min(SMALLEST_NORM))
    y = torch.empty_like(x).copy_(z * inverse_norm)
    return NormalizeOut(y, mean.reshape(-1), rstd.reshape(-1), inverse_norm.reshape(-1))


def normalize_embedding_backward(call: NormalizeBackwardCall, out: NormalizeBackwardOut) -> None:
    """What the launchers of that name do. No autograd."""
    x, weight, bias = call.x, call.weight, call.bias
    along_pixels = (-1, 1) if x.ndim == 2 else (x.shape[0], 1, x.shape[2], x.shape[3])
    mean, rstd, inverse_norm = (t.view(along_pixels) for t in (call.mean, call.rstd, call.inverse_norm))
    g = call.grad_y.to(compute_dtype(x))
    xhat = (x.to(g.dtype) - mean) * rstd
    y = _affine(xhat, weight, bias) * inverse_norm
    # below the bound the length is a constant, and nothing is projected out
    along = torch.where(inverse_norm < 1 / SMALLEST_NORM, (g * y).sum(1, keepdim=True), 0)
    dz = inverse_norm * (g - along * y)
    over_pixels = 0 if x.ndim == 2 else (0, 2, 3)
    if out.grad_weight is not None:
        out.grad_weight.copy_((dz * xhat).sum(over_pixels))
    if out.grad_bias is not None:
        out.grad_bias.copy_(dz.sum(over_pixels))
    if out.grad_x is None:
        return
    dz = _affine(dz, weight, None)
    slope = (dz * xhat).mean(1, keepdim=True)
    if call.grad_rstd is not None:  # d rstd / dx = -rstd^2 * xhat / D
        slope = slope + call.grad_rstd.view(along_pixels) * rstd / x.shape[1]
    out.grad_x.copy_(rstd * (dz - dz.mean(1, keepdim=True) - xhat * slope))


def _affine(t: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    along_channels = (1, -1) if t.ndim == 2 else (1, -1, 1, 1)
    t = t if weight is None else t * weight.view(along_channels)
    return t if bias is None else t + bias.view(along_channels)
