import json
import os
import random
import re
import signal
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("PIL")

import train as script
from PIL import Image

from dnc_kernels.integrations import _optional
from dnc_kernels.nn import DNCHead
from dnc_kernels.runs import checkpoint, data, networks, training

SIZE = (48, 40)


class TinyBackbone(torch.nn.Module):
    """Draws from torch, numpy and python while training, as the networks that people bring may."""

    channels = 8

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 8, 4, stride=4)
        self.norm = torch.nn.BatchNorm2d(8)

    def forward(self, images):
        x = torch.nn.functional.dropout(self.norm(self.conv(images)), 0.1, self.training)
        return x * (1 + 0.01 * np.random.rand() + 0.01 * random.random()) if self.training else x


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(script, "make_backbone", lambda *_, **__: TinyBackbone())
    monkeypatch.setattr(data, "TRAIN_SCENES", 10)
    monkeypatch.setattr(data, "TEST_SCENES", 4)


@pytest.fixture
def folder(tmp_path):
    """Eight images and palette masks of several sizes, three classes and 255."""
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (tmp_path / kind / "more").mkdir(parents=True)
    for i in range(8):
        name = f"more/{i}" if i % 2 else str(i)
        height, width = 40 + 5 * i, 70 - 5 * i
        ids = rng.choice([0, 1, 2, 255], size=(height, width)).astype(np.uint8)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(tmp_path / f"images/{name}.jpg")
        save_palette(ids, tmp_path / f"masks/{name}.png")
    return tmp_path


def save_palette(ids, path):
    mask = Image.fromarray(ids).convert("P")
    mask.putdata(ids.flatten().tolist())
    # shuffled colours: a conversion to RGB or grey would not give the ids back
    mask.putpalette(np.random.default_rng(1).integers(0, 256, 768).tolist())
    mask.save(path)


def folder_options(folder, *more):
    return ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--num-classes", "3", *more]


def common(out, *more):
    return ["--size", "48x40", "--batch", "2", "--subcentroids", "2", "--threads", "1", "--out", str(out), *more]


def rows(out):
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def equal(a, b):
    """Whether two checkpoints are equal bit for bit."""
    if isinstance(a, dict):
        return isinstance(b, dict) and a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return isinstance(b, (list, tuple)) and len(a) == len(b) and all(map(equal, a, b))
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    return a == b and type(a) is type(b)


# ---- data


@pytest.mark.parametrize("mode", ["P", "L", "I;16", "1"])
def test_mask_ids_come_back_as_they_were_written(tmp_path, mode):
    top = {"P": 255, "L": 255, "I;16": 999, "1": 1}[mode]
    ids = np.random.default_rng(0).integers(0, top + 1, (9, 11))
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
    Image.fromarray(np.zeros((9, 11, 3), np.uint8)).save(tmp_path / "images/a.png")
    if mode == "P":
        save_palette(ids.astype(np.uint8), tmp_path / "masks/a.png")
    else:
        kind = {"L": np.uint8, "I;16": np.uint16, "1": bool}[mode]
        Image.fromarray(ids.astype(kind)).save(tmp_path / "masks/a.png")
    pairs, notes = data.find_pairs(tmp_path / "images", tmp_path / "masks")
    image, mask = data.FolderScenes(pairs, top + 1, -1).read(0)
    assert notes == [] and image.shape == (9, 11, 3) and mask.dtype == np.int64
    np.testing.assert_array_equal(mask, ids)


def test_pairs_match_by_path_below_the_folders_and_what_is_left_out_is_named(folder):
    save_palette(np.zeros((3, 3), np.uint8), folder / "masks/spare.png")
    (folder / "images/.hidden.png").write_text("not an image")
    for name in (*"abcdef", "notes"):
        (folder / f"images/{name}.txt").write_text("not an image")
    pairs, notes = data.find_pairs(folder / "images", folder / "masks")
    assert notes == [
        "Left out, masks without an image (1): spare.png",
        "Left out, no images by their suffix (7): a.txt, b.txt, c.txt, d.txt, e.txt and 2 more",
    ]
    assert [pair.name for pair in pairs] == ["0", "2", "4", "6", "more/1", "more/3", "more/5", "more/7"]


