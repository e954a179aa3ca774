"""`upsample_cross_entropy`, forward and backward together, and `upsample_argmax`, against F.interpolate and what follows it.

Scores are float32 in training whatever the features are, so that is always measured.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops
from dnc_kernels.backends import Backend

from .case import Case, Settings, Variant, choice_ratio, compiled, dtype_of, error_ratio, kernels
from .clock import Call

# The gradient's largest element collects the pixels of a cell; F.interpolate computes positions in float32.
_GRADIENT = 256
_HEADLINE = "ade20k_large_x4"
_SHAPES = {"ade20k_x4": (150, 64, 256), "ade20k_large_x4": (150, 128, 512), "cityscapes_x4": (19, 128, 512)}
#: Losses for which torch has little work on a CPU: nothing to interpolate, two classes, hardly any pixels.
_HARD = {"hard_x1": (19, 128, 128), "hard_binary_x4": (2, 128, 512), "hard_tiny_x4": (19, 8, 32)}


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    found = []
    for dtype in settings.score_dtypes:
        for name, (c, h, size) in _SHAPES.items():
            batch = 8 if settings.cuda and name == _HEADLINE else 2
            sizes = {"B": 2, "C": 5, "h": 6, "H": 13} if settings.quick else {"B": batch, "C": c, "h": h, "H": size}
            goal = {"best": 8.0}
            found += [_loss_case(name, sizes, dtype, goal, settings), _argmax_case(name, sizes, dtype, settings)]
        for name, (c, h, size) in {} if settings.cuda else _HARD.items():
            sizes = {"B": 2, "C": 5, "h": 6, "H": 13} if settings.quick else {"B": 2, "C": c, "h": h, "H": size}
            found.append(_loss_case(name, sizes, dtype, {}, settings))
    return found


def _inputs(sizes: dict[str, int], dtype: str, settings: Settings) -> Any:
    b, c, h, size = sizes.values()
    seed, device = settings.generator(), settings.device
    scores = (3 * torch.randn(b, c, h, h, generator=seed, device=device)).to(dtype_of(dtype)).requires_grad_()
    labels = torch.randint(c, (b, size, size), generator=seed, device=device)
    labels[torch.rand(labels.shape, generator=seed, device=device) < 0.1] = 255
    return SimpleNamespace(scores=scores, labels=labels, size=size)


def _upsampled(scores: Tensor, size: int) -> Tensor:
    return F.interpolate(scores.float(), size=(size, size), mode="bilinear")


def _eager_loss(scores: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(_upsampled(scores, labels.shape[1]), labels, ignore_index=255)


def _loss_case(name: str, sizes: dict[str, int], dtype: str, goals: dict[str, float], settings: Settings) -> Case:
    def timed(f: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        def call(i: Any) -> tuple[Tensor, Tensor]:
            loss = f(i.scores, i.labels)
            return loss.detach(), torch.autograd.grad(loss, i.scores)[0]

        return lambda i: lambda: call(i)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda s, y: ops.upsample_cross_entropy(s, y, ignore_index=255, backend=backend))

    b, c, h, size = sizes.values()
    return Case(
        op="upsample_cross_entropy", name=name, shape=sizes, dtype=dtype, data="normal scores, uniform labels, 10% ignored",
        inputs=lambda: _inputs(sizes, dtype, settings), reference=_reference,
        check=lambda result, want: _check(result, want, torch.finfo(dtype_of(dtype)).eps),
        headline=name == _HEADLINE and dtype == "float32",
        variants=[
            *kernels(settings, dtype, ["upsample_cross_entropy"], kernel, sizes),
            Variant("interpolate_ce", timed(_eager_loss)),
            *compiled(settings, "interpolate_ce", _eager_loss, timed),
        ],
        bytes=float(2 * b * c * h * h * dtype_of(dtype).itemsize + 8 * b * size * size),
        # 5% of what eager holds: the upsampled scores, their log-softmax and its gradient
        allowed_extra_bytes=0.05 * 3 * 4 * b * c * size * size,
        goals=settings.goals(dtype, goals),
    )  # fmt: skip


def _reference(i: Any) -> Any:
    """Loss and gradient in float64, a sample at a time."""
    counts = int((i.labels != 255).sum())
    loss, grads = 0.0, []
    for scores, labels in zip(i.scores.detach().double().split(1), i.labels.split(1), strict=True):
        leaf = scores.requires_grad_()
        part = ops.upsample_cross_entropy(leaf, labels, ignore_index=255, reduction="sum", backend="reference") / counts
        grads += torch.autograd.grad(part, leaf)
        loss += part.item()
    return SimpleNamespace(loss=torch.tensor(loss, dtype=torch.float64, device=i.scores.device), grad=torch.cat(grads))


def _check(result: tuple[Tensor, Tensor], want: Any, eps: float) -> float:
    loss, grad = result
    return max(
        error_ratio(loss, want.loss, 8 * torch.finfo(torch.float32).eps * (1 + want.loss.item())),
        error_ratio(grad, want.grad, _GRADIENT * eps * want.grad.abs().max()),
    )


def _argmax_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    def timed(f: Callable[[Tensor, int], Tensor]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.scores.detach(), i.size)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda s, size: ops.upsample_argmax(s, size, backend=backend))

    def eager(scores: Tensor, size: int) -> Tensor:
        return _upsampled(scores, size).argmax(1)

    def reference(i: Any) -> Tensor:
        wide = i.scores.detach().double()
        return F.interpolate(wide, size=(i.size, i.size), mode="bilinear").movedim(1, -1).flatten(0, 2)

    b, c, h, size = sizes.values()
    margin = 1e-4  # of scores of up to 16, whose positions are float32 numbers up to 128
    return Case(
        op="upsample_argmax", name=name, shape=sizes, dtype=dtype, data="normal scores",
        inputs=lambda: _inputs(sizes, dtype, settings), reference=reference,
        check=lambda result, want: choice_ratio(result.flatten(), want, margin),
        variants=[
            *kernels(settings, dtype, ["upsample_argmax"], kernel, sizes),
            Variant("interpolate_argmax", timed(eager)),
            *compiled(settings, "interpolate_argmax", eager, timed),
        ],
        bytes=float(b * c * h * h * dtype_of(dtype).itemsize + 8 * b * size * size),
        # the labels, and 5% of the upsampled scores
        allowed_extra_bytes=8.0 * b * size * size + 0.05 * 4 * b * c * size * size,
        goals=settings.goals(dtype, {"best": 1}),
    )  # fmt: skip
