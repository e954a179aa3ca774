"""Carry proofs over to this source where nvcc makes the very same program of it: ``python -m benchmarks.carry COMMIT``.

A proof is of a family's source, and what all families share belongs to each: a function more in ptx.h voids every proof. Where
the code of all of a family's objects, for the GPU and for the host, is the same to the bit as that of the commit whose source
was proven, what the tests ran is what this source builds, and the row holds for both.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from dnc_kernels import _evidence
from dnc_kernels._evidence import Capability, Proof

from . import ROOT, prove
from .aot_cuda import compile_file
from .families import cuda_files, source
from .machine_code import cuobjdump, run

#: What nvcc calls an anonymous namespace, after a hash of the file's path and content.
_HASHES = re.compile(r"(?<=_GLOBAL__N__)[0-9a-f]{8}|(?<=_cu_)[0-9a-f]{8}")


def program(path: Path, root: Path, capability: Capability) -> str:
    """The code of a file of `root`, for a GPU and for the host, without what depends on where the file lies."""
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "code.o"
        compile_file(path, 10 * capability[0] + capability[1], made, root)
        gpu = run(cuobjdump(), "--dump-sass", str(made)).partition("Function :")[2]
        host = run("objdump", "--disassemble", "--reloc", str(made)).partition("Disassembly of")[2]
    return _HASHES.sub("", gpu + host)


def same_program(family: str, before: Path, capability: Capability) -> bool:
    """Whether a family's files, those of `before` and those here, make one program."""
    files, old = ({p.name: p for p in cuda_files(family, root)} for root in (ROOT, before))
    if files.keys() != old.keys():
        return False
    with ThreadPoolExecutor(2) as pool:
        new = list(pool.map(lambda name: program(files[name], ROOT, capability), files))
        return new == list(pool.map(lambda name: program(old[name], before, capability), files))


def carried(
    proofs: Iterable[Proof], before: Callable[[str], str], now: Callable[[str], str], same: Callable[[str, Capability], bool]
) -> list[Proof]:
    """Rows for the source of `now`, one for each that was proven of the source of `before`, which makes the same program."""
    return [
        replace(p, source=now(p.family))
        for p in proofs
        if p.source == before(p.family) != now(p.family) and same(p.family, p.capability)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Carry what can be carried; 1 where nothing is."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.carry", description=__doc__)
    parser.add_argument("commit", help="whose source was proven")
    commit = parser.parse_args(arguments).commit
    with tempfile.TemporaryDirectory() as folder:
        before, archive = Path(folder), Path(folder) / "csrc.tar"
        subprocess.run(["git", "archive", "-o", str(archive), commit, "csrc"], cwd=ROOT, check=True)
        subprocess.run(["tar", "-xf", str(archive), "-C", folder], check=True)
        rows = carried(_evidence.read_proofs(), lambda f: source(f, before), source, lambda f, on: same_program(f, before, on))
    prove.add(rows)
    for row in rows:
        print(f"{row.family}: the program that passed {row.tests} tests on {row.device}")
    return int(not rows)


if __name__ == "__main__":
    sys.exit(main())
