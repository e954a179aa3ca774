"""Upsampled cross-entropy and argmax in CUDA C++ against float64: on a GPU where there is one, else their source as host C++."""

import pytest
import torch
import torch.nn.functional as F
import upsample_check
from cuda_on_cpu import DEVICE, ORDERS, configure
from tolerances import assert_close
from upsample_check import IGNORE, normal, random_labels, upsampled

from dnc_kernels import ops
from dnc_kernels.ops.upsample import cuda as kernels
from dnc_kernels.ops.upsample import op, reference

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(*args, **options):
    upsample_check.check("cuda", *args, **options)


SIZES = [*upsample_check.SIZES, ((2, 3), (11, 26)), ((6, 2), (3, 9))]  # and cells in parts


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_up_and_down(sizes, align_corners):
    (h, w), size = sizes
    check(normal(2, 3, h, w), random_labels(2, 3, size), align_corners, reduction="none")


def test_the_order_of_threads_does_not_matter(order):
    """Blocks side by side and of several rows, a last block of few cells, several warps and class chunks of a block."""
    check(normal(2, 170, 5, 33), random_labels(2, 170, (9, 68)), weight=torch.rand(170).to(DEVICE) + 0.1)
    check(normal(1, 40, 4, 3), random_labels(1, 40, (15, 11)), align_corners=True, label_smoothing=0.1, reduction="sum")


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("classes", (3, 8, 37))
@pytest.mark.parametrize("target", ((3, 35), (5, 70), (9, 140)), ids=str)
def test_channels_last(dtype, classes, target):
    """Whole and partial runs of classes; several warps; 1, 2 and 4 pixels of a cell along each dimension."""
    scores = normal(2, classes, 3, 35, dtype=dtype).contiguous(memory_format=torch.channels_last)
    labels = random_labels(2, classes, target)
    labels[:, 1] = IGNORE
    check(scores, labels, label_smoothing=0.1)
    label = ops.upsample_argmax(scores, target, backend="cuda")
    assert torch.equal(label, ops.upsample_argmax(scores.contiguous(), target, backend="cuda"))


def test_channels_last_of_several_blocks_of_classes(order):
    scores = normal(1, 170, 4, 5).contiguous(memory_format=torch.channels_last)
    labels = random_labels(1, 170, (15, 19))
    labels[:, :8] = IGNORE
    check(scores, labels)
    grads = [torch.full_like(s, 7.0) for s in (scores, scores.contiguous(), scores.transpose(2, 3))]
    grads[2] = grads[2].transpose(2, 3)
    for grad in grads:
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, grad)
    assert torch.equal(grads[0], grads[1]) and torch.equal(grads[0], grads[2])
    (expected,) = torch.autograd.grad(
        ops.upsample_cross_entropy(leaf := scores.contiguous().requires_grad_(), labels, reduction="sum", backend="cuda"), leaf
    )
    assert torch.equal(grads[0], expected)


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
def test_dtypes(dtype, reduction):
    check(normal(2, 4, 3, 4, dtype=dtype), random_labels(2, 4, (11, 15)), reduction=reduction)
    check(normal(2, 4, 3, 4, dtype=dtype), random_labels(2, 4, (5, 7)), reduction=reduction)
    check(normal(2, 4, 3, 4, dtype=dtype), random_labels(2, 4, (3, 4)), reduction=reduction)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("weighted", "smoothing", "reduction"),
    ((True, 0.0, "mean"), (True, 0.1, "mean"), (True, 0.1, "none"), (False, 0.1, "mean"), (False, 1.0, "none")),
)
def test_class_weights_and_smoothing(weighted, smoothing, reduction):
    weight = torch.rand(5).to(DEVICE) + 0.1 if weighted else None
    scores, labels = normal(1, 5, 2, 3), random_labels(1, 5, (3, 5))
    check(scores, labels, weight=weight, label_smoothing=smoothing, reduction=reduction)
    check(scores, random_labels(1, 5, (9, 14)), weight=weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("classes", (1, 2, 31, 40, 65, 161))
def test_numbers_of_classes(classes):
    check(normal(1, classes, 3, 2), random_labels(1, classes, (7, 6)), reduction="none")


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int32), ids=str)
def test_label_dtypes(dtype):
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), torch.randint(3, (1, 4, 5)).to(DEVICE)
    labels[0, :2] = 255
    losses = [ops.upsample_cross_entropy(scores, some, ignore_index=255, backend="cuda") for some in (labels, labels.to(dtype))]
    grads = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*grads)


