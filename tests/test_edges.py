"""Numbers at the edges: offsets, the largest and lowest scores, infinite weights, what is left out, ids of every dtype."""

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from gpu_check import on
from similarity_check import METRICS
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels._tensors import as_int64
from dnc_kernels.nn import DNCHead

pytestmark = pytest.mark.usefixtures("one_thread")

MOST = torch.finfo(torch.float32).max
INF, NAN = float("inf"), float("nan")
#: Interpolation that is exact in float32: corners, and the middles between them.
SIZE, TARGET = (2, 3), (3, 5)
OPTIONS = [{"reduction": r, "label_smoothing": s} for r, s in (("mean", 0.0), ("sum", 0.1), ("none", 0.1), ("none", 0.0))]
EVERY_BACKEND = pytest.mark.parametrize("backend", ["reference", "cpu", on("triton")])


def whole(*shape, classes=4):
    """Whole numbers: exact beside a large offset."""
    return torch.randint(-3, 4, (1, classes, *shape)).float()


def some_labels(*shape, classes=4):
    labels = torch.arange(torch.Size(shape).numel()).view(1, *shape) % classes
    labels[0, -1, -1] = -100
    return labels


def torch_loss(scores, labels, **options):
    """Torch in float64 and its gradient of the sum: float32 interpolation may overflow, and torch gives an ignored NaN NaN."""
    wide = scores.double().requires_grad_()
    options = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    logits = F.interpolate(wide, labels.shape[1:], mode="bilinear", align_corners=True) if labels.shape[1:] != SIZE else wide
    loss = F.cross_entropy(logits, labels.long(), **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), wide)[0]


