"""The catalogue of a store: which videos there are, their columns, and what the records say of them.

Opening reads every plan and record, checks their digests, and parses what reading clips needs into numpy; all other
fields stay text until they are asked for (`avstore.columns`). 240,000 videos take about a second; nothing is cached
on disk. It knows nothing of pixels; `avstore.store` cuts clips.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from fractions import Fraction
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from avstore.clip import Video
from avstore.columns import Texts
from avstore.durable import read_json
from avstore.errors import ConflictError, CorruptError, NotFoundError, UsageError, did_you_mean
from avstore.records import FIELDS, Plan, pending_text, read_plans, read_text, record_path
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
        try:
            self.spec = Spec.from_json(attributes["spec"])
            self.fingerprint: str = attributes["fingerprint"]
            whole = self.spec.fingerprint == self.fingerprint
        except (CorruptError, UsageError):
            raise
        except (KeyError, TypeError, AttributeError, ValueError) as e:
            raise CorruptError(*_damaged(self.path, f"{type(e).__name__}: {e}")) from e
        if not whole:
            raise CorruptError(*_damaged(self.path, "its spec does not have the fingerprint beside it"))
        self.reload()

    def reload(self) -> None:
        """Reads the plans and records anew."""
        self.__dict__.pop("paths", None)
        self.plans: list[Plan] = read_plans(self.path)
        self.total = sum(len(p) for p in self.plans)  # all numbers ever planned
        self.tape_seconds = sum(p.shards for p in self.plans) * self.spec.shard_seconds
        self.keys: list[str] = _joined([p.key for p in self.plans])
        none = np.zeros(0, np.int64)
        self.places = np.concatenate([none, *(p.integers("place") for p in self.plans)])
        self.slots = np.concatenate([none, *(p.integers("seconds") for p in self.plans)])
        self.columns: list[str] = sorted({c for p in self.plans for c in p.column_names})
        self._columns: dict[str, list[Any]] = {}  # those that were asked for, by number
        self._read_records()
        self.current = self._latest()
        self.frames = self.facts.integers("frames")
        self.samples = self.facts.integers("samples")
        self.sound = np.stack([self.facts.integers("sound_start"), self.facts.integers("sound_end")], 1)
        self.has_picture = self.frames > 0
        self.has_sound = self.sound[:, 1] > self.sound[:, 0]
        self.boxes = self.facts.boxes("box", (0, 0, self.spec.height, self.spec.width))
        self.ok = self.facts.flags("status", {"ok": True, "failed": False, "pending": False})
        self.numbers = self.current[self.ok[self.current]]

    def _latest(self) -> np.ndarray:
        """The number that counts of each key: its latest that has a record, else its first."""
        if len(set(self.keys)) == self.total:
            return np.arange(self.total)
        committed = np.repeat(self._committed, [t.count for p in self.plans for t in p.tasks])
        latest: dict[str, int] = {}
        for number, (key, is_there) in enumerate(zip(self.keys, committed.tolist(), strict=True)):
            if is_there or key not in latest:
                latest[key] = number
        return np.sort(np.fromiter(latest.values(), np.int64, len(latest)))

    def _read_records(self) -> None:
        """Every record, as text: `facts`, `versions`, `pending_tasks`."""
        tasks = [t for p in self.plans for t in p.tasks]
        self.versions: dict[str, set[str]] = {}
        self._committed = np.zeros(len(tasks), bool)
        parts: dict[str, list[bytes]] = {name: [] for name in FIELDS}
        known: dict[bytes, dict[str, str]] = {}
        pending: dict[int, dict[str, bytes]] = {}
        folder = self.path / "commits"
        there = {e.name for e in os.scandir(folder)} if folder.is_dir() else set()
        for i, task in enumerate(tasks):
            file = record_path(self.path, task.number)
            if file.name not in there:
                lists = pending.get(task.count)
                if lists is None:
                    lists = pending[task.count] = pending_text(task.count)
            else:
                record = read_text(file, task.count, known)
                if (record.task, record.fingerprint, record.count) != (task.number, self.fingerprint, task.count):
                    raise CorruptError(
                        f"{file} does not belong to task {task.number} of this store",
                        "it was copied or changed",
                        "avstore verify STORE --repair",
                    )
                self._committed[i] = True
                lists = record.lists
                if record.versions is not known.get(b""):
                    known[b""] = record.versions  # the same as before, as a rule
                    for k, v in record.versions.items():
                        self.versions.setdefault(k, set()).add(v)
            for name, texts in parts.items():
                texts.append(lists[name])
        self.pending_tasks = int((~self._committed).sum())

        def wrong(task: int, why: str) -> CorruptError:
            file = record_path(self.path, tasks[task].number)
            return CorruptError(f"{file} is damaged", why, "avstore verify --repair makes the task again")

        self.facts = Texts([t.count for t in tasks], parts, wrong)

    @cached_property
    def paths(self) -> list[str]:
        """The file of each number."""
        return _joined([p.path for p in self.plans])

    def __len__(self) -> int:
        return len(self.numbers)

    def __iter__(self) -> Iterator[Video]:
        return (self[int(n)] for n in self.numbers)

    def __getitem__(self, number: int) -> Video:
        number = self._number(number)
        plan = self._plan(number)
        i = number - plan.first_video
        facts = self.facts.row(number)
        return Video(
            number=number,
            key=self.keys[number],
            path=plan.path[i],
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
            columns={c: self._column(c)[number] for c in plan.column_names},
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
        exact = dict(zip(map(self.keys.__getitem__, self.current.tolist()), self.current.tolist(), strict=True))
        keys = [str(key) for key in keys]
        short: dict[str, set[int]] = {}
        for key, number in exact.items() if any(key not in exact for key in keys) else ():
            file, segment = SEGMENT.fullmatch(key).groups()  # type: ignore[union-attr]  # it matches any text
            stem = file.rsplit(".", 1)[0] if "." in file.rsplit("/", 1)[-1] else file
            names = {file, stem, file.rsplit("/", 1)[-1], stem.rsplit("/", 1)[-1]}
            for name in names | {name + segment for name in names if segment}:
                short.setdefault(name, set()).add(number)
        out = []
        for key in keys:
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
        chosen = np.asarray(self.numbers if numbers is None else numbers, np.int64)
        if name in self.columns:
            values = self._column(name)
        elif name == "seconds":
            seen = self.has_picture[chosen]
            rate = np.where(seen, self.spec.fps, self.spec.sample_rate)
            return (np.where(seen, self.frames[chosen], self.samples[chosen]) / rate).tolist()
        elif name in self.facts:
            values = self.facts[name]
        elif name in ("number", "place", "slot_seconds", "has_sound", "has_picture"):
            arrays = {"place": self.places, "slot_seconds": self.slots, "has_sound": self.has_sound,
                      "has_picture": self.has_picture}  # fmt: skip
            return (arrays[name][chosen] if name in arrays else chosen).tolist()
        elif name in ("key", "path", "start", "end"):
            values = self.keys if name == "key" else _joined([getattr(p, name) for p in self.plans])
        else:
            raise close_column(name, [*self.columns, *FIELDS, *INTRINSIC])
        return [values[n] for n in chosen.tolist()]

    def _column(self, name: str) -> list[Any]:
        """A column of the plans by number; None where a plan lacks it."""
        if name not in self._columns:
            have = [p.column(name) if name in p.column_names else [None] * len(p) for p in self.plans]
            self._columns[name] = _joined(have)
        return self._columns[name]

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


def _damaged(path: Path, why: str) -> tuple[str, str, str]:
    """What, why and what next of a root zarr.json whose attributes were changed."""
    return f"{path / 'zarr.json'} is damaged", why, f"avstore verify {path}, and --repair where it says so"


def _joined(lists: list[list[Any]]) -> list[Any]:
    return lists[0] if len(lists) == 1 else list(chain.from_iterable(lists))


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
