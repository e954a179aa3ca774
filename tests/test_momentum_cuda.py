"""The CUDA momentum kernels against float64. Apart from test_momentum.py, so that it runs where hypothesis is not installed."""

import math

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.momentum import op as torch_ops
from dnc_kernels.ops.momentum import reference

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# deterministic, or in any order
VARIANTS = pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])
needs_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def randn(*shape, dtype=torch.float32):
    return torch.randn(shape).to(dtype).to(DEVICE)


def unit(*shape):
    return F.normalize(torch.randn(*shape, dtype=torch.float64), dim=-1).float().to(DEVICE)


# features of n pixels (two maps of n / 2) and d channels
LAYOUTS = {
    "rows": lambda n, d, t: randn(n, d, dtype=t),
    "sliced rows": lambda n, d, t: randn(2 * n, d + 24, dtype=t)[::2, 8 : 8 + d],
    "unaligned rows": lambda n, d, t: randn(n, d + 3, dtype=t)[:, 1 : 1 + d],
    "every other channel": lambda n, d, t: randn(n, 2 * d, dtype=t)[:, ::2],
    "columns": lambda n, d, t: randn(d, n, dtype=t).t(),
    "planes": lambda n, d, t: randn(2, d, n // 10, 5, dtype=t),
    "channels_last": lambda n, d, t: randn(2, d, n // 10, 5, dtype=t).contiguous(memory_format=torch.channels_last),
    "crop": lambda n, d, t: randn(2, d, n // 10 + 3, 11, dtype=t)[:, :, 2:-1, 3:8],
    "unaligned lines": lambda n, d, t: torch.as_strided(
        randn(n * (d + 1) + n * d, dtype=t), (2, d, n // 10, 5), (n // 10 * (5 * d + 1), 1, 5 * d + 1, d)
    ),
    "expanded": lambda n, d, t: randn(1, d, dtype=t).expand(n, d),
}


def flat(x):
    return x if x.ndim == 2 else x.permute(0, 2, 3, 1).reshape(-1, x.shape[1])


def clusters_for(pixels, clusters):
    """Random with runs, a few left out; one cluster has a third of the pixels, another none."""
    cluster = torch.randint(-1, clusters, (pixels,))
    cluster = torch.where(torch.rand(pixels) < 0.4, cluster.roll(1), cluster)
    cluster[torch.rand(pixels) < 0.33] = clusters // 2
    cluster[cluster == clusters - 1] = -1
    return cluster.to(DEVICE)


def update(centroids, x, cluster, ordered, momentum=0.9):
    result = centroids.clone()
    ops.momentum_update_(result, x, cluster, momentum=momentum, deterministic=ordered, backend="cuda")
    return result


def check(x, cluster, clusters, variants=(True, False)):
    """Sums, counts and both updates against float64; what has no pixel keeps every bit, reruns do too."""
    pixels = flat(x).double().cpu()
    sums, counts = reference.cluster_sums(pixels, cluster.flatten().cpu(), clusters)
    result = ops.cluster_sums(x, cluster, clusters, backend="cuda")
    assert torch.equal(result.counts.cpu(), counts)
    size = pixels.nan_to_num(0, 0, 0).abs()
    assert_close(result.sums.cpu(), sums, "sum", terms=int(counts.max()), scale=float(size.max()) if x.numel() else 1.0)
    before = unit(clusters, 1, x.shape[1])
    expected = before.double().cpu()
    reference.apply_momentum_(expected, sums, counts, 0.9)
    for ordered in variants:
        after = update(before, x, cluster, ordered)
        # an error of a sum is one of its direction by the share of its length
        assert_close(after.cpu(), expected, "direction", terms=max(int(counts.max()), 1), scale=0.2)
        assert torch.equal(after[counts == 0], before[counts == 0])
        if ordered:
            assert torch.equal(update(before, x, cluster, ordered), after)
    return result


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_and_dtypes(layout, dtype):
    x = LAYOUTS[layout](300, 24, dtype)
    check(x, clusters_for(300, 24), 24)


@pytest.mark.parametrize(("layout", "channels"), [("rows", 1), ("rows", 7), ("rows", 264), ("planes", 1), ("planes", 67)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_width_of_the_last_slice(layout, channels, dtype):
    check(LAYOUTS[layout](150, channels, dtype), clusters_for(150, 9), 9)


@pytest.mark.sanitize
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_many_tiles_in_any_order_of_threads(layout, order):
    """More tiles than blocks, buckets and runs across tiles, pieces of one run."""
    x = LAYOUTS[layout](2500, 8, torch.float32)
    cluster = clusters_for(2500, 70)
    cluster[700:1500] = 33  # longer than a piece: several threads add to it
    check(x, cluster, 70)


def test_more_tiles_than_lanes():
    check(LAYOUTS["planes"](9000, 2, torch.float32), clusters_for(9000, 40), 40, variants=())


@pytest.mark.parametrize("pixels", [0, 1, 2, 64, 65, 129, 512, 513, 1025])
def test_sizes_around_a_tile(pixels):
    check(randn(pixels, 8), torch.arange(pixels, device=DEVICE) % 20, 20)


@pytest.mark.parametrize("clusters", [1, 16, 17, 1_500])
def test_any_number_of_clusters(clusters):
    cluster = torch.randint(0, clusters, (400,)).to(DEVICE)
    cluster[:3] = clusters - 1
    check(randn(400, 8), cluster, clusters)


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_all_in_one_cluster_all_left_out_and_some_outside(layout):
    x = LAYOUTS[layout](300, 8, torch.bfloat16)
    check(x, torch.full((300,), 4, device=DEVICE), 6)
    check(x, torch.full((300,), -1, device=DEVICE), 6)
    cluster = clusters_for(300, 6)
    cluster[:4] = torch.tensor([6, -7, 2**40, -(2**40)], device=DEVICE)
    check(x, cluster, 6)


@pytest.mark.sanitize
@pytest.mark.parametrize(
    ("layout", "dtype", "value"),
    [("rows", torch.float32, math.nan), ("planes", torch.bfloat16, math.inf), ("crop", torch.float16, -math.inf)],
)
def test_pixels_that_are_not_finite_are_left_out(layout, dtype, value, order):
    x = LAYOUTS[layout](600, 19, dtype)
    cluster = clusters_for(600, 40)
    cluster[5], cluster[595] = 7, 7
    if x.ndim == 4:
        x[0, 0, 1, 0] = x[1, 18, -1, 0] = x[1, 3, 0, 2] = value  # pixels 5 and 595
    else:
        x[5, 0] = x[595, 18] = x[302, 3] = value
    assert int((flat(x).isfinite().all(1)).sum()) == 597
    check(x, cluster, 40)


def test_a_cluster_of_bad_pixels_alone_keeps_its_sub_centroid():
    x, cluster = randn(40, 8), torch.arange(40, device=DEVICE) % 4
    x[cluster == 2, 5] = math.nan
    # so many that a block ends several times 16 of them
    assert check(x, cluster, 300).counts[:5].tolist() == [10, 10, 0, 10, 0]


@VARIANTS
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_finite_pixels_whose_sum_overflows_leave_their_sub_centroid_alone(layout, ordered):
    x = torch.full((8, 20) if layout == "rows" else (1, 20, 2, 4), 3e38, device=DEVICE)
    cluster = torch.tensor([0, 0, 1, 0, 0, -1, 0, 0], device=DEVICE)
    sums, counts = ops.cluster_sums(x, cluster, 3, backend="cuda")
    assert not sums[0].isfinite().any() and torch.equal(sums[1], x.flatten()[:20]) and counts.tolist() == [6, 1, 0]
    before = unit(3, 1, 20)
    after = update(before, x, cluster, ordered)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


@pytest.mark.sanitize
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_momentum_step_equals_float64(momentum, order):
    centroids, sums, counts = unit(7, 5, 43), randn(35, 43), torch.randint(0, 3, (35,)).to(DEVICE)
    before, expected = centroids.clone(), centroids.double().cpu()
    reference.apply_momentum_(expected, sums.cpu(), counts.cpu(), momentum)
    ops.apply_momentum_(centroids, sums, counts, momentum=momentum, backend="cuda")
    assert_close(centroids.cpu(), expected, "direction", terms=1, scale=0.1)
    empty = (counts == 0).view(7, 5)
    assert torch.equal(centroids[empty], before[empty])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_length_of_a_sum_cannot_overflow_or_vanish(scale):
    direction = torch.tensor([3.0, -4.0, 0.0, 12.0], device=DEVICE)
    centroids, one = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]], device=DEVICE), torch.tensor([1], device=DEVICE)
    x, moved = (direction * scale)[None], centroids.clone()
    ops.apply_momentum_(moved, x, one, momentum=0.0, backend="cuda")
    # the other kernel's reductions flush subnormal numbers on a GPU
    results = [moved, update(centroids, x, one - 1, True, 0.0)]
    for result in results:
        assert torch.allclose(result.flatten(), direction / 13, rtol=0, atol=1e-3 if scale == 1e-42 else 1e-6)


@pytest.mark.parametrize("row", [0.0, math.nan, math.inf])
def test_a_sum_without_a_direction_keeps_the_sub_centroid(row):
    centroids, sums, counts = unit(2, 9), randn(2, 9), torch.tensor([4, 4], device=DEVICE)
    before = centroids.clone()
    sums[0] = row
    ops.apply_momentum_(centroids, sums, counts, momentum=0.5, backend="cuda")
    assert torch.equal(centroids[0], before[0]) and not torch.equal(centroids[1], before[1])


@VARIANTS
def test_a_result_without_a_direction_keeps_the_sub_centroid(ordered):
    before = torch.tensor([[[0.0, 1.0]], [[math.nan, 1.0]]], device=DEVICE)
    x, cluster = torch.tensor([[0.0, -4.0], [1.0, 1.0]], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    after = update(before, x, cluster, ordered, 0.5)
    assert torch.equal(after.nan_to_num(7), before.nan_to_num(7))


def test_the_update_is_its_two_steps():
    x, cluster, one = randn(300, 24), clusters_for(300, 12), unit(4, 3, 24)
    two = one.clone()
    ops.apply_momentum_(two, *ops.cluster_sums(x, cluster, 12, backend="cuda"), momentum=0.9, backend="cuda")
    assert torch.equal(update(one, x, cluster, True), two)


def test_torch_decides_whether_the_update_is_deterministic(monkeypatch):
    from dnc_kernels.ops.momentum import cuda

    seen, launch = [], cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *a: (seen.append(a[-1]), launch(*a)))
    x, cluster, centroids = randn(4, 8), torch.zeros(4, dtype=torch.int64, device=DEVICE), unit(2, 2, 8)
    for flag in (False, True):
        torch.use_deterministic_algorithms(flag)
        try:
            update(centroids, x, cluster, None)
        finally:
            torch.use_deterministic_algorithms(False)
    update(centroids, x, cluster, True)
    update(centroids, x, cluster, False)
    assert seen == [False, True, True, False]


def test_opcheck():
    x, cluster, p = randn(30, 8), clusters_for(30, 6), unit(3, 2, 8)
    torch.library.opcheck(torch_ops.cluster_sums._opoverload, (x, cluster, 6, "cuda"))
    sums, counts = ops.cluster_sums(x, cluster, 6, backend="cuda")
    torch.library.opcheck(torch_ops.apply_momentum_._opoverload, (p.clone(), sums, counts, 0.9, "cuda"))
    for ordered in (True, False):
        torch.library.opcheck(torch_ops.momentum_update_._opoverload, (p.clone(), x, cluster, 0.9, ordered, "cuda"))


@pytest.mark.parametrize("name", ["cluster_sums", "apply_momentum_", "momentum_update_"])
def test_float64_is_refused_by_name(name):
    x, cluster, p = randn(4, 8).double(), torch.zeros(4, dtype=torch.int64, device=DEVICE), unit(2, 2, 8).double()
    call = {
        "cluster_sums": lambda: ops.cluster_sums(x, cluster, 4, backend="cuda"),
        "apply_momentum_": lambda: ops.apply_momentum_(p, p[0].float().repeat(2, 1), cluster, backend="cuda"),
        "momentum_update_": lambda: ops.momentum_update_(p, x.float(), cluster, backend="cuda"),
    }[name]
    with pytest.raises(RuntimeError, match="the cuda kernel does not take float64"):
        call()


class TestOnAGpu:
    pytestmark = needs_gpu

    @VARIANTS
    def test_a_captured_update_replays(self, ordered):
        x, cluster, centroids = randn(20_000, 64), torch.randint(-1, 1500, (20_000,), device=DEVICE), unit(150, 10, 64)
        result, replayed = update(centroids, x, cluster, ordered), centroids.clone()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            ops.momentum_update_(replayed, x, cluster, momentum=0.9, deterministic=ordered, backend="cuda")
        for _ in range(2):
            replayed.copy_(centroids)
            graph.replay()
            assert torch.equal(replayed, result) if ordered else torch.allclose(replayed, result, atol=1e-5)

    @VARIANTS
    def test_the_call_does_not_synchronise(self, ordered):
        x, cluster, centroids = randn(1000, 8), torch.zeros(1000, dtype=torch.int64, device=DEVICE), unit(2, 2, 8)
        update(centroids, x, cluster, ordered)
        torch.cuda.set_sync_debug_mode("error")
        try:
            update(centroids, x, cluster, ordered)
            ops.apply_momentum_(centroids, *ops.cluster_sums(x, cluster, 4, backend="cuda"), backend="cuda")
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @pytest.mark.parametrize("layout", ["rows", "planes"])
    def test_reruns_at_full_size_are_bit_equal(self, layout):
        x, cluster = LAYOUTS[layout](131_070, 256, torch.bfloat16), clusters_for(131_070, 1500)
        check(x, cluster, 1500)
        runs = [ops.cluster_sums(x, cluster, 1500, backend="cuda").sums for _ in range(20)]
        assert all(torch.equal(run, runs[0]) for run in runs)

    @pytest.mark.large
    def test_offsets_beyond_int32(self):
        x = torch.zeros(2**31 // 256 + 9, 256, dtype=torch.bfloat16, device=DEVICE)
        x[-5:] = 1
        cluster = torch.arange(len(x), device=DEVICE) % 4
        sums = ops.cluster_sums(x, cluster, 4, backend="cuda").sums
        assert int(sums.sum()) == 5 * 256
