"""What only the CUDA C++ kernels of the momentum update owe, against float64: on a GPU, or as host C++."""

from functools import partial

import momentum_check
import pytest
import torch
from cuda_on_cpu import DEVICE
from gpu_check import captured, needs_gpu, no_wait
from momentum_check import LAYOUTS, VARIANTS, clusters_for, randn, unit

from dnc_kernels import ops
from dnc_kernels.ops.momentum import op as torch_ops

pytestmark = [pytest.mark.cuda, pytest.mark.usefixtures("cuda")]
check = partial(momentum_check.check, "cuda")
update = partial(momentum_check.update, "cuda")


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


@pytest.mark.parametrize("clusters", [1, 16, 17, 1_500])
def test_any_number_of_clusters(clusters):
    cluster = torch.randint(0, clusters, (400,)).to(DEVICE)
    cluster[:3] = clusters - 1
    check(randn(400, 8), cluster, clusters)


def test_torch_decides_whether_the_update_is_deterministic(monkeypatch):
    from dnc_kernels.ops.momentum import cuda

    seen, launch = [], cuda.launch
    monkeypatch.setattr(cuda, "launch", lambda *a: (seen.append(a[-1].deterministic), launch(*a)))
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
    torch.library.opcheck(torch_ops.cluster_sums.overload, (x, cluster, "cuda", 6))
    sums, counts = ops.cluster_sums(x, cluster, 6, backend="cuda")
    torch.library.opcheck(torch_ops.apply_momentum_.overload, (p.clone(), sums, counts, 0.9, "cuda"))
    for ordered in (True, False):
        torch.library.opcheck(torch_ops.momentum_update_.overload, (p.clone(), x, cluster, 0.9, ordered, "cuda"))


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


@needs_gpu
class TestOnAGpu:
    @VARIANTS
    def test_a_captured_update_replays(self, ordered):
        x, cluster, centroids = randn(20_000, 64), torch.randint(-1, 1500, (20_000,), device=DEVICE), unit(150, 10, 64)
        result, replayed = update(centroids, x, cluster, ordered), centroids.clone()
        options = {"momentum": 0.9, "deterministic": ordered, "backend": "cuda"}
        graph, _ = captured(lambda: ops.momentum_update_(replayed, x, cluster, **options))
        for _ in range(2):
            replayed.copy_(centroids)
            graph.replay()
            assert torch.equal(replayed, result) if ordered else torch.allclose(replayed, result, atol=1e-5)

    @VARIANTS
    def test_the_call_does_not_synchronise(self, ordered):
        x, cluster, centroids = randn(1000, 8), torch.zeros(1000, dtype=torch.int64, device=DEVICE), unit(2, 2, 8)
        update(centroids, x, cluster, ordered)
        with no_wait():
            update(centroids, x, cluster, ordered)
            ops.apply_momentum_(centroids, *ops.cluster_sums(x, cluster, 4, backend="cuda"), backend="cuda")

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
