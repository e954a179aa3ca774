"""docs/deployment.md: every block runs as it stands, in a process of its own, and gives what the network gives in eager mode."""

import copy
import io
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dnc_kernels import nn, use_backend

pytestmark = pytest.mark.usefixtures("one_thread")

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "deployment.md").read_text()
#: Code of every block by the file name in its first line.
BLOCKS = {re.match(r"(?:#|//) (\S+)\n", code)[1]: code for code in re.findall(r"```\w+\n(.*?)```", PAGE, re.DOTALL)}

#: The labels of a block against those of the network in eager mode. Compilers add up in another order: classes that are equal up to
#: rounding may change places.
SAME = """
from segmenter import trained as _trained
_expected = _trained()(images)
_actual = torch.as_tensor({labels})
assert _actual.shape == _expected.shape and _actual.dtype == torch.int64
assert len(_expected.unique()) > 2
assert (_actual == _expected).double().mean() > {share}, (_actual == _expected).double().mean()
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """weights.pt of the page's network, after some steps of training."""
    scope = {}
    exec(BLOCKS["segmenter.py"], scope)
    torch.manual_seed(0)
    network = scope["Segmenter"]()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    for _ in range(5):
        images = torch.randn(2, 3, 32, 48)
        optimizer.zero_grad()
        network.head.loss(network.backbone(images), (images[:, 0] > 0) * 2 + (images[:, 1] > 0) * 1).loss.backward()
        optimizer.step()
    path = tmp_path_factory.mktemp("weights") / "weights.pt"
    torch.save(network.state_dict(), path)
    return path


@pytest.fixture
def folder(tmp_path, weights):
    shutil.copy(weights, tmp_path)
    (tmp_path / "segmenter.py").write_text(BLOCKS["segmenter.py"])
    return tmp_path


def run(folder, name, check="", **environment):
    """Run a block of the page; what it prints."""
    (folder / name).write_text(BLOCKS[name] + check)
    command = [sys.executable, name] if name.endswith(".py") else ["bash", "-e", name]
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
        "OMP_NUM_THREADS": "1",
        **environment,
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def same(labels="labels", share=0.999):
    return SAME.format(labels=labels, share=share)


def test_every_block_of_the_page_has_its_test():
    source = Path(__file__).read_text()
    assert len(BLOCKS) == PAGE.count("```") // 2
    assert [name for name in BLOCKS if f'"{name}"' not in source] == []


def test_eager_and_compiled_inference(folder):
    run(folder, "serve.py", same() + same("compiled"))


