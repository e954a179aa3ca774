"""What is built: the sdist, the wheel made from it, the C++ library alone, and the instruction sets inside them."""

import contextlib
import os
import platform
import re
import runpy
import shutil
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from cuda_on_cpu import cmake

import dnc_kernels
from dnc_kernels import _source, backends

ROOT = Path(__file__).resolve().parent.parent
GPU = torch.cuda.is_available()
X86 = platform.machine() in ("x86_64", "AMD64")
VERSION = re.search(r'^version = "(.*)"', (ROOT / "pyproject.toml").read_text(), re.M).group(1)


def run(command, *, cwd, timeout=1800, **environment) -> str:
    """What a command prints. ccache, where `make` has chosen it, finds what was compiled of the same source elsewhere."""
    result = subprocess.run(
        [str(part) for part in command],
        cwd=cwd, env={**os.environ, "CCACHE_BASEDIR": str(cwd), **environment}, timeout=timeout,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    assert result.returncode == 0, f"{command} failed:\n{result.stdout[-5000:]}"
    return result.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A copy of the project without anything built."""
    folder = tmp_path_factory.mktemp("source") / "project"
    unwanted = shutil.ignore_patterns(
        ".git", ".venv", "build", "dist", "*.egg-info", "*.so", "__pycache__", ".*_cache", "demo-out"
    )
    shutil.copytree(ROOT, folder, ignore=unwanted)
    return folder


@pytest.fixture(scope="module")
def sdist(source):
    run([sys.executable, "-m", "build", "--sdist", "--no-isolation"], cwd=source)
    (archive,) = (source / "dist").glob("*.tar.gz")
    return archive


@pytest.fixture(scope="module")
def built(sdist, tmp_path_factory):
    """The wheel made from the sdist with a torch that cannot be imported, installed beside nothing else; and the build tree."""
    work = tmp_path_factory.mktemp("built")
    with tarfile.open(sdist) as archive:
        archive.extractall(work)
    tree = work / f"dnc_kernels-{VERSION}"
    (work / "no_torch" / "torch").mkdir(parents=True)
    (work / "no_torch" / "torch" / "__init__.py").write_text("raise ImportError('the build must not need torch')")
    output = run(
        [sys.executable, "-m", "pip", "wheel", ".", "--no-build-isolation", "--no-deps", "--wheel-dir", work, "-v"],
        cwd=tree, DNC_KERNELS_BUILD="cpu", PYTHONPATH=str(work / "no_torch"),
    )  # fmt: skip
    (wheel,) = work.glob("*.whl")
    site = work / "site"
    run([sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--target", site, wheel], cwd=work)
    (objects,) = (tree / "build").glob("cmake-*")
    return SimpleNamespace(tree=tree, wheel=wheel, site=site, objects=objects, output=output, work=work)


@pytest.mark.slow
def test_the_sdist_holds_what_a_build_and_its_tests_need(source, sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    needed = {
        "CMakeLists.txt",
        "cmake/architectures.cmake",
        "cmake/source.cmake",
        "setup.py",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        "CHANGELOG.md",
        "tests/conftest.py",
    }
    needed |= {str(path.relative_to(source)) for path in (source / "csrc").rglob("*") if path.is_file()}
    needed |= {str(path.relative_to(source)) for path in (source / "dnc_kernels").rglob("*.py")}
    assert needed <= names, f"missing: {sorted(needed - names)}"
    assert not [name for name in names if name.endswith((".so", ".o", ".pyc")) or name.startswith("build/")]


@pytest.mark.slow
def test_the_wheel_holds_the_package_and_nothing_else(source, built):
    extension = f"dnc_kernels/{Path(backends.native().__file__).name}"
    package = {str(path.relative_to(source)) for path in (source / "dnc_kernels").rglob("*") if path.is_file()}
    names = set(zipfile.ZipFile(built.wheel).namelist())
    info = {name for name in names if name.startswith(f"dnc_kernels-{VERSION}.dist-info/")}
    assert names - info == package | {extension}
    assert {"dnc_kernels/py.typed", extension} <= names
    assert any(name.endswith("licenses/LICENSE") for name in info)


@pytest.mark.slow
def test_the_wheel_says_what_it_needs(built):
    text = zipfile.ZipFile(built.wheel).read(f"dnc_kernels-{VERSION}.dist-info/METADATA").decode()
    assert f"Version: {VERSION}" in text and "License-Expression: Apache-2.0" in text
    assert "Requires-Python: >=3.10" in text
    needs = [line for line in text.splitlines() if line.startswith("Requires-Dist") and "extra ==" not in line]
    assert needs == ["Requires-Dist: torch>=2.11", "Requires-Dist: numpy"]


@pytest.mark.slow
def test_the_installed_wheel_is_healthy_far_from_its_source(built, tmp_path):
    code = (
        "import dnc_kernels, importlib.metadata as m; from dnc_kernels import _C, doctor; "
        "print(dnc_kernels.__file__, dnc_kernels.__version__, _C.__version__, m.version('dnc_kernels'), doctor.check().healthy)"
    )
    file, *rest = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(built.site)).split()[-5:]
    assert Path(file).is_relative_to(built.site)
    assert rest == [VERSION, VERSION, VERSION, "True"]


@pytest.mark.slow
def test_a_cpu_build_has_no_cuda_in_it(built, tmp_path):
    assert "no CUDA kernels: DNC_KERNELS_BUILD=cpu" in built.output
    code = "from dnc_kernels import _C; print(_C.cuda_archs, hasattr(_C, 'momentum_update_cuda_'))"
    assert run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(built.site)).split()[-2:] == ["None", "False"]


@pytest.mark.slow
def test_a_build_says_how_long_it_takes_before_it_begins(built):
    assert re.search(r"==> compiling \d+ C\+\+ files, \d+ at a time: about \d+ minutes?\n(?s:.*)Building CXX", built.output)


@pytest.mark.slow
def test_a_binary_knows_the_source_it_was_built_from(built, tmp_path):
    code = "from dnc_kernels import _C; print(_C.source, _C.commit)"
    printed = run([sys.executable, "-c", code], cwd=tmp_path, PYTHONPATH=str(built.site)).split()[-2:]
    assert printed == [_source.source(built.tree), "unknown"]  # an sdist has no history


@pytest.mark.slow
def test_an_editable_install_is_a_path_that_type_checkers_follow(built, tmp_path):
    """Setuptools' own choice for this layout is an import hook, which mypy and Pylance cannot look behind."""
    code = f"from setuptools import build_meta; print(build_meta.build_editable({str(tmp_path)!r}))"
    output = run([sys.executable, "-c", code], cwd=built.tree, DNC_KERNELS_BUILD="cpu")
    assert "Building CXX object CMakeFiles/dnc_" not in output  # everything was built
    with zipfile.ZipFile(next(tmp_path.glob("*.whl"))) as wheel:
        assert [name for name in wheel.namelist() if "dist-info" not in name] == [f"__editable__.dnc_kernels-{VERSION}.pth"]
        assert wheel.read(f"__editable__.dnc_kernels-{VERSION}.pth").decode().strip() == str(built.tree)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_a_commit_compiles_nothing_and_an_edited_kernel_has_another_hash(built):
    def build() -> tuple[list[str], str]:
        """What is compiled and linked, and the module's stamp."""
        run([cmake("cmake"), "-S", built.tree, "-B", built.objects, "-DDNC_PYTHON=ON", "-DDNC_BUILD=cpu"], cwd=built.work)
        output = run([cmake("cmake"), "--build", built.objects, "--target", "_C", "-j2"], cwd=built.work)
        (module,) = built.objects.glob("_C.*.so")
        code = f"import importlib.util as u; s = u.spec_from_file_location('_C', {str(module)!r}); m = u.module_from_spec(s); "
        stamp = run([sys.executable, "-c", f"{code} s.loader.exec_module(m); print(m.source, m.commit)"], cwd=built.work)
        return sorted(Path(line.split()[-1]).name for line in output.splitlines() if "Building" in line), stamp.strip()

    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=test", "-c", "user.email=test@example.invalid"]
        return run(["git", *identity, *arguments], cwd=built.tree).strip()

    kernel = built.tree / "csrc" / "cpu" / "upsample.cpp"
    text, source = kernel.read_text(), _source.source(built.tree)
    build()  # other tests leave the tree without Python
    try:
        git("init", "-q")
        git("add", "CMakeLists.txt", "cmake", "csrc", "README.md")
        git("commit", "-qm", "first")
        first = _source.commit(built.tree)
        assert build() == (["stamp.cpp.o"], f"{source} {first}") and git("rev-parse", "HEAD").startswith(first)
        (built.tree / "README.md").write_text("other words")
        git("commit", "-qam", "second")
        assert build() == ([], f"{source} {first}")
        kernel.write_text(f"{text}// edited\n")
        compiled, stamp = build()
        assert compiled == sorted(["stamp.cpp.o", *["upsample.cpp.o"] * len(set(instruction_sets()) - {"amx"})])
        assert stamp == f"{_source.source(built.tree)} {first}+" and not stamp.startswith(source)
    finally:
        kernel.write_text(text)
        shutil.rmtree(built.tree / ".git", ignore_errors=True)


#: What gains by AMX, the products of bfloat16 pixels, is compiled for it too.
AMX = ("similarity*.cpp", "head.cpp")


def instruction_sets() -> list[str]:
    return ["portable", "avx2", "avx512", "amx"] if X86 else ["portable"]


def objects_of(built, isa: str) -> list[Path]:
    found = sorted((built.objects / "CMakeFiles" / f"dnc_{isa}.dir").rglob("*.o"))
    folder = built.tree / "csrc" / "cpu"
    kernels = {path.name for pattern in (AMX if isa == "amx" else ("*.cpp",)) for path in folder.glob(pattern)}
    assert {path.stem for path in found} == kernels - {"dispatch.cpp"}
    return found


@pytest.mark.slow
@pytest.mark.parametrize("isa", instruction_sets())
def test_kernels_share_no_symbol_across_instruction_sets(built, isa):
    """A symbol outside dnc::cpu::<isa> may be merged by the linker: every processor would then run the AVX-512 copy."""
    for path in objects_of(built, isa):
        for line in run(["nm", "-C", "--defined-only", path], cwd=built.work).splitlines():
            kind, name = line.split(maxsplit=2)[1:]
            local = kind.islower() and kind not in "uvw"
            assert local or f"dnc::cpu::{isa}::" in name, f"{path.name} defines {name}"


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="x86-64 only")
def test_wide_registers_appear_only_in_their_own_instruction_set(built):
    def registers(path: Path) -> set[str]:
        return set(re.findall(r"%([yzt]mm)\d", run(["objdump", "-d", path], cwd=built.work)))

    for isa, allowed in {"portable": set(), "avx2": {"ymm"}, "avx512": {"ymm", "zmm"}, "amx": {"ymm", "zmm", "tmm"}}.items():
        for path in objects_of(built, isa):
            assert registers(path) <= allowed, path
    assert any("zmm" in registers(path) for path in objects_of(built, "avx512"))
    assert all("tmm" in registers(path) for path in objects_of(built, "amx"))
    for path in [*built.objects.rglob("dispatch.cpp.o"), *built.objects.rglob("test_library.cpp.o")]:
        assert not registers(path), path


