"""Triton kernels of subcentroid_cross_entropy against float64: both plans, target or scores, layouts, left out and bad pixels."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

triton_contrast = pytest.importorskip("dnc_kernels.ops.similarity.triton_contrast")
from dnc_kernels._tensors import flat_pixels  # noqa: E402
from dnc_kernels.ops.similarity import triton_contrast_bands  # noqa: E402
from dnc_kernels.ops.similarity.calls import ContrastCall, ContrastOut, SweepCall, SweepOut  # noqa: E402

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1), (13, 1, 4, 7), (35, 3, 1, 16), (40, 5, 3, 33), (50, 19, 10, 20), (21, 40, 3, 40), (20, 6, 17, 70)]
LAYOUTS = ("rows", "nchw", "channels_last", "crop", "transposed")
# 16 bits and few channels take the fused plan, all else the bands
BOTH = pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=("bands", "fused"))


def problem(n, c, k, d, dtype=torch.float32, ignored=0.2):
    """Unit pixels, unit sub-centroids, targets with some -1."""
    x = F.normalize(torch.randn(n, d, device=DEVICE), dim=1).to(dtype)
    p = F.normalize(torch.randn(c, k, d, device=DEVICE), dim=2)
    target = torch.randint(0, c * k, (n,), device=DEVICE)
    return x, p, torch.where(torch.rand(n, device=DEVICE) < ignored, -1, target)


def as_layout(x, layout):
    """x [2*5*4, D] as a map [2,D,5,4] of some strides."""
    maps = x.view(2, 5, 4, -1).permute(0, 3, 1, 2) if layout != "rows" else x
    return {
        "rows": lambda: maps,
        "nchw": maps.contiguous,
        "channels_last": lambda: maps,
        "crop": lambda: F.pad(maps, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
        "transposed": lambda: maps.contiguous().transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]()


def junk_like(x):
    return torch.full_like(x, 77)


def run(x, p, target, temperature=0.2, ignore_index=-1, gradient=True):
    loss = torch.full(target.shape, 77.0, device=DEVICE)
    grad = junk_like(x) if gradient else None
    call = ContrastCall(x, p, target, temperature, ignore_index, "triton")
    triton_contrast.subcentroid_cross_entropy(call, ContrastOut(loss, grad))
    return loss, grad


def gradient_scale(x, size, temperature):
    """A similarity's error grows by 1/temperature twice; in 16 bits a softmax weight is rounded as the result is: once."""
    return max(size, x.element_size() == 2) / temperature / x.shape[1] ** 0.5