@pytest.mark.sanitize
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
    label = ops.upsample_argmax(scores, (7, 5), backend="cuda")
    assert torch.equal(label, ops.upsample_argmax(scores.contiguous(), (7, 5), backend="cuda"))


def test_expanded_gradient_of_none():
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    ops.upsample_cross_entropy(scores, labels, reduction="none", backend="cuda").sum().backward()
    (expected,) = torch.autograd.grad(ops.upsample_cross_entropy(scores, labels, reduction="sum", backend="cuda"), scores)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-6)


def test_labels_outside_the_classes_are_ignored():
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    outside = torch.where(
        labels == IGNORE, torch.tensor([3, -1, 2**40], device=DEVICE)[torch.arange(20).view(4, 5) % 3], labels
    )
    losses = [ops.upsample_cross_entropy(scores, some, reduction="sum", backend="cuda") for some in (labels, outside)]
    grads = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*grads)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_all_ignored_is_nan_with_zero_gradient(smoothing):
    scores = normal(1, 3, 3, 3).requires_grad_()
    labels = torch.full((1, 5, 5), IGNORE, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, label_smoothing=smoothing, backend="cuda")
    loss.backward()
    assert loss.isnan() and not scores.grad.any()


def test_one_class_has_no_gradient():
    scores, labels = normal(1, 1, 2, 3).requires_grad_(), torch.zeros(1, 4, 5, dtype=torch.int64, device=DEVICE)
    ops.upsample_cross_entropy(scores, labels, backend="cuda").backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("size", (8, 16))
