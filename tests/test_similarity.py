"""Similarity ops against their float64 reference, on every instruction set, layout and option."""

import math
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.similarity import op, op_loss

METRICS = ("dot", "cosine", "sqeuclidean")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
#: Products of bfloat16 pixels have code of their own where the processor has tile registers. Sub-centroids stay in float32.
PIXELS = pytest.mark.parametrize("pixels", (torch.float32, torch.bfloat16), ids=str)


def unit(*shape, dtype=torch.float64):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).to(dtype)


def problem(n=53, c=19, k=10, d=32, dtype=torch.float32, ignored=0.2):
    x, centroids, labels = unit(n, d, dtype=dtype), unit(c, k, d, dtype=dtype), torch.randint(0, c, (n,))
    labels[torch.rand(n) < ignored] = -100
    return x, centroids, labels


def layout(x, name):
    """The [6,D] .. [N,D] pixels of x in another layout with the same values in the same order; N must be 2*3*w."""
    n, d = x.shape
    image = x.view(2, 3, n // 6, d).permute(0, 3, 1, 2)
    if name == "rows":
        return x
    if name == "strided":
        wide = torch.full((2 * n, d + 3), float("nan"), dtype=x.dtype)
        wide[::2, 1 : d + 1] = x
        return wide[::2, 1 : d + 1]
    if name == "transposed":
        return x.T.contiguous().T
    if name == "nchw":
        return image.contiguous()
    if name == "channels_last":
        return image.contiguous(memory_format=torch.channels_last)
    if name == "crop":
        big = torch.full((2, d, 5, n // 6 + 4), float("nan"), dtype=x.dtype)
        big[:, :, 1:4, 2:-2] = image
        return big[:, :, 1:4, 2:-2]
    raise AssertionError(name)


LAYOUTS = ("rows", "strided", "transposed", "nchw", "channels_last", "crop")


def flat(t, d):
    return t if t.ndim == 2 else t.permute(0, 2, 3, 1).reshape(-1, d)


def doubled(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


def loss_and_grads(backend, x, centroids, labels, incoming=1.7, centroid_grad=False, **options):
    """Loss, prediction, own similarities and every gradient, through autograd."""
    x, centroids = x.detach().clone(memory_format=torch.preserve_format).requires_grad_(), centroids.detach().clone()
    centroids.requires_grad_(centroid_grad)
    learnable = {
        k: v.detach().clone().requires_grad_() for k, v in options.items() if isinstance(v, torch.Tensor) and k != "weight"
    }
    out = ops.centroid_cross_entropy(x, centroids, labels, backend=backend, **{**options, **learnable})
    loss = out.loss
    total = (loss * torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)).sum() * incoming
    total.backward()
    return {
        "loss": loss.detach(), "prediction": out.prediction, "own": out.own_similarity, "x": x.grad, "centroids": centroids.grad,
        **{k: v.grad for k, v in learnable.items()},
    }  # fmt: skip


def assert_loss_equal(actual, expected, d):
    assert actual.keys() == expected.keys()
    for name, e in expected.items():
        a = actual[name]
        if e is None or name == "prediction":
            continue
        rule = {"loss": "loss", "own": "similarity"}.get(name, "loss_gradient")
        assert_close(a, e.double(), rule, terms=d, scale=1.0)
    wrong = actual["prediction"] != expected["prediction"]
    assert wrong.sum() <= 0.02 * wrong.numel(), "predictions differ beyond ties"


# --- centroid_distance


@pytest.mark.parametrize("metric", METRICS[1:])
@pytest.mark.parametrize("name", LAYOUTS)
def test_distance_equals_reference(isa, metric, name):
    x, p, _ = problem(n=42, c=5, k=3, d=37)
    expected = ops.centroid_distance(x.double(), p.double(), metric=metric, backend="reference")
    actual = ops.centroid_distance(layout(x, name), p, metric=metric, backend="cpu")
    assert actual.shape == ((42, 5, 3) if layout(x, name).ndim == 2 else (2, 5, 3, 3, 7)) and actual.dtype == torch.float32
    actual = actual if actual.ndim == 3 else actual.permute(0, 3, 4, 1, 2).flatten(0, 2)
    assert_close(actual, expected, "similarity", terms=37, scale=2.0)


@pytest.mark.parametrize("metric", METRICS[1:])
def test_distance_gradients(metric):
    x, p = (
        torch.randn(5, 6, dtype=torch.float64, requires_grad=True),
        torch.randn(3, 2, 6, dtype=torch.float64, requires_grad=True),
    )
    assert torch.autograd.gradcheck(lambda a, b: ops.centroid_distance(a, b, metric=metric, backend="cpu"), (x, p))
    image = torch.randn(2, 6, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: ops.centroid_distance(a, b, metric=metric, backend="cpu"), (image, p))


def test_distance_of_a_pixel_to_itself_is_zero():
    x = unit(4, 16, dtype=torch.float32)
    for metric in METRICS[1:]:
        own = ops.centroid_distance(x, x[:, None], metric=metric)[range(4), range(4), 0]
        assert_close(own, torch.zeros(4, dtype=torch.float64), "similarity", terms=16)


# --- class_scores


@PIXELS
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_equal_reference(isa, metric, name, pixels):
    x, p, y = problem(n=96)
    x = x.to(pixels)
    expected = ops.class_scores(x.double(), p.double(), y, metric=metric, backend="reference")
    image = layout(x, name)
    labels = y if image.ndim == 2 else y.view(2, 3, 16)
    actual = ops.class_scores(image, p, labels, metric=metric, backend="cpu")
    assert actual.scores.shape == ((96, 19) if image.ndim == 2 else (2, 19, 3, 16))
    assert_close(flat(actual.scores, 19), expected.scores, "similarity", terms=32, scale=2.0)
    assert_close(flat(actual.own_similarity, 10), expected.own_similarity, "similarity", terms=32, scale=2.0)
    s = ops.centroid_distance(x.double(), p.double(), metric="cosine", backend="reference")
    picked = s.gather(2, flat(actual.winner, 19).long()[..., None])[..., 0]
    assert_close(picked.float(), s.amin(2), "similarity", terms=32, scale=2.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_take_every_dtype(isa, dtype):
    x, p, _ = problem(dtype=dtype, d=67)
    actual = ops.class_scores(x, p, backend="cpu")
    assert actual.scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.winner.dtype == torch.uint8 and actual.own_similarity is None
    assert_close(actual.scores, ops.class_scores(x.double(), p.double(), backend="reference").scores, "similarity", terms=67)


def test_half_features_with_single_centroids():
    x, p, _ = problem(dtype=torch.bfloat16)
    p = unit(*p.shape, dtype=torch.float32)
    assert_close(
        ops.class_scores(x, p, backend="cpu").scores,
        ops.class_scores(x.double(), p.double(), backend="reference").scores,
        "similarity",
        terms=32,
    )


@pytest.mark.parametrize("c", [1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 24, 31, 33])
@pytest.mark.parametrize("k", [1, 2, 3, 10])
@pytest.mark.parametrize(("pixels", "d"), [(torch.float32, 9), (torch.bfloat16, 41)], ids=str)
def test_scores_at_every_tail(isa, c, k, pixels, d):
    """The last group of classes is folded in as many ways as there are sizes."""
    x, p, y = problem(n=13, c=c, k=k, d=d)
    x = x.to(pixels)
    expected = ops.class_scores(x.double(), p.double(), y, backend="reference")
    actual = ops.class_scores(x, p, y, backend="cpu")
    assert_close(actual.scores, expected.scores, "similarity", terms=d)
    assert_close(actual.own_similarity, expected.own_similarity, "similarity", terms=d)
    assert torch.equal(actual.winner, expected.winner)


@PIXELS
@pytest.mark.parametrize("d", [1, 2, 15, 16, 17, 32, 33, 255, 256, 1024, 1025, 1300, 2048])
def test_scores_at_every_depth(isa, d, pixels):
    x, p, _ = problem(n=30, c=20, k=3, d=d)
    x = x.to(pixels)
    assert_close(
        ops.class_scores(x, p, backend="cpu").scores,
        ops.class_scores(x.double(), p.double(), backend="reference").scores,
        "similarity",
        terms=d,
    )


@PIXELS
def test_ties_go_to_the_lowest_index(isa, pixels):
    for c, k in ((3, 4), (19, 10), (16, 2), (4, 7)):
        x, p = unit(20, 24, dtype=pixels), unit(1, 1, 24, dtype=torch.float32).expand(c, k, 24)
        assert ops.class_scores(x, p, backend="cpu").winner.eq(0).all()
        near = ops.nearest_centroid(x, p, backend="cpu")
        assert near.label.eq(0).all() and near.sub.eq(0).all()
        y = torch.full((20,), c - 1)
        out = ops.centroid_cross_entropy(x, p, y, backend="cpu")
        assert out.prediction.eq(0).all()
        later = p.clone()
        later[:, : k // 2] *= -1  # x with a positive similarity now ties among the later half only
        s = ops.class_scores(x, later, backend="cpu")
        positive = (x.float() @ p[0, 0]) > 0
        assert s.winner[positive].eq(k // 2).all() and s.winner[~positive].eq(0).all()


@pytest.mark.parametrize("dtype", (torch.float64, torch.bfloat16), ids=str)
def test_a_tied_gradient_goes_to_the_lowest_index(isa, dtype):
    x = unit(6, 24, dtype=dtype).requires_grad_()
    p = unit(1, 1, 24, dtype=dtype).expand(3, 4, 24).clone().requires_grad_()
    ops.class_scores(x, p, backend="cpu").scores.sum().backward()
    assert p.grad[:, 1:].eq(0).all() and p.grad[:, 0].ne(0).all()


@PIXELS
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_scores_backward_equals_reference(isa, metric, name, pixels):
    x, p, y = problem(n=42, c=19, k=3, d=37)
    x = x.to(pixels)
    grads = {}
    for backend, dtype in (("cpu", pixels), ("reference", torch.float64)):
        image = layout(x, name).detach().to(dtype).requires_grad_()
        centroids = p.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_()
        out = ops.class_scores(image, centroids, y.view(image.shape[0], *image.shape[2:]), metric=metric, backend=backend)
        g = torch.Generator().manual_seed(1)
        weight = torch.randn(42, 19, generator=g, dtype=torch.float64).to(out.scores)
        own_weight = torch.randn(42, 3, generator=g, dtype=torch.float64).to(out.scores)
        ((flat(out.scores, 19) * weight).sum() + (flat(out.own_similarity, 3) * own_weight).sum()).backward()
        grads[backend] = flat(image.grad, 37), centroids.grad
    assert_close(grads["cpu"][0], grads["reference"][0], "sum", terms=37, scale=8.0)
    assert_close(grads["cpu"][1], grads["reference"][1], "sum", terms=64, scale=8.0)


@pytest.mark.parametrize("metric", METRICS)
def test_scores_gradcheck(metric):
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    p = torch.randn(3, 2, 5, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 2, -1, 1])

    def run(a, b):
        out = ops.class_scores(a, b, y, metric=metric, backend="cpu")
        return out.scores, out.own_similarity

    assert torch.autograd.gradcheck(run, (x, p))


def test_scores_backward_takes_expanded_and_missing_gradients():
    x, p, y = problem(n=12, c=4, k=3, d=8, dtype=torch.float64, ignored=0)
    x.requires_grad_()
    out = ops.class_scores(x, p, y, backend="cpu")
    expanded = torch.autograd.grad(out.scores, x, torch.ones((), dtype=x.dtype).expand(12, 4), retain_graph=True)[0]
    dense = torch.autograd.grad(out.scores, x, torch.ones(12, 4, dtype=x.dtype), retain_graph=True)[0]
    assert torch.equal(expanded, dense)
    only_own = torch.autograd.grad(out.own_similarity.sum(), x)[0]
    assert_close(only_own, p[y].sum(1), "sum", terms=3)


def test_a_momentum_update_between_forward_and_backward_is_harmless():
    x, p, y = problem(n=40, c=4, k=3, d=8, dtype=torch.float64, ignored=0)
    x.requires_grad_()
    for loss in (
        lambda: ops.class_scores(x, p, y).scores.square().sum(),
        lambda: ops.centroid_cross_entropy(x, p, y).loss,
        lambda: ops.centroid_cross_entropy(x, p, y, reduction="none").loss.sum(),
    ):
        expected = torch.autograd.grad(loss(), x)[0]
        value = loss()
        before = p.clone()
        ops.momentum_update_(p, x.detach(), y * 3, momentum=0.5)
        assert not torch.equal(p, before)
        assert torch.equal(torch.autograd.grad(value, x)[0], expected)
        p.copy_(before)


# --- nearest_centroid


@PIXELS
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_nearest_equals_reference(isa, metric, name, pixels):
    x, p, _ = problem(n=48, d=40)
    x = x.to(pixels)
    expected = ops.nearest_centroid(x.double(), p.double(), metric=metric, backend="reference")
    image = layout(x, name)
    actual = ops.nearest_centroid(image, p, metric=metric, backend="cpu")
    assert actual.label.shape == (48,) if image.ndim == 2 else (2, 3, 8)
    assert torch.equal(actual.label.flatten(), expected.label) and torch.equal(actual.sub.flatten(), expected.sub)
    assert_close(actual.score.flatten(), expected.score, "similarity", terms=40, scale=2.0)


@pytest.mark.parametrize("m", [1, 15, 16, 17, 33, 100])
@pytest.mark.parametrize(("pixels", "d"), [(torch.float32, 11), (torch.bfloat16, 43)], ids=str)
def test_nearest_at_every_number_of_centroids(isa, m, pixels, d):
    x, p, _ = problem(n=25, c=m, k=1, d=d)
    x = x.to(pixels)
    assert torch.equal(
        ops.nearest_centroid(x, p, backend="cpu").label, ops.nearest_centroid(x.double(), p.double(), backend="reference").label
    )


# --- centroid_cross_entropy


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.1},
    "norm": {"norm_weight": True, "norm_bias": True},
    "norm without bias": {"norm_weight": True},
    "learnable temperature": {"temperature": True},
    "class weights": {"weight": True},
    "smoothing": {"label_smoothing": 0.1},
    "all": {"norm_weight": True, "norm_bias": True, "temperature": True, "weight": True, "label_smoothing": 0.2},
}


def filled(options, c, dtype):
    made = {
        "norm_weight": torch.linspace(0.5, 1.5, c), "norm_bias": torch.linspace(-1, 1, c), "temperature": torch.tensor(0.7),
        "weight": torch.linspace(0.2, 2, c),
    }  # fmt: skip
    return {k: made[k].to(dtype) if v is True else v for k, v in options.items()}


@PIXELS
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS.keys())
def test_loss_equals_reference(isa, options, reduction, pixels):
    x, p, y = problem(n=101)
    x = x.to(pixels)
    kw = dict(reduction=reduction, **filled(options, 19, torch.float32))
    expected = loss_and_grads("reference", x.double(), p.double(), y, **{k: doubled(v) for k, v in kw.items()})
    assert_loss_equal(loss_and_grads("cpu", x, p, y, **kw), expected, 32)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("options", ["plain", "all"])
@PIXELS
def test_loss_with_centroid_gradients(isa, metric, reduction, options, pixels):
    x, p, y = problem(n=101, c=21, k=4)
    x = x.to(pixels)
    kw = dict(metric=metric, reduction=reduction, **filled(OPTIONS[options], 21, torch.float32))
    expected = loss_and_grads(
        "reference", x.double(), p.double(), y, centroid_grad=True, **{k: doubled(v) for k, v in kw.items()}
    )
    assert expected["centroids"].abs().sum() > 0
    assert_loss_equal(loss_and_grads("cpu", x, p, y, centroid_grad=True, **kw), expected, 32)


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_loss_takes_every_layout_and_dtype(isa, name, dtype):
    x, p, y = problem(n=96, dtype=dtype)
    image = layout(x, name)
    labels = y if image.ndim == 2 else y.view(2, 3, 16)
    kw = filled(OPTIONS["all"], 19, torch.float32)
    expected = loss_and_grads("reference", x.double(), p.double(), y, **{k: doubled(v) for k, v in kw.items()})
    actual = loss_and_grads("cpu", image, p, labels, **kw)
    assert actual["x"].dtype == dtype and actual["x"].stride() == torch.empty_like(image).stride()
    assert actual["prediction"].shape == labels.shape
    actual["x"], actual["prediction"] = flat(actual["x"], 32), actual["prediction"].flatten()
    actual["own"] = flat(actual["own"], 10)
    assert_loss_equal(actual, expected, 32)


@pytest.mark.parametrize("label_dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_labels_of_any_integer_dtype(label_dtype):
    x, p, y = problem(ignored=0)
    y[3] = 100
    a, b = (ops.centroid_cross_entropy(x, p, t, ignore_index=100) for t in (y, y.to(label_dtype)))
    assert torch.equal(a.loss, b.loss)


@PIXELS
@pytest.mark.parametrize("c,k,d", [(150, 10, 24), (1, 1, 5), (1, 4, 17), (2, 256, 16), (300, 1, 40), (40, 3, 1100)])
def test_loss_at_odd_sizes(isa, c, k, d, pixels):
    x, p, y = problem(n=67, c=c, k=k, d=d)
    x = x.to(pixels)
    kw = filled(OPTIONS["all"], c, torch.float32)
    expected = loss_and_grads("reference", x.double(), p.double(), y, **{k: doubled(v) for k, v in kw.items()})
    assert_loss_equal(loss_and_grads("cpu", x, p, y, **kw), expected, d)


@PIXELS
@pytest.mark.parametrize("n", [0, 1, 11, 12, 13, 15, 16, 17, 31, 33, 383, 385, 1000])
def test_loss_at_every_number_of_pixels(n, pixels):
    x, p, y = problem(n=n, c=7, k=2, d=24)
    x = x.to(pixels)
    for reduction in ("sum", "none"):
        expected = loss_and_grads("reference", x.double(), p.double(), y, reduction=reduction)
        assert_loss_equal(loss_and_grads("cpu", x, p, y, reduction=reduction), expected, 24)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_loss_gradcheck(metric, reduction):
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    p = torch.randn(4, 2, 5, dtype=torch.float64)
    w, b = torch.rand(4, dtype=torch.float64, requires_grad=True), torch.randn(4, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    y = torch.tensor([0, 1, -100, 3, 2, 1])

    def run(x, p, w, b, t):
        return ops.centroid_cross_entropy(
            x, p, y, metric=metric, norm_weight=w, norm_bias=b, temperature=t, reduction=reduction,
            label_smoothing=0.1, weight=torch.tensor([0.5, 1, 2, 1.0], dtype=torch.float64), backend="cpu",
        ).loss  # fmt: skip

    assert torch.autograd.gradcheck(run, (x, p, w, b, t))
    assert torch.autograd.gradcheck(run, (x, p.clone().requires_grad_(), w, b, t))


def test_loss_is_torchs_cross_entropy():
    """The op against torch's own functions, written out, not against our reference."""
    x, p, y = problem(n=200, c=12, k=5, d=16, dtype=torch.float64)
    x.requires_grad_()
    weight = torch.rand(12, dtype=torch.float64)
    scores = (x @ p.flatten(0, 1).T).view(200, 12, 5).amax(2)
    expected = F.cross_entropy(F.layer_norm(scores, (12,)) / 0.3, y, weight, label_smoothing=0.1)
    (g,) = torch.autograd.grad(expected, x)
    actual = ops.centroid_cross_entropy(
        x, p, y, norm_weight=torch.ones(12), temperature=0.3, weight=weight, label_smoothing=0.1, backend="cpu"
    ).loss
    assert_close(actual.detach(), expected.detach(), "loss", terms=16)
    assert_close(torch.autograd.grad(actual, x)[0], g, "loss_gradient", terms=16)


@PIXELS
def test_ignored_pixels_have_zero_loss_and_exactly_zero_gradient(isa, pixels):
    x, p, y = problem(n=60)
    x = x.to(pixels)
    x[y == -100] *= 1e4
    x[(y == -100).nonzero()[0]] = float("nan")
    for metric in METRICS:
        out = loss_and_grads("cpu", x, p, y, metric=metric, reduction="none", norm_weight=torch.ones(19))
        assert out["loss"][y == -100].eq(0).all()
        assert out["x"][y == -100].eq(0).all() and out["own"][y == -100].eq(0).all()
        assert out["norm_weight"].isfinite().all() and out["x"].isfinite().all()


def test_without_a_pixel_that_counts():
    x, p, y = problem(n=9)
    y.fill_(-100)
    assert loss_and_grads("cpu", x, p, y)["loss"].isnan()
    for reduction in ("mean", "sum", "none"):
        assert loss_and_grads("cpu", x, p, y, reduction=reduction)["x"].eq(0).all()
    assert loss_and_grads("cpu", x, p, y, reduction="sum")["loss"] == 0


@PIXELS
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_nonfinite_pixel_is_nan_alone(isa, bad, pixels):
    for c, k in ((19, 10), (3, 2), (5, 1)):
        x, p, y = problem(n=30, c=c, k=k, ignored=0)
        x = x.to(pixels)
        clean = ops.centroid_cross_entropy(x, p, y, reduction="none", backend="cpu")
        x[7, 3] = bad
        out = ops.centroid_cross_entropy(x, p, y, reduction="none", backend="cpu")
        others = torch.arange(30) != 7
        assert out.loss[7].isnan() and out.prediction[7] == -1
        assert torch.equal(out.loss[others], clean.loss[others]) and torch.equal(
            out.prediction[others], clean.prediction[others]
        )
        assert ops.centroid_cross_entropy(x, p, y, backend="cpu").loss.isnan()
        scores = ops.class_scores(x, p, backend="cpu").scores
        assert scores[7].isnan().all() and scores[others].isfinite().all()
        near = ops.nearest_centroid(x, p, backend="cpu")
        assert near.label[7] == -1 and near.sub[7] == -1 and near.score[7].isnan() and near.label[others].ge(0).all()


@PIXELS
def test_a_zero_pixel_has_finite_cosine_gradients(isa, pixels):
    x, p, y = problem(n=10, ignored=0)
    x = x.to(pixels)
    x[2] = 0
    out = loss_and_grads("cpu", x, p, y, metric="cosine")
    assert out["loss"].isfinite() and out["x"].isfinite().all()


@PIXELS
def test_large_logits_stay_finite(isa, pixels):
    x, p, y = problem(n=40, ignored=0)
    x = (x * 1e4).to(pixels)
    out = loss_and_grads("cpu", x, p, y, temperature=1e-3)
    expected = loss_and_grads("reference", x.double(), p.double(), y, temperature=1e-3)
    assert_close(out["loss"], expected["loss"], "loss", terms=32, scale=1e7)


def test_early_gradients_equal_recomputed_ones(isa):
    """mean with constant centroids makes dX in forward; centroids that need a gradient recompute it in backward."""
    x, p, y = problem(n=150)
    kw = filled(OPTIONS["all"], 19, torch.float32)
    early, late = (loss_and_grads("cpu", x, p, y, centroid_grad=g, **kw) for g in (False, True))
    for name in ("loss", "x", "norm_weight", "norm_bias", "temperature"):
        assert_close(early[name], late[name].double(), "loss_gradient", terms=32)


def test_a_retained_graph_gives_the_same_gradient_twice():
    x, p, y = problem(n=50)
    x.requires_grad_()
    loss = ops.centroid_cross_entropy(x, p, y, backend="cpu").loss
    first = torch.autograd.grad(loss, x, torch.tensor(3.0), retain_graph=True)[0]
    second = torch.autograd.grad(loss, x, torch.tensor(3.0), retain_graph=True)[0]
    third = torch.autograd.grad(loss, x, torch.tensor(6.0))[0]
    assert torch.equal(first, second)
    assert_close(third, 2 * first.double(), "sum", terms=1)


def test_gradients_accumulate_in_leaves():
    x, p, y = problem(n=50)
    x.requires_grad_()
    for _ in range(3):
        ops.centroid_cross_entropy(x, p, y, backend="cpu").loss.backward()
    (once,) = torch.autograd.grad(ops.centroid_cross_entropy(x, p, y, backend="cpu").loss, x)
    assert_close(x.grad, 3 * once.double(), "sum", terms=3)


@PIXELS
def test_reruns_and_thread_counts_are_bit_equal(isa, pixels):
    x, p, y = problem(n=2000, d=20)
    x = x.to(pixels)
    kw = filled(OPTIONS["all"], 19, torch.float32)
    threads, runs = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3, 2):
            torch.set_num_threads(count)
            runs.append(loss_and_grads("cpu", x, p, y, centroid_grad=True, **kw) | loss_and_grads("cpu", x, p, y, **kw))
    finally:
        torch.set_num_threads(threads)
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run.values(), runs[0].values(), strict=True) if a is not None)


def test_no_nck_is_ever_allocated():
    """The profiler's largest allocation of forward and backward is the gradient of x, and not [N,C,K] or [N,C]."""
    n, c, k, d = 2048, 150, 10, 32
    x, p, y = problem(n=n, c=c, k=k, d=d)
    x.requires_grad_()
    w = torch.ones(c, requires_grad=True)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        ops.centroid_cross_entropy(x, p, y, norm_weight=w, backend="cpu").loss.backward()
    largest = max(e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]")
    assert largest <= 4 * n * d, f"{largest} bytes, dX is {4 * n * d}"
    assert largest < 4 * n * c


def test_backward_of_a_scaled_loss_makes_no_second_gradient():
    n, d = 4096, 64
    x, p, y = problem(n=n, c=5, k=2, d=d)
    x.requires_grad_()
    loss = ops.centroid_cross_entropy(x, p, y, backend="cpu").loss * 3
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        loss.backward()
    sizes = [e.nbytes() for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert max([*sizes, 0]) < 4 * n * d


def test_autocast_keeps_dtypes():
    x, p, y = problem()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for backend in ("cpu", "reference"):
            a = ops.class_scores(x, p, backend=backend).scores
            assert a.dtype == torch.float32
            assert_close(a, ops.class_scores(x.double(), p.double(), backend="reference").scores, "similarity", terms=32)
            assert ops.centroid_cross_entropy(x.bfloat16(), p, y, backend=backend).loss.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_gradients_of_a_mean_survive_half_precision(dtype):
    """1/N times a probability is below what float16 holds; GradScaler's first scale, 65536, above."""
    x, p, y = problem(n=20000, c=5, k=2, d=8, ignored=0.1)
    x = x.to(dtype).requires_grad_()
    (65536 * ops.centroid_cross_entropy(x, p, y).loss).backward()
    wide = x.detach().double().requires_grad_()
    (65536 * ops.centroid_cross_entropy(wide, p.double(), y, backend="reference").loss).backward()
    # rounded when it is made and when it is scaled
    assert (x.grad.double() - wide.grad).abs().max() <= 2 * torch.finfo(dtype).eps * wide.grad.abs().max()


# --- torch's own checks of the registrations


def test_opcheck():
    x, p, y = problem(n=6, c=3, k=2, d=4, ignored=0)
    y[3] = -100
    x.requires_grad_()
    q, w, s = p.clone().requires_grad_(), torch.ones(3, requires_grad=True), torch.tensor(2.0, requires_grad=True)
    early = [True, False, True, False, True]
    check = torch.library.opcheck
    check(op.centroid_distance.overload, (x, q, "cosine", "cpu"))
    check(op.class_scores.overload, (x, p, y, "dot", "cpu"))
    check(op.class_scores.overload, (x, q, None, "cosine", "cpu"))
    check(op.nearest_centroid.overload, (x.detach(), p, "dot", "cpu"))
    check(
        op_loss._loss.overload,
        (x, p, y, "dot", w, w.detach(), 1e-5, s, 1.0, None, -100, 0.1, "mean", None, "cpu", early),
    )
    check(
        op_loss._loss.overload,
        (x, q, y, "dot", w, None, 1e-5, None, 1.0, torch.rand(3), -100, 0.1, "none", None, "cpu", [False] * 5),
    )


def test_opcheck_of_images():
    x = torch.randn(2, 4, 2, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    p, y = torch.randn(3, 2, 4), torch.randint(0, 3, (12,))
    torch.library.opcheck(op.class_scores.overload, (x, p, y, "dot", "cpu"))
    loss = (x, p, y, "dot", None, None, 1e-5, None, 1.0, None, -100, 0.0, "mean", None, "cpu", [True, *[False] * 4])
    torch.library.opcheck(op_loss._loss.overload, loss)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiles_whole_with_dynamic_shapes(backend):
    def step(x, p, y, w, t):
        out = ops.centroid_cross_entropy(x, p, y, norm_weight=w, temperature=t)
        scores = ops.class_scores(x, p, y)
        near = ops.nearest_centroid(x, p)
        distance = ops.centroid_distance(x, p).mean()
        return out.loss * 3 + scores.scores.mean() + (1 - scores.own_similarity).square().mean() + distance, near.label

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=backend)
    for n in (6, 9):
        x, p, y = problem(n=n, c=4, k=2, d=5)
        grads = []
        for run in (step, compiled):
            leaf, w, t = x.clone().requires_grad_(), torch.ones(4, requires_grad=True), torch.tensor(0.5, requires_grad=True)
            loss, label = run(leaf, p, y, w, t)
            (loss * 2).backward()
            grads.append((leaf.grad, w.grad, t.grad, loss.detach(), label))
        for a, b in zip(*grads, strict=True):
            torch.testing.assert_close(a, b)


# --- anything at all


@st.composite
def problems(draw):
    n, c, k, d = (draw(st.integers(lo, hi)) for lo, hi in ((0, 40), (1, 36), (1, 12), (1, 40)))
    dtype = draw(st.sampled_from(DTYPES))
    metric = draw(st.sampled_from(METRICS))
    return n, c, k, d, dtype, metric, draw(st.integers(0, 2**31))


@given(problems())
def test_any_problem_equals_reference(case):
    n, c, k, d, dtype, metric, seed = case
    torch.manual_seed(seed)
    x, p, y = problem(n, c, k, d, dtype)
    scores = ops.class_scores(x, p, y, metric=metric, backend="cpu")
    expected = ops.class_scores(x.double(), p.double(), y, metric=metric, backend="reference")
    assert_close(scores.scores, expected.scores, "similarity", terms=d, scale=2.0)
    assert_close(scores.own_similarity, expected.own_similarity, "similarity", terms=d, scale=2.0)
    out = ops.centroid_cross_entropy(x, p, y, metric=metric, reduction="none", backend="cpu").loss
    e = ops.centroid_cross_entropy(x.double(), p.double(), y, metric=metric, reduction="none", backend="reference").loss
    assert_close(out, e, "loss", terms=d, scale=2.0)


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 3))
def test_duplicated_centroids_change_nothing(c, k, copies):
    x, p, y = problem(n=10, c=c, k=k, d=6, ignored=0)
    again = p.repeat(1, copies, 1)
    a, b = ops.class_scores(x, p, y, backend="cpu"), ops.class_scores(x, again, y, backend="cpu")
    assert torch.equal(a.winner, b.winner)
    assert_close(b.scores, a.scores.double(), "similarity", terms=6)


