"""Sinkhorn in Triton and in CUDA C++ against the float64 reference: on a GPU, or tiles of 32 pixels under Triton's interpreter, and
host C++ with three multiprocessors.
"""

import math

import pytest
import torch
from cuda_on_cpu import DEVICE
from gpu_check import sizes
from sinkhorn_check import WIDTHS, check, check_gradient, exact, problem, terms
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.sinkhorn import op
from dnc_kernels.ops.sinkhorn.calls import SinkhornCall

HALVES = [torch.bfloat16, torch.float16]
SOME = [(1, torch.float32), (7, torch.float32), (10, torch.bfloat16), (33, torch.float16)]  # width, dtype


@pytest.mark.sanitize
@sizes(
    "pixels,width,dtype",
    triton=[(75, k, torch.float32) for k in (1, 7, 16, 33)] + [(75, 10, d) for d in HALVES],
    cuda=[(150, k, torch.float32) for k in WIDTHS] + [(150, 10, d) for d in HALVES],
)
def test_plan_and_assignment_match_the_float64_reference(pixels, width, dtype, backend):
    check(backend, *problem(pixels, width, 5, dtype=dtype), 5)


@pytest.mark.sanitize
@sizes(
    "pixels,width,dtype",
    triton=[(75, *case) for case in SOME],
    cuda=[(150, *case) for case in (*SOME, (64, torch.float32))],
)
def test_gradient_matches_the_float64_reference(pixels, width, dtype, backend):
    check_gradient(backend, *problem(pixels, width, 4, dtype=dtype), 4)


@pytest.mark.parametrize(("epsilon", "high"), [(1e-4, 100.0), (0.01, 1.0), (20.0, 100.0), (1e30, 1.0)])
def test_any_epsilon_matches_the_reference(epsilon, high, backend):
    check(backend, *problem(60, 6, 3, high=high), 3, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [1e-320, 1e-30, 1e300])
@pytest.mark.parametrize("magnitude", [1e-38, 3e38])
def test_extreme_numbers_stay_finite(epsilon, magnitude, backend):
    s, group = problem(40, 5, 3, high=magnitude)
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=epsilon, backend=backend)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), (group >= 0).float(), atol=1e-5, rtol=0)


def test_float16_at_its_limits_with_a_tiny_epsilon(backend):
    s = torch.tensor([[65504.0, -65504.0, 0.0], [-65504.0, 65504.0, 6e-8], [1.0, 2.0, 3.0]], dtype=torch.float16, device=DEVICE)
    group = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert ops.sinkhorn_assign(s, group, 1, epsilon=1e-4, backend=backend).tolist() == [0, 1, 2]


# groups 0 and 4: no pixel; 1: one; 2: two, fewer than K; 3: nearly all the others; 5: exactly K
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_ragged_groups(epsilon, backend):
    s, _ = problem(80, 7, 1)
    group = torch.full((80,), 3, device=DEVICE)
    group[17], group[[3, 70]], group[torch.arange(40, 47)] = 1, 2, 5
    check(backend, s, group, 6, epsilon=epsilon)
    assert ops.sinkhorn_assign(s, group, 6, backend=backend)[17] == s[17].argmax()


def test_every_group_of_one_pixel_takes_its_nearest_and_absent_groups_do_nothing(backend):
    s, _ = problem(30, 9, 1)
    group = torch.randperm(100)[:30].to(DEVICE)
    assert torch.equal(ops.sinkhorn_assign(s, group, 100, backend=backend), s.argmax(1))
    _, history, steps = op.sinkhorn_plan(SinkhornCall(s, group, 100, 0.05, 2, -1.0, backend))
    absent = torch.ones(100, dtype=torch.bool, device=DEVICE)
    absent[group] = False
    assert (steps[absent] == 0).all() and (history[:, absent] == 0).all() and (steps[~absent] == 2).all()


def test_one_group_without_labels(backend):
    s, _ = problem(50, 6, 1)
    check(backend, s, None, 1)
    check_gradient(backend, s, None, 1)


