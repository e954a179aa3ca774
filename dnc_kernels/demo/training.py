"""One training run of the demo: the backbone with one of the heads, its figures and its learning curves."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.utils import convert_conv2d_weight_memory_format

from ..explain.anchoring import anchor
from ..nn import DNCHead
from ..nn._choices import Recipe
from .network import SmallBackbone, SoftmaxHead
from .scenes import NUM_CLASSES, SceneConfig, Split, make_scenes

HeadName = Literal["dnc", "softmax"]
HEADS: tuple[HeadName, ...] = ("dnc", "softmax")
# The held-out scenes are the same for every training seed, and are not those that the recipes were compared on.
TEST_SEED = 1000
EVALUATION_BATCH = 16
EXPLAINING_SCENES = 512  # of training, that sub-centroids are held against; half as many hold thousands of pixels of a class


@dataclass(frozen=True)
class Settings:
    """Everything that a run depends on, apart from its head and seed."""

    steps: int = 800
    batch: int = 4
    height: int = 128
    width: int = 128
    train_scenes: int = 1024
    test_scenes: int = 128
    evaluations: int = 16
    """Measurements on the held-out scenes, evenly spaced, the last one after the last step."""
    learning_rate: float = 1.6e-2
    """Peak of the one-cycle schedule, reached after `warm_up` of the steps."""
    warm_up: float = 0.2
    weight_decay: float = 0.01
    """AdamW's, on matrices and convolutions only: norms, biases and scales are left alone."""
    subcentroids: int = 4
    recipe: Recipe = "default"
    device: str = "cpu"
    threads: int | None = None
    """CPU threads of torch and the kernels; None: torch's own choice."""


@dataclass(frozen=True)
class Standing:
    """What the sub-centroids of a DNC head stand for, among the pixels of the first `EXPLAINING_SCENES` training scenes."""

    dead: float
    """Share that wins less than 1 % of the pixels of its class: no pixel's decision rests on them."""
    usage: float
    """Entropy of their shares over log K, mean of the classes: 1 even, 0 one does it all."""
    anchored_miou: float
    """mIoU on the held-out scenes once every sub-centroid is replaced by a training pixel (`explain.anchor`)."""


@dataclass
class Run:
    """The results of a training run: figures, curves, predictions and weights."""

    head: HeadName
    seed: int
    miou: float
    pixel_accuracy: float
    class_iou: list[float]
    learnable_head: int
    learnable_all: int
    moved: int
    """Numbers that training moves without a gradient: the sub-centroids."""
    step_ms: float
    """Median time of a step, from the batch's indices to the updated weights."""
    peak_mb: float | None
    seconds: float
    threads: int
    standing: Standing | None
    """What the sub-centroids stand for; None for a softmax head."""
    loss: list[float] = field(repr=False)
    """Cross-entropy of every step, without the weights of a DNC head's other losses."""
    accuracy: list[float] = field(repr=False)
    """Share of the batch's pixels at feature size that were right, of every step."""
    evaluated_at: list[int] = field(repr=False)
    evaluated_miou: list[float] = field(repr=False)
    predictions: NDArray[np.uint8] = field(repr=False)
    """[test_scenes, H, W] classes."""
    state: dict[str, NDArray[Any]] = field(repr=False)
    """State dict of `SegmentationNetwork`."""


class SegmentationNetwork(torch.nn.Module):
    """The backbone and a head. The random weights of the backbone do not depend on the head.

    Args:
        head: which head.
        settings: of the run.
        options: of a DNC head, beside its recipe.
    """

    def __init__(self, head: HeadName, settings: Settings, **options: Any) -> None:
        super().__init__()
        self.backbone = SmallBackbone()
        width = self.backbone.out_channels
        self.head: DNCHead | SoftmaxHead
        if head == "dnc":
            self.head = DNCHead(
                width, NUM_CLASSES, settings.subcentroids, embed_channels=width, recipe=settings.recipe, **options
            )
        else:
            self.head = SoftmaxHead(width, NUM_CLASSES)

    def placed(self, device: torch.device) -> SegmentationNetwork:
        """The network itself, moved to a device and with convolutions in the memory format of its images."""
        convert_conv2d_weight_memory_format(self.to(device), torch.channels_last)
        return self

    def prepare(self, images: Tensor) -> Tensor:
        """The backbone's input, of images [B,3,H,W] uint8, wherever they are."""
        device = next(self.parameters()).device
        return (images.to(device).float() / 255).contiguous(memory_format=torch.channels_last)

    def features(self, images: Tensor) -> Tensor:
        """Features of images [B,3,H,W] uint8, wherever they are."""
        return self.backbone(self.prepare(images))