def test_ignored_pixels_count_for_nothing_whatever_their_scores(size):
    scores = normal(1, 3, 4, 4)
    scores[0, 1, 0, 0] = float("nan")
    scores[0, 2, 0, 1] = float("inf")
    scores[0, 2, 0, 3] = 1e4
    scores = scores.requires_grad_()
    labels = torch.randint(3, (1, size, size)).to(DEVICE)
    labels[:, : size // 2] = IGNORE
    loss = ops.upsample_cross_entropy(scores, labels, reduction="none", backend="cuda")
    loss.sum().backward()
    assert not loss[:, : size // 2].any() and loss[:, size // 2 :].isfinite().all() and loss[:, size // 2 :].all()
    assert not scores.grad[:, :, 0].any() and scores.grad.isfinite().all() and scores.grad[:, :, 2:].any()


@pytest.mark.parametrize("align_corners", (False, True))
def test_same_size_does_not_spread_nan(align_corners):
    scores = normal(1, 2, 3, 3)
    scores[0, 0, 1, 1] = float("nan")
    scores = scores.requires_grad_()
    labels = torch.zeros(1, 3, 3, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=align_corners, reduction="none", backend="cuda")
    loss.sum().backward()
    bad = scores.detach()[:, 0].isnan()
    assert torch.equal(loss.isnan(), bad) and torch.equal(scores.grad.isnan(), bad[:, None].expand(1, 2, 3, 3))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@pytest.mark.parametrize("scale", (2, 4))
def test_bad_scores_reach_only_the_pixels_with_a_share_of_them(value, scale):
    scores = normal(1, 3, 5, 5)
    scores[0, 1, 2, 2] = value
    scores = scores.requires_grad_()
    # with corners aligned, some pixels lie on a source pixel and have no share of the next one
    size = 4 * scale + 1
    labels = torch.zeros(1, size, size, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=True, reduction="none", backend="cuda")
    loss.sum().backward()
    near = torch.zeros(size, size, dtype=torch.bool, device=DEVICE)
    near_source = torch.zeros(5, 5, dtype=torch.bool, device=DEVICE)
    near[scale + 1 : 3 * scale, scale + 1 : 3 * scale] = True
    near_source[1:4, 1:4] = True
    assert torch.equal(~loss[0].isfinite(), near)
    assert torch.equal(~scores.grad[0, 0].isfinite(), near_source)


@pytest.mark.parametrize("bad", (float("nan"), float("inf")))
def test_the_gradient_of_a_bad_pixel_reaches_only_what_it_has_a_share_of(bad):
    scores = normal(1, 3, 5, 5)
    scores[0, 1, 2, 2] = bad
    labels = torch.full((1, 9, 9), IGNORE, device=DEVICE)
    labels[0, 4, 4] = 1  # on the bad source pixel itself
    grad = torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, None, True, IGNORE, 0.0, None, None, None, None, grad)
    assert grad[0, :, 2, 2].isnan().all()
    grad[0, :, 2, 2] = 0
    assert not grad.any()


def test_a_bad_gradient_of_the_loss_reaches_only_what_its_pixel_has_a_share_of():
    scores, labels, grad = normal(1, 3, 3, 3), torch.ones(1, 5, 5, dtype=torch.int64, device=DEVICE), torch.empty(1, 3, 3, 3)
    grad_loss = torch.zeros(1, 5, 5, device=DEVICE)
    grad_loss[0, 2, 2] = float("nan")  # on the source pixel in the middle
    grad = grad.to(DEVICE)
    kernels.cross_entropy(scores, labels, None, True, IGNORE, 0.1, None, grad_loss, None, None, grad)
    assert grad[0, :, 1, 1].isnan().all()
    grad[0, :, 1, 1] = 0
    assert not grad.any()


def test_a_class_of_minus_infinity_takes_no_part():
    scores, labels = normal(1, 3, 2, 3), torch.randint(2, (1, 3, 5)).to(DEVICE)
    with_it = torch.cat((scores[:, :2], torch.full_like(scores[:, :1], -torch.inf), scores[:, 2:]), 1).requires_grad_()
    scores = scores.requires_grad_()
    losses = [ops.upsample_cross_entropy(s, labels, reduction="none", backend="cuda") for s in (with_it, scores)]
    grads = [torch.autograd.grad(loss.sum(), s)[0] for loss, s in zip(losses, (with_it, scores), strict=True)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0][:, [0, 1, 3]], grads[1], rtol=1e-5, atol=1e-6)
    assert not grads[0][:, 2].any()


@pytest.mark.parametrize("distance", (10, 13, 40, 90, 131, 132, 300, 3000))
@pytest.mark.parametrize("all_classes", (False, True))
@pytest.mark.parametrize("side", (0, -1))
def test_scores_far_apart_keep_their_small_terms(distance, all_classes, side):
    """The bound that corners give is far above the highest score of pixels near the other corner; exponentials are not
    products where they would leave the range of float32.
    """
    scores = normal(1, 3, 2, 2)
    scores[:, : 3 if all_classes else 1, :, side] += distance
    scores[:, 1, side] += distance / 2
    labels = random_labels(1, 3, (7, 8))
    check(scores, labels, reduction="none")
    labels.fill_(IGNORE)  # but one pixel: its ignored neighbours are far above
    labels[0, 3, 2 if side == -1 else 5] = 1
    leaf, wide = scores.clone().requires_grad_(), scores.double().requires_grad_()
    ops.upsample_cross_entropy(leaf, labels, reduction="sum", backend="cuda").backward()
    F.cross_entropy(upsampled(wide, labels.shape[1:], False), labels, reduction="sum").backward()
    # a probability of almost 1 less the label's 1: the scale is 1, not the difference
    assert_close(leaf.grad, wide.grad, "interpolated_loss", terms=3, scale=1 + float(scores.abs().max()))


@pytest.mark.parametrize("distance", (3, 11, 13, 46, 58))
@pytest.mark.parametrize("turned", (False, True))
def test_classes_that_are_steep_along_both_axes(distance, turned):
    """Beside a flat class that keeps every sum alive."""
    scores = normal(1, 3, 2, 2)
    scores[0, 0] += torch.tensor([[0, distance], [distance, 3 * distance]], device=DEVICE)
    scores[0, 1] += 1.6 * distance
    scores = scores.flip(2, 3) if turned else scores
    for size in ((4, 4), (7, 8)):
        check(scores, random_labels(1, 3, size), align_corners=True, reduction="none")