@pytest.mark.slow
def test_nothing_is_tuned_to_the_building_machine(built):
    rules = (built.objects / "build.ninja").read_text()
    assert "-O3" in rules
    assert not re.search(r"-m(arch|tune|cpu)=|-ffast-math|-Ofast", rules)


@pytest.mark.slow
def test_the_library_installs_alone_and_a_program_finds_it(built):
    """The same objects without Python: `cmake --install`, then find_package(dnc) from csrc/tests."""
    prefix, consumer = built.work / "prefix", built.work / "consumer"
    run([cmake("cmake"), "-S", built.tree, "-B", built.objects, "-DDNC_PYTHON=OFF", "-DDNC_BUILD=cpu"], cwd=built.work)
    run([cmake("cmake"), "--build", built.objects, "-j2"], cwd=built.work)
    run([cmake("cmake"), "--install", built.objects, "--prefix", prefix], cwd=built.work)
    headers = {path.name for path in (built.tree / "csrc" / "include" / "dnc").iterdir()}
    assert {path.name for path in (prefix / "include" / "dnc").iterdir()} == headers
    run(
        [cmake("cmake"), "-S", built.tree / "csrc" / "tests", "-B", consumer, "-G", "Ninja", f"-DCMAKE_PREFIX_PATH={prefix}"],
        cwd=built.work,
    )
    assert f"dnc_DIR:PATH={prefix}" in (consumer / "CMakeCache.txt").read_text()
    run([cmake("cmake"), "--build", consumer], cwd=built.work)
    output = run([cmake("ctest"), "--test-dir", consumer, "--verbose", "--output-on-failure"], cwd=built.work)
    assert output.count(": ok") == len(backends.usable_isas())


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["cpu", "cuda"])
def test_a_cpp_program_is_built_against_the_installed_library(built, mode):
    """CTest installs the library, then builds and runs examples/cpp against it; a CUDA build brings no CUDA library along."""
    if mode == "cuda" and shutil.which("nvcc") is None:
        pytest.skip("needs nvcc")
    options = ["-DDNC_PYTHON=OFF", "-DDNC_TESTS=ON", f"-DDNC_BUILD={mode}"]
    if GPU:
        options.append("-DDNC_CUDA_ARCHS=native")
    elif not os.environ.get("CMAKE_CUDA_COMPILER_LAUNCHER"):  # else ccache has the objects of the set-up
        # kernels that nothing runs are compiled in a ninth of the time
        options += ["-DDNC_CUDA_ARCHS=80-real", "-DCMAKE_CUDA_FLAGS=-Xcicc -O0 -Xptxas -O0"]
    run([cmake("cmake"), "-S", built.tree, "-B", built.objects, *options], cwd=built.work)
    run([cmake("cmake"), "--build", built.objects, "-j2"], cwd=built.work)
    output = run([cmake("ctest"), "--test-dir", built.objects, "--verbose"], cwd=built.work)
    assert "CPU: 60 sub-centroids moved" in output and re.search("100% tests passed.* out of 3", output)
    expected = "built without CUDA kernels" if mode == "cpu" else "differs from the CPU" if GPU else "there is no CUDA device"
    assert f"GPU: {'this library was ' if mode == 'cpu' else ''}{expected}" in output
    (program,) = built.objects.rglob("example/example")
    assert "libcuda" not in run(["ldd", program], cwd=built.work)
    assert (built.objects / "csrc" / "tests" / "prefix" / "include" / "dnc" / "cuda.h").exists()


