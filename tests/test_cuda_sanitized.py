"""Every CUDA kernel once under AddressSanitizer and UndefinedBehaviorSanitizer, as host C++; and that these catch mistakes."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from cuda_on_cpu import DEVICE, SANITIZE, build

from benchmarks.families import CUDA_FAMILIES, cuda_tests

HERE = Path(__file__).resolve().parent


def libraries():
    """AddressSanitizer, and the C++ library whose exceptions it must know from the start; None where the compiler has none."""
    names = ("libasan.so", "libstdc++.so")
    found = [
        subprocess.check_output([shutil.which("g++") or "echo", f"-print-file-name={n}"], text=True).strip() for n in names
    ]
    return " ".join(found) if all(Path(path).is_absolute() for path in found) else None


pytestmark = [
    pytest.mark.slow,
    pytest.mark.cuda,
    pytest.mark.skipif(DEVICE == "cuda", reason="kernels run as host C++ only where there is no GPU"),
    pytest.mark.skipif(SANITIZE, reason="this process runs under the sanitizer already"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs the CUDA toolkit's headers (nvcc on PATH)"),
    pytest.mark.skipif(libraries() is None, reason="needs libasan"),
]


def run(*arguments):
    """This Python under the sanitizer, which must be loaded before everything else."""
    build(sanitize=True)
    environment = {
        **os.environ, "LD_PRELOAD": libraries(), "DNC_KERNELS_TEST_SANITIZE": "1", "PYTHONPATH": f"{HERE.parent}:{HERE}",
        # Python's own memory is never freed; one OpenMP thread, as kernels run on one
        "ASAN_OPTIONS": "detect_leaks=0", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=HERE.parent,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def test_kernels_are_clean():
    files = [str(path) for family in CUDA_FAMILIES for path in cuda_tests(family)]
    done = run("-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", "-p", "no:xdist", "-m", "cuda and sanitize", *files)
    assert done.returncode == 0, done.stdout[-6000:]
    # a family without a marked test would not be looked at
    for family in CUDA_FAMILIES:
        assert any("pytest.mark.sanitize" in path.read_text() for path in cuda_tests(family)), family


@pytest.mark.parametrize(
    ("call", "text"),
    [
        ("write_global(20)", "heap-buffer-overflow"),
        ("write_shared()", "heap-buffer-overflow"),
    ],
)
def test_a_write_out_of_bounds_is_caught(call, text):
    done = run("-c", f"from cuda_on_cpu import load; load('_checks').{call}")
    assert done.returncode != 0 and text in done.stdout, done.stdout[-3000:]
