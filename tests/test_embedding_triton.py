"""What only the Triton kernels of normalize_embedding owe, against float64: on a GPU, else under Triton's interpreter."""

import embedding_check
import pytest
import torch
from embedding_check import LAYOUTS, affine, normal
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.embedding import triton as kernels

pytestmark = pytest.mark.triton


def check(*args):
    embedding_check.check("triton", *args)


@pytest.mark.parametrize("layout", ("rows", "nchw", "odd nchw"))
@pytest.mark.parametrize("d", (2, 16, 37, 100))
def test_channels_that_do_and_do_not_fit_a_tile(layout, d):
    x = LAYOUTS[layout](torch.float32, d)
    check(x, *affine(d), normal(*x.shape))


def test_sums_over_pixels_are_bit_equal_from_run_to_run():
    x, (weight, bias), grad = normal(61, 12), affine(12), normal(61, 12)
    results = []
    for _ in range(3):
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        results.append(torch.autograd.grad(ops.normalize_embedding(*leaves, backend="triton"), leaves, grad))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_sums_of_more_programs_than_a_block():
    partial, (weight, bias) = normal(70, 2, 40), affine(40)
    kernels.launch(kernels.add_partials_kernel, (2,), partial, weight, bias, 70, 40, BLOCK_P=32, BLOCK_D=32, num_warps=1)
    assert_close(torch.stack((weight, bias)), partial.double().sum(0), "sum", terms=70)


def test_any_tile_gives_the_same_values():
    x, weight, bias = normal(33, 20), *affine(20)
    expected = ops.normalize_embedding(x, weight, bias, backend="triton")
    for tile in (32, 256):
        with configured("normalize_rows", TILE=tile, PIXELS=1, num_warps=1):
            torch.testing.assert_close(ops.normalize_embedding(x, weight, bias, backend="triton"), expected)
