"""Training data: the digit scenes, or a user's folder of images and masks, as random crops or as tiles of whole images."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps
from torch import Tensor

from ..demo import scenes

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
MASK_SUFFIXES = (".png", ".tif", ".tiff", ".bmp")  # without loss: a class id must come back as it was
IMAGE_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
MASK_MODES = ("P", "L", "1", "I", "I;16", "I;16L", "I;16B")
TRAIN_SCENES, TEST_SCENES, TEST_SEED = 256, 32, 1000
# What networks with published weights expect of an image in 0..1.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

Picture = NDArray[np.uint8]
Mask = NDArray[np.int64]
Size = tuple[int, int]


class DataError(ValueError):
    """The user's files are wrong. The message is one line: the file, what was expected, what it is, and the fix."""


class Source(Protocol):
    """Numbered images [H,W,3] with their masks [H,W]."""

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Picture, Mask]:
        """Image and mask with this number."""
        ...

    def name(self, index: int) -> str:
        """Where they come from: the image's path below its folder, or ``train/12``."""
        ...


class DigitScenes:
    """Scenes of scikit-learn's handwritten digits, drawn once.

    Args:
        count, seed, split: as in `scenes.make_scenes`.
        size: height and width.
    """

    def __init__(self, count: int, *, seed: int, split: scenes.Split, size: Size) -> None:
        images, labels = scenes.make_scenes(count, seed=seed, split=split, config=scenes.SceneConfig(*size))
        self.images = (images.transpose(0, 2, 3, 1) * 255).round().astype(np.uint8)
        self.labels, self.split = labels.astype(np.uint8), split

    def __len__(self) -> int:
        return len(self.images)

    def read(self, index: int) -> tuple[Picture, Mask]:
        """Image and mask of a scene."""
        return self.images[index], self.labels[index].astype(np.int64)

    def name(self, index: int) -> str:
        """Split and number of a scene."""
        return f"{self.split}/{index}"


@dataclass(frozen=True)
class Pair:
    """An image and its mask; `name` is the path of both below their folders, without the suffix."""

    name: str
    image: Path
    mask: Path
    as_stored: bool = False
    """The mask is that of the image as the file stores it, whatever its EXIF orientation."""


class FolderScenes:
    """A user's images and masks.

    Args:
        pairs: from `find_pairs`.
        num_classes: ids are in [0,num_classes).
        ignore_index: an id to leave out.
    """

    def __init__(self, pairs: list[Pair], num_classes: int, ignore_index: int) -> None:
        self.pairs, self.num_classes, self.ignore_index = pairs, num_classes, ignore_index

    def __len__(self) -> int:
        return len(self.pairs)

    def read(self, index: int) -> tuple[Picture, Mask]:
        """Image and mask of a pair.

        Raises:
            DataError: a file cannot be read, or the mask holds an id that is no class.
        """
        pair = self.pairs[index]
        image = np.asarray(opened(pair.image, lambda file: (file if pair.as_stored else upright(file)).convert("RGB")))
        return image, self.mask(index)

    def mask(self, index: int) -> Mask:
        """Mask of a pair, with the errors of `read`."""
        pair = self.pairs[index]
        # not converted: the pixels of a palette image are its indices
        mask = np.asarray(opened(pair.mask, upright)).astype(np.int64)
        known = (mask >= 0) & (mask < self.num_classes) | (mask == self.ignore_index)
        if not known.all():
            unknown = np.unique(mask[~known]).tolist()
            shown = f"{unknown[:8]}" if len(unknown) <= 8 else f"{unknown[:8]} and {len(unknown) - 8} more"
            raise DataError(
                f"unknown ids {shown} in {pair.mask}: expected 0 to {self.num_classes - 1}, or {self.ignore_index} to leave "
                "a pixel out; set --num-classes or --ignore-index, or map the ids"
            )
        return mask

    def name(self, index: int) -> str:
        """Path of an image below its folder."""
        pair = self.pairs[index]
        return pair.name + pair.image.suffix


@dataclass(frozen=True)
class Scenes:
    """What a segmentation run trains on and is measured on."""

    train: Source
    test: Source
    pairs: int
    """Pairs of a user's folder, of which `train` and `test` are parts or the whole; 0: drawn scenes."""
    notes: list[str]
    """Lines that say which files are left out, and which are turned."""
    fingerprint: str
    """Of the files, by which a resumed run sees whether its data changed."""


