"""What only Triton's momentum kernels owe, against float64: on a GPU, or under the interpreter with tiles of 64 pixels."""

import pytest
import torch
from cuda_on_cpu import DEVICE
from momentum_check import LAYOUTS, check, clusters_for, randn

from dnc_kernels import ops
from dnc_kernels.ops._triton import configured, launch
from dnc_kernels.ops.momentum import triton_sums

pytestmark = pytest.mark.triton


def test_float32_keeps_every_bit():
    x = torch.tensor([[1.0, 2.0**-23, 1 + 2.0**-23, 3.4e38, -1.1754944e-38, 1 / 3]], device=DEVICE)
    assert torch.equal(ops.cluster_sums(x, torch.zeros(1, dtype=torch.int64, device=DEVICE), 1, backend="triton").sums, x)


def test_reruns_are_bit_equal():
    pixels = 100000 if DEVICE == "cuda" else 100
    x, cluster = LAYOUTS["planes"](pixels, 40, torch.float32), clusters_for(pixels, 50)
    runs = [ops.cluster_sums(x, cluster, 50, backend="triton").sums for _ in range(50 if DEVICE == "cuda" else 2)]
    assert all(torch.equal(run, runs[0]) for run in runs)


def test_a_large_cluster_is_many_units():
    x = randn(600, 3)  # more units than the last launch adds at a time
    cluster = torch.full((600,), 3, device=DEVICE)
    cluster[:20] = 18
    with configured("momentum_rows", BLOCK_T=32, BLOCK_B=1, UNIT=16, BLOCK_P=16, BLOCK_D=16, num_warps=1, num_stages=1):
        check("triton", x, cluster, 20)


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
