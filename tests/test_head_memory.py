"""The memory of a head's step on a GPU: what its launchers ask for, counted without one, against the formula and plain torch."""

from functools import cache

import pytest
import torch
from allocations import Allocations, pretended
from gpu_check import needs_gpu
from small_network import CHECKPOINTS

from benchmarks.bench_head import eager
from dnc_kernels import use_backend
from dnc_kernels.nn import DNCHead

pytest.importorskip("triton")
pytestmark = pytest.mark.triton
HALF, SINGLE = torch.bfloat16, torch.float32
#: [8,256,128,128] of ADE20K's 150 classes, labels four times as large.
LARGE = (8, 256, 128, 128), (8, 512, 512)


def prepared(features, labels, dtype=HALF, classes=150, k=10, *, last=False, device="meta", **options):
    head = DNCHead(features[1], classes, k, ignore_index=-1, device=device, **options)
    layout = torch.channels_last if last else torch.contiguous_format
    x = torch.zeros(features, dtype=dtype, device=device).contiguous(memory_format=layout).requires_grad_()
    return head, x, torch.zeros(labels, dtype=torch.int64, device=device)


def step(*sizes, kind="sm_90", part="loss", **options):
    """Bytes counted and of the formula."""
    head, x, labels = prepared(*sizes, **options)
    with pretended(kind), Allocations() as counted:
        counted.given(x, labels, *head.parameters(), *head.buffers())
        getattr(head.loss(x, labels), part).backward()
    return counted.peak, head.step_bytes(x.shape, labels.shape, x.dtype)


@cache
def plain_step(features, labels, dtype, classes, k, device="meta"):
    """Bytes that the step in plain torch takes."""
    x = torch.zeros(features, dtype=dtype, device=device, requires_grad=True)
    y = torch.arange(labels[0] * labels[1] * labels[2], device=device).view(labels) // 4 % classes
    p = torch.randn(classes, k, features[1], device=device)
    norms = [torch.zeros(n, device=device, requires_grad=True) for n in (features[1], features[1], classes, classes)]
    with Allocations(shares=classes) as counted:
        counted.given(x, y, p, *norms)
        eager(x, y, p, *norms).backward()
    return counted.peak


@pytest.mark.parametrize("recipe", ["default", "released"])
@pytest.mark.parametrize("k", [4, 10])
def test_a_step_in_one_band_takes_a_tenth_of_plain_torch(k, recipe):
    """At most 30 % is asked for."""
    ours, _ = step(*LARGE, HALF, 150, k, recipe=recipe)
    assert ours <= 0.1 * plain_step(*LARGE, HALF, 150, k)


def test_shapes_without_numbers_count_as_numbers_do():
    sizes = (2, 32, 16, 16), (2, 64, 64), SINGLE, 4, 3
    assert abs(plain_step(*sizes) / plain_step(*sizes, device="cpu") - 1) < 0.02


CASES = [
    (*LARGE, HALF, 150, 10, {}),
    (*LARGE, SINGLE, 150, 4, {}),
    (*LARGE, HALF, 2, 2, {}),
    ((2, 720, 128, 256), (2, 512, 1024), HALF, 19, 10, {"recipe": "released"}),
    ((2, 64, 64, 64), (2, 256, 256), SINGLE, 21, 4, {"assignment": "gumbel"}),
    ((2, 64, 64, 64), (2, 256, 256), HALF, 19, 60, {"assignment": "gumbel", "pixels_per_class": 100}),
    ((4, 128, 64, 96), (4, 64, 96), HALF, 150, 64, {}),
    ((4, 96, 128, 128), (4, 1024, 1024), HALF, 5, 2, {"label_smoothing": 0.1}),
    ((4, 2048, 32, 32), (4, 256, 256), HALF, 150, 10, {"loss_size": "features"}),
    ((4, 256, 64, 64), (4, 256, 256), HALF, 19, 10, {"ppc_weight": 0.0, "revive_after": 5}),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)).replace(" ", ""))
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_formula_holds(checkpoint, case):
    *sizes, options = case
    batch, _, height, width = sizes[0]
    one_band, six = {"kind": "sm_90", "last": True}, {"kind": "sm_80", "band_pixels": batch * height * width // 6}
    for use in (one_band, six):
        counted, formula = step(*sizes, checkpoint=checkpoint, **use, **options)
        assert counted <= formula <= 2 * counted, f"{use}: counted {counted / 1e6:.1f} MB, formula {formula / 1e6:.1f} MB"


def test_bands_of_a_gibibyte_by_default():
    sizes = (32, 256, 128, 128), (32, 512, 512), HALF, 1000, 4
    counted, formula = step(*sizes)
    assert counted <= formula <= 1.3 * counted
    gradient = 2 * 32 * 256 * 128 * 128
    assert counted <= 1.2 * (gradient + 2**30) < step(*sizes, band_pixels=2**30)[0]


def test_shorter_bands_take_less():
    found = [step(*LARGE, band_pixels=pixels)[0] for pixels in (None, 32768, 8192)]
    assert found == sorted(found, reverse=True) and found[-1] < found[0] / 3


@pytest.mark.parametrize("part", ["cross_entropy", "ppc"])
def test_a_part_takes_a_second_gradient(part):
    counted, formula = step(*LARGE, part=part)
    gradient = 2 * 8 * 256 * 128 * 128
    assert counted <= formula + gradient


def test_the_device_chooses_the_formula():
    head = DNCHead(256, 150)
    assert head.step_bytes(*LARGE, HALF) == head.step_bytes(*LARGE, HALF, "cpu") != head.step_bytes(*LARGE, HALF, "cuda:1")
    assert head.to("meta").step_bytes(*LARGE, HALF) == head.step_bytes(*LARGE, HALF, torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_the_formula_holds_on_a_gpu(checkpoint):
    sizes = (2, 256, 128, 128), (2, 512, 512)
    head, x, labels = prepared(*sizes, device="cuda", checkpoint=checkpoint)
    with use_backend("triton"):
        head.loss(x, labels).loss.backward()  # what is made once is made
        x.grad = None
        head.zero_grad()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        head.loss(x, labels).loss.backward()
    assert torch.cuda.max_memory_allocated() - before <= head.step_bytes(*sizes, x.dtype)