@pytest.mark.parametrize("path", sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), ids=lambda path: path.stem)
def test_the_portable_path_is_plain_cpp(path):
    """It compiles for another processor where a cross compiler is there; in any case it reaches for no x86 header."""
    compiler = shutil.which("aarch64-linux-gnu-g++") or os.environ.get("CXX") or "c++"
    command = [compiler, "-std=c++20", "-fopenmp", "-DDNC_ISA_PORTABLE", "-I", ROOT / "csrc" / "include"]
    run([*command, "-fsyntax-only", "-Wall", "-Wextra", "-Werror", path], cwd=ROOT)
    headers = run([*command, "-M", path], cwd=ROOT)
    assert not re.search(r"/(imm|xmm|emm|x86|avx\w*|arm_neon)\w*\.h\b", headers)


def test_this_binary_is_of_this_checkout():
    assert backends.native().source == _source.source(ROOT), "csrc was edited since the extension was built: `make install`"


@pytest.fixture
def planted(tmp_path):
    """A tree with the files that decide a binary, and others."""
    files = {
        "CMakeLists.txt": "project(x)\n", "cmake/a.cmake": "# a; [b]\n", "csrc/cpu/k.cpp": "int k;\r\nint l;\n",
        "csrc/cuda/k.cu": "", "csrc/include/dnc/k.h": "// \"k\"\n", "csrc/tests/t.cpp": "int t;\n", "README.md": "x\n",
    }  # fmt: skip
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(text.encode())
    return tmp_path


