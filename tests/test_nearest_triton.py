"""Triton kernels of nearest_centroid and centroid_distance against float64: shapes, dtypes, layouts, ties, bad pixels."""

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close, bound

triton_nearest = pytest.importorskip("dnc_kernels.ops.similarity.triton_nearest")
from dnc_kernels._tensors import flat_pixels  # noqa: E402
from dnc_kernels.ops import _triton  # noqa: E402
from dnc_kernels.ops.similarity import reference, triton_pack  # noqa: E402
from dnc_kernels.ops.similarity.calls import DistanceCall, NearestCall, NearestOut  # noqa: E402

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METRICS = ("dot", "cosine", "sqeuclidean")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = [(1, 1, 1, 1), (13, 1, 4, 7), (33, 5, 3, 33), (50, 19, 10, 20), (40, 7, 5, 70)]  # N, C, K, D


def problem(n, c, k, d, dtype):
    return torch.randn(n, d, device=DEVICE).to(dtype), torch.randn(c, k, d, device=DEVICE)


def similarity(x, centroids, metric):
    """[N,C,K] in float64 as the kernels define it: with the rows they multiply by, in the dtype of x."""
    rows, _ = triton_pack.pack_rows(centroids, metric, x.dtype, 16, 16)
    rows = rows[: centroids[:, :, 0].numel(), : x.shape[1]].double().view(centroids.shape)
    pixels = flat_pixels(x).double()
    if metric != "cosine":
        return reference.similarity(pixels, rows, metric)
    # a rounded row is not quite of unit length
    return torch.einsum("nd,ckd->nck", F.normalize(pixels, dim=1), rows)


def scale(x, centroids, metric):
    """Size of what is summed for one similarity (the row "similarity" of tolerances.py)."""
    longest_x, longest_p = (float(t.double().norm(dim=-1).max()) for t in (flat_pixels(x), centroids))
    return {"dot": longest_x * longest_p, "cosine": 1.0, "sqeuclidean": longest_x**2 + longest_p**2}[metric]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows(metric, dtype):
    centroids = torch.randn(21, 4, 3, device=DEVICE).permute(1, 2, 0)
    rows, bias = triton_pack.pack_rows(centroids, metric, dtype, 32, 16)
    exact = centroids.double().flatten(0, 1)
    exact = F.normalize(exact, dim=1) if metric == "cosine" else exact
    assert rows.shape == (32, 32) and rows.dtype == dtype
    assert_close(rows[:12, :21], exact, "direction", terms=21, scale=0)
    assert not rows[:, 21:].any() and torch.equal(rows[12:], rows[11:12].expand(20, -1))
    if metric == "sqeuclidean":
        assert_close(-bias, rows.double().square().sum(1), "sum", terms=21, scale=0)


