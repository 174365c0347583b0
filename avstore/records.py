"""Plans and records: the two kinds of JSON that say what a store holds.

A plan (`plans/0001.json`) lists videos with their fixed slots, and the tasks they form; it is written once. A record
(`commits/000017.json`) says what became of each video of one task; no record, nothing committed. Both keep one list
per field, not one object per video; who opens a store reads them as text first (`avstore.columns`), so that 240,000
videos take half a second.
"""

from __future__ import annotations

import builtins
import hashlib
import json
from dataclasses import dataclass, field, fields
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from avstore import columns as texts
from avstore.durable import SEAL, ZEROS, read_sealed, sealed_json
from avstore.errors import CorruptError
from avstore.spec import FORMAT

# Reasons of a file: committed. (Failures of the machine stop a run, with nothing committed.)
REASONS = (
    "unreadable",
    "no_streams",
    "truncated",
    "unsupported",
    "too_large",
    "bad_timestamps",
    "longer_than_planned",
    "crashed",
    "timed_out",
)

# What a record holds of each video, with the value it has for a failed one.
FIELDS: dict[str, Any] = {
    "status": "failed",  # ok | failed
    "reason": None,  # one of REASONS
    "message": None,  # the decoder's words, without any outside path
    "frames": 0,  # rows of `frames` that hold a picture
    "samples": 0,  # length of the sound on the video's clock, in samples of the tape; no sound: the length of the video
    "sound_start": 0,  # first and one-past-last sample that came from the file; equal: no sound
    "sound_end": 0,
    "silent": True,  # no sound, or all of it zero
    "errors": 0,  # damaged packets or frames that decoding survived
    "source_frames": 0,  # source frames shown or skipped on the way
    "source_fps": None,  # median rate from the timestamps, a fraction as text
    "display": None,  # [width, height] after rotation and pixel aspect
    "box": None,  # [y, x, height, width] of the picture inside the stored frame
    "video_stream": None,
    "audio_stream": None,
    "sound_dropped": 0,  # samples before t = 0 or beyond the slot
    "decoder": None,  # e.g. pyav
    "fallback": None,  # why not the decoder that was asked for
}


LISTS = ("key", "path", "start", "end", "place", "seconds", "bytes", "probe")  # of a plan
PLAN_MEMBERS = sorted([*LISTS, "columns", "digest", "fingerprint", "first_shard", "first_video", "format", "number",
                       "shards", "tasks"])  # fmt: skip
RECORD_MEMBERS = sorted([*FIELDS, "digest", "fingerprint", "format", "task", "versions"])
COPY = "restore it from a copy: slots cannot be guessed"


@dataclass(frozen=True)
class Task:
    """A run of consecutive shards and the range of video numbers whose slots lie in it."""

    number: int
    shard: int
    shards: int
    first: int  # first video number
    count: int

    @property
    def videos(self) -> range:
        return range(self.first, self.first + self.count)


