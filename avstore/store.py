"""A store, opened for reading: the catalogue of its videos, and clips cut from the tape.

A store may be read while an ingest appends to it: what is committed never moves. `Store.reload` sees what has come
since.
"""

from __future__ import annotations

import html
import os
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from avstore.catalogue import Catalogue, read_attributes
from avstore.clip import Clip, Video
from avstore.codecs import decode_source
from avstore.cut import cut_frames, cut_rows
from avstore.durable import read_json
from avstore.errors import ConflictError, NotFoundError, UsageError, did_you_mean
from avstore.frontends import FRONT_ENDS
from avstore.shard import LocalReader
from avstore.spec import ArraySpec, arrays, spectrogram_array


def open(path: str | os.PathLike[str], *, check: bool = True) -> Store:
    """Opens a store. `check`: verify the checksum of each frame that is read (costs 0-2 %).

    NotFoundError where there is none, ConflictError for a store of another format version, CorruptError for damage.
    """
    return Store(Path(path), check=check)


class Store(Catalogue):
    """See `avstore.open`. `len` and iteration run over the ok videos; `store[number]` gives any video by its number."""

    def __init__(self, path: Path, *, check: bool = True) -> None:
        super().__init__(path)
        self.check = check
        self.arrays: dict[str, ArraySpec] = arrays(self.spec)
        self.reader = LocalReader(self.path)
        self._source = lru_cache(maxsize=16)(self._read_source)
        self._recipe = lru_cache(maxsize=16)(self._read_recipe)

    def clip(
        self,
        video: int,
        offset: float | Fraction | str = 0,
        n: int = 16,
        fps: int | float | Fraction | str = 16,
        *,
        seconds: float | Fraction | None = None,
        sound_offset: float | Fraction | None = None,
        front_end: str | None = None,
    ) -> Clip:
        """Cuts a clip: `n` frames from `offset` seconds at `fps` (a number, a fraction, or "native": consecutive
        distinct source frames), and `seconds` of sound (default n / fps) from `sound_offset` (default `offset`).

        Frame k is tape row floor((offset + k / fps) * tape_fps) of the video, in exact arithmetic. Beyond the end the
        pictures loop from the first frame of the clip and the sound is zero. `front_end`: also its spectrogram,
        computed from the waveform window. UsageError for an fps above the tape's, a window outside the video, or a
        video that is not ok.
        """
        video = self._number(video)
        if not self.ok[video]:
            raise UsageError(
                f"video {video} ({self.keys[video]}) has no clips",
                f"it is {self.facts['status'][video]}: {self.facts['reason'][video]}",
                "avstore ls STORE --failed lists such videos",
            )
        if isinstance(n, bool) or not isinstance(n, int | np.integer) or n < 0:
            raise UsageError(f"n = {n!r}: the number of frames is a whole number from 0")
        t = as_fraction("offset", offset)
        length = self.seconds(video)
        if not 0 <= t < length:
            raise UsageError(
                f"offset {float(t):g} s is outside video {video}",
                f"it lasts {float(length):.3f} s ({self.keys[video]})",
            )
        place, tape = int(self.places[video]), self.spec.fps
        native = fps == "native"
        rate = Fraction(tape) if native else as_fraction("fps", fps)
        if not native and not 0 < rate <= tape:
            raise UsageError(
                f"a clip at {rate} fps from a tape of {tape} fps",
                "a clip's fps cannot exceed the tape's" if rate > 0 else "fps must be positive",
                f"ingest into another store with --fps {-(-rate // 1)}" if rate > 0 else "",
            )
        have = int(self.frames[video])
        frames = source = box = None
        rows, valid_frames = np.zeros(0, np.int64), 0
        if have and n and self.spec.picture:
            if native:
                local = self._native_rows(video, int(t * tape), n)
            else:
                local = np.array([int((t + k / rate) * tape) for k in range(n)], np.int64)
                local = local[local < have]
            valid_frames = len(local)
            local = np.resize(local, n)  # loops from the clip's first frame
            rows = place * tape + local
            frames = np.empty((n, self.spec.height, self.spec.width, 3), np.uint8)
            cut_frames(
                self.reader, self.arrays["frames"], self.spec.shard_seconds * tape, rows, frames, check=self.check
            )
            source = self._rows_of_source(rows)
            y, x, h, w = self.boxes[video].tolist()
            box = (y, x, h, w)
        waveform, valid_samples = self.waveform(
            video, t if sound_offset is None else sound_offset, Fraction(n) / rate if seconds is None else seconds
        )
        spectrogram = None
        if front_end is not None:
            if front_end not in FRONT_ENDS:
                raise UsageError(f"no front-end {front_end!r}", did_you_mean(front_end, FRONT_ENDS))
            from avstore.frontends import spectrogram as compute

            spectrogram = compute(waveform[None], front_end, self.spec.sample_rate)[0].numpy()
        return Clip(
            video,
            t,
            "native" if native else rate,
            frames,
            waveform,
            spectrogram,
            rows,
            source,
            box,
            valid_frames,
            valid_samples,
            bool(self.has_picture[video]),
            bool(self.has_sound[video]),
            self.spec.sample_rate,
        )

    def waveform(
        self, video: int, offset: float | Fraction = 0, seconds: float | Fraction | None = None
    ) -> tuple[np.ndarray, int]:
        """int16 (samples,) of a window of a video, zeros beyond its end, and how many samples lie inside the video."""
        video = self._number(video)
        sample_rate = self.spec.sample_rate
        start = int(as_fraction("offset", offset) * sample_rate)
        n = int(self.samples[video]) - start if seconds is None else int(as_fraction("seconds", seconds) * sample_rate)
        if start < 0 or n < 0:
            raise UsageError(
                f"a window of {n} samples from sample {start} of video {video}", f"it has {int(self.samples[video])}"
            )
        out = np.zeros(n, np.int16)
        inside = max(0, min(n, int(self.samples[video]) - start))
        if inside and self.has_sound[video]:
            array = self.arrays["waveform"]
            cut_rows(
                self.reader, array, self.spec.shard_seconds, int(self.places[video]) * sample_rate + start, out[:inside]
            )
        return out, inside

    def stored_spectrogram(self, video: int, front_end: str, first: int = 0, n: int | None = None) -> np.ndarray:
        """float32 (n, bins): stored rows of a video (default: all), NaN where there is no sound. NotFoundError when the
        front-end is not stored, or not for this video yet; ConflictError when it was derived by another recipe. Row k
        is centred at k / rows_per_second seconds."""
        if front_end not in self.front_ends:
            raise NotFoundError(
                f"front-end {front_end!r} is not stored here",
                did_you_mean(front_end, self.front_ends),
                f"store.clip(..., front_end={front_end!r}) computes it; avstore derive stores it",
            )
        video = self._number(video)
        array = spectrogram_array(front_end)
        rows = int(self.samples[video]) * array.rate // self.spec.sample_rate
        n = rows - first if n is None else n
        if first < 0 or n < 0 or first + n > rows:
            raise UsageError(f"rows {first} to {first + n} of video {video}", f"it has {rows}")
        out = np.full((n, *array.row), np.nan, np.float16)
        if not self.has_sound[video] or not n:
            return out.astype(np.float32)  # a shard in which nothing sounds has no file
        self._require_recipe(front_end)
        row = int(self.places[video]) * array.rate + first
        try:
            cut_rows(self.reader, array, self.spec.shard_seconds, row, out)
        except NotFoundError as e:
            raise NotFoundError(
                f"front-end {front_end!r} is not stored for video {video} ({self.keys[video]})",
                e.what,
                f"avstore derive STORE --front-end {front_end} stores what is missing"
                if front_end not in self.spec.front_ends
                else e.next,
            ) from e
        return out.astype(np.float32)

    def _read_recipe(self, front_end: str) -> str | None:
        attributes = read_json(self.path / "spectrograms" / front_end / "zarr.json").get("attributes") or {}
        return attributes.get("recipe")

    def _require_recipe(self, front_end: str) -> None:
        """A derived array carries its recipe's hash; those of the ingest are checked with the spec."""
        if front_end in self.spec.front_ends:
            return
        found, ours = self._recipe(front_end), FRONT_ENDS[front_end].hash
        if found != ours:
            raise ConflictError(
                f"spectrograms/{front_end} of this store was computed by another recipe",
                f"the store has {found}, this avstore {ours}",
                "use the avstore version that wrote it, or remove that folder and derive it again",
            )

    def _native_rows(self, video: int, first: int, n: int) -> np.ndarray:
        """The first `n` rows from `first` on (of the video) that each show another source frame than the row before."""
        start = int(self.places[video]) * self.spec.fps
        shown = self._rows_of_source(np.arange(start + first, start + int(self.frames[video])))
        changes = np.flatnonzero(np.diff(shown, prepend=shown[:1] - 1))
        return (first + changes[:n]).astype(np.int64)

    def _read_source(self, shard: int) -> np.ndarray:
        rows = self.spec.shard_seconds * self.spec.fps
        key = self.arrays["source"].key(shard)
        try:
            data = (self.path / key).read_bytes()
        except FileNotFoundError as e:
            raise NotFoundError(
                f"{key} is missing", f"it should be in {self.path}", "avstore verify STORE --repair makes it again"
            ) from e
        return decode_source(data, rows, key)

    def _rows_of_source(self, rows: np.ndarray) -> np.ndarray:
        """int32: ordinal in the file of the source frame that each absolute tape row shows, -1: none."""
        per = self.spec.shard_seconds * self.spec.fps
        out = np.empty(len(rows), np.int32)
        for shard in np.unique(rows // per).tolist():
            mask = rows // per == shard
            out[mask] = self._source(shard)[rows[mask] - shard * per]
        return out

    def close(self) -> None:
        """Closes the shards that are open."""
        self.reader.close()

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<avstore.Store {self.path}: {len(self)} videos, {self.spec.clock}>"

    def _repr_html_(self) -> str:
        failed = int((~self.ok[self.current]).sum()) if self.total else 0
        hours = sum(float(self.seconds(int(n))) for n in self.numbers) / 3600
        rows = {
            "videos": len(self),
            "failed or pending": failed,
            "hours": f"{hours:.2f}",
            "clock": self.spec.clock,
            "columns": ", ".join(self.columns),
            "front-ends": ", ".join(self.front_ends),
        }
        return (
            f"<h4>{html.escape(str(self.path))}</h4><table>"
            + "".join(f"<tr><th>{k}</th><td>{html.escape(str(v))}</td></tr>" for k, v in rows.items())
            + "</table>"
        )


def as_fraction(name: str, value: Any) -> Fraction:
    """The exact value of a number or a text like `30000/1001`; UsageError otherwise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return Fraction(str(value)) if isinstance(value, str) else Fraction(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
        raise UsageError(f"{name} = {value!r} is no number", "a number, or a fraction such as 30000/1001") from e


__all__ = ["Clip", "Store", "Video", "open", "read_attributes"]
