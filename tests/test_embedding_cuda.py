"""What only the CUDA C++ kernels of normalize_embedding owe, against float64: on a GPU, else their own source on the host."""

import embedding_check
import pytest
import torch
from cuda_on_cpu import DEVICE
from embedding_check import DTYPES, EPS, affine, features, normal
from gpu_check import captured, needs_gpu, no_wait

from dnc_kernels import ops
from dnc_kernels.ops.embedding import cuda as kernels
from dnc_kernels.ops.embedding import op
from dnc_kernels.ops.embedding.calls import NormalizeBackwardCall, NormalizeBackwardOut, NormalizeCall

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]


def check(*args):
    embedding_check.check("cuda", *args)


# up to 32 lanes for a row, 8, 16 or 32 channels a lane; then a block; 6200 (3100 of odd rows): more than it holds
@pytest.mark.parametrize("d", (1, 3, 8, 33, 64, 72, 250, 257, 264, 520, 600, 1032, 2056, 3101, 6200))
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_rows_of_any_length(d, dtype):
    x = normal(11, d, dtype=dtype)
    check(x, *affine(d), normal(*x.shape, dtype=dtype))


# tiles of 128, 64 and 32 bytes a channel, of one array and of two; pixels where they are. The sanitizer takes half its time for
# the deepest: it sees them at the two sizes that end within a tile
PLANES = [
    pytest.param(dtype, n, d, marks=[pytest.mark.sanitize] if d < 7400 or n in (30, 34) else [])
    for dtype, n in ((torch.float32, 40), (torch.float32, 34), (torch.bfloat16, 80), (torch.float16, 30))
    for d in (40, 200, 700, 3400, 7400)
]


@pytest.mark.parametrize(("dtype", "n", "d"), PLANES, ids=str)
def test_planes_of_any_depth(d, dtype, n):
    n = n if d < 3000 else n // 8 * 2
    x = features("planes", n, d, dtype)
    check(x, *affine(d), normal(*x.shape, dtype=dtype))


# a few blocks walk over all of them
@pytest.mark.parametrize(
    ("layout", "n", "d"), (("rows", 1700, 16), ("rows", 900, 9), ("rows", 300, 260), ("rows", 30, 700), ("planes", 500, 12))
)
def test_many_pixels_in_any_order_of_threads(layout, n, d, order):
    x = features(layout, n, d)
    check(x, *affine(d), normal(*x.shape))


@pytest.mark.parametrize(("layout", "d"), (("rows", 16), ("rows", 600), ("rows", 6200), ("planes", 300), ("planes", 7400)))
def test_every_kernel_in_any_order_of_threads(layout, d, order):
    x = features(layout, 6, d, torch.bfloat16)
    check(x, *affine(d), normal(*x.shape, dtype=torch.bfloat16))


@pytest.mark.parametrize("layout", ("rows", "planes"))
@pytest.mark.parametrize("d", (16, 600))
def test_weight_and_bias_off_16_byte_borders(layout, d):
    weight, bias = affine(d + 1)
    x = features(layout, 10, d)
    check(x, weight[1:], bias[1:], normal(*x.shape))


@pytest.mark.parametrize("need", ((1, 0, 0), (0, 1, 0), (0, 0, 1), (1, 0, 1)))
@pytest.mark.parametrize("layout", ("rows", "planes"))
@pytest.mark.parametrize("d", (16, 600))
def test_only_what_is_needed_is_made(need, layout, d):
    x, (weight, bias) = features(layout, 10, d), affine(d)
    _, *statistics = op.normalize_embedding(NormalizeCall(x, weight, bias, EPS, "cuda"))
    call = NormalizeBackwardCall(x, weight, bias, *statistics, normal(*x.shape), None, "cuda")
    expected = op.normalize_embedding_backward(call, [True] * 3)
    grads = op.normalize_embedding_backward(call, list(map(bool, need)))
    for wanted, grad, full in zip(need, grads, expected, strict=True):
        assert torch.equal(grad, full) if wanted else grad is None


def test_a_crop_whose_gradient_is_none(order):
    # tiles are loaded pixel by pixel and stored in pieces: by other threads
    x, grad = normal(1, 8, 20, 17)[..., 1:], normal(1, 8, 20, 16)
    _, *statistics = op.normalize_embedding(NormalizeCall(x, None, None, EPS, "cuda"))
    grad_x, to_bias, expected = torch.empty_like(grad), *(torch.empty(8, device=DEVICE) for _ in range(2))
    kernels.normalize_embedding_backward(
        NormalizeBackwardCall(x, None, None, *statistics, grad, None, "cuda"), NormalizeBackwardOut(grad_x, None, to_bias)
    )
    copy = x.contiguous()
    whole = torch.empty_like(copy)
    kernels.normalize_embedding_backward(
        NormalizeBackwardCall(copy, None, None, *statistics, grad, None, "cuda"), NormalizeBackwardOut(whole, None, expected)
    )
    assert torch.equal(grad_x, whole) and torch.equal(to_bias, expected)


