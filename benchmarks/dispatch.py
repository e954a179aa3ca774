"""Derive which backend `auto` takes on a GPU from benchmark rows: the faster one of each case.

Writes dnc_kernels/dispatch/sm_<capability>.json: op -> [{"when": shape class, "backend": ..., "rows": "file:line ...",
"ms": {backend: median}}]. A class that was measured again is replaced.
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

from .harness import Row, dtype_of

ROOT = Path(__file__).resolve().parents[1]


def shape_class(row: Row) -> dict[str, int | str]:
    """Sizes of a row's case as `backends.pick` calls them, the width of its dtype, and the layout of its pixels."""
    shape = row["shape"]
    when: dict[str, int | str] = {key: shape[key] for key in ("N", "C", "K", "D") if key in shape}
    if "N" not in shape:  # a map; square where it has but a height
        when["N"] = shape["B"] * shape["H"] * shape.get("W", shape["H"])
    if "h" not in shape:  # features, not scores to upsample: in rows or channels_last, unless the name says otherwise
        when["layout"] = "planes" if "nchw" in row["case"] else "rows"
    return when | {"bits": 8 * dtype_of(row["dtype"]).itemsize}


def faster(rows: Iterable[tuple[str, Row]]) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Capability -> op -> entries, from (file:line, row): cases that two or more backends solved on a GPU."""
    times: dict[tuple[str, str, str], dict[str, tuple[float, str]]] = defaultdict(dict)
    for place, row in rows:
        if row.get("capability") and row["op"] in backends.KERNELS and row["kind"] == "kernel" and row["status"] == "ok":
            key = (row["capability"], row["op"], json.dumps(shape_class(row), sort_keys=True))
            times[key][row["backend"]] = (row["p50_ms"], place)
    found: dict[str, dict[str, list[dict[str, Any]]]] = defaultdict(lambda: defaultdict(list))
    for (capability, op, when), measured in times.items():
        if len(measured) > 1:
            entry = {
                "when": json.loads(when),
                "backend": min(measured, key=measured.__getitem__),
                "rows": " ".join(place for _, place in measured.values()),
                "ms": {name: round(ms, 5) for name, (ms, _) in measured.items()},
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
