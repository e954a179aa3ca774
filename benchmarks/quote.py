"""Measured tables and figures of README.md and docs/, made from the rows in benchmarks/results.

A block of a page stands between the HTML comments "rows: NAME" and "end rows". NAME is a table of `TABLES`. Within a sentence
it is "TABLE / COLUMN" or "TABLE / COLUMN / PATTERN": the range of the ratios in that column, of the lines whose label matches.
"recipes / NAME" is a table of `recipe_rows.TABLES`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, NamedTuple

from . import ROOT, recipe_rows, record

Row = dict[str, Any]
BLOCK = re.compile(r"<!-- rows: (?P<name>.*?) -->(?P<body>.*?)<!-- end rows -->", re.DOTALL)
_CPU, _XEON, _H100 = "cpu-amd-epyc-2-threads", "cpu-intel-xeon-amx-2-threads", "nvidia-h100-80gb-hbm3"
_BASELINES = {
    "interpolate_ce": "`interpolate` + `cross_entropy`", "interpolate_argmax": "`interpolate` + `argmax`",
    "mm": "`mm` + `cross_entropy`", "mm_max": "`mm` + `max`", "mm_amax": "`mm` + `amax`", "mm_argmax": "`mm` + `argmax`",
    "einsum_amax": "`einsum` + `amax`", "layer_norm_normalize": "`layer_norm` + `normalize`",
    "vectorized": "vectorised over classes", "index_add": "`index_add_`", "scatter_add": "`scatter_add_`",
    "faiss_flat_ip": "faiss `IndexFlatIP`", "linear": "linear head",
}  # fmt: skip


class Unquotable(ValueError):
    """A page asks for rows that are not there."""


class Line(NamedTuple):
    """A line of a table: a case, whose sizes its label may name, and the pattern of the variants that are ours."""

    label: str
    op: str
    case: str
    ours: str = "dnc_*"
    dtype: str = "float32"


class Rows:
    """The rows of a case, the newest of each variant. They note which of them a line is made of."""

    def __init__(self, line: Line, by_variant: Mapping[str, Row]) -> None:
        self.line, self.by_variant, self.used = line, by_variant, list[Row]()

    def pick(self, *patterns: str) -> Row:
        """The newest row whose variant matches a pattern; without patterns of ours."""
        wanted = patterns or (self.line.ours,)
        found = [row for name, row in self.by_variant.items() if any(fnmatchcase(name, pattern) for pattern in wanted)]
        if not found:
            raise Unquotable(f"{self.line.op} {self.line.case}: no row of {' or '.join(wanted)}")
        self.used.append(max(found, key=_age))
        return self.used[-1]


Cell = Callable[[Rows], str]


@dataclass(frozen=True)
class Table:
    """A line of words for each case. `columns` are headings and cells."""

    heading: str
    columns: Mapping[str, Cell]
    lines: Sequence[Line]
    folder: str = _CPU


def _short(value: float) -> str:
    """Two digits, or all before the point."""
    return f"{value:.2g}" if value < 1 else f"{value:.1f}" if value < 9.95 else f"{value:.0f}"


def _cost(row: Row) -> str:
    """Time and extra memory; what became of a row without a time."""
    if row["p50_ms"] is None:
        return str(row["status"])
    return f"{_short(row['p50_ms'])} ms" + ("" if row["peak_delta_mb"] is None else f", {_short(row['peak_delta_mb'])} MB")


def _ratio(row: Row) -> str:
    ratio = row["ratio_to_best_baseline"]
    return str(row["status"]) if ratio is None else f"{_short(ratio)}x"


def _range(ratios: Sequence[float]) -> str:
    return " to ".join(dict.fromkeys(f"{_short(r)}x" for r in (min(ratios), max(ratios)))) if ratios else ""


def cost(*patterns: str) -> Cell:
    """Time and extra memory of a variant; without patterns of ours."""
    return lambda rows: _cost(rows.pick(*patterns))


def ratio(*patterns: str) -> Cell:
    """Ratio of a variant to the best baseline; without patterns of ours."""
    return lambda rows: _ratio(rows.pick(*patterns))


def share(*patterns: str) -> Cell:
    """What a variant costs in units of the best baseline, with its time and memory."""

    def cell(rows: Rows) -> str:
        row = rows.pick(*patterns)
        ratio = row["ratio_to_best_baseline"]
        return str(row["status"]) if ratio is None else f"{1 / ratio:.2f} ({_cost(row)})"

    return cell


def where_there_is(cell: Cell, otherwise: str = "none") -> Cell:
    """The same, and `otherwise` for a case without such a row."""

    def optional(rows: Rows) -> str:
        try:
            return cell(rows)
        except Unquotable:
            return otherwise

    return optional


def host(*patterns: str) -> Cell:
    """Host time of a variant; without patterns of ours."""
    return lambda rows: f"{rows.pick(*patterns)['host_us']:.1f} us"


def times_as_long(rows: Rows) -> str:
    """What ours takes in units of the best baseline."""
    return f"{1 / rows.pick()['ratio_to_best_baseline']:.1f}"


def best(rows: Rows) -> str:
    """The best baseline, its time and memory."""
    row = rows.pick(rows.pick()["best_baseline"] or "none")
    name, compiled = row["variant"].removesuffix("_compiled"), row["variant"].endswith("_compiled")
    how = "" if row["backend"] != "torch" else ", compiled" if compiled else ", eager"
    return f"{_BASELINES.get(name, f'`{name}`')}{how}: {_cost(row)}"


def others(rows: Rows) -> str:
    """Range of the ratios to all baselines but the best."""
    row = rows.pick()
    return _range([r for name, r in (row["ratio_to_baselines"] or {}).items() if name != row["best_baseline"]])


def _gpu(label: str, op: str, case: str) -> Line:
    return Line(label, op, case, dtype="bfloat16")


def _bands(pixels: int) -> str:
    return f"dnc_auto checkpoint=all band_pixels={pixels}"


_MAPS, _PIXELS = "[{B},{C},{h},{h}] to {H}x{H}", "N={N} C={C} K={K} D={D}"
_UPSAMPLE = [
    Line(f"`{op}`, {_MAPS}", op, case)
    for op in ("upsample_cross_entropy", "upsample_argmax")
    for case in ("cityscapes_x4", "ade20k_x4", "ade20k_large_x4")
]
_SINGLE = [
    *_UPSAMPLE,
    Line(f"`subcentroid_cross_entropy`, {_PIXELS}", "subcentroid_cross_entropy", "ade20k"),
    *(Line("`normalize_embedding`, [{B},{D},{H},{W}] " + c, "normalize_embedding", c) for c in ("nchw", "channels_last")),
    *(
        Line(f"`centroid_cross_entropy`, {_PIXELS}, LayerNorm over classes", "centroid_cross_entropy", case)
        for case in ("ade20k", "cityscapes", "imagenet")
    ),
    Line(f"`nearest_centroid`, {_PIXELS}", "nearest_centroid", "ade20k"),
    Line("`sinkhorn_assign`, N={N} C={C} K={K}", "sinkhorn_assign", "ade20k"),
    Line(f"`momentum_update_`, {_PIXELS}", "momentum_update_", "ade20k"),
    Line(f"`sinkhorn_assign`, then `momentum_update_`, {_PIXELS}", "clustering_and_momentum", "ade20k"),
]
_HARD = [
    *(
        Line(f"`{op}`, {_PIXELS}", op, f"hard_{case}")
        for case in ("binary_d32", "binary_d64", "1000_classes", "tiny")
        for op in ("centroid_cross_entropy", "nearest_centroid")
    ),
    *(
        Line(f"`upsample_cross_entropy`, {_MAPS}", "upsample_cross_entropy", f"hard_{case}")
        for case in ("x1", "binary_x4", "tiny_x4")
    ),
    *(
        Line("`DNCHead`, C={C} K={K} D={D}, {h}x{h} to {H}x{H}", "segmentation_step", case, "dnc_* head")
        for case in ("c2_d64", "c2_d64_k1", "hard_tiny")
    ),
]
_GPU = [
    *(
        _gpu(f"`centroid_cross_entropy`, {_PIXELS}, with the gradient", "centroid_cross_entropy", case)
        for case in ("ade20k", "cityscapes", "imagenet")
    ),
    _gpu(f"`nearest_centroid`, {_PIXELS}", "nearest_centroid", "ade20k"),
    _gpu(f"`class_scores`, {_PIXELS}", "class_scores", "ade20k"),
    _gpu(f"`subcentroid_cross_entropy`, {_PIXELS}, with the gradient", "subcentroid_cross_entropy", "ade20k"),
    _gpu("`sinkhorn_assign`, N={N} C={C} K={K}", "sinkhorn_assign", "ade20k"),
    _gpu(f"`momentum_update_`, {_PIXELS}", "momentum_update_", "ade20k"),
    _gpu("`normalize_embedding`, [{B},{D},{H},{W}], with the gradient", "normalize_embedding", "nchw"),
    _gpu(f"`upsample_cross_entropy`, {_MAPS}, with the gradient", "upsample_cross_entropy", "ade20k_large_x4"),
    _gpu(f"`upsample_argmax`, {_MAPS}", "upsample_argmax", "ade20k_large_x4"),
]
_SHAPES = ("c2_d64", "c2_d64_k1", "c2_d256", "c2_d256_k1", "c19_d64", "c19_d256", "c150_d64", "c150_d256")

_HOST = [
    *(
        Line(f"`{op}`", op, "host")
        for op in (
            "normalize_embedding", "class_scores", "nearest_centroid", "centroid_distance", "centroid_cross_entropy",
            "subcentroid_cross_entropy", "sinkhorn_assign", "sinkhorn_plan", "cluster_sums", "momentum_update_",
            "upsample_cross_entropy", "upsample_argmax",
        )
    ),
    *(Line(f"`{op}`, forward and backward", op, "host_train") for op in ("centroid_cross_entropy", "upsample_cross_entropy")),
]  # fmt: skip

TABLES: dict[str, Table] = {
    # what a user's own linear head costs, and what ours cost in its place
    "segmentation": Table(
        "C, K, D",
        {
            "linear head, eager": share("linear"), "compiled": share("linear_compiled"),
            "linear head with `upsample_cross_entropy`": share("dnc_* linear"), "`DNCHead`": share("dnc_* head"),
            "`DNCHead` without PPC and PPD": share("dnc_* head without contrast"),
        },
        [
            *(Line("{C}, {K}, {D}", "segmentation_step", case) for case in _SHAPES),
            *(Line("{C}, {K}, {D}, bfloat16", "segmentation_step", c, dtype="bfloat16") for c in ("c19_d256", "c150_d256")),
        ],
        _XEON,
    ),
    # "when not to use it"
    "hard": Table("op and shape", {"ours": cost(), "best baseline": best, "ratio": ratio()}, _HARD, _XEON),
    "bfloat16": Table(
        "op and shape", {"ours": cost(), "best baseline": best, "ratio": ratio()},
        [
            Line(f"`{op}`, {_PIXELS}, {dtype}", op, case, dtype=dtype)
            for op, case in (
                ("centroid_cross_entropy", "ade20k"), ("centroid_cross_entropy", "cityscapes"), ("nearest_centroid", "ade20k"),
                ("subcentroid_cross_entropy", "ade20k"), ("subcentroid_cross_entropy", "cityscapes"),
            )
            for dtype in ("float32", "bfloat16")
        ],
        _XEON,
    ),
    "head": Table(
        "labels, classes",
        {
            "ours": cost("dnc_* checkpoint=all"), "eager": cost("eager"), "compiled": cost("compiled_loss"),
            "ratio to the best": ratio("dnc_* checkpoint=all"),
        },
        [Line("{H}x{W}, {C}", "head_step", f"{size} C={c}") for c in (19, 150) for size in ("512x1024", "1024x1024")],
        _XEON,
    ),
    "gpu": Table(
        "op and shape", {
            "CUDA C++": where_there_is(cost("dnc_cuda")), "Triton": cost("dnc_triton"),
            "best of torch": where_there_is(best, "not measured"),
        }, _GPU, _H100
    ),
    "gpu head": Table(
        "features, labels, classes",
        {
            **{f"bands of {pixels}": cost(_bands(pixels)) for pixels in (32768, 65536, 131072)},
            "131072, as a CUDA graph": cost(_bands(131072) + " graph"),
            "without bands": cost("dnc_auto checkpoint=none"),
        },
        [Line("[{B},{D},{h},{w}], {H}x{W}, {C}", "head_step", "8x512x512 C=150", "dnc_auto *", "bfloat16")],
        _H100,
    ),
    "host": Table(
        "call",
        {"ours": host(), "measured against": host("custom_op", "cross_entropy"), "times as long": times_as_long},
        _HOST,
    ),
    "ops": Table("op and shape", {"ours": cost(), "best baseline": best, "ratio": ratio(), "to the others": others}, _SINGLE),
    "upsample": Table(
        "op and shape",
        {
            "ours": cost(), "eager": cost("interpolate_ce", "interpolate_argmax"),
            "compiled": cost("interpolate_ce_compiled", "interpolate_argmax_compiled"), "ratio to the best": ratio(),
        },
        _UPSAMPLE,
    ),
}  # fmt: skip


def newest(folder: Path) -> dict[tuple[str, str, str], dict[str, Row]]:
    """By op, case and dtype the newest row of each variant that was not left out."""
    found: dict[tuple[str, str, str], dict[str, Row]] = {}
    rows = [row for file in folder.glob("*.jsonl") for row in record.read(file) if row["status"] != "skipped"]
    for row in sorted(rows, key=_age):
        found.setdefault((row["op"], row["case"], row["dtype"]), {})[row["variant"]] = row
    return found


def _age(row: Row) -> int:
    return int(row["unix_time_s"])


def lines_of(table: Table, results: Path) -> list[tuple[list[str], list[Row]]]:
    """Each line's cells, the label first, and the rows that they are made of."""
    known, lines = newest(results / table.folder), []
    for line in table.lines:
        rows = Rows(line, known.get((line.op, line.case, line.dtype), {}))
        label = line.label.format(**rows.pick()["shape"])
        lines.append(([label, *(cell(rows) for cell in table.columns.values())], rows.used))
    return lines


