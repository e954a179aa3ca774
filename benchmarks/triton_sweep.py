"""Shapes between the shape classes: every Triton launcher over channels, classes, dtypes and layouts, without a GPU.

A configuration is kept for a shape class, but meets every shape that is nearest to it. Whether what is compiled then fits and
does not spill depends on sizes that are rounded up, on dtypes and layouts, and on what a call asks for. Each is an axis, and
the sweep goes through a covering set of their values, in which every two values of different axes meet. What would be compiled
twice is compiled once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from dnc_kernels.ops.embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut
from dnc_kernels.ops.similarity.calls import (
    ContrastCall,
    ContrastOut,
    DistanceCall,
    LossCall,
    LossOut,
    NearestCall,
    NearestOut,
    ScoresBackwardCall,
    ScoresBackwardOut,
    ScoresCall,
    ScoresOut,
    SweepCall,
    SweepOut,
)
from dnc_kernels.ops.upsample.calls import ArgmaxCall, UpsampleCall, UpsampleOut

from .aot_triton import compiling, product_precision, row_of
from .machine_code import Row
from .machine_code import faults as resource_faults

Point = dict[str, Any]
META = torch.device("meta")

CHANNELS = (8, 17, 64, 96, 100, 256, 257, 320, 384, 440, 512, 720, 768, 1024, 2048)
CLASSES = (2, 19, 150, 171, 1000)
SUBCENTROIDS = (1, 4, 10, 20)
DTYPES = ("bfloat16", "float16", "float32", "tf32")
#: odd: planes whose sizes are no multiples of 16; crop: of a larger map; large: planes beyond what an int32 counts.
LAYOUTS = ("rows", "planes", "odd", "crop", "large")
METRICS = ("dot", "cosine", "sqeuclidean")
BOOL = (False, True)


def pixels(point: Point, channels: int, dtype: torch.dtype | None = None) -> Tensor:
    """[N,D] or [B,D,H,W] of a point's layout, without memory."""
    dtype = dtype or dtype_of(point)
    layout = point["layout"]
    if layout == "rows":
        return torch.empty(65536, channels, dtype=dtype, device=META)
    side = 65 if layout == "odd" else 128
    batch = 2
    if layout == "large":
        batch = 2**31 // (channels * side**2) + 2
    x = torch.empty(batch, channels, side, side, dtype=dtype, device=META)
    return x[:, :, 1:-1, :-2] if layout == "crop" else x


def dtype_of(point: Point) -> torch.dtype:
    """Of the pixels."""
    return torch.float32 if point["dtype"] == "tf32" else getattr(torch, point["dtype"])


