"""Sub-centroids of every class: their clustering, their momentum update and where they start."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

import torch
import torch.nn.functional as F
from torch import Generator, Tensor, nn

from .. import ops
from .._tensors import check_pixels, flat_pixels, pixel_count
from ..errors import (
    check_device,
    check_dtype,
    check_float,
    check_number,
    check_value,
    label_fix,
    renamed,
    tensor_fix,
    whole_number,
)
from . import _graph, _starts, _sync
from ._batches import Data, Prepare, embedded
from ._choices import Assignment, Init, Sync, UpdateFrom, check_word
from ._labels import left_out_below_zero
from ._momentum import Momentum, Recent, check_momentum
from ._state import HALF, SubCentroidState, is_marked, unit_rows
from ._usage import DeadSubCentroidsWarning, dead_below, shares, usage
from .diagnosis import Diagnosis, check_start, diagnosed
from .recipes import options_of
from .refit import Refit, refitted_

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from typing_extensions import Self


#: What `SubCentroids.wins` keeps of a class in an update that has pixels of it: the last hundred or so count.
WINS_DECAY = 0.99
#: Updates after the warm-up before dead sub-centroids are a matter to warn of.
UPDATES_BEFORE_WARNING = 100


class SubCentroids(SubCentroidState):
    """K unit-length sub-centroids of each of C classes, moved by clustered pixels and never by gradients (DNC, section 3.2).

    Args:
        num_classes, num_subcentroids, channels: C, K (at most 256) and D.
        momentum: share of the old sub-centroid that an update keeps, in [0,1]: a number, a cosine ramp (start, end, steps) over
            the updates, or a function of the number of updates done (see `Momentum`).
        epsilon, iterations: of the optimal transport (`ops.sinkhorn_assign`).
        assignment: ``argmax`` of the transport plan. ``gumbel`` adds Gumbel noise first, as the released code does: it keeps
            only e/(e+K-1) of the assignments even where the plan is certain (23% at K = 10), so the sub-centroids of a class
            collapse onto each other; offered to repeat that, not to use.
        update_from: ``correct``: only correctly classified pixels move sub-centroids (the paper); ``all``: every labelled
            pixel.
        sync: data parallel. ``auto`` and ``sums``: all ranks cluster jointly and add up their sums before one momentum step,
            which equals one process with all the data. ``average``: each rank clusters and updates alone, then the
            sub-centroids are averaged, which dilutes classes that few ranks saw (as released). ``none``: ranks drift apart.
            Unless ``none``, the first update gives all ranks the buffers of the first one.
        process_group: the ranks that `sync` is about, such as those of a pipeline stage; None: all. A copy has it too, a pickle
            has none.
        init: ``random`` directions; ``orthogonal`` (blocks of D orthogonal rows); ``data``: k-means++ on the pixels of update
            `init_step`, random until then.
        init_step: the update that ``init="data"`` replaces; 0 is the first.
        warmup_steps: updates that are counted but move nothing.
        revive_after: give a sub-centroid that had less than 1 % of the `wins` of its class throughout this many updates of the
            class the pixel of its class that is least like any of its sub-centroids; at most one per class and update. None or
            0: never.
        accumulation_steps: calls of `update_` whose sums add up before the sub-centroids move once; `num_updates` counts moves.
        generator: source of every draw (start, Gumbel noise); None: torch's global one. Copied and pickled with the module.
        device, dtype: of the sub-centroids; float32 (default) or float64.

    Attributes:
        prototypes: [C,K,D] buffer, the released name. float32 or float64 always: `half()` and `bfloat16()` leave it in float32,
            because a 16-bit average would lose updates of a momentum near 1; `double()` makes it float64. Loading
            normalises rows that are not of unit length and refuses rows that have no direction.
        num_updates: int64, updates done. In the state dict only where a ramp, a warm-up or a data start needs it to resume.
        start_in: int64, calls of `update_` up to that which ``init="data"`` replaces, 1 the next; 0: no start is to come. Only
            with ``init="data"``, then in the state dict; else None.
        last_counts: [C,K] int64, pixels that moved each sub-centroid in the last update (of all ranks). Not in the state dict.
        idle_updates: [C,K] int64, updates since each had 1 % of the wins of its class, among those in which its class had
            pixels. In the state dict with `revive_after`.
        wins: [C,K] float32, decayed counts of the pixels whose nearest own sub-centroid each was, right or wrong, before it
            moved: an update in which a class has pixels multiplies the class's row by 0.99 and adds them (of all ranks, unless
            sync is ``average`` or ``none``). Zero again where sub-centroids start from data. In the state dict with
            `revive_after`.

    The sums of an unfinished accumulation are in the state dict too, while there are any. A state dict without a counter sets
    it to 0. Sub-centroids that were loaded, whichever way, are never started over.
    """

    _warned_of_dead = False

    def __init__(
        self,
        num_classes: int,
        num_subcentroids: int,
        channels: int,
        *,
        momentum: Momentum = 0.999,
        epsilon: float = 0.05,
        iterations: int = 3,
        assignment: Assignment = "argmax",
        update_from: UpdateFrom = "correct",
        sync: Sync = "auto",
        process_group: ProcessGroup | None = None,
        init: Init = "random",
        init_step: int = 0,
        warmup_steps: int = 0,
        revive_after: int | None = None,
        accumulation_steps: int = 1,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(process_group)
        op = type(self).__name__
        num_classes = whole_number(op, "num_classes", num_classes)
        num_subcentroids = whole_number(op, "num_subcentroids", num_subcentroids)
        channels = whole_number(op, "channels", channels)
        check_value(num_subcentroids <= 256, op, "num_subcentroids", "at most 256", num_subcentroids)
        check_number(op, "epsilon", epsilon, "positive and finite", lambda v: 0 < v < math.inf)
        iterations = whole_number(op, "iterations", iterations, 0)
        for name, word in (("assignment", assignment), ("update_from", update_from), ("sync", sync), ("init", init)):
            check_word(op, name, word)
        init_step = whole_number(op, "init_step", init_step, 0)
        warmup_steps = whole_number(op, "warmup_steps", warmup_steps, 0)
        if revive_after is not None:
            revive_after = whole_number(op, "revive_after", revive_after, 0, "None or a non-negative integer") or None
        accumulation_steps = whole_number(op, "accumulation_steps", accumulation_steps)
        check_dtype(generator is None or isinstance(generator, Generator), op, "generator", "a torch.Generator", generator)
        dtype = torch.float32 if dtype is None or dtype in HALF else dtype
        check_value(dtype in (torch.float32, torch.float64), op, "dtype", "a float dtype", dtype)
        self.num_classes, self.num_subcentroids, self.channels = num_classes, num_subcentroids, channels
        self.momentum = check_momentum(op, momentum)
        self.epsilon, self.iterations = float(epsilon), iterations
        self.assignment, self.update_from, self.sync = assignment, update_from, sync
        self.init, self.init_step, self.warmup_steps, self.revive_after = init, init_step, warmup_steps, revive_after
        self.accumulation_steps, self.generator = accumulation_steps, generator
        size = (num_classes, num_subcentroids)
        needs_count = not isinstance(self.momentum, float) or warmup_steps > 0 or init == "data"
        count = {"dtype": torch.int64, "device": device}
        self.register_buffer("prototypes", torch.empty(*size, channels, device=device, dtype=dtype))
        self.register_buffer("num_updates", torch.zeros((), **count), persistent=needs_count)  # type: ignore[arg-type]
        self.register_buffer("start_in", torch.zeros((), **count) if init == "data" else None)  # type: ignore[arg-type]
        self.register_buffer("last_counts", torch.zeros(size, **count), persistent=False)  # type: ignore[arg-type]
        self.register_buffer("idle_updates", torch.zeros(size, **count), persistent=bool(revive_after))  # type: ignore[arg-type]
        wins = torch.zeros(size, device=device, dtype=torch.float32)
        self.register_buffer("wins", wins, persistent=bool(revive_after))
        self.reset_prototypes()

    @torch.no_grad()
    def reset_prototypes(self) -> None:
        """Start the sub-centroids over: as `init` says, counters at zero. Parameters stay."""
        self._reset_counters(self._counters)
        self._forget_pending()
        loaded = is_marked(self.prototypes) and nn.init.zeros_.__module__ != "torch.nn.init"  # within its guard alone
        if self.init == "data":
            assert self.start_in is not None
            self._start_pending, self._drawn = True, (self.prototypes, self.start_in)
            nn.init.constant_(self.start_in, 0 if loaded else self.init_step + 1)
        if self.prototypes.is_meta or loaded:
            return
        make = _starts.orthogonal_directions if self.init == "orthogonal" else _starts.random_directions
        rows = make(self.num_classes * self.num_subcentroids, self.channels, self.prototypes.device, self.generator)
        self.prototypes.copy_(rows.view_as(self.prototypes))
        # again in the buffer's own precision
        self.prototypes.copy_(F.normalize(self.prototypes, dim=2))

    @torch.no_grad()
    def cluster(self, own_similarity: Tensor, labels: Tensor, *, joint: bool = True) -> Tensor:
        """Sub-centroid of every pixel, by optimal transport within its class (DNC, eq. 5-7).

        Args:
            own_similarity: [N,K] or [B,K,H,W], similarities to the sub-centroids of the pixel's label, as `ops.class_scores`
                gives them. A pixel whose similarities are not finite is left out.
            labels: [N] for rows, [B,H,W] (or flat [N]) for a map; any integer dtype, in [0,C); any negative id leaves a pixel
                out.
            joint: with more than one rank and sync ``auto`` or ``sums``, cluster the pixels of all ranks together; all must
                then call it together. False: only the pixels given.

        Returns:
            [N] for rows, [B,H,W] for a map, int64: ``c*K + k``, or -1 where left out. Not differentiable.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device; on CPU a label at or beyond C, which is left out on a GPU and
                under torch.compile.
        """
        op = f"{type(self).__name__}.cluster"
        check_float(op, "own_similarity", own_similarity)
        k = self.num_subcentroids
        check_value(
            own_similarity.ndim in (2, 4) and own_similarity.shape[1] == k, op, "own_similarity",
            f"[N,K] or [B,K,H,W] with K={k}", own_similarity,
        )  # fmt: skip
        _check_pixels_of(op, "labels", labels, own_similarity, "own_similarity")
        group = left_out_below_zero(op, "labels", labels, self.num_classes, "C")
        cluster = self._cluster(flat_pixels(own_similarity), group, joint=joint)
        return cluster if own_similarity.ndim == 2 else cluster.view(own_similarity.shape[0], *own_similarity.shape[2:])

    def _cluster(self, own: Tensor, group: Tensor, *, joint: bool) -> Tensor:
        """`cluster` of rows [N,K] and classes [N] int64, -1 for none."""
        own = own.detach()
        if self._transports(joint):  # -1 where a pixel is left out, and where a similarity is not finite
            sub = self._assign(own, group, joint=joint)
            return torch.where(sub >= 0, group * self.num_subcentroids + sub, -1)
        # a NaN wins both; isfinite of all would take 7 bytes for each of the N*K
        inside = (group >= 0) & own.amax(1).isfinite() & own.amin(1).isfinite()
        group = torch.where(inside, group, -1)
        return torch.where(inside, group * self.num_subcentroids + self._assign(own, group, joint=joint), -1)

    def _transports(self, joint: bool) -> bool:
        """Whether clusters are the assignment of `ops.sinkhorn_assign`."""
        return self.assignment == "argmax" and not self._over_ranks(joint)

    def _over_ranks(self, joint: bool) -> bool:
        """Whether, with `joint`, pixels cluster together with those of other ranks."""
        return joint and self.sync != "average" and _sync.ranks(self.peers) > 1

    def _assign(self, own: Tensor, group: Tensor, *, joint: bool) -> Tensor:
        """[N]: k of each pixel, of finite similarities [N,K] and classes [N]; without meaning where the class is -1."""
        classes = self.num_classes
        if self._over_ranks(joint):
            logits = _sync.sinkhorn_over_ranks(self.peers, own, group, classes, self.epsilon, self.iterations)
            return logits.argmax(1) if self.assignment == "argmax" else self._draw(logits.softmax(1))
        if self.assignment == "argmax":
            return ops.sinkhorn_assign(own, group, classes, epsilon=self.epsilon, iterations=self.iterations)
        return self._draw(ops.sinkhorn_plan(own, group, classes, epsilon=self.epsilon, iterations=self.iterations))

    def _draw(self, plan: Tensor) -> Tensor:
        """The argmax of a plan [N,K] and noise, which is added in place."""
        # the plan itself serves as logits, as in the released code: that is why it collapses
        return plan.add_(_starts.gumbel_(_graph.uniform(self, plan.shape, plan.device))).argmax(1)

    @renamed(cluster="labels")
    @torch.no_grad()
    def update_(
        self, x: Tensor, labels: Tensor, *, correct: Tensor | None = None, own_similarity: Tensor | None = None
    ) -> None:
        """Move the sub-centroids towards the pixels assigned to them, in place (DNC, eq. 8).

        Pixels with a NaN or Inf feature never take part. All ranks must call it together unless sync is ``none``.

        Args:
            x: unit features [N,D] or [B,D,H,W].
            labels: ``c*K + k`` from `cluster`, [N] for rows, [B,H,W] (or flat [N]) for a map; any integer dtype, in [0,C*K);
                any negative id leaves a pixel out.
            correct: bool, in the shape of `labels`; with ``update_from="correct"`` only these pixels move sub-centroids.
                None: all do.
            own_similarity: [N,K] or [B,K,H,W] as for `cluster`; needed for `wins` and revival.

        Raises:
            ValueError, TypeError: wrong shape, dtype or device; on CPU a label at or beyond C*K, which is left out on a GPU and
                under torch.compile.
        """
        op = f"{type(self).__name__}.update_"
        check_float(op, "x", x)
        check_value(x.ndim in (2, 4) and x.shape[1] == self.channels, op, "x", f"[N,D] or [B,D,H,W] with D={self.channels}", x)
        _check_pixels_of(op, "labels", labels, x)
        cluster = left_out_below_zero(op, "labels", labels, self.num_classes * self.num_subcentroids, "C*K")
        if correct is not None:
            _check_pixels_of(op, "correct", correct, x)
            check_dtype(correct.dtype == torch.bool, op, "correct", "a bool tensor", correct, "compare with the labels")
            correct = correct.reshape(-1)
        if own_similarity is not None:
            check_pixels(op, own_similarity, "own_similarity")
            check_device(op, "own_similarity", own_similarity, x)
            if x.ndim == 4 and own_similarity.ndim == 4:
                _check_pixels_of(op, "own_similarity", own_similarity[:, 0], x)
            own_similarity = flat_pixels(own_similarity)
            check_value(
                list(own_similarity.shape) == [len(cluster), self.num_subcentroids], op, "own_similarity",
                "[N,K] or [B,K,H,W] to match x", own_similarity,
            )  # fmt: skip
        self._update(x, cluster, correct, own_similarity)

    def _update(
        self,
        x: Tensor | None,
        cluster: Tensor,
        correct: Tensor | None,
        own_similarity: Tensor | None,
        tally: Tensor | None = None,
        *,
        sums: tuple[Tensor, Tensor] | None = None,
        won: Tensor | None = None,
        gathered: bool = False,
        start_from: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor | None:
        """Does `update_`.

        Args:
            x: as there; None where `sums` is given and neither a start from data nor revival needs it.
            cluster: [N] int64, ``c*K + k`` or -1.
            correct: [N] bool, as there.
            own_similarity: [N,K], as there.
            tally: int64 counts of the caller, to be summed over the ranks in the same exchange.
            sums: sums [M,D] and counts [M] of the pixels that move sub-centroids, where they are known.
            won: [M] int64, the wins of each sub-centroid, where they are known.
            gathered: the pixels are those of all ranks already: exchange nothing.
            start_from: features and classes to start from when a data start is due; None: those of this update.

        Returns:
            `tally`, summed.
        """
        self._in_full_precision()
        self._agree()
        rows = self.num_classes * self.num_subcentroids
        group = torch.div(cluster, self.num_subcentroids, rounding_mode="floor")
        assigned, before = cluster, self.prototypes.clone() if self._observers else None
        started: bool | Tensor = False  # a tensor in a graph
        if self._start_pending:
            assert x is not None
            started = self._start_when_due(*(start_from or (x.detach(), group)))
        if sums is None:
            assert x is not None
            if correct is not None and self.update_from == "correct":
                cluster = torch.where(correct, cluster, -1)
            sums = ops.cluster_sums(x.detach(), cluster, rows)
        totals, counts = sums
        won = self._won(own_similarity, group) if won is None else won
        if not gathered and self.sync != "average" and _sync.ranks(self.peers) > 1:
            packed = torch.cat([counts, won] if tally is None else [counts, won, tally])
            totals, packed = _sync.sum_over_ranks(self.peers, totals, packed)
            counts, won, tally = packed[:rows], packed[rows : 2 * rows], None if tally is None else packed[2 * rows :]
        # after a start: what won and clustered the pixels is no more, and nobody is idle, so none is revived
        self._count_wins(_unless(started, won))
        moves = None
        if self.accumulation_steps > 1:
            if self._pending is not None:
                totals, counts = totals + self._pending[0].to(totals), counts + self._pending[1].to(counts)
            totals, counts = _unless(started, totals), _unless(started, counts)
            if torch.compiler.is_compiling():
                moves = self._last_of_accumulation(totals, counts)
            else:
                self._pending, self._pending_updates = (totals, counts), int(self._pending_updates) + 1
                if self._pending_updates < self.accumulation_steps:
                    return tally
                self._forget_pending()
        changed = (self.prototypes, self.num_updates, self.last_counts, self.idle_updates, self.wins)
        held = [] if moves is None else [buffer.clone() for buffer in changed]
        self._finish_update(totals, counts, started)
        if self.revive_after is not None and own_similarity is not None:
            assert x is not None
            self._revive(x.detach(), group, own_similarity, self.revive_after, gathered)
        if moves is not None:
            for buffer, value in zip(changed, held, strict=True):
                buffer.copy_(torch.where(moves, buffer, value))
        if before is not None:
            self._observe(before, own_similarity, assigned, moves)
        return tally

    def _last_of_accumulation(self, totals: Tensor, counts: Tensor) -> Tensor:
        """[] bool: whether these are the sums of `accumulation_steps` updates; else they are kept for the next one.

        Counted on the device: a number of the host would be a constant of the graph, and every update would make a new one.
        """
        done = torch.zeros((), dtype=torch.int64, device=counts.device) + self._pending_updates + 1
        moves = done >= self.accumulation_steps
        self._pending = torch.where(moves, 0, totals), torch.where(moves, 0, counts)
        self._pending_updates = torch.where(moves, 0, done)
        return moves

    @torch._disable_dynamo  # as in `_sync`
    def _observe(self, before: Tensor, own_similarity: Tensor | None, cluster: Tensor, moves: Tensor | None) -> None:
        if moves is not None and not moves:
            return
        for observer in self._observers:
            observer.see(before, own_similarity, cluster)

    def _won(self, own_similarity: Tensor | None, group: Tensor) -> Tensor:
        """[M] int64: pixels of classes `group` [N] (negative: left out) that are nearest to each own sub-centroid."""
        rows = self.num_classes * self.num_subcentroids
        won = torch.zeros(rows + 1, dtype=torch.int64, device=group.device)
        if own_similarity is not None:
            similarity, nearest = own_similarity.detach().max(1)
            counted = (group >= 0) & similarity.isfinite()
            won.index_add_(0, torch.where(counted, group * self.num_subcentroids + nearest, rows), torch.ones_like(group))
        return won[:rows]

    def _count_wins(self, won: Tensor) -> None:
        won = won.view_as(self.wins)
        self.wins.mul_(torch.where(won.any(1, keepdim=True), WINS_DECAY, 1.0)).add_(won)

    def _finish_update(self, sums: Tensor, counts: Tensor, started: bool | Tensor) -> None:
        self.last_counts.copy_(counts.view_as(self.last_counts))
        counts = _unless(started, counts)
        if self.warmup_steps:
            counts = torch.where(self.num_updates < self.warmup_steps, 0, counts)
        self._move(sums, counts)
        alive = self.wins >= dead_below(self.num_subcentroids) * self.wins.sum(1, keepdim=True)
        idle = self.idle_updates + (self.last_counts > 0).any(1, keepdim=True)
        self.idle_updates.copy_(torch.where(alive, 0, idle))
        self.num_updates.add_(1)

    def _move(self, sums: Tensor, counts: Tensor) -> None:
        ops.apply_momentum_(self.prototypes, sums, counts, momentum=self.momentum_now())
        if self.sync == "average" and (world := _sync.ranks(self.peers)) > 1:
            (total,) = _sync.sum_over_ranks(self.peers, self.prototypes)
            self.prototypes.copy_(F.normalize(total / world, dim=2))

    def momentum_now(self) -> float | Tensor:
        """Momentum of the next update: a number where it is constant, else a 0-d tensor."""
        momentum = self.momentum
        if isinstance(momentum, tuple):
            start, end, steps = momentum
            done = (self.num_updates.to(self.prototypes.dtype) / steps).clamp(max=1)
            return end - (end - start) * (1 + torch.cos(math.pi * done)) / 2
        if callable(momentum):
            like = self.prototypes
            now = momentum(self.num_updates.to(like.dtype))
            return now.to(like.device) if isinstance(now, Tensor) else torch.tensor(now, dtype=like.dtype, device=like.device)
        return float(momentum)

    def _updates_at_once(self) -> bool:
        """Whether an update is no more than `_count_wins` and `_finish_update` of one call, and no function of the user's."""
        at_once = self.accumulation_steps == 1 and self.revive_after is None and not (self._start_pending or self._observers)
        return at_once and (not callable(self.momentum) or isinstance(self.momentum, Recent))

    def _schedule(self) -> tuple[str, tuple[float, float, float]]:
        """The momentum as `ops.head` takes it; not that of any function."""
        momentum = self.momentum
        if isinstance(momentum, Recent):
            return "recent", (momentum.fraction, momentum.start, 0.0)
        if isinstance(momentum, tuple):
            start, end, steps = momentum
            return "ramp", (float(start), float(end), float(steps))
        assert isinstance(momentum, float)
        return "constant", (momentum, 0.0, 0.0)

    def _revive(self, x: Tensor, group: Tensor, own_similarity: Tensor, after: int, gathered: bool) -> None:
        nearest = own_similarity.detach().amax(1)
        # a pixel of zeros is no direction
        usable = (group >= 0) & nearest.isfinite() & (torch.linalg.vector_norm(x, dim=1).reshape(-1) > 0)
        pick, best = _starts.first_of_each_class(-nearest, torch.where(usable, group, -1), self.num_classes)
        if len(nearest):
            pixels = x[pick] if x.ndim == 2 else _pixels_at(x, pick)
        else:
            pixels = x.new_zeros(self.num_classes, self.channels)
        pixels = F.normalize(torch.where((best > -torch.inf)[:, None], pixels.to(self.prototypes.dtype), 0), dim=1)
        key = -best  # the similarity of the least similar pixel; Inf without pixels
        if not gathered and _sync.ranks(self.peers) > 1:
            key, pixels = _sync.rows_of_lowest_key(self.peers, key, pixels)
        longest, which = self.idle_updates.max(1)
        due = (longest >= after) & key.isfinite()
        each = torch.arange(self.num_classes, device=which.device)
        self.prototypes[each, which] = torch.where(due[:, None], pixels, self.prototypes[each, which])
        self.idle_updates[each, which] = torch.where(due, 0, longest)
        # as many as any other has, or it would be dead before it could win
        self.wins[each, which] = torch.where(due, self.wins.mean(1), self.wins[each, which])

    @torch.no_grad()
    def initialize_from_(self, features: Tensor, labels: Tensor, *, refinements: int = 5) -> Tensor:
        """Start the sub-centroids of every class from its pixels: k-means++, then k-means steps on the sphere.

        A class with fewer distinct pixels than K keeps its present sub-centroids for the rest; one without pixels keeps all of
        them. With more than one rank each class starts from the rank that sees most of it, and all ranks must call it together.

        Args:
            features: [N,D] or [B,D,H,W], embedded as for training; normalised here.
            labels: [N] for rows, [B,H,W] (or flat [N]) for a map; any integer dtype, in [0,C); any negative id leaves a pixel
                out.
            refinements: k-means steps after k-means++.

        Returns:
            [C] int64: pixels of each class that took part (on the rank that sees most).

        Raises:
            ValueError, TypeError: wrong shape, dtype or device; on CPU a label at or beyond C, which is left out on a GPU and
                under torch.compile.
        """
        op = f"{type(self).__name__}.initialize_from_"
        check_value(
            features.ndim in (2, 4) and features.shape[1] == self.channels, op, "features",
            f"[N,D] or [B,D,H,W] with D={self.channels}", features,
        )  # fmt: skip
        _check_pixels_of(op, "labels", labels, features, "features")
        refinements = whole_number(op, "refinements", refinements, 0)
        group = left_out_below_zero(op, "labels", labels, self.num_classes, "C")
        counts = self._start_from(features.detach(), group, self.prototypes, self.wins, refinements)
        self._forget_pending(start=True)
        return counts

    def _start_from(self, x: Tensor, group: Tensor, prototypes: Tensor, wins: Tensor, refinements: int = 5) -> Tensor:
        """Does `initialize_from_` with the buffers given, which a graph may hold copies of."""
        start, counts = _starts.data_start(x, group, prototypes, refinements=refinements, generator=self.generator)
        if _sync.ranks(self.peers) > 1:
            key = torch.where(counts > 0, -counts.to(start.dtype), torch.inf)
            key, rows = _sync.rows_of_lowest_key(self.peers, key, start)
            start = torch.where(key.isfinite()[:, None, None], rows, prototypes)
            counts = torch.where(key.isfinite(), -key, 0).to(torch.int64)
        prototypes.copy_(start)
        wins.zero_()
        return counts

    @torch.no_grad()
    def refit_(
        self,
        data: Data,
        labels: Tensor | None = None,
        *,
        backbone: Callable[[Tensor], Tensor] | None = None,
        prepare: Prepare | None = None,
        iterations: int = 10,
        tolerance: float = 1e-4,
        start: Literal["data", "current"] = "data",
        restarts: int = 2,
    ) -> Refit:
        """Put the sub-centroids of every class where spherical k-means on all of its samples puts them.

        The centres are those of largest mean cosine of the samples to the nearest of their class. k-means++ and some steps on
        a bounded draw of each class come first, then steps over all samples, each a pass over `data`. What fits into the draw
        (2^24 numbers for all classes, or 4 K samples of each if that is more) is not computed again, so that one pass over
        `data` is enough; else it must be something to go through again, with the same samples. A centre that wins nothing
        becomes a sample of the draw, as in k-means++. A class with fewer distinct samples than K keeps the rest, one without
        samples all of its sub-centroids. Nothing else of the head changes, and no statistics of the backbone.

        With several ranks each has its own part of the data, and all must call it together: they do what one process does.

        Args:
            data: features and `labels` as of the head's `loss` (embeddings for a bare `SubCentroids`), or batches
                ``(features, labels, ...)`` of them, such as a DataLoader.
            labels: with a tensor alone.
            backbone: then batches hold images, and ``backbone(prepare(images))`` are the features, in eval mode.
            prepare: None: nothing.
            iterations: steps over all samples, at most.
            tolerance: stop once a step raises the mean cosine by less.
            start: ``data``: k-means++. ``current``: the present sub-centroids; what wins nothing starts from the draw.
            restarts: runs on the draw, of which each class takes its best.

        Returns:
            `Refit`: counts [C,K], iterations, and the mean cosine before and after. Deterministic, given `generator` and the
            order of the data. Memory: three [C,K,D] in float64, the draw and its copies, and a batch.

        Raises:
            ValueError, TypeError: as of the head's `loss`; data that cannot be gone through again where it must be.
        """
        op = f"{type(self).__name__}.refit_"
        iterations, restarts = whole_number(op, "iterations", iterations, 0), whole_number(op, "restarts", restarts)
        check_number(op, "tolerance", tolerance, "non-negative and finite", lambda v: 0 <= v < math.inf)
        check_value(start in ("data", "current"), op, "start", "one of data, current", start)
        batches = embedded(self, op, data, labels, backbone=backbone, prepare=prepare)
        result = refitted_(self, batches, iterations, tolerance, start, restarts)
        for counter in (self.wins, self.idle_updates):
            counter.zero_()
        self._forget_pending(start=True)
        return result

    def diagnose(
        self,
        data: Data,
        labels: Tensor | None = None,
        *,
        backbone: Callable[[Tensor], Tensor] | None = None,
        prepare: Prepare | None = None,
        start: Tensor | None = None,
    ) -> Diagnosis:
        """Whether the sub-centroids are alive: how the samples share them, and what k-means reaches on the same features.

        One pass over `data`. k-means sees a bounded, even draw of each class (2^24 numbers in all, or 4 K samples of each if
        that is more); where a class has more samples, the cosine that it reaches on its own draw is a little too high. Changes
        nothing, takes no number from a generator, and computes in eval mode. With several ranks each has its own part of the
        data, and all must call it together; the transport plans are then of each rank's batches.

        Args:
            data: as of `refit_`.
            labels: as of `refit_`.
            backbone: as of `refit_`.
            prepare: as of `refit_`.
            start: [C,K,D], the sub-centroids that training began with; None: those that a `Monitor` of this head saw, if any.

        Returns:
            `Diagnosis`; print it.

        Raises:
            ValueError, TypeError: as of the head's `loss`.
        """
        op = f"{type(self).__name__}.diagnose"
        check_start(op, start, self.prototypes)
        if start is None and self._observers:
            start = self._observers[0].start
        return diagnosed(self, embedded(self, op, data, labels, backbone=backbone, prepare=prepare), start)

    def train(self, mode: bool = True) -> Self:
        """As of every module. From training to evaluation it warns, once, of sub-centroids that died: see `wins`."""
        if self.training and not mode and not self._warned_of_dead and not torch.compiler.is_compiling():
            self._warn_of_dead()
        return super().train(mode)

    def _warn_of_dead(self) -> None:
        if self.wins.is_meta or int(self.num_updates) < self.warmup_steps + UPDATES_BEFORE_WARNING:
            return
        k = self.num_subcentroids
        # of fewer samples some sub-centroids get none by chance
        share = shares(self.wins[self.wins.sum(1) >= 3 * k])
        limit, total = dead_below(k), share.numel()
        dead = int((share < limit).sum())
        if 2 * dead <= total:
            return
        self._warned_of_dead = True
        text = (
            f"{type(self).__name__}: {dead} of {total} sub-centroids are dead: nearest to less than {100 * limit:.2g}% of the "
            f"training samples of their class (usage {float(usage(share).mean()):.2f}, 1 is even), so K = {k} does little more "
            f"than K = 1. diagnose(data) says which; a lower momentum or another recipe keeps them alive, refit_(data) places "
            f"them anew (docs/layer.md)"
        )
        warnings.warn(text, DeadSubCentroidsWarning, stacklevel=3)

    def _start_when_due(self, x: Tensor, group: Tensor) -> bool | Tensor:
        """Start from data if this update is the one for it. Returns whether: a tensor in a graph."""
        if torch.compiler.is_compiling():
            return _graph.start_when_due(self, x, group)
        assert self.start_in is not None
        return self._start_if_due(x, group, self.prototypes, self.wins, self.start_in, self.num_updates)

    def _start_if_due(
        self, x: Tensor, group: Tensor, prototypes: Tensor, wins: Tensor, start_in: Tensor, num_updates: Tensor
    ) -> bool:
        """Does `_start_when_due` with the buffers given, which a graph may hold copies of."""
        left = int(start_in)
        # loaded without a word: sub-centroids that are other tensors, without a count; or by `copy_`, with many updates
        loaded = self.prototypes is not self._drawn[0] and self.start_in is self._drawn[1]
        if loaded or not 0 < left <= self.init_step + 1 or int(num_updates) > self.init_step:
            self._no_start(start_in)
            return False
        start_in.sub_(1)
        if left == 1:
            self._start_from(x, group, prototypes, wins)
            self._no_start(start_in)
        return left == 1

    def snapshot(self, update: bool = False) -> Tensor:
        """The sub-centroids to compute with, [C,K,D]: a copy where an update could come before backward, else the buffer.

        Out of training they are of unit length, also where a moving average of models has shortened the buffer's rows.
        """
        self._in_full_precision()
        if (update or self.training) and torch.is_grad_enabled():
            # of itself a custom operator would import the compiler: seconds, in the first step
            return _graph.copy_of_subcentroids(self.prototypes) if torch.compiler.is_compiling() else self.prototypes.clone()
        return self.prototypes if self.training else unit_rows(self.prototypes, self.prototypes.norm(dim=2, keepdim=True))

    def extra_repr(self) -> str:
        """Sizes, the recipe, and every option that differs from it or from its default."""
        return options_of(self)


