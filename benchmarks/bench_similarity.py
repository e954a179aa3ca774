"""`centroid_cross_entropy` forward + backward and `nearest_centroid`, against torch eager and compiled, and faiss.

Forward + backward is one unit: loss, and gradients of x and of the LayerNorm over classes. Baselines hold [N,C,K]; mm and
einsum differ in speed, amax and max in the backward pass, so all are run. Useful operations: 2*N*C*K*D for the similarities and
2*N*C*D for dX, since only the winner of a class carries gradient; a dense dX would count 2*N*C*K*D instead.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops

from .harness import Call, Case, Settings, Variant, choice_ratio, compiled, dtype_of, error_ratio, kernels

_ADE20K = {"N": 16384, "C": 150, "K": 10, "D": 256}
# name: sizes, least ratio to the best baseline on CPU, options of _loss_case
_LOSS: dict[str, tuple[dict[str, int], float, dict[str, Any]]] = {
    "ade20k": (_ADE20K, 3.5, {}),
    "ade20k_nchw": (_ADE20K, 3.5, {"nchw": True}),
    "ade20k_grad_scale": (_ADE20K, 3.5, {"grad_scale": 1024.0}),
    "cityscapes": ({"N": 32768, "C": 19, "K": 10, "D": 256}, 3.0, {}),
    "imagenet": ({"N": 1024, "C": 1000, "K": 4, "D": 2048}, 1.5, {}),
}
# On a GPU a batch of whole crops, whose arrays L2 does not hold, and one case that no CPU should do.
_GPU_PIXELS = {"ade20k": 131072, "ade20k_nchw": 131072, "ade20k_grad_scale": 131072, "cityscapes": 262144, "imagenet": 4096}
_COCO = {"N": 131072, "C": 171, "K": 10, "D": 512}
_QUICK = {"N": 64, "C": 5, "K": 3, "D": 16}
# Allowed error in units of the dtype's epsilon, relative to the largest gradient. The LayerNorm over C multiplies the rounding
# of a score by 1/std of the scores (about 16 at D = 256), gradients of the norm are float32 sums over N rows, and torch rounds
# the scores themselves to bfloat16. torch itself reached 70 units (ade20k_nchw, float32).
_GRADIENT = 200.0


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    found = []
    sizes = {name: _QUICK if settings.quick else known for name, (known, _, _) in _LOSS.items()}
    if settings.cuda and not settings.quick:
        sizes = {name: {**known, "N": _GPU_PIXELS[name]} for name, known in sizes.items()} | {"coco": _COCO}
    for dtype in settings.dtypes:
        for name, size in sizes.items():
            _, goal, options = _LOSS.get(name, (size, 1.0, {}))
            found.append(_loss_case(name, size, dtype, goal, settings, **options))
        found.append(_nearest_case("ade20k", sizes["ade20k"], dtype, settings))
        for name in ("ade20k", "cityscapes"):
            found.append(_contrast_case(name, sizes[name], dtype, settings))
    return found


def _inputs(sizes: dict[str, int], dtype: str, device: str, nchw: bool = False) -> Any:
    """Unit pixels around the sub-centroids of their labels; every class and every sub-centroid alike."""
    n, c, k, d = sizes.values()
    seed = torch.Generator().manual_seed(0)
    centroids = F.normalize(torch.randn(c, k, d, generator=seed), dim=2)
    labels = torch.randint(c, (n,), generator=seed)
    own = centroids[labels, torch.randint(k, (n,), generator=seed)]
    # own similarity four standard deviations above the others: losses and gradients of every size, few of them vanishing
    x = F.normalize((4 * own + torch.randn(n, d, generator=seed)) / math.sqrt(d), dim=1)
    if nchw:
        x, labels = x.view(4, n // 64, 16, d).permute(0, 3, 1, 2).contiguous(), labels.view(4, n // 64, 16)
    return SimpleNamespace(
        x=x.to(device, dtype_of(dtype)).requires_grad_(),
        centroids=centroids.to(device, dtype_of(dtype)), labels=labels.to(device),
        weight=torch.linspace(0.5, 1.5, c, device=device).requires_grad_(),
        bias=torch.linspace(-0.1, 0.1, c, device=device).requires_grad_(),
        # two scores closer than this may change places: sums of D products in float32, or scores rounded to 16 bits
        margin=torch.finfo(dtype_of(dtype)).eps * (math.sqrt(d) if dtype == "float32" else 1),
    )  # fmt: skip


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _loss_case(
    name: str, sizes: dict[str, int], dtype: str, goal: float, settings: Settings, nchw: bool = False, grad_scale: float = 1.0
) -> Case:
    def timed(loss_of: Callable[..., Tensor]) -> Callable[[Any], Call]:
        def call(i: Any) -> Any:
            loss = loss_of(i.x, i.centroids, i.labels, i.weight, i.bias)
            return loss, *torch.autograd.grad(loss if grad_scale == 1 else loss * grad_scale, (i.x, i.weight, i.bias))

        return lambda i: lambda: call(i)

    def kernel(backend: str) -> Callable[[Any], Call]:
        return timed(
            lambda x, p, labels, w, b: (
                ops.centroid_cross_entropy(x, p, labels, norm_weight=w, norm_bias=b, backend=backend).loss
            )
        )

    eager = {"mm_amax": _mm_amax, "mm_max": _mm_max, "einsum_amax": _einsum_amax}
    n, c, k, d = sizes.values()
    return Case(
        op="centroid_cross_entropy", name=name, shape=sizes, dtype=dtype,
        data="unit pixels near own sub-centroid, uniform labels, none ignored" + (", NCHW" if nchw else ""),
        variants=[
            *kernels(settings, dtype, ["centroid_cross_entropy"], kernel, sizes, layout="planes" if nchw else "rows"),
            *(Variant(v, timed(f)) for v, f in eager.items()),
            *(v for name, f in eager.items() for v in compiled(settings, name, f, timed)),
        ],
        inputs=lambda: _inputs(sizes, dtype, settings.device, nchw),
        reference=lambda i: _reference(i, grad_scale),
        check=lambda result, want: _check(result, want, torch.finfo(dtype_of(dtype)).eps),
        flops=2.0 * n * c * k * d + 2.0 * n * c * d,
        # 1.1 x (dX + [N,K] + prediction and labels) + 64 MiB
        allowed_extra_bytes=1.1 * (n * d * dtype_of(dtype).itemsize + 4 * n * k + 16 * n) + 2**26,
        goals=settings.goals(dtype, {"best": goal}),
    )  # fmt: skip


def _cross_entropy(scores: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.cross_entropy(F.layer_norm(scores.float(), weight.shape, weight, bias), labels.flatten())


def _mm_amax(x: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
    return _cross_entropy((_flat(x) @ p.flatten(0, 1).T).view(-1, *p.shape[:2]).amax(2), *rest)


def _mm_max(x: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
    return _cross_entropy((_flat(x) @ p.flatten(0, 1).T).view(-1, *p.shape[:2]).max(dim=2).values, *rest)


def _einsum_amax(x: Tensor, p: Tensor, *rest: Tensor) -> Tensor:
    return _cross_entropy(torch.einsum("nd,ckd->nck", _flat(x), p).amax(2), *rest)


def _reference(i: Any, grad_scale: float) -> Any:
    """Loss and gradients in float64, in chunks, and by how much a permitted flip of a winner may change a row of dX."""
    x, p = _flat(i.x.detach()).double(), i.centroids.double()
    weight, bias = (t.detach().double().requires_grad_() for t in (i.weight, i.bias))
    loss, dx, slack = x.new_zeros(()), torch.empty_like(x), x.new_empty(len(x))
    for rows in torch.arange(len(x), device=x.device).split(1024):
        best, index = (x[rows] @ p.flatten(0, 1).T).view(-1, *p.shape[:2]).topk(min(2, p.shape[1]), dim=2)
        scores = best[..., 0].clone().requires_grad_()
        norm = F.layer_norm(scores, weight.shape, weight, bias)
        part = F.cross_entropy(norm, i.labels.flatten()[rows], reduction="sum") / len(x)
        ds, dw, db = torch.autograd.grad(grad_scale * part, (scores, weight, bias))
        dx[rows] = p.new_zeros(len(rows), *p.shape[:2]).scatter_(2, index[..., :1], ds[..., None]).flatten(1) @ p.flatten(0, 1)
        close = (best[..., 0] - best[..., -1] <= i.margin) & (p.shape[1] > 1)
        slack[rows] = 2 * (ds.abs() * close).sum(1)  # two unit sub-centroids are at most 2 apart
        loss += part.detach()
        weight.grad, bias.grad = (g if t.grad is None else t.grad + g for t, g in ((weight, dw), (bias, db)))
    return SimpleNamespace(loss=loss, dx=dx, dw=weight.grad, db=bias.grad, slack=slack)


def _check(result: Any, want: Any, eps: float) -> float:
    """Loss and the gradients of the norm relative to their largest element; dX by rows, flips allowed inside the margin."""
    loss, dx, dw, db = result
    rows = (_flat(dx).double() - want.dx).norm(dim=1)
    return max(
        error_ratio(loss, want.loss, 8 * eps * (1 + want.loss.item())),
        error_ratio(rows, torch.zeros_like(rows), _GRADIENT * eps * want.dx.norm(dim=1).max() + want.slack),
        error_ratio(dw, want.dw, _GRADIENT * eps * want.dw.abs().max()),
        error_ratio(db, want.db, _GRADIENT * eps * want.db.abs().max()),
    )


def _nearest_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    def timed(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.x.detach(), i.centroids)

    def kernel(backend: str) -> Callable[[Any], Call]:
        def nearest(x: Tensor, p: Tensor) -> Tensor:
            found = ops.nearest_centroid(x, p, backend=backend)
            return found.label * p.shape[1] + found.sub

        return timed(nearest)

    def mm_argmax(x: Tensor, p: Tensor) -> Tensor:
        return (x @ p.flatten(0, 1).T).argmax(1)

    def faiss_call(i: Any) -> Call:
        import faiss

        faiss.omp_set_num_threads(settings.threads)
        index, x = faiss.IndexFlatIP(i.x.shape[1]), i.x.detach().numpy()
        index.add(i.centroids.flatten(0, 1).numpy())  # filled once, outside the timing
        return lambda: torch.from_numpy(index.search(x, 1)[1][:, 0])

    on_cpu = not settings.cuda and dtype == "float32"
    n, c, k, d = sizes.values()
    return Case(
        op="nearest_centroid", name=name, shape=sizes, dtype=dtype, data="unit pixels near own sub-centroid",
        variants=[
            *kernels(settings, dtype, ["nearest_centroid"], kernel, sizes),
            Variant("mm_argmax", timed(mm_argmax)),
            *compiled(settings, "mm_argmax", mm_argmax, timed),
            *([Variant("faiss_flat_ip", faiss_call, backend="faiss")] if on_cpu and importlib.util.find_spec("faiss") else []),
        ],
        inputs=lambda: _inputs(sizes, dtype, settings.device),
        reference=lambda i: (i.x.detach().double() @ i.centroids.flatten(0, 1).double().T, i.margin),
        check=lambda result, expected: choice_ratio(result, *expected),
        flops=2.0 * n * c * k * d, goals=settings.goals(dtype, {"faiss_flat_ip": 1.1}),
    )  # fmt: skip


def _contrast_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    """Loss and the gradient of x, together."""
    k = sizes["K"]

    def timed(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        def call(i: Any) -> Any:
            loss = loss_of(i.x, i.centroids, i.labels * k)
            return loss, *torch.autograd.grad(loss, i.x)

        return lambda i: lambda: call(i)

    def kernel(backend: str) -> Callable[[Any], Call]:
        return timed(lambda x, p, target: ops.subcentroid_cross_entropy(x, p, target, backend=backend))

    def mm(x: Tensor, p: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((x @ p.flatten(0, 1).T).float(), target)

    def reference(i: Any) -> Any:
        x, p, target = i.x.detach().double(), i.centroids.flatten(0, 1).double(), i.labels * k
        loss, dx = x.new_zeros(()), torch.empty_like(x)
        for rows in torch.arange(len(x), device=x.device).split(1024):
            log_p = (x[rows] @ p.T).log_softmax(1)
            loss -= log_p.gather(1, target[rows, None]).sum() / len(x)
            dx[rows] = (log_p.exp() @ p - p[target[rows]]) / len(x)
        return loss, dx, torch.finfo(dtype_of(dtype)).eps

    def check(result: Any, want: Any) -> float:
        loss, dx, eps = want
        return max(
            error_ratio(result[0], loss, 8 * eps * (1 + loss.item())),
            error_ratio(result[1], dx, _GRADIENT * eps * dx.abs().max()),
        )

    variants = [Variant("mm", timed(mm)), *compiled(settings, "mm", mm, timed)]
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13: chunked
        variants.append(
            Variant("linear_cross_entropy", timed(lambda x, p, target: F.linear_cross_entropy(x, p.flatten(0, 1), target)))
        )
    n, c, _, d = sizes.values()
    return Case(
        op="subcentroid_cross_entropy", name=name, shape=sizes, dtype=dtype, data="unit pixels near own sub-centroid",
        variants=[*kernels(settings, dtype, ["subcentroid_cross_entropy"], kernel, sizes), *variants],
        inputs=lambda: _inputs(sizes, dtype, settings.device), reference=reference, check=check,
        flops=4.0 * n * c * k * d, goals=settings.goals(dtype, {"best": 1.5}),
    )  # fmt: skip
