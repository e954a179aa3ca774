"""Results of a run on a GPU: what they say in a page, and their way into the tree.

`results.jsonl` alone tells all: every line is whole, so a run that was cut off anywhere can be taken as far as it came. A
second `take` of the same results changes nothing.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

from . import ROOT, families
from .record import Line, read

RESULTS = "results.jsonl"
#: Outcomes of a test that are faults.
BAD = ("failed", "crashed", "hung")


def source(root: Path = ROOT) -> str:
    """SHA-256 of the package's Python, C++ and CUDA files: what the results of a run belong to."""
    paths = [p for pattern in ("csrc/**/*.*", "dnc_kernels/**/*.py") for p in root.glob(pattern) if p.is_file()]
    digest = hashlib.sha256()
    for name, path in sorted((p.relative_to(root).as_posix(), p) for p in paths):
        digest.update(f"{name}\n".encode() + path.read_bytes().replace(b"\r\n", b"\n"))
    return digest.hexdigest()


def rows_of(lines: Sequence[Line]) -> list[Line]:
    """The rows of benchmarks among the lines."""
    return [line for line in lines if "variant" in line and "event" not in line]


def events(lines: Sequence[Line], event: str) -> list[Line]:
    """The lines of a kind."""
    return [line for line in lines if line.get("event") == event]


def take(out: Path, root: Path = ROOT) -> list[str]:
    """Put the proofs, rows, choices and configurations of a run into the tree; returns what was written, in words.

    Raises:
        ValueError: there is nothing in `out`, it came of a dry run, or it belongs to other source than the tree's.
    """
    lines = list(read(out / RESULTS))
    runs = events(lines, "run")
    if not runs:
        raise ValueError(f"{out / RESULTS} has no run in it")
    if any(run["dry"] for run in runs):
        raise ValueError("a dry run proves and measures nothing; nothing is taken")
    for run in runs:
        if run["source"] != source(root):
            raise ValueError(
                f"the results belong to commit {run['commit']}, whose source is not this tree's; "
                f"run `git stash` or `git checkout {run['commit'].removesuffix('-dirty')}` first, then take them"
            )
    date = runs[0]["date"]
    taken = [*_take_proofs(lines, root), *_take_rows(lines, date, root), *_take_configurations(lines, root)]
    return [*taken, *_take_findings(lines, date, root)]


def _take_proofs(lines: Sequence[Line], root: Path) -> list[str]:
    from dnc_kernels._evidence import Proof

    from . import prove

    names = [field.name for field in fields(Proof)]
    proofs = [Proof(**{n: line[n] for n in names}) for line in events(lines, "proof") if line["proven"]]
    current = [p for p in proofs if p.source == families.source(p.family, root)]
    if current:
        prove.add(current, root / "dnc_kernels" / "proofs.json")
    return [f"proof of {p.family} by {p.tests} tests on {p.device}" for p in current]


def _take_rows(lines: Sequence[Line], date: str, root: Path) -> list[str]:
    from dnc_kernels._evidence import slug

    from . import dispatch

    written, by_device = [], defaultdict(list)
    for row in rows_of(lines):
        by_device[row["device"]].append(row)
    for device, rows in by_device.items():
        file = Path("benchmarks") / "results" / slug(device) / f"{date}.jsonl"
        (root / file).parent.mkdir(parents=True, exist_ok=True)
        (root / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
        written.append(f"{len(rows)} rows in {file}")
        choices = dispatch.faster((f"{file}:{number}", row) for number, row in enumerate(rows, 1))
        for path in dispatch.update(choices, root / "dnc_kernels" / "dispatch"):
            written.append(f"choices in {path.relative_to(root)}")
    return written


def _take_findings(lines: Sequence[Line], date: str, root: Path) -> list[str]:
    """The page that says what the run found, and which kernels its times were spent in, beside its rows."""
    folder = next((line["folder"] for line in events(lines, "environment") if line.get("folder")), None)
    if folder is None:
        return []
    name = f"{Path('benchmarks') / 'results' / folder / date}"
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / f"{name}.txt").write_text(summary(lines) + "\n")
    kernels = events(lines, "kernels")
    if kernels:
        (root / f"{name}.kernels.json").write_text("[\n" + ",\n".join(map(json.dumps, kernels)) + "\n]\n")
    return [f"what it found in {name}.txt", *([f"kernels in {name}.kernels.json"] if kernels else [])]


