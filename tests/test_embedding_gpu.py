"""normalize_embedding in Triton and in CUDA C++, against float64: on a GPU, or under Triton's interpreter and as host C++."""

from importlib import import_module

import pytest
import torch
from cuda_on_cpu import DEVICE
from embedding_check import DTYPES, EPS, LAYOUTS, affine, channels_last, check, features, normal
from gpu_check import ANY_ORDER, sizes

from dnc_kernels import ops
from dnc_kernels.ops.embedding import op
from dnc_kernels.ops.embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall, NormalizeOut


@pytest.fixture
def kernels(backend):
    """The backend's launchers."""
    return import_module(f"dnc_kernels.ops.embedding.{backend}")


# CUDA C++ accesses 13 channels one by one, 16 in pieces of 16 bytes
@pytest.mark.sanitize
@sizes("d", triton=(13,), cuda=(13, 16))
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_in_every_layout(layout, dtype, d, backend):
    x = LAYOUTS[layout](dtype, d)
    check(backend, x, *affine(d), normal(*x.shape, dtype=dtype))


@sizes("n", triton=(1, 2, 8, 16, 17, 33), cuda=(1, 2, 31, 32, 33, 65))
@pytest.mark.parametrize("columns", (False, True))
def test_pixel_counts_around_tiles(n, columns, backend):
    check(backend, normal(7, n).T if columns else normal(n, 7), *affine(7), normal(n, 7))


