"""What nvcc made of the CUDA C++ kernels: registers, local memory and tensor cores, for every architecture, without a GPU."""

import json
import re
import sysconfig
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

pytest.importorskip("triton")
from benchmarks import aot, aot_cuda
from benchmarks.families import CUDA_FAMILIES, source
from benchmarks.machine_code import ARCHS, Row, cuobjdump, faults, run
from dnc_kernels import backends

ROOT = Path(__file__).resolve().parent.parent
ROW = Row("similarity.x", "x_kernel", {}, {"bits": 16}, "sm_90", 80, 0, 0, 0, [], backend="cuda")


@pytest.fixture(scope="module")
def rows():
    if reason := aot_cuda.missing():
        pytest.skip(reason)
    return aot_cuda.rows()


@pytest.mark.slow
def test_no_kernel_touches_local_memory(rows):
    assert [(r.kernel, r.arch, faults(r)) for r in rows if faults(r)] == []
    assert all(0 < r.registers <= 255 and r.spills == 0 for r in rows)


@pytest.mark.slow
def test_every_kernel_is_there_on_every_architecture(rows):
    written = {}
    for path in (ROOT / "csrc" / "cuda").glob("*.*"):
        family = next((f for f in CUDA_FAMILIES if path.name.startswith(f)), None)
        if family:
            names = re.findall(r"__global__(?:.|\n)*?\b(\w+_kernel)\(", path.read_text())
            written.setdefault(family, set()).update(names)
    for arch in ARCHS:
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
    monkeypatch.setattr(aot_cuda, "cuda_files", lambda _: [ROOT / "csrc" / "cuda" / "similarity_pack.cu"])  # the quickest
    (row,) = (r for r in aot_cuda.rows(["similarity"], [90]) if r.kernel == "pack_centroids_kernel<BFloat16>")
    assert (row.op, row.arch, row.when, row.spills) == ("similarity.pack_centroids", "sm_90", {"bits": 16}, 0)


def test_a_build_of_other_source_is_not_read(monkeypatch):
    sources = {f: source(f) for f in CUDA_FAMILIES}
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
    assert faults(ROW) == []
    assert faults(replace(ROW, spills=8)) == ["spills 8 bytes"]
    assert faults(replace(ROW, ptx_features=["ld.local", "st.local"])) == ["has ld.local", "has st.local"]
    assert faults(replace(ROW, fences=3)) == ["has 3 device-wide fences between products"]
    assert faults(replace(ROW, kernel="scores_sm90_kernel<T>")) == ["has no wgmma"]
    assert faults(replace(ROW, kernel="scores_sm90_kernel<T>", arch="sm_80")) == ["has no trap"]
    assert faults(replace(ROW, kernel="scores_sm80_kernel<T>")) == ["has no trap"]
    assert faults(replace(ROW, kernel="scores_sm80_kernel<T>", ptx_features=["trap"])) == []
    assert faults(replace(ROW, kernel="scores_sm80_kernel<T>", arch="sm_80")) == ["has no mma.sync"]
    assert faults(replace(ROW, kernel="scores_sm80_kernel<T>", arch="sm_80", ptx_features=["mma.sync"])) == []


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


def machine_code(*lines) -> str:
    """As cuobjdump prints instructions: a name stands for the address of the line that begins with it."""
    at = {line.partition(":")[0]: f"0x{16 * i:x}" for i, line in enumerate(lines) if ":" in line}
    text = ""
    for i, line in enumerate(lines):
        guard, _, rest = line.rpartition(":")[2].strip().rpartition(") ")
        rest = re.sub(r"\b[a-z]+\b", lambda found: at.get(found[0], found[0]), rest)
        text += f"        /*{16 * i:04x}*/  {guard.strip('('):>12s} {rest} ;   /* 0x000fe20000000800 */\n    /* 0x001fea0003800000 */\n"
    return text


FENCE = ("MEMBAR.ALL.GPU", "CCTL.IVALL")
PRODUCT = "HGMMA.64x80x16.F32.BF16 R24, gdesc[UR4], R24, gsb0"


@pytest.mark.parametrize(
    ("lines", "fences"),
    [
        pytest.param([*FENCE, PRODUCT, PRODUCT, *FENCE, "EXIT"], 0, id="at the start and at the end"),
        pytest.param([PRODUCT, *FENCE, PRODUCT, "EXIT"], 2, id="between two"),
        pytest.param([PRODUCT, "MEMBAR.ALL.CTA", PRODUCT, "EXIT"], 0, id="of the block alone"),
        pytest.param(["HMMA.16816.F32 R4, R8, R12, R4", FENCE[0], "HMMA.16816.F32 R4, R8, R12, R4"], 1, id="of mma.sync"),
        pytest.param(["MEMBAR.ALL.GPU", "EXIT"], 0, id="without products"),
        pytest.param(["a: " + PRODUCT, FENCE[0], "(@P0) BRA a", *FENCE, "EXIT"], 1, id="in the loop of one product"),
        pytest.param(
            [PRODUCT, "(@!P0) BRA slow", "a: " + PRODUCT, "EXIT", "slow: MEMBAR.SC.SYS", "BRA a"], 1, id="behind the end, on the way"
        ),
        pytest.param(
            [PRODUCT, "b: CCTL.IVALL", "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [R2], R3", "(@!P0) BRA b", "EXIT", PRODUCT], 0,
            id="in a loop of the last block",
        ),
        pytest.param(  # a scope's barrier has the same name before the products as between them
            [
                "BSSY B0, first", "(@P1) BRA skip", "skip: BSYNC B0", "first: MEMBAR.ALL.GPU", "again: " + PRODUCT,
                "BSSY B0, second", "BSYNC B0", "second: BRA P0, again", "EXIT",
            ], 0, id="before the products, under a barrier's name that comes again",
        ),
        pytest.param(
            [PRODUCT, "BSSY.RECONVERGENT B0, met", "BSYNC.RECONVERGENT B0", "EXIT", "met: CCTL.IVALL", PRODUCT], 1,
            id="where parted threads meet",
        ),
        pytest.param(
            [PRODUCT, "CALL.REL.NOINC f", FENCE[0], PRODUCT, "EXIT", "f: RET.REL.NODEC R2", *FENCE], 1, id="after a subroutine"
        ),
    ],
)  # fmt: skip
def test_device_wide_fences_between_products_are_counted(lines, fences):
    assert aot_cuda.fences_between_products(machine_code(*lines)) == fences


