"""Upsampled cross-entropy and argmax in Triton and in CUDA C++, against float64: on a GPU, or under Triton's interpreter and as host
C++.
"""

from importlib import import_module
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from gpu_check import sizes
from tolerances import assert_close
from upsample_check import DTYPES, IGNORE, SIZES, check, loss_call, normal, random_labels, upsampled, whole_and_bands

from dnc_kernels import ops
from dnc_kernels.ops.upsample.calls import UpsampleOut


@pytest.fixture
def kernels(backend):
    """The backend's launchers."""
    return import_module(f"dnc_kernels.ops.upsample.{backend}")


each_size = sizes("shape,size", triton=SIZES, cuda=[*SIZES, ((2, 3), (11, 26)), ((6, 2), (3, 9))])  # and cells in parts


@pytest.mark.parametrize("align_corners", (False, True))
@each_size
def test_up_and_down(shape, size, align_corners, backend):
    check(backend, normal(2, 3, *shape), random_labels(2, 3, size), align_corners, reduction="none")


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum"))
@sizes("size", triton=((5, 7),), cuda=((11, 15), (5, 7), (3, 4)))
def test_dtypes(dtype, reduction, size, backend):
    check(backend, normal(2, 4, 3, 4, dtype=dtype), random_labels(2, 4, size), reduction=reduction)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("weighted", "smoothing", "reduction"),
    ((True, 0.0, "mean"), (True, 0.1, "mean"), (True, 0.1, "none"), (False, 0.1, "mean"), (False, 1.0, "none")),
)
@sizes("size", triton=((3, 5),), cuda=((3, 5), (9, 14)))
def test_class_weights_and_smoothing(weighted, smoothing, reduction, size, backend):
    weight = torch.rand(5).to(DEVICE) + 0.1 if weighted else None
    scores, labels = normal(1, 5, 2, 3), random_labels(1, 5, size)
    check(backend, scores, labels, weight=weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int32), ids=str)
def test_label_dtypes(dtype, backend):
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), torch.randint(3, (1, 4, 5)).to(DEVICE)
    labels[0, :2] = 255
    losses = [
        ops.upsample_cross_entropy(scores, some, ignore_index=255, backend=backend) for some in (labels, labels.to(dtype))
    ]
    grads = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*grads)


@pytest.mark.sanitize
@pytest.mark.parametrize("view", ("channels_last", "crop", "expanded", "transposed"))
def test_strided_scores_and_labels(view, backend):
    base = normal(2, 3, 2, 3)
    scores = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "crop": normal(3, 5, 6, 7)[1:, 1:4, 2:4, :3],
        "expanded": normal(1, 3, 2, 3).expand(2, 3, 2, 3),
        "transposed": normal(2, 3, 3, 2).transpose(2, 3),
    }[view]
    check(backend, scores, random_labels(2, 3, (5, 4)).transpose(1, 2), reduction="none")
    label = ops.upsample_argmax(scores, (7, 5), backend=backend)
    assert torch.equal(label, ops.upsample_argmax(scores.contiguous(), (7, 5), backend=backend))


def test_expanded_gradient_of_none(backend):
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    ops.upsample_cross_entropy(scores, labels, reduction="none", backend=backend).sum().backward()
    (expected,) = torch.autograd.grad(ops.upsample_cross_entropy(scores, labels, reduction="sum", backend=backend), scores)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-6)


def test_labels_outside_the_classes_are_ignored(backend):
    scores, labels = normal(1, 3, 2, 3).requires_grad_(), random_labels(1, 3, (4, 5))
    outside = torch.where(
        labels == IGNORE, torch.tensor([3, -1, 2**40], device=DEVICE)[torch.arange(20).view(4, 5) % 3], labels
    )
    losses = [ops.upsample_cross_entropy(scores, some, reduction="sum", backend=backend) for some in (labels, outside)]
    grads = [torch.autograd.grad(loss, scores)[0] for loss in losses]
    assert torch.equal(*losses) and torch.equal(*grads)


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_all_ignored_is_nan_with_zero_gradient(smoothing, backend):
    scores = normal(1, 3, 3, 3).requires_grad_()
    labels = torch.full((1, 5, 5), IGNORE, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, label_smoothing=smoothing, backend=backend)
    loss.backward()
    assert loss.isnan() and not scores.grad.any()


def test_one_class_has_no_gradient(backend):
    scores, labels = normal(1, 1, 2, 3).requires_grad_(), torch.zeros(1, 4, 5, dtype=torch.int64, device=DEVICE)
    ops.upsample_cross_entropy(scores, labels, backend=backend).backward()
    assert torch.equal(scores.grad, torch.zeros_like(scores))


