"""The ops of momentum, and clustering + momentum together, against torch and the per-class loop of released training.

The loop follows the published training step (clustering and momentum of each class present: mask, gather, Sinkhorn, one-hot,
einsum, normalise, EMA), without its Gumbel step. `loop_released` reads the own-class similarities out of [N,K,C], as that code
does; `loop_own` gets them as [N,K], as our ops do.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops
from dnc_kernels.backends import Backend

from . import bench_sinkhorn as sinkhorn
from .case import Case, Settings, Variant, compiled, dtype_of, error_ratio, kernels
from .clock import Call

MOMENTUM = 0.999  # the default of the op
_DATA = sinkhorn.DATA + ", 30% of the others wrongly classified"


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    sizes = {"N": 256, "C": 5, "K": 3, "D": 16} if settings.quick else {"N": 131072, "C": 150, "K": 10, "D": 256}
    found = []
    for dtype in settings.dtypes:
        found += [_update(name, sizes, dtype, settings) for name in ("ade20k", "ade20k_nchw")]
        found += [_sums(name, sizes, dtype, settings) for name in ("ade20k", "ade20k_nchw")]
        found.append(_training(sizes, dtype, settings))
    return [*found, _apply(sizes, settings)]


def _inputs(sizes: dict[str, int], dtype: str, settings: Settings, nchw: bool = False) -> Any:
    """Unit pixels, their labels (-1: ignored), whether each was classified correctly, own-class similarities, clusters."""
    n, c, k, d = sizes.values()
    seed, device = settings.generator(), settings.device
    labels = sinkhorn.zipf_labels(n, c, seed)
    start = F.normalize(torch.randn(c, k, d, generator=seed, device=device), dim=2)
    cluster = labels.clamp_min(0) * k + torch.randint(k, (n,), generator=seed, device=device)
    noise = torch.randn(n, d, generator=seed, device=device) / d**0.5
    x = F.normalize(0.5 * start.flatten(0, 1)[cluster] + noise, dim=1).to(dtype_of(dtype))
    correct = (torch.rand(n, generator=seed, device=device) < 0.7) & (labels >= 0)
    own = torch.cat(
        [torch.einsum("nd,nkd->nk", a.float(), start[b]) for a, b in zip(x.split(4096), labels.split(4096), strict=True)]
    )
    if nchw:
        x = x.view(4, n // 64, 16, d).permute(0, 3, 1, 2).contiguous()
    cluster = torch.where(correct, cluster, -1)
    return SimpleNamespace(
        x=x, group=labels, correct=correct, similarity=own, classes=c, cluster=cluster, start=start, centroids=start.clone()
    )


def _reset(i: Any) -> None:
    i.centroids.copy_(i.start)


def _ema_(centroids: Tensor, sums: Tensor, counts: Tensor) -> None:
    rows = centroids.view(sums.shape)
    new = F.normalize(MOMENTUM * rows + (1 - MOMENTUM) * F.normalize(sums, dim=1), dim=1)
    rows.copy_(torch.where((counts > 0)[:, None], new, rows))


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _sums_by_index_add(x: Tensor, cluster: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    target = torch.where(cluster >= 0, cluster, rows)  # row M collects what is left out
    sums = x.new_zeros(rows + 1, x.shape[1], dtype=torch.float32).index_add_(0, target, _flat(x).float())
    return sums[:-1], torch.bincount(target, minlength=rows + 1)[:-1]


def _sums_by_scatter_add(x: Tensor, cluster: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    target = torch.where(cluster >= 0, cluster, rows)
    index = target[:, None].expand(-1, x.shape[1])
    sums = x.new_zeros(rows + 1, x.shape[1], dtype=torch.float32).scatter_add_(0, index, _flat(x).float())
    return sums[:-1], torch.bincount(target, minlength=rows + 1)[:-1]


def _index_add(centroids: Tensor, x: Tensor, cluster: Tensor) -> None:
    _ema_(centroids, *_sums_by_index_add(x, cluster, centroids.shape[0] * centroids.shape[1]))


def _scatter_add(centroids: Tensor, x: Tensor, cluster: Tensor) -> None:
    _ema_(centroids, *_sums_by_scatter_add(x, cluster, centroids.shape[0] * centroids.shape[1]))


def class_step_(centroids: Tensor, x: Tensor, sub: Tensor, keep: Tensor) -> None:
    """One class of the released update: centroids [K,D], x [n,D], sub [n]; `keep` [n] marks the pixels that count."""
    one_hot = F.one_hot(sub, len(centroids)) * keep[:, None]
    seen = one_hot.sum(0) > 0
    if seen.any():
        f = F.normalize(torch.einsum("nk,nd->kd", one_hot.float(), x.float()), dim=1)
        centroids[seen] = F.normalize(MOMENTUM * centroids[seen] + (1 - MOMENTUM) * f[seen], dim=1)


def _loop(centroids: Tensor, x: Tensor, cluster: Tensor) -> None:
    label, x = cluster.div(centroids.shape[1], rounding_mode="floor"), _flat(x)
    for c in range(len(centroids)):
        mask = label == c
        if mask.any():
            class_step_(centroids[c], x[mask], cluster[mask] % centroids.shape[1], mask[mask])


def _training_loop(i: Any, similarity_of: Callable[[int, Tensor], Tensor]) -> None:
    for c in range(i.classes):
        mask = i.group == c
        if mask.any():
            sub = sinkhorn.loop_sinkhorn(similarity_of(c, mask))
            class_step_(i.centroids[c], i.x[mask], sub, i.correct[mask])


def _reference(i: Any, cluster: Tensor) -> Any:
    """Sub-centroids after the update in float64, and the inputs, which hold a variant's result."""
    want = i.start.double()
    ops.momentum_update_(want, i.x.double(), cluster, backend="reference")
    return want, i


