"""A store read back: clips against brute force on tiny stores, and against the media on really ingested ones."""

from __future__ import annotations

import math
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import avstore
from avstore.errors import AvstoreError, ConflictError, CorruptError, NotFoundError, UsageError
from avstore.frontends import FRONT_ENDS
from avstore.ingest import ingest
from tests.ingest_media import write_wav
from tests.small_stores import small_store, source
from tests.tiny_store import Tiny, default_spec, make_store, picture, read_picture, tone

MEL = "crisscross-mel80"
VIDEOS = [
    Tiny(5.3, key="train/dog/a.mp4", label="dog", split="train", repeat=2),
    Tiny(2.6, key="train/cat/b.mp4", label="cat", split="train", sound=None),
    Tiny(37, key="test/dog/long.mp4", label="dog", split="test", sound=20.5, sound_start=1.25),
    Tiny(3, key="test/cat/c.wav", label="cat", split="test", picture=False),
    Tiny(4, key="bad.mp4", status="failed"),
]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> avstore.Store:
    return avstore.open(make_store(tmp_path_factory.mktemp("tiny") / "t.zarr", VIDEOS))


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory, tiny_media: Path) -> avstore.Store:
    return avstore.open(small_store(tmp_path_factory, tiny_media, front_ends=("avid-linear257", MEL)))


times = st.fractions(min_value=0, max_value=40, max_denominator=1001)
rates = st.one_of(st.integers(1, 16), st.fractions(min_value=Fraction(1, 3), max_value=16, max_denominator=1001))


