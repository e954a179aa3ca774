"""How evenly the sub-centroids of a class share its samples, and which of them are dead."""

from __future__ import annotations

import math

import torch
from torch import Tensor


class DeadSubCentroidsWarning(UserWarning):
    """More than half of the sub-centroids win almost nothing of their class."""


def dead_below(k: int) -> float:
    """The share of its class's samples below which one of K sub-centroids is dead: 1%, or above K = 10 a tenth of 1/K."""
    return min(0.01, 0.1 / k)


def shares(wins: Tensor) -> Tensor:
    """Share of the samples of its class that each sub-centroid wins, of counts [C,K]; NaN where a class has none."""
    wins = wins.to(torch.promote_types(wins.dtype, torch.float32))
    return wins / wins.sum(1, keepdim=True)


def usage(share: Tensor) -> Tensor:
    """[C]: entropy of shares [C,K] over log K: 1 even, 0 one does it all; 1 at K = 1, NaN without samples."""
    k = share.shape[1]
    return share.sum(1) if k == 1 else torch.special.entr(share).sum(1) / math.log(k)


def mean_pairwise(directions: Tensor, counted: Tensor | None = None) -> Tensor:
    """[C]: mean cosine between two of a class's unit vectors [C,K,D]; NaN where there are no two.

    Args:
        directions: unit vectors.
        counted: [C,K] bool, which of them; None: all.
    """
    if counted is None:
        counted = torch.ones(directions.shape[:2], dtype=torch.bool, device=directions.device)
    rows = torch.where(counted[..., None], directions, 0)
    n = counted.sum(1)
    # the length of the sum holds every pair twice, and each with itself
    pairs = rows.sum(1).square().sum(1) - rows.square().sum((1, 2))
    return torch.where(n > 1, pairs / (n * (n - 1)).clamp(min=1), torch.nan)
