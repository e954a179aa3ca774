"""The harness of the CUDA tests: its twins of GPU instructions against plain loops, and that it notices mistakes."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from cuda_on_cpu import ORDERS, ROOT, load

from benchmarks import primitives
from dnc_kernels import backends
from dnc_kernels.ops.similarity import reference
from dnc_kernels.ops.similarity.calls import ScoresBackwardCall, ScoresBackwardOut, ScoresCall


@pytest.fixture(params=ORDERS)
def checks(request):
    module = load("_checks")
    module.configure(request.param)
    return module


@pytest.mark.parametrize("name", primitives.CHECKS)
def test_primitive(checks, name):
    """As `python -m benchmarks.primitives` checks it on a GPU."""
    primitives.CHECKS[name](checks, True)


def test_a_wrong_element_is_named():
    expected = np.arange(6).reshape(2, 3)
    actual = expected.copy()
    actual[1, 1:] = 9
    primitives.same(expected, expected)
    with pytest.raises(AssertionError, match=r"^row \[1, 1\] is 9, not 4; 2 of 6 wrong$"):
        primitives.same(actual, expected, "row ")
    with pytest.raises(AssertionError, match=r"has shape \(3,\), not \(2, 3\)"):
        primitives.same(np.arange(3), expected)


def test_a_primitive_that_hangs_or_crashes_stops_no_other():
    def python(code):
        return [sys.executable, "-c", code]

    commands = {
        "hangs": python("import time; time.sleep(60)"),
        "crashes": python("import os; os.abort()"),
        "ends": python("raise SystemExit('no device')"),
        "wrong": python("print('a line'); print('[\"wrong\", \"[0] is 1, not 2\"]')"),
        "right": python('print(\'["ok", ""]\')'),
    }
    lines = list(primitives.run(commands, timeout_s=10, jobs=2))
    assert [line["primitive"] for line in lines][-1] == "hangs" and len(lines) == len(commands)
    found = {line["primitive"]: (line["status"], line["detail"]) for line in lines}
    assert found["hangs"] == ("hang", "stopped after 10 s") and found["right"] == ("ok", "")
    assert found["crashes"] == ("failed", "SIGABRT") and found["ends"] == ("failed", "exit status 1 no device")
    assert found["wrong"] == ("wrong", "[0] is 1, not 2")


def test_primitives_are_checked_on_the_host(capsys):
    load("_checks")
    assert primitives.main(["--host", "--only", "ldmatrix", "--only", "vector_red"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert {(line["primitive"], line["status"]) for line in lines} == {("ldmatrix", "ok"), ("vector_red", "ok")}
    assert all(line.keys() == {"primitive", "status", "seconds", "detail"} for line in lines)


def test_primitives_that_are_not_built_say_how(monkeypatch, tmp_path):
    monkeypatch.setattr(primitives, "FOLDERS", {False: tmp_path, True: tmp_path})
    status, detail = primitives.run_here("ldmatrix", host=False)
    assert status == "failed" and "make gpu-wheel" in detail


# mistakes; those that only AddressSanitizer sees are in test_cuda_sanitized.py


@pytest.mark.parametrize(
    ("fault", "text"),
    [
        ("divergent_barrier", "is waiting (at __syncthreads|in a warp exchange) while 32 threads"),
        ("missing_arrival", "is spinning while 32 threads"),
        ("missing_block", "of block [02] is (spinning|waiting at __syncthreads) while 64 threads"),
        ("missing_warp", "is waiting at a named barrier while 32 threads"),
        ("mixed_barrier", "is waiting at a named barrier while (32|64) threads"),
    ],
)
def test_a_wait_that_never_ends_is_reported(checks, fault, text):
    with pytest.raises(RuntimeError, match=f"deadlock: thread [0-9]+ .*{text}"):
        getattr(checks, fault)()


def test_a_kernel_that_has_no_code_fails(checks):
    with pytest.raises(RuntimeError, match=r"trap: thread [0-9]+ of block [01]"):
        checks.trap()


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cuda").glob("*.*")), ids=lambda path: path.name)
def test_a_body_that_is_compiled_out_leaves_a_trap(path):
    """Compiled for another architecture, a kernel that were empty would leave garbage without an error."""
    for guard, body in re.findall(r"^#if (DNC_\w+)\n(.*?)^#endif", path.read_text(), re.MULTILINE | re.DOTALL):
        assert body.endswith("#else\n  trap();\n"), guard


WITHOUT_TRITON = """
import sys
from importlib.machinery import PathFinder

