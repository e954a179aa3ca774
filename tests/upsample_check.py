"""Interpolation from its definition; and what the GPU tests share: inputs, and a comparison with torch in float64."""

import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.upsample import reference
from dnc_kernels.ops.upsample.calls import UpsampleCall, UpsampleOut

IGNORE = -100
DTYPES = (torch.float32, torch.bfloat16, torch.float16)

SIZES = [
    ((2, 2), (7, 5)),
    ((3, 4), (4, 7)),
    ((5, 6), (2, 4)),
    ((1, 5), (3, 5)),
    ((3, 1), (1, 5)),
    ((1, 1), (3, 2)),
    ((3, 4), (1, 1)),
    ((3, 4), (3, 8)),
    ((3, 4), (3, 4)),
]


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def random_labels(b, c, size, ignored=0.2):
    labels = torch.randint(c, (b, *size))
    return labels.masked_fill(torch.rand(labels.shape) < ignored, IGNORE).to(DEVICE)


def loss_call(
    scores, labels, *, window=None, align_corners=False, class_weight=None, ignore_index=IGNORE, label_smoothing=0.0,
    grad_loss=None, backend="cpu",
):  # fmt: skip
    """The record of a call; launchers do not ask for its backend."""
    options = (align_corners, class_weight, ignore_index, label_smoothing, grad_loss)
    return UpsampleCall(scores, labels, *(window or (0, 0, 0, 0)), *options, backend)


def interpolation(source, target, align_corners):
    """[target,source] weights of linear interpolation, from its definition; positions are ratios of integers."""
    at = torch.arange(target)
    if align_corners:
        at, unit = at * (source - 1), max(target - 1, 1)
    else:
        at, unit = ((2 * at + 1) * source - target).clamp_min(0), 2 * target
    low, share = at // unit, (at % unit).double() / unit
    matrix = torch.zeros(target, source, dtype=torch.float64)
    index = torch.arange(target)
    matrix[index, low] += 1 - share
    matrix[index, (low + 1).clamp_max(source - 1)] += share
    return matrix


def upsampled(scores, size, align_corners):
    """Float64: the interpolation matrices written out."""
    rows = interpolation(scores.shape[2], size[0], align_corners).to(scores.device)
    columns = interpolation(scores.shape[3], size[1], align_corners).to(scores.device)
    return torch.einsum("Hh,bchw,Ww->bcHW", rows, scores.double(), columns)


def check(backend, scores, labels, align_corners=False, weight=None, **options):
    leaf = scores.detach().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, labels, align_corners=align_corners, weight=weight, backend=backend, **options)
    wide = scores.detach().double().requires_grad_()
    logits = upsampled(wide, labels.shape[1:], align_corners)
    wide_weight = None if weight is None else weight.double()
    expected = F.cross_entropy(logits, labels.long(), wide_weight, **options)
    grad = normal(*loss.shape)
    (actual_grad,) = torch.autograd.grad(loss, leaf, grad)
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    size = 1 + float(scores.abs().max())
    largest = max(float(expected_grad.abs().max()), 1e-30)  # one class: all gradients are 0
    assert_close(loss.detach(), expected.detach(), "interpolated_loss", terms=scores.shape[1], scale=size)
    assert actual_grad.dtype == scores.dtype
    assert_close(actual_grad, expected_grad, "interpolated_loss", terms=scores.shape[1], scale=size * largest)


def whole_and_bands(kernels, scores, labels, align_corners, ranges):
    """Sums and gradients of bands of source rows, by a backend's launchers, add up to those of the whole map."""
    options = {"align_corners": align_corners, "label_smoothing": 0.1}
    h, size = scores.shape[2], labels.shape[1]
    sums, grad = torch.empty(2, dtype=torch.float64, device=DEVICE), torch.empty_like(scores)
    kernels.upsample_cross_entropy(loss_call(scores, labels, **options), UpsampleOut(sums=sums, grad_scores=grad))
    lower = torch.tensor(reference.target_rows_of(h, size, align_corners))
    total, total_grad = torch.zeros_like(sums), torch.zeros_like(grad)
    for r0, r1 in ranges:
        first, end = (int((lower < r).sum()) for r in (r0, r1))
        last = min(r1 + 1, h)
        band_sums, band_grad = torch.empty_like(sums), torch.full_like(grad[:, :, r0:last], 7.0)
        window = (h, r0, size, first)
        kernels.upsample_cross_entropy(
            loss_call(scores[:, :, r0:last], labels[:, first:end], **options, window=window),
            UpsampleOut(sums=band_sums, grad_scores=band_grad),
        )
        total += band_sums
        total_grad[:, :, r0:last] += band_grad
    torch.testing.assert_close(total, sums)
    torch.testing.assert_close(total_grad, grad, rtol=1e-5, atol=1e-6)
