"""`normalize_embedding`, forward and backward together, against F.layer_norm + F.normalize."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dnc_kernels import ops
from dnc_kernels.backends import Backend

from .case import Case, Settings, Variant, compiled, dtype_of, error_ratio, kernels
from .clock import Call

# Element-wise chains of sums of D terms; gradients of the parameters are sums over all pixels.
_ALLOWED, _PARAMETERS = 64, 1024


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    sizes = {"B": 2, "D": 24, "H": 5, "W": 7} if settings.quick else {"B": 4, "D": 256, "H": 64, "W": 64}
    if settings.cuda and not settings.quick:
        sizes |= {"B": 8, "H": 128, "W": 128}
    return [_case(layout, sizes, dtype, settings) for dtype in settings.dtypes for layout in ("nchw", "channels_last")]


def _inputs(layout: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Any:
    seed = settings.generator()
    memory_format = torch.channels_last if layout == "channels_last" else torch.contiguous_format

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=seed, device=settings.device).to(dtype_of(dtype))

    x, grad = (normal(*sizes.values()).contiguous(memory_format=memory_format) for _ in range(2))
    weight, bias = (1 + 0.1 * normal(sizes["D"])).float(), (0.1 * normal(sizes["D"])).float()
    return SimpleNamespace(x=x.requires_grad_(), weight=weight.requires_grad_(), bias=bias.requires_grad_(), grad=grad)


def _eager(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    pixels = x.permute(0, 2, 3, 1)
    z = F.layer_norm(pixels, weight.shape, weight.to(x.dtype), bias.to(x.dtype))
    return F.normalize(z, dim=-1).permute(0, 3, 1, 2)


def _run(f: Callable[[Tensor, Tensor, Tensor], Tensor], i: Any) -> tuple[Tensor, ...]:
    y = f(i.x, i.weight, i.bias)
    return y.detach(), *torch.autograd.grad(y, (i.x, i.weight, i.bias), i.grad)


def _reference(i: Any) -> tuple[Tensor, ...]:
    leaves = [t.detach().double().requires_grad_() for t in (i.x, i.weight, i.bias)]
    wide = SimpleNamespace(x=leaves[0], weight=leaves[1], bias=leaves[2], grad=i.grad.double())
    return _run(lambda *t: ops.normalize_embedding(*t, backend="reference"), wide)


def _check(result: tuple[Tensor, ...], want: tuple[Tensor, ...], eps: float) -> float:
    """Elements relative to the largest of their tensor."""
    factors = (_ALLOWED, _ALLOWED, _PARAMETERS, _PARAMETERS)
    return max(error_ratio(r, w, f * eps * w.abs().max()) for r, w, f in zip(result, want, factors, strict=True))


def _case(layout: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    def timed(f: Callable[[Tensor, Tensor, Tensor], Tensor]) -> Callable[[Any], Call]:
        return lambda i: lambda: _run(f, i)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda x, w, b: ops.normalize_embedding(x, w, b, backend=backend))

    b, d, h, w = sizes.values()
    size = b * d * h * w * dtype_of(dtype).itemsize
    return Case(
        op="normalize_embedding", name=layout, shape=sizes, dtype=dtype, data="normal features",
        inputs=lambda: _inputs(layout, sizes, dtype, settings), reference=_reference,
        check=lambda result, want: _check(result, want, torch.finfo(dtype_of(dtype)).eps),
        variants=[
            *kernels(settings, dtype, ["normalize_embedding"], kernel, sizes, layout="planes" if layout == "nchw" else "rows"),
            Variant("layer_norm_normalize", timed(_eager)),
            *compiled(settings, "layer_norm_normalize", _eager, timed),
        ],
        bytes=5.0 * size,  # x twice, y, and the gradients of both
        allowed_extra_bytes=1.1 * (2 * size + 12 * b * h * w) + 2**22,
        goals=settings.goals(dtype, {"best": 2}),
    )  # fmt: skip
