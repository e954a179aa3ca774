"""Class scores, the nearest sub-centroid and the loss in CUDA C++ against float64: on a GPU, or their source on the host.

What they and Triton owe alike is in test_similarity_gpu.py.
"""

import math

import pytest
import similarity_check
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE, configure
from gpu_check import needs_gpu
from similarity_check import ENGINES, METRICS, flat, loss_and_grads, options_of, set_engine, unit
from tolerances import assert_close, bound

from dnc_kernels import backends, ops
from dnc_kernels.ops.similarity.calls import ScoresCall, ScoresOut

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("engine")]
DTYPES = (torch.bfloat16, torch.float16)
#: N, C, K, D: one of everything; tiles and boxes that are not full; several rounds of a cluster; slices of channels
SHAPES = [(1, 1, 1, 8), (42, 19, 3, 40), (17, 2, 20, 16), (33, 21, 7, 72), (290, 5, 10, 64), (130, 9, 4, 328), (20, 3, 1, 768)]


def problem(n=42, c=19, k=3, d=40, dtype=torch.bfloat16):
    return similarity_check.problem(n, c, k, d, dtype)


@pytest.fixture(params=ENGINES, ids=lambda capability: f"sm{capability}")
def engine(request, cuda):
    """The kernels of either kind of GPU; on a GPU its own."""
    set_engine(cuda, request.param)
    return request.param


def wide(x, p, metric):
    """The same in float64, as the kernels see it: cosine multiplies by unit rows that are rounded to x's dtype."""
    x, p = x.detach().double(), p.detach()
    if metric == "cosine":
        return x, F.normalize(p.float(), dim=2).to(x.dtype if x.dtype != torch.float64 else p.dtype).double()
    return x, p.double()


def seen(x, metric):
    return (F.normalize(x, dim=1), "dot") if metric == "cosine" else (x, metric)


def scale_of(metric):
    return {"dot": 1.0, "cosine": 1.0, "sqeuclidean": 4.0}[metric]


def check_scores(x, p, labels, metric="dot"):
    actual = ops.class_scores(x, p, labels, metric=metric, backend="cuda")
    pixels, rows = wide(x, p, metric)
    pixels, plain = seen(pixels, metric)
    inside = torch.where(labels < len(p), labels, -100)  # the CPU reference raises; GPU kernels leave these out
    expected = ops.class_scores(pixels, rows, inside, metric=plain, backend="reference")
    d = x.shape[1]
    assert actual.scores.dtype == torch.float32
    assert_close(actual.scores.cpu(), expected.scores.cpu(), "similarity", terms=d, scale=scale_of(metric))
    assert_close(actual.own_similarity.cpu(), expected.own_similarity.cpu(), "similarity", terms=d, scale=scale_of(metric))
    every = ops.class_scores(pixels, rows.flatten(0, 1)[:, None], metric=plain, backend="reference").scores
    reached = every.view(len(x), *p.shape[:2]).gather(2, actual.winner.long()[..., None])[..., 0]
    assert_close(reached.float().cpu(), expected.scores.cpu(), "similarity", terms=d, scale=scale_of(metric))
    made = ops.nearest_centroid(x, p, metric=metric, backend="cuda")
    best = expected.scores.max(1).values
    allowed = bound("similarity", made.score, best, terms=d, scale=scale_of(metric))
    assert ((made.score - best).abs() <= allowed).all()
    reached = every.gather(1, (made.label * p.shape[1] + made.sub)[:, None])[:, 0]
    assert ((reached - best).abs() <= allowed).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_scores_and_nearest(shape, dtype):
    check_scores(*problem(*shape, dtype))


@pytest.mark.sanitize
@pytest.mark.parametrize("metric", METRICS)
def test_scores_of_every_metric(metric):
    x, p, labels = problem(140, 21, 5, 72)
    check_scores(x * torch.linspace(0.5, 2, 140, device=DEVICE)[:, None].bfloat16(), p, labels, metric)


def test_scores_in_every_order(order, engine):
    if DEVICE == "cpu":
        configure(order, capability=engine)
    check_scores(*problem(300, 21, 3, 136))