def render(name: str, results: Path) -> str:
    """What stands in the block called `name`."""
    table_name, *rest = name.split(" / ")
    if table_name == "recipes":
        if len(rest) != 1 or rest[0] not in recipe_rows.TABLES:
            raise Unquotable(f"no table {name!r}; there are {', '.join(f'recipes / {n}' for n in recipe_rows.TABLES)}")
        if (body := recipe_rows.render(results, rest[0])) is None:
            raise Unquotable(f"{name}: no rows")
        return body
    if table_name not in TABLES:
        raise Unquotable(f"no table {table_name!r}; there are {', '.join(TABLES)}")
    table = TABLES[table_name]
    lines = lines_of(table, results)
    return _in_prose(table, lines, *rest) if rest else _as_table(table, lines)


def _as_table(table: Table, lines: Sequence[tuple[list[str], list[Row]]]) -> str:
    """Caption and table. Where rows come from several commits, each line names its own."""
    rows = [row for _, used in lines for row in used]
    head = [table.heading, *table.columns]
    cells = [line for line, _ in lines]
    commits = [", ".join(dict.fromkeys(map(_commit, used))) for _, used in lines]
    if mixed := len({*commits}) > 1:
        head, cells = [*head, "commit"], [[*line, commit] for line, commit in zip(cells, commits, strict=True)]
    where = [
        _all(rows, lambda r: f"{r['device']} ({r['cpu_isa']})" if r["cpu_isa"] else r["device"]),
        _all(rows, lambda r: f"{r['threads']} threads"), _all(rows, lambda r: f"torch {r['torch_version'].partition('+')[0]}"),
        _all(rows, lambda r: r["dtype"]), *([] if mixed else [f"commit {commits[0]}"]),
        f"{min((row['rounds'] for row in rows if row['rounds']), default=0)} rounds or more",
    ]  # fmt: skip
    texts = [head, ["---"] * len(head), *cells]
    return "\n".join(["", f"{', '.join(where)}.", "", *("| " + " | ".join(text) + " |" for text in texts), "", ""])


