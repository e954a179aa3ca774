"""Which backend runs, and why: the resolver, the user's choices and the forced instruction sets."""

import inspect
import os
import subprocess
import sys
import sysconfig
import threading
from pathlib import Path

import pytest
import torch

from dnc_kernels import backends, ops, use_backend, use_isa
from dnc_kernels.backends import Kernel, Resolution, pick, resolve

WITHOUT_CUDA = not torch.cuda.is_available()


@pytest.fixture
def fake_kernels(monkeypatch):
    """An op of every kind, on a machine where every backend is usable."""
    table = {
        "both": {"cpu": Kernel("cpu"), "cuda": Kernel("cuda")},
        "unproven": {"cuda": Kernel("cuda", proven=False)},
        "single": {"cpu": Kernel("cpu", dtypes=(torch.float32,))},
        "none": {},
    }
    monkeypatch.setattr(backends, "KERNELS", table)
    monkeypatch.setattr(backends, "unusable", lambda backend: "")


def run_python(code: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, env={**os.environ, **environment}
    )


@pytest.mark.parametrize(
    ("op", "device", "dtype", "choice", "backend"),
    [
        ("both", "cpu", torch.float32, "auto", "cpu"),
        ("both", "cuda", torch.float32, "auto", "cuda"),
        ("both", "cuda", torch.bfloat16, "auto", "cuda"),
        ("both", "cpu", torch.float64, "auto", "cpu"),
        ("both", "cpu", torch.float32, "cpu", "cpu"),
        ("both", "cpu", torch.float32, "reference", "reference"),
        ("both", "cuda", torch.float32, "reference", "reference"),
        ("both", "meta", torch.float32, "auto", "reference"),
        ("unproven", "cuda", torch.float32, "auto", "reference"),
        ("unproven", "cuda", torch.float32, "cuda", "cuda"),
        ("single", "cpu", torch.float32, "auto", "cpu"),
        ("single", "cpu", torch.float16, "auto", "reference"),
        ("single", "cuda", torch.float32, "auto", "reference"),
        ("none", "cpu", torch.float32, "auto", "reference"),
        ("none", "cpu", torch.float32, "reference", "reference"),
    ],
)
def test_table_of_choices(fake_kernels, op, device, dtype, choice, backend):
    assert resolve(op, device, dtype, choice).backend == backend


@pytest.mark.parametrize(
    ("op", "device", "dtype", "choice", "why"),
    [
        ("none", "cpu", torch.float32, "cpu", "none has no cpu kernel"),
        ("both", "cuda", torch.float32, "cpu", "the cpu backend runs on cpu tensors, not cuda"),
        ("both", "cpu", torch.float32, "cuda", "the cuda backend runs on cuda tensors, not cpu"),
        ("single", "cpu", torch.bfloat16, "cpu", "the cpu kernel does not take bfloat16"),
    ],
)
def test_a_named_backend_that_cannot_run_raises_and_says_why(fake_kernels, op, device, dtype, choice, why):
    with pytest.raises(RuntimeError, match=f"^{op}: backend '{choice}' was asked for but cannot run: {why}"):
        resolve(op, device, dtype, choice)


@pytest.mark.parametrize(
    ("op", "device", "dtype", "reason"),
    [
        ("both", "cpu", torch.float32, "first usable kernel for cpu"),
        ("unproven", "cuda", torch.float32, "no GPU has proven the cuda kernel yet; ask for it by name"),
        ("single", "cpu", torch.float16, "the cpu kernel does not take float16"),
        ("none", "cpu", torch.float32, "none has only its reference"),
    ],
)
def test_auto_gives_its_reason(fake_kernels, op, device, dtype, reason):
    assert resolve(op, device, dtype).reason == reason


def test_reasons_against_every_kernel_are_given(fake_kernels):
    reason = resolve("both", "meta", torch.float32).reason
    assert "the cpu backend runs on cpu tensors, not meta" in reason
    assert "the cuda backend runs on cuda tensors, not meta" in reason


def test_a_choice_by_name_says_so(fake_kernels):
    assert resolve("both", "cpu", torch.float32, "cpu") == Resolution("cpu", "chosen by name")


def test_an_unusable_backend_is_passed_over_with_its_reason(fake_kernels, monkeypatch):
    monkeypatch.setattr(backends, "unusable", lambda backend: "it rains" if backend == "cpu" else "")
    assert resolve("both", "cpu", torch.float32).backend == "reference"
    assert "it rains" in resolve("both", "cpu", torch.float32).reason