def upsampled_loss(backend, scores, labels, **options):
    leaf = scores.clone().requires_grad_()
    loss = ops.upsample_cross_entropy(leaf, labels, align_corners=True, backend=backend, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def assert_like_torch(actual, expected, rule, **size):
    """Within the table's bound where torch's number is one of float32, and the same infinity; where torch has NaN, anything."""
    rounded = expected.to(actual.dtype)
    assert torch.equal(actual[rounded.isinf()], rounded[rounded.isinf()])
    assert not actual[~expected.isnan()].isnan().any(), "NaN where torch has none"
    finite = rounded.isfinite()
    assert_close(actual[finite], expected[finite], rule, **size)


def check(backend, scores, labels, size=4.0, **options):
    (loss, grad), (wide_loss, wide_grad) = (
        upsampled_loss(backend, scores, labels, **options), torch_loss(scores, labels, **options)
    )  # fmt: skip
    terms = scores.shape[1]
    assert_like_torch(loss, wide_loss, "interpolated_loss", terms=terms, scale=size)
    assert_like_torch(grad, wide_grad, "interpolated_loss", terms=terms, scale=size)


@EVERY_BACKEND
@pytest.mark.parametrize("target", [SIZE, TARGET])
def test_an_offset_of_all_scores_costs_upsampling_nothing(backend, target):
    scores, labels = whole(*SIZE), some_labels(*target)
    for offset in (1e3, -1e5, 1e6):
        for options in OPTIONS[1::2]:
            expected = torch_loss(scores, labels, **options)
            for actual, wide in zip(upsampled_loss(backend, scores + offset, labels, **options), expected, strict=True):
                assert_close(actual, wide, "interpolated_loss", terms=4, scale=4.0)  # of the scores without the offset


def extremes():
    """Scores up to the ends of float32, and beyond."""
    z = torch.randn(1, 4, *SIZE)
    yield "largest", torch.full_like(z, MOST)
    yield "lowest", torch.full_like(z, -MOST)
    for name, value in (("largest", MOST), ("lowest", -MOST), ("minus infinity", -INF)):
        scores = z.clone()
        scores[:, 1] = value
        yield f"a class {name}", scores
        scores = z.clone()
        scores[..., 1, 1] = value
        yield f"a pixel {name}", scores
    ends = torch.where((torch.arange(3) + torch.arange(2)[:, None]) % 2 == 0, MOST, -MOST)
    scores = z.clone()
    scores[:, 0], scores[:, 2] = ends, -ends
    yield "ends beside ends", scores
    yield "a pixel far below the others", whole(*SIZE) - torch.tensor([0.0, 0.0, 2.0**20])
    yield "sharp", 64 * whole(*SIZE)


@EVERY_BACKEND
@pytest.mark.parametrize("name,scores", [pytest.param(n, s, id=n.replace(" ", "_")) for n, s in extremes()])
def test_upsampling_meets_scores_up_to_the_ends_of_float32(backend, name, scores):
    size = 192.0 if name == "sharp" else 4.0
    check(backend, scores, some_labels(*SIZE), size, **OPTIONS[3])
    ends = scores.abs().max() == MOST
    if backend == "reference" and ends:
        return  # torch's own interpolation overflows in float32
    for options in OPTIONS[0], OPTIONS[3 if "ends" in name else 2]:  # two ends are too far apart for a difference
        if ends and "pixel" in name:  # of a sum of both, float64 too keeps the large one alone: kernels are closer to the truth
            assert all(t.isfinite().all() for t in upsampled_loss(backend, scores, some_labels(*TARGET), **options))
        else:
            check(backend, scores, some_labels(*TARGET), size, **options)


@EVERY_BACKEND
@pytest.mark.parametrize("absent", [0, 3])
def test_upsampling_takes_no_notice_of_the_weight_of_an_absent_class(backend, absent):
    labels = some_labels(*TARGET)
    labels[labels == absent] = 1
    for weight in (INF, 0.0):
        weights = torch.tensor([0.5, 1.0, 2.0, 1.5])
        weights[absent] = weight
        for options in (OPTIONS[0], OPTIONS[3], *(OPTIONS[1:2] if weight == 0 else ())):
            check(backend, whole(*SIZE), labels, weight=weights, **options)
        if weight == INF:  # the smoothed loss counts all classes
            loss, _ = upsampled_loss(backend, whole(*SIZE), labels, weight=weights, **OPTIONS[2])
            assert torch.equal(loss, torch_loss(whole(*SIZE), labels, weight=weights, **OPTIONS[2])[0].float())


@EVERY_BACKEND
def test_an_infinite_weight_of_a_class_that_is_there_counts_as_in_torch(backend):
    scores, labels, weights = whole(*SIZE), some_labels(*SIZE), torch.tensor([0.5, INF, 2.0, 1.5])
    for options in (OPTIONS[0], OPTIONS[3]):
        loss, _ = upsampled_loss(backend, scores, labels, weight=weights, **options)
        assert_like_torch(
            loss, torch_loss(scores, labels, weight=weights, **options)[0], "interpolated_loss", terms=4, scale=4.0
        )


@EVERY_BACKEND
@pytest.mark.parametrize("value", [NAN, INF, -INF])
def test_upsampling_leaves_out_a_pixel_that_is_not_finite(backend, value):
    if backend == "triton" and DEVICE == "cpu" and value != value:
        value = INF  # Triton's interpreter lets a maximum keep a NaN
    scores, labels = whole(*SIZE), some_labels(*SIZE)
    scores[..., -1, -1] = value
    for options in OPTIONS:
        loss, grad = upsampled_loss(backend, scores, labels, **options)
        assert loss.isfinite().all() and grad.isfinite().all() and not grad[..., -1, -1].any()


def test_a_loss_beyond_float32_is_infinite():
    scores = torch.tensor([MOST, -MOST]).view(1, 2, 1, 1).expand(1, 2, 2, 2)
    for reduction in ("sum", "mean"):
        assert ops.upsample_cross_entropy(scores, torch.ones(1, 2, 2, dtype=torch.int64), reduction=reduction) == INF


def pixels(n=11, c=4, k=2, d=6):
    """Pixels, sub-centroids, labels; pixel 0 is left out, class 3 is absent."""
    labels = torch.arange(n) % 3
    labels[0] = -100
    return torch.randn(n, d), torch.randn(c, k, d), labels


def centroid_loss(backend, x, p, labels, metric="dot", norm=None, **options):
    """Loss, prediction, and the gradients of pixels, sub-centroids and temperature; without sub-centroids too."""
    leaves = [x.clone().requires_grad_(), p.clone().requires_grad_(), torch.tensor(0.5, dtype=x.dtype, requires_grad=True)]
    learnt = dict(zip(("norm_weight", "norm_bias"), (t.clone().requires_grad_() for t in norm or ()), strict=False))
    out = ops.centroid_cross_entropy(
        leaves[0], leaves[1], labels, metric=metric, temperature=leaves[2], backend=backend, **learnt, **options
    )
    grads = torch.autograd.grad(out.loss.sum(), [*leaves, *learnt.values()])
    early = ops.centroid_cross_entropy(leaves[0], p, labels, metric=metric, temperature=0.5, backend=backend, **options)
    if not learnt:
        grads = (*grads, *torch.autograd.grad(early.loss.sum(), leaves[0]))
    return out.loss.detach(), out.prediction, grads


@EVERY_BACKEND
@pytest.mark.parametrize("offset", [128.0, 1024.0])
def test_an_offset_of_all_similarities_costs_centroid_losses_nothing(backend, offset):
    (n, c, k, d), labels = (11, 4, 2, 6), torch.arange(11) % 4
    x, p = torch.randint(-3, 4, (n, d)).float(), torch.randint(-3, 4, (c, k, d)).float()
    far_x, far_p = (torch.cat([t, torch.full_like(t[..., :1], offset)], -1) for t in (x, p))  # each similarity + offset^2
    for options in ({"label_smoothing": 0.1, "reduction": "sum"}, {"weight": torch.rand(c) + 0.1, "reduction": "none"}):
        wide = {key: v.double() if isinstance(v, torch.Tensor) else v for key, v in options.items()}
        loss, prediction, (grad, *_) = centroid_loss(backend, far_x, far_p, labels, **options)
        expected, same, (wide_grad, *_) = centroid_loss("reference", x.double(), p.double(), labels, **wide)
        assert_close(loss, expected, "loss", terms=d)
        assert torch.equal(prediction, same)
        assert_close(grad[:, :d], wide_grad, "loss_gradient", terms=c)
    for reduction in ("sum", "none"):
        losses = []
        for some, rows, name in ((far_x, far_p, backend), (x.double(), p.double(), "reference")):
            leaf = some.clone().requires_grad_()
            loss = ops.subcentroid_cross_entropy(leaf, rows, 2 * labels, temperature=0.5, reduction=reduction, backend=name)
            losses.append((loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0][:, :d]))
        for (actual, expected), rule in zip(zip(*losses, strict=True), ("loss", "loss_gradient"), strict=True):
            assert_close(actual, expected, rule, terms=d)