@settings(max_examples=150, deadline=None)
@given(video=st.integers(0, 2), offset=times, n=st.integers(0, 24), fps=rates)
def test_frames_of_a_clip_against_brute_force(
    tiny: avstore.Store, video: int, offset: Fraction, n: int, fps: int | Fraction
) -> None:
    have = int(VIDEOS[video].seconds * 16)
    offset %= Fraction(have, 16)
    clip = tiny.clip(video, offset, n, fps)
    rows = []
    for k in range(n):
        row = math.floor((offset + Fraction(k) / fps) * 16)
        if row >= have:
            break
        rows.append(row)
    valid = len(rows)
    rows = [rows[k % valid] for k in range(n)] if n else []
    assert clip.valid_frames == valid and (n == 0 or valid > 0)
    place = int(tiny.places[video]) * 16
    assert clip.rows.tolist() == [place + r for r in rows]
    if not n:
        assert clip.frames is None
        return
    assert clip.frames is not None and clip.source is not None and clip.frames.shape == (n, 64, 96, 3)
    repeat = VIDEOS[video].repeat
    for frame, row in zip(clip.frames, rows, strict=True):
        np.testing.assert_array_equal(frame, picture(video, row // repeat, 64, 96))
    assert clip.source.tolist() == [r // repeat for r in rows] and clip.box == (0, 2, 64, 92)


@settings(max_examples=150, deadline=None)
@given(video=st.integers(0, 3), offset=times, seconds=st.fractions(min_value=0, max_value=30, max_denominator=999))
def test_sound_against_brute_force(tiny: avstore.Store, video: int, offset: Fraction, seconds: Fraction) -> None:
    v = VIDEOS[video]
    total = int((v.seconds if v.sound is None or v.sound < 0 else v.sound) * 8000)
    offset %= Fraction(total, 8000)
    got, valid = tiny.waveform(video, offset, seconds)
    s = math.floor(offset * 8000) + np.arange(math.floor(seconds * 8000))
    sounds = (s >= v.sound_start * 8000) & (s < total) & (v.sound is not None)
    np.testing.assert_array_equal(got, np.where(sounds, tone(video, s), 0))
    assert got.dtype == np.int16 and valid == int((s < total).sum())


def test_the_sound_of_a_clip_follows_the_pictures_or_its_own_offset(tiny: avstore.Store) -> None:
    clip = tiny.clip(0, Fraction(1, 2), n=8, fps=4)
    np.testing.assert_array_equal(clip.waveform, tone(0, np.arange(4000, 20000)))
    clip = tiny.clip(0, Fraction(1, 2), n=8, fps=4, seconds=0.25, sound_offset=2)
    np.testing.assert_array_equal(clip.waveform, tone(0, np.arange(16000, 18000)))
    assert clip.has_sound and clip.valid_samples == 2000
    silent = tiny.clip(1, 0, n=4, fps=4)
    assert not silent.has_sound and not silent.waveform.any() and len(silent.waveform) == 8000


def test_native_shows_each_source_frame_once(tiny: avstore.Store) -> None:
    clip = tiny.clip(0, 1, n=10, fps="native")
    assert clip.source is not None and clip.source.tolist() == list(range(8, 18)) and clip.fps == "native"
    assert (np.diff(clip.rows) == 2).all()
    end = tiny.clip(0, 5, n=6, fps="native")  # 84 rows: from row 80 on two source frames are left
    assert end.valid_frames == 2 and end.source is not None and end.source.tolist() == [40, 41] * 3
    odd = tiny.clip(0, Fraction(1, 16), n=3, fps="native")  # begins in the midst of a source frame: it counts
    assert odd.source is not None and odd.source.tolist() == [0, 1, 2] and odd.rows.tolist() == [1, 2, 4]


def test_pictures_loop_from_the_first_frame_of_the_clip(tiny: avstore.Store) -> None:
    clip = tiny.clip(1, 2, n=20, fps=16)
    assert clip.frames is not None and clip.valid_frames == 9
    assert [read_picture(f)[1] for f in clip.frames] == [*range(32, 41), *range(32, 41), 32, 33]


def test_a_clip_over_three_shards(tiny: avstore.Store) -> None:
    clip = tiny.clip(2, 15, n=37, fps=1)
    assert clip.valid_frames == 22 and len(set((clip.rows // 256).tolist())) == 3
    clip = tiny.clip(2, 0, n=37, fps=1)
    assert clip.frames is not None and len(set((clip.rows // 256).tolist())) == 3
    assert [read_picture(f) for f in clip.frames] == [(2, 16 * k % 64) for k in range(37)]


def test_sound_without_pictures(tiny: avstore.Store) -> None:
    clip = tiny.clip(3, 1, n=16, fps=16)
    assert clip.frames is None and clip.box is None and clip.valid_frames == 0 and not clip.has_picture
    np.testing.assert_array_equal(clip.waveform, tone(3, np.arange(8000, 16000)))


def test_what_cannot_be_cut(tiny: avstore.Store) -> None:
    with pytest.raises(UsageError, match="a clip at 25 fps from a tape of 16 fps") as e:
        tiny.clip(0, 0, 16, 25)
    assert "--fps 25" in e.value.next
    with pytest.raises(UsageError, match="30000/1001") as e:
        tiny.clip(0, 0, 16, "30000/1001")
    assert "--fps 30" in e.value.next
    for wrong in (0, -1, "soon", float("nan"), float("inf"), True):
        with pytest.raises(UsageError):
            tiny.clip(0, 0, 16, wrong)
    for offset in (-0.1, 5.25, 1000, "x"):
        with pytest.raises(UsageError):
            tiny.clip(0, offset)
    for n in (-1, 1.5, True):
        with pytest.raises(UsageError, match="whole number"):
            tiny.clip(0, 0, n)  # type: ignore[arg-type]
    with pytest.raises(UsageError, match=r"video 4 \(bad.mp4\) has no clips") as e:
        tiny.clip(4)
    assert "unreadable" in e.value.why
    with pytest.raises(NotFoundError, match="no video 5"):
        tiny.clip(5)
    with pytest.raises(UsageError, match="named by its number"):
        tiny.clip("a.mp4")  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="did you mean"):
        tiny.clip(0, front_end="crisscross-mel8")
    with pytest.raises(NotFoundError, match="is not stored here"):
        tiny.stored_spectrogram(0, MEL)


def test_catalogue(tiny: avstore.Store) -> None:
    assert len(tiny) == 4 and [v.number for v in tiny] == [0, 1, 2, 3] and tiny.total == 5
    assert tiny.columns == ["label", "split"]
    assert tiny.column("label") == ["dog", "cat", "dog", "cat"] and tiny.column("split", [2]) == ["test"]
    assert tiny.column("seconds") == [5.25, 2.5625, 37.0, 3.0] and tiny.column("number") == [0, 1, 2, 3]
    assert tiny.column("status", [0, 4]) == ["ok", "failed"] and tiny.column("reason", [4]) == ["unreadable"]
    with pytest.raises(NotFoundError, match="no column 'lable'") as e:
        tiny.column("lable")
    assert "label" in e.value.why
    video = tiny[2]
    assert (video.key, video.status, video.has_sound, video.frames) == ("test/dog/long.mp4", "ok", True, 592)
    assert video.to_json()["label"] == "dog" and tiny[4].to_json()["status"] == "failed"
    assert tiny.lineage["videos"] == 4 and tiny.lineage["planned"] == 5


def test_find(tiny: avstore.Store, tmp_path: Path) -> None:
    keys = ["train/dog/a.mp4", "train/cat/b", "long.mp4", "c"]
    assert tiny.find(keys).tolist() == [0, 1, 2, 3]
    with pytest.raises(NotFoundError, match=r"no video 'd\.mp4'"):
        tiny.find(["a", "d.mp4"])
    keys = ["x/a.mp4#3/2-5", "x/a.mp4#5-7", "y/a.mp4", "x/b.mp4#0-1"]
    store = avstore.open(make_store(tmp_path / "s.zarr", [Tiny(1, key=k) for k in keys]))
    assert store.find([*keys, "x/a#3/2-5", "a.mp4#5-7", "y/a", "b"]).tolist() == [0, 1, 2, 3, 0, 1, 2, 3]
    for name in ("a", "a.mp4", "x/a.mp4"):
        with pytest.raises(NotFoundError, match="no video"):
            store.find([name])


def test_damage_names_video_and_second_or_is_unchecked(tmp_path: Path) -> None:
    path = make_store(tmp_path / "s.zarr", [Tiny(2)], default_spec(codec="jpeg"))
    file = path / "frames" / "c.0.0.0.0"
    data = bytearray(file.read_bytes())
    data[len(data) // 3] ^= 8
    file.write_bytes(data)
    with pytest.raises(CorruptError, match="frames at second 0 of the tape"):
        avstore.open(path).clip(0, 0, 32)
    file.unlink()
    with pytest.raises(NotFoundError, match=r"shard frames/c\.0\.0\.0\.0 is missing"):
        avstore.open(path, check=False).clip(0, 0, 32)


def test_what_is_no_store(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match="there is no store"):
        avstore.open(tmp_path / "none.zarr")
    with pytest.raises(NotFoundError, match="this is no avstore store"):
        avstore.open(tmp_path)
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(NotFoundError, match="no avstore store"):
        avstore.open(tmp_path)
    (tmp_path / "zarr.json").write_text('{"attributes": {"avstore": {"format": 2}}}')
    with pytest.raises(ConflictError, match="format 2"):
        avstore.open(tmp_path)


# Really ingested


def test_every_file_is_there_or_failed_with_a_reason(real: avstore.Store) -> None:
    assert len(real) == 9 and real.total == 11
    failed = {real.key(int(n)): real.facts["reason"][n] for n in real.current if not real.ok[n]}
    assert set(failed) == {"empty.mp4", "junk.mkv"} and all(failed.values())
    number = real.find(["empty.mp4"])[0]
    with pytest.raises(UsageError, match=r"empty\.mp4") as e:
        real.clip(int(number))
    assert "failed" in e.value.why and real[int(number)].status == "failed"
    assert real.column("split", real.find(["long.wav", "0000"])) == [None, "test"]


def test_pixels_and_sound_are_those_of_the_media(
    real: avstore.Store, tmp_path_factory: pytest.TempPathFactory, tiny_media: Path
) -> None:
    import av

    folder = source(tmp_path_factory, tiny_media)
    for video in [v for v in real if v.has_picture and v.has_sound][:3]:
        with av.open(str(folder / video.path)) as media:
            expected = np.stack([f.to_ndarray(format="rgb24") for f in media.decode(video=0)])
        clip = real.clip(video.number, 0, n=video.frames, fps=16)
        assert clip.frames is not None and clip.frames.shape == expected.shape == (32, 128, 160, 3)
        assert clip.source is not None and clip.source.tolist() == list(range(32)) and clip.box == (0, 0, 128, 160)
        error = np.abs(clip.frames[:, None].astype(np.int16) - expected).mean(axis=(2, 3, 4))  # each with each
        assert error.diagonal().max() < 3.5 and (error.diagonal() <= error.min(axis=1) + 0.3).all()
        assert len(clip.waveform) == 48000 and np.abs(clip.waveform.astype(int)).max() > 1000
    wav = real.find(["long.wav"])[0]
    assert real.seconds(int(wav)) == 20 and not real.has_picture[wav]


def test_frame_k_shows_the_newest_source_frame(real: avstore.Store) -> None:
    slow = int(real.find(["slow"])[0])
    clip = real.clip(slow, 0, n=48, fps=16)
    assert clip.source is not None and clip.source.tolist() == [k // 2 for k in range(48)] and not clip.has_sound
    assert clip.frames is not None
    red = clip.frames[..., 0].mean(axis=(1, 2))
    np.testing.assert_allclose(red, [16 + 8 * (k // 2) for k in range(48)], atol=5)
    native = real.clip(slow, 0, n=24, fps="native")
    assert native.source is not None and native.source.tolist() == list(range(24))


@pytest.mark.parametrize("front_end", ["avid-linear257", MEL])
def test_stored_rows_are_the_clips_own_but_at_the_edges(real: avstore.Store, front_end: str) -> None:
    recipe = FRONT_ENDS[front_end]
    long = int(real.find(["long.wav"])[0])
    clip = real.clip(long, 4, n=0, seconds=3, front_end=front_end)
    stored = real.stored_spectrogram(long, front_end, 4 * recipe.rows_per_second, 3 * recipe.rows_per_second)
    assert clip.spectrogram is not None and clip.spectrogram.shape == stored.shape == (300, recipe.bins)
    if recipe.clip_floor_db is not None:
        stored = np.maximum(stored, clip.spectrogram.min())  # what is stored has no floor: it is the clip's
    edge = recipe.edge_rows
    np.testing.assert_allclose(clip.spectrogram[edge:-edge], stored[edge:-edge], rtol=2e-3, atol=0.02)
    assert np.abs(clip.spectrogram[:edge] - stored[:edge]).max() > 0.1
    assert real.stored_spectrogram(long, front_end).shape == (2000, recipe.bins)
    assert np.isnan(real.stored_spectrogram(int(real.find(["slow"])[0]), front_end)).all()
    with pytest.raises(UsageError, match="rows 1999 to 2001"):
        real.stored_spectrogram(long, front_end, 1999, 2)


def test_notebooks(real: avstore.Store) -> None:
    shown = real._repr_html_()
    assert "128x160 at 16 fps" in shown and "<table>" in shown
    video = next(v for v in real if v.has_picture and v.has_sound)
    clip = real.clip(video.number)._repr_html_()
    assert "data:image/jpeg;base64," in clip and "data:audio/wav;base64," in clip
    assert "<script>" not in real[video.number]._repr_html_() and repr(real).startswith("<avstore.Store ")


def test_reload_sees_what_came_since_and_the_latest_number_rules(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    write_wav(folder / "a.wav", 2)
    (folder / "b.wav").write_bytes(b"RIFF" + bytes(100))
    options = {"sample_rate": 8000, "front_ends": ()}
    ingest(folder, tmp_path / "s.zarr", **options)
    store = avstore.open(tmp_path / "s.zarr")
    a, b = (int(store.find([k])[0]) for k in ("a.wav", "b.wav"))
    assert store.numbers.tolist() == [a] and not store.spec.picture
    before = store.waveform(a)[0]
    good = write_wav(folder / "b.wav", 3, seed=4)
    write_wav(folder / "c.wav", 1, seed=5)
    ingest(folder, tmp_path / "s.zarr", retry_failed=True, **options)
    assert store.total == 2
    store.reload()
    assert store.total == 4 and len(store) == 3
    new = int(store.find(["b.wav"])[0])
    assert new > b and store[b].status == "failed" and store[new].status == "ok"
    assert sorted(store.current.tolist()) == sorted({a, new, int(store.find(["c.wav"])[0])})
    np.testing.assert_array_equal(store.waveform(new)[0], good)
    np.testing.assert_array_equal(store.waveform(a)[0], before)


def test_a_store_can_be_moved(real: avstore.Store, tmp_path: Path) -> None:
    moved = avstore.open(Path(shutil.copytree(real.path, tmp_path / "elsewhere.zarr")))
    number = int(real.numbers[0])
    np.testing.assert_array_equal(moved.waveform(number)[0], real.waveform(number)[0])
    assert moved.lineage["fingerprint"] == real.lineage["fingerprint"]


def test_a_damaged_root_is_refused_by_name_or_read_as_before(tmp_path: Path) -> None:
    """A bit of each byte of the root's zarr.json flipped: an error of ours, or the very same pixels and sound."""
    path = make_store(tmp_path / "a.zarr", [Tiny(2.0)])
    root = path / "zarr.json"
    whole = root.read_bytes()
    with avstore.open(path) as store:
        number = int(store.numbers[0])
        before = store.clip(number, 0.5, n=4, fps=8)
    refused = 0
    for i in range(len(whole)):
        damaged = bytearray(whole)
        damaged[i] ^= 1 << (i % 7)
        root.write_bytes(damaged)
        try:
            with avstore.open(path) as store:
                clip = store.clip(number, 0.5, n=4, fps=8)
        except AvstoreError as e:
            assert e.what
            refused += 1
            continue
        assert (clip.frames == before.frames).all() and (clip.waveform == before.waveform).all(), i
    assert refused > len(whole) / 2
