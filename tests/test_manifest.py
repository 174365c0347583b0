"""Every real file against the manifest of the media: statuses, frames, seconds and sound agree, or the difference is
one of those that tests/data/manifest-differences.tsv explains. The rules for odd media, and truncations of good files.
"""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
from test_decode_pyav import SPEC, in_child, manifest

DIFFERENCES = Path(__file__).with_name("data") / "manifest-differences.tsv"
SETS = ("av-events", "broken-media", "drone-video", "esc10-ogg", "grid", "odd-media", "syllables-pl", "ucf")


def differences(row: dict[str, str], facts: dict[str, Any]) -> dict[str, tuple[str, str]]:
    """What differs: name -> (here, manifest). Lengths may differ by two rows of the tape and a bit, sound by 30 ms."""
    there = row["decode_status"].split(":")[0]
    if facts["status"] != "ok":
        return {"status": (facts["reason"], there)}
    seconds = facts["frames"] / SPEC.fps if facts["frames"] else facts["samples"] / SPEC.sample_rate
    heard = (facts["sound_end"] - facts["sound_start"] + facts["sound_dropped"]) / SPEC.sample_rate
    out = {}
    if facts["source_frames"] != int(row["frames_decoded"] or 0):
        out["frames"] = (str(facts["source_frames"]), row["frames_decoded"])
    if abs(seconds - float(row["duration"] or 0)) > 0.15:
        out["seconds"] = (f"{seconds:.3f}", row["duration"])
    if abs(heard - float(row["audio_seconds"] or 0)) > 0.03:
        out["sound"] = (f"{heard:.3f}", row["audio_seconds"])
    if facts["errors"] and there == "ok":
        out["bad packets"] = (str(facts["errors"]), "0")
    return out


def explained() -> dict[tuple[str, str], tuple[str, str]]:
    with open(DIFFERENCES, newline="") as f:
        rows = list(csv.DictReader(f, delimiter="\t"))
    assert all(r["why"] for r in rows)
    return {(r["path"], r["what"]): (r["here"], r["manifest"].replace("-", "") or "-") for r in rows}


def found(shared: Path, rows: list[dict[str, str]]) -> dict[tuple[str, str], tuple[str, str]]:
    got = in_child([shared / r["path"] for r in rows])
    return {
        (row["path"], what): (here, there.replace("-", "") or "-")
        for row in rows
        for what, (here, there) in differences(row, got[str(shared / row["path"])]).items()
    }


def test_the_small_files_agree_or_are_explained(shared: Path) -> None:
    rows = [r for r in manifest(shared, *SETS) if int(r["bytes"]) < 30_000]
    assert len(rows) > 40
    paths = {r["path"] for r in rows}
    assert found(shared, rows) == {k: v for k, v in explained().items() if k[0] in paths}


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_file_agrees_or_is_explained(shared: Path) -> None:
    """No false alarm among them: a file that the manifest decodes to something is `ok` here."""
    rows = list(manifest(shared, *SETS))
    assert len(rows) == 738
    assert found(shared, rows) == explained()
    decodes = {r["path"] for r in rows if int(r["frames_decoded"] or 0) or float(r["audio_seconds"] or 0)}
    assert not {path for path, what in explained() if what == "status"} & decodes


# Truncation

CUT = {  # a good file of each container that states its length, in the packets or the header
    "avi": "ucf",
    "mp4": "av-events",
    "mkv": "av-events",
    "webm": "odd-media",
    "flv": "odd-media",
    "wav": "odd-media",
    "flac": "odd-media",
    "3gp": "odd-media",
}