def _check(_: Any, expected: Any) -> float:
    """The update moves a sub-centroid by about 1e-3 of its length, so only its last bits may be off."""
    want, i = expected
    return error_ratio(i.centroids, want, 4 * torch.finfo(torch.float32).eps)


def _update(name: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    nchw = name != "ade20k"

    def timed(f: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.centroids, i.x, i.cluster)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda p, x, cluster: ops.momentum_update_(p, x, cluster, backend=backend))

    return Case(
        op="momentum_update_", name=name, shape=sizes, dtype=dtype, data=_DATA + ", NCHW" * nchw, reset=_reset,
        inputs=lambda: _inputs(sizes, dtype, settings, nchw), reference=lambda i: _reference(i, i.cluster), check=_check,
        headline=not nchw,
        variants=[
            *kernels(settings, dtype, ["momentum_update_"], kernel, sizes, layout="planes" if nchw else "rows"),
            Variant("index_add", timed(_index_add)),
            Variant("scatter_add", timed(_scatter_add)),
            *compiled(settings, "index_add", _index_add, timed),
            Variant("loop", timed(_loop)),
        ],
        bytes=float(sizes["N"] * (sizes["D"] * dtype_of(dtype).itemsize + 8)),
        goals=settings.goals(dtype, {"index_add": 5}),
    )  # fmt: skip


