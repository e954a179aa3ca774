"""One page that shows what a classifier compares with and why it decides as it does: no scripts, nothing outside the file."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from numpy.typing import NDArray
from PIL import Image

from ..runs.checkpoint import replacing
from .anchoring import shrunk
from .anchors import Anchor, Anchors, Figures
from .explanations import Explanation
from .pictures import percent, shown
from .rules import rule

MOST_CLASSES = 50  # whose rules are shown; a page of all ImageNet would not open
DEAD_WARNING = 0.1  # dead share from which the page warns
_LOSSLESS = 64  # pixels of the longer side up to which a picture is stored as PNG and shown in squares
_QUERY = 320  # pixels of the longer side of a query, at most


def write_gallery(
    path: Path | str,
    anchors: Anchors,
    explanations: Sequence[Explanation] = (),
    *,
    title: str = "What the classifier compares with",
    trained: Figures | None = None,
    rivals: int = 3,
) -> Path:
    """Write the page.

    It says what anchoring cost, warns of sub-centroids that were dead, gives the rule of each class with its pictures (of the
    first 50 classes, those of the queries before others), and the queries, wrong and right ones apart. It holds its pictures,
    runs no script and loads nothing, and all text that comes from names is escaped.

    Args:
        path: of the file, ending in .html; its folder must exist.
        anchors: from `anchor`.
        explanations: queries, from `explain_images`.
        title: of the page.
        trained: figures of the classifier before sub-centroids were refitted, if they were: then `anchors.before` is after it.
        rivals: classes named in each row of a rule.
    """
    path = Path(path)
    told = [one for query in explanations for one in (query.truth, query.label) if one is not None]
    labels = list(dict.fromkeys([*told, *range(len(anchors.classes))]))[:MOST_CLASSES]
    page = render(
        "gallery.html",
        title=title, anchors=anchors, trained=trained, rules=[rule(anchors, label, rivals) for label in sorted(labels)],
        left_out=len(anchors.classes) - len(labels),
        groups=[
            ("wrong", "Wrong decisions", [one for one in explanations if one.right is False]),
            ("right", "Right decisions", [one for one in explanations if one.right]),
            ("unknown", "Decisions without a known truth", [one for one in explanations if one.right is None]),
        ],
    )  # fmt: skip
    with replacing(path) as file:
        file.write(page.encode())
    return path


def render(template: str, **values: object) -> str:
    """A template of this package with values in it."""
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    made = Environment(
        loader=PackageLoader("dnc_kernels.explain"), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    made.filters.update(percent=percent, points=_points, crop=_crop, query=_query, change=_change)
    made.globals["DEAD_WARNING"] = DEAD_WARNING
    return made


def _points(difference: float) -> str:
    """A difference of shares in percentage points, without its sign: ``2.1 points``."""
    number = f"{abs(100 * difference):.1f}"
    return f"{number} point{'' if number == '1.0' else 's'}"


def _change(difference: float) -> str:
    """A difference of shares with its sign, in percentage points."""
    return f"{100 * difference:+.1f}".replace("-", "−")


def _crop(anchor: Anchor, alt: str) -> Markup:
    """An <img> of an anchor's crop."""
    assert anchor.crop is not None
    return _img(anchor.crop.permute(1, 2, 0).numpy(), alt)


def _query(one: Explanation, alt: str) -> Markup:
    """An <img> of a query."""
    if one.region is None:
        return _img(shrunk(one.picture, _QUERY).permute(1, 2, 0).numpy(), alt)
    picture = Image.fromarray(shown(one))
    picture.thumbnail((_QUERY, _QUERY))
    return _img(np.asarray(picture), alt)


def _img(picture: NDArray[np.uint8], alt: str) -> Markup:
    height, width = picture.shape[:2]
    small = max(height, width) <= _LOSSLESS
    file = io.BytesIO()
    if small:
        Image.fromarray(picture).save(file, "PNG", optimize=True)
    else:
        Image.fromarray(picture).save(file, "WEBP", quality=85)
    data = base64.b64encode(file.getvalue()).decode()
    kind, style = ("png", ' class="small"') if small else ("webp", "")
    return Markup('<img{} src="data:image/{};base64,{}" alt="{}" width="{}" height="{}">').format(
        Markup(style), kind, data, alt, width, height
    )