def test_infinities_in_cells_without_pixels_reach_nothing():
    scores = normal(1, 2, 9, 9)
    scores[0, 0, 1:3, 3], scores[0, 0, 1:3, 4] = -torch.inf, torch.inf
    scores = scores.requires_grad_()
    labels = torch.zeros(1, 2, 2, dtype=torch.int64, device=DEVICE)  # in cells 1 and 6 of each axis
    loss = ops.upsample_cross_entropy(scores, labels, backend="cuda")
    loss.backward()
    assert loss.isfinite() and scores.grad.isfinite().all() and not scores.grad[0, :, :, 3:6].any()


@pytest.mark.parametrize("distance", (11, 80))
def test_later_classes_may_be_far_above(distance):
    scores = normal(1, 12, 3, 3) + distance * torch.arange(12, device=DEVICE).view(-1, 1, 1)
    check(scores, random_labels(1, 12, (12, 12)), reduction="none")
    check(scores.flip(1), random_labels(1, 12, (12, 12)), reduction="none")


def test_large_gradients_of_the_loss():
    scores, labels = normal(1, 3, 3, 3), random_labels(1, 3, (12, 12))
    grads = []
    for factor in (1.0, 2.0**40):
        grad = torch.empty_like(scores)
        kernels.cross_entropy(
            scores, labels, None, False, IGNORE, 0.0, None, torch.full((1, 12, 12), factor, device=DEVICE), None, None, grad
        )
        grads.append(grad / factor)
    assert torch.equal(*grads)


def whole_and_bands(scores, labels, align_corners, ranges):
    options = (None, align_corners, IGNORE, 0.1)
    h, size = scores.shape[2], labels.shape[1]
    sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, *options, None, None, sums, None, grad)
    lower = torch.tensor(reference.target_rows_of(h, size, align_corners))
    total, total_grad = torch.zeros_like(sums), torch.zeros_like(grad)
    for r0, r1 in ranges:
        first, end = (int((lower < r).sum()) for r in (r0, r1))
        last = min(r1 + 1, h)
        band_sums, band_grad = torch.empty_like(sums), torch.full_like(grad[:, :, r0:last], 7.0)
        window = (h, r0, size, first)
        kernels.cross_entropy(scores[:, :, r0:last], labels[:, first:end], *options, window, None, band_sums, None, band_grad)
        total += band_sums
        total_grad[:, :, r0:last] += band_grad
    torch.testing.assert_close(total, sums)
    torch.testing.assert_close(total_grad, grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("align_corners", (False, True))
def test_bands_add_up_to_the_whole_map(align_corners):
    whole_and_bands(normal(1, 2, 5, 3), random_labels(1, 2, (9, 5)), align_corners, ((0, 2), (2, 5)))
    whole_and_bands(normal(2, 3, 5, 3), random_labels(2, 3, (21, 12)), align_corners, ((0, 1), (1, 4), (4, 5)))


def test_a_band_without_labels_has_no_loss_and_no_gradient():
    whole_and_bands(normal(1, 2, 8, 3), random_labels(1, 2, (2, 3)), True, ((0, 3), (3, 5), (5, 8)))


@pytest.mark.parametrize(
    ("window", "message"),
    (((4, 1, 8, 0), "outside the map"), ((8, 0, 8, 4), "outside the map"), ((8, 4, 16, 0), "lacks source rows")),
)
def test_windows_that_cannot_be(window, message):
    scores, labels = normal(1, 2, 4, 3), random_labels(1, 2, (8, 6))
    with pytest.raises(ValueError, match=message):
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, window, None, None, None, torch.empty_like(scores))


