"""What anchoring leaves: the training sample that every sub-centroid is, in memory and in two files."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from ..errors import check_value
from ..nn import SubCentroids
from ..nn._usage import dead_below, usage
from ..runs.checkpoint import replacing

TENSORS, INDEX = "anchors.safetensors", "anchors.json"
FORMAT, VERSION = "dnc_kernels anchors", 1


class AnchorsError(ValueError):
    """Saved anchors cannot be read. The message is one line: the file, what was expected, what it is, and the fix."""


@dataclass(frozen=True)
class Figures:
    """How well a classifier does on a set of samples.

    Args:
        accuracy: share of the samples (segmentation: pixels) that got their class.
        per_class: of each class its accuracy, or in segmentation its intersection over union; None where it does not occur.
        miou: mean of `per_class` in segmentation; None for images.
        count: samples or pixels that were measured.
    """

    accuracy: float
    per_class: tuple[float | None, ...]
    miou: float | None
    count: int

    @property
    def value(self) -> float:
        """The one number: mIoU where there is one, else the accuracy."""
        return self.accuracy if self.miou is None else self.miou

    @property
    def name(self) -> str:
        """What `value` is called."""
        return "accuracy" if self.miou is None else "mIoU"


@dataclass(frozen=True, eq=False)
class Anchor:
    """The training sample that a sub-centroid is.

    Args:
        label, sub: sub-centroid `sub` of class `label`.
        sample: number of the sample in the training data; -1: the class had too few samples, the sub-centroid stays as it was
            and nothing after `share` has a meaning.
        id: name of the sample.
        similarity: cosine between the sample and the sub-centroid that it replaced.
        share: share of the class's training samples (pixels) that were nearest to the replaced sub-centroid, among those of
            the class.
        row, column: pixel of the picture that the feature is centred on: of an image classifier the middle.
        box: of the crop in the picture: top, left, height, width.
        crop: [3,h,w] uint8, what `box` shows, scaled down where it was large.
    """

    label: int
    sub: int
    sample: int
    id: str
    similarity: float
    share: float
    row: int
    column: int
    box: tuple[int, int, int, int]
    crop: Tensor | None

    @property
    def real(self) -> bool:
        """Whether there is a sample."""
        return self.sample >= 0

    @property
    def at(self) -> tuple[float, float]:
        """Row and column of the feature's centre in the crop, in [0,1]."""
        top, left, height, width = self.box
        return (self.row + 0.5 - top) / height, (self.column + 0.5 - left) / width


