"""Prove the CUDA C++ kernels on this GPU: run each family's tests, and write a row of proof for those that pass.

A row holds for the source that the build was made from and for GPUs of the same compute capability; `auto` chooses no CUDA C++
kernel without one. Commit dnc_kernels/proofs.json to keep it.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

import torch

from dnc_kernels import _evidence, backends
from dnc_kernels._evidence import Proof

from . import ROOT, processes, pytest_record
from .families import CUDA_FAMILIES, cuda_tests, source
from .processes import Ended, Step
from .record import Line, commit, read


def step(family: str, record: Path, seconds: float = 300, select: str = "cuda and not large") -> Step:
    """The run of a family's tests; those of gigabytes stand apart, and prove nothing."""
    return pytest_record.step(f"cuda {family}", cuda_tests(family), record, seconds=seconds, select=select, each=40)


def verdict(
    family: str, ended: Ended, lines: Iterable[Line], sources: Mapping[str, str], device: str, capability: tuple[int, int]
) -> Proof | str:
    """The row of proof of a family, or why there is none.

    Args:
        family: of the kernels.
        ended: what became of the step that ran its tests.
        lines: what steps recorded of their tests, other steps' among them.
        sources: hashes of what the extension was built from (``_C.cuda.sources``).
        device: name of the GPU.
        capability: of the GPU.
    """
    outcomes = [line["outcome"] for line in lines if line["step"] == ended.step.name]
    count = outcomes.count("passed")
    if not cuda_tests(family):
        return "it has no tests"
    if sources.get(family) != source(family):
        return "the extension was built from other source; run `python setup.py build_ext --inplace`"
    if wrong := len(outcomes) - count - outcomes.count("skipped"):
        return f"{wrong} of its {len(outcomes)} tests failed"
    if ended.status != "ok":
        return f"its tests did not end: {ended.status} after {len(outcomes)}"
    if not count:
        return "no test ran"
    return Proof(family, sources[family], device, capability, count, commit(), time.strftime("%Y-%m-%d", time.gmtime()))


def add(rows: Sequence[Proof], path: Path = _evidence.PROOFS) -> None:
    """Write rows behind those that are there, in the place of rows of the same source and device."""
    new = {(r.family, r.source, r.device) for r in rows}
    kept = [r for r in _evidence.read_proofs(path) if (r.family, r.source, r.device) not in new]
    lines = [json.dumps(asdict(r)) for r in sorted([*kept, *rows], key=lambda r: (r.family, r.date))]
    path.write_text("[\n" + ",\n".join(f" {line}" for line in lines) + "\n]\n" if lines else "[]\n")


def main(arguments: Sequence[str] | None = None) -> int:
    """Prove the families that have CUDA C++ kernels, side by side; 1 where one is not proven."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prove", description=__doc__)
    parser.add_argument("--family", action="append", choices=CUDA_FAMILIES, help="all with CUDA C++ kernels; may be repeated")
    options = parser.parse_args(arguments)
    if backends.UNUSABLE["cuda"]:
        print(f"benchmarks.prove: {backends.UNUSABLE['cuda']}; only a GPU can prove a kernel", file=sys.stderr)
        return 1
    with_kernels = {backends.FAMILY[op] for op, kernels in backends.KERNELS.items() if "cuda" in kernels}
    families = options.family or sorted(with_kernels)
    return int(not all(prove(families, backends.native().cuda.sources)))


def prove(families: Sequence[str], sources: Mapping[str, str], seconds: float = 300) -> list[bool]:
    """Run the tests of families side by side on this GPU, write the rows of those that pass, and say of each what it is."""
    device, capability = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    proven = []
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "tests.jsonl"
        steps = [step(family, record, seconds) for family in families]
        for ended in processes.run(steps, time.monotonic() + seconds, Path(folder), ROOT):
            family = families[steps.index(ended.step)]
            row = verdict(family, ended, [x for x in read(record) if x.get("event") == "test"], sources, device, capability)
            proven.append(isinstance(row, Proof))
            if isinstance(row, Proof):
                add([row])
                print(f"{family}: proven by {row.tests} tests on {device} ({'.'.join(map(str, capability))})")
            else:
                print(f"{family}: not proven: {row}\n{ended.output[-3000:]}")
    return proven


if __name__ == "__main__":
    sys.exit(main())
