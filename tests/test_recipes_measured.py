"""benchmarks.recipes makes whole rows, and the tables of docs/recipes.md are their means."""

import json
import math
from dataclasses import replace

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("jinja2")

from benchmarks import recipe_rows, recipes
from dnc_kernels.nn import RECIPES

pytestmark = pytest.mark.usefixtures("one_thread")


def test_a_run_of_digits_makes_a_row_of_either_head(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(recipes.TASKS, "digits", replace(recipes.TASKS["digits"], epochs=1))
    out = tmp_path / "rows.jsonl"
    arguments = ["--task", "digits", "--head", "softmax", "--head", "classification", "--seed", "1", "--out", str(out)]
    assert recipes.main(arguments) == 0
    softmax, dnc = (json.loads(line) for line in out.read_text().splitlines())
    assert [row["head"] for row in (softmax, dnc)] == ["softmax", "classification"]
    assert softmax["steps"] == dnc["steps"] == 1437 // 64 and softmax.keys() < dnc.keys()
    assert all(0.05 < row["score"] <= 1 and 0 <= row["ece"] < 1 for row in (softmax, dnc))
    assert all(0 <= dnc[name] <= 1 for name in ("dead", "usage", "win", "anchored", "refitted", "refitted_anchored"))
    assert dnc["win"] <= dnc["win_kmeans"] + 0.01
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_table_has_means_with_standard_errors_of_the_newest_rows(tmp_path):
    like = {"task": "digits", "steps": 5, "commit": "0123456789ab", "torch_version": "2.13.0+cpu", "ece": 0.01, "dead": 0.5}
    folder = tmp_path / "recipes"
    folder.mkdir()
    rows = [("slow", 0, 0.1, 1), ("slow", 0, 0.8, 3), ("slow", 1, 0.9, 2), ("softmax", 0, 0.7, 1)]
    lines = [{**like, "head": h, "seed": s, "score": score, "unix_time_s": t} for h, s, score, t in rows]
    (folder / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    text = recipe_rows.render(tmp_path, "digits")
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("| ")]
    assert [row[0] for row in cells[2:]] == ["softmax", "DNC, `slow`"]
    error = math.sqrt(2 * 0.05**2) / math.sqrt(2)  # the row of seed 0 that a newer one replaced does not count
    assert cells[3][1:3] == ["2", f"0.8500 ± {error:.4f}"] and cells[2][1:4] == ["1", "0.7000", "-"]
    assert "5 steps, commit 0123456" in text and recipe_rows.render(tmp_path, "scenes") is None


def test_tables_name_heads_that_can_be_trained():
    assert set(recipe_rows.HEADS) == {"softmax", *RECIPES, *recipes.VARIANTS}
    assert {task for task, _ in recipe_rows.TABLES.values()} == set(recipes.TASKS)
