"""upsample_cross_entropy and upsample_argmax, on every backend, against F.interpolate + F.cross_entropy in float64."""

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close
from upsample_check import upsampled

from dnc_kernels import backends, ops

DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
IGNORE = -100


@pytest.fixture(params=("reference", "cpu"), scope="module", autouse=True)
def backend(request):
    with backends.use_backend(request.param):
        yield request.param


def normal(*shape, dtype=torch.float32):
    return torch.randn(shape, dtype=torch.float64).to(dtype)


def random_labels(b, c, size, ignored=0.2):
    labels = torch.randint(c, (b, *size))
    return labels.masked_fill(torch.rand(labels.shape) < ignored, IGNORE)


def expected_loss(scores, labels, align_corners, weight=None, **options):
    """Float64: upsampled, then F.cross_entropy."""
    return F.cross_entropy(
        upsampled(scores, labels.shape[1:], align_corners), labels, None if weight is None else weight.double(), **options
    )


def check(scores, labels, align_corners=False, weight=None, **options):
    leaf = scores.detach().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, labels, align_corners=align_corners, weight=weight, **options)
    wide = scores.detach().double().requires_grad_()
    expected = expected_loss(wide, labels.long(), align_corners, weight, **options)
    assert loss.dtype == (torch.float64 if scores.dtype == torch.float64 else torch.float32)
    grad = torch.randn(loss.shape)
    (actual_grad,) = torch.autograd.grad(loss, leaf, grad.to(loss.dtype))
    (expected_grad,) = torch.autograd.grad(expected, wide, grad.double())
    size = 1 + float(scores.abs().max())
    largest = max(float(expected_grad.abs().max()), 1e-30)  # one class: all gradients are 0
    assert_close(loss.detach(), expected.detach(), "interpolated_loss", terms=scores.shape[1], scale=size)
    assert actual_grad.dtype == scores.dtype
    # sample positions are float32 numbers below the size of the map; their rounding moves the weights
    assert_close(actual_grad, expected_grad, "interpolated_loss", terms=max(labels.shape[1:]) ** 2, scale=size * largest)


SIZES = [
    ((4, 6), (16, 24)),
    ((5, 7), (13, 29)),
    ((3, 3), (4, 5)),
    ((8, 8), (3, 5)),
    ((9, 12), (4, 6)),
    ((1, 5), (6, 5)),
    ((5, 1), (1, 9)),
    ((1, 1), (7, 3)),
    ((6, 4), (1, 1)),
    ((6, 4), (6, 8)),
]


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_up_and_down(sizes, align_corners, reduction):
    (h, w), size = sizes
    check(normal(2, 5, h, w), random_labels(2, 5, size), align_corners, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("align_corners", (False, True))
def test_dtypes(dtype, align_corners):
    check(normal(2, 4, 5, 6, dtype=dtype), random_labels(2, 4, (11, 13)), align_corners)


@pytest.mark.parametrize("weighted", (False, True))
@pytest.mark.parametrize("smoothing", (0.0, 0.1, 1.0))
@pytest.mark.parametrize("reduction", ("mean", "sum", "none"))
def test_class_weights_and_smoothing(weighted, smoothing, reduction):
    weight = torch.rand(6) + 0.1 if weighted else None
    check(normal(3, 6, 4, 5), random_labels(3, 6, (9, 8)), weight=weight, label_smoothing=smoothing, reduction=reduction)


@pytest.mark.parametrize("dtype", (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64), ids=str)
def test_any_integer_labels(dtype):
    scores, labels = normal(2, 3, 4, 4), torch.randint(3, (2, 8, 8))
    labels[0, :3] = 100
    expected = ops.upsample_cross_entropy(scores, labels, ignore_index=100)
    assert torch.equal(ops.upsample_cross_entropy(scores, labels.to(dtype), ignore_index=100), expected)


def test_ignore_index_of_segmentation():
    labels = random_labels(2, 3, (8, 8))
    scores = normal(2, 3, 4, 4)
    expected = ops.upsample_cross_entropy(scores, labels)
    labels[labels == IGNORE] = 255
    assert torch.equal(ops.upsample_cross_entropy(scores, labels.to(torch.uint8), ignore_index=255), expected)


@pytest.mark.parametrize("view", ("channels_last", "crop", "expanded", "transposed"))
def test_strided_scores_and_labels(view):
    base = normal(2, 4, 6, 6)
    scores = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "crop": normal(3, 6, 9, 9)[1:, 1:5, 2:8, :6],
        "expanded": normal(1, 4, 6, 6).expand(2, 4, 6, 6),
        "transposed": base.transpose(2, 3),
    }[view]
    check(scores, random_labels(2, 4, (12, 10)).transpose(1, 2))


