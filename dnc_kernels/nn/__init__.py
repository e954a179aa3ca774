"""Layers on the ops: a segmentation head, a classifier, their sub-centroids and memory (page: docs/layer.md)."""

from ._base import DNCLoss
from ._labels import resize_labels
from ._momentum import Recent
from .classifier import DNCClassifier
from .explain import Nearest, NearestSamples, nearest_samples
from .head import DNCHead
from .loading import Loaded, load_released_state_dict
from .memory import FeatureMemory, Memory
from .recipes import RECIPES
from .subcentroids import SubCentroids

__all__ = [
    "RECIPES",
    "DNCClassifier",
    "DNCHead",
    "DNCLoss",
    "FeatureMemory",
    "Loaded",
    "Memory",
    "Nearest",
    "NearestSamples",
    "Recent",
    "SubCentroids",
    "load_released_state_dict",
    "nearest_samples",
    "resize_labels",
]
