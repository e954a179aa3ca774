"""What the segmentation head and the classifier share: embedding, logits, contrast losses, statistics of a training step."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import ops
from .._tensors import check_ignore_index, flat_pixels, full_precision
from ..backends import transformed
from ..errors import check_dtype, check_flag, check_float, check_number, check_value, feature_fix, holds_a_loss
from . import _sync
from ._choices import Recipe, Sync, check_word
from ._labels import check_labels
from .recipes import recipe_options
from .subcentroids import SubCentroids

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@holds_a_loss
class DNCLoss(NamedTuple):
    """Loss of a head and its parts, all 0-d tensors: ``head.loss(x, labels).loss.backward()``.

    `loss` is ``cross_entropy + ppc_weight * ppc + ppd_weight * ppd``. The parts carry gradients too, for weights of one's own,
    ``(result.cross_entropy + 0.3 * result.ppc).backward()``; a part whose weight in the head is 0 is not computed, and is 0
    without a gradient. `accuracy` carries none.

    `DNCHead` with ``checkpoint="all"`` or ``"scores"`` makes the gradients of `loss` in the forward pass. Those of any other
    mixture take both passes over the features again, in backward, and once more the memory of the features' gradient; the
    features and labels are kept until then, and must not be changed in place. Under torch.compile the parts of such a head
    have none, and asking for one is an error on a CPU and NaN elsewhere: set the weights in the constructor, or
    ``checkpoint="none"``.
    """

    loss: Tensor
    cross_entropy: Tensor
    ppc: Tensor
    ppd: Tensor
    accuracy: Tensor


class CentroidModel(SubCentroids):
    """Embedding, sub-centroids and logits of a head. Use `DNCHead` or `DNCClassifier`.

    A head is its sub-centroids (it derives from them), so that the state dict has the released names and no hook renames
    anything.
    """

    default_recipe: ClassVar[Recipe]
    class_counts: Tensor
    nonfinite_pixels: Tensor
    bad_labels: Tensor
    _counters = (*SubCentroids._counters, "class_counts", "nonfinite_pixels", "bad_labels")
    _uses_parameters = ("embed", "logits", "loss", "predict", "explain")

    def __init__(
        self,
        channels: int,
        num_classes: int,
        num_subcentroids: int,
        *,
        recipe: Recipe | None,
        sync: Sync,
        ignore_index: int,
        class_weight: Tensor | list[float] | None,
        process_group: ProcessGroup | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        options: dict[str, Any],
        **fixed: Any,
    ) -> None:
        op = type(self).__name__
        recipe = self.default_recipe if recipe in (None, "default") else recipe
        chosen = recipe_options(op, recipe, **options)
        own = {key: chosen.pop(key) for key in (*_OWN_OPTIONS,)}
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        super().__init__(
            num_classes, num_subcentroids, channels, **chosen, **fixed, sync=sync, process_group=process_group, **where
        )
        num_classes, channels = self.num_classes, self.channels
        ignore_index = check_ignore_index(op, ignore_index, num_classes)
        for name in ("scores", "confidence", "label_mode"):
            check_word(op, name, own[name])
        for name in ("temperature", "scale", "ppc_temperature"):
            check_number(op, name, own[name], "positive and finite", lambda v: 0 < v < math.inf)
        for name in ("ppc_weight", "ppd_weight"):
            check_number(op, name, own[name], "non-negative and finite", lambda v: 0 <= v < math.inf)
        check_number(op, "label_smoothing", own["label_smoothing"], "in [0,1]", lambda v: 0 <= v <= 1)
        self.ignore_index, self.recipe = ignore_index, recipe
        self.scores, self.temperature, self.scale = own["scores"], own["temperature"], own["scale"]
        self.ppc_weight, self.ppd_weight, self.ppc_temperature = own["ppc_weight"], own["ppd_weight"], own["ppc_temperature"]
        self.label_smoothing, self.confidence = own["label_smoothing"], own["confidence"]
        self.label_mode = own["label_mode"]
        self.feat_norm = nn.LayerNorm(channels, device=device, dtype=dtype)
        if self.scores == "norm":
            self.mask_norm = nn.LayerNorm(num_classes, device=device, dtype=dtype)
        if self.scores == "scale":  # [1]: sharding takes no parameter without a dimension
            self.logit_scale = nn.Parameter(torch.full((1,), math.log(own["scale"]), **where))
        self._class_weight: Tensor | None = None
        self.class_weight = class_weight
        count: dict[str, Any] = {"dtype": torch.int64, "device": device}
        self.register_buffer("class_counts", torch.zeros(num_classes, **count), persistent=False)
        self.register_buffer("nonfinite_pixels", torch.zeros((), **count), persistent=False)
        self.register_buffer("bad_labels", torch.zeros((), **count), persistent=False)

    @property
    def class_weight(self) -> Tensor | None:
        """[C] weights of the cross-entropy, on the device of the sub-centroids and in float32 or, as they are, in float64.

        An option and no buffer: no state dict has it, `half()` does not round it, and a start on the meta device keeps it.
        """
        weight, like = self._class_weight, self.prototypes
        if weight is None:
            return None
        dtype = torch.promote_types(like.dtype, torch.float32)
        if (weight.device, weight.dtype) == (like.device, dtype):
            return weight
        moved = weight.to(like.device, dtype)
        if not (like.is_meta or torch.compiler.is_compiling()):
            self._class_weight = moved
        return moved

    @class_weight.setter
    def class_weight(self, value: Tensor | Sequence[float] | None) -> None:
        op, weight = type(self).__name__, None
        if value is not None:
            # the values are at hand, even under `torch.device("meta")`
            device = value.device if isinstance(value, Tensor) else "cpu"
            expected = f"a tensor or list of C={self.num_classes} numbers"
            numbers = isinstance(value, (Tensor, list, tuple)) or hasattr(value, "__array__")
            check_dtype(
                numbers and not torch.is_complex(torch.as_tensor(value[:0])), op, "class_weight", expected, f"{value!r}"
            )
            weight = torch.as_tensor(value, dtype=torch.float32, device=device)
            check_value(list(weight.shape) == [self.num_classes], op, "class_weight", f"[C]=[{self.num_classes}]", weight)
            fix = "pass class_weight.detach()"
            check_value(not weight.requires_grad, op, "class_weight", "without a gradient", weight, fix)
            if not weight.is_meta:
                check_value(bool((weight >= 0).all()), op, "class_weight", "non-negative", str(weight.tolist()))
        self._class_weight = weight

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Start over, as the constructor left it: see `SubCentroids.reset_parameters`."""
        if self.scores == "scale":
            nn.init.constant_(self.logit_scale, math.log(self.scale))
        super().reset_parameters()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        scale = state_dict.get(f"{prefix}logit_scale")
        if isinstance(scale, Tensor) and scale.ndim == 0:  # as it was saved at first
            state_dict[f"{prefix}logit_scale"] = scale.reshape(1)
        super()._load_from_state_dict(state_dict, prefix, *rest)

    def parameter_groups(self, weight_decay: float) -> list[dict[str, Any]]:
        """The parameters as groups for an optimizer: weight decay on matrices alone, none on norms, biases and `logit_scale`.

        ``torch.optim.AdamW([{"params": backbone.parameters()}, *head.parameter_groups(0.01)], lr=1e-3)``

        Args:
            weight_decay: of the parameters with two axes or more, such as a projection's.

        Returns:
            One or two groups ``{"params": [...], "weight_decay": ...}``; none is empty. Sub-centroids are not among them.
        """
        parameters = list(self.parameters())
        groups = [
            {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0},
        ]
        return [group for group in groups if group["params"]]

    def embed(self, features: Tensor) -> Tensor:
        """Unit-length embedding ``l2_normalize(LayerNorm(features))``, in the shape and dtype of the features."""
        return ops.normalize_embedding(features, self.feat_norm.weight, self.feat_norm.bias, eps=self.feat_norm.eps)

    def _embed_with_gain(self, features: Tensor) -> tuple[Tensor, Tensor | None]:
        """Embedding, and what a pixel's logits are multiplied by, [N,1] or [B,1,h,w]: the standard deviation over the channels
        that LayerNorm divides out. None without confidence.

        It has no say in which sub-centroid is nearest, only in how sure the pixel is.
        """
        norm = self.feat_norm
        e, length = ops.normalize_embedding(features, norm.weight, norm.bias, eps=norm.eps, return_length=True)
        # LayerNorm over the classes would divide it out again
        return e, None if self.confidence == "none" or self.scores == "norm" else length.unsqueeze(1)

    def logits(self, scores: Tensor, gain: Tensor | None = None) -> Tensor:
        """Logits of class scores [N,C] or [B,C,h,w]: LayerNorm over the classes, or scores over a temperature times `gain`."""
        if self.scores != "norm":
            scores = scores if gain is None else scores * gain
            temperature = self.logit_temperature()
            return scores / (temperature.to(scores.dtype) if isinstance(temperature, Tensor) else temperature)
        norm = self.mask_norm
        weight, bias = norm.weight.to(scores.dtype), norm.bias.to(scores.dtype)
        with full_precision(scores):
            return F.layer_norm(scores.movedim(1, -1), norm.normalized_shape, weight, bias, norm.eps).movedim(-1, 1)

    def logit_temperature(self) -> Tensor | float:
        """What scores are divided by: a number (1 with the norm), or the 0-d tensor ``exp(-logit_scale)``."""
        if self.scores == "scale":
            scale = self.logit_scale.reshape(())
            return (-scale.to(torch.promote_types(scale.dtype, torch.float32))).exp()
        return self.temperature if self.scores == "temperature" else 1.0

    def _moves(self, op: str, update: bool | None) -> bool:
        """Whether this loss moves the sub-centroids, of which then all ranks have the same."""
        if update is None:
            update = self.training
        else:
            check_flag(op, "update", update)
        if update and transformed():
            raise RuntimeError(
                f"{op}: inside a transform of torch.func or forward-mode differentiation no sub-centroid can move; "
                "pass update=False, or call eval() first"
            )
        if update:
            self._agree()
        return update

    def _fused_cross_entropy(self, e: Tensor, p: Tensor, labels: Tensor, gain: Tensor | None) -> ops.CentroidLoss:
        """Sum of the cross-entropies at the pixels of `e`; labels of -1 left out. Own similarities are rows [N,K]."""
        norm: dict[str, Any] = {}
        if self.scores == "norm":
            norm = {"norm_weight": self.mask_norm.weight, "norm_bias": self.mask_norm.bias, "norm_eps": self.mask_norm.eps}
        result = ops.centroid_cross_entropy(
            e if gain is None else e * gain, p, labels, **norm, temperature=self.logit_temperature(),
            weight=self.class_weight, ignore_index=-1, label_smoothing=self.label_smoothing, reduction="sum",
        )  # fmt: skip
        own = flat_pixels(result.own_similarity)
        # <gain * e, p> = gain * <e, p>: clustering and contrast want the cosines back
        return result._replace(own_similarity=own if gain is None else own / gain.detach().reshape(-1, 1))

    def _denominators(self, labels: Tensor, ignored: int, sampled: Tensor, *, joint: bool) -> tuple[Tensor, Tensor]:
        """What sums over pixels are divided by: the class weights of labelled pixels, and the number of sampled ones.

        1, not 0, without any. With `joint` and several ranks that cluster together both are means over the ranks: then the
        average of the ranks' gradients is the gradient of the mean over all pixels, however they are spread.
        """
        kept = labels != ignored
        weights = self.class_weight
        if weights is None:
            weight = kept.sum().to(torch.float64)
        else:
            weight = torch.where(kept, weights[torch.where(kept, labels, 0)], 0).sum(dtype=torch.float64)
        count = (sampled >= 0).sum().to(torch.float64)
        if joint and self.sync != "average" and (world := _sync.ranks(self.peers)) > 1:
            (both,) = _sync.sum_over_ranks(self.peers, torch.stack([weight, count]))
            weight, count = (both / world).unbind()
        dtype = torch.promote_types(self.prototypes.dtype, torch.float32)
        return torch.where(weight > 0, weight, 1).to(dtype), torch.where(count > 0, count, 1).to(dtype)

    def _judge(self, prediction: Tensor, finite: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Labels [N] with -1 where the feature is not finite, which predictions are right, and the share of right ones."""
        group = torch.where(finite, labels.reshape(-1), -1)
        correct = (prediction == group) & (group >= 0)
        return group, correct, correct.sum(dtype=torch.float32) / (group >= 0).sum().clamp(min=1)

    def _contrast(self, e: Tensor, p: Tensor, target: Tensor, own: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
        """PPC and PPD (ProtoSeg, eq. 11 and 12): sums over the pixels that have a target [N], over `count`; zeros where their
        weight is 0.
        """
        zero = own.new_zeros(())
        ppc = ppd = zero
        if self.ppc_weight:
            total = ops.subcentroid_cross_entropy(
                e, p, target.view(e.shape[0], *e.shape[2:]), temperature=self.ppc_temperature, ignore_index=-1, reduction="sum"
            )
            ppc = total / count
        if self.ppd_weight:
            if transformed():
                towards = (flat_pixels(e) * p.flatten(0, 1)[target.clamp(min=0)]).sum(1)
            else:
                similarity = own if own.requires_grad else _WithGradient.apply(own, e, p, target)
                towards = similarity.gather(1, (target.clamp(min=0) % self.num_subcentroids)[:, None])[:, 0]
            ppd = torch.where(target >= 0, (1 - towards).square(), 0).sum() / count
        return ppc, ppd

    def _weighted(self, cross_entropy: Tensor, ppc: Tensor, ppd: Tensor) -> Tensor:
        loss = cross_entropy
        if self.ppc_weight:
            loss = loss + self.ppc_weight * ppc
        return loss + self.ppd_weight * ppd if self.ppd_weight else loss

    def _tally(self, labels: Tensor, finite: Tensor, wrong: Tensor) -> Tensor:
        """[C+2] int64: pixels of each class, pixels with a non-finite feature, wrong labels."""
        classes = labels.new_zeros(self.num_classes + 1)
        classes.index_add_(0, torch.where(labels >= 0, labels, self.num_classes), torch.ones_like(labels))
        return torch.cat([classes[:-1], (~finite).sum()[None], wrong[None]])

    def _write_down(self, tally: Tensor | None) -> None:
        assert tally is not None
        self.class_counts.copy_(tally[: self.num_classes])
        self.nonfinite_pixels.add_(tally[self.num_classes])
        self.bad_labels.add_(tally[self.num_classes + 1])


_OWN_OPTIONS = (
    "scores",
    "temperature",
    "scale",
    "confidence",
    "label_mode",
    "ppc_weight",
    "ppc_temperature",
    "ppd_weight",
    "label_smoothing",
)


def check_features(op: str, features: Tensor, ndim: int, channels: int, head: SubCentroids) -> None:
    """Check float features [N,D] or [B,D,h,w] of a given number of channels, on the device of the head."""
    check_float(op, "features", features)
    if features.ndim != ndim or features.shape[1] != channels:
        expected = f"[N,{channels}]" if ndim == 2 else f"[B,{channels},h,w]"
        check_value(False, op, "features", expected, features, feature_fix(features, ndim, channels))
    there = head.prototypes.device
    if features.device != there:
        fix = "move the head with .to(features.device), or the features to it"
        check_value(False, op, "features", f"on {there} like the head", str(features.device), fix)


class _WithGradient(torch.autograd.Function):
    """Own-class similarities that a fused pass has computed, with the gradient of those to the target sub-centroid only.

    Forward costs nothing and [N,D] exists in backward alone. The sub-centroids get no gradient.
    """

    @staticmethod
    def forward(ctx: Any, own: Tensor, e: Tensor, p: Tensor, target: Tensor) -> Tensor:
        ctx.save_for_backward(p, target)
        ctx.like = e.shape, e.dtype
        return own.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None, None]:
        p, target = ctx.saved_tensors
        shape, dtype = ctx.like
        scale = torch.where(target >= 0, grad.gather(1, (target.clamp(min=0) % p.shape[1])[:, None])[:, 0], 0)
        rows = (p.flatten(0, 1)[target.clamp(min=0)] * scale[:, None]).to(dtype)
        if len(shape) == 4:
            rows = rows.view(shape[0], shape[2], shape[3], shape[1]).movedim(-1, 1)
        return None, rows, None, None


__all__ = ["CentroidModel", "DNCLoss", "check_features", "check_labels"]
