"""The CUDA kernels as host C++ (csrc/tests/cuda_on_cpu): building the module, and running ops on it without a GPU.

With a GPU the same tests run the real kernels. ``DNC_KERNELS_TEST_SANITIZE=1`` builds with AddressSanitizer; the process must
then run under it (see test_cuda_sanitized.py).
"""

import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

from dnc_kernels import backends
from dnc_kernels.ops import _cuda

ROOT = Path(__file__).resolve().parent.parent
SANITIZE = os.environ.get("DNC_KERNELS_TEST_SANITIZE") == "1"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ORDERS = ("forward", "backward", "shuffled", "drifting")


def cmake(name: str) -> str:
    """cmake, ctest or ninja: the one beside this Python, else the one on PATH."""
    beside = Path(sys.executable).parent / name
    return str(beside) if beside.exists() else (shutil.which(name) or name)


@cache
def build(sanitize: bool = SANITIZE) -> Path:
    """Build the modules (once for all workers) and return their folder; skips where there is no CUDA toolkit."""
    if shutil.which("nvcc") is None:
        pytest.skip("needs the CUDA toolkit's headers (nvcc on PATH)")
    import pybind11

    # a tree of its own for each Python: modules of two would lie side by side
    tree = ROOT / "build" / (f"cuda-on-cpu-{sys.implementation.cache_tag}" + ("-sanitized" if sanitize else ""))
    tree.mkdir(parents=True, exist_ok=True)
    with (tree / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        configure = [
            cmake("cmake"), "-S", ROOT / "csrc" / "tests" / "cuda_on_cpu", "-B", tree, "-G", "Ninja",
            f"-DCMAKE_MAKE_PROGRAM={cmake('ninja')}", f"-DPython_EXECUTABLE={sys.executable}",
            f"-Dpybind11_DIR={pybind11.get_cmake_dir()}", f"-DSANITIZE={'ON' if sanitize else 'OFF'}", "-DCMAKE_BUILD_TYPE=None",
        ]  # fmt: skip
        # the compiler must not run under the sanitizer that this process may run under
        environment = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "ASAN_OPTIONS")}
        for command in (configure, [cmake("cmake"), "--build", tree]):
            done = subprocess.run(
                [str(c) for c in command], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
            )
            assert done.returncode == 0, done.stdout[-6000:]
    return tree


@cache
def load(name="_cuda_on_cpu"):
    """The kernels, or ``_checks``: the harness' own tests."""
    (path,) = build().glob(f"{name}.*.so")
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@contextmanager
def host_kernels():
    """Inside: backend "cuda" runs the kernels' own source on CPU tensors."""
    module, patch = load(), pytest.MonkeyPatch()
    patch.setattr(_cuda, "module", lambda: module)
    patch.setattr(_cuda, "where", lambda x: (0, 0))
    for op, kernels in list(backends.KERNELS.items()):
        if "cuda" in kernels:
            patch.setitem(backends.KERNELS, op, {**kernels, "cuda": replace(kernels["cuda"], device="cpu", capability=None)})
    patch.setitem(backends.UNUSABLE, "cuda", "")
    try:
        configure()
        yield
    finally:
        patch.undo()


def configure(order="forward", processors=3, capability=90):
    """How the host runs the next launches, and the GPU that launchers believe in."""
    load().configure(order, processors, capability)
