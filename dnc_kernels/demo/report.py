"""The demo's figures: a table for people and metrics.json for programs."""

from __future__ import annotations

import math
import platform
import statistics
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .. import __version__
from .._json import dumps
from ..backends import KERNELS, cpu_isa, resolve
from .progress import TITLES
from .scenes import CLASS_NAMES
from .training import HeadName, Run, Settings

HEAD_OPS = (
    "normalize_embedding",
    "class_scores",
    "sinkhorn_assign",
    "cluster_sums",
    "apply_momentum_",
    "upsample_cross_entropy",
)
MEANING = {
    "held-out scenes": "of digit images that no training scene has; the recipes were compared on other scenes of these images",
    "miou": "mean over the classes of intersection over union, all held-out scenes together",
    "pixel_accuracy": "share of the pixels of the held-out scenes that are right",
    "learnable_head": "parameters of the head that gradients train",
    "learnable_all": "parameters of network and head that gradients train",
    "anchored_miou": "mIoU once every sub-centroid is replaced by a pixel of a training scene, one of its class",
    "dead": "share of the sub-centroids that are nearest to less than 1 % of the training pixels of their class",
    "usage": "entropy of those shares over the logarithm of their number, mean of the classes: 1 even, 0 one does it all",
    "moved": "numbers of the sub-centroids, which clustering moves and no gradient trains",
    "step_ms": "median time of a training step: batch to device, forward, loss, backward, optimiser",
    "peak_mb": "10^6 bytes. CPU: rise of the resident set of a fresh process during the steps before the first evaluation, "
    "over what it was with network and scenes in place. CUDA: peak of torch's allocator during the same steps",
    "seconds": "training with its evaluations on the held-out scenes, without starting the process",
    "loss": "cross-entropy of every step",
    "accuracy": "share of the batch's pixels at feature size that were right, of every step",
    "std": "sample standard deviation over the seeds; null for one seed",
}


def table(runs: list[Run], settings: Settings) -> Table:
    """The heads side by side; with several seeds mean ± standard deviation."""
    by_head = _by_head(runs)
    seeds = sorted({run.seed for run in runs})
    which = f"seed {seeds[0]}" if len(seeds) == 1 else f"{len(seeds)} seeds, mean ± standard deviation"
    result = Table(
        title=f"{settings.test_scenes} held-out scenes of {settings.height}x{settings.width}, digits never trained on; "
        f"{settings.steps} steps of {settings.batch} scenes; {which}",
        title_justify="left",
    )
    result.add_column("")
    for head in by_head:
        result.add_column(TITLES[head], justify="right")

    def row(name: str, cell: Callable[[list[Run]], str]) -> None:
        result.add_row(name, *(cell(of_head) for of_head in by_head.values()))

    row("mIoU", lambda of_head: _spread([run.miou for run in of_head], 4))
    row("pixel accuracy", lambda of_head: _spread([run.pixel_accuracy for run in of_head], 4))
    row("learnable parameters, head", lambda of_head: f"{of_head[0].learnable_head:,}")
    row("learnable parameters, all", lambda of_head: f"{of_head[0].learnable_all:,}")
    row("sub-centroid numbers, moved by clustering", lambda of_head: f"{of_head[0].moved:,}" if of_head[0].moved else "-")
    if any(run.standing for run in runs):
        row("mIoU with training pixels as sub-centroids", _of_standing("anchored_miou", 4))
        row("sub-centroids that win less than 1 % of their class", _of_standing("dead", 3))
        row("evenness of the sub-centroids (usage), 0 to 1", _of_standing("usage", 2))
    row("median time per step, ms", lambda of_head: _spread([run.step_ms for run in of_head], 1))
    row(f"peak memory, MB ({'allocator' if settings.device != 'cpu' else 'rise of the process'})", _peak)
    row("training with evaluations, s", lambda of_head: _spread([run.seconds for run in of_head], 0))
    return result


def write_metrics(out: Path, runs: list[Run], settings: Settings, *, quick: bool, seconds: float) -> Path:
    """Write metrics.json: every figure with settings, versions and what it means."""
    device = torch.device(settings.device)
    choices = {op: resolve(op, device.type, torch.float32).backend for op in HEAD_OPS if op in KERNELS}
    content = {
        "heads": {head: _figures(of_head) for head, of_head in _by_head(runs).items()},
        "settings": {**asdict(settings), "threads": runs[0].threads, "quick": quick, "seeds": sorted({r.seed for r in runs})},
        "classes": CLASS_NAMES,
        "meaning": MEANING,
        "versions": {
            "dnc_kernels": __version__,
            "python": platform.python_version(),
            "torch": torch.__version__,  # with its build, which the metadata of PyPI's wheel lacks
            **{name: version(name) for name in ("numpy", "scikit-learn", "matplotlib", "rich")},
        },
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu, {platform.machine()}, {cpu_isa()}",
        "backends": choices,
        "seconds": round(seconds, 1),
    }
    path = out / "metrics.json"
    path.write_text(dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def _figures(runs: list[Run]) -> dict[str, Any]:
    spread = {
        name: {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else None}
        for name in ("miou", "pixel_accuracy", "step_ms", "seconds")
        for values in [[float(getattr(run, name)) for run in runs]]
    }
    counts = {name: getattr(runs[0], name) for name in ("learnable_head", "learnable_all", "moved")}
    peaks = [run.peak_mb for run in runs if run.peak_mb is not None]
    return {**spread, **counts, "peak_mb": max(peaks, default=None), "runs": [_run(run) for run in runs]}


def _run(run: Run) -> dict[str, Any]:
    names = (
        "seed",
        "miou",
        "pixel_accuracy",
        "step_ms",
        "peak_mb",
        "seconds",
        "loss",
        "accuracy",
        "evaluated_at",
        "evaluated_miou",
    )
    iou = [None if math.isnan(value) else value for value in run.class_iou]
    figures = {name: getattr(run, name) for name in names}
    stands = asdict(run.standing) if run.standing else {}
    return {**figures, **stands, "class_iou": dict(zip(CLASS_NAMES, iou, strict=True))}


def _of_standing(name: str, digits: int) -> Callable[[list[Run]], str]:
    def cell(runs: list[Run]) -> str:
        values = [float(getattr(run.standing, name)) for run in runs if run.standing]
        return _spread(values, digits) if values else "-"

    return cell


def _by_head(runs: list[Run]) -> dict[HeadName, list[Run]]:
    return {head: [run for run in runs if run.head == head] for head in dict.fromkeys(run.head for run in runs)}


def _peak(runs: list[Run]) -> str:
    peaks = [run.peak_mb for run in runs if run.peak_mb is not None]
    return f"{max(peaks):.0f}" if peaks else "unknown here"


def _spread(values: list[float], digits: int) -> str:
    mean = f"{statistics.fmean(values):.{digits}f}"
    return mean if len(values) == 1 else f"{mean} ± {statistics.stdev(values):.{digits}f}"
