"""A store, opened for reading: its videos with their columns, and clips cut from the tape.

Opening parses the plans and the records and keeps numpy columns; nothing is cached on disk. A store may be read
while an ingest appends to it: what is committed never moves. `Store.reload` sees what has come since.
"""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from avstore.clip import Clip, Video
from avstore.codecs import decode_source
from avstore.cut import cut_frames, cut_rows
from avstore.durable import read_json
from avstore.errors import AvstoreError, ConflictError, CorruptError, NotFoundError, UsageError, did_you_mean
from avstore.frontends import FRONT_ENDS
from avstore.records import FIELDS, Plan, Record, read_plans, record_path
from avstore.selection import Selection, close_column, select
from avstore.shard import LocalReader
from avstore.spec import FORMAT, ArraySpec, Spec, arrays, spectrogram_array

INTRINSIC = (
    "number",
    "key",
    "path",
    "status",
    "reason",
    "message",
    "start",
    "end",
    "place",
    "slot_seconds",
    "seconds",
    "has_sound",
    "has_picture",
)


def open(path: str | os.PathLike[str], *, check: bool = True) -> Store:
    """Opens a store. `check`: verify the checksum of each frame that is read (costs 0-2 %).

    NotFoundError where there is none, ConflictError for a store of another format version, CorruptError for damage.
    """
    return Store(Path(path), check=check)