# --- errors


X, P, Y = torch.zeros(6, 4), torch.zeros(3, 2, 4), torch.zeros(6, dtype=torch.int64)


@pytest.mark.parametrize(
    "call,error,text",
    [
        (lambda: ops.class_scores(X, torch.zeros(3, 2, 5)), ValueError, r"class_scores: centroids must be \[C,K,D\] with D=4 to match x; got \[3, 2, 5\]"),
        (lambda: ops.class_scores(X[0], P), ValueError, r"class_scores: x must be \[N,D\] or \[B,D,H,W\]; got \[4\]"),
        (lambda: ops.class_scores(X.long(), P), TypeError, r"class_scores: x must be a float32, float64, float16 or bfloat16 tensor; got \[6, 4\] int64"),
        (lambda: ops.class_scores(X, P, Y[:5]), ValueError, r"class_scores: labels must be \[N\]=\[6\] to match x; got \[5\]"),
        (lambda: ops.class_scores(X, P, Y.float()), TypeError, r"class_scores: labels must be an integer tensor; got .*float32"),
        (lambda: ops.class_scores(X, P, metric="l1"), ValueError, r"class_scores: metric must be one of dot, cosine, sqeuclidean; got 'l1'"),
        (lambda: ops.class_scores(X, torch.zeros(3, 257, 4)), ValueError, r"K <= 256"),
        (lambda: ops.class_scores(X, P, backend="cuda"), RuntimeError, r"class_scores: backend 'cuda' was asked for but cannot run"),
        (lambda: ops.centroid_distance(X, P, metric="dot"), ValueError, r"centroid_distance: metric must be one of cosine, sqeuclidean"),
        (lambda: ops.nearest_centroid(X, P[:, :0]), ValueError, r"nearest_centroid: centroids must be"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, ignore_index=2), ValueError, r"ignore_index must be outside \[0,3\); got 2"),
        (lambda: ops.centroid_cross_entropy(X, P, Y + 3, backend="cpu"), ValueError, r"centroid_cross_entropy: labels must be in \[0,C\), ignore_index or negative; got 3 at pixel 0"),
        (lambda: ops.centroid_cross_entropy(X, P, Y + 3, backend="reference"), ValueError, r"labels must be in \[0,3\), ignore_index or negative; got 3 at pixel 0"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, temperature=0), ValueError, r"temperature must be positive and finite; got 0"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, temperature=float("nan")), ValueError, r"temperature must be positive"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, temperature="hot"), TypeError, r"temperature must be a number"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, temperature=torch.ones(2)), ValueError, r"a tensor of one element; got \[2\]"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, norm_bias=torch.zeros(3)), ValueError, r"norm_bias must be None without norm_weight"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, norm_weight=torch.zeros(4)), ValueError, r"norm_weight must be \[C\]=\[3\] to match centroids; got \[4\]"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, weight=torch.zeros(2)), ValueError, r"weight must be \[C\]=\[3\]"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, label_smoothing=1.5), ValueError, r"label_smoothing must be in \[0,1\]; got 1.5"),
        (lambda: ops.centroid_cross_entropy(X, P, Y, reduction="max"), ValueError, r"reduction must be one of none, mean, sum; got 'max'"),
        (lambda: ops.centroid_cross_entropy(X, P, Y.view(2, 3)), ValueError, r"labels must be \[N\]=\[6\] to match x; got \[2, 3\]"),
        (lambda: ops.centroid_cross_entropy(X, P.to("meta"), Y), ValueError, r"centroids must be on cpu like x; got meta"),
    ],
)  # fmt: skip
def test_bad_input_is_named(call, error, text):
    with pytest.raises(error, match=text):
        call()


