"""One training step of Deep Nearest Centroids in plain torch, class by class, in float64: what `DNCHead.loss` has to do.

Written from the paper (Wang et al., ICLR 2023; PPC and PPD from Zhou et al., CVPR 2022), sharing no code with the package.
Nothing is fused, skipped or recomputed: the point is that every line can be read beside its equation.

Symbols: N pixels at feature size, D channels, C classes, K sub-centroids a class.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


class ReferenceHead(torch.nn.Module):
    """The step, its parameters and its sub-centroids [C,K,D]; every argument means what it means for `DNCHead`."""

    def __init__(
        self,
        prototypes: Tensor,
        *,
        scores: str,
        confidence: str,
        label_mode: str,
        momentum: float,
        epsilon: float = 0.05,
        iterations: int = 3,
        update_from: str = "correct",
        ppc_weight: float = 0.01,
        ppc_temperature: float = 1.0,
        ppd_weight: float = 0.001,
        align_corners: bool = False,
        ignore_index: int = 255,
    ) -> None:
        super().__init__()
        self.classes, self.k, self.channels = prototypes.shape
        self.scores, self.confidence, self.label_mode, self.ignore_index = scores, confidence, label_mode, ignore_index
        self.momentum, self.epsilon, self.iterations, self.update_from = momentum, epsilon, iterations, update_from
        self.ppc_weight, self.ppc_temperature, self.ppd_weight = ppc_weight, ppc_temperature, ppd_weight
        self.align_corners = align_corners
        self.register_buffer("prototypes", prototypes.double().clone())
        self.feat_norm = torch.nn.LayerNorm(self.channels, dtype=torch.float64)
        if scores == "norm":
            self.mask_norm = torch.nn.LayerNorm(self.classes, dtype=torch.float64)
        else:
            self.logit_scale = torch.nn.Parameter(torch.zeros((), dtype=torch.float64))

    def loss(self, features: Tensor, labels: Tensor) -> Tensor:
        """Loss of features [B,D,h,w] and labels [B,H,W]; then the sub-centroids move."""
        batch, _, height, width = features.shape
        p = self.prototypes.clone()  # a constant of this step: no gradient, and not what the update changes

        # 1. Embed: normalise over the channels, then to unit length.
        x = features.permute(0, 2, 3, 1).reshape(-1, self.channels)
        e = F.normalize(self.feat_norm(x), dim=1)

        # 2. Cosines to every sub-centroid; a class is as similar as its nearest one.
        similarity = torch.stack([e @ p[c].T for c in range(self.classes)], dim=1)  # [N,C,K]
        logits = self.logits(similarity.amax(2), x)

        # 3. Cross-entropy of the upsampled logits.
        maps = logits.view(batch, height, width, self.classes).permute(0, 3, 1, 2)
        large = F.interpolate(maps, labels.shape[1:], mode="bilinear", align_corners=self.align_corners)
        cross_entropy = F.cross_entropy(large, labels, ignore_index=self.ignore_index)

        # 4. Clustering: within each class, its pixels are shared out among its sub-centroids.
        small = F.interpolate(labels[:, None].double(), (height, width), mode=self.label_mode).long().flatten()
        target = torch.full_like(small, -1)
        for c in range(self.classes):
            pixels = (small == c).nonzero()[:, 0]
            if len(pixels):
                target[pixels] = c * self.k + self.assign(similarity[pixels, c].detach())

        # Contrast with all sub-centroids (PPC), distance to the assigned one (PPD), over the labelled pixels.
        flat = similarity.flatten(1)
        labelled = (target >= 0).nonzero()[:, 0]
        ppc = F.cross_entropy(flat[labelled] / self.ppc_temperature, target[labelled])
        ppd = (1 - flat[labelled, target[labelled]]).square().mean()

        # 5. Momentum: the pixels that are classified correctly move the sub-centroid that they are assigned to.
        correct = logits.detach().argmax(1) == small
        self.move(e.detach(), target, correct)
        return cross_entropy + self.ppc_weight * ppc + self.ppd_weight * ppd

    def logits(self, scores: Tensor, x: Tensor) -> Tensor:
        """Logits [N,C] of class scores [N,C]; x [N,D] is what was embedded."""
        if self.scores == "norm":
            return self.mask_norm(scores)
        logits = scores * self.logit_scale.exp()
        if self.confidence == "length":  # what the LayerNorm of step 1 has divided out
            logits = logits * (x.var(1, correction=0, keepdim=True) + self.feat_norm.eps).sqrt()
        return logits

    def assign(self, similarity: Tensor) -> Tensor:
        """Sub-centroid [n] of each pixel of one class, by entropic optimal transport of similarity [n,K], uniform marginals."""
        if len(similarity) == 1:  # its plan is uniform: the nearest
            return similarity.argmax(1)
        return self.transport(similarity / self.epsilon).argmax(1)

    def transport(self, log_plan: Tensor) -> Tensor:
        """Log of the plan [n,K] up to a constant: Sinkhorn's scalings in the log domain, sub-centroids first."""
        for _ in range(self.iterations):
            log_plan = log_plan - log_plan.logsumexp(0, keepdim=True)
            log_plan = log_plan - log_plan.logsumexp(1, keepdim=True)
        return log_plan

    def move(self, e: Tensor, target: Tensor, correct: Tensor) -> None:
        """Step 5 for embeddings [N,D], targets c*K+k [N] (-1: none) and which pixels [N] were classified correctly."""
        for c in range(self.classes):
            for k in range(self.k):
                mine = target == c * self.k + k
                if self.update_from == "correct":
                    mine = mine & correct
                if mine.any():
                    mean = F.normalize(e[mine].sum(0), dim=0)
                    moved = self.momentum * self.prototypes[c, k] + (1 - self.momentum) * mean
                    self.prototypes[c, k] = F.normalize(moved, dim=0)
