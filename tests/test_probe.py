"""Probe: lengths by hand, what is stated and what is counted, hostile and broken files, the real media."""

from __future__ import annotations

import pickle
import struct
from fractions import Fraction
from math import ceil
from pathlib import Path

import pytest

from avstore.errors import MachineError
from avstore.probe import DecodeFailed, check_readable, probe
from avstore.records import REASONS
from avstore.spec import Spec
from tests.media import make_clip


def reason(path: Path, **how) -> str:
    with pytest.raises(DecodeFailed) as e:
        probe(path, **how)
    assert e.value.reason in REASONS
    assert str(path.parent) not in e.value.message and path.name not in e.value.message  # records hold no outside path
    return e.value.reason


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".webm", ".avi", ".flv", ".ts", ".mpg"])
def test_length_is_that_of_the_picture(tmp_path: Path, suffix: str) -> None:
    p = probe(make_clip(tmp_path / f"a{suffix}", seconds=2))
    assert abs(p.seconds - 2) <= Fraction(1, 10), float(p.seconds)
    assert p.has_picture and p.has_sound and not p.single_picture
    assert (p.width, p.height, p.sample_rate) == (128, 96, 48000 if suffix == ".webm" else 44100)
    assert p.size == (tmp_path / f"a{suffix}").stat().st_size
    assert p.stated == (suffix not in (".ts", ".mpg"))


@pytest.mark.parametrize("suffix", [".m4a", ".mp3", ".ogg", ".wav", ".flac"])
def test_sound_only(tmp_path: Path, suffix: str) -> None:
    p = probe(make_clip(tmp_path / f"a{suffix}", seconds=3))
    assert abs(p.seconds - 3) <= Fraction(1, 10), float(p.seconds)
    assert not p.has_picture and p.has_sound and p.width is None


def test_sound_that_outlasts_the_picture_does_not_count(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mkv", seconds=2, sound_start=3, beep=None)
    assert 2 <= probe(path).seconds < Fraction(9, 4)


def test_a_single_picture_takes_the_length_of_the_sound(tmp_path: Path) -> None:
    for name in ("a.mp4", "a.mkv"):
        p = probe(make_clip(tmp_path / name, seconds=4, times=[0.0], flash=None))
        assert p.single_picture and abs(p.seconds - 4) < Fraction(1, 10)
    p = probe(make_clip(tmp_path / "b.mp4", seconds=4, times=[0.0], flash=None, audio=False))
    assert p.single_picture and p.seconds < 1


def test_segments(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=4)
    assert probe(path, Fraction(1), Fraction(5, 2)).seconds == Fraction(3, 2)
    assert probe(path, Fraction(1), Fraction(99)).seconds == 3
    assert probe(path, None, Fraction(1, 3)).seconds == Fraction(1, 3)
    assert reason(path, start=Fraction(4)) == "unreadable"


def test_limits(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=4)
    assert reason(path, spec=Spec(max_seconds=3)) == "too_large"
    assert probe(path, end=Fraction(2), spec=Spec(max_seconds=3)).seconds == 2
    assert reason(path, spec=Spec(max_pixels=128 * 96 - 1)) == "too_large"


def test_an_audio_store_takes_the_sound_of_a_video(tmp_path: Path) -> None:
    path = make_clip(tmp_path / "a.mp4", seconds=2)
    p = probe(path, spec=Spec(picture=False))
    assert not p.has_picture and abs(p.seconds - 2) < Fraction(1, 10)
    assert reason(make_clip(tmp_path / "b.mp4", audio=False), spec=Spec(picture=False)) == "no_streams"


def test_a_bit_rate_guess_is_not_a_statement(tmp_path: Path) -> None:
    """Loud at first, then silence: FFmpeg's guess from the bit rate of a VBR file without a Xing header is far off."""
    path = make_clip(tmp_path / "a.mp3", seconds=5, options={"write_xing": "0", "id3v2_version": "0"})
    data = path.read_bytes()
    (tmp_path / "b.mp3").write_bytes(b"\0" * 40_000 + data)  # 2.5 s more, if bytes were time
    p = probe(tmp_path / "b.mp3")
    assert not p.stated and abs(p.seconds - 5) < Fraction(1, 10), float(p.seconds)


def test_files_that_are_none(tmp_path: Path) -> None:
    for name, data in (("empty.mp4", b""), ("text.mp4", b"version https://git-lfs\n"), ("zero.wav", b"\0" * 5000)):
        (tmp_path / name).write_bytes(data)
        assert reason(tmp_path / name) == "unreadable"
    assert reason(tmp_path / "absent.mp4") == "unreadable"
    (tmp_path / "folder.mp4").mkdir()
    assert reason(tmp_path / "folder.mp4") == "unreadable"
    header = b"RIFF" + struct.pack("<I", 36) + b"WAVEfmt " + struct.pack("<IHHIIHH", 16, 1, 1, 8000, 16000, 2, 16)
    (tmp_path / "header.wav").write_bytes(header + b"data" + struct.pack("<I", 0))
    assert reason(tmp_path / "header.wav") == "unreadable"
    (tmp_path / "subs.srt").write_text("1\n00:00:00,000 --> 00:00:01,000\nhello\n")
    assert reason(tmp_path / "subs.srt") == "no_streams"


def test_a_failing_disk_is_no_fault_of_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import builtins

    def broken(*_args, **_kwargs):
        raise OSError(5, "Input/output error")

    path = make_clip(tmp_path / "a.mp4")
    monkeypatch.setattr(builtins, "open", broken)
    with pytest.raises(MachineError, match="cannot read"):
        check_readable(path)


def test_failures_travel_between_processes() -> None:
    e = pickle.loads(pickle.dumps(DecodeFailed("longer_than_planned", "longer than 3 s", Fraction(7, 2))))
    assert (e.reason, e.message, e.seconds) == ("longer_than_planned", "longer than 3 s", Fraction(7, 2))
    with pytest.raises(ValueError, match="unknown reason"):
        DecodeFailed("bored", "")


def test_real_media_are_probed_as_the_manifest_says(shared: Path) -> None:
    """Slots reserve enough: ceil(seconds + 1/4) covers what a full decode gave, and never by more than 2 s too many."""
    from tests.test_decode_pyav import manifest

    checked = 0
    for row in manifest(shared, "odd-media", "av-events", "ucf", "syllables-pl"):
        if row["decode_status"] != "ok":
            continue
        p = probe(shared / row["path"])
        picture = int(row["frames_decoded"] or 0) > 1
        true = float(row["duration"]) if not picture or not float(row["audio_seconds"] or 0) else float(p.seconds)
        slot = ceil(p.seconds + Fraction(1, 4))
        # 54 E-AC-3 packets state 1.728 s and decode to 0.288: one block of six each
        assert true - 0.05 <= slot and (slot <= true + 2 or row["path"].endswith("sample_eac3.mp4")), row["path"]
        assert p.has_sound == bool(float(row["audio_seconds"] or 0)), row["path"]
        assert p.has_picture == picture or row["path"].endswith("bear_with_picture.flac"), row["path"]
        checked += 1
    assert checked > 110