def stamp_by_cmake(folder: Path, paths, **environment) -> list[str]:
    """What cmake/source.cmake finds of a tree."""
    script = folder / "ask"
    script.write_text(
        f"include({ROOT}/cmake/source.cmake)\ndnc_digest(digest {' '.join(paths)})\ndnc_commit(commit)\n"
        'message("${digest} ${commit}")\n'
    )
    command = [cmake("cmake"), "-P", str(script)]
    asked = subprocess.run(command, cwd=folder, env={**os.environ, **environment}, stderr=subprocess.PIPE, text=True)
    script.unlink()
    return asked.stderr.split()


def test_cmake_and_python_find_the_same_stamp(planted, monkeypatch):
    monkeypatch.delenv("DNC_COMMIT", raising=False)
    names = [path.relative_to(planted).as_posix() for path in _source.files(planted)]
    assert names == ["CMakeLists.txt", "cmake/a.cmake", "csrc/cpu/k.cpp", "csrc/cuda/k.cu", "csrc/include/dnc/k.h"]
    assert stamp_by_cmake(planted, names) == [_source.source(planted), _source.commit(planted)]
    assert _source.commit(planted) == "unknown"
    monkeypatch.setenv("DNC_COMMIT", "abc")
    assert stamp_by_cmake(planted, names)[1] == _source.commit(planted) == "abc"


