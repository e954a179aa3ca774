"""Triton's Sinkhorn kernels against the float64 reference: on a GPU, or under the interpreter with tiles of 32 pixels."""

import math

import pytest
import sinkhorn_check
import torch
from cuda_on_cpu import DEVICE
from sinkhorn_check import exact, problem, terms
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.sinkhorn import op

pytestmark = pytest.mark.triton
HALVES = [torch.bfloat16, torch.float16]


def check(*args, **options):
    sinkhorn_check.check("triton", *args, **options)


def check_gradient(*args, **options):
    sinkhorn_check.check_gradient("triton", *args, **options)


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(1, torch.float32), (7, torch.float32), (16, torch.float32), (33, torch.float32)] + [(10, d) for d in HALVES],
)
def test_plan_and_assignment_match_the_float64_reference(width, dtype):
    check(*problem(75, width, 5, dtype=dtype), 5)


@pytest.mark.parametrize(("epsilon", "high"), [(1e-4, 100.0), (0.01, 1.0), (20.0, 100.0), (1e30, 1.0)])
def test_any_epsilon_matches_the_reference(epsilon, high):
    check(*problem(60, 6, 3, high=high), 3, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [1e-320, 1e-30, 1e300])
@pytest.mark.parametrize("magnitude", [1e-38, 3e38])
def test_extreme_numbers_stay_finite(epsilon, magnitude):
    s, group = problem(40, 5, 3, high=magnitude)
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=epsilon, backend="triton")
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), (group >= 0).float(), atol=1e-5, rtol=0)


def test_float16_at_its_limits_with_a_tiny_epsilon():
    s = torch.tensor([[65504.0, -65504.0, 0.0], [-65504.0, 65504.0, 6e-8], [1.0, 2.0, 3.0]], dtype=torch.float16, device=DEVICE)
    group = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert ops.sinkhorn_assign(s, group, 1, epsilon=1e-4, backend="triton").tolist() == [0, 1, 2]


# groups 0 and 4: no pixel; 1: one; 2: two, fewer than K; 3: nearly all the others; 5: exactly K
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_ragged_groups(epsilon):
    s, _ = problem(80, 7, 1)
    group = torch.full((80,), 3, device=DEVICE)
    group[17], group[[3, 70]], group[torch.arange(40, 47)] = 1, 2, 5
    check(s, group, 6, epsilon=epsilon)
    assert ops.sinkhorn_assign(s, group, 6, backend="triton")[17] == s[17].argmax()


def test_every_group_of_one_pixel_takes_its_nearest_and_absent_groups_do_nothing():
    s, _ = problem(30, 9, 1)
    group = torch.randperm(100)[:30].to(DEVICE)
    assert torch.equal(ops.sinkhorn_assign(s, group, 100, backend="triton"), s.argmax(1))
    _, history, steps = op.sinkhorn_plan(s, group, 100, 0.05, 2, -1.0, "triton")
    absent = torch.ones(100, dtype=torch.bool, device=DEVICE)
    absent[group] = False
    assert (steps[absent] == 0).all() and (history[:, absent] == 0).all() and (steps[~absent] == 2).all()


def test_one_group_without_labels():
    s, _ = problem(50, 6, 1)
    check(s, None, 1)
    check_gradient(s, None, 1)


def test_no_iterations_is_softmax_and_nearest():
    s, group = problem(40, 5, 3)
    check(s, group, 3, iterations=0)
    check_gradient(s, group, 3, iterations=0)


def test_ties_go_to_the_lowest_index():
    half, group = problem(60, 5, 3)
    s = torch.cat([half, half], 1)  # column k + 5 equals column k
    assert ops.sinkhorn_assign(s, group, 3, backend="triton").max() < 5
    plan = ops.sinkhorn_plan(s, group, 3, backend="triton")
    assert torch.equal(plan[:, :5], plan[:, 5:])
    equal = torch.full((20, 6), 0.3, device=DEVICE)
    assert (ops.sinkhorn_assign(equal, torch.arange(20, device=DEVICE) % 3, 3, backend="triton") == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_and_groups_out_of_range_change_nothing_for_others(value):
    s, group = problem(70, 6, 3)
    group[:40:3] = group[:40:3].clamp(min=0)
    bad = torch.tensor([0, 3, 33, 39], device=DEVICE)
    group[bad] = 1
    s[bad, torch.tensor([0, 5, 4, 3], device=DEVICE)] = value
    group[41], group[42] = 3, 2**40
    plan = ops.sinkhorn_plan(s, group, 3, backend="triton")
    assignment = ops.sinkhorn_assign(s, group, 3, backend="triton")
    assert plan[bad].isnan().all() and (assignment[bad] == -1).all()
    out = (group < 0) | (group >= 3)
    assert (plan[out] == 0).all() and (assignment[out] == -1).all()
    without = torch.where(out, -1, group)
    without[bad] = -1
    clean = torch.ones(70, dtype=torch.bool, device=DEVICE)
    clean[bad] = False
    assert torch.equal(plan[clean], ops.sinkhorn_plan(s, without, 3, backend="triton")[clean])
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, 3, backend="triton").backward(torch.randn(70, 6, device=DEVICE))
    assert (
        x.grad.isfinite().all() and (x.grad[bad] == 0).all() and (x.grad[out] == 0).all() and (x.grad[clean & ~out] != 0).any()
    )


