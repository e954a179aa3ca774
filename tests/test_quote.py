"""Numbers on the pages come from rows: tables and figures are what `python -m benchmarks quote` would write."""

import json
import re
from types import SimpleNamespace

import pytest

from benchmarks import __main__ as command
from benchmarks import quote
from benchmarks.case import Settings
from benchmarks.quote import ROOT, Line, Table, Unquotable, cost, others, ratio

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FIGURE = re.compile(r"(?<![\w.])\d+(?:\.\d+)?(?:x\b| (?:ms|us|µs|ns)\b| times (?:faster|slower|cheaper|dearer|as|less|more)\b)")
#: Figures of time that nobody measured: what a kernel is expected to take on a GPU, what the benchmarks themselves wait for, a
#: product in a formula.
NOT_MEASURED = {
    "README.md": set[str](),
    "benchmarks.md": {"5 ms", "1.5 times as", "50 us", "20 ms", "2 ms"},
    "momentum.md": {"22 us", "30 us", "45 us"},
    "similarity.md": {"2x"},
    "sinkhorn.md": {"25 us"},
}


def test_the_pages_say_what_the_rows_say(capsys):
    assert command.main(["quote", "--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_speed_in_prose_comes_from_rows(page):
    """To quote a ratio in a sentence, write it as a block too (docs/benchmarks.md)."""
    text = re.sub(r"```.*?```", "", quote.BLOCK.sub("", page.read_text()), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith("    ")]
    assert {f for line in lines for f in FIGURE.findall(line)} - NOT_MEASURED.get(page.name, set()) == set()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A checkout with one page, one table of two cases, and `add` to add a row of one of them."""
    (tmp_path / "docs").mkdir()
    folder = tmp_path / "benchmarks" / "results" / "machine"
    folder.mkdir(parents=True)
    columns = {"ours": cost(), "theirs": cost("slow"), "ratio": ratio(), "others": others}
    lines = [Line("`double`, N={N}", "double", case) for case in ("small", "large")]
    monkeypatch.setattr(quote, "TABLES", {"toy": Table("op", columns, lines, folder="machine")})

    def add(case="small", variant="dnc_cpu", ms=2.0, ratio=3.0, commit="aaaaaaaaaaaa", when=1, **options):
        row = {
            "op": "double", "case": case, "variant": variant, "dtype": "float32", "status": "ok", "shape": {"N": len(case)},
            "p50_ms": ms, "peak_delta_mb": 12.3, "ratio_to_best_baseline": ratio, "best_baseline": "slow", "device": "CPU",
            "ratio_to_baselines": {"slow": ratio, "slower": 10 * ratio, "slowest": 99.0}, "git_commit": commit, "threads": 2,
            "rounds": when + 6, "cpu_isa": "avx2", "torch_version": "2.13.0+cpu", "unix_time_s": when,
        } | options  # fmt: skip
        with (folder / f"{when}.jsonl").open("a") as file:
            print(json.dumps(row), file=file)

    def both(**options):
        for case in ("small", "large"):
            add(case, **options)
            add(case, "slow", 6.0, 1.0, **options)

    page = tmp_path / "README.md"
    page.write_text("Before\n\n<!-- rows: toy --><!-- end rows -->\n\nAfter\n")
    return SimpleNamespace(root=tmp_path, results=tmp_path / "benchmarks" / "results", page=page, add=add, both=both)


TOY = """Before

<!-- rows: toy -->
CPU (avx2), 2 threads, torch 2.13.0, float32, commit aaaaaaa, 7 rounds or more.

| op | ours | theirs | ratio | others |
| --- | --- | --- | --- | --- |
| `double`, N=5 | 2.0 ms, 12 MB | 6.0 ms, 12 MB | 3.0x | 30x to 99x |
| `double`, N=5 | 2.0 ms, 12 MB | 6.0 ms, 12 MB | 3.0x | 30x to 99x |

<!-- end rows -->

After
"""


def test_a_block_is_written_and_then_stays(checkout, capsys):
    checkout.both()
    before = checkout.page.read_text()
    assert quote.quote(True, checkout.root) == 1 and checkout.page.read_text() == before
    assert "+| `double`, N=5 | 2.0 ms, 12 MB |" in capsys.readouterr().out
    assert quote.quote(False, checkout.root) == 0 and checkout.page.read_text() == TOY
    assert quote.quote(True, checkout.root) == 0


def test_the_newest_row_is_quoted_and_a_second_commit_is_named(checkout):
    checkout.both(when=5)
    checkout.add(ms=0.512, ratio=12.5, commit="bbbbbbbbbbbb-dirty", when=7)
    checkout.add(ms=1.0, when=2)
    checkout.add(status="skipped", when=9, p50_ms=None)
    quote.quote(False, checkout.root)
    lines = checkout.page.read_text().splitlines()
    assert "| `double`, N=5 | 0.51 ms, 12 MB | 6.0 ms, 12 MB | 12x | 99x to 125x | bbbbbbb-dirty, aaaaaaa |" in lines
    assert "| `double`, N=5 | 2.0 ms, 12 MB | 6.0 ms, 12 MB | 3.0x | 30x to 99x | aaaaaaa |" in lines
    assert "CPU (avx2), 2 threads, torch 2.13.0, float32, 11 rounds or more." in lines


def test_a_newest_row_that_is_wrong_says_so(checkout):
    checkout.both()
    empty = {"p50_ms": None, "ratio_to_best_baseline": None, "ratio_to_baselines": None, "best_baseline": None}
    checkout.add(when=2, status="wrong", **empty)
    quote.quote(False, checkout.root)
    assert "| `double`, N=5 | wrong | 6.0 ms, 12 MB | wrong |  |" in checkout.page.read_text()


def test_a_range_within_a_sentence(checkout):
    checkout.both()
    checkout.add("large", ratio=0.45, when=2)
    checkout.page.write_text("It is <!-- rows: toy / ratio -->9x<!-- end rows --> faster.")
    assert quote.quote(False, checkout.root) == 0
    assert checkout.page.read_text() == "It is <!-- rows: toy / ratio -->0.45x to 3.0x<!-- end rows --> faster."
    checkout.add("large", ratio=2.97, when=3)
    assert quote.render("toy / ratio / `double`, N=5", checkout.results) == "3.0x"
    with pytest.raises(Unquotable, match="no ratio in column 'ratio' of lines 'N=4'"):
        quote.render("toy / ratio / N=4", checkout.results)
    with pytest.raises(Unquotable, match="no column 'speed'; there are ours, theirs, ratio, others"):
        quote.render("toy / speed", checkout.results)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("<!-- rows: toy -->\n<!-- end rows -->", "double small: no row of dnc_*"),
        ("<!-- rows: other --><!-- end rows -->", "no table 'other'; there are toy"),
        ("<!-- rows: toy -->", "a block has no end"),
        ("<!-- rows: toy --> <!-- rows: toy --><!-- end rows -->", "a block has no end"),
    ],
)
def test_a_block_that_cannot_be_written_is_an_error_and_stays(checkout, capsys, text, reason):
    checkout.page.write_text(text)
    assert quote.quote(False, checkout.root) == 1
    assert reason in capsys.readouterr().out and checkout.page.read_text() == text


def test_a_table_without_a_page_is_told_and_no_error(checkout, capsys):
    checkout.page.write_text("nothing")
    assert quote.quote(True, checkout.root) == 0
    assert "toy: on no page yet (double small: no row of dnc_*)" in capsys.readouterr().out
    checkout.both()
    assert quote.quote(True, checkout.root) == 0
    assert "toy: on no page yet\n" in capsys.readouterr().out


def test_every_table_can_be_made_of_what_a_run_measures(tmp_path):
    """No entry names a case or a variant that does not exist, though its rows may not be there yet."""
    like = json.loads(next((quote.ROOT / "benchmarks" / "results" / quote._CPU).glob("*.jsonl")).read_text().splitlines()[0])
    for name, settings in (
        *((folder, Settings(dtypes=("float32", "bfloat16"))) for folder in (quote._CPU, quote._XEON)),
        (quote._H100, Settings(device="cuda", dtypes=("bfloat16",))),
    ):
        (tmp_path / name).mkdir()
        with (tmp_path / name / "rows.jsonl").open("w") as file:
            for case in command.select(settings):
                baselines = [v.name for v in case.variants if v.baseline]
                for v in case.variants:
                    own = {"op": case.op, "case": case.name, "dtype": case.dtype, "shape": dict(case.shape), "variant": v.name}
                    raced = {"best_baseline": baselines[0], "ratio_to_baselines": dict.fromkeys(baselines, 1.0)}
                    print(json.dumps(like | own | raced), file=file)
    for name, table in quote.TABLES.items():
        made = quote.render(name, tmp_path)
        assert made.count("\n| ") == 2 + len(table.lines)
        assert "{" not in made