# so many channels that one pass of sums would be off by several roundings
@pytest.mark.parametrize("layout", ("rows", "planes"))
def test_the_saved_mean_is_rounded_once(layout):
    x = features(layout, 4, 6200 if layout == "rows" else 7400) + 1000
    _, mean, *_ = op.normalize_embedding(NormalizeCall(x, None, None, EPS, "cuda"))
    expected = x.double().mean(1).flatten()
    assert (mean.double() - expected).abs().max() <= 1000 * torch.finfo(torch.float32).eps


@pytest.mark.parametrize("columns", (False, True))
def test_equal_channels_have_no_negative_variance(columns):
    x = ((torch.rand(40, 1, device=DEVICE) + 1) * 1e15).expand(40, 600)
    x = x.T.contiguous().T if columns else x.contiguous()
    assert ops.normalize_embedding(x, *affine(600), backend="cuda").isfinite().all()


@pytest.mark.parametrize("columns", (False, True))
def test_constant_pixels_with_a_mean_near_the_largest_number(columns):
    # channels that do not exist must not see the mean: mean * rstd overflows
    x = torch.full((5, 6), 2.0**121, device=DEVICE)
    x = x.T.contiguous().T if columns else x
    bias = normal(6)
    y = ops.normalize_embedding(x, None, bias, backend="cuda")
    torch.testing.assert_close(y, (bias / bias.norm()).expand(5, 6), rtol=1e-5, atol=0)


@pytest.mark.parametrize("layout", ("rows", "planes"))
@pytest.mark.parametrize("d", (12, 700))
def test_results_are_bit_equal_from_run_to_run_and_in_any_order_of_threads(layout, d):
    from cuda_on_cpu import ORDERS, configure

    x, (weight, bias) = features(layout, 62, d), affine(d)
    grad, results = normal(*x.shape), []
    for order in ORDERS:
        if DEVICE == "cpu":
            configure(order)
        leaves = [t.clone().requires_grad_() for t in (x, weight, bias)]
        y = ops.normalize_embedding(*leaves, backend="cuda")
        results.append((y, *torch.autograd.grad(y, leaves, grad)))
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


def test_ops_pass_opcheck():
    for x in (normal(6, 8), normal(2, 5, 2, 3, dtype=torch.bfloat16)):
        d = x.shape[1]
        weight, bias = (t.requires_grad_() for t in affine(d))
        torch.library.opcheck(op.normalize_embedding.overload, (x.requires_grad_(), weight, bias, EPS, "cuda"))
        x, weight, bias = (t.detach() for t in (x, weight, bias))
        y, *statistics = op.normalize_embedding(NormalizeCall(x, weight, bias, EPS, "cuda"))
        arguments = (x, weight, bias, *statistics, torch.randn_like(y), statistics[1], "cuda", [True] * 3)
        torch.library.opcheck(op.normalize_embedding_backward.overload, arguments)


def test_float64_is_refused_by_name():
    with pytest.raises(RuntimeError, match="the cuda kernel does not take float64"):
        ops.normalize_embedding(normal(4, 8).double(), backend="cuda")


@needs_gpu
@pytest.mark.parametrize("layout", ("rows", "planes"))
def test_a_captured_call_replays(layout):
    x, (weight, bias) = features(layout, 1000, 64), affine(64)
    grad = normal(*x.shape)

    def run():
        y, *statistics = op.normalize_embedding(NormalizeCall(x, weight, bias, EPS, "cuda"))
        return y, *op.normalize_embedding_backward(
            NormalizeBackwardCall(x, weight, bias, *statistics, grad, None, "cuda"), [True] * 3
        )

    graph, replayed = captured(run)
    x.copy_(normal(*x.shape))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(), strict=True))


@needs_gpu
def test_the_call_does_not_synchronise():
    x, weight, bias = (t.requires_grad_() for t in (normal(1000, 64), *affine(64)))
    grad = normal(1000, 64)
    torch.autograd.grad(ops.normalize_embedding(x, weight, bias, backend="cuda"), (x, weight, bias), grad)
    with no_wait():
        torch.autograd.grad(ops.normalize_embedding(x, weight, bias, backend="cuda"), (x, weight, bias), grad)


@pytest.mark.large
@needs_gpu
@pytest.mark.parametrize("shape", ((2**23 + 5, 264), (2, 264, 1024, 4100)))
def test_more_elements_than_int32_counts(shape):
    x = torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)
    y, *statistics = op.normalize_embedding(NormalizeCall(x, None, None, EPS, "cuda"))
    grad, *_ = op.normalize_embedding_backward(
        NormalizeBackwardCall(x, None, None, *statistics, y, None, "cuda"), [True, False, False]
    )
    last = (slice(-9, None),) if x.ndim == 2 else (slice(-1, None), slice(None), slice(-1, None), slice(-9, None))
    expected, *_ = op.normalize_embedding(NormalizeCall(x[last], None, None, EPS, "reference"))
    torch.testing.assert_close(y[last], expected)
    assert grad[last].isfinite().all()
