"""Segmentation head of Deep Nearest Centroids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, overload

import torch
from torch import Generator, Tensor, nn

from .. import ops
from .._tensors import flat_pixels, without_ignored
from ..backends import transformed
from ..errors import FLOATS, check_dtype, check_flag, check_value, map_size, whole_number
from . import _graph
from ._base import CentroidModel, DNCLoss, check_features, check_labels
from ._choices import (
    Assignment,
    Checkpoint,
    Confidence,
    Init,
    LabelMode,
    LossSize,
    Recipe,
    Scores,
    Sync,
    UpdateFrom,
    check_word,
)
from ._graphed import GraphedLoss
from ._labels import labels_of_step, pixels_at, sample_of_each_class, sort_out_labels
from ._momentum import Momentum
from ._step import loss_in_bands
from ._step_bytes import Sizes, bytes_on_cpu, bytes_on_gpu

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class DNCHead(CentroidModel):
    """Pixels are classified by their nearest sub-centroid; the loss trains the features, clustering moves the sub-centroids.

    An option that is None takes its default from the recipe (`RECIPES`), given here as "Default"; naming an option overrides
    that of the recipe.

    Args:
        in_channels: channels of the features.
        num_classes: C.
        num_subcentroids: K, at most 256.
        embed_channels: project the features to this many channels first, with a 1x1 convolution; None: no projection.
        momentum: share of the old sub-centroid that an update keeps; a number, a ramp or a function (`SubCentroids`).
            Default: Recent(fraction=0.5, start=0.99) (released: 0.999).
        epsilon: entropy of the optimal transport. Default: 0.05.
        iterations: of the optimal transport. Default: 3.
        assignment: ``argmax`` of the transport plan, or ``gumbel`` (`SubCentroids`). Default: ``argmax``.
        ignore_index: label to leave out, outside [0,C). Any negative label is left out too.
        ppc_weight: weight of the pixel-to-sub-centroid contrast; 0: not computed, reported as 0. Default: 0.1
            (released: 0.01).
        ppd_weight: weight of the pixel-to-sub-centroid distance; 0: not computed, reported as 0. Default: 0.1
            (released: 0.001).
        align_corners: of the bilinear upsampling of logits.
        sync: data parallel, see `SubCentroids`.
        scores: how similarities in [-1,1] become logits. ``norm``: LayerNorm over the classes, as released, which bounds a
            logit by sqrt(C-1) times its gain; ``temperature``: divided by `temperature`; ``scale``: times exp(logit_scale),
            learnable. Default: ``scale`` (released: ``norm``).
        temperature: of ``scores="temperature"``. Default: 0.1.
        scale: what ``scores="scale"`` begins with. Default: 10.0.
        confidence: ``length``: a pixel's logits are also multiplied by the length (standard deviation over the channels) that
            LayerNorm takes from its feature. It scales the confidence and never changes which sub-centroid is nearest.
            ``none``: they are not. Without effect with ``scores="norm"``. Default: ``length`` (released: ``none``).
        label_mode: which label a feature gets, as in `F.interpolate`: ``nearest`` (the first pixel of its cell) or
            ``nearest-exact`` (the middle one, where upsampling without align_corners puts the feature).
            Default: ``nearest-exact`` (released: ``nearest``).
        ppc_temperature: divides the similarities of the contrast loss. Default: 0.1 (released: 1.0).
        update_from: ``correct``: only correctly classified pixels move sub-centroids; ``all``: every labelled pixel.
            Default: ``correct``.
        init: where sub-centroids start: ``random``, ``orthogonal`` or ``data`` (`SubCentroids`).
            Default: ``orthogonal`` (released: ``random``).
        init_step: the update that ``init="data"`` replaces. Default: 0.
        warmup_steps: updates that are counted but move nothing. Default: 0.
        revive_after: move a sub-centroid without a pixel in this many updates (`SubCentroids`); 0: never. Default: None.
        class_weight: [C] weights of the cross-entropy; None: all are 1.
        label_smoothing: of the cross-entropy, in [0,1]. Default: 0.0.
        loss_size: ``labels``: logits upsampled to the labels (as released); ``features``: labels reduced to the features.
        checkpoint: what is recomputed in a training step: ``all``: embedding and scores, band by band of rows; ``scores``: the
            scores; ``none``: nothing, every part of the step is an op of its own. docs/layer.md has the memory formula of each.
            The gradients are the same to rounding.
        band_pixels: about how many pixels a band of ``checkpoint="all"`` and ``"scores"`` has; None: 1024 on a CPU; on
            other devices as many as 1 GiB has room for. Longer bands are fewer calls and more memory.
        pixels_per_class: at most so many pixels of each class, drawn anew in every step, take part in clustering, contrast and
            update; None: all. The cross-entropy sees all pixels.
        accumulation_steps: losses of a training step whose gradients add up: their sums of pixels add up too, and the
            sub-centroids move once, at the last.
        recipe: name in `RECIPES`; None: ``default``, which is ``segmentation``.
        process_group: the ranks that `sync` is about (`SubCentroids`); None: all.
        generator: source of every draw; None: torch's global one.
        device, dtype: of parameters; None: torch's defaults. Sub-centroids stay in float32 at least.

    Attributes:
        prototypes, feat_norm, mask_norm: the released state-dict names (mask_norm with ``scores="norm"`` only). `logit_scale`
            and `projection` are added where used.
        class_counts: [C] int64, labelled pixels of each class at feature size in the last training step (of all ranks).
        nonfinite_pixels, bad_labels: int64, pixels with a NaN or Inf feature, and labels out of range, met in training so far.
            Not in the state dict; reading them costs a sync on CUDA.
    """

    default_recipe = "segmentation"

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_subcentroids: int = 10,
        embed_channels: int | None = None,
        momentum: Momentum | None = None,
        epsilon: float | None = None,
        iterations: int | None = None,
        assignment: Assignment | None = None,
        ignore_index: int = 255,
        ppc_weight: float | None = None,
        ppd_weight: float | None = None,
        align_corners: bool = False,
        sync: Sync = "auto",
        *,
        scores: Scores | None = None,
        temperature: float | None = None,
        scale: float | None = None,
        confidence: Confidence | None = None,
        label_mode: LabelMode | None = None,
        ppc_temperature: float | None = None,
        update_from: UpdateFrom | None = None,
        init: Init | None = None,
        init_step: int | None = None,
        warmup_steps: int | None = None,
        revive_after: int | None = None,
        class_weight: Tensor | list[float] | None = None,
        label_smoothing: float | None = None,
        loss_size: LossSize = "labels",
        checkpoint: Checkpoint = "all",
        band_pixels: int | None = None,
        pixels_per_class: int | None = None,
        accumulation_steps: int = 1,
        recipe: Recipe | None = None,
        process_group: ProcessGroup | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        op = type(self).__name__
        in_channels = whole_number(op, "in_channels", in_channels)
        if embed_channels is not None:
            embed_channels = whole_number(op, "embed_channels", embed_channels, 1, "None or a positive integer")
        for name, word in (("loss_size", loss_size), ("checkpoint", checkpoint)):
            check_word(op, name, word)
        if band_pixels is not None:
            band_pixels = whole_number(op, "band_pixels", band_pixels, 1, "None or a positive integer")
        if pixels_per_class is not None:
            pixels_per_class = whole_number(op, "pixels_per_class", pixels_per_class, 1, "None or a positive integer")
        super().__init__(
            embed_channels or in_channels, num_classes, num_subcentroids,
            recipe=recipe, ignore_index=ignore_index, class_weight=class_weight, sync=sync,
            process_group=process_group, accumulation_steps=accumulation_steps, generator=generator, device=device, dtype=dtype,
            options={
                "momentum": momentum, "epsilon": epsilon, "iterations": iterations, "assignment": assignment,
                "ppc_weight": ppc_weight, "ppd_weight": ppd_weight, "ppc_temperature": ppc_temperature,
                "scores": scores, "temperature": temperature, "scale": scale, "confidence": confidence,
                "label_mode": label_mode,
                "update_from": update_from, "init": init, "init_step": init_step, "warmup_steps": warmup_steps,
                "revive_after": revive_after, "label_smoothing": label_smoothing,
            },
        )  # fmt: skip
        self.in_channels, self.embed_channels = in_channels, embed_channels
        check_flag(op, "align_corners", align_corners)
        self.align_corners, self.loss_size = bool(align_corners), loss_size
        self.checkpoint: Checkpoint = checkpoint
        self.band_pixels, self.pixels_per_class = band_pixels, pixels_per_class
        self.projection = None
        if embed_channels is not None:
            self.projection = nn.Conv2d(in_channels, embed_channels, 1, device=device, dtype=dtype)

    def embed(self, features: Tensor) -> Tensor:
        """Unit-length embedding [B,D,h,w] of features [B,in_channels,h,w], after the projection if there is one."""
        self._check_features("embed", features)
        return super().embed(self._projected(features))

    def _check_features(self, function: str, features: Tensor) -> None:
        check_features(f"{type(self).__name__}.{function}", features, 4, self.in_channels, self)

    def _projected(self, features: Tensor) -> Tensor:
        return features if self.projection is None else self.projection(features)

    @overload
    def forward(self, features: Tensor, labels: None = None, *, update: None = None) -> Tensor: ...
    @overload
    def forward(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss: ...
    @overload
    def forward(self, features: Tensor, labels: Tensor | None, *, update: bool | None = None) -> Tensor | DNCLoss: ...
    def forward(self, features: Tensor, labels: Tensor | None = None, *, update: bool | None = None) -> Tensor | DNCLoss:
        """Logits [B,C,h,w] of features [B,in_channels,h,w]; float32, or float64 for float64 features.

        With labels [B,H,W] what `loss` gives: the form that ``torch.compile(head)`` and DistributedDataParallel see.
        """
        if labels is not None:
            return self.loss(features, labels, update=update)
        check_value(update is None, f"{type(self).__name__}.forward", "update", "None without labels", update)
        self._check_features("forward", features)
        e, gain = self._embed_with_gain(self._projected(features))
        return self.logits(ops.class_scores(e, self.snapshot()).scores, gain)

    if TYPE_CHECKING:  # torch's own gives Any
        __call__ = forward

    def loss(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss; afterwards the sub-centroids move.

        Cross-entropy + ppc_weight * PPC + ppd_weight * PPD. No host sync. Clustering, PPC and PPD look at the features' own
        pixels, with the nearest label. Differentiable once in the features and the head's parameters; backward does not look at
        the sub-centroids again, so the update may come first. `step_bytes` says what memory it takes.

        Args:
            features: [B,in_channels,h,w], any float dtype, either memory format.
            labels: [B,H,W], any integer dtype, in [0,C); `ignore_index` or any negative id leaves a pixel out.
            update: move the sub-centroids; None: in training mode. With several ranks an update is a collective call.

        Returns:
            `DNCLoss`, whose parts carry gradients too. `accuracy` is that of the labelled pixels at feature size. Without any
            labelled pixel: zeros with zero gradients, and nothing moves. A NaN or Inf feature makes the loss NaN, as in torch,
            and moves nothing.

        Raises:
            ValueError, TypeError: wrong shape, device or dtype; a label at or beyond C that is not `ignore_index` (on CUDA or
                when compiled such labels are left out and counted in `bad_labels`; DNC_KERNELS_DEBUG=1 makes CUDA raise too).
            RuntimeError: a step that moves sub-centroids runs inside a backward pass (activation checkpointing around the
                head), or backward is called with create_graph=True
                (docs/backends.md, "Derivatives", has the way to second derivatives).
        """
        op = f"{type(self).__name__}.loss"
        self._check_features("loss", features)
        if features.shape[2] == 0 or features.shape[3] == 0:
            check_value(False, op, "features", "of at least one row and column", features)
        check_labels(op, labels, features)
        update = self._moves(op, update)
        if update and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                f"{op}: run again inside a backward pass, as activation checkpointing does, it would move the "
                "sub-centroids twice; put the checkpoint around the backbone alone (DNCHead(checkpoint=...) saves the head's "
                "own memory)"
            )
        if self.checkpoint == "none" or transformed():
            return self._compose(
                self._projected(features), *sort_out_labels(op, labels, self.num_classes, self.ignore_index), update
            )
        return loss_in_bands(
            self, self._projected(features), *labels_of_step(op, labels, self.num_classes, self.ignore_index), update
        )

    def _sampled(self, small: Tensor) -> Tensor:
        """Labels [N] of the pixels that cluster, and of the contrast; -1 for the others."""
        if self.pixels_per_class is None:
            return small
        uniform = _graph.uniform(self, small.shape, small.device)
        return sample_of_each_class(small, self.num_classes, self.pixels_per_class, uniform)

    def _compose(self, x: Tensor, labels: Tensor, ignored: int, wrong: Tensor, update: bool) -> DNCLoss:
        small = without_ignored(pixels_at(labels, x.shape[2:], self.label_mode).to(torch.int64), ignored)
        if self.loss_size == "features":
            labels, ignored = small, -1
        sampled = self._sampled(small.reshape(-1))
        p = self.snapshot(update)
        e, gain = self._embed_with_gain(x)
        total_weight, count = self._denominators(labels, ignored, sampled, joint=update)
        if self.loss_size == "labels":
            scores, _, own = ops.class_scores(e, p, sampled.view_as(small))
            assert own is not None
            own = flat_pixels(own)
            logits = self.logits(scores, gain)
            total = ops.upsample_cross_entropy(
                logits, labels, align_corners=self.align_corners, weight=self.class_weight, ignore_index=ignored,
                label_smoothing=self.label_smoothing, reduction="sum",
            )  # fmt: skip
            # a pixel with a non-finite feature has NaN scores in every class
            finite, prediction = scores.detach()[:, 0].isfinite().reshape(-1), logits.detach().argmax(1).reshape(-1)
        else:
            total, prediction, own = self._fused_cross_entropy(e, p, small, gain)
            finite, prediction = (prediction >= 0).reshape(-1), prediction.reshape(-1)
        cross_entropy = total / total_weight
        _, correct, accuracy = self._judge(prediction, finite, small)
        ppc = ppd = cross_entropy.new_zeros(())
        if update or self.ppc_weight or self.ppd_weight:
            cluster = self._cluster(own, torch.where(finite, sampled, -1), joint=update)
            ppc, ppd = self._contrast(e, p, cluster, own, count)
            if update:
                with torch.no_grad():
                    self._write_down(self._update(e, cluster, correct, own, self._tally(small.reshape(-1), finite, wrong)))
        loss = self._weighted(cross_entropy, ppc, ppd)
        return DNCLoss(loss, cross_entropy, ppc, ppd, accuracy)

    def graphed(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> GraphedLoss:
        """`loss` as a CUDA graph, for an ordinary training loop: ``loss = head.graphed(features, labels)`` once, then
        ``loss(features, labels).loss.backward()`` in every step.

        A step is two dozen launches, which take the host longer than a GPU with few pixels. Replaying them costs it one. What
        the graph holds on to, and what it asks for, says `GraphedLoss`. The sub-centroids do not move here.

        Args:
            features: [B,in_channels,h,w] like those to come: shape, dtype, device and memory format.
            labels: [B,H,W] like those to come.
            update: move the sub-centroids; None: in training mode, as the head is now.

        Raises:
            ValueError, TypeError: as of `loss`; or the head does what no graph holds: a start from data that is to come, a
                `Monitor`, accumulation, a generator, several ranks, ``checkpoint="none"``.
        """
        op = f"{type(self).__name__}.graphed"
        self._check_features("graphed", features)
        check_labels(op, labels, features)
        return GraphedLoss(self, features, labels, self._moves(op, update))

    def step_bytes(
        self,
        features: Sequence[int],
        labels: Sequence[int],
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> int:
        """Memory that `loss` and its backward need beside features, labels and the head itself, at most: a formula.

        N feature pixels of D channels and b bytes, L label pixels, M = C*K and bands of P pixels. On a CPU P is `band_pixels`,
        or two rows if those are longer; as many times for every two threads of torch::

            all     N (D b + 4 K + 60) + 8 L + max(12 L + P (8 D + 32 C), 4 N K) + 48 M D + 8 MB
            scores  the same, and N D b for the embedding
            none    N (5 D b + 26 C + 4 K + 60) + 8 L + max(12 L, 4 N K) + 48 M D + 8 MB

        On a GPU, with Triton's kernels, P is `band_pixels` and a row, and N where one band holds all of them::

            all     N (D b + 4 K + 80) + max(P (D b + 10 C + 16 + 12 L / N) + S, N (D / 8 + 40)) + 16 M D + 5 KB (C + D) + 1 MB
            scores  the same, with N D b for the embedding in place of P D b, as `all` has in one band
            none    N (3 D b + 30 C + 4 K + 80) + max(20 L + S, N (D / 8 + 40)) + 48 M D + 5 KB (C + D) + 1 MB

        The bands and the clustering follow each other. ``assignment="gumbel"`` doubles the 4 N K of the clustering on a CPU,
        and adds 8 N K to it on a GPU. The gradient of the features is the N D b of ``all``, which keeps the embedding too where
        `revive_after` is given. On a GPU ``scores="norm"`` makes 14 C of 10 C and 18 C of 30 C; without PPC 3 D b is 2 D b;
        S, for the contrast of float32 or more than 256 channels, is 52 MB, or P (b + 1) (1.25 M + 128) if that is less; an
        update beside the last kernel (`revive_after`, `accumulation_steps`) takes 48 M D.

        A backward pass from the parts of the loss takes a second gradient (`DNCLoss`). A projection's own output and gradient
        come on top, and so does what a start from data and an exchange between ranks take; on a GPU also a copy of labels that
        are not int64, int32 or uint8, what CUDA C++ kernels work in, and the small ops of what no kernel takes (float64, more
        than 1024 classes or 64 sub-centroids).

        Args:
            features: shape [B,D,h,w] of the features, after the projection if there is one.
            labels: shape [B,H,W].
            dtype: of the features.
            device: that the step runs on; None: the head's.
        """
        op = f"{type(self).__name__}.step_bytes"
        for name, sizes, axes in (("features", features, "B,D,h,w"), ("labels", labels, "B,H,W")):
            length = axes.count(",") + 1
            ok = len(sizes) == length and all(whole_number(op, name, size, 0) >= 0 for size in sizes)
            check_value(ok, op, name, f"a shape [{axes}]", list(sizes))
        check_dtype(dtype in FLOATS, op, "dtype", "a float dtype such as torch.float16", dtype)
        batch, channels, height, width = features
        step = Sizes(batch * height * width, width, channels, dtype.itemsize, math.prod(labels))
        device = self.prototypes.device if device is None else torch.device(device)
        return bytes_on_cpu(self, step) if device.type == "cpu" else bytes_on_gpu(self, step)

    @torch.no_grad()
    def predict(self, features: Tensor, size: int | Sequence[int] | None = None) -> Tensor:
        """Classes [B,H,W] int64: argmax of the upsampled logits, which are never stored.

        Args:
            features: [B,in_channels,h,w].
            size: (H, W), or one number for both; None: that of the features.
        """
        self._check_features("predict", features)
        if size is None:
            return self(features).argmax(1)
        # also to the size of the features: asking whether it is that would tie an exported program to the answer
        size = map_size(f"{type(self).__name__}.predict", size)
        return ops.upsample_argmax(self(features), size, align_corners=self.align_corners)

    @torch.no_grad()
    def explain(self, features: Tensor) -> ops.NearestCentroid:
        """The sub-centroid that each pixel is nearest to: (label, sub, score), each [B,h,w]; `NearestSamples` says what it
        stands for.

        `label` is the prediction at feature size unless the affine of the LayerNorm over classes overrules the nearest.
        """
        self._check_features("explain", features)
        return ops.nearest_centroid(self.embed(features), self.snapshot())

    @torch.no_grad()
    def initialize_from_(self, features: Tensor, labels: Tensor, *, refinements: int = 5) -> Tensor:
        """Start the sub-centroids from features [B,in_channels,h,w] and labels [B,H,W] as of `loss`; see
        `SubCentroids.initialize_from_`.
        """
        op = f"{type(self).__name__}.initialize_from_"
        self._check_features("initialize_from_", features)
        check_labels(op, labels, features)
        labels, ignored, _ = sort_out_labels(op, labels, self.num_classes, self.ignore_index)
        small = without_ignored(pixels_at(labels, features.shape[2:], self.label_mode).to(torch.int64), ignored)
        return super().initialize_from_(self.embed(features), small, refinements=refinements)
