"""Named sets of training choices for the heads: one table, so that a recipe is a row and not a branch in code."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor

from ..errors import check_value
from ._momentum import Recent

#: What a head does where the caller does not say otherwise; docs/recipes.md says how each choice was found.
RECIPES: dict[str, dict[str, Any]] = {
    # The published head with argmax clustering: LayerNorm over classes, slow momentum, random start.
    "released": {
        "momentum": 0.999,
        "epsilon": 0.05,
        "iterations": 3,
        "assignment": "argmax",
        "update_from": "correct",
        "init": "random",
        "init_step": 0,
        "warmup_steps": 0,
        "revive_after": None,
        "scores": "norm",
        "temperature": 0.1,
        "scale": 10.0,
        "confidence": "none",
        "label_mode": "nearest",
        "ppc_weight": 0.01,
        "ppc_temperature": 1.0,
        "ppd_weight": 0.001,
        "label_smoothing": 0.0,
    },
}
# Cosines times a learnable scale and the pixel's own length, from an orthogonal start that hardly moves. As accurate as a
# softmax head, but most sub-centroids win nothing, and the samples nearest to them cannot replace them.
RECIPES["slow"] = {
    **RECIPES["released"],
    "scores": "scale",
    "confidence": "length",
    "label_mode": "nearest-exact",
    "init": "orthogonal",
}
# As accurate, and alive: the average forgets where it started, and PPD holds samples near the sub-centroid assigned to them.
RECIPES["classification"] = {**RECIPES["slow"], "momentum": Recent(0.25, 0.99), "ppd_weight": 1.0}
# For pixels PPC at a temperature keeps every sub-centroid in use, at no cost in mIoU; PPD holds them near to it, as above.
RECIPES["segmentation"] = {
    **RECIPES["slow"],
    "momentum": Recent(0.5, 0.99),
    "ppc_weight": 0.1,
    "ppc_temperature": 0.1,
    "ppd_weight": 0.1,
}


def recipe_options(op: str, recipe: str, **explicit: Any) -> dict[str, Any]:
    """The options of `recipe`, overridden by every explicit option that is not None."""
    check_value(recipe in RECIPES, op, "recipe", "one of " + ", ".join(["default", *RECIPES]), recipe)
    return {key: value if explicit.get(key) is None else explicit[key] for key, value in RECIPES[recipe].items()}


def options_of(module: Any) -> str:
    """What makes a module, as text: sizes, recipe, and every option that is not what the recipe or the constructor says.

    The constructor's signature is the list of options, and each is an attribute.
    """
    owner = next(c for c in type(module).__mro__ if c.__module__.startswith(__package__))
    recipe = RECIPES.get(getattr(module, "recipe", ""), {})
    shown = []
    for name, parameter in inspect.signature(owner).parameters.items():
        if name in ("generator", "device", "dtype"):
            continue
        value, usual = getattr(module, name), parameter.default
        always = usual is parameter.empty or name in ("num_subcentroids", "recipe")
        usual = recipe.get(name) if usual is None else usual
        if always or not (value is usual or (not isinstance(value, Tensor) and value == usual)):
            shown.append(f"{name}={_short(value)}")
    return ", ".join(shown)


def _short(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"tensor{list(value.shape)}"
    return value.__qualname__ if inspect.isroutine(value) else repr(value)
