"""The demo's pictures."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray
from torch import Tensor

from .explanations import Case, Explained, SubCentroid, centre
from .progress import TITLES
from .scenes import CLASS_NAMES, NUM_CLASSES
from .training import HeadName, Run, Scenes

DPI = 130
SHOWN = 6  # scenes in predictions.png
PATCH = 36  # side of a training patch in pixels: as wide as the largest digit
SUBCENTROID_PATCHES = 4
RIGHT, WRONG = "#1a7f37", "#c62828"
LINE_COLOURS: dict[HeadName, str] = {"dnc": "#1f77b4", "softmax": "#d9730d"}
_CODES = "000000 4f7cff ff8c1a 2fb344 e5383b a06cd5 b5835a ff8fcf d7e84f 00897b 19d3e6"
# Of the classes; those of digits are far from each other and from the grey ground and the white outlines.
COLOURS = np.array([to_rgb(f"#{code}") for code in _CODES.split()])


def predictions(path: Path, runs: list[Run], scenes: Scenes) -> Path:
    """The first held-out scenes, their truth and what each head says, mistakes outlined."""
    count = min(SHOWN, len(scenes.test_images))
    rows = 2 + len(runs)
    figure, axes = _figure(rows, count, width=1.75 * count + 0.5, height=1.85 * rows + 0.75)
    truth = scenes.test_labels.numpy()
    for column in range(count):
        image = _image(scenes.test_images[column])
        axes[0][column].imshow(image)
        axes[1][column].imshow(_painted(image, truth[column]))
        for axis, run in zip(axes[2:, column], runs, strict=True):
            wrong = run.predictions[column] != truth[column]
            axis.imshow(_painted(image, run.predictions[column]))
            thick = _opened(wrong)
            if thick.any():
                axis.contour(thick, levels=[0.5], colors="white", linewidths=0.9)
            axis.set_title(f"{100 * (1 - wrong.mean()):.1f} % of pixels right", fontsize=7.5, pad=2)
    for axis, name in zip(axes[:, 0], ("scene", "truth", *(TITLES[run.head] for run in runs)), strict=True):
        axis.set_ylabel(name, fontsize=10)
    handles: list[Patch | Line2D] = [Patch(color=COLOURS[c], label=CLASS_NAMES[c]) for c in range(1, NUM_CLASSES)]
    handles.append(Line2D([], [], linestyle="", label="outlined in white: wrong, 3 pixels or wider"))
    figure.legend(handles=handles, loc="outside lower center", ncols=6, fontsize=8, frameon=False)
    return _save(figure, path)


def curves(path: Path, runs: list[Run]) -> Path:
    """Training loss and held-out mIoU over the steps: a line for each seed, and the mean over seeds in bold."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for head in dict.fromkeys(run.head for run in runs):
        of_head = [run for run in runs if run.head == head]
        window = max(1, len(of_head[0].loss) // 32)
        at = np.arange(window, len(of_head[0].loss) + 1)
        losses = [np.convolve(run.loss, np.full(window, 1 / window), "valid") for run in of_head]
        for axis, x, lines in (
            (left, at, losses),
            (right, np.array(of_head[0].evaluated_at), [np.array(run.evaluated_miou) for run in of_head]),
        ):
            if len(lines) > 1:
                for line in lines:
                    axis.plot(x, line, color=LINE_COLOURS[head], linewidth=0.7, alpha=0.45)
            axis.plot(x, np.mean(lines, axis=0), color=LINE_COLOURS[head], linewidth=1.8, label=TITLES[head])
    left.set(yscale="log", ylabel=f"training cross-entropy, mean of {window} steps", xlabel="step")
    right.set(ylabel="mIoU on held-out scenes", xlabel="step", ylim=(0, 1))
    for axis in (left, right):
        axis.grid(alpha=0.3, linewidth=0.6)
        axis.spines[["top", "right"]].set_visible(False)
        axis.legend(frameon=False)
    return _save(figure, path)


def explanations(path: Path, explained: Explained, scenes: Scenes, run: Run) -> Path:
    """Pixels with their decisions, each next to the training pixels that its sub-centroid is most like.

    A wrong pixel has a second row for the best sub-centroid of the true class, which lost. The title says what the run's
    sub-centroids stand for.
    """
    cases = explained.cases
    shown = [[case.winner] if case.winner.label == case.truth else [case.winner, case.best_of_truth] for case in cases]
    samples = explained.nearest.similarity.shape[2]
    rows = max(1, sum(len(of_case) for of_case in shown))
    figure, axes = _figure(rows, 2 + samples, width=12.4, height=1.62 * rows + 0.6, ratios=[1, 1, *[0.85] * samples])
    row = 0
    for case, of_case in zip(cases, shown, strict=True):
        _case(axes[row][0], axes[row][1], case, scenes)
        for extra in axes[row + 1 : row + len(of_case), :2].flatten().tolist():
            extra.set_axis_off()
        for sub_centroid in of_case:
            _samples(list(axes[row][2:]), sub_centroid, explained, scenes, won=sub_centroid == case.winner)
            row += 1
    figure.suptitle(
        "A pixel of a held-out scene (left) is given the class of its nearest sub-centroid. "
        "That sub-centroid stands for these training pixels (right, cosine to it).\n" + _standing(run),
        fontsize=10,
    )
    return _save(figure, path)


def _standing(run: Run) -> str:
    assert run.standing is not None
    return (
        f"mIoU {run.miou:.3f}, and {run.standing.anchored_miou:.3f} with a training pixel in the place of every sub-centroid; "
        f"{100 * run.standing.dead:.0f} % of them win under 1 % of their class."
    )


def subcentroids(path: Path, explained: Explained, scenes: Scenes) -> Path:
    """Every sub-centroid by the training pixels that it is most like, with the share of its class nearest to it."""
    classes, k, samples = explained.nearest.similarity.shape
    shown = min(SUBCENTROID_PATCHES, samples)
    figure, axes = _figure(classes, k, width=0.62 * shown * k + 0.8, height=0.84 * classes + 0.5)
    for label in range(classes):
        for sub in range(k):
            axis = axes[label][sub]
            patches = [_training_patch(explained, scenes, label, sub, i)[0] for i in range(shown)]
            gap = np.full((PATCH, 2, 3), 255, np.uint8)
            axis.imshow(np.concatenate([part for patch in patches for part in (patch, gap)][:-1], axis=1))
            share = 100 * explained.share[label, sub]
            axis.set_title(f"{'< 1' if 0 < share < 1 else f'{share:.0f}'} % of pixels", fontsize=7, pad=2)
            for spine in axis.spines.values():
                spine.set_visible(False)
        axes[label][0].set_ylabel(CLASS_NAMES[label], fontsize=8, rotation=0, ha="right", va="center")
    figure.suptitle(f"The {k} sub-centroids of each class: the training pixels (patch centres) nearest to each", fontsize=10)
    return _save(figure, path)


def _case(whole: Axes, zoom: Axes, case: Case, scenes: Scenes) -> None:
    """The scene with the pixel marked, and its neighbourhood."""
    right = case.winner.label == case.truth
    colour = RIGHT if right else WRONG
    image = _image(scenes.test_images[case.scene])
    whole.imshow(image)
    half = PATCH / 2
    corner = (case.column - half, case.row - half)
    whole.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor="white", linewidth=2.4))
    whole.add_patch(Rectangle(corner, PATCH, PATCH, fill=False, edgecolor=colour, linewidth=1.3))
    zoom.imshow(_patch(image, case.row, case.column))
    _mark(zoom)
    _frame(zoom, colour)
    said = CLASS_NAMES[case.winner.label]
    title = f"{said}: right" if right else f"{said}: wrong,\nit is {CLASS_NAMES[case.truth]}"
    zoom.set_title(title, fontsize=8.5, color=colour, pad=3)


