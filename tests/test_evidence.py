"""What makes `auto` choose a CUDA C++ kernel: limits as data, a proof of the very source, and measured rows."""

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch._subclasses import FakeTensorMode

from benchmarks import __main__ as benches
from benchmarks import aot_cuda, carry, dispatch, harness, prove
from benchmarks.case import Settings, dtype_of
from benchmarks.families import CUDA_FAMILIES, cuda_tests, source
from dnc_kernels import _evidence, backends, ops
from dnc_kernels._evidence import Measured, Proof
from dnc_kernels.backends import Kernel, resolve

ROOT = Path(__file__).resolve().parent.parent
HOPPER = {"capability": (9, 0)}
HALVES = (torch.float16, torch.bfloat16)
# what the matrix units ask for
PRODUCT = Kernel(
    "cuda", HALVES, proven=False, capability=(8, 0), max_subcentroids=32, max_channels=768, channel_multiple=8,
    layouts=("rows",),
)  # fmt: skip
SIZES = {"N": 16384, "C": 150, "K": 10, "D": 256}
PROOF = Proof("similarity", "0" * 64, "NVIDIA H100", (9, 0), 40, "abc", "2026-01-01")


@pytest.fixture
def gpu(monkeypatch):
    """`class_scores` with a Triton and a CUDA C++ kernel on a machine where both run; no proof, no measurement."""
    monkeypatch.setitem(backends.KERNELS, "class_scores", {"triton": backends._TRITON, "cuda": PRODUCT})
    monkeypatch.setattr(backends, "unusable", lambda backend: "")
    monkeypatch.setattr(backends, "without_code", lambda name, capability: "")
    monkeypatch.setattr(backends, "PROOFS", {})
    monkeypatch.setattr(backends, "DISPATCH", {})
    return monkeypatch


def scores(**options):
    return resolve("class_scores", "cuda", torch.bfloat16, **{**HOPPER, **SIZES, "layout": "rows", **options})


# limits


@pytest.mark.parametrize(
    ("asked", "why"),
    [
        ({"dtype": torch.float32}, "the cuda kernel does not take float32"),
        ({"capability": (7, 5)}, "the cuda kernel needs compute capability 8.0, this GPU has 7.5"),
        ({"K": 33}, "the cuda kernel takes at most 32 sub-centroids a class, not 33"),
        ({"D": 776}, "the cuda kernel takes at most 768 channels, not 776"),
        ({"D": 252}, "the cuda kernel takes channels in groups of 8, not 252"),
        ({"layout": "planes"}, "the cuda kernel takes pixels as rows of 16-byte units"),
        ({"layout": "strided"}, "the cuda kernel takes pixels as rows of 16-byte units"),
    ],
)
def test_a_limit_is_a_reason(gpu, asked, why):
    call = {"dtype": torch.bfloat16, "layout": "rows", **HOPPER, **SIZES}
    assert resolve("class_scores", "cuda", choice="cuda", **call).backend == "cuda"
    assert scores(choice="cuda", K=32, D=768, capability=(8, 0)).backend == "cuda", "at its limits"
    with pytest.raises(RuntimeError, match=f"class_scores: backend 'cuda' was asked for but cannot run: {why}"):
        resolve("class_scores", "cuda", choice="cuda", **{**call, **asked})


def test_a_kernel_of_one_architecture_names_it(gpu):
    gpu.setitem(backends.KERNELS["class_scores"], "cuda", replace(PRODUCT, capabilities=((9, 0), (10, 0))))
    assert scores(choice="cuda").backend == "cuda"
    with pytest.raises(RuntimeError, match=r"is for compute capability 9\.0 or 10\.0, this GPU has 12\.0"):
        scores(choice="cuda", capability=(12, 0))