def test_the_resolver_reads_no_environment(fake_kernels, monkeypatch):
    monkeypatch.setenv("DNC_KERNELS_BACKEND", "reference")
    assert resolve("both", "cpu", torch.float32).backend == "cpu"


@pytest.mark.parametrize("choice", ["gpu", "", "CPU"])
def test_an_unknown_backend_is_a_value_error(choice):
    with pytest.raises(ValueError, match="cluster_sums: backend must be one of auto, reference, cpu, triton, cuda"):
        resolve("cluster_sums", "cpu", torch.float32, choice)
    with pytest.raises(ValueError, match="backend must be one of"), use_backend(choice):
        pass


def test_the_argument_beats_the_block_beats_auto():
    x = torch.zeros(1, 2)
    assert pick("cluster_sums", x, None) == "cpu"
    with use_backend("reference"):
        assert pick("cluster_sums", x, None) == "reference"
        assert pick("cluster_sums", x, "cpu") == "cpu"
        assert pick("cluster_sums", x, "auto") == "cpu"
    assert pick("cluster_sums", x, None) == "cpu"


def test_blocks_nest_and_restore_after_an_error():
    before = backends.chosen()
    with use_backend("reference"):
        with pytest.raises(KeyError), use_backend("cpu"):
            assert backends.chosen() == "cpu"
            raise KeyError
        assert backends.chosen() == "reference"
    assert backends.chosen() == before


def test_a_refused_block_changes_nothing():
    before = backends.chosen()
    with pytest.raises(ValueError), use_backend("nonsense"):
        pass
    assert backends.chosen() == before


@pytest.mark.skipif(backends.native().cuda_archs is not None, reason="this build has CUDA kernels")
def test_cuda_in_a_cpu_build_names_the_missing_build():
    with pytest.raises(RuntimeError, match=r"no CUDA kernels .*DNC_KERNELS_BUILD=cuda"):
        resolve("momentum_update_", "cuda", torch.float32, "cuda")


def test_a_missing_extension_is_the_reason(monkeypatch):
    monkeypatch.setattr(backends, "_native", None)
    monkeypatch.setattr(backends, "NATIVE_ERROR", "the extension dnc_kernels._C cannot be imported: no such file")
    monkeypatch.setattr(backends, "UNUSABLE", backends._probe())
    assert resolve("cluster_sums", "cpu", torch.float32).backend == "reference"
    with pytest.raises(RuntimeError, match="_C cannot be imported: no such file"):
        resolve("cluster_sums", "cpu", torch.float32, "cpu")
    with pytest.raises(RuntimeError, match="pip install"):
        backends.native()


def test_every_public_op_is_in_the_table_and_takes_backend():
    functions = {name for name in ops.__all__ if inspect.isfunction(getattr(ops, name))}
    assert functions == set(backends.KERNELS) - {"head_step"}  # a training step is no function of its own
    for name in functions:
        parameter = inspect.signature(getattr(ops, name)).parameters["backend"]
        assert parameter.kind is parameter.KEYWORD_ONLY and parameter.default is None, name


@pytest.mark.parametrize("op", sorted(backends.KERNELS))
def test_auto_always_finds_a_backend(op):
    for device in ("cpu", "cuda", "meta"):
        for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
            found = resolve(op, device, dtype)
            assert found.backend in backends.BACKENDS and found.reason


def test_the_environment_variable_sets_the_choice():
    code = "from dnc_kernels import backends; print(backends.chosen())"
    assert run_python(code, DNC_KERNELS_BACKEND="reference").stdout.split() == ["reference"]
    assert run_python(code, DNC_KERNELS_BACKEND="").stdout.split() == ["auto"]


@pytest.mark.parametrize(
    ("name", "value"), [("DNC_KERNELS_BACKEND", "gpu"), ("DNC_KERNELS_CPU_ISA", "sse")], ids=["backend", "isa"]
)
def test_a_wrong_environment_variable_fails_at_import(name, value):
    result = run_python("import dnc_kernels", **{name: value})
    assert result.returncode != 0
    assert "must be one of" in result.stderr and repr(value) in result.stderr


def test_the_environment_variable_forces_the_instruction_set():
    code = "from dnc_kernels import backends; print(backends.cpu_isa())"
    assert run_python(code, DNC_KERNELS_CPU_ISA="portable").stdout.split() == ["portable"]