def _samples(axes: list[Axes], sub_centroid: SubCentroid, explained: Explained, scenes: Scenes, *, won: bool) -> None:
    """The training patches of a sub-centroid, headed by its name and the pixel's similarity to it."""
    label, sub, similarity = sub_centroid
    name = f"{CLASS_NAMES[label]}, sub-centroid {sub + 1}"
    what = "nearest sub-centroid" if won else "best of the true class"
    for i, axis in enumerate(axes):
        patch, cosine = _training_patch(explained, scenes, label, sub, i)
        axis.imshow(patch)
        if cosine is None:
            axis.set_axis_off()
            continue
        _mark(axis)
        axis.set_xlabel(f"{cosine:.2f}", fontsize=7.5, labelpad=2)
    axes[0].set_title(" ", fontsize=8.5, pad=3)  # keeps room for the next line, which as a title would widen its column
    said = f"{what}: {name}; the pixel's cosine to it is {similarity:.2f}"
    axes[0].text(0, 1.04, said, fontsize=8.5, transform=axes[0].transAxes).set_in_layout(False)


def _training_patch(
    explained: Explained, scenes: Scenes, label: int, sub: int, rank: int
) -> tuple[NDArray[np.uint8], float | None]:
    """Patch [PATCH,PATCH,3] around the training pixel of a rank, and its cosine; white and None where there is none."""
    sample, pixel, similarity = (values[label, sub, rank] for values in explained.nearest)
    if sample < 0:
        return np.full((PATCH, PATCH, 3), 255, np.uint8), None
    y, x = divmod(int(pixel), explained.feature_width)
    return _patch(_image(scenes.images[int(sample)]), centre(y), centre(x)), float(similarity)


def _patch(image: NDArray[np.uint8], row: int, column: int) -> NDArray[np.uint8]:
    """[PATCH,PATCH,3] of an image around a pixel, grey beyond its edge."""
    half = PATCH // 2
    padded = np.pad(image, ((half, half), (half, half), (0, 0)), constant_values=225)
    return padded[row : row + PATCH, column : column + PATCH]


def _image(image: Tensor) -> NDArray[np.uint8]:
    """[H,W,3] of an image [3,H,W]."""
    return image.permute(1, 2, 0).numpy()


def _painted(image: NDArray[np.uint8], labels: NDArray[np.uint8]) -> NDArray[np.float64]:
    """Class colours over the image in dim grey."""
    grey = np.repeat(image.mean(2, keepdims=True) / 255 * 0.35 + 0.08, 3, axis=2)
    return np.where((labels > 0)[..., None], 0.88 * COLOURS[labels] + 0.12 * grey, grey)


def _opened(mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """The part of a mask [H,W] that 3x3 squares within it cover; thin seams along outlines, where truth is arguable, go."""

    def squares(values: NDArray[np.bool_]) -> NDArray[np.bool_]:
        return sliding_window_view(np.pad(values, 1), (3, 3))

    return np.asarray(squares(np.asarray(squares(mask).all((2, 3)))).any((2, 3)))


def _mark(axis: Axes) -> None:
    """A ring around the centre of a patch."""
    for width, colour in ((2.2, "black"), (1.0, "white")):
        axis.plot(
            PATCH / 2, PATCH / 2, "o", markersize=7, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width
        )


def _frame(axis: Axes, colour: str) -> None:
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=1.6)


def _figure(
    rows: int, columns: int, *, width: float, height: float, ratios: list[float] | None = None
) -> tuple[Figure, NDArray[np.object_]]:
    """A figure of axes without ticks."""
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, width_ratios=ratios)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    return figure, axes


def _save(figure: Figure, path: Path) -> Path:
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
    return path