@pytest.mark.parametrize("last", (False, True))
def test_gradients_into_views_touch_nothing_else(last):
    scores, labels = normal(1, 3, 3, 4), random_labels(1, 3, (5, 6))
    expected = torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, expected)
    frame = torch.full((1, 5, 6, 8), 7.0, device=DEVICE)
    if last:
        frame = frame.contiguous(memory_format=torch.channels_last)
    view = frame[:, 1:4, 2:5, 1:8:2]
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, view)
    assert torch.equal(view, expected)
    view.fill_(7.0)
    assert (frame == 7).all()


def test_only_what_is_asked_for():
    scores, labels = normal(1, 3, 3, 4), random_labels(1, 3, (5, 6))
    sums, loss, grad = (torch.empty(2, dtype=torch.float64), torch.empty(1, 5, 6), torch.empty(1, 3, 3, 4))
    both = [t.to(DEVICE) for t in (sums, loss, grad)]
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.1, None, None, *both)
    for k in range(3):
        alone = [torch.full_like(t, 7.0) if i == k else None for i, t in enumerate(both)]
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.1, None, None, *alone)
        assert torch.equal(alone[k], both[k])
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.1, None, None, None, None, None)


def test_no_samples():
    scores = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    labels = torch.zeros(0, 8, 8, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, reduction="sum", backend="cuda")
    loss.backward()
    assert loss == 0 and scores.grad.shape == scores.shape
    assert ops.upsample_argmax(scores, 8, backend="cuda").shape == (0, 8, 8)


def test_samples_that_lie_far_apart_are_launched_apart(tmp_path, cuda):
    """Offsets within a launch fit 32 bits: three samples, 2 GB apart in a sparse file."""
    if cuda == "cuda":
        pytest.skip("test_more_than_4_gb is for GPUs")
    apart = 2**30
    storage = torch.from_file(str(tmp_path / "scores"), shared=True, size=2 * apart + 12, dtype=torch.float16)
    scores = storage.as_strided((3, 2, 2, 3), (apart, 6, 3, 1))
    scores.copy_(normal(3, 2, 2, 3))
    weight = torch.rand(2) + 0.1
    check(scores, random_labels(3, 2, (5, 7)), weight=weight, reduction="none")
    check(scores, random_labels(3, 2, (5, 7)), weight=weight, reduction="mean")
    assert torch.equal(*(ops.upsample_argmax(s, (5, 7), backend="cuda") for s in (scores, scores.contiguous())))


def test_a_class_of_more_than_4_gb_is_refused(tmp_path, cuda):
    if cuda == "cuda":
        pytest.skip("takes a sparse file")
    storage = torch.from_file(str(tmp_path / "scores"), shared=True, size=2**31 + 6, dtype=torch.float16)
    scores = storage.as_strided((1, 2, 2, 3), (0, 3, 2**31, 1))
    labels = random_labels(1, 2, (4, 6))
    with pytest.raises(ValueError, match="less than 4 GB"):
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, torch.empty(1, 2, 2, 3))
    with pytest.raises(ValueError, match="less than 4 GB"):
        kernels.argmax(scores, False, labels)


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_argmax_up_and_down(sizes, align_corners):
    (h, w), size = sizes
    scores = normal(2, 4, h, w)
    label = ops.upsample_argmax(scores, size, align_corners=align_corners, backend="cuda")
    logits = upsampled(scores, size, align_corners)
    assert label.dtype == torch.int64 and label.shape == (2, *size)
    chosen = logits.gather(1, label[:, None])[:, 0]
    # the winner may differ only where two classes are nearer than rounding
    assert_close(chosen.float(), logits.amax(1), "interpolated_loss", terms=4, scale=float(scores.abs().max()))