def test_a_call_states_its_sizes_and_layout():
    """`pick` gives the resolver what kernels have limits on, for every op."""
    seen = {}

    def look(op, device, dtype, choice, *, capability, layout, **sizes):
        seen[op] = {"layout": layout, **sizes}
        return backends.Resolution("reference", "")

    x, p = torch.randn(2, 8, 3, 5), torch.randn(4, 6, 8)
    label = torch.zeros(30, dtype=torch.int64)
    map_of_labels = label.view(2, 3, 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backends, "resolve", look)
        for op in backends.KERNELS.keys() - {"head_step"}:
            patch.setitem(backends.KERNELS, op, {"cuda": replace(PRODUCT, device="cpu", proven=True)})
        ops.centroid_distance(x, p)
        ops.class_scores(x.contiguous(memory_format=torch.channels_last), p)
        ops.nearest_centroid(x, p)
        ops.centroid_cross_entropy(x, p, map_of_labels)
        ops.subcentroid_cross_entropy(x, p, map_of_labels)
        ops.sinkhorn_assign(torch.randn(30, 6), label, 4)
        ops.sinkhorn_plan(torch.randn(30, 6), label, 4)
        ops.cluster_sums(x, label, 24)
        ops.momentum_update_(p, x, label)
        ops.apply_momentum_(p, torch.zeros(24, 8), label[:24])
        ops.normalize_embedding(x)
        ops.upsample_cross_entropy(x, torch.zeros(2, 9, 10, dtype=torch.int64))
        ops.upsample_argmax(x, (9, 10))
    assert seen.keys() == backends.KERNELS.keys() - {"head_step"}  # made of these
    similarity = {"N": 30, "C": 4, "K": 6, "D": 8, "layout": "strided"}
    for op in (
        "centroid_distance",
        "nearest_centroid",
        "centroid_cross_entropy",
        "subcentroid_cross_entropy",
        "momentum_update_",
    ):
        assert seen[op] == similarity, op
    assert seen["class_scores"] == {**similarity, "layout": "rows"}
    assert seen["sinkhorn_assign"] == seen["sinkhorn_plan"] == {**similarity, "D": 6}
    assert seen["apply_momentum_"].items() >= {"N": 24, "D": 8}.items()
    assert seen["cluster_sums"] == seen["normalize_embedding"] == {"N": 30, "D": 8, "layout": "strided"}
    for op in ("upsample_cross_entropy", "upsample_argmax"):
        assert seen[op].items() >= {"N": 180, "C": 8}.items(), op


def strided(shape, strides, dtype=torch.bfloat16):
    size = 1 + sum((n - 1) * s for n, s in zip(shape, strides, strict=True))
    return torch.empty(size, dtype=dtype).as_strided(shape, strides)


@pytest.mark.parametrize(
    ("shape", "strides", "expected"),
    [
        ((5, 16), (16, 1), "rows"),
        ((5, 16), (24, 1), "rows"),  # a slice of wider rows
        ((5, 16), (20, 1), "strided"),  # rows of 40 bytes
        ((5, 16), (0, 1), "strided"),  # expanded
        ((2, 16, 2, 4), (128, 8, 4, 1), "planes"),  # planes
        ((2, 16, 1, 8), (256, 16, 0, 1), "planes"),  # some lines of them
        ((5, 16), (32, 2), "strided"),
        ((5, 16), (1, 5), "strided"),
        ((2, 16, 3, 4), (192, 1, 64, 16), "rows"),  # channels_last
        ((2, 16, 3, 4), (192, 12, 4, 1), "strided"),
        ((2, 16, 3, 4), (320, 1, 80, 16), "strided"),  # a crop
        ((1, 16, 3, 4), (999, 1, 64, 16), "rows"),  # one sample
        ((2, 16, 1, 4), (64, 1, 999, 16), "rows"),  # one row
        ((2, 16, 3, 4), (384, 1, 64, 16), "strided"),  # every other sample
        ((2, 16, 1, 1), (16, 1, 1, 1), "strided"),  # the stride of a single column says nothing
    ],
)
def test_the_layout_of_pixels(shape, strides, expected):
    assert backends.layout(strided(shape, strides)) == expected


