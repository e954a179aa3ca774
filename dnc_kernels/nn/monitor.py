"""What training does to sub-centroids, update by update."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor

from ..errors import check_dtype, check_value, whole_number
from ._usage import dead_below, shares, usage

if TYPE_CHECKING:
    from .subcentroids import SubCentroids

#: Records that a monitor keeps, at most.
HISTORY = 10_000


class ScalarWriter(Protocol):
    """Such as ``torch.utils.tensorboard.SummaryWriter``."""

    def add_scalar(self, tag: str, value: float, step: int) -> Any:
        """Take a number of a step."""


class Monitor:
    """Watches the updates of a head's sub-centroids until it is closed: ``with Monitor(head, writer=writer): train()``.

    A record has `step` (updates done) and, of this rank's samples unless it says otherwise:

    - `dead`, `usage`: as in `Diagnosis`, by ``head.wins``: the last hundred or so updates of each class, of all ranks.
    - `win`: mean cosine of the labelled samples of the update to their nearest own sub-centroid.
    - `marginal_error`: half the sum of the absolute differences between the shares that clustering gave the sub-centroids of a
      class and even ones, in [0,1]; mean over the classes of the update, weighted by samples.
    - `drift`: mean of 1 - cosine between the sub-centroids before and after the update.
    - `to_start`: mean cosine of the sub-centroids to those of when the monitor came, or of the data start that came later.

    A number that is not known (similarities that `update_` was not given, a class without samples) is NaN, and not written.

    Args:
        head: a `SubCentroids`, `DNCHead` or `DNCClassifier`. A copy, pickle or state dict of it has no monitor.
        writer: gets ``add_scalar("dnc/dead", value, step)`` and so on.
        every: records every so many updates; each record is one host sync. In between an update costs a copy of the
            sub-centroids.
        log: gets ``log({"dnc/dead": value, ...}, step=step)``, as of ``wandb.log`` or ``mlflow.log_metrics``.

    Attributes:
        latest: the last record, {} before the first.
        history: the last 10,000, oldest first.
        start: [C,K,D], what `to_start` compares with.

    Under torch.compile a step that is watched is two graphs: ``fullgraph=True`` refuses it.
    """

    def __init__(
        self,
        head: SubCentroids,
        *,
        writer: ScalarWriter | None = None,
        every: int = 1,
        log: Callable[..., Any] | None = None,
    ) -> None:
        check_dtype(hasattr(head, "_observers"), "Monitor", "head", "a SubCentroids or a head", repr(head))
        self.every = whole_number("Monitor", "every", every)
        check_value(writer is None or hasattr(writer, "add_scalar"), "Monitor", "writer", "of a method add_scalar", writer)
        self.writer, self.log, self.head = writer, log, head
        self.latest: dict[str, float] = {}
        self.history: deque[dict[str, float]] = deque(maxlen=HISTORY)
        self.start = head.prototypes.clone()
        self._waits_for_start, self._updates = head._start_pending, 0
        head._observers = (*head._observers, self)

    def close(self) -> None:
        """Watch no more; records stay."""
        self.head._observers = tuple(o for o in self.head._observers if o is not self)

    def __enter__(self) -> Monitor:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @torch.no_grad()
    def see(self, before: Tensor, own: Tensor | None, cluster: Tensor) -> None:
        """Note an update that is done; the head calls it.

        Args:
            before: [C,K,D], the sub-centroids before it.
            own: [N,K], own similarities of its samples.
            cluster: [N] int64, ``c*K + k`` that clustering gave each; -1: left out.
        """
        head = self.head
        if self._waits_for_start and not head._start_pending:
            self.start, self._waits_for_start = head.prototypes.clone(), False
        self._updates += 1
        if self._updates % self.every:
            return
        now = head.prototypes
        share = shares(head.wins)
        values = {
            "dead": (share < dead_below(share.shape[1]))[share.isfinite().all(1)].double().mean(),
            "usage": usage(share).nanmean(),
            "win": cluster.new_full((), torch.nan, dtype=torch.float64) if own is None else _mean_of(own.amax(1), cluster >= 0),
            "marginal_error": _unevenness(cluster, *now.shape[:2]),
            "drift": (1 - (before * now).sum(2)).mean(),
            "to_start": (self.start.to(now) * now).sum(2).mean(),
        }
        *numbers, step = torch.stack([*(v.double() for v in values.values()), head.num_updates.double()]).tolist()
        record = dict(zip(values, numbers, strict=True))
        self.latest = {"step": int(step), **record}
        self.history.append(self.latest)
        known = {f"dnc/{name}": value for name, value in record.items() if not math.isnan(value)}
        if self.writer is not None:
            for tag, value in known.items():
                self.writer.add_scalar(tag, value, int(step))
        if self.log is not None:
            self.log(known, step=int(step))


def _mean_of(values: Tensor, counted: Tensor) -> Tensor:
    return torch.where(counted, values, 0).sum(dtype=torch.float64) / counted.sum()


def _unevenness(cluster: Tensor, classes: int, k: int) -> Tensor:
    counts = torch.zeros(classes * k + 1, dtype=torch.int64, device=cluster.device)
    counts.index_add_(0, torch.where(cluster >= 0, cluster, classes * k), torch.ones_like(cluster))
    won = counts[:-1].view(classes, k)
    n = won.sum(1)
    error = (shares(won) - 1 / k).abs().sum(1) / 2
    return torch.where(n > 0, error * n, 0).sum() / n.sum()
