"""The CUDA Sinkhorn kernels against the float64 reference: on a GPU, or as host C++ with three multiprocessors."""

import math

import pytest
import sinkhorn_check
import torch
from cuda_on_cpu import DEVICE, configure
from sinkhorn_check import exact, problem, terms
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.sinkhorn import op

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]
HALVES = [torch.bfloat16, torch.float16]
CUDA = {"backend": "cuda"}


def check(*args, **options):
    sinkhorn_check.check("cuda", *args, **options)


def check_gradient(*args, **options):
    sinkhorn_check.check_gradient("cuda", *args, **options)


# lanes of a row: 1 up to 12 columns, 2 up to 24, 4 up to 48, else 8
WIDTHS = [1, 2, 7, 10, 12, 13, 24, 25, 33, 48, 49, 64]


@pytest.mark.sanitize
@pytest.mark.parametrize(("width", "dtype"), [(k, torch.float32) for k in WIDTHS] + [(10, d) for d in HALVES])
def test_plan_and_assignment_match_the_float64_reference(width, dtype):
    check(*problem(150, width, 5, dtype=dtype), 5)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("width", "dtype"), [(1, torch.float32), (7, torch.float32), (10, torch.bfloat16), (33, torch.float16), (64, torch.float32)]
)
def test_gradient_matches_the_float64_reference(width, dtype):
    check_gradient(*problem(150, width, 4, dtype=dtype), 4)


@pytest.mark.parametrize("width", [10, 33])
def test_in_any_order_of_threads(order, width):
    s, group = problem(300, width, 5)
    check(s, group, 5, tolerance=1e-2)
    check_gradient(s, group, 5)


# one multiprocessor has all tiles: of 1024 rows, which stay; of 512, which do not all stay in the backward pass; of 256, where
# none stays in the backward pass; the same where a tile of 1024 threads does not fit
@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("pixels", "width", "groups", "capability"), [(2100, 10, 40, 90), (1700, 20, 600, 90), (1100, 48, 3, 90), (500, 48, 3, 86)]
)
def test_several_tiles_a_block(pixels, width, groups, capability):
    if DEVICE == "cpu":
        configure(processors=1, capability=capability)
    s, group = problem(pixels, width, groups)
    check(s, group, groups, iterations=2)
    check_gradient(s, group, groups, iterations=2)


@pytest.mark.sanitize
@pytest.mark.parametrize("width", WIDTHS)
def test_more_processors_than_tiles(width):
    """Tiles are as small as they get: of 16 rows, half a warp, where K is 49 or more."""
    if DEVICE == "cpu":
        configure(processors=132)
    check(*problem(150, width, 5), 5)
    check_gradient(*problem(90, width, 3), 3)


@pytest.mark.parametrize(("epsilon", "high"), [(1e-4, 100.0), (0.01, 1.0), (20.0, 100.0), (1e30, 1.0)])
def test_any_epsilon_matches_the_reference(epsilon, high):
    check(*problem(60, 6, 3, high=high), 3, epsilon=epsilon)


@pytest.mark.parametrize("epsilon", [1e-320, 1e-30, 1e300])
@pytest.mark.parametrize("magnitude", [1e-38, 3e38])
def test_extreme_numbers_stay_finite(epsilon, magnitude):
    s, group = problem(40, 5, 3, high=magnitude)
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=epsilon, **CUDA)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), (group >= 0).float(), atol=1e-5, rtol=0)


def test_float16_at_its_limits_with_a_tiny_epsilon():
    s = torch.tensor([[65504.0, -65504.0, 0.0], [-65504.0, 65504.0, 6e-8], [1.0, 2.0, 3.0]], dtype=torch.float16, device=DEVICE)
    group = torch.zeros(3, dtype=torch.int64, device=DEVICE)
    assert ops.sinkhorn_assign(s, group, 1, epsilon=1e-4, **CUDA).tolist() == [0, 1, 2]


# groups 0 and 4: no pixel; 1: one; 2: two, fewer than K; 3: nearly all the others; 5: exactly K
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_ragged_groups(epsilon):
    s, _ = problem(80, 7, 1)
    group = torch.full((80,), 3, device=DEVICE)
    group[17], group[[3, 70]], group[torch.arange(40, 47)] = 1, 2, 5
    check(s, group, 6, epsilon=epsilon)
    assert ops.sinkhorn_assign(s, group, 6, **CUDA)[17] == s[17].argmax()


