"""Drives CMake (the only build description) for `pip install .`, `build_ext --inplace` and editable installs.

Environment: DNC_KERNELS_BUILD=cpu|cuda|auto, DNC_KERNELS_CUDA_ARCHS="80-real;90a-real" or native, DNC_KERNELS_JOBS.
torch is not needed.
"""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent


#: Memory that a compiler process is given, in bytes: nvcc 13 takes 0.21 GB for the widest kernels, g++ 12 0.45 GB for bindings.
COMPILER = 0.75e9


def _jobs() -> int:
    """Compiler processes that fit: one a core, as long as the memory is there for all of them."""
    if "DNC_KERNELS_JOBS" in os.environ:
        return max(1, int(os.environ["DNC_KERNELS_JOBS"]))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(cores, int(_memory() // COMPILER)))


def _memory() -> float:
    """Bytes that processes may have in the end, on this machine and in the control group of this process.

    Not what is free now: caches give way, and a virtual machine may get its memory only as it uses it.
    """
    limits = []
    with suppress(ValueError, OSError, AttributeError):  # not on every system
        limits.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError):
        for line in Path("/proc/self/cgroup").read_text().splitlines():
            _, controllers, name = line.split(":", 2)
            if controllers not in ("", "memory"):
                continue
            root, file = (
                ("/sys/fs/cgroup", "memory.max") if not controllers else ("/sys/fs/cgroup/memory", "memory.limit_in_bytes")
            )
            group = Path(root + name)
            for folder in (group, *group.parents):  # a group above may allow less; a container shows its own as the root
                with suppress(OSError, ValueError):  # "max" is no limit
                    limits.append(int((folder / file).read_text()))
    return min(limits, default=float("inf"))


def _mode() -> str:
    mode = os.environ.get("DNC_KERNELS_BUILD") or "auto"
    if mode not in ("cpu", "cuda", "auto"):
        raise SystemExit(f"DNC_KERNELS_BUILD must be cpu, cuda or auto; got {mode!r}")
    return mode


def _cuda_archs() -> str:
    """Architectures as CMake writes them: 90a-real is SASS alone, 90a-virtual PTX alone, 90a both. Empty: its default.

    CMake makes 90a of 90, and of native what this machine's GPUs are (cmake/architectures.cmake).
    """
    archs = [arch for arch in re.split(r"[;,\s]+", os.environ.get("DNC_KERNELS_CUDA_ARCHS", "")) if arch]
    for arch in archs:
        if not re.fullmatch(r"\d{2,3}[af]?(-real|-virtual)?|native", arch):
            raise SystemExit(f"DNC_KERNELS_CUDA_ARCHS must be like '80-real;90a-real;100', or native; got {arch!r}")
    return ";".join(archs)


def _tool(name: str, folder: str) -> str:
    """The cmake or ninja that pip installed for this build, which an isolated build has to itself; else the one on PATH."""
    try:
        candidate = shutil.which(name, path=getattr(importlib.import_module(name), folder))
    except (ImportError, AttributeError):
        candidate = None
    candidate = candidate or shutil.which(name)
    if candidate is None:
        raise SystemExit(f"{name} was not found; run `pip install {name}`")
    return candidate


#: About how long a file takes to compile, in seconds of one core: with g++ 12; with nvcc 13, for each architecture.
SECONDS = {"CXX": 4, "CUDA": 5}


def _outlook(targets: str, tree: Path, architectures: int, jobs: int) -> str:
    """What a tree has not compiled yet, and about how long it takes; empty where every file has been compiled before.

    Args:
        targets: what ``ninja -t targets all`` says.
        tree: the build tree.
        architectures: that CUDA kernels are compiled for.
        jobs: compilers at once.
    """
    objects = re.findall(r"^(CMakeFiles/(?:dnc\w*|_C)\.dir/.*\.o): (CXX|CUDA)_", targets, re.M)
    missing = [language for path, language in objects if not (tree / path).exists()]
    if not missing:
        return ""
    seconds = sum(SECONDS[language] * (architectures if language == "CUDA" else 1) for language in missing) / jobs
    files = " and ".join(_count(missing.count(x), f"{x.replace('CXX', 'C++')} file") for x in SECONDS if x in missing)
    return f"compiling {files}, {jobs} at a time: about {_count(max(1, round(seconds / 60)), 'minute')}"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'s' * (number != 1)}"


def _run(command: list[str]) -> None:
    if subprocess.run(command).returncode != 0:
        raise SystemExit(f"building the extension failed, see above: {shlex.join(command)}")


class CMakeBuild(build_ext):
    """Builds `_C` with CMake and Ninja and puts it where setuptools expects the extension."""

    def build_extension(self, ext: Extension) -> None:
        import pybind11

        cmake, ninja, archs, jobs = _tool("cmake", "CMAKE_BIN_DIR"), _tool("ninja", "BIN_DIR"), _cuda_archs(), _jobs()
        # one tree for wheels, editable installs and in-place builds of a Python: each finds the others' objects
        work = ROOT / "build" / f"cmake-{sysconfig.get_platform()}-{sys.implementation.cache_tag}"
        work.mkdir(parents=True, exist_ok=True)
        # every path that an earlier, isolated build may have left in the cache is given anew
        options = {
            "DNC_PYTHON": "ON",
            "DNC_BUILD": _mode(),
            "DNC_CUDA_ARCHS": archs,
            "CMAKE_MAKE_PROGRAM": ninja,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
        }
        define = [f"-D{name}={value}" for name, value in options.items()]
        _run([cmake, "-S", str(ROOT), "-B", str(work), "-G", "Ninja", *define])
        targets = subprocess.run([ninja, "-C", str(work), "-t", "targets", "all"], capture_output=True, text=True).stdout
        if outlook := _outlook(targets, work, len(archs.split(";")) if archs else 3, jobs):
            print(f"==> {outlook}", flush=True)
        _run([cmake, "--build", str(work), "--target", "_C", "-j", str(jobs)])
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        self.copy_file(str(work / f"_C{sysconfig.get_config_var('EXT_SUFFIX')}"), str(target))


setup(ext_modules=[Extension("dnc_kernels._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