@EVERY_BACKEND
@pytest.mark.parametrize("metric", METRICS)
def test_centroid_loss_takes_no_notice_of_the_weight_of_an_absent_class(backend, metric):
    x, p, labels = pixels()
    for weight in (INF, 0.0):
        weights = torch.tensor([0.5, 1.0, 2.0, weight])
        for options in OPTIONS[0], OPTIONS[3]:
            loss, _, grads = centroid_loss(backend, x, p, labels, metric, weight=weights, **options)
            finite = weights.clone()
            finite[3] = 1.0
            expected, _, wide = centroid_loss(
                "reference", x.double(), p.double(), labels, metric, weight=finite.double(), **options
            )
            assert_close(loss, expected, "loss", terms=x.shape[1])
            for actual, grad in zip(grads, wide, strict=True):
                assert_close(actual, grad, "loss_gradient", terms=x.shape[1], scale=1 + float(grad.abs().max()))
    loss, *_ = centroid_loss(backend, x, p, labels, metric, weight=torch.tensor([0.5, 1.0, 2.0, INF]), **OPTIONS[2])
    assert torch.equal(loss == INF, labels >= 0) and loss[0] == 0  # smoothing counts all classes


@EVERY_BACKEND
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", [NAN, INF, 1e38])
def test_a_pixel_that_is_left_out_and_not_finite_sends_no_gradient(backend, metric, value):
    x, p, labels = pixels()
    x[0] = value
    for norm in (None, (torch.ones(4), torch.zeros(4))):
        for options in OPTIONS[:2]:
            loss, prediction, grads = centroid_loss(backend, x, p, labels, metric, norm, **options)
            assert loss.isfinite() and all(g.isfinite().all() for g in grads) and not grads[0][0].any()
            assert prediction[0] == -1 or value == 1e38
    leaves = x.clone().requires_grad_(), p.clone().requires_grad_()
    loss = ops.subcentroid_cross_entropy(*leaves, labels, temperature=0.5, backend=backend)
    grads = torch.autograd.grad(loss, leaves)
    assert loss.isfinite() and all(g.isfinite().all() for g in grads) and not grads[0][0].any()


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_similarities_near_the_end_of_float32_are_numbers(backend):
    """Their sum over the classes is infinite; the loss is not."""
    x, p = torch.full((2, 1), 3e19), torch.tensor([1e19, 0.9e19, 0.8e19]).view(3, 1, 1)
    out = ops.centroid_cross_entropy(x, p, torch.tensor([0, 1]), reduction="none", backend=backend)
    expected = F.cross_entropy((x.double() @ p.double().view(1, 3)), torch.tensor([0, 1]), reduction="none")
    assert_close(out.loss, expected, "loss", terms=1)
    assert out.prediction.tolist() == [0, 0]