def _take_configurations(lines: Sequence[Line], root: Path) -> list[str]:
    written = {}
    for line in events(lines, "configuration"):
        path = root / "dnc_kernels" / "ops" / line["family"] / "configs" / f"{line['kind']}.json"
        content = json.loads(path.read_text()) if path.exists() else {}
        content[line["kernel"]] = line["entries"]
        path.write_text(json.dumps(content, indent=1) + "\n")
        written[path] = f"configurations in {path.relative_to(root)}"
    return list(written.values())


def summary(lines: Sequence[Line]) -> str:
    """What a run found, on a page: counts, every fault by name, times, and what was dropped."""
    text = []
    for run in events(lines, "run"):
        dry = ", dry: nothing here comes from a GPU" if run["dry"] else ""
        text.append(f"phase {run['phase']} of commit {run['commit']}, {run['date']}{dry}")
    for line in events(lines, "environment"):
        text.append("  " + ", ".join(f"{k} {v}" for k, v in line.items() if k not in ("event", "sources") and v))
    text += _summary_of_rows(lines)  # many lines: what is wrong stands behind them, where a cut output still shows it
    if primitives := events(lines, "primitive"):
        bad = [f"{p['primitive']} {p['status']}" for p in primitives if p["status"] != "ok"]
        text.append(f"primitives: {len(primitives) - len(bad)} of {len(primitives)} right" + "".join(f"; {b}" for b in bad))
    text += _summary_of_tests(lines)
    for line in events(lines, "proof"):
        text.append(
            f"proof of {line['family']}: " + (f"{line['tests']} tests" if line["proven"] else f"none: {line['reason']}")
        )
    for line in events(lines, "kernels"):
        most = ", ".join(f"{k['launches']:g} {k['kernel'][:40]} {k['us']:.0f}" for k in line["kernels"][:8])
        text.append(
            f"{line['op']} {line['case']} {line['variant']}: {line['launches']:g} launches, {line['us']:.0f} us: {most}"
        )
    for line in events(lines, "profile"):
        metrics = ", ".join(f"{name} {value}" for name, value in line["metrics"].items())
        text.append(f"profile of {line['op']} ({line['backend']}), {line['kernel']}: {metrics}")
    for line in events(lines, "step"):
        if line["status"] != "ok":
            text.append(f"step {line['step']}: {line['status']} after {line['seconds']:.0f} s: {line['detail']}")
    for line in events(lines, "dropped"):
        text.append(f"dropped {line['step']}: {line['reason']}")
    end = events(lines, "end")
    text.append(f"ended after {end[-1]['seconds']:.0f} s" if end else "cut off: no end was recorded")
    return "\n".join(text)


def _summary_of_tests(lines: Sequence[Line]) -> list[str]:
    text, steps = [], defaultdict(list)
    for line in events(lines, "test"):
        steps[line["step"]].append(line)
    notes = defaultdict(list)
    for line in events(lines, "note"):
        notes[line["step"], line["test"]].append(line["detail"])
    for step, tests in steps.items():
        counts = Counter(line["outcome"] for line in tests)
        text.append(f"tests of {step}: " + ", ".join(f"{n} {outcome}" for outcome, n in counts.most_common()))
        for line in tests:
            if line["outcome"] in BAD:
                why = "; ".join([*notes[step, line["test"]], line["detail"]])
                text.append(f"  {line['outcome']} {line['test']}: {why}"[:400])
    return text


def _summary_of_rows(lines: Sequence[Line]) -> list[str]:
    text, last = [], None
    for row in rows_of(lines):
        case = f"{row['op']} {row['case']} {row['dtype']}"
        if case != last:
            text.append(f"{case} " + " ".join(f"{k}={v}" for k, v in row["shape"].items()))
            last = case
        if row["p50_ms"] is None:
            text.append(f"  {row['variant']}: {row['status']}: {row['reason']}")
            continue
        shares = [f"{row[c]:.0f}% of {n}" for c, n in (("pct_gemm_probe", "mm"), ("pct_copy_probe", "copy")) if row.get(c)]
        host = [f"host {row['host_us']:.0f} us"] if row.get("host_us") else []
        ratio = [f"{row['ratio_to_best_baseline']:.2f}x the best baseline"] if row.get("ratio_to_best_baseline") else []
        text.append(f"  {row['variant']}: " + ", ".join([f"{1e3 * row['p50_ms']:.1f} us", *host, *shares, *ratio]))
    return text