@pytest.fixture
def photo(tmp_path):
    """A function that writes a photo whose orientation differs from its pixels, and a mask of the scene as it is shown."""
    shown = np.arange(30 * 20, dtype=np.uint8).reshape(30, 20)

    def write(orientation, kind="jpg", mask=shown, shape=shown.shape):
        for folder in ("images", "masks"):
            (tmp_path / folder).mkdir(exist_ok=True)
        scene = Image.fromarray(np.resize(shown, shape))
        turn = {3: "ROTATE_180", 6: "ROTATE_90", 8: "ROTATE_270"}[orientation]  # what EXIF's turn undoes
        exif = Image.Exif()
        exif[274] = orientation
        scene.transpose(Image.Transpose[turn]).convert("RGB").save(tmp_path / f"images/a.{kind}", exif=exif, quality=100)
        Image.fromarray(mask).save(tmp_path / "masks/a.png")
        return data.find_pairs(tmp_path / "images", tmp_path / "masks")

    write.shown = shown
    return write


@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photo_is_turned_as_its_orientation_says(photo, kind, orientation):
    pairs, notes = photo(orientation, kind)
    image, mask = data.FolderScenes(pairs, 256, -1).read(0)
    np.testing.assert_array_equal(mask, photo.shown)
    np.testing.assert_allclose(image[..., 0].astype(int), photo.shown, atol=24)  # JPEG and WebP are near
    assert notes == [f"Turned as their EXIF orientation says (1): a.{kind}"]


def test_a_photo_stays_as_stored_where_its_mask_is_not_turned_and_another_size_is_an_error(photo):
    stored = np.ascontiguousarray(np.rot90(photo.shown))  # 20 x 30
    pairs, notes = photo(6, mask=stored)
    image, mask = data.FolderScenes(pairs, 256, -1).read(0)
    np.testing.assert_array_equal(mask, stored)
    np.testing.assert_allclose(image[..., 0].astype(int), stored, atol=24)
    assert notes == ["Not turned as their EXIF orientation says, since their masks are not (1): a.jpg"]
    with pytest.raises(data.DataError, match=r"size of its image .*a.jpg, 20x30 \(width x height\); got 20x20"):
        photo(6, mask=stored[:, :20])


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_harms_no_image(tmp_path):
    Image.new("RGB", (20, 30)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff")
    assert data.opened(tmp_path / "a.jpg", data.upright).size == (20, 30)


def test_masks_of_0_and_255_with_two_classes_are_refused(folder, tiny, capsys):
    """It trained on background alone, without a word: 255 is the id to leave out."""
    for path in (folder / "masks").rglob("*.png"):
        with Image.open(path) as mask:
            ids = np.asarray(mask)
        Image.fromarray(np.where(ids < 2, 0, 255).astype(np.uint8)).save(path)
    options = ["--images", str(folder / "images"), "--masks", str(folder / "masks"), "--num-classes", "2"]
    assert script.main([*options, *common(folder / "out", "--steps", "1")]) == 1
    said = one_line_error(capsys)
    assert re.search(r"expected pixels of two classes or more in 0 to 1; got class 0 alone in \d masks; \d\d.\d% of the", said)
    assert "where 255 is a class, save its pixels as its number, 1 say" in said
    assert not (folder / "out").exists()
    for path in (folder / "masks").rglob("*.png"):  # as advised
        with Image.open(path) as mask:
            ids = np.asarray(mask)
        Image.fromarray(np.where(ids == 255, 1, ids).astype(np.uint8)).save(path)
    assert script.main([*options, *common(folder / "out", "--steps", "1")]) == 0
    assert "Masks (7 of 7 read): 0.0% of the pixels are 255, which is left out\n" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["all", "held out"])
def test_masks_without_a_labelled_pixel_are_refused(folder, tiny, capsys, part):
    pairs, _ = data.find_pairs(folder / "images", folder / "masks")
    _, test = data.split_pairs(pairs, 0.1, 0)
    for pair in pairs if part == "all" else test:
        with Image.open(pair.mask) as mask:
            shape = mask.size[::-1]
        Image.fromarray(np.full(shape, 255, np.uint8)).save(pair.mask)
    assert script.main(folder_options(folder, *common(folder / "out"))) == 1
    which = "7 masks;" if part == "all" else "1 mask that --seed holds out;"
    assert f"got none in {which} 100.0% of the pixels are 255, which is left out" in one_line_error(capsys)


