"""Tables of what `benchmarks.recipes` has measured, for `quote`: a line for each head of a task, means over the seeds.

A row that was measured before its head got the present name has the older one as `named_then`: the options are the same.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from . import record

Row = dict[str, Any]
#: What the heads are called, in the order of the lines. A task has those that were measured.
HEADS = {
    "softmax": "softmax",
    "classification": "DNC, `classification` (its default)",
    "segmentation": "DNC, `segmentation` (its default)",
    "slow": "DNC, `slow`",
    "released": "DNC, `released`",
    "PPD 1": "`ppd_weight=1.0`",
    "PPD 0.001": "`ppd_weight=0.001`",
    "PPD 0.001, fraction 1": "`ppd_weight=0.001, momentum=Recent(1.0)`",
    "PPD 0.001, fraction 0.25": "`ppd_weight=0.001, momentum=Recent(0.25)`",
    "PPD 0.001, momentum 0.99": "`ppd_weight=0.001, momentum=0.99`",
}
MAIN = ("softmax", "classification", "segmentation", "slow", "released")
#: Blocks of pages: task and heads.
TABLES = {
    "digits": ("digits", MAIN),
    "fashion-14": ("fashion-14", MAIN),
    "fashion": ("fashion", MAIN),
    "scenes": ("scenes", MAIN),
    "neighbours": ("scenes", ("segmentation", *(name for name in HEADS if name not in MAIN))),
}


def newest(folder: Path, task: str) -> dict[str, dict[int, Row]]:
    """Of a task, by head and seed the newest row."""
    found: dict[str, dict[int, Row]] = {}
    rows = [row for file in sorted(folder.glob("*.jsonl")) for row in record.read(file) if row["task"] == task]
    for row in sorted(rows, key=lambda row: int(row["unix_time_s"])):
        found.setdefault(row["head"], {})[row["seed"]] = row
    return found


def render(results: Path, name: str) -> str | None:
    """The body of the block ``rows: recipes / NAME``; None without rows."""
    task, heads = TABLES[name]
    by_head = newest(results / "recipes", task)
    shown = {head: [row for _, row in sorted(by_head[head].items())] for head in heads if head in by_head}
    rows = [row for of_head in shown.values() for row in of_head]
    if not rows:
        return None
    score = "mIoU" if task == "scenes" else "accuracy"
    columns: Mapping[str, Callable[[Sequence[Row]], str]] = {
        "seeds": lambda of_head: str(len(of_head)),
        score: lambda of_head: _mean(of_head, "score", 4),
        "anchored": lambda of_head: _mean(of_head, "anchored", 4),
        "refitted": lambda of_head: _mean(of_head, "refitted", 4),
        "refitted, anchored": lambda of_head: _mean(of_head, "refitted_anchored", 4),
        "dead": lambda of_head: _mean(of_head, "dead", 2, spread=False),
        "usage": lambda of_head: _mean(of_head, "usage", 2, spread=False),
        "win": lambda of_head: _mean(of_head, "win", 2, spread=False),
        "win of k-means": lambda of_head: _mean(of_head, "win_kmeans", 2, spread=False),
        "ECE": lambda of_head: _mean(of_head, "ece", 3, spread=False),
    }
    lines = [["head", *columns], ["---"] * (1 + len(columns))]
    lines += [[HEADS[head], *(cell(of_head) for cell in columns.values())] for head, of_head in shown.items()]
    commits = ", ".join(dict.fromkeys(row["commit"][:7] for row in rows))
    torch = ", ".join(dict.fromkeys(row["torch_version"].partition("+")[0] for row in rows))
    caption = f"CPU, float32, torch {torch}, {rows[0]['steps']} steps, commit {commits}; ± one standard error."
    return "\n".join(["", caption, "", *("| " + " | ".join(line) + " |" for line in lines), "", ""])


def _mean(rows: Sequence[Row], name: str, digits: int, *, spread: bool = True) -> str:
    """Mean over the seeds with its standard error; a dash where the head has no such figure."""
    values = [row[name] for row in rows if row.get(name) is not None]
    if not values:
        return "-"
    mean = f"{statistics.fmean(values):.{digits}f}"
    if not spread or len(values) == 1:
        return mean
    return f"{mean} ± {statistics.stdev(values) / len(values) ** 0.5:.{digits}f}"
