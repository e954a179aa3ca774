"""Class scores and the loss over them in Triton, against float64: on a GPU, or under the interpreter on tiny shapes.

What they and CUDA C++ owe alike is in test_similarity_gpu.py.
"""

import math

import pytest
import torch
from cuda_on_cpu import DEVICE
from similarity_check import METRICS, flat, loss_and_grads, options_of, problem, unit
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured
from dnc_kernels.ops.similarity import op
from dnc_kernels.ops.similarity.calls import ScoresBackwardCall, ScoresBackwardOut

pytestmark = pytest.mark.triton
pytest.importorskip("triton")

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("rows", "strided", "transposed", "nchw", "channels_last", "crop")


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
        for sent in ((None, winner, to_scores.to(grad.dtype), None), (labels, None, None, to_own.to(grad.dtype))):
            call = ScoresBackwardCall(grad, q, sent[0], "dot", *sent[1:], True, backend)
            op.class_scores_backward.into(call, ScoresBackwardOut(grad, None))
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


def test_sub_centroids_are_rounded_to_the_pixels_dtype_once():
    x, p, _ = problem(dtype=torch.bfloat16)
    p = unit(19, 3, 40)
    actual = ops.class_scores(x, p, backend="triton").scores
    expected = ops.class_scores(x.double(), p.bfloat16().double(), backend="reference").scores
    assert_close(actual.cpu(), expected.cpu(), "similarity", terms=40)


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


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("to_centroids", [False, True])
@pytest.mark.parametrize("norm", [False, True])
def test_loss(norm, to_centroids, reduction):
    """More classes than one tile (the slab) and fewer (registers)."""
    for c in (37, 11):
        x, p, labels = problem(c=c)
        check_loss(x, p, labels, to_centroids, reduction=reduction, **options_of(c, norm, not norm, 0.1 if norm else 0.0))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_the_gradient_of_the_temperature_alone(reduction):
    """Nothing else needs one: it was left unmade."""
    for c in (37, 11):
        x, p, labels = problem(c=c)
        made = []
        for backend, dtype in (("triton", torch.float32), ("reference", torch.float64)):
            temperature = torch.tensor(0.7, device=DEVICE, dtype=dtype, requires_grad=True)
            y = torch.where(labels < c, labels, -100)
            options = {"temperature": temperature, "reduction": reduction, "backend": backend}
            loss = ops.centroid_cross_entropy(x.to(dtype), p.to(dtype), y, **options).loss
            made.append(torch.autograd.grad(loss.sum(), temperature)[0].cpu())
        assert_close(*made, "loss_gradient", terms=40)


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


def test_expanded_gradients_of_scores():
    x, p, _ = problem()
    x.requires_grad_()
    ops.class_scores(x, p, backend="triton").scores.sum().backward()
    wide = x.detach().double().requires_grad_()
    ops.class_scores(wide, p.double(), backend="reference").scores.sum().backward()
    assert_close(x.grad.cpu(), wide.grad.cpu(), "similarity", terms=19, scale=10.0)
