"""A training step of a segmentation head, forward and backward, against the linear head that a user has today.

That head is a 1x1 convolution, bilinear interpolation to the labels and cross-entropy in torch, eager and compiled. Ours are
the same head with `upsample_cross_entropy`, and `DNCHead`, which is another classifier and is therefore compared with itself in
float64. Features have a quarter of the labels' size. A step gives the gradients of the features and of the head's parameters.
With 16-bit features it runs under autocast, and the parameters are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops, use_backend
from dnc_kernels.nn import DNCHead

from .bench_head import STRIDE, check_step
from .case import Case, Settings, Variant, compiled, dtype_of, error_ratio, norm_ratio
from .clock import Call

_IGNORED = 255
# classes, sub-centroids of each, channels, height and width of the labels; hard_*: where a linear head is hard to beat
_SHAPES = {
    "c2_d64": (2, 10, 64, 512),
    "c2_d64_k1": (2, 1, 64, 512),
    "c2_d256": (2, 10, 256, 512),
    "c2_d256_k1": (2, 1, 256, 512),
    "c19_d64": (19, 10, 64, 512),
    "c19_d256": (19, 10, 256, 512),
    "c150_d64": (150, 10, 64, 512),
    "c150_d256": (150, 10, 256, 512),
    "hard_tiny": (19, 10, 256, 64),
}
#: The head's variants, and the options that make them.
_HEADS: dict[str, dict[str, Any]] = {"head": {}, "head without contrast": {"ppc_weight": 0.0, "ppd_weight": 0.0}}


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    sizes = dict.fromkeys(_SHAPES, (5, 3, 16, 64)) if settings.quick else _SHAPES
    return [_case(name, *size, dtype, settings) for dtype in settings.dtypes for name, size in sizes.items()]


def _case(name: str, classes: int, k: int, channels: int, height: int, dtype: str, settings: Settings) -> Case:
    batch = 8 if settings.cuda else 1

    def head(**options: Any) -> DNCHead:
        return DNCHead(channels, classes, k, generator=torch.Generator().manual_seed(0), **options).to(settings.device)

    def inputs() -> Any:
        seed, device = settings.generator(), settings.device
        start = head().prototypes
        blocks = torch.randint(classes, (batch, height // 16, height // 16), generator=seed, device=device)
        small, labels = (blocks.repeat_interleave(n, 1).repeat_interleave(n, 2) for n in (16 // STRIDE, 16))
        ignored = torch.rand(blocks.shape, generator=seed, device=device) < 0.1
        labels = labels.masked_fill(ignored.repeat_interleave(16, 1).repeat_interleave(16, 2), _IGNORED)
        # most pixels are nearest to a sub-centroid of their class, so that clustering and momentum have their work
        own = start[small, torch.randint(k, small.shape, generator=seed, device=device)]
        x = channels**0.5 * own + torch.randn(own.shape, generator=seed, device=device)
        weight = torch.randn(classes, channels, 1, 1, generator=seed, device=device) / channels**0.5
        return SimpleNamespace(
            x=x.permute(0, 3, 1, 2).contiguous().to(dtype_of(dtype)), labels=labels, start=start,
            weight=weight.requires_grad_(), bias=torch.zeros(classes, device=device, requires_grad=True),
        )  # fmt: skip

    def linear(loss_of: Callable[..., Tensor]) -> Callable[[Any], Call]:
        def step(i: Any) -> Any:
            x = i.x.detach().requires_grad_()
            loss = loss_of(x, i.labels, i.weight, i.bias)
            return "linear", (loss.detach(), *torch.autograd.grad(loss, (x, i.weight, i.bias)))

        return lambda i: lambda: step(i)

    def centroids(name: str) -> Callable[[Any], Call]:
        def prepare(i: Any) -> Call:
            model = head(**_HEADS[name])

            def step() -> Any:
                model.prototypes.copy_(i.start)
                model.num_updates.zero_()  # momentum depends on it
                x = i.x.detach().requires_grad_()
                with _autocast(x):
                    loss = model.loss(x, i.labels).loss
                to_x, *to_parameters = torch.autograd.grad(loss, (x, *model.parameters()))
                return name, (loss.detach(), to_x, model.prototypes, *to_parameters)

            return step

        return prepare

    def reference(i: Any) -> Any:
        x = i.x.double().requires_grad_()
        parameters = [t.detach().double().requires_grad_() for t in (i.weight, i.bias)]
        loss = _interpolate_ce(x, i.labels, *parameters)
        found = {"linear": (loss.detach(), *torch.autograd.grad(loss, (x, *parameters)))}
        for name, options in _HEADS.items():
            model = head(checkpoint="none", **options).double()
            model.prototypes.copy_(i.start)
            with use_backend("reference"):
                loss = model.loss(x, i.labels).loss
                to_x, *to_parameters = torch.autograd.grad(loss, (x, *model.parameters()))
            found[name] = (loss.detach(), to_x, model.prototypes, *to_parameters)
        return found

    return Case(
        op="segmentation_step", name=name, dtype=dtype,
        data="blocks of 16 x 16 label pixels, uniform classes, 10% ignored",
        shape={"B": batch, "C": classes, "K": k, "D": channels, "h": height // STRIDE, "H": height},
        inputs=inputs, reference=reference, check=lambda result, expected: _check(result[0], result[1], expected[result[0]]),
        variants=[
            Variant("dnc_auto linear", linear(_upsample_ce), baseline=False, backend="auto"),
            *(Variant(f"dnc_auto {name}", centroids(name), baseline=False, backend="auto") for name in _HEADS),
            Variant("linear", linear(_interpolate_ce)),
            *compiled(settings, "linear", _interpolate_ce, linear),
        ],
    )  # fmt: skip


def _autocast(x: Tensor) -> AbstractContextManager[Any]:
    return torch.autocast(x.device.type, x.dtype) if x.dtype in (torch.bfloat16, torch.float16) else nullcontext()


def _interpolate_ce(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with _autocast(x):
        scores = F.interpolate(F.conv2d(x, weight, bias), size=labels.shape[1:], mode="bilinear")
        return F.cross_entropy(scores, labels, ignore_index=_IGNORED)


def _upsample_ce(x: Tensor, labels: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    with _autocast(x):
        return ops.upsample_cross_entropy(F.conv2d(x, weight, bias), labels, ignore_index=_IGNORED)


def _check(name: str, result: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> float:
    """Loss and gradients of a linear head to rounding; the step of a `DNCHead` as in bench_head.

    Where a pixel may be another one, and with 16-bit features, whose scores are rounded, a gradient is held by its norm alone.
    """
    half = result[1].dtype in (torch.bfloat16, torch.float16)
    if name != "linear":
        worst, held = check_step(result[:3], expected[:3]), slice(3, None)
    elif half:
        worst, held = error_ratio(result[0], expected[0], 1e-2 * expected[0]), slice(1, None)
    else:
        pairs = zip(result, expected, strict=True)
        return max(error_ratio(r, e, (1e-5 if e.ndim == 0 else 1e-4) * e.abs().max()) for r, e in pairs)
    pairs = zip(result[held], expected[held], strict=True)
    return max(worst, *(norm_ratio(r, e, 0.05 if half else 1e-3) for r, e in pairs))