@dataclass
class Plan:
    """One plan: videos `first_video ... first_video + len(key)` in tape order, one list per field.

    A plan that was read parses each list when it is first used.
    """

    number: int
    fingerprint: str
    first_video: int
    first_shard: int
    shards: int
    tasks: list[Task]
    key: list[str]  # path relative to the source folder [+ `#start-end`]
    path: list[str]  # the file
    start: list[str | None]  # seconds as a fraction, text; None: the beginning / the end of the file
    end: list[str | None]
    place: list[int]  # tape second where the slot begins
    seconds: list[int]  # length of the slot
    bytes: list[int]  # size of the file when it was planned
    probe: list[str | None]  # `reason: message`, where probing already failed (then the slot has 0 seconds)
    columns: dict[str, list[str | None]] = field(default_factory=dict)

    def __len__(self) -> int:
        return sum(t.count for t in self.tasks)

    def __getattr__(self, name: str) -> Any:  # of what is not there yet
        unread: dict[str, builtins.bytes] = self.__dict__.get("_unread", {})
        if name not in unread and not (name == "columns" and "_columns" in self.__dict__):
            raise AttributeError(name)
        value: Any
        if name == "columns":
            value = {c: self.column(c) for c in self.__dict__["_columns"]}
        elif name == "path" and unread["path"] == unread.get("key"):
            value = self.key  # files without segments: one list for both
        else:
            value = self._parse(name, unread[name])
        self.__dict__[name] = value
        return value

    def _parse(self, name: str, text: builtins.bytes) -> list[Any]:
        try:
            return texts.values([text], len(self), repeat=name not in ("key", "path"))
        except ValueError as e:
            raise CorruptError(f"{name} of plan {self.number} cannot be read", str(e), COPY) from e

    def column(self, name: str) -> list[str | None]:
        """One of the columns; parses no other."""
        if "columns" in self.__dict__:
            return self.columns[name]
        return self._parse(name, self.__dict__["_columns"][name])

    @property
    def column_names(self) -> list[str]:
        unread = self.__dict__.get("_columns")
        return list(self.columns if unread is None else unread)

    def integers(self, name: str) -> np.ndarray:
        """`place`, `seconds` or `bytes` as int64 (n,)."""
        if name in self.__dict__:
            return np.array(self.__dict__[name], np.int64)
        try:
            return texts.integers([self.__dict__["_unread"][name]], len(self))
        except ValueError as e:
            raise CorruptError(f"{name} of plan {self.number} cannot be read", str(e), COPY) from e

    def to_bytes(self) -> builtins.bytes:
        value = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "tasks"}
        value["tasks"] = [[t.number, t.shard, t.shards, t.first, t.count] for t in self.tasks]
        return sealed_json({"format": FORMAT, **value})

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads and checks a plan; CorruptError names the file and what contradicts."""
        data = sealed_bytes(path)
        parts = texts.members(data, PLAN_MEMBERS)
        try:
            if parts is None:
                return cls._of(json.loads(data))
            if parts["format"] != str(FORMAT).encode():
                raise ValueError("written by another version of the format")
            given = {name: json.loads(parts[name]) for name in ("fingerprint", "first_shard", "first_video", "number",
                                                                "shards")}  # fmt: skip
            tasks = [Task(*t) for t in json.loads(parts["tasks"])]
            n = sum(t.count for t in tasks)
            columns = texts.list_members(parts["columns"], n)
            if columns is None or not all(texts.has(parts[name], n) for name in LISTS):
                raise ValueError("its lists differ in length")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CorruptError(f"{path} is damaged", str(e), COPY) from e
        plan = cls.__new__(cls)
        unread = {name: parts[name] for name in LISTS}
        plan.__dict__.update(given, tasks=tasks, _unread=unread, _columns=columns)
        return plan

    @classmethod
    def _of(cls, value: dict[str, Any]) -> Plan:
        """From parsed JSON."""
        del value["digest"]
        if value.pop("format") != FORMAT:
            raise ValueError("written by another version of the format")
        tasks = [Task(*t) for t in value.pop("tasks")]
        plan = cls(tasks=tasks, **value)
        lists = [getattr(plan, name) for name in LISTS] + [*plan.columns.values()]
        if any(len(x) != len(plan) for x in lists):
            raise ValueError("its lists differ in length")
        return plan


@dataclass
class Record:
    """What a task holds: one list per field of FIELDS, in the order of the task's videos."""

    task: int
    fingerprint: str
    versions: dict[str, str]  # of everything that shapes bytes: av, ffmpeg libraries, torch, simplejpeg, avstore
    fields: dict[str, list[Any]]

    def to_bytes(self) -> bytes:
        return sealed_json(
            {
                "format": FORMAT,
                "task": self.task,
                "fingerprint": self.fingerprint,
                "versions": self.versions,
                **self.fields,
            }
        )

    @classmethod
    def of(cls, task: Task, fingerprint: str, versions: dict[str, str], facts: list[dict[str, Any]]) -> Record:
        """From one dict per video; fields that a dict lacks take the value of FIELDS."""
        if len(facts) != task.count:
            raise ValueError(f"task {task.number} has {task.count} videos, got facts of {len(facts)}")
        for f in facts:
            unknown = set(f) - set(FIELDS)
            if unknown:
                raise ValueError(f"unknown record fields {sorted(unknown)}")
        return cls(
            task.number, fingerprint, versions, {k: [f.get(k, default) for f in facts] for k, default in FIELDS.items()}
        )

    @classmethod
    def read(cls, path: Path) -> Record:
        value = read_sealed(path)
        try:
            if value.pop("format") != FORMAT:
                raise ValueError("written by another version of the format")
            task, fingerprint, versions = value.pop("task"), value.pop("fingerprint"), value.pop("versions")
            if set(value) != set(FIELDS) or len({len(v) for v in value.values()}) != 1:
                raise ValueError("its lists differ in length or name")
            return cls(task, fingerprint, versions, value)
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CorruptError(
                f"{path} is damaged", str(e), "avstore verify --repair makes the task again from its sources"
            ) from e


