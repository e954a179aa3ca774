"""Prove the CUDA C++ kernels on this GPU: run each family's tests, and write a row of proof for those that pass.

A row holds for the source that the build was made from and for GPUs of the same compute capability; `auto` chooses no CUDA C++
kernel without one. Commit dnc_kernels/proofs.json to keep it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from xml.etree import ElementTree

import torch

from dnc_kernels import _evidence, backends
from dnc_kernels._evidence import Proof

from .harness import surroundings

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = tuple(sorted(set(backends.FAMILY.values())))
#: What the names of a family's tests begin with, after test_; else the family itself.
_STEMS = {"similarity": ("similarity", "nearest", "contrast")}


def source(family: str, root: Path = ROOT) -> str:
    """SHA-256 of what a family's kernels are compiled from, as CMakeLists.txt computes it."""
    folders = (("csrc/cuda", "*.cu"), ("csrc/cuda", "*.h"), ("csrc/include/dnc", "*.h"))
    paths = sorted((path for folder, names in folders for path in (root / folder).glob(names)), key=str)
    mine = (p for p in paths if p.name.startswith(family) or not p.name.startswith(FAMILIES))
    return hashlib.sha256(b"".join(p.read_bytes().replace(b"\r\n", b"\n") for p in mine)).hexdigest()


def tests_of(family: str, root: Path = ROOT) -> list[Path]:
    """Files with the tests of a family's CUDA C++ kernels."""
    return sorted({p for s in _STEMS.get(family, (family,)) for p in (root / "tests").glob(f"test_{s}*_cuda.py")})


def passed(tests: Sequence[Path], timeout_s: float = 300) -> tuple[int, int]:
    """Exit status of pytest on files, and how many tests passed. A kernel that hangs ends with its family's time."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", *map(str, tests), f"--junitxml={report}"]
        try:
            status = subprocess.run(command, cwd=ROOT, timeout=timeout_s).returncode
        except subprocess.TimeoutExpired:
            print(f"{tests[0].name}: stopped after {timeout_s:g} s")
            return 1, 0
        if not report.exists():
            return status or 1, 0
        found = list(ElementTree.parse(report).iter("testcase"))
    return status, sum(not any(case.find(tag) is not None for tag in ("skipped", "failure", "error")) for case in found)


def prove(family: str, sources: Mapping[str, str], device: str, capability: tuple[int, int]) -> Proof | None:
    """The row of proof of a family, or None with the reason printed."""
    tests, reason = tests_of(family), ""
    if not tests:
        reason = "it has no tests"
    elif sources.get(family) != source(family):
        reason = "the extension was built from other source; run `python setup.py build_ext --inplace`"
    else:
        status, count = passed(tests)
        if status == 0 and count:
            commit, date = surroundings("cuda")["git_commit"], time.strftime("%Y-%m-%d", time.gmtime())
            return Proof(family, sources[family], device, capability, count, commit, date)
        reason = "its tests failed" if status else "no test ran"
    print(f"{family}: not proven: {reason}")
    return None


def add(rows: Sequence[Proof], path: Path = _evidence.PROOFS) -> None:
    """Write rows behind those that are there, in the place of rows of the same source and device."""
    new = {(r.family, r.source, r.device) for r in rows}
    kept = [r for r in _evidence.read_proofs(path) if (r.family, r.source, r.device) not in new]
    lines = [json.dumps(asdict(r)) for r in sorted([*kept, *rows], key=lambda r: (r.family, r.date))]
    path.write_text("[\n" + ",\n".join(f" {line}" for line in lines) + "\n]\n" if lines else "[]\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove the families that have CUDA C++ kernels; 1 where one is not proven."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prove", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="all with CUDA C++ kernels; may be repeated")
    options = parser.parse_args(arguments)
    if backends.UNUSABLE["cuda"]:
        print(f"benchmarks.prove: {backends.UNUSABLE['cuda']}; only a GPU can prove a kernel", file=sys.stderr)
        return 1
    with_kernels = {backends.FAMILY[op] for op, kernels in backends.KERNELS.items() if "cuda" in kernels}
    families = options.family or sorted(with_kernels)
    device, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    found = [prove(family, backends.native().cuda.sources, device, capability) for family in families]
    rows = [row for row in found if row is not None]
    add(rows)
    for row in rows:
        print(f"{row.family}: proven by {row.tests} tests on {row.device} ({'.'.join(map(str, row.capability))})")
    return int(len(rows) < len(families))


if __name__ == "__main__":
    sys.exit(main())
