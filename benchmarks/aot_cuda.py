"""Resources of every CUDA C++ kernel on every architecture, read from machine code on a machine without a GPU.

The code is that of the extension where it was built from this very source for all architectures, else of objects that nvcc
compiles into a folder of their own. `python -m benchmarks.aot` prints these rows beside Triton's.
"""

from __future__ import annotations

import re
import shutil
import tempfile
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path

from dnc_kernels import backends

from . import ROOT
from .families import CUDA_FAMILIES, cuda_files, source
from .machine_code import ARCHS, Row, cuobjdump, run, usage

#: Names of `machine_code.FEATURES`, and how an instruction of machine code begins that does it.
_INSTRUCTIONS = {
    "wgmma": "HGMMA", "tcgen05.mma": r"UT\w*MMA", "mma.sync": "HMMA", "cp.async": "(LDGSTS|UBLKCP|UTMALDG)",
    "mbarrier": "SYNCS", "redux": "C?REDUX", "atom": "ATOM[GS]?", "red": "RED[GS]?", "ld.local": "LDL", "st.local": "STL",
    "trap": r"BPT\.TRAP",
}  # fmt: skip
_FEATURES = {name: re.compile(rf"{code}\b") for name, code in _INSTRUCTIONS.items()}
#: An instruction of machine code: address, predicate, operation, operands.
_INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(@\S+\s+)?([A-Z][\w.]*)\s*([^;\n]*);", re.MULTILINE)
_PRODUCT = re.compile(r"HGMMA|HMMA|UT\w*MMA")
#: Orders memory for the whole device, or empties the first-level cache for that.
_DEVICE_FENCE = re.compile(r"MEMBAR\.\w+\.(GPU|SYS)|CCTL\.IVALL")


def missing() -> str:
    """Why there is nothing to read here, or the empty string."""
    if shutil.which(cuobjdump()) is None:
        return "cuobjdump was found neither in triton nor on PATH"
    if not is_current() and shutil.which("nvcc") is None:
        return "the extension was not built from this source for every architecture, and nvcc is not on PATH"
    return ""


def is_current(families: Sequence[str] = CUDA_FAMILIES, archs: Sequence[int] = ARCHS) -> bool:
    """Whether the extension holds machine code of this source for all these architectures."""
    native = backends._native
    built = {int(re.sub(r"\D.*", "", arch)) for arch in (getattr(native, "cuda_archs", None) or "").split()}
    sources = getattr(getattr(native, "cuda", None), "sources", {})
    return built >= set(archs) and all(sources.get(family) == source(family) for family in families)


def rows(families: Sequence[str] = CUDA_FAMILIES, archs: Sequence[int] = ARCHS, jobs: int = 2) -> list[Row]:
    """A row for every kernel of these families on these architectures."""
    with _binaries(families, archs, jobs) as files:
        return [row for file, arch in files for row in _rows_of(file, arch) if row.op.partition(".")[0] in families]


@contextmanager
def _binaries(families: Sequence[str], archs: Sequence[int], jobs: int) -> Iterator[list[tuple[Path, int]]]:
    """Files, with an architecture that each has code for."""
    if is_current(families, archs):
        yield [(Path(backends.native().__file__), arch) for arch in archs]
        return
    with tempfile.TemporaryDirectory() as folder:
        paths = [path for family in families for path in cuda_files(family)]
        work = [(path, arch, Path(folder) / f"{path.stem}_{arch}.o") for path in paths for arch in archs]
        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(lambda job: compile_file(*job), work))
        yield [(to, arch) for _, arch, to in work]


def _real(arch: int) -> str:
    """The architecture that code is made for: of 9.0 its own variant, as wgmma is only there."""
    return "sm_90a" if arch == 90 else f"sm_{arch}"


def compile_file(path: Path, arch: int, to: Path, root: Path = ROOT) -> None:
    """As CMakeLists.txt does it, for one architecture; the file's headers are those of `root`."""
    name = _real(arch).removeprefix("sm_")
    include = [f"-I{root / 'csrc' / folder}" for folder in ("include", "cuda")]
    run("nvcc", "-std=c++20", "-O3", "-DNDEBUG", "-lineinfo", "-DDNC_WITH_CUDA", "-Xcompiler=-fPIC", *include,
        f"-arch=compute_{name}", f"-code=sm_{name}", "-c", str(path), "-o", str(to))  # fmt: skip


