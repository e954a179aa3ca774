"""The C++ upsample kernels: every instruction set, windows, threads, memory, extreme scores, and torch's checks of the ops."""

import bisect
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from test_upsample import DTYPES, IGNORE, expected_loss, normal, random_labels
from tolerances import assert_close
from upsample_check import interpolation, loss_call, upsampled

from dnc_kernels import ops
from dnc_kernels.ops.upsample import op, reference
from dnc_kernels.ops.upsample.calls import ArgmaxCall


def check(scores, labels, align_corners=False, weight=None, grad=None, **options):
    """Loss and gradient against float64, whose positions are exact as the kernel's are."""
    leaf = scores.detach().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, labels, align_corners=align_corners, weight=weight, backend="cpu", **options)
    wide = scores.detach().double().requires_grad_()
    expected = expected_loss(wide, labels.long(), align_corners, weight, **options)
    grad = torch.randn(loss.shape, dtype=loss.dtype) if grad is None else grad
    (actual_grad,) = torch.autograd.grad(loss, leaf, grad)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    check_against(loss.detach(), actual_grad, expected.detach(), expected_grad, scores, labels)


def check_against(loss, grad, expected_loss, expected_grad, scores, labels):
    classes, size = scores.shape[1], 1 + float(scores.abs().max())
    assert_close(loss, expected_loss, "upsampled_loss", terms=classes, scale=size)
    if classes == 1:
        assert not grad.any()
        return
    pixels = (2 + 2 * labels.shape[1] // scores.shape[2]) * (2 + 2 * labels.shape[2] // scores.shape[3])
    scale = size * float(expected_grad.abs().max())
    assert_close(grad, expected_grad, "upsampled_gradient", terms=classes + pixels, scale=scale)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("c", (1, 2, 15, 16, 17, 40))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_every_instruction_set(isa, dtype, c, reduction):
    labels = random_labels(2, c, (21, 70))
    check(normal(2, c, 11, 19, dtype=dtype), labels, weight=torch.rand(c) + 0.1, label_smoothing=0.1, reduction=reduction)
    check(normal(2, c, 9, 40, dtype=dtype), labels, align_corners=True, reduction=reduction)


@pytest.mark.parametrize("c", (*range(1, 17), 40, 41))
def test_few_classes_on_every_instruction_set(isa, c):
    """Growing, equal and shrinking odd sizes, even and uneven steps: lanes are pixels up to some number of classes."""
    sizes = [((7, 9), (21, 45)), ((5, 37), (13, 83)), ((6, 35), (6, 35)), ((11, 23), (7, 19)), ((3, 2), (5, 70))]
    for i, ((h, w), size) in enumerate(sizes):
        by_layout = layouts(normal(2, c, h, w))
        first, second = ("contiguous", "channels_last")[:: 1 - 2 * (i % 2)]
        labels, weight = random_labels(2, c, size), torch.rand(c) + 0.1
        check(by_layout[first], labels, weight=weight, label_smoothing=0.1)
        check(by_layout[second], labels, align_corners=True, reduction="none")


@pytest.mark.parametrize("c", (2, 33))
@pytest.mark.parametrize("scale", (1, 2, 4, 8, 16))
def test_strips_and_blocks(scale, c):
    """Maps wider than a strip and higher than a block, at group sizes 1 to 4 and beyond."""
    check(normal(2, c, 19, 45), random_labels(2, c, (19 * scale, 45 * scale), 0.5))


def test_rows_of_pixels_longer_than_a_strip(isa):
    check(normal(1, 2, 3, 700), random_labels(1, 2, (7, 2800)), reduction="none")


def layouts(t):
    """The same values in four memory layouts."""
    sparse = torch.zeros([2 * n for n in t.shape], dtype=t.dtype)
    view = sparse[tuple(slice(None, None, 2) for _ in t.shape)]
    view.copy_(t)
    order = tuple(range(t.ndim))[::-1]
    return {
        "contiguous": t,
        "every other": view,
        "reversed": t.permute(order).contiguous().permute(order),
        "channels_last": t.movedim(1, -1).contiguous().movedim(-1, 1),
    }


LAYOUTS = ("contiguous", "every other", "reversed", "channels_last")


@given(
    sizes=st.tuples(*[st.integers(1, 20)] * 4),
    b=st.integers(1, 3),
    c=st.integers(1, 20),
    dtype=st.sampled_from(DTYPES),
    labels_dtype=st.sampled_from((torch.int64, torch.int32, torch.uint8)),
    scores_layout=st.sampled_from(LAYOUTS),
    labels_layout=st.sampled_from(LAYOUTS),
    align_corners=st.booleans(),
    weighted=st.booleans(),
    smoothing=st.sampled_from((0.0, 0.2)),
    reduction=st.sampled_from(("mean", "sum", "none")),
)
def test_any_layout(
    sizes, b, c, dtype, labels_dtype, scores_layout, labels_layout, align_corners, weighted, smoothing, reduction
):
    labels = random_labels(b, c, sizes[2:])
    labels[0, 0, 0] = c - 1
    labels[labels == IGNORE] = 255
    check(
        layouts(normal(b, c, *sizes[:2], dtype=dtype))[scores_layout],
        layouts(labels.to(labels_dtype))[labels_layout],
        align_corners,
        torch.rand(c) + 0.1 if weighted else None,
        label_smoothing=smoothing, reduction=reduction, ignore_index=255,
    )  # fmt: skip


@pytest.mark.parametrize("grad", ("expanded", "strided"))
def test_incoming_gradients_of_none(grad):
    scores, labels = normal(2, 5, 4, 6), random_labels(2, 5, (9, 13))
    given = {"expanded": torch.tensor(0.7).expand(2, 9, 13), "strided": torch.randn(13, 9, 4).permute(2, 1, 0)[::2]}[grad]
    check(scores, labels, grad=given, reduction="none")


# scores far from each other, NaN, Inf


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("c", (2, 7, 40))
@pytest.mark.parametrize("size", (30, 300, 3e4))
def test_winners_that_differ_between_neighbours(isa, dtype, c, size):
    """Halfway between two pixels with different winners the interpolated maximum is far above the maximum."""
    scores = size * F.one_hot(torch.randint(c, (2, 6, 6)), c).movedim(-1, 1).to(dtype)
    labels, weight = random_labels(2, c, (24, 21)), torch.rand(c) + 0.1
    check(scores + normal(2, c, 6, 6, dtype=dtype), labels, reduction="none")
    check(size * normal(2, c, 6, 6, dtype=dtype), labels, label_smoothing=0.1)
    check(size * normal(2, c, 6, 6, dtype=dtype), labels, weight=weight, label_smoothing=0.1, reduction="none")


@pytest.mark.parametrize("c", (2, 8, 30))
@pytest.mark.parametrize("size", ((5, 6), (20, 18), (3, 4)), ids=str)
def test_a_class_masked_by_minus_infinity_takes_no_part(isa, size, c):
    scores, labels = normal(2, c + 1, 5, 6), random_labels(2, c, size)
    scores[:, c] = -torch.inf
    leaves = [s.clone().requires_grad_() for s in (scores, scores[:, :c])]
    losses = [ops.upsample_cross_entropy(s, labels, backend="cpu") for s in leaves]
    grads = [torch.autograd.grad(loss, s)[0] for loss, s in zip(losses, leaves, strict=True)]
    assert not grads[0][:, c].any()
    check_against(losses[0].detach(), grads[0][:, :c], losses[1].detach().double(), grads[1].double(), scores[:, :c], labels)


@pytest.mark.parametrize("bad", (torch.nan, torch.inf))
@pytest.mark.parametrize("c", (2, 3, 30))
@pytest.mark.parametrize("size", ((18, 28), (6, 7), (6, 28), (18, 7), (4, 5), (14, 35)), ids=str)
def test_nan_and_inf_reach_only_pixels_they_have_a_share_in(isa, size, bad, c):
    scores = normal(1, c, 6, 7).requires_grad_()
    with torch.no_grad():
        scores[0, c // 2, 2, 4] = bad
    rows, columns = interpolation(6, size[0], False), interpolation(7, size[1], False)
    touched = (rows[:, 2, None] * columns[None, :, 4]) > 0
    loss = ops.upsample_cross_entropy(scores, random_labels(1, c, size, 0.0), reduction="none", backend="cpu")
    assert torch.equal(loss[0].isnan(), touched)
    loss.sum().backward()
    sources = torch.einsum("Hh,HW,Ww->hw", rows, touched.double(), columns) > 0
    assert torch.equal(scores.grad[0].isnan().all(0), sources) and torch.equal(scores.grad[0].isnan().any(0), sources)


def test_scores_that_are_all_minus_infinity_are_nan(isa):
    scores = torch.full((1, 3, 2, 2), -torch.inf)
    assert ops.upsample_cross_entropy(scores, torch.zeros(1, 4, 4, dtype=torch.int64), backend="cpu").isnan()


def test_ignored_nan_pixels_add_nothing(isa):
    scores = torch.full((1, 3, 4, 4), torch.nan, requires_grad=True)
    loss = ops.upsample_cross_entropy(scores, torch.full((1, 8, 8), IGNORE), reduction="sum", backend="cpu")
    loss.backward()
    assert loss == 0 and not scores.grad.any()


# the early gradient


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_a_scaled_half_precision_gradient_does_not_underflow(dtype):
    """As GradScaler drives it: 2^20 pixels, of which each adds less than the smallest float16."""
    scores, labels = normal(1, 3, 64, 64, dtype=dtype), random_labels(1, 3, (1024, 1024), 0.0)
    check(scores, labels, grad=torch.tensor(65536.0))


def test_a_sum_beyond_half_precision_keeps_its_mean():
    """The summed gradient, 2^20 / 4 a class, is not a float16; the mean's is."""
    labels = torch.zeros(1, 1024, 1024, dtype=torch.int64)
    check(torch.zeros(1, 2, 1, 1, dtype=torch.float16), labels, grad=torch.tensor(1.0))


def test_two_backward_passes_agree():
    scores, labels = normal(2, 5, 4, 6).requires_grad_(), random_labels(2, 5, (9, 13))
    loss = 2 * ops.upsample_cross_entropy(scores, labels, backend="cpu")
    first = torch.autograd.grad(loss, scores, retain_graph=True)[0]
    assert torch.equal(first, torch.autograd.grad(loss, scores)[0])


def test_early_and_late_gradients_agree():
    scores, labels = normal(2, 5, 4, 6).requires_grad_(), random_labels(2, 5, (9, 13))
    call = loss_call(scores, labels, label_smoothing=0.1)
    early, late = (torch.autograd.grad(op._loss(call, "mean", e).loss, scores)[0] for e in (True, False))
    torch.testing.assert_close(early, late)


# determinism, memory


@pytest.mark.parametrize("c", (2, 21, 40))
@pytest.mark.parametrize("sizes", (((40, 24), (80, 72)), ((40, 24), (40, 24)), ((40, 60), (17, 33))), ids=str)
def test_bit_equal_for_any_number_of_threads(isa, sizes, c):
    (h, w), size = sizes
    size = tuple(8 * n for n in size) if c == 2 else size  # work enough for several threads
    scores, labels = normal(2, c, h, w), random_labels(2, c, size)
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            runs.append((
                *op.cross_entropy_with_gradient(loss_call(scores, labels), True, None),
                op.upsample_argmax(ArgmaxCall(scores, False, "cpu"), *size),
            ))  # fmt: skip
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0], strict=True))


