"""Class scores, the nearest sub-centroid and the loss in CUDA C++ against float64: on a GPU, or their source on the host."""

import math

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE, configure
from tolerances import assert_close, bound

from dnc_kernels import backends, ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("engine")]
METRICS = ("dot", "cosine", "sqeuclidean")
DTYPES = (torch.bfloat16, torch.float16)
#: N, C, K, D: one of everything; tiles and boxes that are not full; several rounds of a cluster; slices of channels
SHAPES = [(1, 1, 1, 8), (42, 19, 3, 40), (17, 2, 20, 16), (33, 21, 7, 72), (290, 5, 10, 64), (130, 9, 4, 328), (20, 3, 1, 768)]


@pytest.fixture(params=(90, 80), ids=("sm90", "sm80"))
def engine(request, cuda):
    """The kernels of either kind of GPU; on a GPU its own."""
    if cuda == "cpu":
        configure(capability=request.param)
    elif (torch.cuda.get_device_capability()[0] == 9) != (request.param == 90):
        pytest.skip("kernels of another GPU")
    return request.param


def as_rows(t):
    """[N,C] of a map [B,C,H,W]."""
    return t.permute(0, 2, 3, 1).flatten(0, 2)


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1).to(dtype)


def problem(n=42, c=19, k=3, d=40, dtype=torch.bfloat16):
    """Pixels, sub-centroids, labels: some ignored, one beyond the classes."""
    labels = torch.randint(0, c, (n,), device=DEVICE)
    labels[::5] = -100
    labels[1::17] = c + 3
    return unit(n, d, dtype=dtype), unit(c, k, d, dtype=dtype), labels


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
        assert all(torch.equal(t if t.ndim == 2 else as_rows(t), e) for t, e in zip(made, expected, strict=True))
    from dnc_kernels.ops.similarity import op

    planes = torch.empty(2, 19, 3, 7, device=DEVICE)
    winner, own = torch.empty(2, 19, 3, 7, dtype=torch.uint8, device=DEVICE), torch.empty(42, 3, device=DEVICE)
    op.scores_into(image, p, labels, planes, winner, own, "cuda")
    assert torch.equal(as_rows(planes), expected.scores)
    assert torch.equal(as_rows(winner), expected.winner)


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
    assert all(torch.equal(as_rows(t), e) for t, e in zip(made, expected, strict=True))
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


def loss_and_grads(backend, x, p, labels, metric="dot", **options):
    """Loss, prediction, own similarities and every gradient."""
    x = x.detach().requires_grad_()
    learnable = {
        name: options[name].detach().requires_grad_()
        for name in ("norm_weight", "norm_bias", "temperature")
        if isinstance(options.get(name), torch.Tensor)
    }
    pixels, plain = seen(x, metric) if backend == "reference" else (x, metric)
    out = ops.centroid_cross_entropy(pixels, p, labels, metric=plain, backend=backend, **{**options, **learnable})
    total = (out.loss * torch.linspace(0.5, 2, out.loss.numel(), device=DEVICE).view_as(out.loss)).sum() * 1.7
    return out.loss, out.prediction, out.own_similarity, *torch.autograd.grad(total, [x, *learnable.values()])


def check_loss(x, p, labels, metric="dot", image=None, **options):
    """The kernel, on `image` if given, against float64 on the same values as rows; returns what the kernel made."""
    if image is None:
        actual = loss_and_grads("cuda", x, p, labels, metric, **options)
    else:
        loss, prediction, own, dx, *others = loss_and_grads("cuda", image, p, labels.view_as(image[:, 0]), metric, **options)
        assert dx.stride() == image.stride()
        actual = loss, prediction.flatten(), as_rows(own), as_rows(dx), *others
    exact = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    inside = torch.where((labels >= 0) & (labels < p.shape[0]), labels, -100)  # the CPU reference raises; GPU kernels ignore
    expected = loss_and_grads("reference", *wide(x, p, metric), inside, metric, **exact)
    d = x.shape[1]
    assert (actual[1] != expected[1]).sum() <= 0.02 * len(labels)
    assert_close(actual[0].cpu(), expected[0].cpu(), "loss", terms=d, scale=scale_of(metric))
    assert_close(actual[2].cpu(), expected[2].cpu(), "similarity", terms=d, scale=4.0)
    for a, e in zip(actual[3:], expected[3:], strict=True):
        # dr is rounded to 16 bits before the second product: what is summed is as large as the largest gradient
        assert_close(a.cpu(), e.cpu(), "loss_gradient", terms=d, scale=max(scale_of(metric), float(e.nan_to_num().abs().max())))
    return actual