def test_machine_code_is_read(monkeypatch):
    monkeypatch.setattr(aot_cuda, "run", lambda *c: USAGE if "--dump-resource-usage" in c else SASS if "--dump-sass" in c else "f_kernel(float*)")  # fmt: skip
    aot_cuda.readable.cache_clear()
    (row,) = aot_cuda._rows_of(Path("x.so"), 90)
    aot_cuda.readable.cache_clear()
    assert (row.op, row.kernel, row.arch, row.registers, row.spills) == ("momentum.f", "f_kernel", "sm_90", 34, 24)
    assert row.ptx_features == ["wgmma", "redux", "atom", "st.local"]
    assert faults(row) == ["spills 24 bytes", "has st.local"]


@pytest.mark.parametrize(
    ("demangled", "name"),
    [
        ("void dnc::cuda::(anonymous namespace)::f_kernel<dnc::BFloat16, 4>(float*, int)", "f_kernel<BFloat16, 4>"),
        ("dnc::cuda::(anonymous namespace)::f_kernel(long (*)(int))", "f_kernel"),
        ("void f_kernel<(dnc::Metric)2, X<(bool)1> >(float*)", "f_kernel<(Metric)2, X<(bool)1> >"),
    ],
)
def test_names_are_made_readable(demangled, name, monkeypatch):
    monkeypatch.setattr(aot_cuda, "run", lambda *_: demangled)
    monkeypatch.setattr(aot_cuda.shutil, "which", lambda _: "c++filt")
    aot_cuda.readable.cache_clear()
    assert aot_cuda.readable(demangled) == name
    aot_cuda.readable.cache_clear()


@pytest.mark.slow
def test_rows_are_printed_beside_tritons(rows, monkeypatch, capsys):
    # reading them again takes half a minute
    monkeypatch.setattr(aot_cuda, "_rows_of", lambda _, arch: [r for r in rows if r.arch == f"sm_{arch}"])
    assert aot.main(["--backend", "cuda", "--family", "momentum", "--arch", "80", "--json"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert found and {(r["backend"], r["arch"]) for r in found} == {("cuda", "sm_80")}
    assert found[0].keys() == {*Row.__dataclass_fields__, "faults"}


#: What the checks of a file are to have on a GPU, as the beginnings of instructions.
PRIMITIVES = {
    "warps": ("SHFL.BFLY", "VOTE", "MATCH", "REDUX", "LDSM.16.M88", "LDSM.16.MT88", "HMMA", "LDGSTS", "BAR.SYNC"),
    "blocks": ("ATOMG.E.ADD.STRONG.GPU", "REDG.E.ADD.F32x4", "MEMBAR.ALL.GPU"),
    "hopper": ("HGMMA.64x80x16", "HGMMA.64x64x16", "UTMALDG.2D", "UTMALDG.2D.MULTICAST", "UTMALDG.3D", "SYNCS.ARRIVE"),
    "rings": ("HGMMA.64x80x16", "HGMMA.64x64x16", "UTMALDG.2D", "SYNCS", "USETMAXREG.DEALLOC", "USETMAXREG.TRY_ALLOC",
              "FENCE.VIEW.ASYNC"),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", PRIMITIVES)
def test_checks_of_primitives_compile_to_the_instructions_they_are_for(name, tmp_path):
    pybind11 = pytest.importorskip("pybind11")
    if aot_cuda.shutil.which("nvcc") is None or aot_cuda.missing():
        pytest.skip("needs nvcc and cuobjdump")
    checks, file = ROOT / "csrc" / "tests" / "cuda_on_cpu", tmp_path / "checks.cubin"
    folders = [checks, ROOT / "csrc/include", ROOT / "csrc/cuda", pybind11.get_include(), sysconfig.get_path("include")]
    run("nvcc", "-std=c++20", "-O3", "-DDNC_WITH_CUDA", *(f"-I{folder}" for folder in folders),
        "-arch=sm_90a", "-cubin", str(checks / f"checks_{name}.cu"), "-o", str(file))  # fmt: skip
    code = run(cuobjdump(), "--dump-sass", str(file))
    missing = [i for i in PRIMITIVES[name] if not re.search(rf"\*/ +(@!?U?P\w+ )?{re.escape(i)}", code)]
    assert missing == [] and not re.search(r"\*/ +(@!?U?P\w+ )?(LDL|STL)", code)
    kernels = re.split(r"^\s*Function : ", code, flags=re.MULTILINE)[1:]
    assert [aot_cuda.fences_between_products(kernel) for kernel in kernels] == [0] * len(kernels)