def test_no_iterations_is_softmax_and_nearest(backend):
    s, group = problem(40, 5, 3)
    check(backend, s, group, 3, iterations=0)
    check_gradient(backend, s, group, 3, iterations=0)


def test_ties_go_to_the_lowest_index(backend):
    half, group = problem(60, 5, 3)
    s = torch.cat([half, half], 1)  # column k + 5 equals column k
    assert ops.sinkhorn_assign(s, group, 3, backend=backend).max() < 5
    plan = ops.sinkhorn_plan(s, group, 3, backend=backend)
    assert torch.equal(plan[:, :5], plan[:, 5:])
    equal = torch.full((20, 6), 0.3, device=DEVICE)
    assert (ops.sinkhorn_assign(equal, torch.arange(20, device=DEVICE) % 3, 3, backend=backend) == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_and_groups_out_of_range_change_nothing_for_others(value, backend):
    s, group = problem(70, 6, 3)
    group[:40:3] = group[:40:3].clamp(min=0)
    bad = torch.tensor([0, 3, 33, 39], device=DEVICE)
    group[bad] = 1
    s[bad, torch.tensor([0, 5, 4, 3], device=DEVICE)] = value
    group[41], group[42] = 3, 2**40
    plan = ops.sinkhorn_plan(s, group, 3, backend=backend)
    assignment = ops.sinkhorn_assign(s, group, 3, backend=backend)
    assert plan[bad].isnan().all() and (assignment[bad] == -1).all()
    out = (group < 0) | (group >= 3)
    assert (plan[out] == 0).all() and (assignment[out] == -1).all()
    without = torch.where(out, -1, group)
    without[bad] = -1
    clean = torch.ones(70, dtype=torch.bool, device=DEVICE)
    clean[bad] = False
    assert torch.equal(plan[clean], ops.sinkhorn_plan(s, without, 3, backend=backend)[clean])
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, 3, backend=backend).backward(torch.randn(70, 6, device=DEVICE))
    assert (
        x.grad.isfinite().all() and (x.grad[bad] == 0).all() and (x.grad[out] == 0).all() and (x.grad[clean & ~out] != 0).any()
    )


def test_each_group_stops_by_itself(backend):
    s, group = problem(90, 5, 3)
    s[group == 0] = 0.5
    s[group == 2, 0] += 0.7
    epsilon, options = 0.1, {"epsilon": 0.1, "iterations": 6, "tolerance": 1e-2}
    want = exact(s, group, 3, **options)
    plan, history, steps = op.sinkhorn_plan(SinkhornCall(s, group, 3, epsilon, 6, 1e-2, backend))
    assert steps.tolist() == want.steps.tolist() and steps[0] == 1 and len(set(steps.tolist())) > 1
    assert_close(plan, want.plan, "plan", terms=terms(s, epsilon), scale=1e-30)
    for g in range(3):
        assert (history[steps[g] :, g] == history[steps[g], g]).all()
    check_gradient(backend, s, group, 3, **options)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 9])
def test_a_loose_tolerance_stops_after_one_step(iterations, backend):
    s, group = problem(50, 6, 4)
    group[group == 2] = -1
    plan, history, steps = op.sinkhorn_plan(SinkhornCall(s, group, 4, 0.05, iterations, 1e6, backend))
    assert torch.equal(ops.sinkhorn_plan(s, group, 4, iterations=1, backend=backend), plan)
    assert steps.tolist() == [1, 1, 0, 1] and torch.equal(history[1:], history[1].expand(iterations, 4, 6))
    assert (history[:, 2] == 0).all() and (history[1, [0, 1, 3]] != 0).all()
    x = s.clone().requires_grad_()
    grad = torch.randn(50, 6, device=DEVICE)
    ops.sinkhorn_plan(x, group, 4, iterations=iterations, tolerance=1e6, backend=backend).backward(grad)
    y = s.clone().requires_grad_()
    ops.sinkhorn_plan(y, group, 4, iterations=1, backend=backend).backward(grad)
    assert torch.equal(x.grad, y.grad)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.01, 2), (0.3, 6)])
