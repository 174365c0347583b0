"""Values over checkpoints: which rows make a curve, its drawing, and the benches that draw one."""

from __future__ import annotations

import json
import xml.etree.ElementTree as tree

import pytest
from tiny_run import config, store_in

from avstore.errors import UsageError
from benchmarks import curve
from benchmarks.archive import archived
from benchmarks.table import Table
from cli.main import invoke
from trainers import embed
from trainers.loop import train


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A store, and two runs with checkpoints of steps 2 and 4 (an epoch has two steps)."""
    folder = tmp_path_factory.mktemp("curve")
    store = store_in(folder, codec="jpeg")
    sets = ("steps=4", "checkpoint_every=2", "keep_every=2")
    runs = [train("avid", store, config(*sets, f"seed={s}"), folder / "runs" / f"run{s}").run for s in (0, 1)]
    for run in runs:
        embed.embed(run, store)
    return store, runs


def row(step, epoch, value, block="conv5x", run="avid"):
    place = {"step": step, "epoch": epoch, "of run": run}
    return {"features": f"{run} step {step}", "block": block, "top-1": value, **place}


def test_rows_become_curves(tmp_path):
    rows = [row(4, 2.0, 0.6), row(2, 1.0, 0.5), row(2, 1.0, 0.3, "conv4x"), row(4, 2.0, 0.2, "conv4x"),
            {"features": "random weights", "block": "conv5x", "top-1": 0.25},
            {"features": "published: AVID", "top-1": 0.9}]  # fmt: skip
    a, b = curve.curves(rows, "top-1")
    assert (a.name, a.x, a.y) == ("avid conv5x", [1.0, 2.0], [0.5, 0.6]) and b.name == "avid conv4x"
    assert curve.levels(rows, "top-1") == [("random weights conv5x", 0.25)]  # published figures have another scale
    text = curve.draw(Table("t", ("top-1",), rows), "top-1", tmp_path / "c.svg").read_text()
    root = tree.fromstring(text)
    assert text.count("<polyline") == 3 and text.count("<circle") == 6
    assert [e.text for e in root.iter("{http://www.w3.org/2000/svg}text") if e.get("class") == "name"] == [
        "avid conv5x", "avid conv4x", "random weights conv5x"]  # fmt: skip
    with pytest.raises(UsageError, match="1 checkpoints"):
        curve.draw(Table("t", ("top-1",), rows[:1]), "top-1", tmp_path / "d.svg")
    assert not (tmp_path / "d.svg").exists()


def test_steps_that_runs_share(trained):
    _, runs = trained
    assert curve.common_steps(runs) == [2, 4]
    assert curve.place_of(runs[0], 2) == (2, 1.0) and curve.place_of(runs[0])[0] == 4

    class Other:
        name = "other"

        def checkpoints(self):
            return [c for c in runs[0].checkpoints() if c.step == 99]

    with pytest.raises(UsageError, match="no checkpoint in common") as e:
        curve.common_steps([runs[0], Other()])
    assert "run0: 2, 4; other: none" in e.value.why


@pytest.mark.parametrize("bench", [
    ["knn", "--k", "1", "--folds", "2", "--clips", "1", "--no-raw"],
    ["untrimmed", "--budget", "1", "--epochs", "1", "--folds", "2", "--random-draws", "1"],
    ["retrieval", "--class", "--no-raw", "--folds", "2"],
])  # fmt: skip
def test_of_one_checkpoint_the_table_is_kept_and_printed(trained, bench, tmp_path, capsys):
    store, _ = trained
    alone = train("avid", store, config("steps=2"), tmp_path / "runs" / f"alone-{bench[0]}").run
    out, asked = tmp_path / "c.svg", ["--run", str(alone.path), "--all-checkpoints", "--json"]
    assert invoke(["bench", bench[0], str(store.path), *bench[1:], *asked, "--curve", str(out)]) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["rows"] and "no curve to draw" in said.err and not out.exists()
    (kept,) = archived(store, [alone.name])
    assert json.loads(kept.read_text())["rows"] == json.loads(said.out)["rows"]


@pytest.mark.parametrize("bench", [
    ["knn", "--k", "1", "--folds", "2", "--clips", "1", "--no-raw"],
    ["untrimmed", "--budget", "1", "--epochs", "1", "--folds", "2", "--random-draws", "1"],
    ["retrieval", "--class", "--no-raw", "--folds", "2"],
])  # fmt: skip
def test_benches_draw_what_becomes_of_a_training(trained, bench, tmp_path, capsys):
    store, runs = trained
    out = tmp_path / "c.svg"
    named = [x for r in runs for x in ("--run", str(r.path))]
    base = ["bench", bench[0], str(store.path), *bench[1:], "--json"]
    assert invoke([*base, *named, "--all-checkpoints", "--curve", str(out)]) == 0, capsys.readouterr().err
    table = json.loads(capsys.readouterr().out)
    mine = [r for r in table["rows"] if "step" in r]
    assert {(r["step"], r["epoch"]) for r in mine} == {(2, 1.0), (4, 2.0)}
    if bench[0] == "knn":  # they differ in their seed alone: one row, two runs
        assert [(r["features"], r["of"]) for r in mine] == [("avid step 2", 4), ("avid step 4", 4)]
    assert tree.fromstring(out.read_text()).tag.endswith("svg") and "<polyline" in out.read_text()
    kept = [json.loads(f.read_text()) for f in archived(store, ["run0"]) if f.name.startswith(bench[0])]
    assert [k["rows"] for k in kept] == [table["rows"]] and kept[0]["runs"] == ["run0", "run1"]
    assert bench[0] != "knn" or "last checkpoint, step 4" in table["notes"][-1]
    assert invoke([*base, *named, "--curve", str(out)]) == 2
    assert "--all-checkpoints" in capsys.readouterr().err