def check(x, p, target, temperature=0.2, gradient=True):
    loss, grad = run(x, p, target, temperature, gradient=gradient)
    pixels, rows = flat_pixels(x).double().requires_grad_(), p.to(x.dtype).double().flatten(0, 1)
    expected = F.cross_entropy(pixels @ rows.T / temperature, target, ignore_index=-1, reduction="none")
    terms = x.shape[1] + len(rows)
    size = max(1.0, float(pixels.detach().norm(dim=1).max())) / temperature
    assert_close(loss, expected.detach(), "loss", terms=terms, scale=size)
    assert not loss[target < 0].any()
    if grad is not None:
        (wanted,) = torch.autograd.grad(expected.sum(), pixels)
        assert_close(flat_pixels(grad), wanted, "contrast_gradient", terms=terms, scale=gradient_scale(x, size, temperature))
        assert not flat_pixels(grad)[target < 0].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_shapes(shape, dtype):
    check(*problem(*shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@BOTH
def test_maps_are_read_in_place(layout, dtype):
    x, p, target = problem(40, 5, 3, 24, dtype)
    check(as_layout(x, layout), p.permute(2, 0, 1).contiguous().permute(1, 2, 0), target)


@pytest.mark.parametrize("temperature", (0.01, 1.0, 50.0))
@BOTH
def test_temperatures(temperature, dtype):
    check(*problem(29, 7, 3, 24, dtype), temperature=temperature)


@BOTH
def test_the_loss_alone(dtype):
    check(*problem(29, 7, 3, 24, dtype), gradient=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_channels(dtype):
    check(*problem(20, 5, 3, 261, dtype))


def test_more_pixels_than_a_band(monkeypatch):
    monkeypatch.setattr(triton_contrast_bands, "_SCRATCH", 4096)
    check(*problem(70, 5, 3, 24))
    check_scores(*problem(70, 5, 3, 24))


@BOTH
def test_large_similarities_do_not_overflow(dtype):
    x, p, target = problem(20, 4, 3, 16, dtype)
    check(100 * x, p, target, temperature=0.05)


@BOTH
def test_the_target_may_be_far_below_the_best(dtype):
    p = torch.eye(4, device=DEVICE).view(2, 2, 4)
    loss, _ = run(torch.tensor([[200.0, 0, 0, 0]], device=DEVICE, dtype=dtype), p, torch.tensor([3], device=DEVICE), 1.0)
    assert loss == 200


@BOTH
def test_left_out_pixels_have_loss_and_gradient_zero(dtype):
    x, p, target = problem(40, 3, 2, 8, dtype, ignored=0)
    target[:20], target[20], target[21], target[22] = 4, -100, 6, 7
    x[:5] = float("nan")
    loss, grad = run(x, p, target, ignore_index=4)
    out = (target == 4) | (target < 0) | (target > 5)
    assert not loss[out].any() and not grad[out].any()
    assert loss[~out].all() and grad[~out].any(1).all() and grad.isfinite().all()


@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@BOTH
def test_a_bad_pixel_stays_alone(value, dtype):
    x, p, target = problem(30, 3, 2, 8, dtype, ignored=0)
    x[7, 3] = value
    bad = torch.arange(30, device=DEVICE) == 7
    loss, grad = run(x, p, target)
    assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan().any(1), bad)
    loss, grad, scores, _, _ = run_scores(x, p, target // 2)
    assert torch.equal(loss.isnan(), bad) and torch.equal(grad.isnan().any(1), bad)
    assert torch.equal(scores.isnan(), bad[:, None].expand(-1, 3))


def test_no_pixels():
    for dtype in (torch.float32, torch.bfloat16):
        loss, grad = run(*problem(0, 3, 2, 8, dtype))
        assert loss.shape == (0,) and grad.shape == (0, 8)


def run_scores(x, p, labels, temperature=0.2, scale=1.5, gradient=True):
    n, (c, k, _) = labels.numel(), p.shape
    loss, own = torch.full((n,), 77.0, device=DEVICE), torch.full((n, k), 77.0, device=DEVICE)
    shape = (n, c) if x.ndim == 2 else (x.shape[0], x.shape[2], x.shape[3], c)
    scores, winner = torch.full(shape, 77.0, device=DEVICE), torch.full(shape, 77, dtype=torch.uint8, device=DEVICE)
    if x.ndim == 4:
        scores = scores.permute(0, 3, 1, 2)
        winner = winner.permute(0, 3, 1, 2).contiguous()
    grad = junk_like(x) if gradient else None
    factor = torch.tensor(scale, device=DEVICE)
    call = SweepCall(x, p, labels, temperature, factor, "triton")
    triton_contrast.scores_and_contrast(call, SweepOut(scores, winner, own, loss, grad))
    return loss, grad, scores, winner, own


def check_scores(x, p, target, temperature=0.2, gradient=True):
    labels, scale = torch.where(target < 0, -1, target // p.shape[1]), 1.5
    loss, grad, scores, winner, own = run_scores(x, p, labels, temperature, scale, gradient)
    pixels, rows = flat_pixels(x).double().requires_grad_(), p.to(x.dtype).double()
    s = torch.einsum("nd,ckd->nck", pixels, rows)
    counted = labels >= 0
    expected = torch.where(counted, (s.flatten(1) / temperature).logsumexp(1), 0)
    terms = x.shape[1] + s[0].numel()
    assert_close(loss, expected.detach(), "loss", terms=terms, scale=1 / temperature)
    best = s.detach().amax(2)
    assert_close(flat_pixels(scores), best, "similarity", terms=x.shape[1])
    found = s.detach().gather(2, flat_pixels(winner).long()[:, :, None])[:, :, 0]
    assert_close(found.float(), best, "similarity", terms=x.shape[1])
    wanted_own = torch.where(counted[:, None], s.detach()[torch.arange(len(s)), labels.clamp(min=0)], 0)
    assert_close(own, wanted_own, "similarity", terms=x.shape[1])
    assert not loss[~counted].any() and not own[~counted].any()
    if grad is not None:
        (wanted,) = torch.autograd.grad(expected.sum() * scale, pixels)
        allowed = scale * gradient_scale(x, 1 / temperature, temperature)
        assert_close(flat_pixels(grad), wanted, "contrast_gradient", terms=terms, scale=allowed)
        assert not flat_pixels(grad)[~counted].any()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_beside_the_loss(shape, dtype):
    check_scores(*problem(*shape, dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
@BOTH
def test_scores_of_maps(layout, dtype):
    x, p, target = problem(40, 5, 3, 24, dtype)
    check_scores(as_layout(x, layout), p, target, gradient=layout != "crop")


@BOTH
def test_winner_is_the_lowest_of_equals(dtype):
    # small integers: their products have no rounding, which a column's place in a tile could change
    x, p = torch.randint(-4, 5, (20, 24), device=DEVICE).to(dtype), torch.randint(-4, 5, (9, 1, 24), device=DEVICE).float()
    for k in (5, 20):
        _, _, _, winner, _ = run_scores(x, p.expand(-1, k, -1), torch.zeros(20, dtype=torch.int64, device=DEVICE))
        assert not winner.any()


@BOTH
def test_labels_beyond_the_classes_count_for_nothing(dtype):
    x, p, _ = problem(20, 3, 2, 24, dtype)
    labels = torch.full((20,), 3, device=DEVICE)
    labels[4:8] = -100
    loss, grad, scores, _, own = run_scores(x, p, labels)
    assert not loss.any() and not grad.any() and not own.any() and scores.isfinite().all()
