"""Class scores and the loss over them in Triton, against float64: on a GPU, or under the interpreter on tiny shapes."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.similarity import op

pytestmark = pytest.mark.triton
pytest.importorskip("triton")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("dot", "cosine", "sqeuclidean")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "strided", "transposed", "nchw", "channels_last", "crop")


def unit(*shape, dtype=torch.float32):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1).to(dtype)


def problem(n=42, c=19, k=3, d=40, dtype=torch.float32):
    """Pixels, sub-centroids, labels: some ignored, one beyond the classes."""
    labels = torch.randint(0, c, (n,), device=DEVICE)
    labels[::5] = -100
    labels[1::17] = c + 3
    return unit(n, d, dtype=dtype), unit(c, k, d, dtype=dtype), labels


def layout(x, name):
    """x [N,D], N = 2*3*w, in another layout: the same pixels in the same order."""
    n, d = x.shape
    image = x.view(2, 3, n // 6, d).permute(0, 3, 1, 2)
    if name == "strided":
        wide = torch.full((2 * n, d + 3), math.nan, dtype=x.dtype, device=x.device)
        wide[::2, 1 : d + 1] = x
        return wide[::2, 1 : d + 1]
    if name == "crop":
        big = torch.full((2, d, 5, n // 6 + 4), math.nan, dtype=x.dtype, device=x.device)
        big[:, :, 1:4, 2:-2] = image
        return big[:, :, 1:4, 2:-2]
    return {
        "rows": lambda: x,
        "transposed": lambda: x.T.contiguous().T,
        "nchw": image.contiguous,
        "channels_last": lambda: image.contiguous(memory_format=torch.channels_last),
    }[name]()


def flat(t):
    return t if t.ndim == 2 else t.permute(0, 2, 3, 1).flatten(0, 2)


def grads(backend, x, p, labels, metric, to_scores, to_own):
    """Scores, winner, own similarities and both gradients."""
    x, p = x.detach().requires_grad_(), p.detach().requires_grad_()
    shaped = labels if x.ndim == 2 else labels.view(x.shape[0], *x.shape[2:])
    shaped = torch.where(shaped < len(p), shaped, -100) if backend == "reference" else shaped  # a GPU leaves these out
    out = ops.class_scores(x, p, shaped, metric=metric, backend=backend)
    own = flat(out.own_similarity)
    total = (flat(out.scores) * to_scores).sum() + (own * to_own).sum()
    return flat(out.scores), flat(out.winner), own, *torch.autograd.grad(total, (x, p))


def scale_of(metric, x, p):
    """What is summed for a similarity: |x||p| for dot, 1 for cosine, both squares for sqeuclidean."""
    return {"dot": 1.0, "cosine": 1.0, "sqeuclidean": 4.0}[metric]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_class_scores_and_gradients(name, metric):
    x, p, labels = problem()
    to_scores, to_own = torch.randn(42, 19, device=DEVICE), torch.randn(42, 3, device=DEVICE)
    actual = grads("triton", layout(x, name), p, labels, metric, to_scores, to_own)
    expected = grads("reference", layout(x, name).double(), p.double(), labels, metric, to_scores, to_own)
    assert torch.equal(actual[1], expected[1])
    for a, e in zip((actual[0], actual[2]), (expected[0], expected[2]), strict=True):
        assert a.dtype == torch.float32
        assert_close(a.cpu(), e.cpu(), "similarity", terms=40, scale=scale_of(metric, x, p))
    for a, e, terms in zip(actual[3:], expected[3:], (22, 42), strict=True):
        assert a.shape == e.shape
        assert_close(a.cpu(), e.cpu(), "similarity", terms=terms, scale=10.0)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("shape", [(42, 19, 3, 40), (33, 5, 1, 24), (20, 33, 10, 72), (17, 2, 64, 16), (1, 1, 1, 8)], ids=str)
def test_sixteen_bits_and_odd_shapes(shape, dtype):
    n, c, k, d = shape
    x, p, labels = problem(n, c, k, d, dtype)
    to_scores, to_own = torch.randn(n, c, device=DEVICE), torch.randn(n, k, device=DEVICE)
    actual = grads("triton", x, p, labels, "dot", to_scores, to_own)
    expected = grads("reference", x.double(), p.double(), labels, "dot", to_scores, to_own)
    for a, e in zip((actual[0], actual[2]), (expected[0], expected[2]), strict=True):
        assert_close(a.cpu(), e.cpu(), "similarity", terms=d)
    assert torch.equal(actual[1], expected[1])
    for a, e, terms in zip(actual[3:], expected[3:], (c + k, n), strict=True):
        assert a.dtype == dtype
        assert_close(a.cpu(), e.cpu(), "similarity", terms=terms, scale=10.0)


def test_one_k_at_a_time():
    """Where a tile holds one k of every class, as several of them meet in test_class_scores_and_gradients."""
    x, p, labels = problem()
    p[7] = p[7, :1]  # three equals: the first wins
    to_scores, to_own = torch.randn(42, 19, device=DEVICE), torch.randn(42, 3, device=DEVICE)
    use = {"BLOCK_N": 16, "BLOCK_C": 32, "BLOCK_K": 1, "BLOCK_D": 64, "num_warps": 4, "num_stages": 1}
    with configured("class_scores", **use), configured("scores_gradient", **use), configured("centroid_gradient", **use):
        actual = grads("triton", x, p, labels, "dot", to_scores, to_own)
    expected = grads("reference", x.double(), p.double(), labels, "dot", to_scores, to_own)
    assert torch.equal(actual[1], expected[1]) and actual[1][:, 7].eq(0).all()
    for a, e, terms, scale in zip(actual[::2], expected[::2], (40, 40, 42), (1.0, 1.0, 10.0), strict=True):
        assert_close(a.cpu(), e.cpu(), "similarity", terms=terms, scale=scale)
    assert_close(actual[3].cpu(), expected[3].cpu(), "similarity", terms=22, scale=10.0)


@pytest.mark.parametrize("name", ("rows", "crop"))
def test_gradients_are_added_to_what_is_there(name):
    x, p, labels = problem()
    to_scores, to_own = torch.randn(42, 19, device=DEVICE), torch.randn(42, 3, device=DEVICE)
    winner = torch.randint(0, 3, (42, 19), dtype=torch.uint8, device=DEVICE)
    if name == "crop":
        to_scores, winner = (t.view(2, 3, 7, 19).permute(0, 3, 1, 2) for t in (to_scores, winner))
    before = layout(x, name)
    actual, expected = before.clone(), before.double()
    labels[labels >= 19] = -100
    for grad, q, backend in ((actual, p, "triton"), (expected, p.double(), "reference")):
        op.add_scores_gradient_(grad, q, winner, to_scores.to(grad.dtype), backend)
        op.add_own_gradient_(grad, q, labels, to_own.to(grad.dtype), backend)
    assert_close(actual.cpu(), expected.cpu(), "similarity", terms=22, scale=10.0)


def test_cosine_of_pixels_of_any_length():
    x, p, labels = problem(n=18, c=7, k=2, d=24)
    x = x * torch.linspace(0.5, 4, 18, device=DEVICE)[:, None]
    to_scores, to_own = torch.randn(18, 7, device=DEVICE), torch.randn(18, 2, device=DEVICE)
    actual = grads("triton", x, p, labels, "cosine", to_scores, to_own)
    expected = grads("reference", x.double(), p.double(), labels, "cosine", to_scores, to_own)
    for a, e, terms, scale in zip(actual[::2], expected[::2], (24, 24, 18), (1.0, 1.0, 10.0), strict=True):
        assert_close(a.cpu(), e.cpu(), "similarity", terms=terms, scale=scale)
    assert_close(actual[3].cpu(), expected[3].cpu(), "similarity", terms=9, scale=20.0)
    check_loss(x, p, labels, True, metric="cosine", **options_of(7, True, False, 0.0))


def test_cosine_of_a_zero_pixel_is_zero():
    x, p, labels = problem(n=18, c=7, k=2, d=24)
    x[3], labels[3] = 0, 2
    x.requires_grad_()
    assert ops.class_scores(x, p, metric="cosine", backend="triton").scores[3].eq(0).all()
    loss = ops.centroid_cross_entropy(x, p, labels, metric="cosine", reduction="none", backend="triton").loss
    assert loss.isfinite().all()
    made, alone = (torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in (loss, loss[4:]))
    assert made.isfinite().all() and made[3].any() and torch.equal(made[4:], alone[4:])


def test_sub_centroids_are_rounded_to_the_pixels_dtype_once():
    x, p, _ = problem(dtype=torch.bfloat16)
    p = unit(19, 3, 40)
    actual = ops.class_scores(x, p, backend="triton").scores
    expected = ops.class_scores(x.double(), p.bfloat16().double(), backend="reference").scores
    assert_close(actual.cpu(), expected.cpu(), "similarity", terms=40)


def loss_and_grads(backend, x, p, labels, to_centroids, **options):
    """Loss, prediction, own similarities and every gradient."""
    x, p = x.detach().requires_grad_(), p.detach().requires_grad_(to_centroids)
    learnable = {
        name: options[name].detach().requires_grad_()
        for name in ("norm_weight", "norm_bias", "temperature")
        if isinstance(options.get(name), torch.Tensor)
    }
    shaped = labels if x.ndim == 2 else labels.view(x.shape[0], *x.shape[2:])
    out = ops.centroid_cross_entropy(x, p, shaped, backend=backend, **{**options, **learnable})
    total = (out.loss * torch.linspace(0.5, 2, out.loss.numel(), device=DEVICE).view_as(out.loss)).sum() * 1.7
    leaves = [x, *learnable.values(), *([p] if to_centroids else [])]
    return out.loss, out.prediction, out.own_similarity, *torch.autograd.grad(total, leaves)


def check_loss(x, p, labels, to_centroids=False, **options):
    """The kernel against float64 on the same values; returns what the kernel made."""
    actual = loss_and_grads("triton", x, p, labels, to_centroids, **options)
    wide = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    c = p.shape[0]
    inside = torch.where((labels >= 0) & (labels < c), labels, -100)  # the CPU reference raises; kernels on a GPU ignore
    expected = loss_and_grads("reference", x.double(), p.double(), inside, to_centroids, **wide)
    d = x.shape[1]
    # scores of pixels that are not counted still predict
    assert (actual[1] != expected[1]).sum() <= 0.02 * len(labels)
    assert_close(actual[0].cpu(), expected[0].cpu(), "loss", terms=d)
    assert_close(actual[2].cpu(), expected[2].cpu(), "similarity", terms=d, scale=4.0)
    for a, e in zip(actual[3:], expected[3:], strict=True):
        assert_close(a.cpu(), e.cpu(), "loss_gradient", terms=d)
    return actual


def options_of(c, norm, weighted, smoothing):
    made = {"temperature": torch.tensor(0.7, device=DEVICE), "label_smoothing": smoothing}
    if norm:
        made |= {"norm_weight": torch.rand(c, device=DEVICE) + 0.5, "norm_bias": torch.randn(c, device=DEVICE)}
    if weighted:
        made["weight"] = torch.rand(c, device=DEVICE) + 0.1
    return made


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("to_centroids", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_loss(norm, to_centroids, reduction):
    """More classes than one tile (the slab) and fewer (registers)."""
    for c in (37, 11):
        x, p, labels = problem(c=c)
        check_loss(x, p, labels, to_centroids, reduction=reduction, **options_of(c, norm, not norm, 0.1 if norm else 0.0))


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("name", LAYOUTS)
def test_loss_of_every_metric_and_layout(name, metric):
    x, p, labels = problem(c=21)
    check_loss(layout(x, name), p, labels, name == "nchw", metric=metric, **options_of(21, True, True, 0.1))


@pytest.mark.parametrize("metric", METRICS)
def test_loss_of_few_channels(metric):
    """The tile of x is loaded once and kept."""
    x, p, labels = problem(c=11, d=24)
    check_loss(x, p, labels, metric=metric, **{**options_of(11, False, True, 0.1), "temperature": 0.3})


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("norm", [False, True])
def test_loss_in_sixteen_bits(norm, dtype):
    x, p, labels = problem(n=70, c=33, k=10, d=72, dtype=dtype)
    check_loss(x, p, labels, **options_of(33, norm, False, 0.0))


def test_gradient_of_the_centroids_in_bands(monkeypatch):
    triton = pytest.importorskip("dnc_kernels.ops.similarity.triton")
    monkeypatch.setattr(triton, "GRADIENT_BAND", 32)
    x, p, labels = problem(n=70, c=21)
    for metric in METRICS:
        check_loss(x, p, labels, True, metric=metric, reduction="none", **options_of(21, True, False, 0.0))


def test_many_classes_keep_their_scores_in_bfloat16(monkeypatch):
    triton = pytest.importorskip("dnc_kernels.ops.similarity.triton")
    monkeypatch.setattr(triton, "SPILL_CLASSES", 20)
    x, p, labels = problem(n=40, c=37, dtype=torch.bfloat16)
    spilled, expected = (
        loss_and_grads(b, x.to(t), p.to(t), torch.where(labels < 37, labels, -100), False)
        for b, t in (("triton", torch.bfloat16), ("reference", torch.float64))
    )
    # scores of unit vectors rounded to 8 bits
    assert (spilled[0] - expected[0]).abs() < 2**-8
    assert (spilled[3] - expected[3]).abs().max() < 2**-7 * expected[3].abs().max()
    assert_close(spilled[2].cpu(), expected[2].cpu(), "similarity", terms=40)
    x, p = x.float(), p.float()
    check_loss(x, p, labels)  # float32 stays exact


def test_a_scaled_loss_in_float16_does_not_overflow():
    x, p, labels = problem(dtype=torch.float16, c=21)
    x, p = x.requires_grad_(), p.requires_grad_()
    loss = ops.centroid_cross_entropy(x, p, labels, reduction="none", backend="triton").loss
    made = torch.autograd.grad((loss * 30000).sum(), p)[0]
    assert made.isfinite().float().mean() > 0.9  # the sum itself may exceed float16, the products may not


def test_pixels_that_are_not_finite():
    x, p, labels = problem(c=37)
    x[3, 7], x[4, 0], x[5, 39] = math.nan, math.inf, -math.inf
    labels[3], labels[4], labels[5] = 2, -100, 36
    x.requires_grad_()
    scores = ops.class_scores(x, p, backend="triton").scores
    assert scores[3:6].isnan().all() and scores[6:].isfinite().all()
    out = ops.centroid_cross_entropy(x, p, labels, reduction="none", backend="triton")
    assert out.loss[3].isnan() and out.loss[5].isnan() and out.loss[4] == 0
    assert out.prediction[3:6].eq(-1).all() and out.prediction[6:].ge(0).all()
    counted = (labels >= 0) & (labels < 37)
    made = torch.autograd.grad(out.loss[6:].sum() + out.loss[4], x)[0]
    assert made[4].eq(0).all() and made[6:][~counted[6:]].eq(0).all() and made[6:].isfinite().all()
    q = p.clone().requires_grad_()
    loss = ops.centroid_cross_entropy(x.detach()[[0, 4, 6, 7]], q, labels[[0, 4, 6, 7]], reduction="sum", backend="triton").loss
    assert torch.autograd.grad(loss, q)[0].isfinite().all()


def test_an_ignored_pixel_that_is_not_finite_sends_nothing_to_the_parameters():
    x, p, labels = problem(n=18, c=7, k=2, d=24)
    options = {**options_of(7, True, False, 0.1), "reduction": "sum"}
    labels[4] = -100
    clean = loss_and_grads("triton", x, p, labels, True, **options)
    x[4, 7] = math.nan
    dirty = loss_and_grads("triton", x, p, labels, True, **options)
    assert all(torch.equal(a, b) for a, b in zip(clean[4:], dirty[4:], strict=True)) and dirty[0].isfinite()


def test_ties_go_to_the_lowest_index():
    # small integers: no order of summation rounds
    x = torch.randint(-3, 4, (20, 24), device=DEVICE).float()
    p = torch.randint(-3, 4, (1, 1, 24), device=DEVICE).float().expand(19, 3, 24)
    out = ops.class_scores(x, p, backend="triton")
    assert out.winner.eq(0).all()
    labels = torch.zeros(20, dtype=torch.int64, device=DEVICE)
    assert ops.centroid_cross_entropy(x, p, labels, backend="triton").prediction.eq(0).all()


def test_nothing_to_count():
    x, p, labels = problem(c=21)
    x.requires_grad_()
    out = ops.centroid_cross_entropy(x, p, torch.full_like(labels, -100), backend="triton")
    assert out.loss.isnan() and out.own_similarity.eq(0).all()
    assert torch.autograd.grad(out.loss, x)[0].eq(0).all()
    none = ops.centroid_cross_entropy(x[:0], p.requires_grad_(), labels[:0], reduction="sum", backend="triton")
    assert none.loss == 0 and none.prediction.shape == (0,)
    assert torch.autograd.grad(none.loss, p)[0].eq(0).all()
    assert ops.class_scores(x[:0], p, labels[:0], backend="triton").scores.shape == (0, 21)


@pytest.mark.parametrize("to_centroids", [False, True])
def test_results_repeat_bit_for_bit(to_centroids):
    x, p, labels = problem(n=90, c=37)
    runs = 50 if DEVICE == "cuda" else 2
    first, *others = (
        loss_and_grads("triton", x, p, labels, to_centroids, **options_of(37, False, False, 0.0)) for _ in range(runs)
    )
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


def test_expanded_gradients():
    x, p, _ = problem()
    x.requires_grad_()
    ops.class_scores(x, p, backend="triton").scores.sum().backward()
    wide = x.detach().double().requires_grad_()
    ops.class_scores(wide, p.double(), backend="reference").scores.sum().backward()
    assert_close(x.grad.cpu(), wide.grad.cpu(), "similarity", terms=19, scale=10.0)


def test_traces_whole():
    x, p, labels = problem(n=24, c=5, d=16)

    def step(x, p, labels):
        out = ops.centroid_cross_entropy(x, p, labels, backend="triton")
        return out.loss + ops.class_scores(x, p, backend="triton").scores.sum()

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (24, 13):
        part = x[:n].clone().requires_grad_()
        made, expected = (torch.autograd.grad(f(part, p, labels[:n]), part)[0] for f in (compiled, step))
        torch.testing.assert_close(made, expected)


def test_opcheck():
    from dnc_kernels.ops.similarity import op, op_loss

    x, p, labels = problem(n=8, c=3, k=2, d=16)
    x.requires_grad_()
    torch.library.opcheck(op.class_scores._opoverload, (x, p, labels, "dot", "triton"))
    options = ("dot", 1e-5, 1.0, -100, 0.1, "sum")
    utilities = ("test_schema", "test_autograd_registration", "test_faketensor")
    arguments = (x, p, labels, torch.ones(3, device=DEVICE), None, None, None, *options, [True, False, False, False], "triton")
    torch.library.opcheck(op_loss._loss_op._opoverload, arguments, test_utils=utilities)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA device")
def test_capture_in_a_cuda_graph_and_no_synchronisation():
    x, p, labels = problem(n=5000, c=150, k=10, d=256, dtype=torch.bfloat16)
    weight = torch.ones(150, device=DEVICE)
    x = x.requires_grad_()

    def step():
        x.grad = None
        ops.centroid_cross_entropy(x, p, labels, norm_weight=weight, backend="triton").loss.backward()

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