def test_slots():
    """Every sub-centroid has one slot: [class tile][k tile][copy][class]."""
    centroids = torch.arange(1.0, 6 * 5 + 1, device=DEVICE).view(6, 5, 1)
    slots = triton_pack.Slots(4, 2, 3, 2)
    rows = triton_pack.pack_rows(centroids, "dot", torch.float32, 8, 16, slots)[0][:, 0].view(2, 3, 2, 4)
    for c in range(8):
        for k in range(6):
            expected = centroids[c, k, 0] if c < 6 and k < 5 else 0
            assert rows[c // 4, k // 2, k % 2, c % 4] == expected
    assert triton_pack.slots_of(150, 10, 64) == triton_pack.Slots(32, 2, 5, 5)
    assert triton_pack.slots_of(1000, 1, 64) == triton_pack.Slots(64, 1, 1, 16)


def nearest(x, centroids, metric):
    n = x.numel() // x.shape[1]
    label, sub = (torch.full((n,), 77, device=DEVICE) for _ in range(2))
    score = torch.full((n,), 77.0, device=DEVICE)
    triton_nearest.nearest_centroid(NearestCall(x, centroids, metric, "triton"), NearestOut(label, sub, score))
    return label, sub, score


def check_nearest(x, centroids, metric):
    s = similarity(x, centroids, metric).flatten(1)
    label, sub, score = nearest(x, centroids, metric)
    best, m = s.max(1)
    allowed = bound("similarity", score, best, terms=x.shape[1], scale=scale(x, centroids, metric))
    assert ((score.double() - best).abs() <= allowed).all()
    k = centroids.shape[1]
    assert ((label >= 0) & (label < centroids.shape[0]) & (sub >= 0) & (sub < k)).all()
    found = label * k + sub
    # another winner only where rounding may have chosen it
    behind = best - s.gather(1, found[:, None])[:, 0]
    assert (behind <= 2 * allowed).all(), f"pixel {int(behind.argmax())} is {float(behind.max())} behind"
    assert torch.equal(found[behind == 0], m[behind == 0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nearest(shape, metric, dtype):
    check_nearest(*problem(*shape, dtype), metric)


@pytest.mark.parametrize("copies", (1, 2, 4))
@pytest.mark.parametrize("metric", METRICS)
def test_knock_out_between_strips(copies, metric):
    use = {"BLOCK_N": 16, "BLOCK_M": 64, "BLOCK_D": 16, "KEEP_D": 16, "COPIES": copies, "num_warps": 4, "num_stages": 2}
    with _triton.configured("nearest_centroid", **use):
        check_nearest(*problem(21, 50, 3, 18, torch.bfloat16), metric)


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_parts_of_the_sweep(metric, dtype, monkeypatch):
    monkeypatch.setattr(_triton, "processors", lambda _: 20)
    x, centroids = problem(70, 19, 10, 20, dtype)
    check_nearest(x, centroids, metric)
    check_nearest(x[:3], centroids, metric)
    centroids = torch.randint(-4, 5, (3, 8), device=DEVICE).float().repeat(70, 1).view(35, 6, 8)
    label, sub, _ = nearest(torch.randint(-4, 5, (40, 8), device=DEVICE).to(dtype), centroids, metric)
    assert metric == "cosine" or (not label.any() and (sub < 3).all())


@pytest.mark.parametrize("layout", ("nchw", "channels_last", "crop", "transposed"))
@pytest.mark.parametrize("metric", METRICS)
def test_maps_are_read_in_place(layout, metric):
    maps = torch.randn(2, 5, 9, 24, device=DEVICE).permute(0, 3, 1, 2)
    x = {
        "nchw": maps.contiguous(),
        "channels_last": maps,
        "crop": F.pad(maps, (1, 2, 1, 1))[:, :, 1:-1, 1:-2],
        "transposed": maps.contiguous().transpose(2, 3).contiguous().transpose(2, 3),
    }[layout]
    centroids = torch.randn(24, 5, 3, device=DEVICE).permute(1, 2, 0)
    check_nearest(x, centroids, metric)
    check_distance(x, centroids, "cosine" if metric == "dot" else metric)


@pytest.mark.parametrize("copies", (1, 4))
def test_ties_go_to_the_lowest_index(copies):
    # small integers: their products have no rounding, which a column's place in a tile could change
    x = torch.randint(-4, 5, (40, 16), device=DEVICE).bfloat16()
    one = torch.randint(-4, 5, (3, 16), device=DEVICE).float()
    use = {"BLOCK_N": 16, "BLOCK_M": 32, "BLOCK_D": 16, "KEEP_D": 16, "COPIES": copies, "num_warps": 4, "num_stages": 2}
    with _triton.configured("nearest_centroid", **use):
        label, sub, _ = nearest(x, one.repeat(70, 1).view(35, 6, 16), "sqeuclidean")
        assert not label.any() and ((sub >= 0) & (sub < 3)).all()
        label, sub, score = nearest(torch.zeros_like(x), one.view(3, 1, 16), "cosine")
        assert not label.any() and not sub.any() and not score.any()


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("value", (float("nan"), float("inf"), float("-inf")))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_a_bad_pixel_has_no_nearest(metric, value, dtype):
    x, centroids = problem(30, 6, 4, 8, dtype)
    x[7, 3] = value
    label, sub, score = nearest(x, centroids, metric)
    bad = torch.arange(30, device=DEVICE) == 7
    assert torch.equal(score.isnan(), bad) and torch.equal(label == -1, bad) and torch.equal(sub == -1, bad)


def check_distance(x, centroids, metric):
    s = similarity(x, centroids, metric)
    expected = 1 - s if metric == "cosine" else -s
    out = torch.full(expected.shape, 77.0, device=DEVICE)
    triton_nearest.centroid_distance(DistanceCall(x, centroids, metric, "triton"), out)
    allowed = bound("similarity", out, expected, terms=x.shape[1], scale=scale(x, centroids, metric))
    assert ((out.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("metric", METRICS[1:])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distance(shape, metric, dtype):
    check_distance(*problem(*shape, dtype), metric)


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_cosine_of_zero_vectors_is_zero(dtype):
    x, centroids = problem(20, 5, 3, 24, dtype)
    x[3], centroids[2, 1] = 0, 0
    check_nearest(x, centroids, "cosine")
    check_distance(x, centroids, "cosine")


def test_no_pixels():
    x, centroids = problem(0, 3, 2, 8, torch.float32)
    assert nearest(x, centroids, "dot")[0].shape == (0,)
    triton_nearest.centroid_distance(DistanceCall(x, centroids, "cosine", "triton"), x.new_empty(0, 3, 2))