def test_units_count_bytes():
    assert backends.layout(strided((5, 16), (20, 1), torch.float32)) == "rows"
    assert backends.layout(strided((5, 16), (18, 1), torch.float32)) == "strided"
    assert backends.layout(torch.zeros(2, 3, 8)) == "strided"


# proof


def test_auto_passes_over_a_kernel_that_no_gpu_has_proven(gpu):
    gpu.setitem(backends.KERNELS, "class_scores", {"cuda": PRODUCT})
    assert scores().backend == "reference"
    assert scores().reason == "no GPU of compute capability 9.0 has proven the cuda kernel yet; ask for it by name"
    assert scores(choice="cuda").backend == "cuda"
    gpu.setattr(backends, "PROOFS", {("similarity", (9, 0)): PROOF})
    assert scores().backend == "cuda"
    assert scores(capability=(8, 0)).backend == "reference", "another architecture has to prove it itself"
    assert resolve("class_scores", "cuda", torch.bfloat16).backend == "reference", "an unknown GPU proves nothing"


def test_a_proof_holds_for_its_source_alone():
    later = replace(PROOF, device="NVIDIA H200", date="2026-02-01")
    other = replace(PROOF, family="momentum")
    found = _evidence.valid([PROOF, later, other], {"similarity": PROOF.source, "momentum": "1" * 64})
    assert found == {("similarity", (9, 0)): later}
    assert _evidence.valid([PROOF], {}) == {}


def copy_of_sources(folder):
    for name in ("cuda", "include"):
        shutil.copytree(ROOT / "csrc" / name, folder / "csrc" / name)
    return folder


def test_the_hash_of_a_family_follows_its_own_and_the_shared_files(tmp_path):
    root = copy_of_sources(tmp_path)
    before = {f: source(f, root) for f in CUDA_FAMILIES}
    assert before == {f: source(f) for f in CUDA_FAMILIES} and len(set(before.values())) == 5

    def changed():
        return {f for f in CUDA_FAMILIES if source(f, root) != before[f]}

    path = root / "csrc" / "cuda" / "momentum.cu"
    text = path.read_bytes()
    path.write_bytes(text.replace(b"\n", b"\r\n"))
    assert changed() == set()
    path.write_bytes(text + b"// changed")
    assert changed() == {"momentum"}
    path.write_bytes(text)
    (root / "csrc" / "cuda" / "similarity_wgmma.cu").write_text("new")
    assert changed() == {"similarity"}
    (root / "csrc" / "cuda" / "ptx.h").write_text("new")
    assert changed() == set(CUDA_FAMILIES)


@pytest.mark.skipif(backends.native().cuda_archs is None, reason="a build without CUDA kernels has no sources")
def test_the_build_states_the_same_hashes():
    built = Path(backends.native().__file__).stat().st_mtime
    if any(p.stat().st_mtime > built for name in ("cuda", "include/dnc") for p in (ROOT / "csrc" / name).iterdir()):
        pytest.skip("sources are newer than the build")
    assert backends.native().cuda.sources == {f: source(f) for f in CUDA_FAMILIES}


def test_every_op_has_a_family_and_every_kernel_its_tests():
    families = {op: f for f in CUDA_FAMILIES for op in __import__(f"dnc_kernels.ops.{f}", fromlist=["x"]).__all__}
    families["head_step"] = "head"
    assert {op: families[op] for op in backends.KERNELS} == backends.FAMILY
    for op, kernels in backends.KERNELS.items():
        assert "cuda" not in kernels or cuda_tests(backends.FAMILY[op]), op
    found = {path for f in CUDA_FAMILIES for path in cuda_tests(f)}
    assert found == {path for name in ("cuda", "gpu") for path in (ROOT / "tests").glob(f"test_*_{name}.py")}


