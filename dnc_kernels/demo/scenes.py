"""Segmentation scenes made of real handwritten digits on textured ground.

Each scene is a `height x width` image: a textured ground (noise of several scales, a gradient, stripes) that carries
digits of scikit-learn's `load_digits` (8x8 scans, 1797 images). A digit is enlarged with a smooth kernel to a random
scale, drawn brighter or darker than the ground under it with a random contrast, and never overlaps another. Stroke
fragments (a few rows of a digit, labelled background) keep "any stroke is a digit" from being a good rule.

Labels: 0 is the ground, `1 + d` is digit `d`, so there are `NUM_CLASSES = 11`.
Train and test scenes never share a digit image: image `i` of the data set is a test image where `i % 5 == 0`.
All randomness comes from one `numpy.random.Generator` seeded by `seed` and `split`: equal arguments, equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

__all__ = ["CLASS_NAMES", "NUM_CLASSES", "SceneConfig", "Split", "digit_images", "make_scenes"]

Split = Literal["train", "test"]
FloatArray = NDArray[np.float32]
IntArray = NDArray[np.int64]

CLASS_NAMES: tuple[str, ...] = ("ground", *(f"digit {d}" for d in range(10)))
NUM_CLASSES = len(CLASS_NAMES)

_DIGIT_SIZE = 8  # pixels per side in load_digits
_TEST_EVERY = 5  # one digit image in five is held out
_MASK_LEVEL = 0.42  # ink above this is labelled: about the visible outline of an enlarged stroke


@dataclass(frozen=True)
class SceneConfig:
    """What a scene looks like. Ranges are (low, high); lengths in pixels, intensities where 0..1 is black..white."""

    height: int = 128
    width: int = 128
    channels: Literal[1, 3] = 3
    tries: int = 32
    """Digits proposed for each scene; a proposal that would touch an earlier digit is dropped."""
    fragments: int = 3
    """Stroke fragments proposed for each scene, under the same rule."""
    scale: tuple[float, float] = (2.0, 4.5)
    """Enlargement of the 8x8 digit: 16 to 36 pixels per side."""
    contrast: tuple[float, float] = (0.35, 0.75)
    texture: tuple[float, float] = (0.03, 0.09)
    """Standard deviation of the ground's luminance."""
    sensor_noise: float = 0.03

    def __post_init__(self) -> None:
        largest = int(np.ceil(_DIGIT_SIZE * self.scale[1]))
        if min(self.height, self.width) < largest:
            raise ValueError(
                f"SceneConfig: height and width must hold the largest digit ({largest} pixels); "
                f"got {self.height}x{self.width}. Enlarge the scene or lower `scale`."
            )
        if self.scale[0] < 1 or self.scale[1] < self.scale[0]:
            raise ValueError(f"SceneConfig: scale must be (low, high) with 1 <= low <= high; got {self.scale}.")
        if self.channels not in (1, 3):
            raise ValueError(f"SceneConfig: channels must be 1 or 3; got {self.channels}.")


@lru_cache(maxsize=2)
def digit_images(split: Split) -> tuple[FloatArray, IntArray]:
    """Digit images `[n, 8, 8]` in 0..1 and their digits `[n]` of one split (train 1437, test 360 images)."""
    if split not in ("train", "test"):
        raise ValueError(f"digit_images: split must be 'train' or 'test'; got {split!r}.")
    from sklearn.datasets import load_digits  # a second to import, which only the process that draws scenes needs

    data = load_digits()
    held_out = np.arange(len(data.target)) % _TEST_EVERY == 0
    keep = held_out if split == "test" else ~held_out
    images = (data.images[keep] / 16.0).astype(np.float32)
    digits = data.target[keep].astype(np.int64)
    images.flags.writeable = digits.flags.writeable = False  # cached: shared by all callers
    return images, digits


def make_scenes(
    count: int, *, seed: int, split: Split = "train", config: SceneConfig | None = None
) -> tuple[FloatArray, IntArray]:
    """Images `[count, channels, H, W]` float32 in 0..1 and labels `[count, H, W]` int64 in 0..10.

    Args:
        count: scenes to draw, at least 1.
        seed: non-negative; with `split` and `count` it fixes every bit.
        split: whose digit images are drawn.
        config: what a scene looks like; None: `SceneConfig()`.
    """
    if count < 1:
        raise ValueError(f"make_scenes: count must be at least 1; got {count}.")
    config = config or SceneConfig()
    images, digits = digit_images(split)
    rng = np.random.default_rng([seed, 0 if split == "train" else 1])

    luminance = _ground(rng, count, config)  # [n, H, W]
    labels = np.zeros(luminance.shape, np.int64)
    ink = np.zeros_like(luminance)  # signed contrast times coverage

    tries = config.tries + config.fragments
    scale = rng.uniform(*config.scale, size=(count, tries)).astype(np.float32)
    side = np.ceil(_DIGIT_SIZE * scale).astype(np.int64)
    top = (rng.random((count, tries)) * (config.height - side + 1)).astype(np.int64)
    left = (rng.random((count, tries)) * (config.width - side + 1)).astype(np.int64)
    accepted = _without_overlap(top, left, side)

    scene, slot = np.nonzero(accepted)
    picked = rng.integers(len(images), size=len(scene))
    is_digit = slot < config.tries
    glyphs = np.where(is_digit[:, None, None], images[picked], _fragments(rng, images[picked]))
    strength = rng.uniform(*config.contrast, size=len(scene)).astype(np.float32)
    sign = np.where(rng.random(len(scene)) < 0.5, 1, -1).astype(np.float32)
    coverage = _enlarge(glyphs, scale[scene, slot], int(side.max()))  # [m, P, P]
    for j, (n, t) in enumerate(zip(scene, slot, strict=True)):
        size = side[n, t]
        window = (n, slice(top[n, t], top[n, t] + size), slice(left[n, t], left[n, t] + size))
        patch = coverage[j, :size, :size]
        ink[window] += sign[j] * strength[j] * patch
        if is_digit[j]:
            labels[window][patch > _MASK_LEVEL] = 1 + digits[picked[j]]

    return _colour(rng, luminance, ink, config), labels


