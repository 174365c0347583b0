"""Small stores written directly, without decoding media: every pixel and sample says where it belongs.

Frame `row` of video `number` is `picture(number, row)`, a smooth ramp under four flat blocks whose values spell number
and row, so that JPEG keeps them apart; sample s of a video is `tone(number, s)`. Raw stores give both back exactly.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avstore.codecs import encode_jpeg, encode_rows, encode_source, with_crc
from avstore.durable import canonical_json, write_atomic
from avstore.frontends import FRONT_ENDS
from avstore.records import Plan, Record, Task, plan_path, record_path
from avstore.shard import ShardWriter
from avstore.spec import FORMAT, Spec, arrays


@dataclass(frozen=True)
class Tiny:
    """A video of a tiny store. sound: seconds, or None: silent. repeat: tape rows that each source frame is shown."""

    seconds: float
    key: str = ""
    sound: float | None = -1.0  # -1: as long as the pictures
    sound_start: float = 0.0
    picture: bool = True
    repeat: int = 1
    status: str = "ok"
    label: str | None = None
    split: str | None = None


def picture(number: int, row: int, height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): what tape row `row` (of its video) of video `number` shows."""
    y, x = np.mgrid[0:height, 0:width]
    out = np.stack([(y + x) * 255 // (height + width), y * 255 // height, x * 255 // width], -1).astype(np.uint8)
    half_h, half_w = height // 4, width // 4
    for i, value in enumerate((number % 8, number // 8 % 8, row % 8, row // 8 % 8)):
        top, left = (i // 2) * half_h * 2 + half_h // 2, (i % 2) * half_w * 2 + half_w // 2
        out[top : top + half_h, left : left + half_w] = 16 + 32 * value
    return out


def read_picture(frame: np.ndarray) -> tuple[int, int]:
    """(number % 64, row % 64) that a frame shows, at any scale."""
    height, width = frame.shape[:2]
    half_h, half_w = height // 4, width // 4
    digits = []
    for i in range(4):
        top, left = (i // 2) * half_h * 2 + half_h // 2, (i % 2) * half_w * 2 + half_w // 2
        centre = frame[top + half_h // 4 : top + half_h * 3 // 4, left + half_w // 4 : left + half_w * 3 // 4]
        digits.append(int(np.clip(np.rint((centre.mean() - 16) / 32), 0, 7)))
    return digits[0] + 8 * digits[1], digits[2] + 8 * digits[3]


def tone(number: int, samples: np.ndarray) -> np.ndarray:
    """int16: the samples of a video's sound; never 0."""
    return ((samples * 7 + number * 1009) % 32000 + 1).astype(np.int16)


def default_spec(**changes: Any) -> Spec:
    """64x96 raw frames at 16 fps, 8000 Hz, shards of 16 s, no spectrograms."""
    given = {"height": 64, "width": 96, "fps": 16, "sample_rate": 8000, "codec": "raw", "front_ends": (),
             "shard_seconds": 16}  # fmt: skip
    return Spec(**{**given, **changes})


def make_store(path: Path, videos: list[Tiny], spec: Spec | None = None) -> Path:
    """Writes a store of one plan; slots lie one after another, a video never across two shards unless it is longer
    than one. Returns its path."""
    spec = spec or default_spec()
    path.mkdir(parents=True)
    for folder in ("plans", "commits", "spectrograms", "embeddings"):
        (path / folder).mkdir()
    places, slots, at = [], [], 0
    for v in videos:
        seconds = int(np.ceil(v.seconds + 0.25))
        left = spec.shard_seconds - at % spec.shard_seconds
        if seconds > left != spec.shard_seconds:
            at += left
        places.append(at)
        slots.append(seconds)
        at += seconds
    shards = -(-at // spec.shard_seconds)
    task = Task(0, 0, shards, 0, len(videos))
    keys = [v.key or f"train/{i:04d}.mp4" for i, v in enumerate(videos)]
    columns: dict[str, list[str | None]] = {}
    for name in ("label", "split"):
        if any(getattr(v, name) is not None for v in videos):
            columns[name] = [getattr(v, name) for v in videos]
    plan = Plan(
        1, spec.fingerprint, 0, 0, shards, [task], keys, keys, [None] * len(videos), [None] * len(videos), places,
        slots, [1] * len(videos), [None] * len(videos), columns,
    )  # fmt: skip
    frames = [int(v.seconds * spec.fps) if v.picture and spec.picture else 0 for v in videos]
    sounds = []  # start, end, length of the waveform on the video's clock
    for v in videos:
        length = v.seconds if v.sound is None or v.sound < 0 else v.sound
        end = int(length * spec.sample_rate)
        start = int(v.sound_start * spec.sample_rate)
        sounds.append((0, 0, int(v.seconds * spec.sample_rate)) if v.sound is None else (start, end, end))
    facts = [
        {
            "status": v.status, "reason": None if v.status == "ok" else "unreadable", "frames": frames[i],
            "samples": sounds[i][2], "sound_start": sounds[i][0], "sound_end": sounds[i][1], "silent": v.sound is None,
            "box": [0, 2, spec.height, spec.width - 4] if frames[i] else None, "source_fps": str(spec.fps // v.repeat),
        }
        for i, v in enumerate(videos)
    ]  # fmt: skip
    for array in arrays(spec).values():
        folder = path / array.path
        folder.mkdir(parents=True, exist_ok=True)
        metadata = array.metadata(spec.shard_seconds, shards * spec.shard_seconds)
        write_atomic(folder / "zarr.json", canonical_json(metadata))
        for shard in range(shards):
            _write_shard(path, array, spec, shard, videos, places, frames, sounds)
    empty = canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
    for group in ("spectrograms", "embeddings"):
        write_atomic(path / group / "zarr.json", empty)
    attributes = {"avstore": {"format": FORMAT, "spec": spec.to_json(), "fingerprint": spec.fingerprint}}
    write_atomic(path / "zarr.json", canonical_json({"zarr_format": 3, "node_type": "group", "attributes": attributes}))
    write_atomic(plan_path(path, 1), plan.to_bytes())
    record = Record.of(task, spec.fingerprint, {"avstore": "test"}, facts)
    write_atomic(record_path(path, 0), record.to_bytes())
    return path


def _write_shard(path, array, spec, shard, videos, places, frames, sounds):
    first, last = shard * spec.shard_seconds, (shard + 1) * spec.shard_seconds
    here = [i for i, v in enumerate(videos) if v.status == "ok" and places[i] < last and places[i] + 64 > first]
    if array.path == "source":
        rows = np.full(spec.shard_seconds * spec.fps, -1, np.int32)
        for i in here:
            for row in range(frames[i]):
                at = places[i] * spec.fps + row - first * spec.fps
                if 0 <= at < len(rows):
                    rows[at] = row // videos[i].repeat
        write_atomic(path / array.key(shard), encode_source(rows))
        return
    writer = ShardWriter(path / array.key(shard), spec.shard_seconds * array.rate // array.inner_rows)
    for i in here:
        if array.path == "frames":
            for row in range(frames[i]):
                chunk = places[i] * spec.fps + row - first * spec.fps
                if 0 <= chunk < spec.shard_seconds * spec.fps:
                    image = picture(i, row // videos[i].repeat, spec.height, spec.width)
                    raw = spec.codec == "raw"
                    writer.append(chunk, with_crc(image.tobytes() if raw else encode_jpeg(image, spec.quality)))
            continue
        start, end, length = sounds[i]
        if end <= start:
            continue
        for second in range(-(-length // spec.sample_rate)):
            chunk = places[i] + second - first
            if not 0 <= chunk < spec.shard_seconds:
                continue
            if array.path == "waveform":
                s = np.arange(second * spec.sample_rate, (second + 1) * spec.sample_rate)
                writer.append(chunk, encode_rows(np.where((s >= start) & (s < end), tone(i, s), 0).astype(np.int16)))
            else:  # spectrogram row r holds its number / 64 in every bin, NaN after the end
                rows = np.arange(second * array.rate, (second + 1) * array.rate)
                values = np.where(rows < length * array.rate // spec.sample_rate, rows / 64, np.nan)
                writer.append(chunk, encode_rows(np.repeat(values[:, None], array.row[0], 1).astype(np.float16)))
    writer.close()


__all__ = ["FRONT_ENDS", "Tiny", "default_spec", "make_store", "picture", "read_picture", "tone"]
