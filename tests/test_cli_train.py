"""`avstore train`: what it says of every method before anything is trained."""

from __future__ import annotations

import json

import pytest

from cli.main import invoke
from trainers.methods import METHODS


def said(capsys: pytest.CaptureFixture[str], *arguments: str, code: int = 0) -> str:
    assert invoke(list(arguments)) == code
    got = capsys.readouterr()
    return got.out if code == 0 else got.err


def test_a_line_for_each_method(capsys: pytest.CaptureFixture[str]) -> None:
    lines = [line.split("\t") for line in said(capsys, "train", "--list").splitlines()]
    assert lines[0] == ["method", "paper", "labels", "sound", "views", "what"]
    assert [line[0] for line in lines[1:]] == list(METHODS) and all(len(line) == 6 for line in lines)
    table = {line[0]: line for line in lines[1:]}
    assert table["avid-cma"][2:5] == ["no", "yes", "1"] and table["avid-cma"][5].endswith("(after avid)")
    assert table["crisscross"][4] == "2" and table["supervised"][2] == "yes"
    assert table["temporal"][4] == table["ccl"][3] == table["supervised"][3] == "by setting"
    assert table["avid"][1] == "Morgado et al. 2020" and table["avid-cma"][1] == "Morgado et al. 2021"
    values = [json.loads(line) for line in said(capsys, "train", "--list-methods", "--json").splitlines()]
    assert [v["method"] for v in values] == list(METHODS) and {"labels", "sound", "views", "stage"} <= values[0].keys()


def test_help_of_a_method_is_its_own_word(capsys: pytest.CaptureFixture[str]) -> None:
    out = said(capsys, "train", "avid-softmax", "--help")
    assert "Morgado" in out and "What differs" in out and "presets: paper, small, tiny" in out
    assert "form\tsoftmax\tsoftmax\t[S2] eqs. 4.1, 4.4-4.6" in out and "--preset" in out
    plain = said(capsys, "train", "--help")
    assert "Usage: avstore train" in plain and "Morgado" not in plain
    assert "did you mean avid" in said(capsys, "train", "avidd", "--help", code=2)


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_has_a_value_and_a_source(capsys: pytest.CaptureFixture[str], name: str) -> None:
    rows = [json.loads(line) for line in said(capsys, "train", name, "--show-config", "--json").splitlines()]
    assert {"seed", "learning_rate", "precision", "time_mask"} <= {r["key"] for r in rows}
    assert not [r["key"] for r in rows if not r["source"]]
    assert {r["of"] for r in rows} == {"method", "loop"}
