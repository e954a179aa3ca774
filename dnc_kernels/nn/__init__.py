"""Layers on the ops: a segmentation head, a classifier, their sub-centroids and memory (page: docs/layer.md)."""

from ._base import DNCLoss
from ._labels import resize_labels
from ._momentum import Recent
from ._usage import DeadSubCentroidsWarning
from .classifier import DNCClassifier
from .diagnosis import Diagnosis
from .explain import Nearest, NearestSamples, nearest_samples
from .head import DNCHead
from .loading import Loaded, load_released_state_dict
from .memory import FeatureMemory, Memory
from .monitor import Monitor
from .recipes import RECIPES
from .refit import Refit
from .subcentroids import SubCentroids

__all__ = [
    "RECIPES",
    "DNCClassifier",
    "DNCHead",
    "DNCLoss",
    "DeadSubCentroidsWarning",
    "Diagnosis",
    "FeatureMemory",
    "Loaded",
    "Memory",
    "Monitor",
    "Nearest",
    "NearestSamples",
    "Recent",
    "Refit",
    "SubCentroids",
    "load_released_state_dict",
    "nearest_samples",
    "resize_labels",
]
