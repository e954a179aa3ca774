"""Sub-centroids put where spherical k-means on all the data puts them, in passes over batches."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import _starts, _sync
from ._batches import Batches
from ._kmeans import Reservoir, Totals, fitted, totals_of

if TYPE_CHECKING:
    from .subcentroids import SubCentroids


class Refit(NamedTuple):
    """What `SubCentroids.refit_` did.

    counts [C,K] int64: samples whose nearest own sub-centroid each is now. before, after: mean cosine of the samples to their
    nearest own sub-centroid, NaN without a sample. iterations: k-means steps over all samples.
    """

    counts: Tensor
    iterations: int
    before: float
    after: float


@torch.no_grad()
def refitted_(head: SubCentroids, batches: Batches, iterations: int, tolerance: float, start: str, restarts: int) -> Refit:
    """Does `SubCentroids.refit_`."""
    peers, p = head.peers, F.normalize(head.prototypes, dim=2)
    totals, reservoir = Totals.zeros(p), Reservoir(p)
    for e, group in batches:
        totals.add_(e, group, p)
        reservoir.add(e, group)
    totals = totals.over_ranks(peers)
    before = after = totals.mean_cosine(p)
    source = [reservoir.held()] if reservoir.complete() else batches  # what fits need not be computed again
    rows, classes = reservoir.held_by_all(peers)
    if start == "data":
        p = fitted(rows, classes, p, refinements=10, restarts=restarts, generator=head.generator, peers=peers)
        totals = totals_of(source, p, peers)
        after = totals.mean_cosine(p)
    done = 0
    while done < iterations:
        centres, refilled = totals.centres(p), False
        empty = (totals.counts == 0) & totals.counts.any(1, keepdim=True)
        if empty.any():
            spread, _ = _starts.spread(rows, classes, centres, ~empty, head.generator)
            if _sync.ranks(peers) > 1:
                spread = spread.contiguous()
                _sync.take_from_first_rank_(peers, spread)
            centres, refilled = spread, not torch.equal(spread, centres)
        p, totals, last = centres, totals_of(source, centres, peers), after
        done, after = done + 1, totals.mean_cosine(p)
        if not (refilled or after - last >= tolerance):
            break
    head.prototypes.copy_(p)
    return Refit(totals.counts, done, before, after)
