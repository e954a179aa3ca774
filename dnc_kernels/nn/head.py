"""Segmentation head of Deep Nearest Centroids."""

from __future__ import annotations

import torch
from torch import Generator, Tensor, nn

from .. import ops
from ..errors import check_value
from ..ops._common import check_choice
from ._base import CentroidModel, DNCLoss, check_features, check_labels
from ._labels import resize_labels, sort_out_labels
from .subcentroids import Momentum

LOSS_SIZES = ("labels", "features")


class DNCHead(CentroidModel):
    """Pixels are classified by their nearest sub-centroid; the loss trains the features, clustering moves the sub-centroids.

    Everything that is None by default comes from the recipe (`RECIPES`); naming an option overrides the recipe's.

    Args:
        in_channels: channels of the features.
        num_classes: C.
        num_subcentroids: K, at most 256.
        embed_channels: project the features to this many channels first, with a 1x1 convolution; None: no projection.
        momentum, epsilon, iterations, assignment, update_from, init, init_step, warmup_steps, revive_after: see `SubCentroids`.
        ignore_index: label to leave out; outside [0,C).
        ppc_weight, ppd_weight: of the pixel-to-sub-centroid contrast and distance losses. 0: not computed, reported as 0.
        align_corners: of the bilinear upsampling of logits.
        sync: data parallel, see `SubCentroids`.
        scores: how similarities in [-1,1] become logits. ``norm``: LayerNorm over the classes, as released, which bounds a
            logit by sqrt(C-1) times its gain; ``temperature``: divided by `temperature`; ``scale``: times exp(logit_scale),
            learnable.
        temperature: of ``scores="temperature"``.
        scale: what ``scores="scale"`` begins with.
        confidence: ``length``: a pixel's logits are also multiplied by the length (standard deviation over the channels) that
            LayerNorm takes from its feature, so that it can say how sure it is; the nearest sub-centroid stays the same.
            ``none``: as released. Without effect with ``scores="norm"``.
        label_mode: which label a feature gets, as in `F.interpolate`: ``nearest`` (as released: the first pixel of its cell) or
            ``nearest-exact`` (the middle one, where upsampling without align_corners puts the feature).
        ppc_temperature: divides the similarities of the contrast loss.
        class_weight: [C] weights of the cross-entropy.
        label_smoothing: of the cross-entropy, in [0,1].
        loss_size: ``labels``: logits upsampled to the labels (as released); ``features``: labels reduced to the features, one
            fused pass without [N,C] in memory.
        recipe: name in `RECIPES`; None: ``default``.
        generator: source of every draw; None: torch's global one.
        device, dtype: of parameters; sub-centroids stay in float32 at least.

    Attributes:
        prototypes, feat_norm, mask_norm: the released state-dict names (mask_norm with ``scores="norm"`` only). `logit_scale`
            and `projection` are added where used.
        class_counts: [C] int64, labelled pixels of each class at feature size in the last training step (of all ranks).
        nonfinite_pixels, bad_labels: int64, pixels with a NaN or Inf feature, and labels out of range, met in training so far.
            Not in the state dict; reading them costs a sync on CUDA.
    """

    def __init__(
        self,
        in_channels: int,
        num_classes: int,
        num_subcentroids: int = 10,
        embed_channels: int | None = None,
        momentum: Momentum | None = None,
        epsilon: float | None = None,
        iterations: int | None = None,
        assignment: str | None = None,
        ignore_index: int = 255,
        ppc_weight: float | None = None,
        ppd_weight: float | None = None,
        align_corners: bool = False,
        sync: str = "auto",
        *,
        scores: str | None = None,
        temperature: float | None = None,
        scale: float | None = None,
        confidence: str | None = None,
        label_mode: str | None = None,
        ppc_temperature: float | None = None,
        update_from: str | None = None,
        init: str | None = None,
        init_step: int | None = None,
        warmup_steps: int | None = None,
        revive_after: int | None = None,
        class_weight: Tensor | list[float] | None = None,
        label_smoothing: float | None = None,
        loss_size: str = "labels",
        recipe: str | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_channels", in_channels), ("embed_channels", embed_channels or 1)):
            check_value(isinstance(value, int) and value > 0, "DNCHead", name, "a positive integer", value)
        check_choice("DNCHead", "loss_size", loss_size, LOSS_SIZES)
        super().__init__(
            embed_channels or in_channels, num_classes, num_subcentroids,
            recipe=recipe, ignore_index=ignore_index, class_weight=class_weight, sync=sync, generator=generator,
            device=device, dtype=dtype,
            options={
                "momentum": momentum, "epsilon": epsilon, "iterations": iterations, "assignment": assignment,
                "ppc_weight": ppc_weight, "ppd_weight": ppd_weight, "ppc_temperature": ppc_temperature,
                "scores": scores, "temperature": temperature, "scale": scale, "confidence": confidence,
                "label_mode": label_mode,
                "update_from": update_from, "init": init, "init_step": init_step, "warmup_steps": warmup_steps,
                "revive_after": revive_after, "label_smoothing": label_smoothing,
            },
        )  # fmt: skip
        self.in_channels, self.align_corners, self.loss_size = in_channels, align_corners, loss_size
        self.projection = nn.Conv2d(in_channels, embed_channels, 1, device=device, dtype=dtype) if embed_channels else None

    def embed(self, features: Tensor) -> Tensor:
        """Unit-length embedding [B,D,h,w] of features [B,in_channels,h,w], after the projection if there is one."""
        return super().embed(self._projected(features))

    def _projected(self, features: Tensor) -> Tensor:
        check_features("DNCHead", features, 4, self.in_channels)
        return features if self.projection is None else self.projection(features)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B,C,h,w] of features [B,in_channels,h,w]; float32, or float64 for float64 features."""
        x = self._projected(features)
        return self.logits(ops.class_scores(super().embed(x), self.snapshot()).scores, self.gain(x))

    def loss(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss; afterwards the sub-centroids move.

        Cross-entropy + ppc_weight * PPC + ppd_weight * PPD. No host sync. Clustering, PPC and PPD look at the features' own
        pixels, with the nearest label; what backward needs is a copy of the sub-centroids, so the update may come first.

        Args:
            features: [B,in_channels,h,w], any float dtype, either memory format.
            labels: [B,H,W], any integer dtype, in [0,C) or `ignore_index`.
            update: move the sub-centroids; None: in training mode. With several ranks an update is a collective call.

        Returns:
            `DNCLoss`. `accuracy` is that of the labelled pixels at feature size. Without any labelled pixel: zeros with zero
            gradients, and nothing moves. A NaN or Inf feature makes the loss NaN, as in torch, and moves nothing.

        Raises:
            ValueError, TypeError: wrong shape, device or dtype; a label out of range (on CUDA or when compiled such labels are
                left
            out and counted in `bad_labels`; DNC_KERNELS_DEBUG=1 makes CUDA raise too).
        """
        check_features("DNCHead", features, 4, self.in_channels)
        check_labels("DNCHead", labels, features)
        update = self.training if update is None else update
        labels, wrong = sort_out_labels("DNCHead", labels, self.num_classes, self.ignore_index)
        small = resize_labels(labels, (features.shape[2], features.shape[3]), self.label_mode)
        x, p = self._projected(features), self.snapshot(update)
        e, gain = super().embed(x), self.gain(x)
        if self.loss_size == "labels":
            scores, _, own = ops.class_scores(e, p, small)
            assert own is not None
            logits = self.logits(scores, gain)
            total = ops.upsample_cross_entropy(
                logits, labels, align_corners=self.align_corners, class_weight=self.class_weight, ignore_index=-1,
                label_smoothing=self.label_smoothing, reduction="sum",
            )  # fmt: skip
            cross_entropy = self._mean(total, labels)
            # a pixel with a non-finite feature has NaN scores in every class
            finite, prediction = scores.detach()[:, 0].isfinite().reshape(-1), logits.detach().argmax(1).reshape(-1)
        else:
            total, prediction, own = self._fused_cross_entropy(e, p, small, gain)
            cross_entropy = self._mean(total, small)
            finite, prediction = (prediction >= 0).reshape(-1), prediction.reshape(-1)
        flat = small.reshape(-1)
        group = torch.where(finite, flat, -1)
        correct = (prediction == group) & (group >= 0)
        accuracy = correct.sum() / (group >= 0).sum().clamp(min=1)
        ppc = ppd = cross_entropy.new_zeros(())
        if update or self.ppc_weight or self.ppd_weight:
            cluster = self.cluster(own, group, joint=update)
            ppc, ppd = self._contrast(e, p, cluster, own)
            if update:
                with torch.no_grad():
                    tally = self._update(e, cluster, correct, own, self._tally(flat, finite, wrong))
                    assert tally is not None
                    self._write_down(tally)
        loss = self._weighted(cross_entropy, ppc, ppd)
        return DNCLoss(loss, cross_entropy.detach(), ppc.detach(), ppd.detach(), accuracy)

    @torch.no_grad()
    def predict(self, features: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """Classes [B,H,W] int64 at `size` (None: that of the features): argmax of the upsampled logits, never stored."""
        logits = self(features)
        if size is None or tuple(size) == tuple(features.shape[2:]):
            return logits.argmax(1)
        check_value(len(size) == 2 and min(size) > 0, "DNCHead", "size", "(height, width)", size)
        return ops.upsample_argmax(logits, tuple(size), align_corners=self.align_corners)

    @torch.no_grad()
    def explain(self, features: Tensor) -> ops.NearestCentroid:
        """The sub-centroid that each pixel is nearest to: (label, sub, score), each [B,h,w]; `NearestSamples` says what it
        stands for.

        `label` is the prediction at feature size unless the affine of the LayerNorm over classes overrules the nearest.
        """
        return ops.nearest_centroid(self.embed(features), self.prototypes)

    @torch.no_grad()
    def initialize_from_(self, features: Tensor, labels: Tensor, *, refinements: int = 5) -> Tensor:
        """Start the sub-centroids from features [B,in_channels,h,w] and labels [B,H,W]; see `SubCentroids.initialize_from_`."""
        check_features("DNCHead", features, 4, self.in_channels)
        check_labels("DNCHead", labels, features)
        labels, _ = sort_out_labels("DNCHead", labels, self.num_classes, self.ignore_index)
        small = resize_labels(labels, (features.shape[2], features.shape[3]), self.label_mode)
        return super().initialize_from_(self.embed(features), small, refinements=refinements)

    def extra_repr(self) -> str:
        """Sizes and the choices that differ in kind."""
        weights = f"ppc_weight={self.ppc_weight}, ppd_weight={self.ppd_weight}"
        return f"in_channels={self.in_channels}, {super().extra_repr()}, scores={self.scores!r}, {weights}"