def test_an_exported_program_is_saved_and_loaded(folder):
    run(folder, "export.py", same("program.module()(images)"))
    run(folder, "load.py", same())
    without_the_package = "import torch; torch.export.load('segmenter.pt2')"
    done = subprocess.run([sys.executable, "-c", without_the_package], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "dnc_kernels" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
def test_packages_run_in_python_and_that_of_the_reference_in_libtorch_alone(folder):
    run(folder, "export.py")
    run(folder, "package.py", same())
    expected = run(folder, "package_reference.py", "print(trained()(torch.ones(3, 3, 80, 60)).sum().item())")
    (folder / "predict.cpp").write_text(BLOCKS["predict.cpp"])
    assert run(folder, "build.sh") == f"[3, 80, 60] {expected}"
    command = BLOCKS["build.sh"].splitlines()[-1].replace("libtorch.pt2", "kernels.pt2")
    with_kernels = f'torch="{Path(torch.__file__).parent}"; {command}'
    done = subprocess.run(["bash", "-c", with_kernels], cwd=folder, capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "dnc_kernels" in done.stderr


class PredictsAll(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.classifier = nn.DNCHead(8, 5, 2), nn.DNCClassifier(8, 5, 2)
        self.released = nn.DNCClassifier(8, 5, 2, recipe="released")

    def forward(self, features, images, rows):
        labels = self.head.predict(features, size=images.shape[2:])
        return labels, self.classifier.predict(rows), self.released.predict(rows)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++")
@pytest.mark.filterwarnings("ignore")
def test_a_package_of_predictions_runs_at_other_sizes(tmp_path):
    def inputs(batch, size, image_size):
        return torch.randn(batch, 8, *size), torch.randn(batch, 3, *image_size), torch.randn(3 * batch - 2, 8)

    network = PredictsAll().eval().requires_grad_(False)
    dynamic = torch.export.Dim.DYNAMIC
    sizes = {0: dynamic, 2: dynamic, 3: dynamic}
    program = torch.export.export(network, inputs(2, (4, 6), (16, 24)), dynamic_shapes=(sizes, sizes, {0: dynamic}))
    package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "predict.pt2"))
    loaded = torch._inductor.aoti_load_package(package)
    for other in ((1, (5, 3), (11, 9)), (3, (4, 6), (4, 6))):
        given = inputs(*other)
        for actual, expected in zip(loaded(*given), network(*given), strict=True):
            # another order of additions may decide a tie
            assert actual.shape == expected.shape and (actual == expected).double().mean() > 0.99


@pytest.mark.slow
def test_onnx_runtime_gives_the_same_labels(folder):
    pytest.importorskip("onnxscript")
    pytest.importorskip("onnxruntime")
    check = """
import onnx
graph = onnx.load("segmenter.onnx")
assert [(o.domain, o.version) for o in graph.opset_import] == [("", 20)] and not graph.functions
kinds = [node.op_type for node in graph.graph.node]
assert 90 < len(kinds) < 130 and kinds.count("MatMul") == kinds.count("ReduceMax") == kinds.count("ArgMax") == 1
assert {"Gather"} <= set(kinds) and "Resize" not in kinds and not any(node.domain for node in graph.graph.node)
assert [d.dim_param for d in graph.graph.output[0].type.tensor_type.shape.dim] == ["batch", "height", "width"]
"""
    run(folder, "to_onnx.py", same() + check)


def test_half_precision(folder):
    assert run(folder, "half.py", same(share=0.98)).count("torch.float32") == 2
    torch.manual_seed(0)
    head, x = nn.DNCHead(16, 5, embed_channels=8).eval(), torch.randn(2, 16, 24, 32)
    logits = head(x)
    for dtype, share in ((torch.float16, 0.002), (torch.bfloat16, 0.02)):
        narrow = copy.deepcopy(head).to(dtype)
        assert narrow.prototypes.dtype == torch.float32 and narrow.feat_norm.weight.dtype == dtype
        made = narrow(x.to(dtype))
        assert made.dtype == torch.float32
        assert (made - logits).abs().max() < share * logits.abs().max()
        with torch.autocast("cpu", dtype):
            assert (head(x) - logits).abs().max() < share * logits.abs().max()


@pytest.mark.filterwarnings("ignore")
def test_dynamic_quantisation_leaves_the_head_alone():
    quantization = pytest.importorskip("torch.ao.quantization")
    if torch.backends.quantized.engine == "none":
        pytest.skip("torch has no quantised kernels for this machine")
    network = torch.nn.Sequential(torch.nn.Linear(8, 8), nn.DNCClassifier(8, 5)).eval()
    quantised = quantization.quantize_dynamic(network)
    assert "Quantized" in str(quantised[0])
    x = torch.randn(4, 8)
    assert torch.equal(quantised[1](x), network[1](x))
    assert quantised(x).isfinite().all()


class Predicts(torch.nn.Module):
    def __init__(self, head):
        super().__init__()
        self.head = head

    def forward(self, features):
        return self.head.predict(features, size=(48, 64))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_torchscript_traces_a_head_and_cannot_script_it(backend):
    head = nn.DNCHead(8, 5).eval().requires_grad_(False)
    for module in (head, Predicts(head)):
        with use_backend(backend):
            traced = torch.jit.trace(module, torch.randn(2, 8, 12, 16))
            file = io.BytesIO()
            torch.jit.save(traced, file)
            file.seek(0)
            loaded = torch.jit.load(file)
            for shape in ((2, 8, 12, 16), (3, 8, 20, 24)):
                x = torch.randn(shape)
                assert torch.equal(loaded(x), module(x))
        assert ("dnc_kernels::" in str(traced.inlined_graph)) == (backend == "auto")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError)):
        torch.jit.script(head)
