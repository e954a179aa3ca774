"""Derive which backend `auto` takes on a GPU from benchmark rows: the faster one of each shape class.

Writes dnc_kernels/dispatch/sm_<capability>.json: op -> [{"when": shape class, "backend": ..., "rows": "file:line ...",
"ms": {backend: median, summed over its cases}}]. A shape class is what the op said of its very call (the column
`shape_class`), so that calls find it. A class that was measured again is replaced.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dnc_kernels import _evidence, backends

from . import ROOT
from .case import Row


def faster(rows: Iterable[tuple[str, Row]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Capability -> op -> entries, from (file:line, row): what two or more backends solved on a GPU.

    Times of one case are compared, the last one of each backend. Cases of one class (forward alone, and with the backward pass,
    say) decide together, by the sum of their times.
    """
    classes: dict[tuple[str, str, str], dict[str, dict[str, tuple[float, str]]]] = defaultdict(lambda: defaultdict(dict))
    for place, row in rows:
        if row.get("capability") and row.get("shape_class") and row["kind"] == "kernel" and row["status"] == "ok":
            case = f"{row['case']} {row['dtype']} {row['cache']}"
            when = json.dumps(row["shape_class"], sort_keys=True)
            classes[row["capability"], row["op"], when][case][row["backend"]] = (row["p50_ms"], place)
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for (capability, op, when), cases in classes.items():
        compared = [measured for measured in cases.values() if len(measured) > 1]
        everywhere = [b for b in backends.BACKENDS if compared and all(b in measured for measured in compared)]
        if len(everywhere) > 1:
            ms = {b: sum(measured[b][0] for measured in compared) for b in everywhere}
            entry = {
                "when": json.loads(when),
                "backend": min(ms, key=ms.__getitem__),
                "rows": " ".join(measured[b][1] for measured in compared for b in everywhere),
                "ms": {name: round(t, 5) for name, t in ms.items()},
            }
            found[capability][op].append(entry)
    return found


def update(found: dict[str, dict[str, list[dict[str, Any]]]], folder: Path = _evidence.DISPATCH) -> list[Path]:
    """Write what was found into the files of its capabilities; classes not measured again stay."""
    written = []
    for capability, ops in found.items():
        path = folder / f"sm_{capability.replace('.', '')}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        for op, entries in ops.items():
            new = [entry["when"] for entry in entries]
            kept = [entry for entry in content.get(op, []) if entry["when"] not in new]
            content[op] = sorted([*kept, *entries], key=lambda entry: sorted(entry["when"].items()))
        folder.mkdir(exist_ok=True)
        path.write_text(json.dumps(content, indent=1, sort_keys=True) + "\n")
        written.append(path)
    return written


def read(files: Sequence[Path]) -> list[tuple[str, Row]]:
    """Rows of JSON-lines files, each with where it stands: a path from the checkout's root, and the line."""
    return [
        (f"{path.resolve().relative_to(ROOT) if path.resolve().is_relative_to(ROOT) else path}:{number}", json.loads(line))
        for path in files
        for number, line in enumerate(path.read_text().splitlines(), 1)
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """Derive and write; 1 where the rows decide nothing."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.dispatch", description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="rows, as `python -m benchmarks run --out` writes them")
    found = faster(read(parser.parse_args(arguments).files))
    for path in update(found):
        print(f"wrote {path}")
    for capability, ops in found.items():
        for op, entries in ops.items():
            for entry in entries:
                best = min(entry["ms"].values())
                others = ", ".join(f"{name} {ms / best:.2f}x" for name, ms in entry["ms"].items() if name != entry["backend"])
                print(f"{capability} {op} {entry['when']}: {entry['backend']} (time of the others: {others})")
    if not found:
        print("no case has rows of two backends on a GPU; `auto` keeps the order of backends.KERNELS", file=sys.stderr)
    return int(not found)


if __name__ == "__main__":
    sys.exit(main())