def resident(field):
    (line,) = (t for t in Path("/proc/self/status").read_text().splitlines() if t.startswith(field))
    return int(line.split()[1]) * 1024


def test_peak_memory_is_a_few_rows_beside_the_gradient():
    """The process' peak, scratch memory of the kernel included, over a loss whose [B,C,H,W] would be 134 MB."""
    scores, labels = normal(2, 64, 32, 32).requires_grad_(), random_labels(2, 64, (512, 512))
    ops.upsample_cross_entropy(normal(1, 2, 8, 8).requires_grad_(), random_labels(1, 2, (64, 64)), backend="cpu").backward()
    try:
        Path("/proc/self/clear_refs").write_text("5")
        before = resident("VmRSS")
    except OSError:
        pytest.skip("the peak of a running process cannot be reset here")
    loss = ops.upsample_cross_entropy(scores, labels, backend="cpu")
    label = ops.upsample_argmax(scores, 512, backend="cpu")
    loss.backward()
    assert resident("VmHWM") - before < 2**21 + scores.nbytes + label.nbytes


def test_backward_of_a_scaled_loss_makes_no_second_gradient():
    scores = normal(2, 40, 16, 16).requires_grad_()
    loss = 3 * ops.upsample_cross_entropy(scores, random_labels(2, 40, (32, 32)), backend="cpu")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max([*sizes, 0]) < scores.nbytes


