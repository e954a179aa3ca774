"""What only the Triton kernels of upsampling owe, against float64: on a GPU, else under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
import upsample_check
from cuda_on_cpu import DEVICE
from tolerances import assert_close
from upsample_check import loss_call, normal, random_labels, upsampled

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.upsample import triton as kernels
from dnc_kernels.ops.upsample.calls import UpsampleOut

pytestmark = pytest.mark.triton


def check(*args, **options):
    upsample_check.check("triton", *args, **options)


def test_parts_and_whole_cells_are_the_same():
    """4 x 4 target pixels a thread, or 2 x 2 of a part of a cell."""
    scores, labels = normal(1, 2, 2, 2), random_labels(1, 2, (8, 7))
    for most in (4, 2):
        with (
            configured("log_sum_exp", MOST=most, BLOCK=16, num_warps=1),
            configured("gradient", MOST=most, BLOCK=16, ROWS=2, CLASSES=2, num_warps=1),
        ):
            check(scores, labels, reduction="sum")


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


def test_a_gradient_of_half_precision():
    scores, labels = normal(1, 3, 3, 4), random_labels(1, 3, (5, 6))
    expected = torch.empty_like(scores)
    kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=expected))
    half = torch.empty_like(scores, dtype=torch.bfloat16)
    kernels.upsample_cross_entropy(loss_call(scores, labels), UpsampleOut(grad_scores=half))
    torch.testing.assert_close(half.float(), expected, rtol=2**-7, atol=0)  # Triton's interpreter does not round to nearest
