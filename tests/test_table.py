"""Tables of results as text, as JSON and back: what two numbers in a cell mean."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.page import table as as_html
from benchmarks.report import read_tables
from benchmarks.table import Table, shown

TWO = Table(
    "t", ("features", "R@1", "of parts", "sd"), [{"features": "avid", "R@1": (0.75, 0.05), "of parts": (0.708, 0.667)}],
    spreads=("R@1",),
)  # fmt: skip


def test_values_of_two_parts_are_no_mean_with_its_spread() -> None:
    assert TWO.cells() == [["avid", "0.750 ± 0.050", "0.708, 0.667", ""]]
    assert shown((0.708, 0.667)) == "0.708, 0.667" and shown((0.1, 0.2, 0.3), spread=True) == "0.100, 0.200, 0.300"
    assert shown(True) == "yes" and shown(None) == "" and shown(3) == "3" and shown([1, "a"]) == "1, a"


def test_json_keeps_which_of_them_is_which(tmp_path: Path) -> None:
    file = tmp_path / "t.json"
    file.write_text(json.dumps(TWO.to_json()))
    (back,) = read_tables(file)
    assert back.cells() == TWO.cells()
    text = as_html(back)  # without the empty column
    assert "0.750 ± 0.050" in text and "0.708, 0.667" in text and ">sd<" not in text
    assert "spreads" not in Table("t", ("a",), [{"a": 1}]).to_json()