def test_tests_of_both_backends_ask_for_each():
    """Without the fixture a test has no mark, and no run on a GPU takes it."""
    for path in (ROOT / "tests").glob("test_*_gpu.py"):
        for name, arguments in re.findall(r"^def (test_\w+)\((.*?)\):", path.read_text(), re.MULTILINE | re.DOTALL):
            assert re.search(r"\bbackend\b", arguments), f"{path.name}: {name}"


def test_stored_proofs_and_choices_are_whole():
    for proof in _evidence.read_proofs():
        assert proof.family in CUDA_FAMILIES and len(proof.source) == 64 and proof.tests > 0 and proof.device
    for (op, _), entries in _evidence.read_dispatch().items():
        assert op in backends.KERNELS
        for entry in entries:
            assert entry.backend in backends.KERNELS[op] and entry.when.keys() <= {"N", "C", "K", "D", "bits", "layout"}
            for row in entry.rows.split():
                file, _, line = row.rpartition(":")
                assert json.loads((ROOT / file).read_text().splitlines()[int(line) - 1])["op"] == op


def test_rows_of_proof_are_kept_and_replaced(tmp_path):
    path = tmp_path / "proofs.json"
    path.write_text("[]\n")
    prove.add([], path)
    assert path.read_text() == "[]\n"
    other = replace(PROOF, family="momentum")
    prove.add([PROOF, other], path)
    again = replace(PROOF, tests=50, date="2026-02-01")
    newer = replace(PROOF, source="1" * 64)
    prove.add([again, newer], path)
    assert set(_evidence.read_proofs(path)) == {other, again, newer}


@pytest.mark.slow
def test_only_families_whose_tests_pass_are_proven(tmp_path, monkeypatch, capsys):
    bodies = {
        "momentum": "@cuda\ndef test_a(): pass\n@cuda\ndef test_b(): pass\n@triton\ndef test_c(): assert False",
        "sinkhorn": "@cuda\ndef test_a(): pass\n@cuda\ndef test_b(): assert False",
        "embedding": "import time\n@cuda\ndef test_a(): time.sleep(600)",
        "upsample": "@cuda\n@pytest.mark.large\ndef test_a(): pass",
    }
    marks = "import pytest\ncuda, triton = pytest.mark.cuda, pytest.mark.triton\n"
    for family, body in bodies.items():
        (tmp_path / f"test_{family}.py").write_text(marks + body)
    monkeypatch.setattr(prove, "cuda_tests", lambda family: [tmp_path / f"test_{family}.py"])
    monkeypatch.setattr(prove, "commit", lambda: "abc")
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    written = []
    monkeypatch.setattr(prove, "add", written.extend)
    sources = {family: source(family) for family in bodies}
    assert sorted(prove.prove(["momentum", "sinkhorn", "upsample"], sources)) == [False, False, True]
    assert prove.prove(["embedding"], sources, seconds=30) == [False]
    (proof,) = written
    assert (proof.family, proof.tests, proof.source, proof.commit) == ("momentum", 2, sources["momentum"], "abc")
    printed = capsys.readouterr().out
    assert (
        "momentum: proven by 2 tests on NVIDIA H100 (9.0)" in printed
        and "sinkhorn: not proven: 1 of its 2 tests failed" in printed
    )
    assert "embedding: not proven: 1 of its 1 tests failed" in printed and "upsample: not proven: " in printed


@pytest.mark.skipif(torch.cuda.is_available(), reason="for a machine without a GPU")
def test_without_a_gpu_nothing_is_proven(capsys):
    assert prove.main([]) == 1
    assert "only a GPU can prove a kernel" in capsys.readouterr().err


