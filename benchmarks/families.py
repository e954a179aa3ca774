"""The families of kernels, and the files of each.

Importing this imports neither torch nor the package, which a fault on a GPU could break.
"""

from __future__ import annotations

from pathlib import Path

from . import ROOT

#: Those of `dnc_kernels.backends.FAMILY`; a test compares them.
FAMILIES = ("embedding", "head", "momentum", "similarity", "sinkhorn", "upsample")
#: Those with CUDA C++ kernels. A head's step launches those of the others, and Triton's.
CUDA_FAMILIES = tuple(family for family in FAMILIES if family != "head")
#: What the names of a family's tests begin with, after test_; else the family itself.
_STEMS = {"similarity": ("similarity", "nearest", "contrast")}


def cuda_files(family: str, root: Path = ROOT) -> list[Path]:
    """What nvcc compiles of a family."""
    return sorted((root / "csrc" / "cuda").glob(f"{family}*.cu"))


def source(family: str, root: Path = ROOT) -> str:
    """SHA-256 of what a family's kernels are compiled from, as CMakeLists.txt computes it."""
    from dnc_kernels._source import digest

    folders = (("csrc/cuda", "*.cu"), ("csrc/cuda", "*.h"), ("csrc/include/dnc", "*.h"))
    paths = sorted((path for folder, names in folders for path in (root / folder).glob(names)), key=str)
    mine = (p for p in paths if p.name.startswith(family) or not p.name.startswith(FAMILIES))
    return digest(mine)


def cuda_tests(family: str, root: Path = ROOT) -> list[Path]:
    """Files with the tests of a family's CUDA C++ kernels, which are marked `cuda`; beside them stand some of Triton's."""
    stems = _STEMS.get(family, (family,))
    return sorted({p for s in stems for end in ("cuda", "gpu") for p in (root / "tests").glob(f"test_{s}*_{end}.py")})