# windows


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", ((16, 64), (16, 7), (5, 5), (30, 3), (1, 6), (7, 1), (37, 90)), ids=str)
def test_lower_source_rows_are_exact(sizes, align_corners):
    source, target = sizes
    for i, low in enumerate(reference.target_rows_of(source, target, align_corners)):
        at = Fraction(i * (source - 1), max(target - 1, 1)) if align_corners else Fraction((2 * i + 1) * source, 2 * target)
        assert low == max(int(at if align_corners else at - Fraction(1, 2)), 0)


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize(
    "sizes", (((16, 12), (64, 50)), ((16, 12), (7, 9)), ((5, 5), (5, 5)), ((9, 4), (31, 4)), ((7, 3), (7, 9)))
)
@pytest.mark.parametrize("c", (2, 5, 30))
def test_bands_add_up_to_the_map(backend, sizes, align_corners, c):
    (h, w), size = sizes
    scores, labels = normal(2, c, h, w), random_labels(2, c, size)
    options = {"class_weight": torch.rand(c) + 0.1, "ignore_index": IGNORE, "label_smoothing": 0.1}
    low = reference.target_rows_of(h, size[0], align_corners)
    loss, grad = torch.zeros(()), torch.zeros_like(scores)
    for r0 in range(0, h, 3):
        r1 = min(r0 + 3, h)
        i0, i1 = bisect.bisect_left(low, r0), bisect.bisect_left(low, r1)
        rows = slice(r0, min(r1, h - 1) + 1)
        call = loss_call(
            scores[:, :, rows],
            labels[:, i0:i1],
            align_corners=align_corners,
            window=(h, r0, size[0], i0),
            backend=backend,
            **options,
        )
        some, some_grad = op.cross_entropy_with_gradient(call, True, None)
        loss += some
        grad[:, :, rows] += some_grad
    wide = scores.double().requires_grad_()
    expected = expected_loss(
        wide, labels, align_corners, options["class_weight"], ignore_index=IGNORE, label_smoothing=0.1, reduction="sum"
    )
    check_against(loss, grad, expected.detach(), torch.autograd.grad(expected, wide)[0], scores, labels)


