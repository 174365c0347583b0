"""A run's embeddings on the tape: an array per tower, written shard by shard.

A shard is there whole or not at all, under a dotted name beside the array's place until all are there; repeating fills
what is missing, also after a new ingest. Which run and towers, and under which lock, is `embed.py`'s.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from avstore.codecs import with_crc
from avstore.durable import canonical_json, machine_errors, read_json, sync_folder, write_atomic
from avstore.errors import ConflictError
from avstore.records import record_path
from avstore.spec import ArraySpec
from trainers.embedder import Embedder, Vectors
from trainers.seconds import seconds_of_videos

if TYPE_CHECKING:
    from avstore.store import Store


@dataclass(frozen=True)
class Event:
    """Progress: seconds of the tape that are embedded, of how many."""

    done: int
    total: int


class TowerArray:
    """One tower's array: where its shards go until it is complete, and its metadata."""

    def __init__(self, store: Store, array: ArraySpec, lineage: dict[str, Any], replace: bool) -> None:
        self.array, self.lineage, self.shard_seconds = array, lineage, store.spec.shard_seconds
        self.final = store.path / array.path
        self.dotted = self.final.with_name(f".{self.final.name}")
        self.replaces = False
        if (self.final / "zarr.json").is_file():
            there = read_json(self.final / "zarr.json")["attributes"].get("avstore", {})
            if there == lineage:
                self.folder = self.final
                return
            if not replace:
                differing = sorted(k for k in {*there, *lineage} if there.get(k) != lineage.get(k))
                raise ConflictError(
                    f"{array.path} was made by another checkpoint",
                    "; ".join(f"{k} is {there.get(k)} there, {lineage.get(k)} now" for k in differing),
                    "embed with --replace to make it anew, or under another --name",
                )
            self.replaces = True
        self.folder = self.dotted
        file = self.dotted / "zarr.json"
        if file.is_file() and read_json(file)["attributes"].get("avstore") != lineage:
            with machine_errors(self.dotted):
                shutil.rmtree(self.dotted)  # what another checkpoint left half done
        with machine_errors(self.dotted):
            self.dotted.mkdir(parents=True, exist_ok=True)
        self._metadata(store)

    def _metadata(self, store: Store) -> None:
        data = canonical_json(self.array.metadata(self.shard_seconds, store.tape_seconds, {"avstore": self.lineage}))
        file = self.folder / "zarr.json"
        if not file.is_file() or file.read_bytes() != data:
            write_atomic(file, data)

    def _shard(self, shard: int) -> Path:
        return self.folder / self.array.key(shard).rsplit("/", 1)[1]

    def has(self, shard: int) -> bool:
        return self._shard(shard).is_file()

    def write(self, shard: int, rows: np.ndarray) -> None:
        """float32 (shard_seconds, D) as one chunk."""
        write_atomic(self._shard(shard), with_crc(rows.astype("<f2").tobytes()))

    def finish(self, store: Store) -> None:
        """Metadata for the tape as long as it is now; the dotted folder takes its place."""
        self._metadata(store)
        if self.folder == self.final:
            return
        with machine_errors(self.final):
            old = self.final.with_name(f".{self.final.name}.old.tmp.{os.getpid()}")
            if self.replaces:
                os.rename(self.final, old)
            try:
                os.rename(self.dotted, self.final)
            except OSError as e:
                if self.final.exists():
                    raise ConflictError(
                        f"{self.array.path} has come to be meanwhile",
                        "another embed of the same run has finished",
                        "repeat the command: it has nothing left to do",
                    ) from e
                raise
            sync_folder(self.final.parent)
            shutil.rmtree(old, ignore_errors=True)


def write_seconds(
    embedder: Embedder,
    store: Store,
    arrays: list[TowerArray],
    todo: list[int],
    every: int,
    batch: int,
    on_event: Callable[[Event], None],
) -> int:
    """Embeds the seconds of these shards, in the order of the tape; each shard is written when its last is there."""
    per = store.spec.shard_seconds
    numbers = np.flatnonzero(store.ok)
    rows, seconds = seconds_of_videos(store, numbers, every)
    tape = store.places[numbers][rows] + seconds
    keep = np.isin(tape // per, todo)
    order = np.argsort(tape[keep], kind="stable")
    rows, seconds, tape = rows[keep][order], seconds[keep][order], tape[keep][order]
    last = {int(s): int(i) for i, s in enumerate(tape // per)}  # shard -> place of its last second
    open_shards: dict[int, Vectors] = {}
    done = 0
    on_event(Event(0, len(tape)))

    def write(shard: int) -> None:
        vectors = open_shards.pop(shard, {})
        for array in arrays:
            if not array.has(shard):
                tower, size = array.final.name, array.array.row[0]
                array.write(shard, vectors.get(tower, np.full((per, size), np.nan, np.float32)))

    waiting = [s for s in todo if s not in last]  # nothing but holes: there, and done
    for shard in waiting:
        write(shard)
    for _, _, vectors in embedder.run(store, numbers, rows, seconds, batch):
        here = tape[done : done + batch]
        for shard in np.unique(here // per).tolist():
            inside = here // per == shard
            for array in arrays:
                tower, size = array.final.name, array.array.row[0]
                kept = open_shards.setdefault(shard, {})
                full = kept.setdefault(tower, np.full((per, size), np.nan, np.float32))
                if tower in vectors:
                    full[here[inside] - shard * per] = vectors[tower][inside]
            if last[shard] < done + len(here):
                write(shard)
        done += len(here)
        on_event(Event(done, len(tape)))
    return done


def committed_shards(store: Store) -> list[int]:
    """Shards whose task has a record: what lies in them will not change."""
    out: list[int] = []
    for plan in store.plans:
        for task in plan.tasks:
            if record_path(store.path, task.number).is_file() and all(
                store.facts["status"][v] != "pending" for v in task.videos
            ):
                out += range(task.shard, task.shard + task.shards)
    return sorted(out)


def make_group(folder: Path) -> None:
    """`folder`, and the one that it lies in, as groups of the store, where they are none yet."""
    data = canonical_json({"zarr_format": 3, "node_type": "group", "attributes": {}})
    for path in (folder.parent, folder):
        with machine_errors(path):
            path.mkdir(parents=True, exist_ok=True)
        if not (path / "zarr.json").is_file():
            write_atomic(path / "zarr.json", data)