def test_classes_that_no_mask_has_are_named(folder):
    pairs, _ = data.find_pairs(folder / "images", folder / "masks")
    line = data.survey(data.FolderScenes(pairs, 5, 255), folder / "masks", 2)
    assert re.fullmatch(
        r"Masks \(8 of 8 read\): 2\d.\d% of the pixels are 255, which is left out; no pixel of class 3, 4", line
    )


def test_the_log_is_json_where_a_number_is_none(tmp_path, tiny, monkeypatch):
    """json.dumps writes NaN, which no other reader takes."""
    monkeypatch.setattr(script, "evaluate", lambda *_: float("nan"))
    assert script.main(common(tmp_path / "out", "--steps", "1")) == 0

    def refuse(text):
        raise AssertionError(text)

    lines = (tmp_path / "out/log.jsonl").read_text().splitlines()
    read = [json.loads(line, parse_constant=refuse) for line in lines]
    assert read[-1] == {"step": 1, "miou": None} and read[0]["loss"] > 0


def no_pairs(folder):
    for path in (folder / "masks").rglob("*.png"):
        path.rename(path.with_name(f"{path.stem}_mask.png"))
    return r"no pairs found in .*images and .*masks: .*got 8 images .* and 8 masks"


def image_without_mask(folder):
    (folder / "masks/4.png").unlink()
    return r"images/4.jpg has no mask: expected .*masks/4.png"


def mask_of_another_kind(folder):
    (folder / "masks/4.png").rename(folder / "masks/4.jpg")
    return r"images/4.jpg has no mask: expected .*masks/4.png; .*; 4.jpg is there, but may not keep ids"


def mask_of_floats(folder):
    Image.fromarray(np.zeros((40, 70), np.float32)).save(folder / "masks/0.tif")
    (folder / "masks/0.png").unlink()
    return r"masks/0.tif: .*got mode F; save the ids themselves as 8- or 16-bit integers"


def mismatched_sizes(folder):
    save_palette(np.zeros((60, 50), np.uint8), folder / "masks/2.png")
    return r"masks/2.png: expected the size of its image .*images/2.jpg, 60x50 \(width x height\); got 50x60"


def broken_header(folder):
    (folder / "images/2.jpg").write_bytes(b"hello")
    return r"images/2.jpg: expected an image that can be read; got cannot identify"


def colour_mask(folder):
    Image.new("RGB", (70, 40)).save(folder / "masks/0.png")
    return r"masks/0.png: expected a mask of class ids, with a palette or one channel; got mode RGB; save the ids"


def deep_image(folder):
    Image.fromarray(np.zeros((40, 70), np.uint16)).save(folder / "images/0.png")
    (folder / "images/0.jpg").unlink()
    return r"images/0.png: expected an 8-bit image; got mode I;16"


def two_of_a_name(folder):
    Image.new("RGB", (70, 40)).save(folder / "images/0.png")
    return r"images/0.png: expected one image of this name; got 0.jpg too"


def missing_folder(folder):
    (folder / "masks").rename(folder / "elsewhere")
    return r"masks: expected a folder of masks; got nothing there"


def truncated_image(folder):
    path = folder / "images/more/3.jpg"
    path.write_bytes(path.read_bytes()[:-200])
    return r"images/more/3.jpg: expected an image that can be read; got .*truncated"


def truncated_mask(folder):
    path = folder / "masks/more/3.png"
    path.write_bytes(path.read_bytes()[:-200])
    return r"masks/more/3.png: expected an image that can be read; got .*truncated"


def unknown_ids(folder):
    ids = np.zeros((40, 70), np.uint8)
    ids[3, 4], ids[5, 6] = 7, 3
    save_palette(ids, folder / "masks/0.png")
    return r"unknown ids \[3, 7\] in .*masks/0.png: expected 0 to 2, or 255"


UP_FRONT = [
    no_pairs,
    image_without_mask,
    mask_of_another_kind,
    mask_of_floats,
    mismatched_sizes,
    broken_header,
    colour_mask,
    deep_image,
    two_of_a_name,
    missing_folder,
]
WHEN_READ = [truncated_image, truncated_mask, unknown_ids]


