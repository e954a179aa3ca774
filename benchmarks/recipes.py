"""Whether the recipes of the heads keep up with a softmax head, and whether their sub-centroids stand for anything.

    python -m benchmarks.recipes --task digits --head softmax --head classification --seed 0 --out rows.jsonl

Trains small networks on a CPU; each run is a row: accuracy (mIoU for the scenes), calibration, what the sub-centroids win, and
the accuracy once each is replaced by k-means centres of the training features or by a training sample. `quote` makes the
tables of docs/recipes.md of these rows. Seed, data order and backbone weights are equal for all heads of a seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dnc_kernels.demo.scenes import NUM_CLASSES
from dnc_kernels.demo.training import (
    EXPLAINING_SCENES,
    SegmentationNetwork,
    Settings,
    class_iou,
    evaluate,
    order,
    read_scenes,
    write_scenes,
)
from dnc_kernels.explain import anchor
from dnc_kernels.integrations import DNCImageClassifier, SoftmaxImageClassifier
from dnc_kernels.nn import RECIPES, Recent
from dnc_kernels.runs.classification import calibration_error
from dnc_kernels.runs.data import network_input
from dnc_kernels.runs.images import load_dataset
from dnc_kernels.runs.networks import make_classifier
from dnc_kernels.runs.schedules import TRAINING_RECIPES, Learning, TrainingRecipe
from dnc_kernels.runs.views import InOrder, Views

from . import built, record

BATCH = 250  # of what is not training
K = 4
#: For the scenes, a recipe with other options: the neighbours of the default.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "PPD 1": ("segmentation", {"ppd_weight": 1.0}),
    "PPD 0.001": ("segmentation", {"ppd_weight": 0.001}),
    "PPD 0.001, fraction 1": ("segmentation", {"ppd_weight": 0.001, "momentum": Recent(1.0)}),
    "PPD 0.001, fraction 0.25": ("segmentation", {"ppd_weight": 0.001, "momentum": Recent(0.25)}),
    "PPD 0.001, momentum 0.99": ("segmentation", {"ppd_weight": 0.001, "momentum": 0.99}),
}
TASKS: dict[str, TrainingRecipe | None] = {
    "digits": TRAINING_RECIPES["digits"],
    "fashion-14": TRAINING_RECIPES["fashion-14"],
    # few epochs and no augmentation: minutes on one core
    "fashion": replace(TRAINING_RECIPES["fashion-small"], epochs=2, augment="none"),
    "scenes": None,
}


@dataclass(frozen=True)
class Examples:
    """Images [n,3,H,W] uint8 and labels, [n] or [n,H,W] int64."""

    images: Tensor
    labels: Tensor

    def __iter__(self) -> Any:
        return zip(self.images.split(BATCH), self.labels.split(BATCH), strict=True)


@dataclass(frozen=True)
class Trained:
    """A network after training, its data, and how it is measured."""

    model: Any
    train: Iterable[tuple[Tensor, Tensor]]
    prepare: Callable[[Tensor], Tensor]
    measure: Callable[[], dict[str, float]]
    steps: int


def classifier(task: TrainingRecipe, head: str, seed: int, data: Path | None) -> Trained:
    """Train on images as `TRAINING_RECIPES` says."""
    found = load_dataset(task.dataset, data, task.size)
    if task.train_images is not None:
        found = found.first_of_draw(task.train_images)
    views = Views(task.size)
    train, test = (
        Examples(*(torch.cat(part) for part in list(zip(*((x, y) for x, y, _ in InOrder(part, views, BATCH)), strict=True))))
        for part in (found.train, found.test)
    )
    torch.manual_seed(seed)
    network: DNCImageClassifier | SoftmaxImageClassifier = make_classifier({
        "network": task.network, "size": task.size, "classes": found.train.classes, "subcentroids": K, "memory": 32,
        "head": "softmax" if head == "softmax" else "dnc", "head_recipe": head, "momentum": None,
    })  # fmt: skip
    device = torch.device("cpu")
    prepared = network_input(train.images, device).contiguous(memory_format=torch.channels_last)
    steps = task.epochs * len(train.images) // task.batch
    sequence = order(len(train.images), steps * task.batch, seed)

    def batch(picked: Tensor) -> tuple[Tensor, Tensor]:
        return prepared[picked], train.labels[picked]

    _fit(network, task.learning, sequence.view(steps, -1), batch, lambda x, y: network(x, y).loss)

    def measure() -> dict[str, float]:
        network.eval()
        with torch.no_grad():
            logits = torch.cat([network(network_input(x, device)) for x, _ in test])
        confidence, predicted = logits.softmax(1).max(1)
        correct = predicted == test.labels
        return {"score": float(correct.double().mean()), "ece": calibration_error(confidence, correct)}

    return Trained(network, train, lambda x: network_input(x, device), measure, steps)


def _fit(
    network: nn.Module,
    learning: Learning,
    sequence: Tensor,
    batch: Callable[[Tensor], tuple[Tensor, Tensor]],
    loss_of: Callable[[Tensor, Tensor], Tensor],
) -> None:
    """Train on the examples of each row of `sequence` [steps,batch]."""
    optimizer = learning.optimizer_of(network)
    schedule = learning.schedule_of(optimizer, len(sequence))
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    network.train()
    for picked in sequence:
        loss = loss_of(*batch(picked))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def segmenter(head: str, seed: int) -> Trained:
    """Train on the demo's scenes, as the demo does."""
    recipe, options = VARIANTS.get(head, (head, {}))
    settings = Settings(recipe="default" if head == "softmax" else recipe)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), seed, settings)
        scenes = read_scenes(Path(folder))
    torch.manual_seed(seed)
    network = SegmentationNetwork("softmax" if head == "softmax" else "dnc", settings, **options)
    network.placed(torch.device("cpu"))
    sequence = order(len(scenes.images), settings.steps * settings.batch, seed)
    learning = Learning("adamw", settings.learning_rate, settings.weight_decay, "one-cycle", warm_up=settings.warm_up)
    _fit(
        network, learning, sequence.view(settings.steps, -1),
        lambda picked: (scenes.images[picked], scenes.labels[picked].long()),
        lambda x, y: network.head.loss(network.features(x), y).loss,
    )  # fmt: skip

    def measure() -> dict[str, float]:
        confusion, _ = evaluate(network, scenes)
        network.eval()
        size = tuple(scenes.test_labels.shape[1:])
        confidences, correct = [], []
        with torch.no_grad():
            for images, labels in zip(scenes.test_images.split(8), scenes.test_labels.split(8), strict=True):
                logits = network.head(network.features(images))
                sure, predicted = F.interpolate(logits.float(), size, mode="bilinear").softmax(1).max(1)
                confidences.append(sure.flatten())
                correct.append((predicted == labels).flatten())
        ece = calibration_error(torch.cat(confidences), torch.cat(correct))
        return {"score": float(class_iou(confusion).nanmean()), "ece": ece}

    train = Examples(scenes.images[:EXPLAINING_SCENES], scenes.labels[:EXPLAINING_SCENES].long())
    return Trained(network, train, network.prepare, measure, settings.steps)