@sizes("size", triton=(8,), cuda=(8, 16))
def test_ignored_pixels_count_for_nothing_whatever_their_scores(size, backend):
    scores = normal(1, 3, 4, 4)
    scores[0, 1, 0, 0] = float("nan")
    scores[0, 2, 0, 1] = float("inf")
    scores[0, 2, 0, 3] = 1e4
    scores = scores.requires_grad_()
    labels = torch.randint(3, (1, size, size)).to(DEVICE)
    labels[:, : size // 2] = IGNORE
    loss = ops.upsample_cross_entropy(scores, labels, reduction="none", backend=backend)
    loss.sum().backward()
    assert not loss[:, : size // 2].any() and loss[:, size // 2 :].isfinite().all() and loss[:, size // 2 :].all()
    assert not scores.grad[:, :, 0].any() and scores.grad.isfinite().all() and scores.grad[:, :, 2:].any()


@pytest.mark.parametrize("align_corners", (False, True))
def test_same_size_does_not_spread_nan(align_corners, backend):
    scores = normal(1, 2, 3, 3)
    scores[0, 0, 1, 1] = float("nan")
    scores = scores.requires_grad_()
    labels = torch.zeros(1, 3, 3, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=align_corners, reduction="none", backend=backend)
    loss.sum().backward()
    bad = scores.detach()[:, 0].isnan()
    assert torch.equal(loss.isnan(), bad) and torch.equal(scores.grad.isnan(), bad[:, None].expand(1, 2, 3, 3))


@pytest.mark.parametrize("value", (float("nan"), float("inf")))
@sizes("scale", triton=(2,), cuda=(2, 4))
def test_bad_scores_reach_only_the_pixels_with_a_share_of_them(value, scale, backend):
    scores = normal(1, 3, 5, 5)
    scores[0, 1, 2, 2] = value
    scores = scores.requires_grad_()
    # with corners aligned, some pixels lie on a source pixel and have no share of the next one
    size = 4 * scale + 1
    labels = torch.zeros(1, size, size, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=True, reduction="none", backend=backend)
    loss.sum().backward()
    near = torch.zeros(size, size, dtype=torch.bool, device=DEVICE)
    near_source = torch.zeros(5, 5, dtype=torch.bool, device=DEVICE)
    near[scale + 1 : 3 * scale, scale + 1 : 3 * scale] = True
    near_source[1:4, 1:4] = True
    assert torch.equal(~loss[0].isfinite(), near)
    assert torch.equal(~scores.grad[0, 0].isfinite(), near_source)


# Triton's interpreter lets a maximum keep a NaN, which hides nothing of an ignored pixel
@sizes("bad", triton=(float("nan" if DEVICE == "cuda" else "inf"),), cuda=(float("nan"), float("inf")))
def test_the_gradient_of_a_bad_pixel_reaches_only_what_it_has_a_share_of(bad, backend, kernels):
    scores = normal(1, 3, 5, 5)
    scores[0, 1, 2, 2] = bad
    labels = torch.full((1, 9, 9), IGNORE, device=DEVICE)
    labels[0, 4, 4] = 1  # on the bad source pixel itself
    grad = torch.empty_like(scores)
    kernels.upsample_cross_entropy(loss_call(scores, labels, align_corners=True), UpsampleOut(grad_scores=grad))
    assert grad[0, :, 2, 2].isnan().all()
    grad[0, :, 2, 2] = 0
    assert not grad.any()


def test_a_class_of_minus_infinity_takes_no_part(backend):
    scores, labels = normal(1, 3, 2, 3), torch.randint(2, (1, 3, 5)).to(DEVICE)
    with_it = torch.cat((scores[:, :2], torch.full_like(scores[:, :1], -torch.inf), scores[:, 2:]), 1).requires_grad_()
    scores = scores.requires_grad_()
    losses = [ops.upsample_cross_entropy(s, labels, reduction="none", backend=backend) for s in (with_it, scores)]
    grads = [torch.autograd.grad(loss.sum(), s)[0] for loss, s in zip(losses, (with_it, scores), strict=True)]
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(grads[0][:, [0, 1, 3]], grads[1], rtol=1e-5, atol=1e-6)
    assert not grads[0][:, 2].any()


@sizes(
    "distance,all_classes,side",
    triton=((300, True, 0),),
    cuda=tuple(product((10, 13, 40, 90, 131, 132, 300, 3000), (False, True), (0, -1))),
)
def test_scores_far_apart_keep_their_small_terms(distance, all_classes, side, backend):
    """The bound that corners give is far above the highest score of pixels near the other corner; exponentials are not
    products where they would leave the range of float32.
    """
    scores = normal(1, 3, 2, 2)
    scores[:, : 3 if all_classes else 1, :, side] += distance
    scores[:, 1, side] += distance / 2
    labels = random_labels(1, 3, (7, 8))
    check(backend, scores, labels, reduction="none")
    labels.fill_(IGNORE)  # but one pixel: its ignored neighbours are far above
    labels[0, 3, 2 if side == -1 else 5] = 1
    leaf, wide = scores.clone().requires_grad_(), scores.double().requires_grad_()
    ops.upsample_cross_entropy(leaf, labels, reduction="sum", backend=backend).backward()
    F.cross_entropy(upsampled(wide, labels.shape[1:], False), labels, reduction="sum").backward()
    # a probability of almost 1 less the label's 1: the scale is 1, not the difference
    assert_close(leaf.grad, wide.grad, "interpolated_loss", terms=3, scale=1 + float(scores.abs().max()))


BANDS = ((1, 2, 5, 3), (9, 5), ((0, 2), (2, 5)))


@pytest.mark.parametrize("align_corners", (False, True))
@sizes("shape,size,ranges", triton=(BANDS,), cuda=(BANDS, ((2, 3, 5, 3), (21, 12), ((0, 1), (1, 4), (4, 5)))))
def test_bands_add_up_to_the_whole_map(shape, size, ranges, align_corners, backend, kernels):
    whole_and_bands(kernels, normal(*shape), random_labels(*shape[:2], size), align_corners, ranges)


@pytest.mark.parametrize("last", (False, True))
def test_gradients_into_views_touch_nothing_else(last, backend, kernels):
    scores, labels = normal(1, 3, 3, 4), random_labels(1, 3, (5, 6))
    expected = torch.empty_like(scores)
    kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=expected))
    frame = torch.full((1, 5, 6, 8), 7.0, device=DEVICE)
    if last:
        frame = frame.contiguous(memory_format=torch.channels_last)
    view = frame[:, 1:4, 2:5, 1:8:2]
    kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=view))
    assert torch.equal(view, expected)
    view.fill_(7.0)
    assert (frame == 7).all()