def test_every_group_of_one_pixel_takes_its_nearest_and_absent_groups_do_nothing():
    s, _ = problem(30, 9, 1)
    group = torch.randperm(100)[:30].to(DEVICE)
    assert torch.equal(ops.sinkhorn_assign(s, group, 100, **CUDA), s.argmax(1))
    _, history, steps = op.sinkhorn_plan(s, group, 100, 0.05, 2, -1.0, "cuda")
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
    assert ops.sinkhorn_assign(s, group, 3, **CUDA).max() < 5
    plan = ops.sinkhorn_plan(s, group, 3, **CUDA)
    assert torch.equal(plan[:, :5], plan[:, 5:])
    equal = torch.full((20, 6), 0.3, device=DEVICE)
    assert (ops.sinkhorn_assign(equal, torch.arange(20, device=DEVICE) % 3, 3, **CUDA) == 0).all()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_and_groups_out_of_range_change_nothing_for_others(value):
    s, group = problem(70, 6, 3)
    group[:40:3] = group[:40:3].clamp(min=0)
    bad = torch.tensor([0, 3, 33, 39], device=DEVICE)
    group[bad] = 1
    s[bad, torch.tensor([0, 5, 4, 3], device=DEVICE)] = value
    group[41], group[42] = 3, 2**40
    plan = ops.sinkhorn_plan(s, group, 3, **CUDA)
    assignment = ops.sinkhorn_assign(s, group, 3, **CUDA)
    assert plan[bad].isnan().all() and (assignment[bad] == -1).all()
    out = (group < 0) | (group >= 3)
    assert (plan[out] == 0).all() and (assignment[out] == -1).all()
    without = torch.where(out, -1, group)
    without[bad] = -1
    clean = torch.ones(70, dtype=torch.bool, device=DEVICE)
    clean[bad] = False
    assert torch.equal(plan[clean], ops.sinkhorn_plan(s, without, 3, **CUDA)[clean])
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, 3, **CUDA).backward(torch.randn(70, 6, device=DEVICE))
    assert (
        x.grad.isfinite().all() and (x.grad[bad] == 0).all() and (x.grad[out] == 0).all() and (x.grad[clean & ~out] != 0).any()
    )


def test_each_group_stops_by_itself():
    s, group = problem(90, 5, 3)
    s[group == 0] = 0.5
    s[group == 2, 0] += 0.7
    epsilon, options = 0.1, {"epsilon": 0.1, "iterations": 6, "tolerance": 1e-2}
    want = exact(s, group, 3, **options)
    plan, history, steps = op.sinkhorn_plan(s, group, 3, epsilon, 6, 1e-2, "cuda")
    assert steps.tolist() == want.steps.tolist() and steps[0] == 1 and len(set(steps.tolist())) > 1
    assert_close(plan, want.plan, "plan", terms=terms(s, epsilon), scale=1e-30)
    for g in range(3):
        assert (history[steps[g] :, g] == history[steps[g], g]).all()
    check_gradient(s, group, 3, **options)


@pytest.mark.parametrize("iterations", [1, 2, 3, 4, 9])
def test_a_loose_tolerance_stops_after_one_step(iterations):
    s, group = problem(50, 6, 4)
    group[group == 2] = -1
    plan, history, steps = op.sinkhorn_plan(s, group, 4, 0.05, iterations, 1e6, "cuda")
    assert torch.equal(ops.sinkhorn_plan(s, group, 4, iterations=1, **CUDA), plan)
    assert steps.tolist() == [1, 1, 0, 1] and torch.equal(history[1:], history[1].expand(iterations, 4, 6))
    assert (history[:, 2] == 0).all() and (history[1, [0, 1, 3]] != 0).all()
    x = s.clone().requires_grad_()
    grad = torch.randn(50, 6, device=DEVICE)
    ops.sinkhorn_plan(x, group, 4, iterations=iterations, tolerance=1e6, **CUDA).backward(grad)
    y = s.clone().requires_grad_()
    ops.sinkhorn_plan(y, group, 4, iterations=1, **CUDA).backward(grad)
    assert torch.equal(x.grad, y.grad)


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
        ops.sinkhorn_plan(x, group, 2, **CUDA).backward(grad * size)
        results.append(x.grad.double())
    error = (results[1] - results[0] * magnitude).abs().max()
    assert error <= 1e-5 * magnitude * results[0].abs().max()


def test_a_gradient_that_is_not_finite_stays_in_its_group():
    s, group = problem(50, 5, 3)
    group[4] = 1
    grad = torch.randn(50, 5, device=DEVICE)
    grad[4, 2] = math.nan
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, 3, **CUDA).backward(grad)
    assert x.grad[group == 1].isnan().all() and x.grad[group != 1].isfinite().all()