def _sums(name: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    nchw, clusters = name != "ade20k", sizes["C"] * sizes["K"]

    def timed(f: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.x, i.cluster, clusters)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(partial(ops.cluster_sums, backend=backend))

    def expected(i: Any) -> tuple[Tensor, Tensor]:
        return ops.cluster_sums(i.x.double(), i.cluster, clusters, backend="reference")

    def check(result: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> float:
        """An element is a float32 sum of as many terms as its cluster has pixels, each at most 1."""
        if not torch.equal(result[1], want[1]):
            return math.inf
        allowed = 4 * torch.finfo(torch.float32).eps * want[1][:, None].clamp_min(1)
        return error_ratio(result[0], want[0], allowed)

    return Case(
        op="cluster_sums", name=name, shape=sizes, dtype=dtype, data=_DATA + ", NCHW" * nchw,
        inputs=lambda: _inputs(sizes, dtype, settings, nchw), reference=expected, check=check,
        variants=[
            *kernels(settings, dtype, ["cluster_sums"], kernel, sizes, layout="planes" if nchw else "rows"),
            Variant("index_add", timed(_sums_by_index_add)),
            Variant("scatter_add", timed(_sums_by_scatter_add)),
            *compiled(settings, "index_add", _sums_by_index_add, timed),
        ],
        bytes=float(sizes["N"] * (sizes["D"] * dtype_of(dtype).itemsize + 8)),
    )  # fmt: skip


def _apply(sizes: dict[str, int], settings: Settings) -> Case:
    """Sub-centroids and sums are float32 whatever the pixels are."""

    def inputs() -> Any:
        i = _inputs({**sizes, "N": min(sizes["N"], 4096)}, "float32", settings)
        i.sums, i.counts = _sums_by_index_add(i.x, i.cluster, sizes["C"] * sizes["K"])
        return i

    def timed(f: Callable[[Tensor, Tensor, Tensor], None]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.centroids, i.sums, i.counts)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(partial(ops.apply_momentum_, backend=backend))

    def expected(i: Any) -> Any:
        want = i.start.double()
        ops.apply_momentum_(want, i.sums.double(), i.counts, backend="reference")
        return want, i

    c, k, d = (sizes[name] for name in "CKD")
    return Case(
        op="apply_momentum_", name="ade20k", shape={"C": c, "K": k, "D": d}, dtype="float32", reset=_reset, inputs=inputs,
        data="sums of the pixels of 4096, most clusters without any", reference=expected, check=_check,
        variants=[
            *kernels(settings, "float32", ["apply_momentum_"], kernel, {"N": c * k, "C": c, "K": k, "D": d}),
            Variant("torch", timed(_ema_)),
            *compiled(settings, "torch", _ema_, timed),
        ],
        bytes=4.0 * c * k * (3 * d + 2),
    )  # fmt: skip


def _training(sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    """From own-class similarities to moved sub-centroids. Pixels whose assignment is a near-tie do not count."""
    k = sizes["K"]

    def inputs() -> Any:
        i = _inputs(sizes, dtype, settings)
        best = sinkhorn.reference(i).topk(2, dim=1).values
        i.correct &= best[:, 0] - best[:, 1] > sinkhorn.MARGIN
        # what the released code holds: similarities to every sub-centroid, [N,K,C]; its loop reads those to the own class alone
        i.everything = i.similarity[:, :, None].expand(-1, -1, sizes["C"]).contiguous()
        return i

    def step(assign: Callable[..., Tensor], update_: Callable[..., None]) -> Callable[..., None]:
        def run(p: Tensor, x: Tensor, similarity: Tensor, labels: Tensor, correct: Tensor) -> None:
            update_(p, x, torch.where(correct, labels * k + assign(similarity, labels, sizes["C"]), -1))

        return run

    def timed(f: Callable[..., None]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.centroids, i.x, i.similarity, i.group, i.correct)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(step(partial(ops.sinkhorn_assign, backend=backend), partial(ops.momentum_update_, backend=backend)))

    def expected(i: Any) -> Any:
        return _reference(i, torch.where(i.correct, i.group * k + sinkhorn.reference(i).argmax(1), -1))

    vectorized = step(sinkhorn.vectorized, _index_add)
    return Case(
        op="clustering_and_momentum", name="ade20k", shape=sizes, dtype=dtype, data=_DATA, reset=_reset, inputs=inputs,
        reference=expected, check=_check,
        variants=[
            *kernels(settings, dtype, ["sinkhorn_assign", "momentum_update_"], kernel, sizes),
            Variant("loop_released", lambda i: lambda: _training_loop(i, lambda c, mask: i.everything[..., c][mask])),
            Variant("loop_own", lambda i: lambda: _training_loop(i, lambda c, mask: i.similarity[mask])),
            Variant("vectorized", timed(vectorized)),
            *compiled(settings, "vectorized", vectorized, timed),
        ],
        goals=settings.goals(dtype, {"loop_released": 10, "loop_own": 10}),
    )  # fmt: skip
