"""What an eager call costs the host: every op on so few pixels that its kernel is next to nothing, on one thread.

Calls without gradients race with a bare ``torch.library.custom_op`` of three arguments that returns a clone, the least that an
op of torch's own kind costs in Python; losses with their backward pass race with ``F.cross_entropy`` and its backward pass.
Results are compared with the reference before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops
from dnc_kernels.backends import Backend

from .case import Case, Settings, Variant, dtype_of, error_ratio, kernels
from .clock import Call

SIZES = {"N": 8, "C": 3, "K": 2, "D": 16}
#: Of a timing on the CPU; on a GPU the clock sees to it that a call is not waited for.
CALLS = 100


@torch.library.custom_op("dnc_benchmarks::clone", mutates_args=())
def _clone(x: Tensor, y: Tensor, factor: float) -> Tensor:
    """The bare op."""
    return x.clone()


@_clone.register_fake
def _(x: Tensor, y: Tensor, factor: float) -> Tensor:
    return torch.empty_like(x)


def _cross_entropy(i: Any) -> Call:
    def call() -> tuple[Tensor, Tensor | None]:
        i.logits.grad = None
        loss = F.cross_entropy(i.logits, i.labels)
        loss.backward()
        return loss, i.logits.grad

    return call


Forward = Callable[[Any, Backend], Any]
#: Op -> its call without gradients, and the most it may cost as a multiple of the bare op.
FORWARD: dict[str, tuple[Forward, float]] = {
    "centroid_distance": (lambda i, b: ops.centroid_distance(i.x, i.centroids, backend=b), 2.5),
    "class_scores": (lambda i, b: ops.class_scores(i.x, i.centroids, i.labels, backend=b).scores, 2.5),
    "nearest_centroid": (lambda i, b: ops.nearest_centroid(i.x, i.centroids, backend=b).score, 2.5),
    "centroid_cross_entropy": (lambda i, b: ops.centroid_cross_entropy(i.x, i.centroids, i.labels, backend=b).loss, 2.5),
    "subcentroid_cross_entropy": (lambda i, b: ops.subcentroid_cross_entropy(i.x, i.centroids, i.labels, backend=b), 2.5),
    "sinkhorn_assign": (lambda i, b: ops.sinkhorn_assign(i.similarity, i.labels, SIZES["C"], backend=b), 3),
    "sinkhorn_plan": (lambda i, b: ops.sinkhorn_plan(i.similarity, i.labels, SIZES["C"], backend=b), 2.5),
    "cluster_sums": (lambda i, b: ops.cluster_sums(i.x, i.labels, SIZES["C"], backend=b).sums, 2.5),
    "momentum_update_": (lambda i, b: ops.momentum_update_(i.moving, i.x, i.labels, backend=b), 3),
    "normalize_embedding": (lambda i, b: ops.normalize_embedding(i.x, backend=b), 2.5),
    "upsample_cross_entropy": (lambda i, b: ops.upsample_cross_entropy(i.scores, i.map_labels, backend=b), 2.5),
    "upsample_argmax": (lambda i, b: ops.upsample_argmax(i.scores, 4, backend=b), 2.5),
}
#: Loss -> itself and the input that gets a gradient; at most 1.6 times F.cross_entropy's host time.
TRAINED: dict[str, tuple[Forward, str]] = {
    "centroid_cross_entropy": (lambda i, b: ops.centroid_cross_entropy(i.x, i.centroids, i.labels, backend=b).loss, "x"),
    "upsample_cross_entropy": (lambda i, b: ops.upsample_cross_entropy(i.scores, i.map_labels, backend=b), "scores"),
}


class Solved(NamedTuple):
    """Result of an op; those of a baseline are its own."""

    made: Tensor


def _inputs(settings: Settings) -> Any:
    n, classes, k, channels = SIZES.values()
    seed, device = settings.generator(), settings.device

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed, device=device)

    def labels(*shape: int) -> Tensor:
        return torch.randint(classes, shape, generator=seed, device=device)

    return SimpleNamespace(
        x=normal(n, channels).to(dtype_of(_dtype(settings))), centroids=normal(classes, k, channels), labels=labels(n),
        moving=normal(classes, k, channels), similarity=normal(n, k).clamp(-1, 1), scores=normal(2, classes, 2, 2),
        map_labels=labels(2, 4, 4), logits=normal(n, classes).requires_grad_(),
    )  # fmt: skip


def _dtype(settings: Settings) -> str:
    """Of the features: one that every kernel takes."""
    return "bfloat16" if settings.cuda else "float32"


def _case(op: str, settings: Settings, name: str, solve: Forward, baseline: Variant, most: float, grad: str = "") -> Case:
    allowed = 1e-5 if _dtype(settings) == "float32" else 3e-2

    def once(i: Any, backend: Backend) -> Tensor:
        """What is checked: the op on sub-centroids that have not moved."""
        own = SimpleNamespace(**(vars(i) | {"moving": i.moving.clone()}))
        with torch.no_grad():
            made = solve(own, backend)
        return own.moving if made is None else made

    def reference(i: Any) -> dict[str, Any]:
        logits = i.logits.detach().double().requires_grad_()
        loss = F.cross_entropy(logits, i.labels)
        loss.backward()
        return {"op": once(i, "reference").double(), "custom_op": i.x.double(), "cross_entropy": (loss.detach(), logits.grad)}

    def prepare(backend: Backend) -> Callable[[Any], Call]:
        def of(i: Any) -> Call:
            solved = Solved(once(i, backend))
            if not grad:
                return lambda: (solve(i, backend), solved)[1]
            x = getattr(i, grad).requires_grad_()

            def call() -> Solved:
                x.grad = None
                solve(i, backend).backward()
                return solved

            return call

        return of

    def check(result: Any, expected: dict[str, Any]) -> float:
        if isinstance(result, Solved):
            return error_ratio(result.made, expected["op"], allowed * (1 + expected["op"].abs()))
        if isinstance(result, Tensor):
            return error_ratio(result, expected["custom_op"], 1e-5)
        return max(error_ratio(a.detach(), b, 1e-5) for a, b in zip(result, expected["cross_entropy"], strict=True))

    return Case(
        op=op, name=name, shape=SIZES, dtype=_dtype(settings), inputs=lambda: _inputs(settings), reference=reference,
        check=check, variants=[*kernels(settings, _dtype(settings), [op], prepare, SIZES), baseline],
        threads=1, calls=1 if settings.cuda else CALLS, goals={} if settings.cuda else {baseline.name: 1 / most},
    )  # fmt: skip


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings; they are tiny at any."""
    bare = Variant("custom_op", lambda i: lambda: _clone(i.x, i.x, 1.0))
    trained = Variant("cross_entropy", _cross_entropy)
    return [
        *(_case(op, settings, "host", solve, bare, most) for op, (solve, most) in FORWARD.items()),
        *(_case(op, settings, "host_train", solve, trained, 1.6, grad) for op, (solve, grad) in TRAINED.items()),
    ]