def _rows_of(file: Path, arch: int) -> list[Row]:
    dump = (cuobjdump(), "--gpu-architecture", _real(arch), str(file))
    resources, code = run(*dump, "--dump-resource-usage"), run(*dump, "--dump-sass")
    instructions = {name: text for _, name, text in _functions(code, r"^\s*Function : (\S+)$")}
    found = []
    for family, name, text in _functions(resources, r"^ Function (\S+):$"):
        used, kernel, operations = usage(text), readable(name), {m[3] for m in _INSTRUCTION.finditer(instructions[name])}
        found.append(
            Row(
                op=f"{family}.{kernel.partition('<')[0].removesuffix('_kernel')}", kernel=kernel, config={},
                when={"bits": 16} if "Float16" in kernel or "BFloat16" in kernel else {}, arch=f"sm_{arch}",
                registers=used["REG"], spills=used["STACK"] + used["LOCAL"], shared_bytes=used["SHARED"], threads=0,
                ptx_features=[f for f, code in _FEATURES.items() if any(map(code.match, operations))], backend="cuda",
                fences=fences_between_products(instructions[name]),
            )
        )  # fmt: skip
    return found


def fences_between_products(code: str) -> int:
    """Device-wide fences that a kernel can meet on the way from one matrix product to another, in cuobjdump's machine code.

    The way is that of control flow, not of addresses: nvcc puts much of a waiting loop behind the end of a kernel. A fence
    before the first product or after the last, as of a cluster's start or of the last block, is not counted.
    """
    instructions = [(int(m[1], 16), m[2], m[3], m[4].strip()) for m in _INSTRUCTION.finditer(code)]
    products = {i for i, (_, _, operation, _) in enumerate(instructions) if _PRODUCT.match(operation)}
    fences = {i for i, (_, _, operation, _) in enumerate(instructions) if _DEVICE_FENCE.match(operation)}
    if not products or not fences:
        return 0
    following = _control_flow(instructions)
    after = _reached(following, products)
    return sum(1 for fence in fences & after if not products.isdisjoint(_reached(following, {fence})))


def _control_flow(instructions: Sequence[tuple[int, str | None, str, str]]) -> list[set[int]]:
    """Numbers of the instructions that may follow each one.

    A call is followed by the subroutine and by what comes after it, a return by nothing: subroutines divide and take roots.
    """
    at = {address: i for i, (address, _, _, _) in enumerate(instructions)}
    following: list[set[int]] = []
    scopes: list[tuple[int, str, int]] = []  # where threads part, the barrier where they meet, and where they go on then
    ends: dict[str, set[int]] = {}  # of a scope: its barrier is waited for, or set anew
    for i, (_, predicate, operation, operands) in enumerate(instructions):
        name, target = operation.partition(".")[0], re.search(r"\b0x([0-9a-f]+)$", operands)
        to = at.get(int(target[1], 16)) if target else None
        # a branch depends on a predicate before it (@P0 BRA X) or among its operands (BRA P0, X; BRA.U UP0, X)
        always = name in ("EXIT", "RET", "BSYNC") or (operation == "BRA" and operands.startswith("0x"))
        following.append({i + 1} if (predicate or not always) and i + 1 < len(instructions) else set())
        if name in ("BRA", "CALL") and to is not None:
            following[i].add(to)
        if name in ("BSSY", "BSYNC"):
            barrier = operands.partition(",")[0]
            ends.setdefault(barrier, set()).add(i)
            if to is not None:
                scopes.append((i, barrier, to))
    for i, barrier, to in scopes:
        for end in _reached(following, {i}, ends[barrier]) & ends[barrier]:
            if instructions[end][2].startswith("BSYNC"):
                following[end].add(to)
    return following


def _reached(following: Sequence[set[int]], start: set[int], until: Set[int] = frozenset()) -> set[int]:
    """Instructions on any way from `start` on, which goes no further than those of `until`."""
    reached: set[int] = set()
    ahead = {j for i in start for j in following[i]}
    while ahead:
        i = ahead.pop()
        reached.add(i)
        if i not in until:
            ahead |= following[i] - reached
    return reached


def _functions(text: str, pattern: str) -> Iterator[tuple[str, str, str]]:
    """Family, mangled name and text of every kernel of this library in cuobjdump's output for one architecture."""
    for part in text.split("Fatbin elf code:")[1:]:
        path = re.search(r"^identifier = (\S+)$", part, re.MULTILINE)
        family = next((f for f in CUDA_FAMILIES if path and Path(path[1]).name.startswith(f)), None)
        if family:
            pieces = re.split(pattern, part, flags=re.MULTILINE)
            yield from ((family, name, body) for name, body in zip(pieces[1::2], pieces[2::2], strict=True))


@cache
def readable(name: str) -> str:
    """A kernel's name and template arguments, without namespaces and parameters."""
    if shutil.which("c++filt"):
        name = run("c++filt", name).strip()
    name = re.sub(r"\(anonymous namespace\)::|dnc::|cuda::|^void ", "", name)
    depth = 0
    for i, c in enumerate(name):
        depth += (c == "<") - (c == ">")
        if c == "(" and depth == 0:
            return name[:i]
    return name