def test_code_for_another_gpu_is_no_code(monkeypatch):
    class Build:
        cuda_archs = "80-real 90a-real"

    monkeypatch.setattr(backends, "_native", Build)
    assert backends.without_code("cuda", (9, 0)) == "" == backends.without_code("cuda", None)
    why = backends.without_code("cuda", (12, 0))
    assert why == "this build has no code for compute capability 12.0 (it was built for 80-real 90a-real)"
    assert backends.without_code("triton", (12, 0)) == ""
    monkeypatch.setattr(backends, "unusable", lambda backend: "")
    with pytest.raises(RuntimeError, match=r"no code for compute capability 12\.0"):
        resolve("momentum_update_", "cuda", torch.float32, "cuda", capability=(12, 0))


# measured choices


def entries(*choices):
    return tuple(Measured(when, backend, f"rows.jsonl:{n}") for n, (when, backend) in enumerate(choices, 1))


@pytest.fixture
def measured(gpu):
    gpu.setattr(backends, "PROOFS", {("similarity", (9, 0)): PROOF})
    small, large = {"C": 19, "D": 256, "bits": 16, "layout": "rows"}, {"C": 150, "D": 256, "bits": 16, "layout": "rows"}
    found = entries(
        (small, "triton"), (large, "cuda"), ({**large, "bits": 32}, "triton"), ({**large, "layout": "planes"}, "triton")
    )
    gpu.setattr(backends, "DISPATCH", {("class_scores", (9, 0)): found})
    return gpu


def test_without_measurements_the_order_of_the_table_decides(gpu):
    gpu.setattr(backends, "PROOFS", {("similarity", (9, 0)): PROOF})
    assert scores().backend == "triton"


@pytest.mark.parametrize(
    ("classes", "backend", "row"), [(150, "cuda", 2), (100, "cuda", 2), (40, "triton", 1), (2, "triton", 1)]
)
def test_the_nearest_measured_class_decides(measured, classes, backend, row):
    found = scores(C=classes)
    assert (found.backend, found.reason) == (backend, f"measured faster in rows.jsonl:{row}")


def test_a_width_or_a_gpu_that_was_not_measured_decides_nothing(measured):
    assert scores(capability=(10, 0)).reason == "first usable kernel for cuda"
    measured.setattr(backends, "DISPATCH", {("class_scores", (9, 0)): entries(({"C": 150, "bits": 32}, "cuda"))})
    assert scores().backend == "triton"


def test_layouts_are_measured_apart(measured):
    measured.setitem(backends.KERNELS["class_scores"], "cuda", replace(PRODUCT, layouts=()))
    large = {"C": 150, "bits": 16}
    for layout, other in (("rows", "planes"), ("planes", "rows")):
        found = entries(({**large, "layout": other}, "triton"), ({**large, "layout": layout}, "cuda"))
        measured.setattr(backends, "DISPATCH", {("class_scores", (9, 0)): found})
        assert scores(layout=layout).backend == "cuda" and scores(layout=other).backend == "triton"


def test_a_layout_that_nobody_measured_takes_the_choice_of_another(measured):
    """Maps of 65 x 65 pixels are planes without 16-byte units, `strided` therefore."""
    x = torch.empty(2, 256, 65, 65, dtype=torch.bfloat16)
    assert backends.layout(x) == "strided"
    measured.setitem(backends.KERNELS["class_scores"], "cuda", replace(PRODUCT, layouts=()))
    assert scores(layout="strided", N=2 * 65 * 65).reason.startswith("measured faster in")


def test_a_measured_backend_still_needs_its_proof_and_its_limits(measured):
    assert scores(D=252).backend == "triton"
    measured.setattr(backends, "PROOFS", {})
    assert scores().backend == "triton"
    assert scores(choice="triton").reason == "chosen by name"


def test_the_choice_traces_with_symbolic_sizes(measured):
    """Under torch.compile(dynamic=True) sizes have no values; crossing a boundary compiles again and chooses anew."""

    def step(x, p):
        found = resolve("class_scores", "cuda", torch.bfloat16, capability=(9, 0), layout="rows", N=x.shape[0], C=p.shape[0], K=3, D=x.shape[1])  # fmt: skip
        return x * (2 if found.backend == "cuda" else 1)

    traced = torch.compile(step, backend="eager", fullgraph=True, dynamic=True)
    for n, classes, factor in ((5, 150, 2), (7, 140, 2), (7, 19, 1), (9, 11, 1)):
        assert traced(torch.ones(n, 256), torch.ones(classes, 3, 256)).eq(factor).all(), (n, classes)
    assert traced(torch.ones(9, 252), torch.ones(150, 3, 252)).eq(1).all(), "beyond a limit"


