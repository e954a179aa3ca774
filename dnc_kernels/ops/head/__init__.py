"""A segmentation head's training step: the ops that `dnc_kernels.nn.DNCHead` is made of, and what it has to know of them."""

from __future__ import annotations

from .._common import scale_saved
from ..upsample.calls import LABEL_DTYPES
from .bands import BAND_PIXELS, default_band, device_band
from .calls import (
    COUNT,
    SCALE,
    UNIT,
    WEIGHT,
    ClusterCall,
    Clusters,
    FinishCall,
    Finished,
    FirstPass,
    Labels,
    LabelsCall,
    Second,
    SecondPass,
    Step,
)
from .cpu import label_range
from .op import (
    head_cluster,
    head_finish,
    head_first_pass,
    head_labels,
    head_second_pass,
    is_triton,
    sorting_of,
    table_size,
)
from .reference import amounts_of, label_places, pull_of, to_target

__all__ = [
    "BAND_PIXELS",
    "COUNT",
    "LABEL_DTYPES",
    "SCALE",
    "UNIT",
    "WEIGHT",
    "ClusterCall",
    "Clusters",
    "FinishCall",
    "Finished",
    "FirstPass",
    "Labels",
    "LabelsCall",
    "Second",
    "SecondPass",
    "Step",
    "amounts_of",
    "default_band",
    "device_band",
    "head_cluster",
    "head_finish",
    "head_first_pass",
    "head_labels",
    "head_second_pass",
    "is_triton",
    "label_places",
    "label_range",
    "pull_of",
    "scale_saved",
    "sorting_of",
    "table_size",
    "to_target",
]
