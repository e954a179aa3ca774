"""normalize_embedding: values and gradients against float64, layouts, special pixels, tracing, errors."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from dnc_kernels import backends, ops, use_isa
from dnc_kernels.ops.embedding import op
from dnc_kernels.ops.embedding.calls import NormalizeBackwardCall, NormalizeCall, NormalizeOut

EPS = 1e-5
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
GOLDEN = sorted((Path(__file__).parent / "data").glob("golden_*.npz"))


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def channels_last(t):
    return t.contiguous(memory_format=torch.channels_last)


#: layout -> (dtype, D) -> features with a few hundred pixels, off every tile size
LAYOUTS = {
    "rows": lambda dtype, d: normal(173, d, dtype=dtype),
    "row slice": lambda dtype, d: normal(67, d + 5, dtype=dtype)[::2, 3 : 3 + d],
    "transposed": lambda dtype, d: normal(d, 131, dtype=dtype).T,
    "every other channel": lambda dtype, d: normal(70, 2 * d, dtype=dtype)[:, ::2],
    "one pixel repeated": lambda dtype, d: normal(1, d, dtype=dtype).expand(21, d),
    "nchw": lambda dtype, d: normal(2, d, 9, 11, dtype=dtype),
    "channels_last": lambda dtype, d: channels_last(normal(2, d, 9, 11, dtype=dtype)),
    "nchw crop": lambda dtype, d: normal(3, d, 8, 23, dtype=dtype)[:, :, 1:7, 2:21],
    "channels_last crop": lambda dtype, d: channels_last(normal(3, d, 8, 23, dtype=dtype))[:, :, 1:7, 2:21],
    "nchw channel crop": lambda dtype, d: normal(2, d + 4, 7, 13, dtype=dtype)[:, 2 : 2 + d],
    "w before h": lambda dtype, d: normal(2, d, 9, 11, dtype=dtype).transpose(2, 3),
    "every other column": lambda dtype, d: normal(2, d, 5, 30, dtype=dtype)[..., ::2],
}


def affine(d, dtype):
    return normal(d, dtype=dtype) * 0.5 + 1, normal(d, dtype=dtype) * 0.3


def gradients(y, inputs, grad):
    return torch.autograd.grad(y, [t for t in inputs if t is not None], grad)


def check(x, weight, bias, grad):
    """Compare the cpu kernel, forward and backward, with torch in float64."""
    x, weight, bias = (t if t is None else t.detach().requires_grad_() for t in (x, weight, bias))
    y = ops.normalize_embedding(x, weight, bias, eps=EPS, backend="cpu")
    assert y.dtype == x.dtype and y.shape == x.shape and y.stride() == torch.empty_like(x).stride()
    actual = gradients(y, (x, weight, bias), grad)

    d = x.shape[1]
    wide = [t if t is None else t.detach().double().requires_grad_() for t in (x, weight, bias)]
    rows = wide[0] if x.ndim == 2 else wide[0].movedim(1, -1)
    z = F.layer_norm(rows, (d,), wide[1], wide[2], EPS)
    expected_y = F.normalize(z, dim=-1) if x.ndim == 2 else F.normalize(z, dim=-1).movedim(-1, 1)
    expected = gradients(expected_y, wide, grad.double())

    # Magnitudes in each pixel: of what is added up to z, relative to |z|, and of what is added up to its gradients.
    wide, rows, z, size = [t if t is None else t.detach() for t in wide], rows.detach(), z.detach(), grad.double().abs().max()
    rstd, length = (rows.var(-1, correction=0, keepdim=True) + EPS).rsqrt(), z.norm(dim=-1, keepdim=True)
    w, b = (1 if wide[1] is None else wide[1].abs()), (0 if wide[2] is None else wide[2].abs())
    mean = rows.mean(-1, keepdim=True)
    xhat = ((rows - mean) * rstd).abs() + mean.abs() * rstd  # the mean is rounded to the compute type
    spread = (xhat * w + b).amax(-1, keepdim=True) / length
    to_z = size / length * (1 + spread)
    to_x = to_z * rstd * torch.as_tensor(w).max() * (1 + mean.abs() * rstd)
    shaped = (lambda t: t) if x.ndim == 2 else (lambda t: t.movedim(-1, 1))
    assert_close(y.detach(), expected_y.detach(), "embedding", terms=d, scale=shaped(spread))
    assert_close(actual[0], expected[0], "embedding_grad", terms=d, scale=shaped(to_x))
    for a, e in zip(actual[1:], expected[1:], strict=True):
        assert a.dtype == (bias if weight is None else weight).dtype
        assert_close(a, e, "embedding_param_grad", terms=x.numel() // d, scale=float((to_z * xhat.clamp_min(1)).max()))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_value_and_gradients_in_every_layout(layout, dtype, isa):
    x = LAYOUTS[layout](dtype, 37)
    check(x, *affine(37, torch.float64 if dtype == torch.float64 else torch.float32), normal(*x.shape, dtype=dtype))


@pytest.mark.parametrize("d", (2, 3, 15, 16, 17, 64, 100, 1030, 2100))
@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_channel_counts_around_vectors_and_tiles(layout, d, isa):
    x = LAYOUTS[layout](torch.float32, d)
    check(x, *affine(d, torch.float32), normal(*x.shape))


@pytest.mark.parametrize("n", (1, 2, 15, 16, 17, 31, 63, 64, 65, 127, 129, 1025))
@pytest.mark.parametrize("columns", (False, True))
def test_pixel_counts_around_tiles_and_chunks(n, columns, isa):
    x = normal(19, n).T if columns else normal(n, 19)
    check(x, *affine(19, torch.float32), normal(n, 19))


@pytest.mark.parametrize("with_weight", (False, True))
@pytest.mark.parametrize("with_bias", (False, True))
@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_weight_and_bias_are_optional(layout, with_weight, with_bias):
    x = LAYOUTS[layout](torch.float32, 21)
    weight, bias = affine(21, torch.float32)
    check(x, weight if with_weight else None, bias if with_bias else None, normal(*x.shape))


@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_parameters_keep_their_own_dtype(layout):
    x = LAYOUTS[layout](torch.bfloat16, 24)
    weight, bias = (t.requires_grad_() for t in affine(24, torch.bfloat16))
    y = ops.normalize_embedding(x, weight, bias)
    y.float().square().sum().backward()
    assert y.dtype == weight.grad.dtype == bias.grad.dtype == torch.bfloat16


def test_strided_parameters():
    x, weight = normal(9, 12), normal(24)[::2]
    torch.testing.assert_close(
        ops.normalize_embedding(x, weight, backend="cpu"),
        ops.normalize_embedding(x, weight.clone(), backend="cpu"),
        rtol=0,
        atol=0,
    )


@pytest.mark.parametrize("layout", ("rows", "nchw", "channels_last"))
def test_a_large_mean_costs_no_variance(layout, isa):
    x = LAYOUTS[layout](torch.float32, 256) + 1000
    weight, bias = affine(256, torch.float32)
    y, mean, rstd, inverse_norm = op.normalize_embedding(NormalizeCall(x, weight, bias, EPS, "cpu"))
    wide = x.double().movedim(1, -1).reshape(-1, 256) if x.ndim == 4 else x.double()
    # one rounding of the mean; the variance as exact as without the offset
    assert (mean - wide.mean(1)).abs().max() <= 1000 * torch.finfo(torch.float32).eps
    torch.testing.assert_close(rstd.double(), (wide.var(1, correction=0) + EPS).rsqrt(), rtol=4e-7, atol=0)
    z = F.layer_norm(wide, (256,), weight.double(), bias.double(), EPS)
    torch.testing.assert_close(inverse_norm.double(), 1 / z.norm(dim=1), rtol=2e-5, atol=0)
    expected = F.normalize(z)
    actual = y.movedim(1, -1).reshape(-1, 256) if x.ndim == 4 else y
    assert_close(actual, expected, "embedding", terms=1, scale=1000 / 16)
    check(x, weight, bias, normal(*x.shape))


@pytest.mark.parametrize("scale", (1e-6, 1e-3, 1e3, 1e8))
@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_small_and_large_features(scale, layout):
    x = LAYOUTS[layout](torch.float32, 33) * scale
    check(x, *affine(33, torch.float32), normal(*x.shape))


# gradients


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("layout", ("rows", "nchw", "channels_last"))
def test_gradcheck(backend, layout):
    make = {"rows": (5, 4), "nchw": (2, 3, 2, 3), "channels_last": (2, 3, 2, 3)}[layout]
    x = normal(*make, dtype=torch.float64)
    x = (channels_last(x) if layout == "channels_last" else x).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(x.shape[1], torch.float64))
    assert torch.autograd.gradcheck(lambda *a: ops.normalize_embedding(*a, backend=backend), (x, weight, bias))
    assert torch.autograd.gradcheck(lambda a: ops.normalize_embedding(a, backend=backend), (x,))


@pytest.mark.parametrize("backend", ("reference", "cpu"))
def test_second_derivative(backend):
    x = normal(3, 4, dtype=torch.float64).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(4, torch.float64))
    assert torch.autograd.gradgradcheck(lambda *a: ops.normalize_embedding(*a, backend=backend), (x, weight, bias))


GRADS = {
    "expanded scalar": lambda x: torch.tensor(0.7).expand(x.shape),
    "expanded over pixels": lambda x: normal(1, x.shape[1], *[1] * (x.ndim - 2)).expand(x.shape),
    "expanded over channels": lambda x: normal(x.shape[0], 1, *x.shape[2:]).expand(x.shape),
    "other memory order": lambda x: normal(*x.shape[::-1]).permute(*range(x.ndim)[::-1]),
    "slice": lambda x: normal(*x.shape[:-1], 2 * x.shape[-1])[..., ::2],
    "channels_last": lambda x: channels_last(normal(*x.shape)) if x.ndim == 4 else normal(*x.shape),
}


@pytest.mark.parametrize("grad", GRADS)
@pytest.mark.parametrize("layout", ("rows", "nchw", "channels_last"))
def test_incoming_gradient_of_any_strides(grad, layout, isa):
    x = LAYOUTS[layout](torch.float32, 40)
    check(x, *affine(40, torch.float32), GRADS[grad](x))


def test_sum_backward_is_an_expanded_gradient():
    x = normal(2, 8, 3, 5).requires_grad_()
    ops.normalize_embedding(x, backend="cpu").sum().backward()
    expected = torch.autograd.grad(ops.normalize_embedding(x, backend="reference").sum(), x)[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("need", [(a, b, c) for a in (0, 1) for b in (0, 1) for c in (0, 1) if a + b + c])
def test_only_gradients_that_are_needed(need):
    tensors = [normal(6, 8), *affine(8, torch.float32)]
    full = [t.clone().requires_grad_() for t in tensors]
    grad = normal(6, 8)
    ops.normalize_embedding(*full, backend="cpu").backward(grad)
    some = [t.clone().requires_grad_(bool(n)) for t, n in zip(tensors, need, strict=True)]
    ops.normalize_embedding(*some, backend="cpu").backward(grad)
    for s, f, n in zip(some, full, need, strict=True):
        assert torch.equal(s.grad, f.grad) if n else s.grad is None


def test_gradients_that_are_not_needed_are_not_made():
    x, (weight, bias) = normal(6, 8), affine(8, torch.float32)
    y, *statistics = op.normalize_embedding(NormalizeCall(x, weight, bias, EPS, "cpu"))
    call = NormalizeBackwardCall(x, weight, bias, *statistics, torch.ones_like(y), None, "cpu")
    grad_x, grad_weight, grad_bias = op.normalize_embedding_backward(call, [False, True, False])
    assert grad_x is None and grad_bias is None and grad_weight.shape == (8,)


def test_embedding_and_rstd_carry_gradients():
    outputs = op.normalize_embedding(NormalizeCall(normal(4, 5).requires_grad_(), None, None, EPS, "cpu"))
    assert [t.requires_grad for t in outputs] == [True, False, True, False]  # of rstd, the length is made


# the length that LayerNorm divides by


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("with_y", (False, True))
def test_length_and_its_gradient(layout, dtype, with_y, isa):
    x = LAYOUTS[layout](dtype, 37).detach().requires_grad_()
    y, length = ops.normalize_embedding(x, eps=EPS, return_length=True, backend="cpu")
    assert length.shape == (x.shape[0], *x.shape[2:]) and length.dtype == (
        torch.float64 if dtype == torch.float64 else torch.float32
    )
    to_y, to_length = normal(*x.shape, dtype=dtype), normal(*length.shape).to(length.dtype)
    loss = (length * to_length).sum() + ((y * to_y).sum() if with_y else 0)
    (actual,) = torch.autograd.grad(loss, x)

    wide = x.detach().double().requires_grad_()
    expected_length = (wide.var(1, correction=0) + EPS).sqrt()
    rows = wide if x.ndim == 2 else wide.movedim(1, -1)
    expected_y = F.normalize(F.layer_norm(rows, (37,), eps=EPS), dim=-1)
    expected_y = expected_y if x.ndim == 2 else expected_y.movedim(-1, 1)
    total = (expected_length * to_length.double()).sum() + ((expected_y * to_y.double()).sum() if with_y else 0)
    (expected,) = torch.autograd.grad(total, wide)
    assert_close(length.detach(), expected_length.detach(), "embedding", terms=37)
    spread = to_y.abs().double().max() / (expected_length.detach() * 37**0.5).unsqueeze(1)
    scale = to_length.abs().double().unsqueeze(1) / 37**0.5 + (4 * spread if with_y else 0)
    assert_close(actual, expected, "embedding_grad", terms=37, scale=scale)


def test_gradcheck_with_length():
    x, (weight, bias) = normal(5, 6, dtype=torch.float64).requires_grad_(), affine(6, torch.float64)
    assert torch.autograd.gradcheck(lambda t: ops.normalize_embedding(t, weight, bias, return_length=True), (x,))
    assert torch.autograd.gradcheck(
        lambda t: ops.normalize_embedding(t, return_length=True), (normal(2, 4, 2, 3, dtype=torch.float64).requires_grad_(),)
    )


def test_length_of_a_constant_pixel_is_finite():
    x = torch.full((3, 8), 2.0, requires_grad=True)
    _, length = ops.normalize_embedding(x, return_length=True)
    length.sum().backward()
    torch.testing.assert_close(length, torch.full((3,), EPS**0.5))
    assert not x.grad.any()


# special pixels


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("layout", ("rows", "nchw", "channels_last", "nchw crop"))
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_a_bad_pixel_stays_alone(value, layout, backend):
    clean = LAYOUTS[layout](torch.float32, 20)
    x = clean.clone()
    x[(1, 3, *[2] * (x.ndim - 2))] = value
    bad = ~x.isfinite().all(1, keepdim=True).expand_as(x)
    weight, bias = affine(20, torch.float32)
    grad = normal(*x.shape)
    results = []
    for features in (x, clean):
        features = features.clone().requires_grad_()
        y = ops.normalize_embedding(features, weight, bias, backend=backend)
        results.append((y.detach(), torch.autograd.grad(y, features, grad)[0]))
    for dirty, expected in zip(*results, strict=True):
        assert torch.equal(dirty.isnan(), bad)
        assert torch.equal(dirty[~bad], expected[~bad])


@pytest.mark.parametrize("backend", ("cpu", "reference"))
@pytest.mark.parametrize("columns", (False, True))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_zero_vector_has_embedding_and_gradient_zero(backend, columns, dtype):
    x = normal(4, 6, dtype=dtype)
    x[2] = 2.0
    x = (x.T.contiguous().T if columns else x).requires_grad_()
    y = ops.normalize_embedding(x, backend=backend)
    (grad,) = torch.autograd.grad(y, x, normal(4, 6, dtype=dtype))
    assert torch.equal(y[2], torch.zeros_like(y[2])) and torch.equal(grad[2], torch.zeros_like(grad[2]))
    assert (y[[0, 1, 3]] != 0).all() and (grad[[0, 1, 3]].abs().sum(1) > 0).all()


@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_zero_weight_gives_zero(backend):
    x, weight = normal(4, 6).requires_grad_(), torch.zeros(6, requires_grad=True)
    y = ops.normalize_embedding(x, weight, backend=backend)
    y.sum().backward()
    assert not y.any() and not x.grad.any() and not weight.grad.any()


@pytest.mark.parametrize("value", (0.1, 1000.1, -3.3))
@pytest.mark.parametrize("columns", (False, True))
def test_a_constant_pixel_has_no_rounding_noise(value, columns, isa):
    x = torch.full((20, 48), value)
    x = x.T.contiguous().T if columns else x
    assert not ops.normalize_embedding(x, backend="cpu").any()


@pytest.mark.parametrize("shape", ((7, 1), (2, 1, 3, 4)))
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_one_channel_is_the_sign_of_the_bias(shape, backend, isa):
    x = normal(*shape)
    assert not ops.normalize_embedding(x, backend=backend).any()
    for value in (-0.5, 2.0):
        y = ops.normalize_embedding(x, torch.ones(1), torch.tensor([value]), backend=backend)
        assert torch.equal(y, torch.full(shape, value).sign())
    check(x, torch.ones(1), torch.tensor([0.5]), normal(*shape))


@pytest.mark.parametrize("shape", ((0, 5), (0, 5, 2, 3), (2, 5, 0, 3)))
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_no_pixels(shape, backend):
    x = torch.zeros(shape, requires_grad=True)
    weight, bias = (t.requires_grad_() for t in affine(5, torch.float32))
    y = ops.normalize_embedding(x, weight, bias, backend=backend)
    y.sum().backward()
    assert y.shape == x.grad.shape == torch.Size(shape)
    assert torch.equal(weight.grad, torch.zeros(5)) and torch.equal(bias.grad, torch.zeros(5))


# determinism, memory


@pytest.mark.parametrize("layout", ("rows", "nchw"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bit_equal_for_any_number_of_threads(layout, dtype):
    shape = (3001, 48) if layout == "rows" else (3, 48, 31, 37)
    x, grad = normal(*shape, dtype=dtype).requires_grad_(), normal(*shape, dtype=dtype)
    weight, bias = (t.requires_grad_() for t in affine(48, torch.float32))
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7, 2):
            torch.set_num_threads(threads)
            y = ops.normalize_embedding(x, weight, bias, backend="cpu")
            results.append((y.detach(), *torch.autograd.grad(y, (x, weight, bias), grad)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("layout", ("rows", "columns", "every other"))
def test_nothing_is_written_beside_the_output(layout, isa):
    x, (mean, rstd, inverse) = normal(45, 19), torch.zeros(3, 45)
    frame = torch.full((60, 60), 7.0)
    y = {"rows": frame[5:50, 3:22], "columns": frame.T[5:50, 3:22], "every other": frame[5:50, 3:41:2]}[layout]
    source = x.T.contiguous().T if layout == "columns" else x
    call, out = NormalizeCall(source, None, None, EPS, "cpu"), NormalizeOut(y, mean, rstd, inverse)
    backends.native().normalize_embedding("normalize_embedding", 2, call, out)
    assert_close(y, F.normalize(F.layer_norm(x.double(), (19,), eps=EPS)), "embedding", terms=19, scale=19**-0.5)
    y.fill_(7.0)
    assert torch.equal(frame, torch.full((60, 60), 7.0))


def test_input_is_not_changed():
    x = normal(2, 9, 4, 4).requires_grad_()
    before = x.detach().clone()
    ops.normalize_embedding(x, backend="cpu").square().sum().backward()
    assert torch.equal(x, before)


# reference, golden vectors


@pytest.mark.parametrize("layout", LAYOUTS)
def test_reference_equals_torch(layout):
    x = LAYOUTS[layout](torch.float64, 11)
    weight, bias = affine(11, torch.float64)
    y = ops.normalize_embedding(x, weight, bias, backend="reference")
    expected = F.normalize(F.layer_norm(x.movedim(1, -1), (11,), weight, bias), dim=-1).movedim(-1, 1)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-13)
    assert y.stride() == torch.empty_like(x).stride()


@pytest.mark.parametrize("path", GOLDEN, ids=lambda p: p.stem)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_golden_embedding_and_gradients(path, backend):
    data = {k: torch.from_numpy(np.asarray(v)) for k, v in np.load(path).items()}
    names = ("x", "feat_norm_weight", "feat_norm_bias")
    leaves = [data[name].requires_grad_() for name in names]
    e = ops.normalize_embedding(*leaves, backend=backend)
    d = e.shape[1]
    assert_close(e.detach(), data["embedding"].double(), "embedding", terms=d, scale=d**-0.5)

    # the rest of the released head in plain torch; its gradients then pass through the embedding
    centroids = F.normalize(data["prototypes"], dim=-1)
    raw = torch.einsum("nd,ckd->nck", e, centroids).amax(2)
    scores = F.layer_norm(raw, raw.shape[1:], data["mask_norm_weight"], data["mask_norm_bias"])
    loss = F.cross_entropy(scores, data["labels"], ignore_index=int(data["ignore_index"]))
    assert_close(loss.detach(), data["cross_entropy"].double(), "embedding", terms=d)
    for name, grad in zip(names, torch.autograd.grad(loss, leaves), strict=True):
        expected = data[f"grad_{name}"].double()
        # LayerNorm over the classes, whose rstd is about 10, stands between the loss and the embedding
        assert_close(grad, expected, "embedding_grad", terms=len(e), scale=float(expected.abs().max()))


def test_there_are_golden_files():
    assert len(GOLDEN) == 4


# torch integration


@pytest.mark.parametrize("layout", ("rows", "nchw", "channels_last", "nchw crop", "transposed"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_opcheck(layout, dtype):
    x = LAYOUTS[layout](dtype, 6).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(6, torch.float32))
    torch.library.opcheck(op.normalize_embedding.overload, (x, weight, bias, EPS, "cpu"))
    y, *statistics = op.normalize_embedding(NormalizeCall(x.detach(), weight.detach(), None, EPS, "cpu"))
    args = (
        x.detach(),
        weight.detach(),
        None,
        *statistics,
        torch.ones_like(y),
        torch.ones_like(statistics[1]),
        "cpu",
        [True, True, False],
    )
    torch.library.opcheck(op.normalize_embedding_backward.overload, args)


def compiled_equals_eager(function, sizes, layout):
    for n in sizes:
        x = normal(n, 12) if layout == "rows" else normal(2, 12, n, n + 1)
        x = (channels_last(x) if layout == "channels_last" else x).requires_grad_()
        weight, bias = (t.requires_grad_() for t in affine(12, torch.float32))
        grad = normal(*x.shape)
        y, expected = function(x, weight, bias), ops.normalize_embedding(x, weight, bias)
        assert torch.equal(y, expected) and y.stride() == expected.stride()
        for a, b in zip(gradients(y, (x, weight, bias), grad), gradients(expected, (x, weight, bias), grad), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("layout", ("rows", "nchw", "channels_last"))
def test_compiles_once_for_all_sizes(layout):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = torch.compile(ops.normalize_embedding, fullgraph=True, dynamic=True, backend=counter)
    compiled_equals_eager(function, (5,), layout)
    graphs = counter.frame_count
    compiled_equals_eager(function, (9, 14), layout)
    assert counter.frame_count == graphs


def test_compiles_with_inductor():
    torch._dynamo.reset()
    compiled_equals_eager(torch.compile(ops.normalize_embedding, fullgraph=True, dynamic=True), (5, 9), "rows")


def test_reference_compiles():
    torch._dynamo.reset()
    x = normal(2, 12, 5, 6)
    function = torch.compile(ops.normalize_embedding, fullgraph=True, dynamic=True, backend="aot_eager")
    torch.testing.assert_close(function(x, backend="reference"), ops.normalize_embedding(x, backend="reference"))


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("backend", ("cpu", "reference"))
def test_autocast_changes_nothing(dtype, backend):
    x = normal(20, 16, dtype=dtype).requires_grad_()
    weight, bias = (t.requires_grad_() for t in affine(16, torch.float32))
    expected = ops.normalize_embedding(x, weight, bias, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = ops.normalize_embedding(x, weight, bias, backend=backend)
    assert y.dtype == dtype and torch.equal(y, expected)
    y.sum().backward()
    assert x.grad.dtype == dtype and weight.grad.dtype == torch.float32


def test_shapes_on_the_meta_device():
    x = torch.empty(2, 8, 4, 4, device="meta").to(memory_format=torch.channels_last)
    assert ops.normalize_embedding(x, backend="reference").stride() == x.stride()


@given(
    data=st.data(),
    d=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    isa_name=st.sampled_from(backends.usable_isas()),
    four=st.booleans(),
)
def test_any_view(data, d, dtype, isa_name, four):
    sizes = [data.draw(st.integers(1, 5)), d, *([data.draw(st.integers(1, 9)) for _ in range(2)] if four else [])]
    order = data.draw(st.permutations(range(len(sizes))))
    steps = [data.draw(st.integers(1, 2)) for _ in sizes]
    starts = [data.draw(st.integers(0, 2)) for _ in sizes]
    buffer = normal(*[sizes[i] * steps[i] + starts[i] for i in order], dtype=dtype)
    x = buffer.permute(*[order.index(i) for i in range(len(sizes))])
    x = x[tuple(slice(s, s + n * k, k) for s, n, k in zip(starts, sizes, steps, strict=True))]
    assert list(x.shape) == sizes
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    # a bias keeps |z| away from 0, where the direction of a pixel of two channels would jump
    with use_isa(isa_name):
        check(x, normal(d, dtype=compute), normal(d, dtype=compute).abs() + 1, normal(*sizes, dtype=dtype))


# errors


@pytest.mark.parametrize(
    ("error", "pattern", "call"),
    [
        (ValueError, r"normalize_embedding: x must be \[N,D\] or \[B,D,H,W\]; got \[2, 3, 4\]", lambda: (torch.ones(2, 3, 4),)),
        (ValueError, r"x must be of at least one channel; got \[4, 0\]", lambda: (torch.zeros(4, 0),)),
        (TypeError, r"x must be a float32, float64, float16 or bfloat16 .*int64", lambda: (torch.zeros(2, 3).long(),)),
        (TypeError, r"x must be a float32.* tensor; got None", lambda: (None,)),
        (ValueError, r"weight must be \[D\]=\[3\] to match x; got \[4\] float32", lambda: (torch.zeros(2, 3), torch.ones(4))),
        (ValueError, r"bias must be \[D\]=\[3\] to match x; got \[1, 3\]", lambda: (torch.zeros(2, 3), None, torch.ones(1, 3))),
        (TypeError, r"weight must be a float32.* tensor; got \[3\] int64", lambda: (torch.zeros(2, 3), torch.ones(3).long())),
        (ValueError, r"bias must be on cpu like x; got meta", lambda: (torch.zeros(2, 3), None, torch.ones(3, device="meta"))),
    ],
)  # fmt: skip
def test_wrong_tensors(error, pattern, call):
    with pytest.raises(error, match=pattern):
        ops.normalize_embedding(*call())


@pytest.mark.parametrize("eps", (-1e-5, float("nan"), float("inf")))
def test_wrong_eps(eps):
    with pytest.raises(ValueError, match=r"normalize_embedding: eps must be finite and not negative; got"):
        ops.normalize_embedding(torch.zeros(2, 3), eps=eps)


def test_wrong_backend():
    with pytest.raises(ValueError, match="backend must be one of auto, reference, cpu, triton, cuda; got 'gpu'"):
        ops.normalize_embedding(torch.zeros(2, 3), backend="gpu")
    with pytest.raises(
        RuntimeError,
        match="normalize_embedding: backend 'cuda' was asked for but cannot run: the cuda backend runs on cuda tensors, not cpu",
    ):
        ops.normalize_embedding(torch.zeros(2, 3), backend="cuda")


def test_auto_takes_the_kernel():
    x = normal(5, 7)
    assert torch.equal(ops.normalize_embedding(x), ops.normalize_embedding(x, backend="cpu"))
