"""The fused ops of similarity, against torch eager and compiled, and faiss.

Forward + backward is one unit: loss, and gradients of x and of the LayerNorm over classes (hard_* cases have none, but a
temperature). Baselines hold [N,C,K]; mm and einsum differ in speed, amax and max in the backward pass, so all are run. Useful
operations: 2*N*C*K*D for the similarities and 2*N*C*D for dX, since only the winner of a class carries gradient; a dense dX
would count 2*N*C*K*D instead.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops
from dnc_kernels._tensors import flat_pixels
from dnc_kernels.backends import Backend

from .case import Case, Settings, Variant, choice_ratio, compiled, dtype_of, error_ratio, kernels
from .clock import Call

_ADE20K = {"N": 16384, "C": 150, "K": 10, "D": 256}
# name: sizes, least ratio to the best baseline on CPU, options of _loss_case
_LOSS: dict[str, tuple[dict[str, int], float, dict[str, Any]]] = {
    "ade20k": (_ADE20K, 3.5, {}),
    "ade20k_nchw": (_ADE20K, 3.5, {"nchw": True}),
    "ade20k_grad_scale": (_ADE20K, 3.5, {"grad_scale": 1024.0}),
    "cityscapes": ({"N": 32768, "C": 19, "K": 10, "D": 256}, 3.0, {}),
    "imagenet": ({"N": 1024, "C": 1000, "K": 4, "D": 2048}, 1.5, {}),
}
#: Shapes at which a plain matrix product is hard to beat on a CPU: few classes, one sub-centroid of each, hardly any pixels.
_HARD = {
    "hard_binary_d32": {"N": 65536, "C": 2, "K": 1, "D": 32},
    "hard_binary_d64": {"N": 65536, "C": 2, "K": 1, "D": 64},
    "hard_1000_classes": {"N": 4096, "C": 1000, "K": 1, "D": 256},
    "hard_tiny": {"N": 256, "C": 19, "K": 10, "D": 256},
}
# On a GPU a batch of whole crops, whose arrays L2 does not hold, and cases that no CPU should do: labels of 8 full images of
# Cityscapes; and with --large a batch of COCO-Stuff, 4 GB of bfloat16 pixels, at which baselines run out of memory.
_GPU_PIXELS = {"ade20k": 131072, "ade20k_nchw": 131072, "ade20k_grad_scale": 131072, "cityscapes": 262144, "imagenet": 4096}
_CITYSCAPES_FULL = {"N": 2**21, "C": 19, "K": 10, "D": 256}
_COCO = {"N": 2**22, "C": 171, "K": 10, "D": 512}
_QUICK = {"N": 64, "C": 5, "K": 3, "D": 16}
#: Elements of a float64 dX that are kept to compare with: a gigabyte.
HELD = 2**27
# Allowed error in units of the dtype's epsilon, relative to the largest gradient. The LayerNorm over C multiplies the rounding
# of a score by 1/std of the scores (about 16 at D = 256), gradients of the norm are float32 sums over N rows, and torch rounds
# the scores themselves to bfloat16. torch itself reached 70 units (ade20k_nchw, float32).
_GRADIENT = 200.0
_TEMPERATURE = 0.1  # without the norm


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    found = []
    sizes = {name: _QUICK if settings.quick else known for name, (known, _, _) in _LOSS.items()}
    if settings.cuda and not settings.quick:
        sizes = {name: {**known, "N": _GPU_PIXELS[name]} for name, known in sizes.items()}
        sizes |= {"cityscapes_full": _CITYSCAPES_FULL} | ({"coco": _COCO} if settings.large else {})
    for dtype in settings.dtypes:
        for name, size in sizes.items():
            _, goal, options = _LOSS.get(name, (size, 1.0, {}))
            found.append(_loss_case(name, size, dtype, {"best": goal}, settings, **options))
        for name, size in {} if settings.cuda else _HARD.items():
            known = _QUICK if settings.quick else size
            found.append(_loss_case(name, known, dtype, {}, settings, norm=False))
            found.append(_nearest_case(name, known, dtype, {}, settings))
        for name in ("ade20k", "ade20k_nchw"):
            found.append(_nearest_case(name, sizes[name], dtype, {"faiss_flat_ip": 1.1}, settings, nchw=name != "ade20k"))
            for train in (False, True):
                found.append(_scores_case(name, sizes[name], dtype, settings, nchw=name != "ade20k", train=train))
        for name in ("ade20k", "ade20k_nchw", "cityscapes"):
            found.append(_contrast_case(name, sizes[name], dtype, settings, nchw=name == "ade20k_nchw"))
    return sorted(found, key=lambda case: case.name == "coco")  # last


def _inputs(sizes: dict[str, int], dtype: str, settings: Settings, nchw: bool = False) -> Any:
    """Unit pixels around the sub-centroids of their labels; every class and every sub-centroid alike."""
    n, c, k, d = sizes.values()
    seed, device = settings.generator(), settings.device
    centroids = F.normalize(torch.randn(c, k, d, generator=seed, device=device), dim=2)
    labels = torch.randint(c, (n,), generator=seed, device=device)
    x = torch.empty(n, d, dtype=dtype_of(dtype), device=device)
    for rows, label in zip(x.split(2**17), labels.split(2**17), strict=True):  # float32 of all pixels might not fit
        own = centroids[label, torch.randint(k, label.shape, generator=seed, device=device)]
        # own similarity four standard deviations above the others: losses and gradients of every size, few of them vanishing
        rows.copy_(F.normalize((4 * own + torch.randn(rows.shape, generator=seed, device=device)) / math.sqrt(d), dim=1))
    if nchw:
        x, labels = x.view(4, n // 64, 16, d).permute(0, 3, 1, 2).contiguous(), labels.view(4, n // 64, 16)
    return SimpleNamespace(
        x=x.requires_grad_(), centroids=centroids.to(dtype_of(dtype)), labels=labels,
        weight=torch.linspace(0.5, 1.5, c, device=device).requires_grad_(),
        bias=torch.linspace(-0.1, 0.1, c, device=device).requires_grad_(),
        # two scores closer than this may change places: sums of D products in float32, or scores rounded to 16 bits
        margin=torch.finfo(dtype_of(dtype)).eps * (math.sqrt(d) if dtype == "float32" else 1),
    )  # fmt: skip


def _rows(n: int, m: int, device: torch.device) -> Iterator[Tensor]:
    """Numbers of n pixels in parts whose float64 similarities to m sub-centroids fit into a cache, or 256 MB of a GPU."""
    yield from torch.arange(n, device=device).split(1024 if device.type == "cpu" else max(1024, 2**25 // m))


def _flat(x: Tensor) -> Tensor:
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def _loss_case(
    name: str, sizes: dict[str, int], dtype: str, goals: dict[str, float], settings: Settings, nchw: bool = False,
    grad_scale: float = 1.0, norm: bool = True,
) -> Case:  # fmt: skip
    def inputs() -> Any:
        i = _inputs(sizes, dtype, settings, nchw)
        return i if norm else SimpleNamespace(**vars(i) | {"weight": None, "bias": None})

    def timed(loss_of: Callable[..., Tensor]) -> Callable[[Any], Call]:
        def call(i: Any) -> Any:
            loss = loss_of(i.x, i.centroids, i.labels, i.weight, i.bias)
            return loss, *torch.autograd.grad(
                loss if grad_scale == 1 else loss * grad_scale, (i.x, i.weight, i.bias) if norm else i.x
            )

        return lambda i: lambda: call(i)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(
            lambda x, p, labels, w, b: (
                ops.centroid_cross_entropy(
                    x, p, labels, norm_weight=w, norm_bias=b, temperature=1.0 if norm else _TEMPERATURE, backend=backend
                ).loss
            )
        )

    eager = {"mm_amax": _mm_amax, "mm_max": _mm_max, "einsum_amax": _einsum_amax}
    n, c, k, d = sizes.values()
    return Case(
        op="centroid_cross_entropy", name=name, shape=sizes, dtype=dtype,
        data="unit pixels near own sub-centroid, uniform labels, none ignored" + ", NCHW" * nchw + ", no norm" * (not norm),
        variants=[
            *kernels(settings, dtype, ["centroid_cross_entropy"], kernel, sizes, layout="planes" if nchw else "rows"),
            *(Variant(v, timed(f)) for v, f in eager.items()),
            *(v for name, f in eager.items() for v in compiled(settings, name, f, timed)),
        ],
        inputs=inputs, headline=name == "ade20k",
        reference=lambda i: _reference(i, grad_scale),
        check=lambda result, want: _check(result, want, torch.finfo(dtype_of(dtype)).eps),
        flops=2.0 * n * c * k * d + 2.0 * n * c * d,
        # 1.1 x (dX + [N,K] + prediction and labels) + 64 MiB
        allowed_extra_bytes=1.1 * (n * d * dtype_of(dtype).itemsize + 4 * n * k + 16 * n) + 2**26,
        goals=settings.goals(dtype, goals),
    )  # fmt: skip


def _cross_entropy(scores: Tensor, labels: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return F.cross_entropy(_logits(scores.float(), weight, bias), labels.flatten())


def _logits(scores: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
    return scores / _TEMPERATURE if weight is None else F.layer_norm(scores, weight.shape, weight, bias)


def _mm_amax(x: Tensor, p: Tensor, *rest: Any) -> Tensor:
    return _cross_entropy((_flat(x) @ p.flatten(0, 1).T).view(-1, *p.shape[:2]).amax(2), *rest)


def _mm_max(x: Tensor, p: Tensor, *rest: Any) -> Tensor:
    return _cross_entropy((_flat(x) @ p.flatten(0, 1).T).view(-1, *p.shape[:2]).max(dim=2).values, *rest)


def _einsum_amax(x: Tensor, p: Tensor, *rest: Any) -> Tensor:
    return _cross_entropy(torch.einsum("nd,ckd->nck", _flat(x), p).amax(2), *rest)


def _winners(similarity: Tensor, margin: float) -> tuple[Tensor, Tensor, Tensor]:
    """Score and number of the best of the last dimension, and whether the second is so near that it may win as well."""
    best, index = similarity.max(-1)
    second = similarity.scatter(-1, index[..., None], -math.inf).amax(-1)
    return best, index, best - second <= margin


def _reference(i: Any, grad_scale: float) -> Any:
    """Loss and gradients in float64, in chunks, and by how much a permitted flip of a winner may change a row of dX.

    Of more than HELD elements of dX every so many-th row is kept (an odd number, so that every row of a tile has its turn):
    at COCO-Stuff a gigabyte instead of 17. Its 15 T operations take an H100 about half a second (67 TF/s), all others less.
    """
    x, p = _flat(i.x.detach()), i.centroids.double()
    affine = [] if i.weight is None else [t.detach().double().requires_grad_() for t in (i.weight, i.bias)]
    every = math.ceil(x.numel() / HELD) | 1
    loss, to_norm, parts = p.new_zeros(()), [torch.zeros_like(t) for t in affine], []
    for rows in _rows(len(x), p.shape[0] * p.shape[1], x.device):
        best, index, close = _winners((x[rows].double() @ p.flatten(0, 1).T).view(-1, *p.shape[:2]), i.margin)
        scores = best.requires_grad_()
        logits = _logits(scores, *affine or (None, None))
        part = F.cross_entropy(logits, i.labels.flatten()[rows], reduction="sum") / len(x)
        ds, *grads = torch.autograd.grad(grad_scale * part, (scores, *affine))
        loss, to_norm = loss + part.detach(), [a + b for a, b in zip(to_norm, grads, strict=True)]
        held = rows % every == 0
        ds, index, close = ds[held], index[held], close[held]
        dx = ds.new_zeros(len(ds), *p.shape[:2]).scatter_(2, index[..., None], ds[..., None]).flatten(1) @ p.flatten(0, 1)
        parts.append((rows[held], dx, 2 * (ds.abs() * close).sum(1)))  # two unit sub-centroids are at most 2 apart
    of, dx, slack = map(torch.cat, zip(*parts, strict=True))
    return SimpleNamespace(loss=loss, rows=of, dx=dx, to_norm=to_norm, slack=slack)


def _check(result: Any, want: Any, eps: float) -> float:
    """Loss and the gradients of the norm relative to their largest element; dX by rows, flips allowed inside the margin."""
    loss, dx, *to_norm = result
    if not bool(dx.isfinite().all()):
        return math.inf
    rows = (_flat(dx)[want.rows].double() - want.dx).norm(dim=1)
    return max(
        error_ratio(loss, want.loss, 8 * eps * (1 + want.loss.item())),
        error_ratio(rows, torch.zeros_like(rows), _GRADIENT * eps * want.dx.norm(dim=1).max() + want.slack),
        *(error_ratio(g, e, _GRADIENT * eps * e.abs().max()) for g, e in zip(to_norm, want.to_norm, strict=True)),
    )


def _scores_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings, nchw: bool, train: bool) -> Case:
    """Scores, winners and own similarities; with `train` also the gradient of x from random ones of scores and similarities."""

    def inputs() -> Any:
        i = _inputs(sizes, dtype, settings, nchw)
        seed = settings.generator()
        i.to_scores, i.to_own = (
            torch.randn(sizes["N"], size, generator=seed, device=settings.device) for size in (sizes["C"], sizes["K"])
        )
        return i

    def timed(f: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor, Tensor]]) -> Callable[[Any], Call]:
        def call(i: Any) -> tuple[Tensor, ...]:
            scores, winner, own = f(i.x if train else i.x.detach(), i.centroids, i.labels)
            if not train:
                return scores, winner, own
            grads = [g.to(t.dtype) for g, t in ((i.to_scores, scores), (i.to_own, own))]
            if scores.ndim == 4:
                grads[0] = grads[0].view(*i.labels.shape, -1).permute(0, 3, 1, 2)
            return scores.detach(), winner, own.detach(), *torch.autograd.grad((scores, own), i.x, grads)

        return lambda i: lambda: call(i)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        def scores(x: Tensor, p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            found = ops.class_scores(x, p, labels, backend=backend)
            assert found.own_similarity is not None
            return found.scores, found.winner, flat_pixels(found.own_similarity)

        return timed(scores)

    def mm_max(x: Tensor, p: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        every = (_flat(x) @ p.flatten(0, 1).T).view(-1, *p.shape[:2])
        best = every.max(2)
        own = every.gather(1, labels.reshape(-1, 1, 1).expand(-1, 1, p.shape[1]))[:, 0]
        return best.values, best.indices, own

    def reference(i: Any) -> Any:
        x, p, parts = _flat(i.x.detach()), i.centroids.double(), []
        for rows in _rows(len(x), p.shape[0] * p.shape[1], x.device):
            every = (x[rows].double() @ p.flatten(0, 1).T).view(-1, *p.shape[:2])
            best, index, close = _winners(every, i.margin)
            to_scores, to_own = i.to_scores[rows].double(), i.to_own[rows].double()
            grad = every.new_zeros(every.shape).scatter_(2, index[..., None], to_scores[..., None])
            one = torch.arange(len(rows), device=x.device)
            label = i.labels.flatten()[rows]
            grad[one, label] += to_own
            slack = 2 * (to_scores.abs() * close).sum(1)
            parts.append((best, index, close, every[one, label], grad.flatten(1) @ p.flatten(0, 1), slack))
        names = ("scores", "winner", "close", "own", "dx", "slack")
        tensors = map(torch.cat, zip(*parts, strict=True))
        return SimpleNamespace(**dict(zip(names, tensors, strict=True)), margin=i.margin, k=p.shape[1])

    def check(result: tuple[Tensor, ...], want: Any) -> float:
        scores, winner, own, *grads = result
        scores, winner = _flat(scores), _flat(winner)
        if not bool(((winner == want.winner) | (want.close & (winner < want.k))).all()):
            return math.inf
        worst = [error_ratio(scores, want.scores, want.margin), error_ratio(own, want.own, want.margin)]
        for dx in grads:
            off = (_flat(dx).double() - want.dx).norm(dim=1)
            allowed = _GRADIENT * torch.finfo(dtype_of(dtype)).eps * want.dx.norm(dim=1).max() + want.slack
            worst.append(error_ratio(off, torch.zeros_like(off), allowed))
        return max(worst)

    n, c, k, d = sizes.values()
    return Case(
        op="class_scores", name=name + "_train" * train, shape=sizes, dtype=dtype,
        data="unit pixels near own sub-centroid, uniform labels" + (", NCHW" if nchw else ""),
        variants=[
            *kernels(settings, dtype, ["class_scores"], kernel, sizes, layout="planes" if nchw else "rows"),
            Variant("mm_max", timed(mm_max)),
            *compiled(settings, "mm_max", mm_max, timed),
        ],
        inputs=inputs, reference=reference, check=check, flops=2.0 * n * c * k * d + train * 2.0 * n * (c + k) * d,
    )  # fmt: skip


def _nearest_case(
    name: str, sizes: dict[str, int], dtype: str, goals: dict[str, float], settings: Settings, nchw: bool = False
) -> Case:
    def timed(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.x.detach(), i.centroids)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        def nearest(x: Tensor, p: Tensor) -> Tensor:
            found = ops.nearest_centroid(x, p, backend=backend)
            return found.label * p.shape[1] + found.sub

        return timed(nearest)

    def mm_argmax(x: Tensor, p: Tensor) -> Tensor:
        return (_flat(x) @ p.flatten(0, 1).T).argmax(1)

    def faiss_call(i: Any) -> Call:
        import faiss

        faiss.omp_set_num_threads(settings.threads)
        index, x = faiss.IndexFlatIP(i.x.shape[1]), i.x.detach().numpy()
        index.add(i.centroids.flatten(0, 1).numpy())  # filled once, outside the timing
        return lambda: torch.from_numpy(index.search(x, 1)[1][:, 0])

    on_cpu = not settings.cuda and dtype == "float32" and not nchw
    n, c, k, d = sizes.values()
    return Case(
        op="nearest_centroid", name=name, shape=sizes, dtype=dtype, headline=name == "ade20k",
        data="unit pixels near own sub-centroid" + (", NCHW" if nchw else ""),
        variants=[
            *kernels(settings, dtype, ["nearest_centroid"], kernel, sizes, layout="planes" if nchw else "rows"),
            Variant("mm_argmax", timed(mm_argmax)),
            *compiled(settings, "mm_argmax", mm_argmax, timed),
            *([Variant("faiss_flat_ip", faiss_call, backend="faiss")] if on_cpu and importlib.util.find_spec("faiss") else []),
        ],
        inputs=lambda: _inputs(sizes, dtype, settings, nchw),
        reference=lambda i: (_flat(i.x.detach()).double() @ i.centroids.flatten(0, 1).double().T, i.margin),
        check=lambda result, expected: choice_ratio(result.flatten(), *expected),
        flops=2.0 * n * c * k * d, goals=settings.goals(dtype, goals),
    )  # fmt: skip


def _contrast_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings, nchw: bool) -> Case:
    """Loss and the gradient of x, together."""
    k = sizes["K"]

    def timed(loss_of: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        def call(i: Any) -> Any:
            loss = loss_of(i.x, i.centroids, i.labels * k)
            return loss, *torch.autograd.grad(loss, i.x)

        return lambda i: lambda: call(i)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda x, p, target: ops.subcentroid_cross_entropy(x, p, target, backend=backend))

    def mm(x: Tensor, p: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy((_flat(x) @ p.flatten(0, 1).T).float(), target.flatten())

    def linear(x: Tensor, p: Tensor, target: Tensor) -> Tensor:
        return F.linear_cross_entropy(_flat(x), p.flatten(0, 1), target.flatten())

    def reference(i: Any) -> Any:
        x, p, target = _flat(i.x.detach()).double(), i.centroids.flatten(0, 1).double(), i.labels.flatten() * k
        loss, dx = x.new_zeros(()), torch.empty_like(x)
        for rows in _rows(len(x), len(p), x.device):
            log_p = (x[rows] @ p.T).log_softmax(1)
            loss -= log_p.gather(1, target[rows, None]).sum() / len(x)
            dx[rows] = (log_p.exp() @ p - p[target[rows]]) / len(x)
        return loss, dx, torch.finfo(dtype_of(dtype)).eps

    def check(result: Any, want: Any) -> float:
        loss, dx, eps = want
        return max(
            error_ratio(result[0], loss, 8 * eps * (1 + loss.item())),
            error_ratio(_flat(result[1]), dx, _GRADIENT * eps * dx.abs().max()),
        )

    variants = [Variant("mm", timed(mm)), *compiled(settings, "mm", mm, timed)]
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13: chunked
        variants.append(Variant("linear_cross_entropy", timed(linear)))
    n, c, _, d = sizes.values()
    return Case(
        op="subcentroid_cross_entropy", name=name, shape=sizes, dtype=dtype,
        data="unit pixels near own sub-centroid" + (", NCHW" if nchw else ""),
        variants=[
            *kernels(settings, dtype, ["subcentroid_cross_entropy"], kernel, sizes, layout="planes" if nchw else "rows"),
            *variants,
        ],
        inputs=lambda: _inputs(sizes, dtype, settings, nchw), reference=reference, check=check,
        flops=4.0 * n * c * k * d, goals=settings.goals(dtype, {"best": 1.5}),
    )  # fmt: skip
