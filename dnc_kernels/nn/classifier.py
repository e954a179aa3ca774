"""Image classifier of Deep Nearest Centroids."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, overload

import torch
from torch import Generator, Tensor

from .. import ops
from .._tensors import without_ignored
from ..errors import check_value, renamed, whole_number
from . import _sync
from ._base import CentroidModel, DNCLoss, check_features, check_labels
from ._choices import Assignment, Confidence, Init, Recipe, Scores, Sync, UpdateFrom
from ._labels import sort_out_labels
from ._momentum import Momentum
from .memory import FeatureMemory

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DNCClassifier(CentroidModel):
    """Samples are classified by their nearest sub-centroid, from the fused kernel; a memory of past features helps to cluster a
    batch.

    A batch holds at most one sample of most classes, too few to share among K sub-centroids: clustering sees the batch and the
    memory together. The loss and the momentum update see the batch alone, so no gradient and no update comes from stale
    features.

    An option that is None takes its default from the recipe (`RECIPES`), given here as "Default"; `DNCHead` says more of each.

    Args:
        in_features: D.
        num_classes: C.
        num_subcentroids: K, at most 256.
        memory_size: features kept of each class; 0: no memory.
        momentum: share of the old sub-centroid that an update keeps; a number, a ramp or a function (`SubCentroids`).
            Default: Recent(fraction=0.25, start=0.99) (released: 0.999).
        epsilon: entropy of the optimal transport. Default: 0.05.
        iterations: of the optimal transport. Default: 3.
        assignment: ``argmax`` of the transport plan, or ``gumbel`` (`SubCentroids`). Default: ``argmax``.
        ignore_index: label to leave out, outside [0,C). Any negative label is left out too.
        ppc_weight: weight of the sample-to-sub-centroid contrast; 0: not computed, reported as 0. Default: 0.01.
        ppd_weight: weight of the sample-to-sub-centroid distance; 0: not computed, reported as 0. Default: 1.0
            (released: 0.001).
        sync: data parallel, see `SubCentroids`. With ``auto`` and ``sums`` the embedded batches of all ranks are gathered:
            clustering, update and memory are those of one process with all the data (one host sync per step, for the batch
            sizes).
        scores: how similarities become logits: ``norm``, ``temperature`` or ``scale``. Default: ``scale`` (released: ``norm``).
        temperature: of ``scores="temperature"``. Default: 0.1.
        scale: what ``scores="scale"`` begins with. Default: 10.0.
        confidence: ``length``: logits are also multiplied by the length of the feature; ``none``: they are not.
            Default: ``length`` (released: ``none``).
        ppc_temperature: divides the similarities of the contrast loss. Default: 1.0.
        update_from: ``correct``: only correctly classified samples move sub-centroids; ``all``: every labelled sample.
            Default: ``correct``.
        init: ``random``, ``orthogonal`` or ``data``, which takes the batch and the memory of update `init_step`.
            Default: ``orthogonal`` (released: ``random``).
        init_step: the update that ``init="data"`` replaces. Default: 0.
        warmup_steps: updates that are counted but move nothing. Default: 0.
        revive_after: move a sub-centroid without a sample in this many updates (`SubCentroids`); 0: never. Default: None.
        class_weight: [C] weights of the cross-entropy; None: all are 1.
        label_smoothing: of the cross-entropy, in [0,1]. Default: 0.0.
        accumulation_steps: losses whose sums of samples add up before the sub-centroids move once: those of a step whose
            gradients add up; or many batches, as the released code moves once in 300 to 1000.
        recipe: name in `RECIPES`; None: ``default``, which is ``classification``.
        process_group: the ranks that `sync` is about (`SubCentroids`); None: all.
        generator: source of every draw; None: torch's global one.
        device, dtype: of parameters; None: torch's defaults. Sub-centroids stay in float32 at least.

    Attributes:
        memory: `FeatureMemory` or None; in the state dict as `memory.storage` and `memory.pushed`.
        prototypes, feat_norm, mask_norm, class_counts, nonfinite_pixels, bad_labels: see `DNCHead`.
    """

    default_recipe = "classification"
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
        assignment: Assignment | None = None,
        ignore_index: int = -100,
        ppc_weight: float | None = None,
        ppd_weight: float | None = None,
        sync: Sync = "auto",
        *,
        scores: Scores | None = None,
        temperature: float | None = None,
        scale: float | None = None,
        confidence: Confidence | None = None,
        ppc_temperature: float | None = None,
        update_from: UpdateFrom | None = None,
        init: Init | None = None,
        init_step: int | None = None,
        warmup_steps: int | None = None,
        revive_after: int | None = None,
        class_weight: Tensor | list[float] | None = None,
        label_smoothing: float | None = None,
        accumulation_steps: int = 1,
        recipe: Recipe | None = None,
        process_group: ProcessGroup | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = type(self).__name__
        in_features = whole_number(op, "in_features", in_features)
        memory_size = whole_number(op, "memory_size", memory_size, 0)
        super().__init__(
            in_features, num_classes, num_subcentroids,
            recipe=recipe, ignore_index=ignore_index, class_weight=class_weight, sync=sync,
            process_group=process_group, accumulation_steps=accumulation_steps, generator=generator, device=device, dtype=dtype,
            options={
                "momentum": momentum, "epsilon": epsilon, "iterations": iterations, "assignment": assignment,
                "ppc_weight": ppc_weight, "ppd_weight": ppd_weight, "ppc_temperature": ppc_temperature,
                "scores": scores, "temperature": temperature, "scale": scale, "confidence": confidence,
                "update_from": update_from, "init": init, "init_step": init_step, "warmup_steps": warmup_steps,
                "revive_after": revive_after, "label_smoothing": label_smoothing,
            },
        )  # fmt: skip
        self.in_features, self.memory_size = in_features, memory_size
        self.memory = FeatureMemory(num_classes, memory_size, in_features, device=device) if memory_size else None

    def embed(self, features: Tensor) -> Tensor:
        """Unit-length embedding [N,D] of features [N,D]."""
        self._check_features("embed", features)
        return super().embed(features)

    def _check_features(self, function: str, features: Tensor) -> None:
        check_features(f"{type(self).__name__}.{function}", features, 2, self.channels, self)

    @overload
    def forward(self, features: Tensor, labels: None = None, *, update: None = None) -> Tensor: ...
    @overload
    def forward(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss: ...
    @overload
    def forward(self, features: Tensor, labels: Tensor | None, *, update: bool | None = None) -> Tensor | DNCLoss: ...
    @renamed(x="features")
    def forward(self, features: Tensor, labels: Tensor | None = None, *, update: bool | None = None) -> Tensor | DNCLoss:
        """Logits [N,C] of features [N,D]; float32, or float64 for float64 features.

        With labels [N] what `loss` gives: the form that ``torch.compile(classifier)`` and DistributedDataParallel see.
        """
        if labels is not None:
            return self.loss(features, labels, update=update)
        check_value(update is None, f"{type(self).__name__}.forward", "update", "None without labels", update)
        self._check_features("forward", features)
        e, gain = self._embed_with_gain(features)
        return self.logits(ops.class_scores(e, self.snapshot()).scores, gain)

    if TYPE_CHECKING:  # torch's own gives Any
        __call__ = forward

    @renamed(x="features")
    def loss(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss; afterwards the sub-centroids move and the memory takes the batch.

        Args:
            features: [N,D], any float dtype.
            labels: [N], any integer dtype, in [0,C); `ignore_index` or any negative id leaves a sample out.
            update: move the sub-centroids; None: in training mode. With several ranks an update is a collective call.

        Returns:
            `DNCLoss`; as for `DNCHead.loss` where nothing is labelled or a feature is not finite. Neither [N,C,K] nor [N,C] is
            stored.

        Raises:
            ValueError, TypeError: as for `DNCHead.loss`.
        """
        op = f"{type(self).__name__}.loss"
        self._check_features("loss", features)
        check_labels(op, labels, features)
        update = self._moves(op, update)
        labels, ignored, wrong = sort_out_labels(op, labels, self.num_classes, self.ignore_index)
        labels = without_ignored(labels.to(torch.int64), ignored)
        (e, gain), p = self._embed_with_gain(features), self.snapshot(update)
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
        return DNCLoss(loss, cross_entropy, ppc, ppd, accuracy)

    def _cluster_with_memory(self, p: Tensor, group: Tensor, own: Tensor) -> Tensor:
        n = len(group)
        if self.memory is not None:
            group = torch.cat([group, self.memory.read().labels])
            own = torch.cat([own, self.memory.own_similarity(p).to(own.dtype)])
        return self._cluster(own, group, joint=False)[:n]

    def _cluster_and_update(self, e: Tensor, p: Tensor, group: Tensor, own: Tensor, correct: Tensor, tally: Tensor) -> Tensor:
        """Cluster, update and remember the batch of all ranks; return the clusters of this rank's samples."""
        n, first = len(group), 0
        joint = self.sync != "average" and _sync.ranks(self.peers) > 1
        if joint:
            first, (e, group, own, flags) = _sync.gather_rows(self.peers, e, group, own, correct.to(torch.int64))
            correct = flags > 0
            (tally,) = _sync.sum_over_ranks(self.peers, tally)
        cluster = self._cluster_with_memory(p, group, own)
        if joint and self.assignment == "gumbel":
            _sync.take_from_first_rank_(self.peers, cluster)  # every rank has drawn noise of its own
        start_from = None
        if self.memory is not None and self._start_pending:
            held = self.memory.read()
            start_from = torch.cat([e.to(held.features.dtype), held.features]), torch.cat([group, held.labels])
        self._update(e, cluster, correct, own, gathered=joint, start_from=start_from)
        self._write_down(tally)
        if self.memory is not None:
            self.memory._push(e, group)
        return cluster[first : first + n]

    @renamed(x="features")
    @torch.no_grad()
    def predict(self, features: Tensor) -> Tensor:
        """Classes [N] int64 of features [N,D]. Without LayerNorm over classes no [N,C] exists and a NaN sample gives -1."""
        self._check_features("predict", features)
        if self.scores == "norm":
            return self(features).argmax(1)
        # not self.explain: torch.export.load refuses a no_grad within another
        return ops.nearest_centroid(self.embed(features), self.snapshot()).label

    @renamed(x="features")
    @torch.no_grad()
    def explain(self, features: Tensor) -> ops.NearestCentroid:
        """The sub-centroid that each sample is nearest to: (label, sub, score), each [N]; see `NearestSamples`."""
        self._check_features("explain", features)
        return ops.nearest_centroid(self.embed(features), self.snapshot())

    def _load_from_state_dict(self, *arguments: Any) -> None:
        super()._load_from_state_dict(*arguments)
        if self.memory is not None and self.memory.pushed.is_meta and not self.prototypes.is_meta:  # loaded with assign=True
            self.memory.to_empty(device=self.prototypes.device)

    @torch.no_grad()
    def initialize_from_(self, features: Tensor, labels: Tensor, *, refinements: int = 5) -> Tensor:
        """Start the sub-centroids from features [N,D] and labels [N] as of `loss`; see `SubCentroids.initialize_from_`."""
        op = f"{type(self).__name__}.initialize_from_"
        self._check_features("initialize_from_", features)
        check_labels(op, labels, features)
        labels, ignored, _ = sort_out_labels(op, labels, self.num_classes, self.ignore_index)
        return super().initialize_from_(
            self.embed(features), without_ignored(labels.to(torch.int64), ignored), refinements=refinements
        )