class Store:
    """See `avstore.open`. `len` and iteration run over the ok videos; `store[number]` gives any video by its number."""

    def __init__(self, path: Path, *, check: bool = True) -> None:
        self.path, self.check = Path(path), check
        attributes = read_attributes(self.path)
        self.spec = Spec.from_json(attributes["spec"])
        self.fingerprint: str = attributes["fingerprint"]
        self.arrays: dict[str, ArraySpec] = arrays(self.spec)
        self.reader = LocalReader(self.path)
        self._source = lru_cache(maxsize=16)(self._read_source)
        self.reload()

    # -- what is there ------------------------------------------------------------------------------------------

    def reload(self) -> None:
        """Reads the plans and records anew."""
        self.plans: list[Plan] = read_plans(self.path)
        n = sum(len(p) for p in self.plans)
        self.total = n  # all numbers ever planned
        self.tape_seconds = sum(p.shards for p in self.plans) * self.spec.shard_seconds
        self.keys: list[str] = [k for p in self.plans for k in p.key]
        self.paths: list[str] = [k for p in self.plans for k in p.path]
        self.places = np.array([x for p in self.plans for x in p.place], np.int64)
        self.slots = np.array([x for p in self.plans for x in p.seconds], np.int64)
        self.columns: list[str] = sorted({c for p in self.plans for c in p.columns})
        self.facts: dict[str, list[Any]] = {k: [v] * n for k, v in FIELDS.items()}
        self.facts["status"] = ["pending"] * n
        self.versions: dict[str, set[str]] = {}
        self.pending_tasks = 0
        committed = {e.name for e in os.scandir(self.path / "commits")} if (self.path / "commits").is_dir() else set()
        for plan in self.plans:
            for task in plan.tasks:
                file = record_path(self.path, task.number)
                if file.name not in committed:
                    self.pending_tasks += 1
                    continue
                record = Record.read(file)
                if (
                    record.task != task.number
                    or record.fingerprint != self.fingerprint
                    or len(record.fields["status"]) != task.count
                ):
                    raise CorruptError(
                        f"{file} does not belong to task {task.number} of this store",
                        "it was copied or changed",
                        "avstore verify STORE --repair",
                    )
                for name, values in record.fields.items():
                    self.facts[name][task.first : task.first + task.count] = values
                for k, v in record.versions.items():
                    self.versions.setdefault(k, set()).add(v)
        status = np.array(self.facts["status"], dtype=object)
        latest: dict[str, int] = {}
        for number, key in enumerate(self.keys):
            if status[number] != "pending" or key not in latest:
                latest[key] = number
        self.current = np.array(sorted(latest.values()), np.int64)
        self.frames = np.array(self.facts["frames"], np.int64)
        self.samples = np.array(self.facts["samples"], np.int64)
        self.sound = np.array([self.facts["sound_start"], self.facts["sound_end"]], np.int64).reshape(2, n).T
        self.has_picture = self.frames > 0
        self.has_sound = self.sound[:, 1] > self.sound[:, 0]
        self.boxes = np.array(
            [b or (0, 0, self.spec.height, self.spec.width) for b in self.facts["box"]], np.int64
        ).reshape(n, 4)
        self.ok = (status == "ok").astype(bool)
        self.numbers = self.current[self.ok[self.current]] if n else np.zeros(0, np.int64)

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Video]:
        return (self[int(n)] for n in self.numbers)

    def __getitem__(self, number: int) -> Video:
        number = self._number(number)
        plan = self._plan(number)
        i = number - plan.first_video
        facts = {k: v[number] for k, v in self.facts.items()}
        return Video(
            number=number,
            key=self.keys[number],
            path=self.paths[number],
            status=facts["status"],
            reason=facts["reason"],
            message=facts["message"],
            start=plan.start[i],
            end=plan.end[i],
            place=int(self.places[number]),
            slot_seconds=int(self.slots[number]),
            seconds=float(self.seconds(number)),
            frames=int(self.frames[number]),
            samples=int(self.samples[number]),
            has_picture=bool(self.has_picture[number]),
            has_sound=bool(self.has_sound[number]),
            columns={c: v[i] for c, v in plan.columns.items()},
            facts=facts,
            clock=self.spec.clock,
        )

    def _number(self, number: int) -> int:
        if isinstance(number, bool) or not isinstance(number, int | np.integer):
            raise UsageError(
                f"a video is named by its number, got {number!r}", "", "store.find([key]) gives numbers of keys"
            )
        if not 0 <= number < self.total:
            raise NotFoundError(
                f"there is no video {number}",
                f"this store has numbers 0 to {self.total - 1}",
                "avstore ls STORE lists them",
            )
        return int(number)

    def _plan(self, number: int) -> Plan:
        for plan in reversed(self.plans):
            if number >= plan.first_video:
                return plan
        raise NotFoundError(f"there is no video {number}")

    def key(self, number: int) -> str:
        """The key of a video: its path relative to the ingested folder, and its segment."""
        return self.keys[number]

    def seconds(self, number: int) -> Fraction:
        """True length of a video on its clock."""
        by_frames = Fraction(int(self.frames[number]), self.spec.fps)
        return by_frames if self.has_picture[number] else Fraction(int(self.samples[number]), self.spec.sample_rate)

    def find(self, keys: Iterable[str]) -> np.ndarray:
        """Numbers, int64, of the current videos with these keys; a key without suffix, or its last part, serves where
        it is unique. NotFoundError names the first that is not there."""
        exact = {self.keys[int(n)]: int(n) for n in self.current}
        short: dict[str, set[int]] = {}
        for key, number in exact.items():
            stem = key.rsplit(".", 1)[0] if "." in key.rsplit("/", 1)[-1] else key
            for name in {stem, key.rsplit("/", 1)[-1], stem.rsplit("/", 1)[-1]}:
                short.setdefault(name, set()).add(number)
        out = []
        for key in keys:
            key = str(key)
            if key in exact:
                out.append(exact[key])
            elif len(short.get(key, ())) == 1:
                out.append(next(iter(short[key])))
            else:
                why = (
                    "several videos end in this name"
                    if key in short
                    else did_you_mean(key, exact if len(exact) < 20000 else ())
                )
                raise NotFoundError(f"no video {key!r} in {self.path}", why, "avstore ls STORE lists the keys")
        return np.array(out, np.int64)

    def column(self, name: str, numbers: np.ndarray | Sequence[int] | None = None) -> list[Any]:
        """Values of a column (from folder names or lists, any field of the records, number, key, ...) for `numbers`
        (default: the ok videos); None where a plan lacks it. NotFoundError for an unknown name."""
        numbers = self.numbers if numbers is None else numbers
        if name in self.columns:
            out = []
            for n in numbers:
                plan = self._plan(int(n))
                out.append(plan.columns[name][int(n) - plan.first_video] if name in plan.columns else None)
            return out
        if name == "seconds":
            return [float(self.seconds(int(n))) for n in numbers]
        if name in self.facts:
            return [self.facts[name][int(n)] for n in numbers]
        if name in INTRINSIC:
            return [getattr(self[int(n)], name) for n in numbers]
        raise close_column(name, [*self.columns, *FIELDS, *INTRINSIC])

    def select(self, **how: Any) -> Selection:
        """A selection of ok videos, see `avstore.selection.select`."""
        return select(self, **how)

    @property
    def front_ends(self) -> list[str]:
        """Front-ends whose spectrograms are stored."""
        return (
            sorted(p.parent.name for p in (self.path / "spectrograms").glob("[!.]*/zarr.json"))
            if (self.path / "spectrograms").is_dir()
            else []
        )

    @property
    def lineage(self) -> dict[str, Any]:
        """Where the bytes come from: spec, fingerprint, versions of all that shaped them, counts."""
        return {
            "path": str(self.path),
            "format": FORMAT,
            "spec": self.spec.to_json(),
            "fingerprint": self.fingerprint,
            "versions": {k: sorted(v) for k, v in self.versions.items()},
            "videos": len(self),
            "planned": self.total,
        }

    # -- clips --------------------------------------------------------------------------------------------------

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
        front-end is not stored. Row k is centred at k / rows_per_second seconds."""
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
        out = np.empty((n, *array.row), np.float16)
        cut_rows(self.reader, array, self.spec.shard_seconds, int(self.places[video]) * array.rate + first, out)
        return out.astype(np.float32)

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


def read_attributes(path: Path) -> dict[str, Any]:
    """The `avstore` attributes of a store's root group; NotFoundError, ConflictError for another format version."""
    file = Path(path) / "zarr.json"
    if not file.is_file():
        what = "there is no store" if not Path(path).exists() else "this is no avstore store"
        raise NotFoundError(f"{what}: {path}", f"{file} is missing", "avstore ingest FOLDER STORE makes one")
    group = read_json(file)
    try:
        attributes = group["attributes"]["avstore"]
        version = attributes["format"]
    except (KeyError, TypeError) as e:
        raise NotFoundError(
            f"{path} is Zarr, but no avstore store",
            "its attributes lack `avstore`",
            "avstore ingest FOLDER STORE makes one",
        ) from e
    if version != FORMAT:
        raise ConflictError(
            f"{path} has format {version}",
            f"this avstore reads format {FORMAT}",
            "install the avstore version that wrote it",
        )
    return attributes


def as_fraction(name: str, value: Any) -> Fraction:
    """The exact value of a number or a text like `30000/1001`; UsageError otherwise."""
    try:
        if isinstance(value, bool):
            raise TypeError
        return Fraction(str(value)) if isinstance(value, str) else Fraction(value)
    except (TypeError, ValueError, ZeroDivisionError, OverflowError) as e:
        raise UsageError(f"{name} = {value!r} is no number", "a number, or a fraction such as 30000/1001") from e


__all__ = ["AvstoreError", "Clip", "Store", "Video", "open", "read_attributes"]
