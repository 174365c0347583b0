"""Planning: from probed entries to fixed slots on the tape, and the tasks that they form.

Pure: no file is touched. The same entries give the same plan, whatever the order in which they come.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction

from avstore.records import Plan, Task
from avstore.sources import Entry
from avstore.spec import Spec

SLACK = Fraction(1, 4)  # seconds beyond the stated length that a slot leaves free


@dataclass(frozen=True)
class Probed:
    """An entry with the length that the probe found, in seconds, or why the probe failed, as `reason: message`."""

    entry: Entry
    seconds: Fraction = Fraction(0)
    failed: str | None = None


def slot_seconds(seconds: Fraction) -> int:
    """Whole seconds that a video of this length gets on the tape: ceil(seconds + 1/4)."""
    return math.ceil(seconds + SLACK)


def failure(reason: str, message: str | None) -> str:
    """What a plan keeps of a failed probe."""
    return f"{reason}: {message}" if message else reason


def split_failure(text: str) -> tuple[str, str | None]:
    """(reason, message) of a plan's `probe` field."""
    reason, _, message = text.partition(": ")
    return reason, message or None


def too_long(seconds: Fraction, slot: int) -> str:
    """The message of `longer_than_planned`: it keeps the exact length, so that an interrupted command can go on."""
    return f"lasts {seconds} s, its slot has {slot} s"


def known_seconds(message: str | None) -> Fraction | None:
    """The length in a message of `too_long`."""
    found = re.match(r"lasts (\d+(?:/[1-9]\d*)?) s", message or "")
    return Fraction(found[1]) if found else None


def tape_order(probed: Iterable[Probed], seed: int = 0) -> list[Probed]:
    """A seeded permutation that depends on the keys alone: by the hash of (seed, key)."""

    def place(p: Probed) -> tuple[bytes, str]:
        return hashlib.blake2b(f"{seed}:{p.entry.key}".encode(), digest_size=16).digest(), p.entry.key

    return sorted(probed, key=place)


def make_plan(spec: Spec, probed: Iterable[Probed], before: list[Plan]) -> Plan:
    """The plan that follows the plans `before`.

    Next-fit of the slots, in tape order, into shards of `spec.shard_seconds`; a video longer than a shard gets
    consecutive shards and a task of its own; a failed probe gets a slot of 0 seconds.
    """
    videos = tape_order(probed)
    if not videos:
        raise ValueError("a plan needs at least one video")
    size = spec.shard_seconds
    first_video = sum(len(p) for p in before)
    first_shard = sum(p.shards for p in before)
    number = sum(len(p.tasks) for p in before)
    tasks: list[Task] = []
    place: list[int] = []
    seconds = [0 if v.failed else slot_seconds(v.seconds) for v in videos]
    shard, used, opened = first_shard, 0, 0  # the open shard, its seconds taken, its first video

    def close(upto: int, shards: int) -> None:
        nonlocal shard, used, opened
        if upto > opened:
            tasks.append(Task(number + len(tasks), shard, shards, first_video + opened, upto - opened))
            shard, used, opened = shard + shards, 0, upto

    for i, n in enumerate(seconds):
        if used + n > size:
            close(i, 1)
        place.append(shard * size + used)
        used += n
        if n > size:
            close(i + 1, -(-n // size))
    close(len(videos), 1)
    names = sorted({name for v in videos for name in v.entry.columns})
    return Plan(
        number=len(before) + 1,
        fingerprint=spec.fingerprint,
        first_video=first_video,
        first_shard=first_shard,
        shards=shard - first_shard,
        tasks=tasks,
        key=[v.entry.key for v in videos],
        path=[v.entry.path for v in videos],
        start=[v.entry.start for v in videos],
        end=[v.entry.end for v in videos],
        place=place,
        seconds=seconds,
        bytes=[v.entry.size for v in videos],
        probe=[v.failed for v in videos],
        columns={name: [v.entry.columns.get(name) for v in videos] for name in names},
    )
