"""Spherical k-means within each class, of samples that come batch by batch: what the passes over them add up, and a bounded
draw of each class for k-means++.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Generator, Tensor

from .. import ops
from . import _starts, _sync
from ._sync import Peers

#: Elements of a reservoir, at most, unless 4 K samples of each class are more: 64 MB in float32.
RESERVOIR = 2**24


class Totals(NamedTuple):
    """What each sub-centroid wins of its class, over a pass.

    sums [C,K,D] float64 and counts [C,K] int64: of the unit samples that it is the nearest own sub-centroid of.
    """

    sums: Tensor
    counts: Tensor

    @classmethod
    def zeros(cls, centroids: Tensor) -> Totals:
        """Of no sample."""
        counts = torch.zeros(centroids.shape[:2], dtype=torch.int64, device=centroids.device)
        return cls(torch.zeros_like(centroids, dtype=torch.float64), counts)

    def add_(self, e: Tensor, group: Tensor, centroids: Tensor) -> Tensor:
        """Add a batch e [n,D] of classes group [n], in place; returns its own similarities [n,K]."""
        own = _starts.own_similarity(e, centroids, group)
        rows, k = self.counts.numel(), self.counts.shape[1]
        cluster = torch.where(group >= 0, group * k + own.argmax(1), -1)
        if len(group) >= rows:
            won = ops.cluster_sums(e, cluster, rows)
            self.sums.add_(won.sums.view_as(self.sums))
            self.counts.add_(won.counts.view_as(self.counts))
        elif len(group):  # without a tensor of [C,K,D] for a batch that meets few of them
            met, which = cluster.unique(return_inverse=True)
            won, real = ops.cluster_sums(e, which, len(met)), met >= 0
            self.sums.flatten(0, 1).index_add_(0, met[real], won.sums[real].double())
            self.counts.flatten().index_add_(0, met[real], won.counts[real])
        return own

    def over_ranks(self, peers: Peers) -> Totals:
        """Those of all ranks; all call it together."""
        return Totals(*_sync.sum_over_ranks(peers, *self)) if _sync.ranks(peers) > 1 else self

    def cosine(self, centroids: Tensor) -> Tensor:
        """[C]: sum of the cosines of the samples to the sub-centroids [C,K,D] that they were added for."""
        return (self.sums * centroids).sum((1, 2))

    def mean_cosine(self, centroids: Tensor) -> float:
        """Over all samples; NaN without one. A host sync."""
        return float(self.cosine(centroids).sum() / self.counts.sum())

    def centres(self, otherwise: Tensor) -> Tensor:
        """[C,K,D]: directions of the sums, the best centres of these clusters; `otherwise` where there is none."""
        length = self.sums.norm(dim=2, keepdim=True)
        return torch.where(length > 0, self.sums / length, otherwise.double()).to(otherwise.dtype)


def totals_of(source: Iterable[tuple[Tensor, Tensor]], centroids: Tensor, peers: Peers) -> Totals:
    """One pass: `Totals` of all batches ``(e, group)`` of all ranks."""
    totals = Totals.zeros(centroids)
    for e, group in source:
        totals.add_(e, group, centroids)
    return totals.over_ranks(peers)


class Reservoir:
    """An even draw of each class, of samples that come one after the other (Vitter's algorithm R), in bounded memory.

    The draw has a seed of its own: nothing else of a program changes by it. As long as a class has no more samples than the
    `size` slots of it, they are all there, in order.

    Args:
        like: sub-centroids [C,K,D]: sizes, dtype and device.
    """

    def __init__(self, like: Tensor) -> None:
        classes, k, channels = like.shape
        self.classes, self.size = classes, max(4 * k, RESERVOIR // (classes * channels))
        self.rows = like.new_empty(classes * self.size, channels)
        self.seen = torch.zeros(classes, dtype=torch.int64, device=like.device)
        self._generator = Generator().manual_seed(0)

    def add(self, e: Tensor, group: Tensor) -> None:
        """Offer rows e [n,D] of classes group [n] (negative: left out). One host sync."""
        if len(group) == 0:
            return
        classes, slots = self.classes, self.classes * self.size
        index = torch.where(group >= 0, group, classes)
        counts = torch.zeros(classes + 1, dtype=torch.int64, device=e.device).index_add_(0, index, torch.ones_like(index))
        order = index.argsort(stable=True)
        index = index[order]
        seen = torch.cat([self.seen, self.seen.new_zeros(1)])
        number = (seen - (counts.cumsum(0) - counts))[index] + torch.arange(len(order), device=e.device)  # in its class
        # drawn in the order of coming, so that the sizes of the batches do not matter
        drawn = _starts.uniform((len(order),), e.device, self._generator)[order].double() * (number + 1)
        slot = torch.where(number < self.size, number, drawn.to(torch.int64))
        slot = torch.where((index < classes) & (slot < self.size), index * self.size + slot, slots)
        slot, by_slot = slot.sort(stable=True)
        last = torch.cat([slot[1:] != slot[:-1], slot.new_ones(1, dtype=torch.bool)])  # of two on one slot the later stays
        (stays,) = (last & (slot < slots)).nonzero(as_tuple=True)
        self.rows[slot[stays]] = e[order[by_slot[stays]]].to(self.rows.dtype)
        self.seen.add_(counts[:classes])

    def complete(self) -> bool:
        """Whether it holds every sample offered. A host sync."""
        return bool((self.seen <= self.size).all())

    def held(self) -> tuple[Tensor, Tensor]:
        """Rows [n,D] and their classes [n], by class."""
        return self._filled(self.rows, self.seen.clamp(max=self.size))

    def held_by_all(self, peers: Peers) -> tuple[Tensor, Tensor]:
        """An even draw of the samples of all ranks, of the same size, the same on each; all call it together.

        Each rank gives slots in proportion to what it has seen; where all fits, the order is that of the ranks.
        """
        if (world := _sync.ranks(peers)) == 1:
            return self.held()
        rank = dist.get_rank(peers.group)
        mine = self.seen.new_zeros(world, self.classes)
        mine[rank] = self.seen
        (seen,) = _sync.sum_over_ranks(peers, mine)
        upto, total = seen.cumsum(0), seen.sum(0)
        ends = torch.where(total > self.size, upto * self.size // total.clamp(min=1), upto)
        first = ends[rank - 1] if rank else torch.zeros_like(total)
        # slot s of a class here goes to slot first + s there, of as many as some class fills
        most = int(total.amax().clamp(max=self.size))
        slots = torch.arange(self.size, device=self.seen.device)
        taken = slots < (ends[rank] - first)[:, None]  # [C,size]
        target = torch.arange(self.classes, device=slots.device)[:, None] * most + first[:, None] + slots
        rows = self.rows.new_zeros(self.classes * most, self.rows.shape[1])
        rows[target[taken]] = self.rows[taken.flatten()]
        (rows,) = _sync.sum_over_ranks(peers, rows)
        return self._filled(rows, total.clamp(max=self.size))

    def _filled(self, rows: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
        filled = torch.arange(len(rows) // self.classes, device=counts.device) < counts[:, None]
        return rows[filled.flatten()], filled.nonzero()[:, 0]


def fitted(
    rows: Tensor,
    group: Tensor,
    otherwise: Tensor,
    *,
    refinements: int,
    restarts: int,
    generator: Generator | None,
    peers: Peers,
) -> Tensor:
    """[C,K,D]: centres of k-means on rows [n,D] of classes group [n]; of `restarts` runs each class takes its best, by cosine.

    `otherwise` [C,K,D] where a class has too few distinct rows. With several ranks, those of the first.
    """
    best, score = otherwise, otherwise.new_full((len(otherwise),), -torch.inf)
    for _ in range(restarts):
        centres, _ = _starts.data_start(rows, group, otherwise, refinements=refinements, generator=generator)
        nearest = _starts.own_similarity(rows, centres, group).amax(1)
        total = ops.cluster_sums(nearest[:, None], group, len(centres)).sums[:, 0].to(score.dtype)
        best = torch.where((total > score)[:, None, None], centres, best)
        score = torch.maximum(score, total)
    if _sync.ranks(peers) > 1:
        best = best.contiguous()
        _sync.take_from_first_rank_(peers, best)
    return best
