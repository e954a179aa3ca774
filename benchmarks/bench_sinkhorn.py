"""`sinkhorn_assign` and `sinkhorn_plan`, all classes at once, against code vectorised over the classes; the assignment also
against the per-class loop of the released code.

The similarities are float32 in training whatever the features are, so that is always measured. The loop is linear-domain
Sinkhorn in the style of the released sinkhorn.py, without its Gumbel step, which would slow it down.
"""

from __future__ import annotations

import math
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

EPSILON, ITERATIONS = 0.05, 3
# Rounding of s/epsilon (|s| <= 1) and of the exp, log and sums of 3 iterations.
MARGIN = 64 * torch.finfo(torch.float32).eps / EPSILON
DATA = "runs of 16 pixels, Zipf class sizes, one class absent, 10% ignored"


def cases(settings: Settings) -> list[Case]:
    """Every case at these settings."""
    sizes = {"N": 256, "C": 5, "K": 3} if settings.quick else {"N": 131072, "C": 150, "K": 10}
    return [
        case
        for dtype in settings.score_dtypes
        for case in (
            _assign_case("ade20k", sizes, dtype, settings),
            _plan_case("ade20k", sizes, dtype, settings, train=False),
            _plan_case("ade20k_train", sizes, dtype, settings, train=True),
        )
    ]


def zipf_labels(n: int, classes: int, seed: torch.Generator) -> Tensor:
    """Labels [N] in runs of 16 pixels: class sizes by Zipf's law, the last class absent, one pixel in ten ignored (-1)."""
    size = 1 / torch.arange(1.0, classes + 1, device=seed.device)
    size[-1] = 0
    labels = torch.multinomial(size, math.ceil(n / 16), replacement=True, generator=seed)
    labels[torch.rand(len(labels), generator=seed, device=seed.device) < 0.1] = -1
    return labels.repeat_interleave(16)[:n].contiguous()


def loop_sinkhorn(similarity: Tensor) -> Tensor:
    """Assignment [n] of one class's similarities [n,K], in the linear domain, step by step as the released code does it."""
    q = torch.exp(similarity.float() / EPSILON).T
    k, n = q.shape
    q /= q.sum()
    for _ in range(ITERATIONS):
        q /= q.sum(1, keepdim=True)
        q /= k
        q /= q.sum(0, keepdim=True)
        q /= n
    q *= n
    return q.T.argmax(1)


def loop(similarity: Tensor, group: Tensor, classes: int) -> Tensor:
    """Every class present by itself."""
    out = torch.full_like(group, -1)
    for c in range(classes):
        mask = group == c
        if mask.any():
            out[mask] = loop_sinkhorn(similarity[mask])
    return out


def vectorized_plan(similarity: Tensor, group: Tensor, classes: int) -> Tensor:
    """All classes at once: column sums by index_add_. Of cosines exp((s-1)/epsilon) neither overflows nor vanishes."""
    target = torch.where(group >= 0, group, classes)  # row C collects what is left out
    plan = torch.exp((similarity.float() - 1) / EPSILON)
    for _ in range(ITERATIONS):
        column = plan.new_zeros(classes + 1, plan.shape[1]).index_add_(0, target, plan)
        plan = plan * column.clamp_min(1e-38).reciprocal()[target]
        # the 1/n_g of the pixel marginal is one factor for all pixels of a group and changes no plan
        plan = plan / plan.sum(1, keepdim=True)
    return torch.where(group[:, None] >= 0, plan, 0)


def vectorized(similarity: Tensor, group: Tensor, classes: int) -> Tensor:
    """The assignment by `vectorized_plan`."""
    return torch.where(group >= 0, vectorized_plan(similarity, group, classes).argmax(1), -1)


def reference(i: Any) -> Tensor:
    """Logarithm of the plan in float64, whose argmax is the assignment; [N,K]."""
    return ops.sinkhorn_plan(
        i.similarity.double(), i.group, i.classes, epsilon=EPSILON, iterations=ITERATIONS, backend="reference"
    ).log()


def _check(result: Tensor, plan: Tensor, group: Tensor) -> float:
    """-1 exactly where left out; elsewhere an argmax of the float64 plan inside the rounding margin."""
    if not torch.equal(result < 0, group < 0):
        return math.inf
    return choice_ratio(result[group >= 0], plan[group >= 0], MARGIN)