# --- the released code's outputs


@pytest.mark.parametrize("name", ["cityscapes_f32", "cityscapes_f64", "hard_f64", "missing_classes_f64"])
def test_golden(name):
    from pathlib import Path

    import numpy as np

    data = {
        k: torch.from_numpy(np.asarray(v)) for k, v in np.load(Path(__file__).parent / "data" / f"golden_{name}.npz").items()
    }
    dtype = data["x"].dtype
    p = F.normalize(data["prototypes"], dim=-1)
    x = data["x"].clone().requires_grad_()
    fw, fb, mw, mb = (
        data[k].clone().requires_grad_() for k in ("feat_norm_weight", "feat_norm_bias", "mask_norm_weight", "mask_norm_bias")
    )
    e = ops.normalize_embedding(x, fw, fb)
    out = ops.centroid_cross_entropy(e, p, data["labels"], norm_weight=mw, norm_bias=mb, ignore_index=int(data["ignore_index"]))
    assert abs(out.loss.item() - data["cross_entropy"].item()) < 1e-4
    out.loss.backward()
    for leaf, key in (
        (x, "grad_x"),
        (fw, "grad_feat_norm_weight"),
        (fb, "grad_feat_norm_bias"),
        (mw, "grad_mask_norm_weight"),
        (mb, "grad_mask_norm_bias"),
    ):
        assert (leaf.grad - data[key]).norm() <= 5e-4 * data[key].norm(), key
    scores = ops.class_scores(e.detach(), p).scores
    assert (scores - data["raw_scores"]).abs().max() < (1e-5 if dtype == torch.float32 else 1e-12)
    disagree = out.prediction != data["prediction"]
    top = data["scores"].topk(2, dim=1).values
    assert ((top[:, 0] - top[:, 1])[disagree] < 1e-4).all()


def test_memory_of_python_objects_does_not_grow():
    x, p, y = problem(n=20)
    for _ in range(3):
        ops.centroid_cross_entropy(x.requires_grad_(), p, y).loss.backward()
    tracemalloc.start()
    before = tracemalloc.get_traced_memory()[0]
    for _ in range(20):
        ops.centroid_cross_entropy(x, p, y).loss.backward()
    grown = tracemalloc.get_traced_memory()[0] - before
    tracemalloc.stop()
    assert grown < 20_000 and math.isfinite(grown)
