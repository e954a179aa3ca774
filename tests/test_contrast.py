"""subcentroid_cross_entropy: loss and gradients against float64, layouts, special pixels, tracing, errors."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._common import _scale_half
from dnc_kernels.ops.similarity import cpu, op, op_loss
from dnc_kernels.ops.similarity.calls import ScoresBackwardCall, ScoresBackwardOut, ScoresCall, SweepCall, SweepOut

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def problem(n, c, k, d, dtype=torch.float32, ignored=0.2):
    """Unit pixels, unit sub-centroids, targets with some -1."""
    x = F.normalize(torch.randn(n, d, dtype=torch.float64), dim=1).to(dtype)
    p = F.normalize(torch.randn(c, k, d, dtype=torch.float64), dim=2).to(dtype)
    target = torch.randint(0, c * k, (n,))
    return x, p, torch.where(torch.rand(n) < ignored, -1, target)


def expected_loss(x, p, target, temperature, reduction):
    rows = x if x.ndim == 2 else x.movedim(1, -1).flatten(0, 2)
    return F.cross_entropy(rows @ p.flatten(0, 1).T / temperature, target.flatten(), ignore_index=-1, reduction=reduction)


def check(x, p, target, temperature=0.2, reduction="sum", centroids=False):
    """Loss and gradients of the cpu kernel against float64."""
    x = x.detach().requires_grad_()
    p = p.detach().requires_grad_(centroids)
    loss = ops.subcentroid_cross_entropy(
        x, p, target, temperature=temperature, ignore_index=-1, reduction=reduction, backend="cpu"
    )
    a, b = x.detach().double().requires_grad_(), p.detach().double().requires_grad_(centroids)
    expected = expected_loss(a, b, target, temperature, reduction)
    assert loss.dtype == (torch.float64 if x.dtype == torch.float64 else torch.float32)
    grad = torch.randn(expected.shape, dtype=torch.float64)
    inputs = ((x, p), (a, b)) if centroids else ((x,), (a,))
    actual = torch.autograd.grad(loss, inputs[0], grad.view(loss.shape).to(loss.dtype))
    wanted = torch.autograd.grad(expected, inputs[1], grad)
    terms, size = x.shape[1] + p.shape[0] * p.shape[1], float(grad.abs().max()) / temperature
    pixels = 1 if reduction == "none" else len(target.flatten())
    assert_close(loss.detach().flatten(), expected.detach().flatten(), "loss", terms=terms, scale=pixels / temperature)
    assert actual[0].dtype == x.dtype and actual[0].stride() == torch.empty_like(x).stride()
    assert_close(actual[0], wanted[0], "contrast_gradient", terms=terms, scale=size / temperature / x.shape[1] ** 0.5)
    if centroids:
        assert actual[1].dtype == p.dtype
        assert_close(actual[1], wanted[1], "contrast_gradient", terms=terms * len(target.flatten()), scale=size / temperature)


SHAPES = [
    (1, 1, 1, 1), (13, 1, 4, 7), (64, 3, 1, 16), (65, 5, 3, 33), (50, 16, 2, 32), (47, 19, 10, 64), (31, 17, 7, 48),
    (25, 150, 10, 40), (30, 40, 4, 300), (14, 9, 64, 24), (26, 3, 2, 1100),
]  # fmt: skip


@pytest.mark.parametrize("pixels", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_shapes(shape, pixels, isa):
    x, p, target = problem(*shape)
    check(x.to(pixels), p, target)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_dtypes_and_reductions(dtype, reduction, isa):
    check(*problem(37, 6, 3, 20, dtype), reduction=reduction)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16), ids=str)
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_gradient_of_the_centroids(dtype, reduction):
    check(*problem(37, 6, 3, 20, dtype), reduction=reduction, centroids=True)


def test_gradient_of_the_centroids_over_more_pixels_than_one_product():
    check(*problem(4100, 2, 2, 5), reduction="mean", centroids=True)


@pytest.mark.parametrize(
    ("temperature", "dtype"),
    [
        *((t, torch.float32) for t in (0.01, 1.0, 50.0)),
        *((t, torch.bfloat16) for t in (0.01, 1.0)),
    ],  # see "Accuracy" in the docs
    ids=str,
)
def test_temperatures(temperature, dtype, isa):
    check(*problem(29, 7, 3, 24, dtype), temperature=temperature)


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "crop", "transposed"))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_maps_are_read_in_place(layout, dtype, isa):
    x, p, target = problem(3 * 6 * 9, 5, 3, 24, dtype)
    maps = x.view(3, 6, 9, 24).permute(0, 3, 1, 2)
    x = {
        "nchw": maps.contiguous(),
        "channels_last": maps,
        "crop": F.pad(maps, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
        "transposed": maps.contiguous().transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    check(x, p, target.view(3, 6, 9), reduction="none")


@given(data=st.data(), n=st.integers(1, 40), c=st.integers(1, 20), k=st.integers(1, 12), d=st.integers(1, 40))
def test_any_shape(data, n, c, k, d):
    dtype = data.draw(st.sampled_from(DTYPES))
    check(*problem(n, c, k, d, dtype), reduction=data.draw(st.sampled_from(("mean", "sum", "none"))))


def test_large_similarities_do_not_overflow(isa):
    x, p, target = problem(20, 4, 3, 16)
    check(100 * x, p, target, temperature=0.05)


def test_the_target_may_be_far_below_the_best(isa):
    p = torch.eye(4).view(2, 2, 4)
    x = torch.tensor([[200.0, 0, 0, 0]])
    loss = ops.subcentroid_cross_entropy(x, p, torch.tensor([3]))
    assert loss == 200


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_left_out_pixels_have_loss_and_gradient_zero(dtype, isa):
    x, p, target = problem(40, 3, 2, 24, dtype)
    target[:13] = -1
    x[:5] = float("nan")
    x.requires_grad_()
    loss = ops.subcentroid_cross_entropy(x, p, target, ignore_index=-1, reduction="none")
    loss.sum().backward()
    left_out = target < 0
    assert not loss[left_out].any() and not x.grad[left_out].any()
    assert loss[~left_out].all() and x.grad[~left_out].any(1).all() and x.grad.isfinite().all()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_bad_pixel_stays_alone(value, dtype, isa):
    x, p, target = problem(30, 3, 2, 24, dtype, ignored=0)
    x[7, 3] = value
    x.requires_grad_()
    loss = ops.subcentroid_cross_entropy(x, p, target, reduction="none")
    loss.sum().backward()
    bad = torch.arange(30) == 7
    assert torch.equal(loss.isnan(), bad) and torch.equal(x.grad.isnan().any(1), bad)


def test_mean_over_nothing_is_nan_with_zero_gradient():
    x, p, _ = problem(5, 3, 2, 8)
    x.requires_grad_(), p.requires_grad_()
    loss = ops.subcentroid_cross_entropy(x, p, torch.full((5,), -1), ignore_index=-1)
    loss.backward()
    assert loss.isnan() and not x.grad.any() and not p.grad.any()


def test_no_pixels():
    x, p, target = problem(0, 3, 2, 8)
    x.requires_grad_()
    loss = ops.subcentroid_cross_entropy(x, p, target, reduction="sum")
    loss.backward()
    assert loss == 0 and x.grad.shape == (0, 8)


def test_subcentroid_255_is_not_dropped():
    """The released code ignores sub-centroid 255; with -100 or -1 every one of C*K counts."""
    x, p, _ = problem(n=4, c=30, k=10, d=8)
    losses = ops.subcentroid_cross_entropy(x, p, torch.full((4,), 255), reduction="none")
    assert losses.gt(0).all()
    with pytest.raises(ValueError, match=r"ignore_index must be outside \[0,300\); got 255"):
        ops.subcentroid_cross_entropy(x, p, torch.full((4,), 255), ignore_index=255)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_threads_change_no_bit(dtype, isa):
    x, p, target = problem(500, 7, 5, 33, dtype)
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        leaf = x.clone().requires_grad_()
        loss = ops.subcentroid_cross_entropy(leaf, p, target, ignore_index=-1, reduction="none")
        loss.sum().backward()
        results.append((loss.detach(), leaf.grad))
    torch.set_num_threads(2)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
def test_a_loss_scale_beyond_half_precision_is_applied_in_single(dtype):
    """65536, the first scale of GradScaler, is infinite in float16."""
    x, p, target = problem(4096, 3, 2, 8, dtype, ignored=0)
    x.requires_grad_()
    (65536 * ops.subcentroid_cross_entropy(x, p, target)).backward()
    wide = x.detach().double().requires_grad_()
    (65536 * expected_loss(wide, p.double(), target, 1.0, "mean")).backward()
    # the row of a pixel is rounded when it is made, and again when it is scaled
    assert (x.grad.double() - wide.grad).abs().max() <= 2 * torch.finfo(dtype).eps * wide.grad.abs().max()


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=str)
@pytest.mark.parametrize("shape", ((700, 500), (2, 60, 70, 50)), ids=str)
def test_many_gradients_in_half_precision_are_scaled_as_torch_scales_them(shape, dtype):
    x = torch.randn(shape).to(dtype)
    for y in (x, x.transpose(-1, -2).contiguous().transpose(-1, -2)):
        factor = torch.randn(shape[0], 1, *shape[2:])
        scaled = y.clone()
        _scale_half(scaled, factor.expand_as(y))
        assert torch.equal(scaled, y.clone().mul_(factor))


def test_gradients_can_be_asked_for_twice():
    x, p, target = problem(20, 3, 2, 8)
    x.requires_grad_()
    loss = ops.subcentroid_cross_entropy(x, p, target, ignore_index=-1)
    (once,) = torch.autograd.grad(loss, x, retain_graph=True)
    (twice,) = torch.autograd.grad(loss, x)
    assert torch.equal(once, twice)


def test_expanded_incoming_gradient():
    x, p, target = problem(20, 3, 2, 8)
    x.requires_grad_()
    options = {"ignore_index": -1}
    ops.subcentroid_cross_entropy(x, p, target, reduction="none", **options).sum().backward()
    (expected,) = torch.autograd.grad(ops.subcentroid_cross_entropy(x, p, target, reduction="sum", **options), x)
    assert torch.equal(x.grad, expected)


def test_gradcheck():
    x, p, target = problem(6, 3, 2, 5, torch.float64)
    x.requires_grad_(), p.requires_grad_()
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda a, b, r=reduction: ops.subcentroid_cross_entropy(
                a, b, target, temperature=0.3, ignore_index=-1, reduction=r
            ),
            (x, p),
        )


def test_opcheck():
    x, p, target = problem(6, 3, 2, 4)
    x.requires_grad_()
    check = torch.library.opcheck
    check(op_loss._contrast.overload, (x, p, target, 0.5, -1, "cpu", True))
    check(op_loss._contrast.overload, (x.detach(), p, target, 0.5, -1, "cpu", False))
    check(op_loss._contrast_backward.overload, (x.detach(), p, target, 0.5, -1, "cpu", torch.randn(6)))


@pytest.mark.parametrize("backend", ("aot_eager", "inductor"))
def test_compiles_for_any_size(backend):
    def step(x, p, target):
        return ops.subcentroid_cross_entropy(x, p, target, ignore_index=-1)

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for n in (20, 33):
        x, p, target = problem(n, 3, 2, 8)
        x.requires_grad_()
        (expected,) = torch.autograd.grad(step(x, p, target), x)
        (actual,) = torch.autograd.grad(compiled(x, p, target), x)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("gradient", (False, True))
def test_scores_from_the_same_product_are_the_scores(gradient, dtype, isa):
    x, p, target = problem(70, 19, 10, 24, dtype)
    p = p.float()
    labels = torch.where(target < 0, -1, target // 10)
    mean = torch.full_like(x, float("nan")) if gradient else None
    results = torch.empty(70, 19), torch.empty(70, 19, dtype=torch.uint8), torch.empty(70, 10), torch.empty(70)
    cpu.scores_and_contrast(SweepCall(x, p, labels, 0.5, torch.tensor(3.0), "cpu"), SweepOut(*results, mean))
    for actual, expected in zip(results[:3], op.class_scores(ScoresCall(x, p, labels, "dot", "cpu")), strict=True):
        assert torch.equal(actual, expected)
    s = x.double() @ p.double().flatten(0, 1).T / 0.5
    kept = (labels >= 0)[:, None]
    assert_close(results[3], torch.where(kept[:, 0], s.logsumexp(1), 0), "loss", terms=24 + 190, scale=2)
    if gradient:
        expected = torch.where(kept, 3 * s.softmax(1) @ p.double().flatten(0, 1) / 0.5, 0)
        assert_close(mean, expected, "contrast_gradient", terms=24 + 190, scale=6)


@pytest.mark.parametrize("layout", ("rows", "nchw"))
def test_gradients_add_up_in_place(layout, isa):
    x, p, target = problem(2 * 5 * 7, 19, 10, 24)
    labels = torch.where(target < 0, -1, target // 10)
    if layout == "nchw":
        x = x.view(2, 5, 7, 24).permute(0, 3, 1, 2).contiguous()
    shaped = labels.view(2, 5, 7) if layout == "nchw" else labels
    leaf = x.clone().requires_grad_()
    scores, winner, own = op.class_scores(ScoresCall(leaf, p, shaped.flatten(), "dot", "cpu"))
    to_scores, to_own = torch.randn_like(scores), torch.randn_like(own)
    to_own[:, ::2] = 0
    (expected,) = torch.autograd.grad([scores, own], leaf, [to_scores, to_own])
    grad = x.clone()
    for parts in ((None, "dot", winner, to_scores, None), (labels, "dot", None, None, to_own)):
        cpu.class_scores_backward(ScoresBackwardCall(grad, p, *parts, True, "cpu"), ScoresBackwardOut(grad, None))
    torch.testing.assert_close(grad - x, expected)


X, P, T = torch.zeros(6, 4), torch.ones(3, 2, 4), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda: ops.subcentroid_cross_entropy(X, P, T + 6), ValueError, r"labels.* in \[0,.*\), ignore_index.*got 6 at pixel 0"),
        (lambda: ops.subcentroid_cross_entropy(X, P[:, :, :3], T), ValueError, r"centroids must be \[C,K,D\] with D=4"),
        (lambda: ops.subcentroid_cross_entropy(X, P, T[:5]), ValueError, r"labels must be \[N\]=\[6\] to match x; got \[5\]"),
        (lambda: ops.subcentroid_cross_entropy(X, P, T.float()), TypeError, r"labels must be an integer"),
        (lambda: ops.subcentroid_cross_entropy(X, P, T, temperature=0), ValueError, r"temperature must be positive and finite; got 0"),
        (lambda: ops.subcentroid_cross_entropy(X, P, T, temperature=torch.ones((), requires_grad=True)), TypeError, r"temperature must be a number, .* got \[\] float32 .*no gradient"),
        (lambda: ops.subcentroid_cross_entropy(X, P, T, reduction="avg"), ValueError, r"reduction must be one of none, mean, sum"),
        (lambda: ops.subcentroid_cross_entropy(X.int(), P, T), TypeError, r"x must be"),
        (lambda: ops.subcentroid_cross_entropy(X, P, T, backend="cuda"), RuntimeError, r"subcentroid_cross_entropy has no cuda kernel"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()