def test_layouts_of_scores_and_pixels():
    """Rows of a wider matrix, channels_last images, scores of any strides."""
    x, p, labels = problem(42, 19, 3, 40)
    expected = ops.class_scores(x, p, labels, backend="cuda")
    padded = torch.full((42, 48), math.nan, device=DEVICE, dtype=x.dtype)
    padded[:, :40] = x
    image = x.view(2, 3, 7, 40).permute(0, 3, 1, 2)
    assert image.is_contiguous(memory_format=torch.channels_last)
    for given, shaped in ((padded[:, :40], labels), (image, labels.view(2, 3, 7))):
        made = ops.class_scores(given, p, shaped, backend="cuda")
        assert all(torch.equal(flat(t), e) for t, e in zip(made, expected, strict=True))
    from dnc_kernels.ops.similarity import op

    planes = torch.empty(2, 19, 3, 7, device=DEVICE)
    winner, own = torch.empty(2, 19, 3, 7, dtype=torch.uint8, device=DEVICE), torch.empty(42, 3, device=DEVICE)
    op.class_scores.into(ScoresCall(image, p, labels, "dot", "cuda"), ScoresOut(planes, winner, own))
    assert torch.equal(flat(planes), expected.scores)
    assert torch.equal(flat(winner), expected.winner)


#: B, H, W, C, K, D: tiles of pixels across images and a last one that is not full; the same with maxima in the workspace
MAPS = [(2, 4, 6, 19, 3, 40), (1, 2, 4, 5, 1, 264), (2, 12, 12, 5, 10, 64), (1, 8, 9, 230, 2, 512)]
MAPS += [pytest.param((3, 8, 13, 7, 2, 136), marks=pytest.mark.sanitize)]


def maps(b, h, w, c, k, d, dtype=torch.bfloat16):
    """The same problem as rows and as a feature map [B,D,H,W], with labels of either shape."""
    x, p, labels = problem(b * h * w, c, k, d, dtype)
    return x, x.view(b, h, w, d).permute(0, 3, 1, 2).contiguous(), p, labels, labels.view(b, h, w)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_scores_and_nearest_of_feature_maps(shape, dtype):
    """NCHW is read in place; what comes out is that of the rows, which are checked against float64 above."""
    x, image, p, labels, shaped = maps(*shape, dtype)
    assert backends.layout(image) == "planes"
    made, expected = (ops.class_scores(*given, backend="cuda") for given in ((image, p, shaped), (x, p, labels)))
    check_scores(x, p, labels)
    assert all(torch.equal(flat(t), e) for t, e in zip(made, expected, strict=True))
    near, expected = (ops.nearest_centroid(given, p, backend="cuda") for given in (image, x))
    assert all(torch.equal(a.flatten(), b) for a, b in zip(near, expected, strict=True))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_loss_of_feature_maps(shape, metric):
    """NCHW is read in place and its gradient is NCHW."""
    x, image, p, labels, _ = maps(*shape)
    check_loss(x, p, labels, metric, image, reduction="sum", **options_of(shape[3], True, True, 0.0))


@pytest.mark.parametrize("shape", [(2, 19, 40, 3, 7), (1, 7, 40, 5, 8)], ids=str)
def test_feature_maps_that_no_unit_divides_are_refused(shape):
    """21 pixels a plane, or a crop of a wider map."""
    b, c, d, h, w = shape
    x, p, labels = problem(b * h * w, c, 2, d)
    whole = torch.full((b, d, h, w + 8), math.nan, device=DEVICE, dtype=x.dtype)
    crop = whole[..., :w].copy_(x.view(b, h, w, d).permute(0, 3, 1, 2))
    assert backends.layout(crop) == backends.layout(crop[:1].expand(2, -1, -1, -1)) == "strided"
    with pytest.raises((ValueError, RuntimeError), match="cuda"):
        ops.class_scores(crop, p, labels.view(b, h, w), backend="cuda")
    if h * w % 8:
        with pytest.raises((ValueError, RuntimeError), match="cuda"):
            ops.class_scores(crop.contiguous(), p, labels.view(b, h, w), backend="cuda")


