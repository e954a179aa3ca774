"""What GPUs have said about the kernels, as data: proofs (proofs.json) and measured times (dispatch/sm_90.json, ...).

Both are read once, at import. `python -m benchmarks.prove` and `python -m benchmarks.dispatch` write them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PROOFS = Path(__file__).parent / "proofs.json"
DISPATCH = Path(__file__).parent / "dispatch"
Capability = tuple[int, int]


@dataclass(frozen=True)
class Proof:
    """The tests of a family's CUDA C++ kernels passed on a GPU; `source` is the SHA-256 of what they were compiled from."""

    family: str
    source: str
    device: str
    capability: Capability
    tests: int
    commit: str
    date: str


@dataclass(frozen=True)
class Measured:
    """The faster backend for a shape class, and the benchmark rows that say so (file:line)."""

    when: Mapping[str, int | str]
    backend: str
    rows: str


def slug(name: str) -> str:
    """A device's name as a file's: lower case, dashes."""
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())


def read_proofs(path: Path = PROOFS) -> tuple[Proof, ...]:
    """Every row of proof, of whatever source."""
    return tuple(Proof(**{**row, "capability": tuple(row["capability"])}) for row in json.loads(path.read_text()))


def valid(proofs: Iterable[Proof], sources: Mapping[str, str]) -> dict[tuple[str, Capability], Proof]:
    """Proofs of the very source that a build was made from, by family and compute capability; the last one of each."""
    return {(p.family, p.capability): p for p in proofs if sources.get(p.family) == p.source}


def read_dispatch(folder: Path = DISPATCH) -> dict[tuple[str, Capability], tuple[Measured, ...]]:
    """Measured choices by op and compute capability."""
    return {
        (op, divmod(int(path.stem.removeprefix("sm_")), 10)): tuple(
            Measured(entry["when"], entry["backend"], entry["rows"]) for entry in entries
        )
        for path in sorted(folder.glob("sm_*.json"))
        for op, entries in json.loads(path.read_text()).items()
    }


def nearest(entries: Sequence[Measured], sizes: Mapping[str, int], bits: int, layout: str | None) -> Measured | None:
    """The entry whose sizes are nearest: the smallest product of ratios. Those of another width are other kernels; those of
    another layout count where none has this one: nobody measures all that `layout` calls strided.

    Products of ratios instead of sums of logarithms: torch.compile traces them with symbolic sizes.
    """
    if layout is not None:
        entries = [e for e in entries if e.when.get("layout", layout) == layout and e.when.get("bits", bits) == bits] or entries
    best, least = None, 0.0
    for entry in entries:
        ratio, same = 1.0, True
        for key, size in entry.when.items():
            if key == "bits":
                same = size == bits
            elif isinstance(size, int) and key in sizes:
                ratio *= (max(sizes[key], size) + 1) / (min(sizes[key], size) + 1)
        if same and (best is None or ratio < least):
            best, least = entry, ratio
    return best
