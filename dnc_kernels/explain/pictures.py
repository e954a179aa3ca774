"""Pictures of decisions: a query, and arrows to the training samples that speak for each class (DNC, figure 4)."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import ConnectionPatch
from numpy.typing import NDArray
from scipy import ndimage

from .anchors import Anchors
from .explanations import Evidence, Explanation

DPI = 150
RIGHT, WRONG, NEUTRAL, PALE = "#1a7f37", "#c62828", "#3a6ea5", "#9aa0a6"
COLUMNS = 3  # of queries side by side
WIDTH, EXEMPLAR = 5.0, 0.66  # inches: of a query with what belongs to it; of an exemplar with the gap to the next
_DIM = 0.35  # brightness of what lies outside a region
_PLAIN: dict[str, Any] = {"parse_math": False}  # a $ in a name is a $


def draw(path: Path | str, explanations: Sequence[Explanation], anchors: Anchors, title: str = "") -> Path:
    """Draw queries with arrows to their nearest anchors of the likeliest classes, a PNG (or what the suffix says).

    Args:
        path: of the file; its folder must exist.
        explanations: from `explain_images`, at least one.
        anchors: theirs.
        title: above the picture.
    """
    path = Path(path)
    across = min(COLUMNS, len(explanations))
    rows = -(-len(explanations) // across)
    tall = max(2.35, EXEMPLAR * max(len(one.evidence) for one in explanations)) + 0.3
    above = 0.5 if title else 0.15
    figure = Figure(figsize=(across * WIDTH, rows * tall + above), facecolor="white")
    whole = figure.get_figheight()
    if title:
        figure.text(0.5, 1 - 0.25 / whole, title, ha="center", va="center", fontsize=12, fontweight="bold", **_PLAIN)
    for number, one in enumerate(explanations):
        row, column = divmod(number, across)
        left, top = column * WIDTH + 0.15, whole - above - row * tall

        def axes(x: float, y: float, side: float, left: float = left, top: float = top) -> Axes:
            """A square of `side` inches, x from the left and y from the top of the query's part."""
            wide = figure.get_figwidth()
            return figure.add_axes(((left + x) / wide, (top - y - side) / whole, side / wide, side / whole))

        query = axes(0.0, (tall - 0.3 - 1.55) / 2 - 0.05, 1.55)
        _query(query, one, anchors)
        first = (tall - 0.3 - EXEMPLAR * len(one.evidence)) / 2
        for place, evidence in enumerate(one.evidence):
            axis = axes(2.45, first + EXEMPLAR * place + 0.04, EXEMPLAR - 0.08)
            _exemplar(axis, evidence, anchors, won=place == 0, right=one.right)
            _arrow(figure, query, axis, evidence, place, one.right)
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
    return path


def shown(one: Explanation) -> NDArray[np.uint8]:
    """The picture [H,W,3] of a query: in segmentation dimmed outside its region, whose border is white."""
    picture = one.picture.permute(1, 2, 0).numpy()
    if one.region is None:
        return picture
    thick = max(1, max(one.region.shape) // 160)  # still there when the picture is scaled down
    border = one.region & ~ndimage.binary_erosion(one.region, iterations=thick, border_value=1)
    dim = np.where(one.region[..., None], picture, (picture * _DIM).astype(np.uint8))
    return np.where(border[..., None], np.uint8(255), dim)


def _query(axis: Axes, one: Explanation, anchors: Anchors) -> None:
    colour = _tone(one.right)
    _show(axis, shown(one), colour, 2.4)
    if one.region is not None:
        _ring(axis, one.row, one.column)
    axis.set_title(_short(anchors.classes[one.label], 22), fontsize=10, color=colour, fontweight="bold", pad=4, **_PLAIN)
    said = "" if one.truth is None else "right\n" if one.right else f"wrong: it is {_short(anchors.classes[one.truth], 14)}\n"
    axis.set_xlabel(said + _short(one.id, 26), fontsize=7.5, color="#444444", labelpad=3, **_PLAIN)


def _exemplar(axis: Axes, evidence: Evidence, anchors: Anchors, *, won: bool, right: bool | None) -> None:
    anchor = anchors[evidence.label, evidence.sub]
    colour = _tone(right) if won else PALE
    if anchor.crop is None:
        _show(axis, np.full((8, 8, 3), 240, np.uint8), colour, 1.0)
        where = {"ha": "center", "va": "center", "transform": axis.transAxes}
        axis.text(0.5, 0.5, "no training\nsample", where, fontsize=5, color="#555555")
    else:
        _show(axis, anchor.crop.permute(1, 2, 0).numpy(), colour, 2.0 if won else 1.0)
        if anchors.segmentation:
            _ring(axis, anchor.at[0] * anchor.crop.shape[1] - 0.5, anchor.at[1] * anchor.crop.shape[2] - 0.5)
    bold = "bold" if won else "normal"
    for x, y, text, size, colour in (
        (1.15, 0.68, percent(evidence.probability), 10, "#111111"),
        (2.4, 0.68, _short(anchors.classes[evidence.label], 11), 9, "#111111"),
        (1.15, 0.26, f"cosine {evidence.similarity:.2f}", 7.5, "#555555"),
    ):
        axis.text(x, y, text, fontsize=size, color=colour, fontweight=bold if size == 10 else "normal", va="center",
                  transform=axis.transAxes, **_PLAIN)  # fmt: skip


def _arrow(figure: Figure, query: Axes, axis: Axes, evidence: Evidence, place: int, right: bool | None) -> None:
    """An arrow as thick as the class is likely."""
    colour = PALE if place else _tone(right)
    arrow = ConnectionPatch((1.04, 0.5), (-0.12, 0.5), "axes fraction", "axes fraction", axesA=query, axesB=axis)
    arrow.set(arrowstyle="-|>", mutation_scale=11, color=colour, linewidth=0.7 + 3 * evidence.probability)
    figure.add_artist(arrow)


def _tone(right: bool | None) -> str:
    return NEUTRAL if right is None else RIGHT if right else WRONG


def _show(axis: Axes, picture: NDArray[np.uint8], colour: str, width: float) -> None:
    # small pictures in squares, large ones smoothed
    axis.imshow(picture, interpolation="nearest" if max(picture.shape[:2]) < 64 else "antialiased")
    axis.set(xticks=[], yticks=[], anchor="C")
    for spine in axis.spines.values():
        spine.set(color=colour, linewidth=width)


def _ring(axis: Axes, row: float, column: float) -> None:
    for width, colour in ((2.4, "black"), (1.1, "white")):
        axis.plot(column, row, "o", markersize=7, markerfacecolor="none", markeredgecolor=colour, markeredgewidth=width)


def percent(share: float) -> str:
    """A share as text of one decimal, such as ``80.9%``; never 100 where it is less, nor 0 where it is more."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        return ">99.9%"
    return "<0.1%" if text == "0.0" and share > 0 else f"{text}%"


def _short(text: str, most: int) -> str:
    """Text of one line and `most` characters, its end kept where it is a path."""
    line = " ".join(text.split())
    if len(line) <= most:
        return line
    return "…" + line[1 - most :] if "/" in line else textwrap.shorten(line, most, placeholder="…") or line[: most - 1] + "…"
