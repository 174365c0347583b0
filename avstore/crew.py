"""The children of one command: its jobs, their results in order, and what a failed answer means.

A `Pool` knows of jobs and processes; a crew also knows the source folder, so that it tells a file that fails from a
disk or folder that does. Used by planning, ingest, repair and the dry run.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

from avstore.children import Job, Pool, Result
from avstore.durable import temporary
from avstore.errors import InterruptedRun, MachineError
from avstore.plan import too_long
from avstore.records import Plan
from avstore.sources import Entry, decode_path, encode_path, require_root
from avstore.spec import Spec

PROBE_BYTES_PER_SECOND = 20e6  # how fast a packet scan must be at least, for the CPU limit of a probe


class Crew:
    """Up to `workers` children for the files of one folder; started with the first job. A context manager ends them.

    `spools`: the folder for videos that are too large to hand over in memory. `on_death(path, kind, reason, message)`
    is told of each child that dies, from another thread. `stop`: set it and `results` raises `interrupted()`.
    `decode`: who decodes pictures, "pyav" or one of `dali.KINDS`.
    """

    def __init__(
        self,
        folder: Path,
        spec: Spec,
        spools: Path,
        *,
        workers: int | None = None,
        stop: threading.Event | None = None,
        on_death: Callable[[str, str, str, str], None] | None = None,
        interrupted: Callable[[], InterruptedRun] | None = None,
        decode: str = "pyav",
    ) -> None:
        self.folder, self.spec, self.spools, self.decoder = folder, spec, spools, decode
        self.workers = workers or cpus()
        self.stop = stop or threading.Event()
        self.on_death = on_death
        self.interrupted = interrupted or (lambda: InterruptedRun("stopped", "", "repeat the same command"))
        self.pool: Pool | None = None

    def __enter__(self) -> Crew:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        if self.pool is not None:
            self.pool.close()
            self.pool = None

    def use(self, spec: Spec) -> None:
        """Jobs from now on are for this spec."""
        if spec != self.spec:
            self.close()
            self.spec = spec

    def full(self, path: str) -> str:
        """A file of the folder as `os` functions take it."""
        return os.path.join(self.folder, decode_path(path))

    def probe(self, entry: Entry, number: int) -> Job:
        cpu = self.spec.cpu_base + entry.size / PROBE_BYTES_PER_SECOND
        return self._job("probe", entry.path, entry.start, entry.end, cpu, 0, number)

    def decode(self, path: str, start: str | None, end: str | None, slot: int, number: int) -> Job:
        cpu = self.spec.cpu_base + self.spec.cpu_per_second * slot
        return self._job("decode", path, start, end, cpu, slot, number)

    def decode_planned(self, plan: Plan, number: int) -> Job:
        i = number - plan.first_video
        return self.decode(plan.path[i], plan.start[i], plan.end[i], plan.seconds[i], number)

    def _job(self, kind: str, path: str, start: str | None, end: str | None, cpu: float, slot: int, number: int) -> Job:
        spool = temporary(self.spools / f"video-{number}")
        return Job(kind, self.full(path), str(spool), cpu, slot, start, end)

    def results(self, jobs: Iterable[Job], count: int) -> Generator[Result]:
        """Results in the order of the jobs, of which there are about `count`. Raises InterruptedRun when stopped."""
        workers = max(1, min(self.workers, count))
        if self.pool is not None and self.pool.workers < workers:
            self.close()
        if self.pool is None:
            self.pool = Pool(workers, self.spec, on_death=self._died, decode=self.decoder)

        def results(pool: Pool) -> Generator[Result]:
            running: Iterator[Result] = pool.run(jobs, self.stop)
            try:
                yield from running
            finally:
                running.close()  # type: ignore[attr-defined]  # it is a generator
            if self.stop.is_set():
                raise self.interrupted()

        return results(self.pool)

    def versions(self) -> dict[str, str]:
        """Versions of everything that shapes the bytes."""
        if self.pool is None:
            self.pool = Pool(1, self.spec, on_death=self._died, decode=self.decoder)
        return self.pool.hello()

    def failure(self, header: dict[str, Any], path: str) -> tuple[str, str | None]:
        """(reason, message) of a file that failed; MachineError where the machine did."""
        if "machine" in header:
            raise MachineError(
                f"cannot read or write {_plain(header['where'])}",
                str(header["message"]),
                "check the disk, then repeat the command: it goes on where it stopped",
            )
        require_root(self.folder)
        full = self.full(path)
        if header.get("gone") and os.path.exists(full):
            raise MachineError(
                f"{path} was away for a moment", "the source folder was not there", "repeat the command: it goes on"
            )
        message = header.get("message")
        if message is None:
            return header["failed"], None
        for outside in (full, f"{self.folder}/"):
            message = message.replace(outside, "" if outside.endswith("/") else path)
        return header["failed"], _plain(" ".join(message.split()))[:500]

    def failed_facts(self, header: dict[str, Any], path: str, slot: int) -> dict[str, Any]:
        """The facts of a planned video that failed; raises as `failure`."""
        reason, message = self.failure(header, path)
        if reason == "longer_than_planned" and header.get("seconds"):
            message = too_long(Fraction(header["seconds"]), slot)
        return {"status": "failed", "reason": reason, "message": message}

    def _died(self, job: Job, reason: str, message: str) -> None:
        if self.on_death is not None:
            path = encode_path(os.fsencode(os.path.relpath(job.path, self.folder)))
            self.on_death(path, job.kind, reason, message)


def cpus() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _plain(text: str) -> str:
    """Text that can be written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode()
