"""The momentum update in Triton and in CUDA C++ against float64: on a GPU, or tiles of 64 pixels under Triton's interpreter, and host
C++. Apart from test_momentum.py, so that it runs where hypothesis is not installed.
"""

import math
from itertools import product

import pytest
import torch
from cuda_on_cpu import DEVICE
from gpu_check import ANY_ORDER, in_any_order, sizes
from momentum_check import DTYPES, LAYOUTS, VARIANTS, check, clusters_for, flat, randn, unit, update
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.momentum import reference


@pytest.mark.sanitize
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@sizes("pixels,channels,clusters", triton=((150, 19, 40),), cuda=((300, 24, 24),))
def test_layouts_and_dtypes(layout, dtype, pixels, channels, clusters, backend):
    check(backend, LAYOUTS[layout](pixels, channels, dtype), clusters_for(pixels, clusters), clusters)


@sizes(
    "layout,channels,dtype",
    triton=tuple(product(("rows", "planes"), (1, 16, 33), DTYPES[:1])),
    cuda=tuple(
        (*case, dtype)
        for case in (("rows", 1), ("rows", 7), ("rows", 264), ("planes", 1), ("planes", 67))
        for dtype in (torch.float32, torch.bfloat16)
    ),
)
def test_every_width_of_the_last_slice(layout, channels, dtype, backend):
    check(backend, LAYOUTS[layout](150, channels, dtype), clusters_for(150, 9), 9)


@sizes(
    "pixels,clusters",
    triton=((0, 3), (1, 1), (64, 1), (65, 16), (130, 17), (100, 280)),
    cuda=tuple((pixels, 20) for pixels in (0, 1, 2, 64, 65, 129, 512, 513, 1025)),
)
def test_sizes_around_a_tile(pixels, clusters, backend):
    check(backend, randn(pixels, 8), torch.arange(pixels, device=DEVICE) % clusters, clusters)


@pytest.mark.parametrize("layout", ["rows", "planes"])
@sizes("pixels", triton=(100,), cuda=(300,))
def test_all_in_one_cluster_all_left_out_and_some_outside(layout, pixels, backend):
    x = LAYOUTS[layout](pixels, 8, torch.bfloat16)
    check(backend, x, torch.full((pixels,), 4, device=DEVICE), 6)
    check(backend, x, torch.full((pixels,), -1, device=DEVICE), 6)
    cluster = clusters_for(pixels, 6)
    cluster[:4] = torch.tensor([6, -7, 2**40, -(2**40)], device=DEVICE)
    check(backend, x, cluster, 6)


