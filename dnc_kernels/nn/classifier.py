"""Image classifier of Deep Nearest Centroids."""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from .. import ops
from ..errors import check_value
from . import _sync
from ._base import CentroidModel, DNCLoss, check_features, check_labels
from ._labels import sort_out_labels, without_ignored
from .memory import FeatureMemory
from .subcentroids import Momentum


class DNCClassifier(CentroidModel):
    """Samples are classified by their nearest sub-centroid, from the fused kernel; a memory of past features helps to cluster a
    batch.

    A batch holds a sample or none of most classes, too few to share among K sub-centroids: clustering sees the batch and the
    memory together. The loss and the momentum update see the batch alone, so no gradient and no update comes from stale
    features.

    Args:
        in_features: D.
        num_classes: C.
        num_subcentroids: K, at most 256.
        memory_size: features kept of each class; 0: no memory.
        momentum, epsilon, iterations, assignment, update_from, init, init_step, warmup_steps, revive_after: see `SubCentroids`.
            A data start takes the batch and the memory of update `init_step`.
        ignore_index: label to leave out; outside [0,C).
        sync: data parallel, see `SubCentroids`. With ``auto`` and ``sums`` the embedded batches of all ranks are gathered:
            clustering, update and memory are those of one process with all the data (one host sync a step, for the batch
            sizes).
        scores, temperature, scale, confidence, ppc_weight, ppc_temperature, ppd_weight, class_weight, label_smoothing, recipe,
        generator, device, dtype:
            see `DNCHead`.

    Attributes:
        memory: `FeatureMemory` or None; in the state dict as `memory.storage` and `memory.pushed`.
        prototypes, feat_norm, mask_norm, class_counts, nonfinite_pixels, bad_labels: see `DNCHead`.
    """

    memory: FeatureMemory | None

    def __init__(
        self,
        in_features: int,
        num_classes: int,
        num_subcentroids: int = 4,
        memory_size: int = 32,
        momentum: Momentum | None = None,
        epsilon: float | None = None,
        iterations: int | None = None,
        assignment: str | None = None,
        ignore_index: int = -100,
        ppc_weight: float | None = None,
        ppd_weight: float | None = None,
        sync: str = "auto",
        *,
        scores: str | None = None,
        temperature: float | None = None,
        scale: float | None = None,
        confidence: str | None = None,
        ppc_temperature: float | None = None,
        update_from: str | None = None,
        init: str | None = None,
        init_step: int | None = None,
        warmup_steps: int | None = None,
        revive_after: int | None = None,
        class_weight: Tensor | list[float] | None = None,
        label_smoothing: float | None = None,
        recipe: str | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        check_value(
            isinstance(memory_size, int) and memory_size >= 0, "DNCClassifier", "memory_size", "non-negative", memory_size
        )
        super().__init__(
            in_features, num_classes, num_subcentroids,
            recipe=recipe, ignore_index=ignore_index, class_weight=class_weight, sync=sync, generator=generator,
            device=device, dtype=dtype,
            options={
                "momentum": momentum, "epsilon": epsilon, "iterations": iterations, "assignment": assignment,
                "ppc_weight": ppc_weight, "ppd_weight": ppd_weight, "ppc_temperature": ppc_temperature,
                "scores": scores, "temperature": temperature, "scale": scale, "confidence": confidence,
                "update_from": update_from, "init": init, "init_step": init_step, "warmup_steps": warmup_steps,
                "revive_after": revive_after, "label_smoothing": label_smoothing,
            },
        )  # fmt: skip
        self.memory = FeatureMemory(num_classes, memory_size, in_features, device=device) if memory_size else None

    def embed(self, features: Tensor) -> Tensor:
        """Unit-length embedding [N,D] of features [N,D]."""
        check_features("DNCClassifier", features, 2, self.channels)
        return super().embed(features)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [N,C] of features [N,D]; float32, or float64 for float64 features."""
        check_features("DNCClassifier", x, 2, self.channels)
        e, gain = self._embed_with_gain(x)
        return self.logits(ops.class_scores(e, self.snapshot()).scores, gain)

    def loss(self, x: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss; afterwards the sub-centroids move and the memory takes the batch.

        Args:
            x: features [N,D], any float dtype.
            labels: [N], any integer dtype, in [0,C) or `ignore_index`.
            update: move the sub-centroids; None: in training mode. With several ranks an update is a collective call.

        Returns:
            `DNCLoss`; as for `DNCHead.loss` where nothing is labelled or a feature is not finite. Neither [N,C,K] nor [N,C] is
            stored.

        Raises:
            ValueError, TypeError: as for `DNCHead.loss`.
        """
        check_features("DNCClassifier", x, 2, self.channels)
        check_labels("DNCClassifier", labels, x)
        update = self.training if update is None else update
        labels, ignored, wrong = sort_out_labels("DNCClassifier", labels, self.num_classes, self.ignore_index)
        labels = without_ignored(labels, ignored)
        (e, gain), p = self._embed_with_gain(x), self.snapshot(update)
        total, prediction, own = self._fused_cross_entropy(e, p, labels, gain)
        total_weight, count = self._denominators(labels, -1, labels, joint=update)
        cross_entropy = total / total_weight
        finite = prediction >= 0
        group, correct, accuracy = self._judge(prediction, finite, labels)
        ppc = ppd = cross_entropy.new_zeros(())
        if update:
            with torch.no_grad():
                target = self._cluster_and_update(e.detach(), p, group, own, correct, self._tally(labels, finite, wrong))
            ppc, ppd = self._contrast(e, p, target, own, count)
        elif self.ppc_weight or self.ppd_weight:
            ppc, ppd = self._contrast(e, p, self._cluster_with_memory(p, group, own), own, count)
        loss = self._weighted(cross_entropy, ppc, ppd)
        return DNCLoss(loss, cross_entropy.detach(), ppc.detach(), ppd.detach(), accuracy)

    def _cluster_with_memory(self, p: Tensor, group: Tensor, own: Tensor) -> Tensor:
        n = len(group)
        if self.memory is not None:
            group = torch.cat([group, self.memory.read().labels])
            own = torch.cat([own, self.memory.own_similarity(p).to(own.dtype)])
        return self.cluster(own, group, joint=False)[:n]

    def _cluster_and_update(self, e: Tensor, p: Tensor, group: Tensor, own: Tensor, correct: Tensor, tally: Tensor) -> Tensor:
        """Cluster, update and remember the batch of all ranks; return the clusters of this rank's samples."""
        n, first = len(group), 0
        joint = self.sync != "average" and _sync.ranks(self.sync) > 1
        if joint:
            first, (e, group, own, flags) = _sync.gather_rows(e, group, own, correct.to(torch.int64))
            correct = flags > 0
            (tally,) = _sync.sum_over_ranks(tally)
        cluster = self._cluster_with_memory(p, group, own)
        if joint and self.assignment == "gumbel":
            _sync.take_from_first_rank_(cluster)  # every rank has drawn noise of its own
        start_from = None
        if self.memory is not None and self._start_pending:
            held = self.memory.read()
            start_from = torch.cat([e.to(held.features.dtype), held.features]), torch.cat([group, held.labels])
        self._update(e, cluster, correct, own, gathered=joint, start_from=start_from)
        self._write_down(tally)
        if self.memory is not None:
            self.memory.push(e, group)
        return cluster[first : first + n]

    @torch.no_grad()
    def predict(self, x: Tensor) -> Tensor:
        """Classes [N] int64 of features [N,D]. Without LayerNorm over classes no [N,C] exists and a NaN sample gives -1."""
        if self.scores == "norm":
            return self(x).argmax(1)
        # not self.explain: torch.export.load refuses a no_grad within another
        return ops.nearest_centroid(self.embed(x), self.snapshot()).label

    @torch.no_grad()
    def explain(self, x: Tensor) -> ops.NearestCentroid:
        """The sub-centroid that each sample is nearest to: (label, sub, score), each [N]; see `NearestSamples`."""
        return ops.nearest_centroid(self.embed(x), self.snapshot())

    @torch.no_grad()
    def initialize_from_(self, features: Tensor, labels: Tensor, *, refinements: int = 5) -> Tensor:
        """Start the sub-centroids from features [N,D] and labels [N]; see `SubCentroids.initialize_from_`."""
        check_labels("DNCClassifier", labels, features)
        labels, ignored, _ = sort_out_labels("DNCClassifier", labels, self.num_classes, self.ignore_index)
        return super().initialize_from_(self.embed(features), without_ignored(labels, ignored), refinements=refinements)

    def extra_repr(self) -> str:
        """Sizes and the choices that differ in kind."""
        weights = f"ppc_weight={self.ppc_weight}, ppd_weight={self.ppd_weight}"
        return f"{super().extra_repr()}, scores={self.scores!r}, {weights}"
