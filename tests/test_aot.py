"""What nvcc made of the CUDA C++ kernels: registers, local memory and tensor cores, for every architecture, without a GPU."""

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from benchmarks import aot, aot_cuda
from dnc_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
ROW = aot.Row("similarity.x", "x_kernel", {}, {"bits": 16}, "sm_90", 80, 0, 0, 0, [], backend="cuda")


@pytest.fixture(scope="module")
def rows():
    if reason := aot_cuda.missing():
        pytest.skip(reason)
    return aot_cuda.rows()


@pytest.mark.slow
def test_no_kernel_touches_local_memory(rows):
    assert [(r.kernel, r.arch, aot.faults(r)) for r in rows if aot.faults(r)] == []
    assert all(0 < r.registers <= 255 and r.spills == 0 for r in rows)


@pytest.mark.slow
def test_every_kernel_is_there_on_every_architecture(rows):
    written = {}
    for path in (ROOT / "csrc" / "cuda").glob("*.*"):
        family = next((f for f in aot.FAMILIES if path.name.startswith(f)), None)
        if family:
            names = re.findall(r"__global__(?:.|\n)*?\b(\w+_kernel)\(", path.read_text())
            written.setdefault(family, set()).update(names)
    for arch in aot.ARCHS:
        found = {}
        for r in rows:
            if r.arch == f"sm_{arch}":
                found.setdefault(r.op.partition(".")[0], set()).add(r.kernel.partition("<")[0])
        assert found == written


@pytest.mark.slow
def test_products_use_the_tensor_cores(rows):
    similarity = [r for r in rows if r.op.startswith("similarity.")]
    if not similarity:
        pytest.skip("similarity has no CUDA C++ kernels")
    for arch, instruction in (("sm_80", "mma.sync"), ("sm_90", "wgmma")):
        assert any(instruction in r.ptx_features for r in similarity if r.arch == arch), arch


@pytest.mark.slow
def test_one_family_and_architecture_can_be_compiled_alone(monkeypatch):
    """Where the extension is of other source or architectures."""
    if aot_cuda.shutil.which("nvcc") is None or aot_cuda.missing():
        pytest.skip("needs nvcc")
    monkeypatch.setattr(aot_cuda, "is_current", lambda *_: False)
    (row,) = (r for r in aot_cuda.rows(["momentum"], [90]) if r.kernel == "apply_momentum_kernel")
    assert (row.op, row.arch, row.when, row.spills) == ("momentum.apply_momentum", "sm_90", {}, 0)


def test_a_build_of_other_source_is_not_read(monkeypatch):
    sources = {f: aot_cuda.source(f) for f in aot.FAMILIES}
    build = SimpleNamespace(cuda_archs="80-real 90a-real 100", cuda=SimpleNamespace(sources=sources))
    monkeypatch.setattr(backends, "_native", build)
    assert aot_cuda.is_current()
    monkeypatch.setitem(sources, "momentum", "0" * 64)
    assert not aot_cuda.is_current() and aot_cuda.is_current(["sinkhorn"])
    monkeypatch.setattr(build, "cuda_archs", "90a-real")
    assert not aot_cuda.is_current(["sinkhorn"]) and aot_cuda.is_current(["sinkhorn"], [90])
    monkeypatch.setattr(backends, "_native", None)
    assert not aot_cuda.is_current()


def test_without_tools_the_reason_is_given(monkeypatch, capsys):
    monkeypatch.setattr(aot_cuda.shutil, "which", lambda name: None)
    assert "cuobjdump" in aot_cuda.missing()
    assert aot.main(["--backend", "cuda"]) == 0
    assert "CUDA C++ kernels are left out: cuobjdump" in capsys.readouterr().err


def test_what_must_not_ship_is_a_fault():
    assert aot.faults(ROW) == []
    assert aot.faults(replace(ROW, spills=8)) == ["spills 8 bytes"]
    assert aot.faults(replace(ROW, ptx_features=["ld.local", "st.local"])) == ["has ld.local", "has st.local"]
    assert aot.faults(replace(ROW, kernel="scores_sm90_kernel<T>")) == ["has no wgmma"]
    assert aot.faults(replace(ROW, kernel="scores_sm90_kernel<T>", arch="sm_80")) == []
    assert aot.faults(replace(ROW, kernel="scores_sm80_kernel<T>", arch="sm_80")) == ["has no mma.sync"]
    assert aot.faults(replace(ROW, kernel="scores_sm80_kernel<T>", arch="sm_80", ptx_features=["mma.sync"])) == []


USAGE = """
Fatbin elf code:
================
arch = sm_90a
identifier = /x/csrc/cuda/momentum.cu

Resource usage:
 Common:
  GLOBAL:0
 Function _Z8f_kernelPf:
  REG:34 STACK:16 SHARED:1024 LOCAL:8 CONSTANT[0]:520
"""
SASS = """
Fatbin elf code:
================
arch = sm_90a
identifier = /x/csrc/cuda/momentum.cu

	code for sm_90a
		Function : _Z8f_kernelPf
        /*0000*/                   LDG.E.64 R2, [R20.64+0x8] ;      /* 0x0 */
        /*0010*/              @!P0 STL.64 [R1], R2 ;                /* 0x0 */
        /*0020*/                   HGMMA.64x128x16.F32.BF16 R24 ;   /* 0x0 */
        /*0030*/                   ATOMG.E.ADD.STRONG.GPU PT, R3 ;  /* 0x0 */
        /*0040*/                   REDUX.OR R4, R3 ;                /* 0x0 */
"""


def test_machine_code_is_read(monkeypatch):
    monkeypatch.setattr(aot_cuda, "_run", lambda *c: USAGE if "--dump-resource-usage" in c else SASS if "--dump-sass" in c else "f_kernel(float*)")  # fmt: skip
    aot_cuda.readable.cache_clear()
    (row,) = aot_cuda._rows_of(Path("x.so"))
    aot_cuda.readable.cache_clear()
    assert (row.op, row.kernel, row.arch, row.registers, row.spills) == ("momentum.f", "f_kernel", "sm_90", 34, 24)
    assert row.ptx_features == ["wgmma", "redux", "atom", "st.local"]
    assert aot.faults(row) == ["spills 24 bytes", "has st.local"]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void dnc::cuda::(anonymous namespace)::f_kernel<dnc::BFloat16, 4>(float*, int)", "f_kernel<BFloat16, 4>"),
        ("dnc::cuda::(anonymous namespace)::f_kernel(long (*)(int))", "f_kernel"),
        ("void f_kernel<(dnc::Metric)2, X<(bool)1> >(float*)", "f_kernel<(Metric)2, X<(bool)1> >"),
    ],
)
def test_names_are_made_readable(demangled, name, monkeypatch):
    monkeypatch.setattr(aot_cuda, "_run", lambda *_: demangled)
    monkeypatch.setattr(aot_cuda.shutil, "which", lambda _: "c++filt")
    aot_cuda.readable.cache_clear()
    assert aot_cuda.readable(demangled) == name
    aot_cuda.readable.cache_clear()


@pytest.mark.slow
def test_rows_are_printed_beside_tritons(rows, capsys):
    assert aot.main(["--backend", "cuda", "--family", "momentum", "--arch", "80", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found and {(r["backend"], r["arch"]) for r in found} == {("cuda", "sm_80")}
    assert found[0].keys() == {*aot.Row.__dataclass_fields__, "faults"}
