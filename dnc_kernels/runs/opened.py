"""A finished or running training run, opened again: its model and its data, in a fixed order and without augmentation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..demo.scenes import CLASS_NAMES
from ..integrations import DNCImageClassifier, DNCSegmenter
from .checkpoint import CheckpointError, found, load
from .data import Size, Source, load_scenes, named_tiles, network_input
from .images import load_dataset
from .networks import make_backbone, make_classifier, make_segmenter
from .views import InOrder, Views

BATCH = 32


class Samples(Protocol):
    """Images with labels and ids, in a fixed order; can be iterated again and again."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        """Batches: images [B,3,H,W] uint8, labels [B] or [B,H,W] int64, ids."""
        ...


@dataclass(frozen=True)
class Opened:
    """What a run was about."""

    model: DNCSegmenter | DNCImageClassifier
    """In eval mode, on its device; with its moving average of weights if it kept one."""
    classes: list[str]
    """Names of the C classes."""
    train: Samples
    test: Samples
    prepare: Callable[[Tensor], Tensor]
    """Images [B,3,H,W] uint8 to the input of `model.backbone`, on the model's device."""
    ignore_index: int
    """Label to leave out; so is any other negative one."""


@dataclass(frozen=True)
class _SceneSamples:
    """Windows of one size; `len` counts images, of which a large one has several windows."""

    source: Source
    size: Size
    ignore_index: int

    def __len__(self) -> int:
        return len(self.source)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        return named_tiles(self.source, BATCH, self.size, self.ignore_index)


def open_run(path: Path, data: Path | None = None, device: torch.device | str = "cpu") -> Opened:
    """The model and data of a run of examples/train.py or examples/classify.py.

    Args:
        path: its folder (the last checkpoint counts), or a checkpoint.
        data: where its data lie now, if not where the run found them: what --data was, or a folder with images/ and masks/.
        device: where the model goes.

    Raises:
        CheckpointError: there is no checkpoint, or it is damaged or of a softmax head.
        DataError: its data are gone, or not those that it was trained on.
    """
    content = load(_checkpoint(Path(path)))
    about = content["about"]
    open_as = {"classification": _open_classification, "segmentation": _open_segmentation}[about["task"]]
    return open_as(path, content, about, data, torch.device(device))


def _checkpoint(path: Path) -> Path:
    if not path.is_dir():
        return path
    for folder in (path, path / "dnc"):  # a run of both heads has a folder for each
        if there := found(folder):
            return there[-1]
    raise CheckpointError(f"{path}: expected a folder with the checkpoints of a run; got none; give the --out of the run")


def _open_classification(
    path: Path, content: dict[str, Any], about: dict[str, Any], data: Path | None, device: torch.device
) -> Opened:
    if about["head"] != "dnc":
        raise CheckpointError(f"{path}: expected a run with a DNC head; got {about['head']}; give the folder of the other")
    dataset = load_dataset(about["dataset"], data or _path(about["data"]), about["size"])
    if about["train_images"] is not None:
        dataset = dataset.first_of_draw(about["train_images"])
    _check_same_files(path, about, dataset.fingerprint)
    views = Views(about["size"], about["augment"])
    model = make_classifier(about)
    assert isinstance(model, DNCImageClassifier)
    train, test = (InOrder(images, views, BATCH) for images in (dataset.train, dataset.test))
    return Opened(
        _restored(model, content, device), about["classes"], train, test, partial(network_input, device=device),
        model.head.ignore_index,
    )  # fmt: skip


def _open_segmentation(
    path: Path, content: dict[str, Any], about: dict[str, Any], data: Path | None, device: torch.device
) -> Opened:
    folders = [about["images"] and (data / name if data else Path(about[name])) for name in ("images", "masks")]
    size, ignore_index = tuple(about["size"]), about["ignore_index"]
    scenes = load_scenes(
        *folders, num_classes=about["num_classes"], ignore_index=ignore_index, held_out=about["held_out"],
        seed=about["seed"], size=size,
    )  # fmt: skip
    _check_same_files(path, about, scenes.fingerprint)
    model = make_segmenter(make_backbone(about["network"], size, tiny=about["tiny"]), about)
    train, test = (_SceneSamples(source, size, ignore_index) for source in (scenes.train, scenes.test))
    return Opened(
        _restored(model, content, device), about["classes"], train, test, partial(network_input, device=device), ignore_index
    )


def _path(text: str | None) -> Path | None:
    return None if text is None else Path(text)


def _check_same_files(path: Path, about: dict[str, Any], now: str) -> None:
    if about["files"] != now:
        raise CheckpointError(
            f"{path}: expected data with fingerprint {about['files']}; got {now}; give the data it was trained on"
        )


def _restored(model: Any, content: dict[str, Any], device: torch.device) -> Any:
    try:
        model.load_state_dict(content.get("average") or content["model"])
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(
            f"expected the weights of this network; got {reason}; use the package versions it began with"
        ) from None
    return model.to(device).eval()


def scene_classes(num_classes: int, drawn: bool) -> list[str]:
    """Names of the classes of a segmentation run: of scenes drawn by `demo.scenes`, or of a user's masks, which have none."""
    return list(CLASS_NAMES) if drawn else [f"class {i}" for i in range(num_classes)]
