"""normalize_embedding in Triton, against float64: on a GPU where there is one, else under Triton's interpreter."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.embedding import triton as kernels

pytestmark = pytest.mark.triton

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-5


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(DEVICE, dtype)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


#: layout -> (dtype, D) -> features of a few dozen pixels
LAYOUTS = {
    "rows": lambda dtype, d: normal(23, d, dtype=dtype),
    "row slice": lambda dtype, d: normal(20, d + 5, dtype=dtype)[::2, 3 : 3 + d],
    "transposed": lambda dtype, d: normal(d, 35, dtype=dtype).T,
    "one pixel repeated": lambda dtype, d: normal(1, d, dtype=dtype).expand(9, d),
    "nchw": lambda dtype, d: normal(2, d, 4, 8, dtype=dtype),
    "odd nchw": lambda dtype, d: normal(2, d, 3, 5, dtype=dtype),
    "channels_last": lambda dtype, d: channels_last(normal(2, d, 3, 5, dtype=dtype)),
    "nchw crop": lambda dtype, d: normal(2, d, 5, 9, dtype=dtype)[:, :, 1:4, 2:8],
    "channels_last crop": lambda dtype, d: channels_last(normal(2, d, 5, 9, dtype=dtype))[:, :, 1:4, 2:8],
}


def affine(d):
    return normal(d) * 0.5 + 1, normal(d) * 0.3


def check(x, weight, bias, grad, to_length=None):
    """Forward and backward against torch in float64. to_length: gradient of the length [N] or [B,H,W]."""
    x, weight, bias = (t if t is None else t.detach().requires_grad_() for t in (x, weight, bias))
    y, length = ops.normalize_embedding(x, weight, bias, eps=EPS, return_length=True, backend="triton")
    assert y.dtype == x.dtype and y.shape == x.shape and y.stride() == torch.empty_like(x).stride()
    leaves = [t for t in (x, weight, bias) if t is not None]
    outputs, grads = ((y,), (grad,)) if to_length is None else ((y, length), (grad, to_length))
    actual = torch.autograd.grad(outputs, leaves, grads)

    d = x.shape[1]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    rows = wide[0] if x.ndim == 2 else wide[0].movedim(1, -1)
    expected_length = (rows.var(-1, correction=0) + EPS).sqrt()
    z = F.layer_norm(rows, (d,), wide[1], wide[2], EPS)
    expected_y = F.normalize(z, dim=-1) if x.ndim == 2 else F.normalize(z, dim=-1).movedim(-1, 1)
    total = (expected_y * grad.double()).sum()
    if to_length is not None:
        total = total + (expected_length * to_length.double()).sum()
    expected = torch.autograd.grad(total, [t for t in wide if t is not None])

    # magnitudes in each pixel: of what is added up to z, relative to |z|, and of what is added up to its gradients
    wide, rows, z = [t if t is None else t.detach() for t in wide], rows.detach(), z.detach()
    rstd, norm = expected_length.detach().reciprocal().unsqueeze(-1), z.norm(dim=-1, keepdim=True)
    w, b = (1 if wide[1] is None else wide[1].abs()), (0 if wide[2] is None else wide[2].abs())
    mean = rows.mean(-1, keepdim=True)
    xhat = ((rows - mean) * rstd).abs() + mean.abs() * rstd
    spread = (xhat * w + b).amax(-1, keepdim=True) / norm
    to_z = grad.double().abs().max() / norm * (1 + spread)
    to_x = to_z * rstd * torch.as_tensor(w).max() * (1 + mean.abs() * rstd)
    if to_length is not None:
        to_x = to_x + to_length.abs().double().max() / d**0.5
    shaped = (lambda t: t) if x.ndim == 2 else (lambda t: t.movedim(-1, 1))
    assert_close(length.detach(), expected_length.detach(), "embedding", terms=d)
    assert_close(y.detach(), expected_y.detach(), "embedding", terms=d, scale=shaped(spread))
    assert_close(actual[0], expected[0], "embedding_grad", terms=d, scale=shaped(to_x))
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert_close(a, e, "embedding_param_grad", terms=x.numel() // d, scale=float((to_z * xhat.clamp_min(1)).max()))


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
