"""All cases, chosen by benchmark, op and name, and their rows."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from . import (
    bench_embedding,
    bench_head,
    bench_host,
    bench_momentum,
    bench_segmentation,
    bench_similarity,
    bench_sinkhorn,
    bench_upsample,
    built,
)
from .case import Case, Row, Settings
from .harness import GpuLost, demand_gpu, failed, run_case

BENCHES: dict[str, Any] = {
    "similarity": bench_similarity, "sinkhorn": bench_sinkhorn, "momentum": bench_momentum, "embedding": bench_embedding,
    "upsample": bench_upsample, "head": bench_head, "segmentation": bench_segmentation, "host": bench_host,
}  # fmt: skip


def case_rows(cases: Sequence[Case], settings: Settings) -> Iterator[Row]:
    """Rows of all cases. A case that cannot be set up is a row with the reason too.

    Raises:
        SystemExit: package or extension are not of this checkout, whose commit rows name.
    """
    built.demand()
    for number, case in enumerate(cases, 1):
        print(f"[{number}/{len(cases)}] {case.op} {case.name} {case.dtype}", file=sys.stderr, flush=True)
        try:
            yield from run_case(case, settings)
        except GpuLost:
            raise
        except Exception as error:
            yield failed(case, settings, error)
            demand_gpu(settings, f"{case.op} {case.name}")
        if settings.cuda:
            torch.cuda.empty_cache()


def select(settings: Settings, ops: Sequence[str] | None = None, names: Sequence[str] | None = None) -> list[Case]:
    """Cases of the chosen benchmarks or ops whose names match one of the patterns; None chooses all."""
    cases = [(bench, case) for bench, module in BENCHES.items() for case in module.cases(settings)]
    of_op = [c for bench, c in cases if not ops or bench in ops or c.op in ops]
    return [c for c in of_op if not names or any(fnmatchcase(c.name, name) for name in names)]
