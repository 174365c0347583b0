"""Remake: one damaged task, written anew beside the store from what is whole of it and from the source files.

Videos that are whole are copied chunk by chunk, the others decoded. The result takes the damaged files' place only if
every byte that is still whole comes out the same. `avstore.repair` says which tasks, and holds the lock.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from avstore.checks import Checker
from avstore.codecs import MISSING, crc32c, decode_source
from avstore.crew import Crew
from avstore.durable import machine_errors, sync_folder
from avstore.errors import CorruptError
from avstore.plan import split_failure
from avstore.records import Plan, Record, Task, record_path
from avstore.shard import INDEX_ROW
from avstore.sources import decode_path
from avstore.spec import ArraySpec, Spec, arrays
from avstore.spool import Payloads
from avstore.tasks import TaskWriter


class CannotRemake(Exception):
    """Why a task cannot be made again."""


class Shard:
    """What is whole in one shard file. `chunks`: inner chunk -> (offset, length) in `data`, checksum right."""

    def __init__(self, path: Path, array: ArraySpec, shard_seconds: int) -> None:
        self.path = path
        self.there = path.exists()
        self.rows: np.ndarray | None = None  # of an array without inner chunks (`source`)
        self.chunks: dict[int, tuple[int, int]] = {}
        try:
            self.data = np.fromfile(path, np.uint8) if self.there else np.zeros(0, np.uint8)
        except OSError:
            self.data = np.zeros(0, np.uint8)
        if not array.inner_rows:
            try:
                self.rows = decode_source(self.data.tobytes(), shard_seconds * array.rate, str(path))
            except Exception:  # the decompressor's own errors have no common class
                self.rows = None
            return
        n = shard_seconds * array.rate // array.inner_rows
        tail = self.data.size - 4 - INDEX_ROW * n
        if tail < 0 or crc32c(self.data[tail:-4]) != int.from_bytes(self.data[-4:].tobytes(), "little"):
            return
        table = np.frombuffer(self.data[tail:-4].tobytes(), "<u8").reshape(n, 2)
        for chunk in np.flatnonzero(table[:, 0] != MISSING).tolist():
            offset, length = (int(v) for v in table[chunk])
            end = offset + length
            if length >= 4 and end <= tail:
                sum_ = int.from_bytes(self.data[end - 4 : end].tobytes(), "little")
                if crc32c(self.data[offset : end - 4]) == sum_:
                    self.chunks[chunk] = offset, length

    def bytes(self, chunk: int) -> bytes:
        offset, length = self.chunks[chunk]
        return self.data[offset : offset + length].tobytes()


class Remake:
    """One task, written anew under `scratch`, and put in place of what is damaged."""

    def __init__(self, root: Path, scratch: Path, spec: Spec, plan: Plan, task: Task) -> None:
        self.root, self.scratch, self.spec, self.plan, self.task = root, scratch, spec, plan, task
        self.arrays = arrays(spec)
        self.length = Checker(root, spec, True, []).length
        self.record = self._record()
        self.old = {
            a.key(s): Shard(root / a.key(s), a, spec.shard_seconds)
            for a in self.arrays.values()
            for s in range(task.shard, task.shard + task.shards)
        }

    def go(self, crew: Crew, folder: Path | None) -> list[str]:
        """The files that were replaced or removed. Raises CannotRemake; then the store is as it was."""
        need = self._needed()
        self._check_sources([n for n in self.task.videos if n in need], folder)
        results = crew.results([crew.decode_planned(self.plan, n) for n in self.task.videos if n in need], len(need))
        writer = TaskWriter(self.scratch, self.spec, self.task)
        facts = []
        try:
            for number in self.task.videos:
                i = number - self.plan.first_video
                known = self._fact(number)
                failed = self.plan.probe[i]
                if number in need:
                    result = next(results)
                    fact = result.header.get("facts")
                    if fact is not None and result.payloads is not None:
                        writer.add(self.plan.place[i], result.header["index"], result.payloads)
                    else:
                        fact = crew.failed_facts(result.header, self.plan.path[i], self.plan.seconds[i])
                    if known is not None and not _agree(known, fact):
                        words = fact["message"] or fact["reason"] or f"{fact['frames']} frames"
                        raise CannotRemake(f"{self.plan.key[i]} does not give what it gave before ({words})")
                elif known is not None and known["status"] == "ok":
                    fact = known
                    writer.add(self.plan.place[i], *self._stored(number, known))
                elif known is not None:
                    fact = known
                else:
                    assert failed is not None  # else it would be needed
                    reason, message = split_failure(failed)
                    fact = {"status": "failed", "reason": reason, "message": message}
                facts.append(fact)
            versions = self.record.versions if self.record is not None else crew.versions()
            writer.commit(facts, versions)
        except BaseException:
            writer.abort()
            raise
        finally:
            results.close()
        self._compare(crew)
        return self._replace()

    def _record(self) -> Record | None:
        try:
            record = Record.read(record_path(self.root, self.task.number))
        except (CorruptError, OSError):
            return None
        mine = (record.task, record.fingerprint, len(record.fields["status"]))
        return record if mine == (self.task.number, self.spec.fingerprint, self.task.count) else None

    def _fact(self, number: int) -> dict[str, Any] | None:
        if self.record is None:
            return None
        return {k: v[number - self.task.first] for k, v in self.record.fields.items()}

    def _needed(self) -> set[int]:
        """Numbers of the videos that must be decoded."""
        out = set()
        for number in self.task.videos:
            i = number - self.plan.first_video
            fact = self._fact(number)
            if fact is None:
                if self.plan.probe[i] is None:
                    out.add(number)
            elif fact["status"] == "ok" and not all(
                self._whole(a, i, self.length(a, fact)) for a in self.arrays.values()
            ):
                out.add(number)
        return out

    def _spans(self, array: ArraySpec, i: int, chunks: int) -> list[tuple[str, int]]:
        """(shard key, chunk in it) of the first `chunks` chunks of a video."""
        inner = array.inner_rows or 1
        per = self.spec.shard_seconds * array.rate // inner
        first = self.plan.place[i] * array.rate // inner
        return [(array.key((first + k) // per), (first + k) % per) for k in range(chunks)]

    def _whole(self, array: ArraySpec, i: int, chunks: int) -> bool:
        spans = self._spans(array, i, chunks)
        if not array.inner_rows:
            return all(self.old[key].rows is not None for key in {key for key, _ in spans})
        return all(chunk in self.old[key].chunks for key, chunk in spans)

    def _stored(self, number: int, fact: dict[str, Any]) -> tuple[dict[str, Any], Payloads]:
        """A whole video as a child would hand it over, from the shards."""
        i = number - self.plan.first_video
        body = bytearray()
        index: dict[str, Any] = {"frames": [], "source": [], "waveform": [], "spectrograms": {}}
        for path, array in self.arrays.items():
            for key, chunk in self._spans(array, i, self.length(array, fact)):
                old = self.old[key]
                if old.rows is not None:
                    index["source"].append([int(old.rows[chunk]), 1])
                    continue
                data = old.bytes(chunk)
                span = [len(body), len(data)]
                body += data
                if path == "frames":
                    index["frames"].append([*span, 1])
                elif path == "waveform":
                    index["waveform"].append(span)
                else:
                    index["spectrograms"].setdefault(path.rsplit("/", 1)[-1], []).append(span)
        return index, Payloads(body, self.scratch / "none")

    def _check_sources(self, numbers: list[int], folder: Path | None) -> None:
        wrong = []
        for number in numbers:
            i = number - self.plan.first_video
            if folder is None:
                raise CannotRemake("the source folder is away: name it with --source FOLDER")
            try:
                size = os.stat(os.path.join(folder, decode_path(self.plan.path[i]))).st_size
            except OSError as e:
                wrong.append(f"{self.plan.key[i]}: {(e.strerror or 'cannot be read').lower()}")
                continue
            if size != self.plan.bytes[i]:
                wrong.append(f"{self.plan.key[i]}: has {size} bytes now, had {self.plan.bytes[i]}")
        if wrong:
            more = f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""
            raise CannotRemake(f"sources are missing or changed: {'; '.join(wrong[:3])}{more}")

    def _compare(self, crew: Crew) -> None:
        """CannotRemake where a chunk that is whole in the store is another one now."""
        for path, array in self.arrays.items():
            for s in range(self.task.shard, self.task.shard + self.task.shards):
                key = array.key(s)
                old = self.old[key]
                if not old.chunks and old.rows is None:
                    continue
                new = Shard(self.scratch / key, array, self.spec.shard_seconds)
                both = old.chunks.keys() & new.chunks.keys()
                same = all(old.bytes(c) == new.bytes(c) for c in both)
                if old.rows is not None and new.rows is not None:
                    same = np.array_equal(old.rows, new.rows)
                if not same:
                    raise CannotRemake(f"what is whole of {path} comes out different now: {self._why(crew)}")

    def _why(self, crew: Crew) -> str:
        here, there = crew.versions(), self.record.versions if self.record is not None else {}
        names = [f"{k} {v}, now {here.get(k)}" for k, v in sorted(there.items()) if v != here.get(k)]
        return f"it was made with {', '.join(names)}" if names else "a source has changed"

    def _replace(self) -> list[str]:
        """Puts files that differ in the place of the old ones: shards first, the record last."""
        out = []
        record = record_path(self.root, self.task.number).relative_to(self.root)
        for name in [*self.old, str(record)]:
            old, new = self.root / name, self.scratch / name
            with machine_errors(old):
                if not new.exists():
                    if old.exists():
                        old.unlink()
                        out.append(name)
                elif not old.exists() or old.read_bytes() != new.read_bytes():
                    os.rename(new, old)
                    out.append(name)
                sync_folder(old.parent)
        return out


def _agree(known: dict[str, Any], fact: dict[str, Any]) -> bool:
    return all(fact.get(k, v) == v for k, v in known.items())
