"""docs/tutorial.md: its blocks run in order as one program, and what it says of the result is so."""

import re
from pathlib import Path

import pytest

pytest.importorskip("sklearn")
pytest.importorskip("jinja2")

PAGE = Path(__file__).parents[1] / "docs" / "tutorial.md"


@pytest.mark.slow
@pytest.mark.usefixtures("one_thread")
def test_the_tutorial_runs_and_says_what_happens(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {"__name__": "__main__"}
    text = PAGE.read_text()
    for block in re.finditer(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, block.start(1))
        exec(compile("\n" * line + block[1], PAGE, "exec"), names)
    anchors, alive, dead = names["anchors"], names["diagnosis"].overall, names["slow_diagnosis"].overall
    assert names["own"] > 0.95 and anchors.before.value == pytest.approx(names["own"])
    assert anchors.after.value >= anchors.before.value - 0.015
    assert alive["dead"] <= 0.05 and alive["usage"] >= 0.8 and alive["win"] >= 0.85
    assert dead["dead"] > 0.5 and any("dead" in str(warning.message) for warning in names["said"])
    assert {path.name for path in tmp_path.iterdir()} >= {"anchors", "queries.png", "gallery.html"}
