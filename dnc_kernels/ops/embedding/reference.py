"""Plain torch: what the embedding kernel must equal. Any float dtype, any device, differentiable."""

from __future__ import annotations

import torch
from torch import Tensor

from .._common import compute_dtype

SMALLEST_NORM = 1e-12  # torch.nn.functional.normalize's bound


def normalize_embedding(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> tuple[Tensor, Tensor]:
    """l2_normalize(LayerNorm(x)) over dimension 1 of x [N,D] or [B,D,H,W]; rstd [N]. weight, bias: [D], compute dtype."""
    along_channels = (1, -1) if x.ndim == 2 else (1, -1, 1, 1)
    wide = x.to(compute_dtype(x))
    centered = wide - wide.mean(1, keepdim=True)
    rstd = torch.rsqrt(centered.square().mean(1, keepdim=True) + eps)
    z = centered * rstd
    if weight is not None:
        z = z * weight.view(along_channels)
    if bias is not None:
        z = z + bias.view(along_channels)
    length = torch.linalg.vector_norm(z, dim=1, keepdim=True)
    # 0 for z = 0: that pixel's embedding and gradient are 0, not 1e12 times the incoming one
    y = z * torch.where(length == 0, 0.0, 1 / length.clamp_min(SMALLEST_NORM))
    return torch.empty_like(x).copy_(y), rstd.reshape(-1)