class Hides(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] == "triton" else super().find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = Hides
import torch
from cuda_on_cpu import DEVICE, host_kernels
from dnc_kernels import _selftest, backends, ops
from contextlib import nullcontext

data = _selftest.data()
data.x, data.centroids = data.x[:, :32], data.centroids[..., :32].contiguous()  # channels come in groups of 8
with nullcontext() if DEVICE == "cuda" else host_kernels():
    for op, kernels in backends.KERNELS.items():
        if "cuda" not in kernels:
            continue
        dtype = torch.float32 if torch.float32 in kernels["cuda"].dtypes else torch.bfloat16
        with backends.use_backend("cuda"):
            actual = _selftest.CASES[op](data.to(dtype, DEVICE))
        with backends.use_backend("reference"):
            expected = _selftest.CASES[op](data.to(dtype, DEVICE))
        actual, expected = ([t.float() if t.is_floating_point() else t for t in side] for side in (actual, expected))
        print(op, _selftest.worst_error(actual, expected))
    x, p = (t.bfloat16().to(DEVICE).requires_grad_() for t in (data.x, data.centroids))
    for metric in ("dot", "sqeuclidean"):  # of cosine, rounded units may have other winners
        grads = []
        for backend in ("cuda", "reference"):
            scores, _, own = ops.class_scores(x, p, data.labels.to(DEVICE), metric=metric, backend=backend)
            torch.manual_seed(0)
            loss = (scores * torch.randn_like(scores)).sum() + (own * torch.randn_like(own)).sum()
            grads.append([g.float() for g in torch.autograd.grad(loss, (x, p))])
        print(metric, _selftest.worst_error(*grads))
    try:
        ops.centroid_cross_entropy(x, p, data.labels.to(DEVICE), backend="cuda")[0].backward()
    except RuntimeError as error:
        print("refused", "Triton, which is not installed" in str(error))
assert "triton" not in sys.modules
"""


def test_every_op_with_a_cuda_kernel_runs_without_triton():
    load("_cuda_on_cpu")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, ROOT / "tests")))}
    done = subprocess.run([sys.executable, "-c", WITHOUT_TRITON], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found = dict(line.split() for line in done.stdout.splitlines())
    assert found.pop("refused") == "True"
    metrics = {"dot", "sqeuclidean"}
    assert found.keys() == {op for op, kernels in backends.KERNELS.items() if "cuda" in kernels} | metrics
    assert all(float(error) < 2**-6 for error in found.values()), found  # some were rounded to 16 bits


@pytest.mark.parametrize("metric", ["dot", "cosine", "sqeuclidean"])
@pytest.mark.parametrize("planes", [False, True], ids=["rows", "planes"])
def test_dense_products_give_the_gradients_of_class_scores(metric, planes):
    """What stands in for Triton's kernel, in float64 against autograd; more pixels than it takes at a time."""
    x = torch.randn(2, 6, 50, 45, dtype=torch.float64) if planes else torch.randn(4500, 6, dtype=torch.float64)
    p, labels = torch.randn(4, 3, 6, dtype=torch.float64), torch.randint(-1, 5, (4500,))
    leaves = x.requires_grad_(), p.requires_grad_()
    kept = torch.where(labels < 4, labels, -1)
    scores, winner, own = reference.class_scores(ScoresCall(*leaves, kept, metric, "reference"))
    grad_scores, grad_own = torch.randn_like(scores), torch.randn_like(own)
    expected = torch.autograd.grad((scores * grad_scores).sum() + (own * grad_own).sum(), leaves)
    before = torch.randn_like(x)
    grad_x, grad_p = before.clone(), torch.empty_like(p)
    with torch.no_grad():
        call = ScoresBackwardCall(x, p, labels, metric, winner, grad_scores, grad_own, True, "reference")
        reference.class_scores_backward(call, ScoresBackwardOut(grad_x, grad_p))
    torch.testing.assert_close(grad_x - before, expected[0])
    torch.testing.assert_close(grad_p, expected[1])


def test_a_missing_barrier_changes_the_result_in_some_order():
    module = load("_checks")
    results = []
    for order in ORDERS:
        module.configure(order)
        results.append(np.array_equal(module.missing_barrier(), 31 - np.arange(32)))
    assert not any(results)


def test_a_copy_that_was_not_waited_for_has_not_arrived(checks):
    assert checks.early_read() != 7