def test_a_window_without_gradient():
    scores, labels = normal(2, 5, 4, 4), random_labels(2, 5, (8, 8))
    both = [op.cross_entropy_with_gradient(loss_call(scores, labels), grad, None) for grad in (True, False)]
    assert torch.equal(both[0][0], both[1][0]) and both[1][1] is None


@pytest.mark.parametrize("window", ((8, 2, 16, 6), (8, 1, 16, 9), (4, 1, 16, 4), (8, 0, 10, 4), (8, -1, 16, 0)), ids=str)
def test_a_window_without_the_rows_it_needs(window):
    """Rows 4 to 11 of 16 lie between the source rows 1 to 6 of 8."""
    scores, labels = normal(1, 3, 4, 4), random_labels(1, 3, (8, 8))
    with pytest.raises(ValueError, match=r"upsample_cross_entropy: the window (lies outside the map|lacks source rows)"):
        op.cross_entropy_with_gradient(loss_call(scores, labels, window=window), True, None)


# argmax


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("c", (*range(1, 18), 40, 41))
@pytest.mark.parametrize("size", ((40, 61), (11, 19), (5, 40), (22, 57)), ids=str)
def test_argmax_on_every_instruction_set(isa, c, size, align_corners):
    scores = normal(2, c, 11, 19)
    label = ops.upsample_argmax(scores, size, align_corners=align_corners, backend="cpu")
    logits = upsampled(scores, size, align_corners)
    assert_close(
        logits.gather(1, label[:, None])[:, 0].float(),
        logits.amax(1),
        "upsampled_loss",
        terms=1,
        scale=float(scores.abs().max()),
    )


@pytest.mark.parametrize("c", (2, 5, 21, 40))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_argmax_of_any_layout(layout, c):
    scores = normal(2, c, 11, 19)
    assert torch.equal(
        ops.upsample_argmax(layouts(scores)[layout], (23, 40), backend="cpu"),
        ops.upsample_argmax(scores, (23, 40), backend="cpu"),
    )


