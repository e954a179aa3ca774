"""What the GPU tests of Sinkhorn share: problems, and a comparison with the float64 reference."""

import math

import torch
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.sinkhorn import reference
from dnc_kernels.ops.sinkhorn.calls import SinkhornCall

#: CUDA C++ has lanes for a row: 1 up to 12 columns, 2 up to 24, 4 up to 48, else 8
WIDTHS = [1, 2, 7, 10, 12, 13, 24, 25, 33, 48, 49, 64]


def problem(pixels, width, groups, *, dtype=torch.float32, high=1.0):
    """Similarities in [-high,high], and groups of which some come in runs; a few pixels are left out."""
    s = (torch.rand(pixels, width, dtype=torch.float64) * 2 - 1) * high
    group = torch.randint(-1, groups, (pixels,))
    group[pixels // 3 : pixels // 2] = groups - 1
    return s.to(dtype).to(DEVICE), group.to(DEVICE)


def terms(s, epsilon):
    """R^2 + N: R, the range of the finite similarities over epsilon, bounds the exponents; N pixels are summed."""
    x = s.double()[s.isfinite().all(1)]
    return math.ceil(((x.max() - x.min()).item() / epsilon) ** 2 + len(s)) if x.numel() else 1


def exact(s, group, groups, epsilon=0.05, iterations=3, tolerance=None):
    limit = -1.0 if tolerance is None else tolerance
    return reference.sinkhorn(SinkhornCall(s.double(), group, groups, epsilon, iterations, limit, "reference"))


def same_assignment(actual, expected, plan, gap=1e-3):
    """Equal wherever the plan is no tie."""
    used = expected >= 0
    assert torch.equal(actual >= 0, used)
    if plan.shape[1] > 1:
        top = plan[used].topk(2, dim=1).values
        decided = (top[:, 0] / top[:, 1]).log() > gap
        assert torch.equal(actual[used][decided], expected[used][decided])


def check(backend, s, group, groups, **options):
    want = exact(s, group, groups, **options)
    epsilon = options.get("epsilon", 0.05)
    plan = ops.sinkhorn_plan(s, group, None if group is None else groups, backend=backend, **options)
    # far below 1e-30 a float32 plan flushes to zero
    assert_close(plan, want.plan, "plan", terms=terms(s, epsilon), scale=1e-30)
    if group is not None:
        same_assignment(ops.sinkhorn_assign(s, group, groups, backend=backend, **options), want.assignment, want.plan)


def check_gradient(backend, s, group, groups, **options):
    epsilon = options.get("epsilon", 0.05)
    grad = torch.randn(s.shape, device=DEVICE)
    x = s.detach().clone().requires_grad_()
    ops.sinkhorn_plan(x, group, None if group is None else groups, backend=backend, **options).backward(grad)
    y = s.detach().double().requires_grad_()
    want = exact(y, group, groups, **options).plan
    want.backward(torch.where(want.isnan(), 0, grad.double()))
    assert x.grad.dtype == s.dtype
    assert_close(x.grad, y.grad, "plan_gradient", terms=terms(s, epsilon), scale=float(grad.abs().max()) / epsilon)