def test_real_files_cut_at_every_tenth_are_told(shared: Path, tmp_path: Path) -> None:
    """`truncated`, or without its index `unreadable` or `no_streams`, or ok with all but the last 0.5 s or 2 %; the
    files themselves are whole."""
    cuts: dict[Path, tuple[dict[str, str], int]] = {}
    for suffix, folder in CUT.items():
        good = [
            r
            for r in manifest(shared, folder)
            if r["path"].endswith(f".{suffix}") and r["decode_status"] == "ok" and float(r["duration"]) > 0.9
        ]
        row = min(good, key=lambda r: int(r["bytes"]))
        data = (shared / row["path"]).read_bytes()
        for tenth in range(1, 11):
            path = tmp_path / f"{tenth}.{suffix}"
            path.write_bytes(data[: len(data) * tenth // 10])
            cuts[path] = row, tenth
    told = 0
    for name, facts in in_child(list(cuts)).items():
        row, tenth = cuts[Path(name)]
        if tenth == 10:
            assert facts["status"] == "ok", (row["path"], facts)
        elif facts["status"] == "ok":
            rows = facts["frames"] / SPEC.fps if facts["frames"] else facts["samples"] / SPEC.sample_rate
            length = float(row["duration"])
            assert rows >= length - max(0.5, 0.02 * length) - 0.1, (row["path"], tenth, rows, length)
        else:
            assert facts["reason"] in ("truncated", "unreadable", "no_streams"), (row["path"], tenth, facts)
            told += 1
    assert told > 6 * len(CUT)


# Odd media: the rule, a file that needs it, and what follows from it by hand. Frames are those of 128x176 at 16 fps.

ODD: list[tuple[str, str, dict[str, Any]]] = [
    # 568x320 turned by 90: 320x568 in 128x176 is 72.1 wide at full height: cropped to the whole short side instead
    ("turned by 90", "odd-media/decord/video_90.mov", {"display": [320, 568], "box": [0, 24, 128, 128]}),
    ("turned by 270", "odd-media/decord/video_270.mov", {"display": [320, 568], "box": [0, 24, 128, 128]}),
    ("turned by 180", "odd-media/decord/video_180.mov", {"display": [568, 320], "box": [0, 0, 128, 176]}),
    ("turned and mirrored", "odd-media/androidx/mp4/sample_rotate_and_reflect.mp4", {"display": [720, 1080]}),
    # 800x640 with pixels of 64/45: 1137.8 wide; 4 s that begin at 10 s
    (
        "pixels that are not square, a start at 10 s",
        "odd-media/androidx/mp4/bbb_800x640_768kbps_30fps_avc_2b_firstpts_10_sec.mp4",
        {"display": [1137, 640], "frames": 64, "source_frames": 120},
    ),
    # 270 frames of 30 fps are 9 s; 10.005 s of sound: 1.005 s of it outlast the picture
    (
        "an edit list over picture and sound",
        "odd-media/androidx/mp4/edit_list_positive_shift.mp4",
        {"frames": 144, "samples": 216000, "sound_start": 0, "sound_dropped": 24128},
    ),
    ("an edit list over sound", "odd-media/androidx/mp4/long_edit_list_audioonly.mp4", {"samples": 37491}),
    (
        "a variable rate",
        "odd-media/androidx/mp4/sample_android_slow_motion.mp4",
        {"source_frames": 7, "source_fps": "30", "frames": 9},
    ),
    # 161 * 128 / 121 = 170.3
    (
        "odd sizes",
        "odd-media/androidx/vp9/bear-vp9-odd-dimensions.webm",
        {"display": [161, 121], "box": [0, 2, 128, 170], "source_frames": 30},
    ),
    ("10 bits", "odd-media/torchcodec/h264_10bits.mp4", {"source_frames": 30, "frames": 16}),
    ("10 bits, AV1", "odd-media/androidx/mp4/hdr10-av1.mp4", {"source_frames": 127, "display": [720, 1280]}),
    ("8K", "odd-media/androidx/mp4/8k24fps_300ms.mp4", {"source_frames": 8, "display": [7680, 4320]}),
    ("5.1", "odd-media/androidx/mp4/bbb_6ch_8kHz_opus.ogg", {"samples": 72000, "silent": False}),
    ("8 kHz", "odd-media/torchcodec/sine_mono_s32_8000.wav", {"samples": 96000, "sound_end": 96000}),
    ("two pictures", "av-events/torchcodec/nasa_13013.mp4", {"video_stream": 3, "source_frames": 390}),
    ("two sounds", "odd-media/androidx/mp4/sample_ac3_aac.mp4", {"audio_stream": 1, "samples": 7168}),
    ("an empty track", "odd-media/androidx/mp4/sample_empty_track.mp4", {"audio_stream": 2, "source_frames": 30}),
    (
        "cover art beside sound",
        "odd-media/androidx/flac/bear_with_picture.flac",
        {"video_stream": None, "frames": 0, "samples": 65784},
    ),
    # 0.743 s of 1.2 s, its end zeros
    (
        "sound that ends early",
        "odd-media/androidx/mp4/sample_shorter_audio.mp4",
        {"samples": 28800, "sound_end": 18390},
    ),
    ("silence is no absence", "odd-media/androidx/mp4/silent-black-10s.mp4", {"silent": True, "sound_end": 240000}),
    (
        "DTS-HD, which kills plain decoding",
        "odd-media/androidx/mkv/sample_with_dts_x.mkv",
        {"samples": 24064, "silent": True},
    ),
    ("frames that come out of order", "odd-media/decord/unordered.mov", {"source_frames": 4, "frames": 2}),
]


def test_odd_media_follow_the_rules(shared: Path) -> None:
    got = in_child([shared / path for _, path, _ in ODD])
    for rule, path, expected in ODD:
        facts = got[str(shared / path)]
        assert facts["status"] == "ok" and facts["errors"] == 0, (rule, facts)
        assert {name: facts[name] for name in expected} == expected, rule