def one_line_error(capsys):
    captured = capsys.readouterr().err
    assert captured.startswith("train.py: ") and captured.count("\n") == 1, captured
    return captured


@pytest.mark.parametrize("spoil", UP_FRONT, ids=lambda f: f.__name__)
def test_folder_that_cannot_be_used_is_refused_before_training(folder, tiny, capsys, spoil):
    expected = spoil(folder)
    assert script.main(folder_options(folder, *common(folder / "out"))) == 1
    assert re.search(expected, one_line_error(capsys))
    assert not (folder / "out").exists()


@pytest.mark.parametrize("spoil", WHEN_READ, ids=lambda f: f.__name__)
def test_file_that_cannot_be_used_is_refused_when_read_and_with_check_data_before_training(folder, tiny, capsys, spoil):
    expected = spoil(folder)
    assert script.main(folder_options(folder, *common(folder / "out", "--check-data"))) == 1
    assert re.search(expected, one_line_error(capsys))
    assert not (folder / "out").exists()
    # without: the steps before it are kept
    options = folder_options(folder, *common(folder / "out", "--held-out", "0", "--steps", "20", "--evaluate-every", "20"))
    assert script.main(options) == 1
    assert re.search(expected, one_line_error(capsys))
    (kept,) = checkpoint.found(folder / "out")
    assert checkpoint.load(kept)["step"] == len(rows(folder / "out")) > 0