def _all(rows: Sequence[Row], text: Callable[[Row], str]) -> str:
    return " and ".join(dict.fromkeys(map(text, rows)))


def _commit(row: Row) -> str:
    commit, *dirty = row["git_commit"].split("-")
    return "-".join([commit[:7], *dirty])


def _in_prose(table: Table, lines: Sequence[tuple[list[str], list[Row]]], column: str, labels: str = "*") -> str:
    """Range of the ratios in a column."""
    if column not in table.columns:
        raise Unquotable(f"no column {column!r}; there are {', '.join(table.columns)}")
    place = list(table.columns).index(column) + 1
    ratios = [re.match(r"([\d.]+)x", cells[place]) for cells, _ in lines if fnmatchcase(cells[0], labels)]
    found = [float(ratio[1]) for ratio in ratios if ratio]
    if not found:
        raise Unquotable(f"no ratio in column {column!r} of lines {labels!r}")
    return _range(found)


def quoted(text: str, results: Path) -> str:
    """A page with its blocks as the rows have them."""
    if text.count("<!-- rows: ") != len(BLOCK.findall(text)) or any("<!-- rows: " in b for _, b in BLOCK.findall(text)):
        raise Unquotable("a block has no end")
    return BLOCK.sub(lambda b: f"<!-- rows: {b['name']} -->{render(b['name'], results)}<!-- end rows -->", text)


def quote(check: bool, root: Path = ROOT) -> int:
    """Write the blocks of all pages anew, or with `check` print what would change; 1 if anything would, or has no rows."""
    results, wrong, names = root / "benchmarks" / "results", False, set[str]()
    for page in (root / "README.md", *sorted((root / "docs").glob("*.md"))):
        text, name = page.read_text(), str(page.relative_to(root))
        names |= {block["name"].partition(" / ")[0] for block in BLOCK.finditer(text)}
        try:
            new = quoted(text, results)
        except Unquotable as error:
            print(f"{name}: {error}")
            wrong = True
            continue
        if new != text and check:
            print(
                *difflib.unified_diff(text.splitlines(), new.splitlines(), name, f"{name} as the rows say", lineterm=""),
                sep="\n",
            )
            wrong = True
        elif new != text:
            page.write_text(new)
            print(f"{name}: written")
    for name in TABLES.keys() - names:
        print(f"{name}: on no page yet" + _missing(name, results))
    return int(wrong)


def _missing(name: str, results: Path) -> str:
    try:
        render(name, results)
    except Unquotable as error:
        return f" ({error})"
    return ""
