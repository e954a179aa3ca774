"""Measure the ops against the best that torch and others offer, and print or quote the rows (docs/benchmarks.md)."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

from .case import BASELINES, Case, Row, Settings
from .harness import chosen
from .memory import on_cpu
from .quote import quote
from .suite import BENCHES, case_rows, select

_TABLE = (
    "variant", "p50_ms", "p20_ms", "p80_ms", "host_us", "pct_queued", "ratio_to_best_baseline", "pct_gemm_probe",
    "pct_copy_probe", "peak_delta_mb", "allowed_peak_delta_mb", "error_over_allowed", "status",
)  # fmt: skip
_OTHERS = """other programs of this folder, each with its own --help:
  python -m benchmarks.tune        GPU: time the configurations of the Triton kernels, and store the fastest
  python -m benchmarks.dispatch    derive from measured rows whether `auto` takes triton or cuda
  python -m benchmarks.aot         no GPU: compile every GPU kernel; list registers, spills and shared memory
  python -m benchmarks.prove       GPU: run the tests of the CUDA C++ kernels, and record that they passed
  python -m benchmarks.carry       no GPU: carry proofs to source of which nvcc makes the same program
  python -m benchmarks.primitives  GPU: check the instructions that the CUDA C++ kernels rest on, one by one
  python -m benchmarks.sanitize    GPU: run the tests of the CUDA C++ kernels under compute-sanitizer
  python -m benchmarks.recipes     train small networks by the recipes of the heads: accuracy, and what sub-centroids stand for
  python -m benchmarks.gpu_run     GPU: the above within some minutes, and take the results into the tree"""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand; 1 where a kernel failed or any result was wrong."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, epilog=_OTHERS, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    # the metavar keeps `peak`, which `run` starts for itself, out of the help
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    run = commands.add_parser("run", help="measure, print tables and write rows to --out")
    run.add_argument("--op", action="append", help=f"a benchmark file ({', '.join(BENCHES)}) or an op; may be repeated")
    run.add_argument("--case", action="append", help="only cases of this name, or pattern ('hard_*'); may be repeated")
    run.add_argument("--out", type=Path, help="add rows to this file as JSON lines, each as soon as it is known")
    run.add_argument("--list", action="store_true", help="print what would be measured, and measure nothing; needs no GPU")
    run.add_argument("--device", default="cpu", help="where to measure: cpu, cuda or cuda:N (cpu)")
    run.add_argument("--dtype", action="append", choices=["float32", "bfloat16", "float16"], help="(float32); may be repeated")
    run.add_argument("--threads", type=int, default=2, help="CPU threads of torch and of the kernels (2)")
    run.add_argument("--rounds", type=int, help="at most this many rounds per case (100; --quick: 3)")
    run.add_argument("--budget-s", type=float, help="seconds of rounds per case; at least 5 rounds are made (20; on CUDA 2)")
    run.add_argument("--quick", action="store_true", help="tiny shapes, no torch.compile, no memory: does it work?")
    run.add_argument("--large", action="store_true", help="CUDA: also the cases that take seconds and tens of GB")
    run.add_argument(
        "--baselines", choices=BASELINES, default="all",
        help="what to compare with (all): eager leaves out torch.compile; headline keeps it for five cases; none: nothing",
    )  # fmt: skip
    run.add_argument("--autotuned", action="store_true", help="CUDA: also baselines that torch.compile tunes, for minutes")
    run.add_argument("--no-memory", action="store_true", help="leave out peak memory: on a CPU one process per variant")
    run.add_argument("--warm", action="store_true", help="CUDA: do not flush the L2 cache between calls")
    report = commands.add_parser("report", help="print the rows of files as tables")
    report.add_argument("files", nargs="+", type=Path, help="files of rows, as `run --out` writes them")
    quoting = commands.add_parser("quote", help="write the measured tables of README.md and docs/ from benchmarks/results")
    quoting.add_argument(
        "--check", action="store_true", help="write nothing; print what differs, and return 1 if anything does"
    )
    commands.add_parser("peak").add_argument("request")  # for `benchmarks.memory`
    options = parser.parse_args(arguments)
    if options.command == "report":
        print_rows([json.loads(line) for file in options.files for line in file.read_text().splitlines()])
        return 0
    if options.command == "quote":
        return quote(options.check)
    if options.command == "peak":
        print(json.dumps(_peak(json.loads(options.request))))
        return 0
    settings = settings_of(options)
    cases = select(settings, options.op, options.case)
    if not cases:
        of_op = select(settings, options.op)
        ops = [*BENCHES, *dict.fromkeys(c.op for c in select(settings))]
        names = dict.fromkeys(repr(c.name) for c in of_op)
        known = f"cases: {', '.join(names)}" if of_op else f"benchmark files and ops: {', '.join(ops)}"
        parser.error(f"no case matches --op and --case; {known}")
    if options.list:
        print_list(cases, settings)
        return 0
    if settings.listed:
        parser.error("torch sees no CUDA device; without one cases can only be listed (--list)")
    return _measure(cases, settings, options.out)


def settings_of(options: argparse.Namespace) -> Settings:
    """Settings from the options of `run`."""
    cuda = options.device.startswith("cuda")
    return Settings(
        device=options.device, threads=options.threads, rounds=options.rounds or (3 if options.quick else 100),
        budget_s=options.budget_s if options.budget_s is not None else 2.0 if cuda else 20.0,
        quick=options.quick, large=options.large, autotuned=options.autotuned, cold=not options.warm,
        baselines="eager" if options.quick and options.baselines != "none" else options.baselines,
        memory=not (options.no_memory or options.quick), dtypes=tuple(options.dtype or ["float32"]),
    )  # fmt: skip


def _measure(cases: Sequence[Case], settings: Settings, out: Path | None) -> int:
    """Measure, write each row at once, and print tables at the end, however it comes."""
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    try:
        with out.open("a") if out else nullcontext() as file:
            for row in case_rows(cases, settings):
                rows.append(row)
                if file:
                    print(json.dumps(row), file=file, flush=True)
    finally:
        print_rows(rows)
    return int(any(r["status"] == "wrong" or (r["status"] == "failed" and r["kind"] == "kernel") for r in rows))


def print_list(cases: Sequence[Case], settings: Settings) -> None:
    """A line a case with its variants, and how many rows they are."""
    count = 0
    for case in cases:
        names = [v.name for v, skipped in chosen(case, settings) if not skipped]
        sizes = " ".join(f"{k}={v}" for k, v in case.shape.items())
        print(f"{case.op} {case.name} {case.dtype}: {sizes}: {', '.join(names)}")
        count += len(names)
    print(f"{len(cases)} cases, {count} variants")


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
    return on_cpu(big, tiny, request["variant"], settings)


if __name__ == "__main__":
    sys.exit(main())
