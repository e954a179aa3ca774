"""Sinkhorn kernels against the float64 reference, the released algorithm and golden vectors."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from dnc_kernels import ops, use_backend
from dnc_kernels.ops.sinkhorn import op, reference
from dnc_kernels.ops.sinkhorn.calls import SinkhornCall

DATA = Path(__file__).parent / "data"
FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def problem(pixels, width, groups, *, dtype=torch.float32, low=-1.0, high=1.0, ignored=True, seed=0):
    generator = torch.Generator().manual_seed(seed)
    s = torch.rand(pixels, width, generator=generator, dtype=torch.float64) * (high - low) + low
    group = torch.randint(-1 if ignored else 0, groups, (pixels,), generator=generator)
    return s.to(dtype), group


def terms(s, epsilon):
    """R^2 + N: R, the range of the finite similarities over epsilon, bounds the exponents; N pixels are summed."""
    x = s.double()[s.isfinite().all(1)]
    return math.ceil(((x.max() - x.min()).item() / epsilon) ** 2 + len(s)) if x.numel() else 1


def close_plan(plan, s, expected, epsilon):
    # far below 1e-30 a float32 plan flushes to zero
    assert_close(plan, expected, "plan", terms=terms(s, epsilon), scale=1e-30)


def exact(s, group=None, groups=1, *, epsilon=0.05, iterations=3, tolerance=None):
    """The float64 reference: plan, assignment, steps."""
    limit = -1.0 if tolerance is None else tolerance
    return reference.sinkhorn(SinkhornCall(s.double(), group, groups, epsilon, iterations, limit, "reference"))


def released(s, epsilon, iterations):
    """The released linear-domain loop for one class: plan with rows of sum 1."""
    q = torch.exp(s.double() / epsilon).t()  # [K,n]
    width, pixels = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / width
        q = q / q.sum(0, keepdim=True) / pixels
    return (q * pixels).t()


def gaps(plan):
    """Log ratio of the two largest entries of each row."""
    top = plan.topk(2, dim=1).values
    return (top[:, 0] / top[:, 1]).log()


def same_assignment(actual, expected, plan, gap):
    """Equal wherever the plan is no tie; a tie must still pick one of its entries."""
    used = expected >= 0
    assert torch.equal(actual >= 0, used)
    decided = torch.zeros_like(used)
    decided[used] = gaps(plan[used]) > gap if plan.shape[1] > 1 else True
    assert torch.equal(actual[decided], expected[decided])
    rest = used & ~decided
    chosen = plan[rest].gather(1, actual[rest, None])[:, 0]
    assert ((plan[rest].max(1).values / chosen).log() <= gap).all()


@pytest.mark.parametrize(
    ("width", "dtype"),
    [(width, torch.float32) for width in (1, 3, 8, 10, 16, 17, 33, 64, 130)]
    + [(width, dtype) for width in (3, 10, 40) for dtype in FLOATS[1:]],
    ids=str,
)
def test_plan_and_assignment_match_the_float64_reference(isa, width, dtype):
    s, group = problem(700, width, 6, dtype=dtype)
    want = exact(s, group, 6)
    close_plan(ops.sinkhorn_plan(s, group, 6), s, want.plan, 0.05)
    same_assignment(ops.sinkhorn_assign(s, group, 6), want.assignment, want.plan, 1e-4)


# below 0.04 the range of 2 needs the log form; at 1e-4 and 100 exponents reach 2e6
@pytest.mark.parametrize(
    ("epsilon", "high"),
    [(1e-4, 100.0), (1e-4, 1.0), (0.01, 1.0), (0.0399, 1.0), (0.0401, 1.0), (0.5, 1.0), (20.0, 100.0), (1e6, 1.0), (1e30, 1.0)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_any_epsilon_matches_the_reference(isa, epsilon, high, dtype):
    s, group = problem(500, 10, 4, dtype=dtype, low=-high, high=high)
    want = exact(s, group, 4, epsilon=epsilon)
    close_plan(ops.sinkhorn_plan(s, group, 4, epsilon=epsilon), s, want.plan, epsilon)


@pytest.mark.parametrize("epsilon", [1e-320, 1e-40, 1e-30, 1e-10, 1e300])
@pytest.mark.parametrize("magnitude", [1e-38, 1.0, 3e38])
def test_extreme_numbers_stay_finite(isa, epsilon, magnitude):
    s, group = problem(300, 5, 3, low=-magnitude, high=magnitude)
    s.requires_grad_()
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=epsilon)
    assert plan.isfinite().all()
    torch.testing.assert_close(plan.sum(1), (group >= 0).float(), atol=1e-5, rtol=0)
    assert torch.equal(ops.sinkhorn_assign(s, group, 3, epsilon=epsilon) >= 0, group >= 0)


def test_float16_at_its_limits_with_a_tiny_epsilon_is_finite(isa):
    s = torch.tensor([[65504.0, -65504.0, 0.0], [-65504.0, 65504.0, 6e-8], [1.0, 2.0, 3.0]], dtype=torch.float16)
    plan = ops.sinkhorn_plan(s, epsilon=1e-4)
    assert plan.dtype == torch.float32 and plan.isfinite().all()
    assert ops.sinkhorn_assign(s, torch.zeros(3, dtype=torch.int64), 1, epsilon=1e-4).tolist() == [0, 1, 2]


@pytest.mark.parametrize("iterations", [1, 2, 3, 7])
def test_equals_the_released_loop_over_classes(isa, iterations):
    s, group = problem(400, 10, 5, dtype=torch.float64)
    plan = ops.sinkhorn_plan(s, group, 5, iterations=iterations)
    assignment = ops.sinkhorn_assign(s, group, 5, iterations=iterations)
    for g in range(5):
        want = released(s[group == g], 0.05, iterations)
        torch.testing.assert_close(plan[group == g], want, rtol=1e-11, atol=0)
        assert torch.equal(assignment[group == g], want.argmax(1))


def test_reference_equals_the_released_loop():
    s, group = problem(300, 7, 4, dtype=torch.float64)
    want = exact(s, group, 4)
    for g in range(4):
        torch.testing.assert_close(want.plan[group == g], released(s[group == g], 0.05, 3), rtol=1e-11, atol=0)


@pytest.mark.parametrize("name", ["cityscapes_f32", "cityscapes_f64", "hard_f64", "missing_classes_f64"])
def test_golden_assignment(isa, name):
    data = {key: torch.from_numpy(np.asarray(value)) for key, value in np.load(DATA / f"golden_{name}.npz").items()}
    prototypes = torch.nn.functional.normalize(data["prototypes"], dim=-1)
    classes, width, _ = prototypes.shape
    kept = data["labels"] != data["ignore_index"]
    label = torch.where(kept, data["labels"], -1)
    s = torch.einsum("nd,nkd->nk", data["embedding"], prototypes[label.clamp(min=0)])
    settings = {"epsilon": data["epsilon"].item(), "iterations": int(data["sinkhorn_iterations"])}
    assignment = ops.sinkhorn_assign(s, label, classes, **settings)
    assert torch.equal(assignment == -1, ~kept)
    want = data["contrast_target"][kept] - label[kept] * width
    assert ((want >= 0) & (want < width)).all()
    decided = gaps(exact(s, label, classes, **settings).plan[kept]) > (1e-4 if s.dtype == torch.float32 else 1e-9)
    assert decided.float().mean() > 0.99
    assert torch.equal(assignment[kept][decided], want[decided])


def test_marginals_after_many_iterations(isa):
    s, group = problem(600, 6, 3, ignored=False)
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=0.2, iterations=200)
    torch.testing.assert_close(plan.sum(1), torch.ones(600), atol=1e-6, rtol=0)
    for g in range(3):
        mine = plan[group == g]
        torch.testing.assert_close(mine.mean(0), torch.full((6,), 1 / 6), atol=2e-5, rtol=0)


@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_no_iterations_is_softmax_and_nearest(isa, epsilon):
    s, group = problem(300, 9, 4, dtype=torch.float64)
    plan = ops.sinkhorn_plan(s, group, 4, epsilon=epsilon, iterations=0)
    used = group >= 0
    torch.testing.assert_close(plan[used], (s[used] / epsilon).softmax(1), rtol=1e-12, atol=1e-300)
    assert torch.equal(ops.sinkhorn_assign(s, group, 4, epsilon=epsilon, iterations=0)[used], s[used].argmax(1))


def test_without_groups_all_pixels_are_one_group(isa):
    s, _ = problem(200, 8, 1)
    assert torch.equal(ops.sinkhorn_plan(s), ops.sinkhorn_plan(s, torch.zeros(200, dtype=torch.int64), 1))
    assert torch.equal(ops.sinkhorn_plan(s), ops.sinkhorn_plan(s, None, 1))


# groups 0 and 4: no pixel; 1: one; 2: two, fewer than K; 3: all the others; 5: exactly K
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_ragged_groups(isa, epsilon):
    s, _ = problem(100, 7, 1)
    group = torch.full((100,), 3)
    group[17], group[[3, 90]], group[torch.arange(40, 47)] = 1, 2, 5
    want = exact(s, group, 6, epsilon=epsilon)
    close_plan(ops.sinkhorn_plan(s, group, 6, epsilon=epsilon), s, want.plan, epsilon)
    same_assignment(ops.sinkhorn_assign(s, group, 6, epsilon=epsilon), want.assignment, want.plan, 1e-4)
    torch.testing.assert_close(ops.sinkhorn_plan(s, group, 6, epsilon=epsilon)[17], torch.full((7,), 1 / 7), rtol=1e-5, atol=0)
    assert ops.sinkhorn_assign(s, group, 6, epsilon=epsilon)[17] == s[17].argmax()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_every_group_of_one_pixel_takes_its_nearest(backend):
    s, _ = problem(50, 10, 1)
    group = torch.randperm(50)
    assert torch.equal(ops.sinkhorn_assign(s, group, 50, backend=backend), s.argmax(1))


def test_more_groups_than_pixels(isa):
    s, group = problem(60, 5, 5000)
    want = exact(s, group, 5000)
    close_plan(ops.sinkhorn_plan(s, group, 5000), s, want.plan, 0.05)
    assert torch.equal(ops.sinkhorn_assign(s, group, 5000), want.assignment)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [0.0, 0.3, -7.0])
@pytest.mark.parametrize("epsilon", [0.05, 1e-3])
def test_equal_similarities_give_a_uniform_plan_and_index_zero(backend, value, epsilon):
    s = torch.full((40, 6), value)
    group = torch.arange(40) % 3
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=epsilon, backend=backend)
    torch.testing.assert_close(plan, torch.full((40, 6), 1 / 6), rtol=1e-6, atol=0)
    assert (ops.sinkhorn_assign(s, group, 3, epsilon=epsilon, backend=backend) == 0).all()


@pytest.mark.parametrize("epsilon", [0.05, 0.01])
@pytest.mark.parametrize("width", [6, 40])
def test_ties_go_to_the_lowest_index(isa, width, epsilon):
    half, group = problem(300, width // 2, 4)
    s = torch.cat([half, half], 1)  # column k + K/2 equals column k
    assignment = ops.sinkhorn_assign(s, group, 4, epsilon=epsilon)
    assert assignment.max() < width // 2
    plan = ops.sinkhorn_plan(s, group, 4, epsilon=epsilon)
    assert torch.equal(plan[:, : width // 2], plan[:, width // 2 :])


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_pixels_left_out_have_zero_rows(backend):
    s, group = problem(90, 5, 3)
    group[::7] = -5
    plan = ops.sinkhorn_plan(s, group, 3, backend=backend)
    assert (plan[group < 0] == 0).all() and (ops.sinkhorn_assign(s, group, 3, backend=backend)[group < 0] == -1).all()
    keep = group >= 0
    torch.testing.assert_close(plan[keep], ops.sinkhorn_plan(s[keep], group[keep], 3, backend=backend), rtol=1e-5, atol=0)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_all_pixels_left_out(backend):
    s, _ = problem(30, 5, 3)
    s.requires_grad_()
    group = torch.full((30,), -1)
    plan = ops.sinkhorn_plan(s, group, 3, backend=backend)
    plan.sum().backward()
    assert (plan == 0).all() and (s.grad == 0).all()
    assert (ops.sinkhorn_assign(s, group, 3, backend=backend) == -1).all()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_rows_that_are_not_finite_do_not_poison_their_group(backend, value, epsilon):
    s, group = problem(200, 10, 3, ignored=False)
    bad = torch.tensor([0, 5, 77, 199])
    s[bad, torch.tensor([0, 9, 4, 3])] = value
    plan = ops.sinkhorn_plan(s, group, 3, epsilon=epsilon, backend=backend)
    assignment = ops.sinkhorn_assign(s, group, 3, epsilon=epsilon, backend=backend)
    assert plan[bad].isnan().all() and (assignment[bad] == -1).all()
    without = group.clone()
    without[bad] = -1
    clean = torch.ones(200, dtype=torch.bool)
    clean[bad] = False
    assert torch.equal(plan[clean], ops.sinkhorn_plan(s, without, 3, epsilon=epsilon, backend=backend)[clean])
    assert torch.equal(assignment, ops.sinkhorn_assign(s, without, 3, epsilon=epsilon, backend=backend))


def test_a_group_with_one_finite_row_counts_as_one_pixel(isa):
    s = torch.tensor([[0.1, 0.9], [math.nan, 0.0], [0.5, math.inf]])
    assert ops.sinkhorn_assign(s, torch.zeros(3, dtype=torch.int64), 1).tolist() == [1, -1, -1]


def test_rows_that_are_not_finite_get_no_gradient(isa):
    s, group = problem(60, 4, 2, ignored=False)
    s[7, 2] = math.nan
    s.requires_grad_()
    plan = ops.sinkhorn_plan(s, group, 2)
    plan.backward(torch.randn(60, 4))
    assert s.grad.isfinite().all() and (s.grad[7] == 0).all() and (s.grad[8] != 0).any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_input(backend):
    s = torch.zeros(0, 4, requires_grad=True)
    group = torch.zeros(0, dtype=torch.int64)
    plan = ops.sinkhorn_plan(s, group, 3, backend=backend)
    plan.sum().backward()
    assert plan.shape == (0, 4) and s.grad.shape == (0, 4)
    assert ops.sinkhorn_assign(s, group, 3, backend=backend).shape == (0,)


# the steps that each group needs differ: group 0 is uniform at once, group 2 is far from balance
@pytest.mark.parametrize("epsilon", [0.1, 0.03])
@pytest.mark.parametrize("tolerance", [1e-1, 1e-2, 1e-3])
def test_each_group_stops_by_itself(isa, epsilon, tolerance):
    s, group = problem(400, 5, 4, dtype=torch.float64, ignored=False)
    s[group == 0] = 0.5
    s[group == 2, 0] += 0.7
    want = exact(s, group, 4, epsilon=epsilon, iterations=60, tolerance=tolerance)
    plan, _, steps = op.sinkhorn_plan(SinkhornCall(s, group, 4, epsilon, 60, tolerance, "cpu"))
    assert steps.tolist() == want.steps.tolist() and steps[0] == 1 and len(set(steps.tolist())) > 1
    torch.testing.assert_close(plan, want.plan, rtol=1e-11, atol=0)
    for g in range(4):
        assert (plan[group == g].mean(0) * 5 - 1).abs().max() <= tolerance * (1 + 1e-9) or steps[g] == 60


def test_a_tolerance_that_is_never_met_changes_nothing(isa):
    s, group = problem(200, 10, 3)
    assert torch.equal(ops.sinkhorn_plan(s, group, 3, tolerance=0.0), ops.sinkhorn_plan(s, group, 3))


def test_a_loose_tolerance_stops_after_one_step(isa):
    s, group = problem(200, 10, 3)
    assert torch.equal(ops.sinkhorn_plan(s, group, 3, tolerance=1e6), ops.sinkhorn_plan(s, group, 3, iterations=1))
    assert torch.equal(ops.sinkhorn_assign(s, group, 3, tolerance=1e6), ops.sinkhorn_assign(s, group, 3, iterations=1))


def test_absent_groups_count_no_step():
    s, _ = problem(20, 4, 1)
    _, history, steps = op.sinkhorn_plan(SinkhornCall(s, torch.full((20,), 2), 4, 0.05, 3, -1.0, "cpu"))
    assert steps.tolist() == [0, 0, 3, 0] and (history[:, [0, 1, 3]] == 0).all() and history.isfinite().all()


@pytest.mark.parametrize("epsilon", [0.05, 0.01])
def test_any_number_of_threads_gives_the_same_bits(isa, epsilon):
    s, group = problem(20000, 10, 30)
    grad = torch.randn(20000, 10)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            x = s.clone().requires_grad_()
            plan = ops.sinkhorn_plan(x, group, 30, epsilon=epsilon)
            plan.backward(grad)
            results.append((plan.detach(), x.grad, ops.sinkhorn_assign(s, group, 30, epsilon=epsilon)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


def test_many_chunks_match_the_reference(isa):
    s, group = problem(40000, 10, 19)
    want = exact(s, group, 19)
    close_plan(ops.sinkhorn_plan(s, group, 19), s, want.plan, 0.05)
    same_assignment(ops.sinkhorn_assign(s, group, 19), want.assignment, want.plan, 1e-4)


def test_groups_in_runs_equal_groups_at_random(isa):
    s, group = problem(900, 10, 5, dtype=torch.float64)
    order = group.argsort(stable=True)
    torch.testing.assert_close(
        ops.sinkhorn_plan(s[order], group[order], 5), ops.sinkhorn_plan(s, group, 5)[order], rtol=1e-11, atol=0
    )


def test_a_constant_per_group_changes_nothing(isa):
    s, group = problem(300, 6, 3, dtype=torch.float64, ignored=False)
    shift = torch.tensor([0.0, 40.0, -900.0], dtype=torch.float64)[group, None]
    torch.testing.assert_close(ops.sinkhorn_plan(s + shift, group, 3), ops.sinkhorn_plan(s, group, 3), rtol=1e-9, atol=0)


def strided(s, layout):
    """`s` in another memory layout."""
    if layout == "columns":
        return s.t().contiguous().t()
    if layout == "slice":
        wide = s.new_full((2 * s.shape[0], s.shape[1] + 3), math.nan)
        wide[::2, 1 : 1 + s.shape[1]] = s
        return wide[::2, 1 : 1 + s.shape[1]]
    if layout == "every other":
        wide = s.new_full((s.shape[0], 2 * s.shape[1]), math.nan)
        wide[:, ::2] = s
        return wide[:, ::2]
    return s


@pytest.mark.parametrize("layout", ["columns", "slice", "every other"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_any_strides(isa, layout, dtype):
    s, group = problem(150, 10, 3, dtype=dtype)
    view = strided(s, layout)
    assert not view.is_contiguous()
    assert torch.equal(ops.sinkhorn_plan(view, group, 3), ops.sinkhorn_plan(s, group, 3))
    assert torch.equal(ops.sinkhorn_assign(view, group, 3), ops.sinkhorn_assign(s, group, 3))


def test_expanded_similarity(isa):
    s = torch.rand(10).expand(40, 10)
    torch.testing.assert_close(ops.sinkhorn_plan(s), torch.full((40, 10), 0.1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int16, torch.int8])
def test_group_of_any_integer_dtype_and_shape(dtype):
    s, group = problem(60, 5, 4)
    want = ops.sinkhorn_assign(s, group, 4)
    assert torch.equal(ops.sinkhorn_assign(s, group.to(dtype), 4), want)
    assert torch.equal(ops.sinkhorn_assign(s, group.view(3, 4, 5), 4), want)


def test_inputs_are_left_alone(isa):
    s, group = problem(100, 10, 4)
    before = s.clone(), group.clone()
    ops.sinkhorn_assign(s, group, 4)
    ops.sinkhorn_plan(s, group, 4)
    assert torch.equal(s, before[0]) and torch.equal(group, before[1])


def gradient(s, group, groups, grad, backend, **options):
    x = s.clone().requires_grad_()
    ops.sinkhorn_plan(x, group, groups, backend=backend, **options).backward(grad)
    return x.grad


@pytest.mark.parametrize("width", [1, 3, 10, 16, 20, 40])
@pytest.mark.parametrize("epsilon", [0.05, 0.02])
def test_gradient_matches_the_float64_reference(isa, width, epsilon):
    s, group = problem(500, width, 5)
    grad = torch.randn(500, width)
    want = gradient(s.double(), group, 5, grad.double(), "reference", epsilon=epsilon)
    scale = grad.abs().max().item() / epsilon
    assert_close(
        gradient(s, group, 5, grad, "cpu", epsilon=epsilon), want, "plan_gradient", terms=terms(s, epsilon), scale=scale
    )
    double = gradient(s.double(), group, 5, grad.double(), "cpu", epsilon=epsilon)
    assert_close(double, want, "plan_gradient", terms=terms(s, epsilon), scale=scale)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_gradient_of_16_bit_similarities(isa, dtype):
    s, group = problem(300, 10, 4, dtype=dtype)
    grad = torch.randn(300, 10)
    got = gradient(s, group, 4, grad, "cpu")
    assert got.dtype == dtype
    want = gradient(s.double(), group, 4, grad.double(), "reference")
    scale = grad.abs().max().item() / 0.05
    assert_close(got, want, "plan_gradient", terms=terms(s, 0.05), scale=scale)


@pytest.mark.parametrize(("backend", "iterations"), [("cpu", 0), ("cpu", 1), ("cpu", 2), ("cpu", 3), ("reference", 2)])
@pytest.mark.parametrize("epsilon", [0.3, 0.02])  # linear and log form
def test_gradcheck(backend, epsilon, iterations):
    s, group = problem(10, 3, 2, dtype=torch.float64)
    s.requires_grad_()
    # at 0.02 a step of 1e-6 moves an exponent by 5e-5
    assert torch.autograd.gradcheck(
        lambda x: ops.sinkhorn_plan(x, group, 2, epsilon=epsilon, iterations=iterations, backend=backend),
        (s,), eps=1e-7, atol=1e-5, rtol=1e-4,
    )  # fmt: skip


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_gradcheck_where_groups_stop_at_different_steps(backend):
    s, group = problem(12, 3, 3, dtype=torch.float64, ignored=False)
    s[group == 0] = 0.25
    assert len(set(op.sinkhorn_plan(SinkhornCall(s, group, 3, 0.5, 40, 1e-3, "cpu"))[2].tolist())) > 1
    s.requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: ops.sinkhorn_plan(x, group, 3, epsilon=0.5, iterations=40, tolerance=1e-3, backend=backend), (s,)
    )


def test_expanded_and_sliced_gradients(isa):
    s, group = problem(120, 10, 3)
    row = torch.randn(10)
    dense = gradient(s, group, 3, row.expand(120, 10).contiguous(), "cpu")
    assert torch.equal(gradient(s, group, 3, row.expand(120, 10), "cpu"), dense)
    wide = torch.randn(120, 25)
    assert torch.equal(
        gradient(s, group, 3, wide[:, 3:23:2], "cpu"), gradient(s, group, 3, wide[:, 3:23:2].contiguous(), "cpu")
    )
    tall = torch.randn(10, 120)
    assert torch.equal(gradient(s, group, 3, tall.t(), "cpu"), gradient(s, group, 3, tall.t().contiguous(), "cpu"))


def test_gradient_of_a_plan_nobody_used(isa):
    s, group = problem(20, 4, 2)
    s.requires_grad_()
    ops.sinkhorn_plan(s, group, 2)
    (s * 2).sum().backward()
    assert (s.grad == 2).all()


def test_gradient_of_a_constant_is_zero(isa):
    s, group = problem(100, 10, 3)
    # rows sum to 1 whatever s is; what is left is rounding times 1/epsilon
    assert gradient(s, group, 3, torch.ones(100, 10), "cpu").abs().max() < 1e-4


def test_assignment_has_no_gradient():
    s, group = problem(20, 4, 2)
    assert not ops.sinkhorn_assign(s.requires_grad_(), group, 2).requires_grad
    assert not ops.sinkhorn_assign(s, group, 2, backend="reference").requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(dtype):
    s, group = problem(40, 5, 3, dtype=dtype)
    torch.library.opcheck(op.sinkhorn_assign.overload, (s, group, 3, 0.05, 3, -1.0, "cpu"))
    torch.library.opcheck(op.sinkhorn_plan.overload, (s.requires_grad_(), group, 3, 0.05, 3, -1.0, "cpu"))
    torch.library.opcheck(
        op.sinkhorn_plan.overload, (strided(s.detach(), "columns").requires_grad_(), None, 1, 0.05, 3, 0.1, "cpu")
    )
    _, history, steps = op.sinkhorn_plan(SinkhornCall(s.detach(), group, 3, 0.05, 3, -1.0, "cpu"))
    torch.library.opcheck(
        op.sinkhorn_plan_backward.overload, (s.detach(), group, 3, 0.05, history, steps, torch.randn(5).expand(40, 5), "cpu")
    )


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compile_with_dynamic_shapes(backend):
    def step(x, group):
        plan = ops.sinkhorn_plan(x, group, 4, epsilon=0.1)
        return (plan * x).sum(), ops.sinkhorn_assign(x, group, 4, epsilon=0.1)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for pixels in (40, 77):
        s, group = problem(pixels, 6, 4)
        x, y = s.clone().requires_grad_(), s.clone().requires_grad_()
        loss, assignment = compiled(x, group)
        want, expected = step(y, group)
        loss.backward()
        want.backward()
        torch.testing.assert_close(loss, want)
        torch.testing.assert_close(x.grad, y.grad)
        assert torch.equal(assignment, expected)


def test_compile_of_the_reference():
    torch._dynamo.reset()
    s, group = problem(40, 6, 4)
    compiled = torch.compile(
        lambda x, g: ops.sinkhorn_assign(x, g, 4, tolerance=0.1, backend="reference"), fullgraph=True, backend="aot_eager"
    )
    assert torch.equal(compiled(s, group), ops.sinkhorn_assign(s, group, 4, tolerance=0.1))


def test_autocast_keeps_dtypes(isa):
    s, group = problem(60, 10, 3)
    with torch.autocast("cpu", torch.bfloat16):
        plan = ops.sinkhorn_plan(s.requires_grad_(), group, 3)
        assert torch.equal(ops.sinkhorn_assign(s, group, 3), ops.sinkhorn_assign(s.detach(), group, 3))
    assert plan.dtype == torch.float32 and torch.equal(plan, ops.sinkhorn_plan(s, group, 3))
    plan[:, 0].sum().backward()
    assert s.grad.dtype == torch.float32


def test_backends_agree():
    s, group = problem(200, 10, 3)
    with use_backend("reference"):
        plan, assignment = ops.sinkhorn_plan(s, group, 3), ops.sinkhorn_assign(s, group, 3)
    torch.testing.assert_close(plan, ops.sinkhorn_plan(s, group, 3, backend="cpu"), rtol=2e-5, atol=0)
    assert torch.equal(assignment, ops.sinkhorn_assign(s, group, 3, backend="cpu"))


@pytest.mark.parametrize("backend", ["cpu", "reference"])
@pytest.mark.parametrize("op", [ops.sinkhorn_assign, ops.sinkhorn_plan])
def test_group_beyond_the_last_is_named(backend, op):
    s, group = problem(3000, 4, 3)
    group[2500], group[2800] = 3, 9
    text = rf"{op.__name__}: labels must be in \[0,(3|num_classes)\), ignore_index or negative; got 3 at pixel 2500"
    with pytest.raises(ValueError, match=text):
        op(s, group, 3, backend=backend)


S, GROUP = torch.zeros(6, 4), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "text"),
    [
        (
            (S.long(), GROUP, 2),
            {},
            TypeError,
            r"similarity must be a float32, float64, float16 or bfloat16 tensor; got \[6, 4\] int64",
        ),
        ((S[0], GROUP, 2), {}, ValueError, r"similarity must be \[N,K\] or \[B,K,H,W\] with K > 0; got \[4\] float32"),
        ((S[:, :0], GROUP, 2), {}, ValueError, r"similarity must be \[N,K\] or \[B,K,H,W\] with K > 0; got \[6, 0\]"),
        ((S, GROUP[:5], 2), {}, ValueError, r"labels must be \[N\]=\[6\] to match similarity; got \[5\] int64"),
        ((S, GROUP.float(), 2), {}, TypeError, r"labels must be an integer tensor; got \[6\] float32"),
        ((S, GROUP.bool(), 2), {}, TypeError, r"labels must be an integer tensor"),
        ((S, GROUP.to("meta"), 2), {}, ValueError, r"labels must be on cpu like similarity; got meta"),
        ((S, GROUP, 0), {}, ValueError, r"num_classes must be a positive integer; got 0"),
        ((S, GROUP, 2), {"epsilon": 0.0}, ValueError, r"epsilon must be finite and positive; got 0.0"),
        ((S, GROUP, 2), {"epsilon": -1.0}, ValueError, r"epsilon must be finite and positive; got -1.0"),
        ((S, GROUP, 2), {"epsilon": math.inf}, ValueError, r"epsilon must be finite and positive; got inf"),
        ((S, GROUP, 2), {"epsilon": math.nan}, ValueError, r"epsilon must be finite and positive; got nan"),
        ((S, GROUP, 2), {"iterations": -1}, ValueError, r"iterations must be a non-negative integer; got -1"),
        ((S, GROUP, 2), {"tolerance": -1e-3}, ValueError, r"tolerance must be None or 0 or more; got -0.001"),
        ((S, GROUP, 2), {"tolerance": math.nan}, ValueError, r"tolerance must be None or 0 or more; got nan"),
        ((S, GROUP, 2), {"backend": "cuda"}, RuntimeError, r"backend 'cuda' was asked for but cannot run"),
        ((S, GROUP, 2), {"backend": "gpu"}, ValueError, r"backend must be one of"),
    ],
)
@pytest.mark.parametrize("op", [ops.sinkhorn_assign, ops.sinkhorn_plan])
def test_errors_name_the_argument(op, arguments, options, error, text):
    with pytest.raises(error, match=rf"^{op.__name__}: {text}"):
        op(*arguments, **options)


def test_errors_of_the_optional_group():
    with pytest.raises(ValueError, match=r"^sinkhorn_plan: num_classes must be given with labels; got None"):
        ops.sinkhorn_plan(S, GROUP)
    with pytest.raises(ValueError, match=r"^sinkhorn_plan: num_classes must be None or 1 without labels; got 3"):
        ops.sinkhorn_plan(S, None, 3)
    with pytest.raises(TypeError, match=r"^sinkhorn_assign: labels must be an integer tensor; got None"):
        ops.sinkhorn_assign(S, None, 1)


@given(
    pixels=st.integers(0, 40),
    width=st.integers(1, 35),
    groups=st.integers(1, 6),
    epsilon=st.sampled_from([0.003, 0.05, 1.0]),
    iterations=st.integers(0, 4),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(["rows", "columns", "slice", "every other"]),
    tolerance=st.sampled_from([None, 1e-3]),
    bad=st.booleans(),
    seed=st.integers(0, 10),
)
def test_any_problem_matches_the_reference(pixels, width, groups, epsilon, iterations, dtype, layout, tolerance, bad, seed):
    s, group = problem(pixels, width, groups, dtype=dtype, seed=seed)
    if bad and pixels:
        s[pixels // 2, width // 2] = math.nan
    s = strided(s, layout)
    options = {"epsilon": epsilon, "iterations": iterations, "tolerance": tolerance}
    want = exact(s, group, groups, **options)
    close_plan(ops.sinkhorn_plan(s, group, groups, **options), s, want.plan, epsilon)
    if iterations:
        same_assignment(ops.sinkhorn_assign(s, group, groups, **options), want.assignment, want.plan, 1e-3)