@pytest.mark.parametrize("smoothing", (0.0, 0.1))
@pytest.mark.parametrize("weighted", (False, True))
def test_all_ignored_is_nan_with_zero_gradient(smoothing, weighted):
    scores = normal(2, 3, 4, 4).requires_grad_()
    labels = torch.full((2, 8, 8), IGNORE)
    weight = torch.rand(3) if weighted else None
    loss = ops.upsample_cross_entropy(scores, labels, weight=weight, label_smoothing=smoothing)
    loss.backward()
    assert loss.isnan() and torch.equal(scores.grad, torch.zeros_like(scores))


@pytest.mark.parametrize("reduction", ("sum", "none"))
def test_all_ignored_adds_nothing(reduction):
    scores = normal(2, 3, 4, 4).requires_grad_()
    loss = ops.upsample_cross_entropy(scores, torch.full((2, 8, 8), IGNORE), reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and not scores.grad.any()


def test_ignored_pixels_have_loss_and_gradient_zero():
    scores = normal(2, 3, 6, 6).requires_grad_()
    labels = torch.randint(3, (2, 6, 6))
    labels[0] = IGNORE
    loss = ops.upsample_cross_entropy(scores, labels, reduction="none")
    loss.sum().backward()
    assert not loss[0].any() and loss[1].all()
    assert not scores.grad[0].any() and scores.grad[1].any()


@pytest.mark.parametrize("align_corners", (False, True))
def test_same_size_passes_through(align_corners):
    scores, labels = normal(2, 5, 6, 7), random_labels(2, 5, (6, 7))
    loss = ops.upsample_cross_entropy(scores, labels, align_corners=align_corners)
    assert_close(loss, F.cross_entropy(scores.double(), labels), "interpolated_loss", terms=5)
    assert torch.equal(ops.upsample_argmax(scores, (6, 7), align_corners=align_corners), scores.argmax(1))


@pytest.mark.parametrize("align_corners", (False, True))
def test_same_size_does_not_spread_nan(align_corners):
    scores = normal(1, 2, 3, 3)
    scores[0, 0, 1, 1] = float("nan")
    loss = ops.upsample_cross_entropy(
        scores, torch.zeros(1, 3, 3, dtype=torch.int64), align_corners=align_corners, reduction="none"
    )
    assert torch.equal(loss.isnan(), scores[:, 0].isnan())


def test_nan_scores_reach_only_the_pixels_they_are_interpolated_into():
    scores = normal(1, 3, 8, 8)
    scores[0, 1, 4, 4] = float("nan")
    loss = ops.upsample_cross_entropy(scores, torch.zeros(1, 16, 16, dtype=torch.int64), reduction="none")
    bad = loss.isnan().nonzero()
    assert len(bad) and bad[:, 1:].min() >= 6 and bad[:, 1:].max() <= 11


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
def test_gradcheck(align_corners, smoothing):
    scores = normal(2, 3, 3, 4, dtype=torch.float64).requires_grad_()
    labels, weight = random_labels(2, 3, (5, 7)), torch.rand(3) + 0.1
    for reduction in ("mean", "sum", "none"):
        assert torch.autograd.gradcheck(
            lambda s, r=reduction: ops.upsample_cross_entropy(
                s, labels, align_corners=align_corners, weight=weight, label_smoothing=smoothing, reduction=r
            ),
            scores,
        )


def test_expanded_gradient_of_none():
    scores, labels = normal(2, 3, 4, 4).requires_grad_(), random_labels(2, 3, (8, 8))
    ops.upsample_cross_entropy(scores, labels, reduction="none").sum().backward()
    (expected,) = torch.autograd.grad(ops.upsample_cross_entropy(scores, labels, reduction="sum"), scores)
    torch.testing.assert_close(scores.grad, expected, rtol=1e-5, atol=1e-6)


def test_no_samples():
    scores = torch.zeros(0, 3, 4, 4, requires_grad=True)
    loss = ops.upsample_cross_entropy(scores, torch.zeros(0, 8, 8, dtype=torch.int64), reduction="sum")
    loss.backward()
    assert loss == 0 and scores.grad.shape == scores.shape
    assert ops.upsample_argmax(scores, 8).shape == (0, 8, 8)


@given(
    data=st.data(),
    sizes=st.tuples(*[st.integers(1, 9)] * 4),
    b=st.integers(1, 3),
    c=st.integers(1, 7),
    dtype=st.sampled_from(DTYPES),
    align_corners=st.booleans(),
    reduction=st.sampled_from(("mean", "sum", "none")),
)
def test_any_size(data, sizes, b, c, dtype, align_corners, reduction):
    labels = random_labels(b, c, sizes[2:], data.draw(st.sampled_from((0.0, 0.5))))
    labels[0, 0, 0] = c - 1  # a mean over no pixel has its own test
    smoothing = data.draw(st.sampled_from((0.0, 0.1)))
    check(normal(b, c, *sizes[:2], dtype=dtype), labels, align_corners, reduction=reduction, label_smoothing=smoothing)


# argmax


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_argmax_up_and_down(sizes, align_corners):
    (h, w), size = sizes
    scores = normal(2, 5, h, w)
    label = ops.upsample_argmax(scores, size, align_corners=align_corners)
    logits = upsampled(scores, size, align_corners)
    assert label.dtype == torch.int64 and label.shape == (2, *size)
    chosen = logits.gather(1, label[:, None])[:, 0]
    # the winner may differ only where two classes are nearer than rounding
    assert_close(chosen.float(), logits.amax(1), "interpolated_loss", terms=5, scale=float(scores.abs().max()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_argmax_computes_half_precision_in_float32(dtype):
    scores = normal(2, 6, 4, 4, dtype=dtype)
    wide = scores if dtype == torch.float64 else scores.float()
    assert torch.equal(ops.upsample_argmax(scores, (9, 11)), ops.upsample_argmax(wide, (9, 11)))


@pytest.mark.parametrize("memory_format", (torch.contiguous_format, torch.channels_last), ids=str)
@pytest.mark.parametrize("c", (2, 5, 9, 17, 33))
def test_argmax_ties_go_to_the_lowest_class(c, memory_format):
    scores = normal(1, 1, 4, 5).expand(1, c, 4, 5).contiguous(memory_format=memory_format)
    assert not ops.upsample_argmax(scores, (4, 5)).any()
    assert not ops.upsample_argmax(scores, (13, 11)).any()


def test_argmax_size_forms():
    scores = normal(1, 3, 4, 4)
    expected = ops.upsample_argmax(scores, (8, 8))
    for size in (8, [8, 8], torch.Size((8, 8))):
        assert torch.equal(ops.upsample_argmax(scores, size), expected)


def test_argmax_has_no_gradient():
    assert not ops.upsample_argmax(normal(1, 3, 4, 4).requires_grad_(), 8).requires_grad


def test_argmax_of_many_samples_equals_one_at_a_time():
    scores = normal(3, 4, 5, 5)
    together = ops.upsample_argmax(scores, 12)
    assert torch.equal(together, torch.cat([ops.upsample_argmax(s[None], 12) for s in scores]))


# torch integration


@pytest.mark.parametrize("align_corners", (False, True))
@pytest.mark.parametrize("reduction", ("mean", "none"))
def test_loss_compiles_once_for_all_sizes(align_corners, reduction):
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    def loss(scores, labels):
        return ops.upsample_cross_entropy(scores, labels, align_corners=align_corners, reduction=reduction)

    compiled, graphs = torch.compile(loss, fullgraph=True, dynamic=True, backend=counter), None
    for n in (5, 6, 9):
        scores, labels = normal(2, 4, n, n + 2).requires_grad_(), random_labels(2, 4, (3 * n, 2 * n + 1))
        actual, expected = compiled(scores, labels), loss(scores, labels)
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
        grads = [torch.autograd.grad(t.sum(), scores)[0] for t in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)
        graphs = graphs or counter.frame_count
    assert counter.frame_count == graphs


def test_loss_compiles_with_inductor():
    torch._dynamo.reset()
    scores, labels = normal(2, 4, 5, 6).requires_grad_(), random_labels(2, 4, (10, 12))
    actual = torch.compile(ops.upsample_cross_entropy, fullgraph=True)(scores, labels)
    expected = ops.upsample_cross_entropy(scores, labels)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    grads = [torch.autograd.grad(t, scores)[0] for t in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-6)


def test_argmax_compiles():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda scores, size: ops.upsample_argmax(scores, size), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for b, size in ((2, (9, 11)), (3, (12, 7))):
        scores = normal(b, 4, 5, 6)
        label, expected = compiled(scores, size), ops.upsample_argmax(scores, size)
        assert torch.equal(label, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_autocast_changes_nothing(dtype):
    scores, labels = normal(2, 4, 5, 6, dtype=dtype).requires_grad_(), random_labels(2, 4, (10, 12))
    expected = ops.upsample_cross_entropy(scores, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = ops.upsample_cross_entropy(scores, labels)
        label = ops.upsample_argmax(scores, 9)
    assert loss.dtype == expected.dtype and torch.equal(loss, expected)
    assert torch.equal(label, ops.upsample_argmax(scores, 9))
    loss.backward()
    assert scores.grad.dtype == dtype


# errors

SCORES, LABELS = torch.zeros(2, 3, 4, 4), torch.zeros(2, 8, 8, dtype=torch.int64)


@pytest.mark.parametrize(
    ("error", "pattern", "scores", "labels", "options"),
    [
        (ValueError, r"upsample_cross_entropy: scores must be \[B,C,h,w\]; got \[2, 3\]", SCORES[:, :, 0, 0], LABELS, {}),
        (TypeError, r"scores must be a float32.*; got \[2, 3, 4, 4\] int64", SCORES.long(), LABELS, {}),
        (ValueError, r"scores must be of at least one class, row and column; got \[2, 0, 4, 4\]", SCORES[:, :0], LABELS, {}),
        (TypeError, r"labels must be an integer tensor; got \[2, 8, 8\] float32", SCORES, LABELS.float(), {}),
        (TypeError, r"labels must be an integer tensor; got \[2, 8, 8\] bool", SCORES, LABELS.bool(), {}),
        (ValueError, r"labels must be \[B,H,W\] with B=2 to match scores; got \[1, 8, 8\]", SCORES, LABELS[:1], {}),
        (ValueError, r"labels must be \[B,H,W\] with B=2 to match scores; got \[2, 64\]", SCORES, LABELS.flatten(1), {}),
        (ValueError, r"labels must be of at least one row and column; got \[2, 0, 8\]", SCORES, LABELS[:, :0], {}),
        (ValueError, r"labels must be on cpu like scores; got meta", SCORES, LABELS.to("meta"), {}),
        (ValueError, r"labels must be in \[0,[3C]\), ignore_index.*; got 3 at pixel 0", SCORES, LABELS + 3, {}),
        (ValueError, r"ignore_index must be outside \[0,3\); got 2", SCORES, LABELS, {"ignore_index": 2}),
        (ValueError, r"reduction must be one of none, mean, sum; got 'avg'", SCORES, LABELS, {"reduction": "avg"}),
        (ValueError, r"label_smoothing must be in \[0,1\]; got 1.5", SCORES, LABELS, {"label_smoothing": 1.5}),
        (ValueError, r"label_smoothing must be in \[0,1\]; got nan", SCORES, LABELS, {"label_smoothing": float("nan")}),
        (ValueError, r"weight must be \[C\]=\[3\] to match scores; got \[4\]", SCORES, LABELS,
         {"weight": torch.ones(4)}),
        (TypeError, r"weight must be a float32.*; got \[3\] int64", SCORES, LABELS,
         {"weight": torch.ones(3).long()}),
        (RuntimeError, r"upsample_cross_entropy: .* the cuda backend runs on cuda tensors, not cpu", SCORES, LABELS, {"backend": "cuda"}),
    ],
)  # fmt: skip
def test_wrong_loss_arguments(error, pattern, scores, labels, options):
    with pytest.raises(error, match=pattern):
        ops.upsample_cross_entropy(scores, labels, **options)


@pytest.mark.parametrize(
    ("error", "pattern", "size"),
    [
        (ValueError, r"upsample_argmax: size must be a positive integer or a pair \(H, W\) of them; got 0", 0),
        (ValueError, r"size must be a positive integer or a pair \(H, W\) of them; got -1", (4, -1)),
        (ValueError, r"size must be a positive integer or a pair \(H, W\) of them; got \(4, 4, 4\)", (4, 4, 4)),
        (TypeError, r"size must be a positive integer or a pair \(H, W\) of them; got 2.0", 2.0),
        (TypeError, r"size must be a positive integer or a pair \(H, W\) of them; got 2.5", (2, 2.5)),
        (TypeError, r"size must be a positive integer or a pair \(H, W\) of them; got None", None),
    ],
)
def test_wrong_argmax_size(error, pattern, size):
    with pytest.raises(error, match=pattern):
        ops.upsample_argmax(SCORES, size)


def test_wrong_argmax_scores():
    with pytest.raises(ValueError, match=r"upsample_argmax: scores must be \[B,C,h,w\]; got \[3, 4, 4\]"):
        ops.upsample_argmax(SCORES[0], 8)
