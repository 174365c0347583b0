"""Writing one task: payloads into shards in tape order, then the record. The unit of commit.

Each array: temporary name -> fsync -> rename -> fsync(folder); the record last, by `link`, the first one wins. Until
the record is there nothing of the task exists, and the task is simply done again.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from avstore.codecs import encode_source
from avstore.durable import machine_errors, sync_folder, write_atomic, write_new
from avstore.records import Record, Task, record_path
from avstore.shard import ShardWriter
from avstore.spec import Spec, arrays
from avstore.spool import Payloads

UNFINISHED = re.compile(r"\.tmp\.\d+\Z")


def sweep(root: Path) -> list[Path]:
    """Deletes what interrupted runs left (names that end in `.tmp.<pid>`), and returns the paths.

    Only for the holder of the exclusive lock: the files of a run that still works look the same.
    """
    gone = []
    for folder, subfolders, names in os.walk(root):
        for name in [n for n in subfolders if UNFINISHED.search(n)]:
            subfolders.remove(name)
            with machine_errors(Path(folder) / name):
                shutil.rmtree(Path(folder) / name)
            gone.append(Path(folder) / name)
        for name in names:
            if UNFINISHED.search(name):
                path = Path(folder) / name
                with machine_errors(path):
                    path.unlink(missing_ok=True)
                gone.append(path)
    return gone


class TaskWriter:
    """Takes the videos of a task in tape order; `commit` or `abort` ends it."""

    def __init__(self, root: Path, spec: Spec, task: Task) -> None:
        self.root, self.spec, self.task = root, spec, task
        self.arrays = arrays(spec)
        self.open: dict[str, tuple[int, ShardWriter]] = {}
        self.written: set[str] = set()
        rows = spec.shard_seconds * spec.fps * task.shards if spec.picture else 0
        self.source = np.full(rows, -1, np.int32)
        self.size = 0

    def add(self, place: int, index: dict[str, Any], payloads: Payloads) -> None:
        """Writes the payloads of an ok video whose slot begins at tape second `place`; `index` as in the worker."""
        if self.spec.picture:
            row = place * self.spec.fps
            for offset, length, repeat in index["frames"]:
                payload = payloads[offset, length]
                for _ in range(repeat):
                    self._put("frames", row, payload)
                    row += 1
            row = (place - self.task.shard * self.spec.shard_seconds) * self.spec.fps
            for ordinal, repeat in index["source"]:
                self.source[row : row + repeat] = ordinal
                row += repeat
        seconds = {"waveform": index["waveform"]}
        seconds.update({f"spectrograms/{name}": chunks for name, chunks in index["spectrograms"].items()})
        for path, chunks in seconds.items():
            for i, (offset, length) in enumerate(chunks):
                self._put(path, place + i, payloads[offset, length])

    def commit(self, facts: list[dict[str, Any]], versions: dict[str, str]) -> bool:
        """Closes the shards and writes the record from one dict per video (see `records.FIELDS`).

        False where a record was there already: then it stays as it is.
        """
        for path in list(self.open):
            self._close(path)
        for i in range(self.task.shards if self.spec.picture else 0):
            n = self.spec.shard_seconds * self.spec.fps
            rows = self.source[i * n : (i + 1) * n]
            if (rows >= 0).any():
                key = self.arrays["source"].key(self.task.shard + i)
                data = encode_source(rows)
                write_atomic(self.root / key, data)
                self.written.add(key)
                self.size += len(data)
        self._unlink_leftovers()
        record = Record.of(self.task, self.spec.fingerprint, versions, facts)
        return write_new(record_path(self.root, self.task.number), record.to_bytes())

    def abort(self) -> None:
        """Drops what is not renamed yet."""
        for _, writer in self.open.values():
            writer.abort()
        self.open = {}

    def _put(self, path: str, chunk: int, payload: memoryview) -> None:
        array = self.arrays[path]
        per_shard = self.spec.shard_seconds * array.rate // array.inner_rows
        shard, inner = divmod(chunk, per_shard)
        if path not in self.open or self.open[path][0] != shard:
            if not self.task.shard <= shard < self.task.shard + self.task.shards:
                raise ValueError(f"chunk {chunk} of {path} lies outside task {self.task.number}")
            self._close(path)
            self.open[path] = shard, ShardWriter(self.root / array.key(shard), per_shard)
        self.open[path][1].append(inner, payload)
        self.size += len(payload)

    def _close(self, path: str) -> None:
        if path in self.open:
            shard, writer = self.open[path]
            writer.close()
            del self.open[path]
            self.written.add(self.arrays[path].key(shard))

    def _unlink_leftovers(self) -> None:
        """Shards that an interrupted try left and this one has not: its source changed in between."""
        if record_path(self.root, self.task.number).exists():
            return
        for path, array in self.arrays.items():
            for shard in range(self.task.shard, self.task.shard + self.task.shards):
                key = array.key(shard)
                if key not in self.written and (self.root / key).exists():
                    with machine_errors(self.root / key), contextlib.suppress(FileNotFoundError):
                        os.unlink(self.root / key)
                        sync_folder(self.root / path)