def row(backend, ms, **changes):
    return {
        "op": "nearest_centroid", "case": "ade20k", "kind": "kernel", "status": "ok", "dtype": "bfloat16", "cache": "cold",
        "shape_class": {**SIZES, "layout": "rows", "bits": 16}, "capability": "9.0", "backend": backend, "p50_ms": ms, **changes,
    }  # fmt: skip


def test_rows_become_choices(tmp_path, capsys):
    planes, scores = {"N": 30, "D": 64, "layout": "planes", "bits": 16}, {"N": 288, "C": 19, "bits": 32}
    rows = [
        row("triton", 2.0), row("cuda", 1.0), row("torch", 0.5, kind="baseline", shape_class=None),
        row("triton", 1.0, case="nchw", op="normalize_embedding", shape_class=planes),
        row("cuda", 2.0, case="nchw", op="normalize_embedding", shape_class=planes),
        row("triton", 1.0, op="upsample_argmax", shape_class=scores, dtype="float32"),
        row("cuda", None, status="failed", op="upsample_argmax", shape_class=scores, dtype="float32"),
        row("cpu", 1.0, capability=None), row("reference", 1.0, capability=None),
        row("cuda", 1.0, op="head_step", shape_class=None),
    ]  # fmt: skip
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "update", lambda found: [])
        assert dispatch.main([str(file)]) == 0
    assert "9.0 nearest_centroid" in capsys.readouterr().out
    folder = tmp_path / "dispatch"
    dispatch.update(dispatch.faster(dispatch.read([file])), folder)
    assert [p.name for p in folder.iterdir()] == ["sm_90.json"]
    found = _evidence.read_dispatch(folder)
    assert found.keys() == {("nearest_centroid", (9, 0)), ("normalize_embedding", (9, 0))}
    (nearest,), (embedding,) = found["nearest_centroid", (9, 0)], found["normalize_embedding", (9, 0)]
    assert nearest == Measured({**SIZES, "layout": "rows", "bits": 16}, "cuda", f"{file}:1 {file}:2")
    assert embedding.when == planes and embedding.backend == "triton"

    wide = {"dtype": "float32", "shape_class": {**SIZES, "layout": "rows", "bits": 32}}
    again = dispatch.faster([("a:1", row("triton", 0.1)), ("a:2", row("cuda", 0.2)), ("a:3", row("triton", 1.0, **wide)), ("a:4", row("cuda", 2.0, **wide))])  # fmt: skip
    dispatch.update(again, folder)
    found = _evidence.read_dispatch(folder)
    assert [(e.backend, e.when["bits"]) for e in found["nearest_centroid", (9, 0)]] == [("triton", 16), ("triton", 32)]
    assert ("normalize_embedding", (9, 0)) in found, "what was not measured again stays"


def test_capabilities_of_two_digits(tmp_path):
    dispatch.update(dispatch.faster([("a:1", row("triton", 1, capability="12.1")), ("a:2", row("cuda", 2, capability="12.1"))]), tmp_path)  # fmt: skip
    assert _evidence.read_dispatch(tmp_path).keys() == {("nearest_centroid", (12, 1))}


def test_rows_that_compare_nothing_decide_nothing(tmp_path, capsys):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row("triton", 1.0)) + "\n")
    assert dispatch.main([str(file)]) == 1
    assert "no case has rows of two backends on a GPU" in capsys.readouterr().err


