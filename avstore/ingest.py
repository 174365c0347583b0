"""Ingest: a folder of media into a store. Repeating it resumes; a finished one repeated changes nothing.

    list -> probe -> plan (slots fixed, written under the exclusive lock) -> decode in children -> shards -> records

A library function: it prints nothing and tells what happens through `on_event` (see `avstore.events`).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import socket
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore import events, groups
from avstore.children import Job, Pool, Result
from avstore.durable import machine_errors, temporary, write_new
from avstore.errors import ConflictError, InterruptedRun, MachineError, UsageError, did_you_mean
from avstore.events import Event, Summary
from avstore.ledger import Ledger
from avstore.lists import is_list, read_list
from avstore.lock import StoreLock, require_locks
from avstore.plan import Probed, failure, make_plan, slot_seconds, split_failure, too_long
from avstore.records import Plan, Task, plan_path
from avstore.sources import Entry, Listing, decode_path, encode_path, read_source, require_root
from avstore.spec import PROFILES, Spec
from avstore.tasks import TaskWriter

PROBE_BYTES_PER_SECOND = 20e6  # how fast a packet scan must be at least, for the CPU limit of a probe
UNFINISHED = re.compile(r"\.tmp\.\d+\Z")
SPEC_FIELDS = {f.name for f in dataclasses.fields(Spec)} - {"height", "width", "picture"}


def ingest(
    source: str | os.PathLike[str],
    store: str | os.PathLike[str] | None = None,
    *,
    root: str | os.PathLike[str] | None = None,
    list_kind: str | None = None,
    profile: str | None = None,
    size: tuple[int, int] | None = None,
    workers: int | None = None,
    shard: tuple[int, int] | None = None,
    retry_failed: bool = False,
    changed: bool = False,
    moved: bool = False,
    on_event: Callable[[Event], None] | None = None,
    stop: threading.Event | None = None,
    **options: Any,
) -> Summary:
    """Ingests `source`, a folder, one file or a list, into `store` (default: `<name of source>.zarr` in the current
    folder).

    A list is a file that ends in .csv, .tsv, .jsonl, .ndjson or .txt, or whatever comes with `root` (the folder of its
    media, default: that of the list) or `list_kind` (see `avstore.lists.read_list`).
    `profile` (a key of `spec.PROFILES`), `size` = (height, width) in pixels and `options` (fields of `Spec`: fps,
    sample_rate, fit, codec, quality, front_ends, shard_seconds, and the limits) make the spec of a new store; for one
    that is there, those that are given must agree with it. `workers`: decoding children, default one per CPU.
    `shard` = (i, n): only tasks with number % n == i, beside others that do the rest. `retry_failed`: plan failed
    files anew; `changed`: also files whose size has changed; `moved`: the source folder has another path now.
    `on_event` is called with each event, from this thread or (ChildDied) another. `stop`: set it to end early.

    Raises NotFoundError (no such source), UsageError, ConflictError (another spec or source, a locked store),
    MachineError (disk; nothing of the task at hand is committed), InterruptedRun. Files that fail raise nothing: they
    are in the Summary, each with its reason.
    """
    given = _given(profile, size, options)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", "at least one has to work", "leave --workers away: one per CPU")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard {shard[0]}/{shard[1]}", "i/n with i from 0 to n - 1", "avstore ingest --shard 0/4")
    source = Path(source)
    name = source.resolve().stem if source.is_file() else source.resolve().name
    target = Path(store) if store is not None else Path.cwd() / f"{name}.zarr"
    as_list = (root, list_kind) if root is not None or list_kind is not None or is_list(source) else None
    run = _Run(
        source, target, as_list, given, workers, shard, on_event or (lambda event: None), stop or threading.Event()
    )
    try:
        return run.all(retry_failed, changed, moved)
    except KeyboardInterrupt:
        raise run.interrupted() from None


def sweep(root: Path) -> list[Path]:
    """Deletes what interrupted runs left (names that end in `.tmp.<pid>`), and returns the paths.

    Only for the holder of the exclusive lock: the files of a run that still works look the same.
    """
    gone = []
    for folder, _, names in os.walk(root):
        for name in names:
            if UNFINISHED.search(name):
                path = Path(folder) / name
                with machine_errors(path):
                    path.unlink(missing_ok=True)
                gone.append(path)
    return gone


def _given(profile: str | None, size: tuple[int, int] | None, options: dict[str, Any]) -> dict[str, Any]:
    """The fields of a Spec that the caller names."""
    for name in options:
        if name not in SPEC_FIELDS:
            raise UsageError(f"unknown option {name!r}", did_you_mean(name, SPEC_FIELDS), "help(avstore.ingest)")
    given: dict[str, Any] = {}
    if profile is not None:
        if profile not in PROFILES:
            raise UsageError(f"unknown profile {profile!r}", did_you_mean(profile, PROFILES), "--profile 112")
        given["height"], given["width"], given["fps"] = PROFILES[profile]
    if size is not None:
        given["height"], given["width"] = size
    given.update({name: value for name, value in options.items() if value is not None})
    if "front_ends" in given:
        given["front_ends"] = tuple(sorted(set(given["front_ends"])))
    Spec(**given)  # wrong values are told before anything is touched
    return given


class _Run:
    """One call of `ingest`."""

    def __init__(
        self,
        source: Path,
        root: Path,
        as_list: tuple[str | os.PathLike[str] | None, str | None] | None,
        given: dict[str, Any],
        workers: int | None,
        shard: tuple[int, int] | None,
        tell: Callable[[Event], None],
        stop: threading.Event,
    ) -> None:
        self.source, self.root, self.given, self.shard, self.tell, self.stop = source, root, given, shard, tell, stop
        self.as_list = as_list  # root and kind of a list; None: the source is a folder or a media file
        self.workers = workers or _cpus()
        self.began = time.monotonic()
        self.pool: Pool | None = None
        self.spec: Spec
        self.ledger: Ledger
        self.folder: Path  # the source folder, resolved
        self.summary = Summary(root, source)
        self.tasks_done = self.tasks_planned = 0

    def all(self, retry_failed: bool, changed: bool, moved: bool) -> Summary:
        listing = self._listing()
        self.folder = listing.root
        real = Path(os.path.realpath(self.root))
        if real == self.folder or real in self.folder.parents:
            raise UsageError(f"the source {self.source} lies inside the store {self.root}", "", "name another STORE")
        groups.require_free(self.root)
        if not groups.is_store(self.root) and not listing.entries:
            left = f"{len(listing.skipped)} files or folders were left out" if listing.skipped else "it is empty"
            raise UsageError(f"no media in {self.source}", left, "avstore ingest FOLDER")
        with machine_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        try:
            with StoreLock(self.root) as lock:
                if self._lock(lock):
                    self._plan(listing, retry_failed, changed, moved)
                    if self.shard is not None:
                        lock.shared()
                else:
                    self._join(listing, moved)
                self._work(self._mine())
                self._again(lock)
                self._finish(listing)
        finally:
            self._close_pool()
        return self.summary

    def _listing(self) -> Listing:
        if self.as_list is None:
            return read_source(self.source, exclude=[self.root])
        listing, report = read_list(self.source, *self.as_list)
        self.summary.listed = str(report)
        return listing

    def interrupted(self) -> InterruptedRun:
        self._close_pool()
        return InterruptedRun(
            f"stopped after {self.tasks_done} of {self.tasks_planned} tasks of {self.root}",
            "what is committed stays",
            "repeat the same command: it goes on from here",
        )

    # The lock, and what stands already

    def _lock(self, lock: StoreLock) -> bool:
        """Whether this process may plan. With `--shard`, others may be at work: then it only joins them."""
        if self.shard is None:
            lock.exclusive()
            return True
        while True:
            if lock.try_exclusive("planning"):
                return True
            lock.shared(wait=lambda: self._wait(lock))
            if groups.is_store(self.root):
                return False
            time.sleep(0.1)  # who planned has died; the shared lock turns exclusive in the next round

    def _wait(self, lock: StoreLock) -> None:
        self.tell(events.Waiting(lock.holder()))
        self._check_stop()

    def _join(self, listing: Listing, moved: bool) -> None:
        self._open_spec()
        self._check_source(moved=False)
        self.ledger = Ledger(self.root)
        self.tell(events.Listed(len(listing.entries), 0, listing.skipped))
        if moved:
            raise ConflictError("others are ingesting into this store", "--moved needs it alone", "wait for them")

    def _open_spec(self) -> None:
        """The spec of the store that is there; what is given must agree with it."""
        self.spec = groups.read_spec(self.root)
        self.spec.require_same(dataclasses.replace(self.spec, **self.given))

    def _check_source(self, moved: bool) -> None:
        here, before = encode_path(os.fsencode(self.folder)), groups.source_of(self.root)
        if before is not None and before != here and not moved:
            raise ConflictError(
                f"the store {self.root} was made from another folder",
                f"from {before}, and this is {here}",
                "add --moved if it is the same folder in another place; else name another STORE",
            )
        groups.write_source(self.root, here)

    # Planning

    def _plan(self, listing: Listing, retry_failed: bool, changed: bool, moved: bool) -> None:
        sweep(self.root)
        there = groups.is_store(self.root)
        if there:
            self._open_spec()
        else:
            require_locks(self.root)
            self.spec = Spec(**self.given)
        with machine_errors(self.root):
            (self.root / "logs").mkdir(exist_ok=True)
        self._check_source(moved or not there)
        self.ledger = Ledger(self.root)
        self._log("began", source=encode_path(os.fsencode(self.folder)))
        if retry_failed and self.ledger.pending():
            retry_failed = False  # or an interrupted retry, repeated, would differ from one that was not
            self.summary.note = "an interrupted ingest was finished first: repeat --retry-failed for what failed in it"
        if stale := [e.key for e in listing.entries if self._columns_differ(e)]:
            words = f"{len(stale)} videos, e.g. {stale[0]}, were planned with other columns than this list gives them"
            self.summary.note = f"{words}: those of the store stay; a new STORE takes the list's"
        wanted = [e for e in listing.entries if self._wanted(e, retry_failed, changed)]
        self.tell(events.Listed(len(listing.entries), len(wanted), listing.skipped))
        probed = list(self._probe(wanted))
        if not there:
            self._choose_kind(probed)
            groups.drop_beginnings(self.root, self.spec)
        if probed:
            self._write_plan([p for p, _ in probed])
        else:
            groups.write_metadata(self.root, self.spec, self.ledger.shards)

    def _wanted(self, entry: Entry, retry_failed: bool, changed: bool) -> bool:
        known = self.ledger.known.get(entry.key)
        if known is None:
            return True
        if not known.committed or known.true_seconds() is not None:
            return False  # planned already, or about to be planned with its true length
        return (retry_failed and known.status == "failed") or (changed and known.size != entry.size)

    def _columns_differ(self, entry: Entry) -> bool:
        known = self.ledger.known.get(entry.key) if self.as_list is not None else None
        return known is not None and not entry.columns.items() <= known.columns().items()

    def _probe(self, entries: list[Entry]) -> Iterator[tuple[Probed, bool]]:
        """Each entry as probed, and whether it has a picture."""
        jobs = (
            self._job("probe", e.path, e.start, e.end, self.spec.cpu_base + e.size / PROBE_BYTES_PER_SECOND, 0, i)
            for i, e in enumerate(entries)
        )
        results = self._results(jobs, len(entries))
        for i, entry in enumerate(entries):
            header = next(results).header
            self.tell(events.Probed(i + 1, len(entries)))
            if "seconds" in header and "failed" not in header:
                seconds = Fraction(header["seconds"])
                if slot_seconds(seconds) <= self.spec.max_seconds + 1:
                    yield Probed(entry, seconds), bool(header["has_picture"])
                    continue
                header = {"failed": "too_large", "message": f"lasts {float(seconds):.0f} s"}
            reason, message = self._failed(header, entry.path)
            yield Probed(entry, failed=failure(reason, message)), False
        results.close()

    def _choose_kind(self, probed: list[tuple[Probed, bool]]) -> None:
        """A source in which nothing has a picture makes an audio store, whatever the size that was asked for."""
        good = [has_picture for p, has_picture in probed if not p.failed]
        if good and not any(good):
            self.spec = Spec(**self.given, picture=False)
            self.summary.note = "no file has a picture: this is an audio store, without frames"
            self._close_pool()

    def _write_plan(self, probed: list[Probed]) -> None:
        """Metadata with the new shapes, then the plan."""
        self._check_stop()
        plan = make_plan(self.spec, probed, self.ledger.plans)
        groups.write_metadata(self.root, self.spec, self.ledger.shards + plan.shards)
        if not write_new(plan_path(self.root, plan.number), plan.to_bytes()):
            raise ConflictError(
                f"plan {plan.number} of {self.root} has just been written by another process",
                "the lock did not keep it out",
                "repeat the command; put the store on a filesystem with working flock if this comes again",
            )
        self.ledger.add_plan(plan)
        self.summary.new += len(plan)
        self.tell(events.Planned(plan.number, len(plan), len(plan.tasks), sum(plan.seconds)))

    # Decoding and writing

    def _mine(self) -> list[tuple[Plan, Task]]:
        tasks = self.ledger.pending()
        return tasks if self.shard is None else [(p, t) for p, t in tasks if t.number % self.shard[1] == self.shard[0]]

    def _work(self, tasks: list[tuple[Plan, Task]]) -> None:
        """Decodes, writes and commits these tasks, in order."""
        if not tasks:
            return
        self.tasks_planned += len(tasks)
        jobs, seconds = [], 0
        for plan, task in tasks:
            for number in task.videos:
                i = number - plan.first_video
                slot = plan.seconds[i]
                seconds += slot
                if plan.probe[i] is None:
                    cpu = self.spec.cpu_base + self.spec.cpu_per_second * slot
                    jobs.append(self._job("decode", plan.path[i], plan.start[i], plan.end[i], cpu, slot, number))
        count = sum(t.count for _, t in tasks)
        self.tell(events.Started(count, seconds, len(tasks), min(self.workers, max(1, len(jobs)))))
        results = self._results(jobs, len(jobs))
        for plan, task in tasks:
            self._check_stop()
            writer = TaskWriter(self.root, self.spec, task)
            try:
                facts = [self._video(plan, number, results, writer) for number in task.videos]
                assert self.pool is not None
                versions = self.pool.hello()
                writer.commit(facts, versions)
            except BaseException:
                writer.abort()
                raise
            fields = {k: [f.get(k) for f in facts] for k in ("status", "reason", "message")}
            self.ledger.add_record(plan, task, fields)
            self.tasks_done += 1
            self.summary.done += task.count
            self.summary.size += writer.size
            self.tell(events.TaskDone(task.number, writer.size, self.tasks_planned - self.tasks_done))
        results.close()

    def _video(self, plan: Plan, number: int, results: Iterator[Result], writer: TaskWriter) -> dict[str, Any]:
        """The facts of the next video of a task; its payloads go to the writer."""
        i = number - plan.first_video
        key, path, slot = plan.key[i], plan.path[i], plan.seconds[i]
        planned = plan.probe[i]
        if planned is not None:
            reason, message = split_failure(planned)
        else:
            result = next(results)
            header = result.header
            if "facts" in header and result.payloads is not None:
                writer.add(plan.place[i], header["index"], result.payloads)
                facts = header["facts"]
                seconds = facts["samples"] / self.spec.sample_rate
                if facts["frames"]:
                    seconds = facts["frames"] / self.spec.fps
                self.summary.seconds += seconds
                self.tell(events.VideoDone(number, key, seconds))
                return facts
            reason, message = self._failed(header, path)
            if reason == "longer_than_planned" and header.get("seconds"):
                message = too_long(Fraction(header["seconds"]), slot)
        self.tell(events.VideoDone(number, key, 0.0, reason, message))
        return {"status": "failed", "reason": reason, "message": message}

    def _again(self, lock: StoreLock) -> None:
        """Plans videos that turned out longer than their slot with their true length, and does them."""
        while longer := [(key, s) for key, k in self.ledger.known.items() if (s := k.true_seconds()) is not None]:
            if lock.mode != "exclusive":
                # Only whoever comes last can plan; tasks that others have in hand would be missed.
                if not lock.try_exclusive("planning"):
                    lock.shared()
                    return
                self.ledger = Ledger(self.root)
                if self.ledger.pending():
                    return
                continue
            probed = []
            for key, seconds in longer:
                known = self.ledger.known[key]
                plan, i = known.plan, known.index
                entry = Entry(key, known.path, known.size, plan.start[i], plan.end[i], known.columns())
                if slot_seconds(seconds) > self.spec.max_seconds + 1:
                    words = f"lasts {float(seconds):.0f} s, {self.spec.max_seconds} s are allowed"
                    probed.append(Probed(entry, failed=failure("too_large", words)))
                else:
                    probed.append(Probed(entry, seconds))
            self._write_plan(probed)
            self._work(self.ledger.pending())

    # Children

    def _job(self, kind: str, path: str, start: str | None, end: str | None, cpu: float, slot: int, number: int) -> Job:
        spool = temporary(self.root / "waveform" / f"video-{number}")
        return Job(kind, os.path.join(self.folder, decode_path(path)), str(spool), cpu, slot, start, end)

    def _results(self, jobs: Iterable[Job], count: int) -> Any:
        """Results in order; raises InterruptedRun instead of ending early."""
        workers = max(1, min(self.workers, count))
        if self.pool is not None and self.pool.workers < workers:
            self._close_pool()
        if self.pool is None:
            self.pool = Pool(workers, self.spec, on_death=self._died)

        def results(pool: Pool) -> Iterator[Result]:
            running = pool.run(jobs, self.stop)
            try:
                yield from running
            finally:
                running.close()  # type: ignore[attr-defined]  # it is a generator
            if self.stop.is_set():
                raise self.interrupted()

        return results(self.pool)

    def _close_pool(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def _died(self, job: Job, reason: str, message: str) -> None:
        path = encode_path(os.fsencode(os.path.relpath(job.path, self.folder)))
        self._log("child died", path=path, kind=job.kind, reason=reason, message=message)
        self.tell(events.ChildDied(path, reason, message))

    def _failed(self, header: dict[str, Any], path: str) -> tuple[str, str | None]:
        """(reason, message) of a file that failed; MachineError where the machine did."""
        if "machine" in header:
            raise MachineError(
                f"cannot read or write {_plain(header['where'])}",
                str(header["message"]),
                "check the disk, then repeat the command: it goes on where it stopped",
            )
        require_root(self.folder)
        full = os.path.join(self.folder, decode_path(path))
        if header.get("gone") and os.path.exists(full):
            raise MachineError(
                f"{path} was away for a moment", "the source folder was not there", "repeat the command: it goes on"
            )
        message = header.get("message")
        if message is None:
            return header["failed"], None
        for outside in (full, str(self.folder) + "/"):
            message = message.replace(outside, "" if outside.endswith("/") else path)
        return header["failed"], _plain(" ".join(message.split()))[:500]

    def _check_stop(self) -> None:
        if self.stop.is_set():
            raise self.interrupted()

    # The end

    def _finish(self, listing: Listing) -> None:
        summary, known = self.summary, self.ledger.known
        summary.skipped = listing.skipped
        sizes = {e.key: e.size for e in listing.entries}
        paths = {e.path for e in listing.entries}
        for key, k in sorted(known.items()):
            if k.status == "ok":
                summary.ok += 1
            elif k.status == "failed":
                summary.failed += 1
                reason = k.reason or "unknown"
                summary.reasons[reason] += 1
                summary.failures.append((key, reason, k.message))
            else:
                summary.pending += 1
            if key in sizes and sizes[key] != k.size:
                summary.changed.append(key)
            elif listing.whole and k.path not in paths:
                summary.removed.append(key)
        if self.shard is None and summary.pending:
            raise MachineError(f"{summary.pending} videos are neither ok nor failed", "this is a bug of avstore")
        summary.wall = time.monotonic() - self.began
        self._log("ended", ok=summary.ok, failed=summary.failed, done=summary.done, wall=round(summary.wall, 3))

    def _log(self, what: str, **more: Any) -> None:
        line = {"time": time.time(), "host": socket.gethostname(), "pid": os.getpid(), "what": what, **more}
        path = self.root / "logs" / "ingest.jsonl"
        with machine_errors(path), open(path, "a", encoding="utf-8") as f:
            f.write(json.dumps(line) + "\n")


def _plain(text: str) -> str:
    """Text that can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()


def _cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