def options_of(c, norm, weighted, smoothing):
    made = {"temperature": torch.tensor(0.7, device=DEVICE), "label_smoothing": smoothing}
    if norm:
        made |= {"norm_weight": torch.rand(c, device=DEVICE) + 0.5, "norm_bias": torch.randn(c, device=DEVICE)}
    if weighted:
        made["weight"] = torch.rand(c, device=DEVICE) + 0.1
    return made


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


def test_pixels_that_are_not_finite():
    x, p, labels = problem(c=37)
    x[3, 7], x[4, 0], x[5, 39] = math.nan, math.inf, -math.inf
    labels[3], labels[4], labels[5] = 2, -100, 36
    scores = ops.class_scores(x, p, backend="cuda").scores
    assert scores[3:6].isnan().all() and scores[6:].isfinite().all() and scores[:3].isfinite().all()
    near = ops.nearest_centroid(x, p, backend="cuda")
    assert near.label[3:6].eq(-1).all() and near.sub[3:6].eq(-1).all() and near.score[3:6].isnan().all()
    assert near.label[6:].ge(0).all()
    for metric in METRICS:
        x.requires_grad_()
        out = ops.centroid_cross_entropy(x, p, labels, metric=metric, reduction="none", backend="cuda")
        assert out.loss[3].isnan() and out.loss[5].isnan() and out.loss[4] == 0
        assert out.prediction[3:6].eq(-1).all() and out.prediction[6:].ge(0).all()
        counted = (labels >= 0) & (labels < 37)
        made = torch.autograd.grad(out.loss[6:].sum() + out.loss[4], x)[0]
        assert made[4].eq(0).all() and made[6:][~counted[6:]].eq(0).all() and made[6:].isfinite().all()
        x = x.detach()


def test_an_ignored_pixel_that_is_not_finite_sends_nothing_to_the_parameters():
    x, p, labels = problem(n=18, c=7, k=2, d=24)
    options = {**options_of(7, True, False, 0.1), "reduction": "sum"}
    labels[4] = -100
    clean = loss_and_grads("cuda", x, p, labels, **options)
    x[4, 7] = math.nan
    dirty = loss_and_grads("cuda", x, p, labels, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean[4:], dirty[4:], strict=True)) and dirty[0].isfinite()


def test_cosine_of_a_zero_pixel_is_zero():
    x, p, labels = problem(n=18, c=7, k=2, d=24)
    x[3], labels[3] = 0, 2
    x.requires_grad_()
    assert ops.class_scores(x, p, metric="cosine", backend="cuda").scores[3].eq(0).all()
    loss = ops.centroid_cross_entropy(x, p, labels, metric="cosine", reduction="none", backend="cuda").loss
    assert loss.isfinite().all()
    made, alone = (torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (loss, loss[4:]))
    assert made.isfinite().all() and made[3].any() and torch.equal(made[4:], alone[4:])


def test_ties_go_to_the_lowest_index():
    # small integers: no order of summation rounds
    x = torch.randint(-3, 4, (20, 24), device=DEVICE).bfloat16()
    p = torch.randint(-3, 4, (1, 1, 24), device=DEVICE).bfloat16().expand(19, 3, 24)
    assert ops.class_scores(x, p, backend="cuda").winner.eq(0).all()
    near = ops.nearest_centroid(x, p, backend="cuda")
    assert near.label.eq(0).all() and near.sub.eq(0).all()
    labels = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    assert ops.centroid_cross_entropy(x, p, labels, backend="cuda").prediction.eq(0).all()


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


