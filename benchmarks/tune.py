"""Time the candidates of every Triton kernel on this GPU, and store the fastest as its configurations.

What a family's kernels are tried on are the shape classes of the architecture's own configurations. The result is a file named
after the GPU in the family's `configs` folder, which the launchers prefer to the architecture's from then on. Results of a
launch do not depend on its configuration beyond rounding; `make gpu-run PHASE=tune` tests and times the new ones.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from .aot import cases
from .aot_triton import product_precision
from .clock import CudaClock
from .families import FAMILIES


def milliseconds(call: Callable[[], None], clock: CudaClock, rounds: int) -> float:
    """Median time of a launch, the L2 cache flushed before each."""
    clock.warm_up(call)  # anew for every configuration
    return statistics.median(clock(call).ms for _ in range(rounds))


def tune(
    family: str,
    kernel: str,
    shapes: Sequence[dict[str, int]],
    device: torch.device,
    time: Callable[[Callable[[], None]], float],
) -> list[dict[str, Any]]:
    """The fastest configuration of every shape class, with its time: the stored one or a candidate that compiles and fits."""
    from dnc_kernels.ops import _triton

    case, entries = cases(family)[kernel], []
    for when in shapes:
        best: dict[str, Any] = {}
        with product_precision(when):
            call = case.prepare(device, when)
            for use in [_triton.configuration(family, kernel, device, **when), *case.candidates(when)]:
                try:
                    with _triton.configured(kernel, **use):
                        p50 = time(call)
                except Exception as error:  # what does not compile or fit this GPU is no candidate
                    print(f"  {use}: {type(error).__name__}", file=sys.stderr)
                    continue
                if not best or p50 < best["p50_ms"]:
                    best = {"when": when, "use": use, "p50_ms": round(p50, 5)}
                    print(f"{family}.{kernel} {when} {use}: {p50:.4f} ms", flush=True)
        if best:
            entries.append(best)
    return entries


def main(arguments: Sequence[str] | None = None) -> int:
    """Tune and write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__)
    parser.add_argument("--family", action="append", choices=FAMILIES, help="all; may be repeated")
    parser.add_argument("--kernel", action="append", help="all of the family; may be repeated")
    parser.add_argument("--rounds", type=int, default=20, help="timed launches a candidate (20)")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.tune: torch sees no CUDA device; a configuration can only be measured on one", file=sys.stderr)
        return 1
    from dnc_kernels.ops import _triton

    device = torch.device("cuda", torch.cuda.current_device())
    time = partial(milliseconds, clock=CudaClock(device), rounds=options.rounds)
    name, arch = _triton.device_kinds(device)
    for family in options.family or FAMILIES:
        path = Path(_triton.__file__).parent / family / "configs" / f"{name}.json"
        made = json.loads(path.read_text()) if path.exists() else {}
        for kernel, entries in _triton.stored(family, arch).items():
            if options.kernel and kernel not in options.kernel:
                continue
            shapes = [entry["when"] for entry in entries]
            made[kernel] = tune(family, kernel, shapes, device, time)
            # after every kernel: a run that is cut off keeps what it has
            path.write_text(json.dumps(made, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
