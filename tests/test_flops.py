"""What torch's FlopCounterMode counts of the ops: their matrix products, as the benchmarks do."""

import subprocess
import sys

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import bench_head, bench_similarity
from benchmarks.case import Settings
from dnc_kernels import backends, ops

N, C, K, D = 24, 3, 4, 8
SIZES = {"N": N, "C": C, "K": K, "D": D}
SETTINGS = Settings()
CASES = {
    "centroid_cross_entropy": lambda: bench_similarity._loss_case("small", SIZES, "float32", {}, SETTINGS),
    "class_scores": lambda: bench_similarity._scores_case("small", SIZES, "float32", SETTINGS, False, False),
    "class_scores with its gradient": lambda: bench_similarity._scores_case("small", SIZES, "float32", SETTINGS, False, True),
    "nearest_centroid": lambda: bench_similarity._nearest_case("small", SIZES, "float32", {}, SETTINGS),
    "subcentroid_cross_entropy": lambda: bench_similarity._contrast_case("small", SIZES, "float32", SETTINGS, False),
    "head step": lambda: bench_head._case("small", 1, 16, 16, C, "float32", SETTINGS),
}


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


@pytest.mark.skipif(bool(backends.unusable("cpu")), reason=backends.unusable("cpu"))
@pytest.mark.parametrize("name", CASES)
def test_the_counter_and_the_benchmarks_agree(name):
    case = CASES[name]()
    variant = next(v for v in case.variants if not v.baseline)
    assert flops(variant.prepare(case.inputs())) == case.flops > 0


PRODUCT = 2 * N * C * K * D
WINNERS = 2 * N * C * D


def problem(**grads):
    generator = torch.Generator().manual_seed(0)
    x, p = torch.randn(N, D, generator=generator), torch.randn(C, K, D, generator=generator)
    return x.requires_grad_(grads.get("x", False)), p.requires_grad_(grads.get("p", False)), torch.arange(N) % C


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_products_of_every_direction(backend):
    x, p, y = problem(x=True, p=True)
    options = {"backend": backend}
    dense = backend == "reference"

    def counted(forward, *backward):
        """torch differentiates the whole product where the ops know the winners."""
        return forward + (len(backward) * PRODUCT if dense else sum(backward))

    assert flops(lambda: ops.centroid_distance(x, p, **options).sum().backward()) == counted(PRODUCT, PRODUCT, PRODUCT)
    scores, own = (lambda: ops.class_scores(x, p, y, **options).scores), 2 * N * K * D
    assert flops(lambda: scores().sum().backward()) == counted(PRODUCT, WINNERS, WINNERS)
    if not dense:
        assert flops(lambda: ops.class_scores(x, p, y).own_similarity.sum().backward()) == PRODUCT + 2 * own
        # centroids that are learnt: the backward pass makes the scores again
        again = PRODUCT + 2 * WINNERS
        assert flops(lambda: ops.centroid_cross_entropy(x, p, y).loss.backward()) == PRODUCT + again
        assert flops(lambda: ops.subcentroid_cross_entropy(x, p, y).backward()) == 2 * PRODUCT + 2 * PRODUCT
    with torch.no_grad():
        for call in (scores, lambda: ops.centroid_cross_entropy(x, p, y, **options).loss):
            assert flops(call) == PRODUCT
        assert flops(lambda: ops.normalize_embedding(x, **options)) == 0


FRESH = """
import sys
FIRST
import torch
x, p = torch.randn(3, 4), torch.randn(2, 2, 4)
with FlopCounterMode(display=False) as counter:
    ops.nearest_centroid(x, p)
    torch.mm(x, x.T)
print(counter.get_total_flops(), [f for f in sys.meta_path if f.__module__.startswith("dnc")])
"""


@pytest.mark.parametrize(
    "first",
    [
        "from dnc_kernels import ops; from torch.utils.flop_counter import FlopCounterMode",
        "from torch.utils.flop_counter import FlopCounterMode; from dnc_kernels import ops",
    ],
    ids=["ops first", "counter first"],
)
def test_whichever_is_imported_first(first):
    made = subprocess.run([sys.executable, "-c", FRESH.replace("FIRST", first)], capture_output=True, text=True, check=True)
    assert made.stdout.splitlines() == [f"{2 * 3 * 4 * 4 + 2 * 3 * 3 * 4} []"]