def _unless(started: bool | Tensor, value: Tensor) -> Tensor:
    """The value, or zeros after a start from data."""
    if isinstance(started, Tensor):
        return torch.where(started, 0, value)
    return torch.zeros_like(value) if started else value


def _check_pixels_of(op: str, argument: str, values: Tensor, x: Tensor, name: str = "x") -> None:
    """Check values [N] (of any shape) for rows x [N,...], [B,H,W] or [N] for a map x [B,...,H,W], on its device."""
    check_dtype(isinstance(values, Tensor), op, argument, "a tensor", values, tensor_fix(values))
    pixels = pixel_count(x)
    fits = values.numel() == pixels
    if x.ndim == 4 and values.ndim != 1:
        fits = list(values.shape) == [x.shape[0], x.shape[2], x.shape[3]]
    if not fits:
        # the message is made on failure alone: torch.compile cannot format a symbolic size
        maps = "" if x.ndim == 2 else f" or [B,H,W]={[x.shape[0], *x.shape[2:]]}"
        check_value(False, op, argument, f"[N]=[{pixels}]{maps} to match {name}", values, label_fix(values, x))
    check_device(op, argument, values, x, name)


def _pixels_at(x: Tensor, index: Tensor) -> Tensor:
    """Rows [M,D] of pixels `index` of x [B,D,H,W], without a copy of the map."""
    height, width = x.shape[2:]
    inside = index % (height * width)
    return x[index // (height * width), :, inside // width, inside % width]
