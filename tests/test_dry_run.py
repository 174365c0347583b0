"""The dry run: what an ingest would do, counted and timed, with nothing written anywhere."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from ingest_media import SPEC, Here, made_once, write_wav

import avstore.estimate
from avstore.errors import ConflictError, NotFoundError, UsageError
from avstore.estimate import estimate
from avstore.events import Probed
from avstore.ingest import ingest

SOUND: dict[str, Any] = {"sample_rate": 8000, "front_ends": (), "shard_seconds": 8}


@pytest.fixture(scope="module")
def source(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, tiny_media)[0]


@pytest.fixture(scope="module")
def made(tiny_media: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return made_once(tmp_path_factory, tiny_media)[1]


def files(folder: Path) -> dict[Path, int]:
    return {p: p.stat().st_mtime_ns for p in folder.rglob("*")}


def test_a_new_store(source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With real children. Its sums are those of the store that an ingest made of the same folder."""
    monkeypatch.chdir(tmp_path)
    before, seen = files(source), []
    out = estimate(source, workers=1, on_event=seen.append, **SPEC)
    assert files(source) == before and list(tmp_path.iterdir()) == []
    assert (out.files, out.new, out.probed, out.sampled, out.pending_tasks) == (
        11,
        11,
        11,
        8,
        0,
    )  # the liar is longer than it says
    assert out.store == "media.zarr" and len([e for e in seen if isinstance(e, Probed)]) == 11
    assert (
        out.bytes
        == out.new_bytes
        == sum(p.stat().st_size for p in source.rglob("*") if p.suffix != ".txt" and p.is_file())
    )
    assert out.failed == {"unreadable": 2} and out.skipped == [("notes.txt", "not media")]
    assert out.suffixes == {".mp4": 8, ".wav": 2, ".mkv": 1}
    assert out.sizes == {"160x128": 7, "no picture": 2} and out.sound_rates == {"24000 Hz": 7, "8000 Hz": 2}
    assert sum(out.frame_rates.values()) == 7
    seconds = 6 * 2 + 1 + 20 + 1.5  # what the headers say: the liar says 1
    assert out.hours * 3600 == pytest.approx(seconds, abs=0.6)
    assert out.wall is not None and 0 < out.wall < 300
    stored = sum(p.stat().st_size for p in made.rglob("c.*"))
    assert out.size == pytest.approx(stored, rel=0.35)
    assert out.free > 0 and out.fits


def test_a_store_that_is_there(source: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avstore.crew.Pool", Here)
    before = files(made)
    out = estimate(source, made)
    assert (out.new, out.hours, out.size, out.wall) == (0, 0.0, None, None)
    assert estimate(source, made, retry_failed=True).new == 2
    with pytest.raises(ConflictError, match="fps is 8 here, 16 was asked"):
        estimate(source, made, fps=16)
    assert files(made) == before


def test_tasks_that_are_planned_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avstore.crew.Pool", Here)
    (tmp_path / "in").mkdir()
    for i in range(2):
        write_wav(tmp_path / "in" / f"{i}.wav", 6, seed=i)
    ingest(tmp_path / "in", tmp_path / "s.zarr", shard=(0, 2), **SOUND)
    out = estimate(tmp_path / "in", tmp_path / "s.zarr")
    assert (out.new, out.pending_tasks, out.sampled) == (0, 1, 1)
    assert out.hours * 3600 == 7 and out.size is not None and out.size > 7 * 16000


def test_sound_alone_and_a_list(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avstore.crew.Pool", Here)
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "a.wav", 12)
    (tmp_path / "list.csv").write_text("path,start,end\na.wav,0,4\na.wav,4,12\ngone.wav,0,1\n")
    before = files(tmp_path)
    out = estimate(tmp_path / "list.csv", root=tmp_path / "in", **SOUND)
    assert out.new == 2 and out.hours * 3600 == 12 and out.listed is not None and "1 missing" in out.listed
    assert out.note is not None and "audio store" in out.note and out.spec["picture"] is False
    assert files(tmp_path) == before


def test_of_very_many_files_some_are_probed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("avstore.crew.Pool", Here)
    monkeypatch.setattr(avstore.estimate, "MOST_PROBED", 5)
    (tmp_path / "in").mkdir()
    write_wav(tmp_path / "in" / "0.wav", 1)
    for i in range(1, 20):
        shutil.copyfile(tmp_path / "in" / "0.wav", tmp_path / "in" / f"{i}.wav")
    out = estimate(tmp_path / "in", tmp_path / "s.zarr", **SOUND)
    assert (out.new, out.probed) == (20, 5) and out.hours * 3600 == pytest.approx(20)


def test_what_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError):
        estimate(tmp_path / "nowhere")
    (tmp_path / "in").mkdir()
    with pytest.raises(UsageError, match="no media"):
        estimate(tmp_path / "in")
    with pytest.raises(UsageError):
        estimate(tmp_path / "in", workers=0)
    with pytest.raises(UsageError):
        estimate(tmp_path / "in", fpss=3)