def test_nothing_to_count():
    x, p, labels = problem(c=21)
    x.requires_grad_()
    out = ops.centroid_cross_entropy(x, p, torch.full_like(labels, -100), backend="cuda")
    assert out.loss.isnan() and out.own_similarity.eq(0).all()
    assert torch.autograd.grad(out.loss, x)[0].eq(0).all()
    none = ops.centroid_cross_entropy(
        x[:0], p, labels[:0], reduction="sum", norm_weight=torch.ones(21, device=DEVICE), backend="cuda"
    )
    assert none.loss == 0 and none.prediction.shape == (0,)
    assert ops.class_scores(x[:0], p, labels[:0], backend="cuda").scores.shape == (0, 21)
    assert ops.nearest_centroid(x[:0], p, backend="cuda").label.shape == (0,)


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


def test_results_repeat_bit_for_bit():
    x, p, labels = problem(n=300, c=37)
    options = options_of(37, True, False, 0.0)
    first, *others = (loss_and_grads("cuda", x, p, labels, **options) for _ in range(50 if DEVICE == "cuda" else 2))
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_expanded_gradients():
    x, p, labels = problem()
    x.requires_grad_()
    loss = ops.centroid_cross_entropy(x, p, labels, reduction="none", backend="cuda").loss
    made = torch.autograd.grad(loss.sum(), x)[0]
    loss = ops.centroid_cross_entropy(x, p, labels, reduction="sum", backend="cuda").loss
    assert torch.equal(made, torch.autograd.grad(loss, x)[0])


def test_opcheck():
    from dnc_kernels.ops.similarity import op, op_loss

    x, p, labels = problem(n=8, c=3, k=2, d=16)
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(op.class_scores._opoverload, (x, p, labels, "dot", "cuda"), test_utils=utilities)
    torch.library.opcheck(op.nearest_centroid._opoverload, (x, p, "dot", "cuda"), test_utils=utilities)
    x.requires_grad_()
    options = ("dot", 1e-5, 1.0, -100, 0.1, "sum")
    arguments = (x, p, labels, torch.ones(3, device=DEVICE), None, None, None, *options, [True, False, False, False], "cuda")
    torch.library.opcheck(op_loss._loss_op._opoverload, arguments, test_utils=utilities)


def test_pixels_that_begin_between_units_are_copied():
    x, p, _ = problem(n=24, c=5, d=16)
    beside = torch.empty(x.numel() + 1, dtype=x.dtype, device=x.device)[1:].view_as(x).copy_(x)
    assert beside.data_ptr() % 16
    for made, expected in zip(
        ops.nearest_centroid(beside, p, backend="cuda"), ops.nearest_centroid(x, p, backend="cuda"), strict=True
    ):
        assert torch.equal(made, expected)


def test_traces_whole():
    x, p, labels = problem(n=24, c=5, d=16)

    def step(x, p, labels):
        return ops.centroid_cross_entropy(x, p, labels, backend="cuda").loss

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (24, 13):
        part = x[:n].clone().requires_grad_()
        made, expected = (torch.autograd.grad(f(part, p, labels[:n]), part)[0] for f in (compiled, step))
        torch.testing.assert_close(made, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_capture_in_a_cuda_graph_and_no_synchronisation():
    x, p, labels = problem(n=5000, c=150, k=10, d=256)
    weight = torch.ones(150, device=DEVICE)
    x = x.requires_grad_()

    def step():
        x.grad = None
        ops.centroid_cross_entropy(x, p, labels, norm_weight=weight, backend="cuda").loss.backward()

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    expected = x.grad.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    x.grad.zero_()
    graph.replay()
    assert torch.equal(x.grad, expected)


@pytest.mark.gpu
@pytest.mark.large
@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
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
