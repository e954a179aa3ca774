"""A picture of predictions next to the truth."""

from __future__ import annotations

import colorsys
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from numpy.typing import NDArray
from torch import Tensor

from ..demo.pictures import COLOURS, DPI
from ..integrations import DNCSegmenter
from .data import network_input


@torch.no_grad()
def draw_predictions(path: Path, network: DNCSegmenter, images: Tensor, labels: Tensor, classes: int) -> Path:
    """Draw images [B,3,H,W] uint8, their labels [B,H,W] and the predictions. Pixels whose label is no class are white."""
    network.eval()
    predicted = network.predict(network_input(images, next(network.parameters()).device)).cpu()
    network.train()
    count = len(images)
    figure = Figure(figsize=(1.9 * count + 0.5, 5.9), layout="constrained")
    axes = figure.subplots(3, count, squeeze=False)
    colours = palette(classes)
    rows = (
        ("image", images.permute(0, 2, 3, 1).numpy()),
        ("truth", _painted(labels.numpy(), colours)),
        ("prediction", _painted(predicted.numpy(), colours)),
    )
    for of_row, (name, pictures) in zip(axes, rows, strict=True):
        of_row[0].set_ylabel(name)
        for axis, picture in zip(of_row, pictures, strict=True):
            axis.imshow(picture, interpolation="nearest")
            axis.set(xticks=[], yticks=[])
    FigureCanvasAgg(figure)
    figure.savefig(path, dpi=DPI)
    return path


def palette(classes: int) -> NDArray[np.float64]:
    """Colours [classes,3] in 0..1: those of the demo if they suffice, else hues spaced by the golden ratio."""
    hues = [colorsys.hsv_to_rgb(i * 0.618034 % 1, 0.75, 0.9 if i % 2 else 0.65) for i in range(classes)]
    return COLOURS[:classes] if classes <= len(COLOURS) else np.array(hues)


def _painted(labels: NDArray[np.int64], colours: NDArray[np.float64]) -> NDArray[np.float64]:
    inside = (labels >= 0) & (labels < len(colours))
    return np.where(inside[..., None], colours[np.where(inside, labels, 0)], 1.0)