def test_cases_of_one_class_decide_together():
    forward, both = [row("triton", 1.0), row("cuda", 2.0)], [row("triton", 9.0, case="train"), row("cuda", 7.0, case="train")]
    alone = row("cuda", 0.1, case="grad_scale")  # nothing to compare with
    found = dispatch.faster((f"a:{n}", r) for n, r in enumerate([*forward, *both, alone], 1))
    (entry,) = found["9.0"]["nearest_centroid"]
    assert entry["backend"] == "cuda" and entry["ms"] == {"triton": 10.0, "cuda": 9.0}
    assert sorted(entry["rows"].split()) == ["a:1", "a:2", "a:3", "a:4"]
    (entry,) = dispatch.faster([("a:1", r) for r in (*forward, row("cuda", 0.5))])["9.0"]["nearest_centroid"]
    assert entry["backend"] == "cuda", "the last time of a case counts"


# from rows to calls


@pytest.fixture(scope="module")
def measured_cases():
    """Every case in small, run here: (case, row of a kernel), in 16 bits and in 32."""
    settings = Settings(
        threads=1, rounds=1, quick=True, baselines="none", memory=False, dtypes=("bfloat16", "float32")
    )  # fmt: skip
    return [
        (case, row)
        for case in benches.select(settings)
        if case.op in backends.KERNELS.keys() - {"head_step"}
        for row in harness.run_case(case, settings)
    ]


def rows_of_a_gpu(measured_cases, fastest):
    """What the two backends of an H100 would have written."""
    for case, row in measured_cases:
        assert row["status"] == "ok", row
        when = dict(row["shape_class"])
        layout, _ = when.pop("layout", None), when.pop("bits")
        for name in ("triton", "cuda"):
            kernel = backends.KERNELS[case.op].get(name)
            if kernel and not kernel.refuses(name, dtype_of(case.dtype), (9, 0), layout, when):
                yield {**row, "capability": "9.0", "cache": "cold", "backend": name, "p50_ms": 1.0 if name == fastest else 2.0}


