"""Checkpoints of the released code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor

from ..errors import check_instance, check_value
from .subcentroids import SubCentroids


class Loaded(NamedTuple):
    """What `load_released_state_dict` did: names it loaded, names the head kept, and what else the checkpoint holds."""

    loaded: list[str]
    kept: list[str]
    extras: dict[str, Tensor]


def load_released_state_dict(head: SubCentroids, checkpoint: Mapping[str, Any], *, strict: bool = True) -> Loaded:
    """Load the head of a DNC or ProtoSeg checkpoint into `head`.

    The head's names are found behind any prefix (``module.``, ``head.``, ``decode_head.``, ...), also inside ``{"state_dict":
    ...}`` or ``{"model": ...}``; ``subcentroids`` is the older name of ``prototypes``; rows are normalised.

    Args:
        head: `SubCentroids`, `DNCHead` or `DNCClassifier` of the checkpoint's sizes.
        checkpoint: as `torch.load` gives it.
        strict: also require ``feat_norm`` and, with ``scores="norm"``, ``mask_norm``.

    Returns:
        loaded: names set from the checkpoint. kept: names of `head` that the checkpoint lacks (a learnable scale, a projection,
            counters).
        extras: the rest of the checkpoint under the head's prefix, without the prefix, such as ProtoSeg's ``cls_head.*`` and
            ``proj_head.*``
        (layers of the network; its second copy ``proj_head.mlp2.*`` is dropped), or a ``mask_norm`` that the head's scores do
        not use.

    Raises:
        ValueError: no sub-centroids, or more than one set, in the checkpoint; with `strict` a norm is missing.
        RuntimeError: sizes differ, or a row has no direction.
    """
    op = "load_released_state_dict"
    check_instance(op, "head", head, SubCentroids, "a SubCentroids or a head")
    check_instance(op, "checkpoint", checkpoint, Mapping, "what torch.load gives of a checkpoint, a mapping")
    state: Mapping[str, Any] = checkpoint
    for wrapper in ("state_dict", "model"):
        if isinstance(state.get(wrapper), Mapping):
            state = state[wrapper]
    names = ("prototypes", "subcentroids")
    found = sorted(key for key in state if key.rpartition(".")[2] in names)
    prefixes = {key.removesuffix(key.rpartition(".")[2]) for key in found}
    check_value(
        len(found) > 0, op, "checkpoint", "a state dict with prototypes or subcentroids", f"names such as {sorted(state)[:5]}"
    )
    check_value(len(prefixes) == 1, op, "checkpoint", "a state dict of one head", ", ".join(found), "pass a part of it")
    (prefix,) = prefixes
    values = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    older = values.pop("subcentroids", None)
    values.setdefault("prototypes", older)
    wanted = head.state_dict()
    own = {key: value for key, value in values.items() if key in wanted}
    kept = sorted(set(wanted) - set(own))
    missing = [key for key in kept if key.startswith(("feat_norm.", "mask_norm."))]
    check_value(
        not (strict and missing),
        op,
        "checkpoint",
        f"complete: it lacks {', '.join(missing)}",
        "strict=True",
        "strict=False keeps them",
    )
    head.load_state_dict(own, strict=False)
    extras = {key: value for key, value in values.items() if key not in wanted and not key.startswith("proj_head.mlp2.")}
    return Loaded(sorted(own), kept, extras)