def test_no_samples(backend):
    scores = torch.zeros(0, 3, 4, 4, device=DEVICE, requires_grad=True)
    labels = torch.zeros(0, 8, 8, dtype=torch.int64, device=DEVICE)
    loss = ops.upsample_cross_entropy(scores, labels, reduction="sum", backend=backend)
    loss.backward()
    assert loss == 0 and scores.grad.shape == scores.shape
    assert ops.upsample_argmax(scores, 8, backend=backend).shape == (0, 8, 8)


@pytest.mark.parametrize("align_corners", (False, True))
@each_size
def test_argmax_up_and_down(shape, size, align_corners, backend):
    scores = normal(2, 4, *shape)
    label = ops.upsample_argmax(scores, size, align_corners=align_corners, backend=backend)
    logits = upsampled(scores, size, align_corners)
    assert label.dtype == torch.int64 and label.shape == (2, *size)
    chosen = logits.gather(1, label[:, None])[:, 0]
    # the winner may differ only where two classes are nearer than rounding
    assert_close(chosen.float(), logits.amax(1), "interpolated_loss", terms=4, scale=float(scores.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_computes_half_precision_in_float32(dtype, backend):
    scores = normal(1, 4, 3, 3, dtype=dtype)
    for size in ((5, 7), (12, 12), (3, 3)):
        labels = [ops.upsample_argmax(s, size, backend=backend) for s in (scores, scores.float())]
        assert torch.equal(*labels)


def test_argmax_ties_go_to_the_lowest_class(backend):
    scores = normal(1, 1, 3, 4).expand(1, 20, 3, 4)  # more than two groups
    for size in ((7, 9), (3, 4), (12, 16)):
        assert not ops.upsample_argmax(scores, size, backend=backend).any()


@pytest.mark.parametrize("size", ((5, 6), (9, 11), (17, 21)))
def test_argmax_of_nan_and_infinities(size, backend):
    scores = normal(1, 4, 5, 6)
    scores[0, 2, 1, 1] = scores[0, 3, 1, 1] = float("nan")
    scores[0, 1, 3, 3] = float("inf")
    scores[0, :3, 4, 0] = float("-inf")
    label = ops.upsample_argmax(scores, size, align_corners=True, backend=backend)
    step = (size[0] - 1) // 4
    assert label[0, step, step] == 2  # on the source pixel itself
    assert label[0, 3 * step, 3 * step] == 1
    assert label[0, -1, 0] == 3
    if size == (5, 6):
        assert torch.equal(label, scores.argmax(1))


def test_bit_equal_from_run_to_run(backend, kernels):
    scores, labels = normal(2, 3, 3, 4), random_labels(2, 3, (7, 6))
    results = []
    for _ in range(2):
        sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
        kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(sums=sums, grad_scores=grad))
        results.append((sums, grad))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
