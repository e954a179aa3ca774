"""Sub-centroids that are real training samples, decisions explained by them, and a page that shows both (docs/explain.md).

    anchors = anchor(model, train, prepare=prepare, evaluate=test)   # every sub-centroid of model.head is now a training sample
    explain_images(model, anchors, pictures, prepare=prepare)        # why: the nearest of them, as in figure 4 of the paper
    print(rule(anchors, 3).text)                                     # IF ... THEN ..., as in figure 3

Needs the extra explain.
"""

from __future__ import annotations

from . import _needs as _needs
from .anchoring import anchor, measure
from .anchors import Anchor, Anchors, AnchorsError, Figures
from .explanations import Evidence, Explanation, explain_images
from .gallery import write_gallery
from .pictures import draw
from .rules import Rule, rule
from .run import Explained, explain_run

__all__ = [
    "Anchor",
    "Anchors",
    "AnchorsError",
    "Evidence",
    "Explained",
    "Explanation",
    "Figures",
    "Rule",
    "anchor",
    "draw",
    "explain_images",
    "explain_run",
    "measure",
    "rule",
    "write_gallery",
]