def load_scenes(
    images: Path | None, masks: Path | None, *, num_classes: int, ignore_index: int, held_out: float, seed: int, size: Size
) -> Scenes:
    """A user's images and masks, or scenes of digits where `images` is None.

    Args:
        images: folder, see `find_pairs`.
        masks: folder.
        num_classes: of the masks.
        ignore_index: of the masks.
        held_out: share of the pairs to measure on, see `split_pairs`.
        seed: of that draw, and of the training scenes.
        size: of the scenes.
    """
    if images is None or masks is None:
        made = (DigitScenes(TRAIN_SCENES, seed=seed, split="train", size=size),
                DigitScenes(TEST_SCENES, seed=TEST_SEED, split="test", size=size))  # fmt: skip
        return Scenes(*made, 0, [], "digit scenes")
    pairs, notes = find_pairs(images, masks)
    train, test = (FolderScenes(some, num_classes, ignore_index) for some in split_pairs(pairs, held_out, seed))
    return Scenes(train, test, len(pairs), notes, fingerprint(pairs))


def find_pairs(images: Path, masks: Path) -> tuple[list[Pair], list[str]]:
    """Pairs of an image and the mask of the same name (below their folders, without suffix), and what there is to say: lines
    that name the files left out, and those that EXIF turns.

    Reads the headers of the files, not their pixels.

    Raises:
        DataError: a folder is missing or holds no pair, an image has no mask, two files share a name, a file is no image, a
            mask is in colour or not of its image's size.
    """
    (by_name, no_images), (mask_by_name, no_masks) = (
        _files(*folder) for folder in ((images, IMAGE_SUFFIXES, "image"), (masks, MASK_SUFFIXES, "mask"))
    )
    if not by_name.keys() & mask_by_name.keys():
        raise DataError(
            f"no pairs found in {images} and {masks}: expected files of equal name such as images/a.jpg and masks/a.png; got "
            f"{_counted(len(by_name), 'image')} ({', '.join(IMAGE_SUFFIXES)}) and {_counted(len(mask_by_name), 'mask')} "
            f"({', '.join(MASK_SUFFIXES)}); rename the masks like their images"
        )
    pairs = []
    for name, image in sorted(by_name.items()):
        if name not in mask_by_name:
            other = next((path for path in no_masks if path.with_suffix("") == masks / name), None)
            fix = f"add it or take the image away{'' if other is None else f'; {other.name} is there, but may not keep ids'}"
            raise DataError(f"{image} has no mask: expected {masks / name}.png; {fix}")
        pairs.append(Pair(name, image, mask_by_name[name]))
    checked, turned = zip(*map(_checked, pairs), strict=True)
    notes = {
        "Left out, masks without an image": [path for name, path in mask_by_name.items() if name not in by_name],
        "Left out, no images by their suffix": no_images,
        "Left out, no masks by their suffix": no_masks if masks != images else [],
        "Turned as their EXIF orientation says": [
            p.image for p, turn in zip(checked, turned, strict=True) if turn and not p.as_stored
        ],
        "Not turned as their EXIF orientation says, since their masks are not": [p.image for p in checked if p.as_stored],
    }
    return list(checked), [note(what, paths) for what, paths in notes.items() if paths]


def note(what: str, paths: list[Path]) -> str:
    """A line on files: what is said of them, how many they are, and the names of the first."""
    names = ", ".join(path.name for path in paths[:5])
    return f"{what} ({len(paths)}): {names}{f' and {len(paths) - 5} more' if len(paths) > 5 else ''}"


def _checked(pair: Pair) -> tuple[Pair, bool]:
    """The pair, with what its image's orientation means for it, and whether the image has one."""
    (mode, stored, size, turned), (mask_mode, _, mask_size, _) = opened(pair.image, _header), opened(pair.mask, _header)
    if mode not in IMAGE_MODES:
        raise DataError(f"{pair.image}: expected an 8-bit image; got mode {mode}; save it with 8 bits per channel")
    if mask_mode not in MASK_MODES:
        raise DataError(
            f"{pair.mask}: expected a mask of class ids, with a palette or one channel; got mode {mask_mode}; save the ids "
            "themselves as 8- or 16-bit integers, not their colours"
        )
    if mask_size not in (size, stored):
        raise DataError(
            f"{pair.mask}: expected the size of its image {pair.image}, {size[0]}x{size[1]} (width x height); got "
            f"{mask_size[0]}x{mask_size[1]}; resize the mask with nearest neighbour"
        )
    return replace(pair, as_stored=mask_size != size), turned


