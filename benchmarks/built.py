"""Whether what is imported and timed is what lies in this checkout, whose commit the results name."""

from __future__ import annotations

from pathlib import Path

from . import ROOT


def other() -> str:
    """What is not of this checkout, the package or its extension, and what to do; empty: both are."""
    import dnc_kernels
    from dnc_kernels import _source, backends

    folder = Path(dnc_kernels.__file__).resolve().parent
    if folder != ROOT / "dnc_kernels":
        return f"the package is imported from {folder}, not from this checkout, {ROOT}; run in {ROOT}, without PYTHONPATH"
    native = backends._native
    if native is not None and getattr(native, "source", None) != _source.source(ROOT):
        commit = f"{getattr(native, 'commit', 'unknown')}, not {_source.commit(ROOT)}"
        return (
            f"{native.__file__} was built from other source ({commit}) than lies in csrc; build it anew: `make install`, or "
            "`python setup.py build_ext --inplace` with this Python"
        )
    return ""


def demand() -> None:
    """End the program with the reason where results would name a commit that they are not of."""
    if why := other():
        raise SystemExit(f"benchmarks: {why}")
