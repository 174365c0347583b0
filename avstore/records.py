"""Plans and records: the two kinds of JSON that say what a store holds.

A plan (`plans/0001.json`) lists videos with their fixed slots, and the tasks they form; it is written once. A record
(`commits/000017.json`) says what became of each video of one task; no record, nothing committed. Both keep one list
per field, not one object per video, so that 240,000 videos parse in half a second.
"""

from __future__ import annotations

import builtins
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore.durable import read_sealed, sealed_json
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
    """One plan: videos `first_video ... first_video + len(key)` in tape order, one list per field."""

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
        return len(self.key)

    def to_bytes(self) -> builtins.bytes:
        value = {k: v for k, v in self.__dict__.items() if k != "tasks"}
        value["tasks"] = [[t.number, t.shard, t.shards, t.first, t.count] for t in self.tasks]
        return sealed_json({"format": FORMAT, **value})

    @classmethod
    def read(cls, path: Path) -> Plan:
        """Reads and checks a plan; CorruptError names the file and what contradicts."""
        value = read_sealed(path)
        try:
            if value.pop("format") != FORMAT:
                raise ValueError("written by another version of the format")
            tasks = [Task(*t) for t in value.pop("tasks")]
            plan = cls(tasks=tasks, **value)
            n = len(plan.key)
            lists: list[list[Any]] = [
                plan.path,
                plan.start,
                plan.end,
                plan.place,
                plan.seconds,
                plan.bytes,
                plan.probe,
                *plan.columns.values(),
            ]
            if any(len(x) != n for x in lists) or sum(t.count for t in tasks) != n:
                raise ValueError("its lists differ in length")
        except (KeyError, TypeError, ValueError, AttributeError) as e:
            raise CorruptError(f"{path} is damaged", str(e), "restore it from a copy: slots cannot be guessed") from e
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
