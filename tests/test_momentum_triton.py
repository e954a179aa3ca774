"""Triton's momentum kernels against the float64 reference: on a GPU, or under the interpreter with tiles of 64 pixels."""

import math

import pytest
import torch
import torch.nn.functional as F
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured, launch
from dnc_kernels.ops.momentum import reference, triton_sums

pytestmark = pytest.mark.triton
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
LAYOUTS = ("rows", "sliced rows", "every other channel", "planes", "channels_last", "crop", "one column", "columns")


def make(layout, pixels, channels, dtype=torch.float32):
    """Features of about `pixels` pixels in a memory layout."""

    def randn(*size):
        return torch.randn(size).to(dtype).to(DEVICE)

    if layout == "rows":
        return randn(pixels, channels)
    if layout == "sliced rows":
        return randn(2 * pixels, channels + 5)[::2, 2 : 2 + channels]
    if layout == "every other channel":
        return randn(pixels, 2 * channels)[:, ::2]
    if layout == "columns":
        return randn(channels, pixels).t()
    if layout == "one column":
        return randn(2, channels, pixels // 2, 3)[..., 1:2]
    height, width = 5, max(1, pixels // 10)
    if layout == "crop":
        return randn(2, channels, height + 3, width + 7)[:, :, 2:-1, 3:-4]
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    return randn(2, channels, height, width).contiguous(memory_format=memory)


def flat(x):
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def clusters_for(x, clusters):
    """Random clusters with runs, a few pixels left out; one cluster has a third of them."""
    pixels = len(flat(x))
    cluster = torch.randint(-1, clusters, (pixels,))
    cluster = torch.where(torch.rand(pixels) < 0.4, cluster.roll(1), cluster)
    cluster[torch.rand(pixels) < 0.33] = clusters // 2
    return cluster.to(DEVICE)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float().to(DEVICE)


def check(x, cluster, clusters):
    """Sums and counts against float64; returns them."""
    result = ops.cluster_sums(x, cluster, clusters, backend="triton")
    sums, counts = reference.cluster_sums(x.double(), cluster.flatten(), clusters)
    assert torch.equal(result.counts, counts)
    scale = float(flat(x).double().nan_to_num(0, 0, 0).abs().max()) if x.numel() else 1.0
    assert_close(result.sums, sums, "sum", terms=int(counts.max()), scale=scale)
    return result


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sums_equal_float64(layout, dtype):
    x = make(layout, 150, 19, dtype)
    check(x, clusters_for(x, 40), 40)


@pytest.mark.parametrize("channels", [1, 16, 33])
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_every_width_of_the_last_tile(layout, channels):
    x = make(layout, 70, channels)
    check(x, clusters_for(x, 5), 5)


def test_float32_keeps_every_bit():
    x = torch.tensor([[1.0, 2.0**-23, 1 + 2.0**-23, 3.4e38, -1.1754944e-38, 1 / 3]], device=DEVICE)
    assert torch.equal(ops.cluster_sums(x, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1, backend="triton").sums, x)


@pytest.mark.parametrize(("pixels", "clusters"), [(0, 3), (1, 1), (64, 1), (65, 16), (130, 17), (100, 280)])
def test_sizes_around_a_tile_and_a_bucket(pixels, clusters):
    x = make("rows", pixels, 4)
    check(x, torch.arange(pixels, device=DEVICE) % clusters, clusters)


def test_all_pixels_in_one_cluster_and_all_left_out():
    x = make("planes", 200, 9)
    check(x, torch.full((len(flat(x)),), 7, device=DEVICE), 12)
    check(x, torch.full((len(flat(x)),), -1, device=DEVICE), 12)


def test_clusters_out_of_range_are_left_out():
    x = make("rows", 60, 5)
    cluster = clusters_for(x, 9)
    cluster[3], cluster[4], cluster[5], cluster[6] = 9, -7, 2**40, -(2**40)
    check(x, cluster, 9)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("layout", "dtype"), [("rows", torch.float32), ("planes", torch.bfloat16), ("crop", torch.float16)])
def test_pixels_that_are_not_finite_are_left_out_of_sums_and_counts(layout, dtype, value):
    x = make(layout, 120, 18, dtype)
    cluster = clusters_for(x, 20)
    pixels = x.view(x.shape).permute(0, 2, 3, 1) if x.ndim == 4 else x
    for pixel, channel in ((5, 0), (31, 17), (77, 3)):
        at = (pixel,) if x.ndim == 2 else (pixel // 60, pixel % 60 // x.shape[3], pixel % x.shape[3])
        pixels[(*at, channel)] = value
    counts = check(x, cluster, 20).counts
    assert counts.sum() < ((cluster >= 0) & (cluster < 20)).sum()


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_finite_pixels_whose_sum_overflows_leave_their_sub_centroid_alone(layout):
    x = torch.full((8, 20) if layout == "rows" else (1, 20, 2, 4), 3e38, device=DEVICE)
    cluster = torch.tensor([0, 0, 1, 0, 0, -1, 0, 0], device=DEVICE)
    sums, counts = ops.cluster_sums(x, cluster, 3, backend="triton")
    assert not sums[0].isfinite().any() and torch.equal(sums[1], x.flatten()[:20]) and counts.tolist() == [6, 1, 0]
    centroids = unit(3, 1, 20)
    before = centroids.clone()
    ops.momentum_update_(centroids, x, cluster, backend="triton")
    assert torch.equal(centroids[[0, 2]], before[[0, 2]]) and not torch.equal(centroids[1], before[1])


@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_momentum_step_equals_float64(momentum):
    centroids, sums = unit(5, 3, 43), torch.randn(15, 43, device=DEVICE)
    counts = torch.randint(0, 3, (15,), device=DEVICE)
    before, expected = centroids.clone(), centroids.double()
    reference.apply_momentum_(expected, sums, counts, momentum)
    ops.apply_momentum_(centroids, sums, counts, momentum=momentum, backend="triton")
    assert_close(centroids, expected, "direction", terms=1, scale=0.1)
    empty = (counts == 0).view(5, 3)
    assert torch.equal(centroids[empty], before[empty])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_length_of_a_sum_cannot_overflow_or_vanish(scale):
    direction = torch.tensor([3.0, -4.0, 0.0, 12.0], device=DEVICE)
    centroids, count = torch.tensor([[1.0, 0.0, 0.0, 0.0]], device=DEVICE), torch.tensor([1], device=DEVICE)
    ops.apply_momentum_(centroids, (direction * scale)[None], count, momentum=0.0, backend="triton")
    assert torch.allclose(centroids[0], direction / 13, rtol=0, atol=1e-3 if scale == 1e-42 else 1e-6)


@pytest.mark.parametrize("row", [0.0, math.nan, math.inf])
def test_a_sum_without_a_direction_keeps_the_sub_centroid(row):
    centroids, sums, counts = unit(2, 9), torch.randn(2, 9, device=DEVICE), torch.tensor([4, 4], device=DEVICE)
    before = centroids.clone()
    sums[0] = row
    ops.apply_momentum_(centroids, sums, counts, momentum=0.5, backend="triton")
    assert torch.equal(centroids[0], before[0]) and not torch.equal(centroids[1], before[1])


def test_a_result_without_a_direction_keeps_the_sub_centroid():
    centroids = torch.tensor([[0.0, 1.0], [math.nan, 1.0]], device=DEVICE)
    sums, counts = torch.tensor([[0.0, -4.0], [1.0, 1.0]], device=DEVICE), torch.tensor([1, 1], device=DEVICE)
    before = centroids.clone()
    ops.apply_momentum_(centroids, sums, counts, momentum=0.5, backend="triton")
    assert torch.equal(centroids.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_update_equals_float64_and_is_its_two_steps(layout):
    x = make(layout, 150, 24, torch.bfloat16)
    cluster = clusters_for(x, 12)
    cluster[cluster == 5] = -1
    flat(x)[7] = math.nan  # a copy for planes: there nothing changes
    one = unit(4, 3, 24)
    before, two, expected = one.clone(), one.clone(), one.double()
    ops.momentum_update_(one, x, cluster, momentum=0.9, backend="triton")
    reference.apply_momentum_(expected, *reference.cluster_sums(x.double(), cluster, 12), 0.9)
    assert_close(one, expected, "direction", terms=10, scale=0.2)
    assert torch.equal(one[1, 2], before[1, 2])  # cluster 5 is absent
    ops.apply_momentum_(two, *ops.cluster_sums(x, cluster, 12, backend="triton"), momentum=0.9, backend="triton")
    assert torch.equal(one, two)


def test_reruns_are_bit_equal():
    x = make("planes", 100000 if DEVICE == "cuda" else 100, 40)
    cluster = clusters_for(x, 50)
    runs = [ops.cluster_sums(x, cluster, 50, backend="triton").sums for _ in range(50 if DEVICE == "cuda" else 2)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_a_large_cluster_is_many_units():
    x = make("rows", 600, 3)  # more units than the last launch adds at a time
    cluster = torch.full((600,), 3, device=DEVICE)
    cluster[:20] = 18
    with configured("momentum_rows", BLOCK_T=32, BLOCK_B=1, UNIT=16, BLOCK_P=16, BLOCK_D=16, num_warps=1, num_stages=1):
        check(x, cluster, 20)


def test_a_bucket_of_many_tiles_and_units():
    """Places and units of each bucket, whatever the order in which buckets got their room."""
    tiles, buckets, unit = 37, 3, 2

    def integers(*size):
        return torch.zeros(size, dtype=torch.int32, device=DEVICE)

    counts = torch.randint(0, 5, (tiles, buckets), dtype=torch.int32, device=DEVICE)
    places, bucket, cursor = counts.clone(), integers(3, buckets), integers(2)
    of_unit, begin = (integers(buckets + int(counts.sum()) // unit) - 1 for _ in range(2))
    launch(
        triton_sums.momentum_columns_kernel, (buckets,), places, bucket, cursor, of_unit, begin, tiles, buckets,
        UNIT=unit, BLOCK_T=16, BLOCK_U=16, num_warps=1,
    )  # fmt: skip
    sizes = counts.sum(0)
    units = (sizes + unit - 1) // unit
    assert torch.equal(places, counts.cumsum(0) - counts) and torch.equal(bucket[1].long(), sizes)
    assert cursor.tolist() == [int(sizes.sum()), int(units.sum())]
    for first, size in ((bucket[0], sizes), (bucket[2], units)):  # rooms follow each other without a gap
        order = first.argsort()
        assert torch.equal(first[order].long(), size[order].cumsum(0) - size[order])
    for b, (first, count) in enumerate(zip(bucket[2].tolist(), units.tolist(), strict=True)):
        assert of_unit[first : first + count].eq(b).all()
        assert begin[first : first + count].tolist() == list(range(0, unit * count, unit))