def test_a_weight_that_wants_a_gradient_is_refused():
    weight = torch.ones(4, requires_grad=True)
    x, p, labels = pixels()
    calls = [
        lambda w: ops.upsample_cross_entropy(whole(*SIZE), some_labels(*TARGET), weight=w),
        lambda w: ops.centroid_cross_entropy(x, p, labels, weight=w),
    ]
    for call in calls:
        with pytest.raises(ValueError, match=r"weight must be without gradient.*pass weight\.detach\(\)"):
            call(weight)
        call(weight.detach())
        with torch.no_grad():  # as torch: nothing is lost
            call(weight)


def test_a_tensor_is_refused_where_it_would_get_no_gradient():
    x, p, labels = pixels()
    number = torch.tensor(0.1, requires_grad=True)
    calls = {
        "label_smoothing": [
            lambda v: ops.upsample_cross_entropy(whole(*SIZE), some_labels(*TARGET), label_smoothing=v),
            lambda v: ops.centroid_cross_entropy(x, p, labels, label_smoothing=v),
        ],
        "norm_eps": [lambda v: ops.centroid_cross_entropy(x, p, labels, norm_weight=torch.ones(4), norm_eps=v)],
        "temperature": [lambda v: ops.subcentroid_cross_entropy(x, p, labels, temperature=v)],
        "epsilon": [lambda v: ops.sinkhorn_plan(x, epsilon=v), lambda v: ops.sinkhorn_assign(x, labels, 4, epsilon=v)],
        "tolerance": [lambda v: ops.sinkhorn_plan(x, tolerance=v)],
        "eps": [lambda v: ops.normalize_embedding(x, eps=v)],
    }
    for argument, some in calls.items():
        for call in some:
            with pytest.raises(TypeError, match=rf"{argument} must be a number, .*; got .*\.item\(\)"):
                call(number)
            call(number.item())


INTEGERS = (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int8, torch.int16, torch.int32, torch.int64)


def labelled_calls(backend):
    """Every op that takes labels [N], as a function of them and ignore_index, and what it takes for an id."""
    x, p, _ = pixels(n=6)
    own = torch.randn(6, 2)
    return {
        "class_scores": lambda y, i: ops.class_scores(x, p, y, ignore_index=i, backend=backend).own_similarity,
        "centroid_cross_entropy": lambda y, i: ops.centroid_cross_entropy(x, p, y, ignore_index=i, backend=backend).loss,
        "subcentroid_cross_entropy": lambda y, i: ops.subcentroid_cross_entropy(x, p, y, ignore_index=i, backend=backend),
        "sinkhorn_assign": lambda y, i: ops.sinkhorn_assign(own, y, 4, ignore_index=i, backend=backend),
        "sinkhorn_plan": lambda y, i: ops.sinkhorn_plan(own, y, 4, ignore_index=i, backend=backend),
        "cluster_sums": lambda y, i: ops.cluster_sums(x, y, 8, ignore_index=i, backend=backend).sums,
        "momentum_update_": lambda y, i: moved(p, x, y, i, backend),
        "upsample_cross_entropy": lambda y, i: ops.upsample_cross_entropy(
            x.T.reshape(1, 6, 2, 3), y.view(1, 2, 3), ignore_index=i, backend=backend
        ),
    }


