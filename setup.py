"""Drives CMake (the only build description) for `pip install .`, `build_ext --inplace` and editable installs.

Environment: DNC_KERNELS_BUILD=cpu|cuda|auto, DNC_KERNELS_CUDA_ARCHS="80;90a", DNC_KERNELS_JOBS. torch is not needed.
"""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


def _jobs() -> int:
    """Compiler processes that fit: one a core, and 1.5 GB each (nvcc and the widest kernels need about that)."""
    if "DNC_KERNELS_JOBS" in os.environ:
        return max(1, int(os.environ["DNC_KERNELS_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return cores
    return max(1, min(cores, int(memory // 1.5e9)))


class CMakeBuild(build_ext):
    """Builds `_C` with CMake and Ninja and puts it where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        build = os.environ.get("DNC_KERNELS_BUILD", "auto")
        if build not in ("cpu", "cuda", "auto"):
            raise SystemExit(f"DNC_KERNELS_BUILD must be cpu, cuda or auto; got {build!r}")
        work = Path(self.build_temp).resolve() / "cmake"  # below build/, so a second build is incremental
        work.mkdir(parents=True, exist_ok=True)
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        subprocess.run(
            [
                "cmake", "-S", str(ROOT), "-B", str(work), "-G", "Ninja", "-DDNC_PYTHON=ON", f"-DDNC_BUILD={build}",
                f"-DDNC_CUDA_ARCHS={os.environ.get('DNC_KERNELS_CUDA_ARCHS', '')}",
                f"-DPython_EXECUTABLE={sys.executable}", f"-Dpybind11_DIR={pybind11.get_cmake_dir()}",
            ],
            check=True,
        )  # fmt: skip
        subprocess.run(["cmake", "--build", str(work), "--target", "_C", "-j", str(_jobs())], check=True)
        built = next(work.glob("_C*.so"))
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(built), str(target))


setup(ext_modules=[Extension("dnc_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