@pytest.mark.skipif(shutil.which("git") is None, reason="needs git")
def test_the_commit_is_the_last_one_that_changed_the_source(planted):
    def git(*arguments: str) -> str:
        return run(["git", "-c", "user.name=t", "-c", "user.email=t@example.invalid", *arguments], cwd=planted).strip()

    def commit() -> str:
        found = _source.commit(planted)
        assert stamp_by_cmake(planted, ["CMakeLists.txt"])[1] == found
        return found

    git("init", "-q")
    assert commit() == "unknown"  # nothing committed yet
    git("add", ".")
    git("commit", "-qm", "first")
    first = git("rev-parse", "--short=12", "HEAD")
    assert commit() == first
    (planted / "README.md").write_text("y")
    (planted / "csrc/tests/t.cpp").write_text("int u;")
    assert commit() == first
    git("commit", "-qam", "second")
    assert commit() == first
    (planted / "csrc/cpu/new.cpp").write_text("int n;")  # no file of git's, but of the build's
    assert commit() == f"{first}+"
    git("add", ".")
    git("commit", "-qm", "third")
    assert commit() == git("rev-parse", "--short=12", "HEAD") != first


@pytest.mark.parametrize(
    ("name", "counts"),
    [("csrc/cpu/k.cpp", True), ("csrc/cuda/k.cu", True), ("CMakeLists.txt", True), ("cmake/a.cmake", True),
     ("csrc/tests/t.cpp", False), ("README.md", False)],
)  # fmt: skip
def test_what_decides_a_binary_decides_its_hash(planted, name, counts):
    before = _source.source(planted)
    path = planted / name
    path.write_bytes(path.read_bytes().replace(b"\r\n", b"\n"))  # as another system checks it out
    assert _source.source(planted) == before
    path.write_bytes(path.read_bytes() + b"//")
    assert (_source.source(planted) != before) == counts


def test_without_a_checkout_there_is_no_source(tmp_path):
    assert _source.source(tmp_path) is None and _source.files(tmp_path) == []


def test_one_version_everywhere():
    assert dnc_kernels.__version__ == VERSION
    assert backends.native().__version__ == VERSION
    assert re.search(rf"^version: {re.escape(VERSION)}$", (ROOT / "CITATION.cff").read_text(), re.M)
    assert re.search(rf"^## {re.escape(VERSION)}\b", (ROOT / "CHANGELOG.md").read_text(), re.M)
    with contextlib.suppress(metadata.PackageNotFoundError):  # built in place
        assert metadata.version("dnc_kernels") == VERSION


@pytest.fixture
def setup(monkeypatch):
    """The functions of setup.py, without running it."""
    monkeypatch.setattr("setuptools.setup", lambda **arguments: None)
    return SimpleNamespace(**runpy.run_path(str(ROOT / "setup.py")))


