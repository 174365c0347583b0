"""The decoder: one clock for picture and sound in every container, what is shown when, damage, and the real media."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from fractions import Fraction
from math import ceil
from pathlib import Path

import av
import numpy as np
import pytest

from avstore.decode_pyav import DecodeFailed, Facts, decode, decoder_versions
from avstore.errors import UsageError
from avstore.probe import probe
from avstore.records import FIELDS, REASONS
from avstore.spec import Spec
from tests.media import Kept, make_clip, picture

SPEC = Spec()
RATE = SPEC.sample_rate


def run(path: Path, spec: Spec = SPEC, **how) -> tuple[Facts, Kept]:
    """Decodes into the slot that planning would give it, and checks what must always hold."""
    sink = Kept()
    if "slot_seconds" not in how:
        how["slot_seconds"] = ceil(probe(path, how.get("start"), how.get("end"), spec).seconds + Fraction(1, 4))
    facts = decode(path, spec, sink, **how)
    record = facts.to_record()
    assert list(record) == list(FIELDS) and json.loads(json.dumps(record)) == record
    assert len(sink.pictures) == facts.frames <= how["slot_seconds"] * spec.fps
    assert len(sink.waveform) == facts.samples <= how["slot_seconds"] * spec.sample_rate
    assert 0 <= facts.sound_start <= facts.sound_end <= facts.samples
    assert facts.silent == (not sink.waveform.any())
    assert sink.source == sorted(sink.source)
    assert not sink.waveform[: facts.sound_start].any() and not sink.waveform[facts.sound_end :].any()
    return facts, sink


def failure(path: Path, spec: Spec = SPEC, **how) -> DecodeFailed:
    with pytest.raises(DecodeFailed) as e:
        run(path, spec, **how)
    assert e.value.reason in REASONS and str(path.parent) not in e.value.message
    return e.value


def manifest(shared: Path, *sets: str) -> Iterator[dict[str, str]]:
    with open(shared / "MANIFEST.tsv", newline="") as f:
        for row in csv.DictReader(f, delimiter="\t"):
            if row["set"] in sets and row["decode_status"] != "not-media":
                yield row


# One clock


@pytest.mark.parametrize("rate", [8000, 16000, 44100, 48000])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".ts", ".mpg", ".flv"])
def test_flash_and_beep_coincide(tmp_path: Path, suffix: str, rate: int) -> None:
    if (suffix, rate) in {(".mpg", 8000), (".flv", 8000), (".flv", 16000), (".flv", 48000), (".mpg", 16000)}:
        rate = 44100
    how = {"vcodec": "libvpx-vp9"} if (suffix, rate) == (".webm", 48000) else {}
    if suffix == ".avi" and rate == 48000:
        how = {"vcodec": "mjpeg", "acodec": "pcm_s16le"}
    path = make_clip(tmp_path / f"a{suffix}", seconds=2, flash=0.64, beep=0.64, sample_rate=rate, **how)
    facts, kept = run(path, Spec(fps=25))
    assert abs(kept.flash(25) - kept.beep(RATE)) < 1 / 25
    # AVI cannot begin before 0: its writer moves everything by the priming of MP3, whole frames for the picture
    assert suffix == ".avi" or abs(kept.flash(25) - 0.64) < 1 / 25
    assert (
        (50 <= facts.frames <= 54 if suffix == ".avi" else facts.frames in (50, 51))
        and facts.errors == 0
        and not facts.silent
    )
    assert facts.source_fps == "25"


@pytest.mark.parametrize("start", [0.2, 7.0])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".ts"])
def test_a_late_start_moves_both(tmp_path: Path, suffix: str, start: float) -> None:
    path = make_clip(tmp_path / f"a{suffix}", seconds=2, flash=0.64, beep=0.64, start=start)
    facts, kept = run(path, Spec(fps=25))
    assert abs(kept.flash(25) - kept.beep(RATE)) < 1 / 25 and abs(kept.flash(25) - 0.64) < 1 / 25
    assert facts.frames in (50, 51)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_sound_that_starts_late_is_preceded_by_zeros(tmp_path: Path, suffix: str) -> None:
    path = make_clip(tmp_path / f"a{suffix}", seconds=2, flash=1.0, beep=0.5, sound_start=0.5)
    facts, kept = run(path, Spec(fps=25))
    assert abs(facts.sound_start / RATE - 0.5) < 0.05
    assert abs(kept.flash(25) - kept.beep(RATE)) < 1 / 25
    assert facts.samples == 2 * RATE and abs(facts.sound_dropped / RATE - 0.5) < 0.1  # what outlasts the picture


def test_sound_before_the_first_picture_is_dropped_and_counted(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=2, times=[1 + i / 25 for i in range(25)], flash=1.4, beep=1.4)
    facts, kept = run(path, Spec(fps=25))
    assert abs(kept.flash(25) - 0.4) < 1 / 25 and abs(kept.beep(RATE) - 0.4) < 1 / 25
    assert facts.sound_start == 0 and abs(facts.sound_dropped / RATE - 1) < 0.05


@pytest.mark.parametrize("suffix", [".m4a", ".mp3", ".ogg", ".wav", ".flac"])
def test_sound_only(tmp_path: Path, suffix: str) -> None:
    facts, kept = run(make_clip(tmp_path / f"a{suffix}", seconds=3, beep=1.0))
    assert facts.frames == 0 and facts.box is None and facts.video_stream is None and facts.audio_stream == 0
    assert abs(facts.samples / RATE - 3) < 0.06 and facts.sound_end == facts.samples
    assert abs(kept.beep(RATE) - 1.0) < 0.03


def test_samples_of_a_wav_are_exact(tmp_path: Path) -> None:
    """At the store's own rate nothing is resampled: the waveform is the file's."""
    path = make_clip(tmp_path / "a.wav", seconds=1.5, beep=0.3, sample_rate=RATE)
    facts, kept = run(path)
    with av.open(str(path)) as c:
        true = np.concatenate([np.frombuffer(f.planes[0], np.int16, f.samples) for f in c.decode(audio=0)])
    assert facts.samples == 36000 and (kept.waveform == true).all()


@pytest.mark.parametrize(
    ("channels", "loud", "mean"), [(2, (0.8, 0.0), 0.4), (2, (0.5, -0.5), 0.0), (6, (0.6, 0, 0, 0, 0, 0), 0.1)]
)
def test_mono_is_the_mean_of_the_channels(tmp_path: Path, channels: int, loud: tuple[float, ...], mean: float) -> None:
    path = make_clip(tmp_path / "a.wav", seconds=1, beep=0.4, sample_rate=48000, channels=channels, loud=loud)
    _, kept = run(path, Spec(sample_rate=48000))
    assert abs(np.abs(kept.waveform).max() / 32768 - mean) < 0.005


def test_no_sound_and_silence(tmp_path: Path) -> None:
    facts, kept = run(make_clip(tmp_path / "a.mp4", audio=False))
    assert facts.silent and facts.audio_stream is None and facts.sound_end == facts.sound_start == 0
    assert facts.samples == 2 * RATE == len(kept.waveform)
    facts, _ = run(make_clip(tmp_path / "b.avi", beep=None, acodec="pcm_s16le"))
    assert facts.silent and facts.audio_stream == 1 and facts.sound_end == facts.samples


def test_an_audio_store_hears_a_video(tmp_path: Path) -> None:
    facts, kept = run(make_clip(tmp_path / "a.mp4", seconds=2, beep=0.5), Spec(picture=False))
    assert facts.frames == 0 and abs(kept.beep(RATE) - 0.5) < 0.03


# What is shown when


def test_variable_frame_rate_by_hand(tmp_path: Path) -> None:
    times = [0.0, 0.1, 0.11, 0.5, 1.3]
    facts, kept = run(make_clip(tmp_path / "a.mkv", times=times, audio=False, flash=None), Spec(fps=10))
    # row k shows the newest frame with pts <= k / 10: frame 1 at row 1, frame 2 (0.11) from row 2 on
    assert kept.source[:13] == [0, 1, 2, 2, 2, 3, 3, 3, 3, 3, 3, 3, 3] and kept.source[13] == 4
    assert facts.source_frames == 5


@pytest.mark.parametrize(("source", "tape"), [(25, 16), (30, 16), (10, 16), (25, 25), (60, 16), (24, 30)])
def test_constant_rates_follow_the_rule(tmp_path: Path, source: int, tape: int) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=1.2, fps=source, audio=False, flash=None, size=(32, 48))
    facts, kept = run(path, Spec(fps=tape))
    n = round(1.2 * source)
    assert kept.source == [min(k * source // tape, n - 1) for k in range(ceil(Fraction(n, source) * tape))]
    assert facts.source_frames == n and facts.source_fps == str(source)


def test_turned_pictures_are_turned_back(tmp_path: Path) -> None:
    """The bright patch lies in the top left as coded: counter-clockwise by 90 it is at the bottom left, and so on."""
    spec = Spec(height=96, width=128)
    where = {(0, False): "tl", (90, False): "bl", (180, False): "br", (270, False): "tr", (0, True): "tr"}
    for (degrees, flip), corner in where.items():
        path = make_clip(
            tmp_path / f"{degrees}{flip}.mp4", seconds=0.4, audio=False, flash=None, rotation=degrees, hflip=flip
        )
        facts, kept = run(path, spec)
        turned = degrees % 180 == 90
        assert facts.display == ([96, 128] if turned else [128, 96])
        assert facts.box == ([0, 16, 96, 96] if turned else [0, 0, 96, 128])
        y, x, h, w = facts.box
        inside = kept.rows[0, y : y + h, x : x + w].mean(-1)
        top, left = inside[: h // 2], inside[:, : w // 2]
        if turned:  # the centre crop cuts the long side; what lies where along the short one is left to see
            assert (left.mean() > inside[:, w // 2 :].mean()) == (corner == "bl")
        else:
            assert (top.mean() > inside[h // 2 :].mean()) == (corner[0] == "t")
            assert (left.mean() > inside[:, w // 2 :].mean()) == (corner[1] == "l")


def test_pixel_aspect_is_applied(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=0.4, size=(96, 128), aspect=Fraction(3, 2), audio=False)
    facts, _ = run(path, Spec(height=96, width=256))
    assert facts.display == [192, 96] and facts.box == [0, 32, 96, 192]


@pytest.mark.parametrize(
    ("vcodec", "pix_fmt"),
    [
        ("libx264", "yuv444p"), ("libx264", "yuv420p10le"), ("ffv1", "gray"), ("ffv1", "yuv422p"), ("png", "rgb24"),
        ("png", "rgba"), ("ffv1", "bgra"), ("mjpeg", "yuvj420p"), ("ffv1", "gray16le"),
    ],
)  # fmt: skip
def test_pixel_formats_keep_their_colours(tmp_path: Path, vcodec: str, pix_fmt: str) -> None:
    suffix = ".mov" if vcodec == "png" else ".mkv"
    path = make_clip(tmp_path / f"a{suffix}", seconds=0.4, vcodec=vcodec, pix_fmt=pix_fmt, audio=False, flash=None)
    _, kept = run(path, Spec(height=96, width=128))
    assert np.abs(kept.rows[2].astype(int) - picture((96, 128), False)).mean() < 2.5


def test_colours_follow_one_matrix_rule(tmp_path: Path) -> None:
    """Saturated red, coded without naming a matrix: BT.601 below 720 lines, BT.709 from there on."""
    for lines, kr, kb in ((96, 0.299, 0.114), (720, 0.2126, 0.0722)):
        y = 16 + 219 * kr
        u, v = 128 + 224 * (-kr) / (2 * (1 - kb)), 128 + 224 * 0.5
        path = tmp_path / f"{lines}.mkv"
        with av.open(str(path), "w") as out:
            stream = out.add_stream("ffv1", rate=5)
            stream.width, stream.height, stream.pix_fmt = lines * 4 // 3, lines, "yuv444p"
            planes = np.stack([np.full((lines, lines * 4 // 3), round(c), np.uint8) for c in (y, u, v)])
            for i in range(3):
                frame = av.VideoFrame.from_ndarray(planes, "yuv444p")
                frame.pts = i
                for packet in stream.encode(frame):
                    out.mux(packet)
            for packet in stream.encode(None):
                out.mux(packet)
        _, kept = run(path)
        assert np.abs(kept.rows[0].reshape(-1, 3).mean(0) - [255, 0, 0]).max() < 3, (lines, kept.rows[0, 5, 50])


def test_a_picture_with_sound_is_held_as_long_as_the_sound(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        path = make_clip(tmp_path / name, seconds=5, times=[0.0], flash=None, beep=3.0)
        facts, kept = run(path, Spec(max_hold=2))
        assert abs(facts.frames - 80) <= 2 and set(kept.source) == {0} and abs(kept.beep(RATE) - 3) < 0.06


def test_cover_art_is_no_video(shared: Path) -> None:
    facts, _ = run(shared / "odd-media/androidx/flac/bear_with_picture.flac")
    assert facts.frames == 0 and facts.video_stream is None and facts.samples == round(2.741 * RATE)


# Segments


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".ts"])
def test_a_segment_is_a_window_of_the_whole(tmp_path: Path, suffix: str) -> None:
    path = make_clip(
        tmp_path / f"a{suffix}",
        seconds=12,
        flash=9.0,
        beep=9.0,
        size=(48, 64),
        gop=10,
        start=0 if suffix == ".avi" else 0.4,
    )
    spec = Spec(fps=25)
    _, whole = run(path, spec)
    for start, end in ((Fraction(8), Fraction(10)), (Fraction(17, 2), Fraction(12)), (Fraction(1), Fraction(3, 2))):
        facts, part = run(path, spec, start=start, end=end)
        n, k = ceil((end - start) * 25), int(start * 25)
        assert abs(facts.frames - n) <= (1 if end == 12 else 0)
        assert part.source == whole.source[k : k + facts.frames]
        assert (part.rows == whole.rows[k : k + facts.frames]).all()
        if start < 9 < end:
            assert abs(part.beep(RATE) + float(start) - whole.beep(RATE)) < 0.002
        assert facts.samples <= (end - start) * RATE


def test_a_segment_of_sound(tmp_path: Path) -> None:
    for name in ("a.m4a", "a.mp3", "a.wav"):
        path = make_clip(tmp_path / name, seconds=12, beep=9.0)
        facts, kept = run(path, start=Fraction(17, 2), end=Fraction(10))
        assert abs(kept.beep(RATE) - 0.5) < 0.03 and facts.samples == 1.5 * RATE


def test_segments_that_cannot_be(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=1)
    for how in ({"start": Fraction(2), "end": Fraction(1)}, {"start": Fraction(-1)}, {"slot_seconds": 0}):
        with pytest.raises(UsageError):
            decode(path, SPEC, Kept(), **{"slot_seconds": 5, **how})
    assert failure(path, start=Fraction(3), slot_seconds=2).reason == "unreadable"


# Damage and limits


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".flv", ".wav", ".flac", ".mp3"])
def test_a_file_cut_at_every_tenth_is_told(tmp_path: Path, suffix: str) -> None:
    options = {"movflags": "faststart"} if suffix == ".mp4" else None
    data = make_clip(
        tmp_path / f"a{suffix}", seconds=8, size=(48, 64), gop=10, options=options, noise=True
    ).read_bytes()
    for tenth in range(1, 10):
        path = tmp_path / f"cut{tenth}{suffix}"
        path.write_bytes(data[: len(data) * tenth // 10])
        try:
            facts, _ = run(path)
        except DecodeFailed as e:
            assert e.reason in ("truncated", "unreadable"), (tenth, e)
            if tenth > 1:
                assert e.reason == "truncated", (tenth, e)
        else:
            assert facts.samples >= 7.4 * RATE, tenth


def test_damage_inside_is_counted(tmp_path: Path) -> None:
    data = bytearray(
        make_clip(tmp_path / "a.avi", seconds=6, vcodec="mjpeg", acodec="pcm_s16le", size=(48, 64)).read_bytes()
    )
    at = [i for i in range(len(data) - 4) if data[i : i + 4] == b"00dc"]

    def wipe(chunks: list[int]) -> None:
        for i in chunks:
            size = int.from_bytes(data[i + 4 : i + 8], "little")
            data[i + 8 : i + 8 + size] = b"\xaa" * size

    wipe(at[40:45])
    (tmp_path / "b.avi").write_bytes(data)
    facts, _ = run(tmp_path / "b.avi")
    assert facts.status == "ok" and facts.errors == 5 and facts.source_frames == 145
    wipe(at[45:80])
    (tmp_path / "c.avi").write_bytes(data)
    e = failure(tmp_path / "c.avi")
    assert e.reason == "unreadable" and "rows show" in e.message


def test_longer_than_planned_says_how_long(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=5)
    e = failure(path, slot_seconds=3)
    assert e.reason == "longer_than_planned" and e.seconds is not None and abs(e.seconds - 5) < Fraction(1, 10)
    run(path, slot_seconds=ceil(e.seconds + Fraction(1, 4)))
    e = failure(make_clip(tmp_path / "a.wav", seconds=5), slot_seconds=3)
    assert e.reason == "longer_than_planned" and e.seconds == 5


def test_hostile_times_and_sizes(tmp_path: Path) -> None:
    held = make_clip(tmp_path / "a.mkv", times=[0.0, 0.1, 500.0], audio=False, flash=None)
    assert held.stat().st_size < 10_000
    assert failure(held, slot_seconds=600).reason == "bad_timestamps"
    assert failure(held, Spec(max_seconds=100), slot_seconds=600).reason in ("bad_timestamps", "too_large")
    facts, _ = run(held, Spec(max_hold=600), slot_seconds=600)
    assert facts.frames >= 500 * 16
    path = make_clip(tmp_path / "b.mp4", audio=False)
    assert failure(path, Spec(max_pixels=1000), slot_seconds=3).reason == "too_large"


def test_same_file_same_bytes(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", sample_rate=48000, channels=2)
    (f, a), (g, b) = run(path), run(path)
    assert f == g and (a.rows == b.rows).all() and (a.waveform == b.waveform).all()


def test_versions_name_what_shapes_bytes() -> None:
    assert {"av", "libavcodec", "libswscale", "libswresample"} <= set(decoder_versions())
    assert all(v[0].isdigit() for v in decoder_versions().values())


# The real media, each file in a child, as ingest does it

CHILD = """
import json, sys
from fractions import Fraction
from math import ceil
from avstore.decode_pyav import DecodeFailed, decode
from avstore.probe import probe
from avstore.spec import Spec
class Sink:
    rows = samples = 0
    def frame(self, picture, source, repeat): self.rows += repeat
    def sound(self, samples): self.samples += len(samples)
