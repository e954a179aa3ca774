"""What the GPU tests of the momentum update share: features in every layout, clusters, and a comparison with float64."""

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import ops
from dnc_kernels.ops.momentum import reference

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
# deterministic, or in any order
VARIANTS = pytest.mark.parametrize("ordered", [True, False], ids=["ordered", "fast"])


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
    "one column": lambda n, d, t: randn(2, d, n // 2, 3, dtype=t)[..., 1:2],
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


def update(backend, centroids, x, cluster, ordered, momentum=0.9):
    result = centroids.clone()
    ops.momentum_update_(result, x, cluster, momentum=momentum, deterministic=ordered, backend=backend)
    return result


def check(backend, x, cluster, clusters, variants=None):
    """Sums, counts and updates against float64; what has no pixel keeps every bit, reruns do too.

    variants: of the update, deterministic or not; both in CUDA C++, none in Triton, whose updates are made of the same sums.
    """
    pixels = flat(x).double().cpu()
    sums, counts = reference.sums_of(pixels, cluster.flatten().cpu(), clusters)
    result = ops.cluster_sums(x, cluster, clusters, backend=backend)
    assert torch.equal(result.counts.cpu(), counts)
    size = pixels.nan_to_num(0, 0, 0).abs()
    assert_close(result.sums.cpu(), sums, "sum", terms=int(counts.max()), scale=float(size.max()) if x.numel() else 1.0)
    before = unit(clusters, 1, x.shape[1])
    expected = before.double().cpu()
    reference.move_(expected, sums, counts, 0.9)
    for ordered in ((True, False) if backend == "cuda" else ()) if variants is None else variants:
        after = update(backend, before, x, cluster, ordered)
        # an error of a sum is one of its direction by the share of its length
        assert_close(after.cpu(), expected, "direction", terms=max(int(counts.max()), 1), scale=0.2)
        assert torch.equal(after[counts == 0], before[counts == 0])
        if ordered:
            assert torch.equal(update(backend, before, x, cluster, ordered), after)
    return result
