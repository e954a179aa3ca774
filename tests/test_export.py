"""Sizes without data: torch.export with symbolic sizes, and the meta device, for every op on maps and rows, and the heads."""

import io

import pytest
import torch
import torch.nn.functional as F

from dnc_kernels import nn, ops, use_backend
from dnc_kernels.backends import KERNELS

pytestmark = pytest.mark.usefixtures("one_thread")

C, K, D = 5, 2, 8
WEIGHT, BIAS = torch.linspace(0.5, 1.5, D), torch.linspace(-1, 1, D)
DYNAMIC = torch.export.Dim.DYNAMIC


def features(pixels):
    return torch.randn(pixels, D) if isinstance(pixels, int) else torch.randn(pixels[0], D, *pixels[1:])


def labels(pixels, bound=C):
    return torch.randint(0, bound, (pixels,) if isinstance(pixels, int) else pixels)


def similarity(pixels):
    return torch.randn(pixels, K)


def scores(pixels):
    return torch.randn(pixels[0], C, *(size // 4 for size in pixels[1:]))


def image(pixels):
    return torch.randn(pixels[0], 3, *pixels[1:])


def momentum(p, x, y):
    p = p.clone()
    ops.momentum_update_(p, x, y)
    return p


def sums_then_momentum(p, x, y):
    p = p.clone()
    ops.apply_momentum_(p, *ops.cluster_sums(x, y, C * K))
    return p


def embedding(p, x):
    return ops.normalize_embedding(x, WEIGHT.to(x.device), BIAS.to(x.device), return_length=True)


ROWS, MAP = (30, 17), ((2, 8, 12), (3, 20, 24))
#: case: (function of sub-centroids and inputs; what makes each input of so many pixels; pixels of the example and of another call)
OPS = {
    "normalize_embedding": (embedding, (features,), (ROWS, MAP)),
    "centroid_distance": (lambda p, x: ops.centroid_distance(x, p), (features,), (ROWS, MAP)),
    "class_scores": (lambda p, x: ops.class_scores(x, p)[:2], (features,), (ROWS, MAP)),
    "class_scores of labels": (lambda p, x, y: ops.class_scores(x, p, y), (features, labels), (ROWS, MAP)),
    "nearest_centroid": (lambda p, x: ops.nearest_centroid(x, p), (features,), (ROWS, MAP)),
    "centroid_cross_entropy": (lambda p, x, y: ops.centroid_cross_entropy(x, p, y), (features, labels), (ROWS, MAP)),
    "subcentroid_cross_entropy": (lambda p, x, y: ops.subcentroid_cross_entropy(x, p, y), (features, labels), (ROWS, MAP)),
    "cluster_sums": (lambda p, x, y: ops.cluster_sums(x, y, C * K), (features, labels), (ROWS, MAP)),
    "momentum_update_": (momentum, (features, labels), (ROWS, MAP)),
    "apply_momentum_": (sums_then_momentum, (features, labels), (ROWS, MAP)),
    "sinkhorn_assign": (lambda p, s, y: ops.sinkhorn_assign(s, y, C), (similarity, labels), (ROWS,)),
    "sinkhorn_plan": (lambda p, s, y: ops.sinkhorn_plan(s, y, C), (similarity, labels), (ROWS,)),
    "sinkhorn_plan of one group": (lambda p, s: ops.sinkhorn_plan(s), (similarity,), (ROWS,)),
    "upsample_cross_entropy": (lambda p, s, y: ops.upsample_cross_entropy(s, y), (scores, labels), (MAP,)),
    "upsample_argmax": (lambda p, s, i: ops.upsample_argmax(s, i.shape[2:]), (scores, image), (MAP,)),
    "upsample_argmax of one size": (lambda p, s: ops.upsample_argmax(s, (16, 20)), (scores,), (MAP,)),
    "upsample_argmax of corners": (
        lambda p, s, i: ops.upsample_argmax(s, i.shape[2:], align_corners=True), (scores, image), (MAP,)
    ),
}  # fmt: skip
CASES = [pytest.param(*case[:2], pixels, id=f"{name}-{'map' if pixels is MAP else 'rows'}")
         for name, case in OPS.items() for pixels in case[2]]  # fmt: skip


class Call(torch.nn.Module):
    """A function of sub-centroids, or of a head, as a module."""

    def __init__(self, function, head=None):
        super().__init__()
        self.function, self.head = function, head
        self.register_buffer("p", F.normalize(torch.randn(C, K, D), dim=2))

    def forward(self, *inputs):
        made = self.function(self.p if self.head is None else self.head, *inputs)
        return tuple(made) if isinstance(made, tuple) else made


def as_tuple(made):
    return made if isinstance(made, tuple) else tuple(made) if isinstance(made, list) else (made,)


def assert_exports(module, inputs, others, *, strict):
    """The program of one size gives what the module gives at another, also after a round trip through a file."""
    sizes = tuple({dim: DYNAMIC for dim in range(x.ndim) if dim != 1 or x.ndim == 3} for x in inputs)
    program = torch.export.export(module, inputs, dynamic_shapes=(sizes,), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for made in (program, torch.export.load(file)):
        for actual, expected in zip(as_tuple(made.module()(*others)), as_tuple(module(*others)), strict=True):
            torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_every_op_is_exported():
    assert {name.split()[0] for name in OPS} == set(KERNELS) - {"head_step"}


@pytest.mark.parametrize(("backend", "strict"), [("auto", False), ("auto", True), ("reference", False)])
@pytest.mark.parametrize(("function", "make", "pixels"), CASES)
def test_an_op_is_exported_with_dynamic_sizes(function, make, pixels, backend, strict):
    torch._dynamo.reset()
    with use_backend(backend):
        assert_exports(Call(function), *(tuple(m(n) for m in make) for n in pixels), strict=strict)


HEADS = {
    "forward": lambda h, x: h(x),
    "predict": lambda h, x: h.predict(x),
    "predict at a size": lambda h, x: h.predict(x, (100, 90)),
    "explain": lambda h, x: h.explain(x),
}


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("function", HEADS.values(), ids=HEADS)
@pytest.mark.parametrize("options", [{}, {"recipe": "released"}, {"embed_channels": 6}], ids=str)
def test_a_head_is_exported_with_dynamic_sizes(options, function, strict):
    torch._dynamo.reset()
    head = nn.DNCHead(D, C, K, **options).eval()
    assert_exports(Call(function, head), *((features(n),) for n in MAP), strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_prediction_takes_images_of_any_size_even_that_of_the_features(strict):
    torch._dynamo.reset()
    call = Call(lambda h, x, i: h.predict(x, size=i.shape[2:]), nn.DNCHead(D, C, K).eval())
    sizes = tuple(dict.fromkeys((0, 2, 3), DYNAMIC) for _ in range(2))
    example = features((2, 4, 6)), image((2, 16, 24))
    program = torch.export.export(call, example, dynamic_shapes=(sizes,), strict=strict).module()
    for batch, size, image_size in ((3, (5, 9), (20, 18)), (1, (4, 6), (8, 12)), (2, (4, 6), (4, 6)), (2, (6, 5), (6, 10))):
        inputs = features((batch, *size)), image((batch, *image_size))
        assert torch.equal(program(*inputs), call(*inputs))


@pytest.mark.parametrize("name", ["forward", "predict", "explain"])
def test_a_classifier_is_exported_with_a_dynamic_batch(name):
    classifier = nn.DNCClassifier(D, C, K).eval()
    assert_exports(Call(HEADS[name], classifier), *((features(n),) for n in ROWS), strict=False)


def shapes(made):
    return [(t.shape, t.dtype) for t in as_tuple(made)]


@pytest.mark.parametrize(("function", "make", "pixels"), CASES)
def test_an_op_on_the_meta_device_has_the_shapes_of_the_cpu(function, make, pixels):
    call, inputs = Call(function), tuple(m(pixels[0]) for m in make)
    expected = shapes(call(*inputs))
    assert shapes(call.to("meta")(*(x.to("meta") for x in inputs))) == expected


@pytest.mark.parametrize("function", HEADS.values(), ids=HEADS)
def test_a_head_on_the_meta_device_has_the_shapes_of_the_cpu(function):
    x = features(MAP[0])
    expected = shapes(function(nn.DNCHead(D, C, K), x))
    assert shapes(function(nn.DNCHead(D, C, K, device="meta"), x.to("meta"))) == expected


def test_a_training_step_runs_on_the_meta_device():
    head, classifier = nn.DNCHead(D, C, K, device="meta"), nn.DNCClassifier(D, C, K, device="meta")
    assert head.loss(features(MAP[0]).to("meta"), labels((2, 32, 48)).to("meta")).loss.is_meta
    assert classifier.loss(features(ROWS[0]).to("meta"), labels(ROWS[0]).to("meta")).loss.is_meta
