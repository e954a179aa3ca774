"""Whether sub-centroids are alive: how the samples of a class share them, and what k-means does with the same features."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from .. import ops
from ..errors import check_value
from . import _sync
from ._batches import Batches
from ._kmeans import Reservoir, Totals, fitted, totals_of
from ._usage import dead_below, mean_pairwise, shares, usage

if TYPE_CHECKING:
    from .subcentroids import SubCentroids

#: Classes that a printed table shows, at most: those of the lowest usage.
SHOWN = 12


@dataclass(frozen=True, eq=False)
class Diagnosis:
    """What the samples of each class make of its sub-centroids: tensors [C] on the CPU, float64, NaN where a class has none.

    ``print(diagnosis)`` shows a table and a verdict. A sample's *win* goes to its nearest own sub-centroid.

    Attributes:
        counts: [C] int64, samples.
        share: [C,K], of the class's wins.
        usage: entropy of the shares over log K: 1 even, 0 one sub-centroid does it all. 1 at K = 1.
        dead: share of the sub-centroids with less than 1% of the wins (above K = 10: less than a tenth of an even share).
        win: mean cosine of the samples to their nearest own sub-centroid.
        to_mean: mean cosine of the samples to their mean direction: what one centre reaches.
        win_kmeans: mean cosine of the samples to the nearest of K centres that k-means finds in them: what K centres reach.
        intra: mean cosine between two of the class's sub-centroids; NaN at K = 1.
        intra_kmeans: the same of the k-means centres: what the features set. An `intra` below it is no merit.
        to_start: mean cosine of the sub-centroids to where training started; NaN where that is not known.
        marginal_error: how far the column sums of the transport plan that training clusters by are from even, after the
            head's number of iterations: half the sum of the absolute differences, in [0,1]; over the batches, weighted by
            their samples of the class. Batches with one sample of a class are left out.
        overall: of all classes: `win`, `to_mean`, `win_kmeans` and `marginal_error` as means over samples, `usage`, `intra`,
            `intra_kmeans` and `to_start` as means over the classes with samples, `dead` as a share of the sub-centroids of
            these.
    """

    counts: Tensor
    share: Tensor
    usage: Tensor
    dead: Tensor
    win: Tensor
    to_mean: Tensor
    win_kmeans: Tensor
    intra: Tensor
    intra_kmeans: Tensor
    to_start: Tensor
    marginal_error: Tensor
    overall: dict[str, float]

    def as_dict(self) -> dict[str, Any]:
        """Plain numbers and lists for JSON; None for NaN."""
        return {field.name: _plain(getattr(self, field.name)) for field in fields(self)}

    @property
    def verdict(self) -> str:
        """One line: how many are dead, how even the rest are, and what k-means would do better."""
        used, k = int((self.counts > 0).sum()), self.share.shape[1]
        if used == 0:
            return "no labelled sample: nothing is known"
        overall = self.overall
        dead, total = round(overall["dead"] * used * k), used * k
        text = f"dead: {dead} of {total}; usage {overall['usage']:.2f} of 1"
        gap = overall["win_kmeans"] - overall["win"]
        if overall["dead"] > 0.5:
            text += f": K = {k} does little more than K = 1"
        if gap > 0.05:
            text += f"; k-means on the same features wins {gap:.2f} more cosine (refit_)"
        return text

    def __str__(self) -> str:
        columns = ("usage", "dead", "win", "to_mean", "win_kmeans", "intra", "intra_kmeans", "to_start", "marginal_error")
        lines = ["class  samples " + " ".join(f"{name:>{max(6, len(name))}}" for name in columns)]

        def line(name: str, count: int, values: list[float]) -> str:
            cells = ("-" if math.isnan(v) else f"{v:.2f}" for v in values)
            return f"{name:>5} {count:>8} " + " ".join(
                f"{cell:>{max(6, len(column))}}" for cell, column in zip(cells, columns, strict=True)
            )

        order = self.usage.nan_to_num(nan=2.0).argsort(stable=True)
        for c in order[:SHOWN].sort().values.tolist():
            lines.append(line(str(c), int(self.counts[c]), [float(getattr(self, name)[c]) for name in columns]))
        if len(order) > SHOWN:
            lines.append(f"  ... {len(order) - SHOWN} classes of higher usage")
        lines.append(line("all", int(self.counts.sum()), [self.overall[name] for name in columns]))
        return "\n".join([*lines, self.verdict])


@torch.no_grad()
def diagnosed(head: SubCentroids, batches: Batches, start: Tensor | None) -> Diagnosis:
    """Does `SubCentroids.diagnose`."""
    p = F.normalize(head.prototypes, dim=2)
    classes, k, _ = p.shape
    totals, reservoir = Totals.zeros(p), Reservoir(p)
    unevenness, clustered = (torch.zeros(classes, dtype=torch.float64, device=p.device) for _ in range(2))
    for e, group in batches:
        own = totals.add_(e, group, p)
        reservoir.add(e, group)
        plan = ops.sinkhorn_plan(own, group, classes, epsilon=head.epsilon, iterations=head.iterations)
        mass, n = ops.cluster_sums(plan, group, classes)
        error = (mass / n[:, None] - 1 / k).abs().sum(1) / 2
        unevenness.add_(torch.where(n > 1, n * error, 0))
        clustered.add_(torch.where(n > 1, n, 0))
    totals = totals.over_ranks(head.peers)
    if _sync.ranks(head.peers) > 1:
        unevenness, clustered = _sync.sum_over_ranks(head.peers, unevenness, clustered)
    rows, group = reservoir.held_by_all(head.peers)
    # draws of its own: training goes on as it would have
    seeded = Generator().manual_seed(0)
    centres = fitted(rows, group, p, refinements=15, restarts=1, generator=seeded, peers=head.peers)
    best = totals_of([(rows, group)], centres, _sync.Peers("none"))

    share = shares(totals.counts.double())
    counts, seen = totals.counts.sum(1), totals.counts.any(1)
    nothing = torch.full((classes,), torch.nan, dtype=torch.float64, device=p.device)
    values = {
        "usage": usage(share),
        "dead": torch.where(seen, (share < dead_below(k)).double().mean(1), torch.nan),
        "win": totals.cosine(p) / counts,
        "to_mean": totals.sums.sum(1).norm(dim=1) / counts,
        "win_kmeans": best.cosine(centres) / best.counts.sum(1),
        "intra": mean_pairwise(p.double()),
        "intra_kmeans": mean_pairwise(centres.double(), best.counts > 0),
        "to_start": nothing if start is None else (p * F.normalize(start.to(p), dim=2)).sum(2).mean(1).double(),
        "marginal_error": unevenness / clustered,
    }
    values = {name: torch.where(seen, value, torch.nan).cpu() for name, value in values.items()}
    counts = counts.cpu()
    by_sample = {"win": counts, "to_mean": counts, "win_kmeans": counts, "marginal_error": clustered.cpu()}
    overall = {name: _mean(value, by_sample.get(name)) for name, value in values.items()}
    return Diagnosis(counts=counts, share=share.cpu(), **values, overall=overall)


def check_start(op: str, start: Tensor | None, like: Tensor) -> None:
    """Check that the start is [C,K,D] as the sub-centroids are."""
    check_value(start is None or start.shape == like.shape, op, "start", f"[C,K,D]={list(like.shape)}", start)


def _mean(values: Tensor, weight: Tensor | None) -> float:
    """Over the classes where there is a value; NaN where there is none."""
    known = ~values.isnan()
    if weight is None:
        return float(values[known].mean())
    return float((values * weight)[known].sum() / weight[known].sum())


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(v) for name, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and math.isnan(value) else value