@pytest.mark.skipif("DNC_KERNELS_CPU_ISA" in os.environ, reason="DNC_KERNELS_CPU_ISA is set")
def test_the_best_instruction_set_is_the_default():
    assert backends.cpu_isa() == backends.usable_isas()[-1]


def test_instruction_sets_nest_and_restore():
    before = backends.cpu_isa()
    with use_isa("portable"):
        assert backends.cpu_isa() == "portable"
        with use_isa(backends.usable_isas()[-1]):
            assert backends.cpu_isa() == backends.usable_isas()[-1]
        assert backends.cpu_isa() == "portable"
    assert backends.cpu_isa() == before


def test_an_unknown_instruction_set_is_a_value_error():
    with (
        pytest.raises(ValueError, match=r"instruction set must be one of portable, avx2, avx512, amx; got 'sse'"),
        use_isa("sse"),
    ):
        pass


def test_an_instruction_set_beyond_the_processor_is_refused(monkeypatch):
    class OldProcessor:
        best_isa = current_isa = staticmethod(lambda: 0)
        set_isa = staticmethod(lambda isa: isa == 0)

    monkeypatch.setattr(backends, "_native", OldProcessor)
    assert backends.usable_isas() == ("portable",)
    with pytest.raises(RuntimeError, match="this processor cannot run avx512; usable: portable"), use_isa("avx512"):
        pass


def test_portable_is_always_usable():
    assert backends.usable_isas()[0] == "portable"


@pytest.mark.gpu
@pytest.mark.skipif(WITHOUT_CUDA, reason="needs a CUDA device")
def test_the_momentum_update_runs_on_a_gpu_with_auto():
    x = torch.randn(64, 8, device="cuda")
    cluster = torch.arange(64, device="cuda") % 6
    centroids = torch.nn.functional.normalize(torch.randn(2, 3, 8, device="cuda"), dim=2)
    expected = centroids.double().cpu()
    ops.momentum_update_(expected, x.double().cpu(), cluster.cpu(), backend="reference")
    ops.momentum_update_(centroids, x, cluster)
    torch.testing.assert_close(centroids.cpu().double(), expected, atol=1e-5, rtol=0)


def test_eight_threads_choose_for_themselves():
    """`use_backend` is a matter of the thread, and the kernels of several run at once."""
    x, p, y = torch.randn(200, 16), torch.randn(5, 3, 16), torch.randint(0, 5, (200,))
    names = ["cpu", "reference"] * 4 if not backends.unusable("cpu") else ["reference", "auto"] * 4
    together, failures = threading.Barrier(len(names)), []
    expected = ops.centroid_cross_entropy(x, p, y, backend="reference").loss

    def run(name):
        try:
            together.wait()
            for _ in range(20):
                with use_backend(name):
                    own = x.clone().requires_grad_()
                    loss = ops.centroid_cross_entropy(own, p, y).loss
                    assert backends.chosen() == name
                    assert (loss.grad_fn.name() == "_DifferentiableBackward") == (name == "cpu")
                loss.backward()
                torch.testing.assert_close(loss, expected)
                assert own.grad.abs().sum() > 0 and backends.chosen() == "auto"
        except BaseException as error:
            failures.append((name, error))

    threads = [threading.Thread(target=run, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_compiled_function_follows_the_choice():
    x, p = torch.randn(6, 4), torch.randn(3, 2, 4)
    graphs = []

    def keep(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x, p: ops.nearest_centroid(x, p).score, fullgraph=True, backend=keep)
    first = compiled(x, p)
    with use_backend("reference"):
        torch.testing.assert_close(compiled(x, p), first)
    targets = [{str(n.target) for n in g.graph.nodes} for g in graphs]
    assert len(targets) == 2 and any("dnc_kernels" in t for t in targets[0]) and not any("dnc_kernels" in t for t in targets[1])


@pytest.mark.skipif(bool(backends.unusable("cpu")), reason="needs the extension")
def test_the_extension_does_not_bring_the_gil_back():
    """Python 3.13t and 3.14t switch it on for a module that does not say that it needs none."""
    script = "import sys, torch, dnc_kernels._C; sys.exit(int(getattr(sys, '_is_gil_enabled', lambda: False)()))"
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        source = (Path(__file__).parents[1] / "csrc" / "bindings.cpp").read_text()
        assert "py::mod_gil_not_used()" in source
        return
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