def check_loss(x, p, labels, metric="dot", image=None, **options):
    """The kernel, on `image` if given, against float64 on the same values as rows; returns what the kernel made."""
    if image is None:
        actual = loss_and_grads("cuda", x, p, labels, metric=metric, **options)
    else:
        loss, prediction, own, dx, *others = loss_and_grads("cuda", image, p, labels, metric=metric, **options)
        assert dx.stride() == image.stride()
        actual = loss, prediction.flatten(), flat(own), flat(dx), *others
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    inside = torch.where((labels >= 0) & (labels < p.shape[0]), labels, -100)  # the CPU reference raises; GPU kernels ignore
    plain = {"metric": "dot", "unit_pixels": True} if metric == "cosine" else {"metric": metric}
    expected = loss_and_grads("reference", *wide(x, p, metric), inside, **plain, **exact)
    d = x.shape[1]
    assert (actual[1] != expected[1]).sum() <= 0.02 * len(labels)
    assert_close(actual[0].cpu(), expected[0].cpu(), "loss", terms=d, scale=scale_of(metric))
    assert_close(actual[2].cpu(), expected[2].cpu(), "similarity", terms=d, scale=4.0)
    for a, e in zip(actual[3:], expected[3:], strict=True):
        # dr is rounded to 16 bits before the second product: what is summed is as large as the largest gradient
        assert_close(a.cpu(), e.cpu(), "loss_gradient", terms=d, scale=max(scale_of(metric), float(e.nan_to_num().abs().max())))
    return actual


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_loss(shape, dtype):
    x, p, labels = problem(*shape, dtype)
    norm = shape[1] > 1
    check_loss(x, p, labels, reduction="sum", **options_of(shape[1], norm, not norm, 0.1 if norm else 0.0))


@pytest.mark.sanitize
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("norm", [False, True])
def test_loss_of_every_reduction(norm, reduction):
    x, p, labels = problem(140, 21, 5, 72)
    check_loss(x, p, labels, reduction=reduction, **options_of(21, norm, not norm, 0.0 if norm else 0.1))


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("metric", METRICS)
def test_loss_of_every_metric(metric, norm):
    x, p, labels = problem(140, 21, 3, 72)
    x = x * torch.linspace(0.5, 2, 140, device=DEVICE)[:, None].bfloat16()
    check_loss(x, p, labels, metric, reduction="none", **options_of(21, norm, True, 0.1))


def test_loss_in_every_order(order, engine):
    if DEVICE == "cpu":
        configure(order, capability=engine)
    x, p, labels = problem(300, 21, 3, 136)
    check_loss(x, p, labels, **options_of(21, True, True, 0.1))


def test_the_ring_goes_round_many_times(order, engine):
    """A pair of blocks that shares more boxes of sub-centroids than its ring holds."""
    if DEVICE == "cpu":
        configure(order, processors=2, capability=engine)
    x, p, labels = problem(600, 41, 4, 264)
    check_loss(x, p, labels, reduction="sum", **options_of(41, True, False, 0.0))
    check_scores(x, p, labels)


def test_the_slab_spills_to_the_workspace():
    """Where class maxima do not fit shared memory."""
    x, p, labels = problem(70, 230, 2, 512)
    check_loss(x, p, labels, reduction="sum", **options_of(230, True, False, 0.0))


def test_a_gpu_with_many_processors_and_one_with_a_single_one(engine):
    """Clusters of two, and none; blocks with several tiles of pixels, and with none."""
    if DEVICE == "cuda":
        pytest.skip("a GPU has the processors it has")
    x, p, labels = problem(520, 7, 2, 24)
    options = {"reduction": "sum", **options_of(7, True, False, 0.0)}
    results = []
    for processors in (1, 2, 5, 16):
        configure(processors=processors, capability=engine)
        results.append(check_loss(x, p, labels, **options))
    assert all(torch.equal(results[0][3], other[3]) for other in results[1:])  # dX of a pixel depends on nothing else


@pytest.mark.sanitize
def test_many_small_images_on_many_processors(engine):
    """A tile never crosses images: more blocks than the pixels alone would fill. The workspace has room for all of them."""
    if DEVICE == "cpu":
        configure(processors=16, capability=engine)
    x, image, p, labels, _ = maps(20, 2, 4, 7, 2, 72)
    check_loss(x, p, labels, "dot", image, reduction="sum", **options_of(7, True, False, 0.0))
    x, image, p, labels, _ = maps(8, 2, 4, 150, 3, 648)  # maxima in the workspace
    check_loss(x, p, labels, "dot", image, reduction="sum", **options_of(150, True, False, 0.0))