@pytest.mark.sanitize
def test_argmax_of_several_blocks(order):
    scores = normal(2, 7, 6, 35)
    label = ops.upsample_argmax(scores, (23, 140), backend="cuda")
    logits = upsampled(scores, (23, 140), False)
    assert_close(logits.gather(1, label[:, None])[:, 0].float(), logits.amax(1), "interpolated_loss", terms=4, scale=4.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_computes_half_precision_in_float32(dtype):
    scores = normal(1, 4, 3, 3, dtype=dtype)
    for size in ((5, 7), (12, 12), (3, 3)):
        labels = [ops.upsample_argmax(s, size, backend="cuda") for s in (scores, scores.float())]
        assert torch.equal(*labels)


def test_argmax_ties_go_to_the_lowest_class():
    scores = normal(1, 1, 3, 4).expand(1, 20, 3, 4)  # more than two groups
    for size in ((7, 9), (3, 4), (12, 16)):
        assert not ops.upsample_argmax(scores, size, backend="cuda").any()


@pytest.mark.parametrize("size", ((5, 6), (9, 11), (17, 21)))
def test_argmax_of_nan_and_infinities(size):
    scores = normal(1, 4, 5, 6)
    scores[0, 2, 1, 1] = scores[0, 3, 1, 1] = float("nan")
    scores[0, 1, 3, 3] = float("inf")
    scores[0, :3, 4, 0] = float("-inf")
    label = ops.upsample_argmax(scores, size, align_corners=True, backend="cuda")
    step = (size[0] - 1) // 4
    assert label[0, step, step] == 2  # on the source pixel itself
    assert label[0, 3 * step, 3 * step] == 1
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


def test_the_order_of_threads_changes_no_bit(cuda):
    if cuda == "cuda":
        pytest.skip("a GPU chooses its own order")
    scores, labels = normal(2, 5, 3, 20), random_labels(2, 5, (12, 80))
    results = []
    for order in ORDERS:
        configure(order)
        sums, grad = torch.empty(2, dtype=torch.float64), torch.empty_like(scores)
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.1, None, None, sums, None, grad)
        results.append(torch.cat((sums, grad.double().flatten())))
    assert all(torch.equal(r, results[0]) for r in results)


def test_how_rows_are_cut_changes_no_bit(cuda):
    if cuda == "cuda":
        pytest.skip("a GPU has the processors that it has")
    scores, labels = normal(1, 3, 9, 4), random_labels(1, 3, (17, 13))
    grads = []
    for processors in (1, 3, 40, 132):
        configure(processors=processors)
        grads.append(torch.empty_like(scores))
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, None, None, grads[-1])
    assert all(torch.equal(g, grads[0]) for g in grads)


@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_opcheck(reduction):
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    early = reduction == "mean"
    arguments = (scores, labels, None, False, IGNORE, 0.1, reduction, early, "cuda")
    # the gradient of "mean", an output, is multiplied in place by the backward pass, which the other utilities call a difference
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op._loss_op, arguments, test_utils=utilities)
    torch.library.opcheck(op.upsample_argmax, (scores.detach(), 5, 7, False, "cuda"))
    torch.library.opcheck(
        op._backward_op, (torch.rand(1, 4, 5, device=DEVICE), scores.detach(), labels, None, False, IGNORE, 0.1, "cuda")
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_call_replays():
    scores, labels = normal(2, 19, 16, 16), random_labels(2, 19, (64, 64))
    sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
    arguments = (scores, labels, None, False, IGNORE, 0.0, None, None, sums, None, grad)
    kernels.cross_entropy(*arguments)
    expected = sums.clone(), grad.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kernels.cross_entropy(*arguments)
    sums.zero_(), grad.zero_()
    graph.replay()
    assert torch.equal(sums, expected[0]) and torch.equal(grad, expected[1])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_call_does_not_synchronise():
    scores, labels = normal(2, 19, 8, 8), random_labels(2, 19, (32, 32))
    outputs = torch.empty(2, dtype=torch.float64, device=DEVICE), None, torch.empty_like(scores)
    kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, *outputs)
    torch.cuda.set_sync_debug_mode("error")
    try:
        kernels.cross_entropy(scores, labels, None, False, IGNORE, 0.0, None, None, *outputs)
        kernels.argmax(scores, False, labels)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_more_than_4_gb():
    if torch.cuda.get_device_properties(0).total_memory < 16 << 30:
        pytest.skip("needs 16 GB")
    scores = torch.zeros(4, 600, 1024, 1024, dtype=torch.bfloat16, device=DEVICE)
    scores[3, 599, 1023, 1023] = 1
    label = ops.upsample_argmax(scores, 1024, backend="cuda")
    assert label[3, 1023, 1023] == 599 and int((label != 0).sum()) == 1