@dataclass(frozen=True, eq=False)
class Anchors:
    """The training samples that a head's sub-centroids are.

    Args:
        classes: names of the C classes.
        segmentation: whether samples are pixels of images.
        rows: [C][K] anchors.
        embedding: [C,K,D] float32 or float64: the embeddings of the samples, where there is none the old sub-centroid.
        counts: training samples (pixels) of each class.
        before, after: figures of the classifier before and after; None where nothing was measured.
    """

    classes: tuple[str, ...]
    segmentation: bool
    rows: tuple[tuple[Anchor, ...], ...]
    embedding: Tensor
    counts: tuple[int, ...]
    before: Figures | None
    after: Figures | None

    def __getitem__(self, index: tuple[int, int]) -> Anchor:
        """The anchor of sub-centroid (class, k)."""
        return self.rows[index[0]][index[1]]

    def __iter__(self) -> Iterator[Anchor]:
        return (anchor for row in self.rows for anchor in row)

    @property
    def sample(self) -> Tensor:
        """[C,K] int64: number of each sample, -1 where a sub-centroid stayed."""
        return torch.tensor([[anchor.sample for anchor in row] for row in self.rows])

    @property
    def share(self) -> Tensor:
        """[C,K] float64: see `Anchor`."""
        return torch.tensor([[anchor.share for anchor in row] for row in self.rows], dtype=torch.float64)

    @property
    def dead_below(self) -> float:
        """The share of its class's samples below which a sub-centroid is dead: 1%, or above K = 10 a tenth of an even share."""
        return dead_below(self.embedding.shape[1])

    @property
    def dead(self) -> float:
        """Share of the sub-centroids, of classes with samples, that were dead before anchoring (`dead_below`)."""
        share = self.share[torch.tensor(self.counts) > 0]
        return float((share < self.dead_below).double().mean()) if len(share) else 0.0

    @property
    def usage(self) -> float:
        """How evenly a class's samples spread over its sub-centroids before anchoring, the mean over classes with samples:
        entropy over log K. 1: evenly; 0: one does it all.
        """
        share = self.share[torch.tensor(self.counts) > 0]
        return float(usage(share).mean()) if len(share) else 1.0

    @property
    def cost(self) -> float | None:
        """What anchoring took from the classifier's figure (`Figures.value`), negative where it gave; None if unmeasured."""
        return None if self.before is None or self.after is None else self.before.value - self.after.value

    @torch.no_grad()
    def apply_(self, head: SubCentroids) -> None:
        """Make the embeddings the sub-centroids of `head`, in place: then it decides by these samples.

        Raises:
            ValueError: the head has another number of classes, sub-centroids or channels.
        """
        have = list(head.prototypes.shape)
        check_value(
            list(self.embedding.shape) == have, "Anchors.apply_", "head", f"of [C,K,D]={list(self.embedding.shape)}", str(have)
        )
        head.prototypes.copy_(self.embedding)
        # neither a start that is due nor sums of an unfinished step may move them
        head._forget_pending(start=True)

    def save(self, folder: Path | str) -> tuple[Path, Path]:
        """Write ``anchors.safetensors`` (embeddings and crops) and ``anchors.json`` (all else); return both paths.

        Each is replaced as a whole. The JSON holds a digest of both, so that `load` refuses files that do not belong together.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        crops = {f"crop.{a.label}.{a.sub}": a.crop.contiguous() for a in self if a.crop is not None}
        tensors = save_tensors({"embedding": self.embedding.cpu().contiguous(), **crops})
        index: dict[str, Any] = {
            "format": FORMAT,
            "version": VERSION,
            "segmentation": self.segmentation,
            "classes": self.classes,
            "counts": self.counts,
            "before": self.before and asdict(self.before),
            "after": self.after and asdict(self.after),
            "anchors": [
                {name: value for name, value in vars(one).items() if name not in ("label", "sub", "crop")} for one in self
            ],
        }
        index["digest"] = _digest(index, tensors)
        for name, content in ((TENSORS, tensors), (INDEX, json.dumps(index, indent=1, allow_nan=False).encode())):
            with replacing(folder / name) as file:
                file.write(content)
        return folder / TENSORS, folder / INDEX

    @staticmethod
    def load(folder: Path | str) -> Anchors:
        """Read what `save` wrote. No code of the files runs.

        Raises:
            AnchorsError: a file is missing, damaged, changed or of another kind or version.
        """
        folder = Path(folder)
        path = folder / INDEX
        try:
            index = json.loads(path.read_bytes())
            if not isinstance(index, dict) or (index.get("format"), index.get("version")) != (FORMAT, VERSION):
                raise ValueError(f"format {index.get('format') if isinstance(index, dict) else type(index).__name__!r}, "
                                 f"version {index.get('version') if isinstance(index, dict) else None!r}")  # fmt: skip
            path = folder / TENSORS
            content = path.read_bytes()
            if index.pop("digest", None) != _digest(index, content):
                raise ValueError("files whose digest differs")
            return _restored(index, load_tensors(content))
        except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError, SafetensorError) as error:
            got = error.strerror or str(error) if isinstance(error, OSError) else str(error)
            got = got.partition("\n")[0][:200] or type(error).__name__
            raise AnchorsError(
                f"{path}: expected anchors as Anchors.save writes them (version {VERSION}), unchanged; got {got}; anchor again"
            ) from None


def _digest(index: dict[str, Any], tensors: bytes) -> str:
    text = json.dumps({name: value for name, value in index.items() if name != "digest"}, sort_keys=True)
    return hashlib.sha256(text.encode() + hashlib.sha256(tensors).digest()).hexdigest()


def _restored(index: dict[str, Any], tensors: dict[str, Tensor]) -> Anchors:
    """Anchors of what the files hold.

    Raises:
        ValueError, KeyError, TypeError: it does not fit together.
    """
    embedding = tensors.pop("embedding")
    classes, segmentation, counts, entries = (index[name] for name in ("classes", "segmentation", "counts", "anchors"))
    _expect(embedding.ndim == 3 and embedding.is_floating_point(), "embedding", embedding)
    c, k, _ = embedding.shape
    _expect(bool((embedding.norm(dim=2) - 1).abs().amax() < 0.05), "embedding", "rows that are not of unit length")  # 16 bits
    _expect(len(classes) == len(counts) == c and all(isinstance(name, str) for name in classes), "classes", classes)
    _expect(len(entries) == c * k, "anchors", f"{len(entries)} instead of {c * k}")
    rows: list[list[Anchor]] = [[] for _ in range(c)]
    for number, entry in enumerate(entries):
        label, sub = divmod(number, k)
        crop = tensors.pop(f"crop.{label}.{sub}", None)
        one = Anchor(label=label, sub=sub, crop=crop, **{**entry, "box": tuple(entry["box"])})
        fits = (crop is not None) == one.real and len(one.box) == 4 and isinstance(one.id, str)
        _expect(fits, f"anchor {label}, {sub}", entry)
        if crop is not None:
            _expect(crop.dtype == torch.uint8 and crop.ndim == 3 and crop.shape[0] == 3, f"crop {label}, {sub}", crop)
        rows[label].append(one)
    _expect(not tensors, "tensors", f"{len(tensors)} that belong to no anchor")
    uses = Counter((a.sample, a.row, a.column) for row in rows for a in row if a.real)
    _expect(max(uses.values(), default=1) == 1, "anchors", "a sample that is two of them")
    figures = [
        None if f is None else Figures(**{**f, "per_class": tuple(f["per_class"])}) for f in (index["before"], index["after"])
    ]
    return Anchors(
        tuple(classes), bool(segmentation), tuple(tuple(row) for row in rows), embedding, tuple(counts), figures[0], figures[1]
    )


def _expect(ok: bool, what: str, got: Any) -> None:
    if not ok:
        raise ValueError(f"{what}: {got}")
