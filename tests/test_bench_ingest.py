"""`bench ingest` on a small set: both sides encode the same pictures, shares add up, nothing is left behind."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest

from avstore import codecs
from avstore.errors import UsageError
from benchmarks import ingest, ingest_case
from benchmarks.ingest_worker import ENCODE, RESIZE, STAGES, START, Watch
from tests.media import make_clip


def test_a_stage_inside_another_counts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 3.0, 6.0, 10.0])
    monkeypatch.setattr("benchmarks.ingest_worker.time.thread_time", lambda: next(now))
    watch = Watch()
    with watch.stage(RESIZE):  # from 1
        watch.timed(ENCODE, lambda: None)()  # 3 to 6
    assert watch.seconds[RESIZE] == 2.0 + 4.0 and watch.seconds[ENCODE] == 3.0  # ends at 10
    assert watch.calls[RESIZE] == watch.calls[ENCODE] == 1 and sum(watch.seconds.values()) == 9.0


def test_the_bare_loop_encodes_what_the_clock_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """25 fps over 2 s on a clock of 10 fps: 20 pictures, which are the newest of each row."""
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as file:
        stream = file.add_stream("mpeg4", rate=25)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        stream.bit_rate = 4_000_000
        for k in range(50):
            picture = np.full((64, 96, 3), 5 * k, np.uint8)
            file.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        file.mux(stream.encode())
    shown: list[float] = []
    real = codecs.encode_jpeg
    monkeypatch.setattr(codecs, "encode_jpeg", lambda p, q: shown.append(float(p.mean())) or real(p, q))
    watch = Watch()
    given = {"height": 32, "width": 48, "fps": 10, "quality": 90}
    assert ingest_case.bare_file(str(path), given, watch) > 20 * 100
    assert watch.calls[ENCODE] == watch.calls[RESIZE] == 20
    expected = [5 * (k * 25 // 10) for k in range(20)]  # the newest frame with time <= k / 10
    assert np.abs(np.array(shown) - expected).max() < 4


def test_wrong_counts_are_told(tmp_path: Path) -> None:
    for given in ({"rounds": 0}, {"copies": 0}, {"workers": 0}):
        with pytest.raises(UsageError, match="nothing to measure"):
            ingest.run(tmp_path, tmp_path / "work", **given)
    with pytest.raises(UsageError, match="profile"):
        ingest.run(tmp_path, tmp_path / "work", profile="113")


def test_ingest_beside_the_bare_loop(tmp_path: Path) -> None:
    source, work = tmp_path / "media", tmp_path / "work"
    source.mkdir()
    for name in ("a", "b"):
        make_clip(source / f"{name}.mp4", fps=16, noise=True)
    stages: list[str] = []
    beside, split = ingest.run(
        source, work, rounds=1, workers=1, copies=2, front_ends=(),
        progress=lambda stage, done, total: stages.append(stage),
    )  # fmt: skip
    bare, full = beside.rows
    assert bare["what"] == "bare loop" and bare["ratio"] == 1.0 and bare["pictures"] == full["pictures"] > 0
    assert full["what"] == "avstore ingest" and full["ratio"] > 0 and full["CPU ratio"] > 0
    assert bare["JPEG MB"] == pytest.approx(full["store MB"], rel=0.6)
    assert "4 videos with pictures" in beside.notes[0] and stages == ["split", "round 1 of 1", "round 1 of 1"]
    assert [r["stage"] for r in split.rows][: len(STAGES)] == list(STAGES)
    assert sum(r["share"] for r in split.rows) == pytest.approx(1.0, abs=0.02)
    rows = {r["stage"]: r for r in split.rows}
    assert all(rows[name]["CPU s"] > 0 for name in (START, ENCODE, RESIZE, "decode pictures", "decode sound"))
    assert not (work / "ingest.zarr").exists() and (work / "media-2" / "001" / "a.mp4").stat().st_nlink == 3
    json.dumps([t.to_json() for t in (beside, split)])