def numbers(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """A contiguous tensor without memory."""
    return torch.empty(sizes, dtype=dtype, device=META)


def count(x: Tensor) -> int:
    """Pixels of x."""
    return x.shape[0] * x.shape[2:].numel()


@dataclass(frozen=True)
class Call:
    """A launcher with the axes of its calls; `launch` runs it at a point."""

    launch: Callable[[Point], None]
    axes: Mapping[str, Sequence[Any]]


def _problem(point: Point) -> tuple[Tensor, Tensor, Tensor]:
    x = pixels(point, point["D"])
    return x, numbers(point["C"], point["K"], point["D"]), numbers(count(x), dtype=torch.int64)


def _class_scores(point: Point) -> None:
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = _problem(point)
    scores = pixels(point, point["C"], torch.float32)
    own = numbers(count(x), point["K"]) if point["own"] else None
    call = ScoresCall(x, centroids, labels if point["own"] else None, point["metric"], "triton")
    triton.class_scores(call, ScoresOut(scores, scores.to(torch.uint8), own))


def _scores_backward(point: Point) -> None:
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = _problem(point)
    grad_scores = pixels(point, point["C"], torch.float32)
    own = numbers(count(x), point["K"]) if point["own"] else None
    dot = point["metric"] == "dot"
    call = ScoresBackwardCall(
        x, centroids, labels if point["own"] else None, point["metric"], grad_scores.to(torch.uint8), grad_scores, own,
        point["accumulate"] and dot, "triton",
    )  # fmt: skip
    to_x, to_centroids = (torch.empty_like(x), None) if point["to_x"] else (None, torch.empty_like(centroids))
    triton.class_scores_backward(call, ScoresBackwardOut(to_x, to_centroids))


def _centroid_loss(point: Point) -> None:
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = _problem(point)
    classes, n = point["C"], count(x)
    gain = numbers(classes) if point["norm"] else None
    scale = numbers() if point["scale"] else None
    smooth = 0.1 if point["smooth"] else 0.0
    reduction = "none" if point["pass"] == "later" else "mean"
    # forward alone; with early gradients; backward alone with those of the sub-centroids
    forward = point["pass"] != "later"
    grads: tuple[Tensor | None, ...] = (None,) * 5
    grad_loss = None
    if point["pass"] != "forward":
        to_p = torch.empty_like(centroids) if point["pass"] == "later" else None
        grads = (torch.empty_like(x), to_p, gain, gain, scale)
    if point["pass"] == "later":
        grad_loss = numbers(n)
    loss, prediction, own = (
        (numbers(), numbers(n, dtype=torch.int64), numbers(n, point["K"])) if forward else (None, None, None)
    )
    call = LossCall(
        x, centroids, labels, point["metric"], gain, gain, 1e-5, scale, 1.0, numbers(classes) if smooth else None, -100, smooth,
        reduction, grad_loss, "triton",
    )  # fmt: skip
    triton.centroid_cross_entropy(call, LossOut(loss, prediction, own, *grads))


def _nearest(point: Point) -> None:
    from dnc_kernels.ops.similarity import triton

    x, centroids, labels = _problem(point)
    call = NearestCall(x, centroids, point["metric"], "triton")
    triton.nearest_centroid(call, NearestOut(labels, torch.empty_like(labels), numbers(count(x))))


def _distance(point: Point) -> None:
    from dnc_kernels.ops.similarity import triton

    x, centroids, _ = _problem(point)
    triton.centroid_distance(DistanceCall(x, centroids, point["metric"], "triton"), numbers(count(x), point["C"], point["K"]))


def _contrast(point: Point) -> None:
    from dnc_kernels.ops.similarity import triton

    x, centroids, index = _problem(point)
    loss = numbers(count(x))
    grad = torch.empty_like(x) if point["grad"] else None
    if point["target"]:
        call = ContrastCall(x, centroids, index, 0.1, -1, "triton")
        triton.subcentroid_cross_entropy(call, ContrastOut(loss, grad))
        return
    scores, own = pixels(point, point["C"], torch.float32), numbers(count(x), point["K"])
    out = SweepOut(scores, scores.to(torch.uint8), own, loss, grad)
    triton.scores_and_contrast(SweepCall(x, centroids, index, 0.1, numbers(), "triton"), out)


def _sinkhorn(point: Point) -> None:
    from dnc_kernels.ops.sinkhorn import triton
    from dnc_kernels.ops.sinkhorn.calls import SinkhornBackwardCall, SinkhornBackwardOut, SinkhornCall, SinkhornOut

    n, g, k = 65536 + 16 * point["odd"], point["C"], point["K"]
    similarity = numbers(n, k, dtype=dtype_of(point))
    group = numbers(n, dtype=torch.int64) if point["grouped"] else None
    g = g if point["grouped"] else 1
    tolerance = 1e-3 if point["tolerance"] else -1.0
    assignment, plan = numbers(n, dtype=torch.int64), numbers(n, k)
    history, steps = numbers(4, g, k), numbers(g, dtype=torch.int64)
    call = SinkhornCall(similarity, group, g, 0.05, 3, tolerance, "triton")
    if point["plan"]:
        triton.sinkhorn(call, SinkhornOut(None, plan, history, steps))
        backward = SinkhornBackwardCall(similarity, group, g, 0.05, history, steps, plan, "triton")
        triton.sinkhorn_backward(backward, SinkhornBackwardOut(torch.empty_like(plan)))
    else:
        triton.sinkhorn(call, SinkhornOut(assignment))


def _momentum(point: Point) -> None:
    from dnc_kernels.ops.momentum import triton
    from dnc_kernels.ops.momentum.calls import ApplyCall, SumsCall, SumsOut, UpdateCall

    x = pixels(point, point["D"])
    rows, cluster = numbers(point["C"] * point["K"], point["D"]), numbers(count(x), dtype=torch.int64)
    counts = numbers(len(rows), dtype=torch.int64)
    if point["update"]:
        triton.momentum_update_(UpdateCall(rows, x, cluster, 0.999, True, "triton"))
        triton.apply_momentum_(ApplyCall(rows, torch.empty_like(rows), counts, 0.999, "triton"))
    else:
        triton.cluster_sums(SumsCall(x, cluster, "triton"), SumsOut(rows, counts))


def _embedding(point: Point) -> None:
    from dnc_kernels.ops.embedding import triton

    x = pixels(point, point["D"])
    weight = numbers(point["D"]) if point["affine"] else None
    mean, rstd, inverse_norm = (numbers(count(x)) for _ in range(3))
    triton.normalize_embedding(
        NormalizeCall(x, weight, weight, 1e-5, "triton"), NormalizeOut(torch.empty_like(x), mean, rstd, inverse_norm)
    )
    to_rstd = numbers(count(x)) if point["to_rstd"] else None
    triton.normalize_embedding_backward(
        NormalizeBackwardCall(x, weight, weight, mean, rstd, inverse_norm, torch.empty_like(x), to_rstd, "triton"),
        NormalizeBackwardOut(torch.empty_like(x), weight, weight),
    )


def _head(point: Point) -> None:
    """A training step, and the backward pass through the parts of its loss."""
    from dnc_kernels import backends, nn
    from dnc_kernels.nn import _step
    from dnc_kernels.ops import _op

    x = pixels({**point, "layout": "planes"} if point["layout"] == "rows" else point, point["D"])
    if point["layout"] == "rows":
        x = x.contiguous(memory_format=torch.channels_last)
    batch, _, height, width = x.shape
    labels = numbers(batch, 2 * height, 2 * width, dtype=getattr(torch, point["labels"]))
    momentum: Any = {"constant": 0.99, "ramp": (0.9, 0.99, 10), "recent": nn.Recent()}[point["schedule"]]
    head = nn.DNCHead(
        point["D"], point["C"], point["K"], momentum=momentum, assignment=point["assignment"], ignore_index=-100,
        ppc_weight=0.01 * point["contrast"], ppd_weight=0.01 * point["distance"], scores=point["scores"],
        confidence=point["confidence"], label_mode=point["mode"], update_from=point["update_from"],
        class_weight=[1.0] * point["C"] if point["weighted"] else None, loss_size=point["loss_size"],
        band_pixels=max(count(x) // 4, 4096) if point["bands"] else count(x),
        pixels_per_class=100 if point["balanced"] else None, device=META,
    )  # fmt: skip
    # as on a GPU, where its kernels can run
    with (
        patch.object(backends, "resolve", lambda *_, **__: backends.Resolution("triton", "")),
        patch.object(_op, "plain", lambda call: True),
        patch.object(torch.compiler, "is_compiling", lambda: point["compiled"]),
        backends.use_backend("triton"),
    ):
        inputs: Any = [t if t is None else t.detach().requires_grad_(point["grad"]) for t in _step.inputs_of(head, x)]
        made = _step.make_step(head, tuple(inputs), labels, head.ignore_index, point["update"])
        if made.again is not None:
            made.again.gradients(numbers(), numbers() if point["contrast"] else None, numbers() if point["distance"] else None)


def _upsample(point: Point) -> None:
    from dnc_kernels.ops.upsample import triton

    layout = point["layout"]
    side = 33 if layout == "odd" else 32
    batch = 2**31 // (point["C"] * side**2) + 2 if layout == "large" else 2
    scores = torch.empty(batch, point["C"], side, side, dtype=dtype_of(point), device=META)
    if layout == "crop":
        scores = scores[:, :, 1:-1]
    if layout == "rows":
        scores = scores.to(memory_format=torch.channels_last)
    size = tuple(max(1, round(point["scale"] * s)) for s in scores.shape[2:])
    # the addresses of the labels are of the same size as those of the scores
    labels = numbers(batch, *size, dtype=torch.int64)
    if point["what"] == "argmax":
        triton.upsample_argmax(ArgmaxCall(scores, point["align"], "triton"), labels)
        return
    weight = numbers(point["C"]) if point["weight"] else None
    smooth = 0.1 if point["smooth"] else 0.0
    sums, grad = numbers(2, dtype=torch.float64), torch.empty_like(scores, dtype=torch.float32)
    later, each = point["what"] == "later", point["what"] == "none"
    loss = numbers(*labels.shape)
    triton.upsample_cross_entropy(
        UpsampleCall(scores, labels, 0, 0, 0, 0, point["align"], weight, -100, smooth, loss if later else None, "triton"),
        UpsampleOut(None if later else sums, loss if each else None, None if each else grad),
    )


_SIMILARITY = {"D": CHANNELS, "C": CLASSES, "K": SUBCENTROIDS, "dtype": DTYPES, "layout": LAYOUTS}
_HALVES = ("bfloat16", "float16", "float32")

CALLS: dict[str, dict[str, Call]] = {
    "similarity": {
        "centroid_cross_entropy": Call(
            _centroid_loss,
            {**_SIMILARITY, "metric": METRICS, "norm": BOOL, "scale": BOOL, "smooth": BOOL,
             "pass": ("early", "forward", "later")},
        ),
        "class_scores": Call(_class_scores, {**_SIMILARITY, "metric": METRICS, "own": BOOL}),
        "class_scores_backward": Call(
            _scores_backward, {**_SIMILARITY, "metric": METRICS, "own": BOOL, "to_x": BOOL, "accumulate": BOOL}
        ),
        "subcentroid_cross_entropy": Call(_contrast, {**_SIMILARITY, "target": BOOL, "grad": BOOL}),
        "nearest_centroid": Call(_nearest, {**_SIMILARITY, "metric": METRICS}),
        "centroid_distance": Call(_distance, {**_SIMILARITY, "metric": METRICS[1:]}),
    },
    "sinkhorn": {
        "sinkhorn": Call(
            _sinkhorn,
            {"K": (1, 2, 4, 10, 17, 20, 32, 33, 64), "C": CLASSES, "dtype": _HALVES, "plan": BOOL, "tolerance": BOOL,
             "grouped": BOOL, "odd": BOOL},
        ),
    },
    "momentum": {
        "momentum_update_": Call(
            _momentum, {"D": CHANNELS, "C": CLASSES, "K": SUBCENTROIDS, "dtype": _HALVES, "layout": LAYOUTS, "update": BOOL}
        ),
    },
    "embedding": {
        "normalize_embedding": Call(
            _embedding, {"D": CHANNELS, "dtype": _HALVES, "layout": LAYOUTS, "affine": BOOL, "to_rstd": BOOL}
        ),
    },
    "head": {
        "head_step": Call(
            _head,
            {"D": CHANNELS, "C": CLASSES, "K": SUBCENTROIDS, "dtype": DTYPES, "layout": LAYOUTS,
             "scores": ("norm", "scale", "temperature"), "confidence": ("length", "none"), "contrast": BOOL, "distance": BOOL,
             "schedule": ("constant", "ramp", "recent"), "assignment": ("argmax", "gumbel"), "update_from": ("correct", "all"),
             "mode": ("nearest", "nearest-exact"), "labels": ("int64", "int32", "uint8"), "loss_size": ("labels", "features"),
             "weighted": BOOL, "balanced": BOOL, "bands": BOOL, "grad": BOOL, "update": BOOL, "compiled": BOOL},
        ),
    },
    "upsample": {
        "upsample_cross_entropy": Call(
            _upsample,
            {"C": (1, *CLASSES), "dtype": _HALVES, "layout": LAYOUTS, "scale": (0.5, 1, 2, 4, 5, 8),
             "what": ("early", "none", "later", "argmax"), "align": BOOL, "weight": BOOL, "smooth": BOOL},
        ),
    },
}  # fmt: skip


def _point(arch: int, d: int, c: int, k: int, dtype: str, layout: str = "rows", **asked: Any) -> Point:
    plain = {"metric": "dot", "own": True, "norm": True, "scale": False, "smooth": False, "pass": "early", "accumulate": False}
    return {**plain, "arch": arch, "D": d, "C": c, "K": k, "dtype": dtype, "layout": layout, **asked}


def _step_point(arch: int, d: int, c: int, k: int, layout: str, **asked: Any) -> Point:
    plain = {
        "dtype": "bfloat16", "scores": "scale", "confidence": "length", "contrast": True, "distance": True,
        "schedule": "constant", "assignment": "argmax", "update_from": "correct", "mode": "nearest", "labels": "int64",
        "loss_size": "labels", "weighted": False, "balanced": False, "bands": False, "grad": True, "update": True,
        "compiled": False,
    }  # fmt: skip
    return {**plain, "arch": arch, "D": d, "C": c, "K": k, "layout": layout, **asked}


#: Calls that once asked for too much shared memory, spilled or did not compile.
REPORTED: tuple[tuple[str, Point], ...] = (
    ("class_scores", _point(90, 320, 150, 10, "bfloat16")),
    ("class_scores", _point(100, 384, 19, 10, "float16")),
    ("class_scores", _point(86, 256, 150, 10, "bfloat16")),
    ("class_scores", _point(90, 257, 2, 4, "float16")),
    ("class_scores", _point(90, 8, 171, 20, "tf32", "odd", own=False)),
    ("class_scores", _point(90, 1024, 19, 10, "bfloat16", "crop", metric="sqeuclidean")),
    ("class_scores_backward", _point(90, 64, 19, 10, "float16", own=False, to_x=False)),
    ("class_scores_backward", _point(90, 440, 150, 20, "float16", "crop", to_x=False)),
    ("class_scores_backward", _point(90, 257, 1000, 10, "float32", "odd", to_x=True, accumulate=True)),
    ("class_scores_backward", _point(100, 768, 171, 4, "float16", metric="sqeuclidean", to_x=False)),
    ("class_scores_backward", _point(100, 768, 150, 10, "bfloat16", metric="cosine", to_x=False)),
    ("centroid_cross_entropy", _point(90, 384, 19, 10, "bfloat16")),
    ("centroid_cross_entropy", _point(86, 256, 150, 10, "float16")),
    ("centroid_cross_entropy", _point(90, 320, 150, 10, "bfloat16", "planes")),
    ("centroid_cross_entropy", _point(90, 256, 19, 10, "bfloat16", "planes", **{"pass": "later"})),
    ("centroid_cross_entropy", _point(80, 256, 19, 1, "float16", "odd", norm=False, **{"pass": "later"})),
    ("centroid_cross_entropy", _point(90, 256, 150, 10, "float32", **{"pass": "forward"})),
    ("centroid_cross_entropy", _point(90, 256, 19, 2, "bfloat16", **{"pass": "forward"})),
    ("centroid_cross_entropy", _point(80, 256, 19, 1, "bfloat16", **{"pass": "forward"})),
    ("centroid_cross_entropy", _point(90, 257, 1000, 1, "bfloat16", "large", **{"pass": "later"})),
    ("centroid_cross_entropy", _point(90, 96, 19, 1, "bfloat16", "planes", **{"pass": "forward"})),
    ("centroid_cross_entropy", _point(80, 17, 19, 4, "tf32", "odd", metric="sqeuclidean", norm=False, smooth=True)),
    ("centroid_cross_entropy", _point(80, 100, 2, 20, "tf32", "planes", scale=True, smooth=True)),
    ("centroid_cross_entropy", _point(100, 384, 19, 20, "tf32", "large", scale=True, **{"pass": "later"})),
    ("centroid_cross_entropy", _point(100, 256, 19, 10, "bfloat16", "planes", scale=True, smooth=True)),
    ("subcentroid_cross_entropy", _point(100, 256, 171, 4, "float16", "large", target=True, grad=True)),
    ("nearest_centroid", _point(90, 256, 150, 10, "bfloat16", "crop", metric="cosine")),
    ("nearest_centroid", _point(100, 256, 171, 4, "float16", "large", metric="sqeuclidean")),
    ("head_step", _step_point(86, 64, 19, 10, "planes", assignment="gumbel")),
    ("head_step", _step_point(100, 768, 19, 1, "planes", dtype="tf32", schedule="ramp")),
    ("head_step", _step_point(90, 512, 150, 1, "rows", dtype="tf32", scores="norm", distance=False)),
    ("head_step", _step_point(80, 2048, 171, 1, "large", scores="norm", bands=True)),
)


def covering(axes: Mapping[str, Sequence[Any]], strength: int = 2) -> list[Point]:
    """Points in which every `strength` values of different axes meet. Greedy; the same at every call."""
    groups = list(combinations(axes, min(strength, len(axes))))
    left = {(group, values) for group in groups for values in product(*(axes[name] for name in group))}

    def gain(point: Point, name: str, value: Any) -> int:
        """What still has to meet and would, with this value in the point."""
        trial = {**point, name: value}
        return sum(
            (group, tuple(trial[n] for n in group)) in left for group in groups if name in group and trial.keys() >= set(group)
        )

    points: list[Point] = []
    for target in sorted(left, key=repr):
        if target not in left:
            continue
        point: Point = dict(zip(*target, strict=True))
        for name, values in axes.items():
            if name not in point:
                # of equals the next in turn, so that values that are no longer needed alternate
                turn = len(points) % len(values)
                gains = {i: gain(point, name, values[i]) for i in (*range(turn, len(values)), *range(turn))}
                point[name] = values[max(gains, key=gains.__getitem__)]
        left -= {(group, tuple(point[n] for n in group)) for group in groups}
        points.append({name: point[name] for name in axes})
    return points


def points(family: str, archs: Sequence[int], every: int, strength: int = 2) -> Iterator[tuple[str, Point]]:
    """Calls of a family at every so many points of a covering set, an axis of which is the architecture; all those reported."""
    for name, call in CALLS[family].items():
        yield from ((name, point) for known, point in REPORTED if known == name and point["arch"] in archs)
        yield from ((name, point) for point in covering({"arch": tuple(archs), **call.axes}, strength)[every // 2 :: every])


@contextmanager
def choices(made: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Note which configuration every kernel gets, with the bytes of shared memory that it is said to need at most."""
    from dnc_kernels.ops import _triton

    choose = _triton._chosen

    def noted(family: str, kernel: str, kinds: tuple[str, ...], shape: Any, need: Any, limit: float) -> Mapping[str, Any]:
        use = choose(family, kernel, kinds, shape, need, limit)
        made[kernel] = {**use, "need": need(use, _triton.needed_for(kinds, shape))} if need else dict(use)
        return use

    _triton._chosen = noted  # type: ignore[assignment]
    try:
        yield
    finally:
        _triton._chosen = choose


def rows(families: Sequence[str], archs: Sequence[int], every: int = 1) -> Iterator[Row]:
    """Resources of every kernel of the families that the calls launch, each compiled once."""
    seen: set[tuple[int, str]] = set()
    for family in families:
        for name, point in points(family, archs, every):
            made: list[Row] = []
            used: dict[str, dict[str, Any]] = {}

            def found(
                kernel: Any, compiled: Any, op: str = f"{family}.{name}", point: Point = point, made: list[Row] = made,
                used: dict[str, dict[str, Any]] = used,
            ) -> None:  # fmt: skip
                key = (point["arch"], compiled.hash)
                if key not in seen:
                    seen.add(key)
                    config = used.get(kernel.fn.__name__.strip("_").removesuffix("_kernel"), {})
                    made.append(row_of(op, kernel.fn.__name__, config, point, point["arch"], compiled))

            # bits 19: tf32
            precision = product_precision({"bits": 19 if point.get("dtype") == "tf32" else 32})
            with precision, choices(used), compiling(point["arch"], found, family):
                CALLS[family][name].launch(point)
            yield from made


#: Bytes that ptxas may spill with registers left: it weighs them against another block on the multiprocessor.
SPILLED_BY_CHOICE = 24


#: Spills that a smaller tile would cost more than: (kernel, point, bytes). The first is one address, outside the products; with
#: half the pixels a tile nothing spills, and every product reads the sub-centroids from L2 twice as often.
ACCEPTED: tuple[tuple[str, Point, int], ...] = (
    (
        "centroid_loss_kernel",
        {"arch": 90, "D": 320, "C": 150, "K": 4, "dtype": "bfloat16", "layout": "planes", "metric": "cosine", "norm": True,
         "scale": False, "smooth": False, "pass": "later"},
        8,
    ),
)  # fmt: skip


def faults(row: Row) -> list[str]:
    """What must not ship, and a need that was taken for smaller than it is."""
    found = resource_faults(row)
    by_choice = row.registers < min(255, 65536 // row.threads) and row.spills <= SPILLED_BY_CHOICE
    if by_choice or any((row.kernel, row.when) == known[:2] and row.spills <= known[2] for known in ACCEPTED):
        found = [fault for fault in found if not fault.startswith("spills")]
    said = row.config.get("need", row.shared_bytes)
    if row.shared_bytes > said:
        found.append(f"needs {row.shared_bytes} bytes of shared memory, not at most {said}")
    return found
