"""Simulated stores of any number of videos: real records and shards of a small store, repeated.

What is simulated: the videos. A few shards are filled with real videos of `base`, drawn at random, until they are as
full as an ingest would fill them; every further task is a copy of one of these: its shards are hard links to the same
files, its record says the same, its videos have keys and labels of their own. So plans, records, indexes, slots and
bytes are those of a store of that size (`avstore verify` finds it whole), but the disk and the page cache hold few
shards. What such a store cannot show is how a cold disk of that size behaves.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avstore import groups
from avstore.catalogue import SEGMENT
from avstore.codecs import MISSING, decode_source, encode_source
from avstore.errors import ConflictError, UsageError
from avstore.records import FIELDS, Plan, Record, Task, plan_path, record_path
from avstore.shard import ShardWriter
from avstore.spec import ArraySpec, Spec, arrays
from avstore.store import Store

CLASSES = 400


@dataclass(frozen=True)
class _Kind:
    """A shard's worth of videos: their numbers in the base store, and where each slot begins inside the shard."""

    numbers: list[int]
    places: list[int]


def simulate(
    base: Store, target: str | os.PathLike[str], videos: int, *, kinds: int = 2, seed: int = 0, fill: int | None = None
) -> Path:
    """Writes a store of `videos` simulated videos to `target`, which must not exist, and returns its path.

    base: a store with videos that fit into one of its shards. kinds: how many real shards there are. fill: at most so
    many videos to a task (default: as many as fit). UsageError where base has no such video.
    """
    target = Path(target)
    if videos < 1 or kinds < 1 or (fill is not None and fill < 1):
        raise UsageError(f"a store of {videos} videos over {kinds} shards", "at least one of each")
    if target.exists():
        raise ConflictError(f"{target} is there already", "a simulated store is written once", "name another")
    spec = base.spec
    fits = base.numbers[base.slots[base.numbers] <= spec.shard_seconds]
    if not len(fits):
        raise UsageError(f"no video of {base.path} fits into a shard", "there is nothing to repeat", "another store")
    made = [_draw(base, fits, np.random.default_rng([seed, k]), fill) for k in range(kinds)]
    tasks: list[Task] = []
    first = 0
    while first < videos:
        count = min(len(made[len(tasks) % kinds].numbers), videos - first)
        tasks.append(Task(len(tasks), len(tasks), 1, first, count))
        first += count
    groups.write_metadata(target, spec, len(tasks))
    plan_path(target, 1).write_bytes(_plan(base, made, tasks, videos).to_bytes())
    for array in arrays(spec).values():
        for task in tasks:
            kind = made[task.number % kinds]
            file = target / array.key(task.shard)
            if task.number < kinds or task.count < len(kind.numbers):
                _write(base, array, spec, kind, task.count, file)
            elif (origin := target / array.key(task.number % kinds)).exists():  # nothing in it: no file
                os.link(origin, file)
    for task in tasks:
        facts = [_facts(base, n) for n in made[task.number % kinds].numbers[: task.count]]
        record = Record.of(task, spec.fingerprint, {k: "/".join(sorted(v)) for k, v in base.versions.items()}, facts)
        record_path(target, task.number).write_bytes(record.to_bytes())
    return target


def _draw(base: Store, fits: np.ndarray, rng: np.random.Generator, fill: int | None) -> _Kind:
    numbers: list[int] = []
    places: list[int] = []
    used = 0
    while fill is None or len(numbers) < fill:
        number = int(rng.choice(fits))
        if used + int(base.slots[number]) > base.spec.shard_seconds:
            break
        numbers.append(number)
        places.append(used)
        used += int(base.slots[number])
    return _Kind(numbers, places)


def _facts(base: Store, number: int) -> dict[str, Any]:
    return {k: base.facts[k][number] for k in FIELDS}


def _plan(base: Store, made: list[_Kind], tasks: list[Task], videos: int) -> Plan:
    keys: list[str] = []
    labels: list[str | None] = []
    place: list[int] = []
    seconds: list[int] = []
    for task in tasks:
        kind = made[task.number % len(made)]
        for i in range(task.count):
            name = hashlib.blake2b(str(len(keys)).encode(), digest_size=8).hexdigest()
            label = f"class {int(name[:4], 16) % CLASSES:03d}"
            suffix = Path(SEGMENT.fullmatch(base.paths[kind.numbers[i]])[1]).suffix  # type: ignore[index]
            keys.append(f"train/{label}/{name}_{len(keys):08d}{suffix}")
            labels.append(label)
            place.append(task.shard * base.spec.shard_seconds + kind.places[i])
            seconds.append(int(base.slots[kind.numbers[i]]))
    none: list[str | None] = [None] * videos
    columns: dict[str, list[str | None]] = {"label": labels, "split": ["train"] * videos}
    return Plan(1, base.fingerprint, 0, 0, len(tasks), tasks, keys, keys, none, none, place, seconds, [1] * videos,
                none, columns)  # fmt: skip


def _write(base: Store, array: ArraySpec, spec: Spec, kind: _Kind, count: int, file: Path) -> None:
    """The shard of `array` that holds the first `count` videos of a kind."""
    inner = array.inner_rows or 1
    per = spec.shard_seconds * array.rate // inner
    if not array.inner_rows:
        rows = np.full(per, -1, np.int32)
        for number, place in zip(kind.numbers[:count], kind.places, strict=False):
            shard, second = divmod(int(base.places[number]), spec.shard_seconds)
            key = array.key(shard)
            if (base.path / key).is_file():
                there = decode_source((base.path / key).read_bytes(), per, key)
                n = int(base.slots[number]) * array.rate
                rows[place * array.rate : place * array.rate + n] = there[second * array.rate : second * array.rate + n]
        if (rows >= 0).any():
            file.write_bytes(encode_source(rows))
        return
    writer = ShardWriter(file, per)
    for number, place in zip(kind.numbers[:count], kind.places, strict=False):
        shard, second = divmod(int(base.places[number]), spec.shard_seconds)
        key, first = array.key(shard), second * array.rate // inner
        if not (base.path / key).is_file():
            continue
        index = base.reader.index(key, first, int(base.slots[number]) * array.rate // inner, per)
        for i, (offset, length) in enumerate(index.tolist()):
            if offset != int(MISSING):
                payload = np.empty(length, np.uint8)
                base.reader.read(key, offset, payload)
                writer.append(place * array.rate // inner + i, payload.tobytes())
    writer.close()
