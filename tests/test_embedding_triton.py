"""normalize_embedding in Triton, against float64: on a GPU where there is one, else under Triton's interpreter."""

import embedding_check
import pytest
import torch
from cuda_on_cpu import DEVICE
from embedding_check import EPS, LAYOUTS, affine, channels_last, normal
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.embedding import triton as kernels

pytestmark = pytest.mark.triton
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def check(*args):
    embedding_check.check("triton", *args)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_in_every_layout(layout, dtype):
    x = LAYOUTS[layout](dtype, 13)
    check(x, *affine(13), normal(*x.shape, dtype=dtype))


@pytest.mark.parametrize("layout", ("rows", "nchw", "odd nchw"))
@pytest.mark.parametrize("d", (2, 16, 37, 100))
def test_channels_that_do_and_do_not_fit_a_tile(layout, d):
    x = LAYOUTS[layout](torch.float32, d)
    check(x, *affine(d), normal(*x.shape))


@pytest.mark.parametrize("n", (1, 2, 8, 16, 17, 33))
@pytest.mark.parametrize("columns", (False, True))
def test_pixel_counts_around_tiles(n, columns):
    check(normal(7, n).T if columns else normal(n, 7), *affine(7), normal(n, 7))


@pytest.mark.parametrize("with_weight", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("d", (5, 70))
def test_weight_and_bias_are_optional(with_weight, with_bias, d):
    weight, bias = affine(d)
    check(normal(9, d), weight if with_weight else None, bias if with_bias else None, normal(9, d))


@pytest.mark.parametrize("layout", ("rows", "odd nchw"))
def test_gradient_of_the_length(layout):
    x = LAYOUTS[layout](torch.float32, 11)
    pixels = x.shape[:1] if x.ndim == 2 else (x.shape[0], *x.shape[2:])
    check(x, *affine(11), normal(*x.shape), normal(*pixels))


def test_expanded_and_foreign_gradients():
    x, (weight, bias) = normal(2, 6, 4, 4), affine(6)
    check(x, weight, bias, normal(1, 6, 1, 1).expand(2, 6, 4, 4))
    check(x, weight, bias, channels_last(normal(2, 6, 4, 4)))
    check(channels_last(x), weight, bias, normal(2, 6, 4, 4))


@pytest.mark.parametrize("shape", ((9, 5), (9, 100), (2, 40, 3, 5)))
def test_gradient_in_place_of_the_incoming_one(shape):
    x, (weight, bias) = normal(*shape), affine(shape[1])
    pixels = x.numel() // shape[1]
    y, statistics = torch.empty_like(x), [torch.empty(pixels, device=DEVICE) for _ in range(3)]
    kernels.normalize(x, weight, bias, EPS, y, *statistics)
    grad = normal(*shape)
    apart = [torch.empty_like(t) for t in (x, weight, bias)]
    kernels.normalize_backward(x, weight, bias, *statistics, grad, None, *apart)
    kernels.normalize_backward(x, weight, bias, *statistics, grad, None, grad, None, None)
    assert torch.equal(grad, apart[0])


@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_a_large_mean_costs_no_variance(layout):
    x = LAYOUTS[layout](torch.float32, 64) + 1000
    check(x, *affine(64), normal(*x.shape))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("layout", ("rows", "nchw"))
@pytest.mark.parametrize("d", (7, 70))
def test_a_bad_pixel_stays_alone(value, layout, d):
    clean = LAYOUTS[layout](torch.float32, d)
    x = clean.clone()
    x[(1, 3, *[2] * (x.ndim - 2))] = value
    bad = ~x.isfinite().all(1, keepdim=True).expand_as(x)
    grad, results = normal(*x.shape), []
    for features in (x, clean):
        features = features.clone().requires_grad_()
        y = ops.normalize_embedding(features, backend="triton")
        results.append((y.detach(), torch.autograd.grad(y, features, grad)[0]))
    for dirty, expected in zip(*results, strict=True):
        assert torch.equal(dirty.isnan(), bad)
        assert torch.equal(dirty[~bad], expected[~bad])


@pytest.mark.parametrize("columns", (False, True))
def test_a_zero_vector_has_embedding_and_gradient_zero(columns):
    x = normal(4, 6)
    x[2] = 1000.1
    x = (x.T.contiguous().T if columns else x).requires_grad_()
    y = ops.normalize_embedding(x, backend="triton")
    (grad,) = torch.autograd.grad(y, x, normal(4, 6))
    assert not y[2].any() and not grad[2].any()
    assert (y[[0, 1, 3]] != 0).all() and (grad[[0, 1, 3]].abs().sum(1) > 0).all()


def test_a_length_below_the_bound_is_divided_by_the_bound():
    weight, bias = affine(9)
    check(normal(9, 9), weight * 1e-13, bias * 1e-13, normal(9, 9))


def test_one_channel_is_the_sign_of_the_bias():
    for value in (-0.5, 2.0):
        bias = torch.tensor([value], device=DEVICE)
        y = ops.normalize_embedding(normal(5, 1), torch.ones(1, device=DEVICE), bias, backend="triton")
        assert torch.equal(y, torch.full((5, 1), value, device=DEVICE).sign())


@pytest.mark.parametrize("shape", ((0, 5), (2, 5, 0, 3)))
def test_no_pixels(shape):
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    weight, bias = (t.requires_grad_() for t in affine(5))
    y = ops.normalize_embedding(x, weight, bias, backend="triton")
    y.sum().backward()
    assert y.shape == x.grad.shape == torch.Size(shape)
    assert not weight.grad.any() and not bias.grad.any()


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


def test_nothing_is_written_beside_the_output():
    x, statistics = normal(21, 9), [torch.zeros(21, device=DEVICE) for _ in range(3)]
    frame = torch.full((30, 40), 7.0, device=DEVICE)
    for y in (frame[5:26, 3:12], frame[5:26, 3:21:2], frame.T[5:26, 3:12]):
        kernels.normalize(x, None, None, EPS, y, *statistics)
        assert not (y == 7).any()
        y.fill_(7.0)
        assert (frame == 7).all()


def test_any_tile_gives_the_same_values():
    x, weight, bias = normal(33, 20), *affine(20)
    expected = ops.normalize_embedding(x, weight, bias, backend="triton")
    for tile in (32, 256):
        with configured("normalize_rows", TILE=tile, PIXELS=1, num_warps=1):
            torch.testing.assert_close(ops.normalize_embedding(x, weight, bias, backend="triton"), expected)
