"""Lineage: embeddings under another name than their run are asked by that run, at the step that made them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
from media import make_clip
from tiny_run import config, store_in

import avstore
from avstore.errors import ConflictError
from avstore.store import Store
from benchmarks.lineage import lineage_of, maker, step_of, trainers_of
from cli.main import invoke
from trainers.embed import embed, embed_file
from trainers.loop import train
from trainers.run import Run


@pytest.fixture(scope="module")
def named(tmp_path_factory: pytest.TempPathFactory) -> tuple[Store, Run]:
    """Embeddings `short` of step 1 of a run that is called otherwise and has gone on to step 2."""
    folder = tmp_path_factory.mktemp("lineage")
    store = store_in(folder, codec="jpeg")
    run = train("avid", store, config("steps=2", "checkpoint_every=1"), folder / "runs" / "avid-of-tiny").run
    embed(run, store, 1, name="short")
    return store, run


def test_the_run_is_found_by_what_is_noted(
    named: tuple[Store, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store, run = named
    monkeypatch.chdir(tmp_path)
    found = maker(store, "short")  # beside the store
    assert found is not None and found.path.resolve() == run.path.resolve() and step_of(store, "short", found) == 1
    assert [r.name for r in trainers_of(store, ["short"])[0]] == ["avid-of-tiny"]
    shutil.copytree(run.path, "elsewhere/renamed")
    other = maker(store, "short", asked="elsewhere/renamed")
    assert other is not None and other.path == Path("elsewhere/renamed")
    assert lineage_of(store, "short")["run"] == "avid-of-tiny"
    shutil.rmtree(other.checkpoint(1).path)
    with pytest.raises(ConflictError, match=r"step 1 of .*no more"):
        step_of(store, "short", other)


def test_a_file_is_asked_of_the_networks_that_made_the_embeddings(
    named: tuple[Store, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from cli.query import _vectors

    store, run = named
    monkeypatch.chdir(tmp_path)
    clip = make_clip(tmp_path / "clip.mp4", seconds=1.0)
    for asked in (None, "short"):
        rows, _, own = _vectors(store, "clip.mp4", "video", "short", asked)
        np.testing.assert_array_equal(rows, embed_file(run, store, clip, which=1)["video"])
        assert own is None
    assert np.abs(rows - embed_file(run, store, clip)["video"]).max() > 1e-4  # step 2 says something else
    (tmp_path / "alone").mkdir()
    shutil.copytree(store.path, tmp_path / "alone" / "s.zarr")  # away from its run, beside another that is called so
    train("avid", store, config("steps=1", "width=8"), tmp_path / "runs" / "short")
    with avstore.open(tmp_path / "alone" / "s.zarr") as alone, pytest.raises(ConflictError, match="were not made by"):
        _vectors(alone, "clip.mp4", "video", "short", None)


def test_retrieval_has_its_control(
    named: tuple[Store, Run], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    store, _ = named
    monkeypatch.chdir(tmp_path)
    assert invoke(["bench", "retrieval", str(store.path), "--run", "short", "--class", "--no-raw", "--json"]) == 0
    said = capsys.readouterr().out
    assert "random weights" in said and "no random-weight control" not in said and "is unknown" not in said
