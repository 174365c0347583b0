"""What a run has seen with all that it learned from: of two real trainings, of teachers of each kind, and of runs whose
snapshot does not tell."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tiny_run import config, store_in

from avstore.store import Store
from benchmarks import unseen
from benchmarks.probing import Part, Probed
from benchmarks.sides import trained_on, why_unknown
from trainers.ancestry import seen_before, seen_by
from trainers.embed import embed
from trainers.loop import train
from trainers.run import Run


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Path]:
    """runs/avid of the videos of label a, and runs/cma, which starts from it, of those of label b."""
    folder = tmp_path_factory.mktemp("ancestry")
    store = store_in(folder, codec="jpeg")
    train("avid", store, config("steps=1"), folder / "runs" / "avid", where=["label=a"])
    train("avid-cma", store, config("steps=1", name="avid-cma"), folder / "runs" / "cma", init=folder / "runs" / "avid",
          where=["label=b"])  # fmt: skip
    return store, folder / "runs"


def forgotten(runs: Path, into: Path) -> Run:
    """The runs as an older version wrote them, copied; the second of them."""
    shutil.copytree(runs, into)
    for name in ("avid", "cma"):
        file = into / name / "snapshot.json"
        value = json.loads(file.read_text())
        assert value.pop("also_saw") is not None and value.pop("unknown") == []
        file.write_text(json.dumps(value))
    return Run(into / "cma")


def test_a_run_has_seen_what_its_stage_saw(made):
    store, runs = made
    a, b = (store.select(where=[f"label={x}"], held_out=False).numbers for x in "ab")
    run = Run(runs / "cma")
    assert run.snapshot.numbers.tolist() == sorted(b) and run.snapshot.also_saw.tolist() == sorted(a)
    assert seen_by(run, store).numbers.tolist() == sorted([*a, *b]) and seen_by(run, store).unknown == ()
    assert seen_by(Run(runs / "avid"), store).numbers.tolist() == sorted(a)
    found = trained_on(run.path, store)
    assert found is not None and found.tolist() == sorted([*a, *b]) and why_unknown(run.path, store) is None


def test_parts_that_a_stage_was_trained_on_are_not_asked(made):
    """Three folds: label a, which the stage saw; label b, which the run saw; the two held-out videos."""
    store, runs = made
    numbers = store.numbers
    a, b = (store.select(where=[f"label={x}"], held_out=False).numbers for x in "ab")
    tests = [np.flatnonzero(np.isin(numbers, x)) for x in (a, b, np.setdiff1d(numbers, [*a, *b]))]
    parts = tuple(Part(f"fold {i}", np.setdiff1d(np.arange(len(numbers)), t), t) for i, t in enumerate(tests))
    probed = Probed(numbers, np.arange(len(numbers)) % 2, ("a", "b"), parts, "")
    run, stage = Run(runs / "cma"), Run(runs / "avid")
    assert [p.name for p in unseen.parts_of(store, run, probed)[0]] == ["fold 2"]
    assert [p.name for p in unseen.parts_of(store, stage, probed)[0]] == ["fold 1", "fold 2"]
    _, asked, notes = unseen.plan(store, [run], ["cma"], probed)
    assert asked == [parts[2:]] and "stages and teachers included" in notes[0]
    both = Probed(numbers, probed.labels, ("a", "b"), parts[:2], "")
    plan, _, notes = unseen.plan(store, [run], ["cma"], both)
    assert plan.parts == parts[:2] and notes[0].startswith("cma, its stages and teachers included, saw 10 of 10")


def test_a_snapshot_that_does_not_tell_has_its_stage_looked_up(made, tmp_path):
    store, runs = made
    run = forgotten(runs, tmp_path / "runs")
    assert run.snapshot.also_saw is None
    assert seen_by(run, store).numbers.tolist() == seen_by(Run(runs / "cma"), store).numbers.tolist()
    other = tmp_path / "runs" / "avid" / "config.json"
    another = Run(other.parent).config.replace(seed=7)
    other.write_text(json.dumps(another.to_json()))  # another run under its name is not taken for it
    for gone in (False, True):
        if gone:
            shutil.rmtree(other.parent)
        seen = seen_by(Run(run.path), store)
        assert seen.numbers.tolist() == run.snapshot.numbers.tolist()
        assert seen.unknown == ("avid, whose folder is not to be found",)
    part = Part("test", np.arange(0), np.arange(len(store.numbers)))
    (_, said) = unseen.told(store, Run(run.path), store.numbers, [part])
    assert said == "cma learned from avid, whose folder is not to be found: whether that saw these videos is not known"
    assert "is not known" in str(why_unknown(run.path, store))


def test_teachers_of_each_kind(made, tmp_path, monkeypatch):
    store, runs = made
    a, b = (store.select(where=[f"label={x}"], held_out=False).numbers for x in "ab")
    of_run = seen_before(store, [], [str(runs / "avid"), f"{runs / 'cma'}@1#video"])
    assert of_run.numbers.tolist() == sorted([*a, *b]) and of_run.unknown == ()
    weights = seen_before(store, [Run(runs / "avid")], [f"{tmp_path}/image.safetensors#image-resnet-18"])
    assert weights.numbers.tolist() == sorted(a) and weights.unknown == ("the weights image.safetensors",)
    embed(Run(runs / "avid"), store)
    vectors = f"{store.path}/embeddings/avid/video-trunk"
    monkeypatch.chdir(tmp_path)
    assert seen_before(store, [], [vectors]).numbers.tolist() == sorted(a)  # the run lies beside the store
    shutil.copytree(store.path, tmp_path / "alone.zarr")
    (said,) = seen_before(store, [], [f"{tmp_path}/alone.zarr/embeddings/avid/video-trunk"]).unknown
    assert "made by avid: no such run" in said
    foreign = store_in(tmp_path / "other", codec="jpeg", height=64, width=80)
    (said,) = seen_before(foreign, [Run(runs / "cma")]).unknown
    assert said == "cma, trained on another store, tiny.zarr"
