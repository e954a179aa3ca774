"""Why pixels of the held-out scenes got their classes: the training pixels that the winning sub-centroid is most like."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .. import ops
from ..nn import DNCHead, Nearest, NearestSamples
from .network import SmallBackbone
from .scenes import NUM_CLASSES
from .training import EVALUATION_BATCH, EXPLAINING_SCENES, Run, Scenes, SegmentationNetwork, Settings

SAMPLES = 6  # training pixels shown for a sub-centroid


class SubCentroid(NamedTuple):
    """Sub-centroid `sub` of class `label`, and the cosine between it and a pixel."""

    label: int
    sub: int
    similarity: float


@dataclass(frozen=True)
class Case:
    """A pixel of a held-out scene with its decision."""

    scene: int
    row: int
    column: int
    """In pixels of the scene."""
    truth: int
    winner: SubCentroid
    best_of_truth: SubCentroid
    """The true class's sub-centroid that came closest; the winner if the pixel is right."""


@dataclass(frozen=True)
class Explained:
    """Decisions, and what the sub-centroids stand for."""

    cases: list[Case]
    nearest: Nearest
    """Training scene, pixel of the feature map and cosine, each [C,K,SAMPLES]."""
    share: NDArray[np.float64]
    """[C,K]: share of the class's training pixels whose nearest sub-centroid, among those of the class, is this one."""
    feature_width: int


@torch.no_grad()
def explain(run: Run, scenes: Scenes, settings: Settings) -> Explained:
    """Explain a trained DNC run.

    Args:
        run: of a DNC head.
        scenes: of the run's seed.
        settings: of the run.
    """
    network = SegmentationNetwork("dnc", settings)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in run.state.items()})
    network.placed(torch.device(settings.device)).eval()
    head = network.head
    assert isinstance(head, DNCHead)
    samples = NearestSamples(head, SAMPLES, nearest_only=True)
    used = torch.zeros(NUM_CLASSES, settings.subcentroids)
    some = slice(0, EXPLAINING_SCENES)
    batches = zip(scenes.images[some].split(EVALUATION_BATCH), scenes.labels[some].split(EVALUATION_BATCH), strict=True)
    for images, labels in batches:
        embedding = head.embed(network.features(images))
        small = at_centres(labels).long().to(embedding.device)
        samples.add(embedding, small)
        own = ops.class_scores(embedding, head.prototypes, small).own_similarity
        assert own is not None
        used += torch.zeros_like(used).index_put_((small.cpu(), own.argmax(1).cpu()), torch.ones(()), accumulate=True)
    nearest = Nearest(*(values.cpu() for values in samples.result()))
    share = (used / used.sum(1, keepdim=True).clamp(min=1)).double().numpy()
    return Explained(_cases(network, head, scenes, run.seed), nearest, share, settings.width // SmallBackbone.stride)


def _cases(network: SegmentationNetwork, head: DNCHead, scenes: Scenes, seed: int) -> list[Case]:
    """Pixels drawn at random, each inside an area of one true class, from different digits or scenes.

    Two digits that are right, a digit taken for another and ground taken for a digit: as many of these as there are.
    """
    labels, subs, truth, similarity = [], [], [], []
    for images, full in zip(
        scenes.test_images.split(EVALUATION_BATCH), scenes.test_labels.split(EVALUATION_BATCH), strict=True
    ):
        embedding = head.embed(network.features(images))
        won = ops.nearest_centroid(embedding, head.prototypes)
        labels.append(won.label.cpu())
        subs.append(won.sub.cpu())
        truth.append(at_centres(full).long())
        own = ops.class_scores(embedding, head.prototypes, truth[-1].to(embedding.device)).own_similarity
        assert own is not None
        similarity.append(torch.cat([own.cpu(), won.score[:, None].cpu()], 1).movedim(1, -1))
    label, sub, true, cosine = torch.cat(labels), torch.cat(subs), torch.cat(truth), torch.cat(similarity)
    inside = _inside(true)
    generator = np.random.default_rng(seed)
    cases: list[Case] = []

    def draw(candidates: Tensor, count: int) -> None:
        found = generator.permutation(candidates.nonzero().numpy())
        for scene, y, x in found.tolist():
            if count == 0:
                return
            digit = int(true[scene, y, x])
            if any(case.scene == scene or (case.truth == digit and digit > 0) for case in cases):
                continue
            of_truth = cosine[scene, y, x, :-1]
            winner = SubCentroid(int(label[scene, y, x]), int(sub[scene, y, x]), float(cosine[scene, y, x, -1]))
            best = SubCentroid(digit, int(of_truth.argmax()), float(of_truth.max()))
            cases.append(Case(scene, centre(y), centre(x), digit, winner, best))
            count -= 1

    draw(inside & (true > 0) & (label == true), 2)
    draw(inside & (true > 0) & (label > 0) & (label != true), 1)
    draw(inside & (true == 0) & (label > 0), 1)
    return cases


def centre(feature: int) -> int:
    """Row or column of the scene's pixel where bilinear upsampling puts a feature, within half a pixel."""
    return feature * SmallBackbone.stride + SmallBackbone.stride // 2


def at_centres(labels: Tensor) -> Tensor:
    """Labels [n,H/4,W/4] of the pixels at the centres of the features, from labels [n,H,W]."""
    stride = SmallBackbone.stride
    return labels[:, centre(0) :: stride, centre(0) :: stride]


def _inside(labels: Tensor) -> Tensor:
    """Pixels [n,h,w] whose four neighbours have their label."""
    result = torch.zeros_like(labels, dtype=torch.bool)
    centre = labels[:, 1:-1, 1:-1]
    same = (labels[:, :-2, 1:-1] == centre) & (labels[:, 2:, 1:-1] == centre)
    result[:, 1:-1, 1:-1] = same & (labels[:, 1:-1, :-2] == centre) & (labels[:, 1:-1, 2:] == centre)
    return result