def test_gradient_at_other_settings(epsilon, iterations, backend):
    check_gradient(backend, *problem(60, 5, 3), 3, epsilon=epsilon, iterations=iterations)


@pytest.mark.parametrize("magnitude", [0.0, 1e-33, 1e30])
def test_gradients_of_any_size(magnitude, backend):
    s, group = problem(40, 4, 2)
    grad = torch.randn(40, 4, device=DEVICE)
    results = []
    for size in (1.0, magnitude):
        x = s.clone().requires_grad_()
        ops.sinkhorn_plan(x, group, 2, backend=backend).backward(grad * size)
        results.append(x.grad.double())
    error = (results[1] - results[0] * magnitude).abs().max()
    assert error <= 1e-5 * magnitude * results[0].abs().max()


def test_a_gradient_that_is_not_finite_stays_in_its_group(backend):
    s, group = problem(50, 5, 3)
    group[4] = 1
    grad = torch.randn(50, 5, device=DEVICE)
    grad[4, 2] = math.nan
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, 3, backend=backend).backward(grad)
    assert x.grad[group == 1].isnan().all() and x.grad[group != 1].isfinite().all()


def test_strides_of_every_input(backend):
    base, group = problem(60, 14, 3)
    for s in (base[:, ::2], base[:, :7].t().contiguous().t(), base[::2, 3:8]):
        check(backend, s, group[: len(s)], 3)
    s = base[:, :7].clone().requires_grad_()
    for one in (torch.randn(7, device=DEVICE), torch.ones((), device=DEVICE)):
        expanded, results = one.expand(60, 7), []
        for grad in (expanded, expanded.contiguous(), expanded.repeat(1, 2)[:, ::2].copy_(one)):
            (g,) = torch.autograd.grad(ops.sinkhorn_plan(s, group, 3, backend=backend), s, grad)
            results.append(g)
        for g in results[1:]:
            if backend == "cuda":
                assert torch.equal(g, results[0])
            else:  # strides make kernels of their own, which may sum in another order
                scale = float(one.abs().max()) / 0.05
                assert_close(g, results[0].double(), "plan_gradient", terms=4 * terms(s.detach(), 0.05), scale=scale)


@pytest.mark.parametrize("pixels", [0, 1, 16, 17])
def test_few_pixels(pixels, backend):
    s, group = torch.rand(pixels, 4, device=DEVICE), torch.zeros(pixels, dtype=torch.int64, device=DEVICE)
    plan, history, steps = op.sinkhorn_plan(SinkhornCall(s, group, 2, 0.05, 3, -1.0, backend))
    assert plan.isfinite().all() and history.isfinite().all() and steps.tolist() == [3 * (pixels > 0), 0]
    assert ops.sinkhorn_assign(s, group, 2, backend=backend).shape == (pixels,)


def test_all_pixels_left_out(backend):
    s, _ = problem(30, 5, 3)
    group = torch.full((30,), -1, device=DEVICE)
    s.requires_grad_()
    plan = ops.sinkhorn_plan(s, group, 3, backend=backend)
    plan.sum().backward()
    assert (plan == 0).all() and (s.grad == 0).all()
    assert (ops.sinkhorn_assign(s, group, 3, backend=backend) == -1).all()


def test_reruns_are_bit_equal(backend):
    pixels = 50000 if DEVICE == "cuda" else 60
    s, group = problem(pixels, 10, 7)
    grad = torch.randn(pixels, 10, device=DEVICE)
    results = []
    for _ in range(50 if DEVICE == "cuda" else 2):
        x = s.clone().requires_grad_()
        plan = ops.sinkhorn_plan(x, group, 7, backend=backend)
        plan.backward(grad)
        results.append((plan.detach(), x.grad))
    assert all(torch.equal(p, results[0][0]) and torch.equal(g, results[0][1]) for p, g in results)