def test_each_group_stops_by_itself():
    s, group = problem(90, 5, 3)
    s[group == 0] = 0.5
    s[group == 2, 0] += 0.7
    epsilon, options = 0.1, {"epsilon": 0.1, "iterations": 6, "tolerance": 1e-2}
    want = exact(s, group, 3, **options)
    plan, history, steps = op.sinkhorn_plan(s, group, 3, epsilon, 6, 1e-2, "triton")
    assert steps.tolist() == want.steps.tolist() and steps[0] == 1 and len(set(steps.tolist())) > 1
    assert_close(plan, want.plan, "plan", terms=terms(s, epsilon), scale=1e-30)
    for g in range(3):
        assert (history[steps[g] :, g] == history[steps[g], g]).all()
    check_gradient(s, group, 3, **options)


def test_a_loose_tolerance_stops_after_one_step():
    s, group = problem(50, 6, 3)
    one = ops.sinkhorn_plan(s, group, 3, iterations=1, backend="triton")
    assert torch.equal(ops.sinkhorn_plan(s, group, 3, tolerance=1e6, backend="triton"), one)


@pytest.mark.parametrize(
    ("width", "dtype"), [(1, torch.float32), (7, torch.float32), (10, torch.bfloat16), (33, torch.float16)]
)
def test_gradient_matches_the_float64_reference(width, dtype):
    check_gradient(*problem(75, width, 4, dtype=dtype), 4)


@pytest.mark.parametrize(("epsilon", "iterations"), [(0.01, 2), (0.3, 6)])
def test_gradient_at_other_settings(epsilon, iterations):
    check_gradient(*problem(60, 5, 3), 3, epsilon=epsilon, iterations=iterations)


@pytest.mark.parametrize("magnitude", [0.0, 1e-33, 1e30])
def test_gradients_of_any_size(magnitude):
    s, group = problem(40, 4, 2)
    grad = torch.randn(40, 4, device=DEVICE)
    results = []
    for size in (1.0, magnitude):
        x = s.clone().requires_grad_()
        ops.sinkhorn_plan(x, group, 2, backend="triton").backward(grad * size)
        results.append(x.grad.double())
    error = (results[1] - results[0] * magnitude).abs().max()
    assert error <= 1e-5 * magnitude * results[0].abs().max()


def test_a_gradient_that_is_not_finite_stays_in_its_group():
    s, group = problem(50, 5, 3)
    group[4] = 1
    grad = torch.randn(50, 5, device=DEVICE)
    grad[4, 2] = math.nan
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, 3, backend="triton").backward(grad)
    assert x.grad[group == 1].isnan().all() and x.grad[group != 1].isfinite().all()


def test_strides_of_every_input():
    base, group = problem(60, 14, 3)
    for s in (base[:, ::2], base[:, :7].t().contiguous().t(), base[::2, 3:8]):
        check(s, group[: len(s)], 3)
    s = base[:, :7].clone().requires_grad_()
    one = torch.randn(7, device=DEVICE)
    results = []
    for grad in (one.expand(60, 7), one.repeat(60, 1), one.repeat(60, 2)[:, ::2].copy_(one)):
        (g,) = torch.autograd.grad(ops.sinkhorn_plan(s, group, 3, backend="triton"), s, grad)
        results.append(g)
    for g in results[1:]:  # strides make kernels of their own, which may sum in another order
        assert_close(
            g, results[0].double(), "plan_gradient", terms=4 * terms(s.detach(), 0.05), scale=float(one.abs().max()) / 0.05
        )


@pytest.mark.parametrize("pixels", [0, 1, 16, 17])
def test_few_pixels(pixels):
    s, group = torch.rand(pixels, 4, device=DEVICE), torch.zeros(pixels, dtype=torch.int64, device=DEVICE)
    plan, history, steps = op.sinkhorn_plan(s, group, 2, 0.05, 3, -1.0, "triton")
    assert plan.isfinite().all() and history.isfinite().all() and steps.tolist() == [3 * (pixels > 0), 0]
    assert ops.sinkhorn_assign(s, group, 2, backend="triton").shape == (pixels,)


def test_all_pixels_left_out():
    s, _ = problem(30, 5, 3)
    group = torch.full((30,), -1, device=DEVICE)
    s.requires_grad_()
    plan = ops.sinkhorn_plan(s, group, 3, backend="triton")
    plan.sum().backward()
    assert (plan == 0).all() and (s.grad == 0).all()
    assert (ops.sinkhorn_assign(s, group, 3, backend="triton") == -1).all()


def test_reruns_are_bit_equal():
    pixels = 50000 if DEVICE == "cuda" else 60
    s, group = problem(pixels, 10, 7)
    grad = torch.randn(pixels, 10, device=DEVICE)
    results = []
    for _ in range(50 if DEVICE == "cuda" else 2):
        x = s.clone().requires_grad_()
        plan = ops.sinkhorn_plan(x, group, 7, backend="triton")
        plan.backward(grad)
        results.append((plan.detach(), x.grad))
    assert all(torch.equal(p, results[0][0]) and torch.equal(g, results[0][1]) for p, g in results)


def test_tiles_of_any_size_agree():
    s, group = problem(100, 6, 4)
    want = exact(s, group, 4).plan
    for block in (16, 128):
        with configured("sinkhorn", BLOCK_N=block, CELLS=4096, num_warps=2, num_stages=1):
            plan = ops.sinkhorn_plan(s, group, 4, backend="triton")
        assert_close(plan, want, "plan", terms=terms(s, 0.05), scale=1e-30)
