"""The rule by which a class is given, in words (DNC, figure 3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ..errors import check_value, whole_number
from .anchors import Anchor, Anchors


@dataclass(frozen=True, eq=False)
class Rule:
    """IF the query is nearer to some exemplar of a class than to every exemplar of all others THEN that class.

    Args:
        anchors: whose rule it is.
        label: the class.
        rows: for each of its sub-centroids, itself and those of other classes that are most like it, one a class, likest first.
            They are named; the rule holds for all classes.
    """

    anchors: Anchors
    label: int
    rows: tuple[tuple[Anchor, tuple[Anchor, ...]], ...]

    @property
    def name(self) -> str:
        """Of the class."""
        return self.anchors.classes[self.label]

    @property
    def others(self) -> int:
        """Other classes than this one and those that `rows` name."""
        return len(self.anchors.classes) - 1 - len(self.rows[0][1])

    @property
    def text(self) -> str:
        """Lines of text: IF ( ... ) OR ( ... ) THEN class; each row says which training sample it speaks of."""
        lines = []
        for number, (own, rivals) in enumerate(self.rows):
            than = [f"any exemplar of {self.anchors.classes[rival.label]}" for rival in rivals]
            if self.others:
                than.append(f"any of the {self.others} other class{'es' if self.others > 1 else ''}")
            comparisons = [f"nearer to {self.title(own)} than to {other}" for other in than] or ["given"]
            lines.append(f"{'OR' if number else 'IF':2} (query " + "\n    AND ".join(comparisons) + ")")
        return "\n".join([*lines, f"THEN {self.name}"])

    @property
    def html(self) -> str:
        """The rule with its pictures, a fragment of a page; all that comes from names is escaped."""
        from .gallery import render

        return render("rule.html", rule=self)

    def title(self, anchor: Anchor) -> str:
        """What an anchor is called in the rule, such as ``goose 2 [train/17.png]``."""
        what = anchor.id if anchor.real else "no training sample"
        return f"{self.anchors.classes[anchor.label]} {anchor.sub + 1} [{what}]"


def rule(anchors: Anchors, label: int | str, rivals: int = 3) -> Rule:
    """The rule of a class.

    Args:
        anchors: of a head.
        label: number of the class, or its name.
        rivals: other classes to name in each row, those with the exemplars most like it, at most.
    """
    op, classes = "rule", anchors.classes
    if isinstance(label, str):
        check_value(label in classes, op, "label", "the name of a class", repr(label))
        label = classes.index(label)
    check_value(0 <= label < len(classes), op, "label", f"in [0,{len(classes)})", label)
    rivals = min(whole_number(op, "rivals", rivals, 0), len(classes) - 1)
    cosine = torch.einsum("kd,cjd->kcj", anchors.embedding[label], anchors.embedding)
    nearest, sub = cosine.max(2)
    nearest[:, label] = -torch.inf
    rows = []
    for own, likest, which in zip(anchors.rows[label], nearest.topk(rivals, dim=1).indices.tolist(), sub.tolist(), strict=True):
        rows.append((own, tuple(anchors[other, which[other]] for other in likest)))
    return Rule(anchors, label, tuple(rows))
