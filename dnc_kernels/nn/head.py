"""Segmentation head of Deep Nearest Centroids."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Generator, Tensor, nn

from .. import ops
from ..errors import check_value
from ..ops._common import check_choice, compute_dtype, flat_pixels
from ._base import CentroidModel, DNCLoss, check_features, check_labels
from ._labels import resize_labels, sample_of_each_class, sort_out_labels, without_ignored
from ._step import BAND_PIXELS, Made, first_pass, second_pass
from .subcentroids import Momentum

LOSS_SIZES = ("labels", "features")
CHECKPOINTS = ("none", "scores", "all")


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
        loss_size: ``labels``: logits upsampled to the labels (as released); ``features``: labels reduced to the features.
        checkpoint: what a training step makes again instead of keeping it: ``all``: embedding and scores, band by band of rows;
            ``scores``: the scores; ``none``: nothing, every part of the step is an op of its own. docs/layer.md has the memory
            formula of each. The gradients are the same to rounding.
        band_pixels: about how many pixels a band of ``checkpoint="all"`` and ``"scores"`` has; None: 2048 on a CPU, 32768 on
            other devices. Longer bands are fewer calls and more memory.
        pixels_per_class: at most so many pixels of each class, drawn anew in every step, take part in clustering, contrast and
            update; None: all. The cross-entropy sees all pixels.
        accumulation_steps: losses of a training step whose gradients add up: their sums of pixels add up too, and the
            sub-centroids move once, at the last.
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
        checkpoint: str = "all",
        band_pixels: int | None = None,
        pixels_per_class: int | None = None,
        accumulation_steps: int = 1,
        recipe: str | None = None,
        generator: Generator | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        for name, value in (("in_channels", in_channels), ("embed_channels", embed_channels or 1)):
            check_value(isinstance(value, int) and value > 0, "DNCHead", name, "a positive integer", value)
        check_choice("DNCHead", "loss_size", loss_size, LOSS_SIZES)
        check_choice("DNCHead", "checkpoint", checkpoint, CHECKPOINTS)
        for name, number in (("band_pixels", band_pixels), ("pixels_per_class", pixels_per_class)):
            positive = number is None or (isinstance(number, int) and number > 0)
            check_value(positive, "DNCHead", name, "None or a positive integer", number)
        super().__init__(
            embed_channels or in_channels, num_classes, num_subcentroids,
            recipe=recipe, ignore_index=ignore_index, class_weight=class_weight, sync=sync,
            accumulation_steps=accumulation_steps, generator=generator, device=device, dtype=dtype,
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
        self.checkpoint, self.band_pixels, self.pixels_per_class = checkpoint, band_pixels, pixels_per_class
        self.projection = nn.Conv2d(in_channels, embed_channels, 1, device=device, dtype=dtype) if embed_channels else None

    def embed(self, features: Tensor) -> Tensor:
        """Unit-length embedding [B,D,h,w] of features [B,in_channels,h,w], after the projection if there is one."""
        return super().embed(self._projected(features))

    def _projected(self, features: Tensor) -> Tensor:
        check_features("DNCHead", features, 4, self.in_channels)
        return features if self.projection is None else self.projection(features)

    def forward(self, features: Tensor) -> Tensor:
        """Logits [B,C,h,w] of features [B,in_channels,h,w]; float32, or float64 for float64 features."""
        e, gain = self._embed_with_gain(self._projected(features))
        return self.logits(ops.class_scores(e, self.snapshot()).scores, gain)

    def loss(self, features: Tensor, labels: Tensor, *, update: bool | None = None) -> DNCLoss:
        """Training loss; afterwards the sub-centroids move.

        Cross-entropy + ppc_weight * PPC + ppd_weight * PPD. No host sync. Clustering, PPC and PPD look at the features' own
        pixels, with the nearest label. Differentiable once in the features and the head's parameters; backward does not look at
        the sub-centroids again, so the update may come first. `step_bytes` says what memory it takes.

        Args:
            features: [B,in_channels,h,w], any float dtype, either memory format.
            labels: [B,H,W], any integer dtype, in [0,C) or `ignore_index`.
            update: move the sub-centroids; None: in training mode. With several ranks an update is a collective call.

        Returns:
            `DNCLoss`. `accuracy` is that of the labelled pixels at feature size. Without any labelled pixel: zeros with zero
            gradients, and nothing moves. A NaN or Inf feature makes the loss NaN, as in torch, and moves nothing.

        Raises:
            ValueError, TypeError: wrong shape, device or dtype; a label out of range (on CUDA or when compiled such labels are
                left out and counted in `bad_labels`; DNC_KERNELS_DEBUG=1 makes CUDA raise too).
            RuntimeError: a step that moves sub-centroids runs inside a backward pass (activation checkpointing around the
                head), or backward is called with create_graph=True.
        """
        check_features("DNCHead", features, 4, self.in_channels)
        check_labels("DNCHead", labels, features)
        update = self.training if update is None else update
        if update and not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:
            raise RuntimeError(
                "DNCHead.loss: run again inside a backward pass, as activation checkpointing does, it would move the "
                "sub-centroids twice; put the checkpoint around the backbone alone (DNCHead(checkpoint=...) saves the head's "
                "own memory)"
            )
        labels, ignored, wrong = sort_out_labels("DNCHead", labels, self.num_classes, self.ignore_index)
        small = without_ignored(resize_labels(labels, (features.shape[2], features.shape[3]), self.label_mode), ignored)
        if self.loss_size == "features":
            labels, ignored = small, -1
        sampled = small.reshape(-1)
        if self.pixels_per_class is not None:
            sampled = sample_of_each_class(sampled, self.num_classes, self.pixels_per_class, self.generator)
        step = self._compose if self.checkpoint == "none" else self._step_in_bands
        return step(self._projected(features), labels, ignored, small, sampled, wrong, update)

    def _step_in_bands(
        self, x: Tensor, labels: Tensor, ignored: int, small: Tensor, sampled: Tensor, wrong: Tensor, update: bool
    ) -> DNCLoss:
        dtype = compute_dtype(x, self.prototypes)
        p = (self.prototypes if self.training else self.snapshot()).to(dtype)
        weight, bias = (t.to(compute_dtype(x)) for t in (self.feat_norm.weight, self.feat_norm.bias))
        temperature, scale, gains, shift = 1.0, None, None, None
        if self.scores == "norm":
            gains, shift = self.mask_norm.weight.to(dtype), self.mask_norm.bias.to(dtype)
        elif self.scores == "scale":
            scale = self.logit_scale.to(dtype).exp()
        else:
            temperature = self.temperature
        inputs = (x, weight, bias, scale, gains, shift)
        gradient = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in inputs)
        with torch.no_grad():
            total_weight, count = (t.to(p.dtype) for t in self._denominators(labels, ignored, sampled, joint=update))
            # gradients are made of `unit` times the loss: in half precision they get the size of probabilities and unit vectors
            unit = torch.ones_like(count)
            if x.dtype in (torch.float16, torch.bfloat16):
                unit = count * temperature if scale is None else count * temperature / scale
            pull, contrast, distance = unit / total_weight, self.ppc_weight * unit / count, self.ppd_weight * unit / count
            needs_embedding = update and (self._start_pending or self.revive_after is not None)
            total, prediction, own, lse, statistics, grad, grad_rstd, grad_scale, grad_norm, e = first_pass(
                x.detach(), weight.detach(), bias.detach(), self.feat_norm.eps, p, labels, ignored, sampled,
                self.confidence == "length" and self.scores != "norm", temperature, *_detached(scale, gains, shift),
                self.mask_norm.eps if gains is not None else 0.0, self.class_weight, self.label_smoothing, self.align_corners,
                pull, contrast if self.ppc_weight else None, self.ppc_temperature, gradient,
                needs_embedding or (update and self.checkpoint == "scores"), self.band_pixels or 0,
            )  # fmt: skip
            finite = prediction >= 0
            _, correct, accuracy = self._judge(prediction, finite, small)
            cross_entropy = total / total_weight
            ppc = ppd = total.new_zeros(())
            target = to_target = moving = None
            if update or self.ppc_weight or self.ppd_weight:
                target = self.cluster(own, torch.where(finite, sampled, -1), joint=update)
                counted = target >= 0
                towards = own.gather(1, (target.clamp(min=0) % self.num_subcentroids)[:, None])[:, 0]
                to_target = torch.zeros_like(towards)
                if self.ppc_weight:
                    ppc = torch.where(counted, lse - towards / self.ppc_temperature, 0).sum() / count
                    to_target -= contrast / self.ppc_temperature
                if self.ppd_weight:
                    ppd = torch.where(counted, (1 - towards).square(), 0).sum() / count
                    to_target -= 2 * distance * (1 - towards)
                to_target = torch.where(counted, to_target, 0) if self.ppc_weight or self.ppd_weight else None
                if update:
                    moving = torch.where(correct, target, -1) if self.update_from == "correct" else target
            grad_affine, sums, counts = second_pass(
                grad, x.detach(), e, weight.detach(), bias.detach(), self.feat_norm.eps, statistics, grad_rstd, p,
                target, to_target, moving, gradient, self.band_pixels or 0,
            )  # fmt: skip
            if update:
                assert target is not None
                tally = self._tally(small.reshape(-1), finite, wrong)
                self._write_down(self._update(e if needs_embedding else None, target, correct, own, tally, sums=(sums, counts)))
            loss = self._weighted(cross_entropy, ppc, ppd)
        if gradient:
            made = (grad, *grad_affine, grad_scale, *grad_norm)
            loss = Made.apply(loss * unit, *made, *inputs) / unit
        return DNCLoss(loss, cross_entropy, ppc, ppd, accuracy)

    def _compose(
        self, x: Tensor, labels: Tensor, ignored: int, small: Tensor, sampled: Tensor, wrong: Tensor, update: bool
    ) -> DNCLoss:
        p = self.snapshot(update)
        e, gain = self._embed_with_gain(x)
        total_weight, count = self._denominators(labels, ignored, sampled, joint=update)
        if self.loss_size == "labels":
            scores, _, own = ops.class_scores(e, p, sampled.view_as(small))
            assert own is not None
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
        own, cross_entropy = flat_pixels(own), total / total_weight
        _, correct, accuracy = self._judge(prediction, finite, small)
        ppc = ppd = cross_entropy.new_zeros(())
        if update or self.ppc_weight or self.ppd_weight:
            cluster = self.cluster(own, torch.where(finite, sampled, -1), joint=update)
            ppc, ppd = self._contrast(e, p, cluster, own, count)
            if update:
                with torch.no_grad():
                    self._write_down(self._update(e, cluster, correct, own, self._tally(small.reshape(-1), finite, wrong)))
        loss = self._weighted(cross_entropy, ppc, ppd)
        return DNCLoss(loss, cross_entropy.detach(), ppc.detach(), ppd.detach(), accuracy)

    def step_bytes(self, features: Sequence[int], labels: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Memory that `loss` and its backward need on a CPU beside features, labels and the head itself, at most: a formula.

        With N feature pixels of D channels and b bytes, L label pixels, M = C*K and bands of P pixels (`band_pixels`)::

            all     N (D b + 4 K + 60) + 20 L + P (8 D + 32 C) + 48 M D + 8 MB
            scores  the same, and N D b for the embedding
            none    N (5 D b + 26 C + 4 K + 60) + 20 L + 48 M D + 8 MB

        The gradient of the features is the N D b of ``all``. A projection's own output and gradient come on top.

        Args:
            features: shape [B,D,h,w] of the features, after the projection if there is one.
            labels: shape [B,H,W].
            dtype: of the features.
        """
        batch, channels, height, width = features
        n, row, m = batch * height * width, channels * dtype.itemsize, self.num_classes * self.num_subcentroids
        rest = n * (4 * self.num_subcentroids + 60) + 20 * math.prod(labels) + 48 * m * channels + 8_000_000
        if self.checkpoint == "none":
            return n * (5 * row + 26 * self.num_classes) + rest
        band = min(n, max(self.band_pixels or BAND_PIXELS, width))
        return n * row * (1 + (self.checkpoint == "scores")) + band * (8 * channels + 32 * self.num_classes) + rest

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
        return ops.nearest_centroid(self.embed(features), self.snapshot())

    @torch.no_grad()
    def initialize_from_(self, features: Tensor, labels: Tensor, *, refinements: int = 5) -> Tensor:
        """Start the sub-centroids from features [B,in_channels,h,w] and labels [B,H,W]; see `SubCentroids.initialize_from_`."""
        check_features("DNCHead", features, 4, self.in_channels)
        check_labels("DNCHead", labels, features)
        labels, ignored, _ = sort_out_labels("DNCHead", labels, self.num_classes, self.ignore_index)
        small = without_ignored(resize_labels(labels, (features.shape[2], features.shape[3]), self.label_mode), ignored)
        return super().initialize_from_(self.embed(features), small, refinements=refinements)

    def extra_repr(self) -> str:
        """Sizes and the choices that differ in kind."""
        weights = f"ppc_weight={self.ppc_weight}, ppd_weight={self.ppd_weight}"
        return f"in_channels={self.in_channels}, {super().extra_repr()}, scores={self.scores!r}, {weights}"


def _detached(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    return tuple(None if t is None else t.detach() for t in tensors)
