"""Run the small tests of the CUDA C++ kernels on this GPU under compute-sanitizer, each tool where it can tell something.

The tests are those that also run on the host (marked cuda, not gpu). Every tensor gets memory of its own from the driver, so
that an access beside it is beside its allocation.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from . import ROOT
from .families import CUDA_FAMILIES, cuda_tests

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")
#: Tools that look at every kernel. initcheck must: what torch's kernels wrote would count as never written.
_EVERY_KERNEL = ("initcheck",)
#: Where racecheck is of use: it does not know the barriers and the asynchronous copies that order the other families' kernels.
_RACECHECK = ("embedding", "momentum", "sinkhorn")
#: What the tests need beside the tool: memory without a pool.
ENVIRONMENT = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}


def find() -> str | None:
    """Path of compute-sanitizer: on PATH, else in a CUDA toolkit."""
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    toolkits += [str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    folders = [Path(t) / part for t in toolkits if t for part in ("bin", "compute-sanitizer", "extras/compute-sanitizer")]
    places = [None, *map(str, folders)]
    return next((path for place in places if (path := shutil.which("compute-sanitizer", path=place))), None)


def applies(tool: str, family: str) -> bool:
    """Whether a tool can tell something about a family's kernels."""
    return bool(cuda_tests(family)) and (tool != "racecheck" or family in _RACECHECK)


@cache
def _help(sanitizer: str) -> str:
    return subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout


def under(sanitizer: str, tool: str, *, ours: bool = True) -> list[str]:
    """What to put before a command to run it under a tool. `ours`: only the CUDA C++ kernels of this package, where it can.

    The name of the filter differs between versions of the sanitizer.
    """
    names = [name for name in ("--kernel-name", "--kernel-regex") if f"{name} " in _help(sanitizer)]
    only = [names[0], "kns=dnc"] if names and ours and tool not in _EVERY_KERNEL else []
    return [sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *only]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every tool on every family that it applies to; 1 where one complains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--family", action="append", choices=CUDA_FAMILIES, help="all; may be repeated")
    parser.add_argument("--tool", action="append", choices=TOOLS, help="all; may be repeated")
    parser.add_argument("-k", help="pytest's selection of tests")
    options = parser.parse_args(arguments)
    sanitizer = find()
    if not torch.cuda.is_available():
        print("benchmarks.sanitize: torch sees no CUDA device; without one, ASan looks at the same kernels", file=sys.stderr)
        return 1
    if sanitizer is None:
        where = "PATH, $CUDA_HOME or beside nvcc; it comes with the CUDA toolkit (package cuda-sanitizer)"
        print(f"benchmarks.sanitize: compute-sanitizer was not found on {where}", file=sys.stderr)
        return 1
    failed = []
    for family in options.family or CUDA_FAMILIES:
        for tool in options.tool or TOOLS:
            if not applies(tool, family):
                continue
            print(f"{family}: {tool}", flush=True)
            chosen = [
                "-m",
                "cuda and not gpu and not large",
                "-p",
                "no:cacheprovider",
                *(["-k", options.k] if options.k else []),
            ]
            tests = [sys.executable, "-m", "pytest", *chosen, *map(str, cuda_tests(family))]
            if subprocess.run([*under(sanitizer, tool), *tests], cwd=ROOT, env={**os.environ, **ENVIRONMENT}).returncode:
                failed.append(f"{family} {tool}")
    print(f"compute-sanitizer: {'complains about ' + ', '.join(failed) if failed else 'clean'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