def test_strides_of_every_input():
    base, group = problem(60, 14, 3)
    for s in (base[:, ::2], base[:, :7].t().contiguous().t(), base[::2, 3:8]):
        check(s, group[: len(s)], 3)
    s = base[:, :7].clone().requires_grad_()
    results = []
    for grad in (torch.ones((), device=DEVICE).expand(60, 7), torch.ones(60, 7, device=DEVICE)):
        (g,) = torch.autograd.grad(ops.sinkhorn_plan(s, group, 3, **CUDA), s, grad)
        results.append(g)
    assert torch.equal(*results)


@pytest.mark.parametrize("pixels", [0, 1, 16, 17])
def test_few_pixels(pixels):
    s, group = torch.rand(pixels, 4, device=DEVICE), torch.zeros(pixels, dtype=torch.int64, device=DEVICE)
    plan, history, steps = op.sinkhorn_plan(s, group, 2, 0.05, 3, -1.0, "cuda")
    assert plan.isfinite().all() and history.isfinite().all() and steps.tolist() == [3 * (pixels > 0), 0]
    assert ops.sinkhorn_assign(s, group, 2, **CUDA).shape == (pixels,)


def test_all_pixels_left_out():
    s, _ = problem(30, 5, 3)
    group = torch.full((30,), -1, device=DEVICE)
    s.requires_grad_()
    plan = ops.sinkhorn_plan(s, group, 3, **CUDA)
    plan.sum().backward()
    assert (plan == 0).all() and (s.grad == 0).all()
    assert (ops.sinkhorn_assign(s, group, 3, **CUDA) == -1).all()


def test_reruns_are_bit_equal():
    pixels = 50000 if DEVICE == "cuda" else 60
    s, group = problem(pixels, 10, 7)
    grad = torch.randn(pixels, 10, device=DEVICE)
    results = []
    for _ in range(50 if DEVICE == "cuda" else 2):
        x = s.clone().requires_grad_()
        plan = ops.sinkhorn_plan(x, group, 7, **CUDA)
        plan.backward(grad)
        results.append((plan.detach(), x.grad))
    assert all(torch.equal(p, results[0][0]) and torch.equal(g, results[0][1]) for p, g in results)


def test_opcheck():
    s, group = problem(40, 5, 3)
    plan, history, steps = op.sinkhorn_plan(s, group, 3, 0.05, 2, -1.0, "cuda")
    opcheck = torch.library.opcheck
    opcheck(op.sinkhorn_assign, (s, group, 3, 0.05, 2, -1.0, "cuda"))
    opcheck(op.sinkhorn_plan, (s.clone().requires_grad_(), group, 3, 0.05, 2, -1.0, "cuda"))
    opcheck(op.sinkhorn_plan_backward, (s, group, 3, 0.05, history, steps, plan.sin(), "cuda"))


def test_what_the_kernels_do_not_take_is_refused_by_name():
    group = torch.zeros(4, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="the cuda kernel does not take float64"):
        ops.sinkhorn_assign(torch.rand(4, 3, dtype=torch.float64, device=DEVICE), group, 1, **CUDA)
    with pytest.raises(RuntimeError, match="the cuda kernel takes at most 64 sub-centroids a class, not 65"):
        ops.sinkhorn_assign(torch.rand(4, 65, device=DEVICE), group, 1, **CUDA)


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.gpu
@needs_gpu
def test_no_wait_and_capture():
    s, group = problem(3000, 10, 19)
    grad = torch.randn(3000, 10, device=DEVICE)

    def step():
        x = s.detach().clone().requires_grad_()
        plan = ops.sinkhorn_plan(x, group, 19, **CUDA)
        return plan.detach(), torch.autograd.grad(plan, x, grad)[0], ops.sinkhorn_assign(s, group, 19, **CUDA)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        want = step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        made = step()
    for t in made:
        t.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(made, want, strict=True))


# tiles of the ADE20K shape, one a multiprocessor; then many, some of which do not stay
@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("pixels", [131_072, pytest.param(3_000_000, marks=pytest.mark.large)])
def test_large_problems(pixels):
    s, group = problem(pixels, 10, 150)
    check(s, group, 150)
    check_gradient(s, group, 150)


@pytest.mark.gpu
@pytest.mark.large
@needs_gpu
def test_more_than_2_to_the_31_elements_apart():
    wide = torch.zeros(40_000, 65_536, dtype=torch.float16, device=DEVICE)
    s, group = problem(40_000, 10, 3, dtype=torch.float16)
    wide[:, ::7000] = s
    plan = ops.sinkhorn_plan(wide[:, ::7000], group, 3, **CUDA)
    assert torch.equal(plan, ops.sinkhorn_plan(s, group, 3, **CUDA))
