"""The catalogue of a store: which videos there are, their columns, and what the records say of them.

Parsed from the plans and records into numpy columns at opening (240,000 videos: about half a second); nothing is
cached on disk. It knows nothing of pixels; `avstore.store` cuts clips.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from avstore.clip import Video
from avstore.durable import read_json
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError, did_you_mean
from avstore.records import FIELDS, Plan, Record, read_plans, record_path
from avstore.selection import Selection, close_column, select
from avstore.spec import FORMAT, Spec

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

SEGMENT = re.compile(r"(.*?)((?:#[0-9/.]*-[0-9/.]*)?)", re.DOTALL)  # a key: the path, and the segment of it


class Catalogue:
    """Videos of a store by number, with columns. `len` and iteration run over the ok videos."""

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        attributes = read_attributes(self.path)
        self.spec = Spec.from_json(attributes["spec"])
        self.fingerprint: str = attributes["fingerprint"]
        self.reload()

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
        """Numbers, int64, of the current videos with these keys; a key without suffix, segment or folders serves where
        it is unique. NotFoundError names the first that is not there."""
        exact = {self.keys[int(n)]: int(n) for n in self.current}
        short: dict[str, set[int]] = {}
        for key, number in exact.items():
            file, segment = SEGMENT.fullmatch(key).groups()  # type: ignore[union-attr]  # it matches any text
            stem = file.rsplit(".", 1)[0] if "." in file.rsplit("/", 1)[-1] else file
            names = {file, stem, file.rsplit("/", 1)[-1], stem.rsplit("/", 1)[-1]}
            for name in names | {name + segment for name in names if segment}:
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