def moved(p, x, labels, ignore_index, backend):
    p = p.clone()
    ops.momentum_update_(p, x, labels, momentum=0.5, ignore_index=ignore_index, backend=backend)
    return p


@EVERY_BACKEND
def test_labels_of_every_integer_dtype_are_the_same_ids(backend):
    ids = torch.tensor([0, 1, 2, 3, 120, 0])
    for name, call in labelled_calls(backend).items():
        expected = call(ids, 120)
        assert not torch.equal(expected, call(ids % 119, 120)), name
        for dtype in INTEGERS:
            assert torch.equal(call(ids.to(dtype), 120), expected), (name, dtype)


@EVERY_BACKEND
def test_ids_beyond_32_and_64_bits_are_no_ids(backend):
    """2^32 + 1 is not 1, 2^64 - 1 is not -1, and an ignore_index may be as large as labels are."""
    for name, call in labelled_calls(backend).items():
        expected = call(torch.tensor([0, 1, 2, 3, -1, 0]), -1)
        for beyond in (2**31, 2**32 + 1, 2**40):
            ids = torch.tensor([0, 1, 2, 3, beyond, 0])
            assert torch.equal(call(ids, beyond), expected), (name, beyond)
            assert torch.equal(call(torch.tensor([0, 1, 2, 3, -1, 0], dtype=torch.int32), beyond), expected), (name, beyond)
        if backend != "triton":  # which leaves out what is no id
            ids = torch.tensor([0, 1, 2, 3, 2**64 - 1, 0], dtype=torch.uint64)
            for wrong in (
                ids,
                torch.tensor([0, 1, 2, 3, 2**32 - 1, 0], dtype=torch.uint32),
                torch.tensor([0, 1, 2, 3, 2**32 + 1, 0]),
            ):
                with pytest.raises(ValueError, match=f"{name}: labels must be in .* at pixel 4"):
                    call(wrong, -1)
        for beyond in (2**63, -(2**63) - 1):
            with pytest.raises(ValueError, match=f"{name}: ignore_index must be an integer of 64 bits"):
                call(torch.tensor([0, 1, 2, 3, -1, 0]), beyond)


def test_a_head_takes_labels_of_every_integer_dtype():
    torch.manual_seed(0)
    head = DNCHead(4, 5, 2, ignore_index=99)
    features, ids = torch.randn(1, 4, 2, 2), torch.tensor([0, 1, 2, 3, 99, 4, 0, 1, 99]).view(1, 3, 3)
    expected = head.loss(features, ids, update=False).loss
    for dtype in INTEGERS:
        assert torch.equal(head.loss(features, ids.to(dtype), update=False).loss, expected), dtype
    for wrong in (2**32 - 1, 2**32 + 1):
        for dtype in (torch.uint64, torch.int64) if wrong > 2**32 else (torch.uint32, torch.uint64):
            with pytest.raises(ValueError, match="labels must be in"):
                head.loss(features, torch.where(ids == 4, wrong, ids).to(dtype), update=False)
    far = DNCHead(4, 5, 2, ignore_index=2**40)
    far.load_state_dict(head.state_dict())
    assert torch.equal(far.loss(features, torch.where(ids == 99, 2**40, ids), update=False).loss, expected)
    assert torch.equal(far.loss(features, torch.where(ids == 99, -1, ids).int(), update=False).loss, expected)


def test_uint64_ids_do_not_wrap():
    assert as_int64(torch.tensor([3, 2**63, 2**64 - 1], dtype=torch.uint64)).tolist() == [3, 2**63 - 1, 2**63 - 1]