@pytest.mark.parametrize("with_weight", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("layout", ("rows", "planes"))
@pytest.mark.parametrize("d", (5, 72))
def test_weight_and_bias_are_optional(with_weight, with_bias, layout, d, backend):
    weight, bias = affine(d)
    x = features(layout, 10, d)
    check(backend, x, weight if with_weight else None, bias if with_bias else None, normal(*x.shape))


@sizes("d", triton=(11,), cuda=(11, 16, 600))
@pytest.mark.parametrize("layout", ("rows", "odd nchw"))
def test_gradient_of_the_length(layout, d, backend):
    x = LAYOUTS[layout](torch.float32, d)
    pixels = x.shape[:1] if x.ndim == 2 else (x.shape[0], *x.shape[2:])
    check(backend, x, *affine(d), normal(*x.shape), normal(*pixels))


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_expanded_and_foreign_gradients(dtype, backend):
    x, (weight, bias) = normal(2, 16, 4, 4, dtype=dtype), affine(16)
    for pixels in (x, channels_last(x)):
        check(backend, pixels, weight, bias, normal(1, 16, 1, 1, dtype=dtype).expand(2, 16, 4, 4))
        check(backend, pixels, weight, bias, normal(2, 1, 4, 4, dtype=dtype).expand(2, 16, 4, 4))
        check(backend, pixels, weight, bias, channels_last(normal(2, 16, 4, 4, dtype=dtype)))
        check(backend, pixels, weight, bias, normal(2, 16, 4, 4, dtype=dtype))


@sizes(
    "shape",
    triton=((9, 5), (9, 100), (2, 40, 3, 5), (2, 16, 4, 4)),
    cuda=((9, 5), (9, 100), (9, 600), (2, 6200), (2, 40, 3, 5), (2, 16, 4, 4), (1, 3700, 1, 3)),
    ways=ANY_ORDER,
)
def test_gradient_in_place_of_the_incoming_one(shape, backend, kernels):
    x, (weight, bias) = normal(*shape), affine(shape[1])
    _, *statistics = op.normalize_embedding(NormalizeCall(x, weight, bias, EPS, backend))
    grad = normal(*shape)
    apart = [torch.empty_like(t) for t in (x, weight, bias)]
    kernels.normalize_embedding_backward(
        NormalizeBackwardCall(x, weight, bias, *statistics, grad, None, backend), NormalizeBackwardOut(*apart)
    )
    kernels.normalize_embedding_backward(
        NormalizeBackwardCall(x, weight, bias, *statistics, grad, None, backend), NormalizeBackwardOut(grad, None, None)
    )
    assert torch.equal(grad, apart[0])


@sizes("d", triton=(64,), cuda=(64, 600))
@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_a_large_mean_costs_no_variance(layout, d, backend):
    x = LAYOUTS[layout](torch.float32, d) + 1000
    check(backend, x, *affine(d), normal(*x.shape))


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("layout", ("rows", "nchw", "odd nchw"))
@sizes("d", triton=(7, 70), cuda=(7, 72, 600))
def test_a_bad_pixel_stays_alone(value, layout, d, backend):
    clean = LAYOUTS[layout](torch.float32, d)
    x = clean.clone()
    x[(1, 3, *[2] * (x.ndim - 2))] = value
    bad = ~x.isfinite().all(1, keepdim=True).expand_as(x)
    grad, results = normal(*x.shape), []
    for leaf in (x, clean):
        leaf = leaf.clone().requires_grad_()
        y = ops.normalize_embedding(leaf, backend=backend)
        results.append((y.detach(), torch.autograd.grad(y, leaf, grad)[0]))
    for dirty, expected in zip(*results, strict=True):
        assert torch.equal(dirty.isnan(), bad)
        assert torch.equal(dirty[~bad], expected[~bad])


@sizes("d", triton=(6,), cuda=(6, 600))
@pytest.mark.parametrize("columns", (False, True))
def test_a_zero_vector_has_embedding_and_gradient_zero(columns, d, backend):
    x = normal(4, d)
    x[2] = 1000.1
    x = (x.T.contiguous().T if columns else x).requires_grad_()
    y = ops.normalize_embedding(x, backend=backend)
    (grad,) = torch.autograd.grad(y, x, normal(4, d))
    assert not y[2].any() and not grad[2].any()
    assert (y[[0, 1, 3]] != 0).float().mean() > 0.99 and (grad[[0, 1, 3]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("layout", ("rows", "planes"))
def test_a_length_below_the_bound_is_divided_by_the_bound(layout, backend):
    weight, bias = affine(9)
    x = features(layout, 8, 9)
    check(backend, x, weight * 1e-13, bias * 1e-13, normal(*x.shape))


def test_one_channel_is_the_sign_of_the_bias(backend):
    for value in (-0.5, 2.0):
        bias = torch.tensor([value], device=DEVICE)
        y = ops.normalize_embedding(normal(5, 1), torch.ones(1, device=DEVICE), bias, backend=backend)
        assert torch.equal(y, torch.full((5, 1), value, device=DEVICE).sign())


@pytest.mark.parametrize("shape", ((0, 5), (2, 5, 0, 3)))
def test_no_pixels(shape, backend):
    x = torch.zeros(shape, device=DEVICE, requires_grad=True)
    weight, bias = (t.requires_grad_() for t in affine(5))
    y = ops.normalize_embedding(x, weight, bias, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == torch.Size(shape)
    assert not weight.grad.any() and not bias.grad.any()


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("d", (9, 16))
def test_nothing_is_written_beside_the_outputs(dtype, d, backend, kernels):
    x, statistics = normal(21, d, dtype=dtype), [torch.zeros(21, device=DEVICE) for _ in range(3)]
    _, *found = op.normalize_embedding(NormalizeCall(x, None, None, EPS, backend))
    grad, expected = normal(21, d, dtype=dtype), torch.empty_like(x)
    kernels.normalize_embedding_backward(
        NormalizeBackwardCall(x, None, None, *found, grad, None, backend), NormalizeBackwardOut(expected, None, None)
    )
    frame = torch.full((48, 48), 7.0, device=DEVICE, dtype=dtype)
    padded = x.new_zeros(21, 48)
    padded[:, :d] = x
    for source in (x, x.T.contiguous().T, padded[:, :d]):
        for out in (frame[5:26, 3 : 3 + d], frame[5:26, 8 : 8 + d], frame[5:26, 3 : 3 + 2 * d : 2], frame.T[8:29, 8 : 8 + d]):
            for backward in (False, True):
                if backward:
                    kernels.normalize_embedding_backward(
                        NormalizeBackwardCall(source, None, None, *found, grad, None, backend),
                        NormalizeBackwardOut(out, None, None),
                    )
                    torch.testing.assert_close(out, expected)
                else:
                    kernels.normalize_embedding(NormalizeCall(source, None, None, EPS, backend), NormalizeOut(out, *statistics))
                    assert not (out == 7).any()
                out.fill_(7.0)
                assert (frame == 7).all()
