"""LayerNorm over the classes of maps: torch's, and Triton's on a GPU or under the interpreter, against float64."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from cuda_on_cpu import DEVICE
from tolerances import assert_close

from dnc_kernels import use_backend
from dnc_kernels.ops.similarity import class_norm as norm

pytest.importorskip("triton")
ROOT = Path(__file__).parents[1]
EPS = 1e-5
BACKENDS = ("reference", pytest.param("triton", marks=pytest.mark.triton))


def windows(classes, shape, last):
    """Scores, a place for the result and its gradient: rows of larger maps, as the head has them."""
    batch, height, width = shape
    layout = {"memory_format": torch.channels_last if last else torch.contiguous_format}
    maps = (torch.randn(batch, classes, height + 1, width).to(DEVICE).contiguous(**layout) for _ in range(3))
    return tuple(m[:, :, 1:] for m in maps)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("last", (False, True), ids=("planes", "channels_last"))
@pytest.mark.parametrize(
    ("classes", "shape"),
    [(1, (1, 1, 1)), (2, (1, 3, 5)), (19, (2, 7, 33)), (150, (3, 5, 13)), (1000, (1, 2, 9)), (1025, (1, 2, 3))],
)
def test_value_and_gradients_equal_float64(classes, shape, last, backend):
    scores, out, grad = windows(classes, shape, last)
    gain, shift = (1 + 0.1 * torch.randn(classes)).to(DEVICE), torch.randn(classes).to(DEVICE)
    wide = [t.double().requires_grad_() for t in (scores, gain, shift)]
    expected = F.layer_norm(wide[0].movedim(1, -1), (classes,), *wide[1:], EPS).movedim(-1, 1)
    wanted = torch.autograd.grad(expected, wide, grad.double())
    with use_backend(backend):
        assert norm._fused(scores) == (backend == "triton" and classes <= norm.MAX_CLASSES)
        made = norm.class_norm(scores, gain, shift, EPS, out)
        to_scores, to_norm = norm.class_norm_backward_(grad, scores, gain, shift, EPS)
    assert_close(made, expected.detach(), "embedding", terms=classes, scale=4.0)
    if classes <= 2:  # the scores may be nearly equal: 1/sqrt(eps) of rounding
        return
    assert_close(to_scores, wanted[0], "embedding_grad", terms=classes, scale=4.0)
    pixels = scores.numel() // classes
    for actual, right in zip(to_norm, wanted[1:], strict=True):
        assert_close(actual, right, "embedding_param_grad", terms=pixels, scale=4.0)


@pytest.mark.triton
def test_a_pixel_that_is_not_finite_stays_alone():
    scores, out, grad = windows(5, (1, 2, 4), False)
    scores[0, 2, 1, 3] = torch.nan
    with use_backend("triton"):
        made = norm.class_norm(scores, torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE), EPS, out)
        to_scores, _ = norm.class_norm_backward_(grad, scores, torch.ones(5, device=DEVICE), torch.zeros(5, device=DEVICE), EPS)
    for t in (made, to_scores):
        assert t[0, :, 1, 3].isnan().all() and int(t.isnan().sum()) == 5


@pytest.mark.slow
def test_the_kernels_compile_without_a_spill():
    """In a process that does not interpret them."""
    program = """
from itertools import product
import torch
from benchmarks import aot_triton, machine_code
from dnc_kernels.ops.similarity import triton_class_norm as kernels
rows = []
def found(jit, compiled):
    rows.append((jit.fn.__name__, *aot_triton.resources(compiled)))
for arch in machine_code.ARCHS:
    with aot_triton.compiling(arch, found):
        for classes, layout in product((19, 150, 1000), (torch.contiguous_format, torch.channels_last)):
            s, o = (torch.empty(8, classes, 128, 128, device="meta").contiguous(memory_format=layout) for _ in range(2))
            gain = torch.empty(classes, device="meta")
            kernels.class_norm(s, gain, gain, 1e-5, o)
            kernels.class_norm_backward_(o, s, gain, 1e-5)
print(len(rows), max(r for _, r, _ in rows), sum(s for _, _, s in rows))
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    count, registers, spills = map(int, done.stdout.split())
    assert count == 36 and registers <= 255 and spills == 0