@dataclass(frozen=True)
class Scenes:
    """Images [n,3,H,W] uint8 and labels [n,H,W] uint8 of the training scenes of one seed and of the held-out scenes."""

    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def write_scenes(folder: Path, seed: int, settings: Settings) -> None:
    """Draw the scenes of a seed and write them to a folder for `read_scenes`, once for all the runs of the seed."""
    config = SceneConfig(settings.height, settings.width)
    splits: tuple[tuple[Split, int, int], ...] = (
        ("train", settings.train_scenes, seed), ("test", settings.test_scenes, TEST_SEED),
    )  # fmt: skip
    for split, count, scene_seed in splits:
        images, labels = make_scenes(count, seed=scene_seed, split=split, config=config)
        np.save(folder / f"{split}-images.npy", (images * 255).round().astype(np.uint8))
        np.save(folder / f"{split}-labels.npy", labels.astype(np.uint8))


def read_scenes(folder: Path) -> Scenes:
    """The scenes that `write_scenes` wrote to a folder."""
    names = ("train-images", "train-labels", "test-images", "test-labels")
    return Scenes(*(torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names))


Report = Callable[[int, float, float, "float | None"], None]


def train(head: HeadName, seed: int, scenes: Scenes, settings: Settings, report: Report | None = None) -> Run:
    """Train one head with its own copy of the backbone.

    Equal arguments give equal bits on one CPU with one number of threads.

    Args:
        head: which head.
        seed: of the initial weights and of the data order.
        scenes: of that seed.
        settings: everything else.
        report: called after every step with its number from 1, cross-entropy, accuracy and, where the held-out scenes were
            measured, their mIoU.
    """
    begun = time.perf_counter()
    if settings.threads is not None:
        torch.set_num_threads(settings.threads)
    torch.manual_seed(seed)
    device = torch.device(settings.device)
    network = SegmentationNetwork(head, settings).placed(device)
    learnable = [p for p in network.parameters() if p.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in learnable if p.ndim > 1], "weight_decay": settings.weight_decay},
        {"params": [p for p in learnable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    optimiser = torch.optim.AdamW(groups, lr=settings.learning_rate)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimiser, settings.learning_rate, total_steps=settings.steps, pct_start=settings.warm_up
    )
    sequence = order(len(scenes.images), settings.steps * settings.batch, seed)
    evaluate_at = {round(settings.steps * i / settings.evaluations) for i in range(1, settings.evaluations + 1)}
    memory = PeakMemory(device)
    network.train()
    losses, accuracies, milliseconds = [], [], []
    evaluated_at: list[int] = []
    evaluated_miou: list[float] = []
    peak = None
    for step in range(1, settings.steps + 1):
        start = _now(device)
        picked = sequence[(step - 1) * settings.batch : step * settings.batch]
        labels = scenes.labels[picked].to(device).long()
        result = network.head.loss(network.features(scenes.images[picked]), labels)
        optimiser.zero_grad(set_to_none=True)
        result.loss.backward()
        optimiser.step()
        schedule.step()
        milliseconds.append(1000 * (_now(device) - start))
        losses.append(result.cross_entropy.item())
        accuracies.append(float(result.accuracy))
        miou = None
        if step in evaluate_at:
            if not evaluated_at:
                # every step has the same shapes, and what follows the first evaluation would count the evaluation too
                peak = memory.megabytes()
            confusion, predictions = evaluate(network, scenes)
            miou = float(class_iou(confusion).nanmean())
            evaluated_at.append(step)
            evaluated_miou.append(miou)
        if report is not None:
            report(step, losses[-1], accuracies[-1], miou)
    seconds = time.perf_counter() - begun
    return Run(
        head=head, seed=seed, miou=evaluated_miou[-1],
        pixel_accuracy=float(confusion.diag().sum() / confusion.sum()), class_iou=class_iou(confusion).tolist(),
        learnable_head=sum(p.numel() for p in network.head.parameters() if p.requires_grad),
        learnable_all=sum(p.numel() for p in learnable),
        moved=network.head.prototypes.numel() if isinstance(network.head, DNCHead) else 0,
        step_ms=statistics.median(milliseconds), peak_mb=peak, seconds=seconds,
        threads=torch.get_num_threads(), standing=standing(network, scenes), loss=losses, accuracy=accuracies,
        evaluated_at=evaluated_at, evaluated_miou=evaluated_miou, predictions=predictions,
        state={name: value.cpu().numpy() for name, value in network.state_dict().items()},
    )  # fmt: skip


@torch.no_grad()
def standing(network: SegmentationNetwork, scenes: Scenes) -> Standing | None:
    """What the sub-centroids of a network stand for; None for a softmax head. The network is left as it was."""
    head = network.head
    if not isinstance(head, DNCHead):
        return None
    some = slice(0, EXPLAINING_SCENES)
    batches = list(zip(scenes.images[some].split(EVALUATION_BATCH), scenes.labels[some].split(EVALUATION_BATCH), strict=True))
    learned = head.prototypes.clone()
    anchors = anchor(network, batches, prepare=network.prepare)
    confusion, _ = evaluate(network, scenes)
    head.prototypes.copy_(learned)
    return Standing(anchors.dead, anchors.usage, float(class_iou(confusion).nanmean()))


@torch.no_grad()
def evaluate(network: SegmentationNetwork, scenes: Scenes) -> tuple[Tensor, NDArray[np.uint8]]:
    """Confusion matrix [truth, prediction] int64 over the held-out scenes, and the predictions [n,H,W]."""
    network.eval()
    parts = []
    size = (scenes.test_labels.shape[1], scenes.test_labels.shape[2])
    for images in scenes.test_images.split(EVALUATION_BATCH):
        parts.append(network.head.predict(network.features(images), size).to("cpu", torch.uint8))
    network.train()
    predictions = torch.cat(parts)
    pairs = scenes.test_labels.long() * NUM_CLASSES + predictions.long()
    confusion = pairs.flatten().bincount(minlength=NUM_CLASSES**2).view(NUM_CLASSES, NUM_CLASSES)
    return confusion, predictions.numpy()


def class_iou(confusion: Tensor) -> Tensor:
    """Intersection over union of every class of a confusion matrix; NaN for a class neither present nor predicted."""
    hits = confusion.diag().double()
    return hits / (confusion.sum(0) + confusion.sum(1) - hits)


class PeakMemory:
    """Peak memory of this process since construction, in MB (10^6 bytes).

    On CUDA it is the peak of torch's allocator. On a CPU with Linux it is the rise of the resident set above its size with the
    network and the scenes in place: gradients, optimiser state, activations and what the libraries set up for the first step.
    The process must do nothing else, so the demo trains every head in a fresh one.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.before: float | None = None
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        else:
            self.before = _resident("VmHWM")

    def megabytes(self) -> float | None:
        """The peak so far; None where it cannot be known."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) / 1e6
        now = _resident("VmHWM")
        return None if now is None or self.before is None else now - self.before


def _resident(field: Literal["VmHWM", "VmRSS"]) -> float | None:
    """A figure of Linux's account of this process's memory, in MB. `getrusage` would count the parent's peak as well."""
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)
    return None if found is None else int(found[1]) * 1024 / 1e6


def order(scenes: int, count: int, seed: int) -> Tensor:
    """The first `count` scene numbers of one random permutation after another."""
    generator = torch.Generator().manual_seed(seed)
    passes = -(-count // scenes)
    return torch.cat([torch.randperm(scenes, generator=generator) for _ in range(passes)])[:count]


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