@dataclass(frozen=True)
class RecordText:
    """A record whose lists are still text: name of a field -> the text of its list. `count`: videos."""

    task: int
    fingerprint: str
    versions: dict[str, str]
    count: int
    lists: dict[str, bytes]


def read_text(path: Path, count: int, known: dict[bytes, dict[str, str]]) -> RecordText:
    """A record, checked like `Record.read` but for what is inside its lists; fast where it has `count` videos.

    known: versions by their text, which most records share; it grows.
    """
    parts = texts.members(sealed_bytes(path), RECORD_MEMBERS)
    if (
        parts is None
        or parts["format"] != str(FORMAT).encode()
        or not parts["task"].isdigit()
        or not all(texts.has(parts[name], count) for name in FIELDS)
    ):
        record = Record.read(path)  # says what is wrong
        lists = {k: json.dumps(v, ensure_ascii=False, separators=(",", ":")).encode() for k, v in record.fields.items()}
        return RecordText(record.task, record.fingerprint, record.versions, len(record.fields["status"]), lists)
    versions = known.get(parts["versions"])
    if versions is None:
        versions = known[parts["versions"]] = json.loads(parts["versions"])
    return RecordText(int(parts["task"]), parts["fingerprint"].decode().strip('"'), versions, count,
                      {name: parts[name] for name in FIELDS})  # fmt: skip


def pending_text(count: int) -> dict[str, bytes]:
    """The lists of a task without a record: status `pending`, else the values of a failed video."""
    values = {**FIELDS, "status": "pending"}
    return {k: b"[" + b",".join([json.dumps(v).encode()] * count) + b"]" for k, v in values.items()}


def sealed_bytes(path: Path) -> bytes:
    """The bytes of a sealed file (`durable.sealed_json`); CorruptError when one of them has changed."""
    data = path.read_bytes()
    found = SEAL.search(data)
    if found is not None:
        view, digest = memoryview(data), hashlib.sha256()
        for part in (view[: found.start(1)], ZEROS.encode(), view[found.end(1) :]):
            digest.update(part)
        if digest.hexdigest().encode() == found[1]:
            return data
    raise CorruptError(
        f"{path} is damaged", "its digest does not fit its bytes", "avstore verify STORE names what is damaged"
    )


def plan_path(root: Path, number: int) -> Path:
    return root / "plans" / f"{number:04d}.json"


def record_path(root: Path, task: int) -> Path:
    return root / "commits" / f"{task:06d}.json"


def read_plans(root: Path) -> list[Plan]:
    """All plans in order; CorruptError where one is missing between others."""
    paths = sorted(p for p in (root / "plans").glob("[0-9]*.json"))
    plans = [Plan.read(p) for p in paths]
    video = shard = 0
    for i, (path, plan) in enumerate(zip(paths, plans, strict=True)):
        place = i + 1, video, shard
        if (plan.number, plan.first_video, plan.first_shard) != place or path.name != plan_path(root, i + 1).name:
            raise CorruptError(
                f"{path} does not follow the plan before it",
                "a plan file is missing or was changed",
                "restore the plans folder from a copy",
            )
        video, shard = video + len(plan), shard + plan.shards
    return plans


def fraction(text: str | None) -> Fraction | None:
    return None if text is None else Fraction(text)


def video_key(path: str, start: Fraction | None = None, end: Fraction | None = None) -> str:
    """The key of a video: its path, and the segment where it is not the whole file."""
    if start is None and end is None:
        return path
    return f"{path}#{'' if start is None else start}-{'' if end is None else end}"
