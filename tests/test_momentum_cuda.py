"""The CUDA momentum update against float64. Apart from test_momentum.py, so that it runs where hypothesis is not installed."""

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]

# shape and strides of 3,000 pixels with 130 channels
LAYOUTS = {
    "rows": ((300, 130), (130, 1)),
    "sliced rows": ((300, 130), (137, 1)),
    "every other channel": ((300, 130), (260, 2)),
    "planes": ((2, 130, 10, 15), (19500, 150, 15, 1)),
    "channels_last": ((2, 130, 10, 15), (19500, 1, 1950, 130)),
    "crop": ((2, 130, 10, 15), (130 * 14 * 22, 14 * 22, 22, 1)),
    "expanded": ((300, 130), (0, 1)),
}


def unit(*shape):
    return F.normalize(torch.randn(*shape, device=DEVICE), dim=-1)


def expected_update(centroids, x, cluster, momentum):
    result = centroids.double().cpu()
    ops.momentum_update_(result, x.double().cpu(), cluster.cpu(), momentum=momentum, backend="reference")
    return result


def update(centroids, x, cluster, momentum=0.9):
    result = centroids.clone()
    ops.momentum_update_(result, x, cluster, momentum=momentum, backend="cuda")
    return result


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_update_equals_float64_and_repeats_bit_for_bit(layout, dtype, bad):
    shape, strides = LAYOUTS[layout]
    x = torch.empty_strided(shape, strides, dtype=dtype, device=DEVICE)
    if layout == "expanded":
        x[0] = torch.randn(130, device=DEVICE)
    else:
        x.copy_(torch.randn(shape, device=DEVICE))
    if bad is not None and layout != "expanded":
        (x if x.ndim == 2 else x[0, :, 3].T)[7, 129] = bad
    cluster = torch.randint(-1, 24, (300,), device=DEVICE)
    cluster[:90] = 5
    cluster[cluster == 11] = -1
    centroids = unit(8, 3, 130)
    result = update(centroids, x, cluster)
    assert_close(result.cpu(), expected_update(centroids, x, cluster, 0.9), "direction", terms=30, scale=0.1)
    assert torch.equal(result[3, 2], centroids[3, 2])
    for _ in range(3):
        assert torch.equal(update(centroids, x, cluster), result)


def many():
    return torch.randn(2_000, 64, device=DEVICE), torch.randint(-1, 1500, (2_000,), device=DEVICE), unit(150, 10, 64)


def test_many_clusters():
    x, cluster, centroids = many()
    result = update(centroids, x, cluster, 0.999)
    assert_close(result.cpu(), expected_update(centroids, x, cluster, 0.999), "direction", terms=1, scale=0.2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_captured_update_replays():
    x, cluster, centroids = many()
    result = update(centroids, x, cluster, 0.999)
    replayed = centroids.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ops.momentum_update_(replayed, x, cluster, momentum=0.999, backend="cuda")
    replayed.copy_(centroids)
    graph.replay()
    assert torch.equal(replayed, result)


def test_clusters_out_of_range_are_left_out():
    x, cluster = torch.randn(100, 8, device=DEVICE), torch.randint(-1, 6, (100,), device=DEVICE)
    outside = torch.where(cluster == -1, 6 + torch.arange(100, device=DEVICE), cluster)
    centroids = unit(3, 2, 8)
    assert torch.equal(update(centroids, x, outside), update(centroids, x, cluster))


def test_no_pixels_and_one_pixel():
    centroids = unit(3, 2, 8)
    none = torch.empty(0, dtype=torch.int64, device=DEVICE)
    assert torch.equal(update(centroids, torch.empty(0, 8, device=DEVICE), none), centroids)
    x = torch.randn(1, 8, device=DEVICE)
    result = update(centroids, x, none.new_tensor([4]), 0.0)
    assert_close(result[2, 0].cpu(), F.normalize(x[0].double(), dim=0).cpu(), "direction", terms=1, scale=0.1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_call_does_not_synchronise():
    x, cluster, centroids = (
        torch.randn(1000, 8, device=DEVICE),
        torch.zeros(1000, dtype=torch.int64, device=DEVICE),
        unit(2, 2, 8),
    )
    update(centroids, x, cluster)
    torch.cuda.set_sync_debug_mode("error")
    try:
        update(centroids, x, cluster)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_float64_sub_centroids_are_refused_by_name():
    with pytest.raises(RuntimeError, match="the cuda kernel does not take float64"):
        update(unit(2, 2, 8).double(), torch.randn(4, 8, device=DEVICE), torch.zeros(4, dtype=torch.int64, device=DEVICE))