@pytest.mark.sanitize
@sizes(
    "pixels,layout,dtype,value",
    triton=tuple(
        (120, *case, value)
        for case in (("rows", torch.float32), ("planes", torch.bfloat16), ("crop", torch.float16))
        for value in (math.nan, math.inf, -math.inf)
    ),
    cuda=(
        (600, "rows", torch.float32, math.nan),
        (600, "planes", torch.bfloat16, math.inf),
        (600, "crop", torch.float16, -math.inf),
    ),
    ways=ANY_ORDER,
)
def test_pixels_that_are_not_finite_are_left_out(pixels, layout, dtype, value, backend):
    x = LAYOUTS[layout](pixels, 19, dtype)
    cluster = clusters_for(pixels, 40)
    cluster[5], cluster[-5] = 7, 7
    if x.ndim == 4:
        x[0, 0, 1, 0] = x[1, 18, -1, 0] = x[1, 3, 0, 2] = value  # the same pixels
    else:
        x[5, 0] = x[-5, 18] = x[pixels // 2 + 2, 3] = value
    assert int((flat(x).isfinite().all(1)).sum()) == pixels - 3
    check(backend, x, cluster, 40)


@sizes("clusters", triton=(20,), cuda=(300,))  # so many that a block ends several times 16 of them
def test_a_cluster_of_bad_pixels_alone_keeps_its_sub_centroid(clusters, backend):
    x, cluster = randn(40, 8), torch.arange(40, device=DEVICE) % 4
    x[cluster == 2, 5] = math.nan
    assert check(backend, x, cluster, clusters, variants=(True, False)).counts[:5].tolist() == [10, 10, 0, 10, 0]


@VARIANTS
@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_finite_pixels_whose_sum_overflows_leave_their_sub_centroid_alone(layout, ordered, backend):
    x = torch.full((8, 20) if layout == "rows" else (1, 20, 2, 4), 3e38, device=DEVICE)
    cluster = torch.tensor([0, 0, 1, 0, 0, -1, 0, 0], device=DEVICE)
    sums, counts = ops.cluster_sums(x, cluster, 3, backend=backend)
    assert not sums[0].isfinite().any() and torch.equal(sums[1], x.flatten()[:20]) and counts.tolist() == [6, 1, 0]
    before = unit(3, 1, 20)
    after = update(backend, before, x, cluster, ordered)
    assert torch.equal(after[[0, 2]], before[[0, 2]]) and not torch.equal(after[1], before[1])


@pytest.mark.sanitize
@in_any_order
@pytest.mark.parametrize("momentum", [0.0, 0.25, 0.999, 1.0])
def test_momentum_step_equals_float64(momentum, backend):
    centroids, sums, counts = unit(7, 5, 43), randn(35, 43), torch.randint(0, 3, (35,)).to(DEVICE)
    before, expected = centroids.clone(), centroids.double().cpu()
    reference.move_(expected, sums.cpu(), counts.cpu(), momentum)
    ops.apply_momentum_(centroids, sums, counts, momentum=momentum, backend=backend)
    assert_close(centroids.cpu(), expected, "direction", terms=1, scale=0.1)
    empty = (counts == 0).view(7, 5)
    assert torch.equal(centroids[empty], before[empty])


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30])
def test_length_of_a_sum_cannot_overflow_or_vanish(scale, backend):
    direction = torch.tensor([3.0, -4.0, 0.0, 12.0], device=DEVICE)
    centroids, one = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]], device=DEVICE), torch.tensor([1], device=DEVICE)
    x, moved = (direction * scale)[None], centroids.clone()
    ops.apply_momentum_(moved, x, one, momentum=0.0, backend=backend)
    results = [moved]
    if backend == "cuda":  # the other kernel's reductions flush subnormal numbers on a GPU
        results.append(update(backend, centroids, x, one - 1, True, 0.0))
    for result in results:
        assert torch.allclose(result.flatten(), direction / 13, rtol=0, atol=1e-3 if scale == 1e-42 else 1e-6)


@pytest.mark.parametrize("row", [0.0, math.nan, math.inf])
def test_a_sum_without_a_direction_keeps_the_sub_centroid(row, backend):
    centroids, sums, counts = unit(2, 9), randn(2, 9), torch.tensor([4, 4], device=DEVICE)
    before = centroids.clone()
    sums[0] = row
    ops.apply_momentum_(centroids, sums, counts, momentum=0.5, backend=backend)
    assert torch.equal(centroids[0], before[0]) and not torch.equal(centroids[1], before[1])


@VARIANTS
def test_a_result_without_a_direction_keeps_the_sub_centroid(ordered, backend):
    before = torch.tensor([[[0.0, 1.0]], [[math.nan, 1.0]]], device=DEVICE)
    x, cluster = torch.tensor([[0.0, -4.0], [1.0, 1.0]], device=DEVICE), torch.tensor([0, 1], device=DEVICE)
    applied = before.clone()
    ops.apply_momentum_(applied, x, torch.ones_like(cluster), momentum=0.5, backend=backend)
    for after in (applied, update(backend, before, x, cluster, ordered, 0.5)):
        assert torch.equal(after.nan_to_num(7), before.nan_to_num(7))


@pytest.mark.parametrize("layout", ["rows", "planes"])
def test_update_equals_float64_and_is_its_two_steps(layout, backend):
    x, cluster = LAYOUTS[layout](150, 24, torch.bfloat16), clusters_for(150, 12)
    cluster[cluster == 5] = -1
    flat(x)[7] = math.nan  # a copy for planes: there nothing changes
    two = unit(4, 3, 24)
    before, expected = two.clone(), two.double()
    one = update(backend, two, x, cluster, True)
    reference.move_(expected, *reference.sums_of(x.double(), cluster, 12), 0.9)
    assert_close(one, expected, "direction", terms=10, scale=0.2)
    assert torch.equal(one[1, 2], before[1, 2])  # cluster 5 is absent
    ops.apply_momentum_(two, *ops.cluster_sums(x, cluster, 12, backend=backend), momentum=0.9, backend=backend)
    assert torch.equal(one, two)
