"""The options of the layers that are one of a few words: their types, and the check that holds a call to them."""

from __future__ import annotations

from typing import Literal, get_args

from ..errors import check_choice

Recipe = Literal["default", "classification", "segmentation", "slow", "released"]
Scores = Literal["norm", "temperature", "scale"]
Confidence = Literal["none", "length"]
LabelMode = Literal["nearest", "nearest-exact"]
Assignment = Literal["argmax", "gumbel"]
UpdateFrom = Literal["correct", "all"]
Sync = Literal["auto", "sums", "average", "none"]
Init = Literal["random", "orthogonal", "data"]
LossSize = Literal["labels", "features"]
Checkpoint = Literal["none", "scores", "all"]

CHOICES: dict[str, tuple[str, ...]] = {
    "recipe": get_args(Recipe),
    "scores": get_args(Scores),
    "confidence": get_args(Confidence),
    "label_mode": get_args(LabelMode),
    "mode": get_args(LabelMode),  # of `resize_labels`
    "assignment": get_args(Assignment),
    "update_from": get_args(UpdateFrom),
    "sync": get_args(Sync),
    "init": get_args(Init),
    "loss_size": get_args(LossSize),
    "checkpoint": get_args(Checkpoint),
}


def check_word(op: str, option: str, value: str) -> None:
    """Raise ValueError unless `value` is one of the words of an option."""
    check_choice(op, option, value, CHOICES[option])