spec = Spec()
for path in sys.stdin.read().splitlines():
    sink = Sink()
    try:
        facts = decode(path, spec, sink, slot_seconds=ceil(probe(path, spec=spec).seconds + Fraction(1, 4))).to_record()
        assert (sink.rows, sink.samples) == (facts["frames"], facts["samples"])
    except DecodeFailed as e:
        facts = {"status": "failed", "reason": e.reason, "message": e.message}
    print(json.dumps([path, facts]), flush=True)
"""

# Where the decoder rightly differs from the manifest's plain decode of every frame of the first stream.
OTHER_FRAMES = {
    "av-events/torchcodec/nasa_13013.mp4": 390,  # FFmpeg's best stream is the second picture, 29.97 fps
    "odd-media/androidx/flac/bear_with_picture.flac": 0,  # cover art
}


def in_child(paths: list[Path]) -> dict[str, dict]:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", CHILD],
        input="\n".join(map(str, paths)),
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return dict(json.loads(line) for line in done.stdout.splitlines())


def check_good(shared: Path, rows: list[dict[str, str]]) -> None:
    got = in_child([shared / r["path"] for r in rows])
    for row in rows:
        facts, path = got[str(shared / row["path"])], row["path"]
        assert facts["status"] == "ok", (path, facts)
        if row["decode_status"].startswith("CRASH"):
            continue  # the plain decode died; ours did not
        assert facts["source_frames"] == OTHER_FRAMES.get(path, int(row["frames_decoded"])), path
        if facts["frames"] and path not in OTHER_FRAMES and float(row["fps"]) < 500:  # two headers say 1000 fps
            seconds = int(row["frames_decoded"]) / float(row["fps"])
            assert abs(facts["frames"] / SPEC.fps - seconds) < 0.15 or row["vfr"] == "yes", path
        heard = (facts["sound_end"] - facts["sound_start"] + facts["sound_dropped"]) / RATE
        if path.endswith(("sample_eac3.mp4", "sample_ac3.ts")):
            continue  # placed by their timestamps: gaps in the first, packets that repeat a time in the second
        assert abs(heard - float(row["audio_seconds"])) < 0.03, (path, heard, row["audio_seconds"])


def test_good_media_agree_with_the_manifest(shared: Path) -> None:
    """A part of each set; all of them: tests/test_manifest.py."""
    rows = list(manifest(shared, "odd-media", "ucf", "av-events", "grid", "esc10-ogg", "drone-video"))
    seen: dict[str, int] = {}
    few = []
    for row in rows:
        seen[row["set"]] = seen.get(row["set"], 0) + 1
        small = int(row["bytes"]) < 700_000 and float(row["duration"] or 0) < 20
        if small and (row["set"] in ("odd-media", "ucf") or seen[row["set"]] % 20 == 1):
            few.append(row)
    assert len(few) > 90
    check_good(shared, few)


def test_broken_media_are_accounted_for(shared: Path) -> None:
    rows = list(manifest(shared, "broken-media"))
    got = in_child([shared / r["path"] for r in rows])
    assert len(got) == len(rows) == 58
    for row in rows:
        facts, path = got[str(shared / row["path"])], row["path"]
        assert facts["status"] == "ok" or facts["reason"] in REASONS
        decoded = int(row["frames_decoded"] or 0) or float(row["audio_seconds"] or 0)
        if row["decode_status"] == "ok":
            assert (facts["status"] == "ok") == bool(decoded), (path, facts)
        elif not decoded and not path.endswith("ogg_badtags.ogg"):  # whose tags alone stopped the plain decode
            assert facts["status"] == "failed", path