def call(op, n, c, k, d, dtype, planes):
    """`op` on n pixels (a multiple of 16; labels or scores of them) of d channels."""

    def empty(*shape, dtype=dtype, **options):
        return torch.empty(shape, dtype=dtype, device="cuda", **options)

    x = empty(1, d, n // 16, 16) if planes else empty(n, d)
    labels, p = empty(*((1, n // 16, 16) if planes else (n,)), dtype=torch.int64), empty(c, k, d)
    scores, rows = empty(1, c, n // 16, 4), empty(c, k, d, dtype=torch.float32)
    {
        "class_scores": lambda: ops.class_scores(x, p, labels),
        "nearest_centroid": lambda: ops.nearest_centroid(x, p),
        "centroid_cross_entropy": lambda: ops.centroid_cross_entropy(x, p, labels),
        "sinkhorn_assign": lambda: ops.sinkhorn_assign(empty(n, k), empty(n, dtype=torch.int64), c),
        "sinkhorn_plan": lambda: ops.sinkhorn_plan(empty(n, k), empty(n, dtype=torch.int64), c),
        "cluster_sums": lambda: ops.cluster_sums(x, labels, c * k),
        "momentum_update_": lambda: ops.momentum_update_(rows, x, labels),
        "apply_momentum_": lambda: ops.apply_momentum_(rows, rows.flatten(0, 1), empty(c * k, dtype=torch.int64)),
        "normalize_embedding": lambda: ops.normalize_embedding(
            x if planes else empty(1, d, n // 16, 16, memory_format=torch.channels_last)
        ),
        "upsample_cross_entropy": lambda: ops.upsample_cross_entropy(scores, empty(1, n // 16, 16, dtype=torch.int64)),
        "upsample_argmax": lambda: ops.upsample_argmax(scores, (n // 16, 16)),
    }[op]()


@pytest.mark.parametrize("fastest", ["cuda", "triton"])
def test_calls_take_what_was_measured_faster(monkeypatch, tmp_path, measured_cases, fastest):
    """Rows of every op, through the files, to calls on CUDA tensors of the measured shape and of one beside it."""
    rows = [(f"rows.jsonl:{n}", row) for n, row in enumerate(rows_of_a_gpu(measured_cases, fastest), 1)]
    dispatch.update(dispatch.faster(rows), tmp_path)
    monkeypatch.setattr(backends, "DISPATCH", _evidence.read_dispatch(tmp_path))
    families = dict.fromkeys(backends.FAMILY.values())
    monkeypatch.setattr(backends, "PROOFS", {(family, (9, 0)): replace(PROOF, family=family) for family in families})
    monkeypatch.setattr(backends, "unusable", lambda backend: "")
    monkeypatch.setattr(backends, "without_code", lambda name, capability: "")
    monkeypatch.setattr(backends, "capability", lambda index: (9, 0))
    taken = {}

    def resolved(op, *arguments, **options):
        taken[op] = found = resolve(op, *arguments, **options)
        return found

    monkeypatch.setattr(backends, "resolve", resolved)
    chosen = {op for op, kernels in backends.KERNELS.items() if {"cuda", "triton"} <= kernels.keys()}
    assert {op for op, _ in backends.DISPATCH} == chosen, "every op that has a choice"
    compared = {(row["op"], row["case"], row["dtype"]) for _, row in rows if row["backend"] == "cuda"}
    for case, row in measured_cases:
        if (case.op, case.name, case.dtype) not in compared:
            continue
        when = row["shape_class"]
        n, c, k, d = when["N"] // 16 * 16, when.get("C", 5), when.get("K", 3), when["D"]
        for sizes in ((n, c, k, d), (2 * n, c + 2, k + 1, d + 8)):
            taken.clear()
            with torch.no_grad(), FakeTensorMode():
                call(case.op, *sizes, dtype_of(case.dtype), "nchw" in case.name)
            found = taken[case.op]
            assert (found.backend, found.reason[:15]) == (fastest, "measured faster"), (case.op, case.name, sizes, found, when)


# carrying over


def test_a_proof_is_carried_to_source_that_makes_the_same_program():
    other = replace(PROOF, family="momentum")
    stale = replace(PROOF, family="upsample", source="7" * 64)
    before, now = dict.fromkeys(CUDA_FAMILIES, "0" * 64), dict.fromkeys(CUDA_FAMILIES, "1" * 64)
    asked = []

    def same(family, capability):
        asked.append((family, capability))
        return family == "similarity"

    rows = carry.carried([PROOF, other, stale], before.get, now.get, same)
    assert rows == [replace(PROOF, source="1" * 64)] and asked == [("similarity", (9, 0)), ("momentum", (9, 0))]
    assert carry.carried([PROOF], before.get, before.get, same) == []


@pytest.mark.skipif(
    bool(aot_cuda.missing()) or not all(map(shutil.which, ("nvcc", "objdump"))), reason="needs nvcc, cuobjdump, objdump"
)
def test_a_program_is_the_same_where_only_unused_source_differs(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc", ignore=shutil.ignore_patterns("tests"))
    file, shared = (tmp_path / "csrc" / "cuda" / name for name in ("similarity_pack.cu", "ptx.h"))

    def program():
        return carry.program(file, tmp_path, (9, 0))

    code = carry.program(ROOT / "csrc" / "cuda" / file.name, ROOT, (9, 0))
    assert "pack_centroids_kernel" in code and "EXIT" in code and "problem_of" in code
    shared.write_text(shared.read_text() + "\nnamespace dnc::cuda { __device__ inline int unused() { return 1; } }\n")
    assert program() == code
    for before, after in (("1e-12f", "1e-11f"), ("INT32_MAX / 64", "INT32_MAX / 32")):  # on the GPU, and on the host
        text = file.read_text()
        file.write_text(text.replace(before, after))
        assert program() != code
        file.write_text(text)