def row_of(task: str, head: str, seed: int, data: Path | None) -> dict[str, Any]:
    """Train, measure, and try what the classifier is worth with its sub-centroids replaced."""
    begun = time.perf_counter()
    recipe = TASKS[task]
    trained = segmenter(head, seed) if recipe is None else classifier(recipe, head, seed, data)
    row: dict[str, Any] = {
        "task": task, "head": head, "seed": seed, "steps": trained.steps, "classes": NUM_CLASSES if recipe is None else 10,
        "commit": record.commit(), "threads": torch.get_num_threads(), "torch_version": torch.__version__, **trained.measure(),
    }  # fmt: skip
    model = trained.model
    if head != "softmax":
        model.eval()
        with torch.no_grad():
            features = [(model.backbone(trained.prepare(images)), labels) for images, labels in trained.train]
        diagnosis = model.head.diagnose(features)
        row |= {name: diagnosis.overall[name] for name in ("dead", "usage", "win", "win_kmeans", "intra", "intra_kmeans")}
        before = model.head.prototypes.clone()
        for kind in ("", "refitted_"):
            if kind:
                model.head.prototypes.copy_(before)
                model.head.refit_(features)
                row["refitted"] = trained.measure()["score"]
            anchor(model, trained.train, prepare=trained.prepare)
            row[f"{kind}anchored"] = trained.measure()["score"]
    return {**row, "seconds": round(time.perf_counter() - begun, 1), "unix_time_s": int(time.time())}


def main(arguments: Sequence[str] | None = None) -> int:
    """Make the rows that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recipes", description=__doc__.partition("\n")[0])
    heads = ["softmax", *RECIPES, *VARIANTS]
    parser.add_argument("--task", action="append", choices=TASKS, required=True)
    parser.add_argument("--head", action="append", choices=heads, required=True, help="softmax, a recipe, or a variant of one")
    parser.add_argument("--seed", action="append", type=int, help="may be repeated (0, 1, 2)")
    parser.add_argument("--data", type=Path, help="folder of Fashion-MNIST, where it is not that of Debian's package")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of a run (1)")
    parser.add_argument("--out", type=Path, required=True, help="file of JSON lines to add the rows to")
    given = parser.parse_args(arguments)
    built.demand()
    torch.set_num_threads(given.threads)
    for task in given.task:
        for seed in given.seed or (0, 1, 2):
            for head in given.head:
                row = row_of(task, head, seed, given.data if task.startswith("fashion") else None)
                record.append(given.out, row)
                print(json.dumps(row), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
