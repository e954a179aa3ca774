"""`python -m benchmarks run` measures, `report` prints rows as tables; `peak` is what `run` starts for memory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from . import bench_embedding, bench_head, bench_momentum, bench_similarity, bench_sinkhorn, bench_upsample
from .harness import Case, Row, Settings, peak, run_case

BENCHES: dict[str, Any] = {
    "similarity": bench_similarity, "sinkhorn": bench_sinkhorn, "momentum": bench_momentum, "embedding": bench_embedding,
    "upsample": bench_upsample, "head": bench_head,
}  # fmt: skip
_TABLE = (
    "variant", "p50_ms", "p20_ms", "p80_ms", "ratio_to_best_baseline", "pct_gemm_probe", "pct_copy_probe", "peak_delta_mb",
    "allowed_peak_delta_mb", "error_over_allowed", "status",
)  # fmt: skip


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; 1 where a kernel failed or any result was wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure, print tables and write rows to --out")
    run.add_argument("--op", action="append", help=f"a benchmark file ({', '.join(BENCHES)}) or an op; may be repeated")
    run.add_argument("--case", action="append", help="only cases of this name; may be repeated")
    run.add_argument("--out", type=Path, help="write rows here as JSON lines")
    run.add_argument("--device", default="cpu")
    run.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"], help="float32; may be repeated")
    run.add_argument("--threads", type=int, default=2)
    run.add_argument("--rounds", type=int, help="at most this many rounds a case (100; --quick: 3)")
    run.add_argument("--budget-s", type=float, default=20.0, help="seconds of rounds a case; at least 5 rounds are made (20)")
    run.add_argument("--quick", action="store_true", help="tiny shapes, no torch.compile, no memory: does it work?")
    run.add_argument("--no-compile", action="store_true", help="leave the torch.compile baselines out")
    run.add_argument("--no-memory", action="store_true", help="do not measure peak memory, which takes a process a variant")
    run.add_argument("--warm", action="store_true", help="CUDA: do not flush the L2 cache between calls")
    commands.add_parser("report", help="print the rows of files as tables").add_argument("files", nargs="+", type=Path)
    commands.add_parser("peak").add_argument("request")
    options = parser.parse_args(arguments)
    if options.command == "report":
        print_rows([json.loads(line) for file in options.files for line in file.read_text().splitlines()])
        return 0
    if options.command == "peak":
        print(json.dumps(_peak(json.loads(options.request))))
        return 0
    settings = Settings(
        device=options.device, threads=options.threads, rounds=options.rounds or (3 if options.quick else 100),
        budget_s=options.budget_s, quick=options.quick, compile=not (options.no_compile or options.quick),
        memory=not (options.no_memory or options.quick), cold=not options.warm, dtypes=tuple(options.dtype or ["float32"]),
    )  # fmt: skip
    chosen, rows = select(settings, options.op, options.case), []
    if not chosen:
        parser.error("no case matches --op and --case")
    for number, case in enumerate(chosen, 1):
        print(f"[{number}/{len(chosen)}] {case.op} {case.name} {case.dtype}", file=sys.stderr, flush=True)
        rows += run_case(case, settings)
        if options.out:  # after every case: a run that is cut off keeps what it has
            options.out.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print_rows(rows)
    return int(any(r["status"] == "wrong" or (r["status"] == "failed" and r["kind"] == "kernel") for r in rows))


def select(settings: Settings, ops: Sequence[str] | None = None, names: Sequence[str] | None = None) -> list[Case]:
    """Cases of the chosen benchmarks or ops with the chosen names; None chooses all."""
    cases = [(bench, case) for bench, module in BENCHES.items() for case in module.cases(settings)]
    return [c for bench, c in cases if (not ops or bench in ops or c.op in ops) and (not names or c.name in names)]


def print_rows(rows: Sequence[Row]) -> None:
    """A table a case. Rows in which a baseline wins and rows without a time stay in."""
    for (op, case, shape, dtype), group in groupby(rows, lambda r: (r["op"], r["case"], r["shape"], r["dtype"])):
        found = list(group)
        sizes = " ".join(f"{k}={v}" for k, v in shape.items())
        print(f"\n{op} {case}: {sizes} {dtype}, {found[0]['threads']} threads, {found[0]['device']}, {found[0]['git_commit']}")
        names = [n for n in _TABLE if any(r[n] is not None for r in found)]
        _print_table(names, [[f"{r[n]:.3g}" if isinstance(r[n], float) else str(r[n] or "") for n in names] for r in found])
        for row in found:
            if row["reason"] and row["status"] != "skipped":
                print(f"  {row['variant']}: {row['status']}: {row['reason']}")
            if row["goal_ratios"]:
                verdict = {True: "met", False: "missed", None: "not measured"}[row["goals_met"]]
                goals, ratios = (
                    ", ".join(f"{n} {v:.3g}x" for n, v in (row[c] or {}).items()) for c in ("goal_ratios", "ratio_to_baselines")
                )
                print(f"  {row['variant']}: goal {goals}: {verdict}; measured against {ratios}")


def _print_table(names: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    try:
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        for line in (names, *lines):
            print("  ".join(text.rjust(max(map(len, column))) for text, column in zip(line, zip(names, *lines), strict=True)))  # noqa: B905
    else:
        table = Table(*names)
        for line in lines:
            table.add_row(*line, style="bold" if line[0].startswith("dnc_") else None)
        Console(width=max(len("  ".join(names)) + 60, 80)).print(table)


def _peak(request: dict[str, Any]) -> Row:
    settings = Settings(**request["settings"] | {"dtypes": (request["dtype"],)})
    big, tiny = (select(s, [request["op"]], [request["case"]])[0] for s in (settings, replace(settings, quick=True)))
    return peak(big, tiny, request["variant"], settings)


if __name__ == "__main__":
    sys.exit(main())
