"""The summary of one video: what is chosen, that the file holds just these moments with their sound, its pictures."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from tiny_run import config, store_in

from avstore.errors import ConflictError, UsageError
from benchmarks import dr_dsn
from benchmarks.excerpt import stills, write_excerpt
from benchmarks.strips import LETTERS, clock, curves, moments, sheet, write_text
from benchmarks.video_summary import centred, choose, with_seed
from cli.main import invoke

FAST = with_seed(0, 3)
F = Fraction


def scenes(*lengths: int) -> np.ndarray:
    """A unit vector for each second, another for each scene, with a little noise."""
    rng = np.random.default_rng(0)
    return np.eye(len(lengths))[np.repeat(np.arange(len(lengths)), lengths)] + 0.01 * rng.normal(
        size=(sum(lengths), len(lengths))
    )


@pytest.fixture(scope="module")
def film(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """4 s, 10 pictures a second: the grey of picture k is 40 + 5 k; the sound is loud from 2 to 3 s, else silent."""
    path = tmp_path_factory.mktemp("film") / "film.mp4"
    with av.open(str(path), "w") as file:
        v = file.add_stream("libx264", rate=10, options={"crf": "10"})
        v.width, v.height, v.pix_fmt = 64, 48, "yuv420p"
        a = file.add_stream("aac", rate=16000, layout="mono")
        for k in range(40):
            picture = np.full((48, 64, 3), 40 + 5 * k, np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.pts, frame.time_base = k, F(1, 10)
            file.mux(v.encode(frame))
        t = np.arange(64000) / 16000
        wave = np.where((t >= 2) & (t < 3), 0.5 * np.sin(2 * np.pi * 440 * t), 0).astype(np.float32)
        for i in range(0, 64000, 1024):
            block = av.AudioFrame.from_ndarray(wave[None, i : i + 1024], format="fltp", layout="mono")
            block.sample_rate, block.pts, block.time_base = 16000, i, F(1, 16000)
            file.mux(a.encode(block))
        for stream in (v, a):
            file.mux(stream.encode())
    return path


def held(path: Path) -> tuple[list[tuple[float, int]], np.ndarray]:
    """(time, grey) of each picture, and the sound."""
    with av.open(str(path)) as c:
        pictures = [(float(f.time), round(f.to_ndarray(format="rgb24").mean())) for f in c.decode(video=0)]
    with av.open(str(path)) as c:
        sound = np.concatenate([f.to_ndarray()[0] for f in c.decode(audio=0)])
    return pictures, sound


def test_the_file_holds_these_moments_with_their_sound(film: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.mp4"
    # picture 4 is shown when the first stretch begins at 0.45 s
    done = write_excerpt(film, [(F(9, 20), F(1)), (F(2), F(3))], out)
    assert (done.seconds, done.frames, done.samples) == (F(31, 20), 16, 24800)
    pictures, sound = held(out)
    greys = [4, 5, 6, 7, 8, 9, *range(20, 30)]
    times = [0, 0.05, 0.15, 0.25, 0.35, 0.45, *(0.55 + k / 10 for k in range(10))]
    np.testing.assert_allclose([t for t, _ in pictures], times, atol=1e-3)
    np.testing.assert_allclose([g for _, g in pictures], [40 + 5 * k for k in greys], atol=3)
    assert abs(len(sound) - 24800) <= 2048  # whole blocks of AAC
    loud = np.sqrt((sound[:24800].reshape(-1, 400) ** 2).mean(1))
    assert loud[:20].max() < 0.02 and loud[24:60].min() > 0.25  # silent for 0.55 s, then the tone
    with pytest.raises(ConflictError, match="already"):
        write_excerpt(film, [(F(0), F(1))], out)
    for wrong in ([], [(F(1), F(1))], [(F(1), F(2)), (F(0), F(1))], [(F(-1), F(1))]):
        with pytest.raises(UsageError, match="intervals"):
            write_excerpt(film, wrong, out, True)
    (tmp_path / "no.mp4").write_bytes(b"no media")
    with pytest.raises(UsageError, match="cannot be decoded"):
        write_excerpt(tmp_path / "no.mp4", [(F(0), F(1))], out, True)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["no.mp4", "out.mp4"]


def test_on_the_command_line(
    film: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, one of them as the control would have it: films, curves, strips; nothing is replaced unasked."""
    from trainers.loop import train

    store = store_in(tmp_path)
    for name in ("one", "two"):
        train("avid", store, config("steps=1", f"seed={len(name)}"), tmp_path / "runs" / name)
    runs = [str(tmp_path / "runs" / n) for n in ("one", "two")]
    base = ["summarize", str(film), "--store", str(store.path), "-o", str(tmp_path / "s.mp4"), "--epochs", "2"]
    assert invoke([*base, "--run", runs[0], "--run", runs[1], "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    names = ["s.one.mp4", "s.two.mp4", "s.scores.png", "s.sheet.jpg"]
    assert [Path(p).name for p in said["files"]] == names and all((tmp_path / n).stat().st_size for n in names)
    for name, summary in zip(names[:2], said["summaries"], strict=True):
        pictures, sound = held(tmp_path / name)
        assert 0 < summary["kept"] <= 0.15 * 4 and "this video alone" in summary["scores_by"]
        greys = {40 + 5 * k for a, b in summary["intervals"] for k in range(int(a * 10), int(np.ceil(b * 10)))}
        assert all(min(abs(g - w) for w in greys) <= 3 for _, g in pictures)  # of the chosen moments and no others
        assert len(sound) >= summary["kept"] * 16000
    assert invoke([*base, "--run", runs[0], "--run", runs[1]]) == 5
    assert invoke([*base, "--run", runs[0], "--scores", "uniform", "--json"]) == 5  # the pictures are there already
    assert invoke([*base, "--run", runs[0], "--scores", "uniform", "--force"]) == 0
    assert "the run is not asked" in capsys.readouterr().err
    assert invoke([*base, "--run", runs[0], "--scores", "best"]) == 2
    assert invoke([*base, "--run", runs[0], "--tower", "vidoe", "--force"]) == 4
    assert "did you mean video" in capsys.readouterr().err
    assert invoke(["summarize", str(tmp_path / "none.mp4"), "--run", runs[0], "-o", str(tmp_path / "x.mp4")]) == 4
    store.path.rename(tmp_path / "moved")  # the run's own store is not where it was
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert invoke(["summarize", str(film), "--run", runs[0], "-o", "x.mp4"]) == 4
    told = capsys.readouterr().err
    assert f"own is not at {store.path}" in told and "next: --store STORE" in told


def test_stills_are_what_is_shown_then(film: Path) -> None:
    got = stills(film, [2.05, 0.0, 9.0], tall=24)
    assert [p.shape for p in got] == [(24, 32, 3)] * 3
    np.testing.assert_allclose([p.mean() for p in got], [140, 40, 235], atol=3)


@pytest.mark.parametrize("by", ["dr-dsn", "uniform"])
def test_what_is_chosen_fits_and_lies_in_the_video(by: str) -> None:
    for lengths, seconds in (((10, 8, 12, 10), F(79, 2)), ((3, 4), F(7)), ((40,), F(40))):
        got = choose("mine", scenes(*lengths), seconds, 8, by=by, config=FAST)
        assert 0 < got.kept <= F(15, 100) * seconds
        edges = [t for pair in got.intervals for t in pair]
        assert edges == sorted(set(edges)) and edges[0] >= 0 and edges[-1] <= seconds
        np.testing.assert_allclose(got.segments[1:, 0], got.segments[:-1, 1])  # no gaps
        assert got.segments[0, 0] == 0 and got.segments[-1, 1] == int(seconds * 8) / 8
        length = (got.segments[:, 1] - got.segments[:, 0])[got.chosen].sum()
        assert float(got.kept) == pytest.approx(length)
        assert by in got.told.lower()


def test_segments_end_where_scenes_do() -> None:
    got = choose("mine", scenes(4, 3, 5), F(12), 8, config=FAST)
    assert {4.0, 7.0} <= set(got.segments[:, 0].tolist())
    assert (got.segments[:, 1] - got.segments[:, 0]).max() <= 0.15 * 12 / 2
    again = choose("mine", scenes(4, 3, 5), F(12), 8, config=FAST)
    assert (got.scores == again.scores).all()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_scores_choose_and_not_the_lengths_of_segments(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """By their means the one-second scenes would be chosen, three of them for the price of the best scene; scores that
    differ by little choose as those that differ by much."""
    x = scenes(6, 1, 6, 3, 6, 1, 6, 1)
    scores = np.full(30, 0.45)
    scores[13:16] += 0.5 * scale
    scores[[6, 22, 29]] += 0.1 * scale
    monkeypatch.setattr(dr_dsn, "train", lambda *a: (None, [{"reward": 0.0}]))
    monkeypatch.setattr(dr_dsn, "scores", lambda *a: scores)
    got = choose("mine", x, F(30), 8)
    assert (F(13), F(16)) in got.intervals and F(4) <= got.kept <= F(9, 2)
    scores = np.full(30, 0.45)  # nothing to choose by: full, all the same
    assert F(4) <= choose("mine", x, F(30), 8).kept <= F(9, 2)


def test_small_differences_are_brought_to_one_scale() -> None:
    x = centred(1.0 + 1e-3 * scenes(4, 4))
    assert np.abs(x.mean(0)).max() < 1e-12 and (x**2).sum(1).mean() == pytest.approx(1)
    assert (centred(np.ones((5, 3))) == 0).all()


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(UsageError, match="no scores"):
        choose("mine", scenes(4), F(4), 8, by="dsn")
    with pytest.raises(UsageError, match="share"):
        choose("mine", scenes(4), F(4), 8, share=0)
    with pytest.raises(UsageError, match="rows of features"):
        choose("mine", scenes(4), F(6), 8)
    with pytest.raises(UsageError, match="0 of"):
        choose("mine", scenes(1), F(1, 2), 8)


def test_pictures_show_what_is_chosen() -> None:
    two = [
        choose(n, scenes(10, 10, 20), F(40), 8, by=b, config=FAST) for n, b in (("one", "dr-dsn"), ("two", "uniform"))
    ]
    drawn = curves(two)
    assert drawn.shape[1:] == (1280, 3)
    shade = drawn[44 + 147, 24:-24]  # of the first plot, below its curve: paler where nothing is chosen
    kept = (shade != 246).any(1)
    assert kept.mean() == pytest.approx(float(two[0].kept / two[0].seconds), abs=0.02)
    times = [moments(s) for s in two]
    for s, each in zip(two, times, strict=True):
        assert each == sorted(each) and all(any(a <= t < b for a, b in s.intervals) for t in each)
    stills_ = [[np.full((60, 100, 3), 7, np.uint8) for _ in each] for each in times]
    page = sheet(two, times, stills_)
    assert (page == 7).all(2).sum() == 6000 * sum(map(len, times))
    with pytest.raises(UsageError, match="stills"):
        sheet(two, times, stills_[:1])


def test_letters() -> None:
    assert len(set(LETTERS.values())) >= 47 and all(len(r) == 5 for r in LETTERS.values())
    canvas = np.zeros((5, 7, 3), np.uint8)
    assert write_text(canvas, "1L", 0, 0, (1, 1, 1), 1) == 8
    np.testing.assert_array_equal(canvas[:, :3, 0], [[0, 1, 0], [1, 1, 0], [0, 1, 0], [0, 1, 0], [1, 1, 1]])
    assert [clock(t) for t in (7.46, 65, 3723)] == ["0:07.5", "1:05.0", "1:02:03.0"]