@pytest.mark.parametrize("c", (2, 3, 9, 17, 40))
def test_argmax_of_equal_classes_is_the_lowest(isa, c):
    scores = normal(2, 2, 6, 7).amax(1, keepdim=True).repeat(1, c, 1, 1)
    scores[:, 0] -= 1
    assert (ops.upsample_argmax(scores, (25, 20), backend="cpu") == 1).all()


@pytest.mark.parametrize("c", (2, 5, 20, 40))
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_argmax_of_nan_and_inf_at_the_same_size_is_torchs(isa, bad, c):
    scores = normal(2, c, 6, 7)
    scores[torch.rand(scores.shape) < 0.1] = bad
    scores[0, :, 0, 0] = bad
    assert torch.equal(ops.upsample_argmax(scores, (6, 7), backend="cpu"), scores.argmax(1))


@pytest.mark.parametrize("c", [2, 5, 40])
@pytest.mark.parametrize("size", [(2, 3), (4, 6), (5, 7)])
def test_argmax_of_scores_up_to_the_ends_of_float32(isa, c, size):
    """Steps between neighbours that overflow; at the same size nothing is interpolated."""
    ends = torch.tensor([0.0, -0.0, 1.0, torch.finfo(torch.float32).max, torch.finfo(torch.float32).min])
    scores = ends[torch.randint(5, (3, c, 2, 3), generator=torch.Generator().manual_seed(0))]
    found = ops.upsample_argmax(scores, size, backend="cpu")
    wide = scores.double() if size == (2, 3) else F.interpolate(scores.double(), size, mode="bilinear")
    slack = 0 if size == (2, 3) else 1e-6 * scores.abs().max()  # what is interpolated may cancel
    assert (wide.gather(1, found[:, None]) >= wide.amax(1, keepdim=True) - slack).all()


@pytest.mark.parametrize("c", (2, 5, 20, 40))
def test_argmax_of_nan_spreads_to_pixels_with_a_share(isa, c):
    scores, winner = normal(1, c, 6, 7), c // 2
    scores[0, winner, 3, 4] = torch.nan
    touched = interpolation(6, 18, False)[:, 3, None] * interpolation(7, 28, False)[None, :, 4] > 0
    label = ops.upsample_argmax(scores, (18, 28), backend="cpu")[0]
    assert (label[touched] == winner).all()
    assert not torch.equal(label, ops.upsample_argmax(torch.full_like(scores, 0), (18, 28), backend="cpu")[0])


# torch's own checks


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(dtype):
    scores, labels = normal(2, 3, 3, 4, dtype=dtype).requires_grad_(), random_labels(2, 3, (5, 7))
    check = torch.library.opcheck
    call = loss_call(scores, labels, class_weight=torch.rand(3), align_corners=True, label_smoothing=0.1)
    for reduction, early in (("sum", True), ("none", False), ("mean", False)):
        check(op._loss.overload, (*call, reduction, early))
    # the early gradient, an output, is scaled in place by the backward pass, which the comparison of compiled outputs would see
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    call = loss_call(scores, labels, align_corners=True, label_smoothing=0.1)
    check(op._loss.overload, (*call, "mean", True), test_utils=utilities)
    check(op._loss_backward.overload, tuple(loss_call(scores.detach(), labels, grad_loss=torch.rand(2, 5, 7))))
    check(op.upsample_argmax.overload, (scores.detach(), False, "cpu", 5, 7))


def test_channels_last_scores_have_a_channels_last_gradient():
    scores = normal(2, 5, 4, 6).contiguous(memory_format=torch.channels_last).requires_grad_()
    for reduction in ("mean", "none"):
        loss = ops.upsample_cross_entropy(scores, random_labels(2, 5, (9, 13)), reduction=reduction, backend="cpu")
        (grad,) = torch.autograd.grad(loss.sum(), scores)
        assert grad.is_contiguous(memory_format=torch.channels_last)


def test_an_error_names_the_first_bad_pixel():
    labels = torch.zeros(2, 40, 40, dtype=torch.int64)
    labels[1, 30, 7] = 9
    labels[0, 39, 2] = 5
    with pytest.raises(ValueError, match=r"upsample_cross_entropy: labels must be in .*; got 5 at pixel 1562"):
        ops.upsample_cross_entropy(normal(2, 3, 20, 20), labels, backend="cpu")
