"""Run the small tests of the CUDA C++ kernels on this GPU under compute-sanitizer: memcheck, initcheck, synccheck, racecheck.

The tests are those that also run on the host (marked cuda, not gpu). Every tensor gets memory of its own from the driver, so
that an access beside it is beside its allocation. Kernels of torch are not looked at.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .prove import FAMILIES, ROOT, tests_of

TOOLS = ("memcheck", "initcheck", "synccheck", "racecheck")


def find() -> str | None:
    """Path of compute-sanitizer: on PATH, else in a CUDA toolkit."""
    toolkits = [os.environ.get(name) for name in ("CUDA_HOME", "CUDA_PATH")]
    nvcc = shutil.which("nvcc")
    toolkits += [str(Path(nvcc).resolve().parents[1]) if nvcc else None, "/usr/local/cuda"]
    folders = [Path(t) / part for t in toolkits if t for part in ("bin", "compute-sanitizer", "extras/compute-sanitizer")]
    places = [None, *map(str, folders)]
    return next((found for place in places if (found := shutil.which("compute-sanitizer", path=place))), None)


def command(sanitizer: str, options: str, tool: str, tests: Sequence[Path], more: Sequence[str] = ()) -> list[str]:
    """What to run for one tool; `options` is the sanitizer's --help, as the name of a filter differs between versions."""
    only = next((["--" + name, "kns=dnc"] for name in ("kernel-name", "kernel-regex") if f"--{name} " in options), [])
    chosen = ["-m", "cuda and not gpu", "-p", "no:cacheprovider", *more]
    return [
        sanitizer, "--tool", tool, "--error-exitcode", "9", "--print-limit", "20", *only,
        sys.executable, "-m", "pytest", *chosen, *map(str, tests),
    ]  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run every tool on every family; 1 where one complains."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.sanitize", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="all; may be repeated")
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
    text = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    failed = []
    for family in options.family or FAMILIES:
        for tool in (options.tool or TOOLS) if tests_of(family) else ():
            print(f"{family}: {tool}", flush=True)
            more = ["-k", options.k] if options.k else []
            run = command(sanitizer, text, tool, tests_of(family), more)
            if subprocess.run(run, cwd=ROOT, env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}).returncode:
                failed.append(f"{family} {tool}")
    print(f"compute-sanitizer: {'complains about ' + ', '.join(failed) if failed else 'clean'}")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