def machine(monkeypatch, *, cores, total, free, **files):
    """A machine of this memory, in bytes, with the control groups whose files are given."""
    pages = {"SC_PAGE_SIZE": 4096, "SC_PHYS_PAGES": int(total / 4096), "SC_AVPHYS_PAGES": int(free / 4096)}
    monkeypatch.delenv("DNC_KERNELS_JOBS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "sysconf", pages.__getitem__)

    def read(path, *_, **__):
        if str(path) not in files:
            raise FileNotFoundError(path)
        return files[str(path)]

    monkeypatch.setattr(Path, "read_text", read)


def test_jobs_are_bounded_by_cores_and_memory(setup, monkeypatch):
    machine(monkeypatch, cores=64, total=6.1e9, free=6e9)
    assert setup._jobs() == 8
    machine(monkeypatch, cores=64, total=1e8, free=1e8)
    assert setup._jobs() == 1
    monkeypatch.setenv("DNC_KERNELS_JOBS", "7")
    assert setup._jobs() == 7


def test_memory_that_is_not_free_yet_makes_no_build_serial(setup, monkeypatch):
    machine(monkeypatch, cores=16, total=128e9, free=0.9e9)
    assert setup._jobs() == 16


@pytest.mark.parametrize(
    "files",
    [
        {"/proc/self/cgroup": "0::/", "/sys/fs/cgroup/memory.max": "3000000000\n"},  # a container
        {
            "/proc/self/cgroup": "0::/a.slice/b\n", "/sys/fs/cgroup/a.slice/memory.max": "3000000000\n",
            "/sys/fs/cgroup/a.slice/b/memory.max": "max\n",
        },
        {"/proc/self/cgroup": "5:cpu:/x\n4:memory:/y\n", "/sys/fs/cgroup/memory/y/memory.limit_in_bytes": "3000000000\n"},
    ],
    ids=["container", "slice", "version 1"],
)  # fmt: skip
def test_jobs_fit_the_memory_of_a_control_group(setup, monkeypatch, files):
    machine(monkeypatch, cores=16, total=128e9, free=100e9, **files)
    assert setup._jobs() == 4


TARGETS = """
CMakeFiles/dnc_avx2.dir/csrc/cpu/a.cpp.o: CXX_COMPILER__dnc_avx2_unscanned_Release
CMakeFiles/_C.dir/csrc/stamp.cpp.o: CXX_COMPILER___C_unscanned_Release
CMakeFiles/dnc.dir/csrc/cuda/a.cu.o: CUDA_COMPILER__dnc_unscanned_Release
CMakeFiles/_checks.dir/csrc/tests/cuda_on_cpu/checks.cu.o: CUDA_COMPILER___checks_unscanned_Release
libdnc.a: CXX_STATIC_LIBRARY_LINKER__dnc_Release
"""


def test_the_outlook_counts_what_is_not_compiled_yet(setup, tmp_path):
    assert setup._outlook(TARGETS, tmp_path, 3, 2) == "compiling 2 C++ files and 1 CUDA file, 2 at a time: about 1 minute"
    many = TARGETS + "".join(f"CMakeFiles/dnc.dir/csrc/cuda/{i}.cu.o: CUDA_COMPILER__dnc\n" for i in range(39))
    minutes = round((2 * setup.SECONDS["CXX"] + 40 * 3 * setup.SECONDS["CUDA"]) / 2 / 60)
    assert setup._outlook(many, tmp_path, 3, 2).endswith(f"and 40 CUDA files, 2 at a time: about {minutes} minutes")
    for line in TARGETS.split():
        if line.endswith(".o:"):
            path = tmp_path / line[:-1]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.touch()
    assert setup._outlook(TARGETS, tmp_path, 3, 2) == ""


def commands(goal, folder, **environment):
    """What `make` would run for a goal with its venv in `folder`."""
    environment = {"DNC_KERNELS_BUILD": "", **environment}
    return run(["make", "-n", goal, f"VENV={folder}"], cwd=ROOT, **environment)


def installed(folder, *stamps):
    """A venv of which `make` takes these parts for done."""
    for name in stamps:
        (folder / name).touch()
        os.utime(folder / name, (2**32, 2**32))
    return folder


def test_the_demo_installs_no_developers_tools(tmp_path):
    text = commands("demo", tmp_path)
    assert '".[demo]"' in text and ".[dev]" not in text
    assert set(re.findall(r"DNC_KERNELS_BUILD=(\w+)", text)) == {"auto"}
    assert "OMP_WAIT_POLICY=passive" in text


def test_the_demo_takes_the_developers_setup_as_it_is(tmp_path):
    text = commands("demo", installed(tmp_path, ".tools", ".installed"), CUDACXX=sys.executable)
    assert "pip install" not in text and set(re.findall(r"DNC_KERNELS_BUILD=(\w+)", text)) == {"cuda"}


def test_the_demo_rebuilds_what_was_edited(tmp_path):
    text = commands("demo", installed(tmp_path, ".tools", ".demo"))
    assert "pip install" not in text and "DNC_KERNELS_BUILD=auto" in text and "build_ext --inplace" in text


def test_developers_add_to_the_demos_setup(tmp_path):
    text = commands("install", installed(tmp_path, ".tools", ".demo"))
    assert "venv" not in text.replace(str(tmp_path), "") and '".[dev]"' in text


@pytest.mark.parametrize(("goal", "pip"), [("demo", '".[demo]"'), ("install", '".[dev]"')])
def test_the_extension_is_built_in_place_before_pip_looks_for_it(tmp_path, goal, pip):
    text = commands(goal, tmp_path)
    assert text.index("setup.py --quiet build_ext --inplace") < text.index(pip)
    assert "--no-build-isolation" in text


@pytest.mark.parametrize(
    ("environment", "mode"),
    [
        ({"CUDACXX": sys.executable}, "cuda"),  # any program: it is found
        ({"CUDACXX": "/nonexistent/nvcc"}, "cpu"),
        ({"CUDACXX": sys.executable, "DNC_KERNELS_BUILD": "cpu"}, "cpu"),
        ({"CUDACXX": "/nonexistent/nvcc", "DNC_KERNELS_BUILD": "auto"}, "auto"),
    ],
)
def test_developers_build_cuda_where_nvcc_is_found(tmp_path, environment, mode):
    for goal in ("test", "install", "lint", "bench"):
        assert set(re.findall(r"DNC_KERNELS_BUILD=(\w+)", commands(goal, tmp_path, **environment))) == {mode}


@pytest.mark.parametrize("there", [True, False])
def test_make_compiles_through_ccache_where_it_is(tmp_path, monkeypatch, there):
    for language in ("CXX", "CUDA"):
        monkeypatch.delenv(f"CMAKE_{language}_COMPILER_LAUNCHER", raising=False)
    if there:
        (tmp_path / "ccache").touch(mode=0o755)
    text = run([shutil.which("make"), "-pn", "help"], cwd=ROOT, PATH=str(tmp_path))
    found = re.findall(r"^CMAKE_(\w+)_COMPILER_LAUNCHER \??= ccache$", text, re.MULTILINE)
    assert sorted(found) == (["CUDA", "CXX"] if there else [])


def test_modes(setup, monkeypatch):
    monkeypatch.delenv("DNC_KERNELS_BUILD", raising=False)
    assert setup._mode() == "auto"
    for mode in ("cpu", "cuda", "auto"):
        monkeypatch.setenv("DNC_KERNELS_BUILD", mode)
        assert setup._mode() == mode
    monkeypatch.setenv("DNC_KERNELS_BUILD", "gpu")
    with pytest.raises(SystemExit, match="DNC_KERNELS_BUILD must be cpu, cuda or auto; got 'gpu'"):
        setup._mode()


@pytest.mark.parametrize(
    ("value", "archs"),
    [
        ("", ""),
        ("90a-real", "90a-real"),
        ("80-real;90a-real;100", "80-real;90a-real;100"),
        (" 80, 90a ", "80;90a"),
        ("native", "native"),
    ],
)
def test_architectures_are_written_as_cmake_wants_them(setup, monkeypatch, value, archs):
    monkeypatch.setenv("DNC_KERNELS_CUDA_ARCHS", value)
    assert setup._cuda_archs() == archs


@pytest.mark.parametrize("value", ["sm_90", "9.0", "90;hopper"])
def test_a_malformed_architecture_is_refused(setup, monkeypatch, value):
    monkeypatch.setenv("DNC_KERNELS_CUDA_ARCHS", value)
    with pytest.raises(SystemExit, match="DNC_KERNELS_CUDA_ARCHS must be like"):
        setup._cuda_archs()


def architectures(*names, native=""):
    """What CMake makes of DNC_CUDA_ARCHS, on a machine whose GPUs have the compute capabilities `native`."""
    script = f"include({ROOT / 'cmake' / 'architectures.cmake'})\nset(DNC_NATIVE_CAPABILITIES {native})\n"
    script += f'dnc_architectures(archs {" ".join(names)})\nmessage("${{archs}}")\n'
    with tempfile.NamedTemporaryFile("w", suffix=".cmake") as file:
        file.write(script)
        file.flush()
        return subprocess.run([cmake("cmake"), "-P", file.name], stderr=subprocess.PIPE, text=True).stderr.strip()


@pytest.mark.parametrize(
    ("names", "native", "archs"),
    [
        (["80-real", "90a-real", "100"], "", "80-real;90a-real;100"),
        (["90"], "", "90a"),  # the Hopper kernels have no body in code for 90
        (["90-real", "90-virtual", "90f"], "", "90a-real;90a-virtual;90a"),
        (["90", "90a"], "", "90a"),
        (["120f-real"], "", "120f-real"),
        (["native"], "90", "90a-real"),
        (["native", "100"], "80 90 120", "80-real;90a-real;120a-real;100"),
    ],
)
def test_cmake_compiles_for_what_the_kernels_need(names, native, archs):
    assert architectures(*names, native=native) == archs
    if native == "90":
        assert backends.runs_on(archs, 9, 0) and not backends.runs_on(archs, 8, 0)


@pytest.mark.parametrize(
    ("name", "text"), [("75", "need compute capability 8.0"), ("all", "must be like 80-real;90a-real;100")]
)
def test_cmake_refuses_what_no_kernel_is_for(name, text):
    assert text in architectures(name)


@pytest.mark.skipif(GPU, reason="for a machine without a GPU")
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_native_without_a_gpu_fails_and_says_so(tmp_path):
    command = [cmake("cmake"), "-S", ROOT, "-B", tmp_path, "-DDNC_BUILD=cuda", "-DDNC_CUDA_ARCHS=native"]
    result = subprocess.run(list(map(str, command)), text=True, capture_output=True)
    assert result.returncode != 0
    text = " ".join(result.stderr.split())
    assert "DNC_KERNELS_CUDA_ARCHS=native, but this machine has no GPU that CUDA can use" in text
    assert "name the architecture of the GPU that is to run the kernels, such as 80-real or 90a-real" in text


def configure(folder, *options, program=None, **environment):
    """The library alone, configured in `folder`."""
    command = [program or cmake("cmake"), "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DCMAKE_MAKE_PROGRAM={cmake('ninja')}"]
    command = [str(part) for part in (*command, *options)]
    result = subprocess.run(
        command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env={**os.environ, **environment}
    )
    return result.returncode, " ".join(result.stdout.split())


@pytest.mark.parametrize("gpu", [False, True])
def test_auto_asks_for_a_gpu_before_it_looks_for_nvcc(tmp_path, gpu):
    if gpu:
        (tmp_path / "nvidia0").touch()
    options = f"-DDNC_GPU_FILES={tmp_path}/nvidia[0-9]*;{tmp_path}/dxg"
    status, text = configure(tmp_path / "build", options, CUDACXX="/nonexistent/nvcc")
    assert status == 0 and "no CUDA kernels: " in text
    if gpu:
        assert (
            "A GPU is visible, but there will be no CUDA kernels: nvcc was not found or does not work; put it on PATH" in text
        )
    else:
        assert f"no GPU is visible here ({tmp_path}/nvidia[0-9]*, {tmp_path}/dxg); -DDNC_BUILD=cuda builds them" in text
        assert "CUDA compiler" not in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_auto_builds_cuda_where_nvcc_and_a_gpu_are(tmp_path):
    (tmp_path / "nvidia0").touch()
    status, text = configure(tmp_path / "build", f"-DDNC_GPU_FILES={tmp_path}/nvidia[0-9]*")
    assert status == 0 and "and CUDA kernels (80-real;90a-real;100)" in text


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_a_cmake_older_than_nvcc_says_what_to_install(tmp_path):
    program = shutil.which("cmake", path="/usr/bin")
    if program is None:
        pytest.skip("needs a CMake of the distribution")
    status, text = configure(tmp_path / "asked", "-DDNC_BUILD=cuda", program=program)
    if status == 0:
        pytest.skip("this CMake knows this nvcc")
    words = r"CMake 3\.\d+\.\d+ does not know how nvcc [\d.]+ compiles C\+\+20; run `pip install cmake` for a newer one"
    assert re.search(f"-DDNC_BUILD=cuda, but {words}", text)
    (tmp_path / "nvidia0").touch()
    status, text = configure(tmp_path / "auto", f"-DDNC_GPU_FILES={tmp_path}/nvidia[0-9]*", program=program)
    assert status == 0 and re.search(f"A GPU is visible, but there will be no CUDA kernels: {words}", text)


@pytest.mark.slow
def test_cuda_without_nvcc_fails_and_says_so(source):
    result = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--inplace"],
        cwd=source, env={**os.environ, "DNC_KERNELS_BUILD": "cuda", "CUDACXX": "/nonexistent/nvcc"}, timeout=600, text=True,
        capture_output=True,
    )  # fmt: skip
    assert result.returncode != 0
    assert "DNC_KERNELS_BUILD=cuda, but nvcc was not found" in result.stderr
    assert "building the extension failed" in result.stderr and "Traceback" not in result.stderr
