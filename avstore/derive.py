"""Derive: a front-end's spectrograms, computed from the stored waveforms and stored beside them, without decoding.

    derive("kinetics.zarr", "avid-linear257")

The shards get the bytes that an ingest with this front-end would have written. The array grows under a dotted name
(`spectrograms/.avid-linear257`), shard by shard, and gets its own when it is complete; repeating the command goes on
where it stopped, and after a new ingest fills what is missing. Prints nothing; decodes no media.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from avstore.codecs import encode_rows
from avstore.durable import canonical_json, machine_errors, read_json, sync_folder, write_atomic
from avstore.errors import ConflictError, CorruptError, InterruptedRun, UsageError
from avstore.frontends import FRONT_ENDS, FrontEnd, named
from avstore.lock import StoreLock
from avstore.records import Task
from avstore.shard import ShardWriter
from avstore.spec import ArraySpec, spectrogram_array
from avstore.store import Store


@dataclass(frozen=True)
class DeriveStarted:
    """What is left to do, in tasks, videos with sound, and seconds of sound."""

    tasks: int
    videos: int
    seconds: float


@dataclass(frozen=True)
class DeriveDone:
    """One more task is stored: its number, the bytes it wrote, and the tasks that are left."""

    task: int
    size: int
    left: int


@dataclass
class DeriveSummary:
    """How the array stands: videos with sound that it covers, of all that are committed; what this command did."""

    path: Path
    front_end: str
    videos: int = 0
    pending: int = 0  # tasks that no ingest has committed yet: nothing can be derived from them
    tasks: int = 0  # that this command did
    seconds: float = 0.0  # of sound
    size: int = 0  # bytes
    wall: float = 0.0
    note: str | None = None


def derive(
    store: str | os.PathLike[str],
    front_end: str,
    *,
    workers: int | None = None,
    on_event: Callable[[DeriveStarted | DeriveDone], None] | None = None,
    stop: threading.Event | None = None,
) -> DeriveSummary:
    """Stores the spectrograms of `front_end` for every committed video with sound.

    Takes the store's lock alone: an ingest that grows the tape, or sweeps temporary files, must not run meanwhile;
    reading goes on. `workers`: threads, default one per CPU. `on_event` is called with each event from this thread.
    `stop`: set it to end early.

    Raises NotFoundError (no store), UsageError (no such front-end, one that cannot be stored, or sound below its rate),
    ConflictError (a locked store; an array of this name by another recipe), CorruptError (damaged waveform: nothing of
    that shard is written), MachineError (disk), InterruptedRun.
    """
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", "at least one has to work", "leave --workers away: one per CPU")
    began = time.monotonic()
    job = _Derive(Path(store), front_end)
    summary = DeriveSummary(job.final, front_end)
    if front_end in job.store.spec.front_ends:
        summary.note = "the ingest of this store writes it: there is nothing to derive"
        summary.videos = coverage(job.store)[job.array.path]["videos"]
        return summary
    tell, stop = on_event or (lambda event: None), stop or threading.Event()
    with StoreLock(job.root) as lock:
        lock.exclusive("derive")
        job = _Derive(Path(store), front_end)  # as the last ingest left it
        job.begin()
        tasks = [t for t in job.committed() if not job.is_done(t)]
        videos = [n for t in tasks for n in job.sounding(t)]
        tell(DeriveStarted(len(tasks), len(videos), job.seconds_of(videos)))
        threads = max(1, min(workers or _cpus(), len(tasks)))
        for task, size in _each(job.do, tasks, threads, stop):
            summary.tasks += 1
            summary.size += size
            summary.seconds += job.seconds_of(job.sounding(task))
            tell(DeriveDone(task.number, size, len(tasks) - summary.tasks))
        if stop.is_set() and summary.tasks < len(tasks):
            raise InterruptedRun(
                f"stopped after {summary.tasks} of {len(tasks)} tasks of {job.final}",
                "what is stored stays",
                "repeat the same command: it goes on from here",
            )
        job.finish()
    summary.pending = job.store.pending_tasks
    summary.videos = sum(len(job.sounding(t)) for t in job.committed())
    summary.wall = time.monotonic() - began
    return summary


def outstanding(store: str | os.PathLike[str], front_end: str) -> dict[str, Any]:
    """What `derive` would do, without doing it: tasks, videos, seconds of sound, bytes. Raises as `derive`."""
    job = _Derive(Path(store), front_end)
    job.check_recipe()
    tasks = [] if front_end in job.store.spec.front_ends else [t for t in job.committed() if not job.is_done(t)]
    videos = [n for t in tasks for n in job.sounding(t)]
    chunk = job.array.rate * job.array.row[0] * 2 + 4
    size = sum(chunk * len(job.chunks(n)) for n in videos)
    return {"tasks": len(tasks), "videos": len(videos), "seconds": job.seconds_of(videos), "bytes": size}


def coverage(store: Store) -> dict[str, dict[str, Any]]:
    """How much of a store each spectrogram array holds: path -> videos (that it holds), of (videos with sound),
    complete, unfinished (still under its dotted name), recipe (hash). Only current ok videos count."""
    out: dict[str, dict[str, Any]] = {}
    sounding = [int(n) for n in store.numbers if store.has_sound[n]]
    folder = store.path / "spectrograms"
    places = sorted(p.parent for p in folder.glob("*/zarr.json")) if folder.is_dir() else []
    for place in places:
        name = place.name.removeprefix(".")
        if name not in FRONT_ENDS or ".tmp." in name:
            continue
        array = spectrogram_array(name)
        files = {p.name for p in place.iterdir()}
        covered = sum(
            all(Path(array.key(s)).name in files for s in _shards(array, _chunks(store, array, n), store))
            for n in sounding
        )
        recipe = _recipe_of(place) or store.spec.to_json()["front_ends"].get(name)
        whole = covered == len(sounding) and not place.name.startswith(".")
        out[array.path] = {
            "videos": covered,
            "of": len(sounding),
            "complete": whole,
            "unfinished": place.name.startswith("."),
            "recipe": recipe,
        }
    return out


class _Derive:
    """One array to be derived."""

    def __init__(self, root: Path, front_end: str) -> None:
        self.recipe: FrontEnd = named(front_end)
        self.array: ArraySpec = spectrogram_array(front_end)  # UsageError where rows per second are not whole
        self.root = root
        self.store = Store(root)
        if self.store.spec.sample_rate < self.recipe.sample_rate:
            raise UsageError(
                f"{front_end} needs sound at {self.recipe.sample_rate} Hz",
                f"{root} holds {self.store.spec.sample_rate} Hz",
                f"ingest into another store with --sample-rate {self.recipe.sample_rate}",
            )
        self.final = root / self.array.path
        self.dotted = self.final.with_name(f".{front_end}")

    @property
    def folder(self) -> Path:
        """Where the array lies now."""
        return self.final if self.final.is_dir() else self.dotted

    def committed(self) -> list[Task]:
        status = self.store.facts["status"]
        return [t for p in self.store.plans for t in p.tasks if status[t.first] != "pending"]

    def sounding(self, task: Task) -> list[int]:
        """Numbers of the ok videos of a task that have rows to store."""
        store = self.store
        return [n for n in task.videos if store.ok[n] and store.has_sound[n] and self.chunks(n)]

    def chunks(self, number: int) -> range:
        return _chunks(self.store, self.array, number)

    def seconds_of(self, numbers: list[int]) -> float:
        return sum(int(self.store.samples[n]) for n in numbers) / self.store.spec.sample_rate

    def is_done(self, task: Task) -> bool:
        """A shard appears whole or not at all, so a task is done when all its shards are there."""
        shards = {s for n in self.sounding(task) for s in _shards(self.array, self.chunks(n), self.store)}
        return all(self._file(s).is_file() for s in shards)

    def check_recipe(self) -> None:
        """ConflictError where a finished array of this name was made by another recipe."""
        if self.final.is_dir() and self.recipe.name not in self.store.spec.front_ends:
            found = _recipe_of(self.final) or dict(self.store.spec.foreign).get(self.recipe.name)
            if found != self.recipe.hash:
                raise ConflictError(
                    f"{self.final} was computed by another recipe",
                    f"it has {found}, this avstore {self.recipe.hash}",
                    "use the avstore version that wrote it, or remove that folder and derive it again",
                )

    def begin(self) -> None:
        """The array's folder and metadata, for the tape as it is now."""
        self.check_recipe()
        if self.dotted.is_dir() and (self.final.is_dir() or _recipe_of(self.dotted) != self.recipe.hash):
            self._drop(self.dotted)  # left by an interrupted derive with another recipe
        with machine_errors(self.folder):
            if not self.folder.is_dir():
                self.folder.mkdir(parents=True)
                sync_folder(self.folder.parent)
            for path in self.folder.glob("*.tmp.*"):
                path.unlink(missing_ok=True)  # of a derive that was killed: we hold the lock alone
        import torch

        versions: dict[str, set[str]] = {"torch": {str(torch.__version__)}, "numpy": {np.__version__}}
        with contextlib.suppress(CorruptError, FileNotFoundError, KeyError, TypeError):
            for name, values in read_json(self.folder / "zarr.json")["attributes"]["versions"].items():
                versions.setdefault(name, set()).update(values)
        attributes = {
            "front_end": self.recipe.name,
            "recipe": self.recipe.hash,
            "versions": {name: sorted(values) for name, values in versions.items()},
        }
        spec = self.store.spec
        metadata = canonical_json(self.array.metadata(spec.shard_seconds, self.store.tape_seconds, attributes))
        file = self.folder / "zarr.json"
        if not file.is_file() or file.read_bytes() != metadata:
            write_atomic(file, metadata)

    def finish(self) -> None:
        """Gives a complete array its name."""
        if self.folder == self.dotted:
            with machine_errors(self.final):
                sync_folder(self.dotted)
                os.rename(self.dotted, self.final)
                sync_folder(self.final.parent)

    def do(self, task: Task) -> int:
        """Computes and writes the shards of one task; returns the bytes."""
        import torch

        from avstore.frontends import spectrogram_rows

        torch.set_num_threads(1)  # tasks run beside one another; and the decoding children compute so
        writer: ShardWriter | None = None
        shard, size, per_shard = -1, 0, self.store.spec.shard_seconds  # one inner chunk a second
        try:
            for number in self.sounding(task):
                waveform, _ = self.store.waveform(number)
                rows = spectrogram_rows(waveform, self.recipe.name, self.store.spec.sample_rate)
                for i, chunk in enumerate(self.chunks(number)):
                    if chunk // per_shard != shard:
                        if writer is not None:
                            writer.close()
                        shard = chunk // per_shard
                        writer = ShardWriter(self._file(shard), per_shard)
                    assert writer is not None
                    part = rows[i * self.array.rate : (i + 1) * self.array.rate]
                    missing = self.array.rate - len(part)
                    payload = encode_rows(np.pad(part, ((0, missing), (0, 0)), constant_values=np.float16(np.nan)))
                    writer.append(chunk % per_shard, payload)
                    size += len(payload)
            if writer is not None:
                writer.close()
        except BaseException:
            if writer is not None:
                writer.abort()
            raise
        return size

    def _file(self, shard: int) -> Path:
        return self.folder / Path(self.array.key(shard)).name

    def _drop(self, folder: Path) -> None:
        with machine_errors(folder):
            for path in folder.iterdir():
                path.unlink()
            folder.rmdir()
            sync_folder(folder.parent)


