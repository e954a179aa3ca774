"""What an eager call costs the host, counted: functions of the package that run, and calls that they make of torch and of C.

Times are `python -m benchmarks run --op host`. A number that must grow grows here, where it is seen.
"""

import sys
from pathlib import Path

import pytest
import torch

import dnc_kernels
from benchmarks import bench_host
from benchmarks.case import Settings
from dnc_kernels import backends

PACKAGE = str(Path(dnc_kernels.__file__).parent)
pytestmark = pytest.mark.skipif(bool(backends.unusable("cpu")), reason=backends.unusable("cpu"))

#: Op -> at most so many functions of the package in a call without gradients, and so many calls out of them.
FORWARD = {
    "centroid_distance": (12, 22),
    "class_scores": (18, 24),
    "nearest_centroid": (16, 24),
    "centroid_cross_entropy": (23, 29),
    "subcentroid_cross_entropy": (19, 34),
    "sinkhorn_assign": (20, 24),
    "sinkhorn_plan": (21, 27),
    "cluster_sums": (16, 24),
    "momentum_update_": (17, 30),
    "normalize_embedding": (15, 22),
    "upsample_cross_entropy": (13, 24),
    "upsample_argmax": (19, 24),
}
#: The same of a loss with its backward pass.
TRAINED = {"centroid_cross_entropy": (37, 41), "upsample_cross_entropy": (28, 37)}


def counted(call):
    """Functions of the package that a call runs, and calls of anything written in C that these make."""
    functions, outward = [], []

    def note(frame, event, argument):
        if frame.f_code.co_filename.startswith(PACKAGE):
            if event == "call":
                functions.append(frame.f_code.co_name)
            elif event == "c_call":
                outward.append(getattr(argument, "__name__", str(argument)))

    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return functions, outward


def check(name, call, allowed):
    for _ in range(2):
        call()
    functions, outward = counted(call)
    assert len(functions) <= allowed[0] and len(outward) <= allowed[1], (name, functions, outward)


@pytest.mark.parametrize("op", bench_host.FORWARD)
def test_calls_without_gradients(op):
    inputs, (solve, _) = bench_host._inputs(Settings()), bench_host.FORWARD[op]
    with torch.no_grad():
        check(op, lambda: solve(inputs, "auto"), FORWARD[op])


@pytest.mark.parametrize("op", bench_host.TRAINED)
def test_losses_with_their_backward_pass(op):
    inputs, (solve, grad) = bench_host._inputs(Settings()), bench_host.TRAINED[op]
    x = getattr(inputs, grad).requires_grad_()

    def call():
        x.grad = None
        solve(inputs, "auto").backward()

    check(op, call, TRAINED[op])


def test_an_eager_call_dispatches_nothing_but_what_it_allocates(monkeypatch):
    """Beside the kernel: the results, and no op of the dispatcher in between."""
    inputs = bench_host._inputs(Settings())
    solve, _ = bench_host.FORWARD["nearest_centroid"]
    solve(inputs, "auto")
    _, outward = counted(lambda: solve(inputs, "auto"))
    assert [name for name in outward if name in ("new_empty", "empty_like", "empty", "to", "contiguous", "clone", "view")] == [
        "new_empty"
    ] * 3
