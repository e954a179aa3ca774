"""Resources of every CUDA C++ kernel on every architecture, read from machine code on a machine without a GPU.

The code is that of the extension where it was built from this very source for all architectures, else of objects that nvcc
compiles into a folder of their own. `python -m benchmarks.aot` prints these rows beside Triton's.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dnc_kernels import backends

from .aot import ARCHS, FAMILIES, Row
from .prove import source

ROOT = Path(__file__).resolve().parents[1]
#: Names of `aot.FEATURES`, and how an instruction of machine code begins that does it.
_INSTRUCTIONS = {
    "wgmma": "HGMMA", "tcgen05.mma": r"UT\w*MMA", "mma.sync": "HMMA", "cp.async": "(LDGSTS|UBLKCP|UTMALDG)",
    "mbarrier": "SYNCS", "redux": "C?REDUX", "atom": "ATOM[GS]?", "red": "RED[GS]?", "ld.local": "LDL", "st.local": "STL",
}  # fmt: skip
_FEATURES = {name: re.compile(rf"\*/ +(@!?U?P\w+ )?{code}\b") for name, code in _INSTRUCTIONS.items()}


def missing() -> str:
    """Why there is nothing to read here, or the empty string."""
    if shutil.which(_cuobjdump()) is None:
        return "cuobjdump was found neither in triton nor on PATH"
    if not is_current() and shutil.which("nvcc") is None:
        return "the extension was not built from this source for every architecture, and nvcc is not on PATH"
    return ""


def is_current(families: Sequence[str] = FAMILIES, archs: Sequence[int] = ARCHS) -> bool:
    """Whether the extension holds machine code of this source for all these architectures."""
    native = backends._native
    built = {int(re.sub(r"\D.*", "", arch)) for arch in (getattr(native, "cuda_archs", None) or "").split()}
    sources = getattr(getattr(native, "cuda", None), "sources", {})
    return built >= set(archs) and all(sources.get(family) == source(family) for family in families)


def rows(families: Sequence[str] = FAMILIES, archs: Sequence[int] = ARCHS, jobs: int = 2) -> list[Row]:
    """A row for every kernel of these families on these architectures."""
    with _binaries(families, archs, jobs) as files:
        found = [row for file in files for row in _rows_of(file)]
    return [row for row in found if row.op.partition(".")[0] in families and int(row.arch.removeprefix("sm_")) in archs]


@contextmanager
def _binaries(families: Sequence[str], archs: Sequence[int], jobs: int) -> Iterator[list[Path]]:
    if is_current(families, archs):
        yield [Path(backends.native().__file__)]
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for family in families for path in sorted((ROOT / "csrc" / "cuda").glob(f"{family}*.cu"))]
        work = [(path, arch, Path(folder) / f"{path.stem}_{arch}.o") for path in paths for arch in archs]
        with ThreadPoolExecutor(jobs) as pool:
            yield list(pool.map(_compile, *zip(*work, strict=True))) if work else []


def _compile(path: Path, arch: int, to: Path) -> Path:
    """As CMakeLists.txt does it, for one architecture; 90 means 90a, as wgmma is only there."""
    name = f"{arch}a" if arch == 90 else str(arch)
    include = [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "cuda")]
    _run("nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "-DDNC_WITH_CUDA", *include,
         f"-arch=compute_{name}", f"-code=sm_{name}", "-c", str(path), "-o", str(to))  # fmt: skip
    return to


def _rows_of(file: Path) -> list[Row]:
    usage, code = _run(_cuobjdump(), "--dump-resource-usage", str(file)), _run(_cuobjdump(), "--dump-sass", str(file))
    instructions = {(arch, name): text for arch, _, name, text in _functions(code, r"^\s*Function : (\S+)$")}
    found = []
    for arch, family, name, text in _functions(usage, r"^ Function (\S+):$"):
        used = {key: int(value) for key, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", text)}
        kernel = readable(name)
        found.append(
            Row(
                op=f"{family}.{kernel.partition('<')[0].removesuffix('_kernel')}", kernel=kernel, config={},
                when={"bits": 16} if "Float16" in kernel or "BFloat16" in kernel else {}, arch=arch, registers=used["REG"],
                spills=used["STACK"] + used["LOCAL"], shared_bytes=used["SHARED"], threads=0,
                ptx_features=[f for f, code in _FEATURES.items() if code.search(instructions[arch, name])], backend="cuda",
            )
        )  # fmt: skip
    return found


def _functions(text: str, pattern: str) -> Iterator[tuple[str, str, str, str]]:
    """Architecture, family, mangled name and text of every kernel of this library in cuobjdump's output."""
    for part in text.split("Fatbin elf code:")[1:]:
        arch, path = (re.search(rf"^{key} = (\S+)$", part, re.MULTILINE) for key in ("arch", "identifier"))
        pieces = re.split(pattern, part, flags=re.MULTILINE)
        for name, body in zip(pieces[1::2], pieces[2::2], strict=True):
            family = next((f for f in FAMILIES if path and Path(path[1]).name.startswith(f)), None)
            if arch and family:
                yield arch[1].rstrip("af"), family, name, body


@cache
def readable(name: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    if shutil.which("c++filt"):
        name = _run("c++filt", name).strip()
    name = re.sub(r"\(anonymous namespace\)::|dnc::|cuda::|^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name


@cache
def _cuobjdump() -> str:
    try:
        from triton import knobs
    except ImportError:
        return "cuobjdump"
    return str(knobs.nvidia.cuobjdump.path)


def _run(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return done.stdout
