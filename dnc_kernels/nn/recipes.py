"""Named sets of training choices for the heads: one table, so that a recipe is a row and not a branch in code."""

from __future__ import annotations

from typing import Any

from ..errors import check_value

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
# What matched a softmax head on digit scenes: cosines times a learnable scale and the pixel's own length, orthogonal start.
RECIPES["default"] = {
    **RECIPES["released"],
    "scores": "scale",
    "confidence": "length",
    "label_mode": "nearest-exact",
    "init": "orthogonal",
}


def recipe_options(op: str, recipe: str | None, **explicit: Any) -> dict[str, Any]:
    """The options of `recipe` (None: ``default``), overridden by every explicit option that is not None."""
    name = "default" if recipe is None else recipe
    check_value(name in RECIPES, op, "recipe", "one of " + ", ".join(RECIPES), name)
    return {key: value if explicit.get(key) is None else explicit[key] for key, value in RECIPES[name].items()}