def _chunks(store: Store, array: ArraySpec, number: int) -> range:
    """Tape seconds in which a video with sound has rows."""
    rows = int(store.samples[number]) * array.rate // store.spec.sample_rate
    place = int(store.places[number])
    return range(place, place - (-rows // array.rate))


def _shards(array: ArraySpec, chunks: range, store: Store) -> range:
    size = store.spec.shard_seconds
    return range(chunks.start // size, -(-chunks.stop // size)) if len(chunks) else range(0)


def _recipe_of(folder: Path) -> str | None:
    """The recipe's hash in the attributes of a derived array; None where it is not there."""
    try:
        found = read_json(folder / "zarr.json")["attributes"]["recipe"]
    except (CorruptError, FileNotFoundError, KeyError, TypeError):
        return None
    return found if isinstance(found, str) else None


def _each(
    do: Callable[[Task], int], tasks: list[Task], threads: int, stop: threading.Event
) -> Iterator[tuple[Task, int]]:
    """Results in the order of the tasks; at most two tasks a thread are begun ahead, so that a stop comes soon."""
    import torch

    before = torch.get_num_threads()
    pool = ThreadPoolExecutor(threads, thread_name_prefix="derive")
    running: list[tuple[Task, Future[int]]] = []
    waiting = iter(tasks)
    try:
        while True:
            while len(running) < 2 * threads and not stop.is_set() and (task := next(waiting, None)) is not None:
                running.append((task, pool.submit(do, task)))
            if not running:
                return
            task, future = running.pop(0)
            yield task, future.result()
    finally:
        for _, future in running:
            future.cancel()
        wait([future for _, future in running])
        pool.shutdown()
        torch.set_num_threads(before)


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


__all__ = ["DeriveDone", "DeriveStarted", "DeriveSummary", "coverage", "derive", "outstanding"]