def _without_overlap(top: IntArray, left: IntArray, side: IntArray) -> NDArray[np.bool_]:
    """The proposals `[n, tries]` that stay: taken in order, each yields to the squares accepted before it."""
    accepted = np.zeros(top.shape, bool)
    for t in range(top.shape[1]):
        here = slice(t, t + 1)
        apart = (
            (top[:, here] >= top[:, :t] + side[:, :t])
            | (top[:, :t] >= top[:, here] + side[:, here])
            | (left[:, here] >= left[:, :t] + side[:, :t])
            | (left[:, :t] >= left[:, here] + side[:, here])
        )
        accepted[:, t] = (apart | ~accepted[:, :t]).all(axis=1)
    return accepted


def _fragments(rng: np.random.Generator, glyphs: FloatArray) -> FloatArray:
    """Glyphs `[m, 8, 8]` cut to three rows or three columns: strokes that are no digit."""
    start = rng.integers(0, _DIGIT_SIZE - 2, size=len(glyphs))
    line = np.arange(_DIGIT_SIZE)
    band = (line >= start[:, None]) & (line < start[:, None] + 3)  # [m, 8]
    rows = rng.random(len(glyphs)) < 0.5
    mask = np.where(rows[:, None, None], band[:, :, None], band[:, None, :])
    return glyphs * mask.astype(np.float32)


def _enlarge(glyphs: FloatArray, scale: FloatArray, size: int) -> FloatArray:
    """Ink coverage `[m, size, size]` of glyphs `[m, 8, 8]` enlarged by `scale [m]`, placed at the top left.

    Separable Catmull-Rom interpolation: the edge of a stroke becomes a smooth ramp, as in a photograph.
    """
    centre = (np.arange(size, dtype=np.float32) + 0.5) / scale[:, None] - 0.5  # [m, size], in glyph pixels
    distance = np.abs(centre[:, :, None] - np.arange(_DIGIT_SIZE, dtype=np.float32))  # [m, size, 8]
    near = (1.5 * distance - 2.5) * distance**2 + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weight = np.where(distance < 1, near, np.where(distance < 2, far, 0)).astype(np.float32)
    return np.clip(weight @ glyphs @ weight.transpose(0, 2, 1), 0, 1)


def _ground(rng: np.random.Generator, count: int, config: SceneConfig) -> FloatArray:
    """Luminance `[count, H, W]` around 0.5: noise of four scales, a gradient and stripes in random shares."""
    height, width = config.height, config.width
    y = np.arange(height, dtype=np.float32)[:, None]
    x = np.arange(width, dtype=np.float32)[None, :]

    def uniform(low: float, high: float) -> FloatArray:
        return rng.uniform(low, high, size=(count, 1, 1)).astype(np.float32)

    total = np.zeros((count, height, width), np.float32)
    for cell in (4, 8, 16, 32):
        total += uniform(0, 1) * _smooth_noise(rng, count, height, width, cell)

    for share, wavelength in ((1.2, uniform(7, 28)), (1.0, uniform(3, 6) * max(height, width))):
        # Of the two waves the short one makes stripes and the long one, of which only a part fits, a gradient.
        angle, phase = uniform(0, np.pi), uniform(0, 2 * np.pi)
        wave = np.sin(2 * np.pi * (x * np.cos(angle) + y * np.sin(angle)) / wavelength + phase)
        total += share * uniform(0, 1) * (rng.random((count, 1, 1)) < 0.6) * wave

    total -= total.mean(axis=(1, 2), keepdims=True)
    total /= total.std(axis=(1, 2), keepdims=True) + 1e-6
    return uniform(0.4, 0.6) + uniform(*config.texture) * total


def _smooth_noise(rng: np.random.Generator, count: int, height: int, width: int, cell: int) -> FloatArray:
    """Unit-variance lattice noise `[count, H, W]`, linear between lattice points `cell` pixels apart."""

    def weights(length: int) -> FloatArray:
        points = -(-length // cell) + 1
        position = np.arange(length, dtype=np.float32)[:, None] / cell
        return np.maximum(0, 1 - np.abs(position - np.arange(points, dtype=np.float32)))  # [length, points]

    rows, columns = weights(height), weights(width)
    lattice = rng.standard_normal((count, rows.shape[1], columns.shape[1]), dtype=np.float32)
    return np.asarray(
        1.5 * (rows @ lattice @ columns.T), np.float32
    )  # 1.5: linear interpolation in 2-D keeps 4/9 of the variance


def _colour(rng: np.random.Generator, luminance: FloatArray, ink: FloatArray, config: SceneConfig) -> FloatArray:
    """Scenes `[n, channels, H, W]` in 0..1 with a colour cast for ground and ink, and sensor noise."""
    shape = (len(luminance), config.channels, 1, 1)
    grey = config.channels == 1
    cast = np.zeros(shape, np.float32) if grey else rng.uniform(-0.15, 0.15, size=shape).astype(np.float32)
    tint = np.ones(shape, np.float32) if grey else rng.uniform(0.7, 1.3, size=shape).astype(np.float32)
    scenes = luminance[:, None] + cast + tint * ink[:, None]
    scenes += config.sensor_noise * rng.standard_normal(scenes.shape, dtype=np.float32)
    return np.clip(scenes, 0, 1, out=scenes)