def _inputs(sizes: dict[str, int], dtype: str, settings: Settings) -> Any:
    """Own-class cosines at D = 256 (a spread of 1/16, one sub-centroid near), and the classes of their pixels."""
    n, classes, k = sizes.values()
    seed, device = settings.generator(), settings.device
    group = zipf_labels(n, classes, seed)
    near = F.one_hot(torch.randint(k, (n,), generator=seed, device=device), k)
    similarity = torch.randn(n, k, generator=seed, device=device) / 16 + 0.5 * near
    return SimpleNamespace(
        similarity=similarity.clamp(-1, 1).to(dtype_of(dtype)), group=group, classes=classes,
        grad=torch.randn(n, k, generator=seed, device=device),
    )  # fmt: skip


def _assign_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings) -> Case:
    def timed(f: Callable[..., Tensor]) -> Callable[[Any], Call]:
        return lambda i: lambda: f(i.similarity, i.group, i.classes)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda s, g, c: ops.sinkhorn_assign(s, g, c, epsilon=EPSILON, iterations=ITERATIONS, backend=backend))

    return Case(
        op="sinkhorn_assign", name=name, shape=sizes, dtype=dtype, data=DATA, headline=dtype == "float32",
        inputs=lambda: _inputs(sizes, dtype, settings),
        reference=lambda i: (reference(i), i.group), check=lambda result, expected: _check(result, *expected),
        variants=[
            *kernels(settings, dtype, ["sinkhorn_assign"], kernel, sizes),
            Variant("loop", timed(loop)),
            Variant("vectorized", timed(vectorized)),
            *compiled(settings, "vectorized", vectorized, timed),
        ],
        bytes=float(sizes["N"] * (sizes["K"] * dtype_of(dtype).itemsize + 16)),
        goals=settings.goals(dtype, {"loop": 10, "vectorized_compiled": 6}),
    )  # fmt: skip


def _plan_case(name: str, sizes: dict[str, int], dtype: str, settings: Settings, train: bool) -> Case:
    """The plan; with `train` also the gradient of the similarities."""

    def timed(f: Callable[..., Tensor]) -> Callable[[Any], Call]:
        def call(i: Any) -> tuple[Tensor, ...]:
            similarity = i.similarity.detach().requires_grad_(train)
            plan = f(similarity, i.group, i.classes)
            return (plan.detach(), *torch.autograd.grad(plan, similarity, i.grad)) if train else (plan,)

        return lambda i: lambda: call(i)

    def kernel(backend: Backend) -> Callable[[Any], Call]:
        return timed(lambda s, g, c: ops.sinkhorn_plan(s, g, c, epsilon=EPSILON, iterations=ITERATIONS, backend=backend))

    def expected(i: Any) -> tuple[Tensor, ...]:
        wide = SimpleNamespace(similarity=i.similarity.double(), group=i.group, classes=i.classes, grad=i.grad.double())
        result: tuple[Tensor, ...] = kernel("reference")(wide)()
        return result

    def check(result: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> float:
        worst = error_ratio(result[0], want[0], MARGIN)  # a probability moves by at most its logarithm
        for got, grad in zip(result[1:], want[1:], strict=True):
            eps = max(MARGIN, torch.finfo(dtype_of(dtype)).eps)
            worst = max(worst, error_ratio(got, grad, 4 * eps * grad.abs().max()))
        return worst

    itemsize = dtype_of(dtype).itemsize
    return Case(
        op="sinkhorn_plan", name=name, shape=sizes, dtype=dtype, data=DATA,
        inputs=lambda: _inputs(sizes, dtype, settings), reference=expected, check=check,
        variants=[
            *kernels(settings, dtype, ["sinkhorn_plan"], kernel, sizes),
            Variant("vectorized", timed(vectorized_plan)),
            *compiled(settings, "vectorized", vectorized_plan, timed),
        ],
        # similarities, plan and classes; in the backward pass the plan's gradient and the result as well
        bytes=float(sizes["N"] * (sizes["K"] * (1 + train) * (itemsize + 4) + 8)),
    )  # fmt: skip