def _orientation(file: Image.Image) -> int:
    """The EXIF orientation, 1 to 8; 1: as stored."""
    if file.format == "PNG" and "exif" not in file.info:  # Pillow would decode all of it to look behind the pixels
        return 1
    try:
        return int(file.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of a damaged block, for which the image is no worse
        return 1


def _header(file: Image.Image) -> tuple[str, Size, Size, bool]:
    """Mode, width and height as stored and as shown, and whether an orientation turns it."""
    (width, height), orientation = file.size, _orientation(file)
    if file.format == "TIFF" and orientation != 1:  # Pillow turns it by itself, when it loads it
        file.load()
        return file.mode, file.size, file.size, True
    return file.mode, (width, height), (height, width) if orientation >= 5 else (width, height), orientation != 1


def upright(file: Image.Image) -> Image.Image:
    """A copy of an image, turned as its EXIF orientation says: as viewers and labelling tools show it."""
    return file.copy() if _orientation(file) == 1 else ImageOps.exif_transpose(file)


def _files(folder: Path, suffixes: tuple[str, ...], kind: str) -> tuple[dict[str, Path], list[Path]]:
    """Files of these suffixes by name, and the others."""
    if not folder.is_dir():
        raise DataError(f"{folder}: expected a folder of {kind}s; got {'a file' if folder.exists() else 'nothing there'}")
    found: dict[str, Path] = {}
    others = []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or not path.is_file():
            continue
        if path.suffix.lower() not in suffixes:
            others.append(path)
            continue
        name = path.relative_to(folder).with_suffix("").as_posix()
        if name in found:
            raise DataError(f"{path}: expected one {kind} of this name; got {found[name].name} too; take one of them away")
        found[name] = path
    return found, others


#: Masks that `survey` reads.
SURVEYED = 32


def survey(scenes: FolderScenes, masks: Path, least: int, part: str = "") -> str:
    """Which ids the masks of a folder hold, in a line: of `SURVEYED` of them, and of more until `least` classes have a pixel.

    Masks that cannot be used are passed over here; they are refused when their turn comes.

    Args:
        scenes: to look at.
        masks: their folder, for the error.
        least: classes that there must be, at most 2.
        part: which of the masks these are, for the error.

    Raises:
        DataError: fewer classes have a pixel in all of the masks.
    """
    classes, ignored, count = scenes.num_classes, scenes.ignore_index, len(scenes)
    pixels, left_out, seen = np.zeros(classes, np.int64), 0, 0
    spread = np.random.default_rng(0).permutation(count).tolist()
    for index in spread:
        if seen >= SURVEYED and np.count_nonzero(pixels) >= least:
            break
        try:
            mask = scenes.mask(index)
        except DataError:
            continue
        kept = mask[mask != ignored]
        pixels += np.bincount(kept, minlength=classes)
        left_out, seen = left_out + mask.size - kept.size, seen + 1
    if seen == 0:
        return "no mask can be used"
    share = f"{left_out / (left_out + pixels.sum()):.1%} of the pixels are {ignored}, which is left out"
    if np.count_nonzero(pixels) < least:
        found = f"class {np.argmax(pixels)} alone" if pixels.any() else "none"
        wanted = f"pixels of {'two classes or more' if least > 1 else 'a class'} in 0 to {classes - 1}"
        raise DataError(
            f"{masks}: expected {wanted}; got {found} in {_counted(seen, 'mask')}{part}; {share}; where {ignored} is a class, "
            f"save its pixels as its number, {classes - 1} say; else set --num-classes or --ignore-index, or map the ids"
        )
    absent = [str(c) for c in np.flatnonzero(pixels == 0)]
    missing = f"; no pixel of class {', '.join(absent[:20])}{' and others' if len(absent) > 20 else ''}" if absent else ""
    return f"Masks ({seen} of {count} read): {share}{missing}"


def opened(path: Path, use: Any) -> Any:
    """What `use` makes of an opened image.

    Raises:
        DataError: it is missing or damaged.
    """
    try:
        with Image.open(path) as file:
            return use(file)
    # Pillow's decoders raise all of these for files that are damaged
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: expected an image that can be read; got {error}; replace the file or take it away") from None


def _counted(count: int, what: str) -> str:
    return f"{count} {what}{'' if count == 1 else 's'}"


def split_pairs(pairs: list[Pair], held_out: float, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Pairs to train on, and pairs to measure on: a share `held_out` of all, drawn by `seed`. At least one of each."""
    count = min(max(1, round(held_out * len(pairs))), len(pairs) - 1)
    if held_out == 0 or count == 0:
        return pairs, pairs
    drawn = set(np.random.default_rng([seed, 2]).permutation(len(pairs))[:count].tolist())
    return [p for i, p in enumerate(pairs) if i not in drawn], [p for i, p in enumerate(pairs) if i in drawn]


def fingerprint(pairs: list[Pair]) -> str:
    """Digest of the names, by which a resumed run sees whether its data changed."""
    return hashlib.sha256("\n".join(pair.name for pair in pairs).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Batches:
    """Batches of random crops. The batch of a step follows from `seed` and the number of the step alone.

    So a resumed run needs no state to go on with the same data.
    """

    source: Source
    batch: int
    size: Size
    seed: int
    flip: bool
    ignore_index: int
    workers: int = 2

    def steps(self, first: int, last: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images [B,3,h,w] uint8 and labels [B,h,w] int64 of steps first..last. Threads read the next batch meanwhile."""
        pool = ThreadPoolExecutor(self.workers)
        try:
            ahead = [pool.submit(self.sample, number) for number in self._numbers(first)] if first <= last else []
            for step in range(first, last + 1):
                now = ahead
                ahead = [pool.submit(self.sample, number) for number in self._numbers(step + 1)] if step < last else []
                yield _stacked([sample.result() for sample in now])
        finally:
            pool.shutdown(cancel_futures=True)

    def _numbers(self, step: int) -> range:
        return range((step - 1) * self.batch, step * self.batch)

    def sample(self, number: int) -> tuple[Picture, Mask]:
        """Crop of the `number`-th sample of training, from 0. The order is one random permutation after another."""
        epoch, position = divmod(number, len(self.source))
        index = int(order_of(len(self.source), self.seed, epoch)[position])
        image, mask = self.source.read(index)
        rng = np.random.default_rng([self.seed, 1, number])
        space = [max(0, length - wanted) for length, wanted in zip(mask.shape, self.size, strict=True)]
        top, left = (int(rng.integers(0, room + 1)) for room in space)
        image, mask = cut(image, mask, top, left, self.size, self.ignore_index)
        return (image[:, ::-1], mask[:, ::-1]) if self.flip and rng.random() < 0.5 else (image, mask)


@lru_cache(maxsize=2)  # the epochs of a batch that spans two
def order_of(length: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The order in which an epoch, from 0, sees `length` samples."""
    return np.random.default_rng([seed, 0, epoch]).permutation(length)


def cut(image: Picture, mask: Mask, top: int, left: int, size: Size, ignore_index: int) -> tuple[Picture, Mask]:
    """Window of an image and its mask; beyond their edges it is black and left out."""
    window = (slice(top, top + size[0]), slice(left, left + size[1]))
    image, mask = image[window], mask[window]
    missing = [(0, wanted - length) for length, wanted in zip(mask.shape, size, strict=True)]
    if any(after for _, after in missing):
        image = np.pad(image, [*missing, (0, 0)])
        mask = np.pad(mask, missing, constant_values=ignore_index)
    return image, mask


def tiles(source: Source, batch: int, size: Size, ignore_index: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of windows that cover every pixel of a source once, all of one size: some networks take no other."""
    return ((images, labels) for images, labels, _ in named_tiles(source, batch, size, ignore_index))


def named_tiles(source: Source, batch: int, size: Size, ignore_index: int) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """What `tiles` gives, and the name of each: that of its image, with ``@top,left`` where the image has several."""
    pending: list[tuple[Picture, Mask]] = []
    names: list[str] = []
    for index in range(len(source)):
        image, mask = source.read(index)
        corners = [(top, left) for top in range(0, mask.shape[0], size[0]) for left in range(0, mask.shape[1], size[1])]
        for top, left in corners:
            pending.append(cut(image, mask, top, left, size, ignore_index))
            names.append(source.name(index) + (f"@{top},{left}" if len(corners) > 1 else ""))
            if len(pending) == batch:
                yield *_stacked(pending), names
                pending, names = [], []
    if pending:
        yield *_stacked(pending), names


def _stacked(samples: list[tuple[Picture, Mask]]) -> tuple[Tensor, Tensor]:
    images, masks = (np.stack(parts) for parts in zip(*samples, strict=True))
    return torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), torch.from_numpy(masks)


def network_input(images: Tensor, device: torch.device) -> Tensor:
    """Images [B,3,H,W] uint8 as floats on a device, normalised as networks with published weights expect it."""
    mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in (MEAN, STD))
    return (images.to(device).float() / 255 - mean) / std