@pytest.mark.parametrize(("low", "high"), [(0, 1), (1, 4), (3, 8), (2, 6), (5, 18), (6, 7)])
def test_two_classes_that_tie(low, high):
    """Classes lie in different lanes, and at different slots of a lane."""
    x = torch.ones(20, 24, device=DEVICE).bfloat16()
    p = torch.zeros(19, 3, 24, device=DEVICE).bfloat16()
    p[low, 1], p[high, 0] = 1, 1
    near = ops.nearest_centroid(x, p, backend="cuda")
    assert near.label.eq(low).all() and near.sub.eq(1).all()
    labels = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    assert ops.centroid_cross_entropy(x, p, labels, backend="cuda").prediction.eq(low).all()


@pytest.mark.sanitize
@pytest.mark.skipif(DEVICE == "cuda", reason="a GPU has the shared memory it has")
@pytest.mark.parametrize("planes", (False, True))
@pytest.mark.parametrize(("c", "d"), [(19, 256), (150, 256), (150, 384), (40, 512), (150, 512)])
def test_a_gpu_with_less_shared_memory(c, d, planes, engine):
    """Fewer warps a block, and fewer than four: then a tile has fewer than 64 pixels."""
    configure(capability=86)
    x, image, p, labels, _ = maps(1, 8, 10, c, 2, d)
    check_loss(x, p, labels, "dot", image if planes else None, reduction="sum", **options_of(c, True, False, 0.0))


def test_gradients_of_scores_and_of_sub_centroids_come_from_triton():
    pytest.importorskip("triton")
    x, p, labels = problem(18, 5, 2, 16)
    x, p = x.requires_grad_(), p.requires_grad_()
    made = torch.autograd.grad(ops.class_scores(x, p, labels, backend="cuda").scores.square().sum(), (x, p))
    loss = ops.centroid_cross_entropy(x, p, labels, reduction="sum", backend="cuda").loss
    made += torch.autograd.grad(loss, (x, p))
    a, b = (t.detach().double().requires_grad_() for t in (x, p))
    inside = torch.where(labels < 5, labels, -100)
    expected = torch.autograd.grad(ops.class_scores(a, b, inside, backend="reference").scores.square().sum(), (a, b))
    expected += torch.autograd.grad(ops.centroid_cross_entropy(a, b, inside, reduction="sum", backend="reference").loss, (a, b))
    for m, e in zip(made, expected, strict=True):
        assert_close(m.cpu(), e.cpu(), "loss_gradient", terms=16, scale=10.0)


def test_expanded_gradients_of_the_loss():
    x, p, labels = problem()
    x.requires_grad_()
    loss = ops.centroid_cross_entropy(x, p, labels, reduction="none", backend="cuda").loss
    made = torch.autograd.grad(loss.sum(), x)[0]
    loss = ops.centroid_cross_entropy(x, p, labels, reduction="sum", backend="cuda").loss
    assert torch.equal(made, torch.autograd.grad(loss, x)[0])


def test_pixels_that_begin_between_units_are_copied():
    x, p, _ = problem(n=24, c=5, d=16)
    beside = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x)
    assert beside.data_ptr() % 16
    for made, expected in zip(
        ops.nearest_centroid(beside, p, backend="cuda"), ops.nearest_centroid(x, p, backend="cuda"), strict=True
    ):
        assert torch.equal(made, expected)


@pytest.mark.large
@needs_gpu
def test_more_numbers_than_an_int_holds():
    n, d = 2**31 // 256 + 4096, 256
    if torch.cuda.mem_get_info()[0] < 6 * n * d:
        pytest.skip("needs more memory")
    x = torch.zeros(n, d, dtype=torch.bfloat16, device=DEVICE)
    x[-500:] = unit(500, d, dtype=torch.bfloat16)
    p, labels = unit(5, 3, d, dtype=torch.bfloat16), torch.full((n,), -100, device=DEVICE)
    labels[-500:] = torch.randint(0, 5, (500,), device=DEVICE)
    made = loss_and_grads("cuda", x, p, labels, reduction="sum")
    expected = loss_and_grads("cuda", x[-500:], p, labels[-500:], reduction="sum")
    assert torch.equal(made[3][-500:], expected[3]) and not made[3][:-500].any()
    assert torch.equal(made[1][-500:], expected[1])