def test_crops_are_windows_of_image_and_mask_alike_and_what_is_missing_is_left_out(folder):
    pairs, _ = data.find_pairs(folder / "images", folder / "masks")

    class Marked(data.FolderScenes):
        def read(self, index):
            mask = np.arange(30 * 50).reshape(30, 50)
            return np.stack([mask // 256, mask % 256, np.full_like(mask, index)], 2).astype(np.uint8), mask

    batches = data.Batches(Marked(pairs, 3, 255), 4, (40, 20), seed=0, flip=True, ignore_index=-1)
    turned, lefts, seen = set(), set(), set()
    for images, labels in batches.steps(1, 8):
        assert images.shape == (4, 3, 40, 20) and images.dtype == torch.uint8 and labels.shape == (4, 40, 20)
        assert (labels[:, 30:] == -1).all() and (images[:, :, 30:] == 0).all()
        assert torch.equal(images[:, 0, :30].long() * 256 + images[:, 1, :30], labels[:, :30])
        turned |= set((labels[:, 0, 1] - labels[:, 0, 0]).tolist())
        lefts |= set(labels[:, 0].amin(1).tolist())
        seen |= set(images[:, 2, 0, 0].tolist())
    assert turned == {1, -1} and len(lefts) > 5 and seen == set(range(8))


def test_every_epoch_has_every_pair_once_and_a_batch_follows_from_seed_and_step(folder):
    pairs, _ = data.find_pairs(folder / "images", folder / "masks")
    source = data.FolderScenes(pairs, 3, 255)
    make = lambda seed: data.Batches(source, 3, (32, 32), seed, flip=True, ignore_index=255)  # noqa: E731
    straight = list(make(0).steps(1, 6))
    resumed = [*make(0).steps(1, 2), *make(0).steps(3, 6)]
    assert all(torch.equal(a, b) for one, two in zip(straight, resumed, strict=True) for a, b in zip(one, two, strict=True))
    assert not torch.equal(straight[0][0], next(make(1).steps(1, 1))[0])
    assert sorted(data.order_of(8, 0, 5).tolist()) == list(range(8))


def test_tiles_show_every_pixel_once(folder):
    pairs, _ = data.find_pairs(folder / "images", folder / "masks")
    source = data.FolderScenes(pairs, 3, 255)
    tiles = list(data.tiles(source, 4, (32, 32), 255))
    assert all(images.shape[0] == 4 for images, _ in tiles[:-1])
    counted = torch.cat([labels.flatten() for _, labels in tiles]).bincount(minlength=256)[:3]
    expected = sum(np.bincount(source.read(i)[1].flatten(), minlength=256)[:3] for i in range(len(pairs)))
    assert counted.tolist() == expected.tolist()


@pytest.mark.parametrize(("share", "count"), [(0.0, 8), (0.01, 1), (0.25, 2), (0.99, 7)])
def test_held_out_pairs_are_not_trained_on(folder, share, count):
    pairs, _ = data.find_pairs(folder / "images", folder / "masks")
    train, test = data.split_pairs(pairs, share, seed=0)
    assert len(test) == count
    if share:
        assert {p.name for p in train} | {p.name for p in test} == {p.name for p in pairs}
        assert not {p.name for p in train} & {p.name for p in test}
    assert data.split_pairs(pairs[:1], 0.5, seed=0) == (pairs[:1], pairs[:1])


# ---- checkpoints


def test_crash_between_write_and_rename_leaves_the_old_file_whole(tmp_path, monkeypatch):
    def save(step):
        return checkpoint.save(tmp_path, step, content(step))

    def content(step):
        return {"run": {}, "step": step, "about": {}, "model": {}, "optimizer": {}, "schedule": {}, "random": torch.ones(9)}

    save(1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def crash(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", crash)
        with pytest.raises(KeyboardInterrupt):
            save(1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    with monkeypatch.context() as patch:  # a power cut: nothing runs afterwards
        patch.setattr(os, "replace", crash)
        patch.setattr(Path, "unlink", lambda *_, **__: None)
        with pytest.raises(KeyboardInterrupt):
            save(2)
    assert [path.name for path in checkpoint.found(tmp_path)] == list(before)
    assert any(path.suffix == ".partial" for path in tmp_path.iterdir())
    for step in (2, 3, 4):
        save(step)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint-00000003.pt", "checkpoint-00000004.pt"]
    assert equal(checkpoint.load(tmp_path / "checkpoint-00000004.pt"), content(4))


def test_content_is_flushed_to_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)
        monkeypatch.setattr(os, name, lambda *a, name=name, real=real: (calls.append(name), real(*a)))
    checkpoint.save(tmp_path, 1, {})
    assert calls[:2] == ["fsync", "replace"]


def first_byte_of_the_largest_tensor(path):
    with zipfile.ZipFile(path) as archive:
        info = max((i for i in archive.infolist() if "/data/" in i.filename), key=lambda i: i.file_size)
    header = path.read_bytes()[info.header_offset :][:30]
    return info.header_offset + 30 + int.from_bytes(header[26:28], "little") + int.from_bytes(header[28:30], "little")


@pytest.mark.parametrize("damage", ["cut", "empty", "flipped bit", "other file", "other archive"])
def test_damaged_checkpoint_is_refused_and_the_one_before_is_kept_and_named(tmp_path, tiny, capsys, damage):
    out = tmp_path / "out"
    assert script.main(common(out, "--steps", "6", "--stop-after", "4", "--checkpoint-every", "2")) == 0
    first, last = checkpoint.found(out)
    whole = last.read_bytes()
    spoilt = bytearray(whole)
    if damage == "flipped bit":
        spoilt[first_byte_of_the_largest_tensor(last) + 100] ^= 1
    elif damage == "other archive":
        torch.save([1, 2], last)
        spoilt = last.read_bytes()
    else:
        spoilt = {"cut": whole[: len(whole) // 2], "empty": b"", "other file": b"hello"}[damage]
    last.write_bytes(spoilt)
    capsys.readouterr()
    assert script.main(common(out, "--steps", "6", "--resume")) == 1
    message = one_line_error(capsys)
    assert re.search(rf"{last.name}: expected a checkpoint of this script, whole; got .*; go on from the one before", message)
    assert f"--resume {first}" in message
    assert checkpoint.found(out) == [first, last] and last.read_bytes() == spoilt
    assert script.main(common(out, "--steps", "6", "--resume", str(first))) == 0
    assert [row["step"] for row in rows(out) if "loss" in row] == [1, 2, 3, 4, 5, 6]


# ---- resume


@pytest.mark.parametrize("kind", ["digits", "folder"])
def test_resumed_run_is_bit_equal_to_a_straight_one(tmp_path, folder, tiny, kind):
    options = ["--steps", "6", "--checkpoint-every", "2", "--evaluate-every", "4"]
    options += folder_options(folder, "--held-out", "0.25") if kind == "folder" else []
    assert script.main(common(tmp_path / "straight", *options)) == 0
    parts = tmp_path / "parts"
    assert script.main(common(parts, *options, "--stop-after", "3")) == 0
    assert checkpoint.load(checkpoint.found(parts)[-1])["step"] == 3
    for generator in (torch.manual_seed, np.random.seed, random.seed):
        generator(99)
    assert script.main(common(parts, *options, "--resume")) == 0
    one, two = (checkpoint.load(checkpoint.found(out)[-1]) for out in (tmp_path / "straight", parts))
    assert one["step"] == two["step"] == 6
    assert equal(one, two)
    assert (tmp_path / "straight/log.jsonl").read_bytes() == (parts / "log.jsonl").read_bytes()
    assert [row["step"] for row in rows(parts) if "miou" in row] == [4, 6]
    assert (parts / "predictions.png").stat().st_size > 1000


def test_run_killed_without_warning_goes_on_from_its_last_checkpoint_bit_equal(tmp_path, tiny):
    options = ["--steps", "6", "--checkpoint-every", "2"]
    assert script.main(common(tmp_path / "straight", *options)) == 0
    killed = tmp_path / "killed"
    assert script.main(common(killed, *options, "--stop-after", "2")) == 0
    # what a kill at step 4 leaves: steps in the log that no checkpoint has, the last one half written
    with (killed / "log.jsonl").open("a") as log:
        log.write(json.dumps({"step": 3, "loss": 1.0}) + "\n" + json.dumps({"step": 4, "loss": 1.0})[:-4])
    assert script.main(common(killed, *options, "--resume")) == 0
    assert (tmp_path / "straight/log.jsonl").read_bytes() == (killed / "log.jsonl").read_bytes()
    one, two = (checkpoint.load(checkpoint.found(out)[-1]) for out in (tmp_path / "straight", killed))
    assert equal(one, two)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (["--lr", "1e-4"], r"expected a run with --lr 0.0001; got 0.001; use the options it began with"),
        (["--steps", "9"], r"expected a run with --steps 9; got 6"),
        (["--network", "fcn-resnet50"], r"expected a run with --network fcn-resnet50; got segformer"),
    ],
)
def test_resume_with_other_options_is_refused(tmp_path, tiny, capsys, more, expected):
    assert script.main(common(tmp_path / "out", "--steps", "6", "--stop-after", "1")) == 0
    capsys.readouterr()
    assert script.main(common(tmp_path / "out", "--steps", "6", "--resume", *more)) == 1
    assert re.search(expected, one_line_error(capsys))


def test_resume_with_other_files_is_refused(folder, tiny, capsys):
    options = folder_options(folder, *common(folder / "out", "--steps", "6"))
    assert script.main([*options, "--stop-after", "1"]) == 0
    (folder / "images/0.jpg").unlink()
    capsys.readouterr()
    assert script.main([*options, "--resume"]) == 1
    assert "expected a run with image files" in one_line_error(capsys)


def test_a_run_is_never_overwritten_and_nothing_is_resumed_from_nothing(tmp_path, tiny, capsys):
    assert script.main(common(tmp_path / "out", "--resume")) == 1
    assert re.search(r"out: expected a checkpoint to resume; got none; leave --resume out", one_line_error(capsys))
    assert script.main(common(tmp_path / "out", "--resume", str(tmp_path / "none.pt"))) == 1
    assert re.search(r"none.pt: expected a checkpoint of this script, whole; got .*No such file", one_line_error(capsys))
    assert script.main(common(tmp_path / "out", "--steps", "2")) == 0
    before = (tmp_path / "out/log.jsonl").read_bytes()
    capsys.readouterr()
    assert script.main(common(tmp_path / "out", "--steps", "2")) == 1
    assert "expected a folder without a run; got checkpoint-00000002.pt; add --resume" in one_line_error(capsys)
    assert (tmp_path / "out/log.jsonl").read_bytes() == before


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_signal_leaves_a_checkpoint_from_which_the_run_goes_on(tmp_path, tiny, monkeypatch, number, status):
    options = common(tmp_path / "out", "--steps", "6")
    learn = training.Training.learn

    def interrupted(self, *args):
        row = learn(self, *args)
        if self.step == 3:
            os.kill(os.getpid(), number)
        return row

    monkeypatch.setattr(training.Training, "learn", interrupted)
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    assert script.main(options) == status
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before
    assert checkpoint.load(checkpoint.found(tmp_path / "out")[-1])["step"] == 3
    monkeypatch.setattr(training.Training, "learn", learn)
    assert script.main([*options, "--resume"]) == 0
    assert [row["step"] for row in rows(tmp_path / "out") if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_second_interrupt_does_not_wait_for_the_step(tmp_path, tiny, monkeypatch, capsys):
    def interrupted(self, *_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(training.Training, "learn", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job of a shell begins with it ignored
    try:
        assert script.main(common(tmp_path / "out", "--steps", "6")) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert one_line_error(capsys) == "train.py: interrupted\n"


# ---- the script


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--size", "64"], r"--size must be HEIGHTxWIDTH in pixels, at least 32x32; got '64'"),
        (["--size", "32x64"], r"--size must be at least 36x36 for the scenes"),
        (["--images", "a"], r"--images and --masks go together"),
        (["--images", "a", "--masks", "b"], r"--images needs --num-classes"),
        (["--num-classes", "5"], r"--num-classes is 11 for the scenes of digits; got 5"),
        (["--ignore-index", "3"], r"--ignore-index must not be a class; got 3 with 11 classes; -1 is never one"),
        (["--steps", "0"], r"--steps must be at least 1; got 0"),
        (["--evaluate-every", "0"], r"--evaluate-every must be at least 1; got 0"),
        (["--seed", "-1"], r"--seed must be at least 0; got -1"),
        (["--subcentroids", "300"], r"--subcentroids must be at most 256; got 300"),
        (["--held-out", "1"], r"--held-out must be in \[0,1\); got 1.0"),
        (["--batch", "1", "--network", "deeplabv3-resnet50"], r"--batch must be at least 2 for deeplabv3-resnet50"),
        (["--device", "tpu"], r"--device must be cpu, cuda or cuda:N; got 'tpu'"),
        (["--device", "cuda:99"], r"--device cuda:99: torch finds no such GPU"),
    ],
)
def test_wrong_options_end_with_status_2_and_a_line(capsys, options, expected):
    with pytest.raises(SystemExit) as ended:
        script.main(options)
    assert ended.value.code == 2
    assert re.search(expected, capsys.readouterr().err)


@pytest.mark.parametrize("name", ["unet", "timm:"])
def test_unknown_network_is_named(tmp_path, capsys, name):
    assert script.main(common(tmp_path / "out", "--network", name)) == 2
    assert re.search(r"--network must be one of segformer, .*; got '" + name, one_line_error(capsys))


@pytest.mark.parametrize(
    ("name", "package"),
    [
        ("segformer", "transformers"), ("upernet-swin", "transformers"), ("fcn-resnet50", "torchvision"),
        ("deeplabv3-resnet50", "torchvision"), ("timm:resnet18", "timm"),
    ],
)  # fmt: skip
def test_every_network_of_the_script_gives_features_for_the_head(name, package):
    if _optional.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    backbone = networks.make_backbone(name, SIZE, tiny=True).eval()
    head = DNCHead(backbone.channels, 3, 2).eval()
    assert head.predict(backbone(torch.randn(1, 3, *SIZE)), SIZE).shape == (1, *SIZE)


def test_script_runs_as_a_program_and_its_loss_falls(tmp_path):
    if _optional.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    root = Path(script.__file__).parents[1]
    command = [sys.executable, "examples/train.py", "--tiny", "--steps", "12", "--seed", "1", "--lr", "3e-3"]
    done = subprocess.run(
        [*command, *common(tmp_path / "out")],
        cwd=root, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": str(root)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "segformer" in done.stdout and "step 12/12" in done.stdout and "predictions.png" in done.stdout
    losses = [row["loss"] for row in rows(tmp_path / "out") if "loss" in row]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])


def test_help_names_every_option_and_shows_examples(capsys):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    shown = capsys.readouterr().out
    assert ended.value.code == 0 and "examples:" in shown
    for option in (
        "--network",
        "--images",
        "--masks",
        "--num-classes",
        "--ignore-index",
        "--resume",
        "--out",
        "--seed",
        "--device",
    ):
        assert option in shown
