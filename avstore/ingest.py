"""Ingest: a folder of media into a store. Repeating it resumes; a finished one repeated changes nothing.

    list -> probe -> plan (slots fixed, written under the exclusive lock) -> decode in children -> shards -> records

A library function: it prints nothing and tells what happens through `on_event` (see `avstore.events`).
"""

from __future__ import annotations

import json
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from avstore import dali, events, groups, planning
from avstore.children import Result
from avstore.crew import Crew
from avstore.durable import machine_errors
from avstore.errors import ConflictError, InterruptedRun, MachineError, UsageError
from avstore.events import Event, Summary
from avstore.ledger import Ledger
from avstore.lock import StoreLock, require_locks
from avstore.plan import Probed, split_failure
from avstore.planning import SPEC_FIELDS
from avstore.records import Plan, Task
from avstore.sources import Listing, encode_path
from avstore.spec import Spec
from avstore.tasks import TaskWriter, sweep

__all__ = ["SPEC_FIELDS", "ingest"]


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
    decode: str = "pyav",
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
    `decode`: who decodes pictures: "pyav" (the CPU), "dali" (NVDEC), "auto" (DALI where it works) or another of
    `dali.KINDS`; what the device cannot decode PyAV does, and the record says why.
    `on_event` is called with each event, from this thread or (ChildDied) another. `stop`: set it to end early.

    Raises NotFoundError (no such source), UsageError, ConflictError (another spec or source, a locked store),
    MachineError (disk; nothing of the task at hand is committed), InterruptedRun. Files that fail raise nothing: they
    are in the Summary, each with its reason.
    """
    given = planning.given_fields(profile, size, options)
    if workers is not None and workers < 1:
        raise UsageError(f"{workers} workers", "at least one has to work", "leave --workers away: one per CPU")
    if shard is not None and not 0 <= shard[0] < shard[1]:
        raise UsageError(f"shard {shard[0]}/{shard[1]}", "i/n with i from 0 to n - 1", "avstore ingest --shard 0/4")
    decode, why = dali.choose(decode)
    source = Path(source)
    target = Path(store) if store is not None else planning.default_store(source)
    tell = on_event or (lambda event: None)
    if why:
        tell(events.Decoding(decode, why))
    run = _Run(source, target, given, workers, shard, tell, stop or threading.Event(), decode)
    try:
        return run.all(root, list_kind, retry_failed, changed, moved)
    except KeyboardInterrupt:
        raise run.interrupted() from None


class _Run:
    """One call of `ingest`."""

    def __init__(
        self,
        source: Path,
        root: Path,
        given: dict[str, Any],
        workers: int | None,
        shard: tuple[int, int] | None,
        tell: Callable[[Event], None],
        stop: threading.Event,
        decode: str,
    ) -> None:
        self.source, self.root, self.given, self.shard, self.tell, self.stop = source, root, given, shard, tell, stop
        self.workers, self.decode = workers, decode
        self.began = time.monotonic()
        self.crew: Crew
        self.spec: Spec
        self.ledger: Ledger
        self.folder: Path  # the source folder, resolved
        self.listed = False  # the source is a list
        self.summary = Summary(root, source)
        self.tasks_done = self.tasks_planned = 0

    def all(
        self, root: str | os.PathLike[str] | None, list_kind: str | None, retry_failed: bool, changed: bool, moved: bool
    ) -> Summary:
        listing, report = planning.read(self.source, self.root, root, list_kind)
        self.folder, self.listed = listing.root, report is not None
        self.summary.listed = str(report) if report is not None else None
        with machine_errors(self.root):
            self.root.mkdir(parents=True, exist_ok=True)
        with StoreLock(self.root) as lock:
            planner = self._lock(lock)
            there = groups.is_store(self.root)
            self.spec = planning.open_spec(self.root, self.given) if there else Spec(**self.given)
            with Crew(
                self.folder,
                self.spec,
                self.root / "waveform",
                workers=self.workers,
                stop=self.stop,
                on_death=self._died,
                interrupted=self.interrupted,
                decode=self.decode,
            ) as self.crew:
                if planner:
                    self._plan(listing, there, retry_failed, changed, moved)
                    if self.shard is not None:
                        lock.shared()
                else:
                    self._join(listing, moved)
                self._work(self._mine())
                self._again(lock)
                self._finish(listing)
        return self.summary

    def interrupted(self) -> InterruptedRun:
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
        planning.check_source(self.root, self.folder, moved=False)
        self.ledger = Ledger(self.root)
        self.tell(events.Listed(len(listing.entries), 0, listing.skipped))
        if moved:
            raise ConflictError("others are ingesting into this store", "--moved needs it alone", "wait for them")

    # Planning

    def _plan(self, listing: Listing, there: bool, retry_failed: bool, changed: bool, moved: bool) -> None:
        sweep(self.root)
        if not there:
            require_locks(self.root)
        with machine_errors(self.root):
            (self.root / "logs").mkdir(exist_ok=True)
        planning.check_source(self.root, self.folder, moved or not there)
        groups.write_source(self.root, encode_path(os.fsencode(self.folder)))
        self.ledger = Ledger(self.root)
        self._log("began", source=encode_path(os.fsencode(self.folder)))
        if retry_failed and self.ledger.pending():
            retry_failed = False  # or an interrupted retry, repeated, would differ from one that was not
            self.summary.note = "an interrupted ingest was finished first: repeat --retry-failed for what failed in it"
        stale = [e.key for e in listing.entries if planning.columns_differ(self.ledger, e)] if self.listed else []
        if stale:
            words = f"{len(stale)} videos, e.g. {stale[0]}, were planned with other columns than this list gives them"
            self.summary.note = f"{words}: those of the store stay; a new STORE takes the list's"
        wanted = [e for e in listing.entries if planning.wanted(self.ledger, e, retry_failed, changed)]
        self.tell(events.Listed(len(listing.entries), len(wanted), listing.skipped))
        probed = list(planning.probe(self.crew, wanted, self.tell)) if wanted else []
        if not there:
            if planning.without_picture(probed):  # whatever the size that was asked for
                self.spec = Spec(**self.given, picture=False)
                self.crew.use(self.spec)
                self.summary.note = "no file has a picture: this is an audio store, without frames"
            groups.drop_beginnings(self.root, self.spec)
        if probed:
            self._write_plan([p for p, _ in probed])
        else:
            groups.write_metadata(self.root, self.spec, self.ledger.shards)

    def _write_plan(self, probed: list[Probed]) -> None:
        self._check_stop()
        plan = planning.write_plan(self.root, self.spec, self.ledger, probed)
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
                seconds += plan.seconds[number - plan.first_video]
                if plan.probe[number - plan.first_video] is None:
                    jobs.append(self.crew.decode_planned(plan, number))
        count = sum(t.count for _, t in tasks)
        self.tell(events.Started(count, seconds, len(tasks), min(self.crew.workers, max(1, len(jobs)))))
        results = self.crew.results(jobs, len(jobs))
        for plan, task in tasks:
            self._check_stop()
            writer = TaskWriter(self.root, self.spec, task)
            try:
                facts = [self._video(plan, number, results, writer) for number in task.videos]
                writer.commit(facts, self.crew.versions())
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
        planned = plan.probe[i]
        if planned is not None:
            reason, message = split_failure(planned)
            facts: dict[str, Any] = {"status": "failed", "reason": reason, "message": message}
        else:
            result = next(results)
            if "facts" in result.header and result.payloads is not None:
                writer.add(plan.place[i], result.header["index"], result.payloads)
                facts = result.header["facts"]
                seconds = facts["samples"] / self.spec.sample_rate
                if facts["frames"]:
                    seconds = facts["frames"] / self.spec.fps
                self.summary.seconds += seconds
                self.tell(events.VideoDone(number, plan.key[i], seconds))
                return facts
            facts = self.crew.failed_facts(result.header, plan.path[i], plan.seconds[i])
        self.tell(events.VideoDone(number, plan.key[i], 0.0, facts["reason"], facts["message"]))
        return facts

    def _again(self, lock: StoreLock) -> None:
        """Plans videos that turned out longer than their slot with their true length, and does them."""
        while probed := planning.longer(self.ledger, self.spec):
            if lock.mode != "exclusive":
                # Only whoever comes last can plan; tasks that others have in hand would be missed.
                if not lock.try_exclusive("planning"):
                    lock.shared()
                    return
                self.ledger = Ledger(self.root)
                if self.ledger.pending():
                    return
                continue
            self._write_plan(probed)
            self._work(self.ledger.pending())

    def _died(self, path: str, kind: str, reason: str, message: str) -> None:
        self._log("child died", path=path, kind=kind, reason=reason, message=message)
        self.tell(events.ChildDied(path, reason, message))

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
