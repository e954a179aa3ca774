"""Upsampled cross-entropy and argmax in Triton, against float64: on a GPU where there is one, else under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
import upsample_check
from cuda_on_cpu import DEVICE
from tolerances import assert_close
from upsample_check import IGNORE, SIZES, normal, random_labels, upsampled

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.upsample import reference
from dnc_kernels.ops.upsample import triton as kernels

pytestmark = pytest.mark.triton

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(*args, **options):
    upsample_check.check("triton", *args, **options)


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_up_and_down(sizes, align_corners):
    (h, w), size = sizes
    check(normal(2, 3, h, w), random_labels(2, 3, size), align_corners, reduction="none")


def test_parts_and_whole_cells_are_the_same():
    """4 x 4 target pixels a thread, or 2 x 2 of a part of a cell."""
    scores, labels = normal(1, 2, 2, 2), random_labels(1, 2, (8, 7))
    for most in (4, 2):
        with (
            configured("log_sum_exp", MOST=most, BLOCK=16, num_warps=1),
            configured("gradient", MOST=most, BLOCK=16, ROWS=2, CLASSES=2, num_warps=1),
        ):
            check(scores, labels, reduction="sum")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_dtypes(dtype, reduction):
    check(normal(2, 4, 3, 4, dtype=dtype), random_labels(2, 4, (5, 7)), reduction=reduction)


@pytest.mark.parametrize(
    ("weighted", "smoothing", "reduction"),
    ((True, 0.0, "mean"), (True, 0.1, "mean"), (True, 0.1, "none"), (False, 0.1, "mean"), (False, 1.0, "none")),
)
def test_class_weights_and_smoothing(weighted, smoothing, reduction):
    weight = torch.rand(5).to(DEVICE) + 0.1 if weighted else None
    scores, labels = normal(1, 5, 2, 3), random_labels(1, 5, (3, 5))
    check(scores, labels, weight=weight, label_smoothing=smoothing, reduction=reduction)


def test_more_pixels_than_the_programs_of_the_loss_hold(monkeypatch):
    monkeypatch.setattr(kernels, "_PIXELS", 16)
    monkeypatch.setattr(kernels, "processors", lambda _: 1)
    scores, labels, weight = normal(1, 2, 4, 4), random_labels(1, 2, (15, 11)), torch.rand(2).to(DEVICE) + 0.1
    loss = ops.upsample_cross_entropy(scores, labels, weight=weight, backend="triton")
    expected = F.cross_entropy(upsampled(scores, (15, 11), False), labels, weight.double())
    assert_close(loss, expected, "interpolated_loss", terms=2, scale=1 + float(scores.abs().max()))


def test_sums_of_more_programs_than_a_block():
    partial, sums = torch.randn(70, 2, dtype=torch.float64, device=DEVICE), torch.empty(2, dtype=torch.float64, device=DEVICE)
    kernels.launch(kernels.add_sums_kernel, (1,), partial, sums, 70, BLOCK=32, num_warps=1)
    assert_close(sums, partial.sum(0), "sum", terms=70)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int32), ids=str)
def test_label_dtypes(dtype):
    scores, labels = normal(1, 3, 2, 3), torch.randint(3, (1, 4, 5)).to(DEVICE)
    labels[0, :2] = 255
    expected = ops.upsample_cross_entropy(scores, labels, ignore_index=255, backend="triton")
    assert torch.equal(ops.upsample_cross_entropy(scores, labels.to(dtype), ignore_index=255, backend="triton"), expected)


@pytest.mark.parametrize("view", ("channels_last", "crop", "expanded", "transposed"))
def test_strided_scores_and_labels(view):
    base = normal(2, 3, 2, 3)
    scores = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "crop": normal(3, 5, 6, 7)[1:, 1:4, 2:4, :3],
        "expanded": normal(1, 3, 2, 3).expand(2, 3, 2, 3),
        "transposed": normal(2, 3, 3, 2).transpose(2, 3),
    }[view]
    check(scores, random_labels(2, 3, (5, 4)).transpose(1, 2), reduction="none")


def test_expanded_gradient_of_none():
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    ops.upsample_cross_entropy(scores, labels, reduction="none", backend="triton").sum().backward()
    (expected,) = torch.autograd.grad(ops.upsample_cross_entropy(scores, labels, reduction="sum", backend="triton"), scores)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-6)


def test_labels_outside_the_classes_are_ignored():
    scores, labels = normal(1, 3, 2, 3), random_labels(1, 3, (4, 5))
    expected = ops.upsample_cross_entropy(scores, labels, reduction="sum", backend="triton")
    labels[labels == IGNORE] = 7
    assert torch.equal(ops.upsample_cross_entropy(scores, labels, reduction="sum", backend="triton"), expected)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_all_ignored_is_nan_with_zero_gradient(smoothing):
    scores = normal(1, 3, 3, 3).requires_grad_()
    labels = torch.full((1, 5, 5), IGNORE, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, label_smoothing=smoothing, backend="triton")
    loss.backward()
    assert loss.isnan() and not scores.grad.any()


def test_one_class_has_no_gradient():
    scores, labels = normal(1, 1, 2, 3).requires_grad_(), torch.zeros(1, 4, 5, dtype=torch.int64, device=DEVICE)
    ops.upsample_cross_entropy(scores, labels, backend="triton").backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


def test_ignored_pixels_count_for_nothing_whatever_their_scores():
    scores = normal(1, 3, 4, 4)
    scores[0, 1, 0, 0] = float("nan")
    scores[0, 2, 0, 1] = float("inf")
    scores = scores.requires_grad_()
    labels = torch.randint(3, (1, 8, 8)).to(DEVICE)
    labels[:, :4] = IGNORE
    loss = ops.upsample_cross_entropy(scores, labels, reduction="none", backend="triton")
    loss.sum().backward()
    assert not loss[:, :4].any() and loss[:, 4:].isfinite().all() and loss[:, 4:].all()
    assert not scores.grad[:, :, 0].any() and scores.grad.isfinite().all() and scores.grad[:, :, 2:].any()


@pytest.mark.parametrize("align_corners", (False, True))
def test_same_size_does_not_spread_nan(align_corners):
    scores = normal(1, 2, 3, 3)
    scores[0, 0, 1, 1] = float("nan")
    scores = scores.requires_grad_()
    labels = torch.zeros(1, 3, 3, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=align_corners, reduction="none", backend="triton")
    loss.sum().backward()
    bad = scores.detach()[:, 0].isnan()
    assert torch.equal(loss.isnan(), bad) and torch.equal(scores.grad.isnan(), bad[:, None].expand(1, 2, 3, 3))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
def test_bad_scores_reach_only_the_pixels_with_a_share_of_them(value):
    scores = normal(1, 3, 5, 5)
    scores[0, 1, 2, 2] = value
    scores = scores.requires_grad_()
    # with corners aligned, every other pixel lies on a source pixel and has no share of the next one
    labels = torch.zeros(1, 9, 9, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=True, reduction="none", backend="triton")
    loss.sum().backward()
    near, near_source = torch.zeros(9, 9, dtype=torch.bool, device=DEVICE), torch.zeros(5, 5, dtype=torch.bool, device=DEVICE)
    near[3:6, 3:6] = True
    near_source[1:4, 1:4] = True
    assert torch.equal(~loss[0].isfinite(), near)
    assert torch.equal(~scores.grad[0, 0].isfinite(), near_source)


def test_the_gradient_of_a_bad_pixel_reaches_only_what_it_has_a_share_of():
    scores = normal(1, 3, 5, 5)
    # Triton's interpreter lets a maximum keep a NaN, which hides nothing of an ignored pixel
    scores[0, 1, 2, 2] = float("nan" if DEVICE == "cuda" else "inf")
    labels = torch.full((1, 9, 9), IGNORE, device=DEVICE)
    labels[0, 4, 4] = 1  # on the bad source pixel itself
    grad = torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, None, True, IGNORE, 0.0, None, None, None, None, grad)
    assert grad[0, :, 2, 2].isnan().all()
    grad[0, :, 2, 2] = 0
    assert not grad.any()


def test_a_class_of_minus_infinity_takes_no_part():
    scores, labels = normal(1, 3, 2, 3), torch.randint(2, (1, 3, 5)).to(DEVICE)
    with_it = torch.cat((scores[:, :2], torch.full_like(scores[:, :1], -torch.inf), scores[:, 2:]), 1).requires_grad_()
    scores = scores.requires_grad_()
    losses = [ops.upsample_cross_entropy(s, labels, reduction="none", backend="triton") for s in (with_it, scores)]
    grads = [torch.autograd.grad(loss.sum(), s)[0] for loss, s in zip(losses, (with_it, scores), strict=True)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0][:, [0, 1, 3]], grads[1])
    assert not grads[0][:, 2].any()


def test_scores_far_apart_keep_their_small_terms():
    """The bound that corners give is far above the highest score of pixels near the other corner."""
    scores = normal(1, 3, 2, 2)
    scores[..., 0] += 300
    check(scores, random_labels(1, 3, (3, 9)), reduction="none")


@pytest.mark.parametrize("align_corners", (False, True))
def test_bands_add_up_to_the_whole_map(align_corners):
    scores, labels, options = normal(1, 2, 5, 3), random_labels(1, 2, (9, 5)), (None, align_corners, IGNORE, 0.1)
    sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, *options, None, None, sums, None, grad)
    lower = torch.tensor(reference.target_rows_of(5, 9, align_corners))
    total, total_grad = torch.zeros_like(sums), torch.zeros_like(grad)
    for r0, r1 in ((0, 2), (2, 5)):
        rows = ((lower >= r0) & (lower < r1)).nonzero()[:, 0]
        first, end, last = int(rows[0]), int(rows[-1]) + 1, min(r1 + 1, 5)
        band_sums, band_grad = torch.empty_like(sums), torch.empty_like(grad[:, :, r0:last])
        window = (5, r0, 9, first)
        kernels.cross_entropy(scores[:, :, r0:last], labels[:, first:end], *options, window, None, band_sums, None, band_grad)
        total += band_sums
        total_grad[:, :, r0:last] += band_grad
    torch.testing.assert_close(total, sums)
    torch.testing.assert_close(total_grad, grad, rtol=1e-5, atol=1e-6)


def test_gradients_into_views_and_half_precision_touch_nothing_else():
    scores, labels = normal(1, 3, 3, 4), random_labels(1, 3, (5, 6))
    expected = torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, expected)
    frame = torch.full((1, 5, 6, 8), 7.0, device=DEVICE)
    view = frame[:, 1:4, 2:5, 1:8:2]
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, view)
    assert torch.equal(view, expected)
    view.fill_(7.0)
    assert (frame == 7).all()
    half = torch.empty_like(scores, dtype=torch.bfloat16)
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, half)
    torch.testing.assert_close(half.float(), expected, rtol=2**-7, atol=0)  # Triton's interpreter does not round to nearest


def test_no_samples():
    scores = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    labels = torch.zeros(0, 8, 8, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, reduction="sum", backend="triton")
    loss.backward()
    assert loss == 0 and scores.grad.shape == scores.shape
    assert ops.upsample_argmax(scores, 8, backend="triton").shape == (0, 8, 8)


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_argmax_up_and_down(sizes, align_corners):
    (h, w), size = sizes
    scores = normal(2, 4, h, w)
    label = ops.upsample_argmax(scores, size, align_corners=align_corners, backend="triton")
    logits = upsampled(scores, size, align_corners)
    assert label.dtype == torch.int64 and label.shape == (2, *size)
    chosen = logits.gather(1, label[:, None])[:, 0]
    # the winner may differ only where two classes are nearer than rounding
    assert_close(chosen.float(), logits.amax(1), "interpolated_loss", terms=4, scale=float(scores.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_computes_half_precision_in_float32(dtype):
    scores = normal(1, 4, 3, 3, dtype=dtype)
    labels = [ops.upsample_argmax(s, (5, 7), backend="triton") for s in (scores, scores.float())]
    assert torch.equal(*labels)


def test_argmax_ties_go_to_the_lowest_class():
    scores = normal(1, 1, 3, 4).expand(1, 5, 3, 4)
    assert not ops.upsample_argmax(scores, (7, 9), backend="triton").any()
    assert not ops.upsample_argmax(scores, (3, 4), backend="triton").any()


@pytest.mark.parametrize("size", ((5, 6), (9, 11)))
def test_argmax_of_nan_and_infinities(size):
    scores = normal(1, 4, 5, 6)
    scores[0, 2, 1, 1] = scores[0, 3, 1, 1] = float("nan")
    scores[0, 1, 3, 3] = float("inf")
    scores[0, :3, 4, 0] = float("-inf")
    label = ops.upsample_argmax(scores, size, align_corners=True, backend="triton")
    assert label[0, 2 if size[0] == 9 else 1, 2 if size[1] == 11 else 1] == 2  # on the source pixel itself
    assert label[0, 6 if size[0] == 9 else 3, 6 if size[1] == 11 else 3] == 1
    assert label[0, -1, 0] == 3
    if size == (5, 6):
        assert torch.equal(label, scores.argmax(1))


def test_bit_equal_from_run_to_run():
    scores, labels = normal(2, 3, 3, 4), random_labels(2, 3, (7, 6))
    results = []
    for _ in range(2):
        sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, sums, None, grad)
        results.append((sums, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
